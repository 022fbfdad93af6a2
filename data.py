"""Batches of photographs of which some carry some labels. Read in this order:

    AUGMENTATION           torchvision's transforms (v2), on photograph, masks and landmarks alike
    FundusDataset          samples from the cache (retina/datasets), augmented if a seed comes with their number
    collate                samples -> Batch
    MultiTaskBatchSampler  which photographs meet in which training step
    load_datasets          training and validation photographs of a data set

    python data.py PATH/TO/IDRiD --pictures sheets     # what a data set holds and what is wrong with it
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

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

# Each photograph with its masks and landmarks. Colours as float32: bytes would be cut off after each of three steps.
AUGMENTATION = v2.Compose([
    v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
    # torchvision 0.29 flips key points about pixel centres and turns them about pixel edges; see docs/data-and-leaks.md
    v2.Lambda(lambda points: tv_tensors.wrap(points + 0.5, like=points), tv_tensors.KeyPoints),
    v2.RandomAffine(30, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
    v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.0))], p=0.2),
    v2.ToDtype({tv_tensors.Image: torch.uint8, "others": None}, scale=True)])


def augmented(sample: Sample) -> Sample:
    """The sample, changed as its seed says: the same in whichever process, at whatever time; labels follow."""
    size = sample.image.shape[-1]
    known = {name: LABELS[name].to_tv_tensor(value, size) for name, value in sample.labels.items()}
    with torch.random.fork_rng(devices=[]):  # the generator of all else is left as it was
        torch.default_generator.manual_seed(sample.aug_seed)
        image, moved = AUGMENTATION(tv_tensors.Image(sample.image), known)
    return replace(sample, image=image.as_subclass(Tensor), labels={
        name: LABELS[name].from_tv_tensor(value, sample.labels[name]) for name, value in moved.items()})


# ---- samples ----

class FundusDataset(Dataset):
    """Samples of `records` at `size` pixels from the cache, by their number.

    With (number, seed) in its place the sample is augmented as the seed says. InputError: a file has been removed or
    replaced since.
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
        sample = replace(cache.cached_sample(self.records[i], self.paths[i], self.size), aug_seed=aug_seed)
        return sample if aug_seed is None else augmented(sample)

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

    def apply(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with other tensors."""
        return replace(self, images=change(self.images), targets={t: change(x) for t, x in self.targets.items()},
                       indices={t: change(x) for t, x in self.indices.items()})

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self.apply(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU need not wait (called by DataLoader)."""
        return self.apply(Tensor.pin_memory)


def collate(samples: Sequence[Sample], tasks: Sequence,
            empty_targets: Mapping[str, Tensor] = MappingProxyType({})) -> Batch:
    """Stack samples and the targets of those that carry a task's label; see `make_empty_targets`."""
    indices, targets = {}, {}
    for t in tasks:
        if labelled := [i for i, s in enumerate(samples) if t.labelled(s)]:
            indices[t.name] = torch.tensor(labelled)
            targets[t.name] = torch.stack([t.target(samples[i]) for i in labelled])
        elif t.name in empty_targets:
            indices[t.name], targets[t.name] = torch.zeros(0, dtype=torch.int64), empty_targets[t.name]
    return Batch(torch.stack([s.image for s in samples]), targets, indices, [s.name for s in samples],
                 [s.eye for s in samples])


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


def eval_loader(photographs: Dataset, tasks: Sequence[Task], batch: int, world: World = SINGLE_PROCESS) -> DataLoader:
    """Batches of all photographs once, as they are; each process has every so many-th of them."""
    batches = list(BatchSampler(SequentialSampler(photographs), batch, drop_last=False))[world.rank::world.size]
    return DataLoader(photographs, batch_sampler=batches, collate_fn=partial(collate, tasks=tasks),
                      pin_memory=torch.cuda.is_available())


def train_loader(photographs: FundusDataset, batches, tasks: Sequence[Task], device: torch.device,
                 workers: int, empty_targets: Mapping[str, Tensor]) -> Iterator[Batch]:
    """Batches of `photographs` on a device; `batches` are lists of its indices."""
    loader = iter(DataLoader(  # at once: it draws from torch's generator
        photographs, batch_sampler=batches, collate_fn=partial(collate, tasks=tasks, empty_targets=empty_targets),
        num_workers=workers, worker_init_fn=init_worker, pin_memory=device.type == "cuda"))

    def on_device():  # the workers end when this does, also by an error, which may live longer
        try:
            for batch in loader:
                yield batch.to(device)
        finally:
            getattr(loader, "_shutdown_workers", lambda: None)()
    return on_device()


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
