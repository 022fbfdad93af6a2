"""Batches of photographs of which some carry some labels. Read in this order:

    draw, recoloured    augmentation: a seed -> what is done with a photograph; a whole batch changed at once
    Photographs         samples from the cache (retina/datasets)
    collate             samples -> Batch, augmented
    Steps               which photographs meet in which training step
    load_photographs    training and validation photographs of a data set

    python data.py PATH/TO/IDRiD --pictures sheets     # what a data set holds and what is wrong with it
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision.transforms.v2.functional import gaussian_blur, rgb_to_grayscale

from retina.datasets import cache, readers, splits
from retina.datasets.leaks import find_eyes
from retina.datasets.preprocess import Sample
from retina.datasets.records import LABELS, Record
from retina.datasets.report import contact_sheets, examine, page
from retina.datasets.splits import check_labels
from retina.files import InputError, init_worker, run_cli
from retina.training.distributed import SINGLE_PROCESS, World
from tasks import TASKS, Task, make_tasks


# ---- augmentation ----

TURN, SHIFT, SCALE = 30.0, 0.05, (0.9, 1.1)  # degrees either way, share of the side, factor
JITTER, HUE = 0.2, 0.02  # brightness, contrast and saturation by a factor of 1 -+ JITTER; hue by a share of the circle
BLURRED, SIGMA, KERNEL = 0.2, (0.1, 1.0), 5  # how often; of the Gaussian in pixels; its side


@dataclass(frozen=True)
class Change:
    """What is to be done with one photograph."""
    flip: tuple[bool, bool]  # left and right, top and bottom; then
    angle: float  # radians, clockwise about the middle, and
    scale: float  # about it; then
    shift: tuple[float, float]  # to the right and down, in shares of the side
    order: tuple[int, ...]  # in which the four of RECOLOUR come
    amounts: tuple[float, ...]  # of each of them
    sigma: float  # of the blur in pixels; 0: none


def draw(seed: int, size: int) -> Change:
    """What a seed stands for, of a photograph of `size` pixels a side."""
    rng = np.random.default_rng(seed)
    flip = tuple((rng.random(2) < 0.5).tolist())
    angle, scale = rng.uniform(-TURN, TURN) * math.pi / 180, rng.uniform(*SCALE)
    shift = tuple((np.round(rng.uniform(-SHIFT, SHIFT, 2) * size) / size).tolist())  # by whole pixels
    amounts = (*rng.uniform(1 - JITTER, 1 + JITTER, 3).tolist(), rng.uniform(-HUE, HUE))
    order = tuple(rng.permutation(4).tolist())
    return Change(flip, angle, scale, shift, order, amounts, rng.uniform(*SIGMA) if rng.random() < BLURRED else 0.0)


def matrices(changes: Sequence[Change]) -> Tensor:
    """(B, 2, 3) A and t with new = A old + t; coordinates are -1 to 1 over the photograph, to the right and down."""
    rows = []
    for c in changes:
        cos, sin = c.scale * math.cos(c.angle), c.scale * math.sin(c.angle)
        x, y = (-1 if flipped else 1 for flipped in c.flip)
        rows.append([[cos * x, -sin * y, 2 * c.shift[0]], [sin * x, cos * y, 2 * c.shift[1]]])
    return torch.tensor(rows)


def moved(pictures: Tensor, forward: Tensor, mode: str) -> Tensor:
    """Pictures (n, C, S, S) uint8, moved by (n, 2, 3) -> float32; black comes in from outside."""
    back = torch.linalg.inv(forward[:, :, :2])  # old = A^-1 new - A^-1 t, which tells for each new pixel where to look
    back = torch.cat([back, -back @ forward[:, :, 2:]], 2)
    grid = F.affine_grid(back.to(pictures.device, non_blocking=True), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures.float(), grid, mode, align_corners=False)


def blend(x: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    """amount x + (1 - amount) other, within 0..255; amount (n, 1, 1, 1)."""
    return torch.lerp(other, x, amount).clamp_(0, 255)


def turn_hue(x: Tensor, amount: Tensor) -> Tensor:
    """Turn the hue, keep the largest and the smallest of the three channels (Smith 1978, SIGGRAPH 12:12, in HSV)."""
    red, green, blue = x.split(1, 1)
    largest, smallest = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    is_red, is_green = red == largest, green == largest
    between = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sextant = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)) + 6 * amount
    hue = between.div_(chroma.clamp(min=1e-6)).add_(sextant).remainder_(6)  # 0 red, 2 green, 4 blue
    share = torch.cat([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1).clamp_(0, 1)
    return share.mul_(chroma).add_(smallest)


RECOLOUR = (lambda x, amount: (amount * x).clamp_(0, 255),  # brightness
            lambda x, amount: blend(x, rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), amount),  # contrast
            lambda x, amount: blend(x, rgb_to_grayscale(x), amount),  # saturation
            turn_hue)


def recoloured(images: Tensor, changes: Sequence[Change]) -> Tensor:
    """(B, 3, S, S) 0..255, float32, with the colours and the blur of each photograph's change; overwrites `images`."""
    for place in range(4):
        for kind, recolour in enumerate(RECOLOUR):
            if chosen := [i for i, c in enumerate(changes) if c.order[place] == kind]:
                amount = torch.tensor([changes[i].amounts[kind] for i in chosen]).view(-1, 1, 1, 1)
                which = torch.tensor(chosen).to(images.device, non_blocking=True)
                images[which] = recolour(images[which], amount.to(images.device, non_blocking=True))
    for i, c in enumerate(changes):
        if c.sigma:
            images[i] = gaussian_blur(images[i], [KERNEL, KERNEL], [c.sigma, c.sigma])
    return images


# ---- samples ----

class FundusDataset(Dataset):
    """Samples of `records` at `size` pixels from the cache, by their number.

    With (number, draw) in its place the sample will be augmented, and the draw is the seed: the same pair gives the
    same photograph in whichever process, at whatever time. InputError: a file has been removed or replaced since.
    """

    def __init__(self, records: Sequence[Record], size: int):
        self.records, self.size = list(records), size
        self.paths = cache.want_cache(self.records, size)
        self.files = [cache.files_of(r) for r in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int | None]) -> Sample:
        i, aug_seed = index if isinstance(index, tuple) else (index, None)
        cache.check_files(self.files[i])
        return replace(cache.cached_sample(self.records[i], self.paths[i], self.size), aug_seed=aug_seed)

    def fingerprint(self) -> str:
        """SHA-256 over names, labels and contents of all samples."""
        return cache.fingerprint(self.records, self.paths)


# ---- batches ----

@dataclass
class Batch:
    """Photographs of which some carry some labels. Row k of targets[t] belongs to photograph indices[t][k].

    A task without a labelled photograph is in neither; in a group of processes it is in both, with no row: norms and
    sums over all processes need everyone.
    """
    images: Tensor  # (B, 3, S, S) uint8
    targets: dict[str, Tensor]  # task -> (n_t, ...)
    indices: dict[str, Tensor]  # task -> (n_t,) int64, ascending
    names: list[str]
    eyes: list[str]  # which eye each shows


def collate(samples: Sequence[Sample], tasks: Sequence, device: torch.device = torch.device("cpu"),
            empty_targets: Mapping[str, Tensor] = MappingProxyType({})) -> Batch:
    """Bring samples to a device, augment those that have a draw there, and stack them; see `make_empty_targets`."""
    def move(x):
        return x.to(device, non_blocking=True)

    samples = [s.pictures(move) for s in samples]
    images = torch.stack([s.image for s in samples])
    if samples[0].aug_seed is not None:
        images, samples = augmented(images, samples)
    indices, targets = {}, {}
    for t in tasks:
        if labelled := [i for i, s in enumerate(samples) if t.labelled(s)]:
            indices[t.name] = move(torch.tensor(labelled))
            targets[t.name] = move(torch.stack([t.target(samples[i]) for i in labelled]))
        elif t.name in empty_targets:
            indices[t.name], targets[t.name] = move(torch.zeros(0, dtype=torch.int64)), move(empty_targets[t.name])
    return Batch(images, targets, indices, [s.name for s in samples], [s.eye for s in samples])


def augmented(images: Tensor, samples: Sequence[Sample]) -> tuple[Tensor, list[Sample]]:
    """All samples, whose images are (B, 3, S, S) uint8, changed as their draws say; labels follow, see Label.moved."""
    size = images.shape[-1]
    changes = [draw(s.aug_seed, size) for s in samples]
    forward = matrices(changes)
    images = recoloured(moved(images, forward, "bilinear"), changes).round_().to(torch.uint8)
    found = [replace(s, image=image, labels=dict(s.labels)) for s, image in zip(samples, images)]
    for name, label in LABELS.items():
        known = [i for i, s in enumerate(samples) if name in s.labels]
        values = [samples[i].labels[name] for i in known]
        for i, value in zip(known, label.moved(values, forward[known], size, moved) if known else ()):
            found[i].labels[name] = value
    return images, found


class MultiTaskBatchSampler:
    """Which photographs meet in which training step; a step is a list of (record, draw).

    Records fall into label patterns by the labels they carry for `tasks`; those that carry none are left out. Every
    step takes from every pattern, in proportion to the square root of its size: proportional sampling would show too
    few of the rare photographs with masks, equal sampling would repeat them too often (the temperature T = 2 of
    Arivazhagan et al. 2019, arXiv 1907.05019, section 4.2). A pattern runs through its photographs in a new order each
    time around. Everything is a function of (seed, step): a step can be reproduced without those before it.

    `wanted`: of each step only the photographs with a label for one of these tasks; a network for one task then sees
    those of its photographs that a network for all `tasks` sees, changed in the same ways.
    """

    def __init__(self, records: Sequence[Record], tasks: Sequence, batch: int, seed: int, augmented: bool,
                 wanted: Sequence | None = None):
        patterns = defaultdict(list)
        for i, record in enumerate(records):
            patterns[tuple(t.name for t in tasks if t.labelled(record))].append(i)
        patterns.pop((), None)
        self.patterns = [patterns[labels] for labels in sorted(patterns)]
        self.seed, self.augmented = seed, augmented
        if batch < len(self.patterns):
            raise InputError(f"--batch-size {batch}: every step takes from each of the {len(self.patterns)} groups of "
                             f"differently labelled photographs; use at least {len(self.patterns)}")
        weights = np.sqrt([len(s) for s in self.patterns])
        spare = batch - len(self.patterns)  # one each, the rest by the largest remainder
        shares = spare * weights / weights.sum()
        self.quota = 1 + np.floor(shares).astype(int)
        for k in np.argsort(np.floor(shares) - shares, kind="stable")[:batch - self.quota.sum()]:
            self.quota[k] += 1
        # an epoch: each photograph of the pattern that takes longest has come once
        self.per_epoch = max(math.ceil(len(s) / q) for s, q in zip(self.patterns, self.quota))
        wanted = {t.name for t in (tasks if wanted is None else wanted)}
        self.kept = [bool(wanted & set(labels)) for labels in sorted(patterns)]
        self.photographs = int(self.quota[self.kept].sum())  # of a step

    def step(self, number: int) -> list[tuple[int, int | None]]:
        """The photographs of training step `number`, counted from 0."""
        chosen = []
        for k, (pattern, quota, kept) in enumerate(zip(self.patterns, self.quota, self.kept)):
            if not kept:
                continue
            for position in range(number * quota, (number + 1) * quota):
                around, place = divmod(position, len(pattern))
                order = np.random.default_rng((self.seed, k, around)).permutation(len(pattern))
                aug_seed = int(np.random.SeedSequence((self.seed, k, position)).generate_state(1)[0])
                chosen.append((pattern[order[place]], aug_seed if self.augmented else None))
        return chosen

    def range(self, start: int, stop: int, rank: int = 0, size: int = 1) -> Iterator[list[tuple[int, int | None]]]:
        """Steps start..stop-1; of each the share that falls to process `rank` of `size`, as even as it can be."""
        return (self.step(number)[rank::size] for number in range(start, stop))


def make_empty_targets(photographs: FundusDataset, tasks: Sequence) -> dict[str, Tensor]:
    """{task: target of no photograph (0, ...)}, for the process that has none in a step in which others have some."""
    firsts = {t: next(i for i, r in enumerate(photographs.records) if t.labelled(r)) for t in tasks}
    return {t.name: t.target(photographs[i])[None][:0] for t, i in firsts.items()}


def eval_loader(photographs: Dataset, tasks: Sequence[Task], batch: int, device: torch.device = torch.device("cpu"),
                world: World = SINGLE_PROCESS) -> DataLoader:
    """Batches of all photographs once, as they are; each process of a group has every so many-th of them."""
    batches = list(BatchSampler(SequentialSampler(photographs), batch, drop_last=False))[world.rank::world.size]
    return DataLoader(photographs, batch_sampler=batches, collate_fn=partial(collate, tasks=tasks, device=device))


def train_loader(photographs: FundusDataset, batches, tasks: Sequence[Task], device: torch.device,
                 workers: int, empty_targets: Mapping[str, Tensor]) -> Iterator[Batch]:
    """Batches of `photographs` on a device; `batches` are lists of its indices.

    Helpers read samples; this process puts them together, where augmentation may run on the device.
    """
    samples = DataLoader(photographs, batch_sampler=batches, collate_fn=list, num_workers=workers,
                         worker_init_fn=init_worker, pin_memory=device.type == "cuda")
    samples = iter(samples)  # at once: it draws from torch's generator

    def collated():  # the helpers end when this does, also by an error, which may live longer
        try:
            for some in samples:
                yield collate(some, tasks, device, empty_targets)
        finally:
            getattr(samples, "_shutdown_workers", lambda: None)()
    return collated()


# ---- training and validation ----

def load_datasets(config, tasks: Sequence[Task]) -> tuple[FundusDataset, FundusDataset, dict]:
    """Training and validation photographs, and what was found of leaks and of labels that contradict each other.

    `config` is train.py's Config. InputError: a task of which nothing is labelled on either side.
    """
    root = None if config.data is None else Path(config.data)
    found = readers.read_data(root).records
    everything = make_tasks(TASKS, config.classes)
    check_labels({"training": [r for r in found if r.split != "test"]}, tasks, everything, root)  # before decoding
    joined, conflicts = find_eyes(found, config.image_size, config.ignore_eyes)
    split = splits.split(joined, config.fold, config.keep_leaks)
    check_labels({"training": split.training, "validation": split.validation}, tasks, everything, root,
                 f" (of {sum(r.split != 'test' for r in joined)} photographs, {len(split.leaks)} show an eye of the "
                 "test split)")
    sampled = [*tasks, *make_tasks(config.sampling_tasks, config.classes)]
    training, validation, leaks = ([r for r in part if any(t.labelled(r) for t in wanted)] for part, wanted in (
        (split.training, sampled), (split.validation, tasks), (split.leaks, tasks)))
    validated = [r.name for r in split.validated if any(t.labelled(r) for t in tasks)]
    findings = {"leaks": {"kept": config.keep_leaks, "photographs": len(leaks), "names": [r.name for r in leaks],
                          **{t.name: sum(t.labelled(r) for r in leaks) for t in tasks}},
                "left_out_for_validation": validated, "conflicts": [c.as_dict(config.classes) for c in conflicts]}
    return FundusDataset(training, config.image_size), FundusDataset(validation, config.image_size), findings


# ---- command line ----

def main(argv: Sequence[str] | None = None) -> None:
    """python data.py PATH: examine a data set. Nothing on disk changes but the cache."""
    parser = argparse.ArgumentParser(description="Examine a data set before training on it.")
    parser.add_argument("data", nargs="?", help="IDRiD's folder, a table FILE.csv, or a folder with train/CLASS/ in it "
                                                "(default: data/IDRiD if it exists, else drawn photographs)")
    parser.add_argument("--fold", default="1/5", help="show the split with this fold for validation (default: 1/5)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER",
                        help="write a contact sheet for each kind of finding")
    args = parser.parse_args(argv)
    splits.read_fold(args.fold)
    if args.pictures is not None and args.pictures.exists() and not args.pictures.is_dir():
        raise InputError(f"--pictures {args.pictures}: a file; expected a folder, which may be new")
    root = readers.find_data(args.data)
    report, sheets = examine(readers.read_data(root), root, args.fold)
    print(json.dumps(report, indent=1) if args.json else page(report))
    if args.pictures is not None:
        print("\n".join(["", *contact_sheets(sheets, args.pictures)]), file=sys.stderr if args.json else sys.stdout)
    if problems := report["unreadable"]:
        raise InputError(f"{root}: {len(problems)} of its photographs cannot be used, see above; train.py would refuse "
                         "them: replace the files, or remove them and their labels")


if __name__ == "__main__":
    run_cli(main)
