"""Packaged regions: they load, say what they are, and a wrong key is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dl4gam_assets import settings as s
from dl4gam_assets_tests.region_files import packaged

FOLDER = Path(s.__file__).parent / "regions"
SAMPLE_REGIONS = ["khumbu", "oetztal", "swiss"]


@pytest.mark.parametrize("name", s.packaged_regions())
def test_region_loads_under_its_own_name(name: str) -> None:
    region = s.load_region(name)
    assert region.name == name
    assert region.title
    assert region.description
    assert region.years.baseline in region.years.all()
    assert s.load_region(FOLDER / f"{name}.yaml") == region


def test_the_regions_that_the_docs_name_are_packaged() -> None:
    assert {"alps", *SAMPLE_REGIONS} <= set(s.packaged_regions())


def test_alps_is_the_published_configuration() -> None:
    """Every section that the published method fixes equals the documented defaults."""
    alps = s.load_region("alps")
    for section in ("folds", "model", "training", "inference", "calibration", "change"):
        value = getattr(alps, section)
        assert value == type(value)(), section
    assert alps.imagery.selection == s.SelectionSettings()
    assert alps.imagery.window == ("08-01", "10-15")
    assert alps.imagery.baseline.mode == "inventory_date"
    assert len(alps.model.channels) == 16
    assert alps.folds.n * alps.training.members == 50
    assert (alps.years.first, alps.years.last, alps.years.baseline) == (2015, None, 2015)


@pytest.mark.parametrize("name", SAMPLE_REGIONS)
def test_sample_regions_need_no_machine_path_and_say_what_they_can_not_tell(name: str) -> None:
    region = s.load_region(name)
    assert region.data_root == "${DL4GAM_REAL_DATA}"
    assert len(region.evaluation.note) > 40
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert not re.search(r"(?m)[:\s]/(?:home|root|tmp|work|mnt)\b", text)


def test_simulated_region_is_named_as_simulated() -> None:
    region = s.load_region("oetztal")
    assert region.simulation is not None
    assert region.simulation.kind == "drape"
    for text in (region.title, region.evaluation.note, region.imagery.sensor.name):
        assert "simulated" in text


@pytest.mark.parametrize("name", SAMPLE_REGIONS)
def test_files_of_sample_regions_are_there(name: str, real_data: Path) -> None:
    region = s.load_region(name)
    named = []
    if region.simulation is None:
        named += [region.inventory.path, *(d.path for d in region.inventory.debris), *region.terrain.dem]
        named += [region.evaluation.reference] if region.evaluation.reference else []
        for pattern in region.inventory.model_within:
            assert list(real_data.glob(pattern)), pattern
    else:
        named += [region.simulation.dem, region.simulation.outlines]
    for path in named:
        assert (real_data / path).exists(), path


@pytest.mark.parametrize(("name", "files", "dates"), [("swiss", 33, 20), ("khumbu", 2, 1)])
def test_scene_patterns_match_the_sample_files(name: str, files: int, dates: int, real_data: Path) -> None:
    import datetime as dt

    catalog = s.load_region(name).imagery.catalog
    assert isinstance(catalog, s.SceneFolder)
    folder = real_data / catalog.path
    found = [re.search(catalog.pattern, p.relative_to(folder).as_posix()) for p in folder.rglob("*.tif")]
    matches = [m for m in found if m]
    assert len(matches) == files
    for match in matches:
        assert (match.groupdict().get("suffix") or "") in catalog.band_order
    days = {dt.datetime.strptime(m["date"], catalog.date_format).date() for m in matches}
    assert all(2000 <= d.year <= 2018 for d in days)
    assert len(days) >= dates


# --------------------------------------------------------------------------------------------- wrong files
def write(tmp_path: Path, change: dict[str, object], name: str = "swiss") -> Path:
    raw = packaged(name)
    s.override(raw, change)
    path = tmp_path / "region.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"training.epoch": 3}, ["training.epoch", "unknown key", "'epochs'"]),
        ({"imagery.catalog.patern": "x"}, ["imagery.catalog.patern", "unknown key", "'pattern'"]),
        (
            {"inventory.columns.glacierid": "x"},
            ["inventory.columns.glacierid", "unknown key", "'glacier_id'"],
        ),
        ({"trainning": {}}, ["trainning", "unknown key", "'training'"]),
        ({"model.channels": ["blue", "nir_narow"]}, ["nir_narow", "did you mean 'nir_narrow'"]),
        ({"model.channels": ["ndsi"]}, ["ndsi", "green", "swir16"]),
        ({"model.channels": ["blue", "slope"]}, ["slope", "terrain.dem"]),
        ({"model.channels": ["blue", "blue"]}, ["channels must not repeat"]),
        (
            {"model.channels": ["blue", "cos_aspect"], "terrain.dem": ["dem.tif"], "training.augmentation": True},
            ["model.channels", "needs both sin_aspect and cos_aspect", "only cos_aspect"],
        ),
        ({"training.epochs": 0}, ["training.epochs", "greater than or equal to 1", "given: 0"]),
        ({"training.patch_px": 100}, ["training.patch_px", "multiple of 32"]),
        ({"inventory.buffers_m": [0, 20]}, ["inventory", "buffers_m", "50"]),
        ({"inventory.prepare": "sgi2010"}, ["inventory.prepare", "sgi2016"]),
        ({"years.baseline": 2030}, ["years", "baseline must be one of the years"]),
        ({"imagery.window": ["08-01", "15-10"]}, ["imagery", "month"]),
        ({"imagery.baseline.end": "2014-01-01"}, ["imagery.baseline", "start not after end"]),
        ({"name": "Swiss Alps"}, ["name", "pattern"]),
    ],
)
def test_wrong_key_or_value_is_explained(tmp_path: Path, change: dict[str, object], parts: list[str]) -> None:
    path = write(tmp_path, change)
    with pytest.raises(s.SettingsError) as error:
        s.load_region(path)
    message = str(error.value)
    assert str(path) in message
    for part in parts:
        assert part in message, message


def test_every_wrong_key_is_listed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {"training.epoch": 3, "folds.number": 2, "imagery.sensor.pixel": 10})
    with pytest.raises(s.SettingsError) as error:
        s.load_region(path)
    assert len(str(error.value).splitlines()) == 4


def test_missing_section_and_unknown_region_are_named(tmp_path: Path) -> None:
    with pytest.raises(s.SettingsError, match="years: required"):
        s.parse_region({"name": "x", "inventory": {"path": "a"}})
    with pytest.raises(s.SettingsError, match="Did you mean 'swiss'"):
        s.load_region("swis")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [", encoding="utf-8")
    with pytest.raises(s.SettingsError, match="not valid YAML"):
        s.load_region(bad)


# --------------------------------------------------------------------------------------------- fingerprints
def test_fingerprint_does_not_depend_on_key_order_place_or_compute(tmp_path: Path) -> None:
    region = s.load_region("swiss")
    raw = packaged("swiss")
    turned = s.parse_region(dict(reversed(raw.items())))
    assert turned.fingerprint() == region.fingerprint() == s.load_region("swiss").fingerprint()
    moved = s.load_region("swiss", {"data_root": "elsewhere", "compute.workers": 3})
    assert moved.fingerprint() == region.fingerprint()


def test_fingerprint_changes_with_what_changes_results() -> None:
    region = s.load_region("swiss")
    other = s.load_region("swiss", {"training.epochs": 11})
    assert other.fingerprint() != region.fingerprint()
    assert other.fingerprint("training") != region.fingerprint("training")
    assert other.fingerprint("inventory", "imagery") == region.fingerprint("imagery", "inventory")
    explicit = s.load_region("swiss", {"folds.n": region.folds.n})
    assert explicit.fingerprint() == region.fingerprint()
    assert re.fullmatch(r"[0-9a-f]{16}", region.fingerprint())
    everyone = {name: s.load_region(name).fingerprint() for name in s.packaged_regions()}
    assert len(set(everyone.values())) == len(everyone)
