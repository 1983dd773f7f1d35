"""Stages of the group *training*: normalization, members, ensemble, calibration, baseline."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from upath import UPath

from dl4gam_assets.compute import (
    Done,
    Mapper,
    choose_device,
    count_accelerators,
    default_workers,
    own_device,
    place_of,
)
from dl4gam_assets.settings import Region, TrainingSettings, fingerprint
from dl4gam_assets.stages import previews, published
from dl4gam_assets.stages.base import (
    NamedInputs,
    Site,
    StageResult,
    Upstream,
    UpstreamError,
    Workspace,
    cached_table,
    file_fingerprint,
    fold_label,
    fold_member_label,
    frame_fingerprint,
    input_fingerprint,
    named_inputs,
    run_stage,
)
from dl4gam_assets.stages.files import changed_files, full_hash, record_files
from dl4gam_assets.storage import safe_name

log = logging.getLogger("dl4gam_assets")

#: Roles of glaciers in a fold, as people say them.
ROLE_NAMES = {"train": "training", "valid": "validation", "test": "test"}


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
            f"fold {fold} has no {ROLE_NAMES.get(role, role)} glacier with an image in the baseline year "
            f"{site.region.years.baseline}: use fewer folds, or give those glaciers an image (overrides)"
        )
    return found


def _fold_cubes(ws: Workspace, fold: int, *roles: str) -> Upstream:
    """The cubes of a fold's glaciers in these roles: another image for a glacier that the fold only tests, or does not
    know, makes nothing of the fold stale."""
    baseline = str(ws.region.years.baseline)
    whole = ws.upstream("glacier_cubes", baseline)
    cubes = cached_table(ws.site, "cubes", year=ws.region.years.baseline)
    folds = cached_table(ws.site, "folds")
    wanted = folds.loc[(folds["fold"] == fold) & folds["role"].isin(roles), "glacier_id"]
    mine = cubes[cubes["glacier_id"].isin(set(wanted))].sort_values("glacier_id")
    content = fingerprint([[str(g), str(f)] for g, f in zip(mine["glacier_id"], mine["fingerprint"], strict=True)])
    return Upstream(content, "glacier_cubes", baseline, whole=False, unfinished=whole.unfinished)


def _stacks(site: Site, ids: list[str], year: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from dl4gam_assets.cubes import channel_stack, open_cube

    storage = site.storage
    for glacier_id in ids:
        with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
            yield channel_stack(cube, site.region.model.channels)


# --------------------------------------------------------------------------------------------- normalization
def normalization(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Mean and standard deviation of the channels over the fold's training glaciers."""
    if (manifest := published.statistics_import(ws.storage, fold)) is not None:
        return published.normalization(ws, fold, manifest, force=force)
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
        "cubes": _fold_cubes(ws, fold, "train"),
        "folds": ws.upstream("cross_validation_folds"),
        "channels": ws.region.model.channels,
    }
    return run_stage(ws, "normalization", fold_label(fold), inputs, work, force=force)


# --------------------------------------------------------------------------------------------- members
#: Fewer cubes are packed in this process: starting others takes longer.
_FEW_CUBES = 64
#: Seconds between two lines about the epochs of the members in training.
_EPOCH_LINES_S = 30.0


def packed_folder(site: Site, stamp: str) -> Path:
    """Folder of the packed training layers of a state of the baseline cubes."""
    if not site.storage.is_local:
        import tempfile

        return Path(tempfile.gettempdir()) / f"dl4gam-packed-{site.region.name}-{stamp}"
    return Path(str(site.storage.path("packed", stamp)))


def pack(ws: Workspace) -> tuple[Path, str]:
    """Pack the baseline year's cubes once for all members; returns the folder and its fingerprint.

    A store on this machine keeps them; of one in an object store they lie in this machine's temporary folder.
    """
    from dl4gam_assets.segmentation.packing import FORMAT, pack_cubes, remove_unused

    cubes_now = ws.upstream("glacier_cubes", str(ws.region.years.baseline))
    stamp = fingerprint([FORMAT, cubes_now, ws.region.model.channels])
    folder = packed_folder(ws.site, stamp)
    if not (folder / "packed.json").exists():
        storage = ws.storage
        ids = sorted(storage.read_table("cubes", year=ws.region.years.baseline)["glacier_id"])
        if storage.is_local:
            remove_unused(folder.parent)  # layers of earlier cubes are of no use any more
        start = time.perf_counter()
        cubes = {g: storage.cube(ws.region.years.baseline, g) for g in ids}

        def progress(done: int, total: int, seconds: float) -> None:
            ws.logger.info(f"packed {done} of {total} cubes, {60 * done / max(seconds, 1e-9):.0f} a minute")

        # Processes of this machine: they write into one file.
        mapper = ws.mapper if ws.mapper.scheduler is None else Mapper()
        few = Mapper(1) if len(ids) < _FEW_CUBES else mapper
        packed = pack_cubes(
            cubes, ws.region.model.channels, folder, mapper=few, reading=storage.reading, progress=progress
        )
        size, seconds = packed.size_bytes(ids) / 2**20, time.perf_counter() - start
        ws.logger.info(f"packed {len(ids)} cubes, {size:.0f} MiB, in {seconds:.1f} s")
    return folder, stamp


@contextlib.contextmanager
def packed_layers(ws: Workspace) -> Iterator[Path]:
    """The folder of the packed cubes, which no other run removes inside the block. Of several runs that need the same
    one packs, and the others wait for it."""
    from filelock import FileLock

    from dl4gam_assets.segmentation.packing import in_use

    lock = packed_folder(ws.site, "lock").with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with FileLock(str(lock)):
            folder, _ = pack(ws)
            stack.enter_context(in_use(folder))
        yield folder


def _seed(training: TrainingSettings, fold: int, member: int) -> int:
    return training.seed + 1000 * fold + member


def _with_overrides(region: Region, overrides: Mapping[str, Any]) -> Region:
    if not overrides:
        return region
    training = TrainingSettings.model_validate({**region.training.model_dump(), **overrides})
    return region.model_copy(update={"training": training})


def _member_inputs(ws: Workspace, fold: int, member: int, region: Region) -> dict[str, Any]:
    model = region.model.model_dump(mode="json")
    if (entry := published.member_import(ws.storage, fold, member)) is not None:
        return {
            "normalization": ws.upstream("normalization", fold_label(fold)),
            "model": model,
            "imported": [entry["sha256"], entry["channels"], entry["model"]],
        }
    if (weights := region.model.encoder_weights_file) is not None:
        model["encoder_weights"] = file_fingerprint(weights)  # by content: where the file lies does not matter
    return {
        "normalization": ws.upstream("normalization", fold_label(fold)),
        "cubes": _fold_cubes(ws, fold, "train", "valid"),
        "folds": ws.upstream("cross_validation_folds"),
        "model": model,
        "training": region.training.of_a_member(),
        "seed": _seed(region.training, fold, member),
    }


def work_folder(site: Site, fold: int, member: int, packed: Path) -> Path:
    """Folder of the state of a training that is not finished."""
    if site.storage.is_local:
        return Path(str(site.storage.path("work", f"fold={fold}", f"member={member:02d}")))
    return packed.parent / f"dl4gam-work-{site.region.name}-{fold}-{member}"


def train_one(
    site: Site, fold: int, member: int, packed: str, device: str, threads: int, wanted: str, force: bool = False
) -> dict[str, Any]:
    """Train one member and store it; goes on from its last epoch after a crash. Runs in a worker process.

    A member that is stored as it is wanted, but was not recorded before its run was killed, is taken as it is, unless
    ``force``. Of several runs that want the same member one trains it while the others wait, and then take it: they
    share its folder of states.
    """
    with _alone(work_folder(site, fold, member, Path(packed)), fold_member_label(fold, member)):
        return _train_alone(site, fold, member, packed, device, threads, wanted, force)


@contextlib.contextmanager
def _alone(work: Path, label: str) -> Iterator[None]:
    """Hold the lock of a member's work folder; it is free as soon as its holder's process is gone, however it ended."""
    from filelock import FileLock, Timeout

    work.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{work}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"ensemble_member [{label}]: another run trains it; waiting until it is done")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _train_alone(
    site: Site, fold: int, member: int, packed: str, device: str, threads: int, wanted: str, force: bool
) -> dict[str, Any]:
    import shutil

    from dl4gam_assets.segmentation import PackedCubes, save_member, train_member

    storage, region = site.storage, site.region
    work = work_folder(site, fold, member, Path(packed))
    if not force and (row := _finished(site, fold, member, wanted)) is not None:
        shutil.rmtree(work, ignore_errors=True)
        return row
    statistics = storage.read_table("normalization", fold=fold)
    device = choose_device(device)
    trained = train_member(
        PackedCubes.open(Path(packed)),
        members_of(site, fold, "train"),
        members_of(site, fold, "valid"),
        statistics,
        region.model,
        region.training,
        seed=_seed(region.training, fold, member),
        device=own_device(device, count_accelerators(device, region.compute.gpus)),
        work_dir=work,
        threads=threads,
        data=region.compute.training_data,
    )
    history = trained.history
    row = {
        "seed": _seed(region.training, fold, member),
        "best_epoch": trained.best_epoch,
        "validation_iou": trained.validation_iou,
        "epochs": len(history),
        "train_patches": trained.train_patches,
        "seconds": float(history["seconds"].sum()),  # of all processes that it took
        "parameters": trained.parameters,
        "fingerprint": wanted,
        "encoder_weights": trained.engine["encoder_weights"],
        "initial_sha256": trained.engine["initial_sha256"],
        "device": trained.engine["device"],
        "precision": trained.engine["precision"],
        "patches_per_second": float(history["patches_per_second"].median()),
        "data_wait_share": float(history["data_wait_share"].median()),
        "peak_memory_mb": float(history["peak_memory_mb"].max()),
    }
    extra = {"fingerprint": wanted, "engine": trained.engine, "row": row}
    sha256 = save_member(storage, storage.model(fold, member), trained, region.model, statistics, extra)
    shutil.rmtree(work, ignore_errors=True)
    return row | {"sha256": sha256, "history": history}


def _finished(site: Site, fold: int, member: int, wanted: str) -> dict[str, Any] | None:
    """What :func:`train_one` returned for the member that is stored, if that is the wanted one and whole."""
    from dl4gam_assets.segmentation import ModelFileError, load_member

    storage, folder = site.storage, site.storage.model(fold, member)
    try:
        _, meta = load_member(storage, folder, channels=site.region.model.channels)
        with storage.reading(folder / "history.parquet") as local:
            history = pd.read_parquet(local)
    except (ModelFileError, OSError, ValueError):
        return None
    if meta.get("fingerprint") != wanted or "row" not in meta:
        return None
    return {**meta["row"], "sha256": meta["sha256"], "history": history}


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
        # One that was left out is tried again when it is asked for.
        changed = tuple(str(file) for file in changed_files(ws, "ensemble_member", label, full_hash))
        again = force or ws.force or bool(changed)
        current = bool(state and state["input"] == fingerprint_now and stored and not again)
        if ws.probe:
            out[key] = StageResult(label, unchanged=current, inputs=named[key], input=fingerprint_now, changed=changed)
        elif state and current:
            metadata = {**state.get("metadata", {}), "unchanged": True}
            out[key] = StageResult(label, metadata, _stored_curves(ws, fold, member), unchanged=True)
        else:
            todo[key] = (fold, member, fingerprint_now)
    if ws.probe or not todo:
        return out
    adopted = {k: v for k, v in todo.items() if published.member_import(ws.storage, v[0], v[1]) is not None}
    for done in ws.mapper.map(published.adopt_one, [(k, (site, *v)) for k, v in adopted.items()]):
        fold, member, now = todo.pop(done.key)
        out[done.key] = _store_member(ws, fold, member, now, done, named[done.key])
    if not todo:
        return out
    mapper, device, threads = _member_processes(ws)

    def progress(done: int, total: int, seconds: float) -> None:
        ws.logger.info(f"ensemble_member: {done} of {total} members, {seconds / max(done, 1):.0f} s each")

    with packed_layers(ws) as packed, _epoch_lines(ws, site, {(f, m) for f, m, _ in todo.values()}, packed):
        tasks = [(key, (site, f, m, str(packed), device, threads, now, force)) for key, (f, m, now) in todo.items()]
        for done in mapper.map(train_one, tasks, progress=progress):
            fold, member, now = todo[done.key]
            out[done.key] = _store_member(ws, fold, member, now, done, named[done.key])
    return out


def _member_processes(ws: Workspace) -> tuple[Mapper, str, int]:
    """The processes that train members, the device that each is told, and its threads (0: as it has): on a CPU they
    share the cores, on GPUs there are ``compute.members_at_once`` for each.

    The threads decide the last bits of the weights, so they follow from settings and machine, never from how many
    members a run is asked for or has left: a member trained alone is the one that is trained beside others. Where a
    run takes one partition (``compute.partitions_per_run``), its one member has all cores.

    Workers of a scheduler train where this machine has no accelerator and they see the packed layers: those of a store
    in an object store lie in this machine's temporary folder.
    """
    compute, place = ws.region.compute, place_of(ws.mapper, ws.device)
    if place.mapper.scheduler is not None and ws.storage.is_local:
        return place.mapper, place.device, 0
    if place.mapper.scheduler is not None:
        place = place_of(Mapper(ws.mapper.workers), ws.device)
    if place.device == "cpu":
        every = ws.region.folds.n * ws.region.training.members
        at_once = compute.members_at_once or min(place.mapper.workers, compute.partitions_per_run)
        mapper = place.mapper if at_once == place.mapper.workers else Mapper(at_once)
        return mapper, place.device, max(default_workers() // min(at_once, every), 1)
    at_once = (compute.members_at_once or 1) * count_accelerators(place.device, compute.gpus)
    return Mapper(at_once), place.device, max(default_workers() // at_once, 1)


@contextlib.contextmanager
def _epoch_lines(ws: Workspace, site: Site, members: set[tuple[int, int]], packed: Path) -> Iterator[None]:
    """Log now and then how far the members in training are, from the states that they leave after each epoch."""
    import threading

    ended = threading.Event()
    total = site.region.training.epochs

    def watch() -> None:
        said: dict[tuple[int, int], int] = {}
        while not ended.wait(_EPOCH_LINES_S):
            for fold, member in sorted(members):
                try:
                    text = (work_folder(site, fold, member, packed) / "state.json").read_text(encoding="utf-8")
                    history = json.loads(text)["history"]
                except (OSError, ValueError, KeyError):
                    continue  # not begun, finished, or on another machine
                if said.get((fold, member)) == len(history):
                    continue
                said[(fold, member)] = len(history)
                last = history[-1]
                ws.logger.info(
                    f"ensemble_member [{fold_member_label(fold, member)}]: epoch {last['epoch']} of {total}, loss "
                    f"{last['train_loss']:.4f}, validation IoU {last['validation_iou']:.3f}, "
                    f"{last['patches_per_second']:.0f} patches a second"
                )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=10)


def _stored_curves(ws: Workspace, fold: int, member: int) -> dict[str, bytes]:
    path = ws.storage.model(fold, member) / "history.parquet"
    if not path.exists():
        return {}
    with ws.storage.reading(path) as local:
        return _curves(pd.read_parquet(local), fold_member_label(fold, member))


def _curves(history: pd.DataFrame, label: str) -> dict[str, bytes]:
    columns = ["train_loss", "validation_loss", "validation_iou", "learning_rate", "patches_per_second"]
    shown = [c for c in columns if c in history]  # those of imported members have fewer
    return {"training curves": previews.curves(history, "epoch", shown, label)}


def _store_member(
    ws: Workspace, fold: int, member: int, wanted: str, done: Done, named: NamedInputs | None = None
) -> StageResult | Exception:
    label = fold_member_label(fold, member)
    if not done.ok:
        if done.kind == "TrainingError" and ws.region.training.min_members is not None:
            return _leave_out(ws, fold, member, wanted, str(done.error))
        return RuntimeError(f"{label}: {done.kind}: {done.error}")
    row = dict(done.value)
    history = row.pop("history")
    metadata = {
        "validation_iou": row["validation_iou"],
        "best_epoch": row["best_epoch"],
        "epochs": row["epochs"],
        "patches_per_epoch": row["train_patches"],
        "parameters": row["parameters"],
        "training_seconds": _rounded(row.get("seconds"), 1),
        "patches_per_second": _rounded(row.get("patches_per_second"), 1),
        "share_of_time_waiting_for_data": _rounded(row.get("data_wait_share"), 4),
        "peak_memory_mb": _rounded(row.get("peak_memory_mb"), 0),
        "device": row["device"],
        "precision": row["precision"],
        "weights_sha256": row["sha256"],
        "encoder_weights": row["encoder_weights"],
        "initial_weights_sha256": row["initial_sha256"],
        **row.pop("proof", {}),
    }
    ws.storage.write_table("members", pd.DataFrame([row]), {"fold": fold, "member": member})
    if ws.storage.is_local:
        weights = Path(str(ws.storage.model(fold, member) / "model.safetensors"))
        record_files(ws, "ensemble_member", label, {weights: [label]}, full_hash)
    seconds = float(row.get("seconds") or 0.0)
    ws.finish("ensemble_member", label, wanted, row["sha256"], seconds, named, metadata=metadata)
    return StageResult(label, metadata, _curves(history, label))


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _leave_out(ws: Workspace, fold: int, member: int, wanted: str, reason: str) -> StageResult:
    """A member that diverged, where the settings let the ensemble go on without it: its earlier weights are removed,
    and its partition says why it is empty."""
    label = fold_member_label(fold, member)
    ws.logger.warning(f"ensemble_member [{label}] is left out of its ensemble: {reason}")
    for path in (
        ws.storage.table("members", {"fold": fold, "member": member}),
        *(ws.storage.model(fold, member) / name for name in ("model.json", "model.safetensors", "history.parquet")),
    ):
        path.unlink(missing_ok=True)
    metadata = {"left_out": reason}
    ws.finish("ensemble_member", label, wanted, "left out", 0.0, metadata=metadata, failed=1)
    return StageResult(label, metadata)


# --------------------------------------------------------------------------------------------- ensemble, calibration
def ensemble(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Collect the members of a fold: what predictions are made from."""
    numbers = range(1, ws.region.training.members + 1)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        members = ws.storage.read_table("members", fold=fold)
        members = members[members["member"].isin(list(numbers))].sort_values("member")
        needed = ws.region.training.min_members or len(numbers)
        if len(members) < needed:
            raise UpstreamError(
                f"fold {fold} has {len(members)} of {len(numbers)} members, and {needed} are needed: materialize "
                "ensemble_member again (with a lower training.learning_rate if they diverged), or lower "
                "training.min_members"
            )
        manifest = {
            "fold": fold,
            "members": [{"member": int(r.member), "sha256": str(r.sha256)} for r in members.itertuples()],
        }
        ws.storage.write_json(ws.storage.path("models", f"fold={fold}", "ensemble.json"), manifest)
        left_out = sorted(set(numbers) - set(members["member"]))
        metadata = {
            "members": len(members),
            "left_out_members": ", ".join(map(str, left_out)) or None,
            "mean_validation_iou": float(members["validation_iou"].mean()),
            "training_seconds": float(members["seconds"].sum()),
        }
        return fingerprint(manifest), metadata, {}

    inputs: dict[str, str] = {str(m): ws.upstream("ensemble_member", fold_member_label(fold, m)) for m in numbers}
    inputs["min_members"] = str(ws.region.training.min_members)
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

    A uniform sample of the valid pixels of its cell (``sample_logits`` (M, N), ``sample_labels`` (N,)), drawn here.
    Logits and masks, cut to the box of its 50 m zone, go into a file (:func:`_measured` reads it), so that the memory
    of a fold does not grow with the area of its validation glaciers.
    """
    from dl4gam_assets.cubes import cube_mask, open_cube

    storage = site.storage
    device = choose_device(device)
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
        layers = {"logits": np.stack(logits), "valid": valid[box], **{name: mask[box] for name, mask in masks.items()}}
        if "dem" in cube:
            layers["dem"] = cube["dem"].to_numpy()[box]
        with storage.writing(_measured_folder(site, fold) / f"{safe_name(glacier_id)}.npz") as temporary:
            np.savez(temporary, **layers)  # type: ignore[arg-type]
        return {
            "sample_logits": np.stack(sampled),
            "sample_labels": cube_mask(cube, "any_glacier").ravel()[chosen],
            "outline_px": int(masks["outline"].sum()),
            "pixel_km2": float(pixel),
        }


def _measured_folder(site: Site, fold: int) -> UPath:
    return site.storage.path("work", "calibration", f"fold={fold}")


def _measured(
    site: Site, fold: int, glacier_id: str, temperatures: list[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and deviation of the scaled members, gaps filled, and where they count for the area, of a validation glacier
    that :func:`validation_of` wrote."""
    from dl4gam_assets.ensemble import aggregate
    from dl4gam_assets.segmentation import fill_gaps

    path = _measured_folder(site, fold) / f"{safe_name(glacier_id)}.npz"
    with site.storage.reading(path) as local, np.load(local, allow_pickle=False) as layers:
        mean, std = aggregate(layers["logits"], np.asarray(temperatures))
        mean, std, _ = fill_gaps(
            mean, std, layers["valid"], layers["zone"], layers.get("dem"), site.region.inference
        )  # fmt: skip
        return mean, std, layers["allowed"]


def calibration(ws: Workspace, fold: int, *, force: bool = False) -> StageResult:
    """Fit temperatures and the rule of tau on the fold's validation glaciers, in the inventory year."""
    label = fold_label(fold)
    settings = ws.region.calibration
    inputs = {
        "ensemble": ws.upstream("ensemble", label),
        "cubes": _fold_cubes(ws, fold, "valid"),
        # What belongs to conformal intervals alone is applied in `interval_taus`.
        "settings": settings.model_dump(
            mode="json",
            exclude={name for name in type(settings).model_fields if name.startswith("conformal_")} | {"intervals"},
        ),
        "tables": 3,  # raised when the columns or the rule of tau change
        "inference": ws.region.inference.model_dump(mode="json"),
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        from dl4gam_assets import ensemble as science

        ids = members_of(ws, fold, "valid")
        place, seed = place_of(ws.mapper, ws.device), ws.region.training.seed + fold
        values, _ = ws.over_glaciers(
            "calibration",
            label,
            validation_of,
            [(g, (ws.site, fold, g, place.device, place.threads, settings.pixel_share, seed)) for g in ids],
            place.mapper,
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

        features, taus, truths, areas = [], [], [], []
        for glacier_id, value in values.items():
            mean, std, allowed = _measured(ws.site, fold, glacier_id, temperatures)
            truth = float(value["outline_px"] * value["pixel_km2"])
            area = float(((mean >= ws.region.inference.threshold) & allowed).sum() * value["pixel_km2"])
            features.append(science.tau_features(mean, std, allowed, area))
            taus.append(science.largest_covering_tau(
                mean, std, allowed, value["pixel_km2"], truth, settings.tau_step, settings.tau_max
            ))  # fmt: skip
            truths.append(truth)
            areas.append(area)
        told = pd.DataFrame(features, index=pd.Index(list(values), name="glacier_id"))
        rule = science.fit_tau(told, np.asarray(taus), settings)
        if rule.left_out:
            ws.logger.warning(
                f"calibration [{label}]: tau is not fitted on {', '.join(rule.left_out)}: their maps have pixels "
                "without a value"
            )
        table = told.reset_index().drop(columns="log_area").assign(
            n_pixels=[len(value["sample_labels"]) for value in values.values()],
            inventory_area_km2=truths,
            predicted_area_km2=np.asarray(areas, dtype=float),
            covering_tau=taus,
            tau=rule.predict(told),
            tau_left_out=science.left_out_taus(told, np.asarray(taus), settings),
        )  # fmt: skip
        rules = {"inside": table["tau"].to_numpy(), "inside_left_out": table["tau_left_out"].to_numpy()}
        bounds = {of: np.zeros((len(table), 2)) for of in rules}
        for row, (glacier_id, value) in enumerate(values.items()):
            mean, std, allowed = _measured(ws.site, fold, glacier_id, temperatures)  # again: not all of them at once
            for of, by_rule in rules.items():
                masks = science.interval_masks(mean, std, float(by_rule[row]), allowed)
                bounds[of][row] = [float(mask.sum() * value["pixel_km2"]) for mask in masks]
        ws.storage.remove_folder(_measured_folder(ws.site, fold))
        outlines = table["inventory_area_km2"].to_numpy(dtype=float)
        for of, found in bounds.items():
            table[of] = (found[:, 0] - 1e-9 <= outlines) & (outlines <= found[:, 1] + 1e-9)
        table[["lower_km2", "upper_km2"]] = bounds["inside"]
        manifest = manifest_of(ws.site, fold)
        frame = pd.DataFrame(
            {
                "member": [m["member"] for m in manifest],
                "sha256": [m["sha256"] for m in manifest],
                "temperature": temperatures,
                "ece_before": ece[0],
                "ece_after": ece[1],
                "method": rule.method,
                "n_glaciers": len(values) - len(rule.left_out),
                "tau_scope": "folds" if rule.method == "regional_quantile" and settings.pool_folds else "fold",
                "coefficients": rule.to_json(),
                "validation_coverage": float(table["inside"].mean()),
                "left_out_coverage": float(table["inside_left_out"].mean()),
                "n_pixels": len(labels),
                "glacier_ids": json.dumps(list(values)),
                "temperature_at_limit": np.isclose(
                    np.asarray(temperatures)[:, None], np.asarray(settings.temperature_bounds), atol=1e-3
                ).any(axis=1),
            }
        )
        bins = settings.ece_bins
        diagrams = {name: science.reliability(p, labels, bins) for name, p in ((False, before), (True, after))}
        diagram = pd.concat([d.assign(calibrated=name) for name, d in diagrams.items()], ignore_index=True)
        ws.storage.write_table("calibration_glaciers", table, {"fold": fold})
        ws.storage.write_table("reliability", diagram, {"fold": fold})
        ws.storage.write_table("calibration", frame, {"fold": fold})
        metadata = {
            "validation_glaciers": len(values),
            "validation_pixels": len(labels),
            "method": rule.method,
            "ece_before": ece[0],
            "ece_after": ece[1],
            "mean_temperature": float(np.mean(temperatures)),
            "temperatures_at_limit": int(frame["temperature_at_limit"].sum()),
            "median_tau": float(np.median(taus)),
            "validation_coverage": float(table["inside"].mean()),
            "left_out_coverage": float(table["inside_left_out"].mean()),
        }
        picture = previews.reliability(diagrams[False], diagrams[True], label)
        # Where the quantile will be taken from is told here, and done in `interval_taus`: maps do not depend on it.
        content = [frame_fingerprint(frame.drop(columns="tau_scope")), frame_fingerprint(table)]
        return fingerprint(content), metadata, {"reliability": picture}

    return run_stage(ws, "calibration", label, inputs, work, force=force)


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
        "cubes": _fold_cubes(ws, fold, "train", "valid"),
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
