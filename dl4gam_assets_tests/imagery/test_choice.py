"""Scores, rankings, overrides, and the candidates of a whole glacier."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import box

from dl4gam_assets.imagery import (
    candidates_of_glacier,
    items_from_row,
    items_of_glacier,
    open_catalog,
    rank_candidates,
    read_overrides,
    score_image,
    search_periods,
    select_scenes,
)
from dl4gam_assets.inventory import dated, glacier_zones, read_inventory
from dl4gam_assets.settings import InventoryColumns, InventorySettings, SelectionSettings, SettingsError, load_region
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.imagery.conftest import CRS, IMAGERY, NORTH, SIZE, WEST, ItemMaker, save_catalog

S = SelectionSettings()


# --------------------------------------------------------------------------------------------- scores
def _image(**bands: np.ndarray) -> xr.Dataset:
    shape = next(iter(bands.values())).shape
    return xr.Dataset(
        {
            "reflectance": (("band", "y", "x"), np.stack(list(bands.values())).astype(np.float32)),
            "cloud": (("y", "x"), np.zeros(shape, bool)),
            "missing": (("y", "x"), np.zeros(shape, bool)),
        },
        coords={"band": list(bands)},
    )


def _masks() -> dict[str, np.ndarray]:
    ice = np.zeros((20, 20), bool)
    ice[5:15, 5:15] = True
    near = np.zeros((20, 20), bool)
    near[2:18, 2:18] = True
    return {"region": np.ones((20, 20), bool), "near": near, "glaciers": ice}


def test_each_score_has_its_own_geometry() -> None:
    masks = _masks()
    ice = masks["glaciers"]
    image = _image(
        blue=np.where(ice, 0.8, 0.1), green=np.where(ice, 0.8, 0.1), red=np.where(ice, 0.8, 0.1),
        swir16=np.where(ice, 0.05, 0.3),
    )  # fmt: skip
    image["missing"].to_numpy()[:2] = True  # outside glacier and buffer
    image["cloud"].to_numpy()[2:4] = True
    scores = score_image(image, settings=S, **masks)
    assert scores["coverage"] == pytest.approx(0.9)
    assert scores["cloud_share"] == pytest.approx(2 / 16)
    assert scores["ndsi"] == pytest.approx(-0.5, abs=1e-6)  # bare ground only, no ice
    assert scores["ndsi_pixels"] == 16 * 14 - 100 and scores["albedo_pixels"] == 16 * 14
    assert scores["coverage_pixels"] == 400 and scores["cloud_share_pixels"] == 16 * 16
    share = 100 / (16 * 14)
    albedo = (0.5621 + 0.1479 + 0.2512) * (0.8 * share + 0.1 * (1 - share)) + 0.0015
    assert scores["albedo"] == pytest.approx(albedo, abs=1e-5)


@pytest.mark.parametrize(
    ("green", "swir", "expected"),
    [(0.0, 0.0, 0.0), (-0.02, -0.01, 0.0), (0.02, -0.05, 1.0), (-0.05, 0.02, -1.0), (0.3, 0.1, 0.5)],
)
def test_black_ground_is_no_snow(green: float, swir: float, expected: float) -> None:
    image = _image(green=np.full((20, 20), green), swir16=np.full((20, 20), swir))
    assert score_image(image, settings=S, **_masks())["ndsi"] == pytest.approx(expected)


def test_missing_pixels_count_as_cloud() -> None:
    image = _image(green=np.full((20, 20), 0.2), swir16=np.full((20, 20), 0.2))
    image["missing"].to_numpy()[:, :10] = True
    assert score_image(image, settings=S, **_masks())["cloud_share"] == pytest.approx(0.5)


def test_a_score_on_few_pixels_is_none_and_its_fallback_is_named() -> None:
    image = _image(green=np.full((20, 20), 0.2), swir16=np.full((20, 20), 0.2))
    masks = _masks() | {"glaciers": np.ones((20, 20), bool)}
    scores = score_image(image, settings=S, **masks)
    assert scores["ndsi"] is None and scores["snow_score"] == "brightness"
    image["cloud"].to_numpy()[:] = True
    assert score_image(image, settings=S, **masks)["albedo"] is None


# --------------------------------------------------------------------------------------------- ranking
def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    base = {"glacier_id": "g", "coverage": 1.0, "cloud_share": 0.0, "ndsi": 0.0, "albedo": 0.3, "reason": None}
    made = [{**base, "date": pd.Timestamp("2020-08-01") + pd.Timedelta(days=i), **row} for i, row in enumerate(rows)]
    columns = {"hrefs": "{}", "checksums": "{}", "ndsi_pixels": 99, "albedo_pixels": 99, "snow_score": "ndsi"}
    return pd.DataFrame(made).assign(scene_ids=[f"s{i}" for i in range(len(rows))], **columns)


def test_rank_positions_as_published() -> None:
    frame = _frame([
        {"cloud_share": 0.10, "ndsi": -0.4},  # positions 3, 1: mean 2
        {"cloud_share": 0.00, "ndsi": 0.5},  # 1, 3: mean 2, the same albedo, less cloud
        {"cloud_share": 0.05, "ndsi": 0.1, "albedo": 0.2},  # 2, 2: mean 2, lowest albedo
    ])  # fmt: skip
    assert rank_candidates(frame, S)["rank"].tolist() == [3, 2, 1]


def test_equal_after_rounding_shares_a_position() -> None:
    frame = _frame([{"cloud_share": 0.004, "ndsi": 0.3}, {"cloud_share": 0.001, "ndsi": 0.1}])
    assert rank_candidates(frame, S)["rank"].tolist() == [2, 1]


def test_min_max_as_published() -> None:
    settings_ = SelectionSettings(ranking="min_max")
    frame = _frame([
        {"cloud_share": 0.0, "ndsi": 0.4, "albedo": 0.2},  # 0, 1, 0: 1/3
        {"cloud_share": 0.2, "ndsi": 0.0, "albedo": 0.6},  # 1, 0, 1: 2/3
        {"cloud_share": 0.1, "ndsi": 0.2, "albedo": 0.4},  # 1/2 each
    ])  # fmt: skip
    ranked = rank_candidates(frame, settings_)
    assert ranked["rank"].tolist() == [1, 3, 2]
    assert ranked["score"].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2])


def test_thresholds_leave_a_candidate_without_a_rank() -> None:
    frame = _frame([{"cloud_share": 0.31}, {"coverage": 0.89}, {"reason": "can not be read: x"}, {}])
    ranked = rank_candidates(frame, S)
    assert ranked["rank"].isna().tolist() == [True, True, True, False]


_share = st.floats(0, 0.3)
_maybe = st.one_of(st.none(), st.floats(-1, 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_share, _maybe, st.floats(0, 1)), min_size=2, max_size=7),
    st.sampled_from(["rank_positions", "min_max"]),
    st.randoms(use_true_random=False),
)
def test_rankings_do_not_depend_on_order_and_a_missing_score_never_wins(rows: Any, ranking: Any, random: Any) -> None:
    limits = SelectionSettings(ranking=ranking)
    frame = _frame([{"cloud_share": c, "ndsi": n, "albedo": a} for c, n, a in rows])
    ranked = rank_candidates(frame, limits).set_index("date")["rank"]
    order = list(range(len(frame)))
    random.shuffle(order)
    again = rank_candidates(frame.iloc[order], limits).set_index("date")["rank"]
    assert (ranked == again.reindex(ranked.index)).all()
    assert sorted(ranked) == list(range(1, len(frame) + 1))
    # Take the winner's snow score away: against one that has its score and no more cloud it must not win any more.
    if frame["ndsi"].notna().all():
        twin = frame.iloc[[0, 0]].assign(date=pd.to_datetime(["2020-08-01", "2020-08-02"]))
        twin["ndsi"] = [None, float(frame["ndsi"].iloc[0])]
        assert rank_candidates(twin, limits)["rank"].tolist() == [2, 1]


# --------------------------------------------------------------------------------------------- choice
def test_every_candidate_has_its_reason() -> None:
    frame = _frame([{"cloud_share": 0.02, "ndsi": 0.11}, {"cloud_share": 0.62}, {"reason": "can not be read: a.tif"}])
    chosen = select_scenes(rank_candidates(frame, S), 2020)
    assert chosen["selected"].tolist() == [True, False, False]
    assert chosen["reason"].iloc[0].startswith("selected: rank 1 of 1 (cloud 0.02, NDSI 0.11")
    assert chosen["reason"].iloc[1] == "cloud share 0.62 above 0.30"
    assert chosen["reason"].iloc[2] == "can not be read: a.tif"
    TABLES["scenes"].conform(chosen, {"year": 2020})


def _overrides(date: Any) -> pd.DataFrame:
    return pd.DataFrame({"glacier_id": ["g"], "year": [2020], "date": [pd.Timestamp(date) if date else pd.NaT]})


def test_an_override_wins_even_over_thresholds() -> None:
    ranked = rank_candidates(_frame([{}, {"cloud_share": 0.9}]), S)
    chosen = select_scenes(ranked, 2020, _overrides("2020-08-02"))
    assert chosen["selected"].tolist() == [False, True] and "override by the user" in chosen["reason"].iloc[1]
    assert not select_scenes(ranked, 2020, _overrides(None))["selected"].any()
    gone = select_scenes(ranked, 2020, _overrides("2020-09-30"))
    assert not gone["selected"].any() and gone["reason"].str.contains("no scene of that day").all()
    assert select_scenes(ranked, 2021, _overrides("2020-08-02"))["selected"].tolist() == [True, False]


def test_each_line_of_the_override_file_is_checked(tmp_path: Path) -> None:
    glaciers = pd.DataFrame({"glacier_id": ["a", "b"]})
    path = tmp_path / "o.csv"
    path.write_text("glacier_id,year,date\na,2020,2020-08-02\nb,2020,reject\n")
    read = read_overrides(path, glaciers, range(2015, 2025))
    assert read["date"].isna().tolist() == [False, True]
    path.write_text(
        "glacier_id,year,date\nx,2020,reject\na,1999,reject\na,2020,2.8.2020\na,2021,reject\na,2021,reject\n"
    )
    with pytest.raises(SettingsError) as error:
        read_overrides(path, glaciers, range(2015, 2025))
    for words in ("line 2: glacier 'x'", "line 3: year '1999'", "line 4: date '2.8.2020'", "line 6: a has two lines"):
        assert words in str(error.value)


def test_override_files_as_spreadsheets_write_them(tmp_path: Path) -> None:
    glaciers = pd.DataFrame({"glacier_id": ["a", "b,1", 'c"x', "d"]})
    path = tmp_path / "o.csv"
    text = (
        'glacier_id,year,date,remark\r\n"a","2020","2020-08-02","cloud, thin"\r\n'
        '"b,1",2020, REJECT ,\r\n\r\n"c""x",2021,2021-09-01,\r\n'
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # byte order mark, CRLF, quotes, an empty line, a further column
    read = read_overrides(path, glaciers, range(2015, 2025))
    assert read["glacier_id"].tolist() == ["a", "b,1", 'c"x'] and read["year"].tolist() == [2020, 2020, 2021]
    assert read["date"].tolist()[0] == pd.Timestamp("2020-08-02") and read["date"].isna().tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("glacier;year;date\na;2020;reject\n", "columns ['date', 'glacier_id', 'year'] are missing"),
        ("glacier_id,year,date\na,2020,2020-08-02,2020-08-03\n", "line 2: more values than columns"),
        ("glacier_id,year,date\na,2020\n", "line 2: date '' is neither"),
        ("glacier_id,year,date\nsmall,2020,reject\n", "line 2: glacier 'small' is not modelled"),
        ("glacier_id,year,date\na,2020,reject\na,2020,2020-08-02\n", "line 3: a has two lines for 2020"),
        ("glacier_id,year,date\na,2020,2019-08-02\n", "line 2: date 2019-08-02 is not in the year 2020"),
        ("", "columns"),
    ],
)
def test_what_can_be_wrong_with_an_override_file(tmp_path: Path, text: str, words: str) -> None:
    glaciers = pd.DataFrame({"glacier_id": ["a", "small"], "modelled": [True, False]})
    path = tmp_path / "o.csv"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_overrides(path, glaciers, range(2015, 2025))
    assert words in str(error.value) and "o.csv" in str(error.value)


def test_only_the_baseline_year_takes_images_of_another_year(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_text("glacier_id,year,date\na,2015,2016-08-20\n")
    glaciers = pd.DataFrame({"glacier_id": ["a"]})
    assert read_overrides(path, glaciers, range(2015, 2025), 2015)["date"].tolist() == [pd.Timestamp("2016-08-20")]
    with pytest.raises(SettingsError, match="2016-08-20 is not in the year 2015"):
        read_overrides(path, glaciers, range(2015, 2025), 2016)


def test_override_files_in_another_encoding_are_named(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_bytes("glacier_id,year,date\nGötz,2020,reject\n".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"o\.csv.*UTF-8"):
        read_overrides(path, pd.DataFrame({"glacier_id": ["Götz"]}), range(2015, 2025))


def test_a_header_alone_overrides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_text("glacier_id,year,date\n")
    read = read_overrides(path, pd.DataFrame({"glacier_id": ["g"]}), range(2015, 2025))
    assert select_scenes(rank_candidates(_frame([{}]), S), 2020, read)["selected"].tolist() == [True]


def test_periods_follow_the_inventory_only_in_the_baseline_year() -> None:
    known = dt.date(2015, 8, 29)
    assert search_periods(2020, known, IMAGERY, 2015) == [(dt.date(2020, 8, 1), dt.date(2020, 10, 15))]
    assert search_periods(2015, known, IMAGERY, 2015) == [(dt.date(2015, 8, 14), dt.date(2015, 9, 13))]
    assert search_periods(2015, None, IMAGERY, 2015) == [(dt.date(2015, 8, 1), dt.date(2015, 10, 15))]


@pytest.mark.parametrize(
    ("value", "window", "expected"),
    [
        ("20160820", ("08-01", "10-15"), ("2016-08-05", "2016-09-04")),
        ("20160299", ("08-01", "10-15"), ("2016-01-17", "2016-03-15")),  # the month, whichever it is
        ("2016", ("08-01", "10-15"), ("2016-08-01", "2016-10-15")),
        (20169999, ("08-01", "10-15"), ("2016-08-01", "2016-10-15")),
        (20169999, ("01-15", "03-31"), ("2016-01-15", "2016-03-31")),  # the southern season
        (None, ("01-15", "03-31"), ("2015-01-15", "2015-03-31")),
    ],
)
def test_periods_are_as_wide_as_the_inventorys_date_is_vague(
    value: Any, window: tuple[str, str], expected: tuple[str, str]
) -> None:
    imagery = IMAGERY.model_copy(update={"window": window})
    known = dated(value)
    day, precision = (None, "day") if known is None else (known[0].date(), known[1])
    periods = search_periods(2015, day, imagery, 2015, precision)
    assert periods == [tuple(map(dt.date.fromisoformat, expected))]
    assert search_periods(2020, day, imagery, 2015, precision) == [
        tuple(dt.date.fromisoformat(f"2020-{d}") for d in window)
    ]


def test_a_glacier_with_a_year_alone_is_searched_in_that_season(make_item: ItemMaker, tmp_path: Path) -> None:
    save_catalog([make_item("early", "2016-02-10"), make_item("late", "2016-08-15")], tmp_path)
    region = load_region("demo", {"imagery.margin_m": 100, "imagery.window": ["01-15", "03-31"]})
    shape = gpd.GeoSeries([box(WEST + 400, NORTH - 600, WEST + 600, NORTH - 400)], crs=CRS).to_crs(4326)
    shape.to_frame("geometry").assign(id="g", date="20169999").to_file(tmp_path / "outlines.gpkg")
    settings = InventorySettings(path="unused", columns=InventoryColumns(glacier_id="id", date="date"))
    glaciers, _ = read_inventory(tmp_path / "outlines.gpkg", settings)
    catalog = open_catalog(region.imagery.catalog, tmp_path, region.imagery.sensor)
    assert list(items_of_glacier(glaciers.iloc[0], catalog, region, region.years.baseline)) == ["early"]


def test_candidates_of_a_glacier_from_catalog_to_choice(make_item: ItemMaker, tmp_path: Path) -> None:
    cloudy = np.zeros((SIZE, SIZE), bool)
    cloudy[40:70] = True
    rock = {"blue": 0.1, "green": 0.12, "red": 0.14, "nir": 0.2, "swir16": 0.25}
    snow = {"blue": 0.8, "green": 0.8, "red": 0.8, "nir": 0.7, "swir16": 0.05}
    items = [
        make_item("snowy", "2020-09-20", **snow),
        make_item("cloudy", "2020-08-15", cloud=cloudy, **rock),
        make_item("clean", "2020-08-25", **rock),
        make_item("broken", "2020-09-01", **rock),
    ]
    save_catalog(items, tmp_path)
    Path(items[3].assets["green"].href).write_bytes(b"II*\0")
    region = load_region("demo", {"imagery.margin_m": 100, "imagery.sensor.cloud_probability": "cld"})
    shape = gpd.GeoSeries([box(WEST + 400, NORTH - 600, WEST + 600, NORTH - 400)], crs=CRS).to_crs(4326).iloc[0]
    glaciers = TABLES["glaciers"].conform(
        gpd.GeoDataFrame(
            {"glacier_id": ["g"], "glacier_int": [1], "inventory_area_km2": [0.04], "lon": [10.3], "lat": [46.9],
             "utm_epsg": [32632], "modelled": [True], "inventory_date": [pd.Timestamp("2015-08-20")]},
            geometry=[shape], crs=4326,
        )
    )  # fmt: skip
    catalog = open_catalog(region.imagery.catalog, tmp_path, region.imagery.sensor)
    zones = glacier_zones(glaciers, region.inventory.buffers_m)
    found = candidates_of_glacier(glaciers.iloc[0], glaciers, zones, catalog, region, 2020)
    TABLES["candidates"].conform(found.assign(year=2020))
    by_day = found.set_index(found["date"].dt.strftime("%m-%d"))
    assert by_day.loc["09-01", "reason"].startswith("can not be read") and "green.tif" in by_day.loc["09-01", "reason"]
    assert by_day.loc["08-15", "cloud_share"] > 0.6
    assert by_day.loc["09-20", "ndsi"] > 0.8 > by_day.loc["08-25", "ndsi"]
    chosen = select_scenes(rank_candidates(found, region.imagery.selection), 2020)
    winner = chosen[chosen["selected"]].iloc[0]
    assert winner["scene_ids"] == "clean"
    assert [i.id for i in items_from_row(winner, catalog)] == ["clean"]
    assert len(candidates_of_glacier(glaciers.iloc[0], glaciers, zones, catalog, region, 2019)) == 0
