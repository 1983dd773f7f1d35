"""From chosen patches to a batch on the device: cut on the host from mapped files, or gathered on the device.

Belongs here: where the packed layers lie while training, and how a batch comes out of them. Does not belong here: which
patches are chosen (``sampling``), the loop (``training``).

Both ways give the same integers, so it is a question of speed and memory only. On a GPU the layers of a fold's training
glaciers (33 bytes a pixel for 16 channels) usually fit its memory; a batch is then one gather, and the host does
nothing but draw numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dl4gam_assets.segmentation.packing import MISSING, Packed, PackedCubes
from dl4gam_assets.segmentation.sampling import aspect_places, cut_batch, patch_corner, symmetry


class Batch(NamedTuple):
    """Packed channels int16 (B, C, P, P), target and valid float32 (B, 1, P, P), on one device."""

    x: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor


class PatchSource(Protocol):
    """Makes batches of a member's training patches."""

    #: 'mapped' or 'resident'.
    kind: str

    def batch(self, chosen: np.ndarray, turns: np.ndarray) -> Batch:
        """Patches around ``chosen``, int (B, 3) of glacier number, row and column, in the symmetries ``turns`` (B,)."""
        ...


def patch_source(packed: PackedCubes, ids: Sequence[str], size: int, device: str, where: str = "auto") -> PatchSource:
    """The source of patches of ``size`` pixels of the glaciers ``ids``.

    Parameters
    ----------
    where : ``mapped``, ``resident``, or ``auto``: resident on a GPU whose free memory is more than twice the layers

    Raises
    ------
    MemoryError
        if ``resident`` was asked for and the layers do not fit the device.
    """
    if where == "auto":
        where = "mapped"
        if device.startswith("cuda"):
            free, _ = torch.cuda.mem_get_info(device)
            where = "resident" if 2 * packed.size_bytes(ids) < free else "mapped"
    if where == "mapped":
        return MappedPatches(packed, ids, size, device)
    try:
        return ResidentPatches(packed, ids, size, device)
    except RuntimeError as error:  # torch's out of memory
        raise MemoryError(
            f"the layers of {len(ids)} training glaciers ({packed.size_bytes(ids) / 2**30:.1f} GiB) do not fit the "
            f"memory of {device}: set compute.training_data to 'mapped'"
        ) from error


def _masks(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target, valid = ((bits & Packed.bit(name)).ne(0)[:, None].float() for name in ("any_glacier", "valid"))
    return target, valid


class MappedPatches:
    """Patches cut on the host from the memory-mapped files, page by page as they are needed."""

    kind = "mapped"

    def __init__(self, packed: PackedCubes, ids: Sequence[str], size: int, device: str):
        self._glaciers = [packed.glacier(g) for g in ids]
        self._channels, self._size, self._device = packed.channels, size, torch.device(device)

    def batch(self, chosen: np.ndarray, turns: np.ndarray) -> Batch:
        arrays = cut_batch(self._glaciers, chosen, turns, self._size, self._channels)
        x, bits = (torch.from_numpy(a) for a in arrays)
        if self._device.type == "cuda":  # from pinned memory the copy runs beside the computation
            x, bits = (t.pin_memory().to(self._device, non_blocking=True) for t in (x, bits))
        else:
            x, bits = x.to(self._device), bits.to(self._device)
        return Batch(x, *_masks(bits))


class ResidentPatches:
    """Patches gathered on the device from one flat array of all layers, ragged over glaciers."""

    kind = "resident"

    def __init__(self, packed: PackedCubes, ids: Sequence[str], size: int, device: str):
        self._size, self._n = size, len(packed.channels)
        glaciers = [packed.glacier(g) for g in ids]
        shapes = np.array([layers.bits.shape for layers in glaciers]).reshape(-1, 2)
        starts = np.concatenate([[0], np.cumsum(shapes.prod(axis=1))])
        self._values = torch.empty(int(starts[-1]) * self._n, dtype=torch.int16, device=device)
        self._bits = torch.empty(int(starts[-1]), dtype=torch.uint8, device=device)
        for layers, first, last in zip(glaciers, starts, starts[1:]):  # glacier by glacier: no second copy on the host
            self._values[first * self._n : last * self._n] = torch.from_numpy(np.array(layers.channels).ravel())
            self._bits[first:last] = torch.from_numpy(np.array(layers.bits).ravel())
        self._shapes, self._starts = shapes, starts[:-1]
        # Row and column in the patch that each pixel of a turned patch comes from, as `symmetry` turns them.
        grid = np.arange(size * size).reshape(size, size)
        source = np.stack([symmetry(grid, grid, grid, (), which)[1] for which in range(8)])
        self._source = torch.from_numpy(source.astype(np.int64)).to(device)
        self._channels = packed.channels
        self._vectors = _aspect_turns().to(device)
        self._layers = torch.arange(self._n, device=device)[:, None, None]

    def batch(self, chosen: np.ndarray, turns: np.ndarray) -> Batch:
        size, device = self._size, self._values.device
        numbers = chosen[:, 0]
        shapes = self._shapes[numbers]
        corners = [patch_corner(r, c, (h, w), size) for (_, r, c), (h, w) in zip(chosen, shapes)]
        host = np.column_stack([self._starts[numbers], shapes, corners, turns]).astype(np.int64)
        start, height, width, top, left, turn = torch.from_numpy(host).to(device).T[:, :, None, None]
        place = self._source[turn[:, 0, 0]]
        rows, columns = place // size + top, place % size + left
        inside = (rows < height) & (columns < width)
        pixel = torch.where(inside, rows * width + columns, 0)
        bits = torch.where(inside, self._bits[start + pixel], 0)
        flat = (start * self._n + pixel)[:, None] + (self._layers * (height * width)[:, None])
        x = torch.where(inside[:, None], self._values[flat], int(MISSING)).to(torch.int16)
        if turns.any() and (aspect := aspect_places(self._channels)) is not None:
            east, north = (x[:, k].clone() for k in aspect)
            m = self._vectors[turn[:, 0, 0]][..., None, None]
            flat = (bits & Packed.bit("flat")).ne(0)
            # One of two factors is 0: MISSING, in both or in none, stays itself in 16 bits.
            x[:, aspect[0]] = torch.where(flat, east, m[:, 0, 0] * east + m[:, 0, 1] * north)
            x[:, aspect[1]] = torch.where(flat, north, m[:, 1, 0] * east + m[:, 1, 1] * north)
        return Batch(x, *_masks(bits))


def _aspect_turns() -> torch.Tensor:
    """How the 8 symmetries turn the vector (sin_aspect, cos_aspect): int16 (8, 2, 2)."""
    names = ["sin_aspect", "cos_aspect"]
    pixel = np.zeros((2, 1, 1), dtype=np.int16)
    out = np.zeros((8, 2, 2), dtype=np.int16)
    mask = np.zeros((1, 1), dtype=np.int16)
    for which in range(8):
        for k in range(2):
            unit = pixel.copy()
            unit[k] = 1
            out[which, :, k] = symmetry(unit, mask, mask, names, which)[0][:, 0, 0]
    return torch.from_numpy(out)


def batches(source: PatchSource, pieces: Iterable[tuple[np.ndarray, np.ndarray]], device: str) -> Iterator[Batch]:
    """A batch of each (chosen, turns); for an accelerator the next one is cut while the present one is computed on."""
    if device == "cpu" or source.kind == "resident":
        for chosen, turns in pieces:
            yield source.batch(chosen, turns)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for chosen, turns in pieces:
            following = pool.submit(source.batch, chosen, turns)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
