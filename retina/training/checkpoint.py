"""What a run stores on disk, and how it resumes.

    generators, set_generators                    all random states; batches need none, they follow from seed and step
    TrainState                                    all that a step changes, and how far a run has come
    create_run_folder, read_last, read_log        a run's folder
    RunFolder                                     the same during training: last.pt, best.pt, log.jsonl, result.json

Reading runs no code; see load_tensors in files.py.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
import os
import platform
import random
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.deterministic
from torch import nn
from tqdm import tqdm

from retina.evaluation import scoring
from retina.evaluation.scoring import SplitScores
from retina.evaluation.task_metrics import TaskMetrics
from retina.files import InputError, RunError, atomic_write, jsonable, load_tensors, lock_folder, write_text
from retina.training.diagnostics import LossMonitor, epoch_line
from retina.training.distributed import World


if TYPE_CHECKING:
    from data import Batch, FundusDataset

SAVE_SECONDS = 300  # between checkpoints within an epoch


# ---- state ----

def weights_hash(net: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers: equal for equal weights."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def generators() -> dict:
    """The states of Python's, numpy's and torch's generators, as tensors, numbers and lists."""
    algorithm, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "numpy": [algorithm, keys.tolist(), *rest], "torch": torch.get_rng_state(),
            "cuda": cuda}


def set_generators(states: Mapping) -> None:
    """Restore what `generators` returned."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def make_repeatable(seed: int, deterministic: bool) -> None:
    """Seed every generator; where operations are deterministic too, the same command gives the same weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:  # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # by default it also fills memory that is overwritten next, which takes a tenth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = deterministic


def machine(device: torch.device, world: World) -> dict:
    """What the last digits of a result depend on, apart from the options."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "processes": world.size, "name": name, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "python": platform.python_version()}


@dataclass
class TrainState:
    """All that a step changes, and how far a run has come."""
    net: nn.Module
    model: nn.Module  # what training calls: `net`, or a DistributedDataParallel around it
    loss_weights: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    monitor: LossMonitor  # of the current epoch
    step: int = 0  # steps done
    epoch: int = 0  # epochs trained and scored
    best: dict = field(default_factory=lambda: {"epoch": 0, "score": None, "loss": math.inf, "metrics": {}, "usage": {},
                                                "weights": ""})

    @property
    def device(self) -> torch.device:
        return self.monitor.device

    def end_epoch(self, score: float | None, metrics: Mapping, usage: Mapping) -> bool:
        """Count an epoch with these validation results; -> whether it is the best so far.

        The higher score is better, and of equal ones, or where there is none, the lower mean loss of the tasks. An
        epoch without `metrics` is never the best.
        """
        self.epoch += 1
        if not metrics:
            return False
        loss = fmean(values["loss"] for values in metrics.values() if "loss" in values)
        before = self.best["score"] or 0.0, -self.best["loss"]
        if self.best["epoch"] and not (score or 0.0, -loss) > before:
            return False
        self.best = {"epoch": self.epoch, "score": score, "loss": loss, "metrics": metrics, "usage": usage,
                     "weights": weights_hash(self.net)}
        return True

    STATEFUL = "loss_weights", "optimizer", "schedule", "scaler", "monitor"  # those with a state_dict, beside the net

    def state_dict(self) -> dict[str, Any]:
        """All of it but the network, as tensors, numbers and dictionaries."""
        return {name: getattr(self, name).state_dict() for name in self.STATEFUL} | {
            "step": self.step, "epoch": self.epoch, "best": self.best}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Restore what state_dict returned. KeyError: other keys."""
        if stored.keys() != self.state_dict().keys():
            raise KeyError(f"kept: {', '.join(stored)}")
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(stored[name])
        self.step, self.epoch, self.best = stored["step"], stored["epoch"], stored["best"]


# ---- a run's folder ----

def save(path: Path, state: Mapping) -> None:
    """Write a checkpoint, whole or not at all. OSError: the disk is full; the file that was there is still there."""
    memory = io.BytesIO()  # torch's own writer says nothing useful of a full disk
    torch.save(state, memory)
    with atomic_write(path) as file:
        file.write(memory.getbuffer())


def already_exists(folder: Path) -> InputError:
    """The error that `folder` holds a run already."""
    return InputError(f"{folder}: exists already; choose another --name, go on with --resume {folder}, or replace it "
                      "with --overwrite")


def create_run_folder(folder: Path, config: Mapping, overwrite: bool) -> None:
    """Make a run's folder together with its config.json. InputError: it exists already."""
    new, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{end}") for end in ("new", "old"))
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    try:
        write_text(new / "config.json", json.dumps(config, indent=1))
        if overwrite and folder.exists():
            with lock_folder(folder):
                folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            raise already_exists(folder) from None
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def read_last(folder: Path) -> tuple[dict, dict | None]:
    """A run's options and its last.pt; None if the run was stopped before last.pt was first written.

    InputError: no run; a checkpoint that is damaged, missing, or of another version.
    """
    if folder.is_file():
        raise InputError(f"--resume {folder}: a file; expected the run's folder, {folder.parent}")
    if not (folder / "config.json").is_file():
        raise InputError(f"--resume {folder}: no run there; expected a folder made by train.py, such as runs/cls_seg_1")
    name = "last.pt"
    try:
        if not (folder / name).exists():
            if (folder / "best.pt").exists():
                raise InputError(f"{folder}: its last.pt is gone")
            name = "config.json"
            return json.loads((folder / name).read_text(encoding="utf-8"))["options"], None
        state = load_tensors(folder / name)
        kept = {k: state[k] for k in ("data", "test", "seen", "machine", "teachers", "net", "state", "generators")}
        return state["options"], {**kept, "names": state["options"]["names"]}
    except InputError as error:
        best = f"python evaluate.py {folder} still scores its best.pt; " * (folder / "best.pt").is_file()
        raise InputError(f"--resume {error}; {best}--name {folder.name} --overwrite, with the flags of its "
                         "config.json, starts it again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--resume {folder}: its {name} was made by another version of this project "
                         f"({type(error).__name__}: {error}); train again") from None


def clean_up(folder: Path, epochs: int) -> list[str]:
    """Remove files that a killed process left, and lines of log.jsonl after `epochs`; -> the lines before."""
    for temporary in folder.glob("*.part"):
        temporary.unlink()
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()[:epochs] if log.exists() else []
    write_log(folder, lines)
    return lines


def write_log(folder: Path, lines: Sequence[str]) -> None:
    """Write all lines of log.jsonl anew, so that the file is valid at any time."""
    write_text(folder / "log.jsonl", "".join(f"{line}\n" for line in lines))


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl. InputError: there is none, or it is no such file."""
    path = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise InputError(f"{path}: no such file; expected a folder made by train.py, such as runs/cls_seg_1") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); expected a line of JSON for each epoch; train again") from None
    if not lines:
        raise InputError(f"{path}: empty; expected a line for each epoch; wait for the end of the first one")
    for line in lines:
        if lost := [k for k in ("train", "val", "score", "best", "expert_usage", "epoch") if k not in line]:
            raise InputError(f"{path}: made by another version of this project, it lacks {lost[0]!r}; train again")
    return lines


# ---- a run while it trains ----

class RunFolder:
    """A run's folder during training. Only the first of several processes writes; all must call the same methods.

    `sources` are "learned", hashes of the photographs that it learns from, and "teachers", of their weights.
    """

    def __init__(self, folder: Path, config: Mapping, state: TrainState, training: FundusDataset,
                 validation: FundusDataset, world: World, quiet: bool, sources: Mapping[str, list[str]]):
        self.folder, self.config, self.state, self.world, self.quiet = folder, config, state, world, quiet
        self.stored = {"options": config, "validation": [r.name for r in validation.records],
                       "data": [training.fingerprint(), validation.fingerprint()],
                       "machine": machine(state.device, world), **sources}
        self.lines, self.lock = [], None  # lines of log.jsonl; the folder's lock, until the process ends
        self.saved_at = time.monotonic()

    def open(self, saved: Mapping | None, findings: Mapping, resume: bool, overwrite: bool) -> None:
        """Begin the run, or resume from `saved`, its last.pt. InputError: it exists already; see `restore`."""
        self.stored |= {k: (saved or findings)[k] for k in ("test", "seen")}  # see data.load_datasets
        if saved is not None:
            self.restore(saved)
        elif self.world.rank == 0 and not resume:
            create_run_folder(self.folder, {
                "begun": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
                "command": shlex.join([*self.world.launcher(), Path(sys.argv[0]).name, *sys.argv[1:]]),
                "machine": self.stored["machine"], "options": self.config, **findings}, overwrite)
        if resume and not self.quiet:
            print(f"going on with {self.folder}" + ", from its beginning: it was stopped before its first checkpoint" *
                  (saved is None))
        if self.world.rank:  # other noise and dropout in each process
            seed = np.random.SeedSequence((self.config["seed"], self.world.rank)).generate_state(1)[0]
            torch.manual_seed(int(seed))

    def restore(self, saved: Mapping) -> None:
        """Resume from last.pt. InputError: other data, another device or number of processes."""
        if saved["data"] != self.stored["data"]:
            raise InputError(f"--resume {self.folder}: {self.config['data'] or 'the drawn photographs'}: other "
                             "photographs or labels than when the run was begun; expected the same; start a new run")
        if saved["teachers"] != self.stored["teachers"]:
            raise InputError(f"--resume {self.folder}: --teachers {' '.join(self.config['teachers'])}: other weights "
                             "than when the run was begun; expected the same; start a new run")
        if differ := [k for k, v in self.config["names"].items() if saved["names"].get(k) != v]:
            raise InputError(f"--resume {self.folder}: {self.config['data']}: other names of {' '.join(differ)} than "
                             "when the run was begun, perhaps in test photographs; expected the same; start a new run")
        begun, now = saved["machine"], self.stored["machine"]
        for what, flag in (("device", "--device"), ("processes", "--nproc_per_node")):
            if begun[what] != now[what]:
                raise InputError(f"{flag} {now[what]}: {self.folder} was begun with {begun[what]}; expected the same, "
                                 "or the result would be another")
        if begun != now and not self.quiet:
            machines = (", ".join(f"{k} {v}" for k, v in m.items()) for m in (begun, now))
            print("warning: begun with {}, now {}: the last digits of the result may be others".format(*machines))
        try:
            self.state.net.load_state_dict(saved["net"])
            self.state.load_state_dict(saved["state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--resume {self.folder}: its last.pt was made by another version of this project "
                             f"({type(error).__name__}); train again") from error
        if self.state.best["epoch"] and not (self.folder / "best.pt").exists():
            raise InputError(f"--resume {self.folder}: its best.pt is gone, of epoch {self.state.best['epoch']}; "
                             "expected it to stay; start a new run")

    def start(self, saved: Mapping | None) -> None:
        """Right before the first step: restore generators, lock the folder, write the first checkpoint."""
        if saved is not None:
            set_generators(saved["generators"][self.world.rank])
        if self.world.rank == 0:
            self.lock = lock_folder(self.folder)
            self.lines = clean_up(self.folder, self.state.epoch)
        if saved is None:
            self.save_last()
        elif not self.quiet and self.ended():
            print("it has come to its end already: nothing is left to train")

    def ended(self) -> bool:
        """Whether all epochs are done, or `patience` epochs in a row were no better."""
        epoch, patience = self.state.epoch, self.config["patience"]
        return epoch >= self.config["epochs"] or epoch - self.state.best["epoch"] >= patience

    def due(self) -> bool:
        """Whether it is time for another checkpoint."""
        return time.monotonic() - self.saved_at >= SAVE_SECONDS

    def save_last(self) -> None:
        """Write last.pt, all that the rest of the run depends on. RunError: the last step's loss is not finite."""
        self.state.monitor.read()
        random_states = self.world.gather(generators())
        if self.world.rank == 0:
            save(self.folder / "last.pt", {**self.stored, "net": self.state.net.state_dict(),
                                           "state": self.state.state_dict(), "generators": random_states})
        self.saved_at = time.monotonic()

    def save_best(self, calibration: Mapping) -> None:
        """Write best.pt, with temperatures and thresholds fitted on validation."""
        save(self.folder / "best.pt", {**self.stored, "net": self.state.net.state_dict(), "epoch": self.state.epoch,
                                       "calibration": calibration})

    def log(self, line: Mapping) -> None:
        """Add a line to log.jsonl."""
        self.lines.append(json.dumps(jsonable(line)))
        write_log(self.folder, self.lines)

    def progress(self, batches: Iterator[Batch], left: int, per_epoch: int) -> Iterator[Batch]:
        """The remaining batches of an epoch, with a progress bar; the monitor counts the time of waiting for them.

        If a batch cannot be loaded, the run is saved first; not so with several processes, since the others do not know
        of it.
        """
        monitor = self.state.monitor
        with tqdm(total=per_epoch, initial=per_epoch - left, unit="step", leave=False, disable=self.quiet or None,
                  desc=f"epoch {self.state.epoch + 1}/{self.config['epochs']}") as bar:
            while True:
                try:
                    with monitor.waiting():
                        batch = next(batches, None)
                except (InputError, RuntimeError, OSError):
                    if self.world.size == 1:
                        self.save_last()
                    raise
                if batch is None:
                    return
                yield batch
                bar.update()
                bar.set_postfix(monitor.recent(), refresh=False)

    def end_epoch(self, scores: SplitScores | None, tasks: Sequence[TaskMetrics], telling: Sequence[TaskMetrics],
                  photographs: int) -> None:
        """Count an epoch of so many photographs, save the network if it is the best, and write log.jsonl.

        The score is over the tasks that are `telling`, see TaskMetrics.tells_apart. An epoch with outputs that are not
        finite has no metrics.
        """
        state, monitor = self.state, self.state.monitor
        problem, metrics, usage = self.world.broadcast(scores and (
            scores.describe_not_finite(), {} if scores.not_finite else scores.metrics(), scores.usage))
        score, losses = scoring.primary_score(metrics, telling), monitor.means()
        better = state.end_epoch(score, metrics, usage)
        if better and self.world.rank == 0:
            self.save_best(scores.calibrate())
        line = {"epoch": state.epoch, "step": state.step, "train": losses, "val": metrics, "score": score,
                "best": better, "not_finite": problem, "expert_usage": usage,
                "lr": state.optimizer.param_groups[0]["lr"], "skipped_steps": monitor.skipped,
                "seconds": round(monitor.seconds, 3), "waiting": round(monitor.waited / monitor.seconds, 4),
                "images_per_second": round(photographs / monitor.seconds, 2)}
        if self.config["log_gradients"]:
            line["gradient_cosines"] = {pair: float(np.mean(v)) for pair, v in monitor.cosines.items()}
        message = epoch_line(state.epoch, self.config["epochs"], losses, metrics, tasks, score, better, monitor.seconds)
        if self.world.rank == 0:
            self.log(line)
        monitor.new_epoch()
        self.save_last()
        if not self.quiet:
            print(message + f"\nwarning: epoch {state.epoch}: {problem}; this epoch is not chosen" * bool(problem))
        if self.ended() and state.epoch < self.config["epochs"] and not self.quiet:
            print(f"no better epoch for {self.config['patience']} epochs: stopped early")

    def finish(self) -> dict:
        """Write result.json; -> what is in it. RunError: no epoch could be chosen."""
        state = self.state
        if not state.best["epoch"]:
            raise RunError(f"{self.folder}: in none of {state.epoch} epochs were all outputs on validation finite, so "
                           f"there is no checkpoint to choose; lower --lr (now {self.config['lr']})")
        weights = {"best.pt": state.best["weights"], "last.pt": weights_hash(state.net)}
        result = {**state.best, "weights": weights, "epochs": state.epoch, "steps": state.step,
                  "skipped_steps": state.monitor.skipped, "machine": self.stored["machine"]}
        if self.world.rank == 0:
            write_text(self.folder / "result.json", json.dumps(jsonable(result), indent=1))
        return result
