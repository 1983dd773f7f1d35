"""Scores of an image over a glacier.

Belongs here: coverage, cloud share, NDSI, albedo, each with the pixels it rests on (Diaconu et al. 2025, section 2).
Does not belong here: comparing images (``ranking``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from dl4gam_assets.imagery.indices import normalized_difference
from dl4gam_assets.settings import SelectionSettings

#: Broadband albedo of Sentinel-2 from blue, green and red (Wang et al. 2016, as used by Diaconu et al. 2025).
ALBEDO = {"blue": 0.5621, "green": 0.1479, "red": 0.2512}
ALBEDO_OFFSET = 0.0015


def score_image(
    image: xr.Dataset, *, region: np.ndarray, near: np.ndarray, glaciers: np.ndarray, settings: SelectionSettings
) -> dict[str, Any]:
    """Scores of one image.

    - ``coverage``: share of ``region`` that has pixels.
    - ``cloud_share``: cloudy **or missing** share of ``near``; shadow counts as cloud where it is looked for (below).
    - ``ndsi``: mean (green - SWIR) / (green + SWIR) over clean pixels of ``near`` that are no glacier: seasonal snow. A
      black pixel has 0 (:func:`~dl4gam_assets.imagery.indices.normalized_difference`).
    - ``albedo``: mean broadband albedo over clean pixels of ``near``.
    - ``snow_overruled_share``, ``shadow_share``, ``saturated_share``: share of ``near`` where snow overruled a cloud
      mask, that counts as cloud because it is dark, that is saturated in a band; None where that is not looked for.
      They are for people: no ranking uses them.
    ``coverage_pixels``, ``cloud_share_pixels``, ``ndsi_pixels`` and ``albedo_pixels`` are how many pixels each score
    rests on; NDSI and albedo on fewer than ``settings.min_clean_pixels`` are None.

    Without a SWIR band, or without clean ice-free pixels, there is no NDSI: ``snow_score`` then names the fallback that
    stands for seasonal snow in the ranking, ``albedo`` or, without the bands for it, ``brightness`` (the mean
    reflectance of the bands there are, kept in the column albedo): fresh snow makes the glacier itself brighter.

    Without a cloud mask the darkest image would win, which cloud shadow can be. ``settings.shadow_nir_max`` makes
    pixels count as cloud that are dark in the near infrared and much brighter in blue (see :func:`shadow`).

    Parameters
    ----------
    image : from ``read_image``
    region : bool (H, W), what has to be covered
    near : bool (H, W), glacier and buffer
    glaciers : bool (H, W), pixels of any glacier
    """
    missing, cloud = image["missing"].to_numpy(), image["cloud"].to_numpy()
    values = dict(zip(map(str, image["band"].to_numpy()), image["reflectance"].to_numpy(), strict=True))
    dark = None
    if settings.shadow_nir_max is not None:
        dark = shadow(values["blue"], values["nir"], settings)
        cloud = cloud | dark
    clean = near & ~missing & ~cloud
    out: dict[str, Any] = {
        "coverage": _share(~missing, region),
        "coverage_pixels": int(region.sum()),
        "cloud_share": float((missing | cloud)[near].mean()) if near.any() else 1.0,
        "cloud_share_pixels": int(near.sum()),
        "ndsi": None,
        "ndsi_pixels": 0,
        "albedo": None,
        "albedo_pixels": int(clean.sum()),
        "snow_overruled_share": _share(image["overruled"].to_numpy(), near) if "overruled" in image else None,
        "shadow_share": _share(dark, near) if dark is not None else None,
        "saturated_share": _share(image["saturated"].to_numpy(), near) if "saturated" in image else None,
    }
    surroundings = clean & ~glaciers
    if {"green", "swir16"} <= set(values):
        out["ndsi_pixels"] = int(surroundings.sum())
        if out["ndsi_pixels"] >= settings.min_clean_pixels:
            green, swir = values["green"][surroundings], values["swir16"][surroundings]
            out["ndsi"] = float(normalized_difference(green, swir).mean(dtype=np.float64))
    physical = set(values) >= set(ALBEDO)
    if out["albedo_pixels"] >= settings.min_clean_pixels:
        if physical:
            albedo = sum(w * values[b][clean] for b, w in ALBEDO.items()) + ALBEDO_OFFSET
        else:
            albedo = np.mean([v[clean] for v in values.values()], axis=0)
        out["albedo"] = float(np.mean(albedo, dtype=np.float64))
    out["snow_score"] = "ndsi" if out["ndsi"] is not None else ("albedo" if physical else "brightness")
    return out


def _share(mask: np.ndarray, where: np.ndarray) -> float:
    return float(mask[where].mean()) if where.any() else 0.0


def shadow(blue: np.ndarray, nir: np.ndarray, settings: SelectionSettings) -> np.ndarray:
    """Pixels that look like cloud shadow: lit by the sky alone, so dark in the near infrared and relatively blue.

    Lakes, wet dark ice and shadow of the terrain look alike; they do so on every date, so comparing dates still tells
    cloud shadow, but the mask is no use for mapping. With 0.12 and 0.6 it marks 7.2% and 4.6% of Rhonegletscher on two
    dates with cloud shadow (Sentinel-2 L1C, 2018-08-05 and 2018-09-17), 2.7% under a low sun (2017-10-14), and at most
    1.2% on the twelve other dates of the series.

    Parameters
    ----------
    blue, nir : reflectance (H, W), NaN where missing
    """
    assert settings.shadow_nir_max is not None
    with np.errstate(invalid="ignore"):
        dark: np.ndarray = (nir < settings.shadow_nir_max) & (nir < settings.shadow_ratio_max * blue)
    return dark
