"""From digital number to reflectance: what an item says, never a guess.

Belongs here: scale, offset and no-data of an asset from metadata or a stated rule, and the refusal of scenes whose
reflectance can not be right. Does not belong here: reading pixels.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pystac

from dl4gam_assets.imagery.sources import SceneError
from dl4gam_assets.settings import SensorSettings

#: From this processing baseline on Sentinel-2 products hold reflectance x 10000 + 1000 (25 January 2022, and all
#: reprocessed Collection-1 products, 05.00 and later).
OFFSET_BASELINE = (4, 0)
#: A scene is refused where more than this share of its pixels is darker than this reflectance in a band: deep shadow
#: comes near -0.02 after atmospheric correction, but only an offset that was taken off twice leads much below.
NEGATIVE_SHARE, NEGATIVE = 0.05, -0.04
#: A band that stays below this reflectance (95th percentile) holds no picture, or was scaled twice.
DARK = 0.001
#: No surface and no cloud reaches this reflectance in half of a window: the scale was not applied, or the wrong way.
BRIGHT = 3.0


def band_metadata(asset: pystac.Asset, index: int = 1) -> dict[str, Any]:
    """Scale, offset and nodata of an asset's band (1 is the first), where the item states them.

    Read are STAC 1.1 ``bands`` and the raster extension: ``raster:bands`` (version 1) or ``raster:scale`` and
    ``raster:offset`` (version 2) of the band or, for all bands, of the asset itself. The band's own word wins.
    """
    fields = asset.extra_fields
    merged: dict[str, Any] = {}
    entries = [fields]
    for key in ("raster:bands", "bands"):
        of_bands = fields.get(key) or []
        if len(of_bands) >= index:
            entries.append(of_bands[index - 1])
    for entry in entries:
        for key, names in {
            "scale": ("scale", "raster:scale"), "offset": ("offset", "raster:offset"), "nodata": ("nodata",),
        }.items():  # fmt: skip
            for name in names:
                if entry.get(name) is not None:
                    merged[key] = entry[name]
    return merged


def band_index(asset: pystac.Asset) -> int:
    """Which band of its file an asset is (1 is the first)."""
    return int(asset.extra_fields.get("band_index", 1))


def reflectance_scale(item: pystac.Item, asset: pystac.Asset, sensor: SensorSettings) -> tuple[float, float]:
    """Scale and offset from digital number to reflectance: the settings' numbers, the item's metadata, or a rule.

    ``metadata``
        the raster extension. Earth Search's older collection states an offset of -0.1 for every item and says in
        ``earthsearch:boa_offset_applied`` whether it took it off. Where it did, the offset is 0: its pixels agree with
        the flag (its maintainers: github.com/Element84/earth-search/issues/9). Where it did not, the stated offset
        holds from processing baseline 04.00 on; before, products had none (stactools-packages/sentinel2/issues/44),
        and an offset that is stated all the same is 0.
    ``sentinel-2-baseline``
        for catalogs of original digital numbers without metadata (Planetary Computer): -1000 x scale from processing
        baseline 04.00 on, 0 before.

    Raises
    ------
    SceneError
        if nothing says it. It is never guessed.
    """
    stated = band_metadata(asset, band_index(asset))
    scale = sensor.scale if isinstance(sensor.scale, float) else stated.get("scale")
    if scale is None:
        raise SceneError(_unknown(item, asset, "scale"))
    if isinstance(sensor.offset, float):
        offset: Any = sensor.offset
    elif sensor.offset == "sentinel-2-baseline":
        offset = -1000.0 * float(scale) if processing_baseline(item) >= OFFSET_BASELINE else 0.0
    elif item.properties.get("earthsearch:boa_offset_applied"):
        offset = 0.0
    else:
        offset = stated.get("offset")
        flagged = "earthsearch:boa_offset_applied" in item.properties
        if offset and flagged and processing_baseline(item) < OFFSET_BASELINE:
            offset = 0.0
    if offset is None:
        raise SceneError(_unknown(item, asset, "offset"))
    return float(scale), float(offset)


def processing_baseline(item: pystac.Item) -> tuple[int, ...]:
    """Processing baseline of a Sentinel-2 item, ``(5, 9)`` for 05.09.

    Raises
    ------
    SceneError
        if the item does not state it.
    """
    stated = item.properties.get("s2:processing_baseline") or item.properties.get("processing:version")
    numbers = tuple(int(n) for n in re.findall(r"\d+", str(stated or "")))
    if not numbers:
        raise SceneError(
            f"item {item.id} does not state its processing baseline (s2:processing_baseline), which decides the offset "
            "of its reflectance; set imagery.sensor.offset to a number if you know it"
        )
    return numbers


def _unknown(item: pystac.Item, asset: pystac.Asset, key: str) -> str:
    return (
        f"item {item.id}: its metadata do not say the {key} of asset {asset.title or asset.href!r}; "
        f"set imagery.sensor.{key} to a number if you know it"
    )


def implausible(reflectance: np.ndarray, names: list[str]) -> str | None:
    """Why reflectances (bands, H, W), NaN where missing, can not be right; None where they can.

    Some items of Earth Search's older collection state an offset that was applied already
    (github.com/Element84/earth-search/issues/71): dark ground then falls far below zero.
    """
    for values, name in zip(reflectance, names, strict=True):
        valid = np.isfinite(values)
        n = int(valid.sum())
        if n and (middle := float(np.median(values[valid]))) > BRIGHT:
            return (
                f"half of its {name} pixels are above {middle:.0f} in reflectance, which no ground is: the scale that "
                "its metadata state is not that of the file; set imagery.sensor.scale and offset"
            )
        if n and (bright := float(np.percentile(values[valid], 95))) < DARK and bright > NEGATIVE:
            return (
                f"95% of its {name} pixels are below {bright:.5f} in reflectance: the scale that its metadata state "
                "seems to be applied in the file already; set imagery.sensor.scale and offset"
            )
        low = int((values[valid] < NEGATIVE).sum())
        if n and low > NEGATIVE_SHARE * n:
            return (
                f"{100 * low / n:.0f}% of its {name} pixels are below {NEGATIVE} in reflectance: the offset that its "
                "metadata state seems to be applied already; choose another collection, or set imagery.sensor.offset"
            )
    return None
