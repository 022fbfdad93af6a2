"""Two runs, or two arms of several runs, on the same photographs. Runs are those of evaluate.py."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from retina.evaluation import statistics
from retina.evaluation.metrics import range_of
from retina.evaluation.scoring import SplitScores
from retina.evaluation.tables import claim, table_of_differences
from retina.evaluation.task_metrics import ClassMetrics, Joint
from retina.files import InputError
from retina.training.config import OF_MACHINE


def compare(first: Sequence[SplitScores], second: Sequence[SplitScores],
            resamples: int = statistics.RESAMPLES) -> dict[str, dict[str, dict]]:
    """{task: {measure: its difference}} of two arms, each a run or as many runs of its kind, photographs aligned.

    A difference is what statistics.adjust takes: both values and those of each seed (`runs`), their difference, its
    interval, p from so many resamples, its standard error. Nothing that was calibrated on validation enters: thresholds
    are 0.5, temperatures 1.
    """
    compared, exact = {}, [[s.metrics() for s in arm] for arm in (first, second)]
    for task in (t for t in first[0].scored() if t.name in second[0].stats):
        t = task.name
        arms, eyes = [[s.stats[t] for s in arm] for arm in (first, second)], first[0].eyes_of(t)
        resampled = [statistics.bootstrap([partial(task.compute, x, calibration={}) for x in arm], eyes, k)
                     for k, arm in enumerate(arms)]
        p = statistics.p_values([partial(task.compute, torch.cat(pair), calibration={}) for pair in zip(*arms)], eyes,
                                resamples)
        compared[t] = {}
        for name in resampled[0]:
            runs = [[values[t][name] for values in arm] for arm in exact]
            one, other = (sum(arm) / len(arm) for arm in runs)
            low, high = range_of(name)
            gap = resampled[1][name] - resampled[0][name]
            defined = gap[1:][~gap[1:].isnan()]
            error, of_seeds, degrees = statistics.error_for_new_seeds(
                float(defined.std()) if len(defined) > 1 else math.nan, runs, len(set(eyes)))
            compared[t][name] = {
                "seeds": len(first), "photographs": len(eyes), "eyes": len(set(eyes)), "first": one, "second": other,
                "runs": runs, "difference": other - one, "interval": statistics.percentile_interval(
                    (gap[1:] - gap[0] + other - one).clamp(low - high, high - low)), "p": p[name],
                "standard_error": error, "standard_error_of_seeds": of_seeds, "degrees_of_freedom": degrees}
        if len(first) == 1 and isinstance(task, (ClassMetrics, Joint)):
            exact_test = statistics.mcnemar(*(task.right(arm[0]) for arm in arms))
            compared[t]["accuracy"]["mcnemar"] = dict(zip(("only_first_right", "only_second_right", "p"), exact_test))
    return compared


def claims(compared: Mapping[str, Mapping], scores: SplitScores) -> list[str]:
    """A sentence on the primary metric of each task, corrected for the number of tasks."""
    return [claim(d, "first", "second") for d in statistics.adjust(
        [compared[t.name][t.primary] | {"task": t.name, "metric": t.primary}
         for t in scores.scored() if t.name in compared])]


def arms_of(runs: Sequence) -> list[list[int]]:
    """Which runs count as one: those that differ in their seed alone, and in options of the machine. Two runs are two

    arms. InputError: more than two arms, or two that do not have as many runs.
    """
    if len(runs) == 2:
        return [[0], [1]]
    kinds = [{k: v for k, v in run.options.items() if k not in ("seed", *OF_MACHINE)} |
             {"training photographs": run.fingerprints["train"]} for run in runs]
    arms = [[i for i, kind in enumerate(kinds) if kind == first] for k, first in enumerate(kinds)
            if first not in kinds[:k]]
    arms = [sorted(arm, key=lambda i: runs[i].options["seed"]) for arm in arms]
    for i, j in ((i, j) for arm in arms for i, j in zip(arm, arm[1:])):
        if runs[i].options["seed"] == runs[j].options["seed"]:
            raise InputError(f"{runs[i].folder} and {runs[j].folder} have the same options and the same seed; expected "
                             "different seeds; leave one out")
    if len(arms) > 2:
        differ = [k for k, v in kinds[0].items() if any(kind.get(k) != v for kind in kinds)]
        raise InputError(f"{len(runs)} runs of {len(arms)} arms, which differ in {', '.join(differ)}; expected two "
                         "runs, or runs of at most two arms that differ in nothing but their seed")
    if len({len(arm) for arm in arms}) > 1:
        raise InputError(f"{len(arms[0])} runs against {len(arms[1])}; expected as many in both arms")
    return arms


def show_comparison(runs: Sequence[Sequence], scores: Sequence[Sequence[SplitScores]],
                    full: Sequence[Sequence[SplitScores | None]]) -> dict:
    """Print how two arms differ and what may be claimed; -> the same for JSON."""
    compared = compare(*scores)
    at = "training"
    if all(f for arm in full for f in arm):
        compared |= compare(*full)
        at = "the files" + ", each answered in tiles or not as it was trained" * (
            len({run.tiles for arm in runs for run in arm}) > 1)
    elif len({run.options["image_size"] for arm in runs for run in arm}) > 1 and "seg" in compared:
        del compared["seg"]
        at = "different sizes: not compared"
    print("\nsecond minus first, on the same photographs; temperature 1, masks at a threshold of 0.5, in pixels of "
          f"{at}:")
    print(table_of_differences(compared))
    sentences = claims(compared, scores[0][0])
    print("\n".join([f"intervals and p corrected for the number of these, {len(sentences)} (Bonferroni, Holm):",
                     *sentences]))
    first, second = ([str(r.folder) for r in arm] for arm in runs)
    return {"first": first, "second": second, "masks_in_pixels_of": at, "compared": compared, "claims": sentences}


def calibration_line(calibration: Mapping[str, Mapping]) -> str:
    """A run's temperatures and thresholds in words, and which of them were not fitted."""
    fitted = (f"{task} " + " ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "few")
              for task, values in calibration.items() if values)
    few = [f"{task} " + " ".join(f"{k} {n} of {least}" for k, (n, least) in values["few"].items())
           for task, values in calibration.items() if "few" in values]
    return "\n".join([f"temperatures and thresholds, calibrated on validation: {'; '.join(fitted) or 'none'}",
                      *[f"left as they were, of so many photographs that it takes: {'; '.join(few)}"] * bool(few)])
