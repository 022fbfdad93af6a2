"""Figures about what a run answers: Material -> picture.

    overlays        photographs, truth, prediction
    curves          losses and metrics over epochs
    confusion       which classes are taken for which
    reliability     what probabilities are worth
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from retina import drawing
from retina.datasets import records
from retina.drawing import COLOURS, INK, PALE, SMALL, column, legend, padded, row, scale, text, titled
from retina.datasets.synthetic import LESIONS
from retina.evaluation import metrics
from retina.evaluation.task_metrics import ClassMetrics, MaskMetrics, PointMetrics, TaskMetrics
from retina.figures.charts import Axis, Chart, heatmap
from retina.figures.material import PANEL, SMALLER, Line, Material, Missing, best_median_worst, chosen_of, \
    epochs_chart, lesion_legend, masks_of, of_run, of_runs, picture_of
from retina.inference import predictor


# ---- photographs, truth, prediction ----

def judged(m: Material) -> tuple[dict[str, float], str, str]:
    """{photograph: score, higher is better}, how one score is written, and by what they are ranked."""
    if task := m.first(MaskMetrics):
        found, thresholds = m.tallies(task), [m.run.chosen[task.name][kind] for kind in task.classes]
        counts = task.at(torch.stack(list(found.values())), thresholds)  # (n, L, 3)
        disc = bool(counts[:, :-1].isnan().all())  # where nothing but the disc is known, the disc counts
        counts = counts[:, -1:].nansum(1) if disc else counts[:, :-1].nansum(1)  # (n, 3)
        values = {name: value for name, value, pixels in zip(found, metrics.dice(counts).tolist(), counts)
                  if pixels.sum() > 0}
        if disc:
            return values, "disc Dice {:.2f}", "Dice of the optic disc at the chosen threshold"
        return values, "lesion Dice {:.2f}", ("Dice of all lesion pixels at the chosen thresholds, the four kinds "
                                              "together, without the disc; photographs with neither a true nor a found "
                                              "one are left out")
    if task := m.first(PointMetrics):
        gaps = {name: tally[:, 0] for name, tally in m.tallies(task).items()}
        values = {name: -float(gap.nan_to_num(0.0).max()) for name, gap in gaps.items() if not gap.isnan().all()}
        return values, "{:.0f} px", "distance of the worse of the two points, where one is known"
    raise m.missing((MaskMetrics, PointMetrics), "answers neither with lesions (seg) nor with points (loc) that could "
                                                 "be laid over a photograph")


def in_words(m: Material, name: str) -> str:
    """What the network says of a photograph, beside what is known of it."""
    parts, answers = [], m.answers(name)
    for task in m.run.tasks:
        tally = m.tallies(task).get(name) if task.name in m.here[0].tallies else None
        if isinstance(task, ClassMetrics):
            p = m.probabilities(task, answers[task.name][None])[0]
            said, true = int(p.argmax()), None if tally is None else int(tally[-1])
            parts.append(f"{task.title} {task.word(said)} (p {p[said]:.2f}), " + (
                "true one not known" if true is None else
                "right" if said == true else f"true {task.word(true)} (p {p[true]:.2f})"))
        elif isinstance(task, PointMetrics) and tally is not None and not tally[:, 0].isnan().all():
            gaps = [f"{point} {gap:.0f}" for point, gap in zip(task.classes, tally[:, 0].tolist()) if gap == gap]
            parts.append(f"{', '.join(gaps)} px off")
    known = masks_of(m.sample(name))
    if m.first(MaskMetrics) and (unknown := [kind for kind in LESIONS if kind not in known]):
        parts.append(f"masks of {', '.join(unknown)} not known, and not shown")
    return "; ".join(parts)


def shown(m: Material, name: str) -> list[Image.Image]:
    """The photograph, with its truth, with the prediction."""
    sample, answers = m.sample(name, PANEL), m.answers(name)
    plain, truth, prediction = picture_of(sample.image, PANEL), masks_of(sample), {}
    if task := m.first(MaskMetrics):
        maps = F.interpolate(answers[task.name][None], (PANEL, PANEL), mode="bilinear")[0]
        prediction = {kind: (x >= m.run.chosen[task.name][kind]).numpy() for kind, x in zip(task.classes, maps)
                      if kind in truth}
    pictures = [plain, drawing.tinted(plain, truth), drawing.tinted(plain, prediction)]
    if task := m.first(PointMetrics):
        marked = [sample.points, answers[task.name] * PANEL]
        for picture, points in zip(pictures[1:], marked):
            if points is not None:
                drawing.mark(ImageDraw.Draw(picture), points.nan_to_num(-99).tolist(), PANEL / 50)
    return pictures


def overlays(m: Material) -> Image.Image:
    """Best, median and worst photograph: itself, its truth, what is predicted."""
    values, written, rule = judged(m)
    if not values:
        raise Missing(f"none of the {len(m.photographs)} {m.words} photographs has lesions or points, true or found")
    heads = row([padded(text(words, colour=PALE), 0, 0, PANEL - text(words).width, 0)
                 for words in ("photograph", "truth", "prediction")])
    parts = [heads]
    for name, which in best_median_worst(values).items():
        said = "; ".join(filter(None, (f"{which}: {name}", written.format(abs(values[name])), in_words(m, name))))
        parts += [row(shown(m, name)), padded(text(said, width=heads.width), 0, 0, 0, 8)]
    keys = [lesion_legend()] * (m.first(MaskMetrics) is not None) + \
        [text("+ optic disc, x fovea", SMALL)] * (m.first(PointMetrics) is not None)
    return titled(f"Best, median and worst of {len(values)} {m.words} photographs",
                  column([row(keys, 18, 0.5), *parts], 6),
                  f"{of_run(m)}. Ranked by: {rule}. Probabilities p at the chosen temperature; distances in pixels of "
                  f"a photograph 4288 pixels wide.{m.caution} {predictor.NOTE.capitalize()}.")


# ---- losses and metrics over epochs ----

def loss_chart(m: Material, task: str) -> Image.Image:
    """A task's loss, training dashed, validation solid; a line for each run."""
    training = of_runs(m, lambda line: line["train"].get(task), dashed=True)
    validation = of_runs(m, lambda line: line["val"].get(task, {}).get("loss"))
    most, limit = (max(v for line in lines for v in line.values if v is not None) for lines in (validation, training))
    limit = max([2 * limit, *(line.values[line.chosen] or 0.0 for line in validation)])  # of what is shown
    words, high = "training with augmentation and dropout", None
    if most > limit:  # as in the first epochs, before batch norm knows its statistics
        words, high = f"{words}; validation to {most:.3g}", limit
    chart = epochs_chart(m, f"{task}: loss", words, training + validation, 0.0, high)
    return column([chart.picture(), legend([("validation", INK, "line"), ("training", INK, "dashed")])], 2)


def metric_lines(m: Material, task: TaskMetrics) -> list[Line]:
    """Of several runs the metric that counts; of one run also accuracy, or that metric of each kind or point."""
    lines = of_runs(m, lambda line: line["val"].get(task.name, {}).get(task.primary))
    if len(m.logs) > 1:
        return lines
    lines[0].words = task.primary
    kinds = task.classes if isinstance(getattr(task, "classes", None), tuple) else ()
    more = {f"{task.primary}_{kind}": records.COLOURS.get(kind, COLOURS[k + 1]) for k, kind in enumerate(kinds)}
    if kinds == tuple(records.COLOURS):
        lines[0].colour = INK
    if not kinds and task.primary != "accuracy":
        more["accuracy"] = COLOURS[1]
    for metric, colour in more.items():
        found = of_runs(m, lambda line, metric=metric: line["val"].get(task.name, {}).get(metric))
        lines += [replace(line, words=metric, colour=colour) for line in found]
    return lines


def metric_chart(m: Material, task: TaskMetrics) -> Image.Image:
    """A task's metrics on validation, and the one that counts on training photographs."""
    lines, learned = metric_lines(m, task), m.learned[0]
    value = learned.metrics()[task.name][task.primary] if task.name in learned.tallies else None
    shown_ = [v for v in (task.worst, task.best, value, *(v for line in lines for v in line.values)) if v is not None]
    chart = epochs_chart(m, f"{task.name}: {task.primary}".replace("_", " "), "validation photographs" +
                         ", lower is better" * (task.best < task.worst), lines, min(shown_), max(shown_))
    entries = [(line.words.replace("_", " "), line.colour, "line") for line in lines]
    if value is not None:
        chart.dots([m.run.epoch], [value], lines[0].colour, 5, ring=True)
        entries.append((f"of {len(learned.names[task.name])} training photographs, not augmented: {value:.3f}",
                        lines[0].colour, "ring"))
    return column([chart.picture(), legend(entries, 400)], 2)


def curves(m: Material) -> Image.Image:
    """Losses and metrics of every task over epochs, the score by which the checkpoint was chosen, expert balance."""
    names = {t for log in m.logs.values() for line in log for t in line["val"]}
    tasks = [*m.run.tasks, *(t for name, t in m.tasks.items() if name in names - {t.name for t in m.run.tasks})]
    parts = [row([loss_chart(m, task.name), metric_chart(m, task)], 28) for task in tasks]
    last = [epochs_chart(m, "score", "mean over tasks of the metric that counts",
                         of_runs(m, lambda line: line["score"])).picture()]
    if balance := of_runs(m, lambda line: line["train"].get("balance")):
        last.append(epochs_chart(m, "balance loss", "0: all experts are used alike", balance, 0.0).picture())
    runs = [legend([(name, colour, "line") for name, colour in zip(m.logs, COLOURS)], 800)] if len(m.logs) > 1 else []
    chosen = ", ".join(f"{name} epoch {log[chosen_of(log)]['epoch']}" for name, log in m.logs.items())
    return titled("Losses and metrics over epochs", column([*runs, *parts, row(last, 28)], 18),
                  f"Dots: the chosen checkpoint ({chosen}), of the epoch with the best score on validation. Ring: the "
                  "same checkpoint on photographs that it learned from.")


# ---- which classes are taken for which ----

def confused(m: Material, task: ClassMetrics, most: int = 12) -> Image.Image:
    """One task's confusion matrix, and an example of each of its most frequent confusions."""
    found = m.tallies(task)
    tally = torch.stack(list(found.values()))
    truth, predicted = tally[:, -1].long(), tally[:, :-1].argmax(1)
    surest = dict(zip(found, m.probabilities(task, tally[:, :-1])))
    counts = metrics.confusion_matrix(truth, predicted, task.classes)
    wrong = counts - counts.diag().diag()
    kept = (wrong.sum(0) + wrong.sum(1)).topk(min(most, task.classes)).indices.sort().values
    part = counts[kept][:, kept]
    shares = part / counts[kept].sum(1, keepdim=True)  # nan where a class does not occur
    cells = [[f"{int(n)}\n{s:.0%}" if s == s else "0" for n, s in zip(*both)] for both in zip(part, shares)]
    names = [str(task.word(int(k))) for k in kept]
    values = m.here[0].metrics()[task.name]
    said = "   ".join(f"{k} {values[k]:.3f}".replace("_", " ")
                      for k in dict.fromkeys((task.primary, "accuracy", "balanced_accuracy")))
    left_out = f"; the {most} classes with most confusions of {task.classes}" * (task.classes > most)
    matrix = heatmap(shares.numpy(), names, names, cells, (58, 42), 1.0, f"{task.title} ({task.name})",
                     f"rows: truth, columns: prediction; number and share of the row{left_out}")
    examples = []
    for k in wrong.flatten().argsort(descending=True, stable=True)[:4].tolist():
        true, said_ = divmod(k, task.classes)
        if number := int(wrong[true, said_]):
            p = {name: float(surest[name][said_]) for name, t in found.items()
                 if t[-1] == true and t[:-1].argmax() == said_}
            name = max(p, key=p.get)
            words = (f"true {task.word(true)}, taken for {task.word(said_)}: {number} of {int(counts[true].sum())}\n"
                     f"{name}, p {p[name]:.2f}")
            examples.append(column([picture_of(m.sample(name).image, SMALLER), text(words, SMALL, width=SMALLER)], 4))
    below = [text("the most frequent confusions, each by the photograph of which the network is surest"),
             row(examples)] if examples else [text("no photograph is taken for another class")]
    return column([matrix, text(said, SMALL), *below], 10)


def confusion(m: Material) -> Image.Image:
    """Confusion matrices with counts and row shares; below each the most frequent confusions."""
    key = scale("0 %", "100 %", "of the photographs of a true class")
    parts = [key, *(confused(m, t) for t in m.classifications())]
    return titled("Which classes are taken for which", column(parts, 22),
                  f"{of_run(m)}, those with a label. Probabilities p at the chosen temperature.{m.caution}")


# ---- what probabilities are worth ----

def calibration_chart(m: Material, task: ClassMetrics) -> Image.Image:
    """Confidence against accuracy, before and after the temperature."""
    tally = torch.stack(list(m.tallies(task).values()))
    truth, temperature = tally[:, -1].long(), m.run.chosen[task.name]["temperature"]
    values, unit = m.here[0].metrics(m.run.chosen)[task.name], (0.0, 1.0)
    chart = Chart(f"{task.title} ({task.name}): calibration",
                  Axis("confidence: probability of the predicted class", *unit),
                  Axis("share that is right; the larger a dot, the more photographs", *unit), 340, 300)
    chart.line(unit, unit, PALE, 1, dashed=True)
    entries = []
    for words, t, error, colour in (("before", 1.0, "calibration_error", COLOURS[0]),
                                    (f"at temperature {temperature:.2f}", temperature,
                                     "calibration_error_at_temperature", COLOURS[5])):
        bins = metrics.calibration_bins(metrics.at_temperature(tally[:, :-1], t), truth).tolist()
        chart.line([x for x, *_ in bins], [y for _, y, _ in bins], colour)
        for x, y, n in bins:
            chart.dots([x], [y], colour, 3 + 7 * math.sqrt(n / len(tally)))
        entries.append((f"{words}: expected calibration error {values[error]:.3f}", colour, "dot"))
    return column([chart.picture(), legend(entries, 360)], 4)


def precision_recall_chart(m: Material, task: MaskMetrics) -> Image.Image:
    """Precision against recall over all pixels of each kind of lesion."""
    tally, values = torch.stack(list(m.tallies(task).values())), m.here[0].metrics()[task.name]
    counts = tally[..., :-1].nansum(0).unflatten(1, (2, metrics.LEVELS))  # (L, 2, K)
    curves_ = zip(*metrics.precision_recall(*counts.unbind(1)))
    chart = Chart(f"lesions and optic disc ({task.name})", Axis("recall", 0, 1),
                  Axis("precision, over all pixels of the split", 0, 1), 340, 300)
    entries = []
    for kind, seen, (precision, recall) in zip(task.classes, counts.sum(1).flip(1).cumsum(1), curves_):
        if recall.isnan().any():
            entries.append((f"{records.KINDS[kind]}: not one true pixel", records.COLOURS[kind], "line"))
            continue
        passes = seen > 0  # where nothing passes there is no precision
        chart.line(recall[passes].tolist(), precision[passes].tolist(), records.COLOURS[kind])
        at = metrics.LEVELS - 1 - metrics.level_of(m.run.chosen[task.name][kind])
        if at >= 0 and passes[at]:
            chart.dots([float(recall[at])], [float(precision[at])], records.COLOURS[kind], 4.5)
        entries.append((f"{records.KINDS[kind]}: area {values[f'aupr_{kind}']:.3f}", records.COLOURS[kind], "line"))
    return column([chart.picture(), legend(entries, 360), text("dots: at the chosen threshold", SMALL, PALE)], 4)


def reliability(m: Material) -> Image.Image:
    """Calibration of each task that tells classes apart; precision against recall of each lesion."""
    charts = [calibration_chart(m, t) for t in m.run.tasks if isinstance(t, ClassMetrics) and
              t.name in m.here[0].tallies]
    if task := m.first(MaskMetrics):
        charts.append(precision_recall_chart(m, task))
    if not charts:
        raise m.missing((ClassMetrics, MaskMetrics), "gives no probabilities")
    rows = [row(charts[i:i + 2], 28) for i in range(0, len(charts), 2)]
    return titled("What probabilities are worth", column(rows, 20), f"{of_run(m)}.{m.caution}")
