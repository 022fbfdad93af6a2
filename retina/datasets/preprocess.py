"""From a photograph's files to the square sample that a network sees: preprocess(), then to_sample()."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from retina.datasets import synthetic
from retina.datasets.masks import check_plausible, read_mask
from retina.datasets.quality import QUALITY_SIDE, measure_quality
from retina.datasets.readers import DRAWN_SIDE
from retina.datasets.records import LABELS, Labelled, Record
from retina.datasets.synthetic import LESIONS
from retina.datasets.vessels import SMALLEST_FIELD, VESSEL_SIDE, vessel_map
from retina.files import SIDEWAYS, InputError, channel_bits, exif_orientation, open_image, orientation, page_count


# S side of the square sample in pixels, L lesion classes (LESIONS), V side of a vessel map, T side of a thumbnail

THUMBNAIL_SIDE = 108  # pixels; both sides alike, so that a photograph that was turned has a thumbnail that was turned


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
class Sample(Labelled):
    """One photograph as the network sees it, with its labels."""
    name: str
    image: Tensor  # (3, S, S) uint8 RGB
    labels: dict[str, Any]  # name in LABELS -> what its to_sample returns; unknown labels are absent
    geometry: Geometry
    eye: str  # the eye that it shows
    part: bool = False  # of a photograph, of which nobody can tell what the whole shows


# ---- photographs ----

def foreground_mask(image: Image.Image) -> np.ndarray:
    """Where a photograph, reduced to at most 256 pixels, is brighter than a tenth of what is bright in it: (h, w)."""
    small = image.copy()
    small.thumbnail((256, 256), Image.BILINEAR)
    brightest = np.asarray(small.convert("RGB")).max(2)
    return brightest > max(12, 0.1 * np.percentile(brightest, 98))


def field_of_view(image: Image.Image, foreground: np.ndarray | None = None) -> tuple[float, ...] | None:
    """Box (left, top, right, bottom), in pixels, around the lit circle of a fundus photograph; None without one.

    `foreground` is its foreground_mask, where the caller has it. A row or column belongs to the box when more than 2 %
    of its pixels are foreground. It holds a circle, perhaps cut off at two sides, if it is large, about as wide as
    high, filled, and dark in its corners.
    """
    foreground = foreground_mask(image) if foreground is None else foreground
    columns, rows = (np.flatnonzero(foreground.mean(axis) > 0.02) for axis in (0, 1))
    if len(columns) == 0 or len(rows) == 0:
        return None
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inside = foreground[top:bottom, left:right]
    corners = inside[[0, 0, -1, -1], [0, -1, 0, -1]]
    short, long = sorted(inside.shape)
    if corners.any() or inside.mean() < 0.6 or short < 0.6 * long or long < 0.5 * min(foreground.shape):
        return None
    zoom_x, zoom_y = image.width / foreground.shape[1], image.height / foreground.shape[0]
    return left * zoom_x, top * zoom_y, right * zoom_x, bottom * zoom_y


def quality(image: Image.Image, field: tuple[float, float, float, float] | None) -> np.ndarray:
    """The MEASURES (6,) of a photograph with this field of view; of all of it, where it has none."""
    left, top, right, bottom = field or (0, 0, *image.size)
    picture = image.convert("RGB").resize((QUALITY_SIDE, QUALITY_SIDE), Image.BOX, (left, top, right, bottom))
    return np.array([field is not None, min(right - left, bottom - top),
                     *measure_quality(np.asarray(picture), foreground_mask(picture))])


def lit_field(lit: np.ndarray, field: Sequence[float] | None) -> np.ndarray:
    """Where the retina is, dark spots included, from a photograph's foreground_mask; all of it without a `field`."""
    if field is None:
        return np.ones_like(lit)
    return np.logical_or.accumulate(lit, 1) & np.logical_or.accumulate(lit[:, ::-1], 1)[:, ::-1]


@dataclass
class Decoded:
    """A photograph, perhaps at a fraction of its size."""
    image: Image.Image  # RGB
    extent: tuple[float, float]  # width and height in its own pixels: a reduced JPEG may end in a fraction of one
    size: tuple[int, int]  # width and height of the file, as a viewer shows it
    orientation: int  # EXIF's, 1 where the file is upright

    @functools.cached_property
    def foreground(self) -> np.ndarray:
        """See foreground_mask; made once, since several ask for it."""
        return foreground_mask(self.image)


def read_image(path: Path, min_side: int, decoded: Decoded | None = None) -> Decoded:
    """Decode a photograph. InputError: not readable, more than 8 bits a channel, or more than one page.

    A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) whose shorter side has `min_side` pixels: that
    saves nine tenths of the time, and loses nothing as long as the picture is reduced afterwards. `decoded` is the same
    file, decoded before for a smaller `min_side`: it is returned if it was not reduced.
    """
    if decoded is not None and decoded.extent == decoded.size:
        return decoded
    with open_image(path) as image:
        if (bits := channel_bits(image)) > 8:
            raise InputError(f"{path}: {bits} bits a channel; expected 8: convert it, scaled to its brightest value")
        if (pages := page_count(image)) > 1:
            raise InputError(f"{path}: {pages} pages; expected one: save the one to use as a file of its own")
        size, turned, held = image.size, orientation(image), exif_orientation(image)
        zoom = min_side / min(size)
        drafted = image.draft("RGB", (math.ceil(size[0] * zoom), math.ceil(size[1] * zoom)))
        extent = drafted[1][2:] if drafted else size
        image.load()
        image = ImageOps.exif_transpose(image) if turned > 1 else image
        image = image if image.mode == "RGB" else image.convert("RGB")  # which copies in any case
        return Decoded(image, *(v[::-1] if turned in SIDEWAYS else v for v in (extent, size)), held)


# ---- a record ----

def check_landmarks(points: Mapping[str, Sequence[float]], path: Path, small: Decoded, box: Sequence[float]) -> None:
    """InputError: one of the points, in pixels of the file, lies outside of the photograph's lit field.

    It must lie in the `box` of the field (left, top, right, bottom), with light on both sides in its row and in its
    column, each taken as 4 % of the picture's width thick: a fovea is dark, and a disc may lie at the edge.
    """
    lit = small.foreground
    reach, size = round(0.02 * lit.shape[1]), lit.shape[::-1]
    scale = np.divide(small.extent, small.size) * np.divide(size, small.image.size)
    for name, point in points.items():
        x, y = np.clip(point * scale, 0, np.subtract(size, 1)).astype(int)
        row, column = lit[max(0, y - reach):y + reach + 1].any(0), lit[:, max(0, x - reach):x + reach + 1].any(1)
        sides = row[:x + 1], row[x:], column[:y + 1], column[y:]
        if not all(map(np.any, sides)) or not all(a <= v <= b for a, v, b in zip(box, point, box[2:])):
            left, top, right, bottom = np.round(box).astype(int)
            raise InputError(
                f"the {name} of {path} is at ({point[0]:g}, {point[1]:g}), outside of its lit field, which lies in x "
                f"{left} to {right}, y {top} to {bottom}; expected pixels of this file; scale points of a larger or "
                "uncropped original, leave both cells empty where it is not there")


def preprocess(record: Record, size: int, image_only: bool = False,
               small: Decoded | None = None) -> dict[str, np.ndarray]:
    """Decode one record into the arrays of its cache file.

    image (3, S, S), masks (L, S, S) bit-packed or empty, geometry (6,); and what later tells copies, eyes and odd
    files: thumbnail (T, T, 3) of the whole picture, vessels (V, V), quality (6,), stored (m, 4), the lesion and the
    Meaning of each mask file. The field of view is cut out, padded to a square with black, and reduced to `size` pixels
    with antialiasing; a pixel of a mask is set if at least half of what it covers is. A picture without a field of view
    is taken whole. The vessel map is zero where the field's shorter side has less than SMALLEST_FIELD pixels.
    `image_only` leaves vessels zero, and thumbnail and quality out; `small` is the photograph, decoded for 512 pixels,
    where the caller has it. InputError: a file that cannot be read, no mask of this photograph, a landmark outside of
    its field of view.
    """
    if record.drawing is not None:
        image, masks = synthetic.render(synthetic.plan(*record.drawing), size)
        scale = size / DRAWN_SIDE
        return {"image": image.transpose(2, 0, 1), "masks": np.packbits(masks),
                "geometry": np.array([DRAWN_SIDE, DRAWN_SIDE, scale, scale, 0, 0], np.float64)}
    # copies, eyes and the field of view must not depend on `size`, or the split would
    small = small or read_image(record.image, 512)
    picture, full = small if size <= 256 else read_image(record.image, 2 * size, small), small.size
    field = field_of_view(small.image, small.foreground)
    share = np.clip(np.divide(field or (0, 0, *small.extent), (*small.extent, *small.extent)), 0, 1)
    box = share * (*full, *full)  # left, top, right, bottom in pixels of the file
    if field:
        check_landmarks(record.landmarks or {}, record.image, small, box)

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
    masks, stored = np.zeros((0 if record.masks is None else len(LESIONS), size, size), bool), []
    lit = lit_field(small.foreground, field) if record.masks else None
    for lesion, file in (record.masks or {}).items():
        if file is not None:
            mask, meaning = read_mask(file, full, small.orientation)
            check_plausible(file, mask, lit, meaning)
            masks[LESIONS.index(lesion)] = fit(mask, full, size, Image.BOX) >= 128
            stored.append((lesion, *astuple(meaning)))
    vessels = np.zeros((VESSEL_SIDE, VESSEL_SIDE), np.uint8)
    measures = {} if image_only else {
        "quality": quality(small.image, field),
        "thumbnail": np.asarray(small.image.resize((THUMBNAIL_SIDE,) * 2, Image.BOX, (0, 0, *small.extent)))}
    if field and measures and measures["quality"][1] >= SMALLEST_FIELD:  # of the picture that the map is made from
        vessels = vessel_map(fit(small.image, small.extent, 2 * VESSEL_SIDE, Image.LANCZOS))
    return {"image": fit(picture.image, picture.extent, size, Image.LANCZOS).transpose(2, 0, 1),
            "masks": np.packbits(masks), "geometry": np.array(geometry, np.float64), "vessels": vessels,
            "stored": np.array(stored, str).reshape(-1, 4), **measures}


def to_sample(record: Record, arrays: Mapping[str, np.ndarray]) -> Sample:
    """The sample of a record from the arrays that preprocess() makes of it."""
    size = arrays["image"].shape[-1]
    width, height, *affine = arrays["geometry"].tolist()
    geometry = Geometry(int(width), int(height), *affine)
    image = torch.from_numpy(np.ascontiguousarray(arrays["image"]))
    labels = {name: LABELS[name].to_sample(value, arrays, geometry.to_sample, size)
              for name, value in record.labels.items()}
    return Sample(record.name, image, labels, geometry, record.eye or record.name)
