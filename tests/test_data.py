"""Files to batches: masks, geometry, cache, augmentation, the order of photographs, the examination."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

import data
from retina.datasets import cache, preprocess, readers, report, synthetic
from retina.datasets.readers import read_idrid
from retina.datasets.records import Record
from retina.files import InputError
from tasks import TASKS
from conftest import real_idrid, save_palette_mask
from test_eyes import fake_records, photograph

SEG, CLS = TASKS["seg"], TASKS["cls"]


def training_part(root: Path) -> list[Record]:
    return [r for r in read_idrid(root).records if r.part == "train"]


def drawn(number: int) -> list[Record]:
    return [r for r in readers.read_drawn().records if r.part == "test"][:number]


# ---- masks ----

def test_no_mask_file_means_no_lesion(shared_tree):
    found = [r for r in training_part(shared_tree) if r.masks is not None]
    photographs = data.Photographs(found, 64)
    lacking = [(i, k) for i, r in enumerate(found) for k in synthetic.LESIONS if not r.masks[k]]
    assert lacking
    for i, kind in lacking:
        assert not photographs[i].masks[synthetic.LESIONS.index(kind)].any()
    for i, r in enumerate(found):
        assert photographs[i].masks[synthetic.LESIONS.index("HE")].any()


@pytest.mark.parametrize("encode", [
    lambda m: Image.fromarray(m.astype(np.uint8) * 76),  # a palette mask that somebody converted to grey
    lambda m: Image.fromarray(m.astype(np.uint8)),
    lambda m: Image.fromarray(m.astype(np.uint8) * 255),
    lambda m: Image.fromarray(m),  # one bit
    lambda m: Image.fromarray(np.stack([m * 255, m * 0, m * 0, m * 0 + 255], 2).astype(np.uint8)),  # RGBA
    lambda m: Image.fromarray(np.stack([m * 255, m * 0, m * 0], 2).astype(np.uint8)),
    lambda m: Image.fromarray(np.stack([m * 0, m * 128, m * 0], 2).astype(np.uint8)),  # drawn in green
    lambda m: Image.fromarray(np.stack([m * 0, m * 0, m * 0, m * 255], 2).astype(np.uint8)),  # in the opacity
    lambda m: Image.fromarray(np.stack([m * 255] * 3, 2).astype(np.uint8)).quantize(2),  # palette, white first
    lambda m: Image.fromarray(m.astype(np.uint16) * 65535),
    lambda m: Image.fromarray(m.astype(np.float32)),
    lambda m: Image.fromarray((m * 250 + np.random.default_rng(0).integers(0, 5, m.shape)).astype(np.uint8)),
])
def test_every_encoding_of_a_mask_reads_the_same(tmp_path, encode):
    mask = np.random.default_rng(0).random((40, 60)) > 0.7
    encode(mask).save(tmp_path / "mask.tif")
    assert np.array_equal(np.asarray(preprocess.read_mask(tmp_path / "mask.tif", (60, 40))[0]), mask * 255)


def test_palette_mask_reads_its_indices(tmp_path):
    mask = np.random.default_rng(0).random((40, 60)) > 0.7
    save_palette_mask(tmp_path / "mask.tif", mask)
    assert np.unique(np.asarray(Image.open(tmp_path / "mask.tif").convert("L"))).tolist() == [0, 76]
    assert np.array_equal(np.asarray(preprocess.read_mask(tmp_path / "mask.tif", (60, 40))[0]), mask * 255)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA"])
def test_masks_of_one_value(tmp_path, mode):
    for colour, expected in (("black", 0), ("white", 255)):
        Image.new(mode, (60, 40), colour).save(tmp_path / "mask.tif")
        assert np.unique(np.asarray(preprocess.read_mask(tmp_path / "mask.tif", (60, 40))[0])).tolist() == [expected]


def test_a_smooth_outline_is_allowed(tmp_path):
    y, x = np.mgrid[:40, :60]
    mask = Image.fromarray((np.hypot(x - 30, y - 20) < 4).astype(np.uint8) * 255)
    mask.filter(ImageFilter.GaussianBlur(0.7)).save(tmp_path / "mask.png")
    found = np.asarray(preprocess.read_mask(tmp_path / "mask.png", (60, 40))[0]) > 0
    assert (found != (np.asarray(mask) > 0)).mean() < 0.01


@pytest.mark.parametrize("values", [
    lambda rng: rng.integers(0, 4, (40, 60)).astype(np.uint8),  # a map of labels, or noise
    lambda rng: rng.integers(0, 256, (40, 60)).astype(np.uint8),  # a photograph
    lambda rng: np.where(rng.random((40, 60)) > 0.5, np.nan, 1).astype(np.float32),
])
def test_what_is_no_mask_is_one_line(tmp_path, values):
    Image.fromarray(values(np.random.default_rng(0))).save(tmp_path / "mask.tif")
    with pytest.raises(InputError, match="mask.tif: .* values from .*; expected a mask of two, such as 0 and 255"):
        preprocess.read_mask(tmp_path / "mask.tif", (60, 40))


def test_an_empty_mask_file_is_an_empty_mask(tmp_path):
    save_palette_mask(tmp_path / "mask.tif", np.zeros((40, 60), bool))
    assert not np.asarray(preprocess.read_mask(tmp_path / "mask.tif", (60, 40))[0]).any()


# ---- geometry ----

def disc_photograph(width=600, height=400, centre=(330, 190), radius=150) -> tuple[Image.Image, tuple]:
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) < radius
    pixels = np.where(inside[..., None], (180, 90, 40), (4, 3, 3)).astype(np.uint8)
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    return Image.fromarray(pixels), box


def test_field_of_view_is_the_circle():
    image, box = disc_photograph()
    assert np.abs(np.array(preprocess.field_of_view(image)) - box).max() < 600 / 256 * 2


@pytest.mark.parametrize("shape", ["whole", "spot", "frame", "bar"])
def test_pictures_without_a_field_of_view_are_taken_whole(shape):
    pixels = np.zeros((200, 300, 3), np.uint8)
    y, x = np.mgrid[:200, :300]
    x, y = abs(x - 150), abs(y - 100)
    inside = {"whole": y >= 0, "spot": np.hypot(x, y) < 30, "frame": (x < 90) & (y < 80), "bar": (x < 20) & (y < 80)}
    pixels[inside[shape]] = 180
    assert preprocess.field_of_view(Image.fromarray(pixels)) is None


def test_field_of_view_of_a_black_image():
    assert preprocess.field_of_view(Image.new("RGB", (300, 200), (2, 2, 2))) is None


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_points_and_masks_follow_the_image(tmp_path, suffix):
    """A white dot: found in the sample where geometry says, found in the mask there too, and mapped back."""
    image, _ = disc_photograph(2000, 1400, (1100, 650), 500)
    pixels, mask = np.array(image), np.zeros((1400, 2000), bool)
    dot = (1240, 470)
    pixels[dot[1] - 20:dot[1] + 20, dot[0] - 20:dot[0] + 20] = 255
    mask[dot[1] - 20:dot[1] + 20, dot[0] - 20:dot[0] + 20] = True
    Image.fromarray(pixels).save(tmp_path / f"photo.{suffix}", quality=95)
    save_palette_mask(tmp_path / "m.tif", mask)
    record = Record("x", tmp_path / f"photo.{suffix}", labels={"masks": {"EX": tmp_path / "m.tif"}})
    sample = data.Photographs([record], 128)[0]
    assert sample.image.shape == (3, 128, 128) and (sample.geometry.width, sample.geometry.height) == (2000, 1400)
    for found in (sample.image[2] > 150, sample.masks[synthetic.LESIONS.index("EX")] == 1):
        y, x = (v.float().mean().item() + 0.5 for v in found.nonzero(as_tuple=True))
        assert math.dist((x, y), sample.geometry.to_sample(np.array(dot))) < 0.6
        assert math.dist(dot, sample.geometry.to_file(np.array((x, y)))) < 0.6 * 1000 / 128
    assert np.allclose(sample.geometry.to_file(sample.geometry.to_sample(np.array([[3.0, 5.0]]))), [[3, 5]])
    assert abs(sample.geometry.scale_x / sample.geometry.scale_y - 1) < 0.02  # the aspect is kept


@pytest.mark.parametrize("size", [4097, 2051, 1025])
def test_reduced_decoding_moves_nothing(tmp_path, size):
    """A JPEG reduced to a fraction of a pixel: a dot near the far corner still lies where geometry says."""
    pixels = np.zeros((size, size, 3), np.uint8)
    at = size - 8 * size // 100
    pixels[at - size // 50:at + size // 50, at - size // 50:at + size // 50] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    sample = data.Photographs([Record("x", tmp_path / "a.jpg", labels={"points": {"disc": (at, at)}})], 256)[0]
    light = sample.image.float().mean(0)
    x = float((light * (torch.arange(256) + 0.5)).sum() / light.sum())
    assert abs(x - float(sample.points[0, 0])) < 0.05


def test_a_point_outside_of_the_field_of_view_is_not_known(tmp_path):
    disc_photograph()[0].save(tmp_path / "a.png")
    points = {"disc": (1, 1), "fovea": (330, 190)}
    sample = data.Photographs([Record("x", tmp_path / "a.png", labels={"points": points})], 64)[0]
    assert sample.points.isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("width,height", [(1000, 667), (1001, 701), (997, 1333)])
def test_odd_sizes_and_a_retina_that_touches_the_edge(tmp_path, width, height):
    image, _ = disc_photograph(width, height, (width // 2, height // 2), max(width, height) // 2)
    image.save(tmp_path / "photo.jpg", quality=95)
    save_palette_mask(tmp_path / "m.tif", np.ones((height, width), bool))
    record = Record("x", tmp_path / "photo.jpg", labels={"masks": {"OD": tmp_path / "m.tif"}})
    sample = data.Photographs([record], 64)[0]
    corners = sample.geometry.to_sample(np.array([(0, 0), (width, height)]))
    inside = sample.masks[-1].nonzero()
    assert np.abs(corners[0] - inside.min(0).values.flip(0).numpy()).max() < 0.6
    assert np.abs(corners[1] - inside.max(0).values.flip(0).numpy() - 1).max() < 0.6


def test_size_does_not_move_the_split(tmp_path):
    record = photograph(tmp_path / "a.jpg", 0)
    for key in ("thumbnail", "vessels"):
        assert np.array_equal(*(preprocess.prepare(record, size)[key] for size in (64, 512)))


def test_reduced_decoding_is_close_to_full_decoding(tmp_path):
    drawn = Image.fromarray(synthetic.draw(synthetic.plan(0, 3), 1024)[0])
    drawn.save(tmp_path / "a.jpg", quality=92), Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    fast, full = (preprocess.prepare(Record("x", tmp_path / f"a.{s}"), 128)["image"].astype(float)
                  for s in ("jpg", "png"))
    assert 10 * math.log10(255 ** 2 / ((fast - full) ** 2).mean()) > 38  # dB


# ---- cache ----

def test_cache_is_used_and_follows_the_file(tree, monkeypatch):
    found = training_part(tree)
    first = data.Photographs(found, 64)
    calls = []
    monkeypatch.setattr(cache, "fill_cache", lambda record, path, size: calls.append(record))
    monkeypatch.setattr(cache, "ProcessPoolExecutor", InProcess)
    data.Photographs(found, 64)
    assert not calls
    assert first[0].image.shape == (3, 64, 64)
    path = found[0].image
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    cache.build_cache(found, 64, cache.CACHE)
    assert [r.name for r in calls] == [found[0].name]
    assert cache.cache_path(found[1], 64, cache.CACHE) != cache.cache_path(found[1], 96, cache.CACHE)


class InProcess:
    """Stands in for a process pool, so that what is patched here is what runs."""
    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, f, *items, chunksize):
        return map(f, *items)


def test_masks_survive_the_cache_bit_for_bit():
    found = drawn(4)
    photographs = data.Photographs(found, 64)
    for i, record in enumerate(found):
        image, masks = synthetic.draw(synthetic.plan(*record.drawing), 64)
        sample = photographs[i]
        assert torch.equal(sample.masks, torch.from_numpy(masks).to(torch.uint8))
        assert torch.equal(sample.image, torch.from_numpy(image).permute(2, 0, 1))
        assert (sample.grade, sample.edema) == (record.grade, record.edema)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """10 000 photographs on disk, of mixed sizes: what is resident after the first 1000 is so after the last."""
    sizes = np.random.default_rng(0).integers(24, 120, (50, 2))
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.jpg")
    for i in range(50, 10000):
        os.link(tmp_path / f"{i % 50}.jpg", tmp_path / f"{i}.jpg")
    code = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import data
from retina.datasets import cache, records
cache.CACHE = Path(sys.argv[2]) / "cache"
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
found = [records.Record(str(i), Path(sys.argv[2]) / f"{i}.jpg") for i in range(10000)]
photographs, seen = data.Photographs(found, 64), []
for i in range(10000):
    photographs[i]
    if i + 1 in (1000, 10000):
        seen.append(resident())
print(*seen, sum(p.stat().st_size for p in photographs.paths) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code, Path(data.__file__).parent, tmp_path], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    early, late, cached = map(int, result.stdout.split())  # KiB
    assert late - early < 20 * 1024 < cached / 5


# ---- augmentation ----

def changed(sample: preprocess.Sample, draw: int) -> preprocess.Sample:
    return data.augmented(sample.image[None], [replace(sample, draw=draw)])[1][0]


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
    photographs, blurred = data.Photographs(drawn(4), 96), 0
    samples = [replace(photographs[i % 4], draw=i) for i in range(24)]
    images, found = data.augmented(torch.stack([s.image for s in samples]), samples)
    for sample, image, new in zip(samples, images, found):
        change = data.draw(sample.draw, 96)
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
    sample = data.Photographs([record], 128)[0]
    disc = synthetic.LESIONS.index("OD")
    sample.image = torch.where(sample.masks[disc] == 1, 255, 0).to(torch.uint8).expand(3, -1, -1).clone()
    moved = set()
    for draw in range(20):
        new = changed(sample, draw)
        white = new.image.float().mean(0) > 0.4 * new.image.max()
        overlap = (white & (new.masks[disc] == 1)).sum() / (white | (new.masks[disc] == 1)).sum()
        assert overlap > 0.8
        moved.add(tuple(v.float().mean().round().int().item() for v in new.masks[disc].nonzero(as_tuple=True)))
    assert len(moved) > 15


def test_augmentation_moves_points_with_the_image():
    """A white dot on black: found where the point is said to be, whatever the draw; gone where it has left."""
    sample = data.Photographs(drawn(1), 128)[0]
    gone = 0
    for draw in range(60):
        x, y = np.random.default_rng(draw).integers(4, 124, 2)
        sample.image = torch.zeros(3, 128, 128, dtype=torch.uint8)
        sample.image[:, y - 1:y + 1, x - 1:x + 1] = 255
        sample.labels["points"] = torch.tensor([[float(x), float(y)], [math.nan, math.nan]])
        new = changed(sample, draw)
        assert new.points[1].isnan().all()
        light = new.image.float().mean(0)
        if new.points[0].isnan().any():
            gone += 1
            assert light[3:-3, 3:-3].sum() == 0
        elif ((new.points[0] > 3) & (new.points[0] < 125)).all():
            centre = [float((light * at).sum() / light.sum()) for at in (torch.arange(128) + 0.5,
                                                                         torch.arange(128)[:, None] + 0.5)]
            assert math.dist(centre, new.points[0].tolist()) < 0.3
    assert 0 < gone < 20


def test_masks_that_are_not_known_stay_so(tmp_path):
    photograph(tmp_path / "a.png", 0)
    Image.fromarray(np.ones((300, 300), bool)).save(tmp_path / "m.png")
    masks = {"EX": tmp_path / "m.png", "HE": None}
    sample = changed(data.Photographs([Record("x", tmp_path / "a.png", labels={"masks": masks})], 64)[0], 3)
    values = {kind: set(m.unique().tolist()) for kind, m in zip(synthetic.LESIONS, sample.masks)}
    assert values == {"MA": {255}, "HE": {0}, "EX": {0, 1}, "SE": {255}, "OD": {255}}


def test_augmentation_is_a_function_of_its_draw_and_leaves_the_generator_alone():
    photographs = data.Photographs(drawn(1), 64)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (data.collate([photographs[0, draw]], [SEG]) for draw in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.images, b.images) and torch.equal(a.targets["seg"], b.targets["seg"])
    assert not torch.equal(a.images, c.images)


# ---- batches ----

def test_every_step_sees_every_task_and_every_photograph_comes_around():
    found = fake_records(0)
    steps = data.Steps(found, [CLS, SEG], 16, 0, True)
    assert steps.quota.sum() == 16 and len(steps.streams) == 2
    seen = Counter()
    for step in steps.range(0, 3 * steps.per_epoch):
        chosen = [found[i] for i, _ in step]
        assert len(chosen) == 16
        assert any(r.grade is not None for r in chosen) and any(r.masks is not None for r in chosen)
        seen.update(r.name for r in chosen)
    assert set(seen) == {r.name for r in found}
    for stream in steps.streams:  # evenly: nobody is seen twice more often than another of the same stream
        counts = [seen[found[i].name] for i in stream]
        assert max(counts) - min(counts) <= 1
    rare, common = sorted(steps.streams, key=len)
    assert 1 < seen[found[rare[0]].name] / seen[found[common[0]].name] < len(common) / len(rare)


def test_steps_can_be_repeated_from_the_middle():
    steps = data.Steps(fake_records(0), [CLS, SEG], 8, 3, True)
    whole = list(steps.range(0, 50))
    assert whole[30:] == list(steps.range(30, 50))
    draws = [draw for step in whole for _, draw in step]
    assert len(set(draws)) == len(draws)
    assert whole != list(data.Steps(fake_records(0), [CLS, SEG], 8, 4, True).range(0, 50))


def test_photographs_without_a_wanted_label_are_left_out():
    found = fake_records(0)
    steps = data.Steps(found, [SEG], 8, 0, False)
    assert all(found[i].masks is not None and draw is None for s in steps.range(0, 9) for i, draw in s)


def test_batch_must_hold_one_of_each_stream():
    with pytest.raises(InputError, match="--batch 1: .* use at least 2"):
        data.Steps(fake_records(0), [CLS, SEG], 1, 0, True)


def test_collate_points_targets_at_their_photographs(shared_tree):
    found = training_part(shared_tree)
    photographs = data.Photographs(found, 64)
    order = [0, 10, 3, 12, 7]
    batch = data.collate([photographs[i] for i in order], [CLS, SEG])
    assert batch.rows["cls"].tolist() == [1, 3, 4] and batch.rows["seg"].tolist() == [0, 2]
    assert batch.targets["cls"].tolist() == [found[i].grade for i in (10, 12, 7)]
    assert torch.equal(batch.targets["seg"][1], photographs[3].masks)
    assert torch.equal(batch.images[3], photographs[12].image) and batch.names[4] == found[7].name
    only = data.collate([photographs[10]], [CLS, SEG])
    assert "seg" not in only.rows and "seg" not in only.targets


# ---- the examination ----

def examined(capsys, *arguments) -> str:
    data.main([str(a) for a in arguments])
    return capsys.readouterr().out


@pytest.fixture
def troubled(tmp_path, shared_tree) -> Path:
    """A tree with a copy in the test part, a copy with another grade, and a mask stored in its own way."""
    root = shutil.copytree(shared_tree, tmp_path / "IDRiD")
    images = root / "B. Disease Grading" / "1. Original Images"
    shutil.copy(images / "b. Testing Set" / "IDRiD_003.jpg", images / "a. Training Set" / "IDRiD_005.jpg")
    shutil.copy(images / "a. Training Set" / "IDRiD_001.jpg", images / "a. Training Set" / "IDRiD_011.jpg")
    shutil.copy(images / "a. Training Set" / "IDRiD_007.jpg",
                root / "A. Segmentation" / "1. Original Images" / "a. Training Set" / "IDRiD_02.jpg")
    mask = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set" / "5. Optic Disc"
    values = np.asarray(Image.open(mask / "IDRiD_03_OD.tif"))
    Image.fromarray(np.stack([values * 255, *[values * 0] * 2, values * 0 + 255], 2)).save(mask / "IDRiD_03_OD.tif")
    return root


def test_examination_finds_what_was_planted(troubled, capsys, tmp_path):
    report = json.loads(examined(capsys, troubled, "--json"))
    assert {p: (v["photographs"], v["labels"]) for p, v in report["parts"].items()} == {
        part: (21, {"grade": 15, "edema": 15, "masks": 6, "points": 15}) for part in ("train", "test")}
    grades = [synthetic.plan(8, i).grade for i in range(15)]
    common = Counter(grades).most_common(1)[0][1]
    shares = report["parts"]["train"]["classes"]["grade"]
    assert shares["counts"] == {str(g): grades.count(g) for g in sorted(set(grades))}
    assert shares["constant_accuracy"] == round(common / 15, 4)
    assert report["odd_masks"] == ["segmentation/IDRiD_03 OD RGBA 0 255"] and report["sizes"] == {"144x96": 42}
    assert sorted(map(sorted, report["copies"])) == [
        ["grading/IDRiD_001", "grading/IDRiD_011"], ["grading/IDRiD_005", "test/grading/IDRiD_003"],
        ["grading/IDRiD_007", "segmentation/IDRiD_02"]]
    assert report["leaks"] == {"validated": [], "training": ["grading/IDRiD_005"],
                               "test_labels": {"grade": 1, "edema": 1, "points": 1},
                               "training_labels": {"grade": 1, "edema": 1, "points": 1}}
    conflicts = {c["label"]: (c["values"], c["used"]) for c in report["conflicts"]}
    assert conflicts["grade"] == ([2, 3], 3) and {"disc", "fovea"} < set(conflicts)
    assert report["same_eye"]["photographs"] == 42 - 2 and report["same_eye"]["eyes"] == 42 - 3
    sides = report["split"]["training"]["photographs"], report["split"]["validation"]["photographs"]
    assert sum(sides) == 21 - 2 - 1 and min(sides) >= 3


def test_examination_is_a_page_and_changes_nothing_but_the_cache(troubled, capsys, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    text = examined(capsys, troubled, "--pictures", tmp_path / "sheets" / "new")
    for words in ("grading/IDRiD_001 = grading/IDRiD_011", "copies: pairs of files that show one photograph: 3",
                  "training photographs of an eye in the test part: 1; by task: cls (grade) 1, dme (edema) 1",
                  "labels that contradict each other:", "segmentation/IDRiD_03 OD RGBA 0 255", "the split of train.py"):
        assert words in text
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "sheets" not in p.parts}
    assert {p: t for p, t in after.items() if p != tmp_path} == {p: t for p, t in before.items() if p != tmp_path}
    sheets = {p.stem: Image.open(p).size for p in (tmp_path / "sheets" / "new").iterdir()}
    assert {"labels", "copies", "conflicts", "leaks", "odd_masks"} <= set(sheets)
    side = report.EXAMINED_SIZE  # three pairs, 12 apart; names and captions of 22, a title of 27, margins of 16 and 14
    assert sheets["copies"] == (6 * side + 2 * 12 + 2 * 16, side + 2 * 22 + 27 + 12 + 2 * 14)


def test_examination_lists_every_file_that_cannot_be_read(tree, capsys):
    images = tree / "B. Disease Grading" / "1. Original Images" / "a. Training Set"
    for name in ("IDRiD_002", "IDRiD_004"):
        (images / f"{name}.jpg").write_bytes(b"\xff\xd8no")
    with pytest.raises(InputError, match="IDRiD: 2 of its photographs cannot be used, see above"):
        data.main([str(tree)])
    text = capsys.readouterr().out
    assert "unreadable files: 2" in text and "IDRiD_002.jpg: not a readable" in text and "IDRiD_004.jpg: not" in text
    assert "the split of train.py" in text
    for path in [*images.iterdir(), *(tree / "A. Segmentation" / "1. Original Images" / "a. Training Set").iterdir()]:
        path.write_bytes(b"no")
    with pytest.raises(InputError, match="none of its 8 photographs can be read; first: .*not a readable image"):
        data.main([str(tree)])


def test_examination_of_drawn_photographs(capsys, monkeypatch):
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 20), "test": (1, 5)})
    assert "train: 20 photographs (drawn 20)" in examined(capsys)


def test_bad_pictures_folder_is_one_line(tree):
    with pytest.raises(InputError, match="--pictures .*Labels.csv: a file; expected a folder"):
        data.main([str(tree), "--pictures", str(next(tree.rglob("*Labels.csv")))])


# ---- the real photographs, where they are at hand ----

def test_real_examination(capsys, tmp_path):
    report = json.loads(examined(capsys, real_idrid("idrid"), "--json", "--pictures", tmp_path))
    assert report["parts"]["train"]["classes"]["grade"]["counts"] == {"0": 134, "1": 20, "2": 136, "3": 74, "4": 49}
    assert (len(report["copies"]), len(report["same_eye"]["pairs"]), len(report["conflicts"])) == (47, 11, 3)
    assert report["sizes"] == {"1072x712": 467} and not report["unreadable"] and not report["without_field_of_view"]
    assert {p.stem for p in tmp_path.iterdir()} == {"labels", "copies", "same_eye", "just_below", "conflicts"}
    original = json.loads(examined(capsys, real_idrid("idrid-original"), "--json"))
    assert original["sizes"] == {"4288x2848": 15} and list(original["mask_formats"]) == ["P 0 1"]



@pytest.mark.parametrize("name", ["idrid", "idrid-original"])
def test_real_photographs_crop_to_the_retina_and_masks_fit(name):
    root = real_idrid(name)
    found = [r for r in training_part(root) if r.masks is not None][:6]
    found += [r for r in training_part(root) if r.masks is None][:6]
    photographs = data.Photographs(found, 256)
    for i, record in enumerate(found):
        sample = photographs[i]
        lit = sample.image.amax(0) > 30
        assert 0.6 < lit.float().mean() < 0.9  # a circle that fills its square, cut at top and bottom
        assert lit.any(0).float().mean() > 0.95
        assert abs(sample.geometry.scale_x / sample.geometry.scale_y - 1) < 0.01
        if record.masks is None:
            continue
        disc = sample.masks[synthetic.LESIONS.index("OD")] == 1
        assert 0.01 < disc.float().mean() < 0.05
        green = sample.image[1].float()
        assert green[disc].mean() > 1.2 * green[lit].mean()  # the disc is bright where its mask says
        for path in filter(None, record.masks.values()):
            original = np.asarray(preprocess.read_mask(path, Image.open(record.image).size)[0]) > 0
            assert original.any()


def test_real_originals_and_reductions_give_the_same_sample():
    """The same photograph at 4288x2848 and at 1072x712 lands on the same pixels of the sample."""
    originals = {r.name: r for r in training_part(real_idrid("idrid-original"))}
    reduced = {r.name: r for r in training_part(real_idrid("idrid"))}
    for name in list(originals)[:8]:
        a, b = (preprocess.prepare(r, 256)["image"].astype(float) for r in (originals[name], reduced[name]))
        assert 10 * math.log10(255 ** 2 / ((a - b) ** 2).mean()) > 30  # dB
