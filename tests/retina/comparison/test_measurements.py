"""Photographs as another camera would have taken them."""

import pytest
import torch

import data
from retina.comparison import measurements
from retina.datasets import readers


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


def test_shifts_change_pictures_and_nothing_else():
    photographs = data.FundusDataset(readers.read_drawn().records[:3], 64)
    for shift in measurements.SHIFTS:
        changed = measurements.Shifted(photographs, shift)
        assert len(changed) == 3 and changed[2].name == photographs[2].name
        one, again, before = changed[1], changed[1], photographs[1]
        assert torch.equal(one.image, again.image) and one.image.dtype == torch.uint8
        assert one.image.shape == before.image.shape and not torch.equal(one.image, before.image)
        assert (one.image.float() - before.image.float()).abs().mean() < 60
        assert torch.equal(one.masks, before.masks) and torch.equal(one.landmarks, before.landmarks)
    dark, cold = (measurements.Shifted(photographs, shift)[1].image.float().mean((1, 2))
                  / before.image.float().mean((1, 2)) for shift in ("darker", "colder light"))
    assert dark.max() < 0.65 and cold[0] < 0.9 < 1.1 < cold[2]
