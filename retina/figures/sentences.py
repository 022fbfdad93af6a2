"""Sentences beside the true ones, and where the network looks for a word: FigureContext -> picture.

    marked          which words of a sentence another one does not bear out
    told_words      three words of an answer that tell something
    look            an answer, and how much each of its words looks at each place of each map
    sentences       the figure

Weights of attention are not reasons: they say what a word's last look took in, not what decided the word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from retina.datasets.descriptions import GRAMMAR, SLOTS, read, words
from retina.drawing import PALE, PAPER, SMALL, captioned, column, flow, label_legend, legend, masks_of, photograph, \
    row, scale, text, tinted, titled
from retina.evaluation.text_metrics import COUNTS, ORDERS, TextMetrics, bleu
from retina.figures.context import FigureContext, best_median_worst, of_run
from retina.figures.internals import heat, warm
from retina.inference import full_size


if TYPE_CHECKING:
    from model import Net


# L words of an answer; M places: the positions of the maps that the head reads but the finest, row by row

# slots that each begin to tell of something, beside the grade, which tells of all
FINDINGS = [k for k in SLOTS if k not in ("every_quadrant", "fovea", "soft_half", "grade")]
WRONG, MISSED = (255, 190, 150), (170, 214, 245)  # paper of words, light enough for black letters
SIDE, GAP = 224, 12  # pixels: side of a photograph, between two


# ---- words ----

def marked(said: str, other: str) -> list[tuple[str, bool]]:
    """Words of a sentence, and whether the other one tells otherwise.

    With the grammar of drawn eyes: words of a slot that has another value there; of a finding that is not there at
    all, every word. Else: words that the other sentence has not, or not as often.
    """
    match, facts = GRAMMAR.fullmatch(said), read(other)
    parts = [*re.finditer(r"\S+", said)]
    if not (match and facts):
        left, found = Counter(words(other)), []
        for part in parts:
            own = Counter(word for word in words(part[0]) if word.isalnum())
            found.append((part[0], not own <= left))
            left -= own
        return found
    spans = []
    for finding in re.finditer(r"[^.]+\.", said):
        slots = [k for k in SLOTS if match[k] and finding.start() <= match.start(k) < finding.end()]
        there = any(facts[k] for k in slots)
        spans += [match.span(k) for k in slots if match[k] != facts[k]] if there else [finding.span()]
    return [(part[0], any(begin < part.end() and part.start() < end for begin, end in spans)) for part in parts]


def told_words(task: TextMetrics, numbers: Tensor, most: int = 3) -> list[int]:
    """Places (of L) of words that tell something: side, findings, where these are few the grade; without the grammar,

    the words that are rarest in training.
    """
    said, match = task.words(numbers), GRAMMAR.fullmatch(task.text(numbers))
    if match:
        slots = [k for k in FINDINGS if match[k]]
        slots += ["grade"] * (len(slots) < most)
        spread = torch.linspace(0, len(slots) - 1, min(most, len(slots))).round().int().tolist()
        return [len(words(match.string[:match.start(slots[i])])) for i in spread]
    rarest = sorted((i for i, word in enumerate(said) if word.isalpha()), key=lambda i: -int(numbers[i]))
    return sorted(rarest[:most])


def quoted(said: Sequence[str], at: int, most: int = 4) -> str:
    """The word at a place in quotation marks, among `most` on both sides, up to the next full stop or comma."""
    begin = max([0, at - most, *(i + 1 for i, word in enumerate(said[:at]) if word in ".,;")])
    end = min([at + most + 1, *(i for i in range(at, len(said)) if said[i] in ".,;")])
    return " ".join(f'"{word}"' if i == at else word for i, word in enumerate(said[begin:end], begin))


def paragraph(heading: str, parts: Sequence[tuple[str, bool]], colour: Sequence[int], width: int) -> Image.Image:
    """A sentence below its heading, marked words on coloured paper."""
    parts = parts or [("(nothing)", False)]
    pictures = (text(word, width=width, paper=colour if there else PAPER) for word, there in parts)
    return column([text(heading, SMALL, PALE), flow(pictures, width, 2)], 3)


# ---- where it looks ----

@torch.inference_mode()
def look(net: Net, task: TextMetrics, image: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One sample (3, S, S) uint8 -> the answer (L,), and weights of its words (L, h_i, w_i) over each map i

    that has places: those of the last block, averaged over heads. A head without attention has none.
    """
    head, sizes, weights, hooks = net.heads[task.name], [], [], []
    if hasattr(head, "blocks"):
        hooks = [conv.register_forward_hook(lambda _, __, x: sizes.append(x.shape[2:])) for conv in head.laterals]
        # one pass for each word
        hooks.append(head.blocks[-1].photograph.register_forward_hook(lambda _, __, found: weights.append(found[1])))
    try:
        answer = full_size.predict_sample(net, [task], image, device)[task.name]
    finally:
        for hook in hooks:
            hook.remove()
    return answer, on_maps(torch.cat(weights, 2)[0].mean(0).cpu(), sizes) if weights else []


def on_maps(weights: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Weights (L, M) -> (L, h_i, w_i) for maps of these sizes; of several, the first and finest has no places."""
    sizes = sizes[len(sizes) > 1:]
    return [part.unflatten(1, size) for part, size in zip(weights.split([h * w for h, w in sizes], 1), sizes)]


# ---- the figure ----

def judged(task: TextMetrics, stats: Tensor) -> tuple[tuple[float, ...], str]:
    """How good an answer is, from its statistics, for an order; and in words."""
    told = task.parts(stats)[0]
    if not task.grammar:
        score = float(bleu(told[None, :COUNTS], ORDERS))
        return (score,), f"BLEU-4 {score:.1f}"
    readable, there, here, right, _ = map(int, told[COUNTS + 2:].nan_to_num().tolist())
    return (right / max(1, there), readable, right - here, there), (
        f"{right} of {there} slots right, {here - right} wrong" if readable else
        "no sentence of the grammar, so that single words are compared")


def panels_of(ctx: FigureContext, task: TextMetrics, name: str, title: str) -> tuple[Image.Image, bool]:
    """The true sentence, the network's, the photograph, and where three words look; whether they look anywhere."""
    sample, large, width = ctx.sample(name), ctx.sample(name, SIDE), 4 * SIDE + 3 * GAP
    answer, maps = look(ctx.run.net, task, sample.image, ctx.device)
    true, said, masks = " ".join(sample.text.split()), task.text(answer), masks_of(large)
    panels = [captioned(tinted(photograph(large.image, SIDE), masks), "lesions and disc outlined" if masks else name)]
    for at in told_words(task, answer) if maps else []:
        of_word = heat([x[at] for x in maps], ctx.photographs.size)
        panels.append(captioned(warm(large.image, of_word, SIDE), quoted(task.words(answer), at)))
    parts = [text(title, width=width), paragraph("true sentence", marked(true, said), MISSED, width),
             paragraph("the network's sentence", marked(said, true), WRONG, width), row(panels, GAP)]
    return column(parts, 8), bool(maps)


def sentences(ctx: FigureContext) -> Image.Image:
    """Sentences: the network's beside the true ones, and where it looks for a word."""
    task, *_ = ctx.having(TextMetrics, "says no sentences (text)")
    values = {name: judged(task, stats) for name, stats in ctx.stats(task).items()}
    ranked = best_median_worst({name: value for name, (value, _) in values.items()})
    drawn = [panels_of(ctx, task, name, f"{which}: {name}, {values[name][1]}") for name, which in ranked.items()]
    looks = any(there for _, there in drawn)
    keys = [legend([("wrong: the truth says otherwise, or nothing of it", WRONG, "square"),
                    ("missed: the network says otherwise, or nothing of it", MISSED, "square")])]
    keys += [label_legend(points=False)] * bool(ctx.masked)
    keys += [scale("nothing", "most", "where a word looks")] * looks
    rule = "the share of slots (side, numbers and places of findings, grade) of the true sentence that are right" \
        if task.grammar else "BLEU-4"
    attention = (" Heat: where the word in quotation marks looks, which need not be why it is said. These are the "
                 "weights of the last block's attention, mean over heads, the maps of all strides added up. How much "
                 "there is of something, the averages of the maps tell, with which a sentence begins.") * looks
    return titled(f"Sentences: best, median and worst of {len(values)} {ctx.words} photographs",
                  column([*keys, *(picture for picture, _ in drawn)], 16),
                  f"{of_run(ctx)}. Ranked by {rule}.{attention}{ctx.caution}")
