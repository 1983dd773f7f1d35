"""Partitions that a run left half made: what their state says, who may read them, and tables kept in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import base
from dl4gam_assets.stages.base import StageResult, UpstreamError, Workspace, cached_table, run_stage
from dl4gam_assets.storage import Storage

WHERE = {"fold": 1}


class Killed(BaseException):
    """Ends a stage as a kill does: nothing that it left to do is done."""


def frame(mean: float) -> pd.DataFrame:
    return pd.DataFrame([{"channel": "red", "mean": mean, "std": 1.0, "standardized": True}])


def stage(ws: Workspace, value: float, end: BaseException | None = None, *, write: bool = True) -> StageResult:
    """A stage whose one input is the value that its table holds."""

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        if write:
            ws.storage.write_table("normalization", frame(value), WHERE)
        if end is not None:
            raise end
        return f"of {value}", {}, {}

    return run_stage(ws, "normalization", "fold_1", {"value": value}, work)


def reader(ws: Workspace, setting: int) -> StageResult:
    """A stage that is made from the other one."""

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        return str(held(ws)), {"mean": held(ws)}, {}

    return run_stage(ws, "ensemble", "fold_1", {"of": [ws.upstream("normalization", "fold_1")], "n": setting}, work)


def held(ws: Workspace) -> float:
    return float(ws.storage.read_table("normalization", **WHERE)["mean"].iloc[0])


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace(load_region("demo"), Storage(tmp_path))


@pytest.mark.parametrize("end", [Killed(), OSError("no space left")])
def test_after_a_stop_under_other_settings_the_old_ones_are_made_again(ws: Workspace, end: BaseException) -> None:
    stage(ws, 1.0)
    reader(ws, 0)
    with pytest.raises(type(end)):
        stage(ws, 2.0, end)
    assert held(ws) == 2.0  # the file is of the run that was stopped
    assert reader(ws, 0).unchanged  # was made before it
    with pytest.raises(UpstreamError, match=r"stopped while it wrote normalization \[fold_1\]"):
        reader(ws, 1)  # the fingerprint says 1.0, the file 2.0
    again = stage(ws, 1.0)
    assert not again.unchanged and held(ws) == 1.0
    assert stage(ws, 1.0).unchanged and reader(ws, 1).metadata["mean"] == 1.0


def test_the_same_work_twice_at_once_is_no_hindrance(ws: Workspace) -> None:
    """A second run marks what the first one has just finished, and dies: the files are of the same inputs."""
    stage(ws, 1.0)
    with pytest.raises(Killed), base.making(ws.storage, "normalization", "fold_1", _input(ws)):
        raise Killed
    assert not reader(ws, 0).unchanged  # made, not refused
    assert not stage(ws, 1.0).unchanged


def _input(ws: Workspace) -> str:
    state = ws.storage.read_state("normalization", "fold_1")
    assert state is not None
    return str(state["input"])


def test_what_fails_before_it_writes_leaves_what_was_there(ws: Workspace) -> None:
    stage(ws, 1.0)
    before = ws.storage.read_state("normalization", "fold_1")
    with pytest.raises(UpstreamError):
        stage(ws, 2.0, UpstreamError("the catalog does not answer"), write=False)
    assert ws.storage.read_state("normalization", "fold_1") == before
    assert stage(ws, 1.0).unchanged and not reader(ws, 0).unchanged


def test_a_glacier_that_was_written_by_a_worker_counts(ws: Workspace) -> None:
    """Files of glaciers are written by other processes: the map over glaciers tells."""
    stage(ws, 1.0)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        ws.over_glaciers("glacier_cubes", "2015", str, [("a", ("a",))])
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        run_stage(ws, "normalization", "fold_1", {"value": 2.0}, work)
    with pytest.raises(UpstreamError, match="materialize normalization first"):
        reader(ws, 0)


def test_a_stopped_run_is_told_as_stale(ws: Workspace) -> None:
    stage(ws, 1.0)
    with pytest.raises(Killed):
        stage(ws, 2.0, Killed())
    ws.probe = True
    told = stage(ws, 1.0)
    assert not told.unchanged and "stopped" in told.changed[0]


# ----------------------------------------------------------------------------------------------------- tables in memory
def test_a_table_is_read_again_beside_a_file_from_the_future(ws: Workspace) -> None:
    """One partition is rewritten with other values while another's clock was ahead."""
    for fold in (1, 2):
        ws.storage.write_table("normalization", frame(fold), {"fold": fold})
    future = Path(str(ws.storage.table("normalization", {"fold": 2})))
    os.utime(future, (4e9, 4e9))
    assert cached_table(ws.site, "normalization", fold=1)["mean"].tolist() == [1.0]
    assert cached_table(ws.site, "normalization", fold=1) is cached_table(ws.site, "normalization", fold=1)
    mine = Path(str(ws.storage.table("normalization", {"fold": 1})))
    times = (mine.stat().st_atime_ns, mine.stat().st_mtime_ns)
    ws.storage.write_table("normalization", frame(7.0), {"fold": 1})
    os.utime(mine, ns=times)  # a clock that was set back
    assert cached_table(ws.site, "normalization", fold=1)["mean"].tolist() == [7.0]
    assert sorted(cached_table(ws.site, "normalization")["mean"]) == [2.0, 7.0]


def test_a_table_in_an_object_store_is_read_again() -> None:
    site = Workspace(load_region("demo"), Storage("memory://unfinished")).site
    site.storage.write_table("normalization", frame(1.0), WHERE)
    assert cached_table(site, "normalization", **WHERE)["mean"].tolist() == [1.0]
    site.storage.write_table("normalization", frame(7.0), WHERE)
    assert cached_table(site, "normalization", **WHERE)["mean"].tolist() == [7.0]


# -------------------------------------------------------------------------------------------------------- input files
def test_a_change_in_the_middle_of_a_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dem.tif"
    file.write_bytes(bytes(6 << 20))
    before = base.file_fingerprint(file)
    with open(file, "r+b") as handle:
        handle.seek(3 << 20)
        handle.write(b"x")
    assert base.file_fingerprint(file) != before
    monkeypatch.setattr(base, "_HASHED_WHOLE", 1 << 20)
    monkeypatch.setattr(base, "_SAMPLE", 1024)
    base._file_hash.cache_clear()
    large = base.file_fingerprint(file)
    with open(file, "r+b") as handle:  # in none of the samples
        handle.seek((3 << 20) + 5)
        handle.write(b"y")
    assert base.file_fingerprint(file) != large
    base._file_hash.cache_clear()
