"""Settings of the inference and of the baselines through the stages that read them, on real cube and model files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dl4gam_assets.compute import Mapper
from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube, write_cube
from dl4gam_assets.ensemble import read_members, read_prediction
from dl4gam_assets.segmentation import build_model, normalize, patch_centres, predict_logits, save_member
from dl4gam_assets.segmentation.training import TrainedMember
from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import predictions, training
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.segmentation.conftest import CHANNELS, MODEL, Small

ROLES = {"G0": "test", "G1": "train", "G2": "train", "G3": "valid"}
SIZES = {"patch_px": 32, "stride_px": 16, "window_px": 64, "overlap_px": 32}


@pytest.fixture(scope="module")
def home(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as it is after the ensemble of fold 1: two members (untrained, but real files)."""
    storage = Storage(tmp_path_factory.mktemp("home"))
    rows = []
    for glacier_id, path in small.cubes.items():
        target = Path(str(storage.cube(2015, glacier_id)))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_cube(path) as opened:
            cube = opened.load().assign_attrs(fingerprint=f"of-{glacier_id}", image_date="2015-08-20T10:00:00")
        write_cube(cube, target)
        height, width = cube["mask"].shape
        rows.append({
            "glacier_id": glacier_id, "image_date": pd.Timestamp("2015-08-20"), "scene_ids": "S",
            "fingerprint": f"of-{glacier_id}", "height_px": height, "width_px": width, "utm_epsg": 32632,
            "size_bytes": 1,
        })  # fmt: skip
    storage.write_table("cubes", pd.DataFrame(rows), {"year": 2015})
    storage.write_table("folds", pd.DataFrame([{"glacier_id": g, "fold": 1, "role": r} for g, r in ROLES.items()]))
    storage.write_table("normalization", small.statistics, {"fold": 1})
    manifest = []
    for member in (1, 2):
        torch.manual_seed(member)
        state = {k: v.contiguous() for k, v in build_model(MODEL, pretrained=False).state_dict().items()}
        trained = TrainedMember(state, pd.DataFrame({"epoch": [1]}), 1, 0.5, 8, 9, member)
        sha256 = save_member(storage, storage.model(1, member), trained, MODEL, small.statistics, {})
        manifest.append({"member": member, "sha256": sha256})
    storage.write_json(storage.path("models", "fold=1", "ensemble.json"), {"fold": 1, "members": manifest})
    return Path(str(storage.root))


def _workspace(home: Path, inference: dict[str, object], **more: object) -> Workspace:
    overrides = {f"inference.{k}": v for k, v in {**SIZES, **inference}.items()}
    region = load_region("demo", {"training.members": 2, **overrides, **more}).model_copy(update={"model": MODEL})
    ws = Workspace(region, Storage(home), Mapper(1), device="cpu")
    for asset, partition in (("ensemble", "fold_1"), ("glacier_cubes", "2015"), ("cross_validation_folds", "all")):
        ws.finish(asset, partition, "in", "out", 0.0)
    return ws


def _run(ws: Workspace) -> pd.DataFrame:
    for stage, arguments in (
        (training.band_ratio_baseline, (1,)),
        (training.calibration, (1,)),
        (predictions.glacier_predictions, (2015, 1)),
        (predictions.evaluation, (1,)),
    ):
        stage(ws, *arguments)
    assert not ws.storage.partitions("failures")
    return ws.storage.read_table("evaluation", fold=1)


def test_published_mode_for_a_whole_run(home: Path) -> None:
    ws = _workspace(home, {"mode": "stride", "keep_members": True})
    table = _run(ws)
    with open_cube(Path(str(ws.storage.cube(2015, "G0")))) as cube:
        stack, valid = channel_stack(cube, CHANNELS)
        zone, glacier, cell = (cube_mask(cube, n) for n in ("zone_50", "glacier", "cell"))
    path = Path(str(ws.storage.prediction(2015, "G0")))
    found, members = read_prediction(path), read_members(path)
    # The same by hand, from patches around the published centres.
    site = ws.site
    hashes = tuple(m["sha256"] for m in training.manifest_of(site, 1))
    models, statistics = training.load_ensemble(site, 1, hashes, "cpu", None)
    centres = patch_centres(zone, glacier, 16, extremes=True)
    logits = predict_logits(
        models, normalize(stack, CHANNELS, statistics), ws.region.inference, "cpu", centres=centres
    )  # fmt: skip
    temperatures, _ = training.calibration_of(site, 1)
    p = 1 / (1 + np.exp(-logits / temperatures[:, None, None]))
    np.testing.assert_allclose(members, p, atol=2e-5, equal_nan=True)
    reached = np.isfinite(p[0])
    assert not reached.all() and reached[glacier].all()
    plain = reached & (valid | ~zone)
    np.testing.assert_allclose(found["mean"][plain], p.mean(axis=0)[plain], atol=2e-5)
    assert np.isfinite(found["mean"][zone]).all() and np.isnan(found["mean"][~reached & ~zone]).all()
    # All methods are judged on the same pixels: those that were mapped.
    scene = table[table["scope"] == "scene"].set_index("method")
    assert (scene["n_pixels"] == int((valid & cell & np.isfinite(found["mean"])).sum())).all()
    assert int(scene["n_pixels"].iloc[0]) < int((valid & cell).sum())
    row = ws.storage.read_table("predictions", year=2015, fold=1).iloc[0]
    assert row[["predicted_area_km2", "mean_probability", "epistemic_std", "aleatoric_std"]].notna().all()
    calibration = ws.storage.read_table("calibration", fold=1)
    assert np.isfinite(calibration[["temperature", "ece_before", "ece_after"]].to_numpy(float)).all()


def test_every_evaluation_shows_the_baselines(home: Path) -> None:
    table = _run(_workspace(home, {"context_px": 8}))
    methods = {"ensemble", "band ratio red/swir16", "band ratio red/swir16 (oracle)", "random forest",
               "everything is glacier"}  # fmt: skip
    assert set(table["method"]) == methods
    scene = table[table["scope"] == "scene"].set_index("method")["iou"]
    assert scene["band ratio red/swir16 (oracle)"] >= scene["band ratio red/swir16"] > 0.5
    assert scene["random forest"] > 0.9 > scene["everything is glacier"]
    found = read_prediction(Path(str(Storage(home).prediction(2015, "G0"))))["mean"]
    assert 0 < np.isnan(found).mean() < 1
    without = _run(_workspace(home, {}, **{"baseline.random_forest": False}))
    assert set(without["method"]) == methods - {"random forest"}
    assert np.isfinite(read_prediction(Path(str(Storage(home).prediction(2015, "G0"))))["mean"]).all()


def test_calibration_holds_one_validation_glacier_at_a_time(home: Path, small: Small) -> None:
    """Sixteen validation glaciers take little more memory than one; their logits and masks pass through files."""
    ws = _workspace(home, {}, **{"calibration.pixel_share": 0.01})
    cubes = ws.storage.read_table("cubes", year=2015)
    folds = ws.storage.read_table("folds")
    copies = [f"G3-{k:02d}" for k in range(16)]

    def peak(ids: list[str]) -> int:
        """Bytes at once."""
        source = ws.storage.cube(2015, "G3")
        for glacier_id in ids:
            Path(str(ws.storage.cube(2015, glacier_id))).write_bytes(source.read_bytes())
        extra = cubes[cubes["glacier_id"] == "G3"].iloc[[0] * len(ids)].assign(glacier_id=ids)
        ws.storage.write_table("cubes", pd.concat([cubes, extra]).drop(columns="year"), {"year": 2015})
        rows = pd.DataFrame([{"glacier_id": g, "fold": 1, "role": "valid"} for g in ids])
        ws.storage.write_table("folds", pd.concat([folds[folds["role"] != "valid"], rows]))
        tracemalloc.start()
        try:
            training.calibration(ws, 1, force=True)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    try:
        training.calibration(ws, 1, force=True)  # imports and caches
        one, many = peak(copies[:1]), peak(copies)
    finally:
        ws.storage.write_table("cubes", cubes.drop(columns="year"), {"year": 2015})
        ws.storage.write_table("folds", folds)
    box = np.argwhere(_zone(home, "G3"))
    pixels = int(np.prod(box.max(axis=0) - box.min(axis=0) + 1))
    held = 25 * pixels  # bytes of a glacier: two members, mean and deviation, four masks and another, elevation
    assert many - one < 0.7 * 15 * held
    assert not ws.storage.path("work", "calibration", "fold=1").exists()


def _zone(home: Path, glacier_id: str) -> np.ndarray:
    with open_cube(Path(str(Storage(home).cube(2015, glacier_id)))) as cube:
        return cube_mask(cube, "zone_50")


def test_the_forest_is_the_same_whenever_it_is_fitted(home: Path) -> None:
    ws = _workspace(home, {})
    first = training.band_ratio_baseline(ws, 1, force=True).metadata["forest_sha256"]
    assert training.band_ratio_baseline(ws, 1).unchanged
    assert training.band_ratio_baseline(ws, 1, force=True).metadata["forest_sha256"] == first
    other = _workspace(home, {}, **{"training.seed": 3})
    assert training.band_ratio_baseline(other, 1).metadata["forest_sha256"] != first
