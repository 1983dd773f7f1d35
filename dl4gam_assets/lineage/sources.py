"""The inputs of an estimate, by name: expanding the table ``lineage_sources``.

Belongs here: which rows of ``lineage_sources`` belong to an estimate. Does not belong here: writing them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from dl4gam_assets.lineage.records import InputRecord, Provenance
from dl4gam_assets.storage import Storage, safe_name

#: Kinds in the order in which a reader asks for them: pixels, ground, models, rules, code.
ORDER = (
    "scene", "glacier cube", "static layers", "elevation", "elevation change", "error of elevation change", "velocity",
    "inventory", "zones", "debris", "overrides", "folds", "normalization", "weights", "calibration", "taus",
    "prediction", "imported", "settings", "code", "package", "hardware", "materialization",
)  # fmt: skip


def plain_row(row: pd.Series) -> dict[str, Any]:
    """A table row as plain Python values, None where there is none."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if value is None or (not isinstance(value, str) and pd.isna(value)):
            out[str(key)] = None
        elif isinstance(value, pd.Timestamp):
            out[str(key)] = value.to_pydatetime()
        elif hasattr(value, "item"):
            out[str(key)] = value.item()
        else:
            out[str(key)] = value
    return out


def inputs_of(storage: Storage, provenance: Provenance) -> list[InputRecord]:
    """Every input of an estimate, pixels first; only cube and prediction where the store is of an older version."""
    p = provenance
    sources = storage.read_table("lineage_sources", year=p.year, fold=p.fold)
    mine = (
        (sources["scope"] == "all")
        | ((sources["scope"] == "image") & (sources["scope_key"] == p.scene_ids))
        | ((sources["scope"] == "terrain") & (sources["scope_key"] == (p.terrain_key or "")))
    )
    rows = sources[mine.to_numpy(dtype=bool)].drop(columns=["year", "fold", "scope", "scope_key"])
    out = [InputRecord.model_validate(plain_row(row)) for _, row in rows.iterrows()]
    name, label = f"{p.glacier_id} {p.year}", f"{p.year}.fold_{p.fold}"
    file = safe_name(p.glacier_id)
    out += [
        InputRecord(kind="glacier cube", name=name, address=f"cubes/year={p.year}/{file}.nc",
                    checksum=p.cube_fingerprint, asset="glacier_cubes", partition=str(p.year)),
        InputRecord(kind="prediction", name=name, address=f"predictions/year={p.year}/{file}.tif",
                    checksum=p.prediction_fingerprint, asset="glacier_predictions", partition=label),
    ]  # fmt: skip
    if p.static_fingerprint is not None:
        out.append(InputRecord(kind="static layers", name=p.glacier_id, address=f"static/{file}.nc",
                               checksum=p.static_fingerprint, asset="elevation", partition="all"))  # fmt: skip
    made = {(i.asset, i.partition): i for i in out if i.kind == "materialization"}
    return sorted((_completed(i, made) for i in out), key=lambda i: (ORDER.index(i.kind), i.name))


def _completed(record: InputRecord, made: dict[tuple[str | None, str | None], InputRecord]) -> InputRecord:
    """A record with run and time of its materialization, where the record itself does not have them."""
    of = made.get((record.asset, record.partition))
    if of is None or record.run_id is not None or record.kind == "materialization":
        return record
    return record.model_copy(
        update={"run_id": of.run_id, "materialization_id": of.materialization_id,
                "code_version": record.code_version or of.code_version, "time": of.time,
                "settings_fingerprint": of.settings_fingerprint, "software_fingerprint": of.software_fingerprint,
                "hardware": of.hardware}
    )  # fmt: skip
