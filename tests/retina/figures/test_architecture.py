"""The figure of the network: its numbers against a forward pass, its boxes and arrows against each other."""

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import model
from conftest import TINY
from retina import drawing
from retina.figures import architecture
from retina.training import precision
from tasks import TASKS, build_net


ALL = ("cls", "dme", "seg", "loc")
NAMES = {"fine": [f"class {k}" for k in range(40)], "signs": ["haemorrhages", "drusen"], "text": ["left", "right"]}
NETS = [{}, {"moe_at": "decoder"}, {"num_experts": 0}, {"moe_at": "decoder", "num_experts": 0}, {"encoder": "b2"},
        {"encoder": "b2", "moe_at": "decoder", "tasks": ("dme", "loc")}, {"tasks": ("seg",)}, {"tasks": ("cls", "seg")},
        {"tasks": ("loc",), "moe_at": "decoder"}, {"tasks": ("cls",), "num_experts": 40, "top_k": 1},
        {"router": "shared", "num_experts": 5, "top_k": 3}, {"router": "private", "num_experts": 8},
        {"router": "random"}, {"tasks": tuple(TASKS)}, {"tasks": tuple(TASKS), "moe_at": "decoder", "num_experts": 12},
        {"tasks": ("text",), "text_decoder": "gru"}]


@pytest.fixture(params=NETS, scope="module",
                ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items()) or "default")
def net(request):
    """With one block in each stage of the encoder: shapes do not depend on its depth."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "STAGES", [(*stage[:-1], 1) for stage in model.STAGES])
        return build_net(asdict(replace(TINY, names=NAMES, **{"tasks": ALL, **request.param})))[0]


@pytest.fixture(scope="module")
def folded(net):
    """The picture of the network with norms in its convolutions."""
    return architecture.diagram(precision.fuse_conv_bn(net.eval()), 64)


def climbed(decoder, maps):
    """{stride: map} of a decoder for photographs of 64 pixels."""
    *skips, x = maps
    found = {}
    for block, skip in zip(decoder.blocks, [*skips[::-1], None]):
        x = block(x, skip)
        found[64 // x.shape[2]] = x
    return found


@torch.inference_mode()
def shapes(net):
    """{name of a box: the shape that a forward pass of three photographs shows}; each task has two of them."""
    net.eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    indices = {t: torch.tensor([i % 2, 2]) for i, t in enumerate(net.heads)}
    maps = net.encoder((images - net.mean) / net.std)
    routed, routing = net.routed_maps(images, indices)
    outputs, _ = net(images, indices)
    found = {f"encoder {64 // x.shape[2]}": x for x in maps}
    if net.decoder is not None:
        found |= {f"decoder {stride}": x for stride, x in climbed(net.decoder, maps).items()}
    for t, head in net.heads.items():
        found |= {f"own {t}": routed[t][net.routed], f"head {t}": outputs[t]}
        if t == "seg":
            found |= {f"seg decoder {s}": x for s, x in climbed(head.decoder, routed[t][:net.routed + 1]).items()}
    return {name: x.shape for name, x in found.items()}, routing


def test_numbers_are_those_of_a_forward_pass(net):
    lines = architecture.labels(net, 64)
    found, routing = shapes(net)
    for name, (n, *sizes) in found.items():
        assert n == (3 if name.startswith(("encoder", "decoder")) else 2)
        who = "B" if n == 3 else f"n_{(set(name.split()) & set(TASKS)).pop()}"
        if name == "head text":  # one sentence of at most so many words, each with a score
            assert sizes == [1, model.LONGEST, model.EOS + 1 + len(NAMES["text"])]
            sizes = sizes[1:]
        elif name.startswith("head") and len(sizes) == 3:
            sizes[1:] = [{64: side, 8: f"{side}/8"}[length] for side, length in zip("HW", sizes[1:])]
        assert " ".join(lines[name]).count(f"({', '.join([who, *map(str, sizes)])})") == 1
    numbered = {name for name in lines if name.split()[-1].isdigit() or name.startswith(("own ", "head "))}
    assert numbered == set(found)
    for name in numbered:
        assert not name.startswith("encoder") or lines[name][0].startswith(f"stride {name.split()[1]}: ")
    assert {name for name in lines if name.startswith("router ")} == {f"router {t}" for t in routing}
    for t, r in routing.items():
        (_, k), number = r.experts.shape, r.load.shape[1]
        assert lines[f"router {t}"][1] == f"n_{t} x {len(r.experts) // 2} tokens"
        assert lines["experts"] == [f"mixture of {number} experts,", f"{k} for each token"]


def test_heads_say_what_they_read(net):
    """A map of nan that a head reads spoils its answer, and no other does."""
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        routed, _ = net.eval().routed_maps(images)
        for t, head in net.heads.items():
            full = [x if x is not None else torch.zeros(()) for x in routed[t]]
            spoilt = [i for i in range(5) if not head([x * torch.nan if i == j else x
                                                       for j, x in enumerate(full)]).isfinite().all()]
            strides = ", ".join(str(2 ** (i + 1)) for i in spoilt)
            assert architecture.labels(net, 64)[f"head {t}"][1] == f"strides read: {strides}"


def test_words_of_routers():
    def words(**change):
        lines = architecture.labels(build_net(asdict(replace(TINY, tasks=ALL, **change)))[0], 64)
        return " ".join(lines["routers"] + lines["gate"]), bool(lines["loss"])

    learned, told = words()
    assert "noisy top-2 router of each task" in learned and "softmax over the 2 largest of  u W_gate + N" in learned
    assert told and words(router="shared")[0].startswith("noisy top-2 router for all tasks")
    assert "g = the largest of  softmax(u W_gate + N(0, 1)" in words(top_k=1)[0]
    frozen, told = words(router="random")
    assert frozen.startswith("frozen random") and "N(0" not in frozen and not told
    fixed, told = words(router="uniform", top_k=4)
    assert fixed.startswith("fixed router of each task") and fixed.endswith("g = 1/4 each") and not told


def test_nothing_overlaps_and_nothing_is_cut_off(net, folded):
    made, picture = architecture.Layout(net, 64), folded
    assert {name for name, lines in made.lines.items() if lines} - set(made.boxes) <= {"decoder", "skips", "shared"}
    for box in made.boxes.values():
        assert 0 <= box.left < box.right <= picture.width and 0 <= box.top < box.bottom <= picture.height
        assert all(drawing.font(architecture.LETTERS).getlength(line) < box.right - box.left for line in box.lines)
        assert round(1.35 * architecture.LETTERS) * len(box.lines) <= box.bottom - box.top
    for (one, a), (two, b) in itertools.combinations(made.boxes.items(), 2):
        assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top, (one, two)
    for _, points, _ in made.arrows:
        assert all(0 <= x < picture.width and 0 <= y < picture.height for x, y in points)
        for begin, end in itertools.pairwise(points):
            for x, y in np.linspace(begin, end, 300):
                assert not any(b.left < x < b.right and b.top < y < b.bottom for b in made.boxes.values())


def test_a_network_is_left_as_it_was_and_folding_changes_nothing(net, folded):
    before = {k: v.clone() for k, v in net.train().state_dict().items()}
    state = torch.get_rng_state()
    drawn = architecture.diagram(net, 64)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not any(m._forward_hooks for m in net.modules())
    assert drawn.tobytes() == folded.tobytes()
