"""What a run survives: it is stopped or killed at any moment and ends as if it never had been; and every fault."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from conftest import PROGRAM, ROOT, SMALL_NET, TINY, drawn, ended_alike, log, start, state_and_batch
from retina import files
from retina.datasets import cache, readers, records
from retina.evaluation import scoring
from retina.files import InputError, RunError
from retina.training import checkpoint, interrupt, pretrained
from retina.training.checkpoint import RunFolder
from retina.training.distributed import SINGLE_PROCESS


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")
SHORT = replace(TINY, epochs=2, batch_size=6)
FORK = multiprocessing.get_context("fork")  # processes that need not import torch again


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """A checkpoint after every third step, in place of every few minutes."""
    monkeypatch.setattr(RunFolder, "due", lambda run: run.state.step % 3 == 0)


class Killed(BaseException):
    """Stands for the end of the process."""


def fit_until(monkeypatch, step: int, then, options, run: Path, **how) -> None:
    """Train; before that step `then()` happens."""
    whole = train.train_step

    def learn(state, *rest):
        if state.step == step and not done:
            done.append(step)
            then()
        return whole(state, *rest)
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", learn)
        train.fit(options, run, quiet=True, **how)


def die():
    raise Killed


@pytest.fixture
def classes(tmp_path) -> Path:
    """Two folders of tiny pictures."""
    for i in range(18):
        folder = tmp_path / "classes" / ("val" if i > 12 else "train") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 10 + i).convert("RGB").save(folder / f"{i}.png")
    return tmp_path / "classes"


# ---- exact resume ----

@pytest.mark.parametrize("step", [0, 3, 4, 7], ids=lambda s: f"step {s}")
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, whole, step):
    """An epoch has 4 steps here: before the first checkpoint of steps, right after it, between epochs, at the end."""
    assert torch.load(whole(SHORT) / "last.pt", weights_only=True)["state"]["step"] == 8
    with pytest.raises(Killed):
        fit_until(monkeypatch, step, die, SHORT, tmp_path / "run")
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    train.fit(SHORT, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", whole(SHORT))


@pytest.mark.parametrize("change", [
    {"loss_weights": ("uncertainty",), "tasks": ("seg", "fine", "signs", "text")},
    {"workers": 2, "router": "shared", "top_k": 1, "log_gradients": True, "crops": 2.0,
     "image_size": 64}, {"labelled": 0.5, "anneal": True, "tasks": ("cls", "text", "seg")}], ids=str)
def test_every_kind_of_run_resumes(tmp_path, monkeypatch, whole, change):
    options = replace(SHORT, **change)
    if "labelled" in change:
        options = replace(options, teachers=(str(whole(SHORT)),))
    for step in (5, 6):  # twice
        with pytest.raises(Killed):
            fit_until(monkeypatch, step, die, options, tmp_path / "run", resume=step > 5)
    train.fit(options, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", whole(options))


@pytest.mark.gpu
def test_a_gpu_resumes_exactly_when_it_is_deterministic(tmp_path, monkeypatch):
    options = replace(SHORT, device="cuda", deterministic=True)
    train.fit(options, tmp_path / "whole", quiet=True)
    with pytest.raises(Killed):
        fit_until(monkeypatch, 5, die, options, tmp_path / "run")
    train.fit(replace(options, workers=2), tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", tmp_path / "whole")


def test_the_learned_weights_of_tasks_are_kept(tmp_path, monkeypatch):
    options = replace(SHORT, loss_weights=("uncertainty",))
    with pytest.raises(Killed):
        fit_until(monkeypatch, 3, die, options, tmp_path / "run")
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]
    assert stored["step"] == 3 and all(v != 0 for v in stored["loss_weights"].values())


def test_early_stopping_is_remembered(tmp_path, monkeypatch, whole):
    """A score that never gets better ends a run after `patience` epochs, stopped in between or not."""
    def fall():
        scores = itertools.count(0, -1)
        monkeypatch.setattr(scoring, "primary_score", lambda *_: next(scores))

    options = replace(SHORT, epochs=9, patience=2)
    fall()
    train.fit(options, tmp_path / "whole", quiet=True)
    fall()
    with pytest.raises(Killed):
        fit_until(monkeypatch, 9, die, options, tmp_path / "run")
    train.fit(options, tmp_path / "run", quiet=True, resume=True)
    assert len(log(tmp_path / "run")) == 3
    ended_alike(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_that_is_resumed_says_what_it_found(tmp_path, whole, capsys):
    run = shutil.copytree(whole(SHORT), tmp_path / "run")
    again = train.fit(SHORT, run, resume=True)
    ended_alike(run, whole(SHORT))
    assert again["weights"] == json.loads((run / "result.json").read_text())["weights"]
    assert capsys.readouterr().out.endswith("\nit has come to its end already: nothing is left to train\n")


def test_stopped_while_it_is_scored(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring, "evaluate_split", lambda *_, **__: die())
        train.fit(SHORT, tmp_path / "run", quiet=True)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["step"] == 4
    train.fit(SHORT, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", whole(SHORT))


def test_a_stop_during_scoring_ends_before_another_step(tmp_path, monkeypatch, whole):
    score = scoring.evaluate_split

    def stopped(*arguments, **how):
        os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments, **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume"):
        patch.setattr(scoring, "evaluate_split", stopped)
        train.fit(SHORT, tmp_path / "run", quiet=True)
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]
    assert (stored["epoch"], stored["step"]) == (1, 4) and len(log(tmp_path / "run")) == 1
    train.fit(SHORT, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", whole(SHORT))


@pytest.mark.parametrize("name,time_", [("best.pt", 1), ("log.jsonl", 2), ("last.pt", 1), ("last.pt", 4),
                                        ("config.json", 1)])
def test_stopped_right_before_a_file_takes_its_place(tmp_path, monkeypatch, whole, name, time_):
    """The new file is complete but not in place, and there is no time to clean up.

    log.jsonl is empty at first and has its first line, of an epoch that is not over yet, the second time.
    """
    def stop(source, target):
        if Path(target).name == name and (seen.append(1) or len(seen) == time_):
            die()
        move(source, target)
    move, seen = os.replace, []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", stop)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        train.fit(SHORT, tmp_path / "run", quiet=True)
    assert list(tmp_path.rglob(f"{name}.*.part"))
    if name == "config.json":  # without it there is no run
        with pytest.raises(InputError, match="no run there"):
            train.fit(SHORT, tmp_path / "run", quiet=True, resume=True)
    train.fit(SHORT, tmp_path / "run", quiet=True, resume=name != "config.json")
    ended_alike(tmp_path / "run", whole(SHORT))


@pytest.mark.parametrize("moment", ["the old one is moved", "the new one is moved", "the old one is removed"])
def test_killed_while_a_run_is_replaced(tmp_path, monkeypatch, whole, moment):
    """The old run is there, or none, or the new one; never a mixture, and a run of that name can be begun."""
    monkeypatch.setattr(records, "HERE", tmp_path)
    run = shutil.copytree(whole(SHORT), tmp_path / "runs" / "mine")
    moves, rename, rmtree = [], Path.rename, shutil.rmtree

    def move(self, target):
        if len(moves) == ["the old one is moved", "the new one is moved"].index(moment):
            die()
        moves.append(rename(self, target))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment != "the old one is removed":
            patch.setattr(Path, "rename", move)
        patch.setattr(shutil, "rmtree", lambda *_, **__: die() if moment == "the old one is removed" else None)
        train.fit(replace(SHORT, seed=1), run, quiet=True, overwrite=True)
    assert shutil.rmtree is rmtree
    if moment == "the old one is moved":
        ended_alike(run, whole(SHORT))
    elif moment == "the new one is moved":
        assert not run.exists()
    else:
        assert [p.name for p in run.iterdir()] == ["config.json"]
        train.fit(replace(SHORT, seed=1), run, quiet=True, resume=True)
    train.main("--name mine --overwrite --tasks cls --image-size 64 --epochs 1 --batch-size 15".split())


def test_half_a_line_and_lines_too_many_in_the_log_are_mended(tmp_path, monkeypatch, whole):
    with pytest.raises(Killed):
        fit_until(monkeypatch, 6, die, SHORT, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"epoch": 2}\n{"epo')
    train.fit(SHORT, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", whole(SHORT))


@pytest.mark.parametrize("typed,message", [
    ("--lr 0.1", "--lr 0.1: .*run was begun with lr 0.0015; a resumed run keeps it; leave the flag out"),
    ("--epochs 1", "--epochs 1: .* begun with epochs 2;"), ("--no-augment", "--no-augment: .* begun with augment yes;"),
    ("--tasks cls loc", "--tasks cls loc: .* begun with tasks cls seg"), ("--seed 3", "--seed 3: .* begun with seed 0"),
    ("--loss-weights uncertainty", "--loss-weights uncertainty: .* begun with loss_weights fixed"),
    ("--deterministic", "--deterministic: .* begun with deterministic no"), ("--workers -1", "--workers -1: expected"),
    ("--name other", "--name: --resume names a run that is there already"), ("--overwrite", "--overwrite: --resume")])
def test_flags_that_would_change_a_resumed_run_are_refused(whole, typed, message, capsys):
    with pytest.raises(InputError, match=message):
        train.main(["--resume", str(whole(SHORT)), *typed.split()])
    assert capsys.readouterr().out == ""  # it does not say first that it goes on


def test_flags_that_change_nothing_may_differ(tmp_path, monkeypatch, whole, capsys):
    with pytest.raises(Killed):
        fit_until(monkeypatch, 5, die, SHORT, tmp_path / "run")
    typed = "--workers 1 --device cpu --seed 0 --tasks cls seg"
    train.main(["--resume", str(tmp_path / "run"), *typed.split()])
    ended_alike(tmp_path / "run", whole(SHORT))
    said = capsys.readouterr().out
    assert f"\ngoing on with {tmp_path / 'run'}\n" in said and "\nweights: best.pt " in said


def test_other_data_are_refused(tmp_path, tree, monkeypatch, capsys):
    options = replace(SHORT, tasks=("cls",), data=str(tree))
    with pytest.raises(Killed):
        fit_until(monkeypatch, 1, die, options, tmp_path / "run")
    moved = shutil.move(tree, tmp_path / "moved")
    with pytest.raises(InputError, match="IDRiD: its data set is not there; if it has moved, name it with --data"):
        train.main(["--resume", str(tmp_path / "run")])
    train.fit(replace(options, data=str(moved)), tmp_path / "run", quiet=True, resume=True)  # moved is not changed
    assert len(log(tmp_path / "run")) == 2
    table = next((Path(moved) / "B. Disease Grading" / "2. Groundtruths").glob("a*"))
    name, grade, rest = table.read_text().split("\n")[1].split(",", 2)
    table.write_text(table.read_text().replace(f"{name},{grade},", f"{name},{(int(grade) + 1) % 5},"))
    with pytest.raises(InputError, match="--resume .*run: .*moved: other photographs or labels than when the"):
        train.fit(replace(options, data=str(moved)), tmp_path / "run", resume=True)
    assert "going on" not in capsys.readouterr().out


def test_a_new_class_of_a_test_photograph_is_told(tmp_path):
    """Training and validation are the same; the network would have one output more."""
    rows = ["image,fine,split"]
    for i in range(9):
        drawn(3, i, 64).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]},{'train' if i < 4 else 'val' if i < 8 else 'test'}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(rows))
    options = replace(SHORT, tasks=("fine",), data=str(table))
    train.fit(options, tmp_path / "run", quiet=True)
    table.write_text("\n".join([*rows[:-1], "8.png,c,test"]))
    with pytest.raises(InputError, match="t.csv: other names of fine than when the run was begun, perhaps in test"):
        train.fit(options, tmp_path / "run", quiet=True, resume=True)


@pytest.mark.parametrize("what,message", [
    ({"device": "cuda"}, "--device cpu: .*run was begun with cuda; expected the same, or the result"),
    ({"processes": 2}, "--nproc_per_node 1: .*run was begun with 2; expected the same")])
def test_another_machine_is_refused_where_the_result_would_be_another(tmp_path, whole, what, message):
    run = shutil.copytree(whole(SHORT), tmp_path / "run")
    change(run, lambda state: state["machine"].update(what))
    with pytest.raises(InputError, match=message):
        train.fit(SHORT, run, quiet=True, resume=True)


def test_another_version_of_torch_comes_with_a_warning(tmp_path, whole, capsys):
    run = shutil.copytree(whole(SHORT), tmp_path / "run")
    change(run, lambda state: state["machine"].update(torch="1.0"))
    train.fit(SHORT, run, resume=True)
    assert "torch 1.0" in capsys.readouterr().out.split("warning: begun with ")[1].splitlines()[0]


# ---- checkpoints that are not what they were ----

def change(run: Path, how) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    how(state)
    torch.save(state, run / "last.pt")


@pytest.mark.parametrize("spoil,message", [
    (lambda run: (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:10 ** 5]),
     "last.pt: damaged, or no file .*python evaluate.py .*run still scores its best.pt; --name run --overwrite, with"),
    (lambda run: torch.save({"options": {}}, run / "last.pt"), "its last.pt was made by another version .*'data'"),
    (lambda run: torch.save([1], run / "last.pt"), "its last.pt was made by another version"),
    (lambda run: change(run, lambda state: state["options"].pop("lr")), "made by another version of this project"),
    (lambda run: change(run, lambda state: state["state"].update(more=1)), "its last.pt was made by another"),
    (lambda run: (run / "last.pt").unlink(), "run: its last.pt is gone; python evaluate.py .*run still scores its"),
    (lambda run: [(run / n).unlink() for n in ("last.pt", "best.pt")] + [(run / "config.json").write_text("{}")],
     "its config.json was made by"),
    (lambda run: (run / "best.pt").unlink(), "its best.pt is gone, of epoch "),
    (lambda run: shutil.rmtree(run), "no run there; expected a folder made by train.py")])
def test_a_spoiled_run_is_named(tmp_path, whole, spoil, message):
    run = shutil.copytree(whole(SHORT), tmp_path / "run")
    spoil(run)
    with pytest.raises(InputError, match=message) as caught:
        train.main(["--resume", str(run)])
    assert "\n" not in str(caught.value)
    if (run / "best.pt").exists():
        assert evaluate.load_run(run, torch.device("cpu")).epoch > 0  # best.pt still evaluates


class Code:
    """An object that runs a command when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_nothing_in_a_file_is_executed(tmp_path, whole, monkeypatch):
    run = shutil.copytree(whole(SHORT), tmp_path / "run")
    evil = Code(tmp_path / "witness")
    torch.save({**torch.load(run / "best.pt", weights_only=True), "epoch": evil}, run / "best.pt")
    torch.save(evil, run / "last.pt"), torch.save(evil, tmp_path / "weights.pt")
    np.savez(tmp_path / "cache.npz", version=np.array(cache.CACHE_VERSION), image=np.array([evil], object))
    for read in (lambda: evaluate.load_run(run, torch.device("cpu")),
                 lambda: train.fit(SHORT, run, quiet=True, resume=True),
                 lambda: pretrained.read_weights(str(tmp_path / "weights.pt"), "b0"),
                 lambda: cache.read_arrays(tmp_path / "cache.npz", "image")):
        with pytest.raises(ValueError, match="damaged"):
            read()
    assert not (tmp_path / "witness").exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)  # it would have worked
    assert (tmp_path / "witness").exists()


# ---- kill -9 ----

# a helper whose main process is killed as it takes a tensor: python -c LOST ROOT
LOST = """
import sys
sys.path.insert(0, sys.argv[1])
import multiprocessing, time
from multiprocessing import connection, resource_sharer
from retina import files

def helper(pipe):
    files.init_worker(1)
    pipe.send(resource_sharer.DupFd(1)._id)
    pipe.recv()

here, there = multiprocessing.Pipe()
process = multiprocessing.get_context("fork").Process(target=helper, args=(there,))
process.start()
address, key = here.recv()
connection.Client(address, authkey=multiprocessing.current_process().authkey).close()
time.sleep(0.2)
here.send(0)
process.join()
"""


def test_a_helper_says_nothing_when_its_main_process_is_killed_as_it_takes_a_tensor(tmp_path):
    lost = start(LOST, ROOT, output=tmp_path / "output")
    lost.join(60)
    assert lost.exitcode == 0 and (tmp_path / "output").read_text() == ""


# forks a process for each of many starts of train.py, without the seconds that the imports take, and kills it:
# python -c KILLS ROOT HOME SEED -> a line of JSON
KILLS = """
import sys
sys.path.insert(0, sys.argv[1])
import json, os, random, shutil, signal, time
from pathlib import Path
import data, model, train
from retina import files
from retina.datasets import cache, readers, records
from retina.training import checkpoint
model.STAGES = [(*stage[:-1], 1) for stage in model.STAGES]  # so large that files are caught half written
home, chance = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
records.HERE, cache.CACHE = home, home / "cache"
readers.DRAWN = {"train": (0, 60), "test": (1, 5)}
checkpoint.SAVE_SECONDS = 0.5
run, flags = home / "runs" / "killed", "--image-size 64 --epochs 3 --batch-size 12 --workers 1".split()

def start():
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    sys.stdout = sys.stderr = open(home / "output", "a", buffering=1)
    arguments = ["--resume", str(run)] if run.exists() else ["--name", "killed", *flags]
    try:
        files.run_cli(lambda: train.main(arguments))
    except SystemExit as exit_:
        os._exit(exit_.code)
    os._exit(0)

def finished(status):
    # a run that nothing killed must have ended well; the next one begins anew
    assert status == 0, (status, (home / "output").read_text()[-2000:])
    found["ends"].append(json.loads((run / "result.json").read_text())["weights"])
    shutil.rmtree(run)

found, sessions = {"at random": 0, "checkpoint": 0, "cache": 0, "half written": 0, "ends": []}, []
while sum(found[k] for k in ("at random", "checkpoint", "cache")) < 21:
    moment = ("cache", "at random", "checkpoint")[len(sessions) % 3]
    if moment == "cache":
        shutil.rmtree(cache.CACHE, ignore_errors=True)
    pid, begun, wait = start(), time.monotonic(), chance.uniform(0.05, {"at random": 4, "cache": 1.5}.get(moment, 0.05))
    sessions.append(pid)
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        if time.monotonic() - begun > wait and (moment != "checkpoint" or any(run.glob("*.pt.*.part"))):
            time.sleep(chance.uniform(0, 0.05) if moment == "checkpoint" else 0)
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -signal.SIGKILL:
        finished(status)
        continue
    found[moment] += 1
    found["half written"] += any(run.glob("*.part"))
    for name in ("last.pt", "best.pt"):
        if (run / name).exists():
            files.load_tensors(run / name)
    if (run / "log.jsonl").exists():
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
last = start()
status = os.waitstatus_to_exitcode(os.waitpid(last, 0)[1])
time.sleep(6)  # a loader's process looks for its parent every 5 s
left = []
for path in Path("/proc").glob("[0-9]*/stat"):
    try:
        if int(path.read_text().rpartition(")")[2].split()[3]) in sessions:
            left.append(path.parent.name)
    except OSError:
        pass
print(json.dumps(found | {"status": status, "processes left": len(left)}))
"""


@pytest.mark.slow
def test_killed_at_least_20_times_a_run_ends_as_if_it_had_not_been(tmp_path):
    """At random instants, while a checkpoint is written, while the cache is built; helpers die with their parent."""
    (tmp_path / "a").mkdir()
    flags_ = "--name=whole --image-size=64 --epochs=3 --batch-size=12".split()
    as_large = "model.STAGES = [(*stage[:-1], 1) for stage in model.STAGES]"
    program = PROGRAM.replace(SMALL_NET, as_large).replace('"train": (0, 30)', '"train": (0, 60)')
    whole = subprocess.run([sys.executable, "-c", program, ROOT, tmp_path / "b", *flags_], capture_output=True,
                           text=True)
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.run([sys.executable, "-c", KILLS, ROOT, tmp_path / "a", "0"], capture_output=True, text=True,
                            timeout=600)
    assert killed.returncode == 0, killed.stderr
    found = json.loads(killed.stdout)
    print(found)
    assert found["status"] == 0 and found["processes left"] == 0
    assert all(end == json.loads((tmp_path / "b" / "runs" / "whole" / "result.json").read_text())["weights"]
               for end in found["ends"])
    assert found["at random"] + found["checkpoint"] + found["cache"] >= 20 and found["half written"] >= 3
    assert "Traceback" not in (tmp_path / "a" / "output").read_text()
    ended_alike(tmp_path / "a" / "runs" / "killed", tmp_path / "b" / "runs" / "whole")


# ---- the same weights ----

def test_the_hash_tells_weights_apart(whole):
    net = evaluate.load_run(whole(SHORT), torch.device("cpu")).net
    first = checkpoint.weights_hash(net)
    assert first == json.loads((whole(SHORT) / "result.json").read_text())["weights"]["best.pt"]
    with torch.no_grad():
        net.encoder.features[0][0].weight[0, 0, 0, 0] += 1e-6
    assert checkpoint.weights_hash(net) != first


def test_results_do_not_depend_on_the_order_of_files(tmp_path, shared_tree, monkeypatch):
    """Folders list their files in any order; here in that of a reversed name."""
    (tmp_path / "a" / "train").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "a" / "train" / "xy"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i * 20, 90, 255 - i)).save(tmp_path / "a" / "train" / "xy"[i % 2] / f"{i}.png")

    def found():
        return [(r.name, r.masks and list(r.masks), r.grade, r.category, r.split)
                for root in (shared_tree, tmp_path / "a") for r in readers.read_data(root).records]
    before, listed = found(), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), key=lambda p: p.name[::-1],
                                                                  reverse=True)))
    assert found() == before and len(before) > 40


def test_a_clock_that_jumps_changes_nothing(tmp_path, classes, monkeypatch):
    """Files of the past and of the future, and a clock that is there, or here, or at the beginning of time."""
    options = replace(SHORT, tasks=("cls",), data=str(classes), names={"category": ["a", "b"]}, batch_size=3)
    train.fit(options, tmp_path / "whole", quiet=True)
    jumps = itertools.cycle([0.0, 4e9, 1.7e9])
    for path in classes.rglob("*.png"):
        os.utime(path, (next(jumps), next(jumps)))
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: next(jumps))
    with pytest.raises(Killed):
        fit_until(monkeypatch, 5, die, options, tmp_path / "run")
    train.fit(options, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", tmp_path / "whole")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["seconds"] < 600 for line in lines)


# ---- faults ----

def test_a_killed_loader_process_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch, whole):
    load = data.FundusDataset.__getitem__

    def killed(self, index):
        if torch.utils.data.get_worker_info() is not None and index[1] is not None:
            calls.append(index)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index)
    calls = []  # of the loader's process
    options = replace(SHORT, workers=1)
    with monkeypatch.context() as patch, pytest.raises(
            RunError, match="process that loads photographs was killed .*; try fewer --workers .now 1.; go on with: "
                            "python train.py --resume"):
        patch.setattr(data.FundusDataset, "__getitem__", killed)
        train.fit(options, tmp_path / "run", quiet=True)
    train.fit(options, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", whole(SHORT))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_loader_process_that_is_killed_as_it_hands_over_a_batch(tmp_path, error):
    with pytest.raises(RunError, match="process that loads photographs was killed"), \
            interrupt.explain_failures(tmp_path, replace(SHORT, workers=1), SINGLE_PROCESS):
        raise error
    with pytest.raises(type(error)), interrupt.explain_failures(tmp_path, SHORT, SINGLE_PROCESS):
        raise error


@pytest.mark.parametrize("error", [RuntimeError, EOFError, ConnectionResetError, BrokenPipeError])
def test_loaders_that_the_same_ctrl_c_ended_are_no_failure(error):
    """Their pipes break while a step waits for them; without Ctrl-C the same error is one."""
    for heard, expected in ((True, KeyboardInterrupt), (False, error)):
        with pytest.raises(expected), interrupt.StopSignal() as stop:
            stop.heard = heard
            raise error("lost")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("workers,spoil,said", [
    (2, Path.unlink, "removed while it was in use"), (0, halve, "changed while it was in use"),
    (0, lambda path: Image.new("RGB", (40, 40)).save(path), "changed while it was in use")],
    ids=["deleted", "truncated", "replaced"])
def test_an_image_that_changes_while_training_runs(tmp_path, classes, monkeypatch, spoil, said, workers):
    options = replace(SHORT, tasks=("cls",), data=str(classes), names={"category": ["a", "b"]}, batch_size=3,
                      workers=workers)
    images = [path for path in classes.rglob("*.png") if path.parts[-3] == "train"]
    train.fit(options, tmp_path / "whole", quiet=True)
    shutil.copytree(classes, tmp_path / "kept")

    def spoil_all():
        for path in images:
            spoil(path)
    with pytest.raises(InputError, match=rf"/\d+.png: {said}; .*; then go on with: python train") as e:
        fit_until(monkeypatch, 2, spoil_all, options, tmp_path / "run")
    assert "\n" not in str(e.value)
    shutil.copytree(tmp_path / "kept", classes, dirs_exist_ok=True)  # with the times of change
    train.fit(options, tmp_path / "run", quiet=True, resume=True)
    ended_alike(tmp_path / "run", tmp_path / "whole")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def version(path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {"version": 1}))


@pytest.mark.parametrize("spoil,said,running", [
    (halve, "is damaged", False), (flip, "is damaged", True), (version, "was made by another version", False),
    (Path.unlink, "No such file", True)], ids=["truncated", "bits flipped", "another version", "removed"])
def test_a_spoiled_cache_is_made_anew(tmp_path, monkeypatch, whole, capsys, spoil, said, running):
    expected = whole(SHORT)
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    data.FundusDataset(readers.read_drawn().records, SHORT.image_size)

    def spoil_all():
        for path in sorted((tmp_path / "cache").rglob("*.npz"))[::3]:
            spoil(path)
    if running:
        fit_until(monkeypatch, 2, spoil_all, SHORT, tmp_path / "run")
    else:
        spoil_all()
        train.fit(SHORT, tmp_path / "run", quiet=True)
    ended_alike(tmp_path / "run", expected)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("cache: ") and said in line and line.endswith("made anew") for line in lines)
    assert len(lines) < 60


def test_two_processes_build_one_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 48)})
    both = [FORK.Process(target=data.FundusDataset, args=(readers.read_drawn().records, 64)) for _ in range(2)]
    [p.start() for p in both], [p.join(120) for p in both]
    assert [p.exitcode for p in both] == [0, 0]
    made = list((tmp_path / "cache").rglob("*"))
    assert sum(p.suffix == ".npz" for p in made) == 48 and not [p for p in made if p.suffix == ".part"]
    assert all(cache.read_arrays(p, "image")[0].shape == (3, 64, 64) for p in made if p.suffix == ".npz")


def test_a_killed_process_of_the_cache_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    monkeypatch.setattr(cache, "preprocess", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match="a process that was reading photographs was killed, perhaps for want of memory"):
        data.FundusDataset(readers.read_drawn().records, 32)


def test_a_run_that_is_going_on_is_left_alone(tmp_path, whole):
    """Another process holds it, as long as it lives."""
    run = shutil.copytree(whole(SHORT), tmp_path / "run")
    here, there = FORK.Pipe()

    def hold():
        held = files.lock_folder(run)
        there.send(held.closed)
        time.sleep(60)
    other = FORK.Process(target=hold)
    other.start()
    try:
        assert here.poll(60) and here.recv() is False
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match="run: another process is training in it; wait for its end"):
                train.fit(SHORT, run, quiet=True, **how)
    finally:
        other.kill(), other.join()
    train.fit(SHORT, run, quiet=True, resume=True)
    assert (run / "result.json").exists() and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_that_exists_is_refused_or_replaced(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(records, "HERE", tmp_path)
    run = shutil.copytree(whole(SHORT), tmp_path / "runs" / "mine")
    with pytest.raises(InputError, match="mine: exists already; choose another --name, go on with --resume .*mine, or"):
        train.main(["--name", "mine"])
    with pytest.raises(InputError, match="exists already"):
        train.fit(SHORT, run, quiet=True)  # begun since the command line was read
    assert len(log(run)) == 2
    train.main("--name mine --overwrite --tasks cls --image-size 64 --epochs 1 --batch-size 15".split())
    assert len(log(run)) == 1 and "seg" not in log(run)[0]["val"]
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite: .*notes holds something else than a run"):
        train.main(["--name", "notes", "--overwrite"])
    with pytest.raises(InputError, match="--overwrite: expected --name as well"):
        train.main(["--overwrite"])


def test_no_permission_to_write_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "HERE", tmp_path / "home")
    (tmp_path / "home" / "runs").mkdir(parents=True)
    data.FundusDataset(readers.read_drawn().records, 64, crops=train.Config.crops)[0]  # with what reading imports
    (tmp_path / "home" / "runs").chmod(0o555)
    root = os.geteuid() == 0
    if root:  # who may write anywhere
        for path in [tmp_path, *tmp_path.parents[:3]]:
            path.chmod(path.stat().st_mode | 0o55)
        os.seteuid(65534)
    try:
        with pytest.raises(SystemExit) as exit_:
            files.run_cli(lambda: train.main("--image-size 64 --epochs 1".split()))
    finally:
        if root:
            os.seteuid(0)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(
        f"error: {tmp_path / 'home' / 'runs' / 'cls_seg_1'}: no permission; expected to be allowed")


def test_a_gradient_that_is_not_finite_names_task_and_step():
    state, batch, learn = state_and_batch()
    learn(state, batch)
    state.net.heads["seg"].conv.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(RunError, match="the gradient of seg is not finite at step 2 .first in heads.seg.conv.weight.;"):
        learn(state, batch)
    state, batch, learn = state_and_batch()
    state.net.encoder.features[0][0].weight.register_hook(lambda g: g / 0)
    with pytest.raises(RunError, match="the gradient of what the tasks share is not finite at step 1 .first in enc"):
        learn(state, batch)
    assert state.step == 0


def test_steps_that_fp16_leaves_out_are_counted_and_limited():
    """The scaler works on a CPU as well; gradients are made infinite where fp16 would have."""
    state, batch, learn = state_and_batch()
    state.scaler = state.monitor.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
    too_large = [True, True, False, *[True] * 19, False, *[True] * 20]
    turn = iter(too_large)
    state.net.heads["cls"].linear.bias.register_hook(lambda g: g * float("inf") if next(turn) else g)
    weights, counts = [], []
    for _ in too_large[:-1]:
        learn(state, batch)
        weights.append(state.net.heads["seg"].conv.bias.detach().clone()), counts.append(state.monitor.skipped)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert counts[:4] == [1, 2, 2, 3] and counts[-1] == 40 and state.monitor.skipped_in_a_row == 19
    assert state.scaler.get_scale() < 1
    with pytest.raises(RunError, match="too large for fp16 at step 43, for the 20th time in a row; lower --lr"):
        learn(state, batch)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_one_line(tmp_path, monkeypatch, error, capsys):
    def full():
        raise error
    with pytest.raises(RunError, match="out of memory after step 5 with --batch-size 6 --image-size 32; try "
                                       "--batch-size 3 or a smaller --image-size; .*run keeps what was "
                                       "saved") as caught:
        fit_until(monkeypatch, 5, full, SHORT, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["step"] == 4
    with pytest.raises(SystemExit) as exit_:
        files.run_cli(full_command(caught.value))
    assert exit_.value.code == 1 and capsys.readouterr().err.startswith("error: out of memory")


def full_command(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("how", ["limited file size", "small file system"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch, whole, how):
    """There was room for the first checkpoint, and there is none for the second."""
    run = tmp_path / "disk" / "run"
    (tmp_path / "disk").mkdir()
    if how == "small file system" and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if how == "limited file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * (run / "last.pt").stat().st_size, before[1]))
        else:
            room = shutil.disk_usage(tmp_path / "disk").free
            (tmp_path / "disk" / "ballast").write_bytes(bytes(room - (1 << 20)))
    try:
        with pytest.raises(OSError) as caught:
            fit_until(monkeypatch, 2, fill, SHORT, run)
        assert "; what was there before is as it was; make room" in caught.value.strerror
        assert caught.value.filename == str(run / "last.pt")
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (tmp_path / "disk" / "ballast").unlink(missing_ok=True)
        assert not list(run.glob("*.part"))
        assert torch.load(run / "last.pt", weights_only=True)["state"]["step"] == 0
        if how == "limited file size":  # two checkpoints of this size do not fit into the other
            train.fit(SHORT, run, quiet=True, resume=True)
            ended_alike(run, whole(SHORT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if how == "small file system":
            subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)  # errors keep the run's lock open


def test_ctrl_c_twice_ends_at_once(tmp_path):
    """Once it would go on to the end of a step that takes a minute."""
    slow = PROGRAM.replace("files.run_cli", """
import time
whole = train.train_step
def step(state, *rest):
    if state.step == 3:
        print("slow", flush=True)
        time.sleep(60)
    return whole(state, *rest)
train.train_step = step
checkpoint.RunFolder.due = lambda run: run.state.step % 2 == 0
files.run_cli""")
    flags_ = "--image-size=64 --batch-size=4 --name=a".split()
    process, output = start(slow, ROOT, tmp_path, *flags_, output=tmp_path / "output"), tmp_path / "output"
    while process.is_alive() and not (output.exists() and "slow" in output.read_text()):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert "interrupted; go on with: python train.py --resume" in output.read_text()
    assert torch.load(tmp_path / "runs" / "a" / "last.pt", weights_only=True)["state"]["step"] == 2
