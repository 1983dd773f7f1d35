"""Storage: names, atomic writes, tables, object stores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import box
from upath import UPath

from dl4gam_assets.storage import Storage, glacier_id_of, safe_name
from dl4gam_assets.tables import TABLES, TableError


@given(st.text(min_size=1, max_size=15))
def test_safe_names_are_reversible_and_stay_in_their_folder(glacier_id: str) -> None:
    try:
        name = safe_name(glacier_id)
    except UnicodeEncodeError:
        pytest.skip("lone surrogates are no text")
    assert glacier_id_of(name) == glacier_id
    assert name not in {"", ".", ".."} and not name.startswith(".")
    assert "/" not in name and "\\" not in name and "\n" not in name and "'" not in name


@pytest.mark.parametrize("glacier_id", ["", "x" * 1000])
def test_names_that_can_not_be_files_are_refused(glacier_id: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        safe_name(glacier_id)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    path = storage.path("a", "b.txt")
    storage.write_text(path, "first")
    with pytest.raises(RuntimeError), storage.writing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("power cut")
    assert path.read_text() == "first"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    old, new = tmp_path / ".tmp-old-x.nc", tmp_path / ".tmp-new-x.nc"
    for file in (old, new):
        file.write_text("half")
    os.utime(old, (0, 0))
    assert storage.remove_stale() == 1
    assert new.exists() and not old.exists()


def test_temporary_files_of_a_process_that_is_gone_are_removed_at_once(tmp_path: Path) -> None:
    """Killed in the middle of writing; another one that is still at work keeps its own."""
    write = (
        "import os, signal; from dl4gam_assets.storage import Storage\n"
        f"s = Storage({str(tmp_path)!r})\n"
        "with s.writing(s.path('a', 'b.txt')) as t:\n    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", write], check=False).returncode == -signal.SIGKILL
    storage = Storage(tmp_path)
    (left,) = (tmp_path / "a").iterdir()
    assert left.name.startswith(".tmp-")
    with storage.writing(storage.path("a", "c.txt")) as mine:
        mine.write_text("at work")
        os.utime(mine)
        elsewhere = mine.with_name(".tmp-another_1-4000000-x.txt")
        elsewhere.write_text("of another machine")
        assert storage.remove_stale() == 1
        assert not left.exists() and mine.exists() and elsewhere.exists()


def _taus(**values: float) -> pd.DataFrame:
    return pd.DataFrame({"glacier_id": list(values), "tau": list(values.values())})


def test_tables_keep_types_and_partitions(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_table("taus", _taus(a=0.1, b=0.2), {"fold": 1})
    storage.write_table("taus", _taus(c=0.3), {"fold": 2})
    both = storage.read_table("taus")
    assert both["fold"].tolist() == [1, 1, 2]
    assert storage.read_table("taus", fold=2)["glacier_id"].tolist() == ["c"]
    assert storage.read_table("taus", fold=[1, 2])["tau"].sum() == pytest.approx(0.6)
    storage.write_table("taus", _taus(z=0.4), {"fold": 1})  # replaces
    assert set(storage.read_table("taus")["glacier_id"]) == {"z", "c"}
    empty = storage.read_table("areas", year=2020)
    assert len(empty) == 0 and list(empty.columns) == [c.name for c in TABLES["areas"].columns]


def test_ids_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_table("taus", pd.DataFrame({"glacier_id": ["007", "1e5"], "tau": [0.1, 0.2]}), {"fold": 1})
    assert storage.read_table("taus")["glacier_id"].tolist() == ["007", "1e5"]


def test_geometry_tables_are_geoparquet(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    frame = gpd.GeoDataFrame(
        {"glacier_id": ["a"], "bound": ["best"], "area_km2": [1.0]},
        geometry=[box(0, 0, 1, 1)],
        crs="EPSG:4326",
    )
    storage.write_table("outlines", frame, {"year": 2020})
    again = storage.read_table("outlines")
    assert isinstance(again, gpd.GeoDataFrame) and again.crs.to_epsg() == 4326
    assert again.geometry.iloc[0].equals(box(0, 0, 1, 1)) and again["year"].tolist() == [2020]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (_taus(a=0.7), "outside"),
        (pd.DataFrame({"glacier_id": ["a", "a"], "tau": [0.1, 0.2]}), "duplicate"),
        (pd.DataFrame({"glacier_id": [None], "tau": [0.1]}), "empty"),
        (pd.DataFrame({"glacier_id": ["a"]}), "missing"),
        (pd.DataFrame({"glacier_id": ["a"], "tau": ["x"]}), "not float64"),
        (pd.DataFrame({"glacier_id": ["a"], "tau": [0.1], "size": [1]}), "unknown columns"),
    ],
)
def test_wrong_frames_are_refused_with_the_reason(tmp_path: Path, frame: pd.DataFrame, words: str) -> None:
    with pytest.raises(TableError, match=words):
        Storage(tmp_path).write_table("taus", frame, {"fold": 1})
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_object_store_serves_as_root() -> None:
    storage = Storage(UPath("memory://bucket/region"))
    assert not storage.is_local
    storage.write_table("taus", _taus(a=0.1), {"fold": 3})
    assert storage.read_table("taus")["fold"].tolist() == [3]
    storage.write_state("asset", "2020", {"input": "x"})
    assert storage.read_state("asset", "2020") == {"input": "x"}
    assert storage.read_state("asset", "2021") is None
