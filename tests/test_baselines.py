"""The comparison: configurations that differ in one thing, the same photographs for all, and what may be claimed."""

import csv
import io
import json
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import baselines
import data
import evaluate
import train
from conftest import TINY, drawn, official_tree
from retina.comparison import jobs, measurements
from retina.datasets import readers, records, synthetic
from retina.files import InputError, RunError
from retina.training.diagnostics import gradient_cosines
from tasks import TASKS, build_net
from train import Config


CPU, CLS, SEG = torch.device("cpu"), TASKS["cls"], TASKS["seg"]
pytestmark = pytest.mark.usefixtures("few_drawings", "few_resamples", "shallow")
SMALL = replace(TINY, image_size=64, epochs=1, log_gradients=True)


# ---- configurations ----

def names_of(configurations):
    return [c.name for c in configurations]


def test_every_configuration_is_a_network_and_differs_from_the_others():
    configurations = baselines.configurations_for(("cls", "seg"))
    options = {c.name: replace(Config(), **c.changes) for c in configurations if c.name != "constant"}
    assert len(set(map(repr, options.values()))) == len(options)
    assert len(set(names_of(configurations))) == len(configurations)
    nets = {name: build_net(asdict(o))[0] for name, o in options.items()}

    def layer(name):  # parameters and multiply-adds per token of the experts that a token meets
        w1 = nets[name].experts.experts.w1
        return 2 * w1.numel(), 2 * options[name].top_k * w1[0].numel()
    assert layer("dense")[1] == layer("learned")[1] and layer("dense_large")[0] == layer("learned")[0]
    assert layer("uniform")[0] == layer("learned")[0] == layer("random")[0]
    assert nets["hard"].experts is None and nets["cls_single"].experts is None
    assert names_of(c for c in configurations if c.usual) == [
        "constant", "cls_single", "seg_single", "hard", "dense", "learned"]
    assert {"dme_single", "loc_single", "private"} <= set(names_of(baselines.configurations_for(("cls", "dme", "loc"))))
    assert baselines.configurations_for(("cls",), weights="imagenet")[-1].changes == {"encoder_weights": "none"}
    assert "hard" not in names_of(baselines.configurations_for(("cls",)))  # it would be cls_single again
    assert "leaky" not in names_of(baselines.configurations_for(("cls", "seg"), drawn=True))


def test_without_leak_protection_copies_lie_in_both_splits(tmp_path):
    """Copies of one drawing under two names: joined by default; taken for different eyes by the control."""
    root = official_tree(tmp_path / "IDRiD", test=False)
    images = root / "B. Disease Grading" / "1. Original Images" / "a. Training Set"
    for i in range(1, 8):
        shutil.copy(images / f"IDRiD_{i:03d}.jpg", images / f"IDRiD_{i + 7:03d}.jpg")
    for ignore in (False, True):
        options = replace(SMALL, tasks=("cls",), data=str(root), ignore_eyes=ignore)
        training, validation, _ = data.load_datasets(options, [CLS])
        both = [{int(r.name[-3:]) % 7 for r in x.records if int(r.name[-3:]) < 15} for x in (training, validation)]
        assert bool(both[0] & both[1]) == ignore
    train.fit(options, tmp_path / "run", quiet=True)
    run = evaluate.load_run(tmp_path / "run", CPU)
    assert [r.name for r in evaluate.split_records(run, root, "val")] == run.validation == [
        r.name for r in validation.records]


def test_a_network_for_one_task_sees_the_same_photographs_changed_in_the_same_ways(shared_tree):
    seen = {}
    for name in ("hard", "cls_single", "seg_single"):
        configuration = next(c for c in baselines.configurations_for(("cls", "seg")) if c.name == name)
        options = replace(SMALL, data=str(shared_tree), batch_size=7, **configuration.changes)
        tasks = [TASKS[t] for t in options.tasks]
        training, _, _ = data.load_datasets(options, tasks)
        sampled = [TASKS[t] for t in options.sampling_tasks or options.tasks]
        sampler = data.MultiTaskBatchSampler(training.records, sampled, 7, 3, True, tasks)
        seen[name] = [[(training.records[draw.index], draw) for draw in step]
                      for step in sampler.range(0, 3 * sampler.per_epoch)]
    for name, task in (("cls_single", CLS), ("seg_single", SEG)):
        assert seen[name] == [[(r, draw) for r, draw in step if task.labelled(r)] for step in seen["hard"]]
        assert len(seen[name][0]) < 7


def test_gradients_are_compared_as_two_backward_passes_would():
    torch.manual_seed(0)
    net, tasks = build_net(asdict(SMALL))
    state = train.make_state(net, tasks, SMALL, 10, CPU)
    photographs, _, _ = data.load_datasets(SMALL, tasks)
    batch = data.collate([photographs[i] for i in range(6)], tasks)
    losses = train.task_losses(state, batch, tasks, SMALL)
    cosines, flat = gradient_cosines(losses, net.encoder), {}
    for t in ("cls", "seg"):
        net.zero_grad()
        losses[t].backward(retain_graph=True)
        flat[t] = torch.cat([p.grad.flatten() for p in net.encoder.parameters()]).double()
    expected = float(flat["cls"] @ flat["seg"] / flat["cls"].norm() / flat["seg"].norm())
    assert cosines == {"cls seg": pytest.approx(expected, abs=1e-4)} and 1e-3 < abs(expected) < 1


def test_looking_at_gradients_changes_nothing(tmp_path):
    for name, look in (("a", True), ("b", False)):
        train.fit(replace(SMALL, log_gradients=look), tmp_path / name, quiet=True)
    a, b = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in "ab")
    assert a["val"] == b["val"] and "gradient_cosines" not in b and -1 <= a["gradient_cosines"]["cls seg"] <= 1


# ---- all of it ----

@pytest.fixture
def here(monkeypatch):
    """Jobs run in this process, one after the other; -> the words of those that were started."""
    started = []

    def start(job, script, threads):
        started.append(job.words)
        status = 0
        try:
            baselines.finish(job)
        except RunError as error:
            status = 1
            job.errors.parent.mkdir(exist_ok=True)
            job.errors.write_text(f"error: {error}\n")
        return SimpleNamespace(poll=lambda: status, returncode=status, stdin=io.BytesIO())
    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measurements, "SHIFTS", dict(list(measurements.SHIFTS.items())[:2]))
    return started


def failing(monkeypatch, which) -> None:
    """Runs with options of which `which` is true fail."""
    def finish(job, whole=baselines.finish):
        if which(job.options):
            raise RunError("out of memory after step 3")
        whole(job)
    monkeypatch.setattr(baselines, "finish", finish)


def written(name: str) -> tuple[dict, str]:
    """Numbers and report of a comparison."""
    folder = records.HERE / "runs" / name
    return json.loads((folder / "comparison.json").read_text()), (folder / "REPORT.md").read_text()


def test_a_comparison_from_the_command_line(here, capsys):
    flags = "--name whole --only constant cls_single learned --seeds 2 --epochs 1".split()
    baselines.main([*flags[:-3], "1", *flags[-2:]])  # one seed, then another
    assert here == [f"{name}, seed 0, fold 1/5" for name in ("cls_single", "learned")]
    baselines.main(flags)
    folder, (summary, text) = records.HERE / "runs" / "whole", written("whole")
    assert here == [f"{name}, seed {s}, fold 1/5" for s in (0, 1) for name in ("cls_single", "learned")]
    assert "2 of 4 runs are finished already" in capsys.readouterr().out
    assert list(summary["configurations"]) == ["constant", "cls_single", "learned"] and not summary["failed"]
    learned = summary["configurations"]["learned"]
    stored = [json.loads((folder / "learned" / f"seed{s}_fold1of5" / "result.json").read_text()) for s in (0, 1)]
    assert learned["tasks"]["cls"]["metrics"]["kappa"]["values"] == pytest.approx(
        [s["metrics"]["cls"]["kappa"] for s in stored])
    assert learned["costs"]["parameters"] > summary["configurations"]["cls_single"]["costs"]["parameters"]
    assert learned["costs"]["seconds"] == pytest.approx(6 * learned["costs"]["training_seconds"] * 4)  # 4 steps of 6
    assert learned["costs"]["latency"] > 0 and learned["costs"]["peak_bytes"] > 1e8
    assert list(learned["tasks"]["seg"]["shifts"]) == ["darker", "blurred"] and learned["cosines"][0]["cls seg"] <= 1
    (d,) = summary["differences"]
    assert (d["configuration"], d["against"], d["task"]) == ("learned", "cls_single", "cls")
    table = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    line = next(r for r in table if (r["configuration"], r["task"], r["metric"]) == ("learned", "cls", "kappa"))
    assert float(line["mean"]) == pytest.approx(learned["tasks"]["cls"]["metrics"]["kappa"]["mean"])
    assert str(records.HERE) not in text + json.dumps(summary) and summary["threads"] == [torch.get_num_threads()]
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / link).exists()
    assert "**These are drawings: nothing here is a result on IDRiD.**" in " ".join(text.split())
    assert "What multi-task learning is" in text and "{" not in text
    assert all(len(line) <= 120 or line[0] == "|" for line in text.splitlines())
    scores = text[text.index("## Scores"):text.index("## Differences")].splitlines()
    for c in summary["configurations"].values():  # each score stands in the configuration's line
        line = next(x for x in scores if x.startswith(f"| {c['words']} |"))
        for task in c["tasks"].values():
            assert f"{task['metrics'][task['primary']]['mean']:.3f}" in line
    before = list(here)
    baselines.main(flags)
    assert here == before and "4 of 4 runs are finished already" in capsys.readouterr().out
    with pytest.raises(InputError, match="a run with epochs 1, not 2; expected the comparison that is asked for"):
        baselines.main([*flags[:-1], "2"])


@pytest.mark.slow
def test_a_comparison_of_sentences_and_fine_classes(here):
    """What a decoder says is compared with the best constant sentence, and with a GRU."""
    baselines.main("--name words --tasks fine text signs --only constant text_single gru learned --seeds 1 "
                   "--epochs 1".split())
    summary, text = written("words")
    assert list(summary["configurations"]) == ["constant", "text_single", "learned", "gru"] and not summary["failed"]
    for name, configuration in summary["configurations"].items():
        tasks = configuration["tasks"]
        assert sorted(tasks) == (["text"] if name == "text_single" else ["fine", "signs", "text"])
        assert tasks["text"]["primary"] == "slots" and 0 <= tasks["text"]["metrics"]["slots"]["mean"] <= 1
    assert summary["configurations"]["constant"]["tasks"]["text"]["metrics"]["slots"]["mean"] > 0.2
    assert {d["configuration"] for d in summary["differences"] if d["task"] == "text"} == {"gru", "learned"}
    assert "sentences by a GRU without attention" in text


# ---- teachers ----

def test_students_have_teachers_of_their_own_share_of_labels():
    """As in the paper: one for all tasks, one for each, one for each pair; each is part of the comparison itself."""
    for tasks, pairs in ((("cls",), 0), (("cls", "seg"), 0), (("cls", "dme", "seg"), 3)):
        by_name = {c.name: c for c in baselines.configurations_for(tasks, distil=True)}
        usual = [c for c in by_name.values() if c.usual]
        options = [repr((replace(Config(), **c.changes), c.teachers)) for c in usual if c.name != "constant"]
        assert len(set(options)) == len(options)
        for c in usual:
            teachers = [by_name[name] for name in c.teachers]
            assert all(t.usual and not t.teachers for t in teachers)
            share = {t.changes.get("labelled", 1.0) for t in [c, *teachers]}
            assert len(share) == 1 and c.name.endswith("_15") == (share == {0.15})
            assert (c.times_epochs > 1) == (share == {0.15} and not teachers)
            assert all(a.format(task=tasks[0]) in by_name for a in c.against)
        taught = {name: by_name[name].teachers for name in by_name if name.startswith(("by_", "ann", "unt"))}
        assert taught["by_multi_15"] == taught["untaught_15"] == ["learned_15"]
        assert taught["by_multi"] == taught["untaught"] == ["learned"]
        assert taught["by_singles"] == taught["annealed"] == [f"{t}_single" for t in tasks]
        assert len(taught.get("by_pairs", [])) == (len(tasks) + (pairs or 1) if len(tasks) > 1 else 0)
        assert not taught.keys() & {c.name for c in baselines.configurations_for(tasks)}


def test_teachers_come_first_and_students_of_a_failed_one_are_not_begun(here, monkeypatch, capsys):
    failing(monkeypatch, lambda o: o.tasks == ("seg",))
    flags = "--distil --only untaught_15 by_multi_15 annealed --seeds 1 --epochs 1".split()
    with pytest.raises(SystemExit):
        baselines.main(flags)
    assert here == [f"{name}, seed 0, fold 1/5" for name in (
        "cls_single", "seg_single", "learned_15", "untaught_15", "by_multi_15")]
    summary, text = written("distil")
    assert summary["failed"]["annealed, seed 0, fold 1/5"] == "its teacher failed (seg_single, seed 0, fold 1/5)"
    folder = records.HERE / "runs" / "distil"
    logs = {name: (folder / name / "seed0_fold1of5" / "log.jsonl").read_text().splitlines()
            for name in ("learned_15", "untaught_15", "by_multi_15")}
    assert [len(lines) for lines in logs.values()] == [7, 1, 1]  # epochs of 15 % of the photographs are as much shorter
    losses = [json.loads(lines[0])["train"] for lines in logs.values()]
    assert ["cls teachers" in by_name for by_name in losses] == [False, True, True]
    assert losses[1]["cls teachers"] == 0 < losses[2]["cls teachers"]
    assert {pair for lines in logs.values() for pair in json.loads(lines[0])["gradient_cosines"]} == {"cls seg"}
    assert {(d["configuration"], d["against"]) for d in summary["differences"]} == {
        ("untaught_15", "learned_15"), ("by_multi_15", "learned_15"), ("by_multi_15", "untaught_15")}
    assert "## Learning from teachers" in text and "{" not in text
    assert "* cls quadratic weighted kappa, taught by one multi-task network, 15 % of the labels minus" in text
    monkeypatch.setattr(baselines, "finish", lambda job: pytest.fail("a run again"))
    monkeypatch.setattr(jobs, "run_all", lambda asked, script, number: {})
    baselines.main([*flags[:2], "by_multi_15", *flags[-4:]])  # its teacher comes along
    assert set(written("distil")[0]["configurations"]) == {"learned_15", "by_multi_15"}


def test_a_failed_run_is_named_and_does_not_stop_the_rest(here, monkeypatch, capsys):
    failing(monkeypatch, lambda o: o.num_experts == 1)
    with pytest.raises(SystemExit) as ended:
        baselines.main(["--name", "failed", "--only", "hard", "dense", "--seeds", "1", "--epochs", "1"])
    summary, text = written("failed")
    said = "dense, seed 0, fold 1/5: out of memory after step 3"
    assert ended.value.code == 1 and list(summary["configurations"]) == ["hard"] and said in capsys.readouterr().out
    assert said in text and "| dense adapter of equal cost | no seed came to its end | no seed came" in text
    with pytest.raises(RunError, match="none of the 1 runs came to its end; first: dense, seed 0, fold 1/5: out of"):
        baselines.main(["--name", "all_failed", "--only", "constant", "dense", "--seeds", "1", "--epochs", "1"])


def test_of_several_folds_a_seed_that_lacks_one_is_left_out(here, monkeypatch):
    """Three tasks, two folds; one fold of one seed fails: the other seed stands for the configuration, on both."""
    failing(monkeypatch, lambda o: (o.tasks, o.seed, o.fold) == (("loc",), 1, "2/5"))
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 20), "test": (1, 1)})
    with pytest.raises(SystemExit):
        baselines.main("--name folds --tasks cls dme loc --only loc_single hard --num-folds 2 --epochs 1".split())
    summary, text = written("folds")
    single, hard = (summary["configurations"][name] for name in ("loc_single", "hard"))
    assert (single["seeds"], hard["seeds"]) == ([0], [0, 1])
    # 20 drawings, 12 of them in the other folds
    assert [hard["tasks"][t]["photographs"] for t in ("cls", "dme", "loc")] == [8, 8, 8]
    assert [(d["configuration"], d["task"], d["seeds"]) for d in summary["differences"]] == [("hard", "loc", 1)]
    assert "failed: loc_single, seed 1, fold 2/5: out of memory" in text
    assert "| single-task loc, 1 of 2 seeds | " in text
    assert set(hard["cosines"][0]) == {"cls dme", "cls loc", "dme loc"}


def test_one_task_of_a_table_with_its_own_validation_split(here, tmp_path):
    for i in range(24):
        drawn(3, i, 64).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("image,grade,split\n" + "".join(
        f"{i}.png,{synthetic.plan(3, i).grade},{'val' if i > 16 else ''}\n" for i in range(24)))
    flags = "--tasks cls --only constant cls_single dense leaky --seeds 1 --epochs 1 --image-size 64"
    baselines.main(["--name", "table", "--data", str(tmp_path / "t.csv"), *flags.split(), "--encoder-weights", "none"])
    summary, text = written("table")
    assert [(d["configuration"], d["against"]) for d in summary["differences"]] == [("dense", "cls_single")]
    for said in ("t.csv (the first photograph has 64x64 pixels)", "Validation: the part that the data set names itself",
                 "The configuration without leak protection is split", "There is but one task here."):
        assert said in " ".join(text.split())
    assert "another split" not in text and "CC BY" not in text
    with pytest.raises(InputError, match="--num-folds 2: .*t.csv names its own validation split; leave --num-folds "
                                         "out"):
        baselines.main(["--data", str(tmp_path / "t.csv"), *"--tasks cls --num-folds 2 --encoder-weights none".split()])


def test_ctrl_c_is_handed_on_once_and_waited_for(monkeypatch, capsys):
    """The terminal's reaches the main process alone; jobs save what they learned and end."""
    happened = []

    class Process:
        def terminate(self):
            happened.append("terminate")

        def wait(self):
            happened.append("wait")

    def interrupted(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(jobs, "start", lambda job, script, threads: Process())
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(SystemExit) as ended:
        baselines.main(["--name", "stopped", "--only", "hard", "dense", "--seeds", "1", "--jobs", "2"])
    assert ended.value.code == 130 and happened == ["terminate", "terminate", "wait", "wait"]
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_runs_that_share_the_cores_share_them_among_their_loaders(monkeypatch):
    monkeypatch.setattr(jobs, "init_job", lambda threads: None)
    finished = []
    monkeypatch.setattr(baselines, "finish", finished.append)
    for workers in (8, 1):
        job = jobs.Job("hard", replace(SMALL, workers=workers), Path("run"), ["print"])
        baselines.finish_single(json.dumps({**asdict(job), "threads": 3}, default=str))
    assert [job.options.workers for job in finished] == [3, 1]
    assert finished[0].options == replace(SMALL, workers=3) and finished[0].folder == Path("run")


def test_other_photographs_are_not_taken_for_the_same(here, monkeypatch):
    flags = ["--name", "other", "--only", "hard", "--seeds", "1", "--epochs", "1"]
    baselines.main(flags)
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 25), "test": (1, 10)})
    with pytest.raises(InputError, match="a run on other photographs or labels; expected the comparison"):
        baselines.main(flags)


@pytest.mark.parametrize("flags,message", [
    (["--only", "best"], "--only best: no such configuration; there are constant, cls_single"),
    (["--only", "constant"], "--only constant: nothing to train"),
    (["--num-folds", "6"], "--num-folds 6: expected at most 5"),
    (["--num-folds", "0"], "--num-folds 0: expected at least 1"),
    (["--seeds", "0"], "--seeds 0: expected at least 1"),
    (["--name", "a/b"], "--name a/b: expected a name"),
    (["--tasks", "cls", "reading"], "--tasks reading: no such task"),
    (["--data", "/nowhere"], "/nowhere: no such file")])
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(InputError, match=message):
        baselines.main(flags)
