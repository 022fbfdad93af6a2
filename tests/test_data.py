"""Augmentation and batches: what moves together, which photographs meet in a step."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import data
from conftest import fake_records, photograph
from retina.datasets import preprocess, readers, synthetic
from retina.datasets.readers import read_idrid
from retina.datasets.records import Record
from retina.files import InputError
from tasks import TASKS


SEG, CLS = TASKS["seg"], TASKS["cls"]


def training_part(root: Path) -> list[Record]:
    return [r for r in read_idrid(root).records if r.split == "train"]


def drawn(number: int) -> list[Record]:
    return [r for r in readers.read_drawn().records if r.split == "test"][:number]


# ---- augmentation ----

def changed(sample: preprocess.Sample, aug_seed: int) -> preprocess.Sample:
    return data.augmented(sample.image[None], [replace(sample, aug_seed=aug_seed)])[1][0]


def one_by_one(sample: preprocess.Sample, change: data.Change) -> tuple[Tensor, Tensor]:
    """The same change by torchvision's functions, of colours from 0 to 1, since of bytes they cut off a part each."""
    f, size = v2.functional, sample.image.shape[-1]
    recolour = (f.adjust_brightness, f.adjust_contrast, f.adjust_saturation, f.adjust_hue)
    pair = []
    for x, mode in ((sample.image / 255, "bilinear"), (sample.masks, "nearest")):
        for flipped, flip in zip(change.flip, (f.horizontal_flip, f.vertical_flip)):
            x = flip(x) if flipped else x
        pair.append(f.affine(x, math.degrees(change.angle), [round(s * size) for s in change.shift], change.scale,
                             [0.0, 0.0], interpolation=v2.InterpolationMode(mode)))
    for kind in change.order:
        pair[0] = recolour[kind](pair[0], change.amounts[kind])
    return f.gaussian_blur(pair[0], 5, [change.sigma] * 2) if change.sigma else pair[0], pair[1]


def test_a_batch_is_changed_as_torchvision_changes_one_after_the_other():
    photographs, blurred = data.FundusDataset(drawn(4), 96), 0
    samples = [replace(photographs[i % 4], aug_seed=i) for i in range(24)]
    images, found = data.augmented(torch.stack([s.image for s in samples]), samples)
    for sample, image, new in zip(samples, images, found):
        change = data.draw(sample.aug_seed, 96)
        expected, masks = one_by_one(sample, change)
        blurred += change.sigma > 0
        assert (image - 255 * expected).abs().max() < 0.51  # grey levels
        assert (new.masks != masks).float().mean() < 1e-3  # pixels that lie between two
        assert torch.equal(image, new.image)
        alone, = data.augmented(sample.image[None], [sample])[1]
        assert torch.equal(alone.image, image) and torch.equal(alone.masks, new.masks)
    assert 0 < blurred < 24


def test_changes_are_drawn_as_torchvision_draws_them():
    """Quantiles of every parameter, of 3000 draws each way."""
    number, size = 3000, 100
    torch.manual_seed(0)
    picture = [torch.zeros(3, size, size)]
    affine = v2.RandomAffine(30, translate=(0.05, 0.05), scale=(0.9, 1.1))
    jitter, blur = v2.ColorJitter(0.2, 0.2, 0.2, 0.02), v2.GaussianBlur(5, (0.1, 1.0))
    theirs, ours = defaultdict(list), defaultdict(list)
    for seed in range(number):
        a, j, b = affine.make_params(picture), jitter.make_params(picture), blur.make_params(picture)
        values = [a["angle"], a["scale"], *a["translate"], *(float(j[k]) for k in (
            "brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")), *(
            float((j["fn_idx"] == k).nonzero()) for k in range(4))]
        c = data.draw(seed, size)
        mine = [math.degrees(c.angle), c.scale, *(size * s for s in c.shift), *c.amounts, *map(c.order.index, range(4))]
        for k, (x, y) in enumerate(zip(values, mine)):
            theirs[k].append(x), ours[k].append(y)
        theirs["sigma"].append(b["sigma"][0])
        ours["sigma"] += [c.sigma] * (c.sigma > 0)
        ours["flips"] += c.flip
    for k in theirs:
        gap = np.subtract(*(np.quantile(v, (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)) for v in (ours[k], theirs[k])))
        assert np.abs(gap).max() <= max(0.06 * np.ptp(theirs[k]), 1.0 * (k in (2, 3) or k in range(8, 12))), k
    assert abs(len(ours["sigma"]) / number - 0.2) < 0.03 and abs(np.mean(ours["flips"]) - 0.5) < 0.03


def test_augmentation_moves_image_and_masks_together():
    """Paint the masked pixels white, augment: the white has moved where the mask has."""
    record = next(r for r in drawn(300) if r.grade == 0)
    sample = data.FundusDataset([record], 128)[0]
    disc = synthetic.LESIONS.index("OD")
    sample.image = torch.where(sample.masks[disc] == 1, 255, 0).to(torch.uint8).expand(3, -1, -1).clone()
    moved = set()
    for aug_seed in range(20):
        new = changed(sample, aug_seed)
        white = new.image.float().mean(0) > 0.4 * new.image.max()
        overlap = (white & (new.masks[disc] == 1)).sum() / (white | (new.masks[disc] == 1)).sum()
        assert overlap > 0.8
        moved.add(tuple(v.float().mean().round().int().item() for v in new.masks[disc].nonzero(as_tuple=True)))
    assert len(moved) > 15


def test_augmentation_moves_points_with_the_image():
    """A white dot on black: found where the point is said to be, whatever the draw; gone where it has left."""
    sample = data.FundusDataset(drawn(1), 128)[0]
    gone = 0
    for aug_seed in range(60):
        x, y = np.random.default_rng(aug_seed).integers(4, 124, 2)
        sample.image = torch.zeros(3, 128, 128, dtype=torch.uint8)
        sample.image[:, y - 1:y + 1, x - 1:x + 1] = 255
        sample.labels["landmarks"] = torch.tensor([[float(x), float(y)], [math.nan, math.nan]])
        new = changed(sample, aug_seed)
        assert new.landmarks[1].isnan().all()
        light = new.image.float().mean(0)
        if new.landmarks[0].isnan().any():
            gone += 1
            assert light[3:-3, 3:-3].sum() == 0
        elif ((new.landmarks[0] > 3) & (new.landmarks[0] < 125)).all():
            centre = [float((light * at).sum() / light.sum()) for at in (torch.arange(128) + 0.5,
                                                                         torch.arange(128)[:, None] + 0.5)]
            assert math.dist(centre, new.landmarks[0].tolist()) < 0.3
    assert 0 < gone < 20


def test_masks_that_are_not_known_stay_so(tmp_path):
    photograph(tmp_path / "a.png", 0)
    Image.fromarray(np.ones((300, 300), bool)).save(tmp_path / "m.png")
    masks = {"EX": tmp_path / "m.png", "HE": None}
    sample = changed(data.FundusDataset([Record("x", tmp_path / "a.png", labels={"masks": masks})], 64)[0], 3)
    values = {kind: set(m.unique().tolist()) for kind, m in zip(synthetic.LESIONS, sample.masks)}
    assert values == {"MA": {255}, "HE": {0}, "EX": {0, 1}, "SE": {255}, "OD": {255}}


def test_augmentation_is_a_function_of_its_draw_and_leaves_the_generator_alone():
    photographs = data.FundusDataset(drawn(1), 64)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (data.collate([photographs[0, aug_seed]], [SEG]) for aug_seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.images, b.images) and torch.equal(a.targets["seg"], b.targets["seg"])
    assert not torch.equal(a.images, c.images)


# ---- batches ----

def test_every_step_sees_every_task_and_every_photograph_comes_around():
    found = fake_records(0)
    steps = data.MultiTaskBatchSampler(found, [CLS, SEG], 16, 0, True)
    assert steps.quota.sum() == 16 and len(steps.patterns) == 2
    seen = Counter()
    for step in steps.range(0, 3 * steps.per_epoch):
        chosen = [found[i] for i, _ in step]
        assert len(chosen) == 16
        assert any(r.grade is not None for r in chosen) and any(r.masks is not None for r in chosen)
        seen.update(r.name for r in chosen)
    assert set(seen) == {r.name for r in found}
    for pattern in steps.patterns:  # evenly: nobody is seen twice more often than another of the same stream
        counts = [seen[found[i].name] for i in pattern]
        assert max(counts) - min(counts) <= 1
    rare, common = sorted(steps.patterns, key=len)
    assert 1 < seen[found[rare[0]].name] / seen[found[common[0]].name] < len(common) / len(rare)


def test_steps_can_be_repeated_from_the_middle():
    steps = data.MultiTaskBatchSampler(fake_records(0), [CLS, SEG], 8, 3, True)
    whole = list(steps.range(0, 50))
    assert whole[30:] == list(steps.range(30, 50))
    draws = [aug_seed for step in whole for _, aug_seed in step]
    assert len(set(draws)) == len(draws)
    assert whole != list(data.MultiTaskBatchSampler(fake_records(0), [CLS, SEG], 8, 4, True).range(0, 50))


def test_photographs_without_a_wanted_label_are_left_out():
    found = fake_records(0)
    steps = data.MultiTaskBatchSampler(found, [SEG], 8, 0, False)
    assert all(found[i].masks is not None and aug_seed is None for s in steps.range(0, 9) for i, aug_seed in s)


def test_batch_must_hold_one_of_each_stream():
    with pytest.raises(InputError, match="--batch-size 1: .* use at least 2"):
        data.MultiTaskBatchSampler(fake_records(0), [CLS, SEG], 1, 0, True)


def test_collate_points_targets_at_their_photographs(shared_tree):
    found = training_part(shared_tree)
    photographs = data.FundusDataset(found, 64)
    order = [0, 10, 3, 12, 7]
    batch = data.collate([photographs[i] for i in order], [CLS, SEG])
    assert batch.indices["cls"].tolist() == [1, 3, 4] and batch.indices["seg"].tolist() == [0, 2]
    assert batch.targets["cls"].tolist() == [found[i].grade for i in (10, 12, 7)]
    assert torch.equal(batch.targets["seg"][1], photographs[3].masks)
    assert torch.equal(batch.images[3], photographs[12].image) and batch.names[4] == found[7].name
    only = data.collate([photographs[10]], [CLS, SEG])
    assert "seg" not in only.indices and "seg" not in only.targets
