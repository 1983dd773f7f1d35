"""How fast candidates are scored, and how much of the scenes is read for it.

Run ``python benchmarks/imagery.py`` from the root of the checkout; benchmarks/README.md explains the figures. All
ratios come from one run, on a region that is simulated once below ``--folder``; the HTTP files come from a server in a
process of its own that waits ``--latency`` milliseconds before each answer.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pystac

from dl4gam_assets.compute import Mapper, default_workers
from dl4gam_assets.imagery import candidates_of_glacier, open_catalog, read_image
from dl4gam_assets.imagery.reading import ReadPolicy, bytes_read, forget_files
from dl4gam_assets.inventory import glacier_grid
from dl4gam_assets.settings import Region, load_region
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage

YEAR = 2016


# ------------------------------------------------------------------------------------------------------ the region
def region_of(folder: Path) -> tuple[Region, Workspace]:
    """The demo region of two years, simulated, with its inventory tables."""
    from dl4gam_assets.stages.inventory import glacier_zones, inventory_outlines
    from dl4gam_assets.stages.simulation import simulated_inputs

    raw = load_region("demo").model_dump(mode="json")
    raw["years"] |= {"first": 2015, "last": YEAR, "baseline": 2015}
    region = Region.model_validate(raw)
    workspace = Workspace(region, Storage(folder / "demo"), Mapper(1))
    for stage in (simulated_inputs, inventory_outlines, glacier_zones):
        stage(workspace)
    return region, workspace


class Served:
    """A catalog whose files are behind HTTP."""

    def __init__(self, catalog: Any, root: Path, url: str):
        self.catalog, self.root, self.url = catalog, root, url

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        found = [item.clone() for item in self.catalog.search(bbox, start, end)]
        for item in found:
            for asset in item.assets.values():
                asset.href = f"{self.url}/{Path(asset.href).relative_to(self.root).as_posix()}"
        return found


def serve(root: Path, latency_s: float, url: Any) -> None:
    from dl4gam_assets_tests.imagery.range_server import serving

    with serving(root, latency_s) as server:
        url.send(server.url)
        url.recv()  # until told to stop


# ----------------------------------------------------------------------------------------------------- candidates
class Season:
    """The candidates of all glaciers of a year."""

    def __init__(self, region: Region, workspace: Workspace):
        self.region = region
        self.glaciers = workspace.storage.read_table("glaciers")
        self.zones = workspace.storage.read_table("zones")
        self.modelled = self.glaciers[self.glaciers["modelled"].astype(bool)]

    def score(self, catalog: Any, concurrent: int) -> tuple[float, int, int]:
        """Seconds, candidates and bytes of one pass with no file open."""
        compute = self.region.compute.model_copy(update={"concurrent_reads": concurrent})
        region = self.region.model_copy(update={"compute": compute})
        forget_files()
        start, found, fetched = time.perf_counter(), 0, 0
        for _, glacier in self.modelled.iterrows():
            mine = self.zones[self.zones["glacier_id"] == glacier["glacier_id"]]
            frame = candidates_of_glacier(glacier, self.glaciers, mine, catalog, region, YEAR)
            assert frame["reason"].isna().all(), frame["reason"].dropna().iloc[0]
            found += len(frame)
            fetched += frame.attrs["bytes_read"]
        return time.perf_counter() - start, found, fetched


def scene_bytes(region: Region, season: Season, catalog: Any) -> int:
    """Size of the files (those assets that scoring reads) of all scenes of the candidates."""
    sensor = region.imagery.sensor
    names = [sensor.bands[b] for b in ("blue", "green", "red", "swir16")]
    names += [n for n in (sensor.scene_classification, sensor.cloud_probability) if n]
    west, south, east, north = season.modelled.total_bounds
    start, end = (dt.date.fromisoformat(f"{YEAR}-{day}") for day in region.imagery.window)
    items = catalog.search((west, south, east, north), start, end)
    return sum(Path(item.assets[name].href).stat().st_size for item in items for name in names)


# ----------------------------------------------------------------------------------- one date by two readers
def by_odc(items: list[pystac.Item], region: Region, grid: Any, threads: int) -> dict[str, np.ndarray]:
    """The same layers as digital numbers with odc.stac.load."""
    import dask
    import odc.stac

    sensor = region.imagery.sensor
    bands = [*sensor.bands.values(), *filter(None, (sensor.scene_classification, sensor.cloud_probability))]
    chunks = {} if threads > 1 else None  # {}: one task a band
    loaded = odc.stac.load(
        items,
        bands=bands,
        geobox=grid,
        chunks=chunks,
        resampling={sensor.scene_classification: "nearest", "*": sensor.resampling},
        stac_cfg={"*": {"assets": {"*": {"data_type": "uint16", "nodata": 0}}}},
    )
    if threads > 1:
        with dask.config.set(scheduler="threads", num_workers=threads):
            loaded = loaded.compute()
    return {band: loaded[band].isel(time=0).to_numpy() for band in bands}


def compare(region: Region, season: Season, catalog: Any, threads: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of read_image and odc.stac.load for one date of a glacier, and their largest difference."""
    sensor = region.imagery.sensor
    start, end = (dt.date.fromisoformat(f"{YEAR}-{day}") for day in region.imagery.window)
    glacier = season.modelled.iloc[0]
    grid = glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), sensor.pixel_m, region.imagery.margin_m)
    import rasterio.warp

    box = rasterio.warp.transform_bounds(str(grid.crs), "EPSG:4326", *grid.boundingbox)
    items = catalog.search(box, start, end)
    ours, theirs, worst = [], [], 0.0
    for k in range(repeats):
        item = items[k % len(items)]
        # Each reader opens the files itself: what both have from an earlier round is dropped.
        forget_files()
        began = time.perf_counter()
        loaded = by_odc([item], region, grid, threads)
        theirs.append(time.perf_counter() - began)
        forget_files()
        began = time.perf_counter()
        image = read_image([item], region.imagery, grid, policy=ReadPolicy(concurrent=threads))
        ours.append(time.perf_counter() - began)
        for name, asset in sensor.bands.items():
            if name == "swir16":  # 20 m: both resample, compared in the tests
                continue
            meta = item.assets[asset].extra_fields
            meta = (meta.get("raster:bands") or meta.get("bands") or [meta])[0]
            scale = meta.get("scale", meta.get("raster:scale", 1e-4))
            offset = meta.get("offset", meta.get("raster:offset", 0.0))
            digits = loaded[asset].astype(np.float32)
            other = np.where(digits == 0, np.nan, np.maximum(digits * np.float32(scale) + np.float32(offset), -0.2))
            mine = image["reflectance"].sel(band=name).to_numpy()
            assert np.array_equal(np.isnan(mine), np.isnan(other)), (item.id, name)
            worst = max(worst, float(np.nanmax(np.abs(mine - other), initial=0.0)))
    return statistics.median(ours), statistics.median(theirs), worst


# ------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dl4gam-benchmark")
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds before each HTTP answer")
    parser.add_argument("--repeats", type=int, default=7, help="dates read by each reader, repetitions of local passes")
    choice = parser.parse_args()
    region, workspace = region_of(choice.folder)
    season = Season(region, workspace)
    root = workspace.data_root
    near = open_catalog(region.imagery.catalog, root, region.imagery.sensor)
    print(f"{default_workers()} cores, {len(season.modelled)} glaciers, HTTP answers after {choice.latency:g} ms\n")

    ours, parent = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(root, choice.latency / 1000, parent))
    server.start()
    try:
        far = Served(copy.copy(near), root, ours.recv())
        season.score(near, 1)  # the disk cache of the system, imports
        whole = scene_bytes(region, season, near)
        print(f"{'candidates of all glaciers':44}{'a minute':>10}{'ratio':>8}{'MB read':>10}{'of scenes':>11}")
        for name, catalog, ways in (("local", near, (1, 2, 4)), ("HTTP", far, (1, 4, 16, 32))):
            first = 0.0
            for concurrent in ways:
                passes = [season.score(catalog, concurrent) for _ in range(3 if name == "local" else 1)]
                seconds, found, fetched = min(passes)
                rate = 60 * found / seconds
                first = first or rate
                label = f"{name}, {concurrent} file{'s' * (concurrent > 1)} at once"
                print(
                    f"{label:44}{rate:10.0f}{rate / first:8.2f}{fetched / 1e6:10.1f}{fetched / whole:11.2f}", flush=True
                )
        heading = "one date of the first glacier, all layers"
        print(f"\n{heading:44}{'ours ms':>10}{'odc ms':>8}{'ratio':>10}{'differ':>11}")
        for name, catalog, threads in (("local", near, 1), ("HTTP, serial", far, 1), ("HTTP, 16 at once", far, 16)):
            mine, other, worst = compare(region, season, catalog, threads, choice.repeats)
            print(f"{name:44}{1e3 * mine:10.0f}{1e3 * other:8.0f}{other / mine:10.2f}{worst:11.1e}", flush=True)
        print(f"\nread in all: {bytes_read() / 1e6:.0f} MB")
    finally:
        ours.send("stop")
        server.join(5)
        server.terminate()


if __name__ == "__main__":
    main()
