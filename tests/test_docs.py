"""What is written is true as far as a program can tell: code in docs/ runs, files and flags exist, sentences are short.

Pages whose code is run: add-a-task.md and another-encoder.md, whose blocks go to the end of the files that their first
lines name, in a copy of the project. Numbers that are computed anew: those on the load in experts.md.
"""

import contextlib
import io
import re
import shutil
import sys
import textwrap
from pathlib import Path

import benchmark
import known_truths
import pytest
import test_model_experts as experts
import torch
import torchvision
from torch.distributed.run import get_args_parser

import baselines
import data
import evaluate
import train
import visualize
from conftest import ROOT, drawn, start
from retina.datasets import synthetic


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [*sorted(ROOT.glob("*.py")), ROOT / "retina"]


# ---- code ----

def blocks(page: str) -> list[str]:
    """The Python blocks of a page in docs/."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def pasted(page: str, home: Path) -> None:
    """Copy the project to `home` and append the page's blocks to its files."""
    for module in MODULES:
        (shutil.copytree if module.is_dir() else shutil.copy)(module, home / module.name)
    for block in blocks(page):
        first, _, code = block.partition("\n")
        path = home / first.removeprefix("# at the end of ")
        path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{code}", encoding="utf-8")


def run_there(home: Path, program: str) -> str:
    """Run a program in a copy of the project, with few layers; -> what it prints."""
    program = "import torch, model\nmodel.STAGES = [(*s[:-1], 1) for s in model.STAGES]\n" + textwrap.dedent(program)
    process = start(program, output=home / "output", errors=home / "errors", cwd=home)
    process.join()
    assert process.exitcode == 0, (home / "errors").read_text()
    return (home / "output").read_text()


TRAIN_AND_SCORE = """
import sys, train, evaluate
train.main(["--name", "run", "--data", "labels.csv", "--image-size", "64", "--epochs", "1", "--batch-size", "4",
            "--num-experts", "4", "--expert-ratio", "0.1", "--precision", "fp32", *FLAGS])
for words in ([], ["--images", "1.png", "--out", "out"]):
    sys.argv = ["evaluate.py", "runs/run", *words]
    evaluate.main()
"""


def write_labels(home: Path) -> None:
    """Twelve drawings and a table with their grades, edema risks and made-up ages; four validate."""
    lines = ["image,grade,edema_risk,age,split"]
    for i in range(12):
        eye = synthetic.plan(3, i)
        drawn(3, i, 96).save(home / f"{i}.png")
        lines.append(f"{i}.png,{eye.grade},{eye.edema_risk},{30 + 3 * i},{'val' if i % 3 == 0 else 'train'}")
    (home / "labels.csv").write_text("\n".join(lines))


def test_a_task_and_a_label_from_the_page_are_learned_and_scored(tmp_path):
    pasted("add-a-task.md", tmp_path)
    write_labels(tmp_path)
    said = run_there(tmp_path, 'FLAGS = "--encoder-weights none --tasks edema age".split()' + TRAIN_AND_SCORE +
                     "import tasks\nage, one = tasks.TASKS['age'], torch.ones(2, 1)\n"
                     "print('guess', age.constant_guess(torch.tensor([40., 50.])))\n"
                     "print('taught', age.teacher_loss(one, [0 * one, one], 1.0))")
    assert "edema: 4 photographs of 4 eyes" in said and "age: 4 photographs of 4 eyes" in said
    assert "1 of 1 photographs answered for" in said and "guess tensor([45.])" in said
    assert "taught tensor([0.5000, 0.5000])" in said
    scored, predicted = ((tmp_path / path).read_text().splitlines()[0].split(",") for path in (
        "runs/run/per_photograph.csv", "out/predictions.csv"))
    assert {"edema_risk", "edema_risk_p1", "edema_risk_true", "age", "age_true"} <= set(scored)
    assert {"edema_risk", "edema_risk_p1", "age"} <= set(predicted)


def test_an_encoder_from_the_page_is_trained_and_scored(tmp_path):
    """From published weights, of which all but the classifier are taken."""
    pasted("another-encoder.md", tmp_path)
    write_labels(tmp_path)
    (tmp_path / "labels.csv").write_text((tmp_path / "labels.csv").read_text().replace(",age,", ",group,"))
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    said = run_there(tmp_path, 'FLAGS = "--encoder resnet18 --encoder-weights resnet18.pth --tasks cls".split()' +
                     TRAIN_AND_SCORE)
    assert "cls: 4 photographs of 4 eyes" in said and "1 of 1 photographs answered for" in said


def test_the_numbers_on_the_load():
    """Of each table cell the largest error of a load, the smallest and the largest sum of a token's loads."""
    text, measured = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8"), []
    for load in (lambda router, u: router(u, (len(u), 1, 1)).load, experts.load_against_the_kth_of_all,
                 experts.load_against_softmaxed_thresholds):
        for k in (1, 2, 4):
            mean, frequency = experts.resampled(load, k)  # (3, 5) each
            sums = mean.sum(1)
            measured += [float(x) for x in ((mean - frequency).abs().max(), sums.min(), sums.max())]
    rows = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in text.splitlines()
            if line.startswith("| against ")]
    assert len(rows) == 3 and all(len(row) == 9 for row in rows)
    assert measured == pytest.approx(sum(rows, []), abs=0.011)


# ---- what is named exists ----

def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "\n\n", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def help_of(command, monkeypatch, *words) -> set[str]:
    """The flags that a command's --help names."""
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        command(*words)
    return flags_in(printed.getvalue())


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_flag_exists(path, monkeypatch, request):
    monkeypatch.setenv("COLUMNS", "200")
    known = flags_in(get_args_parser().format_help()) | {"--slow"}  # of torchrun, and conftest.py's
    known |= {flag.replace("-", "_").replace("__", "--", 1) for flag in known}  # torchrun knows both spellings
    request.config.getoption("--slow")
    for command in (train.main, data.main, visualize.main, baselines.main):
        known |= help_of(command, monkeypatch, ["--help"])
    for command in (evaluate.main, benchmark.main, known_truths.main):
        known |= help_of(command, monkeypatch)
    assert flags_in(path.read_text(encoding="utf-8")) <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_link_and_file_exists(path):
    links = re.findall(r"\]\(([^)#\s]+)", prose(path))
    files = re.findall(r"`((?:retina|tests|docs|findings)/[\w./-]+)`", prose(path))
    assert [x for x in links if "://" not in x and not (path.parent / x).exists()] == []
    assert [x for x in files if not (ROOT / x).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_no_commit_is_cited(path):
    assert re.findall(r"\b(?=[a-f]*\d)[0-9a-f]{7,40}\b", path.read_text(encoding="utf-8")) == []


# ---- length ----

def sentences(text: str) -> list[str]:
    """The sentences of a page without code: headings, tables and pictures left out, an item of a list begins anew.

    A word in backticks, and the target of a link, count as one word and as none.
    """
    text = re.sub(r"`[^`]*`", "CODE", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))
    text = re.sub(r"^(#.*|\|.*|> ?)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *(\*|-|\d+\.) ", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\b(al|eqs?|e\.g|i\.e|[A-Z])\.", r"\1", text)  # et al., initials: no end of a sentence
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [s for words in paragraphs for s in re.split(r"(?<=[.!?])[*\")]*\s+", words) if s]


def test_sentences_are_told_apart():
    text = "# A heading of many words\nOne (see [a link](x.md)). Two by P. Porwal et al. 2020, `a b c`: *more.*\n" \
           "Three goes on. \n\n| a | table |\n* an item\n* another. With two\n"
    assert sentences(text) == ["One (see a link).", "Two by P Porwal et al 2020, CODE: *more.", "Three goes on.",
                               "an item", "another.", "With two"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_no_sentence_is_longer_than_35_words(path):
    assert [s for s in sentences(prose(path)) if len(s.split()) > 35] == []


def test_pages_are_short():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PAGES}
    assert lines.pop("README.md") <= 150
    assert max(lines.values()) <= 120 and sum(lines.values()) <= 900
