"""What the numbers of a comparison are worth: folds, seeds, planted differences, corrections."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

import baselines
import data
from conftest import TINY
from retina import files
from retina.comparison import analysis, report
from retina.datasets import readers
from retina.evaluation import compare, scoring, statistics, tables
from retina.evaluation.scoring import SplitScores
from tasks import TASKS, build_net


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")
SMALL = replace(TINY, image_size=64, epochs=1, log_gradients=True)


# ---- scores of a configuration ----

def stats(right: torch.Tensor) -> torch.Tensor:
    """Statistics of `cls` whose accuracy is that of `right`; truth 0."""
    hit, miss = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.6, 0.1, 0.1, 0.1]])
    return torch.cat([torch.where(right[:, None], hit, miss), torch.zeros(len(right), 1)], 1).double()


def measured(words: str, *seeds: torch.Tensor) -> analysis.Measurements:
    """A configuration with these answers right, one tensor for each seed."""
    names = [f"p{i}" for i in range(len(seeds[0]))]
    scores = [SplitScores([Accurate()], {"cls": names}, {"cls": stats(right)}, eyes={n: n for n in names})
              for right in seeds]
    return analysis.Measurements(words, list(range(len(seeds))), scores, [], [], [], [1] * len(seeds))


class Accurate(type(TASKS["cls"])):
    """Grading by accuracy, which is a mean, so that what is planted is known."""
    primary = "accuracy"


def right(share: float, n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def test_folds_are_put_together_and_each_photograph_counts_once():
    folds, (net, tasks) = [], build_net(asdict(SMALL))
    for k in (1, 2, 3):
        _, validation, _ = data.load_datasets(replace(SMALL, fold=f"{k}/3"), tasks)
        scores = scoring.evaluate_split(net, data.eval_loader(validation, tasks, 6), tasks)
        folds.append(baselines.storable(scores))
    joined = analysis.concat_folds(folds, tasks)
    everything = data.FundusDataset([r for r in readers.read_drawn().records if r.split == "train"], 64)
    whole = scoring.evaluate_split(net, data.eval_loader(everything, tasks, 6), tasks)
    scoring.align([whole, joined])
    for t in ("cls", "seg"):
        torch.testing.assert_close(joined.stats[t], whole.stats[t], rtol=1e-4, atol=1e-4, equal_nan=True,
                                   check_dtype=False)
    assert joined.metrics()["cls"]["accuracy"] == whole.metrics()["cls"]["accuracy"]
    assert joined.losses["cls"] == pytest.approx(whole.losses["cls"], rel=1e-5)


def test_a_constant_guess_scores_what_it_must():
    options = replace(SMALL, tasks=("cls", "seg", "loc"))
    tasks = [TASKS[t] for t in options.tasks]
    training, validation, _ = data.load_datasets(options, tasks)
    scores = analysis.constant([(training, validation)], tasks).scores[0].metrics()
    grades = [r.grade for r in training.records]
    most = max(range(5), key=grades.count)
    hits = sum(r.grade == most for r in validation.records)
    assert scores["cls"]["accuracy"] == pytest.approx(hits / len(validation))
    assert scores["cls"]["kappa"] == 0 and scores["seg"]["dice"] == 0
    place = torch.stack([training[i].landmarks for i in range(len(training))]).mean(0)
    gaps = [(validation[i].landmarks - place).norm(dim=1) / 64 / 0.154 for i in range(len(validation))]
    assert scores["loc"]["diameters_disc"] == pytest.approx(float(torch.stack(gaps)[:, 0].mean()), rel=1e-4)


# ---- differences ----

def table_of(summary: dict) -> str:
    return tables.as_markdown(report.difference_table(summary))


# seeds do not differ, and the measure has no range
KNOWN = {"standard_error_of_seeds": 0.0, "degrees_of_freedom": 1e5, "seeds": 5, "metric": "effect"}


def test_equal_configurations_with_different_names_differ_by_nothing(few_resamples):
    """The same answers; and answers of one quality, of which an uncorrected interval leaves out zero now and then."""
    same = right(0.6, 100, 0)
    configurations = {name: measured(name, same) for name in ("cls_single", "hard")}
    (d,) = analysis.differences(configurations, [Accurate()])
    assert d["difference"] == 0 and not d["claimed"] and d["needed"] is None and d["p_adjusted"] == 1
    assert d["corrected_interval"] is None  # no width is no certainty
    wrong = 0
    for k in range(10):
        configurations = {name: measured(name, *[right(0.6, 100, 100 * k + i)] * 5)
                          for i, name in enumerate(("cls_single", "hard", "dense", "learned"))}
        configurations["cls_single"].against = ()
        wrong += any(d["claimed"] for d in analysis.differences(configurations, [Accurate()]))
    assert wrong <= 2


def test_a_planted_difference_is_claimed_with_its_size():
    first = right(0.5, 300, 1)
    second = first | right(0.4, 300, 2)
    configurations = {"cls_single": measured("cls_single", *[first] * 5), "hard": measured("hard", *[second] * 5)}
    (d,) = analysis.differences(configurations, [Accurate()])
    gap = float((second.double() - first.double()).mean())
    error = float((second.double() - first.double()).std()) / math.sqrt(300)
    assert d["difference"] == pytest.approx(gap) and d["standard_error"] == pytest.approx(error, rel=0.1)
    assert d["claimed"] and d["corrected_interval"] == pytest.approx([gap - 1.96 * error, gap + 1.96 * error], rel=0.1)
    assert (d["seeds"], d["photographs"], d["against"]) == (5, 300, "cls_single")


def test_correction_for_the_number_of_differences():
    one = {"difference": 0.1, "standard_error": 0.04, **KNOWN, "p": 0.02, "photographs": 50, "eyes": 50}
    ten = statistics.adjust([dict(one) for _ in range(10)])
    assert [d["p_adjusted"] for d in ten] == pytest.approx([0.2] * 10) and not any(d["claimed"] for d in ten)
    assert ten[0]["corrected_interval"] == pytest.approx([0.1 - 2.807 * 0.04, 0.1 + 2.807 * 0.04], abs=1e-4)
    assert ten[0]["needed"] == math.ceil(50 * ((2.80703 + 0.84162) * 0.4) ** 2)
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
    summary = {"configurations": {n: {"words": n} for n in "ab"},
               "differences": [{**single, "configuration": "a", "against": "b", "task": "cls", "metric": "kappa"}]}
    assert table_of(summary).endswith("| none | 5 seeds a side |")
    # an error that resamples of eyes leave undefined is not replaced by that of seeds
    assert all(math.isnan(v) for v in statistics.error_for_new_seeds(math.nan, [[], []], 5))


def test_of_many_differences_that_are_not_there_hardly_one_is_claimed():
    """500 comparisons of ten normal variables of mean 0: at most one in twenty claims any; uncorrected, every third."""
    rng = torch.Generator().manual_seed(0)
    claimed = uncorrected = 0
    for values in torch.randn(500, 10, generator=rng).tolist():
        family = [{"difference": x, "standard_error": 1.0, **KNOWN, "photographs": 90, "eyes": 90,
                   "p": math.erfc(abs(x) / math.sqrt(2))} for x in values]
        uncorrected += any(d["p"] < 0.05 for d in family)
        claimed += any(d["claimed"] for d in statistics.adjust(family))
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


def test_fewer_than_five_seeds_a_side_claim_nothing_and_evaluate_says_the_same(few_resamples):
    """The same seed several times does not differ; the sentence of both commands differs in names and numbers alone."""
    first, second = right(0.3, 300, 1), right(0.8, 300, 2)
    for seeds, claimed in ((1, False), (2, False), (4, False), (5, True)):
        single, hard = measured("A", *[first] * seeds), measured("B", *[second] * seeds)
        (d,) = analysis.differences({"cls_single": single, "hard": hard}, [Accurate()])
        assert d["claimed"] == claimed and d["wants"] == (None if claimed else "seeds") and d["p_adjusted"] < 0.01
        (said,) = compare.claims(compare.compare(single.scores, hard.scores), hard.scores[0])
        summary = {"configurations": {"cls_single": {"words": single.words}, "hard": {"words": hard.words}}}
        assert said == report.sentence(summary, d).replace("B minus A", "second minus first")
        assert ("higher" in said) == claimed and (f"{seeds} seed" in said)
        assert ("no claim about ways of training" in said) != claimed


def test_so_many_photographs_as_are_said_to_be_needed_find_it():
    """80 % of samples of that size, of one of five differences, would be claimed."""
    rng = torch.Generator().manual_seed(0)
    shift, n = 0.2, 60
    one = {"difference": shift, "standard_error": 1 / math.sqrt(n), **KNOWN, "p": 0.5, "photographs": n, "eyes": n}
    needed = statistics.adjust([dict(one) for _ in range(5)])[0]["needed"]
    claimed = 0
    for sample in torch.randn(600, needed, generator=rng) + shift:
        mean, error = float(sample.mean()), float(sample.std()) / math.sqrt(needed)
        family = [{**one, "difference": mean, "standard_error": error, "photographs": needed,
                   "p": math.erfc(abs(mean / error) / math.sqrt(2))}, *(dict(one) for _ in range(4))]
        claimed += statistics.adjust(family)[0]["claimed"]
    assert claimed / 600 == pytest.approx(0.8, abs=0.06)


def test_many_differences_can_still_be_claimed_and_undefined_ones_are_said(monkeypatch):
    """p of a hundred permutations, times as many differences, would never be small enough."""
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    first = right(0.2, 60, 1)
    configurations = {"cls_single": measured("cls_single", *[first] * 5)} | {
        f"other{k}": measured(f"other{k}", *[first | right(0.7, 60, k + 2)] * 5) for k in range(8)}
    assert all(d["claimed"] for d in analysis.differences(configurations, [Accurate()]))
    nothing = {"difference": math.nan, "standard_error": math.nan, **KNOWN, "p": math.nan, "photographs": 6, "eyes": 6}
    (bad,) = statistics.adjust([nothing])
    assert bad["needed"] is None and not bad["claimed"] and json.dumps(files.jsonable(bad), allow_nan=False)
    summary = {"configurations": {n: {"words": n} for n in "ab"}}
    d = files.jsonable({**bad, "configuration": "a", "against": "b", "task": "seg", "metric": "dice"})
    assert "not defined on these photographs" in report.sentence(summary, d)
    assert table_of({**summary, "differences": [d]}).splitlines()[-1] == "| seg | a | b | - | 1.000 | none |  |"


def test_configurations_without_a_seed_or_a_photograph_in_common_are_not_compared():
    x, y = right(0.5, 40, 1), right(0.5, 40, 2)
    configurations = {name: measured(name, answers)
                      for name, answers in (("cls_single", x), ("hard", y), ("leaky", x[:30]))}
    assert [d["configuration"] for d in analysis.differences(configurations, [Accurate()])] == ["hard"]
    configurations["hard"].seeds = [1]
    assert analysis.differences(configurations, [Accurate()]) == []
    configurations["leaky"] = replace(measured("leaky", y), against=())  # the same names: still, another split
    assert analysis.differences(configurations, [Accurate()]) == []
