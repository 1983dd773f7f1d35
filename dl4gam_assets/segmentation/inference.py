"""From channels to logits of a whole glacier.

Belongs here: windows and blending, the published stride averaging, precision.
Does not belong here: calibration and averages over members (``ensemble``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dl4gam_assets.settings import InferenceSettings

_MULTIPLE = 32  # every encoder halves at most five times


def predict_logits(
    models: Sequence[torch.nn.Module],
    stack: np.ndarray,
    settings: InferenceSettings,
    device: str,
    *,
    centres: np.ndarray | None = None,
) -> np.ndarray:
    """Logits of each model for a whole glacier.

    Mode ``windows``: the glacier in one piece, or, where it is larger than ``window_px``, in overlapping windows whose
    logits are blended with a smooth weight. Mode ``stride``: patches every ``stride_px`` pixels, ``margin_share`` of
    each dropped on every side, overlapping probabilities averaged (as published); returned as logits.

    Parameters
    ----------
    models : networks in evaluation mode on ``device``
    stack : float32 array (C, H, W), normalized, without NaN
    settings : mode, sizes, precision
    device : torch device name
    centres : int array (N, 2) of rows and columns, for mode ``stride`` only: patches lie around them, as the published
        ones around ``patch_centres(zone, glacier, stride_px, extremes=True)``, and pixels that no patch reaches are
        NaN. Without them patches cover the whole grid.

    Returns
    -------
    float32 array (M, H, W).

    Raises
    ------
    ValueError
        if the stack is not (C, H, W) or holds NaN, or ``overlap_px`` is not below ``window_px``.
    """
    if stack.ndim != 3 or not np.isfinite(stack).all():
        raise ValueError(f"the stack must be (C, H, W) without NaN: normalize it first (its shape is {stack.shape})")
    if settings.mode == "windows" and settings.overlap_px >= settings.window_px:
        raise ValueError(f"inference.overlap_px ({settings.overlap_px}) must be below window_px ({settings.window_px})")
    x = torch.from_numpy(np.ascontiguousarray(stack, dtype=np.float32))
    low = _low_precision(settings, device)
    with torch.inference_mode(), torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=low):
        if settings.mode == "stride":
            return np.stack([_stride(m, x, settings, device, centres) for m in models])
        return _windows(models, x, settings, device)


def _low_precision(settings: InferenceSettings, device: str) -> bool:
    """Whether to compute in bf16: on request, or where the hardware is fast with it."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    if device == "cpu":
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(check() for check in checks if check is not None)
    return False


def _padded(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reflected to (height, width) at the lower right; repeated where it is too small to reflect."""
    while x.shape[1] < height or x.shape[2] < width:
        down = min(height - x.shape[1], x.shape[1] - 1)
        right = min(width - x.shape[2], x.shape[2] - 1)
        if (down <= 0 and x.shape[1] < height) or (right <= 0 and x.shape[2] < width):
            missing = (0, width - x.shape[2], 0, height - x.shape[1])
            return torch.nn.functional.pad(x[None], missing, mode="replicate")[0]
        x = torch.nn.functional.pad(x[None], (0, right, 0, down), mode="reflect")[0]
    return x


def _up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _windows(
    models: Sequence[torch.nn.Module], x: torch.Tensor, settings: InferenceSettings, device: str
) -> np.ndarray:
    height, width = x.shape[1:]
    size = settings.window_px
    total = torch.zeros((len(models), height, width), dtype=torch.float32)
    weights = torch.zeros((height, width), dtype=torch.float32)
    for top, bottom in _spans(height, size, settings.overlap_px):
        for left, right in _spans(width, size, settings.overlap_px):
            h, w = bottom - top, right - left
            window = _padded(x[:, top:bottom, left:right], _up(h), _up(w))
            batch = window[None].to(device, memory_format=torch.channels_last)
            ramp = _ramp(h, top > 0, bottom < height, settings.overlap_px)[:, None] * _ramp(
                w, left > 0, right < width, settings.overlap_px
            )
            weights[top:bottom, left:right] += ramp
            for k, model in enumerate(models):
                logits = model(batch)[0, 0, :h, :w].float().cpu()
                total[k, top:bottom, left:right] += logits * ramp
    return (total / weights).numpy()


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Windows over a length: one if it fits, otherwise of ``size`` with at least ``overlap`` in common."""
    if length <= size:
        return [(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = np.linspace(0, length - size, count).round().astype(int)
    return [(int(s), int(s) + size) for s in starts]


def _ramp(length: int, before: bool, after: bool, overlap: int) -> torch.Tensor:
    """Weight along one side of a window: a raised cosine over the overlap towards a neighbour, 1 elsewhere."""
    ramp = torch.ones(length)
    n = min(overlap, length // 2)
    if n:
        rise = 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(n) + 0.5) / n)
        if before:
            ramp[:n] *= rise
        if after:
            ramp[-n:] *= rise.flip(0)
    return ramp.clamp(min=1e-3)


def _stride(
    model: torch.nn.Module, x: torch.Tensor, settings: InferenceSettings, device: str, centres: np.ndarray | None
) -> np.ndarray:
    size, height, width = settings.patch_px, x.shape[1], x.shape[2]
    x = _padded(x, max(height, size), max(width, size))
    drop = int(size * settings.margin_share)
    total = torch.zeros(x.shape[1:], dtype=torch.float64)
    count = torch.zeros(x.shape[1:], dtype=torch.float64)
    positions = _positions(x.shape[1], x.shape[2], size, settings.stride_px, centres)
    for first in range(0, len(positions), 16):
        group = positions[first : first + 16]
        batch = torch.stack([x[:, t : t + size, left : left + size] for t, left in group])
        probability = torch.sigmoid(model(batch.to(device, memory_format=torch.channels_last)).float())[:, 0].cpu()
        for p, (t, left) in zip(probability, group, strict=True):
            # At the border of the grid nothing else covers the margin, so it is kept there.
            a = 0 if t == 0 else drop
            b = size if t + size == x.shape[1] else size - drop
            c = 0 if left == 0 else drop
            d = size if left + size == x.shape[2] else size - drop
            total[t + a : t + b, left + c : left + d] += p[a:b, c:d]
            count[t + a : t + b, left + c : left + d] += 1
    mean = (total / count)[:height, :width].clamp(1e-7, 1 - 1e-7)  # 0 / 0, NaN, where no patch lies
    return torch.logit(mean).float().numpy()


def _positions(height: int, width: int, size: int, stride: int, centres: np.ndarray | None) -> list[tuple[int, int]]:
    """Upper left corners of the patches, all inside the grid."""
    if centres is None:
        tops = sorted({*range(0, height - size + 1, stride), height - size})
        lefts = sorted({*range(0, width - size + 1, stride), width - size})
        return [(t, left) for t in tops for left in lefts]
    corners = np.clip(np.asarray(centres) - size // 2, 0, [height - size, width - size])
    return [(int(t), int(left)) for t, left in np.unique(corners, axis=0)]
