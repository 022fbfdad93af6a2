"""A data set's files and tables -> records.

    read_idrid, read_table, read_folders, read_drawn    one reader for each kind of data set
    read_data                                           the reader that a path means

Every mistake in files or tables is an InputError: one line that says what, where, what was expected, what to do.

IDRiD: Porwal et al. 2020, Medical Image Analysis 59:101561
"""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retina.datasets import records, synthetic
from retina.datasets.records import DataSet, LABELS, POINTS, Record, read_point
from retina.datasets.synthetic import LESIONS
from retina.files import InputError

SOURCE = "https://ieee-dataport.org/open-access/indian-diabetic-retinopathy-image-dataset-idrid"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LITTER = ("thumbs.db", "desktop.ini")  # what file managers leave behind, beside names that start with a dot


# ---- files ----

def files_in(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted by name, but for the litter of file managers."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in LITTER)


def list_images(folder: Path, only: bool = False) -> dict[str, Path]:
    """{name without suffix: path} of the photographs in `folder`, sorted by name.

    InputError: no such folder, no photograph in it, two of one name, or, with `only`, anything else in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected photographs there")
    images: dict[str, Path] = {}
    for path in files_in(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if only:
                raise InputError(f"{path}: expected nothing but photographs ({' '.join(IMAGE_SUFFIXES)}) in this "
                                 "folder; remove it")
            continue
        if path.stem in images:
            raise InputError(f"{path}: {images[path.stem].name} has the same name; expected one photograph of each "
                             "name in a folder; rename one")
        images[path.stem] = path
    if not images:
        raise InputError(f"{folder}: holds no photograph; expected files that end in {' '.join(IMAGE_SUFFIXES)}")
    return images


# ---- cells of tables ----

def read_rows(path: Path, exact: bool = False) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """A CSV file with a header -> its columns, and its rows as (where, {column: text}).

    Spaces around cells, rows of empty cells and empty columns without a name are dropped. InputError: not UTF-8, two
    columns of one name, a cell in no named column, a quote that is not closed, a cell of two lines, and, if `exact`,
    more cells than columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a table of labels there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as CSV in UTF-8") from None
    rows = []
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(filter(any, lines), [])]
        if twice := [c for c in columns if c and columns.count(c) > 1]:
            raise InputError(f"{path}: two columns are named {twice[0]!r}; expected each name once")
        for cells in lines:
            where = f"{path} line {lines.line_num}"
            row = dict.fromkeys(filter(None, columns), "")
            if any("\n" in cell for cell in cells):
                raise InputError(f"{where}: a cell of more than one line; expected one, look for a missing quote")
            if exact and len(cells) > len(columns):
                raise InputError(f"{where}: {len(cells)} cells, expected {len(columns)}, one for each column")
            for k, cell in enumerate(cell.strip() for cell in cells):
                if k < len(columns) and columns[k]:
                    row[columns[k]] = cell
                elif cell:
                    raise InputError(f"{where}: the cell {cell!r} stands in no named column; expected {len(row)} cells")
            if any(row.values()):
                rows.append((where, row))
    except csv.Error as error:
        raise InputError(f"{path} line {lines.line_num}: not CSV ({error}); expected cells separated by "
                         "commas") from None
    return list(filter(None, columns)), rows


def want_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """InputError: one of the `wanted` columns is not there."""
    if lacking := [name for name in wanted if name not in columns]:
        raise InputError(f"{path}: no column {lacking[0]!r}; found {', '.join(columns) or 'no header'}; expected a "
                         "header line, cells separated by commas")


# ---- IDRiD ----

PARTS = {"train": ("a. Training Set", "Training"), "test": ("b. Testing Set", "Testing")}
MASK_FOLDERS = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates",
                "SE": "4. Soft Exudates", "OD": "5. Optic Disc"}
IMAGES, TABLES = "1. Original Images", "2. Groundtruths"
SUBSETS = {"A. Segmentation": "seg", "B. Disease Grading": "cls, dme", "C. Localization": "loc"}


def read_idrid(root: Path) -> DataSet:
    """IDRiD below `root`, in the official layout and names: the training part, and the test part where it is there.

    Any subset may be absent. The localization part has the images of the grading part: where its own are missing, its
    points go to those. InputError: no subset at all, a label without its image, an image without its label, a label
    that is no grade.
    """
    there = [subset for subset in SUBSETS if (root / subset).is_dir()]
    grading, localization = root / "B. Disease Grading", root / "C. Localization"
    if not there or there == ["C. Localization"] and not (localization / IMAGES).is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise InputError(f"{root}: expected IDRiD's folders {', '.join(map(repr, SUBSETS))} or folders of classes "
                         f"below 'train', found {found}")
    records = []
    for part, (folder, _) in PARTS.items():
        def present(subset):  # the training part is a must, the test part may be missing
            return (root / subset).is_dir() and (part == "train" or (root / subset / IMAGES / folder).is_dir())

        if present("A. Segmentation"):
            records += read_segmentation(root / "A. Segmentation", part)
        graded = read_grading(grading, part) if present("B. Disease Grading") else []
        if (localization / IMAGES / folder).is_dir():
            graded += read_localization(localization, part)
        elif graded and (localization / TABLES).is_dir():
            points = read_points(localization, part, {r.image.stem: r.image for r in graded}, grading)
            graded = [r.with_labels(points=points.get(r.image.stem)) for r in graded]
        records += graded
    missing = [f"{root} has no '{subset}': nothing to learn {tasks} from"
               for subset, tasks in SUBSETS.items() if subset not in there]
    return DataSet(records, notes=tuple(missing))


def named(part: str, subset: str, name: str) -> str:
    """The name of a record; IDRiD counts the photographs of each subset and part from 1."""
    return f"{'test/' if part == 'test' else ''}{subset}/{name}"


def read_segmentation(root: Path, part: str) -> list[Record]:
    """Photographs with masks. A mask file that is not there means: no such lesion."""
    images = list_images(root / IMAGES / PARTS[part][0])
    masks: dict[str, dict[str, Path | None]] = {name: dict.fromkeys(LESIONS) for name in images}
    for kind, folder in MASK_FOLDERS.items():
        folder = root / "2. All Segmentation Groundtruths" / PARTS[part][0] / folder
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the official layout keeps the {kind} masks there")
        for path in files_in(folder):
            name = path.stem.removesuffix(f"_{kind}")
            if path.suffix.lower() not in (".tif", ".tiff", ".png"):
                raise InputError(f"{path}: expected masks only (.tif, .tiff, .png) in this folder; remove the file")
            if name not in masks:
                raise InputError(f"{path}: a mask without its photograph {name}.jpg in {root / IMAGES}")
            masks[name][kind] = path
    for name, found in masks.items():
        if not any(found.values()):  # a photograph without any lesion still has an optic disc
            raise InputError(f"{images[name]}: a photograph without any mask, not even the optic disc's")
    return [Record(named(part, "segmentation", name), images[name], part, {"masks": masks[name]}) for name in images]


def read_grading(root: Path, part: str) -> list[Record]:
    """Graded photographs. Column names carry stray spaces and rows empty cells in the official files."""
    letter = PARTS[part][0][0]
    path = root / TABLES / f"{letter}. IDRiD_Disease Grading_{PARTS[part][1]} Labels.csv"
    images = list_images(root / IMAGES / PARTS[part][0])
    grades: dict[str, dict[str, int]] = {}
    columns, rows = read_rows(path)
    wanted = ("Image name", "Retinopathy grade", "Risk of macular edema")
    want_columns(path, columns, wanted)
    for where, row in rows:
        name, *labels = (row[column] for column in wanted)
        if name not in images:
            raise InputError(f"{where}: a grade for {name}, but no {name}.jpg in {root / IMAGES}")
        if name in grades:
            raise InputError(f"{where}: a second row for {name}; expected one")
        grades[name] = {label: LABELS[label].parse(text, f"{where}: {column} of {name}")
                        for label, text, column in zip(("grade", "edema"), labels, wanted[1:])}
    for name, image in images.items():
        if name not in grades:
            raise InputError(f"{image}: a photograph without its row in {path}")
    return [Record(named(part, "grading", name), images[name], part, grades[name]) for name in images]


def read_localization(root: Path, part: str) -> list[Record]:
    """Photographs with points, from the localization part's own image folder."""
    images = list_images(root / IMAGES / PARTS[part][0])
    points = read_points(root, part, images, root)
    return [Record(named(part, "localization", name), image, part).with_labels(points=points.get(name))
            for name, image in images.items()]


def read_points(root: Path, part: str, images: dict[str, Path], pictures: Path) -> dict[str, dict]:
    """{image name: {point: (x, y)}} from the two tables below `root`; `images` are those of `pictures`."""
    letter, word = PARTS[part][0][0], PARTS[part][1]
    tables = {"disc": f"1. Optic Disc Center Location/{letter}. IDRiD_OD_Center_{word} Set_Markups.csv",
              "fovea": f"2. Fovea Center Location/IDRiD_Fovea_Center_{word} Set_Markups.csv"}
    points: dict[str, dict] = defaultdict(dict)
    for kind, table in tables.items():
        path = root / TABLES / table
        columns, rows = read_rows(path)
        wanted = ("Image No", "X- Coordinate", "Y - Coordinate")
        want_columns(path, columns, wanted)
        for where, row in rows:
            name, x, y = (row[column] for column in wanted)
            if name not in images:
                raise InputError(f"{where}: a point for {name}, but no {name}.jpg in {pictures / IMAGES}")
            if kind in points[name]:
                raise InputError(f"{where}: a second row for {name}; expected one")
            if point := read_point(x, y, images[name], f"{where}: the {kind} of {name}"):
                points[name][kind] = point
    return points


# ---- a table of one's own ----

@dataclass(frozen=True)
class Row:
    """A row of a table."""
    folder: Path  # of the table
    where: str  # for messages
    cells: Mapping[str, str]  # column -> text, also of columns that the table does not have

    def what(self, column: str) -> str:
        """A cell, for messages."""
        return f"{self.where}: {column} of {self.cells['image']}"

    def file(self, column: str) -> Path:
        """The file that a cell names. InputError: it is not there, or not below the table's folder."""
        within = Path(os.path.normpath(self.cells[column]))
        file = self.folder / within
        if within.is_absolute() or within.parts[:1] == ("..",):
            raise InputError(f"{self.where}: {column} {self.cells[column]!r}: leads out of {self.folder}; expected a "
                             "path below the folder of the table; move the table above its files")
        if not file.is_file():
            problem = "a folder" if file.is_dir() else "no such file"
            raise InputError(f"{self.where}: {column} {self.cells[column]!r}: {problem}: {file}; expected a file, its "
                             "path relative to the table")
        return file


def read_table(path: Path) -> DataSet:
    """A CSV file with a row per photograph; columns image, those of LABELS, split, group; only `image` is a must.

    Paths are relative to the file. An empty cell is a label that is not known. A mask cell may say "none": looked for
    and not there. `split` is train, val or test, empty for train; photographs with the same `group` (an eye, a
    patient) never lie on both sides of a split. InputError: an unknown column, a cell that is no such label, a file
    that is not there, two rows for one image with different labels.
    """
    known = ["image", *(column for label in LABELS.values() for column in label.columns), "split", "group"]
    columns, rows = read_rows(path, exact=True)
    want_columns(path, columns, ["image"])
    if unknown := [c for c in columns if c not in known]:
        raise InputError(f"{path}: unknown column {unknown[0]!r}; known are {', '.join(known)}; rename or remove it")
    records: dict[Path, Record] = {}
    for where, cells in rows:
        record = read_row(Row(path.parent, where, dict.fromkeys(known, "") | cells))
        before = records.setdefault(record.image.resolve(), record)
        if replace(before, name="", image=None, where="") != replace(record, name="", image=None, where=""):
            raise InputError(f"{where}: {cells['image']} stands at {before.where} already, with other cells; expected "
                             "one row for an image; remove one")
    if not records:
        raise InputError(f"{path}: no row; expected one for each photograph")
    return DataSet(list(records.values()))


def read_row(row: Row) -> Record:
    """One row of a table; see read_table."""
    cells = row.cells
    if not cells["image"]:
        raise InputError(f"{row.where}: the cell of column 'image' is empty; expected the path of a photograph")
    image = row.file("image")
    if cells["split"] not in ("", "train", "val", "test"):
        raise InputError(f"{row.where}: split is {cells['split']!r}, expected train, val or test")
    record = Record(cells["image"], image, cells["split"] or "train", where=row.where,
                    eye=f"group {cells['group']}" if cells["group"] else "")
    return record.with_labels(**{name: label.read(row) for name, label in LABELS.items()})


# ---- folders of classes ----

def read_folders(root: Path) -> DataSet:
    """Photographs in root/train/CLASS/, and in val/ and test/ where these exist; any images, not only retinas.

    Class names and their number are those of the folders below train. InputError: fewer than two classes, a class
    elsewhere that train does not have, anything that is neither a class nor a photograph of one.
    """
    def folders(folder):
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    if unknown := [p for p in folders(root) if p.name not in ("train", "val", "test")]:
        raise InputError(f"{unknown[0]}: expected no folders but train, val and test beside 'train'; rename or move it")
    # numbered classes in the order of their numbers
    classes = sorted((p.name for p in folders(root / "train")),
                     key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    if len(classes) < 2:
        raise InputError(f"{root / 'train'}: found {len(classes)} folders; expected one for each class, at least two")
    records = []
    for part in (p.name for p in folders(root)):
        if loose := [p for p in sorted((root / part).iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]:
            raise InputError(f"{loose[0]}: a photograph outside of a class; expected it in {root / part}/CLASS/")
        if not folders(root / part):
            raise InputError(f"{root / part}: holds no class; expected {', '.join(classes[:12])}; or remove it")
        for folder in folders(root / part):
            if folder.name not in classes:
                raise InputError(f"{folder}: a class that 'train' does not have; expected {', '.join(classes[:12])}; "
                                 "add it there or remove it here")
            records += [Record(f"{part}/{folder.name}/{image.name}", image, part,
                               {"category": classes.index(folder.name)})
                        for image in list_images(folder, only=True).values()]
    return DataSet(records, tuple(classes))


# ---- drawn photographs ----

DRAWN = {"train": (0, 1200), "test": (1, 300)}  # series and number of the embedded drawings
DRAWN_SIDE = 1024  # pixels of a drawing, were it a file: the unit of its points


def read_drawn() -> DataSet:
    """The drawn photographs; every label is known, and each shows an eye of its own."""
    records = []
    for part, (series, number) in DRAWN.items():
        for i in range(number):
            eye = synthetic.plan(series, i)
            points = {kind: tuple(float(DRAWN_SIDE * v) for v in p)
                      for kind, p in zip(POINTS, (eye.disc, eye.fovea))}
            labels = {"grade": eye.grade, "edema": eye.edema, "masks": dict.fromkeys(LESIONS), "points": points}
            records.append(Record(f"drawn/{series}_{i:04d}", None, part, labels, drawing=(series, i)))
    return DataSet(records)


# ---- what a path means ----

def find_data(path: str | None) -> Path | None:
    """The data set that a command means: `path`, else data/IDRiD where it exists, else None for drawn photographs."""
    if path is not None:
        return Path(path)
    return records.HERE / "data" / "IDRiD" if (records.HERE / "data" / "IDRiD").is_dir() else None


def read_data(root: Path | None) -> DataSet:
    """The data set at `root`: a table (.csv), folders of classes, or IDRiD; drawn photographs where it is None."""
    if root is None:
        return read_drawn()
    if not root.exists():
        raise InputError(f"{root}: no such file or folder; expected a table (.csv), a folder with train/CLASS/ in it, "
                         f"or the folder into which IDRiD was unzipped ({SOURCE})")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise InputError(f"{root}: a file that is no table; expected one that ends in .csv, a folder with "
                             "train/CLASS/ in it, or the folder into which IDRiD was unzipped")
        return read_table(root)
    return read_idrid(root) if is_idrid(root) else read_folders(root)


def is_idrid(root: Path) -> bool:
    """Whether it is a folder to be read as IDRiD's."""
    return root.is_dir() and not (root / "train").is_dir()
