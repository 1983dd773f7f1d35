"""Four small glaciers as real cube files: bright, dark in SWIR, with noise, terrain, a cloud and missing pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.ndimage import gaussian_filter

from dl4gam_assets.cubes import channel_stack, open_cube, write_cube
from dl4gam_assets.segmentation import PackedCubes, normalization_statistics, pack_cubes
from dl4gam_assets.settings import ModelSettings, TrainingSettings
from dl4gam_assets.terrain import terrain_derivatives
from dl4gam_assets_tests.change.small_cubes import make_cube

CHANNELS = ["red", "green", "nir", "swir16", "ndvi", "ndwi", "ndsi", "dem", "slope", "sin_aspect", "cos_aspect", "dhdt"]
MODEL = ModelSettings(
    encoder="tu-regnetx_002", encoder_depth=2, decoder_channels=[16, 8], encoder_weights=None, channels=CHANNELS
)
TRAINING = TrainingSettings(
    patch_px=32, train_step_px=8, train_patches=96, batch_size=8, epochs=4, learning_rate=3e-3, schedule="one_cycle",
    augmentation=True,
)  # fmt: skip


def glacier_cube(number: int, shape: tuple[int, int]) -> xr.Dataset:
    """Cube of one glacier, an ellipse beside a smaller one that belongs to another glacier."""
    rng = np.random.default_rng(number)
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    glacier = ((rows - shape[0] / 2) / 22) ** 2 + ((cols - 0.42 * shape[1]) / 15) ** 2 < 1
    other = (((rows - shape[0] / 2) / 9) ** 2 + ((cols - 0.8 * shape[1]) / 7) ** 2 < 1) & ~glacier
    ice = glacier | other
    dem = gaussian_filter(rng.normal(0, 1, shape), 6) * 900 + 2800 + 4 * rows
    cloud = np.zeros(shape, bool)
    cloud[: 6 + number, :12] = True
    cube = make_cube(glacier, others=other, not_ok=cloud, dem=dem, glacier_id=f"G{number}")
    texture = gaussian_filter(rng.normal(0, 1, shape), 2) * 0.15
    levels = {"red": (0.5, 0.2), "green": (0.55, 0.18), "nir": (0.4, 0.25), "swir16": (0.05, 0.22)}
    bands = np.stack([np.where(ice, i, r) + texture + rng.normal(0, 0.02, shape) for i, r in levels.values()])
    bands = np.clip(bands, 0.001, 1.2).astype(np.float32)
    bands[:, cloud] = np.nan
    cube = cube.assign_coords(band=list(levels))
    cube["reflectance"] = (("band", "y", "x"), bands)
    for name, layer in terrain_derivatives(cube["dem"].to_numpy(), 10.0).items():
        cube[name] = (("y", "x"), layer)
    dhdt = np.where(ice, -1.0, 0.0).astype(np.float32)
    dhdt[-5:] = np.nan
    cube["dhdt"] = (("y", "x"), dhdt)
    return cube


class Small(NamedTuple):
    """Cube files, their packed layers and statistics."""

    cubes: dict[str, Path]
    packed: PackedCubes
    statistics: pd.DataFrame
    folder: Path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("glaciers")
    cubes = {}
    for number, shape in enumerate([(96, 112), (80, 90), (101, 77), (60, 58)]):
        cubes[f"G{number}"] = folder / f"G{number}.nc"
        write_cube(glacier_cube(number, shape), cubes[f"G{number}"])

    def stacks():  # type: ignore[no-untyped-def]
        for path in cubes.values():
            with open_cube(path) as cube:
                yield channel_stack(cube, CHANNELS)

    return Small(
        cubes, pack_cubes(cubes, CHANNELS, folder / "packed"), normalization_statistics(stacks(), CHANNELS), folder
    )
