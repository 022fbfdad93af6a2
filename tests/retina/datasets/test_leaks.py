"""Copies, eyes, splits: what shows one eye is found, what does not is not, and no eye is in two splits."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import fake_records, photograph, real_idrid, vessel_drawings
from retina.datasets import cache, leaks, preprocess, splits, vessels
from retina.datasets.leaks import find_eyes
from retina.datasets.masks import MaskFile
from retina.datasets.readers import read_idrid
from retina.datasets.records import Record
from retina.files import InputError


def prepared(records, key):
    return np.stack([preprocess.preprocess(r, 64)[key] for r in records])


def scores(records) -> dict[tuple[int, int], float]:
    pairs, values = vessels.same_eye_scores(prepared(records, "vessels"))
    return {(int(i), int(j)): float(v) for (i, j), v in zip(pairs, values)}


def brute_score(a: np.ndarray, b: np.ndarray, turn: float, zoom: float) -> float:
    """Definition of the score, shift by shift: mean product over the overlap, which counts as 40 % at least."""
    v = vessels.standardise(torch.from_numpy(np.stack([a, b])).float())
    a, b = v[0].numpy(), vessels.rotate_and_zoom(v[1:], turn, zoom)[0].numpy()
    side, field = len(a), (a != 0)
    reach, best = round(vessels.REACH * side), -1.0
    for dy, dx in itertools.product(range(-reach, reach + 1, 1), repeat=2):
        here = (slice(max(0, -dy), side - max(0, dy)), slice(max(0, -dx), side - max(0, dx)))
        there = (slice(max(0, dy), side - max(0, -dy)), slice(max(0, dx), side - max(0, -dx)))
        overlap = max((field[here] & field[there]).sum(), 0.4 * field.sum())
        best = max(best, (a[here] * b[there]).sum() / overlap)
    return best


# ---- vessels ----

def test_correlation_equals_brute_force_over_shifts(tmp_path):
    """Two maps of one field; the transform's answer against a loop over all shifts."""
    maps = prepared([photograph(tmp_path / "a.png", 0), photograph(tmp_path / "b.png", 0, (7, -9), turn=3)], "vessels")
    maps = np.where((maps > 0).all(0), maps, 0)  # the same pixels are inside, so that field and mask agree
    v = vessels.standardise(torch.from_numpy(maps).float())
    correlation = vessels.Correlation((v[0] != 0).float())
    fast = correlation.best(correlation.spectra(v[:1]), correlation.spectra(vessels.rotate_and_zoom(v[1:], -3, 1.04)))
    assert float(fast) == pytest.approx(brute_score(*maps, -3, 1.04), abs=1e-4)


def test_one_eye_is_known_again_by_its_vessels(tmp_path):
    records = [photograph(tmp_path / f"{i}.jpg", i) for i in range(8)]
    records += [photograph(tmp_path / "a.jpg", 0, (20, -30)), photograph(tmp_path / "b.jpg", 1, (-12, 25), 0.8),
                photograph(tmp_path / "c.jpg", 2, (0, 3), 1.2, blur=1.0), photograph(tmp_path / "d.jpg", 3, turn=7),
                photograph(tmp_path / "e.jpg", 4, zoom=1.08), photograph(tmp_path / "f.jpg", 5, (9, 9), turn=-11),
                photograph(tmp_path / "g.jpg", 6, (-8, 4), 1.1, zoom=0.93, turn=4)]
    same = {(i, i + 8) for i in range(7)}
    found = scores(records)
    for pair in itertools.combinations(range(len(records)), 2):
        assert (found.get(pair, 0) >= leaks.SAME_EYE) == (pair in same)


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_dust_and_the_border_of_the_camera_are_no_vessels(tmp_path, sharp, seed):
    """Two blurred views of different eyes through the same dirty lens."""
    records = [photograph(tmp_path / f"{i}.jpg", i, blur=4.0) for i in (2 * seed, 2 * seed + 1)]
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:300, :300]
    dust = np.full((300, 300), 255, np.uint8)
    for _ in range(40):
        (spot_x, spot_y), radius = rng.integers(80, 220, 2), rng.integers(2, 5)
        dust[np.hypot(x - spot_x, y - spot_y) < radius] = 178
    dust = Image.fromarray(dust) if sharp else Image.fromarray(dust).filter(ImageFilter.GaussianBlur(2))
    dust = np.asarray(dust)[..., None] / 255
    for record in records:
        Image.fromarray((np.asarray(Image.open(record.image)) * dust).astype(np.uint8)).save(record.image, quality=95)
    assert scores(records).get((0, 1), 0) < leaks.SAME_EYE


def test_pictures_without_a_field_of_view_have_no_eye(tmp_path):
    """Lines in the same places, as in a form or under a caption, do not make two pictures one eye."""
    for i in range(2):
        pixels = np.random.default_rng(i).integers(100, 255, (300, 300, 3), dtype=np.uint8)
        pixels[::37], pixels[:, ::41] = 20, 20
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    records = [Record(str(i), tmp_path / f"{i}.png") for i in range(2)]
    assert not prepared(records, "vessels").any() and scores(records) == {}


def found_eyes(maps: np.ndarray) -> dict[tuple[int, int], float]:
    pairs, values = vessels.same_eye_scores(maps)
    return {(i, j): v for (i, j), v in zip(pairs.tolist(), values.tolist()) if v >= leaks.SAME_EYE}


def test_pairs_of_like_spectrum_hold_those_that_comparing_all_pairs_finds(monkeypatch):
    """Eight eyes twice among forty maps, each of which is compared with three others, not thirty-nine."""
    monkeypatch.setattr(vessels, "NEAREST", 3)
    maps, every = torch.from_numpy(vessel_drawings(40, 8)), torch.tril_indices(40, 40, -1).flip(0).T
    every = every[vessels.correlate(maps, every, vessels.COARSE_VIEWS, 3) >= vessels.SCREENING_SCORE]
    values = vessels.correlate(maps, every, vessels.FINE_VIEWS, 1).tolist()
    expected = {(i, j): v for (i, j), v in zip(every.tolist(), values) if v >= leaks.SAME_EYE}
    assert set(expected) == {(i, i + 32) for i in range(8)}
    assert found_eyes(maps.numpy()) == pytest.approx(expected, abs=1e-5)


def test_few_are_compared_and_hidden_pairs_are_among_them(monkeypatch):
    """Two candidates for each of 160 maps: a pair is found by what is alike in it, not by chance."""
    monkeypatch.setattr(vessels, "NEAREST", 2)
    pairs = vessels.nearest(torch.from_numpy(vessel_drawings(160, 40))).tolist()
    assert {(i, i + 120) for i in range(40)} <= set(map(tuple, pairs)) and all(i < j for i, j in pairs)
    assert Counter(j for _, j in pairs) == Counter({j: min(j, 2) for j in range(160)})


def test_what_is_found_does_not_depend_on_how_many_are_in_work_at_once(monkeypatch):
    maps = vessel_drawings(16, 4)
    expected = found_eyes(maps)
    monkeypatch.setattr(vessels, "BLOCK", 7)
    assert len(expected) == 4 and found_eyes(maps) == pytest.approx(expected, abs=1e-5)


def test_an_eye_with_more_photographs_than_are_compared_is_one_eye(monkeypatch):
    """Five views of each of four eyes, of which each is compared with two."""
    monkeypatch.setattr(vessels, "NEAREST", 2)
    maps = vessel_drawings(8, 4)
    maps = np.concatenate([maps] + [np.roll(maps[:4], shift, (1, 2)) for shift in ((5, 3), (-6, 4), (2, -8))])
    assert splits.connected_components(found_eyes(maps), len(maps)) == [i % 4 for i in range(20)]


# ---- copies ----

def test_re_encoded_copies_are_found_and_nothing_else(tmp_path):
    records = [photograph(tmp_path / f"{i}.jpg", i) for i in range(6)]
    records += [photograph(tmp_path / "copy.jpg", 2, quality=75), photograph(tmp_path / "bright.jpg", 3, exposure=1.2)]
    assert leaks.find_copies(prepared(records, "thumbnail")) == ([(2, 6)], [])


def orientations(picture: np.ndarray) -> list[np.ndarray]:
    """A picture as it is, and as Pillow flips and turns it."""
    return [picture, *(np.asarray(Image.fromarray(picture).transpose(way)) for way in Image.Transpose)]


@pytest.mark.parametrize("side", [12, 24])
def test_copies_equal_brute_force(side):
    """Upright, mirrored and turned copies, from hardly changed to clearly changed, against all pairs in full."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 255, (80, side, side, 3)).astype(np.uint8)
    for i in range(40, 80):
        other = orientations(thumbnails[i - 40])[i % 8] if i % 2 else thumbnails[i - 40]
        thumbnails[i] = np.clip(other + rng.normal(0, (i - 40) / 8, other.shape), 0, 255)
    found = [], []
    for i, j in itertools.combinations(range(80), 2):
        close = [np.sqrt(((thumbnails[i].astype(float) - x) ** 2).mean()) <= leaks.COPY_RMSE
                 for x in orientations(thumbnails[j])]
        if any(close):
            found[not close[0]].append((i, j))
    assert leaks.find_copies(thumbnails) == found and all(8 < len(pairs) < 16 for pairs in found)


def test_dark_pictures_are_no_copies_of_each_other():
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 3, (4, 108, 108, 3)).astype(np.uint8)
    assert leaks.find_copies(np.concatenate([dark, dark[:1], dark[1:2, ::-1]])) == ([(0, 4)], [(1, 5)])


def oblong(record: Record, way: Image.Transpose | None = None) -> Record:
    """The photograph with black borders left and right, saved anew, perhaps mirrored or turned."""
    picture = Image.open(record.image)
    wide = Image.new("RGB", (picture.width + 140, picture.height))
    wide.paste(picture, (70, 0))
    (wide if way is None else wide.transpose(way)).save(record.image, quality=80)
    return record


def test_mirrored_and_turned_copies_show_one_eye_and_are_not_joined(tmp_path):
    """All seven ways, of which four exchange width and height; three lie in the test split."""
    records = [oblong(photograph(tmp_path / f"{i}.jpg", i)) for i in range(9)]
    records += [oblong(photograph(tmp_path / f"{i}_{way.name}.jpg", i, split="test" if i < 3 else "train"), way)
                for i, way in enumerate(Image.Transpose)]
    comparison = leaks.compare(records, 64)
    assert not len(comparison.copies) and comparison.turned.tolist() == [[i, i + 9] for i in range(7)]
    found, conflicts = comparison.join(records)
    assert [r.name for r in found] == [r.name for r in records] and not conflicts
    for k in range(1, 6):
        split = splits.split(found, f"{k}/5")
        assert {r.name for r in split.leaks} == {"0", "1", "2"}
        assert {eye_of(r) for r in split.training}.isdisjoint(eye_of(r) for r in split.validation)


# ---- what is not compared ----

@pytest.mark.parametrize("side,compared", [(28, False), (60, False), (72, True), (300, True)])
def test_vessels_of_photographs_that_are_too_small_are_not_compared(tmp_path, side, compared):
    """28 pixels hold no vessels. Copies are found all the same, and how many are too small is said."""
    records = [photograph(tmp_path / f"{i}.png", i) for i in range(3)]
    records += [photograph(tmp_path / "again.png", 0, (10, -14), 0.9), photograph(tmp_path / "copy.png", 1)]
    for record in records:  # the field is 240 pixels wide
        Image.open(record.image).resize((round(side / 0.8),) * 2, Image.LANCZOS).save(record.image)
    comparison = leaks.compare(records, 64)
    assert comparison.copies.tolist() == [[1, 4]] and prepared(records, "vessels").any() == compared
    assert comparison.same_eye() == [[1, 4], [0, 3]][:1 + compared]
    assert [note[:28] for note in comparison.notes] == ["5 photographs are too small "] * (not compared)


def test_vessels_are_not_compared_where_each_photograph_has_a_group(tmp_path, monkeypatch):
    """One without a group, and all are compared."""
    records = [photograph(tmp_path / "a.jpg", 0), photograph(tmp_path / "b.jpg", 0, (10, -14)),
               photograph(tmp_path / "c.jpg", 1), photograph(tmp_path / "d.jpg", 1, quality=80),
               oblong(photograph(tmp_path / "e.jpg", 2)), oblong(photograph(tmp_path / "f.jpg", 2),
                                                                Image.Transpose.ROTATE_90)]
    grouped = [replace(r, eye=f"group {r.name}") for r in records]
    some = leaks.compare([*grouped[:5], records[5]], 64)
    assert some.same_eye() == [[2, 3], [4, 5], [0, 1]] and not len(some.notes)
    monkeypatch.setattr(leaks, "same_eye_scores", None)
    every = leaks.compare(grouped, 64)
    assert every.same_eye() == [[2, 3], [4, 5]] and "each photograph has a group" in str(*every.notes)


def joined(records, pairs, sizes=None):
    return splits.join_copies(records, pairs, sizes or [(100, 50)] * len(records))


def test_copies_share_their_labels_and_one_of_them_stays():
    masks = {"EX": Path("m.tif")}
    records = [Record("grading/1", Path("a"), labels={"grade": 2, "edema_risk": 0}),
               Record("grading/2", Path("b"), labels={"grade": 3, "edema_risk": 1}),
               Record("grading/3", Path("c"), labels={"grade": 4, "edema_risk": 2}),
               Record("segmentation/1", Path("d"), labels={"masks": masks})]
    found, conflicts = joined(records, [(0, 1), (1, 3)])
    assert [(r.name, r.grade, r.edema_risk, r.masks, r.image) for r in found] == [
        ("segmentation/1", 3, 1, masks, Path("d")), ("grading/3", 4, 2, None, Path("c"))]
    assert [(c.label, c.names, c.values, c.used) for c in conflicts] == [
        ("grade", ("grading/1", "grading/2"), (2, 3), 3), ("edema_risk", ("grading/1", "grading/2"), (0, 1), 1)]


def test_points_are_carried_over_in_the_pixels_of_the_image_that_stays():
    records = [Record("a", Path("a"), labels={"landmarks": {"disc": (40.0, 20.0)}}),
               Record("b", Path("b"), labels={"masks": {"EX": MaskFile(Path("m"))}}),
               Record("c", Path("c"), labels={"landmarks": {"disc": (10.4, 5.2), "fovea": (20.0, 10.0)}})]
    found, conflicts = joined(records, [(0, 1), (0, 2)], [(400, 200), (200, 100), (100, 50)])
    assert found[0].name == "b" and not conflicts  # 20 and 20.8 differ by less than 1 % of the width
    assert found[0].landmarks == {"disc": pytest.approx((20.4, 10.2)), "fovea": pytest.approx((40, 20))}
    records[2] = Record("c", Path("c"), labels={"landmarks": {"disc": (15.0, 5.0)}})
    found, conflicts = joined(records, [(0, 1), (0, 2)], [(400, 200), (200, 100), (100, 50)])
    assert [(c.label, c.values) for c in conflicts] == [("disc", ((20, 10), (30, 10)))]
    assert found[0].landmarks == {"disc": pytest.approx((25, 10))}


def test_categories_that_contradict_each_other_do_not_count():
    records = [Record("a", Path("a"), labels={"category": "z"}), Record("b", Path("b"), labels={"category": "y"})]
    found, conflicts = joined(records, [(0, 1)])
    assert [r.category for r in found] == [None] and conflicts[0].values == ("z", "y")
    assert conflicts[0].as_dict() == {
        "label": "category", "photographs": ["a", "b"], "values": ["z", "y"], "used": None}


def test_no_label_crosses_from_test_into_training():
    point = {"disc": (1, 1)}
    records = [Record("a", Path("a"), "train", {"grade": 0}),
               Record("b", Path("b"), "test", {"grade": 3, "landmarks": point})]
    found, conflicts = joined(records, [(0, 1)])
    assert [(r.name, r.grade, r.landmarks) for r in found] == [("a", 0, None), ("b", 3, point)]
    assert not conflicts


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_scored_stays_as_it_was_given(split):
    records = [Record("a", Path("a"), split, {"grade": 1}), Record("b", Path("b"), split, {"grade": 4})]
    assert joined(records, [(0, 1)]) == (records, [])


def test_masks_of_copies_are_put_together_lesion_by_lesion():
    one, two, other = Path("one.tif"), Path("two.tif"), Path("other.tif")
    records = [Record("a", Path("a"), labels={"masks": {"MA": one, "SE": None, "HE": None}}),
               Record("b", Path("b"), labels={"masks": {"SE": two, "EX": one, "HE": None, "OD": two}}),
               Record("c", Path("c"), labels={"masks": {"OD": other}})]
    found, conflicts = joined(records, [(0, 1), (1, 2)])
    assert [(r.name, r.masks) for r in found] == [("b", {"MA": one, "SE": two, "HE": None, "EX": one, "OD": two})]
    assert [(c.label, c.names, c.values, c.used) for c in conflicts] == [
        ("SE", ("a", "b"), ("none", "two.tif"), "two.tif"), ("OD", ("b", "c"), ("two.tif", "other.tif"), "two.tif")]


def test_copies_of_another_size_keep_their_masks_on_a_record_of_their_own():
    """Of a the copy b, half as large, has three masks: both stay, as one eye; a lesion "none" is known to both."""
    one, two, other = Path("one.tif"), Path("two.tif"), Path("other.tif")
    point = {"disc": (40.0, 20.0)}
    records = [Record("a", Path("a"), eye="e", labels={"grade": 1, "masks": {"MA": one, "SE": None, "HE": None}}),
               Record("b", Path("b"), eye="e", labels={"masks": {"SE": two, "EX": one, "OD": two}}),
               Record("c", Path("c"), eye="e", labels={"grade": 2, "landmarks": point, "masks": {"OD": other}}),
               Record("d", Path("d"), eye="e", labels={"grade": 2})]
    found, conflicts = joined(records, [(0, 1), (1, 2), (2, 3)], [(200, 100), (100, 50), (200, 100), (400, 200)])
    assert [(r.name, r.eye, r.labels) for r in found] == [
        ("b", "e", {"grade": 2, "landmarks": {"disc": (20, 10)}, "masks": {"SE": two, "EX": one, "OD": two,
                                                                           "HE": None}}),
        ("a", "e", {"masks": {"MA": one, "HE": None, "OD": other}})]
    assert [(c.label, c.names, c.values, c.used) for c in conflicts] == [
        ("grade", ("a", "c", "d"), (1, 2, 2), 2), ("SE", ("a", "b"), ("none", "two.tif"), "two.tif")]


def test_a_black_mask_file_is_a_mask_that_says_none(tmp_path, monkeypatch):
    """A copy whose masks are black contradicts the one with a lesion; alone it counts as "none"."""
    records = [photograph(tmp_path / f"{name}.png", i) for name, i in (("a", 0), ("b", 0), ("c", 1))]
    for name, value in (("black", 0), ("set", 255)):
        mask = np.zeros((300, 300), np.uint8)
        mask[140:160, 140:160] = value
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    black, lesion = MaskFile(tmp_path / "black.png"), MaskFile(tmp_path / "set.png")
    masks = [{"MA": black, "OD": lesion}, {"MA": lesion, "OD": lesion}, {"MA": black, "SE": black}]
    records = [r.with_labels(masks=m) for r, m in zip(records, masks)]
    found, (conflict,), _ = find_eyes(records, 64)
    seen = replace(black, black=True)
    assert [(r.name, r.masks) for r in found] == [("b", masks[1]), ("c", {"MA": seen, "SE": seen})] and not seen
    assert (conflict.label, conflict.names, conflict.values, conflict.used) == (
        "MA", ("a", "b"), ("none", str(lesion)), str(lesion))
    assert [r.masks for r in find_eyes(records, 64, ignore=True)[0]] == [
        {"MA": seen, "OD": lesion}, masks[1], {"MA": seen, "SE": seen}]
    monkeypatch.setattr(cache, "fill_cache", None)  # what is known to be black is not read again
    cache.ensure_cached([*found[1:], *find_eyes(records, 64, ignore=True)[0]], 64)


def test_connected_components():
    assert splits.connected_components([(1, 4), (4, 5), (0, 3)], 6) == [0, 1, 2, 0, 1, 1]
    assert splits.connected_components([], 2) == [0, 1]


def test_eyes_are_connected_by_vessels_and_by_the_groups_of_the_data_set():
    records = [Record(n, Path(n), eye=group) for n, group in (("a", ""), ("b", "p"), ("c", ""), ("d", "p"), ("e", "q"))]
    assert [r.eye for r in splits.name_eyes(records, [(2, 3)])] == ["a", "b", "b", "b", "e"]


# ---- split ----


@pytest.mark.parametrize("seed", range(5))
def test_folds_keep_eyes_whole_and_strata_even(seed):
    records = fake_records(seed)
    validated = Counter()
    for k in range(1, 6):
        split = splits.split(records, f"{k}/5")
        assert sorted(r.name for r in split.training + split.validation) == sorted(r.name for r in records)
        assert {r.eye for r in split.training}.isdisjoint(r.eye for r in split.validation)
        validated.update(r.name for r in split.validation)
        for label in ("grade", "masks"):
            whole = Counter(repr(getattr(r, label)) for r in records)
            counts = Counter(repr(getattr(r, label)) for r in split.validation)
            assert all(abs(counts[k] - n / 5) <= 2.5 for k, n in whole.items())
    assert validated == Counter(r.name for r in records)  # each photograph is validated on once


def classes_in(records) -> set[tuple]:
    """Grades, risks, lesions with a mask file and landmarks that occur."""
    return {c for r in records for c in (
        ("grade", r.grade), ("edema_risk", r.edema_risk), *(r.landmarks or {}),
        *(lesion for lesion, path in (r.masks or {}).items() if path))} - {("grade", None), ("edema_risk", None)}


@pytest.mark.parametrize("seed", range(40))
def test_training_has_every_class_in_every_fold(seed):
    """Few photographs with many classes, most of them rare; an eye has one to three photographs."""
    rng = np.random.default_rng(seed)
    records = [Record(f"{i}", Path("x"), eye=f"e{rng.integers(12)}").with_labels(
        grade=int(rng.choice(5, p=[0.6, 0.2, 0.1, 0.05, 0.05])), edema_risk=int(rng.choice(3, p=[0.8, 0.1, 0.1])),
        masks={"SE": MaskFile(Path("m")) if rng.random() < 0.1 else None} if rng.random() < 0.5 else None,
        landmarks={"disc": (5, 5)} if rng.random() < 0.1 else None) for i in range(20)]
    number, validated = int(rng.integers(2, 7)), Counter()
    for k in range(1, number + 1):
        split = splits.split(records, f"{k}/{number}")
        assert classes_in(split.training) == classes_in(records)
        validated.update(r.name for r in split.validation)
    eyes = Counter(c for eye in {r.eye for r in records} for c in classes_in([r for r in records if r.eye == eye]))
    alone = {r.name for r in records if any(eyes[c] == 1 for c in classes_in([s for s in records if s.eye == r.eye]))}
    assert set(validated).isdisjoint(alone) and set(validated.values()) == {1} and len(validated) > 5


def test_a_class_of_one_photograph_is_trained_on():
    """The only retina of grade 4; and two retinas of grade 3, of which one is always trained on."""
    grades = [0] * 8 + [1] * 8 + [3] * 2 + [4]
    records = [Record(f"{i}", Path("x"), labels={"grade": g}, eye=f"{i}") for i, g in enumerate(grades)]
    for k in range(1, 6):
        split = splits.split(records, f"{k}/5")
        assert "18" in {r.name for r in split.training} and sum(r.grade == 3 for r in split.training) >= 1
    given = [Record("v", Path("x"), "val", {"grade": 4}, eye="18")]  # a validation split that the data set names
    assert [r.name for r in splits.split(records + given).validated] == ["18"]


def test_split_does_not_depend_on_the_order():
    records = fake_records(0)
    names = {r.name for r in splits.split(records).validation}
    assert names == {r.name for r in splits.split(list(reversed(records))).validation}


def test_training_photographs_of_a_test_eye_are_left_out_unless_kept():
    records = fake_records(0)
    tested = [Record(f"test{i}", Path("t"), "test", {"grade": 0}, eye=f"eye{i}") for i in range(30)]
    split = splits.split(records + tested)
    seen = {r.eye for r in tested}
    assert seen.isdisjoint(r.eye for r in split.training + split.validation)
    assert {r.name for r in split.leaks} == {r.name for r in records if r.eye in seen} and len(split.leaks) > 20
    assert split.test == tested and len(split.training + split.validation + split.leaks) == len(records)
    kept = splits.split(records + tested, keep_leaks=True)
    assert len(kept.training + kept.validation) == len(records) and kept.leaks == split.leaks


def test_a_validation_split_that_the_data_set_names_is_taken_and_protected():
    records = fake_records(0)
    given = [Record(f"val{i}", Path("v"), "val", {"grade": 0}, eye=f"eye{i}") for i in range(20)]
    tested = [Record(f"test{i}", Path("t"), "test", {"grade": 0}, eye=f"eye{i}") for i in range(5)]
    split = splits.split(records + given + tested)
    assert [r.name for r in split.validation] == [f"val{i}" for i in range(5, 20)]
    assert {r.eye for r in split.training}.isdisjoint(r.eye for r in given + tested)
    kept = splits.split(records + given + tested, keep_leaks=True)  # test eyes may be learned, validated ones never
    assert [r.name for r in kept.validation] == [f"val{i}" for i in range(20)]
    assert {r.eye for r in kept.training}.isdisjoint(r.eye for r in given) and kept.leaks == split.leaks


@pytest.mark.parametrize("label", ["edema_risk", "landmarks"])
def test_folds_are_even_for_what_ungraded_photographs_carry(label):
    records = [Record(f"r{i}", Path("x"), eye=f"e{i}").with_labels(
        edema_risk=i % 10 // 9, landmarks={"disc": (1, 1)} if i % 10 else None) for i in range(100)]
    for k in range(1, 6):
        validation = splits.split(records, f"{k}/5").validation
        assert sum(r.edema_risk == 1 for r in validation) == sum(r.landmarks is None for r in validation) == 2


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "1", "a/b", "1/5/2", "-1/5", "", "1/2000", "1/\u0665"])
def test_bad_folds_are_one_line(text):
    with pytest.raises(InputError, match=f"--fold {text}: expected I/N, fold I of N, such as 1/5"):
        splits.split(fake_records(0), text)


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> list[Record]:
    """Eyes photographed again and again: re-encoded, shifted, turned, in another light; some of them for the test."""
    folder = tmp_path_factory.mktemp("album")
    records = [photograph(folder / f"{i}.jpg", i) for i in range(20)]
    records += [photograph(folder / f"{i}_again.jpg", i, (10, -14), 0.9) for i in range(0, 12, 2)]
    records += [photograph(folder / f"{i}_turned.jpg", i, turn=6, exposure=1.1) for i in range(0, 12, 3)]
    records += [photograph(folder / f"{i}_copy.jpg", i, quality=80) for i in range(1, 12, 4)]
    records += [photograph(folder / f"{i}_test{k}.jpg", i, split="test", **how)
                for i, k, how in [(0, 0, {"quality": 70}), (4, 1, {"shift": (-20, 12)}), (5, 2, {"turn": -8}),
                                  (13, 3, {"exposure": 0.8}), (30, 4, {}), (31, 5, {"zoom": 1.05})]]
    return records


def eye_of(record: Record) -> str:
    return record.name.split("_")[0]


def test_no_eye_is_in_two_splits(album, monkeypatch):
    found, *_ = find_eyes(album, 64)
    assert len(found) == len(album) - 3  # three copies have been joined; the copy in the test split stays
    for number in range(2, 8):
        for k in range(1, number + 1):
            split = splits.split(found, f"{k}/{number}")
            training, validation, test, leaks = (
                {eye_of(r) for r in records}
                for records in (split.training, split.validation, split.test, split.leaks))
            assert training and validation and len(test) == 6 and leaks == {"0", "4", "5", "13"}
            assert not (training & validation or training & test or validation & test)
    with_leaks = splits.split(found, keep_leaks=True)
    assert {"0", "4", "5", "13"} <= {eye_of(r) for r in with_leaks.training + with_leaks.validation}
    monkeypatch.setattr(vessels, "same_eye_scores", None)  # the second time it is read from the cache
    assert find_eyes(album, 64)[0] == found


# ---- the real photographs, where they are at hand ----

CONFIRMED = [("seg 25", "347"), ("seg 11", "083"), ("013", "397"), ("seg 26", "299"), ("seg 39", "271"), ("043", "401"),
             ("038", "126"), ("339", "354"), ("319", "338")]
FOUND_HERE = [("046", "404"), ("seg 40", "133")]  # not in anybody's list; looked at
FALSE_ALARMS = [("031", "036"), ("031", "337"), ("183", "200")]
COPIES = [("seg 01", "102"), ("seg 02", "366"), ("seg 03", "369"), ("seg 06", "196"), ("seg 08", "207"),
          ("seg 53", "012")]
IDENTICAL = [("021", "391"), ("028", "327"), ("045", "333")]


def test_real_copies_and_eyes():
    records = read_idrid(real_idrid("idrid")).records
    number = {r.name.replace("segmentation/IDRiD_", "seg ").replace("grading/IDRiD_", ""): i
              for i, r in enumerate(records)}
    found = leaks.compare(records, 256)
    pairs = set(map(tuple, found.copies.tolist()))
    assert {(number[a], number[b]) for a, b in COPIES + IDENTICAL} <= pairs
    assert sum(a < 54 <= b for a, b in pairs) == 42 and sum(54 <= a for a, _ in pairs) == 5 and len(pairs) == 47
    assert not len(found.turned) and not len(found.notes)
    components = splits.connected_components(found.same_eye(), len(records))
    for a, b in CONFIRMED + FOUND_HERE + COPIES:
        assert components[number[a]] == components[number[b]]
    for a, b in FALSE_ALARMS:
        assert components[number[a]] != components[number[b]]
    assert len(set(components)) == 467 - 42 - 5 - len(CONFIRMED + FOUND_HERE)
    same = found.scores >= leaks.SAME_EYE  # and the threshold lies in a wide gap
    assert found.scores[same].min() > 0.55 and found.scores[~same].max() < 0.38
    joined, conflicts, _ = leaks.find_eyes(records, 256)
    assert len(joined) == 467 - 42 - 5 and len({r.eye for r in joined}) == 409
    assert [(c.label, *(n[-3:] for n in c.names), *c.values) for c in conflicts] == [
        ("grade", "021", "391", 1, 2), ("grade", "028", "327", 4, 3), ("edema_risk", "045", "333", 0, 1)]
    by_name = {r.name: r for r in joined}
    assert by_name["segmentation/IDRiD_01"].grade == records[number["102"]].grade
    assert by_name["segmentation/IDRiD_01"].landmarks == records[number["102"]].landmarks
    assert sum(r.masks is not None and r.landmarks is not None for r in joined) == 42
