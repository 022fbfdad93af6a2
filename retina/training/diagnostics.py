"""What training prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from retina.evaluation.task_metrics import TaskMetrics

if TYPE_CHECKING:
    from flags import Options


def epoch_line(epoch: int, options: Options, losses: Mapping, metrics: Mapping, tasks: Sequence[TaskMetrics],
               score: float, better: bool, seconds: float) -> str:
    """One line for one epoch."""
    parts = [f"epoch {epoch:3}/{options.epochs}  loss " + " ".join(f"{t} {losses[t]:.3f}" for t in losses)]
    for task in tasks:
        values = metrics[task.name]
        shown = dict.fromkeys((task.primary, *(["accuracy"] if "accuracy" in values else [])))
        parts.append(f"{task.name} " + " ".join(f"{k} {values[k]:.3f}" for k in shown))
    return " | ".join(parts) + f" | score {score:.3f}{'*' if better else ' '} {seconds:.0f} s"


def shown(values: Mapping) -> str:
    """{"a": 1} -> "a 1"."""
    return ", ".join(f"{k} {v}" for k, v in values.items())
