"""Reading data sets: IDRiD's quirks, tables, folders of classes; bad input is one line that names the file."""

import runpy
import shutil
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from conftest import ROOT, photograph, real_idrid
from retina import files
from retina.datasets import leaks, readers, records, synthetic
from retina.datasets.masks import MaskFile
from retina.datasets.readers import read_data, read_idrid
from retina.files import InputError


def records_of(root: Path, split: str = "train") -> list[records.Record]:
    return [r for r in read_idrid(root).records if r.split == split]


def read_all(root: Path) -> data.FundusDataset:
    return data.FundusDataset(read_data(root).records, 64)


def grading_csv(root: Path) -> Path:
    return root / "B. Disease Grading" / "2. Groundtruths" / "a. IDRiD_Disease Grading_Training Labels.csv"


def fovea_csv(root: Path) -> Path:
    return root / "C. Localization" / "2. Groundtruths" / "2. Fovea Center Location" / \
        "IDRiD_Fovea_Center_Training Set_Markups.csv"


def images(root: Path, subset: str = "B. Disease Grading") -> Path:
    return root / subset / "1. Original Images" / "a. Training Set"


def first_mask(root: Path, lesion: str) -> Path:
    folder = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set"
    return sorted((folder / readers.MASK_FOLDERS[lesion]).iterdir())[0]


# ---- IDRiD ----

def test_reads_the_official_layout(shared_tree):
    for split, prefix, numbers in (("train", "", range(1, 7)), ("test", "test/", range(55, 61))):
        found = records_of(shared_tree, split)
        masked, graded = ([r for r in found if getattr(r, label) is not None] for label in ("masks", "grade"))
        assert [r.name for r in masked] == [f"{prefix}segmentation/IDRiD_{i:02d}" for i in numbers]
        assert [r.name for r in graded] == [f"{prefix}grading/IDRiD_{i:03d}" for i in range(1, 16)]
        assert all(r.masks is None and r.edema_risk is not None for r in graded)
        for i, r in enumerate(graded):  # labels of the same names differ between the splits and are those of the file
            eye = synthetic.plan(8, i + (1000 if split == "test" else 0))
            assert r.grade == eye.grade
            assert r.landmarks["disc"] == pytest.approx((24 + 96 * eye.disc[0], 96 * eye.disc[1]), abs=0.006)
            assert r.landmarks["fovea"] == pytest.approx((24 + 96 * eye.fovea[0], 96 * eye.fovea[1]), abs=0.006)
    assert {r.image for r in records_of(shared_tree)}.isdisjoint(r.image for r in records_of(shared_tree, "test"))


def test_names_are_unique_across_subsets_and_splits(shared_tree):
    names = [r.name for r in read_idrid(shared_tree).records]
    assert len(set(names)) == len(names) == 42


@pytest.mark.parametrize("subset,label", [("A. Segmentation", "masks"), ("B. Disease Grading", "grade"),
                                          ("C. Localization", "landmarks")])
def test_a_subset_may_be_missing(tree, subset, label):
    if subset == "B. Disease Grading":  # then the localization subset needs its own images
        shutil.copytree(images(tree), images(tree, "C. Localization"))
    shutil.rmtree(tree / subset)
    found = read_idrid(tree)
    assert found.records and all(getattr(r, label) is None for r in found.records)
    for other in {"masks", "grade", "landmarks"} - {label}:
        assert any(getattr(r, other) is not None for r in found.records)
    assert found.notes == (f"{tree} has no '{subset}': nothing to learn {readers.SUBSETS[subset]} from",)


def test_localization_uses_its_own_images_where_it_has_them(tree):
    shutil.copytree(images(tree), images(tree, "C. Localization"))
    found = {r.name: r for r in records_of(tree)}
    assert found["localization/IDRiD_001"].landmarks and found["localization/IDRiD_001"].grade is None
    assert found["grading/IDRiD_001"].landmarks is None
    joined, *_ = leaks.find_eyes(list(found.values()), 64)  # copies by content
    assert len(joined) == 8 and sum(r.grade is not None and r.landmarks is not None for r in joined) == 5


def test_points_without_any_image_are_one_line(tree):
    shutil.rmtree(tree / "A. Segmentation"), shutil.rmtree(tree / "B. Disease Grading")
    with pytest.raises(InputError, match="expected IDRiD's folders .* found C. Localization"):
        read_idrid(tree)


def test_drawn_points_are_where_the_drawing_has_them(monkeypatch):
    monkeypatch.setattr(readers, "DRAWN", {"test": (1, 6)})
    found = readers.read_drawn().records
    photographs = data.FundusDataset(found, 96)
    for i, record in enumerate(found):
        eye, sample = synthetic.plan(*record.drawing), photographs[i]
        assert np.allclose(sample.landmarks, 96 * np.array([eye.disc, eye.fovea]), atol=1e-3)
        y, x = (v.float().mean().item() + 0.5 for v in (sample.masks[-1] == 1).nonzero(as_tuple=True))
        assert np.hypot(*(sample.landmarks[0].numpy() - (x, y))) < 1


# ---- bad input: one line that names the file ----

def damage_text(path_of, old, new):
    def damage(root):
        text = path_of(root).read_text()
        assert old in text
        path_of(root).write_text(text.replace(old, new))
    return damage


def point_of(root: Path, name: str) -> str:
    return next(line for line in fovea_csv(root).read_text().splitlines() if line.startswith(name)).removesuffix(",,,")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])


def damage_nothing_there(root):
    for subset in readers.SUBSETS:
        shutil.rmtree(root / subset)
    (root / "images").mkdir()


def damage_mask_size(root):
    Image.open(first_mask(root, "OD")).resize((72, 48)).save(first_mask(root, "OD"))


@pytest.mark.parametrize("damage,message", [
    (lambda root: shutil.rmtree(root), r"IDRiD: no such file or folder; expected a table \(.csv\), a folder with"),
    (lambda root: [shutil.rmtree(root), root.write_text("x")], r"IDRiD: a file that is no table; expected"),
    (damage_nothing_there, r"IDRiD: expected IDRiD's folders 'A. Segmentation', .* found images"),
    (damage_text(grading_csv, "IDRiD_002,", "IDRiD_002,7"),
     r"Labels.csv line 3: Retinopathy grade of IDRiD_002 is '7\d', expected a whole number from 0 to 4"),
    (damage_text(grading_csv, "IDRiD_002,", "IDRiD_002,x"), r"line 3: Retinopathy grade of IDRiD_002 is 'x\d'"),
    (damage_text(grading_csv, "Retinopathy grade", "Grade"),
     r"Labels.csv: no column 'Retinopathy grade'; found Image name, Grade"),
    (damage_text(grading_csv, "IDRiD_003,", "IDRiD_002,"), r"Labels.csv line 4: a second row for IDRiD_002"),
    (lambda root: (images(root) / "IDRiD_003.jpg").unlink(),
     r"Labels.csv line 4: a grade for IDRiD_003, but no IDRiD_003.jpg"),
    (lambda root: shutil.copy(images(root) / "IDRiD_001.jpg", images(root) / "IDRiD_099.jpg"),
     r"IDRiD_099.jpg: a photograph without its row in .*Labels.csv"),
    (lambda root: shutil.copy(images(root) / "IDRiD_001.jpg", images(root) / "IDRiD_001.png"),
     r"IDRiD_001.png: IDRiD_001.jpg has the same name"),
    (lambda root: shutil.copy(first_mask(root, "EX"), first_mask(root, "EX").with_name("IDRiD_77_EX.tif")),
     r"IDRiD_77_EX.tif: a mask without its photograph IDRiD_77.jpg"),
    (lambda root: shutil.copy(images(root, "A. Segmentation") / "IDRiD_01.jpg",
                              images(root, "A. Segmentation") / "IDRiD_50.jpg"),
     r"IDRiD_50.jpg: a photograph without any mask"),
    (damage_mask_size, r"IDRiD_01_OD.tif: a mask of 72x48 for a photograph of 144x96"),
    (lambda root: truncate(images(root) / "IDRiD_002.jpg"), r"IDRiD_002.jpg: not a readable image"),
    (lambda root: truncate(first_mask(root, "EX")), r"_EX.tif: not a readable image"),
    (lambda root: (images(root) / "IDRiD_002.jpg").write_text("this is no JPEG"),
     r"IDRiD_002.jpg: not a readable image"),
    (lambda root: shutil.rmtree(grading_csv(root).parent), r"Labels.csv: no such file"),
    (lambda root: shutil.rmtree(first_mask(root, "EX").parent), r"3. Hard Exudates: no such folder"),
    (lambda root: [p.unlink() for p in images(root).iterdir()], r"holds no photograph"),
    (damage_text(fovea_csv, "IDRiD_002,", "IDRiD_002,x"),
     r"Markups.csv line 3: the fovea of IDRiD_002 is at \('x[\d.]+', '[\d.]+'\), expected two numbers"),
    (damage_text(fovea_csv, "IDRiD_002,", "IDRiD_002,9"),
     r"line 3: the fovea of IDRiD_002 is at \(9[\d.]+, [\d.]+\), outside IDRiD_002.jpg with its 144x96 pixels"),
    (lambda root: damage_text(fovea_csv, point_of(root, "IDRiD_002"), "IDRiD_002,0.53,0.48")(root),
     r"line 3: the fovea of IDRiD_002 is at \(0.53, 0.48\), in the corner; expected pixels of the image file"),
    (lambda root: damage_text(fovea_csv, point_of(root, "IDRiD_002"), "IDRiD_002,3,48")(root),
     r"the fovea of .*IDRiD_002.jpg is at \(3, 48\), outside of its lit field, which lies in x 2\d to 11\d, y "),
    (damage_text(fovea_csv, "IDRiD_002,", "IDRiD_077,"), r"line 3: a point for IDRiD_077, but no IDRiD_077.jpg"),
    (damage_text(fovea_csv, "IDRiD_003,", "IDRiD_002,"), r"Markups.csv line 4: a second row for IDRiD_002"),
    (damage_text(fovea_csv, "X- Coordinate", "X"), r"Markups.csv: no column 'X- Coordinate'; found Image No, X, Y"),
])
def test_bad_input_is_one_line_naming_the_file(tree, damage, message):
    damage(tree)
    with pytest.raises(InputError, match=message) as caught:
        read_all(tree)
    assert "\n" not in str(caught.value)


# ---- tables ----

@pytest.fixture
def table(tmp_path):
    """Write a table beside three photographs, a.png to c.png (60x40), and a mask; -> its path."""
    for i, name in enumerate("abc"):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")

    def write(*lines):
        (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "labels.csv"
    return write


def test_a_table_of_all_columns(table):
    path = table("image,grade,edema_risk,disc_x,disc_y,fovea_x,fovea_y,mask_ma,mask_ex,split,group",
                 "images/a.png,2,1,10,20,30.5,20,mask.png,none,,p1", "images/b.png,,0,,,1,2,,,val,",
                 "images/c.png,4.0,,,,,,,,test,p1")
    a, b, c = read_data(path).records
    assert (a.grade, a.edema_risk, a.split, a.landmarks) == (2, 1, "train", {"disc": (10, 20), "fovea": (30.5, 20)})
    assert a.masks == {"MA": MaskFile(path.parent / "mask.png"), "EX": None}
    assert (b.grade, b.edema_risk, b.split, b.landmarks, b.masks) == (None, 0, "val", {"fovea": (1, 2)}, None)
    assert (c.grade, c.edema_risk, c.split, c.landmarks) == (4, None, "test", None)
    assert a.eye == c.eye != b.eye and a.where == f"{path} line 2"
    sample = data.FundusDataset([a], 64)[0]
    values = [sorted(m.unique().tolist()) for m in sample.masks]  # MA known, EX known to be absent, others not known
    assert values == [[0, 1], [255], [0], [255], [255]]


@pytest.mark.parametrize("side,problem", [(450, "outside 2.jpg with its 300x300"), (380, "outside of its lit field")])
def test_points_of_originals_beside_reduced_photographs_are_one_line(tmp_path, side, problem):
    """Photographs of 300 pixels with the discs of larger ones: of the first two eyes they still lie in the field."""
    lines = ["image,disc_x,disc_y"]
    for i in range(4):
        photograph(tmp_path / f"{i}.jpg", i)
        lines.append(",".join([f"{i}.jpg", *(f"{side * v:.1f}" for v in synthetic.plan(11, i).disc)]))
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"t.csv line 4: .*disc of .*2.jpg is at .*{problem}.*; expected pixels of "
                                         "this file; scale points of a larger or uncropped original"):
        data.FundusDataset(read_data(tmp_path / "t.csv").records, 64)


def test_rows_that_say_the_same_are_one(table):
    found = read_data(table("image,grade", "images/a.png,1", "images/../images/a.png,1", "images/b.png,2")).records
    assert [r.grade for r in found] == [1, 2]


def png_header(path: Path, width: int, height: int) -> None:
    """A PNG that claims a size and holds next to nothing."""
    def chunk(chunk_type, content):
        checksum = zlib.crc32(chunk_type + content)
        return struct.pack(">I", len(content)) + chunk_type + content + struct.pack(">I", checksum)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
                     chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def truncated_tiff(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    truncate(path)


@pytest.mark.parametrize("lines,message", [
    (["picture,cls", "images/a.png,1"], "labels.csv: no column 'image'; found picture, cls; rename 'picture' to 'im"),
    ([""], "labels.csv: no column 'image'; found no header"),
    (["image,grade"], "labels.csv: no row"),
    (["image;cls", "images/a.png;1"], "labels.csv: no column 'image'; found image;cls; cells are separated by ';'; wr"),
    (["image;disc_x;disc_y", "images/a.png;10,5;3,5"], "found image;disc_x;disc_y; cells are separated by ';'; write"),
    (["image\tgrade", "images/a.png\t1"], r"cells are separated by '\\t'; write commas in their place"),
    (["sep=;", "image;grade", "images/a.png;1"], "cells are separated by ';'; write commas in their place"),
    (["images/a.png,1", "images/b.png,2"], "no column 'image'; .*expected the names of the columns above the first ph"),
    (["id_code,diagnosis", "images/a,1"], "no column 'image'; found id_code, diagnosis; rename 'id_code' to 'image', "
     "'diagnosis' to 'grade'; cells of 'image' are paths with suffix, like photos/0001.jpg"),
    (["Image,Grade", "images/a.png,1"], "no column 'image'; found Image, Grade; rename 'Image' to 'image', 'Grade' to"),
    (["image,level", "images/a.png,1"], "unknown column 'level'; known are .*; rename 'level' to 'grade', or remov"),
    (["image,Patient ID", "images/a.png,1"], "unknown column 'Patient ID'; .*; rename 'Patient ID' to 'group', or rem"),
    ([",image,grade", "0,images/a.png,1"], "the cell '0' stands in no .*pandas' numbers of rows. Remove them, or writ"),
    (["Unnamed: 0,image,grade", "0,images/a.png,1"], "unknown column 'Unnamed: 0'; .* as pandas writes them with inde"),
    (["image,cls", "images/a.png,1"], "labels.csv: unknown column 'cls'; known are image, grade, edema_risk, fine, "),
    (["image,grade,grade", "images/a.png,1,1"], "labels.csv: two columns are named 'grade'"),
    (["image,grade", "images/a.png,1", "images/b.png,two"], "line 3: grade of images/b.png is 'two', expected a whole"),
    (["image,grade", "images/a.png,7"], "line 2: grade of images/a.png is '7', expected a whole number from 0 to 4"),
    (["image,grade", "images/a.png,1.5"], "line 2: grade of images/a.png is '1.5', expected"),
    (["image,group", 'images/a.png,"x', "images/b.png,"], "line 3: not CSV .unexpected end of data."),
    (["image,group", 'images/a.png,"x', 'images/b.png,"'], "line 3: a cell of more than one line"),
    (["image,disc_x,disc_y", "images/a.png,1_0,3"], "disc of images/a.png is at .'1_0', '3'., expected two numbers"),
    (["image,grade", "deep.png,1"], "line 2: .*deep.png: 16 bits a channel; expected 8: convert it"),
    (["image,mask_ma", "images/a.png,levels.png"], "line 2: .*levels.png: 4 values: 0 .25 %., 1 .* expected two"),
    (["image,grade", "images/a.png,1,2"], "line 2: 3 cells, expected 2, one for each column"),
    (["image,grade,", "images/a.png,1,2"], "line 2: the cell '2' stands in no named column; expected 2 cells"),
    (["image,edema_risk", "images/a.png,3"],
     "line 2: edema_risk of images/a.png is '3', expected a whole number from 0 to 2"),
    (["image,grade", "images/d.png,1"], "line 2: image 'images/d.png': no such file: "),
    (["image,grade", "images,1"], "line 2: image 'images': a folder: "),
    (["image,grade", "../outside.png,1"], "line 2: image '../outside.png': leads out of .*; expected a path below the"),
    (["image,grade", "images/../../outside.png,1"], "line 2: image 'images/../../outside.png': leads out of"),
    (["image,mask_ma", "images/a.png,/etc/passwd"], "line 2: mask_ma '/etc/passwd': leads out of"),
    (["image,grade", ",1"], "line 2: the cell of column 'image' is empty"),
    (["image,mask_ma", "images/a.png,m.png"], "line 2: mask_ma 'm.png': no such file"),
    (["image,disc_x,disc_y", "images/a.png,60.5,3"],
     r"line 2: disc of images/a.png is at \(60.5, 3\), outside a.png with its 60x40 pixels"),
    (["image,disc_x,disc_y", "images/a.png,5,"],
     r"line 2: disc of images/a.png is at \('5', ''\), expected two numbers"),
    (["image,disc_x", "images/a.png,5"], r"line 2: disc of images/a.png is at \('5', ''\), expected two numbers"),
    (["image,fovea_x,fovea_y", "images/a.png,5,nan"], r"fovea of images/a.png is at \('5', 'nan'\), expected two num"),
    (["image,fovea_x,fovea_y", "images/a.png,NA,NA"], r"at \('NA', 'NA'\), .* leave both cells empty where it is not"),
    (["image,disc_x,disc_y", "images/b.png,30,20", "images/a.png,0.31,0.52"],
     r"line 3: disc of images/a.png is at \(0.31, 0.52\), in the corner; .* multiply shares of its sides by its width"),
    (["image,disc_x,disc_y", "images/a.png,0,0.0"],
     r"line 2: disc of images/a.png is at \(0, 0.0\), in the corner; .* leave both cells empty where it is not there"),
    (["image,disc_x,disc_y", "images/a.png,-1,-1"], r"line 2: disc of images/a.png is at \(-1, -1\), in the corner"),
    (["image,fovea_x,fovea_y", "images/a.png,1,1e0"], r"line 2: fovea of images/a.png is at \(1, 1e0\), in the corner"),
    (["image,fovea_x,fovea_y", "images/a.png,-1,20"],
     r"at \(-1, 20\), outside a.png with its 60x40 pixels; expected pixels of this file; scale points of a larger or"),
    (["image,grade,split", "images/a.png,1,dev"], "line 2: split is 'dev', expected train, val or test"),
    (["image,grade", "images/a.png,1", "images/b.png,0", "images/a.png,2"],
     "line 4: images/a.png stands at .*labels.csv line 2 already, with other cells"),
    (["image,grade", "images/a.png,1", "cut.tif,0"], "labels.csv line 3: .*cut.tif: not a readable image"),
    (["image,grade", "images/a.png,1", "huge.png,0"], "line 3: .*huge.png: claims more than 89 million pixels"),
    (["image,grade", "labels.csv,1"], "labels.csv line 2: .*labels.csv: not a readable image"),
    (["image,mask_ma", "images/a.png,huge.png"], "labels.csv line 2: .*huge.png: claims more than"),
    (["image,mask_ma", "images/a.png,images/other.png"], "line 2: .*other.png: a mask of 30x40 for a photo"),
])
def test_a_bad_table_is_one_line_naming_file_and_row(table, lines, message):
    path = table(*lines)
    truncated_tiff(path.parent / "cut.tif"), png_header(path.parent / "huge.png", 100_000, 100_000)
    Image.new("L", (30, 40)).save(path.parent / "images" / "other.png")
    Image.fromarray(np.full((40, 60), 30000, np.uint16)).save(path.parent / "deep.png")
    Image.fromarray((np.arange(2400).reshape(40, 60) % 4).astype(np.uint8)).save(path.parent / "levels.png")
    with pytest.raises(InputError, match=message) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cell,meant,differs", [
    ("images/a", "images/a.png", "suffix"), ("images/A.PNG", "images/a.png", "upper and lower case"),
    (r"images\a.png", "images/a.png", "slashes"), ("a.png", "images/a.png", "folder"),
    ("/photographs/of/2019/a.png", "images/a.png", "folder"), ("images/a.jpg", "images/a.png", "suffix"),
    ("images/7.png", "images/0007.png", "leading zeros"), ("7", "images/0007.png", "folder, suffix, leading zeros"),
    (r"C:\Photos\B.JPG", "images/b.png", "slashes, upper and lower case, folder, suffix"),
    ("images/u\u0308.png", "images/\u00fc.png", "accents"), ("images/scan.2020", "images/scan.2020.png", "suffix")])
def test_a_path_that_is_nearly_right_is_answered_with_the_right_one(table, cell, meant, differs):
    path = table("image,grade", f"{cell},1")
    for name in ("0007", "\u00fc", "scan.2020"):
        shutil.copy(path.parent / "images" / "a.png", path.parent / "images" / f"{name}.png")
    with pytest.raises(InputError) as caught:
        read_data(path)
    assert str(caught.value).endswith(f"; did you mean {meant!r}, which differs in {differs}?")
    assert "\n" not in str(caught.value)
    assert read_data(table("image,grade", f"{meant},1")).records[0].grade == 1


def test_the_file_of_a_mask_is_suggested_without_its_values(table):
    with pytest.raises(InputError, match="no such file: .*; did you mean 'mask.png', which differs in upper and lower"):
        read_data(table("image,mask_ma", "images/a.png,MASK.png=255"))


@pytest.mark.parametrize("typed,meant", [
    ("0000", "photos/0000.jpg"), ("0000.JPG", "photos/0000.jpg"), ("Photos/0000.jpg", "photos/0000.jpg"),
    ("0001.png", "photos/0001.jpg"), ("masks/0000", "masks/0000.png")])
def test_a_photograph_is_meant_rather_than_its_mask(tmp_path, typed, meant):
    for name in ("masks/0000.png", "photos/0000.jpg", "photos/0001.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    said = records.did_you_mean(tmp_path, typed)
    assert said.startswith(f"; did you mean {meant!r}, which differs in ") and not said.endswith(" in ?")


def test_a_path_that_is_like_nothing_has_no_suggestion(table):
    with pytest.raises(InputError, match="no such file: .*relative to the table$"):
        read_data(table("image,grade", "images/zebra.png,1"))


def test_an_absolute_path_below_the_table_is_the_same_as_a_relative_one(table):
    """The record's name, which a run stores, does not depend on where the data lie."""
    path = table("image,grade", "images/a.png,1", "images/b.png,2")
    expected = read_data(path).records
    table("image,grade", f"{path.parent}/images/a.png,1", f"{path.parent}/images/../images/b.png,2")
    assert read_data(path).records == expected and [r.name for r in expected] == ["images/a.png", "images/b.png"]


@pytest.mark.parametrize("content,message", [
    ("image,grade\na.png,1\n".encode("utf-16"), "UTF-16, which Excel calls Unicode text"),
    ("image,grade\na.png,1\n".encode("utf-16-le"), "UTF-16, which"), (b"PK\3\4" + bytes(99), "a workbook of a sp"),
    (b"\xd0\xcf\x11\xe0" + bytes(99), "a workbook of a spreadsheet"), (b"image\nb\xe4r.png\n", "not UTF-8 text .*")])
def test_a_file_that_is_no_csv_says_how_excel_writes_one(tmp_path, content, message):
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"labels.csv: {message}.*; in Excel choose Save As, CSV UTF-8 .Comma delim"):
        read_data(tmp_path / "labels.csv")


@pytest.mark.parametrize("suffix", ["xlsx", "xls", "tsv", "txt"])
def test_a_table_of_another_suffix_is_one_line(tmp_path, suffix):
    (tmp_path / f"t.{suffix}").write_text("image\tgrade\n")
    with pytest.raises(InputError, match=f"t.{suffix}: a file that is no table; expected one that ends in .csv, cells"):
        read_data(tmp_path / f"t.{suffix}")


def test_blank_lines_byte_order_marks_and_quotes(table):
    path = table("", '"image", grade', '"images/a.png",  1', "", ",", "images/b.png,2")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [r.grade for r in read_data(path).records] == [1, 2]


def test_a_photograph_on_its_side_is_read_as_a_viewer_shows_it(tmp_path):
    """The camera notes that it was turned; width, points and copies go by what people see."""
    upright = photograph(tmp_path / "upright.jpg", 0, quality=95)
    Image.open(upright.image).crop((0, 20, 300, 280)).save(tmp_path / "upright.jpg", quality=95)
    turned = Image.open(tmp_path / "upright.jpg").transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x112] = 6  # "turn by 90 degrees clockwise to view"
    turned.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    (tmp_path / "t.csv").write_text("image,disc_x,disc_y\nupright.jpg,250,100\nturned.jpg,250,100\n")
    a, b = read_data(tmp_path / "t.csv").records
    found, *_ = leaks.find_eyes([a, b], 64)
    assert len(found) == 1 and found[0].landmarks == {"disc": (250, 100)}
    x, y = (data.FundusDataset([r], 64)[0] for r in (a, b))
    assert (x.geometry.width, x.geometry.height) == (y.geometry.width, y.geometry.height) == (300, 260)
    assert (x.image.float() - y.image.float()).abs().mean() < 3


def test_a_table_that_is_not_utf8_is_one_line(table):
    path = table("image,grade")
    path.write_bytes("image,grade\nb\xe4r.png,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="labels.csv: not UTF-8 text"):
        read_all(path)


@pytest.mark.parametrize("arguments", [["train.py", "--tasks", "cls", "--data"], ["data.py"]])
def test_a_bad_table_ends_the_program_with_status_2(table, arguments, monkeypatch, capfd):
    path = table("image,grade", "images/a.png,9")
    monkeypatch.setattr(sys, "argv", [*arguments, str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    said = capfd.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err == f"error: {path} line 2: grade of images/a.png is '9', expected a whole number from 0 to 4\n"


def test_a_folder_without_permission_is_one_line(tree, monkeypatch, capsys):
    """The error is made by hand: whoever runs this may be root, who is never refused."""
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SystemExit) as stop:
        files.run_cli(lambda: read_data(tree))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {images(tree, 'A. Segmentation')}: no permission; ") and text.count("\n") == 1


def test_what_the_system_refuses_is_one_line(folders, capsys):
    (folders / "train" / "rose" / "link.png").symlink_to("nowhere.png")
    with pytest.raises(SystemExit) as stop:
        files.run_cli(lambda: read_all(folders))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.endswith("link.png: No such file or directory\n") and text.count("\n") == 1


# ---- folders of classes ----

@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 5), ("test", 2)):
        for name in ("rose", "daisy", "10", "9"):
            (tmp_path / "flowers" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 255, (30, 45, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "flowers" / split / name / f"{i}.png")
    return tmp_path / "flowers"


def test_photographs_of_every_format_count(folders):
    one = Image.fromarray(synthetic.render(synthetic.plan(3, 0), 64)[0])
    for k, suffix in enumerate(readers.IMAGE_SUFFIXES):
        (one.convert("L") if suffix == ".pgm" else one).save(folders / "train" / "9" / f"new{k}{suffix.upper()}")
    found = [r for r in read_data(folders).records if "/9/new" in r.name]
    assert {".ppm", ".gif", ".jfif"} < {r.image.suffix.lower() for r in found} == set(readers.IMAGE_SUFFIXES)
    samples = {r.image.suffix.lower(): s.image.float() for r, s in zip(found, data.FundusDataset(found, 64))}
    assert samples[".png"].std() > 30
    for suffix, image in samples.items():  # another photograph would be 40 grey levels away
        gap = abs(image.mean(0) - samples[".png"].mean(0)).mean()
        assert gap == 0 if suffix in (".tif", ".tiff", ".bmp", ".ppm") else gap < 15, suffix


def test_folders_of_classes(folders):
    (folders / "train" / "rose" / "Thumbs.db").write_text("litter")
    found = read_data(folders)
    assert found.names(["category"]) == {"category": ["9", "10", "daisy", "rose"]}
    assert Counter((r.split, r.category) for r in found.records) == {(p, c): n for p, n in (("train", 5), ("test", 2))
                                                                     for c in ("9", "10", "daisy", "rose")}
    assert all(r.grade is None and r.name.split("/")[1] == r.category for r in found.records)
    sample = data.FundusDataset(found.records, 64)[0]
    assert sample.geometry.scale_x == 64 / 45 and sample.category == "10"  # the whole picture: no field of view in it


@pytest.mark.parametrize("damage,message", [
    (lambda root: [shutil.rmtree(root / "train" / n) for n in ("rose", "9", "10")],
     "train: found 1 folders; expected one for each class, at least two"),
    (lambda root: (root / "test" / "tulip").mkdir(), "test/tulip: a class that 'train' does not have; expected 9, 10"),
    (lambda root: (root / "train" / "rose" / "a.txt").write_text("x"), "rose/a.txt: expected nothing but photographs"),
    (lambda root: (root / "train" / "rose" / "more").mkdir(), "rose/more: expected nothing but photographs"),
    (lambda root: (root / "train" / "tulip").mkdir(), "train/tulip: holds no photograph"),
    (lambda root: (root / "test").rename(root / "valid"), "valid: expected no folders but train, val and test"),
    (lambda root: (root / "train" / "9" / "0.png").rename(root / "train" / "0.png"),
     "train/0.png: a photograph outside of a class; expected it in .*train/CLASS/"),
    (lambda root: (root / "val").mkdir(), "val: holds no class; expected 9, 10, daisy, rose; or remove it"),
    (lambda root: (root / "train" / "rose" / "0.png").write_text("x"), "rose/0.png: not a readable image"),
])
def test_bad_folders_are_one_line(folders, damage, message):
    damage(folders)
    with pytest.raises(InputError, match=message) as caught:
        read_all(folders)
    assert "\n" not in str(caught.value)


# ---- the real photographs, where they are at hand ----

def test_real_counts_and_labels():
    found = records_of(real_idrid("idrid"))
    masked = [r for r in found if r.masks is not None]
    assert (len(masked), len(found)) == (54, 467)
    files = Counter(lesion for r in masked for lesion, path in r.masks.items() if path)
    assert files == {"MA": 54, "HE": 53, "EX": 54, "SE": 26, "OD": 54}
    assert [r.name for r in masked if not r.masks["HE"]] == ["segmentation/IDRiD_43"]
    assert Counter(r.grade for r in found if r.grade is not None) == {0: 134, 1: 20, 2: 136, 3: 74, 4: 49}
    assert Counter(r.edema_risk for r in found if r.edema_risk is not None) == {0: 177, 1: 41, 2: 195}
    points = {r.name: r.landmarks for r in found if r.landmarks}
    assert len(points) == 413 and all(set(p) == {"disc", "fovea"} for p in points.values())
    assert points["grading/IDRiD_001"]["disc"] == (714.5, 451.25)
