"""Mean and spread over ensemble members.

Belongs here: aggregation of logits. Does not belong here: fitting temperatures (``calibration``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def aggregate(logits: np.ndarray, temperatures: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of the members' temperature-scaled probabilities.

    Members are added one after the other (Welford), so no stack of probabilities is held.

    Parameters
    ----------
    logits : float array (M, ...)
    temperatures : M positive numbers that divide the logits

    Returns
    -------
    mean, std : float32 arrays (...)

    Raises
    ------
    ValueError
        if the numbers of members and temperatures differ, or a temperature is not positive.
    """
    temperatures = np.asarray(temperatures, dtype=np.float32)
    if len(logits) != len(temperatures) or not len(logits):
        raise ValueError(f"{len(logits)} members, but {len(temperatures)} temperatures")
    if not (temperatures > 0).all():
        raise ValueError("temperatures must be positive")
    mean = np.zeros(logits.shape[1:], dtype=np.float32)
    m2 = np.zeros_like(mean)
    for count, (member, temperature) in enumerate(zip(logits, temperatures, strict=True), start=1):
        p = sigmoid(member / temperature)
        delta = p - mean
        mean += delta / count
        m2 += delta * (p - mean)
    return mean, np.sqrt(np.maximum(m2, 0) / len(logits))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function as float32, without overflow."""
    x = np.asarray(x, dtype=np.float32)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(np.float32)
