"""The runs of a comparison, each in a process of its own.

    Job         one row with one seed on one fold, in a folder of its own; what is finished is not repeated
    run_all     until all are done; one that fails does not stop the rest
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from retina import files
from retina.files import InputError, RunError
from retina.training import precision

if TYPE_CHECKING:
    from baselines import Row
    from train import Config


@dataclass(frozen=True, eq=False)
class Job:
    """One row with one seed on one fold."""
    row: Row
    options: Config
    folder: Path
    photographs: list[str]  # fingerprints of those that it learns from and is scored on

    @property
    def words(self) -> str:
        """For messages."""
        return f"{self.row.name}, seed {self.options.seed}, fold {self.options.fold}"

    def measured(self) -> dict | None:
        """What the job left, if it has come to its end. InputError: of other options or photographs."""
        try:
            found = files.load_tensors(self.folder / "measured.pt")
        except FileNotFoundError:
            return None
        if found["photographs"] != self.photographs:
            raise InputError(f"{self.folder}: a run on other photographs or labels; expected the comparison that is "
                             "asked for; choose another --name")
        return found

    def epochs(self) -> int:
        """How many are done."""
        log = self.folder / "metrics.jsonl"
        return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


def work(job: Job, finish: Callable[[Job], None], threads: int, told: multiprocessing.connection.Connection) -> None:
    """A job in a process of its own; what goes wrong is told in one line through a pipe."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal's Ctrl-C reaches the main process alone, which hands it on, once
    files.follow_parent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(threads)
    precision.keep_memory()
    try:
        finish(job)
    except (InputError, RunError, OSError) as error:
        told.send(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass
class Running:
    """A job in its process."""
    job: Job
    process: BaseProcess
    told: multiprocessing.connection.Connection
    epochs: int  # done when it was last looked at

    def failure(self) -> str:
        """Why it ended before its end, or ""."""
        code = self.process.exitcode
        if code == 0:
            return ""
        if self.told.poll():
            with contextlib.suppress(EOFError):
                return self.told.recv()
        return f"killed by {signal.Signals(-code).name}, perhaps for want of memory" if code < 0 else \
            f"ended with status {code}"


def start(job: Job, finish: Callable[[Job], None], threads: int) -> Running:
    """Begin or go on with a job."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, finish, threads, send))
    process.start()
    send.close()
    return Running(job, process, receive, job.epochs())


class Watch:
    """How far all jobs are, and how long they may still take."""

    def __init__(self, jobs: Sequence[Job]):
        self.left, self.trained = sum(max(0, job.options.epochs - job.epochs()) for job in jobs), 0  # epochs
        self.begun = time.monotonic()
        self.bar = tqdm(total=self.left, unit="epoch", leave=False, desc=f"{len(jobs)} runs", disable=None)

    def look(self, r: Running) -> None:
        """Count the epochs that a job has done since it was looked at last."""
        new = r.job.epochs() - r.epochs
        r.epochs, self.trained, self.left = r.epochs + new, self.trained + new, self.left - new
        self.bar.update(new)

    def ended(self, r: Running, done: int, number: int) -> None:
        """Say that a job has ended, and how much is left."""
        self.left -= max(0, r.job.options.epochs - r.epochs)  # stopped early, or failed
        minutes = (time.monotonic() - self.begun) / max(1, self.trained) * self.left / 60
        self.bar.write(f"{done} of {number} runs: {r.job.words} after {r.epochs} epochs" +
                       f"; about {minutes:.0f} minutes left" * (self.left > 0))


def run_all(jobs: Sequence[Job], finish: Callable[[Job], None], number: int) -> dict[str, str]:
    """Finish what is not finished, `number` jobs at a time; -> {words of a job: why it failed}.

    KeyboardInterrupt: running jobs have saved what they learned.
    """
    waiting, running, failed = [job for job in jobs if job.measured() is None], [], {}
    done, threads, watch = len(jobs) - len(waiting), max(1, torch.get_num_threads() // number), Watch(waiting)
    if done:
        print(f"{done} of {len(jobs)} runs are finished already")
    try:
        while waiting or running:
            while waiting and len(running) < number:
                running.append(start(waiting.pop(0), finish, threads))
            time.sleep(0.5)
            for r in list(running):
                alive = r.process.is_alive()
                watch.look(r)
                if alive:
                    continue
                running.remove(r)
                done += 1
                if reason := r.failure():
                    failed[r.job.words] = reason
                    watch.bar.write(f"failed: {r.job.words}: {reason}")
                watch.ended(r, done, len(jobs))
    except KeyboardInterrupt:
        for r in running:
            r.process.terminate()  # SIGTERM, which a job takes for Ctrl-C
        for r in running:
            r.process.join()
        raise
    finally:
        watch.bar.close()
    return failed
