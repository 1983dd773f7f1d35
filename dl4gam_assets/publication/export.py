"""A year's results as a folder that is ready to be handed on: open formats, citation, licence, checksums.

Belongs here: which files an export holds, and what stands beside them. Does not belong here: making results.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd

from dl4gam_assets.publication.stac import Layout, write_stac
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage, safe_name

#: SPDX name -> title and address.
LICENSES = {
    "CC-BY-4.0": ("Creative Commons Attribution 4.0 International", "https://creativecommons.org/licenses/by/4.0/"),
    "CC0-1.0": ("Creative Commons Zero 1.0 Universal", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "ODbL-1.0": ("Open Data Commons Open Database License 1.0", "https://opendatacommons.org/licenses/odbl/1-0/"),
}
_METHOD = "Diaconu, C.-A. et al. (2025): DL4GAM. Earth and Space Science 12(9), e2025EA004197, doi:10.1029/2025EA004197"
#: Tables of the export (CSV): name -> whether only the year's rows are taken.
TABLES_OUT = {
    "areas": True, "changes": True, "regional_changes": False, "trends": False, "scenes": True, "failures": False,
    "lineage": True, "lineage_sources": True, "evaluation": False, "calibration": False,
}  # fmt: skip
#: Layer -> colour (Okabe and Ito, safe for colour-blind readers) and width in mm.
_STYLES = {
    "best": ("#d55e00", 0.5), "lower": ("#0072b2", 0.26), "upper": ("#56b4e9", 0.26), "inventory": ("#000000", 0.4),
}  # fmt: skip


class ExportError(RuntimeError):
    """The export can not be made. The message says what is missing."""


def export_year(
    storage: Storage, region: Region, year: int, folder: Path, *, weights: bool = True, cubes: bool = False
) -> pd.DataFrame:
    """Write a year's results to a new folder.

    The folder appears when it is complete, under another name until then: ``outlines/`` (GeoPackage with QGIS styles),
    ``tables/`` (outlines as GeoParquet 1.1, tables as CSV), ``predictions/`` (maps, cloud-optimized GeoTIFF), ``stac/``
    (a catalog of them), ``models/`` (weights, unless ``weights`` is false), ``cubes/`` (only if asked for),
    ``results.duckdb``, the report, ``CITATION.cff``, ``LICENSE.txt``, ``.zenodo.json``, ``README.md`` and
    ``SHA256SUMS``.

    Returns
    -------
    DataFrame (path, bytes, sha256), sorted by path.

    Raises
    ------
    ExportError
        if the folder is there and not empty, or the year has no results.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is there and not empty: name a new folder")
    areas = storage.read_table("areas", year=year)
    outlines = storage.read_table("outlines", year=year)
    if areas.empty or outlines.empty:
        raise ExportError(f"{year} has no areas or no outlines: materialize glacier_outlines of the year first")
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        _outlines(storage, region, year, outlines, making)
        _tables(storage, year, making)
        _maps(storage, year, making)
        if weights:
            _models(storage, making)
        if cubes:
            for glacier in storage.read_table("cubes", year=year)["glacier_id"]:
                _copy(storage, storage.cube(year, str(glacier)), making / "cubes" / f"{safe_name(str(glacier))}.nc")
        write_stac(storage, region, year, making / "stac", Layout(making))
        for name, place in (("results.duckdb", "results.duckdb"), (f"reports/{year}.html", f"report_{year}.html")):
            source = storage.path(*name.split("/"))
            if source.exists():
                _copy(storage, source, making / place)
        title, text = LICENSES[region.publication.license]
        (making / "LICENSE.txt").write_text(
            f"{title} ({region.publication.license})\n{text}\n\nThe licence holds for this data set. Its inputs "
            "(inventory, images, elevation) have terms of their own, which are named in README.md.\n",
            encoding="utf-8",
        )
        (making / "CITATION.cff").write_text(citation_cff(region, year), encoding="utf-8")
        (making / ".zenodo.json").write_text(json.dumps(zenodo(region, year), indent=1) + "\n", encoding="utf-8")
        (making / "README.md").write_text(_readme(region, year, len(areas), making), encoding="utf-8")
        files = _checksums(making)
        if folder.exists():
            folder.rmdir()
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return files


# --------------------------------------------------------------------------------------------- geometry
def _outlines(storage: Storage, region: Region, year: int, outlines: gpd.GeoDataFrame, folder: Path) -> None:
    glaciers = storage.read_table("glaciers")
    names = glaciers.set_index("glacier_id")[["name", "country"]]
    full = outlines.drop(columns=[c for c in ("name", "country") if c in outlines]).join(names, on="glacier_id")
    full = gpd.GeoDataFrame(full, geometry="geometry", crs="EPSG:4326")
    target = Layout(folder).outlines(year)
    target.parent.mkdir(parents=True)
    # 1.1 with a bounding box a row, so that readers need not open every geometry.
    full.to_parquet(str(target), index=False, schema_version="1.1.0", write_covering_bbox=True)
    package = folder / "outlines" / f"{safe_name(region.name)}_{year}.gpkg"
    package.parent.mkdir()
    layers = {bound: full[full["bound"] == bound].drop(columns="bound") for bound in ("upper", "lower", "best")}
    layers["inventory"] = gpd.GeoDataFrame(
        glaciers[["glacier_id", "name", "country", "inventory_date", "inventory_area_km2", "geometry"]], crs="EPSG:4326"
    )
    for layer, frame in layers.items():
        plain = frame.copy()
        for column in plain.columns:
            if column != "geometry" and str(plain[column].dtype) in {"string", "Int64", "boolean"}:
                plain[column] = plain[column].astype(object)
        plain.to_file(package, layer=layer, driver="GPKG", engine="pyogrio", promote_to_multi=True)
    _add_styles(package, list(layers))


def _add_styles(package: Path, layers: list[str]) -> None:
    """The table ``layer_styles`` that QGIS reads: each layer opens in its colours, outlines only."""
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    with sqlite3.connect(package) as db:
        db.execute(
            "CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256), "
            "f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30), "
            "styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30), "
            "update_time DATETIME)"
        )
        for layer in layers:
            db.execute(
                "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, "
                "styleName, styleQML, useAsDefault, description, owner, update_time) "
                "VALUES ('', '', ?, 'geom', ?, ?, 1, ?, '', ?)",
                (layer, layer, qml(*_STYLES[layer]), f"Outlines: {layer}", now),
            )
        db.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, last_change) "
            "VALUES ('layer_styles', 'attributes', 'layer_styles', 'QGIS styles', ?)",
            (now,),
        )
    db.close()


def qml(colour: str, width_mm: float) -> str:
    """A QGIS style: polygons as lines of a colour."""
    rgb = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.28" styleCategories="Symbology">\n'
        ' <renderer-v2 type="singleSymbol" symbollevels="0" enableorderby="0" forceraster="0">\n'
        '  <symbols><symbol type="fill" name="0" alpha="1" clip_to_extent="1" force_rhr="0">\n'
        '   <layer class="SimpleLine" enabled="1" locked="0" pass="0"><Option type="Map">\n'
        f'    <Option type="QString" name="line_color" value="{rgb},255"/>\n'
        f'    <Option type="QString" name="line_width" value="{width_mm}"/>\n'
        '    <Option type="QString" name="line_width_unit" value="MM"/>\n'
        '    <Option type="QString" name="line_style" value="solid"/>\n'
        "   </Option></layer>\n  </symbol></symbols>\n </renderer-v2>\n</qgis>\n"
    )


# --------------------------------------------------------------------------------------------- files
def _tables(storage: Storage, year: int, folder: Path) -> None:
    for name, of_year in TABLES_OUT.items():
        frame = storage.read_table(name)
        if of_year and "year" in frame:
            frame = frame[frame["year"] == year]
        frame = frame.drop(columns=[c for c in ("geometry", "hrefs") if c in frame])
        frame.to_csv(folder / "tables" / f"{name}.csv", index=False)


def _maps(storage: Storage, year: int, folder: Path) -> None:
    for glacier in storage.read_table("predictions", year=year)["glacier_id"]:
        source = storage.prediction(year, str(glacier))
        if not source.exists():
            raise ExportError(f"the map {source} is missing: materialize glacier_predictions of {year} again")
        _copy(storage, source, Path(str(Layout(folder).map(year, str(glacier)))))


def _models(storage: Storage, folder: Path) -> None:
    """Weights and settings of the members that calibrations saw, and what else lies beside them for each fold."""
    calibration = storage.read_table("calibration")
    for fold, rows in calibration.groupby("fold"):
        names = [f"member={int(m):02d}/model.{end}" for m in rows["member"] for end in ("safetensors", "json")]
        for name in ("ensemble.json", "random_forest.safetensors", *names):
            source = storage.path("models", f"fold={fold}", *name.split("/"))
            if source.exists():
                _copy(storage, source, folder / "models" / f"fold={fold}" / name)


def _copy(storage: Storage, source: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage.reading(source) as local:
        shutil.copyfile(local, target)


def _checksums(folder: Path) -> pd.DataFrame:
    rows = []
    for file in _files(folder):
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        rows.append((file.relative_to(folder).as_posix(), file.stat().st_size, digest))
    (folder / "SHA256SUMS").write_text("".join(f"{h}  {name}\n" for name, _, h in rows), encoding="utf-8")
    return pd.DataFrame(rows, columns=["path", "bytes", "sha256"])


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(f for f in folder.rglob("*") if f.is_file())


# --------------------------------------------------------------------------------------------- words
def dataset_title(region: Region, year: int) -> str:
    """Title of the data set; says so where the region is simulated."""
    title = region.publication.title or f"Glacier outlines and area change of {region.title or region.name}, {year}"
    return f"{title} (simulated)" if region.simulation is not None else title


def citation_cff(region: Region, year: int) -> str:
    """CITATION.cff 1.2.0 of the data set, with the method as a reference."""
    import yaml

    p = region.publication
    authors: list[dict[str, str]] = []
    for a in p.authors:
        if a.name:
            authors.append({"name": a.name})
        else:
            person = {"family-names": a.family, "given-names": a.given, "affiliation": a.affiliation}
            person["orcid"] = f"https://orcid.org/{a.orcid}" if a.orcid else ""
            authors.append({k: v for k, v in person.items() if v})
    content: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use this data set, please cite it and the method.",
        "type": "dataset",
        "title": dataset_title(region, year),
        "authors": authors or [{"name": region.title or region.name}],
        "version": p.version or str(year),
        "date-released": dt.date.today().isoformat(),
        "license": p.license,
        "keywords": ["glaciers", "area change", "remote sensing", "deep learning", region.imagery.sensor.name],
        "references": [
            {
                "type": "article", "title": "DL4GAM", "authors": [{"family-names": "Diaconu", "given-names": "C.-A."}],
                "doi": "10.1029/2025EA004197", "year": 2025, "journal": "Earth and Space Science",
            }
        ],
    }  # fmt: skip
    if p.doi:
        content["doi"] = p.doi
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def zenodo(region: Region, year: int) -> dict[str, Any]:
    """Metadata of a deposition (``.zenodo.json``)."""
    p = region.publication
    creators: list[dict[str, str]] = []
    for a in p.authors:
        creator = {"name": a.name or f"{a.family}, {a.given}".strip(", "), "affiliation": a.affiliation}
        creator["orcid"] = a.orcid or ""
        creators.append({k: v for k, v in creator.items() if v})
    return {
        "title": dataset_title(region, year),
        "upload_type": "dataset",
        "description": region.description or dataset_title(region, year),
        "creators": creators or [{"name": region.title or region.name}],
        "license": p.license.lower(),
        "version": p.version or str(year),
        "keywords": ["glaciers", "area change", "uncertainty", region.imagery.sensor.name],
        "related_identifiers": [
            {"identifier": "10.1029/2025EA004197", "relation": "isDerivedFrom", "resource_type": "publication-article"}
        ],
    }


def _readme(region: Region, year: int, n: int, folder: Path) -> str:
    """What lies in ``folder``, beside this page and the checksums, and what it was made from."""
    name = safe_name(region.name)
    rows = [
        (f"outlines/{name}_{year}.gpkg", "GeoPackage: layers best, lower, upper, inventory; opens styled in QGIS"),
        (f"tables/outlines/year={year}/part.parquet", "the same outlines as GeoParquet 1.1"),
        ("tables/*.csv", "areas, changes, totals, trends, images, quality, failures and lineage"),
        (f"predictions/year={year}/*.tif", "probability of ice and its standard deviation (cloud-optimized GeoTIFF)"),
        ("stac/catalog.json", "STAC catalog of the maps and of the models behind them"),
        ("models/", "weights (safetensors) of every ensemble member, and their settings"),
        ("cubes/*.nc", "glacier cubes: image, masks, terrain (NetCDF)"),
        ("results.duckdb", "all results of all years (DuckDB; every column is described in it)"),
        (f"report_{year}.html", "the report of the year"),
        ("CITATION.cff, LICENSE.txt, .zenodo.json", "how to cite, the licence, metadata for a repository"),
        ("SHA256SUMS", "checksums: sha256sum -c SHA256SUMS"),
    ]
    rows = [(a, b) for a, b in rows if a == "SHA256SUMS" or any(folder.glob(a.split(",")[0].rstrip("/")))]
    sources = [
        ("Method", _METHOD), ("Inventory", region.inventory.source), ("Elevation", region.terrain.dem_source),
        ("Elevation change", region.terrain.elevation_change_source),
        ("Images", region.imagery.sensor.name),
    ]  # fmt: skip
    lines = [f"# {dataset_title(region, year)}", ""]
    if region.simulation is not None:
        lines += ["**The inputs are simulated. The figures speak of no real glacier.**", ""]
    lines += [region.description or "", "", f"{n} glaciers of {year}. Coordinates: EPSG:4326 (outlines) and the UTM "
              "zone of each glacier (maps). Areas in km2; `lower` and `upper` bound a calibrated interval that is to "
              f"hold the true area in {region.calibration.coverage:.0%} of all cases. Times are UTC.", "",
              "| file | what |", "|---|---|"]  # fmt: skip
    lines += [f"| `{a}` | {b} |" for a, b in rows]
    lines += ["", "Made from:", ""] + [f"- {kind}: {text}" for kind, text in sources if text]
    lines += ["", "`dl4gam explain GLACIER --year YEAR` and the tables lineage and lineage_sources name every input of "
              "every estimate.", ""]  # fmt: skip
    return "\n".join(lines)
