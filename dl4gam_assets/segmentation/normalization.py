"""Standardization of channels.

Belongs here: statistics over training glaciers and their use. Does not belong here: making channels (``cubes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

#: Channels that enter as they are: they have a fixed range (Diaconu et al. 2025, section 3).
STANDARDIZED_FREE = frozenset({"ndvi", "ndwi", "ndsi", "slope", "sin_aspect", "cos_aspect"})


def normalization_statistics(stacks: Iterable[tuple[np.ndarray, np.ndarray]], channels: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation of each channel over valid pixels, in one pass and exact.

    Parameters
    ----------
    stacks : pairs of a float array (C, H, W), NaN where missing, and a bool array (H, W) of usable pixels. A pixel
        counts for a channel where it is usable and the channel is not missing.
    channels : names of the C channels

    Returns
    -------
    DataFrame with channel, mean, std (population), n_pixels, standardized.

    Raises
    ------
    ValueError
        if a channel has no valid pixel at all.
    """
    count = np.zeros(len(channels))
    mean = np.zeros(len(channels))
    m2 = np.zeros(len(channels))
    for stack, valid in stacks:
        for i in range(len(channels)):
            values = stack[i][valid & np.isfinite(stack[i])].astype(np.float64)
            if not values.size:
                continue
            # Chan et al.'s update joins the moments of blocks without losing precision.
            n, m, s = values.size, values.mean(), ((values - values.mean()) ** 2).sum()
            delta = m - mean[i]
            total = count[i] + n
            m2[i] += s + delta**2 * count[i] * n / total
            mean[i] += delta * n / total
            count[i] = total
    empty = [c for c, n in zip(channels, count, strict=True) if n == 0]
    if empty:
        raise ValueError(f"channels {empty} have no valid pixel on any training glacier")
    return pd.DataFrame(
        {
            "channel": list(channels),
            "mean": mean,
            "std": np.sqrt(m2 / count),
            "n_pixels": count.astype(int),
            "standardized": [c not in STANDARDIZED_FREE for c in channels],
        }
    )


def normalize(stack: np.ndarray, channels: Sequence[str], statistics: pd.DataFrame) -> np.ndarray:
    """Channels as a network sees them: standardized where they should be, missing values as the mean.

    Parameters
    ----------
    stack : float array (C, H, W), NaN where missing
    channels : names of the C channels
    statistics : from :func:`normalization_statistics`

    Returns
    -------
    float32 array (C, H, W) without NaN.

    Raises
    ------
    ValueError
        if the statistics are of other channels.
    """
    if len(stack) != len(channels):
        raise ValueError(f"the stack has {len(stack)} layers, but there are {len(channels)} channels")
    shift, scale, fill = affine(channels, statistics)
    out = np.empty(stack.shape, dtype=np.float32)
    for layer, raw, a, b, missing in zip(out, stack, shift, scale, fill, strict=True):  # a layer of scratch memory
        np.divide(raw.astype(np.float32, copy=False) - a, b, out=layer)
        layer[~np.isfinite(layer)] = missing
    return out


def affine(channels: Sequence[str], statistics: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What :func:`normalize` does to each channel: ``(value - shift) / scale``, and ``fill`` where it is missing.

    A missing value is the channel's mean: zero after standardization, the mean itself for the other channels. A channel
    that never varies is only shifted.

    Returns
    -------
    shift, scale, fill : float32 arrays (C,)

    Raises
    ------
    ValueError
        if the statistics are of other channels.
    """
    table = statistics.set_index("channel")
    if set(table.index) != set(channels):
        raise ValueError(f"normalization holds {sorted(table.index)}, but the channels are {list(channels)}")
    table = table.loc[list(channels)]
    mean, std = (table[name].to_numpy(dtype=np.float64) for name in ("mean", "std"))
    scaled = table["standardized"].to_numpy(dtype=bool)
    shift = np.where(scaled, mean, 0.0).astype(np.float32)
    scale = np.where(scaled & (std > 0), std, 1.0).astype(np.float32)
    fill = np.where(scaled, 0.0, mean).astype(np.float32)
    return shift, scale, fill
