"""Which tokens go to which expert: Material -> picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset, Subset

from retina.datasets.preprocess import Sample
from retina.drawing import COLOURS, OTHERS, column, legend, row, scale, text, titled
from retina.evaluation import routing as routing_
from retina.evaluation.routing import Use, labels_of
from retina.evaluation.task_metrics import MaskMetrics
from retina.figures import material
from retina.figures.charts import heatmap
from retina.figures.material import Line, MOST_SHOWN, Material, Missing, epochs_chart, of_run, picture_of

if TYPE_CHECKING:
    from model import Routing


class Exchanged(Dataset):
    """Photographs, each with the masks of the next one."""

    def __init__(self, photographs: Dataset):
        self.photographs = photographs

    def __getitem__(self, i: int) -> Sample:
        return self.photographs[i].with_labels(masks=self.photographs[(i + 1) % len(self)].masks)

    def __len__(self) -> int:
        return len(self.photographs)


def uses_of(m: Material, photographs: Dataset) -> dict[str, Use]:
    """Where the tokens of photographs go, for every task."""
    masks = [t for t in m.tasks.values() if isinstance(t, MaskMetrics)]
    return routing_.collect(m.run.net, m.batches(photographs, masks))


@dataclass
class Palette:
    """Which experts have a colour of their own, and which are columns of heatmaps."""
    own: list[int]
    colours: list[Sequence[int]]  # of all experts
    shown: list[int]

    def keys(self) -> Image.Image:
        """The legend."""
        rest = [("others", OTHERS, "square")] if len(self.own) < len(self.colours) else []
        return legend([*((f"expert {e}", self.colours[e], "square") for e in self.own), *rest], 900)


def palette(shares: Tensor) -> Palette:
    """Colours for the most used experts, by shares of tokens (T, n, E)."""
    used = shares.mean((0, 1)).argsort(descending=True).tolist()
    own = sorted(used if len(used) <= len(COLOURS) else used[:len(COLOURS) - 1])
    colours = [COLOURS[own.index(e)] if e in own else OTHERS for e in range(len(used))]
    return Palette(own, colours, sorted(used[:MOST_SHOWN]))


def has_room(r: Routing, side: int = 240) -> bool:
    """Whether there is a second expert, and room for it in a token of a picture of `side` pixels."""
    return r.indices.shape[1] > 1 and side / r.grid[2] >= 12


def token_grid(image: Tensor, r: Routing, colours: Sequence[Sequence[int]], side: int = 240) -> Image.Image:
    """A photograph under its tokens, each in the colour of its first expert, the second as a square inside

    where there is room for it.
    """
    picture = picture_of(image, side).convert("L").convert("RGB")
    layer, mask = Image.new("RGB", picture.size), Image.new("L", picture.size)
    pens, (_, h, w) = [ImageDraw.Draw(x) for x in (layer, mask)], r.grid
    wide, high = side / w, side / h
    edge = min(2, wide / 4)  # between tokens
    for i, experts in enumerate(r.indices.tolist()):
        y, x = divmod(i, w)
        for rank, e in enumerate(experts[:2 if has_room(r, side) else 1]):
            inset = 0.3 * rank
            box = ((x + inset) * wide, (y + inset) * high,
                   (x + 1 - inset) * wide - edge, (y + 1 - inset) * high - edge)
            pens[0].rectangle(box, tuple(colours[e]))
            pens[1].rectangle(box, 255 if rank else 140)
    picture.paste(layer, (0, 0), mask)
    return picture


def two_heatmaps(titles: Sequence[str], rows: Sequence[str], real: Tensor, shuffled: Tensor,
                 experts: Sequence[int]) -> Image.Image:
    """Shares of tokens (R, E), and below them the same for shuffled images; the first MOST_SHOWN rows."""
    rest = f"; {MOST_SHOWN} of {len(rows)}" * (len(rows) > MOST_SHOWN)
    return column([heatmap(x[:MOST_SHOWN, experts].numpy(), rows[:MOST_SHOWN], [str(e) for e in experts], None,
                           (22, 18), 1.0, title + rest, "expert") for x, title in zip((real, shuffled), titles)], 8)


def label_word(m: Material) -> str:
    """What the labels of photographs are, by which routes are told apart."""
    return "class" if m.run.options["classes"] else "retinopathy grade"


def by_label(m: Material, shares: Tensor, experts: Sequence[int]) -> list[Image.Image]:
    """For each task experts by grade or class; nothing where no photograph has any."""
    labels, word = labels_of(m.run, m.photographs.records), label_word(m)
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        return []
    turn = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    (real, names), (mixed, _) = (routing_.averaged(shares[:, of], [labels[i] for i in known])
                                 for of in (known, [known[i] for i in turn]))
    return [two_heatmaps((f"by {word}", f"by {word} of another"), names, a, b, experts)
            for a, b in zip(real, mixed)]


def by_lesion(m: Material, experts: Sequence[int]) -> list[Image.Image]:
    """For each task experts by what lies below a token; nothing where less than two photographs have masks."""
    indices = [i for i, r in enumerate(m.photographs.records) if r.masks is not None][:material.MOST]
    masked = Subset(m.photographs, indices)
    if len(masked) < 2:
        return []
    found = []
    for real, mixed in zip(*(uses_of(m, x).values() for x in (masked, Exchanged(masked)))):
        there = [i for i, n in enumerate(real.tokens) if n]
        a, b = ((use.below[:, 0] / use.tokens[:, None])[there] for use in (real, mixed))
        found.append(two_heatmaps(("by what lies below a token", "by masks of another"),
                                  [routing_.KINDS[i] for i in there], a, b, experts))
    return found


def by_task(m: Material, shares: Tensor, experts: Sequence[int]) -> Image.Image:
    """Experts by task, beside the same with the tasks of each photograph in another order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(shares.shape[:2], generator=generator).argsort(0)[..., None].expand_as(shares)
    return two_heatmaps(("by task", "by task, shuffled"), [t.name for t in m.run.tasks], shares.mean(1),
                        shares.gather(0, order).mean(1), experts)


def entropy_chart(m: Material, experts: int) -> Image.Image:
    """How evenly each task used the experts on validation, over epochs."""
    def bits(usage):
        tokens = usage and torch.tensor(usage["tokens"], dtype=torch.float64)
        return usage and float(routing_.entropy(tokens / tokens.sum()))

    log, most = next(iter(m.logs.values())), math.log2(experts)
    lines = [Line(t.name, [bits(line["expert_usage"].get(t.name)) for line in log], colour)
             for t, colour in zip(m.run.tasks, COLOURS)]
    chart = epochs_chart(m, "entropy of the use of experts over training", f"bits; {most:.3g} if all are used alike",
                         lines, 0.0, max(most, 0.1))
    return column([chart.picture(), legend((line.words, line.colour, "line") for line in lines)], 2)


def routing(m: Material) -> Image.Image:
    """Which tokens go to which expert: over a photograph, by task, class and lesion, beside shuffled images."""
    if m.run.net.experts is None:
        raise Missing("the run was trained with --experts 0, so that there is nothing to route")
    here = uses_of(m, m.photographs)
    shares = torch.stack([use.shares[:, 0] for use in here.values()])  # (T, n, E)
    experts = palette(shares)
    image = m.sample(m.example).image
    with torch.inference_mode():
        routed = m.run.net.routed_maps(image[None].to(m.device))[1]
    parts = [[text(t), token_grid(image, r, experts.colours)] for t, r in routed.items()]
    for more in (by_label(m, shares, experts.shown), by_lesion(m, experts.shown)):
        for part, picture in zip(parts, more):
            part.append(picture)
    last = row([by_task(m, shares, experts.shown), entropy_chart(m, shares.shape[2])], 36)
    r, all_ = next(iter(routed.values())), shares.shape[2]
    second = ", the second as a square inside" * has_room(r)
    rest = f" (the {len(experts.shown)} most used)" * (len(experts.shown) < all_)
    keys = column([experts.keys(), scale("0 %", "100 %", "of the tokens go to an expert, in heatmaps")], 6)
    return titled("Which tokens go to which expert",
                  column([keys, row([column(p, 10) for p in parts], 24), last], 18),
                  f"{of_run(m)}. Photograph: {m.example}, one token a square, its first expert in colour{second}. "
                  f"Heatmaps: each token goes to {r.indices.shape[1]} of {all_} experts{rest}; below each what remains "
                  f"by chance, where a photograph has the {label_word(m)} or the masks of another. Whether answers owe "
                  "anything to routes, `evaluate.py --routing` says.")
