"""Training one ensemble member.

Belongs here: the loop, validation, resuming. Does not belong here: patches (``sampling``), which glaciers train
(``inventory``), storage of finished members (``files``).

Randomness is a function of (seed, epoch) alone, so a training that was killed goes on from its last epoch with the same
result as one that was not.
"""

from __future__ import annotations

import json
import logging
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dl4gam_assets.segmentation.inference import predict_logits
from dl4gam_assets.segmentation.losses import masked_loss
from dl4gam_assets.segmentation.model import build_model, channels_last
from dl4gam_assets.segmentation.packing import PackedCubes
from dl4gam_assets.segmentation.sampling import Normalizer, cut_batch, draw_patches, patch_centres, patch_cover
from dl4gam_assets.settings import InferenceSettings, ModelSettings, TrainingSettings, fingerprint

log = logging.getLogger(__name__)
_STATE_FORMAT = 3


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
    loss counts valid pixels; the target is any glacier. After each epoch the IoU of each validation glacier over its
    validation patches (centres every ``validation_step_px``) is weighted by area, and the weights of the best epoch are
    kept (Diaconu et al. 2025, section 5).

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

    Notes
    -----
    The state after each epoch lies in ``work_dir`` as safetensors and JSON. It is used again only for the same seed,
    settings, glaciers, layers and normalization; a damaged or foreign state is removed and the training starts again.
    With the same machine, device and number of threads a resumed training gives the same bits as an uninterrupted one.
    """
    if threads:
        torch.set_num_threads(threads)
    work_dir.mkdir(parents=True, exist_ok=True)
    train_ids, valid_ids = sorted(train_ids), sorted(valid_ids)
    patches = draw_patches(packed, train_ids, training, seed)
    if not len(patches):
        raise TrainingError("the training glaciers have no patch centres: are their outlines on their grids?")
    identity = fingerprint(
        [_STATE_FORMAT, seed, model_settings.model_dump(), training.model_dump(exclude={"members"}),
         *({g: packed.checksum(g) for g in ids} for ids in (train_ids, valid_ids)),
         statistics[["channel", "mean", "std", "standardized"]].to_dict("list")]
    )  # fmt: skip
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(seed)
        model = channels_last(build_model(model_settings).to(device))
        optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
        history, best = _resume(work_dir, identity, model, optimizer)
        normalizer = Normalizer.of(packed, statistics, device)
        for epoch in range(len(history) + 1, training.epochs + 1):
            start = time.perf_counter()
            train_loss, rate = _train_epoch(
                packed, train_ids, patches, normalizer, model, optimizer, training, seed, epoch, device
            )
            validation_loss, iou = _validate(packed, valid_ids, normalizer, model, training, device)
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "validation_iou": iou,
                "learning_rate": rate,
                "seconds": time.perf_counter() - start,
            }
            history.append(row)
            # Where nothing can be validated the last epoch is kept.
            if best is None or math.isnan(iou) or iou > best["validation_iou"]:
                best = {"epoch": epoch, "validation_iou": iou}
                best["state"] = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
            _save_state(work_dir, identity, model, optimizer, history, best)
            if progress:
                progress(row)
    assert best is not None
    return TrainedMember(
        state=best["state"],
        history=pd.DataFrame(history),
        best_epoch=int(best["epoch"]),
        validation_iou=float(best["validation_iou"]),
        train_patches=len(patches),
        parameters=sum(p.numel() for p in model.parameters()),
        seed=seed,
    )


def _train_epoch(
    packed: PackedCubes, ids: Sequence[str], patches: np.ndarray, normalizer: Normalizer, model: torch.nn.Module,
    optimizer: torch.optim.Optimizer, training: TrainingSettings, seed: int, epoch: int, device: str,
) -> tuple[float, float]:  # fmt: skip
    """One pass over the patches; returns the mean loss and the last learning rate."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))  # for networks with stochastic layers
    glaciers = [packed.glacier(g) for g in ids]
    steps = math.ceil(len(patches) / training.batch_size)
    model.train()
    losses = []
    rate = 0.0
    # Batches of equal size: a small rest would disturb the statistics of batch normalization.
    for step, order in enumerate(np.array_split(rng.permutation(len(patches)), steps)):
        rate = learning_rate(training, (epoch - 1) * steps + step, training.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y, w = cut_batch(glaciers, patches[order], training, packed.channels, rng)
        batch = normalizer(x.to(device)).contiguous(memory_format=torch.channels_last)
        loss = masked_loss(model(batch), y.to(device), w.to(device), training)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in epoch {epoch}: lower training.learning_rate ({training.learning_rate})"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses)), rate


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


def _validate(
    packed: PackedCubes, ids: Sequence[str], normalizer: Normalizer, model: torch.nn.Module, training: TrainingSettings,
    device: str,
) -> tuple[float, float]:  # fmt: skip
    """Loss and area-weighted IoU over the valid pixels of each glacier's validation patches; NaN where there are none.

    Each glacier is predicted once, in large windows, and a pixel counts as often as patches with centres every
    ``validation_step_px`` cover it: what predicting those patches one by one gives, but for the networks' view beyond
    their edges, in a fraction of the time. The surroundings count, so false alarms far from the margin are seen.
    """
    model.eval()
    settings = InferenceSettings()
    losses, ious, areas = [], [], []
    for glacier_id in ids:
        layers = packed.glacier(glacier_id)
        centres = patch_centres(layers.zone, layers.glacier, training.validation_step_px, extremes=False)
        weight = patch_cover(centres, layers.bits.shape, training.patch_px) * layers.valid
        if not weight.any():
            continue
        ready = normalizer(torch.from_numpy(np.array(layers.channels)).to(device)).cpu().numpy()
        logits = predict_logits([model], ready, settings, device)[0]
        truth, predicted = layers.target, logits >= 0
        union = int(weight[truth | predicted].sum())
        ious.append(int(weight[truth & predicted].sum()) / union if union else 1.0)
        areas.append(max(int(layers.glacier.sum()), 1))
        flat, labels, counted = (torch.from_numpy(a)[None, None] for a in (logits, truth, weight))
        losses.append(float(masked_loss(flat, labels, counted, training)))
    if not ious:
        return math.nan, math.nan
    return float(np.mean(losses)), float(np.average(ious, weights=areas))


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
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["identity"] != identity:
            raise FileNotFoundError
        tensors = load_file(work / f"state-{note['epoch']}.safetensors")
        best = {**note["best"], "state": load_file(work / f"best-{note['best']['epoch']}.safetensors")}
    except (FileNotFoundError, SafetensorError, ValueError, KeyError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning(f"the state in {work} is damaged ({error}); the training starts again")
        path.unlink(missing_ok=True)
        for old in work.glob("*.safetensors"):
            old.unlink()
        return [], None
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
    return list(note["history"]), best
