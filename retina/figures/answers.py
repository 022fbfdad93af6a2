"""Figures about what a run answers: FigureContext -> picture.

    overlays        photographs, ground truth, prediction
    curves          training curves
    confusion       confusion matrices
    reliability     reliability diagrams and precision-recall curves
"""

import math
from dataclasses import replace

import torch.nn.functional as F
from PIL import Image

from retina.datasets import records
from retina.datasets.synthetic import LESIONS
from retina.drawing import COLOURS, INK, LANDMARKS, PALE, SMALL, captioned, column, found_legend, grid, legend, \
    masks_of, photograph, row, scale, text, tinted, titled
from retina.evaluation import metrics, routing
from retina.evaluation.tables import spelled_out
from retina.evaluation.task_metrics import ClassMetrics, LandmarkMetrics, MaskMetrics, SignMetrics, TaskMetrics
from retina.evaluation.text_metrics import TextMetrics
from retina.figures.charts import Axis, Chart, heatmap
from retina.figures.context import PANEL, SMALLER, FigureContext, FigureUnavailable, Line, best_epoch_of, \
    best_median_worst, epochs_chart, of_run, of_runs
from retina.files import jsonable
from retina.inference import predictor


# ---- photographs, ground truth, prediction ----

def judged(ctx: FigureContext) -> tuple[dict[str, float], str, str]:
    """{photograph: score, higher is better}, how one score is written, and by what they are ranked."""
    first, *_ = ctx.having((MaskMetrics, LandmarkMetrics), "answers neither with lesions (seg) nor with landmarks "
                           "(loc) that could be laid over a photograph")
    if task := ctx.first(MaskMetrics):
        names, stats = ctx.masks.names[task.name], ctx.masks.stats[task.name]
        counts = task.at(stats, [ctx.run.calibration[task.name][lesion] for lesion in task.classes])  # (n, L, 3)
        disc = bool(counts[:, :-1].isnan().all())  # where nothing but the disc is known, the disc counts
        counts = counts[:, -1:].nansum(1) if disc else counts[:, :-1].nansum(1)  # (n, 3)
        values = {name: value for name, value, true in zip(names, metrics.dice(counts).tolist(), counts[:, 2])
                  if true > 0}
        if disc:
            return values, "disc Dice {:.2f}", "Dice of the optic disc at the calibrated threshold"
        return values, "lesion Dice {:.2f}", ("Dice of all lesion pixels at the calibrated thresholds, the four "
                                              "classes together, without the disc, among photographs with a lesion")
    gaps = {name: stats[:, 0] for name, stats in ctx.stats(first).items()}
    values = {name: -float(gap.nan_to_num(0.0).max()) for name, gap in gaps.items() if not gap.isnan().all()}
    return values, "{:.0f} px", "distance of the worse of the two landmarks, where one is known"


def in_words(ctx: FigureContext, name: str) -> str:
    """What the network says of a photograph, beside what is known of it."""
    parts, answers = [], ctx.answers(name)
    for task in ctx.run.tasks:
        stats = ctx.stats(task).get(name)
        if isinstance(task, ClassMetrics):
            p = ctx.probabilities(task, answers[task.name][None])[0]
            guess, true = int(p.argmax()), None if stats is None else int(stats[-1])
            parts.append(f"{task.title} {task.word(guess)!r} (p {p[guess]:.2f}), " + (
                "true one not known" if true is None else
                "right" if guess == true else f"true {task.word(true)!r} (p {p[true]:.2f})"))
        elif isinstance(task, SignMetrics):
            said, = task.caption(task.predicted_columns(answers[task.name], None, ctx.run.calibration[task.name]))
            thresholds = ctx.run.calibration[task.name]
            wrong = [] if stats is None else [sign for sign, (p, true) in zip(task.classes, stats.tolist())
                                              if true in (0, 1) and (p >= thresholds[f"sign_{sign}"]) != true]
            parts.append(f"{said}, " + ("true ones not known" if stats is None else
                                        f"wrong about {', '.join(wrong)}" if wrong else "right"))
        elif isinstance(task, TextMetrics):
            said, true = task.text(answers[task.name]), ctx.sample(name).text
            parts.append(f'"{said}", ' + ("true sentence not known" if true is None else
                                          "right" if task.right(stats[None])[0] else f'true "{true}"'))
        elif isinstance(task, LandmarkMetrics) and stats is not None and not stats[:, 0].isnan().all():
            gaps = [f"{point} {gap:.0f}" for point, gap in zip(task.classes, stats[:, 0].tolist()) if gap == gap]
            parts.append(f"{', '.join(gaps)} px off")
    known = masks_of(ctx.sample(name))
    if ctx.first(MaskMetrics) and (unknown := [lesion for lesion in LESIONS if lesion not in known]):
        parts.append(f"masks of {', '.join(unknown)} not known, and not shown")
    return "; ".join(parts)


def panels_of(ctx: FigureContext, name: str) -> list[Image.Image]:
    """The photograph, with its ground truth, with the prediction; below these, what is there."""
    sample, answers = ctx.sample(name, PANEL), ctx.answers(name)
    image, true, predicted, points = photograph(sample.image, PANEL), masks_of(sample), {}, [None, None]
    if task := ctx.first(MaskMetrics):
        maps = F.interpolate(answers[task.name][None], (PANEL, PANEL), mode="bilinear")[0]
        predicted = {lesion: (x >= ctx.run.calibration[task.name][lesion]).numpy()
                     for lesion, x in zip(task.classes, maps) if lesion in true}
    if task := ctx.first(LandmarkMetrics):
        points = [sample.landmarks, answers[task.name] * PANEL]
    retina = int((sample.image.amax(0) > routing.DARK).sum())
    return [image] + [column([tinted(image, masks, p), *[found_legend(masks, retina, PANEL)] * bool(masks)])
                      for masks, p in zip((true, predicted), points)]


def overlays(ctx: FigureContext) -> Image.Image:
    """Predictions and ground truth on the photographs with the best, median and worst score."""
    values, written, rule = judged(ctx)
    if not values:
        raise FigureUnavailable(f"none of the {len(ctx.photographs)} {ctx.words} photographs has lesions or landmarks")
    parts = [text(LANDMARKS, SMALL)] * bool(ctx.having(LandmarkMetrics))
    heads = [text(words, colour=PALE) for words in ("photograph", "ground truth", "prediction")]
    for name, which in best_median_worst(values).items():
        pictures = grid([*heads, *panels_of(ctx, name)], 3, (12, 6))
        words = "; ".join(filter(None, (f"{which}: {name}", written.format(abs(values[name])), in_words(ctx, name))))
        parts.append(column([pictures, text(words, width=pictures.width)], 6))
        heads = []  # they stand above the first photograph alone
    return titled(f"Prediction and ground truth: best, median and worst of {len(values)} {ctx.words} photographs",
                  column(parts, 14), f"{of_run(ctx)}. Areas in percent of the retina. Ranked by: {rule}. "
                  "Probabilities p are temperature-scaled; distances in pixels of a photograph 4288 pixels wide."
                  f"{ctx.caution} {predictor.NOTE.capitalize()}.")


# ---- training curves ----

def loss_chart(ctx: FigureContext, task: str) -> Image.Image:
    """A task's loss, training dashed, validation solid; a line for each run."""
    training = of_runs(ctx, lambda line: line["train"].get(task), dashed=True)
    validation = of_runs(ctx, lambda line: line["val"].get(task, {}).get("loss"))
    most, limit = (max((v for line in lines for v in line.values if v is not None), default=0.0)
                   for lines in (validation, training))
    limit = max([2 * limit, *(line.values[line.best] or 0.0 for line in validation if line.best is not None)])
    words, high = "training with augmentation and dropout", None
    if most > limit:  # as in the first epochs, before batch norm knows its statistics
        words, high = f"{words}; validation up to {most:.3g}, beyond the axis", limit
    chart = epochs_chart(ctx, f"{task}: loss", words, training + validation, 0.0, high)
    return chart.picture([("validation", INK, "line"), ("training", INK, "dashed")])


def metric_lines(ctx: FigureContext, task: TaskMetrics) -> list[Line]:
    """Of several runs the primary metric; of one run also accuracy, or that metric of each class, sign or landmark

    while there are colours.
    """
    def of(metric):
        return of_runs(ctx, lambda line: line["val"].get(task.name, {}).get(metric))

    if len(ctx.logs) > 1:
        return of(task.primary)
    classes = getattr(task, "classes", None)
    classes = classes if isinstance(classes, tuple) and len(classes) < len(COLOURS) else ()
    colours = {task.primary: INK if classes == tuple(records.LESION_COLOURS) else COLOURS[0]}
    colours |= {f"{task.primary}_{c}": records.LESION_COLOURS.get(c, COLOURS[k + 1]) for k, c in enumerate(classes)}
    if not classes:
        colours.setdefault("accuracy", COLOURS[1])
    names = {f"{task.primary}_{c}": records.LESION_NAMES.get(c, c) for c in classes}
    names[task.primary] = "mean" if classes else spelled_out(task.primary)
    return [replace(line, words=names.get(metric, metric), colour=colour) for metric, colour in colours.items()
            for line in of(metric)]


def metric_chart(ctx: FigureContext, task: TaskMetrics) -> Image.Image:
    """A task's metrics on validation, and the primary one on training photographs."""
    lines, learned = metric_lines(ctx, task), ctx.learned[0]
    value = jsonable(learned.metrics()[task.name][task.primary]) if task.name in learned.stats else None
    colour = lines[0].colour if lines else INK
    ends = [v for v in (task.worst, task.best, value, *(v for line in lines for v in line.values)) if v is not None]
    chart = epochs_chart(ctx, f"{task.name}: {spelled_out(task.primary)}", "validation" +
                         ", lower is better" * (task.best < task.worst), lines, min(ends), max(ends))
    entries = [(line.words, line.colour, "line") for line in lines]
    if value is not None:
        chart.dots([ctx.run.epoch], [value], colour, 5, ring=True)
        entries.append((f"{len(learned.names[task.name])} training photographs, not augmented: {value:.3f}", colour,
                        "ring"))
    return chart.picture(entries)


def curves(ctx: FigureContext) -> Image.Image:
    """Training curves: loss and metrics of every task, the score that selects the checkpoint, load balancing."""
    names = {t for log in ctx.logs.values() for line in log for t in line["val"]}
    tasks = [*ctx.run.tasks, *(t for name, t in ctx.tasks.items() if name in names - {t.name for t in ctx.run.tasks})]
    charts = [chart for task in tasks for chart in (loss_chart(ctx, task.name), metric_chart(ctx, task))]
    if score := of_runs(ctx, lambda line: line["score"]):
        charts.append(epochs_chart(ctx, "checkpoint score", "validation: mean over tasks of the primary metric",
                                   score).picture())
    if balance := of_runs(ctx, lambda line: line["train"].get("balance")):
        charts.append(epochs_chart(ctx, "load-balancing loss", "0: all experts are used alike", balance, 0.0).picture())
    runs = [legend([(name, colour, "line") for name, colour in zip(ctx.logs, COLOURS)], 800)] \
        if len(ctx.logs) > 1 else []
    best = ", ".join(f"{name} epoch {log[k]['epoch']}" for name, log in ctx.logs.items()
                     if (k := best_epoch_of(log)) is not None)
    return titled("Training curves", column([*runs, grid(charts, 2, (28, 18))], 18),
                  f"Dots: best.pt ({best}), the epoch chosen on validation. Ring: the same checkpoint on "
                  "photographs that it learned from.")


# ---- confusion matrices ----

def confused(ctx: FigureContext, task: ClassMetrics, most: int = 12) -> Image.Image:
    """One task's confusion matrix, and an example of each of its most frequent confusions."""
    photographs, stats = ctx.here[0].names[task.name], ctx.here[0].stats[task.name]
    truth, predicted, p = stats[:, -1].long(), stats[:, :-1].argmax(1), ctx.probabilities(task, stats[:, :-1])
    counts = metrics.confusion_matrix(truth, predicted, task.classes)
    wrong = counts - counts.diag().diag()
    kept = (wrong.sum(0) + wrong.sum(1)).topk(min(most, task.classes)).indices.sort().values
    part = counts[kept][:, kept]
    shares = part / counts[kept].sum(1, keepdim=True)  # nan where a class does not occur
    cells = [[f"{int(n)}\n{s:.0%}" if s == s else "0" for n, s in zip(*both)] for both in zip(part, shares)]
    names = [str(task.word(int(k))) for k in kept]
    values = ctx.here[0].metrics()[task.name]
    measures = "   ".join(f"{spelled_out(k)} {values[k]:.3f}"
                          for k in dict.fromkeys((task.primary, "accuracy", "balanced_accuracy")))
    left_out = f"; the {most} classes with most confusions of {task.classes}" * (task.classes > most)
    matrix = heatmap(shares.numpy(), names, names, cells, (58, 42), f"{task.title} ({task.name})",
                     f"rows: true class, columns: predicted class; count and percent of the row{left_out}")
    examples = []
    for k in wrong.flatten().argsort(descending=True, stable=True)[:4].tolist():
        true, guess = divmod(k, task.classes)
        if number := int(wrong[true, guess]):
            those = ((truth == true) & (predicted == guess)).nonzero()[:, 0].tolist()
            surest = max(those, key=lambda i: p[i, guess])
            words = (f"true {task.word(true)!r}, predicted {task.word(guess)!r}: {number} of "
                     f"{int(counts[true].sum())}\n{photographs[surest]}, p {p[surest, guess]:.2f}")
            examples.append(captioned(photograph(ctx.sample(photographs[surest]).image, SMALLER), words))
    below = [text("most frequent confusions, each by the photograph with the highest p of the predicted class"),
             row(examples)] if examples else [text("every photograph has its true class predicted")]
    return column([matrix, text(measures, SMALL), *below], 10)


def confusion(ctx: FigureContext) -> Image.Image:
    """Confusion matrices: counts and percent of each row; below each the most frequent confusions."""
    key = scale("0 %", "100 %", "of the photographs of a true class")
    parts = [key, *(confused(ctx, t) for t in ctx.having(ClassMetrics, "tells no classes apart"))]
    return titled("Confusion matrices", column(parts, 22),
                  f"{of_run(ctx)}, those with a label. Probabilities p are temperature-scaled.{ctx.caution}")


# ---- reliability diagrams and precision-recall curves ----

def reliability_diagram(ctx: FigureContext, task: ClassMetrics) -> Image.Image:
    """A reliability diagram: confidence against accuracy, before and after temperature scaling."""
    stats = ctx.here[0].stats[task.name]
    truth, temperature = stats[:, -1].long(), ctx.run.calibration[task.name]["temperature"]
    values, unit = ctx.here[0].metrics(ctx.run.calibration)[task.name], (0.0, 1.0)
    chart = Chart(f"{task.title} ({task.name}): reliability diagram",
                  Axis("confidence: probability of the predicted class", *unit),
                  Axis("accuracy; the larger a dot, the more photographs", *unit), 340, 300)
    chart.line(unit, unit, PALE, 1, dashed=True)
    entries = []
    for words, t, error, colour in (("uncalibrated", 1.0, "calibration_error", COLOURS[0]),
                                    (f"temperature {temperature:.2f}", temperature,
                                     "calibration_error_at_temperature", COLOURS[5])):
        bins = metrics.calibration_bins(metrics.at_temperature(stats[:, :-1], t), truth).tolist()
        chart.line([x for x, *_ in bins], [y for _, y, _ in bins], colour)
        for x, y, n in bins:
            chart.dots([x], [y], colour, 3 + 7 * math.sqrt(n / len(stats)))
        entries.append((f"{words}: {spelled_out('calibration_error')} {values[error]:.3f}", colour, "dot"))
    return chart.picture(entries)


def precision_recall_chart(ctx: FigureContext, task: MaskMetrics) -> Image.Image:
    """Precision-recall curves over all pixels, one for each class of lesion."""
    stats, values = ctx.masks.stats[task.name], ctx.masks.metrics()[task.name]
    counts = stats[..., :-1].nansum(0).unflatten(1, (2, metrics.LEVELS))  # (L, 2, K)
    curves_ = zip(*metrics.precision_recall(*counts.unbind(1)))
    chart = Chart(f"lesions and optic disc ({task.name}): precision-recall curves", Axis("recall", 0, 1),
                  Axis("precision, over all pixels of the split", 0, 1), 340, 300)
    keys = []
    for lesion, seen, (precision, recall) in zip(task.classes, counts.sum(1).flip(1).cumsum(1), curves_):
        known, colour = not recall.isnan().any(), records.LESION_COLOURS[lesion]
        if known:
            passes = seen > 0  # where nothing passes there is no precision
            chart.line(recall[passes].tolist(), precision[passes].tolist(), colour)
            at = metrics.LEVELS - 1 - metrics.level_of(ctx.run.calibration[task.name][lesion])
            if at >= 0 and passes[at]:
                chart.dots([float(recall[at])], [float(precision[at])], colour, 4.5)
        area = f"{spelled_out('aupr')} {values[f'aupr_{lesion}']:.3f}" if known else "not one true pixel"
        keys.append((f"{records.LESION_NAMES[lesion]}: {area}", colour, "line"))
    return chart.picture([*keys, ("at the calibrated threshold", PALE, "dot")])


def reliability(ctx: FigureContext) -> Image.Image:
    """Reliability diagrams of tasks that tell classes apart; precision-recall curves of lesions."""
    charts = [reliability_diagram(ctx, t) if isinstance(t, ClassMetrics) else precision_recall_chart(ctx, t)
              for t in ctx.having((ClassMetrics, MaskMetrics), "gives no probabilities")]
    return titled("Reliability diagrams and precision-recall curves", grid(charts, 2, (28, 20)),
                  f"{of_run(ctx)}.{ctx.caution}")
