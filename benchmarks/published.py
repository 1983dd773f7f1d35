"""How fast published cubes and checkpoints are imported: megapixels a second by step, seconds a checkpoint by step.

    python benchmarks/published.py                                 # 6 cubes of 0.2 megapixels, 2 checkpoints
    python benchmarks/published.py --cubes 12 --side 450 --checkpoints 4

Both are made first, in the published layout and size: all 13 bands, every mask and layer; the network of the region
`alps` (U-Net on ResNet-34, 16 channels) with the state of its optimizer. An import reads each cube once for its
checksum, and converts it for the terrain, for dh/dt, and for the cube itself, so a year costs the checksum and three
conversions. Each checkpoint is proven when it is registered and again when it becomes a member; then it is tried on
three glaciers with both orders of the indices. Seconds are those of the processor, so that what else runs matters less.
"""

from __future__ import annotations

import argparse
import datetime as dt
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import odc.geo.xr  # registers the accessor `.odc`
import torch
import xarray as xr
from odc.geo.geobox import GeoBox
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter

from dl4gam_assets.cubes import channel_stack, open_cube, write_cube
from dl4gam_assets.published import adopt, read_published, read_weights, to_cube, write_published
from dl4gam_assets.published.checkpoints import PREFIX
from dl4gam_assets.published.layout import BAND_NAMES, LAYERS, NODATA, mask_name
from dl4gam_assets.segmentation import build_model, member_logits
from dl4gam_assets.settings import InferenceSettings, load_region
from dl4gam_assets.stages.files import full_hash

BUFFERS = (-20, -10, 0, 10, 20, 50)
DATE = dt.datetime(2023, 8, 21)
CONVERSIONS, PROOFS, TRIED = 3, 2, 3 * 2


def published_cube(rng: np.random.Generator, side: int) -> xr.Dataset:
    """A glacier in the middle of a square, textured so that it compresses as terrain and images do."""
    box = GeoBox.from_bbox(
        (500_000, 5_000_000, 500_000 + 10 * side, 5_000_000 + 10 * side), "EPSG:32632", resolution=10
    )
    where = {"grid_mapping": "spatial_ref"}
    out = xr.Dataset(coords=dict(odc.geo.xr.xr_coords(box)))
    texture = gaussian_filter(rng.normal(size=(side, side)), 8)
    texture /= np.abs(texture).max()
    bands = [np.rint(3000 + 2000 * texture + rng.normal(0, 60, texture.shape)).astype(np.int16) for _ in BAND_NAMES]
    out["band_data"] = (
        ("band", "y", "x"), np.stack(bands),
        {"long_name": list(BAND_NAMES), "_FillValue": np.int16(NODATA), **where},
    )  # fmt: skip
    row, column = np.indices((side, side)) - side / 2
    glacier = np.hypot(row, column) < side / 4
    flag = {"_FillValue": np.int8(-1), **where}
    masks = {"mask_nok": texture > 0.8, "mask_debris": glacier & (texture > 0.3)}
    for buffer_m in BUFFERS:
        grow = binary_dilation if buffer_m > 0 else binary_erosion
        masks[mask_name(buffer_m)] = grow(glacier, iterations=abs(buffer_m) // 10) if buffer_m else glacier
    for name, values in masks.items():
        out[name] = (("y", "x"), values.astype(np.int8), dict(flag))
    out["mask_all_g_id"] = (
        ("y", "x"),
        np.where(glacier, 7, -1).astype(np.int32),
        {"_FillValue": np.int32(-1), **where},
    )
    for i, name in enumerate(LAYERS):
        layer = np.roll(texture, 17 * i, axis=0).astype(np.float32) * (800 if name == "dem" else 30)
        out[name] = (("y", "x"), layer, {"_FillValue": np.float32(NODATA), **where})
    return out.assign_attrs(fn="20230821T102559_raw.tif", glacier_area=1e-4 * float(glacier.sum()))


class Clock:
    """Seconds of the processor by step, summed over files."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, work: Callable[..., Any], *args: Any) -> Any:
        begin = time.process_time()
        made = work(*args)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.process_time() - begin
        return made


def mapped(network: torch.nn.Module, ready: np.ndarray) -> np.ndarray:
    return next(iter(member_logits([network], ready, InferenceSettings(), "cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubes", type=int, default=6)
    parser.add_argument("--side", type=int, default=450, help="pixels of a side")
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch, as in each process of an import")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng, region = np.random.default_rng(0), load_region("alps")
    bands, model = list(region.imagery.sensor.bands), region.model
    with tempfile.TemporaryDirectory() as temporary:
        folder, clock = Path(temporary), Clock()
        for i in range(options.cubes):
            write_published(published_cube(rng, options.side), folder / f"{i}.nc")
        for i in range(options.cubes):
            path = folder / f"{i}.nc"
            clock("checksum", full_hash, path)
            data = clock("read and check", read_published, path, BUFFERS, model.channels)
            cube = clock("convert", to_cube, data, "7", DATE, bands, BUFFERS)
            clock("write", write_cube, cube, folder / f"ours-{i}.nc")
        pixels = options.cubes * options.side**2 / 1e6
        size = sum((folder / f"{i}.nc").stat().st_size for i in range(options.cubes)) / 1e6
        print(f"{options.cubes} cubes of {pixels / options.cubes:.2f} megapixels, {size / options.cubes:.1f} MB each")
        for step, seconds in clock.seconds.items():
            print(f"  {step:16} {pixels / seconds:8.2f} megapixels/s")
        s = clock.seconds
        year = s["checksum"] + CONVERSIONS * (s["read and check"] + s["convert"]) + s["write"]
        print(f"  a year's import: {pixels / year:.2f} megapixels/s, {year / pixels:.2f} s a megapixel, in one process")

        clock = Clock()
        with open_cube(folder / "ours-0.nc") as stored:
            stack, _ = channel_stack(stored.load(), model.channels)
        ready = np.nan_to_num(stack)
        for i in range(options.checkpoints):
            torch.manual_seed(i)
            weights = build_model(model, pretrained=False).state_dict()
            moments = {k: (v.clone(), v.clone()) for k, v in weights.items() if v.is_floating_point()}
            path = folder / f"{i}.ckpt"
            torch.save({"state_dict": {PREFIX + k: v for k, v in weights.items()}, "optimizer_states": moments}, path)
            clock("checksum", full_hash, path)
            read, _ = clock("read", read_weights, path)
            state, _ = clock("prove", adopt, read, {}, model.channels, model)
            network = build_model(model, pretrained=False)
            network.load_state_dict(state)
            clock("map a glacier", mapped, network.eval(), ready)
        n, size = options.checkpoints, (folder / "0.ckpt").stat().st_size / 1e6
        print(f"{n} checkpoints of {size:.0f} MB")
        for step, seconds in clock.seconds.items():
            print(f"  {step:16} {seconds / n:8.2f} s")
        s = clock.seconds
        one = PROOFS * (s["checksum"] + s["read"] + s["prove"]) + TRIED * s["map a glacier"]
        print(f"  an import: {one / n:.1f} s a checkpoint, in one process")


if __name__ == "__main__":
    main()
