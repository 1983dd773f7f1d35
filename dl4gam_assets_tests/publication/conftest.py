"""A small store whose tables are made by the real functions of the room ``change`` from simulated square glaciers."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from dl4gam_assets.change import area_changes, regional_changes
from dl4gam_assets.change.evaluation import scores
from dl4gam_assets.lineage.environment import record_settings, record_software
from dl4gam_assets.settings import Region, parse_region
from dl4gam_assets.storage import Storage

YEARS = (2015, 2019, 2023)
NOTE = "Held-out glaciers lie in the same mountains as the training glaciers."
STRANGE_NAME = "Großer <b>Ferner</b> & 'Kees' $^2_$"


@pytest.fixture(scope="session")
def region() -> Region:
    return parse_region(
        {
            "name": "squares",
            "title": "Square Alps",
            "description": "Glaciers that are squares, for tests.",
            "years": {"first": 2015, "last": 2023, "baseline": 2015},
            "inventory": {"path": "outlines.gpkg", "source": "Inventory of squares (2015)"},
            "imagery": {"catalog": {"kind": "stac-folder", "path": "catalog.json"}},
            "terrain": {"dem": ["dem.tif"], "dem_source": "A flat DEM"},
            "evaluation": {"note": NOTE},
            "simulation": {"kind": "demo"},
        }
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, region: Region) -> Storage:
    """Three years of 12 glaciers (10 modelled), read-only for tests."""
    return fill(Storage(tmp_path_factory.mktemp("store")), region)


def fill(storage: Storage, region: Region) -> Storage:
    rng = np.random.default_rng(3)
    n = 12
    side = np.sqrt(np.r_[0.03, 0.06, np.geomspace(0.15, 9, n - 2)]) * 1000
    x = 600_000 + 6_000 * (np.arange(n) % 4) + rng.uniform(0, 800, n)
    y = 5_150_000 + 6_000 * (np.arange(n) // 4) + rng.uniform(0, 800, n)
    ids = [f"G{i:02d}/a" if i == 5 else f"G{i:02d}" for i in range(n)]

    def squares(scale: np.ndarray) -> gpd.GeoSeries:
        boxes = [shapely.box(a, b, a + s * f, b + s * f) for a, b, s, f in zip(x, y, side, scale)]
        return gpd.GeoSeries(boxes, crs=32632).to_crs(4326)

    inventory = squares(np.ones(n))
    modelled = side**2 / 1e6 >= 0.1
    points = inventory.representative_point()
    storage.write_table(
        "glaciers",
        gpd.GeoDataFrame(
            {
                "glacier_id": ids,
                "glacier_int": np.arange(1, n + 1),
                "name": [STRANGE_NAME if i == n - 1 else "" for i in range(n)],
                "country": ["CH" if i % 3 else "AT" for i in range(n)],
                "inventory_date": pd.Timestamp("2015-08-29"),
                "inventory_area_km2": side**2 / 1e6,
                "lon": points.x, "lat": points.y, "utm_epsg": 32632, "modelled": modelled,
                "geometry": inventory,
            },
            crs=4326,
        ),
    )  # fmt: skip
    fold = np.where(np.arange(n) % 2, 1, 2)
    frames: dict[int, pd.DataFrame] = {}
    for year in YEARS:
        shrink = 1 - (0.018 + 0.01 * rng.random(n)) * (year - 2015)
        measured = modelled & ~((np.arange(n) == 3) & (year == 2023))
        area = side**2 / 1e6 * shrink
        std = 0.04 * area + 0.002
        rows = pd.DataFrame(
            {
                "glacier_id": ids, "year": year, "area_km2": area, "lower_km2": area - std, "upper_km2": area + std,
                "std_km2": std, "fold": fold, "image_date": pd.Timestamp(f"{year}-08-25"), "tau": 0.3,
                "inventory_area_km2": side**2 / 1e6, "recall": np.where(np.arange(n) == 4, 0.7, 0.97),
            }
        )[measured]  # fmt: skip
        frames[year] = rows
        for f in (1, 2):
            part = rows[rows["fold"] == f]
            storage.write_table("areas", part, {"year": year, "fold": f})
            storage.write_table(
                "predictions",
                part[["glacier_id"]].assign(fingerprint="f", cube_fingerprint="c", member_sha256="a,b"),
                {"year": year, "fold": f},
            )
            _lineage(storage, region, part, year, f)
        shapes = {
            b: squares(np.sqrt(np.clip(shrink * s, 0, None)))
            for b, s in (("best", 1), ("lower", 0.96), ("upper", 1.04))
        }
        outlines = [
            gpd.GeoDataFrame(
                {"glacier_id": ids, "bound": b, "area_km2": area, "geometry": shape}, crs=4326
            )[measured]
            for b, shape in shapes.items()
        ]  # fmt: skip
        storage.write_table("outlines", pd.concat(outlines, ignore_index=True), {"year": year})
        for i in np.flatnonzero(measured) if year == 2023 else []:
            _map(storage, year, ids[i], x[i], y[i], side[i], shrink[i])
    storage.write_table("baseline_areas", frames[2015])
    for year in YEARS:
        changes, excluded = area_changes(frames[2015], frames[year], region.change)
        storage.write_table("changes", changes, {"year": year})
        totals = regional_changes(changes, storage.read_table("glaciers"), frames[year], region.change, year, 2015)
        storage.write_table("regional_changes", totals, {"year": year})
        if len(excluded):
            storage.write_table(
                "failures",
                excluded.rename(columns={"reason": "error"}).assign(kind="NoRate", time=pd.Timestamp("2024-01-01")),
                {"stage": "area_change", "partition": str(year)},
            )
    storage.write_table(
        "failures",
        pd.DataFrame(
            {"glacier_id": ["G03"], "error": ["no image below <30%> cloud"], "kind": ["NoScene"],
             "time": [pd.Timestamp("2024-01-01")]}
        ),
        {"stage": "selected_scenes", "partition": "2023"},
    )  # fmt: skip
    _evaluation(storage, [g for g, m in zip(ids, modelled) if m])
    return storage


def _lineage(storage: Storage, region: Region, areas: pd.DataFrame, year: int, fold: int) -> None:
    """Rows of lineage of some areas, and one partition behind them."""
    settings, software = record_settings(storage, region), record_software(storage)
    made = pd.Timestamp("2024-01-01")
    rows = areas[["glacier_id", "image_date", "tau"]].assign(
        scene_ids=f"S2A_{year}", cube_fingerprint="c", static_fingerprint="s", member_sha256="a,b",
        calibration_fingerprint="k", prediction_fingerprint="f", settings_fingerprint=settings,
        software_fingerprint=software, code_version="0.1.0", time=made,
    )  # fmt: skip
    storage.write_table("lineage", rows, {"year": year, "fold": fold})
    sources = pd.DataFrame(
        [
            {"scope": "all", "kind": "materialization", "name": f"{asset} [{label}]", "asset": asset,
             "partition": label, "scope_key": "", "run_id": "run", "time": made, "settings_fingerprint": settings}
            for asset, label in (("glacier_cubes", str(year)), ("elevation", "all"),
                                 ("glacier_predictions", f"{year}.fold_{fold}"))
        ]
    )  # fmt: skip
    storage.write_table("lineage_sources", sources, {"year": year, "fold": fold})


def _map(storage: Storage, year: int, glacier: str, x: float, y: float, side: float, shrink: float) -> None:
    pixels = int(side / 10) + 40
    transform = from_origin(x - 200, y + side + 200, 10, 10)
    rows, columns = np.mgrid[:pixels, :pixels]
    inside = (np.abs(rows - pixels / 2) < side / 20 * shrink) & (np.abs(columns - pixels / 2) < side / 20 * shrink)
    with storage.writing(storage.prediction(year, glacier)) as path, rasterio.open(
        path, "w", driver="COG", width=pixels, height=pixels, count=2, dtype="uint16", crs="EPSG:32632",
        transform=transform, compress="deflate",
    ) as target:  # fmt: skip
        target.write(np.stack([inside * 10_000, ~inside * 100]).astype(np.uint16))
        target.descriptions = ("mean", "std")


def _evaluation(storage: Storage, ids: list[str]) -> None:
    rng = np.random.default_rng(5)
    for fold in (1, 2):
        rows = []
        for glacier in ids[fold - 1 :: 2]:
            for method, quality in (("ensemble", 0.95), ("band_ratio", 0.8)):
                for scope in ("scene", "ring", "debris"):
                    tp = int(1000 * quality)
                    fp = 0 if scope == "debris" else int(rng.integers(20, 90))
                    counts = {"true_positive": tp, "false_positive": fp, "false_negative": 1000 - tp}
                    rows.append(
                        {"glacier_id": glacier, "role": "test", "method": method, "scope": scope, "n_pixels": 4000,
                         **counts, **scores(counts, scope)}
                    )  # fmt: skip
        storage.write_table("evaluation", pd.DataFrame(rows), {"fold": fold})
        storage.write_table(
            "calibration",
            pd.DataFrame(
                {"member": [1, 2], "sha256": ["a", "b"], "temperature": [1.2, 1.3], "ece_before": 0.02,
                 "ece_after": 0.011, "method": "regional_quantile", "n_glaciers": 3, "validation_coverage": 2 / 3}
            ),
            {"fold": fold},
        )  # fmt: skip


@pytest.fixture
def empty_store(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "empty")
