"""How the answers of each kind of task are scored: what is remembered of a photograph, and measures of a whole split.

Measures (metrics.py) are functions of per-photograph statistics collected over a split, never means of batches.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina.datasets.records import UNKNOWN, number_first
from retina.evaluation import metrics
from retina.evaluation.metrics import PRCurveAccumulator
from retina.files import InputError


# n photographs with the label, D weightings of them, L lesion classes, G grades, P points, K levels of a pixel's score,
# S side of the photograph in pixels


# simulated, logits wrong by a factor of 1.3: the fit changes log loss by 0.1 from 10, 0.01 from 30, -0.01 from 40 on
FEWEST_FOR_TEMPERATURE = 40
# photographs with what a threshold is of, and for referable without: from fewer, masks of IDRiD lose 0.02 to 0.07 of
# Dice on other photographs; simulated grades gain nothing in sensitivity + specificity, except where few are ill
FEWEST_FOR_THRESHOLD = 5


class TaskMetrics:
    """How the answers to one question are scored, calibrated and told. Every task is one, too; see tasks.py."""
    primary: str  # the metric that selects checkpoints
    worst, best = 0.0, 1.0  # of the primary metric: checkpoints are compared by where between these two it lies

    def check_range(self) -> None:
        """InputError: the primary metric has no name, or there is no way from its worst to its best value."""
        primary, ends = getattr(self, "primary", None), (self.worst, self.best)
        if not (isinstance(primary, str) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in ends) and
                self.worst != self.best):
            raise InputError(f"the task {self.name}: primary = {primary!r}, worst = {self.worst}, best = {self.best}; "
                             "expected a metric's name and two different finite numbers; correct them in its class")

    def score(self, values: Mapping[str, float]) -> float:
        """0 where the primary metric among `values` is worst, 1 where it is best. InputError: it has no value."""
        value = values.get(self.primary)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"the task {self.name}: its primary metric {self.primary!r} is {value}; expected a finite "
                             f"number among those of its metrics(): {', '.join(values)}")
        return (value - self.worst) / (self.best - self.worst)

    def classes_in(self, target: Tensor) -> dict[str, bool]:
        """{class: whether a photograph's target has it}, of those that are known; {}: there are no classes."""
        return {}

    def tells_apart(self, counts: Mapping[str, int]) -> bool:
        """Whether the primary metric can be better or worse on a split in which so many photographs have each class."""
        return True

    def constant_guess(self, targets: Tensor) -> Tensor | None:
        """An answer (1, ...) that serves any photograph, from the targets of training (n, ...); None: there is none."""
        return None

    def accumulator(self) -> PRCurveAccumulator | None:
        """A collector of what the statistics of single photographs cannot tell; None: there is nothing of the kind."""
        return None

    def image_stats(self, answer: Tensor, target: Tensor, accumulator: PRCurveAccumulator | None = None) -> Tensor:
        """What the measures need to remember of each photograph: (n, ...), small. `accumulator` takes in the rest."""
        raise NotImplementedError

    def calibrate(self, stats: Tensor) -> dict[str, Any]:
        """What is fitted on validation and stored in the run: a temperature, thresholds.

        What too few photographs show keeps its usual value, and stands in "few" with their number and the least.
        """
        return {}

    def compute(self, stats: Tensor, weights: Tensor, calibration: Mapping[str, float]) -> dict[str, Tensor]:
        """{measure: (D,)} of D splits at once, in which photographs count as `weights` (D, n) say; see metrics.py."""
        raise NotImplementedError

    def metrics(self, stats: Tensor, calibration: Mapping[str, float] = MappingProxyType({}),
                accumulator: PRCurveAccumulator | None = None) -> dict[str, float | int | list]:
        """Measures of a whole split from all its statistics."""
        values = self.compute(stats, torch.ones(1, len(stats), dtype=torch.float64), calibration)
        return {name: float(value) for name, value in values.items()}

    def scored_columns(self, stats: Tensor, calibration: Mapping[str, float]) -> dict[str, float | str]:
        """Columns of per_photograph.csv from one photograph's statistics; the true values end in _true."""
        raise NotImplementedError

    def caption(self, columns: Mapping[str, float | str]) -> list[str]:
        """What `columns`, made by `predicted_columns`, say in words: lines for a picture."""
        return []

    def predicted_columns(self, answer: Tensor, sample, calibration: Mapping[str, float]) -> dict[str, float | str]:
        """Columns of predictions.csv for a new photograph, which `sample` shows, from its decoded answer (one row)."""
        return {}


# ---- classes ----

class ClassMetrics(TaskMetrics):
    """Of a label 0..classes-1."""
    classes: int
    names: Sequence[str] | None = None  # of the classes; None: their numbers
    prefix = "p"  # of the columns of probabilities
    title = "class"  # in words
    ordered = True  # neighbouring classes are alike, so that quadratic kappa means something

    def image_stats(self, answer, target, accumulator=None):
        return torch.cat([answer, target[:, None]], 1)  # (n, G + 1): probabilities, truth

    def classes_in(self, target):
        return {str(self.word(k)): k == int(target) for k in range(self.classes)}

    def tells_apart(self, counts):
        """Where all photographs have one class, kappa is 0 or 0 / 0, and accuracy rewards whoever always says it."""
        return sum(n > 0 for n in counts.values()) > 1

    def constant_guess(self, targets):
        """The shares of the classes."""
        return torch.bincount(targets, minlength=self.classes)[None] / len(targets)

    def right(self, stats: Tensor) -> Tensor:
        """Which photographs have the right class: (n,) bool."""
        return stats[:, :-1].argmax(1) == stats[:, -1]

    def calibrate(self, stats):
        if len(stats) < FEWEST_FOR_TEMPERATURE:
            return {"temperature": 1.0, "few": {"temperature": [len(stats), FEWEST_FOR_TEMPERATURE]}}
        return {"temperature": metrics.best_temperature(stats[:, :-1], stats[:, -1].long())}

    def compute(self, stats, weights, calibration):
        p, truth = stats[:, :-1].double(), stats[:, -1].long()
        predicted = p.argmax(1)
        labels = truth, predicted, self.classes, weights
        values = {"accuracy": metrics.accuracy(truth, predicted, weights),
                  "balanced_accuracy": metrics.balanced_accuracy(*labels)}
        if self.ordered:
            values["kappa"] = metrics.quadratic_kappa(*labels)
        values |= {"macro_f1": metrics.macro_f1(*labels), "auc": metrics.one_vs_rest_area(p, truth, weights),
                   "calibration_error": metrics.calibration_error(p, truth, weights)}
        if "temperature" in calibration:
            p = metrics.at_temperature(p, calibration["temperature"])
            values["calibration_error_at_temperature"] = metrics.calibration_error(p, truth, weights)
        return values

    def metrics(self, stats, calibration=MappingProxyType({}), accumulator=None):
        confusion = metrics.confusion_matrix(stats[:, -1].long(), stats[:, :-1].argmax(1), self.classes)
        return super().metrics(stats, calibration) | {"confusion": confusion.tolist()}

    def word(self, number: int) -> int | str:
        """What stands for a class in tables."""
        return number if self.names is None else self.names[number]

    def scored_columns(self, stats, calibration):
        true = {f"{self.label}_true": self.word(int(stats[-1]))}
        return self.predicted_columns(stats[:-1], None, calibration) | true

    def predicted_columns(self, answer, sample, calibration):
        """The most probable class, and the probabilities at the temperature of `calibration`."""
        p = metrics.at_temperature(answer[None], calibration["temperature"])[0]
        return {self.label: self.word(int(p.argmax())),
                **{f"{self.label}_{self.prefix}{self.word(i)}": round(v, 4) for i, v in enumerate(p.tolist())}}

    def caption(self, columns):
        word = columns[self.label]
        return [f"{self.title} {word} (p {columns[f'{self.label}_{self.prefix}{word}']:.2f})"]


class GradeMetrics(ClassMetrics):
    """Of grades of retinopathy; referable: to be seen by a doctor, grade 2 and up."""

    def referable(self, p: Tensor, temperature: float) -> Tensor:
        """Probability (n,) of grade 2 and up at a temperature, from those of the grades at 1 (n, G).

        Four digits, as tables show it: what is printed is what is compared with the threshold.
        """
        return metrics.at_temperature(p, temperature)[:, 2:].sum(1).round(decimals=4)

    def calibrate(self, stats):
        calibration, ill = super().calibrate(stats), stats[:, -1] >= 2
        fewer = min(int(ill.sum()), int((~ill).sum()))
        if fewer < FEWEST_FOR_THRESHOLD:
            few = calibration.get("few", {}) | {"referable": [fewer, FEWEST_FOR_THRESHOLD]}
            return calibration | {"referable": 0.5, "few": few}
        p = self.referable(stats[:, :-1], calibration["temperature"])
        # four digits here, too; upwards, since the same photographs then lie below it
        return calibration | {"referable": math.ceil(round(1e4 * metrics.best_threshold(p, ill), 3)) / 1e4}

    def compute(self, stats, weights, calibration):
        """Beside those of all classes: of referable or not, the area under the ROC curve (at temperature 1),

        sensitivity and specificity at the temperature and threshold of `calibration`.
        """
        values = super().compute(stats, weights, calibration)
        p, ill = stats[:, :-1], stats[:, -1] >= 2
        values["referable_auc"] = metrics.roc_area(p[:, 2:].sum(1), ill, weights)
        if "referable" in calibration:
            referred = self.referable(p, calibration["temperature"]) >= round(calibration["referable"], 4)
            values |= {"referable_sensitivity": metrics.sensitivity(referred, ill, weights),
                       "referable_specificity": metrics.sensitivity(~referred, ~ill, weights)}
        return values

    def predicted_columns(self, answer, sample, calibration):
        p, threshold = (float(self.referable(answer[None], calibration["temperature"])),
                        round(calibration["referable"], 4))
        return super().predicted_columns(answer, sample, calibration) | {
            "referable": "yes" if p >= threshold else "no", "referable_p": p, "referable_threshold": threshold}

    def caption(self, columns):
        word, p, threshold = (columns[f"referable{end}"] for end in ("", "_p", "_threshold"))
        return [*super().caption(columns), f"referable: {word} (p {p:.4f}, threshold {threshold:.4f})"]


class FineMetrics(ClassMetrics):
    """Of one of many classes, of which each may be part of a broad class, such as a grade."""
    broad: Sequence[str] = ()  # of each class the broad one; (): they have none
    ordered, most = False, 5

    def of_broad(self) -> tuple[list[str], Tensor]:
        """The broad classes, and the number of each class's own: (C,)."""
        names = sorted(set(self.broad), key=number_first)
        return names, torch.tensor([names.index(b) for b in self.broad])

    def compute(self, stats, weights, calibration):
        """Also the share of photographs whose class is among the five most probable; and those of the broad class,

        whose probability is the sum of those of its classes.
        """
        p, truth = stats[:, :-1].double(), stats[:, -1].long()
        best = p.topk(min(self.most, self.classes), 1).indices
        values = {"top5": metrics.mean((best == truth[:, None]).any(1), weights)}
        if self.broad:
            names, of = self.of_broad()
            summed = torch.zeros(len(p), len(names), dtype=p.dtype).index_add_(1, of, p)
            values["broad_accuracy"] = metrics.accuracy(of[truth], summed.argmax(1), weights)
            if all(name.isdecimal() for name in names):
                grade = torch.tensor([int(name) for name in names])  # some may have no class
                values["broad_kappa"] = metrics.quadratic_kappa(grade[of[truth]], grade[summed.argmax(1)],
                                                                int(grade.max()) + 1, weights)
        return values | super().compute(stats, weights, calibration)

    def predicted_columns(self, answer, sample, calibration):
        """The five most probable classes with their probabilities."""
        p = metrics.at_temperature(answer[None], calibration["temperature"])[0]
        top = p.topk(min(self.most, self.classes))
        columns = {self.label: self.word(int(top.indices[0]))}
        for k, (value, i) in enumerate(zip(*map(Tensor.tolist, top)), 1):
            columns |= {f"{self.label}_{k}": self.word(i), f"{self.label}_{k}_p": round(value, 4)}
        return columns

    def caption(self, columns):
        return [f"{self.title} {columns[self.label]} (p {columns[f'{self.label}_1_p']:.2f})"]


class Joint(TaskMetrics):
    """Whether the answers of `cls` and `dme` are both right, as IDRiD's challenge counted; nothing to train."""
    name, primary = "joint", "accuracy"

    def compute(self, stats, weights, calibration):
        """From (n,) 1 where both are right, else 0."""
        return {"accuracy": metrics.mean(stats, weights)}

    def right(self, stats):
        return stats > 0.5


# ---- signs ----

class SignMetrics(TaskMetrics):
    """Of several signs, each there or not, or not known."""
    classes: Sequence[str]
    title = "signs"

    def image_stats(self, answer, target, accumulator=None):
        return torch.stack([answer, target], 2)  # (n, S, 2): probability; truth, nan where it is not known

    def classes_in(self, target):
        return {name: bool(x == 1) for name, x in zip(self.classes, target) if not x.isnan()}

    def tells_apart(self, counts):
        """A sign that no photograph has, or every one, has no area; how many there are, counts do not say."""
        return any(counts.values())

    def score(self, values):
        """Chance where no sign has an area, so that it chooses no checkpoint."""
        return 0.5 if math.isnan(values[self.primary]) else super().score(values)

    def constant_guess(self, targets):
        """Of each sign the share of photographs that have it."""
        return targets.nanmean(0, keepdim=True).nan_to_num()

    def calibrate(self, stats):
        """Of each sign the threshold of Youden 1950; 0.5 for those that few photographs have, or lack."""
        calibration, few = {}, {}
        for name, (p, truth) in zip(self.classes, (column.T for column in stats.unbind(1))):
            known = ~truth.isnan()
            ill = truth[known] == 1
            fewer = min(int(ill.sum()), int((~ill).sum()))
            # "sign_", as in tables: a sign may be called "few"
            calibration[f"sign_{name}"] = metrics.best_threshold(p[known], ill) if fewer >= FEWEST_FOR_THRESHOLD \
                else 0.5
            if fewer < FEWEST_FOR_THRESHOLD:
                few[f"sign_{name}"] = [fewer, FEWEST_FOR_THRESHOLD]
        return calibration | ({"few": few} if few else {})

    def compute(self, stats, weights, calibration):
        """Area under the ROC curve and average precision of each sign, and their means over the signs that occur."""
        areas = {"auc": [], "aupr": []}
        for p, truth in (column.T for column in stats.double().unbind(1)):
            known = ~truth.isnan()
            there, w = truth[known] == 1, weights[:, known]
            areas["auc"].append(metrics.roc_area(p[known], there, w))
            areas["aupr"].append(metrics.ranked_precision(p[known], there, w))
        values = {}
        for name, of_signs in areas.items():
            values[name] = torch.stack(of_signs, 1).nanmean(1)
            values |= {f"{name}_{sign}": area for sign, area in zip(self.classes, of_signs)}
        return values

    def metrics(self, stats, calibration=MappingProxyType({}), accumulator=None):
        """Also the signs that no photograph has, or every one."""
        values = super().metrics(stats, calibration)
        return values | {"unscored": [name for name in self.classes if math.isnan(values[f"auc_{name}"])]}

    def scored_columns(self, stats, calibration):
        return {f"sign_{name}{end}": round(v, 4) if v == v else "" for name, both in zip(self.classes, stats.tolist())
                for end, v in zip(("_p", "_true"), both)}

    def predicted_columns(self, answer, sample, calibration):
        columns = {}
        for name, p in zip(self.classes, answer.tolist()):
            column = f"sign_{name}"
            columns |= {column: "yes" if p >= calibration[column] else "no", f"{column}_p": round(p, 4)}
        return columns

    def caption(self, columns):
        there = [name for name in self.classes if columns[f"sign_{name}"] == "yes"]
        return [f"signs: {', '.join(there) or 'none'}"]


# ---- masks ----

class MaskMetrics(TaskMetrics):
    """Of masks of several classes; the last one, the optic disc, is never part of a mean."""
    classes: Sequence[str]

    def accumulator(self):
        return PRCurveAccumulator(len(self.classes))

    def classes_in(self, target):
        return {name: bool((mask == 1).any()) for name, mask in zip(self.classes, target)
                if not (mask == UNKNOWN).any()}

    def averaged(self, names: Collection[str]) -> list[str]:
        """The classes that means are over, where these are known: lesions, and the disc where it is all there is."""
        return [c for c in self.classes[:-1] if c in names] or list(self.classes[-1:])

    def tells_apart(self, counts):
        """A class without a true pixel has no pooled Dice."""
        return any(counts.get(c) for c in self.averaged(counts))

    def constant_guess(self, targets):
        """No lesion."""
        return torch.zeros(1, *targets.shape[1:])

    def count(self, channel: int, answer: np.ndarray, truth: np.ndarray | None,
              accumulator: PRCurveAccumulator) -> Tensor:
        """One class on one photograph, probabilities and truth of any one shape: (2 K + 1,)

        Other pixels by level of score, true ones, and the area under this photograph's own precision-recall curve; nan
        where the truth is not known (None).
        """
        if truth is None:
            return torch.full((2 * metrics.LEVELS + 1,), math.nan, dtype=torch.float64)
        area, counts = accumulator.add(channel, answer, truth)
        return torch.from_numpy(np.append(counts.astype(np.float64), area))

    def image_stats(self, answer, target, accumulator=None):
        """(n, L, 2 K + 1), see `count`; nan for classes that are not known."""
        answer, target, accumulator = (answer.float().cpu().numpy(), target.cpu().numpy(),
                                       accumulator or self.accumulator())
        return torch.stack([torch.stack([
            self.count(channel, probability, None if (mask == UNKNOWN).any() else mask == 1, accumulator)
            for channel, (probability, mask) in enumerate(zip(*photograph))]) for photograph in zip(answer, target)])

    def at(self, stats: Tensor, thresholds: Sequence[float]) -> Tensor:
        """Counts (n, L, 3) of both, predicted, true pixels at a threshold for each class, from statistics."""
        level = torch.tensor([metrics.level_of(t) for t in thresholds])
        return metrics.masks_at(stats[..., :-1].unflatten(2, (2, metrics.LEVELS)), level)

    def calibrate(self, stats):
        """For each class the threshold of the highest pooled Dice; 0.5 for those that few photographs show."""
        levels = stats[..., :-1].nan_to_num().unflatten(2, (2, metrics.LEVELS))  # (n, L, 2, K)
        shown = (levels[:, :, 1].sum(2) > 0).sum(0).tolist()
        others, true = levels.sum(0).flip(2).unbind(1)  # (L, K) falling
        both = true.cumsum(1)
        scores = metrics.dice(torch.stack([both, both + others.cumsum(1), both[:, -1:].expand_as(both)], 2))
        best = metrics.LEVELS - 1 - scores.argmax(1)
        few = {name: [n, FEWEST_FOR_THRESHOLD] for name, n in zip(self.classes, shown) if n < FEWEST_FOR_THRESHOLD}
        return {name: 0.5 if name in few else metrics.threshold_at(int(best[i]))
                for i, name in enumerate(self.classes)} | ({"few": few} if few else {})

    def compute(self, stats, weights, calibration):
        """Dice, IoU and area under the precision-recall curve (aupr), each of pooled pixels and, averaged, per image.

        The means are over the lesions that occur in the split, never the disc; where nothing but the disc is known,
        the disc counts. Masks at a threshold of 0.5, and `dice_calibrated` at those of `calibration`. Pooled first,
        because a mean of per-image Dice rewards a model that finds nothing: an image without a lesion then scores 1. A
        pooled value of a class without a true pixel in the split, and the area of an image without one, are undefined.

        five_masks_dice is what older work reports as Dice: all five masks of an image in one, then the mean over
        images; five_masks_dice_of_true_disc is what the true optic disc alone would score.
        """
        half = self.at(stats, [0.5] * len(self.classes))  # (n, L, 3)
        known = ~half[..., 0].isnan().all(0)
        occurs = (weights @ half[..., 2].nan_to_num()) > 0  # (D, L)
        counted = occurs.clone()
        if known[:-1].any():
            counted[:, -1] = False

        def pooled(counts):
            return (weights @ counts.nan_to_num().flatten(1)).unflatten(1, counts.shape[1:])

        levels = pooled(stats[..., :-1].unflatten(2, (2, metrics.LEVELS)))  # (D, L, 2, K)
        of_pixels = {"dice": metrics.dice(pooled(half)), "iou": metrics.iou(pooled(half)),
                     "aupr": metrics.average_precision(*levels.unbind(2))}  # (D, L) each
        if calibration:
            of_pixels["dice_calibrated"] = metrics.dice(pooled(self.at(stats, [calibration[c] for c in self.classes])))
        of_pixels = {name: v.masked_fill(~occurs, math.nan) for name, v in of_pixels.items()}
        of_images = {name: metrics.mean(v, weights) for name, v in
                     (("dice", metrics.dice(half)), ("iou", metrics.iou(half)), ("aupr", stats[..., -1]))}
        values = {}
        for ending, by_name in (("", of_pixels), ("_per_image", of_images)):
            for name, value in by_name.items():
                values[name + ending] = value.masked_fill(~counted, math.nan).nanmean(1)
                values |= {f"{name}_{c}{ending}": value[:, i] for i, c in enumerate(self.classes) if known[i]}
        every, disc = half.sum(1), half[:, -1, 2]  # (n, 3), nan where a class is not known; (n,)
        if not every.isnan().all():
            true_disc = torch.stack([disc, disc, every[:, 2]], 1)
            values |= {"five_masks_dice": metrics.mean(metrics.dice(every), weights),
                       "five_masks_dice_of_true_disc": metrics.mean(metrics.dice(true_disc), weights)}
        return values

    def metrics(self, stats, calibration=MappingProxyType({}), accumulator=None):
        """With `accumulator`, the areas over all pixels are exact; without, they rest on the levels of the statistics.

        `lesions` counts the classes that the means are taken over.
        """
        values = super().metrics(stats, calibration)
        names = [c for c in self.averaged([c for c in self.classes if f"dice_{c}" in values])
                 if not math.isnan(values[f"dice_{c}"])]
        if accumulator:
            areas = {f"aupr_{c}": accumulator.area(i) for i, c in enumerate(self.classes) if f"aupr_{c}" in values}
            mean = sum(areas[f"aupr_{c}"] for c in names) / len(names) if names else math.nan
            values |= areas | {"aupr": mean}
        return {"lesions": len(names), **values}

    def scored_columns(self, stats, calibration):
        columns = {}
        for name, counts, levels in zip(self.classes, self.at(stats[None], [0.5] * len(self.classes))[0], stats):
            values = [""] * 4 if counts.isnan().any() else [
                round(float(metrics.dice(counts)), 4), "" if levels[-1].isnan() else round(float(levels[-1]), 4),
                *map(int, counts[1:])]
            columns |= dict(zip((f"dice_{name}", f"aupr_{name}", f"pixels_{name}", f"pixels_{name}_true"), values))
        return columns


# ---- points ----

class LandmarkMetrics(TaskMetrics):
    """Of points; targets come with what turns shares of the side into other units, see tasks.Landmarks.target."""
    classes: Sequence[str]

    def classes_in(self, target):
        return dict(zip(self.classes, (~target[:-4].isnan().any(1)).tolist()))

    def tells_apart(self, counts):
        return any(counts.values())

    def constant_guess(self, targets):
        """The mean place of each."""
        return targets[:, :-4].nanmean(0, keepdim=True)

    def image_stats(self, answer, target, accumulator=None):
        """(n, P, 6): distance in pixels of the original, in disc diameters; answer and truth in pixels of the file."""
        truth, (begin, pixels, original, diameters) = target[:, :-4], target[:, -4:].unbind(1)
        gaps = [((answer - truth) * unit[:, None]).norm(dim=2) for unit in (original, diameters)]  # (n, P)
        return torch.cat([torch.stack(gaps, 2), *(begin[:, None] + p * pixels[:, None] for p in (answer, truth))], 2)

    def compute(self, stats, weights, calibration):
        """`within_radius`, the share of points closer than one disc radius, and distances.

        These are in disc diameters and in pixels of a photograph 4288 pixels wide (px4288), whatever the width of the
        file, so that data sets compare.
        """
        values = {}
        for i, landmark in enumerate(self.classes):
            pixels, diameters = stats[:, i, :2].unbind(1)
            if not pixels.isnan().all():
                near = (diameters < 0.5).double().masked_fill(diameters.isnan(), math.nan)
                values |= {f"within_radius_{landmark}": metrics.mean(near, weights),
                           f"px4288_{landmark}": metrics.mean(pixels, weights),
                           f"median_px4288_{landmark}": metrics.median(pixels, weights),
                           f"diameters_{landmark}": metrics.mean(diameters, weights)}
        share = [v for k, v in values.items() if k.startswith("within_radius")]
        both = torch.stack(share).nanmean(0) if share else torch.full((len(weights),), math.nan, dtype=torch.float64)
        return {"within_radius": both, **values}

    def scored_columns(self, stats, calibration):
        columns = ("{}_px4288", "{}_diameters", "{}_x", "{}_y", "{}_x_true", "{}_y_true")
        return {column.format(landmark): "" if math.isnan(v) else round(v, 4)
                for landmark, values in zip(self.classes, stats.tolist()) for column, v in zip(columns, values)}

    def predicted_columns(self, answer, sample, calibration):
        places = sample.geometry.to_file(answer.double().numpy() * sample.image.shape[-1])
        return {f"{landmark}_{axis}": round(v, 1) for landmark, place in zip(self.classes, places.tolist())
                for axis, v in zip("xy", place)}
