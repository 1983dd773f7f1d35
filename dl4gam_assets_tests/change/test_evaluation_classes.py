"""Quality by size class and debris: the function, the view in results.duckdb, and that ids decide, not positions."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.change import class_scores, evaluate_glacier, glacier_classes, pooled_scores
from dl4gam_assets.change.evaluation import scores
from dl4gam_assets.publication.database import build_database, query_database
from dl4gam_assets.settings import load_region
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.change.small_cubes import box, make_cube

EDGES = [0.1, 1.0, 10.0]
GLACIERS = pd.DataFrame(
    {"glacier_id": ["a", "b", "c", "d"], "inventory_area_km2": [0.05, 0.5, 2.0, 20.0]},
)
DEBRIS = pd.DataFrame({"glacier_id": ["d", "b"], "debris_km2": [2.0, 0.04]})


def rows_of(counts: dict[str, tuple[int, int, int]], method: str = "ensemble") -> pd.DataFrame:
    """Evaluation rows of test glaciers from (true positive, false positive, false negative)."""
    out = []
    for glacier, (tp, fp, fn) in counts.items():
        for scope in ("scene", "debris"):
            found = {"true_positive": tp, "false_positive": 0 if scope == "debris" else fp, "false_negative": fn}
            n = tp + fp + fn
            out.append(
                {"glacier_id": glacier, "role": "test", "method": method, "scope": scope, "n_pixels": n}
                | found
                | scores(found, scope)
            )
    return pd.DataFrame(out)


COUNTS = {"a": (50, 10, 0), "b": (400, 0, 100), "c": (1900, 100, 100), "d": (15000, 0, 5000)}


def test_classes_of_glaciers_are_joined_by_id() -> None:
    classes = glacier_classes(GLACIERS, DEBRIS, EDGES, 0.1)
    assert classes["size_class"].to_dict() == {"a": "< 0.1", "b": "0.1 to 1", "c": "1 to 10", "d": ">= 10"}
    assert classes["debris_share"].to_dict() == pytest.approx({"a": 0, "b": 0.08, "c": 0, "d": 0.1})
    assert classes["debris_covered"].to_dict() == {"a": False, "b": False, "c": False, "d": True}
    unknown = glacier_classes(GLACIERS, None, EDGES, 0.1)
    assert unknown["debris_covered"].isna().all() and unknown["debris_share"].isna().all()


def test_scores_by_class_pool_pixels_weigh_areas_and_average_glaciers() -> None:
    table = rows_of(COUNTS).join(glacier_classes(GLACIERS, DEBRIS, EDGES, 0.1), on="glacier_id")
    got = class_scores(table).set_index(["grouping", "group", "scope"]).sort_index()
    clean = got.loc[("debris", "clean", "scene")]
    assert clean["n_glaciers"] == 3
    assert clean["iou"] == pytest.approx(2350 / 2660)
    assert clean["mean_iou"] == pytest.approx(np.mean([50 / 60, 400 / 500, 1900 / 2100]))
    weights = [0.05, 0.5, 2.0]
    assert clean["weighted_iou"] == pytest.approx(np.average([50 / 60, 400 / 500, 1900 / 2100], weights=weights))
    assert got.loc[("debris", "debris-covered", "debris"), "recall"] == pytest.approx(0.75)
    assert np.isnan(got.loc[("debris", "debris-covered", "debris"), "weighted_iou"])
    sizes = class_scores(table).query("grouping == 'size_class' and scope == 'scene'")["group"].tolist()
    assert sizes == ["< 0.1", "0.1 to 1", "1 to 10", ">= 10"]
    # Classes share out the glaciers: their pixels add up to those of all.
    for grouping in ("size_class", "debris"):
        parts = got.loc[grouping].groupby("scope")[["n_pixels", "true_positive"]].sum()
        everything = got.loc[("all", "all")][["n_pixels", "true_positive"]]
        assert (parts.sort_index() == everything.sort_index()).all().all()


def test_without_classes_only_all_glaciers_are_pooled() -> None:
    table = TABLES["evaluation"].conform(rows_of(COUNTS), {"fold": 1})
    got = class_scores(table)
    assert set(got["grouping"]) == {"all"} and len(got) == 2 and got["weighted_iou"].isna().all()
    pd.testing.assert_frame_equal(got.drop(columns=["grouping", "group"]), pooled_scores(table))
    assert class_scores(TABLES["evaluation"].empty()).empty


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_rows_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    debris = DEBRIS.iloc[rng.permutation(len(DEBRIS))]
    classes = glacier_classes(GLACIERS.iloc[rng.permutation(len(GLACIERS))], debris, EDGES, 0.1)
    rows = rows_of(COUNTS)
    rows = rows.iloc[rng.permutation(len(rows))].join(classes, on="glacier_id")
    expected = rows_of(COUNTS).join(glacier_classes(GLACIERS, DEBRIS, EDGES, 0.1), on="glacier_id")
    pd.testing.assert_frame_equal(class_scores(rows), class_scores(expected))


def test_the_view_gives_the_figures_of_the_function(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    classes = glacier_classes(GLACIERS, DEBRIS, EDGES, 0.1)
    for fold, ids in ((1, ["a", "d"]), (2, ["b", "c"])):
        rows = pd.concat(
            [rows_of({g: COUNTS[g] for g in ids}), rows_of({g: COUNTS[g][::-1] for g in ids}, "band ratio")],
            ignore_index=True,
        )
        storage.write_table("evaluation", rows.join(classes, on="glacier_id"), {"fold": fold})
    squares = shapely.box(10, 46 + np.arange(len(GLACIERS)), 10.01, 46.01 + np.arange(len(GLACIERS)))
    known = GLACIERS.assign(glacier_int=range(1, len(GLACIERS) + 1), lon=10.0, lat=46.0, utm_epsg=32632, modelled=True)
    storage.write_table("glaciers", gpd.GeoDataFrame(known, geometry=squares, crs=4326))
    build_database(storage, load_region("demo"), tmp_path / "results.duckdb")
    view = query_database(tmp_path / "results.duckdb", "from evaluation_by_class")
    keys = ["method", "scope", "grouping", "group"]
    expected = class_scores(storage.read_table("evaluation")).set_index(keys).sort_index()
    assert len(view) == len(expected) == 2 * 2 * (1 + 4 + 2)
    got = view.set_index(keys).sort_index()[expected.columns]
    pd.testing.assert_frame_equal(got.astype(float), expected.astype(float), check_names=False)


def test_debris_and_clean_ice_share_out_the_outline() -> None:
    shape = (40, 40)
    glacier, debris = box(shape, (10, 30), (10, 30)), box(shape, (25, 30), (10, 30))
    cube = make_cube(glacier, debris=debris, not_ok=box(shape, (10, 11), (0, 40)))
    rows = evaluate_glacier(glacier & ~box(shape, (12, 14), (10, 30)), cube, "ensemble").set_index("scope")
    assert rows.loc["debris", "n_pixels"] == 100 and rows.loc["clean_ice", "n_pixels"] == 280
    assert rows.loc["debris", "recall"] == 1.0
    assert rows.loc["clean_ice", "recall"] == pytest.approx(240 / 280)
    assert rows.loc["clean_ice", ["iou", "precision", "f1"]].isna().all()
