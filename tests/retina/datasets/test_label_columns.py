"""Columns fine, sign_* and text of a table: what is read, refused, joined and told of a data set."""

import numpy as np
import pytest
from PIL import Image

import data
from retina.datasets import splits
from retina.datasets.readers import read_table
from retina.datasets.records import LABELS, DataSet, Record
from retina.files import InputError


@pytest.fixture
def table(tmp_path):
    """Write a table of photographs 0.png, 1.png ..., a row for each of `rows` -> its path."""
    def write(columns, *rows):
        for i in range(len(rows)):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines = [f"image,{columns}", *(f"{i}.png,{row}" for i, row in enumerate(rows))]
        (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "t.csv"
    return write


def test_cells_are_labels(table):
    path = table("fine,sign_drusen,sign_macular hole,text", 'mild NPDR,1,0.0,"Left eye, above: drusen."', "10,,1,",
                 "2,0,,x", ",,,")
    a, b, c, d = read_table(path).records
    assert a.labels == {"fine": "mild NPDR", "signs": {"drusen": 1, "macular hole": 0},
                        "text": "Left eye, above: drusen."}
    assert b.labels == {"fine": "10", "signs": {"macular hole": 1}}
    assert c.labels == {"fine": "2", "signs": {"drusen": 0}, "text": "x"} and d.labels == {}
    assert read_table(path).names(["fine", "signs", "text"]) == {
        "fine": ["2", "10", "mild NPDR"], "signs": ["drusen", "macular hole"]}
    sample = data.FundusDataset([a], 32)[0]
    assert (sample.fine, sample.signs, sample.text) == ("mild NPDR", a.signs, a.text)
    assert read_table(table("fine", "2")).names(["fine", "signs"]) == {"fine": ["2"]}


@pytest.mark.parametrize("column,cell,expected", [
    *(("sign_drusen", cell, "0 or 1, or nothing where it is unknown") for cell in ("2", "yes", "0.5", "nan", "-1")),
    *(("text", cell, "words, or nothing where there are none") for cell in ("-", ".", "?!"))])
def test_a_cell_that_is_no_value_is_one_line(table, column, cell, expected):
    path = table(column, cell)
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert str(caught.value) == f"{path} line 2: {column} of 0.png is {cell!r}, expected {expected}"


def test_a_row_twice_must_say_the_same(table):
    path = table("text", "a drusen", "b")
    path.write_text(path.read_text() + "./0.png,a  drusen\n")
    with pytest.raises(InputError, match="t.csv line 4: ./0.png stands at .*line 2 already, with other cells"):
        read_table(path)


# ---- copies ----

def joined(*labels):
    copies = [Record(f"{i}", None, labels=x) for i, x in enumerate(labels)]
    (record,), conflicts = splits.join_copies(copies, [(0, i) for i in range(1, len(copies))], [(9, 9)] * len(copies))
    return record.labels, [(c.label, c.names, c.values, c.used) for c in conflicts]


def test_copies_complete_each_other():
    assert joined({"fine": "a"}, {"text": "x y"}, {"signs": {"s": 1}}, {"fine": "a", "signs": {"t": 0, "s": 1}}) == (
        {"fine": "a", "text": "x y", "signs": {"s": 1, "t": 0}}, [])


def test_copies_that_contradict_each_other():
    """A sign that one copy has is there; of two classes or two texts nobody knows which is right."""
    labels, conflicts = joined({"fine": "a", "text": "x", "signs": {"s": 1, "t": 0}},
                               {"fine": "b", "text": "y", "signs": {"s": 0, "u": 0}})
    assert labels == {"signs": {"s": 1, "t": 0, "u": 0}}
    assert sorted(conflicts) == [("fine", ("0", "1"), ("a", "b"), None), ("s", ("0", "1"), (1, 0), 1),
                                 ("text", ("0", "1"), ("x", "y"), None)]


# ---- a data set ----

def test_broad_classes_are_folders_or_grades_that_all_photographs_of_a_class_share():
    def broad(*labels):
        return DataSet([Record(f"{i}", None, labels=x) for i, x in enumerate(labels)]).names(["fine"]).get("broad")
    assert broad({"fine": "b", "grade": 2}, {"fine": "a", "grade": 0}, {"fine": "b", "grade": 2}) == ["0", "2"]
    assert broad({"fine": "b", "category": "x", "grade": 0}, {"fine": "a", "category": "y"}) == ["y", "x"]
    assert broad({"fine": "b", "grade": 2}, {"fine": "b", "grade": 3}) is None
    assert broad({"fine": "b", "grade": 2}, {"fine": "b"}) is None  # not known of one
    assert broad({"grade": 2}) is None
    assert broad({"fine": "left x", "grade": 2}, {"fine": "y", "grade": 0}) == ["2", "2", "0"]  # left, right x; y
    assert broad({"fine": "left x", "grade": 2}, {"fine": "right x", "grade": 3}) == ["2", "3"]


def test_what_a_report_says_of_them():
    found = [{"fine": f"{k}"} for k in (0, 0, 1)] + [{"signs": {"s": 1, "t": 0}}, {"signs": {"s": 0}},
                                                    {"signs": {"s": 1}}]
    found += [{"text": text} for text in ("Left eye.", "left  eye .", "two words", "eye")]
    records = [Record(f"{i}", None, labels=x) for i, x in enumerate(found)]
    fine, signs, text = (LABELS[name].summary(records) for name in ("fine", "signs", "text"))
    assert fine == {"fine": {"counts": {"0": 2, "1": 1}, "constant_guess": "0", "constant_accuracy": 0.6667}}
    assert signs == {"s": {"photographs": 2, "known": 3}, "t": {"photographs": 0, "known": 1}}
    assert text == {"text": {"photographs": 4, "different": 3, "words": [1, 3], "mean_words": 2.25, "vocabulary": 5,
                             "words_of_one_photograph": 2, "most_frequent": "left eye .",
                             "share_of_most_frequent": 0.5}}
    assert LABELS["fine"].lines(fine) == ["    fine     0: 2 (67%)  1: 1 (33%)   always guessing 0 is right for 66.7%"]
    assert LABELS["signs"].lines(signs) == ["    signs    s: 2  t: 0; no photograph has t"]
    assert LABELS["text"].lines(text) == [
        "    text     4 texts, 3 different, of 1 to 3 words (mean 2.2); 5 words in all, 2 of them in a single text; "
        "always saying 'left eye .' is right for 50.0%"]
    assert all(LABELS[name].lines(LABELS[name].summary([])) == [] for name in ("fine", "signs", "text"))


def test_many_classes_and_signs_are_counted_and_not_listed():
    records = [Record(f"{i}", None, labels={"fine": f"{i % 13}", "signs": {f"s{i % 13}": 1}}) for i in range(40)]
    assert LABELS["fine"].lines(LABELS["fine"].summary(records)) == [
        "    fine     13 classes of 3 to 4 photographs   always guessing 0 is right for 10.0%"]
    line, = LABELS["signs"].lines(LABELS["signs"].summary(records))
    assert line.startswith("    signs    s0: 4  s1: 3  ") and "s11: 3  ... of 13" in line and "s12" not in line


def test_the_words_of_training():
    """Those of two texts at least, the most frequent first, equally frequent ones by alphabet."""
    def with_text(*texts):
        return [Record(f"{i}", None, labels={"text": t} if t else {}) for i, t in enumerate(texts)]
    known, said = data.vocabulary(with_text("b a, b", "A b c c c", None, "b d"), with_text("d a e", None), True)
    assert known == ["b", "a"]
    assert said == ("text: 2 words, in texts of up to 5; 3 of training, which a single text has, and 2 of validation "
                    "count as unknown")
    sided = with_text("left superior", "left superior")  # of which mirror images have other words
    assert sorted(data.vocabulary(sided, [], True)[0]) == ["inferior", "left", "right", "superior"]
    assert sorted(data.vocabulary(sided, [], False)[0]) == ["left", "superior"]
    assert data.vocabulary(with_text("a " * 64), [], True)[1].endswith("; what comes after 63 words is cut off")
    assert "cut off" not in data.vocabulary(with_text("a " * 63), [], True)[1]
