"""Is it a photograph of a retina that can be graded? `refusal` says why not."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from retina.datasets import preprocess

LOOK = 256  # pixels: side of the field of view when its quality is judged
SMALLEST = 64  # pixels of the field of view
DARKEST, PALEST, PLAINEST, SOFTEST = 30, 1.1, 0.006, 0.33  # see refusal


@dataclass
class Look:
    """How a picture looks within its field of view, without the rim."""
    brightness: float  # median of the brightest channel, of 255
    redness: float  # mean red / mean green
    structure: float  # deviation of what is 1 to 2 % of the field wide, over the mean green
    sharpness: float  # deviation of what is half as wide / the same


def look(image: Image.Image, field: tuple[float, float, float, float]) -> Look | None:
    """Judge the field of view (left, top, right, bottom) of a picture; None where too little of it is lit."""
    picture = image.convert("RGB").resize((LOOK, LOOK), Image.BOX, field)
    lit = torch.from_numpy(preprocess.lit_pixels(picture)).float()
    pixels = torch.from_numpy(np.array(picture)).float()  # (LOOK, LOOK, 3)

    def blurred(layer, sigma):
        weights = torch.exp(-torch.arange(-20, 21).square() / (2 * sigma ** 2))
        wide = nn.functional.conv2d(layer[None, None], weights.view(1, 1, 1, 41) / weights.sum(), padding=(0, 20))
        return nn.functional.conv2d(wide, weights.view(1, 1, 41, 1) / weights.sum(), padding=(20, 0))[0, 0]

    def local_mean(sigma):  # of green, over the lit pixels around
        return blurred(pixels[..., 1] * lit, sigma) / blurred(lit, sigma).clamp(min=1e-3)

    inside = blurred(lit, 4.0) > 0.99
    if not inside.any():
        return None
    fine, middle, coarse = (local_mean(sigma) for sigma in (1.0, 2.5, 6.0))
    red, green, _ = pixels[inside].mean(0).clamp(min=1e-3).tolist()
    structure = float((middle - coarse)[inside].std())
    return Look(float(pixels[inside].amax(1).median()), red / green, structure / green,
                float((fine - middle)[inside].std()) / max(structure, 1e-6))


def refusal(image: Image.Image) -> str:
    """Why a picture cannot be graded, or "".

    Noise passes for detail, and whatever is lit, round, red and structured passes for a retina. Of IDRiD's 467 training
    photographs none is refused: their brightness is 61 to 233, redness 1.5 to 3.9, structure 1.1 to 8.1 %, sharpness
    0.39 to 1.17. Blurred with a sigma of 1.6 % of the field's width, all that were tried are: sharpness 0.26 to 0.32.
    """
    field = preprocess.field_of_view(image)
    found = None if field is None else look(image, field)
    if found is None:
        return "no field of view found: expected the lit circle of a fundus photograph on a dark ground"
    if min(field[2] - field[0], field[3] - field[1]) < SMALLEST:
        return (f"too small: its field of view measures {field[2] - field[0]:.0f}x{field[3] - field[1]:.0f} pixels, "
                f"expected at least {SMALLEST} a side")
    if found.brightness < DARKEST:
        return f"too dark: the median brightness is {found.brightness:.0f} of 255, expected at least {DARKEST}"
    if found.redness < PALEST:
        return f"not the colours of a retina: red is {found.redness:.2f} times green, expected at least {PALEST}"
    if found.structure < PLAINEST:
        return (f"nothing to be seen: brightness varies by {found.structure:.2%} of its mean, expected at least "
                f"{PLAINEST:.1%}")
    if found.sharpness < SOFTEST:
        return (f"too blurred: fine detail is {found.sharpness:.2f} of what is twice as wide, expected at least "
                f"{SOFTEST}")
    return ""
