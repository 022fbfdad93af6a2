"""Words, legends and overlays on Pillow's images.

    text            lines of words -> a picture just as large as they need, so that nothing is ever cut off
    row, column     pictures beside and below each other
    legend, scale   what colours mean
    overlay         a photograph with its masks and points
"""

import functools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retina.datasets import records

INK, PALE, GRID, PAPER = (33, 37, 41), (95, 103, 112), (222, 226, 230), (255, 255, 255)
TITLE, BODY, SMALL = 20, 15, 13  # pixels
# for things without an order, eight that colour-blind people tell apart (Okabe & Ito 2008, "Color universal design")
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
           (0, 0, 0))
OTHERS = (198, 202, 206)  # grey, for what has no colour of its own; different from all of these and from paper
# for amounts: viridis, whose brightness rises evenly and which colour-blind people see so too (van der Walt & Smith
# 2015), at nine places
VIRIDIS = np.array([(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129),
                    (92, 200, 99), (170, 220, 50), (253, 231, 37)])


def shades(values: np.ndarray) -> np.ndarray:
    """Amounts 0..1 (...) -> colours (..., 3) uint8 of viridis; grey where nan."""
    at = np.clip(np.nan_to_num(values), 0, 1)
    colours = np.stack([np.interp(at, np.linspace(0, 1, len(VIRIDIS)), channel) for channel in VIRIDIS.T], -1)
    return np.where(np.isnan(values)[..., None], GRID, colours).round().astype(np.uint8)


def brightness(colour: Sequence[int]) -> float:
    """0 to 255 (ITU-R BT.601)."""
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


# ---- words ----

@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


@functools.cache
def legible(letter: str) -> str:
    """A letter as the font has it: without its accents where it lacks those, else by its number."""
    def shape(x):
        return font(BODY).getmask(x).size, bytes(font(BODY).getmask(x))

    missing = shape("\uffff")
    if letter.isspace() or shape(letter) != missing:
        return letter
    plain = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    known = plain and plain != letter and all(shape(c) != missing for c in plain)
    return plain if known else f"\\u{ord(letter):04x}"


def wrapped(line: str, width: float, size: int) -> Iterator[str]:
    """Parts of a line that are no wider than `width`, broken at spaces, or within a word that is wider itself."""
    part = ""
    for word in line.split(" "):
        longer = f"{part} {word}" if part else word
        if font(size).getlength(longer) <= width:
            part = longer
            continue
        if part:
            yield part
        while font(size).getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font(size).getlength(word[:n]) <= width)
            yield word[:fits]
            word = word[fits:]
        part = word
    yield part


def text(words: str, size: int = BODY, colour: Sequence[int] = INK, width: float = math.inf,
         paper: Sequence[int] = PAPER, place: float = 0.0) -> Image.Image:
    """Words, in lines of at most `width` pixels; shorter lines at the left (`place` 0) or in the middle (0.5)."""
    words = "".join(map(legible, words))
    lines = [part for line in words.split("\n") for part in wrapped(line, width, size)]
    high = round(1.35 * size)
    lengths = [math.ceil(font(size).getlength(line)) for line in lines]
    picture = Image.new("RGB", (max(lengths) + 2, high * len(lines)), tuple(paper))
    pen = ImageDraw.Draw(picture)
    for k, (line, length) in enumerate(zip(lines, lengths)):
        pen.text((1 + round(place * (max(lengths) - length)), k * high), line, tuple(colour), font(size))
    return picture


# ---- pictures beside each other ----

def joined(pictures: Sequence[Image.Image], gap: int, across: int, place: float) -> Image.Image:
    """Along one axis; across the other each lies at `place`, 0 at its beginning, 1 at its end."""
    sizes = np.array([p.size for p in pictures])
    along = 1 - across
    size = np.zeros(2, int)
    size[along], size[across] = sizes[:, along].sum() + gap * (len(pictures) - 1), sizes[:, across].max()
    whole, at = Image.new("RGB", tuple(size.tolist()), PAPER), 0
    for picture in pictures:
        corner = [0, 0]
        corner[along], corner[across] = at, round(place * (int(size[across]) - picture.size[across]))
        whole.paste(picture, tuple(corner))
        at += picture.size[along] + gap
    return whole


def row(pictures: Iterable[Image.Image], gap: int = 12, place: float = 0.0) -> Image.Image:
    """Side by side, aligned at the top (`place` 0), in the middle, or at the bottom (1)."""
    return joined(list(pictures), gap, 1, place)


def column(pictures: Iterable[Image.Image], gap: int = 8, place: float = 0.0) -> Image.Image:
    """One below the other, aligned at the left (`place` 0), in the middle, or at the right (1)."""
    return joined(list(pictures), gap, 0, place)


def padded(picture: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """With white around it."""
    whole = Image.new("RGB", (picture.width + left + right, picture.height + top + bottom), PAPER)
    whole.paste(picture, (left, top))
    return whole


def titled(title: str, picture: Image.Image, below: str = "", gap: int = 12) -> Image.Image:
    """A figure: its title, itself, and what is to be said of it."""
    wide = max(picture.width, 480)
    parts = [text(title, TITLE, width=wide), picture]
    if below:
        parts.append(text(below, SMALL, PALE, wide))
    return padded(column(parts, gap), 16, 14, 16, 14)


# ---- legends ----

def key(colour: Sequence[int], how: str = "square") -> Image.Image:
    """What stands for a colour in a legend: a square, a line, a dashed line, a dot, a ring."""
    picture = Image.new("RGB", (26 if how in ("line", "dashed") else 14, 14), PAPER)
    if how == "square":
        ImageDraw.Draw(picture).rectangle((0, 0, 13, 13), tuple(colour), PALE)
    elif how in ("dot", "ring"):
        spots(picture, [(7, 7)], colour, 5, how == "ring")
    else:
        stroke(picture, [(0, 7), (26, 7)], colour, 2.4, how == "dashed")
    return picture


def legend(entries: Iterable[tuple[str, Sequence[int], str]], width: float = math.inf) -> Image.Image:
    """(words, colour, kind of key) of each entry, beside each other in lines of at most `width` pixels."""
    lines, used = [[]], 0.0
    for words, colour, how in entries:
        entry = row([padded(key(colour, how), 0, 2, 0, 2), text(words, SMALL)], 5, 0.5)
        if lines[-1] and used + entry.width + 18 > width:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += entry.width + 18
    return column([row(line, 18) for line in lines], 4)


def scale(low: str, high: str, words: str = "") -> Image.Image:
    """A legend of shades, from the words of the lowest to those of the highest."""
    bar = Image.fromarray(np.broadcast_to(shades(np.linspace(0, 1, 120)), (14, 120, 3)))
    parts = [text(low, SMALL), padded(bar, 0, 2, 0, 2), text(high, SMALL)]
    return row([*parts, text(words, SMALL)] if words else parts, 6, 0.5)


# ---- strokes ----

FINER = 4  # curves are drawn so many times larger, then reduced: Pillow's own have steps


def blended(picture: Image.Image, colour: Sequence[int], draw) -> None:
    """Paint where draw(pen, FINER) draws on a canvas FINER times as large."""
    mask = Image.new("L", (picture.width * FINER, picture.height * FINER))
    draw(ImageDraw.Draw(mask), FINER)
    picture.paste(tuple(colour), (0, 0), mask.reduce(FINER))


def stroke(picture: Image.Image, points: Sequence[tuple[float, float]], colour: Sequence[int], width: float = 2.0,
           dashed: bool = False) -> None:
    """A line through points in pixels; a bright one has a dark border, or it would be lost on white."""
    pieces = dashes(points) if dashed else [points]

    def draw(pen, zoom, width=width):
        for piece in pieces:
            pen.line([(x * zoom, y * zoom) for x, y in piece], 255, round(width * zoom), "curve")
    if brightness(colour) > 200:
        blended(picture, PALE, functools.partial(draw, width=width + 1.5))
    blended(picture, colour, draw)


def dashes(points: Sequence[tuple[float, float]], on: float = 6.0, off: float = 4.0) -> list[list]:
    """The parts of a line that a pen touches which is lifted again and again."""
    pieces, at = [], 0.0  # at: how far along the line
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        length = math.hypot(x1 - x0, y1 - y0)
        begin = at
        while at < begin + length - 1e-9:
            inside = at % (on + off)
            end = min(at + (on - inside if inside < on else on + off - inside) + 1e-6, begin + length)
            if inside < on:
                ends = [((v - begin) / length) for v in (at, end)]
                pieces.append([(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in ends])
            at = end
    return pieces


def spots(picture: Image.Image, points: Iterable[tuple[float, float]], colour: Sequence[int], radius: float = 4.0,
          ring: bool = False) -> None:
    """Dots, or rings, around points in pixels."""
    points = list(points)

    def draw(pen, zoom, radius=radius):
        for x, y in points:
            pen.ellipse([v * zoom for v in (x - radius, y - radius, x + radius, y + radius)], 255)
    if brightness(colour) > 200:
        blended(picture, PALE, functools.partial(draw, radius=radius + 0.8))
    blended(picture, colour, draw)
    if ring:
        blended(picture, PAPER, functools.partial(draw, radius=0.55 * radius))


def mark(pen: ImageDraw.ImageDraw, points: Iterable[tuple[float, float]], reach: float) -> None:
    """Draw the disc's centre as + and the fovea's as x, strokes `reach` pixels long to each side."""
    for (x, y), angle in zip(points, (0, math.pi / 4)):
        for colour, width in (("black", 0.55), ("white", 0.22)):
            for turn in (angle, angle + math.pi / 2):
                dx, dy = reach * math.cos(turn), reach * math.sin(turn)
                pen.line((x - dx, y - dy, x + dx, y + dy), colour, max(1, round(width * reach)))


# ---- masks and points on photographs ----

def tinted(image: Image.Image, masks: Mapping[str, np.ndarray]) -> Image.Image:
    """A photograph with its lesions tinted and outlined, the optic disc outlined; masks {kind: (H, W) bool}."""
    pixels, stroke = np.array(image), max(1, round(min(image.size) / 700))
    flat = pixels.reshape(-1, 3)  # numbers of pixels find the few of a mask faster than truth values do
    for kind, mask in masks.items():
        inner = np.zeros_like(mask)  # less a stroke on all sides
        s, middle = stroke, slice(stroke, -stroke)
        inner[middle, middle] = mask[middle, middle] & mask[:-2 * s, middle] & mask[2 * s:, middle] & \
            mask[middle, :-2 * s] & mask[middle, 2 * s:]
        colour = np.array(records.COLOURS[kind], np.float32)
        if kind != "OD":
            inside = np.flatnonzero(inner)
            flat[inside] = (0.7 * flat[inside] + 0.3 * colour).astype(np.uint8)
        flat[np.flatnonzero(mask & ~inner)] = colour
    return Image.fromarray(pixels)


def overlay(image: Image.Image, masks: Mapping[str, np.ndarray], points: Sequence | None,
            lines: Sequence[str]) -> Image.Image:
    """A photograph with its lesions shown, its landmarks marked and a legend in its corner."""
    picture = tinted(image, masks)
    pen, height = ImageDraw.Draw(picture), max(9, round(min(image.size) / 45))
    if points is not None:
        mark(pen, points, min(image.size) / 60)
        lines = [*lines, "+ optic disc, x fovea"]
    legend = [(line, "white") for line in lines] + [(f"{k} {records.KINDS[k]}", records.COLOURS[k]) for k in masks]
    if 2.6 * height * len(legend) > picture.height:  # it would hide what there is to see
        legend = legend[:1]
    for k, (line, colour) in enumerate(legend):
        pen.text((height // 2, round((0.5 + 1.3 * k) * height)), line, colour, ImageFont.load_default(height),
                 stroke_width=max(1, height // 10), stroke_fill="black")
    return picture
