"""Intervals and tests: coverage by simulation, values worked out by hand, brute force over all swaps."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from retina.evaluation import metrics, scoring, statistics, tables
from tasks import TASKS


def mean_of(values):
    return lambda weights: {"mean": metrics.mean(values, weights)}


def test_resamples_draw_whole_eyes():
    eyes = ["a", "b", "a", "c", "b", "a"]
    weights = statistics.bootstrap_weights(eyes, 500)
    assert weights.shape == (500, 6)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()  # as many eyes as there are
    assert float(weights[:, 3].mean()) == pytest.approx(1, abs=0.15)
    assert float((weights[:, 3] == 0).double().mean()) == pytest.approx((2 / 3) ** 3, abs=0.07)


def test_intervals_over_eyes_cover_and_those_over_photographs_do_not():
    """40 eyes with 5 photographs each that say the same: the truth lies in 95 % of the intervals over eyes, and in far
    fewer of those that take photographs for independent."""
    rng, covered = np.random.default_rng(0), np.zeros((120, 2), bool)
    for k in range(len(covered)):
        values = torch.from_numpy(np.repeat(rng.normal(0, 1, 40), 5))
        for j, names in enumerate((np.repeat(np.arange(40), 5), np.arange(200))):
            resampled = statistics.bootstrap([mean_of(values)], list(map(str, names)))["mean"][1:]
            low, high = statistics.percentile_interval(resampled)
            covered[k, j] = low < 0 < high
    by_eye, by_photograph = covered.mean(0)
    assert 0.87 <= by_eye <= 1 and by_photograph < 0.75


def test_bootstrap_starts_with_the_measure_itself_and_spreads_over_runs():
    values = torch.rand(30).double()
    eyes = list(map(str, range(30)))
    one = statistics.bootstrap([mean_of(values)], eyes)["mean"]
    assert one.shape == (1 + statistics.RESAMPLES,) and float(one[0]) == pytest.approx(float(values.mean()))
    same = statistics.bootstrap([mean_of(values)] * 3, eyes)["mean"]
    assert torch.allclose(one, same)
    few = statistics.bootstrap([mean_of(values + shift) for shift in (-1, 0, 0, 1)], eyes)["mean"]
    assert torch.allclose(one, few)  # fewer than five runs are not resampled
    shifts = (-2, -1, 0, 1, 2)
    apart = statistics.bootstrap([mean_of(values + shift) for shift in shifts], eyes)["mean"]
    assert float(apart[0]) == pytest.approx(float(values.mean()))
    # the mean of five runs drawn from these has the standard deviation sqrt(2 / 5)
    assert float(apart[1:].std()) == pytest.approx(math.hypot(math.sqrt(2 / 5), float(one[1:].std())), rel=0.1)
    # the other arm sees the same eyes, but other resamples of runs
    other = statistics.bootstrap([mean_of(values + shift) for shift in shifts], eyes, 1)["mean"]
    assert float((other - apart)[1:].std()) == pytest.approx(math.sqrt(4 / 5), rel=0.1)


def test_undefined_resamples():
    values = torch.cat([torch.full((400,), math.nan), torch.arange(600.0)])
    assert statistics.percentile_interval(values) == pytest.approx([0.025 * 599, 0.975 * 599])
    assert statistics.percentile_interval(torch.cat([values, torch.full((300,), math.nan)])) is None
    # all right, or one eye alone: no width is no certainty
    assert statistics.percentile_interval(torch.ones(1000)) is None


def test_in_chunks_is_the_same():
    values, weights = torch.rand(7), torch.rand(300, 7).double()
    assert torch.equal(statistics.in_chunks(mean_of(values), weights, 41)["mean"], mean_of(values)(weights)["mean"])


# ---- two arms ----

def both(first, second):
    """The measures of p_values: a mean, and one that is no mean over photographs."""
    x = torch.cat([first, second]).double()

    def measures(weights):
        mean = metrics.mean(x, weights)
        return {"mean": mean, "spread": (metrics.mean(x.square(), weights) - mean.square()).sqrt()}
    return measures


def test_p_values_equal_brute_force_over_all_swaps():
    rng = np.random.default_rng(3)
    first, second = torch.from_numpy(rng.random(8)), torch.from_numpy(rng.random(8) + 0.2)
    eyes = ["a", "a", "b", "c", "d", "d", "e", "f"]
    p = statistics.p_values([both(first, second)], eyes)
    hits, names = {"mean": 0, "spread": 0}, sorted(set(eyes))
    measure = {"mean": lambda x: x.mean(), "spread": lambda x: x.std(correction=0)}
    for flips in itertools.product((False, True), repeat=len(names)):
        swap = torch.tensor([flips[names.index(e)] for e in eyes])
        one, other = torch.where(swap, second, first), torch.where(swap, first, second)
        for name, of in measure.items():
            hits[name] += bool(abs(of(other) - of(one)) >= abs(of(second) - of(first)) - 1e-12)
    assert p == {name: n / 64 for name, n in hits.items()}


def test_for_a_mean_it_is_the_sign_flip_test():
    difference = torch.tensor([0.3, 0.1, 0.4, -0.1, 0.5])
    p = statistics.p_values([both(torch.zeros(5), difference)], list("abcde"))["mean"]
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=5)))
    flipped = (signs * difference).mean(1).abs()
    assert p == float((flipped >= difference.mean().abs() - 1e-9).double().mean())


def test_p_values_are_uniform_where_there_is_no_difference():
    """Of 200 comparisons of exchangeable arms about 5 % fall below 0.05; 2^30 swaps are too many to try all."""
    rng, eyes = np.random.default_rng(0), list(map(str, range(30)))
    p = np.array([statistics.p_values([both(*torch.from_numpy(rng.normal(size=(2, 30))))], eyes)["mean"]
                  for _ in range(200)])
    assert 0.01 <= np.mean(p < 0.05) <= 0.1 and 0.4 < np.mean(p) < 0.6


def test_a_clear_difference_has_the_smallest_p_that_permutations_can_show():
    x, eyes = torch.rand(30), list(map(str, range(30)))
    assert statistics.p_values([both(x, x + 1)], eyes)["mean"] == 1 / (1 + statistics.RESAMPLES)
    assert statistics.p_values([both(x, x)], eyes)["mean"] == 1
    assert math.isnan(statistics.p_values([lambda w: {"m": w.sum(1) * math.nan}], ["a", "b"])["m"])


def test_mcnemar_by_hand():
    first, second = torch.zeros(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    first[:2], second[2:11] = True, True
    first[20:30] = second[20:30] = True  # agreement says nothing
    one, other, p = statistics.mcnemar(first, second)
    assert (one, other) == (2, 9) and p == pytest.approx(2 * (1 + 11 + 55) / 2 ** 11)
    assert statistics.mcnemar(first, first) == (0, 0, 1.0)


@pytest.mark.parametrize("p,degrees,quantile", [
    (0.975, 1, 12.706), (0.95, 2, 2.920), (0.9975, 3, 7.453), (0.975, 5, 2.571), (0.995, 10, 3.169),
    (0.975, 120, 1.980), (0.975, 1e5, 1.960)])
def test_quantiles_of_students_distribution(p, degrees, quantile):
    """Values of the printed tables."""
    assert statistics.t_quantile(p, degrees) == pytest.approx(quantile, abs=2e-3)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([0.02]) == [0.02]


# ---- what may be claimed ----

def difference_of(value: float, error: float, p: float, seeds: int = 5, metric: str = "accuracy") -> dict:
    """What compare.compare leaves of a difference between arms whose seeds do not differ, of 103 eyes."""
    return {"task": "cls", "metric": metric, "difference": value, "standard_error": error, "p": p, "seeds": seeds,
            "standard_error_of_seeds": 0.0, "degrees_of_freedom": 1e5, "photographs": 103, "eyes": 103,
            "runs": [[0.25] * seeds, [0.25 + value] * seeds]}


@pytest.mark.parametrize("value,error,p,words", [
    (0.01, 0.05, 0.8, "no difference can be claimed from n = 103"),
    (0.10, 0.04, 0.2, "no difference can be claimed from n = 103"),
    (0.10, 0.06, 0.04, "no difference can be claimed from n = 103"),  # 0.1 - 1.96 * 0.06 < 0
    (0.10, 0.04, 0.01,
     "+0.100 (95 % over eyes and seeds +0.022 to +0.178, p = 0.010): higher, from n = 103 and 5 seeds"),
    (-0.10, 0.04, 0.01, "-0.100 (95 % over eyes and seeds -0.178 to -0.022, p = 0.010): lower, from n = 103"),
    (0.10, math.nan, 0.01,
     "(no interval within the range of the measure, p = 0.010), seed by seed 0.350, 0.350, 0.350, 0.350, 0.350 against "
     "0.250, 0.250, 0.250, 0.250, 0.250: no difference can be claimed"),
    (0.10, 0.0, 0.01, "no interval within"),  # no width is no certainty
    (math.nan, math.nan, math.nan, "not defined on these photographs")])
def test_what_may_be_claimed(value, error, p, words):
    (d,) = statistics.adjust([difference_of(value, error, p)])
    said = tables.claim(d, "A", "B")
    assert words in said and said.startswith("cls accuracy, B minus A: ") and "\n" not in said
    assert d["claimed"] == ("higher" in said or "lower" in said)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_nothing_is_claimed_of_ways_of_training_from_few_seeds(seeds):
    """A difference that five seeds would claim: told of these networks, with the value of each seed, and why."""
    (d,) = statistics.adjust([difference_of(0.1, 0.04, 0.01, seeds)])
    a, b = (", ".join([number] * seeds) for number in ("0.250", "0.350"))
    assert not d["claimed"] and d["wants"] == "seeds" and tables.needs(d) == "5 seeds a side"
    assert tables.claim(d, "first", "second") == (
        f"cls accuracy, second minus first: +0.100 (95 % over eyes +0.022 to +0.178, p = 0.010), seed by seed {b} "
        f"against {a}, of these networks on these photographs; no claim about ways of training: "
        f"{seeds} seed{'s' * (seeds > 1)} a side, 5 are needed")


@pytest.mark.parametrize("metric,value,claimed", [
    ("dice_MA", 0.9, False), ("dice_MA", 0.8, True), ("kappa", 0.9, True), ("kappa", 1.9, False),
    ("px4288_disc", 90, True), ("one of another's task", 9, True), ("referable_sensitivity", -0.9, False)])
def test_an_interval_that_leaves_the_range_of_its_measure_says_nothing(metric, value, claimed):
    """0.9 +- 1.96 * 0.1 reaches 1.096: two Dice never differ by that, two kappa may."""
    (d,) = statistics.adjust([difference_of(value, 0.1, 0.001, metric=metric)])
    assert d["claimed"] == claimed == (d["corrected_interval"] is not None)
    assert not claimed or d["corrected_interval"] == pytest.approx([value - 0.196, value + 0.196], abs=1e-3)


def test_the_error_of_few_seeds_is_that_of_eyes_and_of_many_counts_new_ones():
    assert statistics.error_for_new_seeds(0.2, [[0.1, 0.9], [0.5, 0.3]], 400) == pytest.approx((0.2, 0, 399))
    # variance of five seeds 0 0 0 0 1: 0.2, of their mean 0.04; resampling them shows 4 / 5 of it
    error, of_seeds, degrees = statistics.error_for_new_seeds(0.2, [[0, 0, 0, 0, 1], [0.5] * 5], 400)
    of_eyes = 0.04 - 0.032
    assert (error, of_seeds) == pytest.approx((math.sqrt(0.04 + of_eyes), 0.2))
    assert degrees == pytest.approx((0.04 + of_eyes) ** 2 / (0.04 ** 2 / 4 + of_eyes ** 2 / 399))


def test_intervals_of_measures_stay_within_their_range():
    """Of 40 answers that are certain and right but for one, the error of calibration is small and resamples make it
    larger: the basic bootstrap interval would begin below 0."""
    truth = torch.zeros(40)
    p = torch.tensor([[0.999, 0.0005, 0.0005]]).repeat(40, 1).double()
    p[0] = torch.tensor([0.0, 0.6, 0.4])
    names = list(map(str, range(40)))
    one = scoring.SplitScores([TASKS["dme"]], {"dme": names}, {"dme": torch.cat([p, truth[:, None]], 1)},
                              eyes=dict(zip(names, names)))
    values, limits = scoring.summary([one], [{}])
    for k, interval in limits["dme"].items():
        low, high = metrics.range_of(k)
        assert interval is None or low <= interval[0] <= interval[1] <= high
    assert limits["dme"]["calibration_error"][0] == 0 < values["dme"]["calibration_error"]


def test_measures_of_tasks_can_be_compared():
    """A kappa of both arms at once, through p_values and by hand for one swap of two eyes."""
    truth = torch.tensor([0, 1, 2, 2])
    first, second = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 2])
    both_truth, answers = truth.repeat(2), torch.cat([first, second])
    p = statistics.p_values([lambda w: {"kappa": metrics.quadratic_kappa(both_truth, answers, 3, w)}], list("aabb"))
    kappa = partial(metrics.quadratic_kappa, truth, classes=3, weights=torch.ones(1, 4).double())
    swapped = [kappa(torch.cat([x[:2], y[2:]])) for x, y in ((first, second), (second, first))]
    hits = 2 + 2 * int(abs(swapped[0] - swapped[1]) >= abs(kappa(first) - kappa(second)))
    assert p["kappa"] == hits / 4
