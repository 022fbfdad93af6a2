"""Figures about how a run comes to its answers: FigureContext -> picture.

    tsne_map        t-SNE of the encoder's features
    gradcam         Grad-CAM of a grade
    feature_maps    feature maps of one photograph

Grad-CAM: Selvaraju et al. 2017, arXiv 1610.02391
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from retina.datasets import records
from retina.datasets.preprocess import Sample
from retina.datasets.synthetic import LESIONS
from retina.drawing import COLOURS, OTHERS, PALE, captioned, coloured, column, grid, label_legend, masks_of, \
    photograph, row, scale, shades, text, tinted, titled
from retina.evaluation import routing
from retina.evaluation.task_metrics import ClassMetrics, LandmarkMetrics, MaskMetrics, SignMetrics, TaskMetrics
from retina.evaluation.text_metrics import TextMetrics
from retina.figures import context, tsne
from retina.figures.charts import Axis, Chart, heatmap
from retina.figures.context import MOST_SHOWN, SMALLER, FigureContext, FigureUnavailable, best_median_worst, of_run
from retina.inference import full_size


if TYPE_CHECKING:
    from model import Net


# ---- t-SNE ----

def neighbours_kept(x: Tensor, y: Tensor, most: int = 10) -> float:
    """Of the nearest neighbours of each point (n, C), the share that are among its nearest in the map (n, 2)."""
    most = min(most, len(x) - 1)
    nearest = [tsne.squared_distances(z.double()).fill_diagonal_(math.inf).topk(most, largest=False).indices
               for z in (x, y)]
    return float((nearest[0][:, :, None] == nearest[1][:, None]).any(2).double().mean())


def map_of(title: str, y: Tensor, groups: Iterable[tuple[str, Sequence[int], str, Sequence[int]]]) -> Image.Image:
    """Points (n, 2), both axes in one unit; groups: what some have in common, colour, "dot" or "ring", which they are.

    What has no colour of its own is drawn first, then large groups, so that rare ones lie on top.
    """
    low, high = y.amin(0), y.amax(0)
    at = (2 * y - low - high) / (high - low).max().clamp(min=1e-12)  # -1 to 1
    groups, edges = [g for g in groups if g[-1]], ((-1.0, ""), (1.0, ""))
    chart = Chart(title, Axis("", -1.03, 1.03, edges), Axis("", -1.03, 1.03, edges), 440, 440)
    for _, colour, how, which in sorted(groups, key=lambda group: (group[1] != OTHERS, -len(group[-1]))):
        chart.dots(*at[which].T.tolist(), colour, 4.5 if how == "ring" else 4.0, how == "ring")
    return chart.picture([(f"{words} ({len(which)})", colour, how) for words, colour, how, which in groups])


def groups_by_label(task: ClassMetrics, labels: Sequence[int | None]) -> list[tuple]:
    """For `map_of`: grades in shades of one scale, as amounts; classes in colours of their own, while there are any."""
    common = sorted({v for v in labels if v is not None}, key=lambda v: -labels.count(v))
    own = coloured(common)
    if task.ordered:
        own = {v: shades(np.array(0.97 * v / (task.classes - 1))).tolist() for v in own}
    groups = [("no label", OTHERS, [None]), ("other classes", PALE, set(common) - set(own)),
              *((f"{task.title} {v}", colour, [v]) for v, colour in own.items())]
    return [(words, colour, "dot", [i for i, label in enumerate(labels) if label in wanted])
            for words, colour, wanted in groups]


def tsne_map(ctx: FigureContext) -> Image.Image:
    """t-SNE of the encoder's features: which photographs look alike to the network, training and split in one map."""
    x = torch.cat([ctx.learned[1], ctx.here[1][:context.MOST]])
    border, n = len(ctx.training), len(x)
    if n < 5:
        raise FigureUnavailable(f"{n} photographs are too few for a map; at least 5")
    perplexity = min(30.0, (n - 1) / 3) if ctx.perplexity is None else ctx.perplexity
    y = tsne.tsne(x, perplexity, ctx.seed)
    maps = []
    if task := ctx.first(ClassMetrics):
        labels = [r.labels.get(task.label) for r in ctx.training.records + ctx.photographs.records[:context.MOST]]
        maps.append(map_of(f"by {task.title}", y, groups_by_label(task, labels)))
    maps.append(map_of("by split", y, [("training", COLOURS[4], "dot", range(border)),
                                       (ctx.words, COLOURS[5], "ring", range(border, n))]))
    return titled("t-SNE of the encoder's features", row(maps, 24),
                  f"{ctx.name}, epoch {ctx.run.epoch}; perplexity {perplexity:.3g}, seed {ctx.seed}. Features: the "
                  f"bottleneck averaged over positions, {x.shape[1]} numbers for each of {n} photographs. Of its 10 "
                  f"nearest neighbours there, a photograph keeps {neighbours_kept(x, y):.0%} in the map. Sizes of "
                  "clusters and distances between them mean nothing. Rare groups are drawn on top.")


# ---- Grad-CAM ----

def grad_cam(net: Net, task: TaskMetrics, image: Tensor, classes: Sequence[int]) -> list[list[Tensor]]:
    """One sample (3, S, S) uint8 -> for each class a map (h_i, w_i) of each resolution that the head averages.

    The network is in evaluation mode. alpha_k = mean over positions of d logit / d A_k, map = sum_k alpha_k A_k (eqs. 1
    and 2, before the ReLU). Since the head is linear behind the averages, the sums of a class's maps and its bias are
    its logit: the maps tell what each position adds to it.
    """
    head, device = net.heads[task.name], next(net.parameters()).device
    with torch.no_grad():
        maps, _ = net.routed_maps(image[None].to(device), full_size.all_indices(net, [task], 1, device))
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


def lesions_of(sample: Sample) -> Tensor | None:
    """Where any lesion lies, (S, S) bool; None: not all classes are known."""
    return (sample.masks[:-1] == 1).any(0) if set(LESIONS[:-1]) <= masks_of(sample).keys() else None


def on_lesions(sample: Sample, heat_: Tensor) -> float | None:
    """Of what a map (S, S) has on the retina, the share on lesions; None: these are not all known, or none there."""
    lesions = lesions_of(sample)
    if lesions is None or not lesions.any():
        return None
    return share_on(heat_, lesions, sample.image.amax(0) > routing.DARK)


def warm(image: Tensor, heat_: Tensor, side: int) -> Image.Image:
    """A photograph in grey under its heat."""
    grey = photograph(image, side).convert("L").convert("RGB")
    amount = F.interpolate(heat_[None, None] / heat_.max().clamp(min=1e-12), (side, side), mode="bilinear")[0, 0]
    mask = Image.fromarray((60 + 130 * amount).to(torch.uint8).numpy())
    return Image.composite(Image.fromarray(shades(amount.numpy())), grey, mask)


def heats(ctx: FigureContext, task: ClassMetrics, image: Tensor, classes: Sequence[int]) -> list[Tensor]:
    """Of a photograph (3, S, S), where the answer for each of these classes comes from: (S, S) each."""
    return [heat(maps, ctx.photographs.size) for maps in grad_cam(ctx.run.net, task, image, classes)]


def heat_panels(ctx: FigureContext, task: ClassMetrics, name: str, which: str, p: Tensor, true: int,
                side: int = 280) -> Image.Image:
    """A photograph with its lesions; under the heat of the predicted class; under that of the true one, if another."""
    sample, large, predicted = ctx.sample(name), ctx.sample(name, side), int(p.argmax())
    cover, known = on_lesions(sample, torch.ones(())), lesions_of(sample) is not None
    words = f"lesions cover {cover:.1%} of the retina" if cover is not None else \
        "no lesions" if known else "lesions not all known"
    panels = [captioned(tinted(photograph(large.image, side), masks_of(large)), f"{which}: {name}\n{words}")]
    roles = {predicted: "predicted and true"} if predicted == true else {predicted: "predicted", true: "true"}
    for (c, role), heat_ in zip(roles.items(), heats(ctx, task, sample.image, list(roles))):
        on = "" if cover is None else f"\n{on_lesions(sample, heat_):.1%} of it on lesions"
        panels.append(captioned(warm(large.image, heat_, side),
                                f"{role}: {task.title} {task.word(c)}, p {p[c]:.2f}{on}"))
    return row(panels)


def gradcam(ctx: FigureContext) -> Image.Image:
    """Grad-CAM: which pixels speak for the predicted and for the true class, beside the lesions."""
    task, *_ = ctx.having(ClassMetrics, "tells no classes apart")
    stats = ctx.stats(task)
    p = dict(zip(stats, ctx.probabilities(task, torch.stack(list(stats.values()))[:, :-1])))
    true = {name: int(of[-1]) for name, of in stats.items()}
    shares = {}  # of each photograph with lesions: of its heat, and of its retina, what lies on them
    for name in (name for name in ctx.masked if name in stats):
        sample = ctx.sample(name)
        if (cover := on_lesions(sample, torch.ones(()))) is not None:
            heat_, = heats(ctx, task, sample.image, [int(p[name].argmax())])
            shares[name] = on_lesions(sample, heat_), cover
    ranked = best_median_worst({name: float(p[name][true[name]]) for name in shares or stats})
    panels = [heat_panels(ctx, task, name, which, p[name], true[name]) for name, which in ranked.items()]
    on, cover = np.mean([*shares.values()] or [(0, 0)], 0)
    mean = (f" Mean over these: {on:.1%} of what the map of the predicted class has on the retina lies on lesions, "
            f"which cover {cover:.1%} of it.") * bool(shares)
    keys = [scale("nothing", "most", "added to the logit"), *([label_legend(points=False)] * bool(ctx.masked))]
    return titled(f"Grad-CAM of the {task.title}", column([*keys, *panels], 12),
                  f"{ctx.name}, epoch {ctx.run.epoch}. Best, median and worst of {len(shares or stats)} {ctx.words} "
                  f"photographs{' with lesions' * bool(shares)}, by the temperature-scaled probability p of the true "
                  "class. Grad-CAM of the maps that the head averages, at strides 4 to 32, added up, below zero cut "
                  f"off.{mean}")


# ---- feature maps ----

def principal_colours(x: Tensor) -> tuple[np.ndarray, float]:
    """A map (C, h, w) -> its first three principal components as red, green, blue (h, w, 3) uint8, and their share

    of the variance (Pearson 1901; Hotelling 1933). Components run from their 1st to their 99th percentile.
    """
    _, h, w = x.shape
    flat = x.double().flatten(1).T  # (h * w, C)
    flat = flat - flat.mean(0)
    _, values, vectors = torch.linalg.svd(flat, full_matrices=False)  # descending
    vectors = vectors[:3].T
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # or signs are a toss
    components = flat @ vectors  # (h * w, at most 3)
    low, high = components.quantile(0.01, 0), components.quantile(0.99, 0)
    colours = F.pad(((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1), (0, 3 - vectors.shape[1]))
    share = float(values[:3].square().sum() / values.square().sum())
    return (255 * colours).round().to(torch.uint8).view(h, w, 3).numpy(), share


def panel(colours: np.ndarray, words: str) -> Image.Image:
    """Colours (h, w, 3) as a square, each of them a square itself, with words below."""
    picture = Image.fromarray(colours).resize((SMALLER, SMALLER), Image.NEAREST)
    return captioned(picture, words, PALE)


def map_panels(maps: Mapping[str, Tensor]) -> list[Image.Image]:
    """Maps (1, C, h, w) as colours, with name, size and the share of the variance that is shown."""
    panels = []
    for words, x in maps.items():
        colours, share = principal_colours(x[0].float().cpu())
        panels.append(panel(colours, f"{words}\n{x.shape[1]} channels, {x.shape[2]}x{x.shape[3]}; {share:.0%}"))
    return panels


def answer_panels(ctx: FigureContext, task: TaskMetrics, output: Tensor) -> tuple[str, list[Image.Image]]:
    """A head's raw output, one row, as masks, heatmaps of points, a table, or a sentence; and what that is."""
    if isinstance(task, ClassMetrics):
        p = ctx.probabilities(task, task.answer(output).cpu())[0]
        top = sorted(p.topk(min(MOST_SHOWN, len(p))).indices.tolist())
        cells = [[f"{p[k]:.2f}" for k in top], [f"{output[0, k]:+.1f}" for k in top]]
        rest = f"; the {MOST_SHOWN} most probable of {len(p)}" * (len(p) > MOST_SHOWN)
        return f"{task.title.capitalize()} ({task.name}), probability, temperature-scaled{rest}", [heatmap(
            np.stack([p[top].numpy(), np.full(len(top), np.nan)]), ["probability", "logit"],
            [str(task.word(k)) for k in top], cells, (52, 24))]
    if isinstance(task, SignMetrics):
        p = task.answer(output).cpu()[0, :MOST_SHOWN]
        rest = f"; {MOST_SHOWN} of {output.shape[1]}" * (output.shape[1] > MOST_SHOWN)
        return f"Signs ({task.name}), probability of each{rest}", [heatmap(
            p[None].numpy(), ["probability"], task.classes[:MOST_SHOWN], [[f"{x:.2f}" for x in p]], (100, 24))]
    if isinstance(task, TextMetrics):
        said = task.text(task.answer(output)[0].cpu())
        return f"Sentence ({task.name}), the best word after those before it", [text(said, width=4 * SMALLER)]
    if isinstance(task, MaskMetrics):
        return (f"Masks ({task.name}): logit of each pixel", [
            panel(shades((x.cpu().numpy() + 8) / 16), f"{name}\n{float(x.min()):.1f} to {float(x.max()):.1f}")
            for name, x in zip(records.LESION_NAMES.values(), output[0])])
    if isinstance(task, LandmarkMetrics):
        maps = output[0].flatten(1).softmax(1).view_as(output[0])
        return (f"Landmarks ({task.name}): probability of each position, whose mean is the landmark", [
            panel(shades((x / x.max()).cpu().numpy()), f"{name}\nat most {float(x.max()):.2g}")
            for name, x in zip(task.classes, maps)])
    return "", []


@torch.inference_mode()
def feature_maps(ctx: FigureContext) -> Image.Image:
    """Feature maps: one photograph on its way through encoder, experts, decoder and heads."""
    net, sample, maps = ctx.run.net, ctx.sample(ctx.example), []
    lesions = next((t for t in ctx.run.tasks if isinstance(t, MaskMetrics)), None)
    decoders = [*filter(None, [net.decoder, net.heads[lesions.name].decoder if lesions else None])]
    blocks = [block for decoder in decoders for block in decoder.blocks]
    hooks = [part.register_forward_hook(lambda _, __, output: maps.append(output)) for part in (net.encoder, *blocks)]
    routed, _ = net.routed_maps(sample.image[None].to(ctx.device))
    outputs = {t: net.heads[t](x) for t, x in routed.items()}
    for hook in hooks:
        hook.remove()
    down, *up = maps

    def named(maps):
        return map_panels({f"stride {ctx.photographs.size // x.shape[2]}": x for x in maps})

    image = photograph(sample.image, ctx.photographs.size)
    first = [panel(np.asarray(image), ctx.example)]
    if sample.masks is not None:
        first.append(panel(np.asarray(tinted(image, masks_of(sample))), "its lesions and disc"))
    parts = [("The photograph", first), ("Encoder: five maps, each half as large as the one before", named(down))]
    if net.experts is not None:
        parts.append(("Behind the experts: the map that each task gets instead of the shared one",
                      map_panels({t: x[net.routed] for t, x in routed.items()})))
    if up:
        parts.append(("Decoder: twice as large at each step, joined by the encoder's map of that size", named(up)))
    parts += [answer_panels(ctx, task, outputs[task.name].float()) for task in ctx.run.tasks]
    keys = row([scale("0", "1", "probabilities of classes"), scale("-8", "8", "logits of masks"),
                scale("0", "most", "positions of landmarks")], 28)
    return titled("Feature maps of one photograph", column(
        [keys, *(column([text(words), grid(pictures, 5)], 6) for words, pictures in parts if pictures)], 16),
        f"{of_run(ctx)}. Maps of many channels are shown by their first three principal components, as red, green and "
        "blue; below each, the share of the variance that these have.")
