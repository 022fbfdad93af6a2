"""Records -> training, validation and test, such that no eye lies on two sides."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retina.datasets.records import LABELS, ClassLabel, Conflict, Record
from retina.evaluation.task_metrics import TaskMetrics
from retina.files import InputError


def connected(pairs: Sequence[tuple[int, int]], number: int) -> list[int]:
    """For each of `number` items the lowest item that it is connected with through `pairs`."""
    leader = list(range(number))

    def find(i):
        while leader[i] != i:
            i = leader[i]
        return i

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        leader[b] = a
    return [find(i) for i in range(number)]


def join_copies(records: Sequence[Record], pairs: Sequence[tuple[int, int]],
                sizes: Sequence[tuple[int, int]]) -> tuple[list[Record], list[Conflict]]:
    """Make one record of all training copies of a photograph, with the labels of all of them; -> records, conflicts.

    The image is that of the copy with most masks; `sizes` (width, height) carry points over to it. What counts where
    copies contradict each other, each label says itself: Label.join. Photographs of other parts stay as they are: they
    are scored as they were given, and no label crosses from test into training.
    """
    groups = defaultdict(list)
    for i, leader in enumerate(connected(pairs, len(records))):
        groups[(leader, "train") if records[i].split == "train" else (i, "alone")].append(i)
    joined, conflicts = [], []
    for group in groups.values():
        if len(group) == 1:
            joined.append(records[group[0]])
            continue
        first = max(group, key=lambda i: sum(map(bool, (records[i].masks or {}).values())))
        own, labels = {records[i].name: sizes[i] for i in group}, {}
        for name, label in LABELS.items():
            if known := {r.name: r.labels[name] for r in (records[i] for i in group) if name in r.labels}:
                labels[name], contradictions = label.join(known, own, sizes[first])
                conflicts += contradictions
        joined.append(records[first].with_labels(**labels))
    return joined, conflicts


def name_eyes(records: Sequence[Record], pairs: Sequence[tuple[int, int]]) -> list[Record]:
    """Give all photographs that `pairs`, or an `eye` that the data set names, connect the same `eye`."""
    said = defaultdict(list)
    for i, record in enumerate(records):
        if record.eye:
            said[record.eye].append(i)
    known = [pair for group in said.values() for pair in itertools.pairwise(group)]
    return [replace(r, eye=records[k].name) for r, k in zip(records, connected([*pairs, *known], len(records)))]


@dataclass(frozen=True)
class Split:
    """Records by what they are for."""
    training: list[Record]
    validation: list[Record]
    test: list[Record]
    leaks: list[Record]  # photographs to train or validate on that show an eye of the test split
    validated: list[Record]  # training photographs that show an eye of a validation split of the data set's own


def stratum(record: Record) -> tuple:
    """Grade or class, and what else is known; minor labels decide for photographs without a grade or class."""
    major, minor = ([label for label in LABELS.values() if label.minor == which] for which in (False, True))
    graded = any(isinstance(label, ClassLabel) and label.name in record.labels for label in major)
    return tuple(label.stratum(record.labels.get(label.name)) for label in major + ([] if graded else minor))


def folds(records: Sequence[Record], number: int) -> list[int]:
    """Fold 0..number-1 of each record: eyes stay whole, and every fold gets its share of each stratum.

    Greedy, as in scikit-learn's StratifiedGroupKFold: eyes in random order, always the same, those with most
    photographs first; each goes where it leaves the counts of its strata most even.
    """
    strata = [stratum(r) for r in records]
    total = Counter(strata)
    eyes = defaultdict(list)
    for i, record in enumerate(records):
        eyes[record.eye].append(i)
    groups = [eyes[eye] for eye in sorted(eyes)]
    order = np.random.default_rng(0).permutation(len(groups))
    counts, fold = [Counter() for _ in range(number)], [0] * len(records)
    for group in sorted((groups[g] for g in order), key=len, reverse=True):
        members = Counter(strata[i] for i in group)

        def crowded(f):  # how full fold f already is, in the strata of this eye first, in all of them second
            return sum(counts[f][s] / total[s] * n for s, n in members.items()), counts[f].total()

        best = min(range(number), key=crowded)
        counts[best].update(members)
        for i in group:
            fold[i] = best
    return fold


def read_fold(text: str) -> tuple[int, int]:
    """"2/5", the second of five folds -> (2, 5). InputError: another form."""
    first, _, number = text.partition("/")
    if not re.fullmatch(r"\d{1,3}/\d{1,3}", text, re.ASCII) or not 1 <= int(first) <= int(number) >= 2:
        raise InputError(f"--fold {text[:20]}: expected I/N, fold I of N, such as 1/5; I from 1 to N, N from 2 to 999")
    return int(first), int(number)


def split(records: Sequence[Record], fold: str = "1/5", keep_leaks: bool = False) -> Split:
    """Cut the training split into training and validation (fold I of N) such that no eye lies on both sides.

    Training photographs of an eye in the test split are left out, unless `keep_leaks`. Where the data set names its own
    validation split, that is taken, and photographs of its eyes never train. InputError: `fold` has no such form.
    """
    index, number = read_fold(fold)
    parts = {part: [r for r in records if r.split == part] for part in ("train", "val", "test")}
    tested, validated = ({r.eye for r in parts[part]} for part in ("test", "val"))
    leaks = [r for r in parts["train"] + parts["val"] if r.eye in tested]
    if not keep_leaks:
        parts |= {part: [r for r in parts[part] if r.eye not in tested] for part in ("train", "val")}
    given = bool(parts["val"])
    aside = [r.eye in validated for r in parts["train"]] if given else [
        f == index - 1 for f in folds(parts["train"], number)]
    training, others = ([r for r, a in zip(parts["train"], aside) if a == side] for side in (False, True))
    return Split(training, parts["val"] if given else others, parts["test"], leaks, others if given else [])


def check_labels(parts: Mapping[str, Sequence[Record]], tasks: Sequence[TaskMetrics], everything: Sequence[TaskMetrics],
                 root: Path | None, why: str = "") -> None:
    """InputError: one of the `parts` has no label for one of the tasks; says which of `everything` would work."""
    def labels(task):
        return {name: sum(task.labelled(r) for r in part) for name, part in parts.items()}

    for task in tasks:
        if not all(labels(task).values()):
            counts = ", ".join(f"{n} for {name}" for name, n in labels(task).items())
            possible = " ".join(t.name for t in everything if all(labels(t).values()))
            hint = f"--tasks {possible} would work" if possible else "no task would work with this data"
            raise InputError(f"--tasks {task.name}: photographs with its label in {root}: {counts}{why}; expected at "
                             f"least one each; {hint}")


def announcement(training: Sequence[Record], validation: Sequence[Record], findings: Mapping,
                 tasks: Sequence[TaskMetrics], fold: str) -> str:
    """What a run is about to learn from, what it left out, and what it had to decide."""
    def described(records):
        labelled = (f"{t.name} {sum(t.labelled(r) for r in records)}" for t in tasks)
        return f"{len(records)} photographs ({', '.join(labelled)})"

    how = "as the data set says" if any(r.split == "val" for r in validation) else f"fold {fold}"
    kept = "kept (--keep-leaks), so test scores say little about new eyes" if findings["leaks"]["kept"] else "left out"
    found = ((findings["leaks"]["photographs"],
              f"photographs of the training split show an eye of the test split: {kept}"),
             (len(findings["left_out_for_validation"]),
              "photographs of the training split show an eye of the validation split: left out"),
             (len(findings["conflicts"]),
              "times copies of one photograph carry different labels; config.json lists them and what training "
              "goes by"))
    return "\n".join([f"training on {described(training)}, validation ({how}) on {described(validation)}",
                      *(f"{number} {words}" for number, words in found if number)])
