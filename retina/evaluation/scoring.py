"""What one pass over a split leaves, and the measures of one run or several with their intervals (statistics.py)."""

import csv
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from retina.evaluation import statistics
from retina.evaluation.metrics import PRCurveAccumulator, range_of
from retina.evaluation.routing import per_token
from retina.evaluation.task_metrics import Joint, TaskMetrics
from retina.files import InputError, NotFiniteError
from retina.training.distributed import SINGLE_PROCESS, World


@dataclass
class SplitScores:
    """What one pass over a split leaves."""
    tasks: list[TaskMetrics]
    names: dict[str, list[str]] = field(default_factory=dict)  # task -> its labelled photographs
    stats: dict[str, Tensor] = field(default_factory=dict)  # task -> (n, ...), see TaskMetrics.image_stats
    losses: dict[str, float] = field(default_factory=dict)  # task -> mean loss
    # task -> (E,) share of its "tokens" and mean "weight" of each expert
    usage: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    accumulators: dict[str, PRCurveAccumulator | None] = field(default_factory=dict)  # see TaskMetrics.accumulator
    eyes: dict[str, str] = field(default_factory=dict)  # photograph -> its eye
    # task -> photographs for which the network's output is not finite; such a task has no scores
    not_finite: dict[str, list[str]] = field(default_factory=dict)

    def scored(self) -> list[TaskMetrics]:
        """The tasks of which something is labelled, and whether both grades are right where there are both."""
        joint = [Joint()] if "joint" in self.stats else []
        return [t for t in self.tasks if t.name in self.stats] + joint

    def metrics(self, calibration: Mapping[str, Mapping] = MappingProxyType({})) -> dict[str, dict]:
        """{task: {metric: value}}, each over all photographs of the split; `calibration` as `calibrate` gives it."""
        values = {}
        for task in self.scored():
            t = task.name
            loss = {"loss": self.losses[t]} if t in self.losses else {}
            values[t] = {"photographs": len(self.stats[t]), "eyes": len(set(self.eyes_of(t))), **loss,
                         **task.metrics(self.stats[t], calibration.get(t, {}), self.accumulators.get(t))}
        return values

    def describe_not_finite(self) -> str:
        """Which outputs are not finite, in words."""
        return "; ".join(f"the network's output for {t} is not finite on {len(names)} photographs (first: {names[0]})"
                         for t, names in self.not_finite.items())

    def eyes_of(self, task: str) -> list[str]:
        """The eye of each photograph of a task."""
        return [self.eyes[name] for name in self.names[task]]

    def calibrate(self) -> dict[str, dict[str, Any]]:
        """{task: what it fits on this split}: temperatures and thresholds."""
        return {t.name: t.calibrate(self.stats[t.name]) for t in self.tasks if t.name in self.stats}

    def join_grades(self) -> None:
        """Count the photographs with both labels, `cls` and `dme`, under the name of Joint."""
        both = [t for t in self.tasks if t.name in ("cls", "dme") and t.name in self.stats]
        if len(both) < 2:
            return
        right = [dict(zip(self.names[t.name], t.right(self.stats[t.name]).tolist())) for t in both]
        if names := [n for n in right[0] if n in right[1]]:
            self.names["joint"] = names
            self.stats["joint"] = torch.tensor([float(right[0][n] and right[1][n]) for n in names]).double()


@torch.inference_mode()
def evaluate_split(net: nn.Module, batches: Iterable, tasks: Sequence[TaskMetrics], progress: str = "",
                   world: World = SINGLE_PROCESS, strict: bool = True) -> SplitScores | None:
    """Run `net` over all photographs, in evaluation mode; a task sees those that carry its label.

    Each process of `world` is given every so many-th of the batches; the first gets the scores of all, the others None.
    NotFiniteError: outputs are not finite. Where this is not `strict`, the scores name them.
    """
    net.eval()
    device = next(net.parameters()).device
    accumulators, answers, eyes, not_finite = {t.name: t.accumulator() for t in tasks}, [], {}, {}
    for b in tqdm(batches, desc=progress, leave=False, disable=None if progress else True, unit="batch"):
        eyes |= zip(b.names, b.eyes)
        b = b.to(device)
        outputs, routing = net(b.images, b.indices, b.targets)
        answers.append({})
        for task in (t for t in tasks if t.name in outputs):
            t, output, target = task.name, outputs[task.name].float(), b.targets[task.name]
            names, loss = [b.names[i] for i in b.indices[t].tolist()], float(task.loss(output, target))
            finite = output.flatten(1).isfinite().all(1).tolist() if math.isfinite(loss) else [False] * len(names)
            if not all(finite):
                not_finite[t] = not_finite.get(t, []) + [n for n, ok in zip(names, finite) if not ok]
                continue
            answers[-1][t] = (names, task.image_stats(task.decode(output), target, accumulators[t]).cpu(), loss,
                              per_token(routing[t]).mean(1).cpu() if routing else None)  # (n, 2, E)
    gathered = world.gather((answers, accumulators, eyes, not_finite))
    scores = gathered and assemble(tasks, gathered)
    if strict and scores and scores.not_finite:
        raise NotFiniteError(f"{scores.describe_not_finite()}; train it again with a lower --lr")
    return scores


def assemble(tasks: Sequence[TaskMetrics],
             gathered: Sequence[tuple[list[dict], dict, dict[str, str], dict[str, list[str]]]]) -> SplitScores:
    """Scores of a split from batches, accumulators, eyes and photographs without a finite output of each process.

    The batches are those of one process in its order. One leaves of each task: names, statistics and mean loss of its
    labelled photographs, and their use of the experts.
    """
    _, accumulators, *_ = gathered[0]
    for _, more, *_ in gathered[1:]:
        for t, accumulator in accumulators.items():
            if accumulator is not None:
                accumulator.merge(more[t])
    in_turn = itertools.zip_longest(*(answers for answers, *_ in gathered))
    batches = [b for batch_of_each in in_turn for b in batch_of_each if b is not None]
    scores = SplitScores(list(tasks), accumulators=accumulators,
                         eyes={k: v for _, _, eyes, _ in gathered for k, v in eyes.items()})
    for *_, not_finite in gathered:
        for t, names in not_finite.items():
            scores.not_finite[t] = scores.not_finite.get(t, []) + names
    for t in (t for t in accumulators if t not in scores.not_finite):
        answered = [b[t] for b in batches if t in b]
        if not answered:
            continue
        names, stats, losses, usage = zip(*answered)
        scores.names[t] = list(itertools.chain(*names))
        scores.stats[t] = torch.cat(stats)
        scores.losses[t] = sum(len(batch) * loss for batch, loss in zip(names, losses)) / len(scores.names[t])
        if usage[0] is not None:
            scores.usage[t] = dict(zip(("tokens", "weight"), torch.cat(usage).mean(0).tolist()))
    scores.join_grades()
    return scores


def primary_score(values: Mapping[str, dict], tasks: Sequence[TaskMetrics]) -> float | None:
    """What checkpoints are chosen by: the mean over tasks of how far each one's primary metric is from worst to best.

    None: none of the tasks has one. InputError: one of these metrics has no value.
    """
    scores = [t.score(values[t.name]) for t in tasks if t.name in values]
    return sum(scores) / len(scores) if scores else None


def align(scores: Sequence[SplitScores]) -> None:
    """Bring the photographs of all into the order of the first. InputError: they are not the same."""
    for other in scores[1:]:
        for t in other.stats.keys() & scores[0].stats.keys():
            index = {name: i for i, name in enumerate(other.names[t])}
            if index.keys() != set(scores[0].names[t]):
                raise InputError(f"{t}: the runs were scored on different photographs; expected the same data set, "
                                 "fold and split")
            other.stats[t] = other.stats[t][[index[name] for name in scores[0].names[t]]]
            other.names[t] = scores[0].names[t]


def summary(scores: Sequence[SplitScores], calibration: Sequence[Mapping]) -> tuple[dict, dict]:
    """Metrics of one run, or their means over several, and {task: {measure: 95 % interval}}, see statistics.bootstrap.

    Of several runs also `seeds`, the values of each, and their standard deviations, `sd`.
    """
    runs = [s.metrics(c) for s, c in zip(scores, calibration)]
    values, limits = {}, {}
    for task in scores[0].scored():
        t = task.name
        values[t] = dict(runs[0][t])
        if len(runs) > 1:
            values[t].pop("confusion", None)
            seeds = {k: [run[t][k] for run in runs] for k, v in runs[0][t].items() if isinstance(v, float)}
            values[t] |= {k: sum(v) / len(v) for k, v in seeds.items()} | {
                "seeds": seeds, "sd": {k: float(torch.tensor(v, dtype=torch.float64).std()) for k, v in seeds.items()}}
        resampled = statistics.bootstrap([partial(task.compute, s.stats[t], calibration=c.get(t, {}))
                                          for s, c in zip(scores, calibration)], scores[0].eyes_of(t))
        limits[t] = {}
        for k, v in resampled.items():
            # a resample ranks pixels by the coarse levels of the statistics: its distance to their own value counts.
            # Resamples are worse calibrated than what they are drawn from: there it counts the other way (the basic
            # bootstrap interval: Davison & Hinkley 1997, section 5.2.1)
            distance = (v[1:] - v[0]) * (-1 if k.startswith("calibration_error") else 1)
            limits[t][k] = statistics.percentile_interval((values[t][k] + distance).clamp(*range_of(k)))
    return values, limits


def write_per_photograph(path: Path, scores: SplitScores, calibration: Mapping[str, Mapping]) -> None:
    """One row per photograph with every task's answer, as in predictions.csv, beside the truth."""
    rows: dict[str, dict] = {}
    for task in (t for t in scores.tasks if t.name in scores.stats):
        for name, stats in zip(scores.names[task.name], scores.stats[task.name]):
            rows.setdefault(name, {"photograph": name}).update(
                task.scored_columns(stats, calibration.get(task.name, {})))
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())
