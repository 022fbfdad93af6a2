"""Training: what a step learns, what a run leaves, that it repeats, and what a user's mistake looks like."""

import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import tasks
import train
from conftest import PROGRAM, ROOT, TINY, drawn, rendered, start, state_and_batch
from retina import files
from retina.datasets import readers, records, splits, synthetic
from retina.evaluation import scoring
from retina.files import InputError, RunError
from retina.inference import full_size
from tasks import TASKS
from train import LossWeights


pytestmark = pytest.mark.usefixtures("few_drawings", "few_resamples", "shallow")


def weights(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)["net"]


# ---- a run ----

def test_a_run_leaves_what_it_should(tmp_path):
    best = train.fit(TINY, tmp_path / "run", ["a note"], quiet=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["notes"] == ["a note"] and config["options"]["tasks"] == ["cls", "seg"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert {"cls", "seg", "balance"} == set(line["train"])
        assert line["val"]["seg"].keys() >= {"loss", "dice", "iou", "dice_MA"} and line["val"]["cls"]["photographs"] > 0
        for share in ("tokens", "weight"):
            assert sum(line["expert_usage"]["cls"][share]) == pytest.approx(2 if share == "tokens" else 1)
            assert len(line["expert_usage"]["seg"][share]) == 4
        assert line["lr"] >= 0 and line["seconds"] > 0 and line["images_per_second"] > 0
    assert best["score"] == max(line["score"] for line in lines)
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert state["epoch"] == best["epoch"]


def test_thresholds_fit_the_answers_in_tiles(tmp_path, shared_tree, monkeypatch):
    """Of a run on crops, those of masks are fitted again, by the best checkpoint, to the mean of whole and tiles."""
    asked, real = [], train.score_at_full_size

    def scored(net, tasks, records, size, tiles, *rest):
        asked.append((size, tiles, net.state_dict()["heads.seg.conv.bias"].clone()))
        scores = real(net, tasks, records, size, tiles, *rest)
        return SimpleNamespace(calibrate=lambda: {"seg": scores.calibrate()["seg"] | {"MA": 0.123}})
    monkeypatch.setattr(train, "score_at_full_size", scored)
    options = replace(TINY, data=str(shared_tree), epochs=1, keep_leaks=True)
    found = {}
    for crops in (1.0, 2.0):
        train.fit(replace(options, crops=crops), tmp_path / f"{crops}", quiet=True)
        found[crops] = torch.load(tmp_path / f"{crops}" / "best.pt", weights_only=True)
    (size, tiles, bias), = asked
    assert (size, tiles) == (32, 2.0) and torch.equal(bias, found[2.0]["net"]["heads.seg.conv.bias"])
    assert found[2.0]["calibration"]["seg"]["MA"] == 0.123 != found[1.0]["calibration"]["seg"]["MA"]
    assert found[2.0]["calibration"].keys() == found[1.0]["calibration"].keys()
    assert found[2.0]["tiles"] == 2.0 and "tiles" not in found[1.0]
    train.fit(replace(options, crops=2.0, augment=False), tmp_path / "as they are", quiet=True)
    assert "tiles" not in torch.load(tmp_path / "as they are" / "best.pt", weights_only=True) and len(asked) == 1


def test_the_best_checkpoint_scores_what_training_said(whole):
    best = json.loads((whole(TINY) / "result.json").read_text())
    run = evaluate.load_run(whole(TINY), torch.device("cpu"))
    records = evaluate.split_records(run, None, "val")
    loader = data.eval_loader(data.FundusDataset(records, 32), run.tasks, TINY.batch_size)
    again = scoring.evaluate_split(run.net, loader, run.tasks)
    assert files.jsonable(again.metrics()) == best["metrics"] and run.epoch == best["epoch"]


def test_same_seed_same_weights_whatever_the_workers(whole):
    options = replace(TINY, epochs=1)
    a, b, c = (weights(whole(o)) for o in (options, replace(options, workers=2), replace(options, seed=1)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("names", [("cls",), ("seg",), ("loc",), ("fine",), ("signs",), ("text",),
                                   ("cls", "dme", "seg", "loc"), tuple(TASKS)])
def test_any_set_of_tasks_trains(tmp_path, names):
    best = train.fit(replace(TINY, tasks=names, epochs=1), tmp_path / "run", quiet=True)
    assert set(best["metrics"]) == {*names, *(["joint"] if {"cls", "dme"} <= set(names) else [])}


@pytest.mark.parametrize("control", [
    {"num_experts": 0}, {"num_experts": 1, "top_k": 1, "expert_ratio": 1.0}, {"router": "random"}, {"router": "shared"},
    {"router": "uniform", "top_k": 4}, {"router": "private"}, {"moe_at": "decoder"}], ids=str)
def test_every_control_trains_and_loads(tmp_path, control):
    best = train.fit(replace(TINY, epochs=1, **control), tmp_path / "run", quiet=True)
    run = evaluate.load_run(tmp_path / "run", torch.device("cpu"))
    validation = data.FundusDataset(evaluate.split_records(run, None, "val"), 32)
    found = scoring.evaluate_split(run.net, data.eval_loader(validation, run.tasks, TINY.batch_size), run.tasks)
    assert files.jsonable(found.metrics()) == files.jsonable(best["metrics"])


def test_a_new_task_is_one_class(tmp_path, monkeypatch):
    """On which side of the drawn photograph is the optic disc? Read off its mask; no other file knows of this task."""
    class Side(tasks.Classification):
        name, label, primary, classes = "side", "masks", "accuracy", 2

        def target(self, sample):
            columns = sample.masks[-1].nonzero()[:, 1].float().mean()
            return (columns > sample.masks.shape[2] / 2).long()

    monkeypatch.setitem(TASKS, "side", Side())
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 100), "test": (1, 1)})
    options = train.configure(["--tasks", "side", "--no-augment", "--epochs", "6", "--lr", "1e-2"])[0]
    best = train.fit(replace(options, image_size=32, stochastic_depth=0.0), tmp_path / "run", quiet=True)
    assert best["metrics"]["side"]["accuracy"] > 0.85  # a coin gives 0.5
    assert evaluate.load_run(tmp_path / "run", torch.device("cpu")).tasks[0].name == "side"


def test_partial_labels_train_together(tmp_path, shared_tree):
    best = train.fit(replace(TINY, data=str(shared_tree), epochs=1), tmp_path / "run", quiet=True)
    assert set(best["metrics"]) == {"cls", "seg"}
    run = evaluate.load_run(tmp_path / "run", torch.device("cpu"))
    test = data.FundusDataset(evaluate.split_records(run, shared_tree, "test"), 32)
    found = scoring.evaluate_split(run.net, data.eval_loader(test, run.tasks, 16), run.tasks)
    assert {t: len(n) for t, n in found.names.items()} == {"cls": 15, "seg": 6}


def test_all_folds_together_validate_on_every_photograph_once(tmp_path):
    folds = [data.load_datasets(replace(TINY, fold=f"{k}/3"), [TASKS["cls"]])[1] for k in (1, 2, 3)]
    assert sorted(r.name for fold in folds for r in fold.records) == [f"drawn/0_{i:04d}" for i in range(30)]


def test_a_run_says_where_labels_contradict_each_other(tmp_path, capsys):
    for i in range(8):
        drawn(3, i // 2 if i < 2 else i, 64).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("image,grade\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(8)))
    train.fit(replace(TINY, tasks=("cls",), data=str(tmp_path / "t.csv"), epochs=1), tmp_path / "run")
    assert "1 times copies of one photograph carry different labels" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["conflicts"] == [
        {"label": "grade", "photographs": ["0.png", "1.png"], "values": [0, 1], "used": 1}]


def test_why_nothing_is_left_to_validate_on_is_said(tmp_path):
    for i in range(4):
        drawn(3, i, 64).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("image,grade,group,split\n0.png,1,a,\n1.png,1,b,\n2.png,1,b,test\n3.png,1,b,test\n")
    options = replace(TINY, tasks=("cls",), data=str(tmp_path / "t.csv"))
    with pytest.raises(InputError, match="1 for training, 0 for validation|0 for training, 1 for validation") as error:
        data.load_datasets(options, [TASKS["cls"]])
    why = "(of 2 photographs, 1 show an eye of the test split); expected at least one each; no task"
    assert why in str(error.value)


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_says_what_it_did_with_photographs_of_test_eyes(tmp_path, shared_tree, capsys, monkeypatch, keep):
    """Two test photographs are put among the training ones, one in another light. Notes on the data are kept, too."""
    monkeypatch.setattr(data, "side_notes", lambda tasks: [f"{' '.join(t.name for t in tasks)}: a note on sides"])
    root = shutil.copytree(shared_tree, tmp_path / "IDRiD")
    images = root / "B. Disease Grading" / "1. Original Images"
    shutil.copy(images / "b. Testing Set" / "IDRiD_003.jpg", images / "a. Training Set" / "IDRiD_005.jpg")
    brighter = Image.open(images / "b. Testing Set" / "IDRiD_007.jpg").point(lambda v: min(255, round(v * 1.15)))
    brighter.save(images / "a. Training Set" / "IDRiD_009.jpg", quality=90)
    options = replace(TINY, data=str(root), epochs=1, keep_leaks=keep)
    train.fit(options, tmp_path / "run", ["a note"])
    said = capsys.readouterr().out
    use = "kept" if keep else "left out"
    assert f"2 photographs of the training split show an eye of the test split: {use}" in said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "\ncls seg: a note on sides\n" in said and config["notes"] == ["a note", "cls seg: a note on sides"]
    assert config["leaks"] == {"kept": keep, "photographs": 2, "names": ["grading/IDRiD_005", "grading/IDRiD_009"],
                               "cls": 2, "seg": 0}
    datasets = data.load_datasets(options, [TASKS["cls"], TASKS["seg"]])[:2]
    assert len({"grading/IDRiD_005", "grading/IDRiD_009"} & {r.name for d in datasets for r in d.records}) == 2 * keep


def test_folders_of_classes_train_and_score(tmp_path, monkeypatch, capsys):
    """Bright against dark; no retina anywhere."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 10), ("test", 6)):
        for name, level in (("night", 40), ("dusk", 110), ("day", 200)):
            (tmp_path / "sky" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(rng.normal(level, 12, (48, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "sky" / split / name / f"{i}.png")
    train.main(["--data", str(tmp_path / "sky"), "--name", f"sky_{tmp_path.name}",
                *"--tasks cls --image-size 64 --encoder-weights none --lr 1e-2 --epochs 10 --batch-size 4".split(),
                "--no-augment"])
    run = records.HERE / "runs" / f"sky_{tmp_path.name}"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "--split", "test"])
    evaluate.main()
    text = capsys.readouterr().out
    lines = text[:text.index("experts   18 photographs")].splitlines()
    assert "kappa" not in text and [line.split()[0] for line in lines[-6:-3]] == ["day", "dusk", "night"]
    stored = json.loads((run / "metrics_test.json").read_text())["metrics"]["cls"]
    assert stored["photographs"] == 18 and stored["accuracy"] > 0.8
    header, row, *_ = (run / "per_photograph_test.csv").read_text().splitlines()
    assert header == "photograph,category,category_p_day,category_p_dusk,category_p_night,category_true"
    assert ",day" in row
    shutil.copytree(tmp_path / "sky" / "test", tmp_path / "new" / "test")  # a test part alone, without one class
    shutil.rmtree(tmp_path / "new" / "test" / "day")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [*sys.argv, "--data", str(tmp_path / "new")])
        evaluate.main()
    assert "12 photographs" in capsys.readouterr().out
    for split in ("train", "test"):
        (tmp_path / "sky" / split / "dusk").rename(tmp_path / "sky" / split / "dawn")
    with pytest.raises(InputError, match="category has dawn, but .* was trained on day, dusk, night"):
        evaluate.main()
    with pytest.raises(InputError, match="--tasks seg: photographs with its label .*: 0 for .*--tasks cls would work"):
        train.main(["--data", str(tmp_path / "sky"), "--tasks", "seg", "--image-size", "64", "--encoder-weights",
                    "none"])


def test_a_validation_split_of_ones_own_is_no_fold(tmp_path):
    for i in range(4):
        drawn(3, i, 64).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("image,grade,split\n" + "".join(
        f"{i}.png,{i % 2},{'val' if i > 2 else ''}\n" for i in range(4)))
    options = train.configure(["--data", str(tmp_path / "t.csv"), "--tasks", "cls", "--encoder-weights", "none"])[0]
    training, validation, _ = data.load_datasets(options, [TASKS["cls"]])
    assert [r.name for r in validation.records] == ["3.png"] and len(training) == 3
    (tmp_path / "u.csv").write_text("image,grade,split,group\n0.png,1,,p\n1.png,1,,q\n2.png,0,,q\n3.png,1,val,p\n")
    training, validation, findings = data.load_datasets(replace(options, data=str(tmp_path / "u.csv")),
                                                        [TASKS["cls"]])
    assert len(training) == 2 and findings["left_out_for_validation"] == ["0.png"]
    text = splits.describe_split(training.records, validation.records, findings, [TASKS["cls"]], options)
    assert "1 photographs of the training split show an eye of the validation split: left out" in text
    assert "   cls  0: 1 + 0  1: 1 + 1  2: 0 + 0  3: 0 + 0  4: 0 + 0" in text
    assert "warning: training has no photograph of cls 2, cls 3, cls 4: these are never learned" in text
    assert "cannot tell checkpoints apart for cls" in text and text.endswith("chosen by the loss on validation")
    with pytest.raises(InputError, match="--fold 1/5: .*t.csv names its own validation split; leave --fold out"):
        train.configure(["--data", str(tmp_path / "t.csv"), "--fold", "1/5"])


# ---- which checkpoint ----

def validated_by(monkeypatch, keeps) -> None:
    """Of the drawn photographs, those validate that "keeps" says of their record; the others train."""
    found = [replace(r, split="val" if keeps(r) else "train") for r in readers.read_drawn().records
             if r.split == "train"]
    monkeypatch.setattr(readers, "read_data", lambda _: records.DataSet(found))


def test_one_grade_in_validation_chooses_by_loss(tmp_path, monkeypatch, capsys):
    """Kappa is 0 whatever is learned: the first of all epochs would be as good as the last."""
    validated_by(monkeypatch, lambda r: r.grade == 2)
    result = train.fit(replace(TINY, tasks=("cls",), epochs=4, lr=3e-3), tmp_path / "run")
    text = capsys.readouterr().out
    assert "warning: the validation split cannot tell checkpoints apart for cls, whose photographs" in text
    assert "epochs are chosen by the loss on validation" in text and "| score -" in text
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["val"]["cls"]["loss"] for line in lines]
    assert result["epoch"] == 1 + int(np.argmin(losses)) and result["score"] is None
    assert [line["best"] for line in lines] == [loss == min(losses[:i + 1]) for i, loss in enumerate(losses)]


def test_no_lesion_in_validation_leaves_masks_out_of_the_score(tmp_path, monkeypatch, capsys):
    chosen = [r.name for r in readers.read_drawn().records if not any(
        lesion.lesion_class != "OD" for lesion in synthetic.plan(*r.drawing).lesions)][:4]
    graded = [r.name for r in readers.read_drawn().records if r.grade == 4][:2]
    validated_by(monkeypatch, lambda r: r.name in chosen + graded)
    monkeypatch.setattr(tasks.Lesions, "labelled", lambda self, r: r.name not in graded and "masks" in r.labels)
    result = train.fit(replace(TINY, epochs=1), tmp_path / "run")
    text = capsys.readouterr().out
    assert "checkpoints apart for seg, whose photographs" in text and "epochs are chosen by cls alone" in text
    values = result["metrics"]
    assert math.isnan(values["seg"]["dice"]) and values["seg"]["dice_OD"] >= 0
    assert result["score"] == values["cls"]["kappa"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["seg"]["dice"] is None


def test_equal_scores_go_to_the_lower_loss():
    state, _, _ = state_and_batch()
    kept = [state.end_epoch(score, {"cls": {"loss": one}, "seg": {"loss": other}, "joint": {}}, {})
            for score, one, other in ((0.5, 3, 1), (0.5, 1, 4), (0.5, 1, 2), (0.4, 0, 0), (0.6, 9, 9), (0.6, 9, 9))]
    assert kept == [True, False, True, False, True, False]
    assert (state.best["epoch"], state.best["loss"], state.epoch) == (5, 9, 6)


def test_masks_too_small_for_the_network_are_counted_as_they_reach_it(tmp_path):
    """Of four masks of microaneurysms, 2 pixels wide in 512, one is 64 wide: at 32 px only that one is left."""
    for i in range(4):
        Image.fromarray(synthetic.render(synthetic.plan(3, i), 512)[0]).save(tmp_path / f"{i}.png")
        mask = np.zeros((512, 512), np.uint8)
        mask[250:(314 if i == 0 else 252), 250:(314 if i == 0 else 252)] = 255
        Image.fromarray(mask).save(tmp_path / f"{i}_ma.png")
    (tmp_path / "t.csv").write_text("image,mask_ma,split\n" + "".join(
        f"{i}.png,{i}_ma.png,{'val' if i > 2 else ''}\n" for i in range(4)))
    options = replace(TINY, tasks=("seg",), data=str(tmp_path / "t.csv"))
    training, validation, findings = data.load_datasets(options, [TASKS["seg"]])
    assert findings["counts"] == {"training": {"seg": {"MA": 1}}, "validation": {"seg": {"MA": 0}}}
    text = splits.describe_split(training.records, validation.records, findings, [TASKS["seg"]], options)
    assert "   seg  MA: 1 + 0\nwarning: of 3 photographs with seg MA, 2 show none at 32 px; a larger --image" in text


def test_nothing_left_of_the_labels_is_said_before_training(monkeypatch):
    """Points that all lie outside of the picture would have trained on nothing, with a loss of 0."""
    few = [replace(r, labels={"landmarks": {"disc": (5000.0, 5.0), "fovea": (5.0, 5000.0)}})
           for r in readers.read_drawn().records]
    monkeypatch.setattr(readers, "read_data", lambda _: records.DataSet(few))
    with pytest.raises(InputError, match="--tasks loc: at 32 px no training photograph shows any of disc fovea"):
        data.load_datasets(replace(TINY, tasks=("loc",)), [TASKS["loc"]])


# ---- outputs that are not finite ----

@pytest.fixture
def not_finite(monkeypatch):
    """In evaluation mode a task's head answers nan while these are true, one for each pass: set(task, passes)."""
    def set_(task, passes):
        passes, decode = list(passes), type(TASKS[task]).head

        def head(self, spec):
            layer = decode(self, spec)
            forward = layer.forward
            layer.forward = lambda maps: forward(maps) * (math.nan if not layer.training and passes[0] else 1)
            return layer
        monkeypatch.setattr(type(TASKS[task]), "head", head)
        score = scoring.evaluate_split

        def evaluate_split(*arguments, **how):
            try:
                return score(*arguments, **how)
            finally:
                passes.pop(0)
        monkeypatch.setattr(scoring, "evaluate_split", evaluate_split)
    return set_


@pytest.mark.parametrize("task", ["cls", "seg"])
def test_an_epoch_without_finite_outputs_is_never_chosen(tmp_path, capsys, not_finite, task):
    not_finite(task, [True, False, True])
    result = train.fit(replace(TINY, epochs=3), tmp_path / "run")
    text = capsys.readouterr().out
    assert result["epoch"] == 2 and f"warning: epoch 1: the network's output for {task} is not finite on 6" in text
    assert [line.count("not chosen") for line in text.splitlines() if "warning" in line] == [1, 1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["best"] for line in lines] == [False, True, False]
    assert [bool(line["val"]) for line in lines] == [False, True, False]


def test_a_run_without_a_finite_epoch_ends_in_one_line(tmp_path, not_finite):
    not_finite("cls", [True, True])
    with pytest.raises(RunError, match="run: in none of 2 epochs were all outputs on validation finite.*lower --lr"):
        train.fit(TINY, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "best.pt").exists() and not (tmp_path / "run" / "result.json").exists()
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_network_without_finite_outputs_is_not_scored(whole):
    run = evaluate.load_run(whole(TINY), torch.device("cpu"))
    photographs = data.FundusDataset(readers.read_drawn().records[:3], 32)
    batches = data.eval_loader(photographs, run.tasks, 2)
    with torch.no_grad():
        run.net.heads["cls"].get_parameter("linear.bias")[0] = math.inf
    with pytest.raises(files.NotFiniteError, match="for cls is not finite on 3 photographs .first: drawn/0_0000.*--lr"):
        scoring.evaluate_split(run.net, batches, run.tasks)
    with pytest.raises(files.NotFiniteError, match="the network's output for cls is not finite"):
        full_size.predict_sample(run.net, run.tasks, photographs[0].image, torch.device("cpu"))


def test_a_table_with_few_labels_trains_and_scores(tmp_path, monkeypatch):
    """Grades here, masks of one lesion there, points elsewhere; groups stay together."""
    lines = ["image,grade,mask_ex,mask_se,disc_x,disc_y,fovea_x,fovea_y,split,group"]
    for i in range(24):
        eye, (picture, masks) = synthetic.plan(3, i), rendered(3, i, 96)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        Image.fromarray(masks[synthetic.LESIONS.index("EX")]).save(tmp_path / f"{i}_ex.png")
        points = [f"{96 * v:.1f}" for v in (*eye.disc, *eye.fovea)]
        lines.append(",".join([
            f"{i}.png", str(eye.grade) if i % 3 else "", f"{i}_ex.png" if i % 2 else "", "none" if i % 4 else "",
            *(points if i % 5 else [""] * 4), "test" if i > 20 else "", f"patient{i // 2}"]))
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    options = replace(TINY, tasks=("cls", "seg", "loc"), data=str(tmp_path / "labels.csv"), epochs=1)
    train.fit(options, tmp_path / "run", quiet=True)
    run = evaluate.load_run(tmp_path / "run", torch.device("cpu"))
    test = evaluate.split_records(run, tmp_path / "labels.csv", "test")
    assert [r.name for r in test] == ["21.png", "22.png", "23.png"]
    training, validation, findings = data.load_datasets(options, run.tasks)
    assert findings["leaks"]["names"] == ["20.png"]  # of the same patient as 21.png
    groups = [{int(r.name[:-4]) // 2 for r in p.records} for p in (training, validation)]
    assert not groups[0] & groups[1] and len(training) + len(validation) == 19  # 0.png has no label
    found = scoring.evaluate_split(run.net, data.eval_loader(data.FundusDataset(test, 32), run.tasks, 16), run.tasks)
    m = found.metrics()["seg"]
    assert {k for k in synthetic.LESIONS if f"dice_{k}" in m} == {"EX", "SE"}
    scoring.write_per_photograph(tmp_path / "per_photograph.csv", found, run.calibration)


# ---- a step ----


def test_a_batch_can_be_learned_by_heart():
    state, batch, learn = state_and_batch(replace(TINY, lr=3e-3, stochastic_depth=0.0, expert_dropout=0.0))
    state.net.train()
    first = learn(state, batch)
    for _ in range(60):
        last = learn(state, batch)
    assert last["cls"] < 0.3 * first["cls"] and last["seg"] < 0.7 * first["seg"]


def test_a_loss_that_is_not_finite_names_task_and_step():
    state, batch, learn = state_and_batch()
    learn(state, batch)
    with torch.no_grad():
        state.net.heads["seg"].conv.bias[0] = math.nan
    with pytest.raises(RunError, match="the loss of seg is nan at step 2"):
        learn(state, batch)


def test_schedule_warms_up_and_ends_at_zero():
    state = state_and_batch()[0]
    rates = []
    for _ in range(100):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step(), state.schedule.step()
    assert rates[0] == pytest.approx(TINY.lr / 10) and max(rates) == pytest.approx(TINY.lr)
    assert rates.index(max(rates)) in (9, 10) and rates[-1] < 0.01 * TINY.lr


def test_a_run_of_a_single_step():
    state, batch, learn = state_and_batch()
    single = train.make_state(state.net, learn.keywords["tasks"], TINY, 1, torch.device("cpu"))
    assert math.isfinite(learn(single, batch)["cls"])


def test_loss_weights():
    both = [TASKS["cls"], TASKS["seg"]]
    losses = {"cls": torch.tensor(2.0), "seg": torch.tensor(3.0)}
    assert float(LossWeights(both, ["fixed"], 0.0)(losses)) == 5
    assert float(LossWeights(both, ["cls=0.5"], 0.0)(losses)) == 4
    learned = LossWeights(both, ["uncertainty"], 0.0)
    with torch.no_grad():
        learned.log_variance["cls"].fill_(math.log(4))
    assert learned(losses).item() == pytest.approx(2 / 4 + math.log(4) + 3)
    only = learned({"seg": losses["seg"]})  # a task without a labelled photograph: neither loss nor s
    only.backward()
    assert only.item() == 3 and learned.log_variance["cls"].grad is None


def test_uncertainty_weights_learn_with_the_network():
    state, batch, learn = state_and_batch(replace(TINY, loss_weights=("uncertainty",)))
    for _ in range(3):
        learn(state, batch)
    assert all(s.item() != 0 for s in state.loss_weights.log_variance.values())


def test_uncertainty_finds_the_loss_as_its_variance():
    """For constant losses the optimum is exp(s_t) = L_t."""
    learned = LossWeights([TASKS["cls"]], ["uncertainty"], 0.0)
    optimizer = torch.optim.Adam(learned.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad(), learned({"cls": torch.tensor(3.0)}).backward(), optimizer.step()
    assert learned.log_variance["cls"].exp().item() == pytest.approx(3, rel=1e-3)


# ---- the command line ----

@pytest.mark.parametrize("workers,word", [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_ctrl_c_ends_cleanly_with_valid_checkpoints(tmp_path, workers, word):
    """The whole process group hears it, as at a terminal; loader processes must not answer."""
    run = tmp_path / "runs" / "stopped"
    flags = f"--image-size=64 --batch-size=12 --epochs=200 --name=stopped --workers={workers}".split()
    process = start(PROGRAM, ROOT, tmp_path, *flags, output=tmp_path / "output")
    while not (run / "best.pt").exists() and process.is_alive():
        time.sleep(0.1)
    os.killpg(process.pid, word)
    try:
        process.join(60)
        assert process.exitcode == 130
    finally:
        process.kill()
    text = (tmp_path / "output").read_text()
    assert "DRAWN" in text.splitlines()[0] and "interrupted; go on with: python" in text and "Traceback" not in text
    assert evaluate.load_run(run, torch.device("cpu")).epoch >= 1
    assert weights(run) and not list(run.glob("*.part"))
