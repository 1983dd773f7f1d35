"""STAC catalog of a year's outputs: one item a glacier map, the outlines at the collection.

Belongs here: describing files that exist, with links relative to the catalog, so that the store can be moved or
served as it is.
Does not belong here: copying or making files.
"""

from __future__ import annotations

import datetime as dt
import os
import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from upath import UPath

from dl4gam_assets.lineage.environment import recorded_settings
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage, safe_name

if TYPE_CHECKING:
    import pystac

_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_PARQUET = "application/vnd.apache.parquet"
_SCIENTIFIC = "https://stac-extensions.github.io/scientific/v1.0.0/schema.json"
_PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
_PROCESSING = "https://stac-extensions.github.io/processing/v1.1.0/schema.json"
_RASTER = "https://stac-extensions.github.io/raster/v1.1.0/schema.json"
_MODEL = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"


class Layout:
    """Where the files lie that a catalog links to: in the store, or in an export that has the same shape."""

    def __init__(self, root: UPath | os.PathLike[str]):
        self.root = UPath(root)

    def map(self, year: int, glacier_id: str) -> UPath:
        return self.root / "predictions" / f"year={year}" / f"{safe_name(glacier_id)}.tif"

    def outlines(self, year: int) -> UPath:
        return self.root / "tables" / "outlines" / f"year={year}" / "part.parquet"

    def weights(self, fold: int, member: int) -> UPath:
        return self.root / "models" / f"fold={fold}" / f"member={member:02d}" / "model.safetensors"


def write_stac(
    storage: Storage, region: Region, year: int, folder: UPath | os.PathLike[str], layout: Layout | None = None
) -> int:
    """Write ``catalog.json``, ``collection.json`` and ``items/<glacier>.json`` below ``folder``; returns the items.

    Beside them ``models/fold_N.json``: an item for each fold's ensemble by the machine-learning-model extension (mlm),
    with its members' weights; the maps are derived from it. ``layout``: where the linked files lie (default: in the
    store).

    An item has the glacier's best outline as geometry (the map's box where nothing was predicted), the image's date
    as datetime, the projection extension, the area with its interval, and the map as asset. Items of glaciers that
    have no map any more are removed. The catalog itself is written last, so that it never names what is not there.

    Raises
    ------
    FileNotFoundError
        if a map that the table ``predictions`` names is not in the store.
    """
    import pystac

    folder = UPath(folder)
    base = folder.as_posix()
    layout = layout or Layout(storage.root)
    predictions = storage.read_table("predictions", year=year)
    areas = storage.read_table("areas", year=year).set_index("glacier_id")
    cubes = storage.read_table("cubes", year=year).set_index("glacier_id")
    outlines = storage.read_table("outlines", year=year)
    outlines = outlines[outlines["bound"] == "best"].set_index("glacier_id")
    lineage = storage.read_table("lineage", year=year).set_index("glacier_id")
    tag = _tag(region)

    items = []
    for row in predictions.sort_values("glacier_id").itertuples(index=False):
        glacier = str(row.glacier_id)
        figures = areas.loc[glacier].to_dict() if glacier in areas.index else {}
        date = figures.get("image_date", cubes.loc[glacier, "image_date"] if glacier in cubes.index else None)
        if date is None or pd.isna(date):
            raise ValueError(f"map of {glacier} in {year} has no image date: materialize glacier_areas again")
        outline = outlines.geometry.loc[glacier] if glacier in outlines.index else None
        if glacier in lineage.index:
            figures["code_version"] = lineage.loc[glacier, "code_version"]
        items.append(
            _item(storage, base, glacier, year, pd.Timestamp(date), outline, figures, int(row.fold), tag, layout)
        )
    models = _models(storage, region, year, items, base, layout)

    collection = _collection(storage, region, year, items, outlines, base, tag, layout)
    catalog = pystac.Catalog(
        id=f"{region.name}-{year}",
        title=f"{region.title or region.name} {year}{' (simulated)' if tag else ''}",
        description=f"Glacier maps and outlines of {region.title or region.name} in {year}, by dl4gam_assets.",
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )
    # Addresses come last: pystac rewrites relative asset links whenever an address changes.
    catalog.add_child(collection)
    catalog.add_items(models.values())
    collection.add_items(items)
    catalog.set_self_href(posixpath.join(base, "catalog.json"))
    collection.set_self_href(posixpath.join(base, "collection.json"))
    names = set()
    for item in items:
        name = f"{safe_name(str(item.properties['dl4gam:glacier_id']))}.json"
        names.add(name)
        item.set_self_href(posixpath.join(base, "items", name))
    for fold, model in models.items():
        model.set_self_href(posixpath.join(base, "models", f"fold_{fold}.json"))
    for item in items:
        fold = int(item.properties["dl4gam:fold"])
        if fold in models:
            item.add_link(pystac.Link("derived_from", models[fold], "application/geo+json", f"Ensemble of fold_{fold}"))
    for model in models.values():
        storage.write_json(UPath(model.self_href), model.to_dict(include_self_link=False))
    for item in items:
        storage.write_json(UPath(item.self_href), item.to_dict(include_self_link=False))
    storage.write_json(folder / "collection.json", collection.to_dict(include_self_link=False))
    storage.write_json(folder / "catalog.json", catalog.to_dict(include_self_link=False))
    if (folder / "items").exists():
        for stale in list((folder / "items").glob("*.json")):
            if stale.name not in names:
                stale.unlink(missing_ok=True)
    return len(items)


def _tag(region: Region) -> str:
    return "simulated" if region.simulation is not None else str(getattr(region.imagery.catalog, "tag", ""))


def _citation(region: Region) -> dict[str, Any]:
    """Method and inventory to cite, by the scientific extension."""
    publications = [{"doi": "10.1029/2025EA004197"}]
    return {"sci:publications": publications} | (
        {"sci:citation": region.inventory.source} if region.inventory.source else {}
    )


def _relative(target: UPath, start: str) -> str:
    return posixpath.relpath(target.as_posix(), start)


def _item(
    storage: Storage, base: str, glacier: str, year: int, date: pd.Timestamp, outline: Any,
    figures: Mapping[str, Any], fold: int, tag: str, layout: Layout,
) -> pystac.Item:  # fmt: skip
    import pystac
    import rasterio
    import shapely
    from rasterio.warp import transform_bounds

    from dl4gam_assets import __version__

    path = storage.prediction(year, glacier)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, though the table predictions names it: materialize it again")
    with storage.reading(path) as local, rasterio.open(local) as source:
        code = source.crs.to_epsg()
        shape = [source.height, source.width]
        transform = list(source.transform)[:6]
        box = transform_bounds(source.crs, "EPSG:4326", *source.bounds)
        bands = [{"name": d or f"band {i}"} for i, d in enumerate(source.descriptions, start=1)]
    geometry = shapely.box(*box) if outline is None or outline.is_empty else outline
    properties: dict[str, Any] = {
        "dl4gam:glacier_id": glacier,
        "dl4gam:year": year,
        "dl4gam:fold": fold,
        "processing:level": "L4",
        "processing:lineage": (
            f"Mapped by the ensemble of cross-validation fold {fold}, which never saw this glacier, on the image of "
            f"{date:%Y-%m-%d}. The table lineage in results.duckdb names every input."
        ),
        "processing:software": {"dl4gam_assets": str(figures.get("code_version") or __version__)},
        "proj:code": f"EPSG:{code}",
        "proj:shape": shape,
        "proj:transform": transform,
    }
    for name in ("area_km2", "lower_km2", "upper_km2", "recall"):
        value = figures.get(name)
        if value is not None and not pd.isna(value):
            properties[f"dl4gam:{name}"] = round(float(value), 6)
    if tag:
        properties["dl4gam:tag"] = tag
    item = pystac.Item(
        id=f"{glacier}-{year}",
        geometry=shapely.geometry.mapping(shapely.set_precision(geometry, 1e-7)),
        bbox=[round(float(v), 7) for v in shapely.total_bounds(geometry)],
        datetime=date.to_pydatetime().replace(tzinfo=dt.UTC),
        properties=properties,
        stac_extensions=[_PROJECTION, _PROCESSING],
    )
    item.add_asset(
        "prediction",
        pystac.Asset(
            href=_relative(layout.map(year, glacier), posixpath.join(base, "items")),
            title="Ensemble map: probability and its standard deviation",
            media_type=_COG,
            roles=["data"],
            extra_fields={"bands": bands},
        ),
    )
    return item


def _models(
    storage: Storage, region: Region, year: int, items: list[pystac.Item], base: str, layout: Layout
) -> dict[int, pystac.Item]:
    """The ensembles behind the year's maps, as items of the mlm extension; none where members are unknown."""
    import pystac
    import shapely

    found: dict[int, pystac.Item] = {}
    glaciers = storage.read_table("glaciers")
    box = [round(float(v), 7) for v in glaciers.total_bounds] if len(glaciers) else [-180.0, -90.0, 180.0, 90.0]
    for fold in sorted({int(i.properties["dl4gam:fold"]) for i in items}):
        mine = _members(storage, fold)
        if mine.empty:
            continue
        # What the members were trained with was recorded; the settings may be others by now.
        first = int(mine["member"].iloc[0])
        recorded = storage.read_json(storage.model(fold, first) / "model.json") or {}
        state = storage.read_state("ensemble_member", f"fold_{fold}.member_{first:02d}") or {}
        then = recorded_settings(storage, str(state.get("settings"))) or {}
        network = region.model.model_dump(mode="json") | recorded.get("model", {})
        training = region.training.model_dump(mode="json") | then.get("training", {})
        engine = recorded.get("engine", {})
        channels, size = list(network["channels"]), int(training["patch_px"])
        parameters = {
            "encoder": network["encoder"], "members": len(mine), "epochs": training["epochs"], "patch_px": size,
            "loss": training["loss"], "learning_rate": training["learning_rate"], "fold": fold,
            "precision": engine.get("precision"), "encoder_weights": engine.get("encoder_weights"),
        }  # fmt: skip
        model = pystac.Item(
            id=f"{region.name}-ensemble-fold_{fold}",
            geometry=shapely.geometry.mapping(shapely.box(*box)),
            bbox=box,
            datetime=dt.datetime(region.years.baseline, 1, 1, tzinfo=dt.UTC),
            properties={
                "title": f"Ensemble of fold {fold}: {len(mine)} members",
                "mlm:name": f"{region.name} fold_{fold}",
                "mlm:architecture": network["architecture"],
                "mlm:tasks": ["semantic-segmentation"],
                "mlm:framework": "PyTorch",
                **({"mlm:framework_version": str(engine["torch"])} if engine.get("torch") else {}),
                "mlm:pretrained": network["encoder_weights"] is not None,
                "mlm:total_parameters": int(mine["parameters"].max()) if mine["parameters"].notna().any() else 0,
                "mlm:hyperparameters": {k: v for k, v in parameters.items() if v is not None},
                "mlm:input": [
                    {
                        "name": "glacier cube", "bands": channels,
                        "input": {"shape": [-1, len(channels), size, size], "data_type": "float32",
                                  "dim_order": ["batch", "channel", "height", "width"]},
                        "description": "Channels standardized by the fold's mean and deviation (table normalization).",
                    }
                ],
                "mlm:output": [
                    {
                        "name": "glacier", "tasks": ["semantic-segmentation"],
                        "result": {"shape": [-1, 1, size, size], "data_type": "float32",
                                   "dim_order": ["batch", "channel", "height", "width"]},
                        "description": "Logit of glacier; divided by the member's temperature, then averaged.",
                    }
                ],
            },
            stac_extensions=[_MODEL, _RASTER],
        )  # fmt: skip
        for row in mine.itertuples():
            model.add_asset(
                f"member_{int(row.member):02d}",
                pystac.Asset(
                    href=_relative(layout.weights(fold, int(row.member)), posixpath.join(base, "models")),
                    title=f"Weights of member {int(row.member)} (SHA-256 {row.sha256})",
                    media_type="application/octet-stream",
                    roles=["mlm:model", "mlm:weights"],
                    extra_fields={"mlm:artifact_type": "safetensors", "raster:bands": [{"name": c} for c in channels]},
                ),
            )
        found[fold] = model
    return found


def _members(storage: Storage, fold: int) -> pd.DataFrame:
    """Members that the fold's calibration saw; those of a larger ensemble of before may still lie in the store."""
    calibration = storage.read_table("calibration", fold=fold)[["member", "sha256"]]
    members = storage.read_table("members", fold=fold)
    return members.merge(calibration, on=["member", "sha256"]).sort_values("member")


def _collection(
    storage: Storage,
    region: Region,
    year: int,
    items: list[pystac.Item],
    outlines: pd.DataFrame,
    base: str,
    tag: str,
    layout: Layout,
) -> pystac.Collection:
    import pystac

    boxes = [i.bbox for i in items if i.bbox]
    box = (
        [min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)]
        if boxes
        else [-180.0, -90.0, 180.0, 90.0]
    )
    dates = [i.datetime for i in items if i.datetime is not None]
    first = min(dates, default=dt.datetime(year, 1, 1, tzinfo=dt.UTC))
    last = max(dates, default=dt.datetime(year, 12, 31, tzinfo=dt.UTC))
    words = ["glacier", "area", "segmentation", "ensemble", *([tag] if tag else [])]
    collection = pystac.Collection(
        id=f"{region.name}-{year}-glaciers",
        title=f"Glaciers of {region.title or region.name} in {year}{' (simulated)' if tag else ''}",
        description=region.description or f"Held-out ensemble maps of the glaciers of {region.title or region.name}.",
        extent=pystac.Extent(pystac.SpatialExtent([box]), pystac.TemporalExtent([[first, last]])),
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
        license=region.publication.license,
        keywords=words,
        stac_extensions=[_SCIENTIFIC],
        extra_fields=_citation(region),
    )
    path = storage.table("outlines", {"year": year})
    if path.exists():
        collection.add_asset(
            "outlines",
            pystac.Asset(
                href=_relative(layout.outlines(year), base),
                title=f"Outlines of {len(outlines)} glaciers: best, lower and upper (GeoParquet, EPSG:4326)",
                media_type=_PARQUET,
                roles=["data"],
            ),
        )
    return collection
