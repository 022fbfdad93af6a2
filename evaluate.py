"""Score a run, compare runs, answer for new photographs.

    load_run(folder) -> Run         a network as it was chosen, with what it was trained for
    split_records                   the photographs that it is scored on
    routing_report                  what its experts do (routes.py)
    main                            python evaluate.py RUN [RUN ...] [--split test], or RUN --images PATH --out FOLDER

Scores and what they are worth: scores.py. Answers for new photographs: predict.py.
"""

import argparse
import csv
import datetime
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import data
import eyes
import intervals
import predict
import routes
import speed
from files import InputError, command, load_tensors
from model import Net, NetConfig, differences
from records import Record, read_data
from scores import Scores, align, claims, compare, in_order, loader, rerouted, score, score_at_full_size, summary, \
    table, table_of_changes, table_of_differences
from tasks import TASKS, Task, make_tasks


# ---- runs ----

@dataclass
class Run:
    """A trained network and the options of its training."""
    folder: Path
    net: Net
    tasks: list[Task]
    options: dict
    epoch: int
    validation: list[str]  # names of the photographs that it was chosen on
    chosen: dict[str, dict[str, float]]  # on them: temperatures and thresholds, by task
    learned_from: str | None  # fingerprint of the training photographs, see data.py


def build_net(options: Mapping) -> tuple[Net, list[Task]]:
    """The network that `options` (of a command line or a checkpoint) describe, with fresh weights."""
    tasks = make_tasks(options["tasks"], options["classes"])
    config = NetConfig(**{f.name: options[f.name] for f in fields(NetConfig)})
    return speed.fast(Net(config, tasks)), tasks


def load_run(folder: Path, device: torch.device, checkpoint: str = "best.pt") -> Run:
    """Load a run's chosen checkpoint. InputError: no run folder, none in it, a damaged one, not one of ours."""
    path = folder / checkpoint
    if folder.is_file():
        raise InputError(f"{folder}: a file; expected the run's folder, {folder.parent}")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected a folder made by train.py, such as runs/cls_seg_1")
    state = load_tensors(path, device)
    try:
        if unknown := [t for t in state["options"]["tasks"] if t not in TASKS]:
            raise InputError(f"{path}: trained for the task {unknown[0]!r}, which tasks.py does not list "
                             f"({', '.join(TASKS)})")
        if missing := [f.name for f in fields(NetConfig) if f.name not in state["options"]] + \
                [key for key in ("chosen",) if key not in state]:
            raise InputError(f"{path}: made by another version of this project, it lacks {missing[0]!r}; train again")
        net, tasks = build_net(state["options"])
        if wrong := differences(net.state_dict(), state["net"]):
            raise InputError(f"{path}: of another network than its options describe ({len(wrong)} differences; first: "
                             f"{wrong[0]}); train again")
        net.load_state_dict(state["net"])
    except InputError:
        raise
    except Exception as error:  # whatever is in a file that is not ours
        raise InputError(f"{path}: not a checkpoint of this project ({type(error).__name__}: "
                         f"{(str(error).splitlines() or [''])[0]})") from error
    return Run(folder, net.to(device), tasks, state["options"], state["epoch"], state["validation"],
               state["chosen"], state.get("data", [None])[0])


def split_records(run: Run, root: Path | None, part: str) -> list[Record]:
    """Records of the test part, of the validation split ("val") that `run` was chosen on, or what it learned from.

    The validation split goes by the names that the run stored, not by cutting again: a file more or less below `root`
    would move the cut. The training split ("train") is cut again, and has none of them. InputError: one of the names
    is not below `root`, or none has a label for the run's tasks, or the data set has other classes than the run.
    """
    found = read_data(root)
    if list(found.classes) != run.options["classes"]:
        here, there = (" ".join(c) or "IDRiD's grades" for c in (found.classes, run.options["classes"]))
        raise InputError(f"{root or 'drawn photographs'}: its classes are {here}, but {run.folder} was trained on "
                         f"{there}; expected the same")
    records, _ = data.find_eyes(found.records, run.options["size"], run.options.get("ignore_eyes", False))
    if part == "test":
        records = eyes.split(records).test
    elif part == "train":
        records = [r for r in eyes.split(records, run.options["fold"], run.options["keep_leaks"]).training
                   if r.name not in run.validation]
    else:
        known = {r.name: r for r in records}
        if lost := [name for name in run.validation if name not in known]:
            raise InputError(f"{root or 'drawn photographs'}: {len(lost)} of the {len(run.validation)} photographs on "
                             f"which {run.folder} was validated are not there (first: {lost[0]}); expected the data it "
                             f"was trained on, {run.options['data'] or 'drawn photographs'}")
        records = [known[name] for name in run.validation]
    sampled = make_tasks(run.options.get("streams", ()), run.options["classes"]) if part == "train" else []
    records = [r for r in records if any(t.labelled(r) for t in [*run.tasks, *sampled])]
    if not records:
        raise InputError(f"{root}: no photograph of its {part} part has a label for {' '.join(run.options['tasks'])}; "
                         "expected at least one")
    return records


# ---- what the experts do ----

def routing_report(run: Run, photographs: data.Photographs, device: torch.device, batch: int) -> dict:
    """Where the tokens of all photographs go, for every task; see routes.describe."""
    batches = loader(photographs, in_order(photographs, batch), [TASKS["seg"]], device)
    uses, records = routes.collect(run.net, batches), photographs.records
    return routes.describe(uses, labels_of(run, records), [r.eye or r.name for r in records],
                           "class" if run.options["classes"] else "grade")


def labels_of(run: Run, records: Sequence[Record]) -> list[str | None]:
    """The grade, or the class, of each photograph in words; None where it is not known."""
    if run.options["classes"]:
        return [None if r.category is None else run.options["classes"][r.category] for r in records]
    return [None if r.grade is None else f"grade {r.grade}" for r in records]


# ---- files ----

def write_predictions(path: Path, scores: Scores) -> None:
    """One row per photograph with every task's answer beside the truth."""
    rows: dict[str, dict] = {}
    for task in (t for t in scores.tasks if t.name in scores.tallies):
        for name, tally in zip(scores.names[task.name], scores.tallies[task.name]):
            rows.setdefault(name, {"photograph": name}).update(
                {f"{task.name}_{k}": v for k, v in task.row(tally).items()})
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())


def pick_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one. InputError: a GPU was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA GPU on this machine; use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """InputError: the device cannot compute in this precision."""
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: expected a GPU; on a CPU use fp32, or bf16")


def plain(value):
    """For JSON, which has no nan and no infinity: the same with None in their place."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def announce_opening(run: Run, root: Path | str | None) -> None:
    """Write down in the run that the test part is opened now, and with what; say how often it has been by now."""
    path = run.folder / "test_opened.jsonl"
    checkpoint = run.folder / "best.pt"
    line = {"when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "data": "drawn" if root is None else str(root), "checkpoint": checkpoint.name, "epoch": run.epoch,
            "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    times = len(path.read_text(encoding="utf-8").splitlines())
    print(f"{run.folder}: the test part is opened; {path.name} in it counts {times} time{'s' * (times > 1)}")


# ---- command line ----

LARGEST = 4096  # pixels: side of a photograph that is predicted in tiles


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a run, compare runs, or answer for new photographs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="folder made by train.py. Two are compared; several that differ in nothing but their seed "
                             "count as one side")
    parser.add_argument("--split", choices=("val", "test"), default="val",
                        help="test: the test part of the data set (default: val, what the run was chosen on)")
    parser.add_argument("--tiles", type=float, metavar="SCALE",
                        help="outline lesions in overlapping tiles of the photograph at SCALE times the size of "
                             "training, 1 to 16; for small ones")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH",
                        help="answer for these photographs, or all in these folders, instead; no labels needed")
    parser.add_argument("--out", type=Path, help="with --images: folder for predictions.csv, overlays and masks")
    parser.add_argument("--routing", action="store_true",
                        help="also: which experts see which grade and lesion, and what becomes of the scores without "
                             "an expert, with the routes of other photographs, with the routers of other tasks (E + T "
                             "+ 2 passes more)")
    parser.add_argument("--data", help="the data set, if it has moved since the run was trained")
    parser.add_argument("--batch", type=int, help="photographs, or tiles, at a time (default: as in training)")
    parser.add_argument("--precision", choices=speed.HALVES, default="fp32",
                        help="of the network: bf16 (or fp16, on a GPU) is faster where the device has units for it, "
                             "and answers differ in the third digit (default: fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU if there is one (default: auto)")
    return parser.parse_args()


def check(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """InputError: flags that do not go together, or do not fit the runs."""
    if args.batch is not None and args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1")
    if args.tiles is not None and not 1 <= args.tiles <= 16:
        raise InputError(f"--tiles {args.tiles:g}: expected 1 to 16, times the size of training")
    for run in runs:
        if args.tiles is not None and round(run.options["size"] * args.tiles) > LARGEST:
            raise InputError(f"--tiles {args.tiles:g}: {round(run.options['size'] * args.tiles)} pixels at the size "
                             f"{run.options['size']} of {run.folder}; expected at most {LARGEST}")
        if args.tiles is not None and "seg" not in run.options["tasks"]:
            raise InputError(f"--tiles: {run.folder} was trained for {' '.join(run.options['tasks'])}; only seg, the "
                             "outlines of lesions, is predicted in tiles; leave --tiles out")
        if args.routing and run.net.experts is None:
            raise InputError(f"--routing: {run.folder} was trained with --experts 0 and has no routing; leave "
                             "--routing out")
    if (args.images is None) != (args.out is None):
        raise InputError("--images and --out go together: the photographs, and the folder to write answers to")
    for flag in ("images", "routing"):
        if getattr(args, flag) and len(runs) > 1:
            raise InputError(f"--{flag}: expected one run, got {len(runs)}")
    if args.images is not None and (args.routing or args.split == "test" or args.data):
        raise InputError("--images: new photographs belong to no split and no data set; leave --split, --data and "
                         "--routing out")
    if twice := [run.folder for k, run in enumerate(runs) if run.folder.resolve() in
                 [r.folder.resolve() for r in runs[:k]]]:
        raise InputError(f"{twice[0]}: named twice; expected different runs")
    for run in runs:
        if not {t.name for t in run.tasks} & {t.name for t in runs[0].tasks}:
            here, there = (" ".join(r.options["tasks"]) for r in (runs[0], run))
            raise InputError(f"{runs[0].folder} was trained for {here}, {run.folder} for {there}; expected runs with a "
                             "task in common")


def sides_of(runs: Sequence[Run]) -> list[list[int]]:
    """Which runs count as one: those whose options differ in their seed alone. Two runs are two sides.

    InputError: more than two sides, or two that do not have as many runs.
    """
    if len(runs) == 2:
        return [[0], [1]]
    sides: dict[str, list[int]] = {}
    machine = ("seed", "workers", "device")
    for i, run in enumerate(runs):
        key = json.dumps({k: v for k, v in run.options.items() if k not in machine}, sort_keys=True)
        sides.setdefault(key, []).append(i)
    found = [sorted(side, key=lambda i: runs[i].options["seed"]) for side in sides.values()]
    for i, j in ((i, j) for side in found for i, j in zip(side, side[1:])):
        if runs[i].options["seed"] == runs[j].options["seed"]:
            raise InputError(f"{runs[i].folder} and {runs[j].folder} have the same options and the same seed; expected "
                             "different seeds; leave one out")
    if len(found) > 2:
        one, *others = (runs[side[0]].options for side in found)
        differ = [k for k in one if any(o.get(k) != one[k] for o in others) and k not in machine]
        raise InputError(f"{len(runs)} runs of {len(found)} kinds, which differ in {', '.join(differ)}; expected two "
                         "runs, or runs of at most two kinds that differ in nothing but their seed")
    if len({len(side) for side in found}) > 1:
        raise InputError(f"{len(found[0])} runs against {len(found[1])}; expected as many on both sides")
    return found


def score_run(run: Run, args: argparse.Namespace,
              device: torch.device) -> tuple[data.Photographs, Scores, Scores | None]:
    """Score one run at the size it was trained with and, where there are masks of files, at theirs; on what, first."""
    root = args.data or run.options["data"]
    root = None if root is None else Path(root)
    if root is None and args.tiles is not None:
        raise InputError("--tiles: drawn photographs have no files of a larger size; leave --tiles out")
    records = split_records(run, root, args.split)
    if args.split == "test":
        announce_opening(run, root)
    photographs = data.Photographs(records, run.options["size"])
    scores = score(run.net, photographs, run.tasks, device, args.batch or run.options["batch"],
                   f"scoring {args.split}")
    return photographs, scores, score_at_full_size(run.net, run.tasks, records, run.options["size"], args.tiles, device,
                                                   args.batch or run.options["batch"])


def report(runs: Sequence[Run], scores: Sequence[Scores], full: Sequence[Scores | None],
           args: argparse.Namespace) -> dict:
    """Print the measures of one run, or of several that count as one; -> the same for JSON."""
    chosen = [run.chosen for run in runs]
    what = "DRAWN photographs (not IDRiD)" if runs[0].options["data"] is None else args.data or runs[0].options["data"]
    for run in runs:
        print(f"{run.folder}, epoch {run.epoch}, {args.split} split of {what}")
        if args.split == "test" and run.options["keep_leaks"]:
            print("trained with --keep-leaks: it may have seen eyes of the test part")
    if len(runs) > 1:
        print(f"means over {len(runs)} runs, intervals over eyes and runs")
    values, limits = summary(scores, chosen)
    print(table(values, runs[0].tasks, limits))
    found = {"metrics": values, "intervals": limits, "chosen": chosen[0] if len(runs) == 1 else chosen}
    if all(full):
        how = "" if args.tiles is None else f", in tiles at {args.tiles:g} times the size of training"
        print(f"masks in the pixels of the original files{how}:")
        values, limits = summary(full, chosen)
        print(table(values, runs[0].tasks, limits))
        found["full_size"] = {"metrics": values, "intervals": limits, "tiles": args.tiles}
    print("\n".join(chosen_line(run) for run in runs))
    if args.split == "val":
        print("the checkpoint, temperatures and thresholds (_chosen, _at_temperature, referable_) were chosen on these "
              "photographs: optimistic")
    print(f"(in brackets: 95 % of {intervals.DRAWS} draws of eyes)")
    return found


def show_routes(run: Run, photographs: data.Photographs, args: argparse.Namespace, device: torch.device,
                write) -> None:
    """Print what the experts do, and with --routing what becomes of the scores without them."""
    batch = args.batch or run.options["batch"]
    found = routing_report(run, photographs, device, batch)
    print(routes.table(found, details=args.routing))
    write("routing", found)
    if args.routing:
        changes = rerouted(run.net, photographs, run.tasks, device, batch)
        print(table_of_changes(changes, run.tasks))
        write("rerouted", changes)


def show_comparison(runs: Sequence[Sequence[Run]], scores: Sequence[Sequence[Scores]],
                    full: Sequence[Sequence[Scores | None]]) -> dict:
    """Print how two sides differ and what may be claimed; -> the same for JSON."""
    compared = compare(*scores)
    at = "training"
    if all(f for side in full for f in side):
        compared |= compare(*full)
        at = "the original files"
    elif len({run.options["size"] for side in runs for run in side}) > 1 and "seg" in compared:
        del compared["seg"]
        at = "different sizes: not compared"
    print("\nsecond less first, on the same photographs; temperature 1, masks at a threshold of 0.5, in pixels of "
          f"{at}:")
    print(table_of_differences(compared))
    sentences = claims(compared, scores[0][0], len(runs[0]))
    print("\n".join([f"p of these {len(sentences)} adjusted for their number (Holm):", *sentences]))
    return {"first": [str(r.folder) for r in runs[0]], "second": [str(r.folder) for r in runs[1]],
            "masks_in_pixels_of": at, "compared": compared, "claims": sentences}


def chosen_line(run: Run) -> str:
    """Temperatures and thresholds in words."""
    found = (f"{task} " + " ".join(f"{k} {v:.3g}" for k, v in values.items())
             for task, values in run.chosen.items() if values)
    return f"temperatures and thresholds, chosen on validation: {'; '.join(found)}"


def answer_for_new(run: Run, args: argparse.Namespace, device: torch.device) -> None:
    """--images: predict, and say what happened; exit status 1 if a file could not be read."""
    paths, notes = predict.find_photographs(args.images)
    retinas = not run.options["classes"]
    predictor = predict.Predictor(run.net, run.tasks, run.chosen, run.options["size"], args.tiles,
                                  args.batch or run.options["batch"], device, args.out, retinas)
    print("\n".join([*notes, chosen_line(run)]))
    try:
        rows = predict.predict_all(predictor, paths)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {args.out / 'predictions.csv'} has the photographs that were done", file=sys.stderr)
        sys.exit(130)
    number = {status: sum(row["status"] == status for row in rows) for status in ("answered", "refused", "unreadable")}
    for row in rows:
        if row["status"] != "answered":
            print(f"{row['status']}: {row['photograph']}: {row['reason']}", file=sys.stderr)
    written = ", ".join(["predictions.csv", *(predict.folders(run.tasks) if number["answered"] else [])])
    print(f"{number['answered']} of {len(rows)} photographs answered for, {number['refused']} refused, "
          f"{number['unreadable']} unreadable; wrote {written} to {args.out}\n{predict.NOTE}")
    if number["unreadable"]:
        sys.exit(1)


def main() -> None:
    """Score runs on validation or test; or answer for new photographs, see --images."""
    args = parse()
    device = pick_device(args.device)
    speed.keep_memory()
    check_precision(args.precision, device)
    runs = [load_run(folder, device) for folder in args.runs]
    check(args, runs)
    for run in runs:
        run.net = speed.folded(run.net)
    with speed.autocast(device, args.precision):
        if args.images is not None:
            return answer_for_new(runs[0], args, device)
        score_and_write(runs, args, device)


def score_and_write(runs: Sequence[Run], args: argparse.Namespace, device: torch.device) -> None:
    """All but --images: print what is found and write it into the first run's folder."""
    sides = sides_of(runs)
    folder, written = args.runs[0], []
    suffix = "_test" * (args.split == "test") + ("" if args.tiles is None else f"_tiles{args.tiles:g}")

    def write(name, content):
        head = {"split": args.split, "data": args.data or runs[0].options["data"] or "drawn", "epoch": runs[0].epoch}
        (folder / f"{name}{suffix}.json").write_text(json.dumps(plain(head | content), indent=1))
        written.append(f"{name}{suffix}.json")

    found = [score_run(run, args, device) for run in runs]
    photographs, scores, full = zip(*found)
    align(scores)
    if all(full):
        align(full)
    members = [[[x[i] for i in side] for side in sides] for x in (runs, scores, full)]
    for side in zip(*members):
        content = report(*side, args)
        if len(runs) == 1:
            write("metrics", content)
    if len(runs) == 1:
        write_predictions(folder / f"predictions{suffix}.csv", scores[0])
        written.insert(0, f"predictions{suffix}.csv")
        if runs[0].net.experts is not None:
            show_routes(runs[0], photographs[0], args, device, write)
    elif len(sides) == 1:
        write("seeds", content | {"runs": [str(r.folder) for r in runs]})
    else:
        write(f"against_{args.runs[sides[1][0]].name}", show_comparison(*members))
    print(f"wrote {', '.join(written)} to {folder}")


if __name__ == "__main__":
    command(main)
