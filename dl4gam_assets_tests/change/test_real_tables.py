"""The real inventory of the Alps (Paul et al. 2020, 4,395 glaciers) with rates from a known law."""

from __future__ import annotations

import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely

from dl4gam_assets.change import area_changes, fit_rate_law, regional_changes, size_class
from dl4gam_assets.change.simulator import Errors, measure
from dl4gam_assets.inventory import geographic_folds
from dl4gam_assets.settings import ChangeSettings

LAW = (-2.2, 1.0, 0.1)
YEARS = 8.0


@pytest.fixture(scope="module")
def alps(real_data: Path) -> pd.DataFrame:
    """Areas, positions, dates and countries are real; the rates follow the law with a scatter of 0.5 %/yr."""
    table = pd.read_csv(real_data / "inventory_tables" / "paul2020_c3s_gi_rgi11_s2_2015_v2_attributes.csv.gz")
    area = table["AREA_KM2"].to_numpy()
    x = np.log10(area)
    rng = np.random.default_rng(7)
    rate = LAW[0] + LAW[1] * x + LAW[2] * x**2 + rng.normal(0, 0.5, len(area))
    return pd.DataFrame(
        {
            "glacier_id": [f"P{n:05d}" for n in table["GLACIER_NR"]],
            "lon": table["LON"],
            "lat": table["LAT"],
            "country": table["Country"],
            "inventory_date": pd.to_datetime(table["Date"]),
            "inventory_area_km2": area,
            "aspect": table["ASP_MEAN"],
            "true_area_0": area,
            "true_area_1": np.maximum(area * (1 + rate / 100 * YEARS), 0.0),
        }
    )


def test_the_inventory_is_the_published_one(alps: pd.DataFrame) -> None:
    assert len(alps) == 4395 and alps["inventory_area_km2"].sum() == pytest.approx(1805.9, abs=0.1)
    large = alps[alps["inventory_area_km2"] >= 0.1]
    assert abs(len(large) - 1646) <= 2


def test_validation_parts_test_from_training_in_the_alps(alps: pd.DataFrame) -> None:
    large = alps[alps["inventory_area_km2"] >= 0.1]
    lon, lat, area = (large[c].to_numpy() for c in ("lon", "lat", "inventory_area_km2"))
    side = np.sqrt(area) / 111 / 2
    boxes = shapely.box(lon - side, lat - side, lon + side, lat + side)
    frame = gpd.GeoDataFrame(large.reset_index(drop=True).assign(east=lon + side), geometry=boxes, crs="EPSG:4326")
    start = time.process_time()
    folds = geographic_folds(frame, 5, 0.1)
    assert time.process_time() - start < 5
    joined = folds.merge(frame[["glacier_id", "east", "inventory_area_km2"]], on="glacier_id")
    share = joined.pivot_table(index="fold", columns="role", values="inventory_area_km2", aggfunc="sum")
    share = share.div(share.sum(axis=1), axis=0)
    assert share["test"].between(0.17, 0.23).all() and share["valid"].between(0.07, 0.13).all()
    for _, fold in joined.groupby("fold"):
        test, train = (fold[fold["role"] == role]["east"].to_numpy() for role in ("test", "train"))
        assert not ((train > test.min()) & (train < test.max())).any()


@pytest.mark.parametrize("correlation", [{}, {"correlation_length_km": 50.0}, {"between_glacier_correlation": 0.0}])
def test_the_law_comes_back_within_its_interval_in_seconds(alps: pd.DataFrame, correlation: dict[str, float]) -> None:
    settings = ChangeSettings.model_validate(correlation)
    mine = alps[alps["inventory_area_km2"] >= 0.1]
    rng = np.random.default_rng(3)
    # Errors are independent here, whatever the totals assume: drawing them correlated would cost more than the test.
    baseline, areas = measure(mine, Errors(relative_at_1km2=0.03, correlation=0.0), rng, YEARS)
    # Images of the inventory's own dates, each glacier eight years later again.
    baseline["image_date"] = mine["inventory_date"].to_numpy()
    areas["image_date"] = baseline["image_date"] + pd.Timedelta(days=365.25 * YEARS)
    start = time.process_time()
    changes, excluded = area_changes(baseline, areas, settings)
    aspects = alps.set_index("glacier_id")["aspect"]
    totals = regional_changes(changes, alps, areas, settings, int(areas["year"].iloc[0]), 2015, aspects)
    assert time.process_time() - start < 20
    assert not len(excluded) and len(changes) == len(mine)
    region = totals[totals["grouping"] == "region"].set_index("method")
    true = 100 * (alps["true_area_1"].sum() - alps["true_area_0"].sum()) / YEARS / alps["true_area_0"].sum()
    row = region.loc["extrapolated_without_snr"]
    assert row["n_glaciers"] == 4395
    off = abs(row["rate_pct_per_year"] - true)
    assert off < 2 * row["rate_std_pct_per_year"] and off < 0.1
    if correlation == {"between_glacier_correlation": 0.0}:  # told in docs/validation.md: the filter's lean shows here
        filtered = region.loc["extrapolated"]
        assert true - filtered["rate_pct_per_year"] > filtered["rate_std_pct_per_year"]
    assert set(totals["grouping"]) == {"region", "country", "size_class", "aspect"}
    for grouping in ("country", "size_class", "aspect"):
        parts = totals[(totals["grouping"] == grouping) & (totals["method"] == "extrapolated")]
        assert parts["baseline_area_km2"].sum() == pytest.approx(region.loc["extrapolated", "baseline_area_km2"])
        assert parts["n_glaciers"].sum() == 4395
    rates = changes.set_index("glacier_id").loc[mine["glacier_id"]]
    law = fit_rate_law(
        mine["inventory_area_km2"].to_numpy(),
        rates["rate_pct_per_year"].to_numpy(),
        rates["rate_std_pct_per_year"].to_numpy(),
        settings.size_class_edges_km2,
    )
    at = np.array([0.02, 0.2, 2.0, 20.0])
    x = np.log10(at)
    predicted, std = law.predict(at)
    off = np.abs(predicted - (LAW[0] + LAW[1] * x + LAW[2] * x**2))
    assert (off < std).all()
    # And within the standard errors of the weighted fit, whose residuals hold the scatter that the weights do not know.
    fitted = np.log10(mine["inventory_area_km2"].to_numpy())
    design = np.column_stack([np.ones(len(fitted)), fitted, fitted**2])
    weight = 1 / rates["rate_std_pct_per_year"].to_numpy() ** 2
    residual = rates["rate_pct_per_year"].to_numpy() - design @ np.array(law.coefficients)
    bread = np.linalg.inv(design.T @ (design * weight[:, None]))
    covariance = bread @ (design.T @ (design * (weight * residual)[:, None] ** 2)) @ bread
    at_design = np.column_stack([np.ones(4), x, x**2])
    errors = np.sqrt(np.einsum("ij,jk,ik->i", at_design, covariance, at_design))
    assert (off[1:] < 3.5 * errors[1:]).all()  # 0.02 km2 lies outside of what was fitted


def test_size_classes_of_the_alps(alps: pd.DataFrame) -> None:
    """Half of the glaciers are below 0.1 km2 and hold a few percent of the area: why they are extrapolated."""
    classes = size_class(alps["inventory_area_km2"].to_numpy(), ChangeSettings().size_class_edges_km2)
    small = classes <= 1
    assert 0.5 < small.mean() < 0.7
    assert alps.loc[small, "inventory_area_km2"].sum() / alps["inventory_area_km2"].sum() < 0.07
