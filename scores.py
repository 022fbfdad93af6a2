"""What one pass over a split leaves, the measures of one run or several, and two sides compared.

    score(net, ...) -> Scores       tallies of every photograph, losses, use of the experts
    summary, compare, claims        measures with their intervals (intervals.py); what may be said of two sides
    rerouted                        the scores with other routes to the experts (routes.py)
    table, ...                      all of these as lines of text

The measures stand in metrics.py, what each task makes of them in tasks.py.
"""

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import intervals
import metrics
import predict
import routes
from files import InputError, as_helper
from model import Net
from parallel import ALONE, Group
from records import Record
from tasks import Classification, Joint, Lesions, Task

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

    def metrics(self, chosen: Mapping[str, Mapping] = MappingProxyType({})) -> dict[str, dict]:
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
           workers: int = 0) -> Iterator[data.Batch]:
    """Batches of `photographs` on a device; `batches` are lists of its indices.

    Helpers read samples; this process puts them together, where augmentation may run on the device.
    """
    samples = DataLoader(photographs, batch_sampler=batches, collate_fn=list, num_workers=workers,
                         worker_init_fn=as_helper, pin_memory=device.type == "cuda")
    return collated(iter(samples), tasks, device)  # begun at once: it draws from torch's generator


def collated(samples: Iterator[list[data.Sample]], tasks: Sequence[Task], device: torch.device) -> Iterator[data.Batch]:
    """Batches of what a DataLoader brings; its helpers end when these do, also by an error, which may live longer."""
    try:
        for some in samples:
            yield data.collate(some, tasks, device)
    finally:
        getattr(samples, "_shutdown_workers", lambda: None)()


@dataclass
class Answered:
    """What a batch leaves of one task."""
    names: list[str]  # of its labelled photographs
    tally: Tensor  # (n, ...), see Task.tally
    loss: float  # mean
    usage: Tensor | None  # (n, 2, E) share of the tokens and mean weight of each expert


@torch.inference_mode()
def score(net: Net, photographs: data.Photographs, tasks: Sequence[Task], device: torch.device, batch: int = 16,
          progress: str = "", group: Group = ALONE) -> Scores | None:
    """Run `net` over all photographs, in evaluation mode and float32; a task sees those that carry its label.

    The processes of `group` take the batches in turn; the first of them gets the scores of all, the others None.
    """
    net.eval()
    batches = in_order(photographs, batch)[group.rank::group.size]
    pools, found = {t.name: t.pool() for t in tasks}, []
    bar = tqdm(loader(photographs, batches, tasks, device), desc=progress, total=len(batches), leave=False,
               disable=None if progress else True, unit="batch")  # None: no bar where there is no terminal
    for b in bar:
        outputs, routing = net(b.images, b.rows)
        found.append({})
        for task in (t for t in tasks if t.name in outputs):
            t, output, target = task.name, outputs[task.name].float(), b.targets[task.name]
            found[-1][t] = Answered([b.names[i] for i in b.rows[t].tolist()],
                                    task.tally(task.decode(output), target, pools[t]).cpu(),
                                    float(task.loss(output, target)),
                                    routes.per_token(routing[t]).mean(1).cpu() if routing else None)
    parts = group.gather((found, pools))
    return parts and assemble(tasks, photographs, parts)


def assemble(tasks: Sequence[Task], photographs: data.Photographs,
            parts: Sequence[tuple[list[dict[str, Answered]], dict]]) -> Scores:
    """Scores of a split from the batches and pools of each process; batches are those of one process in its order."""
    (_, pools), *others = parts
    for _, more in others:
        for t, pool in pools.items():
            if pool is not None:
                pool.take(more[t])
    batches = [b for turn in itertools.zip_longest(*(found for found, _ in parts)) for b in turn if b is not None]
    scores = Scores(list(tasks), pools=pools, eyes={r.name: r.eye or r.name for r in photographs.records})
    for t in pools:
        answered = [b[t] for b in batches if t in b]
        if not answered:
            continue
        scores.names[t] = [name for a in answered for name in a.names]
        scores.tallies[t] = torch.cat([a.tally for a in answered])
        scores.losses[t] = sum(len(a.names) * a.loss for a in answered) / len(scores.names[t])
        if answered[0].usage is not None:
            usage = torch.cat([a.usage for a in answered]).mean(0)
            scores.usage[t] = dict(zip(("tokens", "weight"), usage.tolist()))
    scores.join_grades()
    return scores


def score_at_full_size(net: Net, tasks: Sequence[Task], records: Sequence[Record], size: int, tiles: float | None,
                       device: torch.device, batch: int) -> Scores | None:
    """Masks in the pixels of their files; None where there are no masks of files, as with drawn photographs.

    `size` is that of training; with `tiles` the photographs are predicted in parts, at so many times that size, `batch`
    parts at a time.
    """
    task = next((t for t in tasks if isinstance(t, Lesions)), None)
    records = [r for r in records if r.masks is not None and r.image is not None]
    if task is None or not records:
        return None
    scores = Scores([task], pools={task.name: task.pool()}, eyes={r.name: r.eye or r.name for r in records})
    net.eval()
    scores.names[task.name], scores.tallies[task.name] = predict.tally_at_full_size(
        net, task, records, size, tiles, device, batch, scores.pools[task.name])
    return scores


def primary_score(values: Mapping[str, dict], tasks: Sequence[Task]) -> float:
    """What checkpoints are chosen by: the mean over tasks of each task's primary metric."""
    found = [values[t.name][t.primary] for t in tasks if t.name in values]
    return sum(found) / len(found)


# ---- what the numbers are worth ----

def align(scores: Sequence[Scores]) -> None:
    """Bring the photographs of all into the order of the first. InputError: they are not the same."""
    for other in scores[1:]:
        for t in other.tallies.keys() & scores[0].tallies.keys():
            place = {name: i for i, name in enumerate(other.names[t])}
            if place.keys() != set(scores[0].names[t]):
                raise InputError(f"{t}: the runs were scored on different photographs; expected the same data set, "
                                 "fold and split")
            other.tallies[t] = other.tallies[t][[place[name] for name in scores[0].names[t]]]
            other.names[t] = scores[0].names[t]


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
        for k in limits[t]:
            if k.startswith("calibration_error") and limits[t][k] is not None:
                # resamples are worse calibrated than what they are drawn from, so count the distance the other way
                # (the basic bootstrap interval: Davison & Hinkley 1997, section 5.2.1)
                limits[t][k] = [max(0.0, 2 * values[t][k] - v) for v in reversed(limits[t][k])]
    return values, limits


def compare(first: Sequence[Scores], second: Sequence[Scores],
            draws: int = intervals.DRAWS) -> dict[str, dict[str, dict]]:
    """{task: {measure: first, second, difference, interval, p from so many draws, standard_error}} of two sides,

    each a run or as many runs of its kind.

    Their photographs are aligned. Nothing that was chosen on validation enters: thresholds are 0.5, temperatures 1.
    """
    found, exact = {}, [[s.metrics() for s in side] for side in (first, second)]
    for task in (t for t in first[0].scored() if t.name in second[0].tallies):
        t = task.name
        sides, eyes = [[s.tallies[t] for s in side] for side in (first, second)], first[0].eyes_of(t)
        drawn = [intervals.bootstrap([partial(task.measures, x, chosen={}) for x in side], eyes, k)
                 for k, side in enumerate(sides)]
        p = intervals.p_values([partial(task.measures, torch.cat(pair), chosen={}) for pair in zip(*sides)], eyes,
                               draws)
        found[t] = {}
        for name in drawn[0]:
            one, other = (sum(values[t][name] for values in side) / len(side) for side in exact)
            gap = drawn[1][name] - drawn[0][name]
            known = gap[1:][~gap[1:].isnan()]
            found[t][name] = {"first": one, "second": other, "difference": other - one,
                              "interval": intervals.limits(gap[1:] - gap[0] + other - one), "p": p[name],
                              "standard_error": float(known.std()) if len(known) > 1 else math.nan}
        if len(first) == 1 and isinstance(task, (Classification, Joint)):
            only_first, only_second, p_exact = intervals.mcnemar(*(task.right(side[0]) for side in sides))
            found[t]["accuracy"]["mcnemar"] = {"only_first_right": only_first, "only_second_right": only_second,
                                               "p": p_exact}
    return found


def claims(compared: Mapping[str, Mapping], scores: Scores, runs: int) -> list[str]:
    """A sentence on the primary metric of each task, p adjusted for the number of tasks (Holm)."""
    tasks = [t for t in scores.scored() if t.name in compared]
    rows = [compared[t.name][t.primary] for t in tasks]
    adjusted = intervals.holm([1.0 if math.isnan(row["p"]) else row["p"] for row in rows])
    return [intervals.claim(f"{t.name} {t.primary}", row["difference"], row["interval"],
                            math.nan if math.isnan(row["p"]) else p, len(scores.names[t.name]), runs)
            for t, row, p in zip(tasks, rows, adjusted)]


# ---- tables ----

def shown(value: float | None, limits: Sequence[float] | None = None) -> str:
    """A number, with its interval where there is one."""
    if value is None or math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 0
    text = f"{value:.{digits}f}"
    return text if limits is None else text + " ({:.{d}f}..{:.{d}f})".format(*limits, d=2 if digits else 0)


def table(found: Mapping[str, dict], tasks: Sequence[Task],
          limits: Mapping[str, Mapping] = MappingProxyType({})) -> str:
    """Metrics as lines of text; per task, the primary metric first, then what there is for each kind or class."""
    lines = []
    for task in (t for t in [*tasks, Joint()] if t.name in found):
        values, around = found[task.name], limits.get(task.name, {})
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


def table_of_differences(compared: Mapping[str, Mapping]) -> str:
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
                         f"{found['only_second_right']}: McNemar's exact p = {found['p']:.3f} "
                         "(as if no two photographs showed one eye)")
    return "\n".join(lines)


# ---- other routes ----

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
    passes = list(routes.interventions(net.experts, {t: tapes[t] for t in tapes if t in before.tallies}))
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
