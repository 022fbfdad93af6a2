"""What is known of each photograph before it is opened: paths and labels. To add a label, declare it in LABELS."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from retina.datasets.synthetic import LESIONS
from retina.files import InputError, image_size


HERE = Path(__file__).parents[2]  # the project's folder: data/ and runs/ lie in it
LANDMARKS = ("disc", "fovea")  # centres of the optic disc and of the fovea
GRADES, EDEMA_RISKS = 5, 3
UNKNOWN = 255  # in a mask: whether this kind of lesion is there is not known
LESION_NAMES = dict(zip(LESIONS, ("microaneurysms", "haemorrhages", "hard exudates", "soft exudates", "optic disc")))
LESION_COLOURS = dict(zip(LESIONS, ((86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66))))

# n photographs, L lesion classes (LESIONS), P points (POINTS), S side of the photograph in pixels


# ---- what may be known of a photograph ----

@dataclass(frozen=True)
class Conflict:
    """Files of one photograph that carry different labels of one kind."""
    label: str  # the name of a label, a point, or a kind of mask
    names: tuple[str, ...]
    values: tuple
    used: object  # what training goes by; None: nothing

    def as_dict(self, classes: Sequence[str]) -> dict:
        """As plain types, categories by their names."""
        label = LABELS.get(self.label)
        values = [v if v is None or label is None else label.display(v, classes) for v in (*self.values, self.used)]
        return {"label": self.label, "photographs": list(self.names), "values": values[:-1], "used": values[-1]}


@dataclass(frozen=True)
class TableRow:
    """A row of a table."""
    folder: Path  # of the table
    where: str  # for messages
    cells: Mapping[str, str]  # column -> text, also of columns that the table does not have

    def what(self, column: str) -> str:
        """A cell, for messages."""
        return f"{self.where}: {column} of {self.cells['image']}"

    def file(self, column: str) -> Path:
        """The file that a cell names. InputError: it is not there, or not below the table's folder."""
        within, what = Path(os.path.normpath(self.cells[column])), f"{self.where}: {column} {self.cells[column]!r}"
        file = self.folder / within
        if within.is_absolute() or within.parts[:1] == ("..",):
            raise InputError(f"{what}: leads out of {self.folder}; expected a path below the folder of the table; move "
                             "the table above its files")
        if not file.is_file():
            problem = "a folder" if file.is_dir() else "no such file"
            raise InputError(f"{what}: {problem}: {file}; expected a file, its path relative to the table")
        return file


@dataclass(frozen=True)
class Label:
    """Something that may be known of a photograph, and all that is done with it but learning.

    Its value in a Record is of a type that can be compared and stored; a label that is not known is not there.
    """
    name: str
    task: str  # that learns from it, for reports
    columns: tuple[str, ...] = ()  # of tables
    minor: bool = False  # folds heed it only in photographs without a class
    section = ""  # of reports

    def parse(self, text: str, what: str) -> Any:
        """A value from the text of its one cell; `what` names the cell. InputError: it is no such label."""
        raise NotImplementedError

    def read(self, row: TableRow) -> Any:
        """A value from a row of a table; None: not known. InputError: see `parse`."""
        for column in self.columns:
            if row.cells[column]:
                return self.parse(row.cells[column], row.what(column))

    def settle(self, values: Sequence) -> Any:
        """What counts where copies of a photograph contradict each other; None: nothing."""
        return None

    def join(self, known: Mapping[str, Any], sizes: Mapping[str, Sequence[int]],
             size: Sequence[int]) -> tuple[Any, list[Conflict]]:
        """One value from those of copies, by their names, for the copy that stays; -> value or None, conflicts.

        `sizes` are width and height of the copies' files, `size` of the one that stays.
        """
        values = tuple(known.values())
        if values.count(values[0]) == len(values):
            return values[0], []
        used = self.settle(values)
        return used, [Conflict(self.name, tuple(known), values, used)]

    def to_sample(self, value: Any, arrays: Mapping[str, np.ndarray], place: Callable, size: int) -> Any:
        """What a Sample of `size` pixels holds, from a record's value and what the cache has of it.

        `place` makes points (..., 2) in pixels of the sample of those in pixels of the file.
        """
        return value

    def to_tv_tensor(self, value: Any, size: int) -> Any:
        """What of a sample's value torchvision's transforms move with the photograph, which is `size` pixels wide."""
        return value

    def from_tv_tensor(self, value: Any, before: Any) -> Any:
        """A sample's value after the transforms, from what it has become and what it was."""
        return value

    def fingerprint(self, value: Any) -> Any:
        """What of a value a run hangs on, beside the contents of cache files."""
        return value

    def stratum(self, value: Any) -> Any:
        """What of a value, or of None, every fold gets its share of."""
        return value is not None

    def display(self, value: Any, classes: Sequence[str]) -> Any:
        """A value in reports; `classes` are the names of the data set's own."""
        return value

    def summary(self, records: Sequence[Record], classes: Sequence[str]) -> dict:
        """What a report says of records in the `section` of such labels, as plain types; {}: nothing."""
        return {}

    def lines(self, summary: Mapping) -> list[str]:
        """The same in words, from what its `section` of the report holds."""
        return []

    def known(self, records: Sequence[Record]) -> list:
        """The values that records have."""
        return [r.labels[self.name] for r in records if self.name in r.labels]


@dataclass(frozen=True)
class ClassLabel(Label):
    """A whole number 0..number-1 for the whole photograph; without `number` one of the data set's own classes."""
    number: int | None = None
    section = "classes"

    def parse(self, text, what):
        """ "2.0", as spreadsheets write it, is 2."""
        if text.removesuffix(".0") not in map(str, range(self.number)):
            raise InputError(f"{what} is {text!r}, expected a whole number from 0 to {self.number - 1}")
        return int(text.removesuffix(".0"))

    def settle(self, values):
        """The higher grade: the photograph was graded twice, and missing disease is the worse mistake."""
        return max(values) if self.number else None

    def stratum(self, value):
        return value

    def display(self, value, classes):
        return value if self.number else classes[value]

    def summary(self, records, classes):
        """How often each class occurs, and what a constant guess scores."""
        counts = Counter(self.known(records))
        if not counts:
            return {}
        names = {v: str(self.display(v, classes)) for v in sorted(counts)}
        guess, right = max(counts.items(), key=lambda item: (item[1], -item[0]))
        return {self.name: {"counts": {names[v]: counts[v] for v in names}, "constant_guess": names[guess],
                            "constant_accuracy": round(right / counts.total(), 4)}}

    def lines(self, summary):
        shares = summary.get(self.name, {"counts": {}})
        total = sum(shares["counts"].values())
        return [f"    {self.name:9}" + "  ".join(f"{v}: {n} ({n / total:.0%})" for v, n in shares["counts"].items()) +
                f"   always guessing {shares['constant_guess']} is right for {shares['constant_accuracy']:.1%}"
                ] if total else []


@dataclass(frozen=True)
class NumberLabel(Label):
    """A number for the whole photograph, from `lowest` to `highest`; where copies differ their mean counts."""
    lowest: float = -math.inf
    highest: float = math.inf
    unit: str = ""
    section = "numbers"

    def parse(self, text, what):
        value = number(text)
        if not (math.isfinite(value) and self.lowest <= value <= self.highest):
            raise InputError(f"{what} is {text!r}, expected a number from {self.lowest:g} to {self.highest:g}"
                             + f" ({self.unit})" * bool(self.unit))
        return value

    def settle(self, values):
        return fmean(values)

    def summary(self, records, classes):
        """The range, and by how much a guess of the mean is wrong on average."""
        values = self.known(records)
        mean = fmean(values) if values else 0.0
        return {self.name: {"lowest": min(values), "highest": max(values), "mean": round(mean, 4), "constant_error":
                            round(fmean(abs(v - mean) for v in values), 4)}} if values else {}

    def lines(self, summary):
        return [f"    {self.name:9}" + "{lowest:g} to {highest:g}{unit}   always guessing the mean, {mean:.4g}, is "
                "wrong by {constant_error:.3g} on average".format(**summary[self.name], unit=f" {self.unit}".rstrip())
                ] if self.name in summary else []


@dataclass(frozen=True)
class LandmarkLabel(Label):
    """Points in pixels of the file, {kind: (x, y)}; one that is absent is not known. Two columns for each, x and y.

    In samples (P, 2) float32, x and y in pixels of the sample; nan: not known, or out of the picture.
    """
    kinds: tuple[str, ...] = ()

    def read(self, row):
        found = {kind: read_point(row.cells[x], row.cells[y], row.file("image"), row.what(x.removesuffix("_x")))
                 for kind, x, y in zip(self.kinds, self.columns[::2], self.columns[1::2])}
        return {kind: point for kind, point in found.items() if point} or None

    def join(self, known, sizes, size):
        """Points of each copy are carried over to the one that stays; different ones count by their mean."""
        points, conflicts = {}, []
        for kind in dict.fromkeys(k for value in known.values() for k in value):
            places = {name: np.multiply(value[kind], np.divide(size, sizes[name]))
                      for name, value in known.items() if kind in value}
            points[kind] = tuple(np.mean(list(places.values()), 0).tolist())
            if np.ptp(list(places.values()), 0).max() > 0.01 * size[0]:
                values = tuple(tuple(v.round(1).tolist()) for v in places.values())
                conflicts.append(Conflict(kind, tuple(places), values, points[kind]))
        return points, conflicts

    def to_sample(self, value, arrays, place, size):
        there = np.array([value.get(kind, (math.nan, math.nan)) for kind in self.kinds])
        return inside(torch.from_numpy(place(there)).float(), size)

    def to_tv_tensor(self, value, size):
        return tv_tensors.KeyPoints(value - 0.5, canvas_size=(size, size))  # as torchvision flips: about pixel centres

    def from_tv_tensor(self, value, before):
        return inside(value.as_subclass(Tensor), value.canvas_size[0])


@dataclass(frozen=True)
class MaskLabel(Label):
    """Masks, {kind: file, or None where the kind was looked for and is not there}; one that is absent is not known.

    In samples (L, S, S) uint8: 0, 1, or UNKNOWN for all pixels of a kind. preprocess.preprocess reads the files.
    """
    kinds: tuple[str, ...] = ()
    section = "masks"

    def __post_init__(self):
        if self.name != "masks":
            raise ValueError(f"LABELS: {self.name}: the cache keeps pictures of one label, which is 'masks'; expected "
                             "another lesion class in it, or a label that is no picture")

    def read(self, row):
        return {kind: None if row.cells[column].lower() == "none" else row.file(column)
                for kind, column in zip(self.kinds, self.columns) if row.cells[column]} or None

    def join(self, known, sizes, size):
        """Masks of the copies of one size, since masks are drawn on pixels; a file beats "none", the first counts."""
        masks, conflicts = {}, []
        for kind in dict.fromkeys(k for value in known.values() for k in value):
            files = {name: value[kind] for name, value in known.items()
                     if kind in value and tuple(sizes[name]) == tuple(size)}
            if files:
                masks[kind] = next(filter(None, files.values()), None)
            if len(set(files.values())) > 1:
                values = tuple("none" if path is None else str(path) for path in files.values())
                conflicts.append(Conflict(kind, tuple(files), values, str(masks[kind])))
        return masks or None, conflicts

    def to_sample(self, value, arrays, place, size):
        bits = np.unpackbits(arrays["masks"], count=len(self.kinds) * size * size)
        masks = torch.from_numpy(bits.reshape(len(self.kinds), size, size))
        masks[[kind not in value for kind in self.kinds]] = UNKNOWN
        return masks

    def to_tv_tensor(self, value, size):
        return tv_tensors.Mask(value)

    def from_tv_tensor(self, value, before):
        """A mask that is not known stays so, with its border; where another has moved away, it is 0."""
        return torch.where(before[:, :1, :1] == UNKNOWN, UNKNOWN, value.as_subclass(Tensor))

    def fingerprint(self, value):
        return sorted(value)

    def summary(self, records, classes):
        """How many files there are of each kind; nothing of drawings."""
        values = self.known([r for r in records if r.image])
        return {kind: {"masks": sum(bool(v.get(kind)) for v in values),
                       "none": sum(kind in v and v[kind] is None for v in values)}
                for kind in self.kinds} if values else {}

    def lines(self, summary):
        counts = [f"{kind}: {n['masks']}" + f" ({n['none']} have none)" * bool(n["none"])
                  for kind in self.kinds if (n := summary.get(kind))]
        return [f"    {self.name:9}" + "  ".join(counts)] if counts else []


def number(text: str) -> float:
    """A cell's number; nan if it is none."""
    try:
        return float(text.replace("_", "x"))  # Python would read 1_0 as 10
    except ValueError:
        return math.nan


def read_point(x: str, y: str, image: Path, what: str) -> tuple[float, float] | None:
    """A point from its two cells; None where both are empty. InputError: no number, only one, outside its image."""
    if not x and not y:
        return None
    point = number(x), number(y)
    if not all(map(math.isfinite, point)):
        raise InputError(f"{what} is at ({x!r}, {y!r}), expected two numbers, in pixels of the image file")
    size = image_size(image)
    if size is not None and not (0 <= point[0] <= size[0] and 0 <= point[1] <= size[1]):
        raise InputError(f"{what} is at ({x}, {y}), outside {image.name} with its {size[0]}x{size[1]} pixels; expected "
                         "pixels of the image file")
    return point


def inside(points: Tensor, size: int) -> Tensor:
    """Points (P, 2) with nan in place of those that lie outside of the picture."""
    return points.masked_fill(((points < 0) | (points > size)).any(1, keepdim=True), math.nan)


LABELS: dict[str, Label] = {label.name: label for label in (
    ClassLabel("grade", "cls", ("grade",), number=GRADES),  # of diabetic retinopathy
    ClassLabel("edema_risk", "dme", ("edema_risk",), minor=True, number=EDEMA_RISKS),  # risk of macular edema
    ClassLabel("category", "cls"),  # the photograph's folder, in data sets that are folders of classes
    LandmarkLabel("landmarks", "loc", ("disc_x", "disc_y", "fovea_x", "fovea_y"), minor=True, kinds=LANDMARKS),
    MaskLabel("masks", "seg", tuple(f"mask_{kind.lower()}" for kind in LESIONS), kinds=LESIONS))}


# ---- photographs ----

class Labelled:
    """What has `labels`; record.grade is record.labels.get("grade"), and so for every name in LABELS."""
    labels: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in LABELS:
            return self.labels.get(name)
        raise AttributeError(f"{type(self).__name__!r} has neither a field nor a label {name!r}")

    def with_labels(self, **labels: Any) -> Labelled:
        """The same with other values of these labels; None: not known."""
        return replace(self, labels={k: v for k, v in {**self.labels, **labels}.items() if v is not None})


@dataclass(frozen=True)
class Record(Labelled):
    """Paths and labels of one photograph."""
    name: str  # unique in the data set, e.g. "grading/IDRiD_001"; those of the test split begin with "test/"
    image: Path | None  # None: drawn
    split: str = "train"  # "train", "val" (where the data set says so itself) or "test"
    labels: dict[str, Any] = field(default_factory=dict, hash=False)  # name in LABELS -> value; what is known
    eye: str = ""  # photographs with the same eye stay on one side of every split
    where: str = ""  # the row of a table that it comes from, for messages
    drawing: tuple[int, int] | None = None  # seed and index for synthetic.plan


@dataclass(frozen=True)
class DataSet:
    """All records of all parts, and what the reader has to say."""
    records: list[Record]
    classes: tuple[str, ...] = ()  # names of the categories, where there are any
    notes: tuple[str, ...] = ()
