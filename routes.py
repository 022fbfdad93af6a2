"""What do the experts do? Where tokens go, what that has to do with task, grade and lesion, what answers owe to it.

    collect -> Use                  one task's tallies over a split
    mutual_information, Information what the choice of an expert tells of a label, beside what it would by chance
    describe -> table               all of this in numbers, and in lines of text
    interventions                   other routes in place of the learned ones: knocked out, shuffled, swapped

    python evaluate.py runs/NAME --routing
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from model import ExpertLayer, Net, Routing
from tasks import UNKNOWN, Lesions

# n photographs, T tasks, E experts, K chosen, L kinds of mask; h w token grid

KINDS = (*Lesions.classes, "none")  # what lies under a token; "none": all kinds are known there and none is
IDLE = 0.01  # an expert with a smaller share of the tokens of all tasks does nothing worth its parameters


# ---- where tokens go ----

@dataclass
class Use:
    """Where one task's tokens went; "2" is the share of the tokens, 1 / K for each choice, and that of the weight."""
    shares: Tensor  # (n, 2, E) means over the tokens of each photograph
    entropy: Tensor  # (n,) mean entropy of a token's probabilities, in bits: how undecided the router is
    under: Tensor  # (L + 1, 2, E) sums over the tokens below which there is each of KINDS
    tokens: Tensor  # (L + 1,) how many these are


def spread(r: Routing) -> Tensor:
    """(n, h * w, 2, E): to which experts each token went, 1 / K to each, and with which weight."""
    both = torch.stack([r.spread(1 / r.indices.shape[1]), r.spread(r.weights)], 1)  # (N, 2, E)
    return both.view(r.grid[0], -1, *both.shape[1:])


def entropy(p: Tensor) -> Tensor:
    """Of distributions along the last dimension, in bits (Shannon 1948)."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def kinds_below(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """Masks (n, L, S, S) with UNKNOWN -> (n, L + 1, h * w) bool: which of KINDS has a pixel below each token."""
    there = F.adaptive_max_pool2d((masks == 1).float(), tuple(grid)).bool()  # (n, L, h, w)
    nothing = ~there.any(1, keepdim=True) & ~(masks == UNKNOWN).flatten(1).any(1)[:, None, None, None]
    return torch.cat([there, nothing], 1).flatten(2)


@torch.inference_mode()
def collect(net: Net, batches: Iterable[Batch], device: torch.device) -> dict[str, Use]:
    """Route every photograph for every task, labelled or not; `batches` are collated for the task of masks."""
    net.eval()
    seen: dict[str, list[Use]] = {}
    for b in batches:
        b = b.to(device)
        for task, r in net.read(b.images)[1].items():
            s = spread(r)
            under, tokens = s.new_zeros(len(KINDS), *s.shape[2:]), s.new_zeros(len(KINDS))
            if len(rows := b.rows[Lesions.name]):
                below = kinds_below(b.targets[Lesions.name], r.grid[1:]).to(s.dtype)
                under, tokens = torch.einsum("nlt,ntse->lse", below, s[rows]), below.sum((0, 2))
            uncertain = entropy(r.probabilities).view(r.grid[0], -1).mean(1)
            seen.setdefault(task, []).append(Use(*(x.double().cpu() for x in (s.mean(1), uncertain, under, tokens))))
    return {task: Use(torch.cat([u.shares for u in uses]), torch.cat([u.entropy for u in uses]),
                      sum(u.under for u in uses), sum(u.tokens for u in uses)) for task, uses in seen.items()}


def idle(tokens: Iterable[Sequence[float]]) -> list[int]:
    """Experts that receive less than IDLE of the tokens; one row of shares for each task, tasks count alike."""
    mean = torch.tensor(list(tokens), dtype=torch.float64).mean(0)
    return (mean < IDLE).nonzero().flatten().tolist()


def warning(experts: Sequence[int]) -> str:
    """A line that names idle experts."""
    one = len(experts) == 1
    return (f"warning: expert{'' if one else 's'} {', '.join(map(str, experts))} receive{'s' if one else ''} less than "
            f"{100 * IDLE:.0f} % of the tokens")


# ---- what routes tell ----

@dataclass
class Information:
    """Mutual information in bits, its mean over permutations of the labels, and how often these reach it."""
    bits: float
    by_chance: float
    p: float

    def __str__(self):
        return f"{self.bits:.3f} bit (by chance {self.by_chance:.3f}, p = {self.p:.3f})"


def mutual_information(shares: Tensor, labels: Tensor) -> Tensor:
    """I(expert; label) in bits for shares (..., n, E) of n photographs and one-hot labels (n, G).

    I = sum_g p_g sum_e q_ge log2(q_ge / q_e): p_g share of the photographs with label g, q_ge mean share of expert e in
    them, q_e in all (Cover & Thomas, Elements of Information Theory, eq. 2.28).
    """
    p = labels.sum(0) / len(labels)  # (G,)
    q = (labels.T / labels.sum(0)[:, None]) @ shares  # (..., G, E)
    return entropy((p[:, None] * q).sum(-2)) - (p * entropy(q)).sum(-1)


def information(shares: Tensor, labels: Sequence, blocks: Sequence[int] | None = None,
                draws: int = 1000) -> Information:
    """Mean of I(expert; label) over the tables of `shares` (T, n, E), beside the same with labels permuted.

    From finitely many photographs the estimate is above 0 even where there is nothing to find, by about
    (E - 1)(G - 1) / (2 n ln 2) bits if each photograph went to one expert (Miller 1955); the permutations show by how
    much, and p = (1 + how many reach it) / (1 + draws) (Phipson & Smyth 2010). Photographs are permuted, not tokens:
    those of one photograph are no independent witnesses. `blocks` (n,), ascending: permute within these alone.
    """
    names = sorted(set(labels))
    one_hot = F.one_hot(torch.tensor([names.index(label) for label in labels])).to(shares.dtype)
    blocks = torch.zeros(len(labels)) if blocks is None else torch.as_tensor(blocks)
    generator = torch.Generator().manual_seed(0)
    bits = float(mutual_information(shares, one_hot).mean())
    chance = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        order = (blocks.double() + torch.rand(len(blocks), dtype=torch.float64, generator=generator)).argsort()
        chance[i] = mutual_information(shares, one_hot[order]).mean()
    return Information(bits, float(chance.mean()), (1 + int((chance > bits - 1e-12).sum())) / (1 + draws))


def describe(uses: Mapping[str, Use], grades: Sequence[str | None]) -> dict:
    """All numbers about a split, as plain types: shares of tokens and weight by task, grade and lesion; information.

    `grades` or classes of the photographs in their order, None where not known.
    """
    def plain(shares):  # (2, E)
        return {"tokens": shares[0].tolist(), "weight": shares[1].tolist()}

    graded = torch.tensor([g is not None for g in grades])
    known = [g for g in grades if g is not None]
    found = {"photographs": len(grades), "tasks": {}}
    for task, use in uses.items():
        by_grade = {g: torch.tensor([x == g for x in grades]) for g in sorted(set(known))}
        mean = use.shares.mean(0)
        found["tasks"][task] = {
            **plain(mean), "entropy_of_use": float(entropy(mean[0])), "entropy_of_router": float(use.entropy.mean()),
            "grades": {g: {"photographs": int(rows.sum()), **plain(use.shares[rows].mean(0))}
                       for g, rows in by_grade.items()},
            "below": {kind: {"positions": int(n), **plain(sums / n)}
                      for kind, n, sums in zip(KINDS, use.tokens, use.under) if n}}
    found["idle"] = idle(t["tokens"] for t in found["tasks"].values())
    tokens = torch.stack([use.shares[:, 0] for use in uses.values()])  # (T, n, E)
    found["information"] = {}
    if len(uses) > 1:
        units = tokens.transpose(0, 1).flatten(0, 1)[None]  # (1, n * T, E), tasks of one photograph side by side
        number = torch.arange(len(grades) * len(uses))
        found["information"]["task"] = asdict(information(units, (number % len(uses)).tolist(), number // len(uses)))
    if len(set(known)) > 1:
        found["information"]["grade"] = asdict(information(tokens[:, graded], known))
        for task, shares in zip(uses, tokens):
            found["tasks"][task]["information"] = {"grade": asdict(information(shares[None, graded], known))}
    return found


def table(found: Mapping, details: bool) -> str:
    """What describe() found, as lines of text; `details`: by grade and lesion too."""
    order = torch.tensor([t["tokens"] for t in found["tasks"].values()]).mean(0).argsort(descending=True)
    shown = sorted(order[:12].tolist())
    most = "" if len(shown) == len(order) else f"; the {len(shown)} most used of {len(order)} experts"

    def line(title, shares):
        return f"   {title:24}" + "".join(f"{100 * shares['tokens'][e]:3.0f}/{100 * shares['weight'][e]:<4.0f}"
                                          for e in shown)
    lines = [f"experts   {found['photographs']} photographs, all routed for every task; % of tokens/% of weight{most}",
             f"   {'expert':24}" + "".join(f"{e:^8}" for e in shown) + "  entropy (bits): use, router"]
    for task, t in found["tasks"].items():
        lines.append(line(task, t) + f"  {t['entropy_of_use']:.2f}, {t['entropy_of_router']:.2f}")
        if details:
            lines += [line(f"  {g} ({v['photographs']})", v) for g, v in t["grades"].items()]
            lines += [line(f"  {kind} below ({v['positions']})", v) for kind, v in t["below"].items()]
            if "information" in t:
                lines.append(f"     I(expert; grade) {Information(**t['information']['grade'])}")
    for label, title in (("task", "I(expert; task)"), ("grade", "I(expert; grade | task)")):
        if label in found["information"]:
            lines.append(f"   {title} {Information(**found['information'][label])}")
    if found["idle"]:
        lines.append("   " + warning(found["idle"]))
    return "\n".join(lines)


# ---- what answers owe to routes: a trained network with other ones ----

class Rerouted(nn.Module):
    """A router whose routing is changed by a function."""

    def __init__(self, router: nn.Module, change: Callable[[Routing], Routing]):
        super().__init__()
        self.router, self.change = router, change

    def forward(self, u: Tensor, grid: tuple[int, int, int]) -> Routing:
        return self.change(self.router(u, grid))


def knock_out(r: Routing, expert: int) -> Routing:
    """Routing as if `expert` were not there: the K best of the others, weighted as the router would have done.

    Where fewer than K others have any weight, the places left over have none.
    """
    k = r.indices.shape[1]
    p = r.probabilities.index_fill(1, torch.tensor(expert, device=r.probabilities.device), 0.0)
    top, indices = p.topk(k, dim=1)
    total = (top if k > 1 else p).sum(1, keepdim=True)
    weights = torch.where(total > 0, top / total, 0.0)
    return r._replace(indices=indices, weights=weights)


class Tape:
    """Routes of all photographs of a pass, to be played in another pass, each to the photograph after it."""

    def __init__(self):
        self.routes: list[tuple[Tensor, Tensor]] = []  # of each photograph: indices and weights, (h * w, K)

    def record(self, r: Routing) -> Routing:
        """Remember; changes nothing."""
        self.routes += zip(*(x.view(r.grid[0], -1, x.shape[1]) for x in (r.indices, r.weights)))
        return r

    def shuffled(self) -> Callable[[Routing], Routing]:
        """Routes of another photograph for each, from a random cycle through all of them (seed 0)."""
        order = torch.randperm(len(self.routes), generator=torch.Generator().manual_seed(0))
        other = torch.empty_like(order).scatter(0, order, order.roll(1)).tolist()
        next_ = iter(other)

        def play(r):
            taken = [self.routes[next(next_)] for _ in range(r.grid[0])]
            indices, weights = (torch.cat(x) for x in zip(*taken))
            return r._replace(indices=indices, weights=weights)
        return play


@contextlib.contextmanager
def routed_by(layer: ExpertLayer, routers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the layer routes each task by `routers`; afterwards by its own again."""
    own, layer.routers = layer.routers, nn.ModuleDict(routers)
    try:
        yield
    finally:
        layer.routers = own


def interventions(layer: ExpertLayer, tapes: Mapping[str, Tape]) -> Iterator[tuple[dict, dict]]:
    """-> ({task: what is changed}, {task: router}), one for each pass that is to be scored; see routed_by.

    `tapes` hold the routes of an unchanged pass over the same photographs.
    """
    own = {t: layer.routers[t] for t in tapes}

    def all_tasks(title, change):
        return dict.fromkeys(own, title), {t: Rerouted(router, change) for t, router in own.items()}

    yield all_tasks("without the experts", lambda r: r._replace(weights=torch.zeros_like(r.weights)))
    for e in range(len(layer.experts.w1)):
        yield all_tasks(f"without expert {e}", lambda r, e=e: knock_out(r, e))
    if all(len(tape.routes) > 1 for tape in tapes.values()):
        yield (dict.fromkeys(own, "routes of another photograph"),
               {t: Rerouted(router, tapes[t].shuffled()) for t, router in own.items()})
    names = list(own)
    for shift in range(1, len(names)):
        other = {names[i - shift]: o for i, o in enumerate(names)}
        yield {t: f"by the router of {o}" for t, o in other.items()}, {t: own[o] for t, o in other.items()}
