"""Does sharing help, does routing help, and what does each cost? The same training with one thing changed at a time.

    python baselines.py                             # on drawn photographs, the configurations that matter most
    python baselines.py --data PATH/TO/IDRiD --all  # on the real ones; a GPU, or a night
    python baselines.py --distil                    # what teachers add, with few labels and with all
    python baselines.py --list                      # the configurations

    configurations_for  what is compared: names, and what each changes of the default options
    taught_by           the same for students of teachers
    finish              one configuration with one seed on one fold: trained, then measured
    summarize           all numbers of what is finished

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
from data import FundusDataset
from retina import files
from retina.comparison import analysis, jobs, measurements, report
from retina.comparison.analysis import SINGLE
from retina.comparison.jobs import Job
from retina.datasets import readers, records
from retina.datasets.splits import describe_split
from retina.evaluation import scoring
from retina.evaluation.scoring import SplitScores
from retina.files import InputError, RunError, run_cli
from retina.training import checkpoint, interrupt, precision
from retina.training.config import result_options
from retina.training.distributed import SINGLE_PROCESS
from tasks import Task, make_tasks
from train import Config


# ---- configurations ----

NO_EXPERTS = {"num_experts": 0, "top_k": 1, "balance_weight": 0.0}


@dataclass(frozen=True)
class Configuration:
    """One line of the comparison: the default model with something changed."""
    name: str
    words: str
    changes: Mapping = field(default_factory=dict)  # of Config
    usual: bool = False  # part of it without --all
    against: Sequence[str] = analysis.AGAINST  # which it is compared with
    teachers: Sequence[str] = ()  # configurations whose runs, of the same seed and fold, teach it
    times_epochs: float = 1.0


def configurations_for(tasks: Sequence[str], drawn: bool = False, weights: str = "none",
                       distil: bool = False) -> list[Configuration]:
    """All configurations for a comparison of these tasks, of which encoders start from `weights`.

    With `distil` the usual ones are those with teachers, and what these are held against. The dense adapter of equal
    cost is as wide as the experts that a token meets, that of equal parameters as all.
    """
    none, dense = NO_EXPERTS, {"num_experts": 1, "top_k": 1, "balance_weight": 0.0}
    cost, size = Config.top_k * Config.expert_ratio, Config.num_experts * Config.expert_ratio
    several, configurations = len(tasks) > 1, [Configuration("constant", "constant guess", usual=True, against=())]
    configurations += [Configuration(f"{t}_single", f"single-task {t}", single_task(t, tasks), True, ())
                       for t in tasks]
    configurations += [Configuration("hard", "hard sharing, no experts", none, True)] * several
    configurations += [
        Configuration("dense", "dense adapter of equal cost", {**dense, "expert_ratio": cost}, True),
        Configuration("dense_large", "dense adapter of equal parameters", {**dense, "expert_ratio": size}),
        Configuration("private", "each task its own experts", {"router": "private", "balance_weight": 0.0,
                                                               "num_experts": Config.top_k * len(tasks)}),
        Configuration("random", "frozen random routers", {"router": "random", "balance_weight": 0.0}),
        Configuration("uniform", "all experts, averaged", {"router": "uniform", "balance_weight": 0.0,
                                                           "top_k": Config.num_experts}),
        Configuration("learned", "learned routers", {}, True),
        Configuration("unbalanced", "learned routers without balance loss", {"balance_weight": 0.0}),
        Configuration("no_augmentation", "default without augmentation", {"augment": False})]
    configurations += [Configuration(f"cls_{w:g}", f"default, loss of cls times {w:g}",
                                     {"loss_weights": (f"cls={w:g}",)})
                       for w in (0.1, 10) if several and "cls" in tasks]
    configurations += [Configuration("gru", "default, sentences by a GRU without attention",
                                     {"text_decoder": "gru"})] * ("text" in tasks)
    configurations += [Configuration("uncertainty", "default, loss weights by uncertainty",
                                     {"loss_weights": ("uncertainty",)})] * several
    configurations += [Configuration("leaky", "default without leak protection",
                                     {"ignore_eyes": True}, against=())] * (not drawn)  # drawn eyes differ
    configurations += [Configuration("random_init", "default from random weights",
                                     {"encoder_weights": "none"})] * (weights != "none")
    if not distil:
        return configurations
    held = ("constant", "learned", *(f"{t}{SINGLE}" for t in tasks))
    return [*(replace(c, usual=c.name in held) for c in configurations), *taught_by(tasks)]


def single_task(task: str, tasks: Sequence[str]) -> dict:
    """What a network for one of the tasks changes: it sees its photographs in the batches of all."""
    return {**NO_EXPERTS, "tasks": (task,), "sampling_tasks": tuple(tasks)}


def taught_by(tasks: Sequence[str]) -> list[Configuration]:
    """Students of one multi-task teacher, of single-task teachers, of these and all pairs, with few labels and all.

    The paper's arrangement (Chelaramani et al. 2021, WACV, section 3), whose few are 15 % too. Without teachers the
    photographs whose labels are hidden are left out, and epochs are shorter; there are as many more. `untaught` is a
    student to whom the teacher's answers do not count: what norms, batches and balance do without them.
    """
    configurations = []
    for few, mark, of in ((True, "_15", ", 15 % of the labels"), (False, "", "")):
        share, longer = {"labelled": 0.15} if few else {}, 1 / 0.15 if few else 1.0
        multi, untaught, singles = f"learned{mark}", f"untaught{mark}", [f"{t}{SINGLE}{mark}" for t in tasks]
        pairs = {f"{a}_{b}{mark}": (a, b) for a, b in itertools.combinations(tasks, 2)} if len(tasks) > 2 else {}

        def add(name, words, changes, against=(), teachers=(), longer=1.0, share=share, of=of):
            configurations.append(Configuration(name, words + of, {**share, **changes}, True, against, teachers,
                                                longer))
        if few:
            for name, t in zip(singles, tasks):
                add(name, f"single-task {t}", single_task(t, tasks), longer=longer)
            add(multi, "learned routers", {}, [f"{{task}}{SINGLE}{mark}"], longer=longer)
        add(untaught, "a student whose teacher does not count", {"distil_weight": 0.0}, [multi], [multi])
        for name, pair in pairs.items():
            add(name, f"tasks {' and '.join(pair)} only", {"tasks": pair, "sampling_tasks": tuple(tasks)},
                longer=longer)
        against, smaller = [multi, untaught], [*singles, *(pairs or [multi] * (len(tasks) == 2))]
        add(f"by_multi{mark}", "taught by one multi-task network", {}, against, [multi])
        add(f"by_singles{mark}", "taught by single-task networks", {}, against, singles)
        if len(tasks) > 1:
            add(f"by_pairs{mark}", "taught by networks for one and two tasks", {}, against, smaller)
        add(f"annealed{mark}", "taught by single-task networks, annealed", {"anneal": True}, against, singles)
    return configurations


def jobs_for(configurations: Sequence[Configuration], base: Config, seeds: int, folds: Sequence[str],
             folder: Path) -> list[Job]:
    """All of them; a seed of every configuration before the next seed, so that what is done early can be compared.

    Reads all photographs once. InputError: some cannot be used; a task without a label on a side of a fold; a run of
    another comparison where one of these is to go.
    """
    fingerprints, asked = {}, []
    for seed, configuration, fold in itertools.product(
            range(seeds), [c for c in configurations if c.name != "constant"], folds):
        where = f"seed{seed}_fold{fold.replace('/', 'of')}"
        options = replace(base, **configuration.changes, seed=seed, fold=fold,
                          epochs=round(base.epochs * configuration.times_epochs),
                          patience=round(base.patience * configuration.times_epochs),
                          teachers=tuple(str(folder / teacher / where) for teacher in configuration.teachers))
        key = (options.tasks, options.sampling_tasks, options.fold, options.ignore_eyes, options.data,
               options.unlabelled, options.labelled, bool(options.teachers))
        if key not in fingerprints:
            splits = data.load_datasets(options, make_tasks(options.tasks, options.names))[:2]
            fingerprints[key] = [split.fingerprint() for split in splits]
        path = folder / configuration.name / where
        if (path / "config.json").exists():
            before = json.loads((path / "config.json").read_text(encoding="utf-8"))["options"]
            now = result_options(options)
            if differ := [k for k in now if before.get(k) != now[k]]:
                raise InputError(f"{path}: a run with {differ[0]} {before.get(differ[0])}, not {now[differ[0]]}; "
                                 "expected the comparison that is asked for; choose another --name, or remove that "
                                 "folder")
        asked.append(Job(configuration.name, options, path, fingerprints[key]))
    return asked


# ---- one run ----

def storable(scores: SplitScores) -> dict:
    """Scores as plain types and tensors; float32 holds counts of pixels exactly up to 16 million."""
    return {"names": scores.names, "stats": {t: x.float() for t, x in scores.stats.items()}, "losses": scores.losses,
            "eyes": scores.eyes}


def primary_metrics(scores: SplitScores) -> dict[str, float]:
    """{task: its primary metric}."""
    return {task.name: float(task.metrics(scores.stats[task.name])[task.primary]) for task in scores.tasks
            if task.name in scores.stats}


def finish(job: Job) -> None:
    """Train, from wherever its run stands, and leave in measured.pt what its best checkpoint is worth.

    Scores of validation; primary metrics of training and of shifted photographs too; costs.
    """
    device = precision.pick_device(job.options.device)
    train.fit(job.options, job.folder, quiet=True, resume=(job.folder / "config.json").exists())
    peak = measurements.peak_bytes(device)  # before scoring
    run, log = evaluate.load_run(job.folder, device), checkpoint.read_log(job.folder)
    net, size, batch = precision.fuse_conv_bn(run.net), job.options.image_size, job.options.batch_size
    root = None if job.options.data is None else Path(job.options.data)
    validation, training = (FundusDataset(evaluate.split_records(run, root, split), size) for split in ("val", "train"))

    def score(photographs):
        return scoring.evaluate_split(net, data.eval_loader(photographs, run.tasks, batch), run.tasks)

    scores, seconds = score(validation), sum(line["seconds"] for line in log)
    checkpoint.save(job.folder / "measured.pt", {
        "photographs": job.photographs, "scores": storable(scores), "epoch": run.epoch,
        "validation": primary_metrics(scores), "training": primary_metrics(score(training)),
        "threads": torch.get_num_threads(),
        "shifts": {shift: primary_metrics(score(measurements.Shifted(validation, shift)))
                   for shift in measurements.SHIFTS},
        "machine": measurements.hardware(device),
        "costs": {"parameters": sum(p.numel() for p in run.net.parameters()),
                  "multiply_adds": measurements.multiply_adds(net, size, device),
                  # of a photograph of the batch, whether or not this network is given it: alike in all configurations
                  "training_seconds": seconds / log[-1]["step"] / batch, "seconds": seconds, "peak_bytes": peak}})


def finish_single(words: str) -> None:
    """In a process of its own, the job that jobs.start has put into words."""
    job = json.loads(words)
    jobs.init_job(job["threads"])
    options = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()})
    options = replace(options, workers=min(options.workers, job["threads"]))  # several runs share the cores
    with interrupt.stopped_by_sigterm(SINGLE_PROCESS):
        finish(Job(job["configuration"], options, Path(job["folder"]), job["photographs"]))


# ---- the comparison ----

def finished(asked: Sequence[Job], configurations: Sequence[Configuration],
             tasks: Sequence[Task]) -> dict[str, analysis.Measurements]:
    """Of each configuration the measurements of its finished runs; a seed of which a fold is missing is left out."""
    measured = {}
    for configuration in configurations:
        runs = {}
        for job in (job for job in asked if job.configuration == configuration.name):
            runs.setdefault(job.options.seed, []).append(job.measured())
        if complete := {seed: folds for seed, folds in runs.items() if all(folds)}:
            measured[configuration.name] = analysis.measurements_of(configuration.words, complete, tasks,
                                                                    configuration.against)
    return measured


def summarize(asked: Sequence[Job], configurations: Sequence[Configuration], failed: Mapping[str, str], base: Config,
              folds: Sequence[str]) -> dict:
    """All numbers of what is finished. RunError: nothing is."""
    tasks, device = make_tasks(base.tasks, base.names), precision.pick_device(base.device)
    measured = finished(asked, configurations, tasks)
    firsts = {name: next(job for job in asked if (job.configuration, job.options.seed) == (name, m.seeds[0]))
              for name, m in measured.items()}
    if not firsts:
        raise RunError(f"none of the {len(asked)} runs came to its end; first: {': '.join(next(iter(failed.items())))}")
    if configurations[0].name == "constant":
        loaded = (data.load_datasets(replace(base, fold=fold), tasks)[:2] for fold in folds)
        measured = {"constant": analysis.constant(loaded, tasks), **measured}
    data_facts = described(base)
    summary = analysis.summarize(measured, tasks, {
        "what": what_words(base, folds, len(configurations), data_facts), "options": result_options(base),
        "folds": list(folds), "asked": {c.name: c.words for c in configurations},
        "taught": [c.name for c in configurations if c.teachers],
        "failed": {job: why.replace(f"{records.HERE}{os.sep}", "") for job, why in failed.items()},
        # of the runs, and of this process, which measures latencies
        **{k: sorted({x[k] for job in asked if (x := job.measured())}) for k in ("machine", "threads")},
        "threads_here": torch.get_num_threads(), **data_facts})
    runs = {name: evaluate.load_run(job.folder, device) for name, job in firsts.items()}
    nets = {name: (precision.fuse_conv_bn(run.net), base.image_size) for name, run in runs.items()}
    for name, value in measurements.latencies(nets, device).items():
        summary["configurations"][name]["costs"]["latency"] = value
        summary["configurations"][name] |= {"run": "/".join(firsts[name].folder.parts[-2:]),
                                            "cosines": [line.get("gradient_cosines", {})
                                                        for line in checkpoint.read_log(firsts[name].folder)]}
    return summary


def described(base: Config) -> dict:
    """Of the data: name (None: drawn), size of the first photograph, whether there is a validation split of its own."""
    if base.data is None:
        return {"data": None, "pixels": None, "own_validation": False}
    root = Path(base.data)
    all_records = readers.read_data(root).records
    return {"data": "IDRiD" if readers.is_idrid(root) else root.name, "pixels": files.image_size(all_records[0].image),
            "own_validation": any(r.split == "val" for r in all_records)}


def what_words(base: Config, folds: Sequence[str], configurations: int, data_facts: Mapping) -> str:
    """What was compared on what, in a sentence."""
    name = data_facts["data"] or "DRAWN photographs, not IDRiD"
    where = "its own validation split" if data_facts["own_validation"] else f"fold{'s' * (len(folds) > 1)} " + \
        " ".join(folds)
    return f"{name}, {base.image_size} px, at most {base.epochs} epochs, {where}, {configurations} configurations, " \
           f"encoder {base.encoder}, weights {base.encoder_weights}"


FOLDS = 5  # of the training split
REPORTED = ("overlays", "confusion", "routing", "curves")  # figures of the report


def report_pictures(summary: Mapping, folder: Path, base: Config) -> dict[str, str]:
    """Draw what the report shows of the default model's first run, with all configurations' curves; -> {name: path}."""
    names = report.pictured(summary)
    ctx = visualize.gather(visualize.parse([*(str(folder / summary["configurations"][name]["run"]) for name in names),
                                            "--device", base.device, *(["--data", base.data] if base.data else [])]))
    ctx.logs = dict(zip(names, ctx.logs.values()))
    figures = visualize.draw_figures(ctx, REPORTED, folder / report.PICTURES)
    forms = {name: visualize.FIGURES[name][1] for name, content in figures.items() if isinstance(content, bytes)}
    return {name: f"{report.PICTURES}/{name}.{form}" for name, form in {"comparison": "png", **forms}.items()}


def base_options(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """The default model with the flags that were typed, as train.py would resolve them; -> options, notes.

    Without data: few epochs of small drawings, so that the default is done in a quarter of an hour, or with `distil` in
    less than half an hour.
    """
    given = {"image_size": 64, "epochs": 3 if args.distil else 2} if readers.find_data(args.data) is None else {}
    given |= {k: v for k in ("data", "image_size", "epochs", "encoder", "encoder_weights", "device")
              if (v := getattr(args, k)) is not None}
    options, notes = train.configure(["--tasks", *args.tasks, *(
        word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v)))])
    return replace(options, log_gradients=len(options.tasks) > 1), notes


# ---- command line ----

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. InputError: numbers out of their range."""
    parser = argparse.ArgumentParser(description="Compare sharing and routing with what they should be better than.")
    parser.add_argument("--tasks", nargs="+", default=list(Config.tasks), help="any that train.py knows (default: "
                        f"{' '.join(Config.tasks)})")
    parser.add_argument("--data", help="as for train.py (default: data/IDRiD if it exists, else drawn photographs)")
    parser.add_argument("--all", action="store_true", help="all configurations, not only the usual ones")
    parser.add_argument("--distil", action="store_true", help="by default students of teachers, not the usual ones")
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="these configurations, and their teachers; --list names them")
    parser.add_argument("--list", action="store_true", help="say which configurations there are, and end")
    parser.add_argument("--seeds", type=int, help="of each configuration (default: 3; 2 on drawn photographs, 1 with "
                        "--distil; a claim takes 5)")
    parser.add_argument("--num-folds", type=int, default=1, metavar="K", help=f"validate on the first K of {FOLDS} "
                        "folds of the training split, each photograph once (default: 1)")
    parser.add_argument("--epochs", type=int, help="at most (default: as in train.py; 2 of drawn photographs, 3 with "
                        "--distil)")
    parser.add_argument("--image-size", type=int, help="side of the square that networks see (default: as in train.py; "
                        "64 of drawn photographs)")
    parser.add_argument("--encoder", help="as for train.py")
    parser.add_argument("--encoder-weights", help="as for train.py")
    parser.add_argument("--jobs", type=int, help="runs at once, which share the cores (default: 1; 2 of drawn "
                        "photographs on a CPU, which are too small to keep two cores busy)")
    parser.add_argument("--name", help="folder below runs/, in which a comparison that was interrupted goes on "
                        "(default: baselines or distil; with _ and the name of the data set)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is "
                        "one (default: auto)")
    parser.add_argument("--finish", metavar="JOB", help="what this program calls itself with, for each run")
    args = parser.parse_args(argv)
    for flag in ("seeds", "num_folds", "epochs", "jobs"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.num_folds > FOLDS:
        raise InputError(f"--num-folds {args.num_folds}: expected at most {FOLDS}")
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise InputError(f"--name {args.name}: expected a name, not a path")
    return args


def first_folds(number: int, base: Config) -> list[str]:
    """3 -> ["1/5", "2/5", "3/5"]. InputError: folds of a data set with a validation split."""
    if number > 1 and described(base)["own_validation"]:
        raise InputError(f"--num-folds {number}: {base.data} names its own validation split; leave --num-folds out")
    return [f"{k + 1}/{FOLDS}" for k in range(number)]


def describe_data(base: Config) -> tuple[str, dict[str, list[str]]]:
    """What train.py would say of the data before it trains, since the runs of a comparison are quiet; Config.names."""
    tasks = make_tasks(base.tasks, base.names)
    training, validation, findings = data.load_datasets(base, tasks)
    return describe_split(training.records, validation.records, findings, tasks, base), findings["names"]


def select_configurations(args: argparse.Namespace, base: Config) -> list[Configuration]:
    """The configurations that are asked for. InputError: there is none of that name."""
    configurations = configurations_for(base.tasks, base.data is None, base.encoder_weights, args.distil)
    names = [c.name for c in configurations]
    if args.only:
        if unknown := [name for name in args.only if name not in names]:
            raise InputError(f"--only {unknown[0]}: no such configuration; there are {', '.join(names)}" +
                             "; more with --distil" * (not args.distil))
        if args.only == ["constant"]:
            raise InputError("--only constant: nothing to train; name a configuration to compare it with")
        needed = {*args.only, *(teacher for c in configurations if c.name in args.only for teacher in c.teachers)}
        return [c for c in configurations if c.name in needed]
    return [c for c in configurations if c.usual or args.all]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the comparison."""
    args = parse(argv)
    precision.tune_malloc()
    if args.finish:
        return finish_single(args.finish)
    if args.list:
        drawn = readers.find_data(args.data) is None
        configurations = configurations_for(args.tasks, drawn, args.encoder_weights or (
            "none" if drawn else "imagenet"), args.distil)
        print("\n".join([*(f"{c.name:16}{c.words}{' *' * c.usual}" for c in configurations), "* also without --all"]))
        return
    base, notes = base_options(args)
    configurations, folds = select_configurations(args, base), first_folds(args.num_folds, base)
    name = ("distil" if args.distil else "baselines") + (f"_{Path(base.data).stem}" if base.data else "")
    folder = records.HERE / "runs" / (args.name or name)
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock_folder(folder):
        asked = jobs_for(configurations, base, args.seeds or (3 if base.data else 2 - args.distil), folds, folder)
        described_split, names = describe_data(replace(base, fold=folds[0]))
        print("\n".join([*notes, described_split, f"{len(asked)} runs in {folder}"]), flush=True)
        small = precision.pick_device(base.device).type == "cpu" and base.data is None and torch.get_num_threads() > 1
        try:
            with interrupt.stopped_by_sigterm(SINGLE_PROCESS):
                failed = jobs.run_all(asked, __file__, args.jobs or 1 + small)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)
        summary = summarize(asked, configurations, failed, replace(base, names=names), folds)
        print(report.screen(summary))
        written = report.write(summary, folder)
        files.write_text(folder / "REPORT.md", report.text(summary, report_pictures(summary, folder, base)))
    print(f"wrote {', '.join([*written, 'REPORT.md'])} to {folder}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
