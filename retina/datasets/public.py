"""Public data sets as they come -> records. Their rows get our columns and then go the way of any table.

    ODIR-5K       full_df.csv: a row for each photograph, with the words and signs of its eye
    RFMiD         three tables of 46 signs, one for each split: Pachade et al. 2021, Data 6(2):14
    JSIEC-1000    39 folders of photographs, named like 0.0.Normal: Cen et al. 2021, Nature Communications 12:4828

Every mistake in files or tables is an InputError.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from retina.datasets.records import DataSet, Record
from retina.datasets.tables import IMAGE_SUFFIXES, files_in, list_images, read_rows, read_text, records_of_rows
from retina.files import InputError


def read_public(root: Path) -> DataSet | None:
    """The data set at `root`, a folder or a table, if it is one of these; else None."""
    if root.is_file() and has_odir_header(root):
        return read_odir(root)
    if tables := rfmid_tables(root):
        return read_rfmid(root, tables)
    folder = only_folder(root) if root.is_dir() else None
    return read_numbered_folders(folder) if folder and any(map(numbered, files_in(folder))) else None


def photographs_below(folder: Path) -> Mapping[str, list[Path]]:
    """{name of a file: the photographs of this name in `folder` or anywhere below it}."""
    found = defaultdict(list)
    for path in sorted(folder.rglob("*.*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found[path.name].append(path)
    return found


def only_photograph(found: Sequence[Path], name: str, folder: Path, where: str) -> Path:
    """The one photograph that was found. InputError: none, or several."""
    if not found:
        raise InputError(f"{where}: no photograph {name} in a folder below {folder}; expected it there; unpack the "
                         "photographs beside the table, or remove the row")
    if len(found) > 1:
        folders = " and ".join(str(p.parent.relative_to(folder)) for p in found[:2])
        raise InputError(f"{where}: {len(found)} photographs {name} below {folder}, in {folders}; expected one; move "
                         "the others away")
    return found[0]


# ---- ODIR-5K ----

ODIR_SIGNS = {"N": "normal", "D": "diabetes", "G": "glaucoma", "C": "cataract", "A": "AMD", "H": "hypertension",
              "M": "myopia", "O": "other"}
ODIR_FOLDER = "preprocessed_images"  # the copies to take where there are others, too


def has_odir_header(path: Path) -> bool:
    """Whether the first line of a table is that of ODIR-5K."""
    header = next(filter(None, read_text(path).splitlines()), "")
    return {"Left-Diagnostic Keywords", "Right-Diagnostic Keywords"} <= {name.strip(' "') for name in header.split(",")}


def read_odir(path: Path) -> DataSet:
    """ODIR-5K's full_df.csv: text and signs of each photograph, patients as groups, no split.

    The columns N to O are the patient's; signs come from `labels`, which are the eye's. InputError: see
    `records_of_rows`; a photograph that is not there, or twice, below the table's folder.
    """
    photographs, rows = photographs_below(path.parent), []
    sides = {side: (f"{side}-Fundus", f"{side}-Diagnostic Keywords") for side in ("Left", "Right")}
    for where, cells in read_rows(path, ["ID", "filename", "labels", *sides["Left"], *sides["Right"]]):
        name = cells["filename"]
        texts = [cells[text] for fundus, text in sides.values() if cells[fundus] == name]
        if len(texts) != 1:
            raise InputError(f"{where}: filename {name!r}, Left-Fundus {cells['Left-Fundus']!r}, Right-Fundus "
                             f"{cells['Right-Fundus']!r}; expected the file of one of the two eyes; correct the row")
        found = [p for p in photographs[name] if p.parent.name == ODIR_FOLDER] or photographs[name]
        keywords = (word.strip() for word in re.split("[\uff0c,]", texts[0]))  # U+FF0C, a wide comma, in most
        rows.append((where, {
            "image": str(only_photograph(found, name, path.parent, where).relative_to(path.parent)),
            "text": ", ".join(filter(None, keywords)), "group": cells["ID"],
            **odir_signs(cells["labels"], f"{where}: labels of {name}")}))
    return DataSet(records_of_rows(path, path.parent, rows))


def odir_signs(text: str, what: str) -> dict[str, str]:
    """Columns of signs from a list as Python writes it, such as "['D', 'M']"; none from an empty cell."""
    letters = re.findall(r"\w+", text)
    if text and not (letters and ODIR_SIGNS.keys() >= {*letters}):
        raise InputError(f"{what} is {text!r}, expected a list such as ['N'], of {' '.join(ODIR_SIGNS)}")
    return {f"sign_{sign}": str(int(letter in letters)) for letter, sign in ODIR_SIGNS.items() if text}


# ---- RFMiD ----

RFMID_TABLES = {"RFMiD_Training_Labels.csv": "train", "RFMiD_Validation_Labels.csv": "val",
                "RFMiD_Testing_Labels.csv": "test"}
SPLIT_WORDS = {"train": "train", "val": "val", "eval": "val", "test": "test"}  # how names of folders begin


def rfmid_tables(root: Path) -> dict[str, Path]:
    """{split: its table} in the order of RFMID_TABLES, of those that `root` is or that lie anywhere below it.

    InputError: two of one split.
    """
    tables: dict[str, Path] = {}
    for path in [root] if root.is_file() else sorted(root.rglob("RFMiD_*_Labels.csv")):
        if path.name in RFMID_TABLES:
            first = tables.setdefault(RFMID_TABLES[path.name], path)
            if first != path:
                raise InputError(f"{path}: {first} is the same table; expected one of each name; move one away")
    return {split: tables[split] for split in RFMID_TABLES.values() if split in tables}


def told_split(path: Path) -> str | None:
    """The split that the names of a photograph's folders tell, the innermost first, as Training_Set does; or None."""
    for folder in path.parts[-2::-1]:
        if word := re.search(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})", folder.lower()):
            return SPLIT_WORDS[word[1]]


def read_rfmid(root: Path, tables: Mapping[str, Path]) -> DataSet:
    """RFMiD, {split: its table}: every column but ID is a sign; photographs lie in a folder beside or below the table.

    Each split counts its photographs from 1, so those in a folder whose name tells of another split are not looked at.
    InputError: see `records_of_rows`; a photograph that is not there, or twice.
    """
    folder = root.parent if root.is_file() else root
    rows = []
    for split, table in tables.items():
        photographs = photographs_below(table.parent)
        for where, cells in read_rows(table, ["ID", "Disease_Risk"]):
            name = f"{cells.pop('ID')}.png"
            found = [p for p in photographs[name] if told_split(p.relative_to(table.parent)) in (split, None)]
            image = only_photograph(found, name, table.parent, where)
            rows.append((where, {"image": str(image.relative_to(folder)), "split": split,
                                 **{f"sign_{sign}": cell for sign, cell in cells.items()}}))
    return DataSet(records_of_rows(root, folder, rows), tuple(
        f"{root} has no {name}: no photograph of its {split} split"
        for name, split in RFMID_TABLES.items() if split not in tables and root.is_dir()))


# ---- JSIEC-1000 ----

def numbered(path: Path) -> re.Match | None:
    """The first number (1) and the name (2) of a folder such as "10.0.Possible glaucoma"; None: no such folder."""
    match = re.fullmatch(r"(\d+)\.(?:\d+\.)*([^\W\d].*)", path.name)
    return match if match and path.is_dir() else None


def only_folder(root: Path) -> Path | None:
    """`root`, or what is in it if that is a single folder, and so on down to folders of classes.

    None: there are folders train, val or test, whose classes are read by another reader.
    """
    inside = files_in(root)
    if {p.name for p in inside} & {"train", "val", "test"}:
        return None
    if len(inside) == 1 and inside[0].is_dir() and not numbered(inside[0]):
        return only_folder(inside[0])
    return root


def read_numbered_folders(root: Path) -> DataSet:
    """JSIEC-1000's folders in `root`: the name is the fine class, its first number the category; no split.

    Where two folders differ in their numbers alone, the fine class is the whole name. InputError: something beside the
    folders, fewer than two of them, a file in one that is no photograph.
    """
    matches = {path: numbered(path) for path in files_in(root)}
    classes = {path: match for path, match in matches.items() if match}
    if others := [p for p in matches.keys() - classes if p.is_dir() or p.suffix.lower() in IMAGE_SUFFIXES]:
        raise InputError(f"{min(others)}: lies beside folders of classes such as {next(iter(classes)).name}; expected "
                         "no other folder and no photograph there; move it away")
    if len(classes) < 2:
        raise InputError(f"{root}: found 1 folder of a class, {next(iter(classes)).name}; expected at least two")
    named = Counter(match[2] for match in classes.values())
    return DataSet([Record(f"{folder.name}/{image.name}", image, labels={
        "fine": match[2] if named[match[2]] == 1 else folder.name, "category": match[1]})
        for folder, match in classes.items() for image in list_images(folder, only=True).values()])
