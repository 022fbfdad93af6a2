"""The network against independent oracles: torchvision's EfficientNet, a dense loop over experts, redrawn noise."""

import copy
import math

import pytest
import torch
import torchvision
from torchvision.transforms import v2

import model
from model import Encoder, ExpertLayer, Experts, MaskHead, Net, NetConfig, PointHead, PooledHead, Router, balance_loss
from tasks import TASKS

C, E = 24, 6


def small_net(**config) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(**config), [TASKS["cls"], TASKS["seg"]])


def random_layer(experts=E, chosen=2, tasks=("a", "b"), channels=C) -> ExpertLayer:
    """A layer that is not in its neutral starting state."""
    layer = ExpertLayer(channels, tasks, experts, chosen, dropout=0.0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.5)
    return layer


# ---- encoder ----

@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3"])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_equals_torchvision(variant, training):
    torch.manual_seed(1)
    oracle = getattr(torchvision.models, f"efficientnet_{variant}")(weights=None)
    with torch.no_grad():  # fresh running statistics (0, 1) would hide a forgotten buffer
        for m in oracle.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(std=0.1), m.running_var.uniform_(0.5, 1.5)
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(std=0.1)
    net = Net(NetConfig(variant=variant, experts=0, stochastic_depth=0.0), [TASKS["cls"]])
    model.load_pretrained(net, oracle.state_dict())
    for m in oracle.modules():
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0
    oracle.train(training), net.train(training)
    x = torch.randn(2, 3, 96, 64)
    maps = net.encoder(x)
    expected, last = {}, x
    for i, stage in enumerate(oracle.features):
        expected[i] = last = stage(last)
    for ours, i in zip(maps, (1, 2, 3, 5, 7)):
        torch.testing.assert_close(ours, expected[i], rtol=1e-5, atol=1e-5)
    assert [m.shape[1] for m in maps] == list(net.encoder.channels)
    torch.testing.assert_close(net.heads["cls"].conv(maps[-1]), last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", model.VARIANTS)
def test_state_dict_fits_torchvision(variant):
    """Strictly: the encoder and the first convolution of the head together have exactly torchvision's entries."""
    with torch.device("meta"):
        oracle = getattr(torchvision.models, f"efficientnet_{variant}")(weights=None).state_dict()
        net = Net(NetConfig(variant=variant, experts=0), [TASKS["cls"]])
    ours = {k: v.shape for k, v in net.encoder.state_dict().items()}
    ours |= {f"features.8.{k}": v.shape for k, v in net.heads["cls"].conv.state_dict().items()}
    assert ours == {k: v.shape for k, v in oracle.items() if not k.startswith("classifier.")}


def test_stochastic_depth_is_a_fair_coin_per_photograph():
    torch.manual_seed(0)
    block = model.MBConv(8, 8, 3, 1, 1, drop=0.25, norm=torch.nn.BatchNorm2d).train()
    x = torch.randn(1, 8, 4, 4).expand(4000, 8, 4, 4)
    added = (block(x) - x).detach()
    kept = added.flatten(1).abs().amax(1) > 0
    assert abs(kept.float().mean() - 0.75) < 0.03
    whole = block.block(x)  # the mean over coins is the block itself: what is kept is scaled up
    torch.testing.assert_close(added[kept], whole[kept] / 0.75, rtol=1e-4, atol=1e-4)


def test_pretrained_of_another_variant_names_the_first_difference():
    oracle = torchvision.models.efficientnet_b2(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"not the weights of this EfficientNet: features\.\d.*more differences"):
        model.load_pretrained(small_net(), oracle)


# ---- net ----

def test_shapes_rows_and_partial_labels():
    net = small_net().eval()
    x = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    full, routing = net(x)
    assert full["cls"].shape == (3, 5) and full["seg"].shape == (3, 5, 64, 96)
    assert routing["cls"].grid == (3, 2, 3) and len(routing["cls"].indices) == 18
    part, routing = net(x, {"cls": torch.tensor([0, 2]), "seg": torch.tensor([], dtype=torch.int64)})
    assert list(part) == ["cls"] == list(routing)
    torch.testing.assert_close(part["cls"], full["cls"][[0, 2]])


def test_photographs_are_normalised_as_torchvision_does():
    torch.manual_seed(0)
    oracle = torchvision.models.efficientnet_b0(weights=None).eval()
    net = Net(NetConfig(experts=0), [TASKS["cls"]]).eval()
    model.load_pretrained(net, oracle.state_dict())
    kept = {}
    net.encoder.register_forward_hook(lambda module, inputs, maps: kept.update(deepest=maps[-1]))
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    net(x)
    weights = torchvision.models.EfficientNet_B0_Weights.DEFAULT.transforms()
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(weights.mean, weights.std)])
    torch.testing.assert_close(kept["deepest"], oracle.features[:8](normalise(x)), rtol=1e-4, atol=1e-4)


def test_size_must_be_a_multiple_of_32():
    with pytest.raises(ValueError, match="48x64.*multiples of 32"):
        small_net()(torch.zeros(1, 3, 64, 48, dtype=torch.uint8))


@pytest.mark.parametrize("experts,chosen", [(1, 1), (8, 2), (4, 4)])
def test_equals_the_dense_net_at_step_0(experts, chosen):
    net, dense = small_net(experts=experts, chosen=chosen), small_net(experts=0)
    dense.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("experts.")})
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for mode in (False, True):
        outputs = []
        for n in (net.train(mode), dense.train(mode)):
            for m in n.modules():  # neither consumes random numbers in front of the other
                if isinstance(m, model.MBConv):
                    m.drop = 0.0
                if isinstance(m, torch.nn.Dropout):
                    m.p = 0.0
            outputs.append(n(x)[0])
        assert all(torch.equal(outputs[0][t], outputs[1][t]) for t in outputs[0])


def test_batchmates_do_not_change_an_answer():
    net = small_net().eval().double()
    with torch.no_grad():
        for p in net.experts.parameters():
            p.normal_(std=0.3)
    x = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    alone, together = net(x[1:2])[0], net(x)[0]
    for t in alone:
        torch.testing.assert_close(alone[t], together[t][1:2], rtol=1e-6, atol=1e-6)


def test_absent_task_gets_no_gradient():
    net = small_net()
    rows = {"cls": torch.tensor([0, 1]), "seg": torch.tensor([], dtype=torch.int64)}
    outputs, routing = net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), rows)
    (outputs["cls"].sum() + balance_loss(routing)).backward()
    assert net.experts.routers["cls"].gate.grad is not None
    assert all(p.grad is None for p in [*net.experts.routers["seg"].parameters(), *net.heads["seg"].parameters()])


def test_mask_head_starts_near_one_percent():
    encoder = Encoder("b0").eval()
    with torch.no_grad():
        p = MaskHead(encoder, 5).eval()(encoder(torch.randn(2, 3, 64, 64))).sigmoid()
    assert 0.001 < p.median() < 0.1


def test_point_head_is_a_feature_pyramid():
    """Against its definition map by map: lateral convolutions, doubled by repeating pixels, added; strides 8 to 32."""
    torch.manual_seed(0)
    encoder = Encoder("b0")
    head = PointHead(encoder, 2).eval().double()
    maps = [torch.randn(3, c, 64 >> i, 96 >> i, dtype=torch.float64) for i, c in enumerate(encoder.channels)]

    def lateral(k, x):  # a 1x1 convolution is a matrix product over channels
        conv = head.laterals[k]
        return torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
    sixteen = lateral(1, maps[3]) + lateral(0, maps[4]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    eight = lateral(2, maps[2]) + sixteen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(head(maps), head.conv(head.smooth(eight)))
    assert head(maps).shape == (3, 2, 16, 24)
    torch.testing.assert_close(head(maps), head([m + 1 if i < 2 else m for i, m in enumerate(maps)]))


# ---- experts ----

def dense_loop(experts: Experts, u, indices, weights):
    """What the layer computes, token by token."""
    return torch.stack([sum(w * (torch.nn.functional.silu(u[n] @ experts.w1[e]) @ experts.w2[e])
                            for e, w in zip(indices[n].tolist(), weights[n])) for n in range(len(u))])


@pytest.mark.parametrize("n,e,k", [(17, 6, 2), (1, 6, 2), (5, 1, 1), (9, 4, 4), (3, 32, 2), (12, 6, 1)])
def test_sparse_dispatch_equals_dense_loop(n, e, k):
    torch.manual_seed(n)
    experts = Experts(C, e, 0.0).double()
    torch.nn.init.normal_(experts.w2)
    u = torch.randn(n, C, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(e)[:k] for _ in range(n)])
    weights = torch.rand(n, k, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(n, C, dtype=torch.float64)
    results = []
    for f in (experts, lambda *a: dense_loop(experts, *a)):
        y = f(u, indices, weights)
        gradients = torch.autograd.grad((y * direction).sum(), [u, weights, experts.w1, experts.w2])
        results.append([y, *gradients])
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_nan_reaches_exactly_the_tokens_that_chose_the_expert():
    torch.manual_seed(0)
    experts = Experts(C, E, 0.0)
    with torch.no_grad():
        experts.w1[3] = math.nan
    indices = torch.stack([torch.randperm(E)[:2] for _ in range(50)])
    y = experts(torch.randn(50, C), indices, torch.full((50, 2), 0.5))
    assert torch.equal(y.isnan().any(1), (indices == 3).any(1))
    assert 0 < int((indices == 3).sum()) < 50


@pytest.mark.parametrize("chosen", [1, 2, 3, E])
@pytest.mark.parametrize("training", [False, True])
def test_router_chooses_k_distinct_experts(chosen, training):
    torch.manual_seed(0)
    router = random_layer(chosen=chosen).routers["a"].train(training)
    r = router(torch.randn(200, C), (200, 1, 1))
    assert all(len(set(row)) == chosen for row in r.indices.tolist())
    torch.testing.assert_close(r.probabilities.sum(1), torch.ones(200))
    if chosen > 1:
        torch.testing.assert_close(r.weights.sum(1), torch.ones(200))
    else:
        assert (r.weights < 1).all() and (r.weights > 1 / E - 1e-6 if not training else r.weights > 0).all()


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_load_is_the_chance_of_being_chosen_were_the_noise_redrawn(chosen):
    """P_i of one draw conditions on the other experts' noise; over many draws it must average to how often expert i
    is in fact chosen. Implementations that compare logits with softmaxed thresholds fail here, and in the sum."""
    torch.manual_seed(0)
    router = random_layer(experts=5, chosen=chosen).routers["a"].train()
    torch.nn.init.normal_(router.gate, std=0.1)
    u = torch.randn(3, C).repeat_interleave(20000, 0)
    r = router(u, (60000, 1, 1))
    load = r.load.view(3, 20000, 5).mean(1)
    chosen_share = torch.zeros_like(r.load).scatter(1, r.indices, 1.0).view(3, 20000, 5).mean(1)
    torch.testing.assert_close(load, chosen_share, atol=0.012, rtol=0)
    torch.testing.assert_close(load.sum(1), torch.full((3,), float(chosen)), rtol=0.01, atol=0)


def test_load_of_one_draw_is_the_conditional_chance():
    """P_i given the *others'* noise: redraw expert i's own noise only and count."""
    torch.manual_seed(0)
    h, s, k = torch.randn(6), torch.rand(6) + 0.1, 2
    noisy = h + s * torch.randn(6)
    router = Router(6, 6, k).train()
    with torch.no_grad():  # u = 1 row whose products are h and softplus^-1(s - 0.01)
        router.gate.copy_(torch.diag(h)), router.noise.copy_(torch.diag((s - 0.01).expm1().log()))
    original = torch.randn_like
    try:
        torch.randn_like = lambda x: ((noisy - h) / s).expand_as(x)
        load = router(torch.ones(1, 6), (1, 1, 1)).load[0]
    finally:
        torch.randn_like = original
    for i in range(6):
        redrawn = noisy.repeat(100000, 1)
        redrawn[:, i] = h[i] + s[i] * torch.randn(100000)
        share = (redrawn.topk(k).indices == i).any(1).float().mean()
        assert abs(share - load[i]) < 0.01


@pytest.mark.parametrize("chosen", [1, 2, E])
def test_task_loss_alone_teaches_the_router(chosen):
    torch.manual_seed(0)
    layer = random_layer(chosen=chosen).train()
    layer({"a": torch.randn(2, C, 3, 3)})[0]["a"].square().sum().backward()
    assert layer.routers["a"].gate.grad.abs().sum() > 0


def test_order_of_tokens_and_names_of_experts_do_not_matter():
    torch.manual_seed(0)
    layer = random_layer().eval()
    x = torch.randn(1, C, 2, 5)
    y = layer({"a": x})[0]["a"]
    order = torch.randperm(10)
    permuted = layer({"a": x.flatten(2)[:, :, order].view(1, C, 2, 5)})[0]["a"]
    torch.testing.assert_close(permuted.flatten(2), y.flatten(2)[:, :, order])
    other, names = copy.deepcopy(layer), torch.randperm(E)
    with torch.no_grad():
        other.experts.w1.copy_(layer.experts.w1[names]), other.experts.w2.copy_(layer.experts.w2[names])
        for p, q in zip(other.routers.parameters(), layer.routers.parameters()):
            p.copy_(q[:, names])
    torch.testing.assert_close(other({"a": x})[0]["a"], y)


def test_tasks_share_experts_but_not_routers():
    torch.manual_seed(0)
    layer = random_layer().eval()
    x = torch.randn(1, C, 4, 4)
    together, routing = layer({"a": x, "b": x})
    assert not torch.equal(routing["a"].indices, routing["b"].indices)
    for t in "ab":
        torch.testing.assert_close(together[t], layer({t: x})[0][t])


def test_routing_is_float32_under_autocast():
    layer = random_layer().train()
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer({"a": torch.randn(1, C, 2, 2)})
    assert {routing["a"].weights.dtype, routing["a"].load.dtype} == {torch.float32}


# ---- balance ----

def test_balance_loss_by_hand():
    """Two experts, two tasks: each task uses one expert alone, together they use both: perfectly balanced."""
    def routing(winner):
        one_hot = torch.nn.functional.one_hot(torch.full((4,), winner), 2).float()
        return model.Routing(torch.full((4, 1), winner), torch.ones(4, 1), one_hot, one_hot, (1, 2, 2))
    assert float(balance_loss({"a": routing(0), "b": routing(1)})) == 0
    # all on one: importance (1, 0) has mean 1/2 and variance 1/4, so CV^2 = 1; the load the same
    assert float(balance_loss({"a": routing(0), "b": routing(0)})) == pytest.approx(2)
    # a task with more tokens weighs as much as one with fewer
    many = model.Routing(*(x.repeat(5, 1) for x in routing(0)[:4]), (5, 2, 2))
    assert float(balance_loss({"a": many, "b": routing(1)})) == 0


def test_gradients_are_finite_at_perfect_balance():
    layer = ExpertLayer(C, ["a"], E, 2).train()
    loss = balance_loss(layer({"a": torch.randn(2, C, 3, 3)})[1])
    loss.backward()
    assert layer.routers["a"].gate.grad.isfinite().all()


@pytest.mark.parametrize("balance,recovers", [(0.1, True), (0.0, False)])
def test_a_collapsed_router_recovers_by_the_balance_loss_and_not_without(balance, recovers):
    torch.manual_seed(0)
    layer = ExpertLayer(C, ["a"], 4, 1, dropout=0.0).train()
    with torch.no_grad():
        layer.norm.bias[0] = 1.0
        layer.norm.weight[0] = 0.0
        layer.routers["a"].gate[0] = torch.tensor([4.0, 0.0, 0.0, 0.0])  # everything goes to expert 0
    optimizer = torch.optim.Adam(layer.routers.parameters(), 0.05)
    x = torch.randn(8, C, 4, 4)
    for _ in range(200):
        routing = layer({"a": x})[1]
        loss = balance * balance_loss(routing) + 0 * layer.routers["a"].gate.sum()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    used = torch.bincount(layer({"a": x})[1]["a"].indices.flatten(), minlength=4) / 128
    assert (used.min() > 0.1) == recovers


def test_chosen_must_fit_experts():
    for chosen in (0, 5):
        with pytest.raises(ValueError, match=f"--chosen {chosen} of --experts 4"):
            ExpertLayer(C, ["a"], 4, chosen)


def test_pooled_head_ignores_where():
    encoder = Encoder("b0")
    head = PooledHead(encoder, 3).eval()
    maps = [torch.randn(1, c, 64 >> i, 64 >> i) for i, c in enumerate(encoder.channels)]
    torch.testing.assert_close(head(maps), head([m.flip(2, 3) for m in maps]))
    for i in range(1, 5):  # strides 4 to 32 all count
        other = [m + (k == i) for k, m in enumerate(maps)]
        assert not torch.allclose(head(other), head(maps))
