"""Scores of an image over a glacier.

Belongs here: coverage, cloud share, NDSI, albedo, each with the pixels it rests on (Diaconu et al. 2025, section 2).
Does not belong here: comparing images (``ranking``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from dl4gam_assets.settings import SelectionSettings

#: Broadband albedo of Sentinel-2 from blue, green and red (Wang et al. 2016, doi:10.3390/rs8030217).
ALBEDO = {"blue": 0.5621, "green": 0.1479, "red": 0.2512}
ALBEDO_OFFSET = 0.0015


def score_image(
    image: xr.Dataset, *, region: np.ndarray, near: np.ndarray, glaciers: np.ndarray, settings: SelectionSettings
) -> dict[str, Any]:
    """Scores of one image.

    - ``coverage``: share of ``region`` that has pixels.
    - ``cloud_share``: cloudy **or missing** share of ``near``.
    - ``ndsi``: mean (green - SWIR) / (green + SWIR) over clean pixels of ``near`` that are no glacier: seasonal snow.
    - ``albedo``: mean broadband albedo over clean pixels of ``near``.
    A score that rests on fewer than ``settings.min_clean_pixels`` pixels is None.

    Without a SWIR band, or without clean ice-free pixels, there is no NDSI: ``snow_score`` then names the fallback that
    stands for seasonal snow in the ranking, ``albedo`` or, without the bands for it, ``brightness`` (the mean
    reflectance of the bands there are, kept in the column albedo): fresh snow makes the glacier itself brighter.

    Parameters
    ----------
    image : from ``read_image``
    region : bool (H, W), what has to be covered
    near : bool (H, W), glacier and buffer
    glaciers : bool (H, W), pixels of any glacier
    """
    missing, cloud = image["missing"].to_numpy(), image["cloud"].to_numpy()
    clean = near & ~missing & ~cloud
    values = {str(b): image["reflectance"].sel(band=b).to_numpy() for b in image["band"].to_numpy()}
    out: dict[str, Any] = {
        "coverage": float((~missing)[region].mean()) if region.any() else 0.0,
        "cloud_share": float((missing | cloud)[near].mean()) if near.any() else 1.0,
        "ndsi": None,
        "ndsi_pixels": 0,
        "albedo": None,
        "albedo_pixels": int(clean.sum()),
    }
    surroundings = clean & ~glaciers
    if {"green", "swir16"} <= set(values):
        out["ndsi_pixels"] = int(surroundings.sum())
        if out["ndsi_pixels"] >= settings.min_clean_pixels:
            green, swir = values["green"][surroundings], values["swir16"][surroundings]
            total = green + swir
            index = np.where(np.abs(total) < 1e-6, 1.0, (green - swir) / np.where(np.abs(total) < 1e-6, 1.0, total))
            out["ndsi"] = float(np.clip(index, -1, 1).mean())
    physical = set(values) >= set(ALBEDO)
    if out["albedo_pixels"] >= settings.min_clean_pixels:
        if physical:
            albedo = sum(w * values[b][clean] for b, w in ALBEDO.items()) + ALBEDO_OFFSET
        else:
            albedo = np.mean([v[clean] for v in values.values()], axis=0)
        out["albedo"] = float(np.mean(albedo))
    out["snow_score"] = "ndsi" if out["ndsi"] is not None else ("albedo" if physical else "brightness")
    return out
