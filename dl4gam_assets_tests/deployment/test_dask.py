"""Glacier maps on a Dask scheduler by address: a real scheduler and two workers, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from dl4gam_assets.compute import Mapper, choose_device, close_clusters, place_of
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.orchestrate import materialize
from dl4gam_assets.stages import cubes, predictions, training
from dl4gam_assets.stages.base import UpstreamError, Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.small_region import Small


class Cluster:
    """A scheduler and workers as a deployment starts them."""

    def __init__(self, folder: Path):
        self.file, self.folder = folder / "scheduler.json", folder
        self.environment = {
            **os.environ,
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(self.file)
        )
        for _ in range(2):
            self.worker()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *words], env=self.environment, cwd=self.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        return self.start(
            "worker", "--scheduler-file", str(self.file), "--nworkers", "1", "--nthreads", "1", "--no-dashboard",
            "--no-nanny", "--host", "127.0.0.1",
        )  # fmt: skip

    @property
    def address(self) -> str:
        from distributed import Client

        with Client(scheduler_file=str(self.file), timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            return str(client.scheduler_info()["address"])

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
        for process in self.processes:
            process.wait(timeout=20)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    close_clusters()
    made.stop()


def pid(_: int, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return os.getpid()


def die_once(flag: str) -> int:
    """Kills its process the first time, as the system does when memory runs out."""
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def die_always() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_cubes_and_maps_of_a_cluster_are_those_of_one_process(small: Small, cluster: Cluster, tmp_path: Path) -> None:
    mine = small.copy(tmp_path / "copy")
    ws = Workspace(mine.region, mine.storage, Mapper(scheduler=cluster.address))
    assert {d.value for d in ws.mapper.map(pid, [(str(k), (k, 0.2)) for k in range(8)])} == {
        p.pid for p in cluster.processes[1:]
    }
    for file in Path(str(mine.storage.path("cubes", "year=2016"))).glob("*.nc"):
        file.unlink()
    cubes.glacier_cubes(ws, 2016, force=True)
    predictions.glacier_predictions(ws, 2016, 1, force=True)
    for table, where in (("cubes", {"year": 2016}), ("predictions", {"year": 2016, "fold": 1})):
        a, b = (s.read_table(table, **where) for s in (mine.storage, small.storage))
        pd.testing.assert_frame_equal(pd.DataFrame(a), pd.DataFrame(b))
    assert mine.storage.read_table("failures").equals(small.storage.read_table("failures"))


def test_the_address_in_the_environment_is_what_dagster_uses(
    small: Small, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = small.copy(tmp_path / "copy")
    monkeypatch.setenv("DL4GAM_DASK_SCHEDULER", cluster.address)
    monkeypatch.setenv("DL4GAM_HOME", str(mine.home))
    monkeypatch.setenv("DL4GAM_REGION", str(mine.yaml))
    Path(str(mine.storage.state_path("glacier_cubes", "2017"))).unlink()
    for file in Path(str(mine.storage.path("cubes", "year=2017"))).glob("*.nc"):
        file.unlink()
    outcome = materialize(
        build_defs(mine.region), mine.region, mine.storage, years=[2017], only=("glacier_cubes",)
    )  # fmt: skip
    assert outcome.failed == [] and [t.assets for t in outcome.timings] == [("glacier_cubes",)]

    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        done = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)
    assert done > 2 * len(mine.storage.read_table("cubes", year=2017))


def test_workers_with_another_version_are_refused_by_name(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl4gam_assets.__version__", "99.0")
    with pytest.raises(RuntimeError, match=r"worker tcp://127.* has dl4gam_assets .*this process has 99\.0"):
        list(Mapper(scheduler=cluster.address).map(pid, [("a", (1,)), ("b", (2,))]))


def test_a_worker_that_dies_loses_no_glacier(cluster: Cluster, tmp_path: Path) -> None:
    mapper = Mapper(scheduler=cluster.address)
    tasks = [("poison", (str(tmp_path / "flag"),))]
    done = {d.key: d for d in mapper.map(die_once, tasks)}
    assert done["poison"].ok  # the other worker did it
    cluster.worker()
    cluster.worker()
    deadly = [("deadly", ())]
    (result,) = mapper.map(die_always, deadly)
    assert not result.ok and "died twice" in str(result.error)
    (after,) = mapper.map(pid, [("after", (1,))])
    assert after.ok


# --------------------------------------------------------------------------------------------- devices
def _tell(site: object, year: int, fold: int, glacier_id: str, wanted: str, device: str, threads: int | None) -> None:
    """In place of the mapping of a glacier: says in which process it would be done, and on which device."""
    raise ValueError(f"process {os.getpid()} on {device}")


def _jobs_done(cluster: Cluster) -> int:
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        return int(client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter))


def test_a_step_with_a_gpu_uses_it_itself(
    small: Small, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = small.copy(tmp_path / "copy")
    ws = Workspace(mine.region, mine.storage, Mapper(1, scheduler=cluster.address))
    monkeypatch.setattr(predictions, "prediction_of", _tell)
    for wish in ("cuda", "auto"):
        ws.device = wish
        with monkeypatch.context() as gpu:
            gpu.setattr("torch.cuda.is_available", lambda: True)
            with pytest.raises(UpstreamError, match=f"process {os.getpid()} on cuda$"):
                predictions.glacier_predictions(ws, 2016, 1, force=True)
            mapper, device, _ = training._member_processes(ws)
            assert mapper.scheduler is None and device == "cuda"
    # Without one the workers choose.
    with contextlib.suppress(UpstreamError):  # one worker did them all, with one and the same error
        predictions.glacier_predictions(ws, 2016, 1, force=True)
    failures = mine.storage.read_table("failures", stage="glacier_predictions", partition="2016.fold_1")
    workers = {f"process {p.pid} on auto" for p in cluster.processes[1:]}
    assert set(failures["error"]) and set(failures["error"]) <= workers


def test_workers_choose_their_device_and_name_the_one_that_they_lack(
    small: Small, cluster: Cluster, tmp_path: Path
) -> None:
    if choose_device() != "cpu":
        pytest.skip("this machine has an accelerator: its steps use it themselves")
    mine = small.copy(tmp_path / "copy")
    ws = Workspace(mine.region, mine.storage, Mapper(1, scheduler=cluster.address), device="cuda")
    assert place_of(ws.mapper, "cuda").mapper.scheduler == cluster.address, "a worker may have what this machine lacks"
    shutil.rmtree(str(mine.storage.path("predictions", "year=2016")))  # maps that are there need no device
    with pytest.raises(UpstreamError, match=r"compute\.device is 'cuda', but this machine has none"):
        predictions.glacier_predictions(ws, 2016, 1, force=True)
    with pytest.raises(RuntimeError, match=r"compute\.device is 'cuda'"):
        place_of(Mapper(1), "cuda")
    ws.device = "auto"
    before = _jobs_done(cluster)
    training.calibration(ws, 1, force=True)
    (result,) = training.ensemble_members(ws, {"m": (1, 1)}, {"epochs": 1}, force=True).values()
    assert not isinstance(result, Exception), result
    assert result.metadata["device"] == "cpu"
    assert _jobs_done(cluster) > before, "calibration and training were not done by the workers"


def test_members_of_a_store_elsewhere_are_trained_where_their_layers_are_packed(small: Small) -> None:
    """The packed layers of a store that is no folder lie in a temporary folder, which other machines do not see."""
    here, elsewhere = small.storage, Storage("memory://bucket/small")
    for storage, address in ((here, "tcp://127.0.0.1:1"), (elsewhere, None)):
        ws = Workspace(small.region, storage, Mapper(1, scheduler="tcp://127.0.0.1:1"), device="cpu")
        assert training._member_processes(ws)[0].scheduler == address
