"""Jobs, the November schedule, automation conditions and sensors.

Belongs here: when things run. Does not belong here: what they do.

A year travels through the graph like this: the schedule *november* starts the job *add_a_year* (search, choose, build
cubes); the sensor *carry_changes_downstream* evaluates the conditions below and requests maps, areas, change and
publication of that year, partition by partition. Dagster keeps a job to one family of partitions, so there is a job for
each, and the conditions join them.

Everything is off until it is turned on: in the UI (Automation), or for a deployment by ``DL4GAM_AUTOMATION=on``.
"""

import datetime as dt
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from dl4gam_assets.partitions import Partitions
from dl4gam_assets.resources import WebhookResource, WorkspaceResource
from dl4gam_assets.stages.base import Workspace, fold_label, member_label
from dl4gam_assets.upkeep import give_up_lost_runs

#: The season's scenes are complete: the window ends in October.
NOVEMBER = "0 6 15 11 *"

#: The first day of a month, for upkeep.
MONTHLY = "0 4 1 * *"


@dataclass(frozen=True)
class Job:
    """A job of the UI: one family of partitions, and words for people who look for it."""

    description: str
    assets: tuple[str, ...]


JOBS: dict[str, Job] = {
    "prepare_region": Job(
        "Read the inventory: outlines, debris, zones, folds and elevation. Once, and after a new inventory.",
        ("inventory_outlines", "debris_outlines", "glacier_zones", "cross_validation_folds", "elevation"),
    ),
    "add_a_year": Job(
        "Search, choose and read a year's images into glacier cubes. With automation on, maps, areas, change and "
        "publication of the year follow by themselves; without it run map_glaciers, measure_change, "
        "rebuild_results and write_year_report.",
        ("scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes"),
    ),
    "choose_images": Job(
        "Choose a year's images again, after new override lines or other thresholds. Searches nothing.",
        ("selected_scenes",),
    ),
    "retrain_ensembles": Job(
        "Begin a new training: statistics and baselines of each fold. With automation on, members, calibration and all "
        "that depends on them follow; without it run train_members and calibrate_ensembles.",
        ("normalization", "band_ratio_baseline"),
    ),
    "train_members": Job("Train ensemble members. What is trained already is left alone.", ("ensemble_member",)),
    "calibrate_ensembles": Job("Collect and calibrate the members of a fold.", ("ensemble", "calibration")),
    "map_glaciers": Job("Map the glaciers of a year, fold by fold.", ("glacier_predictions", "glacier_areas")),
    "judge_maps": Job(
        "Held-out quality of the baseline year's maps, and the thresholds of all intervals.",
        ("interval_taus", "evaluation"),
    ),
    "measure_change": Job(
        "Outlines and change of a year, by glacier and region.",
        ("glacier_outlines", "area_change", "regional_change"),
    ),
    "rebuild_results": Job(
        "Trends over all years, and results.duckdb from the tables.",
        ("area_trends", "results_database"),
    ),
    "write_year_report": Job("Report and STAC catalog of a year.", ("report", "stac_catalog")),
}


#: Checks that a month may fail without any run: a November that failed makes no results that could be looked at.
LOOKS = (("results_database", "newest_year"), ("results_database", "matches_inputs"))


# --------------------------------------------------------------------------------------------- conditions
def _held_back() -> dg.AutomationCondition[Any]:
    """True where something upstream must not be built on: a blocking check failed, crashed, or is still running.

    By partition, since checks are partitioned like their assets. Dagster's all_deps_blocking_checks_passed() would
    also wait for checks that were never run.
    """
    condition = dg.AutomationCondition
    bad = condition.check_failed() | condition.execution_failed() | condition.in_progress()
    return condition.any_deps_match(condition.any_checks_match(bad, blocking_only=True)).with_label("held back")


def _ready() -> dg.AutomationCondition[Any]:
    """Nothing upstream is being made or about to be, and nothing holds it back."""
    condition = dg.AutomationCondition
    coming = condition.any_deps_in_progress() | condition.any_deps_match(condition.will_be_requested())
    return ~coming & ~condition.in_progress() & ~_held_back()


def _changed() -> Any:
    """True where the result of something upstream is another one than before, by its data version.

    Dagster's any_deps_updated() would follow each materialization, and ask at once for all that comes after it: one
    more inventory that changes nothing would make everything again.
    """
    condition = dg.AutomationCondition
    new = condition.newly_updated() & condition.data_version_changed() & ~condition.executed_with_root_target()
    return condition.any_deps_match(new.with_label("changed")).with_label("something upstream changed")


def follow() -> dg.AutomationCondition[Any]:
    """Made when something upstream changed, in every year (Dagster's eager() looks at the newest only)."""
    condition = dg.AutomationCondition
    new = (condition.newly_missing() | _changed()).since_last_handled()
    return (new & ~condition.any_deps_missing() & _ready()).with_label("follows what is upstream")


def renew() -> dg.AutomationCondition[Any]:
    """Made again when something upstream changed, but never begun: a year begins by the schedule or by hand."""
    condition = dg.AutomationCondition
    new = _changed().since_last_handled()
    wanted = new & ~condition.missing() & ~condition.any_deps_missing() & _ready()
    return wanted.with_label("renewed where it exists")


def gather() -> dg.AutomationCondition[Any]:
    """Made from whatever years are there: the year that has not been added yet keeps nothing waiting."""
    return (_changed().since_last_handled() & _ready()).with_label("gathers what is there")


def publish() -> dg.AutomationCondition[Any]:
    """Like :func:`gather`, after what comes from the areas; these themselves only hold it back."""
    new = _changed().ignore(dg.AssetSelection.assets("glacier_areas")).since_last_handled()
    return (new & _ready()).with_label("gathers what is there")


def retrain() -> dg.AutomationCondition[Any]:
    """Members follow their statistics, which only people renew: no new image or outline starts a training."""
    condition = dg.AutomationCondition
    new = _changed().allow(dg.AssetSelection.assets("normalization")).since_last_handled()
    return (new & ~condition.any_deps_missing() & _ready()).with_label("follows a requested training")


def follow_areas() -> dg.AutomationCondition[Any]:
    """Outlines follow the areas of the same maps, so that a check that holds these back holds the outlines back."""
    condition = dg.AutomationCondition
    changed = _changed().allow(dg.AssetSelection.assets("glacier_areas"))
    new = (condition.newly_missing() | changed).since_last_handled()
    return (new & ~condition.any_deps_missing() & _ready()).with_label("follows the areas")


#: How each asset gets to know what is new. Those that are not named start by hand, by schedule or by sensor.
CONDITIONS: dict[str, Callable[[], dg.AutomationCondition[Any]]] = {
    **dict.fromkeys(("scene_candidates", "elevation_change"), renew),
    "area_trends": gather,
    "results_database": publish,
    "ensemble_member": retrain,
    "glacier_outlines": follow_areas,
    **dict.fromkeys(
        (
            "debris_outlines", "glacier_zones", "cross_validation_folds", "elevation",
            "selected_scenes", "glacier_cubes", "ensemble", "calibration", "glacier_predictions", "evaluation",
            "interval_taus", "glacier_areas", "baseline_areas", "area_change", "regional_change",
            "report", "stac_catalog",
        ),
        follow,
    ),
}  # fmt: skip


def with_conditions(assets: list[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
    """Give each asset its condition."""
    return [
        asset.map_asset_specs(
            lambda spec: (
                spec.replace_attributes(automation_condition=CONDITIONS[spec.key.to_user_string()]())
                if spec.key.to_user_string() in CONDITIONS
                else spec
            )
        )
        for asset in assets
    ]


def automation_on() -> bool:
    """Whether schedule and sensors start turned on: DL4GAM_AUTOMATION is ``on``. The UI's switches win."""
    return os.environ.get("DL4GAM_AUTOMATION", "off").strip().lower() in {"on", "1", "true", "yes"}


# --------------------------------------------------------------------------------------------- jobs and schedules
def build_jobs(partitions: Partitions) -> list[Any]:
    from dl4gam_assets.upkeep import tidy_up

    selections = {name: job.assets for name, job in JOBS.items()}
    if partitions.region.simulation is not None:
        selections["prepare_region"] = ("simulated_inputs", *selections["prepare_region"])
    return [
        *(
            dg.define_asset_job(name, selection=dg.AssetSelection.assets(*assets), description=JOBS[name].description)
            for name, assets in selections.items()
        ),
        dg.define_asset_job(
            "look_at_results",
            selection=dg.AssetSelection.checks(*(dg.AssetCheckKey(dg.AssetKey(a), name) for a, name in LOOKS)),
            description="Is the newest season in the results, does every estimate match its inputs? Makes nothing.",
        ),
        tidy_up,
    ]


def build_schedules(partitions: Partitions) -> list[dg.ScheduleDefinition]:
    """The November schedule, which adds the year whose season just ended; each month a look at results, and upkeep."""
    running = dg.DefaultScheduleStatus.RUNNING if automation_on() else dg.DefaultScheduleStatus.STOPPED

    @dg.schedule(
        job_name="add_a_year",
        cron_schedule=NOVEMBER,
        execution_timezone="UTC",
        default_status=running,
        description="Each 15 November: add the year whose season has just ended, once the region is prepared and "
        "trained. Turn on carry_changes_downstream too: it takes the year on to areas, change and report.",
    )
    def november(context: dg.ScheduleEvaluationContext, workspace: WorkspaceResource) -> dg.RunRequest | dg.SkipReason:
        request = year_request(partitions, context.scheduled_execution_time)
        if isinstance(request, dg.RunRequest) and (missing := not_ready(workspace.plain())):
            return dg.SkipReason(missing)
        return request

    look = dg.ScheduleDefinition(
        name="monthly_look",
        job_name="look_at_results",
        cron_schedule=MONTHLY,
        execution_timezone="UTC",
        default_status=running,
        description="Each month: is the newest season in the results, and does every estimate match its inputs?",
    )
    upkeep = dg.ScheduleDefinition(
        name="monthly_upkeep",
        job_name="tidy_up",
        cron_schedule=MONTHLY,
        execution_timezone="UTC",
        default_status=running,
        description="Each month: remove old runs that hold nothing current, and what killed runs left behind.",
    )
    return [november, look, upkeep]


def year_request(partitions: Partitions, moment: dt.datetime) -> dg.RunRequest | dg.SkipReason:
    """The run that adds the year of ``moment``; its run key makes a repeated tick harmless."""
    year = str(moment.year)
    if year not in partitions.year_keys(moment.date()):
        return dg.SkipReason(
            f"{year} is not a year of region {partitions.region.name!r} "
            f"({partitions.region.years.first} to {partitions.region.years.last or 'now'})"
        )
    return dg.RunRequest(run_key=f"{partitions.region.name}-{year}", partition_key=year)


def not_ready(ws: Workspace) -> str | None:
    """Why no year can be added to a store yet: a new one is begun by people, and a year needs what they made first."""
    prepared = ("inventory_outlines", "glacier_zones", "cross_validation_folds", "elevation")
    if missing := [name for name in prepared if ws.upstream_or_none(name) is None]:
        return f"the store has no {', '.join(missing)} yet: run the job prepare_region, or `dl4gam materialize`, first"
    folds = [fold_label(number) for number in range(1, ws.region.folds.n + 1)]
    if missing := [fold for fold in folds if ws.upstream_or_none("calibration", fold) is None]:
        return (
            f"{', '.join(missing)} of the region {ws.region.name!r} are not trained and calibrated yet, so a year "
            f"could not be mapped: run add_a_year for the baseline {ws.region.years.baseline} and retrain_ensembles, "
            "or `dl4gam materialize`, first"
        )
    return None


# --------------------------------------------------------------------------------------------- sensors
@dataclass
class Notice:
    """What the sensor remembers: the last signature of each input, how often it has changed, and since when it looks.

    ``begun`` is a part of each run key: a sensor whose cursor was taken away may ask again for what failed.
    """

    known: dict[str, dict[str, str]] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    begun: str = field(default_factory=lambda: secrets.token_hex(4))

    @classmethod
    def read(cls, cursor: str | None) -> "Notice | None":
        if not cursor:
            return None
        try:
            raw = json.loads(cursor)
            return cls(dict(raw["known"]), dict(raw["changes"]), str(raw["begun"]))
        except (ValueError, KeyError, TypeError):
            return None  # of another version: look at everything afresh

    def write(self) -> str:
        return json.dumps({"known": self.known, "changes": self.changes, "begun": self.begun}, sort_keys=True)


def new_inputs(
    ws: Workspace,
    cursor: str | None,
    years: list[str],
    say: Callable[[str], None] = lambda text: None,
    carried: Callable[[str], bool] = lambda fold: False,
) -> tuple[list[dg.RunRequest], str]:
    """Runs for what changed outside since ``cursor``, each for just what is made from it directly, and the new cursor.

    Only what is out of date is asked for; without a cursor, all of that. A run key holds the input's signature and how
    often it changed, so a repeated tick asks for nothing twice, and an input that is changed back is noticed. An input
    that is gone asks for nothing, but for override lines: without them another image may be chosen. ``carried`` says
    of a fold that its members were trained by runs of this Dagster, whose conditions carry them on.
    """
    from dl4gam_assets.stages.watch import look_outside, out_of_date

    before = Notice.read(cursor)
    outside = look_outside(ws)
    for problem in outside.problems:
        say(problem)
    now = Notice({}, dict(before.changes), before.begun) if before else Notice()
    requests: list[dg.RunRequest] = []
    for kind, signatures in outside.signatures.items():
        known = before.known.get(kind, {}) if before else {}
        failed = any(problem.startswith(f"{kind}:") for problem in outside.problems)
        now.known[kind] = dict(known) if failed else dict(signatures)
        if failed:
            continue
        for key in sorted(known.keys() | signatures.keys() if kind == "overrides" else signatures.keys()):
            if before is not None and known.get(key) == signatures.get(key):
                continue
            if not _can_be_made(ws, kind, key, years) or not out_of_date(ws, kind, key):
                continue
            if kind == "members" and carried(key):
                continue
            name = f"{kind}-{key}"
            now.changes[name] = now.changes.get(name, 0) + 1
            words = (ws.region.name, name, signatures.get(key, "removed"), now.begun, now.changes[name])
            requests.append(_request_for(kind, key, "-".join(map(str, words))))
    if any(request.job_name == "prepare_region" and request.asset_selection is None for request in requests):
        # The whole preparation includes the debris.
        requests = [r for r in requests if not (r.job_name == "prepare_region" and r.asset_selection)]
    return requests, now.write()


def trained_here(instance: dg.DagsterInstance, ws: Workspace, fold: str) -> bool:
    """Whether this Dagster recorded the very members that a fold now has, so that its conditions carry them on."""
    for number in range(1, ws.region.training.members + 1):
        key = str(dg.MultiPartitionKey({"fold": fold, "member": member_label(number)}))
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey("ensemble_member"), asset_partitions=[key]), limit=1
        ).records
        made = records[0].asset_materialization if records else None
        version = (made.tags or {}).get(DATA_VERSION_TAG) if made else None
        if version is None or version != ws.upstream_or_none("ensemble_member", f"{fold}.{member_label(number)}"):
            return False
    return True


def _can_be_made(ws: Workspace, kind: str, key: str, years: list[str]) -> bool:
    """Whether there is something that the input could renew: lines of a year that was never searched wait for it."""
    from dl4gam_assets.stages.watch import has_candidates

    if kind == "overrides":
        return key in years and has_candidates(ws, key)
    if kind == "debris":
        return ws.upstream_or_none("inventory_outlines") is not None
    return True


def _request_for(kind: str, key: str, run_key: str) -> dg.RunRequest:
    match kind:
        case "inventory":
            return dg.RunRequest(run_key=run_key, job_name="prepare_region")
        case "debris":
            return dg.RunRequest(
                run_key=run_key, job_name="prepare_region", asset_selection=[dg.AssetKey("debris_outlines")]
            )
        case "overrides":
            return dg.RunRequest(run_key=run_key, job_name="choose_images", partition_key=key)
        case _:
            return dg.RunRequest(run_key=run_key, job_name="calibrate_ensembles", partition_key=key)


def build_sensors(partitions: Partitions, jobs: list[Any]) -> list[dg.SensorDefinition]:
    """The sensors: conditions, inputs from outside, failures. Off until they are turned on."""
    running = dg.DefaultSensorStatus.RUNNING if automation_on() else dg.DefaultSensorStatus.STOPPED
    wanted = {"prepare_region", "choose_images", "calibrate_ensembles"}

    @dg.sensor(
        name="notice_new_inputs",
        jobs=[job for job in jobs if job.name in wanted],
        minimum_interval_seconds=300,
        default_status=running,
        description="Notices a new inventory or debris file, new override lines and newly trained members, and asks "
        "for just what is made from them; the rest follows by carry_changes_downstream.",
    )
    def notice_new_inputs(
        context: dg.SensorEvaluationContext, workspace: WorkspaceResource
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        ws = workspace.plain()
        requests, cursor = new_inputs(
            ws, context.cursor, partitions.year_keys(), context.log.warning,
            lambda fold: trained_here(context.instance, ws, fold),
        )  # fmt: skip
        yield from requests
        if not requests:
            yield dg.SkipReason("inventory, debris, override lines and trained members are as they were")
        context.update_cursor(cursor)

    @dg.run_failure_sensor(
        name="report_failures",
        default_status=running,
        minimum_interval_seconds=30,
        description="Reports each failed run in the daemon's log, and to the webhook of DL4GAM_WEBHOOK_URL if set.",
    )
    def report_failures(context: dg.RunFailureSensorContext, webhook: WebhookResource) -> None:
        report_failure(context, webhook)

    @dg.sensor(
        name="report_checks",
        default_status=running,
        minimum_interval_seconds=60,
        description="Reports each failed check, warnings too, in the daemon's log, and to the webhook of "
        "DL4GAM_WEBHOOK_URL if set.",
    )
    def report_checks(context: dg.SensorEvaluationContext, webhook: WebhookResource) -> dg.SkipReason:
        found, cursor = failed_checks(context.instance, context.cursor)
        context.update_cursor(cursor)
        if found:
            _tell(found, context, webhook)
        return dg.SkipReason(f"{len(found)} checks failed since the last look" if found else "no check failed")

    @dg.sensor(
        name="find_lost_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=60,
        description="Finds runs whose process is gone (killed, out of memory, reboot), which would stay 'started' for "
        "ever, and records them as failed; Dagster then starts them again where they were. Always on.",
    )
    def find_lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        given_up = give_up_lost_runs(context.instance)
        for run_id in given_up:
            context.log.warning(f"run {run_id} lost its process")
        return dg.SkipReason(f"{len(given_up)} runs had lost their process" if given_up else "no run is lost")

    return [
        dg.AutomationConditionSensorDefinition(
            "carry_changes_downstream",
            target=dg.AssetSelection.all(),
            default_status=running,
            minimum_interval_seconds=30,
            # Several partitions at once become one backfill, which keeps to the assets' order and backfill policies.
            emit_backfills=True,
            description="Makes what depends on something new: maps, areas, change, database, report. Holds back the "
            "partitions that a blocking check failed.",
        ),
        notice_new_inputs,
        report_failures,
        report_checks,
        find_lost_runs,
    ]


def failed_checks(instance: dg.DagsterInstance, cursor: str | None) -> tuple[list[str], str]:
    """A line for each check that failed since ``cursor`` (an event's number; None: from now on), and the new cursor."""
    storage = instance.event_log_storage
    if not cursor:
        return [], str(storage.get_maximum_record_id() or 0)
    filters = dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION, after_cursor=int(cursor))
    lines, last = [], int(cursor)
    for record in storage.get_event_records(filters, limit=500, ascending=True):
        last = max(last, record.storage_id)
        event = record.event_log_entry.dagster_event
        found = event.asset_check_evaluation_data if event else None
        if found is None or found.passed or "failed_partitions" in found.metadata:  # the summary of a range
            continue
        place = found.asset_key.to_user_string() + (f" [{found.partition}]" if found.partition else "")
        what = found.metadata.get("what_to_do")
        kind = "holds back what comes after it" if found.blocking else "warning"
        lines.append(f"{found.check_name} of {place} ({kind}): {what.value if what else 'failed'}")
    return lines, str(last)


def _tell(lines: list[str], context: dg.SensorEvaluationContext, webhook: WebhookResource) -> None:
    """Log failed checks, and send them to the webhook if there is one."""
    from dl4gam_assets.notify import NotifyError, checks_text

    text = checks_text(lines)
    context.log.warning(text)
    try:
        webhook.send(text)
    except NotifyError as error:
        context.log.error(str(error))


def report_failure(context: dg.RunFailureSensorContext, webhook: WebhookResource) -> None:
    """Log a failed run, and send it to the webhook if there is one. A webhook that is down is logged too, no more."""
    from dl4gam_assets.notify import Failure, NotifyError

    run = context.dagster_run
    errors = [_step_error(event) for event in context.get_step_failure_events()]
    failure = Failure(
        job=_what_ran(run),
        run_id=run.run_id,
        partitions=_partitions_of(run.tags),
        errors=errors or [context.failure_event.message or "the run ended before its first step"],
        link=webhook.link(run.run_id),
    )
    context.log.error(failure.text())
    try:
        webhook.send(failure.text())
    except NotifyError as error:
        context.log.error(str(error))


def _what_ran(run: dg.DagsterRun) -> str:
    if run.asset_selection:
        return ", ".join(sorted(key.to_user_string() for key in run.asset_selection))
    return run.job_name


def _partitions_of(tags: Mapping[str, str]) -> str:
    if "dagster/partition" in tags:
        return tags["dagster/partition"]
    first, last = tags.get("dagster/asset_partition_range_start"), tags.get("dagster/asset_partition_range_end")
    return f"{first} to {last}" if first and last else ""


def _step_error(event: dg.DagsterEvent) -> str:
    data = event.step_failure_data
    told = data.user_failure_data.description if data.user_failure_data else None
    cause = data.error
    while told is None and cause is not None and cause.cause is not None:
        cause = cause.cause
    return f"{event.step_key}: {(told or (cause.message if cause else 'failed')).strip()}"
