"""Stages of the group *predictions*: glacier maps, and how good they are on held-out glaciers."""

from __future__ import annotations

import functools
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dl4gam_assets.compute import choose_device, place_of
from dl4gam_assets.settings import fingerprint
from dl4gam_assets.stages import previews
from dl4gam_assets.stages.base import (
    Site,
    StageResult,
    Workspace,
    cached_table,
    file_fingerprint,
    fold_label,
    frame_fingerprint,
    run_stage,
    year_fold_label,
)
from dl4gam_assets.stages.mending import removing_damaged
from dl4gam_assets.stages.provenance import expect_calibrated, expect_cube, expect_made_from_present, expect_map
from dl4gam_assets.stages.training import calibration_of, forest_path, logits_of
from dl4gam_assets.tables import TABLES

if TYPE_CHECKING:
    import xarray as xr

    from dl4gam_assets.ensemble.random_forest import Forest


def prediction_of(
    site: Site, year: int, fold: int, glacier_id: str, wanted: str, device: str, threads: int | None
) -> dict[str, Any]:
    """Map one glacier unless the file made from the same inputs is there; runs in a worker process."""
    from dl4gam_assets.cubes import cube_mask, open_cube
    from dl4gam_assets.ensemble import aggregate, digits_of, read_prediction_tags, tau_features, write_prediction
    from dl4gam_assets.segmentation import fill_gaps

    storage = site.storage
    path = storage.prediction(year, glacier_id)
    if path.exists():
        with storage.reading(path) as local:
            tags = read_prediction_tags(local)
        if tags.get("fingerprint") == wanted:
            return dict(json.loads(tags["row"]))
    start = time.perf_counter()
    device = choose_device(device)
    temperatures, hashes = calibration_of(site, fold)
    cube_path = storage.cube(year, glacier_id)
    with (
        removing_damaged(site, "glacier_cubes", str(year), cube_path),
        storage.reading(cube_path) as local,
        open_cube(local) as cube,
    ):
        expect_cube(site, year, glacier_id, cube.attrs)
        stream, valid = logits_of(site, cube, fold, device, threads)
        kept: list[np.ndarray] = []
        keep = (lambda p: kept.append(digits_of(p))) if site.region.inference.keep_members else None
        mean, std = aggregate(stream, temperatures, each=keep)
        zone = cube_mask(cube, "zone_50")
        dem = cube["dem"].to_numpy() if "dem" in cube else None
        mean, std, filled = fill_gaps(mean, std, valid, zone, dem, site.region.inference)
        allowed = cube_mask(cube, "zone_20")
        grid = cube.odc.geobox
        pixel = abs(grid.resolution.x * grid.resolution.y) / 1e6
        area = float(((mean >= site.region.inference.threshold) & allowed).sum() * pixel)
        features = tau_features(mean, std, allowed, area)
        row = {
            "glacier_id": glacier_id,
            "fingerprint": wanted,
            "cube_fingerprint": cube.attrs["fingerprint"],
            "member_sha256": hashes,
            "filled_share": float((filled & zone).sum() / max(int(zone.sum()), 1)),
            "predicted_area_km2": area,
            "mean_probability": float(features["mean_probability"]),
            "epistemic_std": float(features["epistemic_std"]),
            "aleatoric_std": float(features["aleatoric_std"]),
        }
        image_date = str(cube.attrs["image_date"])
    row["seconds"] = time.perf_counter() - start
    tags = {
        "fingerprint": wanted, "row": json.dumps(row), "glacier_id": glacier_id, "year": str(year),
        "image_date": image_date, "fold": fold_label(fold), "region": site.region.name,
    }  # fmt: skip
    with storage.writing(path) as temporary:
        write_prediction(temporary, mean, std, grid, tags, dict(enumerate(kept, start=1)))
    return row


def prediction_preview(site: Site, year: int, glacier_id: str) -> bytes:
    """Inventory and predicted outline over the image."""
    from dl4gam_assets.cubes import cube_mask, open_cube, true_colour
    from dl4gam_assets.ensemble import read_prediction

    storage = site.storage
    with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
        bands = {str(b): cube["reflectance"].sel(band=b).to_numpy() for b in cube["band"].to_numpy()}
        outline, zone = cube_mask(cube, "glacier"), cube_mask(cube, "zone_20")
        date = str(cube.attrs["image_date"])[:10]
    with storage.reading(storage.prediction(year, glacier_id)) as local:
        predicted = read_prediction(local)["mean"] >= site.region.inference.threshold
    return previews.contours(
        true_colour(bands),
        [(outline, "#ffffff", "inventory"), (predicted & zone, "#ff7f00", "predicted")],
        f"{glacier_id}, {date}",
        site.region.imagery.sensor.pixel_m,
    )


def glacier_predictions(ws: Workspace, year: int, fold: int, *, force: bool = False) -> StageResult:
    """Map the fold's test glaciers of a year with the fold's calibrated ensemble."""
    label = year_fold_label(year, fold)
    inference = ws.region.inference.model_dump(mode="json")
    inputs = {
        "cubes": ws.upstream("glacier_cubes", str(year)),
        "ensemble": ws.upstream("ensemble", fold_label(fold)),
        "calibration": ws.upstream("calibration", fold_label(fold)),
        "folds": ws.upstream("cross_validation_folds"),
        "inference": inference,
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        storage = ws.storage
        calibration_of(ws.site, fold)  # refuses weights that the calibration never saw
        folds = storage.read_table("folds")
        tested = set(folds.loc[(folds["fold"] == fold) & (folds["role"] == "test"), "glacier_id"])
        cubes = storage.read_table("cubes", year=year)
        cubes = cubes[cubes["glacier_id"].isin(tested)]
        place = place_of(ws.mapper, ws.device)
        ws.used_device = place.device if place.mapper.scheduler is None else f"workers of a scheduler ({place.device})"
        tasks = []
        for cube in cubes.itertuples():
            wanted = fingerprint(
                [
                    cube.fingerprint,
                    inputs["ensemble"],
                    inputs["calibration"],
                    inference,
                    ws.region.model.channels,
                ]
            )
            arguments = (ws.site, year, fold, cube.glacier_id, wanted, place.device, place.threads)
            tasks.append((cube.glacier_id, arguments))
        rows, failures = ws.over_glaciers("glacier_predictions", label, prediction_of, tasks, place.mapper)
        frame = pd.DataFrame(list(rows.values()))
        if not len(frame):
            frame = TABLES["predictions"].empty().drop(columns=["year", "fold"])
        storage.write_table("predictions", frame, {"year": year, "fold": fold})
        pictures = {}
        if len(frame):
            largest = str(frame.loc[frame["predicted_area_km2"].idxmax(), "glacier_id"])
            pictures["largest glacier"] = prediction_preview(ws.site, year, largest)
        metadata = {
            "glaciers": len(frame),
            "failed_glaciers": len(failures),
            "predicted_area_km2": float(frame["predicted_area_km2"].sum()),
            "mean_probability": float(frame["mean_probability"].mean()) if len(frame) else None,
            "mean_epistemic_std": float(frame["epistemic_std"].mean()) if len(frame) else None,
            "mean_filled_share": float(frame["filled_share"].mean()) if len(frame) else None,
        }
        return frame_fingerprint(frame, ["seconds"]), metadata, pictures

    return run_stage(ws, "glacier_predictions", label, inputs, work, force=force)


@functools.lru_cache(maxsize=1)
def _forest(site: Site, fold: int, stamp: str) -> Forest:
    """The fold's Random Forest, read once a process while ``stamp`` (of the baseline) is the same."""
    from dl4gam_assets.ensemble import load_forest

    with site.storage.reading(forest_path(site, fold)) as local:
        return load_forest(local, site.region.model.channels)


def _not_judged(cube: xr.Dataset, where: np.ndarray) -> xr.Dataset:
    """The cube with more unusable pixels, which no method is judged on."""
    layer = cube["mask"]
    bit = np.uint16(1 << str(layer.attrs["flag_meanings"]).split().index("not_ok"))
    return cube.assign(mask=layer.copy(data=layer.to_numpy().astype(np.uint16) | np.where(where, bit, np.uint16(0))))


def evaluation_of(site: Site, fold: int, glacier_id: str, stamp: str) -> pd.DataFrame:
    """Evaluation rows of one held-out glacier: ensemble and baselines; runs in a worker process.

    All methods are judged on the same pixels: where the ensemble made no prediction (far from the
    glacier, with mode ``stride`` or ``context_px``) none is. ``stamp`` is the fingerprint of the fold's baselines.
    """
    from dl4gam_assets.change import evaluate_glacier
    from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
    from dl4gam_assets.ensemble import apply_baseline, fit_oracle, read_prediction, read_prediction_tags
    from dl4gam_assets.ensemble.random_forest import METHOD
    from dl4gam_assets.inventory import outline_mask

    storage, year = site.storage, site.region.years.baseline
    baselines = cached_table(site, "baseline", fold=fold)
    with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as opened:
        cube = opened.load()
    with storage.reading(storage.prediction(year, glacier_id)) as local:
        expect_map(site, year, fold, glacier_id, read_prediction_tags(local))
        mean = read_prediction(local)["mean"]
    masks = {"ensemble": mean >= site.region.inference.threshold}
    if np.isnan(mean).any():
        cube = _not_judged(cube, np.isnan(mean))
    bands = {str(b): cube["reflectance"].sel(band=b).to_numpy() for b in cube["band"].to_numpy()}
    # What a map without any skill would get: where most pixels are ice, that is a lot.
    masks["everything is glacier"] = np.ones(masks["ensemble"].shape, dtype=bool)
    outline, cell, valid = (cube_mask(cube, "glacier"), cube_mask(cube, "cell"), ~cube_mask(cube, "not_ok"))
    assert outline.any(), f"{glacier_id}: the cube does not contain its glacier"
    for _, row in baselines.iterrows():
        if row["method"] == METHOD:
            judged = valid & (cell | outline | cube_mask(cube, "zone_50"))
            stack, _ = channel_stack(cube, site.region.model.channels)
            masks[METHOD] = _forest(site, fold, stamp).probability(stack, judged) >= 0.5
        else:
            masks[str(row["method"])] = apply_baseline(bands, row)
    sample = (bands, cube_mask(cube, "any_glacier"), valid & cell, float(outline.sum()))
    oracle = fit_oracle(sample, list(bands)).iloc[0]
    masks[str(oracle["method"])] = apply_baseline(bands, oracle)
    settings, second = site.region.evaluation, None
    if settings.reference is not None:
        second = outline_mask(site.data_root / settings.reference, settings.reference_layer, cube.odc.geobox)
    return pd.concat(
        [evaluate_glacier(mask, cube, method, reference=second) for method, mask in masks.items()], ignore_index=True
    )


def evaluation(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Judge the fold's held-out maps of the inventory year against the inventory, beside the baselines."""
    baseline = ws.region.years.baseline
    label = fold_label(fold)
    reference, layer = ws.region.evaluation.reference, ws.region.evaluation.reference_layer

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        from dl4gam_assets.change import class_scores, glacier_classes, pooled_scores
        from dl4gam_assets.change.evaluation import RECALL_ONLY
        from dl4gam_assets.stages.areas import _assert_current

        maps = ws.storage.read_table("predictions", year=baseline, fold=fold)
        _assert_current(maps, ws.storage.read_table("cubes", year=baseline).set_index("glacier_id"))
        expect_calibrated(ws, fold, maps)
        expect_made_from_present(ws, "glacier_predictions", year_fold_label(baseline, fold))
        ids = maps["glacier_id"].tolist()
        stamp = str(inputs["baseline"])
        tasks = [(g, (ws.site, fold, g, stamp)) for g in ids]
        values, failures = ws.over_glaciers("evaluation", label, evaluation_of, tasks)
        frames = [f.assign(glacier_id=g, role="test") for g, f in values.items()]
        frame = pd.concat(frames, ignore_index=True) if frames else TABLES["evaluation"].empty().drop(columns="fold")
        classes = glacier_classes(
            ws.storage.read_table("glaciers"),
            ws.storage.read_table("debris") if ws.region.inventory.debris else None,
            ws.region.change.size_class_edges_km2,
            ws.region.evaluation.debris_covered_min,
        )
        frame = frame.drop(columns=[c for c in classes if c in frame]).join(classes, on="glacier_id")
        ws.storage.write_table("evaluation", frame, {"fold": fold})
        judged = ws.storage.read_table("evaluation", fold=fold)
        scores = pooled_scores(judged)
        metadata: dict[str, Any] = {"glaciers": len(values), "failed_glaciers": len(failures)}
        for row in scores.itertuples():
            if row.scope in RECALL_ONLY:
                metadata[f"{row.method}_{row.scope}_recall"] = _finite(row.recall)
            else:
                metadata[f"{row.method}_{row.scope}_iou"] = _finite(row.iou)
        metadata["ensemble_by_class"] = _by_class(class_scores(judged))
        if ws.region.evaluation.note:
            metadata["read_this_first"] = ws.region.evaluation.note
        return frame_fingerprint(frame), metadata, {}

    inputs: dict[str, Any] = {
        "predictions": ws.upstream("glacier_predictions", year_fold_label(baseline, fold)),
        "baseline": ws.upstream("band_ratio_baseline", label),
        "threshold": ws.region.inference.threshold,
        "note": ws.region.evaluation.note,
        "classes": {
            "version": 1,
            "glaciers": ws.upstream_or_none("inventory_outlines"),
            "debris": ws.upstream_or_none("debris_outlines"),
            "edges": ws.region.change.size_class_edges_km2,
            "debris_covered_min": ws.region.evaluation.debris_covered_min,
        },
        "reference": None if reference is None else [file_fingerprint(ws.data_root / reference), layer],
    }
    return run_stage(ws, "evaluation", label, inputs, work, force=force)


def _by_class(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """The ensemble's scores by size class and debris, a row a class, for people to look at."""
    shown = scores[scores["method"] == "ensemble"]
    rows = []
    for (grouping, group), part in shown.groupby(["grouping", "group"], sort=False):
        of_class = part.set_index("scope")
        row: dict[str, Any] = {"by": grouping, "class": group, "glaciers": int(of_class["n_glaciers"].max())}
        for name, scope, score in (
            ("scene IoU", "scene", "iou"), ("scene IoU, by area", "scene", "weighted_iou"),
            ("scene IoU, mean", "scene", "mean_iou"), ("scene precision", "scene", "precision"),
            ("scene recall", "scene", "recall"), ("scene F1", "scene", "f1"), ("ring IoU, mean", "ring", "mean_iou"),
            ("ring F1, mean", "ring", "mean_f1"), ("recall on debris", "debris", "recall"),
            ("recall on clean ice", "clean_ice", "recall"),
        ):  # fmt: skip
            row[name] = _finite(of_class.loc[scope, score]) if scope in of_class.index else None
        rows.append(row)
    return rows


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(float(value)) else None
