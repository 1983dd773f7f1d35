"""Maps over glaciers: one failure never loses the others, in this process and in a cluster."""

from __future__ import annotations

import os
import signal

import pytest

from dl4gam_assets.compute import Mapper, choose_device, close_clusters


def _reciprocal(x: float) -> float:
    if x == 13:
        raise ValueError("thirteen is not liked")
    return 1 / x


def _die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@pytest.fixture(scope="module", autouse=True)
def _clusters() -> object:
    yield
    close_clusters()


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_stay_with_their_task(workers: int) -> None:
    tasks = [(str(x), (x,)) for x in (1, 0, 2, 13, 4)]
    seen: list[tuple[int, int]] = []
    done = {
        d.key: d for d in Mapper(workers).map(_reciprocal, tasks, progress=lambda n, total, s: seen.append((n, total)))
    }
    assert set(done) == {"1", "0", "2", "13", "4"}
    assert done["4"].ok and done["4"].value == 0.25
    assert done["0"].kind == "ZeroDivisionError" and not done["0"].ok
    assert "thirteen" in (done["13"].error or "")
    assert seen[-1] == (5, 5)


def test_a_dead_worker_loses_only_its_task() -> None:
    done = {d.key: d for d in Mapper(2).map(_die, [(str(x), (x,)) for x in range(6)])}
    assert len(done) == 6
    assert not done["3"].ok and "worker process died" in (done["3"].error or "")
    assert [done[str(x)].value for x in (0, 1, 2, 4, 5)] == [0, 1, 2, 4, 5]


def test_a_scheduler_by_address_serves_the_same_map() -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        mapper = Mapper(scheduler=cluster.scheduler_address)
        done = {d.key: d.value for d in mapper.map(_reciprocal, [(str(x), (x,)) for x in (1, 2, 4)])}
    assert done == {"1": 1.0, "2": 0.5, "4": 0.25}


def test_a_missing_accelerator_is_said_at_once() -> None:
    import torch

    assert choose_device("auto") in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'auto' or 'cpu'"):
            choose_device("cuda")
