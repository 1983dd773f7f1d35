"""The interval of an area: masks by tau, the tau that covers the truth, and the rule that predicts it.

Belongs here: everything about tau (Diaconu et al. 2025, section 7).
Does not belong here: areas for the tables (``change``).

lower mask = mean - std >= 1 - tau, upper mask = mean + std >= tau, tau in [0, 0.5]: a small tau gives a wide interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dl4gam_assets.settings import CalibrationSettings

FEATURES = ("log_area", "mean_probability", "epistemic_std", "aleatoric_std")
_EPS = 1e-6


def interval_masks(mean: np.ndarray, std: np.ndarray, tau: float, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper mask of a map within ``allowed`` (the 20 m zone without other glaciers).

    Raises
    ------
    ValueError
        if tau is outside [0, 0.5].
    """
    if not 0.0 <= tau <= 0.5:
        raise ValueError(f"tau is {tau}, not in [0, 0.5]")
    low, high = _limits(np.float64(tau))
    return (_bound(mean, -std) >= low) & allowed, (_bound(mean, std) >= high) & allowed


def _bound(mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    total: np.ndarray = np.asarray(mean, dtype=np.float32) + np.asarray(spread, dtype=np.float32)
    return total


def _limits(taus: np.ndarray | np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Limits 1 - tau and tau as float32: maps are compared in their own precision, here and in the search for tau."""
    return np.asarray(1.0 - taus, dtype=np.float32), np.asarray(taus, dtype=np.float32)


def interval_areas(
    mean: np.ndarray, std: np.ndarray, allowed: np.ndarray, pixel_km2: float, taus: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper area (km2) for every tau at once: sorted thresholds instead of a mask for each tau."""
    below, above = _limits(np.asarray(taus, dtype=np.float64))
    low, high = np.sort(_bound(mean, -std)[allowed]), np.sort(_bound(mean, std)[allowed])
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
    """How tau is found for a glacier: logit(tau / 0.5) linear in standardized features, or one regional number."""

    method: str
    intercept: float
    coefficients: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    maximum: float = 0.5

    def predict(self, features: pd.DataFrame) -> np.ndarray:
        """tau of each row of ``features`` (columns FEATURES), in [0, maximum]."""
        z = np.full(len(features), self.intercept, dtype=np.float64)
        for name in sorted(self.coefficients):  # in a fixed order, so that sums are equal to the last bit
            value = features[name].to_numpy(dtype=np.float64)
            z += self.coefficients[name] * (value - self.means[name]) / self.scales[name]
        tau = self.maximum / (1 + np.exp(-np.clip(z, -30, 30)))
        return np.clip(tau, 0.0, self.maximum)

    def to_json(self) -> str:
        return json.dumps({k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(self).items()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TauRule:
        return cls(**json.loads(text))


def fit_tau(features: pd.DataFrame, taus: np.ndarray, settings: CalibrationSettings) -> TauRule:
    """Quantile regression of logit(tau / 0.5) at q = 1 - coverage on the features of the validation glaciers.

    A tau at or below the q-quantile of the covering taus gives an interval that contains the truth in ``coverage`` of
    the cases. With fewer than ``settings.min_glaciers`` glaciers four coefficients can not be fitted: the rule is then
    the plain q-quantile (``regional_quantile``), found by the rank q (n + 1) rounded down, at least the lowest, so that
    few glaciers make the interval wider rather than narrower. The same where the regression has no finite solution.

    Parameters
    ----------
    features : DataFrame with the columns FEATURES, one row a glacier
    taus : largest covering tau of each glacier

    Raises
    ------
    ValueError
        if there is no glacier.
    """
    if not len(taus):
        raise ValueError("no validation glacier to fit tau on")
    q = 1.0 - settings.coverage
    share = np.clip(np.asarray(taus, dtype=np.float64) / settings.tau_max, _EPS, 1 - _EPS)
    y = np.log(share / (1 - share))
    rank = max(int(np.floor(q * (len(y) + 1))), 1)
    regional = TauRule("regional_quantile", float(np.sort(y)[rank - 1]), maximum=settings.tau_max)
    if len(y) < settings.min_glaciers:
        return regional
    import statsmodels.api as sm

    x = features[list(FEATURES)].astype(float)
    means, scales = x.mean(), x.std(ddof=0)
    scales = scales.where(scales > 1e-9, 1.0)
    design = np.column_stack([np.ones(len(x)), ((x - means) / scales).to_numpy()])
    with np.errstate(divide="ignore", invalid="ignore"):  # of its standard errors, where all taus are equal
        fitted = sm.QuantReg(y, design).fit(q=q, max_iter=2000)
    if not np.isfinite(fitted.params).all():
        return regional
    weights = dict(zip(FEATURES, map(float, fitted.params[1:]), strict=True))
    return TauRule(
        "quantile_regression", float(fitted.params[0]), weights, means.to_dict(), scales.to_dict(), settings.tau_max
    )
