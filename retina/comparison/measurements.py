"""What a trained network is measured by beside its scores: shifted photographs, and costs.

    SHIFTS, Shifted     photographs as another camera would have taken them
    latencies           seconds for one photograph, of several networks that take turns
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
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from retina.datasets.preprocess import Sample


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


class Shifted(Dataset):
    """The same photographs and labels, changed in one fixed way."""

    def __init__(self, photographs: Dataset, shift: str):
        self.photographs, self.shift = photographs, shift

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, i: int) -> Sample:
        sample = self.photographs[i]
        return replace(sample, image=SHIFTS[self.shift](sample.image))


# ---- costs ----

def multiply_adds(net: torch.nn.Module, size: int, device: torch.device) -> int:
    """Of one photograph for all tasks of the network, with a sentence as long as that about a black one."""
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


def latencies(nets: Mapping[str, tuple[torch.nn.Module, int]], device: torch.device,
              rounds: int = 15) -> dict[str, float]:
    """Seconds that each network needs for one photograph and all its tasks: medians of runs that take turns.

    `nets`: name -> folded network, size of its photographs in pixels.
    """
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
