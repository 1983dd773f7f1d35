"""Kill -9 at random moments of a run, and look at what is left.

Belongs here: killing `dl4gam materialize` while it works, checking the files that are there, finishing the run and
comparing all results with an undisturbed store. Used by the test (a few kills) and by `make faults` (a hundred).
Does not belong here: other faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.faults.table import Bench, Outcome, fault
from dl4gam_assets_tests.small_region import Small

#: What is worked on -> assets whose partitions are forgotten, so that a run has this to do (and all that follows).
WORK: dict[str, tuple[str, ...]] = {
    "training": ("ensemble_member",),
    "cubes": ("glacier_cubes",),
    "maps": ("glacier_predictions",),
    "tables": ("glacier_areas", "glacier_outlines", "area_change", "regional_change"),
    "database": ("results_database",),
    "report": ("report", "stac_catalog"),
}
#: Files that are made again by each piece of work: removed with the partitions, or nothing would have to be done.
FILES = {
    "training": "models",
    "cubes": "cubes",
    "maps": "predictions",
    "database": "results.duckdb",
    "report": "reports",
}
#: Columns that tell when, how fast and by which run, and so differ between two runs that agree.
WHEN = {
    "patches_per_second",
    "data_wait_share",
    "peak_memory_mb",
    "time",
    "run_ids",
    "run_id",
    "materialization_id",
    "software",
    "seconds",
}


@dataclass
class Result:
    """Of one piece of work: kills that hit a working run, and what was found wrong."""

    work: str
    kills: int = 0
    late: int = 0  # the run was over before the kill
    wrong: list[str] = field(default_factory=list)


def forget(store: Storage, work: str) -> None:
    """Make a piece of work necessary again: state, tables and files of its partitions are removed."""
    import shutil

    for asset in WORK[work]:
        for file in Path(str(store.path("state", asset))).glob("*.json"):
            file.unlink()
    if work in FILES:
        target = Path(str(store.path(FILES[work])))
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def start(small: Small) -> subprocess.Popen[bytes]:
    """`dl4gam materialize` in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("DAGSTER_HOME", None)
    command = [sys.executable, "-m", "dl4gam_assets.cli", "materialize"]
    return subprocess.Popen(
        [*command, "--region", str(small.yaml), "--home", str(small.home)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def half_written(store: Storage) -> list[str]:
    """Files under their final names that can not be read whole."""
    import duckdb
    import rasterio
    import xarray as xr
    from safetensors.numpy import load_file

    wrong = []
    root = Path(str(store.root))
    readers = {
        ".parquet": pd.read_parquet, ".json": lambda p: json.loads(p.read_text()), ".safetensors": load_file,
        ".nc": lambda p: xr.load_dataset(p, engine="netcdf4").close(), ".tif": lambda p: rasterio.open(p).read(),
        ".duckdb": lambda p: duckdb.connect(str(p), read_only=True).close(),
        ".html": lambda p: p.read_text().rstrip().endswith("</html>") or _raise("cut off"),
    }  # fmt: skip
    for file in root.rglob("*"):
        hidden = any(part.startswith(".tmp-") for part in file.relative_to(root).parts)
        if not file.is_file() or hidden or file.suffix not in readers or file.is_relative_to(root / "inputs"):
            continue
        try:
            readers[file.suffix](file)
        except Exception as error:
            wrong.append(f"{file.relative_to(root)}: {type(error).__name__} {error}"[:200])
    return wrong


def _raise(text: str) -> None:
    raise ValueError(text)


def differences(store: Storage, truth: Storage) -> list[str]:
    """Tables and weights that are not those of the undisturbed store."""
    wrong = []
    for name in TABLES:
        if name in ("lineage", "lineage_sources", "settings", "software"):  # name runs and times
            continue
        mine, theirs = (_plain(s.read_table(name)) for s in (store, truth))
        if not mine.equals(theirs):
            wrong.append(f"table {name}: {len(mine)} rows, {len(theirs)} undisturbed")
    for file in Path(str(truth.root)).glob("models/**/model.safetensors"):
        other = Path(str(store.root)) / file.relative_to(Path(str(truth.root)))
        if not other.exists() or other.read_bytes() != file.read_bytes():
            wrong.append(f"weights {file.relative_to(Path(str(truth.root)))}")
    return wrong


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    out = pd.DataFrame(frame).drop(columns=[c for c in frame.columns if c in WHEN or c.endswith("_seconds")])
    for name in out.columns:
        if str(out[name].dtype) == "geometry":
            out[name] = [g.wkb_hex if g is not None else "" for g in out[name]]
        elif out[name].dtype == object:
            out[name] = out[name].astype("string")
    keys = [c for c in out.columns if not isinstance(out[c].iloc[0] if len(out) else "", (list, dict, np.ndarray))]
    return out.sort_values(keys).reset_index(drop=True)


def killed(small: Small, truth: Storage, work: str, kills: int, seed: int, seconds: float) -> Result:
    """Kill a run that does ``work`` at random moments, so many times; then let it finish and compare.

    Parameters
    ----------
    small : a copy that may be changed
    seconds : of an undisturbed run of this work; moments are drawn from it
    """
    result, rng = Result(work), random.Random(seed)
    forget(small.storage, work)
    while result.kills < kills and result.late < 2 * kills:
        process, begin = start(small), time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.1, 1.0) * seconds)
        if process.poll() is None:
            kill(process)
            result.kills += 1
            result.wrong += half_written(small.storage)
        else:  # over before its moment: do it again from the start, and sooner
            result.late += 1
            seconds = min(seconds, time.monotonic() - begin)
            forget(small.storage, work)
    last = start(small)
    last.wait(timeout=900)
    if last.returncode:
        result.wrong.append(f"the last run ended with {last.returncode}")
    result.wrong += differences(small.storage, truth)
    small.storage.remove_stale(older_than_s=0)
    left = [p for p in Path(str(small.storage.root)).rglob(".tmp-*")]
    return result if not left else Result(work, result.kills, result.late, [*result.wrong, f"{len(left)} leftovers"])


#: Kills of `make faults`, in all.
KILLS = 100


def _attempt(work: str, number: int) -> Callable[[Bench], Outcome]:
    def attempt(bench: Bench) -> Outcome:
        copy = bench.copy()
        forget(copy.storage, work)
        begin = time.monotonic()
        start(copy).wait(timeout=900)
        seconds = time.monotonic() - begin
        result = killed(copy, bench.small.storage, work, -(-KILLS // len(WORK)), number, seconds)
        return Killed(f"a run of {seconds:.0f} s, {result.late} kills too late", result.wrong, result.kills)

    return attempt


@dataclass
class Killed(Outcome):
    times: int = 1


for _number, _work in enumerate(WORK):
    fault("kill -9", _work, long=True)(_attempt(_work, _number))
