"""Which files show one photograph, which photographs show one eye, and how to split so that no eye is on both sides.

    vessel_map, same_eye_scores   photographs of one eye are known by their vessels, whatever light and view
    copies, join_copies           files that hold one photograph, and one record made of their labels
    name_eyes                     connected photographs are one eye
    split                         training, validation, test; training photographs of a test eye are left out

Normalised correlation by Fourier transform: Lewis 1995, "Fast normalized cross-correlation"
"""

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from files import InputError
from records import Record

# V side of a vessel map, n photographs

COPY_RMSE = 2.5  # grey levels between thumbnails: re-encoded copies in IDRiD reach 1.2, the next closest pair 5
SAME_EYE = 0.45  # vessel score: IDRiD's photographs of one eye reach 0.59 and more, all other pairs at most 0.36
SCREEN = 0.33  # score of the reduced maps below which a pair is not looked at again
VESSEL_SIDE = 108  # pixels of a vessel map
REACH = 0.2  # largest shift between two photographs of one eye, as share of the side
COARSE_VIEWS = tuple(itertools.product((-12, -6, 0, 6, 12), (0.93, 1.0, 1.07)))  # degrees, zoom
FINE_VIEWS = tuple(itertools.product(range(-12, 13, 3), (0.92, 0.96, 1.0, 1.04, 1.08)))


# ---- vessels ----

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
    lit = (brightest > max(12, 0.12 * np.percentile(brightest, 98))).astype(np.float32)

    def local_mean(layer, sigma):  # over the lit pixels around
        blur = low_pass(padded, sigma)
        return convolve(layer * lit, blur) / np.maximum(convolve(lit, blur), 1e-3)

    mean = local_mean(green, 8)
    contrast = np.sqrt(np.maximum(local_mean((green - mean) ** 2, 12), 0)) + 1
    responses = convolve(np.clip((mean - green) / contrast, -4, 4) * lit, line_filters(padded)).min(0)
    lines = np.maximum(responses.max(0) - np.abs(responses).mean(0), 0)
    inside = convolve(lit, low_pass(padded, 4)) > 0.98
    if not inside.any():
        return np.zeros((side // 2, side // 2), np.uint8)
    lines = np.minimum(lines, np.percentile(lines[inside], 98)) * inside
    lines = lines.reshape(side // 2, 2, side // 2, 2).mean((1, 3))
    inside = inside.reshape(side // 2, 2, side // 2, 2).all((1, 3))
    return np.where(inside, 1 + 254 * lines / max(lines.max(), 1e-6), 0).astype(np.uint8)


# ---- vessels of two photographs ----

def standardise(maps: Tensor) -> Tensor:
    """(n, V, V) with 0 outside the retina -> mean 0 and variance 1 inside, 0 outside."""
    inside = (maps > 0).float()
    pixels = inside.sum((1, 2), keepdim=True).clamp(min=1)
    centred = (maps - maps.sum((1, 2), keepdim=True) / pixels) * inside
    return centred / (centred.square().sum((1, 2), keepdim=True) / pixels).sqrt().clamp(min=1e-6)


def seen_at(maps: Tensor, degrees: float, zoom: float) -> Tensor:
    """(n, V, V) turned and zoomed about the centre, of the same energy as before."""
    cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(maps), 2, 3)
    grid = F.affine_grid(matrix, (len(maps), 1, *maps.shape[1:]), align_corners=False)
    turned = F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0]
    energy, before = (x.square().sum((1, 2), keepdim=True) for x in (turned, maps))
    return turned * (before / energy.clamp(min=1e-6)).sqrt()


def shrink(maps: Tensor) -> Tensor:
    """(n, V, V) -> (n, V / 3, V / 3) of the same mean square."""
    small = F.avg_pool2d(maps[:, None], 3)[:, 0]
    before, energy = (x.square().mean((1, 2), keepdim=True) for x in (maps, small))
    return small * (before / energy.clamp(min=1e-6)).sqrt()


class Correlation:
    """Correlation of pairs of maps at their best shift, by products of spectra, one for all shifts."""

    def __init__(self, field: Tensor):
        """`field` (V, V) is 1 where a map usually has values: how many pixels overlap decides what a shift weighs."""
        reach = round(REACH * len(field))
        self.side = (len(field) + reach + 1,) * 2
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


@torch.inference_mode()
def same_eye_scores(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (p, 2) of vessel maps (n, V, V) that may show one eye, i < j, and their scores (p,).

    The score is the highest correlation over shifts, turns and zooms of the second map. All pairs are compared on maps
    reduced to a third (15 views, each a twentieth of the time of a full one), those that reach SCREEN once more in full
    (45 views). Maps without a retina are left out.
    """
    usable = np.flatnonzero((maps > 0).any((1, 2)))
    none = np.zeros((0, 2), int), np.zeros(0, np.float32)
    if len(usable) < 2:
        return none
    full = standardise(torch.from_numpy(maps[usable]).float())
    number = len(full)
    field = (torch.from_numpy(maps[usable] > 0).float().mean(0) > 0.5).float()
    small = shrink(full)
    coarse = Correlation((F.avg_pool2d(field[None], 3)[0] > 0.5).float())
    spectra, scores = coarse.spectra(small), torch.zeros(number, number)
    for view in tqdm(COARSE_VIEWS, desc="comparing vessels, once", leave=False, disable=None):
        turned = coarse.spectra(shrink(seen_at(full, *view)))
        for i in range(number - 1):
            for j in range(i + 1, number, 512):
                row = scores[i, j:j + 512]
                torch.maximum(row, coarse.best(spectra[i], turned[j:j + 512]), out=row)
    first, second = (scores >= SCREEN).triu(1).nonzero().unbind(1)
    if not len(first):
        return none
    fine, best = Correlation(field), torch.zeros(len(first))
    spectra = fine.spectra(full)
    seconds, place = second.unique(return_inverse=True)
    for view in tqdm(FINE_VIEWS, desc="looking again", leave=False, disable=None):
        turned = fine.spectra(seen_at(full[seconds], *view))
        for k in range(0, len(first), 128):
            part = slice(k, k + 128)
            best[part] = best[part].maximum(fine.best(spectra[first[part]], turned[place[part]]))
    return usable[torch.stack([first, second], 1).numpy()], best.numpy()


# ---- copies ----

def copies(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of thumbnails (n, h, w, 3) that show one photograph: root mean square difference at most COPY_RMSE.

    Pictures with hardly any contrast must be closer than that: a tenth of their own standard deviation.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    tolerance = np.minimum(COPY_RMSE, 0.1 * flat.std(1))
    norms = np.einsum("ij,ij->i", flat, flat, dtype=np.float64)
    found = []
    for start in range(0, len(flat), 512):  # differences of large sums: exact enough to find candidates only
        squares = norms[start:start + 512, None] + norms - 2.0 * (flat[start:start + 512] @ flat.T)
        for i, j in np.argwhere(squares <= (COPY_RMSE + 1) ** 2 * flat.shape[1]):
            i += start
            if i < j and np.sqrt(np.square(flat[i] - flat[j]).mean()) <= min(tolerance[i], tolerance[j]):
                found.append((int(i), int(j)))
    return found


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


@dataclass(frozen=True)
class Conflict:
    """Files of one photograph that carry different labels of one kind."""
    label: str  # a field of Record, a point, or a kind of mask
    names: tuple[str, ...]
    values: tuple
    used: object  # what training goes by; None: nothing

    def plain(self, classes: Sequence[str]) -> dict:
        """As plain types, categories by their names."""
        def named(value):
            return classes[value] if self.label == "category" and value is not None else value
        return {"label": self.label, "photographs": list(self.names), "values": [named(v) for v in self.values],
                "used": named(self.used)}


def join_numbers(group: Sequence[Record]) -> tuple[dict, list[Conflict]]:
    """Grade, edema and category of copies. The higher grade counts, but different categories cancel each other."""
    labels, conflicts = {}, []
    for label in ("grade", "edema", "category"):
        known = {r.name: v for r in group if (v := getattr(r, label)) is not None}
        labels[label] = max(known.values(), default=None)
        if len(set(known.values())) > 1:
            labels[label] = None if label == "category" else labels[label]
            conflicts.append(Conflict(label, tuple(known), tuple(known.values()), labels[label]))
    return labels, conflicts


def join_points(group: Sequence[Record], sizes: Sequence, size: tuple[int, int]) -> tuple[dict, list[Conflict]]:
    """Points of copies of `sizes`, carried over to an image of `size`; different ones count by their mean."""
    points, conflicts = {}, []
    for point in dict.fromkeys(p for r in group for p in r.points or {}):
        known = {r.name: np.multiply(r.points[point], np.divide(size, own))
                 for r, own in zip(group, sizes) if point in (r.points or {})}
        points[point] = tuple(np.mean(list(known.values()), 0).tolist())
        if np.ptp(list(known.values()), 0).max() > 0.01 * size[0]:
            places = tuple(tuple(v.round(1).tolist()) for v in known.values())
            conflicts.append(Conflict(point, tuple(known), places, points[point]))
    return {"points": points or None}, conflicts


def join_masks(group: Sequence[Record], sizes: Sequence, size: tuple[int, int]) -> tuple[dict, list[Conflict]]:
    """Masks of the copies that have `size`, since masks are drawn on pixels; a file beats "none", the first counts."""
    masks, conflicts = {}, []
    for kind in dict.fromkeys(k for r in group for k in r.masks or {}):
        known = {r.name: r.masks[kind] for r, own in zip(group, sizes)
                 if kind in (r.masks or {}) and tuple(own) == tuple(size)}
        if known:
            masks[kind] = next(filter(None, known.values()), None)
        if len(set(known.values())) > 1:
            values = ["none" if path is None else str(path) for path in known.values()]
            conflicts.append(Conflict(kind, tuple(known), tuple(values), str(masks[kind])))
    return {"masks": masks or None}, conflicts


def join_copies(records: Sequence[Record], pairs: Sequence[tuple[int, int]],
                sizes: Sequence[tuple[int, int]]) -> tuple[list[Record], list[Conflict]]:
    """Make one record of all training copies of a photograph, with the labels of all of them; -> records, conflicts.

    The image is that of the copy with most masks; `sizes` (width, height) carry points over to it. Where copies carry
    different grades the higher one counts: the same photograph was graded twice, and missing disease is the worse
    mistake. Photographs of other parts stay as they are: they are scored as they were given, and no label crosses from
    test into training.
    """
    groups = defaultdict(list)
    for i, leader in enumerate(connected(pairs, len(records))):
        groups[(leader, "train") if records[i].part == "train" else (i, "alone")].append(i)
    joined, conflicts = [], []
    for group in groups.values():
        if len(group) == 1:
            joined.append(records[group[0]])
            continue
        first = max(group, key=lambda i: sum(map(bool, (records[i].masks or {}).values())))
        members, own = [records[i] for i in group], [sizes[i] for i in group]
        labels = {}
        for found, contradictions in (join_numbers(members), join_points(members, own, sizes[first]),
                                      join_masks(members, own, sizes[first])):
            labels |= found
            conflicts += contradictions
        joined.append(replace(records[first], **labels))
    return joined, conflicts


# ---- eyes ----

def name_eyes(records: Sequence[Record], pairs: Sequence[tuple[int, int]]) -> list[Record]:
    """Give all photographs that `pairs`, or an `eye` that the data set names, connect the same `eye`."""
    said = defaultdict(list)
    for i, record in enumerate(records):
        if record.eye:
            said[record.eye].append(i)
    known = [pair for group in said.values() for pair in itertools.pairwise(group)]
    return [replace(r, eye=records[k].name) for r, k in zip(records, connected([*pairs, *known], len(records)))]


# ---- split ----

@dataclass(frozen=True)
class Split:
    """Records by what they are for."""
    training: list[Record]
    validation: list[Record]
    test: list[Record]
    leaks: list[Record]  # photographs to train or validate on that show an eye of the test part
    validated: list[Record]  # training photographs that show an eye of a validation part of the data set's own


def folds(records: Sequence[Record], number: int) -> list[int]:
    """Fold 0..number-1 of each record: eyes stay whole, and every fold gets its share of each grade and of the masks.

    Greedy, as in scikit-learn's StratifiedGroupKFold: eyes in random order, always the same, those with most
    photographs first; each goes where it leaves the counts of its strata most even.
    """
    ungraded = [r.grade is None and r.category is None for r in records]  # what else they carry decides for these
    strata = [(r.grade, r.category, r.masks is not None, u and (r.edema, r.points is not None))
              for r, u in zip(records, ungraded)]
    total = Counter(strata)
    eyes = defaultdict(list)
    for i, record in enumerate(records):
        eyes[record.eye].append(i)
    groups = [eyes[eye] for eye in sorted(eyes)]
    order = np.random.default_rng(0).permutation(len(groups))
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


def read_fold(text: str) -> tuple[int, int]:
    """"2/5", the second of five folds -> (2, 5). InputError: another form."""
    first, _, number = text.partition("/")
    if not re.fullmatch(r"\d{1,3}/\d{1,3}", text, re.ASCII) or not 1 <= int(first) <= int(number) >= 2:
        raise InputError(f"--fold {text[:20]}: expected I/N, fold I of N, such as 1/5; I from 1 to N, N from 2 to 999")
    return int(first), int(number)


def split(records: Sequence[Record], fold: str = "1/5", keep_leaks: bool = False) -> Split:
    """Cut the training part into training and validation (fold I of N) such that no eye lies on both sides.

    Training photographs of an eye in the test part are left out, unless `keep_leaks`. Where the data set names its own
    validation part, that is taken, and photographs of its eyes never train. InputError: `fold` has no such form.
    """
    index, number = read_fold(fold)
    parts = {part: [r for r in records if r.part == part] for part in ("train", "val", "test")}
    tested, validated = ({r.eye for r in parts[part]} for part in ("test", "val"))
    leaks = [r for r in parts["train"] + parts["val"] if r.eye in tested]
    if not keep_leaks:
        parts |= {part: [r for r in parts[part] if r.eye not in tested] for part in ("train", "val")}
    if parts["val"]:
        sides = [[r for r in parts["train"] if (r.eye in validated) == side] for side in (False, True)]
        return Split(sides[0], parts["val"], parts["test"], leaks, sides[1])
    training, validation = [], []
    for record, f in zip(parts["train"], folds(parts["train"], number)):
        (validation if f == index - 1 else training).append(record)
    return Split(training, validation, parts["test"], leaks, [])
