"""From files to batches. Read in this order:

    Record          paths and labels of one photograph (None: not known)
    read_idrid, drawn_records   -> records of the training or of the test part
    prepare         record -> arrays, once: decoded, cropped to the field of view, reduced; build_cache stores them
    join_copies, find_eyes      which records are one photograph, which photographs are of one eye
    split           records -> training, validation; stratified by grade; an eye is never on both sides
    Photographs     cached samples, augmented
    Steps           which photographs meet in which training step
    collate         samples -> Batch, some of whose photographs have a label and some not

IDRiD: Porwal et al. 2020, Medical Image Analysis 59:101561
"""

import csv
import functools
import hashlib
import io
import math
import os
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import synthetic
from synthetic import LESIONS

# S side of the square sample in pixels, L lesion classes (LESIONS), B photographs of a batch, n_t those with label t

HERE = Path(__file__).parent
CACHE = HERE / "data" / "cache"
PREPROCESSING = 3  # part of every cache key: raise it when prepare() changes what it makes
SOURCE = "https://ieee-dataport.org/open-access/indian-diabetic-retinopathy-image-dataset-idrid"


class InputError(ValueError):
    """A user's mistake. Its text is one line: what, where, what was expected, what to do."""


def command(main: Callable[[], None]) -> None:
    """Run a program's main function: a user's mistake becomes one line on stderr and exit status 2, no traceback."""
    try:
        main()
    except (InputError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def ignore_ctrl_c(*_) -> None:
    """For helper processes: a terminal sends Ctrl-C to all of them, and only the main process should answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---- records ----

@dataclass(frozen=True)
class Record:
    """What is known of one photograph before it is opened."""
    name: str  # unique within its part, e.g. "grading/IDRiD_001"
    image: Path | None  # None: drawn
    grade: int | None = None  # diabetic retinopathy, 0..4
    edema: int | None = None  # risk of macular edema, 0..2
    masks: dict[str, Path] | None = field(default=None, hash=False)  # a kind that is absent: no such lesion
    eye: str = ""  # photographs with the same eye stay on one side of every split
    drawing: tuple[int, int] | None = None  # seed and index for synthetic.plan


PARTS = {"train": ("a. Training Set", "a. IDRiD_Disease Grading_Training Labels.csv"),
         "test": ("b. Testing Set", "b. IDRiD_Disease Grading_Testing Labels.csv")}
MASK_FOLDERS = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates",
                "SE": "4. Soft Exudates", "OD": "5. Optic Disc"}
SUBSETS = {"A. Segmentation": "seg", "B. Disease Grading": "cls, dme"}


def read_idrid(root: Path, part: str) -> list[Record]:
    """Records of the official `part` ("train" or "test") below `root`, in the official layout and names.

    Segmentation or grading may be absent as a whole. InputError: no such folder, neither subset in it, a label
    without its image, an image without its label, a label that is no grade.
    """
    if not root.is_dir():
        raise InputError(f"{root}: {'a file' if root.exists() else 'no such folder'}; --data wants the folder "
                         f"into which IDRiD was unzipped ({SOURCE})")
    if not any((root / subset).is_dir() for subset in SUBSETS):
        found = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise InputError(f"{root}: expected at least one of the folders {' and '.join(map(repr, SUBSETS))}, "
                         f"found {found}")
    records = []
    if (root / "A. Segmentation").is_dir():
        records += read_segmentation(root / "A. Segmentation", part)
    if (root / "B. Disease Grading").is_dir():
        records += read_grading(root / "B. Disease Grading", part)
    return records


def missing_subsets(root: Path) -> list[str]:
    """A sentence for each IDRiD subset that `root` lacks: which tasks cannot be had without it."""
    return [f"{root} has no '{subset}': nothing to learn {tasks} from"
            for subset, tasks in SUBSETS.items() if not (root / subset).is_dir()]


def list_images(folder: Path) -> dict[str, Path]:
    """{name without suffix: path} of the photographs in `folder`, sorted by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the official layout keeps photographs there")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise InputError(f"{folder}: holds no .jpg or .png photograph")
    return {p.stem: p for p in paths}


def read_segmentation(root: Path, part: str) -> list[Record]:
    """Photographs with masks. A mask file that is not there means: no such lesion."""
    images = list_images(root / "1. Original Images" / PARTS[part][0])
    masks: dict[str, dict[str, Path]] = {name: {} for name in images}
    for kind, folder in MASK_FOLDERS.items():
        folder = root / "2. All Segmentation Groundtruths" / PARTS[part][0] / folder
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the official layout keeps the {kind} masks there")
        for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "Thumbs.db"):
            name = path.stem.removesuffix(f"_{kind}")
            if path.suffix.lower() not in (".tif", ".tiff", ".png"):
                raise InputError(f"{path}: expected masks only (.tif, .tiff, .png) in this folder; remove the file")
            if name not in masks:
                raise InputError(f"{path}: a mask without its photograph {name}.jpg in {root / '1. Original Images'}")
            masks[name][kind] = path
    for name, found in masks.items():
        if not found:  # a photograph without any lesion still has an optic disc
            raise InputError(f"{images[name]}: a photograph without any mask, not even the optic disc's")
    return [Record(f"segmentation/{name}", images[name], masks=masks[name], eye=f"segmentation/{name}")
            for name in images]


def read_grading(root: Path, part: str) -> list[Record]:
    """Graded photographs. Column names carry stray spaces and rows empty cells in the official files."""
    path = root / "2. Groundtruths" / PARTS[part][1]
    if not path.is_file():
        raise InputError(f"{path}: no such file; the official layout keeps the grades there")
    images = list_images(root / "1. Original Images" / PARTS[part][0])
    grades = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as CSV in UTF-8") from None
    with io.StringIO(text, newline="") as file:
        rows = csv.DictReader(file)
        rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        wanted = ("Image name", "Retinopathy grade", "Risk of macular edema")
        if lacking := [name for name in wanted if name not in rows.fieldnames]:
            raise InputError(f"{path}: no column {lacking[0]!r}; found {', '.join(filter(None, rows.fieldnames))}")
        for row in rows:
            if not (row["Image name"] or "").strip():
                continue  # the files end in rows of empty cells
            name, *labels = ((row[key] or "").strip() for key in wanted)
            where = f"{path} line {rows.line_num}"
            if name not in images:
                raise InputError(f"{where}: a grade for {name}, but no {name}.jpg in {root / '1. Original Images'}")
            if name in grades:
                raise InputError(f"{where}: a second row for {name}")
            grades[name] = [whole_number(text, highest, f"{where}: {column} of {name}")
                            for text, highest, column in zip(labels, (4, 2), wanted[1:])]
    for name, image in images.items():
        if name not in grades:
            raise InputError(f"{image}: a photograph without its row in {path}")
    return [Record(f"grading/{name}", images[name], *grades[name], eye=f"grading/{name}") for name in images]


def whole_number(text: str, highest: int, what: str) -> int:
    """A label 0..highest from a cell's text."""
    if text not in map(str, range(highest + 1)):
        raise InputError(f"{what} is {text!r}, expected a whole number from 0 to {highest}")
    return int(text)


DRAWN = {"train": (0, 1200), "test": (1, 300)}  # series and number of the embedded drawings


def drawn_records(part: str) -> list[Record]:
    """Records of the drawn photographs of `part`; every label is known."""
    series, number = DRAWN[part]
    records = []
    for i in range(number):
        eye = synthetic.plan(series, i)
        records.append(Record(f"drawn/{series}_{i:04d}", None, eye.grade, eye.edema, masks={},
                              eye=f"drawn/{series}_{i}", drawing=(series, i)))
    return records


def find_data(path: str | None) -> Path | None:
    """The data set that a command means: `path`, else data/IDRiD where it exists, else None for drawn photographs."""
    if path is not None:
        return Path(path)
    return HERE / "data" / "IDRiD" if (HERE / "data" / "IDRiD").is_dir() else None


def read_records(root: Path | None, part: str) -> list[Record]:
    """Records of `part` from IDRiD at `root`, or drawn ones where `root` is None."""
    return drawn_records(part) if root is None else read_idrid(root, part)


# ---- prepare: from the file to a square sample ----

@dataclass(frozen=True)
class Geometry:
    """Where a sample's pixels lie in its file: x_sample = x_file * scale_x + shift_x, the same for y.

    Coordinates are continuous: pixel i covers i to i + 1. `width` and `height` are those of the file, in pixels.
    """
    width: int
    height: int
    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float

    def to_sample(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) in pixels of the file -> in pixels of the sample."""
        return points * (self.scale_x, self.scale_y) + np.array((self.shift_x, self.shift_y))

    def to_file(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) in pixels of the sample -> in pixels of the file."""
        return (points - np.array((self.shift_x, self.shift_y))) / (self.scale_x, self.scale_y)


@dataclass
class Sample:
    """One photograph as the network's input and with its labels; None where a label is not known."""
    name: str
    image: Tensor  # (3, S, S) uint8 RGB
    grade: int | None
    edema: int | None
    masks: Tensor | None  # (L, S, S) bool
    geometry: Geometry


def field_of_view(image: Image.Image) -> tuple[float, float, float, float]:
    """Box (left, top, right, bottom), in pixels, around the lit circle; the whole image where there is none.

    A row or column belongs to it when more than 2 % of its pixels are brighter than a tenth of the bright retina.
    """
    small = image.copy()
    small.thumbnail((256, 256), Image.BILINEAR)
    brightest = np.asarray(small.convert("RGB")).max(2)
    lit = brightest > max(12, 0.1 * np.percentile(brightest, 98))
    columns, rows = (np.flatnonzero(lit.mean(axis) > 0.02) for axis in (0, 1))
    if len(columns) == 0 or len(rows) == 0:
        return 0, 0, *image.size
    zoom_x, zoom_y = image.width / small.width, image.height / small.height
    return columns[0] * zoom_x, rows[0] * zoom_y, (columns[-1] + 1) * zoom_x, (rows[-1] + 1) * zoom_y


def read_image(path: Path, enough: int) -> tuple[Image.Image, tuple[int, int]]:
    """Open a photograph: RGB, and the size in pixels that the file has.

    A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) whose shorter side keeps `enough` pixels: nine
    tenths of the time saved, and nothing lost as long as the picture is reduced after that.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            zoom = enough / min(size)
            image.draft("RGB", (math.ceil(size[0] * zoom), math.ceil(size[1] * zoom)))
            return image.convert("RGB"), size
    except Exception as error:  # damaged files provoke all kinds in the decoders
        raise InputError(f"{path}: not a readable image ({error}); replace the file or remove it and its label")


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A lesion mask as an image of 0 and 255, of `size` (width, height).

    IDRiD's are palette files with the values 0 and 1, which read 0 and 76 once converted to grey; one is RGBA with
    its mask in the first channel. So: palette index or first channel, and set is what exceeds half of the highest
    value. InputError: not readable, not the size of its photograph.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except Exception as error:  # damaged files provoke all kinds in the decoders
        raise InputError(f"{path}: not a readable mask ({error}); replace the file")
    if values.shape[1::-1] != size:
        raise InputError(f"{path}: a mask of {values.shape[1]}x{values.shape[0]} for a photograph of "
                         f"{size[0]}x{size[1]}; both must have the same size")
    values = values if values.ndim == 2 else values[..., 0]
    return Image.fromarray(np.where(values > values.max() / 2, 255, 0).astype(np.uint8))


def prepare(record: Record, size: int) -> dict[str, np.ndarray]:
    """Decode one record into the arrays of its cache file: image (3, S, S), geometry (6,), masks bit-packed or empty.

    The field of view is cut out, padded to a square with black, and reduced to `size` pixels with antialiasing; of a
    mask a pixel is set where at least half of what it covers is. A thumbnail (89, 134, 3) and a vessel map (V, V) tell
    later which photographs are copies and which show one eye.
    """
    if record.drawing is not None:
        image, masks = synthetic.draw(synthetic.plan(*record.drawing), size)
        return {"image": image.transpose(2, 0, 1), "masks": np.packbits(masks),
                "geometry": np.array([size, size, 1, 1, 0, 0], np.float64)}
    # what tells copies, eyes and the field of view must not change with `size`, or the split would
    small, full = read_image(record.image, 512)
    picture = small if size <= 256 else read_image(record.image, 2 * size)[0]
    share = np.array(field_of_view(small)) / (small.width, small.height, small.width, small.height)
    box = share * (*full, *full)  # left, top, right, bottom in pixels of the file

    def place(size):  # of the box on a square canvas: left, top, width, height
        scale = size / max(box[2] - box[0], box[3] - box[1])
        width, height = (max(1, round(scale * (box[i + 2] - box[i]))) for i in (0, 1))
        return (size - width) // 2, (size - height) // 2, width, height

    def fit(image, size, resample):  # cut out the box; the image may be a reduced one
        left, top, width, height = place(size)
        canvas = Image.new(image.mode, (size, size))
        inner = np.minimum(share * (*image.size, *image.size), (*image.size, *image.size))
        canvas.paste(image.resize((width, height), resample, tuple(inner)), (left, top))
        return np.asarray(canvas)

    left, top, width, height = place(size)
    scale_x, scale_y = width / (box[2] - box[0]), height / (box[3] - box[1])
    geometry = (*full, scale_x, scale_y, left - box[0] * scale_x, top - box[1] * scale_y)
    masks = np.zeros(0, bool)
    if record.masks is not None:
        masks = np.zeros((len(LESIONS), size, size), bool)
        for kind, path in record.masks.items():
            masks[LESIONS.index(kind)] = fit(read_mask(path, full), size, Image.BOX) >= 128
    return {"image": fit(picture, size, Image.LANCZOS).transpose(2, 0, 1), "masks": np.packbits(masks),
            "geometry": np.array(geometry, np.float64),
            "thumbnail": np.asarray(small.resize((134, 89), Image.BOX)),
            "vessels": vessel_map(fit(small, 2 * VESSEL_SIDE, Image.LANCZOS))}


# ---- cache ----

def cache_path(record: Record, size: int, cache: Path) -> Path:
    """File of the cache for this record: its name changes with every input that prepare() reads."""
    if record.drawing is not None:
        inputs = [record.drawing, hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()]
    else:
        inputs = []
        for path in (record.image, *(record.masks or {}).values()):
            status = path.stat()
            inputs.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    key = hashlib.sha256(repr((PREPROCESSING, size, sorted(record.masks or {}), inputs)).encode()).hexdigest()
    return cache / key[:2] / f"{key[2:34]}.npz"


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Store arrays; written beside their place and renamed, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)


def stored_arrays(paths: Sequence[Path], key: str) -> np.ndarray:
    """One array of each of several cache files, stacked."""
    arrays = []
    for path in paths:
        with np.load(path) as stored:
            arrays.append(stored[key])
    return np.stack(arrays)


def fill_cache(record: Record, size: int, cache: Path) -> None:
    """Prepare one record and store it."""
    path = cache_path(record, size, cache)
    write_arrays(path, **prepare(record, size))


def build_cache(records: Sequence[Record], size: int, cache: Path) -> None:
    """Prepare all records that the cache lacks, in parallel. InputError: the first file that cannot be used."""
    todo = [r for r in records if not cache_path(r, size, cache).exists()]
    if not todo:
        return
    with ProcessPoolExecutor(initializer=ignore_ctrl_c) as pool:
        jobs = pool.map(functools.partial(fill_cache, size=size, cache=cache), todo, chunksize=4)
        verb = "drawing" if todo[0].drawing is not None else "reading"
        for _ in tqdm(jobs, total=len(todo), desc=f"{verb} photographs, once", unit="photo", leave=False,
                      disable=None):
            pass


# ---- copies and eyes ----

COPY_RMSE = 2.5  # grey levels between thumbnails: re-encoded copies in IDRiD reach 1.2, the next closest pair 5
SAME_EYE = 0.45  # vessel score: IDRiD's photographs of one eye reach 0.58 and more, all other pairs at most 0.32
VESSEL_SIDE = 108  # pixels of a vessel map
REACH = 0.2  # largest shift between two photographs of one eye, as share of the side


@functools.cache
def low_pass(side: int, sigma: float) -> np.ndarray:
    """Transfer function (side, side / 2 + 1) of a Gaussian blur of `sigma` pixels."""
    square = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.rfftfreq(side) ** 2
    return np.exp(-2 * (math.pi * sigma) ** 2 * square)


@functools.cache
def line_filters(side: int, number: int = 12, sigma: float = 1.6, length: float = 5.0) -> np.ndarray:
    """Transfer functions (number, side, side / 2 + 1) of dark-line detectors at `number` angles.

    Across the line the second derivative of a Gaussian, along it a Gaussian of `length`.
    """
    y, x = np.fft.fftfreq(side, 1 / side)[:, None], np.fft.fftfreq(side, 1 / side)
    kernels = []
    for angle in np.pi * np.arange(number) / number:
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        kernel = (1 - (v / sigma) ** 2) * np.exp(-v ** 2 / (2 * sigma ** 2) - u ** 2 / (2 * length ** 2))
        kernel -= kernel.mean()
        kernels.append(np.fft.rfft2(kernel / np.linalg.norm(kernel)))
    return np.stack(kernels).astype(np.complex64)


def vessel_map(picture: np.ndarray) -> np.ndarray:
    """Where dark lines are: square retina (2 V, 2 V, 3) uint8 -> (V, V) uint8; 0 outside the retina, else 1..255.

    The best line response of all angles, less their mean: dust and lesions respond to every angle alike, vessels to
    one. The rim of the field, where the camera's border would look like a line, is left out.
    """
    side = len(picture)
    padded = side + 40  # so that nothing wraps around

    def convolve(layer, transfer):
        spectrum = np.fft.rfft2(layer, s=(padded, padded)) * transfer
        return np.fft.irfft2(spectrum, s=(padded, padded))[..., :side, :side].astype(np.float32)

    green, brightest = picture[..., 1].astype(np.float32), picture.max(2)
    lit = (brightest > max(12, 0.12 * np.percentile(brightest, 98))).astype(np.float32)

    def local_mean(layer, sigma):  # over the lit pixels around
        blur = low_pass(padded, sigma)
        return convolve(layer * lit, blur) / np.maximum(convolve(lit, blur), 1e-3)

    mean = local_mean(green, 8)
    contrast = np.sqrt(np.maximum(local_mean((green - mean) ** 2, 12), 0)) + 1
    responses = convolve(np.clip((mean - green) / contrast, -4, 4) * lit, line_filters(padded))
    lines = np.maximum(responses.max(0) - np.abs(responses).mean(0), 0)
    inside = convolve(lit, low_pass(padded, 4)) > 0.98
    if not inside.any():
        return np.zeros((side // 2, side // 2), np.uint8)
    lines = np.minimum(lines, np.percentile(lines[inside], 98)) * inside
    lines = lines.reshape(side // 2, 2, side // 2, 2).mean((1, 3))
    inside = inside.reshape(side // 2, 2, side // 2, 2).all((1, 3))
    return np.where(inside, 1 + 254 * lines / max(lines.max(), 1e-6), 0).astype(np.uint8)


@torch.inference_mode()
def vessel_scores(maps: np.ndarray) -> np.ndarray:
    """Same-eye scores (n, n), upper triangle, of vessel maps (n, V, V): the highest correlation over all shifts.

    One product of spectra gives the correlation at every shift (Lewis 1995, "Fast normalized cross-correlation"); it
    is divided by how many pixels overlap there, never by less than 40 % of the field.
    """
    v = torch.from_numpy(maps).float()
    inside = (v > 0).float()
    pixels = inside.sum((1, 2), keepdim=True).clamp(min=1)
    v = (v - v.sum((1, 2), keepdim=True) / pixels) * inside
    v = v / (v.square().sum((1, 2), keepdim=True) / pixels).sqrt().clamp(min=1e-6)  # mean 0, variance 1 inside
    reach = round(REACH * maps.shape[1])
    side = (maps.shape[1] + reach + 1,) * 2
    spectra = torch.fft.rfft2(v, s=side)
    field = torch.fft.rfft2((inside.mean(0) > 0.5).float(), s=side)
    overlap = torch.fft.irfft2(field.conj() * field, s=side)
    allowed = torch.zeros(side)
    shifts = torch.arange(-reach, reach + 1)
    allowed[shifts[:, None], shifts] = 1
    per_pixel = allowed / overlap.clamp(min=0.4 * float(overlap[0, 0]))
    scores = torch.zeros(len(v), len(v))
    for i in tqdm(range(len(v) - 1), desc="comparing vessels, once", leave=False, disable=None):
        for j in range(i + 1, len(v), 128):
            correlation = torch.fft.irfft2(spectra[i].conj() * spectra[j:j + 128], s=side)
            scores[i, j:j + 128] = (correlation * per_pixel).flatten(1).amax(1)
    return scores.numpy()


def connected(pairs: Sequence[tuple[int, int]], number: int) -> list[int]:
    """For each of `number` items the lowest item that it is connected with through `pairs`."""
    leader = list(range(number))

    def find(i):
        while leader[i] != i:
            i = leader[i]
        return i

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        leader[b] = a
    return [find(i) for i in range(number)]


def copies(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of thumbnails (n, h, w, 3) that show one photograph: root mean square difference at most COPY_RMSE."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    norms = (flat ** 2).sum(1)
    distances = np.maximum(norms[:, None] + norms - 2 * flat @ flat.T, 0) / flat.shape[1]
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(distances <= COPY_RMSE ** 2, 1))]


def join_copies(records: Sequence[Record], pairs: Sequence[tuple[int, int]]) -> list[Record]:
    """Make one record of all copies of a photograph, with the labels of all of them.

    The image is that of the copy with masks, since masks are drawn on its pixels. Where copies carry different grades
    the higher one stays: the same photograph was graded twice, and missing disease is the worse mistake.
    """
    groups = defaultdict(list)
    for record, leader in zip(records, connected(pairs, len(records))):
        groups[leader].append(record)

    def highest(labels):
        return max((label for label in labels if label is not None), default=None)

    joined = []
    for group in groups.values():
        first = next((r for r in group if r.masks is not None), group[0])
        joined.append(replace(first, grade=highest(r.grade for r in group), edema=highest(r.edema for r in group)))
    return joined


def find_eyes(records: Sequence[Record], size: int, cache: Path | None = None) -> list[Record]:
    """Join copies and name the eye of every photograph, from what the cache holds of each (built here if need be).

    Photographs of one eye are connected through their vessels. Drawn photographs are of one eye each.
    """
    if all(r.drawing is not None for r in records):
        return list(records)
    cache = cache or CACHE
    build_cache(records, size, cache)
    paths = [cache_path(r, size, cache) for r in records]
    key = hashlib.sha256(repr((SAME_EYE, COPY_RMSE, REACH, [p.name for p in paths])).encode()).hexdigest()
    stored = cache / f"eyes_{key[:32]}.npz"
    if not stored.exists():
        write_arrays(stored, copies=np.array(copies(stored_arrays(paths, "thumbnail")), int).reshape(-1, 2),
                     eyes=np.argwhere(vessel_scores(stored_arrays(paths, "vessels")) >= SAME_EYE))
    with np.load(stored) as pairs:
        same_photograph, same_eye = pairs["copies"].tolist(), pairs["eyes"].tolist()
    leaders = connected(same_photograph + same_eye, len(records))
    return join_copies([replace(r, eye=records[k].name) for r, k in zip(records, leaders)], same_photograph)


# ---- split ----

def folds(records: Sequence[Record], number: int, seed: int) -> list[int]:
    """Fold 0..number-1 of each record: eyes stay whole, and every fold gets its share of each grade and of the masks.

    Greedy, as in scikit-learn's StratifiedGroupKFold: eyes in random order, those with most photographs first; each
    goes where it leaves the counts of its strata most even.
    """
    strata = [(r.grade, r.masks is not None) for r in records]
    total = Counter(strata)
    eyes = defaultdict(list)
    for i, record in enumerate(records):
        eyes[record.eye].append(i)
    groups = [eyes[eye] for eye in sorted(eyes)]
    order = np.random.default_rng(seed).permutation(len(groups))
    counts = [Counter() for _ in range(number)]
    fold = [0] * len(records)
    for g in sorted(order, key=lambda g: -len(groups[g])):
        members = Counter(strata[i] for i in groups[g])

        def crowded(f):  # how full fold f already is, in the strata of this eye first, in all of them second
            return sum(counts[f][s] / total[s] * n for s, n in members.items()), counts[f].total()

        best = min(range(number), key=crowded)
        counts[best].update(members)
        for i in groups[g]:
            fold[i] = best
    return fold


def split(records: Sequence[Record], seed: int, number: int = 5) -> tuple[list[Record], list[Record]]:
    """Cut a validation split, one of `number` folds, from the training part: -> training, validation."""
    fold = folds(records, number, seed)
    return [r for r, f in zip(records, fold) if f != 0], [r for r, f in zip(records, fold) if f == 0]


# ---- samples ----

class Photographs(torch.utils.data.Dataset):
    """Samples of `records` at `size` pixels from the cache. An index is (number of the record, draw or None).

    With a draw, the sample is augmented, and the draw is the seed: the same pair gives the same sample in whichever
    process, at whatever time. Without one, it comes as it is.
    """

    def __init__(self, records: Sequence[Record], size: int, cache: Path | None = None):
        self.records, self.size = list(records), size
        cache = cache or CACHE
        build_cache(self.records, size, cache)
        self.paths = [cache_path(r, size, cache) for r in records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: tuple[int, int | None]) -> Sample:
        i, draw = index
        record, size = self.records[i], self.size
        with np.load(self.paths[i]) as stored:
            image, packed, geometry = (stored[key] for key in ("image", "masks", "geometry"))
        masks = None
        if record.masks is not None:
            bits = np.unpackbits(packed, count=len(LESIONS) * size * size)
            masks = torch.from_numpy(bits.reshape(len(LESIONS), size, size)).bool()
        width, height, *affine = geometry.tolist()
        sample = Sample(record.name, torch.from_numpy(image), record.grade, record.edema, masks,
                        Geometry(int(width), int(height), *affine))
        return sample if draw is None else augment(sample, draw)


# ---- augmentation ----

AUGMENT = v2.Compose([
    v2.RandomHorizontalFlip(),
    v2.RandomVerticalFlip(),
    v2.RandomAffine(degrees=30, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
    v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.0))], p=0.2),
])


def augment(sample: Sample, draw: int) -> Sample:
    """Flip, turn, scale, shift, recolour and blur a sample, image and masks alike, as the seed `draw` says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        if sample.masks is None:
            return replace(sample, image=AUGMENT(tv_tensors.Image(sample.image)).as_subclass(Tensor))
        image, masks = AUGMENT(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.masks))
    return replace(sample, image=image.as_subclass(Tensor), masks=masks.as_subclass(Tensor))


# ---- batches ----

@dataclass
class Batch:
    """Photographs of which some carry some labels. Row k of targets[t] belongs to photograph rows[t][k]."""
    images: Tensor  # (B, 3, S, S) uint8
    targets: dict[str, Tensor]  # task -> (n_t, ...)
    rows: dict[str, Tensor]  # task -> (n_t,) int64, ascending
    names: list[str]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        def move(tensors):
            return {t: x.to(device, non_blocking=True) for t, x in tensors.items()}
        return Batch(self.images.to(device, non_blocking=True), move(self.targets), move(self.rows), self.names)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU need not wait (called by DataLoader)."""
        return Batch(self.images.pin_memory(), {t: x.pin_memory() for t, x in self.targets.items()},
                     {t: x.pin_memory() for t, x in self.rows.items()}, self.names)


def collate(samples: Sequence[Sample], tasks: Sequence) -> Batch:
    """Stack samples; a task without a labelled photograph has empty `rows` and no target."""
    rows = {t.name: [i for i, s in enumerate(samples) if t.labelled(s)] for t in tasks}
    targets = {t.name: torch.stack([t.target(samples[i]) for i in rows[t.name]]) for t in tasks if rows[t.name]}
    return Batch(torch.stack([s.image for s in samples]), targets,
                 {name: torch.tensor(r, dtype=torch.int64) for name, r in rows.items()}, [s.name for s in samples])


class Steps:
    """Which photographs meet in which training step; a step is a list of (record, draw).

    Records fall into streams by the labels they carry for `tasks`; those that carry none are left out. Every step
    takes from every stream, in proportion to the square root of its size: proportional sampling would show too few of
    the rare photographs with masks, equal sampling would repeat them too often (the temperature T = 2 of Arivazhagan
    et al. 2019, arXiv 1907.05019, section 4.2). A stream runs through its photographs in a new order each time around.
    Everything is a function of (seed, step): a step can be reproduced without those before it.
    """

    def __init__(self, records: Sequence[Record], tasks: Sequence, batch: int, seed: int, augmented: bool):
        streams = defaultdict(list)
        for i, record in enumerate(records):
            labels = tuple(t.name for t in tasks if t.labelled(record))
            if labels:
                streams[labels].append(i)
        self.streams = [streams[labels] for labels in sorted(streams)]
        self.seed, self.augmented = seed, augmented
        if batch < len(self.streams):
            raise InputError(f"--batch {batch}: every step takes from each of the {len(self.streams)} groups of "
                             f"differently labelled photographs; use at least {len(self.streams)}")
        weights = np.sqrt([len(s) for s in self.streams])
        spare = batch - len(self.streams)  # one each, the rest by the largest remainder
        shares = spare * weights / weights.sum()
        self.quota = 1 + np.floor(shares).astype(int)
        for k in np.argsort(np.floor(shares) - shares, kind="stable")[:batch - self.quota.sum()]:
            self.quota[k] += 1
        # an epoch: each photograph of the stream that takes longest has come once
        self.per_epoch = max(math.ceil(len(s) / q) for s, q in zip(self.streams, self.quota))

    def step(self, number: int) -> list[tuple[int, int | None]]:
        """The photographs of training step `number`, counted from 0."""
        chosen = []
        for k, (stream, quota) in enumerate(zip(self.streams, self.quota)):
            for position in range(number * quota, (number + 1) * quota):
                around, place = divmod(position, len(stream))
                order = np.random.default_rng((self.seed, k, around)).permutation(len(stream))
                draw = int(np.random.SeedSequence((self.seed, k, position)).generate_state(1)[0])
                chosen.append((stream[order[place]], draw if self.augmented else None))
        return chosen

    def range(self, start: int, stop: int) -> Iterator[list[tuple[int, int | None]]]:
        """Steps start..stop-1."""
        return (self.step(number) for number in range(start, stop))
