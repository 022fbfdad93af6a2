"""What a task is, and the tasks. A task names its label, head, loss, decoding and metrics in one class.

Read Task first, then Grading, Lesions and Landmarks as its three examples. To add a task, write one more class and list
it in TASKS; `train.py --tasks` then knows its name. Metrics are functions of per-photograph tallies collected over a
whole split, never means of batches.

    python -c "from tasks import TASKS; print(*TASKS)"
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model

# n photographs with the label, L lesion classes, G grades, P points, S side of the photograph in pixels

UNKNOWN = 255  # in a mask: whether this kind of lesion is there is not known (as in data.py)


class Task:
    """One question about a photograph. All outputs and targets have one row per labelled photograph."""
    name: str  # the word for --tasks
    label: str  # the field of a record or sample that must not be None for the photograph to count as labelled
    primary: str  # the metric that selects checkpoints, at most 1, higher is better
    weight: float = 1.0  # of its loss in the sum

    def labelled(self, record) -> bool:
        """Whether a record or sample carries this task's label."""
        return getattr(record, self.label) is not None

    def head(self, spec: model.MapSpec) -> nn.Module:
        """The layer that turns five maps, which `spec` describes, into this task's raw output."""
        raise NotImplementedError

    def target(self, sample) -> Tensor:
        """What the loss compares with, from a sample whose label is present."""
        raise NotImplementedError

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar, a mean over the rows."""
        raise NotImplementedError

    def decode(self, output: Tensor) -> Tensor:
        """Raw output -> answer in human units (n, ...): probabilities, masks, points."""
        raise NotImplementedError

    def tally(self, answer: Tensor, target: Tensor) -> Tensor:
        """What the metrics need to remember of each photograph: (n, ...), small."""
        raise NotImplementedError

    def metrics(self, tally: Tensor) -> dict[str, float | list]:
        """Metrics of a whole split from all its tallies."""
        raise NotImplementedError

    def row(self, tally: Tensor) -> dict[str, float]:
        """Columns of predictions.csv from one photograph's tally."""
        raise NotImplementedError


# ---- metrics of classes ----

def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """(n,), (n,) -> counts (classes, classes); rows are the truth, columns the prediction."""
    return torch.bincount(truth * classes + predicted, minlength=classes * classes).view(classes, classes)


def quadratic_kappa(confusion: Tensor) -> float:
    """Cohen's kappa with weights (i - j)^2 (Cohen 1968, Psychological Bulletin 70:213).

    1 is agreement, 0 what chance gives with the same shares of classes. If truth and prediction are one and the same
    single class, chance leaves no room for disagreement and kappa is 0 / 0: reported as 0.
    """
    c = confusion.double()
    i = torch.arange(len(c), dtype=torch.float64)
    cost = (i[:, None] - i).square()
    expected = c.sum(1)[:, None] * c.sum(0) / c.sum()
    by_chance = (cost * expected).sum()
    return float(1 - (cost * c).sum() / by_chance) if by_chance > 0 else 0.0


def macro_f1(confusion: Tensor) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); classes that neither occur nor are predicted are left out."""
    c = confusion.double()
    both = c.sum(0) + c.sum(1)
    return float((2 * c.diagonal()[both > 0] / both[both > 0]).mean())


class Classification(Task):
    """A label 0..classes-1 from the whole photograph."""
    classes: int
    ordered = True  # neighbouring classes are alike, so that quadratic kappa means something

    def head(self, spec):
        return model.PooledHead(spec, self.classes)

    def target(self, sample):
        return torch.tensor(getattr(sample, self.label))

    def loss(self, output, target):
        return F.cross_entropy(output, target)

    def decode(self, output):
        return output.softmax(1)  # (n, G)

    def tally(self, answer, target):
        return torch.cat([answer, target[:, None]], 1)  # (n, G + 1): probabilities, truth

    def metrics(self, tally):
        confusion = confusion_matrix(tally[:, -1].long(), tally[:, :-1].argmax(1), self.classes)
        kappa = {"kappa": quadratic_kappa(confusion)} if self.ordered else {}
        return {"accuracy": float(confusion.diagonal().sum() / confusion.sum()), **kappa,
                "macro_f1": macro_f1(confusion), "confusion": confusion.tolist()}

    def row(self, tally):
        *probabilities, truth = tally.tolist()
        return {"truth": int(truth), "predicted": int(tally[:-1].argmax()),
                **{f"p{i}": round(p, 4) for i, p in enumerate(probabilities)}}


class Grading(Classification):
    """Diabetic retinopathy, grade 0 (none) to 4 (proliferative)."""
    name, label, primary, classes = "cls", "grade", "kappa", 5


class Edema(Classification):
    """Risk of macular edema, 0 to 2."""
    name, label, primary, classes = "dme", "edema", "accuracy", 3


class Categories(Classification):
    """Which of the folders of a data set a photograph belongs to; the task `cls` where the data are such folders."""
    name, label, primary, ordered = "cls", "category", "accuracy", False

    def __init__(self, names: Sequence[str]):
        self.names, self.classes = tuple(names), len(names)

    def row(self, tally):
        *probabilities, truth = tally.tolist()
        return {"truth": self.names[int(truth)], "predicted": self.names[int(tally[:-1].argmax())],
                **{f"p_{name}": round(p, 4) for name, p in zip(self.names, probabilities)}}


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


class Lesions(Task):
    """Masks of four lesion kinds and the optic disc, each pixel an independent yes/no for each kind."""
    name, label, primary = "seg", "masks", "dice"
    classes = ("MA", "HE", "EX", "SE", "OD")  # the order of the channels of a sample's masks

    def head(self, spec):
        return model.MaskHead(spec, len(self.classes))

    def target(self, sample):
        return sample.masks  # (L, S, S) uint8: 0, 1, or UNKNOWN for all pixels of a kind

    def loss(self, output, target):
        """Cross-entropy of each pixel, and soft Dice (Milletari et al. 2016, arXiv 1606.04797, section 3).

        The overlap is taken over all rows of a batch: most photographs lack some lesion, and their own Dice would
        jump between 0 and 1 on a single pixel. Masks that are not known count in neither.
        """
        known, truth = ((target != UNKNOWN).to(output.dtype), (target == 1).to(output.dtype))
        p = output.sigmoid() * known
        overlap = (p * truth).sum((0, 2, 3))  # (L,)
        soft_dice = (2 * overlap + 1) / (p.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1)
        entropy = F.binary_cross_entropy_with_logits(output, truth, known) * (known.numel() / known.sum())
        return entropy + 1 - soft_dice.mean()

    def decode(self, output):
        return output.sigmoid()

    def tally(self, answer, target):
        predicted, true = answer > 0.5, target == 1
        pixels = torch.stack([mask.sum((2, 3)) for mask in (predicted & true, predicted, true)], 2).double()
        return pixels.masked_fill((target == UNKNOWN).any(3).any(2)[..., None], math.nan)  # (n, L, 3)

    def metrics(self, tally):
        """`dice` and `iou` pool the pixels of the split and average the lesions that occur there, never the disc.

        Pooled first, because a mean of per-image values rewards a model that finds nothing: an image without a lesion
        then scores 1. For the same reason a kind that occurs nowhere in the split is left out (`lesions` counts the
        kinds that do occur). A kind that is not known for any photograph has no value of its own. Where nothing but
        the disc is known, the disc counts.
        """
        pooled = tally.nansum(0)
        occurs = pooled[:, 2] > 0
        if not tally[:, :-1].isnan().all():
            occurs[-1] = False
        values = {"lesions": int(occurs.sum())}
        single = {name: score(tally).nanmean(0) for name, score in (("dice", dice), ("iou", iou))}  # (L,)
        for name, score in (("dice", dice), ("iou", iou)):
            values[name] = float(score(pooled)[occurs].mean()) if occurs.any() else 0.0
            values[f"{name}_per_image"] = float(single[name][occurs].mean()) if occurs.any() else 0.0
        for name, score in (("dice", dice), ("iou", iou)):
            for i, kind in enumerate(self.classes):
                if not tally[:, i].isnan().all():
                    values[f"{name}_{kind}"] = float(score(pooled)[i])
                    values[f"{name}_{kind}_per_image"] = float(single[name][i])
        return values

    def row(self, tally):
        columns = {}
        for kind, counts in zip(self.classes, tally):
            values = ["", "", ""] if counts.isnan().any() else [round(float(dice(counts)), 4), *map(int, counts[1:])]
            columns |= dict(zip((f"dice_{kind}", f"predicted_pixels_{kind}", f"true_pixels_{kind}"), values))
        return columns


# ---- points ----

DISC_DIAMETER = 0.154  # of the side of a sample: 54 discs of IDRiD's training part measure 0.154 +- 0.014
ORIGINAL_WIDTH = 4288  # of IDRiD's photographs in pixels, the unit of its literature


def soft_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Heatmaps (n, P, h, w) -> expected position (n, P, 2), x and y as shares of the sides, and probabilities.

    The expectation can be differentiated, which the argmax cannot (DSNT: Nibali et al. 2018, arXiv 1801.07372).
    """
    height, width = logits.shape[2:]
    p = logits.flatten(2).softmax(2).view_as(logits)
    x = (torch.arange(width, device=p.device, dtype=p.dtype) + 0.5) / width  # of the cells' centres
    y = (torch.arange(height, device=p.device, dtype=p.dtype) + 0.5) / height
    return torch.stack([(p.sum(2) * x).sum(2), (p.sum(3) * y).sum(2)], 2), p


def gaussian_heatmap(points: Tensor, height: int, width: int, sigma: float = 1.0) -> Tensor:
    """Points (n, P, 2) as shares of the sides -> normalised Gaussians (n, P, h, w) of `sigma` cells."""
    x = torch.arange(width, device=points.device) + 0.5 - points[..., 0, None] * width  # (n, P, w)
    y = torch.arange(height, device=points.device) + 0.5 - points[..., 1, None] * height  # (n, P, h)
    square = x.square()[..., None, :] + y.square()[..., :, None]
    return (-square / (2 * sigma ** 2)).flatten(2).softmax(2).view(*points.shape[:2], height, width)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (n, P, h, w) -> (n, P), in nats (Lin 1991, IEEE Trans. IT 37:145)."""
    middle = 0.5 * (p + q)

    def kl(a):
        return (a * ((a + 1e-12).log() - (middle + 1e-12).log())).sum((2, 3))
    return 0.5 * kl(p) + 0.5 * kl(q)


class Landmarks(Task):
    """Centres of the optic disc and of the fovea."""
    name, label, primary = "loc", "points", "within_radius"
    classes = ("disc", "fovea")  # the order of a sample's points

    def head(self, spec):
        return model.PointHead(spec, len(self.classes))

    def target(self, sample):
        """(P + 4, 2): the points as shares of the side, nan where not known; then what turns shares into other units.

        Along x and y: where the sample begins and what its side measures in pixels of the file; its side in pixels of
        a 4288 pixels wide original and in disc diameters.
        """
        g, side = sample.geometry, sample.image.shape[-1]
        begin, pixels = (-g.shift_x / g.scale_x, -g.shift_y / g.scale_y), (side / g.scale_x, side / g.scale_y)
        original = [ORIGINAL_WIDTH / g.width * p for p in pixels]
        return torch.cat([sample.points / side, torch.tensor([begin, pixels, original, [1 / DISC_DIAMETER] * 2])])

    def loss(self, output, target):
        """Smooth L1 of the expected point, and divergence of its heatmap from a Gaussian of one cell around the truth

        (Nibali et al. 2018, arXiv 1801.07372, whose first term is the Euclidean distance). Points that are not known
        count in neither.
        """
        truth = target[:, :-4]
        known = ~truth.isnan().any(2)  # (n, P)
        truth = torch.where(known[..., None], truth, 0.5)
        points, p = soft_argmax(output)
        # coordinates -1 to 1 as in the paper; quadratic within one cell, linear beyond
        distance = F.smooth_l1_loss(2 * points, 2 * truth, beta=2 / output.shape[3], reduction="none").sum(2)
        divergence = js_divergence(p, gaussian_heatmap(truth, *output.shape[2:]))
        return ((distance + divergence) * known).sum() / known.sum().clamp(min=1)

    def decode(self, output):
        return soft_argmax(output)[0]  # (n, P, 2) as shares of the side

    def tally(self, answer, target):
        """(n, P, 6): distance in pixels of the original, in disc diameters; answer and truth in pixels of the file."""
        truth, (begin, pixels, original, diameters) = target[:, :-4], target[:, -4:].unbind(1)
        gaps = [((answer - truth) * unit[:, None]).norm(dim=2) for unit in (original, diameters)]  # (n, P)
        return torch.cat([torch.stack(gaps, 2), *(begin[:, None] + p * pixels[:, None] for p in (answer, truth))], 2)

    def metrics(self, tally):
        """`within_radius`, the share of points closer than one disc radius, and distances.

        These are in disc diameters and in pixels of a photograph 4288 pixels wide (px4288), whatever the width of the
        file, so that data sets compare.
        """
        values = {}
        for i, point in enumerate(self.classes):
            pixels, diameters = (x[~x.isnan()] for x in tally[:, i, :2].unbind(1))
            if len(pixels):
                values |= {f"within_radius_{point}": float((diameters < 0.5).double().mean()),
                           f"px4288_{point}": float(pixels.mean()),
                           f"median_px4288_{point}": float(pixels.quantile(0.5)),
                           f"diameters_{point}": float(diameters.mean())}
        share = [v for k, v in values.items() if k.startswith("within_radius")]
        return {"within_radius": sum(share) / len(share) if share else 0.0, **values}

    def row(self, tally):
        columns = ("px4288", "diameters", "predicted_x", "predicted_y", "true_x", "true_y")
        return {f"{column}_{point}": "" if math.isnan(v) else round(v, 4)
                for point, values in zip(self.classes, tally.tolist()) for column, v in zip(columns, values)}


TASKS: dict[str, Task] = {task.name: task for task in (Grading(), Edema(), Lesions(), Landmarks())}


def make_tasks(names: Sequence[str], classes: Sequence[str] = ()) -> list[Task]:
    """The tasks with these names; `cls` tells the `classes` of the data set apart where it has any of its own."""
    return [Categories(classes) if name == Categories.name and classes else TASKS[name] for name in names]
