"""The heads that answer with sentences: attention against torch's own, what each word may see, greedy answers."""

import math

import pytest
import torch
import torch.nn.functional as F

import model
from model import BOS, EOS, LONGEST, PAD, TEXT_HEADS, Attention, FeatureSpec, GRUTextHead, Net, NetConfig, TextHead
from retina.datasets import readers
from retina.datasets.cache import cached_sample, ensure_cached
from tasks import TASKS, Text, make_tasks


SPEC, WORDS = FeatureSpec((8, 8, 16, 16, 32), 4), 12  # channels; words with numbers below EOS + 1 included
BOTH = pytest.mark.parametrize("head", [TextHead, GRUTextHead])


def maps_of(n: int, spec: FeatureSpec = SPEC, side: int = 64, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(n, c, side // 2 ** i, side // 2 ** i) for i, c in enumerate(spec.channels, 1)]


def sentences(n: int, seed: int = 0) -> torch.Tensor:
    """(n, LONGEST) random words, 2 to 9 of them, then the end, then nothing."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(EOS + 1, WORDS, (n, LONGEST), generator=generator)
    lengths, places = torch.randint(2, 10, (n, 1), generator=generator), torch.arange(LONGEST)
    return torch.where(places < lengths, words, torch.where(places == lengths, EOS, PAD))


def make(head, spec: FeatureSpec = SPEC) -> TextHead:
    torch.manual_seed(1)
    return head(spec, WORDS).eval()


# ---- parts ----

def test_sinusoids_equal_their_formula():
    places, width = [0, 1, 2.5, 63], 8
    expected = [[f(p / 10000 ** (2 * i / width)) for f in (math.sin, math.cos) for i in range(4)] for p in places]
    assert torch.allclose(model.sinusoids(torch.tensor(places), width), torch.tensor(expected), atol=1e-6)
    assert model.sinusoids(torch.zeros(2, 3), 6).shape == (2, 3, 6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch(causal):
    torch.manual_seed(0)
    ours, oracle = Attention(24, 4).double(), torch.nn.MultiheadAttention(24, 4, batch_first=True).double()
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        oracle.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        oracle.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    places = x if causal else torch.randn(3, 11, 24, dtype=torch.float64)
    keys, values = ours.remember(places)
    y, weights = ours(x, keys, values, causal)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected = oracle(x, places, places, attn_mask=mask, average_attn_weights=False)
    for mine, theirs in zip((y, weights), expected):
        assert torch.allclose(mine, theirs, atol=1e-10, rtol=0)
    fused = F.scaled_dot_product_attention(ours.split(ours.query(x)), keys, values, is_causal=causal)
    assert torch.allclose(y, ours.out(fused.transpose(1, 2).flatten(2)), atol=1e-10, rtol=0)
    assert torch.allclose(weights.sum(3), torch.ones(3, 4, 7, dtype=torch.float64), atol=1e-12)


# ---- what is seen ----

@BOTH
def test_no_word_is_scored_by_itself_or_later_ones(head):
    """A change of word t changes scores at places after t alone, and these it does change."""
    head, maps, target = make(head), maps_of(2), sentences(2)
    target[:, :30] = torch.randint(EOS + 1, WORDS, (2, 30))
    with torch.no_grad():
        before = head(maps, target)[:, 0]
        for t in (0, 3, 28):
            other = target.clone()
            other[:, t] = (other[:, t] - EOS) % (WORDS - EOS - 1) + EOS + 1
            gap = (head(maps, other)[:, 0] - before).abs().amax((0, 2))
            assert (other[:, t] != target[:, t]).all() and gap[:t + 1].max() < 1e-5 < 1e-3 < gap[t + 1]


@BOTH
def test_what_the_photograph_shows_counts(head):
    head, target = make(head), sentences(2)
    with torch.no_grad():
        a, b = (head(maps_of(2, seed=k), target) for k in (0, 1))
    assert (a - b)[:, 0].abs().max() > 1e-2 and (a - b)[0, 0, 0].abs().max() > 1e-3  # the first word's scores, too


def test_the_transformer_sees_where_something_is():
    """The same content at other places gives other scores; to the control without places it is the same photograph."""
    maps, target = maps_of(1), sentences(1)
    for axis in (2, 3):
        moved = [m.flip(axis) for m in maps]
        with torch.no_grad():
            gaps = {head: float((make(head)(maps, target) - make(head)(moved, target))[:, 0].abs().max())
                    for head in (TextHead, GRUTextHead)}
        assert gaps[TextHead] > 1e-2 and gaps[GRUTextHead] < 1e-5


def test_places_of_all_maps_are_in_the_same_unit():
    """Sine and cosine of the middles of cells, rows first, in 64ths of the side; their first frequency is 1."""
    head = make(TextHead)
    head.norm_maps, head.blocks[0].photograph.remember = torch.nn.Identity(), lambda places: places
    places = head.look([torch.zeros(1, 128, n, n) for n in (16, 8, 4, 2)])[0]
    fine, middle, coarse = places.split([64, 16, 4], 1)  # (1, h*w, W) of strides 8, 16, 32; the finest is left out
    for n, places in ((8, fine), (4, middle), (2, coarse)):
        angle = torch.atan2(places[0, :, 0], places[0, :, 32]).view(n, n) % (2 * math.pi)
        expected = ((torch.arange(n) + 0.5) * 64 / n) % (2 * math.pi)
        assert torch.allclose(angle, expected[:, None].expand(n, n), atol=1e-4)  # rows
        angle = torch.atan2(places[0, :, 64], places[0, :, 96]).view(n, n) % (2 * math.pi)
        assert torch.allclose(angle, expected.expand(n, n), atol=1e-4)  # columns


# ---- answers ----

@BOTH
def test_shapes(head):
    head, target = make(head), sentences(3)
    longest = int((target != PAD).sum(1).max())
    assert head(maps_of(3), target).shape == (3, 2, LONGEST, WORDS)
    assert head(maps_of(3)).shape == (3, 1, LONGEST, WORDS)
    assert head.train()(maps_of(3), target).shape == (3, 1, longest, WORDS)
    assert head(maps_of(3)).shape == (3, 1, LONGEST, WORDS)


@BOTH
def test_a_process_may_have_no_photograph(head):
    head, none = make(head), torch.zeros(0, LONGEST, dtype=torch.int64)
    assert head(maps_of(0), none).shape == (0, 2, LONGEST, WORDS) and head(maps_of(0)).shape == (0, 1, LONGEST, WORDS)
    maps = [m.requires_grad_() for m in maps_of(0)]
    output = head.train()(maps, none)
    assert output.shape == (0, 1, 1, WORDS)
    loss = Text().loss(output, none)
    loss.backward()
    assert loss.detach() == 0 and all((p.grad == 0).all() for p in head.parameters())


@BOTH
def test_greedy_answers_are_the_best_words_after_the_best_words(head):
    """Guided along its own answer, the head has the same scores, and the word of each place is the best one."""
    head, maps, task = make(head), maps_of(4), Text()
    # scores are products with the embedding, which without training would repeat the last word for ever
    head.norm = torch.nn.Sequential(head.norm, torch.nn.Linear(128, 128))
    for p in head.gru.parameters() if hasattr(head, "gru") else ():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        answer = task.decode(head(maps))
        guided, free = head(maps, answer).unbind(1)
    here = answer != PAD
    assert torch.allclose(guided[here], free[here], atol=1e-5)
    assert torch.equal(guided[here][:, EOS:].argmax(1) + EOS, answer[here]) and len(answer.unique()) > 4
    assert torch.equal(task.decode(torch.stack([guided.roll(1, 0), free], 1)), answer)  # the last, R = 2, is decoded


def test_a_greedy_answer_ends_at_its_end_and_never_says_what_is_no_word(monkeypatch):
    """Scores by hand: nothing, begin and unknown score best, and are not said; the second sentence never ends."""
    scripts = torch.tensor([[5, 6, EOS, 7, 7, 7, 7, 7], [4, EOS, 8, 8, 8, 8, 8, 8], [9] * 8])
    monkeypatch.setattr(model, "LONGEST", 8)
    head = make(TextHead)

    def next_words(word, begin, seen, past):
        said.append(word[:, 0].tolist())
        scores = F.one_hot(scripts[:len(word), len(said) - 1, None], WORDS).float()
        scores[..., :EOS] = 9
        return scores, len(said)
    head.next_words, said = next_words, []
    output = head(maps_of(3))
    assert Text().decode(output).tolist() == [[5, 6, EOS, *[PAD] * 5], [4, EOS, *[PAD] * 6], [9] * 8]
    assert len(said) == 8 and said[0] == [BOS] * 3 and [words[0] for words in said[1:4]] == [5, 6, EOS]
    said.clear()
    assert head(maps_of(2)).shape == (2, 1, 8, WORDS) and len(said) == 3  # both have ended
    said.clear()
    assert Text().decode(head(maps_of(2))).tolist() == [[5, 6, EOS, *[PAD] * 5], [4, EOS, *[PAD] * 6]]


# ---- in the network ----

@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("moe_at", model.MOE_PLACES)
@pytest.mark.parametrize("decoder", TEXT_HEADS)
def test_every_weight_learns(decoder, moe_at):
    torch.manual_seed(0)
    tasks = make_tasks(["text"], {"text": list("abcdefgh")})
    net = Net(NetConfig(text_decoder=decoder, moe_at=moe_at, num_experts=2, stochastic_depth=0), tasks)
    assert type(net.heads["text"]) is TEXT_HEADS[decoder]
    images, target = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), sentences(4)
    output = net(images, targets={"text": target})[0]["text"]
    tasks[0].loss(output, target).backward()
    head = dict(net.heads["text"].named_parameters())
    # the bias of keys adds the same to all scores of a word, and softmax does not see it
    assert all(p.grad.abs().max() > 1e-7 for name, p in head.items() if not name.endswith("key.bias"))
    assert len(head) > 8 and all(p.grad is not None for p in net.encoder.features[0].parameters())


@pytest.mark.usefixtures("shallow")
def test_targets_guide_sentences_and_nothing_else():
    torch.manual_seed(0)
    tasks = [TASKS["cls"], *make_tasks(["text"], {"text": list("abcdefgh")})]
    net = Net(NetConfig(num_experts=2), tasks).eval()
    images, target = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), sentences(2)
    indices = {"cls": torch.arange(4), "text": torch.tensor([1, 3])}
    with torch.no_grad():
        free = net(images, indices)[0]
        guided = net(images, indices, {"text": target, "cls": torch.zeros(4)})[0]
    assert torch.equal(free["cls"], guided["cls"])
    assert free["text"].shape == (2, 1, LONGEST, WORDS) and guided["text"].shape == (2, 2, LONGEST, WORDS)
    assert torch.equal(free["text"][:, 0], guided["text"][:, 1])


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder", TEXT_HEADS)
def test_six_sentences_are_learned_by_heart(decoder):
    """Its free answers, and those of the control, are in the end those of six drawn photographs."""
    torch.manual_seed(0)
    records = [r for r in readers.read_series("train", 0, 40) if r.text.count(".") > 3][:6]
    samples = [cached_sample(r, path, 64) for r, path in zip(records, ensure_cached(records, 64))]
    vocabulary = sorted({w for r in records for w in r.text.replace(".", " .").replace(",", " ,").split()})
    task, = make_tasks(["text"], {"text": vocabulary})
    net = Net(NetConfig(text_decoder=decoder, num_experts=0, stochastic_depth=0), [task])
    images, target = torch.stack([s.image for s in samples]), torch.stack([task.target(s) for s in samples])
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    for _ in range(300):  # about 60 suffice for the one, 80 for the other
        optimizer.zero_grad()
        loss = task.loss(net(images, targets={"text": target})[0]["text"], target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if loss.detach() < 0.002:
            break
    with torch.no_grad():
        for _ in range(30):  # the norms' running averages lag behind weights that change so fast
            net(images, targets={"text": target})
        answer = task.answer(net.eval()(images)[0]["text"])
    assert [task.text(words) for words in answer] == [r.text for r in records]
    assert len({r.text for r in records}) == 6
