"""Faults of the machine: disk, permissions, memory, clock, other runs, stores of other versions.

Belongs here: a run that meets them, and the same store once they are gone.
Does not belong here: kills (``kills``), servers (``catalogs``).
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import psutil

from dl4gam_assets.compute import Mapper, close_clusters
from dl4gam_assets.publication import query_database
from dl4gam_assets.stages import areas, base, publication
from dl4gam_assets.storage import FORMAT, Storage, StoreFormatError
from dl4gam_assets_tests.faults.kills import differences, forget, half_written
from dl4gam_assets_tests.faults.table import Bench, Outcome, fault, not_tried
from dl4gam_assets_tests.small_region import Small

DAC_OVERRIDE, DAC_READ_SEARCH, DROP = 1, 2, 24  # linux/capability.h, linux/prctl.h


def _run(small: Small, before: Callable[[], None] | None = None, **environment: str) -> tuple[int, str]:
    """`dl4gam materialize` in a process of its own: exit code, and the lines that tell what failed."""
    process = _start(small, before, **environment)
    out, _ = process.communicate(timeout=900)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.decode(errors="replace"))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"(?i)error|fail|errno", line)]
    return process.returncode, " | ".join(dict.fromkeys(told))[:1400]


def _start(small: Small, before: Callable[[], None] | None = None, **environment: str) -> subprocess.Popen[bytes]:
    variables = {k: v for k, v in os.environ.items() if k != "DAGSTER_HOME"} | {"COLUMNS": "2000"} | environment
    return subprocess.Popen(
        [
            sys.executable, "-m", "dl4gam_assets.cli", "materialize",
            "--region", str(small.yaml), "--home", str(small.home),
        ],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=before,
    )  # fmt: skip


def _recovers(outcome: Outcome, small: Small, truth: Small) -> Outcome:
    """Nothing half-written is there, and a run without the fault ends with the undisturbed results."""
    for text in half_written(small.storage):
        outcome.expect(False, f"half-written: {text}")
    code, told = _run(small)
    outcome.expect(code == 0, f"the next run fails: {told}")
    outcome.lost += differences(small.storage, truth.storage)
    return outcome


@fault("environment", "a disk that fills up in the middle of a write")
def disk_full(bench: Bench) -> Outcome:
    """No file may grow beyond 300 kB: what the kernel does then is what it does at the end of a disk."""
    small = bench.copy(linked=("inputs",))
    forget(small.storage, "maps")
    forget(small.storage, "database")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    code, told = _run(small, limit)
    outcome = Outcome(told)
    outcome.expect(code != 0, "the run says that all is well")
    outcome.names("the disk", str(small.storage.root))
    left = list(Path(str(small.storage.root)).rglob(".tmp-*"))
    outcome.expect(not left, f"leftovers: {[p.name for p in left][:3]}")
    return _recovers(outcome, small, bench.small)


@fault("environment", "no space left while a table is written")
def no_space(bench: Bench) -> Outcome:
    """The kernel's own ENOSPC, on a file system of half a mebibyte. Needs the right to mount."""
    root = bench.folder / "full"
    root.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(root)], capture_output=True, check=False
    )
    if made.returncode:
        return not_tried(made.stderr.decode().strip())
    try:
        store, outcome = Storage(root), Outcome("")
        whole = bench.small.storage.read_table("areas", year=2016, fold=1).drop(columns=["year", "fold"])
        path = store.write_table("areas", whole, {"year": 2016, "fold": 1})
        before = Path(str(path)).read_bytes()
        rng = np.random.default_rng(0)
        huge = whole.iloc[np.zeros(30_000, dtype=int)].assign(glacier_id=[rng.bytes(32).hex() for _ in range(30_000)])
        try:
            store.write_table("areas", huge, {"year": 2016, "fold": 1})
            outcome.expect(False, "was written all the same")
        except OSError as error:
            outcome.said = " ".join(str(error).split())
            outcome.expect(error.errno == errno.ENOSPC or "No space left" in outcome.said, repr(error))
        outcome.names("No space left")
        outcome.expect(Path(str(path)).read_bytes() == before, "the former table is another")
        outcome.expect(not list(root.rglob(".tmp-*")), "a temporary file is left")
        return outcome
    finally:
        subprocess.run(["umount", str(root)], check=False)


@fault("environment", "a full file system (tmpfs)", long=True)
def tmpfs_full(bench: Bench) -> Outcome:
    """The store on a small file system of its own. Needs the right to mount."""
    small = bench.copy(linked=("inputs",))
    forget(small.storage, "maps")
    forget(small.storage, "database")
    root = Path(str(small.storage.root))
    aside = bench.folder / "aside"
    root.rename(aside)
    root.mkdir()
    used = sum(f.stat().st_size for f in aside.rglob("*") if f.is_file())
    size = int(used * 1.12) + 1_000_000
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(root)], capture_output=True, check=False
    )
    if made.returncode:
        root.rmdir()
        aside.rename(root)
        return not_tried(made.stderr.decode().strip())
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", str(root)], check=True)
        ballast = root / "ballast"
        free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
        ballast.write_bytes(bytes(max(free - 600_000, 0)))
        (bench.folder / "dagster").mkdir()
        code, told = _run(small, DAGSTER_HOME=str(bench.folder / "dagster"))
        outcome = Outcome(told)
        outcome.names("No space left", "small")
        outcome.expect(code != 0, "the run says that all is well")
        ballast.unlink()
        subprocess.run(["mount", "-o", f"remount,size={used * 3}", str(root)], check=True)
        return _recovers(outcome, small, bench.small)
    finally:
        subprocess.run(["umount", str(root)], check=False)


def _no_override() -> None:
    """Root obeys the permissions of files from here on."""
    libc = ctypes.CDLL(None)
    for capability in (DAC_OVERRIDE, DAC_READ_SEARCH):
        libc.prctl(DROP, capability, 0, 0, 0)


@fault("environment", "a store without write permission")
def read_only(bench: Bench) -> Outcome:
    small = bench.copy()
    forget(small.storage, "maps")
    root = Path(str(small.storage.root))
    locked = [p for p in root.rglob("*") if p.is_dir() and "dagster" not in p.relative_to(root).parts] + [root]
    for folder in locked:
        folder.chmod(0o555)
    try:
        before = {p: p.read_bytes() for p in root.rglob("*.parquet")}
        code, told = _run(small, _no_override if os.geteuid() == 0 else None)
        after = {p: p.read_bytes() for p in root.rglob("*.parquet")}
    finally:
        for folder in locked:
            folder.chmod(0o755)
    outcome = Outcome(told)
    outcome.names("Permission denied", str(root))
    outcome.expect(code != 0, "the run says that all is well")
    outcome.expect(before == after, "tables have changed")
    return _recovers(outcome, small, bench.small)


@fault("environment", "an input without read permission")
def unreadable(bench: Bench) -> Outcome:
    """A tile of the DEM that may not be read, in a region that is no simulation."""
    small = bench.copy()
    ready = {"simulation": None, "data_root": str(small.storage.inputs())}
    small.change(**ready)
    dem = Path(str(small.storage.inputs())) / "dem.tif"
    dem.chmod(0)
    try:
        code, told = _run(small, _no_override if os.geteuid() == 0 else None)
    finally:
        dem.chmod(0o644)
    outcome = Outcome(told)
    outcome.names("dem.tif")
    outcome.expect(code != 0, "the run says that all is well")
    outcome.expect(not half_written(small.storage), "something is half-written")
    for text in differences(small.storage, bench.small.storage):
        # The database and the pages tell of the settings, which are others here, and of no known truth.
        outcome.expect(text.startswith(("results.duckdb", "reports/")), text)
    return outcome


def _together(small: Small, truth: Small, *homes: str) -> Outcome:
    outcome = Outcome("both end well")
    runs = [_start(small, **({"DAGSTER_HOME": home} if home else {})) for home in homes]
    for process in runs:
        out, _ = process.communicate(timeout=900)
        outcome.expect(process.returncode == 0, f"one ends with {process.returncode}: {out.decode()[-300:]}")
    outcome.lost += half_written(small.storage) + differences(small.storage, truth.storage)
    return outcome


@fault("environment", "two runs on the same partitions at once")
def two_runs(bench: Bench) -> Outcome:
    small = bench.copy(linked=("inputs",))
    forget(small.storage, "maps")
    return _together(small, bench.small, "", "")


@fault("environment", "two machines on one store")
def two_machines(bench: Bench) -> Outcome:
    """Each with a Dagster instance of its own, so that no pool keeps them apart."""
    small = bench.copy(linked=("inputs",))
    forget(small.storage, "maps")
    homes = [bench.folder / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
        (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return _together(small, bench.small, *map(str, homes))


@fault("environment", "a reader during publication")
def reader(bench: Bench) -> Outcome:
    """A connection that is open while the database is replaced sees the old one whole; the next sees the new."""
    small = bench.copy(without=("inputs", "cubes", "models", "packed", "predictions"))
    path = str(small.storage.path("results.duckdb"))
    outcome = Outcome("the old one until it is closed, then the new one")
    count = "select count(*) n from areas"
    hold = (
        f"import duckdb; c = duckdb.connect({path!r}, read_only=True); say = lambda: print(c.sql({count!r}).fetchall()"
        "[0][0], flush=True); say(); input(); say()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
        assert held.stdin and held.stdout
        before = int(held.stdout.readline())
        for name in ("areas", "lineage"):
            part = small.storage.read_table(name, year=2016, fold=1).sort_values("glacier_id")
            small.storage.write_table(name, part.iloc[:-1], {"year": 2016, "fold": 1})
        stop, seen = threading.Event(), []

        def watch() -> None:
            while not stop.is_set():
                seen.append(int(query_database(path, count)["n"].iloc[0]))

        watcher = threading.Thread(target=watch)
        watcher.start()
        publication.results_database(small.workspace(), force=True)
        held.stdin.write(b"\n")
        held.stdin.flush()
        outcome.expect(int(held.stdout.readline()) == before, "the open connection sees something else")
        stop.set()
        watcher.join()
    outcome.expect(set(seen) <= {before, before - 1} and len(seen) > 0, f"readers saw {set(seen)}")
    outcome.expect(int(query_database(path, count)["n"].iloc[0]) == before - 1, "the new one is not there")
    return outcome


@fault("environment", "a clock that jumps")
def clock(bench: Bench) -> Outcome:
    """Files from 1971 and from 2099, a run whose clock is ten years behind: no partition is made again for it."""
    small = bench.copy()
    root = Path(str(small.storage.root))
    for number, file in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        if "dagster" in file.relative_to(root).parts:
            continue
        when = dt.datetime(1971 if number % 2 else 2099, 5, 5, tzinfo=dt.UTC).timestamp()
        os.utime(file, (when, when))
    outcome = Outcome("nothing is stale, results are the same")
    forget(small.storage, "maps")
    real, shift = time.time, 3650 * 86_400.0
    past = dt.datetime.now(dt.UTC).replace(tzinfo=None) - dt.timedelta(seconds=shift)
    with mock.patch.object(base, "utc_now", lambda: past), mock.patch("time.time", lambda: real() - shift):
        made = small.run(only=("glacier_predictions", "glacier_areas"))
    outcome.expect(made.failed == [], f"fails: {made.failed}")
    outcome.expect({t.assets for t in made.timings} <= {("glacier_predictions",), ("glacier_areas",)}, "more was made")
    again = small.run()
    outcome.expect(again.failed == [], f"fails: {again.failed}")
    outcome.lost += differences(small.storage, bench.small.storage)
    third = small.run()
    outcome.expect(third.timings == [], f"made a third time: {[t.assets for t in third.timings]}")
    # One partition is made again beside one from the future, by a clock that is behind: it is read, not remembered.
    site, part = small.workspace().site, {"year": 2016, "fold": 1}
    file = Path(str(small.storage.table("areas", part)))
    rows = base.cached_table(site, "areas", **part)
    small.storage.write_table("areas", rows.assign(area_km2=rows["area_km2"] + 1).drop(columns=list(part)), part)
    os.utime(file, (0, 0))
    now = base.cached_table(site, "areas", **part)["area_km2"]
    outcome.expect(bool((now == rows["area_km2"] + 1).all()), "an older table is remembered")
    return outcome


@fault("environment", "a damaged cube and a damaged map")
def bit_rot(bench: Bench) -> Outcome:
    """The disk lost a block of one and the end of the other: one run removes them, the next makes them again."""
    small = bench.copy(linked=("inputs",))
    root = Path(str(small.storage.root))
    tested = small.storage.read_table("predictions", year=2016, fold=1)["glacier_id"].tolist()
    cube, mapped = Path(str(small.storage.cube(2016, tested[0]))), Path(str(small.storage.prediction(2016, tested[1])))
    content = cube.read_bytes()
    third = len(content) // 3
    cube.write_bytes(content[:third] + bytes(third) + content[2 * third :])
    mapped.write_bytes(mapped.read_bytes()[: mapped.stat().st_size // 2])
    areas.glacier_areas(small.workspace(), 2016, 1, force=True)
    told = small.storage.read_table("failures", stage="glacier_areas", partition="2016.fold_1")
    outcome = Outcome(" ".join(told["error"].iloc[0].split()) if len(told) else "")
    outcome.names("was damaged", "makes it again", str(root))
    outcome.expect(set(told["glacier_id"]) == {tested[0], tested[1]}, f"failures: {told['glacier_id'].tolist()}")
    outcome.expect(not cube.exists() and not mapped.exists(), "a damaged file is left in its place")
    made = small.run()
    outcome.expect(made.failed == [], f"fails: {made.failed}")
    outcome.lost += differences(small.storage, bench.small.storage)
    return outcome


def _at_work_alone(folder: str, key: int) -> int:
    """Work that needs all the memory: the kernel kills it where another is at work."""
    mine = Path(folder) / f"{key}-{os.getpid()}"
    mine.touch()
    try:
        for _ in range(10):
            time.sleep(0.02)
            others = [p for p in Path(folder).iterdir() if p != mine and psutil.pid_exists(int(p.name.split("-")[1]))]
            if others:
                mine.unlink()
                (Path(folder).parent / f"{Path(folder).name}-ran-out").touch()
                os.kill(os.getpid(), signal.SIGKILL)
    finally:
        mine.unlink(missing_ok=True)
    return key


def _allocates_alone(folder: str, key: int) -> int:
    """As before, but Python is told that there is no memory."""
    import numpy as np

    mine = Path(folder) / f"{key}-{os.getpid()}"
    mine.touch()
    try:
        time.sleep(0.5)
        if len([p for p in Path(folder).iterdir() if p.name != "ran-out"]) > 1:
            (Path(folder) / "ran-out").touch()
            np.ones((1 << 46,))  # 512 TiB
        time.sleep(0.1)
    finally:
        mine.unlink(missing_ok=True)
    return key


def _allocates_later(folder: str, key: int) -> int:
    """In one process: too much for as long as the first tasks' memory is not given back."""
    import numpy as np

    first = Path(folder) / "ran-out"
    if key == 2 and not first.exists():
        first.touch()
        np.ones((1 << 46,))  # 512 TiB
    return key


@fault("environment", "workers that die of memory")
def memory(bench: Bench) -> Outcome:
    """What failed for want of memory beside others is done again alone."""
    outcome = Outcome("done again, one at a time")
    try:
        # The kill is last: a worker that is being started again leaves the other one alone.
        for function, workers in ((_allocates_later, 1), (_allocates_alone, 2), (_at_work_alone, 2)):
            folder = bench.folder / function.__name__
            folder.mkdir()
            done = list(Mapper(workers).map(function, [(str(k), (str(folder), k)) for k in range(6)]))
            wrong = [(d.key, d.error) for d in done if not d.ok or d.value != int(d.key)]
            outcome.expect(len(done) == 6 and not wrong, f"{function.__name__}: {wrong}")
            marks = (folder / "ran-out", folder.with_name(f"{folder.name}-ran-out"))
            outcome.expect(any(mark.exists() for mark in marks), f"{function.__name__}: memory never ran out")
    finally:
        close_clusters()
    return outcome


@fault("environment", "a store of a newer version")
def newer(bench: Bench) -> Outcome:
    small = bench.copy(without=("inputs", "cubes", "models", "packed", "predictions"))
    (Path(str(small.storage.root)) / "store.json").write_text(json.dumps({"format": FORMAT + 1, "written_by": "9.9"}))
    result = small.cli("status")
    code, told = _run(small)
    outcome = Outcome(told)
    outcome.names("9.9", "pip install -U", "DL4GAM_HOME")
    outcome.expect(code != 0, "the run says that all is well")
    outcome.expect(
        result.exit_code != 0 and "9.9" in result.output, f"status answers all the same: {result.output[:200]}"
    )
    return outcome


@fault("environment", "a store of an older version")
def older(bench: Bench) -> Outcome:
    """One of an unknown format is refused; one without the mark (the first stores) is worked with, and marked."""
    small = bench.copy(without=("inputs", "cubes", "models", "packed", "predictions"))
    mark = Path(str(small.storage.root)) / "store.json"
    mark.write_text(json.dumps({"format": 0, "written_by": "0.0"}))
    outcome = Outcome("")
    with contextlib.suppress(StoreFormatError):
        small.storage.check_format(write=True)
        outcome.expect(False, "is taken")
    try:
        small.storage.check_format()
    except StoreFormatError as error:
        outcome.said = str(error)
    outcome.names("format 0", "DL4GAM_HOME")
    with mock.patch.dict("dl4gam_assets.storage.MIGRATIONS", {0: lambda s: s.write_text(s.path("migrated"), "yes")}):
        small.storage.check_format(write=True)
    outcome.expect((mark.parent / "migrated").read_text() == "yes", "the migration was not run")
    outcome.expect(json.loads(mark.read_text())["format"] == FORMAT, "the mark was not raised")
    mark.unlink()
    small.storage.check_format(write=True)
    outcome.expect(json.loads(mark.read_text())["format"] == FORMAT, "an unmarked store was not marked")
    return outcome


@fault("environment", "a daemon that restarts in a backfill", long=True)
def daemon(bench: Bench) -> Outcome:
    """The test of the deployment: a backfill from the UI's interface, its daemon killed and started again."""
    tests = Path(__file__).parents[1] / "deployment" / "test_daemon.py"
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(tests)],
        cwd=tests.parents[2], capture_output=True, check=False,
    )  # fmt: skip
    outcome = Outcome("the backfill goes on where it was")
    outcome.expect(made.returncode == 0, made.stdout.decode()[-500:])
    return outcome
