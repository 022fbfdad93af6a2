"""One network for several answers about one retina photograph. Read it from top to bottom:

    MBConv -> EfficientNet -> ENCODERS        Tan & Le 2019, arXiv 1905.11946; Lite variants: TensorFlow's TPU models
    NoisyTopKRouter -> Experts -> MoELayer    noisy top-k gates (Shazeer et al. 2017, arXiv 1701.06538), one for each
                                              task (Ma et al. 2018, KDD, "multi-gate mixture of experts")
    load_balancing_loss                       tasks together use all experts (Shazeer et al. 2017)
    UpBlock -> Decoder                        U-Net (Ronneberger et al. 2015, arXiv 1505.04597)
    ClassifierHead, MaskHead, LandmarkHead    maps -> classes, masks, points
    Attention -> TextBlock -> TextHead        maps -> a sentence (Vaswani et al. 2017, arXiv 1706.03762)
    NetConfig -> Net                          all of it in one forward pass

    python -c "import model; print(model.EfficientNet('b0'))"
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# B batch (n_t of them with a label for task t), C channels, H W image, h w token grid
# N tokens, E experts, K experts of each token (top_k), D hidden units of an expert


# ---- encoders: a photograph -> five maps ----

class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, activation; (B, inputs, H, W) -> (B, outputs, H/stride, W/stride), H and W even.

    The index of each layer ("0" convolution, "1" norm) is its name in torchvision's checkpoints. With `same`, a stride
    of 2 pads as TensorFlow does: one pixel more on the right and below than on the left and above.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1,
                 act: Callable[[], nn.Module] | None = nn.SiLU, norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
                 same: bool = False):
        self_padded = same and stride == 2
        layers = [nn.Conv2d(inputs, outputs, kernel, stride, 0 if self_padded else kernel // 2, groups=groups,
                            bias=False), norm(outputs)]
        super().__init__(*layers, *([act()] if act else []))  # in place, it would first copy what it overwrites
        self.padding = (kernel // 2 - 1, kernel // 2) * 2 if self_padded else None  # left, right, above, below

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.padding is None else F.pad(x, self.padding))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means (Hu et al. 2018, arXiv 1709.01507, eqs. 2-4)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(mean))))


class MBConv(nn.Module):
    """Inverted residual block: widen, filter each channel, gate, narrow (Sandler et al. 2018, arXiv 1801.04381).

    `drop` is the chance that a photograph skips the block in training (stochastic depth, arXiv 1603.09382, eq. 2).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int, drop: float,
                 layer: Callable[..., nn.Module] = ConvNormAct, gated: bool = True):
        super().__init__()
        wide = round_channels(inputs * expand)
        widen = [] if wide == inputs else [layer(inputs, wide, 1)]
        gate = [SqueezeExcite(wide, max(1, inputs // 4))] if gated else []
        self.block = nn.Sequential(*widen, layer(wide, wide, kernel, stride, groups=wide), *gate,
                                   layer(wide, outputs, 1, act=None))
        self.residual, self.drop = stride == 1 and inputs == outputs, drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.residual and self.training and self.drop > 0:
            y = y * y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)
        return x + y if self.residual else y


# kernel, stride, expand ratio, output channels, blocks: table 1 of the EfficientNet paper (B0)
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
          (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]


class Variant(NamedTuple):
    """How an EfficientNet differs from B0."""
    width: float = 1.0  # multipliers of the compound scaling rule (section 3.3)
    depth: float = 1.0
    dropout: float = 0.2  # before the last linear layer
    tensorflow: bool = False  # trained with the constants of the original TensorFlow code
    lite: bool = False  # without gates, with ReLU6, and with TensorFlow's padding


VARIANTS = {"b0": Variant(), "b1": Variant(1.0, 1.1), "b2": Variant(1.1, 1.2, 0.3), "b3": Variant(1.2, 1.4, 0.3),
            "b4": Variant(1.4, 1.8, 0.4), "b5": Variant(1.6, 2.2, 0.4, True), "b6": Variant(1.8, 2.6, 0.5, True),
            "b7": Variant(2.0, 3.1, 0.5, True), "lite0": Variant(tensorflow=True, lite=True)}


def round_channels(channels: float) -> int:
    """Nearest multiple of 8, but never more than 10 % below `channels` (the published scaling rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class EfficientNet(nn.Module):
    """EfficientNet without its classifier: (B, 3, H, W) -> five maps at strides 2, 4, 8, 16, 32.

    Names mirror torchvision's (`features.0` ... `features.7`). `classifier_head` holds what a ClassifierHead copies
    from EfficientNet's own classifier, see FeatureSpec.
    """

    def __init__(self, variant: str = "b0", drop: float = 0.2):
        super().__init__()
        width, depth, dropout, tensorflow, lite = VARIANTS[variant]
        style = {"norm": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01) if tensorflow else nn.BatchNorm2d,
                 "act": nn.ReLU6 if lite else nn.SiLU}
        layer = partial(ConvNormAct, **style, same=lite)
        total = sum(math.ceil(depth * n) for *_, n in STAGES)
        drops = iter([drop * i / total for i in range(total)])  # stochastic depth grows with the block's number
        inputs = round_channels(32 * width)
        stages = [layer(3, inputs, 3, stride=2)]
        for kernel, stride, expand, outputs, n in STAGES:
            outputs = round_channels(outputs * width)
            stages.append(nn.Sequential(*[
                MBConv(outputs if i else inputs, outputs, kernel, 1 if i else stride, expand, next(drops), layer,
                       gated=not lite) for i in range(math.ceil(depth * n))]))
            inputs = outputs
        self.features = nn.Sequential(*stages)
        self.channels = tuple(round_channels(STAGES[i][3] * width) for i in (0, 1, 2, 4, 6))
        self.classifier_head = {"last_channels": 4 * inputs, **style, "dropout": dropout}
        initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, stage in enumerate(self.features):
            x = stage(x)
            if i in (1, 2, 3, 5, 7):  # the last stage of each resolution
                maps.append(x)
        return maps  # (B, C_i, H / 2^i, W / 2^i) for i = 1..5


def initialise(module: nn.Module) -> None:
    """He initialisation of every convolution inside `module` (arXiv 1502.01852, eq. 10, with the fan-out)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class EncoderSpec(NamedTuple):
    """An encoder, (B, 3, H, W) -> five maps at strides 2 to 32 of `channels`, and the published weights that fit it."""
    build: Callable[[float], nn.Module]  # takes the chance of stochastic depth
    weights: str | None = None  # the name of the model that they are of, see read_weights; None: there are none
    to_head: tuple[str, ...] = ()  # prefixes of keys that belong to the first convolution of a ClassifierHead
    left_out: tuple[str, ...] = ()  # prefixes of keys that belong nowhere; all other keys are the encoder's
    # of the photographs that the weights were trained on, 0 to 1: those of torchvision's models
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


# what --encoder knows; another encoder is a class and a line
ENCODERS = {name: EncoderSpec(partial(EfficientNet, name), f"efficientnet_{name}", ("features.8.",), ("classifier.",))
            for name in VARIANTS}
ENCODERS["lite0"] = ENCODERS["lite0"]._replace(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


# ---- experts: each token of each task is sent to K of E small networks ----

class Routing(NamedTuple):
    """Where one task's tokens went. N = n_t * h * w; row i is token i of the grid, photograph by photograph."""
    experts: Tensor  # (N, K) indices of the K experts, best first
    gates: Tensor  # (N, K) their weights in the output; for K > 1 each row sums to 1
    probabilities: Tensor  # (N, E) softmax of the logits without noise
    load: Tensor  # (N, E) the chance that expert i is among the K if its noise alone were sampled again; a row sums to
    #               K on average; without noise (evaluation, fixed or frozen routers) it is 0 or 1
    grid: tuple[int, int, int]  # n_t, h, w

    def to_dense(self, values: Tensor | float) -> Tensor:
        """Values of each token's K experts, (N, K) or one number for all -> (N, E), 0 for the other experts."""
        empty = torch.zeros_like(self.probabilities)
        return empty.scatter(1, self.experts, values)


class NoisyTopKRouter(nn.Module):
    """Noisy top-k gate (Shazeer et al. 2017, section 2.1): tokens (N, C) -> the experts of each, and their gates.

    `frozen` makes it a control, the frozen random router: its weights are random, and it has no noise and no gradient.
    """

    def __init__(self, channels: int, num_experts: int, top_k: int, frozen: bool = False):
        super().__init__()
        self.top_k, self.frozen = top_k, frozen
        # zeros: at the start every expert is as good as any other, and noise alone decides
        self.gate = nn.Parameter(torch.zeros(channels, num_experts))
        self.noise = nn.Parameter(torch.zeros(channels, num_experts))
        if frozen:
            nn.init.normal_(self.gate, std=channels ** -0.5)  # logits of variance 1
            self.requires_grad_(False)

    def forward(self, u: Tensor, grid: tuple[int, int, int]) -> Routing:
        k, num_experts = self.top_k, self.gate.shape[1]
        with torch.autocast(u.device.type, enabled=False):  # which expert wins must not hang on bf16 rounding
            u = (u.detach() if self.frozen else u).to(self.gate.dtype)  # float32
            # clean = u gate ;  scale = softplus(u noise) + 0.01 ;  noisy = clean + scale * N(0, 1)      (eqs. 3, 4)
            clean, raw = (u @ torch.cat([self.gate, self.noise], 1)).chunk(2, 1)  # (N, E) each
            scale = F.softplus(raw) + 0.01
            add_noise = self.training and not self.frozen
            noisy = clean + scale * torch.randn_like(clean) if add_noise else clean
            # experts: the K largest of noisy ;  gates = softmax over these only                         (eqs. 3, 5)
            top, best = noisy.topk(min(k + 1, num_experts), dim=1)  # (N, K + 1)
            experts = best[:, :k]
            # with K = 1 that softmax is the constant 1 and teaches the router nothing: take the one over all experts
            gates = top[:, :k].softmax(1) if k > 1 else noisy.softmax(1).gather(1, experts)
            # load_i = Phi((clean_i - K-th largest of the *other* noisy logits) / scale_i)               (eqs. 8, 9)
            in_top_k = torch.zeros_like(clean, dtype=torch.bool).scatter(1, experts, True)
            if add_noise and k < num_experts:
                kth_excluding_i = torch.where(in_top_k, top[:, k:k + 1], top[:, k - 1:k])
                load = torch.special.ndtr((clean - kth_excluding_i) / scale)
            else:
                load = in_top_k.to(clean.dtype)
            return Routing(experts, gates, clean.softmax(1), load, grid)


class FixedRouter(nn.Module):
    """A control: every token goes to the same experts, `own`, whose outputs are averaged; nothing is learned."""

    def __init__(self, num_experts: int, own: Sequence[int]):
        super().__init__()
        self.register_buffer("own", torch.tensor(own), persistent=False)  # (K,)
        self.register_buffer("serves", torch.zeros(num_experts).index_fill(0, self.own, 1.0), persistent=False)  # (E,)

    def forward(self, u: Tensor, grid: tuple[int, int, int]) -> Routing:
        n, k = len(u), len(self.own)
        load = self.serves.expand(n, -1)  # (N, E)
        return Routing(self.own.expand(n, -1), self.serves.new_full((n, k), 1 / k), load / k, load, grid)


# what --router knows
ROUTERS = {"learned": "one noisy top-k gate for each task", "shared": "one gate for all tasks",
           "random": "a frozen random gate for each task", "uniform": "all experts, averaged",
           "private": "each task its own experts, averaged"}
LEARNED = ("learned", "shared")  # those of them that learn


def make_routers(router: str, channels: int, tasks: Sequence[str], num_experts: int,
                 top_k: int) -> dict[str, nn.Module]:
    """The router of each task; `router` is one of ROUTERS. ValueError, naming the flag: the numbers do not fit."""
    if router not in ROUTERS:
        raise ValueError(f"--router {router}: expected one of {', '.join(ROUTERS)}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"--top-k {top_k}: expected 1 to {num_experts}, the number of --num-experts")
    if router == "uniform" and top_k < num_experts:
        raise ValueError(f"--top-k {top_k}: --router uniform mixes all {num_experts} experts; leave --top-k out")
    if router == "private" and top_k * len(tasks) != num_experts:
        spare = num_experts - top_k * len(tasks)
        raise ValueError(f"--router private: {len(tasks)} tasks with --top-k {top_k} experts each need --num-experts "
                         f"{top_k * len(tasks)}; with {num_experts}, "
                         + (f"{spare} would have no task" if spare > 0 else f"{-spare} are missing"))
    if router == "shared":
        return dict.fromkeys(tasks, NoisyTopKRouter(channels, num_experts, top_k))
    if router == "uniform":
        return {t: FixedRouter(num_experts, range(num_experts)) for t in tasks}
    if router == "private":
        return {t: FixedRouter(num_experts, range(i * top_k, (i + 1) * top_k)) for i, t in enumerate(tasks)}
    return {t: NoisyTopKRouter(channels, num_experts, top_k, frozen=router == "random") for t in tasks}


class Experts(nn.Module):
    """E independent two-layer networks over tokens; each token passes through its K of them.

    y = D^-1/2 * sum over its K experts i of gates_i * silu(u w1_i) w2_i

    w2 starts at zero, so that at first the layer adds nothing. Adam moves every entry of w2 by about the learning rate,
    whatever the gradient. A sum over D of them would move D times as far; D^-1/2 leaves the root of that (compare Yang
    et al. 2022, arXiv 2203.03466). Without it the experts' output grew to forty times the map that it is added to.
    """

    def __init__(self, channels: int, num_experts: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, channels, hidden).normal_(std=math.sqrt(2 / channels)))
        self.w2 = nn.Parameter(torch.zeros(num_experts, hidden, channels))
        self.dropout = dropout

    @staticmethod
    def grouped_matmul(x: Tensor, w: Tensor, ends: Sequence[int]) -> Tensor:
        """Rows of x (N, inputs), split at `ends` into E parts, each times its own w_i of w (E, inputs, outputs)."""
        # unbind, since w[i] would allocate a gradient of the size of *all* experts each time
        return torch.cat([x_i @ w_i for x_i, w_i in zip(x.tensor_split(ends), w.unbind(0))])

    def forward(self, u: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """u (N, C), experts and gates (N, K) -> (N, C). The cost is that of N * K tokens, whatever E is."""
        expert, order = experts.flatten().sort(stable=True)  # (N*K,) pairs (token, expert), sorted by expert
        # where the pairs of the next expert begin; the one place at which the host has to wait for a GPU
        ends = torch.searchsorted(expert, torch.arange(1, len(self.w1), device=expert.device)).tolist()
        token = order // experts.shape[1]  # of each pair

        hidden = F.silu(self.grouped_matmul(u.index_select(0, token), self.w1, ends))  # (N*K, D)
        hidden = F.dropout(hidden, self.dropout, self.training)
        # gates_i * (hidden_i w2_i) = (gates_i * hidden_i) w2_i, by default half as much to multiply
        gates = gates.flatten().index_select(0, order).unsqueeze(1).to(hidden.dtype)  # (N*K, 1)
        y = self.grouped_matmul(gates / math.sqrt(hidden.shape[1]) * hidden, self.w2, ends)  # (N*K, C)
        return torch.zeros_like(u).index_add(0, token, y.to(u.dtype))


class MoELayer(nn.Module):
    """Experts behind the router of each task: {task: (n_t, C, h, w)} -> ({task: (n_t, C, h, w)}, {task: Routing}).

    A token is a position of the map. The tokens of all tasks are dispatched together. `ratio` is the width D of an
    expert as a multiple of C: one expert of ratio K * `ratio` is the dense adapter of equal cost, one of E * `ratio`
    that of equal parameters.
    """

    def __init__(self, channels: int, tasks: Sequence[str], num_experts: int = 8, top_k: int = 2,
                 router: str = "learned", ratio: float = 0.5, dropout: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.routers = nn.ModuleDict(make_routers(router, channels, tasks, num_experts, top_k))
        self.experts = Experts(channels, num_experts, max(1, round(ratio * channels)), dropout)

    def forward(self, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        tokens = {t: x.flatten(2).transpose(1, 2).flatten(0, 1) for t, x in maps.items()}  # (N_t, C)
        # float32: which expert wins must not hang on bf16 rounding, and matrix products of as many rows as an expert
        # happens to get are slower in bf16 on a CPU, which prepares itself for each new number (38 ms for 7)
        with torch.autocast(next(iter(maps.values())).device.type, enabled=False):
            normed = {t: self.norm(x.to(self.norm.weight.dtype)) for t, x in tokens.items()}
            routing = {t: self.routers[t](u, (len(maps[t]), *maps[t].shape[2:])) for t, u in normed.items()}
            mixed = self.experts(torch.cat(list(normed.values())),
                                 torch.cat([r.experts for r in routing.values()]),
                                 torch.cat([r.gates for r in routing.values()]))  # (sum of N_t, C)
        per_task = mixed.split([len(x) for x in tokens.values()])
        # y = x + experts(LayerNorm(x)), back on the grid
        return {t: x + y.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2).to(x.dtype)
                for (t, x), y in zip(maps.items(), per_task)}, routing


def identity(x: Tensor) -> Tensor:
    """The sum of x over all processes where there is only one; see retina/training/distributed.py."""
    return x


def load_balancing_loss(routing: Mapping[str, Routing],
                        all_reduce_sum: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """CV^2(importance) + CV^2(load) over experts (Shazeer et al. 2017, eqs. 6, 7, 11); 0 when all are used equally.

    Importance and load are averaged over a task's tokens, then over tasks: the tasks *together* should use all experts.
    Balancing each task on its own would forbid what the layer is for, that tasks differ in their experts.
    `all_reduce_sum` sums over the processes that share a batch, so that their tokens are balanced together.
    """
    of_tasks = []
    for r in routing.values():
        sums = all_reduce_sum(torch.stack([r.to_dense(r.gates), r.load]).sum(1))  # (2, E): importance, load
        of_tasks.append(sums / all_reduce_sum(sums.new_tensor(float(len(r.load)))))
    means = torch.stack(of_tasks).mean(0)  # (2, E)
    return (means.var(1, correction=0) / means.mean(1).square()).sum()


# ---- decoder: U-Net ----

class UpBlock(nn.Module):
    """One step up the U-Net: double the resolution, append the encoder's map of that size, two convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNormAct(inputs + skip, outputs, 3), ConvNormAct(outputs, outputs, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv2(self.conv1(torch.cat([x, skip], 1)))


WIDTHS = (128, 64, 32, 32)  # of the decoder's maps at strides 16, 8, 4, 2


class Decoder(nn.Module):
    """The decoder of a U-Net: maps of `channels`, finest first -> a map (B, widths[-1], ...), len(widths) steps up."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]):
        super().__init__()
        self.blocks = nn.ModuleList(UpBlock(*io) for io in zip([channels[-1], *widths], channels[-2::-1], widths))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        for block, skip in zip(self.blocks, skips[::-1]):
            x = block(x, skip)
        return x


# ---- heads: maps -> one task's raw output ----

class FeatureSpec(NamedTuple):
    """What a head is told about the five maps that it will get, (n_t, channels[i], H / 2^(i+1), W / 2^(i+1))."""
    channels: tuple[int, ...]
    routed: int  # index of the map that comes from the task's experts: 4, the bottleneck, or 1, at stride 4
    # channels, norm, activation and dropout of a ClassifierHead; the encoder's `classifier_head` may name others
    last_channels: int = 1280
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    act: Callable[[], nn.Module] = nn.SiLU
    dropout: float = 0.2
    text_decoder: str = "transformer"  # one of TEXT_HEADS


class ClassifierHead(nn.Module):
    """Classify the whole photograph: 1x1 convolution, global average, dropout, linear; maps -> (n_t, outputs).

    This is how EfficientNet classifies its bottleneck map. The maps at strides 4, 8 and 16 are added, each through a
    convolution: a lesion of a few pixels has vanished at stride 32, and the mask task keeps it visible on finer maps.
    """
    pretrained = "conv"  # the layer that published weights may exist for, see EncoderSpec.to_head

    def __init__(self, spec: FeatureSpec, outputs: int):
        super().__init__()
        self.reads = slice(1, 5)
        between = spec.channels[1:-1]
        self.conv = ConvNormAct(spec.channels[-1], spec.last_channels, 1, act=spec.act, norm=spec.norm)
        self.laterals = nn.ModuleList(ConvNormAct(c, c, 1) for c in between)
        self.dropout = nn.Dropout(spec.dropout)
        self.linear = nn.Linear(spec.last_channels + sum(between), outputs)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.convolved(maps))

    def convolved(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps whose averages the output is a linear function of: strides 32, 4, 8, 16."""
        return [self.conv(maps[-1]), *(conv(x) for conv, x in zip(self.laterals, maps[1:-1]))]

    def classify(self, convolved: Sequence[Tensor]) -> Tensor:
        """(n_t, C_i, h_i, w_i) each -> (n_t, outputs)."""
        return self.linear(self.dropout(torch.cat([x.mean((2, 3)) for x in convolved], 1)))


class MaskHead(nn.Module):
    """A U-Net decoder up to stride 2, then the image; maps -> logits (n_t, outputs, H, W), a yes/no per pixel and mask.

    The last step is a sub-pixel convolution (Shi et al. 2016, arXiv 1609.05158, eq. 4): at stride 2 it computes the
    four pixels of each place. Convolutions at the image's own resolution would take more time and memory.
    """

    def __init__(self, spec: FeatureSpec, outputs: int):
        super().__init__()
        self.reads = slice(0, spec.routed + 1)
        self.decoder = Decoder(spec.channels[self.reads], WIDTHS[-spec.routed:])
        self.conv = nn.Conv2d(WIDTHS[-1], 4 * outputs, 3, padding=1)
        initialise(self)
        # lesions are rare: start near p = 0.01 everywhere (Lin et al. 2017, arXiv 1708.02002, section 3.3)
        nn.init.constant_(self.conv.bias, math.log(0.01 / 0.99))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.conv(self.decoder(maps[self.reads]))  # (n_t, 4 L, H/2, W/2)
        # a process may have no photograph: pixel_shuffle has no backward pass then (findings/torch_pixel_shuffle*)
        return F.pixel_shuffle(x, 2) if len(x) else x.reshape(0, x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])


class LandmarkHead(nn.Module):
    """Find points by a feature pyramid down to stride 8; maps -> logits (n_t, points, H / 8, W / 8).

    1x1 convolutions bring the maps at strides 8, 16 and 32 to one width. From the coarsest on, the sum so far is
    doubled in size and the next map is added (Lin et al. 2017, arXiv 1612.03144, figure 3). A last convolution gives
    one heatmap for each point. A routed map at stride 4 holds what is coarser already: it alone is read, halved.
    """

    def __init__(self, spec: FeatureSpec, points: int, width: int = 64):
        super().__init__()
        self.reads = slice(min(2, spec.routed), spec.routed + 1)  # strides 8, 16, 32, or 4
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in spec.channels[self.reads][::-1])
        self.smooth = ConvNormAct(width, width, 3)
        self.conv = nn.Conv2d(width, points, 1)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x, *finer = [conv(m) for conv, m in zip(self.laterals, maps[self.reads][::-1])]
        for lateral in finer:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest") + lateral
        x = F.avg_pool2d(x, 2) if self.reads.start == 1 else x
        return self.conv(self.smooth(x))


# ---- a head that answers with a sentence, word by word ----

PAD, BOS, UNK, EOS = range(4)  # numbers of what is no word: nothing, begin, unknown, end; words follow
LONGEST = 64  # words of a sentence, its end included


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Positions (...,) -> (..., width): sin and cos of position / 10000^(2i / width) (Vaswani et al. 2017, 3.5)."""
    angles = positions[..., None] * 10000 ** (-torch.arange(0, width, 2, device=positions.device) / width)
    return torch.cat([angles.sin(), angles.cos()], -1)


class Attention(nn.Module):
    """Each of L words takes a mean over M places, weighted by how well its query fits their keys.

    Scaled dot products of several heads (Vaswani et al. 2017, arXiv 1706.03762, eq. 1 and section 3.2.2).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(n, M, W) -> (n, heads, M, d), d = W / heads."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2).contiguous()  # products are faster so

    def remember(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, M, d) of places (n, M, W)."""
        return self.split(self.key(places)), self.split(self.value(places))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        """x (n, L, W) -> (n, L, W), and the weights (n, heads, L, M). `causal`: no word sees a later one.

        The L words are then the last of the M.
        """
        q = self.split(self.query(x))
        # weights = softmax(q k^T / sqrt(d)) ;  y = weights v
        scores = q @ keys.transpose(2, 3) / math.sqrt(q.shape[3])  # (n, heads, L, M)
        if causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1 + keys.shape[2] - x.shape[1])
            scores = scores.masked_fill(later, -math.inf)
        weights = scores.softmax(3)
        return self.out((weights @ values).transpose(1, 2).flatten(2)), weights


class TextBlock(nn.Module):
    """A layer of the transformer's decoder: words look at those before them, then at the photograph, then think.

    Vaswani et al. 2017, figure 1, with the norms before what they normalise (Xiong et al. 2020, arXiv 2002.04745).
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.words, self.photograph = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None = None):
        """x (n, L, W) -> (n, L, W), and the past with these words.

        `seen` is what `photograph` remembers, `past` what `words` remembers of the words before these; None: of none.
        """
        u = self.norms[0](x)
        new = self.words.remember(u)
        past = new if past is None else tuple(torch.cat(pair, 2) for pair in zip(past, new))
        x = x + self.dropout(self.words(u, *past, causal=True)[0])
        x = x + self.dropout(self.photograph(self.norms[1](x), *seen)[0])
        return x + self.dropout(self.mlp(self.norms[2](x))), past


class TextHead(nn.Module):
    """Say a sentence; maps -> scores of the next of V words at each of L places (n, R, L, V).

    A sentence begins with the averages of the maps, which tell how much there is of something, and looks at their
    places, where it is. Given the true sentences, `target` (n, L), each word is scored after the true ones before it.
    Otherwise, and in evaluation also (R = 2, these last), after its own: the best word is taken, until the end.
    """
    guided = True  # forward takes targets

    def __init__(self, spec: FeatureSpec, vocabulary: int, width: int = 128):
        super().__init__()
        self.reads = slice(1, spec.routed + 1)  # strides 4, 8, 16, 32, or 4
        channels = spec.channels[self.reads]
        self.laterals = nn.ModuleList(ConvNormAct(c, width, 1) for c in channels)
        self.begin = nn.Linear(len(channels) * width, width)
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width ** -0.5)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("order", sinusoids(torch.arange(LONGEST), width), persistent=False)  # of words
        self.build(width)
        initialise(self)

    def build(self, width: int) -> None:
        """The layers that a control has not."""
        self.blocks = nn.ModuleList(TextBlock(width, 4, dropout=0.1) for _ in range(2))
        self.norm_maps = nn.LayerNorm(width)

    def forward(self, maps: Sequence[Tensor], target: Tensor | None = None) -> Tensor:
        maps = [conv(x) for conv, x in zip(self.laterals, maps[self.reads])]  # (n, W, h_i, w_i)
        begin = self.begin(torch.cat([x.mean((2, 3)) for x in maps], 1))  # (n, W)
        seen, answers = self.look(maps), []
        if target is not None:
            if self.training:
                target = target[:, :max(1, int((target != PAD).sum(1).max()) if len(target) else 1)]
            answers.append(self.next_words(F.pad(target[:, :-1], (1, 0), value=BOS), begin, seen)[0])
        if target is None or not self.training:
            answers.append(self.greedy(begin, seen))
        return torch.stack(answers, 1)

    def greedy(self, begin: Tensor, seen: Sequence) -> Tensor:
        """The scores (n, LONGEST, V) along the words that score best, until all of the sentences have ended."""
        word, past = torch.full((len(begin), 1), BOS, device=begin.device), None
        scores, ended = [], torch.zeros_like(word, dtype=torch.bool)
        while len(scores) < LONGEST and not (scores and ended.all()):
            score, past = self.next_words(word, begin, seen, past)
            scores.append(score)
            word = score[:, :, EOS:].argmax(2) + EOS  # never nothing, begin, or unknown
            ended = ended | (word == EOS)
        return F.pad(torch.cat(scores, 1), (0, 0, 0, LONGEST - len(scores)))

    def look(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What each block remembers of the photograph: a place for each position of each map but the finest."""
        places = []
        for x in maps[len(maps) > 1:]:  # the finest has four times as many positions as all others together
            # where it lies, in 64ths of the sides: without it nothing could tell left from right
            rows, columns = (sinusoids((torch.arange(n, device=x.device) + 0.5) * 64 / n, x.shape[1] // 2)
                             for n in x.shape[2:])  # (h, W/2), (w, W/2)
            where = torch.cat([rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)], 2)
            places.append(x.flatten(2).transpose(1, 2) + where.flatten(0, 1))  # (n, h*w, W)
        places = self.norm_maps(torch.cat(places, 1))  # (n, M, W)
        return [block.photograph.remember(places) for block in self.blocks]

    def embed(self, words: Tensor) -> Tensor:
        """(n, L) -> (n, L, W); the embedding is also the last layer (section 3.4 of the paper)."""
        return math.sqrt(self.embedding.embedding_dim) * self.embedding(words)

    def next_words(self, words: Tensor, begin: Tensor, seen: Sequence, past: Sequence | None = None):
        """Words (n, L) -> scores (n, L, V) of what follows each of them, and the past with them.

        `past` is what the layers remember of the words before these; None: there are none.
        """
        length = words.shape[1]
        before = 0 if past is None else past[0][0].shape[2]
        x = self.embed(words) + self.order[before:before + length]
        if past is None:
            x = x + F.pad(begin[:, None], (0, 0, 0, length - 1))  # at the first place
        passed = []
        for k, block in enumerate(self.blocks):
            x, remembered = block(x, seen[k], None if past is None else past[k])
            passed.append(remembered)
        return F.linear(self.norm(x), self.embedding.weight), passed


class GRUTextHead(TextHead):
    """A control without attention: a GRU (Cho et al. 2014, arXiv 1406.1078) that begins with the same averages."""

    def build(self, width):
        self.gru = nn.GRU(width, width, batch_first=True)

    def look(self, maps):
        return ()

    def next_words(self, words, begin, seen, past=None):
        x, past = self.gru(self.embed(words), torch.tanh(begin)[None] if past is None else past)
        return F.linear(self.norm(x), self.embedding.weight), past


TEXT_HEADS = {"transformer": TextHead, "gru": GRUTextHead}  # what NetConfig.text_decoder may be


# ---- the net ----

MOE_PLACES = {"bottleneck": 4, "decoder": 1}  # where --moe-at puts the layer, as the index of one of the five maps


@dataclass(frozen=True)
class NetConfig:
    """All that determines the network's architecture, beside its tasks."""
    encoder: str = "b0"  # one of ENCODERS
    num_experts: int = 8  # 0: no expert layer, every head reads the shared map itself
    top_k: int = 2
    router: str = "learned"  # one of ROUTERS
    expert_ratio: float = 0.5  # of an expert's hidden layer, in multiples of the map's channels
    moe_at: str = "bottleneck"  # one of MOE_PLACES
    expert_dropout: float = 0.1
    stochastic_depth: float = 0.1
    text_decoder: str = "transformer"  # one of TEXT_HEADS


class Net(nn.Module):
    """Photographs (B, 3, H, W), uint8 RGB, H and W multiples of 32 -> ({task: raw output}, {task: Routing}).

    `tasks` are objects with a `name` and a `head(spec)`, see FeatureSpec. `indices` says for which photographs each
    task is computed: {task: (n_t,), ascending}. Its output has n_t rows, perhaps none; a task that is not in `indices`
    has no output. None: all photographs for all tasks. `targets`, {task: (n_t, ...)}, guide a TextHead, and no other.
    ValueError: H or W is no multiple of 32; the numbers of experts do not fit.
    """

    def __init__(self, config: NetConfig, tasks: Sequence):
        super().__init__()
        self.encoder_spec = ENCODERS[config.encoder]
        self.encoder = self.encoder_spec.build(config.stochastic_depth)
        self.decoder, self.routed, channels = None, MOE_PLACES[config.moe_at], list(self.encoder.channels)
        if config.moe_at == "decoder":  # all tasks share a decoder up to stride 4; its map replaces the encoder's
            self.decoder = Decoder(self.encoder.channels, WIDTHS[:3])
            initialise(self.decoder)
            channels[self.routed] = WIDTHS[2]
        spec = FeatureSpec(tuple(channels), self.routed, text_decoder=config.text_decoder,
                           **getattr(self.encoder, "classifier_head", {}))
        self.heads = nn.ModuleDict({task.name: task.head(spec) for task in tasks})
        self.experts = None if config.num_experts == 0 else MoELayer(
            channels[self.routed], list(self.heads), config.num_experts, config.top_k, config.router,
            config.expert_ratio, config.expert_dropout)
        for name in ("mean", "std"):  # on the 0..255 scale
            statistics = torch.tensor(getattr(self.encoder_spec, name)).view(3, 1, 1) * 255
            self.register_buffer(name, statistics, persistent=False)

    def forward(self, images: Tensor, indices: Mapping[str, Tensor] | None = None,
                targets: Mapping[str, Tensor] = MappingProxyType({})):
        maps, routing = self.routed_maps(images, indices)
        guides = {t: (targets[t],) for t in maps if t in targets and getattr(self.heads[t], "guided", False)}
        return {t: self.heads[t](m, *guides.get(t, ())) for t, m in maps.items()}, routing

    def routed_maps(self, images: Tensor, indices: Mapping[str, Tensor] | None = None):
        """All but the heads: -> ({task: five maps of its photographs}, {task: Routing})."""
        if images.shape[2] % 32 or images.shape[3] % 32:
            raise ValueError(f"photographs of {images.shape[3]}x{images.shape[2]}: both sides must be multiples of 32")
        maps = list(self.encoder((images - self.mean) / self.std))
        if self.decoder is not None:
            maps[self.routed] = self.decoder(maps)

        def maps_for(task: str) -> list[Tensor | None]:  # those that its head reads, of its photographs
            read = range(5)[getattr(self.heads[task], "reads", slice(None))]
            whole = indices is None or len(indices[task]) == len(images)  # no copy then
            return [(m if whole else m[indices[task]]) if i in read else None for i, m in enumerate(maps)]

        task_maps, routing = {t: maps_for(t) for t in self.heads if indices is None or t in indices}, {}
        if self.experts is not None and task_maps:
            mixed, routing = self.experts({t: m[self.routed] for t, m in task_maps.items()})
            for t in task_maps:
                task_maps[t][self.routed] = mixed[t]
        return task_maps, routing
