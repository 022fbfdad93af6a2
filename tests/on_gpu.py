"""What only a GPU can show: its tests, photographs a second, one training. At most five minutes on one GPU.

    python tests/on_gpu.py [--data PATH/TO/IDRiD] [--json FILE]
    python tests/on_gpu.py --dry     # the same on a CPU, with everything small: does it still run?
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train  # noqa: E402
from benchmark import TABLES, medians, show  # noqa: E402
from retina.datasets import readers  # noqa: E402
from retina.files import RunError, run_cli  # noqa: E402
from retina.training import precision  # noqa: E402
from tasks import build_net  # noqa: E402


NAMES = "cls", "dme", "seg", "loc"


def tests() -> bool:
    """AMP in both halves, resume, one process of DDP, the expert layer: everything marked gpu; -> did all pass?"""
    begun = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"],
                           cwd=ROOT, capture_output=True, text=True)
    last = (ended.stdout.strip().splitlines() or [ended.stderr])[-1]
    show("tests that want a GPU", [{"result": last, "seconds": time.perf_counter() - begun}])
    if ended.returncode:
        print(ended.stdout[-4000:], file=sys.stderr)
    return not ended.returncode


# ---- photographs a second ----

def random_batch(size: int, number: int, device: torch.device) -> data.Batch:
    """Photographs of noise, all with a grade and every second with masks, as in a batch of IDRiD."""
    everyone = torch.arange(number)
    indices = {t: everyone[::2] if t == "seg" else everyone for t in NAMES}
    targets = {"cls": torch.randint(0, 5, (number,)), "dme": torch.randint(0, 3, (number,)),
               "seg": (torch.rand(number, 5, size, size) > 0.95).to(torch.uint8)[::2], "loc": torch.rand(number, 6, 2)}
    images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)
    return data.Batch(images, targets, indices, [""] * number, [""] * number, torch.arange(number)).to(device)


def passes(module: nn.Module, inputs: Sequence, device: torch.device, dtype: str) -> Callable[[], None]:
    """Forward and backward through a part of the network, on what it was given in a step."""
    inputs = tree_map(lambda x: x.detach().requires_grad_() if isinstance(x, Tensor) else x, inputs)

    def both():
        with precision.autocast(device, dtype):
            outputs = module(*inputs)
        sum(x.float().sum() for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad).backward()
    return both


def waited_for(job: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The same, until the device is done with it."""
    def run():
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return run


def throughput(config: train.Config, sizes: Sequence[int], batches: Sequence[int], device: torch.device) -> None:
    """Training steps of noise, whole and in parts: encoder, experts, the decoder of the masks."""
    rows = []
    for size in sizes:
        for number in batches:
            try:
                rows.append({"pixels": size, "batch": number, **measure(config, size, number, device)})
            except torch.OutOfMemoryError:
                rows.append({"pixels": size, "batch": number, "photographs/s": "out of memory"})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    columns = list(max(rows, key=len))
    show(f"training, {config.encoder}, {config.precision}", [{c: row.get(c, "-") for c in columns} for row in rows])


def measure(config: train.Config, size: int, number: int, device: torch.device) -> dict[str, float]:
    """Photographs a second, memory, and how long the parts take, as shares of the step."""
    net, tasks = build_net(asdict(config))
    state = train.make_state(net, tasks, config, 1000, device)
    batch, inputs = random_batch(size, number, device), {}
    parts = {"encoder": net.encoder, "experts": net.experts, "decoder": net.heads["seg"]}
    hooks = [part.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given))
             for name, part in parts.items()]
    net.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train.train_step(state, batch, tasks, config)
    for hook in hooks:
        hook.remove()
    jobs = {"step": lambda: train.train_step(state, batch, tasks, config),
            **{name: passes(part, inputs[name], device, config.precision) for name, part in parts.items()}}
    seconds = medians({name: waited_for(job, device) for name, job in jobs.items()}, 5)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return {"photographs/s": number / seconds["step"], "GiB": peak,
            **{name: f"{seconds[name] / seconds['step']:.0%}" for name in parts}}


def augmentation(sizes: Sequence[int]) -> None:
    """Drawn photographs with masks and landmarks, changed by one thread, as a worker of a loader does."""
    rows = []
    for size in sizes:
        sample = data.FundusDataset(readers.read_drawn().records[:1], size)[0]
        seconds = medians({"augment": lambda sample=sample: [data.augment(sample, seed) for seed in range(4)]}, 3)
        rows.append({"pixels": size, "ms a photograph": 1000 * seconds["augment"] / 4})
    show("augmentation", rows)


# ---- one training ----

def training(flags: Sequence[str], seconds: float, home: Path) -> None:
    """train.py as a user would call it; after so many seconds it is stopped, and what it logged by then counts."""
    command = [sys.executable, "train.py", "--name", "run", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RETINA_HOME": str(home)})
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        time.sleep(20)  # it saves
    finally:
        process.kill()
    log = home / "runs" / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not lines:
        raise RunError(f"{' '.join(command)}: no epoch in {seconds:.0f} s")
    best = max(lines, key=lambda line: line["score"] or 0)
    kept: Mapping[str, Mapping] = {"cls": ("kappa", "accuracy"), "dme": ("accuracy",), "seg": ("dice", "aupr"),
                                   "loc": ("within_radius",)}
    show(" ".join(command[1:]), [{
        "epochs": len(lines), "seconds an epoch": sum(line["seconds"] for line in lines) / len(lines),
        "photographs/s": lines[-1]["images_per_second"], "waiting": f"{lines[-1]['waiting']:.1%}",
        "best epoch": best["epoch"], **{f"{t} {k}": best["val"][t][k] for t, ks in kept.items() for k in ks
                                        if isinstance(best["val"].get(t, {}).get(k), float)}}])


def main() -> None:
    """Everything, in this order; a table each, and one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="IDRiD's folder to train on (default: data/IDRiD if it exists, else drawings)")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "on_gpu.json",
                        help="file to write (default: runs/on_gpu.json)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, everything small")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry:
        raise RunError("torch finds no CUDA GPU; --dry runs everything small on the CPU")
    device = torch.device("cpu" if args.dry else "cuda")
    name = f"{torch.cuda.get_device_name() if not args.dry else 'dry run on a CPU'}, torch {torch.__version__}"
    print(name)
    found = readers.find_data(args.data)
    flags = ["--tasks", *NAMES, "--device", device.type, *(["--data", str(found)] if found else [])]
    passed = tests()
    config, notes = train.configure(flags)
    print("\n".join(notes))
    with tempfile.TemporaryDirectory() as home:
        throughput(config, (64,) if args.dry else (512, 1024), (2, 4) if args.dry else (8, 16, 32, 64), device)
        augmentation((64,) if args.dry else (512, 1024))
        small = ["--image-size", "64", "--epochs", "1"]
        training([*flags, *(small if args.dry else ["--image-size", "512", "--epochs", "16"])], 150, Path(home))
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps({"machine": name, **TABLES}, indent=1))
    print(f"\nwrote {args.json}")
    if not passed:
        raise RunError("tests that want a GPU failed, see above")


if __name__ == "__main__":
    run_cli(main)
