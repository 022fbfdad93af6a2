"""From what the runs of baselines.py left to what may be said, in numbers.

    Measurements, gather  the scores of a configuration: one for each seed, its folds put together
    constant              what a guess scores that looks at no photograph
    differences           each configuration against the single task and the dense adapter, corrected for their number
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
from retina.evaluation.scoring import SplitScores
from retina.evaluation.task_metrics import TaskMetrics


if TYPE_CHECKING:
    from data import FundusDataset

# n photographs, m comparisons
LEVEL = 0.05
SINGLE = "_single"  # how names of configurations end that are for one task


# ---- scores of a configuration ----

@dataclass
class Measurements:
    """A configuration: of each of its seeds the scores over all folds, and what else its runs left."""
    words: str
    seeds: list[int]
    scores: list[SplitScores]  # of validation, one for each seed
    # of each seed, {task: how much more it is}: the metric that counts, of training photographs, of each shift
    gaps: list[Mapping[str, float]]
    shifts: list[Mapping[str, Mapping[str, float]]]
    costs: list[Mapping]
    epochs: list[int]  # that were chosen


def put_together(parts: Sequence[Mapping], tasks: Sequence[TaskMetrics]) -> SplitScores:
    """Scores of several folds, in each of which other photographs are scored, as those of one split."""
    found = SplitScores([t for t in tasks if any(t.name in part["stats"] for part in parts)])
    for part in parts:
        found.eyes |= part["eyes"]
    for t in dict.fromkeys(t for part in parts for t in part["stats"]):
        of = [part for part in parts if t in part["stats"]]
        found.names[t] = [name for part in of for name in part["names"][t]]
        found.stats[t] = torch.cat([part["stats"][t].double() for part in of])
        if all(t in part["losses"] for part in of):
            found.losses[t] = sum(len(part["names"][t]) * part["losses"][t] for part in of) / len(found.names[t])
    return found


def gather(words: str, runs: Mapping[int, Sequence[Mapping]], tasks: Sequence[TaskMetrics]) -> Measurements:
    """`runs`: seed -> what the run of each fold left, see baselines.finish."""
    def more(of_seed, get):  # mean over folds of what `get` takes out of a run, less the same of validation
        return {t: fmean(get(run)[t] - run["validation"][t] for run in of_seed) for t in get(of_seed[0])
                if all(t in of and not math.isnan(of[t]) for run in of_seed for of in (get(run), run["validation"]))}

    every = [run for of_seed in runs.values() for run in of_seed]
    return Measurements(
        words, list(runs), [put_together([run["scores"] for run in of_seed], tasks) for of_seed in runs.values()],
        [more(of_seed, lambda run: run["training"]) for of_seed in runs.values()],
        [{shift: more(of_seed, lambda run, shift=shift: run["shifts"][shift]) for shift in of_seed[0]["shifts"]}
         for of_seed in runs.values()], [run["costs"] for run in every], [run["epoch"] for run in every])


def constant(folds: Iterable[tuple[FundusDataset, FundusDataset]], tasks: Sequence[TaskMetrics]) -> Measurements:
    """Scores of a guess, from training and validation photographs of each fold."""
    parts = []
    for training, validation in folds:
        part = {"names": {}, "stats": {}, "losses": {}, "eyes": {r.name: r.eye or r.name for r in validation.records}}
        for task in tasks:
            learned, of = ([i for i, r in enumerate(p.records) if task.labelled(r)] for p in (training, validation))
            answer = task.constant_guess(torch.stack([task.target(training[i]) for i in learned]))
            if answer is None:
                continue
            part["names"][task.name] = [validation.records[i].name for i in of]
            part["stats"][task.name] = torch.cat([task.image_stats(answer, task.target(validation[i])[None])
                                                  for i in of])
        parts.append(part)
    return Measurements("constant guess", [0], [put_together(parts, tasks)], [], [], [], [])


# ---- differences ----

def pairs_of(configurations: Mapping[str, Measurements],
             tasks: Sequence[TaskMetrics]) -> list[tuple[TaskMetrics, str, str, list[int]]]:
    """(task, configuration, against which, seeds that both have) of each difference.

    A configuration that was scored on other photographs is compared with none, nor is the one without leak protection.
    """
    def names(configuration, task):
        return set(configurations[configuration].scores[0].names.get(task.name, []))

    found = []
    for task in tasks:
        for against in (f"{task.name}{SINGLE}", "dense"):
            for configuration in configurations:
                skipped = configuration in ("constant", "leaky", against, f"{task.name}{SINGLE}") or \
                    against not in configurations
                if not skipped and names(configuration, task) == names(against, task) != set():
                    seeds = [s for s in configurations[against].seeds if s in configurations[configuration].seeds]
                    found += [(task, configuration, against, seeds)] * bool(seeds)
    return found


def differences(configurations: Mapping[str, Measurements], tasks: Sequence[TaskMetrics]) -> list[dict]:
    """Of the metric that counts of each task, each configuration against the single task and against the dense adapter.

    All of them are one family of comparisons; the more there are, the more draws tell how small p is.
    """
    pairs, found = pairs_of(configurations, tasks), []
    for task, configuration, against, seeds in pairs:
        arms = [[only_task(configurations[r].scores[configurations[r].seeds.index(s)], task) for s in seeds]
                for r in (against, configuration)]
        scoring.align([s for arm in arms for s in arm])
        values = compare.compare(*arms, resamples=max(statistics.RESAMPLES, 40 * len(pairs)))[task.name][task.primary]
        eyes = len(set(arms[0][0].eyes_of(task.name)))
        error, of_seeds, degrees = sources(values["standard_error"], values.pop("runs"), eyes)
        found.append({"task": task.name, "metric": task.primary, "configuration": configuration, "against": against,
                      "seeds": len(seeds), "photographs": len(arms[0][0].names[task.name]), "eyes": eyes, **values,
                      "standard_error": error, "standard_error_of_seeds": of_seeds, "degrees_of_freedom": degrees})
    return corrected(found)


def sources(error: float, arms: Sequence[Sequence[float]], eyes: int) -> tuple[float, float, float]:
    """From the standard error of a difference of means over seeds, of draws of eyes and seeds: that for new seeds,

    the share of seeds in it, and its degrees of freedom (1e5: it is 0); nan where it is not defined. `arms`: the value
    of each seed of both. Draws of k seeds vary (k - 1) / k times as much as k new ones would (Davison & Hinkley 1997,
    section 2.2): that is taken out, and what new seeds would add comes in its place.
    Variances v of d degrees each, of the seeds of either side and of eyes, together have (Satterthwaite 1946,
    Biometrics Bulletin 2:110, eq. 17)

        degrees = (sum of v)^2 / sum of v^2 / d
    """
    if not math.isfinite(error):
        return math.nan, math.nan, math.nan
    drawn, parts = 0.0, []  # variance, degrees of freedom
    for values in (arm for arm in arms if len(arm) > 1):
        parts.append((float(np.var(values, ddof=1)) / len(values), len(values) - 1))
        drawn += float(np.var(values)) / len(values)
    of_seeds = sum(v for v, _ in parts)
    parts.append((max(0.0, error ** 2 - drawn), eyes - 1))
    whole, below = sum(v for v, _ in parts), sum(v ** 2 / d for v, d in parts if d)
    return math.sqrt(whole), math.sqrt(of_seeds), whole ** 2 / below if below else 1e5


def only_task(found: SplitScores, task: TaskMetrics) -> SplitScores:
    """What of scores is of one task."""
    t = task.name
    return SplitScores([task], {t: list(found.names[t])}, {t: found.stats[t]}, eyes=found.eyes)


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

def mean_and_sd(values: Sequence[float]) -> dict:
    """Mean, standard deviation over seeds (None for one), and the values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": fmean(values), "sd": sd, "values": list(values)}


def configuration_numbers(configuration: Measurements) -> dict:
    """Metrics with mean, sd and interval; gaps to training photographs; what shifts change; costs."""
    values = [s.metrics() for s in configuration.scores]
    _, limits = scoring.summary(configuration.scores, [{}] * len(configuration.scores))
    found = {"words": configuration.words, "seeds": configuration.seeds, "epochs": configuration.epochs, "tasks": {}}
    for task in configuration.scores[0].scored():
        t = task.name
        numbers = {k: {**mean_and_sd([v[t][k] for v in values]), "interval": limits[t].get(k)}
                   for k, v in values[0][t].items() if isinstance(v, float)}
        found["tasks"][t] = {
            "photographs": values[0][t]["photographs"], "eyes": values[0][t]["eyes"], "primary": task.primary,
            "lower_is_better": task.best < task.worst, "metrics": numbers,
            "gap": mean_and_sd([g[t] for g in configuration.gaps])
            if configuration.gaps and t in configuration.gaps[0] else None,
            "shifts": {shift: mean_and_sd([s[shift][t] for s in configuration.shifts])
                       for shift, of in (configuration.shifts or [{}])[0].items() if t in of}}
    if configuration.costs:
        found["costs"] = {k: fmean(c[k] for c in configuration.costs) for k in configuration.costs[0]}
    return found


def compared(configurations: Mapping[str, Measurements], tasks: Sequence[TaskMetrics], settings: Mapping) -> dict:
    """All numbers of the comparison, as plain types; of the tasks that any configuration has."""
    known = [t for t in tasks if any(t.name in c.scores[0].stats for c in configurations.values())]
    return files.jsonable({
        **settings, "tasks": [t.name for t in known],
        "seconds": sum(cost["seconds"] for c in configurations.values() for cost in c.costs),
        "configurations": {name: configuration_numbers(c) for name, c in configurations.items()},
        "differences": differences(configurations, known)})
