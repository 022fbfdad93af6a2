"""How good is a run? Metrics over a whole split, never means of batches.

    score(net, ...) -> Scores       one pass over a split: tallies of every photograph, losses, use of the experts
    load_run(folder) -> Run         a network as it was chosen, with what it was trained for
    routing_report, rerouted        what the experts do (routes.py), and the scores with other routes
    main                            python evaluate.py runs/NAME [--split test] [--routing]

The metrics themselves stand with their tasks in tasks.py.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eyes
import routes
from model import Net, NetConfig
from records import InputError, Record, command, ignore_ctrl_c, read_data
from tasks import TASKS, Task, make_tasks

# n photographs with the label, E experts


# ---- scoring ----

@dataclass
class Scores:
    """What one pass over a split leaves."""
    tasks: list[Task]
    names: dict[str, list[str]]  # task -> its labelled photographs
    tallies: dict[str, Tensor]  # task -> (n, ...), see Task.tally
    losses: dict[str, float]  # task -> mean loss
    usage: dict[str, dict[str, list[float]]]  # task -> (E,) share of its "tokens" and mean "weight" of each expert

    def metrics(self) -> dict[str, dict]:
        """{task: {metric: value}}, each over all photographs of the split."""
        return {t.name: {"photographs": len(self.tallies[t.name]), "loss": self.losses[t.name],
                         **t.metrics(self.tallies[t.name])} for t in self.tasks if t.name in self.tallies}


def in_order(photographs: data.Photographs, batch: int) -> list[list[tuple[int, None]]]:
    """All photographs once, as they are, `batch` at a time."""
    indices = [(i, None) for i in range(len(photographs))]
    return [indices[i:i + batch] for i in range(0, len(indices), batch)]


def loader(photographs: data.Photographs, batches, tasks: Sequence[Task], device: torch.device,
           workers: int = 0) -> DataLoader:
    """Batches of `photographs`; `batches` are lists of its indices."""
    return DataLoader(photographs, batch_sampler=batches, collate_fn=partial(data.collate, tasks=tasks),
                      num_workers=workers, worker_init_fn=ignore_ctrl_c, pin_memory=device.type == "cuda")


@torch.inference_mode()
def score(net: Net, photographs: data.Photographs, tasks: Sequence[Task], device: torch.device, batch: int = 16,
          progress: str = "") -> Scores:
    """Run `net` over all photographs, in evaluation mode and float32; a task sees those that carry its label."""
    net.eval()
    batches = in_order(photographs, batch)
    scores = Scores(list(tasks), {}, {}, {}, {})
    tallies, sums, usage = ({t.name: [] for t in tasks} for _ in range(3))
    bar = tqdm(loader(photographs, batches, tasks, device), desc=progress, total=len(batches), leave=False,
               disable=None if progress else True, unit="batch")  # None: no bar where there is no terminal
    for b in bar:
        b = b.to(device)
        outputs, routing = net(b.images, b.rows)
        for task in tasks:
            if task.name not in outputs:
                continue
            output, target = outputs[task.name], b.targets[task.name]
            tallies[task.name].append(task.tally(task.decode(output), target).cpu())
            sums[task.name].append((len(target), float(task.loss(output, target))))
            scores.names.setdefault(task.name, []).extend(b.names[i] for i in b.rows[task.name].tolist())
            if routing:
                usage[task.name].append(routes.per_token(routing[task.name]).mean(1).cpu())  # (n_t, 2, E)
    for task in (t.name for t in tasks if tallies[t.name]):
        n = sum(k for k, _ in sums[task])
        scores.tallies[task] = torch.cat(tallies[task])
        scores.losses[task] = sum(k * loss for k, loss in sums[task]) / n
        if usage[task]:
            scores.usage[task] = dict(zip(("tokens", "weight"), torch.cat(usage[task]).mean(0).tolist()))
    return scores


def primary_score(metrics: Mapping[str, dict], tasks: Sequence[Task]) -> float:
    """What checkpoints are chosen by: the mean over tasks of each task's primary metric."""
    return sum(metrics[t.name][t.primary] for t in tasks if t.name in metrics) / len(metrics)


def table(metrics: Mapping[str, dict], tasks: Sequence[Task]) -> str:
    """Metrics as lines of text; per task, the primary metric first, then what there is for each kind or class."""
    lines = []
    for task in (t for t in tasks if t.name in metrics):
        values = metrics[task.name]
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        kinds = task.classes if isinstance(getattr(task, "classes", None), tuple) else ()
        columns = list(dict.fromkeys(k.replace(kind, "*") for k in numbers for kind in kinds if kind in k))
        rest = [f"{k} {v:.3f}" for k, v in numbers.items() if k != task.primary and not any(x in k for x in kinds)]
        lines.append(f"{task.name}   {values['photographs']} photographs   {task.primary} {numbers[task.primary]:.3f}"
                     "   " + "   ".join(rest))
        if columns:
            lines.append(" " * 9 + "".join(f"{c:>20}" for c in columns))
            for kind in kinds:
                cells = (numbers.get(c.replace("*", kind)) for c in columns)
                lines.append(f"   {kind:6}" + "".join(f"{'-' if v is None else format(v, '.3f'):>20}" for v in cells))
        if values.get("lesions", 4) < 4:
            lines.append("   kinds without a true pixel in this split, at this size, are left out of the means")
        if len(values.get("confusion", range(99))) <= 12:
            names = [n[:12] for n in getattr(task, "names", map(str, range(task.classes)))]
            width = max(6, *(len(n) + 2 for n in names))
            lines.append("   truth \\ predicted" + "".join(f"{n:>{width}}" for n in names))
            lines += [f"   {n:>17}" + "".join(f"{c:>{width}}" for c in row)
                      for n, row in zip(names, values["confusion"])]
    return "\n".join(lines)


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


def build_net(options: Mapping) -> tuple[Net, list[Task]]:
    """The network that `options` (of a command line or a checkpoint) describe, with fresh weights."""
    tasks = make_tasks(options["tasks"], options["classes"])
    config = NetConfig(**{f.name: options[f.name] for f in fields(NetConfig)})
    return Net(config, tasks).to(memory_format=torch.channels_last), tasks


def load_run(folder: Path, device: torch.device, checkpoint: str = "best.pt") -> Run:
    """Load a run's chosen checkpoint. InputError: no run folder, no checkpoint in it, not one of ours."""
    path = folder / checkpoint
    if folder.is_file():
        raise InputError(f"{folder}: a file; expected the run's folder, {folder.parent}")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected a folder made by train.py, such as runs/cls_seg_1")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if unknown := [t for t in state["options"]["tasks"] if t not in TASKS]:
            raise InputError(f"{path}: trained for the task {unknown[0]!r}, which tasks.py does not list "
                             f"({', '.join(TASKS)})")
        if missing := [f.name for f in fields(NetConfig) if f.name not in state["options"]]:
            raise InputError(f"{path}: made by another version of this project, its options lack {missing[0]!r}; train "
                             "again")
        net, tasks = build_net(state["options"])
        net.load_state_dict(state["net"])
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or foreign file provokes in torch.load
        raise InputError(f"{path}: not a checkpoint of this project "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from error
    return Run(folder, net.to(device), tasks, state["options"], state["epoch"], state["validation"])


def split_records(run: Run, root: Path | None, part: str) -> list[Record]:
    """Records of the test part, or of the validation split ("val") that `run` was chosen on.

    The validation split goes by the names that the run stored, not by cutting again: a file more or less below `root`
    would move the cut. InputError: one of them is not below `root`, or none has a label for the run's tasks, or the
    data set has other classes than the run.
    """
    found = read_data(root)
    if list(found.classes) != run.options["classes"]:
        here, there = (" ".join(c) or "IDRiD's grades" for c in (found.classes, run.options["classes"]))
        raise InputError(f"{root or 'drawn photographs'}: its classes are {here}, but {run.folder} was trained on "
                         f"{there}; expected the same")
    records, _ = data.find_eyes(found.records, run.options["size"])
    if part == "test":
        records = eyes.split(records).test
    else:
        known = {r.name: r for r in records}
        if lost := [name for name in run.validation if name not in known]:
            raise InputError(f"{root or 'drawn photographs'}: {len(lost)} of the {len(run.validation)} photographs on "
                             f"which {run.folder} was validated are not there (first: {lost[0]}); expected the data it "
                             f"was trained on, {run.options['data'] or 'drawn photographs'}")
        records = [known[name] for name in run.validation]
    records = [r for r in records if any(t.labelled(r) for t in run.tasks)]
    if not records:
        raise InputError(f"{root}: no photograph of its {part} part has a label for {' '.join(run.options['tasks'])}; "
                         "expected at least one")
    return records


# ---- what the experts do ----

def routing_report(run: Run, photographs: data.Photographs, device: torch.device, batch: int) -> dict:
    """Where the tokens of all photographs go, for every task; see routes.describe."""
    batches = loader(photographs, in_order(photographs, batch), [TASKS["seg"]], device)
    uses, records = routes.collect(run.net, batches, device), photographs.records
    if run.options["classes"]:
        labels = [None if r.category is None else run.options["classes"][r.category] for r in records]
    else:
        labels = [None if r.grade is None else f"grade {r.grade}" for r in records]
    return routes.describe(uses, labels, [r.eye or r.name for r in records],
                           "class" if run.options["classes"] else "grade")


def change(task: Task, before: Tensor, after: Tensor, draws: int = 200) -> tuple[float, float]:
    """Change of a task's primary metric between two tallies of the same photographs (n, ...), and its standard error

    from a paired bootstrap: both tallies with the same n photographs, drawn with replacement (Efron 1979).
    """
    def difference(rows):
        return task.metrics(after[rows])[task.primary] - task.metrics(before[rows])[task.primary]

    generator = torch.Generator().manual_seed(0)
    drawn = [difference(torch.randint(len(before), (len(before),), generator=generator)) for _ in range(draws)]
    return difference(slice(None)), float(torch.tensor(drawn, dtype=torch.float64).std())


def rerouted(net: Net, photographs: data.Photographs, tasks: Sequence[Task], device: torch.device,
             batch: int) -> dict[str, dict[str, dict[str, float]]]:
    """{what is changed: {task: change of its primary metric, its standard error, change of its loss}}.

    Nothing is trained again; see routes.interventions.
    """
    tapes = {t: routes.Tape() for t in net.experts.routers}
    with routes.routed_by(net.experts, {t: routes.Rerouted(router, tapes[t].record)
                                        for t, router in net.experts.routers.items()}):
        before = score(net, photographs, tasks, device, batch)
    by_name, changes = {t.name: t for t in tasks}, {}
    passes = list(routes.interventions(net.experts, {t: tapes[t] for t in before.tallies}))
    for titles, routers in tqdm(passes, desc="scoring with other routes", leave=False, disable=None):
        with routes.routed_by(net.experts, routers):
            after = score(net, photographs, tasks, device, batch)
        for t, title in titles.items():
            value, error = change(by_name[t], before.tallies[t], after.tallies[t])
            changes.setdefault(title, {})[t] = {"change": value, "standard_error": error,
                                                "loss": after.losses[t] - before.losses[t]}
    return changes


def table_of_changes(changes: Mapping[str, Mapping[str, dict]], tasks: Sequence[Task]) -> str:
    """What rerouted() found, as lines of text."""
    shown = [t for t in tasks if any(t.name in row for row in changes.values())]
    lines = [f"   {'change (standard error) of':30}" + "".join(f"{f'{t.name} {t.primary}':>20}" for t in shown)]
    for title, row in changes.items():
        cells = (f"{v['change']:+.3f} ({v['standard_error']:.3f})" if (v := row.get(t.name)) else "-" for t in shown)
        lines.append(f"   {title:30}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a run.")
    parser.add_argument("run", type=Path, help="folder made by train.py")
    parser.add_argument("--split", choices=("val", "test"), default="val",
                        help="test: the test part of the data set (default: val, what the run was chosen on)")
    parser.add_argument("--routing", action="store_true",
                        help="also: which experts see which grade and lesion, and what becomes of the scores without "
                             "an expert, with the routes of other photographs, with the routers of other tasks (E + T "
                             "+ 2 passes more)")
    parser.add_argument("--data", help="the data set, if it has moved since the run was trained")
    parser.add_argument("--batch", type=int, help="photographs at a time (default: as in training)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU if there is one (default: auto)")
    return parser.parse_args()


def main() -> None:
    """Score one run on validation or test; all that is found is written into the run's folder."""
    args = parse()
    if args.batch is not None and args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1")
    device = pick_device(args.device)
    run = load_run(args.run, device)
    if args.routing and run.net.experts is None:
        raise InputError(f"--routing: {args.run} was trained with --experts 0 and has no routing; leave --routing out")
    batch = args.batch or run.options["batch"]
    root = args.data or run.options["data"]
    root = None if root is None else Path(root)
    photographs = data.Photographs(split_records(run, root, args.split), run.options["size"])
    scores = score(run.net, photographs, run.tasks, device, batch, f"scoring {args.split}")
    what = "DRAWN photographs (not IDRiD)" if root is None else str(root)
    print(f"{args.run}, epoch {run.epoch}, {args.split} split of {what}")
    if args.split == "test" and run.options["keep_leaks"]:
        print("trained with --keep-leaks: it may have seen eyes of the test part")
    metrics = scores.metrics()
    print(table(metrics, run.tasks))
    suffix = "" if args.split == "val" else "_test"
    written = [f"predictions{suffix}.csv"]
    write_predictions(args.run / written[0], scores)

    def write(name, content):
        (args.run / f"{name}{suffix}.json").write_text(json.dumps(
            {"split": args.split, "data": "drawn" if root is None else str(root), "epoch": run.epoch, **content},
            indent=1))
        written.append(f"{name}{suffix}.json")

    write("metrics", {"metrics": metrics})
    if run.net.experts is not None:
        report = routing_report(run, photographs, device, batch)
        print(routes.table(report, details=args.routing))
        write("routing", report)
    if args.routing:
        changes = rerouted(run.net, photographs, run.tasks, device, batch)
        print(table_of_changes(changes, run.tasks))
        write("rerouted", changes)
    print(f"wrote {', '.join(written)} to {args.run}")


if __name__ == "__main__":
    command(main)
