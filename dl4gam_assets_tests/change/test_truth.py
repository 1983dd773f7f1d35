from __future__ import annotations

import pandas as pd
import pytest

from dl4gam_assets.change import area_changes, compare_with_truth, regional_changes
from dl4gam_assets.settings import ChangeSettings
from dl4gam_assets_tests.change.test_regional import areas_of, inventory_of

SETTINGS = ChangeSettings(dates="whole_years")


def estimates(error: float) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    import numpy as np

    size = np.geomspace(0.2, 5, 8)
    inventory = inventory_of(size)
    true = [(y, size * (1 - 0.02 * (y - 2015))) for y in (2015, 2019)]
    truth = pd.concat(
        [pd.DataFrame({"glacier_id": inventory["glacier_id"], "year": y, "area_km2": a}) for y, a in true]
    )
    bias = {2015: 1.0, 2019: 1.0 + error}
    frames = {y: areas_of(inventory, y, a * bias[y], 0.02 * a) for y, a in true}
    changes, _ = area_changes(frames[2015], frames[2019], SETTINGS)
    totals = regional_changes(changes, inventory, frames[2019], SETTINGS, 2019, 2015)
    areas = pd.concat(frames.values(), ignore_index=True)
    areas["lower_km2"], areas["upper_km2"] = areas["area_km2"] - areas["std_km2"], areas["area_km2"] + areas["std_km2"]
    return areas, totals, truth


def test_perfect_estimates_have_no_bias_and_contain_the_truth() -> None:
    found = compare_with_truth(*estimates(0.0), baseline_year=2015)
    assert found.bias_km2 == pytest.approx(0) and found.interval_coverage == 1.0
    assert {r["method"] for r in found.rates} >= {"measured", "extrapolated"}
    assert all(r["inside"] for r in found.rates)
    measured = next(r for r in found.rates if r["method"] == "measured")
    assert measured["truth_pct_per_year"] == pytest.approx(-2.0) == measured["rate_pct_per_year"]


def test_a_wrong_estimate_is_told() -> None:
    found = compare_with_truth(*estimates(0.3), baseline_year=2015)
    assert found.bias_pct > 10 and found.interval_coverage == 0.5
    assert not any(r["inside"] for r in found.rates)
    text = "\n".join(" ".join(line) for line in found.lines())
    assert "outside one deviation" in text and "50%" in text
    assert found.as_dict()["n_estimates"] == 16


def test_estimates_without_truth_are_refused_and_other_glaciers_named() -> None:
    areas, totals, truth = estimates(0.0)
    with pytest.raises(ValueError, match="no estimate has a known truth"):
        compare_with_truth(areas, totals, truth.assign(year=1999), 2015)
    fewer = compare_with_truth(areas, totals, truth[truth["glacier_id"] != "g0000"], 2015)
    assert not fewer.rates or all(r["n_glaciers"] == 7 for r in fewer.rates)
    assert any("extrapolated 2019: 8 glaciers, but 7" in text for text in fewer.not_compared)
