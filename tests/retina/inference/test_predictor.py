"""Answers in the pixels of the file: geometry, tiles, what is refused, what is written, and faults."""

import csv
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import data
import evaluate
import model
import train
from conftest import NARROW, SHALLOW, TINY, drawn, official_tree, real_idrid, widen
from retina import drawing, files
from retina.datasets import cache, preprocess, readers, records
from retina.datasets.masks import MaskFile, read_mask
from retina.datasets.quality import lowest_seen
from retina.datasets.report import EXAMINED_SIZE
from retina.evaluation import metrics, scoring, task_metrics
from retina.files import InputError
from retina.inference import full_size, predictor, quality
from retina.inference.predictor import NOTE, Predictor, predict_all, write_rows
from tasks import TASKS


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")

CPU = torch.device("cpu")


def picture(index: int, side: int = 300) -> Image.Image:
    """A drawn photograph with black borders left and right."""
    return widen(np.asarray(drawn(5, index, side)))


class Fake(torch.nn.Module):
    """A network whose masks are a function of each pixel alone, and which has a head for all tasks."""
    heads = dict.fromkeys(("seg",))

    def forward(self, images, indices):
        pixels = images[indices["seg"]].float() / 255
        return {"seg": torch.logit(pixels.mean(1, keepdim=True).expand(-1, 5, -1, -1), 1e-4)}, {}


# ---- where a map lies in its file ----

def test_to_file_pixels_equals_interpolation_by_hand():
    """A sample of a crop, scaled unlike in x and y: every pixel of the file by bilinear interpolation, 0 outside."""
    g, rng = preprocess.Geometry(23, 17, 0.5, 0.8, -1.5, 2.0), np.random.default_rng(0)
    map_ = rng.random((16, 16)).astype(np.float32)
    expected = np.zeros((17, 23))
    for y in range(17):
        for x in range(23):
            u, v = (x + 0.5) * 0.5 - 1.5, (y + 0.5) * 0.8 + 2.0  # in the sample
            if 0 <= u < 16 and 0 <= v < 16:
                corners = [(math.floor(v - 0.5) + i, math.floor(u - 0.5) + j) for i in (0, 1) for j in (0, 1)]
                expected[y, x] = sum(map_[min(max(a, 0), 15), min(max(b, 0), 15)] * (1 - abs(v - 0.5 - a)) *
                                     (1 - abs(u - 0.5 - b)) for a, b in corners)
    found = full_size.to_file_pixels(map_, g)
    assert found.shape == (17, 23) and np.abs(found - expected).max() < 1e-5


GEOMETRIES = [
    preprocess.Geometry(301, 203, 0.2, 0.31, -3.7, 1.2), preprocess.Geometry(23, 17, 2.5, 3.1, 0.0, -4.0),
    preprocess.Geometry(40, 64, 1.0, 1.0, 12.0, 0.0), preprocess.Geometry(30, 30, 0.1, 0.1, 60.9, 70.0)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_to_file_pixels_equals_pillow(geometry):
    """Enlarged, reduced, shifted by whole pixels, and all but outside; one bit for processors that fuse + and *."""
    g, map_ = geometry, np.random.default_rng(0).random((64, 64)).astype(np.float32)
    affine = (g.scale_x, 0, g.shift_x, 0, g.scale_y, g.shift_y)
    expected = np.asarray(Image.fromarray(map_).transform((g.width, g.height), Image.AFFINE, affine, Image.BILINEAR))
    found = full_size.to_file_pixels(map_, g)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_array_max_ulp(found, expected, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7, 0.97, 1.0])
def test_a_mask_of_the_file_is_its_map_at_a_threshold(geometry, threshold):
    """Spots and noise; a threshold of 0 is reached outside of the sample, too."""
    rng = np.random.default_rng(0)
    spots = np.kron(rng.random((8, 8)) > 0.8, np.ones((8, 8)))
    for map_ in (rng.random((64, 64)), spots * rng.random((64, 64)) ** 0.1, spots):
        map_ = map_.astype(np.float32)
        found = full_size.to_file_pixels(map_, geometry, threshold)
        assert found.dtype == bool and np.array_equal(found, full_size.to_file_pixels(map_, geometry) >= threshold)


def test_a_mask_that_was_prepared_comes_back_to_its_place(tree):
    """File -> sample -> file: all but the outline."""
    record = next(r for r in readers.read_idrid(tree).records if r.masks)
    sample = preprocess.to_sample(record, preprocess.preprocess(record, 96))
    back = full_size.to_file_pixels(sample.masks[4].float().numpy(), sample.geometry) >= 0.5
    truth = np.asarray(read_mask(record.masks["OD"], back.shape[::-1])[0]) > 0
    assert truth.sum() > 100 and (back != truth).sum() < 0.1 * truth.sum()


# ---- tiles ----

def test_tiles_of_a_local_network_change_nothing():
    """Where an answer depends on its pixel alone, cutting, weighing and blending must give it back."""
    image = torch.randint(256, (3, 150, 150), dtype=torch.uint8)
    whole = (image.float() / 255).mean(0).clamp(1e-4, 1 - 1e-4).expand(5, -1, -1)
    found = full_size.predict_in_tiles(Fake(), TASKS["seg"], image, 64, CPU, batch=3)
    assert found.shape == whole.shape and torch.allclose(found, whole, atol=1e-5)


def test_one_tile_is_the_whole(run):
    loaded = evaluate.load_run(run, CPU)
    loaded.net.eval()
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    tile = full_size.predict_in_tiles(loaded.net, TASKS["seg"], image, 32, CPU)
    assert torch.allclose(tile, full_size.predict_sample(loaded.net, [TASKS["seg"]], image, CPU)["seg"], atol=1e-6)


@pytest.mark.parametrize("size,tile", [(32, 64), (64, 64), (16, 32)])
def test_tiles_of_twice_the_size_overlap_by_half_at_least(size, tile):
    """Of once the size where a photograph is less than twice as large: the network wants multiples of 32."""
    seen, sides = torch.zeros(100, 100), set()

    class Counts(Fake):
        def forward(self, images, indices):
            for x, y in zip(images[:, 0, 0, 0].tolist(), images[:, 1, 0, 0].tolist()):
                seen[y:y + images.shape[2], x:x + images.shape[3]] += 1
                sides.add(images.shape[2])
            return super().forward(images, indices)
    at = torch.arange(100, dtype=torch.uint8)
    image = torch.stack([at.expand(100, 100), at[:, None].expand(100, 100), at.expand(100, 100)])
    full_size.predict_in_tiles(Counts(), TASKS["seg"], image, size, CPU)
    half = tile // 2
    assert sides == {tile} and seen.min() >= 1 and seen[half:-half, half:-half].min() >= 4


def test_maps_of_two_sizes_are_blended_where_they_show_the_same(tree):
    """Each pixel holds its own place in the file, in both maps: then so does the mean, whatever the cropping rounds."""
    record = next(r for r in readers.read_idrid(tree).records if r.masks)
    geometries = [full_size.unlabelled_sample(record, size).geometry for size in (64, 149)]

    def places(geometry, size):  # (2, size, size), x and y in pixels of the file
        at = torch.arange(size) + 0.5
        grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
        return torch.from_numpy(geometry.to_file(grid.numpy())).float().permute(2, 0, 1)

    whole, tiled = places(geometries[0], 64), places(geometries[1], 149)
    found = full_size.blend(whole, tiled, *geometries)
    assert torch.allclose(found[:, 2:-2, 2:-2], tiled[:, 2:-2, 2:-2], atol=0.01)
    assert torch.allclose(full_size.blend(0 * whole, tiled, *geometries), tiled / 2)


# ---- masks at full size ----

def test_full_size_stats_equal_counting_pixels_of_files(tree):
    """Three photographs of 144x96: masks of the files against maps brought to their size, lesion by lesion."""
    masked = [r for r in readers.read_idrid(tree).records if r.masks]
    photographs, task = data.FundusDataset(masked, 64), TASKS["seg"]
    accumulator = task.accumulator()
    names, stats = full_size.mask_stats_at_full_size(Fake(), task, masked, 64, None, CPU, 8, accumulator)
    assert names == [r.name for r in masked]
    found = task.at(stats, [0.3] * 5)
    pixels = {lesion: ([], []) for lesion in task.classes}
    for i, record in enumerate(masked):
        sample = photographs[i]
        for c, lesion in enumerate(task.classes):
            path, size = record.masks[lesion], (sample.geometry.width, sample.geometry.height)
            truth = np.zeros(size[::-1], bool) if path is None else np.asarray(read_mask(path, size)[0]) > 0
            map_ = (sample.image.float() / 255).mean(0).clamp(1e-4, 1 - 1e-4).numpy()
            score = full_size.to_file_pixels(map_, sample.geometry)
            mask = score >= metrics.threshold_at(metrics.level_of(0.3))
            near = 3  # pixels whose score rounds to the other side
            assert found[i, c].tolist() == pytest.approx([(mask & truth).sum(), mask.sum(), truth.sum()], abs=near)
            for pile, x in zip(pixels[lesion], (score, truth)):
                pile.append(x.ravel())
    for c, lesion in enumerate(task.classes):
        score, truth = map(np.concatenate, pixels[lesion])
        if truth.any():
            precision = [truth[score >= s].mean() for s in score[truth]]
            assert accumulator.area(c) == pytest.approx(np.mean(precision), abs=1e-5)


def test_lesions_that_are_not_known_are_not_counted(tree):
    record = next(r for r in readers.read_idrid(tree).records if r.masks)
    record = replace(record, labels={"masks": {"EX": record.masks["EX"]}})
    _, stats = full_size.mask_stats_at_full_size(Fake(), TASKS["seg"], [record], 64, None, CPU, 8,
                                                 TASKS["seg"].accumulator())
    assert stats[0, [0, 1, 3, 4]].isnan().all() and not stats[0, 2, :-1].isnan().any()


# ---- what is refused ----

def test_drawn_photographs_are_not_refused():
    assert [reason for i in range(40) if (reason := quality.refusal(picture(i)))] == []


SPOILED = [("too blurred", lambda p: p.filter(ImageFilter.GaussianBlur(0.03 * p.height))),
           ("too dark", lambda p: ImageEnhance.Brightness(p).enhance(0.13)),
           ("not the colours of a retina", lambda p: p.convert("L")),
           ("no field of view", lambda p: p.crop((p.width // 3, p.height // 3, p.width // 2, p.height // 2))),
           ("no field of view", lambda p: Image.new("RGB", p.size)),
           ("no field of view", lambda p: Image.new("RGB", p.size, (200, 90, 30))),
           ("no field of view", lambda p: Image.effect_noise(p.size, 80)),
           ("too small", lambda p: p.resize((p.width // 6, p.height // 6))),
           ("nothing to be seen", lambda p: Image.composite(Image.new("RGB", p.size, (180, 80, 30)), Image.new(
               "RGB", p.size), p.convert("L").point(lambda v: 255 * (v > 12))))]


@pytest.mark.parametrize("reason,spoil", SPOILED)
def test_what_shows_no_retina_is_refused(reason, spoil):
    for i in range(5):
        assert quality.refusal(spoil(picture(i))).startswith(reason)


def measured(pictures) -> list[np.ndarray]:
    return [preprocess.quality(p, preprocess.field_of_view(p)) for p in pictures]


@pytest.fixture(scope="module")
def ordinary() -> list[np.ndarray]:
    return measured(picture(i) for i in range(39))


def cropped(p: Image.Image, share: float = 0.6) -> Image.Image:
    """The largest square inside the field: no corner is dark."""
    half = share * p.height / 2
    return p.crop((p.width / 2 - half, p.height / 2 - half, p.width / 2 + half, p.height / 2 + half))


ODD = {"grey": lambda p: p.convert("L").convert("RGB"),
       "green alone": lambda p: Image.merge("RGB", [p.getchannel("G") if c == "G" else Image.new("L", p.size)
                                                    for c in "RGB"]),
       "green in all": lambda p: Image.merge("RGB", [p.getchannel("G")] * 3), "equalised": ImageOps.equalize,
       "cropped": lambda p: cropped(p).resize((90, 90)), "cropped and grey": lambda p: cropped(p).convert("L"),
       "white surround": lambda p: Image.composite(p, Image.new("RGB", p.size, "white"), p.convert("L").point(
           lambda v: 255 * (v > 12))),
       "dark": lambda p: ImageEnhance.Brightness(p).enhance(0.13), "tiny": lambda p: p.resize((p.width // 6, 50)),
       "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(0.03 * p.height)),
       "black": lambda p: Image.new("RGB", p.size)}


@pytest.mark.parametrize("kind", ODD)
def test_what_training_saw_is_answered_and_the_rest_refused(kind):
    """Others of the same kind are answered for; what these do not lack is still asked for."""
    make = ODD[kind]
    seen = lowest_seen(measured(make(picture(i)) for i in range(12)))
    new = [make(picture(i)) for i in range(20, 26)]
    assert all(quality.refusal(p) for p in new) and not any(quality.refusal(p, seen) for p in new)
    plain = Image.new("RGB", (300, 300), (150, 80, 40))
    assert (quality.refusal(plain, seen) == "") == (kind == "black")
    if kind in ("grey", "dark", "tiny", "blurred"):
        assert quality.refusal(cropped(picture(30)), seen).startswith("no field of view")


@pytest.mark.parametrize("reason,spoil", SPOILED)
def test_a_run_of_ordinary_photographs_refuses_as_ever(reason, spoil, ordinary):
    """Also where one in forty was spoiled: what is odd in training is not remembered."""
    seen = lowest_seen([*ordinary, *measured([spoil(picture(39))])])
    assert quality.refusal(spoil(picture(3)), seen) == quality.refusal(spoil(picture(3))) != ""
    assert quality.refusal(picture(50), seen) == ""


def test_real_photographs_are_not_refused_unless_spoiled():
    """Every ninth of 467, of each 63rd the same blurred and darkened; what is remembered of every third."""
    everything = readers.read_idrid(real_idrid("idrid")).records
    found = [preprocess.read_image(r.image, 512).image for r in everything[::9]]
    assert len(found) == 52 and [reason for image in found if (reason := quality.refusal(image))] == []
    least = {name: least for name, (least, _) in quality.LEAST.items()}
    stored = data.FundusDataset(everything[::3], EXAMINED_SIZE).quality()
    assert len(everything) == 467 and np.array_equal(stored[::3], measured(found))
    seen = lowest_seen(stored)
    assert seen.pop("field") == 1 and all(quality.MARGIN * value > least[name] for name, value in seen.items())
    for image in found[::7]:
        for _, spoil in SPOILED[:4]:  # a dark photograph made darker may not even show its field
            assert quality.refusal(spoil(image))


# ---- new photographs ----

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all tasks on a small tree."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setattr(records, "HERE", home)
    patch.setattr(cache, "CACHE", home / "cache")
    patch.setattr(model, "STAGES", SHALLOW)
    patch.setattr(model, "WIDTHS", NARROW)
    patch.setattr(task_metrics, "FEWEST_FOR_THRESHOLD", 1)  # so that there are masks
    tree = official_tree(home / "IDRiD", segmentation=6, grading=8, test=False)
    options = replace(TINY, tasks=("cls", "dme", "seg", "loc"), data=str(tree), epochs=1)
    train.fit(options, home / "run", quiet=True)
    patch.undo()
    return home / "run"


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "new"
    folder.mkdir()
    for i in range(2):
        picture(i, 140 + 40 * i).save(folder / f"eye{i}.png")
    return folder


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        evaluate.main()
    except SystemExit as end:
        return end.code
    return 0


def rows_of(out: Path) -> list[dict]:
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_on_drawings_says_what_its_answers_are_worth(run, pictures, tmp_path, monkeypatch, capsys):
    load = evaluate.load_run

    def drawn(*arguments):
        loaded = load(*arguments)
        loaded.options["data"] = None
        return loaded
    monkeypatch.setattr(evaluate, "load_run", drawn)
    assert call(monkeypatch, run, "--images", pictures, "--out", tmp_path / "out") == 0
    warning = "warning: this run learned from drawn photographs alone; of real ones its answers mean nothing"
    assert warning in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "load_run", load)
    assert call(monkeypatch, run, "--images", pictures, "--out", tmp_path / "again") == 0
    assert warning not in capsys.readouterr().out


@pytest.mark.parametrize("task", ["cls", "seg", "loc"])
def test_nothing_is_answered_where_an_output_is_not_finite(run, pictures, tmp_path, monkeypatch, capsys, task):
    load = evaluate.load_run

    def broken(*arguments):
        loaded = load(*arguments)
        with torch.no_grad():
            list(loaded.net.heads[task].parameters())[-1][0] = math.nan
        return loaded
    monkeypatch.setattr(evaluate, "load_run", broken)
    assert call(monkeypatch, run, "--images", pictures, "--out", tmp_path / "out") == 1
    rows = rows_of(tmp_path / "out")
    assert [r["status"] for r in rows] == ["failed", "failed"] and "grade" not in rows[0]
    assert all(r["reason"].startswith(f"the network's output for {task} is not finite") for r in rows)
    assert "0 of 2 photographs answered for, 0 refused, 0 unreadable, 2 failed" in capsys.readouterr().out
    assert not list((tmp_path / "out" / "masks").iterdir())


def test_new_photographs_get_rows_overlays_and_masks(run, pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, run, "--images", pictures, "--out", out) == 0
    rows = rows_of(out)
    assert [r["name"] for r in rows] == ["eye0", "eye1"] and {r["status"] for r in rows} == {"answered"}
    for row, side in zip(rows, (140, 180)):
        size = (side + 48, side)
        assert (int(row["width"]), int(row["height"])) == size
        assert sum(float(row[f"grade_p{g}"]) for g in range(5)) == pytest.approx(1, abs=1e-3)
        assert float(row["referable_p"]) == pytest.approx(sum(float(row[f"grade_p{g}"]) for g in (2, 3, 4)), abs=1e-3)
        calibration = evaluate.load_run(run, CPU).calibration
        assert (row["referable"] == "yes") == (float(row["referable_p"]) >= calibration["cls"]["referable"])
        assert row["edema_risk"] in ("0", "1", "2") and row["grade"] in ("0", "1", "2", "3", "4")
        assert 0 <= float(row["disc_x"]) <= size[0] and 0 <= float(row["fovea_y"]) <= size[1]
        assert "no medical device" in row["note"]
        wide, high = Image.open(out / "overlays" / f"{row['name']}.jpg").size
        assert wide == size[0] and high > size[1]  # words lie below
        foreground = float(preprocess.foreground_mask(Image.open(pictures / f"{row['name']}.png")).mean())
        for lesion in TASKS["seg"].classes:
            mask = np.asarray(Image.open(out / "masks" / f"{row['name']}_{lesion}.png").convert("L"))
            assert mask.shape == size[::-1] and set(np.unique(mask)) <= {0, 255}
            assert float(row[f"area_{lesion}"]) == pytest.approx((mask > 0).mean() / foreground, abs=1e-6)
    text = capsys.readouterr().out
    assert "2 of 2 photographs answered for" in text and "left out" not in text
    assert "calibrated on validation: cls" in text


def test_what_is_left_out_of_a_folder_is_said(run, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "notes.txt").write_text("x")
    (pictures / "more").mkdir()
    assert call(monkeypatch, run, "--images", pictures, "--out", tmp_path / "out") == 0
    assert f"left out, as no photographs or as folders: 2 in {pictures} (more, notes.txt)" in capsys.readouterr().out


def test_answers_are_those_of_the_evaluation(run, tmp_path, monkeypatch):
    """The same file, once as a photograph of the validation split, once as a new one."""
    loaded = evaluate.load_run(run, CPU)
    split = evaluate.split_records(loaded, Path(loaded.options["data"]), "val")
    photographs = data.FundusDataset(split, 32)
    found = scoring.evaluate_split(loaded.net, data.eval_loader(photographs, loaded.tasks, 16), loaded.tasks)
    assert call(monkeypatch, run, "--images", *[r.image for r in split], "--out", tmp_path / "out") == 0
    temperature = loaded.calibration["cls"]["temperature"]
    rows = {r["photograph"]: r for r in rows_of(tmp_path / "out")}
    by_name = {r.name: rows[str(r.image)] for r in split}
    for name, stats in zip(found.names["cls"], found.stats["cls"]):
        p = metrics.at_temperature(stats[None, :5], temperature)[0]
        assert [float(by_name[name][f"grade_p{g}"]) for g in range(5)] == pytest.approx(p.tolist(), abs=1e-3)
    for name, stats in zip(found.names["loc"], found.stats["loc"]):
        assert [float(by_name[name][f"disc_{axis}"]) for axis in "xy"] == pytest.approx(stats[0, 2:4].tolist(), abs=0.1)


def test_a_broken_file_does_not_stop_the_rest(run, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "a_broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (90, 60)).save(pictures / "b_black.png")
    Image.new("I", (90, 60)).save(pictures / "c_deep.tif")
    out = tmp_path / "out"
    assert call(monkeypatch, run, "--images", pictures, "--out", out) == 1
    rows = {r["name"]: r for r in rows_of(out)}
    assert [r["status"] for r in rows.values()] == ["unreadable", "refused", "unreadable", "answered", "answered"]
    assert rows["a_broken"]["reason"].startswith("not a readable image") and rows["a_broken"]["grade"] == ""
    assert rows["b_black"]["reason"].startswith("no field of view") and rows["b_black"]["width"] == "90"
    assert rows["c_deep"]["reason"].startswith("32 bits a channel; expected 8")
    printed = capsys.readouterr()
    assert "a_broken.jpg" in printed.err and "2 of 5 photographs answered for, 1 refused, 2 unreadable" in printed.out
    assert not list((out / "overlays").glob("[abc]_*"))


def test_only_refused_ones_still_leave_a_table_and_are_a_failure(run, tmp_path, monkeypatch):
    Image.new("RGB", (90, 60)).save(tmp_path / "black.png")
    assert call(monkeypatch, run, "--images", tmp_path / "black.png", "--out", tmp_path / "out") == 1
    assert [r["status"] for r in rows_of(tmp_path / "out")] == ["refused"]


def test_without_the_check_all_are_answered_and_the_reason_is_kept(run, pictures, tmp_path, monkeypatch, capsys):
    """Also for a picture in which nothing is lit, of which an area would be a share of nothing."""
    Image.new("RGB", (90, 60)).save(pictures / "black.png")
    assert call(monkeypatch, run, "--images", pictures, "--out", tmp_path / "out", "--no-quality-check") == 0
    black, *rest = rows_of(tmp_path / "out")
    assert black["status"] == "answered" and black["reason"].startswith("would be refused: no field of view found")
    assert black["grade"] in "01234" and 0 <= float(black["area_OD"]) <= 1
    assert [(r["status"], r["reason"]) for r in rest] == [("answered", "")] * 2
    printed = capsys.readouterr()
    assert "3 of 3 photographs answered for, 0 refused" in printed.out and "black.png: would be refused" in printed.err
    with pytest.raises(InputError, match="--no-quality-check: only new photographs are checked"):
        call(monkeypatch, run, "--no-quality-check")


def test_a_run_answers_for_what_it_was_trained_on(tmp_path, monkeypatch, capsys):
    """Grey crops without a dark corner: said in training, stored as numbers, and no reason to refuse afterwards."""
    rows = ["image,grade"]
    for i in range(14):
        cropped(picture(i)).convert("L").save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i % 5}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    train.fit(replace(TINY, tasks=("cls",), data=str(tmp_path / "labels.csv"), epochs=1, num_experts=0, fold="1/2"),
              tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert f"{stored['without_field_of_view']} training photographs have no field of view" in capsys.readouterr().out
    assert 5 <= stored["without_field_of_view"] <= 9 and stored["seen"]["redness"] == pytest.approx(1)
    assert evaluate.load_run(tmp_path / "run", CPU).seen == stored["seen"]
    for i in range(20, 22):
        cropped(picture(i)).convert("L").save(tmp_path / f"new{i}.png")
    picture(22).save(tmp_path / "new22.png")  # and for ordinary photographs
    Image.new("RGB", (90, 90), (60, 60, 60)).save(tmp_path / "new23.png")
    new = sorted(tmp_path.glob("new*"))
    assert call(monkeypatch, tmp_path / "run", "--images", *new, "--out", tmp_path / "out") == 0
    assert [r["status"] for r in rows_of(tmp_path / "out")] == ["answered"] * 3 + ["refused"]
    assert rows_of(tmp_path / "out")[3]["reason"].startswith("nothing to be seen")


def test_rows_are_on_disk_before_the_end(tmp_path):
    def rows():
        yield {"status": "refused", "a": 1}
        yield {"status": "answered", "a": 2, "b": 3}
        assert (tmp_path / "t.csv").read_text().splitlines() == ["status,a,b", "refused,1,", "answered,2,3"]
        yield {"status": "refused", "a": 4}
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        predictor.write_rows(tmp_path / "t.csv", rows())
    assert (tmp_path / "t.csv").read_text().splitlines()[3:] == ["refused,4,"]


# ---- while the network has one photograph, others are read and written ----

def flooded(mask: np.ndarray, y: int, x: int) -> np.ndarray:
    """The pixels that one comes to from a pixel of a mask without leaving it, also over corners."""
    found, left = np.zeros_like(mask), [(y, x)]
    while left:
        y, x = left.pop()
        if 0 <= y < len(mask) and 0 <= x < mask.shape[1] and mask[y, x] and not found[y, x]:
            found[y, x] = True
            left += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return found


def components(mask: np.ndarray) -> list[np.ndarray]:
    parts, left = [], mask.copy()
    while left.any():
        parts.append(flooded(mask, *np.argwhere(left)[0]))
        left &= ~parts[-1]
    return parts


def kept_component(wide: np.ndarray, map_: np.ndarray, centre, geometry, threshold: float) -> np.ndarray:
    """Of a mask in pixels of the file, what the map's component nearest to the centre covers."""
    at = np.argwhere(map_ >= threshold)
    nearest = np.hypot(*(at + 0.5 - centre.numpy()[::-1]).T).argmin()
    kept = flooded(map_ >= threshold, *at[nearest])
    return full_size.to_file_pixels(np.where((map_ >= threshold) & ~kept, 0, map_), geometry) >= threshold


@pytest.mark.parametrize("seed", range(8))
def test_one_disc_is_one_component(seed):
    """Against flooding pixel by pixel, with a centre and without."""
    rng = np.random.default_rng(seed)
    for side in range(1, 12):
        map_, threshold, centre = rng.random((side, side)).astype(np.float32), rng.choice((0.4, 0.7, 0.9)), None
        if seed % 2:
            centre = (side * rng.random(2)).tolist()
        mask, found = map_ >= threshold, predictor.only_disc(map_, threshold, centre)
        kept = found >= threshold
        assert np.array_equal(found, np.where(mask & ~kept, 0, map_))
        if not mask.any():
            continue
        parts = components(mask)
        assert any(np.array_equal(kept, part) for part in parts)
        if centre is None:
            assert map_[kept].sum() == pytest.approx(max(map_[part].sum() for part in parts))
        else:
            def gap(part, centre=centre):
                return np.hypot(*(np.argwhere(part) + 0.5 - centre[::-1]).T).min()
            assert gap(kept) == pytest.approx(gap(mask))


class TwoDiscs(torch.nn.Module):
    """Answers for every photograph with a disc on the left, a larger one on the right, and a centre on the left."""
    heads = dict.fromkeys(("seg", "loc"))

    def forward(self, images, indices):
        y, x = torch.meshgrid(*[torch.arange(64)] * 2, indexing="ij")
        discs = (torch.hypot(x - 20.0, y - 32.0) < 5) | (torch.hypot(x - 44.0, y - 32.0) < 8)
        heat = torch.zeros(1, 2, 8, 8)
        heat[..., 4, 2] = 50  # at (20, 36)
        return {"seg": (20.0 * discs - 10).expand(1, 5, 64, 64), "loc": heat}, {}


@pytest.mark.parametrize("tasks,left", [(("seg", "loc"), True), (("seg",), False)])
def test_a_photograph_has_one_optic_disc(tmp_path, tasks, left):
    """The one at the predicted centre; without one, the larger. Lesions stay in both places."""
    picture(0, 160).save(tmp_path / "eye.png")
    calibration = {"seg": dict.fromkeys(TASKS["seg"].classes, 0.5), "loc": {}}
    asked = Predictor(TwoDiscs(), [TASKS[t] for t in tasks], calibration, 64, None, 8, CPU, tmp_path / "out", {})
    row, = predict_all(asked, [tmp_path / "eye.png"])
    disc, lesion = (np.asarray(Image.open(tmp_path / f"out/masks/eye_{k}.png")) > 0 for k in ("OD", "EX"))
    one, other = sorted(components(lesion), key=lambda part: np.argwhere(part)[:, 1].mean())  # from the left
    assert np.array_equal(disc, one if left else other) and row["area_OD"] < row["area_EX"]


def predict_sequentially(predictor, path: Path, name: str) -> dict:
    """One photograph after the other, each step on its own and from the file."""
    p = predictor
    row = {"photograph": str(path), "name": name, "status": "answered", "reason": "", "note": NOTE}
    try:
        row |= dict(zip(("width", "height"), preprocess.read_image(path, 512).size))
        if reason := quality.refusal(preprocess.read_image(path, 512).image):
            return row | {"status": "refused", "reason": reason}
    except InputError as error:
        return row | {"status": "unreadable", "reason": str(error)[len(f"{path}: "):].split("; replace the file")[0]}
    record = records.Record(name, path)
    sample, masks, lines = full_size.unlabelled_sample(record, p.size), {}, []
    answers = full_size.predict_sample(p.net, p.tasks, sample.image, CPU)
    foreground = preprocess.foreground_mask(preprocess.read_image(path, 512).image)
    for task in p.tasks:
        if task.name == "seg":
            maps, g = full_size.predict_masks(p.net, task, record, p.size, p.tiles, CPU, p.batch)
            for lesion, map_ in zip(task.classes, maps):
                wide = Image.fromarray(map_).transform(
                    (g.width, g.height), Image.AFFINE, (g.scale_x, 0, g.shift_x, 0, g.scale_y, g.shift_y),
                    Image.BILINEAR)
                masks[lesion] = np.asarray(wide) >= p.calibration["seg"][lesion]
                if lesion == "OD":
                    masks[lesion] &= kept_component(masks[lesion], map_, answers["loc"][0] * len(map_), g,
                                                    p.calibration["seg"]["OD"])
                Image.fromarray(masks[lesion]).save(p.out / f"masks/{name}_{lesion}.png")
                row[f"area_{lesion}"] = round(float(masks[lesion].mean()) / float(foreground.mean()), 6)
        else:
            columns = task.predicted_columns(answers[task.name], sample, p.calibration[task.name])
            row, lines = row | columns, lines + task.caption(columns)
    points = [(row["disc_x"], row["disc_y"]), (row["fovea_x"], row["fovea_y"])]
    image = preprocess.read_image(path, 1 << 30).image
    drawing.overlay(image, masks, points, [*lines, NOTE], float(foreground.mean())).save(
        p.out / f"overlays/{name}.jpg", quality=90, subsampling=0)
    return row


@pytest.fixture
def mixed_files(tmp_path) -> Path:
    """Photographs that are reduced as they are decoded and that are not, one held sideways, one refused, one broken."""
    (folder := tmp_path / "kinds").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        picture(i, 240).resize((1440, 1200)).save(folder / f"large{i}.jpg", exif=exif if i else Image.Exif())
    picture(2, 150).save(folder / "small.png")
    Image.new("RGB", (90, 60)).save(folder / "black.png")
    (folder / "broken.jpg").write_bytes((folder / "large0.jpg").read_bytes()[:9000])
    return folder


@pytest.fixture
def three_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tiles", [None, 4.5])
def test_nothing_depends_on_what_is_done_at_once(run, mixed_files, tmp_path, three_cores, tiles):
    """Files are equal, masks in their pixels."""
    loaded, paths = evaluate.load_run(run, CPU), sorted(mixed_files.iterdir())
    record = records.Record("x", paths[-1])
    maps, _ = full_size.predict_masks(loaded.net.eval(), TASKS["seg"], record, 64, tiles, CPU, 8)
    for lesion, map_ in zip(TASKS["seg"].classes, maps):  # of a network that knows nothing: so that there are masks
        loaded.calibration["seg"][lesion] = float(np.quantile(map_, 0.5 if lesion == "OD" else 0.9))
    predictor = Predictor(loaded.net, loaded.tasks, loaded.calibration, 64, tiles, 8, CPU, tmp_path / "out", {})
    found = predict_all(predictor, paths)
    assert Counter(row["status"] for row in found) == {"answered": 3, "refused": 1, "unreadable": 1}
    answered = [row for row in found if row["status"] == "answered"]
    assert all(row[f"area_{lesion}"] > 0 for row in answered for lesion in TASKS["seg"].classes[:-1])
    if not tiles:  # of tiles the one component may be a pixel of the map, between those of the file
        assert any(row["area_OD"] > 0 for row in answered)
    sequential = replace(predictor, out=tmp_path / "sequential")
    torch.set_num_threads(1)  # as each of the three has
    for folder in ("overlays", "masks"):
        (sequential.out / folder).mkdir(parents=True)
    write_rows(sequential.out / "predictions.csv", (predict_sequentially(sequential, p, p.stem) for p in paths))
    files, expected = ({p.relative_to(out): p.read_bytes() if p.suffix != ".png" else np.asarray(Image.open(p)).tolist()
                        for p in out.rglob("*.*")} for out in (predictor.out, sequential.out))
    assert len(expected) == 1 + 3 * 6 and files == expected


@pytest.mark.parametrize("tiles,most", [(None, 2), (4.5, 3)])
def test_a_file_is_decoded_once_at_each_scale(run, mixed_files, tmp_path, monkeypatch, tiles, most):
    """A JPEG for 512 pixels, for tiles and at full size; what cannot be reduced as it is decoded, once."""
    loaded, paths, opened, really = evaluate.load_run(run, CPU), sorted(mixed_files.iterdir()), [], files.open_image

    def counted(path):
        opened.append(path.name)
        return really(path)
    monkeypatch.setattr(preprocess, "open_image", counted)
    predictor.predict_all(predictor.Predictor(loaded.net, loaded.tasks, loaded.calibration, 64, tiles, 8, CPU,
                                              tmp_path / "out", {}), paths)
    assert Counter(opened) == {"large0.jpg": most, "large1.jpg": most, "small.png": 1, "black.png": 1,
                               "broken.jpg": 1}


class FakePredictor:
    """In a Predictor's place: records which step of photographs 0, 1, ... begins, and lets a test wait for it."""

    def __init__(self, **actions):
        self.actions, self.events = actions, {}  # step -> what a test does in it; (step, number) -> event

    def begun(self, *step) -> threading.Event:
        return self.events.setdefault(step, threading.Event())

    def step(self, name, number):
        self.begun(name, number).set()
        self.actions.get(name, lambda number: None)(number)
        return number

    def read(self, number):
        return self.step("read", number)

    def predict(self, number):
        return self.step("predict", number)

    def write(self, number):
        return {"status": "answered", "number": self.step("write", number)}

    def answer(self, number):
        return self.write(self.predict(self.read(number)))

    def begun_numbers(self) -> list[int]:
        return sorted(number for name, number in self.events if name == "read")


def numbers(count: int) -> list[tuple[int]]:
    return [(number,) for number in range(count)]


def test_one_is_read_and_one_is_written_meanwhile():
    """Each step waits for one that a loop over photographs would take only after it."""
    def predict(number):
        assert number == 5 or fake.begun("read", number + 1).wait(60)

    def write(number):
        assert number == 5 or fake.begun("predict", number + 1).wait(60)
    fake = FakePredictor(predict=predict, write=write)
    assert [row["number"] for row in predictor.in_threads(fake, numbers(6), 2)] == [*range(6)]


def test_rows_come_in_order_though_a_later_photograph_is_written_first():
    """Of two threads one is busy with photograph 0 until the other is through with 1 and at 2."""
    fake = FakePredictor(write=lambda number: number != 0 or fake.begun("write", 2).wait(60))
    assert [row["number"] for row in predictor.in_threads(fake, numbers(4), 2)] == [*range(4)]


def test_few_photographs_are_held_at_once():
    """Of 30, however slow whoever takes the rows: those that are begun and not yet written, or not yet handed on."""
    begun, written, held, untaken, taken = [], [], [], [], 0

    def write(number):
        time.sleep(0.002)
        held.append(len(begun) - len(written))
        written.append(number)
    fake = FakePredictor(read=begun.append, write=write)
    for row in predictor.in_threads(fake, numbers(30), 3):
        time.sleep(0.002)  # time to begin more than is allowed
        untaken.append(len(begun) - taken)
        taken += 1
    assert taken == 30 and max(held) <= 3 and max(untaken) <= 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_was_begun_has_its_row_when_the_network_is_stopped(error):
    """At photograph 3, while 2 is being written."""
    stopped = threading.Event()

    def predict(number):
        if number == 3:
            assert fake.begun("write", 2).wait(60)
            stopped.set()
            raise error
    fake, taken = FakePredictor(predict=predict, write=lambda number: number != 2 or stopped.wait(60)), []
    with pytest.raises(error):
        for row in predictor.in_threads(fake, numbers(30), 2):
            taken.append(row["number"])
    assert taken == [number for number in fake.begun_numbers() if number != 3] and {0, 1, 2} <= {*taken}
    assert max(fake.begun_numbers()) <= 3 + 2 * 2  # and little else is begun


def test_ctrl_c_while_waiting_for_a_photograph(tmp_path, monkeypatch):
    """Interrupted while 0 and 1 are being written."""
    interrupted, really = threading.Event(), Future.result

    def result(future):
        if not interrupted.is_set():
            assert fake.begun("write", 0).wait(60) and fake.begun("write", 1).wait(60)
            interrupted.set()
            raise KeyboardInterrupt
        return really(future)
    monkeypatch.setattr(Future, "result", result)
    fake = FakePredictor(write=lambda number: interrupted.wait(60))
    with pytest.raises(KeyboardInterrupt):
        predictor.write_rows(tmp_path / "t.csv", predictor.in_threads(fake, numbers(9), 2))
    assert (tmp_path / "t.csv").read_text().split() == ["status,number", *(
        f"answered,{number}" for number in fake.begun_numbers())]
    assert {0, 1} <= {*fake.begun_numbers()} and max(fake.begun_numbers()) < 4


def test_an_error_of_writing_is_raised_and_what_else_was_begun_has_its_row(tmp_path):
    """A file that cannot be written, of photograph 1, while 0 is being written."""
    def write(number):
        if number == 1:
            assert fake.begun("write", 0).wait(60)
            raise OSError(28, "No space left on device", "1.png")
        assert fake.begun("write", 1).wait(60)
    fake = FakePredictor(write=write)
    with pytest.raises(OSError, match="No space left on device: '1.png'"):
        predictor.write_rows(tmp_path / "t.csv", predictor.in_threads(fake, numbers(30), 2))
    assert (tmp_path / "t.csv").read_text().split() == ["status,number", *(
        f"answered,{number}" for number in fake.begun_numbers() if number != 1)]
    assert max(fake.begun_numbers()) <= 1 + 2 * 2


@pytest.mark.parametrize("number,threads", [(1, 3), (2, 1), (5, 1)])
def test_the_cores_are_shared(run, tmp_path, monkeypatch, three_cores, number, threads):
    """Among as many photographs as there are; each in the precision that was asked for, in whatever thread."""
    for i in range(number):
        picture(i, 150).save(tmp_path / f"{i}.png")
    found, loaded, really = [], evaluate.load_run(run, CPU), predictor.predict_sample

    def predict_sample(*arguments):
        found.append((torch.get_num_threads(), torch.is_autocast_enabled("cpu")))
        return really(*arguments)
    monkeypatch.setattr(predictor, "predict_sample", predict_sample)
    for precision in ("fp32", "bf16"):
        asked = Predictor(loaded.net, loaded.tasks, loaded.calibration, 64, None, 8, CPU, tmp_path / precision, {},
                          precision)
        predict_all(asked, sorted(tmp_path.glob("*.png")))
    assert found == number * [(threads, False)] + number * [(threads, True)] and torch.get_num_threads() == 3


def test_masks_can_be_read_as_labels(tmp_path):
    """All sizes of the last byte of a row; empty and full ones."""
    rng = np.random.default_rng(0)
    for width in (1, 7, 8, 9, 30):
        for share in (0, 0.5, 1):
            mask = rng.random((5, width)) < share
            Image.fromarray(mask).save(tmp_path / "mask.png", compress_level=1)  # as Predictor.write does
            with Image.open(tmp_path / "mask.png") as file:
                assert file.mode == "1" and np.array_equal(file, mask)
            if 0 < mask.mean() < 1:
                found, _ = read_mask(MaskFile(tmp_path / "mask.png"), (width, 5))
                assert np.array_equal(np.asarray(found) > 0, mask)


def test_two_files_of_one_name_do_not_overwrite_each_other(run, pictures, tmp_path, monkeypatch):
    other = shutil.copytree(pictures, tmp_path / "other")
    picture(3, 150).convert("RGB").save(pictures / "EYE0.jpg")
    assert call(monkeypatch, run, "--images", pictures, other / "eye0.png", "--out", tmp_path / "out") == 0
    names = [r["name"] for r in rows_of(tmp_path / "out")]
    assert len(names) == 4 == len({n.lower() for n in names}) == len(list((tmp_path / "out" / "overlays").iterdir()))


def test_tiles_change_masks_alone(run, pictures, tmp_path, monkeypatch):
    for name, flags in (("whole", []), ("tiles", ["--tiles", "2"])):
        assert call(monkeypatch, run, "--images", pictures, "--out", tmp_path / name, *flags) == 0
    whole, tiles = (rows_of(tmp_path / name)[0] for name in ("whole", "tiles"))
    assert [k for k in whole if whole[k] != tiles[k] and not k.startswith("area_")] == []
    assert any(whole[f"area_{k}"] != tiles[f"area_{k}"] for k in TASKS["seg"].classes)


@pytest.mark.parametrize("suffix", ["tif", "webp"])
@pytest.mark.parametrize("held,turn", [(6, Image.ROTATE_90), (8, Image.ROTATE_270), (3, Image.ROTATE_180)])
def test_a_photograph_is_answered_for_as_a_viewer_shows_it(run, tmp_path, monkeypatch, held, turn, suffix):
    """A camera held sideways: the same answers as for the same picture stored upright."""
    exif, upright = Image.Exif(), picture(0, 150)
    exif[0x0112] = held
    (tmp_path / "new").mkdir()
    upright.save(tmp_path / "new" / "upright.png")
    lossless = {"lossless": True} if suffix == "webp" else {}
    upright.transpose(turn).save(tmp_path / "new" / f"held.{suffix}", exif=exif, **lossless)
    assert call(monkeypatch, run, "--images", tmp_path / "new", "--out", tmp_path / "out") == 0
    one, other = rows_of(tmp_path / "out")
    assert {k for k in one if one[k] != other[k]} == {"photograph", "name"}
    for lesion in TASKS["seg"].classes:
        one, other = (np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}_{lesion}.png"))
                      for name in ("held", "upright"))
        assert np.array_equal(one, other) and one.shape == (150, 198)


def test_overlays_show_the_masks():
    """Colours inside, on and outside the outline of a mask, also where it touches the border of the picture."""
    image = Image.new("RGB", (400, 300), (100, 50, 20))
    masks = {lesion: np.zeros((300, 400), bool) for lesion in records.LESION_NAMES}
    masks["EX"][100:140, 360:400] = True
    masks["OD"][200:240, 200:240] = True
    drawn = np.asarray(drawing.overlay(image, masks, None, ["grade 2"], 0.5))
    assert drawn.shape[0] > 300 and (drawn[300:] == 255).all(2).mean() > 0.5  # words lie in a white strip below
    tint = (0.7 * np.array((100, 50, 20)) + 0.3 * np.array(records.LESION_COLOURS["EX"])).astype(int)
    assert tuple(drawn[120, 380]) == tuple(tint) and tuple(drawn[100, 380]) == records.LESION_COLOURS["EX"]
    assert tuple(drawn[120, 399]) == records.LESION_COLOURS["EX"] and tuple(drawn[98, 380]) == (100, 50, 20)
    assert tuple(drawn[220, 220]) == (100, 50, 20) and tuple(drawn[200, 220]) == records.LESION_COLOURS["OD"]
    marked = np.asarray(drawing.overlay(image, {}, [(300, 50), (50, 250)], [], 0.5))
    assert tuple(marked[50, 300]) == (255, 255, 255) == tuple(marked[250, 50])


@pytest.mark.parametrize("side", [(37, 23), (1100, 1060)])
def test_tints_and_outlines_are_those_of_the_whole_picture(side):
    """Masks of blots, some all over the picture, against shifting them by the width of an outline in all directions."""
    rng, (width, height), s = np.random.default_rng(0), side, max(1, round(min(side) / 700))
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for share in (0, 0.3, 0.7, 1):
        masks = {lesion: np.asarray(Image.fromarray(rng.random((9, 7)) < share).resize(side))
                 for lesion in records.LESION_NAMES}
        expected = pixels.astype(float)
        for lesion, mask in masks.items():
            wide, colour = np.pad(mask, s), np.array(records.LESION_COLOURS[lesion])
            inner = np.all([wide[s + y:s + y + height, s + x:s + x + width]
                            for y, x in ((0, 0), (-s, 0), (s, 0), (0, -s), (0, s))], 0)
            expected[mask & ~inner] = colour
            if lesion != "OD":
                expected[inner] = 0.7 * expected[inner] + 0.3 * colour
        found = np.asarray(drawing.tinted(Image.fromarray(pixels), masks))
        assert np.abs(found - expected).max() < 2.5


@pytest.mark.skipif(sys.platform == "win32", reason="file names are text there")
def test_a_name_that_is_no_text_and_one_that_is_too_long(run, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    folder.mkdir()
    picture(0, 150).save(folder / "a.png")
    shutil.copy(folder / "a.png", bytes(folder) + b"/caf\xe9.png")
    shutil.copy(folder / "a.png", folder / ("z" * 240 + ".png"))
    assert call(monkeypatch, run, "--images", folder, "--out", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 3 and "caf\\udce9.png" in rows[1]["photograph"] and rows[2]["name"] == "z" * 60


def test_folders_of_classes_may_show_anything(tmp_path, monkeypatch):
    """What training has seen is enough; what is darker than all of it is refused."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{split}{name}{i}.png")
    options = replace(TINY, tasks=("cls",), data=str(tmp_path / "set"), names={"category": ["cat", "dog"]}, epochs=1,
                      num_experts=0)
    train.fit(options, tmp_path / "run", quiet=True)
    images = tmp_path / "set" / "val" / "cat"
    Image.fromarray(np.uint8(pixels / 9)).save(images / "dark.png")
    assert call(monkeypatch, tmp_path / "run", "--images", images, "--out", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 5 and {r["category"] for r in rows[1:]} <= {"cat", "dog"} and "category_p_dog" in rows[1]
    assert "too dark" in rows[0]["reason"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.csv"]


@pytest.mark.parametrize("flags,message", [
    (["--images", "{new}"], "--images and --out go together"),
    (["--out", "{new}"], "--images and --out go together"),
    (["--images", "{new}/nothing", "--out", "{new}/out"], "nothing: no such file or folder; expected photographs"),
    (["--images", "{new}/empty", "--out", "{new}/out"], "empty: holds no photograph; expected files that end in"),
    (["--images", "{new}", "--out", "{new}/eye0.png"], "eye0.png: a file; expected a folder, new or empty"),
    (["--images", "{new}", "--out", "{new}/done"], "done: holds predictions.csv and perhaps more; expected"),
    (["--images", "{new}", "--out", "{new}"], "new: holds .* and perhaps more; expected a folder, new or empty"),
    (["--images", "{new}", "--out", "{new}/out", "--split", "test"], "belong to no split and no data set"),
    (["--images", "{new}", "--out", "{new}/out", "--tiles", "0.5"], "--tiles 0.5: expected 1 to 16"),
    (["--images", "{new}", "--out", "{new}/out", "--tiles", "nan"], "--tiles nan: expected 1 to 16"),
    (["--images", "{new}", "--out", "{new}/out", "--routing", "--batch-size", "0"],
     "--batch-size 0: expected at least 1"),
])
def test_mistakes_are_one_line(run, pictures, monkeypatch, flags, message):
    (pictures / "empty").mkdir()
    (pictures / "done").mkdir()
    (pictures / "done" / "predictions.csv").write_text("")
    with pytest.raises(InputError, match=message) as caught:
        call(monkeypatch, run, *[f.format(new=pictures) for f in flags])
    assert "\n" not in str(caught.value)


def test_real_originals_at_full_size_within_two_gib(tmp_path):
    """Ten photographs of 4288x2848 with their masks in a process of its own.

    What grew by 32 MB a photograph would take 27 beyond two GiB, and takes ten beyond one and a half; pixels that were
    kept as floats would be 244 MB. The peak is read from /proc: getrusage's is handed on by the process that started
    it, here all of pytest.
    """
    root = real_idrid("idrid-original")
    program = f"""
import re, sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
from pathlib import Path
import torch
from retina.datasets import cache, readers
from retina.inference import full_size
from tasks import TASKS
cache.CACHE = Path({str(tmp_path)!r})
torch.set_num_threads(2)
class Fake(torch.nn.Module):
    heads = dict.fromkeys(("seg",))
    def forward(self, images, indices):
        return {{"seg": (images[:, :1].float() / 16 - 12).expand(-1, 5, -1, -1)}}, {{}}
found = [r for r in readers.read_idrid(Path({str(root)!r})).records if r.masks] * 2
accumulator = TASKS["seg"].accumulator()
names, stats = full_size.mask_stats_at_full_size(Fake(), TASKS["seg"], found, 256, None, torch.device("cpu"), 8,
                                                 accumulator)
assert len(names) == 10 and float(stats[..., :-1].sum()) == 10 * 5 * 4288 * 2848
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 3 << 19  # KiB
