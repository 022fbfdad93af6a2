"""What do answers owe to routes? A trained network with other ones: ablated, shuffled, swapped.

Routes are those of model.Routing, the layer is a model.MoELayer.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from retina.evaluation import statistics
from retina.evaluation.scoring import evaluate_split
from retina.evaluation.task_metrics import TaskMetrics


class RerouteWrapper(nn.Module):
    """A router whose routing is changed by a function."""

    def __init__(self, router: nn.Module, change: Callable):
        super().__init__()
        self.router, self.change = router, change

    def forward(self, u, grid):
        return self.change(self.router(u, grid))


def ablate_expert(r, expert: int):
    """Routing without noise as if `expert` were not there: the K best of the others, weighted as the router would.

    Where fewer than K others have any weight, the places left over have none.
    """
    k = r.experts.shape[1]
    p = r.probabilities.index_fill(1, torch.tensor(expert, device=r.probabilities.device), 0.0)
    top, experts = p.topk(k, dim=1)
    total = (top if k > 1 else p).sum(1, keepdim=True)
    gates = torch.where(total > 0, top / total, 0.0)
    return r._replace(experts=experts, gates=gates)


class RouteRecorder:
    """Routes of all photographs of a pass, to be played in another pass, each to the photograph after it."""

    def __init__(self):
        self.routes: list[tuple[Tensor, Tensor]] = []  # of each photograph: experts and gates, (h * w, K)

    def record(self, r):
        """Remember; changes nothing."""
        self.routes += zip(*(x.view(r.grid[0], -1, x.shape[1]) for x in (r.experts, r.gates)))
        return r

    def shuffled(self) -> Callable:
        """Routes of another photograph for each, from a random cycle through all of them (seed 0)."""
        order = torch.randperm(len(self.routes), generator=torch.Generator().manual_seed(0))
        others = iter(torch.empty_like(order).scatter(0, order, order.roll(1)).tolist())

        def replay(r):
            taken = [self.routes[next(others)] for _ in range(r.grid[0])]
            experts, gates = map(torch.cat, zip(*taken))
            return r._replace(experts=experts, gates=gates)
        return replay


@contextlib.contextmanager
def routed_by(layer: nn.Module, routers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the layer routes each task by `routers`; afterwards by its own again."""
    own, layer.routers = layer.routers, nn.ModuleDict(routers)
    try:
        yield
    finally:
        layer.routers = own


def interventions(layer: nn.Module, recorders: Mapping[str, RouteRecorder]) -> Iterator[tuple[dict, dict]]:
    """-> ({task: what is changed}, {task: router}), one for each pass that is to be scored; see routed_by.

    `recorders` hold, for each task that is scored, the routes of an unchanged pass over the same photographs.
    """
    own = dict(layer.routers.items())

    def all_tasks(title, change):
        return dict.fromkeys(recorders, title), {t: RerouteWrapper(own[t], change) for t in recorders}

    yield all_tasks("without the experts", lambda r: r._replace(gates=torch.zeros_like(r.gates)))
    for e in range(len(layer.experts.w1)):
        yield all_tasks(f"without expert {e}", lambda r, e=e: ablate_expert(r, e))
    several = [t for t, recorder in recorders.items() if len(recorder.routes) > 1]
    if several:
        yield (dict.fromkeys(several, "routes of another photograph"),
               own | {t: RerouteWrapper(own[t], recorders[t].shuffled()) for t in several})
    names = list(own)
    for shift in range(1, len(names)):
        other = {names[i - shift]: o for i, o in enumerate(names) if names[i - shift] in recorders}
        yield {t: f"by the router of {o}" for t, o in other.items()}, {t: own[o] for t, o in other.items()}


def resampled(task: TaskMetrics, stats: Tensor, eyes: Sequence[str]) -> Tensor:
    """-> (1 + D,): a task's primary metric of statistics (n, ...), then of D resamples of the eyes, the same each time.

    The standard deviation of the difference between two of them is the standard error of a paired bootstrap.
    """
    return statistics.bootstrap([partial(task.compute, stats, calibration={})], eyes)[task.primary]


class EncodeOnce(nn.Module):
    """An encoder that computes the maps of the same photographs once, if they are asked for several times in a row."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.last, self.maps = encoder, None, None

    def forward(self, x):
        if self.last is None or not torch.equal(self.last, x):
            self.last, self.maps = x, self.encoder(x)
        return self.maps


def score_interventions(net: nn.Module, batches: Iterable,
                        tasks: Sequence[TaskMetrics]) -> dict[str, dict[str, dict[str, float]]]:
    """{what is changed: {task: change of its primary metric, its standard error, change of its loss}}.

    Nothing is trained again; see `interventions`. `batches` are passed twice, first to record the routes. Each batch is
    then encoded once; what comes after the encoder is computed for every change.
    """
    begun, recorders = time.monotonic(), {t: RouteRecorder() for t in net.experts.routers}
    with routed_by(net.experts, {t: RerouteWrapper(router, recorders[t].record)
                                 for t, router in net.experts.routers.items()}):
        before = evaluate_split(net, batches, tasks)
    passes = list(interventions(net.experts, {t: recorders[t] for t in recorders if t in before.stats}))
    print(f"scoring with {len(passes)} other routes: at most {len(passes) * (time.monotonic() - begun):.0f} seconds")
    after, encoder = [{t: [] for t in titles} for titles, _ in passes], net.encoder
    net.encoder = EncodeOnce(encoder)
    try:
        for batch in tqdm(batches, desc="scoring with other routes", leave=False, disable=None, unit="batch"):
            for (_, routers), parts in zip(passes, after):
                with routed_by(net.experts, routers):
                    scores = evaluate_split(net, [batch], tasks)
                for t in parts.keys() & scores.stats.keys():  # nothing else of them is kept
                    parts[t].append((scores.stats[t], len(scores.names[t]) * scores.losses[t]))
    finally:
        net.encoder = encoder
    by_name, changes = {t.name: t for t in tasks}, {}
    unchanged = {t: resampled(by_name[t], before.stats[t], before.eyes_of(t)) for t in by_name if t in before.stats}
    for (titles, _), parts in zip(passes, after):
        for t, title in titles.items():
            stats, losses = zip(*parts[t])
            difference = resampled(by_name[t], torch.cat(stats), before.eyes_of(t)) - unchanged[t]
            changes.setdefault(title, {})[t] = {"change": float(difference[0]),
                                                "standard_error": float(difference[1:].std()),
                                                "loss": sum(losses) / len(before.names[t]) - before.losses[t]}
    return changes
