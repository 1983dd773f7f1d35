"""Maps over glaciers: one code path from one process to a cluster.

Belongs here: spreading independent tasks over processes (dask.distributed: an embedded local cluster, or the scheduler
at an address), with one glacier's failure kept from the others, bounded memory and progress; choice of the device.
Does not belong here: Dagster, and what a task does.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import multiprocessing.util
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

#: (workers, threads) or scheduler address -> dask client, shared by all maps of this process.
_CLIENTS: dict[tuple[int, int] | str, Any] = {}


class TransientError(Exception):
    """What may go away by itself: a server that does not answer, or asks to wait. Worth another attempt later."""


@dataclass(frozen=True)
class Done:
    """Outcome of one task: its value, or the error that ended it."""

    key: str
    value: Any = None
    error: str | None = None
    kind: str | None = None
    transient: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None


def default_workers() -> int:
    """Number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def attempt(key: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Done:
    """Call ``function`` and turn an exception into a :class:`Done` that says what happened."""
    try:
        return Done(key, function(*arguments))
    except Exception as error:
        return Done(key, error=_message(error), kind=type(error).__name__, transient=isinstance(error, TransientError))


def _message(error: Exception) -> str:
    text = " ".join(str(error).split()) or repr(error)
    return text[:2000]


class Mapper:
    """Maps a function over many small tasks.

    Parameters
    ----------
    workers
        processes; 0 takes one for each processor, 1 runs in this process without a cluster.
    scheduler
        address of a dask scheduler (``tcp://host:8786``); overrides ``workers`` and ``threads``.
    threads
        tasks at once in each process of the embedded cluster, for work that waits for a network more than it computes.
        Reading of files has threads of its own (``compute.concurrent_reads``), so one is right for it.
    """

    def __init__(self, workers: int = 0, scheduler: str | None = None, threads: int = 1):
        self.workers = workers or default_workers()
        self.scheduler = scheduler
        self.threads = threads

    def map(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[str, Sequence[Any]]],
        *,
        progress: Callable[[int, int, float], None] | None = None,
        every_s: float = 10.0,
    ) -> Iterator[Done]:
        """Yield a :class:`Done` for each ``(key, arguments)`` as it is ready, in no fixed order.

        At most four tasks a worker are in flight, so memory does not grow with their number. ``progress`` is called
        with (done, total, seconds) at most every ``every_s`` seconds, and once at the end. When the caller stops
        early, tasks that have not begun are dropped.

        When a worker process dies, or a task finds no memory, its tasks are tried once more at the end, one at a time
        and with all the memory for themselves: the one that kills its worker again is the one to blame, and the others
        lose nothing. In one process they are tried once more when the others are done and their memory is given back.
        """
        todo = list(tasks)
        start = last = time.monotonic()
        for count, done in enumerate(self._run(function, todo), start=1):
            now = time.monotonic()
            if progress and (now - last >= every_s or count == len(todo)):
                last = now
                progress(count, len(todo), now - start)
            yield done

    def _run(self, function: Callable[..., Any], todo: list[tuple[str, Sequence[Any]]]) -> Iterator[Done]:
        if self.scheduler is None and (self.workers * self.threads == 1 or len(todo) <= 1):
            again = []
            for key, arguments in todo:
                first = attempt(key, function, arguments)
                if _out_of_memory(first):
                    again.append((key, arguments))
                else:
                    yield first
            for key, arguments in again:
                gc.collect()
                yield attempt(key, function, arguments)
            return
        client = self._client()
        slots = max(4 * sum(client.nthreads().values()), 8)
        suspects: list[tuple[str, Sequence[Any]]] = []
        for task, done in _spread(client, function, todo, slots):
            if done is None or _out_of_memory(done):
                suspects.append(task)
            else:
                yield done
        for task in suspects:
            for _, done in _spread(client, function, [task], 1):
                yield done or Done(task[0], error="the worker process died twice of it (memory?)", kind="KilledWorker")

    def _client(self) -> Any:
        from distributed import Client, LocalCluster

        key = self.scheduler or (self.workers, self.threads)
        known = _CLIENTS.get(key)
        if known is not None and known.status == "running":
            return known
        if self.scheduler:
            client = Client(self.scheduler, set_as_default=False)
            _same_code(client, self.scheduler)
            _CLIENTS[key] = client
        else:
            import dask

            # A task whose worker died is not tried again by dask, but by us, alone.
            dask.config.set({"distributed.worker.daemon": False, "distributed.scheduler.allowed-failures": 0})
            cluster = LocalCluster(
                n_workers=self.workers,
                threads_per_worker=self.threads,
                processes=True,
                dashboard_address="127.0.0.1:0",  # on loopback, at a free port
                host="127.0.0.1",
                silence_logs=logging.ERROR,
            )
            _CLIENTS[key] = Client(cluster, set_as_default=False)
        _close_at_exit()
        return _CLIENTS[key]


def _out_of_memory(done: Done) -> bool:
    """Whether a task failed because others held the memory (of the machine, or of the GPU)."""
    if done.kind in {"MemoryError", "_ArrayMemoryError", "ArrayMemoryError", "OutOfMemoryError"}:
        return True
    return done.kind == "RuntimeError" and "allocate memory" in (done.error or "")


def _version() -> str:
    from dl4gam_assets import __version__

    return __version__


def _same_code(client: Any, address: str) -> None:
    """Refuse workers with another version of this package: their results would be recorded as made by this one."""
    answers = client.run(_version, on_error="return")
    wrong = {worker: answer for worker, answer in answers.items() if answer != _version()}
    if wrong:
        worker, answer = next(iter(wrong.items()))
        client.close(timeout=5)
        raise RuntimeError(
            f"worker {worker} of the dask scheduler {address} has dl4gam_assets {answer}, this process has "
            f"{_version()}: install the same version on all workers (deploy/ uses one image for all)"
        )


def _spread(
    client: Any, function: Callable[..., Any], todo: Iterable[tuple[str, Sequence[Any]]], slots: int
) -> Iterator[tuple[tuple[str, Sequence[Any]], Done | None]]:
    """Each task with its outcome, ``slots`` in flight; None where the worker died under it."""
    from distributed import KilledWorker, as_completed

    queue = iter(todo)
    tasks: dict[str, tuple[tuple[str, Sequence[Any]], Any]] = {}  # dask's key -> task and future
    pool = as_completed([], loop=client.loop)

    def submit() -> None:
        for key, arguments in queue:
            future = client.submit(attempt, key, function, tuple(arguments), pure=False)
            tasks[future.key] = (key, arguments), future
            pool.add(future)
            return

    try:
        for _ in range(slots):
            submit()
        for future in pool:
            task, _ = tasks.pop(future.key)
            try:
                done: Done | None = future.result()
            except KilledWorker:
                done = None
            except Exception as error:  # the cluster lost it, or its result can not be sent: this task only
                done = Done(task[0], error=f"the cluster lost the task: {_message(error)}", kind=type(error).__name__)
            future.release()
            submit()
            yield task, done
    finally:
        if tasks:
            client.cancel([future for _, future in tasks.values()])


def _close_at_exit() -> None:
    """Close clusters before this process waits for its children at its end.

    A process that multiprocessing started (a step of a Dagster run) calls no functions of atexit, and would wait for
    the workers of its cluster for ever.
    """
    multiprocessing.util.Finalize(None, close_clusters, exitpriority=100)


def close_clusters() -> None:
    """Stop the embedded clusters of this process, and leave those of others."""
    while _CLIENTS:
        _, client = _CLIENTS.popitem()
        with contextlib.suppress(Exception):
            cluster = client.cluster
            client.close(timeout=5)
            if cluster is not None:
                cluster.close(timeout=5)


def choose_device(wish: str = "auto") -> str:
    """Name of the torch device: the wish, or the best there is for ``auto``.

    Raises
    ------
    RuntimeError
        if the wished accelerator is not there.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wish]:
        raise RuntimeError(
            f"compute.device is {wish!r}, but this machine has none that torch can use; set it to 'auto' or 'cpu'"
        )
    return wish


@functools.cache
def processor_maker() -> str:
    """The processor's maker in its own words (GenuineIntel, AuthenticAMD, ...); empty where nothing says it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        with open(info, encoding="utf-8", errors="replace") as lines:
            found = (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("vendor_id"))
            return next(found, "")
    return platform.processor().rpartition(" ")[2]  # Windows: "AMD64 Family 25 ..., AuthenticAMD"


def fast_bf16(device: str) -> bool:
    """Whether mixed precision in bf16 is faster than fp32 on a device ("cpu", "cuda", "cuda:0", "mps").

    GPUs: if it is not emulated. Processors: with AMX, and with the AVX-512 bf16 of AMD, which does twice the fp32 rate.
    Intel's AVX-512 bf16 without AMX (as many virtual machines show it) does not: networks took 1.2 to 1.4 times longer
    in bf16 than in fp32 (docs/performance.md).
    """
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False

    def has(name: str) -> bool:
        check = getattr(torch.cpu, name, None)
        return bool(check and check())

    return has("_is_amx_tile_supported") or (has("_is_avx512_bf16_supported") and processor_maker() == "AuthenticAMD")


@dataclass(frozen=True)
class Place:
    """Where networks run: the processes, the device that each of them is told, and its threads (None: as it has)."""

    mapper: Mapper
    device: str
    threads: int | None


def place_of(mapper: Mapper, wish: str) -> Place:
    """Where networks run for a step that would spread its work by ``mapper``.

    An accelerator of this machine is used by processes of this machine: a step that was given a GPU would otherwise
    hold it idle, and send the name of a device to workers elsewhere that do not have it. Without one the workers of a
    scheduler get the wish, and each chooses its device by :func:`choose_device`.

    Raises
    ------
    RuntimeError
        if the wished accelerator is not there, and no scheduler has workers that might have it.
    """
    if mapper.scheduler is not None:
        try:
            own = choose_device(wish)
        except RuntimeError:
            own = "cpu"
        if own == "cpu":
            return Place(mapper, wish, None)
        return Place(Mapper(mapper.workers, threads=mapper.threads), own, None)
    own = choose_device(wish)
    return Place(mapper, own, max(default_workers() // mapper.workers, 1) if own == "cpu" else None)


def count_accelerators(device: str, wanted: int = 0) -> int:
    """How many devices of a kind work is spread over: GPUs (all, or at most ``wanted``), otherwise one."""
    if device != "cuda":
        return 1
    import torch

    return max(min(wanted or torch.cuda.device_count(), torch.cuda.device_count()), 1)


def own_device(device: str, count: int) -> str:
    """The device of this process: a worker of a cluster takes the GPU that its number falls to, ``cuda:1`` for
    example; any other process, and any other kind of device, what it was given."""
    if device != "cuda" or count < 2:
        return device
    from distributed import get_worker

    try:
        name = get_worker().name
    except ValueError:  # no worker of a cluster
        return device
    return f"{device}:{int(name) % count}" if str(name).isdigit() else device
