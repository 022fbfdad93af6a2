"""What a comparison has measured, told: on the screen, in comparison.csv, in a chart, in REPORT.md.

    score_table ... metric_table        rows of cells; see tables.py
    sentence, in_short, trade_offs      sentences, which depend on the numbers
    screen, chart, text, write          all of it

Every number is read from `summary`, that of analysis.summarize. REPORT.md is template.md with its gaps filled.
"""

import collections
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image

from retina import drawing
from retina.comparison.analysis import SINGLE
from retina.evaluation.statistics import FEWEST_SEEDS
from retina.evaluation.tables import aligned, around, as_csv, as_markdown, claim, difference_cell, few_seeds, needs, \
    number_cell, spelled_out, verdict
from retina.figures import charts
from retina.figures.charts import Axis, Chart
from retina.files import atomic_write, write_text


TAUGHT = """A trained network's probabilities tell a student more than a label does, and there are some where labels
are not (Hinton et al. 2015, arXiv 1503.02531). Here a student learns from labels and from teachers, of which several
answer with the mean of their probabilities. Teachers have its seed, fold and labels. What they add stands against a
student whose teacher does not count, and against the network without any."""
FEW_LABELS = """Where 15 % of the eyes of training keep their labels, the same ones in all networks, teachers answer for
the others, too (as Chelaramani et al. 2021, WACV, have it). Networks without teachers never see these, in epochs that
are as much shorter and as many more."""
PICTURES = "pictures/comparison"  # where those of the report lie


# ---- numbers of a configuration; `scores` are those of one of its tasks ----

def primary_metric(scores: Mapping) -> Mapping:
    """Those of the primary metric."""
    return scores["metrics"][scores["primary"]]


def mean_cell(scores: Mapping, interval: bool = True) -> str:
    """Mean of the primary metric, interval, single seeds: from FEWEST_SEEDS on, their standard deviation instead."""
    v = primary_metric(scores)
    few = len(v["values"]) < FEWEST_SEEDS
    return number_cell(v["mean"]) + f" ± {number_cell(v['sd'])}" * (not few) + around(v["interval"]) * interval + (
        f", seeds {', '.join(map(number_cell, v['values']))}" * (1 < len(v["values"]) and few))


def scores_of(summary: Mapping, task: str) -> dict[str, Mapping]:
    """{name of a configuration: scores} of those that have the task."""
    return {name: c["tasks"][task] for name, c in summary["configurations"].items() if task in c["tasks"]}


def main_scores(summary: Mapping, task: str) -> dict[str, Mapping]:
    """{words: scores} of the configurations that sentences speak of; of all, if none of these is there."""
    by_name = scores_of(summary, task)
    usual = [name for name in ("constant", task + SINGLE, "hard", "dense", "learned") if name in by_name]
    return {summary["configurations"][name]["words"]: by_name[name] for name in usual or by_name}


def most_seeds(summary: Mapping) -> int:
    """Of a configuration."""
    return max(len(c["seeds"]) for c in summary["configurations"].values())


def over(summary: Mapping) -> str:
    """What intervals are over; see statistics.bootstrap."""
    fewest = min((len(c["seeds"]) for c in summary["configurations"].values() if "costs" in c), default=0)
    return "eyes and seeds" if fewest >= FEWEST_SEEDS else "eyes, for these networks"


def has_intervals(summary: Mapping) -> bool:
    """Whether any mean over seeds has one."""
    return any(primary_metric(x)["interval"] for t in summary["tasks"] for x in scores_of(summary, t).values())


def single_task_costs(summary: Mapping) -> Mapping:
    """Costs of the networks for one task, added up, since all are needed; {} where that is one, or one is missing."""
    configurations = [summary["configurations"].get(t + SINGLE) for t in summary["tasks"]]
    if len(configurations) < 2 or not all(configurations):
        return {}
    return {k: (max if k == "peak_bytes" else sum)(c["costs"][k] for c in configurations) for k, *_ in COSTS}


# ---- tables ----

def score_table(summary: Mapping) -> list[list[str]]:
    """For each task the primary metric."""
    heads = {t: next(iter(scores_of(summary, t).values())) for t in summary["tasks"]}
    out = [["configuration", *(
        f"{t}: {spelled_out(head['primary'])}" + " (lower is better)" * head.get("lower_is_better", False)
        + f", {head['photographs']} photographs of {head['eyes']} eyes" for t, head in heads.items())]]
    most = most_seeds(summary)
    for name, words in summary["asked"].items():
        if name not in summary["configurations"]:
            out.append([words, *["no seed came to its end"] * len(heads)])
            continue
        configuration = summary["configurations"][name]
        cells = {t: mean_cell(scores) for t, scores in configuration["tasks"].items()}
        if name == "leaky" and not summary["own_validation"]:
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


def cost_table(summary: Mapping) -> list[list[str]]:
    """What each configuration costs, and networks for one task together."""
    listed = {c["words"]: c["costs"] for c in summary["configurations"].values() if "costs" in c}
    if whole := single_task_costs(summary):
        listed["one network for each task, together"] = whole
    return [["configuration", *(title for _, title, _, _ in COSTS)]] + [
        [words, *(f"{c[k] / unit:.{digits}f}" for k, _, unit, digits in COSTS)] for words, c in listed.items()]


def generalization_table(summary: Mapping) -> list[list[str]]:
    """Gaps and shifts."""
    names = dict.fromkeys(k for c in summary["configurations"].values() for scores in c["tasks"].values()
                          for k in scores["shifts"])
    return [["configuration", "task", "training minus validation", *names]] + [
        [c["words"], t, f"{scores['gap']['mean']:+.3f}", *(f"{scores['shifts'][k]['mean']:+.3f}" for k in names)]
        for c in summary["configurations"].values() for t in summary["tasks"]
        if (scores := c["tasks"].get(t, {})) and scores["gap"]]


def difference_table(summary: Mapping) -> list[list[str]]:
    """All of them; sentence() says each in words."""
    words = {name: c["words"] for name, c in summary["configurations"].items()}
    return [["task", "configuration", "minus", "difference", "p", "claim", "it would take"]] + [
        [d["task"], words[d["configuration"]], words[d["against"]], difference_cell(d), f"{d['p_adjusted']:.3f}",
         verdict(d), "" if d["claimed"] or d["difference"] is None else needs(d)] for d in summary["differences"]]


def metric_table(summary: Mapping) -> list[list]:
    """All metrics of each configuration and task; plain values."""
    return [["configuration", "task", "metric", "primary",
             "mean", "sd", "low", "high", "seeds", "photographs", "eyes"]] + [
        [name, t, metric, int(metric == scores["primary"]), v["mean"], v["sd"], *(v["interval"] or ("", "")),
         len(c["seeds"]), scores["photographs"], scores["eyes"]]
        for name, c in summary["configurations"].items() for t, scores in c["tasks"].items()
        for metric, v in scores["metrics"].items()]


# ---- sentences ----

def sentence(summary: Mapping, d: Mapping) -> str:
    """What may be said of one difference."""
    return claim(d, *(summary["configurations"][d[k]]["words"] for k in ("against", "configuration")))


def in_short(summary: Mapping) -> list[str]:
    """The scores of the main configurations, and what may be claimed."""
    out = []
    for t in summary["tasks"]:
        by_words = main_scores(summary, t)
        primary = spelled_out(next(iter(by_words.values()))["primary"])
        out.append(f"{t}, {primary}: "
                   f"{'; '.join(f'{words} {mean_cell(x, interval=False)}' for words, x in by_words.items())}.")
    claimed = [sentence(summary, d) for d in summary["differences"] if d["claimed"]]
    if summary["differences"]:
        seeds = max(d["seeds"] for d in summary["differences"])
        reason = f"; {few_seeds(seeds)}" * (seeds < FEWEST_SEEDS)
        out.append(f"{len(claimed) or 'None'} of the {len(summary['differences'])} differences between configurations "
                   f"can be claimed{': ' * bool(claimed)}{'; '.join(claimed)}{reason}.")
    return out


def trade_offs(summary: Mapping) -> list[str]:
    """What the numbers say of cost and generalization; no more than they do."""
    configurations, out, whole = summary["configurations"], [], single_task_costs(summary)
    if "hard" in configurations and whole:
        out.append("Efficiency: one shared network has {:.0%} of the parameters of one network for each task and needs "
                   "{:.0%} of the multiply-adds; measured were {:.0%} of the time to answer and {:.0%} of the time to "
                   "train.".format(*(configurations["hard"]["costs"][k] / whole[k] for k in (
                       "parameters", "multiply_adds", "latency", "training_seconds"))))
    if "learned" in configurations and "hard" in configurations:
        out.append("Experts add {:.1%} to the multiply-adds of the shared network and {:.0%} to its parameters.".format(
            *(configurations["learned"]["costs"][k] / configurations["hard"]["costs"][k] - 1
              for k in ("multiply_adds", "parameters"))))
    for t in summary["tasks"]:
        by_words = main_scores(summary, t)
        gaps = ", ".join(f"{x['gap']['mean']:+.3f} ({words})" for words, x in by_words.items() if x["gap"])
        changes = ", ".join("{:+.3f} ({})".format(fmean(v["mean"] for v in x["shifts"].values()), words)
                            for words, x in by_words.items() if x["shifts"])
        out += [f"Generalization, {t}: training minus validation {gaps}."] * bool(gaps)
        out += [f"Generalization, {t}: the shifts change the score on average by {changes}."] * bool(changes)
    return out


def cosine_words(summary: Mapping) -> str:
    """What was measured of the tasks' gradients."""
    if len(summary["tasks"]) < 2:
        return "There is but one task here."
    one = next((c for name in ("hard", "dense", "learned", *summary["configurations"])
                if any((c := summary["configurations"].get(name, {})).get("cosines", []))), None)
    if one is None:
        return "Gradients were not compared here."
    epochs, parts = [epoch for epoch in one["cosines"] if epoch], []
    for pair in epochs[0]:
        values = [epoch[pair] for epoch in epochs]
        deviation = f" (standard deviation over {len(values)} epochs {stdev(values):.3f})" if len(values) > 1 else ""
        parts.append(f"of {' and '.join(pair.split())} {values[0]:+.2f} in the first epoch, {values[-1]:+.2f} in the "
                     f"last, {fmean(values):+.3f} on average{deviation}")
    return (f"Here (\"{one['words']}\", one run) the cosine between the tasks' gradients on the shared encoder was "
            f"{'; '.join(parts)}.")


def measured_here(summary: Mapping, configuration: str, against: str) -> str:
    """What one configuration did to each task, against another; `against` may be its name without the task."""
    said = [sentence(summary, d) for d in summary["differences"]
            if d["configuration"] == configuration and d["against"] in (against, d["task"] + against)]
    return f"Measured here: {'; '.join(said)}." if said else "It was not measured in this comparison."


def loss_weight_words(summary: Mapping) -> str:
    """Which configurations have other weights of losses."""
    names = [c["words"] for name, c in summary["configurations"].items()
             if name == "uncertainty" or re.fullmatch(r"cls_[\d.]+", name)]
    return f"the tables above have {', '.join(names)}" if names else \
        "configurations with other weights were not run (`--all`)"


def taught_section(summary: Mapping) -> str:
    """What teachers added; nothing where there were none."""
    said = [f"* {sentence(summary, d)}." for d in summary["differences"]
            if d["configuration"] in summary.get("taught", ())]
    few = [FEW_LABELS] * any(name.endswith("_15") for name in summary["configurations"])
    return "\n\n".join(["## Learning from teachers", TAUGHT, *few, "\n".join(said)]) if said else ""


def threads_words(numbers: Sequence[int]) -> str:
    """"2 threads"."""
    return f"{' or '.join(map(str, numbers))} thread{'s' * (numbers[-1] > 1)}"


def failures(summary: Mapping) -> list[str]:
    """Runs that did not come to their end, and why."""
    return [f"failed: {job}: {why}" for job, why in summary["failed"].items()]


# ---- all of it ----

def screen(summary: Mapping) -> str:
    """The comparison for the screen."""
    return "\n".join([summary["what"], aligned(score_table(summary)),
                      *(sentence(summary, d) for d in summary["differences"]), *failures(summary)])


def chart(summary: Mapping) -> Image.Image:
    """Of each task the primary metric: a line for each configuration, with interval, mean and single seeds."""
    pictures = []
    for t in summary["tasks"]:
        configurations = scores_of(summary, t)
        values, first = [primary_metric(x) for x in configurations.values()], next(iter(configurations.values()))
        ends = [v for x in values for v in [x["mean"], *x["values"], *(x["interval"] or [])]]
        steps = tuple((len(values) - k, summary["configurations"][name]["words"])
                      for k, name in enumerate(configurations))
        plot = Chart(f"{t}: {spelled_out(first['primary'])}, {first['photographs']} photographs",
                     charts.axis_of("", ends), Axis("", 0.5, len(values) + 0.5, steps), 340, 26 * len(values))
        for (y, _), v in zip(steps, values):
            if v["interval"]:
                plot.line(v["interval"], [y, y], drawing.COLOURS[4], 3)
            plot.dots(v["values"], [y] * len(v["values"]), drawing.PALE, 2.5)
            plot.dots([v["mean"]], [y], drawing.COLOURS[0], 4.5)
        pictures.append(plot.picture())
    keys = drawing.legend([(f"95 % over {over(summary)}", drawing.COLOURS[4], "line")] * has_intervals(summary) + [
                          ("mean over seeds", drawing.COLOURS[0], "dot"), ("a seed", drawing.PALE, "dot")])
    return drawing.titled("The comparison", drawing.column([keys, drawing.row(pictures, 24)], 12), summary["what"])


def pictured(summary: Mapping) -> list[str]:
    """The configurations whose first runs are drawn, at most eight: the first in all pictures, others in the curves."""
    runs = [name for name, c in summary["configurations"].items() if "run" in c]
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


def circumstances(summary: Mapping) -> dict[str, str]:
    """What the report says of data, machine and training, beside what stands in `summary` as it is."""
    o, configurations, seeds = summary["options"], summary["configurations"], most_seeds(summary)
    in_pictures = [configurations[name]["words"] for name in pictured(summary)]
    return {
        "start": "random weights" if o["encoder_weights"] == "none" else f"weights {o['encoder_weights']}",
        "failed": "".join(f"\n* {line}" for line in failures(summary)) + "\n" * bool(summary["failed"]),
        "machine": "; ".join(summary["machine"]), "minutes": summary["seconds"] / 60,
        "encoder": o["encoder"].capitalize(),
        "published": ", less for published weights" * (o["encoder_weights"] != "none"),
        "crops": ", parts of photographs with masks" * (o["crops"] > 1),
        "drawn": " **These are drawings: nothing here is a result on IDRiD.**" * (summary["data"] is None),
        "name": "Drawn photographs" if summary["data"] is None else
        "{} (the first photograph has {}x{} pixels)".format(summary["data"], *summary["pixels"]),
        "threads": threads_words(summary["threads"]), "threads_here": threads_words([summary["threads_here"]]),
        "unlike": " Runs had different machines or numbers of threads: their times cannot be compared." * (
            len(summary["threads"]) + len(summary["machine"]) > 2),
        "tasks": " ".join(summary["tasks"]), "decisions": (o["image_size"] // 32) ** 2,
        "folds": "the part that the data set names itself"
        if summary["own_validation"] else f"fold {', '.join(summary['folds'])} of the training split",
        "leaky": " The configuration without leak protection is split as if each file showed another eye, and compared "
        "with none." * ("leaky" in configurations),
        "unchanged": " (but for the configurations without augmentation and without leak protection)" * (
            "no_augmentation" in configurations or "leaky" in configurations) +
        " (those that see unlabelled ones have batches of their own)" * bool(summary.get("taught")),
        "first": in_pictures[0], "curves": ", ".join(in_pictures), "credit": CREDIT * (summary["data"] == "IDRiD"),
        "over": over(summary), "interval": f" (95 % over {over(summary)})" * has_intervals(summary),
        "fewest": FEWEST_SEEDS, "seeds": few_seeds(seeds).capitalize()
        if seeds < FEWEST_SEEDS else f"{seeds} seeds a side, one data set"}


def text(summary: Mapping, pictures: Mapping[str, str]) -> str:
    """The whole report; `pictures`: name -> path, relative to where it will lie."""
    def listed(lines: Sequence[str]) -> str:
        return "\n".join(f"* {line}" for line in lines)

    template = Path(__file__).with_name("template.md").read_text(encoding="utf-8")
    return filled(template.format(**summary | circumstances(summary) | {
        "pictures": collections.defaultdict(str, pictures),
        "short": listed(in_short(summary)), "follows": listed(trade_offs(summary)),
        "results": as_markdown(score_table(summary)), "costs": as_markdown(cost_table(summary)),
        "generalization": as_markdown(generalization_table(summary)),
        "differences": as_markdown(difference_table(summary)) if summary["differences"] else
        "There is nothing to compare with.",
        "number": len(summary["differences"]), "help": measured_here(summary, "hard", SINGLE),
        "routing": measured_here(summary, "learned", "dense"), "cosines": cosine_words(summary),
        "weights_rows": loss_weight_words(summary), "taught": taught_section(summary)}))


def write(summary: Mapping, folder: Path) -> list[str]:
    """comparison.json, comparison.csv and a picture; -> their names."""
    write_text(folder / "comparison.json", json.dumps(summary, indent=1))
    write_text(folder / "comparison.csv", as_csv(metric_table(summary)))
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PICTURES / "comparison.png", lasting=False) as file:
        chart(summary).save(file, "PNG", optimize=True)
    return ["comparison.json", "comparison.csv", f"{PICTURES}/comparison.png"]
