"""Model files: safetensors and JSON. Nothing is unpickled.

Belongs here: saving and loading members with checks. Does not belong here: training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from upath import UPath

from dl4gam_assets.segmentation.model import build_model, channels_last
from dl4gam_assets.settings import ModelSettings
from dl4gam_assets.storage import Storage

if TYPE_CHECKING:
    from dl4gam_assets.segmentation.training import TrainedMember


class ModelFileError(RuntimeError):
    """A model file that can not be used. The message names it and says what to do."""


def save_member(
    storage: Storage, folder: UPath, member: TrainedMember, settings: ModelSettings, statistics: pd.DataFrame,
    extra: Mapping[str, Any],
) -> str:  # fmt: skip
    """Write model.safetensors, history.parquet and model.json (settings, normalization, hash); returns the SHA-256.

    The JSON comes last, so a folder that has it is complete.
    """
    with storage.writing(folder / "model.safetensors") as path:
        save_file(member.state, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with storage.writing(folder / "history.parquet") as path:
        member.history.to_parquet(path, index=False)
    meta = {
        "sha256": sha256,
        "model": settings.model_dump(mode="json"),
        "normalization": _records(statistics),
        "best_epoch": member.best_epoch,
        "validation_iou": member.validation_iou,
        "seed": member.seed,
        **extra,
    }
    storage.write_json(folder / "model.json", meta)
    return sha256


def _records(statistics: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"channel": str(r.channel), "mean": float(r.mean), "std": float(r.std), "standardized": bool(r.standardized)}
        for r in statistics.itertuples()
    ]


def load_member(
    storage: Storage,
    folder: UPath,
    expected_sha256: str | None = None,
    *,
    channels: Sequence[str] | None = None,
    statistics: pd.DataFrame | None = None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A member in evaluation mode on the CPU, and its JSON.

    Parameters
    ----------
    expected_sha256 : hash that the weights must have
    channels, statistics : what the member will be used with; refused unless it was trained with the same

    Raises
    ------
    ModelFileError
        if a file is missing or damaged, the weights are not those of the JSON, not the expected ones or no numbers,
        they do not fit the network, or the member was trained with other channels or another normalization.
    """
    try:
        meta = storage.read_json(folder / "model.json")
        settings = ModelSettings.model_validate(meta["model"]) if meta is not None else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{folder / 'model.json'} is damaged ({error}): train the member again") from error
    if meta is None or settings is None:
        raise ModelFileError(f"{folder} holds no finished model: materialize its ensemble_member")
    if channels is not None and list(channels) != settings.channels:
        raise ModelFileError(f"{folder} was trained on the channels {settings.channels}, not on {list(channels)}")
    if statistics is not None and _records(statistics) != meta.get("normalization"):
        raise ModelFileError(f"{folder} was trained with another normalization: materialize its ensemble_member again")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ModelFileError(f"{weights} is missing: materialize its ensemble_member again")
    with storage.reading(weights) as path:
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if sha256 != meta.get("sha256"):
            raise ModelFileError(f"{weights} is not the file of its model.json (its hash differs): train it again")
        if expected_sha256 is not None and sha256 != expected_sha256:
            raise ModelFileError(
                f"{weights} was trained again since its ensemble was collected: materialize ensemble and calibration"
            )
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ModelFileError(f"{weights} is no safetensors file: {error}") from error
    broken = next((name for name, values in state.items() if not torch.isfinite(values).all()), None)
    if broken is not None:
        raise ModelFileError(f"{weights}: {broken} holds values that are no numbers: train the member again")
    try:
        model = build_model(settings, pretrained=False)
    except MemoryError:
        raise
    except Exception as error:  # a library's own errors for names and sizes that it does not know
        raise ModelFileError(f"{folder / 'model.json'} is damaged ({error}): train the member again") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelFileError(f"{weights} does not fit the network of its model.json: {str(error)[:300]}") from error
    return channels_last(model).eval(), dict(meta)
