"""The score of an epoch: IoU over the validation glaciers.

Belongs here: what chooses the best epoch. Does not belong here: the evaluation of an ensemble (``change``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dl4gam_assets.segmentation.inference import window_logits
from dl4gam_assets.segmentation.losses import masked_loss
from dl4gam_assets.segmentation.packing import Packed, PackedCubes
from dl4gam_assets.segmentation.sampling import Normalizer, patch_centres, patch_cover
from dl4gam_assets.settings import InferenceSettings, TrainingSettings


class _Glacier(NamedTuple):
    layers: Packed
    weight: torch.Tensor  # int32 (H, W): how many validation patches cover a valid pixel
    truth: torch.Tensor  # bool (H, W)
    area: int


class Validation:
    """Scores a network on validation glaciers; masks and weights are prepared once and stay on the device.

    Each glacier is predicted once, whole or in large windows, and a pixel counts as often as patches with centres every
    ``validation_step_px`` cover it: what predicting those patches one by one gives, but for the networks' view beyond
    their edges, in a fraction of the time. The surroundings count, so false alarms far from the margin are seen.

    Parameters
    ----------
    packed, ids : the validation glaciers; those without a valid pixel are left out
    device : torch device name
    """

    def __init__(self, packed: PackedCubes, ids: Sequence[str], training: TrainingSettings, device: str):
        self._device = device
        self._glaciers = []
        for glacier_id in ids:
            layers = packed.glacier(glacier_id)
            centres = patch_centres(layers.zone, layers.glacier, training.validation_step_px, extremes=False)
            weight = patch_cover(centres, layers.bits.shape, training.patch_px) * layers.valid
            if weight.any():
                weight, truth = (torch.from_numpy(a).to(device) for a in (weight, layers.target))
                self._glaciers.append(_Glacier(layers, weight, truth, max(int(layers.glacier.sum()), 1)))

    def scores(
        self, model: torch.nn.Module, normalizer: Normalizer, training: TrainingSettings, low: bool
    ) -> dict[str, float]:
        """``validation_loss``, the mean over glaciers, and ``validation_iou``, weighted by their areas (Diaconu et al.
        2025, section 5); NaN where there is none. ``low``: compute in bf16."""
        if not self._glaciers:
            return {"validation_loss": math.nan, "validation_iou": math.nan}
        model.eval()
        settings = InferenceSettings()
        counts, losses = [], []
        kind = self._device.split(":")[0]
        with torch.inference_mode(), torch.autocast(kind, dtype=torch.bfloat16, enabled=low):
            for layers, weight, truth, _ in self._glaciers:
                x = normalizer(torch.from_numpy(np.array(layers.channels)).to(self._device))
                logits = window_logits(model, x, settings)
                predicted = logits >= 0
                hit, union = ((mask * weight).sum() for mask in (truth & predicted, truth | predicted))
                counts.append(torch.stack([hit, union]))
                losses.append(masked_loss(logits[None, None], truth[None, None], weight[None, None], training))
        hits, unions = torch.stack(counts).cpu().numpy().T  # the first wait for the device
        ious = np.where(unions > 0, hits / np.maximum(unions, 1), 1.0)
        areas = [glacier.area for glacier in self._glaciers]
        return {
            "validation_loss": float(torch.stack(losses).cpu().double().mean()),
            "validation_iou": float(np.average(ious, weights=areas)),
        }
