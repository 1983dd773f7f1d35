"""Whole-glacier inference does not depend on how a glacier is cut, and gaps are filled from their neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.ensemble import aggregate
from dl4gam_assets.segmentation import build_model, fill_gaps, member_logits, normalize, patch_centres, predict_logits
from dl4gam_assets.segmentation.inference import _spans, blend_weights, low_precision
from dl4gam_assets.settings import InferenceSettings, ModelSettings, SettingsError, load_region
from dl4gam_assets_tests.segmentation.conftest import CHANNELS, MODEL, Small

FP32 = InferenceSettings(precision="fp32", window_px=64, overlap_px=16, patch_px=64, stride_px=24)


def _pointwise() -> torch.nn.Module:
    """A network that sees one pixel at a time, so that no cut may change anything."""
    torch.manual_seed(1)
    return torch.nn.Conv2d(3, 1, 1).eval()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 170), st.integers(1, 170), st.sampled_from(["windows", "stride"]), st.integers(0, 32))
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


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(2, 24), st.data())
def test_windows_cover_a_side_and_their_weights_add_up_to_one(length: int, blocks: int, data: st.DataObject) -> None:
    size = 32 * blocks
    overlap = data.draw(st.integers(0, size - 32))
    spans = _spans(length, size, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length and all(b - a <= size for a, b in spans)
    assert all(a % 32 == 0 for a, _ in spans)
    for (_, stop), (start, _) in itertools.pairwise(spans):
        assert stop - start >= overlap
    # No fewer windows of this size would do.
    step = (size - overlap) // 32 * 32
    assert len(spans) == 1 or (len(spans) - 2) * step + size < length
    total = np.zeros(length)
    for (start, stop), weight in zip(spans, blend_weights(spans), strict=True):
        assert (weight >= 0).all()
        total[start:stop] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_constant_and_linear_fields_come_back() -> None:
    """Whatever the windows, a network that returns its input returns the field."""
    rows, columns = np.mgrid[:173, :201].astype(np.float32)
    for field in (np.full_like(rows, 3.25), 0.5 * rows - 0.25 * columns + 7):
        got = predict_logits([torch.nn.Identity()], field[None], FP32.model_copy(update={"overlap_px": 32}), "cpu")[0]
        np.testing.assert_allclose(got, field, atol=2e-4)


@pytest.mark.parametrize("pool", [1, 8])
def test_windows_agree_with_the_whole_where_no_window_ends(pool: int) -> None:
    """A network that sees less than 16 pixels around each: with overlaps of 64, whose outer quarters count for nothing,
    it can not tell a window from the whole, not even where it pools on a coarse grid, as encoders do."""
    torch.manual_seed(3)
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Tanh()]
    if pool > 1:
        layers += [torch.nn.AvgPool2d(pool), torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Upsample(scale_factor=pool)]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 1, 3, padding=1)).eval()
    stack = np.random.default_rng(5).normal(0, 1, (2, 224, 288)).astype(np.float32)
    whole = predict_logits([model], stack, FP32.model_copy(update={"window_px": 512}), "cpu")[0]
    cut = predict_logits([model], stack, FP32.model_copy(update={"window_px": 128, "overlap_px": 64}), "cpu")[0]
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    # The check can fail: with windows that only touch, their edges show.
    bad = predict_logits([model], stack, FP32.model_copy(update={"window_px": 128, "overlap_px": 0}), "cpu")[0]
    assert np.abs(bad - whole).max() > 1e-3


def test_members_are_streamed_and_temperatures_divide_their_logits() -> None:
    torch.manual_seed(4)
    models = [torch.nn.Conv2d(3, 1, 3, padding=1).eval() for _ in range(7)]
    stack = np.random.default_rng(1).normal(0, 2, (3, 70, 90)).astype(np.float32)
    temperatures = np.linspace(0.6, 4, 7)
    asked = 0

    def counted() -> Iterator[torch.nn.Module]:
        nonlocal asked
        for model in models:
            asked += 1
            yield model

    stream = member_logits(counted(), stack, FP32, "cpu")  # type: ignore[arg-type]
    assert asked == 0
    next(iter(stream))
    assert asked == 1 and not torch.is_inference_mode_enabled()
    logits = predict_logits(models, stack, FP32, "cpu")
    kept: list[np.ndarray] = []
    mean, std = aggregate(member_logits(models, stack, FP32, "cpu"), temperatures, each=kept.append)
    p = 1 / (1 + np.exp(-logits.astype(float) / temperatures[:, None, None]))
    np.testing.assert_allclose(mean, p.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, p.std(axis=0), atol=1e-5)
    np.testing.assert_allclose(np.stack(kept), p, atol=1e-6)


def test_only_the_surroundings_are_mapped_when_so_set() -> None:
    model = _pointwise()
    stack = np.random.default_rng(0).normal(0, 2, (3, 120, 150)).astype(np.float32)
    zone = np.zeros((120, 150), bool)
    zone[50:60, 3:70] = True
    near = FP32.model_copy(update={"context_px": 20})
    got = predict_logits([model], stack, FP32, "cpu")[0]
    (cut,) = member_logits([model], stack, near, "cpu", zone=zone)
    inside = np.zeros_like(zone)
    inside[30:80, 0:90] = True
    np.testing.assert_array_equal(np.isnan(cut), ~inside)
    np.testing.assert_allclose(cut[inside], got[inside], atol=1e-5)


def test_settings_refuse_windows_that_do_not_move_and_patches_that_do_not_meet() -> None:
    with pytest.raises(SettingsError, match=r"inference.overlap_px: must be at least 32 below window_px \(128\)"):
        load_region("demo", {"inference.window_px": 128, "inference.overlap_px": 100})
    with pytest.raises(SettingsError, match=r"inference.overlap_px"):  # the default overlap
        load_region("demo", {"inference.window_px": 64})
    with pytest.raises(SettingsError, match=r"inference.margin_share: patches of patch_px \(64\)"):
        load_region("demo", {"inference.patch_px": 64, "inference.stride_px": 60})
    assert load_region("demo", {"inference.window_px": 96}).inference.overlap_px == 64


def test_the_published_mode_computes_in_fp32_unless_told_otherwise() -> None:
    assert not low_precision(InferenceSettings(mode="stride"), "cpu")
    assert low_precision(InferenceSettings(mode="stride", precision="bf16"), "cpu")


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
    with pytest.raises(ValueError, match="must be 32 or more below window_px"):
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
        np.testing.assert_array_equal(filled, zone)
        np.testing.assert_array_equal(m, mean)
        return
    np.testing.assert_array_equal(filled, gaps)
    np.testing.assert_array_equal(m[~gaps], mean[~gaps])
    for got, layer in ((m, mean), (s, std)):
        expected = _by_hand(layer, gaps, good, k, dem if fill == "elevation" else None)
        known = np.isfinite(expected)
        np.testing.assert_allclose(got[known], expected[known], rtol=1e-4)
        assert (got[gaps] >= layer[good].min() - 1e-6).all() and (got[gaps] <= layer[good].max() + 1e-6).all()


def test_pixels_that_no_patch_reached_are_gaps_of_the_zone_only() -> None:
    mean = np.full((6, 6), 0.8, np.float32)
    mean[0], mean[3, 3] = np.nan, np.nan
    valid, zone = np.ones((6, 6), bool), np.zeros((6, 6), bool)
    zone[1:5] = True
    got, std, filled = fill_gaps(mean, mean * 0.1, valid, zone, None, InferenceSettings())
    assert filled.sum() == 1 and filled[3, 3] and got[3, 3] == pytest.approx(0.8) and np.isfinite(std[zone]).all()
    assert np.isnan(got[0]).all()
    # A year whose image is all cloud: the zone still has no NaN.
    got, _, filled = fill_gaps(mean, mean * 0.1, ~valid, zone, None, InferenceSettings())
    assert np.isfinite(got[zone]).all() and (filled == zone).all()


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
