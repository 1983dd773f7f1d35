"""Why two runs disagree: glacier by glacier, and how much of the difference goes with each reason.

Belongs here: reading two sets of results (a store, one year of it, or a results.duckdb), finding for every estimate
what is not the same in both, and adding the differences up by reason.
Does not belong here: judging which of the two is right.

A reason is stated only where it can matter: where both cubes have the same content, it is of no interest that they were
made of copies of a file. Sums by reason are sums over the glaciers for which just these reasons hold, so they add up to
the difference of the totals.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel
from upath import UPath

from dl4gam_assets.lineage.environment import settings_difference
from dl4gam_assets.lineage.records import LineageError
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES

#: Reason -> what it means.
REASONS = {
    "only in A": "B has no estimate of the glacier",
    "only in B": "A has no estimate of the glacier",
    "image": "another image was chosen",
    "image files": "the same image, but its files are not the same",
    "outlines and terrain": "other outlines, zones, debris or elevation below the cube",
    "elevation change": "other dh/dt",
    "reading": "the same files give another cube: other settings of the sensor, or other code",
    "models": "maps of other weights (and so of another calibration)",
    "calibration": "the same weights, calibrated otherwise",
    "inference settings": "the same cube, weights and calibration, mapped with other settings",
    "threshold": "the same map, counted with another threshold",
    "pixels": "the same map, counted otherwise: areas.pixels or areas.shared_ground is another",
    "interval": "another tau: the interval is another, the area is not",
    "code": "the same inputs and settings, another version of the code or of a package",
    "unknown": "nothing that was recorded differs (other hardware, or records of an older version)",
}
#: Settings by which the pixels of a map are counted; the others of ``areas`` shape outlines only.
_COUNTING = frozenset({"areas.pixels", "areas.shared_ground"})
#: Areas in km2 that differ by less are the same: far below a pixel.
_SAME_KM2 = 1e-9


@dataclass
class Results:
    """Tables of one run, from a store or a database; ``year`` restricts to one year."""

    label: str
    year: int | None
    store: Storage | None = None
    database: Path | None = None

    def table(self, name: str) -> pd.DataFrame:
        """A table with the columns of the schema; empty where there is none."""
        table = TABLES[name]
        names = [c.name for c in table.columns]
        if self.store is not None:
            where = {"year": self.year} if self.year is not None and "year" in table.partitioned_by else {}
            frame = self.store.read_table(name, **where)
        else:
            import duckdb

            with duckdb.connect(str(self.database), read_only=True) as connection:
                try:
                    frame = connection.execute(f'SELECT * FROM "{name}"').df()  # noqa: S608  (names from TABLES)
                except duckdb.CatalogException:
                    frame = table.empty()
            frame = table.conform(frame[[c for c in frame.columns if c in names]])
        if self.year is not None and "year" in frame and len(frame):
            frame = frame[frame["year"] == self.year]
        return frame.reset_index(drop=True)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings by fingerprint."""
        rows = self.table("settings")
        return {str(r.fingerprint): json.loads(str(r.settings)) for r in rows.itertuples()}


def open_results(text: str) -> Results:
    """Results named ``STORE``, ``STORE@YEAR``, ``FILE.duckdb`` or ``FILE.duckdb@YEAR``.

    Raises
    ------
    LineageError
        if there is nothing of the kind there.
    """
    where, year = text, None
    head, mark, tail = text.rpartition("@")
    if mark and tail.isdigit() and not UPath(text).exists():  # a folder or file may have such a name
        where, year = head, int(tail)
    if where.endswith(".duckdb"):
        file = Path(where)
        if not file.is_file():
            raise LineageError(f"there is no database {file}")
        return Results(text, year, database=file)
    root = UPath(where)
    if not (root / "tables").exists():
        inside = [f for f in root.iterdir() if (f / "tables").exists()] if root.is_dir() else []
        if len(inside) != 1:
            found = ", ".join(sorted(f.name for f in inside))
            raise LineageError(
                f"{where} is no store (it has no folder tables)"
                + (f"; it holds the stores {found}: name one of them" if inside else "")
            )
        root = inside[0]
    return Results(text, year, store=Storage(root))


class YearTotal(BaseModel):
    """Totals of one year over the glaciers that A and B have, and of those that only one has."""

    year: int
    estimates_a: int
    estimates_b: int
    area_a_km2: float
    area_b_km2: float
    difference_km2: float
    estimates_that_differ: int


class Share(BaseModel):
    """Glaciers for which just these reasons hold, and what they add to the difference of the total."""

    year: int
    reasons: list[str]
    estimates: int
    area_a_km2: float
    area_b_km2: float
    difference_km2: float
    share: float | None
    rate_difference_km2_per_year: float | None = None


class RateShare(BaseModel):
    """Glaciers whose rate differs for just these reasons, and what they add to the difference of the rates' sum.

    ``baseline: REASON`` is a reason for which the area of the baseline year differs: it moves the rates of all years,
    also of those whose own area is the same in both.
    """

    year: int
    reasons: list[str]
    glaciers: int
    difference_km2_per_year: float


class RegionalRate(BaseModel):
    """The region's rate in both, by method of the table ``regional_changes``."""

    year: int
    method: str
    rate_a_pct_per_year: float | None
    rate_b_pct_per_year: float | None
    rate_a_km2_per_year: float | None
    rate_b_km2_per_year: float | None


class Changed(BaseModel):
    """A setting or package that is not the same, and how many estimates that concerns."""

    key: str
    a: Any
    b: Any
    estimates: int


class Difference(BaseModel):
    """All that differs between two runs. ``estimates`` has one row for each estimate that is not the same."""

    a: str
    b: str
    totals: list[YearTotal]
    shares: list[Share]
    rate_shares: list[RateShare]
    rates: list[RegionalRate]
    settings: list[Changed]
    software: list[Changed]
    code: list[Changed]
    estimates: list[dict[str, Any]]
    notes: list[str]

    @property
    def same(self) -> bool:
        """Whether all estimates are there in both, with the same figures, and the same rates of change."""
        return not self.estimates and not self.rate_shares


def compare(a: Results, b: Results) -> Difference:
    """Compare two sets of results.

    Raises
    ------
    LineageError
        if one of them has no estimates.
    """
    across = a.year is not None and b.year is not None and a.year != b.year
    if (a.year is None) != (b.year is None):  # of A@2023 and B, only 2023 of B is asked for
        one = a.year if b.year is None else b.year
        a, b = (dataclasses.replace(side, year=one) for side in (a, b))
    # Rates need the baseline year too, whatever year is asked for.
    whole = [side if across else dataclasses.replace(side, year=None) for side in (a, b)]
    frames = [_estimates(side) for side in whole]
    for side, frame in zip((a, b), frames, strict=True):
        if not len(frame if side.year is None else frame[frame["year"] == side.year]):
            raise LineageError(f"{side.label} has no estimates{'' if side.year is None else f' of {side.year}'}")
    if across:
        frames[1] = frames[1].assign(year=a.year)
    pairs = frames[0].merge(frames[1], on=["glacier_id", "year"], how="outer", suffixes=("_a", "_b"), indicator=True)
    settings_a, settings_b = whole[0].settings(), whole[1].settings()
    _, lookup = _settings(pairs, settings_a, settings_b)
    pairs["reasons"] = _reasons(pairs, lookup)
    for name in ("area_km2", "lower_km2", "upper_km2"):
        pairs[f"d_{name}"] = pairs[f"{name}_b"].fillna(0.0) - pairs[f"{name}_a"].fillna(0.0)
    moved = pairs[["d_area_km2", "d_lower_km2", "d_upper_km2"]].abs().max(axis=1) > _SAME_KM2
    pairs["differs"] = (pairs["_merge"] != "both") | moved
    # What differs though nothing that was recorded does, is said to be so.
    silent = pairs["differs"] & (pairs["reasons"].map(len) == 0)
    pairs.loc[silent, "reasons"] = pd.Series(
        [("unknown",)] * int(silent.sum()), index=pairs.index[silent], dtype=object
    )
    pairs = _with_rates(pairs, *whole) if not across else pairs.assign(d_rate=np.nan, rate_reasons=pairs["reasons"])
    if a.year is not None:
        pairs = pairs[pairs["year"] == a.year]
    changed_settings, _ = _settings(pairs, settings_a, settings_b)
    notes = []
    if across:
        notes.append(f"A is {a.year}, B is {b.year}: the glaciers themselves changed between the two years")
    unsure = int(pairs["static_fingerprint_a"].isna().sum() + pairs["static_fingerprint_b"].isna().sum())
    if unsure and (pairs["_merge"] == "both").any():
        notes.append("some records are of a version that did not keep terrain, settings and software by fingerprint")
    return Difference(
        a=a.label, b=b.label, totals=_totals(pairs), shares=_shares(pairs), rate_shares=_rate_shares(pairs),
        rates=_regional(a, b, across),
        settings=changed_settings, software=_software(pairs, a, b), code=_code(pairs), estimates=_rows(pairs),
        notes=notes,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- parts
_LINEAGE = (
    "scene_ids", "checksums", "cube_fingerprint", "static_fingerprint", "dhdt_fingerprint", "member_sha256",
    "calibration_fingerprint", "prediction_fingerprint", "settings_fingerprint", "software_fingerprint", "code_version",
)  # fmt: skip


def _estimates(results: Results) -> pd.DataFrame:
    areas = results.table("areas")[["glacier_id", "year", "area_km2", "lower_km2", "upper_km2", "std_km2", "tau"]]
    lineage = results.table("lineage")[["glacier_id", "year", *_LINEAGE]]
    merged = areas.merge(lineage, on=["glacier_id", "year"], how="left")
    return merged.astype({name: object for name in ("glacier_id", *_LINEAGE)})


def _differs(pairs: pd.DataFrame, name: str) -> pd.Series:
    """Where both sides have a value and the values are not the same."""
    left, right = pairs[f"{name}_a"], pairs[f"{name}_b"]
    return left.notna() & right.notna() & (left != right)


def _reasons(pairs: pd.DataFrame, lookup: Mapping[tuple[Any, Any], set[str]]) -> pd.Series:
    """For each pair the reasons that can matter, in the order of the chain."""
    both = pairs["_merge"] == "both"
    cube, models = _differs(pairs, "cube_fingerprint"), _differs(pairs, "member_sha256")
    image, static, dhdt = (_differs(pairs, n) for n in ("scene_ids", "static_fingerprint", "dhdt_fingerprint"))
    files = ~image & _differs(pairs, "checksums")
    calibration = ~models & _differs(pairs, "calibration_fingerprint")
    same_map_inputs = ~cube & ~models & ~calibration
    keys = [
        lookup.get(pair, set())
        for pair in zip(pairs["settings_fingerprint_a"], pairs["settings_fingerprint_b"], strict=True)
    ]
    inference = pd.Series([any(k.startswith("inference.") and k != "inference.threshold" for k in ks) for ks in keys],
                          index=pairs.index)  # fmt: skip
    threshold = pd.Series(["inference.threshold" in ks for ks in keys], index=pairs.index)
    pixels = pd.Series([not _COUNTING.isdisjoint(ks) for ks in keys], index=pairs.index)
    code = _differs(pairs, "code_version") | _differs(pairs, "software_fingerprint")
    area_moved = (pairs["area_km2_a"] - pairs["area_km2_b"]).abs() > _SAME_KM2
    bounds_moved = pd.concat(
        [(pairs[f"{n}_a"] - pairs[f"{n}_b"]).abs() > _SAME_KM2 for n in ("lower_km2", "upper_km2")], axis=1
    ).any(axis=1)
    tau = (pairs["tau_a"] - pairs["tau_b"]).abs() > 1e-12
    flags = {
        "only in A": pairs["_merge"] == "left_only",
        "only in B": pairs["_merge"] == "right_only",
        "image": cube & image,
        "image files": cube & files,
        "outlines and terrain": cube & static,
        "elevation change": cube & dhdt,
        "reading": cube & ~image & ~files & ~static & ~dhdt,
        "models": models,
        "calibration": calibration,
        "inference settings": inference,
        "threshold": threshold,
        "pixels": pixels & (area_moved | bounds_moved),
        "interval": tau & bounds_moved,
    }
    known = pd.concat([f for n, f in flags.items() if n != "interval"], axis=1).any(axis=1)
    flags["code"] = code & ~known & same_map_inputs & (area_moved | (bounds_moved & ~tau))
    table = pd.DataFrame(
        {name: flag.astype(bool) & (both | (name in {"only in A", "only in B"})) for name, flag in flags.items()}
    )
    names = np.array(list(table.columns))
    return pd.Series([tuple(str(n) for n in names[row]) for row in table.to_numpy()], index=pairs.index, dtype=object)


def _settings(
    pairs: pd.DataFrame, a: Mapping[str, dict[str, Any]], b: Mapping[str, dict[str, Any]]
) -> tuple[list[Changed], dict[tuple[Any, Any], set[str]]]:
    """Settings that differ, with the number of estimates; and the keys for each pair of fingerprints."""
    both = pairs[pairs["_merge"] == "both"]
    counts = both.groupby(["settings_fingerprint_a", "settings_fingerprint_b"]).size()
    lookup: dict[tuple[Any, Any], set[str]] = {}
    found: dict[str, Changed] = {}
    for (one, other), n in counts.items():  # type: ignore[misc]
        if one == other:
            continue
        if one not in a or other not in b:
            key = "(settings that were not recorded)"
            found[key] = Changed(key=key, a=one, b=other, estimates=int(n))
            continue
        difference = settings_difference(a[one], b[other])
        lookup[(one, other)] = set(difference)
        for key, (old, new) in difference.items():
            n_before = found[key].estimates if key in found else 0
            found[key] = Changed(key=key, a=old, b=new, estimates=n_before + int(n))
    return [found[k] for k in sorted(found)], lookup


def _software(pairs: pd.DataFrame, a: Results, b: Results) -> list[Changed]:
    both = pairs[pairs["_merge"] == "both"]
    counts = both.groupby(["software_fingerprint_a", "software_fingerprint_b"]).size()
    versions = [
        {
            fp: dict(zip(rows["package"], rows["version"], strict=True))
            for fp, rows in r.table("software").groupby("fingerprint")
        }
        for r in (a, b)
    ]
    found: dict[str, Changed] = {}
    for (one, other), n in counts.items():  # type: ignore[misc]
        if one != other:
            for key, (old, new) in settings_difference(versions[0].get(one), versions[1].get(other)).items():
                n_before = found[key].estimates if key in found else 0
                found[key] = Changed(key=key, a=old, b=new, estimates=n_before + int(n))
    return [found[k] for k in sorted(found)]


def _code(pairs: pd.DataFrame) -> list[Changed]:
    both = pairs[(pairs["_merge"] == "both") & _differs(pairs, "code_version")]
    counts = both.groupby(["code_version_a", "code_version_b"]).size()
    return [Changed(key="dl4gam_assets", a=x, b=y, estimates=int(n)) for (x, y), n in counts.items()]  # type: ignore[misc]


def _with_rates(pairs: pd.DataFrame, a: Results, b: Results) -> pd.DataFrame:
    """Difference of each glacier's rate since the baseline, and its reasons: those for which the area of the year is
    another, and those for which the area of the baseline is."""
    columns = ["glacier_id", "year", "baseline_year", "rate_km2_per_year"]
    left, right = (r.table("changes")[columns] for r in (a, b))
    rates = left.merge(right, on=["glacier_id", "year"], how="outer", suffixes=("_a", "_b"))
    pairs = pairs.merge(rates, on=["glacier_id", "year"], how="left")
    pairs["d_rate"] = pairs["rate_km2_per_year_b"] - pairs["rate_km2_per_year_a"]
    told = pairs[pairs["differs"]].set_index(["glacier_id", "year"])["reasons"].to_dict()
    out = []
    for row in pairs.itertuples():
        mine = list(told.get((row.glacier_id, row.year), ()))
        if pd.notna(row.baseline_year_a):
            of_baseline = told.get((row.glacier_id, int(row.baseline_year_a)), ())
            mine += [f"baseline: {r}" for r in of_baseline if r not in mine]
        out.append(tuple(mine))
    pairs["rate_reasons"] = pd.Series(out, index=pairs.index, dtype=object)
    return pairs


def _totals(pairs: pd.DataFrame) -> list[YearTotal]:
    out = []
    for year, rows in pairs.groupby("year"):
        out.append(
            YearTotal(
                year=int(year), estimates_a=int(rows["area_km2_a"].notna().sum()),
                estimates_b=int(rows["area_km2_b"].notna().sum()), area_a_km2=float(rows["area_km2_a"].sum()),
                area_b_km2=float(rows["area_km2_b"].sum()), difference_km2=float(rows["d_area_km2"].sum()),
                estimates_that_differ=int(rows["differs"].sum()),
            )
        )  # fmt: skip
    return out


def _shares(pairs: pd.DataFrame) -> list[Share]:
    out = []
    for year, rows in pairs[pairs["differs"]].groupby("year"):
        total = float(rows["d_area_km2"].sum())
        for reasons, mine in rows.groupby("reasons"):
            here = float(mine["d_area_km2"].sum())
            rate = mine["d_rate"].dropna()
            out.append(
                Share(
                    year=int(year), reasons=list(reasons), estimates=len(mine),
                    area_a_km2=float(mine["area_km2_a"].sum()), area_b_km2=float(mine["area_km2_b"].sum()),
                    difference_km2=here,
                    share=here / total if abs(total) > _SAME_KM2 else None,
                    rate_difference_km2_per_year=float(rate.sum()) if len(rate) else None,
                )
            )  # fmt: skip
    return sorted(out, key=lambda s: (s.year, -abs(s.difference_km2), s.reasons))


def _rate_shares(pairs: pd.DataFrame) -> list[RateShare]:
    moved = pairs[pairs["d_rate"].abs() > _SAME_KM2]
    out = [
        RateShare(year=int(year), reasons=list(reasons) or ["unknown"], glaciers=len(rows),
                  difference_km2_per_year=float(rows["d_rate"].sum()))
        for (year, reasons), rows in moved.groupby(["year", "rate_reasons"])
    ]  # fmt: skip
    return sorted(out, key=lambda s: (s.year, -abs(s.difference_km2_per_year), s.reasons))


def _regional(a: Results, b: Results, across: bool) -> list[RegionalRate]:
    if across:
        return []
    frames = []
    for results in (a, b):
        rows = results.table("regional_changes")
        frames.append(rows[(rows["grouping"] == "region")].set_index(["year", "method"]))
    out = []
    for year, method in sorted(set(frames[0].index) | set(frames[1].index)):
        values = []
        for frame in frames:
            row = frame.loc[(year, method)] if (year, method) in frame.index else None
            values += [None if row is None or pd.isna(row[n]) else float(row[n])
                       for n in ("rate_pct_per_year", "rate_km2_per_year")]  # fmt: skip
        if any(v is not None for v in values):
            out.append(
                RegionalRate(
                    year=int(year), method=str(method), rate_a_pct_per_year=values[0], rate_b_pct_per_year=values[2],
                    rate_a_km2_per_year=values[1], rate_b_km2_per_year=values[3],
                )
            )  # fmt: skip
    return out


def _rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    rows = pairs[pairs["differs"]].sort_values("d_area_km2", key=lambda v: v.abs(), ascending=False)

    def number(value: Any) -> float | None:
        return None if pd.isna(value) else float(value)

    return [
        {
            "glacier_id": r.glacier_id, "year": int(r.year), "area_a_km2": number(r.area_km2_a),
            "area_b_km2": number(r.area_km2_b), "difference_km2": float(r.d_area_km2),
            "std_a_km2": number(r.std_km2_a), "std_b_km2": number(r.std_km2_b), "reasons": list(r.reasons),
            "image_a": r.scene_ids_a if isinstance(r.scene_ids_a, str) else None,
            "image_b": r.scene_ids_b if isinstance(r.scene_ids_b, str) else None,
        }
        for r in rows.itertuples()
    ]  # fmt: skip
