"""Two runs, or two arms of several runs, on the same photographs. Runs are those of evaluate.py."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from retina.evaluation import statistics
from retina.evaluation.scoring import SplitScores
from retina.evaluation.tables import table_of_differences
from retina.evaluation.task_metrics import ClassMetrics, Joint
from retina.files import InputError


def compare(first: Sequence[SplitScores], second: Sequence[SplitScores],
            resamples: int = statistics.RESAMPLES) -> dict[str, dict[str, dict]]:
    """{task: {measure: first, second, difference, interval, p from so many draws, standard_error, runs}} of two arms,

    each a run or as many runs of its kind; `runs`: their values, side by side. Their photographs are aligned. Nothing
    that was chosen on validation enters: thresholds are 0.5, temperatures 1.
    """
    found, exact = {}, [[s.metrics() for s in arm] for arm in (first, second)]
    for task in (t for t in first[0].scored() if t.name in second[0].stats):
        t = task.name
        arms, eyes = [[s.stats[t] for s in arm] for arm in (first, second)], first[0].eyes_of(t)
        drawn = [statistics.bootstrap([partial(task.compute, x, calibration={}) for x in arm], eyes, k)
                 for k, arm in enumerate(arms)]
        p = statistics.p_values([partial(task.compute, torch.cat(pair), calibration={}) for pair in zip(*arms)], eyes,
                                resamples)
        found[t] = {}
        for name in drawn[0]:
            runs = [[values[t][name] for values in arm] for arm in exact]
            one, other = (sum(arm) / len(arm) for arm in runs)
            gap = drawn[1][name] - drawn[0][name]
            known = gap[1:][~gap[1:].isnan()]
            found[t][name] = {"first": one, "second": other, "difference": other - one,
                              "interval": statistics.percentile_interval(gap[1:] - gap[0] + other - one), "p": p[name],
                              "standard_error": float(known.std()) if len(known) > 1 else math.nan, "runs": runs}
        if len(first) == 1 and isinstance(task, (ClassMetrics, Joint)):
            exact_test = statistics.mcnemar(*(task.right(arm[0]) for arm in arms))
            found[t]["accuracy"]["mcnemar"] = dict(zip(("only_first_right", "only_second_right", "p"), exact_test))
    return found


def claims(compared: Mapping[str, Mapping], scores: SplitScores, runs: int) -> list[str]:
    """A sentence on the primary metric of each task, p adjusted for the number of tasks (Holm)."""
    tasks = [t for t in scores.scored() if t.name in compared]
    rows = [compared[t.name][t.primary] for t in tasks]
    adjusted = statistics.holm([1.0 if math.isnan(row["p"]) else row["p"] for row in rows])
    return [statistics.claim(f"{t.name} {t.primary}", row["difference"], row["interval"],
                             math.nan if math.isnan(row["p"]) else p, len(scores.names[t.name]), runs)
            for t, row, p in zip(tasks, rows, adjusted)]


def arms_of(runs: Sequence) -> list[list[int]]:
    """Which runs count as one: those whose options differ in their seed alone. Two runs are two arms.

    InputError: more than two arms, or two that do not have as many runs.
    """
    if len(runs) == 2:
        return [[0], [1]]
    arms: dict[str, list[int]] = {}
    machine = ("seed", "workers", "device")
    for i, run in enumerate(runs):
        key = json.dumps({k: v for k, v in run.options.items() if k not in machine}, sort_keys=True)
        arms.setdefault(key, []).append(i)
    found = [sorted(arm, key=lambda i: runs[i].options["seed"]) for arm in arms.values()]
    for i, j in ((i, j) for arm in found for i, j in zip(arm, arm[1:])):
        if runs[i].options["seed"] == runs[j].options["seed"]:
            raise InputError(f"{runs[i].folder} and {runs[j].folder} have the same options and the same seed; expected "
                             "different seeds; leave one out")
    if len(found) > 2:
        one, *others = (runs[arm[0]].options for arm in found)
        differ = [k for k in one if any(o.get(k) != one[k] for o in others) and k not in machine]
        raise InputError(f"{len(runs)} runs of {len(found)} kinds, which differ in {', '.join(differ)}; expected two "
                         "runs, or runs of at most two kinds that differ in nothing but their seed")
    if len({len(arm) for arm in found}) > 1:
        raise InputError(f"{len(found[0])} runs against {len(found[1])}; expected as many on both sides")
    return found


def show_comparison(runs: Sequence[Sequence], scores: Sequence[Sequence[SplitScores]],
                    full: Sequence[Sequence[SplitScores | None]]) -> dict:
    """Print how two arms differ and what may be claimed; -> the same for JSON."""
    compared = compare(*scores)
    at = "training"
    if all(f for arm in full for f in arm):
        compared |= compare(*full)
        at = "the original files"
    elif len({run.options["image_size"] for arm in runs for run in arm}) > 1 and "seg" in compared:
        del compared["seg"]
        at = "different sizes: not compared"
    print("\nsecond less first, on the same photographs; temperature 1, masks at a threshold of 0.5, in pixels of "
          f"{at}:")
    print(table_of_differences(compared))
    sentences = claims(compared, scores[0][0], len(runs[0]))
    print("\n".join([f"p of these {len(sentences)} adjusted for their number (Holm):", *sentences]))
    first, second = ([str(r.folder) for r in arm] for arm in runs)
    return {"first": first, "second": second, "masks_in_pixels_of": at, "compared": compared, "claims": sentences}


def calibration_line(run) -> str:
    """Temperatures and thresholds in words."""
    found = (f"{task} " + " ".join(f"{k} {v:.3g}" for k, v in values.items())
             for task, values in run.calibration.items() if values)
    return f"temperatures and thresholds, chosen on validation: {'; '.join(found)}"
