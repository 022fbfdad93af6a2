"""What do answers owe to routes? A trained network with other ones: ablated, shuffled, swapped.

Routes are those of model.Routing, the layer is a model.MoELayer.
"""

import contextlib
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


def change(task: TaskMetrics, before: Tensor, after: Tensor, eyes: Sequence[str]) -> tuple[float, float]:
    """Change of a task's primary metric between two statistics of the same photographs (n, ...), and its standard error

    from a paired bootstrap over eyes.
    """
    one, other = (statistics.bootstrap([partial(task.compute, stats, calibration={})], eyes)[task.primary]
                  for stats in (before, after))
    difference = other - one
    return float(difference[0]), float(difference[1:].std())


def score_interventions(net: nn.Module, batches: Iterable,
                        tasks: Sequence[TaskMetrics]) -> dict[str, dict[str, dict[str, float]]]:
    """{what is changed: {task: change of its primary metric, its standard error, change of its loss}}.

    Nothing is trained again; see `interventions`. `batches` are passed once for each.
    """
    recorders = {t: RouteRecorder() for t in net.experts.routers}
    with routed_by(net.experts, {t: RerouteWrapper(router, recorders[t].record)
                                 for t, router in net.experts.routers.items()}):
        before = evaluate_split(net, batches, tasks)
    by_name, changes = {t.name: t for t in tasks}, {}
    passes = list(interventions(net.experts, {t: recorders[t] for t in recorders if t in before.stats}))
    for titles, routers in tqdm(passes, desc="scoring with other routes", leave=False, disable=None):
        with routed_by(net.experts, routers):
            after = evaluate_split(net, batches, tasks)
        for t, title in titles.items():
            value, error = change(by_name[t], before.stats[t], after.stats[t], before.eyes_of(t))
            changes.setdefault(title, {})[t] = {"change": value, "standard_error": error,
                                                "loss": after.losses[t] - before.losses[t]}
    return changes
