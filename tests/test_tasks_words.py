"""Fine classes, signs and sentences: targets, losses and answers by hand; a batch that several processes share."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import EOS, LONGEST, PAD, UNK, FeatureSpec
from retina.datasets.records import DataSet, Record
from tasks import TASKS, Fine, Signs, Text, make_tasks


NAMES = {"fine": ["2", "10", "x"], "broad": ["0", "2", "2"], "signs": ["drusen", "haze"], "text": ["a", "b", "."]}
FINE, SIGNS, TEXT = make_tasks(["fine", "signs", "text"], NAMES)
A, B, DOT = range(EOS + 1, EOS + 4)


def record(**labels) -> Record:
    return Record("x", None, labels=labels)


# ---- what the data set's names make of tasks ----

def test_tasks_take_the_names_of_the_data_set():
    assert (type(FINE), type(SIGNS), type(TEXT)) == (Fine, Signs, Text)
    assert FINE.names == ("2", "10", "x") and FINE.classes == 3 and FINE.broad == ("0", "2", "2")
    assert SIGNS.classes == ("drusen", "haze") and TEXT.vocabulary == ("a", "b", ".")
    assert make_tasks(["fine"], {"fine": ["a", "b"]})[0].broad == ()
    again, = make_tasks(["fine"], {"fine": ["a"]})
    assert again.classes == 1 and FINE.classes == 3 and TASKS["fine"].classes == 0  # each has its own
    assert make_tasks(["cls", "fine"], NAMES)[0] is TASKS["cls"]
    names = DataSet([record(fine="b", grade=1, signs={"s": 0}), record(fine="a", grade=1)]).names(
        ["signs", "fine", "grade", "text"])
    assert names == {"fine": ["a", "b"], "signs": ["s"], "broad": ["1", "1"]}


def test_heads_answer_for_each_class_sign_and_word():
    spec = FeatureSpec((8, 8, 16, 16, 32), 4)
    maps = [torch.randn(2, c, 32 // 2 ** i, 32 // 2 ** i) for i, c in enumerate(spec.channels)]
    for task, shape in ((FINE, (2, 3)), (SIGNS, (2, 2)), (TEXT, (2, 1, LONGEST, EOS + 1 + 3))):
        assert task.head(spec).eval()(maps).shape == shape


# ---- targets ----

def test_targets_by_hand():
    assert [int(FINE.target(record(fine=name))) for name in NAMES["fine"]] == [0, 1, 2]
    assert SIGNS.target(record(signs={"haze": 1, "unheard of": 1})).nan_to_num(-1).tolist() == [-1, 1]
    assert SIGNS.target(record(signs={"drusen": 0, "haze": 1})).tolist() == [0, 1]
    target = TEXT.target(record(text="A drusen b."))
    assert target.shape == (LONGEST,) and target.tolist() == [A, UNK, B, DOT, EOS] + [PAD] * (LONGEST - 5)


@pytest.mark.parametrize("number", [1, LONGEST - 1, LONGEST, 200])
def test_a_long_text_is_cut_off_and_has_an_end(number):
    kept = min(number, LONGEST - 1)
    target = TEXT.target(record(text="a " * number))
    assert target.tolist() == [A] * kept + [EOS] + [PAD] * (LONGEST - 1 - kept)


# ---- losses ----

def test_the_loss_of_sentences_by_hand():
    """Words of certain probabilities, an end, and nothing after it: the mean is over five words, not two sentences."""
    p = torch.full((2, 4, 7), 0.1)
    target = torch.tensor([[A, UNK, EOS, PAD], [B, EOS, PAD, PAD]])
    chances = [[0.5, 0.25, 0.125, 0.9], [0.2, 0.4, 0.9, 0.9]]
    for row, words in enumerate(chances):
        for place, chance in enumerate(words):
            p[row, place] = (1 - chance) / 6
            p[row, place, target[row, place]] = chance
    expected = -sum(map(math.log, (0.5, 0.25, 0.125, 0.2, 0.4))) / 5
    output = p.log()[:, None].requires_grad_()
    loss = TEXT.loss(output, F.pad(target, (0, LONGEST - 4), value=PAD))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert (output.grad[target[:, None] == PAD] == 0).all() and (output.grad[target[:, None] != PAD] != 0).any(1).all()
    two = torch.stack([p.log(), torch.randn(2, 4, 7)], 1)  # in evaluation; the free answer has no loss
    assert TEXT.loss(two, F.pad(target, (0, 9), value=PAD)).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_signs_ignores_what_is_unknown():
    output, target = torch.tensor([[0.0, 2.0], [-1.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, math.nan]])
    expected = (math.log(2) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(-1))) / 3
    for unknown in (5.0, -70.0):
        output[1, 1] = unknown
        assert float(SIGNS.loss(output, target)) == pytest.approx(expected, rel=1e-6)
    nothing = output.clone().requires_grad_()
    SIGNS.loss(nothing, torch.full((2, 2), math.nan)).backward()
    assert (nothing.grad == 0).all()


def cases():
    """{task: output, target} of 8 photographs in double precision."""
    torch.manual_seed(0)
    signs = torch.randint(2, (8, 2)).double()
    signs[1, 0] = signs[4] = math.nan
    texts = torch.stack([TEXT.target(record(text="a b . " * k + "a" * (k % 2))) for k in range(1, 9)])
    return {FINE: (torch.randn(8, 3).double(), torch.randint(3, (8,))), SIGNS: (torch.randn(8, 2).double(), signs),
            TEXT: (torch.randn(8, 1, LONGEST, 7).double(), texts)}


@pytest.mark.parametrize("task", [FINE, SIGNS, TEXT], ids=lambda task: task.name)
def test_processes_that_share_a_batch_have_its_loss(task):
    """8 photographs as 3, 5 and none, and as three processes see them that add what they are asked to add."""
    output, target = cases()[task]
    whole = output.clone().requires_grad_()
    expected = task.loss(whole, target)
    expected.backward()
    shares = [slice(0, 3), slice(3, 8), slice(8, 8)]
    asked = []  # of each process, in turn, what it adds up
    for share in shares:
        values = []
        task.loss(output[share], target[share], lambda x, values=values: values.append(x) or x)
        asked.append(values)
    totals = [sum(x) for x in zip(*asked)]
    for share, own_values in zip(shares, asked):
        part, left = output[share].clone().requires_grad_(), iter(zip(totals, own_values))

        def all_reduce_sum(x, left=left):
            total, own = next(left)
            return x + (total - own)
        loss = task.loss(part, target[share], all_reduce_sum)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        assert torch.allclose(part.grad, whole.grad[share], atol=1e-12, rtol=0)


# ---- answers ----

def test_sentences_are_decoded_up_to_the_first_end():
    """The best word of each place, never one that is none; the last of several answers counts."""
    said = torch.tensor([[A, B, EOS, A, EOS, B], [EOS] * 6, [A] * 6, [B, A, B, A, B, EOS]])
    scores = F.one_hot(said, 7).float()
    scores[..., [PAD, UNK, 1]] = 5
    output = torch.stack([torch.randn(4, 6, 7), scores], 1)
    assert TEXT.decode(output).tolist() == [[A, B, EOS, PAD, PAD, PAD], [EOS, *[PAD] * 5], [A] * 6,
                                            [B, A, B, A, B, EOS]]
    assert TEXT.decode(output[:0]).shape == (0, 6)


def test_targets_are_their_own_answers():
    texts = ["a b.", "b", "." * 70, "a b a b"]
    targets = torch.stack([TEXT.target(record(text=t)) for t in texts])
    assert torch.equal(TEXT.decode(F.one_hot(targets, 7).float()[:, None]), targets)
    assert [TEXT.text(t) for t in targets] == ["a b.", "b", "." + "." * 62, "a b a b"]


def test_classes_and_signs_are_answered_with_probabilities():
    output = torch.tensor([[0.0, math.log(3)]])
    assert SIGNS.decode(output)[0].tolist() == pytest.approx([0.5, 0.75])
    assert make_tasks(["fine"], {"fine": ["a", "b"]})[0].decode(output)[0].tolist() == pytest.approx([0.25, 0.75])
