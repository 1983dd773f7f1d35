"""What a failed blocking check holds back: what is made from its partition, in this run and in later ones."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from dl4gam_assets import orchestrate
from dl4gam_assets.assets.common import each_partition
from dl4gam_assets.checks import CHECKS, Check, Part, _definition, _newest, what_to_do
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.gate import DESPITE_TAG, WAITS_FOR, Gate
from dl4gam_assets.resources import ComputeResource, DeviceResource, RegionResource, WorkspaceResource
from dl4gam_assets.settings import Region
from dl4gam_assets.stages.base import StageResult, Workspace, run_stage
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.small_region import Small

YEARS = dg.TimeWindowPartitionsDefinition(cron_schedule="0 0 1 1 *", start="2015", end="2019", fmt="%Y")
KEYS = ["2015", "2016", "2017", "2018"]
TO_DO = what_to_do("glacier_cubes", "selected_image")
CHAIN = ("first", "second", "third")


def _asset(name: str, upstream: str | None) -> dg.AssetsDefinition:
    """An asset whose content is in a file of the store (``content.json``), or that of what it is made from."""

    @dg.asset(
        name=name, partitions_def=YEARS, deps=[upstream] if upstream else [],
        backfill_policy=dg.BackfillPolicy.multi_run(100),
        metadata={WAITS_FOR: {upstream: ["is_right"]}} if upstream == "first" else {},
    )  # fmt: skip
    def made(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        def stage(ws: Workspace, key: str) -> StageResult:
            content = ws.storage.read_json(ws.storage.path("content.json"))[key]
            inputs = {"content": content} if upstream is None else {upstream: ws.upstream(upstream, key)}
            return run_stage(ws, name, key, inputs, lambda: (str(content), {"content": content}, {}))

        each_partition(context, workspace.open(context), stage)

    return made


class Graph:
    """Three assets in a chain of four years, with a blocking check of the first, on a real instance."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.instance, self.storage = instance, Storage(folder / "demo")
        self.write(dict.fromkeys(KEYS, 1))

        def wrong(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
            content = storage.read_json(storage.path("content.json"))[str(part.year)]
            return pd.DataFrame({"content": [content]} if content < 0 else {})

        check = Check("first", "is_right", "Content is positive.", wrong, "write another content", blocking=True)
        workspace = WorkspaceResource(
            region=RegionResource(region="demo", home=str(folder)), compute=ComputeResource(workers=1),
            device=DeviceResource(device="cpu"),
        )  # fmt: skip
        self.defs = dg.Definitions(
            [_asset("first", None), _asset("second", "first"), _asset("third", "second")],
            asset_checks=[_definition("first", [check], YEARS)],
            resources={"workspace": workspace},
            executor=dg.in_process_executor,
        )
        self.graph = self.defs.resolve_asset_graph()

    def write(self, content: dict[str, int]) -> None:
        self.storage.path("content.json").parent.mkdir(parents=True, exist_ok=True)
        self.storage.write_text(self.storage.path("content.json"), json.dumps(content))

    def run(self, *names: str, first: str = "2015", last: str = "2018", **tags: str) -> dg.ExecuteInProcessResult:
        job = self.defs.resolve_implicit_global_asset_job_def().get_subset(
            asset_selection={dg.AssetKey(name) for name in names or CHAIN}
        )
        span = {orchestrate.ASSET_PARTITION_RANGE_START_TAG: first, orchestrate.ASSET_PARTITION_RANGE_END_TAG: last}
        return job.execute_in_process(instance=self.instance, tags={**span, **tags}, raise_on_error=False)

    def made(self, asset: str) -> dict[str, int]:
        """How often each partition was materialized, by the events of the instance."""
        records = self.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records
        keys = [str(record.partition_key) for record in records]
        return {key: keys.count(key) for key in sorted(keys)}

    def versions(self, asset: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for record in self.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records:
            event = record.asset_materialization
            assert event is not None and event.tags is not None
            found.setdefault(str(record.partition_key), event.tags["dagster/data_version"])
        return dict(sorted(found.items()))


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        yield Graph(tmp_path, instance)


def _errors(result: dg.ExecuteInProcessResult) -> str:
    return "\n".join(
        str(event.step_failure_data.user_failure_data.description)
        for event in result.all_events
        if event.is_step_failure and event.step_failure_data.user_failure_data
    )


def test_one_bad_year_of_a_range_leaves_the_others_alone(graph: Graph) -> None:
    graph.write({**dict.fromkeys(KEYS, 1), "2017": -1})
    result = graph.run()
    assert not result.success, "somebody has to be told"
    assert graph.made("first") == dict.fromkeys(KEYS, 1), "one materialization for each partition"
    others = {key: 1 for key in KEYS if key != "2017"}
    assert graph.made("second") == graph.made("third") == others
    assert "1 of 4 partitions are held back" in _errors(result)
    assert "2017: check is_right of first [2017] failed" in _errors(result)


def test_a_later_run_is_held_back_too_until_the_check_passes(graph: Graph) -> None:
    graph.write({**dict.fromkeys(KEYS, 1), "2017": -1})
    graph.run()
    assert not graph.run("second").success and "2017" not in graph.made("second")
    single = graph.run("second", first="2017", last="2017")
    assert not single.success and "2017: check is_right of first [2017] failed" in _errors(single)
    gate = Gate(graph.instance, graph.graph)
    assert gate.reasons("second", "2017") == ["check is_right of first [2017] failed"]
    assert gate.reasons("second", "2016") == gate.reasons("third", "2017") == [], "third keeps what it was made from"
    assert gate.failed("first") == {"2017": ["is_right"]}
    graph.write(dict.fromkeys(KEYS, 2))
    assert graph.run().success and graph.made("third")["2017"] == 1
    assert Gate(graph.instance, graph.graph).reasons("second", "2017") == []


@pytest.mark.parametrize("last", ["2017", "2018"])
def test_somebody_can_go_on_despite_it(graph: Graph, last: str) -> None:
    graph.write({**dict.fromkeys(KEYS, 1), "2017": -1})
    assert graph.run(first="2017", last=last, **{DESPITE_TAG: "true"}).success
    assert graph.made("third")["2017"] == 1
    assert Gate(graph.instance, graph.graph).reasons("second", "2017"), "of the next run it is asked again"


def test_a_range_that_fails_as_a_whole_ends_there(graph: Graph) -> None:
    graph.write(dict.fromkeys(KEYS, -1))
    assert not graph.run().success and graph.made("second") == {}


def test_each_partition_of_a_range_has_the_version_of_its_own_result(graph: Graph) -> None:
    graph.run()
    before = graph.versions("second")
    graph.write({**dict.fromkeys(KEYS, 1), "2016": 5})
    graph.run()
    after = graph.versions("second")
    assert {key for key in KEYS if before[key] != after[key]} == {"2016"}
    graph.run(first="2016", last="2016")
    assert graph.versions("second") == after, "a run of one partition says the same as a range"


def test_every_asset_knows_the_blocking_checks_before_it() -> None:
    graph = build_defs("demo").resolve_asset_graph()
    blocking = {(check.asset, check.name) for check in CHECKS if check.blocking}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        parents = {parent.to_user_string() for parent in node.parent_keys}
        waits = {(asset, name) for asset, names in node.metadata[WAITS_FOR].items() for name in names}
        assert waits == {(asset, name) for asset, name in blocking if asset in parents}, key


def test_nothing_is_published_while_an_estimate_of_it_is_wrong() -> None:
    """results.duckdb holds all areas, so it waits for each of them."""
    graph: Any = build_defs("demo").resolve_asset_graph()
    for asset in ("area_trends", "results_database"):
        assert "area_inside_interval" in graph.get(dg.AssetKey(asset)).metadata[WAITS_FOR]["glacier_areas"]


def test_the_command_line_tells_what_is_held_back_at_each_call(small: Small, tmp_path: Path) -> None:
    mine, only = small.copy(tmp_path / "copy"), ("glacier_predictions",)
    with orchestrate.instance(mine.storage) as opened:
        evaluation = dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey("glacier_cubes"), check_name="selected_image", passed=False, blocking=True,
            partition="2017", target_materialization_data=_newest(opened, "glacier_cubes", "2017"),
        )  # fmt: skip
        event = dg.DagsterEvent(
            event_type_value=dg.DagsterEventType.ASSET_CHECK_EVALUATION.value, job_name="checks",
            event_specific_data=evaluation,
        )  # fmt: skip
        opened.report_dagster_event(event, run_id=str(uuid.uuid4()))
    states = {
        (year, fold): Path(str(mine.storage.state_path("glacier_predictions", f"{year}.fold_{fold}")))
        for year in (2016, 2017)
        for fold in (1, 2)
    }
    for path in states.values():
        path.unlink()
    wanted = (
        "held back, because check selected_image of glacier_cubes [2017] failed: "
        "glacier_predictions [fold_1|2017], glacier_predictions [fold_2|2017]"
    )
    for _ in range(2):
        outcome = mine.run(only=only)
        assert outcome.failed == [wanted], "at each call, though the second has nothing to do"
        assert {key for key, path in states.items() if path.exists()} == {(2016, 1), (2016, 2)}
    told = mine.run(only=("glacier_cubes",))
    assert told.failed == [f"check selected_image of glacier_cubes [2017] failed: {TO_DO}"]
    assert mine.run(only=only, despite_checks=True).failed == [] and all(path.exists() for path in states.values())
