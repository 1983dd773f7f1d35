"""Clouds and their shadows.

Belongs here: where clouds are and how thick. Does not belong here: their colour.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from scipy.special import ndtri

from dl4gam_assets.synthetic.noise import F32, fractal_noise


def cloud_field(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    west: float,
    east: float,
    azimuth: float,
    elevation: float,
    pixel_m: float = 10.0,
    base_m: float = 1100.0,
) -> tuple[F32, F32]:
    """Opacity of fractal clouds and the share of sunlight that they take from the ground.

    Parameters
    ----------
    shape : rows, columns
    west, east : cloud share of the western and eastern half, 0 to 1; 0 is free of cloud and of cloud shadow
    azimuth, elevation : of the sun, degrees; shadows fall on the far side
    base_m : height of the clouds above the ground

    Returns
    -------
    opacity, shadow : float32 (H, W) in 0 to 1
    """
    if max(west, east) <= 0:
        return np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    length = base_m / math.tan(math.radians(elevation)) / pixel_m
    shift = (-length * math.cos(math.radians(azimuth)), length * math.sin(math.radians(azimuth)))  # rows down, columns
    pad = math.ceil(max(abs(s) for s in shift)) + 4
    big = (shape[0] + 2 * pad, shape[1] + 2 * pad)
    half = (math.ceil(big[0] / 2), math.ceil(big[1] / 2))
    noise = 0.96 * fractal_noise(half, rng, beta=3.6, longest_px=150) + 0.28 * fractal_noise(
        half, rng, beta=2.9, longest_px=24
    )
    noise = ndimage.zoom(noise, 2, order=1)[: big[0], : big[1]]
    # Share -> threshold; nothing reaches that of a side without clouds. Such a side holds more than half of the width,
    # so that what lies in the middle is clear when either side is.
    levels = [float(ndtri(1 - min(max(s, 1e-9), 0.995))) if s > 0 else 7.0 for s in (west, east)]
    middle = 0.5 + 0.14 * (int(west <= 0) - int(east <= 0))
    col = np.arange(big[1], dtype=np.float32) - pad - shape[1] * middle
    blend = 1 / (1 + np.exp(-col / 28.0))
    threshold = levels[0] * (1 - blend) + levels[1] * blend
    opacity = np.clip((noise - threshold[None, :].astype(np.float32)) / 0.75, 0, 1)
    opacity = opacity * opacity * (3 - 2 * opacity)
    r, c = round(shift[0]), round(shift[1])
    inner = opacity[pad : pad + shape[0], pad : pad + shape[1]]
    # What stands at (row + r, column + c), towards the sun, darkens the ground at (row, column).
    shade = opacity[pad + r : pad + r + shape[0], pad + c : pad + c + shape[1]]
    shade = ndimage.gaussian_filter(shade, 2.0)
    return np.ascontiguousarray(inner, np.float32), shade.astype(np.float32)
