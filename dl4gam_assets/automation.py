"""Jobs, the November schedule, automation conditions and sensors.

Belongs here: when things run. Does not belong here: what they do.
One job for each family of partitions, since Dagster does not mix families in a job; changes travel between families by
automation conditions, once the automation sensor is turned on.
"""

import datetime as dt
from typing import Any

import dagster as dg

from dl4gam_assets.partitions import Partitions

#: The season's scenes are complete: the window ends in October.
NOVEMBER = "0 6 15 11 *"

#: Assets that a change upstream should carry on to by itself. Candidates, training and simulation start on request.
_CARRIED = frozenset(
    {
        "selected_scenes", "elevation_change", "glacier_cubes", "glacier_predictions", "interval_taus", "glacier_areas",
        "glacier_outlines", "baseline_areas", "area_change", "regional_change", "area_trends", "results_database",
        "report", "stac_catalog", "evaluation", "ensemble", "calibration",
    }
)  # fmt: skip

#: name -> (description, selection)
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prepare_region": (
        "Read the inventory: outlines, debris, zones, folds and elevation. Once, and after a new inventory.",
        ("inventory_outlines", "debris_outlines", "glacier_zones", "cross_validation_folds", "elevation"),
    ),
    "add_a_year": (
        "Search, choose and read a year's images into glacier cubes. Maps, areas and change follow by automation.",
        ("scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes"),
    ),
    "train_members": ("Train ensemble members.", ("ensemble_member",)),
    "calibrate_ensembles": (
        "Normalize, collect and calibrate the members of a fold, and fit its baseline.",
        ("normalization", "band_ratio_baseline", "ensemble", "calibration"),
    ),
    "predict": ("Map the glaciers of a year and fold.", ("glacier_predictions", "glacier_areas")),
    "compare_with_baseline": (
        "Outlines and change of a year, by glacier and region.",
        ("glacier_outlines", "area_change", "regional_change"),
    ),
    "rebuild_results": (
        "Trends over all years, and results.duckdb from the tables.",
        ("area_trends", "results_database"),
    ),
    "write_year_report": ("Report and STAC catalog of a year.", ("report", "stac_catalog")),
}


def with_conditions(assets: list[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
    """Let changes travel downstream, but hold back what depends on a failed blocking check.

    Dagster's all_deps_blocking_checks_passed() would also wait for checks that were never run.
    """
    failed = dg.AutomationCondition.any_checks_match(dg.AutomationCondition.check_failed(), blocking_only=True)
    condition = dg.AutomationCondition.eager() & ~dg.AutomationCondition.any_deps_match(failed)
    return [
        asset.map_asset_specs(
            lambda spec: (
                spec.replace_attributes(automation_condition=condition)
                if spec.key.to_user_string() in _CARRIED
                else spec
            )
        )
        for asset in assets
    ]


def build_jobs(partitions: Partitions) -> list[Any]:
    names = {name: selection for name, (_, selection) in JOBS.items()}
    if partitions.region.simulation is not None:
        names["prepare_region"] = ("simulated_inputs", *names["prepare_region"])
    return [
        dg.define_asset_job(name, selection=dg.AssetSelection.assets(*selection), description=JOBS[name][0])
        for name, selection in names.items()
    ]


def build_schedules(partitions: Partitions) -> list[dg.ScheduleDefinition]:
    """The November schedule: adds the year whose season just ended. Off until it is turned on in the UI."""

    @dg.schedule(
        job_name="add_a_year",
        cron_schedule=NOVEMBER,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Each 15 November: add the year whose season has just ended.",
    )
    def november(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return year_request(partitions, context.scheduled_execution_time)

    return [november]


def year_request(partitions: Partitions, moment: dt.datetime) -> dg.RunRequest | dg.SkipReason:
    """The run that adds the year of ``moment``; its run key makes a repeated tick harmless."""
    year = str(moment.year)
    if year not in partitions.year_keys(moment.date()):
        return dg.SkipReason(
            f"{year} is not a year of region {partitions.region.name!r} "
            f"({partitions.region.years.first} to {partitions.region.years.last or 'now'})"
        )
    return dg.RunRequest(run_key=f"{partitions.region.name}-{year}", partition_key=year)


def build_sensors() -> list[dg.SensorDefinition]:
    """The sensor that evaluates the conditions. Off until it is turned on."""
    return [
        dg.AutomationConditionSensorDefinition(
            "carry_changes_downstream",
            target=dg.AssetSelection.all(),
            default_status=dg.DefaultSensorStatus.STOPPED,
            description="Materializes what depends on something new: maps, areas, change, database, report.",
        )
    ]
