"""What a run keeps on disk, and how it goes on from there.

    read_weights, start_from        pretrained weights
    generators, set_generators      everything random but the batches, which follow from seed and step
    begin, save, read_last, tidy    a run's folder

Whatever is read here runs no code; see load_tensors in files.py.
"""

import contextlib
import hashlib
import io
import json
import pickle
import random
import secrets
import shutil
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from files import InputError, hold, load_tensors, replacing, write_text
from model import Net, load_pretrained


# ---- pretrained weights ----

def reachable(url: str, seconds: float = 8) -> bool:
    """Whether `url` answers in time; in a thread, because a name server that is silent heeds no timeout."""
    answers = []

    def ask():
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.append(True)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def read_weights(weights: str, variant: str) -> Mapping[str, Tensor]:
    """Pretrained weights, a torchvision state dict, from torchvision ("imagenet") or from a file.

    InputError: they cannot be had (within 10 seconds) or the file holds no state dict.
    """
    if weights == "imagenet":
        found = torchvision.models.get_model_weights(f"efficientnet_{variant}").DEFAULT
        stored = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rsplit("/", 1)[-1]
        try:
            if not stored.exists() and not reachable(found.url):
                raise OSError(f"no answer from {found.url}")
            return found.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"--weights imagenet: cannot be downloaded ({error}); use --weights none, or --weights "
                             "FILE with a torchvision state dict") from error
    try:
        state = load_tensors(weights)
    except FileNotFoundError:
        raise InputError(f"--weights {weights}: no such file; expected none, imagenet, or a file with a torchvision "
                         "state dict") from None
    except InputError as error:
        raise InputError(f"--weights {error}; expected what torch.save(model.state_dict(), FILE) writes") from error
    except OSError as error:
        raise InputError(f"--weights {weights}: {error.strerror}; expected a file with a torchvision state "
                         "dict") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"a dictionary of {', '.join(map(str, list(state)[:4]))}" if isinstance(state, Mapping) else \
            type(state).__name__
        raise InputError(f"--weights {weights}: expected a dictionary of tensors, as torchvision saves it, found "
                         f"{found}")
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"--weights {weights}: {bad[0]} is not finite, and {len(bad) - 1} more; expected numbers")
    return state


def start_from(net: Net, weights: str, variant: str) -> None:
    """Load what --weights names into `net`. InputError: it cannot be had, or does not fit this variant."""
    if weights == "none":
        return
    state = read_weights(weights, variant)
    try:
        load_pretrained(net, state)
    except ValueError as error:
        raise InputError(f"--weights {weights}, --variant {variant}: {error}") from None


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
