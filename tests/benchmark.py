"""How fast is it? Medians of interleaved repetitions, so that whatever else the machine does slows all alike.

    python tests/benchmark.py experts | evaluation
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import predict  # noqa: E402
import records  # noqa: E402
import scores  # noqa: E402
import synthetic  # noqa: E402
from conftest import save_palette_mask  # noqa: E402
from model import ExpertLayer, Net, NetConfig  # noqa: E402
from tasks import TASKS  # noqa: E402
from train import keep_memory  # noqa: E402

C, SIDE, PHOTOGRAPHS = 320, 16, 8  # EfficientNet-B0's deepest map at 512 pixels: 2048 tokens


def machine() -> str:
    """What was measured on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return (f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, Python {platform.python_version()}")


def medians(jobs: Mapping[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Seconds of each job; one after the other, again and again, after two rounds that do not count."""
    times = {name: [] for name in jobs}
    for i in range(repetitions + 2):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            if i > 1:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(t) for name, t in times.items()}


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

    def __init__(self, layer: ExpertLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        u = self.layer.norm(x.permute(0, 2, 3, 1)).flatten(0, 2)
        r = self.layer.routers["a"](u, (len(x), *x.shape[2:]))
        each = [F.silu(u @ w1) @ w2 for w1, w2 in zip(self.layer.experts.w1.unbind(0),
                                                      self.layer.experts.w2.unbind(0))]  # E x (N, C)
        y = sum(w.unsqueeze(1) * y for w, y in zip((r.spread(r.weights) * (C / 2) ** -0.5).unbind(1), each))
        return x + y.view(len(x), *x.shape[2:], C).permute(0, 3, 1, 2)


def experts() -> None:
    """Forward and backward of the expert layer against the number of experts, and its share of the network."""
    torch.manual_seed(0)
    x = torch.randn(PHOTOGRAPHS, C, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def layer(e, k=2, width=0.5):
        made = ExpertLayer(C, ["a"], e, k, width=width, dropout=0.0)
        for p in made.parameters():
            nn.init.normal_(p, std=0.05)  # not its neutral start: tokens differ in their experts
        return made.train()

    def job(module, sparse=True):
        def run():
            module.zero_grad()
            inputs = x.detach().requires_grad_()
            y = module({"a": inputs})[0]["a"] if sparse else module(inputs)
            y.square().sum().backward()
        return run
    numbers = (4, 8, 16, 32, 64)
    layers = {e: layer(e) for e in numbers}
    times = medians({"dense": job(Dense(), False), "E = 1": job(layer(1, 1, 1.0)),
                     **{e: job(made) for e, made in layers.items()},
                     **{f"all {e}": job(AllExperts(made), False) for e, made in layers.items()}}, 30)
    dense = times["dense"]
    print(f"{PHOTOGRAPHS * SIDE * SIDE} tokens of {C} channels, 2 experts each, forward and backward\n")
    print(f"{'':34}{'ms':>8}{'x dense':>9}{'parameters':>12}{'all experts: ms':>17}")
    print(f"{'dense, equal multiply-adds':34}{1e3 * dense:8.1f}{1:9.2f}{2 * C * C:12,}")
    for e, made in {"E = 1": layer(1, 1, 1.0), **layers}.items():
        name = f"E = {e}, K = 2" if e in layers else "E = 1, K = 1, width 1"
        whole = f"{1e3 * times[f'all {e}']:17.1f}" if e in layers else ""
        print(f"{name:34}{1e3 * times[e]:8.1f}{times[e] / dense:9.2f}"
              f"{sum(p.numel() for p in made.experts.parameters()):12,}{whole}")
    print(f"\nE = 64 costs {times[64] / times[4]:.2f} times E = 4, E = 8 {times[8] / dense:.2f} times the dense layer, "
          f"{times[8] / times['E = 1']:.2f} times the same layer with one expert")

    print("\none photograph, tasks cls and seg, forward           multiply-adds      parameters")
    tasks = [TASKS["cls"], TASKS["seg"]]
    for place in ("deepest", "decoder"):
        for size in (256, 512):
            image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
            without, with_ = (Net(NetConfig(experts=e, experts_at=place), tasks).eval() for e in (0, 8))
            work = [multiply_adds(net, image) for net in (without, with_)]
            size_ = [sum(p.numel() for p in net.parameters()) for net in (without, with_)]
            print(f"{place}, {size} px: without, with experts{'':8}{work[0] / 1e6:9,.0f} M {work[1] / 1e6:7,.0f} M "
                  f"(+{100 * (work[1] / work[0] - 1):.2f} %)   {size_[0] / 1e6:.2f} M {size_[1] / 1e6:.2f} M")


def originals(folder: Path, number: int, size: tuple[int, int] = (4288, 2848)) -> list[records.Record]:
    """Drawn photographs enlarged to the size of IDRiD's, with five masks each, as files."""
    found = []
    for i in range(number):
        picture, masks = synthetic.draw(synthetic.plan(3, i), 712)
        border = ((0, 0), (180, 180))
        Image.fromarray(np.pad(picture, (*border, (0, 0)))).resize(size).save(folder / f"{i}.jpg", quality=92)
        paths = {}
        for kind, mask in zip(synthetic.LESIONS, masks):
            paths[kind] = folder / f"{i}_{kind}.tif"
            save_palette_mask(paths[kind], np.asarray(Image.fromarray(np.pad(mask, border)).resize(size)))
        found.append(records.Record(str(i), folder / f"{i}.jpg", masks=paths))
    return found


def evaluation() -> None:
    """What scoring adds to the forward passes, at the size of training and in the pixels of original files."""
    device, tasks = torch.device("cpu"), [TASKS["cls"], TASKS["seg"]]
    net = Net(NetConfig(), tasks).to(memory_format=torch.channels_last).eval()
    photographs = data.Photographs([r for r in records.read_drawn().records if r.part == "train"][:240], 128)
    batches = list(scores.loader(photographs, scores.in_order(photographs, 8), tasks, device))

    @torch.inference_mode()
    def forward():
        for batch in batches:
            net(batch.images, batch.rows)

    def scored():
        scores.score(net, photographs, tasks, device, 8).metrics()

    found = scores.score(net, photographs, tasks, device, 8)
    times = medians({"forward": forward, "scored": scored, "intervals": lambda: scores.summary([found], [{}])}, 5)
    print(f"{len(photographs)} drawn photographs at 128 pixels, {' '.join(t.name for t in tasks)}: forward passes "
          f"{times['forward']:.2f} s, scoring with decoding and metrics {times['scored']:.2f} s "
          f"({times['scored'] / times['forward']:.2f} times), intervals {times['intervals']:.2f} s more")
    with tempfile.TemporaryDirectory() as folder:
        large = originals(Path(folder), 4)

        def full():
            predict.tally_at_full_size(net, TASKS["seg"], large, 256, None, device, 8, TASKS["seg"].pool())

        def network():
            for _ in large:
                predict.answer(net, [TASKS["seg"]], torch.zeros(3, 256, 256, dtype=torch.uint8), device)

        times = medians({"full": full, "network": network}, 3)
        print(f"masks of {len(large)} photographs of 4288x2848, network at 256 pixels: {times['full'] / 4:.2f} s a "
              f"photograph, of which {times['network'] / 4:.2f} s in the network")


def main() -> None:
    """Measure what is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("experts", "evaluation"))
    what = parser.parse_args().what
    keep_memory()
    print(machine() + "\n")
    {"experts": experts, "evaluation": evaluation}[what]()


if __name__ == "__main__":
    main()
