"""What figures are drawn with: text, charts, heatmaps and legends on Pillow's images.

    text            lines of words -> a picture just as large as they need, so that nothing is ever cut off
    row, column     pictures beside and below each other
    Chart           lines and dots in the units of two axes
    heatmap         a table of numbers as shades, with the numbers in it
    legend, scale   what colours mean

Imports nothing of ours.
"""

import functools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


# ---- charts ----

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


def round_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most so many: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Axis:
    """What one direction of a chart measures."""
    words: str
    low: float
    high: float
    steps: tuple[tuple[float, str], ...] | None = None  # what is written at which number; None: round numbers

    def marks(self) -> list[tuple[float, str]]:
        """Numbers and what is written at them."""
        return list(self.steps) if self.steps is not None else \
            [(v, f"{round(v, 9):g}") for v in round_steps(self.low, self.high)]

    def share(self, value: float) -> float:
        """How far between low and high."""
        return (value - self.low) / (self.high - self.low)


def axis_of(words: str, values: Iterable[float], low: float | None = None, high: float | None = None) -> Axis:
    """An axis that has room for all values that are numbers, from `low` to `high` where these are given."""
    known = [v for v in values if v is not None and math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known) if low is None else low, max(known) if high is None else high
    return Axis(words, low, high if high > low else low + 1.0)


class Chart:
    """Lines and dots in the units of two axes; `picture` adds the axes. Values that are no numbers are left out.

    The y axis is named above the chart, where its words need not be turned.
    """
    AROUND = 8  # pixels outside of the axes in which dots have room

    def __init__(self, title: str, x: Axis, y: Axis, width: int = 380, height: int = 240):
        self.title, self.x, self.y, self.width, self.height = title, x, y, width, height
        self.inside = Image.new("RGB", (width + 2 * self.AROUND, height + 2 * self.AROUND), PAPER)
        pen = ImageDraw.Draw(self.inside)
        for value, _ in x.marks():
            pen.line([self.place(value, end) for end in (y.low, y.high)], GRID)
        for value, _ in y.marks():
            pen.line([self.place(end, value) for end in (x.low, x.high)], GRID)
        pen.line([self.place(*corner) for corner in ((x.low, y.high), (x.low, y.low), (x.high, y.low))], PALE)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        return self.AROUND + self.x.share(x) * self.width, self.AROUND + (1 - self.y.share(y)) * self.height

    def known(self, xs: Iterable[float], ys: Iterable[float]) -> list[tuple[float, float]]:
        """Pixels of all points whose coordinates are numbers."""
        return [self.place(x, y) for x, y in zip(xs, ys) if None not in (x, y) and math.isfinite(x + y)]

    def line(self, xs: Iterable[float], ys: Iterable[float], colour: Sequence[int], width: float = 2.0,
             dashed: bool = False) -> None:
        """A line through points; one alone is a dot."""
        points = self.known(xs, ys)
        if len(points) == 1:
            spots(self.inside, points, colour, 2.5)
        elif points:
            stroke(self.inside, points, colour, width, dashed)

    def dots(self, xs: Iterable[float], ys: Iterable[float], colour: Sequence[int], radius: float = 4.0,
             ring: bool = False) -> None:
        """Dots, or rings."""
        spots(self.inside, self.known(xs, ys), colour, radius, ring)

    def picture(self) -> Image.Image:
        """The chart with its title and axes."""
        left = [(self.place(self.x.low, v)[1], text(words, SMALL, PALE)) for v, words in self.y.marks()]
        below = [(self.place(v, self.y.low)[0], text(words, SMALL, PALE)) for v, words in self.x.marks()]
        margin = max([label.width for _, label in left], default=0)
        beyond = max([math.ceil(at + label.width / 2) - self.inside.width for at, label in below], default=0)
        framed = padded(self.inside, margin, 0, max(beyond, 0), 18 if below else 0)
        for at, label in left:
            framed.paste(label, (margin - label.width, round(at - label.height / 2)))
        for at, label in below:
            framed.paste(label, (max(0, round(margin + at - label.width / 2)), self.inside.height - 3))
        parts = [text(self.title, BODY, width=framed.width), framed]
        if self.y.words:
            parts.insert(1, text(self.y.words, SMALL, PALE, framed.width))
        if self.x.words:
            words = text(self.x.words, SMALL, PALE, self.inside.width)
            parts.append(padded(words, margin + (self.inside.width - words.width) // 2, 0, 0, 0))
        return column(parts, 2)


# ---- tables of numbers ----

def heatmap(values: np.ndarray, rows: Sequence[str], columns: Sequence[str],
            cells: Sequence[Sequence[str]] | None = None, cell: tuple[int, int] = (44, 26), most: float = 1.0,
            title: str = "", words: str = "") -> Image.Image:
    """Amounts (R, C) from 0 to `most` as shades, nan as grey; `cells` are written into them.

    A cell is at least as wide and high as `cell` says. `words` say what the columns are.
    """
    colours = shades(np.asarray(values, float) / (most or 1.0))
    wide, high = cell
    if cells is not None:
        wide = max(wide, 8 + max(math.ceil(font(SMALL).getlength(line)) for r in cells for c in r
                                 for line in c.split("\n")))
    heads = [text(name, SMALL, PALE, max(wide, 60)) for name in columns]
    wide = max([wide, *(head.width + 4 for head in heads)])
    names = [text(name, SMALL, PALE, 190) for name in rows]
    high = max([high, *(name.height for name in names)])
    left, above = max([name.width for name in names], default=0) + 6, max(head.height for head in heads) + 2
    picture = Image.new("RGB", (left + wide * len(columns), above + high * len(rows)), PAPER)
    pen = ImageDraw.Draw(picture)
    for k, head in enumerate(heads):
        picture.paste(head, (left + k * wide + (wide - head.width) // 2, above - 2 - head.height))
    for i, name in enumerate(names):
        y = above + i * high
        picture.paste(name, (left - 6 - name.width, y + (high - name.height) // 2))
        for k in range(len(columns)):
            x, colour = left + k * wide, colours[i, k].tolist()
            pen.rectangle((x, y, x + wide - 2, y + high - 2), tuple(colour))
            if cells is not None and cells[i][k]:
                label = text(cells[i][k], SMALL, INK if brightness(colour) > 140 else PAPER, paper=colour, place=0.5)
                picture.paste(label, (x + (wide - 1 - label.width) // 2, y + (high - 1 - label.height) // 2))
    parts = [text(title, BODY, width=max(picture.width, 240))] if title else []
    parts += [padded(text(words, SMALL, PALE), left, 0, 0, 0)] if words else []
    return column([*parts, picture], 3)
