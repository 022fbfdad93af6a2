"""What a task is, and the tasks. A task names its label, head, loss, decoding and metrics in one class.

Read Task first, then Grading and Lesions as its two examples. To add a task, write one more class and list it in
TASKS; `train.py --tasks` then knows its name. Metrics are functions of per-photograph tallies collected over a whole
split, never means of batches.

    python -c "from tasks import TASKS; print(*TASKS)"
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model

# n photographs with the label, L lesion classes, G grades, S side of the photograph in pixels


class Task:
    """One question about a photograph. All outputs and targets have one row per labelled photograph."""
    name: str  # the word for --tasks
    label: str  # the field of a record or sample that must not be None for the photograph to count as labelled
    primary: str  # the metric that selects checkpoints, at most 1, higher is better
    weight: float = 1.0  # of its loss in the sum

    def labelled(self, record) -> bool:
        """Whether a record or sample carries this task's label."""
        return getattr(record, self.label) is not None

    def head(self, encoder: model.Encoder) -> nn.Module:
        """The layer that turns the five maps into this task's raw output."""
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

    def head(self, encoder):
        return model.PooledHead(encoder, self.classes)

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
        return {"accuracy": float(confusion.diagonal().sum() / confusion.sum()),
                "kappa": quadratic_kappa(confusion), "macro_f1": macro_f1(confusion), "confusion": confusion.tolist()}

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


# ---- masks ----

def dice(counts: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) (Dice 1945, Ecology 26:297) from (..., 3) counts of both, predicted, true pixels.

    Nothing there and nothing found is right: 0 / 0 counts as 1.
    """
    both, predicted, true = counts.double().unbind(-1)
    return torch.where(predicted + true > 0, 2 * both / (predicted + true).clamp(min=1), 1.0)


def iou(counts: Tensor) -> Tensor:
    """|A and B| / |A or B| (Jaccard 1912) from the same counts as `dice`, with the same convention for 0 / 0."""
    both, predicted, true = counts.double().unbind(-1)
    return torch.where(predicted + true > 0, both / (predicted + true - both).clamp(min=1), 1.0)


class Lesions(Task):
    """Masks of four lesion kinds and the optic disc, each pixel an independent yes/no for each kind."""
    name, label, primary = "seg", "masks", "dice"
    classes = ("MA", "HE", "EX", "SE", "OD")  # the order of the channels of a sample's masks

    def head(self, encoder):
        return model.MaskHead(encoder, len(self.classes))

    def target(self, sample):
        return sample.masks  # (L, S, S) bool

    def loss(self, output, target):
        """Cross-entropy of each pixel, and soft Dice (Milletari et al. 2016, arXiv 1606.04797, section 3).

        The overlap is taken over all rows of a batch: most photographs lack some lesion, and their own Dice would
        jump between 0 and 1 on a single pixel.
        """
        target = target.to(output.dtype)
        p = output.sigmoid()
        overlap = (p * target).sum((0, 2, 3))  # (L,)
        soft_dice = (2 * overlap + 1) / (p.sum((0, 2, 3)) + target.sum((0, 2, 3)) + 1)
        return F.binary_cross_entropy_with_logits(output, target) + 1 - soft_dice.mean()

    def decode(self, output):
        return output.sigmoid()

    def tally(self, answer, target):
        predicted = answer > 0.5
        pixels = [mask.sum((2, 3)) for mask in (predicted & target, predicted, target)]
        return torch.stack(pixels, 2)  # (n, L, 3)

    def metrics(self, tally):
        """`dice` and `iou` pool the pixels of the split and average the lesions that occur there, never the disc.

        Pooled first, because a mean of per-image values rewards a model that finds nothing: an image without a lesion
        then scores 1. For the same reason a kind that occurs nowhere in the split is left out (`lesions` counts the
        kinds that do occur).
        """
        pooled, single = tally.sum(0), tally
        occurs = pooled[:-1, 2] > 0
        values = {"lesions": int(occurs.sum())}
        for name, score in (("dice", dice), ("iou", iou)):
            values[name] = float(score(pooled)[:-1][occurs].mean()) if occurs.any() else 0.0
            values[f"{name}_per_image"] = float(score(single)[:, :-1][:, occurs].mean()) if occurs.any() else 0.0
        for name, score in (("dice", dice), ("iou", iou)):
            for i, kind in enumerate(self.classes):
                values[f"{name}_{kind}"] = float(score(pooled)[i])
                values[f"{name}_{kind}_per_image"] = float(score(single)[:, i].mean())
        return values

    def row(self, tally):
        return {f"dice_{kind}": round(float(v), 4) for kind, v in zip(self.classes, dice(tally))} | \
               {f"{word}_pixels_{kind}": int(v) for word, counts in (("predicted", tally[:, 1]), ("true", tally[:, 2]))
                for kind, v in zip(self.classes, counts)}


TASKS: dict[str, Task] = {task.name: task for task in (Grading(), Edema(), Lesions())}
