"""A backfill as the UI asks for it, through a daemon that is killed and started again: every partition is made once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from dl4gam_assets.checks import _newest
from dl4gam_assets_tests.small_region import Small

BACKFILL = """mutation($names: [String!]!) { launchPartitionBackfill(backfillParams: {
  assetSelection: [{path: ["glacier_predictions"]}], partitionNames: $names, tags: []
}) { __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
STATE = """query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill {
  status runs(limit: 50) { status } } } }"""


class Deployment:
    """Code server, webserver and daemon: three processes, as deploy/compose.yaml starts them."""

    def __init__(self, small: Small, folder: Path):
        self.folder = folder
        home = folder / "dagster"
        home.mkdir()
        shipped = (resources.files("dl4gam_assets") / "dagster.yaml").read_text(encoding="utf-8")
        (home / "dagster.yaml").write_text(shipped)
        self.environment = os.environ | {
            "DAGSTER_HOME": str(home), "DL4GAM_HOME": str(small.home), "DL4GAM_REGION": str(small.yaml),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.code, self.web = _free_port(), _free_port()
        (folder / "workspace.yaml").write_text(
            f"load_from:\n  - grpc_server: {{host: 127.0.0.1, port: {self.code}, location_name: dl4gam_assets}}\n"
        )
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start("dagster", "api", "grpc", "-m", "dl4gam_assets.definitions", "-h", "127.0.0.1", "-p", str(self.code))
        _until(lambda: _listens(self.code), 60)
        self.start("dagster_webserver", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(self.web))
        _until(lambda: _listens(self.web), 60)

    def start(self, module: str, *words: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{module}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words], cwd=self.folder, env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def daemon(self) -> subprocess.Popen[bytes]:
        return self.start("dagster._daemon", "run", "-w", "workspace.yaml")

    def ask(self, query: str, **variables: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.web}/graphql", json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = json.load(answer)
        assert "errors" not in told, told
        return next(iter(told["data"].values()))

    def stop(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait(timeout=20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise TimeoutError(f"not within {seconds:.0f} s")


@pytest.fixture(params=[1])
def deployment(request: pytest.FixtureRequest, small: Small, tmp_path: Path) -> Iterator[tuple[Deployment, Small]]:
    """With so many partitions in a run."""
    mine = small.copy(tmp_path / "copy")
    mine.change(compute__partitions_per_run=request.param)
    made = Deployment(mine, tmp_path)
    yield made, mine
    made.stop()


def _forget_maps(mine: Small, *years: int) -> list[str]:
    """Take the maps' states and tables of all folds away; returns the partitions as the UI names them."""
    for year in years:
        for fold in (1, 2):
            Path(str(mine.storage.state_path("glacier_predictions", f"{year}.fold_{fold}"))).unlink()
            Path(str(mine.storage.table("predictions", {"year": year, "fold": fold}))).unlink()
    return [f"fold_{fold}|{year}" for year in years for fold in (1, 2)]


@pytest.mark.timeout(900)
def test_a_backfill_goes_on_after_its_daemon_was_killed(deployment: tuple[Deployment, Small], small: Small) -> None:
    running, mine = deployment
    names = _forget_maps(mine, 2016, 2017)
    daemon = running.daemon()
    asked = running.ask(BACKFILL, names=names)
    assert asked["__typename"] == "LaunchBackfillSuccess", asked

    def runs() -> list[str]:
        return [r["status"] for r in running.ask(STATE, id=asked["backfillId"])["runs"]]

    _until(lambda: "STARTED" in runs() or "SUCCESS" in runs(), 120)
    daemon.kill()
    daemon.wait()
    time.sleep(2)
    assert len(runs()) < 4 or set(runs()) - {"SUCCESS"}, "the backfill was over before the daemon was killed"
    running.daemon()
    _until(lambda: running.ask(STATE, id=asked["backfillId"])["status"] == "COMPLETED_SUCCESS", 420)
    assert runs() == ["SUCCESS"] * 4
    for year in (2016, 2017):
        a, b = (pd.DataFrame(s.read_table("predictions", year=year)) for s in (mine.storage, small.storage))
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("deployment", [200], indirect=True)
def test_a_backfill_over_ranges_leaves_out_what_a_failed_check_holds_back(
    deployment: tuple[Deployment, Small], small: Small
) -> None:
    """All years and folds in few runs: maps of a year whose cubes failed a blocking check are not made, others are."""
    running, mine = deployment
    names = _forget_maps(mine, 2015, 2016, 2017)
    cubes = dg.AssetKey("glacier_cubes")
    with dg.DagsterInstance.from_config(running.environment["DAGSTER_HOME"]) as instance:
        for year in ("2015", "2016", "2017"):
            instance.report_runless_asset_event(dg.AssetMaterialization(cubes, partition=year))
            instance.report_runless_asset_event(
                dg.AssetCheckEvaluation(
                    cubes, "selected_image", passed=year != "2016", metadata={}, blocking=True, partition=year,
                    target_materialization_data=_newest(instance, "glacier_cubes", year),
                )
            )  # fmt: skip
    running.daemon()
    asked = running.ask(BACKFILL, names=names)
    assert asked["__typename"] == "LaunchBackfillSuccess", asked
    state = _until(
        lambda: (told := running.ask(STATE, id=asked["backfillId"]))["status"].startswith("COMPLETED") and told, 420
    )
    assert state["status"] == "COMPLETED_FAILED" and "FAILURE" in {run["status"] for run in state["runs"]}
    assert len(state["runs"]) < len(names), "ranges, not a run for each partition"
    for year in (2015, 2017):
        a, b = (pd.DataFrame(s.read_table("predictions", year=year)) for s in (mine.storage, small.storage))
        pd.testing.assert_frame_equal(a, b)
    assert not len(mine.storage.read_table("predictions", year=2016))
    with dg.DagsterInstance.from_config(running.environment["DAGSTER_HOME"]) as instance:
        made = instance.get_materialized_partitions(dg.AssetKey("glacier_predictions"))
    assert made == {name for name in names if not name.endswith("2016")}
