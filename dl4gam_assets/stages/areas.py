"""Stages of the group *areas*: the interval's tau, areas with lineage, outlines, the baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dl4gam_assets.stages import previews
from dl4gam_assets.stages.base import (
    Site,
    StageResult,
    UpstreamError,
    Workspace,
    cached_table,
    fold_label,
    frame_fingerprint,
    run_stage,
    year_fold_label,
)
from dl4gam_assets.stages.mending import removing_damaged
from dl4gam_assets.stages.provenance import (
    expect_calibrated,
    expect_chain,
    expect_cube,
    expect_made_from_present,
    expect_map,
    write_lineage,
)
from dl4gam_assets.tables import INTERVAL_RULES, TABLES, rows_of

if TYPE_CHECKING:
    import xarray as xr

    from dl4gam_assets.change.areas import Shares

#: Raised when the columns or rules of areas, outlines and lineage change, so that tables of an older version are made
#: again.
_VERSION = 5


def _shares_of(site: Site, glacier_id: str, cube: xr.Dataset) -> Shares:
    """What of each pixel counts to the glacier, by the region's settings. Outlines are read only where they matter."""
    from dl4gam_assets.change import fractional_shares, ground_of, whole_shares
    from dl4gam_assets.change.areas import pixel_grid

    settings = site.region.areas
    if settings.pixels == "whole" and settings.shared_ground == "each":
        return whole_shares(cube)
    glaciers, debris = (cached_table(site, name) for name in ("glaciers", "debris"))
    ground = ground_of(glacier_id, glaciers, _zones_of_20_m(site), debris, pixel_grid(cube)[1], settings.shared_ground)
    return fractional_shares(cube, ground) if settings.pixels == "fractional" else whole_shares(cube, ground)


_ZONES: dict[str, tuple[Any, Any]] = {}


def _zones_of_20_m(site: Site) -> Any:
    """The zones of 20 m, picked and indexed once while the table is the same."""
    zones = cached_table(site, "zones")
    table, picked = _ZONES.get(site.root, (None, None))
    if table is not zones:
        picked = zones[zones["buffer_m"] == 20]
        _ZONES.clear()
        _ZONES[site.root] = (zones, picked)
    return picked


def _shares_inputs(ws: Workspace) -> dict[str, Any]:
    """Fingerprints of what :func:`_shares_of` reads beside the cube."""
    settings = ws.region.areas
    used = {"pixels": settings.pixels, "shared_ground": settings.shared_ground, "version": _VERSION}
    if settings.pixels == "whole" and settings.shared_ground == "each":
        return used
    assets = ("inventory_outlines", "glacier_zones", "debris_outlines")
    return used | {asset: ws.upstream(asset) for asset in assets}


def interval_taus(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """tau of the fold's test glaciers from their maps of the inventory year: published and conformal, side by side.

    The column ``tau`` is the one that ``calibration.intervals`` names; areas and outlines of all years use it. Where
    the fold has too few validation glaciers for the regression, the published tau is one quantile over those of all
    folds that it does not test (``calibration.pool_folds``), and the columns ``published_*`` say so.
    """
    from dl4gam_assets.ensemble import TauRule, conformal_classes, conformal_tau, conformal_taus, pooled_validation

    baseline, settings, label = ws.region.years.baseline, ws.region.calibration, fold_label(fold)
    pooling = settings.conformal_pool_folds or settings.pool_folds
    others = [f for f in range(1, ws.region.folds.n + 1) if f != fold and pooling]

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        storage = ws.storage
        predictions = storage.read_table("predictions", year=baseline, fold=fold)
        _assert_current(predictions, storage.read_table("cubes", year=baseline).set_index("glacier_id"))
        expect_calibrated(ws, fold, predictions)
        expect_made_from_present(ws, "glacier_predictions", year_fold_label(baseline, fold))
        expect_made_from_present(ws, "calibration", label)
        calibration = storage.read_table("calibration", fold=fold)
        rule = TauRule.from_json(str(calibration["coefficients"].iloc[0]))
        features = pd.DataFrame(
            {
                "log_area": np.log(np.maximum(predictions["predicted_area_km2"].to_numpy(dtype=float), 1e-4)),
                "mean_probability": predictions["mean_probability"].to_numpy(dtype=float),
                "epistemic_std": predictions["epistemic_std"].to_numpy(dtype=float),
                "aleatoric_std": predictions["aleatoric_std"].to_numpy(dtype=float),
            }
        )
        scores = storage.read_table("calibration_glaciers", fold=[fold, *others])
        if not (scores["fold"] == fold).any():
            raise UpstreamError(f"calibration [{label}] was made by an older version: materialize it again")
        own, pooled = pooled_validation(scores, storage.read_table("folds"), fold, settings.conformal_pool_folds)
        classes = conformal_classes(storage.read_table("glaciers"), storage.read_table("debris"), settings)
        taus = conformal_taus(own, pooled, classes, predictions["glacier_id"].tolist(), settings)
        taus["tau_published"], scope, n = rule.predict(features), "fold", int(calibration["n_glaciers"].iloc[0])
        if settings.pool_folds and len(own) < settings.min_glaciers:
            _, every = pooled_validation(scores, storage.read_table("folds"), fold)
            taus["tau_published"] = conformal_tau(every["covering_tau"].to_numpy(dtype=float), settings.coverage)
            scope, n = "folds", len(every)
        taus = taus.assign(published_method=rule.method, published_scope=scope, published_n=n)
        taus["tau"] = taus[f"tau_{settings.intervals}"]
        storage.write_table("taus", taus, {"fold": fold})
        few = taus[taus["conformal_n"] < settings.conformal_min_glaciers]
        metadata = {
            "glaciers": len(taus),
            "median_tau": float(taus["tau"].median()) if len(taus) else None,
            "intervals": settings.intervals,
            "method": rule.method,
            "published_scores_of": scope,
            "published_validation_glaciers": n,
            "median_tau_published": float(taus["tau_published"].median()) if len(taus) else None,
            "median_tau_conformal": float(taus["tau_conformal"].median()) if len(taus) else None,
            "conformal_groups": _groups_of(taus),
            "conformal_from_few_glaciers": len(few),
        }
        return frame_fingerprint(taus), metadata, {}

    inputs = {
        "predictions": ws.upstream("glacier_predictions", year_fold_label(baseline, fold)),
        "calibration": ws.upstream("calibration", label),
        "other_calibrations": {f: ws.upstream_or_none("calibration", fold_label(f)) for f in others},
        "folds": ws.upstream("cross_validation_folds"),
        "glaciers": ws.upstream("inventory_outlines"),
        "debris": ws.upstream_or_none("debris_outlines"),
        "settings": settings.model_dump(mode="json", include={"intervals", "coverage", *_POOLED, *_CONFORMAL}),
        "tables": 2,  # raised when the columns or rules change
    }
    return run_stage(ws, "interval_taus", label, inputs, work, force=force)


_POOLED = {"min_glaciers", "pool_folds"}
_CONFORMAL = {
    "conformal_size_edges_km2", "conformal_debris_min", "conformal_min_glaciers", "conformal_pool_folds",
}  # fmt: skip


def _groups_of(taus: pd.DataFrame) -> list[dict[str, Any]]:
    """The groups behind the conformal taus, for people to look at."""
    groups = taus.groupby(["conformal_group", "conformal_scope"], sort=True)
    return [
        {
            "group": str(name),
            "scores_of": str(scope),
            "validation_glaciers": int(g["conformal_n"].iloc[0]),
            "tau": round(float(g["tau_conformal"].iloc[0]), 4),
            "glaciers": len(g),
        }
        for (name, scope), g in groups
    ]


def _tau_of(site: Site, glacier_id: str, fold: int, column: str = "tau") -> float:
    """The glacier's own tau; the fold's widest where the glacier was not mapped in the inventory year."""
    taus = cached_table(site, "taus", fold=fold)
    own = rows_of(taus, glacier_id)[column].astype(float)
    if len(own):
        return float(own.iloc[0])
    if len(taus):
        return float(taus[column].astype(float).min())
    raise UpstreamError(f"fold {fold} has no tau: no glacier of it was mapped in the inventory year")


def _taus_by_rule(site: Site, glacier_id: str, fold: int) -> dict[str, float]:
    """The glacier's tau by every rule; without those that an older version did not write."""
    found = {rule: _tau_of(site, glacier_id, fold, f"tau_{rule}") for rule in INTERVAL_RULES}
    return {rule: tau for rule, tau in found.items() if np.isfinite(tau)}


@contextlib.contextmanager
def _map_and_cube(site: Site, year: int, fold: int, glacier_id: str) -> Iterator[tuple[Path, Path]]:
    """Local paths of a glacier's map and cube; one that turns out to be damaged is removed, and made again."""
    storage = site.storage
    map_path, cube_path = storage.prediction(year, glacier_id), storage.cube(year, glacier_id)
    with (
        removing_damaged(site, "glacier_cubes", str(year), cube_path),
        removing_damaged(site, "glacier_predictions", year_fold_label(year, fold), map_path),
        storage.reading(map_path) as local_map,
        storage.reading(cube_path) as local_cube,
    ):
        yield local_map, local_cube


def area_of(site: Site, year: int, fold: int, glacier_id: str) -> dict[str, Any]:
    """Area row of one glacier; runs in a worker process."""
    from dl4gam_assets.change import area_row
    from dl4gam_assets.cubes import open_cube
    from dl4gam_assets.ensemble import read_prediction, read_prediction_tags

    with _map_and_cube(site, year, fold, glacier_id) as (map_path, cube_path):
        expect_map(site, year, fold, glacier_id, read_prediction_tags(map_path))
        prediction = read_prediction(map_path)
        with open_cube(cube_path) as cube:
            expect_cube(site, year, glacier_id, cube.attrs)
            row = area_row(
                prediction["mean"], prediction["std"], cube, _tau_of(site, glacier_id, fold),
                threshold=site.region.inference.threshold, shares=_shares_of(site, glacier_id, cube),
                other_taus=_taus_by_rule(site, glacier_id, fold),
            )  # fmt: skip
    return row


def glacier_areas(ws: Workspace, year: int, fold: int, *, force: bool = False) -> StageResult:
    """Measure the areas of the fold's glaciers in a year and write where each comes from."""
    label = year_fold_label(year, fold)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        storage = ws.storage
        predictions = storage.read_table("predictions", year=year, fold=fold)
        cubes = storage.read_table("cubes", year=year).set_index("glacier_id")
        mapped = _assert_current(predictions, cubes)
        expect_calibrated(ws, fold, mapped)
        expect_chain(ws, year, fold)
        values, failures = ws.over_glaciers(
            "glacier_areas", label, area_of, [(g, (ws.site, year, fold, g)) for g in mapped["glacier_id"]]
        )
        extra = mapped.set_index("glacier_id")
        rows = [
            {
                **value,
                "glacier_id": g,
                "image_date": cubes.loc[g, "image_date"],
                "filled_share": extra.loc[g, "filled_share"],
            }
            for g, value in values.items()
        ]
        areas = pd.DataFrame(rows) if rows else TABLES["areas"].empty().drop(columns=["year", "fold"])
        storage.write_table("areas", areas, {"year": year, "fold": fold})
        record = _write_lineage(ws, year, fold, areas, cubes, extra)
        metadata = {
            "lineage": record,
            "glaciers": len(areas),
            "failed_glaciers": len(failures),
            "area_km2": float(areas["area_km2"].sum()),
            "lower_km2": float(areas["lower_km2"].sum()),
            "upper_km2": float(areas["upper_km2"].sum()),
            "median_recall": float(areas["recall"].median()) if len(areas) else None,
            "median_relative_std": float((areas["std_km2"] / areas["area_km2"]).median()) if len(areas) else None,
            "debris_area_km2": float(areas["debris_area_km2"].sum()),
            "pixels": ws.region.areas.pixels,
        }
        return frame_fingerprint(areas), metadata, {}

    inputs = {
        "predictions": ws.upstream("glacier_predictions", label),
        "taus": ws.upstream("interval_taus", fold_label(fold)),
        "threshold": ws.region.inference.threshold,
        "areas": _shares_inputs(ws),
    }
    return run_stage(ws, "glacier_areas", label, inputs, work, force=force)


def _assert_current(predictions: pd.DataFrame, cubes: pd.DataFrame) -> pd.DataFrame:
    """The predictions whose cube is still the one they were made from.

    Raises
    ------
    UpstreamError
        if some are not: an area must never mix an old map with a new cube.
    """
    now = cubes["fingerprint"].reindex(predictions["glacier_id"])
    stale = predictions.loc[now.to_numpy() != predictions["cube_fingerprint"].to_numpy(), "glacier_id"]
    if len(stale):
        raise UpstreamError(
            f"{len(stale)} maps are older than their cubes ({', '.join(stale.head(5))}): "
            "materialize glacier_predictions of this partition first"
        )
    return predictions


def _write_lineage(
    ws: Workspace, year: int, fold: int, areas: pd.DataFrame, cubes: pd.DataFrame, predictions: pd.DataFrame
) -> dict[str, Any]:
    """Write where the areas come from; returns the record for the metadata."""
    taus = areas.set_index("glacier_id")["tau"]
    record = write_lineage(ws, year, fold, areas["glacier_id"].tolist(), cubes, predictions, taus)
    return record.model_dump(mode="json")


def outlines_of(site: Site, year: int, fold: int, glacier_id: str) -> Any:
    """Outline rows of one glacier; runs in a worker process."""
    from dl4gam_assets.change import extract_outlines
    from dl4gam_assets.cubes import open_cube
    from dl4gam_assets.ensemble import read_prediction, read_prediction_tags

    with _map_and_cube(site, year, fold, glacier_id) as (map_path, cube_path):
        expect_map(site, year, fold, glacier_id, read_prediction_tags(map_path))
        prediction = read_prediction(map_path)
        with open_cube(cube_path) as cube:
            expect_cube(site, year, glacier_id, cube.attrs)
            return extract_outlines(
                prediction["mean"], prediction["std"], cube, _tau_of(site, glacier_id, fold),
                threshold=site.region.inference.threshold, sieve_px=site.region.change.sieve_px,
                shares=_shares_of(site, glacier_id, cube), simplify_m=site.region.areas.simplify_m,
            )  # fmt: skip


def glacier_outlines(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Polygons of the year's maps: best, lower, upper. What is read is asserted as for areas."""
    import geopandas as gpd
    import shapely

    folds = range(1, ws.region.folds.n + 1)
    label = str(year)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        predictions = ws.storage.read_table("predictions", year=year)
        cubes = ws.storage.read_table("cubes", year=year).set_index("glacier_id")
        for fold, of_fold in _assert_current(predictions, cubes).groupby("fold"):
            expect_calibrated(ws, int(fold), of_fold)
        tasks = [(r.glacier_id, (ws.site, year, int(r.fold), r.glacier_id)) for r in predictions.itertuples()]
        values, failures = ws.over_glaciers("glacier_outlines", label, outlines_of, tasks)
        frames = [f.assign(glacier_id=g) for g, f in values.items() if len(f)]
        if frames:
            outlines = gpd.GeoDataFrame(pd.concat(frames, ignore_index=True), crs="EPSG:4326")
        else:
            outlines = TABLES["outlines"].empty().drop(columns="year")
        outlines = outlines[[c for c in outlines.columns if c != "year"]]
        ws.storage.write_table("outlines", outlines, {"year": year})
        best = outlines[outlines["bound"] == "best"]
        metadata = {
            "glaciers": int(best["glacier_id"].nunique()),
            "area_km2": float(best["area_km2"].sum()),
            "corners": int(shapely.get_num_coordinates(outlines.geometry.array).sum()),
            "failed_glaciers": len(failures),
        }
        pictures = {"outlines": previews.outlines_map(best, title=f"{year}")} if len(best) else {}
        return frame_fingerprint(outlines), metadata, pictures

    inputs = {
        "predictions": {f: ws.upstream_or_none("glacier_predictions", year_fold_label(year, f)) for f in folds},
        "taus": {f: ws.upstream_or_none("interval_taus", fold_label(f)) for f in folds},
        "sieve": ws.region.change.sieve_px,
        "threshold": ws.region.inference.threshold,
        "areas": _shares_inputs(ws),
        "simplify_m": ws.region.areas.simplify_m,
    }
    return run_stage(ws, "glacier_outlines", label, inputs, work, force=force)


def baseline_areas(ws: Workspace, *, force: bool = False) -> StageResult:
    """Collect the baseline year's areas of all folds."""
    baseline = ws.region.years.baseline
    folds = range(1, ws.region.folds.n + 1)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        areas = ws.storage.read_table("areas", year=baseline)
        ws.storage.write_table("baseline_areas", areas)
        metadata = {
            "glaciers": len(areas),
            "area_km2": float(areas["area_km2"].sum()),
            "inventory_area_km2": float(areas["inventory_area_km2"].sum()),
            "median_recall": float(areas["recall"].median()) if len(areas) else None,
        }
        return frame_fingerprint(areas), metadata, {}

    inputs = {f: ws.upstream("glacier_areas", year_fold_label(baseline, f)) for f in folds}
    return run_stage(ws, "baseline_areas", "all", {str(k): v for k, v in inputs.items()}, work, force=force)
