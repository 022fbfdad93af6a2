#!/usr/bin/env bash
# torch 2.14.1: pixel_shuffle takes a batch without rows, and its backward pass refuses it. Where several processes share
# a batch of partly labelled photographs, one of them may have no row for the mask head, and still needs its gradient.
# Convolution and interpolation have one there. Exit status 1: that is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F


def try_it(name, function):
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    y = function(x)
    try:
        y.sum().backward()
        seen = f"gradient {tuple(x.grad.shape)}"
    except RuntimeError as error:
        seen = str(error).splitlines()[0]
    print(f"{name}: {tuple(x.shape)} -> {tuple(y.shape)}; {seen}")
    return seen


print("torch", torch.__version__)
conv = torch.nn.Conv2d(8, 2, 3, padding=1)
fine = [try_it("conv2d", conv), try_it("interpolate", lambda x: F.interpolate(x, scale_factor=2.0))]
shuffled = try_it("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2))
# seen: conv2d and interpolate: gradient (0, 8, 4, 4); pixel_shuffle: "Function PixelShuffleBackward0 returned an invalid
# gradient at index 0 - got [0, 2, 8, 8] but expected shape compatible with [0, 8, 4, 4]"
sys.exit(not (all(s == "gradient (0, 8, 4, 4)" for s in fine) and "PixelShuffleBackward0" in shuffled))
PYTHON
