from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dl4gam_assets.change import evaluate_glacier, pooled_scores
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.change.small_cubes import box, make_cube

SHAPE = (60, 60)
GLACIER = box(SHAPE, (20, 40), (10, 30))
NEIGHBOUR = box(SHAPE, (20, 40), (30, 50))
DEBRIS = box(SHAPE, (35, 40), (10, 30))


def rows_of(prediction: np.ndarray, **cube: np.ndarray) -> pd.DataFrame:
    made = make_cube(GLACIER, cube.get("others", NEIGHBOUR), debris=DEBRIS, not_ok=cube.get("not_ok"))
    return evaluate_glacier(prediction, made, "ensemble").set_index("scope")


def test_a_false_positive_far_away_counts_in_the_scene_and_not_in_the_ring() -> None:
    far = box(SHAPE, (0, 5), (0, 5))
    rows = rows_of(GLACIER | NEIGHBOUR | far)
    assert rows.loc["scene", "false_positive"] == 25
    assert rows.loc["ring", "false_positive"] == 0
    assert rows.loc["ring", "iou"] == 1.0
    assert rows.loc["scene", "iou"] == pytest.approx(400 / 425)
    assert rows.loc["scene", "true_positive"] == 400  # the neighbour's pixels belong to its own cell


def test_debris_has_recall_only_and_unusable_pixels_are_not_judged() -> None:
    missed = GLACIER & ~box(SHAPE, (38, 40), (10, 30))
    rows = rows_of(missed | NEIGHBOUR, not_ok=box(SHAPE, (39, 40), (0, 60)))
    assert rows.loc["debris", "recall"] == pytest.approx(60 / 80)
    assert rows.loc["debris", ["iou", "precision", "f1"]].isna().all()
    assert rows.loc["scene", "false_negative"] == 20
    assert rows.loc["ring", "n_pixels"] < rows_of(missed).loc["ring", "n_pixels"]


def test_cells_of_neighbours_count_every_pixel_once() -> None:
    first = evaluate_glacier(GLACIER | NEIGHBOUR, make_cube(GLACIER, NEIGHBOUR), "m").set_index("scope")
    second = evaluate_glacier(GLACIER | NEIGHBOUR, make_cube(NEIGHBOUR, GLACIER, glacier_id="G2"), "m").set_index(
        "scope"
    )
    ties = 60 * 60 - first.loc["scene", "n_pixels"] - second.loc["scene", "n_pixels"]
    assert ties == 0 or abs(ties) < 60  # pixels exactly halfway may go to either
    assert first.loc["scene", "true_positive"] + second.loc["scene", "true_positive"] == 800


def test_pooling_sums_pixels_and_keeps_scopes_apart() -> None:
    good = evaluate_glacier(GLACIER | NEIGHBOUR, make_cube(GLACIER, NEIGHBOUR, glacier_id="A"), "ensemble")
    half = evaluate_glacier(
        box(SHAPE, (20, 30), (10, 30)) | NEIGHBOUR, make_cube(GLACIER, NEIGHBOUR, glacier_id="B"), "ensemble"
    )
    valid = evaluate_glacier(NEIGHBOUR, make_cube(GLACIER, NEIGHBOUR, glacier_id="C"), "ensemble", role="valid")
    table = TABLES["evaluation"].conform(pd.concat([good, half, valid], ignore_index=True), {"fold": 1})
    pooled = pooled_scores(table).set_index(["method", "scope"])
    scene = pooled.loc[("ensemble", "scene")]
    assert scene["n_glaciers"] == 2 and scene["true_positive"] == 600 and scene["false_negative"] == 200
    assert scene["iou"] == pytest.approx(0.75) and scene["mean_iou"] == pytest.approx((1 + 0.5) / 2)
    assert ("ensemble", "debris") not in pooled.index  # no debris pixel was judged
    by_fold = pooled_scores(table, role=None, by=("fold", "method", "scope"))
    assert set(by_fold["fold"]) == {1} and by_fold["n_glaciers"].max() == 3
    with pytest.raises(ValueError, match="scope"):
        pooled_scores(table, by=("method",))
    assert list(pooled_scores(TABLES["evaluation"].empty()).columns) == list(pooled_scores(table).columns)


def test_a_probability_is_no_mask() -> None:
    with pytest.raises(ValueError, match="bool"):
        evaluate_glacier(np.ones(SHAPE), make_cube(GLACIER), "m")


def test_a_second_inventory_judges_the_same_pixels_by_its_own_outlines() -> None:
    smaller = box(SHAPE, (20, 40), (10, 25))
    made = make_cube(GLACIER, NEIGHBOUR)
    rows = evaluate_glacier(GLACIER | NEIGHBOUR, made, "ensemble", reference=smaller | NEIGHBOUR).set_index("scope")
    assert rows.loc["scene", "iou"] == 1.0
    assert rows.loc["reference", "n_pixels"] == rows.loc["scene", "n_pixels"]
    assert rows.loc["reference", ["true_positive", "false_positive", "false_negative"]].tolist() == [300, 100, 0]
    with pytest.raises(ValueError, match="the reference has"):
        evaluate_glacier(GLACIER, made, "ensemble", reference=smaller[:-1])
