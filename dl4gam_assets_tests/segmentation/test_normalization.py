"""Statistics of channels are exact, and missing values become the mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.segmentation import normalization_statistics, normalize


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(-1e4, 1e4))
def test_statistics_are_those_of_all_valid_pixels_together(seed: int, glaciers: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    stacks = []
    for _ in range(glaciers):
        stack = (rng.normal(0, 3, (2, 7, rng.integers(3, 9))) + offset).astype(np.float32)
        stack[:, rng.random(stack.shape[1:]) < 0.3] = np.nan
        stacks.append((stack, rng.random(stack.shape[1:]) < 0.8))
    values = [np.concatenate([s[i][v & np.isfinite(s[i])] for s, v in stacks]).astype(float) for i in range(2)]
    if min(map(len, values)) == 0:
        return
    table = normalization_statistics(iter(stacks), ["red", "ndsi"])
    for i in range(2):
        assert table.loc[i, "mean"] == pytest.approx(values[i].mean(), rel=1e-9, abs=1e-9)
        assert table.loc[i, "std"] == pytest.approx(values[i].std(), rel=1e-6, abs=1e-6)
        assert table.loc[i, "n_pixels"] == len(values[i])
    assert table["standardized"].tolist() == [True, False]


def test_standardized_channels_have_mean_0_and_deviation_1_and_others_stay() -> None:
    rng = np.random.default_rng(0)
    stack = rng.normal(2500, 300, (2, 40, 50)).astype(np.float32)
    stack[1] = rng.uniform(-1, 1, (40, 50))
    stack[:, :3] = np.nan
    valid = np.ones((40, 50), bool)
    table = normalization_statistics([(stack, valid)], ["dem", "ndvi"])
    out = normalize(stack, ["dem", "ndvi"], table)
    assert out.dtype == np.float32 and np.isfinite(out).all()
    assert out[0, 3:].mean() == pytest.approx(0, abs=1e-4) and out[0, 3:].std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(out[1, 3:], stack[1, 3:])
    assert (out[0, :3] == 0).all()  # a missing value is the mean, on either scale
    np.testing.assert_allclose(out[1, :3], table["mean"][1], rtol=1e-6)


def test_a_constant_channel_becomes_zero_not_infinite() -> None:
    stack = np.full((1, 5, 5), 7.0, np.float32)
    table = normalization_statistics([(stack, np.ones((5, 5), bool))], ["dhdt"])
    assert (normalize(stack, ["dhdt"], table) == 0).all()


def test_columns_are_matched_by_name() -> None:
    stack = np.stack([np.full((4, 4), 10.0), np.arange(16.0).reshape(4, 4)]).astype(np.float32)
    table = normalization_statistics([(stack, np.ones((4, 4), bool))], ["red", "dem"])
    turned = normalize(stack[::-1], ["dem", "red"], table)
    np.testing.assert_array_equal(turned[::-1], normalize(stack, ["red", "dem"], table))


def test_refusals() -> None:
    stack = np.full((1, 3, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"\['red'\] have no valid pixel"):
        normalization_statistics([(stack, np.ones((3, 3), bool))], ["red"])
    table = normalization_statistics([(np.ones((1, 3, 3)), np.ones((3, 3), bool))], ["red"])
    with pytest.raises(ValueError, match="the channels are"):
        normalize(np.ones((1, 3, 3)), ["nir"], table)
    with pytest.raises(ValueError, match="2 layers"):
        normalize(np.ones((2, 3, 3)), ["red"], table)
