"""Numbers and tables as text: scores, differences, changes; rows of cells for the screen, Markdown and CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from retina.evaluation.statistics import FEWEST_SEEDS
from retina.evaluation.task_metrics import Joint, TaskMetrics


# ---- cells ----

def around(limits: Sequence[float] | None, form: str = ".2f") -> str:
    """An interval, to stand behind its number; "" where there is none."""
    return "" if limits is None else f" ({limits[0]:{form}} to {limits[1]:{form}})"


def number_cell(value: float | None, limits: Sequence[float] | None = None) -> str:
    """A number, with its interval where there is one."""
    if value is None or math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 0
    return f"{value:.{digits}f}" + around(limits, ".2f" if digits else ".0f")


# ---- rows of cells, the first of which is the header ----

def aligned(rows: Sequence[Sequence]) -> str:
    """For the screen: the first column to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = ([f"   {first:{widths[0]}}", *(f"{x:>{w}}" for x, w in zip(rest, widths[1:]))] for first, *rest in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """For Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def as_csv(rows: Sequence[Sequence]) -> str:
    """For spreadsheets; None is an empty cell."""
    memory = io.StringIO()
    csv.writer(memory).writerows(rows)
    return memory.getvalue()


# ---- measures in words ----

NAMES = {  # of measures that are not what they are called, "_" read as a space
    "kappa": "quadratic weighted kappa", "macro_f1": "macro F1", "auc": "macro one-vs-rest AUROC",
    "calibration_error": "expected calibration error (ECE)", "referable_auc": "referable: AUROC",
    "referable_sensitivity": "referable: sensitivity", "referable_specificity": "referable: specificity",
    "dice": "Dice", "iou": "IoU", "aupr": "average precision",
    "five_masks_dice": "Dice over all five masks of an image",
    "five_masks_dice_of_true_disc": "the same of the true optic disc alone",
    "within_radius": "detection rate at one disc radius", "px4288": "mean distance at 4288 px",
    "median_px4288": "median distance at 4288 px", "diameters": "mean distance in disc diameters",
    "top5": "top-5 accuracy", "broad_accuracy": "accuracy of the broad class, summed from these",
    "broad_kappa": "quadratic weighted kappa of the same", "slots": "slots of the truth that are right",
    "slots_precision": "slots of the answers that are right", "side": "sides that are right",
    "readable": "answers of the grammar", "exact": "exact sentences", "length_ratio": "words by words of the truth",
    "different": "different answers", "stutters": "answers with words twice in a row",
    **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)}}
ENDINGS = {"_per_image": ", mean over images", "_calibrated": ", calibrated thresholds",
           "_at_temperature": ", temperature-scaled"}


def spelled_out(measure: str) -> str:
    """The name of a measure in the field's words."""
    for ending, words in ENDINGS.items():
        if measure.endswith(ending):
            return spelled_out(measure.removesuffix(ending)) + words
    stem = max((name for name in NAMES if measure.startswith(f"{name}_")), key=len, default=None)
    if measure not in NAMES and stem:  # of a class
        return f"{NAMES[stem]}, {measure.removeprefix(f'{stem}_')}"
    return NAMES.get(measure, measure.replace("_", " "))


MOST_ACROSS = 6  # classes; more of them are rows, and measures columns


def measure_rows(task: TaskMetrics, values: Mapping[str, float], limits: Mapping[str, Sequence[float]]) -> list[list]:
    """Rows of cells, primary metric first: a measure in words, its value (of the mean, or of all), those of classes."""
    classes = task.classes if isinstance(getattr(task, "classes", None), tuple) else ()
    rows: dict[str, dict[str, str]] = {task.primary: {}}
    for name, value in values.items():
        if isinstance(value, float):  # dice_MA_per_image stands in the row dice_per_image, in the column MA
            class_name = max((c for c in classes if f"_{c}_" in f"{name}_"), key=len, default="")
            measure = name.replace(f"_{class_name}", "", 1) if class_name else name
            rows.setdefault(measure, {})[class_name] = number_cell(value, limits.get(name))
    head = [["", "mean" if classes else "", *classes]] * bool(classes)
    rows = head + [[spelled_out(name), *(cells.get(class_name, "-") for class_name in ("", *classes))]
                   for name, cells in rows.items()]
    return list(map(list, zip(*rows))) if len(classes) > MOST_ACROSS else rows


# ---- what may be claimed ----

def difference_cell(d: Mapping) -> str:
    """A difference with its corrected interval; "-": not defined."""
    return "-" if d["difference"] is None or math.isnan(d["difference"]) else \
        f"{d['difference']:+.3f}{around(d['corrected_interval'], '+.3f')}"


def verdict(d: Mapping) -> str:
    """What is claimed of a difference."""
    return "none" if not d["claimed"] else "higher" if d["difference"] > 0 else "lower"


def needs(d: Mapping) -> str:
    """What it would take to claim a difference as large as the one seen, or ""."""
    return {"seeds": f"{FEWEST_SEEDS} seeds a side", "eyes": f"more eyes than {d['eyes']}",
            "more seeds": "more seeds"}.get(d["wants"]) or \
        f"{d['needed']} photographs (here {d['photographs']})" * bool(d["needed"])


def few_seeds(seeds: int) -> str:
    """Why nothing is claimed from fewer than FEWEST_SEEDS seeds a side."""
    return f"no claim about ways of training: {seeds} seed{'s' * (seeds > 1)} a side, {FEWEST_SEEDS} are needed"


def claim(d: Mapping, first: str, second: str) -> str:
    """What may be said of a difference, as statistics.adjust leaves it, between two arms of these names."""
    said = f"{d['task']} {spelled_out(d['metric'])}, {second} minus {first}: "
    if difference_cell(d) == "-":
        return said + "not defined on these photographs"
    few, interval = d["seeds"] < FEWEST_SEEDS, d["corrected_interval"]
    said += f"{d['difference']:+.3f} (" + (
        "no interval within the range of the measure" if interval is None else
        f"95 % over eyes{' and seeds' * (not few)} {interval[0]:+.3f} to {interval[1]:+.3f}")
    said += f", p = {d['p_adjusted']:.3f})"
    if few or interval is None:
        one, other = (", ".join(map(number_cell, values)) for values in d["runs"])
        said += f", seed by seed {other} against {one}"
    if few:
        return f"{said}, of these networks on these photographs; {few_seeds(d['seeds'])}"
    if d["claimed"]:
        return f"{said}: {verdict(d)}, from n = {d['photographs']} and {d['seeds']} seeds a side"
    return f"{said}: no difference can be claimed from n = {d['photographs']}" + (
        f"; one as large as this would take {needs(d)}" * bool(needs(d)))


# ---- what is shown ----

def table(scores: Mapping[str, dict], tasks: Sequence[TaskMetrics],
          limits: Mapping[str, Mapping] = MappingProxyType({})) -> str:
    """Metrics as lines of text, for each task a table; intervals behind the numbers that have one."""
    lines = []
    for task in (t for t in [*tasks, Joint()] if t.name in scores):
        values = scores[task.name]
        lines += [f"{task.name}: {values['photographs']} photographs of {values['eyes']} eyes",
                  aligned(measure_rows(task, values, limits.get(task.name, {})))]
        if "seeds" in values:
            lines.append(f"   {spelled_out(task.primary)}, seed by seed: "
                         f"{', '.join(map(number_cell, values['seeds'][task.primary]))}")
        if values.get("lesions", 4) < 4:
            lines.append("   classes without a true pixel in this split, at this size, are left out of the means")
        if values.get("unscored"):
            lines.append("   left out of the means, as no photograph of this split has them, or every one: "
                         + ", ".join(values["unscored"]))
        if len(values.get("confusion", range(99))) <= 12:
            names = [str(task.word(k))[:12] for k in range(task.classes)]
            lines.append(aligned([["truth \\ predicted", *names], *([n, *row] for n, row in zip(
                names, values["confusion"]))]))
    return "\n".join(lines)


def table_of_differences(compared: Mapping[str, Mapping]) -> str:
    """What compare() found, as lines of text."""
    rows, mcnemar_lines = [], []
    for task, measures in compared.items():
        rows.append([task, "first", "second", "difference (95 %, uncorrected)", "p, uncorrected"])
        rows += [[f"   {spelled_out(name)}", number_cell(d["first"]), number_cell(d["second"]),
                  "-" if math.isnan(d["difference"]) else f"{d['difference']:+.3f}{around(d['interval'], '+.3f')}",
                  f"{d['p']:.3f}"] for name, d in measures.items()]
        if mcnemar := measures.get("accuracy", {}).get("mcnemar"):
            mcnemar_lines.append(f"   {task}: only the first is right {mcnemar['only_first_right']} times, only the "
                                 f"second {mcnemar['only_second_right']}: McNemar's exact p = {mcnemar['p']:.3f} "
                                 "(as if no two photographs showed one eye)")
    return "\n".join([aligned(rows), *mcnemar_lines])


def table_of_changes(changes: Mapping[str, Mapping[str, dict]], tasks: Sequence[TaskMetrics]) -> str:
    """What score_interventions() found, as lines of text, and in a sentence.

    It asks for three standard errors: two are passed by one in twenty of the changes that are none.
    """
    scored = [t for t in tasks if any(t.name in by_task for by_task in changes.values())]
    table = aligned([["change (standard error) of", *(f"{t.name}: {spelled_out(t.primary)}" for t in scored)]] + [
        [title, *(f"{v['change']:+.3f} ({v['standard_error']:.3f})" if (
            v := by_task.get(t.name)) and not math.isnan(v["change"]) else "-"
                  for t in scored)] for title, by_task in changes.items()])
    every = [(f"{t} {v['change']:+.3f} {title}", v) for title, by_task in changes.items() for t, v in by_task.items()]
    if moved := [words for words, v in every if abs(v["change"]) > 3 * v["standard_error"] > 0]:
        return f"{table}\n   of {len(every)} changes these exceed three standard errors: {', '.join(moved)}"
    return (f"{table}\n   none of {len(every)} changes exceeds three standard errors: nothing shows that routes matter "
            "to this network\n   on these photographs; python tests/known_truths.py routing shows where they do")
