"""Scoring a run: whole-split metrics, files, and checkpoints that are none."""

import csv
import json
import math
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps

import data
import evaluate
import model
import train
from conftest import NARROW, SHALLOW, TINY, drawn, official_tree, photograph
from retina.datasets import cache, readers, records
from retina.evaluation import compare, scoring, task_metrics
from retina.files import InputError
from retina.training import precision
from tasks import TASKS, make_tasks


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


@pytest.fixture
def run(tmp_path, whole, few_resamples):
    """A run to damage."""
    return shutil.copytree(whole(TINY), tmp_path / "run")


def test_metrics_do_not_depend_on_the_batch(run):
    loaded = evaluate.load_run(run, torch.device("cpu"))
    photographs = data.FundusDataset([r for r in readers.read_drawn().records if r.split == "test"], 32)
    loaders = [data.eval_loader(photographs, loaded.tasks, batch) for batch in (3, 10)]
    first, second = (scoring.evaluate_split(loaded.net, loader, loaded.tasks).metrics() for loader in loaders)
    for task in first:
        assert first[task].keys() == second[task].keys()
        for key, value in first[task].items():
            if key == "confusion":
                assert value == second[task][key]
            elif key != "loss":  # the soft Dice in it pools a batch
                # convolutions of 3 and of 10 photographs round differently on some processors, which swaps near ties
                assert value == pytest.approx(second[task][key], abs=1e-5)


@pytest.mark.parametrize("split,suffix,number", [("val", "", 6), ("test", "_test", 10)])
def test_main_writes_metrics_and_predictions(run, monkeypatch, capsys, split, suffix, number):
    run_main(monkeypatch, run, "--split", split)
    text = capsys.readouterr().out
    assert f"{split} split of DRAWN photographs (not IDRiD)" in text and "truth \\ predicted" in text
    stored = json.loads((run / f"metrics{suffix}.json").read_text())
    assert stored["split"] == split and stored["data"] == "drawn"
    rows = list(csv.DictReader(open(run / f"per_photograph{suffix}.csv")))
    assert len(rows) == number == stored["metrics"]["cls"]["photographs"]
    right = sum(r["grade_true"] == r["grade"] for r in rows) / number
    assert right == pytest.approx(stored["metrics"]["cls"]["accuracy"])
    assert {"dice_MA", "pixels_OD", "pixels_OD_true", "grade_p4"} <= set(rows[0])


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
    run = run_of(tmp_path, "seg")
    shutil.rmtree(tree / "A. Segmentation")
    images = tree / "B. Disease Grading" / "1. Original Images"
    shutil.copytree(images / readers.SPLITS["train"][0], images / readers.SPLITS["test"][0])
    for table in list(tree.rglob("*Training*.csv")):
        copy = table.name.replace("a. ", "b. ").replace("Training", "Testing")
        shutil.copy(table, table.with_name(copy))
    with pytest.raises(InputError, match="no photograph of its test split has a label for seg"):
        evaluate.split_records(run, tree, "test")


# ---- a data set with a test part alone ----

def run_of(tmp_path: Path, task: str, classes=()) -> evaluate.Run:
    """A run without a network, of which only the options are asked."""
    names = {"category": list(classes)} if classes else {}
    options = {"names": names, "tasks": [task], "image_size": 64}
    return evaluate.Run(tmp_path / "run", None, make_tasks([task], names), options, 1, [], {}, {}, [], {})


def write_eyes(folder: Path, number: int, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(number):
        drawn(5, first + i, 64).save(folder / f"{first + i}.png")


def test_folders_with_a_test_part_alone_are_scored_by_the_classes_of_the_run(tmp_path):
    """Two of the run's three classes, and their places are those of the run; another class is refused."""
    for k, name in enumerate(("2", "10")):
        write_eyes(tmp_path / "X" / "test" / name, 2, 2 * k)
    run = run_of(tmp_path, "cls", ("1", "2", "10"))
    found = evaluate.split_records(run, tmp_path / "X", "test")
    assert [(r.name, r.category) for r in found] == [(f"test/{n}.png", n.split("/")[0]) for n in (
        "10/2", "10/3", "2/0", "2/1")]
    write_eyes(tmp_path / "X" / "test" / "3", 1, 9)
    with pytest.raises(InputError, match="X/test/3: a class that the run does not have; expected 1, 2, 10; add it"):
        evaluate.split_records(run, tmp_path / "X", "test")
    with pytest.raises(InputError, match="no photograph of its test split has a label for cls"):
        evaluate.split_records(run_of(tmp_path, "cls"), tmp_path / "X", "test")
    with pytest.raises(InputError, match="--tasks cls: photographs with its label in .*X: 0 for training"):
        train.fit(replace(TINY, tasks=("cls",), data=str(tmp_path / "X"), names={"category": ["2", "3", "10"]}),
                  tmp_path / "run")


def test_a_table_of_test_rows_alone_is_scored(tmp_path):
    write_eyes(tmp_path / "new", 3)
    (tmp_path / "t.csv").write_text("image,grade,split\n" + "".join(f"new/{i}.png,{i},test\n" for i in range(3)))
    found = evaluate.split_records(run_of(tmp_path, "cls"), tmp_path / "t.csv", "test")
    assert [r.grade for r in found] == [0, 1, 2]
    with pytest.raises(InputError, match="--tasks cls: photographs with its label in .*t.csv: 0 for training"):
        train.fit(replace(TINY, tasks=("cls",), data=str(tmp_path / "t.csv")), tmp_path / "run")


@pytest.mark.parametrize("task,number", [("cls", 5), ("seg", 3), ("loc", 5)])
def test_the_testing_folders_of_idrid_alone_are_scored(tmp_path, task, number):
    tree = official_tree(tmp_path / "IDRiD", segmentation=3, grading=5)
    for folder in sorted(tree.rglob("a. Training Set")):
        shutil.rmtree(folder)
    for table in tree.rglob("*Training*.csv"):
        table.unlink()
    found = evaluate.split_records(run_of(tmp_path, task), tree, "test")
    assert len(found) == number and all(r.name.startswith("test/") for r in found)
    with pytest.raises(InputError, match=f"--tasks {task}: photographs with its label in .*IDRiD: 0 for training"):
        train.fit(replace(TINY, tasks=(task,), data=str(tree)), tmp_path / "run")


def test_a_training_folder_that_is_lost_is_still_missed(tmp_path):
    """The others have one, so this is no test part."""
    tree = official_tree(tmp_path / "IDRiD", segmentation=1, grading=2)
    shutil.rmtree(tree / "B. Disease Grading" / "1. Original Images" / "a. Training Set")
    with pytest.raises(InputError, match="B. Disease Grading/1. Original Images/a. Training Set: no such folder"):
        readers.read_data(tree)


# ---- what a run and its scores are ----

def test_confusion_rows_are_truth(run):
    stored = evaluate.load_run(run, torch.device("cpu"))
    test = [r for r in readers.read_drawn().records if r.split == "test"]
    loader = data.eval_loader(data.FundusDataset(test, 32), stored.tasks, 16)
    confusion = scoring.evaluate_split(stored.net, loader, stored.tasks).metrics()["cls"]["confusion"]
    assert [sum(row) for row in confusion] == [sum(r.grade == g for r in test) for g in range(5)]


def change(run, how):
    state = torch.load(run / "best.pt", weights_only=True)
    how(state)
    torch.save(state, run / "best.pt")


@pytest.mark.parametrize("spoil,message", [
    (lambda run: (run / "best.pt").unlink(), "best.pt: no such checkpoint; expected a folder made by train.py"),
    (lambda run: (run / "best.pt").write_bytes(b"x" * 100), "best.pt: damaged, or no file of tensors and plain types"),
    (lambda run: (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:5000]), "best.pt: damaged"),
    (lambda run: torch.save({"net": {}, "code": Path}, run / "best.pt"), "best.pt: damaged, or no file of tensors"),
    (lambda run: torch.save({"net": {}}, run / "best.pt"), "not a checkpoint of this project"),
    (lambda run: change(run, lambda state: state["options"].update(encoder="b1")),
     "of another network than its options describe"),
])
def test_what_is_no_run_is_one_line(run, spoil, message):
    spoil(run)
    with pytest.raises(InputError, match=message) as caught:
        evaluate.load_run(run, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_run_of_another_version_is_said_to_be_one(run):
    change(run, lambda state: state["options"].pop("router"))
    with pytest.raises(InputError, match="made by another version of this project, it lacks 'router'; train"):
        evaluate.load_run(run, torch.device("cpu"))


def test_a_file_in_place_of_the_run_names_the_folder(run):
    with pytest.raises(InputError, match="best.pt: a file; expected a run's folder, made by train.py"):
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
        precision.pick_device("cuda")


# ---- several tasks, files, seeds ----

ALL = ("cls", "dme", "seg", "loc")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on a tree of files: three seeds with experts, three without; half of the photographs are shown twice."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setattr(records, "HERE", home)
    patch.setattr(cache, "CACHE", home / "cache")
    patch.setattr(model, "STAGES", SHALLOW)
    patch.setattr(model, "WIDTHS", NARROW)
    for name in ("FEWEST_FOR_TEMPERATURE", "FEWEST_FOR_THRESHOLD"):  # so that something is fitted
        patch.setattr(task_metrics, name, 1)
    tree = official_tree(home / "IDRiD", segmentation=6, grading=20)
    for experts in (4, 0):
        for seed in range(3):
            options = replace(TINY, tasks=ALL, data=str(tree), epochs=1, num_experts=experts, seed=seed, fold="1/2",
                              keep_leaks=True, top_k=2 if experts else 1, balance_weight=0.01 * bool(experts))
            train.fit(options, home / f"e{experts}_s{seed}", quiet=True)
    patch.undo()
    return home


@pytest.fixture(autouse=True)
def _as_the_runs_are(request, monkeypatch):
    if "runs" in request.fixturenames:
        monkeypatch.setattr(cache, "CACHE", request.getfixturevalue("runs") / "cache")
        request.getfixturevalue("few_resamples")


def strict(path):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")
    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_number_has_its_interval(runs, monkeypatch, capsys):
    run_main(monkeypatch, runs / "e4_s0")
    text = capsys.readouterr().out
    stored = strict(runs / "e4_s0" / "metrics.json")
    for scored in (stored, stored["full_size"]):
        for task, values in scored["metrics"].items():
            numbers = {k for k, v in values.items() if isinstance(v, float)} - {"loss"}
            assert numbers <= set(scored["intervals"][task])
            for k in numbers:
                if (interval := scored["intervals"][task][k]) is not None:
                    low, high = interval
                    assert low <= high and (low - 0.05 <= values[k] <= high + 0.05 or "px" in k)
    assert set(stored["metrics"]) == {*ALL, "joint"} and set(stored["full_size"]["metrics"]) == {"seg"}
    assert stored["calibration"] == evaluate.load_run(runs / "e4_s0", torch.device("cpu")).calibration
    assert "masks in the pixels of the files" in text and "optimistic" in text
    assert "referable: sensitivity" in text and "the same of the true optic disc alone" in text
    assert not any(name in text for name in ("referable_", "five_masks", "aupr", "px4288", "within_radius", "_at_temp"))


def test_joint_accuracy_counts_photographs_that_are_right_in_both(runs, monkeypatch):
    run_main(monkeypatch, runs / "e4_s0")
    with open(runs / "e4_s0" / "per_photograph.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["grade_true"] and r["edema_risk_true"]]
    right = [r["grade_true"] == r["grade"] and r["edema_risk_true"] == r["edema_risk"] for r in rows]
    stored = strict(runs / "e4_s0" / "metrics.json")["metrics"]["joint"]
    assert stored["accuracy"] == pytest.approx(sum(right) / len(right)) and stored["photographs"] == len(rows)


def test_the_best_checkpoint_carries_what_was_calibrated_on_validation(runs, monkeypatch):
    for name in ("FEWEST_FOR_TEMPERATURE", "FEWEST_FOR_THRESHOLD"):
        monkeypatch.setattr(task_metrics, name, 1)
    run = evaluate.load_run(runs / "e4_s0", torch.device("cpu"))
    split = evaluate.split_records(run, Path(run.options["data"]), "val")
    scores = scoring.evaluate_split(run.net, data.eval_loader(data.FundusDataset(split, 32), run.tasks, 6), run.tasks)
    assert scores.calibrate() == run.calibration and set(run.calibration["seg"]) == {"MA", "HE", "EX", "SE", "OD"}


def test_opening_the_test_split_is_written_down(runs, monkeypatch, capsys):
    for times in ("1 time", "2 times"):
        run_main(monkeypatch, runs / "e4_s0", "--split", "test")
        assert f"{runs / 'IDRiD'} is opened; test_opened.jsonl in it counts {times}\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in (runs / "e4_s0" / "test_opened.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["checkpoint"] == "best.pt" and len(lines[0]["sha256"]) == 64
    assert lines[0]["when"] <= lines[1]["when"] and lines[0]["epoch"] == 1
    run_main(monkeypatch, runs / "e4_s0")
    assert len((runs / "e4_s0" / "test_opened.jsonl").read_text().splitlines()) == 2


# ---- other data ----

TRAINING, TESTING = "a. Training Set/*.jpg", "b. Testing Set/*.jpg"


def other_tree(runs, home, change=lambda image: image.point(lambda v: v * 2 // 3), which="-"):
    """The tree of the runs once more, with some of its photographs changed; names and labels are the same."""
    root = shutil.copytree(runs / "IDRiD", home / "IDRiD")
    for path in root.rglob(which):
        change(Image.open(path)).save(path, quality=95)
    return root


def told_apart(run, root, split):
    """What results of a split are told apart by."""
    where, photographs = evaluate.load_split(run, str(root), split)
    return evaluate.not_its_own(run, where, split, photographs)


def test_other_photographs_of_the_same_names_do_not_replace_results(runs, monkeypatch, tmp_path, capsys):
    """Nor do those of two data sets of one name replace each other."""
    run, official = shutil.copytree(runs / "e4_s0", tmp_path / "run"), ["metrics.json", "per_photograph.csv",
                                                                        "routing.json"]
    for name in official:
        (run / name).write_text("official")
    root = other_tree(runs, tmp_path / "a", which=TRAINING)
    run_main(monkeypatch, run, "--data", root)
    said = capsys.readouterr().out
    assert f"val split of {root}\nnot the pixels, or not the labels, that the run was chosen on" in said
    assert "optimistic" not in said and [(run / name).read_text() for name in official] == ["official"] * 3
    stored, = (strict(p) for p in run.glob("metrics_IDRiD_*.json"))
    assert stored["data"] == str(root) and not stored["own"]
    assert all(len(list(run.glob(f"{name}_IDRiD_*"))) == 1 for name in ("per_photograph", "routing"))
    second = other_tree(runs, tmp_path / "b", ImageOps.mirror, TRAINING)
    loaded = evaluate.load_run(run, torch.device("cpu"))
    assert len({told_apart(loaded, x, "val") for x in (root, second, runs / "IDRiD")}) == 3


def test_an_external_test_split_does_not_replace_the_official_one(runs, monkeypatch, tmp_path, capsys):
    run = shutil.copytree(runs / "e0_s0", tmp_path / "run")
    for words in ([], ["--data", other_tree(runs, tmp_path, which=TESTING)]):
        run_main(monkeypatch, run, "--split", "test", *words)
        said = capsys.readouterr().out
        assert ("not the test split beside which the run was trained" in said) == bool(words)
        assert f"{words[-1] if words else runs / 'IDRiD'} is opened; test_opened.jsonl in it counts 1 time\n" in said
    assert len(list(run.glob("metrics_test*"))) == 2 == len(list(run.glob("per_photograph_test*")))
    assert strict(run / "metrics_test.json")["data"] == str(runs / "IDRiD")
    opened = [json.loads(line) for line in (run / "test_opened.jsonl").read_text().splitlines()]
    assert [Path(line["data"]).parent for line in opened] == [runs, tmp_path]
    assert len({line["photographs"] for line in opened}) == 2


def test_the_same_data_are_the_runs_own_wherever_they_lie(runs, tmp_path):
    run = evaluate.load_run(runs / "e4_s0", torch.device("cpu"))
    moved = shutil.copytree(runs / "IDRiD", tmp_path / "elsewhere")
    assert [told_apart(run, moved, split) for split in ("val", "test", "train")] == ["", "", ""]


def test_one_other_label_or_photograph_makes_other_data_of_the_split_that_has_it(runs, tmp_path):
    """An external test split in the place of the official one, beside the same validation photographs."""
    run = evaluate.load_run(runs / "e4_s0", torch.device("cpu"))
    root = other_tree(runs, tmp_path / "a", which="b. Testing Set/IDRiD_003.jpg")
    assert told_apart(run, root, "val") == "" and told_apart(run, root, "test").startswith("_IDRiD_")
    name = next(name for name in run.validation if name.startswith("grading/"))
    table = next((root := other_tree(runs, tmp_path / "b")).rglob("*Grading_Training*.csv"))
    table.write_text("\n".join(
        f"{line[:10]}{(int(line[10]) + 1) % 5}{line[11:]}" if line.startswith(name[-9:]) else line
        for line in table.read_text().splitlines()))
    assert told_apart(run, root, "val").startswith("_IDRiD_") and told_apart(run, root, "test") == ""


def test_rows_of_a_table_in_another_order_are_the_same_test_split(tmp_path):
    lines = [f"{i}.jpg,{photograph(tmp_path / f'{i}.jpg', i).grade},{'test' if i > 5 else 'train'}" for i in range(9)]
    options = replace(TINY, tasks=("cls",), data=str(tmp_path / "a.csv"))
    for name, rows in (("a", lines), ("b", lines[::-1]), ("c", lines[:-1])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,grade,split", *rows]))
    tested = data.load_datasets(options, [TASKS["cls"]])[2]["test"]
    run = SimpleNamespace(options=asdict(options), tasks=[TASKS["cls"]], folder="run",
                          fingerprints={"test": tested})
    assert told_apart(run, tmp_path / "b.csv", "test") == "" != told_apart(run, tmp_path / "c.csv", "test")


def test_a_run_of_drawings_on_real_data_says_so(run, monkeypatch, shared_tree, capsys):
    run_main(monkeypatch, run, "--split", "test", "--data", shared_tree)
    said = capsys.readouterr().out
    assert f"test split of {shared_tree}\nnot the test split" in said and "DRAWN" not in said
    stored, = (strict(p) for p in run.glob("metrics_test_IDRiD_*.json"))
    assert stored["data"] == str(shared_tree) and not stored["own"] and not (run / "metrics_test.json").exists()


@pytest.mark.parametrize("change", ["photographs", "labels"])
def test_runs_on_other_data_of_the_same_names_are_not_compared(runs, monkeypatch, tmp_path, change):
    """The second was trained on other data, here made believe: it is scored on those."""
    root, second = other_tree(runs, tmp_path, which=TESTING if change == "photographs" else "-"), tmp_path / "second"
    if change == "labels":
        for table in root.rglob("*Center*.csv"):
            table.write_text(re.sub(r"(\d)\.\d\d", r"\1.99", table.read_text()))
    shutil.copytree(runs / "e0_s0", second)
    changed = torch.load(second / "best.pt", weights_only=True)
    changed["options"]["data"] = str(root)
    torch.save(changed, second / "best.pt")
    with pytest.raises(InputError, match=r"e4_s0 and .*second: \S+ is not the same photograph, or has other labels"):
        run_main(monkeypatch, runs / "e4_s0", second, "--split", "test")
    assert not (second / "test_opened.jsonl").exists()


def test_two_runs_are_compared(runs, monkeypatch, capsys):
    run_main(monkeypatch, runs / "e4_s0", runs / "e0_s0")
    text, stored = capsys.readouterr().out, strict(runs / "e4_s0" / "against_e0_s0.json")
    assert "McNemar's exact p" in text and "corrected for the number of these, 5 (Bonferroni, Holm)" in text
    assert len(stored["claims"]) == 5 and all(c in text for c in stored["claims"])
    assert all(c.endswith("of these networks on these photographs; no claim about ways of training: 1 seed a side, 5 "
                          "are needed") for c in stored["claims"])
    assert stored["claims"][0].startswith("cls quadratic weighted kappa, second minus first: ") and "higher" not in text
    assert stored["masks_in_pixels_of"] == "the files"
    for metrics in stored["compared"].values():
        for d in metrics.values():
            if d["first"] is not None and d["second"] is not None:
                assert d["difference"] == pytest.approx(d["second"] - d["first"]) and 0 <= d["p"] <= 1
    kappas = []
    for name in ("e4_s0", "e0_s0"):
        run = evaluate.load_run(runs / name, torch.device("cpu"))
        split = evaluate.split_records(run, Path(run.options["data"]), "val")
        loader = data.eval_loader(data.FundusDataset(split, 32), run.tasks, 16)
        kappas.append(scoring.evaluate_split(run.net, loader, run.tasks).metrics()["cls"]["kappa"])
    d = stored["compared"]["cls"]["kappa"]
    assert (d["first"], d["second"]) == pytest.approx(kappas, abs=1e-6)


def test_a_run_against_itself_differs_in_nothing(runs, monkeypatch, tmp_path):
    """The file is named after the way from one to the other: as in comparisons, folders may have one name."""
    for name in ("a", "b"):
        shutil.copytree(runs / "e4_s0", tmp_path / name / "same")
    run_main(monkeypatch, tmp_path / "a" / "same", tmp_path / "b" / "same")
    for metrics in strict(tmp_path / "a" / "same" / "against_b_same.json")["compared"].values():
        for d in metrics.values():
            assert d["difference"] in (0, None) and d["p"] in (1, None)


def test_runs_of_several_seeds_count_as_one(runs, monkeypatch, capsys):
    folders = [runs / f"e4_s{seed}" for seed in range(3)]
    run_main(monkeypatch, *folders)
    stored = strict(runs / "e4_s0" / "seeds.json")
    single = []
    for folder in folders:
        run_main(monkeypatch, folder)
        single.append(strict(folder / "metrics.json"))
    for t, k in (("cls", "accuracy"), ("loc", "px4288_disc"), ("seg", "dice")):
        values = [s["metrics"][t][k] for s in single]
        mean = sum(values) / 3
        assert stored["metrics"][t][k] == pytest.approx(mean)
        assert stored["metrics"][t]["sd"][k] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    text, kappas = capsys.readouterr().out, ", ".join(f"{s['metrics']['cls']['kappa']:.3f}" for s in single)
    assert len(stored["runs"]) == 3 and f"quadratic weighted kappa, seed by seed: {kappas}" in text
    assert ("intervals over eyes, for these networks; no claim about ways of training: 3 seeds a side, 5 are "
            "needed") in text


def test_two_sets_of_seeds_are_compared(runs, monkeypatch, capsys):
    order = [runs / f"e{e}_s{s}" for e, s in ((4, 1), (0, 2), (4, 0), (0, 0), (0, 1), (4, 2))]
    run_main(monkeypatch, *order)
    text, stored = capsys.readouterr().out, strict(runs / "e4_s1" / "against_e0_s0.json")
    assert [Path(p).name for p in stored["first"]] == ["e4_s0", "e4_s1", "e4_s2"]
    assert [Path(p).name for p in stored["second"]] == ["e0_s0", "e0_s1", "e0_s2"]
    assert "McNemar" not in text and len(stored["claims"]) == 5


@pytest.mark.parametrize("arguments,message", [
    (["e4_s0", "e4_s1", "e0_s0"], "2 runs against 1; expected as many in both arms"),
    (["e4_s0", "e4_s0"], "e4_s0: named twice"),
    (["e4_s0", "e0_s0", "--routing"], "e0_s0 was trained with --num-experts 0 and has no routing"),
    (["e4_s0", "e4_s1", "--routing"], "--routing: expected one run, got 2"),
    (["e4_s0", "--tiles", "99"], "--tiles 99: expected 1 to 16"),
    (["e4_s0", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
])
def test_mistakes_in_runs_are_one_line(runs, monkeypatch, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        run_main(monkeypatch, *[runs / a if a.startswith("e") else a for a in arguments])
    assert "\n" not in str(caught.value)


def test_three_kinds_of_runs_say_what_differs(runs, monkeypatch, tmp_path):
    other = shutil.copytree(runs / "e4_s0", tmp_path / "other")
    state = torch.load(other / "best.pt", weights_only=True)
    state["options"]["lr"] = 0.5
    torch.save(state, other / "best.pt")
    with pytest.raises(InputError, match="3 runs of 3 arms, which differ in lr, num_experts, top_k"):
        run_main(monkeypatch, runs / "e4_s0", runs / "e0_s0", other)


def test_runs_are_of_one_kind_wherever_their_data_lay_if_the_photographs_were_the_same():
    runs = [SimpleNamespace(options={"seed": seed, "lr": 0.1, "data": path, "workers": seed},
                            fingerprints={"train": seen}, folder="")
            for seed, path, seen in ((1, "/a", "x"), (0, "/b", "x"), (0, "/a", "y"), (1, "/a", "y"))]
    assert compare.arms_of(runs) == [[1, 0], [2, 3]]


def test_runs_on_different_photographs_cannot_be_compared(runs, run, monkeypatch):
    with pytest.raises(InputError, match="different photographs; expected the same data set, fold and split"):
        run_main(monkeypatch, runs / "e4_s0", run)


def test_tiles_want_files_and_lesions(run, runs, whole, monkeypatch, tmp_path, capsys):
    with pytest.raises(InputError, match="drawn photographs have no files of a larger size"):
        run_main(monkeypatch, run, "--tiles", "2")
    run_main(monkeypatch, runs / "e4_s0", "--tiles", "2")
    assert "also in tiles at 2 times the size of training" in capsys.readouterr().out
    tiled = strict(runs / "e4_s0" / "metrics_tiles2.json")
    run_main(monkeypatch, runs / "e4_s0")
    at_once = strict(runs / "e4_s0" / "metrics.json")
    assert tiled["metrics"] == at_once["metrics"] and tiled["full_size"] != at_once["full_size"]
    # a run that was trained on crops outlines lesions in tiles of their scale, unless another is typed
    cropped = shutil.copytree(runs / "e4_s0", tmp_path / "cropped")
    stored = torch.load(cropped / "best.pt", weights_only=True)
    torch.save({**stored, "tiles": 2.0}, cropped / "best.pt")
    capsys.readouterr()
    run_main(monkeypatch, cropped)
    assert "also in tiles at 2 times the size of training" in capsys.readouterr().out
    assert strict(cropped / "metrics.json")["full_size"] == tiled["full_size"]
    run_main(monkeypatch, cropped, "--tiles", "1")
    assert strict(cropped / "metrics_tiles1.json")["full_size"]["metrics"]["seg"]["aupr"] == pytest.approx(
        at_once["full_size"]["metrics"]["seg"]["aupr"], nan_ok=True)
    with pytest.raises(InputError, match="was trained for cls; only seg"):
        run_main(monkeypatch, whole(replace(TINY, tasks=("cls",), epochs=1)), "--tiles", "2")


def test_routes_of_all_tasks_can_be_changed(runs, monkeypatch, capsys):
    """With both grades there is a joint score, which has no router."""
    run_main(monkeypatch, runs / "e4_s0", "--routing")
    assert set(strict(runs / "e4_s0" / "interventions.json")["without the experts"]) == set(ALL)


def test_referable_by_hand():
    """Grades 2, 3, 4 are referable; probabilities at the calibrated temperature."""
    p = torch.tensor([[0.9, 0, 0.1, 0, 0], [0.2, 0.5, 0.3, 0, 0], [0.6, 0, 0, 0, 0.4], [0.1, 0, 0, 0.9, 0],
                      [0.3, 0.2, 0.5, 0, 0]])
    task, truth = TASKS["cls"], torch.tensor([0, 1, 2, 3, 4])
    stats = torch.cat([p, truth[:, None]], 1)
    m = task.metrics(stats, {"temperature": 1.0, "referable": 0.45})
    assert (m["referable_sensitivity"], m["referable_specificity"]) == pytest.approx((2 / 3, 1))
    assert m["referable_auc"] == 1  # 0.4, 0.9, 0.5 against 0.1, 0.3
    m = task.metrics(stats, {"temperature": 1.0, "referable": 0.2})
    assert (m["referable_sensitivity"], m["referable_specificity"]) == pytest.approx((1, 0.5))
    warm = task.metrics(stats, {"temperature": 1e6, "referable": 0.45})  # a fifth for each grade, so 0.6 for all
    assert (warm["referable_sensitivity"], warm["referable_specificity"]) == (1, 0)


def test_the_test_split_is_judged_by_what_was_calibrated_on_validation(runs, monkeypatch):
    run_main(monkeypatch, runs / "e4_s0", "--split", "test")
    stored = strict(runs / "e4_s0" / "metrics_test.json")["metrics"]["cls"]
    loaded = evaluate.load_run(runs / "e4_s0", torch.device("cpu"))
    calibration = loaded.calibration["cls"]
    split = evaluate.split_records(loaded, Path(loaded.options["data"]), "test")
    batches = data.eval_loader(data.FundusDataset(split, 32), loaded.tasks, 16)
    stats = scoring.evaluate_split(loaded.net, batches, loaded.tasks).stats["cls"]
    referred, ill = [], []
    for *p, grade in stats.tolist():
        p = [v ** (1 / calibration["temperature"]) for v in p]
        referred.append(round(sum(p[2:]) / sum(p), 4) >= calibration["referable"])
        ill.append(grade >= 2)
    sensitivity = sum(r and i for r, i in zip(referred, ill)) / sum(ill)
    specificity = sum(not r and not i for r, i in zip(referred, ill)) / (len(ill) - sum(ill))
    assert (stored["referable_sensitivity"], stored["referable_specificity"]) == pytest.approx(
        (sensitivity, specificity))


def two_arms():
    """Grades of 80 photographs of 40 eyes by two networks, the second's in another order."""
    torch.manual_seed(0)
    names, truth = [f"p{i}" for i in range(80)], torch.arange(80) % 5
    eyes = {name: f"eye {i // 2}" for i, name in enumerate(names)}
    logits = [torch.randn(80, 5) + 2 * torch.nn.functional.one_hot(truth, 5) for _ in range(2)]
    stats = [torch.cat([x.softmax(1), truth[:, None]], 1).double() for x in logits]
    first = scoring.SplitScores([TASKS["cls"]], {"cls": names}, {"cls": stats[0]}, eyes=eyes)
    order = torch.randperm(80)
    second = scoring.SplitScores([TASKS["cls"]], {"cls": [names[i] for i in order]}, {"cls": stats[1][order]},
                                 eyes=eyes)
    return first, second, stats, truth


def test_a_comparison_equals_loops_over_eyes():
    first, second, stats, truth = two_arms()
    scoring.align([first, second])
    d = compare.compare([first], [second])["cls"]["accuracy"]
    right = [s[:, :5].argmax(1) == truth for s in stats]
    assert d["difference"] == pytest.approx(float(right[1].double().mean() - right[0].double().mean()))
    assert d["mcnemar"]["only_first_right"] == sum(bool(a and not b) for a, b in zip(*right))
    gap = (right[1].double() - right[0].double()).view(40, 2).mean(1)  # of each eye
    drawn = torch.stack([gap[torch.randint(40, (40,))].mean() for _ in range(4000)])
    assert d["interval"] == pytest.approx(drawn.quantile(torch.tensor([0.025, 0.975]).double()).tolist(), abs=0.03)
    flipped = torch.stack([(gap * (torch.rand(40) < 0.5).double().mul(2).sub(1)).mean() for _ in range(4000)]).abs()
    assert d["p"] == pytest.approx(float((flipped >= gap.mean().abs() - 1e-9).double().mean()), abs=0.03)


def test_intervals_of_the_calibration_error_hold_its_value():
    """Resamples are worse calibrated than what they are drawn from; the interval must not inherit that."""
    torch.manual_seed(1)
    p = (2 * torch.randn(100, 3)).softmax(1).double()
    truth = torch.multinomial(p, 1)  # calibrated: the error is chance alone
    names = [str(i) for i in range(100)]
    one = scoring.SplitScores([TASKS["dme"]], {"dme": names}, {"dme": torch.cat([p, truth], 1)},
                              eyes=dict(zip(names, names)))
    values, limits = scoring.summary([one], [{}])
    low, high = limits["dme"]["calibration_error"]
    assert 0 <= low <= values["dme"]["calibration_error"] <= high and low < 0.03


def test_seeds_must_be_seeds(runs, monkeypatch, tmp_path):
    for name in ("copy1", "copy2"):
        shutil.copytree(runs / "e4_s0", tmp_path / name)
    with pytest.raises(InputError, match="have the same options and the same seed; expected different seeds"):
        run_main(monkeypatch, runs / "e4_s0", tmp_path / "copy1", tmp_path / "copy2")


def test_runs_without_a_common_task(whole, monkeypatch, tmp_path):
    for task in ("cls", "seg"):
        shutil.copytree(whole(replace(TINY, tasks=(task,), epochs=1)), tmp_path / task)
    with pytest.raises(InputError, match="cls was trained for cls, .*seg for seg; expected runs with a task in common"):
        run_main(monkeypatch, tmp_path / "cls", tmp_path / "seg")


# ---- sentences, signs and fine classes of a table ----

def test_words_signs_and_fine_classes_of_a_table(tmp_path, capsys, monkeypatch):
    """From training to a test split that has no training photographs beside it, and to new photographs."""
    monkeypatch.setattr(records, "HERE", tmp_path)
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    header, rows = "image,text,fine,sign_hard_exudates,sign_x,split\n", []
    for i in range(16):
        drawn(5, i, 140).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'haze?' if i % 2 else 'no haze'},{'ab'[i % 2]},{i % 2},{i // 2 % 2}")
    for name, splits_of in (("train", ("train", "val")), ("new", ("test",))):
        (tmp_path / f"{name}.csv").write_text(header + "".join(
            f"{row},{splits_of[i % 4 // 3 % len(splits_of)]}\n" for i, row in enumerate(rows)))
    options = replace(TINY, tasks=("text", "fine", "signs"), data=str(tmp_path / "train.csv"), epochs=1)
    train.fit(options, tmp_path / "runs" / "words", quiet=True)
    run = tmp_path / "runs" / "words"
    run_main(monkeypatch, run)
    said = capsys.readouterr().out
    assert "the best constant sentence" in said and "a random one of training" in said
    assert "macro one-vs-rest AUROC" in said and "hard exudates" not in said  # a sign keeps its name
    run_main(monkeypatch, run, "--data", tmp_path / "new.csv", "--split", "test")
    said = capsys.readouterr().out
    assert "the best constant sentence" in said and "wrote per_photograph_test" in said
    (tmp_path / "train.csv").rename(tmp_path / "elsewhere.csv")
    run_main(monkeypatch, run, "--data", tmp_path / "new.csv", "--split", "test")
    said = capsys.readouterr().out
    assert "not compared with sentences of training" in said and "wrote per_photograph_test" in said
    run_main(monkeypatch, run, "--images", tmp_path / "3.png", "--out", tmp_path / "out", "--no-quality-check")
    row, = csv.DictReader((tmp_path / "out" / "predictions.csv").open())
    assert row["status"] == "answered" and {"text", "fine"} <= row.keys() and any("hard_exudates" in k for k in row)
