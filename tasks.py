"""What a task is, and the tasks. One class holds a task's label, head, loss, decoding and metrics.

Read Task first, then Grading, Lesions, Landmarks and Text as four examples. To add a task, write one more class and
list it in TASKS; `train.py --tasks` then knows its name. Its metrics may come from a base class for classes, signs,
masks, landmarks (retina/evaluation/task_metrics.py) or sentences (text_metrics.py). Its label is one of LABELS in
retina/datasets/records.py; a new one is declared there.

    python -c "from tasks import TASKS; print(*TASKS)"
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from model import ClassifierHead, FeatureSpec, LandmarkHead, MaskHead, Net, NetConfig
from retina.datasets.descriptions import words
from retina.datasets.records import LABELS, UNKNOWN
from retina.evaluation.task_metrics import ClassMetrics, FineMetrics, GradeMetrics, LandmarkMetrics, MaskMetrics, \
    SignMetrics, TaskMetrics
from retina.evaluation.text_metrics import TextMetrics
from retina.files import InputError, NotFiniteError
from retina.training import precision


# n photographs with the label, L lesion classes, G grades, P points, S side of the photograph in pixels


class Task(TaskMetrics):
    """One question about a photograph. All outputs and targets have one row per labelled photograph."""
    name: str  # the word for --tasks
    label: str  # what it learns from, a name in LABELS (retina/datasets/records.py)
    weight: float = 1.0  # of its loss in the sum over tasks

    def labelled(self, record) -> bool:
        """Whether a record or sample carries this task's label."""
        return self.label in record.labels

    def head(self, spec: FeatureSpec) -> nn.Module:
        """The layer that turns five maps, which `spec` describes, into this task's raw output."""
        raise NotImplementedError

    def target(self, sample) -> Tensor:
        """What the loss compares the output with, from a sample that carries the label."""
        raise NotImplementedError

    def loss(self, output: Tensor, target: Tensor,
             all_reduce_sum: Callable[[Tensor], Tensor] = model.identity) -> Tensor:
        """A scalar, the mean over all labelled photographs of the batch.

        Where several processes share a batch, `all_reduce_sum` adds their sums and counts; one of them may have none.
        """
        raise NotImplementedError

    def teacher_loss(self, output: Tensor, answers: Sequence[Tensor], temperature: float) -> Tensor:
        """How far a student's raw output (m, ...) is from those of its teachers, for each photograph (m,).

        The divergence KL(q || p) of its probabilities p from q, the mean of theirs.
        """
        raise NotImplementedError

    def decode(self, output: Tensor) -> Tensor:
        """Raw output -> prediction in human units (n, ...): probabilities, masks, landmarks."""
        raise NotImplementedError

    def answer(self, output: Tensor) -> Tensor:
        """The same as `decode`. NotFiniteError: it is not finite, and nothing is made of nan."""
        if not output.isfinite().all():
            raise NotFiniteError(f"the network's output for {self.name} is not finite; train again with a lower --lr")
        return self.decode(output)


def class_divergence(output: Tensor, answers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p) over the last dimension, of p = softmax(z / T) and q the mean of softmax(z_k / T) -> (...).

    Hinton et al. 2015, arXiv 1503.02531, section 2: T^2 keeps the gradient T (p - q) as large as that of labels.
    """
    q = torch.stack([z / temperature for z in answers]).softmax(-1).mean(0)
    log_p = (output / temperature).log_softmax(-1)
    return temperature ** 2 * (torch.xlogy(q, q) - q * log_p).sum(-1)


def yes_no_divergence(output: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """KL(q || p) of yes and no, each output a logit of its own; the mean over all but the first dimension -> (m,).

    Without a temperature: it would lift a background that is sure to be none to something that might be.
    """
    q = torch.stack(list(answers)).sigmoid().mean(0)
    entropy = -torch.xlogy(q, q) - torch.xlogy(1 - q, 1 - q)
    cross = F.binary_cross_entropy_with_logits(output, q, reduction="none")
    return (cross - entropy).flatten(1).mean(1)


# ---- classes ----

class Classification(ClassMetrics, Task):
    """A label 0..classes-1 from the whole photograph."""

    def head(self, spec):
        return ClassifierHead(spec, self.classes)

    def target(self, sample):
        return torch.tensor(sample.labels[self.label])

    def loss(self, output, target, all_reduce_sum=model.identity):
        number = output.new_tensor(float(len(target)))
        return all_reduce_sum(F.cross_entropy(output, target, reduction="sum")) / all_reduce_sum(number)

    def teacher_loss(self, output, answers, temperature):
        return class_divergence(output, answers, temperature)

    def decode(self, output):
        return output.softmax(1)  # (n, G)


class Grading(GradeMetrics, Classification):
    """Diabetic retinopathy, grade 0 (none) to 4 (proliferative); referable, to be seen by a doctor, is 2 and above."""
    name, label, primary, classes, title = "cls", "grade", "kappa", 5, "retinopathy grade"


class Edema(Classification):
    """Risk of macular edema, 0 to 2."""
    name, label, primary, classes, title = "dme", "edema_risk", "accuracy", 3, "edema risk"


class Categories(Classification):
    """Which class folder a photograph lies in; this is the task `cls` where a data set is folders of classes."""
    name, label, primary, prefix, ordered = "cls", "category", "accuracy", "p_", False

    def __init__(self, names: Mapping[str, Sequence[str]] = MappingProxyType({})):
        self.names = tuple(names.get(self.label, ()))
        self.classes = len(self.names)

    def target(self, sample):
        return torch.tensor(self.names.index(sample.labels[self.label]))


class Fine(FineMetrics, Categories):
    """One of many classes, which a column of a table names. Each may be part of a broad class."""
    name, label, primary, title = "fine", "fine", "top5", "fine class"

    def __init__(self, names: Mapping[str, Sequence[str]] = MappingProxyType({})):
        super().__init__(names)
        self.broad = tuple(names.get("broad", ()))


class Signs(SignMetrics, Task):
    """Any number of signs, each of them there or not."""
    name, label, primary = "signs", "signs", "auc"

    def __init__(self, names: Mapping[str, Sequence[str]] = MappingProxyType({})):
        self.classes = tuple(names.get(self.label, ()))

    def head(self, spec):
        return ClassifierHead(spec, len(self.classes))

    def target(self, sample):
        return torch.tensor([float(sample.signs.get(name, math.nan)) for name in self.classes])  # (S,); nan: unknown

    def loss(self, output, target, all_reduce_sum=model.identity):
        known = (~target.isnan()).to(output.dtype)
        truth = target.nan_to_num().to(output.dtype)
        entropy = F.binary_cross_entropy_with_logits(output, truth, known, reduction="sum")
        return all_reduce_sum(entropy) / all_reduce_sum(known.sum()).clamp(min=1)

    def teacher_loss(self, output, answers, temperature):
        return yes_no_divergence(output, answers)

    def decode(self, output):
        return output.sigmoid()  # (n, S)


# ---- masks ----

class Lesions(MaskMetrics, Task):
    """Masks of four lesion classes and the optic disc, each pixel an independent yes/no for each class."""
    name, label, primary = "seg", "masks", "dice"
    classes = ("MA", "HE", "EX", "SE", "OD")  # the order of the channels of a sample's masks

    def head(self, spec):
        return MaskHead(spec, len(self.classes))

    def target(self, sample):
        return sample.masks  # (L, S, S) uint8: 0, 1, or UNKNOWN for all pixels of a class

    def loss(self, output, target, all_reduce_sum=model.identity):
        """Cross-entropy of each pixel, and soft Dice (Milletari et al. 2016, arXiv 1606.04797, section 3).

        The Dice of a class is that of the whole batch: most photographs lack some lesion, and their own Dice would
        jump between 0 and 1 on a single pixel. A class without a true pixel in the batch has none: its Dice would
        push all of its probabilities to zero, and a rare class never came back. Unknown masks count in neither term.
        """
        known, truth = (target != UNKNOWN).to(output.dtype), (target == 1).to(output.dtype)
        p = output.sigmoid() * known
        sums = torch.stack([x.sum((0, 2, 3)) for x in (p * truth, p, truth)])
        overlap, predicted, true = all_reduce_sum(sums)  # (L,) each
        soft_dice, present = (2 * overlap + 1) / (predicted + true + 1), true > 0
        missed = ((1 - soft_dice) * present).sum() / present.sum().clamp(min=1)
        entropy = F.binary_cross_entropy_with_logits(output, truth, known, reduction="sum")
        return all_reduce_sum(entropy) / all_reduce_sum(known.sum()) + missed

    def teacher_loss(self, output, answers, temperature):
        return yes_no_divergence(output, answers)

    def decode(self, output):
        return output.sigmoid()


# ---- landmarks ----

DISC_DIAMETER = 0.154  # of the side of a sample: 54 discs of IDRiD's training split measure 0.154 +- 0.014
ORIGINAL_WIDTH = 4288  # of IDRiD's photographs in pixels, the unit of its literature


def soft_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Heatmaps (n, P, h, w) -> expected position (n, P, 2), x and y as shares of the sides, and probabilities.

    The expectation has a gradient, the argmax has none (DSNT: Nibali et al. 2018, arXiv 1801.07372).
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


class Landmarks(LandmarkMetrics, Task):
    """Centres of the optic disc and of the fovea."""
    name, label, primary = "loc", "landmarks", "within_radius"
    classes = ("disc", "fovea")  # the order of a sample's landmarks

    def head(self, spec):
        return LandmarkHead(spec, len(self.classes))

    def target(self, sample):
        """(P + 4, 2): the points as shares of the side, nan where unknown; then four rows that convert shares.

        The four rows, x and y each: where the sample begins in pixels of the file; its side in pixels of the file, in
        pixels of an original 4288 pixels wide, and in disc diameters.
        """
        g, side = sample.geometry, sample.image.shape[-1]
        begin, pixels = (-g.shift_x / g.scale_x, -g.shift_y / g.scale_y), (side / g.scale_x, side / g.scale_y)
        original = [ORIGINAL_WIDTH / g.width * p for p in pixels]
        return torch.cat([sample.landmarks / side, torch.tensor([begin, pixels, original, [1 / DISC_DIAMETER] * 2])])

    def loss(self, output, target, all_reduce_sum=model.identity):
        """Smooth L1 of the expected point, plus the divergence of its heatmap from a Gaussian of one cell at the truth.

        From Nibali et al. 2018, arXiv 1801.07372, whose first term is the Euclidean distance. Unknown points count in
        neither term.
        """
        truth = target[:, :-4]
        known = ~truth.isnan().any(2)  # (n, P)
        truth = torch.where(known[..., None], truth, 0.5)
        points, p = soft_argmax(output)
        # coordinates -1 to 1 as in the paper; quadratic within one cell, linear beyond
        distance = F.smooth_l1_loss(2 * points, 2 * truth, beta=2 / output.shape[3], reduction="none").sum(2)
        divergence = js_divergence(p, gaussian_heatmap(truth, *output.shape[2:]))
        number = all_reduce_sum(known.sum().to(output.dtype)).clamp(min=1)
        return all_reduce_sum(((distance + divergence) * known).sum()) / number

    def teacher_loss(self, output, answers, temperature):
        """Of heatmaps, without a temperature; the mean over landmarks."""
        return class_divergence(output.flatten(2), [z.flatten(2) for z in answers]).mean(1)

    def decode(self, output):
        return soft_argmax(output)[0]  # (n, P, 2) as shares of the side


# ---- sentences ----

class Text(TextMetrics, Task):
    """A sentence about the photograph, word by word."""
    name, label = "text", "text"
    weight = 10.0  # the loss is a mean over words, most of which follow from those before them
    pad, unknown, end = model.PAD, model.UNK, model.EOS

    def __init__(self, names: Mapping[str, Sequence[str]] = MappingProxyType({})):
        self.vocabulary = tuple(names.get(self.label, ()))
        self.numbers = {word: k for k, word in enumerate(self.vocabulary, self.end + 1)}

    def head(self, spec):
        return model.TEXT_HEADS[spec.text_decoder](spec, self.end + 1 + len(self.vocabulary))

    def target(self, sample):
        """(L,) numbers of the words, the end, then nothing."""
        numbers = [self.numbers.get(word, self.unknown) for word in words(sample.text)[:model.LONGEST - 1]]
        return F.pad(torch.tensor([*numbers, self.end]), (0, model.LONGEST - 1 - len(numbers)), value=self.pad)

    def loss(self, output, target, all_reduce_sum=model.identity):
        """Cross-entropy of each word after the true words before it; the mean is over words."""
        scores = output[:, 0]  # (n, L, V)
        target = target[:, :scores.shape[1]]
        entropy = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=self.pad, reduction="sum")
        return all_reduce_sum(entropy) / all_reduce_sum((target != self.pad).sum().to(scores.dtype)).clamp(min=1)

    def teacher_loss(self, output, answers, temperature):
        """Of each word after those before it in the first teacher's sentence; the mean over its words."""
        words = (self.decode(answers[0]) != self.pad)[:, :output.shape[2]]  # (m, L)
        scores = [z[:, 0, :output.shape[2]] for z in answers]
        divergence = class_divergence(output[:, 0], scores, temperature)
        return (divergence * words).sum(1) / words.sum(1).clamp(min=1)

    def decode(self, output):
        """The words that score best, each after those before it: (n, L)."""
        answer = output[:, -1, :, self.end:].argmax(2) + self.end
        ends = (answer == self.end).long()
        return torch.where(ends.cumsum(1) > ends, self.pad, answer)


TASKS: dict[str, Task] = {task.name: task for task in (
    Grading(), Edema(), Lesions(), Landmarks(), Fine(), Signs(), Text())}


def make_tasks(tasks: Sequence[str], names: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[Task]:
    """The tasks of these names. `names` are those of the data set's own classes, signs and words, by label.

    `cls` predicts the class folders of a data set that has such. InputError: a task's label is not declared, or its
    primary metric has no range; see check_range.
    """
    made = []
    for name in tasks:
        task = Categories() if name == Categories.name and names.get(Categories.label) else TASKS[name]
        made.append(type(task)(names) if names.get(task.label) else task)
    for task in made:
        task.check_range()
        if task.label not in LABELS:
            raise InputError(f"tasks.py: the task {task.name} learns from {task.label!r}; expected a label that "
                             f"retina/datasets/records.py declares ({', '.join(LABELS)}); declare it there")
    return made


def build_net(options: Mapping) -> tuple[Net, list[Task]]:
    """The network that `options` (of a command line or a checkpoint) describe, with random weights, and its tasks.

    InputError: an unknown encoder, numbers of experts that do not fit.
    """
    tasks = make_tasks(options["tasks"], options["names"])
    config = NetConfig(**{f.name: options[f.name] for f in fields(NetConfig)})
    if config.encoder not in model.ENCODERS:
        raise InputError(f"trained with the encoder {config.encoder!r}, which model.py does not list "
                         f"({', '.join(model.ENCODERS)})")
    try:
        return precision.channels_last(Net(config, tasks)), tasks
    except ValueError as error:
        raise InputError(str(error)) from None
