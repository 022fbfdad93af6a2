"""Drawn photographs: labels follow from what is drawn, and colour or side do not give them away."""

import math

import numpy as np
import pytest

from retina.datasets import synthetic
from retina.datasets.synthetic import CENTRE, DISC_DIAMETER, LESIONS, SEVERE_HAEMORRHAGES, Blob, Eye


def eye(**findings) -> Eye:
    return Eye((0, 0), True, (0.3, 0.5), (0.65, 0.5), 0.48, **findings)


def blobs(lesion: str, number: int, *quadrants: int) -> list[Blob]:
    return [Blob(lesion, 0.4 + 0.2 * (q % 2), 0.4 + 0.2 * (q // 2), 0.01) for q in quadrants for _ in range(number)]


@pytest.mark.parametrize("expected,findings", [
    (0, {}),
    (1, {"lesions": blobs("MA", 9, 0)}),
    (2, {"lesions": blobs("MA", 2, 0) + blobs("HE", 1, 1)}),
    (2, {"lesions": blobs("EX", 1, 1)}),
    (2, {"lesions": blobs("HE", SEVERE_HAEMORRHAGES, 0, 1, 2) + blobs("HE", SEVERE_HAEMORRHAGES - 1, 3)}),
    (3, {"lesions": blobs("HE", SEVERE_HAEMORRHAGES, 0, 1, 2, 3)}),  # 4 quadrants of haemorrhages
    (2, {"lesions": blobs("HE", 1, 0), "beaded": {1}}),
    (3, {"lesions": blobs("HE", 1, 0), "beaded": {1, 2}}),  # 2 quadrants of venous beading
    (3, {"lesions": blobs("HE", 1, 0), "irma": [(0.4, 0.4)]}),  # 1 of IRMA
    (4, {"new_vessels": [(0.3, 0.5)]}),
])
def test_grade_by_hand(expected, findings):
    assert eye(**findings).grade == expected


@pytest.mark.parametrize("expected,lesions", [
    (0, blobs("HE", 5, 1)),
    (1, [Blob("EX", 0.65, 0.5 + 1.01 * DISC_DIAMETER, 0.01)]),
    (2, [Blob("EX", 0.65, 0.5 + 0.99 * DISC_DIAMETER, 0.01), Blob("EX", 0.2, 0.2, 0.01)]),
])
def test_edema_by_hand(expected, lesions):
    assert eye(lesions=lesions).edema_risk == expected


def test_every_grade_and_risk_is_drawn_often():
    eyes = [synthetic.plan(3, i) for i in range(500)]
    for label, number in (("grade", 5), ("edema_risk", 3)):
        counts = np.bincount([getattr(e, label) for e in eyes], minlength=number)
        assert len(counts) == number and counts.min() >= 30


def test_same_seed_same_pixels_and_other_seed_others():
    first, again, other = (synthetic.render(synthetic.plan(seed, 5), 96) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_masks_are_what_is_drawn_and_can_be_seen():
    for i in range(40):
        e = synthetic.plan(4, i)
        image, masks = synthetic.render(e, 128)
        assert image.shape == (128, 128, 3) and masks.shape == (5, 128, 128) and masks.dtype == bool
        classes = {lesion.lesion_class for lesion in e.lesions} | {"OD"}
        assert {name for name, mask in zip(LESIONS, masks) if mask.any()} == classes
        assert (image[masks.any(0)].max(1) > 10).all()  # nothing is outlined in the black outside the field
        for lesion in e.lesions:  # the pixel under each centre is set
            assert masks[LESIONS.index(lesion.lesion_class), int(lesion.y * 128), int(lesion.x * 128)]


def test_area_of_a_round_lesion():
    layer = synthetic.blob(np.zeros((200, 200), np.float32), Blob("MA", 0.5, 0.5, 0.1), 1.0)
    assert abs((layer >= 0.5).sum() - math.pi * 20 ** 2) < 25


def test_colour_and_side_do_not_tell_the_grade():
    """A linear fit of the grade from colour, side and place of the disc leaves most of its variance unexplained."""
    features, grades = [], []
    for i in range(400):
        e = synthetic.plan(5, i)
        image = synthetic.render(e, 32)[0] / 255
        features.append([*image.mean((0, 1)), *image[:, :16].mean((0, 1)), e.left_disc, *e.disc, e.half_height, 1])
        grades.append(e.grade)
    x, y = np.array(features, float), np.array(grades, float)
    fit = x @ np.linalg.lstsq(x[:300], y[:300], rcond=None)[0]
    assert ((fit[300:] - y[300:]) ** 2).mean() > 0.6 * y.var()


def test_points_lie_where_they_should():
    for i in range(100):
        e = synthetic.plan(6, i)
        gap = math.dist(e.disc, e.fovea) / DISC_DIAMETER
        assert 2.2 < gap < 2.9 and e.left_disc == (e.disc[0] < e.fovea[0])
        assert math.dist(e.fovea, (CENTRE, CENTRE)) < 0.35
