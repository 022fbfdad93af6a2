"""How sentences are scored: BLEU, and what they say.

BLEU: Papineni et al. 2002, ACL, "BLEU: a method for automatic evaluation of machine translation"; of a whole corpus,
its edge cases as sacrebleu has them (Post 2018, arXiv 1804.08771, smoothing "exp").
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from retina.datasets import descriptions
from retina.datasets.records import Record
from retina.evaluation import metrics
from retina.evaluation.scoring import SplitScores
from retina.evaluation.task_metrics import TaskMetrics


# n photographs, D weightings of them, L places of a sentence, N = 4 orders of n-grams
ORDERS = 4
UNKNOWN_WORD = "<unknown>"  # no text has it: words() takes its parts for words
COUNTS = 2 * ORDERS + 2


@lru_cache(1 << 14)  # the same sentences come again and again
def ngrams(words: tuple, order: int) -> Counter:
    """How often each run of `order` words occurs; not to be changed."""
    return Counter(zip(*(words[k:] for k in range(order))))


def bleu_counts(answer: tuple, truth: tuple) -> list[int]:
    """Of each order the n-grams of the answer that the truth has as well, and all of them; words of both: 2 N + 2."""
    matches = [(ngrams(answer, n) & ngrams(truth, n)).total() for n in range(1, ORDERS + 1)]
    return matches + [max(0, len(answer) + 1 - n) for n in range(1, ORDERS + 1)] + [len(answer), len(truth)]


def bleu(counts: Tensor, order: int) -> Tensor:
    """BLEU up to `order` words, 0 to 100, from sums of bleu_counts over a corpus (D, 2 N + 2) -> (D,).

        100 * min(1, e^(1 - r / c)) * (p_1 ... p_order)^(1 / order)      (Papineni et al. 2002, section 2.3)

    p are matches / all; the k-th order without a match has 1 / (2^k all) instead. 0 where no word matches, or where no
    sentence has as many words as an order.
    """
    matches, every = counts[:, :ORDERS], counts[:, ORDERS:2 * ORDERS]
    answered, true = counts[:, 2 * ORDERS:].unbind(1)
    missed = (matches == 0) & (every > 0)
    p = torch.where(missed, 0.5 ** missed.cumsum(1), matches) / every.clamp(min=1)  # (D, N)
    brevity = torch.where(answered > 0, (1 - true / answered.clamp(min=1)).clamp(max=0).exp(), 0.0)
    score = 100 * brevity * p[:, :order].log().mean(1).exp()
    return torch.where(matches.any(1) & (every[:, :order] > 0).all(1), score, 0.0)


@lru_cache(1 << 12)
def slots_of(words: tuple[str, ...]) -> dict[str, str]:
    """The slots that a sentence fills; {}: it cannot be read. Not to be changed."""
    read = descriptions.read(descriptions.sentence(words)) or {}
    return {slot: value for slot, value in read.items() if value is not None}


@lru_cache(1 << 12)
def stutters(words: tuple) -> bool:
    """Whether some words stand twice in a row."""
    return any(words[i:i + k] == words[i + k:i + 2 * k] for k in range(1, len(words) // 2 + 1)
               for i in range(len(words) - 2 * k + 1))


class TextMetrics(TaskMetrics):
    """Of sentences over the words of training; of drawn eyes also what they say, slot by slot."""
    title = "sentence"
    vocabulary: Sequence[str]
    pad: int  # numbers of no word,
    unknown: int  # of a word that is not in the vocabulary,
    end: int  # of the end of a sentence, after which the words of the vocabulary follow

    @property
    def grammar(self) -> bool:
        """Whether the sentences are those of drawn eyes."""
        return {"eye", ".", "retinopathy"} <= set(self.vocabulary) <= descriptions.GRAMMAR_WORDS  # these are in each

    @property
    def primary(self) -> str:
        return "slots" if self.grammar else "exact"

    def words(self, numbers: Tensor) -> list[str]:
        """The words with these numbers, up to the end of the sentence."""
        words = []
        for k in numbers.int().tolist():
            if k in (self.pad, self.end):
                break
            words.append(UNKNOWN_WORD if k == self.unknown else self.vocabulary[k - self.end - 1])
        return words

    def text(self, numbers: Tensor) -> str:
        """The same as a sentence."""
        return descriptions.sentence(self.words(numbers))

    def told(self, answer: Tensor, truth: Tensor) -> list[float]:
        """Of one photograph: bleu_counts, exact, stuttering.

        With a grammar also: readable; how many slots the truth has, the answer has, are the same; whether the side is.
        """
        said, true = (tuple(self.words(numbers)) for numbers in (answer, truth))
        # what an unknown word is, nobody knows: no word of the answer is the same
        values = [*bleu_counts(said, tuple(None if w == UNKNOWN_WORD else w for w in true)),
                  float(said == true and UNKNOWN_WORD not in true), float(stutters(said))]
        if self.grammar:
            here, there = slots_of(said), slots_of(true)
            values += [float(bool(here)), len(there), len(here),
                       sum(here.get(k) == v for k, v in there.items()),
                       float(here.get("side") == there["side"]) if there else math.nan]
        return values

    def image_stats(self, answer, target, accumulator=None):
        """(n, F + 2 L): see `told`; numbers of the words of answer and truth."""
        told = torch.tensor([self.told(*both) for both in zip(answer.cpu(), target.cpu())], dtype=torch.float64)
        return torch.cat([told.to(answer.device), answer, target], 1)

    def parts(self, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., F + 2 L) -> what is `told`, answer, truth."""
        told = COUNTS + (7 if self.grammar else 2)
        return stats.split([told, *[(stats.shape[-1] - told) // 2] * 2], -1)

    def compute(self, stats, weights, calibration):
        """BLEU-1 to 4, how many sentences are exact and stutter, their length.

        With a grammar also shares: of slots of the truth that are right, of slots of the answers that are, of sides
        that are, of answers that can be read.
        """
        told, *_ = self.parts(stats)
        counts, exact, stutters = weights @ told[:, :COUNTS], told[:, COUNTS], told[:, COUNTS + 1]
        values = {f"bleu{n}": bleu(counts, n) for n in range(1, ORDERS + 1)}
        values |= {"exact": metrics.mean(exact, weights), "length_ratio": counts[:, -2] / counts[:, -1],
                   "stutters": metrics.mean(stutters, weights)}
        if self.grammar:
            readable, there, here, right, side = told[:, COUNTS + 2:].unbind(1)
            values = {"slots": weights @ right / (weights @ there), "slots_precision": weights @ right /
                      (weights @ here), "side": metrics.mean(side, weights),
                      "readable": metrics.mean(readable, weights)} | values
        return values

    def metrics(self, stats, calibration=MappingProxyType({}), accumulator=None):
        """Also how many answers differ; of that a resample, which has fewer photographs, could tell nothing."""
        return super().metrics(stats) | {"different": float(len(self.parts(stats)[1].unique(dim=0)))}

    def right(self, stats):
        """Which photographs have the true sentence: (n,) bool."""
        return stats[:, COUNTS] > 0.5

    def constant_guess(self, targets):
        """Of the hundred most frequent sentences the one with the highest primary metric, of equal ones BLEU."""
        sentences, number = targets.unique(dim=0, return_counts=True)

        def worth(sentence):
            stats = self.image_stats(sentence.expand_as(sentences), sentences)
            values = self.compute(stats, number[None].double(), {})
            return float(values[self.primary]), float(values["bleu4"])

        return max(sentences[number.argsort(descending=True, stable=True)[:100]], key=worth)[None]

    def scored_columns(self, stats, calibration):
        told, answer, truth = self.parts(stats)
        return {"text": self.text(answer), "text_true": self.text(truth),
                "text_bleu4": round(float(bleu(told[None, :COUNTS], ORDERS)), 2)}

    def predicted_columns(self, answer, sample, calibration):
        return {"text": self.text(answer)}

    def caption(self, columns):
        return [f"in words: {columns['text']}"]


# ---- what answers are held against ----

def guesses(task: TextMetrics, scores: SplitScores, training: Sequence[Record],
            targets: Tensor) -> dict[str, SplitScores]:
    """Scores of sentences that need no decoder: the best constant one, and a random one of training (seed 0).

    The latter is of the grade that the run predicts, where it does. `targets` (m, L) are those of `training`.
    """
    names, truth = scores.names[task.name], task.parts(scores.stats[task.name])[2].long()
    grades, rng, same = {}, torch.Generator().manual_seed(0), "a random one of training"
    for other in scores.tasks:
        if other.name == "cls" and "cls" in scores.stats:
            same = f"{same} with the predicted {other.title}"
            grades = dict(zip(scores.names["cls"], map(other.word, scores.stats["cls"][:, :-1].argmax(1).tolist())))
            known = [r.labels.get(other.label) for r in training]
    every = list(range(len(training)))
    drawn = [choices[int(torch.randint(len(choices), (), generator=rng))] for choices in (
        [i for i in every if known[i] == grades[name]] or every if name in grades else every for name in names)]
    answers = {"the best constant sentence": task.constant_guess(targets).expand_as(truth), same: targets[drawn]}
    return {title: SplitScores([task], {task.name: names}, {task.name: task.image_stats(answer, truth)},
                               eyes=scores.eyes) for title, answer in answers.items()}
