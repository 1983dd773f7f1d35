"""explain(): the tree from an estimate to its pixels, as data and as sentences.

Belongs here: reading the records of one estimate back as a story.
Does not belong here: Dagster, and any computation of estimates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
from pydantic import BaseModel

from dl4gam_assets.lineage.environment import recorded_settings
from dl4gam_assets.lineage.records import InputRecord, LineageError, Provenance
from dl4gam_assets.lineage.sources import inputs_of, plain_row
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage


class Explanation(BaseModel):
    """The tree from an estimate to its pixels; every entry is data, :meth:`lines` tells it in words."""

    region: str
    glacier: dict[str, Any]
    estimate: dict[str, Any]
    change: dict[str, Any] | None
    image: dict[str, Any]
    runners_up: list[dict[str, Any]]
    cube: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any]
    quality: list[dict[str, Any]]
    provenance: Provenance
    inputs: list[InputRecord]
    notes: list[str]

    def lines(self) -> list[tuple[int, str]]:
        """The story as (depth, sentence), from the number to the pixels."""
        g, e, i, c, m, k = self.glacier, self.estimate, self.image, self.cube, self.model, self.calibration
        name = f" ({g['name']})" if g.get("name") else ""
        out: list[tuple[int, str]] = [
            (0, f"{g['glacier_id']}{name}, {e['year']}: {e['area_km2']:.4f} km2, "
                f"interval {e['lower_km2']:.4f} to {e['upper_km2']:.4f} km2 (std {e['std_km2']:.4f})"),
            (1, f"inventory outline: {g['inventory_area_km2']:.4f} km2 of {_stated(g)}; "
                f"recall {_number(e['recall'])}, false positives 20 to 50 m out {_number(e['false_positive_rate'])}"),
        ]  # fmt: skip
        if self.change:
            h = self.change
            out.append((1, f"change since {_day(h['baseline_date'])}: {h['rate_km2_per_year']:+.5f} +/- "
                           f"{h['rate_std_km2_per_year']:.5f} km2/yr ({_number(h['rate_pct_per_year'], '+.2f')} +/- "
                           f"{_number(h['rate_std_pct_per_year'], '.2f')} %/yr over {h['years']:.2f} years); "
                           f"{'passes the quality filter' if h['ok'] else 'flagged: ' + str(h['flags'])}"))  # fmt: skip
        out += [
            (1, f"image of {_day(i['date'])}: {i['scene_ids']}"),
            (2, f"{i['reason']}"),
        ]
        if i["coverage"] is not None:  # an imported image has no scores
            seen = f"coverage {_number(i['coverage'])}, cloud {_number(i['cloud_share'])}"
            snow = f"NDSI of the surroundings {_number(i['ndsi'])} ({i['ndsi_pixels']} pixels)"
            out.append((2, f"{seen}, {snow}, albedo {_number(i['albedo'])}"))
        out += [(2, f"runner-up {_day(r['date'])}: {r['reason']}") for r in self.runners_up[:5]]
        out += [
            (1, f"glacier cube {c['fingerprint']}: {c['height_px']} x {c['width_px']} pixels, EPSG:{c['utm_epsg']}, "
                f"{100 * (c['not_ok_share'] or 0):.1f}% unusable pixels near the glacier"),
            (2, f"elevation: {self.provenance.dem_source or 'none'}"),
            (2, f"elevation change: {self.provenance.dhdt_source or 'none'}"),
            (1, f"ensemble of fold_{e['fold']}, which never saw this glacier: {len(m['members'])} members"),
        ]  # fmt: skip
        out += [
            (2, f"member {r['member']}: weights {str(r['sha256'])[:12]}, which are no longer in the store"
                if r.get("gone") else
                f"member {r['member']}: weights {str(r['sha256'])[:12]}, epoch {r['best_epoch']}, "
                f"validation IoU {_number(r['validation_iou'])}, temperature {_number(r.get('temperature'))}"
                + _began_with(r))
            for r in m["members"]
        ]  # fmt: skip
        out += [
            (1, f"interval, to hold {k['coverage']:.0%} of the true areas: tau {_number(e['tau'])} by {_tau_rule(k)}"),
            (2, f"calibration error {_number(k['ece_before'])} before, {_number(k['ece_after'])} after"),
        ]
        if self.quality:
            out.append((1, "quality here in the inventory year, on maps by models that never saw this glacier"))
            out += [(2, line) for line in _quality_lines(self.quality)]
        p = self.provenance
        out += [
            (
                1,
                f"made {p.time:%Y-%m-%d %H:%M} UTC by version {p.code_version}, settings {p.settings_fingerprint}",
            ),
        ]
        runs = json.loads(p.run_ids or "{}")
        out += [(2, f"{asset}: Dagster run {run}") for asset, run in runs.items() if run]
        out += [(1, note) for note in self.notes]
        return out


def _began_with(member: Mapping[str, Any]) -> str:
    """What a member's network started from: the set or file of encoder weights, and a hash of all initial weights."""
    name, initial = member.get("encoder_weights"), member.get("initial_sha256")
    if not isinstance(name, str):  # of a store before this was recorded
        return ""
    if name.startswith("imported"):
        return f"; {name}"
    return f"; encoder from {name}" + (f", initial weights {initial[:12]}" if isinstance(initial, str) else "")


def explain(storage: Storage, region: Region, glacier_id: str, year: int) -> Explanation:
    """Trace one estimate back to its image, models and inputs.

    Raises
    ------
    LineageError
        if there is no such estimate; the message names near ids, the years there are, or the failure.
    """
    glaciers = storage.read_table("glaciers")
    if not len(glaciers):
        raise LineageError(
            f"region {region.name!r} has no results yet: run `dl4gam materialize --region {region.name}` first"
        )
    chosen = glaciers[glaciers["glacier_id"] == glacier_id]
    if not len(chosen):
        import difflib

        near = difflib.get_close_matches(glacier_id, glaciers["glacier_id"].tolist(), n=3, cutoff=0.4)
        example = near or glaciers.nlargest(3, "inventory_area_km2")["glacier_id"].tolist()
        raise LineageError(f"no glacier {glacier_id!r} in region {region.name!r}; for example: {', '.join(example)}")
    lineage = storage.read_table("lineage")
    rows = lineage[lineage["glacier_id"] == glacier_id]
    row = rows[rows["year"] == year]
    if not len(row):
        raise LineageError(_why_not(storage, glacier_id, year, chosen.iloc[0], rows["year"].tolist()))
    provenance = Provenance.model_validate(plain_row(row.iloc[0]))
    fold = provenance.fold

    estimate = _one(storage.read_table("areas", year=year, fold=fold), glacier_id)
    scenes = storage.read_table("scenes", year=year)
    scenes = scenes[scenes["glacier_id"] == glacier_id].sort_values(["rank", "date"])
    notes = [region.evaluation.note] if region.evaluation.note else []
    if region.simulation is not None:
        notes.append("the imagery of this region is simulated")
    image, others = _image(scenes, provenance, notes)
    cube = _one(storage.read_table("cubes", year=year), glacier_id)
    if cube["fingerprint"] != provenance.cube_fingerprint:
        notes.append("STALE: the cube was rebuilt after this estimate was made; materialize glacier_predictions again")
    changes = storage.read_table("changes", year=year)
    changes = changes[changes["glacier_id"] == glacier_id]
    calibration = storage.read_table("calibration", fold=fold)
    hashes = provenance.member_sha256.split(",")
    if set(hashes) != set(calibration["sha256"]):
        notes.append("STALE: the ensemble was trained again after this estimate; materialize glacier_predictions again")
    quality = storage.read_table("evaluation", fold=fold)
    quality = quality[(quality["glacier_id"] == glacier_id) & (quality["role"] == "test")]
    first = plain_row(calibration.iloc[0]) if len(calibration) else {}
    return Explanation(
        region=region.name,
        glacier=plain_row(chosen.drop(columns="geometry").iloc[0]),
        estimate=estimate,
        change=plain_row(changes.iloc[0]) if len(changes) else None,
        image=image,
        runners_up=others,
        cube=cube,
        model={"members": _members(storage.read_table("members", fold=fold), calibration, hashes)},
        calibration={
            k: first.get(k) for k in ("method", "n_glaciers", "ece_before", "ece_after", "validation_coverage")
        }
        | _interval(storage, region, glacier_id, provenance),
        quality=[plain_row(r) for _, r in quality.iterrows()],
        provenance=provenance,
        inputs=inputs_of(storage, provenance),
        notes=notes,
    )


def _image(
    scenes: pd.DataFrame, provenance: Provenance, notes: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The image that the estimate was made from, and the other candidates; where it is no candidate any more, what the
    lineage says of it. Adds to ``notes`` what is not as it was."""
    mine = scenes["scene_ids"] == provenance.scene_ids
    selected = scenes.loc[scenes["selected"].astype(bool), "scene_ids"]
    others = [plain_row(r) for _, r in scenes[~mine].iterrows()]
    if not len(selected):
        notes.append("STALE: no image is selected for this glacier now; the estimate is of before")
    elif selected.iloc[0] != provenance.scene_ids:
        notes.append(f"STALE: another image is selected now ({selected.iloc[0]}); materialize glacier_cubes again")
    if mine.any():
        return plain_row(scenes[mine].iloc[0]), others
    notes.append("the image is no candidate any more (its year was searched again): its scores are not known")
    recorded = {"scene_ids": provenance.scene_ids, "date": provenance.image_date, "checksums": provenance.checksums,
                "reason": "recorded with the estimate; no candidate any more"}  # fmt: skip
    return dict.fromkeys(map(str, scenes.columns)) | {"glacier_id": provenance.glacier_id, **recorded}, others


def _members(members: pd.DataFrame, calibration: pd.DataFrame, hashes: list[str]) -> list[dict[str, Any]]:
    """The members behind the estimate by the hashes of their weights; one that the store has no more by its hash."""
    known = members.merge(calibration[["sha256", "temperature"]], on="sha256", how="left").set_index("sha256")
    out = []
    for number, sha in enumerate(hashes, start=1):
        if sha in known.index:
            out.append({"sha256": sha, **plain_row(known.loc[[sha]].iloc[0])})
        else:
            out.append({"sha256": sha, "member": number, "best_epoch": None, "validation_iou": None, "gone": True})
    return out


def _interval(storage: Storage, region: Region, glacier_id: str, provenance: Provenance) -> dict[str, Any]:
    """Rule and aim of the interval as they were when the estimate was made, and the group behind a conformal tau."""
    settings = (recorded_settings(storage, provenance.settings_fingerprint) or {}).get("calibration", {})
    found = {name: settings.get(name, getattr(region.calibration, name)) for name in ("intervals", "coverage")}
    taus = storage.read_table("taus", fold=provenance.fold)
    mine = taus[taus["glacier_id"] == glacier_id]
    group = plain_row(mine.iloc[0]) if len(mine) else {}
    return found | {name: group.get(name) for name in ("conformal_group", "conformal_scope", "conformal_n")}


def _why_not(storage: Storage, glacier_id: str, year: int, glacier: pd.Series, years: list[int]) -> str:
    failures = storage.read_table("failures")
    mine = failures[
        (failures["glacier_id"] == glacier_id) & failures["partition"].str.split(".").str[0].isin([str(year), "all"])
    ]
    text = f"no estimate for {glacier_id} in {year}"
    if len(mine):
        text += ": " + "; ".join(f"{r.stage} failed: {r.error}" for r in mine.itertuples())
    elif not bool(glacier["modelled"]):
        text += (
            f": its {float(glacier['inventory_area_km2']):.3f} km2 are below min_area_km2, so it is only part of the "
            "regional extrapolation"
        )
    if years:
        text += f". There are estimates for {', '.join(str(y) for y in sorted(years))}"
    elif not len(mine):
        text += f". Run `dl4gam materialize --year {year}` first"
    return text


def _one(frame: pd.DataFrame, glacier_id: str) -> dict[str, Any]:
    rows = frame[frame["glacier_id"] == glacier_id]
    if not len(rows):
        raise LineageError(f"the results of {glacier_id} are incomplete: a table lost its row; materialize again")
    return plain_row(rows.iloc[0])


_SCOPES = {"scene": "whole scene", "ring": "within 50 m", "reference": "second inventory"}
_RECALLS = {"debris": "debris", "clean_ice": "clean ice"}


def _quality_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line a method, the ensemble first."""
    methods = sorted({str(r["method"]) for r in rows}, key=lambda m: (m != "ensemble", m))
    out = []
    for method in methods:
        mine = {str(r["scope"]): r for r in rows if r["method"] == method}
        words = [f"IoU {_number(mine[s]['iou'])} ({text})" for s, text in _SCOPES.items() if s in mine]
        words += [
            f"recall {_number(mine[s]['recall'])} on {text}"
            for s, text in _RECALLS.items()
            if s in mine and mine[s]["recall"] is not None
        ]
        out.append(f"{method}: {', '.join(words)}")
    return out


def _tau_rule(k: dict[str, Any]) -> str:
    """Which rule gave tau, and from how many glaciers."""
    if k["intervals"] == "published":
        return f"the published rule ({k['method']}) on {k['n_glaciers']} validation glaciers"
    if k["conformal_n"] is None:
        return "the conformal rule, as the widest of the fold: the glacier was not mapped in the inventory year"
    whose = "of all folds that do not test it" if k["conformal_scope"] == "folds" else "of the fold"
    return (
        f"the conformal rule on {k['conformal_n']} validation glaciers {whose} (group {k['conformal_group']}); the "
        "published one stands beside it in the table areas"
    )


def _day(value: Any) -> str:
    return "an unknown date" if value is None else f"{value:%Y-%m-%d}"


def _stated(glacier: Mapping[str, Any]) -> str:
    """The inventory's date as far as the inventory states it."""
    digits = {"year": 4, "month": 7}.get(str(glacier.get("inventory_date_precision")), 10)
    day = _day(glacier["inventory_date"])
    return day if glacier["inventory_date"] is None else day[:digits]


def _number(value: Any, form: str = ".3f") -> str:
    return "unknown" if value is None else format(float(value), form)
