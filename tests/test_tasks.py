"""Metrics against brute force and values worked out by hand; losses against their formulas."""

import math
import random

import numpy as np
import pytest
import torch

import data
import records
import synthetic
import tasks
from tasks import TASKS, UNKNOWN, confusion_matrix, dice, iou, macro_f1, quadratic_kappa


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


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_equal_brute_force(seed):
    rng = random.Random(seed)
    classes = rng.choice([2, 3, 5])
    truth = [rng.randrange(classes) for _ in range(40)]
    predicted = [t if rng.random() < 0.5 else rng.randrange(classes) for t in truth]
    c = confusion_matrix(torch.tensor(truth), torch.tensor(predicted), classes)
    assert all(c[i, j] == sum((t, p) == (i, j) for t, p in zip(truth, predicted))
               for i in range(classes) for j in range(classes))
    assert quadratic_kappa(c) == pytest.approx(brute_kappa(truth, predicted, classes), abs=1e-12)
    assert macro_f1(c) == pytest.approx(brute_f1(truth, predicted, classes), abs=1e-12)


def test_kappa_by_hand():
    assert quadratic_kappa(torch.tensor([[5, 0], [0, 5]])) == 1
    assert quadratic_kappa(torch.tensor([[0, 5], [5, 0]])) == -1
    assert quadratic_kappa(torch.tensor([[4, 4], [1, 1]])) == 0  # prediction independent of truth
    assert quadratic_kappa(torch.tensor([[9, 0], [0, 0]])) == 0  # one class only: 0 / 0


def test_absent_classes_do_not_count_in_f1():
    assert macro_f1(torch.tensor([[3, 0, 0], [0, 2, 0], [0, 0, 0]])) == 1
    assert macro_f1(torch.tensor([[3, 0, 1], [0, 2, 0], [0, 0, 0]])) == pytest.approx((6 / 7 + 1 + 0) / 3)


def test_grading_metrics_from_tallies():
    task = TASKS["cls"]
    answer = torch.eye(5)[[0, 1, 2, 2]]
    tally = task.tally(answer, torch.tensor([0, 1, 2, 4]))
    m = task.metrics(tally)
    assert m["accuracy"] == 0.75 and m["confusion"][4][2] == 1 and sum(map(sum, m["confusion"])) == 4
    assert task.row(tally[3]) == {"truth": 4, "predicted": 2, "p0": 0, "p1": 0, "p2": 1, "p3": 0, "p4": 0}


def test_dice_and_iou_by_hand():
    counts = torch.tensor([[2, 3, 5], [0, 0, 0], [0, 4, 0], [0, 0, 4], [7, 7, 7]])  # both, predicted, true
    assert dice(counts).tolist() == pytest.approx([4 / 8, 1, 0, 0, 1])
    assert iou(counts).tolist() == pytest.approx([2 / 6, 1, 0, 0, 1])


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
    assert m["dice"] == pytest.approx(sum(m[f"dice_{k}"] for k in ("MA", "HE", "EX", "SE")) / 4)  # never the disc


def test_a_kind_that_occurs_nowhere_does_not_lift_the_mean():
    truth, found = torch.zeros(2, 5, 8, 8, dtype=torch.uint8), torch.zeros(2, 5, 8, 8)
    truth[:, 1] = 1  # haemorrhages only, and nothing is found
    m = TASKS["seg"].metrics(TASKS["seg"].tally(found, truth))
    assert (m["lesions"], m["dice"], m["dice_per_image"], m["dice_HE"], m["dice_MA"]) == (1, 0, 0, 0, 1)


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
    assert a == b
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
    assert m["dice_MA"] == 1 and "dice_EX" not in m and not any(v != v for v in m.values()) and m["dice"] == 1
    row = TASKS["seg"].row(tally[0])
    assert row["dice_EX"] == row["true_pixels_EX"] == "" and row["true_pixels_MA"] == 64 and row["dice_MA"] == 1


def test_what_files_hold_is_what_tasks_expect():
    assert tasks.Lesions.classes == synthetic.LESIONS == tuple(records.MASK_FOLDERS)
    assert tasks.Landmarks.classes == records.POINTS and UNKNOWN == data.UNKNOWN
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
    geometry = data.Geometry(2144, 1072, 64 / 2144, 64 / 1072, 3.0, -2.0)

    def target(x, y):
        points = torch.from_numpy(geometry.to_sample(np.array([[x, y], [5.0, 5.0]]))).float()
        return LOC.target(data.Sample("x", torch.zeros(3, 64, 64), None, None, None, None, points, geometry))[None]
    a, b = target(700.0, 900.0), target(730.0, 940.0)
    assert float(LOC.tally(b[:, :2], a)[0, 0, 0]) == pytest.approx(100, rel=1e-4)  # 30 and 40 of the file's
    assert float(LOC.tally(b[:, :2], a)[0, 1, 0]) == 0
    assert LOC.tally(b[:, :2], a)[0, 0, 2:].tolist() == pytest.approx([730, 940, 700, 900], rel=1e-4)
