"""Measures of fine classes and of signs, against scikit-learn where it is installed, brute force, and by hand."""

import math

import pytest
import torch

from retina.evaluation import metrics, tables
from tasks import make_tasks


NAMES = ("a", "b", "c", "d", "e", "f", "g")
SIGNS, = make_tasks(["signs"], {"signs": ("drusen", "haze", "never")})


def fine(broad=(), number: int = 7):
    return make_tasks(["fine"], {"fine": NAMES[:number], "broad": broad})[0]


# ---- ranks ----

def brute_precision(score: list[float], positive: list[bool]) -> float:
    """Over the thresholds that there are, the precision at each by how much recall it adds."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        passed = [p for s, p in zip(score, positive) if s >= threshold]
        area += (sum(passed) / sum(positive) - before) * sum(passed) / len(passed)
        before = sum(passed) / sum(positive)
    return area


def brute_area(score: list[float], positive: list[bool]) -> float:
    pairs = [(p > q) + 0.5 * (p == q) for p, a in zip(score, positive) if a for q, b in zip(score, positive) if not b]
    return sum(pairs) / len(pairs)


def random_ranks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.rand(30).mul(8).round().div(8), torch.rand(30) < 0.3  # many ties


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_brute_force(seed):
    score, positive = random_ranks(seed)
    found = metrics.ranked_precision(score, positive, torch.ones(1, 30, dtype=torch.float64))
    assert float(found) == pytest.approx(brute_precision(score.tolist(), positive.tolist()), abs=1e-12)
    weights = torch.randint(3, (4, 30)).double()
    for row, ours in zip(weights.long(), metrics.ranked_precision(score, positive, weights)):
        again = [x.repeat_interleave(row).tolist() for x in (score, positive)]
        assert float(ours) == pytest.approx(brute_precision(*again), abs=1e-12)


def test_average_precision_by_hand():
    ones = torch.ones(1, 4, dtype=torch.float64)

    def of(score, positive):
        return float(metrics.ranked_precision(torch.tensor(score), torch.tensor(positive), ones))
    assert of([0.9, 0.8, 0.7, 0.6], [True, False, True, False]) == pytest.approx((1 + 2 / 3) / 2)
    assert of([0.5] * 4, [True, False, False, False]) == 0.25  # all tied: the share of positives
    assert of([1.0, 0.5, 0.5, 0.2], [False, True, False, True]) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert math.isnan(of([1.0, 0.5, 0.5, 0.2], [False] * 4))


def test_ranks_equal_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics")
    for seed in range(20):
        (score, positive), ones = random_ranks(seed), torch.ones(1, 30, dtype=torch.float64)
        assert float(metrics.ranked_precision(score, positive, ones)) == pytest.approx(
            oracle.average_precision_score(positive, score), abs=1e-12)
        assert float(metrics.roc_area(score, positive, ones)) == pytest.approx(
            oracle.roc_auc_score(positive, score), abs=1e-12)


# ---- signs ----

def sign_stats(seed: int = 0) -> torch.Tensor:
    """Of 40 photographs: a quarter of each sign is not known, and no photograph has the last one."""
    torch.manual_seed(seed)
    p, truth = torch.rand(40, 3).mul(10).round().div(10), (torch.rand(40, 3) < 0.4).float()
    truth[:, 2] = 0
    truth[torch.rand(40, 3) < 0.25] = math.nan
    return SIGNS.image_stats(p, truth)


def test_signs_are_scored_where_they_are_known():
    stats = sign_stats()
    m = SIGNS.metrics(stats)
    assert m.pop("unscored") == ["never"]
    for k, name in enumerate(("drusen", "haze")):
        known = ~stats[:, k, 1].isnan()
        lists = stats[known, k, 0].tolist(), (stats[known, k, 1] == 1).tolist()
        assert 20 < len(lists[0]) < 40
        assert m[f"auc_{name}"] == pytest.approx(brute_area(*lists), abs=1e-12)
        assert m[f"aupr_{name}"] == pytest.approx(brute_precision(*lists), abs=1e-12)
    for name in ("auc", "aupr"):  # a sign that does not occur is left out of the mean
        assert math.isnan(m[f"{name}_never"])
        assert m[name] == pytest.approx((m[f"{name}_drusen"] + m[f"{name}_haze"]) / 2)
    unknown = stats.clone()
    unknown[..., 0] = torch.where(stats[..., 1].isnan(), 1 - stats[..., 0], stats[..., 0])
    other = SIGNS.metrics(unknown)
    assert {name: other[name] for name in m} == pytest.approx(m, nan_ok=True)


def test_weights_repeat_photographs():
    task = fine(("0", "2", "2", "0", "3", "3", "0"))
    torch.manual_seed(3)
    of_classes = task.image_stats(torch.rand(40, 7).softmax(1), torch.randint(7, (40,)))
    weights = torch.randint(3, (6, 40)).double()
    for task, stats in ((SIGNS, sign_stats()), (task, of_classes)):
        weighted = task.compute(stats, weights, {})
        for k, number in enumerate(weights.long()):
            listed = stats.repeat_interleave(number, 0)
            for name, value in task.compute(listed, torch.ones(1, len(listed), dtype=torch.float64), {}).items():
                assert float(weighted[name][k]) == pytest.approx(float(value), abs=1e-9, nan_ok=True), name


def test_thresholds_of_signs_are_those_of_youden_where_enough_have_them():
    """Of five drusen the lowest score is 0.7, the next one is 0.6; four photographs with haze are too few."""
    p, truth = torch.zeros(12, 3), torch.zeros(12, 3)
    p[:, 0] = torch.tensor([0.9, 0.8, 0.8, 0.7, 0.7, 0.6, *[0.1] * 6])
    truth[:5] = 1
    truth[:, 2] = 1  # all have it, so that no threshold tells
    p[:5, 1], truth[0, 1] = 0.3, math.nan
    found = SIGNS.calibrate(SIGNS.image_stats(p, truth))
    assert found == {"sign_drusen": pytest.approx(0.65), "sign_haze": 0.5, "sign_never": 0.5,
                     "few": {"sign_haze": [4, 5], "sign_never": [0, 5]}}
    truth[0, 1] = 1
    assert SIGNS.calibrate(SIGNS.image_stats(p, truth))["sign_haze"] == pytest.approx(0.15)


def test_columns_of_signs():
    calibration = {"sign_drusen": 0.65, "sign_haze": 0.5, "sign_never": 0.5}
    columns = SIGNS.predicted_columns(torch.tensor([0.65004, 0.49999, 0.9]), None, calibration)
    assert columns == {"sign_drusen": "yes", "sign_drusen_p": 0.65, "sign_haze": "no", "sign_haze_p": 0.5,
                       "sign_never": "yes", "sign_never_p": 0.9}
    assert SIGNS.caption(columns) == ["signs: drusen, never"]
    assert SIGNS.caption({k: "no" for k in columns}) == ["signs: none"]
    stats = SIGNS.image_stats(torch.tensor([[0.25, 0.5, 1.0]]), torch.tensor([[1.0, math.nan, 0.0]]))
    assert SIGNS.scored_columns(stats[0], {}) == {
        "sign_drusen_p": 0.25, "sign_drusen_true": 1, "sign_haze_p": 0.5, "sign_haze_true": "", "sign_never_p": 1,
        "sign_never_true": 0}


def test_what_is_known_of_signs():
    assert SIGNS.classes_in(torch.tensor([1.0, math.nan, 0.0])) == {"drusen": True, "never": False}
    targets = torch.tensor([[1.0, math.nan, 0.0], [0.0, math.nan, 0.0], [1.0, math.nan, 0.0]])
    assert SIGNS.constant_guess(targets).tolist() == [[pytest.approx(2 / 3), 0, 0]]
    guess = SIGNS.metrics(SIGNS.image_stats(SIGNS.constant_guess(targets).expand(3, 3), targets))
    assert guess["auc"] == 0.5 and guess["aupr"] == pytest.approx(2 / 3)  # what saying the same of all is worth
    assert math.isnan(guess["aupr_haze"]) and math.isnan(guess["auc_haze"])  # known of no photograph


# ---- fine classes ----

P = [[0.30, 0.20, 0.15, 0.12, 0.10, 0.08, 0.05],  # the sixth and the seventh are not among the five
     [0.05, 0.30, 0.25, 0.02, 0.18, 0.17, 0.03], [0.01, 0.02, 0.03, 0.04, 0.40, 0.20, 0.30],
     [0.26, 0.25, 0.24, 0.25, 0.00, 0.00, 0.00]]


def test_the_five_most_probable_classes():
    """Places of the truth: sixth, fourth, first, third."""
    stats = fine().image_stats(torch.tensor(P), torch.tensor([5, 5, 4, 1]))
    m = fine().metrics(stats)
    assert m["top5"] == 0.75 and m["accuracy"] == 0.25 and not {"broad_accuracy", "kappa", "broad_kappa"} & m.keys()
    few = fine(number=3)  # of three classes all are among the five
    assert few.metrics(few.image_stats(torch.tensor(P)[:, :3].softmax(1), torch.tensor([2, 2, 2, 2])))["top5"] == 1


def test_broad_classes_by_hand():
    """Grades 0 (a, d, g), 2 (b, c) and 10 (e, f): sums of .47 .35 .18, .10 .55 .35, .35 .05 .60, .51 .49 0."""
    task = fine(("0", "2", "2", "0", "10", "10", "0"))
    m = task.metrics(task.image_stats(torch.tensor(P), torch.tensor([5, 5, 4, 1])))
    truth, predicted = (10, 10, 10, 2), (0, 2, 10, 0)
    assert m["broad_accuracy"] == 0.25
    pairs = sum((t - p) ** 2 for t, p in zip(truth, predicted)) / 4
    chance = sum((t - p) ** 2 for t in truth for p in predicted) / 16
    assert m["broad_kappa"] == pytest.approx(1 - pairs / chance, abs=1e-12)
    words = fine(("no", "some", "some", "no", "much", "much", "no"))
    n = words.metrics(words.image_stats(torch.tensor(P), torch.tensor([5, 5, 4, 1])))
    assert n["broad_accuracy"] == 0.25 and "broad_kappa" not in n


def test_columns_of_fine_classes():
    task, calibration = fine(), {"temperature": 1.0}
    columns = task.predicted_columns(torch.tensor(P[1]), None, calibration)
    assert columns == {"fine": "b", "fine_1": "b", "fine_1_p": 0.3, "fine_2": "c", "fine_2_p": 0.25, "fine_3": "e",
                       "fine_3_p": 0.18, "fine_4": "f", "fine_4_p": 0.17, "fine_5": "a", "fine_5_p": 0.05}
    assert task.caption(columns) == ["fine class b (p 0.30)"]
    stats = task.image_stats(torch.tensor(P[1:2]), torch.tensor([6]))
    assert task.scored_columns(stats[0], calibration) == columns | {"fine_true": "g"}
    warm = task.predicted_columns(torch.tensor(P[1]), None, {"temperature": 1e6})
    assert warm["fine"] == "b" and warm["fine_1_p"] == pytest.approx(1 / 7, abs=1e-4)
    two = fine(number=2).predicted_columns(torch.tensor([0.25, 0.75]), None, calibration)
    assert two == {"fine": "b", "fine_1": "b", "fine_1_p": 0.75, "fine_2": "a", "fine_2_p": 0.25}


@pytest.mark.parametrize("measure,words", [
    ("auc_hard_exudates", "macro one-vs-rest AUROC, hard_exudates"),
    ("dice_MA_per_image", "Dice, MA, mean over images"),
    ("balanced_accuracy", "balanced accuracy"), ("referable_auc", "referable: AUROC"), ("my_own", "my own")])
def test_names_of_classes_stay_whole_in_words(measure, words):
    assert tables.spelled_out(measure) == words
