"""Training layers packed once: raw channels and masks of all glaciers in flat memory-mapped files.

Belongs here: the packed folder. Does not belong here: patches (``sampling``), normalization, the loop (``training``).

All members of all folds read the same files, so the memory of a training does not grow with the number of glaciers.
Channels are integers with a fixed step, the steps of the cubes for the layers that cubes hold (so nothing is lost), and
1/32000 for those derived from them (indices, sine and cosine of the aspect).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dl4gam_assets.compute import Mapper
from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.cubes.files import SCALED
from dl4gam_assets.storage import temporary_mark

if TYPE_CHECKING:
    from upath import UPath

#: The integer of a missing value.
MISSING = np.int16(-32768)
_UNIT = 1.0 / 32000.0
_BITS = {"valid": 1, "any_glacier": 2, "zone_50": 4, "glacier": 8, "flat": 16}
#: Layout of a packed folder.
FORMAT = 3


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

    @property
    def flat(self) -> np.ndarray:
        """Flat ground: it faces nowhere, and its aspect of 0 (north) is a convention that does not turn."""
        return self._mask("flat")

    @staticmethod
    def bit(name: str) -> int:
        """Value of a mask's bit: ``valid``, ``any_glacier``, ``zone_50``, ``glacier`` or ``flat``."""
        return _BITS[name]

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
        if index.get("format") != FORMAT:
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

    def size_bytes(self, ids: Sequence[str]) -> int:
        """Bytes of the layers of these glaciers."""
        entries = (self._entry(g) for g in ids)
        return sum(e["height"] * e["width"] for e in entries) * (2 * len(self.channels) + 1)

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


def pack_cubes(
    cubes: Mapping[str, Path | UPath],
    channels: Sequence[str],
    folder: Path,
    *,
    mapper: Mapper | None = None,
    reading: Callable[[Any], AbstractContextManager[Path]] = nullcontext,
    progress: Callable[[int, int, float], None] | None = None,
) -> PackedCubes:
    """Write the channels and masks of cubes into ``folder`` (made anew) and open it.

    The folder is made beside its final place and moved there when it is complete, so another process that packs the
    same cubes at the same time does no harm.

    Parameters
    ----------
    cubes : files by glacier id
    channels : names of the C channels
    folder : where to write; its parent must be visible to all processes of ``mapper``
    mapper : spreads glaciers over processes; this process alone without one
    reading : gives a local path of a file of ``cubes`` (``Storage.reading`` for those in an object store)
    progress : called with (done, total, seconds)

    Raises
    ------
    ValueError
        if there are no cubes, or some can not be read: all of them are named, for a training set that silently lacks
        glaciers is another one.
    """
    if not cubes:
        raise ValueError("there are no cubes to train on")
    temporary = folder.with_name(f"{temporary_mark()}{secrets.token_hex(6)}-{folder.name}")
    temporary.mkdir(parents=True)
    entries: dict[str, dict[str, int]] = {}
    start, sizes = 0, {}
    bad: dict[str, str] = {}
    for glacier_id, path in sorted(cubes.items()):
        try:
            with reading(path) as local, open_cube(local) as cube:
                sizes[glacier_id] = (cube.sizes["y"], cube.sizes["x"])
        except (OSError, ValueError, KeyError) as error:
            bad[glacier_id] = str(error)
    for glacier_id, (height, width) in sizes.items():
        entries[glacier_id] = {"height": height, "width": width, "start": start}
        start += height * width
    for name, size in (("channels.bin", start * len(channels) * 2), ("masks.bin", start)):
        with open(temporary / name, "wb") as empty:
            empty.truncate(size)
    tasks = [(g, (cubes[g], list(channels), temporary, entries[g], reading)) for g in sizes]
    for done in (mapper or Mapper(1)).map(_pack_one, tasks, progress=progress):
        if done.ok:
            entries[done.key]["checksum"] = done.value
        else:
            bad[done.key] = str(done.error)
    if bad:
        shutil.rmtree(temporary, ignore_errors=True)
        told = "; ".join(f"{g} ({cubes[g]}): {' '.join(e.split())[:200]}" for g, e in sorted(bad.items())[:5])
        raise ValueError(
            f"{len(bad)} of {len(cubes)} glacier cubes can not be read; delete them and materialize glacier_cubes "
            f"again: {told}"
        )
    index = {"format": FORMAT, "channels": list(channels), "glaciers": entries}
    (temporary / "packed.json").write_text(json.dumps(index), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(temporary, folder)
    except OSError:  # another process was faster with the same
        shutil.rmtree(temporary, ignore_errors=True)
    return PackedCubes.open(folder)


#: Seconds after which an unfinished folder is one that a killed process left.
_LEFT_S = 86_400.0


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep :func:`remove_unused` from a packed folder; the lock of a process that is killed is gone with it."""
    from filelock import FileLock

    mark = folder / f".use-{secrets.token_hex(6)}.lock"
    try:
        with FileLock(str(mark)):
            yield
    finally:
        mark.unlink(missing_ok=True)


def remove_unused(parent: Path) -> list[str]:
    """Remove packed folders that no process uses, and unfinished ones that are a day old; returns their names."""
    removed = []
    for folder in sorted(p for p in parent.iterdir() if p.is_dir()) if parent.exists() else ():
        if folder.name.startswith(".tmp-"):
            unused = time.time() - max(p.stat().st_mtime for p in (folder, *folder.iterdir())) > _LEFT_S
        else:
            unused = not any(_held(mark) for mark in folder.glob(".use-*.lock"))
        if unused:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed


def _held(mark: Path) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(str(mark), timeout=0):
            return False
    except Timeout:
        return True


def _pack_one(
    path: Any, channels: list[str], folder: Path, entry: Mapping[str, int],
    reading: Callable[[Any], AbstractContextManager[Path]],
) -> int:  # fmt: skip
    """Write one glacier's layers at their place in the files; returns their checksum."""
    steps = np.array([channel_step(c) for c in channels], dtype=np.float32)[:, None, None]
    with reading(path) as local, open_cube(local) as cube:
        stack, valid = channel_stack(cube, channels)
        masks = {"valid": valid, "flat": np.zeros_like(valid)}
        masks |= {name: cube_mask(cube, name) for name in _BITS if name not in masks}
        if {"slope", "aspect"} <= set(cube.data_vars):
            masks["flat"] = (cube["slope"].to_numpy() == 0) & (cube["aspect"].to_numpy() == 0)
    bits = np.zeros(valid.shape, dtype=np.uint8)
    for name, bit in _BITS.items():
        bits[masks[name]] |= np.uint8(bit)
    if bits.shape != (entry["height"], entry["width"]):
        raise ValueError(f"the cube changed while it was packed: {bits.shape}")
    missing = ~np.isfinite(stack)
    np.nan_to_num(stack, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    digits = np.clip(np.rint(np.divide(stack, steps, out=stack), out=stack), -32767, 32767).astype(np.int16)
    digits[missing] = MISSING
    start = entry["start"]
    for name, array in (("channels.bin", digits), ("masks.bin", bits)):
        with open(folder / name, "r+b") as out:
            out.seek(start * (array.nbytes // bits.size))
            array.tofile(out)
    return zlib.crc32(bits.tobytes(), zlib.crc32(digits.tobytes()))
