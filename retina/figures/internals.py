"""Figures about how a run comes to its answers: Material -> picture.

    tsne_map        which photographs look alike to the network
    gradcam         where in a photograph an answer comes from
    filters         one photograph on its way through the network

Grad-CAM: Selvaraju et al. 2017, arXiv 1610.02391
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from retina import drawing
from retina.datasets import records
from retina.datasets.preprocess import Sample
from retina.drawing import COLOURS, OTHERS, PALE, SMALL, column, legend, row, scale, shades, text, titled
from retina.datasets.synthetic import LESIONS
from retina.evaluation import routing
from retina.evaluation.task_metrics import ClassMetrics, MaskMetrics, PointMetrics, TaskMetrics
from retina.figures import material, tsne
from retina.figures.charts import Axis, Chart, heatmap
from retina.figures.material import MOST_SHOWN, SMALLER, Material, Missing, best_median_worst, lesion_legend, \
    masks_of, of_run, picture_of
from retina.inference import full_size

if TYPE_CHECKING:
    from model import Net


# ---- which photographs look alike ----

def neighbours_kept(x: Tensor, y: Tensor, most: int = 10) -> float:
    """Of the nearest neighbours of each point (n, C), the share that are among its nearest in the map (n, 2)."""
    most = min(most, len(x) - 1)
    nearest = [tsne.squared_distances(z.double()).fill_diagonal_(math.inf).topk(most, largest=False).indices
               for z in (x, y)]
    return float((nearest[0][:, :, None] == nearest[1][:, None]).any(2).double().mean())


@dataclass
class Dots:
    """Points of a map that have something in common."""
    words: str
    colour: Sequence[int]
    which: list[int]
    ring: bool = False


def map_of(title: str, y: Tensor, groups: Iterable[Dots]) -> Image.Image:
    """Points (n, 2) in the colours of their groups, both axes in one unit."""
    low, high = y.amin(0), y.amax(0)
    at = (2 * y - low - high) / (high - low).max().clamp(min=1e-12)  # -1 to 1
    groups, edges = [g for g in groups if g.which], ((-1.0, ""), (1.0, ""))
    chart = Chart(title, Axis("", -1.03, 1.03, edges), Axis("", -1.03, 1.03, edges), 440, 440)
    for g in groups:
        chart.dots(*at[g.which].T.tolist(), g.colour, 4.5 if g.ring else 4.0, g.ring)
    return column([chart.picture(), legend(((f"{g.words} ({len(g.which)})", g.colour, "ring" if g.ring else "dot")
                                            for g in groups), 460)], 4)


def groups_by_label(task: ClassMetrics, labels: Sequence[int | None]) -> list[Dots]:
    """Grades in shades of one scale, as amounts; classes in colours of their own, as many as there are."""
    def of(wanted):
        return [i for i, label in enumerate(labels) if label in wanted]

    common = sorted({v for v in labels if v is not None}, key=lambda v: -labels.count(v))
    own = sorted(common if len(common) <= len(COLOURS) else common[:len(COLOURS) - 1])
    groups = [Dots("no label", OTHERS, of([None])),
              Dots("other classes", PALE, of([v for v in common if v not in own]))]
    for k, v in enumerate(own):
        colour = shades(np.array(0.97 * v / (task.classes - 1))).tolist() if task.ordered else COLOURS[k]
        groups.append(Dots(f"{task.title} {task.word(v)}", colour, of([v])))
    return groups


def tsne_map(m: Material) -> Image.Image:
    """Which photographs look alike to the network: t-SNE of pooled features, training and split in one map."""
    x = torch.cat([m.learned[1], m.here[1][:material.MOST]])
    records, border, n = m.training.records + m.photographs.records[:material.MOST], len(m.training), len(x)
    if n < 5:
        raise Missing(f"{n} photographs are too few for a map; at least 5")
    perplexity = min(30.0, (n - 1) / 3) if m.perplexity is None else m.perplexity
    y = tsne.tsne(x, perplexity, m.seed)
    maps = [map_of("by split", y, [Dots("training", COLOURS[4], list(range(border))),
                                   Dots(m.words, COLOURS[5], list(range(border, n)), ring=True)])]
    if task := m.first(ClassMetrics):
        labels = [r.labels.get(task.label) for r in records]
        maps.insert(0, map_of(f"by {task.title}", y, groups_by_label(task, labels)))
    return titled("Which photographs look alike to the network", row(maps, 24),
                  f"{m.name}, epoch {m.run.epoch}: t-SNE (perplexity {perplexity:.3g}, seed {m.seed}) of "
                  f"the encoder's deepest map averaged over positions, {x.shape[1]} numbers for each of {n} "
                  f"photographs. Of its 10 nearest neighbours there, a photograph keeps {neighbours_kept(x, y):.0%} in "
                  "the map. Sizes of clusters and distances between them mean nothing.")


# ---- where an answer comes from ----

def grad_cam(net: Net, task: TaskMetrics, image: Tensor, classes: Sequence[int]) -> list[list[Tensor]]:
    """One sample (3, S, S) uint8 -> for each class a map (h_i, w_i) of each resolution that a PooledHead averages.

    The network is in evaluation mode. alpha_k = mean over positions of d logit / d A_k, map = sum_k alpha_k A_k (eqs. 1
    and 2, before the ReLU). Since the head is linear behind the averages, the sums of a class's maps and its bias are
    its logit: the maps tell what each position adds to it.
    """
    head, device = net.heads[task.name], next(net.parameters()).device
    with torch.no_grad():
        maps, _ = net.routed_maps(image[None].to(device), full_size.rows(net, [task], 1, device))
        convolved = [a.requires_grad_() for a in head.convolved(maps[task.name])]
    with torch.enable_grad():
        logits = head.classify(convolved)[0]
        slopes = [torch.autograd.grad(logits[c], convolved, retain_graph=True) for c in classes]
    return [[(g.mean((2, 3), keepdim=True) * a.detach()).sum(1)[0].cpu() for g, a in zip(of_class, convolved)]
            for of_class in slopes]


def heat(maps: Sequence[Tensor], side: int) -> Tensor:
    """Maps of all resolutions added up, then cut off below 0 (eq. 2): (side, side); what a position adds is spread

    over the pixels that it covers.
    """
    return sum(F.interpolate(a[None, None], (side, side), mode="bilinear")[0, 0] * a.numel() / side ** 2
               for a in maps).clamp(min=0)


def share_on(heat_: Tensor, where: Tensor, within: Tensor) -> float:
    """Of a map's mass within an area, the share that lies where `where` is true; 0 for a map without any."""
    return float((heat_ * (where & within)).sum() / (heat_ * within).sum().clamp(min=1e-12))


@dataclass
class Seen:
    """One photograph with its heat."""
    true: int
    predicted: int
    heat: dict[int, Tensor]  # class -> (S, S)
    lesions: Tensor | None  # (S, S) bool; None: not all known, or none there
    retina: Tensor  # (S, S) bool

    def on_lesions(self, heat_: Tensor) -> float:
        """Share of what lies on the retina."""
        return share_on(heat_, self.lesions, self.retina)


def seen(m: Material, task: ClassMetrics, name: str, tally: Tensor) -> Seen:
    """Grad-CAM of the predicted and of the true class of a photograph."""
    sample, true, predicted = m.sample(name), int(tally[-1]), int(tally[:-1].argmax())
    maps = grad_cam(m.run.net, task, sample.image, (predicted, true))
    lesions = (sample.masks[:-1] == 1).any(0) if lesions_known(sample) else None
    return Seen(true, predicted, {c: heat(x, m.photographs.size) for c, x in zip((predicted, true), maps)},
                lesions if lesions is not None and lesions.any() else None, sample.image.amax(0) > routing.DARK)


def lesions_known(sample: Sample) -> bool:
    """Whether masks of all kinds of lesions are known."""
    return set(LESIONS[:-1]) <= masks_of(sample).keys()


def warm(image: Tensor, heat_: Tensor, side: int) -> Image.Image:
    """A photograph in grey under its heat."""
    grey = picture_of(image, side).convert("L").convert("RGB")
    amount = F.interpolate(heat_[None, None] / heat_.max().clamp(min=1e-12), (side, side), mode="bilinear")[0, 0]
    mask = Image.fromarray((60 + 130 * amount).to(torch.uint8).numpy())
    return Image.composite(Image.fromarray(shades(amount.numpy())), grey, mask)


def heat_panels(m: Material, task: ClassMetrics, name: str, which: str, p: Tensor, s: Seen,
                side: int = 280) -> Image.Image:
    """A photograph with its lesions; under the heat of the predicted class; under that of the true one, if another."""
    sample = m.sample(name, side)
    said = f"lesions cover {s.on_lesions(torch.ones(())):.1%} of the retina" if s.lesions is not None else \
        "no lesions" if lesions_known(sample) else "lesions not all known"
    panels = [(drawing.tinted(picture_of(sample.image, side), masks_of(sample)), f"{which}: {name}\n{said}")]
    roles = {s.predicted: "predicted and true"} if s.predicted == s.true else {s.predicted: "predicted", s.true: "true"}
    for c, role in roles.items():
        on = "" if s.lesions is None else f"\n{s.on_lesions(s.heat[c]):.1%} of it on lesions"
        panels.append((warm(sample.image, s.heat[c], side), f"{role}: {task.title} {task.word(c)}, p {p[c]:.2f}{on}"))
    return row([column([panel, text(words, SMALL, width=side)], 4) for panel, words in panels])


def gradcam(m: Material) -> Image.Image:
    """Where in a photograph an answer comes from: Grad-CAM of the predicted and of the true class, beside lesions."""
    task = m.classifications()[0]
    tallies = m.tallies(task)
    p = dict(zip(tallies, m.probabilities(task, torch.stack(list(tallies.values()))[:, :-1])))
    masked = [name for name in tallies if m.photographs.records[m.numbers[name]].masks is not None][:material.MOST]
    ranked = masked or list(tallies)
    chosen = best_median_worst({name: float(p[name][int(tallies[name][-1])]) for name in ranked})
    found = {name: seen(m, task, name, tallies[name]) for name in dict.fromkeys([*masked, *chosen])}
    parts = [heat_panels(m, task, name, which, p[name], found[name]) for name, which in chosen.items()]
    said = ""
    if known := [s for s in found.values() if s.lesions is not None]:
        on, even = (sum(s.on_lesions(of(s)) for s in known) / len(known) for of in (
            lambda s: s.heat[s.predicted], lambda s: torch.ones(())))
        said = (f" Mean over {len(known)} photographs with lesions: {on:.1%} of what the map of the predicted class "
                f"has on the retina lies on lesions, which cover {even:.1%} of it.")
    keys = [scale("nothing", "most", "added to the answer"), *([lesion_legend()] * bool(masked))]
    return titled(f"Where the {task.title} comes from", column([*keys, *parts], 12),
                  f"{m.name}, epoch {m.run.epoch}. Best, median and worst of {len(ranked)} {m.words} photographs"
                  f"{' with masks' * bool(masked)}, by the probability p of the true class at the chosen temperature. "
                  "Grad-CAM of the maps that the head averages, at strides 4 to 32, added up, below zero cut "
                  f"off.{said}")


# ---- one photograph on its way through the network ----

def principal_colours(x: Tensor) -> tuple[np.ndarray, float]:
    """A map (C, h, w) -> its first three principal components as red, green, blue (h, w, 3) uint8, and their share

    of the variance (Pearson 1901; Hotelling 1933). Components run from their 1st to their 99th percentile.
    """
    c, h, w = x.shape
    flat = x.double().flatten(1).T  # (h * w, C)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat)  # ascending
    vectors = vectors.flip(1)[:, :3]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # or signs are a toss
    found = flat @ vectors  # (h * w, at most 3)
    low, high = found.quantile(0.01, 0), found.quantile(0.99, 0)
    colours = F.pad(((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1), (0, max(0, 3 - c)))
    values = values.clamp(min=0).flip(0)
    return (255 * colours).round().to(torch.uint8).view(h, w, 3).numpy(), float(values[:3].sum() / values.sum())


def panel(colours: np.ndarray, words: str) -> Image.Image:
    """Colours (h, w, 3) as a square, each of them a square itself, with words below."""
    picture = Image.fromarray(colours).resize((SMALLER, SMALLER), Image.NEAREST)
    return column([picture, text(words, SMALL, PALE, SMALLER)], 3)


def map_panels(maps: Mapping[str, Tensor]) -> list[Image.Image]:
    """Maps (C, h, w) as colours, with name, size and the share of the variance that is shown."""
    panels = []
    for words, x in maps.items():
        colours, share = principal_colours(x.float().cpu())
        panels.append(panel(colours, f"{words}\n{x.shape[0]} channels, {x.shape[1]}x{x.shape[2]}; {share:.0%}"))
    return panels


def answer_panels(m: Material, task: TaskMetrics, output: Tensor) -> tuple[str, list[Image.Image]]:
    """A head's raw output, one row, as masks, as heatmaps of points, or as a table; and what that is."""
    if isinstance(task, ClassMetrics):
        p = m.probabilities(task, task.decode(output).cpu())[0]
        shown = sorted(p.topk(min(MOST_SHOWN, len(p))).indices.tolist())
        cells = [[f"{p[k]:.2f}" for k in shown], [f"{output[0, k]:+.1f}" for k in shown]]
        rest = f"; the {MOST_SHOWN} most probable of {len(p)}" * (len(p) > MOST_SHOWN)
        return f"{task.title.capitalize()} ({task.name}), probability at the chosen temperature{rest}", [heatmap(
            np.stack([p[shown].numpy(), np.full(len(shown), np.nan)]), ["probability", "logit"],
            [str(task.word(k)) for k in shown], cells, (52, 24), 1.0)]
    if isinstance(task, MaskMetrics):
        return (f"Masks ({task.name}): logit of each pixel", [
            panel(shades((x.cpu().numpy() + 8) / 16), f"{name}\n{float(x.min()):.1f} to {float(x.max()):.1f}")
            for name, x in zip(records.KINDS.values(), output[0])])
    if isinstance(task, PointMetrics):
        maps = output[0].flatten(1).softmax(1).view_as(output[0])
        return (f"Points ({task.name}): probability of each position, whose mean is the point", [
            panel(shades((x / x.max()).cpu().numpy()), f"{name}\nat most {float(x.max()):.2g}")
            for name, x in zip(task.classes, maps)])
    return "", []


@torch.inference_mode()
def filters(m: Material) -> Image.Image:
    """One photograph on its way through the network: encoder, experts, decoder, what each head says."""
    net, sample, down, up = m.run.net, m.sample(m.example), [], []
    lesions = next((t for t in m.run.tasks if isinstance(t, MaskMetrics)), None)
    decoders = [*filter(None, [net.decoder, net.heads[lesions.name].decoder if lesions else None])]
    blocks = [block for decoder in decoders for block in decoder.blocks]
    hooks = [net.encoder.register_forward_hook(lambda _, __, maps: down.extend(x[0] for x in maps)),
             *(block.register_forward_hook(lambda _, __, x: up.append(x[0])) for block in blocks)]
    routed, _ = net.routed_maps(sample.image[None].to(m.device))
    outputs = {t: net.heads[t](x) for t, x in routed.items()}
    for hook in hooks:
        hook.remove()

    def named(maps):
        return map_panels({f"stride {m.photographs.size // x.shape[1]}": x for x in maps})

    first = [panel(sample.image.permute(1, 2, 0).numpy(), m.example)]
    if sample.masks is not None:
        first.append(panel(np.asarray(drawing.tinted(Image.fromarray(sample.image.permute(1, 2, 0).numpy()),
                                                     masks_of(sample))), "its lesions and disc"))
    parts = [("The photograph", first), ("Encoder: five maps, each half as large as the one before", named(down))]
    if net.experts is not None:
        parts.append(("Behind the experts: the map that each task gets instead of the shared one",
                      map_panels({t: x[net.routed][0] for t, x in routed.items()})))
    if up:
        parts.append(("Decoder: twice as large at each step, joined by the encoder's map of that size", named(up)))
    parts += [answer_panels(m, task, outputs[task.name].float()) for task in m.run.tasks]
    keys = row([scale("0", "1", "probabilities of classes"), scale("-8", "8", "logits of masks"),
                scale("0", "most", "positions")], 28)
    return titled("One photograph on its way through the network", column(
        [keys, *(column([text(words), row(pictures)], 6) for words, pictures in parts if pictures)], 16),
        f"{of_run(m)}. Maps of many channels are shown by their first three principal components, as red, green and "
        "blue; below each, the share of the variance that these have.")
