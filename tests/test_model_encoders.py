"""Another encoder is one class and one line: a ResNet of torchvision's, random weights, through every command."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from test_train import weights
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import evaluate
import model
import train
import visualize
from model import ENCODERS, EncoderSpec, Net, NetConfig
from retina.datasets import records
from retina.files import InputError
from retina.training import precision, pretrained
from tasks import make_tasks


pytestmark = pytest.mark.usefixtures("few_drawings", "few_resamples")

ALL = ("cls", "dme", "seg", "loc")
CPU = torch.device("cpu")


def shallow_resnet() -> torchvision.models.ResNet:
    """A ResNet-18 with one block in each stage."""
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])


class ResNet(nn.Module):
    """(B, 3, H, W) -> five maps; names mirror torchvision's."""
    channels = (64, 64, 128, 256, 512)

    def __init__(self, stochastic_depth: float):
        super().__init__()
        resnet = shallow_resnet()
        self.conv1, self.bn1 = resnet.conv1, resnet.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = \
            resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(maps[0], 3, 2, 1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(x := layer(x))
        return maps


class Tiny(nn.Module):
    """Five convolutions of stride 2, some in groups and with a bias, and a word on how its maps are pooled."""
    channels = (4, 8, 8, 16, 12)
    classifier_head = {"last_channels": 24, "norm": nn.InstanceNorm2d, "dropout": 0.5}

    def __init__(self, stochastic_depth: float):
        super().__init__()
        self.drop = stochastic_depth
        widths = zip((3, *self.channels), self.channels, (1, 4, 8, 8, 4))
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1, groups=groups) for i, o, groups in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x).relu())
        return tuple(maps)


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    monkeypatch.setitem(ENCODERS, "resnet", EncoderSpec(ResNet))
    monkeypatch.setitem(ENCODERS, "tiny", EncoderSpec(Tiny))


def begin(name: str, *flags: str) -> Path:
    """python train.py with a ResNet, few drawings and small experts; -> the run's folder."""
    train.main(["--tasks", *ALL, "--encoder", "resnet", "--image-size", "64", "--epochs", "1", "--batch-size", "8",
                "--num-experts", "4", "--expert-ratio", "0.1", "--precision", "fp32", "--name", name, *flags])
    return records.HERE / "runs" / name


@pytest.fixture
def run() -> Path:
    """A run with a ResNet, trained once for this file."""
    folder = records.HERE / "runs" / "resnet"
    return folder if folder.exists() else begin(folder.name)


def evaluated(monkeypatch, capsys, *arguments) -> str:
    """What python evaluate.py says."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()
    return capsys.readouterr().out


def net_of(variant: str, tasks=ALL, **config) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(encoder=variant, **config), make_tasks(tasks))


# ---- every command ----

def test_it_trains_and_is_scored(run, monkeypatch, capsys):
    assert {k for k in weights(run, "best.pt") if k.startswith("encoder.layer4.0.")}
    said = evaluated(monkeypatch, capsys, run)
    found, log = json.loads((run / "metrics.json").read_text()), json.loads((run / "log.jsonl").read_text())
    assert set(found["metrics"]) == {*ALL, "joint"} and "wrote per_photograph.csv" in said
    # the folded network is the one that was trained
    assert found["metrics"]["seg"]["dice"] == pytest.approx(log["val"]["seg"]["dice"], abs=1e-4)


def test_its_experts_are_described(run, monkeypatch, capsys):
    evaluated(monkeypatch, capsys, run, "--routing")
    assert (run / "routing.json").exists() and (run / "interventions.json").exists()


def test_it_answers_for_new_photographs(run, tmp_path, monkeypatch, capsys, shared_tree):
    for i, path in enumerate(sorted(shared_tree.rglob("*.jpg"))[:2]):
        shutil.copy(path, tmp_path / f"{i}.jpg")
    said = evaluated(monkeypatch, capsys, run, "--images", tmp_path, "--out", tmp_path / "out")
    assert "2 of 2 photographs answered for" in said and (tmp_path / "out" / "predictions.csv").exists()


def test_its_pictures_are_drawn(run, capsys):
    visualize.main([str(run)])
    assert capsys.readouterr().out.count("not drawn") == 1  # sentences, of which the data set has none
    for name, (_, form) in visualize.FIGURES.items():
        assert name == "sentences" or min(Image.open(run / "pictures" / f"{name}.{form}").size) > 100


def test_a_stopped_run_goes_on_to_the_same_weights(run, monkeypatch):
    whole, calls = ResNet.forward, []

    def stopped(self, x):
        calls.append(len(x))
        if len(calls) == 2:  # of three
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, x)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(ResNet, "forward", stopped)
        begin("paused")
    folder = records.HERE / "runs" / "paused"
    assert len(calls) == 2 and not (folder / "best.pt").exists()
    train.main(["--resume", str(folder)])
    one, other = weights(run), weights(folder)
    assert all(torch.equal(one[k], other[k]) for k in one)


# ---- its maps, and what heads make of them ----

@pytest.mark.parametrize("place", model.MOE_PLACES)
@pytest.mark.parametrize("variant", ["resnet", "tiny"])
def test_maps_and_outputs_have_the_right_shapes(variant, place):
    net = net_of(variant, moe_at=place).eval()
    x = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    maps = net.encoder(x.float())
    assert [tuple(m.shape) for m in maps] == [(2, c, 32 >> i, 48 >> i) for i, c in enumerate(net.encoder.channels)]
    with torch.no_grad():
        outputs, routing = net(x)
    assert {t: tuple(y.shape) for t, y in outputs.items()} == {
        "cls": (2, 5), "dme": (2, 3), "seg": (2, 5, 64, 96), "loc": (2, 2, 8, 12)}
    assert {r.grid for r in routing.values()} == {(2, 2, 3) if place == "bottleneck" else (2, 16, 24)}


def test_the_first_convolution_of_a_head_is_as_the_encoder_says_or_a_sane_one():
    conv, dropout = net_of("resnet").heads["cls"].conv, net_of("resnet").heads["cls"].dropout
    assert conv[0].weight.shape == (1280, 512, 1, 1) and type(conv[1]) is nn.BatchNorm2d and dropout.p == 0.2
    conv, dropout = net_of("tiny").heads["cls"].conv, net_of("tiny").heads["cls"].dropout
    assert conv[0].weight.shape == (24, 12, 1, 1) and type(conv[1]) is nn.InstanceNorm2d and dropout.p == 0.5


def test_an_encoder_is_told_of_stochastic_depth():
    assert net_of("tiny", stochastic_depth=0.3).encoder.drop == 0.3


@pytest.mark.parametrize("variant", ["resnet", "tiny"])
def test_what_makes_it_faster_changes_no_answer(variant):
    """In float64, where rounding does not hide a mistake."""
    net = net_of(variant).double().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(x)[0]
        quick = precision.channels_last(net)
        for n in (quick, precision.fuse_conv_bn(quick)):
            found = n(x)[0]
            for t in expected:
                torch.testing.assert_close(found[t], expected[t], rtol=1e-9, atol=1e-9)


def test_only_depthwise_convolutions_as_ours_are_replaced():
    """Ours has a bias for none and one channel for each kernel; Tiny's, in groups, are others."""
    x, encoder = torch.randn(2, 3, 64, 64), Tiny(0.0)
    with precision.autocast(CPU, "bf16"):  # ours differs in this precision alone
        expected = encoder(x)[-1]
        found = precision.channels_last(encoder)(x)[-1]
    assert expected.requires_grad and not any(isinstance(m, precision.DepthwiseConv) for m in encoder.modules())
    torch.testing.assert_close(found, expected)


# ---- published weights ----

@pytest.mark.parametrize("variant", list(ENCODERS))
def test_torchvision_publishes_what_is_listed(variant):
    published = ENCODERS[variant].weights
    if published not in pretrained.PACKAGED:  # which a test in test_model.py compares with the package
        assert torchvision.models.get_model_weights(published).DEFAULT.url.endswith(".pth")


def test_weights_that_are_not_published_are_one_line():
    with pytest.raises(InputError, match="^--encoder-weights imagenet: model.py names none for --encoder resnet; use "
                                         "--encoder-weights none, or --encoder-weights FILE") as caught:
        begin("none_published", "--encoder-weights", "imagenet")
    assert "\n" not in str(caught.value) and not (records.HERE / "runs" / "none_published").exists()


def test_the_model_that_is_listed_is_asked_for(monkeypatch):
    asked = []

    def look(name):
        asked.append(name)
        raise KeyError
    monkeypatch.setattr(torchvision.models, "get_model_weights", look)
    monkeypatch.setitem(ENCODERS, "resnet", EncoderSpec(ResNet, "resnet", left_out=("fc.",)))
    with pytest.raises(KeyError):
        pretrained.start_from(net_of("resnet"), "imagenet", "resnet")
    assert asked == ["resnet"]


def test_a_file_of_weights_loads_but_for_what_is_left_out(tmp_path, monkeypatch):
    torch.manual_seed(1)
    oracle, path = shallow_resnet(), tmp_path / "resnet.pth"
    torch.save(oracle.state_dict(), path)
    with pytest.raises(InputError, match="resnet.pth, --encoder resnet: not the weights of this ResNet: "
                                         "fc.weight is not part of this network; fc.bias is not part of this network$"):
        pretrained.start_from(net_of("resnet"), str(path), "resnet")
    monkeypatch.setitem(ENCODERS, "resnet", EncoderSpec(ResNet, left_out=("fc.",)))
    net = net_of("resnet")
    pretrained.start_from(net, str(path), "resnet")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():  # torchvision's own classifier says the same of our bottleneck
        bottleneck = net.eval().encoder(x)[-1]
        torch.testing.assert_close(oracle.eval()(x), oracle.fc(bottleneck.mean((2, 3))))


def test_the_part_for_heads_goes_to_each_of_them(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", EncoderSpec(Tiny, to_head=("top.",), left_out=("end.",)))
    net = net_of("tiny")
    state = {k: torch.randn_like(v) for k, v in net.encoder.state_dict().items()}
    state |= {"top.0.weight": torch.randn(24, 12, 1, 1), "end.weight": torch.zeros(1)}
    pretrained.load_pretrained(net, state)
    assert all(torch.equal(v, state[k]) for k, v in net.encoder.state_dict().items())
    for task in ("cls", "dme"):
        assert torch.equal(net.heads[task].conv[0].weight, state["top.0.weight"])
    pretrained.load_pretrained(net_of("tiny", ["seg"]), state)  # no head takes it


@pytest.mark.parametrize("spoil,message", [
    (lambda state: state.pop("features.8.1.bias"), "features.8.1.bias is missing"),
    (lambda state: state.update({"features.8.0.weight": torch.zeros(1280, 320)}),
     r"features.8.0.weight is \(1280, 320\), expected \(1280, 320, 1, 1\)"),
    (lambda state: state.update({"features.7.9.weight": torch.zeros(1)}), "features.7.9.weight is not part of this"),
])
def test_weights_that_do_not_fit_leave_the_network_as_it_was(spoil, message):
    net, state = net_of("b0"), torchvision.models.efficientnet_b0(weights=None).state_dict()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    spoil(state)
    with pytest.raises(ValueError, match=f"^not the weights of this EfficientNet: {message}"):
        pretrained.load_pretrained(net, state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- an encoder that is not there (any more) ----

def test_a_run_of_an_unknown_encoder_is_one_line(run, monkeypatch):
    monkeypatch.delitem(ENCODERS, "resnet")
    said = "trained with the encoder 'resnet', which model.py does not list \\(b0, b1, .*\\)"
    with pytest.raises(InputError, match=f"best.pt: {said}") as caught:
        evaluate.load_run(run, CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=said):
        train.main(["--resume", str(run)])


def test_an_unknown_encoder_on_the_command_line_is_told_what_there_is():
    with pytest.raises(InputError, match="--encoder b9: no such encoder; there are b0, .*, resnet"):
        begin("unknown", "--encoder", "b9")
