"""How fast is it, and by what? Medians of interleaved repetitions: whatever else the machine does slows all alike.

    python tests/benchmark.py [step | data | inference | experts | teachers | evaluation | scaling | eyes] [--quick]
        [--json FILE] [--data PATH]

Without a name it measures everything, with --quick the main things, once and in three minutes.
Each way of running the network is a process of its own, since how memory is kept belongs to a process; they take turns,
and each tells the most memory that it has held. "plain" is the same network as anyone would write it: eager, float32,
channels first. Where segmentation_models_pytorch is installed, its U-Net with the same encoder runs beside ours.
"""

import argparse
import atexit
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2


sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from conftest import save_palette_mask, vessel_drawings  # noqa: E402
from model import EOS, LONGEST, PAD, MoELayer, Net, NetConfig, load_balancing_loss  # noqa: E402
from retina.datasets import cache, descriptions, leaks, preprocess, readers, records, synthetic, vessels  # noqa: E402
from retina.datasets.masks import MaskFile  # noqa: E402
from retina.evaluation import scoring  # noqa: E402
from retina.files import RunError, run_cli  # noqa: E402
from retina.inference import full_size, predictor  # noqa: E402
from retina.training import precision  # noqa: E402
from retina.training.distillation import Teachers  # noqa: E402
from tasks import TASKS, build_net, make_tasks  # noqa: E402


CPU, SEG = torch.device("cpu"), TASKS["seg"]
LIBRARY = "segmentation_models_pytorch"
TABLES: dict[str, list] = {}  # title -> lines, for --json
QUICK = "--quick" in sys.argv  # once instead of again and again


def machine() -> str:
    """What was measured on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    half = ", bf16" * (precision.default_precision(CPU) == "bf16")
    return (f"{names[0] if names else platform.processor()}{half}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, Python {platform.python_version()}")


def medians(jobs: Mapping[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Seconds of each job; one after the other, again and again, after two rounds (--quick: one) that do not count."""
    times, (repetitions, first) = {name: [] for name in jobs}, (1, 1) if QUICK else (repetitions, 2)
    for i in range(first + repetitions):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            if i >= first:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(t) for name, t in times.items()}


def show(title: str, rows: Sequence[Mapping]) -> None:
    """Print a table of these rows, and keep them for --json."""
    TABLES[title] = list(rows)

    def cell(v):
        return f"{v:{'.0f' if v > 100 else '.3g'}}" if isinstance(v, float) else str(v)

    cells = [[*rows[0]], *(list(map(cell, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for first, *others in cells:
        print("  ".join([f"   {first.ljust(widths[0])}", *(c.rjust(w) for c, w in zip(others, widths[1:]))]))


# ---- ways of running the network, each in its own process ----

PLAIN, MEMORY, LAYOUT, BF16, DEPTHWISE, FUSED = "plain", "memory", "channels_last", "bf16", "depthwise", "fused"


def library(size: int, graded: int, masked: int) -> tuple[Callable, Callable]:
    """The U-Net of segmentation_models_pytorch with a linear layer for grades -> step, forward of one photograph."""
    import segmentation_models_pytorch
    net = segmentation_models_pytorch.Unet("efficientnet-b0", encoder_weights=None, classes=5).train()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 5))
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 1e-4)
    images, grades = torch.rand(graded + masked, 3, size, size), torch.randint(0, 5, (graded,))
    masks = (torch.rand(masked, 5, size, size) > 0.95).float()

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(net.encoder(images[:graded])[-1]), grades)
        logits = net(images[graded:])
        p = logits.sigmoid()
        dice = (2 * (p * masks).sum((0, 2, 3)) + 1) / ((p + masks).sum((0, 2, 3)) + 1)
        (loss + F.binary_cross_entropy_with_logits(logits, masks) + 1 - dice.mean()).backward()
        optimizer.step()

    def forward():
        with torch.inference_mode():
            net.eval()(images[:1])
    return step, forward


def build(speedups: Sequence[str], names: Sequence[str] = ("cls", "seg"), experts: int = 8) -> tuple[Net, list]:
    """A network made faster in these ways, and its tasks."""
    tasks = make_tasks(names, {"text": sorted(descriptions.GRAMMAR_WORDS)})
    net = Net(NetConfig(num_experts=experts), tasks)
    if MEMORY in speedups:
        precision.tune_malloc()
    if LAYOUT in speedups:
        net = precision.channels_last(net)
    if DEPTHWISE not in speedups:
        precision.DepthwiseConv.forward = nn.Conv2d.forward
    return precision.fuse_conv_bn(net) if FUSED in speedups else net, tasks


def train_step(net: Net, tasks: list, optimizer: torch.optim.Optimizer, dtype: str, batch: data.Batch) -> None:
    """One training step; `dtype` is one of precision.DTYPES."""
    net.train()
    optimizer.zero_grad()
    with precision.autocast(CPU, dtype):
        outputs, routing = net(batch.images, batch.indices, batch.targets)
    losses = [t.loss(outputs[t.name].float(), batch.targets[t.name]) for t in tasks if t.name in outputs]
    (sum(losses) + (0.01 * load_balancing_loss(routing) if routing else 0)).backward()
    optimizer.step()


def ours(size: int, graded: int, masked: int, speedups: Sequence[str], names: Sequence[str] = ("cls", "seg"),
         experts: int = 8) -> tuple[Callable, Callable]:
    """Our network -> step, forward of one photograph. The first `graded` photographs have all labels but masks."""
    net, tasks = build(speedups, names, experts)
    optimizer = None if FUSED in speedups else torch.optim.AdamW(net.parameters(), 1e-4, fused=PLAIN not in speedups)
    number = graded + masked
    images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)
    first, last = torch.arange(number)[:graded or number], torch.arange(number)[graded:]
    indices = {t: last if t == "seg" else first for t in names}
    targets = {"cls": torch.randint(0, 5, (number,)), "dme": torch.randint(0, 3, (number,)),
               "seg": (torch.rand(number, 5, size, size) > 0.95).to(torch.uint8), "loc": torch.rand(number, 6, 2),
               "text": F.pad(torch.randint(EOS, EOS + 44, (number, 18)), (0, LONGEST - 18), value=PAD)}
    batch = data.Batch(images, {t: targets[t][indices[t]] for t in names}, indices, [""] * number, [""] * number,
                       torch.arange(number))
    dtype = "bf16" if BF16 in speedups else "fp32"

    def step():
        train_step(net, tasks, optimizer, dtype, batch)

    def forward():
        with torch.inference_mode(), precision.autocast(CPU, dtype):
            net.eval()(images[:1])
    return step, forward


def as_published(photographs: Sequence[records.Record], size: int) -> data.Batch:
    """A batch as most code makes it: each file decoded whole, resized, and augmented on its own."""
    samples = []
    for r in photographs:
        with Image.open(r.image) as file:
            picture = file.convert("RGB").resize((size, size), Image.LANCZOS)
        sample = {"image": tv_tensors.Image(v2.functional.pil_to_tensor(picture))}
        if r.masks is not None:
            masks = torch.zeros(5, size, size, dtype=torch.uint8)
            for lesion, mask in r.masks.items():
                if mask is not None:
                    with Image.open(mask.path) as file:
                        small = file.convert("L").resize((size, size), Image.NEAREST)
                    masks[synthetic.LESIONS.index(lesion)] = torch.from_numpy(np.array(small) > 0)
            sample["masks"] = tv_tensors.Mask(masks)
        sample = data.AUGMENTATION(sample)
        labels = {k: x.as_subclass(Tensor) for k, x in sample.items()} | {"grade": r.grade or 0}
        samples.append(preprocess.Sample(r.name, labels.pop("image"), labels, None, r.eye))
    return data.collate(samples, make_tasks(["cls", "seg"]))


def trained(folder: str, size: int, speedups: Sequence[str], batch: int = 8) -> tuple[Callable, Callable]:
    """Steps over real files -> step with loading, loading alone; each photograph comes once, masks where there are."""
    photographs = [r for r in readers.read_data(Path(folder)).records if r.split == "train"]
    order = itertools.cycle(np.random.default_rng(0).permutation(len(photographs)).tolist())
    net, tasks = build(speedups)
    optimizer, dtype = torch.optim.AdamW(net.parameters(), 1e-4), "bf16" if BF16 in speedups else "fp32"
    dataset = None if PLAIN in speedups else data.FundusDataset(photographs, size)

    def load():
        indices = list(itertools.islice(order, batch))
        if PLAIN in speedups:
            return as_published([photographs[i] for i in indices], size)
        return data.collate([dataset[i, i, False] for i in indices], tasks)

    def step():
        train_step(net, tasks, optimizer, dtype, load())
    return step, load


def reading(number: int) -> tuple[Callable]:
    """Samples of a data set of so many photographs -> reading 200 of them."""
    place = Path(tempfile.mkdtemp(prefix="photographs_"))
    for i in range(number):
        if i < 20:
            Image.fromarray(synthetic.render(synthetic.plan(3, i), 128)[0]).save(place / f"{i}.jpg")
        else:
            os.link(place / f"{i % 20}.jpg", place / f"{i}.jpg")
    cache.CACHE = place / "cache"
    atexit.register(shutil.rmtree, place)
    dataset = data.FundusDataset([records.Record(str(i), place / f"{i}.jpg") for i in range(number)], 128)
    turn = itertools.count()

    def read():
        for _ in range(200):
            dataset[next(turn) * 7 % number]
    return read,


def most_memory() -> float:
    """The most memory that this process has held since it began, or since it was told to forget, in GiB."""
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "VmHWM: 0 kB"
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2 ** 20


def work(how: str) -> None:
    """One of the processes: for each line that comes, run once, answer with seconds and the peak of memory in GiB."""
    spec = json.loads(how)
    torch.manual_seed(0)
    jobs = {"library": library, "ours": ours, "trained": trained, "reading": reading}[spec.pop("kind")]
    job = jobs(**{k: v for k, v in spec.items() if k != "job"})[spec.get("job", 0)]
    for _ in sys.stdin:
        begun = time.perf_counter()
        job()
        seconds = time.perf_counter() - begun
        print(seconds, most_memory(), flush=True)


def race(ways: Mapping[str, Mapping], repetitions: int) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, peak GiB)} of ways that take turns; four rounds do not count, until memory is found."""
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True)) for name, spec in ways.items()}
        times, peaks, first = {name: [] for name in ways}, {}, 2 if QUICK else 4
        for i in range(first + (1 if QUICK else repetitions)):
            for name, process in processes.items():
                process.stdin.write("\n"), process.stdin.flush()
                answer = process.stdout.readline().split()
                if not answer:
                    raise RunError(f"{name}: its process ended, perhaps for want of memory ({len(ways)} hold theirs)")
                seconds, peaks[name] = map(float, answer)
                times[name] += [seconds] * (i >= first)
        for process in processes.values():
            process.stdin.close()
    return {name: (statistics.median(times[name]), peaks[name]) for name in ways}


def table(title: str, measured: Mapping[str, tuple[float, float]], photographs: int) -> None:
    """Milliseconds a photograph, times as fast as the plain run and the library, memory."""
    columns = {"x plain": measured.get("plain"), "x library": measured.get("library")}
    show(title, [{"": name, "ms a photograph": 1e3 * seconds / photographs,
                  **{c: base[0] / seconds for c, base in columns.items() if base}, "peak GiB": peak}
                 for name, (seconds, peak) in measured.items()])


FOUR = ["cls", "dme", "seg", "loc"]


def shared(title: str, how: Mapping, repetitions: int) -> None:
    """One network for four tasks against four networks, 256 px."""
    ways = {" ".join(names): {"kind": "ours", "names": names, "size": 256, **how}
            for names in [FOUR, *([t] for t in FOUR), [*FOUR, "text"]]}
    times = {name: seconds for name, (seconds, _) in race(ways, repetitions).items()}
    four_networks = sum(times[t] for t in FOUR)
    show(f"one network for four tasks, 256 px, {title}", [
        {"": name, "ms": 1e3 * seconds, "x four networks": seconds / four_networks} for name, seconds in times.items()])


# what train.py does on this machine
BEST = (MEMORY, LAYOUT, DEPTHWISE, *((BF16,) if precision.default_precision(CPU) == "bf16" else ()))


def step() -> None:
    """Training: forward, backward, optimizer."""
    for size, graded, masked, repetitions in ((256, 8, 8, 5), (512, 4, 4, 3)):
        ways = {"library": {"kind": "library"}} if importlib.util.find_spec(LIBRARY) else {}
        ways |= {"plain": {"speedups": [PLAIN]},
                 "+ freed memory kept": {"speedups": [MEMORY]},
                 "+ channels_last": {"speedups": [MEMORY, LAYOUT]},
                 "+ bf16": {"speedups": [MEMORY, LAYOUT, BF16]},
                 "+ own depthwise backward": {"speedups": BEST}}
        if QUICK or size > 256:  # all at 512 pixels at once would be 30 GiB
            ways = {name: ways[name] for name in ("library", "plain", "+ own depthwise backward") if name in ways}
        ways = {name: {"kind": "ours", "size": size, "graded": graded, "masked": masked} | spec
                for name, spec in ways.items()}
        table(f"training step, {size} px, {graded} graded and {masked} masked photographs", race(ways, repetitions),
              graded + masked)
    if not QUICK:
        shared("step of 8 photographs with all labels", {"graded": 0, "masked": 8, "speedups": BEST}, 5)


def inference() -> None:
    """One photograph through the network, and from its file to its pictures."""
    predicting()
    for size in (256, 512)[QUICK:]:
        ways = {"library": {"kind": "library"}} if importlib.util.find_spec(LIBRARY) else {}
        ways |= {"plain": {"speedups": [PLAIN]},
                 "+ freed memory kept": {"speedups": [MEMORY]},
                 "+ channels_last": {"speedups": [MEMORY, LAYOUT]},
                 "+ norms folded (as evaluate.py)": {"speedups": [MEMORY, LAYOUT, FUSED]},
                 "+ bf16 (with --precision bf16)": {"speedups": [MEMORY, LAYOUT, FUSED, BF16]}}
        ways = {name: {"kind": "ours", "size": size, "graded": 1, "masked": 1, "job": 1} | spec
                for name, spec in ways.items()}
        table(f"forward pass of one photograph, {size} px", race(ways, 20), 1)
    if not QUICK:
        shared("forward pass of one photograph",
               {"graded": 0, "masked": 1, "job": 1, "speedups": [MEMORY, LAYOUT, FUSED]}, 20)


def predicting() -> None:
    """Answers for photographs of 4288x2848: four tasks, tiles, pictures; one by stages, and twelve on all cores."""
    tasks, number = make_tasks(FOUR), 4 if QUICK else 12
    net = precision.fuse_conv_bn(Net(NetConfig("lite0"), tasks))
    with tempfile.TemporaryDirectory() as place:
        photographs = originals(Path(place), number)
        maps, _ = full_size.predict_masks(net, SEG, photographs[0], 256, 2.0, CPU, 8)
        calibration = {"cls": {"temperature": 1.0, "referable": 0.5}, "dme": {"temperature": 1.0}, "loc": {},
                       "seg": {k: float(np.quantile(m, 0.99)) for k, m in zip(SEG.classes, maps)}}  # some is found
        asked = predictor.Predictor(net, tasks, calibration, 256, 2.0, 8, CPU, Path(place) / "out", {})

        def together():
            shutil.rmtree(asked.out, ignore_errors=True)
            rows = predictor.predict_all(asked, [r.image for r in photographs])
            assert {row["status"] for row in rows} == {"answered"}
        together()
        first = photographs[0].image
        photo = asked.predict(asked.read(first, "a"))
        times = medians({"read": lambda: asked.read(first, "a"), "predict": lambda: asked.predict(photo),
                         "write": lambda: asked.write(photo), f"each of {number}": together}, 3)
    times[f"each of {number}"] /= number
    show("an answer for a photograph of 4288x2848", [{"": k, "ms": 1e3 * s} for k, s in times.items()])


def scaling() -> None:
    """Time and memory of a training step, as train.py runs it, against one thing at a time."""
    base = {"kind": "ours", "size": 256, "graded": 4, "masked": 4, "speedups": BEST}
    for title, ways in {
            "resolution, 2 and 2 photographs": {size: {"size": size, "graded": 2, "masked": 2}
                                                for size in (256, 512, 768, 1024)},
            "photographs in a step, half of them masked": {2 * n: {"graded": n, "masked": n} for n in (1, 2, 4, 8, 16)},
            "experts": {e: {"experts": e} for e in (0, 2, 8, 32, 64)},
            "tasks, 8 photographs with all labels": {k: {"names": FOUR[:k], "graded": 0, "masked": 8}
                                                     for k in (1, 2, 3, 4)}}.items():
        measured = race({str(k): {**base, **spec} for k, spec in ways.items()}, 3)
        first = next(iter(measured.values()))[0]
        show(f"training step against {title}", [
            {"": name, "ms": 1e3 * seconds, "x first": seconds / first, "peak GiB": peak}
            for name, (seconds, peak) in measured.items()])
    measured = race({str(n): {"kind": "reading", "number": n} for n in (100, 1000, 10000)}, 9)
    show("reading a sample of 128 px from the cache against photographs in the data set", [
        {"": name, "ms": 1e3 * seconds / 200, "peak GiB": peak} for name, (seconds, peak) in measured.items()])


def loading(folder: Path, size: int) -> None:
    """An epoch over the photographs of a folder, from nothing and once they are cached."""
    photographs = [r for r in readers.read_data(folder).records if r.split == "train"]
    with tempfile.TemporaryDirectory() as empty, mock.patch.object(cache, "CACHE", Path(empty)):
        begun = time.perf_counter()
        cache.build_cache(photographs, size)
        build = time.perf_counter() - begun
    ways = {"plain": {"speedups": [PLAIN]}, "ours": {"speedups": BEST}}
    ways = {f"{name}{', loading alone' * job}": {"kind": "trained", "folder": str(folder), "size": size, "job": job}
            | spec for name, spec in ways.items() for job in (0, 1)}
    times = {name: seconds * len(photographs) / 8 for name, (seconds, _) in race(ways, 12).items()}
    plain, quick = times["plain"], times["ours"]
    show(f"an epoch over the {len(photographs)} photographs of {folder.name} at {size} px, in steps of 8 (seconds)", [
        {"": "every epoch decoded, plain network", "s": plain, "loading": times["plain, loading alone"],
         "x plain": 1.0},
        {"": "first epoch, cache built", "s": build + quick, "loading": build + times["ours, loading alone"],
         "x plain": plain / (build + quick)},
        {"": "later epochs", "s": quick, "loading": times["ours, loading alone"], "x plain": plain / quick}])


def epoch(folder: Path | None) -> None:
    """Loading and augmenting: of a folder of real photographs, or of drawn ones as large as IDRiD's."""
    if folder is not None:
        return loading(folder, 256)
    with tempfile.TemporaryDirectory() as place:
        lines = [f"image,grade,split,{','.join(f'mask_{lesion.lower()}' for lesion in synthetic.LESIONS)}"]
        for r in originals(Path(place), 24):
            masked = int(r.name) % 8 == 0  # as many as IDRiD has
            masks = ",".join(f"{r.name}_{lesion}.tif" if masked else "" for lesion in synthetic.LESIONS)
            lines.append(f"{r.name}.jpg,1,train,{masks}")
        (Path(place) / "drawn_4288x2848.csv").write_text("\n".join(lines) + "\n")
        loading(Path(place) / "drawn_4288x2848.csv", 256)


# ---- experts, evaluation ----

C, SIDE, PHOTOGRAPHS = 320, 16, 8  # EfficientNet-B0's bottleneck at 512 pixels: 2048 tokens


def multiply_adds(f: Callable, *arguments) -> int:
    """Of a forward pass; of what counts, matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        f(*arguments)
    return counter.get_total_flops() // 2


class Dense(nn.Module):
    """As many multiply-adds as K = 2 experts of width C / 2, without router or dispatch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.fc1, self.fc2 = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x.permute(0, 2, 3, 1))
        return x + self.fc2(F.silu(self.fc1(u))).permute(0, 3, 1, 2)


class AllExperts(nn.Module):
    """The same layer computed as many do: every expert for every token, then weighted, most of them by zero."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        u = self.layer.norm(x.permute(0, 2, 3, 1)).flatten(0, 2)
        r = self.layer.routers["a"](u, (len(x), *x.shape[2:]))
        w1, w2 = self.layer.experts.w1.unbind(0), self.layer.experts.w2.unbind(0)
        each = [F.silu(u @ a) @ b for a, b in zip(w1, w2)]  # E x (N, C)
        y = sum(g.unsqueeze(1) * y for g, y in zip((r.to_dense(r.gates) * (C / 2) ** -0.5).unbind(1), each))
        return x + y.view(len(x), *x.shape[2:], C).permute(0, 3, 1, 2)


def experts() -> None:
    """Forward and backward of the expert layer against the number of experts, and its share of the network."""
    torch.manual_seed(0)
    x = torch.randn(PHOTOGRAPHS, C, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def layer(num_experts, top_k=2, ratio=0.5, grouped=True):
        made = MoELayer(C, ["a"], num_experts, top_k, ratio=ratio, dropout=0.0)
        for p in made.parameters():
            nn.init.normal_(p, std=0.05)  # not its neutral start: tokens differ in their experts
        return precision.channels_last(made.train()) if grouped else made.train()

    def job(module, sparse=True):
        def run():
            module.zero_grad()
            inputs = x.detach().requires_grad_()
            y = module({"a": inputs})[0]["a"] if sparse else module(inputs)
            y.square().sum().backward()
        return run
    precision.tune_malloc()  # as in training
    one, layers = layer(1, 1, 1.0), {e: layer(e) for e in (4, 8, 16, 32, 64)}
    times = medians({"dense": job(Dense(), False), "E = 1": job(one), **{e: job(made) for e, made in layers.items()},
                     **{f"plain {e}": job(layer(e, grouped=False)) for e in (8, 64)},
                     **{f"all {e}": job(AllExperts(made), False) for e, made in layers.items()}}, 30)
    dense = times["dense"]
    TABLES["expert layer"] = [{"": name, "ms": 1e3 * seconds} for name, seconds in times.items()]
    print(f"{PHOTOGRAPHS * SIDE * SIDE} tokens of {C} channels, 2 experts each, forward and backward\n")
    print(f"{'':34}{'ms':>8}{'x dense':>9}{'parameters':>12}{'all experts: ms':>17}")
    print(f"{'dense, equal multiply-adds':34}{1e3 * dense:8.1f}{1:9.2f}{2 * C * C:12,}")
    for e, made in {"E = 1": one, **layers}.items():
        name = f"E = {e}, K = 2" if e in layers else "E = 1, K = 1, width 1"
        every = f"{1e3 * times[f'all {e}']:17.1f}" if e in layers else ""
        print(f"{name:34}{1e3 * times[e]:8.1f}{times[e] / dense:9.2f}"
              f"{sum(p.numel() for p in made.experts.parameters()):12,}{every}")
    print(f"\nE = 64 costs {times[64] / times[4]:.2f} times E = 4, E = 8 {times[8] / dense:.2f} times the dense layer, "
          f"{times[8] / times['E = 1']:.2f} times the same layer with one expert; without GroupedMatmul E = 8 and "
          f"E = 64 take {times['plain 8'] / times[8]:.2f} and {times['plain 64'] / times[64]:.2f} times as long")

    print("\none photograph, tasks cls and seg, forward           multiply-adds      parameters")
    tasks = make_tasks(["cls", "seg"])
    for place in ("bottleneck", "decoder"):
        for size in (256, 512):
            image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
            nets = [Net(NetConfig(num_experts=e, moe_at=place), tasks).eval() for e in (0, 8)]
            before, after = (multiply_adds(net, image) for net in nets)
            parameters = " ".join(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for net in nets)
            print(f"{place}, {size} px: without, with experts{'':8}{before / 1e6:9,.0f} M {after / 1e6:7,.0f} M "
                  f"(+{100 * (after / before - 1):.2f} %)   {parameters}")


def teachers() -> None:
    """A step of train.py for four tasks and eight photographs with all labels, by the number of multi-task teachers."""
    precision.tune_malloc()
    config, _ = train.configure(["--tasks", "cls", "dme", "seg", "loc", "--image-size", "256"])
    photographs = data.FundusDataset(readers.read_series("train", 0, 8), 256)
    built = [build_net(asdict(config)) for _ in range(3)]
    batch = data.collate([photographs[i] for i in range(8)], built[0][1])

    def job(number):
        net, tasks = built[0]
        state = train.make_state(net, tasks, config, 100, CPU)
        runs = [SimpleNamespace(net=net) for net, _ in built[1:number + 1]]  # Teachers copies and freezes them
        taught = Teachers(runs, tasks, config, 100) if runs else None
        return lambda: train.train_step(state, batch, tasks, config, teachers=taught)
    times = medians({number: job(number) for number in range(3)}, 15)
    show("a step of 8 photographs of 256 px, four tasks", [
        {"teachers": n, "ms": 1e3 * seconds, "x none": seconds / times[0]} for n, seconds in times.items()])


def originals(folder: Path, number: int, size: tuple[int, int] = (4288, 2848)) -> list[records.Record]:
    """Drawn photographs enlarged to the size of IDRiD's, with five masks each, as files."""
    photographs = []
    for i in range(number):
        picture, masks = synthetic.render(synthetic.plan(3, i), 712)
        border = ((0, 0), (180, 180))
        Image.fromarray(np.pad(picture, (*border, (0, 0)))).resize(size).save(folder / f"{i}.jpg", quality=92)
        paths = {}
        for lesion, mask in zip(synthetic.LESIONS, masks):
            path = folder / f"{i}_{lesion}.tif"
            paths[lesion] = MaskFile(path)
            save_palette_mask(path, np.asarray(Image.fromarray(np.pad(mask, border)).resize(size)))
        photographs.append(records.Record(str(i), folder / f"{i}.jpg", labels={"masks": paths}))
    return photographs


def evaluation() -> None:
    """What scoring adds to the forward passes, at the size of training and in the pixels of original files."""
    tasks = make_tasks(["cls", "seg"])
    net = Net(NetConfig(), tasks).to(memory_format=torch.channels_last).eval()
    photographs = data.FundusDataset([r for r in readers.read_drawn().records if r.split == "train"][:240], 128)
    loader = data.eval_loader(photographs, tasks, 8)
    batches = list(loader)

    @torch.inference_mode()
    def forward():
        for batch in batches:
            net(batch.images, batch.indices)

    def scored():
        scoring.evaluate_split(net, loader, tasks).metrics()

    scores = scoring.evaluate_split(net, loader, tasks)
    times = medians({"forward": forward, "scored": scored, "intervals": lambda: scoring.summary([scores], [{}])}, 5)
    TABLES["evaluation"] = [{"": name, "s": seconds} for name, seconds in times.items()]
    print(f"{len(photographs)} drawn photographs at 128 pixels, {' '.join(t.name for t in tasks)}: forward passes "
          f"{times['forward']:.2f} s, scoring with decoding and metrics {times['scored']:.2f} s "
          f"({times['scored'] / times['forward']:.2f} times), intervals {times['intervals']:.2f} s more")
    with tempfile.TemporaryDirectory() as folder:
        large = originals(Path(folder), 4)

        def full():
            full_size.mask_stats_at_full_size(net, SEG, large, 256, None, CPU, 8, SEG.accumulator())

        def network():
            for _ in large:
                full_size.predict_sample(net, [SEG], torch.zeros(3, 256, 256, dtype=torch.uint8), CPU)

        times = medians({"full": full, "network": network}, 3)
        print(f"masks of {len(large)} photographs of 4288x2848, network at 256 pixels: {times['full'] / 4:.2f} s a "
              f"photograph, of which {times['network'] / 4:.2f} s in the network")


def eyes(numbers: Sequence[int] = (300, 1000) if QUICK else (1000, 3000, 10000)) -> None:
    """Copies and photographs of one eye among so many; one in twenty shows an eye for the second time.

    Vessel maps are drawn as such, thumbnails are made of them: photographs would take much longer to make.
    """
    drawings, rows = vessel_drawings(numbers[-1], numbers[-1] // 20), []
    for number in numbers:
        again = number // 20
        maps = np.concatenate([drawings[:number - again], drawings[-(numbers[-1] // 20):][:again]])
        thumbnails = np.stack([maps, maps // 2, maps // 4], 3)
        if (forget := Path("/proc/self/clear_refs")).exists():
            forget.write_text("5")  # the most memory that was held before
        begun = time.perf_counter()
        copies, turned = leaks.find_copies(thumbnails)
        compared = time.perf_counter()
        pairs, scores = vessels.same_eye_scores(maps)
        seconds, copying = time.perf_counter() - begun, compared - begun
        found = {*copies, *turned, *map(tuple, pairs[scores >= leaks.SAME_EYE].tolist())}
        hidden = {(i, number - again + i) for i in range(again)}
        exponent = math.log(seconds / rows[-1]["s"], number / rows[-1]["photographs"]) if rows else "-"
        rows.append({"photographs": number, "s": seconds, "of it copies": copying, "exponent": exponent,
                     "peak GiB": most_memory(), "hidden pairs": again, "found": len(found & hidden),
                     "false": len(found - hidden)})
    show("copies and eyes among many photographs, once they are decoded", rows)


def main() -> None:
    """Measure what is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="all",
                        choices=("step", "data", "inference", "experts", "teachers", "evaluation", "scaling", "eyes",
                                 "all"))
    parser.add_argument("--quick", action="store_true", help="the main things, once")
    parser.add_argument("--json", type=Path, help="write all tables to this file as well")
    parser.add_argument("--data", type=Path, help="with data: measure on this data set, not on drawn photographs")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        return work(args.work)
    print(machine())
    jobs = {"step": step, "data": partial(epoch, args.data), "inference": inference, "scaling": scaling,
            "experts": experts, "teachers": teachers, "evaluation": evaluation, "eyes": eyes}
    for name, job in jobs.items():
        if args.what == name or args.what == "all" and not (QUICK and name in ("data", "scaling", "teachers")):
            job()
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), **TABLES}, indent=1))


if __name__ == "__main__":
    run_cli(main)
