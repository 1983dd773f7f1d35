"""Training one ensemble member.

Belongs here: the loop, its device and precision (Lightning Fabric), resuming. Does not belong here: patches
(``sampling``, ``batches``), the score of an epoch (``validation``), which glaciers train (``inventory``), storage of
finished members (``files``).

Randomness is a function of (seed, epoch) alone, so a training that was killed goes on from its last epoch with the same
result as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dl4gam_assets.segmentation.batches import PatchSource, batches, patch_source
from dl4gam_assets.segmentation.inference import low_precision
from dl4gam_assets.segmentation.losses import masked_loss
from dl4gam_assets.segmentation.model import build_model, channels_last
from dl4gam_assets.segmentation.packing import PackedCubes
from dl4gam_assets.segmentation.sampling import Normalizer, draw_patches
from dl4gam_assets.segmentation.validation import Validation
from dl4gam_assets.settings import InferenceSettings, ModelSettings, TrainingSettings, fingerprint

log = logging.getLogger(__name__)
_STATE_FORMAT = 5
#: Columns of a history that differ between two equal trainings.
MEASURED = ("seconds", "patches_per_second", "data_wait_share", "peak_memory_mb")


class TrainingError(RuntimeError):
    """A training that can not go on. The message says why and what to change."""


@dataclass
class TrainedMember:
    """A finished member: the weights of its best epoch and its history.

    ``history`` has a row an epoch: train_loss, validation_loss, validation_iou, learning_rate (the last of the epoch),
    seconds, patches_per_second and data_wait_share of the training steps (the share of their time in which they wait
    for data), peak_memory_mb (of the device, or on a CPU of the process). ``engine`` says what it was trained with.
    """

    state: dict[str, torch.Tensor]
    history: pd.DataFrame
    best_epoch: int
    validation_iou: float
    train_patches: int
    parameters: int
    seed: int
    engine: dict[str, Any] = field(default_factory=dict)


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
    data: str = "auto",
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
    device : torch device name: ``cpu``, ``mps``, ``cuda`` or ``cuda:1``
    work_dir : folder of the training's state; a finished training may delete it
    progress : called with the history row of each epoch
    threads : torch threads of this process; a training that goes on takes those that it began with
    data : ``mapped``, ``resident`` or ``auto`` (see ``batches.patch_source``); never changes the result

    Raises
    ------
    TrainingError
        if the loss is not finite, or the fold has no patches.
    MemoryError
        if the device's memory does not suffice; the message says which setting to lower.

    Notes
    -----
    The state after each epoch lies in ``work_dir`` as safetensors and JSON. It is used again only for the same seed,
    settings, glaciers, layers and normalization; a damaged or foreign state is removed and the training starts again.
    With the same machine and device a resumed training gives the same bits as an uninterrupted one.
    """
    if threads:
        torch.set_num_threads(threads)
    work_dir.mkdir(parents=True, exist_ok=True)
    train_ids, valid_ids = sorted(train_ids), sorted(valid_ids)
    patches = draw_patches(packed, train_ids, training, seed)
    if not len(patches):
        raise TrainingError("the training glaciers have no patch centres: are their outlines on their grids?")
    low = low_precision(InferenceSettings(precision=training.precision), device)
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda), _algorithms(device, training.deterministic), _memory_advice(device):
        torch.manual_seed(seed)
        _reset_peak_memory(device)
        bare = channels_last(build_model(model_settings))
        initial = weights_sha256(bare.state_dict())
        # What the network starts from is known by its values: a file of weights may change under its name.
        identity = fingerprint(
            [_STATE_FORMAT, seed, low, initial, model_settings.model_dump(exclude={"encoder_weights"}),
             training.of_a_member(), *({g: packed.checksum(g) for g in ids} for ids in (train_ids, valid_ids)),
             statistics[["channel", "mean", "std", "standardized"]].to_dict("list")]
        )  # fmt: skip
        optimizer = _optimizer(bare, training)
        fabric = _fabric(device, low)
        model, stepper = fabric.setup(bare, optimizer)
        history, best = _resume(work_dir, identity, bare, optimizer)
        normalizer = Normalizer.of(packed, statistics, device)
        source = patch_source(packed, train_ids, training.patch_px, device, data)
        validation = Validation(packed, valid_ids, training, device)
        for epoch in range(len(history) + 1, training.epochs + 1):
            if _stopped(history, best, training):
                break
            start = time.perf_counter()
            row = {"epoch": epoch} | _train_epoch(
                fabric, model, stepper, source, patches, normalizer, training, seed, epoch, device
            )
            row |= validation.scores(bare, normalizer, training, low)
            row |= {"seconds": time.perf_counter() - start, "peak_memory_mb": _peak_memory_mb(device)}
            history.append(row)
            iou = row["validation_iou"]
            # Where nothing can be validated the last epoch is kept.
            if best is None or math.isnan(iou) or iou > best["validation_iou"]:
                best = {"epoch": epoch, "validation_iou": iou}
                best["state"] = {k: v.detach().cpu().clone().contiguous() for k, v in bare.state_dict().items()}
            _save_state(work_dir, identity, bare, optimizer, history, best)
            if progress:
                progress(row)
    assert best is not None
    return TrainedMember(
        state=best["state"],
        history=pd.DataFrame(history),
        best_epoch=int(best["epoch"]),
        validation_iou=float(best["validation_iou"]),
        train_patches=len(patches),
        parameters=sum(p.numel() for p in bare.parameters()),
        seed=seed,
        engine={
            "device": _device_name(device),
            "precision": "bf16-mixed" if low else "fp32",
            "threads": torch.get_num_threads(),
            "training_data": source.kind,
            "torch": torch.__version__,
            "encoder_weights": _name_of_weights(model_settings),
            "initial_sha256": initial,
        },
    )


def _name_of_weights(settings: ModelSettings) -> str:
    """What the encoder started from: a named set, a file by its name and hash, or none."""
    path = settings.encoder_weights_file
    if path is None:
        return settings.encoder_weights or "none (random)"
    return f"{path.name} ({hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names and values of weights: tells what a network started from, whatever file that came from."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- the engine
def _fabric(device: str, low: bool) -> Any:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces its precision for each member
    kind, _, index = device.partition(":")
    # The plain environment: members are independent, so that a cluster's job variables must not make them ranks.
    return Fabric(
        accelerator=kind,
        devices=[int(index or 0)] if kind == "cuda" else 1,
        precision="bf16-mixed" if low else "32-true",
        plugins=[LightningEnvironment()],
    )


def _optimizer(model: torch.nn.Module, training: TrainingSettings) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)


@contextlib.contextmanager
def _algorithms(device: str, deterministic: bool) -> Iterator[None]:
    """Deterministic algorithms on an accelerator while training; the caller's choice comes back."""
    if device == "cpu":  # its algorithms are deterministic as they are
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _memory_advice(device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"the memory of {device} does not suffice: lower training.batch_size or compute.members_at_once, or set "
            f"compute.training_data to 'mapped' ({' '.join(str(error).split())[:200]})"
        ) from error


def _device_name(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _reset_peak_memory(device: str) -> None:
    """From now on the peak is this training's, not that of an earlier one in the same process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux, or not allowed: then it is the process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory_mb(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (2**20 if sys.platform == "darwin" else 2**10))


# --------------------------------------------------------------------------------------------- an epoch
def _train_epoch(
    fabric: Any, model: Any, optimizer: Any, source: PatchSource, patches: np.ndarray, normalizer: Normalizer,
    training: TrainingSettings, seed: int, epoch: int, device: str,
) -> dict[str, float]:  # fmt: skip
    """One pass over the patches: mean loss, last learning rate, patches a second, share of time spent on data."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))  # for networks with stochastic layers
    # Batches of equal size: a small rest would disturb the statistics of batch normalization.
    pieces = np.array_split(rng.permutation(len(patches)), math.ceil(len(patches) / training.batch_size))
    turns = rng.integers(8, size=len(patches)) if training.augmentation else np.zeros(len(patches), dtype=int)
    total = training.epochs * len(pieces)
    model.train()
    losses: list[torch.Tensor] = []
    rate = waited = 0.0
    begun = time.perf_counter()
    stream = batches(source, ((patches[order], turns[order]) for order in pieces), device)
    for step in range(len(pieces)):
        start = time.perf_counter()
        x, target, valid = next(stream)
        waited += time.perf_counter() - start
        rate = learning_rate(training, (epoch - 1) * len(pieces) + step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = masked_loss(model(normalizer(x).contiguous(memory_format=torch.channels_last)), target, valid, training)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
        if device == "cpu":  # elsewhere asking would wait for the device at every step
            _check_finite(losses[-1], epoch, training)
    mean = torch.stack(losses).cpu().double().mean()
    _check_finite(mean, epoch, training)
    seconds = time.perf_counter() - begun
    return {
        "train_loss": float(mean),
        "learning_rate": rate,
        "patches_per_second": len(patches) / seconds,
        "data_wait_share": waited / seconds,
    }


def _check_finite(loss: torch.Tensor, epoch: int, training: TrainingSettings) -> None:
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss.item()} in epoch {epoch}: lower training.learning_rate ({training.learning_rate})"
        )


def learning_rate(training: TrainingSettings, step: int, total: int) -> float:
    """Rate at a step of ``total``.

    ``constant``; ``cosine``: from the full rate down to zero; both after a linear rise over ``warmup_share``;
    ``one_cycle``: cosine up over 30% of the steps from 1/25, then down to 1/2500.
    """
    top = training.learning_rate
    if training.schedule == "one_cycle":
        up = max(int(0.3 * total), 1)
        if step < up:
            low, high, share = top / 25, top, step / up
        else:
            low, high, share = top, top / 2500, (step - up) / max(total - up, 1)
        return low + (high - low) * (1 - math.cos(math.pi * share)) / 2
    warm = int(training.warmup_share * total)
    if step < warm:
        return top * (step + 1) / (warm + 1)
    if training.schedule == "constant":
        return top
    return top * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1))) / 2


def _stopped(history: list[dict[str, Any]], best: dict[str, Any] | None, training: TrainingSettings) -> bool:
    """Whether so many epochs brought nothing better that the training ends."""
    patience = training.early_stopping
    return patience is not None and best is not None and len(history) - int(best["epoch"]) >= patience


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
    temporary = work / f"tmp-state-{epoch}.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, temporary)
    os.replace(temporary, work / f"state-{epoch}.safetensors")
    best_file = work / f"best-{best['epoch']}.safetensors"
    if best["epoch"] == epoch or not best_file.exists():  # a killed training may have left one of this epoch
        temporary = work / f"tmp-{best['epoch']}.safetensors"
        save_file(best["state"], temporary)
        os.replace(temporary, best_file)
    note = {
        "identity": identity, "epoch": epoch, "threads": torch.get_num_threads(), "history": history,
        "scalars": scalars,
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
    """History and best epoch of an interrupted training of the same identity, in whose number of threads this process
    then goes on; else a fresh start."""
    path = work / "state.json"
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["identity"] != identity:
            raise FileNotFoundError
        tensors = load_file(work / f"state-{note['epoch']}.safetensors")
        best = {**note["best"], "state": load_file(work / f"best-{note['best']['epoch']}.safetensors")}
        threads = int(note["threads"])
    except (FileNotFoundError, SafetensorError, ValueError, KeyError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning(f"the state in {work} is damaged ({error}); the training starts again")
        path.unlink(missing_ok=True)
        for old in work.glob("*.safetensors"):
            old.unlink()
        return [], None
    torch.set_num_threads(threads)
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
