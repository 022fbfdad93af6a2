"""From records to batches. Read in this order:

    prepare         record -> arrays, once: decoded, cropped to the field of view, reduced; build_cache stores them
    find_eyes       joins copies of one photograph and names the eye of each, from what the cache holds
    Photographs     samples from the cache
    collate         samples -> Batch, augmented, some of whose photographs have a label and some not
    Steps           which photographs meet in which training step
    examine         what a data set holds and what is wrong with it, before anyone trains on it

    python data.py PATH/TO/IDRiD --pictures findings
"""

import argparse
import functools
import hashlib
import json
import math
import sys
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

import augment
import eyes
import synthetic
from files import InputError, RunError, as_helper, command, open_image, replacing
from records import DRAWN_SIDE, HERE, POINTS, SIDEWAYS, DataSet, Record, find_data, orientation, read_data
from synthetic import LESIONS

# S side of the square sample in pixels, L lesion classes (LESIONS), P points (POINTS), B photographs of a batch,
# n_t those with label t, V side of a vessel map

CACHE = HERE / "data" / "cache"
PREPROCESSING = 6  # stored in every cache file: raise it when prepare() or what it calls changes what it makes
UNKNOWN = 255  # in a mask: whether this kind of lesion is there is not known


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
    category: int | None
    masks: Tensor | None  # (L, S, S) uint8: 0, 1, or UNKNOWN for all pixels of a kind
    points: Tensor | None  # (P, 2) float32, x and y in pixels of the sample; nan: not known, or out of the picture
    geometry: Geometry
    draw: int | None = None  # seed of what augmentation is to do with it; None: leave it as it is

    def pin_memory(self) -> "Sample":
        """The same in page-locked memory, from which copies to a GPU need not wait (called by DataLoader)."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, image=self.image.pin_memory(), masks=masks)


def lit_pixels(image: Image.Image) -> np.ndarray:
    """Where a photograph, reduced to at most 256 pixels, is brighter than a tenth of what is bright in it: (h, w)."""
    small = image.copy()
    small.thumbnail((256, 256), Image.BILINEAR)
    brightest = np.asarray(small.convert("RGB")).max(2)
    return brightest > max(12, 0.1 * np.percentile(brightest, 98))


def field_of_view(image: Image.Image) -> tuple[float, float, float, float] | None:
    """Box (left, top, right, bottom), in pixels, around the lit circle of a fundus photograph; None without one.

    A row or column belongs to it when more than 2 % of its pixels are lit. It is a circle, perhaps cut off on two
    sides, if it is large, about as wide as high, fills its box, and leaves the corners of the box dark.
    """
    lit = lit_pixels(image)
    columns, rows = (np.flatnonzero(lit.mean(axis) > 0.02) for axis in (0, 1))
    if len(columns) == 0 or len(rows) == 0:
        return None
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inside = lit[top:bottom, left:right]
    corners = inside[[0, 0, -1, -1], [0, -1, 0, -1]]
    short, long = sorted(inside.shape)
    if corners.any() or inside.mean() < 0.6 or short < 0.6 * long or long < 0.5 * min(lit.shape):
        return None
    zoom_x, zoom_y = image.width / lit.shape[1], image.height / lit.shape[0]
    return left * zoom_x, top * zoom_y, right * zoom_x, bottom * zoom_y


@dataclass
class Decoded:
    """A photograph, perhaps at a fraction of its size."""
    image: Image.Image  # RGB
    extent: tuple[float, float]  # what it shows, in its pixels: a reduced JPEG may end in a fraction of one
    size: tuple[int, int]  # width and height of the file, as a viewer shows it


def read_image(path: Path, enough: int, held: Decoded | None = None) -> Decoded:
    """Open a photograph. InputError: not readable, or more than 8 bits a channel.

    A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) whose shorter side keeps `enough` pixels: nine
    tenths of the time saved, and nothing lost as long as the picture is reduced after that. `held` is the same file,
    decoded before for less: it is handed back where it was not reduced.
    """
    if held is not None and held.extent == held.size:
        return held
    with open_image(path) as image:
        if image.mode[0] in "IF":
            raise InputError(f"{path}: pixels of mode {image.mode}; expected 8 bits per channel, convert it")
        size, held = image.size, orientation(image)
        zoom = enough / min(size)
        drafted = image.draft("RGB", (math.ceil(size[0] * zoom), math.ceil(size[1] * zoom)))
        extent = drafted[1][2:] if drafted else size
        image = (ImageOps.exif_transpose(image) if held > 1 else image).convert("RGB")
        return Decoded(image, *(v[::-1] if held in SIDEWAYS else v for v in (extent, size)))


def telling_channel(image: Image.Image) -> np.ndarray:
    """The channel (height, width) of a mask's picture that tells lesion from background: the brightest that varies.

    IDRiD's masks are palette files, black and a red that reads 76 once converted to grey; one is RGBA, opaque, with
    its mask in the first channel. Where no colour varies, numbers of the palette or opacity may.
    """
    stored = np.atleast_3d(np.asarray(image) * 1)  # a picture of one bit comes as truth values
    colours = np.asarray(image.convert("RGB")) if image.mode == "P" else stored[..., :3 if stored.shape[2] > 2 else 1]
    channels = [*colours.transpose(2, 0, 1)]
    others = [stored[..., -1]] if image.mode in ("P", "RGBA", "LA") else []
    return max([c for c in channels if np.ptp(c)] or [c for c in others if np.ptp(c)] or
               (others if image.mode == "P" else channels)[:1], key=np.max).astype(float)


def read_mask(path: Path, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """A lesion mask as an image of 0 and 255, of `size` (width, height), and how it was stored ("P 0 1").

    Set is what exceeds half of the highest value. InputError: not readable, not the size of its photograph, not two
    values (a smooth or compressed outline of a mask up to 255 may have more).
    """
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image) if orientation(image) > 1 else image.copy()
    if image.size != size:
        raise InputError(f"{path}: a mask of {image.width}x{image.height} for a photograph of {size[0]}x{size[1]}; "
                         "both must have the same size")
    pixels, mode, counts = np.asarray(image), image.mode, 1
    if mode == "1":  # nothing to find out: 3 ms for the 60 of what follows
        counts = image.histogram()
        return image.convert("L"), " ".join(["1", *(v for v, n in (("0", counts[0]), ("1", counts[255])) if n)])
    by_number = mode in ("P", "L")
    if by_number:  # look at its few numbers in place of its many pixels: 16 ms instead of 300 for IDRiD's
        counts = np.array(image.histogram())
        found = np.flatnonzero(counts)
        counts, image = counts[found], image.crop((0, 0, len(found), 1))
        image.putdata(found.tolist())
    else:
        found = np.unique(pixels)
    values = telling_channel(image)
    highest = values.max()
    between = (values > 0.1 * highest) & (values < 0.9 * highest)
    mask = values > highest / 2
    smooth = highest >= 128 and (counts * between).sum() <= (counts * mask).sum()
    if not np.isfinite(highest) or (len(np.unique(values)) > 2 and not smooth):
        raise InputError(f"{path}: {len(found)} values from {found[0]:g} to {found[-1]:g}; expected a mask of two, "
                         "such as 0 and 255")
    form = f"{mode} {' '.join(f'{v:g}' for v in found.astype(float))}" if len(found) < 4 else \
        f"{mode} {len(found)} values"
    if by_number:
        table = np.zeros(256, bool)
        table[found] = mask[0]
        mask = table[pixels]
    return Image.fromarray(mask.view(np.uint8) * 255), form


def prepare(record: Record, size: int, alone: bool = False, small: Decoded | None = None) -> dict[str, np.ndarray]:
    """Decode one record into the arrays of its cache file; `alone`: not to be compared, so without a vessel map.

    `small` is its photograph, decoded for 512 pixels, where the caller has it.

    image (3, S, S), masks (L, S, S) bit-packed or empty, geometry (6,); and what later tells copies, eyes and oddities:
    a thumbnail (89, 134, 3), a vessel map (V, V), how each mask was stored. The field of view is cut out, padded to a
    square with black, and reduced to `size` pixels with antialiasing; of a mask a pixel is set where at least half of
    what it covers is. Pictures without a field of view are taken whole.
    """
    if record.drawing is not None:
        image, masks = synthetic.draw(synthetic.plan(*record.drawing), size)
        scale = size / DRAWN_SIDE
        return {"image": image.transpose(2, 0, 1), "masks": np.packbits(masks),
                "geometry": np.array([DRAWN_SIDE, DRAWN_SIDE, scale, scale, 0, 0], np.float64)}
    # what tells copies, eyes and the field of view must not change with `size`, or the split would
    small = small or read_image(record.image, 512)
    picture, full = small if size <= 256 else read_image(record.image, 2 * size, small), small.size
    field = field_of_view(small.image)
    share = np.clip(np.divide(field or (0, 0, *small.extent), (*small.extent, *small.extent)), 0, 1)
    box = share * (*full, *full)  # left, top, right, bottom in pixels of the file

    def place(size):  # of the box on a square canvas: left, top, width, height
        scale = size / max(box[2] - box[0], box[3] - box[1])
        width, height = (max(1, round(scale * (box[i + 2] - box[i]))) for i in (0, 1))
        return (size - width) // 2, (size - height) // 2, width, height

    def fit(image, extent, size, resample):  # cut out the box; the image may be a reduced one
        left, top, width, height = place(size)
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(image.resize((width, height), resample, tuple(share * (*extent, *extent))), (left, top))
        return np.asarray(canvas)

    left, top, width, height = place(size)
    scale_x, scale_y = width / (box[2] - box[0]), height / (box[3] - box[1])
    geometry = (*full, scale_x, scale_y, left - box[0] * scale_x, top - box[1] * scale_y)
    masks, stored = np.zeros(0, bool), {}
    if record.masks is not None:
        masks = np.zeros((len(LESIONS), size, size), bool)
        for kind, path in record.masks.items():
            if path is not None:
                mask, stored[kind] = read_mask(path, full)
                masks[LESIONS.index(kind)] = fit(mask, full, size, Image.BOX) >= 128
    side = eyes.VESSEL_SIDE
    vessels = eyes.vessel_map(fit(small.image, small.extent, 2 * side, Image.LANCZOS)) if field and \
        not alone else np.zeros((side, side), np.uint8)
    return {"image": fit(picture.image, picture.extent, size, Image.LANCZOS).transpose(2, 0, 1),
            "masks": np.packbits(masks), "geometry": np.array(geometry, np.float64), "vessels": vessels,
            "thumbnail": np.asarray(small.image.resize((134, 89), Image.BOX, (0, 0, *small.extent))),
            "stored": np.array([f"{kind} {how}" for kind, how in stored.items()], str)}


# ---- cache ----

def files_of(record: Record) -> list[tuple[Path, int, int]]:
    """The files that prepare() reads, each with its size in bytes and its time of change in ns."""
    paths = [record.image, *filter(None, (record.masks or {}).values())] if record.drawing is None else []
    return [(path, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]


def cache_path(record: Record, size: int, cache: Path) -> Path:
    """File of the cache for this record: its name changes with every input that prepare() reads."""
    kinds = sorted(kind for kind, path in (record.masks or {}).items() if path is not None)
    if record.drawing is not None:
        inputs = [record.drawing, hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()]
    else:
        inputs = [(str(path.resolve()), *rest) for path, *rest in files_of(record)]
    key = repr((size, record.masks is not None, kinds, inputs))
    name = hashlib.sha256(key.encode()).hexdigest()
    return cache / name[:2] / f"{name[2:34]}.npz"


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a cache file; no reader ever sees half of one, and of two writers at once the second wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, lasting=False) as file:  # what a power cut spoils is made anew
        np.savez(file, version=PREPROCESSING, **arrays)


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a cache file. FileNotFoundError; ValueError: it is damaged or of another version, in words."""
    try:
        with np.load(path) as stored:
            version, *arrays = (stored[key] for key in ("version", *keys))
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file provokes in zipfile, zlib and numpy
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from error
    if version != PREPROCESSING:
        raise ValueError(f"{path} was made by another version")
    return arrays


def fill_cache(record: Record, path: Path, size: int) -> str:
    """Prepare one record and store it; -> what is wrong with its files, "" if nothing."""
    try:
        write_arrays(path, **prepare(record, size))
        return ""
    except InputError as error:
        return f"{record.where}: {error}" if record.where else str(error)


def cached(record: Record, path: Path, size: int, *keys: str) -> list[np.ndarray]:
    """Arrays of a record from its cache file; made anew, and said, if that was damaged or removed since it was made.

    InputError: made anew, that is, but its photograph cannot be read any more.
    """
    try:
        return read_arrays(path, *keys)
    except (FileNotFoundError, ValueError) as error:
        print(f"cache: {error}: made anew", file=sys.stderr)
    if problem := fill_cache(record, path, size):
        raise InputError(problem)
    return read_arrays(path, *keys)


def build_cache(records: Sequence[Record], size: int, cache: Path) -> dict[str, str]:
    """Prepare all records that the cache lacks, in parallel; -> {name: what is wrong} for those that cannot be used."""
    todo, spoiled = [], []
    for record, path in ((r, cache_path(r, size, cache)) for r in records):
        try:
            read_arrays(path)
        except (FileNotFoundError, ValueError) as error:
            todo.append((record, path))
            spoiled += [error] * isinstance(error, ValueError)
    if not todo:
        return {}
    if spoiled:
        print(f"cache: {spoiled[0]}{f', and {len(spoiled) - 1} more' * (len(spoiled) > 1)}: made anew", file=sys.stderr)
    for part in cache.glob("*/*.part"):  # of a process that was killed
        if time.time() - part.stat().st_mtime > 24 * 3600:
            part.unlink()
    verb = "drawing" if todo[0][0].drawing is not None else "reading"
    try:
        with ProcessPoolExecutor(initializer=as_helper) as pool:
            jobs = pool.map(functools.partial(fill_cache, size=size), *zip(*todo), chunksize=4)
            problems = list(tqdm(jobs, total=len(todo), desc=f"{verb} photographs, once", unit="photo", leave=False,
                                 disable=None))
    except BrokenProcessPool:
        raise RunError("a process that was reading photographs was killed, perhaps for want of memory; what was read "
                       "is kept: start again") from None
    return {r.name: problem for (r, _), problem in zip(todo, problems) if problem}


def want_cache(records: Sequence[Record], size: int, cache: Path) -> list[Path]:
    """Cache files of all records. InputError: the first of them that cannot be used."""
    for problem in build_cache(records, size, cache).values():
        raise InputError(problem)
    return [cache_path(r, size, cache) for r in records]


# ---- copies and eyes ----

@dataclass
class Comparison:
    """Which of n photographs are copies and which show one eye; indices count the photographs."""
    copies: np.ndarray  # (c, 2)
    pairs: np.ndarray  # (p, 2) of different photographs whose vessels are somewhat alike ...
    scores: np.ndarray  # (p,) ... and how much; see eyes.SAME_EYE
    sizes: np.ndarray  # (n, 2) width and height in pixels

    def same_eye(self) -> list[list[int]]:
        """Copies and pairs of one eye."""
        return self.copies.tolist() + self.pairs[self.scores >= eyes.SAME_EYE].tolist()

    def join(self, records: Sequence[Record]) -> tuple[list[Record], list[eyes.Conflict]]:
        """Name the eye of each photograph, and join copies in the training part; -> records, conflicts of labels."""
        return eyes.join_copies(eyes.name_eyes(records, self.same_eye()), self.copies.tolist(), self.sizes.tolist())


def compare(records: Sequence[Record], size: int) -> Comparison:
    """Compare all photographs with each other, from what the cache holds of each; done once, and kept there.

    Copies are compared by their thumbnails, vessels of one copy of each. Drawn photographs are of one eye each.
    """
    number = len(records)
    if all(r.drawing is not None for r in records):
        return Comparison(np.zeros((0, 2), int), np.zeros((0, 2), int), np.zeros(0), np.full((number, 2), DRAWN_SIDE))
    paths = want_cache(records, size, CACHE)
    settings = eyes.COPY_RMSE, eyes.SCREEN, eyes.REACH, eyes.COARSE_VIEWS, eyes.FINE_VIEWS
    key = hashlib.sha256(repr((settings, [p.name for p in paths])).encode()).hexdigest()
    stored, names = CACHE / f"eyes_{key[:32]}.npz", [f.name for f in fields(Comparison)]
    try:
        return Comparison(*read_arrays(stored, *names))
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(f"cache: {error}: made anew", file=sys.stderr)
    thumbnails, vessels, geometry = (np.stack(arrays) for arrays in zip(*(
        cached(r, path, size, "thumbnail", "vessels", "geometry") for r, path in zip(records, paths))))
    copies = np.array(eyes.copies(thumbnails), int).reshape(-1, 2)
    different = np.unique(eyes.connected(copies.tolist(), number))
    pairs, scores = eyes.same_eye_scores(vessels[different])
    found = Comparison(copies, different[pairs], scores, geometry[:, :2].astype(int))
    write_arrays(stored, **{name: getattr(found, name) for name in names})
    return found


def find_eyes(records: Sequence[Record], size: int, ignore: bool = False) -> tuple[list[Record], list[eyes.Conflict]]:
    """Compare all photographs and join; see Comparison.join. `ignore`: as if each showed an eye of its own."""
    return ([replace(r, eye=r.name) for r in records], []) if ignore else compare(records, size).join(records)


# ---- samples ----

def to_sample(record: Record, arrays: Mapping[str, np.ndarray]) -> Sample:
    """The sample of a record from the arrays that prepare() makes of it."""
    size = arrays["image"].shape[-1]
    width, height, *affine = arrays["geometry"].tolist()
    geometry = Geometry(int(width), int(height), *affine)
    masks = points = None
    if record.masks is not None:
        bits = np.unpackbits(arrays["masks"], count=len(LESIONS) * size * size)
        masks = torch.from_numpy(bits.reshape(len(LESIONS), size, size))
        masks[[kind not in record.masks for kind in LESIONS]] = UNKNOWN
    if record.points is not None:
        there = np.array([record.points.get(point, (math.nan, math.nan)) for point in POINTS])
        points = inside(torch.from_numpy(geometry.to_sample(there)).float(), size)
    image = torch.from_numpy(np.ascontiguousarray(arrays["image"]))
    return Sample(record.name, image, record.grade, record.edema, record.category, masks,
                  points, geometry)


class Photographs(torch.utils.data.Dataset):
    """Samples of `records` at `size` pixels from the cache. An index is (number of the record, draw or None).

    A sample with a draw will be augmented, and the draw is the seed: the same pair gives the same photograph in
    whichever process, at whatever time. InputError: a file has been removed or replaced since.
    """

    def __init__(self, records: Sequence[Record], size: int):
        self.records, self.size = list(records), size
        self.paths = want_cache(self.records, size, CACHE)
        self.files = [files_of(r) for r in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: tuple[int, int | None]) -> Sample:
        i, draw = index
        self.check(i)
        keys = "image", "masks", "geometry"
        arrays = cached(self.records[i], self.paths[i], self.size, *keys)
        return replace(to_sample(self.records[i], dict(zip(keys, arrays))), draw=draw)

    def fingerprint(self) -> str:
        """SHA-256 over names, labels and contents of all samples, but not over where the files lie."""
        digest = hashlib.sha256()
        for r, path in zip(self.records, self.paths):
            with zipfile.ZipFile(path) as stored:  # an npz, which has a checksum of each of its arrays
                sums = [stored.getinfo(f"{key}.npy").CRC for key in ("image", "masks", "geometry")]
            digest.update(repr((r.name, r.grade, r.edema, r.category, r.points, sorted(r.masks or []), sums)).encode())
        return digest.hexdigest()

    def check(self, i: int) -> None:
        """InputError: a file of record i is not the one any more that was there at first."""
        for path, *before in self.files[i]:
            try:
                status = path.stat()
            except FileNotFoundError:
                raise InputError(f"{path}: removed while it was in use; expected the file to stay; put it "
                                 "back") from None
            except OSError as error:  # a drive that is gone
                raise InputError(f"{path}: {error.strerror} while it was in use; expected the file to stay") from None
            if [status.st_size, status.st_mtime_ns] != before:
                raise InputError(f"{path}: changed while it was in use; expected the file to stay as it was; put it "
                                 "back, with its time of change")


def inside(points: Tensor, size: int) -> Tensor:
    """Points (P, 2) with nan in place of those that lie outside of the picture."""
    return points.masked_fill(((points < 0) | (points > size)).any(1, keepdim=True), math.nan)


# ---- batches ----

@dataclass
class Batch:
    """Photographs of which some carry some labels. Row k of targets[t] belongs to photograph rows[t][k].

    A task without a labelled photograph is in neither.
    """
    images: Tensor  # (B, 3, S, S) uint8
    targets: dict[str, Tensor]  # task -> (n_t, ...)
    rows: dict[str, Tensor]  # task -> (n_t,) int64, ascending
    names: list[str]


def collate(samples: Sequence[Sample], tasks: Sequence, device: torch.device = torch.device("cpu")) -> Batch:
    """Bring samples to a device, augment those that have a draw there, and stack them."""
    def move(x):
        return x.to(device, non_blocking=True)

    images = torch.stack([move(s.image) for s in samples])
    samples = [replace(s, image=image, masks=s.masks if s.masks is None else move(s.masks))
               for s, image in zip(samples, images)]
    if samples[0].draw is not None:
        images, samples = augmented(images, samples)
    rows = {t: [i for i, s in enumerate(samples) if t.labelled(s)] for t in tasks}
    rows = {t: r for t, r in rows.items() if r}
    targets = {t.name: move(torch.stack([t.target(samples[i]) for i in r])) for t, r in rows.items()}
    return Batch(images, targets, {t.name: move(torch.tensor(r)) for t, r in rows.items()}, [s.name for s in samples])


def augmented(images: Tensor, samples: Sequence[Sample]) -> tuple[Tensor, list[Sample]]:
    """All samples, whose images are (B, 3, S, S), changed as their draws say.

    A point that leaves the picture is not known any more; a mask that is not known stays so, with its border.
    """
    size = images.shape[-1]
    changes = [augment.draw(s.draw, size) for s in samples]
    images, masks, points = augment.apply(changes, images, [s.masks for s in samples], [s.points for s in samples])
    return images, [replace(
        s, image=image, points=p if p is None else inside(p, size),
        masks=m if m is None else torch.where(s.masks[:, :1, :1] == UNKNOWN, UNKNOWN, m))
        for s, image, m, p in zip(samples, images, masks, points)]


class Steps:
    """Which photographs meet in which training step; a step is a list of (record, draw).

    Records fall into streams by the labels they carry for `tasks`; those that carry none are left out. Every step
    takes from every stream, in proportion to the square root of its size: proportional sampling would show too few of
    the rare photographs with masks, equal sampling would repeat them too often (the temperature T = 2 of Arivazhagan
    et al. 2019, arXiv 1907.05019, section 4.2). A stream runs through its photographs in a new order each time around.
    Everything is a function of (seed, step): a step can be reproduced without those before it.

    `wanted`: of each step only the photographs with a label for one of these tasks; a network for one task then sees
    those of its photographs that a network for all `tasks` sees, changed in the same ways.
    """

    def __init__(self, records: Sequence[Record], tasks: Sequence, batch: int, seed: int, augmented: bool,
                 wanted: Sequence | None = None):
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
        wanted = {t.name for t in (tasks if wanted is None else wanted)}
        self.kept = [bool(wanted & set(labels)) for labels in sorted(streams)]
        self.photographs = int(self.quota[self.kept].sum())  # of a step

    def step(self, number: int) -> list[tuple[int, int | None]]:
        """The photographs of training step `number`, counted from 0."""
        chosen = []
        for k, (stream, quota, kept) in enumerate(zip(self.streams, self.quota, self.kept)):
            if not kept:
                continue
            for position in range(number * quota, (number + 1) * quota):
                around, place = divmod(position, len(stream))
                order = np.random.default_rng((self.seed, k, around)).permutation(len(stream))
                draw = int(np.random.SeedSequence((self.seed, k, position)).generate_state(1)[0])
                chosen.append((stream[order[place]], draw if self.augmented else None))
        return chosen

    def range(self, start: int, stop: int, rank: int = 0, size: int = 1) -> Iterator[list[tuple[int, int | None]]]:
        """Steps start..stop-1; of each the share that falls to process `rank` of `size`, as even as it can be."""
        return (self.step(number)[rank::size] for number in range(start, stop))


def blanks(photographs: Photographs, tasks: Sequence) -> dict[str, Tensor]:
    """{task: target of no photograph (0, ...)}, for the process that has none in a step in which others have some."""
    firsts = {t: next(i for i, r in enumerate(photographs.records) if t.labelled(r)) for t in tasks}
    return {t.name: t.target(photographs[i, None])[None][:0] for t, i in firsts.items()}


# ---- examination: what is in a data set, before anyone trains on it ----

LABELS = {"grade": "cls", "edema": "dme", "category": "cls", "masks": "seg", "points": "loc"}  # and their tasks
KINDS = dict(zip(LESIONS, ("microaneurysms", "haemorrhages", "hard exudates", "soft exudates", "optic disc")))
EXAMINED_SIZE = 256  # pixels; the default of training, which then finds its cache


@dataclass
class Examined:
    """What `page` and `contact_sheets` need."""
    report: dict  # plain types, for --json
    records: list[Record]  # those that can be read, before copies are joined
    found: Comparison
    odd: list[tuple[Record, str]]  # masks that are stored unlike most


def labelled(records: Sequence[Record]) -> dict[str, int]:
    """How many records carry each label that occurs at all."""
    return {label: n for label in LABELS if (n := sum(getattr(r, label) is not None for r in records))}


def class_shares(records: Sequence[Record], classes: Sequence[str]) -> dict[str, dict]:
    """For each label of the whole photograph: how often each value occurs, and what a constant guess scores."""
    shares = {}
    for label in ("grade", "edema", "category"):
        counts = Counter(v for r in records if (v := getattr(r, label)) is not None)
        if counts:
            value, number = max(counts.items(), key=lambda item: (item[1], -item[0]))
            names = {v: classes[v] if label == "category" else str(v) for v in sorted(counts)}
            shares[label] = {"counts": {names[v]: counts[v] for v in names}, "constant_guess": names[value],
                             "constant_accuracy": round(number / counts.total(), 4)}
    return shares


def overview(records: Sequence[Record], classes: Sequence[str]) -> dict:
    """Photographs by subset, labels, classes and masks of some records."""
    masks = {kind: {"masks": sum(bool((r.masks or {}).get(kind)) for r in records),
                    "none": sum(kind in (r.masks or {}) and r.masks[kind] is None for r in records)}
             for kind in LESIONS} if any(r.masks is not None and r.image for r in records) else {}
    return {"photographs": len(records), "subsets": dict(Counter(r.name.removeprefix("test/").rpartition("/")[0]
                                                                 for r in records)),
            "labels": labelled(records), "classes": class_shares(records, classes), "masks": masks}


def stored_forms(records: Sequence[Record]) -> tuple[Counter, list[tuple[Record, str]], list[str]]:
    """How masks are stored: counts, those stored unlike most; and the photographs without a field of view."""
    if all(r.drawing is not None for r in records):
        return Counter(), [], []
    stored, vessels = zip(*(cached(r, cache_path(r, EXAMINED_SIZE, CACHE), EXAMINED_SIZE, "stored", "vessels")
                            for r in records))
    masks = [(r, str(mask)) for r, here in zip(records, stored) for mask in here]  # "OD P 0 1"
    forms = Counter(mask.partition(" ")[2] for _, mask in masks)
    usual = max(forms, key=forms.get, default="")
    return (forms, [(r, mask) for r, mask in masks if mask.partition(" ")[2] != usual],
            [r.name for r, v in zip(records, vessels) if not v.any()])


def examine(data_set: DataSet, root: Path | None, fold: str = "1/5") -> Examined:
    """Look at a data set as training would: counts, files, copies, eyes, leaks, conflicts, the split.

    InputError: nothing in it can be read.
    """
    problems = build_cache(data_set.records, EXAMINED_SIZE, CACHE)
    records = [r for r in data_set.records if r.name not in problems]
    if not records:
        raise InputError(f"{root}: none of its {len(problems)} photographs can be read; first: "
                         f"{next(iter(problems.values()))}")
    found = compare(records, EXAMINED_SIZE)
    joined, conflicts = found.join(records)
    split = eyes.split(joined, fold)
    forms, odd, without_field = stored_forms(records)
    groups = defaultdict(list)
    for r in joined:
        groups[r.eye].append(r.name)
    trained = {r.eye for r in joined if r.part == "train"}
    pairs = [{"photographs": [records[i].name for i in found.pairs[k]], "score": round(float(found.scores[k]), 3)}
             for k in np.argsort(-found.scores, kind="stable")]
    same = int((found.scores >= eyes.SAME_EYE).sum())
    parts = [part for part in ("train", "val", "test") if any(r.part == part for r in data_set.records)]
    report = {
        "data": "drawn" if root is None else str(root), "notes": list(data_set.notes),
        "parts": {p: overview([r for r in data_set.records if r.part == p], data_set.classes) for p in parts},
        "unreadable": problems,
        "sizes": dict(Counter(f"{w}x{h}" for w, h in found.sizes.tolist()).most_common()),
        "mask_formats": dict(forms.most_common()), "odd_masks": [f"{r.name} {mask}" for r, mask in odd],
        "without_field_of_view": without_field,
        "copies": [[records[i].name, records[j].name] for i, j in found.copies],
        "same_eye": {"threshold": eyes.SAME_EYE, "pairs": pairs[:same], "closest_below": pairs[same:same + 12],
                     "photographs": len(joined), "eyes": len(groups),
                     "groups": [names for names in groups.values() if len(names) > 1]},
        "conflicts": [c.plain(data_set.classes) for c in conflicts],
        "leaks": {"validated": [r.name for r in split.validated],
                  "training": [r.name for r in split.leaks], "training_labels": labelled(split.leaks),
                  "test_labels": labelled([r for r in split.test if r.eye in trained])},
        "split": {"fold": fold, "training": overview(split.training, data_set.classes),
                  "validation": overview(split.validation, data_set.classes)}}
    return Examined(report, records, found, odd)


def listing(title: str, items: Sequence[str], most: int = 12) -> list[str]:
    """Lines of text: how many there are, and the first of them."""
    rest = [f"    ... and {len(items) - most} more (--json lists all)"] if len(items) > most else []
    return [f"{title}: {len(items)}", *(f"    {item}" for item in items[:most]), *rest]


def by_task(labels: Mapping[str, int]) -> str:
    """Counts of labels, each with the task that learns from it."""
    return ", ".join(f"{LABELS[label]} ({label}) {n}" for label, n in labels.items()) or "none"


def part_lines(title: str, part: Mapping) -> list[str]:
    """Lines of text for one overview."""
    subsets = ", ".join(f"{name} {n}" for name, n in list(part["subsets"].items())[:12])
    lines = [f"{title}: {part['photographs']} photographs ({subsets}); labelled: {by_task(part['labels'])}"]
    for label, shares in part["classes"].items():
        total = sum(shares["counts"].values())
        lines.append(f"    {label:9}" + "  ".join(f"{v}: {n} ({n / total:.0%})" for v, n in shares["counts"].items()) +
                     f"   always guessing {shares['constant_guess']} is right for {shares['constant_accuracy']:.1%}")
    if part["masks"]:
        lines.append("    masks    " + "  ".join(f"{kind}: {n['masks']}" + f" ({n['none']} have none)" * bool(n["none"])
                                                 for kind, n in part["masks"].items()))
    return lines


def page(report: Mapping) -> str:
    """A report as text for the screen."""
    lines = [report["data"], *report["notes"], ""]
    for part, counts in report["parts"].items():
        lines += part_lines(part, counts)
    lines += ["", "sizes: " + ", ".join(f"{size} ({n})" for size, n in list(report["sizes"].items())[:8])]
    if report["mask_formats"]:
        lines.append(f"masks ({', '.join(f'{k} {name}' for k, name in KINDS.items())}) are stored as " + ", ".join(
            f"mode {form.replace(' ', ' with values ', 1)} ({n} files)" for form, n in report["mask_formats"].items()))
    lines += listing("masks stored unlike the others", report["odd_masks"])
    lines += listing("unreadable files", list(report["unreadable"].values()))
    lines += listing("photographs without a round field of view (taken whole, not compared by vessels)",
                     report["without_field_of_view"], 3)
    same = report["same_eye"]
    lines += ["", *listing("copies: pairs of files that show one photograph",
                           [" = ".join(pair) for pair in report["copies"]], 4)]
    lines += listing(f"other pairs that show one eye (score {same['threshold']} and up)",
                     [f"{p['score']:.2f}  {' = '.join(p['photographs'])}" for p in same["pairs"]])
    lines += [f"    closest below: {p['score']:.2f}  {' / '.join(p['photographs'])}"
              for p in same["closest_below"][:1]]
    lines.append(f"after joining copies in the training part: {same['photographs']} photographs of {same['eyes']} eyes")
    lines += listing("labels that contradict each other", [
        f"{c['label']} {' or '.join(map(str, c['values']))} of {' = '.join(c['photographs'])}; training uses "
        f"{c['used']}" for c in report["conflicts"]])
    leaks = report["leaks"]
    if "test" in report["parts"]:
        lines += ["", f"leaks: training photographs of an eye in the test part: {len(leaks['training'])}; by task: "
                  f"{by_task(leaks['training_labels'])}",
                  f"    test photographs of an eye in the training part, by task: {by_task(leaks['test_labels'])}"]
        lines += ["    train.py leaves those training photographs out, unless --keep-leaks"] * bool(leaks["training"])
    else:
        lines += ["", "leaks: there is no test part here to look for in the training part"]
    if leaks["validated"]:
        lines += listing("training photographs of an eye in the validation part (train.py leaves them out)",
                         leaks["validated"])
    how = "validation as the data set says" if "val" in report["parts"] else f"fold {report['split']['fold']}"
    lines += ["", f"the split of train.py, {how}, copies joined:"]
    lines += part_lines("  training", report["split"]["training"])
    return "\n".join(lines + part_lines("  validation", report["split"]["validation"]))


# ---- contact sheets ----

TILE, CAPTION = 208, 30  # pixels: side of a picture, height of the text below
COLOURS = dict(zip(LESIONS, ((86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66))))


def picture(record: Record) -> Image.Image:
    """The cached sample of a record as a small picture."""
    pixels, = cached(record, cache_path(record, EXAMINED_SIZE, CACHE), EXAMINED_SIZE, "image")
    return Image.fromarray(pixels.transpose(1, 2, 0)).resize((TILE, TILE), Image.LANCZOS)


def mark(pen: ImageDraw.ImageDraw, points: Iterable[tuple[float, float]], reach: float) -> None:
    """Draw the disc's centre as + and the fovea's as x, strokes `reach` pixels long to each side."""
    for (x, y), angle in zip(points, (0, math.pi / 4)):
        for colour, width in (("black", 0.55), ("white", 0.22)):
            for turn in (angle, angle + math.pi / 2):
                dx, dy = reach * math.cos(turn), reach * math.sin(turn)
                pen.line((x - dx, y - dy, x + dx, y + dy), colour, max(1, round(width * reach)))


def labelled_picture(record: Record) -> Image.Image:
    """With its masks outlined and its points marked, as they lie in the sample."""
    sample = Photographs([record], EXAMINED_SIZE)[0, None]
    image = sample.image.clone()
    if sample.masks is not None:
        for mask, colour in zip((sample.masks == 1).float()[:, None], COLOURS.values()):
            outline = torch.nn.functional.max_pool2d(mask, 5, 1, 2) > mask
            image = torch.where(outline, torch.tensor(colour, dtype=torch.uint8)[:, None, None], image)
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy())
    if sample.points is not None:
        mark(ImageDraw.Draw(drawn), sample.points.nan_to_num(-99).tolist(), 9)
    return drawn.resize((TILE, TILE), Image.LANCZOS)


def contact_sheet(path: Path, title: str, groups: Sequence[tuple[str, Sequence[Record]]], draw=picture) -> None:
    """Write pictures of records in groups that belong together, each group with a caption, each picture with a name."""
    font = ImageFont.load_default(12)
    wide = max(len(members) for _, members in groups)
    tiles = []
    for caption, members in groups:
        tile = Image.new("RGB", (wide * TILE, TILE + CAPTION + 4), "white")
        pen = ImageDraw.Draw(tile)
        for k, record in enumerate(members):
            tile.paste(draw(record), (k * TILE, 0))
            pen.text((k * TILE + 3, TILE + 1), record.name[-28:], "black", font)
        pen.text((3, TILE + 15), caption, "black", font)
        tiles.append(v2.functional.pil_to_tensor(tile) / 255)
    grid = v2.functional.to_pil_image(make_grid(tiles, nrow=max(1, 6 // wide), padding=6, pad_value=0.8))
    sheet = Image.new("RGB", (max(grid.width, round(font.getlength(title)) + 12), grid.height + 22), "white")
    sheet.paste(grid, (0, 22))
    ImageDraw.Draw(sheet).text((6, 4), title, "black", font)
    sheet.save(path)


def contact_sheets(examined: Examined, folder: Path, most: int = 36) -> list[str]:
    """One sheet for each kind of finding, in `folder`; -> their names and what they show."""
    records, report = examined.records, examined.report
    by_name = {r.name: r for r in records}

    def pairs(found):
        return [(f"score {p['score']:.2f}", [by_name[n] for n in p["photographs"]]) for p in found]

    groups = defaultdict(list)
    for r in eyes.name_eyes(records, examined.found.same_eye()):
        groups[r.eye].append(r)
    leaks = [("", [next(r for r in group if r.part == "test"), next(r for r in group if r.part != "test")])
             for group in groups.values() if {"test"} < {r.part for r in group}]
    alike = defaultdict(list)
    for r in records:
        alike[r.grade, r.category, r.masks is not None].append(r)
    labels = [(", ".join(f"{k} {v}" for k in ("grade", "edema") if (v := getattr(r, k)) is not None), [r])
              for _, group in sorted(alike.items(), key=lambda item: str(item[0])) for r in group[:6]]
    legend = "; outlines: " + ", ".join(f"{name} {colour}" for name, colour in zip(
        KINDS.values(), ("blue", "orange", "green", "pink", "yellow"))) + "; + optic disc, x fovea"
    sheets = {
        "labels": ("labels as they lie on the photographs" + legend, labels, labelled_picture),
        "copies": ("files that show one photograph", [("", [by_name[n] for n in p]) for p in report["copies"]],
                   picture),
        "same_eye": ("photographs of one eye", pairs(report["same_eye"]["pairs"]), picture),
        "just_below": ("pairs closest below the threshold", pairs(report["same_eye"]["closest_below"]), picture),
        "conflicts": ("one photograph, different labels", [
            (f"{c['label']} {' | '.join(map(str, c['values']))}; training uses {c['used']}",
             [by_name[n] for n in c["photographs"]]) for c in report["conflicts"]], picture),
        "leaks": ("an eye of the test part in the training part", leaks, picture),
        "odd_masks": ("masks stored unlike the others", [(mask, [r]) for r, mask in examined.odd], labelled_picture),
        "no_field": ("no round field of view found", [("", [by_name[n]]) for n in report["without_field_of_view"]],
                     picture)}
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (title, found, draw) in sheets.items():
        if found:
            title += f" ({min(len(found), most)} of {len(found)})"
            contact_sheet(folder / f"{name}.png", title, found[:most], draw)
            lines.append(f"{folder / name}.png: {title}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """python data.py PATH: examine a data set. Nothing on disk changes but the cache."""
    parser = argparse.ArgumentParser(description="Examine a data set before training on it.")
    parser.add_argument("data", nargs="?", help="IDRiD's folder, a table FILE.csv, or a folder with train/CLASS/ in it "
                                                "(default: data/IDRiD if it exists, else drawn photographs)")
    parser.add_argument("--fold", default="1/5", help="show the split with this fold for validation (default: 1/5)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER",
                        help="write a contact sheet for each kind of finding")
    args = parser.parse_args(argv)
    eyes.read_fold(args.fold)
    if args.pictures is not None and args.pictures.exists() and not args.pictures.is_dir():
        raise InputError(f"--pictures {args.pictures}: a file; expected a folder, which may be new")
    root = find_data(args.data)
    examined = examine(read_data(root), root, args.fold)
    print(json.dumps(examined.report, indent=1) if args.json else page(examined.report))
    if args.pictures is not None:
        lines = contact_sheets(examined, args.pictures)
        print("\n".join(["", *lines]), file=sys.stderr if args.json else sys.stdout)
    if problems := examined.report["unreadable"]:
        raise InputError(f"{root}: {len(problems)} of its photographs cannot be used, see above; train.py would refuse "
                         "them: replace the files, or remove them and their labels")


if __name__ == "__main__":
    command(main)
