"""Train one network on several tasks at once.

    python train.py --tasks cls seg                        # on drawn photographs: nothing to download
    python train.py --tasks cls seg --data PATH/TO/IDRiD   # on the real ones
    torchrun --nproc_per_node=2 train.py --tasks cls seg   # in several processes
    python train.py --resume runs/NAME                     # go on where it was stopped

Read Trainer.step for what one step is, Course.run for the loop around it, fit for what that needs. A run leaves in
runs/NAME: config.json, metrics.jsonl (a line per epoch), best.pt (chosen on validation), last.pt, result.json.

Loss weights by uncertainty: Kendall et al. 2018, arXiv 1705.07115, eq. 10.
"""

import copy
import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.utils.deterministic
from torch import Tensor, nn
from tqdm import tqdm

import data
import flags
from data import Batch, Photographs, Steps, load_photographs
from flags import Options, plain
from model import Net, balance_loss
from retina import files
from retina.datasets import records
from retina.datasets.splits import announcement
from retina.evaluation import routing, scoring, tables
from retina.files import InputError, RunError, command
from retina.training import checkpoint, distributed, precision, pretrained
from retina.training.checkpoint import machine, make_repeatable
from retina.training.diagnostics import epoch_line, shown
from retina.training.distributed import ALONE, Group
from retina.training.interrupt import Interrupt, in_words, stopped_by_sigterm
from tasks import Task, build_net, make_tasks


# ---- losses of several tasks -> one ----

class LossWeights(nn.Module):
    """Sum the tasks' losses: with fixed weights, or with learned ones.

    uncertainty: L = sum_t exp(-s_t) L_t + s_t, s_t = log sigma_t^2 learned (Kendall et al. 2018, eq. 10; the factors
    1/2 that differ between regression and classification are left out). A task that is not in `losses` adds nothing,
    neither its loss nor its s_t.
    """

    def __init__(self, tasks: Sequence[Task], words: Sequence[str]):
        super().__init__()
        read = flags.read_loss_weights(words, [t.name for t in tasks])
        self.learned = read is None
        self.fixed = {t.name: t.weight for t in tasks} | (read or {})
        self.log_variance = nn.ParameterDict({t.name: nn.Parameter(torch.zeros(())) for t in tasks} if self.learned
                                             else {})

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        if self.learned:
            return sum((-self.log_variance[t]).exp() * loss + self.log_variance[t] for t, loss in losses.items())
        return sum(self.fixed[t] * loss for t, loss in losses.items())


# ---- one step ----

class Trainer:
    """A network with what it takes to improve it by one batch at a time.

    In a group of processes each is given its share of the batch; losses and gradients are those of the whole one, and
    the networks stay the same. `blanks` are the targets of tasks of which a share may hold no photograph, see data.py.
    """
    patience = 20  # steps in a row that fp16 may leave out

    def __init__(self, net: Net, tasks: Sequence[Task], options: Options, steps: int, device: torch.device,
                 group: Group = ALONE, blanks: Mapping[str, Tensor] = MappingProxyType({})):
        self.net, self.tasks, self.options, self.device, self.group = net, tasks, options, device, group
        self.called = distributed.spread(net, group, device)
        self.blanks = {t: (torch.zeros(0, dtype=torch.int64, device=device), x.to(device)) for t, x in blanks.items()}
        self.weigh = LossWeights(tasks, options.loss_weights).to(device)
        # weight decay on matrices and kernels only: on norms and biases it merely fights the data
        parameters = list(net.parameters())
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
                  {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
                  {"params": list(self.weigh.parameters()), "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], options.lr,
                                           fused=device.type == "cuda" or None)
        warm = max(1, min(steps // 10, 200))

        def factor(step):  # linear warm-up, then a cosine to zero
            return (step + 1) / warm if step < warm else \
                0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.lag = int(device.type == "cuda")  # steps after which losses are read: nothing waits for a GPU meanwhile
        self.unread = deque()  # of each step: its number, names of its losses, what brings their values and the norm
        if group.size > 1:
            self.rehearse()
        # of the tasks' gradients, if this step looked at them, as eight in an epoch do: "cls seg" -> cosine; seconds
        self.cosines, self.looked = {}, 0.0
        self.every = max(1, steps // options.epochs // 8) if options.log_gradients and len(tasks) > 1 else 0
        self.number = 0  # steps done
        self.skipped = self.skipped_in_a_row = 0  # of them, left out by the scaler

    def rehearse(self) -> None:
        """One backward pass of zeros, which leaves nothing behind.

        After its first one DistributedDataParallel groups the gradients anew, and three or more processes then add them
        in another order: a run that is resumed would not end as the one that is not.
        """
        net, generators = copy.deepcopy(self.net.state_dict()), checkpoint.generators()
        self.net.train()
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self.device)
        outputs, _ = self.called(images, {t.name: torch.zeros(1, dtype=torch.int64, device=self.device)
                                          for t in self.tasks})
        sum(0 * x.sum() for x in outputs.values()).backward()
        self.net.zero_grad(set_to_none=True)
        self.net.load_state_dict(net)
        checkpoint.set_generators(generators)

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; -> its losses or, with a lag, those of the step before. RunError: see `check`."""
        losses = self.losses(batch)
        self.cosines, self.looked = {}, 0.0
        if self.every and self.number % self.every == 0:
            if self.device.type == "cuda":  # the forward pass is no part of the look
                torch.cuda.synchronize(self.device)
            begun = time.perf_counter()
            self.cosines = self.compare_gradients(losses)
            self.looked = time.perf_counter() - begun
        loss = self.weigh({t: v for t, v in losses.items() if t != "balance"})
        if "balance" in losses:
            loss = loss + self.options.balance * losses["balance"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        values = torch.stack([*(v.detach() for v in losses.values()), norm])
        self.unread.append((self.number + 1, list(losses), precision.fetch(values)))
        found = self.read(self.lag)
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.number += 1
        return found

    def read(self, lag: int = 0) -> dict[str, float]:
        """The losses of the step that is `lag` steps back, if they have not been read; RunError: see `check`."""
        if len(self.unread) <= lag:
            return {}
        number, names, values = self.unread.popleft()
        *values, norm = values()
        losses = dict(zip(names, values))
        self.check(number, losses, norm)
        return losses

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of each task, and of balance, over the whole batch."""
        rows, targets, kind = batch.rows, batch.targets, next(self.net.parameters()).dtype
        for t, (no_rows, no_target) in self.blanks.items():
            if t not in rows:  # in another process it is; norms and sums over all processes need everyone
                rows, targets = {**rows, t: no_rows}, {**targets, t: no_target}
        with precision.autocast(self.device, self.options.precision):
            outputs, routing = self.called(batch.images, rows)
        total = self.group.total
        losses = {t.name: t.loss(outputs[t.name].to(kind), targets[t.name], total)
                  for t in self.tasks if t.name in outputs}
        if routing:
            losses["balance"] = balance_loss(routing, total)
        return losses

    def compare_gradients(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """{"cls seg": cosine between the gradients of two tasks' losses on the encoder}: below 0 they pull apart

        (Yu et al. 2020, arXiv 2001.06782, definition 1).
        """
        shared = list(self.net.encoder.parameters())
        flat = {t: torch.cat([g.flatten() for g in torch.autograd.grad(
            loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)])
                for t, loss in losses.items() if t != "balance"}
        return {f"{one} {other}": float(nn.functional.cosine_similarity(flat[one], flat[other], dim=0))
                for one, other in itertools.combinations(flat, 2)}

    def check(self, step: int, losses: Mapping[str, float], norm: float) -> None:
        """RunError: a loss or gradient is not finite, named with its task and the step.

        In fp16 a gradient may be too large for the format; the scaler then leaves the step out and scales less. That is
        counted, and an error only `patience` times in a row.
        """
        for name, value in losses.items():
            if not math.isfinite(value):
                raise RunError(f"the loss of {name} is {value} at step {step}; lower --lr (now {self.options.lr}) or "
                               "look at the labels of that task")
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
        elif self.scaler.is_enabled():
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.patience:
                raise RunError(f"the gradient is too large for fp16 at step {step}, for the {self.patience}th time in "
                               f"a row; lower --lr (now {self.options.lr}), or use a GPU that has bf16")
        else:
            names = [n for n, p in self.net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            own = dict.fromkeys(n.split(".")[1] for n in names if n.startswith("heads."))
            raise RunError(f"the gradient of {' '.join(own) or 'what the tasks share'} is not finite at step {step} "
                           f"(first in {names[0]}); lower --lr (now {self.options.lr}) or look at the labels")

    def state_dict(self) -> dict:
        """All that the next step depends on, but for the network and the generators."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(), "weigh": self.weigh.state_dict(), "number": self.number,
                "skipped": [self.skipped, self.skipped_in_a_row]}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from what state_dict returned."""
        for name in ("optimizer", "schedule", "scaler", "weigh"):
            getattr(self, name).load_state_dict(state[name])
        self.number, (self.skipped, self.skipped_in_a_row) = state["number"], state["skipped"]


@dataclass
class Progress:
    """How far a run has come, beside what Trainer knows; plain types, kept in last.pt."""
    epoch: int = 0  # trained and scored
    losses: dict[str, list[float]] = field(default_factory=dict)  # of the steps of the next epoch, so far
    seconds: float = 0.0  # that these took
    waited: float = 0.0  # of them, for photographs
    cosines: dict[str, list[float]] = field(default_factory=dict)  # of gradients, with --log-gradients, so far
    best: dict = field(default_factory=lambda: {"epoch": 0, "score": -math.inf, "metrics": {}, "usage": {},
                                                "weights": ""})


class Course:
    """One run: what it learns from and is scored on, its trainer, how far it has come, its folder."""

    def __init__(self, options: Options, folder: Path, tasks: Sequence[Task], trainer: Trainer, steps: Steps,
                 training: Photographs, validation: Photographs, quiet: bool):
        self.options, self.folder, self.tasks, self.trainer, self.steps = options, folder, tasks, trainer, steps
        self.training, self.validation, self.quiet, self.group = training, validation, quiet, trainer.group
        self.progress, self.lines, self.last = Progress(), [], steps.per_epoch * options.epochs
        self.stored = {"options": plain(options), "validation": [r.name for r in validation.records],
                       "data": [training.fingerprint(), validation.fingerprint()],
                       "machine": machine(trainer.device, self.group)}
        self.held = None  # the lock of the folder

    def restore(self, state: Mapping) -> None:
        """Go on from last.pt. InputError: the data, the device or the number of processes is another."""
        if state["data"] != self.stored["data"]:
            raise InputError(f"--resume {self.folder}: {self.options.data or 'the drawn photographs'}: other "
                             "photographs or labels than when the run was begun; expected the same; start a new run")
        if state["progress"].get("best", {}).get("epoch") and not (self.folder / "best.pt").exists():
            raise InputError(f"--resume {self.folder}: its best.pt is gone, of epoch "
                             f"{state['progress']['best']['epoch']}; expected it to stay; start a new run")
        begun, now = state["machine"], self.stored["machine"]
        for what, flag in (("device", "--device"), ("processes", "--nproc_per_node")):
            if begun[what] != now[what]:
                raise InputError(f"{flag} {now[what]}: {self.folder} was begun with {begun[what]}; expected the same, "
                                 "or the result would be another")
        if begun != now and not self.quiet:
            print(f"warning: begun with {shown(begun)}, now {shown(now)}: the last digits of the result may be others")
        try:
            self.trainer.net.load_state_dict(state["net"])
            self.trainer.load_state_dict(state["trainer"])
            self.progress = Progress(**state["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--resume {self.folder}: its last.pt was made by another version of this project "
                             f"({type(error).__name__}); train again") from error

    def run(self, generators: Sequence[Mapping] | None) -> None:
        """Train to the end, from wherever it stands; `generators` of all processes as they were there, if stored."""
        steps = self.steps.range(self.trainer.number, self.last, self.group.rank, self.group.size)
        batches = data.loader(self.training, steps, self.tasks, self.trainer.device, self.options.workers)
        if generators is not None:  # after the loader, which draws from torch's
            checkpoint.set_generators(generators[self.group.rank])
        if self.group.rank == 0:
            self.held = files.hold(self.folder)
            self.lines = checkpoint.tidy(self.folder, self.progress.epoch)
        if generators is None:
            self.save()
        elif self.ended() and not self.quiet:
            print("it has come to its end already: nothing is left to train")
        interrupt = Interrupt(self.group)
        try:
            with interrupt:
                while not self.ended():
                    self.train_epoch(batches, interrupt)
                    self.save()
                    if interrupt.agree(self.trainer.device):
                        raise KeyboardInterrupt
                    self.score_epoch()
        except RuntimeError:
            if interrupt.heard:  # and by the processes that load photographs, which ended
                raise KeyboardInterrupt from None
            raise

    def ended(self) -> bool:
        """Whether all epochs are done, or too many in a row were no better."""
        waited = self.progress.epoch - self.progress.best["epoch"]
        return self.progress.epoch >= self.options.epochs or waited >= self.options.patience

    def train_epoch(self, batches: Iterator[Batch], interrupt: Interrupt) -> None:
        """The steps that are left of the epoch. Ends early when interrupted. `save` reads what was not read yet."""
        trainer, progress, every = self.trainer, self.progress, self.options.save_every
        trainer.net.train()
        end = (progress.epoch + 1) * self.steps.per_epoch
        with tqdm(total=self.steps.per_epoch, initial=trainer.number + self.steps.per_epoch - end, unit="step",
                  desc=f"epoch {progress.epoch + 1}/{self.options.epochs}", leave=False,
                  disable=True if self.quiet else None) as bar:
            while trainer.number < end and not interrupt.agree(trainer.device):
                begun = time.perf_counter()
                batch = self.next(batches)
                progress.waited += time.perf_counter() - begun
                self.note(trainer.step(batch))
                progress.seconds += time.perf_counter() - begun - trainer.looked  # a look is no part of training
                for pair, cosine in trainer.cosines.items():
                    progress.cosines.setdefault(pair, []).append(cosine)
                bar.update()
                bar.set_postfix({name: f"{np.mean(values[-20:]):.3f}" for name, values in progress.losses.items()},
                                refresh=False)
                if every and trainer.number % every == 0:
                    self.save()

    def note(self, losses: Mapping[str, float]) -> None:
        """Remember the losses of a step."""
        for name, value in losses.items():
            self.progress.losses.setdefault(name, []).append(value)

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. If a file or a loader's process keeps it from coming, all that was learned is saved first.

        Not so in a group: the others do not know of it.
        """
        try:
            return next(batches)
        except (InputError, RuntimeError, OSError):
            if self.group.size == 1:
                self.save()
            raise

    def score_epoch(self) -> None:
        """Score the validation split, keep the network if it is the best, write down what was found."""
        net, progress, trainer = self.trainer.net, self.progress, self.trainer
        batches = data.in_order(self.validation, self.tasks, self.options.batch, trainer.device, self.group)
        found = scoring.score(net, batches, self.tasks, group=self.group)
        metrics, usage = self.group.share(found and (found.metrics(), found.usage))
        losses = {t: float(np.mean(v)) for t, v in progress.losses.items()}
        score, seconds = scoring.primary_score(metrics, self.tasks), progress.seconds
        progress.epoch += 1
        if better := score > progress.best["score"]:
            progress.best = {"epoch": progress.epoch, "score": score, "metrics": metrics, "usage": usage,
                             "weights": checkpoint.weights_hash(net)}
            if self.group.rank == 0:
                checkpoint.save(self.folder / "best.pt", {**self.stored, "net": net.state_dict(),
                                                           "epoch": progress.epoch, "chosen": found.choose()})
        line = {"epoch": progress.epoch, "step": trainer.number, "train": losses, "val": metrics, "score": score,
                "expert_usage": usage, "lr": trainer.optimizer.param_groups[0]["lr"],
                "skipped_steps": trainer.skipped, "seconds": round(seconds, 3),
                "waiting": round(progress.waited / seconds, 4),
                "images_per_second": round(self.steps.per_epoch * self.steps.photographs / seconds, 2)}
        if self.options.log_gradients:
            line["gradient_cosines"] = {pair: float(np.mean(v)) for pair, v in progress.cosines.items()}
        progress.losses, progress.seconds, progress.waited, progress.cosines = {}, 0.0, 0.0, {}
        if self.group.rank == 0:
            self.lines.append(json.dumps(files.plain(line)))
            checkpoint.write_log(self.folder, self.lines)
        self.save()
        if not self.quiet:
            print(epoch_line(progress.epoch, self.options, losses, metrics, self.tasks, score, better, seconds))

    def save(self) -> None:
        """Write last.pt: all that the rest of the run depends on. Nothing, if a step that was not read yet failed."""
        self.note(self.trainer.read())
        found = self.group.gather(checkpoint.generators())
        if self.group.rank == 0:
            checkpoint.save(self.folder / "last.pt", {
                **self.stored, "net": self.trainer.net.state_dict(), "trainer": self.trainer.state_dict(),
                "progress": asdict(self.progress), "generators": found})

    def finish(self) -> dict:
        """Write result.json; -> what is in it."""
        best = self.progress.best
        weights = {"best.pt": best["weights"], "last.pt": checkpoint.weights_hash(self.trainer.net)}
        result = {**best, "weights": weights, "epochs": self.progress.epoch, "steps": self.trainer.number,
                  "skipped_steps": self.trainer.skipped, "machine": self.stored["machine"]}
        if self.group.rank == 0:
            files.write_text(self.folder / "result.json", json.dumps(files.plain(result), indent=1))
        return result


def fit(options: Options, folder: Path, notes: Sequence[str] = (), quiet: bool = False, group: Group = ALONE,
        resume: bool = False, overwrite: bool = False) -> dict:
    """Train as `options` say and leave everything in `folder`; -> what result.json holds.

    With `resume` the run in `folder` goes on from its last.pt, and ends as if it had never been stopped. InputError:
    unusable data or options, before anything is trained; a file that is not there any more. RunError: see Trainer.check
    and Course.next; memory that is not there.
    """
    quiet = quiet or group.rank > 0
    if options.batch < group.size:
        raise InputError(f"--batch {options.batch}: {group.size} processes share it; expected at least one photograph "
                         "for each")
    if options.log_gradients and group.size > 1:
        raise InputError("--log-gradients: in several processes the gradients of single tasks are not summed; expected "
                         "one process; leave it out")
    device = group.device(precision.pick_device(options.device))
    make_repeatable(options.seed, device.type == "cpu" or options.deterministic)
    state = None
    if resume:
        begun, state = checkpoint.read_last(folder)
        flags.check_same(folder, begun, options)
    net, tasks = build_net(asdict(options))
    if state is None and group.rank == 0:  # the others take over its weights
        pretrained.start_from(net, options.weights, options.variant)
    with group.in_turn():
        training, validation, findings = load_photographs(options, tasks)
    if not quiet:
        print(announcement(training, validation, findings, tasks, options))
    streams = make_tasks(options.streams, options.classes) or tasks
    steps = Steps(training.records, streams, options.batch, options.seed, options.augment, tasks)
    with in_words(folder, options, group) as where:
        trainer = Trainer(net.to(device), tasks, options, options.epochs * steps.per_epoch, device, group,
                          data.blanks(training, tasks) if group.size > 1 else {})
        where["trainer"] = trainer
        if group.rank:  # noise and dropout of its own
            torch.manual_seed(int(np.random.SeedSequence((options.seed, group.rank)).generate_state(1)[0]))
        course = Course(options, folder, tasks, trainer, steps, training, validation, quiet)
        if state is not None:
            course.restore(state)
        elif group.rank == 0 and not resume:
            checkpoint.begin(folder, {"options": plain(options), "notes": list(notes), **findings}, overwrite)
        where["begun"] = True
        course.run(None if state is None else state["generators"])
        if course.progress.epoch < options.epochs and not quiet:
            print(f"no better validation score for {options.patience} epochs: stopped early")
        return course.finish()


# ---- command line ----

@dataclass
class Plan:
    """What a command line asks for."""
    options: Options
    folder: Path
    notes: list[str]
    resume: bool
    overwrite: bool


def plan(argv: Sequence[str] | None) -> Plan:
    """Read the command line, and look at the data and at the run that it names. InputError: see flags.py."""
    args = flags.parse(argv)
    if args.resume is not None:
        begun, state = checkpoint.read_last(args.resume)
        options = flags.resumed(args, begun)
        if options.data is not None and not Path(options.data).exists():
            raise InputError(f"--resume {args.resume}: {options.data}: its data set is not there; if it has moved, "
                             "name it with --data")
        note = f"going on with {args.resume}" + ", from its beginning: it was stopped before its first checkpoint" * (
            state is None)
        return Plan(options, args.resume, [note], True, False)
    options, notes = flags.settle(args)
    runs = records.HERE / "runs"
    if args.name is None and args.overwrite:
        raise InputError("--overwrite: expected --name as well, of the run to replace")
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise InputError(f"--name {args.name}: expected a name, not a path; runs are kept in {runs}")
    folder = runs / args.name if args.name else flags.next_folder(runs, options.tasks)
    if folder.exists() and not args.overwrite:
        raise checkpoint.taken(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise InputError(f"--overwrite: {folder} holds something else than a run; choose another --name")
    return Plan(options, folder, notes, False, args.overwrite)


def train(argv: Sequence[str] | None, group: Group) -> None:
    """All of python train.py, in one of its processes."""
    found = group.share(plan(argv) if group.rank == 0 else None)
    options, folder = found.options, found.folder
    tell = print if group.rank == 0 else lambda *_: None
    experts = "no expert layer" if options.experts == 0 else (
        f"experts {options.experts}, chosen {options.chosen}, router {options.router}, width {options.expert_width:g}, "
        f"at {options.experts_at}")
    tell("\n".join([*found.notes, f"tasks {' '.join(options.tasks)}, {options.size} px, {experts}, "
                    + f"{group.size} processes, " * (group.size > 1) + f"run folder {folder}"]))
    begun = time.perf_counter()
    try:
        best = fit(options, folder, found.notes, False, group, found.resume, found.overwrite)
    except KeyboardInterrupt as stopped:
        tell("\ninterrupted; " + (f"go on with: {stopped}" if str(stopped) else "nothing was trained yet"))
        sys.exit(130)
    what = "DRAWN photographs, not IDRiD" if options.data is None else options.data
    tell(f"\nchosen: epoch {best['epoch']} of {folder}, validation split of {what}")
    tell(tables.table(best["metrics"], make_tasks(options.tasks, options.classes)))
    if best["usage"] and (idle := routing.idle(u["tokens"] for u in best["usage"].values())):
        tell(routing.warning(idle))
    tell("weights: " + ", ".join(f"{name} {digest[:16]}" for name, digest in best["weights"].items()))
    tell(f"{(time.perf_counter() - begun) / 60:.1f} minutes. Score it again: python evaluate.py {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """python train.py ..., or torchrun --nproc_per_node=N train.py ..."""
    precision.keep_memory()
    with distributed.join() as group, stopped_by_sigterm(group):
        train(argv, group)


if __name__ == "__main__":
    command(main)
