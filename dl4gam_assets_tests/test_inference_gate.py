"""The gate of the inference on a small scale: blended windows against the published averaging, same trained network.

The whole regions are compared by `benchmarks/inference.py` (docs/performance.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.segmentation import member_logits, normalize, patch_centres
from dl4gam_assets.settings import InferenceSettings
from dl4gam_assets.stages import training
from dl4gam_assets_tests.small_region import Small

#: Windows smaller than the cubes, so that blending is in it.
WINDOWS = InferenceSettings(mode="windows", precision="fp32", window_px=192, overlap_px=64)
STRIDE = InferenceSettings(mode="stride", precision="fp32", patch_px=128, stride_px=32)


@pytest.mark.timeout(900)
def test_windows_measure_what_the_published_averaging_measures(small: Small) -> None:
    """Median relative difference of areas below 0.5 %; IoU within 50 m at most 0.2 points lower."""
    site = small.workspace().site
    held_out = [
        (fold, g) for fold in range(1, site.region.folds.n + 1) for g in training.members_of(site, fold, "test")
    ]
    assert len(held_out) >= 5
    channels = small.region.model.channels
    apart, counts = [], np.zeros((2, 2))
    for fold, glacier_id in held_out:
        hashes = tuple(m["sha256"] for m in training.manifest_of(site, fold))
        models, statistics = training.load_ensemble(site, fold, hashes, "cpu", None)
        with open_cube(Path(str(small.storage.cube(2015, glacier_id)))) as cube:
            stack, valid = channel_stack(cube, channels)
            names = ("zone_50", "zone_20", "glacier", "any_glacier")
            zone, allowed, glacier, truth = (cube_mask(cube, name) for name in names)
        assert max(valid.shape) > WINDOWS.window_px  # two windows or more
        ready = normalize(stack, channels, statistics)
        centres = patch_centres(zone, glacier, STRIDE.stride_px, extremes=True)
        areas = []
        for k, (settings, where) in enumerate(((STRIDE, centres), (WINDOWS, None))):
            logits = next(iter(member_logits(models, ready, settings, "cpu", centres=where)))
            found = logits >= 0  # NaN, where no patch reaches, is no ice
            areas.append(int((found & allowed).sum()))
            judged = zone & valid
            counts[k] += (found & truth & judged).sum(), ((found | truth) & judged).sum()
        apart.append(abs(areas[1] - areas[0]) / max(areas[0], 1))
    published, ours = counts[:, 0] / counts[:, 1]
    assert published > 0.5  # a network that knows something
    assert np.median(apart) < 0.005
    assert ours >= published - 0.002
