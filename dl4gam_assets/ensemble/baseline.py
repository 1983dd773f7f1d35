"""Classical thresholds: the band ratio and its stand-ins where a sensor has no SWIR band.

Belongs here: fitting a threshold on training glaciers, applying it. Does not belong here: evaluation (``change``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

#: Grid of the published search (Diaconu et al. 2025, section 8; Paul et al. 2020).
RATIOS = np.round(np.arange(0.5, 5.5 + 1e-9, 0.1), 2)
#: Blue thresholds, reflectance x 10000; the first leaves them out.
BLUES = np.arange(0, 1501, 100)
#: Thresholds of a single band (reflectance), for sensors without SWIR.
LEVELS = np.round(np.arange(0.02, 1.0 + 1e-9, 0.01), 2)
#: Thresholds of a ratio of a visible band to near infrared, which varies less than red / SWIR.
VISIBLE_RATIOS = np.round(np.arange(0.5, 2.5 + 1e-9, 0.05), 2)

Sample = tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray, float]


def fit_baseline(samples: Iterable[Sample], bands: Sequence[str]) -> pd.DataFrame:
    """Thresholds with the best area-weighted IoU.

    With red and SWIR: ice where red / SWIR is at least a threshold (0.5 to 5.5 in steps of 0.1), and where blue is at
    least another (reflectance x 10000, 0 to 1500; 0 leaves it out), as published.

    Without SWIR that ratio can not be made. The baseline is then the best of one threshold on the brightness of a band
    (``threshold <band>``, 0.02 to 1 in steps of 0.01: ice and snow are brighter than rock) and one on the ratio of red
    or blue to near infrared (``ratio <band>/nir``, 0.5 to 2.5 in steps of 0.05: ice darkens towards longer wavelengths,
    rock and vegetation do not), chosen in the same way.

    Each glacier's pixels are sorted into a histogram of thresholds once; the confusion of every threshold, or pair, is
    a cumulative sum of it, instead of one pass over the pixels each.

    Parameters
    ----------
    samples : for each glacier its bands (reflectance, (H, W)), target and valid masks, and its area as weight
    bands : names of the sensor's bands

    Returns
    -------
    DataFrame
        The row of the table ``baseline`` (without its fold).

    Raises
    ------
    ValueError
        if there is no sample, or none with an area.
    """
    kinds = _kinds(bands)
    scores = {kind: np.zeros(shape) for kind, (_, _, shape) in kinds.items()}
    weights = 0.0
    for values, target, valid, weight in samples:
        weights += weight
        y = target[valid]
        for kind, (numerator, denominator, shape) in kinds.items():
            feature = _feature(values, numerator, denominator)[valid]
            blue = values["blue"][valid] if len(shape) == 2 and "blue" in values else None
            scores[kind] += weight * _iou(feature, blue, y, _thresholds(numerator, denominator))
    if weights <= 0:
        raise ValueError("no glacier to fit the baseline on")
    best = max(scores, key=lambda kind: float(scores[kind].max()))
    numerator, denominator, shape = kinds[best]
    where = np.unravel_index(int(np.argmax(scores[best])), shape)
    blue_threshold = float(BLUES[where[1]]) if len(shape) == 2 and where[1] > 0 else None
    row = {
        "method": best,
        "numerator": numerator,
        "denominator": denominator,
        "ratio_threshold": float(_thresholds(numerator, denominator)[where[0]]),
        "blue_threshold": blue_threshold,
        "fit_iou": float(scores[best][where] / weights),
    }
    return pd.DataFrame([row])


def fit_oracle(sample: Sample, bands: Sequence[str]) -> pd.DataFrame:
    """The best thresholds of one glacier alone, found on its own truth: an upper bound of what thresholds can do.

    Nobody could choose them without knowing the answer, so the method's name ends in ``(oracle)``. Without SWIR the
    kind of threshold may differ from glacier to glacier, and all share the name ``best threshold (oracle)``. By
    construction its IoU over the sample's valid pixels is at least that of any regional threshold.
    """
    row = fit_baseline([sample], bands)
    kind = str(row["method"].iloc[0]) if {"red", "swir16"} <= set(bands) else "best threshold"
    return row.assign(method=f"{kind} (oracle)")


def apply_baseline(bands: Mapping[str, np.ndarray], row: Mapping[str, object] | pd.Series) -> np.ndarray:
    """Glacier mask (H, W) of a fitted baseline; missing pixels are no glacier."""
    denominator = None if _absent(row["denominator"]) else str(row["denominator"])
    with np.errstate(invalid="ignore"):
        mask: np.ndarray = _feature(bands, str(row["numerator"]), denominator) >= np.float32(row["ratio_threshold"])  # type: ignore[arg-type]
        if not _absent(row["blue_threshold"]):
            mask &= bands["blue"] >= _blue_levels(np.array(row["blue_threshold"], dtype=float))
    return mask


def _absent(value: object) -> bool:
    return value is None or bool(pd.isna(value))  # type: ignore[call-overload]


def _kinds(bands: Sequence[str]) -> dict[str, tuple[str, str | None, tuple[int, ...]]]:
    """Candidates: method -> numerator, denominator, shape of the grid of thresholds."""
    if {"red", "swir16"} <= set(bands):
        return {"band ratio red/swir16": ("red", "swir16", (len(RATIOS), len(BLUES)))}
    kinds: dict[str, tuple[str, str | None, tuple[int, ...]]] = {
        f"threshold {band}": (band, None, (len(LEVELS),)) for band in bands
    }
    for band in ("red", "blue"):
        if {band, "nir"} <= set(bands):
            kinds[f"ratio {band}/nir"] = (band, "nir", (len(VISIBLE_RATIOS),))
    return kinds


def _thresholds(numerator: str, denominator: str | None) -> np.ndarray:
    if denominator is None:
        return LEVELS
    return RATIOS if denominator == "swir16" else VISIBLE_RATIOS


def _feature(bands: Mapping[str, np.ndarray], numerator: str, denominator: str | None) -> np.ndarray:
    values = np.asarray(bands[numerator], dtype=np.float32)
    if denominator is None:
        return values
    # SWIR is close to zero on ice: the ratio is then large, not undefined.
    return values / np.maximum(np.asarray(bands[denominator], dtype=np.float32), np.float32(1e-4))


def _blue_levels(thresholds: np.ndarray) -> np.ndarray:
    return (thresholds / 1e4).astype(np.float32)


def _iou(feature: np.ndarray, blue: np.ndarray | None, y: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """IoU for every threshold, or for every pair with a blue threshold when there is a second axis."""
    # Position 0 reaches no threshold, position k the first k of them. Compared as float32, as when they are applied.
    # A missing value is sorted behind all thresholds, but reaches none.
    i = np.where(np.isnan(feature), 0, np.searchsorted(thresholds.astype(np.float32), feature, side="right"))
    if thresholds is RATIOS:
        levels = _blue_levels(BLUES)
        j = np.full(len(i), len(BLUES))
        if blue is not None:
            j = np.where(np.isnan(blue), 0, np.searchsorted(levels, blue, side="right"))
        j = np.maximum(j, 1)  # the first level leaves the blue band out, whatever its value
        shape: tuple[int, ...] = (len(thresholds) + 1, len(BLUES) + 1)
        flat = i * shape[1] + j
    else:
        shape, flat = (len(thresholds) + 1,), i
    hit, miss = (np.bincount(flat[where], minlength=int(np.prod(shape))).reshape(shape) for where in (y, ~y))
    for axis in range(len(shape)):
        hit, miss = (np.flip(np.cumsum(np.flip(h, axis), axis), axis) for h in (hit, miss))
    inner = (slice(1, None),) * len(shape)
    iou: np.ndarray = hit[inner] / np.maximum(int(y.sum()) + miss[inner], 1)
    return iou
