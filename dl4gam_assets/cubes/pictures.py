"""Pictures of reflectance for people.

Belongs here: turning bands into colours. Does not belong here: outlines, titles, files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

#: The brightest two percent of a picture are white.
WHITE_PERCENTILE = 98.0


def true_colour(reflectance: Mapping[str, np.ndarray], white: float | None = None) -> np.ndarray:
    """RGB picture (H, W, 3) uint8 of the best bands there are; missing pixels are grey.

    Natural colour where red, green and blue exist, otherwise the first three bands in their order. ``white``: the
    reflectance that is drawn white, for pictures that are to be compared; the picture's own 98th percentile if None.
    """
    stack = _stack(reflectance)
    good = np.isfinite(stack).all(axis=-1)
    high = white_point(reflectance) if white is None else white
    picture = np.clip(stack / max(high, 1e-6), 0, 1) ** 0.7
    picture[~good] = 0.5
    return (picture * 255).astype(np.uint8)


def white_point(reflectance: Mapping[str, np.ndarray]) -> float:
    """The 98th percentile of the bands that a picture shows, over pixels that have all of them; 1 if there are none."""
    stack = _stack(reflectance)
    good = np.isfinite(stack).all(axis=-1)
    return float(np.percentile(stack[good], WHITE_PERCENTILE)) if good.any() else 1.0


def shown_bands(names: Sequence[str]) -> list[str]:
    """The bands that a picture shows as red, green and blue."""
    return ["red", "green", "blue"] if {"red", "green", "blue"} <= set(names) else (list(names) * 3)[:3]


def _stack(reflectance: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.stack([np.asarray(reflectance[n], dtype=np.float32) for n in shown_bands(list(reflectance))], axis=-1)
