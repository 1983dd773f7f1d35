"""Training layers packed once: raw channels, targets and patch centres of all glaciers in flat memory-mapped files.

Belongs here: the packed folder. Does not belong here: normalization and batches (``training``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube

_VALID, _TARGET, _ZONE, _GLACIER = 1, 2, 4, 8


@dataclass(frozen=True)
class Packed:
    """Layers of one glacier: raw channels float32 (C, H, W), and masks bool (H, W)."""

    channels: np.ndarray
    valid: np.ndarray
    target: np.ndarray
    zone: np.ndarray
    glacier: np.ndarray


class PackedCubes:
    """A packed folder, opened read-only; arrays are views on memory-mapped files."""

    def __init__(self, folder: Path, index: dict[str, object]):
        self.folder = folder
        self.channels: list[str] = list(index["channels"])  # type: ignore[call-overload]
        self._entries: dict[str, dict[str, int]] = index["glaciers"]  # type: ignore[assignment]
        self._values = np.memmap(folder / "channels.bin", dtype=np.float32, mode="r")
        self._bits = np.memmap(folder / "masks.bin", dtype=np.uint8, mode="r")

    @classmethod
    def open(cls, folder: Path) -> PackedCubes:
        """Open a folder written by :func:`pack_cubes`; raises FileNotFoundError if it is not complete."""
        return cls(folder, json.loads((folder / "packed.json").read_text(encoding="utf-8")))

    @property
    def ids(self) -> list[str]:
        return sorted(self._entries)

    def glacier(self, glacier_id: str) -> Packed:
        entry = self._entries[glacier_id]
        height, width, start = entry["height"], entry["width"], entry["start"]
        size, n = height * width, len(self.channels)
        bits = self._bits[start : start + size].reshape(height, width)
        return Packed(
            self._values[start * n : (start + size) * n].reshape(n, height, width),
            (bits & _VALID) > 0,
            (bits & _TARGET) > 0,
            (bits & _ZONE) > 0,
            (bits & _GLACIER) > 0,
        )


def pack_cubes(cubes: Mapping[str, Path], channels: Sequence[str], folder: Path) -> PackedCubes:
    """Write the channels and masks of cubes into ``folder`` (made anew) and open it.

    The index file is written last, so a folder that has it is complete.
    """
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    entries: dict[str, dict[str, int]] = {}
    start = 0
    with open(temporary / "channels.bin", "wb") as values, open(temporary / "masks.bin", "wb") as bits:
        for glacier_id, path in sorted(cubes.items()):
            with open_cube(path) as cube:
                stack, valid = channel_stack(cube, channels)
                packed = (
                    valid * _VALID
                    + cube_mask(cube, "any_glacier") * _TARGET
                    + cube_mask(cube, "zone_50") * _ZONE
                    + cube_mask(cube, "glacier") * _GLACIER
                ).astype(np.uint8)
            np.ascontiguousarray(stack, dtype=np.float32).tofile(values)
            packed.tofile(bits)
            entries[glacier_id] = {"height": packed.shape[0], "width": packed.shape[1], "start": start}
            start += packed.size
    (temporary / "packed.json").write_text(json.dumps({"channels": list(channels), "glaciers": entries}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return PackedCubes.open(folder)


def patch_centres(zone: np.ndarray, glacier: np.ndarray, step: int, extremes: bool) -> np.ndarray:
    """Patch centres of a glacier: pixels of its 50 m zone whose row and column are multiples of ``step``.

    With ``extremes`` also the outline's centroid (its nearest pixel) and northern-, southern-, western- and easternmost
    pixels (Diaconu et al. 2025, section 5). A glacier too small for the grid of centres has at least its centroid.

    Returns
    -------
    int array (N, 2) of rows and columns, without repetitions.
    """
    rows, cols = np.nonzero(zone)
    on_grid = (rows % step == 0) & (cols % step == 0)
    found = [np.stack([rows[on_grid], cols[on_grid]], axis=1)]
    inside = np.argwhere(glacier)
    if len(inside) and (extremes or not on_grid.any()):
        middle = inside[((inside - inside.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        picks = [middle]
        if extremes:
            picks += [inside[k] for k in (inside[:, 0].argmin(), inside[:, 0].argmax(), inside[:, 1].argmin(), inside[:, 1].argmax())]
        found.append(np.array(picks))
    return np.unique(np.concatenate(found), axis=0)
