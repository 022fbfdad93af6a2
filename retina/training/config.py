"""From the command line of train.py to the configuration of a run.

    flag                a field of Config that is a flag too: default, help, choices and bounds in one place
    parse               command line -> the values that were typed
    resolve_defaults    -> Config; some defaults depend on the data and the device
    read_request        -> Request: a new run, or one to resume

Every mistake is an InputError: one line that names the flag.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, asdict, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from retina.datasets import readers, records, splits
from retina.datasets.descriptions import MIRRORS
from retina.files import InputError
from retina.inference.full_size import LARGEST
from retina.training import checkpoint, precision, pretrained


if TYPE_CHECKING:
    from retina.training.distributed import World
    from train import Config


# where a run works and what lies where, not what it is; may be typed anew with --resume
OF_MACHINE = ("data", "teachers", "unlabelled", "workers", "device")
SIDES = set("left right upper lower top bottom superior inferior nasal temporal dexter dextra sinister sinistra links "
            "linkes rechts rechtes gauche droit droite izquierdo izquierda derecho derecha".split())
INVARIANT = {"nasal", "temporal"}  # in words: the disc moves along, see datasets/descriptions.py
ABBREVIATED = {"l", "r"}, {"le", "re"}, {"od", "os"}  # sides where both occur; "OD" alone may be the optic disc


# ---- a field is a flag ----

def flag(default: Any, group: str, text: str, *, real: Any = None, default_text: str | None = None,
         choices: Collection[str] | Mapping[str, str] | None = None, lowest: float | None = None,
         below: float = math.inf, highest: float = math.inf, multiple: int | None = None) -> Any:
    """A field of Config that is a flag. `real` is the default on real data, if it differs from that on drawn data.

    `default_text` describes a default that depends on more; `lowest`, `below`, `highest` and `multiple` bound numbers.
    """
    if isinstance(choices, Mapping):
        text += "".join(f"{'; ' if k else ''}{name}: {what}" for k, (name, what) in enumerate(choices.items()))
    if default_text is None and default is not None and not isinstance(default, bool):
        words = " ".join(default) if isinstance(default, tuple) else f"{default:g}" if isinstance(default, float) else \
            default
        default_text = f"{words} drawn, else {real:g}" if real is not None else words
    return field(default=default, metadata={
        "group": group, "help": text if default_text is None else f"{text} (default: {default_text})", "real": real,
        "choices": choices, "lowest": lowest, "below": below, "highest": highest,
        "multiple": multiple})


def flag_name(f: Field) -> str:
    """The flag of a field; --no-NAME if it is on by default."""
    return f"--{'no-' * (f.default is True)}{f.name.replace('_', '-')}"


def flags_of(config_class: type[Config]) -> dict[str, Field]:
    """The fields that are flags, by name."""
    return {f.name: f for f in fields(config_class) if "group" in f.metadata}


def parse(config_class: type[Config], argv: Sequence[str] | None) -> dict[str, Any]:
    """{field: value} of the flags that were typed. InputError: a number out of its range, an unknown word."""
    parser = argparse.ArgumentParser(description="Train one network on several tasks at once.",
                                     argument_default=argparse.SUPPRESS)
    types, known, groups = typing.get_type_hints(config_class), flags_of(config_class), {}
    for f in known.values():
        if f.metadata["group"] not in groups:
            groups[f.metadata["group"]] = parser.add_argument_group(f.metadata["group"])
        if isinstance(f.default, bool):
            options = {"action": "store_false" if f.default else "store_true", "dest": f.name}
        else:
            options = {"type": types[f.name] if types[f.name] in (int, float) else str,
                       "nargs": "+" if isinstance(f.default, tuple) else None, "metavar": f.name.upper()}
        groups[f.metadata["group"]].add_argument(flag_name(f), help=f.metadata["help"].replace("%", "%%"), **options)
    group = parser.add_argument_group("the run")
    group.add_argument("--name", help="folder below runs/ (default: the tasks and the next free number)")
    group.add_argument("--resume", type=Path, metavar="RUN",
                       help="go on with an interrupted run, as it was begun; other flags are not needed")
    group.add_argument("--overwrite", action="store_true", help="with --name: replace the run of that name")
    given = {k: tuple(dict.fromkeys(v)) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        if name in known:
            check(known[name], value)
    return given


def check(f: Field, value: Any) -> None:
    """InputError: a number is out of its range, or a word is not among the choices."""
    known, lowest, below, highest, multiple = (
        f.metadata[k] for k in ("choices", "lowest", "below", "highest", "multiple"))
    words = value if isinstance(value, tuple) else (value,)
    if known and (unknown := [word for word in words if word not in known]):
        several = isinstance(value, tuple)
        raise InputError(f"{flag_name(f)} {unknown[0]}: no such {f.name[:-1] if several else f.name}; there are "
                         f"{', '.join(known)}" + "; separate them by spaces" * several)
    if lowest is not None and not lowest <= value < math.inf:
        raise InputError(f"{flag_name(f)} {value}: expected at least {lowest}")
    if multiple and value % multiple:
        raise InputError(f"{flag_name(f)} {value}: expected a multiple of {multiple}, the stride of the bottleneck")
    if below < math.inf and value >= below:
        raise InputError(f"{flag_name(f)} {value}: expected less than {below}")
    if highest < math.inf and value > highest:
        raise InputError(f"{flag_name(f)} {value}: expected at most {highest}")


def as_dict(config: Config) -> dict:
    """A configuration with lists in place of tuples, as in JSON and checkpoints."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def result_options(config: Config) -> dict:
    """The same without the fields that the result does not depend on."""
    return {k: v for k, v in as_dict(config).items() if k not in (*OF_MACHINE, "names")}  # names follow from the data


# ---- defaults that depend on the data and the device ----

def read_loss_weights(words: Sequence[str], tasks: Sequence[str]) -> dict[str, float] | None:
    """["fixed"] -> {}, ["cls=0.5"] -> {"cls": 0.5}, ["uncertainty"] -> None, since they are learned.

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


def resolve_experts(config_class: type[Config], given: Mapping[str, Any], tasks: Sequence[str],
                    model: ModuleType) -> dict[str, Any]:
    """num_experts, top_k and balance_weight, as the router needs them.

    `model` is model.py, which knows the routers. InputError: a flag that has no meaning here, numbers that do not fit.
    """
    router = given.get("router", config_class.router)
    if given.get("num_experts") == 0:
        changed = [name for name in ("router", "expert_ratio")
                   if given.get(name, getattr(config_class, name)) != getattr(config_class, name)]
        if meaningless := [name for name in ("top_k", "balance_weight") if name in given] + changed:
            raise InputError(f"--num-experts 0: there is no layer for --{meaningless[0].replace('_', '-')}; leave one "
                             "of them out")
        return {"num_experts": 0, "top_k": 1, "balance_weight": 0.0}
    learns = router in model.LEARNED
    if not learns and given.get("balance_weight"):
        raise InputError(f"--balance-weight {given['balance_weight']}: --router {router} does not learn, so there is "
                         "nothing to balance; leave --balance-weight out")
    experts, top_k = given.get("num_experts"), given.get("top_k")
    if router == "private":
        top_k = top_k or (config_class.top_k if experts is None else max(1, experts // len(tasks)))
        experts = experts or top_k * len(tasks)
    experts = experts or config_class.num_experts
    top_k = top_k or (experts if router == "uniform" else min(config_class.top_k, experts))
    try:
        model.make_routers(router, 1, tasks, experts, top_k)
    except ValueError as error:
        raise InputError(str(error)) from None
    return {"num_experts": experts, "top_k": top_k,
            "balance_weight": given.get("balance_weight", config_class.balance_weight) if learns else 0.0}


def names_of_sides(names: Sequence[str]) -> list[str]:
    """Those of the names of classes that have a word for a side in them: "left-eye", "LEFT_EYE", "lefteye"."""
    words = {name: {re.sub("eyes?$", "", word.lower()) for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
             for name in names}
    sides = SIDES.union(*(pair for pair in ABBREVIATED if pair <= set().union(*words.values())))
    return [name for name in names if words[name] & sides]


def side_notes(tasks: Sequence) -> list[str]:
    """A note for each of the tasks whose classes, signs or words mirror images would mix up, where the label does not

    follow them.
    """
    def follows(label, name):
        return any(label.mirrored(name, *sides) != name for sides in MIRRORS)

    notes = []
    for t in tasks:
        label, words = records.LABELS[t.label], getattr(t, "vocabulary", ())
        signs = t.classes if isinstance(label, records.SignsLabel) else ()
        for what, names in (("classes", getattr(t, "names", ())), ("signs", signs), ("words", set(words) - INVARIANT)):
            found = [name for name in names_of_sides(sorted(names or ())) if not follows(label, name)]
            if found:
                notes.append(f"{what} {', '.join(found[:8])} sound like sides; a mirror image turns one into the "
                             "other: use --no-flips")
    return notes


def resolve_defaults(config_class: type[Config], given: Mapping[str, Any],
                     model: ModuleType) -> tuple[Config, list[str]]:
    """The typed values, and defaults for the others; -> configuration, notes to print and to store.

    InputError: the data cannot be read, or flags do not fit them or each other.
    """
    tasks = given.get("tasks", config_class.tasks)
    read_loss_weights(given.get("loss_weights", config_class.loss_weights), tasks)
    splits.read_fold(given.get("fold", config_class.fold))
    values = resolve_experts(config_class, given, tasks, model)
    root = readers.find_data(given.get("data"))
    # a wrong folder is told before anything is downloaded
    data_set = readers.read_data(root)
    if "fold" in given and any(r.split == "val" for r in data_set.records):
        raise InputError(f"--fold {given['fold']}: {root} names its own validation split; leave --fold out")
    notes = list(data_set.notes)
    if values["top_k"] == 1 < values["num_experts"] and given.get("router", config_class.router) in model.LEARNED:
        notes.append("--top-k 1: an expert's weight is its softmax over all experts, less than 1; a softmax over the "
                     "top one alone would be 1 for any router, which could then learn nothing from the tasks")
    if root is None:
        notes.append("training on DRAWN photographs (retina/datasets/synthetic.py): results are no IDRiD results. For "
                     f"IDRiD, unzip it from {readers.SOURCE} and pass --data FOLDER")
    else:
        values |= {f.name: f.metadata["real"] for f in fields(config_class) if f.metadata.get("real") is not None}
        if "encoder_weights" not in given:
            encoders = (given["encoder"],) if "encoder" in given else (config_class.encoder, "lite0")
            start, note = pretrained.pick_weights({e: model.ENCODERS[e].weights for e in encoders})
            values |= start
            notes.append(note)
    size, crops = (given.get(k, values.get(k, getattr(config_class, k))) for k in ("image_size", "crops"))
    if round(size * crops) > LARGEST:
        raise InputError(f"--crops {crops:g}: {round(size * crops)} pixels at --image-size {size}; expected at most "
                         f"{LARGEST}")
    if meaningless := [f.name for f in flags_of(config_class).values() if f.metadata["group"] == "teachers" and
                       f.name not in ("teachers", "labelled") and f.name in given and "teachers" not in given]:
        raise InputError(f"--{meaningless[0].replace('_', '-')}: nobody teaches; expected --teachers RUN as well")
    device = precision.pick_device(given.get("device", config_class.device))
    values |= {"precision": precision.default_precision(device),
               "workers": 0 if device.type == "cpu" else min(8, os.cpu_count())}
    typed = {k: v for k, v in given.items() if k in flags_of(config_class)} | paths_of(given)
    learned = [name for name, label in records.LABELS.items() if label.task in tasks]
    config = config_class(**(values | typed | {k: values[k] for k in ("num_experts", "top_k", "balance_weight")} |
                     {"data": root and str(root.resolve()), "names": data_set.names(learned)}))
    precision.check_precision(config.precision, device)
    return config, notes


def paths_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of teachers and the folder without labels, where they are typed, as paths from anywhere.

    InputError: no such folder.
    """
    if "unlabelled" in given and not Path(given["unlabelled"]).is_dir():
        raise InputError(f"--unlabelled {given['unlabelled']}: no such folder; expected a folder of photographs")
    return {k: tuple(str(Path(p).resolve()) for p in given[k]) if k == "teachers" else str(Path(given[k]).resolve())
            for k in ("teachers", "unlabelled") if k in given}


def check_world(config: Config, world: World) -> None:
    """InputError: this configuration cannot be trained by so many processes."""
    if config.batch_size < world.size:
        raise InputError(f"--batch-size {config.batch_size}: {world.size} processes share it; expected at least "
                         "one photograph for each")
    if config.log_gradients and world.size > 1:
        raise InputError("comparing gradients: in several processes those of single tasks are not summed; expected one "
                         "process")


# ---- a run that is resumed ----

def resume_config(config_class: type[Config], given: Mapping[str, Any], begun: Mapping[str, Any]) -> Config:
    """The configuration that a run was begun with, with the values that were typed now; see check_same.

    InputError: a flag for new runs; a configuration of another version.
    """
    if new := [name for name in ("name", "overwrite") if name in given]:
        raise InputError(f"--{new[0]}: --resume names a run that is there already; leave one of them out")
    if {f.name for f in fields(config_class)} != begun.keys():
        raise InputError(f"--resume {given['resume']}: made by another version of this project; train again")
    typed = {k: v for k, v in given.items() if k != "resume"}
    if "data" in typed:
        typed["data"] = str(readers.find_data(typed["data"]).resolve())
    typed |= paths_of(typed)
    return replace(config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in begun.items()}), **typed)


def check_same(folder: Path, begun: Mapping[str, Any], now: Config) -> None:
    """InputError: a value that the result depends on differs from the one that the run in `folder` was begun with."""
    def words(value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, list) else value

    named = {f.name: f for f in fields(now)}
    for name, value in result_options(now).items():
        if value != begun[name]:
            typed = flag_name(named[name]) + ("" if isinstance(value, bool) else f" {words(value)}")
            raise InputError(f"{typed}: {folder} was begun with {name} {words(begun[name])}; a resumed run keeps it; "
                             "leave the flag out")


def read_same(folder: Path, config: Config) -> dict | None:
    """last.pt of a run, None before it was first written. InputError: the run has another configuration."""
    begun, saved = checkpoint.read_last(folder)
    check_same(folder, begun, config)
    return saved


# ---- what is asked for ----

class Request(NamedTuple):
    """A run that a command line asks for."""
    config: Config
    folder: Path
    notes: list[str]
    resume: bool
    overwrite: bool


def next_folder(runs: Path, tasks: Sequence[str]) -> Path:
    """runs/cls_seg_1, or the next number that is free."""
    number = 1
    while (runs / f"{'_'.join(tasks)}_{number}").exists():
        number += 1
    return runs / f"{'_'.join(tasks)}_{number}"


def read_request(config_class: type[Config], argv: Sequence[str] | None, model: ModuleType) -> Request:
    """Read the command line, and check the data and the run that it names. InputError: see the functions above."""
    given = parse(config_class, argv)
    if "resume" in given:
        run = given["resume"]
        begun, _ = checkpoint.read_last(run)
        config = resume_config(config_class, given, begun)
        check_same(run, begun, config)
        if config.data is not None and not Path(config.data).exists():
            raise InputError(f"--resume {run}: {config.data}: its data set is not there; if it has moved, name it with "
                             "--data")
        return Request(config, run, [], True, False)
    config, notes = resolve_defaults(config_class, given, model)
    runs, name, overwrite = records.HERE / "runs", given.get("name"), "overwrite" in given
    if name is None and overwrite:
        raise InputError("--overwrite: expected --name as well, of the run to replace")
    if name and (Path(name).name != name or name == ".."):
        raise InputError(f"--name {name}: expected a name, not a path; runs are kept in {runs}")
    folder = runs / name if name else next_folder(runs, config.tasks)
    if folder.exists() and not overwrite:
        raise checkpoint.already_exists(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise InputError(f"--overwrite: {folder} holds something else than a run; choose another --name")
    return Request(config, folder, notes, False, overwrite)
