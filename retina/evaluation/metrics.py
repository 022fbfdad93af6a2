"""Every measure, with its definition and its source, as a function of what is known of each photograph.

A measure takes `weights` (D, n), how often each photograph counts in each of D splits, and answers for all D at once:
ones give the measure of the split itself, multiplicities those of its resamples (statistics.py). Where a measure is not
defined (a class that does not occur, nothing known) it is nan, and means leave it out.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# n photographs, D weightings of them, C classes, L lesion classes, K levels of score
NAN = float("nan")


RANGES = {  # by how names begin
    **dict.fromkeys(("kappa", "broad_kappa"), (-1.0, 1.0)), "bleu": (0.0, 100.0),
    **dict.fromkeys(("px4288", "median_px4288", "diameters", "length_ratio"), (0.0, math.inf)),
    **dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "auc", "calibration_error", "referable", "dice",
                     "iou", "aupr", "five_masks_dice", "within_radius", "top5", "broad_accuracy", "exact", "slots",
                     "side", "readable", "stutters"), (0.0, 1.0))}


def range_of(measure: str) -> tuple[float, float]:
    """The lowest and the highest value that the measure of this name can have, as far as they are known."""
    return next((ends for name, ends in RANGES.items() if measure.startswith(name)), (-math.inf, math.inf))


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over photographs: (n, ...), (D, n) -> (D, ...); nan values are not known and count for nothing."""
    flat = values.double().flatten(1) if values.ndim > 1 else values.double()[:, None]
    known = ~flat.isnan()
    total = weights @ known.double()  # (D, ...)
    means = torch.where(total > 0, weights @ flat.nan_to_num() / total, NAN)
    return means.view(len(weights), *values.shape[1:])


def median(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted median over photographs: (n,), (D, n) -> (D,); halfway between two, nan values left out."""
    values, weights = values[~values.isnan()], weights[:, ~values.isnan()]
    if not len(values):
        return torch.full((len(weights),), NAN, dtype=torch.float64)
    values, order = values.double().sort()
    below = weights[:, order].cumsum(1)
    half = below[:, -1:] / 2
    low, high = (values[reached.sum(1).clamp(max=len(values) - 1)] for reached in (below < half, below <= half))
    return torch.where(half[:, 0] > 0, (low + high) / 2, NAN)


# ---- classes: truth and prediction (n,) int64 ----

def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """(n,), (n,) -> counts (C, C); rows are the truth, columns the prediction."""
    return torch.bincount(truth * classes + predicted, minlength=classes * classes).view(classes, classes)


def accuracy(truth: Tensor, predicted: Tensor, weights: Tensor) -> Tensor:
    """Share of photographs whose class is right."""
    return mean(truth == predicted, weights)


def class_counts(truth: Tensor, predicted: Tensor, classes: int, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many of each class are right, occur, are predicted: three of (D, C)."""
    is_truth, is_predicted = (F.one_hot(x, classes).double() for x in (truth, predicted))  # (n, C)
    return weights @ (is_truth * is_predicted), weights @ is_truth, weights @ is_predicted


def balanced_accuracy(truth: Tensor, predicted: Tensor, classes: int, weights: Tensor) -> Tensor:
    """Mean over the classes that occur of the share that is recognised (Brodersen et al. 2010, ICPR, section 2)."""
    right, occur, _ = class_counts(truth, predicted, classes, weights)
    return torch.where(occur > 0, right / occur, NAN).nanmean(1)


def macro_f1(truth: Tensor, predicted: Tensor, classes: int, weights: Tensor) -> Tensor:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN) (van Rijsbergen 1979, chapter 7)

    over the classes that occur or are predicted.
    """
    right, occur, answered = class_counts(truth, predicted, classes, weights)
    return torch.where(occur + answered > 0, 2 * right / (occur + answered), NAN).nanmean(1)


def quadratic_kappa(truth: Tensor, predicted: Tensor, classes: int, weights: Tensor) -> Tensor:
    """Cohen's kappa with weights (i - j)^2 (Cohen 1968, Psychological Bulletin 70:213).

    1 is agreement, 0 what chance gives with the same shares of classes. If truth and prediction are one and the same
    single class, chance leaves no room for disagreement and kappa is 0 / 0: nan.
    """
    _, occur, answered = class_counts(truth, predicted, classes, weights)
    i = torch.arange(classes, dtype=torch.float64)
    by_chance = ((occur @ (i[:, None] - i).square()) * answered).sum(1) / weights.sum(1)
    seen = weights @ (truth - predicted).double().square()
    return torch.where(by_chance > 0, 1 - seen / by_chance, NAN)


def roc_area(score: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties counting half

    (Hanley & McNeil 1982, Radiology 143:29). (n,), (n,) bool -> (D,); nan where either is missing.
    """
    values, group = score.unique(return_inverse=True)  # ascending
    mass = [torch.zeros(len(weights), len(values), dtype=torch.float64).index_add_(1, group, weights * member)
            for member in (positive.double(), (~positive).double())]
    below = mass[1].cumsum(1) - mass[1] / 2
    pairs = mass[0].sum(1) * mass[1].sum(1)
    return torch.where(pairs > 0, (mass[0] * below).sum(1) / pairs, NAN)


def ranked_precision(score: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Average precision of photographs ranked by score, those of one score together; see average_precision.

    (n,), (n,) bool -> (D,); nan where none is positive.
    """
    values, group = score.unique(return_inverse=True)  # ascending
    others, true = (torch.zeros(len(weights), len(values), dtype=torch.float64).index_add_(1, group, weights * member)
                    for member in ((~positive).double(), positive.double()))
    return torch.where(true.sum(1) > 0, average_precision(others, true), NAN)  # of no photograph at all it is 0


def one_vs_rest_area(probabilities: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Mean over classes of the area under the ROC curve of each class against all others.

    (Fawcett 2006, Pattern Recognition Letters 27:861, section 9.2, but every class counts alike); classes that do not
    occur are left out. (n, C) -> (D,).
    """
    return torch.stack([roc_area(probabilities[:, c], truth == c, weights)
                        for c in range(probabilities.shape[1])], 1).nanmean(1)


# ---- probabilities ----

def confidence_bins(confidence: Tensor, bins: int) -> Tensor:
    """Which of the bins ]0, 1/bins], ]1/bins, 2/bins] ... a confidence lies in: (n,) -> (n, bins) of 0 and 1."""
    return F.one_hot((confidence * bins).ceil().long().clamp(1, bins) - 1, bins).double()


def calibration_error(probabilities: Tensor, truth: Tensor, weights: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error: mean gap between confidence and accuracy (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    The confidence is the probability of the predicted class; bins of equal width, ]0, 1/15] and so on.
    """
    confidence, predicted = probabilities.double().max(1)
    gap = (confidence - (predicted == truth).double())[:, None] * confidence_bins(confidence, bins)  # (n, bins)
    return (weights @ gap).abs().sum(1) / weights.sum(1)


def calibration_bins(probabilities: Tensor, truth: Tensor, bins: int = 15) -> Tensor:
    """Of each of these bins that holds a photograph: mean confidence, accuracy, number; (n, C), (n,) -> (bins, 3)."""
    confidence, predicted = probabilities.double().max(1)
    known = torch.stack([confidence, (predicted == truth).double(), torch.ones_like(confidence)], 1)
    sums = confidence_bins(confidence, bins).T @ known
    sums = sums[sums[:, 2] > 0]
    return torch.cat([sums[:, :2] / sums[:, 2:], sums[:, 2:]], 1)


def at_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T), from the probabilities at T = 1 (n, C) (Guo et al. 2017, eq. 9)."""
    return (probabilities.double().clamp(min=1e-30).log() / temperature).softmax(1)


def best_temperature(probabilities: Tensor, truth: Tensor) -> float:
    """The temperature, 0.05 to 20, of the highest likelihood (Guo et al. 2017, section 4.2).

    The log likelihood is concave in 1 / T, so halving intervals finds it. 1 where none is highest: if all are right,
    ever colder is ever better, and if all are wrong, ever warmer.
    """
    logits = probabilities.double().clamp(min=1e-30).log()
    right = logits.gather(1, truth[:, None])[:, 0]
    low, high = 0.05, 20.0  # of 1 / T
    for _ in range(60):
        middle = math.sqrt(low * high)
        slope = float((right - ((middle * logits).softmax(1) * logits).sum(1)).mean())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return 1 / low if 0.051 < low < 19.9 and (probabilities.argmax(1) != truth).any() else 1.0


def sensitivity(predicted: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Share of the positive that are found; (n,) bool. Specificity is that of the negations."""
    return mean(predicted.double().masked_fill(~positive, NAN), weights)


def best_threshold(score: Tensor, positive: Tensor) -> float:
    """The threshold at which sensitivity + specificity is highest (Youden 1950, Cancer 3:32); 0.5 if either is missing.

    Halfway between two scores; of several, the lowest: rather send one too many to a doctor.
    """
    values, group = score.double().unique(return_inverse=True)
    if positive.all() or not positive.any() or len(values) == 1:
        return 0.5
    below = [torch.bincount(group[member], minlength=len(values)).cumsum(0)[:-1] / member.sum()
             for member in (positive, ~positive)]  # the threshold lies above the first, the second ... value
    best = (below[1] - below[0]).argmax()
    return float((values[best] + values[best + 1]) / 2)


# ---- masks ----

def dice(counts: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) (Dice 1945, Ecology 26:297) from (..., 3) counts of both, predicted, true pixels.

    Nothing there and nothing found is right: 0 / 0 counts as 1. nan counts, of a mask that is not known, stay nan.
    """
    both, predicted, true = counts.double().unbind(-1)
    return torch.where(predicted + true == 0, 1.0, 2 * both / (predicted + true).clamp(min=1))


def iou(counts: Tensor) -> Tensor:
    """|A and B| / |A or B| (Jaccard 1912) from the same counts as `dice`, with the same convention for 0 / 0."""
    both, predicted, true = counts.double().unbind(-1)
    return torch.where(predicted + true == 0, 1.0, both / (predicted + true - both).clamp(min=1))


LEVELS = 1024  # of a pixel's log odds, -16 to 16, that are kept for each photograph; 0.5 lies between two of them
FINE = 4096  # parts of a level that are told apart where all pixels of a split are ranked: 7.6e-6 of log odds
HALF = LEVELS * FINE // 2  # the fine level at which 0.5 lies


def fine_odds(probability: np.ndarray) -> Tensor:
    """Probabilities (n,) -> log odds in fine levels, -HALF to HALF - 1; of the same type."""
    inside = torch.from_numpy(probability).clamp(6e-8, 1 - 6e-8)  # beyond 16 anyway; the logarithm of 0 is slow
    return inside.logit_().mul_(HALF / 16).clamp_(-HALF, HALF - 1)


def counted(probability: np.ndarray, width: int) -> np.ndarray:
    """How many probabilities (n,) there are in each level, of `width` fine ones: (LEVELS * FINE / width,)."""
    if not len(probability):
        return np.zeros(LEVELS * FINE // width, np.int64)
    level, step = torch.empty(len(probability), dtype=torch.int32), 1 << 20  # in parts, for the sake of memory
    for k in range(0, len(probability), step):
        odds = fine_odds(probability[k:k + step]).div_(width).floor_()  # first down, then move: no rounding
        level[k:k + step] = odds.int().add_(HALF // width)
    return torch.bincount(level, minlength=LEVELS * FINE // width).numpy()


def level_of(threshold: float) -> int:
    """The first coarse level at or above a probability."""
    return max(0, min(LEVELS, math.ceil(LEVELS / 32 * (math.log(threshold / (1 - threshold)) + 16) - 1e-6)))


def threshold_at(level: int) -> float:
    """The probability at which a coarse level begins."""
    return 1 / (1 + math.exp(16 - 32 * level / LEVELS))


def average_precision(others: Tensor, true: Tensor) -> Tensor:
    """Area under the precision-recall curve, sum_k (R_k - R_(k-1)) P_k over falling thresholds (Boyd, Eng & Page 2013,

    ECML, "average precision"), from how many true and other pixels have each level of score, levels ascending
    (..., K) -> (...). Pixels of one level pass the threshold together. nan where no pixel is true.
    """
    precision, recall = precision_recall(others, true)
    return (recall.diff(dim=-1, prepend=torch.zeros_like(recall[..., :1])) * precision).sum(-1)


def precision_recall(others: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Both at each falling threshold, from the same counts (..., K) -> (..., K) each.

    Precision is 0 where nothing passes, recall nan where no pixel is true.
    """
    others, true = (x.double().flip(-1).cumsum(-1) for x in (others, true))
    return true / (others + true).clamp(min=1), true / true[..., -1:]


def ranked_area(true: np.ndarray, above: np.ndarray) -> float:
    """The same from the ascending scores of all true pixels (t,) and how many others score as high or higher (t,):

    the mean over true pixels of the precision at their score. nan where there is none.
    """
    hits = len(true) - np.searchsorted(true, true)
    return float((hits / (hits + above)).mean()) if len(true) else NAN


class PRCurveAccumulator:
    """All pixels of a split ranked by score, channel by channel, in memory that grows with the true ones alone.

    Scores of true pixels, which are few, are kept, and so are those of the others up to `most`; from then on these are
    counted by fine levels. Until then areas are exact; then they differ from a sort of all pixels by less than 1e-6
    (tested), as long as log odds beyond 16 either way, which count as 16, are few.
    """
    most = 1 << 23  # other pixels of a channel

    def __init__(self, channels: int):
        self.true = [[] for _ in range(channels)]
        self.others = [[] for _ in range(channels)]
        self.counts = [None] * channels  # (LEVELS * FINE,)

    def add(self, channel: int, probability: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
        """Take in the pixels of one photograph, any shape of float32 and bool; -> its own area under the curve,

        counts (2, LEVELS) of its other and true pixels by coarse level.
        """
        probability, truth = probability.ravel(), truth.ravel()
        true, others = probability[truth], probability[~truth]
        true.sort(), others.sort()
        if self.counts[channel] is None and len(others) + sum(map(len, self.others[channel])) > self.most:
            self.count(channel)
        if self.counts[channel] is None:
            self.others[channel].append(others)
            coarse = counted(others, FINE)
        else:
            fine = counted(others, 1)
            self.counts[channel] += fine
            coarse = fine.reshape(LEVELS, FINE).sum(1)
        self.true[channel].append(true)
        area = ranked_area(true, len(others) - np.searchsorted(others, true))
        return area, np.stack([coarse, counted(true, FINE)])

    def count(self, channel: int) -> None:
        """Count the other pixels of a channel from now on, in place of keeping them."""
        counts = counted(np.concatenate([np.zeros(0, np.float32), *self.others[channel]]), 1)
        self.counts[channel] = counts if self.counts[channel] is None else self.counts[channel] + counts
        self.others[channel].clear()

    def merge(self, other: "PRCurveAccumulator") -> None:
        """Take in all pixels that `other` has seen, which is of no use after that."""
        for channel, others in enumerate(self.others):
            self.true[channel] += other.true[channel]
            others += other.others[channel]
            counting = self.counts[channel] is not None or other.counts[channel] is not None
            if counting or sum(map(len, others)) > self.most:
                self.count(channel)
            if other.counts[channel] is not None:
                self.counts[channel] += other.counts[channel]

    def area(self, channel: int) -> float:
        """Area under the precision-recall curve over all pixels seen; nan where none is true."""
        true = np.sort(np.concatenate(self.true[channel] or [np.zeros(0, np.float32)]))
        counts = self.counts[channel]
        if counts is None:
            others = np.sort(np.concatenate(self.others[channel] or [true]))
            return ranked_area(true, len(others) - np.searchsorted(others, true))
        exact = fine_odds(true.astype(np.float64)).numpy() + HALF
        level = exact.astype(np.int64)
        # within a level scores are spread evenly, but for one so full that it must hold equal scores, and where float32
        # has no more than one value in a level: 2^-24 from the next near 1
        tied = (counts[level] > counts.sum() / 4000) | (true > 1 - 2 ** -24 * HALF / 16)
        share = np.where(tied, 1, level + 1 - exact)
        higher = counts[::-1].cumsum()[::-1]  # as high as a level or higher
        return ranked_area(true, higher[level] - counts[level] * (1 - share))


def masks_at(counts: Tensor, level: int | Tensor) -> Tensor:
    """Counts (n, L, 2, K) of other and true pixels by level -> (n, L, 3): both, predicted, true, from `level` up.

    `level` may be one for all classes or one for each (L,).
    """
    above = torch.arange(counts.shape[3]) >= torch.as_tensor(level).reshape(-1, 1)  # (1 or L, K)
    others, true = (counts * above[:, None]).sum(3).unbind(2)  # (n, L)
    return torch.stack([true, others + true, counts[:, :, 1].sum(2)], 2)
