"""The export of a year: every format by its own validator, citation and checksums, all or nothing."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from pathlib import Path

import geopandas as gpd
import jsonschema
import pandas as pd
import pyarrow.parquet
import pyogrio
import pystac
import pystac.validation
import pytest
import yaml
from referencing import Registry, Resource

from dl4gam_assets.publication.export import ExportError, export_year
from dl4gam_assets.publication.stac import _MODEL, _PROCESSING, _PROJECTION, _RASTER, _SCIENTIFIC, write_stac
from dl4gam_assets.settings import PublicationSettings
from dl4gam_assets_tests.small_region import Small, leave_a_member

SCHEMAS = Path(__file__).parent / "schemas"
EXTENSIONS = {
    _MODEL: "mlm-v1.4.0", _PROCESSING: "processing-v1.1.0", _PROJECTION: "projection-v2.0.0",
    _SCIENTIFIC: "scientific-v1.0.0", _RASTER: "raster-v1.1.0",
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "small-2017"
    done = small.cli("export", str(folder), "--year", "2017", "--cubes")
    assert done.exit_code == 0, done.output
    return folder


def _registry() -> Registry[object]:
    """The extensions' schemas and those they refer to, all from files."""
    named = {}
    for file in SCHEMAS.glob("*-v*.json"):
        schema = json.loads(file.read_text())
        named[schema["$id"].rstrip("#")] = Resource.from_contents(schema)
        if "projjson" in file.name:
            named["https://proj.org/en/latest/schemas/v0.7/projjson.schema.json"] = Resource.from_contents(schema)
    core = Path(pystac.__file__).parent / "validation" / "jsonschemas"
    for file in core.rglob("*.json"):
        schema = json.loads(file.read_text())
        if "$id" in schema:
            named.setdefault(schema["$id"].rstrip("#"), Resource.from_contents(schema))
    return Registry().with_resources(named.items())


def _documents(folder: Path) -> list[Path]:
    return sorted((folder / "stac").rglob("*.json"))


def test_stac_documents_fit_the_core_and_every_extension_they_name(exported: Path) -> None:
    registry = _registry()
    seen = set()
    for file in _documents(exported):
        document = json.loads(file.read_text())
        pystac.validation.validate_dict(document | {"stac_extensions": []}, extensions=[])
        for name in document.get("stac_extensions", []):
            schema = json.loads((SCHEMAS / f"{EXTENSIONS[name]}.json").read_text())
            jsonschema.Draft7Validator(schema, registry=registry).validate(document)
            seen.add(name)
    assert seen == set(EXTENSIONS)
    broken = json.loads(next((exported / "stac" / "models").glob("*.json")).read_text())
    del broken["properties"]["mlm:architecture"]
    schema = json.loads((SCHEMAS / "mlm-v1.4.0.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match="mlm:architecture"):
        jsonschema.Draft7Validator(schema, registry=registry).validate(broken)


def test_every_link_of_the_catalog_leads_to_a_file_of_the_export(exported: Path, small: Small) -> None:
    catalog = pystac.Catalog.from_file(str(exported / "stac" / "catalog.json"))
    maps = [i for i in catalog.get_items(recursive=True) if "prediction" in i.assets]
    models = [i for i in catalog.get_items(recursive=True) if _MODEL in i.stac_extensions]
    assert len(maps) == len(small.storage.read_table("predictions", year=2017)) and len(models) == 2
    for item in [*maps, *models]:
        for asset in item.assets.values():
            assert Path(str(asset.get_absolute_href())).is_file() and not asset.href.startswith("/")
    for item in maps:
        (parent,) = item.get_links("derived_from")
        assert f"fold_{item.properties['dl4gam:fold']}.json" in str(parent.get_href())


def test_outlines_are_valid_geoparquet_and_a_styled_geopackage(exported: Path, small: Small) -> None:
    file = exported / "tables" / "outlines" / "year=2017" / "part.parquet"
    geo = json.loads(pyarrow.parquet.read_schema(file).metadata[b"geo"])
    column = geo["columns"][geo["primary_column"]]
    assert geo["version"] == "1.1.0" and column["encoding"] == "WKB" and column["crs"]["id"]["code"] == 4326
    assert set(column["geometry_types"]) <= {"Polygon", "MultiPolygon"} and column["covering"]["bbox"]["xmin"]
    outlines = gpd.read_parquet(file)
    assert outlines.geometry.is_valid.all()
    validator = pytest.importorskip("geoparquet_validator", reason="pip install geoparquet-validator for this test")
    report = validator.check(str(file))
    assert report["version"] == "1.1.0" and not validator.failed(report), validator.failed(report)
    assert {o["status"] for o in report["outcomes"] if o["id"].startswith("/conf/covering/")} == {"pass"}
    broken = exported.parent / "broken.parquet"
    del column["encoding"]
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"geo": json.dumps(geo)}), broken)
    assert "/conf/core/column-metadata" in validator.failed(validator.check(str(broken)))
    package = next((exported / "outlines").glob("*.gpkg"))
    layers = dict(pyogrio.list_layers(package))
    assert {"best", "lower", "upper", "inventory"} <= set(layers)
    best = gpd.read_file(package, layer="best")
    areas = small.storage.read_table("outlines", year=2017)
    assert best["area_km2"].sum() == pytest.approx(areas[areas["bound"] == "best"]["area_km2"].sum())
    with sqlite3.connect(package) as db:
        styles = db.execute("select f_table_name, styleQML, useAsDefault from layer_styles").fetchall()
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    import xml.etree.ElementTree as ET

    assert {name for name, _, _ in styles} == {"best", "lower", "upper", "inventory"}
    for _, text, default in styles:
        root = ET.fromstring(text.split("\n", 1)[1])
        assert root.find(".//layer").get("class") == "SimpleLine" and default == 1


def test_maps_are_cloud_optimized(exported: Path) -> None:
    from rio_cogeo.cogeo import cog_validate

    maps = sorted((exported / "predictions").rglob("*.tif"))
    assert maps
    for file in maps:
        valid, errors, _ = cog_validate(str(file), quiet=True)
        assert valid and not errors, errors


def test_cubes_follow_the_cf_conventions(exported: Path) -> None:
    compliance = pytest.importorskip("compliance_checker.runner", reason="pip install compliance-checker for this test")
    suite = pytest.importorskip("compliance_checker.suite").CheckSuite
    suite.load_all_available_checkers()
    cube = sorted((exported / "cubes").glob("*.nc"))[0]
    out = exported.parent / "cf.json"
    compliance.ComplianceChecker.run_checker(
        str(cube), ["cf:1.11"], 0, "normal", output_filename=str(out), output_format="json"
    )
    found = json.loads(out.read_text())["cf:1.11"]
    high = [m for check in found["high_priorities"] for m in check["msgs"]]
    assert not high, high


def _cff_validator() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads((SCHEMAS / "cff-v1.2.0.json").read_text()))


def test_citation_licence_and_checksums(exported: Path) -> None:
    cff = yaml.safe_load((exported / "CITATION.cff").read_text())
    _cff_validator().validate(cff)
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "dataset" and cff["authors"] and "simulated" in cff["title"]
    assert "Creative Commons" in (exported / "LICENSE.txt").read_text()
    deposit = json.loads((exported / ".zenodo.json").read_text())
    assert deposit["upload_type"] == "dataset" and deposit["license"] == "cc-by-4.0"
    lines = (exported / "SHA256SUMS").read_text().splitlines()
    listed = {line.split("  ", 1)[1]: line.split("  ", 1)[0] for line in lines}
    there = {f.relative_to(exported).as_posix() for f in exported.rglob("*") if f.is_file()}
    assert set(listed) == there - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert len(pd.read_csv(exported / "tables" / "areas.csv")) > 0


def test_the_readme_names_what_there_is_and_no_more(exported: Path, small: Small, tmp_path: Path) -> None:
    def named(folder: Path) -> list[str]:
        rows = re.findall(r"^\| `([^`]+)` \|", (folder / "README.md").read_text(), re.MULTILINE)
        return [name.strip() for row in rows for name in row.split(",")]

    assert {"models/", "cubes/*.nc"} <= set(named(exported))
    slim = tmp_path / "slim"
    export_year(small.storage, small.region, 2017, slim, weights=False)
    assert not {"models/", "cubes/*.nc"} & set(named(slim))
    for folder in (exported, slim):
        assert all(any(folder.glob(name.rstrip("/"))) for name in named(folder)), named(folder)
    aim = f"hold the true area in {small.region.calibration.coverage:.0%} of all cases"
    assert aim in (exported / "README.md").read_text()


def test_an_export_into_the_folder_one_stands_in(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = small.cli("export", ".", "--year", "2017", "--no-weights")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "SHA256SUMS").is_file() and (tmp_path / "outlines").is_dir()


def test_members_of_a_larger_ensemble_of_before_are_not_handed_on(small: Small, tmp_path: Path) -> None:
    copy = small.copy(tmp_path / "home")
    leave_a_member(copy)
    export_year(copy.storage, copy.region, 2017, tmp_path / "out")
    weights = sorted(f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("model.safetensors"))
    assert weights == [f"models/fold={f}/member={m:02d}/model.safetensors" for f in (1, 2) for m in (1, 2)]
    for file in (tmp_path / "out" / "stac" / "models").glob("*.json"):
        model = json.loads(file.read_text())
        assert sorted(model["assets"]) == ["member_01", "member_02"]
        assert model["properties"]["mlm:hyperparameters"]["members"] == 2


def test_models_are_described_as_they_were_trained(small: Small, tmp_path: Path) -> None:
    """Settings of now, which would train another network, do not change what is told of this one."""
    copy = small.copy(tmp_path / "home")
    copy.change(training__epochs=99, training__patch_px=128, model__encoder="resnet18")
    folder = tmp_path / "stac"
    write_stac(copy.storage, copy.region, 2017, folder)
    model = json.loads((folder / "models" / "fold_1.json").read_text())["properties"]
    assert model["mlm:input"][0]["input"]["shape"][-2:] == [64, 64]
    told = model["mlm:hyperparameters"]
    assert (told["epochs"], told["encoder"]) == (16, small.region.model.encoder) and told["precision"]


def test_authors_are_people_or_organizations(small: Small, tmp_path: Path) -> None:
    from dl4gam_assets.publication.export import citation_cff, zenodo

    settings = PublicationSettings.model_validate(
        {
            "authors": [{"family": "Muster", "given": "Ada", "orcid": "0000-0002-1825-0097"}, {"name": "Survey of X"}],
            "doi": "10.5281/zenodo.1",
            "license": "CC0-1.0",
        }
    )
    region = small.region.model_copy(update={"publication": settings})
    cff = yaml.safe_load(citation_cff(region, 2017))
    _cff_validator().validate(cff)
    with pytest.raises(jsonschema.ValidationError, match="orcid"):
        _cff_validator().validate(cff | {"authors": [{"orcid": "0000-0002-1825-0097"}]})
    assert [a.get("family-names", a.get("name")) for a in cff["authors"]] == ["Muster", "Survey of X"]
    assert cff["doi"] == "10.5281/zenodo.1" and zenodo(region, 2017)["creators"][0]["name"] == "Muster, Ada"
    with pytest.raises(ValueError, match=r"`family` \(a person\) or `name`"):
        PublicationSettings.model_validate({"authors": [{"given": "Ada"}]})


def test_all_or_nothing(small: Small, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ExportError, match="not empty"):
        export_year(small.storage, small.region, 2017, tmp_path / "full")
    with pytest.raises(ExportError, match="2031 has no areas"):
        export_year(small.storage, small.region, 2031, tmp_path / "none")
    copy = small.copy(tmp_path / "home") if (tmp_path / "home").mkdir() is None else small
    glacier = copy.storage.read_table("predictions", year=2017)["glacier_id"].iloc[-1]
    copy.storage.prediction(2017, glacier).unlink()
    with pytest.raises(ExportError, match="is missing"):
        export_year(copy.storage, copy.region, 2017, tmp_path / "half")
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".half*"))
