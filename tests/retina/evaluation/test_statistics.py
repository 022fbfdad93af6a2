"""Intervals and tests: coverage by simulation, values worked out by hand, brute force over all swaps."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from retina.evaluation import metrics, statistics


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
            low, high = statistics.percentile_interval(statistics.bootstrap(
                [mean_of(values)], list(map(str, names)))["mean"][1:])
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
    apart = statistics.bootstrap([mean_of(values + shift) for shift in (-1, 0, 1)], eyes)["mean"]
    assert float(apart[0]) == pytest.approx(float(values.mean()))
    # the mean of three runs drawn from -1, 0, 1 has the standard deviation sqrt(2/3 / 3)
    assert float(apart[1:].std()) == pytest.approx(math.hypot(math.sqrt(2 / 9), float(one[1:].std())), rel=0.1)
    # the other side sees the same eyes, but other draws of runs
    other = statistics.bootstrap([mean_of(values + shift) for shift in (-1, 0, 1)], eyes, 1)["mean"]
    assert float((other - apart)[1:].std()) == pytest.approx(math.sqrt(4 / 9), rel=0.1)


def test_undefined_draws():
    drawn = torch.cat([torch.full((400,), math.nan), torch.arange(600.0)])
    assert statistics.percentile_interval(drawn) == pytest.approx([0.025 * 599, 0.975 * 599])
    assert statistics.percentile_interval(torch.cat([drawn, torch.full((300,), math.nan)])) is None
    # all right, or one eye alone: no width is no certainty
    assert statistics.percentile_interval(torch.ones(1000)) is None


def test_in_parts_is_the_same():
    values, weights = torch.rand(7), torch.rand(300, 7).double()
    assert torch.equal(statistics.in_parts(mean_of(values), weights, 41)["mean"], mean_of(values)(weights)["mean"])


# ---- two sides ----

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
    found = statistics.p_values([both(first, second)], eyes)
    hits = {"mean": 0, "spread": 0}
    names = sorted(set(eyes))
    measure = {"mean": lambda x: x.mean(), "spread": lambda x: x.std(correction=0)}
    for flips in itertools.product((False, True), repeat=len(names)):
        swap = torch.tensor([flips[names.index(e)] for e in eyes])
        one, other = torch.where(swap, second, first), torch.where(swap, first, second)
        for name, of in measure.items():
            hits[name] += bool(abs(of(other) - of(one)) >= abs(of(second) - of(first)) - 1e-12)
    assert found == {name: n / 64 for name, n in hits.items()}


def test_for_a_mean_it_is_the_sign_flip_test():
    difference = torch.tensor([0.3, 0.1, 0.4, -0.1, 0.5])
    found = statistics.p_values([both(torch.zeros(5), difference)], list("abcde"))["mean"]
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=5)))
    flipped = (signs * difference).mean(1).abs()
    assert found == float((flipped >= difference.mean().abs() - 1e-9).double().mean())


def test_p_values_are_uniform_where_there_is_no_difference():
    """Of 200 comparisons of exchangeable sides about 5 % fall below 0.05; draws, since 2^30 swaps are too many."""
    rng, eyes = np.random.default_rng(0), list(map(str, range(30)))
    found = [statistics.p_values([both(*torch.from_numpy(rng.normal(size=(2, 30))))], eyes)["mean"]
             for _ in range(200)]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.1 and 0.4 < np.mean(found) < 0.6


def test_a_clear_difference_has_the_smallest_p_that_draws_can_show():
    x = torch.rand(30)
    found = statistics.p_values([both(x, x + 1)], list(map(str, range(30))))["mean"]
    assert found == 1 / (1 + statistics.RESAMPLES)
    assert statistics.p_values([both(x, x)], list(map(str, range(30))))["mean"] == 1
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


@pytest.mark.parametrize("difference,interval,p,words", [
    (0.01, (-0.08, 0.1), 0.8, "no difference can be claimed from n = 103"),
    (0.10, (0.01, 0.2), 0.2, "no difference can be claimed from n = 103"),  # before the correction it could
    (0.10, (-0.01, 0.2), 0.04, "no difference can be claimed from n = 103"),
    (0.10, (0.05, 0.2), 0.01, "the second scores higher, from n = 103; a claim about these 2 networks"),
    (-0.10, (-0.2, -0.05), 0.01, "the first scores higher"),
    (0.1, None, 0.01, "nothing can be claimed"), (math.nan, (0, 1), math.nan, "nothing can be claimed")])
def test_what_may_be_claimed(difference, interval, p, words):
    said = statistics.claim("cls kappa", difference, interval, p, 103, 1)
    assert words in said and said.startswith("cls kappa: ") and "\n" not in said
    about = [statistics.claim("cls kappa", 0.1, (0.05, 0.2), 0.01, 9, runs).partition("a claim about ")[2]
             for runs in (3, 5)]
    assert about[0].startswith("these 6 networks, not the ways they were trained") and about[1] == \
        "these ways of training"


def test_measures_of_tasks_can_be_compared():
    """A kappa on both sides at once, through p_values and by hand for one swap of two eyes."""
    truth = torch.tensor([0, 1, 2, 2])
    first, second = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 2])
    both_truth, answers = truth.repeat(2), torch.cat([first, second])
    found = statistics.p_values([lambda w: {"kappa": metrics.quadratic_kappa(both_truth, answers, 3, w)}],
                                ["a", "a", "b", "b"])
    kappa = partial(metrics.quadratic_kappa, truth, classes=3, weights=torch.ones(1, 4).double())
    swapped = [kappa(torch.cat([x[:2], y[2:]])) for x, y in ((first, second), (second, first))]
    hits = 2 + 2 * int(abs(swapped[0] - swapped[1]) >= abs(kappa(first) - kappa(second)))
    assert found["kappa"] == hits / 4
