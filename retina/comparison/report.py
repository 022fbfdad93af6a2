"""What a comparison has found, told: on the screen, in comparison.csv, in a chart, in REPORT.md.

    scores, costs, generalization, differences, metrics     tables, as rows of cells; see tables.py
    claim, in_short, trade_offs                             sentences, which depend on the numbers
    screen, chart, text, write                              all of it

Every number is read from what analysis.compared found. REPORT.md is template.md with its gaps filled.
"""

import collections
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image

from retina import drawing
from retina.comparison.analysis import SINGLE
from retina.evaluation.statistics import FEWEST_RUNS
from retina.evaluation.tables import aligned, around, as_csv, as_markdown, number_cell
from retina.figures import charts
from retina.figures.charts import Axis, Chart
from retina.files import atomic_write, write_text


PICTURES = "pictures/comparison"  # where those of the report lie


# ---- numbers of a configuration and of a difference ----

def counting(of: Mapping) -> Mapping:
    """Of the numbers of a task, those of the metric that counts."""
    return of["metrics"][of["primary"]]


def with_sd(of: Mapping) -> str:
    """Mean of the metric that counts, and the standard deviation over seeds where there are several."""
    v = counting(of)
    return number_cell(v["mean"]) + (f" ± {number_cell(v['sd'])}" if v["sd"] is not None else "")


def rows_with(found: Mapping, task: str) -> dict[str, Mapping]:
    """{name: numbers of a task} of the configurations that have it."""
    return {name: c["tasks"][task] for name, c in found["configurations"].items() if task in c["tasks"]}


def usual_rows(found: Mapping, task: str) -> dict[str, Mapping]:
    """{words: numbers of a task} of the configurations that sentences speak of; of all, if none of these is there."""
    of = rows_with(found, task)
    usual = [name for name in ("constant", task + SINGLE, "hard", "dense", "learned") if name in of]
    return {found["configurations"][name]["words"]: of[name] for name in usual or of}


def wanted(d: Mapping) -> str:
    """What it would take to show a difference as large as the one seen, or ""."""
    return {"eyes": f"more eyes than {d['eyes']}", "seeds": "more seeds"}.get(d["wants"]) or \
        f"{d['needed']} photographs (here {d['photographs']})" * bool(d["needed"])


def together(found: Mapping) -> Mapping:
    """Costs of the networks for one task, added up, since all are needed; {} where that is one, or one is missing."""
    configurations = [found["configurations"].get(t + SINGLE) for t in found["tasks"]]
    if len(configurations) < 2 or not all(configurations):
        return {}
    return {k: (max if k == "peak_bytes" else sum)(c["costs"][k] for c in configurations) for k, *_ in COSTS}


# ---- tables ----

def scores(found: Mapping) -> list[list[str]]:
    """For each task the metric that counts."""
    heads = {t: next(iter(rows_with(found, t).values())) for t in found["tasks"]}
    out = [["configuration", *(f"{t}: {of['primary'].replace('_', ' ')}"
                               + " (lower is better)" * of.get("lower_is_better", False)
                               + f", {of['photographs']} photographs of {of['eyes']} eyes" for t, of in heads.items())]]
    most = max(len(c["seeds"]) for c in found["configurations"].values())
    for name, words in found["asked"].items():
        if name not in found["configurations"]:
            out.append([words, *["no seed came to its end"] * len(heads)])
            continue
        configuration = found["configurations"][name]
        cells = {t: with_sd(of) + around(counting(of)["interval"]) for t, of in configuration["tasks"].items()}
        if name == "leaky" and not found["own_validation"]:
            cells = {t: f"{cell}, of {configuration['tasks'][t]['photographs']} photographs of another split"
                     for t, cell in cells.items()}
        few = f", {len(configuration['seeds'])} of {most} seeds" * (
            len(configuration["seeds"]) < most and "costs" in configuration)
        out.append([words + few, *(cells.get(t, "") for t in heads)])
    return out


# what is measured, its title, its unit, digits
COSTS = (("parameters", "parameters, M", 1e6, 2), ("multiply_adds", "multiply-adds of a photograph, M", 1e6, 0),
         ("training_seconds", "training, ms a photograph", 1e-3, 0),
         ("latency", "answers to a photograph, ms", 1e-3, 1),
         ("peak_bytes", "peak memory, GiB", 2 ** 30, 2))


def costs(found: Mapping) -> list[list[str]]:
    """What each configuration costs, and networks for one task together."""
    listed = {c["words"]: c["costs"] for c in found["configurations"].values() if "costs" in c}
    if whole := together(found):
        listed["one network for each task, together"] = whole
    return [["configuration", *(title for _, title, _, _ in COSTS)]] + [
        [words, *(f"{c[k] / unit:.{digits}f}" for k, _, unit, digits in COSTS)] for words, c in listed.items()]


def generalization(found: Mapping) -> list[list[str]]:
    """Gaps and shifts."""
    names = dict.fromkeys(k for c in found["configurations"].values() for of in c["tasks"].values()
                          for k in of["shifts"])
    return [["configuration", "task", "training minus validation", *names]] + [
        [c["words"], t, f"{of['gap']['mean']:+.3f}", *(f"{of['shifts'][k]['mean']:+.3f}" for k in names)]
        for c in found["configurations"].values() for t in found["tasks"]
        if (of := c["tasks"].get(t, {})) and of["gap"]]


def difference(found: Mapping, d: Mapping) -> list[str]:
    """What is told of one: task, configurations, number with interval, p, verdict, what is needed; "-": not defined."""
    known = d["difference"] is not None and None not in d["corrected_interval"]
    verdict = "none" if not d["claimed"] else "higher" if d["difference"] > 0 else "lower"
    return [d["task"], *(found["configurations"][d[k]]["words"] for k in ("configuration", "against")),
            f"{d['difference']:+.3f}{around(d['corrected_interval'], '+.3f')}" if known else "-",
            f"{d['p_adjusted']:.3f}", verdict, wanted(d) if known and not d["claimed"] else ""]


def differences(found: Mapping) -> list[list[str]]:
    """All of them; claim() says each in words."""
    return [["task", "configuration", "minus", "difference", "p", "claim", "it would take"],
            *(difference(found, d) for d in found["differences"])]


def metrics(found: Mapping) -> list[list]:
    """All metrics of each configuration and task; plain values."""
    return [["configuration", "task", "metric", "counts",
             "mean", "sd", "low", "high", "seeds", "photographs", "eyes"]] + [
        [name, t, metric, int(metric == of["primary"]), v["mean"], v["sd"], *(v["interval"] or ("", "")),
         len(c["seeds"]), of["photographs"], of["eyes"]]
        for name, c in found["configurations"].items() for t, of in c["tasks"].items()
        for metric, v in of["metrics"].items()]


# ---- sentences ----

def claim(found: Mapping, d: Mapping) -> str:
    """What may be said of one difference."""
    task, configuration, against, number, p, verdict, takes = difference(found, d)
    said = f"{task} {d['metric'].replace('_', ' ')}, {configuration} minus {against}: "
    if number == "-":
        return f"{said}not defined on these photographs"
    said += f"{number.removesuffix(')')}, p = {p}): "
    if d["claimed"]:
        few = f" (these networks: a claim about the ways they were trained needs {FEWEST_RUNS} seeds)"
        return said + verdict + few * (d["seeds"] < FEWEST_RUNS)
    return f"{said}no difference can be shown" + f"; one as large as this would take {takes}" * bool(takes)


def in_short(found: Mapping) -> list[str]:
    """The scores of the configurations that matter most, and what may be claimed."""
    out = []
    for t in found["tasks"]:
        of = usual_rows(found, t)
        primary = next(iter(of.values()))["primary"].replace("_", " ")
        out.append(f"{t}, {primary}: {', '.join(f'{with_sd(x)} ({words})' for words, x in of.items())}.")
    claimed = ["{} {metric}, {} minus {} {}".format(*difference(found, d)[:4], metric=d["metric"].replace("_", " "))
               for d in found["differences"] if d["claimed"]]
    if found["differences"]:
        out.append(f"{len(claimed) or 'None'} of the {len(found['differences'])} differences between configurations "
                   f"can be claimed{': ' * bool(claimed)}{'; '.join(claimed)}.")
    return out


def trade_offs(found: Mapping) -> list[str]:
    """What the numbers say of cost and generalization; no more than they do."""
    configurations, out, whole = found["configurations"], [], together(found)
    if "hard" in configurations and whole:
        out.append("Efficiency: one shared network has {:.0%} of the parameters of one network for each task and needs "
                   "{:.0%} of the multiply-adds; measured were {:.0%} of the time to answer and {:.0%} of the time to "
                   "train.".format(*(configurations["hard"]["costs"][k] / whole[k] for k in (
                       "parameters", "multiply_adds", "latency", "training_seconds"))))
    if "learned" in configurations and "hard" in configurations:
        out.append("Experts add {:.1%} to the multiply-adds of the shared network and {:.0%} to its parameters.".format(
            *(configurations["learned"]["costs"][k] / configurations["hard"]["costs"][k] - 1
              for k in ("multiply_adds", "parameters"))))
    for t in found["tasks"]:
        of = usual_rows(found, t)
        gaps = ", ".join(f"{x['gap']['mean']:+.3f} ({words})" for words, x in of.items() if x["gap"])
        changes = ", ".join("{:+.3f} ({})".format(fmean(v["mean"] for v in x["shifts"].values()), words)
                            for words, x in of.items() if x["shifts"])
        out += [f"Generalization, {t}: training minus validation {gaps}."] * bool(gaps)
        out += [f"Generalization, {t}: the shifts change the score on average by {changes}."] * bool(changes)
    return out


def cosine_words(found: Mapping) -> str:
    """What was measured of the tasks' gradients."""
    if len(found["tasks"]) < 2:
        return "There is but one task here."
    one = next((c for name in ("hard", "dense", "learned", *found["configurations"])
                if any((c := found["configurations"].get(name, {})).get("cosines", []))), None)
    if one is None:
        return "Gradients were not compared here."
    epochs, parts = [epoch for epoch in one["cosines"] if epoch], []
    for pair in epochs[0]:
        values = [epoch[pair] for epoch in epochs]
        spread = f" (standard deviation over {len(values)} epochs {stdev(values):.3f})" if len(values) > 1 else ""
        parts.append(f"of {' and '.join(pair.split())} {values[0]:+.2f} in the first epoch, {values[-1]:+.2f} in the "
                     f"last, {fmean(values):+.3f} on average{spread}")
    return (f"Here (\"{one['words']}\", one run) the cosine between the tasks' gradients on the shared encoder was "
            f"{'; '.join(parts)}.")


def measured_here(found: Mapping, configuration: str, against: str) -> str:
    """What one configuration did to each task, against another; `against` may be its name without the task."""
    said = [claim(found, d) for d in found["differences"]
            if d["configuration"] == configuration and d["against"] in (against, d["task"] + against)]
    return f"Measured here: {'; '.join(said)}." if said else "It was not measured in this comparison."


def rows_of_weights(found: Mapping) -> str:
    """Which configurations have other weights of losses."""
    names = [c["words"] for name, c in found["configurations"].items()
             if name == "uncertainty" or name.startswith("cls_") and not name.endswith(SINGLE)]
    return f"the tables above have {', '.join(names)}" if names else \
        "configurations with other weights were not run (`--all`)"


def threads_words(numbers: Sequence[int]) -> str:
    """"2 threads"."""
    return f"{' or '.join(map(str, numbers))} thread{'s' * (numbers[-1] > 1)}"


def failures(found: Mapping) -> list[str]:
    """Runs that did not come to their end, and why."""
    return [f"failed: {job}: {why}" for job, why in found["failed"].items()]


# ---- all of it ----

def screen(found: Mapping) -> str:
    """The comparison for the screen."""
    return "\n".join([found["what"], aligned(scores(found)), *(claim(found, d) for d in found["differences"]),
                      *failures(found)])


def chart(found: Mapping) -> Image.Image:
    """Of each task the metric that counts: a line for each configuration, with interval, mean and single seeds."""
    pictures = []
    for t in found["tasks"]:
        configurations = rows_with(found, t)
        values, first = [counting(of) for of in configurations.values()], next(iter(configurations.values()))
        ends = [v for x in values for v in [x["mean"], *x["values"], *(x["interval"] or [])]]
        steps = tuple((len(values) - k, found["configurations"][name]["words"])
                      for k, name in enumerate(configurations))
        plot = Chart(f"{t}: {first['primary'].replace('_', ' ')}, {first['photographs']} photographs",
                     charts.axis_of("", ends), Axis("", 0.5, len(values) + 0.5, steps), 340, 26 * len(values))
        for (y, _), v in zip(steps, values):
            if v["interval"]:
                plot.line(v["interval"], [y, y], drawing.COLOURS[4], 3)
            plot.dots(v["values"], [y] * len(v["values"]), drawing.PALE, 2.5)
            plot.dots([v["mean"]], [y], drawing.COLOURS[0], 4.5)
        pictures.append(plot.picture())
    keys = drawing.legend([("95 % of draws of eyes and seeds", drawing.COLOURS[4], "line"),
                          ("mean over seeds", drawing.COLOURS[0], "dot"), ("a seed", drawing.PALE, "dot")])
    return drawing.titled("The comparison", drawing.column([keys, drawing.row(pictures, 24)], 12), found["what"])


def pictured(found: Mapping) -> list[str]:
    """The configurations whose first runs are drawn, at most eight: the first in all pictures, others in the curves."""
    runs = [name for name, c in found["configurations"].items() if "run" in c]
    return sorted(runs, key=lambda name: name != "learned")[:8]


CREDIT = "*Photographs: IDRiD, (c) P. Porwal, S. Pachade, M. Kokare, CC BY 4.0; cropped, reduced, drawn upon.*"


def filled(report: str, width: int = 120) -> str:
    """The same with its paragraphs and lists wrapped; tables, headings and pictures stay, those without a path go."""
    out, paragraphs = [], iter(report.strip().split("\n\n"))
    for paragraph in paragraphs:
        if paragraph.endswith("]()"):
            next(paragraphs)  # its caption
        elif paragraph.startswith(("|", "#", "!")):
            out.append(paragraph)
        elif paragraph:
            listed = paragraph.startswith("* ")
            out.append("\n".join(textwrap.fill(part, width, subsequent_indent="  " * listed, break_long_words=False,
                                               break_on_hyphens=False)
                                 for part in (paragraph.split("\n") if listed else [paragraph])))
    return "\n\n".join(out) + "\n"


def circumstances(found: Mapping) -> dict[str, str]:
    """What the report says of data, machine and training, beside what stands in `found` as it is."""
    o, configurations = found["options"], found["configurations"]
    seeds = max((len(c["seeds"]) for c in configurations.values() if "costs" in c), default=0)
    drawn = [configurations[name]["words"] for name in pictured(found)]
    return {
        "start": "random weights" if o["encoder_weights"] == "none" else f"weights {o['encoder_weights']}",
        "failed": "".join(f"\n* {line}" for line in failures(found)) + "\n" * bool(found["failed"]),
        "machine": "; ".join(found["machine"]), "minutes": found["seconds"] / 60, "encoder": o["encoder"].upper(),
        "drawn": " **These are drawings: nothing here is a result on IDRiD.**" * (found["data"] is None),
        "name": "Drawn photographs" if found["data"] is None else
        "{} (the first photograph has {}x{} pixels)".format(found["data"], *found["pixels"]),
        "threads": threads_words(found["threads"]), "threads_here": threads_words([found["threads_here"]]),
        "unlike": " Runs had different machines or numbers of threads: their times cannot be compared." * (
            len(found["threads"]) + len(found["machine"]) > 2),
        "tasks": " ".join(found["tasks"]), "decisions": (o["image_size"] // 32) ** 2,
        "folds": "the part that the data set names itself"
        if found["own_validation"] else f"fold {', '.join(found['folds'])} of the training split",
        "leaky": " The configuration without leak protection is split as if each file showed another eye, and compared "
        "with none." * ("leaky" in configurations),
        "unchanged": " (but for the configurations without augmentation and without leak protection)" * (
            "no_augmentation" in configurations or "leaky" in configurations),
        "first": drawn[0], "curves": ", ".join(drawn), "credit": CREDIT * (found["data"] == "IDRiD"),
        "fewest": FEWEST_RUNS, "seeds": f"{seeds} seed{'s' * (seeds != 1)} of each configuration at most: " + (
            f"differences are between these networks; to speak of ways of training, {FEWEST_RUNS} are needed."
            if seeds < FEWEST_RUNS else "differences are between ways of training, on these data.")}


def text(found: Mapping, pictures: Mapping[str, str]) -> str:
    """The whole report; `pictures`: name -> path, relative to where it will lie."""
    def listed(lines: Sequence[str]) -> str:
        return "\n".join(f"* {line}" for line in lines)

    template = Path(__file__).with_name("template.md").read_text(encoding="utf-8")
    return filled(template.format(**found | circumstances(found) | {
        "pictures": collections.defaultdict(str, pictures),
        "short": listed(in_short(found)), "follows": listed(trade_offs(found)), "results": as_markdown(scores(found)),
        "costs": as_markdown(costs(found)), "generalization": as_markdown(generalization(found)),
        "differences": as_markdown(differences(found)) if found["differences"] else "There is nothing to compare with.",
        "number": len(found["differences"]), "help": measured_here(found, "hard", SINGLE),
        "routing": measured_here(found, "learned", "dense"), "cosines": cosine_words(found),
        "weights_rows": rows_of_weights(found)}))


def write(found: Mapping, folder: Path) -> list[str]:
    """comparison.json, comparison.csv and a picture; -> their names."""
    write_text(folder / "comparison.json", json.dumps(found, indent=1))
    write_text(folder / "comparison.csv", as_csv(metrics(found)))
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PICTURES / "comparison.png", lasting=False) as file:
        chart(found).save(file, "PNG", optimize=True)
    return ["comparison.json", "comparison.csv", f"{PICTURES}/comparison.png"]
