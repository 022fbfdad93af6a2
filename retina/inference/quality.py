"""Is it a photograph of a retina that can be graded? `refusal` says why not."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from retina.datasets import preprocess


LOOK = 256  # pixels: side of the field of view when its quality is judged
SMALLEST = 64  # pixels of the field of view
DARKEST, PALEST, PLAINEST, SOFTEST = 30, 1.1, 0.006, 0.33  # see refusal


def look(image: Image.Image, field: tuple[float, float, float, float]) -> tuple[float, float, float, float] | None:
    """How the field of view (left, top, right, bottom) of a picture looks, without the rim; None: too little is lit.

    Brightness, the median of the brightest channel, of 255; redness, mean red / mean green; structure, the deviation of
    what is 1 to 2 % of the field wide, over the mean green; sharpness, that of what is half as wide / the same.
    """
    picture = image.convert("RGB").resize((LOOK, LOOK), Image.BOX, field)
    lit = torch.from_numpy(preprocess.foreground_mask(picture)).float()
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
    return (float(pixels[inside].amax(1).median()), red / green, structure / green,
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
    width, height, (brightness, redness, structure, sharpness) = field[2] - field[0], field[3] - field[1], found
    for value, least, reason, expected in (
            (min(width, height), SMALLEST, f"too small: its field of view measures {width:.0f}x{height:.0f} pixels",
             f"{SMALLEST} a side"),
            (brightness, DARKEST, f"too dark: the median brightness is {brightness:.0f} of 255", DARKEST),
            (redness, PALEST, f"not the colours of a retina: red is {redness:.2f} times green", PALEST),
            (structure, PLAINEST, f"nothing to be seen: brightness varies by {structure:.2%} of its mean",
             f"{PLAINEST:.1%}"),
            (sharpness, SOFTEST, f"too blurred: fine detail is {sharpness:.2f} of what is twice as wide", SOFTEST)):
        if value < least:
            return f"{reason}, expected at least {expected}"
    return ""
