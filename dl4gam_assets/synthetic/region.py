"""The demo region: a range that does not exist, from a seed.

Belongs here: putting the demo together. Does not belong here: the steps themselves, and files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from affine import Affine
from numpy.typing import NDArray
from scipy import ndimage

from dl4gam_assets.synthetic.acquisitions import Acquisition, plan_acquisitions
from dl4gam_assets.synthetic.files import SimulationSummary, World, write_region
from dl4gam_assets.synthetic.ice import divide_ice, grow_ice, mass_balance
from dl4gam_assets.synthetic.illumination import summer_insolation
from dl4gam_assets.synthetic.noise import F32, fractal_noise
from dl4gam_assets.synthetic.retreat import area_loss_rates, debris_cover, melt_order
from dl4gam_assets.synthetic.scenes import Ground
from dl4gam_assets.synthetic.terrain import coarsen, fill_depressions, fractal_terrain, refine

_ORIGIN = (632000.0, 5206000.0)  # upper left corner in UTM zone 32, EPSG:32632
_CRS = "EPSG:32632"
_LONGITUDE, _LATITUDE = 10.83, 46.94
_NAMES = (
    "Alvar", "Brenta", "Corvin", "Drusen", "Elmar", "Ferwall", "Grisol", "Hochalm", "Isel", "Jolin", "Kessel", "Lorein",
    "Marzel", "Nevis", "Orsino", "Palfer", "Quern", "Rofan", "Sulden", "Tarvis", "Umbral", "Vedret", "Wilder", "Zufall",
)  # fmt: skip


def write_demo_region(
    folder: Path,
    *,
    seed: int = 7,
    years: Sequence[int] = tuple(range(2015, 2025)),
    baseline_year: int = 2015,
    size_px: tuple[int, int] = (1200, 1400),
    workers: int = 2,
    progress: Callable[[str], None] | None = None,
) -> SimulationSummary:
    """Write the demo range: inventory, debris outlines, DEM, dh/dt, scenes in a STAC catalog, and the truth apart.

    Parameters
    ----------
    folder : becomes the region's folder; made in a sibling first, so that it is complete or absent
    seed : equal seeds and parameters give equal files
    years : years with scenes and true outlines; none before the baseline
    baseline_year : year of the inventory
    size_px : rows, columns of 10 m; at least 400 x 400 for glaciers to fit
    workers : threads that render scenes
    progress : told what is being done

    Raises
    ------
    ValueError
        if the grid is too small, or a year lies before the baseline.
    FileExistsError
        if the folder holds something else.
    """
    if min(size_px) < 400:
        raise ValueError(f"size_px {size_px} is too small: 400 x 400 at least")
    years = [int(y) for y in years]
    parameters = {
        "kind": "demo",
        "seed": seed,
        "years": years,
        "baseline_year": baseline_year,
        "size_px": list(size_px),
    }

    def make() -> tuple[World, list[Acquisition]]:
        world = build_range(size_px, seed)
        return world, plan_acquisitions(sorted({baseline_year, *years}), np.random.default_rng([seed, 2]))

    return write_region(
        folder,
        parameters,
        make,
        seed=seed,
        years=years,
        baseline_year=baseline_year,
        workers=workers,
        progress=progress,
    )


def build_range(size_px: tuple[int, int], seed: int, *, regional_pct: float = 1.9, cover: float = 0.17) -> World:
    """Terrain, glaciers, debris and rates of the demo range.

    The equilibrium line is set where ice covers about ``cover`` of the grid.
    """
    rng = np.random.default_rng([seed, 0])
    bed, ridge_row = fractal_terrain(size_px, rng)
    surface, thickness, label, ela = _glaciers(bed, rng, cover)
    n = int(label.max())
    area = np.bincount(label.ravel(), minlength=n + 1)[1:] * 1e-4
    rates = area_loss_rates(area, rng, regional_pct=regional_pct)
    streaks = flow_texture(surface, label > 0, rng)
    patches = fractal_noise(size_px, rng, beta=2.6, longest_px=40)
    order = melt_order(label, surface, thickness, patches, pixel_m=10.0)
    debris = debris_cover(label, surface, patches, streaks, rng, pixel_m=10.0)
    water = lakes(surface, label > 0)
    ground = Ground(surface, ela, _LONGITUDE, _LATITUDE, 10.0, debris, water).prepare(label > 0, rng, streaks)
    transform = Affine(10, 0, _ORIGIN[0], 0, -10, _ORIGIN[1])
    rows, cols = zip(*ndimage.center_of_mass(np.ones_like(label), label, np.arange(1, n + 1)), strict=True)
    north = np.array(rows) < ridge_row[np.clip(np.array(cols, int), 0, size_px[1] - 1)]
    big = set(np.argsort(-area)[: len(_NAMES)])
    names = iter(_NAMES)
    glaciers = pd.DataFrame({
        "glacier_id": [f"SYN-01.{k:05d}" for k in range(1, n + 1)],
        "name": [f"{next(names)} Glacier" if k in big else "" for k in range(n)],
        "country": np.where(north, "XN", "XS"),
    })  # fmt: skip
    return World("Demo range", "SYN", transform, _CRS, ground, label, order, rates, glaciers)


def _glaciers(bed: F32, rng: np.random.Generator, cover: float) -> tuple[F32, F32, NDArray[np.int32], float]:
    """Ice surface, thickness and labels at 10 m, and the equilibrium line."""
    bed80, bed40 = coarsen(bed, 8), coarsen(bed, 4)
    wobble = fractal_noise(bed40.shape, rng, beta=2.5, longest_px=30)
    low, high = np.percentile(bed80, [45, 97])
    fit80 = _Climate(bed80, 80.0)
    h80 = np.zeros_like(bed80)
    for _ in range(8):  # bisection on the share of the grid that ice covers
        ela = 0.5 * (low + high)
        h80 = grow_ice(bed80, fit80.at(ela), cell_m=80.0, years=110, fastest=1.2e4)
        if (h80 > 3).mean() > cover:
            low = ela
        else:
            high = ela
    h40 = np.maximum(refine(h80, 2, bed40.shape), 0)
    h40 = grow_ice(bed40, _Climate(bed40, 40.0).at(ela), cell_m=40.0, years=25, thickness=h40, fastest=1.2e4)
    top = refine(ndimage.gaussian_filter(bed40, 0.8) + h40, 4, bed.shape)
    there = refine(h40, 4, bed.shape) > 4
    thickness = np.where(there, np.maximum(top - bed, 0), 0).astype(np.float32)
    ice = thickness > 3
    ice = ndimage.gaussian_filter(ice.astype(np.float32), 1.2) > 0.5
    ice = _fill_small_holes(ice, 60)
    label40 = divide_ice(
        ndimage.gaussian_filter(bed40 + h40, 1.0) + 2.5 * wobble, coarsen(ice.astype(np.float32), 4) > 0.3, cell_m=40.0
    )
    label = _spread_labels(label40, ice, 4)
    label = _drop_small(label, smallest_px=260)
    ice = label > 0
    surface = np.where(ice, np.maximum(bed + thickness, bed), bed).astype(np.float32)
    # Ice is smooth; its edge is not a step.
    smooth = ndimage.gaussian_filter(surface, 2.0)
    weight = ndimage.gaussian_filter(ice.astype(np.float32), 1.5)
    surface = (surface * (1 - weight) + smooth * weight).astype(np.float32)
    return surface, np.where(ice, np.maximum(thickness, 3), 0).astype(np.float32), label, float(ela)


class _Climate:
    """Mass balance on a bed, with none near the edge of the grid: a scene must surround every glacier."""

    def __init__(self, bed: F32, cell_m: float):
        self.cell_m = cell_m
        self.insolation = ndimage.gaussian_filter(summer_insolation(bed, cell_m, _LATITUDE), 120 / cell_m)
        rows, cols = bed.shape
        row = np.minimum(np.arange(rows), np.arange(rows)[::-1])[:, None]
        col = np.minimum(np.arange(cols), np.arange(cols)[::-1])[None, :]
        self.edge = np.minimum(row, col) * cell_m < 800

    def at(self, ela: float) -> Callable[[F32], F32]:
        def balance(surface: F32) -> F32:
            hollow = ndimage.gaussian_filter(surface, 350 / self.cell_m) - surface
            slope = np.hypot(*np.gradient(surface, self.cell_m))
            out = mass_balance(surface, self.insolation, hollow, slope, ela_m=ela)
            out[self.edge] = -7.0
            return out

        return balance


def _fill_small_holes(mask: NDArray[np.bool_], largest_px: int) -> NDArray[np.bool_]:
    holes, count = ndimage.label(~mask)
    size = np.bincount(holes.ravel(), minlength=count + 1)
    filled: NDArray[np.bool_] = mask | ((size < largest_px)[holes] & ~mask)
    return filled


def _spread_labels(coarse: NDArray[np.int32], ice: NDArray[np.bool_], factor: int) -> NDArray[np.int32]:
    """Labels of a coarse grid on a finer mask, with smooth borders; ice without a label near by takes the nearest."""
    shape = ice.shape
    best = np.full(shape, 0.0, np.float32)
    out = np.zeros(shape, np.int32)
    for i, box in enumerate(ndimage.find_objects(coarse), start=1):
        if box is None:
            continue
        big = tuple(slice(max(s.start - 4, 0), min(s.stop + 4, n)) for s, n in zip(box, coarse.shape, strict=True))
        fine = tuple(slice(s.start * factor, min(s.stop * factor, n)) for s, n in zip(big, shape, strict=True))
        size = tuple(s.stop - s.start for s in fine)
        weight = refine(ndimage.gaussian_filter((coarse[big] == i).astype(np.float32), 0.9), factor, (size[0], size[1]))
        better = weight > best[fine] + 1e-4
        best[fine][better] = weight[better]
        out[fine][better] = i
    nearest = ndimage.distance_transform_edt(out == 0, return_distances=False, return_indices=True)
    out = out[tuple(nearest)]
    return np.where(ice, out, 0).astype(np.int32)


def _drop_small(label: NDArray[np.int32], smallest_px: int) -> NDArray[np.int32]:
    """Scraps below the size go; a scrap of one label apart from its main body joins what it touches, or goes."""
    parts = np.zeros_like(label)
    n = 0
    for i, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        piece, count = ndimage.label(label[box] == i)
        parts[box][piece > 0] = piece[piece > 0] + n
        n += count
    size = np.bincount(parts.ravel(), minlength=n + 1)
    for i in np.argsort(size[1:]) + 1:
        if size[i] == 0 or size[i] >= smallest_px:
            continue
        here = parts == i
        where = ndimage.find_objects(here.view(np.uint8))[0]
        box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in where)
        inner = here[box]
        ring = parts[box][ndimage.binary_dilation(inner) & ~inner]
        ring = ring[ring > 0]
        to = int(np.bincount(ring).argmax()) if len(ring) else 0
        parts[here] = to
        size[to] += size[i]
        size[i] = 0
    ids = np.unique(parts)
    ids = ids[ids > 0]
    out: NDArray[np.int32] = np.where(parts > 0, np.searchsorted(ids, parts) + 1, 0).astype(np.int32)
    return out


def flow_texture(surface: F32, ice: NDArray[np.bool_], rng: np.random.Generator, *, steps: int = 14) -> F32:
    """Streaks along the flow: noise averaged up and down a smoothed surface (line integral convolution)."""
    down, right = np.gradient(ndimage.gaussian_filter(surface, 6.0))
    length = np.maximum(np.hypot(down, right), 1e-4)
    vy, vx = (-down / length).astype(np.float32), (-right / length).astype(np.float32)
    noise = fractal_noise(surface.shape, rng, beta=1.0, longest_px=12)
    total = noise.copy()
    rows, cols = np.nonzero(ndimage.binary_dilation(ice, iterations=3))
    value = noise[rows, cols].copy()
    for sign in (1.0, -1.0):
        y, x = rows.astype(np.float32), cols.astype(np.float32)
        for _ in range(steps):
            iy = np.clip(np.rint(y), 0, surface.shape[0] - 1).astype(np.intp)
            ix = np.clip(np.rint(x), 0, surface.shape[1] - 1).astype(np.intp)
            y = y + sign * 1.4 * vy[iy, ix]
            x = x + sign * 1.4 * vx[iy, ix]
            iy = np.clip(np.rint(y), 0, surface.shape[0] - 1).astype(np.intp)
            ix = np.clip(np.rint(x), 0, surface.shape[1] - 1).astype(np.intp)
            value += noise[iy, ix]
    total[rows, cols] = value / max(float(value.std()), 1e-6)
    return total


def lakes(surface: F32, ice: NDArray[np.bool_], *, deepest_share: float = 0.35) -> NDArray[np.bool_]:
    """Water in closed hollows without ice, from 0.4 to 25 ha."""
    coarse = coarsen(surface, 4)
    level = refine(fill_depressions(coarse, slope=0.0), 4, surface.shape)
    depth = level - surface
    wet = ndimage.binary_opening((depth > 2.0) & ~ndimage.binary_dilation(ice, iterations=2), iterations=2)
    parts, count = ndimage.label(wet)
    size = np.bincount(parts.ravel(), minlength=count + 1)
    keep = (size >= 40) & (size <= 2500)
    keep[0] = False
    out: NDArray[np.bool_] = keep[parts]
    return out
