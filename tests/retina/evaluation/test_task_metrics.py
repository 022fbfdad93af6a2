"""Measures of each kind of task against brute force and by hand."""

import math

import numpy as np
import pytest
import torch
from test_tasks import LOC, loc_target

import tasks
from retina.datasets import preprocess
from retina.datasets.records import UNKNOWN
from retina.evaluation import task_metrics
from retina.evaluation.compare import calibration_line
from retina.evaluation.metrics import dice
from tasks import TASKS


def test_grading_metrics_from_stats():
    task = TASKS["cls"]
    answer = torch.eye(5)[[0, 1, 2, 2]]
    stats = task.image_stats(answer, torch.tensor([0, 1, 2, 4]))
    m = task.metrics(stats)
    assert m["accuracy"] == 0.75 and m["confusion"][4][2] == 1 and sum(map(sum, m["confusion"])) == 4
    assert task.scored_columns(stats[3], {"temperature": 1.0, "referable": 0.5}) == {
        "grade": 2, "grade_p0": 0, "grade_p1": 0, "grade_p2": 1, "grade_p3": 0, "grade_p4": 0, "grade_true": 4,
        "referable": "yes", "referable_p": 1, "referable_threshold": 0.5}


# ---- what is fitted on validation ----

def graded(number: int, ill: int) -> torch.Tensor:
    """Statistics of a network that is far too sure and half of the time wrong; the first `ill` have grade 2."""
    p, truth = torch.full((number, 5), 0.0025), 2 * (torch.arange(number) < ill)
    p[torch.arange(number), (truth + torch.arange(number) % 2) % 3] = 0.99
    return torch.cat([p, truth[:, None]], 1)


def test_a_temperature_is_fitted_on_forty_photographs_or_stays_one():
    for name, stats in (("cls", graded(39, 20)), ("dme", graded(39, 20)[:, [0, 1, 2, 5]])):
        found = TASKS[name].calibrate(stats)
        assert found["temperature"] == 1 and found["few"] == {"temperature": [39, 40]}
        one_more = TASKS[name].calibrate(torch.cat([stats, stats[:1]]))
        assert one_more["temperature"] > 3 and "few" not in one_more
    assert "dme temperature 1" in calibration_line({"dme": found})
    assert calibration_line({"dme": found}).endswith(
        "\nleft as they were, of so many photographs that it takes: dme temperature 39 of 40")
    assert "\n" not in calibration_line({"dme": one_more})


@pytest.mark.parametrize("ill", [4, 56])
def test_a_threshold_of_few_ill_or_of_few_others_stays_a_half(ill):
    found = TASKS["cls"].calibrate(graded(60, ill))
    assert found["referable"] == 0.5 and found["few"] == {"referable": [4, 5]}
    assert TASKS["cls"].calibrate(graded(60, ill + (1 if ill < 30 else -1)))["referable"] != 0.5


def test_referable_is_decided_by_the_numbers_that_are_shown():
    """0.42996 and a threshold of 0.43003 both read 0.43; so do the sensitivity and the row go by 0.43."""
    task, calibration = TASKS["cls"], {"temperature": 1.0, "referable": 0.43003}
    stats = torch.tensor([[0.57004, 0, 0.42996, 0, 0, 2], [0.5702, 0, 0.4298, 0, 0, 2], [0.8, 0, 0.2, 0, 0, 0]])
    columns = [task.predicted_columns(row[:5], None, calibration) for row in stats]
    assert [(c["referable"], c["referable_p"], c["referable_threshold"]) for c in columns] == [
        ("yes", 0.43, 0.43), ("no", 0.4298, 0.43), ("no", 0.2, 0.43)]
    assert task.metrics(stats, calibration)["referable_sensitivity"] == 0.5
    assert task.caption(columns[0])[1] == "referable: yes (p 0.4300, threshold 0.4300)"


def test_tables_and_measures_agree_on_who_is_referable():
    """At a fitted temperature and threshold, on photographs close to it."""
    torch.manual_seed(0)
    p = (torch.randn(400, 5) * 0.02).softmax(1)
    task, stats = TASKS["cls"], torch.cat([p, torch.randint(5, (400, 1)).float()], 1)
    calibration = task.calibrate(stats) | {"temperature": 1.7}
    rows = [task.scored_columns(s, calibration) for s in stats]
    assert all((r["referable"] == "yes") == (r["referable_p"] >= r["referable_threshold"]) for r in rows)
    found = [r["referable"] == "yes" for r in rows if r["grade_true"] >= 2]
    assert task.metrics(stats, calibration)["referable_sensitivity"] == pytest.approx(sum(found) / len(found))
    assert calibration["referable"] == round(calibration["referable"], 4)


def test_lesion_metrics_equal_brute_force_over_pixels():
    torch.manual_seed(0)
    task, p = TASKS["seg"], torch.rand(3, 5, 8, 8)
    truth = torch.rand(3, 5, 8, 8) > 0.7
    truth[0, 3] = False
    p[0, 3] = 0.1  # nothing there and nothing predicted
    m = task.metrics(torch.cat([task.image_stats(p[i:i + 1], truth[i:i + 1].byte()) for i in range(3)]))
    predicted = p > 0.5

    def brute(a, b):
        both, either = (a & b).sum().item(), a.sum().item() + b.sum().item()
        return (2 * both / either, both / (either - both)) if either else (1.0, 1.0)

    for c, lesion in enumerate(task.classes):
        assert (m[f"dice_{lesion}"], m[f"iou_{lesion}"]) == pytest.approx(brute(predicted[:, c], truth[:, c]))
        images = [brute(predicted[i, c], truth[i, c]) for i in range(3)]
        assert m[f"dice_{lesion}_per_image"] == pytest.approx(sum(d for d, _ in images) / 3)
        assert m[f"iou_{lesion}_per_image"] == pytest.approx(sum(j for _, j in images) / 3)
    for name in ("dice", "iou", "aupr", "dice_per_image", "iou_per_image"):  # never the disc
        what, _, per = name.partition("_")
        one_each = [m["_".join(filter(None, (what, k, per)))] for k in ("MA", "HE", "EX", "SE")]
        assert m[name] == pytest.approx(sum(one_each) / 4)
    five = [brute(predicted[i], truth[i])[0] for i in range(3)]
    assert m["five_masks_dice"] == pytest.approx(sum(five) / 3)
    disc = torch.zeros_like(truth)
    disc[:, 4] = truth[:, 4]
    of_disc = [brute(disc[i], truth[i])[0] for i in range(3)]
    assert m["five_masks_dice_of_true_disc"] == pytest.approx(sum(of_disc) / 3)


def test_areas_of_lesions_equal_a_sort_of_all_pixels():
    torch.manual_seed(1)
    task, p = TASKS["seg"], torch.randn(4, 5, 16, 16).sigmoid()
    truth = torch.rand(4, 5, 16, 16) < p * 0.5
    truth[2, 1] = False
    accumulator = task.accumulator()
    stats = torch.cat([task.image_stats(p[i:i + 2], truth[i:i + 2].byte(), accumulator) for i in (0, 2)])
    m = task.metrics(stats, accumulator=accumulator)
    for c, lesion in enumerate(task.classes):
        assert m[f"aupr_{lesion}"] == pytest.approx(brute_area(p[:, c], truth[:, c]), abs=1e-6)
        images = [brute_area(p[i, c], truth[i, c]) for i in range(4) if truth[i, c].any()]
        assert m[f"aupr_{lesion}_per_image"] == pytest.approx(sum(images) / len(images), abs=1e-6)
    coarse = task.metrics(stats)  # what resamples are made of
    assert coarse["aupr"] == pytest.approx(m["aupr"], abs=0.01) and coarse["dice"] == m["dice"]


def brute_area(score, truth):
    """For every true pixel the precision at its score; their mean."""
    score, truth = score.flatten(), truth.flatten()
    precision = [(truth[score >= s]).double().mean() for s in score[truth]]
    return float(sum(precision) / len(precision))


def test_measures_of_resamples_are_those_of_the_photographs_in_them():
    """Weights that count photographs twice, or not at all, give what listing them twice, or not at all, gives."""
    torch.manual_seed(2)
    n, S = 9, 8
    masks = torch.rand(n, 5, S, S).gt(0.7).byte()
    masks[3, 1] = UNKNOWN
    masks[4:, 3] = 0
    units = torch.tensor([[0.0, 0], [64, 64], [4288, 4288], [6, 6]])
    points = torch.cat([torch.rand(n, 2, 2), units.expand(n, 4, 2)], 1)
    points[2, 1] = math.nan
    stats = {"cls": TASKS["cls"].image_stats(torch.rand(n, 5).softmax(1), torch.arange(n) % 5),
             "dme": TASKS["dme"].image_stats(torch.rand(n, 3).softmax(1), torch.arange(n) % 3),
             "seg": TASKS["seg"].image_stats(torch.rand(n, 5, S, S), masks),
             "loc": LOC.image_stats(torch.rand(n, 2, 2), points), "joint": torch.rand(n).round()}
    resamples = torch.randint(n, (6, n))
    resamples[0] = torch.tensor([4, 5, 6, 7, 8, 4, 5, 6, 7])  # no soft exudate
    weights = torch.stack([torch.bincount(r, minlength=n) for r in resamples]).double()
    for name, of_task in stats.items():
        task = TASKS.get(name, task_metrics.Joint())
        calibration = task.calibrate(of_task)
        weighted = task.compute(of_task, weights, calibration)
        for k, resample in enumerate(resamples):
            listed = task.compute(of_task[resample], torch.ones(1, n, dtype=torch.float64), calibration)
            for measure, value in listed.items():
                assert float(weighted[measure][k]) == pytest.approx(float(value[0]), abs=1e-9, nan_ok=True), measure


def test_thresholds_of_masks_are_those_of_the_highest_pooled_dice():
    torch.manual_seed(3)
    task, p = TASKS["seg"], torch.rand(6, 5, 16, 16)
    truth = (torch.rand(6, 5, 16, 16) < p.square()).byte()
    truth[4:, 3] = 0  # four photographs are too few
    stats = task.image_stats(p, truth)
    calibration = task.calibrate(stats)
    assert calibration["SE"] == 0.5 and calibration["few"] == {"SE": [4, 5]}
    for c, lesion in enumerate(("MA", "HE", "EX")):
        def pooled(threshold, c=c):
            mask = p[:, c] >= threshold
            return float(dice(torch.stack([(mask & (truth[:, c] == 1)).sum(), mask.sum(), truth[:, c].sum()])))
        best, threshold = max(map(pooled, p[:, c].flatten().tolist())), calibration[lesion]
        assert best - 0.005 < pooled(threshold) <= best
        assert task.metrics(stats, calibration)[f"dice_calibrated_{lesion}"] == pytest.approx(pooled(threshold))


def test_a_class_that_occurs_nowhere_does_not_lift_the_mean():
    truth, p = torch.zeros(2, 5, 8, 8, dtype=torch.uint8), torch.zeros(2, 5, 8, 8)
    truth[:, 1] = 1  # haemorrhages only, and nothing is predicted
    m = TASKS["seg"].metrics(TASKS["seg"].image_stats(p, truth))
    assert (m["lesions"], m["dice"], m["dice_per_image"], m["dice_HE"], m["dice_MA_per_image"]) == (1, 0, 0, 0, 1)
    assert math.isnan(m["dice_MA"]) and math.isnan(m["iou_MA"]) and math.isnan(m["aupr_MA"])  # pooled: not defined


def test_a_class_that_is_never_known_has_no_value_and_no_column():
    truth = torch.zeros(2, 5, 8, 8, dtype=torch.uint8)
    truth[:, 2] = UNKNOWN
    truth[:, 0] = 1
    stats = TASKS["seg"].image_stats(torch.ones(2, 5, 8, 8), truth)
    m = TASKS["seg"].metrics(stats)
    assert m["dice_MA"] == 1 and "dice_EX" not in m and "aupr_EX" not in m and m["dice"] == 1
    assert "five_masks_dice" not in m  # five are not known of any photograph
    columns = TASKS["seg"].scored_columns(stats[0], {})
    assert columns["dice_EX"] == columns["pixels_EX_true"] == ""
    assert columns["pixels_MA_true"] == 64 and columns["dice_MA"] == 1


# ---- points ----

def test_distances_by_hand():
    """3 and 4 hundredths of the side apart, of which 4000 (wide) and 3000 (high) pixels are the original's."""
    target = loc_target([[[0.5, 0.5], [0.2, 0.2]], [[0.5, 0.5], [0.2, 0.2]]], (4000.0, 3000.0))
    answer = torch.tensor([[[0.53, 0.54], [0.2, 0.2]], [[0.5, 0.5], [0.2, 0.29]]])
    m = LOC.metrics(LOC.image_stats(answer, target))
    assert m["px4288_disc"] == pytest.approx(math.hypot(120, 120) / 2)
    assert m["diameters_disc"] == pytest.approx(0.05 / tasks.DISC_DIAMETER / 2)
    assert m["within_radius_disc"] == 1 and m["within_radius_fovea"] == 0.5  # 0.09 is more than half of 0.154
    assert m["within_radius"] == 0.75


def test_distances_are_in_pixels_of_the_original():
    """A file half as wide as the originals, squeezed into a square: one of its pixels is two of theirs either way."""
    geometry = preprocess.Geometry(2144, 1072, 64 / 2144, 64 / 1072, 3.0, -2.0)

    def target(x, y):
        points = torch.from_numpy(geometry.to_sample(np.array([[x, y], [5.0, 5.0]]))).float()
        sample = preprocess.Sample("x", torch.zeros(3, 64, 64), {"landmarks": points}, geometry, "x")
        return LOC.target(sample)[None]
    a, b = target(700.0, 900.0), target(730.0, 940.0)
    assert float(LOC.image_stats(b[:, :2], a)[0, 0, 0]) == pytest.approx(100, rel=1e-4)  # 30 and 40 of the file's
    assert float(LOC.image_stats(b[:, :2], a)[0, 1, 0]) == 0
    assert LOC.image_stats(b[:, :2], a)[0, 0, 2:].tolist() == pytest.approx([730, 940, 700, 900], rel=1e-4)
