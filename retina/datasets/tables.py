"""Folders of photographs and CSV tables -> records. What every reader of a data set is made of.

    files_in, list_images    what lies in a folder
    read_rows                a CSV file -> its rows, as text
    read_table               a table with our columns -> records
    records_of_rows          rows of any other table, once they have our columns -> records

Every mistake in files or tables is an InputError.
"""

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from retina.datasets.records import LABELS, DataSet, Record, TableRow
from retina.files import InputError


# ---- files ----

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # what file managers leave behind, beside names that start with a dot


def files_in(folder: Path) -> list[Path]:
    """The files and folders in `folder`, sorted by name, without the litter of file managers."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in LITTER)


def list_images(folder: Path, only: bool = False) -> dict[str, Path]:
    """{name without suffix: path} of the photographs in `folder`, sorted by name.

    InputError: no such folder, no photograph in it, two of one name, or, with `only`, any other file in it.
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

COMMAS = "expected a table with cells separated by commas; in Excel choose Save As, CSV UTF-8 (Comma delimited)"
# how others call the columns, in lower case and with _ in place of spaces
USUAL_NAMES = {
    "image": "id id_code file file_name filename path image_path image_id image_name image_file img photo picture name",
    "grade": "diagnosis level label class severity dr dr_grade dr_level retinopathy_grade adjudicated_dr_grade",
    "edema_risk": "dme dme_grade edema risk_of_macular_edema macular_edema_risk", "split": "set subset usage partition",
    "group": "patient patient_id patientid subject subject_id"}


def read_text(path: Path) -> str:
    """The text of a table. InputError: no such file, no UTF-8."""
    try:
        content = path.read_bytes()
        if content.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
            raise InputError(f"{path}: a workbook of a spreadsheet program; {COMMAS}")
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
            raise InputError(f"{path}: UTF-16, which Excel calls Unicode text; {COMMAS}")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a table of labels there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); {COMMAS}") from None


def check_header(path: Path, columns: Sequence[str], wanted: Sequence[str], known: Collection[str]) -> None:
    """InputError: a header that lacks a `wanted` column or has one that is not `known`; with the likely cause."""
    marks = [mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]]
    renames = {}
    for column in (c for c in columns if not any(fnmatchcase(c, k) for k in known)):
        plain = column.lower().replace(" ", "_").replace("-", "_")
        for name in known:
            if plain in (name, *USUAL_NAMES.get(name, "").split()) and name not in columns:
                renames.setdefault(name, column)
    way_out = ", ".join(f"{column!r} to {name!r}" for name, column in renames.items())
    if lacking := [name for name in wanted if name not in columns]:
        if marks:
            hint = f"cells are separated by {marks[0]!r}; write commas in their place, after points in decimal numbers"
        elif any(c.lower().endswith(IMAGE_SUFFIXES) for c in columns):
            hint = "expected the names of the columns above the first photograph"
        else:
            hint = f"rename {way_out}; cells of {wanted[0]!r} are paths with suffix, like photos/0001.jpg" if way_out \
                else "expected a header line, cells separated by commas"
        raise InputError(f"{path}: no column {lacking[0]!r}; found {', '.join(columns) or 'no header'}; {hint}")
    if unknown := [c for c in columns if known and not any(fnmatchcase(c, k) for k in known)]:
        hint = "numbers of rows, as pandas writes them with index=True; " * unknown[0].startswith("Unnamed")
        raise InputError(f"{path}: unknown column {unknown[0]!r}; known are {', '.join(known)}; {hint}rename "
                         f"{way_out or 'it'}, or remove it")


def read_rows(path: Path, wanted: Sequence[str], known: Collection[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with a header, as (where, {column: text}).

    Spaces around cells, rows of empty cells and empty columns without a name are dropped. InputError: not UTF-8, no
    `wanted` column, two columns of one name, a cell in no named column, a quote that is not closed, a cell of two
    lines, and, where the `known` columns are given, another column or more cells than columns.
    """
    rows = []
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(filter(any, lines), [])]
        if twice := [c for c in columns if c and columns.count(c) > 1]:
            raise InputError(f"{path}: two columns are named {twice[0]!r}; expected each name once")
        check_header(path, list(filter(None, columns)), wanted, known)
        for cells in lines:
            where = f"{path} line {lines.line_num}"
            row = dict.fromkeys(filter(None, columns), "")
            if any("\n" in cell for cell in cells):
                raise InputError(f"{where}: a cell of more than one line; expected one, look for a missing quote")
            if known and len(cells) > len(columns):
                raise InputError(f"{where}: {len(cells)} cells, expected {len(columns)}, one for each column")
            for k, cell in enumerate(cell.strip() for cell in cells):
                if k < len(columns) and columns[k]:
                    row[columns[k]] = cell
                elif cell:
                    hint = "; are these pandas' numbers of rows? Remove them, or write with index=False" * (k == 0)
                    raise InputError(f"{where}: the cell {cell!r} stands in no named column; expected {len(row)} cells"
                                     f"{hint}")
            if any(row.values()):
                rows.append((where, row))
    except csv.Error as error:
        raise InputError(f"{path} line {lines.line_num}: not CSV ({error}); expected cells separated by "
                         "commas") from None
    return rows


# ---- rows -> records ----

def table_columns() -> list[str]:
    """The columns that a table of ours may have: image, those of LABELS, split, group."""
    return ["image", *(column for label in LABELS.values() for column in label.columns), "split", "group"]


def read_table(path: Path) -> DataSet:
    """A CSV file with a row per photograph; columns as in `table_columns`, of which only `image` is required.

    Paths lie below the file's folder, and are relative to it or absolute. An empty cell is an unknown label. A mask
    cell may say "none": looked for and not there. InputError: an unknown column, and see `records_of_rows`.
    """
    return DataSet(records_of_rows(path, path.parent, read_rows(path, ["image"], table_columns())))


def records_of_rows(source: Path, folder: Path, rows: Iterable[tuple[str, Mapping[str, str]]]) -> list[Record]:
    """Records from the rows of `source`, (where, {column: text}), as in `table_columns`; files lie below `folder`.

    `split` is train, val or test, empty for train; photographs with the same `group` (an eye, a patient) are never in
    two splits. InputError: no row, a cell that is no valid value, a file that is not there, two rows for one image with
    different labels.
    """
    records: dict[Path, Record] = {}
    masked: dict[Path, Record] = {}  # mask file -> whose it is
    for where, cells in rows:
        cells = dict.fromkeys(table_columns(), "") | cells
        if not cells["image"]:
            raise InputError(f"{where}: the cell of column 'image' is empty; expected the path of a photograph")
        row = TableRow(folder, where, cells)
        image, split = row.file("image"), cells["split"] or "train"
        if split not in ("train", "val", "test"):
            raise InputError(f"{where}: split is {split!r}, expected train, val or test")
        eye = f"group {cells['group']}" if cells["group"] else ""
        record = Record(image.relative_to(folder).as_posix(), image, split, eye=eye, where=where)
        record = record.with_labels(**{name: label.read(row) for name, label in LABELS.items()})
        for mask in filter(None, (record.masks or {}).values()):
            first = masked.setdefault(mask.path.resolve(), record)
            if first.image.resolve() != image.resolve():
                raise InputError(f"{where}: {mask.path.name} is the mask of {first.name} already, see {first.where}; "
                                 "expected a file for each photograph, and none where the lesion is not there")
        before = records.setdefault(image.resolve(), record)
        if replace(before, name="", image=None, where="") != replace(record, name="", image=None, where=""):
            raise InputError(f"{where}: {cells['image']} stands at {before.where} already, with other cells; expected "
                             "one row for an image; remove one")
    if not records:
        raise InputError(f"{source}: no row; expected one for each photograph")
    return list(records.values())
