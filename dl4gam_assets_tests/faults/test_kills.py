"""The short version of `make faults`: a few kills while maps and tables are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pandas as pd
import pytest
import rasterio

from dl4gam_assets_tests.faults.kills import differences, forget, half_written, kill, killed
from dl4gam_assets_tests.small_region import Small


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("work", "kills", "seconds"), [("maps", 3, 16.0), ("database", 2, 10.0)])
def test_a_killed_run_ends_with_the_results_of_an_undisturbed_one(
    small: Small, tmp_path: Path, work: str, kills: int, seconds: float
) -> None:
    result = killed(small.copy(tmp_path / work), small.storage, work, kills, seed=5, seconds=seconds)
    assert result.wrong == [] and result.kills == kills


_PARTITION = """
import sys
import dagster as dg
from dl4gam_assets.definitions import defs
from dl4gam_assets.orchestrate import instance
from dl4gam_assets.storage import Storage
from dl4gam_assets.upkeep import give_up_lost_runs, own_process

if __name__ == "__main__":
    key = dg.AssetKey("ensemble_member")
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={key})
    with instance(Storage(sys.argv[1])) as opened:
        give_up_lost_runs(opened)  # as the daemon does, or the run waits for the pool of the killed one
        done = job.execute_in_process(instance=opened, partition_key=sys.argv[2], tags=own_process())
    sys.exit(not done.success)
"""


def _launch(small: Small, partition: str) -> subprocess.Popen[bytes]:
    """A run of one partition of ``ensemble_member`` in a process of its own."""
    environment = os.environ | {"DL4GAM_HOME": str(small.home), "DL4GAM_REGION": str(small.yaml)}
    return subprocess.Popen(
        [sys.executable, "-c", _PARTITION, str(small.storage.root), partition],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.mark.timeout(900)
def test_a_killed_partition_of_a_member_goes_on_in_the_next_run(small: Small, tmp_path: Path) -> None:
    """kill -9 to a Dagster run while it trains; launched again it trains the epochs that are left, to the same bits."""
    copy = small.copy(tmp_path / "copy")
    forget(copy.storage, "training")
    root = Path(str(copy.storage.root))
    state, model = root / "work" / "fold=1" / "member=01" / "state.json", root / "models" / "fold=1" / "member=01"
    first, limit = _launch(copy, "fold_1|member_01"), time.monotonic() + 400
    while not state.exists() or len(json.loads(state.read_text())["history"]) < 2:
        assert first.poll() is None, first.stderr and first.stderr.read().decode()[-1500:]
        assert time.monotonic() < limit, "the member did not reach its second epoch"
        time.sleep(0.005)
    kill(first)
    before = json.loads(state.read_text())["history"]
    assert 2 <= len(before) < copy.region.training.epochs and not model.exists()
    second = _launch(copy, "fold_1|member_01")
    _, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors.decode()[-1500:]
    history = pd.read_parquet(model / "history.parquet")
    # What was measured in the epochs before the kill is still there: the second run began after them.
    assert history["seconds"].tolist()[: len(before)] == [row["seconds"] for row in before]
    assert history["epoch"].tolist() == list(range(1, copy.region.training.epochs + 1))
    there = Path(str(small.storage.root)) / "models" / "fold=1" / "member=01" / "model.safetensors"
    assert (model / "model.safetensors").read_bytes() == there.read_bytes()
    assert not state.exists()


def test_what_is_wrong_is_found(small: Small, tmp_path: Path) -> None:
    copy = small.copy(tmp_path / "copy")
    assert half_written(copy.storage) == [] and differences(copy.storage, small.storage) == []
    cube = next(Path(str(copy.storage.root)).glob("cubes/*/*.nc"))
    cube.write_bytes(cube.read_bytes()[:2000])
    areas = copy.storage.read_table("areas", year=2016, fold=1)
    copy.storage.write_table("areas", areas.assign(area_km2=areas["area_km2"] + 1e-4), {"year": 2016, "fold": 1})
    weights = next(Path(str(copy.storage.root)).glob("models/**/model.safetensors"))
    weights.unlink()
    root = Path(str(copy.storage.root))
    (damaged,) = half_written(copy.storage)
    assert cube.name in damaged
    page = next(root.glob("reports/*.html"))
    page.write_text(page.read_text().replace("</body>", "<p>more</p></body>"))
    map_file = next(root.glob("predictions/*/*.tif"))
    with rasterio.open(map_file) as source:
        profile, tags, pixels = source.profile, source.tags(), source.read()
    pixels[0, 0, 0] ^= 1
    with rasterio.open(map_file, "w", **profile) as target:
        target.write(pixels)
        target.update_tags(**tags)
    with duckdb.connect(str(root / "results.duckdb")) as database:
        database.execute("update areas set area_km2 = area_km2 + 0.0001 where year = 2016")
    found = differences(copy.storage, small.storage)
    expected = [cube, page, map_file, weights, root / "results.duckdb"]
    assert len(found) == len(expected) + 1 and any(text.startswith("table areas") for text in found)
    assert all(any(str(file.relative_to(root)) in text for text in found) for file in expected)
