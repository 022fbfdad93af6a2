"""The examination of a data set: it finds what was planted, and changes nothing."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from conftest import photograph, real_idrid
from retina.datasets import readers, report, synthetic
from retina.files import InputError


# ---- the examination ----

def examined(capsys, *arguments) -> str:
    data.main([str(a) for a in arguments])
    return capsys.readouterr().out


@pytest.fixture
def troubled(tmp_path, shared_tree) -> Path:
    """A tree with a copy in the test split, a copy with another grade, and a mask stored in its own way."""
    root = shutil.copytree(shared_tree, tmp_path / "IDRiD")
    images = root / "B. Disease Grading" / "1. Original Images"
    shutil.copy(images / "b. Testing Set" / "IDRiD_003.jpg", images / "a. Training Set" / "IDRiD_005.jpg")
    shutil.copy(images / "a. Training Set" / "IDRiD_001.jpg", images / "a. Training Set" / "IDRiD_011.jpg")
    shutil.copy(images / "a. Training Set" / "IDRiD_007.jpg",
                root / "A. Segmentation" / "1. Original Images" / "a. Training Set" / "IDRiD_02.jpg")
    mask = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set" / "5. Optic Disc"
    values = np.asarray(Image.open(mask / "IDRiD_03_OD.tif"))
    Image.fromarray(np.stack([values * 255, *[values * 0] * 2, values * 0 + 255], 2)).save(mask / "IDRiD_03_OD.tif")
    return root


def test_examination_finds_what_was_planted(troubled, capsys, tmp_path):
    report = json.loads(examined(capsys, troubled, "--json"))
    assert {p: (v["photographs"], v["labels"]) for p, v in report["splits"].items()} == {
        split: (21, {"grade": 15, "edema_risk": 15, "masks": 6, "landmarks": 15}) for split in ("train", "test")}
    grades = [synthetic.plan(8, i).grade for i in range(15)]
    common = Counter(grades).most_common(1)[0][1]
    shares = report["splits"]["train"]["classes"]["grade"]
    assert shares["counts"] == {str(g): grades.count(g) for g in sorted(set(grades))}
    assert shares["constant_accuracy"] == round(common / 15, 4)
    assert report["odd_masks"] == ["segmentation/IDRiD_03 OD RGBA 0 #ff0000"] and report["sizes"] == {"144x96": 42}
    assert sorted(map(sorted, report["copies"])) == [
        ["grading/IDRiD_001", "grading/IDRiD_011"], ["grading/IDRiD_005", "test/grading/IDRiD_003"],
        ["grading/IDRiD_007", "segmentation/IDRiD_02"]]
    assert report["leaks"] == {"validated": [], "training": ["grading/IDRiD_005"],
                               "test_labels": {"grade": 1, "edema_risk": 1, "landmarks": 1},
                               "training_labels": {"grade": 1, "edema_risk": 1, "landmarks": 1}}
    conflicts = {c["label"]: (c["values"], c["used"]) for c in report["conflicts"]}
    assert conflicts["grade"] == ([2, 3], 3) and {"disc", "fovea"} < set(conflicts)
    assert report["same_eye"]["photographs"] == 42 - 2 and report["same_eye"]["eyes"] == 42 - 3
    sides = report["split"]["training"]["photographs"], report["split"]["validation"]["photographs"]
    assert sum(sides) == 21 - 2 - 1 and min(sides) >= 3


def test_examination_is_a_page_and_changes_nothing_but_the_cache(troubled, capsys, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    text = examined(capsys, troubled, "--pictures", tmp_path / "sheets" / "new")
    for words in ("grading/IDRiD_001 = grading/IDRiD_011", "copies: pairs of files that show one photograph: 3",
                  "training photographs of an eye in the test split: 1; by task: cls (grade) 1, dme (edema_risk) 1",
                  "labels that contradict each other:", "segmentation/IDRiD_03 OD RGBA 0 #ff0000", "the split of tra"):
        assert words in text
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "sheets" not in p.parts}
    assert {p: t for p, t in after.items() if p != tmp_path} == {p: t for p, t in before.items() if p != tmp_path}
    sheets = {p.stem: Image.open(p).size for p in (tmp_path / "sheets" / "new").iterdir()}
    assert {"labels", "copies", "conflicts", "leaks", "odd_masks"} <= set(sheets)
    side = report.EXAMINED_SIZE  # three pairs, 12 apart; names and captions of 22, a title of 27, margins of 16 and 14
    assert sheets["copies"] == (6 * side + 2 * 12 + 2 * 16, side + 2 * 22 + 27 + 12 + 2 * 14)


@pytest.mark.parametrize("groups", [False, True])
def test_examination_names_turned_copies_and_what_was_not_compared(tmp_path, capsys, groups):
    """A copy on its side, in the test split; three photographs of 28 pixels."""
    rows = ["image,grade,split,group"]
    for i in range(8):
        photograph(tmp_path / f"{i}.png", i)
        if i > 4:
            Image.open(tmp_path / f"{i}.png").resize((28, 28)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i % 2},,{i}")
    Image.open(tmp_path / "2.png").transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join([*rows, "turned.png,0,test,t" if groups else "turned.png,0,test,"]))
    report = json.loads(examined(capsys, table, "--json", "--pictures", tmp_path / "sheets"))
    assert report["copies"] == [] and report["turned_copies"] == [["2.png", "turned.png"]]
    assert report["leaks"]["training"] == ["2.png"] and report["without_field_of_view"] == []
    assert (tmp_path / "sheets" / "turned_copies.png").exists()
    text = examined(capsys, table)
    assert "copies that were mirrored or turned (not joined; they stay on one side of every split): 1\n    2.png = " \
        "turned.png" in text
    assert ("3 photographs are too small to tell eyes by their vessels" in text) == (not groups)
    assert ("vessels were not compared, since each photograph has a group" in text) == groups


def test_examination_lists_every_file_that_cannot_be_read(tree, capsys):
    images = tree / "B. Disease Grading" / "1. Original Images" / "a. Training Set"
    for name in ("IDRiD_002", "IDRiD_004"):
        (images / f"{name}.jpg").write_bytes(b"\xff\xd8no")
    with pytest.raises(InputError, match="IDRiD: 2 of its photographs cannot be used, see above"):
        data.main([str(tree)])
    text = capsys.readouterr().out
    for words in ("photographs that cannot be used: 2", "IDRiD_002.jpg: not a readable", "IDRiD_004.jpg: not"):
        assert words in text
    assert "the split of train.py" in text
    for path in [*images.iterdir(), *(tree / "A. Segmentation" / "1. Original Images" / "a. Training Set").iterdir()]:
        path.write_bytes(b"no")
    with pytest.raises(InputError, match="none of its 8 photographs can be used; first: .*not a readable image"):
        data.main([str(tree)])


def test_black_masks_and_those_that_vanish_are_counted(tmp_path, capsys):
    """Ten retinas of 1024 pixels: three black files, two lesions of 2x2 pixels, the others of 40x40."""
    lines = ["image,mask_ma"]
    for i in range(10):
        photograph(tmp_path / f"{i}.png", i)
        Image.open(tmp_path / f"{i}.png").resize((1024, 1024)).save(tmp_path / f"{i}.png")
        mask, side = np.zeros((1024, 1024), np.uint8), 0 if i < 3 else 2 if i < 5 else 40
        mask[501:501 + side, 501:501 + side] = 255
        Image.fromarray(mask).save(tmp_path / f"ma{i}.png")
        lines.append(f"{i}.png,ma{i}.png")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    found = json.loads(examined(capsys, tmp_path / "t.csv", "--json"))
    assert found["splits"]["train"]["masks"]["MA"] == {"masks": 7, "none": 3}
    assert sum(found["split"][part]["masks"]["MA"]["none"] for part in ("training", "validation")) == 3
    assert found["black_masks"] == [f"{i}.png MA" for i in range(3)]
    assert found["vanished_masks"] == [f"{i}.png MA" for i in (3, 4)]
    text = examined(capsys, tmp_path / "t.csv")
    for words in ("    masks    MA: 7 (3 have none)  HE: 0", "mask files without a set pixel (they count as none): 3",
                  "masks of which nothing is left at 256 pixels: 2"):
        assert words in text


def test_a_point_outside_of_its_field_is_named_with_its_row(tmp_path, capsys):
    photograph(tmp_path / "a.png", 0), photograph(tmp_path / "b.png", 1)
    (tmp_path / "t.csv").write_text("image,disc_x,disc_y\na.png,150,150\nb.png,5,12\n")
    with pytest.raises(InputError, match="t.csv: 1 of its photographs cannot be used, see above"):
        data.main([str(tmp_path / "t.csv")])
    words = f"    {tmp_path}/t.csv line 3: the disc of {tmp_path}/b.png is at (5, 12), outside of its lit field"
    assert words in capsys.readouterr().out


def test_examination_of_drawn_photographs(capsys, monkeypatch):
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 20), "test": (1, 5)})
    assert "train: 20 photographs (drawn 20)" in examined(capsys)


def test_bad_pictures_folder_is_one_line(tree):
    with pytest.raises(InputError, match="--pictures .*Labels.csv: a file; expected a folder"):
        data.main([str(tree), "--pictures", str(next(tree.rglob("*Labels.csv")))])


# ---- the real photographs, where they are at hand ----

def test_real_examination(capsys, tmp_path):
    report = json.loads(examined(capsys, real_idrid("idrid"), "--json", "--pictures", tmp_path))
    assert report["splits"]["train"]["classes"]["grade"]["counts"] == {"0": 134, "1": 20, "2": 136, "3": 74, "4": 49}
    assert (len(report["copies"]), len(report["same_eye"]["pairs"]), len(report["conflicts"])) == (47, 11, 3)
    assert report["sizes"] == {"1072x712": 467} and not report["unreadable"] and not report["without_field_of_view"]
    assert not report["turned_copies"] and not report["not_compared"]
    assert {p.stem for p in tmp_path.iterdir()} == {"labels", "copies", "same_eye", "just_below", "conflicts"}
    original = json.loads(examined(capsys, real_idrid("idrid-original"), "--json"))
    assert original["sizes"] == {"4288x2848": 15} and list(original["mask_formats"]) == ["P 0 1"]
