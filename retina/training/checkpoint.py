"""What a run keeps on disk, and how it goes on from there.

    generators, set_generators      everything random but the batches, which follow from seed and step
    begin, save, read_last, tidy    a run's folder

Whatever is read here runs no code; see load_tensors in files.py.
"""

import hashlib
import io
import json
import os
import platform
import random
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.utils.deterministic

from retina.files import InputError, hold, load_tensors, replacing, write_text
from retina.training.distributed import Group


# ---- state ----

def weights_hash(net: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers: equal for equal weights."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def generators() -> dict:
    """The states of Python's, numpy's and torch's generators, as plain types and tensors."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state(),
            "cuda": cuda}


def set_generators(states: Mapping) -> None:
    """Go on as if nothing had been drawn since `generators` was called."""
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
    # which would by default also fill memory that is written over next: a tenth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = deterministic


def machine(device: torch.device, group: Group) -> dict:
    """What the last digits of a result depend on, beside the options."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "processes": group.size, "name": name, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "python": platform.python_version()}


# ---- a run's folder ----

def save(path: Path, state: Mapping) -> None:
    """Write a checkpoint, whole or not at all. OSError: the disk is full; the file that was there is still there."""
    memory = io.BytesIO()  # torch's own writer says nothing useful of a full disk
    torch.save(state, memory)
    with replacing(path) as file:
        file.write(memory.getbuffer())


def taken(folder: Path) -> InputError:
    """That there is a run in `folder` already."""
    return InputError(f"{folder}: exists already; choose another --name, go on with --resume {folder}, or replace it "
                      "with --overwrite")


def begin(folder: Path, config: Mapping, overwrite: bool) -> None:
    """Make a run's folder, which is there with its config.json or not at all. InputError: it is there already."""
    new, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{end}") for end in ("new", "old"))
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    try:
        write_text(new / "config.json", json.dumps(config, indent=1))
        if overwrite and folder.exists():
            with hold(folder):
                folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            raise taken(folder) from None
    finally:
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)


def read_last(folder: Path) -> tuple[dict, dict | None]:
    """A run's options, and all of last.pt; None where the run was stopped before it was first written.

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
            return json.loads((folder / name).read_text())["options"], None
        state = load_tensors(folder / name)
        return state["options"], {k: state[k] for k in ("data", "machine", "net", "trainer", "progress", "generators")}
    except InputError as error:
        best = f"python evaluate.py {folder} still scores its best.pt; " * (folder / "best.pt").is_file()
        raise InputError(f"--resume {error}; {best}--name {folder.name} --overwrite, with the flags of its "
                         "config.json, starts it again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--resume {folder}: its {name} was made by another version of this project "
                         f"({type(error).__name__}: {error}); train again") from None


def tidy(folder: Path, epochs: int) -> list[str]:
    """Remove what a killed process left half done, and lines of metrics.jsonl after `epochs`; -> those before."""
    for part in folder.glob("*.part"):
        part.unlink()
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()[:epochs] if log.exists() else []
    write_log(folder, lines)
    return lines


def write_log(folder: Path, lines: Sequence[str]) -> None:
    """All lines of metrics.jsonl: one valid JSON object each, whenever one looks."""
    write_text(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. InputError: there is none, or it is no such file."""
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise InputError(f"{path}: no such file; expected a folder made by train.py, such as runs/cls_seg_1") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); expected a line of JSON for each epoch; train again") from None
    if not lines:
        raise InputError(f"{path}: empty; expected a line for each epoch; wait for the end of the first one")
    for line in lines:
        if lost := [k for k in ("train", "val", "score", "expert_usage", "epoch") if k not in line]:
            raise InputError(f"{path}: made by another version of this project, it lacks {lost[0]!r}; train again")
    return lines
