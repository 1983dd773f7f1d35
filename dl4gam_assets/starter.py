"""A first region file from an inventory: what `dl4gam new` writes.

Belongs here: guessing an inventory's columns, the text of a starter region. Does not belong here: settings themselves
(``settings``), words of the command line (``cli``).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dl4gam_assets.settings import InventorySettings, SettingsError, parse_region

#: Column names of common inventories (RGI 5 to 7, GLIMS, SGI, Paul et al. 2020), in the order of preference.
KNOWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "glacier_id": (
        "glacier_id",
        "rgi_id",
        "rgiid",
        "glac_id",
        "glims_id",
        "glimsid",
        "sgi-id",
        "sgi",
        "entry_id",
        "id",
    ),
    "name": ("name", "glac_name", "glacier_name"),
    "country": ("country", "country_code", "cenlon_country", "state"),
    "date": ("date", "src_date", "bgndate", "anlys_time", "acq_date", "image_date", "date_text", "year_acquired"),
    "area_km2": ("area_km2", "area", "db_area"),
}


@dataclass(frozen=True)
class InventorySummary:
    """What an inventory file holds, as far as the settings understand it."""

    glaciers: int
    modelled: int
    area_km2: float
    modelled_km2: float
    rejected: pd.DataFrame
    utm_zones: int
    with_date: int
    first_date: dt.date | None
    last_date: dt.date | None


def guess_columns(names: Sequence[str]) -> dict[str, str | None]:
    """The file's column for each of ours: an exact known name first (whatever its case), None where there is none."""
    lower = {name.lower(): name for name in reversed(list(names))}
    return {ours: next((lower[k] for k in known if k in lower), None) for ours, known in KNOWN_COLUMNS.items()}


def summarize_inventory(path: Path, settings: InventorySettings) -> InventorySummary:
    """Read an inventory as the platform will.

    Raises
    ------
    SettingsError
        if it can not be read.
    """
    from dl4gam_assets.inventory import read_inventory

    glaciers, rejected = read_inventory(path, settings)
    dates = glaciers["inventory_date"].dropna()
    large = glaciers[glaciers["modelled"].astype(bool)]
    return InventorySummary(
        glaciers=len(glaciers),
        modelled=len(large),
        area_km2=float(glaciers["inventory_area_km2"].sum()),
        modelled_km2=float(large["inventory_area_km2"].sum()),
        rejected=rejected,
        utm_zones=int(glaciers["utm_epsg"].nunique()),
        with_date=len(dates),
        first_date=dates.min().date() if len(dates) else None,
        last_date=dates.max().date() if len(dates) else None,
    )


def starter_region(
    name: str,
    inventory: Path,
    columns: dict[str, str | None],
    *,
    layer: str | None = None,
    preset: str = "earth-search-sentinel-2-c1-l2a",
    first: int,
    last: int | None,
    baseline: int,
) -> str:
    """Text of a region file for an inventory, small network first; every line says what to change for more.

    Raises
    ------
    SettingsError
        if the name can not be one, or there is no such preset.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise SettingsError(f"a region's name is lower case letters, digits, - and _ (given: {name!r})")
    shown = {ours: column for ours, column in columns.items()}
    lines = [f"    {ours}: {_yaml(column)}" for ours, column in shown.items()]
    landsat = "landsat" in preset
    dem = "planetary-computer" if preset.startswith("planetary") else "earth-search"
    text = f"""\
# Written by `dl4gam new`. `dl4gam settings --region FILE` prints all keys with their defaults; regions/alps.yaml of the
# package is the published configuration with the source of every number.

name: {name}
title: {name}
data_root: {inventory.resolve().parent}

years:
  first: {first}
  last: {_yaml(last)}          # null: up to the present year
  baseline: {baseline}      # its images follow the inventory's own dates

inventory:
  path: {inventory.name}
  layer: {_yaml(layer)}
  source: ""          # citation of the inventory: goes into lineage and report
  columns:
{chr(10).join(lines)}
  min_area_km2: 0.1
  debris: []          # outlines or rasters of debris cover: [{{path: debris.gpkg}}]

imagery:
  preset: {preset}
  window: ["08-01", "10-15"]    # end of the ablation season: adapt to your mountains
  baseline: {{mode: inventory_date, tolerance_days: 45}}

terrain:
  dem_catalog: {{preset: {dem}-cop-dem-glo-30}}
  dem_source: Copernicus DEM GLO-30
  elevation_change: []  # Hugonnet et al. 2021: [{{path: dhdt/, start: 2010, end: 2015}}, ...]

folds: {{n: 5, validation_share: 0.1}}

# A small network for a first look on a laptop. For results, delete `model` and `training` (the defaults are those of
# the paper: U-Net with ResNet-34, 10 members, 30 epochs) and use a GPU.
model:
  encoder: tu-regnetx_002
  encoder_depth: 3
  decoder_channels: [32, 16, 8]
  encoder_weights: null
training:
  members: 3
  patch_px: {64 if landsat else 128}
  train_patches: 1024
  epochs: 10
  learning_rate: 5.0e-3
  schedule: one_cycle
  augmentation: true

compute:
  partitions_per_run: 50
"""
    import yaml

    parse_region(yaml.safe_load(text), "the new region")
    return text


def _yaml(value: Any) -> str:
    import json

    return "null" if value is None else json.dumps(value)
