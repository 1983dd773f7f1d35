"""build_defs() and defs: the only place where everything meets.

Belongs here: joining assets, checks, jobs, schedules and resources of one region into Dagster Definitions.
Does not belong here: any of them. A test or a notebook calls :func:`build_defs` with other resources instead of
patching.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import dagster as dg

# Only Dagster's own notices about parts of its API in beta, and only by category: mappings across dimensions and
# backfill policies are such parts.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from dl4gam_assets.assets import (  # noqa: E402
    areas,
    change,
    cubes,
    imagery,
    inventory,
    predictions,
    publication,
    terrain,
    training,
)
from dl4gam_assets.automation import build_jobs, build_schedules, build_sensors, with_conditions  # noqa: E402
from dl4gam_assets.checks import CHECKS, build_checks  # noqa: E402
from dl4gam_assets.gate import WAITS_FOR, waits_for  # noqa: E402
from dl4gam_assets.partitions import Partitions  # noqa: E402
from dl4gam_assets.resources import default_webhook, default_workspace, region_name  # noqa: E402
from dl4gam_assets.settings import Region, load_region  # noqa: E402

_GROUPS = (inventory, imagery, terrain, cubes, training, predictions, areas, change, publication)


def build_assets(region: Region) -> list[dg.AssetsDefinition]:
    """All assets of a region, in the order of the science."""
    partitions = Partitions(region)
    return with_conditions([_tagged(_waiting(asset)) for group in _GROUPS for asset in group.build(partitions)])


def _waiting(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """With the blocking checks of what it is made from, which it waits for (``gate``)."""
    blocking: dict[str, list[str]] = {}
    for check in CHECKS:
        if check.blocking:
            blocking.setdefault(check.asset, []).append(check.name)
    return asset.map_asset_specs(lambda spec: spec.merge_attributes(metadata={WAITS_FOR: waits_for(spec, blocking)}))


def _tagged(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """Tags to search by in the UI: ``needs`` (network, gpu, memory or cpu) and ``made_per`` (region, year ...)."""
    parts = asset.partitions_def
    match parts:
        case None:
            per = "region"
        case dg.MultiPartitionsDefinition():
            per = "_x_".join(sorted(parts.partition_dimension_names, key=("year", "fold", "member").index))
        case dg.TimeWindowPartitionsDefinition():
            per = "year"
        case _:
            per = "fold"
    tags = {"needs": asset.op.pool or "cpu", "made_per": per}
    return asset.map_asset_specs(lambda spec: spec.merge_attributes(tags=tags))


def _executor(region: Region) -> dg.ExecutorDefinition:
    """Where the steps of a run are done: in a pod each (DL4GAM_EXECUTOR=k8s), or in processes of this machine."""
    if os.environ.get("DL4GAM_EXECUTOR") == "k8s":
        from dagster_k8s import k8s_job_executor

        executor: dg.ExecutorDefinition = k8s_job_executor
        return executor
    # Small regions would spend their time on starting a process for each step.
    return dg.in_process_executor if region.compute.partitions_per_run > 1 else dg.multiprocess_executor


def build_defs(
    region: Region | str | None = None, resource_overrides: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """Definitions of a region.

    Parameters
    ----------
    region
        settings, a packaged name or a path; the environment's (DL4GAM_REGION) when None.
    resource_overrides
        resources that replace the default ones by name (``workspace``, ``webhook``).

    Raises
    ------
    SettingsError
        if the region can not be read.
    """
    settings = region if isinstance(region, Region) else load_region(region or region_name())
    partitions = Partitions(settings)
    assets = build_assets(settings)
    jobs = build_jobs(partitions)
    return dg.Definitions(
        assets=assets,
        asset_checks=build_checks(settings, assets),
        jobs=jobs,
        schedules=build_schedules(partitions),
        sensors=build_sensors(partitions, jobs),
        resources={"workspace": default_workspace(), "webhook": default_webhook(), **(resource_overrides or {})},
        executor=_executor(settings),
        metadata={"region": settings.name, "region_title": settings.title},
    )


defs = build_defs()
