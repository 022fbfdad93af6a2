"""What tasks make of the measures, against brute force and by hand; losses against their formulas."""

import math

import numpy as np
import pytest
import torch

import tasks
from retina.datasets import preprocess, readers, records, synthetic
from retina.datasets.records import UNKNOWN
from retina.evaluation import task_metrics
from retina.evaluation.metrics import dice
from tasks import TASKS


def test_grading_metrics_from_tallies():
    task = TASKS["cls"]
    answer = torch.eye(5)[[0, 1, 2, 2]]
    tally = task.tally(answer, torch.tensor([0, 1, 2, 4]))
    m = task.metrics(tally)
    assert m["accuracy"] == 0.75 and m["confusion"][4][2] == 1 and sum(map(sum, m["confusion"])) == 4
    assert task.row(tally[3]) == {"truth": 4, "predicted": 2, "p0": 0, "p1": 0, "p2": 1, "p3": 0, "p4": 0}


def test_lesion_metrics_equal_brute_force_over_pixels():
    torch.manual_seed(0)
    task, p = TASKS["seg"], torch.rand(3, 5, 8, 8)
    truth = torch.rand(3, 5, 8, 8) > 0.7
    truth[0, 3] = False
    p[0, 3] = 0.1  # nothing there and nothing found
    m = task.metrics(torch.cat([task.tally(p[i:i + 1], truth[i:i + 1].byte()) for i in range(3)]))
    predicted = p > 0.5

    def brute(a, b):
        both, either = (a & b).sum().item(), a.sum().item() + b.sum().item()
        return (2 * both / either, both / (either - both)) if either else (1.0, 1.0)

    for c, kind in enumerate(task.classes):
        assert (m[f"dice_{kind}"], m[f"iou_{kind}"]) == pytest.approx(brute(predicted[:, c], truth[:, c]))
        images = [brute(predicted[i, c], truth[i, c]) for i in range(3)]
        assert m[f"dice_{kind}_per_image"] == pytest.approx(sum(d for d, _ in images) / 3)
        assert m[f"iou_{kind}_per_image"] == pytest.approx(sum(j for _, j in images) / 3)
    for name in ("dice", "iou", "aupr", "dice_per_image", "iou_per_image"):  # never the disc
        what, _, per = name.partition("_")
        one_each = [m["_".join(filter(None, (what, k, per)))] for k in ("MA", "HE", "EX", "SE")]
        assert m[name] == pytest.approx(sum(one_each) / 4)
    five = [brute(predicted[i], truth[i])[0] for i in range(3)]
    assert m["five_masks_dice"] == pytest.approx(sum(five) / 3)
    disc = torch.zeros_like(truth)
    disc[:, 4] = truth[:, 4]
    alone = [brute(disc[i], truth[i])[0] for i in range(3)]
    assert m["five_masks_dice_of_disc_alone"] == pytest.approx(sum(alone) / 3)


def test_areas_of_lesions_equal_a_sort_of_all_pixels():
    torch.manual_seed(1)
    task, p = TASKS["seg"], torch.randn(4, 5, 16, 16).sigmoid()
    truth = torch.rand(4, 5, 16, 16) < p * 0.5
    truth[2, 1] = False
    pool = task.pool()
    tally = torch.cat([task.tally(p[i:i + 2], truth[i:i + 2].byte(), pool) for i in (0, 2)])
    m = task.metrics(tally, pool=pool)
    for c, kind in enumerate(task.classes):
        assert m[f"aupr_{kind}"] == pytest.approx(brute_area(p[:, c], truth[:, c]), abs=1e-6)
        images = [brute_area(p[i, c], truth[i, c]) for i in range(4) if truth[i, c].any()]
        assert m[f"aupr_{kind}_per_image"] == pytest.approx(sum(images) / len(images), abs=1e-6)
    coarse = task.metrics(tally)  # what resamples are made of
    assert coarse["aupr"] == pytest.approx(m["aupr"], abs=0.01) and coarse["dice"] == m["dice"]


def brute_area(score, truth):
    """For every true pixel the precision at its score; their mean."""
    score, truth = score.flatten(), truth.flatten()
    precision = [(truth[score >= s]).double().mean() for s in score[truth]]
    return float(sum(precision) / len(precision))


def test_measures_of_resamples_are_those_of_the_photographs_that_were_drawn():
    """Weights that count photographs twice, or not at all, give what listing them twice, or not at all, gives."""
    torch.manual_seed(2)
    n, S = 9, 8
    masks = torch.rand(n, 5, S, S).gt(0.7).byte()
    masks[3, 1] = UNKNOWN
    masks[4:, 3] = 0
    units = torch.tensor([[0.0, 0], [64, 64], [4288, 4288], [6, 6]])
    points = torch.cat([torch.rand(n, 2, 2), units.expand(n, 4, 2)], 1)
    points[2, 1] = math.nan
    tallies = {"cls": TASKS["cls"].tally(torch.rand(n, 5).softmax(1), torch.arange(n) % 5),
               "dme": TASKS["dme"].tally(torch.rand(n, 3).softmax(1), torch.arange(n) % 3),
               "seg": TASKS["seg"].tally(torch.rand(n, 5, S, S), masks),
               "loc": LOC.tally(torch.rand(n, 2, 2), points), "joint": torch.rand(n).round()}
    draws = torch.randint(n, (6, n))
    draws[0] = torch.tensor([4, 5, 6, 7, 8, 4, 5, 6, 7])  # no soft exudate
    weights = torch.stack([torch.bincount(d, minlength=n) for d in draws]).double()
    for name, tally in tallies.items():
        task = TASKS.get(name, task_metrics.Joint())
        chosen = task.choose(tally)
        found = task.measures(tally, weights, chosen)
        for k, drawn in enumerate(draws):
            listed = task.measures(tally[drawn], torch.ones(1, n, dtype=torch.float64), chosen)
            for measure, value in listed.items():
                assert float(found[measure][k]) == pytest.approx(float(value[0]), abs=1e-9, nan_ok=True), measure


def test_thresholds_of_masks_are_those_of_the_highest_pooled_dice():
    torch.manual_seed(3)
    task, p = TASKS["seg"], torch.rand(2, 5, 16, 16)
    truth = (torch.rand(2, 5, 16, 16) < p.square()).byte()
    truth[:, 3] = 0
    tally = task.tally(p, truth)
    chosen = task.choose(tally)
    assert chosen["SE"] == 0.5
    for c, kind in enumerate(("MA", "HE", "EX")):
        def pooled(threshold, c=c):
            found = p[:, c] >= threshold
            return float(dice(torch.stack([(found & (truth[:, c] == 1)).sum(), found.sum(), truth[:, c].sum()])))
        best = max(map(pooled, p[:, c].flatten().tolist()))
        assert best - 0.005 < pooled(chosen[kind]) <= best
        assert task.metrics(tally, chosen)[f"dice_chosen_{kind}"] == pytest.approx(pooled(chosen[kind]))


def test_a_kind_that_occurs_nowhere_does_not_lift_the_mean():
    truth, found = torch.zeros(2, 5, 8, 8, dtype=torch.uint8), torch.zeros(2, 5, 8, 8)
    truth[:, 1] = 1  # haemorrhages only, and nothing is found
    m = TASKS["seg"].metrics(TASKS["seg"].tally(found, truth))
    assert (m["lesions"], m["dice"], m["dice_per_image"], m["dice_HE"], m["dice_MA_per_image"]) == (1, 0, 0, 0, 1)
    assert math.isnan(m["dice_MA"]) and math.isnan(m["iou_MA"]) and math.isnan(m["aupr_MA"])  # pooled: not defined


def test_lesion_loss_by_hand():
    output = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2).expand(1, 5, 1, 2)
    target = torch.tensor([0, 1]).view(1, 1, 1, 2).expand(1, 5, 1, 2)
    p = [0.5, 1 / (1 + math.exp(-2))]
    cross_entropy = -(math.log(1 - p[0]) + math.log(p[1])) / 2
    soft_dice = (2 * p[1] + 1) / (p[0] + p[1] + 1 + 1)
    assert float(TASKS["seg"].loss(output, target)) == pytest.approx(cross_entropy + 1 - soft_dice)


def test_masks_that_are_not_known_change_nothing():
    """Loss and metrics with unknown masks are those of the known ones alone, whatever the network says there."""
    torch.manual_seed(0)
    task, output, truth = TASKS["seg"], torch.randn(4, 5, 8, 8), torch.rand(4, 5, 8, 8).gt(0.7).byte()
    truth[1:, 0] = truth[2, 3] = UNKNOWN
    other = torch.where(truth == UNKNOWN, 9.0, output)
    assert float(task.loss(output, truth)) == float(task.loss(other, truth))
    a, b = (task.metrics(task.tally(task.decode(x), truth)) for x in (output, other))
    assert a == pytest.approx(b, nan_ok=True)
    first = task.metrics(task.tally(task.decode(output[:1]), truth[:1]))
    assert a["dice_MA"] == first["dice_MA"] == a["dice_MA_per_image"]  # known for the first photograph only
    three = [0, 1, 3]
    assert a["dice_SE"] == task.metrics(task.tally(task.decode(output[three]), truth[three]))["dice_SE"]
    kind = torch.where(truth != UNKNOWN, 1.0, 0.0)  # cross-entropy by hand
    p = output.sigmoid()
    entropy = -((truth == 1) * p.log() + (truth == 0) * (1 - p).log()).sum() / kind.sum()
    p, true = p * kind, (truth == 1).float()
    soft_dice = (2 * (p * true).sum((0, 2, 3)) + 1) / (p.sum((0, 2, 3)) + true.sum((0, 2, 3)) + 1)
    assert float(task.loss(output, truth)) == pytest.approx(float(entropy + 1 - soft_dice.mean()), rel=1e-5)


def test_a_kind_that_is_never_known_has_no_value_and_no_column():
    truth = torch.zeros(2, 5, 8, 8, dtype=torch.uint8)
    truth[:, 2] = UNKNOWN
    truth[:, 0] = 1
    tally = TASKS["seg"].tally(torch.ones(2, 5, 8, 8), truth)
    m = TASKS["seg"].metrics(tally)
    assert m["dice_MA"] == 1 and "dice_EX" not in m and "aupr_EX" not in m and m["dice"] == 1
    assert "five_masks_dice" not in m  # five are not known of any photograph
    row = TASKS["seg"].row(tally[0])
    assert row["dice_EX"] == row["true_pixels_EX"] == "" and row["true_pixels_MA"] == 64 and row["dice_MA"] == 1


def test_what_files_hold_is_what_tasks_expect():
    assert tasks.Lesions.classes == synthetic.LESIONS == tuple(readers.MASK_FOLDERS)
    assert tasks.Landmarks.classes == records.POINTS and UNKNOWN == records.UNKNOWN
    assert (tasks.Grading.classes, tasks.Edema.classes) == (records.GRADES, records.EDEMA_RISKS)


# ---- points ----

LOC = TASKS["loc"]


def loc_target(points, original=(4288.0, 4288.0)) -> torch.Tensor:
    """Targets (n, 4, 2) of photographs whose whole width the sample shows."""
    points = torch.tensor(points)
    rows = torch.tensor([[0.0, 0.0], original, original, [1 / tasks.DISC_DIAMETER] * 2])
    return torch.cat([points, rows.expand(len(points), 4, 2)], 1)


def test_soft_argmax_reads_a_peak_and_a_mean():
    logits = torch.full((1, 2, 4, 8), -50.0)
    logits[0, 0, 1, 6] = 50  # centre of that cell: x = 6.5 of 8, y = 1.5 of 4
    logits[0, 1, 0, 0] = logits[0, 1, 3, 7] = 50  # two peaks: their middle
    points, p = tasks.soft_argmax(logits)
    assert torch.allclose(points[0], torch.tensor([[6.5 / 8, 1.5 / 4], [0.5, 0.5]]))
    assert torch.allclose(p.sum((2, 3)), torch.ones(1, 2))


def test_gaussian_heatmap_equals_its_formula():
    heatmap = tasks.gaussian_heatmap(torch.tensor([[[0.3, 0.6]]]), 6, 10)[0, 0]
    brute = torch.tensor([[math.exp(-((x + 0.5 - 3) ** 2 + (y + 0.5 - 3.6) ** 2) / 2) for x in range(10)]
                          for y in range(6)])
    assert torch.allclose(heatmap, brute / brute.sum(), atol=1e-7)


def test_js_divergence_by_hand():
    p, q = (torch.tensor(v).view(1, 1, 1, 2) for v in ([1.0, 0.0], [0.5, 0.5]))
    expected = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert float(tasks.js_divergence(p, q)) == pytest.approx(expected, abs=1e-6)
    assert float(tasks.js_divergence(p, 1 - p)) == pytest.approx(math.log(2), abs=1e-6)  # nothing in common
    assert float(tasks.js_divergence(q, q)) == 0


def test_the_loss_of_points_leads_to_them():
    torch.manual_seed(0)
    logits = torch.zeros(3, 2, 16, 16, requires_grad=True)
    target = loc_target([[[0.21, 0.43], [0.77, 0.5]], [[0.8, 0.2], [0.33, 0.66]], [[0.5, 0.5], [0.2, 0.75]]])
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        LOC.loss(logits, target).backward()
        optimizer.step()
    assert (LOC.decode(logits) - target[:, :2]).abs().max() < 0.01
    assert float(LOC.loss(logits, target).detach()) < 0.02


def test_the_loss_of_points_by_hand():
    """One cell has all the weight: its centre against the point, and its divergence from the Gaussian around that."""
    logits = torch.full((1, 2, 4, 4), -60.0)
    logits[:, :, 1, 2] = 60  # at (0.625, 0.375)
    target = loc_target([[[0.125, 0.375], [math.nan, math.nan]]])
    distance = 2 * 0.5 - 0.5 / 2  # half the side apart: |d| - beta / 2 with d = 1 and beta = 2 / 4, coordinates -1..1
    gaussian = tasks.gaussian_heatmap(torch.tensor([[[0.125, 0.375]]]), 4, 4)[0, 0]
    q = float(gaussian[1, 2])
    middle = gaussian / 2
    middle[1, 2] += 0.5
    divergence = 0.5 * math.log(1 / float(middle[1, 2])) + 0.5 * float((gaussian * (gaussian / middle).log()).sum())
    assert 0 < q < 0.3 and 0 < divergence < math.log(2)
    assert float(LOC.loss(logits, target)) == pytest.approx(distance + divergence, abs=1e-4)
    near = loc_target([[[0.575, 0.375], [math.nan, math.nan]]])  # within a cell: d^2 / (2 beta)
    without = tasks.js_divergence(logits.flatten(2).softmax(2).view(1, 2, 4, 4)[:, :1],
                                  tasks.gaussian_heatmap(near[:, :1], 4, 4))
    assert float(LOC.loss(logits, near) - without) == pytest.approx(0.1 ** 2 / (2 * 0.5), abs=1e-4)


def test_points_that_are_not_known_change_neither_loss_nor_metrics():
    torch.manual_seed(0)
    output, nan = torch.randn(3, 2, 8, 8), math.nan
    target = loc_target([[[0.2, 0.4], [0.7, 0.5]], [[nan, nan], [0.3, 0.6]], [[nan, nan], [nan, nan]]])
    both = LOC.loss(output[:1], target[:1]) * 2  # of two points
    alone = LOC.loss(output[1:2, [1, 1]], target[1:2, [1, 1, 2, 3, 4, 5]])
    assert float(LOC.loss(output, target)) == pytest.approx(float((both + alone) / 3), rel=1e-5)
    assert float(LOC.loss(output[2:], target[2:])) == 0
    output.requires_grad_()
    LOC.loss(output, target).backward()
    assert output.grad.isfinite().all() and not output.grad[2].any()
    tally = LOC.tally(LOC.decode(output.detach()), target)
    m = LOC.metrics(tally)
    assert m["px4288_disc"] == pytest.approx(float(tally[0, 0, 0])) and not any(v != v for v in m.values())
    row = LOC.row(tally[1])
    assert list(row) == list(LOC.row(tally[0])) and [k for k, v in row.items() if v == ""] == [
        "px4288_disc", "diameters_disc", "true_x_disc", "true_y_disc"]
    assert "px4288_disc" not in LOC.metrics(LOC.tally(LOC.decode(output.detach())[2:], target[2:]))


def test_distances_by_hand():
    """3 and 4 hundredths of the side apart, of which 4000 (wide) and 3000 (high) pixels are the original's."""
    target = loc_target([[[0.5, 0.5], [0.2, 0.2]], [[0.5, 0.5], [0.2, 0.2]]], (4000.0, 3000.0))
    answer = torch.tensor([[[0.53, 0.54], [0.2, 0.2]], [[0.5, 0.5], [0.2, 0.29]]])
    m = LOC.metrics(LOC.tally(answer, target))
    assert m["px4288_disc"] == pytest.approx(math.hypot(120, 120) / 2) and m["diameters_disc"] == pytest.approx(
        0.05 / tasks.DISC_DIAMETER / 2)
    assert m["within_radius_disc"] == 1 and m["within_radius_fovea"] == 0.5  # 0.09 is more than half of 0.154
    assert m["within_radius"] == 0.75


def test_distances_are_in_pixels_of_the_original():
    """A file half as wide as the originals, squeezed into a square: one of its pixels is two of theirs either way."""
    geometry = preprocess.Geometry(2144, 1072, 64 / 2144, 64 / 1072, 3.0, -2.0)

    def target(x, y):
        points = torch.from_numpy(geometry.to_sample(np.array([[x, y], [5.0, 5.0]]))).float()
        sample = preprocess.Sample("x", torch.zeros(3, 64, 64), {"points": points}, geometry, "x")
        return LOC.target(sample)[None]
    a, b = target(700.0, 900.0), target(730.0, 940.0)
    assert float(LOC.tally(b[:, :2], a)[0, 0, 0]) == pytest.approx(100, rel=1e-4)  # 30 and 40 of the file's
    assert float(LOC.tally(b[:, :2], a)[0, 1, 0]) == 0
    assert LOC.tally(b[:, :2], a)[0, 0, 2:].tolist() == pytest.approx([730, 940, 700, 900], rel=1e-4)
