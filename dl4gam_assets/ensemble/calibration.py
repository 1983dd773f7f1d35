"""Calibration of pixel probabilities.

Belongs here: temperatures, reliability, calibration error. Does not belong here: area intervals (``intervals``).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar


def log_loss(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log likelihood of binary labels under logits divided by a temperature."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    y = np.asarray(labels, dtype=np.float64)
    return float(np.mean(np.logaddexp(0.0, z) - y * z))


def fit_temperature(logits: np.ndarray, labels: np.ndarray, bounds: tuple[float, float] = (0.5, 5.0)) -> float:
    """Temperature within ``bounds`` that minimizes the log loss (Guo et al. 2017, arXiv:1706.04599).

    Parameters
    ----------
    logits : float array (N,) of one member
    labels : bool array (N,)

    Raises
    ------
    ValueError
        if there are no pixels.
    """
    if not len(labels):
        raise ValueError("no validation pixels to fit a temperature on")
    found = minimize_scalar(
        lambda t: log_loss(logits, labels, t), bounds=bounds, method="bounded", options={"xatol": 1e-4}
    )
    return float(np.clip(found.x, *bounds))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 40) -> pd.DataFrame:
    """Reliability diagram: of each bin of equal width that has pixels, mean probability, observed share, count.

    Returns
    -------
    DataFrame with bin (from 0), confidence, frequency, n_pixels.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    which = np.minimum((p * bins).astype(int), bins - 1)
    n = np.bincount(which, minlength=bins)
    kept = n > 0
    confidence = np.bincount(which, weights=p, minlength=bins)[kept] / n[kept]
    frequency = np.bincount(which, weights=np.asarray(labels, dtype=np.float64), minlength=bins)[kept] / n[kept]
    return pd.DataFrame(
        {"bin": np.flatnonzero(kept), "confidence": confidence, "frequency": frequency, "n_pixels": n[kept]}
    )


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 40) -> float:
    """Mean distance of probability and observed share over bins, weighted by pixels (Naeini et al. 2015)."""
    table = reliability(probabilities, labels, bins)
    distance = (table["confidence"] - table["frequency"]).abs()
    return float((distance * table["n_pixels"]).sum() / table["n_pixels"].sum())
