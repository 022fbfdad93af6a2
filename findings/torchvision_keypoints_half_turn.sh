#!/usr/bin/env bash
# torchvision's transforms.v2 moves key points by two conventions: a horizontal and a vertical flip send x to W - 1 - x
# (pixel centres are whole numbers), a rotation by 180 degrees sends x to W - x (pixel i covers i to i + 1), and resizing
# follows the second. The pictures are equal, the points a pixel apart in x and in y. Expected: the same point.
# Also: the elastic transform with no displacement at all cuts points to whole pixels.
# Seen with torch 2.14.1 and torchvision 0.29.1, CPU:
#   pictures equal: True
#   half turn [86.0, 44.0], two flips [85.0, 43.0], twice the size [20.0, 40.0]
#   elastic, no displacement: [10.7, 20.3] -> [10.0, 20.0]
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

height, width = 64, 96
image = torch.zeros(1, height, width, dtype=torch.uint8)
image[0, 20, 10] = 255
image = tv_tensors.Image(image)


def point(x, y):
    return tv_tensors.KeyPoints(torch.tensor([[x, y]]), canvas_size=(height, width))


equal = torch.equal(F.rotate(image, 180.0), F.vertical_flip(F.horizontal_flip(image)))
turned = F.rotate(point(10.0, 20.0), 180.0)[0].tolist()
flipped = F.vertical_flip(F.horizontal_flip(point(10.0, 20.0)))[0].tolist()
larger = F.resize(point(10.0, 20.0), [2 * height, 2 * width])[0].tolist()
elastic = F.elastic(point(10.7, 20.3), torch.zeros(1, height, width, 2))[0].tolist()
print(f"pictures equal: {equal}")
print(f"half turn {turned}, two flips {flipped}, twice the size {larger}")
print(f"elastic, no displacement: [10.7, 20.3] -> {elastic}")
same = (equal, turned, flipped, larger, elastic) == (True, [86.0, 44.0], [85.0, 43.0], [20.0, 40.0], [10.0, 20.0])
sys.exit(not same)
PYTHON
