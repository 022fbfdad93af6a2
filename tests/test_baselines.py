"""The comparison: rows that differ in one thing, the same photographs for all, claims that can and cannot be made."""

import csv
import io
import json
import math
import os
import re
import shutil
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import baselines
import data
import evaluate
import tasks
import train
from retina import files
from retina.comparison import analysis, jobs, measurements, report
from retina.comparison.jobs import Job
from retina.datasets import readers, records, synthetic
from retina.evaluation import scoring, statistics, tables
from retina.evaluation.scoring import Scores
from retina.files import InputError, RunError
from retina.training.diagnostics import gradient_cosines
from tasks import TASKS, build_net
from train import Config
from conftest import ROOT, official_tree
from test_train import TINY, few_drawings  # noqa: F401 (a fixture)

CPU, CLS, SEG = torch.device("cpu"), TASKS["cls"], TASKS["seg"]
pytestmark = pytest.mark.usefixtures("shallow")
SMALL = replace(TINY, size=64, epochs=1, log_gradients=True)


# ---- rows ----

def test_every_row_is_a_network_and_differs_from_the_others():
    rows = baselines.rows_for(("cls", "seg"))
    options = {row.name: replace(Config(), **row.changes) for row in rows if row.name != "constant"}
    assert len(set(map(repr, options.values()))) == len(options) and len({row.name for row in rows}) == len(rows)
    nets = {name: tasks.build_net(asdict(o))[0] for name, o in options.items()}

    def layer(name):  # parameters and multiply-adds per token of the experts that a token meets
        w1 = nets[name].experts.experts.w1
        return 2 * w1.numel(), 2 * options[name].chosen * w1[0].numel()
    assert layer("dense")[1] == layer("learned")[1] and layer("dense_large")[0] == layer("learned")[0]
    assert layer("uniform")[0] == layer("learned")[0] == layer("random")[0]
    assert nets["hard"].experts is None and nets["cls_alone"].experts is None
    assert [row.name for row in rows if row.usual] == ["constant", "cls_alone", "seg_alone", "hard", "dense", "learned"]
    assert {row.name for row in baselines.rows_for(("cls", "dme", "loc"))} >= {"dme_alone", "loc_alone", "private"}
    assert baselines.rows_for(("cls",), weights="imagenet")[-1].changes == {"weights": "none"}
    assert "hard" not in {row.name for row in baselines.rows_for(("cls",))}  # it would be cls_alone again
    assert "leaky" not in {row.name for row in baselines.rows_for(("cls", "seg"), drawn=True)}


def test_without_leak_protection_copies_lie_on_both_sides(tmp_path):
    """Copies of one drawing under two names: joined by default; taken for different eyes by the control."""
    root = official_tree(tmp_path / "IDRiD", test=False)
    images = root / "B. Disease Grading" / "1. Original Images" / "a. Training Set"
    for i in range(1, 8):
        shutil.copy(images / f"IDRiD_{i:03d}.jpg", images / f"IDRiD_{i + 7:03d}.jpg")
    for ignore in (False, True):
        options = replace(SMALL, tasks=("cls",), data=str(root), ignore_eyes=ignore)
        training, validation, _ = data.load_photographs(options, [CLS])
        both = [{int(r.name[-3:]) % 7 for r in x.records if int(r.name[-3:]) < 15} for x in (training, validation)]
        assert bool(both[0] & both[1]) == ignore
    train.fit(options, tmp_path / "run", quiet=True)
    run = evaluate.load_run(tmp_path / "run", CPU)
    assert [r.name for r in evaluate.split_records(run, root, "val")] == run.validation == [
        r.name for r in validation.records]


def test_a_network_for_one_task_sees_the_same_photographs_changed_in_the_same_ways(tmp_path):
    root = official_tree(tmp_path / "IDRiD", test=False)
    seen = {}
    for name in ("hard", "cls_alone", "seg_alone"):
        row = next(r for r in baselines.rows_for(("cls", "seg")) if r.name == name)
        options = replace(SMALL, data=str(root), batch=7, **row.changes)
        tasks = [TASKS[t] for t in options.tasks]
        training, _, _ = data.load_photographs(options, tasks)
        steps = data.Steps(training.records, [TASKS[t] for t in options.streams or options.tasks], 7, 3, True, tasks)
        seen[name] = [[(training.records[i], draw) for i, draw in step] for step in steps.range(0, 3 * steps.per_epoch)]
        assert {len(step) for step in seen[name]} == {steps.photographs}
    for name, task in (("cls_alone", CLS), ("seg_alone", SEG)):
        assert seen[name] == [[(r, draw) for r, draw in step if task.labelled(r)] for step in seen["hard"]]
        assert len(seen[name][0]) < 7


def test_gradients_are_compared_as_two_backward_passes_would(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, tasks = build_net(asdict(SMALL))
    state = train.make_state(net, tasks, SMALL, 10, CPU)
    photographs, _, _ = data.load_photographs(SMALL, tasks)
    batch = data.collate([photographs[i] for i in range(6)], tasks)
    losses = train.task_losses(state, batch, tasks, SMALL)
    found = gradient_cosines(losses, net.encoder)
    flat = {}
    for t in ("cls", "seg"):
        net.zero_grad()
        losses[t].backward(retain_graph=True)
        flat[t] = torch.cat([p.grad.flatten() for p in net.encoder.parameters()]).double()
    expected = float(flat["cls"] @ flat["seg"] / flat["cls"].norm() / flat["seg"].norm())
    assert found == {"cls seg": pytest.approx(expected, abs=1e-4)} and 1e-3 < abs(expected) < 1


def test_looking_at_gradients_changes_nothing(tmp_path):
    for name, look in (("a", True), ("b", False)):
        train.fit(replace(SMALL, log_gradients=look), tmp_path / name, quiet=True)
    a, b = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in "ab")
    assert a["val"] == b["val"] and "gradient_cosines" not in b and -1 <= a["gradient_cosines"]["cls seg"] <= 1


# ---- scores of a row ----

def tallies(right: torch.Tensor) -> torch.Tensor:
    """Tallies of `cls` whose accuracy is that of `right`; truth 0."""
    return torch.cat([torch.where(right[:, None], torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]),
                                  torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1])), torch.zeros(len(right), 1)], 1).double()


def row_of(name: str, *seeds: torch.Tensor) -> analysis.Measured:
    """A row with these answers right, one tensor for each seed."""
    names = [f"p{i}" for i in range(len(seeds[0]))]
    found = [Scores([Accurate()], {"cls": names}, {"cls": tallies(right)}, eyes={n: n for n in names})
             for right in seeds]
    return analysis.Measured(name, list(range(len(seeds))), found, [], [], [], [1] * len(seeds))


class Accurate(type(CLS)):
    """Grading by accuracy, which is a mean, so that what is planted is known."""
    primary = "accuracy"


def right(share: float, n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def test_folds_are_put_together_and_each_photograph_counts_once(tmp_path, monkeypatch):
    parts, net = [], tasks.build_net(asdict(SMALL))
    for k in (1, 2, 3):
        _, validation, _ = data.load_photographs(replace(SMALL, fold=f"{k}/3"), net[1])
        parts.append(baselines.kept(scoring.score(net[0], data.in_order(validation, net[1], 6), net[1])))
    found = analysis.put_together(parts, net[1])
    everything = data.Photographs([r for r in readers.read_drawn().records if r.part == "train"], 64)
    whole = scoring.score(net[0], data.in_order(everything, net[1], 6), net[1])
    scoring.align([whole, found])
    for t in ("cls", "seg"):
        torch.testing.assert_close(found.tallies[t], whole.tallies[t], rtol=1e-4, atol=1e-4,
                                   equal_nan=True, check_dtype=False)
    assert found.metrics()["cls"]["accuracy"] == whole.metrics()["cls"]["accuracy"]
    assert found.losses["cls"] == pytest.approx(whole.losses["cls"], rel=1e-5)


def test_a_constant_guess_scores_what_it_must(tmp_path):
    options = replace(SMALL, tasks=("cls", "seg", "loc"))
    tasks = [TASKS[t] for t in options.tasks]
    training, validation, _ = data.load_photographs(options, tasks)
    found = analysis.constant([(training, validation)], tasks).scores[0].metrics()
    grades = [r.grade for r in training.records]
    most = max(range(5), key=grades.count)
    assert found["cls"]["accuracy"] == pytest.approx(sum(r.grade == most for r in validation.records) / len(validation))
    assert found["cls"]["kappa"] == 0 and found["seg"]["dice"] == 0
    place = torch.stack([training[i].points for i in range(len(training))]).mean(0)
    gaps = [(validation[i].points - place).norm(dim=1) / 64 / 0.154 for i in range(len(validation))]
    assert found["loc"]["diameters_disc"] == pytest.approx(float(torch.stack(gaps)[:, 0].mean()), rel=1e-4)


def test_shifts_change_pictures_and_nothing_else():
    photographs = data.Photographs(readers.read_drawn().records[:3], 64)
    for shift in measurements.SHIFTS:
        changed = measurements.Shifted(photographs, shift)
        assert len(changed) == 3 and changed[2].name == photographs[2].name
        one, again, before = changed[1], changed[1], photographs[1]
        assert torch.equal(one.image, again.image) and one.image.dtype == torch.uint8
        assert one.image.shape == before.image.shape and not torch.equal(one.image, before.image)
        assert (one.image.float() - before.image.float()).abs().mean() < 60
        assert torch.equal(one.masks, before.masks) and torch.equal(one.points, before.points)
    dark, cold = (measurements.Shifted(photographs, s)[1].image.float().mean((1, 2)) / before.image.float().mean(
        (1, 2)) for s in ("darker", "colder light"))
    assert dark.max() < 0.65 and cold[0] < 0.9 < 1.1 < cold[2]


# ---- differences ----

def table_of(found: dict) -> str:
    return tables.as_markdown(report.differences(found))


KNOWN = {"standard_error_of_seeds": 0.0, "degrees_of_freedom": 1e5, "seeds": 2}  # seeds do not differ


def test_equal_rows_with_different_names_differ_by_nothing():
    """The same answers; and answers of one quality, of which an uncorrected interval leaves out zero now and then."""
    same = right(0.6, 100, 0)
    rows = {"cls_alone": row_of("cls_alone", same), "hard": row_of("hard", same)}
    (d,) = analysis.differences(rows, [Accurate()])
    assert d["difference"] == 0 and not d["claimed"] and d["needed"] is None and d["p_adjusted"] == 1
    assert d["corrected_interval"] == [0, 0]  # defined, and nothing
    wrong = 0
    for k in range(10):
        rows = {name: row_of(name, right(0.6, 100, 100 * k + i)) for i, name in enumerate(
            ("cls_alone", "hard", "dense", "learned"))}
        wrong += any(d["claimed"] for d in analysis.differences(rows, [Accurate()]))
    assert wrong <= 2


def test_a_planted_difference_is_claimed_with_its_size():
    first = right(0.5, 300, 1)
    second = first | right(0.4, 300, 2)
    rows = {"cls_alone": row_of("cls_alone", first, first), "hard": row_of("hard", second, second)}
    (d,) = analysis.differences(rows, [Accurate()])
    gap = float((second.double() - first.double()).mean())
    error = float((second.double() - first.double()).std()) / math.sqrt(300)
    assert d["difference"] == pytest.approx(gap) and d["standard_error"] == pytest.approx(error, rel=0.1)
    assert d["claimed"] and d["corrected_interval"] == pytest.approx([gap - 1.96 * error, gap + 1.96 * error], rel=0.1)
    assert (d["seeds"], d["photographs"], d["against"]) == (2, 300, "cls_alone")


def test_correction_for_the_number_of_differences():
    one = {"difference": 0.1, "standard_error": 0.04, **KNOWN, "p": 0.02, "photographs": 50,
           "eyes": 50}
    found = analysis.corrected([dict(one) for _ in range(10)])
    assert [d["p_adjusted"] for d in found] == pytest.approx([0.2] * 10) and not any(d["claimed"] for d in found)
    assert found[0]["corrected_interval"] == pytest.approx([0.1 - 2.807 * 0.04, 0.1 + 2.807 * 0.04], abs=1e-4)
    assert found[0]["needed"] == math.ceil(50 * ((2.80703 + 0.84162) * 0.4) ** 2)
    (alone,) = analysis.corrected([dict(one)])
    assert alone["claimed"] and alone["wants"] is None
    (few,) = analysis.corrected([{**one, "eyes": 5}])
    assert few["wants"] == "eyes" and report.wanted(few) == "more eyes than 5"
    # seeds alone make an error that no number of photographs takes away
    (noisy,) = analysis.corrected([{**one, "standard_error": 0.06, "standard_error_of_seeds": 0.05, "p": 0.2}])
    assert (noisy["wants"], noisy["needed"]) == ("seeds", None) and "more seeds" in report.wanted(noisy)
    # p forbids what the interval would allow: nothing is said of photographs
    (odd,) = analysis.corrected([{**one, "standard_error": 0.02, "p": 0.2}])
    assert not odd["claimed"] and odd["needed"] is None and report.wanted(odd) == ""
    # table and sentence give the same reason: one seed, though photographs would do for the interval
    (single,) = analysis.corrected([{**one, "standard_error": 0.06, "seeds": 1, "p": 0.2}])
    assert single["needed"] and "more seeds" in report.wanted(single)
    said = {"rows": {n: {"words": n} for n in "ab"},
            "differences": [{**single, "row": "a", "against": "b", "task": "cls", "metric": "kappa"}]}
    assert table_of(said).endswith("| none | more seeds |")
    # an error that draws of eyes leave undefined is not replaced by that of seeds
    assert all(math.isnan(v) for v in analysis.sources(math.nan, [[], []], 5))


def test_of_many_differences_that_are_not_there_hardly_one_is_claimed():
    """500 comparisons of ten normal variables of mean 0: at most one in twenty claims any; uncorrected, every third."""
    rng = torch.Generator().manual_seed(0)
    claimed = uncorrected = 0
    for drawn in torch.randn(500, 10, generator=rng).tolist():
        found = [{"difference": x, "standard_error": 1.0, **KNOWN, "photographs": 90, "eyes": 90,
                  "p": math.erfc(abs(x) / math.sqrt(2))} for x in drawn]
        uncorrected += any(d["p"] < 0.05 for d in found)
        claimed += any(d["claimed"] for d in analysis.corrected(found))
    assert claimed / 500 <= 0.07 and uncorrected / 500 > 0.3


def test_seeds_count_as_new_seeds_would():
    """Two seeds a side with known values: the variance of a mean is s^2 / k for each side, whatever the draws say."""
    values = [[float(right(share, 400, k).double().mean()) for k, share in enumerate(shares)]
              for shares in ((0.4, 0.6), (0.5, 0.5))]
    variances = [(a - b) ** 2 / 2 for a, b in values]  # sd^2 of two
    error, of_seeds, degrees = analysis.sources(0.2, values, 400)
    assert of_seeds == pytest.approx(math.sqrt(sum(variances) / 2))
    assert error == pytest.approx(math.sqrt(0.2 ** 2 + sum(variances) / 4))
    of_eyes = 0.2 ** 2 - sum(variances) / 4
    assert degrees == pytest.approx(error ** 4 / (sum((v / 2) ** 2 for v in variances) + of_eyes ** 2 / 399))
    assert analysis.sources(0.2, [side[:1] for side in values], 400) == pytest.approx((0.2, 0.0, 399))


def test_one_seed_a_side_claims_nothing():
    """How much seeds differ is not known; the same two, twice, do not differ."""
    first, second = right(0.3, 300, 1), right(0.8, 300, 2)
    for seeds, claimed in ((1, False), (2, True)):
        rows = {"cls_alone": row_of("", *[first] * seeds), "hard": row_of("", *[second] * seeds)}
        (d,) = analysis.differences(rows, [Accurate()])
        assert d["claimed"] == claimed and d["wants"] == (None if claimed else "seeds") and d["p_adjusted"] < 0.01


def test_so_many_photographs_as_are_said_to_be_needed_find_it():
    """80 % of samples of that size, of one of five differences, would be claimed."""
    rng = torch.Generator().manual_seed(0)
    shift, n = 0.2, 60
    one = {"difference": shift, "standard_error": 1 / math.sqrt(n), **KNOWN, "p": 0.5,
           "photographs": n, "eyes": n}
    needed = analysis.corrected([dict(one) for _ in range(5)])[0]["needed"]
    claimed = 0
    for sample in torch.randn(600, needed, generator=rng) + shift:
        found = {"difference": float(sample.mean()), "standard_error": float(sample.std()) / math.sqrt(needed)}
        p = math.erfc(abs(found["difference"] / found["standard_error"]) / math.sqrt(2))
        family = [{**one, **found, "p": p, "photographs": needed}, *(dict(one) for _ in range(4))]
        claimed += analysis.corrected(family)[0]["claimed"]
    assert claimed / 600 == pytest.approx(0.8, abs=0.06)


def test_many_differences_can_still_be_claimed_and_undefined_ones_are_said():
    """p of a thousand draws, times as many differences, would never be small enough."""
    first = right(0.2, 60, 1)
    rows = {"cls_alone": row_of("cls_alone", first, first)} | {
        f"row{k}": row_of(f"row{k}", *[first | right(0.7, 60, k + 2)] * 2) for k in range(60)}
    assert all(d["claimed"] for d in analysis.differences(rows, [Accurate()]))
    nothing = {"difference": math.nan, "standard_error": math.nan, **KNOWN, "p": math.nan,
               "photographs": 6, "eyes": 6}
    (bad,) = analysis.corrected([nothing])
    assert bad["needed"] is None and not bad["claimed"] and json.dumps(files.plain(bad), allow_nan=False)
    said = {"rows": {n: {"words": n} for n in "ab"}}
    d = files.plain({**bad, "row": "a", "against": "b", "task": "seg", "metric": "dice"})
    assert "not defined on these photographs" in report.claim(said, d)
    assert table_of({**said, "differences": [d]}).splitlines()[-1] == "| seg | a | b | - | 1.000 | none |  |"


def test_rows_without_a_seed_or_a_photograph_in_common_are_not_compared():
    x, y = right(0.5, 40, 1), right(0.5, 40, 2)
    rows = {"cls_alone": row_of("cls_alone", x), "hard": row_of("hard", y), "leaky": row_of("leaky", x[:30])}
    assert [d["row"] for d in analysis.differences(rows, [Accurate()])] == ["hard"]
    rows["hard"].seeds = [1]
    assert analysis.differences(rows, [Accurate()]) == []
    rows["leaky"] = row_of("leaky", y)  # the same names: still, what it has learned from is another split
    assert analysis.differences(rows, [Accurate()]) == []


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
    flags = "--name whole --only constant cls_alone learned --seeds 2 --epochs 1".split()
    baselines.main(flags)
    folder, (found, text) = records.HERE / "runs" / "whole", written("whole")
    assert here == [f"{name}, seed {s}, fold 1/5" for s in (0, 1) for name in ("cls_alone", "learned")]
    assert list(found["rows"]) == ["constant", "cls_alone", "learned"] and not found["failed"]
    learned = found["rows"]["learned"]
    stored = [json.loads((folder / "learned" / f"seed{s}_fold1of5" / "result.json").read_text()) for s in (0, 1)]
    assert learned["tasks"]["cls"]["metrics"]["kappa"]["values"] == pytest.approx(
        [s["metrics"]["cls"]["kappa"] for s in stored])
    assert learned["costs"]["parameters"] > found["rows"]["cls_alone"]["costs"]["parameters"]
    assert learned["costs"]["seconds"] == pytest.approx(6 * learned["costs"]["training_seconds"] * 4)  # 4 steps of 6
    assert learned["costs"]["latency"] > 0 and learned["costs"]["peak_bytes"] > 1e8
    assert list(learned["tasks"]["seg"]["shifts"]) == ["darker", "blurred"] and learned["cosines"][0]["cls seg"] <= 1
    assert [(d["row"], d["against"], d["task"]) for d in found["differences"]] == [("learned", "cls_alone", "cls")]
    table = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    line = next(r for r in table if (r["row"], r["task"], r["metric"]) == ("learned", "cls", "kappa"))
    assert float(line["mean"]) == pytest.approx(learned["tasks"]["cls"]["metrics"]["kappa"]["mean"])
    assert str(records.HERE) not in text + json.dumps(found) and found["threads"] == [torch.get_num_threads()]
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / link).exists()
    assert "**These are drawings: nothing here is a result on IDRiD.**" in " ".join(text.split())
    assert "What multi-task learning is" in text and "{" not in text
    assert all(len(line) <= 120 or line[0] == "|" for line in text.splitlines())
    table_ = text[text.index("## Scores"):text.index("## Differences")]
    for row in found["rows"].values():  # each score stands in the row's line
        line = next(x for x in table_.split("\n") if x.startswith(f"| {row['words']} |"))
        for of in row["tasks"].values():
            assert f"{of['metrics'][of['primary']]['mean']:.3f}" in line
    before = list(here)
    baselines.main(flags)
    assert here == before and "4 of 4 runs are finished already" in capsys.readouterr().out
    baselines.main([*flags[:-4], "--seeds", "3", "--epochs", "1"])
    assert here[len(before):] == [f"{name}, seed 2, fold 1/5" for name in ("cls_alone", "learned")]
    with pytest.raises(InputError, match="a run with epochs 1, not 2; expected the comparison that is asked for"):
        baselines.main([*flags[:-1], "2"])


def test_a_failed_run_is_named_and_does_not_stop_the_rest(here, monkeypatch, capsys):
    failing(monkeypatch, lambda o: o.experts == 1)
    with pytest.raises(SystemExit) as ended:
        baselines.main(["--name", "failed", "--only", "hard", "dense", "--seeds", "1", "--epochs", "1"])
    found, text = written("failed")
    said = "dense, seed 0, fold 1/5: out of memory after step 3"
    assert ended.value.code == 1 and list(found["rows"]) == ["hard"] and said in capsys.readouterr().out
    assert said in text and "| dense adapter of equal cost | no seed came to its end | no seed came" in text
    with pytest.raises(RunError, match="none of the 1 runs came to its end; first: dense, seed 0, fold 1/5: out of"):
        baselines.main(["--name", "all_failed", "--only", "constant", "dense", "--seeds", "1", "--epochs", "1"])


def test_of_several_folds_a_seed_that_lacks_one_is_left_out(here, monkeypatch):
    """Three tasks, two folds; one fold of one seed fails: the other seed stands for the row, on both folds."""
    failing(monkeypatch, lambda o: (o.tasks, o.seed, o.fold) == (("loc",), 1, "2/5"))
    with pytest.raises(SystemExit):
        baselines.main("--name folds --tasks cls dme loc --only loc_alone hard --folds 2/5 --epochs 1".split())
    found, text = written("folds")
    assert [found["rows"][name]["seeds"] for name in ("loc_alone", "hard")] == [[0], [0, 1]]
    # 30 drawings, 24 of them in the other folds
    assert [found["rows"]["hard"]["tasks"][t]["photographs"] for t in ("cls", "dme", "loc")] == [12, 12, 12]
    assert [(d["row"], d["task"], d["seeds"]) for d in found["differences"]] == [("hard", "loc", 1)]
    assert "failed: loc_alone, seed 1, fold 2/5: out of memory" in text and "| loc alone, 1 of 2 seeds | " in text
    assert set(found["rows"]["hard"]["cosines"][0]) == {"cls dme", "cls loc", "dme loc"}


def test_one_task_of_a_table_with_its_own_validation_part(here, tmp_path):
    for i in range(24):
        Image.fromarray(synthetic.draw(synthetic.plan(3, i), 64)[0]).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("image,cls,split\n" + "".join(
        f"{i}.png,{synthetic.plan(3, i).grade},{'val' if i > 16 else ''}\n" for i in range(24)))
    baselines.main(["--name", "table", "--data", str(tmp_path / "t.csv"), *"--tasks cls --only constant cls_alone "
                    "dense leaky --seeds 1 --epochs 1 --size 64 --weights none".split()])
    found, text = written("table")
    assert [(d["row"], d["against"]) for d in found["differences"]] == [("dense", "cls_alone")]
    for said in ("t.csv (the first photograph has 64x64 pixels)", "Validation: the part that the data set names itself",
                 "The row without leak protection is split", "There is but one task here."):
        assert said in " ".join(text.split())
    assert "another split" not in text and "CC BY" not in text
    with pytest.raises(InputError, match="--folds 2/5: .*t.csv names its own validation part; leave --folds out"):
        baselines.main(["--data", str(tmp_path / "t.csv"), "--tasks", "cls", "--folds", "2/5", "--weights", "none"])


def test_a_process_of_its_own_tells_why_it_failed(tmp_path):
    job = Job("hard", replace(SMALL, data=str(tmp_path / "nowhere")), tmp_path / "run", [])
    assert jobs.start(job, baselines.__file__, 1).wait() == 2 and "nowhere: no such file or folder" in job.failure(2)
    process = jobs.start(job, baselines.__file__, 1)
    process.kill()
    assert "killed by SIGKILL" in job.failure(process.wait())


def test_a_process_of_its_own_ends_when_told_to_and_with_the_main_process(tmp_path):
    job = Job("hard", replace(SMALL, save_every=1), tmp_path / "run", [])
    process = jobs.start(job, baselines.__file__, 1)
    assert os.getpgid(process.pid) == process.pid
    while not (job.folder / "last.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 130 and job.failure(130) == "interrupted"
    process = jobs.start(job, baselines.__file__, 1)
    process.stdin.close()  # as it is where the main process is killed
    assert process.wait() == 1 and job.failure(1) == "ended with status 1" and job.measured() is None


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


def test_other_photographs_are_not_taken_for_the_same(here, monkeypatch):
    flags = ["--name", "other", "--only", "hard", "--seeds", "1", "--epochs", "1"]
    baselines.main(flags)
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 25), "test": (1, 10)})
    with pytest.raises(InputError, match="a run on other photographs or labels; expected the comparison"):
        baselines.main(flags)


@pytest.mark.parametrize("flags,message", [
    (["--only", "best"], "--only best: no such row; there are constant, cls_alone"),
    (["--only", "constant"], "--only constant: nothing to train"),
    (["--folds", "6/5"], "--fold 6/5: expected I/N"), (["--folds", "5"], "--fold 5: expected I/N"),
    (["--seeds", "0"], "--seeds 0: expected at least 1"), (["--name", "a/b"], "--name a/b: expected a name"),
    (["--tasks", "cls", "reading"], "--tasks reading: no such task"),
    (["--data", "/nowhere"], "/nowhere: no such file")])
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(InputError, match=message):
        baselines.main(flags)


def test_two_runs_at_once_come_to_what_they_come_to_alone(tmp_path, monkeypatch):
    """In processes of their own, with half of the threads each; what one leaves does not hang on the other."""
    base = replace(SMALL, data=str(official_tree(tmp_path / "IDRiD", test=False)))
    rows = [row for row in baselines.rows_for(base.tasks) if row.name in ("hard", "cls_alone")]
    left = {}
    for name, number in (("both", 2), ("one", 1)):
        asked = baselines.jobs_for(rows, base, 1, ["1/5"], tmp_path / name)
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert jobs.run_all(asked, baselines.__file__, number) == {}
        left[name] = [job.measured() for job in asked]
    for one, other in zip(*left.values()):
        assert one["threads"] == other["threads"] == 1
        assert torch.equal(one["scores"]["tallies"]["cls"], other["scores"]["tallies"]["cls"])


# ---- the report ----

def test_the_report_claims_only_what_can_be_claimed():
    first = right(0.5, 300, 1)
    rows = {"cls_alone": row_of("cls_alone", first, first),
            "hard": row_of("hard", *[first | right(0.4, 300, 2)] * 2)}
    found = {"rows": {name: analysis.row_numbers(row) for name, row in rows.items()},
             "differences": analysis.differences(rows, [Accurate()])}
    (d,) = found["differences"]
    said = report.claim(found, d)
    assert f"{d['difference']:+.3f}" in said and "higher (these networks: a claim about" in said
    assert table_of(found).endswith("| higher |  |")
    d["claimed"], d["needed"], d["wants"] = False, 1234, None
    said = report.claim(found, d)
    assert "no difference can be shown; one as large as this would take 1234 photographs" in said
    assert "higher" not in said
    assert table_of(found).endswith("| none | 1234 photographs (here 300) |")
    assert report.measured_here(found, "hard", "_alone").startswith("Measured here: cls accuracy, hard minus cls_alone")


def test_the_report_of_this_repository_says_what_was_measured():
    """If report.py has changed, write REPORT.md anew: text(comparison.json, pictures), as here."""
    found = json.loads((ROOT / "tests" / "comparison.json").read_text())
    pictures = {p.stem: f"docs/{report.PICTURES}/{p.name}" for p in (ROOT / "docs" / report.PICTURES).iterdir()}
    assert set(pictures) == {"comparison", *baselines.REPORTED}
    assert (ROOT / "REPORT.md").read_text() == report.text(found, pictures)


def test_intervals_of_a_row_are_those_of_evaluate():
    rows = [right(0.6, 80, k) for k in (1, 2)]
    numbers = analysis.row_numbers(row_of("hard", *rows))["tasks"]["cls"]["metrics"]["accuracy"]
    means = [float(r.double().mean()) for r in rows]
    assert numbers["mean"] == pytest.approx(sum(means) / 2) and numbers["values"] == pytest.approx(means)
    assert numbers["sd"] == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
    low, high = numbers["interval"]
    assert low < numbers["mean"] < high and high - low == pytest.approx(
        2 * 1.96 * math.sqrt(0.24 / 80), rel=0.5) and statistics.DRAWS == 1000
