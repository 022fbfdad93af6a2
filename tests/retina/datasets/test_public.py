"""ODIR-5K, RFMiD and JSIEC-1000 as they come, in small generated copies with their quirks; bad ones are one line."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import data
from conftest import drawn
from retina.datasets import public, splits
from retina.datasets.readers import read_data
from retina.datasets.report import examine, format_report
from retina.files import InputError


ODIR_HEADER = ("ID,Patient Age,Patient Sex,Left-Fundus,Right-Fundus,Left-Diagnostic Keywords,Right-Diagnostic Keywords,"
               "N,D,G,C,A,H,M,O,filepath,labels,target,filename").split(",")
# keywords and label of both eyes; what the patient has, in N to O, is what either eye has
ODIR_PATIENTS = {
    "0": (("cataract", "C"), ("normal fundus", "N")),
    "7": (("moderate non proliferative retinopathy\uff0chypertensive retinopathy", "D', 'H"),
          ("mild nonproliferative retinopathy", "D")),
    "007": (("drusen, lens dust", "O"), ("dry age-related macular degeneration\uff0c", "A")),
    "12": (("normal fundus", "N"), ("pathological myopia\uff0csuspected glaucoma", "M")),
    "13": (("drusen", "O"), ("normal fundus", "N")),
    "14": (("mild nonproliferative retinopathy", "D"), ("normal fundus", "N"))}


@pytest.fixture
def odir(tmp_path) -> Path:
    """The table, two folders of photographs beside it of which one is nested, a row for each eye."""
    root = tmp_path / "ODIR"
    nested, plain = root / "ODIR-5K" / "ODIR-5K" / "Training Images", root / "preprocessed_images"
    rows = []
    for k, (number, eyes) in enumerate(ODIR_PATIENTS.items()):
        patient = [int(any(letter in label for _, label in eyes)) for letter in "NDGCAHMO"]
        names = [f"{number}_left.jpg", f"{number}_right.jpg"]
        for i, (name, (_, label)) in enumerate(zip(names, eyes)):
            save(nested / name, 2 * k + i, 80)
            save(plain / name, 2 * k + i, 64)
            rows.append([number, 50 + k, "Female", *names, *(text for text, _ in eyes), *patient,
                         f"../input/ODIR-5K/Training Images/{name}", f"['{label}']", "[0, 0, 0, 1, 0, 0, 0, 0]", name])
    with open(root / "full_df.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([ODIR_HEADER, *rows])
    return root / "full_df.csv"


def save(path: Path, index: int, side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn(21, index, side).save(path, format="PNG" if path.suffix == ".png" else "JPEG")


RFMID_FOLDERS = {"Training": ("Training_Set", "Training", 5), "Validation": ("Evaluation_Set", "Validation", 2),
                 "Testing": ("Test_Set", "Test", 2)}
RFMID_SIGNS = ["Disease_Risk", "DR", "ARMD", "MH", "HPED"]  # nobody has the last


@pytest.fixture
def rfmid(tmp_path) -> Path:
    """Three sets, each nested in a folder of its own name, whose photographs are all counted from 1."""
    root, index = tmp_path / "RFMiD", 40
    for word, (folder, images, number) in RFMID_FOLDERS.items():
        lines = [",".join(["ID", " Disease_Risk", *RFMID_SIGNS[1:]])]
        for i in range(1, number + 1):
            save(root / folder / folder / images / f"{i}.png", index := index + 1)
            lines.append(f"{i},{int(i != 1)},{i % 2},{int(i == 2)},{int(word == 'Validation')},0")
        table = root / folder / folder / f"RFMiD_{word}_Labels.csv"
        table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return root


JSIEC_FOLDERS = ("0.0.Normal", "0.1.Tessellated fundus", "1.1.DR3", "10.0.Possible glaucoma", "3.RAO",
                 "29.1.Blur fundus with suspected PDR")


@pytest.fixture
def jsiec(tmp_path) -> Path:
    """Folders of classes in a folder of the same name as the one around it; two dots in the names of files."""
    for k, folder in enumerate(JSIEC_FOLDERS):
        for i in range(3):
            save(tmp_path / "JSIEC" / "1000images" / "1000images" / folder / f"1ffa92e4-{k}{i}..JPG", 60 + 3 * k + i)
    return tmp_path / "JSIEC"


def classes(root: Path) -> Path:
    return root / "1000images" / "1000images"


def table_of(root: Path, word: str) -> Path:
    folder = RFMID_FOLDERS[word][0]
    return root / folder / folder / f"RFMiD_{word}_Labels.csv"


# ---- ODIR-5K ----

def test_odir_has_the_words_and_signs_of_each_eye(odir):
    found = {r.image.stem: r for r in read_data(odir).records}
    assert len(found) == 12 and {r.split for r in found.values()} == {"train"}
    assert found["0_left"].text == "cataract" and found["0_right"].text == "normal fundus"
    assert found["7_left"].text == "moderate non proliferative retinopathy, hypertensive retinopathy"
    assert found["007_left"].text == "drusen, lens dust"
    assert found["007_right"].text == "dry age-related macular degeneration"
    none = dict.fromkeys(public.ODIR_SIGNS.values(), 0)
    assert found["0_right"].signs == none | {"normal": 1}  # though the patient has a cataract
    assert found["0_left"].signs == none | {"cataract": 1}
    assert found["7_left"].signs == none | {"diabetes": 1, "hypertension": 1}
    assert found["7_right"].signs == none | {"diabetes": 1}
    assert [*none] == ["normal", "diabetes", "glaucoma", "cataract", "AMD", "hypertension", "myopia", "other"]
    assert found["0_left"].where == f"{odir} line 2" and found["0_left"].grade is None


def test_odir_takes_the_preprocessed_photographs_where_there_are_two(odir):
    found = read_data(odir).records
    assert all(r.name == f"preprocessed_images/{r.image.name}" and Image.open(r.image).size == (64, 64) for r in found)
    shutil.rmtree(odir.parent / "preprocessed_images")
    assert [r.name for r in read_data(odir).records] == [
        f"ODIR-5K/ODIR-5K/Training Images/{r.image.name}" for r in found]
    for path in (odir.parent / "ODIR-5K" / "ODIR-5K" / "Training Images").iterdir():
        path.rename(odir.parent / path.name)
    assert [r.name for r in read_data(odir).records] == [r.image.name for r in found]


def test_no_patient_of_odir_is_on_both_sides_of_a_fold(odir):
    """Two of six can be validated: the others have a sign that nobody else has."""
    records, validated = splits.name_eyes(read_data(odir).records, []), Counter()
    for fold in ("1/2", "2/2"):
        split = splits.split(records, fold)
        sides = [{r.image.name.split("_")[0] for r in side} for side in (split.training, split.validation)]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == {*ODIR_PATIENTS}
        validated.update(sides[1])
    assert validated == {"13": 1, "14": 1}


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8-sig")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("damage,message", [
    (lambda table: [p.unlink() for p in table.parent.rglob("7_right.jpg")],
     "full_df.csv line 5: no photograph 7_right.jpg in a folder below .*ODIR; expected it there; unpack"),
    (lambda table: [(table.parent / "preprocessed_images").rename(table.parent / "512")],
     "line 2: 2 photographs 0_left.jpg below .*ODIR, in 512 and ODIR-5K/ODIR-5K/Training Images; expected one; move"),
    (lambda table: replaced(table, "['C']", "['X']"),
     r"line 2: labels of 0_left.jpg is \"\['X'\]\", expected a list such as \['N'\], of N D G C A H M O"),
    (lambda table: replaced(table, "['C']", "[]"), r"line 2: labels of 0_left.jpg is '\[\]', expected a list"),
    (lambda table: replaced(table, "]\",0_left.jpg", "]\",1_left.jpg"),
     "line 2: filename '1_left.jpg', Left-Fundus '0_left.jpg', Right-Fundus '0_right.jpg'; expected the file of one"),
    (lambda table: replaced(table, ",labels,", ",words,"), "full_df.csv: no column 'labels'; found ID, Patient Age, "),
    (lambda table: table.write_text(",".join(ODIR_HEADER)), "full_df.csv: no row; expected one for each photograph"),
    (lambda table: table.write_text(table.read_text() + table.read_text().splitlines()[1].replace("['C']", "['N']")),
     "line 14: preprocessed_images/0_left.jpg stands at .*full_df.csv line 2 already, with other cells"),
])
def test_a_bad_copy_of_odir_is_one_line(odir, damage, message):
    damage(odir)
    with pytest.raises(InputError, match=message) as caught:
        read_data(odir)
    assert "\n" not in str(caught.value)


# ---- RFMiD ----

def test_rfmid_has_three_splits_whose_numbers_begin_anew(rfmid):
    data_set = read_data(rfmid)
    assert Counter(r.split for r in data_set.records) == {"train": 5, "val": 2, "test": 2} and not data_set.notes
    found = {r.name: r for r in data_set.records}
    assert len(found) == 9 and {"Training_Set/Training_Set/Training/1.png", "Test_Set/Test_Set/Test/1.png"} <= {*found}
    signs = found["Evaluation_Set/Evaluation_Set/Validation/2.png"].signs
    assert signs == {"Disease_Risk": 1, "DR": 0, "ARMD": 1, "MH": 1, "HPED": 0}
    assert data_set.names(["signs"]) == {"signs": RFMID_SIGNS}  # with those that nobody has
    assert found["Test_Set/Test_Set/Test/2.png"].where == f"{table_of(rfmid, 'Testing')} line 3"


def test_rfmid_may_lie_in_one_folder(rfmid):
    """Three tables side by side: each finds the photographs of its own split, of which the names are the same."""
    expected = [(r.split, r.signs, Image.open(r.image).tobytes()) for r in read_data(rfmid).records]
    for word, (folder, *_) in RFMID_FOLDERS.items():
        table_of(rfmid, word).rename(rfmid / table_of(rfmid, word).name)
    assert [(r.split, r.signs, Image.open(r.image).tobytes()) for r in read_data(rfmid).records] == expected
    shutil.rmtree(rfmid / "Test_Set")  # its numbers are not those of photographs of training
    with pytest.raises(InputError, match="RFMiD_Testing_Labels.csv line 2: no photograph 1.png in a folder below"):
        read_data(rfmid)


def test_a_part_of_rfmid_is_enough(rfmid):
    shutil.rmtree(rfmid / "Test_Set")
    data_set = read_data(rfmid)
    assert Counter(r.split for r in data_set.records) == {"train": 5, "val": 2}
    assert data_set.notes == (f"{rfmid} has no RFMiD_Testing_Labels.csv: no photograph of its test split",)
    alone = read_data(table_of(rfmid, "Validation"))
    assert [r.name for r in alone.records] == ["Validation/1.png", "Validation/2.png"] and not alone.notes


@pytest.mark.parametrize("damage,message", [
    (lambda root: (root / "Training_Set/Training_Set/Training/3.png").unlink(),
     "RFMiD_Training_Labels.csv line 4: no photograph 3.png in a folder below .*Training_Set; expected it th"),
    (lambda root: replaced(table_of(root, "Validation"), "2,1,0", "2,1,yes"),
     "Validation_Labels.csv line 3: sign_DR of Evaluation_Set/.*/2.png is 'yes', expected 0 or 1, or nothing where"),
    (lambda root: replaced(table_of(root, "Testing"), "ID,", "image,"), "Testing_Labels.csv: no column 'ID'; found im"),
    (lambda root: shutil.copytree(root / "Test_Set", root / "again"),
     "again/Test_Set/RFMiD_Testing_Labels.csv: .*Test_Set/Test_Set/RFMiD_Testing_Labels.csv is the same table; expec"),
])
def test_a_bad_copy_of_rfmid_is_one_line(rfmid, damage, message):
    damage(rfmid)
    with pytest.raises(InputError, match=message) as caught:
        read_data(rfmid)
    assert "\n" not in str(caught.value)


# ---- JSIEC-1000 ----

def test_jsiec_has_classes_and_broad_classes(jsiec):
    data_set = read_data(jsiec)
    assert len(data_set.records) == 18 and {r.split for r in data_set.records} == {"train"}
    found = {r.image.parent.name: (r.fine, r.category) for r in data_set.records}
    assert found == {"0.0.Normal": ("Normal", "0"), "0.1.Tessellated fundus": ("Tessellated fundus", "0"),
                     "1.1.DR3": ("DR3", "1"), "10.0.Possible glaucoma": ("Possible glaucoma", "10"),
                     "3.RAO": ("RAO", "3"), "29.1.Blur fundus with suspected PDR":
                     ("Blur fundus with suspected PDR", "29")}
    names = data_set.names(["fine", "category"])
    assert names["category"] == ["0", "1", "3", "10", "29"]
    assert dict(zip(names["fine"], names["broad"])) == dict(found.values())
    assert "0.0.Normal/1ffa92e4-00..JPG" in {r.name for r in data_set.records}
    assert data.FundusDataset(data_set.records[:1], 64)[0].fine == "Normal"


def test_jsiec_is_read_from_any_of_its_folders_and_names_stay_apart(jsiec):
    expected = read_data(jsiec).records
    (classes(jsiec) / "Thumbs.db").write_text("litter")
    (jsiec / "__MACOSX").mkdir()
    assert read_data(jsiec).records == read_data(jsiec / "1000images").records == read_data(classes(jsiec)).records
    assert read_data(jsiec).records == expected
    (classes(jsiec) / "3.RAO").rename(classes(jsiec) / "4.2.Normal")
    assert {r.fine for r in read_data(jsiec).records} > {"0.0.Normal", "4.2.Normal", "DR3"}


@pytest.mark.parametrize("damage,message", [
    (lambda root: (root / "more").mkdir(), "more: lies beside folders of classes such as 0.0.Normal; expected no"),
    (lambda root: (root / "3.RAO" / "1ffa92e4-40..JPG").rename(root / "a..JPG"), r"a\.\.JPG: lies beside folders of"),
    (lambda root: (root / "3.RAO" / "a.txt").write_text("x"), "3.RAO/a.txt: expected nothing but photographs"),
    (lambda root: [p.unlink() for p in (root / "3.RAO").iterdir()], "3.RAO: holds no photograph"),
    (lambda root: [shutil.rmtree(root / name) for name in JSIEC_FOLDERS[1:]],
     "1000images: found 1 folder of a class, 0.0.Normal; expected at least two"),
])
def test_a_bad_copy_of_jsiec_is_one_line(jsiec, damage, message):
    damage(classes(jsiec))
    with pytest.raises(InputError, match=message) as caught:
        read_data(jsiec)
    assert "\n" not in str(caught.value)


def test_other_folders_with_numbers_are_not_taken_for_jsiec(jsiec, tree):
    """Folders of classes below train may be called anything; those of IDRiD have a space behind the dot."""
    classes(jsiec).rename(jsiec / "train")
    shutil.rmtree(jsiec / "1000images")
    found = read_data(jsiec).records
    assert {r.category for r in found} == {*JSIEC_FOLDERS} and all(r.fine is None for r in found)
    with pytest.raises(InputError, match="B. Disease Grading: expected IDRiD's folders .* found 1. Original Images"):
        read_data(tree / "B. Disease Grading")


# ---- looking at them ----

@pytest.mark.parametrize("name,said", [
    ("odir", ["train: 12 photographs", "labelled: signs (signs) 12, text (text) 12", "hypertension: 1",
              "12 texts, 8 different", "no photograph has glaucoma"]),
    ("rfmid", ["val: 2 photographs", "Disease_Risk: 4", "no photograph has HPED", "validation as the data set says"]),
    ("jsiec", ["train: 18 photographs (0.0.Normal 3", "cls (category) 18", "fine (fine) 18", "10: 3 (17%)"])])
def test_each_can_be_examined(name, said, request):
    root = request.getfixturevalue(name)
    report, _ = examine(read_data(root), root, "1/3")
    text = format_report(report)
    assert not report["unreadable"] and [words for words in said if words not in text] == []
