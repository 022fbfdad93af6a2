"""Learning from teachers: trained networks whose answers a student learns beside labels, or where there are none.

    Teachers                        the networks, and what they answer for a batch
    load_teachers, check_teachers   they must fit the student, and must not have seen what it is judged on

Teachers are frozen and in evaluation mode. They see each photograph as the student does, turned, mirrored and coloured
alike (Beyer et al. 2022, arXiv 2106.05237). Several of them answer with the mean of their probabilities: a mean of
logits would follow the one that is most sure of itself.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from retina.datasets import cache
from retina.datasets.records import LABELS, Record
from retina.files import InputError
from retina.training import precision


if TYPE_CHECKING:
    from data import Batch
    from evaluate import Run
    from model import Net
    from tasks import Task
    from train import Config


# B photographs in a batch, m of them that teachers answer for, n of them labelled for a task


class Lesson(NamedTuple):
    """What a student is asked of a batch, by task; its output may have rows for teachers, for labels, or for both."""
    indices: dict[str, Tensor]  # the photograph of each row
    targets: dict[str, Tensor]  # what guides the rows of sentences
    labelled: Mapping[str, Tensor] = MappingProxyType({})  # (n,) the rows that labels are compared with
    asked: Mapping[str, Tensor] = MappingProxyType({})  # (m,) the rows that teachers are compared with
    unlabelled: Mapping[str, Tensor] = MappingProxyType({})  # (m,) 1.0 where their photograph has no label, else 0.0
    answers: Mapping[str, list[Tensor]] = MappingProxyType({})  # raw outputs (m, ...) of each teacher that has the task


class Teachers:
    """Trained networks, of `runs`, and what they answer for photographs. `steps`: of the student's whole training."""

    def __init__(self, runs: Sequence[Run], tasks: Sequence[Task], config: Config, steps: int):
        self.nets = [precision.fuse_conv_bn(run.net) for run in runs]
        self.tasks = [t for t in tasks if any(t.name in net.heads for net in self.nets)]
        self.config, self.steps = config, steps

    @torch.no_grad()
    def answer(self, batch: Batch, dtype: str) -> dict[str, list[Tensor]]:
        """{task: raw outputs (m, ...) of each teacher that has it}, for the photographs of `askable`.

        A sentence is that of the first teacher; the others say which words they would have said after its own
        (distillation by sequences: Kim & Rush 2016, arXiv 1606.07947, section 3.2).
        """
        answers: dict[str, list[Tensor]] = defaultdict(list)
        for net in self.nets:
            tasks = [t for t in self.tasks if t.name in net.heads]
            with precision.autocast(batch.images.device, dtype):
                maps, _ = net.routed_maps(batch.images, {t.name: askable(t, batch) for t in tasks})
                for t in tasks:
                    found = answers[t.name]
                    guide = [t.decode(found[0])] if found and guided(net, t) else []
                    output = net.heads[t.name](maps[t.name], *guide)
                    output = output[:, :1] if guide else output
                    found.append(output.to(torch.promote_types(output.dtype, torch.float32)))
        return dict(answers)

    def prepare(self, batch: Batch, dtype: str) -> Lesson:
        """Ask the teachers; -> which photographs the student is to answer for, and theirs."""
        lesson = Lesson(dict(batch.indices), dict(batch.targets), {}, {}, {}, self.answer(batch, dtype))
        for t in (t for t in self.tasks if t.name in batch.indices):
            labelled, rows = batch.indices[t.name], askable(t, batch)
            has_label = torch.isin(rows, labelled)
            lesson.unlabelled[t.name] = 1 - has_label.float()
            # sentences are said twice: after the words of labels, and after the teacher's
            if any(guided(net, t) for net in self.nets if t.name in net.heads):
                lesson.indices[t.name] = torch.cat([labelled, rows])
                lesson.targets[t.name] = torch.cat([batch.targets[t.name], t.decode(lesson.answers[t.name][0])])
                places = torch.arange(len(labelled) + len(rows), device=rows.device)
                lesson.labelled[t.name], lesson.asked[t.name] = places.split([len(labelled), len(rows)])
            else:  # all labelled ones are among the others
                lesson.indices[t.name] = rows
                lesson.labelled[t.name] = has_label.nonzero()[:, 0]
                lesson.asked[t.name] = torch.arange(len(rows), device=rows.device)
        return lesson

    def trust_in_labels(self, step: int) -> float:
        """Weight of labels; teachers of the same photograph have the rest. Without annealing both weigh 1.

        It grows from 0 to 1 over training (Clark et al. 2019, arXiv 1907.04829, section 3.2).
        """
        return step / self.steps if self.config.anneal else 1.0

    def loss(self, task: Task, output: Tensor, lesson: Lesson, trust: float,
             all_reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of task.teacher_loss over the photographs of the batch, times --distil-weight."""
        divergence = task.teacher_loss(output[lesson.asked[task.name]], lesson.answers[task.name],
                                       self.config.temperature)  # (m,)
        weights = lesson.unlabelled[task.name].to(divergence.dtype)
        weights = weights + (1 - weights) * (1 - trust if self.config.anneal else 1.0)
        number = all_reduce_sum(divergence.new_tensor(float(len(divergence)))).clamp(min=1)
        return self.config.distil_weight * all_reduce_sum((weights * divergence).sum()) / number


def askable(task: Task, batch: Batch) -> Tensor:
    """The photographs of a batch that teachers answer for (m,): of a part nobody can tell what the whole shows."""
    return torch.arange(len(batch.images), device=batch.images.device) if LABELS[task.label].local else batch.whole


def guided(net: Net, task: Task) -> bool:
    """Whether a task's head is guided by targets, word by word."""
    return getattr(net.heads[task.name], "guided", False)


# ---- who may teach ----

def photograph_hash(record: Record) -> str:
    """What tells a photograph from all others, whatever its name: the bytes of its file, or which drawing it is."""
    return hashlib.sha256(repr(cache.content(record, ())).encode()).hexdigest()[:16]


def learned_by(training: Sequence[Record], teachers: Sequence[Run]) -> list[str]:
    """Hashes of all photographs that a student learns from, itself or through its teachers."""
    return sorted({photograph_hash(r) for r in training}.union(*(run.learned for run in teachers)))


def words_of(teachers: Sequence[Run]) -> dict[str, list[str]]:
    """{"text": words} of the first teacher that says sentences; a student says them in its words."""
    known = (run.options["names"] for run in teachers)
    return next(({"text": list(names["text"])} for names in known if "text" in names), {})


def load_teachers(load_run: Callable[[Path, torch.device], Run], config: Config, device: torch.device) -> list[Run]:
    """The runs that teach. InputError: there is none of that name, or it cannot teach the student."""
    runs = []
    for teacher in config.teachers:
        try:
            run = load_run(Path(teacher), device)
        except InputError as error:
            raise InputError(f"--teachers {error}") from None
        what = f"--teachers {run.folder}"
        if not any(t.name in config.tasks for t in run.tasks):
            raise InputError(f"{what}: it was trained for {' '.join(t.name for t in run.tasks)}; expected one of "
                             f"--tasks {' '.join(config.tasks)}")
        if run.options["image_size"] != config.image_size:
            raise InputError(f"{what}: it was trained at --image-size {run.options['image_size']}, the student at "
                             f"{config.image_size}; expected the same, as both see the same pictures")
        runs.append(run)
    return runs


def check_teachers(runs: Sequence[Run], tasks: Sequence[Task], names: Mapping[str, Sequence[str]],
                   judged: Sequence[Record]) -> None:
    """InputError: a run has learned from one of the photographs that the student is `judged` on, or has other `names`.

    These are all photographs of eyes of its validation and test splits. A run knows those that its own teachers learned
    from as its own. Also: a task cannot learn from teachers.
    """
    known = {photograph_hash(r): r.name for r in judged} if runs else {}  # the files are read for it
    for run in runs:
        what = f"--teachers {run.folder}"
        if seen := [known[digest] for digest in run.learned if digest in known]:
            raise InputError(f"{what}: it learned from {len(seen)} photographs of eyes that the student is judged on "
                             f"({', '.join(seen[:3])}{', ...' * (len(seen) > 3)}); expected none; train it with the "
                             "same --data and --fold")
        for task in (t for t in tasks if t.name in [t.name for t in run.tasks]):
            theirs, ours = (of.get(task.label, []) for of in (run.options["names"], names))
            if list(theirs) != list(ours):
                raise InputError(f"{what}: for {task.name} it has other classes or words than the student or another "
                                 f"teacher ({len(theirs)} and {len(ours)}); expected the same, in the same order")
            if type(task).teacher_loss.__qualname__ == "Task.teacher_loss":
                raise InputError(f"{what}: the task {task.name} cannot learn from it; expected a method teacher_loss "
                                 "in its class in tasks.py")
