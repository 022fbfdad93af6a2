"""From what the runs of baselines.py left to what may be said, in numbers.

    Measured, gather      the scores of a row: one for each seed, its folds put together
    constant              what a guess scores that looks at no photograph
    differences           each row against the single task and against the dense adapter, corrected for their number
    compared              all numbers of the comparison, as plain types; what is told is made of these alone (report.py)

A difference is claimed where its interval, corrected for the number of differences (Bonferroni), leaves out zero and p,
adjusted by Holm's method, is below 0.05. One seed a side tells nothing of how much seeds differ: then nothing is
claimed. The networks of one seed on several folds count as one run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

import numpy as np
import torch

from retina import files
from retina.evaluation import compare, scoring, statistics
from retina.evaluation.scoring import Scores
from retina.evaluation.task_metrics import TaskMetrics

if TYPE_CHECKING:
    from data import Photographs

# n photographs, m comparisons
LEVEL = 0.05
ALONE = "_alone"  # how names of rows end that are for one task


# ---- scores of a row ----

@dataclass
class Measured:
    """A row: of each of its seeds the scores over all folds, and what else its runs left."""
    words: str
    seeds: list[int]
    scores: list[Scores]  # of validation, one for each seed
    # of each seed, {task: how much more it is}: the metric that counts, of training photographs, of each shift
    gaps: list[Mapping[str, float]]
    shifts: list[Mapping[str, Mapping[str, float]]]
    costs: list[Mapping]
    epochs: list[int]  # that were chosen


def put_together(parts: Sequence[Mapping], tasks: Sequence[TaskMetrics]) -> Scores:
    """Scores of several folds, in each of which other photographs are scored, as those of one split."""
    found = Scores([t for t in tasks if any(t.name in part["tallies"] for part in parts)])
    for part in parts:
        found.eyes |= part["eyes"]
    for t in dict.fromkeys(t for part in parts for t in part["tallies"]):
        of = [part for part in parts if t in part["tallies"]]
        found.names[t] = [name for part in of for name in part["names"][t]]
        found.tallies[t] = torch.cat([part["tallies"][t].double() for part in of])
        if all(t in part["losses"] for part in of):
            found.losses[t] = sum(len(part["names"][t]) * part["losses"][t] for part in of) / len(found.names[t])
    return found


def gather(words: str, runs: Mapping[int, Sequence[Mapping]], tasks: Sequence[TaskMetrics]) -> Measured:
    """`runs`: seed -> what the run of each fold left, see baselines.finish."""
    def more(of_seed, get):  # mean over folds of what `get` takes out of a run, less the same of validation
        return {t: fmean(get(run)[t] - run["plain"][t] for run in of_seed) for t in get(of_seed[0])
                if all(t in of and not math.isnan(of[t]) for run in of_seed for of in (get(run), run["plain"]))}

    every = [run for of_seed in runs.values() for run in of_seed]
    return Measured(
        words, list(runs), [put_together([run["scores"] for run in of_seed], tasks) for of_seed in runs.values()],
        [more(of_seed, lambda run: run["training"]) for of_seed in runs.values()],
        [{shift: more(of_seed, lambda run, shift=shift: run["shifts"][shift]) for shift in of_seed[0]["shifts"]}
         for of_seed in runs.values()], [run["costs"] for run in every], [run["epoch"] for run in every])


def constant(folds: Iterable[tuple[Photographs, Photographs]], tasks: Sequence[TaskMetrics]) -> Measured:
    """Scores of a guess, from training and validation photographs of each fold."""
    parts = []
    for training, validation in folds:
        part = {"names": {}, "tallies": {}, "losses": {}, "eyes": {r.name: r.eye or r.name for r in validation.records}}
        for task in tasks:
            learned, of = ([i for i, r in enumerate(p.records) if task.labelled(r)] for p in (training, validation))
            answer = task.guess(torch.stack([task.target(training[i]) for i in learned]))
            if answer is None:
                continue
            part["names"][task.name] = [validation.records[i].name for i in of]
            part["tallies"][task.name] = torch.cat([task.tally(answer, task.target(validation[i])[None])
                                                    for i in of])
        parts.append(part)
    return Measured("constant guess", [0], [put_together(parts, tasks)], [], [], [], [])


# ---- differences ----

def pairs_of(rows: Mapping[str, Measured],
             tasks: Sequence[TaskMetrics]) -> list[tuple[TaskMetrics, str, str, list[int]]]:
    """(task, row, against which, seeds that both have) of each difference.

    A row that was scored on other photographs is compared with none, nor is the one without leak protection.
    """
    def names(row, task):
        return set(rows[row].scores[0].names.get(task.name, []))

    found = []
    for task in tasks:
        for against in (f"{task.name}{ALONE}", "dense"):
            for row in rows:
                skipped = row in ("constant", "leaky", against, f"{task.name}{ALONE}") or against not in rows
                if not skipped and names(row, task) == names(against, task) != set():
                    seeds = [s for s in rows[against].seeds if s in rows[row].seeds]
                    found += [(task, row, against, seeds)] * bool(seeds)
    return found


def differences(rows: Mapping[str, Measured], tasks: Sequence[TaskMetrics]) -> list[dict]:
    """Of the metric that counts of each task, each row against the single task and against the dense adapter.

    All of them are one family of comparisons; the more there are, the more draws tell how small p is.
    """
    pairs, found = pairs_of(rows, tasks), []
    for task, row, against, seeds in pairs:
        sides = [[alone(rows[r].scores[rows[r].seeds.index(s)], task) for s in seeds] for r in (against, row)]
        scoring.align([s for side in sides for s in side])
        values = compare.compare(*sides, draws=max(statistics.DRAWS, 40 * len(pairs)))[task.name][task.primary]
        eyes = len(set(sides[0][0].eyes_of(task.name)))
        error, of_seeds, degrees = sources(values["standard_error"], values.pop("runs"), eyes)
        found.append({"task": task.name, "metric": task.primary, "row": row, "against": against, "seeds": len(seeds),
                      "photographs": len(sides[0][0].names[task.name]), "eyes": eyes, **values,
                      "standard_error": error, "standard_error_of_seeds": of_seeds, "degrees_of_freedom": degrees})
    return corrected(found)


def sources(error: float, sides: Sequence[Sequence[float]], eyes: int) -> tuple[float, float, float]:
    """From the standard error of a difference of means over seeds, of draws of eyes and seeds: that for new seeds,

    the share of seeds in it, and its degrees of freedom (1e5: it is 0); nan where it is not defined. `sides`: the value
    of each seed of both. Draws of k seeds vary (k - 1) / k times as much as k new ones would (Davison & Hinkley 1997,
    section 2.2): that is taken out, and what new seeds would add comes in its place.
    Variances v of d degrees each, of the seeds of either side and of eyes, together have (Satterthwaite 1946,
    Biometrics Bulletin 2:110, eq. 17)

        degrees = (sum of v)^2 / sum of v^2 / d
    """
    if not math.isfinite(error):
        return math.nan, math.nan, math.nan
    drawn, parts = 0.0, []  # variance, degrees of freedom
    for values in (side for side in sides if len(side) > 1):
        parts.append((float(np.var(values, ddof=1)) / len(values), len(values) - 1))
        drawn += float(np.var(values)) / len(values)
    of_seeds = sum(v for v, _ in parts)
    parts.append((max(0.0, error ** 2 - drawn), eyes - 1))
    whole, below = sum(v for v, _ in parts), sum(v ** 2 / d for v, d in parts if d)
    return math.sqrt(whole), math.sqrt(of_seeds), whole ** 2 / below if below else 1e5


def alone(found: Scores, task: TaskMetrics) -> Scores:
    """What of scores is of one task."""
    t = task.name
    return Scores([task], {t: list(found.names[t])}, {t: found.tallies[t]}, eyes=found.eyes)


def corrected(found: list[dict]) -> list[dict]:
    """The same with what follows from their number: adjusted p, wider intervals, what may be claimed.

    The wider interval is difference -+ t standard errors, t the quantile of 1 - 0.05 / 2m: the percentiles that it
    stands for lie beyond what a thousand resamples tell. `needed`: photographs, with these seeds, for which a
    difference as large as the one seen would be claimed with a chance of 80 % (Cohen 1988, section 2.4). Photographs
    make smaller what eyes contribute to the error and not what seeds do:

        needed = n SE_eyes^2 / ((difference / (t + 0.84))^2 - SE_seeds^2)

    None where it is not defined, and where it is no more than there are: then p forbids the claim, not the interval.
    `wants`: "eyes" where a permutation test of so few cannot come to a p that is small enough, "seeds" where no number
    of photographs would do, or there is but one seed a side.
    """
    power = NormalDist().inv_cdf(0.8)
    adjusted = statistics.holm([1.0 if math.isnan(d["p"]) else d["p"] for d in found])
    for d, p in zip(found, adjusted):
        gap, error, of_seeds = d["difference"], d["standard_error"], d["standard_error_of_seeds"]
        known = math.isfinite(gap) and math.isfinite(error) and gap != 0 and error > 0
        t = math.nan if math.isnan(error) else \
            statistics.t_quantile(1 - LEVEL / 2 / len(found), d["degrees_of_freedom"])
        d["p_adjusted"], d["corrected_interval"] = p, [gap - t * error, gap + t * error]
        d["claimed"] = known and d["seeds"] > 1 and p < LEVEL and not gap - t * error <= 0 <= gap + t * error
        room = (gap / (t + power)) ** 2 - of_seeds ** 2 if known else math.nan
        needed = math.ceil(d["photographs"] * (error ** 2 - of_seeds ** 2) / room) if room > 0 else 0
        d["needed"] = needed if needed > d["photographs"] else None
        few_seeds = d["seeds"] < 2 or room <= 0
        d["wants"] = "eyes" if 2 * len(found) / 2 ** d["eyes"] >= LEVEL else "seeds" if few_seeds else None
    return found


# ---- all numbers ----

def spread(values: Sequence[float]) -> dict:
    """Mean, standard deviation over seeds (None for one), and the values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": fmean(values), "sd": sd, "values": list(values)}


def row_numbers(row: Measured) -> dict:
    """Metrics with mean, sd and interval; gaps to training photographs; what shifts change; costs."""
    values = [s.metrics() for s in row.scores]
    _, limits = scoring.summary(row.scores, [{}] * len(row.scores))
    found = {"words": row.words, "seeds": row.seeds, "epochs": row.epochs, "tasks": {}}
    for task in row.scores[0].scored():
        t = task.name
        numbers = {k: {**spread([v[t][k] for v in values]), "interval": limits[t].get(k)}
                   for k, v in values[0][t].items() if isinstance(v, float)}
        found["tasks"][t] = {
            "photographs": values[0][t]["photographs"], "eyes": values[0][t]["eyes"], "primary": task.primary,
            "lower_is_better": task.best < task.worst,
            "metrics": numbers, "gap": spread([g[t] for g in row.gaps]) if row.gaps and t in row.gaps[0] else None,
            "shifts": {shift: spread([s[shift][t] for s in row.shifts]) for shift, of in (row.shifts or [{}])[0].items()
                       if t in of}}
    if row.costs:
        found["costs"] = {k: fmean(c[k] for c in row.costs) for k in row.costs[0]}
    return found


def compared(rows: Mapping[str, Measured], tasks: Sequence[TaskMetrics], settings: Mapping) -> dict:
    """All numbers of the comparison, as plain types; of the tasks that any row has."""
    known = [t for t in tasks if any(t.name in row.scores[0].tallies for row in rows.values())]
    return files.plain({
        **settings, "tasks": [t.name for t in known],
        "seconds": sum(c["seconds"] for row in rows.values() for c in row.costs),
        "rows": {name: row_numbers(row) for name, row in rows.items()}, "differences": differences(rows, known)})
