"""How far a number can be trusted: intervals, and what may be claimed from two runs on the same photographs.

Photographs of one eye are no independent witnesses, so that eyes are drawn and swapped, never photographs. A measure is
a function of weights (D, n) that answers for D splits at once; see metrics.py.

Bootstrap: Efron & Tibshirani 1993, "An introduction to the bootstrap", section 13.3; whole groups are drawn as in
Davison & Hinkley 1997, section 3.8
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


# n photographs, G eyes, D draws, R runs that differ in their seed alone
RESAMPLES = 1000
Measures = Callable[[Tensor], dict[str, Tensor]]  # weights (D, n) -> {measure: (D,)}


def bootstrap_weights(eyes: Sequence[str], resamples: int = RESAMPLES) -> Tensor:
    """How often each photograph counts when as many eyes as there are, are drawn with replacement: (D, n)."""
    names, group = np.unique(eyes, return_inverse=True)  # (G,), (n,)
    number = len(names)
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
    return torch.from_numpy(drawn[:, group]).double()


def percentile_interval(drawn: Tensor) -> list[float] | None:
    """The 2.5 % and 97.5 % percentiles of (D,).

    None where most draws do not define the measure, and where all agree, as when every answer is right: no width is no
    certainty.
    """
    defined = drawn[~drawn.isnan()]
    if 2 * len(defined) < len(drawn) or float(defined.max() - defined.min()) < 1e-12:
        return None
    return defined.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()


def in_parts(measure: Measures, weights: Tensor, rows: int = 512) -> dict[str, Tensor]:
    """The same as measure(weights), in less memory."""
    parts = [measure(part) for part in weights.split(rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def bootstrap(measures: Sequence[Measures], eyes: Sequence[str], arm: int = 0) -> dict[str, Tensor]:
    """{measure: (1 + D,)}, the mean over runs of the measure itself and of its resamples; one function for each run.

    Two sides see the same draws of eyes and, with different numbers for `arm`, draws of runs of their own.
    """
    weights = torch.cat([torch.ones(1, len(eyes), dtype=torch.float64), bootstrap_weights(eyes)])
    found = [in_parts(measure, weights) for measure in measures]
    stacked = {name: torch.stack([run[name] for run in found]) for name in found[0]}  # (R, 1 + D)
    # as many runs as there are, with replacement, anew for each draw
    drawn = torch.randint(len(found), (len(found), len(weights) - 1), generator=torch.Generator().manual_seed(arm))
    return {name: torch.cat([v[:, :1].mean(0), v[:, 1:].gather(0, drawn).mean(0)]) for name, v in stacked.items()}


def permutations(eyes: Sequence[str], resamples: int = RESAMPLES) -> tuple[Tensor, bool]:
    """Which photographs change sides (D, n) of 0 and 1, by eye; all of the 2^G ways if these are no more

    than `resamples`; -> the permutations and whether they are all.
    """
    names, group = np.unique(eyes, return_inverse=True)  # (G,), (n,)
    number = len(names)
    every = 2 ** number <= resamples
    flips = np.arange(2 ** number)[:, None] >> np.arange(number) & 1 if every else \
        np.random.default_rng(1).integers(0, 2, (resamples, number))
    return torch.from_numpy(flips[:, group]).double(), every


def p_values(measures: Sequence[Measures], eyes: Sequence[str], resamples: int = RESAMPLES) -> dict[str, float]:
    """{measure: two-sided p} that two runs differ no more than chance lets them, by swapping their answers eye by eye.

    Each function answers for the photographs of the first run followed by the same of the second, (D, 2 n). For a mean
    over photographs this is the sign-flip test of the paired differences (Fisher 1935, "The design of experiments",
    section 21); for kappa, areas and pooled Dice it asks the same question. Draws: (1 + hits) / (1 + D) (Phipson &
    Smyth 2010, arXiv 1603.05766, eq. 2), so that no p is less than 1 / (1 + D).
    """
    flipped, every = permutations(eyes, resamples)
    flipped = torch.cat([torch.zeros(1, len(eyes), dtype=torch.float64), flipped])
    first, second = torch.cat([1 - flipped, flipped], 1), torch.cat([flipped, 1 - flipped], 1)
    changes = {}
    for measure in measures:
        one, other = in_parts(measure, first), in_parts(measure, second)
        for name in one:
            changes.setdefault(name, []).append(other[name] - one[name])
    found = {}
    for name, values in changes.items():
        seen, *drawn = torch.stack(values).mean(0).abs().tolist()
        hits = sum(not v < seen - 1e-12 for v in drawn)  # a draw that does not define the measure is a hit
        found[name] = math.nan if math.isnan(seen) else hits / len(drawn) if every else (1 + hits) / (1 + len(drawn))
    return found


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Photographs that only the first, only the second has right, and the exact two-sided p

    (McNemar 1947, Psychometrika 12:153, with the binomial distribution in place of chi squared). (n,) bool each. Takes
    photographs for independent witnesses, unlike all else here.
    """
    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    n = one + other
    return one, other, min(1.0, 2 * sum(math.comb(n, k) for k in range(min(one, other) + 1)) / 2 ** n)


@functools.cache
def t_quantile(p: float, degrees: float) -> float:
    """Of Student's t distribution, p > 0.5, one degree of freedom or more: x = sqrt(degrees) tan(angle) turns its

    density into cos(angle)^(degrees - 1).
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (min(degrees, 1e5) - 1)
    area = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(min(degrees, 1e5)) * math.tan(np.interp(2 * p - 1, area / area[-1], angles))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for the number of comparisons (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


# Of a side. Simulated with 103 photographs on which most seeds fail alike, and no difference but that of seeds (6 % of
# accuracy, standard deviation): 21 % of comparisons look like a difference with two runs a side, 11 % with three, 7 %
# with five.
FEWEST_RUNS = 5


def claim(name: str, difference: float, interval: Sequence[float] | None, p: float, photographs: int, runs: int) -> str:
    """What may be said of one measure of two arms of so many `runs` each; p adjusted already.

    Swapping the answers of networks tells about these networks; about the ways they were trained only many can.
    """
    if interval is None or math.isnan(p):
        return f"{name}: no interval from n = {photographs}; nothing can be claimed"
    said = f"{name}: {difference:+.3f} (95 % {interval[0]:+.3f} to {interval[1]:+.3f}, p = {p:.3f})"
    if p >= 0.05 or interval[0] <= 0 <= interval[1]:
        return f"{said}: no difference can be claimed from n = {photographs}"
    which = "second" if difference > 0 else "first"
    about = "these ways of training" if runs >= FEWEST_RUNS else \
        f"these {2 * runs} networks, not the ways they were trained, for which {FEWEST_RUNS} runs a side are needed"
    return f"{said}: the {which} scores higher, from n = {photographs}; a claim about {about}"
