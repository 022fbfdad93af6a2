"""The network of a run as boxes and arrows; every number comes from the network and from one pass through it.

    labels     lines of text of each box
    Layout     where boxes and arrows are
    diagram    the picture
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from retina.drawing import COLOURS, FINER, INK, PALE, PAPER, brushes, font, spots, text
from retina.figures.context import FigureContext


if TYPE_CHECKING:
    from model import Net

# pixels of a picture that a page shows at half its size
LETTERS, PAD, GAP, EDGE = 28, 14, 46, 24  # font; around words in a box; between columns; around the picture
STEP, TASK = 76, 104  # from one stride to the next, from one task to the next
PHOTOGRAPHS = 6  # that show what partial labels are


# ---- words ----

def reads(net: Net, task: str) -> list[int]:
    """Strides of the maps that a head reads."""
    return [2 ** (i + 1) for i in range(5)[getattr(net.heads[task], "reads", slice(None))]]


def first_unet(net: Net) -> str | None:
    """The first task whose head has a decoder."""
    return next((t for t, head in net.heads.items() if hasattr(head, "decoder")), None)


@torch.inference_mode()
def labels(net: Net, size: int) -> dict[str, list[str]]:
    """{name of a box: its lines} for photographs of `size` pixels; "encoder 8" is the encoder's map at stride 8."""
    net, unet = copy.deepcopy(net).eval(), first_unet(net)
    lines = {"photographs": ["photographs (B, 3, H, W)", f"here H = W = {size}"], "skips": ["skip connections"],
             "encoder": [f"{type(net.encoder).__name__} encoder"], "decoder": ["shared U-Net decoder"],
             "labels": ["partial labels: task t", "takes its n_t of B"], "own": ["own map of each task"],
             "shared": ["shared maps: each head gets those of its n_t photographs"]}
    if unet:
        lines[f"{unet} decoder"] = [f"U-Net decoder of {unet}"]

    def shape(rows, sizes):
        return f"({', '.join([rows, *map(str, sizes)])})"

    def watch(name, rows, modules):
        def note(_, __, found):
            for x in [found] if isinstance(found, Tensor) else found:
                stride = size // x.shape[2]
                lines[f"{name} {stride}"] = [f"stride {stride}:  " * (name == "encoder") + shape(rows, x.shape[1:])]
        for module in modules:
            module.register_forward_hook(note)

    watch("encoder", "B", [net.encoder])
    watch("decoder", "B", net.decoder.blocks if net.decoder is not None else [])
    watch(f"{unet} decoder", f"n_{unet}", net.heads[unet].decoder.blocks if unet else [])
    routed, routing = net.routed_maps(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=net.mean.device))
    for t, head in net.heads.items():
        output = head(routed[t])
        guided = getattr(head, "guided", False)  # such a head answers with R sentences, in use with one
        sizes = [*output.shape[1 + guided:]]
        if len(sizes) == 3:
            sizes[1:] = [f"{letter}/{size // n}".removesuffix("/1") for letter, n in zip("HW", sizes[1:])]
        lines[f"own {t}"] = [shape(f"n_{t}", routed[t][net.routed].shape[1:])]
        lines[f"head {t}"] = [f"{type(head).__name__}: {shape(f'n_{t}', sizes)}",
                              f"strides read: {', '.join(map(str, reads(net, t)))}"]
    for t, r in routing.items():
        lines[f"router {t}"] = [f"router {t}", f"n_{t} x {r.grid[1] * r.grid[2]} tokens"]
        lines |= expert_words([*net.experts.routers.values()], r.experts.shape[1], r.load.shape[1])
    return lines


def expert_words(routers: Sequence[nn.Module], k: int, number: int) -> dict[str, list[str]]:
    """What is said of routers and of experts, of which each token meets k."""
    frozen = getattr(routers[0], "frozen", None)  # None: a fixed router
    kind = {None: "fixed", True: "frozen random", False: f"noisy top-{k}"}[frozen]
    logits = "u W_gate" if frozen else "u W_gate + N(0, 1) · (softplus(u W_noise) + 0.01)"
    g = f"1/{k} each" if frozen is None else f"softmax over the {k} largest of  {logits}" if k > 1 else \
        f"the largest of  softmax({logits})"
    loss = "training only: the noise N(0, 1), and the load-balancing loss  CV^2(importance) + CV^2(load)  over experts"
    return {"routers": [f"{kind} router", "for all tasks" if len({*routers}) == 1 < len(routers) else "of each task"],
            "experts": [f"mixture of {number} experts,", f"{k} for each token"], "plus": ["+"],
            "sum": ["y = x + D^-1/2 · sum of  g_i silu(u W1_i) W2_i"],
            "gate": [f"token x: one position of the map;  u = LayerNorm(x);  g = {g}"],
            "loss": [loss] * (frozen is False)}


# ---- places ----

class Box(NamedTuple):
    """A rectangle with lines of text; without a colour, only these."""
    left: int
    top: int
    right: int
    bottom: int
    lines: Sequence[str]
    colour: Sequence[int] | None
    dense: float  # how much of the colour its paper has

    x = property(lambda self: (self.left + self.right) // 2)
    y = property(lambda self: (self.top + self.bottom) // 2)


class Layout:
    """Boxes by name, arrows, and where lines meet that do not only cross; in pixels.

    Of heads with a decoder, the first is drawn step by step. Which photograph has which labels, and which experts a
    learned router picks, are examples.
    """

    def __init__(self, net: Net, size: int):
        self.net, self.lines, self.unet = net, labels(net, size), first_unet(net)
        self.tasks = sorted(net.heads, key=lambda t: t != self.unet)  # from top to bottom
        self.colours = dict(zip(net.heads, COLOURS * len(net.heads)))
        self.boxes: dict[str, Box] = {}
        self.rows: dict[str, int] = {}  # heights of the tasks' rows
        self.arrows: list[tuple[Sequence[int], Sequence[tuple[int, int]], bool]] = []  # colour, points, with a tip
        self.joints: list[tuple[int, int]] = []
        self.start, self.routed = self.at(1), self.at(2 ** (net.routed + 1))
        self.heads(self.own_maps(self.encoder()))

    def at(self, stride: int) -> int:
        """Height of a stride's row; the encoder's name stands between strides 1 and 2."""
        return 116 + STEP * (stride.bit_length() - 1) + (STEP + 20) * (stride > 1)

    def wide(self, *names: str) -> int:
        """Room for the longest line of the boxes whose names begin so."""
        lines = [line for name, of in self.lines.items() if name.startswith(names) for line in of]
        return round(max(map(font(LETTERS).getlength, lines))) + 2 * PAD

    def put(self, name: str, left: int, y: int, width: int = 0, colour: Sequence[int] | None = None,
            dense: float = 0.15, height: int = 0) -> Box:
        """A box around the height y, as wide and high as its lines need."""
        lines = self.lines.get(name, ())
        width, height = width or self.wide(name), height or round(1.35 * LETTERS) * len(lines) + PAD
        top = y - height // 2
        self.boxes[name] = Box(left, top, left + width, top + height, lines, colour, dense)
        return self.boxes[name]

    def link(self, colour: Sequence[int], *points: tuple[int, int], tip: bool = True) -> None:
        """An arrow, or a line."""
        self.arrows.append((colour, points, tip))

    def encoder(self) -> Box:
        """From the photographs down, and up again where tasks share a decoder; -> the map that goes to the experts."""
        above = self.put("photographs", EDGE, self.start, self.wide("photographs", "encoder"), PALE)
        for name, y in [("encoder", self.at(2) - STEP), *((f"encoder {2 ** i}", self.at(2 ** i)) for i in range(1, 6))]:
            box = self.put(name, EDGE, y, above.right - EDGE, PALE, 0.4 if name == "encoder" else 0.15)
            self.link(PALE, (box.x, above.bottom), (box.x, box.top))
            above = box
        if self.net.decoder is None:
            return above
        self.link(PALE, (above.right, above.y), (above.right + GAP, above.y))
        return self.climb("decoder", above.right + GAP, above.y, self.wide("decoder"), PALE)

    def climb(self, name: str, left: int, y: int, width: int, colour: Sequence[int]) -> Box:
        """A decoder from its name at height y upwards, joined by the encoder's maps; -> its last map."""
        below = self.put(name, left, y, width, colour, 0.4)
        for stride in [2 ** i for i in range(4, -1, -1) if f"{name} {2 ** i}" in self.lines]:
            box = self.put(f"{name} {stride}", left, self.at(stride), width, colour)
            self.link(colour, (box.x, below.top), (box.x, box.bottom))
            if stride > 1:
                self.link(PALE, (self.boxes[f"encoder {stride}"].right, box.y), (left, box.y))
            below = box
        return below

    def own_maps(self, source: Box) -> Box:
        """The photographs of each task, and their way through the experts to the task's own map; -> the first."""
        y, left = self.routed + STEP + 16, EDGE if self.net.decoder is None else source.right + GAP
        taken = self.put("labels", left, y, 0, PALE, 0.4)
        begin = [(taken.x, source.bottom)] if left == EDGE else [(source.right, source.y), (taken.x, source.y)]
        self.link(PALE, *begin, (taken.x, taken.top))
        self.rows = {t: y + 112 + TASK * i for i, t in enumerate(self.tasks)}
        side = (taken.right - left + 8) // PHOTOGRAPHS
        for i, j in itertools.product(range(len(self.tasks)), range(PHOTOGRAPHS)):
            t, known = self.tasks[i], (2 * i + j * (i + 2)) % 5 < 3
            end = self.put(f"label {t} {j}", left + j * side, self.rows[t], side - 8, self.colours[t], known, side - 8)
        if self.net.experts is not None:
            end = self.experts(end.right, y)
        left = max(end.right + GAP, self.boxes["encoder"].right + self.wide("skips") + GAP)
        for t, y in self.rows.items():
            own = self.put(f"own {t}", left, y, self.wide("own", f"{self.unet} decoder"), self.colours[t])
            self.link(self.colours[t], (end.right, y), (left, y))
        self.put("own", left, own.bottom + 34)
        return self.boxes[f"own {self.tasks[0]}"]

    def experts(self, begin: int, y: int) -> Box:
        """Routers, experts and their sum, which is returned; from `begin` to the right, with words at height y."""
        routers, number = self.net.experts.routers, len(self.net.experts.experts.w1)
        left, width = begin + GAP, self.wide("router")
        self.put("routers", left, y, width)
        words = self.put("experts", left + width + GAP, y)
        first, last = self.rows[self.tasks[0]] - TASK // 2, self.rows[self.tasks[-1]] + TASK // 2
        pitch = (last - first) / number
        some = [self.put(f"expert {i}", words.left + 30, round(first + (i + 0.5) * pitch),
                         words.right - words.left - 60, INK, 0, max(1, round(0.75 * pitch))) for i in range(number)]
        plus = self.put("plus", words.right + GAP // 2, (first + last) // 2, 50, INK, 0, last - first)
        for i, (t, y) in enumerate(self.rows.items()):
            box = self.put(f"router {t}", left, y, width, self.colours[t])
            order = np.random.default_rng(i).permutation(number)
            self.link(box.colour, (begin, y), (left, y))
            for e in order[:routers[t].top_k] if hasattr(routers[t], "top_k") else routers[t].own:
                self.link(box.colour, (box.right, y), (some[e].left, some[e].y), tip=False)
                self.link(box.colour, (some[e].right, some[e].y), (plus.left, y), tip=False)
        x = self.boxes["labels"].x
        self.link(PALE, (x, last - TASK // 4), (x, last + 40), (plus.x, last + 40), (plus.x, plus.bottom))
        self.put("sum", left, last + 66)
        self.put("gate", EDGE - PAD, last + 136)
        if self.lines["loss"]:
            self.put("loss", EDGE - PAD, last + 190)
        return plus

    def heads(self, first: Box) -> None:
        """Own and shared maps -> answers."""
        bus, over, left = self.boxes["encoder"].right + GAP // 2, self.start - 64, first.right + GAP
        for t in self.tasks:
            last, colour = self.boxes[f"own {t}"], self.colours[t]
            if t == self.unet:
                last = self.climb(f"{t} decoder", first.left, self.routed, first.right - first.left, colour)
                self.link(colour, (first.x, first.top), (first.x, self.boxes[f"{t} decoder"].bottom))
                self.put("skips", first.left - self.wide("skips"), self.at(2) - 32)
            head = self.put(f"head {t}", left, last.y, self.wide("head"), colour)
            self.link(colour, (last.right, last.y), (left, last.y))
            for y in [self.at(s) for s in reads(self.net, t) if t != self.unet and self.at(s) != self.routed]:
                self.link(PALE, (self.boxes["encoder"].right, y), (bus, y), (bus, over), (head.right + GAP // 2, over),
                          (head.right + GAP // 2, head.y), (head.right, head.y))
                self.joints.append((bus, y))
                self.put("shared", bus, over - 26)


# ---- the picture ----

def diagram(net: Net, size: int) -> Image.Image:
    """The network for photographs of `size` pixels as a picture of few colours."""
    made = Layout(net, size)
    ends = [box[2:4] for box in made.boxes.values()] + [p for _, points, _ in made.arrows for p in points]
    picture = Image.new("RGB", tuple(max(side) + EDGE for side in zip(*ends)), PAPER)
    for colour in {arrow[0]: 0 for arrow in made.arrows}:
        for pen, wider in brushes(picture, colour, 1.5):
            for points, tip in [arrow[1:] for arrow in made.arrows if arrow[0] == colour]:
                way = FINER * np.array(points)
                end, ahead = way[-1].copy(), FINER * tip * np.sign(way[-1] - way[-2])  # a tip points along an axis
                way[-1] -= 10 * ahead
                pen.line(way.flatten().tolist(), 255, round((3 + wider) * FINER), "curve")
                pen.polygon([*end, *(end - 16 * ahead + 8 * ahead[::-1]), *(end - 16 * ahead - 8 * ahead[::-1])], 255)
    spots(picture, made.joints, PALE, 7)
    pen = ImageDraw.Draw(picture)
    for box in made.boxes.values():
        paper = [round(255 - box.dense * (255 - c)) for c in box.colour or PAPER]
        if box.colour is not None:
            pen.rectangle(box[:4], tuple(paper), tuple(box.colour), 2)
        if box.lines:
            words = text("\n".join(box.lines), LETTERS, paper=paper, place=0.5)
            picture.paste(words, (box.x - words.width // 2, box.y - words.height // 2))
    return picture.quantize()


def architecture(ctx: FigureContext) -> Image.Image:
    """The network of the run."""
    return diagram(ctx.run.net, ctx.photographs.size)
