"""Upkeep of a store that runs for years: old runs, leftovers of killed runs.

Belongs here: the monthly job that keeps the Dagster instance small without losing anything current.
Does not belong here: results. No table, map or model is ever removed here.

Dagster has no retention of its own for runs and events. Removing a run removes its events, the newest materialization
of a partition among them, so only runs that hold no partition's newest one go.
"""

import datetime as dt

import dagster as dg
from pydantic import Field

from dl4gam_assets.resources import WorkspaceResource

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def superseded_runs(instance: dg.DagsterInstance, older_than: dt.datetime) -> list[str]:
    """Ids of finished runs created before ``older_than`` that hold no asset partition's newest materialization."""
    filters = dg.RunsFilter(statuses=_FINISHED, created_before=older_than)
    return [
        record.dagster_run.run_id
        for record in instance.get_run_records(filters)
        if not _holds_newest(instance, record.dagster_run.run_id)
    ]


def _holds_newest(instance: dg.DagsterInstance, run_id: str) -> bool:
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    for event in events:
        made = event.asset_materialization
        if made is None:
            continue
        partitions = None if made.partition is None else [made.partition]
        newest = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=made.asset_key, asset_partitions=partitions), limit=1
        ).records
        if newest and newest[0].run_id == run_id:
            return True
    return False


class UpkeepConfig(dg.Config):
    """What the upkeep keeps."""

    keep_days: int = Field(365, ge=1, description="Runs younger than this many days stay, whatever they hold.")
    dry_run: bool = Field(False, description="Only say what would be removed.")


@dg.op
def remove_old_runs(context: dg.OpExecutionContext, config: UpkeepConfig, workspace: WorkspaceResource) -> None:
    """Remove superseded runs with their logs, and temporary files of killed runs."""
    before = dt.datetime.now(dt.UTC) - dt.timedelta(days=config.keep_days)
    old = superseded_runs(context.instance, before)
    context.log.info(f"{len(old)} runs older than {config.keep_days} days hold nothing current")
    if config.dry_run:
        return
    for run_id in old:
        context.instance.delete_run(run_id)
    removed = workspace.region.storage().remove_stale()
    context.log.info(f"removed {len(old)} runs and {removed} temporary files")


@dg.job(description="Remove old runs that hold nothing current, and leftovers of killed ones. No result is touched.")
def tidy_up() -> None:
    remove_old_runs()
