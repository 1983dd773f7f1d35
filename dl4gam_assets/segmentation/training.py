"""Training one ensemble member.

Belongs here: patches, batches, the loop, resuming. Does not belong here: which glaciers train (``inventory``), storage
of finished members (``files``).

Randomness is a function of (seed, epoch) alone, so a training that was killed goes on from its last epoch with the same
result as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from dl4gam_assets.segmentation.inference import predict_logits
from dl4gam_assets.segmentation.losses import masked_loss
from dl4gam_assets.segmentation.model import build_model
from dl4gam_assets.segmentation.normalization import normalize
from dl4gam_assets.segmentation.packing import PackedCubes, patch_centres
from dl4gam_assets.settings import InferenceSettings, ModelSettings, TrainingSettings, fingerprint


class TrainingError(RuntimeError):
    """A training that can not go on. The message says why and what to change."""


@dataclass
class TrainedMember:
    """A finished member: the weights of its best epoch and its history."""

    state: dict[str, torch.Tensor]
    history: pd.DataFrame
    best_epoch: int
    validation_iou: float
    train_patches: int
    parameters: int
    seed: int


@dataclass
class _Glacier:
    channels: np.ndarray
    valid: np.ndarray
    target: np.ndarray
    zone: np.ndarray
    area_px: int


def train_member(
    packed: PackedCubes,
    train_ids: Sequence[str],
    valid_ids: Sequence[str],
    statistics: pd.DataFrame,
    model_settings: ModelSettings,
    training: TrainingSettings,
    *,
    seed: int,
    device: str,
    work_dir: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
    threads: int | None = None,
) -> TrainedMember:
    """Train a member, or go on where ``work_dir`` stopped.

    ``training.train_patches`` patches are drawn once for the seed, at least one a glacier, and shuffled each epoch. The
    loss counts valid pixels; the target is any glacier. After each epoch the IoU of each validation glacier over the
    valid pixels of its 50 m zone is weighted by area, and the weights of the best epoch are kept.

    Parameters
    ----------
    packed : layers of all glaciers
    train_ids, valid_ids : glaciers of the fold
    statistics : normalization of the fold
    seed : decides initial weights, patches, order and augmentation
    device : torch device name
    work_dir : folder of the training's state; a finished training may delete it
    progress : called with the history row of each epoch
    threads : torch threads of this process

    Raises
    ------
    TrainingError
        if the loss is not finite, or the fold has no patches.
    """
    if threads:
        torch.set_num_threads(threads)
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = build_model(model_settings).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
    train = {g: _load(packed, g, statistics) for g in sorted(train_ids)}
    valid = {g: _load(packed, g, statistics) for g in sorted(valid_ids)}
    patches = draw_patches(packed, sorted(train_ids), training, seed)
    if not len(patches):
        raise TrainingError("the training glaciers have no patch centres: are their outlines on their grids?")
    identity = fingerprint(
        [seed, model_settings.model_dump(), training.model_dump(exclude={"members"}), sorted(train_ids), sorted(valid_ids),
         statistics[["channel", "mean", "std"]].to_dict("list")]
    )  # fmt: skip
    history, best = _resume(work_dir, identity, model, optimizer)
    steps = math.ceil(len(patches) / training.batch_size)

    for epoch in range(len(history) + 1, training.epochs + 1):
        start = time.perf_counter()
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(patches))
        model.train()
        losses = []
        for step in range(steps):
            rate = learning_rate(training, (epoch - 1) * steps + step, training.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = patches[order[step * training.batch_size : (step + 1) * training.batch_size]]
            x, y, w = _batch(train, chosen, training, packed.channels, rng)
            x = x.to(device, memory_format=torch.channels_last)
            loss = masked_loss(model(x), y.to(device), w.to(device), training)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {epoch}: lower training.learning_rate ({training.learning_rate})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        validation_loss, iou = _validate(model, valid, training, device)
        row = {
            "epoch": epoch,
            "train_loss": float(np.mean(losses)),
            "validation_loss": validation_loss,
            "validation_iou": iou,
            "learning_rate": rate,
            "seconds": time.perf_counter() - start,
        }
        history.append(row)
        if best is None or iou > best["validation_iou"]:
            best = {"epoch": epoch, "validation_iou": iou}
            best["state"] = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
        _save_state(work_dir, identity, model, optimizer, history, best)
        if progress:
            progress(row)
    if best is None:
        raise TrainingError("no epoch was trained: training.epochs is 0")
    return TrainedMember(
        state=best["state"],
        history=pd.DataFrame(history),
        best_epoch=int(best["epoch"]),
        validation_iou=float(best["validation_iou"]),
        train_patches=len(patches),
        parameters=sum(p.numel() for p in model.parameters()),
        seed=seed,
    )


def learning_rate(training: TrainingSettings, step: int, total: int) -> float:
    """Rate at a step: constant, or one cycle (cosine up over 30% of the steps from 1/25, then down to 1/2500)."""
    top = training.learning_rate
    if training.schedule == "constant":
        return top
    up = max(int(0.3 * total), 1)
    if step < up:
        low, high, share = top / 25, top, step / up
    else:
        low, high, share = top, top / 2500, (step - up) / max(total - up, 1)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def draw_patches(packed: PackedCubes, ids: Sequence[str], training: TrainingSettings, seed: int) -> np.ndarray:
    """Patches of a member: int array (N, 3) of glacier number, row and column of the centre.

    One random centre of each glacier, then uniformly from all others until ``train_patches``; where there are fewer
    centres than that, all of them.
    """
    rng = np.random.default_rng([seed, 0])
    centres = []
    for number, glacier_id in enumerate(ids):
        layers = packed.glacier(glacier_id)
        found = patch_centres(layers.zone, layers.glacier, training.train_step_px, extremes=True)
        centres.append(np.column_stack([np.full(len(found), number), found]))
    everything = np.concatenate(centres) if centres else np.empty((0, 3), dtype=int)
    starts = np.cumsum([0, *[len(c) for c in centres]])
    must = [int(starts[i] + rng.integers(len(c))) for i, c in enumerate(centres) if len(c)]
    rest = np.setdiff1d(np.arange(len(everything)), must)
    more = rng.permutation(rest)[: max(training.train_patches - len(must), 0)]
    picked: np.ndarray = everything[np.concatenate([must, more]).astype(int)]
    return picked


def _load(packed: PackedCubes, glacier_id: str, statistics: pd.DataFrame) -> _Glacier:
    layers = packed.glacier(glacier_id)
    channels = normalize(np.asarray(layers.channels), packed.channels, statistics)
    return _Glacier(channels, layers.valid, layers.target, layers.zone, int(layers.glacier.sum()))


def _batch(
    glaciers: dict[str, _Glacier], chosen: np.ndarray, training: TrainingSettings, channels: Sequence[str],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    size = training.patch_px
    ids = list(glaciers)
    x = np.zeros((len(chosen), len(channels), size, size), dtype=np.float32)
    y = np.zeros((len(chosen), 1, size, size), dtype=np.uint8)
    w = np.zeros((len(chosen), 1, size, size), dtype=np.uint8)
    for k, (number, row, col) in enumerate(chosen):
        glacier = glaciers[ids[number]]
        height, width = glacier.valid.shape
        # A window over the edge is moved inside; a grid smaller than the patch is padded with invalid pixels.
        top = min(max(row - size // 2, 0), max(height - size, 0))
        left = min(max(col - size // 2, 0), max(width - size, 0))
        h, v = min(size, height), min(size, width)
        patch = glacier.channels[:, top : top + h, left : left + v]
        target = glacier.target[top : top + h, left : left + v]
        valid = glacier.valid[top : top + h, left : left + v]
        if training.augmentation:
            patch, target, valid = symmetry(patch, target, valid, channels, int(rng.integers(8)))
        a, b = patch.shape[1:]
        x[k, :, :a, :b], y[k, 0, :a, :b], w[k, 0, :a, :b] = patch, target, valid
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(w)


def symmetry(
    patch: np.ndarray, target: np.ndarray, valid: np.ndarray, channels: Sequence[str], which: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One of the 8 symmetries of the square (0: none). Aspect turns with the picture; dh/dt and curvatures are scalars.

    Sine and cosine of the aspect are the eastward and northward part of a unit vector (aspect clockwise from north).
    """
    flip, turns = which >= 4, which % 4
    names = list(channels)
    east = names.index("sin_aspect") if "sin_aspect" in names else None
    north = names.index("cos_aspect") if "cos_aspect" in names else None
    if flip:  # left to right: east becomes west
        patch, target, valid = patch[..., ::-1], target[..., ::-1], valid[..., ::-1]
    if turns:  # counter-clockwise by quarter turns
        patch, target, valid = (np.rot90(a, turns, axes=(-2, -1)) for a in (patch, target, valid))
    if east is not None and north is not None and which:
        patch = patch.copy()
        e, n = patch[east].copy(), patch[north].copy()
        if flip:
            e = -e
        for _ in range(turns):
            e, n = -n, e
        patch[east], patch[north] = e, n
    return patch, target, valid


def _validate(
    model: torch.nn.Module, glaciers: dict[str, _Glacier], training: TrainingSettings, device: str
) -> tuple[float, float]:
    """Loss and area-weighted IoU over the valid pixels of each glacier's 50 m zone."""
    model.eval()
    settings = InferenceSettings(precision="fp32")
    losses, ious, weights = [], [], []
    for glacier in glaciers.values():
        where = glacier.valid & glacier.zone
        if not where.any():
            continue
        logits = predict_logits([model], glacier.channels, settings, device)[0]
        truth, predicted = glacier.target[where], logits[where] >= 0
        union = int((truth | predicted).sum())
        ious.append(float((truth & predicted).sum()) / union if union else 1.0)
        weights.append(max(glacier.area_px, 1))
        t = torch.from_numpy(np.ascontiguousarray(logits))[None, None]
        loss = masked_loss(
            t, torch.from_numpy(glacier.target)[None, None], torch.from_numpy(where)[None, None], training
        )
        losses.append(float(loss))
    if not ious:
        return float("nan"), 0.0
    return float(np.mean(losses)), float(np.average(ious, weights=weights))


# --------------------------------------------------------------------------------------------- resuming
def _save_state(
    work: Path, identity: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]],
    best: dict[str, Any],
) -> None:  # fmt: skip
    """Write the state of an epoch; the JSON that names its files is replaced last, in one step."""
    epoch = len(history)
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    scalars: dict[str, float] = {}
    for number, parameter in enumerate(model.parameters()):
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.ndim:
                tensors[f"adam.{number}.{key}"] = value.detach().cpu().contiguous()
            else:
                scalars[f"{number}.{key}"] = float(value)
    save_file({k: v.clone() for k, v in tensors.items()}, work / f"state-{epoch}.safetensors")
    best_file = work / f"best-{best['epoch']}.safetensors"
    if not best_file.exists():
        temporary = work / f"tmp-{best['epoch']}.safetensors"
        save_file(best["state"], temporary)
        os.replace(temporary, best_file)
    note = {
        "identity": identity, "epoch": epoch, "history": history, "scalars": scalars,
        "best": {k: best[k] for k in ("epoch", "validation_iou")},
    }  # fmt: skip
    temporary = work / "state.tmp"
    temporary.write_text(json.dumps(note), encoding="utf-8")
    os.replace(temporary, work / "state.json")
    keep = {f"state-{epoch}.safetensors", best_file.name}
    for old in work.glob("*.safetensors"):
        if old.name not in keep:
            old.unlink()


def _resume(
    work: Path, identity: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """History and best epoch of an interrupted training of the same identity; else a fresh start."""
    path = work / "state.json"
    note = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if note is None or note["identity"] != identity:
        for old in work.glob("*.safetensors"):
            old.unlink()
        path.unlink(missing_ok=True)
        return [], None
    tensors = load_file(work / f"state-{note['epoch']}.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for number, parameter in enumerate(model.parameters()):
        prefix = f"adam.{number}."
        state: dict[str, Any] = {
            k.removeprefix(prefix): v.to(parameter.device) for k, v in tensors.items() if k.startswith(prefix)
        }
        for key, value in note["scalars"].items():
            owner, name = key.split(".", 1)
            if int(owner) == number:
                state[name] = torch.tensor(value)
        if state:
            optimizer.state[parameter] = state
    best = dict(note["best"])
    best["state"] = load_file(work / f"best-{best['epoch']}.safetensors")
    return list(note["history"]), best
