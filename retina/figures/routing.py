"""Which tokens are routed to which expert: FigureContext -> picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from retina.datasets.preprocess import Sample
from retina.drawing import COLOURS, OTHERS, coloured, column, grid, legend, photograph, row, scale, text, titled
from retina.evaluation import routing as routing_
from retina.evaluation.routing import ExpertUsage, labels_of
from retina.evaluation.task_metrics import MaskMetrics
from retina.figures.charts import heatmap
from retina.figures.context import MOST_SHOWN, FigureContext, FigureUnavailable, Line, epochs_chart, of_run


if TYPE_CHECKING:
    from model import Routing


class LabelShuffled(Dataset):
    """The label-shuffled control: photographs, each with the masks of the next one."""

    def __init__(self, photographs: Dataset):
        self.photographs = photographs

    def __getitem__(self, i: int) -> Sample:
        return self.photographs[i].with_labels(masks=self.photographs[(i + 1) % len(self)].masks)

    def __len__(self) -> int:
        return len(self.photographs)


def uses_of(ctx: FigureContext, photographs: Dataset) -> dict[str, ExpertUsage]:
    """Where the tokens of photographs go, for every task."""
    masks = [t for t in ctx.tasks.values() if isinstance(t, MaskMetrics)]
    return routing_.collect(ctx.run.net, ctx.batches(photographs, masks))


def has_room(r: Routing, side: int = 240) -> bool:
    """Whether there is a second expert, and room for it in a token of a picture of `side` pixels."""
    return r.experts.shape[1] > 1 and side / r.grid[2] >= 12


def token_grid(image: Tensor, r: Routing, colours: Sequence[Sequence[int]], side: int = 240) -> Image.Image:
    """A photograph under its tokens, each in the colour of its first expert, the second as a square inside

    where there is room for it.
    """
    picture, (_, h, w) = photograph(image, side).convert("L").convert("RGB"), r.grid
    edge = min(w / side, 0.25)  # between tokens, in tokens; the square inside one leaves 0.3 on all sides
    for rank, (inset, alpha) in enumerate(((0, 140), (0.3, 255))[:1 + has_room(r, side)]):
        first = np.array(colours, np.uint8)[r.experts[:, rank].cpu()].reshape(h, w, 3)
        across, down = ((np.arange(side) + 0.5) * n / side % 1 for n in (w, h))  # where in its token a pixel lies
        x, y = ((inset <= at) & (at < 1 - inset - edge) for at in (across, down))
        picture.paste(Image.fromarray(first).resize((side, side), Image.NEAREST), (0, 0),
                      Image.fromarray(np.where(y[:, None] & x, alpha, 0).astype(np.uint8)))
    return picture


def two_heatmaps(titles: Sequence[str], rows: Sequence[str], real: Tensor, shuffled: Tensor,
                 experts: Sequence[int]) -> Image.Image:
    """Shares of tokens (R, E), and below them those of the control; the first MOST_SHOWN rows."""
    rest = f"; {MOST_SHOWN} of {len(rows)}" * (len(rows) > MOST_SHOWN)
    return column(heatmap(x[:MOST_SHOWN, experts].numpy(), rows[:MOST_SHOWN], [str(e) for e in experts], None,
                          (22, 18), title + rest, "expert") for x, title in zip((real, shuffled), titles))


def label_word(ctx: FigureContext) -> str:
    """What the labels of photographs are, by which routes are told apart."""
    return "class" if ctx.run.options["names"].get("category") else "retinopathy grade"


def by_label(ctx: FigureContext, shares: Tensor, experts: Sequence[int]) -> list[Image.Image]:
    """For each task experts by grade or class; nothing where no photograph has any."""
    labels, word = labels_of(ctx.run, ctx.photographs.records), label_word(ctx)
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        return []
    turn = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    (real, names), (mixed, _) = (routing_.averaged(shares[:, of], [labels[i] for i in known])
                                 for of in (known, [known[i] for i in turn]))
    return [two_heatmaps((f"by {word}", "label-shuffled control"), names, a, b, experts)
            for a, b in zip(real, mixed)]


def by_lesion(ctx: FigureContext, experts: Sequence[int]) -> list[Image.Image]:
    """For each task experts by what lies below a token; nothing where less than two photographs have masks."""
    masked = Subset(ctx.photographs, [ctx.numbers[name] for name in ctx.masked])
    if len(masked) < 2:
        return []
    heatmaps = []
    for real, mixed in zip(*(uses_of(ctx, x).values() for x in (masked, LabelShuffled(masked)))):
        there = [i for i, n in enumerate(real.tokens) if n]
        if not there:  # no lesion, and of no photograph all masks are known
            return []
        a, b = ((use.below[:, 0] / use.tokens[:, None])[there] for use in (real, mixed))
        heatmaps.append(two_heatmaps(("by lesion below the token", "label-shuffled control"),
                                     [routing_.TOKEN_CLASSES[i] for i in there], a, b, experts))
    return heatmaps


def by_task(ctx: FigureContext, shares: Tensor, experts: Sequence[int]) -> Image.Image:
    """Experts by task, beside the same with the tasks of each photograph in another order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(shares.shape[:2], generator=generator).argsort(0)[..., None].expand_as(shares)
    return two_heatmaps(("by task", "task-shuffled control"), [t.name for t in ctx.run.tasks], shares.mean(1),
                        shares.gather(0, order).mean(1), experts)


def entropy_chart(ctx: FigureContext, experts: int) -> Image.Image:
    """How evenly each task used the experts on validation, over epochs."""
    def bits(usage):
        tokens = usage and torch.tensor(usage["tokens"], dtype=torch.float64)
        return usage and float(routing_.entropy(tokens / tokens.sum()))

    log, most = next(iter(ctx.logs.values())), math.log2(experts)
    lines = [Line(t.name, [bits(line["expert_usage"].get(t.name)) for line in log], colour)
             for t, colour in zip(ctx.run.tasks, COLOURS)]
    chart = epochs_chart(ctx, "entropy of expert usage, validation", f"bits; {most:.3g} if all are used alike",
                         lines, 0.0, max(most, 0.1))
    return chart.picture([(line.words, line.colour, "line") for line in lines])


def routing(ctx: FigureContext) -> Image.Image:
    """Expert routing: over a photograph, and by task, label and lesion, above label-shuffled controls."""
    if ctx.run.net.experts is None:
        raise FigureUnavailable("the run was trained with --num-experts 0, so that there is nothing to route")
    here = uses_of(ctx, ctx.photographs)
    shares = torch.stack([use.shares[:, 0] for use in here.values()])  # (T, n, E)
    used = shares.mean((0, 1)).argsort(descending=True).tolist()
    experts = sorted(used[:MOST_SHOWN])  # as columns of heatmaps
    own = coloured(used)
    colours = [own.get(e, OTHERS) for e in range(len(used))]
    with torch.inference_mode():
        image = ctx.sample(ctx.example).image
        routed = ctx.run.net.routed_maps(image[None].to(ctx.device))[1]
    parts = [*map(text, routed), *(token_grid(image, r, colours) for r in routed.values()),
             *by_label(ctx, shares, experts), *by_lesion(ctx, experts)]
    lines, across = [parts[k:k + len(routed)] for k in range(0, len(parts), len(routed))], 4  # tasks beside each other
    blocks = [grid([part for line in lines for part in line[k:k + across]], min(across, len(routed) - k), (24, 10))
              for k in range(0, len(routed), across)]
    last = row([by_task(ctx, shares, experts), entropy_chart(ctx, len(used))], 36)
    r = next(iter(routed.values()))
    second = ", the second as a square inside" * has_room(r)
    rest = f" (the {len(experts)} most used)" * (len(experts) < len(used))
    keys = [(f"expert {e}", colour, "square") for e, colour in own.items()]
    keys += [("others", OTHERS, "square")] * (len(own) < len(used))
    legends = [legend(keys, 900), scale("0 %", "100 %", "of the tokens go to an expert, in heatmaps")]
    return titled("Expert routing by task, label and lesion",
                  column([column(legends, 6), *blocks, last], 18),
                  f"{of_run(ctx)}. Photograph: {ctx.example}, one token a square, its first expert in colour{second}. "
                  f"Heatmaps: each token goes to {r.experts.shape[1]} of {len(used)} experts{rest}. Controls: what "
                  f"remains by chance, where a photograph has the {label_word(ctx)} or the masks of another. Whether "
                  "answers owe anything to routes, `evaluate.py --routing` says.")
