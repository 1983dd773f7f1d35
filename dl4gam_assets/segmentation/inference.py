"""From channels to logits of a whole glacier.

Belongs here: windows and blending, the published stride averaging, precision.
Does not belong here: calibration and averages over members (``ensemble``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dl4gam_assets.compute import fast_bf16
from dl4gam_assets.settings import InferenceSettings

#: Every encoder halves at most five times, so networks are equivariant to shifts by this many pixels, not to others.
_MULTIPLE = 32
_STRIDE_BATCH = 16
#: Pixels of the windows that an accelerator takes at once.
_DEVICE_PX = 1 << 22


def predict_logits(
    models: Sequence[torch.nn.Module],
    stack: np.ndarray,
    settings: InferenceSettings,
    device: str,
    *,
    centres: np.ndarray | None = None,
) -> np.ndarray:
    """Logits of each model for a whole glacier, (M, H, W) float32: :func:`member_logits` of all models at once."""
    return np.stack(list(member_logits(models, stack, settings, device, centres=centres)))


def member_logits(
    models: Sequence[torch.nn.Module],
    stack: np.ndarray,
    settings: InferenceSettings,
    device: str,
    *,
    centres: np.ndarray | None = None,
    zone: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Logits of one model after the other for a whole glacier, so that memory does not grow with their number.

    The channels go to the device once and are shared by all models.

    Mode ``windows``: the glacier in one piece, or, where it is larger than ``window_px``, in windows that overlap by
    ``overlap_px`` or more and whose logits are blended with a smooth weight. Windows lie at multiples of 32 pixels, so
    that the encoder sees each on the same grid as the whole; their size is the least that covers the glacier.

    Mode ``stride``: patches of ``patch_px``, ``margin_share`` of each dropped on every side, overlapping probabilities
    averaged, as published (METHOD section 6); returned as logits of those averages.

    Parameters
    ----------
    models : networks in evaluation mode on ``device``
    stack : float32 array (C, H, W), normalized, without NaN
    settings : mode, sizes, precision
    device : torch device name
    centres : int array (N, 2) of rows and columns, for mode ``stride`` only: patches lie around them, as the published
        ones around ``patch_centres(zone, glacier, stride_px, extremes=True)``, and pixels that no patch reaches are
        NaN. Without them patches cover the whole grid every ``stride_px``.
    zone : bool (H, W), for mode ``windows`` with ``context_px`` only: pixels farther than that from its box are NaN.

    Yields
    ------
    float32 array (H, W) of each model.

    Raises
    ------
    ValueError
        if the stack is not (C, H, W) or holds NaN, or ``overlap_px`` is not well below ``window_px``.
    """
    if stack.ndim != 3 or not np.isfinite(stack).all():
        raise ValueError(f"the stack must be (C, H, W) without NaN: normalize it first (its shape is {stack.shape})")
    if settings.mode == "windows" and settings.overlap_px > settings.window_px - _MULTIPLE:
        raise ValueError(
            f"inference.overlap_px ({settings.overlap_px}) must be {_MULTIPLE} or more below window_px "
            f"({settings.window_px})"
        )
    box = (slice(None), slice(None))
    if zone is not None and zone.any() and settings.context_px is not None and settings.mode == "windows":
        box = _box(zone, settings.context_px)
    x = torch.from_numpy(np.ascontiguousarray(stack[:, *box], dtype=np.float32)).to(device)
    low = low_precision(settings, device)

    def one(model: torch.nn.Module) -> np.ndarray:
        # Entered for each model: a generator that rests inside these contexts would leave them on for its caller.
        with torch.inference_mode(), torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=low):
            if settings.mode == "stride":
                return _stride(model, x, settings, centres)
            found: np.ndarray = window_logits(model, x, settings).cpu().numpy()
            if x.shape[1:] == stack.shape[1:]:
                return found
            out = np.full(stack.shape[1:], np.nan, dtype=np.float32)
            out[box] = found
            return out

    return (one(model) for model in models)


def _box(zone: np.ndarray, context: int) -> tuple[slice, slice]:
    """Rows and columns of the zone and ``context`` pixels around it, inside the grid."""
    rows, columns = np.flatnonzero(zone.any(axis=1)), np.flatnonzero(zone.any(axis=0))
    return (
        slice(max(int(rows[0]) - context, 0), int(rows[-1]) + 1 + context),
        slice(max(int(columns[0]) - context, 0), int(columns[-1]) + 1 + context),
    )


def low_precision(settings: InferenceSettings, device: str) -> bool:
    """Whether to compute in bf16: on request; with ``auto`` in mode ``windows`` where the hardware is fast with it."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if settings.mode == "stride":
        return False
    return fast_bf16(device)


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


def window_logits(model: torch.nn.Module, x: torch.Tensor, settings: InferenceSettings) -> torch.Tensor:
    """Logits (H, W) float32 of one model over normalized channels (C, H, W), whole or in blended windows; all on the
    device of ``x``, in the precision that the caller set (mode ``windows``, see :func:`member_logits`)."""
    height, width = x.shape[1:]
    rows = _spans(height, settings.window_px, settings.overlap_px)
    columns = _spans(width, settings.window_px, settings.overlap_px)
    down, across = (
        [torch.from_numpy(w).to(x.device) for w in blend_weights(spans)] for spans in (rows, columns)
    )  # fmt: skip
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            by_shape.setdefault((_up(bottom - top), _up(right - left)), []).append((i, j))
    total = torch.zeros((height, width), dtype=torch.float32, device=x.device)
    for shape, group in by_shape.items():
        # Several windows at once fill an accelerator; a processor gains nothing from it at these sizes.
        at_once = 1 if x.device.type == "cpu" else max(_DEVICE_PX // (shape[0] * shape[1]), 1)
        for first in range(0, len(group), at_once):
            chosen = group[first : first + at_once]
            where = [(slice(*rows[i]), slice(*columns[j])) for i, j in chosen]
            batch = torch.stack([_padded(x[:, a, b], *shape) for a, b in where])
            found = model(batch.contiguous(memory_format=torch.channels_last))[:, 0].float()
            for (i, j), place, logits in zip(chosen, where, found, strict=True):
                weight = down[i][:, None] * across[j]
                total[place] += logits[: weight.shape[0], : weight.shape[1]] * weight
    return total


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Windows over a length: one if it fits, otherwise the fewest of at most ``size`` with at least ``overlap`` in
    common, all starts at multiples of 32, and then no larger than that number of them needs."""
    if length <= size:
        return [(0, length)]
    count = 1 + -(-(length - size) // _step(size, overlap))
    needed = size
    while (
        needed > overlap + _MULTIPLE and (count - 1) * _step(needed - _MULTIPLE, overlap) + needed - _MULTIPLE >= length
    ):
        needed -= _MULTIPLE
    step = _step(needed, overlap)
    return [(k * step, min(k * step + needed, length)) for k in range(count)]


def _step(size: int, overlap: int) -> int:
    return max((size - overlap) // _MULTIPLE, 1) * _MULTIPLE


def blend_weights(spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Weights of windows along one side, float32 arrays as long as each window, which add up to 1 at every pixel.

    Over what two neighbours share a raised cosine leads from one to the other. The outer quarter of it on each side
    has weight 0: a network knows least there, where its convolutions reach over the window's edge.
    """
    ramps = [np.ones(stop - start) for start, stop in spans]
    for k in range(len(spans) - 1):
        n = spans[k][1] - spans[k + 1][0]
        if n > 0:
            rise = 0.5 - 0.5 * np.cos(np.pi * np.clip(2 * (np.arange(n) + 0.5) / n - 0.5, 0, 1))
            ramps[k][-n:] *= 1 - rise
            ramps[k + 1][:n] *= rise
    total = np.zeros(spans[-1][1])
    for (start, stop), ramp in zip(spans, ramps, strict=True):
        total[start:stop] += ramp
    return [(r / total[start:stop]).astype(np.float32) for (start, stop), r in zip(spans, ramps, strict=True)]


def _stride(
    model: torch.nn.Module, x: torch.Tensor, settings: InferenceSettings, centres: np.ndarray | None
) -> np.ndarray:
    size, height, width = settings.patch_px, x.shape[1], x.shape[2]
    x = _padded(x, max(height, size), max(width, size))
    drop = int(size * settings.margin_share)
    total = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
    count = torch.zeros_like(total)
    positions = _positions(x.shape[1], x.shape[2], size, settings.stride_px, centres)
    for first in range(0, len(positions), _STRIDE_BATCH):
        group = positions[first : first + _STRIDE_BATCH]
        batch = torch.stack([x[:, t : t + size, left : left + size] for t, left in group])
        probability = torch.sigmoid(model(batch.contiguous(memory_format=torch.channels_last)).float())[:, 0]
        for p, (t, left) in zip(probability, group, strict=True):
            # At the border of the grid nothing else covers the margin, so it is kept there.
            a = 0 if t == 0 else drop
            b = size if t + size == x.shape[1] else size - drop
            c = 0 if left == 0 else drop
            d = size if left + size == x.shape[2] else size - drop
            total[t + a : t + b, left + c : left + d] += p[a:b, c:d]
            count[t + a : t + b, left + c : left + d] += 1
    mean = (total / count)[:height, :width].clamp(1e-7, 1 - 1e-7)  # 0 / 0, NaN, where no patch lies
    out: np.ndarray = torch.logit(mean).cpu().numpy()
    return out


def _positions(height: int, width: int, size: int, stride: int, centres: np.ndarray | None) -> list[tuple[int, int]]:
    """Upper left corners of the patches, all inside the grid."""
    if centres is None:
        tops = sorted({*range(0, height - size + 1, stride), height - size})
        lefts = sorted({*range(0, width - size + 1, stride), width - size})
        return [(t, left) for t in tops for left in lefts]
    corners = np.clip(np.asarray(centres) - size // 2, 0, [height - size, width - size])
    return [(int(t), int(left)) for t, left in np.unique(corners, axis=0)]
