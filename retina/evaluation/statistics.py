"""How far a number can be trusted: intervals, tests, and the one rule of what may be claimed from a comparison.

Photographs of one eye are not independent, so eyes are resampled and permuted, never photographs. A measure is a
function of weights (D, n) that answers for D splits at once; see metrics.py.

The rule: a difference between two ways of training is claimed from FEWEST_SEEDS seeds an arm or more, where its
interval, corrected for the number of differences (Bonferroni), leaves out zero and p, adjusted by Holm's method, is
below 0.05. With fewer seeds runs are not resampled: intervals are over eyes, of these networks alone.

Bootstrap: Efron & Tibshirani 1993, "An introduction to the bootstrap", section 13.3; whole groups are drawn as in
Davison & Hinkley 1997, section 3.8
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from retina.evaluation.metrics import range_of


# n photographs, G eyes, D resamples, R runs that differ in their seed alone, m differences
RESAMPLES = 1000
LEVEL = 0.05
# Of an arm. Simulated with 103 photographs on which most seeds fail alike, and no difference but that of seeds (6 % of
# accuracy, standard deviation): 21 % of comparisons look like a difference with two runs an arm, 11 % with three, 7 %
# with five.
FEWEST_SEEDS = 5
Measures = Callable[[Tensor], dict[str, Tensor]]  # weights (D, n) -> {measure: (D,)}


def bootstrap_weights(eyes: Sequence[str], resamples: int = RESAMPLES) -> Tensor:
    """How often each photograph counts when as many eyes as there are, are drawn with replacement: (D, n)."""
    names, group = np.unique(eyes, return_inverse=True)  # (G,), (n,)
    number = len(names)
    counts = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
    return torch.from_numpy(counts[:, group]).double()


def percentile_interval(values: Tensor) -> list[float] | None:
    """The 2.5 % and 97.5 % percentiles of (D,).

    None where most resamples do not define the measure, and where all agree, as when every answer is right: no width is
    no certainty.
    """
    defined = values[~values.isnan()]
    if 2 * len(defined) < len(values) or float(defined.max() - defined.min()) < 1e-12:
        return None
    return defined.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def in_chunks(measure: Measures, weights: Tensor, size: int = 512) -> dict[str, Tensor]:
    """The same as measure(weights), in less memory."""
    chunks = [measure(chunk) for chunk in weights.split(size)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def bootstrap(measures: Sequence[Measures], eyes: Sequence[str], arm: int = 0) -> dict[str, Tensor]:
    """{measure: (1 + D,)}, the mean over runs of the measure itself and of its resamples; one function for each run.

    Runs are resampled too where there are FEWEST_SEEDS or more. Two arms see the same resamples of eyes and, with
    different numbers for `arm`, resamples of runs of their own.
    """
    weights = torch.cat([torch.ones(1, len(eyes), dtype=torch.float64), bootstrap_weights(eyes)])
    runs = [in_chunks(measure, weights) for measure in measures]
    stacked = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}  # (R, 1 + D)
    if len(runs) < FEWEST_SEEDS:
        return {name: values.mean(0) for name, values in stacked.items()}
    # as many runs as there are, with replacement, anew for each resample
    drawn_runs = torch.randint(len(runs), (len(runs), len(weights) - 1), generator=torch.Generator().manual_seed(arm))
    return {name: torch.cat([v[:, :1].mean(0), v[:, 1:].gather(0, drawn_runs).mean(0)]) for name, v in stacked.items()}


def permutations(eyes: Sequence[str], resamples: int = RESAMPLES) -> tuple[Tensor, bool]:
    """Which photographs change arms (D, n) of 0 and 1, by eye; all of the 2^G ways if these are no more

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
    section 21); for kappa, areas and pooled Dice it asks the same question. From D random permutations p is
    (1 + hits) / (1 + D) (Phipson & Smyth 2010, arXiv 1603.05766, eq. 2), never less than 1 / (1 + D).
    """
    flipped, every = permutations(eyes, resamples)
    flipped = torch.cat([torch.zeros(1, len(eyes), dtype=torch.float64), flipped])
    first, second = torch.cat([1 - flipped, flipped], 1), torch.cat([flipped, 1 - flipped], 1)
    changes = {}
    for measure in measures:
        one, other = in_chunks(measure, first), in_chunks(measure, second)
        for name in one:
            changes.setdefault(name, []).append(other[name] - one[name])
    p = {}
    for name, values in changes.items():
        observed, *permuted = torch.stack(values).mean(0).abs().tolist()
        hits = sum(not v < observed - 1e-12 for v in permuted)  # one that does not define the measure is a hit
        p[name] = math.nan if math.isnan(observed) else (hits + (not every)) / (len(permuted) + (not every))
    return p


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Photographs that only the first, only the second has right, and the exact two-sided p

    (McNemar 1947, Psychometrika 12:153, with the binomial distribution in place of chi squared). (n,) bool each. Takes
    photographs for independent, unlike all else here.
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


# ---- what may be claimed ----

def error_for_new_seeds(error: float, arms: Sequence[Sequence[float]], eyes: int) -> tuple[float, float, float]:
    """From the bootstrap's standard error of a difference of means over seeds: that for new seeds, the part of seeds

    in it, and its degrees of freedom (1e5: it is 0); nan where it is not defined. `arms`: the value of each seed of
    both. Resamples of k seeds vary (k - 1) / k times as much as k new ones would (Davison & Hinkley 1997, section 2.2):
    that is taken out, and what new seeds would add comes in its place. Fewer than FEWEST_SEEDS are not resampled: the
    error is that of eyes. Variances v of d degrees each, of the seeds of either arm and of eyes, together have
    (Satterthwaite 1946, Biometrics Bulletin 2:110, eq. 17)

        degrees = (sum of v)^2 / sum of v^2 / d
    """
    if not math.isfinite(error):
        return math.nan, math.nan, math.nan
    seeds = [] if len(arms[0]) < FEWEST_SEEDS else [  # (variance, degrees of freedom)
        (float(np.var(values, ddof=1)) / len(values), len(values) - 1) for values in arms]
    of_seeds = sum(v for v, _ in seeds)
    resampled = sum(v * d / (d + 1) for v, d in seeds)
    parts = [*seeds, (max(0.0, error ** 2 - resampled), eyes - 1)]
    whole, below = sum(v for v, _ in parts), sum(v ** 2 / d for v, d in parts if d)
    return math.sqrt(whole), math.sqrt(of_seeds), whole ** 2 / below if below else 1e5


def adjust(differences: Sequence[Mapping]) -> list[dict]:
    """Differences as compare.compare leaves them, with what follows from their number m; see the rule above.

    `corrected_interval` is difference -+ t standard errors, t the quantile of 1 - 0.05 / 2m: the percentiles that it
    stands for lie beyond what a thousand resamples tell. None where it has no width, or leaves what a difference of two
    such measures can be. `needed`: photographs, with these seeds, for which a difference as large as the one seen would
    be claimed with a chance of 80 % (Cohen 1988, section 2.4). Photographs make smaller what eyes contribute to the
    error and not what seeds do:

        needed = n SE_eyes^2 / ((difference / (t + 0.84))^2 - SE_seeds^2)

    None where it is not defined, and where it is no more than there are: then p forbids the claim, not the interval.
    `wants`: "seeds" where there are fewer than FEWEST_SEEDS an arm, "eyes" where a permutation test of so few cannot
    come to a p that is small enough, "more seeds" where no number of photographs would do.
    """
    power, m, adjusted = NormalDist().inv_cdf(0.8), len(differences), []
    for d, p in zip(differences, holm([1.0 if math.isnan(d["p"]) else d["p"] for d in differences])):
        gap, error, of_seeds = d["difference"], d["standard_error"], d["standard_error_of_seeds"]
        known, (low, high) = math.isfinite(gap) and error > 0, range_of(d["metric"])
        t = t_quantile(1 - LEVEL / 2 / m, d["degrees_of_freedom"]) if known else math.nan
        room = (gap / (t + power)) ** 2 - of_seeds ** 2
        needed = math.ceil(d["photographs"] * (error ** 2 - of_seeds ** 2) / room) if room > 0 else 0
        interval = [gap - t * error, gap + t * error]
        usable = known and abs(gap) + t * error <= high - low
        few = d["seeds"] < FEWEST_SEEDS
        adjusted.append(d | {
            "p_adjusted": p, "corrected_interval": interval if usable else None,
            "claimed": usable and not few and p < LEVEL and not interval[0] <= 0 <= interval[1],
            "needed": needed if needed > d["photographs"] else None,
            "wants": "seeds" if few else "eyes" if 2 * m / 2 ** d["eyes"] >= LEVEL else
            "more seeds" if room <= 0 and gap else None})
    return adjusted
