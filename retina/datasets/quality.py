"""What a photograph looks like, in numbers. inference/quality.py refuses new photographs by them."""

from collections.abc import Sequence

import numpy as np

from retina.datasets.vessels import low_pass


QUALITY_SIDE = 256  # pixels: side of the field of view when its quality is judged
# of a photograph: 1 if it has a field of view, else 0; the shorter side of that, or of the picture, in pixels; the rest
# are those of measure_quality
MEASURES = "field", "side", "brightness", "redness", "structure", "sharpness"
FEW = 0.03  # share of the training photographs that may look worse than what a run remembers of them


def measure_quality(pixels: np.ndarray, lit: np.ndarray) -> tuple[float, float, float, float]:
    """Quality of a field of view (S, S, 3) uint8 where it is lit (S, S), without its rim; four times 0: too little is.

    -> brightness, the median of the brightest channel, of 255; redness, mean red / mean green; structure, the standard
    deviation of details 1 to 2 % of the field wide / mean green; sharpness, that of details half as wide / structure.
    """
    padded = QUALITY_SIDE + 32  # so that nothing wraps around
    blurs = np.float32([low_pass(padded, sigma) for sigma in (1.0, 2.5, 6.0, 4.0)])
    of_lit, of_green = np.fft.rfft2(np.float32([lit, lit * pixels[..., 1]]), (padded, padded))
    blurred = np.fft.irfft2(np.concatenate([of_lit * blurs, of_green * blurs[:3]]), (padded, padded))
    blurred = blurred[:, :QUALITY_SIDE, :QUALITY_SIDE]
    inside = blurred[3] > 0.99
    if not inside.any():
        return 0.0, 0.0, 0.0, 0.0
    fine, middle, coarse = blurred[4:] / np.maximum(blurred[:3], 1e-3)  # means of green over the lit pixels around
    red, green, _ = np.maximum(pixels[inside].mean(0), 1e-3)
    structure = (middle - coarse)[inside].std()
    return (float(np.median(pixels[inside].max(1))), float(red / green), float(structure / green),
            float((fine - middle)[inside].std() / max(structure, 1e-6)))


def lowest_seen(measured: Sequence[Sequence[float]]) -> dict[str, float]:
    """{measure: the lowest of photographs (n, 6), apart from a FEW of them, and from one at least}; of few ones {}."""
    if len(measured) < 5:
        return {}
    left_out = max(1, int(FEW * (len(measured) - 1)))
    return dict(zip(MEASURES, np.sort(measured, 0)[left_out].tolist()))
