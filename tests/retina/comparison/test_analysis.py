"""What the numbers of a comparison are worth: folds, seeds, planted differences, corrections."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

import baselines
import data
import tasks
from conftest import TINY
from retina import files
from retina.comparison import analysis, report
from retina.datasets import readers
from retina.evaluation import compare, scoring, statistics, tables
from retina.evaluation.scoring import SplitScores
from tasks import TASKS


CPU, CLS, SEG = torch.device("cpu"), TASKS["cls"], TASKS["seg"]
pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")
SMALL = replace(TINY, image_size=64, epochs=1, log_gradients=True)


# ---- scores of a row ----

def stats(right: torch.Tensor) -> torch.Tensor:
    """Tallies of `cls` whose accuracy is that of `right`; truth 0."""
    return torch.cat([torch.where(right[:, None], torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]),
                                  torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1])), torch.zeros(len(right), 1)], 1).double()


def row_of(name: str, *seeds: torch.Tensor) -> analysis.Measurements:
    """A row with these answers right, one tensor for each seed."""
    names = [f"p{i}" for i in range(len(seeds[0]))]
    found = [SplitScores([Accurate()], {"cls": names}, {"cls": stats(right)}, eyes={n: n for n in names})
             for right in seeds]
    return analysis.Measurements(name, list(range(len(seeds))), found, [], [], [], [1] * len(seeds))


class Accurate(type(CLS)):
    """Grading by accuracy, which is a mean, so that what is planted is known."""
    primary = "accuracy"


def right(share: float, n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def test_folds_are_put_together_and_each_photograph_counts_once(tmp_path, monkeypatch):
    parts, net = [], tasks.build_net(asdict(SMALL))
    for k in (1, 2, 3):
        _, validation, _ = data.load_datasets(replace(SMALL, fold=f"{k}/3"), net[1])
        parts.append(baselines.storable(scoring.evaluate_split(net[0], data.eval_loader(validation, net[1], 6), net[1])))
    found = analysis.concat_folds(parts, net[1])
    everything = data.FundusDataset([r for r in readers.read_drawn().records if r.split == "train"], 64)
    whole = scoring.evaluate_split(net[0], data.eval_loader(everything, net[1], 6), net[1])
    scoring.align([whole, found])
    for t in ("cls", "seg"):
        torch.testing.assert_close(found.stats[t], whole.stats[t], rtol=1e-4, atol=1e-4,
                                   equal_nan=True, check_dtype=False)
    assert found.metrics()["cls"]["accuracy"] == whole.metrics()["cls"]["accuracy"]
    assert found.losses["cls"] == pytest.approx(whole.losses["cls"], rel=1e-5)


def test_a_constant_guess_scores_what_it_must(tmp_path):
    options = replace(SMALL, tasks=("cls", "seg", "loc"))
    tasks = [TASKS[t] for t in options.tasks]
    training, validation, _ = data.load_datasets(options, tasks)
    found = analysis.constant([(training, validation)], tasks).scores[0].metrics()
    grades = [r.grade for r in training.records]
    most = max(range(5), key=grades.count)
    assert found["cls"]["accuracy"] == pytest.approx(sum(r.grade == most for r in validation.records) / len(validation))
    assert found["cls"]["kappa"] == 0 and found["seg"]["dice"] == 0
    place = torch.stack([training[i].landmarks for i in range(len(training))]).mean(0)
    gaps = [(validation[i].landmarks - place).norm(dim=1) / 64 / 0.154 for i in range(len(validation))]
    assert found["loc"]["diameters_disc"] == pytest.approx(float(torch.stack(gaps)[:, 0].mean()), rel=1e-4)


# ---- differences ----

def table_of(found: dict) -> str:
    return tables.as_markdown(report.difference_table(found))


# seeds do not differ, and the measure has no range
KNOWN = {"standard_error_of_seeds": 0.0, "degrees_of_freedom": 1e5, "seeds": 5, "metric": "effect"}


def test_equal_rows_with_different_names_differ_by_nothing():
    """The same answers; and answers of one quality, of which an uncorrected interval leaves out zero now and then."""
    same = right(0.6, 100, 0)
    rows = {"cls_single": row_of("cls_single", same), "hard": row_of("hard", same)}
    (d,) = analysis.differences(rows, [Accurate()])
    assert d["difference"] == 0 and not d["claimed"] and d["needed"] is None and d["p_adjusted"] == 1
    assert d["corrected_interval"] is None  # no width is no certainty
    wrong = 0
    for k in range(10):
        rows = {name: row_of(name, *[right(0.6, 100, 100 * k + i)] * 5) for i, name in enumerate(
            ("cls_single", "hard", "dense", "learned"))}
        wrong += any(d["claimed"] for d in analysis.differences(rows, [Accurate()]))
    assert wrong <= 2


def test_a_planted_difference_is_claimed_with_its_size():
    first = right(0.5, 300, 1)
    second = first | right(0.4, 300, 2)
    rows = {"cls_single": row_of("cls_single", *[first] * 5), "hard": row_of("hard", *[second] * 5)}
    (d,) = analysis.differences(rows, [Accurate()])
    gap = float((second.double() - first.double()).mean())
    error = float((second.double() - first.double()).std()) / math.sqrt(300)
    assert d["difference"] == pytest.approx(gap) and d["standard_error"] == pytest.approx(error, rel=0.1)
    assert d["claimed"] and d["corrected_interval"] == pytest.approx([gap - 1.96 * error, gap + 1.96 * error], rel=0.1)
    assert (d["seeds"], d["photographs"], d["against"]) == (5, 300, "cls_single")


def test_correction_for_the_number_of_differences():
    one = {"difference": 0.1, "standard_error": 0.04, **KNOWN, "p": 0.02, "photographs": 50,
           "eyes": 50}
    found = statistics.adjust([dict(one) for _ in range(10)])
    assert [d["p_adjusted"] for d in found] == pytest.approx([0.2] * 10) and not any(d["claimed"] for d in found)
    assert found[0]["corrected_interval"] == pytest.approx([0.1 - 2.807 * 0.04, 0.1 + 2.807 * 0.04], abs=1e-4)
    assert found[0]["needed"] == math.ceil(50 * ((2.80703 + 0.84162) * 0.4) ** 2)
    (alone,) = statistics.adjust([dict(one)])
    assert alone["claimed"] and alone["wants"] is None
    (few,) = statistics.adjust([{**one, "eyes": 5}])
    assert few["wants"] == "eyes" and tables.needs(few) == "more eyes than 5"
    # seeds alone make an error that no number of photographs takes away
    (noisy,) = statistics.adjust([{**one, "standard_error": 0.06, "standard_error_of_seeds": 0.05, "p": 0.2}])
    assert (noisy["wants"], noisy["needed"]) == ("more seeds", None) and "more seeds" in tables.needs(noisy)
    # p forbids what the interval would allow: nothing is said of photographs
    (odd,) = statistics.adjust([{**one, "standard_error": 0.02, "p": 0.2}])
    assert not odd["claimed"] and odd["needed"] is None and tables.needs(odd) == ""
    # table and sentence give the same reason: one seed, though photographs would do for the interval
    (single,) = statistics.adjust([{**one, "standard_error": 0.06, "seeds": 1, "p": 0.2}])
    assert single["needed"] and "5 seeds a side" in tables.needs(single)
    said = {"configurations": {n: {"words": n} for n in "ab"},
            "differences": [{**single, "configuration": "a", "against": "b", "task": "cls", "metric": "kappa"}]}
    assert table_of(said).endswith("| none | 5 seeds a side |")
    # an error that resamples of eyes leave undefined is not replaced by that of seeds
    assert all(math.isnan(v) for v in statistics.error_for_new_seeds(math.nan, [[], []], 5))


def test_of_many_differences_that_are_not_there_hardly_one_is_claimed():
    """500 comparisons of ten normal variables of mean 0: at most one in twenty claims any; uncorrected, every third."""
    rng = torch.Generator().manual_seed(0)
    claimed = uncorrected = 0
    for drawn in torch.randn(500, 10, generator=rng).tolist():
        found = [{"difference": x, "standard_error": 1.0, **KNOWN, "photographs": 90, "eyes": 90,
                  "p": math.erfc(abs(x) / math.sqrt(2))} for x in drawn]
        uncorrected += any(d["p"] < 0.05 for d in found)
        claimed += any(d["claimed"] for d in statistics.adjust(found))
    assert claimed / 500 <= 0.07 and uncorrected / 500 > 0.3


def test_seeds_count_as_new_seeds_would():
    """Five seeds an arm with known values: the variance of a mean is s^2 / k for each arm, whatever resamples say."""
    values = [[float(right(share, 400, k).double().mean()) for k, share in enumerate(shares)]
              for shares in ((0.4, 0.5, 0.6, 0.5, 0.5), (0.5,) * 5)]
    variances = [sum((v - sum(arm) / 5) ** 2 for v in arm) / 4 for arm in values]
    error, of_seeds, degrees = statistics.error_for_new_seeds(0.2, values, 400)
    assert of_seeds == pytest.approx(math.sqrt(sum(variances) / 5))
    of_eyes = 0.2 ** 2 - sum(variances) * 4 / 5 / 5  # resamples show 4 / 5 of it
    assert error == pytest.approx(math.sqrt(of_eyes + sum(variances) / 5))
    assert degrees == pytest.approx(error ** 4 / (sum((v / 5) ** 2 / 4 for v in variances) + of_eyes ** 2 / 399))


def test_fewer_than_five_seeds_a_side_claim_nothing_and_evaluate_says_the_same():
    """The same seed several times does not differ; the sentence of both commands differs in names and numbers alone."""
    first, second = right(0.3, 300, 1), right(0.8, 300, 2)
    for seeds, claimed in ((1, False), (2, False), (4, False), (5, True)):
        rows = {"cls_single": row_of("A", *[first] * seeds), "hard": row_of("B", *[second] * seeds)}
        (d,) = analysis.differences(rows, [Accurate()])
        assert d["claimed"] == claimed and d["wants"] == (None if claimed else "seeds") and d["p_adjusted"] < 0.01
        (said,) = compare.claims(compare.compare(*(row.scores for row in rows.values())), rows["hard"].scores[0])
        summary = {"configurations": {name: {"words": row.words} for name, row in rows.items()}}
        assert said == report.sentence(summary, d).replace("B minus A", "second minus first")
        assert ("higher" in said) == claimed and (f"{seeds} seed" in said)
        assert ("no claim about ways of training" in said) != claimed


def test_so_many_photographs_as_are_said_to_be_needed_find_it():
    """80 % of samples of that size, of one of five differences, would be claimed."""
    rng = torch.Generator().manual_seed(0)
    shift, n = 0.2, 60
    one = {"difference": shift, "standard_error": 1 / math.sqrt(n), **KNOWN, "p": 0.5,
           "photographs": n, "eyes": n}
    needed = statistics.adjust([dict(one) for _ in range(5)])[0]["needed"]
    claimed = 0
    for sample in torch.randn(600, needed, generator=rng) + shift:
        found = {"difference": float(sample.mean()), "standard_error": float(sample.std()) / math.sqrt(needed)}
        p = math.erfc(abs(found["difference"] / found["standard_error"]) / math.sqrt(2))
        family = [{**one, **found, "p": p, "photographs": needed}, *(dict(one) for _ in range(4))]
        claimed += statistics.adjust(family)[0]["claimed"]
    assert claimed / 600 == pytest.approx(0.8, abs=0.06)


def test_many_differences_can_still_be_claimed_and_undefined_ones_are_said():
    """p of a thousand draws, times as many differences, would never be small enough."""
    first = right(0.2, 60, 1)
    rows = {"cls_single": row_of("cls_single", *[first] * 5)} | {
        f"row{k}": row_of(f"row{k}", *[first | right(0.7, 60, k + 2)] * 5) for k in range(60)}
    assert all(d["claimed"] for d in analysis.differences(rows, [Accurate()]))
    nothing = {"difference": math.nan, "standard_error": math.nan, **KNOWN, "p": math.nan,
               "photographs": 6, "eyes": 6}
    (bad,) = statistics.adjust([nothing])
    assert bad["needed"] is None and not bad["claimed"] and json.dumps(files.jsonable(bad), allow_nan=False)
    said = {"configurations": {n: {"words": n} for n in "ab"}}
    d = files.jsonable({**bad, "configuration": "a", "against": "b", "task": "seg", "metric": "dice"})
    assert "not defined on these photographs" in report.sentence(said, d)
    assert table_of({**said, "differences": [d]}).splitlines()[-1] == "| seg | a | b | - | 1.000 | none |  |"


def test_rows_without_a_seed_or_a_photograph_in_common_are_not_compared():
    x, y = right(0.5, 40, 1), right(0.5, 40, 2)
    rows = {"cls_single": row_of("cls_single", x), "hard": row_of("hard", y), "leaky": row_of("leaky", x[:30])}
    assert [d["configuration"] for d in analysis.differences(rows, [Accurate()])] == ["hard"]
    rows["hard"].seeds = [1]
    assert analysis.differences(rows, [Accurate()]) == []
    rows["leaky"] = row_of("leaky", y)  # the same names: still, what it has learned from is another split
    assert analysis.differences(rows, [Accurate()]) == []
