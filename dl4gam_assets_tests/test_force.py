"""``dl4gam materialize --force``: what is asked for is made again, although nothing changed, and nothing else."""

from __future__ import annotations

from pathlib import Path

from dl4gam_assets.orchestrate import FAMILIES
from dl4gam_assets_tests.small_region import Small


def _times(region: Small) -> dict[str, int]:
    root = Path(str(region.storage.root))
    files = (f for name in ("candidates", "cubes", "state") for f in (root / name).rglob("*") if f.is_file())
    return {str(f.relative_to(root)): f.stat().st_mtime_ns for f in files}


def test_force_makes_what_is_asked_for_again_and_nothing_else(tmp_path: Path) -> None:
    region = Small(tmp_path)
    region.change(simulation__size_px=[480, 480], years={"first": 2015, "last": 2016, "baseline": 2015})
    first = [name for _, names in FAMILIES[:3] for name in names]
    assert first[-1] == "glacier_cubes" and region.run(only=first).failed == []
    content = region.storage.read_state("glacier_cubes", "2016")
    words = ("materialize", "--only", "scene_candidates", "--only", "glacier_cubes", "--year", "2016")
    before = _times(region)
    done = region.cli(*words)
    assert done.exit_code == 0 and "up to date" in done.output and _times(region) == before
    done = region.cli(*words, "--force")
    assert done.exit_code == 0 and "up to date" not in done.output
    now = _times(region)
    made = {name for name in now if before.get(name) != now[name]}
    results = {name for name in before if name.startswith(("candidates/year=2016/", "cubes/year=2016/"))}
    states = {f"state/{asset}/2016.json" for asset in ("scene_candidates", "glacier_cubes")}
    assert results and results | states <= made and not any("2015" in name for name in made)
    searched, built = (region.storage.read_state(asset, "2016") for asset in ("scene_candidates", "glacier_cubes"))
    assert searched is not None and searched["metadata"]["scored_now"] == searched["metadata"]["glaciers"] > 0
    assert content is not None and built is not None and built["output"] == content["output"]  # nothing follows
