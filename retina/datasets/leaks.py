"""Which files are copies of one photograph, and which photographs show one eye."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from retina.datasets import cache, splits
from retina.datasets.cache import cached_arrays, ensure_cached, read_or_none, write_arrays
from retina.datasets.masks import Meaning, check_meanings
from retina.datasets.readers import DRAWN_SIDE
from retina.datasets.records import Conflict, Record
from retina.datasets.vessels import (COARSE_VIEWS, FINE_VIEWS, NEAREST, PERIODS, REACH, SCREENING_SCORE, SMALLEST_FIELD,
                                     same_eye_scores)


COPY_RMSE = 2.5  # grey levels between thumbnails: re-encoded copies in IDRiD reach 1.2, the next closest pair 4.9; the
# closest pair of which one is mirrored or turned is at 9.1
BLOCKS = 12  # means over BLOCKS x BLOCKS blocks rule out most pairs of thumbnails
SAME_EYE = 0.45  # vessel score: IDRiD's photographs of one eye reach 0.59 and more, all other pairs at most 0.36


def orientations(pictures: np.ndarray) -> Iterator[np.ndarray]:
    """Square pictures (n, s, s, 3) as they are, then in the seven other orientations that flips and turns lead to."""
    for transposed in (pictures, pictures.swapaxes(1, 2)):
        for y, x in itertools.product((1, -1), (1, -1)):
            yield transposed[:, ::y, ::x]


def find_copies(thumbnails: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of thumbnails (n, s, s, 3) of one photograph: copies, and copies of which one was mirrored or turned.

    Their root mean square difference is at most COPY_RMSE. Pictures with hardly any contrast must be closer than that:
    a tenth of their own standard deviation. s is a multiple of BLOCKS.
    """
    number, block = len(thumbnails), thumbnails.shape[1] // BLOCKS
    tolerance = np.array([min(COPY_RMSE, 0.1 * t.std()) for t in thumbnails], np.float32)
    # means over blocks differ by no more than what they are means of, so that no copy is ruled out by them
    means = thumbnails.reshape(number, BLOCKS, block, BLOCKS, block, 3).mean((2, 4), dtype=np.float32)
    means -= means.mean()
    flat, found = means.reshape(number, -1), {}
    norms = np.square(flat).sum(1)
    for k, (turned, whole) in enumerate(zip(orientations(means), orientations(thumbnails))):
        turned = turned.reshape(number, -1)
        for start in range(0, number, 512):  # differences of large sums: exact enough to find candidates only
            rows = slice(start, start + 512)
            squares = norms[rows, None] + norms[start:] - 2 * (flat[rows] @ turned[start:].T)
            allowed = np.minimum(tolerance[rows, None], tolerance[start:]) + 0.2
            for i, j in np.argwhere(squares <= flat.shape[1] * allowed ** 2) + start:
                if i < j and (i, j) not in found and np.sqrt(np.square(
                        thumbnails[i].astype(np.float32) - whole[j]).mean()) <= min(tolerance[i], tolerance[j]):
                    found[int(i), int(j)] = k
    return sorted(p for p, k in found.items() if k == 0), sorted(p for p, k in found.items() if k > 0)


@dataclass
class Comparison:
    """Which of n photographs are copies and which show one eye; pairs are indices of photographs."""
    copies: np.ndarray  # (c, 2)
    turned: np.ndarray  # (t, 2) copies of which one was mirrored or turned, so that its masks and points lie elsewhere
    pairs: np.ndarray  # (p, 2) pairs of different photographs whose vessels are somewhat alike
    scores: np.ndarray  # (p,) their vessel scores, see SAME_EYE
    sizes: np.ndarray  # (n, 2) width and height in pixels
    notes: np.ndarray  # (k,) what was not compared, in words

    def same_eye(self) -> list[list[int]]:
        """All pairs of photographs of one eye, copies included."""
        return np.concatenate([self.copies, self.turned, self.pairs[self.scores >= SAME_EYE]]).tolist()

    def join(self, records: Sequence[Record]) -> tuple[list[Record], list[Conflict]]:
        """Name the eye of each photograph, and join copies in the training split; -> records, label conflicts."""
        return splits.join_copies(splits.name_eyes(records, self.same_eye()), self.copies.tolist(), self.sizes.tolist())


def settle_masks(records: Sequence[Record], size: int) -> list[Record]:
    """The records, black mask files marked as such. InputError: masks contradict each other, see check_meanings."""
    masked = [r for r in records if r.drawing is None and any((r.masks or {}).values())]
    stored = {r.name: {lesion: Meaning(*meaning) for lesion, *meaning in cached_arrays(r, path, size, "stored")[0]
                       .tolist()} for r, path in zip(masked, ensure_cached(masked, size))}
    check_meanings([(r.where, lesion, r.masks[lesion], meaning) for r in masked
                    for lesion, meaning in stored[r.name].items()])
    return [r.with_labels(masks={lesion: file and replace(file, black=not stored[r.name][lesion].lesion)
                                 for lesion, file in r.masks.items()}) if r.name in stored else r for r in records]


def compare(records: Sequence[Record], size: int) -> Comparison:
    """Compare all photographs with each other, from their arrays in the cache; the result is cached too.

    Thumbnails tell copies; then the vessels of one copy of each photograph are compared, unless the data set gives each
    photograph its group. No two drawn photographs show one eye.
    """
    none = np.zeros((0, 2), int)
    if all(r.drawing is not None for r in records):
        return Comparison(none, none, none, np.zeros(0), np.full((len(records), 2), DRAWN_SIDE), np.zeros(0, str))
    paths, grouped = ensure_cached(records, size), all(r.eye for r in records)
    settings = COPY_RMSE, PERIODS, NEAREST, SCREENING_SCORE, REACH, COARSE_VIEWS, FINE_VIEWS, grouped
    key = hashlib.sha256(repr((settings, [p.name for p in paths])).encode()).hexdigest()
    stored, names = cache.CACHE / f"eyes_{key[:32]}.npz", [f.name for f in fields(Comparison)]
    if stored.exists() and (arrays := read_or_none(stored, *names)) is not None:
        return Comparison(*arrays)
    kinds = "thumbnail", "vessels", "geometry", "quality"
    thumbnails, vessels, geometry, quality = (np.stack(arrays) for arrays in zip(*(
        cached_arrays(r, path, size, *kinds) for r, path in zip(records, paths))))
    copies, turned = (np.array(pairs, int).reshape(-1, 2) for pairs in find_copies(thumbnails))
    pairs, scores, notes = none, np.zeros(0), []
    if grouped:
        notes = ["vessels were not compared, since each photograph has a group; copies were looked for"]
    else:
        different = np.unique(splits.connected_components(copies.tolist(), len(records)))
        pairs, scores = same_eye_scores(vessels[different])
        pairs = different[pairs]
        if small := int((quality[:, 0].astype(bool) & (quality[:, 1] < SMALLEST_FIELD)).sum()):
            notes = [f"{small} photographs are too small to tell eyes by their vessels (field of view below "
                     f"{SMALLEST_FIELD} pixels): of these only copies are found; name their eyes in a column 'group'"]
    comparison = Comparison(copies, turned, pairs, scores, geometry[:, :2].astype(int), np.array(notes, str))
    write_arrays(stored, **{name: getattr(comparison, name) for name in names})
    return comparison


def find_eyes(records: Sequence[Record], size: int,
              ignore: bool = False) -> tuple[list[Record], list[Conflict], list[str]]:
    """Compare all photographs and join copies, see Comparison; -> records, label conflicts, notes.

    `ignore`: as if each photograph showed an eye of its own. A black mask file counts as a mask that says "none".
    InputError: masks contradict each other.
    """
    records = settle_masks(records, size)
    if ignore:
        return [replace(r, eye=r.name) for r in records], [], []
    comparison = compare(records, size)
    return *comparison.join(records), comparison.notes.tolist()
