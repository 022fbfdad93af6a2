"""The figure of sentences: which words are marked, which are looked at, and that heat lies where the weight does."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import model
from conftest import TINY
from retina import drawing
from retina.datasets import descriptions
from retina.figures import sentences
from retina.figures.internals import heat
from tasks import Text, build_net


WORDS = sorted(descriptions.GRAMMAR_WORDS)
DEVICE = torch.device("cpu")


def numbers(task: Text, said: str) -> torch.Tensor:
    return task.target(type("Sample", (), {"text": said}))


# ---- words ----

@pytest.mark.parametrize("said,true,wrong,missed", [
    ("left eye. no retinopathy.", "left eye. no retinopathy.", "", ""),
    ("left eye. few microaneurysms. mild retinopathy.", "right eye. several microaneurysms. mild retinopathy.",
     "left few", "right several"),
    ("left eye. many haemorrhages. severe retinopathy.",
     "left eye. many haemorrhages in every quadrant. severe retinopathy.", "", "in every quadrant."),
    ("left eye. one soft exudate below. new vessels elsewhere. proliferative retinopathy.",
     "left eye. two soft exudates above and below. moderate retinopathy.",
     "one below. new vessels elsewhere. proliferative", "two above and below. moderate"),
    ("right eye. hard exudates above, near the fovea. mild retinopathy.",
     "right eye. hard exudates above, far from the fovea. mild retinopathy.", "near", "far from"),
    ("right eye. hard exudates above, near the fovea. beaded veins in two quadrants. severe retinopathy.",
     "right eye. few microaneurysms. few haemorrhages. beaded veins in three quadrants. severe retinopathy.",
     "hard exudates above, near the fovea. two", "few microaneurysms. few haemorrhages. three")])
def test_slots_that_differ_are_marked_and_findings_that_are_not_there(said, true, wrong, missed):
    for one, other, expected in ((said, true, wrong), (true, said, missed)):
        parts = sentences.marked(one, other)
        assert " ".join(word for word, _ in parts) == one
        assert " ".join(word for word, there in parts if there) == expected


@pytest.mark.parametrize("said,true,wrong,missed", [
    ("Large drusen, and drusen.", "drusen and an epiretinal membrane.", "Large drusen.", "an epiretinal membrane."),
    ("left eye eye. no retinopathy.", "left eye. mild retinopathy.", "eye. no", "mild"),  # no sentence of the grammar
    ("", "normal fundus", "", "normal fundus"), ("a - b", "a b", "", "")])
def test_without_a_grammar_words_are_marked(said, true, wrong, missed):
    for one, other, expected in ((said, true, wrong), (true, said, missed)):
        assert " ".join(word for word, there in sentences.marked(one, other) if there) == expected


def test_words_that_tell_something():
    task = Text({"text": WORDS})

    def told(said):
        answer = numbers(task, said)
        return [sentences.quoted(task.words(answer), at) for at in sentences.told_words(task, answer)]

    assert told("left eye. no retinopathy.") == ['"left" eye', '"no" retinopathy']
    assert told("left eye. many haemorrhages in every quadrant. severe retinopathy.") == [
        '"left" eye', '"many" haemorrhages in every quadrant', '"severe" retinopathy']
    assert told("right eye. few microaneurysms. hard exudates above and below, near the fovea. two soft exudates "
                "above. new vessels at the disc. proliferative retinopathy.") == [
        '"right" eye', 'hard exudates "above" and below', 'new vessels "at" the disc']
    common_first = Text({"text": ["with", ".", ",", "drusen", "membrane", "epiretinal", "haze"]})
    answer = numbers(common_first, "drusen with epiretinal membrane, with haze.")
    assert [sentences.quoted(common_first.words(answer), at) for at in sentences.told_words(common_first, answer)] == [
        'drusen with "epiretinal" membrane', 'drusen with epiretinal "membrane"', 'with "haze"']


def test_only_words_nearby_are_quoted():
    assert sentences.quoted(list("abcdefghij"), 5) == 'b c d e "f" g h i j'
    assert sentences.quoted(["a", ",", "b", "c", ".", "d"], 2) == '"b" c'


def test_a_sentence_without_words_is_said():
    empty, other = (sentences.paragraph("", parts, sentences.WRONG, 100) for parts in ([], [("(nothing)", False)]))
    assert empty.tobytes() == other.tobytes()


def test_marked_words_lie_on_coloured_paper():
    picture = np.asarray(sentences.paragraph("", [("plain", False), ("marked", True)], sentences.WRONG, 400))
    coloured = (picture == sentences.WRONG).all(2).any(0).nonzero()[0]
    first = drawing.text("plain").width
    assert first < coloured[0] < first + 6 and len(coloured) == drawing.text("marked").width


def test_answers_are_ranked_by_right_slots_then_by_wrong_ones():
    task, true = Text({"text": WORDS}), "left eye. few microaneurysms. few haemorrhages. moderate retinopathy."
    answers = [true, "left eye. few microaneurysms. few haemorrhages. shunt vessels. moderate retinopathy.",
               "left eye. few microaneurysms. moderate retinopathy.", "right eye. no retinopathy.", "left left eye."]
    truth = numbers(task, true)[None].expand(5, -1)
    stats = task.image_stats(torch.stack([numbers(task, said) for said in answers]), truth)
    values, said = zip(*(sentences.judged(task, row) for row in stats))
    assert list(values) == sorted(values, reverse=True) and [v[0] for v in values] == [1, 1, 0.75, 0, 0]
    assert said[:4] == ("4 of 4 slots right, 0 wrong", "4 of 4 slots right, 1 wrong", "3 of 4 slots right, 0 wrong",
                        "0 of 4 slots right, 2 wrong") and "no sentence of the grammar" in said[4]
    free = Text({"text": [*WORDS, "drusen"]})
    stats = free.image_stats(*(numbers(free, true)[None] for _ in range(2)))
    assert sentences.judged(free, stats[0]) == ((pytest.approx(100),), "BLEU-4 100.0")


# ---- where it looks ----

@pytest.fixture(params=[{}, {"moe_at": "decoder"}], ids=["bottleneck", "decoder"])
def net(request, shallow):
    torch.manual_seed(0)
    net, (task,) = build_net(asdict(replace(TINY, tasks=("text",), names={"text": WORDS}, **request.param)))
    return net.eval(), task, torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)


@torch.no_grad()
def places_of(net, image, changed=None):
    """What the head's blocks look at, (M, W), with one position of one map `changed`; sizes of its maps."""
    head, found, sizes = net.heads["text"], [], []
    hooks = [head.norm_maps.register_forward_hook(lambda _, __, x: found.append(x[0]))]

    def change(i, x):
        sizes.append(x.shape[2:])
        if changed is not None and changed[0] == i:
            x = x.clone()
            x[:, 0, changed[1], changed[2]] += 50
        return x

    hooks += [conv.register_forward_hook(lambda _, __, x, i=i: change(i, x)) for i, conv in enumerate(head.laterals)]
    net(image[None])
    for hook in hooks:
        hook.remove()
    return found[0], sizes


def test_a_weight_on_one_place_lies_where_the_network_has_it(net):
    """One position of a map is changed; the place that follows gets all the weight, and lights that position."""
    net, _, image = net
    plain, sizes = places_of(net, image)
    first = len(sizes) > 1  # the finest map then has no places of its own
    for i, (y, x) in ((i, at) for i in range(first, len(sizes)) for at in ((0, 1), (1, 0))):
        other, _ = places_of(net, image, (i, y, x))
        place, = (plain != other).any(1).nonzero()[:, 0].tolist()
        maps = sentences.on_maps(torch.eye(len(plain))[[0, place]], sizes)
        assert [m.shape[1:] for m in maps] == sizes[first:]
        assert [m[1].nonzero().tolist() for m in maps] == [[[y, x]] if k == i else [] for k in range(first, len(sizes))]
        lit = heat([m[1] for m in maps], 64)
        cell = 64 // sizes[i][0]
        at = int(lit.argmax())
        assert (at // 64 // cell, at % 64 // cell) == (y, x)


def test_weights_are_those_of_one_pass_over_the_answer(net):
    net, task, image = net
    answer, maps = sentences.look(net, task, image, DEVICE)
    head, found = net.heads["text"], []
    assert not any(m._forward_hooks for m in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(answer, task.answer(net(image[None])[0]["text"])[0])
        block = head.blocks[-1].photograph
        hook = block.register_forward_hook(lambda _, __, both: found.append(both[1][0].mean(0)))
        net(image[None], targets={"text": answer[None]})
        hook.remove()
    weights = found[0]  # of the true words, which are the answer's own
    length = int((answer != model.PAD).sum())
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    torch.testing.assert_close(flat[:length], weights[:length], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flat.sum(1), torch.ones(len(flat)))


def test_a_head_without_attention_has_no_weights(shallow):
    net, (task,) = build_net(asdict(replace(TINY, tasks=("text",), names={"text": WORDS}, text_decoder="gru")))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    answer, maps = sentences.look(net.eval(), task, image, DEVICE)
    assert maps == [] and torch.equal(answer, task.answer(net(image[None])[0]["text"])[0])
