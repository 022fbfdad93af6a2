"""Files to batches: IDRiD's quirks, geometry, splits, cache, augmentation, the order of photographs, bad input."""

import itertools
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import data
import synthetic
from conftest import real_idrid, save_palette_mask
from data import InputError, Record
from tasks import TASKS

SEG, CLS = TASKS["seg"], TASKS["cls"]


def grading_csv(root: Path) -> Path:
    return root / "B. Disease Grading" / "2. Groundtruths" / data.PARTS["train"][1]


def first_mask(root: Path, kind: str) -> Path:
    folder = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / data.PARTS["train"][0]
    return sorted((folder / data.MASK_FOLDERS[kind]).iterdir())[0]


def read_all(root: Path, part: str = "train") -> data.Photographs:
    return data.Photographs(data.read_idrid(root, part), 64)


# ---- reading IDRiD ----

def test_reads_the_official_layout(shared_tree):
    for part, numbers in (("train", range(1, 7)), ("test", range(55, 61))):
        records = data.read_idrid(shared_tree, part)
        assert [r.name for r in records if r.masks is not None] == [f"segmentation/IDRiD_{i:02d}" for i in numbers]
        graded = [r for r in records if r.grade is not None]
        assert [r.name for r in graded] == [f"grading/IDRiD_{i:03d}" for i in range(1, 16)]
        assert all(r.masks is None and r.edema is not None for r in graded)
        for i, r in enumerate(graded):  # grades of the same names differ between the parts and are those of the file
            assert r.grade == synthetic.plan(8, i + (1000 if part == "test" else 0)).grade
    assert {r.image for r in data.read_idrid(shared_tree, "train")}.isdisjoint(
        r.image for r in data.read_idrid(shared_tree, "test"))


def test_no_mask_file_means_no_lesion(shared_tree):
    records = [r for r in data.read_idrid(shared_tree, "train") if r.masks is not None]
    photographs = data.Photographs(records, 64)
    lacking = [(i, k) for i, r in enumerate(records) for k in data.LESIONS if k not in r.masks]
    assert lacking
    for i, kind in lacking:
        assert not photographs[i, None].masks[data.LESIONS.index(kind)].any()
    for i, r in enumerate(records):
        assert photographs[i, None].masks[data.LESIONS.index("HE")].any()


@pytest.mark.parametrize("encode", [
    lambda m: Image.fromarray(m.astype(np.uint8) * 76),  # a palette mask that somebody converted to grey
    lambda m: Image.fromarray(m.astype(np.uint8)),
    lambda m: Image.fromarray(m.astype(np.uint8) * 255),
    lambda m: Image.fromarray(m),  # one bit
    lambda m: Image.fromarray(np.stack([m * 255, m * 0, m * 0, m * 0 + 255], 2).astype(np.uint8)),  # RGBA
    lambda m: Image.fromarray(np.stack([m * 255, m * 0, m * 0], 2).astype(np.uint8)),
])
def test_every_encoding_of_a_mask_reads_the_same(tmp_path, encode):
    mask = np.random.default_rng(0).random((40, 60)) > 0.7
    encode(mask).save(tmp_path / "mask.tif")
    assert np.array_equal(np.asarray(data.read_mask(tmp_path / "mask.tif", (60, 40))), mask * 255)


def test_palette_mask_reads_its_indices(tmp_path):
    mask = np.random.default_rng(0).random((40, 60)) > 0.7
    save_palette_mask(tmp_path / "mask.tif", mask)
    assert np.unique(np.asarray(Image.open(tmp_path / "mask.tif").convert("L"))).tolist() == [0, 76]
    assert np.array_equal(np.asarray(data.read_mask(tmp_path / "mask.tif", (60, 40))), mask * 255)


def test_an_empty_mask_file_is_an_empty_mask(tmp_path):
    save_palette_mask(tmp_path / "mask.tif", np.zeros((40, 60), bool))
    assert not np.asarray(data.read_mask(tmp_path / "mask.tif", (60, 40))).any()


@pytest.mark.parametrize("subset,left", [("A. Segmentation", "grade"), ("B. Disease Grading", "masks")])
def test_a_subset_may_be_missing(tree, subset, left):
    shutil.rmtree(tree / subset)
    records = data.read_idrid(tree, "train")
    assert records and all(getattr(r, left) is not None for r in records)
    assert data.missing_subsets(tree) == [f"{tree} has no '{subset}': nothing to learn {data.SUBSETS[subset]} from"]


# ---- bad input: one line that names the file ----

def damage_nothing_there(root):
    shutil.rmtree(root / "A. Segmentation"), shutil.rmtree(root / "B. Disease Grading")
    (root / "images").mkdir()


def damage_csv(old, new):
    def damage(root):
        path = grading_csv(root)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    return damage


def damage_orphan_grade(root):
    next((root / "B. Disease Grading" / "1. Original Images" / "a. Training Set").iterdir()).parent.joinpath(
        "IDRiD_003.jpg").unlink()


def damage_orphan_image(root):
    folder = root / "B. Disease Grading" / "1. Original Images" / "a. Training Set"
    shutil.copy(folder / "IDRiD_001.jpg", folder / "IDRiD_099.jpg")


def damage_orphan_mask(root):
    mask = first_mask(root, "EX")
    shutil.copy(mask, mask.with_name("IDRiD_77_EX.tif"))


def damage_unmasked(root):
    folder = root / "A. Segmentation" / "1. Original Images" / "a. Training Set"
    shutil.copy(folder / "IDRiD_01.jpg", folder / "IDRiD_50.jpg")


def damage_mask_size(root):
    Image.open(first_mask(root, "OD")).resize((72, 48)).save(first_mask(root, "OD"))


def damage_truncate(path_of):
    def damage(root):
        path = path_of(root)
        path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])
    return damage


def grading_image(root):
    return root / "B. Disease Grading" / "1. Original Images" / "a. Training Set" / "IDRiD_002.jpg"


def damage_text_image(root):
    grading_image(root).write_text("this is no JPEG")


@pytest.mark.parametrize("damage,message", [
    (lambda root: shutil.rmtree(root), r"IDRiD: no such folder; --data wants the folder into which IDRiD was unzipped"),
    (lambda root: [shutil.rmtree(root), root.write_text("x")], r"IDRiD: a file; --data wants the folder"),
    (damage_nothing_there,
     r"IDRiD: expected at least one of the folders 'A. Segmentation' and 'B. Disease Grading', found images"),
    (damage_csv("IDRiD_002,", "IDRiD_002,7"),
     r"Labels.csv line 3: Retinopathy grade of IDRiD_002 is '7\d', expected a whole number from 0 to 4"),
    (damage_csv("IDRiD_002,", "IDRiD_002,x"), r"line 3: Retinopathy grade of IDRiD_002 is 'x\d'"),
    (damage_csv("Retinopathy grade", "Grade"), r"Labels.csv: no column 'Retinopathy grade'; found Image name, Grade"),
    (damage_csv("IDRiD_003,", "IDRiD_002,"), r"Labels.csv line 4: a second row for IDRiD_002"),
    (damage_orphan_grade, r"Labels.csv line 4: a grade for IDRiD_003, but no IDRiD_003.jpg"),
    (damage_orphan_image, r"IDRiD_099.jpg: a photograph without its row in .*Labels.csv"),
    (damage_orphan_mask, r"IDRiD_77_EX.tif: a mask without its photograph IDRiD_77.jpg"),
    (damage_unmasked, r"IDRiD_50.jpg: a photograph without any mask"),
    (damage_mask_size, r"IDRiD_01_OD.tif: a mask of 72x48 for a photograph of 144x96"),
    (damage_truncate(grading_image), r"IDRiD_002.jpg: not a readable image"),
    (damage_truncate(lambda root: first_mask(root, "EX")), r"_EX.tif: not a readable mask"),
    (damage_text_image, r"IDRiD_002.jpg: not a readable image"),
    (lambda root: shutil.rmtree(grading_csv(root).parent), r"Labels.csv: no such file"),
    (lambda root: shutil.rmtree(first_mask(root, "EX").parent), r"3. Hard Exudates: no such folder"),
    (lambda root: [p.unlink() for p in grading_image(root).parent.iterdir()], r"holds no .jpg or .png photograph"),
])
def test_bad_input_is_one_line_naming_the_file(tree, damage, message):
    damage(tree)
    with pytest.raises(InputError, match=message) as caught:
        read_all(tree)
    assert "\n" not in str(caught.value)


# ---- geometry ----

def disc_photograph(width=600, height=400, centre=(330, 190), radius=150) -> tuple[Image.Image, tuple]:
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) < radius
    pixels = np.where(inside[..., None], (180, 90, 40), (4, 3, 3)).astype(np.uint8)
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    return Image.fromarray(pixels), box


def test_field_of_view_is_the_circle():
    image, box = disc_photograph()
    assert np.abs(np.array(data.field_of_view(image)) - box).max() < 600 / 256 * 2


def test_field_of_view_of_a_black_image_is_the_image():
    assert data.field_of_view(Image.new("RGB", (300, 200), (2, 2, 2))) == (0, 0, 300, 200)


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
    record = Record("x", tmp_path / f"photo.{suffix}", masks={"EX": tmp_path / "m.tif"})
    sample = data.Photographs([record], 128)[0, None]
    assert sample.image.shape == (3, 128, 128) and (sample.geometry.width, sample.geometry.height) == (2000, 1400)
    for found in (sample.image[2] > 150, sample.masks[data.LESIONS.index("EX")]):
        y, x = (v.float().mean().item() + 0.5 for v in found.nonzero(as_tuple=True))
        assert math.dist((x, y), sample.geometry.to_sample(np.array(dot))) < 0.6
        assert math.dist(dot, sample.geometry.to_file(np.array((x, y)))) < 0.6 * 1000 / 128
    assert np.allclose(sample.geometry.to_file(sample.geometry.to_sample(np.array([[3.0, 5.0]]))), [[3, 5]])
    assert abs(sample.geometry.scale_x / sample.geometry.scale_y - 1) < 0.02  # the aspect is kept


@pytest.mark.parametrize("width,height", [(1000, 667), (1001, 701), (997, 1333)])
def test_odd_sizes_and_a_retina_that_touches_the_edge(tmp_path, width, height):
    image, _ = disc_photograph(width, height, (width // 2, height // 2), max(width, height) // 2)
    image.save(tmp_path / "photo.jpg", quality=95)
    save_palette_mask(tmp_path / "m.tif", np.ones((height, width), bool))
    sample = data.Photographs([Record("x", tmp_path / "photo.jpg", masks={"OD": tmp_path / "m.tif"})], 64)[0, None]
    corners = sample.geometry.to_sample(np.array([(0, 0), (width, height)]))
    inside = sample.masks[-1].nonzero()
    assert np.abs(corners[0] - inside.min(0).values.flip(0).numpy()).max() < 0.6
    assert np.abs(corners[1] - inside.max(0).values.flip(0).numpy() - 1).max() < 0.6


def test_size_does_not_move_the_split(tmp_path):
    record = photograph(tmp_path / "a.jpg", 0)
    for key in ("thumbnail", "vessels"):
        assert np.array_equal(*(data.prepare(record, size)[key] for size in (64, 512)))


def test_reduced_decoding_is_close_to_full_decoding(tmp_path):
    drawn = Image.fromarray(synthetic.draw(synthetic.plan(0, 3), 1024)[0])
    drawn.save(tmp_path / "a.jpg", quality=92), Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    fast, full = (data.prepare(Record("x", tmp_path / f"a.{s}"), 128)["image"].astype(float) for s in ("jpg", "png"))
    assert 10 * math.log10(255 ** 2 / ((fast - full) ** 2).mean()) > 38  # dB


# ---- split ----

def fake_records(seed: int, number: int = 200) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [Record(f"r{i}", Path(f"{i}.jpg"), int(rng.choice(5, p=[0.4, 0.1, 0.25, 0.15, 0.1])) if i % 9 else None, 0,
                   {} if i % 9 == 0 else None, eye=f"eye{rng.integers(number * 2 // 3)}") for i in range(number)]


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_eyes_whole_and_strata_even(seed):
    records = fake_records(seed)
    training, validation = data.split(records, seed)
    assert {r.name for r in training} | {r.name for r in validation} == {r.name for r in records}
    assert len(training) + len(validation) == len(records)
    assert {r.eye for r in training}.isdisjoint(r.eye for r in validation)
    for label in ("grade", "masks"):
        whole = Counter(repr(getattr(r, label)) for r in records)
        part = Counter(repr(getattr(r, label)) for r in validation)
        assert all(abs(part[k] - n / 5) <= 2.5 for k, n in whole.items())


def test_split_depends_on_the_seed_and_not_on_the_order():
    records = fake_records(0)
    names, shuffled = {r.name for r in data.split(records, 1)[1]}, list(reversed(records))
    assert names == {r.name for r in data.split(shuffled, 1)[1]} != {r.name for r in data.split(records, 2)[1]}


# ---- cache ----

def test_cache_is_used_and_follows_the_file(tree, monkeypatch):
    records = data.read_idrid(tree, "train")
    first = data.Photographs(records, 64)
    calls = []
    monkeypatch.setattr(data, "fill_cache", lambda record, **_: calls.append(record))
    monkeypatch.setattr(data, "ProcessPoolExecutor", InProcess)
    data.Photographs(records, 64)
    assert not calls
    path = records[0].image
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    data.build_cache(records, 64, data.CACHE)
    assert [r.name for r in calls] == [records[0].name]
    assert data.cache_path(records[1], 64, data.CACHE) != data.cache_path(records[1], 96, data.CACHE)
    assert first[0, None].image.shape == (3, 64, 64)


class InProcess:
    """Stands in for a process pool, so that what is patched here is what runs."""
    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, f, items, chunksize):
        return map(f, items)


def test_masks_survive_the_cache_bit_for_bit():
    records = data.drawn_records("test")[:4]
    photographs = data.Photographs(records, 64)
    for i, record in enumerate(records):
        image, masks = synthetic.draw(synthetic.plan(*record.drawing), 64)
        sample = photographs[i, None]
        assert torch.equal(sample.masks, torch.from_numpy(masks))
        assert torch.equal(sample.image, torch.from_numpy(image).permute(2, 0, 1))
        assert (sample.grade, sample.edema) == (record.grade, record.edema)


# ---- augmentation ----

def test_augmentation_moves_image_and_masks_together():
    """Paint the masked pixels white, augment: the white has moved where the mask has."""
    record = next(r for r in data.drawn_records("test") if r.grade == 0)
    sample = data.Photographs([record], 128)[0, None]
    disc = data.LESIONS.index("OD")
    sample.image = torch.where(sample.masks[disc], 255, 0).to(torch.uint8).expand(3, -1, -1).clone()
    moved = set()
    for draw in range(20):
        new = data.augment(sample, draw)
        white = new.image.float().mean(0) > 0.4 * new.image.max()
        overlap = (white & new.masks[disc]).sum() / (white | new.masks[disc]).sum()
        assert overlap > 0.8
        moved.add(tuple(v.float().mean().round().int().item() for v in new.masks[disc].nonzero(as_tuple=True)))
    assert len(moved) > 15


def test_augmentation_is_a_function_of_its_draw_and_leaves_the_generator_alone():
    photographs = data.Photographs(data.drawn_records("test")[:1], 64)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = photographs[0, 5], photographs[0, 5], photographs[0, 6]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.image, b.image) and torch.equal(a.masks, b.masks) and not torch.equal(a.image, c.image)


# ---- batches ----

def test_every_step_sees_every_task_and_every_photograph_comes_around():
    records = fake_records(0)
    steps = data.Steps(records, [CLS, SEG], 16, 0, True)
    assert steps.quota.sum() == 16 and len(steps.streams) == 2
    seen = Counter()
    for step in steps.range(0, 3 * steps.per_epoch):
        chosen = [records[i] for i, _ in step]
        assert len(chosen) == 16
        assert any(r.grade is not None for r in chosen) and any(r.masks is not None for r in chosen)
        seen.update(r.name for r in chosen)
    assert set(seen) == {r.name for r in records}
    for stream in steps.streams:  # evenly: nobody is seen twice more often than another of the same stream
        counts = [seen[records[i].name] for i in stream]
        assert max(counts) - min(counts) <= 1
    rare, common = sorted(steps.streams, key=len)
    assert 1 < seen[records[rare[0]].name] / seen[records[common[0]].name] < len(common) / len(rare)


def test_steps_can_be_repeated_from_the_middle():
    steps = data.Steps(fake_records(0), [CLS, SEG], 8, 3, True)
    whole = list(steps.range(0, 50))
    assert whole[30:] == list(steps.range(30, 50))
    draws = [draw for step in whole for _, draw in step]
    assert len(set(draws)) == len(draws)
    assert whole != list(data.Steps(fake_records(0), [CLS, SEG], 8, 4, True).range(0, 50))


def test_photographs_without_a_wanted_label_are_left_out():
    records = fake_records(0)
    steps = data.Steps(records, [SEG], 8, 0, False)
    assert all(records[i].masks is not None and draw is None for s in steps.range(0, 9) for i, draw in s)


def test_batch_must_hold_one_of_each_stream():
    with pytest.raises(InputError, match="--batch 1: .* use at least 2"):
        data.Steps(fake_records(0), [CLS, SEG], 1, 0, True)


def test_collate_points_targets_at_their_photographs(shared_tree):
    records = data.read_idrid(shared_tree, "train")
    photographs = data.Photographs(records, 64)
    order = [0, 10, 3, 12, 7]
    batch = data.collate([photographs[i, None] for i in order], [CLS, SEG])
    assert batch.rows["cls"].tolist() == [1, 3, 4] and batch.rows["seg"].tolist() == [0, 2]
    assert batch.targets["cls"].tolist() == [records[i].grade for i in (10, 12, 7)]
    assert torch.equal(batch.targets["seg"][1], photographs[3, None].masks)
    assert torch.equal(batch.images[3], photographs[12, None].image) and batch.names[4] == records[7].name
    only = data.collate([photographs[10, None]], [CLS, SEG])
    assert only.rows["seg"].tolist() == [] and "seg" not in only.targets


# ---- copies and eyes ----

def photograph(path: Path, index: int, shift=(0, 0), exposure=1.0, quality=92, blur=0.0) -> Record:
    """A drawn eye as a file of its own, the view shifted by whole pixels of 300, in another light."""
    image = synthetic.draw(synthetic.plan(11, index), 300)[0].astype(float) * exposure
    y, x = (np.arange(300) - 149.5 for _ in range(2))
    inside = np.hypot(x[None], y[:, None])[..., None] < 120  # the camera's own round field, which does not shift
    image = np.roll(image, shift, (0, 1)) * inside
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
    picture.save(path, quality=quality)
    return Record(path.stem, path, grade=synthetic.plan(11, index).grade, eye=path.stem)


def prepared(records, key):
    return np.stack([data.prepare(r, 64)[key] for r in records])


def test_re_encoded_copies_are_found_and_nothing_else(tmp_path):
    records = [photograph(tmp_path / f"{i}.jpg", i) for i in range(6)]
    records += [photograph(tmp_path / "copy.jpg", 2, quality=75), photograph(tmp_path / "bright.jpg", 3, exposure=1.2)]
    assert data.copies(prepared(records, "thumbnail")) == [(2, 6)]


def test_one_eye_is_known_again_by_its_vessels(tmp_path):
    records = [photograph(tmp_path / f"{i}.jpg", i) for i in range(8)]
    records += [photograph(tmp_path / "a.jpg", 0, (20, -30)), photograph(tmp_path / "b.jpg", 1, (-12, 25), 0.8),
                photograph(tmp_path / "c.jpg", 2, (0, 3), 1.2, blur=1.0)]
    scores = data.vessel_scores(prepared(records, "vessels"))
    same = {(0, 8), (1, 9), (2, 10)}
    for i, j in itertools.combinations(range(len(records)), 2):
        assert (scores[i, j] >= data.SAME_EYE) == ((i, j) in same)


def test_dust_and_the_border_of_the_camera_are_no_vessels(tmp_path):
    """Two blurred views of different eyes through the same dirty lens; dust lies out of focus."""
    records = [photograph(tmp_path / f"{i}.jpg", i, blur=4.0) for i in (0, 1)]
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:300, :300]
    dust = np.full((300, 300), 255, np.uint8)
    for _ in range(40):
        (spot_x, spot_y), radius = rng.integers(80, 220, 2), rng.integers(2, 5)
        dust[np.hypot(x - spot_x, y - spot_y) < radius] = 178
    dust = np.asarray(Image.fromarray(dust).filter(ImageFilter.GaussianBlur(2)))[..., None] / 255
    for record in records:
        Image.fromarray((np.asarray(Image.open(record.image)) * dust).astype(np.uint8)).save(record.image, quality=95)
    assert data.vessel_scores(prepared(records, "vessels"))[0, 1] < data.SAME_EYE


def test_copies_share_their_labels_and_one_of_them_stays():
    masks = {"EX": Path("m.tif")}
    records = [Record("grading/1", Path("a"), 2, 0), Record("grading/2", Path("b"), 3, 1),
               Record("grading/3", Path("c"), 4, 2), Record("segmentation/1", Path("d"), masks=masks)]
    joined = data.join_copies(records, [(0, 1), (1, 3)])
    assert [(r.name, r.grade, r.edema, r.masks) for r in joined] == [
        ("segmentation/1", 3, 1, masks), ("grading/3", 4, 2, None)]


def test_connected():
    assert data.connected([(1, 4), (4, 5), (0, 3)], 6) == [0, 1, 2, 0, 1, 1]
    assert data.connected([], 2) == [0, 1]


def test_no_eye_lies_on_both_sides_of_a_split(tmp_path, monkeypatch):
    records = [photograph(tmp_path / f"{i}.jpg", i) for i in range(12)]
    records += [photograph(tmp_path / f"{i}_again.jpg", i, (10, -14), 0.9) for i in range(0, 12, 2)]
    records += [photograph(tmp_path / f"{i}_copy.jpg", i, quality=80) for i in range(1, 12, 4)]
    found = data.find_eyes(records, 64)
    assert len(found) == 18  # three copies have been joined
    for seed in range(10):
        sides = [{r.name.split("_")[0] for r in part} for part in data.split(found, seed)]
        assert sides[0] and sides[1] and sides[0].isdisjoint(sides[1])
    monkeypatch.setattr(data, "vessel_scores", None)  # the second time it is read from the cache
    assert data.find_eyes(records, 64) == found


# ---- the real photographs, where they are at hand ----

def test_real_counts_and_labels():
    records = data.read_idrid(real_idrid("idrid"), "train")
    masked = [r for r in records if r.masks is not None]
    assert (len(masked), len(records)) == (54, 467)
    files = Counter(itertools.chain.from_iterable(r.masks for r in masked))
    assert files == {"MA": 54, "HE": 53, "EX": 54, "SE": 26, "OD": 54}
    assert [r.name for r in masked if "HE" not in r.masks] == ["segmentation/IDRiD_43"]
    assert Counter(r.grade for r in records if r.grade is not None) == {0: 134, 1: 20, 2: 136, 3: 74, 4: 49}
    assert Counter(r.edema for r in records if r.edema is not None) == {0: 177, 1: 41, 2: 195}


@pytest.mark.parametrize("name", ["idrid", "idrid-original"])
def test_real_photographs_crop_to_the_retina_and_masks_fit(name):
    root = real_idrid(name)
    records = [r for r in data.read_idrid(root, "train") if r.masks is not None][:6]
    records += [r for r in data.read_idrid(root, "train") if r.masks is None][:6]
    photographs = data.Photographs(records, 256)
    for i, record in enumerate(records):
        sample = photographs[i, None]
        lit = sample.image.amax(0) > 30
        assert 0.6 < lit.float().mean() < 0.9  # a circle that fills its square, cut at top and bottom
        assert lit.any(0).float().mean() > 0.95
        assert abs(sample.geometry.scale_x / sample.geometry.scale_y - 1) < 0.01
        if record.masks is None:
            continue
        disc = sample.masks[data.LESIONS.index("OD")]
        assert 0.01 < disc.float().mean() < 0.05
        green = sample.image[1].float()
        assert green[disc].mean() > 1.2 * green[lit].mean()  # the disc is bright where its mask says
        for kind in record.masks:
            original = np.asarray(data.read_mask(record.masks[kind], Image.open(record.image).size)) > 0
            assert original.any()


def test_real_originals_and_reductions_give_the_same_sample():
    """The same photograph at 4288x2848 and at 1072x712 lands on the same pixels of the sample."""
    originals = {r.name: r for r in data.read_idrid(real_idrid("idrid-original"), "train")}
    reduced = {r.name: r for r in data.read_idrid(real_idrid("idrid"), "train")}
    for name in list(originals)[:8]:
        a, b = (data.prepare(r, 256)["image"].astype(float) for r in (originals[name], reduced[name]))
        assert 10 * math.log10(255 ** 2 / ((a - b) ** 2).mean()) > 30  # dB


CONFIRMED = [("seg 25", "347"), ("seg 11", "083"), ("013", "397"), ("seg 26", "299"), ("seg 39", "271"), ("043", "401"),
             ("038", "126"), ("339", "354"), ("319", "338")]
FALSE_ALARMS = [("031", "036"), ("031", "337"), ("183", "200")]
COPIES = [("seg 01", "102"), ("seg 02", "366"), ("seg 03", "369"), ("seg 06", "196"), ("seg 08", "207"),
          ("seg 53", "012")]
IDENTICAL = [("021", "391"), ("028", "327"), ("045", "333")]


def test_real_copies_and_eyes():
    records = data.read_idrid(real_idrid("idrid"), "train")
    data.build_cache(records, 256, data.CACHE)
    number = {r.name.replace("segmentation/IDRiD_", "seg ").replace("grading/IDRiD_", ""): i
              for i, r in enumerate(records)}
    paths = [data.cache_path(r, 256, data.CACHE) for r in records]
    thumbnails, maps = (data.stored_arrays(paths, key) for key in ("thumbnail", "vessels"))
    pairs = set(data.copies(thumbnails))
    assert {(number[a], number[b]) for a, b in COPIES + IDENTICAL} <= pairs
    assert sum(a < 54 <= b for a, b in pairs) == 42 and sum(54 <= a for a, _ in pairs) == 5
    scores = data.vessel_scores(maps)
    assert all(scores[number[a], number[b]] >= data.SAME_EYE for a, b in CONFIRMED + COPIES)
    assert all(scores[number[a], number[b]] < data.SAME_EYE for a, b in FALSE_ALARMS)
    others = scores.copy()
    for a, b in pairs | {tuple(sorted((number[a], number[b]))) for a, b in [*CONFIRMED, ("046", "404")]}:
        others[a, b] = 0
    # also between all copies of two photographs of one eye: what remains are different eyes, far below the threshold
    leaders = data.connected(np.argwhere(scores >= data.SAME_EYE).tolist(), len(records))
    assert len(set(leaders)) == 467 - 42 - 5 - 10 and others[others < data.SAME_EYE].max() < 0.35
    assert all(leaders[a] == leaders[b] for a, b in np.argwhere(others >= data.SAME_EYE))
    eyes = data.find_eyes(records, 256)
    assert len(eyes) == 467 - 42 - 5 and len({r.eye for r in eyes}) == 410
    assert {r.name: r.grade for r in eyes}["segmentation/IDRiD_01"] == records[number["102"]].grade
