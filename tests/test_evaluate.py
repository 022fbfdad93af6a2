"""Scoring a run: whole-split metrics, files, and checkpoints that are none."""

import csv
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import data
import evaluate
import records
import train
from records import InputError
from test_train import TINY, few_drawings  # noqa: F401 (a fixture)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


@pytest.fixture
def run(tmp_path):
    train.fit(TINY, tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_metrics_do_not_depend_on_the_batch(run):
    loaded = evaluate.load_run(run, torch.device("cpu"))
    photographs = data.Photographs([r for r in records.read_drawn().records if r.part == "test"], 32)
    results = [evaluate.score(loaded.net, photographs, loaded.tasks, torch.device("cpu"), b).metrics() for b in (3, 10)]
    for task in results[0]:
        assert results[0][task].keys() == results[1][task].keys()
        for key, value in results[0][task].items():
            if key == "confusion":
                assert value == results[1][task][key]
            elif key != "loss":  # the soft Dice in it pools a batch
                assert value == pytest.approx(results[1][task][key], abs=1e-6)


@pytest.mark.parametrize("split,suffix,number", [("val", "", 6), ("test", "_test", 10)])
def test_main_writes_metrics_and_predictions(run, monkeypatch, capsys, split, suffix, number):
    run_main(monkeypatch, run, "--split", split)
    text = capsys.readouterr().out
    assert f"{split} split of DRAWN photographs (not IDRiD)" in text and "truth \\ predicted" in text
    stored = json.loads((run / f"metrics{suffix}.json").read_text())
    assert stored["split"] == split and stored["data"] == "drawn"
    rows = list(csv.DictReader(open(run / f"predictions{suffix}.csv")))
    assert len(rows) == number == stored["metrics"]["cls"]["photographs"]
    right = sum(r["cls_truth"] == r["cls_predicted"] for r in rows) / number
    assert right == pytest.approx(stored["metrics"]["cls"]["accuracy"])
    assert {"seg_dice_MA", "seg_predicted_pixels_OD", "seg_true_pixels_OD", "cls_p4"} <= set(rows[0])


def test_validation_goes_by_the_names_that_the_run_stored(tmp_path, tree, monkeypatch):
    """One photograph more moves the cut; what is scored stays. One less is said."""
    options = replace(TINY, tasks=("cls",), data=str(tree), epochs=1)
    train.fit(options, tmp_path / "run", quiet=True)
    run = evaluate.load_run(tmp_path / "run", torch.device("cpu"))
    before = evaluate.split_records(run, tree, "val")
    shutil.rmtree(tree / "A. Segmentation")
    assert [r.name for r in evaluate.split_records(run, tree, "val")] == [r.name for r in before] == run.validation
    with pytest.raises(InputError, match="drawn photographs: 1 of the 1 photographs on which .*run was valid"):
        evaluate.split_records(run, None, "val")


def test_a_split_without_any_label_is_one_line(tmp_path, tree):
    train.fit(replace(TINY, tasks=("seg",), epochs=1), tmp_path / "run", quiet=True)
    run = evaluate.load_run(tmp_path / "run", torch.device("cpu"))
    shutil.rmtree(tree / "A. Segmentation")
    images = tree / "B. Disease Grading" / "1. Original Images"
    shutil.copytree(images / records.PARTS["train"][0], images / records.PARTS["test"][0])
    for table in list(tree.rglob("*Training*.csv")):
        copy = table.name.replace("a. ", "b. ").replace("Training", "Testing")
        shutil.copy(table, table.with_name(copy))
    with pytest.raises(InputError, match="no photograph of its test part has a label for seg"):
        evaluate.split_records(run, tree, "test")


def test_confusion_rows_are_truth(run):
    stored = evaluate.load_run(run, torch.device("cpu"))
    test = [r for r in records.read_drawn().records if r.part == "test"]
    scores = evaluate.score(stored.net, data.Photographs(test, 32), stored.tasks, torch.device("cpu"))
    confusion = scores.metrics()["cls"]["confusion"]
    assert [sum(row) for row in confusion] == [sum(r.grade == g for r in test) for g in range(5)]


@pytest.mark.parametrize("spoil,message", [
    (lambda run: (run / "best.pt").unlink(), "best.pt: no such checkpoint; expected a folder made by train.py"),
    (lambda run: (run / "best.pt").write_bytes(b"x" * 100), "best.pt: not a checkpoint of this project"),
    (lambda run: (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:5000]), "not a checkpoint of this"),
    (lambda run: torch.save({"net": {}}, run / "best.pt"), "not a checkpoint of this project"),
])
def test_what_is_no_run_is_one_line(run, spoil, message):
    spoil(run)
    with pytest.raises(InputError, match=message) as caught:
        evaluate.load_run(run, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_run_of_another_version_is_said_to_be_one(run):
    state = torch.load(run / "best.pt", weights_only=True)
    del state["options"]["router"]
    torch.save(state, run / "best.pt")
    with pytest.raises(InputError, match="made by another version of this project, it lacks 'router'; train"):
        evaluate.load_run(run, torch.device("cpu"))


def test_a_file_in_place_of_the_run_names_the_folder(run):
    with pytest.raises(InputError, match="best.pt: a file; expected the run's folder, .*run"):
        evaluate.load_run(run / "best.pt", torch.device("cpu"))


def test_unknown_task_in_a_checkpoint_is_named(run):
    state = torch.load(run / "best.pt", weights_only=True)
    state["options"]["tasks"] = ["smell"]
    torch.save(state, run / "best.pt")
    with pytest.raises(InputError, match="trained for the task 'smell', which tasks.py does not list"):
        evaluate.load_run(run, torch.device("cpu"))


def test_asking_for_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="--device cuda: torch finds no CUDA GPU"):
        evaluate.pick_device("cuda")
