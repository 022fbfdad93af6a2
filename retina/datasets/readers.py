"""A data set's files and tables -> records. read_data picks the reader for a path.

Here: IDRiD, folders of classes, drawings. In tables.py: a table of labels. In public.py: ODIR-5K, RFMiD, JSIEC-1000.
Every mistake in files or tables is an InputError.

IDRiD: Porwal et al. 2020, Medical Image Analysis 59:101561
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from retina.datasets import descriptions, public, records, synthetic
from retina.datasets.masks import MaskFile
from retina.datasets.records import LABELS, LANDMARKS, DataSet, Record, read_point
from retina.datasets.synthetic import LESIONS
from retina.datasets.tables import IMAGE_SUFFIXES, files_in, list_images, read_rows, read_table
from retina.files import InputError


SOURCE = "https://ieee-dataport.org/open-access/indian-diabetic-retinopathy-image-dataset-idrid"


# ---- IDRiD ----

SPLITS = {"train": ("a. Training Set", "Training"), "test": ("b. Testing Set", "Testing")}
MASK_FOLDERS = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates",
                "SE": "4. Soft Exudates", "OD": "5. Optic Disc"}
IMAGES, TABLES = "1. Original Images", "2. Groundtruths"
SUBSETS = {"A. Segmentation": "seg", "B. Disease Grading": "cls, dme", "C. Localization": "loc"}


def read_idrid(root: Path) -> DataSet:
    """IDRiD below `root`, in the official layout and names: the training split, the test split, or both.

    Any subset may be absent. The localization subset has the photographs of the grading subset: where its own images
    are missing, its points go to those. InputError: no subset at all, a label without its image, an image without its
    label, a label that is no grade.
    """
    subsets = [subset for subset in SUBSETS if (root / subset).is_dir()]
    grading, localization = root / "B. Disease Grading", root / "C. Localization"
    if not subsets or subsets == ["C. Localization"] and not (localization / IMAGES).is_dir():
        names = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise InputError(f"{root}: expected IDRiD's folders {', '.join(map(repr, SUBSETS))} or folders of classes "
                         f"below 'train', found {names}")
    required = next((split for split, (folder, _) in SPLITS.items()
                     if any((root / subset / IMAGES / folder).is_dir() for subset in subsets)), "train")
    records = []
    for split, (folder, _) in SPLITS.items():
        def present(subset):  # the training split may be missing in all subsets, the test split in any
            return (root / subset).is_dir() and (split == required or (root / subset / IMAGES / folder).is_dir())

        if present("A. Segmentation"):
            records += read_segmentation(root / "A. Segmentation", split)
        graded = read_grading(grading, split) if present("B. Disease Grading") else []
        if (localization / IMAGES / folder).is_dir():
            images = list_images(localization / IMAGES / folder)
            located = [Record(record_name(split, "localization", name), image, split) for name, image in images.items()]
            graded += read_points(localization, split, located, localization)
        elif graded and (localization / TABLES).is_dir():
            graded = read_points(localization, split, graded, grading)
        records += graded
    return DataSet(records, notes=tuple(f"{root} has no '{subset}': nothing to learn {tasks} from"
                                        for subset, tasks in SUBSETS.items() if subset not in subsets))


def record_name(split: str, subset: str, name: str) -> str:
    """The name of a record; IDRiD counts the photographs of each subset and split from 1."""
    return f"{'test/' if split == 'test' else ''}{subset}/{name}"


def read_segmentation(root: Path, split: str) -> list[Record]:
    """Photographs with masks. A mask file that is not there means: no such lesion."""
    images = list_images(root / IMAGES / SPLITS[split][0])
    masks: dict[str, dict[str, MaskFile | None]] = {name: dict.fromkeys(LESIONS) for name in images}
    for lesion, folder in MASK_FOLDERS.items():
        folder = root / "2. All Segmentation Groundtruths" / SPLITS[split][0] / folder
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the official layout keeps the {lesion} masks there")
        for path in files_in(folder):
            name = path.stem.removesuffix(f"_{lesion}")
            if path.suffix.lower() not in (".tif", ".tiff", ".png"):
                raise InputError(f"{path}: expected masks only (.tif, .tiff, .png) in this folder; remove the file")
            if name not in masks:
                raise InputError(f"{path}: a mask without its photograph {name}.jpg in {root / IMAGES}")
            masks[name][lesion] = MaskFile(path)
    for name, files in masks.items():
        if not any(files.values()):  # a photograph without any lesion still has an optic disc
            raise InputError(f"{images[name]}: a photograph without any mask, not even the optic disc's")
    return [Record(record_name(split, "segmentation", name), images[name], split, {"masks": masks[name]})
            for name in images]


def read_by_name(path: Path, columns: Sequence[str], what: str, images: Mapping[str, Path], folder: Path,
                 read: Callable[[str, str, dict[str, str]], Any]) -> dict[str, Any]:
    """{image name: read(where, name, row)} for the rows of the official table at `path`; None is left out.

    The first of its `columns` names the image, one of `images`, which lie in `folder`. The official files have stray
    spaces in column names, and empty cells.
    """
    values = {}
    for where, row in read_rows(path, columns):
        name = row[columns[0]]
        if name not in images:
            raise InputError(f"{where}: a {what} for {name}, but no {name}.jpg in {folder}")
        if name in values:
            raise InputError(f"{where}: a second row for {name}; expected one")
        value = read(where, name, row)
        if value is not None:
            values[name] = value
    return values


def read_grading(root: Path, split: str) -> list[Record]:
    """Graded photographs."""
    path = root / TABLES / f"{SPLITS[split][0][0]}. IDRiD_Disease Grading_{SPLITS[split][1]} Labels.csv"
    images = list_images(root / IMAGES / SPLITS[split][0])
    columns = {"grade": "Retinopathy grade", "edema_risk": "Risk of macular edema"}

    def read(where, name, row):
        return {label: LABELS[label].parse(row[column], f"{where}: {column} of {name}")
                for label, column in columns.items()}

    grades = read_by_name(path, ["Image name", *columns.values()], "grade", images, root / IMAGES, read)
    for name, image in images.items():
        if name not in grades:
            raise InputError(f"{image}: a photograph without its row in {path}")
    return [Record(record_name(split, "grading", name), images[name], split, grades[name]) for name in images]


def read_points(root: Path, split: str, located: Sequence[Record], pictures: Path) -> list[Record]:
    """The records, whose images lie in `pictures`, with the points of the two tables below `root`."""
    letter, word = SPLITS[split][0][0], SPLITS[split][1]
    tables = {"disc": f"1. Optic Disc Center Location/{letter}. IDRiD_OD_Center_{word} Set_Markups.csv",
              "fovea": f"2. Fovea Center Location/IDRiD_Fovea_Center_{word} Set_Markups.csv"}
    images, columns = {r.image.stem: r.image for r in located}, ("Image No", "X- Coordinate", "Y - Coordinate")
    points: dict[str, dict] = defaultdict(dict)
    for landmark, table in tables.items():
        def read(where, name, row):
            return read_point(row[columns[1]], row[columns[2]], images[name], f"{where}: the {landmark} of {name}")

        for name, point in read_by_name(root / TABLES / table, columns, "point", images, pictures / IMAGES,
                                        read).items():
            points[name][landmark] = point
    return [r.with_labels(landmarks=points.get(r.image.stem)) for r in located]


# ---- folders of classes, drawings, photographs without labels ----

def read_folders(root: Path, trained: Collection[str] = ()) -> DataSet:
    """Photographs in root/train/CLASS/, and in val/ and test/ where these exist; any images, not only retinas.

    The classes are the folders below train; without it, those that a run was `trained` on, or else all. InputError:
    fewer than two classes in train, a class elsewhere that is none of these, a file or folder that is neither a class
    nor a photograph of one.
    """
    def folders(folder):
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    if unknown := [p for p in folders(root) if p.name not in ("train", "val", "test")]:
        raise InputError(f"{unknown[0]}: expected no folders but train, val and test beside 'train'; rename or move it")
    learned = (root / "train").is_dir()
    which = "'train'" if learned else "the run"
    names = {p.name for split in ([root / "train"] if learned else folders(root)) for p in folders(split)}
    classes = sorted(names if learned or not trained else trained, key=records.number_first)
    if learned and len(classes) < 2:
        raise InputError(f"{root / 'train'}: found {len(classes)} folders; expected one for each class, at least two")
    found = []
    for split in (p.name for p in folders(root)):
        if loose := [p for p in sorted((root / split).iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]:
            raise InputError(f"{loose[0]}: a photograph outside of a class; expected it in {root / split}/CLASS/")
        if not folders(root / split):
            raise InputError(f"{root / split}: holds no class; expected {', '.join(classes[:12])}; or remove it")
        for folder in folders(root / split):
            if folder.name not in classes:
                raise InputError(f"{folder}: a class that {which} does not have; expected {', '.join(classes[:12])}; "
                                 "add it there or remove it here")
            found += [Record(f"{split}/{folder.name}/{image.name}", image, split, {"category": folder.name})
                      for image in list_images(folder, only=True).values()]
    return DataSet(found)


def read_unlabelled(root: Path) -> list[Record]:
    """The photographs in a folder, of which nothing is known. InputError: see list_images."""
    return [Record(f"unlabelled/{name}", image, "unlabelled") for name, image in list_images(root).items()]


DRAWN = {"train": (0, 1200), "test": (1, 300)}  # series and number of the embedded drawings
DRAWN_SIDE = 1024  # nominal pixels of a drawing's side: the unit of its points


def read_drawn() -> DataSet:
    """The drawn photographs: every label is known, and no two show one eye."""
    return DataSet([r for split, (series, number) in DRAWN.items() for r in read_series(split, series, number)])


@functools.cache
def read_series(split: str, series: int, number: int) -> list[Record]:
    """The first of a series of drawn photographs."""
    records = []
    for i in range(number):
        eye = synthetic.plan(series, i)
        points = {name: tuple(float(DRAWN_SIDE * v) for v in getattr(eye, name)) for name in LANDMARKS}
        labels = {"grade": eye.grade, "edema_risk": eye.edema_risk, "masks": dict.fromkeys(LESIONS),
                  "landmarks": points, "fine": descriptions.fine_class(eye), "signs": descriptions.signs(eye),
                  "text": descriptions.describe(eye)}
        records.append(Record(f"drawn/{series}_{i:04d}", None, split, labels, drawing=(series, i)))
    return records


# ---- what a path means ----

def find_data(path: str | None) -> Path | None:
    """The data set that a command means: `path`, else data/IDRiD if it exists, else None for drawn photographs."""
    if path is not None:
        return Path(path)
    default = records.HERE / "data" / "IDRiD"
    return default if default.is_dir() else None


def read_data(root: Path | None, trained: Collection[str] = ()) -> DataSet:
    """The data set at `root`: a table (.csv), folders of classes, IDRiD, or one of public.py; None: drawn photographs.

    `trained`: see read_folders.
    """
    if root is None:
        return read_drawn()
    if not root.exists():
        raise InputError(f"{root}: no such file or folder; expected a table (.csv), a folder with train/CLASS/ in it, "
                         f"or the folder into which IDRiD was unzipped ({SOURCE})")
    if root.is_file() and root.suffix.lower() != ".csv":
        raise InputError(f"{root}: a file that is no table; expected one that ends in .csv, cells separated by commas "
                         "(in Excel: Save As, CSV UTF-8), a folder with train/CLASS/ in it, or the folder into which "
                         "IDRiD was unzipped")
    if is_idrid(root):
        return read_idrid(root)
    if (found := public.read_public(root)) is not None:
        return found
    if root.is_file():
        return read_table(root)
    split = any((root / name).is_dir() for name in ("train", "val", "test"))
    return read_folders(root, trained) if split else read_idrid(root)  # which says what is missing


def is_idrid(root: Path) -> bool:
    """Whether it is a folder with IDRiD's subsets in it."""
    return any((root / subset).is_dir() for subset in SUBSETS) and not (root / "train").is_dir()
