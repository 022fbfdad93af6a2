"""What is known of each photograph before its file is opened: paths and labels. A new label is declared in LABELS."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from retina.datasets.descriptions import MIRRORS, mirrored, words
from retina.datasets.masks import MaskFile, check_distinct, split_cell
from retina.datasets.synthetic import LESIONS
from retina.files import InputError, exif_orientation, home, image_size, open_image, shown_size


HERE = home()  # data/ and runs/ lie in it
LANDMARKS = ("disc", "fovea")  # centres of the optic disc and of the fovea
GRADES, EDEMA_RISKS = 5, 3
MOST_SHOWN = 12  # classes or signs, in a line of a report
UNKNOWN = 255  # in a mask: it is not known whether this lesion is there
LESION_NAMES = dict(zip(LESIONS, ("microaneurysms", "haemorrhages", "hard exudates", "soft exudates", "optic disc")))
LESION_COLOURS = dict(zip(LESIONS, ((86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66))))

# n photographs, L lesion classes (LESIONS), P landmarks (LANDMARKS), S side of the photograph in pixels


# ---- what may be known of a photograph ----

@dataclass(frozen=True)
class Conflict:
    """Copies of one photograph that carry different values of one label."""
    label: str  # the name of a label, a landmark, a lesion or a sign
    names: tuple[str, ...]  # of the copies
    values: tuple
    used: object  # the value that training uses; None: none of them

    def as_dict(self) -> dict:
        """As JSON holds it."""
        return {"label": self.label, "photographs": list(self.names), "values": list(self.values), "used": self.used}


@dataclass(frozen=True)
class TableRow:
    """A row of a table."""
    folder: Path  # of the table
    where: str  # file and line, for error messages
    cells: Mapping[str, str]  # column -> text; "" for known columns that the table does not have

    def what(self, column: str) -> str:
        """The name of a cell in error messages."""
        return f"{self.where}: {column} of {self.cells['image']}"

    def file(self, column: str, cell: str | None = None) -> Path:
        """The file that a cell, or the part of it that is given, names.

        InputError: it is not there, or not below the table's folder.
        """
        cell = self.cells[column] if cell is None else cell
        within, here = Path(os.path.normpath(cell)), os.path.abspath(self.folder)
        if within.is_relative_to(here):
            within = within.relative_to(here)
        what, file = f"{self.where}: {column} {self.cells[column]!r}", self.folder / within
        if within.is_absolute() or within.parts[:1] == ("..",):
            raise InputError(f"{what}: leads out of {self.folder}; expected a path below the folder of the table; move "
                             f"the table above its files{did_you_mean(self.folder, cell)}")
        if not file.is_file():
            problem = "a folder" if file.is_dir() else "no such file"
            raise InputError(f"{what}: {problem}: {file}; expected a file, its path relative to the table"
                             f"{did_you_mean(self.folder, cell)}")
        return file


# what a path in a table and the file that it means may differ in, and a form of both without it
DIFFERENCES: dict[str, Callable[[str], str]] = {
    "slashes": lambda path: path.replace("\\", "/"), "accents": lambda path: unicodedata.normalize("NFC", path),
    "upper and lower case": str.casefold, "folder": lambda path: path.rpartition("/")[2],
    "suffix": lambda path: re.sub(r"\.[a-z]{2,4}\d?$", "", path),
    "leading zeros": lambda path: re.sub(r"(^|/)0+", r"\1", path)}


def did_you_mean(folder: Path, text: str) -> str:
    """The end of a message: the file below `folder` that a path most likely means, and what they differ in; or ""."""
    def form(path, kept=""):
        for name, without in DIFFERENCES.items():
            path = path if name == kept else without(path)
        return path

    files = (p.relative_to(folder).as_posix() for p in itertools.islice(folder.rglob("*.*"), 100_000) if p.is_file())
    alike = sorted(path for path in files if form(path) == form(text))
    if not alike:
        return ""
    name, suffix = os.path.splitext(text.replace("\\", "/").rpartition("/")[2].casefold())

    def likeness(path):  # a mask for a mask, then the same name, then the same suffix
        same = (a == b for a, b in zip(os.path.splitext(Path(path).name.casefold()), (name, suffix)))
        return ("mask" in path) == ("mask" in text), *same, difflib.SequenceMatcher(None, text, path).ratio()
    best = max(alike, key=likeness)
    differ = [name for name in DIFFERENCES if form(best, name) != form(text, name)] or ["the folder's name"]
    return f"; did you mean {best!r}, which differs in {', '.join(differ)}?"


@dataclass(frozen=True)
class Label:
    """Something that may be known of a photograph, and everything that is done with it except learning.

    Its values in a Record can be compared and stored; an unknown label is absent.
    """
    name: str
    task: str  # that learns from it, for reports
    columns: tuple[str, ...] = ()  # of tables; "sign_*" is any that begins so
    minor: bool = False  # folds are stratified by it only among photographs without a class
    last: bool = False  # folds keep an eye of each of its classes only where photographs have no other label
    local = False  # whether a part of a photograph, cut out, has it as well
    section = ""  # of reports

    def parse(self, text: str, what: str) -> Any:
        """A value from the text of its cell, which `what` names. InputError: it is no valid value."""
        raise NotImplementedError

    def read(self, row: TableRow) -> Any:
        """A value from a row of a table; None: unknown. InputError: see `parse`."""
        for column in self.columns:
            if row.cells[column]:
                return self.parse(row.cells[column], row.what(column))

    def resolve_conflict(self, values: Sequence) -> Any:
        """The value to use where copies of a photograph contradict each other; None: none of them."""
        return None

    def join(self, known: Mapping[str, Any], sizes: Mapping[str, Sequence[int]],
             size: Sequence[int]) -> tuple[Any, list[Conflict]]:
        """One value for a photograph from those of its copies, {name of the copy: value}; -> value or None, conflicts.

        `sizes` are width and height of the copies' files, `size` those of the copy that stays.
        """
        values = tuple(known.values())
        if values.count(values[0]) == len(values):
            return values[0], []
        used = self.resolve_conflict(values)
        return used, [Conflict(self.name, tuple(known), values, used)]

    def to_sample(self, value: Any, arrays: Mapping[str, np.ndarray], place: Callable, size: int) -> Any:
        """The value in a Sample of `size` pixels, from the value in the record and the `arrays` in the cache.

        `place` converts points (..., 2) from pixels of the file to pixels of the sample.
        """
        return value

    def to_tv_tensor(self, value: Any, size: int) -> Any:
        """A sample's value as torchvision's transforms move it with the photograph, which is `size` pixels wide."""
        return value

    def from_tv_tensor(self, value: Any, before: Any) -> Any:
        """A sample's value after the transforms, from their output and the value `before`."""
        return value

    def mirrored(self, value: Any, left_right: bool, top_bottom: bool) -> Any:
        """A sample's value where the sides of the photograph, or its top and bottom, have changed places."""
        return value

    def fingerprint(self, value: Any) -> Any:
        """What a run depends on of a value, beside the contents of cache files."""
        return value

    def stratum(self, value: Any) -> Any:
        """By what of a value, or of None, folds are stratified."""
        return value is not None

    def classes(self, value: Any) -> Sequence:
        """What of a value training must not lack: of each class at least one eye is trained on, whatever the fold."""
        return [True]

    def names(self, values: Sequence) -> list[str]:
        """What a data set's own classes or signs are called, from all of its values; []: they are not its own."""
        return []

    def summary(self, records: Sequence[Record]) -> dict:
        """What the `section` of a report says about this label in records, as JSON holds it; {}: nothing."""
        return {}

    def lines(self, summary: Mapping) -> list[str]:
        """Lines of text from the `section` of a report."""
        return []

    def known(self, records: Sequence[Record]) -> list:
        """The values that records have."""
        return [r.labels[self.name] for r in records if self.name in r.labels]


@dataclass(frozen=True)
class ClassLabel(Label):
    """A class 0..number-1 of the whole photograph; without `number`, the name of one of the data set's own classes.

    Such a name may tell a side, which a mirror image turns into the other: `sided`.
    """
    number: int | None = None
    sided: bool = False
    section = "classes"

    def parse(self, text, what):
        """ "2.0", as spreadsheets write it, is 2."""
        if self.number is None:
            return text
        if text.removesuffix(".0") not in map(str, range(self.number)):
            raise InputError(f"{what} is {text!r}, expected a whole number from 0 to {self.number - 1}")
        return int(text.removesuffix(".0"))

    def resolve_conflict(self, values):
        """The higher grade: the photograph was graded twice, and missing disease is the worse mistake."""
        return max(values) if self.number else None

    def stratum(self, value):
        return value

    def classes(self, value):
        return [value]

    def mirrored(self, value, left_right, top_bottom):
        return mirrored(value, left_right, top_bottom) if self.sided else value

    def names(self, values):
        """Numbered ones in the order of their numbers; with those of mirror images."""
        every = {self.mirrored(v, *sides) for v in values for sides in MIRRORS}
        return [] if self.number else sorted(every, key=number_first)

    def summary(self, records):
        """How often each class occurs, and what a constant guess scores."""
        counts = Counter(self.known(records))
        if not counts:
            return {}
        classes = sorted(counts, key=None if self.number else number_first)
        guess = max(classes, key=counts.__getitem__)  # the first of equals
        return {self.name: {"counts": {str(c): counts[c] for c in classes}, "constant_guess": str(guess),
                            "constant_accuracy": round(counts[guess] / counts.total(), 4)}}

    def lines(self, summary):
        shares = summary.get(self.name, {"counts": {}})
        counts, total = shares["counts"], sum(shares["counts"].values())
        return [f"    {self.name:9}" + (
            "  ".join(f"{v}: {n} ({n / total:.0%})" for v, n in counts.items()) if len(counts) <= MOST_SHOWN else
            f"{len(counts)} classes of {min(counts.values())} to {max(counts.values())} photographs") +
                f"   always guessing {shares['constant_guess']} is right for {shares['constant_accuracy']:.1%}"
                ] if total else []


@dataclass(frozen=True)
class SignsLabel(Label):
    """Any number of signs, {sign: 1 where it is there, 0 where it is not}; an absent one is unknown.

    A column for each: "sign_drusen" is that of drusen.
    """
    section = "signs"

    def read(self, row):
        prefix, signs = self.columns[0].removesuffix("*"), {}
        for column, cell in row.cells.items():
            if column.startswith(prefix) and cell:
                if cell.removesuffix(".0") not in ("0", "1"):
                    raise InputError(f"{row.what(column)} is {cell!r}, expected 0 or 1, or nothing where it is unknown")
                signs[column.removeprefix(prefix)] = int(cell[0])
        return signs or None

    def join(self, known, sizes, size):
        """A sign that is there in one copy is there: it was looked at twice, and missing it is the worse mistake."""
        signs, conflicts = {}, []
        for sign in self.names(known.values()):
            values = {name: value[sign] for name, value in known.items() if sign in value}
            signs[sign] = max(values.values())
            if len(set(values.values())) > 1:
                conflicts.append(Conflict(sign, tuple(values), tuple(values.values()), signs[sign]))
        return signs, conflicts

    def names(self, values):
        return list(dict.fromkeys(name for value in values for name in value))

    def classes(self, value):
        return [name for name, there in value.items() if there]

    def summary(self, records):
        """How many photographs have each sign, of those where it is known."""
        values = self.known(records)
        return {name: {"photographs": sum(v.get(name, 0) for v in values), "known": sum(name in v for v in values)}
                for name in self.names(values)}

    def lines(self, summary):
        counts = {name: n["photographs"] for name, n in summary.items()}
        shown = list(counts.items())[:MOST_SHOWN]
        none = [name for name, n in counts.items() if not n]
        return [f"    {self.name:9}" + "  ".join(f"{name}: {n}" for name, n in shown) +
                f"  ... of {len(counts)}" * (len(counts) > MOST_SHOWN) +
                f"; no photograph has {', '.join(none)}" * bool(none)] if counts else []


@dataclass(frozen=True)
class TextLabel(Label):
    """A sentence, or several, about the photograph."""
    section = "texts"

    def parse(self, text, what):
        if not re.search(r"\w", text):  # "-"
            raise InputError(f"{what} is {text!r}, expected words, or nothing where there are none")
        return text

    def mirrored(self, value, left_right, top_bottom):
        return mirrored(value, left_right, top_bottom)

    def summary(self, records):
        """Lengths, words, how many texts are the same, and the most frequent one."""
        texts = Counter(" ".join(words(text)) for text in self.known(records))
        if not texts:
            return {}
        lengths = [len(text.split(" ")) for text in texts.elements()]
        vocabulary = Counter(word for text, n in texts.items() for word in set(text.split(" ")) for _ in range(n))
        (most, number), = texts.most_common(1)
        return {self.name: {
            "photographs": texts.total(), "different": len(texts), "words": [min(lengths), max(lengths)],
            "mean_words": round(fmean(lengths), 2), "vocabulary": len(vocabulary),
            "words_of_one_photograph": sum(n == 1 for n in vocabulary.values()), "most_frequent": most,
            "share_of_most_frequent": round(number / texts.total(), 4)}}

    def lines(self, summary):
        return ["    {name:9}{photographs} texts, {different} different, of {0} to {1} words (mean {mean_words:.1f}); "
                "{vocabulary} words in all, {words_of_one_photograph} of them in a single text; always saying "
                "{most_frequent!r} is right for {share_of_most_frequent:.1%}".format(*x["words"], name=self.name, **x)
                for x in (summary.get(self.name),) if x]


@dataclass(frozen=True)
class NumberLabel(Label):
    """A number for the whole photograph, from `lowest` to `highest`; where copies differ, their mean is used."""
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

    def resolve_conflict(self, values):
        return fmean(values)

    def summary(self, records):
        """The range, and the mean absolute error of guessing the mean."""
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
    """Landmarks in pixels of the file, {landmark: (x, y)}; an absent one is unknown. Two columns for each, x and y.

    In samples (P, 2) float32, x and y in pixels of the sample; nan: unknown, or outside the picture.
    """
    landmarks: tuple[str, ...] = ()

    def read(self, row):
        points = {name: read_point(row.cells[x], row.cells[y], row.file("image"), row.what(x.removesuffix("_x")))
                  for name, x, y in zip(self.landmarks, self.columns[::2], self.columns[1::2])}
        return {name: point for name, point in points.items() if point} or None

    def join(self, known, sizes, size):
        """The mean of the copies' points, in pixels of the copy that stays; 1 % of its width apart is a conflict."""
        points, conflicts = {}, []
        for landmark in dict.fromkeys(k for value in known.values() for k in value):
            places = {name: np.multiply(value[landmark], np.divide(size, sizes[name]))
                      for name, value in known.items() if landmark in value}
            points[landmark] = tuple(np.mean(list(places.values()), 0).tolist())
            if np.ptp(list(places.values()), 0).max() > 0.01 * size[0]:
                values = tuple(tuple(v.round(1).tolist()) for v in places.values())
                conflicts.append(Conflict(landmark, tuple(places), values, points[landmark]))
        return points, conflicts

    def classes(self, value):
        return list(value)

    def to_sample(self, value, arrays, place, size):
        points = np.array([value.get(name, (math.nan, math.nan)) for name in self.landmarks])
        return inside(torch.from_numpy(place(points)).float(), size)

    def to_tv_tensor(self, value, size):
        return tv_tensors.KeyPoints(value - 0.5, canvas_size=(size, size))  # as torchvision flips: about pixel centres

    def from_tv_tensor(self, value, before):
        return inside(value.as_subclass(Tensor), value.canvas_size[0])


@dataclass(frozen=True)
class MaskLabel(Label):
    """Masks, {lesion: MaskFile, or None where it was looked for and is not there}; an absent one is unknown.

    In samples (L, S, S) uint8: 0, 1, or UNKNOWN for all pixels of a lesion. preprocess.preprocess reads the files.
    """
    lesions: tuple[str, ...] = ()
    section = "masks"
    local = True

    def __post_init__(self):
        if self.name != "masks":
            raise ValueError(f"LABELS: {self.name}: the cache keeps pictures of one label, which is 'masks'; expected "
                             "another lesion class in it, or a label that is no picture")

    def read(self, row):
        masks = {}
        for lesion, column in zip(self.lesions, self.columns):
            if row.cells[column].lower() == "none":
                masks[lesion] = None
            elif row.cells[column]:
                name, values = split_cell(row.cells[column], row.folder, f"{row.where}: {column}")
                masks[lesion] = MaskFile(row.file(column, name), values)
        check_distinct(masks, row.where)
        return masks or None

    def join(self, known, sizes, size):
        """The first mask file among copies of this size, as masks belong to pixels; without any file, "none".

        A lesion whose only files are of another size is unknown here.
        """
        masks, conflicts = {}, []
        for lesion in dict.fromkeys(k for value in known.values() for k in value):
            files = {name: value[lesion] or None for name, value in known.items() if lesion in value}
            here = {name: file for name, file in files.items() if not file or tuple(sizes[name]) == tuple(size)}
            if any(here.values()) or not any(files.values()):
                masks[lesion] = next(filter(None, here.values()), None)
                if len(set(here.values())) > 1:
                    values = tuple("none" if file is None else str(file) for file in here.values())
                    conflicts.append(Conflict(lesion, tuple(here), values, str(masks[lesion])))
        return masks or None, conflicts

    def to_sample(self, value, arrays, place, size):
        bits = np.unpackbits(arrays["masks"], count=len(self.lesions) * size * size)
        masks = torch.from_numpy(bits.reshape(len(self.lesions), size, size))
        masks[[lesion not in value for lesion in self.lesions]] = UNKNOWN
        return masks

    def to_tv_tensor(self, value, size):
        return tv_tensors.Mask(value)

    def from_tv_tensor(self, value, before):
        """An unknown mask stays unknown, borders included; a known one is 0 where it has moved away."""
        return torch.where(before[:, :1, :1] == UNKNOWN, UNKNOWN, value.as_subclass(Tensor))

    def classes(self, value):
        return [lesion for lesion, file in value.items() if file]

    def fingerprint(self, value):
        return sorted(value)

    def summary(self, records):
        """How many mask files there are of each lesion; nothing for drawn photographs."""
        values = self.known([r for r in records if r.image])
        return {lesion: {"masks": sum(bool(v.get(lesion)) for v in values),
                         "none": sum(lesion in v and not v[lesion] for v in values)}
                for lesion in self.lesions} if values else {}

    def lines(self, summary):
        counts = [f"{lesion}: {n['masks']}" + f" ({n['none']} have none)" * bool(n["none"])
                  for lesion in self.lesions if (n := summary.get(lesion))]
        return [f"    {self.name:9}" + "  ".join(counts)] if counts else []


def number_first(name: str) -> tuple:
    """A key to sort names by: numbers, in their order, before all others."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def number(text: str) -> float:
    """A cell's number; nan if it is none."""
    try:
        return float(text.replace("_", "x"))  # Python would read 1_0 as 10
    except ValueError:
        return math.nan


def read_point(x: str, y: str, image: Path, what: str) -> tuple[float, float] | None:
    """A point from its two cells; None where both are empty.

    InputError: no number, only one, outside its image, in the image's corner, where no landmark is but shares of the
    sides are, and zeros for "not there".
    """
    if not x and not y:
        return None
    point = number(x), number(y)
    absent = "leave both cells empty where it is not there"
    if not all(map(math.isfinite, point)):
        raise InputError(f"{what} is at ({x!r}, {y!r}), expected two numbers, in pixels of the image file; {absent}")
    if max(map(abs, point)) <= 1:
        raise InputError(f"{what} is at ({x}, {y}), in the corner; expected pixels of the image file; multiply shares "
                         f"of its sides by its width and height, {absent}")
    size = image_size(image)
    if size is not None and not (0 <= point[0] <= size[0] and 0 <= point[1] <= size[1]):
        with open_image(image) as file:
            shown = shown_size(size, exif_orientation(file))
        raise InputError(f"{what} is at ({x}, {y}), outside {image.name} with its {shown} pixels; expected pixels of "
                         f"this file; scale points of a larger or uncropped original, {absent}")
    return point


def inside(points: Tensor, size: int) -> Tensor:
    """Points (P, 2) with nan in place of those outside the picture."""
    return points.masked_fill(((points < 0) | (points > size)).any(1, keepdim=True), math.nan)


LABELS: dict[str, Label] = {label.name: label for label in (
    ClassLabel("grade", "cls", ("grade",), number=GRADES),  # of diabetic retinopathy
    ClassLabel("edema_risk", "dme", ("edema_risk",), minor=True, number=EDEMA_RISKS),  # risk of macular edema
    ClassLabel("category", "cls"),  # the photograph's folder, in data sets that are folders of classes
    ClassLabel("fine", "fine", ("fine",), minor=True, last=True, sided=True),  # one of many classes
    SignsLabel("signs", "signs", ("sign_*",), minor=True, last=True),
    TextLabel("text", "text", ("text",), minor=True, last=True),
    LandmarkLabel("landmarks", "loc", ("disc_x", "disc_y", "fovea_x", "fovea_y"), minor=True, landmarks=LANDMARKS),
    MaskLabel("masks", "seg", tuple(f"mask_{lesion.lower()}" for lesion in LESIONS), lesions=LESIONS))}


# ---- photographs ----

class Labelled:
    """Base of classes with `labels`: x.grade is x.labels.get("grade"), and likewise for every name in LABELS."""
    labels: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in LABELS:
            return self.labels.get(name)
        raise AttributeError(f"{type(self).__name__!r} has neither a field nor a label {name!r}")

    def with_labels(self, **labels: Any) -> Labelled:
        """A copy with other values of these labels; None: unknown."""
        return replace(self, labels={k: v for k, v in {**self.labels, **labels}.items() if v is not None})


@dataclass(frozen=True)
class Record(Labelled):
    """Paths and labels of one photograph."""
    name: str  # unique in the data set, e.g. "grading/IDRiD_001"; those of the test split begin with "test/"
    image: Path | None  # None: drawn
    split: str = "train"  # "train", "val" (where the data set says so itself) or "test"
    labels: dict[str, Any] = field(default_factory=dict, hash=False)  # name in LABELS -> value; unknown ones are absent
    eye: str = ""  # photographs with the same eye are never in two splits
    where: str = ""  # the row of a table that it comes from, for error messages
    drawing: tuple[int, int] | None = None  # seed and index for synthetic.plan


@dataclass(frozen=True)
class DataSet:
    """The records of all splits, and notes of the reader."""
    records: list[Record]
    notes: tuple[str, ...] = ()

    def names(self, labels: Collection[str]) -> dict[str, list[str]]:
        """{label: names of its classes or signs}, of those `labels` where these are the data set's own.

        "broad": of each fine class the class folder or the grade that all of its photographs have, where there is one.
        """
        found = {name: names for name in labels if (names := LABELS[name].names(LABELS[name].known(self.records)))}
        broad = defaultdict(set)
        for r in self.records if "fine" in found else ():
            if r.fine is not None:
                broad[r.fine].add(r.grade if r.category is None else r.category)
        if broad and all(len(values) == 1 and None not in values for values in broad.values()):
            mirror = {m: name for name in broad for m in LABELS["fine"].names([name])} | {name: name for name in broad}
            found["broad"] = [str(*broad[mirror[name]]) for name in found["fine"]]
        return found
