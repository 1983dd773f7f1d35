"""Every asset's stage by name, and whether a partition is up to date.

Belongs here: the one list that joins asset names to stages for callers that know names only (the command line).
Does not belong here: work, Dagster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from dl4gam_assets.stages import (
    areas,
    change,
    cubes,
    imagery,
    inventory,
    predictions,
    publication,
    simulation,
    terrain,
    training,
)
from dl4gam_assets.stages.base import StageResult, UpstreamError, Workspace

#: asset -> stage; arguments after the workspace are the partition's numbers (year, fold) in that order.
STAGES: dict[str, Callable[..., StageResult]] = {
    "simulated_inputs": simulation.simulated_inputs,
    "inventory_outlines": inventory.inventory_outlines,
    "debris_outlines": inventory.debris_outlines,
    "glacier_zones": inventory.glacier_zones,
    "cross_validation_folds": inventory.cross_validation_folds,
    "elevation": terrain.elevation,
    "scene_candidates": imagery.scene_candidates,
    "selected_scenes": imagery.selected_scenes,
    "elevation_change": terrain.elevation_change,
    "glacier_cubes": cubes.glacier_cubes,
    "normalization": training.normalization,
    "ensemble": training.ensemble,
    "calibration": training.calibration,
    "band_ratio_baseline": training.band_ratio_baseline,
    "glacier_predictions": predictions.glacier_predictions,
    "evaluation": predictions.evaluation,
    "interval_taus": areas.interval_taus,
    "glacier_areas": areas.glacier_areas,
    "glacier_outlines": areas.glacier_outlines,
    "baseline_areas": areas.baseline_areas,
    "area_change": change.area_change,
    "regional_change": change.regional_change,
    "area_trends": change.area_trends,
    "results_database": publication.results_database,
    "report": publication.report,
    "stac_catalog": publication.stac_catalog,
}


#: Which numbers a partition of an asset has, after the workspace.
PARTITIONED: dict[str, str] = {
    **dict.fromkeys(STAGES, "none"),
    **dict.fromkeys(("scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes", "glacier_outlines",
                     "area_change", "regional_change", "report", "stac_catalog"), "year"),
    **dict.fromkeys(("normalization", "ensemble", "calibration", "band_ratio_baseline", "interval_taus", "evaluation"),
                    "fold"),
    **dict.fromkeys(("glacier_predictions", "glacier_areas"), "year_fold"),
    "ensemble_member": "fold_member",
}  # fmt: skip


def probe(ws: Workspace, asset: str, numbers: Iterable[int] = ()) -> StageResult:
    """Whether a partition is unchanged, and what it would be made from now; does no work.

    Raises
    ------
    UpstreamError, OSError
        if something that it needs is not there.
    """
    asking = dataclasses.replace(ws, probe=True)
    if asset == "ensemble_member":
        fold, member = numbers
        result = training.ensemble_members(asking, {"": (fold, member)})[""]
        if isinstance(result, Exception):
            raise result
        return result
    return STAGES[asset](asking, *numbers)


def is_current(ws: Workspace, asset: str, numbers: Iterable[int] = ()) -> bool:
    """Whether a partition was made, without failures, from what its inputs are now. ``numbers``: year, fold, member."""
    try:
        return probe(ws, asset, numbers).unchanged
    except (UpstreamError, OSError):
        return False
