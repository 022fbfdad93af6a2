"""The words of all pictures, on Pillow's images.

    text                lines of words -> a picture just as large as they need, so that nothing is ever cut off
    grid, row, column   pictures beside and below each other
    captioned, titled   a picture with words
    legend, scale       what colours mean
    stroke, spots       lines and dots
    tinted, overlay     a photograph with its masks and points; words lie below it, never on the retina
"""

import bisect
import functools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from retina.datasets import records
from retina.datasets.preprocess import Sample


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


def coloured(things: Sequence[int]) -> dict[int, Sequence[int]]:
    """A colour for each thing, or, if there are more than COLOURS, for the first of them, so that one is left over."""
    few = things if len(things) <= len(COLOURS) else things[:len(COLOURS) - 1]
    return dict(zip(sorted(few), COLOURS))


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
    bare = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    known = bare and bare != letter and all(shape(c) != missing for c in bare)
    return bare if known else f"\\u{ord(letter):04x}"


def wrapped(line: str, width: float, size: int) -> Iterator[str]:
    """Parts of a line that are no wider than `width`, broken at spaces, or within a word that is wider itself."""
    def length(n):
        return font(size).getlength(line[:n])

    while length(None) > width and len(line) > 1:
        fits = max(1, bisect.bisect_right(range(len(line)), width, key=length) - 1)
        end = line.rfind(" ", 1, fits + 1)
        yield line[:fits if end < 0 else end]
        line = line[fits if end < 0 else end + 1:]
    yield line


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

def grid(pictures: Iterable[Image.Image], across: int, gap: tuple[int, int] = (12, 8),
         place: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Pictures in rows of `across`, with `gap` (between columns, between rows) pixels of white.

    A column is as wide as its widest picture, a row as high as its highest; there each lies at `place`, 0 at the left
    and top, 1 at the right and bottom.
    """
    pictures = list(pictures)
    across = min(across, len(pictures))
    wide = [max(p.width for p in pictures[k::across]) for k in range(across)]
    high = [max(p.height for p in pictures[k:k + across]) for k in range(0, len(pictures), across)]
    x, y = ([sum(sizes[:k]) + k * space for k in range(len(sizes) + 1)] for sizes, space in zip((wide, high), gap))
    whole = Image.new("RGB", (x[-1] - gap[0], y[-1] - gap[1]), PAPER)
    for k, picture in enumerate(pictures):
        i, j = divmod(k, across)
        whole.paste(picture, (x[j] + round(place[0] * (wide[j] - picture.width)),
                              y[i] + round(place[1] * (high[i] - picture.height))))
    return whole


def row(pictures: Sequence[Image.Image], gap: int = 12, place: float = 0.0) -> Image.Image:
    """Side by side, aligned at the top (`place` 0), in the middle, or at the bottom (1)."""
    return grid(pictures, len(pictures), (gap, 0), (0, place))


def column(pictures: Iterable[Image.Image], gap: int = 8, place: float = 0.0) -> Image.Image:
    """One below the other, aligned at the left (`place` 0), in the middle, or at the right (1)."""
    return grid(pictures, 1, (0, gap), (place, 0))


def padded(picture: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """With white around it."""
    return ImageOps.expand(picture, (left, top, right, bottom), PAPER)


def boxed(picture: Image.Image, width: int, height: int, paper: Sequence[int] = PAPER) -> Image.Image:
    """In the middle of a box."""
    box = Image.new("RGB", (width, height), tuple(paper))
    box.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return box


def captioned(picture: Image.Image, words: str, colour: Sequence[int] = INK) -> Image.Image:
    """With words below it, in lines that are no wider than it is."""
    return column([picture, text(words, SMALL, colour, picture.width)], 4)


def titled(title: str, picture: Image.Image, below: str = "") -> Image.Image:
    """A figure: its title, itself, and what is to be said of it."""
    wide = max(picture.width, 480)
    parts = [text(title, TITLE, width=wide), picture]
    if below:
        parts.append(text(below, SMALL, PALE, wide))
    return padded(column(parts, 12), 16, 14, 16, 14)


# ---- strokes ----

FINER = 4  # curves are drawn so many times larger, then reduced: Pillow's own have steps


def brushes(picture: Image.Image, colour: Sequence[int], border: float,
            over: Sequence[tuple[Sequence[int], float]] = ()) -> Iterator[tuple[ImageDraw.ImageDraw, float]]:
    """A pen for each layer of paint and how much wider it draws, on a canvas FINER times as large; painted is its 255.

    A bright colour has a dark border below it, or it would be lost on white; `over` it lie these colours.
    """
    for tone, wider in [*[(PALE, border)] * (brightness(colour) > 200), (colour, 0.0), *over]:
        mask = Image.new("L", (picture.width * FINER, picture.height * FINER))
        yield ImageDraw.Draw(mask), wider
        picture.paste(tuple(tone), (0, 0), mask.reduce(FINER))


def stroke(picture: Image.Image, points: Sequence[tuple[float, float]], colour: Sequence[int], width: float = 2.0,
           dashed: bool = False) -> None:
    """A line through points in pixels."""
    for pen, wider in brushes(picture, colour, 1.5):
        for piece in dashes(points) if dashed else [points]:
            pen.line([(x * FINER, y * FINER) for x, y in piece], 255, round((width + wider) * FINER), "curve")


def dashes(points: Sequence[tuple[float, float]], on: float = 6.0, off: float = 4.0) -> list[list]:
    """The parts of a line that a pen touches which is lifted again and again."""
    x, y = np.transpose(points)
    along = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())  # how far along the line each point lies
    pieces = []
    for begin in np.arange(0, along[-1] - 1e-9, on + off):
        end = min(begin + on, along[-1])
        at = [begin, *along[(begin < along) & (along < end)], end]
        pieces.append([*zip(np.interp(at, along, x), np.interp(at, along, y))])
    return pieces


def spots(picture: Image.Image, points: Iterable[tuple[float, float]], colour: Sequence[int], radius: float = 4.0,
          ring: bool = False) -> None:
    """Dots, or rings, around points in pixels."""
    points = list(points)
    for pen, wider in brushes(picture, colour, 0.8, [(PAPER, -0.45 * radius)] * ring):
        reach = radius + wider
        for x, y in points:
            pen.ellipse([v * FINER for v in (x - reach, y - reach, x + reach, y + reach)], 255)


# ---- legends ----

def key(colour: Sequence[int], how: str = "square", side: int = 14) -> Image.Image:
    """What stands for a colour in a legend: a square of `side` pixels, a line, a dashed line, a dot, a ring."""
    picture = Image.new("RGB", (26 if how in ("line", "dashed") else side, side), PAPER)
    if how == "square":
        ImageDraw.Draw(picture).rectangle((0, 0, side - 1, side - 1), tuple(colour), PALE)
    elif how in ("dot", "ring"):
        spots(picture, [(7, 7)], colour, 5, how == "ring")
    else:
        stroke(picture, [(0, 7), (26, 7)], colour, 2.4, how == "dashed")
    return picture


def flow(pictures: Iterable[Image.Image], width: float, gap: int) -> Image.Image:
    """Pictures as words in a paragraph: side by side, `gap` pixels apart, in lines of at most `width` pixels."""
    lines = [[]]
    for picture in pictures:
        if lines[-1] and sum(p.width + gap for p in lines[-1]) + picture.width > width:
            lines.append([])
        lines[-1].append(picture)
    return column([row(line, gap) for line in lines], 4)


def legend(entries: Iterable[tuple[str, Sequence[int], str]], width: float = math.inf,
           size: int = SMALL) -> Image.Image:
    """(words, colour, form of key) of each entry, beside each other in lines of at most `width` pixels."""
    return flow((row([key(colour, how, size + 1), text(words, size, width=width - 2 * size - 5)], 5, 0.5)
                 for words, colour, how in entries), width, round(1.4 * size))


def scale(low: str, high: str, words: str) -> Image.Image:
    """A legend of shades, from the words of the lowest to those of the highest; and what they are shades of."""
    bar = Image.fromarray(np.broadcast_to(shades(np.linspace(0, 1, 120)), (14, 120, 3)))
    return row([text(low, SMALL), bar, text(high, SMALL), text(words, SMALL)], 6, 0.5)


# ---- masks and points on photographs ----

LANDMARKS = "+ optic disc, x fovea"


def label_legend(masks: bool = True, points: bool = True) -> Image.Image:
    """The colours of lesions and optic disc; what stands for which point."""
    colours = legend((words, records.LESION_COLOURS[k], "square") for k, words in records.LESION_NAMES.items())
    return row([colours] * masks + [text(LANDMARKS, SMALL)] * points, 18, 0.5)


def found_legend(masks: Mapping[str, np.ndarray], retina: float, width: float, size: int = SMALL) -> Image.Image:
    """Of lesions and optic disc only what is there, with its area in percent of the retina, of so many pixels."""
    shares = {lesion: np.count_nonzero(mask) / retina for lesion, mask in masks.items()}
    entries = [(f"{records.LESION_NAMES[lesion]} " + ("< 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"),
                records.LESION_COLOURS[lesion], "square") for lesion, share in shares.items() if share]
    return legend(entries, width, size) if entries else text("nothing outlined", size, width=width)


def photograph(image: Tensor, side: int, resample: Image.Resampling = Image.LANCZOS) -> Image.Image:
    """(3, S, S) uint8 -> a picture of `side` pixels."""
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), resample)


def masks_of(sample: Sample) -> dict[str, np.ndarray]:
    """{lesion: (S, S) bool} of those that are known."""
    known = zip(records.LESION_NAMES, () if sample.masks is None else sample.masks)
    return {lesion: (mask == 1).numpy() for lesion, mask in known if (mask != records.UNKNOWN).all()}


def mark(pen: ImageDraw.ImageDraw, points: Sequence | None, reach: float) -> None:
    """Draw the disc's centre as + and the fovea's as x; points (2, 2), nan where not known, or None.

    `reach`: pixels to each side.
    """
    for (x, y), angle in zip(() if points is None else points, (0, math.pi / 4)):
        for colour, width in (("black", 0.55), ("white", 0.22)) if math.isfinite(x + y) else ():
            for turn in (angle, angle + math.pi / 2):
                dx, dy = reach * math.cos(turn), reach * math.sin(turn)
                pen.line((x - dx, y - dy, x + dx, y + dy), colour, max(1, round(width * reach)))


def tinted(image: Image.Image, masks: Mapping[str, np.ndarray], points: Sequence | None = None,
           canvas: tuple[int, int] | None = None) -> Image.Image:
    """A photograph with its lesions tinted and outlined, the optic disc outlined, points marked; see `mark`.

    masks {lesion: (H, W) bool}. With `canvas`, a width and height, it lies at the left and top of a larger picture.
    """
    (width, height), short = image.size, min(image.size)
    picture, s = image.crop((0, 0, *(canvas or image.size))), max(1, round(short / 700))  # s: width of an outline
    pen = ImageDraw.Draw(picture, "RGBA")
    for lesion, mask in masks.items():
        inside = np.flatnonzero(mask)  # numbers of pixels: the few of a mask are drawn one by one
        y, x = np.divmod(inside, width)
        inner = (x >= s) & (x < width - s) & (y >= s) & (y < height - s)  # less an outline on all sides
        for step in (-s * width, -s, s, s * width):
            inner &= mask.ravel().take(inside + step, mode="clip")
        at = np.stack([x, y], 1).astype(np.float32)
        if lesion != "OD":
            pen.point(at[inner], (*records.LESION_COLOURS[lesion], round(0.3 * 255)))
        pen.point(at[~inner], records.LESION_COLOURS[lesion])
    mark(pen, points, max(8, short / 60))
    return picture


def overlay(image: Image.Image, masks: Mapping[str, np.ndarray], points: Sequence | None, lines: Sequence[str],
            retina: float) -> Image.Image:
    """A photograph with its lesions shown and its landmarks marked; below it, in a strip, `lines` and what was found.

    `retina`: the share of the picture that shows it. The photograph keeps its place, from pixel (0, 0) on.
    """
    size = max(SMALL, round(min(image.size) / 45))
    width = image.width - size
    parts = [text("; ".join([*[LANDMARKS] * (points is not None), *lines]), size, width=width)]
    if masks:
        parts += [found_legend(masks, retina * image.width * image.height, width, size),
                  text("areas in percent of the retina", size, PALE, width)]
    strip = padded(column(parts, 4), *[size // 2] * 4)
    picture = tinted(image, masks, points, (max(image.width, strip.width), image.height + strip.height))
    picture.paste(PAPER, (0, image.height, *picture.size))
    picture.paste(strip, (0, image.height))
    return picture
