"""Losses, targets and decoding of the tasks, against their formulas and by hand."""

import math

import pytest
import torch

import tasks
from retina.datasets import readers, records, synthetic
from retina.datasets.records import UNKNOWN
from tasks import TASKS


def test_lesion_loss_by_hand():
    output = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2).expand(1, 5, 1, 2)
    target = torch.tensor([0, 1]).view(1, 1, 1, 2).expand(1, 5, 1, 2)
    p = [0.5, 1 / (1 + math.exp(-2))]
    cross_entropy = -(math.log(1 - p[0]) + math.log(p[1])) / 2
    soft_dice = (2 * p[1] + 1) / (p[0] + p[1] + 1 + 1)
    assert float(TASKS["seg"].loss(output, target)) == pytest.approx(cross_entropy + 1 - soft_dice)


def test_a_lesion_that_the_batch_lacks_has_cross_entropy_alone():
    """Its Dice would be that of nothing found: a gradient of about 1 on every pixel, for a class that is rare."""
    torch.manual_seed(0)
    output, truth = torch.randn(3, 5, 8, 8, requires_grad=True), torch.zeros(3, 5, 8, 8, dtype=torch.uint8)
    truth[0, 1, :4] = truth[2, 4, 2:5] = 1  # of two classes there is something
    TASKS["seg"].loss(output, truth).backward()
    p = output.detach().sigmoid()
    assert torch.allclose(output.grad[:, [0, 2, 3]], p[:, [0, 2, 3]] / p.numel())
    sums = [(p * truth).sum((0, 2, 3)), p.sum((0, 2, 3)), truth.sum((0, 2, 3))]
    missed = [1 - float((2 * sums[0][k] + 1) / (sums[1][k] + sums[2][k] + 1)) for k in (1, 4)]
    entropy = float(torch.nn.functional.binary_cross_entropy(p, truth.float()))
    assert float(TASKS["seg"].loss(output, truth).detach()) == pytest.approx(entropy + sum(missed) / 2, rel=1e-5)
    assert float(TASKS["seg"].loss(output, 0 * truth).detach()) == pytest.approx(float(-(1 - p).log().mean()), rel=1e-5)


def test_masks_that_are_not_known_change_nothing():
    """Loss and metrics with unknown masks are those of the known ones alone, whatever the network says there."""
    torch.manual_seed(0)
    task, output, truth = TASKS["seg"], torch.randn(4, 5, 8, 8), torch.rand(4, 5, 8, 8).gt(0.7).byte()
    truth[1:, 0] = truth[2, 3] = UNKNOWN
    other = torch.where(truth == UNKNOWN, 9.0, output)
    assert float(task.loss(output, truth)) == float(task.loss(other, truth))
    a, b = (task.metrics(task.image_stats(task.decode(x), truth)) for x in (output, other))
    assert a == pytest.approx(b, nan_ok=True)
    first = task.metrics(task.image_stats(task.decode(output[:1]), truth[:1]))
    assert a["dice_MA"] == first["dice_MA"] == a["dice_MA_per_image"]  # known for the first photograph only
    three = [0, 1, 3]
    assert a["dice_SE"] == task.metrics(task.image_stats(task.decode(output[three]), truth[three]))["dice_SE"]
    known = (truth != UNKNOWN).float()  # cross-entropy by hand
    p = output.sigmoid()
    entropy = -((truth == 1) * p.log() + (truth == 0) * (1 - p).log()).sum() / known.sum()
    p, true = p * known, (truth == 1).float()
    soft_dice = (2 * (p * true).sum((0, 2, 3)) + 1) / (p.sum((0, 2, 3)) + true.sum((0, 2, 3)) + 1)
    assert float(task.loss(output, truth)) == pytest.approx(float(entropy + 1 - soft_dice.mean()), rel=1e-5)


def test_what_files_hold_is_what_tasks_expect():
    assert tasks.Lesions.classes == synthetic.LESIONS == tuple(readers.MASK_FOLDERS)
    assert tasks.Landmarks.classes == records.LANDMARKS and UNKNOWN == records.UNKNOWN
    assert (tasks.Grading.classes, tasks.Edema.classes) == (records.GRADES, records.EDEMA_RISKS)


LOC = TASKS["loc"]


# ---- points ----

def loc_target(points, original=(4288.0, 4288.0)) -> torch.Tensor:
    """Targets (n, 4, 2) of photographs whose whole width the sample shows."""
    points = torch.tensor(points)
    units = torch.tensor([[0.0, 0.0], original, original, [1 / tasks.DISC_DIAMETER] * 2])
    return torch.cat([points, units.expand(len(points), 4, 2)], 1)


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
    single = LOC.loss(output[1:2, [1, 1]], target[1:2, [1, 1, 2, 3, 4, 5]])
    assert float(LOC.loss(output, target)) == pytest.approx(float((both + single) / 3), rel=1e-5)
    assert float(LOC.loss(output[2:], target[2:])) == 0
    output.requires_grad_()
    LOC.loss(output, target).backward()
    assert output.grad.isfinite().all() and not output.grad[2].any()
    stats = LOC.image_stats(LOC.decode(output.detach()), target)
    m = LOC.metrics(stats)
    assert m["px4288_disc"] == pytest.approx(float(stats[0, 0, 0])) and not any(v != v for v in m.values())
    row = LOC.scored_columns(stats[1], {})
    assert list(row) == list(LOC.scored_columns(stats[0], {}))
    empty = [column for column, value in row.items() if value == ""]
    assert empty == ["disc_px4288", "disc_diameters", "disc_x_true", "disc_y_true"]
    assert "px4288_disc" not in LOC.metrics(LOC.image_stats(LOC.decode(output.detach())[2:], target[2:]))
