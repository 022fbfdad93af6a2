"""How good is a run, how far can that be trusted, and is one better than another?

    score(net, ...) -> Scores       one pass over a split: tallies of every photograph, losses, use of the experts
    summary, compare                measures with their intervals (intervals.py), of one run or several; two sides
    load_run(folder) -> Run         a network as it was chosen, with what it was trained for
    routing_report, rerouted        what the experts do (routes.py), and the scores with other routes
    main                            python evaluate.py RUN [RUN ...] [--split test], or RUN --images FOLDER --out FOLDER

The measures stand in metrics.py, what each task makes of them in tasks.py, answers for new photographs in predict.py.
"""

import argparse
import csv
import datetime
import hashlib
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eyes
import intervals
import metrics
import predict
import routes
from model import Net, NetConfig
from records import InputError, Record, command, ignore_ctrl_c, read_data
from tasks import TASKS, Classification, Joint, Lesions, Task, make_tasks

# n photographs with the label, E experts


# ---- scoring ----

@dataclass
class Scores:
    """What one pass over a split leaves."""
    tasks: list[Task]
    names: dict[str, list[str]] = field(default_factory=dict)  # task -> its labelled photographs
    tallies: dict[str, Tensor] = field(default_factory=dict)  # task -> (n, ...), see Task.tally
    losses: dict[str, float] = field(default_factory=dict)  # task -> mean loss
    # task -> (E,) share of its "tokens" and mean "weight" of each expert
    usage: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    pools: dict[str, metrics.Ranking | None] = field(default_factory=dict)  # task -> see Task.pool
    eyes: dict[str, str] = field(default_factory=dict)  # photograph -> its eye

    def scored(self) -> list[Task]:
        """The tasks of which something is labelled, and whether both grades are right where there are both."""
        joint = [Joint()] if "joint" in self.tallies else []
        return [t for t in self.tasks if t.name in self.tallies] + joint

    def metrics(self, chosen: Mapping[str, Mapping] = {}) -> dict[str, dict]:
        """{task: {metric: value}}, each over all photographs of the split; `chosen` as `choose` gives it."""
        found = {}
        for task in self.scored():
            t = task.name
            loss = {"loss": self.losses[t]} if t in self.losses else {}
            found[t] = {"photographs": len(self.tallies[t]), "eyes": len(set(self.eyes_of(t))), **loss,
                        **task.metrics(self.tallies[t], chosen.get(t, {}), self.pools.get(t))}
        return found

    def eyes_of(self, task: str) -> list[str]:
        """The eye of each photograph of a task."""
        return [self.eyes[name] for name in self.names[task]]

    def choose(self) -> dict[str, dict[str, float]]:
        """{task: what it fits on this split}: temperatures and thresholds."""
        return {t.name: t.choose(self.tallies[t.name]) for t in self.tasks if t.name in self.tallies}

    def join_grades(self) -> None:
        """Tally the photographs with both labels, `cls` and `dme`, under the name of Joint."""
        both = [t for t in self.tasks if t.name in ("cls", "dme") and t.name in self.tallies]
        if len(both) < 2:
            return
        right = [dict(zip(self.names[t.name], t.right(self.tallies[t.name]).tolist())) for t in both]
        if names := [n for n in right[0] if n in right[1]]:
            self.names["joint"] = names
            self.tallies["joint"] = torch.tensor([float(right[0][n] and right[1][n]) for n in names]).double()


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
    scores = Scores(list(tasks), pools={t.name: t.pool() for t in tasks},
                    eyes={r.name: r.eye or r.name for r in photographs.records})
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
            tallies[task.name].append(task.tally(task.decode(output), target, scores.pools[task.name]).cpu())
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
    scores.join_grades()
    return scores


def score_at_full_size(run: "Run", records: Sequence[Record], tiles: float | None,
                       device: torch.device) -> Scores | None:
    """Masks in the pixels of their files; None where there are no masks of files, as with drawn photographs."""
    task = next((t for t in run.tasks if isinstance(t, Lesions)), None)
    records = [r for r in records if r.masks is not None and r.image is not None]
    if task is None or not records:
        return None
    side = run.options["size"] if tiles is None else round(run.options["size"] * tiles)
    scores = Scores([task], pools={task.name: task.pool()}, eyes={r.name: r.eye or r.name for r in records})
    run.net.eval()
    scores.names[task.name], scores.tallies[task.name] = predict.tally_at_full_size(
        run.net, task, data.Photographs(records, side), run.options["size"], device, scores.pools[task.name])
    return scores


def primary_score(metrics: Mapping[str, dict], tasks: Sequence[Task]) -> float:
    """What checkpoints are chosen by: the mean over tasks of each task's primary metric."""
    found = [metrics[t.name][t.primary] for t in tasks if t.name in metrics]
    return sum(found) / len(found)


# ---- what the numbers are worth ----

def summary(scores: Sequence[Scores], chosen: Sequence[Mapping]) -> tuple[dict, dict]:
    """Metrics of one run, or their means over several, and {task: {measure: 95 % interval}} over eyes (and runs)."""
    found = [s.metrics(c) for s, c in zip(scores, chosen)]
    values, limits = {}, {}
    for task in scores[0].scored():
        t = task.name
        values[t] = {k: v if len(found) == 1 or not isinstance(v, float) else sum(f[t][k] for f in found) / len(found)
                     for k, v in found[0][t].items() if len(found) == 1 or k != "confusion"}
        if len(found) > 1:
            values[t]["sd"] = {k: float(torch.tensor([f[t][k] for f in found], dtype=torch.float64).std())
                               for k, v in found[0][t].items() if isinstance(v, float)}
        drawn = intervals.bootstrap([partial(task.measures, s.tallies[t], chosen=c.get(t, {}))
                                     for s, c in zip(scores, chosen)], scores[0].eyes_of(t))
        # a resample ranks pixels by the coarse levels of the tallies: its distance to their own value is what counts
        limits[t] = {k: intervals.limits(v[1:] - v[0] + values[t][k]) for k, v in drawn.items()}
    return values, limits


def compare(first: Sequence[Scores], second: Sequence[Scores]) -> dict[str, dict[str, dict]]:
    """{task: {measure: first, second, difference, interval, p}} of two sides, each a run or as many runs of its kind.

    Nothing that was chosen on validation enters. InputError: they were not scored on the same photographs.
    """
    found = {}
    for task in (t for t in first[0].scored() if t.name in second[0].tallies):
        t, tallies = task.name, []
        for side in (first, second):
            for s in side:
                if sorted(s.names[t]) != sorted(first[0].names[t]):
                    raise InputError(f"{t}: the runs were scored on different photographs; expected the same data set, "
                                     "fold and split")
                place = {name: i for i, name in enumerate(s.names[t])}
                tallies.append(s.tallies[t][[place[name] for name in first[0].names[t]]])
        tallies, eyes_ = (tallies[:len(first)], tallies[len(first):]), first[0].eyes_of(t)
        one, other = (intervals.bootstrap([partial(task.measures, x, chosen={}) for x in side], eyes_)
                      for side in tallies)
        p = intervals.p_values([partial(task.measures, torch.cat(pair), chosen={}) for pair in zip(*tallies)], eyes_)
        found[t] = {}
        for name in one:
            difference = other[name] - one[name]
            found[t][name] = {"first": float(one[name][0]), "second": float(other[name][0]),
                              "difference": float(difference[0]), "interval": intervals.limits(difference[1:]),
                              "p": p[name]}
        if len(first) == 1 and isinstance(task, (Classification, Joint)):
            only_first, only_second, p_exact = intervals.mcnemar(*(task.right(side[0]) for side in tallies))
            found[t]["accuracy"]["mcnemar"] = {"only_first_right": only_first, "only_second_right": only_second,
                                               "p": p_exact}
    return found


def claims(compared: Mapping[str, Mapping], scores: Scores, single: bool) -> list[str]:
    """A sentence on the primary metric of each task, p adjusted for the number of tasks (Holm)."""
    tasks = [t for t in scores.scored() if t.name in compared]
    rows = [compared[t.name][t.primary] for t in tasks]
    adjusted = intervals.holm([1.0 if math.isnan(row["p"]) else row["p"] for row in rows])
    return [intervals.claim(f"{t.name} {t.primary}", row["difference"], row["interval"],
                            math.nan if math.isnan(row["p"]) else p, len(scores.names[t.name]), single)
            for t, row, p in zip(tasks, rows, adjusted)]


# ---- tables ----

def shown(value: float | None, limits: Sequence[float] | None = None) -> str:
    """A number, with its interval where there is one."""
    if value is None or math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 0
    text = f"{value:.{digits}f}"
    return text if limits is None else text + " ({:.{d}f}..{:.{d}f})".format(*limits, d=2 if digits else 0)


def table(metrics: Mapping[str, dict], tasks: Sequence[Task], limits: Mapping[str, Mapping] = {}) -> str:
    """Metrics as lines of text; per task, the primary metric first, then what there is for each kind or class."""
    lines = []
    for task in (t for t in [*tasks, Joint()] if t.name in metrics):
        values, around = metrics[task.name], limits.get(task.name, {})
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        kinds = task.classes if isinstance(getattr(task, "classes", None), tuple) else ()
        # the row of a number that belongs to one kind: dice_MA_per_image stands in dice_*_per_image
        row_of = {k: "_".join("*" if word in kinds else word for word in k.split("_")) for k in numbers}
        rest = [k for k in numbers if k != task.primary and "*" not in row_of[k]]
        lines.append(f"{task.name}   {values['photographs']} photographs of {values['eyes']} eyes   {task.primary} "
                     + shown(numbers[task.primary], around.get(task.primary)))
        cells = [f"{k} {shown(numbers[k], around.get(k))}".replace(" ", "\0") for k in rest]  # not to be torn apart
        lines += [line.replace("\0", " ") for line in textwrap.wrap("   ".join(cells), 117, initial_indent="   ",
                                                                     subsequent_indent="   ")]
        rows = [row for row in dict.fromkeys(row_of.values()) if "*" in row]
        if rows:
            lines.append(" " * 18 + "".join(f"{kind:>20}" for kind in kinds))
            for row in rows:
                names = ("_".join(kind if word == "*" else word for word in row.split("_")) for kind in kinds)
                lines.append(f"   {row.replace('_*', ''):15}" + "".join(
                    f"{shown(numbers.get(k), around.get(k)):>20}" for k in names))
        if values.get("lesions", 4) < 4:
            lines.append("   kinds without a true pixel in this split, at this size, are left out of the means")
        if len(values.get("confusion", range(99))) <= 12:
            names = [n[:12] for n in getattr(task, "names", map(str, range(task.classes)))]
            width = max(6, *(len(n) + 2 for n in names))
            lines.append("   truth \\ predicted" + "".join(f"{n:>{width}}" for n in names))
            lines += [f"   {n:>17}" + "".join(f"{c:>{width}}" for c in row)
                      for n, row in zip(names, values["confusion"])]
    return "\n".join(lines)


def table_of_differences(compared: Mapping[str, Mapping], kinds: Sequence[str] = ("MA", "HE", "EX", "SE", "OD")) -> str:
    """What compare() found, as lines of text."""
    lines = []
    for task, rows in compared.items():
        lines.append(f"{task:32}{'first':>9}{'second':>9}{'difference (95 %)':>28}{'p':>8}")
        for name, row in rows.items():
            gap = "-" if row["interval"] is None else "{:+.3f} ({:+.3f}..{:+.3f})".format(row["difference"],
                                                                                       *row["interval"])
            lines.append(f"   {name:29}{shown(row['first']):>9}{shown(row['second']):>9}{gap:>28}{row['p']:8.3f}")
        if found := rows.get("accuracy", {}).get("mcnemar"):
            lines.append(f"   only the first is right {found['only_first_right']} times, only the second "
                         f"{found['only_second_right']}: McNemar's exact p = {found['p']:.3f}")
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
    chosen: dict[str, dict[str, float]]  # on them: temperatures and thresholds, by task


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
        if missing := [f.name for f in fields(NetConfig) if f.name not in state["options"]] + \
                [key for key in ("chosen",) if key not in state]:
            raise InputError(f"{path}: made by another version of this project, it lacks {missing[0]!r}; train again")
        net, tasks = build_net(state["options"])
        net.load_state_dict(state["net"])
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or foreign file provokes in torch.load
        raise InputError(f"{path}: not a checkpoint of this project "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from error
    return Run(folder, net.to(device), tasks, state["options"], state["epoch"], state["validation"],
               state["chosen"])


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


def change(task: Task, before: Tensor, after: Tensor, eyes_: Sequence[str]) -> tuple[float, float]:
    """Change of a task's primary metric between two tallies of the same photographs (n, ...), and its standard error

    from a paired bootstrap over eyes.
    """
    one, other = (intervals.bootstrap([partial(task.measures, tally, chosen={})], eyes_)[task.primary]
                  for tally in (before, after))
    difference = other - one
    return float(difference[0]), float(difference[1:].std())


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
            value, error = change(by_name[t], before.tallies[t], after.tallies[t], before.eyes_of(t))
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


def plain(value):
    """For JSON, which has no nan: the same with None in its place."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def note_opening(run: Run, root: Path | None) -> int:
    """Write down in the run that the test part is opened now, and with what; -> how often it has been by now."""
    path = run.folder / "test_opened.jsonl"
    checkpoint = run.folder / "best.pt"
    line = {"when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "data": "drawn" if root is None else str(root), "checkpoint": checkpoint.name, "epoch": run.epoch,
            "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return len(path.read_text(encoding="utf-8").splitlines())


# ---- command line ----

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
    parser.add_argument("--batch", type=int, help="photographs at a time (default: as in training)")
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
    if len(found) > 2:
        one, *others = (runs[side[0]].options for side in found)
        differ = [k for k in one if any(o.get(k) != one[k] for o in others) and k not in machine]
        raise InputError(f"{len(runs)} runs of {len(found)} kinds, which differ in {', '.join(differ)}; expected two "
                         "runs, or runs of at most two kinds that differ in nothing but their seed")
    if len({len(side) for side in found}) > 1:
        raise InputError(f"{len(found[0])} runs against {len(found[1])}; expected as many on both sides")
    return found


def evaluate(run: Run, args: argparse.Namespace, device: torch.device) -> tuple[Scores, Scores | None]:
    """Score one run at the size it was trained with and, where there are masks of files, at theirs."""
    root = args.data or run.options["data"]
    root = None if root is None else Path(root)
    if root is None and args.tiles is not None:
        raise InputError("--tiles: drawn photographs have no files of a larger size; leave --tiles out")
    records = split_records(run, root, args.split)
    if args.split == "test":
        times = note_opening(run, root)
        print(f"{run.folder}: the test part is opened; test_opened.jsonl in it counts {times} time{'s' * (times > 1)}")
    photographs = data.Photographs(records, run.options["size"])
    scores = score(run.net, photographs, run.tasks, device, args.batch or run.options["batch"],
                   f"scoring {args.split}")
    return scores, score_at_full_size(run, records, args.tiles, device)


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
    if args.split == "val":
        print("the checkpoint, temperatures and thresholds (_chosen, _at_temperature, referable_) were chosen on these "
              "photographs: optimistic")
    print(f"(in brackets: 95 % of {intervals.DRAWS} draws of eyes)")
    return found


def show_routes(run: Run, args: argparse.Namespace, device: torch.device, write) -> None:
    """Print what the experts do, and with --routing what becomes of the scores without them."""
    root = args.data or run.options["data"]
    records = split_records(run, None if root is None else Path(root), args.split)
    photographs, batch = data.Photographs(records, run.options["size"]), args.batch or run.options["batch"]
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
    print(f"\nsecond less first, on the same photographs; masks at a threshold of 0.5, in pixels of {at}:")
    print(table_of_differences(compared))
    sentences = claims(compared, scores[0][0], single=len(runs[0]) == 1)
    print("\n".join([f"p of these {len(sentences)} adjusted for their number (Holm):", *sentences]))
    return {"first": [str(r.folder) for r in runs[0]], "second": [str(r.folder) for r in runs[1]],
            "masks_in_pixels_of": at, "compared": compared, "claims": sentences}


def answer_for_new(run: Run, args: argparse.Namespace, device: torch.device) -> None:
    """--images: predict, and say what happened; exit status 1 if a file could not be read."""
    paths = predict.find_photographs(args.images)
    retinas = not run.options["classes"]
    rows = predict.predict(predict.Predictor(run.net, run.tasks, run.chosen, run.options["size"], args.tiles, device,
                                             args.out, retinas), paths)
    number = {status: sum(row["status"] == status for row in rows) for status in ("graded", "refused", "unreadable")}
    for row in rows:
        if row["status"] != "graded":
            print(f"{row['status']}: {row['photograph']}: {row['reason']}",
                  file=sys.stderr)
    print(f"{number['graded']} of {len(rows)} photographs answered for, {number['refused']} refused, "
          f"{number['unreadable']} unreadable; wrote {', '.join(sorted(p.name for p in args.out.iterdir()))} to "
          f"{args.out}\n{predict.NOTE}")
    if number["unreadable"]:
        sys.exit(1)


def main() -> None:
    """Score runs on validation or test and write all that is found into the first run's folder; or see --images."""
    args = parse()
    device = pick_device(args.device)
    runs = [load_run(folder, device) for folder in args.runs]
    check(args, runs)
    if args.images is not None:
        return answer_for_new(runs[0], args, device)
    sides = sides_of(runs)
    folder, suffix, written = args.runs[0], "" if args.split == "val" else "_test", []

    def write(name, content):
        head = {"split": args.split, "data": args.data or runs[0].options["data"] or "drawn", "epoch": runs[0].epoch}
        (folder / f"{name}{suffix}.json").write_text(json.dumps(plain(head | content), indent=1))
        written.append(f"{name}{suffix}.json")

    found = [evaluate(run, args, device) for run in runs]
    scores, full = zip(*found)
    members = [[[x[i] for i in side] for side in sides] for x in (runs, scores, full)]
    for side in zip(*members):
        content = report(*side, args)
        if len(runs) == 1:
            write("metrics", content)
    if len(runs) == 1:
        write_predictions(folder / f"predictions{suffix}.csv", scores[0])
        written.insert(0, f"predictions{suffix}.csv")
        if runs[0].net.experts is not None:
            show_routes(runs[0], args, device, write)
    elif len(sides) == 1:
        write("seeds", content | {"runs": [str(r.folder) for r in runs]})
    else:
        write(f"against_{args.runs[sides[1][0]].name}", show_comparison(*members))
    print(f"wrote {', '.join(written)} to {folder}")


if __name__ == "__main__":
    command(main)
