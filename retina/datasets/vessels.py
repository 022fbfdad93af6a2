"""Photographs of one eye are known by their vessels, whatever light and view.

Each photograph is compared in full with the few whose spectrum is most like its own: the size of a Fourier coefficient
does not change when a picture is shifted. Normalised correlation by Fourier transform: Lewis 1995, "Fast normalized
cross-correlation".
"""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


# V side of a vessel map, n photographs, D numbers that describe one, p pairs

VESSEL_SIDE = 108  # pixels of a vessel map
# Shorter side of a field of view in pixels, as decoded. Of IDRiD's photographs reduced to fields of 80 x 67, those of
# one eye reach 0.46, all others at most 0.40, even as JPEG of quality 85. At 56 x 47 both are mixed, at 28 x 23 false
# pairs are found.
SMALLEST_FIELD = 66
REACH = 0.2  # largest shift between two photographs of one eye, as share of the side
COARSE_VIEWS = tuple(itertools.product((-12, -6, 0, 6, 12), (0.93, 1.0, 1.07)))  # degrees, zoom
FINE_VIEWS = tuple(itertools.product(range(-12, 13, 3), (0.92, 0.96, 1.0, 1.04, 1.08)))
PERIODS = 16  # a map is described by its waves of up to so many periods in a side
NEAREST = 8  # so many earlier photographs, those described most alike, each is compared with
SCREENING_SCORE = 0.33  # pairs whose reduced maps score less are not compared again in full
BLOCK = 64  # photographs or pairs at a time: what is in work stays in the processor's cache, and memory small


# ---- vessels of one photograph ----

@functools.cache
def low_pass(side: int, sigma: float) -> np.ndarray:
    """Transfer function (side, side / 2 + 1) of a Gaussian blur of `sigma` pixels."""
    square = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.rfftfreq(side) ** 2
    return np.exp(-2 * (math.pi * sigma) ** 2 * square)


@functools.cache
def line_filters(side: int, number: int = 12, sigma: float = 1.6, length: float = 5.0) -> np.ndarray:
    """Transfer functions (2, number, side, side / 2 + 1) of detectors of dark half lines at `number` angles.

    Across the line the second derivative of a Gaussian, along it one half of a Gaussian of `length`; the second of
    the pair looks the opposite way.
    """
    y, x = np.fft.fftfreq(side, 1 / side)[:, None], np.fft.fftfreq(side, 1 / side)
    kernels = []
    for angle in np.pi * np.arange(2 * number) / number:
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        kernel = (1 - (v / sigma) ** 2) * np.exp(-v ** 2 / (2 * sigma ** 2) - u ** 2 / (2 * length ** 2))
        kernel *= np.clip((u + 1) / 2, 0, 1)
        kernel -= kernel.mean()
        kernels.append(np.fft.rfft2(kernel / np.linalg.norm(kernel)))
    return np.stack(kernels).astype(np.complex64).reshape(2, number, side, side // 2 + 1)


def vessel_map(picture: np.ndarray) -> np.ndarray:
    """Where dark lines are: square retina (2 V, 2 V, 3) uint8 -> (V, V) uint8; 0 outside the retina, else 1..255.

    A vessel goes on in both directions: the weaker half line counts, so that spots of dust are none. Of the responses
    of all angles the best counts, less their mean: a lesion responds to every angle alike, a vessel to one. The rim of
    the field, where the camera's border would look like a line, is left out.
    """
    side = len(picture)
    padded = side + 40  # so that nothing wraps around

    def convolve(layer, transfer):
        spectrum = np.fft.rfft2(layer, s=(padded, padded)) * transfer
        return np.fft.irfft2(spectrum, s=(padded, padded))[..., :side, :side].astype(np.float32)

    green, brightest = picture[..., 1].astype(np.float32), picture.max(2)
    foreground = (brightest > max(12, 0.12 * np.percentile(brightest, 98))).astype(np.float32)

    def local_mean(layer, sigma):  # over the foreground pixels around
        blur = low_pass(padded, sigma)
        return convolve(layer * foreground, blur) / np.maximum(convolve(foreground, blur), 1e-3)

    mean = local_mean(green, 8)
    contrast = np.sqrt(np.maximum(local_mean((green - mean) ** 2, 12), 0)) + 1
    responses = convolve(np.clip((mean - green) / contrast, -4, 4) * foreground, line_filters(padded)).min(0)
    lines = np.maximum(responses.max(0) - np.abs(responses).mean(0), 0)
    inside = convolve(foreground, low_pass(padded, 4)) > 0.98
    if not inside.any():
        return np.zeros((side // 2, side // 2), np.uint8)
    lines = np.minimum(lines, np.percentile(lines[inside], 98)) * inside
    lines = lines.reshape(side // 2, 2, side // 2, 2).mean((1, 3))
    inside = inside.reshape(side // 2, 2, side // 2, 2).all((1, 3))
    return np.where(inside, 1 + 254 * lines / max(lines.max(), 1e-6), 0).astype(np.uint8)


# ---- vessels of two photographs ----

def standardise(maps: Tensor) -> Tensor:
    """(n, V, V) uint8, 0 outside the retina -> mean 0 and variance 1 inside, 0 outside."""
    maps, inside = maps.float(), (maps > 0).float()
    pixels = inside.sum((1, 2), keepdim=True).clamp(min=1)
    centred = (maps - maps.sum((1, 2), keepdim=True) / pixels) * inside
    return centred / (centred.square().sum((1, 2), keepdim=True) / pixels).sqrt().clamp(min=1e-6)


def rotate_and_zoom(maps: Tensor, degrees: float, zoom: float) -> Tensor:
    """(n, V, V) turned and zoomed about the centre, of the same energy as before."""
    cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    matrix = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])
    grid = F.affine_grid(matrix, (1, 1, *maps.shape[1:]), align_corners=False)
    turned = F.grid_sample(maps[None], grid, align_corners=False)[0]  # as channels: where to look is computed once
    energy, before = (x.square().sum((1, 2), keepdim=True) for x in (turned, maps))
    return turned * (before / energy.clamp(min=1e-6)).sqrt()


def shrink(maps: Tensor, factor: int) -> Tensor:
    """(n, V, V) -> (n, V / factor, V / factor) of the same mean square."""
    if factor == 1:
        return maps
    small = F.avg_pool2d(maps[:, None], factor)[:, 0]
    before, energy = (x.square().mean((1, 2), keepdim=True) for x in (maps, small))
    return small * (before / energy.clamp(min=1e-6)).sqrt()


class Correlation:
    """Correlation of pairs of maps at their best shift, by products of spectra, one for all shifts."""

    def __init__(self, field: Tensor):
        """`field` (V, V) is 1 where a map usually has values: how many pixels overlap decides what a shift weighs."""
        reach = round(REACH * len(field))
        # nothing wraps around; a multiple of 12, since a transform of 131 pixels, a prime, takes twice as long
        self.side = (12 * math.ceil((len(field) + reach + 1) / 12),) * 2
        spectrum = self.spectra(field)
        overlap = torch.fft.irfft2(spectrum.conj() * spectrum, s=self.side)
        allowed = torch.zeros(self.side)
        shifts = torch.arange(-reach, reach + 1)
        allowed[shifts[:, None], shifts] = 1
        # the mean over the overlap, which never counts as less than 40 % of the field
        self.weight = allowed / overlap.clamp(min=0.4 * float(overlap[0, 0]))

    def spectra(self, maps: Tensor) -> Tensor:
        return torch.fft.rfft2(maps, s=self.side)

    def best(self, a: Tensor, b: Tensor) -> Tensor:
        """Spectra (n or 1, ...) and (n, ...) -> highest correlation over the shifts (n,)."""
        return (torch.fft.irfft2(a.conj() * b, s=self.side) * self.weight).flatten(1).amax(1)


def correlate(maps: Tensor, pairs: Tensor, views: Sequence[tuple[float, float]], factor: int) -> Tensor:
    """Highest correlation (p,) of pairs (p, 2) of maps (n, V, V) uint8, reduced by `factor`, over shifts and views.

    The views are those of the second of a pair.
    """
    field = torch.from_numpy((maps.numpy() > 0).mean(0) > 0.5).float()  # by numpy, which makes no copy in int64
    correlation, best = Correlation((F.avg_pool2d(field[None], factor)[0] > 0.5).float()), torch.zeros(len(pairs))
    for k in tqdm(range(0, len(pairs), BLOCK), desc="comparing vessels, once", leave=False, disable=None):
        chunk = slice(k, k + BLOCK)
        first, second = pairs[chunk].unbind(1)
        second, place = second.unique(return_inverse=True)
        spectra, second = correlation.spectra(shrink(standardise(maps[first]), factor)), standardise(maps[second])
        for view in views:
            turned = correlation.spectra(shrink(rotate_and_zoom(second, *view), factor))
            best[chunk] = best[chunk].maximum(correlation.best(spectra, turned[place]))
    return best


# ---- vessels of many photographs ----

def describe(maps: Tensor) -> Tensor:
    """(n, V / 2, V / 2) -> (n, D): how strong each wave is, less the mean over the waves of its length.

    A shift of the map changes their phases only. Blur and noise change all waves of a length alike.
    """
    side = maps.shape[-1]
    y, x = torch.fft.fftfreq(side, 1 / side)[:, None], torch.fft.rfftfreq(side, 1 / side)
    periods = torch.hypot(x, y)  # (V / 2, V / 4 + 1)
    kept = (periods > 1) & (periods <= PERIODS) & ((x > 0) | (y > 0))  # of two conjugates one
    strength = torch.fft.rfft2(maps).abs()[:, kept].sqrt()  # (n, D); the root, so that no few waves decide
    lengths = F.one_hot(periods[kept].round().long()).float()  # (D, PERIODS + 1)
    return strength - strength @ (lengths / lengths.sum(0).clamp(min=1)) @ lengths.T


def nearest(maps: Tensor) -> Tensor:
    """Pairs (p, 2) of maps (n, V, V) uint8, i < j: for each j the NEAREST i before it that are described most alike.

    p grows with n. All descriptions are multiplied with each other, in blocks, but that is a small part of the time.
    """
    def halved(start):
        return shrink(standardise(maps[start:start + BLOCK]), 2)

    starts, pairs = range(0, len(maps), BLOCK), []
    known = torch.cat([describe(halved(start)) for start in starts])
    mean = known.mean(0)
    known = F.normalize(known - mean)
    for start in tqdm(starts, desc="looking for eyes, once", leave=False, disable=None):
        block, before = halved(start), known[:start + BLOCK].T
        alike = torch.full((len(block), before.shape[1]), -1.0)
        for view in FINE_VIEWS:
            turned = F.normalize(describe(rotate_and_zoom(block, *view)) - mean)
            torch.maximum(alike, turned @ before, out=alike)
        alike[torch.ones_like(alike, dtype=torch.bool).triu(start)] = -2  # i >= j
        values, i = alike.topk(min(NEAREST, len(before.T)))
        j, place = (values > -2).nonzero().unbind(1)
        pairs.append(torch.stack([i[j, place], j + start], 1))
    return torch.cat(pairs)


@torch.inference_mode()
def same_eye_scores(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (p, 2) of vessel maps (n, V, V) that may show one eye, i < j, and their scores (p,).

    The score is the highest correlation over shifts, turns and zooms of the second map. Pairs that `nearest` finds are
    compared on maps reduced to a third (15 views), those that reach SCREENING_SCORE once more in full (45 views). Of an
    eye with more than NEAREST photographs not all pairs are found, but enough to connect them. Maps without a retina
    are left out.
    """
    usable = np.flatnonzero(maps.any((1, 2)))
    if len(usable) < 2:
        return np.zeros((0, 2), int), np.zeros(0, np.float32)
    maps = torch.from_numpy(maps[usable])
    pairs = nearest(maps)
    pairs = pairs[correlate(maps, pairs, COARSE_VIEWS, 3) >= SCREENING_SCORE]
    return usable[pairs.numpy()], correlate(maps, pairs, FINE_VIEWS, 1).numpy()
