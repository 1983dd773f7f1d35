"""Segmentation networks: normalization, packing, training, inference, model files.

Belongs here: one network, from raw channels to logits.
Does not belong here: Dagster, ensembles and calibration (``ensemble``).

Names are loaded on first use, so that importing the room costs nothing; torch is imported only by the modules that
need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "normalization_statistics": "normalization",
    "normalize": "normalization",
    "STANDARDIZED_FREE": "normalization",
    "pack_cubes": "packing",
    "PackedCubes": "packing",
    "patch_centres": "sampling",
    "draw_patches": "sampling",
    "symmetry": "sampling",
    "build_model": "model",
    "save_member": "files",
    "load_member": "files",
    "ModelFileError": "files",
    "train_member": "training",
    "TrainedMember": "training",
    "TrainingError": "training",
    "masked_loss": "losses",
    "predict_logits": "inference",
    "member_logits": "inference",
    "fill_gaps": "filling",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
