"""Which files are copies of one photograph, and which photographs show one eye."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from retina.datasets import cache, splits
from retina.datasets.cache import cached_arrays, drop_black_masks, ensure_cached, read_or_none, write_arrays
from retina.datasets.masks import Meaning, check_meanings
from retina.datasets.readers import DRAWN_SIDE
from retina.datasets.records import Conflict, Record
from retina.datasets.vessels import COARSE_VIEWS, FINE_VIEWS, REACH, SCREENING_SCORE, same_eye_scores


COPY_RMSE = 2.5  # grey levels between thumbnails: re-encoded copies in IDRiD reach 1.2, the next closest pair 5
SAME_EYE = 0.45  # vessel score: IDRiD's photographs of one eye reach 0.59 and more, all other pairs at most 0.36


def find_copies(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of thumbnails (n, h, w, 3) of one photograph: their root mean square difference is at most COPY_RMSE.

    Pictures with hardly any contrast must be closer than that: a tenth of their own standard deviation.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    tolerance = np.minimum(COPY_RMSE, 0.1 * flat.std(1))
    norms = np.einsum("ij,ij->i", flat, flat, dtype=np.float64)
    pairs = []
    for start in range(0, len(flat), 512):  # differences of large sums: exact enough to find candidates only
        squares = norms[start:start + 512, None] + norms - 2.0 * (flat[start:start + 512] @ flat.T)
        for i, j in np.argwhere(squares <= (COPY_RMSE + 1) ** 2 * flat.shape[1]):
            i += start
            if i < j and np.sqrt(np.square(flat[i] - flat[j]).mean()) <= min(tolerance[i], tolerance[j]):
                pairs.append((int(i), int(j)))
    return pairs


@dataclass
class Comparison:
    """Which of n photographs are copies and which show one eye; pairs are indices of photographs."""
    copies: np.ndarray  # (c, 2)
    pairs: np.ndarray  # (p, 2) pairs of different photographs whose vessels are somewhat alike
    scores: np.ndarray  # (p,) their vessel scores, see SAME_EYE
    sizes: np.ndarray  # (n, 2) width and height in pixels

    def same_eye(self) -> list[list[int]]:
        """All pairs of photographs of one eye, copies included."""
        return self.copies.tolist() + self.pairs[self.scores >= SAME_EYE].tolist()

    def join(self, records: Sequence[Record]) -> tuple[list[Record], list[Conflict]]:
        """Name the eye of each photograph, and join copies in the training split; -> records, label conflicts."""
        return splits.join_copies(splits.name_eyes(records, self.same_eye()), self.copies.tolist(), self.sizes.tolist())


def check_masks(records: Sequence[Record], size: int) -> None:
    """InputError: mask files of a data set contradict each other, see masks.check_meanings."""
    masked = [r for r in records if r.drawing is None and any((r.masks or {}).values())]
    check_meanings([(r.where, lesion, r.masks[lesion], Meaning(*meaning))
                    for r, path in zip(masked, ensure_cached(masked, size))
                    for lesion, *meaning in cached_arrays(r, path, size, "stored")[0].tolist()])


def compare(records: Sequence[Record], size: int) -> Comparison:
    """Compare all photographs with each other, from their arrays in the cache; the result is cached too.

    Thumbnails tell copies; then the vessels of one copy of each photograph are compared. No two drawn photographs show
    one eye.
    """
    if all(r.drawing is not None for r in records):
        none = np.zeros((0, 2), int)
        return Comparison(none, none, np.zeros(0), np.full((len(records), 2), DRAWN_SIDE))
    paths = ensure_cached(records, size)
    check_masks(records, size)
    settings = COPY_RMSE, SCREENING_SCORE, REACH, COARSE_VIEWS, FINE_VIEWS
    key = hashlib.sha256(repr((settings, [p.name for p in paths])).encode()).hexdigest()
    stored, names = cache.CACHE / f"eyes_{key[:32]}.npz", [f.name for f in fields(Comparison)]
    if stored.exists() and (arrays := read_or_none(stored, *names)) is not None:
        return Comparison(*arrays)
    thumbnails, vessels, geometry = (np.stack(arrays) for arrays in zip(*(
        cached_arrays(r, path, size, "thumbnail", "vessels", "geometry") for r, path in zip(records, paths))))
    same = np.array(find_copies(thumbnails), int).reshape(-1, 2)
    different = np.unique(splits.connected_components(same.tolist(), len(records)))
    pairs, scores = same_eye_scores(vessels[different])
    comparison = Comparison(same, different[pairs], scores, geometry[:, :2].astype(int))
    write_arrays(stored, **{name: getattr(comparison, name) for name in names})
    return comparison


def find_eyes(records: Sequence[Record], size: int, ignore: bool = False) -> tuple[list[Record], list[Conflict]]:
    """Compare all photographs and join copies, see Comparison.join; `ignore`: as if each showed an eye of its own.

    A black mask file counts as a mask that says "none".
    """
    if ignore:
        check_masks(records, size)
        return [replace(r, eye=r.name) for r in drop_black_masks(records, size)], []
    return compare(records, size).join(drop_black_masks(records, size))
