"""What do the experts do? Where tokens go, and what that has to do with task, grade and lesion.

    python evaluate.py runs/NAME --routing
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retina.datasets.records import UNKNOWN, Record
from retina.datasets.synthetic import LESIONS


# n photographs, T tasks, N tokens, E experts, K chosen, L kinds of mask, G grades or classes; h w token grid

TOKEN_CLASSES = (*LESIONS, "none", "outside")  # what can lie under a token: a lesion; retina without any; no retina
DARK = 20  # of 255: where no pixel is brighter, there is no retina but what surrounds it
UNUSED = 0.01  # an expert to which a smaller share of the tokens goes does nothing worth its parameters


# ---- where tokens go ----

@dataclass
class ExpertUsage:
    """Where one task's tokens went. The second to last dimension: share of the tokens that went there, mean weight."""
    shares: Tensor  # (n, 2, E) of each photograph; the former sum to K, the latter to 1 if K > 1
    entropy: Tensor  # (n,) mean entropy of a token's probabilities, in bits: how undecided the router is
    below: Tensor  # (L + 2, 2, E) of all tokens together below which there is each of TOKEN_CLASSES, as sums
    tokens: Tensor  # (L + 2,) how many these are


def per_token(r) -> Tensor:
    """A model.Routing -> (n, h * w, 2, E): whether a token went to an expert, 0 or 1, and with which weight."""
    both = torch.stack([r.to_dense(1.0), r.to_dense(r.gates)], 1)  # (N, 2, E)
    return both.view(r.grid[0], -1, *both.shape[1:])


def entropy(p: Tensor) -> Tensor:
    """Of distributions along the last dimension, in bits (Shannon 1948)."""
    return torch.special.entr(p).sum(-1) / math.log(2)


def token_classes(images: Tensor, masks: Tensor, grid: Sequence[int]) -> Tensor:
    """(n, 3, S, S), (n, L, S, S) with UNKNOWN -> (n, L + 2, h * w) bool: TOKEN_CLASSES below each token."""
    there = F.adaptive_max_pool2d((masks == 1).float(), tuple(grid)).bool()  # (n, L, h, w)
    outside = F.adaptive_max_pool2d(images.amax(1, keepdim=True).float(), tuple(grid)) <= DARK  # (n, 1, h, w)
    unknown = (masks == UNKNOWN).flatten(1).any(1)[:, None, None, None]
    nothing = ~there.any(1, keepdim=True) & ~outside & ~unknown
    return torch.cat([there, nothing, outside], 1).flatten(2)


@torch.inference_mode()
def collect(net: nn.Module, batches: Iterable) -> dict[str, ExpertUsage]:
    """Route every photograph for every task, labelled or not; `batches` are collated for the task of masks alone."""
    net.eval()
    device, usages = next(net.parameters()).device, {}
    for b in (batch.to(device) for batch in batches):
        for task, r in net.routed_maps(b.images)[1].items():
            went = per_token(r)
            below, tokens = went.new_zeros(len(TOKEN_CLASSES), *went.shape[2:]), went.new_zeros(len(TOKEN_CLASSES))
            for masks, indices in b.indices.items():
                classes = token_classes(b.images[indices], b.targets[masks], r.grid[1:]).to(went.dtype)
                below, tokens = torch.einsum("nlt,ntse->lse", classes, went[indices]), classes.sum((0, 2))
            undecided = entropy(r.probabilities).view(r.grid[0], -1).mean(1)
            usages.setdefault(task, []).append(ExpertUsage(*(x.double().cpu()
                                                             for x in (went.mean(1), undecided, below, tokens))))
    return {task: ExpertUsage(torch.cat([u.shares for u in uses]), torch.cat([u.entropy for u in uses]),
                              sum(u.below for u in uses), sum(u.tokens for u in uses)) for task, uses in usages.items()}


def unused_experts(tokens: Iterable[Sequence[float]]) -> list[int]:
    """Experts to which less than UNUSED of the tokens go; a row of shares for each task, tasks count alike."""
    mean = torch.tensor(list(tokens), dtype=torch.float64).mean(0)
    return (mean < UNUSED).nonzero().flatten().tolist()


def warning(experts: Sequence[int]) -> str:
    """A line that names unused experts."""
    one = len(experts) == 1
    return (f"warning: expert{'' if one else 's'} {', '.join(map(str, experts))} receive{'s' if one else ''} less than "
            f"{100 * UNUSED:.0f} % of the tokens")


# ---- what routes tell ----

@dataclass
class Information:
    """Mutual information in bits, its mean over permutations of the labels, and how often these reach it."""
    bits: float
    by_chance: float
    p: float
    units: int  # how many were permuted

    def __str__(self):
        return f"{self.bits:.3f} bit (by chance {self.by_chance:.3f}, p = {self.p:.3f})"


def one_hot(keys: Sequence, dtype: torch.dtype) -> tuple[Tensor, list]:
    """Keys of n rows -> (n, m), which of the m different keys each has, and these in their order."""
    names = sorted(set(keys))
    return F.one_hot(torch.tensor([names.index(key) for key in keys])).to(dtype), names


def mutual_information(shares: Tensor, labels: Tensor) -> Tensor:
    """I(expert; label) in bits for shares (..., n, E), rows of which sum to 1, and one-hot labels (..., n, G).

    I = sum_g p_g sum_e q_ge log2(q_ge / q_e): p_g share of the rows with label g, q_ge mean share of expert e in them,
    q_e in all (Cover & Thomas, Elements of Information Theory, eq. 2.28); here as entropy of q_e minus that of q_ge.
    """
    p = labels.mean(-2)  # (..., G)
    q = (labels / labels.sum(-2, keepdim=True)).mT @ shares  # (..., G, E)
    return (entropy((p[..., None] * q).sum(-2)) - (p * entropy(q)).sum(-1)).clamp(min=0)


def information(shares: Tensor, labels: Sequence, blocks: Sequence[int] | None = None,
                resamples: int = 1000) -> Information:
    """Mean of I(expert; label) over the tables of `shares` (T, n, E), beside the same with labels permuted.

    From finitely many rows the estimate is above 0 even where there is nothing to find, by about (E - 1)(G - 1) /
    (2 n ln 2) bits if each went to one expert (Miller 1955); the permutations show by how much, and p = (1 + how many
    reach it) / (1 + resamples) (Phipson & Smyth 2010). Rows must be independent: an eye each, not a token.
    `blocks` (n,), ascending: permute within these alone.
    """
    labelled, _ = one_hot(labels, shares.dtype)
    blocks = torch.zeros(len(labels)) if blocks is None else torch.as_tensor(blocks)
    generator = torch.Generator().manual_seed(0)
    bits = float(mutual_information(shares, labelled).mean())
    chance = []
    for some in torch.arange(resamples).split(20):  # as many at once as is fast
        lots = torch.rand(len(some), len(blocks), dtype=torch.float64, generator=generator)
        permuted = labelled[(blocks.double() + lots).argsort()]  # (20, n, G)
        chance.append(mutual_information(shares, permuted[:, None]).mean(1))
    chance = torch.cat(chance)
    return Information(bits, float(chance.mean()), (1 + int((chance > bits - 1e-12).sum())) / (1 + resamples),
                       len(labels))


def averaged(shares: Tensor, keys: Sequence) -> tuple[Tensor, list]:
    """Shares (..., n, E) -> means over rows with the same key (..., m, E), and the m keys in their order."""
    member, names = one_hot(keys, shares.dtype)  # (n, m)
    return (member / member.sum(0)).T @ shares, names


def describe(uses: Mapping[str, ExpertUsage], labels: Sequence[str | None], eyes: Sequence[str],
             word: str = "grade") -> dict:
    """All numbers about a split, as plain types: shares of tokens and weight by task, grade and lesion; information.

    `labels` are grades or classes of the photographs in their order, None where not known, and `word` says which;
    `eyes` names the eye of each. Information is about one of the K experts that a token was sent to, each as likely.
    """
    def as_lists(shares):  # (2, E)
        return {"tokens": shares[0].tolist(), "weight": shares[1].tolist()}

    known = [i for i, label in enumerate(labels) if label is not None]
    indices = {name: [i for i in known if labels[i] == name] for name in sorted({labels[i] for i in known})}
    content = {"photographs": len(labels), "word": word, "tasks": {}, "information": {}}
    for task, use in uses.items():
        mean = use.shares.mean(0)
        content["tasks"][task] = {
            **as_lists(mean), "entropy_of_use": float(entropy(mean[0] / mean[0].sum())),
            "entropy_of_router": float(use.entropy.mean()),
            "labels": {name: {"photographs": len(i), **as_lists(use.shares[i].mean(0))} for name, i in indices.items()},
            "below": {class_name: {"tokens_below": int(n), **as_lists(sums / n)}
                      for class_name, n, sums in zip(TOKEN_CLASSES, use.tokens, use.below) if n}}
    content["unused"] = unused_experts(t["tokens"] for t in content["tasks"].values())
    choices = torch.stack([use.shares[:, 0] / use.shares[:, 0].sum(1, keepdim=True) for use in uses.values()])
    if len(uses) > 1:
        by_eye, names = averaged(choices, eyes)  # (T, m, E)
        units = by_eye.transpose(0, 1).flatten(0, 1)[None]  # (1, m * T, E), tasks of one eye side by side
        number = torch.arange(len(names) * len(uses))
        content["information"]["task"] = asdict(information(units, (number % len(uses)).tolist(), number // len(uses)))
    if len(indices) > 1:
        by_eye, keys = averaged(choices[:, known], [(eyes[i], labels[i]) for i in known])
        label_of_eye = [label for _, label in keys]
        content["information"][word] = asdict(information(by_eye, label_of_eye))
        for task, shares in zip(uses, by_eye):
            content["tasks"][task]["information"] = asdict(information(shares[None], label_of_eye))
    return content


def table(usage: Mapping, details: bool) -> str:
    """What describe() returns, as lines of text; `details`: by grade and lesion too."""
    order = torch.tensor([t["tokens"] for t in usage["tasks"].values()]).mean(0).argsort(descending=True)
    experts = sorted(order[:12].tolist())
    most = "" if len(experts) == len(order) else f"; the {len(experts)} most used of {len(order)} experts"
    word = usage["word"]

    def line(title, shares):
        return f"   {title:24}" + "".join(f"{100 * shares['tokens'][e]:3.0f}/{100 * shares['weight'][e]:<4.0f}"
                                          for e in experts)
    lines = [f"experts   {usage['photographs']} photographs, all routed for every task; % of tokens sent there/mean "
             f"weight in %{most}",
             f"   {'expert':24}" + "".join(f"{e:^8}" for e in experts) + "  entropy in bits: of use, of router"]
    for task, t in usage["tasks"].items():
        lines.append(line(task, t) + f"  {t['entropy_of_use']:.2f}, {t['entropy_of_router']:.2f}")
        if details:
            lines += [line(f"  {name} ({v['photographs']})", v) for name, v in t["labels"].items()]
            lines += [line(f"  {name} below ({v['tokens_below']})", v) for name, v in t["below"].items()]
            if "information" in t:
                lines.append(f"     mutual information of expert and {word}: {Information(**t['information'])}")
    for label, given in (("task", ""), (word, ", given the task")):
        if label in usage["information"]:
            lines.append(f"   mutual information of expert and {label}{given}: "
                         f"{Information(**usage['information'][label])}")
    if usage["unused"]:
        lines.append("   " + warning(usage["unused"]))
    return "\n".join(lines)


def labels_of(run, records: Sequence[Record]) -> list[str | None]:
    """The grade, or the class, of each photograph in words; None where it is not known. `run`: see evaluate.py."""
    if run.options["names"].get("category"):
        return [r.category for r in records]
    return [None if r.grade is None else f"grade {r.grade}" for r in records]
