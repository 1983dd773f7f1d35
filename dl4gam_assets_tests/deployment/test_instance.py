"""Instances of Dagster: the one beside the results, and that of a team on a real PostgreSQL server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from dl4gam_assets.definitions import build_defs
from dl4gam_assets.orchestrate import materialize
from dl4gam_assets_tests.postgres_server import postgres_server
from dl4gam_assets_tests.small_region import Small

DEPLOY = Path(__file__).parents[2] / "deploy"
SHIPPED = (resources.files("dl4gam_assets") / "dagster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def database() -> Iterator[dict[str, Any]]:
    pytest.importorskip("dagster_postgres", reason="dagster-postgres is absent: pip install -e '.[team]'")
    with postgres_server() as asked:
        yield asked


def test_both_instances_have_the_same_limits() -> None:
    mine, team = yaml.safe_load(SHIPPED), yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
    team.pop("storage")
    for settings in (mine, team):
        settings["concurrency"]["runs"].pop("max_concurrent_runs")
        settings["concurrency"]["runs"]["tag_concurrency_limits"][0].pop("limit")
    assert mine == team


def test_the_shipped_instance_limits_every_pool_of_the_graph(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(SHIPPED)
    pools = {a.op.pool for a in build_defs("demo").assets or [] if isinstance(a, dg.AssetsDefinition)} - {None}
    assert pools == {"network", "gpu", "memory"}
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        config = instance.get_concurrency_config()
        assert config.pool_config.default_pool_limit == 1
        queue = config.run_queue_config
        assert queue is not None and queue.max_concurrent_runs == 4 and queue.tag_concurrency_limits
        assert instance.run_monitoring_enabled and instance.run_retries_enabled and not instance.telemetry_enabled


def test_a_team_shares_runs_events_and_limits_on_postgres(
    small: Small, database: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
    address = "postgresql+psycopg2://{user}@{host}:{port}/{dbname}".format(**database)
    mine = small.copy(tmp_path / "copy")
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", address)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("DL4GAM_HOME", str(mine.home))
    monkeypatch.setenv("DL4GAM_REGION", str(mine.yaml))
    for asset in ("area_change", "regional_change"):
        for file in Path(str(mine.storage.path("state", asset))).glob("*.json"):
            file.unlink()
    outcome = materialize(
        build_defs(mine.region), mine.region, mine.storage, only=("area_change", "regional_change"),
    )  # fmt: skip
    assert outcome.failed == [] and not list(home.rglob("*.db"))  # nothing went into files

    # Another machine of the team sees it, and its changes are seen here.
    ask = (
        "import dagster as dg, json\n"
        "with dg.DagsterInstance.get() as i:\n"
        "    i.event_log_storage.set_concurrency_slots('network', 4)\n"
        "    print(json.dumps([sorted(i.get_materialized_partitions(dg.AssetKey('regional_change'))),"
        " i.get_runs_count(), type(i.event_log_storage).__name__]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], env=dict(os.environ), capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip().splitlines()[-1] == '[["2015", "2016", "2017"], 1, "PostgresEventLogStorage"]'
    with dg.DagsterInstance.get() as instance:
        limits = {p.name: p.limit for p in instance.event_log_storage.get_pool_limits()}
        assert limits["network"] == 4
        schedules = instance.schedule_storage
        assert schedules is not None and type(schedules).__name__ == "PostgresScheduleStorage"


def test_steps_of_training_ask_for_gpus_where_each_has_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dagster_k8s", reason="dagster-k8s is absent: pip install -e '.[team]'")
    monkeypatch.setenv("DL4GAM_EXECUTOR", "k8s")
    monkeypatch.setenv("DL4GAM_K8S_GPUS", "1")
    definitions = build_defs("demo")
    assert isinstance(definitions.executor, dg.ExecutorDefinition) and definitions.executor.name == "k8s"
    for asset in definitions.assets or []:
        assert isinstance(asset, dg.AssetsDefinition)
        assert ("dagster-k8s/config" in asset.op.tags) == (asset.op.pool == "gpu"), asset.key
    monkeypatch.setenv("DL4GAM_K8S_GPUS", "many")
    with pytest.raises(ValueError, match="DL4GAM_K8S_GPUS"):
        build_defs("demo")
