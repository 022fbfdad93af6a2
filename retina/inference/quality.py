"""Is it a photograph of a retina that can be graded? `refusal` says why not."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from retina.datasets import preprocess


QUALITY_SIDE = 256  # pixels: side of the field of view when its quality is judged
MIN_SIDE = 64  # pixels of the field of view
MIN_BRIGHTNESS, MIN_REDNESS, MIN_STRUCTURE, MIN_SHARPNESS = 30, 1.1, 0.006, 0.33  # see refusal


def measure_quality(image: Image.Image,
                    field: tuple[float, float, float, float]) -> tuple[float, float, float, float] | None:
    """Quality of the field of view (left, top, right, bottom) of a picture, without its rim; None: too little is lit.

    -> brightness, the median of the brightest channel, of 255; redness, mean red / mean green; structure, the standard
    deviation of details 1 to 2 % of the field wide / mean green; sharpness, that of details half as wide / structure.
    """
    picture = image.convert("RGB").resize((QUALITY_SIDE, QUALITY_SIDE), Image.BOX, field)
    foreground = torch.from_numpy(preprocess.foreground_mask(picture)).float()
    pixels = torch.from_numpy(np.array(picture)).float()  # (QUALITY_SIDE, QUALITY_SIDE, 3)

    def blurred(layer, sigma):
        weights = torch.exp(-torch.arange(-20, 21).square() / (2 * sigma ** 2))
        wide = nn.functional.conv2d(layer[None, None], weights.view(1, 1, 1, 41) / weights.sum(), padding=(0, 20))
        return nn.functional.conv2d(wide, weights.view(1, 1, 41, 1) / weights.sum(), padding=(20, 0))[0, 0]

    def local_mean(sigma):  # of green, over the foreground pixels around
        return blurred(pixels[..., 1] * foreground, sigma) / blurred(foreground, sigma).clamp(min=1e-3)

    inside = blurred(foreground, 4.0) > 0.99
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
    quality = None if field is None else measure_quality(image, field)
    if quality is None:
        return "no field of view found: expected the lit circle of a fundus photograph on a dark ground"
    width, height, (brightness, redness, structure, sharpness) = field[2] - field[0], field[3] - field[1], quality
    for value, least, reason, expected in (
            (min(width, height), MIN_SIDE, f"too small: its field of view measures {width:.0f}x{height:.0f} pixels",
             f"{MIN_SIDE} a side"),
            (brightness, MIN_BRIGHTNESS, f"too dark: the median brightness is {brightness:.0f} of 255", MIN_BRIGHTNESS),
            (redness, MIN_REDNESS, f"not the colours of a retina: red is {redness:.2f} times green", MIN_REDNESS),
            (structure, MIN_STRUCTURE, f"nothing to be seen: brightness varies by {structure:.2%} of its mean",
             f"{MIN_STRUCTURE:.1%}"),
            (sharpness, MIN_SHARPNESS, f"too blurred: fine detail is {sharpness:.2f} of what is twice as wide",
             MIN_SHARPNESS)):
        if value < least:
            return f"{reason}, expected at least {expected}"
    return ""
