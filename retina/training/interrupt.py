"""Ctrl-C, SIGTERM and failures: how a run ends, with one line of explanation."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retina.files import LOST_PIPE, InputError, RunError
from retina.training.distributed import SINGLE_PROCESS, World


if TYPE_CHECKING:
    from train import Config


class StopSignal:
    """The first Ctrl-C (or SIGTERM) ends training after the current step or scoring, a second one at once.

    Several processes receive it at different moments, so they end where they agree to. There a second Ctrl-C does
    nothing, since torchrun repeats the terminal's; SIGTERM ends them at once, since torchrun sends it after a process
    was lost.
    """

    def __init__(self, world: World = SINGLE_PROCESS):
        self.heard, self.agreed, self.due, self.world = False, False, False, world

    def __enter__(self) -> StopSignal:
        names = [signal.SIGINT] + [signal.SIGTERM] * (self.world.size == 1)
        self.before = {name: signal.signal(name, self.hear) for name in names}
        return self

    def __exit__(self, error_class, error, trace) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)
        # the loader's processes received it too, and ended
        if self.heard and isinstance(error, (RuntimeError, *LOST_PIPE)):
            raise KeyboardInterrupt from None

    def hear(self, *_) -> None:
        if self.heard and self.world.size == 1:
            raise KeyboardInterrupt
        self.heard = True

    def agree(self, device: torch.device, due: bool = False) -> bool:
        """Whether any process has received the signal; all get the same reply, and all must call this.

        They also agree whether a checkpoint is `due` in any of them.
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
    """Explain in one line what went wrong with a file, with memory or with a loader, and how to go on.

    KeyboardInterrupt carries the command that resumes the run, if it has begun.
    """
    failure = Failure()
    command = f"{' '.join(world.launcher())} train.py --resume {folder}"
    try:
        yield failure
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command if failure.begun else "") from None
    except InputError as error:
        raise InputError(f"{error}; then go on with: {command}" if failure.begun else str(error)) from None
    except (RuntimeError, MemoryError, *LOST_PIPE) as error:
        first = (str(error).splitlines() or [""])[0]
        # killed as it hands over a batch, and not yet known to be dead: torch lets the pipe's error through
        in_a_pipe = isinstance(error, LOST_PIPE) and config.workers > 0
        if in_a_pipe or "is killed by signal" in first or "exited unexpectedly" in first:
            raise RunError(f"a process that loads photographs was killed after step {failure.step}, perhaps for want "
                           f"of memory; try fewer --workers (now {config.workers}); go on with: {command} "
                           f"({first[:160]})") from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in first or \
                "can't allocate memory" in first:
            raise RunError(f"out of memory after step {failure.step} with --batch-size {config.batch_size} "
                           f"--image-size {config.image_size}; try --batch-size {max(2, config.batch_size // 2)} or a "
                           f"smaller --image-size; {folder} keeps what was saved before ({first[:100]})") from error
        raise


@contextlib.contextmanager
def stopped_by_sigterm(world: World) -> Iterator[None]:
    """SIGTERM, by which clusters end a job, is Ctrl-C; but not under torchrun, which ends the others by it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler if world.size == 1 else signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
