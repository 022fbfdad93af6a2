"""Ctrl-C, SIGTERM, and what else ends a run, in one line."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retina.files import InputError, RunError
from retina.training.distributed import SINGLE_PROCESS, World


if TYPE_CHECKING:
    from train import Config


class StopSignal:
    """Ctrl-C (or SIGTERM) once ends after the step, or the scoring, that is under way; twice at once.

    Several processes hear it at different moments, so they end only where they agree on it. For them twice is once,
    since torchrun repeats what the terminal sends; and SIGTERM, by which it ends those that have lost another, ends at
    once.
    """

    def __init__(self, world: World = SINGLE_PROCESS):
        self.heard, self.agreed, self.due, self.world = False, False, False, world

    def __enter__(self) -> StopSignal:
        names = [signal.SIGINT] + [signal.SIGTERM] * (self.world.size == 1)
        self.before = {name: signal.signal(name, self.hear) for name in names}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)
        if self.heard and isinstance(error, RuntimeError):  # processes that load photographs heard it, too, and ended
            raise KeyboardInterrupt from None

    def hear(self, *_) -> None:
        if self.heard and self.world.size == 1:
            raise KeyboardInterrupt
        self.heard = True

    def agree(self, device: torch.device, due: bool = False) -> bool:
        """Whether any process has heard it, the same in all; every process must ask.

        Whether for any of them a checkpoint is `due` is agreed on with it.
        """
        heard, self.due = self.world.any((self.heard, due), device)
        self.agreed = self.agreed or heard
        return self.agreed


class Failure:
    """How far a run had come when something went wrong."""
    state, begun = None, False

    @property
    def step(self) -> int:
        return 0 if self.state is None else self.state.step


@contextlib.contextmanager
def explain_failures(folder: Path, config: Config, world: World) -> Iterator[Failure]:
    """Say in one line what has gone wrong with a file, with memory or with a loader, and how to go on.

    KeyboardInterrupt: with the command that goes on with the run, if it has begun.
    """
    at = Failure()
    command = f"{'python' if world.size == 1 else f'torchrun --nproc_per_node={world.size}'} train.py --resume {folder}"
    try:
        yield at
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command if at.begun else "") from None
    except InputError as error:
        raise InputError(f"{error}; then go on with: {command}" if at.begun else str(error)) from None
    except (RuntimeError, MemoryError) as error:
        first = (str(error).splitlines() or [""])[0]
        if "is killed by signal" in first or "exited unexpectedly" in first:
            raise RunError(f"a process that loads photographs was killed after step {at.step}, perhaps for want of "
                           f"memory; try fewer --workers (now {config.workers}); go on with: {command} "
                           f"({first[:160]})") from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in first or \
                "can't allocate memory" in first:
            raise RunError(f"out of memory after step {at.step} with --batch-size {config.batch_size} --image-size "
                           f"{config.image_size}; try --batch-size {max(2, config.batch_size // 2)} or a smaller "
                           f"--image-size; {folder} keeps what was saved before ({first[:100]})") from error
        raise


@contextlib.contextmanager
def stopped_by_sigterm(world: World) -> Iterator[None]:
    """SIGTERM, by which clusters end a job, is Ctrl-C; but not under torchrun, which ends the others by it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler if world.size == 1 else signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
