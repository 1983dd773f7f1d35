"""Mean and spread over ensemble members.

Belongs here: aggregation of logits. Does not belong here: fitting temperatures (``calibration``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import numpy as np
from scipy.special import expit


def aggregate(
    logits: Iterable[np.ndarray],
    temperatures: Sequence[float] | np.ndarray,
    *,
    each: Callable[[np.ndarray], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of the members' temperature-scaled probabilities.

    Members are added one after the other in fp32 (Welford 1962, doi:10.1080/00401706.1962.10490022), so neither logits
    nor probabilities of all members are ever held: a generator such as ``segmentation.member_logits`` is asked for one
    at a time. Pixels without a prediction (NaN) stay NaN.

    Parameters
    ----------
    logits : one float array (...) a member, or an array (M, ...)
    temperatures : M positive numbers that divide the logits
    each : called with the float32 probabilities of each member in turn, for callers that keep them

    Returns
    -------
    mean, std : float32 arrays (...)

    Raises
    ------
    ValueError
        if the numbers of members and temperatures differ, or a temperature is not positive.
    """
    scales = np.asarray(temperatures, dtype=np.float32)
    if not (scales > 0).all():
        raise ValueError("temperatures must be positive")
    mean: np.ndarray = np.zeros((), dtype=np.float32)
    m2 = mean
    count = 0
    for member, temperature in zip_longest(logits, scales):
        if member is None or temperature is None:
            raise ValueError(f"{len(scales)} temperatures, but {'fewer' if member is None else 'more'} members")
        count += 1
        p = sigmoid(np.asarray(member, dtype=np.float32) / temperature)
        if each is not None:
            each(p)
        delta = p - mean
        mean = mean + delta / np.float32(count)
        m2 = m2 + delta * (p - mean)
    if not count:
        raise ValueError("no members to aggregate")
    return mean, np.sqrt(np.maximum(m2, 0) / np.float32(count))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function as float32, without overflow."""
    out: np.ndarray = expit(np.asarray(x, dtype=np.float32))
    return out
