"""Maps over glaciers: one failure never loses the others, in this process and in a cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dl4gam_assets.compute import Mapper, choose_device, close_clusters


def _reciprocal(x: float) -> float:
    if x == 13:
        raise ValueError("thirteen is not liked")
    return 1 / x


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


def _die_among_others(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)  # so that others wait at the worker that dies
    return x


def _pid(x: int) -> int:
    return os.getpid()


def _megabytes(x: int) -> bytes:
    return bytes(4_000_000)


def test_a_dead_worker_loses_only_its_task() -> None:
    done = {d.key: d for d in Mapper(2).map(_die_among_others, [(str(x), (x,)) for x in range(24)])}
    assert len(done) == 24
    assert not done["3"].ok and "worker process died" in (done["3"].error or "")
    assert [done[str(x)].value for x in range(24) if x != 3] == [x for x in range(24) if x != 3]


def test_a_scheduler_by_address_serves_the_same_map_and_outlives_a_worker() -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        mapper = Mapper(scheduler=cluster.scheduler_address)
        done = {d.key: d.value for d in mapper.map(_reciprocal, [(str(x), (x,)) for x in (1, 2, 4)])}
        assert done == {"1": 1.0, "2": 0.5, "4": 0.25}
        dead = {d.key: d for d in mapper.map(_die_among_others, [(str(x), (x,)) for x in range(8)])}
        assert [key for key, d in dead.items() if not d.ok] == ["3"] and len(dead) == 8
        assert {d.value for d in mapper.map(_pid, [("a", (0,)), ("b", (1,))])} != {os.getpid()}
        assert len(cluster.scheduler.clients) <= 3  # one connection serves all maps (and two of the cluster itself)
        close_clusters()


def test_threads_in_the_workers() -> None:
    mapper = Mapper(1, threads=4)
    assert len({d.value for d in mapper.map(_pid, [(str(x), (x,)) for x in range(8)])}) == 1
    start = time.monotonic()
    done = list(mapper.map(time.sleep, [(str(x), (0.3,)) for x in range(8)]))
    assert all(d.ok for d in done)
    assert time.monotonic() - start < 8 * 0.3 - 0.6  # one after the other would take longer


def test_memory_does_not_grow_with_the_number_of_tasks() -> None:
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    for _ in Mapper(2).map(_megabytes, [(str(x), (x,)) for x in range(20)]):
        pass
    before = peak()
    for _ in Mapper(2).map(_megabytes, [(str(x), (x,)) for x in range(150)]):  # 600 MB in all
        pass
    assert peak() - before < 150e6


def test_a_caller_that_stops_early_leaves_nothing_running(tmp_path: Path) -> None:
    results = Mapper(2).map(_touch, [(str(x), (str(tmp_path / str(x)),)) for x in range(60)])
    next(iter(results))
    results.close()  # type: ignore[attr-defined]
    time.sleep(0.5)
    begun = len(list(tmp_path.iterdir()))
    time.sleep(0.3)
    assert begun <= 16 and len(list(tmp_path.iterdir())) == begun


def _touch(path: str) -> None:
    Path(path).touch()
    time.sleep(0.05)


def _map_and_end(path: str) -> None:
    values = [d.value for d in Mapper(2).map(_reciprocal, [("1", (1,)), ("2", (2,))])]
    Path(path).write_text(repr(sorted(values)))


def test_a_process_of_multiprocessing_ends_with_its_cluster(tmp_path: Path) -> None:
    """So does each step of a Dagster run: it calls no atexit functions, and waits for its children."""
    import multiprocessing

    step = multiprocessing.get_context("spawn").Process(target=_map_and_end, args=(str(tmp_path / "done"),))
    step.start()
    step.join(60)
    ended = step.exitcode
    step.kill()
    assert (tmp_path / "done").read_text() == "[0.5, 1.0]"
    assert ended == 0, "the process waits for the workers of its cluster for ever"


def test_a_missing_accelerator_is_said_at_once() -> None:
    import torch

    assert choose_device("auto") in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'auto' or 'cpu'"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("amx", "avx512", "maker", "expected"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),  # slower than fp32, measured
        (False, True, "AuthenticAMD", True),
        (False, False, "AuthenticAMD", False),
        (False, True, "", False),
    ],
)
def test_bf16_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, maker: str, expected: bool
) -> None:
    """Processors that this one is not."""
    import torch

    from dl4gam_assets import compute

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(compute, "processor_maker", lambda: maker)
    assert compute.fast_bf16("cpu") is expected
    assert not compute.fast_bf16("mps")
