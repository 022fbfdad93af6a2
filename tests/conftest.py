"""A small IDRiD in the official layout, with the quirks of the real one, made of drawn photographs."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import train  # noqa: E402
from retina.datasets import cache, readers, records, synthetic  # noqa: E402

IDRID = [Path(p) for p in os.environ.get("IDRID", "").split(os.pathsep) if p]
torch.set_num_threads(min(2, torch.get_num_threads()))


STAGES = model.STAGES


@pytest.fixture
def shallow(monkeypatch):
    """One block in each stage of the encoder, for tests that do not depend on how deep it is."""
    monkeypatch.setattr(model, "STAGES", [(*stage[:-1], 1) for stage in STAGES])


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take long")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long; pytest --slow runs it"))


def save_palette_mask(path: Path, mask: np.ndarray) -> None:
    """As IDRiD stores them: palette TIFF, values 0 and 1, and 1 is a red that converts to grey 76."""
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    image.save(path)


def official_tree(root: Path, segmentation: int = 6, grading: int = 15, test: bool = True) -> Path:
    """Write photographs 144x96 and labels below `root`; the numbers are those of the training part."""
    series = 7
    for part, (folder, word) in readers.PARTS.items():
        if part == "test" and not test:
            continue
        a, b, c = (root / subset for subset in readers.SUBSETS)
        images = a / "1. Original Images" / folder
        images.mkdir(parents=True)
        masks = a / "2. All Segmentation Groundtruths" / folder
        for kind in readers.MASK_FOLDERS.values():
            (masks / kind).mkdir(parents=True)
        for i in range(segmentation):
            name = f"IDRiD_{i + 1 + (54 if part == 'test' else 0):02d}"
            eye = ill_eye(series, 100 * i + (10000 if part == "test" else 0))
            picture, truth = synthetic.draw(eye, 96)
            widen(picture).save(images / f"{name}.jpg", quality=92)
            for kind, mask in zip(synthetic.LESIONS, truth):
                if mask.any():
                    file = masks / readers.MASK_FOLDERS[kind] / f"{name}_{kind}.tif"
                    save_palette_mask(file, np.asarray(widen(mask)))
        images = b / "1. Original Images" / folder
        images.mkdir(parents=True)
        rows = ["Image name,Retinopathy grade,Risk of macular edema ,,,"]
        points = {kind: ["Image No,X- Coordinate,Y - Coordinate,,,"] for kind in records.POINTS}
        for i in range(grading):
            name = f"IDRiD_{i + 1:03d}"  # the same names in both parts
            eye = synthetic.plan(series + 1, i + (1000 if part == "test" else 0))
            widen(synthetic.draw(eye, 96)[0]).save(images / f"{name}.jpg", quality=92)
            rows.append(f"{name},{eye.grade},{eye.edema},,,")
            for kind, (x, y) in zip(records.POINTS, (eye.disc, eye.fovea)):
                points[kind].append(f"{name},{24 + 96 * x:.2f},{96 * y:.2f},,,")
        letter, tables = folder[0], c / "2. Groundtruths"
        for path, lines in (
                (b / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{word} Labels.csv", rows),
                (tables / "1. Optic Disc Center Location" / f"{letter}. IDRiD_OD_Center_{word} Set_Markups.csv",
                 points["disc"]),
                (tables / "2. Fovea Center Location" / f"IDRiD_Fovea_Center_{word} Set_Markups.csv", points["fovea"])):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\r\n".join([*lines, ",,,,,", ",,,,,"]) + "\r\n")
    return root


def ill_eye(series: int, start: int) -> synthetic.Eye:
    """The next drawn eye with haemorrhages and hard exudates."""
    while True:
        eye = synthetic.plan(series, start)
        if {"HE", "EX"} <= {lesion.kind for lesion in eye.lesions}:
            return eye
        start += 1


def widen(pixels: np.ndarray) -> Image.Image:
    """Black borders left and right: 96x96 -> 144x96, like the fundus camera's."""
    border = ((0, 0), (24, 24)) + ((0, 0),) * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, border))


@pytest.fixture(scope="session")
def shared_tree(tmp_path_factory) -> Path:
    """A tree for tests that only read it."""
    return official_tree(tmp_path_factory.mktemp("shared") / "IDRiD")


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory) -> Path:
    return official_tree(tmp_path_factory.mktemp("small") / "IDRiD", segmentation=3, grading=5, test=False)


@pytest.fixture
def tree(tmp_path, small_tree) -> Path:
    """A tree of one's own to damage."""
    return shutil.copytree(small_tree, tmp_path / "IDRiD")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing has stopped, made once in a file of tests for each kind of options."""
    made = {}

    def run(options):
        if options not in made:
            made[options] = tmp_path_factory.mktemp("whole") / "run"
            train.fit(options, made[options], quiet=True)
        return made[options]
    return run


@pytest.fixture(autouse=True)
def own_cache_and_runs(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, runs, or data/IDRiD."""
    home = tmp_path_factory.getbasetemp() / "home"
    monkeypatch.setattr(records, "HERE", home)
    monkeypatch.setattr(cache, "CACHE", home / "cache")


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    """Checkpoints need not have reached the disk when a test goes on: half of the time of a small run."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


def real_idrid(name: str) -> Path:
    """A real IDRiD folder from the environment variable IDRID (paths joined by ':'); skips where it is not set."""
    if not IDRID:
        pytest.skip(f"set the environment variable IDRID to a path that ends in {name} to run this test")
    for path in IDRID:
        if path.name == name and path.is_dir():
            return path
    pytest.fail(f"IDRID={os.environ['IDRID']}: no folder named {name} there")
