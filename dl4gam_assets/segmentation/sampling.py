"""Patches: where they lie, which a member draws, and how they become a batch.

Belongs here: patch centres, draws, cutting, symmetries. Does not belong here: the loop (``training``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from dl4gam_assets.segmentation.normalization import affine
from dl4gam_assets.segmentation.packing import MISSING, Packed, PackedCubes
from dl4gam_assets.settings import TrainingSettings


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
        picks = [((inside - inside.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        if extremes:
            picks += [inside[:, 0].argmin(), inside[:, 0].argmax(), inside[:, 1].argmin(), inside[:, 1].argmax()]
        found.append(inside[picks])
    return np.unique(np.concatenate(found), axis=0)


def patch_corner(row: int, col: int, shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Top row and left column of a patch around a centre, moved inside the grid where it reaches over the edge."""
    height, width = shape
    return (
        min(max(int(row) - size // 2, 0), max(height - size, 0)),
        min(max(int(col) - size // 2, 0), max(width - size, 0)),
    )


def patch_cover(centres: np.ndarray, shape: tuple[int, int], size: int) -> np.ndarray:
    """How many patches of ``size`` pixels around ``centres`` (int (N, 2)) cover each pixel of a grid: int32 (H, W)."""
    height, width = shape
    change = np.zeros((height + 1, width + 1), dtype=np.int32)
    for row, col in centres:
        top, left = patch_corner(row, col, shape, size)
        bottom, right = min(top + size, height), min(left + size, width)
        change[top, left] += 1
        change[bottom, left] -= 1
        change[top, right] -= 1
        change[bottom, right] += 1
    cover: np.ndarray = change.cumsum(axis=0).cumsum(axis=1)[:height, :width]
    return cover


def draw_patches(packed: PackedCubes, ids: Sequence[str], training: TrainingSettings, seed: int) -> np.ndarray:
    """Patches of a member: int array (N, 3) of glacier number (in ``ids``), row and column of the centre.

    One random centre of each glacier, then uniformly from all others until ``train_patches``; where there are fewer
    centres than that, all of them, and with more glaciers than that, one of each.

    With ``diversity: bootstrap`` as many glaciers as there are, drawn with replacement, take the place of the glaciers:
    one that was drawn twice counts twice, and about 37 % of them are left out of this member.
    """
    rng = np.random.default_rng([seed, 0])
    centres = []
    for number, glacier_id in enumerate(ids):
        layers = packed.glacier(glacier_id)
        found = patch_centres(layers.zone, layers.glacier, training.train_step_px, extremes=True)
        if len(found):
            centres.append(np.column_stack([np.full(len(found), number), found]))
    if training.diversity == "bootstrap" and centres:
        centres = [centres[k] for k in np.sort(rng.integers(len(centres), size=len(centres)))]
    everything = np.concatenate(centres) if centres else np.empty((0, 3), dtype=int)
    starts = np.cumsum([0, *[len(c) for c in centres]])
    must = [int(starts[i] + rng.integers(len(c))) for i, c in enumerate(centres)]
    rest = np.setdiff1d(np.arange(len(everything)), must)
    more = rng.permutation(rest)[: max(training.train_patches - len(must), 0)]
    picked: np.ndarray = everything[np.concatenate([must, more]).astype(int)]
    return picked


@dataclass(frozen=True)
class Normalizer:
    """Packed integers to what a network sees, on any device: the same as ``normalize`` of the raw channels."""

    steps: torch.Tensor
    shift: torch.Tensor
    scale: torch.Tensor
    fill: torch.Tensor

    @classmethod
    def of(cls, packed: PackedCubes, statistics: pd.DataFrame, device: str) -> Normalizer:
        columns = (packed.steps, *affine(packed.channels, statistics))
        return cls(*(torch.from_numpy(c).to(device)[:, None, None] for c in columns))

    def __call__(self, digits: torch.Tensor) -> torch.Tensor:
        """float32 (..., C, H, W) from int16, without NaN."""
        values = (digits.to(torch.float32) * self.steps - self.shift) / self.scale
        return torch.where(digits == int(MISSING), self.fill, values)


def cut_batch(
    glaciers: Sequence[Packed], chosen: np.ndarray, turns: np.ndarray, size: int, channels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of ``size`` pixels around the centres ``chosen`` (see :func:`draw_patches`), each in one of the 8
    symmetries ``turns`` (see :func:`symmetry`).

    A patch over the edge of a grid is moved inside; a grid smaller than a patch is padded with invalid pixels.

    Returns
    -------
    channels int16 (B, C, P, P), ``MISSING`` where missing, and mask bits uint8 (B, P, P)
    """
    x = np.full((len(chosen), len(channels), size, size), MISSING, dtype=np.int16)
    bits = np.zeros((len(chosen), size, size), dtype=np.uint8)
    for k, (number, row, col) in enumerate(chosen):
        layers = glaciers[number]
        top, left = patch_corner(row, col, layers.bits.shape, size)
        cut = layers.window(slice(top, top + size), slice(left, left + size))
        a, b = cut.bits.shape
        x[k, :, :a, :b], bits[k, :a, :b] = cut.channels, cut.bits
        if turns[k]:
            flat = (bits[k] & np.uint8(Packed.bit("flat"))) != 0
            x[k], bits[k], _ = symmetry(x[k], bits[k], bits[k], channels, int(turns[k]), flat)
    return x, bits


def symmetry(
    patch: np.ndarray,
    target: np.ndarray,
    valid: np.ndarray,
    channels: Sequence[str],
    which: int,
    flat: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One of the 8 symmetries of the square (0: none). The aspect turns with the picture; slope, curvatures,
    ruggedness and dh/dt (metres up or down a year) are scalars.

    Sine and cosine of the aspect are the eastward and northward part of a unit vector (aspect clockwise from north).
    Flat ground (``flat``, bool (H, W)) faces nowhere: its aspect is 0 by convention before and after. Works on floats
    and on packed integers (``MISSING`` is its own negative in 16 bits).

    Raises
    ------
    ValueError
        if the channels hold one part of the aspect without the other.
    """
    flip, turns = which >= 4, which % 4
    masks = [target, valid] + ([] if flat is None else [flat])
    if flip:  # left to right: east becomes west
        patch, *masks = (a[..., ::-1] for a in (patch, *masks))
    if turns:  # counter-clockwise by quarter turns
        patch, *masks = (np.rot90(a, turns, axes=(-2, -1)) for a in (patch, *masks))
    if which and (places := aspect_places(channels)) is not None:
        east, north = places
        patch = patch.copy()
        e, n = patch[east].copy(), patch[north].copy()
        if flip:
            e = -e
        for _ in range(turns):
            e, n = -n, e
        turned = True if flat is None else ~masks[2]
        np.copyto(patch[east], e, where=turned)
        np.copyto(patch[north], n, where=turned)
    return patch, masks[0], masks[1]


def aspect_places(channels: Sequence[str]) -> tuple[int, int] | None:
    """Where sine and cosine of the aspect lie among the channels; None where neither does.

    Raises
    ------
    ValueError
        if there is one without the other, which can not be turned.
    """
    places = [list(channels).index(name) for name in ("sin_aspect", "cos_aspect") if name in channels]
    if len(places) == 1:
        raise ValueError("augmentation turns the aspect, which needs both sin_aspect and cos_aspect")
    return (places[0], places[1]) if places else None
