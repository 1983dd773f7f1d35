"""Ensembles: aggregation, calibration, the area interval, baselines, map files.

Belongs here: everything from members' logits to a calibrated map with an interval (Diaconu et al. 2025, section 7), and
the classical methods that an ensemble has to beat.
Does not belong here: Dagster, networks (``segmentation``), areas (``change``).

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "aggregate": "aggregation",
    "fit_temperature": "calibration",
    "log_loss": "calibration",
    "reliability": "calibration",
    "expected_calibration_error": "calibration",
    "interval_masks": "intervals",
    "interval_areas": "intervals",
    "largest_covering_tau": "intervals",
    "tau_features": "intervals",
    "fit_tau": "intervals",
    "left_out_taus": "intervals",
    "TauRule": "intervals",
    "conformal_classes": "conformal",
    "conformal_tau": "conformal",
    "conformal_taus": "conformal",
    "pooled_validation": "conformal",
    "fit_baseline": "baseline",
    "fit_oracle": "baseline",
    "apply_baseline": "baseline",
    "Forest": "random_forest",
    "fit_forest": "random_forest",
    "sample_pixels": "random_forest",
    "load_forest": "random_forest",
    "write_prediction": "maps",
    "read_prediction": "maps",
    "read_prediction_tags": "maps",
    "read_members": "maps",
    "digits_of": "maps",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
