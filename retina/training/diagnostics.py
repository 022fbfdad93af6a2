"""What is watched during training: losses, whether they are finite, and time.

    LossMonitor                 losses and times of the current epoch; a loss or gradient that is not finite is an error
    gradient_cosines            whether tasks pull the encoder the same way
    describe_run, epoch_line    lines to print before training and after an epoch
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from retina.evaluation.tables import number_cell
from retina.evaluation.task_metrics import TaskMetrics
from retina.files import RunError
from retina.training.precision import fetch


if TYPE_CHECKING:
    from retina.training.distributed import World
    from train import Config


class LossMonitor:
    """Losses and times of the steps of an epoch.

    On a GPU losses are read one step later (`lag`), so that the step does not wait for them.
    """
    patience = 20  # steps in a row that fp16 may skip
    STATE = "losses", "cosines", "steps", "seconds", "waited", "skipped", "skipped_in_a_row"

    def __init__(self, net: nn.Module, scaler: torch.amp.GradScaler, device: torch.device, lr: float, per_epoch: int):
        self.net, self.scaler, self.device, self.lr = net, scaler, device, lr
        self.compare_every = max(1, per_epoch // 8)
        self.lag = int(device.type == "cuda")
        self.unread = deque()  # of each step: its number, names of its losses, a function that returns values and norm
        self.skipped = self.skipped_in_a_row = 0  # steps of the run that the scaler skipped
        self.comparing = 0.0  # seconds of this step spent on comparing gradients
        self.new_epoch()

    def new_epoch(self) -> None:
        """Forget the losses and times so far."""
        self.losses, self.cosines, self.steps = {}, {}, 0
        self.seconds, self.waited = 0.0, 0.0  # waited: for photographs

    def state_dict(self) -> dict[str, Any]:
        """The state of the current epoch, as numbers and lists."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Restore what state_dict returned. TypeError: other keys."""
        if stored.keys() != set(self.STATE):
            raise TypeError(f"kept: {', '.join(stored)}")
        vars(self).update(stored)

    def record(self, step: int, losses: Mapping[str, Tensor], norm: Tensor) -> dict[str, float]:
        """Record the losses and the gradient's norm of a step; -> the losses that were read. RunError: see `check`."""
        values = torch.stack([*(v.detach() for v in losses.values()), norm])
        self.unread.append((step, list(losses), fetch(values)))
        return self.read(self.lag)

    def read(self, lag: int = 0) -> dict[str, float]:
        """Read the losses of the step `lag` steps back, unless that was done already. RunError: see `check`."""
        if len(self.unread) <= lag:
            return {}
        step, names, values = self.unread.popleft()
        *values, norm = values()
        losses = dict(zip(names, values))
        self.check(step, losses, norm)
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        return losses

    def check(self, step: int, losses: Mapping[str, float], norm: float) -> None:
        """RunError: a loss or gradient is not finite, named with its task and the step.

        In fp16 a gradient may be too large for the format; the scaler then skips the step and scales less. Such steps
        are counted, and are an error only `patience` times in a row.
        """
        for name, value in losses.items():
            if not math.isfinite(value):
                raise RunError(f"the loss of {name} is {value} at step {step}; lower --lr (now {self.lr}) or look at "
                               "the labels of that task")
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
        elif self.scaler.is_enabled():
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.patience:
                raise RunError(f"the gradient is too large for fp16 at step {step}, for the {self.patience}th time in "
                               f"a row; lower --lr (now {self.lr}), or use a GPU that has bf16")
        else:
            names = [n for n, p in self.net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            tasks = dict.fromkeys(n.split(".")[1] for n in names if n.startswith("heads."))
            raise RunError(f"the gradient of {' '.join(tasks) or 'what the tasks share'} is not finite at step {step} "
                           f"(first in {names[0]}); lower --lr (now {self.lr}) or look at the labels")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for photographs."""
        begun = time.perf_counter()
        yield
        waited = time.perf_counter() - begun
        self.waited, self.seconds = self.waited + waited, self.seconds + waited

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count the time inside as a step, without comparisons of gradients."""
        begun, self.comparing = time.perf_counter(), 0.0
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun - self.comparing

    def compare_gradients(self, losses: Mapping[str, Tensor], encoder: nn.Module) -> None:
        """At eight steps of an epoch, record gradient_cosines; the time that this takes does not count."""
        self.steps += 1
        if (self.steps - 1) % self.compare_every or len(losses.keys() - {"balance"}) < 2:
            return
        if self.device.type == "cuda":  # the forward pass is no part of the comparison
            torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        for pair, cosine in gradient_cosines(losses, encoder).items():
            self.cosines.setdefault(pair, []).append(cosine)
        self.comparing = time.perf_counter() - begun

    def recent(self) -> dict[str, str]:
        """Mean losses of the last steps, for a progress bar."""
        return {name: f"{np.mean(values[-20:]):.3f}" for name, values in self.losses.items()}

    def means(self) -> dict[str, float]:
        """Mean losses of the epoch."""
        return {name: float(np.mean(values)) for name, values in self.losses.items()}


def gradient_cosines(losses: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, float]:
    """{"cls seg": cosine between the gradients of two tasks' losses on the encoder}; below 0 the tasks conflict.

    Yu et al. 2020, arXiv 2001.06782, definition 1. "cls teachers" is a part of the loss of cls.
    """
    shared, by_task = list(encoder.parameters()), {}
    for name, loss in losses.items():
        task = name.removesuffix(" teachers")
        by_task[task] = by_task[task] + loss if task in by_task else loss
    flat = {t: torch.cat([g.flatten() for g in torch.autograd.grad(
        loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)])
            for t, loss in by_task.items() if t != "balance"}
    return {f"{one} {other}": float(nn.functional.cosine_similarity(flat[one], flat[other], dim=0))
            for one, other in itertools.combinations(flat, 2)}


def describe_run(config: Config, folder: Path, world: World) -> str:
    """A line that says what is about to be trained."""
    experts = "no expert layer" if config.num_experts == 0 else (
        f"{config.num_experts} experts, top-k {config.top_k}, router {config.router}, ratio {config.expert_ratio:g}, "
        f"at the {config.moe_at}")
    return f"tasks {' '.join(config.tasks)}, {config.image_size} px, {experts}, " + \
        f"{world.size} processes, " * (world.size > 1) + f"run folder {folder}"


def epoch_line(epoch: int, epochs: int, losses: Mapping, metrics: Mapping, tasks: Sequence[TaskMetrics],
               score: float | None, better: bool, seconds: float) -> str:
    """A line about an epoch."""
    columns = [f"epoch {epoch:3}/{epochs}  loss " + " ".join(f"{t} {losses[t]:.3f}" for t in losses)]
    for task in (t for t in tasks if t.name in metrics):
        values = metrics[task.name]
        names = dict.fromkeys((task.primary, *(["accuracy"] if "accuracy" in values else [])))
        columns.append(f"{task.name} " + " ".join(f"{k} {number_cell(values[k])}" for k in names))
    return " | ".join(columns) + f" | score {number_cell(score)}{'*' if better else ' '} {seconds:.0f} s"
