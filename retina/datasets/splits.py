"""Records -> training, validation and test, such that no eye is in two splits."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retina.datasets.descriptions import MIRRORS
from retina.datasets.records import LABELS, ClassLabel, Conflict, Record
from retina.evaluation.task_metrics import TaskMetrics
from retina.files import InputError


if TYPE_CHECKING:
    from train import Config


def connected_components(pairs: Sequence[tuple[int, int]], number: int) -> list[int]:
    """For each of `number` items the lowest item that it is connected with through `pairs`."""
    parent = list(range(number))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in pairs:
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    return [root(i) for i in range(number)]


def join_copies(records: Sequence[Record], pairs: Sequence[tuple[int, int]],
                sizes: Sequence[tuple[int, int]]) -> tuple[list[Record], list[Conflict]]:
    """Make one record of all training copies of a photograph, with the labels of all of them; -> records, conflicts.

    The image is that of the copy with most masks; `sizes` (width, height) carry points over to it. Masks belong to
    pixels: where copies of other sizes have mask files, one of each size stays as well, with its masks alone.
    Label.join decides where copies contradict each other. Photographs of other splits stay as they are: they are scored
    as they were given, and no label crosses from test into training.
    """
    groups = defaultdict(list)
    for i, component in enumerate(connected_components(pairs, len(records))):
        groups[(component, "train") if records[i].split == "train" else (i, "not joined")].append(i)
    joined, conflicts = [], []
    for group in groups.values():
        if len(group) == 1:
            joined.append(records[group[0]])
            continue
        files = {i: sum(map(bool, (records[i].masks or {}).values())) for i in group}
        first = max(group, key=files.get)
        kept = {tuple(sizes[first]): first}
        for i in filter(files.get, group):
            kept.setdefault(tuple(sizes[i]), i)
        group_sizes = {records[i].name: sizes[i] for i in group}
        for size, i in kept.items():
            labels = {}
            for name in LABELS if i == first else ["masks"]:
                if known := {r.name: r.labels[name] for r in (records[k] for k in group) if name in r.labels}:
                    labels[name], contradictions = LABELS[name].join(known, group_sizes, size)
                    conflicts += contradictions
            joined.append(replace(records[i], labels={}).with_labels(**labels))
    return joined, conflicts


def name_eyes(records: Sequence[Record], pairs: Sequence[tuple[int, int]]) -> list[Record]:
    """Give the same `eye` to all photographs that `pairs`, or an `eye` that the data set names, connect."""
    named = defaultdict(list)
    for i, record in enumerate(records):
        if record.eye:
            named[record.eye].append(i)
    pairs = [*pairs, *(pair for group in named.values() for pair in itertools.pairwise(group))]
    return [replace(r, eye=records[k].name) for r, k in zip(records, connected_components(pairs, len(records)))]


@dataclass(frozen=True)
class Split:
    """Records by what they are used for."""
    training: list[Record]
    validation: list[Record]
    test: list[Record]
    leaks: list[Record]  # photographs of training or validation that show an eye of the test split
    validated: list[Record]  # training photographs that show an eye of the data set's own validation split


def stratum(record: Record) -> tuple:
    """Grade or class, and which other labels are known; minor labels count only where there is no grade or class."""
    major, minor = ([label for label in LABELS.values() if label.minor == is_minor] for is_minor in (False, True))
    graded = any(isinstance(label, ClassLabel) and label.name in record.labels for label in major)
    return tuple(label.stratum(record.labels.get(label.name)) for label in major + ([] if graded else minor))


def assign_folds(records: Sequence[Record], number: int) -> list[int | None]:
    """Fold 0..number-1 of each record: photographs of an eye stay together, and folds share each stratum evenly.

    Greedy, as in scikit-learn's StratifiedGroupKFold: eyes come in a fixed random order, those with most photographs
    first, and each goes to the fold where it leaves the counts of its strata most even. No fold holds all eyes of a
    class (Label.classes): the last one goes to another fold than those before it, or, where there is none, to no fold.
    """
    strata = [stratum(r) for r in records]
    total = Counter(strata)
    eyes = defaultdict(list)
    for i, record in enumerate(records):
        eyes[record.eye].append(i)
    groups = [eyes[eye] for eye in sorted(eyes)]
    names = [[n for n in r.labels if not LABELS[n].last] or list(r.labels) for r in records]
    classes = [{(n, c) for i in group for n in names[i] for c in LABELS[n].classes(records[i].labels[n])}
               for group in groups]
    left = Counter(itertools.chain(*classes))  # eyes of each class that have no fold yet
    folds_of = defaultdict(set)  # class -> folds of its eyes
    order = np.random.default_rng(0).permutation(len(groups))
    counts, fold = [Counter() for _ in range(number)], [None] * len(records)
    for g in sorted(order, key=lambda g: len(groups[g]), reverse=True):
        members = Counter(strata[i] for i in groups[g])

        def fullness(f):  # of fold f: first in the strata of this eye, then in all of them
            return sum(counts[f][s] / total[s] * n for s, n in members.items()), counts[f].total()

        left.subtract(classes[g])
        best = min((f for f in range(number) if all(left[c] or folds_of[c] - {f} for c in classes[g])), key=fullness,
                   default=None)
        for c in classes[g]:
            folds_of[c].add(best)
        if best is not None:
            counts[best].update(members)
        for i in groups[g]:
            fold[i] = best
    return fold


def read_fold(text: str) -> tuple[int, int]:
    """"2/5", the second of five folds -> (2, 5). InputError: another form."""
    first, _, number = text.partition("/")
    if not re.fullmatch(r"\d{1,3}/\d{1,3}", text, re.ASCII) or not 1 <= int(first) <= int(number) >= 2:
        raise InputError(f"--fold {text[:20]}: expected I/N, fold I of N, such as 1/5; I from 1 to N, N from 2 to 999")
    return int(first), int(number)


def split(records: Sequence[Record], fold: str = "1/5", keep_leaks: bool = False) -> Split:
    """Cut the training split into training and validation (fold I of N) such that no eye is in both.

    Training photographs of an eye in the test split are left out, unless `keep_leaks`. Where the data set names its own
    validation split, that is taken, and photographs of its eyes are not trained on. InputError: `fold` is not I/N.
    """
    index, number = read_fold(fold)
    named = {name: [r for r in records if r.split == name] for name in ("train", "val", "test")}
    test_eyes, val_eyes = ({r.eye for r in named[name]} for name in ("test", "val"))
    leaks = [r for r in named["train"] + named["val"] if r.eye in test_eyes]
    if not keep_leaks:
        named |= {name: [r for r in named[name] if r.eye not in test_eyes] for name in ("train", "val")}
    has_val = bool(named["val"])
    held_out = [r.eye in val_eyes for r in named["train"]] if has_val else [
        f == index - 1 for f in assign_folds(named["train"], number)]
    training, others = ([r for r, out in zip(named["train"], held_out) if out == is_out] for is_out in (False, True))
    return Split(training, named["val"] if has_val else others, named["test"], leaks, others if has_val else [])


def hide_labels(records: Sequence[Record], share: float) -> list[Record]:
    """The records, of which a share of the eyes keep their labels: the same ones in every run.

    A larger share has all eyes of a smaller one, and of each class (see `stratum`) about as large a part.
    """
    eyes = {r.eye: stratum(r) for r in sorted(records, key=lambda r: r.name, reverse=True)}
    chance, strata, kept = np.random.default_rng(0), defaultdict(list), set()
    for eye in sorted(eyes):
        strata[eyes[eye]].append(eye)
    for _, alike in sorted(strata.items(), key=repr):
        places = (chance.permutation(len(alike)) + chance.random()) / len(alike)
        kept |= {eye for eye, place in zip(alike, places) if place < share}
    return [r if r.eye in kept else replace(r, labels={}) for r in records]


def check_labels(splits: Mapping[str, Sequence[Record]], tasks: Sequence[TaskMetrics], all_tasks: Sequence[TaskMetrics],
                 root: Path | None, why: str = "") -> None:
    """InputError: one of the `splits` has no label for one of the tasks; says which of `all_tasks` would work."""
    def labels(task):
        return {name: sum(task.labelled(r) for r in records) for name, records in splits.items()}

    for task in tasks:
        if not all(labels(task).values()):
            counts = ", ".join(f"{n} for {name}" for name, n in labels(task).items())
            possible = " ".join(t.name for t in all_tasks if all(labels(t).values()))
            hint = f"--tasks {possible} would work" if possible else "no task would work with this data"
            raise InputError(f"--tasks {task.name}: photographs with its label in {root}: {counts}{why}; expected at "
                             f"least one each; {hint}")


def describe_split(training: Sequence[Record], validation: Sequence[Record], findings: Mapping,
                   tasks: Sequence[TaskMetrics], config: Config) -> str:
    """What a run trains and validates on, what it left out, and which label conflicts it had to resolve."""
    def counts(records):
        labelled = (f"{t.name} {sum(t.labelled(r) for r in records)}" for t in tasks)
        return f"{len(records)} photographs ({', '.join(labelled)})"

    how = "as the data set says" if any(r.split == "val" for r in validation) else f"fold {config.fold}"
    use = "kept (--keep-leaks), so test scores say little about new eyes" if findings["leaks"]["kept"] else "left out"
    notes = ((findings["leaks"]["photographs"],
              f"photographs of the training split show an eye of the test split: {use}"),
             (len(findings["left_out_for_validation"]),
              "photographs of the training split show an eye of the validation split: left out"),
             (findings["without_field_of_view"],
              "training photographs have no field of view, no lit circle on dark ground: they are taken whole"),
             (len(findings["conflicts"]),
              "times copies of one photograph carry different labels; config.json lists them and what training "
              "goes by"))
    return "\n".join([f"training on {counts(training)}, validation ({how}) on {counts(validation)}",
                      *(f"{number} {note}" for number, note in notes if number), *findings["notes"],
                      *describe_classes(findings["counts"], training, tasks, config.image_size)])


def telling_tasks(counts: Mapping[str, Mapping[str, Mapping[str, int]]],
                  tasks: Sequence[TaskMetrics]) -> list[TaskMetrics]:
    """The tasks by whose primary metric the validation split can tell checkpoints apart; counts: describe_classes."""
    return [t for t in tasks if t.tells_apart(counts["validation"][t.name])]


def describe_classes(counts: Mapping[str, Mapping[str, Mapping[str, int]]], training: Sequence[Record],
                     tasks: Sequence[TaskMetrics], size: int) -> list[str]:
    """Lines on how many photographs have each class, {split: {task: {class: number}}}, and what follows."""
    learned, validated = counts["training"], counts["validation"]
    lines = [f"   {t:4} " + ("  ".join(f"{name}: {n} + {validated[t].get(name, 0)}" for name, n in classes.items())
                             if len(classes) <= 12 else f"{len(classes)} classes, {min(classes.values())} to "
                             f"{max(classes.values())} photographs of each in training")
             for t, classes in learned.items() if classes]
    for task in tasks:  # masks too small for the network's photographs
        label = LABELS[task.label]
        if isinstance(label, ClassLabel):
            continue
        filed = Counter(itertools.chain.from_iterable(map(label.classes, label.known(training))))
        lines += [f"warning: of {filed[name]} photographs with {task.name} {name}, {filed[name] - n} show none at "
                  f"{size} px; a larger --image-size keeps more"
                  for name, n in learned[task.name].items() if filed[name] > n]
    labels = {t.name: LABELS[t.label] for t in tasks}  # training mirrors photographs, and has mirror images of classes
    if lacking := [f"{t} {name}" for t, classes in learned.items() for name in classes
                   if not any(classes.get(labels[t].mirrored(name, *sides)) for sides in MIRRORS)]:
        lines.append(f"warning: training has no photograph of {', '.join(lacking)}: these are never learned")
    telling = telling_tasks(counts, tasks)
    if silent := [t.name for t in tasks if t not in telling]:
        by = f"by {' '.join(t.name for t in telling)} alone" if telling else "by the loss on validation"
        lines.append(f"warning: the validation split cannot tell checkpoints apart for {' '.join(silent)}, whose "
                     f"photographs there all have one class, no lesion or no point; epochs are chosen {by}")
    return [f"photographs with each class at {size} px, training + validation:", *lines] if lines else []
