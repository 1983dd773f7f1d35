from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.change import area_changes, combined_std, fit_rate_law, regional_changes, size_class
from dl4gam_assets.change.regional import aspect_sector, size_class_labels
from dl4gam_assets.settings import ChangeSettings

EDGES = ChangeSettings().size_class_edges_km2
WHOLE = ChangeSettings(dates="whole_years")


def inventory_of(area: np.ndarray, country: list[str] | None = None) -> pd.DataFrame:
    n = len(area)
    return pd.DataFrame(
        {
            "glacier_id": [f"g{i:04d}" for i in range(n)],
            "inventory_area_km2": area,
            "inventory_date": pd.Timestamp("2015-09-01"),
            "country": country or ["CH"] * n,
        }
    )


def areas_of(inventory: pd.DataFrame, year: int, area: np.ndarray, std: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "glacier_id": inventory["glacier_id"], "year": year, "image_date": pd.Timestamp(f"{year}-09-01"),
            "area_km2": area, "std_km2": std, "recall": 1.0,
        }
    )  # fmt: skip


def totals(frame: pd.DataFrame, grouping: str = "region") -> pd.DataFrame:
    return frame[frame["grouping"] == grouping].set_index(["group", "method"])


@settings(max_examples=50, deadline=None)
@given(std=st.lists(st.floats(0, 100), min_size=1, max_size=20), rho=st.floats(0, 1))
def test_correlated_sum_lies_between_quadrature_and_linear(std: list[float], rho: float) -> None:
    s = np.array(std)
    assert combined_std(s, 1.0) == pytest.approx(s.sum())
    assert combined_std(s, 0.0) == pytest.approx(np.sqrt((s**2).sum()))
    assert combined_std(s, 0.0) - 1e-9 <= combined_std(s, rho) <= combined_std(s, 1.0) + 1e-9
    # The formula is the quadratic form of the correlation matrix itself.
    matrix = np.full((len(s), len(s)), rho) + (1 - rho) * np.eye(len(s))
    assert combined_std(s, rho) == pytest.approx(np.sqrt(s @ matrix @ s), abs=1e-9)


def test_size_classes_are_half_open() -> None:
    assert size_class(np.array([0.005, 0.01, 0.0999, 0.1, 20.0]), EDGES).tolist() == [0, 1, 1, 2, 9]
    labels = size_class_labels(EDGES)
    assert labels[0] == "< 0.01" and labels[1] == "0.01 to 0.1" and labels[9] == ">= 20" and len(labels) == 10


def test_the_law_of_rates_is_found_again_from_noisy_glaciers() -> None:
    rng = np.random.default_rng(11)
    area = 10 ** rng.uniform(-1, 1.3, 800)
    std = rng.uniform(0.3, 1.5, 800)
    truth = (-2.0, 0.9, -0.15)
    x = np.log10(area)
    rate = np.polynomial.polynomial.polyval(x, truth) + rng.normal(0, std)
    law = fit_rate_law(area, rate, std, EDGES)
    assert law.kind == "quadratic"
    # Standard errors of this design by hand: (X' W X)^-1.
    design = np.column_stack([np.ones_like(x), x, x**2])
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ (design / std[:, None] ** 2))))
    assert (np.abs(np.array(law.coefficients) - truth) < 3.5 * errors).all()
    predicted, uncertainty = law.predict(np.array([0.05, 1.0, 15.0]))
    assert predicted == pytest.approx(np.polynomial.polynomial.polyval(np.log10([0.05, 1.0, 15.0]), truth), abs=0.4)
    assert ((uncertainty > 0.7) & (uncertainty < 1.3)).all()
    # Weights matter: precise glaciers decide, wild ones do not.
    wild = np.arange(800) % 4 == 0
    spoiled = fit_rate_law(area, np.where(wild, rate + 50, rate), np.where(wild, 1e4, std), EDGES)
    assert spoiled.coefficients == pytest.approx(law.coefficients, abs=0.25)


@pytest.mark.parametrize("between", [0.0, 0.6])
@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_totals_carry_errors_as_the_full_matrix_does(rho: float, between: float) -> None:
    """The covariance of all areas of both years, written out: correlation rho between glaciers, ``between`` in time."""
    area = np.array([1.0, 2.0, 4.0])
    s0, s1 = np.array([0.05, 0.02, 0.2]), np.array([0.03, 0.08, 0.1])
    inventory = inventory_of(area)
    baseline, areas = areas_of(inventory, 2015, area, s0), areas_of(inventory, 2019, 0.8 * area, s1)
    chosen = {"between_glacier_correlation": rho, "between_year_correlation": between}
    one = np.full((3, 3), rho) + (1 - rho) * np.eye(3)
    matrix = np.kron(np.array([[1, between], [between, 1]]), one) * np.outer(np.r_[s0, s1], np.r_[s0, s1])
    for how, weight in (("left_out", 1.0), ("carried", 0.8)):
        settings = WHOLE.model_copy(update=chosen | {"baseline_error": how})
        changes, _ = area_changes(baseline, areas, settings)
        row = totals(regional_changes(changes, inventory, areas, settings, 2019, 2015)).loc["all", "measured"]
        rates, shares = (np.r_[np.full(3, -w), np.ones(3)] / 4 for w in (1.0, weight))
        assert row["rate_std_km2_per_year"] == pytest.approx(np.sqrt(rates @ matrix @ rates))
        assert row["rate_std_pct_per_year"] == pytest.approx(100 * np.sqrt(shares @ matrix @ shares) / 7)


def test_a_rate_of_the_law_keeps_its_deviation_whatever_years_share() -> None:
    inventory = inventory_of(np.r_[np.geomspace(0.2, 5, 12), 1.0])
    area = inventory["inventory_area_km2"].to_numpy()
    rows = []
    for between in (0.0, 0.7):
        settings = WHOLE.model_copy(update={"between_year_correlation": between})
        baseline = areas_of(inventory.iloc[:12], 2015, area[:12], 0.01 * area[:12])
        areas = areas_of(inventory.iloc[:12], 2019, 0.8 * area[:12], 0.01 * area[:12])
        changes, _ = area_changes(baseline, areas, settings)
        law = fit_rate_law(
            area[:12], changes["rate_pct_per_year"].to_numpy(), changes["rate_std_pct_per_year"].to_numpy(), EDGES
        )
        with_law = inventory.assign(country=["CH"] * 12 + ["AT"])
        got = totals(regional_changes(changes, with_law, areas, settings, 2019, 2015), "country")
        rows.append((got.loc[("AT", "extrapolated"), "rate_std_pct_per_year"], law.predict(np.array([1.0]))[1][0]))
    for found, expected in rows:
        assert found == pytest.approx(expected)
    assert rows[0][1] > rows[1][1]  # of glaciers whose own rates are better known


def test_few_glaciers_give_their_weighted_mean_and_none_give_nothing() -> None:
    law = fit_rate_law(np.array([1.0, 3.0]), np.array([-2.0, -1.0]), np.array([0.1, 0.1]), EDGES)
    rate, std = law.predict(np.array([0.02, 8.0]))
    assert law.kind == "mean" and rate == pytest.approx([-1.25, -1.25])
    assert std == pytest.approx([np.sqrt(0.1875)] * 2)
    none = fit_rate_law(np.array([]), np.array([]), np.array([]), EDGES)
    assert none.kind == "none" and np.isnan(none.predict(np.array([1.0]))[0]).all()


def test_a_law_of_few_glaciers_is_flat_outside_their_areas() -> None:
    area = np.geomspace(0.2, 5, 8)
    law = fit_rate_law(area, -3 + np.log10(area), np.full(8, 0.5), EDGES)
    rate, _ = law.predict(np.array([0.001, 0.2, 5.0, 500.0]))
    assert rate[0] == pytest.approx(rate[1]) and rate[2] == pytest.approx(rate[3])


def test_the_smallest_class_borrows_from_the_next() -> None:
    area = np.concatenate([np.linspace(0.11, 0.19, 20), np.linspace(2.1, 4.9, 20)])
    std = np.concatenate([np.full(20, 2.0), np.full(20, 0.2)])
    law = fit_rate_law(area, np.full(40, -2.0), std, EDGES)
    assert law.predict(np.array([0.02, 0.15, 3.0, 50.0]))[1] == pytest.approx([2.0, 2.0, 0.2, 0.2])


def test_totals_by_hand_and_extrapolation_starts_from_the_inventory() -> None:
    inventory = inventory_of(np.array([1.0, 2.0, 4.0]), ["CH", "CH", "AT"])
    first, later = inventory.iloc[:2], inventory.iloc[:2]
    baseline = areas_of(first, 2015, np.array([1.0, 2.0]), np.array([0.03, 0.06]))
    areas = areas_of(later, 2019, np.array([0.8, 1.6]), np.array([0.04, 0.08]))
    changes, _ = area_changes(baseline, areas, WHOLE)
    rows = regional_changes(changes, inventory, areas, WHOLE, 2019, 2015)
    region = totals(rows)
    measured = region.loc[("all", "measured")]
    assert measured["rate_km2_per_year"] == pytest.approx(-0.15)
    assert measured["rate_std_km2_per_year"] == pytest.approx(np.hypot(0.09, 0.12) / 4)  # linear, then quadrature
    assert measured["rate_pct_per_year"] == pytest.approx(-5.0)
    assert (measured["baseline_area_km2"], measured["area_km2"], measured["std_km2"]) == pytest.approx((3.0, 2.4, 0.12))
    every = region.loc[("all", "extrapolated")]
    assert every["n_glaciers"] == 3 and every["n_measured"] == 2
    assert every["rate_km2_per_year"] == pytest.approx(-0.15 - 0.05 * 4)
    assert every["area_km2"] == pytest.approx(2.4 + 4 * 0.8)
    country = totals(rows, "country")
    assert country.loc[("AT", "measured"), "n_glaciers"] == 0 and np.isnan(country.loc[("AT", "measured"), "area_km2"])
    assert country.loc[("AT", "extrapolated"), "area_km2"] == pytest.approx(3.2)


def test_the_filter_and_the_method_without_it() -> None:
    area = np.geomspace(0.2, 10, 20)
    inventory = inventory_of(area)
    shrink = np.where(np.arange(20) % 2, 0.8, 0.999)
    baseline = areas_of(inventory, 2015, area, 0.01 * area)
    areas = areas_of(inventory, 2019, area * shrink, 0.01 * area)
    changes, _ = area_changes(baseline, areas, WHOLE)
    region = totals(regional_changes(changes, inventory, areas, WHOLE, 2019, 2015)).loc["all"]
    assert region.loc["filtered", "n_glaciers"] == 10 and region.loc["measured", "n_glaciers"] == 20
    assert region.loc["filtered", "rate_pct_per_year"] == pytest.approx(-5.0)
    assert region.loc["extrapolated", "rate_pct_per_year"] == pytest.approx(-5.0, abs=0.05)
    assert region.loc["extrapolated_without_snr", "rate_pct_per_year"] == pytest.approx(
        region.loc["measured", "rate_pct_per_year"]
    )
    assert region.loc["measured", "rate_pct_per_year"] > -3.2


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [(["snr", "recall"], 4), (["snr"], 5), (["snr", "recall", "cloud"], 3), (["snr", "growth", "filled"], 3), ([], 5)],
)
def test_without_the_snr_filter_all_others_that_were_chosen_stay(chosen: list[str], kept: int) -> None:
    """Glaciers: one calm and good, and one each for recall, cloud, filled and growth."""
    inventory = inventory_of(np.full(5, 1.0))
    baseline = areas_of(inventory, 2015, np.full(5, 1.0), np.full(5, 0.01))
    baseline["recall"] = [1.0, 0.5, 1.0, 1.0, 1.0]
    areas = areas_of(inventory, 2019, np.array([0.999, 0.8, 0.8, 0.8, 1.2]), np.full(5, 0.01))
    areas = areas.assign(usable_share=[1, 1, 0.1, 1, 1], filled_share=[0, 0, 0, 0.9, 0])
    settings = WHOLE.model_copy(update={"filter": chosen})
    changes, _ = area_changes(baseline, areas, settings)
    assert changes["flags"].tolist() == ["snr", "recall", "cloud", "filled", "growth"]
    region = totals(regional_changes(changes, inventory, areas, settings, 2019, 2015)).loc["all"]
    row = region.loc["extrapolated_without_snr"]
    assert (row["n_measured"], row["n_glaciers"]) == (kept, 5)


def test_the_baseline_year_has_areas_and_no_rates() -> None:
    inventory = inventory_of(np.array([1.0, 2.0, 4.0]))
    areas = areas_of(inventory.iloc[:2], 2015, np.array([1.1, 1.9]), np.array([0.11, 0.19]))
    empty, _ = area_changes(areas, areas, WHOLE)
    region = totals(regional_changes(empty, inventory, areas, WHOLE, 2015, 2015)).loc["all"]
    assert region["rate_km2_per_year"].isna().all() and region["rate_pct_per_year"].isna().all()
    assert region.loc["measured", "area_km2"] == pytest.approx(3.0)
    assert region.loc["extrapolated", "area_km2"] == pytest.approx(7.0)
    assert region.loc["extrapolated", "std_km2"] == pytest.approx(0.3 + 0.4)  # 10% as the measured ones


@pytest.mark.parametrize(("chosen", "kept"), [(["snr", "recall"], 2), (["snr"], 3), (["cloud", "filled"], 1)])
def test_the_baseline_year_is_filtered_by_the_flags_that_were_chosen(chosen: list[str], kept: int) -> None:
    inventory = inventory_of(np.array([1.0, 2.0, 4.0]))
    areas = areas_of(inventory, 2015, np.array([1.1, 1.9, 4.2]), np.full(3, 0.1))
    areas = areas.assign(recall=[1.0, 0.5, 1.0], usable_share=[0.1, np.nan, 1.0], filled_share=[0.0, np.nan, 0.9])
    settings = WHOLE.model_copy(update={"filter": chosen})
    empty, _ = area_changes(areas, areas, settings)
    region = totals(regional_changes(empty, inventory, areas, settings, 2015, 2015)).loc["all"]
    assert region.loc["filtered", "n_glaciers"] == region.loc["extrapolated", "n_measured"] == kept
    assert region.loc["measured", "n_glaciers"] == 3


def test_no_glacier_loses_more_than_it_has() -> None:
    inventory = inventory_of(np.array([1.0, 0.05]))
    baseline = areas_of(inventory.iloc[:1], 2015, np.array([1.0]), np.array([0.01]))
    areas = areas_of(inventory.iloc[:1], 2017, np.array([0.4]), np.array([0.01]))
    inventory["inventory_date"] = [pd.Timestamp("2015-09-01"), pd.Timestamp("2005-09-01")]
    changes, _ = area_changes(baseline, areas, WHOLE)
    every = totals(regional_changes(changes, inventory, areas, WHOLE, 2017, 2015)).loc[("all", "extrapolated")]
    assert every["area_km2"] == pytest.approx(0.4)
    assert every["rate_km2_per_year"] == pytest.approx(-0.3 - 0.05 / 12)


def test_a_year_without_any_measurement_and_strangers() -> None:
    inventory = inventory_of(np.array([1.0]))
    baseline = areas_of(inventory, 2015, np.array([1.0]), np.array([0.01]))
    nothing = baseline.iloc[:0]
    changes, excluded = area_changes(baseline, nothing, WHOLE)
    assert excluded["reason"].tolist() == ["not_measured"]
    region = totals(regional_changes(changes, inventory, nothing, WHOLE, 2020, 2015)).loc["all"]
    assert region.loc["measured", "n_glaciers"] == 0 and region["rate_pct_per_year"].isna().all()
    stranger = areas_of(inventory, 2020, np.array([0.9]), np.array([0.01])).assign(glacier_id="stranger")
    with pytest.raises(ValueError, match="stranger"):
        regional_changes(changes, inventory, stranger, WHOLE, 2020, 2015)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), rho=st.floats(0, 1))
def test_groups_add_up_and_order_does_not_matter(seed: int, n: int, rho: float) -> None:
    rng = np.random.default_rng(seed)
    area = 10 ** rng.uniform(-2, 1.4, n)
    inventory = inventory_of(area, [str(c) for c in rng.choice(["CH", "AT", "IT", ""], n)])
    setting = WHOLE.model_copy(update={"between_glacier_correlation": rho})
    known = inventory[rng.random(n) < 0.7]
    size = known["inventory_area_km2"].to_numpy()
    baseline = areas_of(known, 2015, size, 0.05 * size)
    areas = areas_of(known, 2023, size * rng.uniform(0.6, 1.02, len(known)), 0.05 * size)
    changes, _ = area_changes(baseline, areas, setting)
    rows = regional_changes(changes, inventory, areas, setting, 2023, 2015)
    mixed = regional_changes(
        changes.sample(frac=1, random_state=1),
        inventory.sample(frac=1, random_state=2),
        areas[::-1],
        setting,
        2023,
        2015,
    )
    pd.testing.assert_frame_equal(rows, mixed)
    for method, of_method in rows.groupby("method"):
        whole = of_method[of_method["grouping"] == "region"].iloc[0]
        for grouping in ("country", "size_class"):
            parts = of_method[of_method["grouping"] == grouping]
            assert parts["n_glaciers"].sum() == whole["n_glaciers"]
            for column in ("area_km2", "baseline_area_km2", "rate_km2_per_year"):
                if not np.isnan(whole[column]):
                    assert np.nansum(parts[column]) == pytest.approx(whole[column]), (method, column)
            if rho == 1.0 and not np.isnan(whole["std_km2"]):
                assert np.nansum(parts["std_km2"]) == pytest.approx(whole["std_km2"])
        if method.startswith("extrapolated"):
            assert whole["n_glaciers"] == n


def test_aspects_make_a_grouping_that_adds_up() -> None:
    inventory = inventory_of(np.array([1.0, 2.0, 4.0, 0.05]))
    first = areas_of(inventory, 2015, np.array([1.0, 2.0, 4.0, 0.05]), np.full(4, 0.01)).iloc[:3]
    later = areas_of(inventory, 2025, np.array([0.9, 1.8, 3.6, 0.04]), np.full(4, 0.01)).iloc[:3]
    changes, _ = area_changes(first, later, WHOLE)
    aspects = pd.Series({"g0000": 350.0, "g0001": 10.0, "g0002": 181.0})
    got = regional_changes(changes, inventory, later, WHOLE, 2025, 2015, aspects)
    aspect = totals(got, "aspect")
    assert aspect.index.get_level_values("group").unique().tolist() == ["N", "S", "unknown"]
    measured = aspect.xs("measured", level="method")
    assert measured["n_glaciers"].to_dict() == {"N": 2, "S": 1, "unknown": 0}
    whole = totals(got).loc[("all", "extrapolated")]
    parts = aspect.xs("extrapolated", level="method")
    assert parts["rate_km2_per_year"].sum() == pytest.approx(whole["rate_km2_per_year"])
    assert "aspect" not in set(regional_changes(changes, inventory, later, WHOLE, 2025, 2015)["grouping"])


@pytest.mark.parametrize(
    ("degrees", "name"), [(0, "N"), (337.5, "N"), (22.5, "NE"), (200, "S"), (359.9, "N"), (270, "W")]
)
def test_sectors_of_the_compass(degrees: float, name: str) -> None:
    assert aspect_sector(np.array([degrees]))[0] == name


def test_a_correlation_that_decays_is_used_and_named() -> None:
    inventory = inventory_of(np.full(3, 1.0)).assign(lon=[8.0, 8.01, 14.0], lat=46.0)
    first = areas_of(inventory, 2015, np.full(3, 1.0), np.full(3, 0.1))
    later = areas_of(inventory, 2025, np.full(3, 0.8), np.full(3, 0.1))
    changes, _ = area_changes(first, later, WHOLE)
    std = {}
    for name, update in {
        "linear": {}, "decaying": {"correlation_length_km": 50.0}, "none": {"between_glacier_correlation": 0.0}
    }.items():  # fmt: skip
        settings_now = WHOLE.model_copy(update=update)
        row = totals(regional_changes(changes, inventory, later, settings_now, 2025, 2015)).loc[("all", "measured")]
        std[name] = row["std_km2"]
        length = settings_now.correlation_length_km
        assert row["correlation_length_km"] == length if length else pd.isna(row["correlation_length_km"])
    assert std["linear"] == pytest.approx(0.3) and std["none"] == pytest.approx(0.1 * np.sqrt(3))
    assert std["decaying"] == pytest.approx(np.sqrt(0.2**2 + 0.1**2), rel=0.02)  # two neighbours and one far away
