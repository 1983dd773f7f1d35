"""The November schedule and the conditions that carry a new year downstream."""

from __future__ import annotations

import datetime as dt

import dagster as dg
import pytest

from dl4gam_assets.automation import JOBS, year_request
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.partitions import Partitions
from dl4gam_assets.settings import load_region


def _november(year: int) -> dt.datetime:
    return dt.datetime(year, 11, 15, 6, tzinfo=dt.UTC)


def test_five_novembers_ask_for_their_own_year_once() -> None:
    defs = build_defs("alps")
    schedule = defs.resolve_schedule_def("november")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    requests = []
    for year in range(2026, 2031):
        with dg.build_schedule_context(
            scheduled_execution_time=_november(year), repository_def=defs.get_repository_def()
        ) as context:
            data = schedule.evaluate_tick(context)
        requests += list(data.run_requests or [])
    assert [r.partition_key for r in requests] == ["2026", "2027", "2028", "2029", "2030"]
    assert len({r.run_key for r in requests}) == 5
    again = year_request(Partitions(load_region("alps")), _november(2026))
    assert isinstance(again, dg.RunRequest) and again.run_key == requests[0].run_key


def test_a_year_outside_the_region_is_skipped_with_the_reason() -> None:
    skipped = year_request(Partitions(load_region("demo")), _november(2026))
    assert isinstance(skipped, dg.SkipReason) and "2015 to 2024" in str(skipped.skip_message)


@pytest.mark.parametrize("job", sorted(JOBS))
def test_jobs_keep_to_one_family_of_partitions(job: str) -> None:
    definition = build_defs("demo").resolve_job_def(job)
    assert definition.description


def test_new_cubes_carry_on_to_predictions_of_their_year_only() -> None:
    defs = build_defs("demo")
    instance = dg.DagsterInstance.ephemeral()
    graph = defs.resolve_asset_graph()
    p = Partitions(load_region("demo"))

    def report(asset: str, partition: str | None) -> None:
        instance.report_runless_asset_event(dg.AssetMaterialization(dg.AssetKey(asset), partition=partition))

    for key in graph.get_all_asset_keys():
        definition = graph.get(key).partitions_def
        for partition in definition.get_partition_keys() if definition else [None]:
            if partition is None or "2024" not in str(partition):
                report(key.to_user_string(), partition)
    first = dg.evaluate_automation_conditions(defs, instance)
    report("scene_candidates", "2024")
    second = dg.evaluate_automation_conditions(defs, instance, cursor=first.cursor)
    assert second.get_requested_partitions(dg.AssetKey("selected_scenes")) == {"2024"}
    for asset in ("selected_scenes", "elevation_change", "glacier_cubes"):
        report(asset, "2024")
    third = dg.evaluate_automation_conditions(defs, instance, cursor=second.cursor)
    wanted = {str(k) for k in third.get_requested_partitions(dg.AssetKey("glacier_predictions"))}
    assert wanted == {f"fold_{f}|2024" for f in range(1, 6)}
    assert third.get_num_requested(dg.AssetKey("ensemble_member")) == 0
    assert len(p.year_keys()) == 10
