"""Scores of sentences: BLEU against sacrebleu and numbers, slots by hand, and what answers without a network score."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from model import EOS, LONGEST, PAD, UNK
from retina.datasets import descriptions, readers, synthetic
from retina.datasets.descriptions import facts, words
from retina.datasets.records import Record
from retina.evaluation.scoring import SplitScores
from retina.evaluation.text_metrics import ORDERS, bleu, bleu_counts, guesses, stutters
from tasks import TASKS, Text, make_tasks


def text_task(*texts: str) -> Text:
    """The task whose vocabulary are the words of these texts."""
    return make_tasks(["text"], {"text": sorted({w for text in texts for w in words(text)})})[0]


def numbers(task: Text, texts) -> torch.Tensor:
    """(n, LONGEST) as targets are; a word that is not in the vocabulary is unknown."""
    known = {w: k for k, w in enumerate(task.vocabulary, EOS + 1)}
    rows = [[*(known.get(w, UNK) for w in words(text)), EOS] for text in texts]
    return torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows])


def scores(task: Text, answers, truths) -> dict[str, float]:
    return task.metrics(task.image_stats(numbers(task, answers), numbers(task, truths)))


def of_counts(*counts: float) -> list[float]:
    return [float(bleu(torch.tensor([counts], dtype=torch.float64), n)) for n in range(1, ORDERS + 1)]


def own_bleu(answers, truths, order: int) -> float:
    """Of lists of words, as in the paper, where every order has a match."""
    logs = 0.0
    for n in range(1, order + 1):
        found = every = 0
        for answer, truth in zip(answers, truths):
            a, t = (Counter(tuple(x[i:i + n]) for i in range(len(x) - n + 1)) for x in (answer, truth))
            found += sum(min(k, t[gram]) for gram, k in a.items())
            every += sum(a.values())
        logs += math.log(found / every) / order
    c, r = (sum(map(len, x)) for x in (answers, truths))
    return 100 * math.exp(logs + min(0, 1 - r / c))


# ---- BLEU ----

def random_sentences(rng: random.Random) -> tuple[list[list[str]], list[list[str]]]:
    """Answers, some empty or short, beside truths of a few words."""
    truths = [rng.choices("abcdef", k=rng.randint(1, 9)) for _ in range(rng.randint(1, 4))]
    alphabet = rng.choice(["abcdef", "efgh", "gh"])
    answers = [rng.choice([t, t[:2], t[1:], [], rng.choices(alphabet, k=rng.randint(0, 9))]) for t in truths]
    return answers, truths


def test_bleu_equals_sacrebleu():
    """Of random counts, and of the counts of random sentences; 1e-9 because it takes logarithms of percents."""
    score = pytest.importorskip("sacrebleu").metrics.BLEU
    rng, counts, theirs = random.Random(0), [], []
    for _ in range(3000):
        total = sorted((rng.choice([0, 1, 5, 40, rng.randint(0, 200)]) for _ in range(ORDERS)), reverse=True)
        matches = list(itertools.accumulate(total, lambda m, t: rng.randint(0, min(m, t)), initial=total[0]))[1:]
        counts.append([*matches, *total, total[0], rng.randint(1, 250)])
        theirs.append([score.compute_bleu(matches[:n], total[:n], *counts[-1][-2:], smooth_method="exp",
                                          max_ngram_order=n).score for n in range(1, ORDERS + 1)])
    oracles = [score(tokenize="none", smooth_method="exp", max_ngram_order=n, force=True) for n in range(1, ORDERS + 1)]
    for _ in range(500):
        both = random_sentences(rng)
        counts.append([sum(x) for x in zip(*(bleu_counts(tuple(a), tuple(t)) for a, t in zip(*both)))])
        said, true = ([" ".join(x) for x in of_all] for of_all in both)
        theirs.append([oracle.corpus_score(said, [true]).score for oracle in oracles])
    for n in range(1, ORDERS + 1):
        ours = bleu(torch.tensor(counts, dtype=torch.float64), n)
        assert (ours - torch.tensor(theirs, dtype=torch.float64)[:, n - 1]).abs().max() < 1e-9
        assert 100 < (ours > 0).sum() < 3400


@pytest.mark.parametrize("answer,truth,expected", [
    ("", "a b", [0, 0, 0, 0]), ("x y z u v", "a b c d e", [0, 0, 0, 0]), ("a b", "a b", [100, 100, 0, 0]),
    ("a b c d", "a b c d", [100] * 4), ("a a a a", "a b c d", [25, 100 * math.sqrt(1 / 4 / 6),
     100 * (1 / 4 / 6 / 8) ** (1 / 3), 100 * (1 / 4 / 6 / 8 / 8) ** (1 / 4)]),
    ("a b c", "a b c d e f", [100 / math.e] * 3 + [0]),
    ("the cat the cat on the mat", "the cat is on the mat", [
        100 * 5 / 7, 100 * math.sqrt(5 / 7 * 3 / 6), 100 * (5 / 7 * 3 / 6 * 1 / 5) ** (1 / 3),
        100 * (5 / 7 * 3 / 6 * 1 / 5 * 1 / 2 / 4) ** (1 / 4)])])
def test_bleu_by_hand(answer, truth, expected):
    assert of_counts(*bleu_counts(tuple(answer.split()), tuple(truth.split()))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("counts,expected", [
    ((40, 20, 8, 3, 60, 50, 40, 30, 60, 75), [51.920052, 40.2171, 29.315184, 21.046315]),
    ((9, 2, 0, 0, 12, 8, 5, 2, 12, 10), [75.0, 43.30127, 26.566464, 22.002793])])
def test_bleu_as_sacrebleu_has_it(counts, expected):
    assert of_counts(*counts) == pytest.approx(expected, abs=1e-6)


# ---- what a sentence says ----

LEFT = "left eye. few microaneurysms. mild retinopathy."
TRUTHS = [LEFT, "right eye. no retinopathy.", "left eye. hard exudates above, near the fovea. moderate retinopathy."]


def test_slots_by_hand():
    """Truths of 3, 2 and 4 slots. The answers have 2, 3 and none: the last one cannot be read."""
    answers = ["left eye. mild retinopathy.", "left eye. few microaneurysms. no retinopathy.", "left eye. few."]
    m = scores(text_task(*TRUTHS), answers, TRUTHS)
    assert m["slots"] == pytest.approx((2 + 1 + 0) / 9) and m["slots_precision"] == pytest.approx(3 / 5)
    assert m["side"] == pytest.approx(1 / 3) and m["readable"] == pytest.approx(2 / 3)
    assert (m["exact"], m["stutters"], m["different"]) == (0, 0, 3)
    assert m["length_ratio"] == pytest.approx((6 + 9 + 5) / (9 + 6 + 14))
    right = scores(text_task(*TRUTHS), TRUTHS, TRUTHS)
    assert {k: v for k, v in right.items() if v != 1} == {
        "stutters": 0, "different": 3, **{f"bleu{n}": pytest.approx(100) for n in range(1, 5)}}
    twice = scores(text_task(*TRUTHS), ["no retinopathy no retinopathy", *TRUTHS[1:]], TRUTHS)
    assert twice["stutters"] == pytest.approx(1 / 3) and twice["exact"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("text,stuttering", [
    ("", False), ("a", False), ("a a", True), ("a b a b", True), ("a b a", False), ("a b c x b c x d", True),
    ("a b c a b d", False), ("x a b c a b c", True), ("a b b a", True)])
def test_stuttering(text, stuttering):
    assert stutters(tuple(text.split())) == stuttering


def test_an_unknown_word_never_matches():
    """Nobody knows what it is: an answer that says unknown as well has not said it."""
    task = text_task("a b c", "b c d", "e")
    m = scores(task, ["a b drusen", "a b c"], ["a b drusen", "a b c"])
    assert m["exact"] == 0.5 and m["bleu1"] == pytest.approx(100 * 5 / 6)
    rows = numbers(task, ["a drusen b"])
    assert task.words(rows[0]) == ["a", "<unknown>", "b"] and task.text(rows[0]) == "a <unknown> b"
    assert not task.right(task.image_stats(rows, rows)).any()


def test_a_question_mark_is_a_word():
    task = text_task("glaucoma?", "no glaucoma.")
    m = scores(task, ["glaucoma?"], ["glaucoma?"])
    assert m["exact"] == 1 and m["bleu1"] == pytest.approx(100)


def test_other_texts_have_no_slots():
    """Also where their words are all in the grammar, as long as they are no sentences of it."""
    for texts in (["mild haze", "no haze"], ["mild retinopathy", "no retinopathy"]):
        task = text_task(*texts)
        assert not task.grammar and task.primary == "exact" and "slots" not in scores(task, texts, texts)
    assert text_task(*TRUTHS).grammar and text_task(*TRUTHS).primary == "slots" and not Text().grammar


def test_weights_repeat_photographs():
    task, rng = text_task(*TRUTHS, "severe"), random.Random(1)
    truths = rng.choices(TRUTHS, k=12)
    stats = task.image_stats(numbers(task, rng.choices([*TRUTHS, "", "severe eye"], k=12)), numbers(task, truths))
    weights = torch.tensor([[rng.randint(0, 3) for _ in range(12)] for _ in range(20)], dtype=torch.float64)
    weighted = task.compute(stats, weights, {})
    for k, number in enumerate(weights.long()):
        listed = task.metrics(stats.repeat_interleave(number, 0))
        for name, value in listed.items() - {("different", listed["different"])}:
            assert float(weighted[name][k]) == pytest.approx(value, abs=1e-9, nan_ok=True), name


def test_columns():
    task = text_task(*TRUTHS)
    answer, truth = numbers(task, [TRUTHS[1], TRUTHS[0]])
    columns = task.scored_columns(task.image_stats(answer[None], truth[None])[0], {})
    expected = own_bleu([words(TRUTHS[1])], [words(TRUTHS[0])], 1)
    assert (columns["text"], columns["text_true"]) == (TRUTHS[1], TRUTHS[0]) and 0 < columns["text_bleu4"] < expected
    assert task.caption(task.predicted_columns(answer, None, {})) == [f"in words: {TRUTHS[1]}"]


# ---- answers without a network ----

@pytest.mark.parametrize("grammar", [True, False])
def test_the_constant_guess_is_the_best_of_all(grammar):
    texts = [descriptions.describe(synthetic.plan(2, i)) for i in range(30)] if grammar else [
        "u v w x y"] * 3 + [f"a b c {pair}" for pair in ("d e", "d f", "d g", "e f", "f d")]
    task = text_task(*texts)
    guess = task.text(task.constant_guess(numbers(task, texts))[0])

    def worth(constant):
        if grammar:
            said, *there = ({(k, v) for k, v in descriptions.read(t).items() if v} for t in (constant, *texts))
            first = sum(len(said & t) for t in there) / sum(map(len, there))
        else:
            first = texts.count(constant) / len(texts)
        return first, own_bleu([words(constant)] * len(texts), list(map(words, texts)), ORDERS)
    best = max(map(worth, set(texts)))
    assert worth(guess) == pytest.approx(best) and len({worth(t)[0] for t in texts}) > 1


def test_a_random_sentence_is_one_of_training_with_the_predicted_grade():
    """Two grades, whose photographs have one sentence each: what is predicted decides, not what is true."""
    task, grading = text_task(*TRUTHS), TASKS["cls"]
    training = [Record(f"t{i}", Path("x.png"), "train", {"grade": grade}) for i, grade in enumerate((0, 1, 1))]
    learned = numbers(task, [TRUTHS[1], LEFT, LEFT])
    truth = numbers(task, [LEFT, LEFT, TRUTHS[1], TRUTHS[1]])
    predicted = torch.eye(5)[[1, 0, 0, 2]]  # no photograph of training has grade 2: any will do
    names = list("abcd")
    scored = SplitScores([grading, task], {t: names for t in ("cls", "text")}, {
        "cls": grading.image_stats(predicted, torch.tensor([1, 1, 0, 0])), "text": task.image_stats(truth, truth)},
        eyes=dict(zip(names, names)))
    constant, random_one = guesses(task, scored, training, learned).values()
    assert [task.text(row) for row in task.parts(constant.stats["text"])[1].long()] == [LEFT] * 4
    said = [task.text(row) for row in task.parts(random_one.stats["text"])[1].long()]
    assert said[:3] == [LEFT, TRUTHS[1], TRUTHS[1]] and said[3] in (LEFT, TRUTHS[1])
    assert random_one.metrics()["text"]["exact"] in (0.5, 0.75)


# of the 1,200 sentences of training, what constant_guess says always; it tells more than there is, see slots
CONSTANT = ("left eye. many microaneurysms. many haemorrhages in every quadrant. hard exudates above and below, near "
            "the fovea. two soft exudates above and below. new vessels at the disc. proliferative retinopathy.")


def known_answers() -> dict[str, list[str]]:
    """{what answers: its sentences about the test eyes}."""
    training, eyes = (readers.read_series(split, *readers.DRAWN[split]) for split in ("train", "test"))
    most = Counter(r.text for r in training).most_common(1)[0][0]
    said = [facts(synthetic.plan(*r.drawing)) for r in eyes]

    def changed(change):
        return [descriptions.write(f | change(f)) for f in said]
    halves = {"above": "below", "below": "above", "above and below": "above and below", None: None}
    return {"most frequent sentence": [most] * len(said), "best constant": [CONSTANT] * len(said),
            "side always wrong": changed(lambda f: {"side": {"left": "right", "right": "left"}[f["side"]]}),
            "above and below swapped": changed(lambda f: {k: halves[f[k]] for k in ("hard_exudates", "soft_half")}),
            "no rare sign ever": changed(lambda f: dict.fromkeys(("beading", "shunts", "new_vessels"))),
            "all right": changed(lambda f: {})}


def known_rows():
    """What answers without a network score on the 300 drawn test eyes: name, BLEU-1, BLEU-4, slots, exact."""
    texts = [[r.text for r in readers.read_series(split, *readers.DRAWN[split])] for split in ("train", "test")]
    task = text_task(*texts[0])
    for name, answers in known_answers().items():
        m = scores(task, answers, texts[1])
        yield name, m["bleu1"], m["bleu4"], m["slots"], m["exact"]


def test_known_answers():
    """The numbers that docs tell; and each of them in another way, slots from what the eyes have."""
    found = {name: values for name, *values in known_rows()}
    assert {name: [round(v, 1) for v in values[:2]] + [round(v, 2) for v in values[2:]]
            for name, values in found.items()} == {
        "most frequent sentence": [9.8, 4.8, 0.13, 0.1], "best constant": [41.1, 28.2, 0.48, 0],
        "side always wrong": [94.6, 94.1, 0.82, 0], "above and below swapped": [98.2, 94.5, 0.93, 0.68],
        "no rare sign ever": [90.5, 89.0, 0.94, 0.68], "all right": [100, 100, 1, 1]}
    eyes = [synthetic.plan(*r.drawing) for r in readers.read_series("test", *readers.DRAWN["test"])]
    there = [{(k, v) for k, v in facts(eye).items() if v} for eye in eyes]
    for name, answers in known_answers().items():
        said = [set(descriptions.read(answer).items()) for answer in answers]
        truths = [descriptions.describe(eye) for eye in eyes]
        pairs = [[words(text) for text in texts] for texts in (answers, truths)]
        assert found[name] == pytest.approx([
            own_bleu(*pairs, 1), own_bleu(*pairs, 4), sum(len(a & t) for a, t in zip(said, there)) /
            sum(map(len, there)), sum(a == t for a, t in zip(answers, truths)) / 300]), name


@pytest.mark.slow
def test_the_best_constant_of_training():
    texts = [r.text for r in readers.read_series("train", *readers.DRAWN["train"])]
    task = text_task(*texts)
    assert task.text(task.constant_guess(numbers(task, texts))[0]) == CONSTANT
