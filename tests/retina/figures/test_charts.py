"""What figures are drawn with: nothing cut off, everything where it should be."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from retina import drawing
from retina.datasets import records
from retina.figures import charts
from retina.figures.charts import Axis, Chart


def ink(picture: Image.Image, paper=drawing.PAPER) -> int:
    """How many pixels are not paper."""
    return int((np.asarray(picture) != paper).any(2).sum())


# ---- words ----

@pytest.mark.parametrize("words", ["gjpqy|", "WWW", "Ag\nyj_", "a", "f", "(p 0.71), 100 %"])
@pytest.mark.parametrize("size", [drawing.SMALL, drawing.BODY, drawing.TITLE])
def test_text_is_never_cut_off(words, size):
    """As much ink as on a sheet with room to spare."""
    lines = words.split("\n")
    sheet = Image.new("RGB", (1000, 200), drawing.PAPER)
    for k, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((300, 50 + k * round(1.35 * size)), line, drawing.INK, drawing.font(size))
    assert ink(drawing.text(words, size)) == ink(sheet) > 0


def test_lines_are_broken_at_spaces_and_long_words_within():
    words = "one two three " + 60 * "m" + " four"
    lines = list(drawing.wrapped(words, 120, 15))
    assert "".join(lines).replace(" ", "") == words.replace(" ", "") and len(lines) > 3 and lines[0] == "one two three"
    assert max(drawing.font(15).getlength(line) for line in lines) <= 120
    assert list(drawing.wrapped("", 10, 15)) == [""] and "".join(drawing.wrapped("mmm", 1, 15)) == "mmm"
    assert drawing.text(words, 15, width=120).width <= 123


@pytest.mark.parametrize("words", ["Größe é", "病変", "健康", "plain, 0.5 %"])
def test_letters_that_the_font_lacks_are_told_apart(words, monkeypatch):
    """No drawn letter is the box that stands for any letter that is missing."""
    drawn = []
    whole = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, at, text, *rest: drawn.append(text) or whole(
        pen, at, text, *rest))
    drawing.text(words)
    box = bytes(drawing.font(15).getmask("\uffff"))
    assert not any(bytes(drawing.font(15).getmask(c)) == box for c in drawn[0] if c != " ")
    assert len(set(drawn[0])) >= len(set(words)) - 1 and drawn[0].isascii()


def test_lines_in_the_middle():
    left, middle = (np.asarray(drawing.text("mmmmmm\nm", place=place)) for place in (0.0, 0.5))
    first = [np.flatnonzero((x[20:] != 255).any((0, 2)))[0] for x in (left, middle)]
    assert first[1] - first[0] == pytest.approx(drawing.font(15).getlength("mmmmm") / 2, abs=2)


# ---- pictures beside each other ----

def test_rows_and_columns_hold_all_of_their_pictures():
    pictures = [Image.new("RGB", size, colour) for size, colour in (((30, 10), "red"), ((5, 40), "green"),
                                                                    ((20, 20), "blue"))]
    area = sum(p.width * p.height for p in pictures)
    for place in (0.0, 0.5, 1.0):
        row, column = drawing.row(pictures, 7, place), drawing.column(pictures, 3, place)
        assert row.size == (55 + 14, 40) and column.size == (30, 70 + 6) and ink(row) == ink(column) == area
    assert drawing.row(pictures, 7, 1.0).getpixel((0, 39)) == (255, 0, 0)
    assert drawing.row(pictures, 7, 0.0).getpixel((0, 0)) == (255, 0, 0)
    assert drawing.padded(pictures[0], 1, 2, 3, 4).size == (34, 16)


def test_a_grid_is_as_wide_and_high_as_its_largest_pictures():
    """Three in rows of two: columns 30 and 5 wide, rows 40 and 20 high; the last row is not full."""
    pictures = [Image.new("RGB", size, colour) for size, colour in (((30, 10), "red"), ((5, 40), "green"),
                                                                    ((20, 20), "blue"))]
    grid = drawing.grid(pictures, 2, (7, 3), (1.0, 0.5))
    assert grid.size == (30 + 7 + 5, 40 + 3 + 20) and ink(grid) == 300 + 200 + 400
    for picture, (x, y) in zip(pictures, ((0, 15), (37, 0), (10, 43))):
        assert np.array_equal(grid.crop((x, y, x + picture.width, y + picture.height)), picture)
    assert drawing.grid(pictures, 9, (7, 3)).size == drawing.row(pictures, 7).size


def test_a_legend_breaks_its_lines():
    entries = [(f"entry {k}", drawing.COLOURS[k], how) for k, how in enumerate(
        ("square", "line", "dashed", "dot", "ring"))]
    wide, narrow = drawing.legend(entries), drawing.legend(entries, 200)
    assert narrow.width <= 200 < wide.width and narrow.height > wide.height and ink(narrow) == ink(wide)


# ---- overlays ----

@pytest.fixture
def masks() -> dict[str, np.ndarray]:
    """Of a picture of 400 x 300 pixels: 240 pixels of haemorrhages, 6 of microaneurysms, no exudates."""
    masks = {lesion: np.zeros((300, 400), bool) for lesion in records.LESION_NAMES}
    masks["HE"][100:110, 50:74], masks["MA"][5, 20:26] = True, True
    return masks


def test_a_legend_lists_what_was_found_with_its_area(masks, monkeypatch):
    listed = []
    monkeypatch.setattr(drawing, "legend", lambda entries, *rest: listed.extend(entries) or Image.new("RGB", (1, 1)))
    drawing.found_legend(masks, 59_999, 300)
    assert listed == [("microaneurysms 0.01 %", records.LESION_COLOURS["MA"], "square"),
                      ("haemorrhages 0.40 %", records.LESION_COLOURS["HE"], "square")]
    listed.clear()
    drawing.found_legend(masks, 120_000, 300)
    assert [words for words, *_ in listed] == ["microaneurysms < 0.01 %", "haemorrhages 0.20 %"]
    listed.clear()
    assert ink(drawing.found_legend({"EX": masks["EX"]}, 120_000, 300)) > 100 and not listed  # nothing outlined


@pytest.mark.parametrize("side", [(400, 300), (90, 60), (2000, 1500)])
def test_words_do_not_lie_on_the_photograph(side, masks):
    """Above the strip there are the same pixels whatever is said, those of lesions and marks apart from it."""
    image = Image.effect_noise(side, 60).convert("RGB")
    masks = {k: np.asarray(Image.fromarray(m).resize(side, Image.NEAREST)) for k, m in masks.items()}
    picture = drawing.overlay(image, masks, [(30, 30), (60, 40)], 4 * ["retinopathy grade 2 (p 0.71)"], 0.5)
    above = np.asarray(picture)[:side[1]]
    assert picture.width == side[0] and np.array_equal(above, drawing.tinted(image, masks, [(30, 30), (60, 40)]))
    strip = picture.crop((0, side[1], *picture.size))
    assert strip.height > 40 and ink(strip) > 500


# ---- charts ----

def test_dashes_touch_six_of_ten_pixels():
    pieces = drawing.dashes([(0, 0), (30, 40), (30, 90)])  # 100 long, with a corner
    length = sum(math.hypot(b[0] - a[0], b[1] - a[1]) for a, b in pieces)
    assert length == pytest.approx(60, abs=0.1) and len(pieces) == 10  # the corner, at 50, lies between two
    assert pieces[0][0] == (0, 0) and pieces[-1][0] == pytest.approx((30, 80), abs=0.1)


@pytest.mark.parametrize("low,high", [(0, 1), (1, 40), (-0.13, 0.9), (0, 1e-4), (1000, 98000), (3, 3.1)])
def test_round_steps(low, high):
    steps = charts.round_steps(low, high)
    gap = steps[1] - steps[0]
    assert 3 <= len(steps) <= 7 and f"{gap:.0e}"[0] in "125"
    axis = charts.axis_of("", [low, high])
    assert (axis.low, axis.high) == (steps[0], steps[-1]) and [v for v, _ in axis.marks()] == pytest.approx(steps)
    assert low - gap < steps[0] <= low + 1e-9 * gap and high - 1e-6 * gap <= steps[-1] < high + gap
    assert np.allclose(np.diff(steps), gap)


def test_a_line_goes_through_its_points_and_leaves_out_what_is_no_number():
    chart = Chart("", Axis("", 0, 10, ()), Axis("", 0, 1, ()), 100, 50)
    blank = chart.inside.copy()
    chart.line([0, 5, 10], [0, 0.5, 1], (255, 0, 0), 4)
    for x, y in ((1, 0.1), (2.5, 0.25), (9, 0.9)):
        at = tuple(map(round, chart.place(x, y)))
        assert at == (8 + 10 * x, round(8 + 50 - 50 * y))
        red, green, _ = chart.inside.getpixel(at)
        assert red > 250 and green < 5
    chart.inside = blank.copy()
    chart.line([0, 5, math.nan, 5], [None, math.nan, 1, math.inf], (255, 0, 0))
    chart.dots([], [], (255, 0, 0))
    assert np.array_equal(chart.inside, blank)
    chart.dots([10], [1], (255, 0, 0), 5)  # in the corner, yet whole
    assert ink_of_red(chart.inside) == pytest.approx(math.pi * 25, rel=0.1)
    assert ink_of_red(chart.picture()) == ink_of_red(chart.inside)


def ink_of_red(picture: Image.Image) -> float:
    """Area that is red, partly red pixels counted in part."""
    pixels = np.asarray(picture).astype(float)
    return float(((pixels[..., 0] - pixels[..., 1]) / 255).clip(0).sum())


def test_axes():
    axis = charts.axis_of("", [None, math.nan, 3, 5], low=0.0)
    assert (axis.low, axis.high) == (0.0, 5) and axis.marks()[1] == (1.0, "1")
    assert charts.axis_of("", [2, 2]).high == 3 and charts.axis_of("", []).high == 1
    assert Axis("", 0, 1, ((0.5, "half"),)).marks() == [(0.5, "half")]


def test_a_heatmap_has_its_shades_where_they_belong():
    values = np.array([[0.0, 0.5], [1.0, math.nan], [0.25, 2.0]])
    picture = charts.heatmap(values, ["a", "b", "c"], ["x", "y"], [["0", "", ], ["1\n2", ""], ["", ""]], (70, 50))
    size = np.array(picture.size)
    for i, k in itertools.product(range(3), range(2)):
        corner = size - (70 * (2 - k), 50 * (3 - i)) + 3  # counted from the lower right
        assert picture.getpixel(tuple(corner.tolist())) == tuple(drawing.shades(values[i, k]).tolist())
    assert picture.getpixel((picture.width - 68, picture.height - 98)) == drawing.GRID  # nan


# ---- colours ----

def test_the_first_things_have_colours_of_their_own():
    assert drawing.coloured([2, 0]) == {0: drawing.COLOURS[0], 2: drawing.COLOURS[1]}
    few, many = drawing.coloured(range(8)), drawing.coloured([9, *range(8)])
    assert list(few) == list(range(8)) and list(many) == [*range(6), 9] and many[9] == drawing.COLOURS[6]


def test_amounts_get_brighter():
    bright = [drawing.brightness(c) for c in drawing.shades(np.linspace(0, 1, 30))]
    assert np.diff(bright).min() > 0 and bright[-1] - bright[0] > 150
    assert drawing.shades(np.array([-1, 0, 1, 9])).tolist() == [[68, 1, 84]] * 2 + [[253, 231, 37]] * 2


# what red, green and blue light look like without one kind of cone (Machado et al. 2009, IEEE TVCG 15:1291, severity 1)
WITHOUT_L = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
WITHOUT_M = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


# the default of a well-known library, which does not do so
TAB10 = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194),
         (127, 127, 127))


@pytest.mark.parametrize("eye", [np.eye(3), np.array(WITHOUT_L), np.array(WITHOUT_M)], ids=["all", "no L", "no M"])
def test_colours_differ_for_everyone(eye):
    """In CIE Lab, where a difference of 2.3 is just noticed (Sharma 2003)."""
    def lab(colours):
        linear = np.where((c := np.array(colours) / 255) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        xyz = (linear @ eye.T).clip(0, 1) @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                                                      [0.0193, 0.1192, 0.9505]]).T / (0.9505, 1, 1.089)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)

    grades = drawing.shades(np.linspace(0, 0.97, 5)).tolist()
    ours, greys, grades, others = (min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab(colours), 2))
                                   for colours in (drawing.COLOURS, (*drawing.COLOURS, drawing.OTHERS, drawing.PALE,
                                                                     drawing.PAPER), grades, TAB10))
    assert min(ours, greys, grades) > 15 and (others > 15) == np.array_equal(eye, np.eye(3))
