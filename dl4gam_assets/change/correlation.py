"""Errors that glaciers share: the standard deviation of a sum over glaciers.

Belongs here: models of the correlation of errors between glaciers. Does not belong here: what is summed (``regional``).
Source: Diaconu et al. 2025, doi:10.1029/2025EA004197, add deviations linearly (fully dependent errors). Where this goes
beyond the paper: any correlation in between, and one that decays with distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

EARTH_RADIUS_KM = 6371.0
#: Up to this many glaciers every pair is taken by itself; beyond it, glaciers of one cell stand in one place.
MAX_EXACT = 3000
#: Side of such a cell, as a share of the correlation length: within it the correlation is at least exp(-0.17) = 0.84.
CELL_SHARE = 0.1


@dataclass(frozen=True)
class ErrorCorrelation:
    """Correlation of the errors of two different glaciers.

    ``rho`` everywhere, or ``rho exp(-d / length_km)`` at the great-circle distance d where ``length_km`` is given.
    ``rho`` 1 without a length is the published choice (deviations add linearly), 0 means independent errors (they add
    in quadrature). With a length, ``1 - rho`` is the share of the error's variance that no neighbour shares.
    """

    rho: float = 1.0
    length_km: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.rho <= 1.0:
            raise ValueError(f"correlation is {self.rho}, outside [0, 1]")
        if self.length_km is not None and not self.length_km > 0:
            raise ValueError(f"the correlation length is {self.length_km} km; it must be positive")

    def std_of_sum(self, std: np.ndarray, lon: np.ndarray | None = None, lat: np.ndarray | None = None) -> float:
        """Standard deviation of the sum of terms with the deviations ``std`` (n,).

        ``var = (1 - rho) sum s_i^2 + rho sum_ij s_i s_j c_ij`` with c = 1, or ``exp(-d_ij / length_km)``.

        Parameters
        ----------
        lon, lat : arrays (n,) in degrees, needed with a length. Beyond 3,000 glaciers, those within a tenth of the
            length of each other are taken to be in one place, which makes the deviation at most a few percent larger.

        Raises
        ------
        ValueError
            if positions are needed and absent.
        """
        std = np.asarray(std, dtype=float)
        own = float((std**2).sum())
        if self.rho == 0.0 or not len(std):
            return float(np.sqrt(own))
        if self.length_km is None:
            shared = float(std.sum()) ** 2
        else:
            if lon is None or lat is None:
                raise ValueError("a correlation that decays with distance needs the glaciers' positions")
            shared = _decaying(std, np.asarray(lon, dtype=float), np.asarray(lat, dtype=float), self.length_km)
        return float(np.sqrt((1.0 - self.rho) * own + self.rho * shared))


def _decaying(std: np.ndarray, lon: np.ndarray, lat: np.ndarray, length_km: float) -> float:
    """Sum over all pairs of ``s_i s_j exp(-d_ij / length_km)``, in blocks of rows."""
    if not np.isfinite(std).all():
        return float("nan")
    a, b = np.deg2rad(lon), np.deg2rad(lat)
    unit = np.stack([np.cos(b) * np.cos(a), np.cos(b) * np.sin(a), np.sin(b)], axis=1)
    if len(std) > MAX_EXACT:
        cells = np.round(unit * EARTH_RADIUS_KM / (CELL_SHARE * length_km)).astype(np.int64)
        _, where = np.unique(cells, axis=0, return_inverse=True)
        where = where.reshape(-1)
        total = np.bincount(where, weights=std)
        centre = np.stack([np.bincount(where, weights=unit[:, k]) for k in range(3)], axis=1)
        unit, std = centre / np.linalg.norm(centre, axis=1, keepdims=True), total
    out = 0.0
    for first in range(0, len(std), 2000):
        some = slice(first, first + 2000)
        distance = 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(cdist(unit[some], unit) / 2, 1.0))
        out += float(std[some] @ (np.exp(-distance / length_km) @ std))
    return out
