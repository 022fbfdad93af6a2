"""What is said about routes: against counting by loops, values by hand, networks changed by other means."""

import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch

import data
import evaluate
import records
import routes
import train
from model import ExpertLayer, Routing
from records import InputError
from tasks import TASKS, UNKNOWN
from test_experts import random_layer
from test_train import TINY, few_drawings  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
GRID = (1, 1, 1)


def busy_net(**controls):
    """A network whose experts matter, and the drawn test photographs."""
    torch.manual_seed(0)
    net, tasks = evaluate.build_net(asdict(replace(TINY, **controls)))
    with torch.no_grad():
        for p in net.experts.parameters():
            p.normal_(std=0.5)
    return net.eval(), tasks, data.Photographs([r for r in records.read_drawn().records if r.part == "test"], 64)


# ---- where tokens go ----

def test_kinds_below_a_token_by_loops():
    torch.manual_seed(0)
    masks = (torch.rand(3, 5, 8, 12) < 0.03).to(torch.uint8)
    masks[2, 1] = UNKNOWN
    found = routes.kinds_below(masks, (2, 3))
    assert found.shape == (3, 6, 6)
    for n in range(3):
        for y in range(2):
            for x in range(3):
                block = masks[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
                there = [bool((m == 1).any()) for m in block]
                assert found[n, :, 3 * y + x].tolist() == [*there, n < 2 and not any(there)]
    assert found[:2, 5].any() and found[:, :5].any()


def test_collect_counts_every_choice_of_every_photograph():
    """Against loops over tokens; whatever the batch; tasks route photographs without their label too."""
    net, tasks, photographs = busy_net()
    photographs.records = [replace(r, masks=None) if i % 3 == 0 else r for i, r in enumerate(photographs.records)]
    uses = []
    for batch in (3, 10):
        batches = evaluate.loader(photographs, evaluate.in_order(photographs, batch), [TASKS["seg"]], CPU)
        uses.append(routes.collect(net, batches, CPU))
    for task in ("cls", "seg"):
        for name in ("shares", "entropy", "under", "tokens"):
            torch.testing.assert_close(getattr(uses[0][task], name), getattr(uses[1][task], name), rtol=1e-5, atol=1e-5)
    shares, under, tokens = torch.zeros(10, 2, 4), torch.zeros(6, 2, 4), torch.zeros(6)
    for i in range(10):
        sample = photographs[i, None]
        with torch.no_grad():
            r = net(sample.image[None])[1]["cls"]
        for position in range(4):  # 64 pixels at stride 32
            y, x = divmod(position, 2)
            below = None if sample.masks is None else sample.masks[:, 32 * y:32 * y + 32, 32 * x:32 * x + 32].flatten(1)
            kinds = [] if below is None else [k for k in range(5) if below[k].any()] or [5]
            tokens[kinds] += 1
            for expert, weight in zip(r.indices[position].tolist(), r.weights[position].tolist()):
                shares[i, :, expert] += torch.tensor([0.5, weight]) / 4
                under[kinds, :, expert] += torch.tensor([0.5, weight])
    use = uses[1]["cls"]
    for found, counted in ((use.shares, shares), (use.under, under), (use.tokens, tokens)):
        torch.testing.assert_close(found.float(), counted, rtol=1e-4, atol=1e-4)


def test_entropy_by_hand():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    assert routes.entropy(p).tolist() == pytest.approx([2, 0, 1])


def test_idle_experts_are_named():
    tokens = [[0.5, 0.009, 0.0, 0.491], [0.5, 0.009, 0.5, 0.0]]  # expert 1 has less than a hundredth of both together
    assert routes.idle(tokens) == [1]
    assert routes.warning([1]) == "warning: expert 1 receives less than 1 % of the tokens"
    assert routes.warning([1, 4]) == "warning: experts 1, 4 receive less than 1 % of the tokens"


# ---- information ----

def one_hot(labels, classes):
    return torch.nn.functional.one_hot(torch.as_tensor(labels), classes).double()


def test_mutual_information_by_hand_and_from_the_joint_table():
    two = torch.tensor([0, 0, 1, 1])
    assert routes.mutual_information(one_hot(two, 2), one_hot(two, 2)).item() == pytest.approx(1)  # one bit
    assert routes.mutual_information(one_hot([0, 1, 0, 1], 2), one_hot(two, 2)).item() == pytest.approx(0)
    torch.manual_seed(0)
    shares, labels = torch.rand(30, 6, dtype=torch.float64), torch.randint(0, 4, (30,))
    shares /= shares.sum(1, keepdim=True)
    joint = torch.zeros(4, 6, dtype=torch.float64)
    for row, label in zip(shares, labels):
        joint[label] += row / 30
    expected = sum(joint[g, e] * math.log2(joint[g, e] / (joint[g].sum() * joint[:, e].sum()))
                   for g in range(4) for e in range(6))
    assert routes.mutual_information(shares, one_hot(labels, 4)).item() == pytest.approx(float(expected))


def test_chance_takes_the_bias_out():
    """103 photographs, 8 experts, 5 grades, nothing to find: the plain estimate says 0.2 bit, permutations as well."""
    bits, chance, p = [], [], []
    for seed in range(40):
        torch.manual_seed(seed)
        found = routes.information(one_hot(torch.randint(0, 8, (103,)), 8)[None], torch.randint(0, 5, (103,)).tolist(),
                                   draws=100)
        bits.append(found.bits), chance.append(found.by_chance), p.append(found.p)
    mean = [sum(x) / 40 for x in (bits, chance, p)]
    assert 0.17 < mean[0] < 0.24 and abs(mean[0] - mean[1]) < 0.02 and 0.3 < mean[2] < 0.7
    assert sum(x < 0.05 for x in p) <= 6
    labels = [i % 5 for i in range(103)]
    found = routes.information(one_hot(labels, 8)[None], labels, draws=100)
    assert found.bits == pytest.approx(math.log2(5), abs=0.01) and found.p == pytest.approx(1 / 101)


def test_permutation_stays_within_blocks():
    """Photographs differ in their experts, tasks do not: nothing about the task, in any permutation within them."""
    torch.manual_seed(0)
    photographs = torch.rand(20, 4, dtype=torch.float64).softmax(1).repeat_interleave(2, 0)
    labels, blocks = [0, 1] * 20, [i // 2 for i in range(40)]
    found = routes.information(photographs[None], labels, blocks, draws=50)
    assert found.bits == pytest.approx(0, abs=1e-12) and found.by_chance == pytest.approx(0, abs=1e-12) and found.p == 1
    free = routes.information(photographs[None], labels, draws=50)
    assert free.by_chance > 1e-4


# ---- description ----

def test_description_and_table():
    torch.manual_seed(0)
    shares = torch.rand(30, 2, 4, dtype=torch.float64)
    shares /= shares.sum(2, keepdim=True)
    grades = [None if i == 7 else f"grade {i % 3}" for i in range(30)]
    use = routes.Use(shares, torch.full((30,), 1.5, dtype=torch.float64), torch.ones(6, 2, 4, dtype=torch.float64),
                     torch.tensor([2.0, 0, 4, 4, 4, 4], dtype=torch.float64))
    found = routes.describe({"cls": use, "seg": use}, grades)
    assert json.loads(json.dumps(found)) == found
    cls = found["tasks"]["cls"]
    assert cls["tokens"] == pytest.approx(shares[:, 0].mean(0).tolist()) and cls["entropy_of_router"] == 1.5
    assert cls["grades"]["grade 1"]["photographs"] == 9
    of_grade_1 = shares[[i for i in range(30) if grades[i] == "grade 1"]].mean(0)
    assert cls["grades"]["grade 1"]["weight"] == pytest.approx(of_grade_1[1].tolist())
    assert cls["below"]["MA"] == {"positions": 2, "tokens": [0.5] * 4, "weight": [0.5] * 4} and "HE" not in cls["below"]
    assert found["information"]["task"]["bits"] == pytest.approx(0, abs=1e-9)  # both tasks alike
    short, long = routes.table(found, False), routes.table(found, True)
    assert "I(expert; grade | task) 0." in short and "grade 1 (9)" not in short and "warning" not in short
    assert "grade 1 (9)" in long and "EX below (4)" in long
    assert f"{100 * cls['tokens'][2]:3.0f}/{100 * cls['weight'][2]:.0f}" in short


def test_a_table_of_many_experts_shows_the_most_used():
    shares = torch.zeros(5, 2, 20, dtype=torch.float64)
    shares[:, :, 4:8] = 0.25
    use = routes.Use(shares, torch.zeros(5), torch.zeros(6, 2, 20), torch.zeros(6))
    text = routes.table(routes.describe({"cls": use}, [None] * 5), True)
    assert "the 12 most used of 20 experts" in text and all(f"   {e}   " in text for e in range(4, 8))
    assert "I(expert" not in text and "warning: experts 0, 1, 2, 3, 8, 9" in text


# ---- other routes ----

@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_knocking_out_is_routing_without_the_expert(chosen):
    """The oracle is a router that never had it."""
    torch.manual_seed(0)
    router = random_layer(5, chosen).routers["a"].eval()
    smaller = random_layer(4, chosen).routers["a"].eval()
    others = [0, 1, 3, 4]
    with torch.no_grad():
        smaller.gate.copy_(router.gate[:, others])
        u = torch.randn(50, router.gate.shape[0])
        changed, expected = routes.knock_out(router(u, GRID), 2), smaller(u, GRID)
    assert torch.equal(changed.indices, torch.tensor(others)[expected.indices])
    torch.testing.assert_close(changed.weights, expected.weights)


def test_knocking_out_where_nobody_else_is_left():
    """K = E: the place stays and weighs nothing. A private expert alone: nothing is added."""
    torch.manual_seed(0)
    r = routes.knock_out(random_layer(3, 3).routers["a"].eval()(torch.randn(9, 24), GRID), 1)
    assert (r.weights[r.indices == 1] == 0).all() and torch.allclose(r.weights.sum(1), torch.ones(9))
    private = ExpertLayer(24, ("a", "b"), 2, 1, "private").routers["b"](torch.randn(9, 24), GRID)
    assert (private.weights == 1).all() and (routes.knock_out(private, 1).weights == 0).all()


def test_shuffled_routes_are_those_of_another_photograph():
    """Each exactly once, whatever the batches."""
    def photograph(*numbers):
        indices = torch.tensor(numbers).repeat_interleave(6)[:, None].expand(-1, 2)
        return Routing(indices, indices.float(), indices.float(), indices.float(), (len(numbers), 2, 3))
    tape = routes.Tape()
    for batch in ((0, 1, 2), (3,), (4, 5, 6)):
        assert tape.record(photograph(*batch)).indices[0, 0] == batch[0]
    plays = []
    for sizes in ((7,), (2, 5)):
        play, taken = tape.shuffled(), []
        for n in sizes:
            r = play(photograph(*[99] * n))
            assert r.indices.view(n, 6, 2).float().std(1).sum() == 0 and torch.equal(r.indices.float(), r.weights)
            taken += r.indices.view(n, 6, 2)[:, 0, 0].tolist()
        plays.append(taken)
    assert plays[0] == plays[1] and sorted(plays[0]) == list(range(7))
    assert all(i != other for i, other in enumerate(plays[0]))


def test_the_layer_has_its_own_routers_back_afterwards():
    layer = random_layer()
    own = layer.routers
    with pytest.raises(RuntimeError), routes.routed_by(layer, {"a": own["b"], "b": own["a"]}):
        assert layer.routers["a"] is own["b"]
        raise RuntimeError
    assert layer.routers is own and list(layer.state_dict()) == list(random_layer().state_dict())


def test_changes_are_those_of_networks_changed_by_hand():
    net, tasks, photographs = busy_net()
    changes = evaluate.rerouted(net, photographs, tasks, CPU, 4)
    assert list(changes) == ["without the experts", *(f"without expert {e}" for e in range(4)),
                             "routes of another photograph", "by the router of cls", "by the router of seg"]
    assert set(changes["by the router of cls"]) == {"seg"} and set(changes["without expert 0"]) == {"cls", "seg"}

    def primary():
        metrics = evaluate.score(net, photographs, tasks, CPU).metrics()
        return {t.name: metrics[t.name][t.primary] for t in tasks}
    before = primary()
    layer, own, net.experts = net.experts, net.experts.routers, None
    without = primary()
    net.experts = layer
    layer.routers = torch.nn.ModuleDict({"cls": own["seg"], "seg": own["cls"]})
    swapped = primary()
    layer.routers = own
    assert any(without[t] != before[t] for t in before) and any(swapped[t] != before[t] for t in before)
    for t, other in (("cls", "seg"), ("seg", "cls")):
        assert changes["without the experts"][t] == pytest.approx(without[t] - before[t], abs=1e-6)
        assert changes[f"by the router of {other}"][t] == pytest.approx(swapped[t] - before[t], abs=1e-6)
    with torch.no_grad():
        layer.experts.w2.zero_()
    assert all(v == 0 for row in evaluate.rerouted(net, photographs, tasks, CPU, 4).values() for v in row.values())


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_main_reports_routes(tmp_path, monkeypatch, capsys):
    train.fit(TINY, tmp_path / "run", quiet=True)
    run_main(monkeypatch, tmp_path / "run")
    text = capsys.readouterr().out
    assert "I(expert; task)" in text and "grade 0" not in text and "change of the score" not in text
    run_main(monkeypatch, tmp_path / "run", "--split", "test", "--routing")
    text = capsys.readouterr().out
    assert "grade 0" in text and "OD below (10)" in text and "routes of another photograph" in text
    stored = json.loads((tmp_path / "run" / "routing_test.json").read_text())
    assert stored["split"] == "test" and stored["photographs"] == 10 and len(stored["rerouted"]) == 8
    assert sum(stored["tasks"]["seg"]["tokens"]) == pytest.approx(1)
    plain = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert plain["split"] == "val" and "rerouted" not in plain


def test_a_run_without_experts_has_no_routing(tmp_path, monkeypatch, capsys):
    train.fit(replace(TINY, experts=0, epochs=1), tmp_path / "run", quiet=True)
    run_main(monkeypatch, tmp_path / "run")
    assert "of tokens" not in capsys.readouterr().out and not (tmp_path / "run" / "routing.json").exists()
    with pytest.raises(InputError, match="--routing: .*run was trained with --experts 0 and has no routing; leave"):
        run_main(monkeypatch, tmp_path / "run", "--routing")


def test_training_ends_with_a_warning_about_idle_experts(monkeypatch, capsys):
    """An equal share is idle where the limit lies above it; no need to wait for a collapse."""
    flags = "--size 64 --epochs 1 --experts 8 --router private --chosen 4".split()
    train.main([*flags, "--name", "busy"])
    assert "receive less" not in capsys.readouterr().out
    monkeypatch.setattr(routes, "IDLE", 0.2)
    train.main([*flags, "--name", "idle"])
    assert "warning: experts 0, 1, 2, 3, 4, 5, 6, 7 receive less than 20 % of the tokens" in capsys.readouterr().out
