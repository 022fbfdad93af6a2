"""The command line: defaults, bounds, and mistakes that are one line."""

import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT, SMALL_NET, official_tree, start
from retina import files
from retina.datasets import records
from retina.evaluation import scoring
from retina.files import InputError
from retina.training import config as config_
from tasks import TASKS


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


# ---- the command line ----

@pytest.mark.parametrize("arguments,message", [
    ("--data /nonexistent", "/nonexistent: no such file or folder"),
    ("--fold 6/5", "--fold 6/5: expected I/N"),
    ("--name ../x", "--name ../x: expected a name, not a path"),
    ("--tasks cls,seg", "--tasks cls,seg: no such task; there are cls, dme, seg, loc, fine, signs, text; separate them "
     "by spaces"),
    ("--tasks cls fly", "--tasks fly: no such task; there are cls, dme, seg, loc, fine, signs, text"),
    ("--image-size 100", "--image-size 100: expected a multiple of 32"),
    ("--image-size 32", "--image-size 32: expected at least 64"),
    ("--seed -1", "--seed -1: expected at least 0"),
    ("--seed 4294967296", "--seed 4294967296: expected less than"),
    ("--epochs 0", "--epochs 0: expected at least 1"),
    ("--lr nan", "--lr nan: expected at least"),
    ("--top-k 9", "--top-k 9: expected 1 to 8, the number of --num-experts"),
    ("--top-k 0", "--top-k 0: expected at least 1"),
    ("--router private --top-k -1", "--top-k -1: expected at least 1"),
    ("--router uniform --top-k 2", "--top-k 2: --router uniform mixes all 8 experts; leave --top-k out"),
    ("--router private --num-experts 9", "--router private: 2 tasks with --top-k 4 experts each need --num-experts 8; "
     "with 9, 1 would have no task"),
    ("--router private --num-experts 1", "--router private: 2 tasks with --top-k 1 experts each need --num-experts 2; "
     "with 1, 1 are missing"),
    ("--router random --balance-weight 0.1", "--balance-weight 0.1: --router random does not learn"),
    ("--num-experts 0 --top-k 2", "--num-experts 0: there is no layer for --top-k; leave one of them out"),
    ("--num-experts 0 --router shared", "--num-experts 0: there is no layer for --router; leave one of them out"),
    ("--expert-ratio 0", "--expert-ratio 0.0: expected at least 0.001"),
    ("--balance-weight -1", "--balance-weight -1.0: expected at least 0"),
    ("--loss-weights cls=x", "--loss-weights cls=x: expected 'fixed'"),
    ("--loss-weights dme=1", "--loss-weights dme=1: 'dme' is not among --tasks cls seg"),
    ("--encoder-weights /nonexistent.pt", "--encoder-weights /nonexistent.pt: no such file"),
])
def test_bad_flags_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        files.run_cli(lambda: train.main(arguments.split()))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("arguments,experts,top_k,balance", [
    ("", 8, 2, 0.01), ("--num-experts 1", 1, 1, 0.01), ("--router shared --balance-weight 0", 8, 2, 0),
    ("--router uniform", 8, 8, 0), ("--router uniform --num-experts 3", 3, 3, 0), ("--router random", 8, 2, 0),
    ("--router private", 4, 2, 0), ("--router private --num-experts 8", 8, 4, 0),
    ("--router private --top-k 1", 2, 1, 0), ("--router private --tasks cls dme seg loc", 8, 2, 0),
    ("--num-experts 0 --moe-at decoder", 0, 1, 0)])
def test_numbers_of_experts_follow_the_router(arguments, experts, top_k, balance):
    options = train.configure(arguments.split())[0]
    assert (options.num_experts, options.top_k, options.balance_weight) == (experts, top_k, balance)


def test_one_chosen_expert_comes_with_its_reason():
    for arguments, said in (("--top-k 1", True), ("--router shared --top-k 1", True), ("--num-experts 1", False),
                            ("--router random --top-k 1", False), ("", False)):
        notes = train.configure(arguments.split())[1]
        assert any("an expert's weight is its softmax over all experts" in note for note in notes) == said


@pytest.mark.parametrize("names,sides", [
    (["left-eye", "right-eye"], [0, 1]), (["LEFT_EYE", "other"], [0]), (["leftEye", "RightEye"], [0, 1]),
    (["lefteye", "righteyes"], [0, 1]), (["OD", "OS"], [0, 1]), (["od-1", "os-1", "blurred"], [0, 1]),
    (["Oculus dexter", "oculus sinister"], [0, 1]), (["2 links", "1 rechts"], [0, 1]), (["L", "R"], [0, 1]),
    (["superior", "inferior temporal", "macula"], [0, 1]), (["upper2", "lower2"], [0, 1]), (["nasal", "none"], [0]),
    (["drusen", "copyright", "bright", "leftover", "upright", "supper"], []), (["OD", "macula"], []),
    (["normal", "L"], []), (["0", "1"], [])])
def test_names_of_classes_that_sound_like_sides(names, sides):
    assert config_.names_of_sides(names) == [names[i] for i in sides]


# ---- names that cannot be printed; another home ----

def test_a_name_that_a_stream_cannot_print_is_no_error(monkeypatch, tmp_path):
    """A terminal that knows ASCII alone, and a name of bytes that are no text."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0]), monkeypatch.setattr(sys, "stderr", streams[1])

    def main():
        print("runs/caf\u00e9 \udcff")
        raise InputError("/data/\u7f51\u819c: no such folder")
    with pytest.raises(SystemExit) as exit_:
        files.run_cli(main)
    said = [(stream.flush(), stream.buffer.getvalue())[1] for stream in streams]
    assert exit_.value.code == 2
    assert said == [b"runs/caf\\xe9 \\udcff\n", b"error: /data/\\u7f51\\u819c: no such folder\n"]
    files.write_text(tmp_path / "t.txt", "caf\u00e9 \udcff")
    assert (tmp_path / "t.txt").read_bytes() == b"caf\xc3\xa9 \\udcff"


def test_scores_of_a_photograph_whose_name_is_no_text_are_written(tmp_path):
    scores = scoring.SplitScores([TASKS["dme"]], {"dme": ["a\udcff.png"]}, {"dme": torch.tensor([[0.2, 0.3, 0.5, 2]])})
    scoring.write_per_photograph(tmp_path / "t.csv", scores, {"dme": {"temperature": 1.0}})
    assert (tmp_path / "t.csv").read_bytes().splitlines()[1] == rb"a\udcff.png,2,0.2,0.3,0.5,2"


def test_data_and_runs_can_lie_elsewhere(tmp_path):
    """With RETINA_HOME, in a process of its own: the run, the cache, and data/IDRiD, which is found there."""
    home = tmp_path / "h\u00f6me"
    official_tree(home / "data" / "IDRiD", segmentation=5, grading=10, test=False)
    program = f"""
import os, sys
os.environ["RETINA_HOME"] = sys.argv[2]
sys.path.insert(0, sys.argv[1]), sys.stdout.reconfigure(encoding="ascii")
import model, train
from retina import files
{SMALL_NET}
files.run_cli(lambda: train.main(sys.argv[3:]))
"""
    flags = "--tasks cls --image-size 64 --epochs 1 --encoder-weights none --name r".split()
    process = start(program, ROOT, home, *flags, output=tmp_path / "output", errors=tmp_path / "errors")
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    said = (tmp_path / "output").read_text()
    assert (home / "runs" / "r" / "best.pt").is_file() and len(list((home / "data" / "cache").rglob("*.npz"))) >= 15
    assert "validation split of " in said and "h\\xf6me/data/IDRiD" in said


@pytest.mark.parametrize("name,problem", [("nowhere", "no such folder"), ("a file", "no such folder"),
                                          ("read only", "a folder without permission to write")])
def test_a_home_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, name, problem):
    (tmp_path / "a file").write_text(""), (tmp_path / "read only").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "read only")  # root may write anywhere
    monkeypatch.setenv("RETINA_HOME", str(tmp_path / name))
    with pytest.raises(SystemExit) as exit_:
        files.run_cli(lambda: print("begun"))
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    assert printed.err == f"error: RETINA_HOME {tmp_path / name}: {problem}; expected one for data/, runs/ and the " \
                          "cache; make it, or unset the variable\n"


# ---- data and runs ----

def test_bad_data_stops_the_program_with_status_2(tree, capfd):
    next((tree / "B. Disease Grading" / "1. Original Images" / "a. Training Set").iterdir()).write_bytes(b"\xff\xd8no")
    flags = [f"--data={tree}", "--encoder-weights=none"]
    with pytest.raises(SystemExit) as ended:
        files.run_cli(lambda: train.main(flags))
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ") and ".jpg: not a readable image" in said


def test_a_task_without_labels_names_those_that_work(tree):
    shutil.rmtree(tree / "B. Disease Grading")
    options = train.configure(["--data", str(tree), "--encoder-weights", "none"])[0]
    with pytest.raises(InputError, match="--tasks cls: photographs with its label .*: 0 for .*--tasks seg would work"):
        train.fit(options, tree / "run")


def test_an_existing_run_is_not_overwritten():
    (records.HERE / "runs" / "taken").mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match="taken: exists already; choose another --name, go on with --resume"):
        train.main(["--name", "taken"])


def test_the_same_command_can_be_typed_twice(tmp_path):
    assert config_.next_folder(tmp_path, ("cls", "seg")).name == "cls_seg_1"
    (tmp_path / "cls_seg_1").mkdir()
    assert config_.next_folder(tmp_path, ("cls", "seg")).name == "cls_seg_2"
