"""Names that the published files use.

Belongs here: bands, channels, masks, patterns of file names. Does not belong here: reading.
"""

from __future__ import annotations

import datetime as dt
import re

#: Bands of the published cubes in their order: Sentinel-2 Level 1C, all 13.
BAND_NAMES = ("B1", "B", "G", "R", "B5", "B6", "B7", "NIR", "B8A", "B9", "B10", "SWIR", "B12")
#: Our names of these bands.
PUBLISHED_BAND = {
    "coastal": "B1", "blue": "B", "green": "G", "red": "R", "rededge1": "B5", "rededge2": "B6", "rededge3": "B7",
    "nir": "NIR", "nir08": "B8A", "nir09": "B9", "cirrus": "B10", "swir16": "SWIR", "swir22": "B12",
}  # fmt: skip
OUR_BAND = {theirs: ours for ours, theirs in PUBLISHED_BAND.items()}
#: Earlier settings of theirs call the bands by Sentinel-2's own numbers.
_NUMBERS = {"B2": "B", "B3": "G", "B4": "R", "B8": "NIR", "B11": "SWIR"}
#: Our names of the layers that cubes hold beside the bands.
LAYERS = (
    "dem", "slope", "aspect", "planform_curvature", "profile_curvature", "terrain_ruggedness_index", "dhdt", "v",
)  # fmt: skip
#: Their names of our channels where they differ.
PUBLISHED_CHANNEL = {**PUBLISHED_BAND, "sin_aspect": "aspect_sin", "cos_aspect": "aspect_cos", "velocity": "v",
                     "ndvi": "NDVI", "ndwi": "NDWI", "ndsi": "NDSI"}  # fmt: skip
OUR_CHANNEL = {theirs: ours for ours, theirs in PUBLISHED_CHANNEL.items()}
#: Reflectance of one step of ``band_data``, and the step that stands for missing values there and elsewhere.
STEP, NODATA = 1e-4, -9999

_DATE = re.compile(r"^(\d{4})-?(\d{2})-?(\d{2})(?!\d)")


class PublishedFileError(RuntimeError):
    """A file that is not in the published layout, or not of this region. The message names it and says why."""


def mask_name(buffer_m: int) -> str:
    """Name of the mask of a glacier with a buffer: ``mask_crt_g``, ``mask_crt_g_b20``, ``mask_crt_g_b-10``."""
    return "mask_crt_g" if buffer_m == 0 else f"mask_crt_g_b{buffer_m}"


def date_of(stem: str) -> dt.datetime | None:
    """Acquisition date at the begin of a file's name, ``2023-08-21`` or ``20230821...``; None where there is none."""
    match = _DATE.match(stem)
    try:
        return dt.datetime(*map(int, match.groups())) if match else None  # type: ignore[arg-type]
    except ValueError:
        return None


def channel_name(theirs: str) -> str:
    """Our name of one of their channels or bands."""
    name = _NUMBERS.get(theirs, theirs)
    return OUR_CHANNEL.get(name, name)
