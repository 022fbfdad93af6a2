"""The expert layer against independent oracles: a dense loop, new noise, counted multiply-adds, values by hand."""

import copy
import math

import benchmark
import known_truths
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from benchmark import multiply_adds

import model
from model import Experts, MoELayer, NoisyTopKRouter, Routing, load_balancing_loss
from retina.datasets import synthetic
from retina.training import precision


C, E = 24, 6


def random_layer(experts=E, top_k=2, tasks=("a", "b"), channels=C, **controls) -> MoELayer:
    """A layer that is not in its neutral starting state."""
    layer = MoELayer(channels, tasks, experts, top_k, dropout=0.0, **controls)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.5)
    return layer


# ---- the router ----

@pytest.mark.parametrize("top_k", [1, 2, 3, E])
@pytest.mark.parametrize("training", [False, True])
def test_router_chooses_k_distinct_experts(top_k, training):
    torch.manual_seed(0)
    router = random_layer(top_k=top_k).routers["a"].train(training)
    r = router(torch.randn(200, C), (200, 1, 1))
    assert all(len(set(row)) == top_k for row in r.experts.tolist())
    torch.testing.assert_close(r.probabilities.sum(1), torch.ones(200))
    if top_k > 1:
        torch.testing.assert_close(r.gates.sum(1), torch.ones(200))
        assert (r.gates.diff(dim=1) <= 0).all()  # best first
    else:
        assert (r.gates < 1).all() and (r.gates > 1 / E - 1e-6 if not training else r.gates > 0).all()


def test_router_without_noise_by_hand():
    """Logits 3, 1, 2: experts 0 and 2, with weights e^3 and e^2 over their sum; alone, expert 0 with e^3 over all."""
    e = [math.exp(h) for h in (3, 1, 2)]
    for top_k, indices, weights in ((2, [0, 2], [e[0] / (e[0] + e[2]), e[2] / (e[0] + e[2])]),
                                    (1, [0], [e[0] / sum(e)])):
        router = NoisyTopKRouter(1, 3, top_k).eval()
        with torch.no_grad():
            router.gate[0] = torch.tensor([3.0, 1.0, 2.0])
        r = router(torch.ones(1, 1), (1, 1, 1))
        assert r.experts.tolist() == [indices] and r.load.sum() == top_k
        assert r.gates[0].tolist() == pytest.approx(weights)
        assert r.probabilities[0].tolist() == pytest.approx([x / sum(e) for x in e])
        assert r.to_dense(r.gates)[0, indices].tolist() == r.gates[0].tolist() and r.to_dense(1.0).sum() == top_k


def noisy_logits(router: NoisyTopKRouter, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean logits, noise scale, noisy logits: equation 4 of the paper once more."""
    clean, scale = u @ router.gate, F.softplus(u @ router.noise) + 0.01
    return clean, scale, clean + scale * torch.randn_like(clean)


def resampled(estimator, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over 20000 samples of an estimate of the load, for three tokens and five experts, and how often each of them
    was in fact among the top k; (3, 5) each."""
    torch.manual_seed(0)
    router = random_layer(experts=5, top_k=top_k).routers["a"].train()
    torch.nn.init.normal_(router.gate, std=0.1)
    u = torch.randn(3, C).repeat_interleave(20000, 0)
    with torch.no_grad():
        load = estimator(router, u).view(3, 20000, 5).mean(1)
        sampled = noisy_logits(router, u)[2].topk(top_k, dim=1).indices
    return load, F.one_hot(sampled, 5).sum(1).float().view(3, 20000, 5).mean(1)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_is_the_chance_of_being_among_the_top_k_with_new_noise(top_k):
    """The load of one sample conditions on the other experts' noise. Over many samples it must average to how often
    expert i is in fact among the top k, and its sum to K."""
    load, share = resampled(lambda router, u: router(u, (len(u), 1, 1)).load, top_k)
    torch.testing.assert_close(load, share, atol=0.012, rtol=0)
    torch.testing.assert_close(load.sum(1), torch.full((3,), float(top_k)), rtol=0.01, atol=0)


def load_against_softmaxed_thresholds(router: NoisyTopKRouter, u: torch.Tensor) -> torch.Tensor:
    """A common mistake: the logits are compared with thresholds that have been through a softmax."""
    clean, scale, noisy = noisy_logits(router, u)
    k = router.top_k
    top, best = noisy.softmax(1).topk(k + 1, dim=1)
    in_top_k = torch.zeros_like(clean).scatter(1, best[:, :k], 1.0) > 0
    return torch.special.ndtr((clean - torch.where(in_top_k, top[:, k:], top[:, k - 1:k])) / scale)


def load_against_the_kth_of_all(router: NoisyTopKRouter, u: torch.Tensor) -> torch.Tensor:
    """Another: the threshold is the k-th largest of all, expert i included."""
    clean, scale, noisy = noisy_logits(router, u)
    return torch.special.ndtr((clean - noisy.topk(router.top_k, dim=1)[0][:, -1:]) / scale)


@pytest.mark.parametrize("mistake", [load_against_softmaxed_thresholds, load_against_the_kth_of_all])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_oracle_rejects_known_mistakes(mistake, top_k):
    """So that the test above is known to be able to fail: in the shares and in the sum."""
    load, share = resampled(mistake, top_k)
    assert (load - share).abs().max() > 0.012 and (load.sum(1) - top_k).abs().max() > 0.01 * top_k


def test_load_of_one_sample_is_the_conditional_chance():
    """P_i given the *others'* noise: resample expert i's own noise only and count."""
    torch.manual_seed(0)
    h, s, k = torch.randn(6), torch.rand(6) + 0.1, 2
    noisy = h + s * torch.randn(6)
    router = NoisyTopKRouter(6, 6, k).train()
    with torch.no_grad():  # u = 1 row whose products are h and softplus^-1(s - 0.01)
        router.gate.copy_(torch.diag(h)), router.noise.copy_(torch.diag((s - 0.01).expm1().log()))
    original = torch.randn_like
    try:
        torch.randn_like = lambda x: ((noisy - h) / s).expand_as(x)
        load = router(torch.ones(1, 6), (1, 1, 1)).load[0]
    finally:
        torch.randn_like = original
    for i in range(6):
        resampled = noisy.repeat(100000, 1)
        resampled[:, i] = h[i] + s[i] * torch.randn(100000)
        share = (resampled.topk(k).indices == i).any(1).float().mean()
        assert abs(share - load[i]) < 0.01


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_task_loss_alone_teaches_the_router(top_k):
    torch.manual_seed(0)
    layer = random_layer(top_k=top_k).train()
    layer({"a": torch.randn(2, C, 3, 3)})[0]["a"].square().sum().backward()
    assert layer.routers["a"].gate.grad.abs().sum() > 0


def test_a_task_without_tokens_gets_no_gradient_in_its_router():
    layer = random_layer().train()
    y, routing = layer({"a": torch.randn(2, C, 3, 3)})
    (y["a"].square().sum() + load_balancing_loss(routing)).backward()
    assert all(p.grad is not None for p in layer.routers["a"].parameters())
    assert all(p.grad is None for p in layer.routers["b"].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_is_float32_under_autocast(dtype):
    """From the norm on, whatever the map comes in: choices and weights are those of a pass without autocast."""
    torch.manual_seed(0)
    layer = random_layer().eval()
    x = torch.randn(4, C, 5, 5).to(dtype)
    expected = layer({"a": x.float()})[1]["a"]
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer({"a": x})
    r = routing["a"]
    assert {r.gates.dtype, r.load.dtype, r.probabilities.dtype} == {torch.float32}
    assert torch.equal(r.experts, expected.experts) and torch.equal(r.gates, expected.gates)
    assert y["a"].isfinite().all()


# ---- sparse dispatch ----

def dense_loop(experts: Experts, u, indices, weights):
    """What the experts compute, token by token."""
    return torch.stack([sum(w * (F.silu(u[n] @ experts.w1[e]) @ experts.w2[e]) / math.sqrt(experts.w1.shape[2])
                            for e, w in zip(indices[n].tolist(), weights[n])) for n in range(len(u))])


@pytest.mark.parametrize("n,e,k,random", [
    (17, 6, 2, True), (1, 6, 2, True), (5, 1, 1, True), (9, 4, 4, True), (3, 32, 2, True), (12, 6, 1, True),
    (12, 6, 1, False), (12, 6, 2, False)], ids=["usual", "one token", "E = 1", "K = E", "empty experts", "K = 1",
                                                "all to one expert", "all to the same two"])
@pytest.mark.parametrize("grouped", [False, True])
def test_sparse_dispatch_equals_dense_loop(grouped, n, e, k, random):
    torch.manual_seed(n)
    experts = Experts(C, e, 10, 0.0).double()
    if grouped:
        precision.channels_last(experts)
        assert experts.grouped_matmul == precision.GroupedMatmul.apply
    torch.nn.init.normal_(experts.w2)
    u = torch.randn(n, C, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(e)[:k] if random else e - 1 - torch.arange(k) for _ in range(n)])
    weights = torch.rand(n, k, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(n, C, dtype=torch.float64)
    results = []
    for f in (experts, lambda *a: dense_loop(experts, *a)):
        y = f(u, indices, weights)
        gradients = torch.autograd.grad((y * direction).sum(), [u, weights, experts.w1, experts.w2])
        results.append([y, *gradients])
    for fast, dense in zip(*results):
        torch.testing.assert_close(fast, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("experts,top_k", [(6, 1), (6, 2), (6, 6), (1, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_the_layer_equals_all_experts_computed_densely(experts, top_k, training):
    """Both tasks, routers, norm and residual included; noise is the same because the seed is."""
    torch.manual_seed(0)
    layer = random_layer(experts, top_k).double().train(training)
    maps = {t: torch.randn(2, C, 3, 2, dtype=torch.float64, requires_grad=True) for t in "ab"}

    def dense(maps):
        out = {}
        for t, x in maps.items():
            u = F.layer_norm(x.permute(0, 2, 3, 1).reshape(-1, C), (C,), layer.norm.weight, layer.norm.bias)
            r = layer.routers[t](u, (2, 3, 2))
            w = sum(F.one_hot(r.experts[:, j], experts) * r.gates[:, j:j + 1] for j in range(top_k))  # (N, E)
            every = torch.einsum("edc,ned->nec", layer.experts.w2 / math.sqrt(C / 2),
                                 F.silu(torch.einsum("nc,ecd->ned", u, layer.experts.w1)))
            out[t] = x + torch.einsum("ne,nec->nc", w, every).view(2, 3, 2, C).permute(0, 3, 1, 2)
        return out
    results = []
    for f in (lambda m: layer(m)[0], dense):
        torch.manual_seed(1)
        y = f(maps)
        wanted = [*maps.values(), *layer.parameters()]
        gradients = torch.autograd.grad(sum(v.square().sum() for v in y.values()), wanted, allow_unused=True)
        results.append([*y.values(), *(torch.zeros(()) if g is None else g for g in gradients)])
    for sparse, dense_result in zip(*results):
        torch.testing.assert_close(sparse, dense_result, rtol=1e-10, atol=1e-10)


def test_the_benchmark_compares_the_same_layer():
    """All experts computed densely give the layer's answer, and the dense layer costs what two experts cost."""
    torch.manual_seed(0)
    layer = random_layer(4, 2, ("a",), channels=benchmark.C).eval()
    x = torch.randn(1, benchmark.C, 3, 3)
    torch.testing.assert_close(benchmark.AllExperts(layer)(x), layer({"a": x})[0]["a"], rtol=1e-4, atol=1e-4)
    router = 9 * benchmark.C * 2 * 4
    assert benchmark.multiply_adds(benchmark.Dense(), x) == benchmark.multiply_adds(layer, {"a": x}) - router


@pytest.mark.parametrize("e", [4, 8, 16, 32, 64])
def test_the_number_of_tokens_that_experts_compute_is_n_times_k(e):
    """A token costs C * hidden twice; what is counted is the work done, forward, whatever E is."""
    torch.manual_seed(0)
    n, k, hidden = 100, 2, 10
    indices = torch.stack([torch.randperm(e)[:k] for _ in range(n)])
    count = multiply_adds(Experts(C, e, hidden, 0.0), torch.randn(n, C), indices, torch.full((n, k), 0.5))
    assert count == n * k * 2 * C * hidden
    layer = random_layer(e, k)
    routers = 2 * n * C * 2 * e  # two tasks, gate and noise
    assert multiply_adds(layer, {t: torch.randn(1, C, 10, 10) for t in "ab"}) == routers + 2 * n * k * 2 * C * C // 2


def test_nan_reaches_exactly_the_tokens_that_chose_the_expert():
    """In the answers and in the gradients of the tokens. An implementation that computes all experts and multiplies
    the others by zero fails here."""
    torch.manual_seed(0)
    experts = Experts(C, E, 10, 0.0)
    torch.nn.init.normal_(experts.w2)
    with torch.no_grad():
        experts.w1[3] = math.nan
    indices = torch.stack([torch.randperm(E)[:2] for _ in range(50)])
    u = torch.randn(50, C, requires_grad=True)
    y = experts(u, indices, torch.full((50, 2), 0.5))
    y.sum().backward()
    assert torch.equal(y.isnan().any(1), (indices == 3).any(1))
    assert torch.equal(u.grad.isnan().any(1), (indices == 3).any(1))
    assert 0 < int((indices == 3).any(1).sum()) < 50


# ---- the layer ----

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


def test_batchmates_do_not_matter():
    torch.manual_seed(0)
    layer = random_layer().eval().double()
    x = torch.randn(5, C, 2, 3, dtype=torch.float64)
    together, routing = layer({"a": x})
    single, single_routing = layer({"a": x[2:3]})
    torch.testing.assert_close(single["a"], together["a"][2:3], rtol=1e-12, atol=1e-12)
    assert torch.equal(single_routing["a"].experts, routing["a"].experts[12:18])


def test_tasks_share_experts_but_not_routers():
    torch.manual_seed(0)
    layer = random_layer().eval()
    x = torch.randn(1, C, 4, 4)
    together, routing = layer({"a": x, "b": x})
    assert not torch.equal(routing["a"].experts, routing["b"].experts)
    for t in "ab":
        torch.testing.assert_close(together[t], layer({t: x})[0][t])


def test_the_seed_decides_everything():
    layer, x = random_layer().train(), torch.randn(2, C, 4, 4)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(layer({"a": x})[0]["a"])
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("router", model.ROUTERS)
def test_state_dict_round_trip(router, tmp_path):
    """Also of what is random and never learns."""
    torch.manual_seed(0)
    layer = random_layer(4, 4 if router == "uniform" else 2, router=router).eval()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    torch.manual_seed(1)
    other = MoELayer(C, ("a", "b"), 4, 4 if router == "uniform" else 2, router, dropout=0.0).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(2, C, 3, 3)
    for t in "ab":
        assert torch.equal(layer({t: x})[0][t], other({t: x})[0][t])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    """Values and gradients; aot_eager traces without generating code, inductor is the default and needs a compiler,

    and a minute for training alone.
    """
    torch.manual_seed(0)
    layer = random_layer(3).double()  # each expert is code of its own
    x = torch.randn(2, C, 3, 3, dtype=torch.float64)
    results = []
    # the same generator as eager; no processes that import torch again, no trial of each set of instructions
    with torch._inductor.config.patch({"fallback_random": True, "compile_threads": 1, "cpp.vec_isa_ok": True}):
        for f in (layer, torch.compile(layer, backend=backend)):
            for mode in (True, False)[:1 if backend == "inductor" else 2]:
                layer.train(mode).zero_grad()
                torch.manual_seed(1)
                y, routing = f({"a": x, "b": x})
                (sum(v.square().sum() for v in y.values()) + load_balancing_loss(routing)).backward()
                results.append([*y.values(), *routing["a"][:4], *(p.grad.clone() for p in layer.parameters())])
    half = len(results) // 2
    for eager, compiled in zip(sum(results[:half], []), sum(results[half:], []), strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_equals_cpu(autocast):
    torch.manual_seed(0)
    layer = random_layer().eval()
    x = torch.randn(4, C, 5, 5)
    y, routing = layer({"a": x, "b": x})
    precision.channels_last(layer.cuda())
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        (z, there), (again, _) = (layer({"a": x.cuda(), "b": x.cuda()}) for _ in range(2))
    assert torch.equal(z["a"], again["a"])
    share = (there["a"].experts.cpu() == routing["a"].experts).float().mean()
    assert share > 0.98  # ties may fall the other way
    if not autocast:
        same = (there["a"].experts.cpu() == routing["a"].experts).all(1).view(4, 5, 5)
        pair = (v["a"].cpu().permute(0, 2, 3, 1)[same] for v in (z, y))
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_routes_are_learned_where_only_the_layer_can_tell_cameras_apart():
    """One of the five seeds of docs/experts.md. Their means are 0.973, 0.893, 0.876 and 0.589, 0.01 apart or less, and
    0.03 with the routes of other cameras."""
    learn, judge = known_truths.tokens_seen(16, 20_000, 1), known_truths.tokens_seen(16, 4_000, 2)
    _, measured, bits = known_truths.measure_routing(learn, judge, 1)
    accuracy = {name: m.scores[0].metrics()["cls"]["accuracy"] for name, m in measured.items()}
    assert accuracy["learned"] > 0.94 and max(accuracy[name] for name in ("dense", "large", "cls_single")) < 0.93
    assert accuracy["swapped"] < 0.7 and bits[0] > 1


def test_sixteen_cameras_ask_eight_questions():
    """An eye with haemorrhages alone, its disc on the left."""
    eye = synthetic.Eye((0, 0), True, (0.3, 0.5), (0.6, 0.5), 0.48, [synthetic.Blob("HE", 0.5, 0.5, 0.02)])
    here = [False, True, False, True]  # microaneurysms, haemorrhages, exudates, left disc
    assert [known_truths.reply(eye, k) for k in range(16)] == 2 * (here + [not x for x in here])


# ---- controls ----

def test_uniform_mixing_is_one_wide_dense_network():
    """Hidden layers side by side, second matrices on top of each other, times (1 / 4 of the mean) * sqrt(4 D / D)."""
    torch.manual_seed(0)
    layer = random_layer(4, 4, ("a",), router="uniform").double()
    wide = random_layer(1, 1, ("a",), ratio=4 * 0.5).double()
    wide.norm.load_state_dict(layer.norm.state_dict())
    with torch.no_grad():
        wide.experts.w1.copy_(torch.cat(list(layer.experts.w1), 1)[None])
        wide.experts.w2.copy_(torch.cat(list(layer.experts.w2), 0)[None] / 2)
    x = torch.randn(2, C, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer({"a": x})[0]["a"], wide({"a": x})[0]["a"], rtol=1e-12, atol=1e-12)


def test_dense_adapters_of_equal_cost_and_of_equal_parameters():
    n, maps = 100, {"a": torch.randn(1, C, 10, 10)}
    layer = MoELayer(C, ["a"], 8, 2)
    cost, size = MoELayer(C, ["a"], 1, 1, ratio=1.0), MoELayer(C, ["a"], 1, 1, ratio=4.0)
    routers = [n * C * 2 * e for e in (8, 1)]  # gate and noise
    assert multiply_adds(layer, maps) - routers[0] == multiply_adds(cost, maps) - routers[1]
    assert sum(p.numel() for p in layer.experts.parameters()) == sum(p.numel() for p in size.experts.parameters())
    assert cost(maps)[1]["a"].gates.eq(1).all()


def test_private_experts_serve_one_task():
    torch.manual_seed(0)
    layer = random_layer(6, 3, router="private").train()
    with torch.no_grad():
        layer.experts.w1[3:] = math.nan
    x = torch.randn(2, C, 3, 3)
    y, routing = layer({"a": x, "b": x})
    assert y["a"].isfinite().all() and y["b"].isnan().all()
    assert set(routing["b"].experts.flatten().tolist()) == {3, 4, 5}
    assert (routing["a"].gates == 1 / 3).all() and routing["a"].load.sum(1).eq(3).all()
    assert load_balancing_loss(routing) < 1e-10


def test_random_router_is_frozen():
    """It never learns, neither do others learn to please it, it draws no noise, and tasks have one each."""
    torch.manual_seed(0)
    layer = MoELayer(C, ("a", "b"), 8, 2, "random", dropout=0.0).train()
    torch.nn.init.normal_(layer.experts.w2)
    x = torch.randn(2, C, 9, 9, requires_grad=True)
    y, routing = layer({"a": x, "b": x})
    assert not load_balancing_loss(routing).requires_grad and not routing["a"].gates.requires_grad
    assert torch.equal(layer({"a": x, "b": x})[1]["a"].experts, routing["a"].experts)
    assert not torch.equal(routing["a"].experts, routing["b"].experts)
    assert torch.bincount(routing["a"].experts.flatten(), minlength=8).min() > 0
    y["a"].square().sum().backward()
    assert all(p.grad is None for p in layer.routers.parameters()) and layer.experts.w1.grad.abs().sum() > 0


def test_shared_router_treats_tasks_alike():
    torch.manual_seed(0)
    layer = random_layer(router="shared").eval()
    x = torch.randn(2, C, 3, 3)
    y, routing = layer({"a": x, "b": x})
    assert torch.equal(routing["a"].experts, routing["b"].experts)
    assert torch.equal(routing["a"].gates, routing["b"].gates)
    torch.testing.assert_close(y["a"], y["b"], rtol=0, atol=1e-6)  # a row's place in a matrix product may round it
    assert sum(p.numel() for p in layer.routers.parameters()) == 2 * C * E


@pytest.mark.parametrize("experts,top_k,router,message", [
    (4, 0, "learned", "--top-k 0: expected 1 to 4, the number of --num-experts"),
    (4, 5, "learned", "--top-k 5: expected 1 to 4, the number of --num-experts"),
    (4, 2, "clever", "--router clever: expected one of learned, shared, random, uniform, private"),
    (4, 2, "uniform", "--top-k 2: --router uniform mixes all 4 experts; leave --top-k out"),
    (8, 2, "private", "2 tasks with --top-k 2 experts each need --num-experts 4; with 8, 4 would have no task"),
    (4, 3, "private", "2 tasks with --top-k 3 experts each need --num-experts 6; with 4, 2 are missing"),
])
def test_numbers_that_do_not_fit(experts, top_k, router, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(C, ("a", "b"), experts, top_k, router)


# ---- balance ----

def test_balance_loss_by_hand():
    """Two experts, two tasks: each task uses one expert alone, together they use both: perfectly balanced."""
    def routing(winner):
        one_hot = F.one_hot(torch.full((4,), winner), 2).float()
        return Routing(torch.full((4, 1), winner), torch.ones(4, 1), one_hot, one_hot, (1, 2, 2))
    assert float(load_balancing_loss({"a": routing(0), "b": routing(1)})) == 0
    # all on one: importance (1, 0) has mean 1/2 and variance 1/4, so CV^2 = 1; the load the same
    assert float(load_balancing_loss({"a": routing(0), "b": routing(0)})) == pytest.approx(2)
    # a task with more tokens weighs as much as one with fewer
    many = Routing(*(x.repeat(5, 1) for x in routing(0)[:4]), (5, 2, 2))
    assert float(load_balancing_loss({"a": many, "b": routing(1)})) == 0
    # importance (3/4, 1/4): mean 1/2, deviation 1/4, CV^2 = 1/4; load (1, 1): 0
    half, one = torch.full((1, 2), 0.5), torch.ones(1, 2)
    both = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]), half, one, (1, 1, 1))
    assert float(load_balancing_loss({"a": both})) == pytest.approx(0.25)


@pytest.mark.parametrize("training,top_k", [(True, 2), (False, E)])
def test_gradients_are_finite_at_perfect_balance(training, top_k):
    """Without noise and with K = E all is exactly equal; a square root (CV in place of CV^2) would give nan there."""
    layer = MoELayer(C, ["a"], E, top_k).train(training)
    loss = load_balancing_loss(layer({"a": torch.randn(2, C, 3, 3)})[1])
    loss.backward()
    assert (loss < 1e-12) == (not training)
    assert layer.routers["a"].gate.grad.isfinite().all()


@pytest.mark.parametrize("balance,recovers", [(0.3, True), (0.0, False)])
def test_a_collapsed_router_recovers_by_the_balance_loss_and_not_without(balance, recovers):
    """While a task is learned, from a start where all tokens go to expert 0: the task alone keeps them there.

    The weight is 30 times the default, which is there to keep a balance from the start, not to find it again: with 0.01
    in place of 0.3, expert 0 still has 95 % of the tokens after these steps.
    """
    torch.manual_seed(0)
    layer = MoELayer(C, ["a"], 4, 1, dropout=0.0).train()
    with torch.no_grad():
        layer.norm.bias[0] = 1.0
        layer.norm.weight[0] = 0.0
        layer.routers["a"].gate[0] = torch.tensor([4.0, 0.0, 0.0, 0.0])  # whatever the token
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    x = torch.randn(8, C, 4, 4)
    for _ in range(200):
        y, routing = layer({"a": x})
        loss = F.mse_loss(y["a"], -x) + balance * load_balancing_loss(routing)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    used = torch.bincount(layer({"a": x})[1]["a"].experts.flatten(), minlength=4) / 128
    assert (used.min() > 0.1) == recovers and (used.max() > 0.9) != recovers
