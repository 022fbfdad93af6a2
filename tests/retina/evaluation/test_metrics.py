"""Measures against brute force, values worked out by hand, and scikit-learn where it is installed."""

import math
import random

import numpy as np
import pytest
import torch

from retina.evaluation import metrics
from retina.evaluation.metrics import dice, iou


def ones(n):
    return torch.ones(1, n, dtype=torch.float64)


def brute_kappa(truth, predicted, classes):
    """1 - mean cost of the pairs / mean cost of all pairings."""
    pairs = sum((t - p) ** 2 for t, p in zip(truth, predicted)) / len(truth)
    all_pairs = sum((t - p) ** 2 for t in truth for p in predicted) / len(truth) ** 2
    return 1 - pairs / all_pairs


def brute_f1(truth, predicted, classes):
    scores = []
    for c in range(classes):
        tp = sum(t == p == c for t, p in zip(truth, predicted))
        fp, fn = sum(p == c != t for t, p in zip(truth, predicted)), sum(t == c != p for t, p in zip(truth, predicted))
        if tp + fp + fn:
            scores.append(2 * tp / (2 * tp + fp + fn))
    return sum(scores) / len(scores)


def brute_recall(truth, predicted, classes):
    shares = [[p == t for t, p in zip(truth, predicted) if t == c] for c in range(classes)]
    return sum(sum(s) / len(s) for s in shares if s) / sum(map(bool, shares))


def brute_roc(score, positive):
    """Share of pairs of a positive and a negative in the right order, ties half."""
    pairs = [(p > q) + 0.5 * (p == q) for p, a in zip(score, positive) if a for q, b in zip(score, positive) if not b]
    return sum(pairs) / len(pairs)


def brute_calibration(probabilities, truth, bins):
    total = 0
    for b in range(bins):
        members = [(max(p), p.index(max(p)) == t) for p, t in zip(probabilities, truth)
                   if b / bins < max(p) <= (b + 1) / bins]
        if members:
            confidence, right = (sum(x) / len(members) for x in zip(*members))
            total += len(members) / len(truth) * abs(confidence - right)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_measures_of_classes_equal_brute_force(seed):
    rng = random.Random(seed)
    classes = rng.choice([2, 3, 5])
    truth = [rng.randrange(classes) for _ in range(40)]
    predicted = [t if rng.random() < 0.5 else rng.randrange(classes) for t in truth]
    t, p, w = torch.tensor(truth), torch.tensor(predicted), ones(40)
    c = metrics.confusion_matrix(t, p, classes)
    assert all(c[i, j] == sum((a, b) == (i, j) for a, b in zip(truth, predicted))
               for i in range(classes) for j in range(classes))
    for measure, brute in ((metrics.quadratic_kappa, brute_kappa), (metrics.macro_f1, brute_f1),
                           (metrics.balanced_accuracy, brute_recall)):
        assert float(measure(t, p, classes, w)) == pytest.approx(brute(truth, predicted, classes), abs=1e-12)
    assert float(metrics.accuracy(t, p, w)) == sum(a == b for a, b in zip(truth, predicted)) / 40


@pytest.mark.parametrize("seed", range(3))
def test_measures_of_probabilities_equal_brute_force(seed):
    torch.manual_seed(seed)
    p, truth = torch.randn(50, 4).mul(2).softmax(1).double(), torch.randint(4, (50,))
    p = (p * 20).round() / 20  # ties
    p, weights = p / p.sum(1, keepdim=True), ones(50)
    areas = [brute_roc(p[:, c].tolist(), (truth == c).tolist()) for c in range(4)]
    assert float(metrics.one_vs_rest_area(p, truth, weights)) == pytest.approx(sum(areas) / 4)
    assert float(metrics.calibration_error(p, truth, weights, 7)) == pytest.approx(
        brute_calibration(p.tolist(), truth.tolist(), 7))


def test_weights_count_photographs():
    torch.manual_seed(0)
    score, positive, drawn = torch.rand(12).round(decimals=1), torch.rand(12) > 0.5, torch.randint(12, (12,))
    weights = torch.bincount(drawn, minlength=12)[None].double()
    assert float(metrics.roc_area(score, positive, weights)) == pytest.approx(
        float(metrics.roc_area(score[drawn], positive[drawn], ones(12))))
    values = torch.rand(12)
    values[3] = math.nan
    assert float(metrics.mean(values, weights)) == pytest.approx(float(values[drawn].nanmean()))
    listed = values[drawn][~values[drawn].isnan()].double()
    assert float(metrics.median(values, weights)) == pytest.approx(float(listed.quantile(0.5)))


def test_by_hand():
    def kappa(confusion):
        truth, predicted = (torch.tensor(x) for x in zip(*((i, j) for i, row in enumerate(confusion)
                                                           for j, n in enumerate(row) for _ in range(n))))
        return float(metrics.quadratic_kappa(truth, predicted, len(confusion), ones(len(truth))))

    assert kappa([[5, 0], [0, 5]]) == 1 and kappa([[0, 5], [5, 0]]) == -1
    assert kappa([[4, 4], [1, 1]]) == pytest.approx(0)  # prediction independent of truth
    assert math.isnan(kappa([[9, 0], [0, 0]]))  # one class only: 0 / 0
    assert kappa([[6, 3], [0, 0]]) == 0  # whatever is answered
    score, ill = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert float(metrics.roc_area(score, ill, ones(4))) == 0.75
    assert float(metrics.sensitivity(score >= 0.4, ill, ones(4))) == 0.5
    assert float(metrics.sensitivity(~(score >= 0.4), ~ill, ones(4))) == 0.5  # specificity
    counts = torch.tensor([[2, 3, 5], [0, 0, 0], [0, 4, 0], [0, 0, 4], [7, 7, 7]])  # both, predicted, true
    assert dice(counts).tolist() == pytest.approx([4 / 8, 1, 0, 0, 1])
    assert iou(counts).tolist() == pytest.approx([2 / 6, 1, 0, 0, 1])
    # true pixels at 0.9 and 0.3, others at 0.6 and 0.1: precision 1 at the first, 2/3 at the second
    ranking = metrics.PRCurveAccumulator(1)
    area, counts = ranking.add(0, np.array([0.9, 0.6, 0.3, 0.1], np.float32), np.array([1, 0, 1, 0], bool))
    assert area == ranking.area(0) == pytest.approx((1 + 2 / 3) / 2)
    assert counts.sum(1).tolist() == [2, 2]


def test_absent_classes():
    """Left out where they can neither be right nor wrong, and a measure without any is not defined."""
    truth, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    assert float(metrics.macro_f1(truth, predicted, 4, ones(4))) == pytest.approx((1 + 2 / 3 + 0) / 3)  # 2 is predicted
    assert float(metrics.balanced_accuracy(truth, predicted, 4, ones(4))) == 0.75
    assert float(metrics.macro_f1(truth, truth, 4, ones(4))) == 1
    p = torch.tensor([[0.8, 0.2, 0, 0], [0.6, 0.4, 0, 0], [0.3, 0.7, 0, 0], [0.1, 0.4, 0.5, 0]])
    assert float(metrics.one_vs_rest_area(p, truth, ones(4))) == pytest.approx((1 + 0.875) / 2)
    nobody = torch.zeros(4, dtype=torch.bool)
    assert metrics.roc_area(p[:, 0], nobody, ones(4)).isnan().all()
    assert metrics.sensitivity(~nobody, nobody, ones(4)).isnan().all()
    assert math.isnan(metrics.PRCurveAccumulator(1).area(0))


def test_calibration_by_hand():
    """Ten answers of 0.8 of which six are right: 0.2. A temperature that lets them say 0.6 makes the error vanish."""
    p = torch.tensor([[0.8, 0.2]]).repeat(10, 1).double()
    truth = torch.tensor([0] * 6 + [1] * 4)
    assert float(metrics.calibration_error(p, truth, ones(10))) == pytest.approx(0.2)
    temperature = metrics.best_temperature(p, truth)
    assert temperature == pytest.approx(math.log(0.8 / 0.2) / math.log(0.6 / 0.4), rel=1e-6)
    assert float(metrics.calibration_error(metrics.at_temperature(p, temperature), truth, ones(10))) < 1e-6


def test_there_is_no_likeliest_temperature_where_all_are_right_or_all_wrong():
    p = torch.tensor([[0.6, 0.4], [0.3, 0.7]]).double()
    assert metrics.best_temperature(p, torch.tensor([0, 1])) == metrics.best_temperature(p, torch.tensor([1, 0])) == 1


def test_temperature_is_the_likeliest():
    torch.manual_seed(0)
    logits, truth = torch.randn(200, 5).double() * 3, torch.randint(5, (200,))
    truth[:120] = logits[:120].argmax(1)
    p = logits.softmax(1)
    best = metrics.best_temperature(p, truth)

    def loss(t):
        return float(torch.nn.functional.cross_entropy(logits / t, truth))
    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01)) and best > 1.2
    assert torch.allclose(metrics.at_temperature(p, best), (logits / best).softmax(1))


def test_threshold_equals_a_search_of_all():
    torch.manual_seed(0)
    score, ill = torch.rand(60).round(decimals=2), torch.rand(60) < 0.4
    score[ill] += 0.3

    def gain(threshold):
        positive = score >= threshold
        return positive[ill].double().mean() + (~positive)[~ill].double().mean()
    assert gain(metrics.best_threshold(score, ill)) == max(gain(t) for t in torch.linspace(0, 1.4, 2001))
    assert metrics.best_threshold(score, torch.zeros(60, dtype=torch.bool)) == 0.5


# ---- all pixels ----

def exact_area(score, truth):
    """A sort over all pixels, in float64."""
    order = np.argsort(-score, kind="stable")
    score, truth = score[order], truth[order]
    last = np.append(score[1:] != score[:-1], True)
    hits = np.cumsum(truth)[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])


@pytest.mark.parametrize("seed,spread,shift", [(0, 3.0, -4.0), (1, 1.0, 0.0), (2, 0.05, -2.0), (3, 2.0, -7.0)])
def test_area_equals_a_sort_of_all_pixels(seed, spread, shift, monkeypatch):
    """Also where so many pixels were seen that they are counted by level instead of kept."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(shift, spread, (6, 50000))
    truth = rng.random((6, 50000)) < 1 / (1 + np.exp(3 - (logits - shift) / spread))
    score = (1 / (1 + np.exp(-logits))).astype(np.float32)
    expected = exact_area(score.ravel(), truth.ravel())
    for most in (1 << 23, 100000):
        monkeypatch.setattr(metrics.PRCurveAccumulator, "most", most)
        ranking = metrics.PRCurveAccumulator(2)
        own = [ranking.add(1, s, t)[0] for s, t in zip(score, truth)]
        assert (ranking.counts[1] is None) == (most > 300000)
        assert ranking.area(1) == pytest.approx(expected, abs=1e-6)
        assert own == pytest.approx([exact_area(s, t) for s, t in zip(score, truth)], abs=1e-6)


@pytest.mark.parametrize("score", [1 - 9 * 2.0 ** -24, 0.995, 0.4, 1.0])
def test_ties_pass_together_when_pixels_are_counted(score, monkeypatch):
    """Others and true pixels at one score; near 1 that is one float32 among few."""
    monkeypatch.setattr(metrics.PRCurveAccumulator, "most", 10000)
    rng = np.random.default_rng(0)
    p = np.concatenate([np.full(1300, score), rng.random(1000000) * 0.3]).astype(np.float32)
    truth = np.arange(len(p)) < 500
    truth[500:1300] = False
    ranking = metrics.PRCurveAccumulator(1)
    ranking.add(0, p, truth)
    assert ranking.counts[0] is not None and ranking.area(0) == pytest.approx(exact_area(p, truth), abs=1e-6)


def test_pixels_of_one_score_pass_together():
    score, truth = np.full(100, 0.25, np.float32), np.arange(100) < 7
    assert metrics.PRCurveAccumulator(1).add(0, score, truth)[0] == pytest.approx(0.07)


def test_levels_ascend_and_one_begins_at_a_half():
    def level(*p, width=metrics.FINE):
        return [int(np.flatnonzero(metrics.counted(np.array([x], np.float32), width))[0]) for x in p]

    p = np.sort(np.concatenate([np.random.default_rng(0).random(40), 10.0 ** np.arange(-12, 0), [0, 1]]))
    fine = level(*p, width=1)
    assert fine == sorted(fine) and fine[0] == 0 and fine[-1] == metrics.LEVELS * metrics.FINE - 1
    half = metrics.level_of(0.5)
    assert level(0.5, 0.4999, 0.49999997) == [half, half - 1, half - 1]
    for k in (1, 100, 512, 700, 900):
        assert metrics.level_of(metrics.threshold_at(k)) == k
        assert level(metrics.threshold_at(k + 0.5)) == [k]


def test_masks_at_a_level_equal_counting():
    rng = np.random.default_rng(0)
    score, truth = rng.random((3, 400), np.float32), rng.random((3, 400)) < 0.3
    ranking = metrics.PRCurveAccumulator(1)
    counts = torch.stack([torch.from_numpy(ranking.add(0, s, t)[1]) for s, t in zip(score, truth)])[:, None].double()
    for level in (300, 512, 540):
        predicted = score >= metrics.threshold_at(level)
        expected = [[(p & t).sum(), p.sum(), t.sum()] for p, t in zip(predicted, truth)]
        assert metrics.masks_at(counts, level)[:, 0].tolist() == expected


def test_scikit_learn_agrees():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, p = rng.integers(0, 5, 300), rng.dirichlet(np.ones(5), 300)
    p = np.where((np.arange(5) == truth[:, None]) & (rng.random((300, 1)) < 0.5), p + 1, p)
    p /= p.sum(1, keepdims=True)
    t, q, w = torch.from_numpy(truth), torch.from_numpy(p), ones(300)
    predicted = q.argmax(1)
    assert float(metrics.one_vs_rest_area(q, t, w)) == pytest.approx(
        sklearn.roc_auc_score(truth, p, multi_class="ovr", average="macro"))
    assert float(metrics.quadratic_kappa(t, predicted, 5, w)) == pytest.approx(
        sklearn.cohen_kappa_score(truth, predicted, weights="quadratic"))
    assert float(metrics.balanced_accuracy(t, predicted, 5, w)) == pytest.approx(
        sklearn.balanced_accuracy_score(truth, predicted))
    assert float(metrics.macro_f1(t, predicted, 5, w)) == pytest.approx(
        sklearn.f1_score(truth, predicted, average="macro"))
    score = rng.random(200000).astype(np.float32)
    lesion = rng.random(200000) < score ** 3 * 0.3
    assert metrics.PRCurveAccumulator(1).add(0, score, lesion)[0] == pytest.approx(
        sklearn.average_precision_score(lesion, score), abs=1e-6)
