"""Words and fine classes follow the photograph: what they say of it is still true after augmentation."""

import math
from collections import Counter

import pytest
import torch

import data
from data import Draw, FundusDataset
from retina.datasets import preprocess, readers
from retina.datasets.descriptions import read
from retina.datasets.records import LANDMARKS
from retina.datasets.synthetic import LESIONS


TEXT, FINE = "left eye. hard exudates above, far from the fovea. moderate retinopathy.", "left, upper"


def sample() -> preprocess.Sample:
    """Of 32 pixels; its fovea lies right of the disc and below it, by 45 degrees: a turn of 30 does not change that."""
    points = torch.tensor([[11.0, 11.0], [21.0, 21.0]])
    labels = {"landmarks": points, "text": TEXT, "fine": FINE, "signs": {"hard exudates": 1, "shunt vessels": 0},
              "grade": 2, "category": "left", "masks": torch.zeros(5, 32, 32, dtype=torch.uint8)}
    return preprocess.Sample("x", torch.full((3, 32, 32), 99, dtype=torch.uint8), labels, None, "x")


def test_words_go_where_the_landmarks_go():
    seen, before = Counter(), sample()
    for seed in range(600):
        new = data.augment(before, seed)
        (disc_x, disc_y), (fovea_x, fovea_y) = new.landmarks.tolist()
        side, half = "left" if fovea_x > disc_x else "right", "above" if fovea_y > disc_y else "below"
        assert new.text == f"{side} eye. hard exudates {half}, far from the fovea. moderate retinopathy."
        assert new.fine == f"{side}, {'upper' if half == 'above' else 'lower'}"
        assert (new.signs, new.grade, new.category) == (before.signs, 2, "left")  # a folder's name stays what it is
        seen[side, half] += 1
    assert len(seen) == 4 and all(abs(n / 600 - 0.25) < 0.07 for n in seen.values())  # four standard errors
    assert (before.text, before.fine) == (TEXT, FINE)


def test_without_flips_words_stay():
    turned = [data.augment(sample(), seed, flips=False) for seed in range(50)]
    assert {(new.text, new.fine) for new in turned} == {(TEXT, FINE)}
    assert len({tuple(new.landmarks.flatten().tolist()) for new in turned}) == 50


def test_a_part_of_a_photograph_has_no_words():
    assert data.augment(sample(), 0, crop=16).labels.keys() == {"masks"}
    dataset = FundusDataset(readers.read_series("train", 5, 1), 32, crops=2)
    assert dataset[Draw(0, 7, True)].labels.keys() == {"masks"}
    assert dataset[Draw(0, 7, False)].labels.keys() == dataset[0].labels.keys() >= {"text", "fine", "signs", "masks"}


@pytest.mark.parametrize("lesion,slot", [("EX", "hard_exudates"), ("SE", "soft_half")])
def test_sentences_about_drawn_eyes_stay_true(lesion, slot):
    """Side and half, as pixels of the turned and mirrored masks show them beside the turned and mirrored points."""
    records = [r for r in readers.read_series("train", 6, 120) if read(r.text)[slot] in ("above", "below")][:6]
    dataset, seen = FundusDataset(records, 96), Counter()
    for i, record in enumerate(records):
        for seed in range(16):
            new = dataset[Draw(i, seed, False)]
            said, (disc, fovea) = read(new.text), new.landmarks[[LANDMARKS.index(p) for p in ("disc", "fovea")]]
            ys, xs = new.masks[LESIONS.index(lesion)].nonzero().double().add(0.5).T
            if not len(xs) or math.isnan(disc[0] + fovea[0]):  # turned out of the picture
                continue
            line = disc[1] + (xs.mean() - disc[0]) * (fovea[1] - disc[1]) / (fovea[0] - disc[0])
            side, half = "left" if disc[0] < fovea[0] else "right", "below" if ys.mean() > line else "above"
            assert (said["side"], said[slot], new.fine.split(",")[0]) == (side, half, side)
            seen[side == read(record.text)["side"], half == read(record.text)[slot]] += 1
    assert len(records) == 6 and len(seen) == 4 and seen.total() > 80
