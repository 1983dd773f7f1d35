"""Results of the whole world: 215,000 glaciers and 10 years into results.duckdb, and how fast it answers.

    python benchmarks/results.py [--glaciers 215000] [--years 10] [--store FOLDER]

Tables are generated with the real schema (areas, changes, lineage with its sources, glaciers; images, zones and
outlines are left out, as `publication.leave_out` does for such regions) and built by the platform's own function in a
process of its own, whose peak memory is measured. Every query of the list is timed warm, the median of five. The exit
status is 1 where something is above `LIMITS`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from dl4gam_assets.lineage.environment import record_settings, record_software
from dl4gam_assets.publication import build_database
from dl4gam_assets.settings import load_region
from dl4gam_assets.storage import Storage

FOLDS = 5
#: What the build and the slowest question may take: seconds, MB, milliseconds.
LIMITS = (60.0, 2000.0, 100.0)
QUERIES = {
    "time series of a glacier": "select * from glacier_time_series where glacier_id = '{glacier}'",
    "largest losses": "select * from largest_losses limit 20",
    "totals by country": "select * from changes_by_country limit 100",
    "inputs of an estimate": "select * from lineage_inputs where glacier_id = '{glacier}' and year = {year}",
    "lineage of an estimate": "select * from lineage where glacier_id = '{glacier}' and year = {year}",
    "area of a year": "select sum(area_km2) from areas where year = {year}",
    "flagged glaciers of a year": "select count(*) from changes where year = {year} and not ok",
}


def write_tables(storage: Storage, n: int, years: list[int]) -> None:
    """Tables of `n` glaciers: areas of a power law, shrinking with noise."""
    rng = np.random.default_rng(1)
    ids = np.array([f"RGI70-{1 + i % 19:02d}.{i:06d}" for i in range(n)], dtype=object)
    area = np.exp(rng.normal(-1.2, 1.4, n)) + 0.1
    lon, lat = rng.uniform(-170, 170, n), rng.uniform(-75, 80, n)
    side = np.sqrt(area) / 222
    glaciers = gpd.GeoDataFrame(
        {
            "glacier_id": ids, "glacier_int": np.arange(1, n + 1), "name": "", "lon": lon, "lat": lat,
            "country": np.array(["CH", "AT", "NO", "CL", "NP", "CA"])[np.arange(n) % 6],
            "inventory_date": pd.Timestamp("2015-08-20"), "inventory_area_km2": area, "utm_epsg": 32632,
            "modelled": True,
        },
        geometry=shapely.box(lon - side, lat - side, lon + side, lat + side), crs=4326,
    )  # fmt: skip
    storage.write_table("glaciers", glaciers)
    fold = 1 + np.arange(n) % FOLDS
    settings, software = record_settings(storage, load_region("demo")), record_software(storage)
    first: pd.DataFrame | None = None
    for year in years:
        now = area * (1 - 0.012 * (year - years[0])) * np.exp(rng.normal(0, 0.02, n))
        std = 0.05 * now
        areas = pd.DataFrame(
            {
                "glacier_id": ids, "area_km2": now, "lower_km2": now - std, "upper_km2": now + std, "std_km2": std,
                "image_date": pd.Timestamp(f"{year}-08-25"), "tau": 0.3, "inventory_area_km2": area, "recall": 0.95,
                "usable_share": 0.98, "filled_share": 0.02,
            }
        )  # fmt: skip
        lineage = pd.DataFrame(
            {
                "glacier_id": ids, "scene_ids": [f"S2A_32T_{year}0825_{i % 5000}" for i in range(n)],
                "image_date": pd.Timestamp(f"{year}-08-25"), "cube_fingerprint": "0123456789abcdef",
                "member_sha256": "a" * 64, "calibration_fingerprint": "c" * 16, "prediction_fingerprint": "p" * 16,
                "settings_fingerprint": settings, "software_fingerprint": software, "terrain_key": "tiles",
                "code_version": "0.1.0", "time": pd.Timestamp("2026-11-15"),
            }
        )  # fmt: skip
        for f in range(1, FOLDS + 1):
            storage.write_table("lineage_sources", _sources(year, f), {"year": year, "fold": f})
            mine = fold == f
            storage.write_table("areas", areas[mine], {"year": year, "fold": f})
            storage.write_table("lineage", lineage[mine], {"year": year, "fold": f})
        if first is None:
            first = areas.assign(year=year, fold=fold)
            storage.write_table("baseline_areas", first)
            continue
        span = float(year - years[0])
        rate = (now - first["area_km2"].to_numpy()) / span
        rate_std = np.hypot(std, first["std_km2"].to_numpy()) / span
        storage.write_table(
            "changes",
            pd.DataFrame(
                {
                    "glacier_id": ids, "baseline_year": years[0], "baseline_date": pd.Timestamp(f"{years[0]}-08-25"),
                    "image_date": pd.Timestamp(f"{year}-08-25"), "years": span,
                    "baseline_area_km2": first["area_km2"].to_numpy(), "baseline_std_km2": first["std_km2"].to_numpy(),
                    "area_km2": now, "std_km2": std, "rate_km2_per_year": rate, "rate_std_km2_per_year": rate_std,
                    "rate_pct_per_year": 100 * rate / area, "rate_std_pct_per_year": 100 * rate_std / area,
                    "snr": np.abs(rate) / rate_std, "recall": 0.95, "flag_snr": np.abs(rate) < rate_std,
                    "flag_recall": False, "flag_cloud": False, "flag_filled": False, "flag_growth": rate > 3 * rate_std,
                    "flags": "", "ok": np.abs(rate) >= rate_std,
                }
            ),
            {"year": year},
        )  # fmt: skip


def _sources(year: int, fold: int) -> pd.DataFrame:
    """What the estimates of a year and fold share: partitions, members, packages, tiles, and three files an image."""
    made = {"run_id": "r" * 36, "materialization_id": "m" * 16, "time": pd.Timestamp("2026-11-15")}
    rows: list[dict[str, Any]] = []
    for kind, count in (("materialization", 16), ("weights", 10), ("package", 30), ("calibration", 1), ("settings", 1)):
        for i in range(count):
            rows.append({"scope": "all", "scope_key": "", "kind": kind, "name": f"{kind} {i}", "checksum": "c" * 64,
                         "asset": "glacier_cubes", "partition": str(year), **made})  # fmt: skip
    for i in range(fold - 1, 5000, FOLDS):
        image = f"S2A_32T_{year}0825_{i}"
        for band in ("B02", "B03", "B04"):
            rows.append({"scope": "image", "scope_key": image, "kind": "scene", "name": f"{image}/{band}",
                         "checksum": "d" * 64, "asset": "selected_scenes", "partition": str(year), **made})  # fmt: skip
    rows += [{"scope": "terrain", "scope_key": "tiles", "kind": "elevation", "name": f"dem {i}", "checksum": "e" * 64,
              "asset": "elevation", "partition": "all", **made} for i in range(4)]  # fmt: skip
    return pd.DataFrame(rows)


def build(root: str, queue: Any) -> None:
    region = load_region("demo", {"publication.leave_out": ["candidates", "scenes", "zones", "outlines"]})
    start = time.perf_counter()
    counts = build_database(Storage(root), region, Path(root) / "results.duckdb")
    seconds = time.perf_counter() - start
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, sum(counts.values())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glaciers", type=int, default=215_000)
    parser.add_argument("--years", type=int, default=10)
    parser.add_argument("--store", type=Path)
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = wish.store or Path(folder)
        years = list(range(2015, 2015 + wish.years))
        if not (root / "tables").exists():
            write_tables(Storage(root), wish.glaciers, years)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=build, args=(str(root), queue))
        process.start()
        seconds, peak_mb, rows = queue.get()
        process.join()
        file = root / "results.duckdb"
        print(f"{rows} rows in {seconds:.1f} s, peak {peak_mb:.0f} MB, file {file.stat().st_size / 1e6:.0f} MB")
        took = {}
        with duckdb.connect(str(file), read_only=True) as db:
            glacier = db.execute("select glacier_id from areas limit 1 offset 100000").fetchone()
            for name, sql in QUERIES.items():
                text = sql.format(glacier=glacier[0] if glacier else "", year=years[-1])
                times = []
                for _ in range(6):
                    start = time.perf_counter()
                    db.execute(text).fetchall()
                    times.append(time.perf_counter() - start)
                took[name] = round(1000 * float(np.median(times[1:])), 1)
        print(json.dumps({"milliseconds": took}, indent=1))
    found = (seconds, peak_mb, max(took.values()))
    over = [f"{v:.0f} of {limit:.0f} {unit}" for v, limit, unit in zip(found, LIMITS, ("s", "MB", "ms")) if v > limit]
    if over:
        print(f"above the limits: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
