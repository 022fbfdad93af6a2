"""Does sharing help, does routing help, and what does each cost? The same training with one thing changed at a time.

    python baselines.py                             # on drawn photographs, the rows that matter most
    python baselines.py --data PATH/TO/IDRiD --all  # on the real ones; a GPU, or a night
    python baselines.py --list                      # the rows

    rows_for        what is compared: names, and what each changes of the default options
    finish          one row with one seed on one fold: trained, then measured
    summarised      all numbers of what is finished

How runs are started, what their numbers are worth and how they are told: retina/comparison.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import data
import evaluate
import train
import visualize
from data import Photographs
from retina import files
from retina.comparison import analysis, jobs, measurements, report
from retina.comparison.jobs import Job
from retina.datasets import readers, records, splits
from retina.evaluation import scoring
from retina.evaluation.scoring import Scores
from retina.files import InputError, RunError, command
from retina.training import checkpoint, interrupt, precision
from retina.training.config import of_result
from retina.training.distributed import ALONE
from tasks import Task, make_tasks
from train import Config


# ---- rows ----

@dataclass(frozen=True)
class Row:
    """One line of the comparison: the default model with something changed."""
    name: str
    words: str
    changes: Mapping = field(default_factory=dict)  # of Config
    usual: bool = False  # part of it without --all


def rows_for(tasks: Sequence[str], drawn: bool = False, weights: str = "none") -> list[Row]:
    """All rows for a comparison of these tasks, of which encoders start from `weights`.

    The dense adapter of equal cost is as wide as the experts that a token meets, that of equal parameters as all.
    """
    none = {"experts": 0, "chosen": 1, "balance": 0.0}
    dense = {"experts": 1, "chosen": 1, "balance": 0.0}
    cost, size = Config.chosen * Config.expert_width, Config.experts * Config.expert_width
    several, rows = len(tasks) > 1, [Row("constant", "constant guess", usual=True)]
    rows += [Row(f"{t}_alone", f"{t} alone", {**none, "tasks": (t,), "streams": tuple(tasks)}, True) for t in tasks]
    rows += [Row("hard", "hard sharing, no experts", none, True)] * several
    rows += [Row("dense", "dense adapter of equal cost", {**dense, "expert_width": cost}, True),
             Row("dense_large", "dense adapter of equal parameters", {**dense, "expert_width": size}),
             Row("private", "each task its own experts", {"router": "private", "balance": 0.0,
                                                         "experts": Config.chosen * len(tasks)}),
             Row("random", "frozen random routers", {"router": "random", "balance": 0.0}),
             Row("uniform", "all experts, averaged", {"router": "uniform", "balance": 0.0,
                                                      "chosen": Config.experts}),
             Row("learned", "learned routers", {}, True),
             Row("unbalanced", "learned routers without balance loss", {"balance": 0.0}),
             Row("plain", "default without augmentation", {"augment": False})]
    rows += [Row(f"cls_{w:g}", f"default, loss of cls times {w:g}", {"loss_weights": (f"cls={w:g}",)})
             for w in (0.1, 10) if several and "cls" in tasks]
    rows += [Row("uncertainty", "default, loss weights by uncertainty", {"loss_weights": ("uncertainty",)})] * several
    rows += [Row("leaky", "default without leak protection", {"ignore_eyes": True})] * (not drawn)  # drawn eyes differ
    rows += [Row("from_nothing", "default from random weights", {"weights": "none"})] * (weights != "none")
    return rows


def jobs_for(rows: Sequence[Row], base: Config, seeds: int, folds: Sequence[str], folder: Path) -> list[Job]:
    """All of them; a seed of every row before the next seed, so that what is done early can be compared.

    Reads all photographs once. InputError: some cannot be used; a task without a label on a side of a fold; a run of
    another comparison where one of these is to go.
    """
    seen, found = {}, []
    for seed, row, fold in itertools.product(range(seeds), [row for row in rows if row.name != "constant"], folds):
        options = replace(base, **row.changes, seed=seed, fold=fold)
        key = options.tasks, options.streams, options.fold, options.ignore_eyes
        if key not in seen:
            parts = data.load_photographs(options, make_tasks(options.tasks, options.classes))[:2]
            seen[key] = [part.fingerprint() for part in parts]
        path = folder / row.name / f"seed{seed}_fold{fold.replace('/', 'of')}"
        if (path / "config.json").exists():
            before, now = json.loads((path / "config.json").read_text())["options"], of_result(options)
            if differ := [k for k in now if before.get(k) != now[k]]:
                raise InputError(f"{path}: a run with {differ[0]} {before.get(differ[0])}, not {now[differ[0]]}; "
                                 "expected the comparison that is asked for; choose another --name, or remove that "
                                 "folder")
        found.append(Job(row.name, options, path, seen[key]))
    return found


# ---- one run ----

def kept(found: Scores) -> dict:
    """Scores as plain types and tensors; float32 holds counts of pixels exactly up to 16 million."""
    return {"names": found.names, "tallies": {t: x.float() for t, x in found.tallies.items()}, "losses": found.losses,
            "eyes": found.eyes}


def primaries(found: Scores) -> dict[str, float]:
    """{task: the metric that counts}."""
    return {task.name: float(task.metrics(found.tallies[task.name])[task.primary]) for task in found.tasks
            if task.name in found.tallies}


def finish(job: Job) -> None:
    """Train, from wherever its run stands, and leave in measured.pt what the chosen checkpoint is worth.

    Scores of validation; what counts, of training and of shifted photographs too; costs.
    """
    device = precision.pick_device(job.options.device)
    train.fit(job.options, job.folder, quiet=True, resume=(job.folder / "config.json").exists())
    peak = measurements.peak_bytes(device)  # before scoring
    run, log = evaluate.load_run(job.folder, device), checkpoint.read_log(job.folder)
    net, size, batch = precision.folded(run.net), job.options.size, job.options.batch
    root = None if job.options.data is None else Path(job.options.data)
    here, learned = (Photographs(evaluate.split_records(run, root, part), size) for part in ("val", "train"))

    def score(photographs):
        return scoring.score(net, data.in_order(photographs, run.tasks, batch, device), run.tasks)

    found, seconds = score(here), sum(line["seconds"] for line in log)
    checkpoint.save(job.folder / "measured.pt", {
        "photographs": job.photographs, "scores": kept(found), "epoch": run.epoch, "plain": primaries(found),
        "training": primaries(score(learned)), "threads": torch.get_num_threads(),
        "shifts": {shift: primaries(score(measurements.Shifted(here, shift))) for shift in measurements.SHIFTS},
        "machine": measurements.hardware(device),
        "costs": {"parameters": sum(p.numel() for p in run.net.parameters()),
                  "multiply_adds": measurements.multiply_adds(net, size, device),
                  # of a photograph of the batch, whether or not this network is given it: the same for all rows
                  "training_seconds": seconds / log[-1]["step"] / batch, "seconds": seconds, "peak_bytes": peak}})


def finish_alone(words: str) -> None:
    """In a process of its own, the job that jobs.start has put into words."""
    job = json.loads(words)
    jobs.settle_in(job["threads"])
    options = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()})
    with interrupt.stopped_by_sigterm(ALONE):
        finish(Job(job["row"], options, Path(job["folder"]), job["photographs"]))


# ---- the comparison ----

def gathered(asked: Sequence[Job], rows: Sequence[Row], tasks: Sequence[Task]) -> dict[str, analysis.Measured]:
    """What is finished of each row, put together; a seed of which a fold is missing is left out."""
    found = {}
    for row in rows:
        runs = {}
        for job in (job for job in asked if job.row == row.name):
            runs.setdefault(job.options.seed, []).append(job.measured())
        if whole := {seed: of for seed, of in runs.items() if all(of)}:
            found[row.name] = analysis.gather(row.words, whole, tasks)
    return found


def summarised(asked: Sequence[Job], rows: Sequence[Row], failed: Mapping[str, str], base: Config,
               folds: Sequence[str]) -> dict:
    """All numbers of what is finished. RunError: nothing is."""
    tasks, device = make_tasks(base.tasks, base.classes), precision.pick_device(base.device)
    found = gathered(asked, rows, tasks)
    firsts = {name: next(job for job in asked if (job.row, job.options.seed) == (name, of.seeds[0]))
              for name, of in found.items()}
    if not firsts:
        raise RunError(f"none of the {len(asked)} runs came to its end; first: {': '.join(next(iter(failed.items())))}")
    if rows[0].name == "constant":
        loaded = (data.load_photographs(replace(base, fold=fold), tasks)[:2] for fold in folds)
        found = {"constant": analysis.constant(loaded, tasks), **found}
    of_data = described(base)
    numbers = analysis.compared(found, tasks, {
        "what": what_words(base, folds, len(rows), of_data), "options": of_result(base), "folds": list(folds),
        "asked": {row.name: row.words for row in rows},
        "failed": {job: why.replace(f"{records.HERE}{os.sep}", "") for job, why in failed.items()},
        # of the runs, and of this process, which measures latencies
        **{k: sorted({x[k] for job in asked if (x := job.measured())}) for k in ("machine", "threads")},
        "threads_here": torch.get_num_threads(), **of_data})
    runs = {name: evaluate.load_run(job.folder, device) for name, job in firsts.items()}
    nets = {name: (precision.folded(run.net), base.size) for name, run in runs.items()}
    for name, value in measurements.latencies(nets, device).items():
        numbers["rows"][name]["costs"]["latency"] = value
        numbers["rows"][name] |= {"run": "/".join(firsts[name].folder.parts[-2:]),
                                  "cosines": [line.get("gradient_cosines", {})
                                              for line in checkpoint.read_log(firsts[name].folder)]}
    return numbers


def described(base: Config) -> dict:
    """Of the data: name (None: drawn), size of the first photograph, whether there is a validation part of its own."""
    if base.data is None:
        return {"data": None, "pixels": None, "own_validation": False}
    root = Path(base.data)
    found = readers.read_data(root).records
    return {"data": "IDRiD" if readers.is_idrid(root) else root.name, "pixels": files.image_size(found[0].image),
            "own_validation": any(r.part == "val" for r in found)}


def what_words(base: Config, folds: Sequence[str], rows: int, of_data: Mapping) -> str:
    """What was compared on what, in a sentence."""
    name = of_data["data"] or "DRAWN photographs, not IDRiD"
    where = "its own validation part" if of_data["own_validation"] else f"fold{'s' * (len(folds) > 1)} " + \
        " ".join(folds)
    return f"{name}, {base.size} px, at most {base.epochs} epochs, {where}, {rows} rows, weights {base.weights}"


REPORTED = ("overlays", "confusion", "routing", "curves")  # figures of the report


def report_pictures(found: Mapping, folder: Path, base: Config) -> dict[str, str]:
    """Draw what the report shows: of the default model's first run, with the curves of all rows; -> {name: path}."""
    names = report.pictured(found)
    m = visualize.gather(visualize.parse([*(str(folder / found["rows"][name]["run"]) for name in names), "--device",
                                          base.device, *(["--data", base.data] if base.data else [])]))
    m.logs = dict(zip(names, m.logs.values()))
    drawn = visualize.draw(m, REPORTED, folder / report.PICTURES)
    forms = {name: visualize.FIGURES[name][1] for name, content in drawn.items() if isinstance(content, bytes)}
    return {name: f"{report.PICTURES}/{name}.{form}" for name, form in {"comparison": "png", **forms}.items()}


def base_options(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """The default model with the flags that were typed, as train.py would settle them; -> options, notes.

    Without data: few epochs of small drawings, so that two seeds of the usual rows are done in a quarter of an hour.
    """
    given = {"size": 64, "epochs": 2} if readers.find_data(args.data) is None else {}
    given |= {k: v for k in ("data", "size", "epochs", "weights", "device") if (v := getattr(args, k)) is not None}
    options, notes = train.configure(["--tasks", *args.tasks, *(
        word for k, v in given.items() for word in (f"--{k}", str(v)))])
    return replace(options, log_gradients=len(options.tasks) > 1), notes


# ---- command line ----

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. InputError: numbers out of their range."""
    parser = argparse.ArgumentParser(description="Compare sharing and routing with what they should be better than.")
    parser.add_argument("--tasks", nargs="+", default=list(Config.tasks), help="any that train.py knows (default: "
                        f"{' '.join(Config.tasks)})")
    parser.add_argument("--data", help="as for train.py (default: data/IDRiD if it exists, else drawn photographs)")
    parser.add_argument("--all", action="store_true", help="all rows, not only the usual ones")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows; --list names them")
    parser.add_argument("--list", action="store_true", help="say which rows there are, and end")
    parser.add_argument("--seeds", type=int, help="of each row (default: 3; 2 on drawn photographs)")
    parser.add_argument("--folds", default="1/5", metavar="K/N", help="validate on the first K of N folds of the "
                        "training part, each photograph once (default: 1/5)")
    parser.add_argument("--epochs", type=int, help="at most (default: as in train.py; 2 of drawn photographs)")
    parser.add_argument("--size", type=int, help="side of the square that networks see (default: as in train.py; 64 "
                        "of drawn photographs)")
    parser.add_argument("--weights", help="as for train.py")
    parser.add_argument("--jobs", type=int, help="runs at once, which share the cores (default: 1; 2 of drawn "
                        "photographs on a CPU, which are too small to keep two cores busy)")
    parser.add_argument("--name", help="folder below runs/, in which a comparison that was interrupted goes on "
                        "(default: baselines, or baselines_ and the name of the data set)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is "
                        "one (default: auto)")
    parser.add_argument("--finish", metavar="JOB", help="what this program calls itself with, for each run")
    args = parser.parse_args(argv)
    for flag in ("seeds", "epochs", "jobs"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise InputError(f"--name {args.name}: expected a name, not a path")
    return args


def read_folds(text: str, base: Config) -> list[str]:
    """"3/5" -> ["1/5", "2/5", "3/5"]. InputError: another form; folds of a data set with a validation part."""
    count, number = splits.read_fold(text)
    if count > 1 and described(base)["own_validation"]:
        raise InputError(f"--folds {text}: {base.data} names its own validation part; leave --folds out")
    return [f"{k + 1}/{number}" for k in range(count)]


def choose_rows(args: argparse.Namespace, base: Config) -> list[Row]:
    """The rows that are asked for. InputError: there is none of that name."""
    rows = rows_for(base.tasks, base.data is None, base.weights)
    names = [row.name for row in rows]
    if args.only:
        if unknown := [name for name in args.only if name not in names]:
            raise InputError(f"--only {unknown[0]}: no such row; there are {', '.join(names)}")
        if args.only == ["constant"]:
            raise InputError("--only constant: nothing to train; name a row to compare it with")
        return [row for row in rows if row.name in args.only]
    return [row for row in rows if row.usual or args.all]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the comparison."""
    args = parse(argv)
    precision.keep_memory()
    if args.finish:
        return finish_alone(args.finish)
    if args.list:
        rows = rows_for(args.tasks, readers.find_data(args.data) is None, args.weights or "imagenet")
        print("\n".join([*(f"{row.name:16}{row.words}{' *' * row.usual}" for row in rows), "* also without --all"]))
        return
    base, notes = base_options(args)
    rows, folds = choose_rows(args, base), read_folds(args.folds, base)
    folder = records.HERE / "runs" / (args.name or "baselines" + (f"_{Path(base.data).stem}" if base.data else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with files.hold(folder):
        asked = jobs_for(rows, base, args.seeds or (2 if base.data is None else 3), folds, folder)
        print("\n".join([*notes, f"{len(asked)} runs in {folder}"]), flush=True)
        small = precision.pick_device(base.device).type == "cpu" and base.data is None and torch.get_num_threads() > 1
        try:
            with interrupt.stopped_by_sigterm(ALONE):
                failed = jobs.run_all(asked, __file__, args.jobs or 1 + small)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)
        found = summarised(asked, rows, failed, base, folds)
        print(report.screen(found))
        written = report.write(found, folder)
        files.write_text(folder / "REPORT.md", report.text(found, report_pictures(found, folder, base)))
    print(f"wrote {', '.join([*written, 'REPORT.md'])} to {folder}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command(main)
