"""Files in the published layout, made from a store of ours: a real Lightning module around a real smp network.

Belongs here: checkpoints as Lightning saves them, settings.yaml as published. The package exports cubes and tables.
Does not belong here: tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from dl4gam_assets.segmentation._compat import import_smp
from dl4gam_assets.settings import ModelSettings, Region
from dl4gam_assets.storage import Storage

smp = import_smp()  # before Lightning, which imports torchvision
import pytorch_lightning as pl  # noqa: E402


class SegModel(torch.nn.Module):
    """The network as its authors wrap it: ``seg_model`` of segmentation-models-pytorch, ending in a sigmoid."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.seg_model = smp.create_model(
            settings.architecture, encoder_name=settings.encoder, encoder_depth=settings.encoder_depth,
            decoder_channels=settings.decoder_channels, encoder_weights=None, in_channels=len(settings.channels),
            classes=1, activation="sigmoid", decoder_use_norm=False,
        )  # fmt: skip


class Task(pl.LightningModule):
    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.model = SegModel(settings)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (x,) = batch
        loss: torch.Tensor = self.model.seg_model(x).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.0)


def settings_of(model: ModelSettings, indices: Any = True) -> dict[str, Any]:
    return {
        "data": {"split": "split_1"},
        "task": {"seed": 1, "loss": "focal"},
        "model": {
            "class": "SegModel", "name": model.architecture,
            "inputs": {"bands_input": ["R", "G", "B", "NIR", "SWIR"], "band_mask": "mask_nok", "dem": True,
                       "dhdt": True, "optical_indices": indices, "dem_features": True, "velocity": False},
            "args": {"encoder_name": model.encoder, "encoder_weights": "imagenet", "encoder_depth": model.encoder_depth,
                     "activation": "sigmoid", "decoder_use_batchnorm": False},
        },
    }  # fmt: skip


def write_checkpoint(
    weights: dict[str, torch.Tensor], model: ModelSettings, folder: Path, *, split: int, seed: int, epoch: int = 7,
    score: float = 0.9012, indices: Any = True,
) -> Path:  # fmt: skip
    """Train a step at rate zero and let Lightning save what it saves: weights, optimizer, loops, callbacks."""
    task = Task(model)
    task.model.seg_model.load_state_dict(weights)
    x = torch.zeros(2, len(model.channels), 32, 32)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    task.train()
    for module in task.modules():  # statistics of batches stay as they are
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    trainer.fit(task, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2))
    place = folder / "unet" / f"split_{split}" / f"seed_{seed}" / "version_0"
    path = place / "checkpoints" / f"ckpt-epoch={epoch:02d}-w_JaccardIndex_val_epoch_avg_per_g={score:.4f}.ckpt"
    path.parent.mkdir(parents=True)
    trainer.save_checkpoint(path)
    (place / "checkpoints" / "last.ckpt").write_bytes(b"not looked at")
    (place / "settings.yaml").write_text(yaml.safe_dump(settings_of(model, indices)))
    return path


def write_checkpoints(storage: Storage, region: Region, folder: Path) -> None:
    """All members of a store as published checkpoints; seeds count from 1."""
    for fold in range(1, region.folds.n + 1):
        for member in range(1, region.training.members + 1):
            weights = load_file(str(storage.model(fold, member) / "model.safetensors"))
            write_checkpoint(weights, region.model, folder, split=fold, seed=member)
