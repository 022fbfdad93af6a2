"""Train one network on several tasks at once.

    python train.py --tasks cls seg                        # on drawn photographs: nothing to download
    python train.py --tasks cls seg --data PATH/TO/IDRiD   # on the real ones

Read Trainer.step for what one step is, fit for the loop around it, main for the command line. A run leaves in
runs/NAME: config.json, metrics.jsonl (a line per epoch), best.pt (chosen on validation), last.pt.

Loss weights by uncertainty: Kendall et al. 2018, arXiv 1705.07115, eq. 10.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import signal
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import eyes
import records
import routes
import scores
from model import LEARNED, PLACES, ROUTERS, VARIANTS, Net, balance_loss, load_pretrained, make_routers
from records import InputError
from tasks import TASKS, Task, make_tasks


@dataclass(frozen=True)
class Options:
    """All that determines a run; plain types, stored in config.json and in every checkpoint."""
    tasks: tuple[str, ...] = ("cls", "seg")
    data: str | None = None  # None: drawn photographs
    classes: tuple[str, ...] = ()  # where the data set is folders of classes
    fold: str = "1/5"
    keep_leaks: bool = False
    size: int = 128
    epochs: int = 5
    batch: int = 8
    lr: float = 1.5e-3
    weight_decay: float = 0.01
    patience: int = 20
    loss_weights: tuple[str, ...] = ("fixed",)
    augment: bool = True
    variant: str = "b0"
    weights: str = "none"  # none, imagenet, or a file
    experts: int = 8
    chosen: int = 2
    router: str = "learned"
    expert_width: float = 0.5
    experts_at: str = "deepest"
    balance: float = 0.01
    expert_dropout: float = 0.1
    stochastic_depth: float = 0.1
    seed: int = 0
    workers: int = 0
    device: str = "auto"


# ---- losses of several tasks -> one ----

class LossWeights(nn.Module):
    """Sum the tasks' losses: with fixed weights, or with learned ones.

    uncertainty: L = sum_t exp(-s_t) L_t + s_t, s_t = log sigma_t^2 learned (Kendall et al. 2018, eq. 10; the factors
    1/2 that differ between regression and classification are left out). A task that is not in `losses` adds nothing,
    neither its loss nor its s_t.
    """

    def __init__(self, tasks: Sequence[Task], words: Sequence[str]):
        super().__init__()
        self.fixed = {t.name: t.weight for t in tasks}
        self.learned = list(words) == ["uncertainty"]
        if not self.learned and list(words) != ["fixed"]:
            self.fixed |= self.read(words)
        self.log_variance = nn.ParameterDict({t.name: nn.Parameter(torch.zeros(())) for t in tasks} if self.learned
                                             else {})

    def read(self, words: Sequence[str]) -> dict[str, float]:
        """["cls=0.5", "seg=1"] -> weights. InputError: another form, a task that is not trained, a negative number."""
        weights = {}
        for word in words:
            task, _, number = word.partition("=")
            try:
                weights[task] = float(number)
            except ValueError:
                raise InputError(f"--loss-weights {word}: expected 'fixed', 'uncertainty', or pairs like "
                                 "cls=0.5") from None
            if task not in self.fixed:
                raise InputError(f"--loss-weights {word}: {task!r} is not among --tasks {' '.join(self.fixed)}")
            if not 0 <= weights[task] < math.inf:
                raise InputError(f"--loss-weights {word}: expected a number that is not negative")
        return weights

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        if self.learned:
            return sum((-self.log_variance[t]).exp() * loss + self.log_variance[t] for t, loss in losses.items())
        return sum(self.fixed[t] * loss for t, loss in losses.items())


# ---- one step ----

class Trainer:
    """A network with what it takes to improve it by one batch at a time."""

    def __init__(self, net: Net, tasks: Sequence[Task], options: Options, steps: int, device: torch.device):
        self.net, self.tasks, self.options, self.device = net, tasks, options, device
        self.weigh = LossWeights(tasks, options.loss_weights).to(device)
        # weight decay on matrices and kernels only: on norms and biases it merely fights the data
        parameters = list(net.parameters())
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
                  {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
                  {"params": list(self.weigh.parameters()), "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], options.lr)
        warm = max(1, min(steps // 10, 200))

        def factor(step):  # linear warm-up, then a cosine to zero
            return (step + 1) / warm if step < warm else \
                0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.cuda = device.type == "cuda"
        self.half = torch.bfloat16 if self.cuda and torch.cuda.is_bf16_supported() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.cuda and self.half == torch.float16)
        self.number = 0  # steps done

    def step(self, batch: data.Batch) -> dict[str, float]:
        """Learn from one batch; -> its losses. FloatingPointError: a loss is not finite, named with the step."""
        with torch.autocast(self.device.type, self.half, enabled=self.cuda):
            outputs, routing = self.net(batch.images, batch.rows)
        losses = {t.name: t.loss(outputs[t.name].float(), batch.targets[t.name])
                  for t in self.tasks if t.name in outputs}
        loss = self.weigh(losses)
        if routing:
            losses["balance"] = balance_loss(routing)
            loss = loss + self.options.balance * losses["balance"]
        values = dict(zip(losses, torch.stack([v.detach() for v in losses.values()]).tolist()))
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of {name} is {value} at step {self.number + 1}; lower --lr "
                                         f"(now {self.options.lr}) or look at the labels of that task")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.number += 1
        return values


# ---- the run ----

class Interrupt:
    """Ctrl-C once: finish the step, save, end. Twice: end at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.hear)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def hear(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def save(path: Path, state: dict) -> None:
    """Write a checkpoint beside its place and rename it: a crash leaves the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def fit(options: Options, folder: Path, notes: Sequence[str] = (), quiet: bool = False) -> dict:
    """Train as `options` say and leave everything in `folder`; -> the chosen epoch's number, score, metrics, usage.

    InputError: unusable data or options, before anything is trained. FloatingPointError: see Trainer.step.
    """
    device = evaluate.pick_device(options.device)
    make_repeatable(options.seed, deterministic=device.type == "cpu")
    net, tasks = evaluate.build_net(asdict(options))
    start_from(net, options.weights, options.variant)
    training, validation, findings = load_photographs(options, tasks)
    if not quiet:
        print(announcement(training, validation, findings, tasks, options))
    steps = data.Steps(training.records, tasks, options.batch, options.seed, options.augment)
    trainer = Trainer(net.to(device), tasks, options, options.epochs * steps.per_epoch, device)
    batches = iter(scores.loader(training, steps.range(0, options.epochs * steps.per_epoch), tasks, device,
                                   options.workers))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(options) | {"notes": list(notes), **findings}, indent=1))
    best = {"epoch": 0, "score": -math.inf, "metrics": {}, "usage": {}}
    stored = {"options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()},
              "validation": [r.name for r in validation.records]}
    with Interrupt() as interrupt, open(folder / "metrics.jsonl", "w", encoding="utf-8") as log:
        for epoch in range(1, options.epochs + 1):
            begun = time.perf_counter()
            losses = train_epoch(trainer, batches, steps.per_epoch, f"epoch {epoch}/{options.epochs}", interrupt, quiet)
            seconds = time.perf_counter() - begun
            state = stored | {"net": net.state_dict(), "epoch": epoch, "chosen": {}}
            if interrupt.asked:
                save(folder / "last.pt", state | {"optimizer": trainer.optimizer.state_dict()})
                raise KeyboardInterrupt
            found = scores.score(net, validation, tasks, device, options.batch)
            metrics, state["chosen"] = found.metrics(), found.choose()
            score = scores.primary_score(metrics, tasks)
            better = score > best["score"]
            if better:
                best = {"epoch": epoch, "score": score, "metrics": metrics, "usage": found.usage}
                save(folder / "best.pt", state)
            save(folder / "last.pt", state | {"optimizer": trainer.optimizer.state_dict()})
            line = {"epoch": epoch, "step": trainer.number, "train": losses, "val": metrics, "score": score,
                    "expert_usage": found.usage, "lr": trainer.optimizer.param_groups[0]["lr"],
                    "seconds": round(seconds, 3),
                    "images_per_second": round(steps.per_epoch * options.batch / seconds, 2)}
            log.write(json.dumps(evaluate.plain(line)) + "\n")
            log.flush()
            if not quiet:
                print(epoch_line(epoch, options, losses, metrics, tasks, score, better, seconds))
            if interrupt.asked:
                raise KeyboardInterrupt
            if epoch - best["epoch"] >= options.patience:
                print(f"no better validation score for {options.patience} epochs: stopping early")
                break
    return best


def train_epoch(trainer: Trainer, batches, steps: int, title: str, interrupt: Interrupt,
                quiet: bool) -> dict[str, float]:
    """`steps` training steps; -> mean of each loss over the steps that had it. Ends early when interrupted."""
    trainer.net.train()
    seen = defaultdict(list)
    with tqdm(range(steps), desc=title, unit="step", leave=False, disable=True if quiet else None) as bar:
        for _ in bar:
            for name, value in trainer.step(next(batches).to(trainer.device)).items():
                seen[name].append(value)
            bar.set_postfix({name: f"{np.mean(values[-20:]):.3f}" for name, values in seen.items()}, refresh=False)
            if interrupt.asked:
                break
    return {name: float(np.mean(values)) for name, values in seen.items()}


def epoch_line(epoch: int, options: Options, losses: Mapping, metrics: Mapping, tasks: Sequence[Task], score: float,
               better: bool, seconds: float) -> str:
    """One line for one epoch."""
    parts = [f"epoch {epoch:3}/{options.epochs}  loss " + " ".join(f"{t} {losses[t]:.3f}" for t in losses)]
    for task in tasks:
        values = metrics[task.name]
        shown = dict.fromkeys((task.primary, *(["accuracy"] if "accuracy" in values else [])))
        parts.append(f"{task.name} " + " ".join(f"{k} {values[k]:.3f}" for k in shown))
    return " | ".join(parts) + f" | score {score:.3f}{'*' if better else ' '} {seconds:.0f} s"


# ---- what a run needs before its first step ----

def make_repeatable(seed: int, deterministic: bool) -> None:
    """Seed every generator; where operations are deterministic too, the same command gives the same weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back and faulting it in again.

    Measured on two CPU cores: 1.3 to 1.6 times as many photographs a second. Elsewhere than on glibc: nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):
        mallopt(option, value)


def load_photographs(options: Options, tasks: Sequence[Task]) -> tuple[data.Photographs, data.Photographs, dict]:
    """Training and validation photographs, and what was found of leaks and of labels that contradict each other.

    InputError: a task of which nothing is labelled on either side.
    """
    root = None if options.data is None else Path(options.data)
    found = records.read_data(root).records
    everything = make_tasks(TASKS, options.classes)
    check_labels({"training": [r for r in found if r.part != "test"]}, tasks, everything, root)  # before decoding
    joined, conflicts = data.find_eyes(found, options.size)
    split = eyes.split(joined, options.fold, options.keep_leaks)
    check_labels({"training": split.training, "validation": split.validation}, tasks, everything, root,
                 f" (of {sum(r.part != 'test' for r in joined)} photographs, {len(split.leaks)} show an eye of the "
                 "test part)")
    training, validation, leaks = ([r for r in part if any(t.labelled(r) for t in tasks)]
                                   for part in (split.training, split.validation, split.leaks))
    validated = [r.name for r in split.validated if any(t.labelled(r) for t in tasks)]
    findings = {"leaks": {"kept": options.keep_leaks, "photographs": len(leaks), "names": [r.name for r in leaks],
                          **{t.name: sum(t.labelled(r) for r in leaks) for t in tasks}},
                "left_out_for_validation": validated, "conflicts": [c.plain(options.classes) for c in conflicts]}
    return data.Photographs(training, options.size), data.Photographs(validation, options.size), findings


def check_labels(parts: Mapping[str, Sequence[records.Record]], tasks: Sequence[Task], everything: Sequence[Task],
                 root: Path | None, why: str = "") -> None:
    """InputError: one of the `parts` has no label for one of the tasks; says which of `everything` would work."""
    def labels(task):
        return {name: sum(task.labelled(r) for r in part) for name, part in parts.items()}

    for task in tasks:
        if not all(labels(task).values()):
            counts = ", ".join(f"{n} for {name}" for name, n in labels(task).items())
            possible = " ".join(t.name for t in everything if all(labels(t).values()))
            raise InputError(f"--tasks {task.name}: photographs with its label in {root}: {counts}{why}; expected at "
                             f"least one each; " + (f"--tasks {possible} would work" if possible else
                                                    "no task would work with this data"))


def reachable(url: str, seconds: float = 8) -> bool:
    """Whether `url` answers in time; in a thread, because a name server that is silent heeds no timeout."""
    answers = []

    def ask():
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.append(True)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def read_weights(weights: str, variant: str) -> Mapping[str, Tensor]:
    """Pretrained weights, a torchvision state dict, from torchvision ("imagenet") or from a file.

    InputError: they cannot be had (within 10 seconds) or the file holds no state dict.
    """
    if weights == "imagenet":
        found = torchvision.models.get_model_weights(f"efficientnet_{variant}").DEFAULT
        stored = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rsplit("/", 1)[-1]
        try:
            if not stored.exists() and not reachable(found.url):
                raise OSError(f"no answer from {found.url}")
            return found.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--weights imagenet: cannot be downloaded ({error}); use --weights none, or --weights "
                             "FILE with a torchvision state dict") from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"--weights {weights}: no such file; expected none, imagenet, or a file with a torchvision "
                         "state dict") from None
    except Exception as error:  # whatever a damaged or foreign file provokes in torch.load
        raise InputError(f"--weights {weights}: not a state dict, as torch.save writes it "
                         f"({type(error).__name__})") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"--weights {weights}: expected a dictionary of tensors, as torchvision saves it")
    return state


def start_from(net: Net, weights: str, variant: str) -> None:
    """Load what --weights names into `net`. InputError: it cannot be had, or does not fit this variant."""
    if weights == "none":
        return
    state = read_weights(weights, variant)
    try:
        load_pretrained(net, state)
    except ValueError as error:
        raise InputError(f"--weights {weights}, --variant {variant}: {error}") from None


def describe(photographs: data.Photographs, tasks: Sequence[Task]) -> str:
    """How many photographs there are, and how many have a label for each task."""
    labelled = (f"{t.name} {sum(t.labelled(r) for r in photographs.records)}" for t in tasks)
    return f"{len(photographs)} photographs ({', '.join(labelled)})"


def announcement(training: data.Photographs, validation: data.Photographs, findings: Mapping, tasks: Sequence[Task],
                 options: Options) -> str:
    """What a run is about to learn from, what it left out, and what it had to decide."""
    how = "as the data set says" if any(r.part == "val" for r in validation.records) else f"fold {options.fold}"
    lines = [f"training on {describe(training, tasks)}, validation ({how}) on {describe(validation, tasks)}"]
    if leaks := findings["leaks"]["photographs"]:
        lines.append(f"{leaks} photographs of the training part show an eye of the test part: " + (
            "kept (--keep-leaks), so test scores say little about new eyes" if options.keep_leaks else "left out"))
    if validated := len(findings["left_out_for_validation"]):
        lines.append(f"{validated} photographs of the training part show an eye of the validation part: left out")
    if conflicts := len(findings["conflicts"]):
        lines.append(f"{conflicts} times copies of one photograph carry different labels; config.json lists them and "
                     "what training goes by")
    return "\n".join(lines)


def next_folder(runs: Path, tasks: Sequence[str]) -> Path:
    """runs/cls_seg_1, or the next number that is free."""
    number = 1
    while (runs / f"{'_'.join(tasks)}_{number}").exists():
        number += 1
    return runs / f"{'_'.join(tasks)}_{number}"


# ---- command line ----

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; flags whose default depends on the data are None here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def add(group, flag, text, default=None, **how):
        shown = " ".join(default) if isinstance(default, tuple) else default
        group.add_argument(flag, default=default, help=text + (default is not None) * f" (default: {shown})", **how)

    group = parser.add_argument_group("what is learned from what")
    add(group, "--tasks", f"any of {' '.join(TASKS)}", Options.tasks, nargs="+")
    add(group, "--data", "IDRiD's folder, a table FILE.csv, or a folder with train/CLASS/ in it; see README (default: "
                         "data/IDRiD if it exists, else drawn photographs)")
    add(group, "--size", "side of the square that the network sees (default: 128 drawn, else 256)", type=int)
    add(group, "--fold", f"I/N: validate on fold I of N of the training part (default: {Options.fold})")
    group.add_argument("--keep-leaks", action="store_true",
                       help="train on photographs of eyes in the test part too, as most of the literature does")
    add(group, "--name", "folder below runs/ (default: the tasks and the next free number)")
    group = parser.add_argument_group("network")
    add(group, "--variant", "EfficientNet variant", Options.variant, choices=VARIANTS)
    add(group, "--weights", "none, imagenet, or a file with a torchvision state dict (default: none for drawn "
                            "photographs, else imagenet if it can be had)")
    add(group, "--experts", f"in the expert layer; 0: no layer (default: {Options.experts}; private: tasks x chosen)",
        type=int)
    add(group, "--chosen", f"experts that each token is sent to (default: {Options.chosen}; uniform: all)", type=int)
    add(group, "--router", "; ".join(f"{kind}: {what}" for kind, what in ROUTERS.items()), Options.router,
        choices=ROUTERS)
    add(group, "--expert-width", "hidden units of an expert, in multiples of the map's channels", Options.expert_width,
        type=float)
    add(group, "--experts-at", "the layer's place: the deepest map, or the decoder's at stride 4, which all tasks then "
                               "share up to there", Options.experts_at,
        choices=PLACES)
    group = parser.add_argument_group("training")
    add(group, "--epochs", "at most (default: 5 drawn, else 40)", type=int)
    add(group, "--batch", "photographs in a step", Options.batch, type=int)
    add(group, "--lr", "highest learning rate of AdamW (default: 2.5e-3 drawn, else 1.5e-3)", type=float)
    add(group, "--weight-decay", "of AdamW", Options.weight_decay, type=float)
    add(group, "--patience", "epochs to wait for a better validation score", Options.patience, type=int)
    add(group, "--loss-weights", "fixed, uncertainty, or pairs like cls=0.5 seg=1", Options.loss_weights, nargs="+")
    add(group, "--balance", f"weight of the load-balancing loss (default: {Options.balance} for routers that learn)",
        type=float)
    group.add_argument("--no-augment", action="store_true", help="show every photograph as it is")
    group = parser.add_argument_group("machine")
    add(group, "--seed", "of the weights and everything random", Options.seed, type=int)
    add(group, "--workers", "processes that load photographs (default: 0 on CPU, else up to 8)", type=int)
    add(group, "--device", "auto: the GPU if there is one", Options.device, choices=("auto", "cpu", "cuda"))
    return parser.parse_args(argv)


def check_ranges(args: argparse.Namespace) -> None:
    """InputError: a number is out of its range."""
    for flag, lowest in (("epochs", 1), ("batch", 2), ("size", 64), ("patience", 1), ("lr", 1e-12), ("experts", 0),
                         ("chosen", 1), ("expert_width", 1e-3), ("weight_decay", 0), ("balance", 0), ("workers", 0),
                         ("seed", 0)):
        value = getattr(args, flag)
        if value is not None and not lowest <= value < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} {value}: expected at least {lowest}")
    if args.size and args.size % 32:
        raise InputError(f"--size {args.size}: expected a multiple of 32, the stride of the deepest map")
    if args.seed >= 1 << 32:
        raise InputError(f"--seed {args.seed}: expected less than {1 << 32}")


def settle_experts(args: argparse.Namespace) -> tuple[int, int, float]:
    """-> experts, chosen, weight of the balance loss; defaults depend on the router. InputError: they do not fit."""
    tasks = list(dict.fromkeys(args.tasks))
    if args.experts == 0:
        given = [f"--{flag}" for flag in ("chosen", "balance") if getattr(args, flag) is not None]
        given += [f"--{flag.replace('_', '-')}" for flag in ("router", "expert_width")
                  if getattr(args, flag) != getattr(Options, flag)]
        if given:
            raise InputError(f"--experts 0: there is no layer for {given[0]}; leave one of them out")
        return 0, 1, 0.0
    experts, chosen = args.experts, args.chosen
    if args.router == "private":
        if chosen is None:
            chosen = Options.chosen if experts is None else max(1, experts // len(tasks))
        experts = chosen * len(tasks) if experts is None else experts
    experts = Options.experts if experts is None else experts
    if chosen is None:
        chosen = experts if args.router == "uniform" else min(Options.chosen, experts)
    try:
        make_routers(args.router, 1, tasks, experts, chosen)
    except ValueError as error:
        raise InputError(str(error)) from None
    learns = args.router in LEARNED
    if args.balance and not learns:
        raise InputError(f"--balance {args.balance}: --router {args.router} does not learn, so there is nothing to "
                         "balance; leave --balance out")
    return experts, chosen, (Options.balance if args.balance is None else args.balance) if learns else 0.0


def settle(args: argparse.Namespace) -> tuple[Options, list[str]]:
    """Fill in the defaults that depend on the data and check the rest; -> options, notes to print and to keep."""
    if unknown := [t for t in args.tasks if t not in TASKS]:
        raise InputError(f"--tasks {unknown[0]}: no such task; there are {', '.join(TASKS)}; separate them by spaces")
    check_ranges(args)
    LossWeights([TASKS[t] for t in args.tasks], args.loss_weights)  # says what is wrong with them
    experts, chosen, balance = settle_experts(args)
    fold = Options.fold if args.fold is None else args.fold
    eyes.read_fold(fold)
    root = records.find_data(args.data)
    drawn, weights = root is None, args.weights or "none"
    # a wrong folder is told before anything is downloaded; drawings are never wrong
    found = records.DataSet([]) if drawn else records.read_data(root)
    if args.fold is not None and any(r.part == "val" for r in found.records):
        raise InputError(f"--fold {args.fold}: {root} names its own validation part; leave --fold out")
    notes = list(found.notes)
    if chosen == 1 < experts and args.router in LEARNED:
        notes.append("--chosen 1: an expert's weight is its softmax over all experts, less than 1; a softmax over the "
                     "chosen one alone would be 1 for any router, which could then learn nothing from the tasks")
    if drawn:
        notes.append("training on DRAWN photographs (synthetic.py): results are no IDRiD results. For IDRiD, unzip it "
                     f"from {records.SOURCE} and pass --data FOLDER")
    elif args.weights is None:
        try:
            read_weights("imagenet", args.variant)
            weights = "imagenet"
        except InputError as error:
            notes.append(f"warning: starting from random weights; {error}")
    device = evaluate.pick_device(args.device)
    workers = args.workers if args.workers is not None else 0 if device.type == "cpu" else min(8, os.cpu_count())
    return Options(
        tasks=tuple(dict.fromkeys(args.tasks)), data=None if drawn else str(root.resolve()),
        classes=found.classes, fold=fold, keep_leaks=args.keep_leaks,
        size=args.size or (128 if drawn else 256), epochs=args.epochs or (5 if drawn else 40), batch=args.batch,
        # five epochs of drawings are too short to overfit: learn faster and drop less
        lr=args.lr or (2.5e-3 if drawn else 1.5e-3), stochastic_depth=0.05 if drawn else 0.1,
        weight_decay=args.weight_decay, patience=args.patience, loss_weights=tuple(args.loss_weights),
        augment=not args.no_augment, variant=args.variant, weights=weights, experts=experts, chosen=chosen,
        router=args.router, expert_width=args.expert_width, experts_at=args.experts_at, balance=balance,
        seed=args.seed, workers=workers, device=args.device), notes


def main(argv: Sequence[str] | None = None) -> None:
    """python train.py ..."""
    args = parse(argv)
    keep_memory()
    options, notes = settle(args)
    if args.name and Path(args.name).name != args.name:
        raise InputError(f"--name {args.name}: expected a name, not a path; runs are kept in {records.HERE / 'runs'}")
    folder = records.HERE / "runs" / args.name if args.name else next_folder(records.HERE / "runs", options.tasks)
    if folder.exists():
        raise InputError(f"{folder}: exists already; choose another --name")
    for note in notes:
        print(note)
    experts = "no expert layer" if options.experts == 0 else (
        f"experts {options.experts}, chosen {options.chosen}, router {options.router}, width {options.expert_width:g}, "
        f"at {options.experts_at}")
    print(f"tasks {' '.join(options.tasks)}, {options.size} px, {experts}, run folder {folder}")
    begun = time.perf_counter()
    try:
        best = fit(options, folder, notes)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {f'checkpoints are in {folder}' if folder.exists() else 'nothing was trained yet'}")
        sys.exit(130)
    except FloatingPointError as error:
        print(f"error: {error}; checkpoints of the epochs before, if any, are in {folder}", file=sys.stderr)
        sys.exit(1)
    what = "DRAWN photographs, not IDRiD" if options.data is None else options.data
    print(f"\nchosen: epoch {best['epoch']} of {folder}, validation split of {what}")
    print(scores.table(best["metrics"], make_tasks(options.tasks, options.classes)))
    if best["usage"] and (idle := routes.idle(u["tokens"] for u in best["usage"].values())):
        print(routes.warning(idle))
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes. Score it again: python evaluate.py {folder}")


if __name__ == "__main__":
    records.command(main)
