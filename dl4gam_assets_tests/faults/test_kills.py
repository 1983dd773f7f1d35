"""The short version of `make faults`: a few kills while maps and tables are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl4gam_assets_tests.faults.kills import differences, half_written, killed
from dl4gam_assets_tests.small_region import Small


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("work", "kills", "seconds"), [("maps", 3, 16.0), ("database", 2, 10.0)])
def test_a_killed_run_ends_with_the_results_of_an_undisturbed_one(
    small: Small, tmp_path: Path, work: str, kills: int, seconds: float
) -> None:
    result = killed(small.copy(tmp_path / work), small.storage, work, kills, seed=5, seconds=seconds)
    assert result.wrong == [] and result.kills >= 1


def test_what_is_wrong_is_found(small: Small, tmp_path: Path) -> None:
    copy = small.copy(tmp_path / "copy")
    assert half_written(copy.storage) == [] and differences(copy.storage, small.storage) == []
    cube = next(Path(str(copy.storage.root)).glob("cubes/*/*.nc"))
    cube.write_bytes(cube.read_bytes()[:2000])
    areas = copy.storage.read_table("areas", year=2016, fold=1)
    copy.storage.write_table("areas", areas.assign(area_km2=areas["area_km2"] + 1e-4), {"year": 2016, "fold": 1})
    weights = next(Path(str(copy.storage.root)).glob("models/**/model.safetensors"))
    weights.unlink()
    (damaged,) = half_written(copy.storage)
    assert cube.name in damaged
    assert [w.split(":")[0].split(" ")[0:2] for w in differences(copy.storage, small.storage)] == [
        ["table", "areas"], ["weights", str(weights.relative_to(Path(str(copy.storage.root))))],
    ]  # fmt: skip
