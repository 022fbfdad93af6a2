"""Score a run, compare runs, answer for new photographs.

    python evaluate.py RUN [RUN ...] [--split test]
    python evaluate.py RUN --images PATH --out FOLDER

Scores and what they are worth: retina/evaluation. Answers for new photographs: retina/inference.
"""

import argparse
import datetime
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from data import FundusDataset, eval_loader
from model import Net, NetConfig
from retina.datasets import cache, leaks, splits
from retina.datasets.readers import read_data
from retina.datasets.records import LABELS, Record
from retina.evaluation import routing, statistics
from retina.evaluation.compare import arms_of, calibration_line, show_comparison
from retina.evaluation.interventions import score_interventions
from retina.evaluation.routing import labels_of
from retina.evaluation.scoring import SplitScores, align, evaluate_split, summary, write_per_photograph
from retina.evaluation.tables import aligned, few_seeds, measure_rows, table, table_of_changes
from retina.evaluation.text_metrics import TextMetrics, guesses
from retina.files import InputError, jsonable, load_tensors, run_cli
from retina.inference.full_size import LARGEST, score_at_full_size
from retina.inference.predictor import NOTE, Predictor, find_photographs, picture_folders, predict_all
from retina.training import precision
from retina.training.precision import check_precision, pick_device
from retina.training.pretrained import differences
from tasks import TASKS, Task, build_net, make_tasks


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
    calibration: dict[str, dict]  # on them: temperatures and thresholds, by task
    fingerprints: dict[str, str]  # split -> of its photographs and labels when the run was trained, see data.py
    learned: list[str]  # hashes of photographs that it learned from, see training/distillation.py
    seen: dict[str, float]  # what its training photographs looked like, see inference/quality.py
    tiles: float | None = None  # the scale of the tiles in which it outlines lesions, beside the whole; None: in none


def load_run(folder: Path, device: torch.device, checkpoint: str = "best.pt") -> Run:
    """Load a run's best checkpoint. InputError: no run folder, none in it, a damaged one, not one of ours."""
    path = folder / checkpoint
    if folder.is_file():
        raise InputError(f"{folder}: a file; expected a run's folder, made by train.py, such as runs/cls_seg_1")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected a folder made by train.py, such as runs/cls_seg_1")
    state = load_tensors(path, device)
    try:
        if unknown := [t for t in state["options"]["tasks"] if t not in TASKS]:
            raise InputError(f"trained for the task {unknown[0]!r}, which tasks.py does not list ({', '.join(TASKS)})")
        if missing := [f.name for f in fields(NetConfig) if f.name not in state["options"]] + \
                [k for k in ("calibration", "test", "learned", "seen") if k not in state]:
            raise InputError(f"made by another version of this project, it lacks {missing[0]!r}; train again")
        net, tasks = build_net(state["options"])
        if wrong := differences(net.state_dict(), state["net"]):
            raise InputError(f"of another network than its options describe ({len(wrong)} differences; first: "
                             f"{wrong[0]}); train again")
        net.load_state_dict(state["net"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # whatever is in a file that is not ours
        raise InputError(f"{path}: not a checkpoint of this project ({type(error).__name__}: "
                         f"{(str(error).splitlines() or [''])[0]})") from error
    return Run(folder, net.to(device), tasks, state["options"], state["epoch"], state["validation"],
               state["calibration"], dict(zip(("train", "val", "test"), (*state["data"], state["test"]))),
               state["learned"], state["seen"], state.get("tiles"))


def split_records(run: Run, root: Path | None, split: str) -> list[Record]:
    """Records of the test split, of the validation split ("val") that `run` was chosen on, or what it learned from.

    The validation split goes by the names that the run stored, not by cutting again: a file more or less below `root`
    would move the cut. The training split ("train") is cut again, and has none of them. Whether they are the run's own
    photographs is for `not_its_own` to say. InputError: one of the names is not below `root`, or none has a label for
    the run's tasks, or the data set has other classes than the run.
    """
    found, known = read_data(root, run.options["names"].get("category", ())), run.options["names"]
    for label, names in found.names([t.label for t in run.tasks]).items():
        if label not in LABELS:  # "broad", which fine classes are parts of, is no label
            continue
        if new := [name for name in names if label in known and name not in known[label]]:
            raise InputError(f"{root or 'drawn photographs'}: {label} has {', '.join(new[:12])}, but {run.folder} was "
                             f"trained on {', '.join(known[label][:12])}; expected none but these")
    records, *_ = leaks.find_eyes(found.records, run.options["image_size"], run.options.get("ignore_eyes", False))
    if split == "test":
        records = sorted(splits.split(records).test, key=lambda r: r.name)
    elif split == "train":
        training = splits.split(records, run.options["fold"], run.options["keep_leaks"]).training
        records = [r for r in splits.hide_labels(training, run.options["labelled"]) if r.name not in run.validation]
    else:
        by_name = {r.name: r for r in records}
        if lost := [name for name in run.validation if name not in by_name]:
            raise InputError(f"{root or 'drawn photographs'}: {len(lost)} of the {len(run.validation)} photographs on "
                             f"which {run.folder} was validated are not there (first: {lost[0]}); expected the data it "
                             f"was trained on, {run.options['data'] or 'drawn photographs'}")
        records = [by_name[name] for name in run.validation]
    sampled = make_tasks(run.options.get("sampling_tasks", ()), known) if split == "train" else []
    records = [r for r in records if any(t.labelled(r) for t in [*run.tasks, *sampled])]
    if not records:
        raise InputError(f"{root}: no photograph of its {split} split has a label for "
                         f"{' '.join(run.options['tasks'])}; expected at least one")
    return records


def load_split(run: Run, data: str | None, split: str) -> tuple[Path | None, FundusDataset]:
    """Where the photographs of a split lie, in `data` or where they were in training, and they; see split_records."""
    where = data or run.options["data"]
    root = None if where is None else Path(where)
    return root, FundusDataset(split_records(run, root, split), run.options["image_size"])


def not_its_own(run: Run, root: Path | None, split: str, photographs: FundusDataset) -> str:
    """What ends the names of results on other photographs or labels than those of the run's own split; "" on its own.

    It names the data set and, since two may have one name, tells its photographs and labels apart.
    """
    if split == "test" and root is None and run.options["data"] is None:  # drawn ones, which training leaves alone
        return ""
    found = photographs.fingerprint()
    name = "drawn" if root is None else root.absolute().stem[:60]
    return "" if found == run.fingerprints[split] else f"_{name}_{found[:8]}"


def cautions(run: Run, split: str, other: str) -> list[str]:
    """Why scores may look better than they are, or are not the run's own; `other`: see not_its_own."""
    said = []
    if split == "val":
        said.append("not the pixels, or not the labels, that the run was chosen on: other files, other labels, or "
                    "another version of Pillow"
                    if other else "the checkpoint, temperatures and thresholds (temperature-scaled, calibrated, "
                    "referable) were chosen on these photographs: optimistic")
    elif other:
        said.append("not the test split beside which the run was trained: it may have seen eyes of these photographs")
    elif run.options["keep_leaks"]:
        said.append("trained with --keep-leaks: it may have seen eyes of the test split")
    return said


def announce_opening(run: Run, root: Path | None, photographs: FundusDataset) -> None:
    """Write down in the run that a test split is opened now, and with what; say how often it has been by now."""
    path, checkpoint, fingerprint = run.folder / "test_opened.jsonl", run.folder / "best.pt", photographs.fingerprint()
    line = {"when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "data": "drawn" if root is None else str(root), "photographs": fingerprint, "checkpoint": checkpoint.name,
            "epoch": run.epoch, "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    times = path.read_text(encoding="utf-8").count(fingerprint)
    print(f"{run.folder}: the test split of {root or 'drawn photographs'} is opened; {path.name} in it counts {times} "
          f"time{'s' * (times > 1)}")


def check_same(runs: Sequence[Run], photographs: Sequence[FundusDataset]) -> None:
    """InputError: what has one name is not the same photograph with the same labels for all of the runs."""
    for run, others in zip(runs[1:], photographs[1:]):
        labels = {t.label for t in runs[0].tasks} & {t.label for t in run.tasks}
        here, there = ({r.name: r for r in x.records} for x in (photographs[0], others))
        if differ := [name for name in here if name in there and here[name] != there[name] and
                      cache.content(here[name], labels) != cache.content(there[name], labels)]:
            raise InputError(f"{runs[0].folder} and {run.folder}: {differ[0]} is not the same photograph, or has other "
                             f"labels, in the data of the second ({len(differ)} such); expected one data set for all; "
                             "name it with --data")


# ---- command line ----

def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a run, compare runs, or answer for new photographs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="folder made by train.py. Two are compared; several that differ in nothing but their seed "
                             "count as one arm")
    parser.add_argument("--split", choices=("val", "test"), default="val",
                        help="test: the test split of the data set (default: val, what the run was chosen on)")
    parser.add_argument("--tiles", type=float, metavar="SCALE",
                        help="outline lesions also in overlapping tiles of the photograph at SCALE times the size of "
                             "training, 1 to 16, and take the mean (default: the scale of the run's --crops)")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH",
                        help="answer for these photographs, or all in these folders, instead; no labels needed")
    parser.add_argument("--out", type=Path, help="with --images: folder for predictions.csv, overlays and masks")
    parser.add_argument("--no-quality-check", action="store_true",
                        help="with --images: answer for pictures that would be refused, too, and say why they would be")
    parser.add_argument("--routing", action="store_true",
                        help="also: which experts see which grade and lesion, and what becomes of the scores without "
                             "an expert, with the routes of other photographs, with the routers of other tasks")
    parser.add_argument("--data", help="the data set, if it has moved since the run was trained")
    parser.add_argument("--batch-size", type=int, help="photographs, or tiles, at a time (default: as in training)")
    parser.add_argument("--precision", choices=precision.DTYPES, default="fp32",
                        help="of the network: bf16 (or fp16, on a GPU) is faster where the device has units for it, "
                             "and answers differ in the third digit (default: fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU if there is one (default: auto)")
    return parser.parse_args()


def check(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """InputError: flags that do not go together, or do not fit the runs."""
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: expected at least 1")
    if args.tiles is not None and not 1 <= args.tiles <= 16:
        raise InputError(f"--tiles {args.tiles:g}: expected 1 to 16, times the size of training")
    for run in runs:
        size, learned = run.options["image_size"], run.options["tasks"]
        if args.tiles is not None and round(size * args.tiles) > LARGEST:
            raise InputError(f"--tiles {args.tiles:g}: {round(size * args.tiles)} pixels at the size {size} of "
                             f"{run.folder}; expected at most {LARGEST}")
        if args.tiles is not None and "seg" not in learned:
            raise InputError(f"--tiles: {run.folder} was trained for {' '.join(learned)}; only seg, the outlines of "
                             "lesions, is predicted in tiles; leave --tiles out")
        if args.routing and run.net.experts is None:
            raise InputError(f"--routing: {run.folder} was trained with --num-experts 0 and has no routing; leave "
                             "--routing out")
    if (args.images is None) != (args.out is None):
        raise InputError("--images and --out go together: the photographs, and the folder to write answers to")
    for flag in ("images", "routing"):
        if getattr(args, flag) and len(runs) > 1:
            raise InputError(f"--{flag}: expected one run, got {len(runs)}")
    if args.no_quality_check and args.images is None:
        raise InputError("--no-quality-check: only new photographs are checked; name them with --images, or leave it "
                         "out")
    if args.images is not None and (args.routing or args.split == "test" or args.data):
        raise InputError("--images: new photographs belong to no split and no data set; leave --split, --data and "
                         "--routing out")
    for k, run in enumerate(runs):
        if run.folder.resolve() in [r.folder.resolve() for r in runs[:k]]:
            raise InputError(f"{run.folder}: named twice; expected different runs")
        if not {t.name for t in run.tasks} & {t.name for t in runs[0].tasks}:
            here, there = (" ".join(r.options["tasks"]) for r in (runs[0], run))
            raise InputError(f"{runs[0].folder} was trained for {here}, {run.folder} for {there}; expected runs with a "
                             "task in common")


def score_run(run: Run, photographs: FundusDataset, args: argparse.Namespace,
              device: torch.device) -> tuple[SplitScores, SplitScores | None]:
    """Score one run at the size it was trained with and, where there are masks of files, at theirs."""
    batch = args.batch_size or run.options["batch_size"]
    scores = evaluate_split(run.net, eval_loader(photographs, run.tasks, batch), run.tasks,
                            f"scoring {args.split}")
    return scores, score_at_full_size(run.net, run.tasks, photographs.records, photographs.size,
                                      args.tiles or run.tiles, device, batch)


def report(runs: Sequence[Run], scores: Sequence[SplitScores], full: Sequence[SplitScores | None],
           headings: Sequence[str], args: argparse.Namespace) -> dict:
    """Print the measures of one run, or of several that count as one; -> the same for JSON."""
    calibration = [run.calibration for run in runs]

    def measured(arm, fitted):
        values, limits = summary(arm, fitted)
        print(table(values, runs[0].tasks, limits))
        return {"metrics": values, "intervals": limits}

    print("\n".join(headings))
    if len(runs) > 1:
        over = " and seeds" if len(runs) >= statistics.FEWEST_SEEDS else f", for these networks; {few_seeds(len(runs))}"
        print(f"means over {len(runs)} runs, intervals over eyes{over}")
    masks = {t for x in full if x for t in x.stats}
    whole = [{t: c for t, c in run.calibration.items() if run.tiles is None or t not in masks}
             for run in runs]  # thresholds for answers in tiles do not fit those for the whole
    content = measured(scores, whole) | {"calibration": calibration[0] if len(runs) == 1 else calibration}
    if all(full):
        tiles = args.tiles or runs[0].tiles
        how = "" if tiles is None else f", also in tiles at {tiles:g} times the size of training"
        print(f"masks in the pixels of the files{how}:")
        content["full_size"] = measured(full, calibration) | {"tiles": tiles}
    print("\n".join(calibration_line(run.calibration) for run in runs))
    print(f"(in brackets: 95 % intervals from {statistics.RESAMPLES} resamples of eyes)")
    return content


def show_guesses(run: Run, scores: SplitScores, content: dict, write) -> None:
    """Print how the run's sentences compare with such as need no decoder, made of those that it was trained on."""
    task = next(t for t in run.tasks if isinstance(t, TextMetrics))
    try:
        root = run.options["data"] and Path(run.options["data"])
        training = [r for r in split_records(run, root, "train") if task.labelled(r)]
    except InputError as error:
        print(f"not compared with sentences of training, which cannot be read: {error}")
        return
    arms = guesses(task, scores, training, torch.stack([task.target(r) for r in training]))
    measured = {title: dict(zip(("metrics", "intervals"), (x[task.name] for x in summary([arm], [{}]))))
                for title, arm in arms.items()}
    own = {k: content[k][task.name] for k in ("metrics", "intervals")}
    columns = [measure_rows(task, x["metrics"], x["intervals"]) for x in (own, *measured.values())]
    print(aligned([["text", "the run", *measured]] + [[name, value, *(dict(c).get(name, "-") for c in columns[1:])]
                                                      for name, value in columns[0]]))
    write("guesses", measured)


def show_routes(run: Run, photographs: FundusDataset, args: argparse.Namespace, write) -> None:
    """Print what the experts do, and with --routing what becomes of the scores without them."""
    batch, records = args.batch_size or run.options["batch_size"], photographs.records
    uses = routing.collect(run.net, eval_loader(photographs, [TASKS["seg"]], batch))
    usage = routing.describe(uses, labels_of(run, records), [r.eye or r.name for r in records],
                             "class" if run.options["names"].get("category") else "grade")
    print(routing.table(usage, details=args.routing))
    write("routing", usage)
    if args.routing:
        changes = score_interventions(run.net, eval_loader(photographs, run.tasks, batch), run.tasks)
        print(table_of_changes(changes, run.tasks))
        write("interventions", changes)


def answer_for_new(run: Run, args: argparse.Namespace, device: torch.device) -> None:
    """--images: predict, and say what happened. Exit status 1: some could be neither answered nor refused, or none was

    answered for.
    """
    paths, notes = find_photographs(args.images)
    predictor = Predictor(run.net, run.tasks, run.calibration, run.options["image_size"], args.tiles or run.tiles,
                          args.batch_size or run.options["batch_size"], device, args.out, run.seen, args.precision,
                          not args.no_quality_check)
    if run.options["data"] is None:
        notes.append("warning: this run learned from drawn photographs alone; of real ones its answers mean nothing")
    print("\n".join([*notes, calibration_line(run.calibration)]))
    try:
        rows = predict_all(predictor, paths)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {args.out / 'predictions.csv'} has the photographs that were done", file=sys.stderr)
        sys.exit(130)
    number = Counter(row["status"] for row in rows)
    for row in rows:
        if row["reason"]:
            print(f"{row['status']}: {row['photograph']}: {row['reason']}", file=sys.stderr)
    written = ", ".join(["predictions.csv", *(picture_folders(run.tasks) if number["answered"] else [])])
    print(f"{number['answered']} of {len(rows)} photographs answered for, {number['refused']} refused, "
          f"{number['unreadable']} unreadable, {number['failed']} failed; wrote {written} to {args.out}\n{NOTE}")
    if number["unreadable"] or number["failed"] or not number["answered"]:
        sys.exit(1)


def main() -> None:
    """Score runs on validation or test; or answer for new photographs, see --images."""
    args = parse()
    device = pick_device(args.device)
    precision.tune_malloc()
    check_precision(args.precision, device)
    runs = [load_run(folder, device) for folder in args.runs]
    check(args, runs)
    for run in runs:
        run.net = precision.fuse_conv_bn(run.net)
    if args.images is not None:
        return answer_for_new(runs[0], args, device)
    with precision.autocast(device, args.precision):
        score_and_write(runs, args, device)


def score_and_write(runs: Sequence[Run], args: argparse.Namespace, device: torch.device) -> None:
    """All but --images: print what is found and write it into the first run's folder."""
    arms = arms_of(runs)
    roots, photographs = zip(*(load_split(run, args.data, args.split) for run in runs))
    if None in roots and args.tiles is not None:
        raise InputError("--tiles: drawn photographs have no files of a larger size; leave --tiles out")
    check_same(runs, photographs)
    others = [not_its_own(run, root, args.split, x) for run, root, x in zip(runs, roots, photographs)]
    folder, written = args.runs[0], []
    suffix = "_test" * (args.split == "test") + ("" if args.tiles is None else f"_tiles{args.tiles:g}") + others[0]

    def write(name, content):
        head = {"split": args.split, "data": str(roots[0] or "drawn"), "own": not others[0], "epoch": runs[0].epoch}
        (folder / f"{name}{suffix}.json").write_text(json.dumps(jsonable(head | content), indent=1), encoding="utf-8")
        written.append(f"{name}{suffix}.json")

    if args.split == "test":
        for opened in zip(runs, roots, photographs):
            announce_opening(*opened)
    scores, full = zip(*(score_run(run, x, args, device) for run, x in zip(runs, photographs)))
    align(scores)
    if all(full):
        align(full)
    headings = ["\n".join([f"{run.folder}, epoch {run.epoch}, {args.split} split of "
                           f"{root or 'DRAWN photographs (not IDRiD)'}", *cautions(run, args.split, other)])
                for run, root, other in zip(runs, roots, others)]
    members = [[[x[i] for i in arm] for arm in arms] for x in (runs, scores, full, headings)]
    for arm in zip(*members):
        content = report(*arm, args)
    if len(runs) == 1:
        write_per_photograph(folder / f"per_photograph{suffix}.csv", scores[0], runs[0].calibration)
        written.append(f"per_photograph{suffix}.csv")
        write("metrics", content)
        if "text" in scores[0].stats:
            show_guesses(runs[0], scores[0], content, write)
        if runs[0].net.experts is not None:
            show_routes(runs[0], photographs[0], args, write)
    elif len(arms) == 1:
        write("seeds", content | {"runs": [str(r.folder) for r in runs]})
    else:
        second = os.path.relpath(args.runs[arms[1][0]].resolve(), folder.resolve().parent)  # names may be the same
        write("_".join(["against", *(p for p in Path(second).parts if p != "..")]), show_comparison(*members[:3]))
    print(f"wrote {', '.join(written)} to {folder}")


if __name__ == "__main__":
    run_cli(main)
