"""A server that does not answer: the step is tried again, and only then; what was made meanwhile stays."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from dl4gam_assets.assets.common import each_partition
from dl4gam_assets.compute import Mapper
from dl4gam_assets.imagery.catalogs import CatalogError, CatalogUnreachableError
from dl4gam_assets.imagery.sources import SceneUnreachableError
from dl4gam_assets.settings import Region, load_region
from dl4gam_assets.stages.base import StageResult, Workspace, run_stage
from dl4gam_assets.storage import Storage

REGION = load_region("demo").model_copy(deep=True)
REGION = REGION.model_copy(
    update={"compute": REGION.compute.model_copy(update={"retries": 2, "retry_delay_s": 0.0, "workers": 1})}
)
INSTANCE = dg.DagsterInstance.ephemeral()
YEARS = dg.StaticPartitionsDefinition(["2015", "2016"])


def materialize(
    store: Storage, stage: Callable[..., StageResult], region: Region = REGION
) -> dg.ExecuteInProcessResult:
    @dg.asset(partitions_def=YEARS, backfill_policy=dg.BackfillPolicy.single_run())
    def images(context: dg.AssetExecutionContext) -> None:
        each_partition(context, Workspace(region, store, Mapper(1)), stage)

    range_of_both = {"dagster/asset_partition_range_start": "2015", "dagster/asset_partition_range_end": "2016"}
    job = dg.Definitions([images]).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=INSTANCE, raise_on_error=False, tags=range_of_both,
    )  # fmt: skip


def calls_of(errors: dict[str, list[Exception]], made: Counter[str]) -> Callable[..., StageResult]:
    """A stage whose partitions raise the given errors, one an attempt, before they succeed."""

    def stage(ws: Workspace, key: str) -> StageResult:
        def work():
            made[key] += 1
            if made[key] <= len(errors.get(key, [])):
                raise errors[key][made[key] - 1]
            return "fingerprint", {}, {}

        return run_stage(ws, "images", key, {"key": key}, work)

    return stage


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def test_a_catalog_that_answers_the_third_time_loses_nothing(store: Storage) -> None:
    made: Counter[str] = Counter()
    silent = [CatalogUnreachableError("STAC API http://x does not answer"), CatalogUnreachableError("nor now")]
    result = materialize(store, calls_of({"2016": silent}, made))
    assert result.success
    assert made == {"2015": 1, "2016": 3}  # the year that was made is found to be current
    assert len([e for e in result.all_events if e.is_step_up_for_retry]) == 2
    assert len(result.asset_materializations_for_node("images")) == 2


def test_a_wrong_setting_is_not_tried_again(store: Storage) -> None:
    made: Counter[str] = Counter()
    INSTANCE.wipe_assets([dg.AssetKey("images")])
    result = materialize(store, calls_of({"2016": [CatalogError("no such collection")] * 5}, made))
    assert not result.success and made["2016"] == 1
    assert INSTANCE.get_materialized_partitions(dg.AssetKey("images")) == {"2015"}


def test_a_server_that_stays_silent_fails_with_its_name_after_the_last_attempt(store: Storage) -> None:
    made: Counter[str] = Counter()
    result = materialize(
        store, calls_of({"2016": [CatalogUnreachableError("http://silent does not answer")] * 9}, made)
    )
    assert not result.success and made["2016"] == 3
    failure = next(e for e in result.all_events if e.is_step_failure)
    assert "http://silent does not answer" in str(failure.step_failure_data)


def test_glaciers_that_a_server_did_not_give_are_asked_for_again_and_kept_as_failures_in_the_end(
    store: Storage,
) -> None:
    asked: Counter[str] = Counter()
    answers_at = {"A": 1, "B": 2, "C": 99}

    def read(glacier: str) -> str:
        asked[glacier] += 1
        if asked[glacier] < answers_at[glacier]:
            raise SceneUnreachableError(f"scene of {glacier}: HTTP 503; try again later")
        return glacier

    have: dict[str, str] = {}

    def stage(ws: Workspace, key: str) -> StageResult:
        def work():
            values, failures = ws.over_glaciers("images", key, read, [(g, (g,)) for g in answers_at if g not in have])
            have.update(values)
            return "f", {"failed_glaciers": len(failures)}, {}

        return run_stage(ws, "images", key, {"key": "1"}, work) if key == "2015" else StageResult(key)

    result = materialize(store, stage)
    assert result.success  # one glacier that can not be had does not lose the others
    assert asked == {"A": 1, "B": 2, "C": 3}
    failures = store.read_table("failures")
    assert failures["glacier_id"].tolist() == ["C"] and failures["kind"].tolist() == ["SceneUnreachableError"]
