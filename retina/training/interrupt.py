"""Ctrl-C, SIGTERM, and what else ends a run, in one line."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retina.files import InputError, RunError
from retina.training.distributed import ALONE, Group

if TYPE_CHECKING:
    from flags import Options


class Interrupt:
    """Ctrl-C (or SIGTERM) once ends after the step, or the scoring, that is under way; twice at once.

    Several processes hear it at different moments, so they end only where they agree on it. For them twice is once,
    since torchrun repeats what the terminal sends; and SIGTERM, by which it ends those that have lost another, ends at
    once.
    """

    def __init__(self, group: Group = ALONE):
        self.heard, self.agreed, self.group = False, False, group

    def __enter__(self):
        names = [signal.SIGINT] + [signal.SIGTERM] * (self.group.size == 1)
        self.before = {name: signal.signal(name, self.hear) for name in names}
        return self

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def hear(self, *_):
        if self.heard and self.group.size == 1:
            raise KeyboardInterrupt
        self.heard = True

    def agree(self, device: torch.device) -> bool:
        """Whether any process has heard it, the same in all; every process must ask."""
        self.agreed = self.agreed or self.group.any(self.heard, device)
        return self.agreed


@contextlib.contextmanager
def in_words(folder: Path, options: Options, group: Group) -> Iterator[dict]:
    """Say in one line what has gone wrong with a file, with memory or with a loader, and how to go on.

    KeyboardInterrupt: with the command that goes on with the run, if it has begun.
    """
    where = {"trainer": None, "begun": False}
    command = f"{'python' if group.size == 1 else f'torchrun --nproc_per_node={group.size}'} train.py --resume {folder}"
    try:
        yield where
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command if where["begun"] else "") from None
    except InputError as error:
        raise InputError(f"{error}; then go on with: {command}" if where["begun"] else str(error)) from None
    except (RuntimeError, MemoryError) as error:
        first, step = (str(error).splitlines() or [""])[0], where["trainer"].number if where["trainer"] else 0
        if "is killed by signal" in first or "exited unexpectedly" in first:
            raise RunError(f"a process that loads photographs was killed after step {step}, perhaps for want of "
                           f"memory; try fewer --workers (now {options.workers}); go on with: {command} "
                           f"({first[:160]})") from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in first or \
                "can't allocate memory" in first:
            raise RunError(f"out of memory after step {step} with --batch {options.batch} --size {options.size}; try "
                           f"--batch {max(2, options.batch // 2)} or a smaller --size; {folder} keeps what was saved "
                           f"before ({first[:100]})") from error
        raise


@contextlib.contextmanager
def stopped_by_sigterm(group: Group) -> Iterator[None]:
    """SIGTERM, by which clusters end a job, is Ctrl-C; but not under torchrun, which ends the others by it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler if group.size == 1 else signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
