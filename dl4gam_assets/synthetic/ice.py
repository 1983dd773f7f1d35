"""Glaciers on a bed: mass balance, flow, divides.

Belongs here: where ice lies and which glacier it belongs to. Does not belong here: its change in time (``retreat``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dl4gam_assets.synthetic.noise import F32
from dl4gam_assets.synthetic.terrain import drainage, fill_depressions

#: Flow of temperate ice: 2 A (rho g)^3 / 5 with A = 2.4e-24 s-1 Pa-3 (Cuffey & Paterson 2010), per year and m4.
_FLOW = 2.0 / 5.0 * 2.4e-24 * 3.156e7 * (900.0 * 9.81) ** 3


def mass_balance(surface: F32, insolation: F32, concavity: F32, slope: F32, *, ela_m: float) -> F32:
    """Climatic mass balance in m ice a year.

    A gradient of 0.007 a year below and half of it above the equilibrium line, at most 1.1 m a year. The equilibrium
    line is lower where the sun is weak and where drift and avalanches gather snow (``concavity``, metres that the
    surroundings stand higher), and steep walls hold no snow.
    """
    line = ela_m + 420.0 * (insolation - 0.92) - 1.6 * np.clip(concavity, -90, 110)
    above = surface - line
    balance = np.where(above > 0, 0.0042 * above, 0.007 * above)
    bare = np.clip((slope - 0.72) / 0.3, 0, 1)
    out: F32 = np.clip(balance, -7.0, 1.1).astype(np.float32) * (1 - bare) - 1.2 * bare
    return out


def grow_ice(
    bed: F32,
    balance_of: Callable[[F32], F32],
    *,
    cell_m: float,
    years: float,
    thickness: F32 | None = None,
    fastest: float = 1.0e4,
) -> F32:
    """Ice thickness (m) after ``years`` of the shallow-ice approximation with sliding, explicit in time.

    Parameters
    ----------
    bed : (H, W) metres
    balance_of : function of the ice surface (H, W) giving the balance in m a year
    cell_m : cell size
    thickness : start; none by default
    fastest : limit of the diffusivity, m2 a year; sets the time step (stability: 4 D dt < dx2)
    """
    h = np.zeros(bed.shape, np.float32) if thickness is None else thickness.astype(np.float32).copy()
    dt = 0.21 * cell_m**2 / fastest
    steps = int(years / dt)
    flow, slide = np.float32(8.0 * _FLOW), np.float32(1.5e-3)
    balance = balance_of(bed + h)
    for step in range(steps):
        if step % max(1, int(4.0 / dt)) == 0:
            balance = balance_of(bed + h)
        s = bed + h
        # Staggered corners (Mahaffy 1976): thickness and slope between four cells.
        corner = 0.25 * (h[:-1, :-1] + h[1:, :-1] + h[:-1, 1:] + h[1:, 1:])
        right, down = np.diff(s, axis=1), np.diff(s, axis=0)
        gx = 0.5 * (right[:-1] + right[1:]) / np.float32(cell_m)
        gy = 0.5 * (down[:, :-1] + down[:, 1:]) / np.float32(cell_m)
        h2 = corner * corner
        gradient2 = np.minimum(gx * gx + gy * gy, 0.5)
        conductance = (flow * h2 + 6.0 * slide * np.sqrt(corner + 1e-6)) * h2 * corner
        d = np.minimum(conductance * gradient2, np.float32(fastest))
        fx = 0.5 * (d[:-1] + d[1:]) * right[1:-1]
        fy = 0.5 * (d[:, :-1] + d[:, 1:]) * down[:, 1:-1]
        # No flux out of a cell without ice.
        fx = np.where(right[1:-1] > 0, np.where(h[1:-1, 1:] > 0, fx, 0), np.where(h[1:-1, :-1] > 0, fx, 0))
        fy = np.where(down[:, 1:-1] > 0, np.where(h[1:, 1:-1] > 0, fy, 0), np.where(h[:-1, 1:-1] > 0, fy, 0))
        change = np.zeros_like(h)
        change[1:-1, 1:-1] = (np.diff(fx, axis=1) + np.diff(fy, axis=0)) / np.float32(cell_m**2)
        h = np.maximum(h + np.float32(dt) * (change + balance), 0)
    out: F32 = h
    return out


def divide_ice(
    surface: F32, ice: NDArray[np.bool_], *, cell_m: float, reach_m: float = 320.0, smallest_km2: float = 0.09
) -> NDArray[np.int32]:
    """Glaciers from an ice mask: ice that leaves by the same way is one glacier (after Kienholz et al. 2013,
    doi:10.3189/2013JoG12J138).

    Every ice cell is followed downhill until ``reach_m`` beyond the ice; exits closer together than that are one way
    out. Pieces below ``smallest_km2`` that touch a larger glacier join the one they share most border with.

    Returns
    -------
    int32 (H, W), 0 where there is no ice, glaciers from 1.
    """
    filled = fill_depressions(surface)
    flow = drainage(filled)
    near = (ndimage.distance_transform_edt(~ice) * cell_m <= reach_m).ravel()
    # The first cell outside ``near`` on each path; an outlet inside keeps itself. Levels go up from the outlets.
    exit_of = np.arange(surface.size)
    for level in range(1, len(flow.starts) - 1):
        cells = flow.order[flow.starts[level] : flow.starts[level + 1]]
        inside = cells[near[cells]]
        exit_of[inside] = exit_of[flow.receiver[inside]]
    exits = np.zeros(surface.size, bool)
    exits[np.unique(exit_of[ice.ravel()])] = True
    grown = ndimage.distance_transform_edt(~exits.reshape(surface.shape)) * cell_m <= reach_m * 0.5
    ways, _ = ndimage.label(grown, structure=np.ones((3, 3)))
    label = np.where(ice, ways.ravel()[exit_of].reshape(surface.shape), 0).astype(np.int32)
    label = _smooth_labels(label, ice)
    return _merge_small(label, cell_m, smallest_km2)


def _smooth_labels(label: NDArray[np.int32], ice: NDArray[np.bool_]) -> NDArray[np.int32]:
    ids = [i for i in np.unique(label) if i]
    best = np.zeros(label.shape, np.float32)
    out = np.zeros_like(label)
    for i, where in zip(ids, [ndimage.find_objects(label)[k - 1] for k in ids], strict=True):
        box = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in where)
        weight = ndimage.gaussian_filter((label[box] == i).astype(np.float32), 1.5)
        better = weight > best[box]
        best[box][better] = weight[better]
        out[box][better] = i
    return np.where(ice, out, 0).astype(np.int32)


def _merge_small(label: NDArray[np.int32], cell_m: float, smallest_km2: float) -> NDArray[np.int32]:
    # Parts of one label that do not touch are glaciers of their own.
    parts = np.zeros_like(label)
    n = 0
    for i, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        piece, count = ndimage.label(label[box] == i)
        parts[box][piece > 0] = piece[piece > 0] + n
        n += count
    while True:
        size = np.bincount(parts.ravel(), minlength=n + 1) * cell_m**2 / 1e6
        pairs = np.concatenate([
            np.stack([parts[:, 1:].ravel(), parts[:, :-1].ravel()], 1),
            np.stack([parts[1:].ravel(), parts[:-1].ravel()], 1),
        ])  # fmt: skip
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs > 0).all(axis=1)]
        if not len(pairs):
            break
        pairs = np.sort(pairs, axis=1)
        keys, border = np.unique(pairs, axis=0, return_counts=True)
        touching = np.unique(keys)
        small = [i for i in touching[np.argsort(size[touching])] if size[i] < smallest_km2]
        if not small:
            break
        i = small[0]
        rows = (keys == i).any(axis=1)
        other = keys[rows][np.argmax(border[rows])]
        parts[parts == i] = other[0] if other[1] == i else other[1]
    ids = np.unique(parts)
    return np.searchsorted(ids[ids > 0], parts, side="right").astype(np.int32) * (parts > 0)
