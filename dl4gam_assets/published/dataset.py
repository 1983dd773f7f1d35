"""Patches of cubes in the published layout as a torch data set.

Belongs here: what a training loop of one's own needs. Does not belong here: our training (``segmentation``), which
packs cubes once and cuts patches on the device.

It follows the conventions of TorchGeo's non-geospatial data sets: a sample is a dictionary with ``image`` and ``mask``,
``transforms`` takes and returns it. TorchGeo itself is not needed. Its own ``DL4GAMAlps`` reads the published patches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from dl4gam_assets.cubes import channel_stack, cube_mask
from dl4gam_assets.cubes.channels import _PAIRS
from dl4gam_assets.published.cubes import find_cubes, read_ground, read_published, to_cube
from dl4gam_assets.published.layout import PUBLISHED_BAND, PublishedFileError
from dl4gam_assets.published.splits import read_splits, read_statistics
from dl4gam_assets.segmentation import normalize, patch_centres
from dl4gam_assets.settings import PUBLISHED_CHANNELS

_BUFFERS = (-20, -10, 0, 10, 20, 50)


class PublishedPatches(torch.utils.data.Dataset[dict[str, Any]]):
    """Patches around the published centres of the glaciers of a fold and role.

    A sample holds ``image`` float32 (C, size, size), standardized if a table is given; ``mask`` int64 (size, size), 1
    on any glacier; ``mask_nok`` bool (size, size), true where no loss should count; ``glacier_id``.

    Parameters
    ----------
    cubes : folder of <entry_id>/<date>.nc
    splits : the fold map
    fold : iteration, from 1
    role : ``train``, ``valid`` or ``test``
    statistics : the iteration's normalization table; None: channels as they are
    channels : in our names; the 16 published ones by default
    size, step : pixels of a patch and between centres (published: 256; 32 in training, 64 in validation)
    extremes : the four outermost points and the centroid of each glacier are centres too (published: in training)
    keep : cubes that stay in memory, those used last (of 0.2 megapixels with 16 channels: 13 MB each)
    transforms : takes and returns a sample
    n_folds : iterations in the fold map

    Raises
    ------
    PublishedFileError
        if a file is not in the published layout, or the fold has no cube in that role. Only masks are read at first:
        what is wrong with a file's bands shows when its first patch is asked for.
    """

    def __init__(
        self, cubes: Path | str, splits: Path | str, fold: int, role: Literal["train", "valid", "test"], *,
        statistics: Path | str | None = None, channels: Sequence[str] = PUBLISHED_CHANNELS, size: int = 256,
        step: int = 32, extremes: bool = True, keep: int = 4,
        transforms: Callable[[dict[str, Any]], dict[str, Any]] | None = None, n_folds: int = 5,
    ) -> None:  # fmt: skip
        table = read_splits(Path(splits), n_folds)
        wanted = set(table.loc[(table["fold"] == fold) & (table["role"] == role), "glacier_id"])
        self._files = [cube for cube in find_cubes(Path(cubes)) if cube.glacier_id in wanted]
        if not self._files:
            raise PublishedFileError(
                f"{cubes} holds no cube of the glaciers that are {role} in split_{fold} of {splits}"
            )
        self._channels, self._size, self._transforms = list(channels), size, transforms
        self._statistics = None if statistics is None else read_statistics(Path(statistics), self._channels)
        self._keep = max(keep, 1)
        self._kept: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
        self._places: list[tuple[int, int, int]] = []
        for number, file in enumerate(self._files):
            ground = read_ground(file.path, _BUFFERS)
            centres = patch_centres(cube_mask(ground, "zone_50"), cube_mask(ground, "glacier"), step, extremes=extremes)
            self._places += [(number, int(row), int(column)) for row, column in centres]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row, column = self._places[index]
        stack, glacier, bad = self._layers(number)
        sample: dict[str, Any] = {
            "image": torch.from_numpy(_cut(stack, row, column, self._size, 0.0)),
            "mask": torch.from_numpy(_cut(glacier.astype(np.int64), row, column, self._size, 0)),
            "mask_nok": torch.from_numpy(_cut(bad, row, column, self._size, True)),
            "glacier_id": self._files[number].glacier_id,
        }
        return sample if self._transforms is None else self._transforms(sample)

    def _layers(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Channels, glaciers and unusable pixels of a cube: from memory where it was among the last ones."""
        if number not in self._kept:
            cube = self._cube(number)
            stack, valid = channel_stack(cube, self._channels)
            if self._statistics is not None:
                stack = normalize(stack, self._channels, self._statistics)
            self._kept[number] = np.nan_to_num(stack), cube_mask(cube, "any_glacier"), ~valid
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _cube(self, number: int) -> xr.Dataset:
        file = self._files[number]
        data = read_published(file.path, _BUFFERS, self._channels)
        bands = [str(name) for name in data["band"].to_numpy() if str(name) in PUBLISHED_BAND]
        wanted = {b for c in self._channels for b in _PAIRS.get(c, (c,))}
        pixel_m = abs(float(data.odc.geobox.resolution.x))
        return to_cube(data, file.glacier_id, file.date, [b for b in bands if b in wanted], _BUFFERS, pixel_m=pixel_m)


def _cut(layer: np.ndarray, row: int, column: int, size: int, fill: Any) -> np.ndarray:
    """A square around a centre; ``fill`` beyond the edges."""
    top, left = row - size // 2, column - size // 2
    out = np.full((*layer.shape[:-2], size, size), fill, dtype=layer.dtype)
    rows, columns = slice(max(top, 0), top + size), slice(max(left, 0), left + size)
    part = layer[..., rows, columns]
    a, b = max(-top, 0), max(-left, 0)
    out[..., a : a + part.shape[-2], b : b + part.shape[-1]] = part
    return out
