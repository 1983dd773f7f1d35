"""Losses on valid pixels.

Belongs here: losses. Does not belong here: the training loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from dl4gam_assets.settings import TrainingSettings


def masked_loss(
    logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, settings: TrainingSettings
) -> torch.Tensor:
    """Loss over the valid pixels of a batch; zero (with a gradient of zero) where there is none.

    ``focal`` is Lin et al. 2017 (doi:10.1109/ICCV.2017.324) with gamma 2 and alpha 0.25 as published; ``bce`` is binary
    cross-entropy; ``dice`` and ``jaccard`` are 1 - Dice and 1 - IoU of the batch's probabilities, with 1 added to both
    parts of the fraction; ``bce_dice`` is the sum of ``bce`` and ``dice``. All ignore invalid pixels.

    Parameters
    ----------
    logits, target, valid : tensors (B, 1, H, W); target is 0 or 1, valid is 0 or the weight of a pixel (1 in training)
    """
    weight = valid.to(logits.dtype)
    target = target.to(logits.dtype)
    overlaps = torch.zeros((), dtype=logits.dtype, device=logits.device)
    if settings.loss in {"dice", "jaccard", "bce_dice"}:
        p = torch.sigmoid(logits) * weight
        overlap, both = (p * target).sum(), p.sum() + (target * weight).sum()
        if settings.loss == "jaccard":
            return 1 - (overlap + 1) / (both - overlap + 1)
        overlaps = 1 - (2 * overlap + 1) / (both + 1)
        if settings.loss == "dice":
            return overlaps
    loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if settings.loss == "focal":
        p = torch.sigmoid(logits)
        p_true = p * target + (1 - p) * (1 - target)
        loss = loss * (1 - p_true) ** settings.focal_gamma
        if settings.focal_alpha is not None:
            loss = loss * (settings.focal_alpha * target + (1 - settings.focal_alpha) * (1 - target))
    return overlaps + (loss * weight).sum() / weight.sum().clamp(min=1)
