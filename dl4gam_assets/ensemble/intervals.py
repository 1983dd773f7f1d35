"""The interval of an area: masks by tau, the tau that covers the truth, and the rule that predicts it.

Belongs here: everything about tau (Diaconu et al. 2025, section 7).
Does not belong here: areas for the tables (``change``).

lower mask = mean - std >= 1 - tau, upper mask = mean + std >= tau, tau in [0, 0.5]: a small tau gives a wide interval.
A pixel without a value (NaN: no model reached it, and nothing filled it) may or may not be ice. So it is in no lower
mask and in every upper one, whatever tau is: here, in the search for tau, and in the areas of the tables alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dl4gam_assets.ensemble.conformal import conformal_tau
from dl4gam_assets.settings import CalibrationSettings

FEATURES = ("log_area", "mean_probability", "epistemic_std", "aleatoric_std")
_EPS = 1e-6


def interval_masks(mean: np.ndarray, std: np.ndarray, tau: float, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper mask of a map within ``allowed`` (the 20 m zone without other glaciers).

    Pixels without a value (NaN) are in the upper mask and not in the lower one.

    Raises
    ------
    ValueError
        if tau is outside [0, 0.5].
    """
    if not 0.0 <= tau <= 0.5:
        raise ValueError(f"tau is {tau}, not in [0, 0.5]")
    low, high = _limits(np.float64(tau))
    below, above = _bounds(mean, std)
    return (below >= low) & allowed, (above >= high) & allowed


def _bounds(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean - std and mean + std in float32; -inf and inf where either is unknown: no ice for sure, and maybe ice."""
    m, s = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
    known = np.isfinite(m) & np.isfinite(s)
    with np.errstate(invalid="ignore"):
        below, above = m - s, m + s
    return np.where(known, below, np.float32(-np.inf)), np.where(known, above, np.float32(np.inf))


def _limits(taus: np.ndarray | np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Limits 1 - tau and tau as float32: maps are compared in their own precision, here and in the search for tau."""
    return np.asarray(1.0 - taus, dtype=np.float32), np.asarray(taus, dtype=np.float32)


def interval_areas(
    mean: np.ndarray, std: np.ndarray, allowed: np.ndarray, pixel_km2: float, taus: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper area (km2) for every tau at once: sorted thresholds instead of a mask for each tau."""
    below, above = _limits(np.asarray(taus, dtype=np.float64))
    low, high = (np.sort(bound) for bound in _bounds(mean[allowed], std[allowed]))
    lower = len(low) - np.searchsorted(low, below, side="left")
    upper = len(high) - np.searchsorted(high, above, side="left")
    return lower * pixel_km2, upper * pixel_km2


def largest_covering_tau(
    mean: np.ndarray, std: np.ndarray, allowed: np.ndarray, pixel_km2: float, true_area_km2: float, step: float = 0.001,
    maximum: float = 0.5,
) -> float:  # fmt: skip
    """The largest tau whose interval contains the true area: the narrowest interval that is right.

    0, the widest interval, where none contains it.
    """
    taus = np.linspace(0.0, maximum, round(maximum / step) + 1)
    lower, upper = interval_areas(mean, std, allowed, pixel_km2, taus)
    covers = (lower <= true_area_km2 + 1e-12) & (true_area_km2 <= upper + 1e-12)
    return float(taus[covers].max()) if covers.any() else 0.0


def tau_features(mean: np.ndarray, std: np.ndarray, allowed: np.ndarray, area_km2: float) -> dict[str, float]:
    """What tau is predicted from, over the pixels of ``allowed``: log predicted area, mean probability, square roots of
    the mean variance between members (epistemic) and of the mean p(1 - p) (aleatoric)."""
    p, s = mean[allowed].astype(np.float64), std[allowed].astype(np.float64)
    if not p.size:
        return dict.fromkeys(FEATURES, 0.0) | {"log_area": float(np.log(1e-4))}
    return {
        "log_area": float(np.log(max(area_km2, 1e-4))),
        "mean_probability": float(p.mean()),
        "epistemic_std": float(np.sqrt((s**2).mean())),
        "aleatoric_std": float(np.sqrt((p * (1 - p)).mean())),
    }


@dataclass(frozen=True)
class TauRule:
    """How tau is found for a glacier: logit(tau / 0.5) linear in standardized features, or one regional number.

    ``left_out`` names the glaciers that it was not fitted on because their features or their tau are unknown.
    """

    method: str
    intercept: float
    coefficients: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    maximum: float = 0.5
    left_out: tuple[str, ...] = ()

    def predict(self, features: pd.DataFrame) -> np.ndarray:
        """tau of each row of ``features`` (columns FEATURES), in [0, maximum]; 0, the widest interval, where a feature
        that it needs is unknown."""
        z = np.full(len(features), self.intercept, dtype=np.float64)
        for name in sorted(self.coefficients):  # in a fixed order, so that sums are equal to the last bit
            value = features[name].to_numpy(dtype=np.float64)
            z += self.coefficients[name] * (value - self.means[name]) / self.scales[name]
        share = 1 / (1 + np.exp(-np.clip(z, -30, 30)))
        # The logit of 0 was taken at _EPS; a NaN is not above it either.
        return np.where(share > 1.5 * _EPS, np.minimum(share, 1.0) * self.maximum, 0.0)

    def to_json(self) -> str:
        return json.dumps({k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(self).items()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TauRule:
        found = json.loads(text)
        return cls(**found | {"left_out": tuple(found.get("left_out", ()))})


def fit_tau(features: pd.DataFrame, taus: np.ndarray, settings: CalibrationSettings) -> TauRule:
    """Quantile regression of logit(tau / 0.5) at q = 1 - coverage on the features of the validation glaciers.

    A tau at or below the q-quantile of the covering taus gives an interval that contains the truth in ``coverage`` of
    the cases. With fewer than ``settings.min_glaciers`` glaciers five coefficients follow the few: the rule is then one
    number for all (``regional_quantile``), the covering tau of rank q (n + 1) rounded down
    (:func:`~dl4gam_assets.ensemble.conformal.conformal_tau`). With one or two glaciers there is no such rank: no tau is
    low enough to promise the coverage, and it is 0, the widest interval. The same rule where the regression has no
    solution.

    Parameters
    ----------
    features : DataFrame with the columns FEATURES, one row a glacier, indexed by glacier id
    taus : largest covering tau of each glacier

    Raises
    ------
    ValueError
        if there is no glacier with a tau.
    """
    taus = np.asarray(taus, dtype=np.float64)
    judged = np.isfinite(taus)
    if not judged.any():
        raise ValueError("no validation glacier to fit tau on")
    told = judged & np.isfinite(features[list(FEATURES)].to_numpy(dtype=np.float64)).all(axis=1)
    q = 1.0 - settings.coverage
    if told.sum() >= settings.min_glaciers:
        x = features.loc[told, list(FEATURES)].astype(float)
        means, scales = x.mean(), x.std(ddof=0)
        scales = scales.where(scales > 1e-9, 1.0)
        found = quantile_plane(((x - means) / scales).to_numpy(), _logit(taus[told] / settings.tau_max), q)
        if found is not None:
            weights = dict(zip(FEATURES, map(float, found[1:]), strict=True))
            return TauRule(
                "quantile_regression", float(found[0]), weights, means.to_dict(), scales.to_dict(), settings.tau_max,
                tuple(map(str, features.index[~told])),
            )  # fmt: skip
    regional = conformal_tau(taus[judged], settings.coverage)
    return TauRule(
        "regional_quantile", float(_logit(np.float64(regional / settings.tau_max))), maximum=settings.tau_max,
        left_out=tuple(map(str, features.index[~judged])),
    )  # fmt: skip


def _logit(share: np.ndarray | np.float64) -> np.ndarray:
    clipped = np.clip(share, _EPS, 1 - _EPS)
    return np.asarray(np.log(clipped / (1 - clipped)))


def left_out_taus(features: pd.DataFrame, taus: np.ndarray, settings: CalibrationSettings) -> np.ndarray:
    """tau of each glacier by the rule that is fitted on all others: what the rule gives to a glacier it has not seen.

    The same kind of rule as :func:`fit_tau` makes of all: one glacier fewer does not turn a regression into a quantile.
    """
    fewer = settings.model_copy(update={"min_glaciers": settings.min_glaciers - 1})
    out = np.zeros(len(taus))
    for k in range(len(taus)):
        others = np.arange(len(taus)) != k
        if np.isfinite(np.asarray(taus, dtype=float)[others]).any():
            rule = fit_tau(features[others], np.asarray(taus)[others], fewer)
            out[k] = rule.predict(features.iloc[[k]])[0]
    return out


def quantile_plane(x: np.ndarray, y: np.ndarray, q: float) -> np.ndarray | None:
    """Coefficients (intercept first) of the plane through the q-quantile of ``y`` (n,) over ``x`` (n, k).

    The exact minimum of the check loss, as a linear program (Koenker and Bassett 1978, doi:10.2307/1913643), solved in
    its dual form by HiGHS: maximize y'a with X'a = (1 - q) X'1 and 0 <= a <= 1; the prices of the equations are the
    coefficients. (Iterated reweighting, the usual way, does not say whether it has arrived.)

    None where the program has no solution, or its price does not meet the loss (the proof that it is the minimum).
    """
    from scipy.optimize import linprog

    design = np.column_stack([np.ones(len(y)), x])
    solved = linprog(-y, A_eq=design.T, b_eq=(1 - q) * design.sum(axis=0), bounds=(0, 1), method="highs")
    if solved.status != 0:
        return None
    plane: np.ndarray = -np.asarray(solved.eqlin.marginals, dtype=np.float64)
    residual = y - design @ plane
    loss = float(np.maximum(q * residual, (q - 1) * residual).sum())
    reached = -float(solved.fun) - (1 - q) * float(y.sum())
    if not np.isfinite(plane).all() or abs(loss - reached) > 1e-6 * (1 + abs(reached)):
        return None
    return plane
