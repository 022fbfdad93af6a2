"""What figures are made of: a run, its scores, its photographs; and lines over epochs.

A figure for which something is missing raises FigureUnavailable, which says what.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retina.datasets import preprocess
from retina.datasets.preprocess import Sample
from retina.drawing import COLOURS
from retina.evaluation import metrics, scoring
from retina.evaluation.scoring import SplitScores
from retina.evaluation.task_metrics import ClassMetrics, MaskMetrics, TaskMetrics
from retina.figures import charts
from retina.figures.charts import Axis, Chart, axis_of
from retina.inference import full_size


if TYPE_CHECKING:
    from data import Batch, FundusDataset
    from evaluate import Run
    from tasks import Task

PANEL, SMALLER = 320, 200  # pixels: sides of photographs
MOST = 400  # photographs of the split, and as many of training, that are looked at
MOST_SHOWN = 12  # rows and columns of a table


class FigureUnavailable(Exception):
    """Why a figure cannot be drawn of this run, in words."""


@dataclass
class FigureContext:
    """What figures are made of; all that takes time is done when it is first asked for, and once."""
    run: Run  # its network folded, see precision.py
    split: str  # "val" or "test"
    photographs: FundusDataset  # of that part
    training: FundusDataset  # at most MOST
    root: Path | None  # where they lie; None: drawn
    other: str  # what ends names of files, if the photographs are not the run's own; see evaluate.py
    cautions: Sequence[str]  # why scores may look better than they are, or are not the run's own
    device: torch.device
    batches: Callable[[Dataset, Sequence[Task]], Iterable[Batch]]  # of photographs, with the targets of tasks
    tasks: Mapping[str, Task]  # all that there are, by name
    logs: Mapping[str, Sequence[Mapping]]  # name of a run -> lines of its log.jsonl; the first is `run`
    perplexity: float | None = None  # of t-SNE; None: 30, or less for few photographs
    seed: int = 0  # of t-SNE

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.folder.resolve().name

    @property
    def words(self) -> str:
        """What the split is called."""
        return {"val": "validation", "test": "test"}[self.split]

    def passed(self, photographs: FundusDataset) -> tuple[SplitScores, Tensor]:
        """Scores, and the bottleneck of the encoder averaged over its positions, (n, C)."""
        pooled, net = [], self.run.net
        with net.encoder.register_forward_hook(lambda _, __, maps: pooled.append(maps[-1].mean((2, 3)).cpu())):
            scores = scoring.evaluate_split(net, self.batches(photographs, self.run.tasks), self.run.tasks,
                                            f"scoring {len(photographs)} photographs")
        return scores, torch.cat(pooled)

    @functools.cached_property
    def here(self) -> tuple[SplitScores, Tensor]:
        """Of the split."""
        return self.passed(self.photographs)

    @functools.cached_property
    def learned(self) -> tuple[SplitScores, Tensor]:
        """Of training photographs, as they are, without augmentation."""
        return self.passed(self.training)

    def having(self, types: type | tuple[type, ...], lack: str = "") -> list[TaskMetrics]:
        """Those of the run's tasks that are of these types and have a label in the split.

        FigureUnavailable: there are none; only where `lack` says what follows for a run without such a task.
        """
        tasks = [t for t in self.run.tasks if isinstance(t, types)]
        labelled = [t for t in tasks if t.name in self.here[0].stats]
        if labelled or not lack:
            return labelled
        raise FigureUnavailable(f"none of the {len(self.photographs)} {self.words} photographs has a label for "
                                f"{' or '.join(t.name for t in tasks)}" if tasks else
                                f"the run was trained for {' '.join(t.name for t in self.run.tasks)}, which {lack}")

    def first(self, type_: type) -> TaskMetrics | None:
        """The first of these, or None."""
        return next(iter(self.having(type_)), None)

    def stats(self, task: TaskMetrics) -> dict[str, Tensor]:
        """{photograph: statistics} of those with a label."""
        scores = self.here[0]
        return dict(zip(scores.names.get(task.name, ()), scores.stats.get(task.name, ())))

    def probabilities(self, task: ClassMetrics, p: Tensor) -> Tensor:
        """(n, C), temperature-scaled."""
        return metrics.at_temperature(p, self.run.calibration[task.name]["temperature"])

    @property
    def caution(self) -> str:
        """The cautions as sentences, to go on with."""
        return "".join(f" {words[0].upper()}{words[1:]}." for words in self.cautions)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Of photographs, by name."""
        return {r.name: i for i, r in enumerate(self.photographs.records)}

    def sample(self, name: str, size: int | None = None) -> Sample:
        """A photograph with its labels, in the size of training or in another."""
        if size is None:
            return self.photographs[self.numbers[name]]
        record = self.photographs.records[self.numbers[name]]
        return preprocess.to_sample(record, preprocess.preprocess(record, size, image_only=True))

    def answers(self, name: str) -> dict[str, Tensor]:
        """What the run says of a photograph: {task: decoded answer, one row}."""
        answers = full_size.predict_sample(self.run.net, self.run.tasks, self.sample(name).image, self.device)
        for task in (t for t in self.run.tasks if self.run.tiles and isinstance(t, MaskMetrics)):
            masks, _ = full_size.predict_masks(self.run.net, task, self.photographs.records[self.numbers[name]],
                                               self.photographs.size, self.run.tiles, self.device,
                                               self.run.options["batch_size"])
            answers[task.name] = torch.from_numpy(masks)
        return answers

    @functools.cached_property
    def masks(self) -> SplitScores:
        """Scores of the masks: as evaluate.py gives them, in pixels of the files where they are files."""
        return full_size.score_at_full_size(
            self.run.net, self.run.tasks, self.photographs.records, self.photographs.size, self.run.tiles, self.device,
            self.run.options["batch_size"]) or self.here[0]

    @property
    def masked(self) -> list[str]:
        """Names of photographs with masks, at most MOST."""
        return [r.name for r in self.photographs.records if r.masks is not None][:MOST]

    @functools.cached_property
    def example(self) -> str:
        """The photograph with most pixels of lesions, or the first."""
        return max(self.masked, key=lambda name: int((self.sample(name).masks[:-1] == 1).sum()),
                   default=self.photographs.records[0].name)


def best_median_worst(values: Mapping[str, float]) -> dict[str, str]:
    """{photograph: which of the three it is}, by a value of each, best first; fewer if there are fewer."""
    order = sorted(values, key=values.__getitem__)
    return {order[-1]: "best", order[len(order) // 2]: "median", order[0]: "worst"} if len(order) > 2 else \
        dict(zip(order[::-1], ("best", "worst")))


def of_run(ctx: FigureContext) -> str:
    """Which run, photographs and checkpoint a figure is about."""
    drawn = " DRAWN" * (ctx.root is None)
    return f"{ctx.name}, epoch {ctx.run.epoch}, {len(ctx.photographs)}{drawn} {ctx.words} photographs"


# ---- lines over epochs ----

def best_epoch_of(lines: Sequence[Mapping]) -> int | None:
    """The place of the epoch that training chose; None: it has not chosen one."""
    return max((i for i, line in enumerate(lines) if line["best"]), default=None)


@dataclass
class Line:
    """One line of a chart over epochs."""
    words: str  # for the legend
    values: list[float | None]  # of each epoch
    colour: Sequence[int]
    best: int | None = None  # the place of the epoch of best.pt, which gets a dot
    dashed: bool = False


def epochs_chart(ctx: FigureContext, title: str, words: str, lines: Sequence[Line], low: float | None = None,
                 high: float | None = None) -> Chart:
    """Lines over epochs, with a dot at that of best.pt."""
    last = max(2, *(len(log) for log in ctx.logs.values()))
    steps = tuple((v, f"{v:g}") for v in charts.round_steps(1, last) if 1 <= v == round(v) <= last)
    chart = Chart(title, Axis("epoch", 1, last, steps),
                  axis_of(words, (v for line in lines for v in line.values), low, high))
    for line in lines:
        chart.line(range(1, len(line.values) + 1), line.values, line.colour, dashed=line.dashed)
        if line.best is not None:
            chart.dots([line.best + 1], [line.values[line.best]], line.colour)
    return chart


def of_runs(ctx: FigureContext, get: Callable[[Mapping], float | None], dashed: bool = False) -> list[Line]:
    """A line for each run that has a value at all: what `get` takes out of each line of its log."""
    lines = [Line(name, [get(line) for line in log], colour, None if dashed else best_epoch_of(log), dashed)
             for (name, log), colour in zip(ctx.logs.items(), COLOURS)]
    return [line for line in lines if any(v is not None for v in line.values)]
