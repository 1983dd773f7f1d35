"""Importing segmentation-models-pytorch beside a torch build that torchvision was not compiled for.

torchvision registers two operators (nms, qnms) of its compiled library at import; where that library does not fit
torch, the import fails although nothing here uses them. They are then declared without an implementation. Where
torchvision imports by itself, nothing is touched.
"""

from __future__ import annotations

import sys
from typing import Any

_DECLARED: list[Any] = []  # the library object must live as long as the process


def import_smp() -> Any:
    """The module segmentation_models_pytorch."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError):
        _declare_missing()
    import segmentation_models_pytorch as smp

    return smp


def _declare_missing() -> None:
    import torch

    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    if _DECLARED:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for signature in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, signature.split("(")[0]):
            library.define(signature)
    _DECLARED.append(library)
