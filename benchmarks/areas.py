"""Whole and fractional pixels on the maps of a store: areas by size class, ground counted twice, cost.

    python benchmarks/areas.py --region demo                     # the store below DL4GAM_HOME; its baseline year
    python benchmarks/areas.py --region swiss --home DIR --year 2018

Measures every glacier that has a map both ways (nothing is written) and prints three tables for docs/areas.md. The
script exits with 1 where a lower bound exceeds an area or an area its upper bound, or where the outlines' covered
shares do not add up to the areas of their polygons.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from dl4gam_assets.change import area_row, fractional_shares, ground_of, size_class, size_class_labels, whole_shares
from dl4gam_assets.change.areas import Shares, pixel_grid
from dl4gam_assets.cubes import open_cube
from dl4gam_assets.ensemble import read_prediction
from dl4gam_assets.settings import Region, load_region
from dl4gam_assets.storage import Storage

WAYS = (("whole", "each"), ("whole", "once"), ("fractional", "each"), ("fractional", "once"))
FIGURES = ("area_km2", "lower_km2", "upper_km2", "inventory_area_km2")


class Ground:
    """Pixels of one grid, and by how much glaciers together count them."""

    def __init__(self) -> None:
        self.shares: dict[tuple[str, str], Counter[tuple[int, ...]]] = {way: Counter() for way in WAYS}

    def add(self, way: tuple[str, str], shares: Shares, cube: Any) -> None:
        transform, epsg, _ = pixel_grid(cube)
        rows, columns = np.nonzero(shares.counted)
        x = np.round((transform.c + transform.a * columns) / transform.a).astype(int).tolist()
        y = np.round((transform.f + transform.e * rows) / transform.a).astype(int).tolist()
        counted = self.shares[way]
        for key, share in zip(zip([epsg] * len(x), x, y, strict=True), shares.counted[rows, columns], strict=True):
            counted[key] += float(share)

    def twice_km2(self, way: tuple[str, str], pixel_km2: float) -> float:
        over = np.array(list(self.shares[way].values())) - 1.0
        return float(over[over > 1e-5].sum()) * pixel_km2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", default="demo", help="packaged region or YAML file")
    parser.add_argument("--home", default=os.environ.get("DL4GAM_HOME", "dl4gam_home"))
    parser.add_argument("--year", type=int, help="default: the baseline year")
    parser.add_argument("--picture", help="PNG to draw: outlines of one glacier, plain and simplified, both pixels")
    parser.add_argument("--glacier", help="for --picture; default: one of median area")
    options = parser.parse_args()
    region = load_region(options.region)
    storage = Storage(f"{options.home}/{region.name}")
    year = options.year or region.years.baseline
    glaciers, zones, debris = (storage.read_table(name) for name in ("glaciers", "zones", "debris"))
    zones = zones[zones["buffer_m"] == 20]
    taus = storage.read_table("taus").set_index("glacier_id")["tau"]
    ground, rows, seconds = Ground(), [], Counter[str]()
    pixel_km2 = 0.0
    for glacier_id in sorted(storage.read_table("predictions", year=year)["glacier_id"]):
        with (
            storage.reading(storage.cube(year, glacier_id)) as cube_path,
            storage.reading(storage.prediction(year, glacier_id)) as map_path,
        ):
            start = time.perf_counter()
            layers = read_prediction(map_path)
            with open_cube(cube_path) as opened:
                cube = opened[["mask"] + (["dem"] if "dem" in opened else [])].load()
            seconds["reading cube and map"] += time.perf_counter() - start
        _, epsg, pixel_m2 = pixel_grid(cube)
        pixel_km2 = pixel_m2 / 1e6
        row: dict[str, Any] = {"glacier_id": glacier_id}
        for pixels, rule in WAYS:
            start = time.perf_counter()
            if (pixels, rule) == ("whole", "each"):
                shares = whole_shares(cube)
            else:
                own = ground_of(glacier_id, glaciers, zones, debris, epsg, rule)  # type: ignore[arg-type]
                shares = fractional_shares(cube, own) if pixels == "fractional" else whole_shares(cube, own)
            tau = float(taus.get(glacier_id, taus.min()))
            figures = area_row(
                layers["mean"], layers["std"], cube, tau, region.inference.threshold, shares
            )  # fmt: skip
            seconds[f"{pixels}, {rule}"] += time.perf_counter() - start
            row |= {f"{pixels}_{rule}_{name}": figures[name] for name in FIGURES}
            ground.add((pixels, rule), shares, cube)
        outline = glaciers[glaciers["glacier_id"] == glacier_id].to_crs(epsg).geometry.make_valid().area.iloc[0]
        rows.append(row | {"polygon_km2": outline / 1e6})
    frame = pd.DataFrame(rows)
    pixel_m = np.sqrt(pixel_km2 * 1e6)
    print(f"### {region.title or region.name}, {year}: {len(frame)} glaciers, pixels of {pixel_m:g} m\n")
    by_size(frame, region.change.size_class_edges_km2)
    print("\n| counted by | inventory (km2) | ice on the map (km2) | counted twice (km2) |\n|---|---:|---:|---:|")
    print(f"| polygons of the inventory | {frame['polygon_km2'].sum():.4f} | | |")
    for pixels, rule in WAYS:
        own, ice = (frame[f"{pixels}_{rule}_{name}"].sum() for name in ("inventory_area_km2", "area_km2"))
        twice = ground.twice_km2((pixels, rule), pixel_km2)
        print(f"| {pixels} pixels, shared ground {rule} | {own:.4f} | {ice:.4f} | {twice:.4f} |")
    base = seconds["whole, each"] + seconds["reading cube and map"]
    print("\n| a glacier | ms | with reading, ratio |\n|---|---:|---:|")
    for name, value in seconds.items():
        ratio = "" if name.startswith("reading") else f"{(value + seconds['reading cube and map']) / base:.2f}"
        print(f"| {name} | {1000 * value / len(frame):.1f} | {ratio} |")
    if options.picture:
        middle = frame.sort_values("polygon_km2")["glacier_id"].iloc[len(frame) // 2]
        picture(options.picture, storage, region, year, options.glacier or middle)
    nested = all(
        (frame[f"{p}_{r}_lower_km2"] <= frame[f"{p}_{r}_area_km2"]).all()
        and (frame[f"{p}_{r}_area_km2"] <= frame[f"{p}_{r}_upper_km2"]).all()
        for p, r in WAYS
    )
    exact = np.allclose(frame["fractional_each_inventory_area_km2"], frame["polygon_km2"], rtol=1e-5)
    return 0 if nested and exact else 1


def picture(path: str, storage: Storage, region: Region, year: int, glacier_id: str) -> None:
    """Draw the lowest part of a glacier's outlines: whole and fractional pixels, plain and simplified."""
    import matplotlib.pyplot as plt

    from dl4gam_assets.stages.areas import outlines_of
    from dl4gam_assets.stages.base import Site

    predictions = storage.read_table("predictions", year=year).set_index("glacier_id")
    fold = int(predictions.loc[glacier_id, "fold"])
    glaciers = storage.read_table("glaciers")
    epsg = int(glaciers.loc[glaciers["glacier_id"] == glacier_id, "utm_epsg"].iloc[0])
    inventory = glaciers.to_crs(epsg)
    areas = storage.read_table("areas", year=year).set_index("glacier_id")
    pixel_m = region.imagery.sensor.pixel_m
    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained")
    for axis, (pixels, simplify_px) in zip(axes.flat, [(p, s) for p in ("whole", "fractional") for s in (0, 1.5)]):
        settings = region.areas.model_copy(update={"pixels": pixels, "simplify_m": simplify_px * pixel_m})
        site = Site(region.model_copy(update={"areas": settings}), str(storage.root))
        outlines = outlines_of(site, year, fold, glacier_id)
        corners = int(outlines.count_coordinates().sum())
        metric = outlines.to_crs(epsg).set_index("bound")
        inventory.boundary.plot(ax=axis, color="#2a9d4e", lw=0.8, ls="--")
        for bound, colour in (("upper", "#1f77b4"), ("lower", "#d62728"), ("best", "black")):
            if bound in metric.index:
                metric.loc[[bound]].boundary.plot(ax=axis, color=colour, lw=1.1)
        place = areas.loc[[glacier_id], ["terminus_lon", "terminus_lat"]].astype(float)
        if place.notna().all(axis=None):
            import geopandas as gpd

            points = gpd.GeoSeries.from_xy(place["terminus_lon"], place["terminus_lat"], crs=4326).to_crs(epsg)
            points.plot(ax=axis, color="#c51b8a", zorder=5, markersize=30)
            x, y = points.iloc[0].x, points.iloc[0].y
        else:
            x, y = metric.geometry.iloc[0].representative_point().coords[0]
        half = 30 * pixel_m
        middle = metric.geometry.iloc[0].centroid
        away = max(np.hypot(middle.x - x, middle.y - y), 1.0)
        x, y = x + 0.7 * half * (middle.x - x) / away, y + 0.7 * half * (middle.y - y) / away
        axis.set(xlim=(x - half, x + half), ylim=(y - half, y + half), xticks=[], yticks=[], xlabel="", ylabel="")
        axis.set_title(f"{pixels} pixels, simplify_m {settings.simplify_m:g}: {corners} corners", fontsize=10)
    figure.suptitle(
        f"{glacier_id}, {year}: lower (red), best (black), upper (blue), inventory (green), terminus (dot)", fontsize=10
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def by_size(frame: pd.DataFrame, edges: list[float]) -> None:
    """Table: fractional against whole pixels by size class."""
    print("| size (km2) | glaciers | whole (km2) | fractional (km2) | sum differs | median difference | "
          "median size of difference | outline: whole against polygon, median size |\n|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip  # noqa: E501
    classes = size_class(frame["polygon_km2"].to_numpy(), edges)
    labels = size_class_labels(edges)
    for number in [*sorted(set(classes)), None]:
        part = frame if number is None else frame[classes == number]
        label = "all" if number is None else labels[number]
        whole, fractional = part["whole_each_area_km2"], part["fractional_each_area_km2"]
        percent = (100 * (fractional - whole) / whole.where(whole > 0)).dropna()
        outline = 100 * (part["whole_each_inventory_area_km2"] - part["polygon_km2"]) / part["polygon_km2"]
        print(
            f"| {label} | {len(part)} | {whole.sum():.4f} | {fractional.sum():.4f} | "
            f"{100 * (fractional.sum() / whole.sum() - 1):+.3f} % | {percent.median():+.3f} % | "
            f"{percent.abs().median():.3f} % | {outline.abs().median():.3f} % |"
        )


if __name__ == "__main__":
    sys.exit(main())
