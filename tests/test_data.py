"""Augmentation and batches: what moves together, which photographs meet in a step."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
import train
from conftest import fake_records, photograph
from retina.datasets import preprocess, readers, synthetic
from retina.datasets.masks import MaskFile
from retina.datasets.readers import read_idrid
from retina.datasets.records import LABELS, Record
from retina.files import InputError
from tasks import TASKS, make_tasks


SEG, CLS = TASKS["seg"], TASKS["cls"]


def training_records(root: Path) -> list[Record]:
    return [r for r in read_idrid(root).records if r.split == "train"]


def drawn_records(number: int) -> list[Record]:
    return [r for r in readers.read_drawn().records if r.split == "test"][:number]


# ---- augmentation ----

def marked(points: Tensor, size: int = 128) -> preprocess.Sample:
    """A black photograph with a soft white spot at each point, a mask of each spot, and the points."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    spots = torch.stack([255 * torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 18) for a, b in points.tolist()])
    masks = torch.zeros(5, size, size, dtype=torch.uint8)
    masks[:len(spots)] = spots > 128
    return preprocess.Sample("x", spots.amax(0).round().to(torch.uint8).expand(3, -1, -1).clone(),
                             {"masks": masks, "landmarks": points}, preprocess.Geometry(size, size, 1, 1, 0, 0), "x")


def centre(x: Tensor) -> list[float]:
    """Of the light in a picture (H, W), in pixels from its corner."""
    x, at = x.double(), torch.arange(x.shape[-1], dtype=torch.float64) + 0.5
    return [float((x * at).sum() / x.sum()), float((x * at[:, None]).sum() / x.sum())]


def test_photograph_masks_and_landmarks_move_alike():
    """Whatever the seed, mask and point go where the spot goes; a point that has left the picture is unknown."""
    gone, places = 0, set()
    for seed in range(60):
        points = torch.from_numpy(np.random.default_rng(seed).uniform(6, 122, (1, 2))).float()
        sample = marked(points)
        sample.labels["landmarks"] = torch.cat([points, torch.full((1, 2), math.nan)])
        new = data.augment(sample, seed)
        assert new.landmarks[1].isnan().all()  # what was not known stays so
        x, y = new.landmarks[0].tolist()
        if math.isnan(x):
            gone += 1
            assert new.image[:, 11:-11, 11:-11].sum() == 0
        elif 10 < x < 118 and 10 < y < 118:
            assert math.dist(centre(new.image.float().mean(0)), (x, y)) < 0.25
            assert math.dist(centre(new.masks[0]), (x, y)) < 0.6  # to the nearest pixel
            places.add((round(x), round(y)))
    assert 0 < gone < 20 and len(places) > 30


def test_flips_turn_about_the_same_middle_as_rotations():
    """torchvision 0.29 flips key points about pixel centres and turns them about pixel edges: two flips are not half a
    turn. Ours are."""
    seen = set()
    for seed in range(40):
        flips, turn = v2.Compose(data.AUGMENTATION.transforms[:3]), data.AUGMENTATION.transforms[3]
        sample = marked(torch.tensor([[20.0, 45.5]]))
        points = LABELS["landmarks"].to_tv_tensor(sample.landmarks, 128)
        torch.manual_seed(seed)
        image, points = flips(tv_tensors.Image(sample.image), points)
        assert math.dist(centre(image.float().mean(0)), points[0].tolist()) < 0.01
        half = v2.functional.affine(points, 180, [0, 0], 1, [0, 0])
        assert half[0].tolist() == pytest.approx([128 - points[0, 0].item(), 128 - points[0, 1].item()], abs=1e-4)
        seen.add(tuple(points[0].tolist()))
        assert isinstance(turn, v2.RandomAffine)
    assert seen == {(20, 45.5), (108, 45.5), (20, 82.5), (108, 82.5)}


def test_without_flips_a_left_eye_stays_a_left_eye(tmp_path):
    """Folders of left and right eyes: the disc, the brightest spot, keeps its side; with flips about half change it."""
    eyes = {i: eye for i in range(60) if (eye := synthetic.plan(11, i)).grade == 0}
    left = [i for i, eye in eyes.items() if eye.disc[0] < 0.5][:6]
    for i in left + [i for i in eyes if i not in left][:6]:
        folder = tmp_path / "train" / ("left-eye" if i in left else "right-eye")
        folder.mkdir(parents=True, exist_ok=True)
        photograph(folder / f"{i}.png", i)

    def shares_that_changed(**flags):
        config = train.Config(data=str(tmp_path), names={"category": ["left-eye", "right-eye"]}, tasks=("cls",),
                              image_size=64, **flags)
        training, _, findings = data.load_datasets(config, make_tasks(config.tasks, config.names))
        changed = []
        for i, record in enumerate(training.records):
            for seed in range(20):
                light = v2.functional.gaussian_blur(training[i, seed, False].image.float().sum(0, keepdim=True), 9)[0]
                changed.append((int(light.argmax()) % 64 < 32) != (record.category == "left-eye"))
        return findings["notes"], np.mean(changed), len(changed)

    note = "classes left-eye, right-eye sound like sides; a mirror image turns one into the other: use --no-flips"
    notes, share, number = shares_that_changed()
    assert notes == [note] and 0.4 < share < 0.6 and number >= 160
    assert shares_that_changed(flips=False) == ([], 0, number)
    assert shares_that_changed(augment=False)[0] == []


@pytest.mark.parametrize("grey", [20, 128, 220])
def test_colours_are_rounded_and_not_cut_off(grey, monkeypatch):
    """The mean over many seeds is that of the same transforms without the last step, which makes bytes of colours."""
    sample = preprocess.Sample("x", torch.full((3, 64, 64), grey, dtype=torch.uint8), {}, None, "x")
    rounded = torch.stack([data.augment(sample, seed).image[:, 28:36, 28:36].double() for seed in range(400)])
    monkeypatch.setattr(data, "AUGMENTATION", v2.Compose(data.AUGMENTATION.transforms[:-1]))
    exact = torch.stack([255 * data.augment(sample, seed).image[:, 28:36, 28:36].double() for seed in range(400)])
    assert abs(float((rounded - exact).mean())) < 0.05 and (rounded - exact).abs().max() < 0.501
    assert exact.mean((1, 2, 3)).std() > 0.03 * grey  # brightness changes


def test_augmentation_does_not_depend_on_the_number_of_threads():
    """A sum over many pixels does: workers of a loader have one thread, the main process has all cores."""
    photographs, threads = data.FundusDataset(drawn_records(1), 384), torch.get_num_threads()
    samples = [(photographs[0], seed) for seed in range(30)]  # the sums of three of these do
    images = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            images.append([data.augment(sample, seed).image for sample, seed in samples])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*images))


def test_augmentation_moves_image_and_masks_together():
    """Paint the masked pixels white, augment: the white has moved where the mask has."""
    record = next(r for r in drawn_records(300) if r.grade == 0)
    sample = data.FundusDataset([record], 128)[0]
    disc = synthetic.LESIONS.index("OD")
    sample.image = torch.where(sample.masks[disc] == 1, 255, 0).to(torch.uint8).expand(3, -1, -1).clone()
    moved = set()
    for aug_seed in range(20):
        new = data.augment(sample, aug_seed)
        white = new.image.float().mean(0) > 0.4 * new.image.max()
        overlap = (white & (new.masks[disc] == 1)).sum() / (white | (new.masks[disc] == 1)).sum()
        assert overlap > 0.8
        moved.add(tuple(v.float().mean().round().int().item() for v in new.masks[disc].nonzero(as_tuple=True)))
    assert len(moved) > 15


def test_crops_are_parts_of_the_larger_photograph(monkeypatch):
    """With masks alone; where a part lies is found by sliding it."""
    masked, other = drawn_records(2)
    graded = other.with_labels(masks=None)
    monkeypatch.setattr(data, "AUGMENTATION", v2.Compose([v2.Identity()]))
    large, photographs = data.FundusDataset([masked], 96)[0], data.FundusDataset([graded, masked], 64, crops=1.5)
    crops = [photographs[1, seed, True] for seed in range(20)]
    assert {s.image.shape for s in crops} == {(3, 64, 64)} and all({*s.labels} == {"masks"} for s in crops)
    assert {*photographs[1, 0, False].labels} == {*masked.labels}
    windows = large.image.unfold(1, 64, 1).unfold(2, 64, 1)  # (3, 33, 33, 64, 64)
    places = set()
    for crop in crops:
        (y, x), = (windows == crop.image[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        assert torch.equal(crop.masks, large.masks[:, y:y + 64, x:x + 64])
        places.add((y, x))
    assert len(places) > 8 and max(places)[0] > 22 > 11 > min(places)[0]


def test_masks_that_are_not_known_stay_so(tmp_path):
    photograph(tmp_path / "a.png", 0)
    Image.fromarray(np.pad(np.ones((100, 100), bool), 100)).save(tmp_path / "m.png")
    masks = {"EX": MaskFile(tmp_path / "m.png"), "HE": None}
    sample = data.augment(data.FundusDataset([Record("x", tmp_path / "a.png", labels={"masks": masks})], 64)[0], 3)
    values = {lesion: set(m.unique().tolist()) for lesion, m in zip(synthetic.LESIONS, sample.masks)}
    assert values == {"MA": {255}, "HE": {0}, "EX": {0, 1}, "SE": {255}, "OD": {255}}


def test_augmentation_is_a_function_of_its_seed_and_leaves_the_generator_alone():
    photographs = data.FundusDataset(drawn_records(1), 64)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c, whole = (photographs[i] for i in ((0, 5, False), (0, 5, False), (0, 6, False), 0))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.image, b.image) and torch.equal(a.masks, b.masks) and torch.equal(a.landmarks, b.landmarks)
    assert not torch.equal(a.image, c.image) and a.grade == whole.grade
    assert {type(x) for x in (a.image, a.masks, a.landmarks)} == {Tensor} and a.image.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_batches(workers):
    photographs = data.FundusDataset(drawn_records(6), 64)
    steps = [[(i, 10 * s + i, False) for i in range(6)] for s in range(3)]
    batches = list(data.train_loader(photographs, iter(steps), [SEG, CLS], torch.device("cpu"), workers, {}))
    for step, batch in zip(steps, batches):
        expected = data.collate([photographs[pair] for pair in step], [SEG, CLS])
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.targets["seg"], expected.targets["seg"])


# ---- batches ----

def test_every_step_sees_every_task_and_every_photograph_comes_around():
    records = fake_records(0)
    sampler = data.MultiTaskBatchSampler(records, [CLS, SEG], 16, 0, True)
    assert sampler.quota.sum() == 16 and list(sampler.groups) == ["cls", "seg"]
    seen = Counter()
    for step in sampler.range(0, 3 * sampler.per_epoch):
        photographs = [records[i] for i, *_ in step]
        assert len(photographs) == 16
        assert any(r.grade is not None for r in photographs) and any(r.masks is not None for r in photographs)
        seen.update(r.name for r in photographs)
    assert set(seen) == {r.name for r in records}
    for group in sampler.groups.values():  # evenly: nobody is seen twice more often than another of the same group
        counts = [seen[records[i].name] for i in group]
        assert max(counts) - min(counts) <= 1
    rare, common = sorted(sampler.groups.values(), key=len)
    assert 1 < seen[records[rare[0]].name] / seen[records[common[0]].name] < len(common) / len(rare)


def test_photographs_with_masks_come_equally_often_whatever_else_is_known_of_them():
    """As in a fold of IDRiD: 293 with a grade, 33 with grade and masks, 10 with masks alone."""
    kinds = [{"grade": 1}] * 293 + [{"grade": 1, "masks": {}}] * 33 + [{"masks": {}}] * 10
    records = [Record(str(i), None, labels=labels) for i, labels in enumerate(kinds)]
    sampler = data.MultiTaskBatchSampler(records, [CLS, SEG], 8, 0, True)
    assert {name: len(group) for name, group in sampler.groups.items()} == {"cls": 293, "seg": 43}
    # shares of the six beyond one each: 6 * sqrt(293) / (sqrt(293) + sqrt(43)) = 4.34, and 1.66
    assert sampler.quota.tolist() == [5, 3] and sampler.per_epoch == 59
    seen = Counter(i for step in sampler.range(0, 43 * 59) for i, *_ in step)
    assert {seen[i] for i in range(293, 336)} == {3 * 59}
    # a network for one task is given its part of the same steps, of which each photograph has as many
    single = data.MultiTaskBatchSampler(records, [CLS, SEG], 8, 0, True, [CLS])
    for number in range(60):
        assert single.step(number) == [x for x in sampler.step(number) if x.index < 326]
    assert sum(map(single.photographs_in, range(43))) == 59 * (43 * 5 + 33 * 3)  # each of the 33 comes 3 * 59 times


def test_every_second_photograph_with_masks_is_a_part_of_itself():
    kinds = [{"grade": 1}] * 20 + [{"grade": 1, "masks": {}}] * 10
    records = [Record(str(i), None, labels=labels) for i, labels in enumerate(kinds)]
    samplers = {wanted: data.MultiTaskBatchSampler(records, [CLS, SEG], 6, 0, True, tasks, crops=True)
                for wanted, tasks in (("both", None), ("cls", [CLS]), ("seg", [SEG]))}
    steps = {wanted: [draw for step in sampler.range(0, 200) for draw in step] for wanted, sampler in samplers.items()}
    parts = [draw.crop for draw in steps["both"] if draw.index >= 20]
    assert 0.4 < np.mean(parts) < 0.6 and not any(draw.crop for draw in steps["both"] if draw.index < 20)
    # a part has no grade: a network for grades is not given it
    assert steps["cls"] == [draw for draw in steps["both"] if not draw.crop]
    assert steps["seg"] == [draw for draw in steps["both"] if draw.index >= 20]
    as_they_are = data.MultiTaskBatchSampler(records, [CLS, SEG], 6, 0, False, crops=True)
    assert not any(draw.crop or draw.aug_seed is not None for step in as_they_are.range(0, 50) for draw in step)


@pytest.mark.parametrize("kinds,tasks", [
    ([{"masks": {}, "grade": 1}] * 20, [CLS, SEG]),  # one group, in which a step may be of parts alone
    ([{"masks": {}}] * 4 + [{"masks": {}, "grade": 1}] * 4 + [{"edema_risk": 0}] * 4 +
     [{"edema_risk": 0, "grade": 1}] * 4,
     [CLS, SEG, TASKS["dme"]])], ids=["all labels", "no group of its own"])
def test_every_step_has_every_task(kinds, tasks):
    """Also where the photographs with a grade belong to rarer tasks, or come as parts, which have none."""
    records = [Record(str(i), None, labels=labels) for i, labels in enumerate(kinds)]
    sampler = data.MultiTaskBatchSampler(records, tasks, 3, 0, True, crops=True)
    assert (len(sampler.groups) == 1) == (len(tasks) == 2)
    single = data.MultiTaskBatchSampler(records, tasks, 3, 0, True, [CLS], crops=True)
    whole = 0
    for number in range(200):
        step = sampler.step(number)
        for task in tasks:
            assert any(task.labelled(records[d.index]) and (task is SEG or not d.crop) for d in step)
        assert single.step(number) == [d for d in step if CLS.labelled(records[d.index]) and not d.crop] != []
        whole += len({d.index for d in step}) == len(step)
    assert whole > 150


def test_steps_can_be_repeated_from_the_middle():
    sampler = data.MultiTaskBatchSampler(fake_records(0), [CLS, SEG], 8, 3, True)
    whole = list(sampler.range(0, 50))
    assert whole[30:] == list(sampler.range(30, 50))
    seeds = [draw.aug_seed for step in whole for draw in step]
    assert len(set(seeds)) == len(seeds)
    assert whole != list(data.MultiTaskBatchSampler(fake_records(0), [CLS, SEG], 8, 4, True).range(0, 50))


def test_photographs_without_a_wanted_label_are_left_out():
    records = fake_records(0)
    sampler = data.MultiTaskBatchSampler(records, [SEG], 8, 0, False)
    assert all(records[i].masks is not None and seed is None for s in sampler.range(0, 9) for i, seed, _ in s)


def test_batch_must_hold_one_of_each_task():
    with pytest.raises(InputError, match="--batch-size 1: .* use at least 2"):
        data.MultiTaskBatchSampler(fake_records(0), [CLS, SEG], 1, 0, True)


def test_collate_points_targets_at_their_photographs(shared_tree):
    found = training_records(shared_tree)
    photographs = data.FundusDataset(found, 64)
    order = [0, 10, 3, 12, 7]
    batch = data.collate([photographs[i] for i in order], [CLS, SEG])
    assert batch.indices["cls"].tolist() == [1, 3, 4] and batch.indices["seg"].tolist() == [0, 2]
    assert batch.targets["cls"].tolist() == [found[i].grade for i in (10, 12, 7)]
    assert torch.equal(batch.targets["seg"][1], photographs[3].masks)
    assert torch.equal(batch.images[3], photographs[12].image) and batch.names[4] == found[7].name
    only = data.collate([photographs[10]], [CLS, SEG])
    assert "seg" not in only.indices and "seg" not in only.targets
