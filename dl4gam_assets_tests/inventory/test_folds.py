"""Geographic cross-validation: every glacier tested once, validation between test and training."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.inventory import geographic_folds
from dl4gam_assets.settings import SettingsError


def glaciers_of(areas: list[float], longitudes: list[float] | None = None) -> gpd.GeoDataFrame:
    """Rows that folds are made from; longitudes default to one glacier every tenth of a degree."""
    lon = longitudes if longitudes is not None else [6 + 0.1 * i for i in range(len(areas))]
    return gpd.GeoDataFrame(
        {"glacier_id": [f"G{i:04d}" for i in range(len(areas))], "inventory_area_km2": areas},
        geometry=[shapely.box(x - 0.001, 46, x, 46.01) for x in lon],
        crs="EPSG:4326",
    )


def check_roles(folds: pd.DataFrame, glaciers: gpd.GeoDataFrame, n: int) -> None:
    """The rules that hold for every region, however small."""
    assert len(folds) == n * len(glaciers)
    tested = folds[folds["role"] == "test"]
    assert sorted(tested["glacier_id"]) == sorted(glaciers["glacier_id"])
    east = glaciers.set_index("glacier_id").geometry.bounds["maxx"]
    for _, fold in folds.groupby("fold"):
        role = fold.set_index("glacier_id")["role"].reindex(
            east.reset_index().sort_values(["maxx", "glacier_id"], ascending=[False, True])["glacier_id"]
        )
        assert set(role) == {"train", "valid", "test"}
        # From east to west: train, valid, test, valid, train, each in one piece, some of them absent.
        runs = [r for r, before in zip(role, [None, *role[:-1]], strict=True) if r != before]
        assert "-".join(runs) in {
            "test-valid-train", "train-valid-test", "train-valid-test-valid-train",
            "valid-test-valid-train", "train-valid-test-valid", "valid-test-train", "train-test-valid",
            "train-valid-test-train", "train-test-valid-train",
        }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.1, 80.0), min_size=4, max_size=40),
    st.integers(2, 6),
    st.sampled_from([0.05, 0.1, 0.2, 0.4]),
)
def test_rules_hold_for_any_region(areas: list[float], n: int, share: float) -> None:
    glaciers = glaciers_of(areas)
    if len(areas) < n:
        with pytest.raises(SettingsError, match="can not be split"):
            geographic_folds(glaciers, n, share)
        return
    check_roles(geographic_folds(glaciers, n, share), glaciers, n)


@pytest.mark.parametrize(("count", "n"), [(2, 2), (3, 2), (4, 5)])
def test_too_few_glaciers_are_refused(count: int, n: int) -> None:
    with pytest.raises(SettingsError, match=f"{count} glaciers"):
        geographic_folds(glaciers_of([1.0] * count), n, 0.1)


def test_equal_glaciers_give_the_published_shares() -> None:
    glaciers = glaciers_of([1.0] * 200)
    folds = geographic_folds(glaciers, 5, 0.1)
    sizes = folds.groupby(["fold", "role"]).size().unstack()
    assert (sizes["test"] == 40).all()
    assert (sizes["valid"] == 20).all()
    first = folds[(folds["fold"] == 1) & (folds["role"] == "test")]["glacier_id"]
    assert set(first) == set(glaciers.nlargest(40, "inventory_area_km2").index.map(lambda i: f"G{199 - i:04d}"))


def test_order_of_rows_does_not_matter() -> None:
    glaciers = glaciers_of([1.0, 5.0, 2.0, 0.3, 7.0, 1.0, 0.5, 2.5, 1.5, 4.0])
    mixed = glaciers.sample(frac=1, random_state=3)
    a = geographic_folds(glaciers, 5, 0.1).sort_values(["fold", "glacier_id"]).reset_index(drop=True)
    b = geographic_folds(mixed, 5, 0.1).sort_values(["fold", "glacier_id"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(a, b)


def test_the_alps_as_published(real_data: Path) -> None:
    path = next((real_data / "inventory_tables").glob("paul2020*.csv.gz"))
    table = pd.read_csv(path)
    table = table[table["AREA_KM2"] >= 0.1]
    assert len(table) == 1646
    glaciers = glaciers_of(table["AREA_KM2"].tolist(), table["LON"].tolist())
    folds = geographic_folds(glaciers, 5, 0.1)
    check_roles(folds, glaciers, 5)
    area = folds.merge(glaciers[["glacier_id", "inventory_area_km2"]], on="glacier_id")
    share = area.groupby(["fold", "role"])["inventory_area_km2"].sum().unstack() / table["AREA_KM2"].sum()
    # The largest glacier holds 4% of the area, and no block can split it.
    assert share["test"].to_numpy() == pytest.approx(np.full(5, 0.2), abs=0.025)
    assert share["valid"].to_numpy() == pytest.approx(np.full(5, 0.1), abs=0.03)
    assert share["train"].to_numpy() == pytest.approx(np.full(5, 0.7), abs=0.04)
