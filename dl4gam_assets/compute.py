"""Maps over glaciers: one code path from one process to a cluster.

Belongs here: spreading independent tasks over processes (dask.distributed: an embedded local cluster, or the scheduler
at an address), with one glacier's failure kept from the others, bounded memory and progress; choice of the device.
Does not belong here: Dagster, and what a task does.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

_LOCAL: dict[int, Any] = {}  # workers -> dask client of the embedded cluster, shared by all maps of this process


@dataclass(frozen=True)
class Done:
    """Outcome of one task: its value, or the error that ended it."""

    key: str
    value: Any = None
    error: str | None = None
    kind: str | None = None

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
        return Done(key, error=_message(error), kind=type(error).__name__)


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
        address of a dask scheduler (``tcp://host:8786``); overrides ``workers``.
    """

    def __init__(self, workers: int = 0, scheduler: str | None = None):
        self.workers = workers or default_workers()
        self.scheduler = scheduler

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
        with (done, total, seconds) at most every ``every_s`` seconds, and once at the end.
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
        if self.scheduler is None and (self.workers == 1 or len(todo) <= 1):
            for key, arguments in todo:
                yield attempt(key, function, arguments)
            return
        from distributed import as_completed

        client = self._client()
        slots = max(4 * sum(client.nthreads().values()), 8)
        queue = iter(todo)
        keys: dict[str, str] = {}

        def submit() -> Any | None:
            for key, arguments in queue:
                future = client.submit(attempt, key, function, tuple(arguments), pure=False)
                keys[future.key] = key
                return future
            return None

        first = [f for f in (submit() for _ in range(min(slots, len(todo)))) if f is not None]
        pool = as_completed(first, loop=client.loop)
        for future in pool:
            key = keys.pop(future.key)
            try:
                done = future.result()
            except Exception as error:  # the worker itself died (memory, signal): say so for this task only
                done = Done(key, error=f"the worker process died: {_message(error)}", kind=type(error).__name__)
            future.release()
            following = submit()
            if following is not None:
                pool.add(following)
            yield done

    def _client(self) -> Any:
        from distributed import Client, LocalCluster

        if self.scheduler:
            return Client(self.scheduler, set_as_default=False)
        if self.workers not in _LOCAL:
            import dask

            dask.config.set({"distributed.worker.daemon": False})
            cluster = LocalCluster(
                n_workers=self.workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",  # on loopback, at a free port
                host="127.0.0.1",
                silence_logs=logging.ERROR,
            )
            _LOCAL[self.workers] = Client(cluster, set_as_default=False)
            atexit.register(close_clusters)
        return _LOCAL[self.workers]


def close_clusters() -> None:
    """Stop the embedded clusters of this process."""
    while _LOCAL:
        _, client = _LOCAL.popitem()
        with contextlib.suppress(Exception):
            cluster = client.cluster
            client.close(timeout=5)
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
