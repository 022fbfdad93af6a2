"""Batches of photographs, each with some of the labels. Read in this order:

    AUGMENTATION           torchvision's transforms (v2), on photograph, masks and landmarks alike
    FundusDataset          samples from the cache (retina/datasets), as they are or as a Draw says
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from model import LONGEST
from retina.datasets import cache, readers, splits
from retina.datasets.descriptions import MIRRORS, mirrored, words
from retina.datasets.leaks import find_eyes
from retina.datasets.preprocess import Sample
from retina.datasets.quality import lowest_seen
from retina.datasets.records import LABELS, Label, Record
from retina.datasets.report import contact_sheets, examine, format_report
from retina.datasets.splits import check_labels
from retina.files import InputError, init_worker, run_cli
from retina.training.config import side_notes
from retina.training.distributed import SINGLE_PROCESS, World
from tasks import TASKS, Task, make_tasks


# ---- augmentation ----

# Each photograph with its masks and landmarks. Colours are float32: bytes would be cut off after each of three steps.
FLIPS = v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()  # both together are half a turn: labels bear both or neither
AUGMENTATION = v2.Compose([
    *FLIPS,
    # torchvision 0.29 flips key points about pixel centres and turns them about pixel edges, see
    # findings/torchvision_keypoints_half_turn.sh
    v2.Lambda(lambda points: tv_tensors.wrap(points + 0.5, like=points), tv_tensors.KeyPoints),
    v2.RandomAffine(30, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
    v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.0))], p=0.2),
    v2.Lambda(lambda image: (255 * image).round().to(torch.uint8), tv_tensors.Image)])  # ToDtype would cut off


def augment(sample: Sample, seed: int, flips: bool = True, crop: int | None = None) -> Sample:
    """The sample and its labels, transformed as the seed says: the same in every process and at any time.

    Without `flips` left stays left and up stays up. With `crop`, what is transformed is a part of so many pixels'
    side, with those labels that a part can have.
    """
    transform = AUGMENTATION if flips else v2.Compose(AUGMENTATION.transforms[len(FLIPS):])
    if crop is not None:  # cut before it is turned: its corners may turn black, as those of all photographs are
        transform = v2.Compose([v2.RandomCrop(crop), *transform.transforms])
        sample = replace(sample, labels={name: value for name, value in sample.labels.items() if LABELS[name].local})
    size = sample.image.shape[-1]
    known = {name: LABELS[name].to_tv_tensor(value, size) for name, value in sample.labels.items()}
    compass = tv_tensors.KeyPoints(size * torch.tensor([[0.4, 0.5], [0.6, 0.5], [0.5, 0.4], [0.5, 0.6]]),
                                   canvas_size=(size, size))  # left, right, top, bottom
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mean that contrast takes depends on their number, and a loader's worker has one
    try:
        with torch.random.fork_rng(devices=[]):  # the global generator stays as it was
            torch.default_generator.manual_seed(seed)
            image, moved, (left, right, top, bottom) = transform(tv_tensors.Image(sample.image), known, compass)
    finally:
        torch.set_num_threads(threads)
    sides = bool(left[0] > right[0]), bool(top[1] > bottom[1])  # whether they have changed places
    return replace(sample, image=image.as_subclass(Tensor), part=crop is not None, labels={
        name: LABELS[name].mirrored(LABELS[name].from_tv_tensor(value, sample.labels[name]), *sides)
        for name, value in moved.items()})


# ---- samples ----

class Draw(NamedTuple):
    """A photograph in a training step."""
    index: int  # of its record
    aug_seed: int | None  # None: as it is
    crop: bool  # a part of it, see FundusDataset


class FundusDataset(Dataset):
    """Samples of `records` at `size` pixels, from the cache.

    dataset[i] is a sample as it is, dataset[i, seed, False] the same sample augmented as the seed says, see `augment`.
    dataset[i, seed, True] is a part of the sample at `crops` times the size, augmented likewise: lesions that are too
    small for a whole sample are large enough there. InputError: a file has been removed or replaced since.
    """

    def __init__(self, records: Sequence[Record], size: int, flips: bool = True, crops: float = 1):
        self.records, self.size, self.flips, self.larger = list(records), size, flips, round(crops * size)
        self.paths = cache.ensure_cached(self.records, size)
        self.files = [cache.input_files(r) for r in self.records]
        cropped = [r for r in self.records if crops > 1 and any(LABELS[name].local for name in r.labels)]
        self.larger_paths = dict(zip((r.name for r in cropped), cache.ensure_cached(cropped, self.larger)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | Draw) -> Sample:
        i, aug_seed, crop = (index, None, False) if isinstance(index, int) else index
        cache.check_files(self.files[i])
        record = self.records[i]
        if crop:
            sample = cache.cached_sample(record, self.larger_paths[record.name], self.larger)
            return augment(sample, aug_seed, self.flips, self.size)
        sample = cache.cached_sample(record, self.paths[i], self.size)
        return sample if aug_seed is None else augment(sample, aug_seed, self.flips)

    def fingerprint(self) -> str:
        """SHA-256 over names, labels and contents of all samples."""
        return cache.fingerprint(self.records, self.paths)

    def quality(self) -> list[np.ndarray]:
        """The MEASURES (6,) of each photograph that is a file; see retina/datasets/quality.py."""
        return [cache.cached_arrays(r, path, self.size, "quality")[0] for r, path in zip(self.records, self.paths)
                if r.drawing is None]


# ---- batches ----

@dataclass
class Batch:
    """Photographs, each with some of the labels. targets[t][k] belongs to photograph indices[t][k].

    A task without a labelled photograph is in neither. Where several processes share a batch, it is in both with length
    0: norms and sums over all processes need everyone.
    """
    images: Tensor  # (B, 3, S, S) uint8
    targets: dict[str, Tensor]  # task -> (n_t, ...)
    indices: dict[str, Tensor]  # task -> (n_t,) int64, ascending
    names: list[str]
    eyes: list[str]  # the eye that each shows
    whole: Tensor  # (w,) int64, ascending: the photographs that are no parts

    def apply(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to each tensor."""
        return replace(self, images=change(self.images), whole=change(self.whole),
                       targets={t: change(x) for t, x in self.targets.items()},
                       indices={t: change(x) for t, x in self.indices.items()})

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self.apply(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, whose copies to a GPU are asynchronous (called by DataLoader)."""
        return self.apply(Tensor.pin_memory)


def collate(samples: Sequence[Sample], tasks: Sequence,
            empty_targets: Mapping[str, Tensor] = MappingProxyType({})) -> Batch:
    """Stack samples, and for each task the targets of those that carry its label; see `make_empty_targets`."""
    indices, targets = {}, {}
    for t in tasks:
        if labelled := [i for i, s in enumerate(samples) if t.labelled(s)]:
            indices[t.name] = torch.tensor(labelled)
            targets[t.name] = torch.stack([t.target(samples[i]) for i in labelled])
        elif t.name in empty_targets:
            indices[t.name], targets[t.name] = torch.zeros(0, dtype=torch.int64), empty_targets[t.name]
    return Batch(torch.stack([s.image for s in samples]), targets, indices, [s.name for s in samples],
                 [s.eye for s in samples], torch.tensor([not s.part for s in samples]).nonzero()[:, 0])


class MultiTaskBatchSampler:
    """Which photographs meet in which training step; a step is a list of Draws.

    Each photograph belongs to the rarest of its `tasks`, the one that fewest are labelled for. Those without a label
    are left out, or, where they are there for teachers to answer (`unlabelled`), one more group. Every step takes from
    each group in proportion to the square root of its size: proportional sampling would show too few of the rare
    photographs with masks, equal sampling would repeat them too often (the temperature T = 2 of Arivazhagan et al.
    2019, arXiv 1907.05019, section 4.2). Within a group all come equally often, and each pass through it has a new
    order. Everything is a function of (seed, step): a step can be reproduced without those before it.

    With `crops`, a photograph is a part of itself every second time, if it has a label that its parts have as well.

    `wanted` keeps only the photographs with a label for one of these tasks. A network for one task then sees its
    photographs in the same steps, and augmented in the same way, as a network for all `tasks`.
    """

    def __init__(self, records: Sequence[Record], tasks: Sequence, batch: int, seed: int, augmented: bool,
                 wanted: Sequence | None = None, crops: bool = False, unlabelled: bool = False):
        self.labelled = {t.name: {i for i, r in enumerate(records) if t.labelled(r)} for t in tasks}
        groups, left = {}, set().union(*self.labelled.values())
        for name, members in sorted(self.labelled.items(), key=lambda item: len(item[1])):  # the rarest first
            groups[name], left = sorted(members & left), left - members
        self.unlabelled = set(range(len(records))).difference(*self.labelled.values()) if unlabelled else set()
        groups["unlabelled"] = sorted(self.unlabelled)
        self.groups = {name: groups[name] for name in sorted(groups) if groups[name]}
        self.seed, self.augmented, self.crops = seed, augmented, crops and augmented
        self.local = {t.name for t in tasks if LABELS[t.label].local}
        self.wanted = {t.name for t in (tasks if wanted is None else wanted)}
        if batch < len(self.groups):
            raise InputError(f"--batch-size {batch}: every step takes photographs for each of "
                             f"{' '.join(self.groups)}; use at least {len(self.groups)}")
        weights = np.sqrt([len(group) for group in self.groups.values()])
        # one photograph of each group, the others of the batch by the largest remainder
        shares = (batch - len(self.groups)) * weights / weights.sum()
        self.quota = 1 + np.floor(shares).astype(int)
        for k in np.argsort(np.floor(shares) - shares, kind="stable")[:batch - self.quota.sum()]:
            self.quota[k] += 1
        # steps of an epoch: until the group that takes longest has shown each of its photographs once
        self.per_epoch = max(math.ceil(len(group) / q) for group, q in zip(self.groups.values(), self.quota))
        self.order = lru_cache(2 * len(self.groups))(self.order)

    def order(self, k: int, cycle: int) -> np.ndarray:
        """The order of the k-th group in its pass number `cycle`."""
        return np.random.default_rng((self.seed, k, cycle)).permutation(len([*self.groups.values()][k]))

    def tasks_of(self, draw: Draw) -> set[str]:
        """The tasks that learn from a photograph, or from a part of it."""
        return {name for name, members in self.labelled.items()
                if draw.index in members and (name in self.local or not draw.crop)}

    def step(self, number: int) -> list[Draw]:
        """The photographs of training step `number`, counted from 0: at least one for every task."""
        draws = []
        for k, (group, quota) in enumerate(zip(self.groups.values(), self.quota)):
            for position in range(number * quota, (number + 1) * quota):
                cycle, place = divmod(position, len(group))
                aug_seed = int(np.random.SeedSequence((self.seed, k, position)).generate_state(1)[0])
                draw = Draw(group[self.order(k, cycle)[place]], aug_seed if self.augmented else None, False)
                crop = self.crops and aug_seed % 2 == 1 and bool(self.tasks_of(draw) & self.local)
                draws.append(draw._replace(crop=crop))
        for name, members in self.labelled.items():
            if not any(name in self.tasks_of(draw) for draw in draws):  # its only ones are parts, or there are none
                index = next((draw.index for draw in draws if draw.index in members),
                             sorted(members)[number % len(members)])
                draws = [draw for draw in draws if draw.index != index] + [Draw(index, draws[0].aug_seed, False)]
        return [draw for draw in draws if self.tasks_of(draw) & self.wanted or draw.index in self.unlabelled]

    def range(self, start: int, stop: int, rank: int = 0, size: int = 1) -> Iterator[list[Draw]]:
        """Steps start..stop-1; of each step the share of process `rank` of `size`, as even as possible."""
        return (self.step(number)[rank::size] for number in range(start, stop))

    def photographs_in(self, epoch: int) -> int:
        """How many photographs an epoch, counted from 0, takes."""
        return sum(map(len, self.range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch)))


def make_empty_targets(dataset: FundusDataset, tasks: Sequence) -> dict[str, Tensor]:
    """{task: target of no photograph (0, ...)}, for a process whose share of a step has no label of the task."""
    firsts = {t: next(i for i, r in enumerate(dataset.records) if t.labelled(r)) for t in tasks}
    return {t.name: t.target(dataset[i])[None][:0] for t, i in firsts.items()}


def eval_loader(dataset: Dataset, tasks: Sequence[Task], batch: int, world: World = SINGLE_PROCESS) -> DataLoader:
    """Batches of all photographs, once and without augmentation; of several processes each has its share of batches."""
    batches = list(BatchSampler(SequentialSampler(dataset), batch, drop_last=False))[world.rank::world.size]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=partial(collate, tasks=tasks))


def train_loader(dataset: FundusDataset, batches, tasks: Sequence[Task], device: torch.device,
                 workers: int, empty_targets: Mapping[str, Tensor]) -> Iterator[Batch]:
    """Batches on a device; `batches` are lists of indices of `dataset`, see MultiTaskBatchSampler.range."""
    loader = iter(DataLoader(  # before anything else: it takes a number from torch's generator
        dataset, batch_sampler=batches, collate_fn=partial(collate, tasks=tasks, empty_targets=empty_targets),
        num_workers=workers, worker_init_fn=init_worker, pin_memory=device.type == "cuda"))

    def on_device():  # its end, also by an error, ends the workers
        try:
            for batch in loader:
                yield batch.to(device)
        finally:
            getattr(loader, "_shutdown_workers", lambda: None)()
    return on_device()


# ---- training and validation ----

def count_classes(dataset: FundusDataset, tasks: Sequence[Task]) -> dict[str, dict[str, int]]:
    """{task: {class: how many photographs have it}}, as targets say, which is what losses and measures see."""
    counts = {t.name: {} for t in tasks}
    for i, record in enumerate(dataset.records):
        known = [t for t in tasks if t.labelled(record)]
        in_record = all(type(LABELS[t.label]).to_sample is Label.to_sample for t in known)
        labelled = record if in_record else dataset[i]  # nothing to decode
        for t in known:
            for name, has in t.classes_in(t.target(labelled)).items():
                counts[t.name][name] = counts[t.name].get(name, 0) + has
    return counts


def vocabulary(training: Sequence[Record], validation: Sequence[Record], flips: bool) -> tuple[list[str], str]:
    """The words that at least two texts of training have, most frequent first; and a line on those that it lacks.

    With `flips` a text has the words of its mirror images, too.
    """
    images = MIRRORS if flips else MIRRORS[:1]
    counts = Counter(word for r in training if r.text
                     for word in set().union(*(words(mirrored(r.text, *sides)) for sides in images)))
    known = sorted((w for w, n in counts.items() if n > 1), key=lambda w: (-counts[w], w))
    learned = set(known)
    lost = [w for r in validation if r.text for w in words(r.text) if w not in learned]
    longest = max((len(words(r.text)) for r in training if r.text), default=0)
    return known, (f"text: {len(known)} words, in texts of up to {longest}; {len(counts) - len(known)} of training, "
                   f"which a single text has, and {len(lost)} of validation count as unknown" +
                   f"; what comes after {LONGEST - 1} words is cut off" * (longest >= LONGEST))


def load_datasets(config, tasks: Sequence[Task]) -> tuple[FundusDataset, FundusDataset, dict]:
    """Training and validation photographs, and findings: leaks, classes, contradicting labels, notes, and what later
    photographs are held against: the fingerprint of the test split, the lowest quality that training sees. Also the
    names of the data set's own classes and signs, and the words of training; see make_tasks.

    `config` is train.py's Config. InputError: no photograph of training or of validation has a label for a task, or
    nothing is left of its labels in training.
    """
    root = None if config.data is None else Path(config.data)
    data_set = readers.read_data(root)
    records = data_set.records
    all_tasks = make_tasks(TASKS, data_set.names(LABELS))
    check_labels({"training": [r for r in records if r.split != "test"]}, tasks, all_tasks, root)  # before decoding
    unlabelled = [] if config.unlabelled is None else readers.read_unlabelled(Path(config.unlabelled))
    joined, conflicts, notes = find_eyes([*records, *unlabelled], config.image_size, config.ignore_eyes)
    split = splits.split(joined, config.fold, config.keep_leaks)
    check_labels({"training": split.training, "validation": split.validation}, tasks, all_tasks, root,
                 f" (of {sum(r.split != 'test' for r in joined)} photographs, {len(split.leaks)} show an eye of the "
                 "test split)")
    sampled = [*tasks, *make_tasks(config.sampling_tasks, config.names)]
    hidden = splits.hide_labels(split.training, config.labelled)  # whatever the tasks, those of the same eyes
    labelled, all_labelled, validation, test, leaks = (
        [r for r in records if any(t.labelled(r) for t in wanted)] for records, wanted in (
            (hidden, sampled), (split.training, sampled), (split.validation, tasks), (split.test, tasks),
            (split.leaks, tasks)))
    judged = {r.eye for r in split.validation + split.test}
    if config.labelled < 1:
        notes.append(f"--labelled {config.labelled:g}: {len(labelled)} of {len(all_labelled)} photographs keep their "
                     "labels")
        check_labels({"training": labelled}, tasks, all_tasks, root, notes[-1])
    usable = [r for r in joined if r.split == "unlabelled" and r.eye not in judged]
    if unlabelled:
        notes.append(f"{len(usable)} of {len(unlabelled)} photographs without labels are used; the others show an eye "
                     "of the validation or test split")
    training = [*hidden, *usable] if config.teachers else labelled
    validated = [r.name for r in split.validated if any(t.labelled(r) for t in tasks)]
    names = data_set.names([t.label for t in sampled])
    findings = {"leaks": {"kept": config.keep_leaks, "photographs": len(leaks), "names": [r.name for r in leaks],
                          **{t.name: sum(t.labelled(r) for r in leaks) for t in tasks}}, "names": names,
                "judged": [r for r in joined if r.eye in judged],
                "left_out_for_validation": validated, "conflicts": [c.as_dict() for c in conflicts],
                "notes": notes}
    crops = config.crops if config.augment and any(LABELS[t.label].local for t in tasks) else 1
    if any(t.label == "text" for t in sampled):
        names["text"], said = vocabulary(training, validation, config.augment and config.flips)
        notes.append(said)
    tasks = make_tasks([t.name for t in tasks], names)
    if config.augment and config.flips:
        notes += side_notes(tasks)
    datasets = {"training": FundusDataset(training, config.image_size, config.flips, crops),
                "validation": FundusDataset(validation, config.image_size)}
    findings["counts"] = {name: count_classes(dataset, tasks) for name, dataset in datasets.items()}
    for t, counts in findings["counts"]["training"].items():
        if counts and not any(counts.values()):
            raise InputError(f"--tasks {t}: at {config.image_size} px no training photograph shows any of "
                             f"{' '.join(counts)}; expected some: do all its masks say none or lie in the dark "
                             f"ground, or is --image-size too small? look at {root} with data.py")
    # as evaluate.py takes them: another order in a table makes no other photographs of them; drawings never change
    test_set = [] if root is None else sorted(test, key=lambda r: r.name)
    measured = datasets["training"].quality()
    findings |= {"test": FundusDataset(test_set, config.image_size).fingerprint(), "seen": lowest_seen(measured),
                 "without_field_of_view": sum(not field for field, *_ in measured)}
    return *datasets.values(), findings


# ---- command line ----

def main(argv: Sequence[str] | None = None) -> None:
    """python data.py PATH: examine a data set. It writes only the cache, and pictures if asked to."""
    parser = argparse.ArgumentParser(description="Examine a data set before training on it.")
    parser.add_argument("data", nargs="?", help="IDRiD's folder, a table FILE.csv, or a folder with train/CLASS/ in it "
                                                "(default: data/IDRiD if it exists, else drawn photographs)")
    parser.add_argument("--fold", default="1/5", help="show the split with this fold for validation (default: 1/5)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER",
                        help="write a contact sheet for each sort of finding")
    args = parser.parse_args(argv)
    splits.read_fold(args.fold)
    if args.pictures is not None and args.pictures.exists() and not args.pictures.is_dir():
        raise InputError(f"--pictures {args.pictures}: a file; expected a folder, which may be new")
    root = readers.find_data(args.data)
    report, sheets = examine(readers.read_data(root), root, args.fold)
    print(json.dumps(report, indent=1) if args.json else format_report(report))
    if args.pictures is not None:
        print("\n".join(["", *contact_sheets(sheets, args.pictures)]), file=sys.stderr if args.json else sys.stdout)
    if problems := report["unreadable"]:
        raise InputError(f"{root}: {len(problems)} of its photographs cannot be used, see above; train.py would refuse "
                         "them: replace the files, or remove them and their labels")


if __name__ == "__main__":
    run_cli(main)
