"""What a finished run leaves for the comparison: scores here and on shifted photographs, and what it cost.

    SHIFTS, Shifted     photographs as another camera would have taken them
    measure             scores of validation; the metrics that count of training and shifted photographs; costs
    latencies           seconds for one photograph, of several networks that take turns
    finish              train a run to its end, then measure it: measured.pt
"""

import io
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import checkpoints
import data
import evaluate
import flags
import scores
import speed
import train
import visualize
from flags import Options, plain
from tasks import Task


# ---- photographs as another camera would have taken them ----

def compressed(x: Tensor, quality: int = 20) -> Tensor:
    """Through a JPEG file and back."""
    memory = io.BytesIO()
    v2.functional.to_pil_image(x).save(memory, "JPEG", quality=quality)
    return v2.functional.pil_to_tensor(Image.open(memory))


# of photographs (3, S, S) uint8
SHIFTS = {"darker": lambda x: v2.functional.adjust_brightness(x, 0.6),
          "blurred": lambda x: v2.functional.gaussian_blur(x, [9, 9], [x.shape[-1] / 170] * 2),
          "JPEG, quality 20": compressed,
          "colder light": lambda x: (x * torch.tensor([0.85, 1.0, 1.3]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8),
          "half the resolution": lambda x: v2.functional.resize(
              v2.functional.resize(x, [x.shape[-1] // 2] * 2), [x.shape[-1]] * 2)}


class Shifted(data.Photographs):
    """The same photographs and labels, changed in one fixed way."""

    def __init__(self, photographs: data.Photographs, shift: str):
        vars(self).update(vars(photographs))
        self.shift = shift

    def __getitem__(self, index: tuple[int, None]) -> data.Sample:
        sample = super().__getitem__(index)
        return replace(sample, image=SHIFTS[self.shift](sample.image))


# ---- costs ----

def multiply_adds(net: torch.nn.Module, size: int, device: torch.device) -> int:
    """Of one photograph for all tasks of the network."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    return counter.get_total_flops() // 2


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what rusage tells on Linux is no less than what the parent held at the start
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hardware(device: torch.device) -> str:
    """What a run is made on, in words."""
    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.*)", cpu.read_text()) if cpu.exists() else []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (models or [platform.machine()])[0]
    return f"{name}, torch {torch.__version__}"


def latencies(folders: Mapping[str, Path], device: torch.device, rounds: int = 15) -> dict[str, float]:
    """Seconds that each network needs for one photograph and all its tasks: medians of runs that take turns."""
    runs = {name: evaluate.load_run(folder, device) for name, folder in folders.items()}
    nets = {name: (speed.folded(run.net), run.options["size"]) for name, run in runs.items()}
    seconds = {name: [] for name in nets}
    with torch.inference_mode():
        for _ in range(rounds + 2):  # two to warm up
            for name, (net, size) in nets.items():
                begun = time.perf_counter()
                net(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


# ---- one run ----

def kept(found: scores.Scores) -> dict:
    """Scores as plain types and tensors; float32 holds counts of pixels exactly up to 16 million."""
    return {"names": found.names, "tallies": {t: x.float() for t, x in found.tallies.items()}, "losses": found.losses,
            "eyes": found.eyes}


def primaries(found: scores.Scores) -> dict[str, float]:
    """{task: the metric that counts}."""
    return {task.name: float(task.metrics(found.tallies[task.name])[task.primary]) for task in found.tasks
            if task.name in found.tallies}


def measure(folder: Path, device: torch.device) -> dict:
    """Of the chosen checkpoint: scores of validation, what counts of training and shifted photographs, costs."""
    run, log = evaluate.load_run(folder, device), visualize.read_log(folder)
    net, root = speed.folded(run.net), run.options["data"]
    root = None if root is None else Path(root)
    here, learned = (data.Photographs(evaluate.split_records(run, root, part), run.options["size"])
                     for part in ("val", "train"))

    def score(photographs):
        return scores.score(net, photographs, run.tasks, device, run.options["batch"])

    found = score(here)
    steps = log[-1]["step"]
    return {"scores": kept(found), "epoch": run.epoch, "training": primaries(score(learned)),
            "shifts": {shift: primaries(score(Shifted(here, shift))) for shift in SHIFTS},
            "plain": primaries(found), "threads": torch.get_num_threads(),
            "machine": hardware(device),
            "costs": {"parameters": sum(p.numel() for p in run.net.parameters()),
                      "multiply_adds": multiply_adds(net, run.options["size"], device),
                      # of a photograph of the batch, whether or not this network is given it: the same for all rows
                      "training_seconds": sum(line["seconds"] for line in log) / steps / run.options["batch"],
                      "seconds": sum(line["seconds"] for line in log)}}


def result_of(options: Options) -> dict:
    """The options on which a result hangs; see flags.MACHINE."""
    return {k: v for k, v in plain(options).items() if k not in flags.MACHINE}


def photographs_of(options: Options, tasks: list[Task]) -> list[str]:
    """Fingerprints of the photographs that a run with these options learns from and is scored on."""
    return [part.fingerprint() for part in train.load_photographs(options, tasks)[:2]]


def finish(options: Options, folder: Path, photographs: list[str]) -> None:
    """Train, from wherever the run in `folder` stands, and leave what was measured in measured.pt."""
    device = evaluate.pick_device(options.device)
    train.fit(options, folder, quiet=True, resume=(folder / "config.json").exists())
    peak = peak_bytes(device)  # before scoring
    found = measure(folder, device)
    found["costs"]["peak_bytes"] = peak
    checkpoints.save(folder / "measured.pt", {"options": result_of(options), "photographs": photographs, **found})
