"""Published weights: where they come from, what does not fit."""

import math
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

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


def test_real_data_without_network_starts_from_random_weights_with_a_warning(shared_tree, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    options, notes = train.configure(["--data", str(shared_tree)])
    assert options.encoder_weights == "none" and any("random weights" in note and "no answer" in note for note in notes)
    with pytest.raises(InputError, match="--encoder-weights imagenet: cannot be downloaded .*; use --encoder-weights "
                                         "none"):
        pretrained.read_weights("imagenet", "b0", "efficientnet_b0")
