"""Metrics against brute force and values worked out by hand; losses against their formulas."""

import math
import random

import pytest
import torch

import data
import tasks
from tasks import TASKS, confusion_matrix, dice, iou, macro_f1, quadratic_kappa


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
    m = task.metrics(torch.cat([task.tally(p[i:i + 1], truth[i:i + 1]) for i in range(3)]))
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
    truth, found = torch.zeros(2, 5, 8, 8, dtype=torch.bool), torch.zeros(2, 5, 8, 8)
    truth[:, 1] = True  # haemorrhages only, and nothing is found
    m = TASKS["seg"].metrics(TASKS["seg"].tally(found, truth))
    assert (m["lesions"], m["dice"], m["dice_per_image"], m["dice_HE"], m["dice_MA"]) == (1, 0, 0, 0, 1)


def test_lesion_loss_by_hand():
    output = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2).expand(1, 5, 1, 2)
    target = torch.tensor([False, True]).view(1, 1, 1, 2).expand(1, 5, 1, 2)
    p = [0.5, 1 / (1 + math.exp(-2))]
    cross_entropy = -(math.log(1 - p[0]) + math.log(p[1])) / 2
    soft_dice = (2 * p[1] + 1) / (p[0] + p[1] + 1 + 1)
    assert float(TASKS["seg"].loss(output, target)) == pytest.approx(cross_entropy + 1 - soft_dice)


def test_channels_of_masks_have_one_order():
    assert tasks.Lesions.classes == data.LESIONS == tuple(data.MASK_FOLDERS)
