"""How glaciers shrink: rates, the order in which ice goes, and elevation change that agrees.

Belongs here: change in time of known glaciers. Does not belong here: where the ice came from (``ice``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dl4gam_assets.synthetic.noise import F32

#: Melt of each year relative to the mean: hot summers of the Alps (2015, 2018, 2019, 2022, 2023) stand out.
YEAR_WEIGHT: Mapping[int, float] = {
    2016: 0.8, 2017: 1.1, 2018: 1.15, 2019: 1.05, 2020: 0.85, 2021: 0.65, 2022: 1.7, 2023: 1.2, 2024: 0.8,
}  # fmt: skip

#: Volume-area scaling V = c A^1.375 (Bahr et al. 1997, doi:10.1029/97JB01696), c = 0.034 km^(3 - 2 * 1.375).
_VOLUME_FACTOR, _VOLUME_POWER = 0.034, 1.375


def area_loss_rates(
    area_km2: NDArray[np.floating], rng: np.random.Generator, *, regional_pct: float = 1.9, exponent: float = 0.3
) -> NDArray[np.float64]:
    """Loss of each glacier in percent of its baseline area a year (positive), larger for smaller glaciers.

    Rates go as ``area ** -exponent`` with a scatter of 15%, at most 6% a year, scaled until the region as a whole
    loses ``regional_pct`` percent a year.
    """
    area = np.asarray(area_km2, float)
    shape = np.maximum(area, 0.01) ** -exponent * np.exp(0.15 * rng.standard_normal(len(area)))
    scale = regional_pct
    for _ in range(60):
        rates: NDArray[np.float64] = np.minimum(scale * shape, 6.0)
        scale *= regional_pct * area.sum() / (rates * area).sum()
    return rates


def elapsed_share(years: Sequence[int], baseline_year: int) -> dict[int, float]:
    """Years of mean melt between the baseline and each year; sums to whole years at the last one."""
    last = max(max(years), baseline_year)
    weights = np.array([YEAR_WEIGHT.get(y, 1.0) for y in range(baseline_year + 1, last + 1)])
    if not len(weights):
        return {baseline_year: 0.0}
    total = np.concatenate([[0.0], np.cumsum(weights * len(weights) / weights.sum())])
    return {baseline_year + k: float(v) for k, v in enumerate(total)}


def melt_order(label: NDArray[np.int32], surface: F32, thickness: F32, noise: F32, *, pixel_m: float) -> F32:
    """Rank of each ice pixel in its glacier's retreat: 0 goes first, 1 last; NaN where there is no ice.

    Thin ice, ice near ground without ice, and low ice goes first. Divides between glaciers are no margin.
    """
    ice = label > 0
    margin = ndimage.distance_transform_edt(ice).astype(np.float32) * np.float32(pixel_m)
    smooth = ndimage.gaussian_filter(thickness, 30.0 / pixel_m)
    lasting = smooth / 35.0 + np.minimum(margin, 400.0) / 110.0
    out = np.full(label.shape, np.nan, np.float32)
    for i, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        inside = label[box] == i
        z = surface[box][inside]
        low, high = np.percentile(z, [1, 99])
        height = np.clip((z - low) / max(high - low, 30.0), 0, 1)
        value = (lasting[box][inside] + 0.12) * (0.18 + height**1.1) + 0.06 * noise[box][inside]
        rank = np.empty(len(z), np.float32)
        rank[np.argsort(value, kind="stable")] = (np.arange(len(z), dtype=np.float32) + 0.5) / len(z)
        out[box][inside] = rank
    return out


def retreat(label: NDArray[np.int32], order: F32, loss: NDArray[np.floating]) -> NDArray[np.int32]:
    """Glaciers after each lost a share of its baseline area.

    Parameters
    ----------
    label : int32 (H, W), 0 none, glaciers from 1
    order : float32 (H, W) of ``melt_order``
    loss : (n,) share of the area gone, 0 to 1, of glaciers 1 to n
    """
    gone = np.concatenate([[0.0], np.asarray(loss, float)]).astype(np.float32)[label]
    with np.errstate(invalid="ignore"):
        return np.where((label > 0) & (order >= gone), label, 0).astype(np.int32)


def former_ice(
    label: NDArray[np.int32], surface: F32, rates_pct: NDArray[np.floating], *, pixel_m: float, years: int = 6
) -> tuple[NDArray[np.int32], F32]:
    """Ground that glaciers left in the years before the baseline: the retreat continued backwards.

    Low ground near a margin was left last. Each glacier had lost its present share of area in each of those years.

    Returns
    -------
    int32 (H, W), the glacier that lay there (0: none), and float32 (H, W), how many years before the baseline it left.
    """
    distance, index = ndimage.distance_transform_edt(label == 0, return_indices=True)
    owner = np.where((label == 0) & (distance * pixel_m < 400), label[tuple(index)], 0).astype(np.int32)
    vacated = np.full(label.shape, np.inf, np.float32)
    sizes = np.bincount(label.ravel(), minlength=int(label.max()) + 1)
    out = np.zeros_like(owner)
    for i, box in enumerate(ndimage.find_objects(owner), start=1):
        if box is None or not sizes[i]:
            continue
        inside = owner[box] == i
        low, high = np.percentile(surface[label == i], [1, 99])
        height = np.clip((surface[box][inside] - low) / max(high - low, 30.0), 0, 1)
        cost = distance[box][inside] * pixel_m * (0.18 + height**1.1)
        rank = np.empty(len(cost), np.float32)
        rank[np.argsort(cost, kind="stable")] = np.arange(len(cost), dtype=np.float32)
        left = rank / (sizes[i] * rates_pct[i - 1] / 100)
        some = left < years
        view, when = out[box], vacated[box]
        view[inside] = np.where(some, i, view[inside])
        when[inside] = np.where(some, left, when[inside])
    return out, vacated


def elevation_change(
    label: NDArray[np.int32], surface: F32, debris: F32, rates_pct: NDArray[np.floating], area_km2: NDArray[np.floating]
) -> F32:
    """Rate of surface elevation change (m a year) over the baseline glaciers that agrees with their area loss.

    By volume-area scaling a glacier that loses r percent of its area a year loses 1.375 r percent of its volume: the
    mean is -1.375 r/100 times its mean thickness 34 A^0.375 m. Thinning is strongest at the terminus and fades with
    altitude (as in Huss et al. 2010, doi:10.5194/hess-14-815-2010); debris slows it by a fifth.

    Returns
    -------
    float32 (H, W), 0 where there is no ice.
    """
    out = np.zeros(label.shape, np.float32)
    for i, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        inside = label[box] == i
        z = surface[box][inside]
        low, high = np.percentile(z, [1, 99])
        height = np.clip((z - low) / max(high - low, 30.0), 0, 1)
        pattern = (0.08 + (1.0 - height) ** 1.8) * (1 - 0.2 * debris[box][inside])
        area = max(float(area_km2[i - 1]), 0.01)
        mean = -_VOLUME_POWER * rates_pct[i - 1] / 100 * 1000 * _VOLUME_FACTOR * area ** (_VOLUME_POWER - 1)
        out[box][inside] = mean * pattern / pattern.mean()
    return out


def debris_cover(
    label: NDArray[np.int32],
    surface: F32,
    noise: F32,
    streaks: F32,
    rng: np.random.Generator,
    *,
    share: float = 0.08,
    pixel_m: float,
) -> F32:
    """Debris score of each ice pixel: positive where ice is covered by debris; about ``share`` of all ice.

    About half of the glaciers above 0.15 km2 have debris: on the low tongue, along its margins and in medial moraines.
    """
    n = int(label.max())
    area = np.bincount(label.ravel(), minlength=n + 1)[1:] * pixel_m**2 / 1e6
    margin = ndimage.distance_transform_edt(label > 0) * pixel_m
    score = np.full(label.shape, -9.0, np.float32)
    carries = (rng.random(n) < 0.55) & (area > 0.15)
    strength = rng.uniform(-0.05, 0.22, n)
    for i, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None or not carries[i - 1]:
            continue
        inside = label[box] == i
        z = surface[box][inside]
        low, high = np.percentile(z, [1, 99])
        height = np.clip((z - low) / max(high - low, 30.0), 0, 1)
        score[box][inside] = (
            strength[i - 1]
            - 1.35 * height
            + 0.16 * np.exp(-margin[box][inside] / 45.0)
            + 0.10 * noise[box][inside]
            + 0.10 * streaks[box][inside]
        )
    ice = label > 0
    wanted = int(share * ice.sum())
    values = score[ice]
    if wanted == 0 or (values > -9).sum() < wanted:
        return score
    cut = np.partition(values, len(values) - wanted)[len(values) - wanted]
    out: F32 = np.where(score > -9, score - cut, score).astype(np.float32)
    return out
