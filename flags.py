"""From the command line of train.py to the options of a run.

    Options                 all that determines a run
    parse, settle           flags -> Options, with the defaults that depend on data and device
    resumed                 flags and the options of a run that was begun -> Options
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from model import ENCODERS, LEARNED, PLACES, ROUTERS, make_routers
from retina.datasets import readers, splits
from retina.datasets.records import DataSet
from retina.files import InputError
from retina.training import precision, pretrained
from retina.training.precision import check_precision, pick, pick_device
from tasks import TASKS


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
    deterministic: bool = False
    precision: str = "fp32"  # one of speed.HALVES
    save_every: int = 0  # steps; 0: at the end of epochs alone
    log_gradients: bool = False
    ignore_eyes: bool = False  # split as if each file showed an eye of its own: a control, see baselines.py
    streams: tuple[str, ...] = ()  # the tasks by which photographs are sampled, where these are more than are learned


MACHINE = ("data", "workers", "device", "save_every")  # what may be another when a run is resumed


def plain(options: Options) -> dict:
    """Options with lists in place of tuples, as JSON and checkpoints hold them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}


def read_loss_weights(words: Sequence[str], tasks: Sequence[str]) -> dict[str, float] | None:
    """["fixed"] -> {}, ["cls=0.5"] -> {"cls": 0.5}, ["uncertainty"] -> None: they are learned.

    InputError: another form, a task that is not trained, a negative number.
    """
    if list(words) in (["fixed"], ["uncertainty"]):
        return {} if words[0] == "fixed" else None
    weights = {}
    for word in words:
        task, _, number = word.partition("=")
        try:
            weights[task] = float(number)
        except ValueError:
            raise InputError(f"--loss-weights {word}: expected 'fixed', 'uncertainty', or pairs like "
                             "cls=0.5") from None
        if task not in tasks:
            raise InputError(f"--loss-weights {word}: {task!r} is not among --tasks {' '.join(tasks)}")
        if not 0 <= weights[task] < math.inf:
            raise InputError(f"--loss-weights {word}: expected a number that is not negative")
    return weights


def next_folder(runs: Path, tasks: Sequence[str]) -> Path:
    """runs/cls_seg_1, or the next number that is free."""
    number = 1
    while (runs / f"{'_'.join(tasks)}_{number}").exists():
        number += 1
    return runs / f"{'_'.join(tasks)}_{number}"


# ---- command line ----

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; flags whose default depends on the data are None here. `given`: those that were typed."""
    parser = argparse.ArgumentParser(description="Train one network on several tasks at once.")

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
    group = parser.add_argument_group("the run")
    add(group, "--name", "folder below runs/ (default: the tasks and the next free number)")
    add(group, "--resume", "go on with an interrupted run, as it was begun; other flags are not needed", type=Path,
        metavar="RUN")
    group.add_argument("--overwrite", action="store_true", help="with --name: replace the run of that name")
    add(group, "--save-every", "steps between checkpoints (default: only when an epoch is trained or scored)", type=int)
    group = parser.add_argument_group("network")
    add(group, "--variant", "EfficientNet variant", Options.variant, choices=ENCODERS)
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
    group.add_argument("--log-gradients", action="store_true",
                       help="write down the cosine between the tasks' gradients on the shared encoder, at eight steps "
                            "of each epoch")
    group = parser.add_argument_group("machine")
    add(group, "--seed", "of the weights and everything random", Options.seed, type=int)
    add(group, "--precision", "of the passes through the network (default: bf16 where the device has units for it, "
                              "fp16 on older GPUs, else fp32)", choices=precision.HALVES)
    add(group, "--workers", "processes that load photographs (default: 0 on CPU, else up to 8)", type=int)
    add(group, "--device", "auto: the GPU if there is one", Options.device, choices=("auto", "cpu", "cuda"))
    group.add_argument("--deterministic", action="store_true",
                       help="on a GPU: the same weights every time, more slowly; a CPU always does")
    args = parser.parse_args(argv)
    untyped = object()  # defaults do not replace what a namespace already has
    again = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), untyped)))
    args.given = {k: v for k, v in vars(again).items() if v is not untyped}
    return args


def check_ranges(args: argparse.Namespace) -> None:
    """InputError: a number is out of its range."""
    for flag, lowest in (("epochs", 1), ("batch", 2), ("size", 64), ("patience", 1), ("lr", 1e-12), ("experts", 0),
                         ("chosen", 1), ("expert_width", 1e-3), ("weight_decay", 0), ("balance", 0), ("workers", 0),
                         ("seed", 0), ("save_every", 1)):
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
    read_loss_weights(args.loss_weights, args.tasks)
    experts, chosen, balance = settle_experts(args)
    fold = Options.fold if args.fold is None else args.fold
    splits.read_fold(fold)
    root = readers.find_data(args.data)
    drawn, weights = root is None, args.weights or "none"
    # a wrong folder is told before anything is downloaded; drawings are never wrong
    found = DataSet([]) if drawn else readers.read_data(root)
    if args.fold is not None and any(r.part == "val" for r in found.records):
        raise InputError(f"--fold {args.fold}: {root} names its own validation part; leave --fold out")
    notes = list(found.notes)
    if chosen == 1 < experts and args.router in LEARNED:
        notes.append("--chosen 1: an expert's weight is its softmax over all experts, less than 1; a softmax over the "
                     "chosen one alone would be 1 for any router, which could then learn nothing from the tasks")
    if drawn:
        notes.append("training on DRAWN photographs (synthetic.py): results are no IDRiD results. For IDRiD, unzip it "
                     f"from {readers.SOURCE} and pass --data FOLDER")
    elif args.weights is None:
        try:
            pretrained.read_weights("imagenet", args.variant, ENCODERS[args.variant].weights)
            weights = "imagenet"
        except InputError as error:
            notes.append(f"warning: starting from random weights; {error}")
    device = pick_device(args.device)
    precision = args.precision or pick(device)
    check_precision(precision, device)
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
        seed=args.seed, workers=workers, device=args.device, deterministic=args.deterministic, precision=precision,
        save_every=args.save_every or 0, log_gradients=args.log_gradients), notes


def resumed(args: argparse.Namespace, begun: Mapping) -> Options:
    """The options that a run was begun with, and what was typed now in place of them; see check_same.

    InputError: a flag that is for new runs, or out of its range; options of another version.
    """
    given = args.given
    check_ranges(args)
    if new := [flag for flag in ("name", "overwrite") if flag in given]:
        raise InputError(f"--{new[0]}: --resume names a run that is there already; leave one of them out")
    if {f.name for f in fields(Options)} != begun.keys():
        raise InputError(f"--resume {args.resume}: made by another version of this project; train again")
    options = Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in begun.items()})
    typed = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in ("resume", "no_augment")}
    typed |= {"augment": False} if "no_augment" in given else {}
    if "tasks" in typed:
        typed["tasks"] = tuple(dict.fromkeys(typed["tasks"]))
    if "data" in typed:
        typed["data"] = str(readers.find_data(typed["data"]).resolve())
    return replace(options, **typed)


def check_same(folder: Path, begun: Mapping, now: Options) -> None:
    """InputError: an option is not the one with which the run in `folder` was begun, though the result hangs on it."""
    def words(value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, list) else value

    for name, value in plain(now).items():
        if name not in MACHINE and value != begun[name]:
            flag = "--no-augment" if name == "augment" else f"--{name.replace('_', '-')}"
            if not isinstance(value, bool):
                flag += f" {words(value)}"
            raise InputError(f"{flag}: {folder} was begun with {name} {words(begun[name])}; a resumed run keeps it; "
                             "leave the flag out")
