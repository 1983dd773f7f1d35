"""Classical thresholds: the band ratio and its stand-ins where a sensor has no SWIR band.

Belongs here: fitting a threshold on training glaciers, applying it. Does not belong here: evaluation (``change``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

#: Grid of the published search (Diaconu et al. 2025, section 8; Paul et al. 2020).
RATIOS = np.round(np.arange(0.5, 5.5 + 1e-9, 0.1), 2)
BLUES = np.arange(0, 1501, 100)
#: Thresholds of a single band (reflectance x 10000), for sensors without SWIR.
LEVELS = np.arange(200, 10001, 100)

Sample = tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray, float]


def fit_baseline(samples: Iterable[Sample], bands: Sequence[str]) -> pd.DataFrame:
    """Thresholds with the best area-weighted IoU.

    With red and SWIR: ice where red / SWIR is at least a threshold (0.5 to 5.5 in steps of 0.1), and where blue is at
    least another (reflectance x 10000, 0 to 1500; 0 leaves it out), as published. Without SWIR the ratio tells nothing:
    the baseline is then one brightness threshold on the best of the bands there are (``threshold <band>``): ice and
    snow are brighter than rock.

    Each glacier's pixels are sorted into a histogram of (ratio, blue) once; all threshold pairs follow from its
    cumulative sums, instead of one confusion matrix for each.

    Parameters
    ----------
    samples : for each glacier its bands (reflectance, (H, W)), target and valid masks, and its area as weight
    bands : names of the sensor's bands

    Returns
    -------
    DataFrame
        Rows of the table ``baseline``.

    Raises
    ------
    ValueError
        if there is no sample.
    """
    ratio = {"red", "swir16"} <= set(bands)
    kinds = ["ratio"] if ratio else list(bands)
    scores: dict[str, np.ndarray] = {}
    weights = 0.0
    for values, target, valid, weight in samples:
        weights += weight
        for kind in kinds:
            if kind == "ratio":
                iou = _ratio_iou(values, target, valid)
            else:
                iou = _level_iou(values[kind], target, valid)
            scores[kind] = scores.get(kind, np.zeros_like(iou)) + weight * iou
    if not scores or weights <= 0:
        raise ValueError("no glacier to fit the baseline on")
    rows = []
    for kind, total in scores.items():
        best = np.unravel_index(int(np.argmax(total)), total.shape)
        row = {"fit_iou": float(total[best] / weights)}
        if kind == "ratio":
            blue = float(BLUES[best[1]])
            row |= {"method": "band ratio red/swir16", "numerator": "red", "denominator": "swir16",
                    "ratio_threshold": float(RATIOS[best[0]]), "blue_threshold": blue if blue > 0 else None}  # fmt: skip
        else:
            row |= {"method": f"threshold {kind}", "numerator": kind, "denominator": None,
                    "ratio_threshold": float(LEVELS[best[0]]) / 1e4, "blue_threshold": None}  # fmt: skip
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.loc[[frame["fit_iou"].idxmax()]].reset_index(drop=True)


def apply_baseline(bands: Mapping[str, np.ndarray], row: Mapping[str, object] | pd.Series) -> np.ndarray:
    """Glacier mask (H, W) of a fitted baseline; missing pixels are no glacier."""
    numerator = bands[str(row["numerator"])]
    threshold = float(row["ratio_threshold"])  # type: ignore[arg-type]
    denominator = row["denominator"]
    with np.errstate(invalid="ignore"):
        if denominator is None or pd.isna(denominator):
            return numerator >= threshold
        mask = _ratio(numerator, bands[str(denominator)]) >= threshold
        blue = row["blue_threshold"]
        if blue is not None and not pd.isna(blue):
            mask &= bands["blue"] * 1e4 >= float(blue)  # type: ignore[arg-type]
    return mask


def _ratio(red: np.ndarray, swir: np.ndarray) -> np.ndarray:
    # SWIR is close to zero on ice: the ratio is then large, not undefined.
    return red / np.maximum(swir, 1e-4)


def _ratio_iou(values: Mapping[str, np.ndarray], target: np.ndarray, valid: np.ndarray) -> np.ndarray:
    red, swir = values["red"][valid], values["swir16"][valid]
    blue = values["blue"][valid] * 1e4 if "blue" in values else np.full(red.shape, np.inf)
    y = target[valid]
    # Index of the highest threshold that a pixel still reaches, plus one; 0: it reaches none.
    i = np.searchsorted(RATIOS, _ratio(red, swir) + 1e-9, side="right")
    j = np.searchsorted(BLUES, blue, side="right")
    shape = (len(RATIOS) + 1, len(BLUES) + 1)
    flat = i * shape[1] + j
    hit = np.bincount(flat[y], minlength=shape[0] * shape[1]).reshape(shape)
    miss = np.bincount(flat[~y], minlength=shape[0] * shape[1]).reshape(shape)
    # Pixels at or above both thresholds: cumulative sums from the upper end.
    tp, fp = (np.cumsum(np.cumsum(h[::-1, ::-1], 0), 1)[::-1, ::-1][1:, 1:] for h in (hit, miss))
    iou: np.ndarray = tp / np.maximum(int(y.sum()) + fp, 1)
    return iou


def _level_iou(band: np.ndarray, target: np.ndarray, valid: np.ndarray) -> np.ndarray:
    values, y = band[valid] * 1e4, target[valid]
    i = np.searchsorted(LEVELS, values + 1e-6, side="right")
    hit = np.bincount(i[y], minlength=len(LEVELS) + 1)
    miss = np.bincount(i[~y], minlength=len(LEVELS) + 1)
    tp, fp = (np.cumsum(h[::-1])[::-1][1:] for h in (hit, miss))
    iou: np.ndarray = tp / np.maximum(int(y.sum()) + fp, 1)
    return iou
