"""The typed records of where estimates come from.

Belongs here: the record of one estimate (a row of ``lineage``), of one input (a row of the view ``lineage_inputs``),
and of one partition (small enough for the metadata of its materialization).
Does not belong here: gathering them (stages) and telling them (``explanation``).
"""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import BaseModel, ConfigDict


class LineageError(LookupError):
    """There is no such estimate. The message says what there is, or why it failed."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Provenance(_Record):
    """What one estimate (glacier and year) was made from; one row of the table ``lineage``, whose columns say more."""

    glacier_id: str
    year: int
    fold: int
    scene_ids: str
    image_date: dt.datetime
    checksums: str | None
    cube_fingerprint: str
    static_fingerprint: str | None = None
    dhdt_fingerprint: str | None = None
    terrain_key: str | None = None
    dem_source: str | None
    dhdt_source: str | None
    member_sha256: str
    calibration_fingerprint: str
    prediction_fingerprint: str
    tau: float | None = None
    settings_fingerprint: str
    software_fingerprint: str | None = None
    code_version: str
    run_ids: str | None
    time: dt.datetime


Kind = Literal[
    "scene", "elevation", "elevation change", "error of elevation change", "velocity", "weights", "calibration", "taus",
    "normalization", "folds", "inventory", "zones", "debris", "overrides", "settings", "package", "code", "hardware",
    "imported", "materialization", "static layers", "glacier cube", "prediction",
]  # fmt: skip


class InputRecord(_Record):
    """One input of one estimate; one row of the view ``lineage_inputs``."""

    kind: Kind
    name: str
    address: str | None = None
    checksum: str | None = None
    asset: str | None = None
    partition: str | None = None
    run_id: str | None = None
    materialization_id: str | None = None
    code_version: str | None = None
    settings_fingerprint: str | None = None
    software_fingerprint: str | None = None
    hardware: str | None = None
    time: dt.datetime | None = None


class Materialization(_Record):
    """One materialization: whose, when, by which Dagster run, with what, and the fingerprint of what it gave.

    Partitions are made at different times: each has the settings, packages and hardware of its own.
    """

    asset: str
    partition: str
    output: str
    run_id: str | None
    materialization_id: str | None
    code_version: str | None
    settings_fingerprint: str | None = None
    software_fingerprint: str | None = None
    hardware: str | None = None
    time: dt.datetime | None


class PartitionRecord(_Record):
    """What the estimates of one year and fold have in common: travels in the metadata of their materialization."""

    year: int
    fold: int
    estimates: int
    images: int
    scenes: int
    terrain_tiles: int
    weights: list[str]
    calibration: str
    settings: str
    software: str
    hardware: str
    code_version: str
    lineage: str
    made_from: list[Materialization]
