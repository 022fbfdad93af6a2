#!/usr/bin/env bash
# torchdistill 1.1.5 (torch 2.14.1): KDLoss is alpha CE + (1 - alpha) T^2 KL, as the paper has it (Hinton et al. 2015,
# arXiv 1503.02531), only where alpha is above 0 and there are labels. With alpha = 0, or for a batch without labels, T^2
# is gone: at T = 4 unlabelled photographs count sixteen times less than the same ones with labels of weight one in a
# million. And of masks the cross-entropy is a mean over pixels, the divergence a sum: on 64x64 pixels it counts 4096
# times as much as on one. Exit status 1: that is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)


def loss(student, teacher, labels, alpha, temperature):
    made = KDLoss("head", "output", "head", "output", temperature=temperature, alpha=alpha)
    return float(made({"head": {"output": student}}, {"head": {"output": teacher}}, labels))


student, teacher, labels = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))
hardly = loss(student, teacher, labels, 1e-6, 4.0)
seen = {"labels of weight 1e-6": hardly, "alpha 0": loss(student, teacher, labels, 0.0, 4.0),
        "no labels": loss(student, teacher, None, 1e-6, 4.0)}
for what, value in seen.items():
    print(f"T = 4, {what}: {value:.4f}")
# every pixel alike: a mean would be the same for any number of them
masks = {side: loss(*(x[..., None, None].expand(-1, -1, side, side) for x in (student, teacher)), None, 0.0, 1.0)
         for side in (1, 64)}
print(f"divergence of equal pixels: {masks[1]:.4f} of one, {masks[64]:.1f} of 64x64")
ratios = [hardly / seen["alpha 0"], hardly / seen["no labels"], masks[64] / masks[1]]
sys.exit(any(abs(ratio / expected - 1) > 1e-3 for ratio, expected in zip(ratios, (16, 16, 4096))))
PYTHON
