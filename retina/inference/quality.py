"""Is it a photograph of a retina that can be graded? `refusal` says why not."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from retina.datasets import preprocess
from retina.datasets.quality import MEASURES


# measure -> the least that is expected, and what is said of less
LEAST = {
    "field": (1, "no field of view found: expected the lit circle of a fundus photograph on a dark ground"),
    "side": (64, "too small: {value:.0f} pixels a side, expected at least {least:.0f}"),
    "brightness": (30, "too dark: the median brightness is {value:.0f} of 255, expected at least {least:.0f}"),
    "redness": (1.1, "not the colours of a retina: red is {value:.2f} times green, expected at least {least:.2f}"),
    "structure": (0.006, "nothing to be seen: brightness varies by {value:.2%} of its mean, expected at least "
                         "{least:.2%}"),
    "sharpness": (0.33, "too blurred: fine detail is {value:.2f} of what is twice as wide, expected at least "
                        "{least:.2f}")}
MARGIN = 0.8  # new photographs of the same kind are now and then a little below the lowest that was seen


def refusal(image: Image.Image, seen: Mapping[str, float] = MappingProxyType({}),
            foreground: np.ndarray | None = None) -> str:
    """Why a picture cannot be graded, or "". What a run has `seen` in training, see lowest_seen, is enough for it.

    Noise passes for detail, and whatever is lit, round, red and structured passes for a retina. Of IDRiD's 467 training
    photographs none is refused: their brightness is 61 to 233, redness 1.5 to 3.9, structure 1.1 to 8.1 %, sharpness
    0.39 to 1.17. Blurred with a sigma of 1.6 % of the field's width, all that were tried are: sharpness 0.26 to 0.32.
    """
    measures = preprocess.quality(image, preprocess.field_of_view(image, foreground))
    for name, value in zip(MEASURES, measures, strict=True):
        least, reason = LEAST[name]
        least = min(least, MARGIN * seen.get(name, math.inf))
        if value < least:
            return reason.format(value=value, least=least)
    return ""
