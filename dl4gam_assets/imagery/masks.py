"""Masks of cloud and cloud shadow, from what comes with an image and from the image itself.

Belongs here: what each mask means (Sentinel-2 scene classification, cloud probability, Landsat QA_PIXEL,
OmniCloudMask), the rule that lets snow and ice overrule a mask, saturation. Arrays in, arrays out.
Does not belong here: reading (``reading`` hands its readers in), scores (``scores``).

The class numbers of the scene classification are Sen2Cor's: 0 no data, 1 saturated or defective, 2 dark or in the shade
of the terrain, 3 cloud shadow, 4 vegetation, 5 bare ground, 6 water, 7 unclassified, 8 and 9 cloud of medium and high
probability, 10 thin cirrus, 11 snow or ice.
The bits of QA_PIXEL are those of Landsat collection 2: 0 fill, 1 dilated cloud, 2 cirrus, 3 cloud, 4 cloud shadow,
5 snow, 6 clear, 7 water.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pystac

from dl4gam_assets.imagery.catalogs import asset_of
from dl4gam_assets.imagery.indices import normalized_difference
from dl4gam_assets.settings import OmniCloudMaskSettings, SensorSettings

#: Classes and bits of cloud proper. Only these give way to snow and ice: a shadow on snow has the same NDSI as snow.
CLOUD_CLASSES = (8, 9, 10)
CLOUD_BITS = (1, 2, 3)
#: Classes that say something of a pixel; 0, or another number, says nothing.
KNOWN_CLASSES = range(1, 12)

#: Reads a mask asset onto the grid: (asset, interpolate) -> float32 (H, W), NaN where its file has no pixel.
MaskReader = Callable[[pystac.Asset, bool], np.ndarray]
#: Reads a band onto the grid: our name -> reflectance float32 (H, W), NaN where missing.
BandReader = Callable[[str], np.ndarray]


class MaskError(RuntimeError):
    """A mask that the settings ask for can not be made here. The message says what to install or to change."""


def mask_assets(sensor: SensorSettings) -> list[str]:
    """Names of the assets that the masks of a sensor are made from."""
    named = (sensor.scene_classification, sensor.cloud_probability, sensor.qa_pixel)
    return [name for name in named if name is not None]


def cloud_of_item(
    item: pystac.Item, sensor: SensorSettings, shape: tuple[int, int], mask: MaskReader, band: BandReader
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cloud and cloud shadow of one item: the union of all masks that the sensor names.

    A pixel of which any of these masks says nothing is unknown: outside its file, or of no class. It is not clean, as
    nobody looked, and not cloud, as another item may show it.

    Parameters
    ----------
    shape : rows and columns of the grid
    mask, band : read a mask asset or a band onto the grid; a band is asked for only where a rule needs it

    Returns
    -------
    cloud : bool (H, W)
    overruled : bool (H, W), pixels that a mask called cloud and that snow and ice took back (never part of ``cloud``)
    unknown : bool (H, W), pixels without a value in one of the masks

    Raises
    ------
    CatalogError
        if the item lacks an asset.
    MaskError
        if OmniCloudMask is asked for and not installed.
    """
    firm: list[np.ndarray] = []  # stays cloud whatever the pixel looks like
    doubted: list[np.ndarray] = []  # gives way where the pixel looks like snow or ice
    silent: list[np.ndarray] = []
    if sensor.scene_classification:
        classes = mask(asset_of(item, sensor.scene_classification), False)
        silent.append(~np.isin(classes, list(KNOWN_CLASSES)))
        gives_way = "scene_classification" in sensor.overruled_masks
        soft, hard = _parted(sensor.cloud_classes, CLOUD_CLASSES if gives_way else ())
        doubted.append(of_classes(classes, soft))
        firm.append(of_classes(classes, hard))
    if sensor.qa_pixel:
        values = mask(asset_of(item, sensor.qa_pixel), False)
        silent.append(np.isnan(values))
        soft, hard = _parted(sensor.qa_bits, CLOUD_BITS if "qa_pixel" in sensor.overruled_masks else ())
        doubted.append(of_bits(values, soft))
        firm.append(of_bits(values, hard))
    if sensor.cloud_probability:
        percent = mask(asset_of(item, sensor.cloud_probability), True)
        silent.append(np.isnan(percent))
        (doubted if "cloud_probability" in sensor.overruled_masks else firm).append(
            percent >= sensor.cloud_probability_min
        )
    if sensor.omnicloudmask is not None:
        firm.append(omnicloudmask(band("red"), band("green"), band("nir"), sensor.omnicloudmask))
    nothing = np.zeros(shape, dtype=bool)
    cloud, maybe, unknown = (_union([nothing, *layers]) for layers in (firm, doubted, silent))
    if not maybe.any():
        return cloud, nothing, unknown
    snow = looks_like_snow(band("green"), band("swir16"), sensor.snow_ndsi_min, sensor.snow_swir_max)
    return _union([cloud, maybe & ~snow]), maybe & snow & ~cloud, unknown


def _parted(chosen: Sequence[int], soft: Sequence[int]) -> tuple[list[int], list[int]]:
    return [c for c in chosen if c in soft], [c for c in chosen if c not in soft]


def _union(masks: Sequence[np.ndarray]) -> np.ndarray:
    out: np.ndarray = np.logical_or.reduce(masks)
    return out


def of_classes(classes: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """Pixels (bool) of any of the chosen classes; missing ones (NaN) are of none."""
    out: np.ndarray = np.isin(classes, list(chosen))
    return out


def of_bits(values: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """Pixels (bool) where any of the bits of a bit-packed integer is set; missing ones (NaN) have none."""
    whole = np.nan_to_num(values, nan=0.0).astype(np.int64)
    wanted = sum(1 << bit for bit in set(bits))
    out: np.ndarray = (whole & wanted) != 0
    return out


def looks_like_snow(green: np.ndarray, swir: np.ndarray, ndsi_min: float, swir_max: float) -> np.ndarray:
    """Pixels (bool) with the spectrum of snow or ice: NDSI at least ``ndsi_min`` and SWIR at most ``swir_max``.

    NDSI = (green - SWIR) / (green + SWIR), reflectances. Ice absorbs at 1.6 micrometres, the droplets of a water cloud
    do not, so such a cloud is bright there; ice clouds lie between. Water looks alike, which does no harm: it is no
    cloud. Missing pixels (NaN) look like nothing.

    Parameters
    ----------
    green, swir : reflectance (H, W)
    """
    with np.errstate(invalid="ignore"):
        out: np.ndarray = (normalized_difference(green, swir) >= ndsi_min) & (swir <= swir_max) & (green > 0)
    return out


def saturated(values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Pixels (bool, H, W) where any band reaches the reflectance at which it saturates.

    Where pixels were interpolated, only those count whose neighbours in the file are all saturated.

    Parameters
    ----------
    values : reflectance (band, H, W), NaN where missing
    limits : reflectance of the saturated digital number, one a band
    """
    with np.errstate(invalid="ignore"):
        reached = values >= (np.asarray(limits, dtype=np.float32) - np.float32(1e-6))[:, None, None]
    out: np.ndarray = np.asarray(reached.any(axis=0))
    return out


def omnicloudmask(
    red: np.ndarray,
    green: np.ndarray,
    nir: np.ndarray,
    settings: OmniCloudMaskSettings,
    custom_models: Any = None,
) -> np.ndarray:
    """Cloud and shadow by OmniCloudMask (its classes: 0 clear, 1 thick cloud, 2 thin cloud, 3 cloud shadow).

    The network needs red, green and near infrared at 10 to 50 m, of any processing level. Its weights are read from
    ``settings.models``; if they are not there the library downloads them into it.

    Parameters
    ----------
    red, green, nir : reflectance (H, W), NaN where missing
    custom_models : networks to use in place of the library's own

    Returns
    -------
    bool (H, W), pixels of ``settings.classes``; missing pixels are false (they are counted as missing).

    Raises
    ------
    MaskError
        if the library is not installed, or can not be imported.
    """
    try:
        from omnicloudmask import predict_from_array
    except ImportError as error:
        raise MaskError(
            "sensor.omnicloudmask is set, but OmniCloudMask is not installed: install the extra "
            "(pip install 'dl4gam_assets[omnicloudmask]') or set sensor.omnicloudmask to null"
        ) from error
    except RuntimeError as error:  # torchvision, which it imports, was built for another torch
        raise MaskError(
            f"OmniCloudMask is installed but can not be imported ({error}): install fitting torchvision"
        ) from error
    stack = np.stack([red, green, nir]).astype(np.float32)
    absent = ~np.isfinite(stack).all(axis=0)
    # The library takes 0 for no data, and digital numbers; the network normalizes what it gets.
    numbers = np.where(absent, 0, np.maximum(stack * 10_000, 1)).astype(np.float32)
    shortest = min(numbers.shape[1:])
    classes = predict_from_array(
        numbers,
        patch_size=max(min(1000, shortest), 32),  # 32 is the least that the library takes
        patch_overlap=min(300, max(shortest, 32) // 2),
        inference_device=settings.device,
        destination_model_dir=settings.models,
        model_version=settings.version,
        custom_models=custom_models,
    )
    return of_classes(np.where(absent, np.nan, np.asarray(classes)[0]), settings.classes)
