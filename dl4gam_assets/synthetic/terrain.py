"""A mountain range from noise by uplift and stream-power erosion, and the routing of flow on any surface.

Belongs here: surfaces and drainage. Does not belong here: ice.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dl4gam_assets.synthetic.noise import F32, fractal_noise

_STEPS = [(dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (dr, dc) != (0, 0)]


class Drainage(NamedTuple):
    """Steepest-descent drainage of a grid, flat indices."""

    receiver: NDArray[np.int64]  # cell that a cell drains to; itself at an outlet or pit
    distance: F32  # in cells: 1 or sqrt(2)
    order: NDArray[np.int64]  # cells from the outlets upwards
    starts: NDArray[np.int64]  # first position in ``order`` of each level


def drainage(surface: NDArray[np.floating], outlets: NDArray[np.bool_] | None = None) -> Drainage:
    """Receiver of every cell among its eight neighbours, and an order in which a cell comes after its receiver.

    Parameters
    ----------
    surface : (H, W) elevation; need not be free of pits (a pit is its own receiver)
    outlets : (H, W) cells that drain to themselves
    """
    rows, cols = surface.shape
    padded = np.pad(surface.astype(np.float32), 1, constant_values=np.inf)
    best = np.zeros((rows, cols), np.float32)
    pick = np.full((rows, cols), -1, np.int8)
    for k, (dr, dc) in enumerate(_STEPS):
        drop = (surface - padded[1 + dr : 1 + dr + rows, 1 + dc : 1 + dc + cols]) / np.float32(math.hypot(dr, dc))
        better = drop > best
        best[better] = drop[better]
        pick[better] = k
    if outlets is not None:
        pick[outlets] = -1
    offset = np.array([dr * cols + dc for dr, dc in _STEPS] + [0])
    length = np.array([math.hypot(*s) for s in _STEPS] + [1.0], np.float32)
    flat = pick.ravel()
    receiver = np.arange(rows * cols) + offset[flat]
    # Depth of each cell below its outlet by pointer doubling: log2(longest path) passes over the grid.
    depth = (flat >= 0).astype(np.int32)
    jump = receiver.copy()
    while True:
        add = depth[jump]
        if not add.any():
            break
        depth += add
        jump = jump[jump]
    order = np.argsort(depth, kind="stable")
    starts = np.searchsorted(depth[order], np.arange(int(depth.max()) + 2))
    return Drainage(receiver, length[flat], order, starts)


def accumulate(flow: Drainage, source: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sum of ``source`` (flat) over everything upstream of each cell, the cell included."""
    total = source.astype(np.float64).copy()
    for level in range(len(flow.starts) - 2, 0, -1):
        cells = flow.order[flow.starts[level] : flow.starts[level + 1]]
        np.add.at(total, flow.receiver[cells], total[cells])
    return total


def erode(
    surface: F32,
    uplift: F32,
    *,
    cell_m: float,
    steps: int,
    erodibility: float,
    exponent: float = 0.45,
    hillslope: float = 0.04,
    outlets: NDArray[np.bool_],
    steepest: float = 1.1,
) -> F32:
    """Stream-power erosion ``dz/dt = U - K A^m S`` with hillslope creep, implicit in time (Braun & Willett 2013,
    doi:10.1016/j.geomorph.2012.10.008).

    Parameters
    ----------
    surface : (H, W) elevation in metres
    uplift : (H, W) metres a step
    erodibility : K times the length of a step; A is in m2
    hillslope : share of the Laplacian added in each step
    outlets : (H, W) cells whose elevation is fixed
    steepest : largest slope (tangent) towards the receiver; steeper ground falls
    """
    z = surface.astype(np.float64).copy()
    area = np.full(z.size, cell_m**2)
    free = ~outlets
    for _ in range(steps):
        # A pit rises to its lowest neighbour, so that water gets out.
        lowest = ndimage.minimum_filter(z, footprint=np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]), mode="nearest")
        pits = (z <= lowest) & free
        z[pits] = lowest[pits] + 0.01
        flow = drainage(z, outlets)
        upstream = accumulate(flow, area)
        z[free] += uplift[free]
        flat = z.ravel()
        length = flow.distance.astype(np.float64) * cell_m
        factor = erodibility * upstream**exponent / length
        for level in range(1, len(flow.starts) - 1):
            cells = flow.order[flow.starts[level] : flow.starts[level + 1]]
            below = flat[flow.receiver[cells]]
            new = (flat[cells] + factor[cells] * below) / (1.0 + factor[cells])
            flat[cells] = np.minimum(new, below + steepest * length[cells])
        z = flat.reshape(surface.shape)
        if hillslope:
            creep = hillslope * ndimage.laplace(z, mode="nearest")
            z[free] += creep[free]
    return z.astype(np.float32)


def fill_depressions(surface: F32, slope: float = 0.01) -> F32:
    """Surface without pits: every cell drains to the edge (priority flood, Barnes et al. 2014,
    doi:10.1016/j.cageo.2013.04.024). ``slope`` is the fall given to flats, metres a cell."""
    rows, cols = surface.shape
    out = surface.astype(np.float64).copy()
    done = np.zeros(rows * cols, bool)
    flat = out.ravel()
    edge = np.zeros((rows, cols), bool)
    edge[[0, -1], :] = True
    edge[:, [0, -1]] = True
    heap = [(float(flat[i]), int(i)) for i in np.flatnonzero(edge)]
    done[np.flatnonzero(edge)] = True
    heapq.heapify(heap)
    while heap:
        level, i = heapq.heappop(heap)
        r, c = divmod(i, cols)
        for dr, dc in _STEPS:
            rr, cc = r + dr, c + dc
            if 0 <= rr < rows and 0 <= cc < cols:
                j = rr * cols + cc
                if not done[j]:
                    done[j] = True
                    if flat[j] < level + slope:
                        flat[j] = level + slope
                    heapq.heappush(heap, (float(flat[j]), j))
    return out.astype(np.float32)


def refine(surface: F32, factor: int, shape: tuple[int, int]) -> F32:
    """Cubic interpolation to a grid ``factor`` times finer; cells of both grids share their outer corner."""
    rows = (np.arange(shape[0], dtype=np.float32) + 0.5) / factor - 0.5
    cols = (np.arange(shape[1], dtype=np.float32) + 0.5) / factor - 0.5
    coefficients = ndimage.spline_filter(surface, order=3, mode="nearest", output=np.float32)
    # Separable: interpolating along rows, then along columns, would need two passes; one call is simpler and exact.
    grid = np.meshgrid(rows, cols, indexing="ij", copy=False)
    out: F32 = ndimage.map_coordinates(coefficients, grid, order=3, mode="nearest", prefilter=False, output=np.float32)
    return out


def coarsen(field: NDArray[np.floating], factor: int) -> F32:
    """Mean of blocks of ``factor`` x ``factor`` cells; an incomplete edge is completed by its last value."""
    rows, cols = field.shape
    field = np.pad(field, ((0, -rows % factor), (0, -cols % factor)), mode="edge")
    blocks = field.reshape(field.shape[0] // factor, factor, field.shape[1] // factor, factor)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def fractal_terrain(
    shape: tuple[int, int], rng: np.random.Generator, *, lowest_m: float = 1450.0, highest_m: float = 3650.0
) -> tuple[F32, F32]:
    """An alpine range across the grid, valleys draining to the north and south.

    Parameters
    ----------
    shape : rows, columns of 10 m
    lowest_m, highest_m : elevation of the lowest valley and of the highest summit

    Returns
    -------
    bed : float32 (H, W) elevation in metres at 10 m
    ridge_row : float32 (W,) row of the main ridge in each column
    """
    # The fixed outlets lie outside: the edge of a model is not a landscape.
    cut, wanted = 80, shape
    shape = (shape[0] + 2 * cut, shape[1] + 2 * cut)
    coarse = (math.ceil(shape[0] / 8), math.ceil(shape[1] / 8))
    row = np.arange(coarse[0], dtype=np.float32)[:, None]
    col = np.arange(coarse[1], dtype=np.float32)[None, :]
    wiggle = fractal_noise((1, coarse[1]), rng, beta=2.6, longest_px=90)[0]
    crest = coarse[0] * 0.5 + coarse[0] * 0.07 * wiggle
    away = np.abs(row - crest[None, :]) / coarse[0]
    ends = np.minimum(col, coarse[1] - 1 - col) / coarse[1]
    uplift = np.exp(-((away / 0.30) ** 2)) * (0.45 + 0.55 * np.clip(ends / 0.22, 0, 1)) + 0.06
    uplift = uplift * np.exp(0.22 * fractal_noise(coarse, rng, beta=3.0, longest_px=40))
    start = 190.0 * fractal_noise(coarse, rng, beta=2.6, longest_px=26) + 380.0 * np.exp(-((away / 0.25) ** 2)) + 200.0
    outlets = np.zeros(coarse, bool)
    outlets[[0, -1], :] = True
    start[outlets] = 0.0
    z = erode(
        start.astype(np.float32),
        (11.0 * uplift).astype(np.float32),
        cell_m=80.0,
        steps=120,
        erodibility=0.03,
        outlets=outlets,
        hillslope=0.02,
        steepest=0.7,
    )
    # Ice has widened the valleys: the more a cell drains, the more its surroundings are levelled out.
    upstream = accumulate(drainage(z, outlets), np.full(z.size, 0.0064)).reshape(coarse)
    trunk = ndimage.gaussian_filter((upstream > 0.3).astype(np.float32), 1.8)
    weight = np.clip(2.2 * trunk, 0, 1)
    z = z + weight * (ndimage.gaussian_filter(z, 2.2) - z) * 0.85
    z = 0.75 * z + 0.25 * ndimage.gaussian_filter(z, 1.0)
    # Cirques have eaten into the crests from both sides: crests stand out sharp above the basins.
    z = z + 0.5 * np.clip(z - ndimage.gaussian_filter(z, 4.0), 0, None)
    low, high = np.percentile(z, 1), z.max()
    z = lowest_m + (z - low) * (highest_m - lowest_m) / (high - low)

    # Gullies and spurs: a short second erosion at 40 m on roughened ground.
    finer = (math.ceil(shape[0] / 4), math.ceil(shape[1] / 4))
    z = refine(z.astype(np.float32), 2, finer)
    steep = np.hypot(*np.gradient(z, 40.0))
    z = z + np.clip(steep - 0.12, 0.05, 0.8) * 24.0 * fractal_noise(finer, rng, beta=2.8, longest_px=24)
    outlets = np.zeros(finer, bool)
    outlets[[0, -1], :] = True
    z = erode(
        z.astype(np.float32),
        np.full(finer, 0.6, np.float32),
        cell_m=40.0,
        steps=8,
        erodibility=0.006,
        outlets=outlets,
        hillslope=0.03,
        steepest=1.0,
    )
    bed = refine(z, 4, shape)
    steep = ndimage.gaussian_filter(np.hypot(*np.gradient(bed, 10.0)), 3)
    bed += np.clip(steep - 0.15, 0.04, 0.8) * (
        2.5 * fractal_noise(shape, rng, beta=2.6, longest_px=14)
        + 8.0 * np.abs(fractal_noise(shape, rng, beta=3.0, longest_px=40))
    )
    ridge_row = np.interp(np.arange(shape[1]), np.arange(coarse[1]) * 8 + 3.5, crest * 8 + 3.5)
    inner = bed[cut : cut + wanted[0], cut : cut + wanted[1]]
    return np.ascontiguousarray(inner, np.float32), (ridge_row[cut : cut + wanted[1]] - cut).astype(np.float32)
