"""Stages of the group *training*: normalization, members, ensemble, calibration, baseline."""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from upath import UPath

from dl4gam_assets.compute import Done, choose_device, default_workers
from dl4gam_assets.settings import Region, TrainingSettings, fingerprint
from dl4gam_assets.stages import previews
from dl4gam_assets.stages.base import (
    NamedInputs,
    Site,
    StageResult,
    UpstreamError,
    Workspace,
    cached_table,
    fold_label,
    fold_member_label,
    frame_fingerprint,
    input_fingerprint,
    named_inputs,
    run_stage,
)
from dl4gam_assets.stages.files import changed_files, full_hash, record_files


def members_of(ws_or_site: Workspace | Site, fold: int, role: str) -> list[str]:
    """Glaciers of a fold in a role that have a cube in the baseline year.

    Raises
    ------
    UpstreamError
        if there is none.
    """
    site = ws_or_site.site if isinstance(ws_or_site, Workspace) else ws_or_site
    folds = site.storage.read_table("folds")
    wanted = folds.loc[(folds["fold"] == fold) & (folds["role"] == role), "glacier_id"]
    cubes = set(site.storage.read_table("cubes", year=site.region.years.baseline)["glacier_id"])
    found = [g for g in wanted if g in cubes]
    if not found:
        raise UpstreamError(
            f"fold {fold} has no {role} glacier with an image in the baseline year {site.region.years.baseline}: "
            "use fewer folds, or give those glaciers an image (overrides)"
        )
    return found


def _baseline_cubes(ws: Workspace) -> str:
    return ws.upstream("glacier_cubes", str(ws.region.years.baseline))


def _stacks(site: Site, ids: list[str], year: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from dl4gam_assets.cubes import channel_stack, open_cube

    storage = site.storage
    for glacier_id in ids:
        with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
            yield channel_stack(cube, site.region.model.channels)


# --------------------------------------------------------------------------------------------- normalization
def normalization(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Mean and standard deviation of the channels over the fold's training glaciers."""
    from dl4gam_assets.segmentation import normalization_statistics

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        ids = members_of(ws, fold, "train")
        statistics = normalization_statistics(_stacks(ws.site, ids, ws.region.years.baseline), ws.region.model.channels)
        ws.storage.write_table("normalization", statistics, {"fold": fold})
        rows = [
            {"channel": r.channel, "mean": round(float(r.mean), 5), "std": round(float(r.std), 5)}
            for r in statistics.itertuples()
        ]
        return frame_fingerprint(statistics), {"train_glaciers": len(ids), "channels": rows}, {}

    inputs = {
        "cubes": _baseline_cubes(ws),
        "folds": ws.upstream("cross_validation_folds"),
        "channels": ws.region.model.channels,
    }
    return run_stage(ws, "normalization", fold_label(fold), inputs, work, force=force)


# --------------------------------------------------------------------------------------------- members
def packed_folder(site: Site, stamp: str) -> Path:
    """Folder of the packed training layers of a state of the baseline cubes."""
    if not site.storage.is_local:
        import tempfile

        return Path(tempfile.gettempdir()) / f"dl4gam-packed-{site.region.name}-{stamp}"
    return Path(str(site.storage.path("packed", stamp)))


def pack(ws: Workspace) -> tuple[Path, str]:
    """Pack the baseline year's cubes once for all members; returns the folder and its fingerprint."""
    import shutil

    from dl4gam_assets.segmentation import pack_cubes

    stamp = fingerprint([_baseline_cubes(ws), ws.region.model.channels, ws.region.training.train_step_px,
                         ws.region.training.validation_step_px, ws.region.training.patch_px])  # fmt: skip
    folder = packed_folder(ws.site, stamp)
    if not (folder / "packed.json").exists():
        storage = ws.storage
        ids = sorted(storage.read_table("cubes", year=ws.region.years.baseline)["glacier_id"])
        if folder.parent.exists() and storage.is_local:
            for old in folder.parent.iterdir():  # layers of earlier cubes are of no use any more
                shutil.rmtree(old, ignore_errors=True)
        start = time.perf_counter()
        cubes = {g: Path(str(storage.cube(ws.region.years.baseline, g))) for g in ids}
        pack_cubes(cubes, ws.region.model.channels, folder)
        ws.logger.info(f"packed {len(ids)} cubes in {time.perf_counter() - start:.1f} s")
    return folder, stamp


def _seed(training: TrainingSettings, fold: int, member: int) -> int:
    return training.seed + 1000 * fold + member


def _with_overrides(region: Region, overrides: Mapping[str, Any]) -> Region:
    if not overrides:
        return region
    training = TrainingSettings.model_validate({**region.training.model_dump(), **overrides})
    return region.model_copy(update={"training": training})


def _member_inputs(ws: Workspace, fold: int, member: int, region: Region) -> dict[str, Any]:
    return {
        "normalization": ws.upstream("normalization", fold_label(fold)),
        "cubes": _baseline_cubes(ws),
        "folds": ws.upstream("cross_validation_folds"),
        "model": region.model.model_dump(mode="json"),
        "training": region.training.model_dump(mode="json", exclude={"members"}),
        "seed": _seed(region.training, fold, member),
    }


def train_one(
    site: Site, fold: int, member: int, packed: str, device: str, threads: int, wanted: str
) -> dict[str, Any]:
    """Train one member and store it; goes on from its last epoch after a crash. Runs in a worker process."""
    from dl4gam_assets.segmentation import PackedCubes, save_member, train_member

    storage, region = site.storage, site.region
    statistics = storage.read_table("normalization", fold=fold)
    if storage.is_local:
        work = Path(str(storage.path("work", f"fold={fold}", f"member={member:02d}")))
    else:
        work = Path(packed).parent / f"dl4gam-work-{region.name}-{fold}-{member}"
    start = time.perf_counter()
    trained = train_member(
        PackedCubes.open(Path(packed)),
        members_of(site, fold, "train"),
        members_of(site, fold, "valid"),
        statistics,
        region.model,
        region.training,
        seed=_seed(region.training, fold, member),
        device=choose_device(device),
        work_dir=work,
        threads=threads,
    )
    seconds = time.perf_counter() - start
    sha256 = save_member(
        storage, storage.model(fold, member), trained, region.model, statistics, {"fingerprint": wanted}
    )
    import shutil

    shutil.rmtree(work, ignore_errors=True)
    return {
        "seed": _seed(region.training, fold, member),
        "sha256": sha256,
        "best_epoch": trained.best_epoch,
        "validation_iou": trained.validation_iou,
        "epochs": len(trained.history),
        "train_patches": trained.train_patches,
        "seconds": seconds,
        "parameters": trained.parameters,
        "fingerprint": wanted,
        "history": trained.history,
    }


def ensemble_members(
    ws: Workspace,
    wanted: Mapping[str, tuple[int, int]],
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> dict[str, StageResult | Exception]:
    """Train the given members (partition key -> fold, member), as many at once as there are processes.

    Each is stored when it is ready; one that fails is an exception in the result and never stops the others.
    """
    region = _with_overrides(ws.region, overrides or {})
    site = Site(region, str(ws.storage.root))
    out: dict[str, StageResult | Exception] = {}
    todo: dict[str, tuple[int, int, str]] = {}
    named: dict[str, NamedInputs] = {}
    for key, (fold, member) in wanted.items():
        try:
            inputs = _member_inputs(ws, fold, member, region)
            fingerprint_now, named[key] = input_fingerprint(inputs), named_inputs(inputs)
        except UpstreamError as error:
            out[key] = error
            continue
        label = fold_member_label(fold, member)
        state = ws.storage.read_state("ensemble_member", label)
        stored = (ws.storage.model(fold, member) / "model.safetensors").exists()
        changed = tuple(str(file) for file in changed_files(ws, "ensemble_member", label, full_hash))
        current = bool(state and state["input"] == fingerprint_now and stored and not changed and not force)
        if ws.probe:
            out[key] = StageResult(
                label, unchanged=current, inputs=named[key], input=fingerprint_now, changed=changed
            )
        elif state and current:
            metadata = {**state.get("metadata", {}), "unchanged": True}
            out[key] = StageResult(label, metadata, _stored_curves(ws, fold, member), unchanged=True)
        else:
            todo[key] = (fold, member, fingerprint_now)
    if ws.probe or not todo:
        return out
    packed, _ = pack(ws)
    at_once = min(ws.mapper.workers, len(todo)) if choose_device(ws.device) == "cpu" else 1
    threads = max(default_workers() // max(at_once, 1), 1)
    tasks = [(key, (site, f, m, str(packed), ws.device, threads, now)) for key, (f, m, now) in todo.items()]

    def progress(done: int, total: int, seconds: float) -> None:
        ws.logger.info(f"ensemble_member: {done} of {total} members, {seconds / max(done, 1):.0f} s each")

    for done in ws.mapper.map(train_one, tasks, progress=progress):
        fold, member, now = todo[done.key]
        out[done.key] = _store_member(ws, fold, member, now, done, named[done.key])
    return out


def _stored_curves(ws: Workspace, fold: int, member: int) -> dict[str, bytes]:
    path = ws.storage.model(fold, member) / "history.parquet"
    if not path.exists():
        return {}
    with ws.storage.reading(path) as local:
        return _curves(pd.read_parquet(local), fold_member_label(fold, member))


def _curves(history: pd.DataFrame, label: str) -> dict[str, bytes]:
    columns = ["train_loss", "validation_loss", "validation_iou"]
    return {"training curves": previews.curves(history, "epoch", columns, label)}


def _store_member(
    ws: Workspace, fold: int, member: int, wanted: str, done: Done, named: NamedInputs
) -> StageResult | Exception:
    label = fold_member_label(fold, member)
    if not done.ok:
        return RuntimeError(f"{label}: {done.kind}: {done.error}")
    row = dict(done.value)
    history = row.pop("history")
    ws.storage.write_table("members", pd.DataFrame([row]), {"fold": fold, "member": member})
    metadata = {
        "validation_iou": row["validation_iou"],
        "best_epoch": row["best_epoch"],
        "epochs": row["epochs"],
        "patches_per_epoch": row["train_patches"],
        "parameters": row["parameters"],
        "training_seconds": round(row["seconds"], 1),
        "weights_sha256": row["sha256"],
        "encoder_weights": ws.region.model.encoder_weights or "none (random)",
    }
    if ws.storage.is_local:
        weights = Path(str(ws.storage.model(fold, member) / "model.safetensors"))
        record_files(ws, "ensemble_member", label, {weights: [label]}, full_hash)
    ws.finish("ensemble_member", label, wanted, row["sha256"], row["seconds"], named, metadata=metadata)
    return StageResult(label, metadata, _curves(history, label))


# --------------------------------------------------------------------------------------------- ensemble, calibration
def ensemble(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Collect the members of a fold: what predictions are made from."""
    numbers = range(1, ws.region.training.members + 1)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        members = ws.storage.read_table("members", fold=fold)
        members = members[members["member"].isin(list(numbers))].sort_values("member")
        manifest = {
            "fold": fold,
            "members": [{"member": int(r.member), "sha256": str(r.sha256)} for r in members.itertuples()],
        }
        ws.storage.write_json(ws.storage.path("models", f"fold={fold}", "ensemble.json"), manifest)
        metadata = {
            "members": len(members),
            "mean_validation_iou": float(members["validation_iou"].mean()),
            "training_seconds": float(members["seconds"].sum()),
        }
        return fingerprint(manifest), metadata, {}

    inputs = {str(m): ws.upstream("ensemble_member", fold_member_label(fold, m)) for m in numbers}
    return run_stage(ws, "ensemble", fold_label(fold), inputs, work, force=force)


def manifest_of(site: Site, fold: int) -> list[dict[str, Any]]:
    """Members and weight hashes of a fold's ensemble, by member."""
    manifest = site.storage.read_json(site.storage.path("models", f"fold={fold}", "ensemble.json"))
    if manifest is None:
        raise UpstreamError(f"ensemble [fold_{fold}] is not there yet: materialize it first")
    return sorted(manifest["members"], key=lambda m: m["member"])


@functools.lru_cache(maxsize=1)  # partitions come fold by fold, and ten networks of the paper are a gigabyte
def load_ensemble(site: Site, fold: int, hashes: tuple[str, ...], device: str, threads: int | None) -> Any:
    """Models and statistics of a fold, loaded once a process; refused unless their hashes are those of the manifest and
    they were trained on the region's channels with the fold's normalization."""
    import torch

    from dl4gam_assets.segmentation import load_member

    if threads:
        torch.set_num_threads(threads)
    models = []
    statistics = site.storage.read_table("normalization", fold=fold)
    for entry, wanted in zip(manifest_of(site, fold), hashes, strict=True):
        folder = site.storage.model(fold, entry["member"])
        model, _ = load_member(site.storage, folder, wanted, channels=site.region.model.channels, statistics=statistics)
        models.append(model.to(device).eval())
    return models, statistics


def logits_of(
    site: Site, cube: Any, fold: int, device: str, threads: int | None
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Logits (H, W) float32 of one member after the other, and the valid mask (H, W), of an open cube.

    In mode ``stride`` patches lie around the published centres; pixels that none of them reaches are NaN, and so are
    those beyond ``context_px``.
    """
    from dl4gam_assets.cubes import channel_stack, cube_mask
    from dl4gam_assets.segmentation import member_logits, normalize, patch_centres

    hashes = tuple(m["sha256"] for m in manifest_of(site, fold))
    models, statistics = load_ensemble(site, fold, hashes, device, threads)
    inference, channels = site.region.inference, site.region.model.channels
    stack, valid = channel_stack(cube, channels)
    zone, glacier = cube_mask(cube, "zone_50"), cube_mask(cube, "glacier")
    centres = None
    if inference.mode == "stride":
        centres = patch_centres(zone, glacier, inference.stride_px, extremes=True)
    ready = normalize(stack, channels, statistics)
    return member_logits(models, ready, inference, device, centres=centres, zone=zone | glacier), valid


def validation_of(
    site: Site, fold: int, glacier_id: str, device: str, threads: int | None, share: float, seed: int
) -> dict[str, Any]:
    """What calibration needs of one validation glacier; runs in a worker process.

    A uniform sample of the valid pixels of its cell (``sample_logits`` (M, N), ``sample_labels`` (N,)), drawn here, and
    logits and masks cut to the box of its 50 m zone, so that the memory of a fold's validation glaciers goes with their
    area, not with their cubes.
    """
    from dl4gam_assets.cubes import cube_mask, open_cube

    storage = site.storage
    with (
        storage.reading(storage.cube(site.region.years.baseline, glacier_id)) as local,
        open_cube(local) as cube,
    ):
        stream, valid = logits_of(site, cube, fold, device, threads)
        names = {"zone": "zone_50", "allowed": "zone_20", "outline": "glacier"}
        masks = {key: cube_mask(cube, name) for key, name in names.items()}
        wanted = masks["zone"] | masks["outline"]
        rows, columns = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else np.s_[:, :]
        usable, chosen = valid & cube_mask(cube, "cell"), np.empty(0, dtype=int)
        logits, sampled = [], []
        for member, layer in enumerate(stream):
            if member == 0:
                # The same pixels for all members; those that no patch reaches have no logits in any of them.
                places = np.flatnonzero(usable & np.isfinite(layer))
                rng = np.random.default_rng([seed, zlib.crc32(glacier_id.encode())])
                size = max(round(share * places.size), min(places.size, 1))
                chosen = rng.choice(places, size=size, replace=False)
            logits.append(layer[box].copy())
            sampled.append(layer.ravel()[chosen])
        pixel = abs(cube.odc.geobox.resolution.x * cube.odc.geobox.resolution.y) / 1e6
        return {
            "sample_logits": np.stack(sampled),
            "sample_labels": cube_mask(cube, "any_glacier").ravel()[chosen],
            "logits": np.stack(logits),
            "valid": valid[box],
            **{name: mask[box] for name, mask in masks.items()},
            "dem": cube["dem"].to_numpy()[box] if "dem" in cube else None,
            "pixel_km2": float(pixel),
        }


def calibration(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Fit temperatures and the rule of tau on the fold's validation glaciers, in the inventory year."""
    label = fold_label(fold)
    settings = ws.region.calibration
    inputs = {
        "ensemble": ws.upstream("ensemble", label),
        "cubes": _baseline_cubes(ws),
        "settings": settings.model_dump(mode="json"),
        "inference": ws.region.inference.model_dump(mode="json"),
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        from dl4gam_assets import ensemble as science
        from dl4gam_assets.segmentation import fill_gaps

        ids = members_of(ws, fold, "valid")
        device, seed = choose_device(ws.device), ws.region.training.seed + fold
        values, _ = ws.over_glaciers(
            "calibration",
            label,
            validation_of,
            [(g, (ws.site, fold, g, device, _threads(ws, device), settings.pixel_share, seed)) for g in ids],
        )
        if not values:
            raise UpstreamError(
                f"fold {fold}: none of its {len(ids)} validation glaciers could be predicted (see failures)"
            )
        logits = np.concatenate([value["sample_logits"] for value in values.values()], axis=1)
        labels = np.concatenate([value["sample_labels"] for value in values.values()])
        temperatures = [science.fit_temperature(row, labels, settings.temperature_bounds) for row in logits]
        before, _ = science.aggregate(logits, np.ones(len(logits)))
        after, _ = science.aggregate(logits, np.asarray(temperatures))
        ece = [science.expected_calibration_error(p, labels, settings.ece_bins) for p in (before, after)]

        features, taus, truths, intervals = [], [], [], []
        for value in values.values():
            mean, std = science.aggregate(value["logits"], np.asarray(temperatures))
            mean, std, _ = fill_gaps(mean, std, value["valid"], value["zone"], value["dem"], ws.region.inference)
            truth = float(value["outline"].sum() * value["pixel_km2"])
            area = float(((mean >= ws.region.inference.threshold) & value["allowed"]).sum() * value["pixel_km2"])
            features.append(science.tau_features(mean, std, value["allowed"], area))
            taus.append(science.largest_covering_tau(
                mean, std, value["allowed"], value["pixel_km2"], truth, settings.tau_step, settings.tau_max
            ))  # fmt: skip
            truths.append(truth)
            intervals.append((mean, std, value["allowed"], value["pixel_km2"]))
        table = pd.DataFrame(features)
        rule = science.fit_tau(table, np.asarray(taus), settings)
        covered = []
        for tau, truth, (mean, std, allowed, pixel) in zip(rule.predict(table), truths, intervals, strict=True):
            lower, upper = science.interval_masks(mean, std, float(tau), allowed)
            covered.append(lower.sum() * pixel - 1e-9 <= truth <= upper.sum() * pixel + 1e-9)
        manifest = manifest_of(ws.site, fold)
        frame = pd.DataFrame(
            {
                "member": [m["member"] for m in manifest],
                "sha256": [m["sha256"] for m in manifest],
                "temperature": temperatures,
                "ece_before": ece[0],
                "ece_after": ece[1],
                "method": rule.method,
                "n_glaciers": len(values),
                "coefficients": rule.to_json(),
                "validation_coverage": float(np.mean(covered)),
            }
        )
        ws.storage.write_table("calibration", frame, {"fold": fold})
        metadata = {
            "validation_glaciers": len(values),
            "method": rule.method,
            "ece_before": ece[0],
            "ece_after": ece[1],
            "mean_temperature": float(np.mean(temperatures)),
            "median_tau": float(np.median(taus)),
            "validation_coverage": float(np.mean(covered)),
        }
        bins = settings.ece_bins
        picture = previews.reliability(
            science.reliability(before, labels, bins), science.reliability(after, labels, bins), label
        )
        return frame_fingerprint(frame), metadata, {"reliability": picture}

    return run_stage(ws, "calibration", label, inputs, work, force=force)


def _threads(ws: Workspace, device: str) -> int | None:
    return max(default_workers() // ws.mapper.workers, 1) if device == "cpu" else None


# --------------------------------------------------------------------------------------------- baseline
def band_ratio_baseline(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Fit the classical threshold on the fold's training and validation glaciers, and a Random Forest on pixels of the
    training glaciers; each cube is read once for both."""
    label = fold_label(fold)
    settings, channels = ws.region.baseline, ws.region.model.channels

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
        from dl4gam_assets.ensemble import fit_baseline, fit_forest, sample_pixels
        from dl4gam_assets.ensemble.random_forest import METHOD

        train = members_of(ws, fold, "train")
        ids = [*train, *members_of(ws, fold, "valid")]
        storage, year = ws.storage, ws.region.years.baseline
        of_forest = set(train) if settings.random_forest else set()
        count, rng = max(settings.pixels // len(train), 1), np.random.default_rng([ws.region.training.seed, fold])
        drawn: list[tuple[np.ndarray, np.ndarray]] = []

        def samples() -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, float]]:
            for glacier_id in ids:
                with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
                    bands = {str(b): cube["reflectance"].sel(band=b).to_numpy() for b in cube["band"].to_numpy()}
                    target = cube_mask(cube, "any_glacier")
                    valid = ~cube_mask(cube, "not_ok") & cube_mask(cube, "cell")
                    if glacier_id in of_forest:
                        drawn.append(sample_pixels(channel_stack(cube, channels)[0], valid, target, count, rng))
                    yield bands, target, valid, float(cube_mask(cube, "glacier").sum())

        frame = fit_baseline(samples(), list(ws.region.imagery.sensor.bands))
        best = frame.sort_values("fit_iou").iloc[-1]
        metadata = {
            "glaciers": len(ids),
            "method": str(best["method"]),
            "ratio_threshold": float(best["ratio_threshold"]),
            "fit_iou": float(best["fit_iou"]),
        }
        sha256 = None
        if drawn:
            x, y = (np.concatenate(part) for part in zip(*drawn, strict=True))
            forest = fit_forest(x, y, channels, settings, ws.region.training.seed + fold, ws.mapper.workers)
            with storage.writing(forest_path(ws.site, fold)) as temporary:
                sha256 = forest.save(temporary)
            frame = pd.concat([frame, pd.DataFrame([{"method": METHOD}])], ignore_index=True)
            metadata |= {"forest_pixels": len(y), "forest_trees": len(forest.roots), "forest_sha256": sha256}
        storage.write_table("baseline", frame, {"fold": fold})
        return fingerprint([frame_fingerprint(frame), sha256]), metadata, {}

    inputs = {
        "cubes": _baseline_cubes(ws),
        "folds": ws.upstream("cross_validation_folds"),
        "settings": settings.model_dump(mode="json"),
        "channels": channels,
        "seed": ws.region.training.seed,
    }
    return run_stage(ws, "band_ratio_baseline", label, inputs, work, force=force)


def forest_path(site: Site, fold: int) -> UPath:
    """File of a fold's Random Forest."""
    return site.storage.path("models", f"fold={fold}", "random_forest.safetensors")


def calibration_of(site: Site, fold: int) -> tuple[np.ndarray, str]:
    """Temperatures by member and the hashes they belong to.

    Raises
    ------
    UpstreamError
        if the calibration was fitted on other weights than the ensemble now holds.
    """
    frame = cached_table(site, "calibration", fold=fold).sort_values("member")
    manifest = manifest_of(site, fold)
    if [m["sha256"] for m in manifest] != frame["sha256"].tolist():
        raise UpstreamError(
            f"the calibration of fold {fold} was fitted on other weights than its ensemble holds now: "
            "materialize calibration first"
        )
    return frame["temperature"].to_numpy(dtype=float), ",".join(frame["sha256"])
