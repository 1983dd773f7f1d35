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
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dl4gam_assets.stages import areas
from dl4gam_assets.stages.base import UpstreamError
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
    """What is not as in the undisturbed store: tables, weights, pixels of cubes and maps, the database, pages."""
    mine, theirs = Path(str(store.root)), Path(str(truth.root))
    wrong = []
    for pattern, same in COMPARED.items():
        names = [{f.relative_to(root) for f in root.glob(pattern)} for root in (mine, theirs)]
        wrong += [f"only in {where}: {n}" for where, ns in (("it", names[0] - names[1]), ("the undisturbed store",
                  names[1] - names[0])) for n in sorted(ns)]  # fmt: skip
        wrong += [f"{n} is another" for n in sorted(names[0] & names[1]) if not _same(same, mine / n, theirs / n)]
    for name in TABLES:
        if name in ABOUT_RUNS:
            continue
        mine, theirs = (_plain(s.read_table(name)) for s in (store, truth))
        if not mine.equals(theirs):
            wrong.append(f"table {name}: {len(mine)} rows, {len(theirs)} undisturbed")
    return wrong


def _same(compare: Callable[[Path, Path], bool], mine: Path, theirs: Path) -> bool:
    try:
        return compare(mine, theirs)
    except Exception:  # a file that can not be read is not the same
        return False


def _same_bytes(mine: Path, theirs: Path) -> bool:
    return mine.read_bytes() == theirs.read_bytes()


def _same_cube(mine: Path, theirs: Path) -> bool:
    import xarray as xr

    with xr.open_dataset(mine, engine="netcdf4") as one, xr.open_dataset(theirs, engine="netcdf4") as other:
        return bool(one.equals(other))


def _same_pixels(mine: Path, theirs: Path) -> bool:
    import rasterio

    with rasterio.open(mine) as one, rasterio.open(theirs) as other:
        return str(one.profile) == str(other.profile) and np.array_equal(one.read(), other.read(), equal_nan=True)


def _same_database(mine: Path, theirs: Path) -> bool:
    """Every table that is not about runs and times, row by row, without the columns that are."""
    import duckdb

    with duckdb.connect(str(mine), read_only=True) as one, duckdb.connect(str(theirs), read_only=True) as other:
        names = [sorted(row[0] for row in c.sql("show tables").fetchall()) for c in (one, other)]
        if names[0] != names[1]:
            return False
        for name in set(names[0]) - ABOUT_RUNS:
            columns = [row[0] for row in one.sql(f'describe "{name}"').fetchall()]
            kept = [c for c in columns if c not in WHEN and not c.endswith("_seconds")]
            if not kept:
                continue
            rows = [
                sorted(map(str, c.sql(f"select {', '.join(f'{k!r}'.replace(chr(39), chr(34)) for k in kept)} from "
                                      f'"{name}"').fetchall()))
                for c in (one, other)
            ]  # fmt: skip
            if rows[0] != rows[1]:
                return False
    return True


def _same_page(mine: Path, theirs: Path) -> bool:
    """Reports, without days, times, ids of runs and the folder of the inputs."""
    texts = []
    for file in (mine, theirs):
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?", "TIME", text)
        text = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-f]{12,64}\b", "ID", text)
        text = re.sub(r"(?<![\w./-])/[\w./-]{1,300}/inputs/", "", text)  # a copy was made from those of the first
        texts.append(re.sub(r"\d+(\.\d+)? (s|seconds|minutes)\b", "SPAN", text))
    return texts[0] == texts[1]


#: Tables that name runs and times.
ABOUT_RUNS = {"lineage", "lineage_inputs", "lineage_sources", "settings", "software", "runs", "materializations"}
#: Files below a store -> whether two of them say the same.
COMPARED: dict[str, Callable[[Path, Path], bool]] = {
    "models/**/model.safetensors": _same_bytes,
    "cubes/*/*.nc": _same_cube,
    "static/*.nc": _same_cube,
    "predictions/*/*.tif": _same_pixels,
    "dhdt/*/*.tif": _same_pixels,
    "results.duckdb": _same_database,
    "reports/*.html": _same_page,
}


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
    while result.kills < kills and result.late < 3 * kills + 5:
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
    left = [p.name for p in Path(str(small.storage.root)).rglob(".tmp-*")]
    if left:
        result.wrong.append(f"{len(left)} leftovers after a run that was not killed: {left[:3]}")
    if result.kills != kills:
        result.wrong.append(f"{result.kills} kills of {kills} met a run at work")
    return result


#: Kills of `make faults`, in all.
KILLS = 100


def _attempt(work: str, number: int) -> Callable[[Bench], Outcome]:
    def attempt(bench: Bench) -> Outcome:
        copy = bench.copy(linked=("inputs",))
        forget(copy.storage, work)
        begin = time.monotonic()
        start(copy).wait(timeout=900)
        seconds = time.monotonic() - begin
        result = killed(copy, bench.small.storage, work, -(-KILLS // len(WORK)), number, seconds)
        return Killed(f"a run of {seconds:.0f} s, {result.late} kills too late", result.wrong, times=result.kills)

    return attempt


#: Stops a process in the middle of work: after a table was written, or the first file of a suffix.
_STOP_IN = """
import contextlib, os, signal, sys
from pathlib import Path
from dl4gam_assets.compute import Mapper
from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import predictions
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.stages import areas
from dl4gam_assets.stages.base import UpstreamError
from dl4gam_assets.storage import Storage

home, after = sys.argv[1:]
writing = Storage.writing

@contextlib.contextmanager
def stopping(self, path):
    with writing(self, path) as temporary:
        yield temporary
    if after in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

Storage.writing = stopping
ws = Workspace(load_region(f"{home}/small.yaml"), Storage(f"{home}/small"), Mapper(1))
predictions.glacier_predictions(ws, 2016, 1)
"""


@fault("kill -9", "under other settings, then back")
def back(bench: Bench) -> dict[str, Outcome]:
    """A run with another threshold is killed after one map, or after its table: the former settings find nothing of it.

    What was written under the other settings must not be taken for current, nor be read by what comes after.
    """
    small = bench.copy(linked=("inputs",))
    before = small.yaml.read_text()
    outcomes = {}
    for label, after in (("after one map", ".tif"), ("after the table", "tables/predictions/")):
        small.change(inference__threshold=0.9, inference__mode="stride", inference__patch_px=64)  # other pixels too
        command = [sys.executable, "-c", _STOP_IN, str(small.home), after]
        died = subprocess.run(command, check=False, capture_output=True).returncode
        outcome = Outcome("the next run makes it again; what is made from it waits")
        outcome.expect(died == -signal.SIGKILL, f"the run with other settings ended with {died}")
        outcome.expect(bool(differences(small.storage, bench.small.storage)), "the run that was killed changed nothing")
        small.yaml.write_text(before)
        small.region = bench.small.region
        try:
            areas.glacier_areas(small.workspace(), 2016, 1, force=True)
            outcome.expect(False, "areas are made from maps of other settings")
        except UpstreamError as error:
            outcome.expect("glacier_predictions" in str(error), str(error))
        made = small.run()
        outcome.expect(made.failed == [], f"fails: {made.failed}")
        outcome.lost += differences(small.storage, bench.small.storage)
        outcomes[f"under other settings, then back: {label}"] = outcome
    return outcomes


@dataclass
class Killed(Outcome):
    times: int = 1


for _number, _work in enumerate(WORK):
    fault("kill -9", _work, long=True)(_attempt(_work, _number))
