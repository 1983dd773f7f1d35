"""Region settings: everything that a user chooses, read from one YAML file and checked.

Belongs here: the pydantic models of a region, reading and checking of the YAML (packaged ``regions/*.yaml`` or a
path), and the fingerprint of settings that goes into the lineage of every result.
Does not belong here: Dagster, file formats, any science. This module is the lowest room; all others may import it.

Every default is the published DL4GAM constant (Diaconu et al. 2025, doi:10.1029/2025EA004197) unless its
description says otherwise.
"""

from __future__ import annotations

import datetime as dt
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

#: The 16 channels of the published models, in their order (METHOD section 3).
PUBLISHED_CHANNELS: tuple[str, ...] = (
    "red", "green", "blue", "nir", "swir16",
    "ndvi", "ndwi", "ndsi",
    "dem",
    "slope", "sin_aspect", "cos_aspect", "planform_curvature", "profile_curvature", "terrain_ruggedness_index",
    "dhdt",
)  # fmt: skip

INDEX_CHANNELS = frozenset({"ndvi", "ndwi", "ndsi"})
TERRAIN_CHANNELS = frozenset(
    {
        "slope",
        "sin_aspect",
        "cos_aspect",
        "planform_curvature",
        "profile_curvature",
        "terrain_ruggedness_index",
    }
)


class SettingsError(ValueError):
    """A region file that can not be used. The message lists each key, the reason and the nearest valid key."""


# --------------------------------------------------------------------------------------------- secrets in addresses
#: Names of query parameters that are passwords, keys, tokens or signatures.
_SECRET_KEY = re.compile(
    r"(^|[-_.])(sig|key|auth|pwd|pass|jwt|sas)$|signature|token|secret|passw|credential|api[-_.]?key|access[-_]?(key|id)"
    r"|subscription|session|authorization",
    re.IGNORECASE,
)
_QUERY = re.compile(r"[?#][^\s'\"<>()]*")
_USER = re.compile(r"(?<=//)[^/@\s'\"]+@")


def secrets_in(text: str) -> list[str]:
    """What a text (an address, or one with addresses in it) holds that is nobody else's business, by name.

    ``name or password`` before the host, and the names of query parameters such as ``api_key``, ``sig`` or
    ``X-Amz-Signature``; empty where there is none.
    """
    found = ["name or password"] if _USER.search(text) else []
    for query in _QUERY.findall(text):
        names = (unquote(part.partition("=")[0]) for part in re.split(r"[?&;#]", query) if "=" in part)
        found += [name for name in names if _SECRET_KEY.search(name)]
    return list(dict.fromkeys(found))


def without_secrets(text: str) -> str:
    """A text without the names and passwords in its addresses, and without each query that holds a secret."""
    return _USER.sub("", _QUERY.sub(lambda query: "" if secrets_in(query[0]) else query[0], text))


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of a setting but those of models in it, which look at their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


class _Strict(BaseModel):
    # Errors of pydantic show what was given, which may be a password.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name in type(self).model_fields:
            for text in _texts(getattr(self, name)):
                found = secrets_in(text) if "//" in text or "/vsi" in text else []
                if found:
                    raise ValueError(
                        f"the address in {name} holds a {found[0]}, and settings are recorded with every result: leave "
                        "it out and give it by the environment (~/.netrc for a name and password, AWS_* or another "
                        "variable of GDAL for files, see docs/catalogs.md)"
                    )
        return self


# --------------------------------------------------------------------------------------------- inventory
class InventoryColumns(_Strict):
    """Names of the inventory file's columns; an absent one is filled as its description says."""

    glacier_id: str = Field("glacier_id", description="Unique text id of the glacier. Required in the file.")
    name: str | None = Field("name", description="Glacier name; empty where absent.")
    country: str | None = Field("country", description="Country code for the totals; `default_country` where absent.")
    date: str | None = Field(
        "date",
        description="Acquisition date: ISO, or RGI's YYYYMMDD with 99 for unknown month or day, or a year (and month).",
    )
    area_km2: str | None = Field(None, description="Area as the inventory states it, kept beside the area we compute.")


class DebrisSource(_Strict):
    """One file of debris outlines, vector or raster. Several are merged."""

    path: str = Field(description="Vector file, or raster of surface types, relative to the region's data_root.")
    layer: str | None = None
    raster_value: int | None = Field(None, description="For a raster: the pixel value that means debris-covered.")


class InventorySettings(_Strict):
    path: str = Field(description="Vector file of glacier outlines, relative to the region's data_root.")
    layer: str | None = None
    prepare: Literal["sgi2016"] | None = Field(
        None,
        description="sgi2016: `path` is the folder of the raw files of the Swiss Glacier Inventory 2016; glaciers are "
        "made from them (ice bodies cut at the divides) before reading.",
    )
    source: str = Field("", description="Citation of the inventory; goes into the lineage and the report.")
    columns: InventoryColumns = InventoryColumns()
    default_country: str = ""
    default_date: dt.date | None = Field(None, description="Used for glaciers without a date.")
    min_area_km2: float = Field(0.1, gt=0, description="Smaller glaciers are not modelled, only extrapolated to.")
    merge_parts: bool = Field(
        False,
        description="Rows that share an id are parts of one glacier: their outlines are united, the attributes of the "
        "largest kept. false: only the first row of an id is used and the others are reported.",
    )
    model_within: list[str] = Field(
        [],
        description="Files (glob patterns below data_root) that show where imagery is: a raster's non-zero pixels or a "
        "vector file's polygons. Glaciers elsewhere stay in the inventory but are not modelled. Empty: no restriction.",
    )
    model_within_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the outline that must lie on valid ground of one file of model_within.",
    )
    debris: list[DebrisSource] = []
    buffers_m: list[int] = Field([-20, -10, 0, 10, 20, 50], description="Zones around the outline, metres.")

    @model_validator(mode="after")
    def _needed_buffers(self) -> InventorySettings:
        missing = {0, 20, 50} - set(self.buffers_m)
        if missing:
            raise ValueError(
                f"buffers_m must contain 0, 20 and 50 m (areas and false-positive ring); missing {missing}"
            )
        return self


# --------------------------------------------------------------------------------------------- imagery
class StacFolder(_Strict):
    """A static STAC catalog on disk."""

    kind: Literal["stac-folder"] = "stac-folder"
    path: str = Field(description="catalog.json, relative to the region's data_root.")


class StacApi(_Strict):
    """A STAC API, searched with pystac-client."""

    kind: Literal["stac-api"] = "stac-api"
    url: str
    collections: list[str]
    query: dict[str, Any] = Field({}, description="STAC query extension, such as {'eo:cloud_cover': {'lt': 90}}.")
    href_prefixes: dict[str, str] = Field(
        {}, description="Beginnings of addresses to replace: a mirror, or s3:// where https:// is wanted."
    )
    page_size: int = Field(100, ge=1, description="Items a page.")
    max_items: int = Field(20_000, ge=1, description="A search that gives more is refused (does the server end?).")
    timeout_s: float = Field(60.0, gt=0, description="Seconds without an answer after which a request is repeated.")

    @field_validator("url")
    @classmethod
    def _is_of_the_web(cls, url: str) -> str:
        if urlsplit(url).scheme not in {"http", "https"}:
            raise ValueError(f"{without_secrets(url)!r} is no address of a STAC API (https://...)")
        return url


class StacGeoparquet(_Strict):
    """A STAC collection in one or several GeoParquet files (stac-geoparquet)."""

    kind: Literal["stac-geoparquet"] = "stac-geoparquet"
    path: str = Field(description="File or glob pattern, relative to the region's data_root.")


class SceneFolder(_Strict):
    """A folder of local multi-band scenes, one file a scene."""

    kind: Literal["scene-folder"] = "scene-folder"
    path: str = Field(".", description="Folder, relative to the region's data_root.")
    pattern: str = Field(
        description="Regular expression on the file's path below `path`, with a named group `date`, and optionally "
        "`scene` (files that share it and the date are one scene) and `suffix` (a key of band_order).",
    )
    band_order: dict[str, list[str]] = Field(
        description="For each value of the group `suffix` ('' where there is none): the file's band names, in order."
    )
    date_format: str = Field("%Y%m%d", description="strptime format of the group `date`.")
    tag: str = Field("", description="A word about the scenes that travels into every lineage (e.g. 'simulated').")

    @model_validator(mode="after")
    def _pattern(self) -> SceneFolder:
        try:
            groups = set(re.compile(self.pattern).groupindex)
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from error
        if "date" not in groups:
            raise ValueError("pattern needs a named group (?P<date>...)")
        if unknown := groups - {"date", "scene", "suffix"}:
            raise ValueError(f"pattern has unknown groups {sorted(unknown)}; known are date, scene, suffix")
        if "suffix" not in groups and set(self.band_order) != {""}:
            raise ValueError("band_order must have the one key '' where pattern has no group suffix")
        return self


Catalog = Annotated[Union[StacFolder, StacApi, StacGeoparquet, SceneFolder], Field(discriminator="kind")]


class OmniCloudMaskSettings(_Strict):
    """The network OmniCloudMask as a cloud mask."""

    models: str | None = Field(
        None,
        description="Folder of its weights; missing ones are downloaded into it. Null: the library's own folder.",
    )
    version: float | None = Field(None, description="Version of the weights; null: the newest that the library knows.")
    classes: list[Annotated[int, Field(ge=0, le=3)]] = Field(
        [1, 2, 3], description="Classes that count as cloud: 1 thick cloud, 2 thin cloud, 3 cloud shadow."
    )
    device: str | None = Field(None, description="Device as torch names it; null: the fastest there is.")


class SensorSettings(_Strict):
    """What the imagery measures and how digital numbers become reflectance."""

    name: str = Field("sentinel-2-l2a", description="Label of the sensor and processing level.")
    bands: dict[str, str] = Field(
        {"blue": "blue", "green": "green", "red": "red", "nir": "nir", "swir16": "swir16"},
        description="Our band name -> asset name in the catalog.",
    )
    scale: float | Literal["metadata"] = Field("metadata", description="DN to reflectance; 'metadata' reads the item.")
    offset: float | Literal["metadata", "sentinel-2-baseline"] = Field(
        "metadata",
        description="Added after scaling. 'metadata' reads the item; 'sentinel-2-baseline': -1000 x scale from "
        "processing baseline 04.00 on, for catalogs of original digital numbers without metadata.",
    )
    nodata: float | None = Field(
        None, description="DN of the bands that means no data, besides what their files and items say."
    )
    pixel_m: float = Field(10.0, gt=0, description="Pixel size of the glacier cubes in metres.")
    resampling: Literal["nearest", "bilinear", "cubic"] = "bilinear"
    scene_classification: str | None = Field(None, description="Asset with the Sentinel-2 scene classification.")
    cloud_classes: list[Annotated[int, Field(ge=0, le=11)]] = Field(
        [3, 8, 9, 10], description="Scene classes that count as cloud or cloud shadow (docs/image-selection.md)."
    )
    cloud_probability: str | None = Field(None, description="Asset with the cloud probability in percent.")
    cloud_probability_min: float = Field(40.0, description="A pixel is cloudy at or above this probability (percent).")
    qa_pixel: str | None = Field(None, description="Asset with Landsat's QA_PIXEL (collection 2).")
    qa_bits: list[Annotated[int, Field(ge=0, le=7)]] = Field(
        [0, 1, 2, 3, 4],
        description="Bits of QA_PIXEL that count as cloud: fill, dilated cloud, cirrus, cloud, shadow. Bit 5 is snow.",
    )
    snow_overrules: list[Literal["scene_classification", "qa_pixel", "cloud_probability"]] = Field(
        ["scene_classification", "qa_pixel"],
        description="Masks whose clouds (not shadows) are not believed where the pixel has the spectrum of snow or "
        "ice: they are known to take bright cold ice for cloud. Empty: masks are taken as they are. The published "
        "code used a cloud probability alone, which by default is never overruled.",
    )
    snow_ndsi_min: float = Field(0.7, ge=-1, le=1, description="Snow or ice for snow_overrules: NDSI at least this...")
    snow_swir_max: float = Field(0.12, gt=0, description="...and SWIR (1.6 micrometres) reflectance at most this.")
    omnicloudmask: OmniCloudMaskSettings | None = Field(
        None, description="Cloud and shadow by OmniCloudMask from red, green, nir (the extra omnicloudmask). Null: off."
    )
    saturated_at: float | None = Field(None, description="DN at which the sensor saturates; counted, not masked.")

    @model_validator(mode="after")
    def _mask_bands(self) -> SensorSettings:
        lacking = {"red", "green", "nir"} - set(self.bands)
        if self.omnicloudmask is not None and lacking:
            raise ValueError(f"omnicloudmask needs the bands {sorted(lacking)}, which bands lacks")
        return self

    @property
    def overruled_masks(self) -> frozenset[str]:
        """The masks that snow and ice may overrule: none without the bands of the NDSI."""
        return frozenset(self.snow_overrules if {"green", "swir16"} <= set(self.bands) else ())


class BaselineDates(_Strict):
    """How the baseline year's images are found."""

    mode: Literal["inventory_date", "window"] = "inventory_date"
    tolerance_days: int = Field(
        15,
        ge=0,
        description="Days around the inventory's own date (or month) that are searched; of a year alone its window.",
    )
    start: dt.date | None = Field(None, description="mode window: first day (may span several years).")
    end: dt.date | None = None

    @model_validator(mode="after")
    def _window(self) -> BaselineDates:
        if self.mode == "window" and (self.start is None or self.end is None or self.start > self.end):
            raise ValueError("mode 'window' needs start and end, start not after end")
        return self


class ScoreWeights(_Strict):
    """What each score counts for in the ranking ``min_max``. Only their ratios matter."""

    cloud: float = Field(1.0, ge=0, description="Of the cloud share.")
    ndsi: float = Field(1.0, ge=0, description="Of the NDSI; where no candidate has one, albedo alone judges snow.")
    albedo: float = Field(1.0, ge=0, description="Of the albedo.")

    @model_validator(mode="after")
    def _any(self) -> ScoreWeights:
        if self.cloud + self.ndsi + self.albedo == 0:
            raise ValueError("one of the weights has to be above 0")
        return self


class SelectionSettings(_Strict):
    """Thresholds and ranking of candidate scenes (METHOD section 2)."""

    coverage_min: float = Field(0.9, ge=0, le=1)
    coverage_geometry: Literal["region_of_interest", "glacier"] = "region_of_interest"
    cloud_max: float = Field(0.3, ge=0, le=1)
    cloud_buffer_m: int = 50
    single_tile_coverage: float = Field(0.98, description="A tile covering this share is taken alone, not mosaicked.")
    min_clean_pixels: int = Field(30, ge=1)
    ranking: Literal["rank_positions", "min_max"] = "rank_positions"
    weights: ScoreWeights = Field(
        ScoreWeights(), description="Of the scores in min_max; equal, as published. rank_positions has none."
    )
    shadow_nir_max: float | None = Field(
        None,
        gt=0,
        description="For imagery without a cloud mask: when images are judged, a pixel counts as cloud where near "
        "infrared is below this reflectance and below shadow_ratio_max times blue (shadow is dark and blue). Cubes "
        "keep such pixels. Null: shadow is not looked for.",
    )
    shadow_ratio_max: float = Field(0.6, gt=0, description="See shadow_nir_max.")
    fallback_cloud_tolerance: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Where no candidate has an NDSI: cloud shares this close to the lowest count as the lowest.",
    )
    overrides: str | None = Field(
        None, description="CSV below data_root (or package:NAME): glacier_id, year, date (or 'reject')."
    )


class ImagerySettings(_Strict):
    preset: str | None = Field(
        None,
        description="A known catalog (docs/catalogs.md): fills catalog and sensor; keys written beside it override.",
    )
    catalog: Catalog
    sensor: SensorSettings = SensorSettings()
    window: tuple[str, str] = Field(("08-01", "10-15"), description="First and last day searched in a year, MM-DD.")
    baseline: BaselineDates = BaselineDates()
    selection: SelectionSettings = SelectionSettings()
    margin_m: float = Field(
        1330.0,
        ge=0,
        description="Cube margin around the outline; by default 128 + 5 pixels: 1330 m at 10 m, 3990 m at 30 m.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("preset") is None:
            return raw
        return _merged(_preset("imagery", str(raw["preset"])), raw)

    @model_validator(mode="after")
    def _margin_of_pixels(self) -> ImagerySettings:
        if "margin_m" not in self.model_fields_set and self.sensor.pixel_m != 10.0:
            object.__setattr__(self, "margin_m", 133 * self.sensor.pixel_m)  # the model is frozen once it is made
        return self

    @model_validator(mode="after")
    def _days(self) -> ImagerySettings:
        for day in self.window:
            if not re.fullmatch(r"\d\d-\d\d", day):
                raise ValueError(f"window day {day!r} is not MM-DD")
            dt.date.fromisoformat(f"2015-{day}")
        if self.window[0] > self.window[1]:
            raise ValueError("window must start before it ends within one calendar year")
        return self

    @model_validator(mode="after")
    def _shadow_bands(self) -> ImagerySettings:
        lacking = {"blue", "nir"} - set(self.sensor.bands)
        if self.selection.shadow_nir_max is not None and lacking:
            raise ValueError(f"selection.shadow_nir_max needs the bands {sorted(lacking)}, which sensor.bands lacks")
        return self


# --------------------------------------------------------------------------------------------- terrain
class ElevationChangePeriod(_Strict):
    """dh/dt of one period: a mosaic, or tiles."""

    path: str | list[str] = Field(
        description="File, folder of tiles, glob pattern, or address with {lat} and {lon} (N46, E007: lower left "
        "corner of a tile of 1 x 1 degree); {start} and {end} are the period's years. Of Hugonnet's tiles in a folder "
        "only those of the period are taken."
    )
    start: int = Field(description="First year of the period (e.g. 2010).")
    end: int
    error_path: str | list[str] | None = Field(
        None, description="The same for the standard error (..._dhdt_err.tif), kept as the cube's layer dhdt_err."
    )


class TerrainSettings(_Strict):
    dem: list[str] = Field(
        [],
        description="DEM files, folders of tiles, glob patterns, or addresses with {lat} and {lon} (N46, E007: lower "
        "left corner of a tile of 1 x 1 degree), mosaicked in order. With dem_catalog empty too: elevation is unknown.",
    )
    dem_catalog: Catalog | None = Field(
        None, description="STAC catalog of DEM tiles (such as cop-dem-glo-30); they come after those of `dem`."
    )
    dem_asset: str = Field("data", description="Asset of dem_catalog's items that holds the elevation.")
    dem_source: str = ""
    dem_nodata: float | None = Field(None, description="No-data value where the DEM's file does not say.")
    smoothing_sigma: float = Field(1.0, ge=0, description="Gaussian before derivatives, in pixels, 3x3 window.")
    elevation_change: list[ElevationChangePeriod] = []
    elevation_change_match: Literal["ended", "nearest_end"] = Field(
        "ended",
        description="The dh/dt period of a year: the latest that has ended by then, or the one that ends nearest "
        "to it. Both give the published choice (2010 to 2015 for 2015, 2015 to 2020 for 2023).",
    )
    elevation_change_source: str = ""
    dhdt_nodata: float | None = Field(
        -9999.0,
        description="No-data value of dh/dt and its error where a file does not say. Rates beyond 100 m/yr, and errors "
        "below 0 or above 100 m/yr, are missing in any case.",
    )
    velocity: list[str] = Field(
        [],
        description="Surface speed in m/yr (ITS_LIVE ..._v.tif), named as `dem`: the cube's layer v and the channel "
        "velocity. Empty: none.",
    )
    velocity_source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _dem_preset(cls, raw: Any) -> Any:
        catalog = raw.get("dem_catalog") if isinstance(raw, dict) else None
        if not isinstance(catalog, dict) or "preset" not in catalog:
            return raw
        filled = _merged(_preset("dem", str(catalog["preset"])), {k: v for k, v in catalog.items() if k != "preset"})
        return {**raw, "dem_catalog": filled}

    @property
    def has_dem(self) -> bool:
        """Whether any elevation is configured."""
        return bool(self.dem) or self.dem_catalog is not None


# --------------------------------------------------------------------------------------------- folds, training
class FoldSettings(_Strict):
    n: int = Field(5, ge=2, description="Iterations of the geographic cross-validation.")
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="Share of the area that separates train and test.")


class ModelSettings(_Strict):
    architecture: str = Field("Unet", description="A segmentation-models-pytorch architecture.")
    encoder: str = Field(
        "resnet34",
        pattern=r"^[A-Za-z0-9_.+-]+$",
        description="One of segmentation-models-pytorch, or of timm as 'tu-<name>'; no hub address or folder.",
    )
    encoder_depth: int = Field(5, ge=1, le=5)
    decoder_channels: list[int] = [256, 128, 64, 32, 16]
    encoder_weights: str | None = Field(
        "imagenet",
        description="'imagenet' (downloaded), a local .safetensors file, or null for random weights.",
    )
    channels: list[str] = Field(list(PUBLISHED_CHANNELS), min_length=1, description="Inputs of the network, in order.")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if len(self.decoder_channels) != self.encoder_depth:
            raise ValueError(f"decoder_channels must have {self.encoder_depth} entries (encoder_depth)")
        if len(set(self.channels)) != len(self.channels):
            raise ValueError("channels must not repeat")
        return self

    @property
    def encoder_weights_file(self) -> Path | None:
        """The local file that ``encoder_weights`` names, if it does."""
        name = self.encoder_weights
        return Path(name).expanduser() if name and name.endswith(".safetensors") else None


class TrainingSettings(_Strict):
    members: int = Field(10, ge=1, description="Ensemble members (seeds) for each fold.")
    patch_px: int = Field(256, ge=32, multiple_of=32)
    train_step_px: int = Field(32, ge=1, description="Patch centres lie where row and column are multiples.")
    validation_step_px: int = Field(64, ge=1, description="Centres of the patches that choose the best epoch.")
    train_patches: int = Field(7488, ge=1, description="Patches drawn once a member, at least one a glacier.")
    batch_size: int = Field(16, ge=1)
    epochs: int = Field(30, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: float = Field(0.0, ge=0, description="Of the optimizer; the published training has none.")
    schedule: Literal["constant", "one_cycle", "cosine"] = Field(
        "constant",
        description="Of the learning rate. 'one_cycle': up from 1/25 over 30 % of the steps, then down to 1/2500; "
        "'cosine': from the full rate down to zero.",
    )
    warmup_share: float = Field(
        0.0, ge=0, lt=1, description="'constant' and 'cosine': share of the steps in which the rate rises from zero."
    )
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after so many epochs without a better validation IoU. null: train all epochs."
    )
    loss: Literal["focal", "bce", "dice", "jaccard", "bce_dice"] = Field(
        "focal", description="Counted on usable pixels only. 'bce_dice' is the sum of both."
    )
    focal_gamma: float = Field(2.0, ge=0)
    focal_alpha: float | None = Field(0.25, gt=0, lt=1, description="Weight of glacier pixels; null: none.")
    augmentation: bool = Field(
        False,
        description="The 8 symmetries of the square. Sine and cosine of the aspect turn with the picture; slope, "
        "curvatures, ruggedness and dh/dt are the same from every side.",
    )
    diversity: Literal["deep_ensemble", "bootstrap"] = Field(
        "deep_ensemble",
        description="What makes members differ. 'deep_ensemble' (published): initial weights, order and choice of "
        "patches. 'bootstrap': also the glaciers, drawn with replacement for each member.",
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "auto", description="'bf16': mixed precision. 'auto': bf16 where the hardware is fast with it, else fp32."
    )
    deterministic: bool = Field(
        True, description="On a GPU: only algorithms that give the same bits every time, at some cost of speed."
    )
    min_members: int | None = Field(
        None,
        ge=1,
        description="An ensemble goes on without members that diverged as long as so many are left. null: all "
        "members are needed.",
    )
    seed: int = 0

    def of_a_member(self) -> dict[str, Any]:
        """What shapes a single member, as plain data."""
        return self.model_dump(mode="json", exclude={"members", "min_members"})

    @model_validator(mode="after")
    def _enough_members(self) -> TrainingSettings:
        if self.min_members is not None and self.min_members > self.members:
            raise ValueError(f"min_members ({self.min_members}) must not be above members ({self.members})")
        return self


class InferenceSettings(_Strict):
    mode: Literal["windows", "stride"] = Field(
        "windows",
        description="'windows': the whole glacier or large blended windows. 'stride': the published averaging, patches "
        "around centres every stride_px of the 50 m zone, the extremes and the centroid.",
    )
    window_px: int = Field(512, ge=64, multiple_of=32, description="mode 'windows': largest side of a window.")
    context_px: int | None = Field(
        None,
        ge=0,
        description="mode 'windows': only the box of the 50 m zone and so many pixels around it are mapped, in all "
        "years; quality in the full scene is then judged there only. null: the whole cube.",
    )
    overlap_px: int = Field(
        64, ge=0, validate_default=True, description="mode 'windows': what neighbours share at least."
    )
    patch_px: int = Field(256, ge=32, multiple_of=32, description="mode 'stride': side of a patch.")
    stride_px: int = Field(32, ge=1, description="mode 'stride' only.")
    margin_share: float = Field(
        0.05, ge=0, lt=0.5, validate_default=True, description="mode 'stride': share of a patch dropped on each side."
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "auto", description="'auto': bf16 where the hardware is fast with it; fp32 in mode 'stride', as published."
    )
    keep_members: bool = Field(
        False, description="Keep each member's probabilities as further bands of the maps. Memory then grows with them."
    )
    fill: Literal["nearest", "elevation"] = "nearest"
    fill_neighbours: int = Field(30, ge=1)
    threshold: float = Field(0.5, gt=0, lt=1)

    @field_validator("overlap_px")
    @classmethod
    def _windows_move_on(cls, overlap: int, info: ValidationInfo) -> int:
        window = info.data.get("window_px")
        if window is not None and overlap > window - 32:
            raise ValueError(
                f"must be at least 32 below window_px ({window}): windows lie at multiples of 32 pixels, "
                "as the encoder's grid does"
            )
        return overlap

    @field_validator("margin_share")
    @classmethod
    def _patches_meet(cls, margin: float, info: ValidationInfo) -> float:
        patch, stride = info.data.get("patch_px"), info.data.get("stride_px")
        if patch is not None and stride is not None and stride > patch - 2 * int(patch * margin):
            raise ValueError(
                f"patches of patch_px ({patch}) less the margins do not meet every stride_px ({stride}): "
                "lower stride_px or margin_share"
            )
        return margin


class BaselineSettings(_Strict):
    """The classical methods that every evaluation shows beside the ensemble."""

    random_forest: bool = Field(True, description="A Random Forest on the model's channels, one a fold.")
    trees: int = Field(32, ge=1)
    pixels: int = Field(
        20000, ge=100, description="Training pixels of a fold's forest, the same number from each glacier."
    )
    min_leaf_px: int = Field(5, ge=1, description="Pixels in a leaf at least.")


class CalibrationSettings(_Strict):
    temperature_bounds: tuple[float, float] = (0.5, 5.0)
    pixel_share: float = Field(0.1, gt=0, le=1, description="Share of the validation pixels used for temperature.")
    coverage: float = Field(0.6827, gt=0, lt=1, description="Target coverage of the area interval.")
    tau_step: float = 0.001
    tau_max: float = 0.5
    min_glaciers: int = Field(
        30,
        ge=6,
        description="With fewer validation glaciers in a fold the regression of tau (five coefficients) is replaced by "
        "one regional quantile.",
    )
    pool_folds: bool = Field(
        True,
        description="That quantile is of the validation glaciers of all folds, each judged by models that did not "
        "train on it, without the glaciers that the fold tests; false: of the fold's own alone.",
    )
    ece_bins: int = 40
    intervals: Literal["published", "conformal"] = Field(
        "published",
        description="Which tau makes the interval of an area. 'published': quantile regression on four features. "
        "'conformal': the rank of the covering taus of validation glaciers of the same size and debris class, which "
        "keeps its coverage with any number of them. Both are in the table `taus` (docs/validation.md).",
    )
    conformal_size_edges_km2: list[float] = Field(
        [0.5, 2.0], description="Edges between the size classes of conformal intervals (inventory area)."
    )
    conformal_debris_min: float = Field(
        0.1, gt=0, le=1, description="Debris share of the outline from which a glacier is in the debris-covered class."
    )
    conformal_min_glaciers: int = Field(
        10, ge=3, description="A group with fewer validation glaciers is replaced by a coarser one."
    )
    conformal_pool_folds: bool = Field(
        True,
        description="Groups with too few validation glaciers in their own fold take those of all folds, each judged by "
        "models that did not train on it, without the glaciers that the fold tests.",
    )


class AreaSettings(_Strict):
    """How areas and outlines are measured on the map (docs/areas.md)."""

    pixels: Literal["whole", "fractional"] = Field(
        "whole",
        description="'whole': a pixel counts if its centre lies in the outline or its 20 m zone (published). "
        "'fractional': pixels on an ice divide or on the zone's outer edge count by the share that is covered.",
    )
    shared_ground: Literal["each", "once"] = Field(
        "each",
        description="Ground inside several outlines of an inventory that overlap: 'each' of the glaciers counts it (as "
        "published), or it counts 'once', for the first of them in the inventory. Other ground always goes to the "
        "nearest outline.",
    )
    simplify_m: float = Field(
        0.0,
        ge=0,
        description="Outlines lose corners whose triangle is smaller than the square of this length (metres; from 0.8 "
        "pixels on the steps of pixels go). Lower, best and upper stay nested. 0: outlines follow the pixels.",
    )


class ChangeSettings(_Strict):
    """Rates, quality flags, totals and trends (METHOD sections 9 and 11)."""

    dates: Literal["decimal_years", "whole_years"] = Field(
        "decimal_years", description="'whole_years' is the published choice (METHOD section 11)."
    )
    snr_min: float = Field(1.0, ge=0, description="Flag `snr`: the change is smaller than this times its deviation.")
    recall_min: float = Field(0.9, ge=0, le=1, description="Flag `recall`: less of the inventory was found again.")
    usable_min: float = Field(
        0.7, ge=0, le=1, description="Flag `cloud`: less of the glacier and its 20 m zone was seen, in either image."
    )
    filled_max: float = Field(0.3, ge=0, le=1, description="Flag `filled`: more of the map was filled, in either year.")
    growth_max: float = Field(
        2.0, ge=0, description="Flag `growth`: the glacier grew by more than this times the deviation of its change."
    )
    filter: list[Literal["snr", "recall", "cloud", "filled", "growth"]] = Field(
        ["snr", "recall"],
        description="Flags that keep a glacier out of `filtered` and `extrapolated` totals (published: snr, recall). "
        "Every flag is a column all the same.",
    )
    between_glacier_correlation: float = Field(
        1.0, ge=0, le=1, description="Of errors: 1: fully dependent (published); 0: independent."
    )
    correlation_length_km: float | None = Field(
        None,
        gt=0,
        description="The correlation decays with distance as exp(-d / length). null: the same for any two glaciers.",
    )
    between_year_correlation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Of a glacier's errors in two years: 0: independent (published). What an ensemble gets wrong in "
        "the same way in every image (debris, shade, the outline it was trained on) cancels in a change.",
    )
    baseline_error: Literal["left_out", "carried"] = Field(
        "left_out",
        description="Of the baseline area as the divisor of a rate in percent. 'left_out' (published) states too much "
        "where glaciers shrink: too small a baseline makes the loss look small, and its share large.",
    )
    trend_min_years: int = Field(3, ge=3, description="A trend needs images of so many years.")
    trend_bootstrap: int = Field(300, ge=50, description="Resamples behind the interval of the Theil-Sen trend.")
    size_class_edges_km2: list[float] = [0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    sieve_px: int = Field(10, ge=0, description="Smaller patches are removed from outlines.")


# --------------------------------------------------------------------------------------------- the rest
class YearSettings(_Strict):
    first: int = Field(ge=1972, le=2100)
    last: int | None = Field(None, description="null: up to the current year.")
    baseline: int

    @model_validator(mode="after")
    def _order(self) -> YearSettings:
        if self.last is not None and self.last < self.first:
            raise ValueError("last must not be before first")
        if self.baseline < self.first or (self.last is not None and self.baseline > self.last):
            raise ValueError("baseline must be one of the years")
        return self

    def all(self, today: dt.date | None = None) -> list[int]:
        """Calendar years from the first to the last, or to the present one."""
        last = self.last if self.last is not None else (today or dt.date.today()).year
        return list(range(self.first, last + 1))


class SimulationSettings(_Strict):
    """Only for simulated regions: how the inputs are made. The result is named as simulated everywhere."""

    kind: Literal["demo", "drape"] = "demo"
    seed: int = 7
    size_px: tuple[int, int] | None = None
    outlines: str | None = Field(None, description="drape: real outlines, relative to data_root.")
    outlines_layer: str | None = None
    id_column: str | None = None
    dem: str | None = Field(None, description="drape: real DEM, relative to data_root.")


class EvaluationSettings(_Strict):
    note: str = Field("", description="A sentence shown wherever the figures are shown: what they can not tell.")
    reference: str | None = Field(
        None,
        description="A second inventory's outlines (vector file below data_root) that judges the baseline year too.",
    )
    reference_layer: str | None = None
    reference_source: str = Field("", description="Citation of the second inventory.")
    debris_covered_min: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of debris in the outline from which a glacier counts as debris-covered where quality is "
        "shown apart for debris-covered and clean glaciers. Ours; the published figures are not split.",
    )


class Author(_Strict):
    """A person or an organization to be cited."""

    family: str = Field("", description="Family name of a person.")
    given: str = Field("", description="Given names of a person.")
    name: str = Field("", description="Name of an organization, instead of a person's.")
    orcid: str | None = Field(
        None, pattern=r"^\d{4}-\d{4}-\d{4}-\d{3}[\dX]$", description="ORCID, 0000-0000-0000-0000."
    )
    affiliation: str = ""

    @model_validator(mode="after")
    def _one_name(self) -> Author:
        if bool(self.name) == bool(self.family):
            raise ValueError("needs `family` (a person) or `name` (an organization), one of them")
        return self


class PublicationSettings(_Strict):
    """What results are handed on with. Never part of a result's fingerprint."""

    license: Literal["CC-BY-4.0", "CC0-1.0", "ODbL-1.0"] = Field(
        "CC-BY-4.0", description="Licence of the published data, by its SPDX name; check it against your inputs' terms."
    )
    authors: list[Author] = Field([], description="Who is cited for the data set; the region's name where empty.")
    title: str = Field("", description="Title of the data set; made of the region's title where empty.")
    doi: str | None = Field(None, pattern=r"^10\.\d{4,9}/\S+$", description="DOI of the data set, once it has one.")
    version: str = Field("", description="Version of the data set; the year where empty.")
    report_glaciers: int = Field(
        24,
        ge=0,
        le=200,
        description="Glaciers whose chosen images and origin a year's report holds: about 20 kB a year and glacier.",
    )
    leave_out: list[str] = Field(
        [],
        description="Tables that results.duckdb holds empty, for regions of tens of thousands of glaciers: candidates, "
        "scenes, zones and outlines are most of its size. Their Parquet files stay in the store.",
    )

    @field_validator("leave_out")
    @classmethod
    def _not_the_core(cls, names: list[str]) -> list[str]:
        kept = {"glaciers", "areas", "changes", "regional_changes", "failures"} & set(names)
        if kept:
            raise ValueError(f"{sorted(kept)} can not be left out: views and the report need them")
        return names


class ComputeSettings(_Strict):
    """How much work at once. Never part of a result's fingerprint."""

    workers: int = Field(0, ge=0, description="Processes for glacier maps; 0: one for each core.")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    gpus: int = Field(0, ge=0, description="GPUs that ensemble members are trained on; 0: all there are.")
    members_at_once: int = Field(
        0,
        ge=0,
        description="Members trained at once on each GPU, or on the CPU, where they share the cores. 0: 1 on a GPU; on "
        "the CPU `workers`, but no more than a run has partitions (`partitions_per_run`) or the region members.",
    )
    training_data: Literal["auto", "mapped", "resident"] = Field(
        "auto",
        description="Where the layers lie while training: in memory-mapped files, or whole in the device's memory. "
        "'auto': on a GPU resident if they take less than half of its free memory.",
    )
    partitions_per_run: int = Field(
        1,
        ge=1,
        description="Partitions that one Dagster run takes; small regions take many to save start-up time.",
    )
    retries: int = Field(
        3, ge=0, description="How often Dagster tries a step again in which a server did not answer. 0: never."
    )
    retry_delay_s: float = Field(60.0, ge=0, description="Seconds before the first of these attempts; then doubled.")
    concurrent_reads: int = Field(
        0,
        ge=0,
        description="Image files that one process reads at once. 0: 16 where they are on a network, 1 where they are "
        "local files, since the processes keep the cores busy already.",
    )
    read_attempts: int = Field(6, ge=1, description="How often a file on a network is asked for before it is given up.")
    read_stall_s: float = Field(
        20.0, ge=1, description="Seconds without progress that end a request for a file, which is then repeated."
    )


class Region(_Strict):
    """All settings of a region."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    title: str = ""
    description: str = ""
    data_root: str | None = Field(
        None,
        description="Folder of the inputs; ~ and $VARIABLES are expanded. null: <store>/inputs (simulated).",
    )
    years: YearSettings
    inventory: InventorySettings
    imagery: ImagerySettings
    terrain: TerrainSettings = TerrainSettings()
    folds: FoldSettings = FoldSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    inference: InferenceSettings = InferenceSettings()
    baseline: BaselineSettings = BaselineSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    areas: AreaSettings = AreaSettings()
    change: ChangeSettings = ChangeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    simulation: SimulationSettings | None = None
    publication: PublicationSettings = PublicationSettings()
    compute: ComputeSettings = ComputeSettings()

    @model_validator(mode="after")
    def _channels_exist(self) -> Region:
        bands = set(self.imagery.sensor.bands)
        needs = {"ndvi": {"nir", "red"}, "ndwi": {"green", "nir"}, "ndsi": {"green", "swir16"}}
        known = bands | {"dem", "dhdt", "velocity"} | TERRAIN_CHANNELS
        for channel in self.model.channels:
            if channel in needs:
                lacking = needs[channel] - bands
                if lacking:
                    raise ValueError(
                        f"model.channels: {channel} needs the bands {sorted(lacking)}, which the sensor lacks"
                    )
            elif channel not in known:
                raise ValueError(
                    f"model.channels: {channel!r} is neither a band of the sensor nor a known layer; "
                    f"did you mean {_nearest(channel, known | set(needs))!r}?"
                )
            elif channel in TERRAIN_CHANNELS | {"dem"} and not self.terrain.has_dem and self.simulation is None:
                raise ValueError(f"model.channels: {channel} needs terrain.dem or terrain.dem_catalog")
            elif channel == "velocity" and not self.terrain.velocity:
                raise ValueError("model.channels: velocity needs terrain.velocity")
        lone = {"sin_aspect", "cos_aspect"} & set(self.model.channels)
        if self.training.augmentation and len(lone) == 1:
            raise ValueError(
                f"model.channels: training.augmentation turns the aspect, which needs both sin_aspect and cos_aspect; "
                f"there is only {lone.pop()}"
            )
        return self

    def fingerprint(self, *sections: str) -> str:
        """Short hash of the named sections, stable across key order.

        None named: all but ``compute``, ``data_root`` and ``publication``, which change no result.
        """
        names = sections or tuple(
            n for n in type(self).model_fields if n not in {"compute", "data_root", "publication"}
        )
        # A preset's name changes nothing, what it expands to does.
        dumped = self.model_dump(mode="json", exclude={"imagery": {"preset"}})
        content = {name: dumped[name] for name in sorted(names)}
        return fingerprint(content)


def fingerprint(content: Any) -> str:
    """First 16 hex digits of the SHA-256 of ``content`` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------- reading
@functools.cache
def presets() -> dict[str, dict[str, dict[str, Any]]]:
    """Known catalogs: ``imagery`` and ``dem``, by name (presets.yaml)."""
    text = (resources.files("dl4gam_assets") / "presets.yaml").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return loaded


def _preset(kind: str, name: str) -> dict[str, Any]:
    known = presets()[kind]
    if name not in known:
        near = _nearest(name, known)
        hint = f"; did you mean {near!r}?" if near else f"; there are {', '.join(sorted(known))}"
        raise ValueError(f"there is no preset {name!r}{hint}")
    return known[name]


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``: mappings are merged key by key, but for a catalog of another kind and the list of
    bands, which replace."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        whole = key == "bands" or (
            isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) != old.get("kind")
        )
        out[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) and not whole else value
    return out


def packaged_regions() -> list[str]:
    """Names of the regions shipped with the package."""
    folder = resources.files("dl4gam_assets") / "regions"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_region(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Region:
    """Read a region by packaged name or by path of a YAML file.

    ``overrides`` are dotted keys (``{"training.epochs": 3}``) set after the file was read.

    Raises
    ------
    SettingsError
        if the file is absent, is no YAML mapping, or a key or value is wrong.
    """
    text, where = _region_text(str(name_or_path))
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2016-02-31
        raise SettingsError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise SettingsError(f"{where} must be a YAML mapping of settings")
    override(raw, overrides or {})
    return parse_region(raw, where)


def override(raw: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set settings of a mapping in place, by dotted key (``{"training.epochs": 3}``)."""
    for key, value in overrides.items():
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value


def parse_region(raw: Mapping[str, Any], where: str = "settings") -> Region:
    """Check a mapping of settings; raises :class:`SettingsError` with one line for each wrong key."""
    try:
        return Region.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise SettingsError(f"{where}:\n  " + "\n  ".join(lines)) from error


def _region_text(name: str) -> tuple[str, str]:
    if name in packaged_regions():
        resource = resources.files("dl4gam_assets") / "regions" / f"{name}.yaml"
        return resource.read_text(encoding="utf-8"), f"packaged region {name!r}"
    path = Path(os.path.expandvars(name)).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} can not be read as text in UTF-8: {error}") from error
    near = _nearest(name, packaged_regions())
    hint = f" Did you mean {near!r}?" if near else ""
    raise SettingsError(
        f"no region {name!r}: neither a packaged region ({', '.join(packaged_regions())}) nor a YAML file.{hint}"
    )


def _explain(error: Any) -> str:
    # Names of discriminated union members appear in loc; they are no keys of the file.
    loc = [
        str(part)
        for part in error["loc"]
        if str(part) not in {"stac-folder", "stac-api", "stac-geoparquet", "scene-folder"}
    ]
    key = ".".join(loc) or "(top level)"
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(loc[:-1])
        near = _nearest(loc[-1], valid)
        hint = f"; did you mean {near!r}?" if near else f"; valid keys: {', '.join(sorted(valid))}"
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: required, but absent"
    given = error.get("input")
    shown = "" if isinstance(given, dict) else " (given: " + without_secrets(repr(given)[:300]) + ")"
    return f"{key}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _valid_keys(loc: Iterable[str]) -> set[str]:
    models: list[type[BaseModel]] = [Region]
    for part in loc:
        if part.isdigit():
            continue
        models = [m for model in models if part in model.model_fields
                  for m in _models_of(model.model_fields[part].annotation)]  # fmt: skip
    return {name for model in models for name in model.model_fields}


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [m for arg in get_args(annotation) for m in _models_of(arg)]


def _nearest(word: str, valid: Iterable[str]) -> str | None:
    matches = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None
