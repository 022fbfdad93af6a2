"""Charts and tables of numbers, drawn with drawing.py.

    Chart           lines and dots in the units of two axes
    heatmap         a table of numbers as shades, with the numbers in it
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from retina.drawing import BODY, GRID, INK, PALE, PAPER, SMALL, boxed, brightness, column, grid, legend, padded, row, \
    shades, spots, stroke, text


def round_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers around low and high, at most so many steps: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    ends = ((m * power, math.floor(low / (m * power) + 1e-9), math.ceil(high / (m * power) - 1e-9))
            for m in (1, 2, 5, 10, 20))
    return next([k * step for k in range(first, last + 1)] for step, first, last in ends if last - first <= most)


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
    """An axis for all values that are numbers, or from `low` to `high`, with round numbers at its ends: none is cut."""
    known = [v for v in values if v is not None and math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known) if low is None else low, max(known) if high is None else high
    steps = round_steps(low, high if high > low else low + 1.0)
    return Axis(words, steps[0], steps[-1])


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

    def picture(self, keys: Sequence[tuple[str, Sequence[int], str]] = ()) -> Image.Image:
        """The chart with its title, its axes and, of `keys`, a legend; see drawing.legend."""
        left = [(self.place(self.x.low, v)[1], text(words, SMALL, PALE)) for v, words in self.y.marks()]
        below = [(self.place(v, self.y.low)[0], text(words, SMALL, PALE)) for v, words in self.x.marks()]
        margin = max([label.width for _, label in left], default=0)
        beyond = max([math.ceil(at + label.width / 2) - self.inside.width for at, label in below], default=0)
        framed = padded(self.inside, margin, 0, max(beyond, 0), 18 if below else 0)
        for at, label in left:
            framed.paste(label, (margin - label.width, round(at - label.height / 2)))
        for at, label in below:
            framed.paste(label, (max(0, round(margin + at - label.width / 2)), self.inside.height - 3))
        parts = [text(self.title, BODY, width=framed.width)]
        if self.y.words:
            parts.append(text(self.y.words, SMALL, PALE, framed.width))
        parts.append(framed)
        if self.x.words:
            words = text(self.x.words, SMALL, PALE, self.inside.width)
            parts.append(padded(boxed(words, self.inside.width, words.height), margin, 0, 0, 0))
        if keys:
            parts.append(legend(keys, framed.width))
        return column(parts, 2)


# ---- tables of numbers ----

def heatmap(values: np.ndarray, rows: Sequence[str], columns: Sequence[str],
            cells: Sequence[Sequence[str]] | None = None, cell: tuple[int, int] = (44, 26), title: str = "",
            words: str = "") -> Image.Image:
    """Amounts 0..1 (R, C) as shades, nan as grey; `cells` are written into them.

    A cell is at least as wide and high as `cell` says. `words` say what the columns are.
    """
    colours = shades(np.asarray(values, float)).tolist()  # R rows of C
    labels = [[text(label, SMALL, INK if brightness(colour) > 140 else PAPER, paper=colour, place=0.5)
               for label, colour in zip(*both)] for both in zip(cells or [[""] * len(columns)] * len(rows), colours)]
    names = [text(name, SMALL, PALE, 190) for name in rows]
    wide = max(cell[0], *(label.width + 6 for line in labels for label in line))
    heads = [text(name, SMALL, PALE, max(wide, 60)) for name in columns]
    wide, high = max(wide, *(head.width + 4 for head in heads)) - 1, max(cell[1], *(name.height for name in names)) - 1
    parts = []
    for name, *both in zip(names, labels, colours):
        parts += [name, row([boxed(label, wide, high, colour) for label, colour in zip(*both)], 1)]
    above = row([boxed(head, wide, head.height) for head in heads], 1, 1.0)
    table = column([above, grid(parts, 2, (6, 1), (1.0, 0.5))], 2, 1.0)
    over = [text(title, BODY, width=max(table.width, 240))] * bool(title) + \
        [padded(text(words, SMALL, PALE), table.width - above.width, 0, 0, 0)] * bool(words)
    return column([*over, table], 3)
