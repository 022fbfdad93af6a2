"""What a photograph looks like in numbers, against values worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from retina.datasets import cache, preprocess, quality
from retina.datasets.records import Record


S = quality.QUALITY_SIDE
LIT = np.ones((S, S), bool)


def test_one_colour_has_no_structure():
    plain = np.broadcast_to(np.uint8([180, 90, 30]), (S, S, 3))
    brightness, redness, structure, sharpness = quality.measure_quality(plain, LIT)
    assert (brightness, redness) == (180, 2) and structure == pytest.approx(0, abs=1e-5)
    assert quality.measure_quality(plain, ~LIT) == (0, 0, 0, 0)


def test_stripes_are_measured_as_calculus_says():
    """A sine of one wave in 16 pixels: a Gaussian blur of s pixels leaves exp(-2 (pi s / 16)^2) of it."""
    wave = 100 + 80 * np.sin(2 * np.pi * np.arange(S) / 16)
    pixels = np.broadcast_to(wave.round().astype(np.uint8)[:, None, None], (S, S, 3))
    fine, middle, coarse = (math.exp(-2 * (math.pi * s / 16) ** 2) for s in (1, 2.5, 6))
    _, redness, structure, sharpness = quality.measure_quality(pixels, LIT)
    assert redness == pytest.approx(1) and structure == pytest.approx(
        0.8 / math.sqrt(2) * (middle - coarse), rel=0.02)
    assert sharpness == pytest.approx((fine - middle) / (middle - coarse), rel=0.02)


def test_a_few_odd_photographs_are_not_remembered():
    """Of 100 two are left out, of fewer one, and of less than five nothing is known."""
    rows = np.arange(100.0)[:, None] * np.ones(len(quality.MEASURES))
    assert quality.lowest_seen(rows[::-1]) == dict.fromkeys(quality.MEASURES, 2.0)
    assert quality.lowest_seen(rows[:34]) == quality.lowest_seen(rows[:5]) == dict.fromkeys(quality.MEASURES, 1.0)
    assert quality.lowest_seen(rows[:4]) == quality.lowest_seen([]) == {}


@pytest.mark.parametrize("round_field", [True, False])
def test_the_cache_keeps_it_with_and_without_a_field_of_view(tmp_path, round_field):
    y, x = np.mgrid[:200, :240] - 100
    noise = np.random.default_rng(0).integers(0, 60, (200, 240, 1))
    pixels = (np.uint8([150, 80, 40]) + noise) * ((np.hypot(x - 20, y) < 95) | (not round_field))[..., None]
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    record = Record("a", tmp_path / "a.png")
    path, = cache.ensure_cached([record], 64)
    field, side, brightness, redness, *_ = cache.cached_arrays(record, path, 64, "quality")[0]
    assert field == round_field and side == (pytest.approx(190, abs=3) if round_field else 200)
    assert brightness == pytest.approx(180, abs=3) and redness == pytest.approx(180 / 110, abs=0.05)
    assert "quality" not in preprocess.preprocess(record, 64, image_only=True)
