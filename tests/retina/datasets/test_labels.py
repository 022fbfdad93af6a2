"""A label and its task that no other file knows of: the patient's age, from a table, by a number and its mean error.

What is declared here, once, is read, checked, joined, learned, scored, answered, drawn, reported and guarded.
"""

import copy
import csv
import dataclasses
import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_baselines import here  # noqa: F401 (a fixture)

import baselines
import data
import evaluate
import train
import visualize
from conftest import drawn
from model import ClassifierHead
from retina.datasets import leaks, records, splits, synthetic
from retina.datasets.readers import read_data
from retina.datasets.records import LABELS, NumberLabel, Record
from retina.evaluation import metrics, scoring
from retina.figures import answers
from retina.files import InputError
from tasks import TASKS, Task, make_tasks


pytestmark = pytest.mark.usefixtures("shallow")
FLAGS = "--image-size 64 --batch-size 6 --num-experts 4 --encoder-weights none --precision fp32".split()


class Age(Task):
    """Of the patient, in years."""
    name, label, primary, worst, best = "age", "age", "error", 30.0, 0.0

    def head(self, spec):
        return ClassifierHead(spec, 1)

    def target(self, sample):
        return torch.tensor(sample.age)

    def loss(self, output, target, all_reduce_sum=lambda x: x):
        gap = (self.decode(output) - target).abs() / 10
        return all_reduce_sum(gap.sum()) / all_reduce_sum(gap.new_tensor(float(len(gap))))

    def decode(self, output):
        return 50 + 10 * output[:, 0]

    def constant_guess(self, targets):
        return targets.mean(0, keepdim=True)

    def image_stats(self, answer, target, accumulator=None):
        return torch.stack([answer, target], 1)

    def compute(self, stats, weights, calibration):
        return {"error": metrics.mean((stats[:, 0] - stats[:, 1]).abs(), weights)}

    def scored_columns(self, stats, calibration):
        return dict(zip(("age", "age_true"), stats.tolist()))

    def predicted_columns(self, answer, sample, calibration):
        return {"age": round(float(answer), 1)}


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    monkeypatch.setitem(LABELS, "age", NumberLabel("age", "age", ("age",), lowest=0, highest=120, unit="years"))
    monkeypatch.setitem(TASKS, "age", Age())


def written(folder: Path, **changed: str) -> Path:
    """24 drawings with ages of two thirds; "0.png" has none, its copy "again.png" has 71."""
    lines = ["image,grade,age,split"]
    for i in range(24):
        eye = synthetic.plan(3, i)
        drawn(3, i, 96).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{eye.grade},{f'{30 + 2 * i}' if i % 3 else ''},{'test' if i > 20 else ''}")
    drawn(3, 0, 96).save(folder / "again.png", compress_level=1)
    lines.append("again.png,,71.5,")
    cells = {line.split(".")[0]: line for line in lines} | changed
    (folder / "t.csv").write_text("\n".join(cells.values()))
    return folder / "t.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("aged"))


@pytest.fixture
def run(table) -> Path:
    """Two epochs of cls and age, trained once."""
    folder = records.HERE / "runs" / "aged"
    if not folder.exists():
        train.main(["--tasks", "cls", "age", "--data", str(table), "--name", "aged", "--epochs", "2", *FLAGS])
    return folder


def run_evaluate(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- read, joined, shared out ----

def test_a_copy_without_an_age_gets_that_of_its_copy(table):
    found = read_data(table).records
    assert [found[i].age for i in (0, 1, 24)] == [None, 32.0, 71.5] and "age" not in found[0].labels
    joined, conflicts, _ = leaks.find_eyes(found, 64)
    assert len(joined) == 24 and not conflicts
    assert (joined[0].name, joined[0].grade, joined[0].age) == ("0.png", found[0].grade, 71.5)
    assert data.FundusDataset(joined[:1], 64)[0].age == 71.5


def test_ages_that_contradict_each_other_count_by_their_mean():
    copies = [Record(n, Path(n), labels={"age": v}) for n, v in (("a", 40.0), ("b", 43.0), ("c", 43.0))]
    found, (conflict,) = splits.join_copies(copies, [(0, 1), (0, 2)], [(9, 9)] * 3)
    assert [r.age for r in found] == [42.0]
    assert conflict.as_dict() == {"label": "age", "photographs": ["a", "b", "c"], "values": [40, 43, 43], "used": 42}


def test_a_record_stays_as_it_is():
    record = Record("a", Path("a"), labels={"age": 40.0})
    assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == record != record.with_labels(age=41.0)
    assert record.with_labels(age=None).labels == {} and hash(record) == hash(replace(record))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.age = 41.0
    with pytest.raises(AttributeError, match="'Record' has neither a field nor a label 'years'"):
        record.years


def test_every_fold_gets_its_share_of_ages():
    found = [Record(f"{i}", Path("x"), labels={"grade": 0, **({"age": 50.0} if i % 10 == 0 else {})}, eye=f"{i}")
             for i in range(100)]
    assert [sum("age" in r.labels for r in splits.split(found, f"{k}/5").validation) for k in range(1, 6)] == [2] * 5


@pytest.mark.parametrize("cell", ["old", "nan", "inf", "-1", "121", "5_0", "50 years"])
def test_a_cell_that_is_no_age_is_one_line_naming_file_and_row(tmp_path, cell):
    with pytest.raises(InputError) as caught:
        read_data(written(tmp_path, **{"3": f"3.png,1,{cell},"}))
    assert str(caught.value) == (f"{tmp_path / 't.csv'} line 5: age of 3.png is {cell!r}, expected a number from 0 to "
                                 "120 (years)")


def test_the_examination_counts_ages(table, tmp_path, capsys):
    data.main([str(table), "--json"])
    found = json.loads(capsys.readouterr().out)["splits"]["train"]
    ages = np.array([30 + 2 * i for i in range(21) if i % 3] + [71.5])
    assert found["labels"] == {"grade": 21, "age": 15}
    assert found["numbers"] == {"age": {"lowest": 32, "highest": 71.5, "mean": round(ages.mean(), 4),
                                        "constant_error": round(np.abs(ages - ages.mean()).mean(), 4)}}
    data.main([str(table), "--pictures", str(tmp_path / "sheets")])
    text = capsys.readouterr().out
    assert "labelled: cls (grade) 21, age (age) 15" in text and (tmp_path / "sheets" / "labels.png").exists()
    assert (f"    age      32 to 71.5 years   always guessing the mean, {ages.mean():.4g}, is wrong by "
            f"{np.abs(ages - ages.mean()).mean():.3g} on average") in text


# ---- learned, scored, answered ----

def test_it_trains_beside_grades_and_selects_checkpoints(run):
    config, result = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "result"))
    assert config["conflicts"] == []
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        kappa, error = line["val"]["cls"]["kappa"], line["val"]["age"]["error"]
        assert error > 1 and line["score"] == pytest.approx((kappa + 1 - error / 30) / 2)
        assert line["train"]["age"] > 0
    assert result["metrics"]["age"]["photographs"] > 1


def test_it_is_scored(run, monkeypatch, capsys):
    run_evaluate(monkeypatch, run)
    found = [r for r in rows_of(run / "per_photograph.csv") if r["age_true"]]
    error = np.mean([abs(float(r["age"]) - float(r["age_true"])) for r in found])
    values = json.loads((run / "metrics.json").read_text())
    assert values["metrics"]["age"]["error"] == pytest.approx(error)
    assert values["metrics"]["age"]["photographs"] == len(found)
    low, high = values["intervals"]["age"]["error"]
    assert low <= error <= high and "age   " in capsys.readouterr().out
    assert {float(r["age_true"]) for r in found} <= {30 + 2 * i for i in range(24)} | {71.5}


def test_it_answers_for_new_photographs(run, table, tmp_path, monkeypatch):
    run_evaluate(monkeypatch, run, "--images", *(table.parent / f"{i}.png" for i in (1, 2)), "--out", tmp_path / "out")
    loaded = evaluate.load_run(run, torch.device("cpu"))
    photographs = data.FundusDataset(read_data(table).records[1:3], 64)
    scores = scoring.evaluate_split(loaded.net, data.eval_loader(photographs, loaded.tasks, 2), loaded.tasks)
    ages = [float(r["age"]) for r in rows_of(tmp_path / "out" / "predictions.csv")]
    assert ages == pytest.approx(scores.stats["age"][:, 0].tolist(), abs=0.06)


def test_it_is_drawn_where_it_can_be(run, monkeypatch, capsys):
    charts, whole = {}, answers.epochs_chart
    monkeypatch.setattr(answers, "epochs_chart",
                        lambda m, title, *rest: charts.setdefault(title, whole(m, title, *rest)))
    visualize.main([str(run)])
    missing = [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines() if "not drawn" in line]
    assert missing == ["overlays", "sentences"]  # there are neither masks nor points nor words
    found = [json.loads(line)["val"]["age"]["error"] for line in (run / "log.jsonl").read_text().splitlines()]
    axis = charts["age: error"].y
    assert axis.low == 0 and axis.high >= max(30, *found) and "lower is better" in axis.words
    assert charts["age: loss"].y.high > 0 and charts["cls: quadratic weighted kappa"].y.high == 1


# ---- guarded ----

class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_run_that_was_killed_ends_as_one_that_was_not(run, table, monkeypatch):
    folder, loss, seen = records.HERE / "runs" / "killed", Age.loss, []

    def dying(self, output, *rest):
        if torch.is_grad_enabled() and (folder / "log.jsonl").exists():  # the second step of the second epoch
            seen.append(1)
            if len(seen) == 2:
                raise Killed
        return loss(self, output, *rest)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Age, "loss", dying)
        train.main(["--tasks", "cls", "age", "--data", str(table), "--name", "killed", "--epochs", "2", *FLAGS])
    train.main(["--resume", str(folder)])
    one, other = (json.loads((f / "result.json").read_text()) for f in (run, folder))
    assert one == other and len(one["weights"]["last.pt"]) == 64


def test_a_run_is_not_resumed_with_another_age(tmp_path):
    path = written(tmp_path)
    train.main(["--tasks", "cls", "age", "--data", str(path), "--name", "other", "--epochs", "1", *FLAGS])
    folder = records.HERE / "runs" / "other"
    written(tmp_path, **{"4": f"4.png,{synthetic.plan(3, 4).grade},39,"})
    with pytest.raises(InputError, match="other photographs or labels than when the run was begun"):
        train.main(["--resume", str(folder)])


# ---- compared ----

def test_it_is_compared_with_a_constant_guess(table, here):  # noqa: F811
    baselines.main(["--name", "ages", "--data", str(table), *"--tasks cls age --only constant age_single learned "
                    "--seeds 1 --epochs 1 --image-size 64 --encoder-weights none".split()])
    folder = records.HERE / "runs" / "ages"
    found, text = json.loads((folder / "comparison.json").read_text()), (folder / "REPORT.md").read_text()
    split = splits.split(leaks.find_eyes(read_data(table).records, 64)[0])
    training, validation = (np.array([r.age for r in records if r.age is not None])
                            for records in (split.training, split.validation))
    error = found["configurations"]["constant"]["tasks"]["age"]["metrics"]["error"]["mean"]
    assert error == pytest.approx(np.abs(validation - training.mean()).mean(), rel=1e-5)
    assert "age: error (lower is better), " in text
    assert [d["configuration"] for d in found["differences"] if d["task"] == "age"] == ["learned"]


# ---- a metric that cannot select checkpoints ----

@pytest.mark.parametrize("worst,best,primary", [
    (1.0, 1.0, "error"), (math.inf, 0.0, "error"), (0.0, math.nan, "error"), (None, 0.0, "error"), (30.0, 0.0, None)])
def test_a_metric_without_a_direction_is_refused_before_training(table, monkeypatch, worst, best, primary):
    for name, value in (("worst", worst), ("best", best), ("primary", primary)):
        monkeypatch.setattr(Age, name, value)
    with pytest.raises(InputError) as caught:
        train.main(["--tasks", "cls", "age", "--data", str(table), "--name", "bad", "--epochs", "1", *FLAGS])
    assert str(caught.value) == (f"the task age: primary = {primary!r}, worst = {worst}, best = {best}; expected a "
                                 "metric's name and two different finite numbers; correct them in its class")
    assert not (records.HERE / "runs" / "bad").exists()


def test_a_metric_that_is_not_there_is_refused_at_the_first_scoring(table, monkeypatch):
    monkeypatch.setattr(Age, "primary", "mae")
    with pytest.raises(InputError, match="the task age: its primary metric 'mae' is None; .*: .*loss, error"):
        train.main(["--tasks", "cls", "age", "--data", str(table), "--name", "bad", "--epochs", "1", *FLAGS])
    with pytest.raises(InputError, match="'error' is nan; expected a finite number"):
        monkeypatch.setattr(Age, "primary", "error")
        scoring.primary_score({"age": {"error": math.nan}}, [Age()])


def test_a_label_that_is_declared_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr(Age, "label", "years")
    with pytest.raises(InputError, match="the task age learns from 'years'; expected a label .*grade, edema"):
        make_tasks(["age"])


def test_a_metric_from_0_to_1_counts_as_it_is():
    for value in np.random.default_rng(0).uniform(-1, 1, 1000).tolist():
        assert TASKS["cls"].score({"kappa": value}) == value
    assert [Age().score({"error": v}) for v in (30, 0, 15, 60)] == [0, 1, 0.5, -1]
