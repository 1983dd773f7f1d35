"""Losses count valid pixels only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.segmentation import masked_loss
from dl4gam_assets.settings import TrainingSettings

KINDS = ["focal", "bce", "dice", "jaccard", "bce_dice"]


def _data(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 1, 6, 5, generator=g, dtype=torch.float64) * 3
    target = (torch.rand(2, 1, 6, 5, generator=g) < 0.4).to(torch.uint8)
    valid = (torch.rand(2, 1, 6, 5, generator=g) < 0.7).to(torch.uint8)
    valid[0, 0, 0, 0] = 1
    return logits, target, valid


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 5), st.one_of(st.none(), st.floats(0.05, 0.95)))
def test_focal_loss_is_its_formula(seed: int, gamma: float, alpha: float | None) -> None:
    logits, target, valid = _data(seed)
    got = masked_loss(logits, target, valid, TrainingSettings(focal_gamma=gamma, focal_alpha=alpha)).item()
    z, y = logits.numpy()[valid.numpy() > 0], target.numpy()[valid.numpy() > 0]
    p = 1 / (1 + np.exp(-z))
    p_true = np.where(y == 1, p, 1 - p)
    weight = 1.0 if alpha is None else np.where(y == 1, alpha, 1 - alpha)
    assert got == pytest.approx(float(np.mean(-weight * (1 - p_true) ** gamma * np.log(p_true))), rel=1e-6)


def test_focal_without_focusing_is_cross_entropy() -> None:
    data = _data(3)
    focal = masked_loss(*data, TrainingSettings(focal_gamma=0, focal_alpha=None))
    assert focal.item() == pytest.approx(masked_loss(*data, TrainingSettings(loss="bce")).item(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_pixels_have_no_say(kind: str) -> None:
    logits, target, valid = _data(1)
    options = TrainingSettings(loss=kind)  # type: ignore[arg-type]
    first = masked_loss(logits, target, valid, options)
    other = torch.where(valid > 0, logits, torch.full_like(logits, 50.0)).requires_grad_()
    changed = torch.where(valid > 0, target, 1 - target)
    second = masked_loss(other, changed, valid, options)
    assert second.item() == pytest.approx(first.item(), rel=1e-9)
    second.backward()
    assert other.grad is not None and (other.grad[valid == 0] == 0).all() and (other.grad[valid > 0] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_valid_gives_no_loss_and_no_nan(kind: str) -> None:
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    loss = masked_loss(logits, torch.ones_like(nothing), nothing, TrainingSettings(loss=kind))  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None and (logits.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind: str) -> None:
    logits = torch.tensor([200.0, -200.0, 0.0, 1e4]).reshape(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([0, 1, 1, 1], dtype=torch.uint8).reshape(1, 1, 2, 2)
    loss = masked_loss(logits, target, torch.ones_like(target), TrainingSettings(loss=kind))  # type: ignore[arg-type]
    loss.backward()
    assert torch.isfinite(loss) and logits.grad is not None and torch.isfinite(logits.grad).all()
