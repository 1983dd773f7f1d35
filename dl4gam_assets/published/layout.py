"""Names that the published files use.

Belongs here: bands, channels, masks, patterns of file names. Does not belong here: reading.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence

#: Bands of the published cubes in their order: Sentinel-2 Level 1C, all 13.
BAND_NAMES = ("B1", "B", "G", "R", "B5", "B6", "B7", "NIR", "B8A", "B9", "B10", "SWIR", "B12")
#: Our names of these bands.
PUBLISHED_BAND = {
    "coastal": "B1", "blue": "B", "green": "G", "red": "R", "rededge1": "B5", "rededge2": "B6", "rededge3": "B7",
    "nir": "NIR", "nir08": "B8A", "nir09": "B9", "cirrus": "B10", "swir16": "SWIR", "swir22": "B12",
}  # fmt: skip
#: Earlier settings of theirs call the bands by Sentinel-2's own numbers.
_NUMBERS = {"B2": "B", "B3": "G", "B4": "R", "B8": "NIR", "B11": "SWIR"}
_PADDED = re.compile(r"^B0(?=\d$)")
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

_DATE = re.compile(r"(\d{4})-(\d{2})-(\d{2})(?!\d)|(\d{4})(\d{2})(\d{2})")
_DATES_IN_NAME = re.compile(r"(?<!\d)(?:\d{8}(?:\d{6})?|\d{4}-\d{2}-\d{2})(?!\d)")
#: Years that an image from space can be of.
_YEARS = range(1972, 2101)


class PublishedFileError(RuntimeError):
    """A file that is not in the published layout, or not of this region. The message names it and says why."""


def mask_name(buffer_m: int) -> str:
    """Name of the mask of a glacier with a buffer: ``mask_crt_g``, ``mask_crt_g_b20``, ``mask_crt_g_b-10``."""
    return "mask_crt_g" if buffer_m == 0 else f"mask_crt_g_b{buffer_m}"


def date_of(stem: str) -> dt.datetime | None:
    """Acquisition date at the begin of a file's name: ``2023-08-21``, ``20230821``, ``20230821T102559``,
    ``20230821102559``; None where there is none, or none that an image can have."""
    match = _DATE.match(stem)
    try:
        date = dt.datetime(*(int(part) for part in match.groups() if part is not None)) if match else None  # type: ignore[arg-type]
    except ValueError:
        return None
    return date if date is not None and date.year in _YEARS else None


def dates_in(name: str) -> set[dt.date]:
    """Dates anywhere in the name of an image: 8 digits, 14 digits, or with dashes."""
    found = (date_of(text) for text in _DATES_IN_NAME.findall(name))
    return {date.date() for date in found if date is not None}


def channel_name(theirs: str) -> str:
    """Our name of one of their channels or bands, also by Sentinel-2's own numbers (``B4``, ``B04``)."""
    plain = _PADDED.sub("B", theirs)
    name = _NUMBERS.get(plain, plain)
    return OUR_CHANNEL.get(name, name)


def layers_of(channels: Sequence[str]) -> list[str]:
    """Layers beside the bands that a cube must hold for these channels of ours, in the order of the published ones."""
    layers = {"sin_aspect": "aspect", "cos_aspect": "aspect", "velocity": "v"}
    wanted = {layers.get(c, c) for c in channels}
    return [layer for layer in LAYERS if layer in wanted]
