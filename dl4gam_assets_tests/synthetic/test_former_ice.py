"""Ground that glaciers left before the baseline."""

from __future__ import annotations

import numpy as np
import pytest

from dl4gam_assets.synthetic.retreat import former_ice


def _tongue() -> tuple[np.ndarray, np.ndarray]:
    label = np.zeros((120, 60), np.int32)
    label[10:80, 20:40] = 1
    surface = np.broadcast_to(np.linspace(3200, 2200, 120)[:, None], label.shape).astype(np.float32)
    return label, surface


def test_former_ice_lies_below_the_tongue_and_grows_backwards_at_the_glacier_s_rate() -> None:
    label, surface = _tongue()
    owner, vacated = former_ice(label, surface, np.array([2.0]), pixel_m=10.0)
    assert not (owner[label > 0]).any()
    for years in (1, 3, 5):
        gone = (owner == 1) & (vacated < years)
        assert gone.sum() == pytest.approx(0.02 * years * (label == 1).sum(), abs=2)
    rows = np.nonzero((owner == 1) & (vacated < 5))[0]
    assert np.median(rows) > 75  # at the low end, not along the high margins


def test_no_glaciers_leave_nothing() -> None:
    label = np.zeros((20, 20), np.int32)
    owner, vacated = former_ice(np.where(label, 1, 0), np.ones((20, 20), np.float32), np.array([]), pixel_m=10.0)
    assert not owner.any() and np.isinf(vacated).all()
