"""What tests begin with: a small IDRiD with the quirks of the real one, small runs, one step, a busy network."""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from retina.datasets import cache, preprocess, readers, records, synthetic  # noqa: E402
from retina.datasets.records import Record  # noqa: E402
from retina.datasets.vessels import VESSEL_SIDE  # noqa: E402
from retina.evaluation import compare, routing, statistics  # noqa: E402
from retina.figures import tsne  # noqa: E402
from tasks import build_net  # noqa: E402
from train import Config  # noqa: E402


IDRID = [Path(p) for p in os.environ.get("IDRID", "").split(os.pathsep) if p]
torch.set_num_threads(min(2, torch.get_num_threads()))

STAGES = model.STAGES
SHALLOW = [(*stage[:3], channels, 1) for stage, channels in zip(STAGES, (8, 8, 16, 16, 24, 24, 32))]
NARROW = (16, 8, 8, 8)  # of the decoder
SMALL_NET = f"model.STAGES, model.WIDTHS = {SHALLOW}, {NARROW}"  # in a program
TINY = Config(image_size=32, epochs=2, batch_size=6, num_experts=4, lr=1.5e-3, stochastic_depth=0.1, device="cpu")

# train.py as a process of its own, with few drawings, a small network and another home:
# python -c PROGRAM ROOT HOME FLAGS
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import data, model, train
from retina import files
from retina.datasets import cache, readers, records
from retina.training import checkpoint
SMALL_NET
records.HERE = Path(sys.argv[2]); cache.CACHE = records.HERE.parent / "home" / "cache"  # of all tests
readers.DRAWN = {"train": (0, 30), "test": (1, 5)}
files.run_cli(lambda: train.main(sys.argv[3:]))
""".replace("SMALL_NET", SMALL_NET)


def start(program: str, *words, output: Path, errors: Path | None = None, cwd: Path = ROOT):
    """As python -c PROGRAM WORDS, with one thread, in a session of its own; -> multiprocessing's Process, started.

    It is forked from a process that has imported torch, for which each would take three seconds.
    """
    whole = f"""
import os, sys, torch
os.setsid()
for stream, path in ((1, {str(output)!r}), (2, {str(errors or output)!r})):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
os.chdir({str(cwd)!r})
sys.argv, sys.path = ["-c", *{[str(word) for word in words]!r}], ["", *sys.path]
torch.set_num_threads(1)
status = 0
try:
    exec({program!r}, {{"__name__": "__main__"}})
except SystemExit as ended:
    status = ended.code
sys.exit(status)  # when what the program held, such as a loader with its processes, is gone
"""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["torch.distributed.run", "torchvision"])
    process = forks.Process(target=exec, args=(whole, {}))
    process.start()
    return process


@pytest.fixture
def shallow(monkeypatch):
    """One block in each stage of the encoder, and few channels, for tests that do not depend on how many there are."""
    monkeypatch.setattr(model, "STAGES", SHALLOW)
    monkeypatch.setattr(model, "WIDTHS", NARROW)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take long")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Where pytest-xdist is there, a process for each core, at most eight, tests whole folders; -n0: this one alone."""
    if hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist") or config.option.usepdb:
        return
    if config.option.numprocesses is None and all(map(os.path.isdir, config.args)):
        config.option.numprocesses, config.option.dist = min(8, os.cpu_count()), "worksteal"
    if config.option.numprocesses:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow")
    config.addinivalue_line("markers", "gpu: wants a CUDA GPU")


def pytest_collection_modifyitems(config, items):
    reasons = {"slow": "" if config.getoption("--slow") else "takes long; pytest --slow runs it",
               "gpu": "" if torch.cuda.is_available() else "wants a CUDA GPU"}
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def save_palette_mask(path: Path, mask: np.ndarray) -> None:
    """As IDRiD stores them: palette TIFF, values 0 and 1, and 1 is a red that converts to grey 76."""
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    image.save(path)


def official_tree(root: Path, segmentation: int = 6, grading: int = 15, test: bool = True) -> Path:
    """Write photographs 144x96 and labels below `root`; the numbers are those of the training split."""
    series = 7
    for split, (folder, word) in readers.SPLITS.items():
        if split == "test" and not test:
            continue
        a, b, c = (root / subset for subset in readers.SUBSETS)
        images = a / "1. Original Images" / folder
        images.mkdir(parents=True)
        masks = a / "2. All Segmentation Groundtruths" / folder
        for name in readers.MASK_FOLDERS.values():
            (masks / name).mkdir(parents=True)
        for i in range(segmentation):
            name = f"IDRiD_{i + 1 + (54 if split == 'test' else 0):02d}"
            picture, truth = rendered(series, ill_eye(series, 100 * i + (10000 if split == "test" else 0)), 96)
            widen(picture).save(images / f"{name}.jpg", quality=92)
            for lesion, mask in zip(synthetic.LESIONS, truth):
                if mask.any():
                    file = masks / readers.MASK_FOLDERS[lesion] / f"{name}_{lesion}.tif"
                    save_palette_mask(file, np.asarray(widen(mask)))
        images = b / "1. Original Images" / folder
        images.mkdir(parents=True)
        grades = ["Image name,Retinopathy grade,Risk of macular edema ,,,"]
        points = {name: ["Image No,X- Coordinate,Y - Coordinate,,,"] for name in records.LANDMARKS}
        for i in range(grading):
            name = f"IDRiD_{i + 1:03d}"  # the same names in both splits
            number = i + (1000 if split == "test" else 0)
            eye = synthetic.plan(series + 1, number)
            widen(rendered(series + 1, number, 96)[0]).save(images / f"{name}.jpg", quality=92)
            grades.append(f"{name},{eye.grade},{eye.edema_risk},,,")
            for landmark, (x, y) in zip(records.LANDMARKS, (eye.disc, eye.fovea)):
                points[landmark].append(f"{name},{24 + 96 * x:.2f},{96 * y:.2f},,,")
        letter, tables = folder[0], c / "2. Groundtruths"
        for path, lines in (
                (b / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{word} Labels.csv", grades),
                (tables / "1. Optic Disc Center Location" / f"{letter}. IDRiD_OD_Center_{word} Set_Markups.csv",
                 points["disc"]),
                (tables / "2. Fovea Center Location" / f"IDRiD_Fovea_Center_{word} Set_Markups.csv", points["fovea"])):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\r\n".join([*lines, ",,,,,", ",,,,,"]) + "\r\n")
    return root


def ill_eye(series: int, start: int) -> int:
    """The index of the next drawn eye with haemorrhages and hard exudates."""
    while not {"HE", "EX"} <= {lesion.lesion_class for lesion in synthetic.plan(series, start).lesions}:
        start += 1
    return start


@functools.cache
def rendered(series: int, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture and masks of a drawn eye, drawn once; not to be changed."""
    return synthetic.render(synthetic.plan(series, index), side)


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
    """Runs that nothing has stopped, made once for each set of options in a file of tests."""
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


def remembered(function: Callable, folder: Path) -> Callable:
    """The same function of arrays, which is asked once for each input, whichever process asks."""
    def answer(*arrays):
        digest = hashlib.sha256(repr([(a.shape, a.dtype.str) for a in arrays]).encode())
        for array in arrays:
            digest.update(array.tobytes())
        path = folder / f"{function.__name__}_{digest.hexdigest()}.npy"
        if not path.exists():
            np.save(part := path.with_suffix(f".{os.getpid()}.npy"), function(*arrays))
            part.rename(path)
        return np.load(path)
    return answer


@pytest.fixture(autouse=True)
def measured_once(request, tmp_path_factory, monkeypatch):
    """Vessels and quality of a photograph, two thirds of the time of reading it, where it lies in another tree again.

    What they are is tested in test_leaks.py and test_quality.py, which ask the functions themselves.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if hasattr(request.config, "workerinput") else folder) / "measured"
    folder.mkdir(exist_ok=True)
    for function in (preprocess.vessel_map, preprocess.measure_quality):
        monkeypatch.setattr(preprocess, function.__name__, remembered(function, folder))


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


# ---- what several files of tests begin with ----

@pytest.fixture
def few_drawings(monkeypatch):
    """Thirty drawn photographs to train and validate on, ten to test on."""
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 30), "test": (1, 10)})


@pytest.fixture
def few_resamples(monkeypatch):
    """A fifth of the resamples, permutations and steps of t-SNE, for tests that do not depend on their number."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    for function in (statistics.bootstrap_weights, statistics.permutations, statistics.p_values, compare.compare,
                     routing.information, tsne.tsne.__wrapped__):
        *others, number = function.__defaults__
        assert number == 1000, function
        monkeypatch.setattr(function, "__defaults__", (*others, 200))


def state_and_batch(config: Config = TINY):
    """What a step changes, a batch to learn from, and the step: learn(state, batch)."""
    torch.manual_seed(0)
    net, tasks = build_net(asdict(config))
    photographs = data.FundusDataset(readers.read_drawn().records[:6], config.image_size)
    device = torch.device(config.device)
    batch = data.collate([photographs[i] for i in range(6)], tasks).to(device)
    state = train.make_state(net, tasks, config, 100, device)
    return state, batch, partial(train.train_step, tasks=tasks, config=config)


def log(run: Path) -> list[dict]:
    """log.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waiting", "images_per_second")} for line in lines]


def ended_alike(one: Path, two: Path) -> None:
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    assert results[0] == results[1] and len(results[0]["weights"]["last.pt"]) == 64
    assert log(one) == log(two) and [line["epoch"] for line in log(one)] == list(range(1, len(log(one)) + 1))
    for name in ("best.pt", "last.pt"):
        nets = [torch.load(run / name, weights_only=True)["net"] for run in (one, two)]
        assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert not list(one.glob("*.part")) + list(two.glob("*.part"))


def busy_net(**controls):
    """A network whose tokens differ and whose experts matter, and the drawn test photographs."""
    torch.manual_seed(0)
    net, tasks = build_net(asdict(replace(TINY, **controls)))
    photographs = data.FundusDataset([r for r in readers.read_drawn().records if r.split == "test"], 64)
    with torch.no_grad():
        for p in net.experts.parameters():
            p.normal_(std=0.5)
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.momentum = 1.0  # running statistics of these photographs; fresh ones would let all look alike
        net.train()(torch.stack([photographs[i].image for i in range(len(photographs))]))
    return net.eval(), tasks, photographs


@functools.cache
def drawn(series: int, index: int, side: int) -> Image.Image:
    """A drawn eye; not to be changed."""
    return Image.fromarray(rendered(series, index, side)[0])


def photograph(path: Path, index: int, shift=(0, 0), exposure=1.0, quality=92, blur=0.0, turn=0.0, zoom=1.0,
               split="train") -> Record:
    """A drawn eye as a file of its own, the view turned, zoomed and shifted (in pixels of 300), in another light."""
    image = drawn(11, index, 300).rotate(turn, Image.BICUBIC).resize((round(300 * zoom),) * 2, Image.LANCZOS)
    corner = (image.width - 300) // 2
    pixels = np.asarray(image.crop((corner, corner, corner + 300, corner + 300))).astype(float) * exposure
    y, x = (np.arange(300) - 149.5 for _ in range(2))
    inside = np.hypot(x[None], y[:, None])[..., None] < 120  # the camera's own round field, which does not move
    pixels = np.roll(pixels, shift, (0, 1)) * inside
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
    picture.save(path, quality=quality)
    grade = synthetic.plan(11, index).grade
    return Record(path.stem, path, split, {"grade": grade})


def vessel_drawings(number: int, again: int) -> np.ndarray:
    """Vessel maps (number, V, V), drawn as such, with noise; the last `again` show the first eyes in another view.

    A fifth of the time of photographs, and more alike than those, so that more are compared in full. Shifts are up to
    15 % of the side, turns up to 11 degrees, zooms up to 7 %.
    """
    rng, side, maps = np.random.default_rng(0), VESSEL_SIDE, []
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    for i in range(number):
        first = i < number - again
        turn, zoom, shift = (0, 1, 0) if first else (rng.uniform(-11, 11), rng.uniform(0.93, 1.07),
                                                     rng.uniform(-0.15, 0.15, 2))
        cos, sin = zoom * math.cos(math.radians(turn)), zoom * math.sin(math.radians(turn))
        canvas = Image.new("L", (2 * side, 2 * side))
        for stroke in synthetic.grow_vessels(synthetic.plan(11, i if first else i - number + again)):
            points = (stroke.points - 0.5) @ [[cos, sin], [-sin, cos]] + 0.5 + shift
            ImageDraw.Draw(canvas).line((2 * side * points).ravel().tolist(), 255,
                                        max(1, round(side * zoom * stroke.widths.mean())))
        noise = np.abs(10 * rng.standard_normal((side // 2, side // 2))).repeat(2, 0).repeat(2, 1)
        lines = 1 + np.asarray(canvas.reduce(2), float) + noise
        maps.append(np.where(np.hypot(x, y) < 0.46 * side, lines.clip(1, 255), 0).astype(np.uint8))
    return np.stack(maps)


def fake_records(seed: int, number: int = 200) -> list[Record]:
    rng = np.random.default_rng(seed)
    grades = [int(g) for g in rng.choice(5, number, p=[0.4, 0.1, 0.25, 0.15, 0.1])]
    labels = [{"grade": grade} if i % 9 else {"masks": {"EX": None}} for i, grade in enumerate(grades)]
    return [Record(f"r{i}", Path(f"{i}.jpg"), labels={"edema_risk": 0, **labels[i]},
                   eye=f"eye{rng.integers(number * 2 // 3)}") for i in range(number)]
