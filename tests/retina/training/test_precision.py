"""The measures of speed.py change no answer; a step does what is needed, once, and waits for no GPU."""

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import model
import tasks
import train
from conftest import TINY, log, state_and_batch
from model import Net, NetConfig
from retina.files import InputError, RunError
from retina.training import diagnostics, precision
from retina.training.checkpoint import RunFolder
from retina.training.diagnostics import LossMonitor
from tasks import make_tasks


pytestmark = pytest.mark.usefixtures("few_drawings")

CPU = torch.device("cpu")
FOUR = make_tasks(["cls", "dme", "seg", "loc"])
MOE_PLACES = pytest.mark.parametrize("place", model.MOE_PLACES)


def plain_net(place: str = "bottleneck") -> Net:
    """As anyone would write it: channels first, torch's own convolutions; norms with statistics of their own."""
    torch.manual_seed(0)
    net = Net(NetConfig(num_experts=4, stochastic_depth=0.0, expert_dropout=0.0, moe_at=place), FOUR)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2), nn.init.uniform_(m.weight, 0.5, 1.5)
    nn.init.normal_(net.experts.experts.w2, std=0.05)  # not their neutral start
    return net


def images(number: int = 3, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(1))


def close(one: Tensor, other: Tensor, share: float) -> bool:
    """Within a share of the largest entry."""
    return bool((one - other).abs().max() <= share * other.abs().max())


# ---- the same answers ----

@MOE_PLACES
def test_answers_of_the_fast_and_of_the_folded_network_are_the_plain_ones(place):
    net = plain_net(place).eval()
    quick = precision.channels_last(copy.deepcopy(net))
    folded = precision.fuse_conv_bn(quick)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in quick.modules())
    with torch.no_grad():
        expected, found, short = (n(images())[0] for n in (net, quick, folded))
    for t in expected:
        torch.testing.assert_close(found[t], expected[t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(short[t], expected[t], rtol=1e-5, atol=1e-5)


def test_gradients_of_the_fast_network_are_the_plain_ones():
    """In float64, where rounding does not hide a mistake."""
    net = plain_net().double().train()
    quick = precision.channels_last(copy.deepcopy(net))
    indices = {"cls": torch.tensor([0, 2]), "seg": torch.tensor([1]), "loc": torch.tensor([0, 1, 2])}
    for n in (net, quick):
        torch.manual_seed(2)  # the router's noise and dropout
        sum(x.square().mean() for x in n(images().double(), indices)[0].values()).backward()
    for (name, one), other in zip(quick.named_parameters(), net.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padded", [True, False])
def test_depthwise_convolution_in_bf16(kernel, stride, padded):
    """Against float64 on the same numbers: nothing is lost but what bf16 cannot hold. Lite variants pad themselves."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, 12, 15 - padded).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    padding = kernel // 2 if padded else 0
    conv = precision.DepthwiseConv(8, 8, kernel, stride, padding, groups=8, bias=False)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.bfloat16())
    wide, kernels = x.detach().double().requires_grad_(), conv.weight.detach().double().requires_grad_()
    expected = F.conv2d(wide, kernels, None, stride, padding, groups=8)
    with precision.autocast(CPU, "bf16"):
        y = conv(x)
    assert "DepthwiseBackward" in y.grad_fn.name() and y.dtype == torch.bfloat16
    gradient = torch.randn_like(y)
    y.backward(gradient), expected.backward(gradient.double())
    assert close(y.double(), expected, 0.005)
    assert close(x.grad.double(), wide.grad, 0.005)
    assert close(conv.weight.grad.double(), kernels.grad, 0.005)  # sums, which oneDNN returns in bf16


def test_depthwise_convolution_in_float32_is_torchs_own():
    conv = precision.channels_last(plain_net()).encoder.features[1][0].block[0][0]
    assert isinstance(conv, precision.DepthwiseConv)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    assert "Depthwise" not in conv(x).grad_fn.name()
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, None, 1, 1, groups=32))


def test_the_gradient_in_bf16_points_where_that_in_float32_does():
    found = {}
    for how in ("fp32", "bf16"):
        config = replace(TINY, image_size=64, precision=how, stochastic_depth=0.0, expert_dropout=0.0)
        state, batch, learn = state_and_batch(config)
        state.net.train(), torch.manual_seed(0)
        losses = train.task_losses(state, batch, learn.keywords["tasks"], config)
        assert all(v.dtype == torch.float32 for v in losses.values())
        sum(losses.values()).backward()
        assert all(p.dtype == torch.float32 for p in state.net.parameters())
        found[how] = torch.cat([p.grad.flatten() for p in state.net.parameters() if p.grad is not None])
    cosine = F.cosine_similarity(found["fp32"], found["bf16"], 0)
    assert 0.9 < cosine < 0.99999  # it is another precision, and that is all


def test_precision_is_picked_by_the_device(monkeypatch):
    for able in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_f": True, able: True})
        assert precision.default_precision(CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    assert precision.default_precision(CPU) == "fp32"
    assert train.configure(["--device", "cpu"])[0].precision == "fp32"
    assert train.configure(["--device", "cpu", "--precision", "bf16"])[0].precision == "bf16"
    with pytest.raises(InputError, match="--precision fp16: expected a GPU; on a CPU use fp32, or bf16"):
        train.configure(["--device", "cpu", "--precision", "fp16"])


@pytest.mark.gpu
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_learns_on_a_gpu(half):
    """One batch over and over; fp16's scaler begins at 2^16, leaves out steps that overflow, and halves at each."""
    state, batch, learn = state_and_batch(replace(TINY, image_size=64, device="cuda", precision=half))
    state.net.train()
    _, first, *_, last = (learn(state, batch) for _ in range(40))  # on a GPU the losses of the step before
    assert all(last[t] < 0.7 * first[t] for t in ("cls", "seg")), (first, last)
    assert state.monitor.skipped <= (16 if half == "fp16" else 0)  # beyond, gradients overflow without any scale


# ---- no more work than is needed ----

def entered(net: Net, names: dict[str, nn.Module]) -> dict[str, list[int]]:
    """How many photographs enter each of these modules, call by call."""
    seen = {name: [] for name in names}
    for name, module in names.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(len(inputs[0])))
    return seen


def test_each_part_sees_the_photographs_that_need_it():
    state, batch, _ = state_and_batch()
    net, indices = state.net.train(), {"cls": torch.tensor([0, 1, 4]), "seg": torch.tensor([2])}
    heads = net.heads
    seen = entered(net, {"encoder": net.encoder, "decoder": heads["seg"].decoder.blocks[0], "cls": heads["cls"].conv})
    net(batch.images, indices)
    net(batch.images, {"cls": indices["cls"]})  # no photograph with masks: no decoder
    assert seen == {"encoder": [6, 6], "decoder": [1], "cls": [3, 3]}


@MOE_PLACES
def test_heads_get_the_maps_that_they_read_and_no_others(place):
    net = plain_net(place)
    maps, _ = net.routed_maps(images(), {t: torch.tensor([1]) for t in net.heads})
    read = {t: [i for i, m in enumerate(maps[t]) if m is not None] for t in maps}
    assert read == {"cls": [1, 2, 3, 4], "dme": [1, 2, 3, 4],
                    **({"seg": [0, 1, 2, 3, 4], "loc": [2, 3, 4]} if place == "bottleneck" else
                       {"seg": [0, 1], "loc": [1]})}


# ---- nothing waits for a GPU ----

@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_a_step_hangs_on_no_value(how, monkeypatch):
    """Where a host would have to wait for a GPU: under FakeTensorMode item(), nonzero() and `if x` are errors.

    But for one place, where experts learn how many tokens are theirs; it is left out here.
    """
    options = replace(TINY, precision=how)
    _, batch, _ = state_and_batch(options)
    monkeypatch.setattr(diagnostics, "fetch", lambda values: lambda: pytest.fail("read too early"))
    monkeypatch.setattr(model.Experts, "forward", lambda self, u, indices, weights: u * self.w1.sum())
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # fake weights cannot be converted
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        net, task_list = tasks.build_net(asdict(options))
        state = train.make_state(net, task_list, options, 100, CPU)
        state.monitor.lag, state.optimizer = 1, torch.optim.AdamW(net.parameters(), fused=True)  # as on a GPU
        state.schedule = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: 1.0)

        def faked(tensors):
            return {t: fake.from_tensor(x) for t, x in tensors.items()}
        batch = replace(batch, images=fake.from_tensor(batch.images), targets=faked(batch.targets),
                        indices=faked(batch.indices))
        assert train.train_step(state, batch, task_list, options) == {} and state.step == 1
        with pytest.raises(DataDependentOutputException):  # which this test would have met
            batch.images.float().mean().item()


def test_losses_that_are_read_a_step_later_are_the_same(tmp_path, monkeypatch, shallow):
    """A lag of one step, as on a GPU."""
    options = replace(TINY, epochs=2)
    monkeypatch.setattr(RunFolder, "due", lambda run: run.state.step % 3 == 0)
    train.fit(options, tmp_path / "at_once", quiet=True)
    before = LossMonitor.__init__

    def later(self, *arguments):
        before(self, *arguments)
        self.lag = 1
    monkeypatch.setattr(LossMonitor, "__init__", later)
    train.fit(options, tmp_path / "later", quiet=True)
    assert log(tmp_path / "later") == log(tmp_path / "at_once")
    lines = (tmp_path / "later" / "log.jsonl").read_text().splitlines()
    waited = [json.loads(line)["waiting"] for line in lines]
    assert len(waited) == 2 and all(0 < share < 1 for share in waited)


def test_a_loss_that_is_not_finite_is_found_a_step_later_and_nothing_is_saved():
    state, batch, learn = state_and_batch()
    state.monitor.lag = 1
    assert learn(state, batch) == {}
    with torch.no_grad():
        state.net.heads["seg"].conv.bias[0] = math.nan
    assert learn(state, batch)["seg"] > 0
    with pytest.raises(RunError, match="the loss of seg is nan at step 2"):
        state.monitor.read()
