"""The short version of `make faults`: a few kills while maps and tables are made."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
import rasterio

from dl4gam_assets_tests.faults.kills import differences, half_written, killed
from dl4gam_assets_tests.small_region import Small


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("work", "kills", "seconds"), [("maps", 3, 16.0), ("database", 2, 10.0)])
def test_a_killed_run_ends_with_the_results_of_an_undisturbed_one(
    small: Small, tmp_path: Path, work: str, kills: int, seconds: float
) -> None:
    result = killed(small.copy(tmp_path / work), small.storage, work, kills, seed=5, seconds=seconds)
    assert result.wrong == [] and result.kills == kills


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
