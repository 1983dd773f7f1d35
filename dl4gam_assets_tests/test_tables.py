"""Rows of one glacier out of a large table."""

from __future__ import annotations

import gc

import numpy as np
import pandas as pd
import pytest

from dl4gam_assets import tables
from dl4gam_assets.tables import rows_of


@pytest.mark.parametrize("n", [50, 9_000])
@pytest.mark.parametrize("dtype", ["string", "object", "str"])
def test_rows_of_a_glacier_are_those_that_a_comparison_finds(n: int, dtype: str) -> None:
    rng = np.random.default_rng(n)
    ids = np.array([f"G{i}" for i in rng.integers(0, n // 3, n)], dtype=object)
    ids[rng.integers(0, n, 5)] = None
    frame = pd.DataFrame({"glacier_id": pd.Series(ids, dtype=dtype), "value": rng.random(n)})
    frame.index = rng.permutation(n)
    for glacier_id in ("G0", "G7", f"G{n // 3 - 1}", "not there"):
        expected = frame[[g == glacier_id for g in ids]]
        pd.testing.assert_frame_equal(rows_of(frame, glacier_id), expected)


def test_positions_are_those_of_the_frame_and_go_with_it() -> None:
    frame = pd.DataFrame({"glacier_id": [f"G{i % 900}" for i in range(5000)], "value": range(5000)})
    assert rows_of(frame, "G5")["value"].tolist() == [5, 905, 1805, 2705, 3605, 4505]
    other = frame.iloc[::-1].reset_index(drop=True)
    assert rows_of(other, "G5")["value"].tolist() == [4505, 3605, 2705, 1805, 905, 5]
    keys = {id(frame), id(other)}
    assert keys <= set(tables._positions)
    del frame, other
    gc.collect()
    assert not keys & set(tables._positions)
