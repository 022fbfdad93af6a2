"""The runs of a comparison, each in a process of its own.

    Job         one configuration with one seed on one fold, in a folder of its own; what is finished is not repeated
    run_all     until all are done, teachers before those whom they teach; one that fails does not stop the rest
    init_job   what the process of a job does first
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from retina import files
from retina.files import InputError


if TYPE_CHECKING:
    from train import Config


@dataclass(frozen=True, eq=False)
class Job:
    """One configuration with one seed on one fold."""
    configuration: str  # its name
    options: Config
    folder: Path
    photographs: list[str]  # fingerprints of those that it learns from and is scored on

    @property
    def words(self) -> str:
        """For messages."""
        return f"{self.configuration}, seed {self.options.seed}, fold {self.options.fold}"

    @property
    def errors(self) -> Path:
        """What its last process wrote to stderr; beside the folder, which is not there before the run begins."""
        return self.folder.with_name(f"{self.folder.name}.stderr")

    def measured(self) -> dict | None:
        """What the job left, if it has come to its end. InputError: of other photographs."""
        try:
            measured = files.load_tensors(self.folder / "measured.pt")
        except FileNotFoundError:
            return None
        if measured["photographs"] != self.photographs:
            raise InputError(f"{self.folder}: a run on other photographs or labels; expected the comparison that is "
                             "asked for; choose another --name")
        return measured

    def epochs(self) -> int:
        """How many are done."""
        log = self.folder / "log.jsonl"
        return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0

    def failure(self, status: int) -> str:
        """Why its process ended with this status, which is not 0."""
        if status < 0:
            return f"killed by {signal.Signals(-status).name}, perhaps for want of memory"
        stderr = self.errors.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line for line in stderr if line.startswith("error: ")] or [line for line in stderr if line]
        return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"


def start(job: Job, script: str, threads: int) -> subprocess.Popen:
    """Begin or go on with a job: `python SCRIPT --finish JOB`, the job as JSON.

    In a group of its own: the terminal's Ctrl-C reaches the main process alone, which hands it on, once.
    """
    job.errors.parent.mkdir(parents=True, exist_ok=True)
    what = json.dumps({**asdict(job), "threads": threads}, default=str)
    with open(job.errors, "wb") as errors:
        return subprocess.Popen([sys.executable, script, "--finish", what], stdin=subprocess.PIPE, stderr=errors,
                                start_new_session=True)


def init_job(threads: int) -> None:
    """In the process of a job: use so many threads, and end when the main process does, however it does."""
    def follow():
        os.read(0, 1)  # nobody writes into this pipe: its end is that of the main process
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)


def first_ready(waiting: Sequence[Job], running: Iterable[Job]) -> Job | None:
    """The first whose teachers have come to their end."""
    unfinished = {str(job.folder) for job in [*waiting, *running]}
    return next((job for job in waiting if not unfinished.intersection(job.options.teachers)), None)


def run_all(jobs: Sequence[Job], script: str, number: int) -> dict[str, str]:
    """Finish what is not finished, `number` jobs at a time; -> {words of a job: why it failed}.

    KeyboardInterrupt: running jobs have saved what they learned.
    """
    waiting, running, failed = [job for job in jobs if job.measured() is None], {}, {}
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
    threads, begun, before = max(1, torch.get_num_threads() // number), time.monotonic(), sum(j.epochs() for j in jobs)

    def left():  # epochs, at most
        return sum(max(0, job.options.epochs - job.epochs()) for job in [*waiting, *running])

    with tqdm(total=left(), unit="epoch", leave=False, desc=f"{len(waiting)} runs", disable=None) as bar:
        try:
            while waiting or running:
                while len(running) < number and (job := first_ready(waiting, running)):
                    waiting.remove(job)
                    running[job] = start(job, script, threads)
                time.sleep(0.5)
                trained = sum(job.epochs() for job in jobs) - before
                bar.update(trained - bar.n)
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    process = running.pop(job)
                    process.stdin.close()
                    if process.returncode:
                        failed[job.words] = job.failure(process.returncode)
                        bar.write(f"failed: {job.words}: {failed[job.words]}")
                        for student in [j for j in waiting if str(job.folder) in j.options.teachers]:
                            waiting.remove(student)
                            failed[student.words] = f"its teacher failed ({job.words})"
                    else:
                        job.errors.unlink(missing_ok=True)
                    minutes = (time.monotonic() - begun) / max(1, trained) * left() / 60
                    bar.write(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs: {job.words} after "
                              f"{job.epochs()} epochs" + f"; about {minutes:.0f} minutes left" * (left() > 0))
        except KeyboardInterrupt:
            for process in running.values():
                process.terminate()  # SIGTERM, which a job takes for Ctrl-C
            for process in running.values():
                process.wait()
            raise
    return failed
