"""Training layers packed once: raw channels and masks of all glaciers in flat memory-mapped files.

Belongs here: the packed folder. Does not belong here: patches (``sampling``), normalization, the loop (``training``).

All members of all folds read the same files, so the memory of a training does not grow with the number of glaciers.
Channels are integers with a fixed step, the steps of the cubes for the layers that cubes hold (so nothing is lost), and
1/32000 for those derived from them (indices, sine and cosine of the aspect).
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.cubes.files import SCALED

#: The integer of a missing value.
MISSING = np.int16(-32768)
_UNIT = 1.0 / 32000.0
_BITS = {"valid": 1, "any_glacier": 2, "zone_50": 4, "glacier": 8}
_FORMAT = 2


def channel_step(channel: str) -> float:
    """Value of one integer step of a packed channel."""
    if channel in {"ndvi", "ndwi", "ndsi", "sin_aspect", "cos_aspect"}:
        return _UNIT
    if channel == "slope":
        return SCALED["slope"][1] / 90.0
    return SCALED[channel if channel in SCALED else "reflectance"][1]


@dataclass(frozen=True)
class Packed:
    """Layers of one glacier, or of a window of it: channels int16 (C, H, W), ``MISSING`` where missing, and mask bits
    uint8 (H, W). Both are views on files; the masks, bool (H, W), are made when they are asked for."""

    channels: np.ndarray
    bits: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """Pixels whose image is usable."""
        return self._mask("valid")

    @property
    def target(self) -> np.ndarray:
        """Pixels of any glacier."""
        return self._mask("any_glacier")

    @property
    def zone(self) -> np.ndarray:
        """This glacier and its 50 m zone."""
        return self._mask("zone_50")

    @property
    def glacier(self) -> np.ndarray:
        """This glacier."""
        return self._mask("glacier")

    def _mask(self, name: str) -> np.ndarray:
        found: np.ndarray = (self.bits & np.uint8(_BITS[name])) != 0
        return found

    def window(self, rows: slice, cols: slice) -> Packed:
        return Packed(self.channels[:, rows, cols], self.bits[rows, cols])


class PackedCubes:
    """A packed folder, opened read-only; channels are views on a memory-mapped file.

    Attributes
    ----------
    channels : names
    steps : float32 (C,), value of one integer step of each channel
    """

    def __init__(self, folder: Path, index: Mapping[str, object]):
        if index.get("format") != _FORMAT:
            raise ValueError(f"{folder} was packed by another version; delete it")
        self.folder = folder
        self.channels: list[str] = list(index["channels"])  # type: ignore[call-overload]
        self.steps = np.array([channel_step(c) for c in self.channels], dtype=np.float32)
        self._entries: dict[str, dict[str, int]] = index["glaciers"]  # type: ignore[assignment]
        self._values = np.memmap(folder / "channels.bin", dtype=np.int16, mode="r")
        self._bits = np.memmap(folder / "masks.bin", dtype=np.uint8, mode="r")

    @classmethod
    def open(cls, folder: Path) -> PackedCubes:
        """Open a folder written by :func:`pack_cubes`; raises FileNotFoundError if it is not complete."""
        return cls(folder, json.loads((folder / "packed.json").read_text(encoding="utf-8")))

    @property
    def ids(self) -> list[str]:
        return sorted(self._entries)

    def checksum(self, glacier_id: str) -> int:
        """Checksum of a glacier's layers, made while packing."""
        return self._entry(glacier_id)["checksum"]

    def glacier(self, glacier_id: str) -> Packed:
        """Layers of a glacier.

        Raises
        ------
        KeyError
            if it was not packed.
        """
        entry = self._entry(glacier_id)
        height, width, start = entry["height"], entry["width"], entry["start"]
        size, n = height * width, len(self.channels)
        values = self._values[start * n : (start + size) * n].reshape(n, height, width)
        return Packed(values, self._bits[start : start + size].reshape(height, width))

    def stack(self, glacier_id: str) -> np.ndarray:
        """Raw channels of a glacier as float32 (C, H, W), NaN where missing: ``channel_stack`` to the packed steps."""
        digits = self.glacier(glacier_id).channels
        values = digits.astype(np.float32) * self.steps[:, None, None]
        return np.where(digits == MISSING, np.float32(np.nan), values)

    def _entry(self, glacier_id: str) -> dict[str, int]:
        if glacier_id not in self._entries:
            raise KeyError(f"glacier {glacier_id} is not among the {len(self._entries)} packed ones in {self.folder}")
        return self._entries[glacier_id]


def pack_cubes(cubes: Mapping[str, Path], channels: Sequence[str], folder: Path) -> PackedCubes:
    """Write the channels and masks of cubes into ``folder`` (made anew) and open it.

    The folder is made beside its final place and moved there when it is complete.

    Raises
    ------
    ValueError
        if there are no cubes.
    """
    if not cubes:
        raise ValueError("there are no cubes to train on")
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    steps = np.array([channel_step(c) for c in channels], dtype=np.float32)[:, None, None]
    entries: dict[str, dict[str, int]] = {}
    start = 0
    with open(temporary / "channels.bin", "wb") as values, open(temporary / "masks.bin", "wb") as bits:
        for glacier_id, path in sorted(cubes.items()):
            with open_cube(path) as cube:
                stack, valid = channel_stack(cube, channels)
                masks = {"valid": valid} | {name: cube_mask(cube, name) for name in _BITS if name != "valid"}
            packed = sum(masks[name] * np.uint8(bit) for name, bit in _BITS.items()).astype(np.uint8)  # type: ignore[union-attr]
            digits = np.clip(np.rint(np.nan_to_num(stack) / steps), -32767, 32767).astype(np.int16)
            digits[~np.isfinite(stack)] = MISSING
            digits.tofile(values)
            packed.tofile(bits)
            entries[glacier_id] = {
                "height": packed.shape[0], "width": packed.shape[1], "start": start,
                "checksum": zlib.crc32(packed.tobytes(), zlib.crc32(digits.tobytes())),
            }  # fmt: skip
            start += packed.size
    index = {"format": _FORMAT, "channels": list(channels), "glaciers": entries}
    (temporary / "packed.json").write_text(json.dumps(index), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return PackedCubes.open(folder)
