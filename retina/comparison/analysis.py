"""From what the runs of baselines.py left to what may be said, in numbers.

    Measurements, measurements_of   the scores of a configuration: one for each seed, its folds concatenated
    constant                        what a guess scores that looks at no photograph
    differences                     each configuration against its controls
    summarize                       all numbers of the comparison, as plain types; report.py prints these alone

What may be claimed, statistics.adjust decides. The networks of one seed on several folds count as one run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch

from retina import files
from retina.evaluation import compare, scoring, statistics
from retina.evaluation.scoring import SplitScores
from retina.evaluation.task_metrics import TaskMetrics


if TYPE_CHECKING:
    from data import FundusDataset

SINGLE = "_single"  # how names of configurations end that are for one task
AGAINST = (f"{{task}}{SINGLE}", "dense")  # what most configurations are compared with


# ---- scores of a configuration ----

@dataclass
class Measurements:
    """A configuration: of each of its seeds the scores over all folds, and what else its runs left."""
    words: str
    seeds: list[int]
    scores: list[SplitScores]  # of validation, one for each seed
    # of each seed, {task: the primary metric minus that of validation}: of training photographs, of each shift
    gaps: list[Mapping[str, float]]
    shifts: list[Mapping[str, Mapping[str, float]]]
    costs: list[Mapping]
    epochs: list[int]  # of the checkpoints
    against: Sequence[str] = AGAINST  # names of configurations


def concat_folds(folds: Sequence[Mapping], tasks: Sequence[TaskMetrics]) -> SplitScores:
    """Scores of several folds, in each of which other photographs are scored, as those of one split."""
    scores = SplitScores([t for t in tasks if any(t.name in fold["stats"] for fold in folds)])
    for fold in folds:
        scores.eyes |= fold["eyes"]
    for t in dict.fromkeys(t for fold in folds for t in fold["stats"]):
        scored = [fold for fold in folds if t in fold["stats"]]
        scores.names[t] = [name for fold in scored for name in fold["names"][t]]
        scores.stats[t] = torch.cat([fold["stats"][t].double() for fold in scored])
        if all(t in fold["losses"] for fold in scored):
            scores.losses[t] = sum(len(fold["names"][t]) * fold["losses"][t] for fold in scored) / len(scores.names[t])
    return scores


def measurements_of(words: str, runs: Mapping[int, Sequence[Mapping]], tasks: Sequence[TaskMetrics],
                    against: Sequence[str] = AGAINST) -> Measurements:
    """`runs`: seed -> what the run of each fold left, see baselines.finish."""
    def minus_validation(folds, get):  # {task: mean over folds} of what `get` takes out of a run
        return {t: fmean(get(run)[t] - run["validation"][t] for run in folds) for t in get(folds[0])
                if all(not math.isnan(values.get(t, math.nan)) for run in folds
                       for values in (get(run), run["validation"]))}

    every = [run for folds in runs.values() for run in folds]
    return Measurements(
        words, list(runs), [concat_folds([run["scores"] for run in folds], tasks) for folds in runs.values()],
        [minus_validation(folds, lambda run: run["training"]) for folds in runs.values()],
        [{shift: minus_validation(folds, lambda run, shift=shift: run["shifts"][shift]) for shift in folds[0]["shifts"]}
         for folds in runs.values()], [run["costs"] for run in every], [run["epoch"] for run in every], against)


def constant(folds: Iterable[tuple[FundusDataset, FundusDataset]], tasks: Sequence[TaskMetrics]) -> Measurements:
    """Scores of a guess, from training and validation photographs of each fold."""
    scores = []
    for training, validation in folds:
        fold = {"names": {}, "stats": {}, "losses": {}, "eyes": {r.name: r.eye or r.name for r in validation.records}}
        for task in tasks:
            learned, scored = ([i for i, r in enumerate(split.records) if task.labelled(r)]
                               for split in (training, validation))
            answer = task.constant_guess(torch.stack([task.target(training[i]) for i in learned]))
            if answer is None:
                continue
            fold["names"][task.name] = [validation.records[i].name for i in scored]
            fold["stats"][task.name] = torch.cat([task.image_stats(answer, task.target(validation[i])[None])
                                                  for i in scored])
        scores.append(fold)
    return Measurements("constant guess", [0], [concat_folds(scores, tasks)], [], [], [], [], ())


# ---- differences ----

def pairs_of(configurations: Mapping[str, Measurements],
             tasks: Sequence[TaskMetrics]) -> list[tuple[TaskMetrics, str, str, list[int]]]:
    """(task, configuration, against which, seeds that both have) of each difference.

    One that was scored on other photographs is compared with none.
    """
    def names(configuration, task):
        return set(configurations[configuration].scores[0].names.get(task.name, []))

    pairs, controls = [], dict.fromkeys(control for c in configurations.values() for control in c.against)
    for task in tasks:
        for control in controls:
            against = control.format(task=task.name)
            for configuration in configurations:
                if control in configurations[configuration].against and against in configurations and \
                        against != configuration and names(configuration, task) == names(against, task) != set():
                    seeds = [s for s in configurations[against].seeds if s in configurations[configuration].seeds]
                    pairs += [(task, configuration, against, seeds)] * bool(seeds)
    return pairs


def differences(configurations: Mapping[str, Measurements], tasks: Sequence[TaskMetrics]) -> list[dict]:
    """Of the primary metric of each task, each configuration against those that it names.

    All of them are one family of comparisons; the more there are, the more permutations tell how small p is.
    """
    pairs, unadjusted = pairs_of(configurations, tasks), []
    for task, configuration, against, seeds in pairs:
        arms = [[only_task(configurations[c].scores[configurations[c].seeds.index(s)], task) for s in seeds]
                for c in (against, configuration)]
        scoring.align([s for arm in arms for s in arm])
        values = compare.compare(*arms, resamples=max(statistics.RESAMPLES, 40 * len(pairs)))[task.name][task.primary]
        unadjusted.append({"task": task.name, "metric": task.primary, "configuration": configuration,
                           "against": against, **values})
    return statistics.adjust(unadjusted)


def only_task(scores: SplitScores, task: TaskMetrics) -> SplitScores:
    """What of scores is of one task."""
    t = task.name
    return SplitScores([task], {t: list(scores.names[t])}, {t: scores.stats[t]}, eyes=scores.eyes)


# ---- all numbers ----

def mean_and_sd(values: Sequence[float]) -> dict:
    """Mean, standard deviation over seeds (None for one), and the values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": fmean(values), "sd": sd, "values": list(values)}


def configuration_numbers(configuration: Measurements) -> dict:
    """Metrics with mean, sd and interval; gaps to training photographs; what shifts change; costs."""
    values = [s.metrics() for s in configuration.scores]
    _, limits = scoring.summary(configuration.scores, [{}] * len(configuration.scores))
    content = {"words": configuration.words, "seeds": configuration.seeds, "epochs": configuration.epochs, "tasks": {}}
    for task in configuration.scores[0].scored():
        t = task.name
        numbers = {k: {**mean_and_sd([v[t][k] for v in values]), "interval": limits[t].get(k)}
                   for k, v in values[0][t].items() if isinstance(v, float)}
        content["tasks"][t] = {
            "photographs": values[0][t]["photographs"], "eyes": values[0][t]["eyes"], "primary": task.primary,
            "lower_is_better": task.best < task.worst, "metrics": numbers,
            "gap": mean_and_sd([g[t] for g in configuration.gaps])
            if configuration.gaps and t in configuration.gaps[0] else None,
            "shifts": {shift: mean_and_sd([s[shift][t] for s in configuration.shifts])
                       for shift, by_task in (configuration.shifts or [{}])[0].items() if t in by_task}}
    if configuration.costs:
        content["costs"] = {k: fmean(c[k] for c in configuration.costs) for k in configuration.costs[0]}
    return content


def summarize(configurations: Mapping[str, Measurements], tasks: Sequence[TaskMetrics], settings: Mapping) -> dict:
    """All numbers of the comparison, as plain types; of the tasks that any configuration has."""
    known = [t for t in tasks if any(t.name in c.scores[0].stats for c in configurations.values())]
    return files.jsonable({
        **settings, "tasks": [t.name for t in known],
        "seconds": sum(cost["seconds"] for c in configurations.values() for cost in c.costs),
        "configurations": {name: configuration_numbers(c) for name, c in configurations.items()},
        "differences": differences(configurations, known)})
