"""REPORT.md from comparison.json: every number in it is read from there, and sentences depend on the numbers.

    python baselines.py                          writes both, and the pictures that the report shows
"""

import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from retina.comparison.analysis import ALONE, claim
from retina.evaluation.statistics import FEWEST_RUNS
from retina.evaluation.tables import shown


def with_sd(v: Mapping) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return shown(v["mean"]) + (f" ± {shown(v['sd'])}" if v["sd"] is not None else "")


def results(found: Mapping) -> list[str]:
    """The table of scores: for each task the metric that counts."""
    heads = {t: next(row["tasks"][t] for row in found["rows"].values() if t in row["tasks"]) for t in found["tasks"]}
    titles = [f"{t}: {of['primary'].replace('_', ' ')}{' (lower is better)' * of.get('lower_is_better', False)}, "
              f"{of['photographs']} photographs of {of['eyes']} eyes" for t, of in heads.items()]
    most = max(len(row["seeds"]) for row in found["rows"].values())
    out = [f"| row | {' | '.join(titles)} |", "|---|" + "---|" * len(heads)]
    for name, words in found["asked"].items():
        if name not in found["rows"]:
            out.append(f"| {words} | {' | '.join(['no seed came to its end'] * len(heads))} |")
            continue
        row, cells = found["rows"][name], []
        for t in found["tasks"]:
            if t not in row["tasks"]:
                cells.append("")
                continue
            v = row["tasks"][t]["metrics"][row["tasks"][t]["primary"]]
            other = f", of {row['tasks'][t]['photographs']} photographs of another split" * (
                name == "leaky" and not found["own_validation"])
            cells.append(with_sd(v) + (" ({:.2f} to {:.2f})".format(*v["interval"]) if v["interval"] else "") + other)
        seeds = f", {len(row['seeds'])} of {most} seeds" * (len(row["seeds"]) < most and "costs" in row)
        out.append(f"| {words}{seeds} | {' | '.join(cells)} |")
    return out


def costs(found: Mapping) -> list[str]:
    """The table of costs; networks for one task are added up, too, since all of them are needed."""
    listed = {row["words"]: row["costs"] for row in found["rows"].values() if "costs" in row}
    alone = of_single_tasks(found)
    if len(alone) > 1:
        listed["one network for each task, together"] = {
            **{k: sum(c[k] for c in alone) for k in ("parameters", "multiply_adds", "latency", "training_seconds")},
            "peak_bytes": max(c["peak_bytes"] for c in alone)}
    out = ["| row | parameters, M | multiply-adds of a photograph, M | training, ms a photograph | answers to a "
           "photograph, ms | peak memory, GiB |", "|---|---|---|---|---|---|"]
    for words, c in listed.items():
        cells = [f"{c['parameters'] / 1e6:.2f}", f"{c['multiply_adds'] / 1e6:.0f}",
                 f"{1000 * c['training_seconds']:.0f}", f"{1000 * c['latency']:.1f}",
                 f"{c['peak_bytes'] / 2 ** 30:.2f}"]
        out.append(f"| {words} | {' | '.join(cells)} |")
    return out


def of_single_tasks(found: Mapping) -> list[Mapping]:
    """Costs of the networks for one task; none where one of them is missing."""
    rows = [found["rows"].get(t + ALONE) for t in found["tasks"]]
    return [row["costs"] for row in rows if row] if all(rows) else []


def generalization(found: Mapping) -> list[str]:
    """The table of gaps and shifts."""
    names = [k for row in found["rows"].values() for of in row["tasks"].values() for k in of.get("shifts") or {}]
    names = list(dict.fromkeys(names))
    out = [f"| {' | '.join(['row', 'task', 'training minus validation', *names])} |", "|---" * (3 + len(names)) + "|"]
    for row in found["rows"].values():
        for t in found["tasks"]:
            of = row["tasks"].get(t)
            if of and of["gap"]:
                out.append(f"| {row['words']} | {t} | {of['gap']['mean']:+.3f} | " + " | ".join(
                    f"{of['shifts'][k]['mean']:+.3f}" for k in names) + " |")
    return out


def in_short(found: Mapping) -> list[str]:
    """The scores of the rows that matter most, and what may be claimed."""
    out = []
    for t in found["tasks"]:
        of = usual_rows(found, t)
        primary = next(iter(of.values()))["primary"]
        out.append(f"{t}, {primary.replace('_', ' ')}: " + ", ".join(
            f"{with_sd(x['metrics'][primary])} ({words})" for words, x in of.items()) + ".")
    claimed = [d for d in found["differences"] if d["claimed"]]
    if found["differences"]:
        said = "; ".join("{} {}, {} minus {} {:+.3f} ({:+.3f} to {:+.3f})".format(
            d["task"], d["metric"].replace("_", " "), *(found["rows"][d[k]]["words"] for k in ("row", "against")),
            d["difference"], *d["corrected_interval"]) for d in claimed)
        out.append(f"{len(claimed) or 'None'} of the {len(found['differences'])} differences between rows can be "
                   f"claimed{': ' * bool(claimed)}{said}.")
    return out


def usual_rows(found: Mapping, task: str) -> dict[str, Mapping]:
    """{words: numbers of a task} of the rows that sentences speak of; of all, if none of these is there."""
    of = {name: row for name, row in found["rows"].items() if task in row["tasks"]}
    usual = [name for name in ("constant", task + ALONE, "hard", "dense", "learned") if name in of]
    return {of[name]["words"]: of[name]["tasks"][task] for name in usual or of}


def trade_offs(found: Mapping) -> list[str]:
    """What the numbers say of cost and generalization; no more than they do."""
    rows, out, alone = found["rows"], [], of_single_tasks(found)
    if "hard" in rows and len(alone) > 1:
        shared = rows["hard"]["costs"]
        out.append("Efficiency: one shared network has {:.0%} of the parameters of one network for each task and needs "
                   "{:.0%} of the multiply-adds; measured were {:.0%} of the time to answer and {:.0%} of the time to "
                   "train.".format(*(shared[k] / sum(c[k] for c in alone) for k in (
                       "parameters", "multiply_adds", "latency", "training_seconds"))))
    if "learned" in rows and "hard" in rows:
        out.append("Experts add {:.1%} to the multiply-adds of the shared network and {:.0%} to its parameters.".format(
            *(rows["learned"]["costs"][k] / rows["hard"]["costs"][k] - 1 for k in ("multiply_adds", "parameters"))))
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
    row = next((row for name in ("hard", "dense", "learned", *found["rows"])
                if any((row := found["rows"].get(name, {})).get("cosines", []))), None)
    if row is None:
        return "Gradients were not compared here."
    epochs, parts = [epoch for epoch in row["cosines"] if epoch], []
    for pair in epochs[0]:
        values = [epoch[pair] for epoch in epochs]
        spread = f" (standard deviation over {len(values)} epochs {stdev(values):.3f})" if len(values) > 1 else ""
        parts.append(f"of {' and '.join(pair.split())} {values[0]:+.2f} in the first epoch, {values[-1]:+.2f} in the "
                     f"last, {fmean(values):+.3f} on average{spread}")
    return (f"Here (\"{row['words']}\", one run) the cosine between the tasks' gradients on the shared encoder was "
            f"{'; '.join(parts)}.")


def differences(found: Mapping) -> list[str]:
    """The table of differences; claim() says each of them in words."""
    if not found["differences"]:
        return ["There is nothing to compare with."]
    out = ["| task | row | minus | difference | p | claim | it would take |", "|---|---|---|---|---|---|---|"]
    for d in found["differences"]:
        row, other = (found["rows"][d[k]]["words"] for k in ("row", "against"))
        known = d["difference"] is not None and None not in d["corrected_interval"]
        number = "{:+.3f} ({:+.3f} to {:+.3f})".format(d["difference"], *d["corrected_interval"]) if known else "-"
        verdict = ("higher" if d["difference"] > 0 else "lower") if d["claimed"] else "none"
        takes = {"seeds": "more seeds", "eyes": f"more eyes than {d['eyes']}"}.get(d["wants"]) or (
            f"{d['needed']} photographs (here {d['photographs']})" if d["needed"] else "")
        out.append(f"| {d['task']} | {row} | {other} | {number} | {d['p_adjusted']:.3f} | {verdict} | "
                   f"{'' if d['claimed'] or not known else takes} |")
    return out


def measured_here(found: Mapping, row: str, against: str) -> str:
    """What one row did to each task, against another; `against` may end in the part of its name that is no task's."""
    said = [claim(found, d) for d in found["differences"]
            if d["row"] == row and d["against"] in (against, d["task"] + against)]
    return f"Measured here: {'; '.join(said)}." if said else "It was not measured in this comparison."


def rows_of_weights(found: Mapping) -> str:
    """Which rows have other weights of losses."""
    names = [row["words"] for name, row in found["rows"].items()
             if name == "uncertainty" or name.startswith("cls_") and not name.endswith(ALONE)]
    return f"the tables above have {', '.join(names)}" if names else "rows with other weights were not run (`--all`)"


def pictured(found: Mapping) -> list[str]:
    """The rows whose first runs are drawn, at most eight: the first in all pictures, the others in the curves."""
    runs = [name for name, row in found["rows"].items() if "run" in row]
    return sorted(runs, key=lambda name: name != "learned")[:8]


TEMPLATE = """\
# Does sharing help, does routing help, and what does each cost?

Written by `baselines.py` from `comparison.json`: {what}. {machine}; {minutes:.0f} minutes of training in all runs,
each with {threads}.{drawn}

## In short

{short}

## Model, and why

A hand-written EfficientNet-{variant} encoder, so that published weights load (here: {start}); a U-Net decoder for
masks; between them, on the deepest map, a layer of {experts} experts of which each position of the map uses {chosen},
chosen for each task by a router of its own, with noise in training and a loss against leaving experts unused; small
heads. Tokens are positions, not photographs: a photograph makes {decisions} routing decisions for each task. The
experts start at zero: at first the network is the shared one without them.

A *dense adapter* is one expert through which every position goes, as wide as the experts that a position meets (equal
cost) or as all of them (equal parameters); learned routers are the default model. Hard sharing against the network for
one task tells what sharing does; learned routers against the dense adapter of equal cost, what routing does; any other
pair differs in both.

## Data

{name}, tasks {tasks}, {size} px. Copies of one photograph are joined, photographs of one eye stay on one side of every
split, and training photographs of eyes in the test part are left out; the test part itself was not opened. Validation:
{folds}. Photographs carry some labels and not others; a task learns from those with its own.{leaky}

## Training and evaluation

AdamW, learning rate up to {lr:g}, batches of {batch}, at most {epochs} epochs; flips, turns, shifts, colours, blur. All
rows see the same photographs in the same order, changed in the same ways{unchanged}; a network for one task is given
those of each batch that carry its label, so that its norms take their statistics from fewer. In all rows
the checkpoint with the best mean of the metrics that count is
taken, on the validation photographs, which is optimistic; more so for networks for one task, whose only metric it is.
Intervals are 95 % over draws of eyes and seeds; differences are paired, eye by eye, and corrected for their number.
{failed}
## Scores

Mean ± standard deviation over seeds (95 % interval).

{results}

{comparison}## Differences

In brackets the 95 % interval, corrected for their number ({number}); p adjusted (Holm). Where none can be claimed:
what it would take to claim one as large with a chance of 80 %; "more seeds" where no number of photographs would do.
With fewer than {fewest} seeds a claim is about these networks, not about the ways they were trained.

{differences}

## Costs

Training times with {threads} a run, answers with {threads_here}; runs may have shared the machine, so that times are
less certain than counts. Memory is the most that a process held until it was trained.{unlike}

{costs}

## Generalization

By how much the metric that counts differs on training photographs from validation ones (less than from photographs that
chose no checkpoint), and by how much fixed changes of the validation photographs change it.

{generalization}

## Trade-offs

{follows}

{pictures}## What multi-task learning is

A convolutional network that grades a photograph has an encoder, which turns pixels into features, and a head, which
turns features into an answer. Nothing in the encoder belongs to grading alone: vessels, spots and the disc serve
whoever asks. Multi-task learning trains one encoder with several heads on the sum of their losses (Caruana 1997,
Machine Learning 28:41). That is *hard sharing*: the tasks have all weights of the encoder in common. In *soft sharing*
each has weights of its own that are tied to those of the others, or draws on common parts to a degree that is learned.

**Why it can help.** Each task is evidence about which features are worth having. Masks tell the encoder where lesions
are, pixel by pixel; a grade, which says only that there are some, would need many photographs to tell as much. And a
network that must serve both has fewer ways to fit either by accident (Generalization: training minus validation).
{help}

**Why it can harm.** One step serves all tasks. Where the gradient of one task points against that of another, what
helps one costs the other ("negative transfer"); a cosine below zero says so (Yu et al. 2020, arXiv 2001.06782).
{cosines}

**Balance.** Losses differ in size and in pace (the curves), and the sum follows the largest gradient. Weights by hand,
or learned from each task's uncertainty (Kendall et al. 2018, arXiv 1705.07115), shift the compromise; {weights_rows}.

**Conditional computation.** Tasks that disagree may use different weights for different inputs: a router sends each
position of the deepest map to {chosen} of {experts} small networks, the experts (Shazeer et al. 2017, arXiv
1701.06538), and each task has a router of its own (Ma et al. 2018, KDD). Parameters grow with the number of experts,
computation hardly does (Costs). Whether that is more than the extra layer alone would do, only controls can tell: an
adapter of equal cost or of equal parameters, frozen random routers, all experts averaged. {routing}

## Limits

* {seeds}
* Checkpoints were chosen on the photographs that they are scored on.
* The encoder started from {start}.
* Research use only, no medical device.
"""
CAPTIONS = {
    "comparison": "The metrics that count: mean over seeds, single seeds, 95 % of draws of eyes and seeds.",
    "overlays": "The first run of \"{first}\": best, median and worst validation photograph by lesion Dice.",
    "confusion": "Which classes the first run of \"{first}\" takes for which.",
    "routing": "Which experts the tokens of the first run of \"{first}\" are sent to.",
    "curves": "Losses and metrics over epochs, the first runs of: {drawn}."}
CREDIT = "*Photographs: IDRiD, (c) P. Porwal, S. Pachade, M. Kokare, CC BY 4.0; cropped, reduced, drawn upon.*\n\n"


def filled(report: str, width: int = 120) -> str:
    """The same with its paragraphs and lists wrapped; tables, headings and pictures stay."""
    out = []
    for paragraph in report.strip().split("\n\n"):
        if paragraph.startswith(("|", "#", "!")):
            out.append(paragraph)
            continue
        listed = paragraph.startswith("* ")
        out.append("\n".join(textwrap.fill(part, width, subsequent_indent="  " * listed, break_long_words=False,
                                           break_on_hyphens=False)
                             for part in (paragraph.split("\n") if listed else [paragraph])))
    return "\n\n".join(out) + "\n"


def threads_words(numbers: Sequence[int]) -> str:
    """"2 threads"."""
    return f"{' or '.join(map(str, numbers))} thread{'s' * (numbers[-1] > 1)}"


def text(found: Mapping, pictures: Mapping[str, str]) -> str:
    """The whole report; `pictures`: name -> path, relative to where it will lie."""
    o = found["options"]
    drawn = [found["rows"][name]["words"] for name in pictured(found)]
    seeds = max((len(row["seeds"]) for row in found["rows"].values() if "costs" in row), default=0)

    def show(*names: str) -> str:
        return "".join(f"![{name}]({pictures[name]})\n\n*{CAPTIONS[name]}*\n\n".format(
            first=drawn[0], drawn=", ".join(drawn)) for name in names if name in pictures)

    failed = "".join(f"\n* failed: {job}: {why}" for job, why in found["failed"].items())
    return filled(TEMPLATE.format(
        **{k: o[k] for k in ("experts", "chosen", "size", "lr", "batch", "epochs")},
        start="random weights" if o["weights"] == "none" else f"weights {o['weights']}",
        short="\n".join(f"* {line}" for line in in_short(found)), what=found["what"],
        machine="; ".join(found["machine"]), minutes=found["seconds"] / 60, variant=o["variant"].upper(),
        drawn=" **These are drawings: nothing here is a result on IDRiD.**" if found["data"] is None else "",
        name="Drawn photographs" if found["data"] is None else
        "{} (the first photograph has {}x{} pixels)".format(found["data"], *found["pixels"]),
        threads=threads_words(found["threads"]), threads_here=threads_words([found["threads_here"]]),
        unlike=" Runs had different machines or numbers of threads: their times cannot be compared." * (
            len(found["threads"]) + len(found["machine"]) > 2), fewest=FEWEST_RUNS,
        tasks=" ".join(found["tasks"]), decisions=(o["size"] // 32) ** 2,
        folds="the part that the data set names itself"
        if found["own_validation"] else f"fold {', '.join(found['folds'])} of the training part",
        leaky=" The row without leak protection is split as if each file showed another eye, and compared with none."
        * ("leaky" in found["rows"]),
        unchanged=" (but for the rows without augmentation and without leak protection)" * (
            "plain" in found["rows"] or "leaky" in found["rows"]),
        failed=failed + "\n" * bool(failed), results="\n".join(results(found)), comparison=show("comparison"),
        differences="\n".join(differences(found)), number=len(found["differences"]),
        costs="\n".join(costs(found)), generalization="\n".join(generalization(found)),
        follows="\n".join(f"* {line}" for line in trade_offs(found)),
        pictures=show("overlays", "confusion", "routing", "curves") + CREDIT * (found["data"] == "IDRiD"),
        help=measured_here(found, "hard", ALONE),
        cosines=cosine_words(found), weights_rows=rows_of_weights(found),
        routing=measured_here(found, "learned", "dense"),
        seeds=f"{seeds} seed{'s' * (seeds != 1)} of each row at most: " + (
            f"differences are between these networks; to speak of ways of training, {FEWEST_RUNS} are needed."
            if seeds < FEWEST_RUNS else "differences are between ways of training, on these data.")))
