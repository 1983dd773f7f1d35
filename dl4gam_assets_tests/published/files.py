"""Files in the published layout, made from a store of ours: a real Lightning module around a real smp network.

Belongs here: checkpoints as Lightning saves them, settings.yaml and cubes as published. The package
exports cubes and tables.
Does not belong here: tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import odc.geo.xr  # noqa: F401  registers the accessor `.odc`
import torch
import xarray as xr
import yaml
from safetensors.torch import load_file

from dl4gam_assets.published.layout import BAND_NAMES, date_of
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


SCORE = "w_JaccardIndex_val_epoch_avg_per_g"


class Task(pl.LightningModule):
    """A task whose arguments Lightning keeps: a path and a number of numpy, as research code often has them."""

    def __init__(
        self,
        settings: ModelSettings,
        score: float,
        best_epoch: int,
        root: Path,
        rate: np.floating[Any],
        extra: Any = None,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["settings"])
        self.model = SegModel(settings)
        self.score, self.best_epoch = score, best_epoch

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (x,) = batch
        loss: torch.Tensor = self.model.seg_model(x).mean()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log(SCORE, self.score if self.current_epoch == self.best_epoch else self.score / 2)

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
    weights: dict[str, torch.Tensor], model: ModelSettings, folder: Path, *, split: int, seed: int, epoch: int = 1,
    score: float = 0.9012, indices: Any = True, extra: Any = None,
) -> Path:  # fmt: skip
    """Train at rate zero, and let Lightning's callback save the best and the last epoch as the authors' does."""
    place = folder / "unet" / f"split_{split}" / f"seed_{seed}" / "version_0"
    task = Task(model, score, epoch, place, np.float64(1e-4), extra)
    task.model.seg_model.load_state_dict(weights)
    for module in task.modules():  # statistics of batches stay as they are
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    saving = pl.callbacks.ModelCheckpoint(
        place / "checkpoints", f"ckpt-{{epoch:02d}}-{{{SCORE}:.4f}}", monitor=SCORE, mode="max", save_top_k=1,
        save_last=True,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=epoch + 1, accelerator="cpu", logger=False, callbacks=[saving], num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    x = torch.zeros(2, len(model.channels), 32, 32)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    trainer.fit(task, batches, batches)
    content = settings_of(model, indices) | {"data": {"split": f"split_{split}"}, "task": {"seed": seed}}
    (place / "settings.yaml").write_text(yaml.safe_dump(content))
    return Path(saving.best_model_path)


def write_checkpoints(storage: Storage, region: Region, folder: Path) -> None:
    """All members of a store as published checkpoints; seeds count from 1."""
    for fold in range(1, region.folds.n + 1):
        for member in range(1, region.training.members + 1):
            weights = load_file(str(storage.model(fold, member) / "model.safetensors"))
            write_checkpoint(weights, region.model, folder, split=fold, seed=member)


def write_as_rioxarray(path: Path, other: Path, *, plain: bool = False) -> None:
    """A cube in the published layout again, as the authors' tools write it: every layer with its own CRS by rioxarray,
    and all thirteen bands (those that are not ours hold one number).

    Parameters
    ----------
    plain : missing values are -9999, and no attribute says so
    """
    import rioxarray  # noqa: F401  registers the accessor `.rio`

    with xr.open_dataset(path, decode_coords="all", mask_and_scale=False) as source:
        mine = source.load()
    have = list(mine["band_data"].attrs["long_name"])
    layers = [
        mine["band_data"].to_numpy()[have.index(n)] if n in have else np.full(mine["mask_nok"].shape, 7, np.int16)
        for n in BAND_NAMES
    ]
    made = xr.Dataset(coords={"x": mine["x"].to_numpy(), "y": mine["y"].to_numpy(), "band": np.arange(1, 14)})
    made["band_data"] = (("band", "y", "x"), np.stack(layers))
    if not plain:
        made["band_data"] = made["band_data"].rio.write_nodata(-9999)
    made["band_data"].attrs["long_name"] = list(BAND_NAMES)
    for name in mine.data_vars:
        if name == "band_data":
            continue
        made[name] = (("y", "x"), mine[name].to_numpy())
        if plain:
            made[name].encoding["_FillValue"] = None
        else:
            fill = mine[name].attrs.get("_FillValue")
            made[name].attrs["_FillValue"] = fill if fill is not None else np.int8(-1)
    crs = f"EPSG:{mine.odc.geobox.crs.epsg}"
    made = made.rio.write_crs(crs)
    for name in list(made.data_vars):
        made[name].rio.write_crs(crs, inplace=True)
    made.attrs = {"fn": f"{date_of(path.stem):%Y%m%dT102559}_raw.tif", "glacier_area": mine.attrs["glacier_area"]}
    other.parent.mkdir(parents=True, exist_ok=True)
    made.to_netcdf(other)
