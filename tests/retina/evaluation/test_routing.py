"""What is said about routes: against counting by loops, values by hand, networks changed by other means."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from test_evaluate import run_main
from test_model_experts import random_layer

import data
import train
from conftest import TINY, busy_net
from model import MoELayer, Routing
from retina.datasets.records import UNKNOWN
from retina.evaluation import interventions, routing, scoring, tables
from retina.files import InputError
from tasks import TASKS


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")

CPU = torch.device("cpu")
GRID = (1, 1, 1)


# ---- where tokens go ----

def test_classes_below_a_token_by_loops():
    torch.manual_seed(0)
    masks = (torch.rand(3, 5, 8, 12) < 0.01).to(torch.uint8)
    masks[2, 1] = UNKNOWN
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    images[:, :, :4, :4] = 3
    classes = routing.token_classes(images, masks, (2, 3))
    assert classes.shape == (3, 7, 6) and routing.TOKEN_CLASSES == ("MA", "HE", "EX", "SE", "OD", "none", "outside")
    for n in range(3):
        for y in range(2):
            for x in range(3):
                block = masks[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
                there, outside = [bool((m == 1).any()) for m in block], x == y == 0
                none = n < 2 and not any(there) and not outside
                assert classes[n, :, 3 * y + x].tolist() == [*there, none, outside]
    assert classes[:2, 5].any() and classes[:, :5].any()


def test_collect_counts_every_choice_of_every_photograph():
    """Against loops over tokens; whatever the batch; tasks route photographs without their label too."""
    net, tasks, photographs = busy_net()
    photographs.records = [r.with_labels(masks=None) if i % 3 == 0 else r for i, r in enumerate(photographs.records)]
    first, second = (routing.collect(net, data.eval_loader(photographs, [TASKS["seg"]], batch)) for batch in (3, 10))
    for task in ("cls", "seg"):
        for name in ("shares", "entropy", "below", "tokens"):
            # convolutions of 3 and of 10 photographs round differently, by 2e-5 of a weight on processors with AMX
            torch.testing.assert_close(getattr(first[task], name), getattr(second[task], name), rtol=1e-4, atol=1e-4)
    shares, below, tokens = torch.zeros(10, 2, 4), torch.zeros(7, 2, 4), torch.zeros(7)
    for i in range(10):
        sample = photographs[i]
        with torch.no_grad():
            r = net(sample.image[None])[1]["cls"]
        for position in range(4):  # 64 pixels at stride 32; none of these lies outside
            y, x = divmod(position, 2)
            under = None if sample.masks is None else sample.masks[:, 32 * y:32 * y + 32, 32 * x:32 * x + 32].flatten(1)
            classes = [] if under is None else [k for k in range(5) if under[k].any()] or [5]
            tokens[classes] += 1
            for expert, weight in zip(r.experts[position].tolist(), r.gates[position].tolist()):
                shares[i, :, expert] += torch.tensor([1, weight]) / 4
                below[classes, :, expert] += torch.tensor([1, weight])
    usage = second["cls"]
    for collected, counted in ((usage.shares, shares), (usage.below, below), (usage.tokens, tokens)):
        torch.testing.assert_close(collected.float(), counted, rtol=1e-4, atol=1e-4)


def test_entropy_by_hand():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    assert routing.entropy(p).tolist() == pytest.approx([2, 0, 1]) and "-" not in f"{routing.entropy(p[1]):.2f}"


def test_unused_experts_are_named():
    tokens = [[1, 0.009, 0.0, 0.991], [1, 0.009, 0.991, 0.0]]  # less than a hundredth of both tasks' go to expert 1
    assert routing.unused_experts(tokens) == [1]
    assert routing.warning([1]) == "warning: expert 1 receives less than 1 % of the tokens"
    assert routing.warning([1, 4]) == "warning: experts 1, 4 receive less than 1 % of the tokens"


# ---- information ----

def one_hot(labels, classes):
    return torch.nn.functional.one_hot(torch.as_tensor(labels), classes).double()


def test_mutual_information_by_hand_and_from_the_joint_table():
    two = torch.tensor([0, 0, 1, 1])
    assert routing.mutual_information(one_hot(two, 2), one_hot(two, 2)).item() == pytest.approx(1)  # one bit
    assert routing.mutual_information(one_hot([0, 1, 0, 1], 2), one_hot(two, 2)).item() == pytest.approx(0)
    torch.manual_seed(0)
    shares, labels = torch.rand(30, 6, dtype=torch.float64), torch.randint(0, 4, (30,))
    shares /= shares.sum(1, keepdim=True)
    joint = torch.zeros(4, 6, dtype=torch.float64)
    for of_one, label in zip(shares, labels):
        joint[label] += of_one / 30
    expected = sum(joint[g, e] * math.log2(joint[g, e] / (joint[g].sum() * joint[:, e].sum()))
                   for g in range(4) for e in range(6))
    assert routing.mutual_information(shares, one_hot(labels, 4)).item() == pytest.approx(float(expected))


def test_chance_takes_the_bias_out():
    """103 photographs, 8 experts, 5 grades, nothing to find: the raw estimate says 0.2 bit, permutations as well."""
    measured = []
    for seed in range(40):
        torch.manual_seed(seed)
        experts, grades = torch.randint(0, 8, (103,)), torch.randint(0, 5, (103,)).tolist()
        measured.append(routing.information(one_hot(experts, 8)[None], grades, resamples=100))
    bits, by_chance, p = (sum(getattr(m, name) for m in measured) / 40 for name in ("bits", "by_chance", "p"))
    assert 0.17 < bits < 0.24 and abs(bits - by_chance) < 0.02 and 0.3 < p < 0.7
    assert sum(m.p < 0.05 for m in measured) <= 6
    labels = [i % 5 for i in range(103)]
    known = routing.information(one_hot(labels, 8)[None], labels, resamples=100)
    assert known.bits == pytest.approx(math.log2(5), abs=0.01) and known.p == pytest.approx(1 / 101)


def test_permutations_at_once_are_those_one_by_one():
    """Of two tables, within blocks of three photographs; the last of 50 are fewer at once than the others."""
    torch.manual_seed(0)
    shares, labels = torch.rand(2, 30, 6, dtype=torch.float64).softmax(2), torch.randint(0, 4, (30,))
    blocks, generator = torch.arange(30) // 3, torch.Generator().manual_seed(0)
    chance = []
    for _ in range(50):
        order = (blocks + torch.rand(30, dtype=torch.float64, generator=generator)).argsort()
        assert torch.equal(blocks[order], blocks)
        each = [float(routing.mutual_information(table, one_hot(labels[order], 4))) for table in shares]
        chance.append(sum(each) / 2)
    found = routing.information(shares, labels.tolist(), blocks, resamples=50)
    reached = sum(c > found.bits for c in chance)
    assert found.by_chance == pytest.approx(sum(chance) / 50, rel=1e-12) and 0 < reached < 50
    assert found.p == (1 + reached) / 51


def test_permutation_stays_within_blocks():
    """Photographs differ in their experts, tasks do not: nothing about the task, in any permutation within them."""
    torch.manual_seed(0)
    photographs = torch.rand(20, 4, dtype=torch.float64).softmax(1).repeat_interleave(2, 0)
    labels, blocks = [0, 1] * 20, [i // 2 for i in range(40)]
    within = routing.information(photographs[None], labels, blocks, resamples=50)
    assert (within.bits, within.by_chance) == pytest.approx((0, 0), abs=1e-12) and within.p == 1
    free = routing.information(photographs[None], labels, resamples=50)
    assert free.by_chance > 1e-4


# ---- description ----

def some_usage(photographs: int, experts: int) -> routing.ExpertUsage:
    """Of two experts for each token."""
    shares = torch.rand(photographs, 2, experts, dtype=torch.float64)
    shares /= shares.sum(2, keepdim=True) / torch.tensor([2.0, 1.0])[:, None]
    return routing.ExpertUsage(shares, torch.full((photographs,), 1.5, dtype=torch.float64),
                               torch.ones(7, 2, experts, dtype=torch.float64),
                               torch.tensor([2, 0, 4, 4, 4, 4, 4], dtype=torch.float64))


def test_description_and_table():
    torch.manual_seed(0)
    labels = [None if i == 7 else f"grade {i % 3}" for i in range(30)]
    usage = some_usage(30, 4)
    described = routing.describe({"cls": usage, "seg": usage}, labels, [f"eye {i}" for i in range(30)])
    assert json.loads(json.dumps(described)) == described
    cls = described["tasks"]["cls"]
    assert cls["tokens"] == pytest.approx(usage.shares[:, 0].mean(0).tolist()) and cls["entropy_of_router"] == 1.5
    assert sum(cls["tokens"]) == pytest.approx(2) and 1.9 < cls["entropy_of_use"] <= 2
    assert cls["labels"]["grade 1"]["photographs"] == 9
    of_grade_1 = usage.shares[[i for i in range(30) if labels[i] == "grade 1"]].mean(0)
    assert cls["labels"]["grade 1"]["weight"] == pytest.approx(of_grade_1[1].tolist())
    assert cls["below"]["MA"] == {"tokens_below": 2, "tokens": [0.5] * 4, "weight": [0.5] * 4}
    assert "HE" not in cls["below"]
    information = described["information"]
    assert information["task"]["bits"] == pytest.approx(0, abs=1e-9)  # both tasks alike
    assert information["grade"]["units"] == 29 and information["task"]["units"] == 60
    short, long = routing.table(described, False), routing.table(described, True)
    assert "mutual information of expert and grade, given the task: 0." in short
    assert "grade 1 (9)" not in short and "warning" not in short
    assert "grade 1 (9)" in long and "EX below (4)" in long
    assert f"{100 * cls['tokens'][2]:3.0f}/{100 * cls['weight'][2]:.0f}" in short


def test_photographs_of_one_eye_are_one_witness():
    """Information from two equal photographs of each eye is that from one, with the same chance value."""
    torch.manual_seed(0)
    once = {"a": some_usage(12, 4), "b": some_usage(12, 4)}
    twice = {t: routing.ExpertUsage(u.shares.repeat(2, 1, 1), u.entropy.repeat(2), u.below, u.tokens)
             for t, u in once.items()}
    labels, eyes = [f"grade {i % 3}" for i in range(12)], [f"eye {i:02}" for i in range(24)]
    one = routing.describe(once, labels, eyes[:12])["information"]
    two = routing.describe(twice, labels * 2, eyes[:12] * 2)["information"]
    for label in ("task", "grade"):
        assert one[label] == pytest.approx(two[label])
    three = routing.describe(twice, labels * 2, eyes)["information"]
    assert three["grade"]["bits"] == pytest.approx(one["grade"]["bits"])
    assert three["grade"]["by_chance"] < 0.8 * one["grade"]["by_chance"]


def test_a_table_of_many_experts_shows_the_most_used():
    shares = torch.zeros(5, 2, 20, dtype=torch.float64)
    shares[:, :, 4:8] = torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None]
    usage = routing.ExpertUsage(shares, torch.zeros(5), torch.zeros(7, 2, 20), torch.zeros(7))
    text = routing.table(routing.describe({"cls": usage}, [None] * 5, ["e"] * 5), True)
    assert "the 12 most used of 20 experts" in text and all(f"   {e}   " in text for e in range(4, 8))
    assert "mutual information" not in text and "warning: experts 0, 1, 2, 3, 8, 9" in text


# ---- other routes ----

@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ablating_an_expert_is_routing_without_it(top_k):
    """The oracle is a router that never had it."""
    torch.manual_seed(0)
    router = random_layer(5, top_k).routers["a"].eval()
    smaller = random_layer(4, top_k).routers["a"].eval()
    others = [0, 1, 3, 4]
    with torch.no_grad():
        smaller.gate.copy_(router.gate[:, others])
        u = torch.randn(50, router.gate.shape[0])
        changed, expected = interventions.ablate_expert(router(u, GRID), 2), smaller(u, GRID)
    assert torch.equal(changed.experts, torch.tensor(others)[expected.experts])
    torch.testing.assert_close(changed.gates, expected.gates)


def test_ablating_where_no_other_expert_is_left():
    """K = E: the place stays and weighs nothing. A private expert alone: nothing is added."""
    torch.manual_seed(0)
    r = interventions.ablate_expert(random_layer(3, 3).routers["a"].eval()(torch.randn(9, 24), GRID), 1)
    assert (r.gates[r.experts == 1] == 0).all() and torch.allclose(r.gates.sum(1), torch.ones(9))
    private = MoELayer(24, ("a", "b"), 2, 1, "private").routers["b"](torch.randn(9, 24), GRID)
    assert (private.gates == 1).all() and (interventions.ablate_expert(private, 1).gates == 0).all()


def test_shuffled_routes_are_those_of_another_photograph():
    """Each exactly once, whatever the batches."""
    def photograph(*numbers):
        indices = torch.tensor(numbers).repeat_interleave(6)[:, None].expand(-1, 2)
        return Routing(indices, indices.float(), indices.float(), indices.float(), (len(numbers), 2, 3))
    recorder = interventions.RouteRecorder()
    for batch in ((0, 1, 2), (3,), (4, 5, 6)):
        assert recorder.record(photograph(*batch)).experts[0, 0] == batch[0]
    plays = []
    for sizes in ((7,), (2, 5)):
        replay, taken = recorder.shuffled(), []
        for n in sizes:
            r = replay(photograph(*[99] * n))
            assert r.experts.view(n, 6, 2).float().std(1).sum() == 0 and torch.equal(r.experts.float(), r.gates)
            taken += r.experts.view(n, 6, 2)[:, 0, 0].tolist()
        plays.append(taken)
    assert plays[0] == plays[1] and sorted(plays[0]) == list(range(7))
    assert all(i != other for i, other in enumerate(plays[0]))


def test_the_layer_has_its_own_routers_back_afterwards():
    layer = random_layer()
    own = layer.routers
    with pytest.raises(RuntimeError), interventions.routed_by(layer, {"a": own["b"], "b": own["a"]}):
        assert layer.routers["a"] is own["b"]
        raise RuntimeError
    assert layer.routers is own and list(layer.state_dict()) == list(random_layer().state_dict())


def test_changes_are_those_of_networks_changed_by_hand(few_resamples):
    """Every change for each of three tasks: losses, which move more easily than scores, of networks built otherwise."""
    net, tasks, photographs = busy_net(tasks=("cls", "seg", "loc"))
    layer, own = net.experts, dict(net.experts.routers.items())
    changes = interventions.score_interventions(net, data.eval_loader(photographs, tasks, 4), tasks)
    assert net.experts.routers["cls"] is own["cls"]
    assert list(changes) == ["without the experts", *(f"without expert {e}" for e in range(4)),
                             "routes of another photograph", *(f"by the router of {t}" for t in ("cls", "seg", "loc"))]

    def losses(routers=own, experts=layer, of=photographs):
        layer.routers, net.experts = torch.nn.ModuleDict(routers), experts
        try:
            return scoring.evaluate_split(net, data.eval_loader(of, tasks, 4), tasks).losses
        finally:
            layer.routers, net.experts = torch.nn.ModuleDict(own), layer
    before, expected = losses(), {"without the experts": losses(experts=None)}
    for e in range(4):  # test_ablating_an_expert_is_routing_without_it tells what this does
        routers = {t: copy.deepcopy(router) for t, router in own.items()}
        for router in routers.values():
            router.register_forward_hook(lambda module, inputs, r, e=e: interventions.ablate_expert(r, e))
        expected[f"without expert {e}"] = losses(routers)
    for shift in (1, 2):
        others = {t: list(own)[(i + shift) % 3] for i, t in enumerate(own)}
        for t, value in losses({t: own[o] for t, o in others.items()}).items():
            expected.setdefault(f"by the router of {others[t]}", {})[t] = value
    for title, values in expected.items():
        assert set(changes[title]) == set(values)
        for t, value in values.items():
            assert changes[title][t]["loss"] == pytest.approx(value - before[t], abs=1e-5)
    assert len({round(changes[f"without expert {e}"]["seg"]["loss"], 6) for e in range(4)}) == 4
    assert any(v["loss"] != 0 for v in changes["routes of another photograph"].values())
    with torch.no_grad():
        layer.experts.w2.zero_()
    for change in interventions.score_interventions(net, data.eval_loader(photographs, tasks, 4), tasks).values():
        assert all(v == {"change": 0, "standard_error": 0, "loss": 0} for v in change.values())


def test_shuffled_routes_meet_the_right_task_and_photograph(few_resamples):
    """One photograph's routes for all: then every shuffle changes nothing; with others', it does."""
    net, tasks, photographs = busy_net()

    def shuffled():
        loader = data.eval_loader(photographs, tasks, 3)
        return interventions.score_interventions(net, loader, tasks)["routes of another photograph"].values()
    assert any(abs(v["loss"]) > 1e-6 for v in shuffled())
    photographs.paths = [photographs.paths[0]] * len(photographs)
    assert all(abs(v["loss"]) < 1e-6 for v in shuffled())


def test_a_split_without_a_tasks_labels_still_has_its_router(few_resamples):
    net, tasks, photographs = busy_net()
    photographs.records = [r.with_labels(masks=None) for r in photographs.records]
    changes = interventions.score_interventions(net, data.eval_loader(photographs, tasks, 4), tasks)
    assert all(set(change) == {"cls"} for change in changes.values()) and "by the router of seg" in changes
    assert "by the router of cls" not in changes
    photographs.records, photographs.paths = photographs.records[:1], photographs.paths[:1]
    changes = interventions.score_interventions(net, data.eval_loader(photographs, tasks, 4), tasks)
    assert "routes of another photograph" not in changes


def test_standard_error_of_a_change_by_hand():
    """Accuracy over n photographs of which m become wrong: a mean of n values that are -1 with probability m / n."""
    task = TASKS["dme"]
    truth = torch.arange(400) % 3
    before = torch.cat([torch.nn.functional.one_hot(truth, 3).float(), truth[:, None]], 1)
    before[200:, :3] = before[200:, :3].roll(1, 1)  # both are wrong there, which no paired error sees
    after = before.clone()
    after[:40, :3] = after[:40, :3].roll(1, 1)
    one, again, other = (interventions.resampled(task, x, list(map(str, range(400)))) for x in (before, before, after))
    assert torch.equal(one, again)
    assert float(other[0] - one[0]) == pytest.approx(-0.1)
    assert float((other - one)[1:].std()) == pytest.approx(math.sqrt(0.1 * 0.9 / 400), rel=0.2)


def test_the_table_says_whether_routes_matter():
    """Three standard errors are asked for; where all resamples agree there is none, and nothing is said to move."""
    changes = {"without the experts": {"cls": {"change": -0.02, "standard_error": 0.01},
                                       "loc": {"change": 0.1, "standard_error": 0.0}},
               "without expert 0": {"cls": {"change": 0.03, "standard_error": 0.0101}}}
    assert "nothing shows that routes matter" in tables.table_of_changes(changes, [TASKS["cls"], TASKS["loc"]])
    for by_task in changes.values():
        by_task["cls"]["standard_error"] = 0.006
    text = tables.table_of_changes(changes, [TASKS["cls"], TASKS["loc"]])
    assert text.endswith("of 3 changes these exceed three standard errors: cls -0.020 without the experts, "
                         "cls +0.030 without expert 0")


def test_main_reports_routes(tmp_path, monkeypatch, capsys, few_resamples):
    train.fit(TINY, tmp_path / "run", quiet=True)
    run_main(monkeypatch, tmp_path / "run")
    text = capsys.readouterr().out
    assert "mutual information of expert and task: " in text
    assert "grade 0" not in text and "change of the score" not in text
    run_main(monkeypatch, tmp_path / "run", "--split", "test", "--routing")
    text = capsys.readouterr().out
    assert "grade 0" in text and "OD below (10)" in text and "routes of another photograph" in text
    stored = json.loads((tmp_path / "run" / "routing_test.json").read_text())
    assert stored["split"] == "test" and stored["photographs"] == 10
    assert sum(stored["tasks"]["seg"]["tokens"]) == pytest.approx(2)
    changes = json.loads((tmp_path / "run" / "interventions_test.json").read_text())
    assert changes["split"] == "test" and set(changes["without expert 3"]) == {"cls", "seg"}
    run_main(monkeypatch, tmp_path / "run", "--split", "test")  # a short call takes nothing away
    assert json.loads((tmp_path / "run" / "interventions_test.json").read_text()) == changes
    assert not (tmp_path / "run" / "interventions.json").exists()


def test_a_run_without_experts_has_no_routing(tmp_path, monkeypatch, capsys, few_resamples):
    train.fit(replace(TINY, num_experts=0, epochs=1), tmp_path / "run", quiet=True)
    run_main(monkeypatch, tmp_path / "run")
    assert "of tokens" not in capsys.readouterr().out and not (tmp_path / "run" / "routing.json").exists()
    with pytest.raises(InputError, match="--routing: .*run was trained with --num-experts 0 and has no routing; leave"):
        run_main(monkeypatch, tmp_path / "run", "--routing")


def test_training_ends_with_a_warning_about_unused_experts(monkeypatch, capsys):
    """An equal share counts as unused where the limit lies above it; no need to wait for a collapse."""
    flags = "--image-size 64 --epochs 1 --num-experts 8 --router private --top-k 4".split()
    train.main([*flags, "--name", "busy"])
    assert "receive less" not in capsys.readouterr().out
    monkeypatch.setattr(routing, "UNUSED", 0.6)
    train.main([*flags, "--name", "unused"])
    assert "warning: experts 0, 1, 2, 3, 4, 5, 6, 7 receive less than 60 % of the tokens" in capsys.readouterr().out
