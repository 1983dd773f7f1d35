"""Areas, outlines, quality figures, rates of change and regional totals.

Belongs here: everything between a glacier's probability map and the numbers that are reported: its area with bounds
(:mod:`.areas`), outlines (:mod:`.outlines`), held-out quality (:mod:`.evaluation`), change of each glacier
(:mod:`.rates`) and its trend over all years (:mod:`.trends`), totals and extrapolation to glaciers that were not
measured (:mod:`.regional`) with errors that they share (:mod:`.correlation`), and the comparison of simulated regions
with their truth (:mod:`.truth`).
Does not belong here: Dagster, file access, how a map was predicted or calibrated.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "area_row": "areas",
    "counted_pixels": "areas",
    "whole_shares": "areas",
    "fractional_shares": "areas",
    "ground_of": "areas",
    "bound_masks": "areas",
    "extract_outlines": "outlines",
    "evaluate_glacier": "evaluation",
    "pooled_scores": "evaluation",
    "class_scores": "evaluation",
    "glacier_classes": "evaluation",
    "scores": "evaluation",
    "area_changes": "rates",
    "decimal_year": "rates",
    "regional_changes": "regional",
    "combined_std": "regional",
    "ErrorCorrelation": "correlation",
    "area_trends": "trends",
    "fit_rate_law": "regional",
    "RateLaw": "regional",
    "size_class": "regional",
    "size_class_labels": "regional",
    "compare_with_truth": "truth",
    "TruthComparison": "truth",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
