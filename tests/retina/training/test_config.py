"""The command line: defaults, bounds, and mistakes that are one line."""

import shutil
import subprocess
import sys

import pytest

import train
from conftest import PROGRAM, ROOT
from retina import files
from retina.datasets import records
from retina.files import InputError
from retina.training import config as config_

pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


# ---- the command line ----

@pytest.mark.parametrize("arguments,message", [
    ("--data /nonexistent", "/nonexistent: no such file or folder"),
    ("--fold 6/5", "--fold 6/5: expected I/N"),
    ("--name ../x", "--name ../x: expected a name, not a path"),
    ("--tasks cls,seg", "--tasks cls,seg: no such task; there are cls, dme, seg, loc; separate them by spaces"),
    ("--tasks cls fly", "--tasks fly: no such task; there are cls, dme, seg, loc"),
    ("--size 100", "--size 100: expected a multiple of 32"),
    ("--size 32", "--size 32: expected at least 64"),
    ("--seed -1", "--seed -1: expected at least 0"),
    ("--seed 4294967296", "--seed 4294967296: expected less than"),
    ("--epochs 0", "--epochs 0: expected at least 1"),
    ("--lr nan", "--lr nan: expected at least"),
    ("--chosen 9", "--chosen 9: expected 1 to 8, the number of --experts"),
    ("--chosen 0", "--chosen 0: expected at least 1"),
    ("--router private --chosen -1", "--chosen -1: expected at least 1"),
    ("--router uniform --chosen 2", "--chosen 2: --router uniform mixes all 8 experts; leave --chosen out"),
    ("--router private --experts 9", "--router private: 2 tasks with --chosen 4 experts each need --experts 8; with 9, "
                                     "1 would have no task"),
    ("--router private --experts 1", "--router private: 2 tasks with --chosen 1 experts each need --experts 2; with 1, "
                                     "1 are missing"),
    ("--router random --balance 0.1", "--balance 0.1: --router random does not learn"),
    ("--experts 0 --chosen 2", "--experts 0: there is no layer for --chosen; leave one of them out"),
    ("--experts 0 --router shared", "--experts 0: there is no layer for --router; leave one of them out"),
    ("--expert-width 0", "--expert-width 0.0: expected at least 0.001"),
    ("--balance -1", "--balance -1.0: expected at least 0"),
    ("--loss-weights cls=x", "--loss-weights cls=x: expected 'fixed'"),
    ("--loss-weights dme=1", "--loss-weights dme=1: 'dme' is not among --tasks cls seg"),
    ("--weights /nonexistent.pt", "--weights /nonexistent.pt: no such file"),
])
def test_bad_flags_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        files.command(lambda: train.main(arguments.split()))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("arguments,experts,chosen,balance", [
    ("", 8, 2, 0.01), ("--experts 1", 1, 1, 0.01), ("--router shared --balance 0", 8, 2, 0),
    ("--router uniform", 8, 8, 0), ("--router uniform --experts 3", 3, 3, 0), ("--router random", 8, 2, 0),
    ("--router private", 4, 2, 0), ("--router private --experts 8", 8, 4, 0), ("--router private --chosen 1", 2, 1, 0),
    ("--router private --tasks cls dme seg loc", 8, 2, 0), ("--experts 0 --experts-at decoder", 0, 1, 0)])
def test_numbers_of_experts_follow_the_router(arguments, experts, chosen, balance):
    options = train.configure(arguments.split())[0]
    assert (options.experts, options.chosen, options.balance) == (experts, chosen, balance)


def test_one_chosen_expert_comes_with_its_reason():
    for arguments, said in (("--chosen 1", True), ("--router shared --chosen 1", True), ("--experts 1", False),
                            ("--router random --chosen 1", False), ("", False)):
        notes = train.configure(arguments.split())[1]
        assert any("an expert's weight is its softmax over all experts" in note for note in notes) == said


def test_bad_data_stops_the_program_with_status_2(tree):
    next((tree / "B. Disease Grading" / "1. Original Images" / "a. Training Set").iterdir()).write_bytes(b"\xff\xd8no")
    result = subprocess.run([sys.executable, "-c", PROGRAM, ROOT, tree.parent, f"--data={tree}", "--weights=none"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and ".jpg: not a readable image" in result.stderr


def test_a_task_without_labels_names_those_that_work(tree):
    shutil.rmtree(tree / "B. Disease Grading")
    options = train.configure(["--data", str(tree), "--weights", "none"])[0]
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
