"""Whole-glacier inference does not depend on how a glacier is cut, and gaps are filled from their neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.segmentation import build_model, fill_gaps, normalize, patch_centres, predict_logits
from dl4gam_assets.settings import InferenceSettings, ModelSettings
from dl4gam_assets_tests.segmentation.conftest import CHANNELS, MODEL, Small

FP32 = InferenceSettings(precision="fp32", window_px=64, overlap_px=16, patch_px=64, stride_px=24)


def _pointwise() -> torch.nn.Module:
    """A network that sees one pixel at a time, so that no cut may change anything."""
    torch.manual_seed(1)
    return torch.nn.Conv2d(3, 1, 1).eval()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 170), st.integers(1, 170), st.sampled_from(["windows", "stride"]), st.integers(0, 48))
def test_cutting_changes_nothing(height: int, width: int, mode: str, overlap: int) -> None:
    model = _pointwise()
    stack = np.random.default_rng(height).normal(0, 2, (3, height, width)).astype(np.float32)
    options = FP32.model_copy(update={"mode": mode, "overlap_px": overlap})
    got = predict_logits([model, model], stack, options, "cpu")
    with torch.inference_mode():
        expected = model(torch.from_numpy(stack)[None])[0, 0].numpy()
    assert got.shape == (2, height, width) and got.dtype == np.float32
    np.testing.assert_allclose(got[0], expected, atol=2e-3 if mode == "stride" else 1e-5)
    np.testing.assert_array_equal(got[0], got[1])


def test_a_glacier_that_fits_is_seen_in_one_piece() -> None:
    torch.manual_seed(0)
    model = build_model(MODEL).eval()
    stack = np.random.default_rng(0).normal(0, 1, (len(CHANNELS), 64, 96)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(stack)[None])[0, 0].numpy()
    got = predict_logits([model], stack, FP32.model_copy(update={"window_px": 96}), "cpu")[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    # Blended windows of a real network agree with it away from their seams, and have no step at them.
    cut = predict_logits([model], stack, FP32, "cpu")[0]
    assert np.abs(cut[:, :24] - expected[:, :24]).max() < 1e-3
    steps = np.abs(np.diff(cut, axis=1)).mean(axis=0)
    assert steps[16:80].max() < 3 * np.median(steps)


def test_published_stride_mode_covers_what_its_centres_reach(small: Small) -> None:
    """Overlapping patches averaged by hand, one by one, as in METHOD section 6."""
    torch.manual_seed(0)
    model = build_model(MODEL).eval()
    layers = small.packed.glacier("G0")
    stack = normalize(small.packed.stack("G0"), CHANNELS, small.statistics)
    options = FP32.model_copy(update={"mode": "stride", "patch_px": 32, "stride_px": 16, "margin_share": 0.1})
    centres = patch_centres(layers.zone, layers.glacier, 16, extremes=True)
    got = predict_logits([model], stack, options, "cpu", centres=centres)[0]
    total, count = np.zeros(layers.bits.shape), np.zeros(layers.bits.shape)
    for row, col in centres:
        top, left = max(row - 16, 0), max(col - 16, 0)
        assert top + 32 <= 96 and left + 32 <= 112
        with torch.inference_mode():
            p = torch.sigmoid(model(torch.from_numpy(stack[None, :, top : top + 32, left : left + 32])))[0, 0].numpy()
        where = (
            slice(top + 3 * (top > 0), top + 32 - 3 * (top < 64)),
            slice(left + 3 * (left > 0), left + 32 - 3 * (left < 80)),
        )
        total[where] += p[where[0].start - top : where[0].stop - top, where[1].start - left : where[1].stop - left]
        count[where] += 1
    np.testing.assert_array_equal(np.isnan(got), count == 0)
    assert (count == 0).any() and not np.isnan(got[layers.glacier]).any()
    reached = count > 0
    np.testing.assert_allclose(1 / (1 + np.exp(-got[reached])), (total / np.maximum(count, 1))[reached], atol=1e-5)


def test_bf16_is_close_to_fp32(small: Small) -> None:
    """Half precision may move a probability by a few thousandths (mean), not flip what is certain."""
    torch.manual_seed(2)
    model = build_model(MODEL).eval()
    stack = normalize(small.packed.stack("G1"), CHANNELS, small.statistics)
    full, half = (
        predict_logits([model], stack, FP32.model_copy(update={"precision": p, "window_px": 128}), "cpu")[0]
        for p in ("fp32", "bf16")
    )
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    p, q = (1 / (1 + np.exp(-z)) for z in (full, half))
    assert np.abs(p - q).mean() < 3e-3 and np.abs(p - q).max() < 0.05
    assert (half[full > 0.5] > 0).all() and (half[full < -0.5] < 0).all()


def test_odd_sizes_work_with_the_published_network() -> None:
    model = build_model(ModelSettings(channels=["red"]), pretrained=False).eval()
    for shape in ((1, 5, 7), (1, 33, 65)):
        got = predict_logits([model], np.zeros(shape, np.float32), FP32.model_copy(update={"window_px": 128}), "cpu")
        assert got.shape == shape and np.isfinite(got).all()


def test_refusals() -> None:
    model = _pointwise()
    bad = np.zeros((3, 8, 8), np.float32)
    bad[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="without NaN"):
        predict_logits([model], bad, FP32, "cpu")
    with pytest.raises(ValueError, match="must be below window_px"):
        predict_logits([model], np.zeros((3, 8, 8)), FP32.model_copy(update={"overlap_px": 64}), "cpu")


# --------------------------------------------------------------------------------------------- gaps
def _by_hand(layer: np.ndarray, gaps: np.ndarray, good: np.ndarray, k: int, heights: np.ndarray | None) -> np.ndarray:
    out = layer.copy()
    sources = np.argwhere(good)
    for r, c in np.argwhere(gaps):
        if heights is None:
            distance = ((sources - [r, c]) ** 2).sum(axis=1).astype(float)
        else:
            distance = np.abs(heights[good] - heights[r, c])
        nearest = np.sort(distance)[: min(k, len(distance))][-1]
        sure, tied = layer[good][distance < nearest], layer[good][distance == nearest]
        rest = min(k, len(distance)) - len(sure)
        # Among equally near pixels any may be taken: bounds of what the mean can be.
        out[r, c] = np.nan if rest < len(tied) else np.concatenate([sure, tied]).mean()
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["nearest", "elevation"]), st.integers(1, 12))
def test_gaps_take_the_mean_of_the_nearest_usable_pixels(seed: int, fill: str, k: int) -> None:
    rng = np.random.default_rng(seed)
    mean, std = rng.random((2, 11, 13)).astype(np.float32)
    valid, zone = rng.random((11, 13)) < 0.6, rng.random((11, 13)) < 0.8
    dem = rng.permutation(143).reshape(11, 13).astype(np.float32) ** 1.01
    options = InferenceSettings(fill=fill, fill_neighbours=k)  # type: ignore[arg-type]
    m, s, filled = fill_gaps(mean, std, valid, zone, dem, options)
    gaps, good = zone & ~valid, zone & valid
    if not good.any():
        assert not filled.any()
        return
    np.testing.assert_array_equal(filled, gaps)
    np.testing.assert_array_equal(m[~gaps], mean[~gaps])
    for got, layer in ((m, mean), (s, std)):
        expected = _by_hand(layer, gaps, good, k, dem if fill == "elevation" else None)
        known = np.isfinite(expected)
        np.testing.assert_allclose(got[known], expected[known], rtol=1e-4)
        assert (got[gaps] >= layer[good].min() - 1e-6).all() and (got[gaps] <= layer[good].max() + 1e-6).all()


def test_pixels_without_elevation_fall_back_to_the_plane() -> None:
    mean = np.linspace(0, 1, 25, dtype=np.float32).reshape(5, 5)
    valid = np.ones((5, 5), bool)
    valid[2, 2] = valid[0, 0] = False
    dem = np.arange(25, dtype=np.float32).reshape(5, 5)
    dem[0, 0] = np.nan
    options = InferenceSettings(fill="elevation", fill_neighbours=2)
    got, _, filled = fill_gaps(mean, np.zeros_like(mean), valid, np.ones_like(valid), dem, options)
    assert filled.sum() == 2 and got[2, 2] == pytest.approx((mean[2, 1] + mean[2, 3]) / 2)
    assert got[0, 0] == pytest.approx((mean[0, 1] + mean[1, 0]) / 2)
    flat, _, _ = fill_gaps(mean, np.zeros_like(mean), valid, np.ones_like(valid), None, options)
    assert flat[0, 0] == got[0, 0]


def test_many_pixels_at_the_same_height_are_no_trouble() -> None:
    """A flat glacier: elevation in steps of half a metre has thousands of ties."""
    rng = np.random.default_rng(0)
    mean = rng.random((300, 300)).astype(np.float32)
    dem = np.round(rng.uniform(2800, 2805, (300, 300)) * 2) / 2
    valid = rng.random((300, 300)) < 0.5
    everywhere = np.ones_like(valid)
    got, _, filled = fill_gaps(mean, mean, valid, everywhere, dem, InferenceSettings(fill="elevation"))
    assert (filled == ~valid).all() and abs(got[filled].mean() - mean[valid].mean()) < 0.05
