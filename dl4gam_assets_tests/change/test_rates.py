from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.change import area_changes, decimal_year
from dl4gam_assets.settings import ChangeSettings

PUBLISHED = ChangeSettings(dates="whole_years")
EXACT = ChangeSettings()


def year_of(year: int, **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    n = len(frame)
    defaults = {"std_km2": 0.01, "recall": 1.0, "image_date": f"{year}-09-01"}
    frame = frame.assign(year=year, **{k: [v] * n for k, v in defaults.items() if k not in frame})
    return frame.assign(image_date=pd.to_datetime(frame["image_date"]))


def test_decimal_years_of_known_dates() -> None:
    dates = pd.Series(pd.to_datetime(["2015-01-01", "2016-07-02", "2015-07-02 12:00", None], format="ISO8601"))
    assert decimal_year(dates).tolist()[:3] == pytest.approx([2015.0, 2016.5, 2015.5])
    assert np.isnan(decimal_year(dates)[3])


def test_rate_and_deviation_by_hand() -> None:
    baseline = year_of(2015, glacier_id=["a"], area_km2=[2.0], std_km2=[0.03])
    areas = year_of(2019, glacier_id=["a"], area_km2=[1.8], std_km2=[0.04])
    row = area_changes(baseline, areas, PUBLISHED)[0].iloc[0]
    assert row["rate_km2_per_year"] == pytest.approx(-0.05)
    assert row["rate_std_km2_per_year"] == pytest.approx(0.05 / 4)
    assert row["rate_pct_per_year"] == pytest.approx(-2.5)
    assert row["snr"] == pytest.approx(4.0) and bool(row["ok"]) and row["flags"] == ""


def test_errors_of_two_years_that_correlate_cancel_and_a_baseline_divides_too() -> None:
    baseline = year_of(2015, glacier_id=["a"], area_km2=[2.0], std_km2=[0.03])
    areas = year_of(2019, glacier_id=["a"], area_km2=[1.8], std_km2=[0.04])
    half = PUBLISHED.model_copy(update={"between_year_correlation": 0.5})
    row = area_changes(baseline, areas, half)[0].iloc[0]
    of_change = np.sqrt(0.03**2 + 0.04**2 - 0.03 * 0.04)
    assert row["rate_std_km2_per_year"] == pytest.approx(of_change / 4)
    assert row["rate_std_pct_per_year"] == pytest.approx(100 * of_change / 4 / 2)
    carried = PUBLISHED.model_copy(update={"baseline_error": "carried"})
    row = area_changes(baseline, areas, carried)[0].iloc[0]
    assert row["rate_std_km2_per_year"] == pytest.approx(0.05 / 4)  # what is not divided stays
    draws = np.random.default_rng(1).normal([2.0, 1.8], [0.003, 0.004], (200_000, 2))  # small: first order is exact
    spread = (100 * (draws[:, 1] / draws[:, 0] - 1) / 4).std()
    assert row["rate_std_pct_per_year"] == pytest.approx(10 * spread, rel=0.01)


def test_dates_of_the_images_make_the_time_not_the_partitions() -> None:
    baseline = year_of(2015, glacier_id=["a"], area_km2=[2.0], image_date=["2016-08-01"])
    areas = year_of(2020, glacier_id=["a"], area_km2=[1.0])
    assert area_changes(baseline, areas, EXACT)[0]["years"].iloc[0] == pytest.approx(4.085, abs=1e-3)
    assert area_changes(baseline, areas, PUBLISHED)[0]["years"].iloc[0] == 4


def test_flags_name_what_is_weak() -> None:
    baseline = year_of(
        2015, glacier_id=["calm", "lost", "fine", "unknown"], area_km2=[1.0] * 4, recall=[1.0, 0.5, 0.95, np.nan]
    )
    areas = year_of(2023, glacier_id=["calm", "lost", "fine", "unknown"], area_km2=[0.999, 0.5, 0.8, 0.8])
    flags = area_changes(baseline, areas, EXACT)[0].set_index("glacier_id")
    assert flags["flags"].to_dict() == {"calm": "snr", "lost": "recall", "fine": "", "unknown": "recall"}
    assert flags["ok"].to_dict() == {"calm": False, "lost": False, "fine": True, "unknown": False}


def test_cloud_filling_and_growth_are_columns_that_exclude_nobody_unless_asked_to() -> None:
    ids = ["hidden", "filled", "grew", "clear", "unknown"]
    baseline = year_of(
        2015, glacier_id=ids, area_km2=[1.0] * 5, usable_share=[0.6, 1, 1, 1, np.nan], filled_share=[0, 0, 0, 0, np.nan]
    )
    areas = year_of(
        2023, glacier_id=ids, area_km2=[0.8, 0.8, 1.1, 0.8, 0.8], usable_share=[1, 1, 1, 1, np.nan],
        filled_share=[0, 0.5, 0, 0, np.nan],
    )  # fmt: skip
    got = area_changes(baseline, areas, EXACT)[0].set_index("glacier_id")
    named = {"hidden": "cloud", "filled": "filled", "grew": "growth"}
    assert got["flags"].to_dict() == dict.fromkeys(ids, "") | named
    assert got["ok"].all() and got["flag_growth"].sum() == got["flag_cloud"].sum() == 1
    assert got.loc["hidden", "usable_share"] == 0.6 and got.loc["filled", "filled_share"] == 0.5
    strict = EXACT.model_copy(update={"filter": ["cloud", "growth"]})
    assert area_changes(baseline, areas, strict)[0].set_index("glacier_id")["ok"].to_dict() == {
        "hidden": False, "filled": True, "grew": False, "clear": True, "unknown": True,
    }  # fmt: skip
    # Back in time growth is a loss: the later image is the baseline's.
    earlier = area_changes(baseline.assign(year=2030, image_date=pd.Timestamp("2030-09-01")), areas, EXACT)[0]
    assert not earlier.set_index("glacier_id").loc["grew", "flag_growth"]


def test_every_glacier_is_either_a_row_or_an_exclusion_with_its_reason() -> None:
    baseline = year_of(
        2015, glacier_id=["a", "same", "short", "gone", "undated"], area_km2=[1.0] * 5,
        image_date=["2015-09-01", "2016-09-01", "2016-07-01", "2015-09-01", None],
    )  # fmt: skip
    areas = year_of(2016, glacier_id=["new", "short", "same", "a", "undated"], area_km2=[1.0] * 5)
    changes, excluded = area_changes(baseline, areas, EXACT)
    assert changes["glacier_id"].tolist() == ["a"]
    assert dict(zip(excluded["glacier_id"], excluded["reason"])) == {
        "new": "no_baseline", "gone": "not_measured", "same": "same_date", "short": "short_time",
        "undated": "no_date",
    }  # fmt: skip


def test_the_baseline_year_itself_has_no_change_and_a_year_before_it_has() -> None:
    baseline = year_of(2015, glacier_id=["a"], area_km2=[1.0])
    changes, excluded = area_changes(baseline, baseline, EXACT)
    assert len(changes) == 0 and len(excluded) == 0 and "rate_km2_per_year" in changes
    earlier = area_changes(baseline, year_of(2011, glacier_id=["a"], area_km2=[1.2]), PUBLISHED)[0].iloc[0]
    assert earlier["rate_km2_per_year"] == pytest.approx(-0.05) and earlier["rate_std_km2_per_year"] > 0


def test_a_certain_change_passes_and_a_lost_baseline_has_no_percentage() -> None:
    baseline = year_of(2015, glacier_id=["a", "b", "zero"], area_km2=[1.0, 1.0, 0.0], std_km2=[0.0] * 3)
    areas = year_of(2020, glacier_id=["a", "b", "zero"], area_km2=[0.9, 1.0, 0.1], std_km2=[0.0] * 3)
    rows = area_changes(baseline, areas, EXACT)[0].set_index("glacier_id")
    assert rows["ok"].to_dict() == {"a": True, "b": False, "zero": True}
    assert rows["snr"].isna().all() and np.isnan(rows.loc["zero", "rate_pct_per_year"])


def test_a_repeated_glacier_is_refused() -> None:
    twice = year_of(2015, glacier_id=["a", "a"], area_km2=[1.0, 1.0])
    with pytest.raises(ValueError, match="twice: a"):
        area_changes(twice, year_of(2020, glacier_id=["a"], area_km2=[1.0]), EXACT)


@settings(max_examples=30, deadline=None)
@given(
    areas=st.lists(st.floats(0.05, 30), min_size=1, max_size=12),
    losses=st.data(),
    order=st.randoms(use_true_random=False),
)
def test_rows_may_come_in_any_order_and_ids_never_mix(areas: list[float], losses: st.DataObject, order) -> None:  # type: ignore[no-untyped-def]
    n = len(areas)
    shares = losses.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    ids = [f"g{i}" for i in range(n)]
    baseline = year_of(2015, glacier_id=ids, area_km2=areas)
    later = year_of(2020, glacier_id=ids, area_km2=[a * s for a, s in zip(areas, shares)])
    straight = area_changes(baseline, later, PUBLISHED)[0]
    rows = list(range(n))
    order.shuffle(rows)
    mixed = area_changes(baseline.iloc[rows], later.iloc[::-1], PUBLISHED)[0]
    pd.testing.assert_frame_equal(straight, mixed)
    by_id = straight.set_index("glacier_id")
    for glacier, a, s in zip(ids, areas, shares):
        assert by_id.loc[glacier, "rate_km2_per_year"] == pytest.approx(a * (s - 1) / 5, abs=1e-12)
