"""Gathering where the estimates of a year and fold come from, and asserting that it is what they expect.

Belongs here: rows of ``lineage`` and ``lineage_sources``, the record for the materialization's metadata, and the
assertions that areas make about maps, calibration and taus.
Does not belong here: telling it (``lineage``), finding out what has changed since (``staleness``).
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dl4gam_assets.lineage.environment import hardware_class, record_settings, record_software, software
from dl4gam_assets.lineage.records import Materialization, PartitionRecord
from dl4gam_assets.settings import fingerprint, without_secrets
from dl4gam_assets.stages import published
from dl4gam_assets.stages.base import (
    Site,
    UpstreamError,
    Workspace,
    code_version,
    fold_label,
    fold_member_label,
    frame_fingerprint,
    materialization_id,
    read_named,
    utc_now,
    year_fold_label,
)
from dl4gam_assets.storage import Storage, safe_name
from dl4gam_assets.tables import TABLES

if TYPE_CHECKING:
    from dl4gam_assets.terrain import Tile, TileIndex

_SOURCE_COLUMNS = [c.name for c in TABLES["lineage_sources"].columns if c.name not in {"year", "fold"}]


def chain_of(year: int, fold: int) -> list[tuple[str, str]]:
    """The partitions behind the estimates of a year and fold, from the inventory to the areas (members apart)."""
    y, f, yf = str(year), fold_label(fold), year_fold_label(year, fold)
    return [
        ("simulated_inputs", "all"), ("inventory_outlines", "all"), ("debris_outlines", "all"),
        ("glacier_zones", "all"),
        ("cross_validation_folds", "all"), ("elevation", "all"), ("scene_candidates", y), ("selected_scenes", y),
        ("elevation_change", y), ("glacier_cubes", y), ("normalization", f), ("ensemble", f), ("calibration", f),
        ("glacier_predictions", yf), ("interval_taus", f),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- writing
def write_lineage(
    ws: Workspace, year: int, fold: int, ids: Sequence[str], cubes: pd.DataFrame, predictions: pd.DataFrame,
    taus: pd.Series | None = None,
) -> PartitionRecord:  # fmt: skip
    """Write ``lineage`` and ``lineage_sources`` of a year and fold; returns what goes into the metadata.

    Parameters
    ----------
    ids : glaciers with an estimate
    cubes, predictions : rows of these tables by glacier id
    taus : tau by glacier id, as used
    """
    storage, region, terrain = ws.storage, ws.region, ws.region.terrain
    index = pd.Index(ids, name="glacier_id", dtype=object)
    scenes = _images_of(storage.read_table("scenes", year=year), cubes.reindex(index))
    static = storage.read_table("elevations").set_index("glacier_id")["fingerprint"].reindex(index)
    dhdt = storage.read_table("elevation_changes", year=year).set_index("glacier_id").reindex(index)
    members = calibrated_members(storage, fold)
    keys, tiles = terrain_of(ws.site, year, ids)
    made = [m for m in (_materialization(ws, asset, label) for asset, label in chain_of(year, fold)) if m is not None]
    by_asset = {m.asset: m for m in made}
    labels = [fold_member_label(fold, int(m)) for m in members["member"]]
    trained = [m for m in (_materialization(ws, "ensemble_member", label) for label in labels) if m is not None]
    own = year_fold_label(year, fold)
    settings, versions = record_settings(storage, region), record_software(storage)
    last = Materialization(
        asset="glacier_areas", partition=own, output="", run_id=ws.run_id,
        materialization_id=materialization_id("glacier_areas", own, ws.run_id) if ws.run_id else None,
        code_version=code_version(), settings_fingerprint=settings, software_fingerprint=versions,
        hardware=hardware_class(), time=utc_now(),
    )  # fmt: skip
    runs = {asset: by_asset[asset].run_id for asset in ("glacier_cubes", "calibration", "glacier_predictions")
            if asset in by_asset} | {"glacier_areas": ws.run_id}  # fmt: skip
    start = dhdt["period_start"]
    dem = terrain.dem_source or ", ".join(terrain.dem) or None
    with_dem = {g for g, key in keys.items() if key and any(row["kind"] == "elevation" for _, _, row in tiles[key])}
    imported = published.cubes_import(storage, year) is not None
    source = "layer of the published cube, by the settings" if imported else terrain.elevation_change_source or "dh/dt"
    words = [
        None if pd.isna(a) else f"{source} {int(a)} to {int(b)}" for a, b in zip(start, dhdt["period_end"], strict=True)
    ]
    frame = pd.DataFrame(
        {
            "glacier_id": index,
            "scene_ids": cubes["scene_ids"].reindex(index).to_numpy(),
            "image_date": cubes["image_date"].reindex(index).to_numpy(),
            "checksums": scenes["checksums"].to_numpy(),
            "cube_fingerprint": cubes["fingerprint"].reindex(index).to_numpy(),
            "static_fingerprint": static.to_numpy(),
            "dhdt_fingerprint": dhdt["fingerprint"].to_numpy(),
            "terrain_key": [keys.get(g) for g in ids],
            "dem_source": "layers of the published cube" if imported else [dem if g in with_dem else None for g in ids],
            "dhdt_source": words,
            "member_sha256": predictions["member_sha256"].reindex(index).to_numpy(),
            "calibration_fingerprint": str(ws.upstream("calibration", fold_label(fold))),
            "prediction_fingerprint": predictions["fingerprint"].reindex(index).to_numpy(),
            "tau": None if taus is None else taus.reindex(index).to_numpy(dtype=float),
            "settings_fingerprint": settings,
            "software_fingerprint": versions,
            "code_version": code_version(),
            "run_ids": json.dumps(runs),
            "time": utc_now(),
        }
    )
    if not len(frame):
        frame = TABLES["lineage"].empty().drop(columns=["year", "fold"])
    storage.write_table("lineage", frame, {"year": year, "fold": fold})

    rows = _common_rows(ws, year, fold, members, made, last, settings)
    chosen = scenes.dropna(subset=["scene_ids"]).drop_duplicates("scene_ids")
    rows += _scene_rows(ws.site, year, chosen)
    for key in sorted({k for k in keys.values() if k is not None}):
        rows += [
            {"scope": "terrain", "scope_key": key, "asset": asset, "partition": label, **row}
            for asset, label, row in tiles[key]
        ]
    for line in rows:  # files have the run and time of the partition that read them
        of = by_asset.get(str(line.get("asset")))
        if of is not None and line["scope"] != "all":
            line |= of.model_dump(exclude={"output", "asset", "partition"})
    sources = pd.DataFrame(rows, columns=_SOURCE_COLUMNS).drop_duplicates(["scope", "scope_key", "kind", "name"])
    storage.write_table("lineage_sources", sources, {"year": year, "fold": fold})
    kinds = sources["kind"].value_counts()
    return PartitionRecord(
        year=year, fold=fold, estimates=len(ids), images=len(chosen),
        scenes=int(chosen["scene_ids"].str.split("+").explode().nunique()) if len(chosen) else 0,
        terrain_tiles=int(kinds.reindex(["elevation", "elevation change"]).fillna(0).sum()),
        weights=members["sha256"].tolist(), calibration=str(ws.upstream("calibration", fold_label(fold))),
        settings=settings, software=versions, hardware=hardware_class(), code_version=code_version(),
        lineage=frame_fingerprint(frame, ["time", "run_ids"]), made_from=[*made, *trained],
    )  # fmt: skip


def _images_of(scenes: pd.DataFrame, cubes: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``scenes`` of the images that are in the cubes, in the order of ``cubes`` (by glacier id)."""
    ids = pd.Index(cubes.index, name="glacier_id", dtype=object)
    keys = pd.MultiIndex.from_arrays([ids, cubes["scene_ids"].astype(object)], names=["glacier_id", "scene_ids"])
    known = scenes.astype({"glacier_id": object, "scene_ids": object}).set_index(["glacier_id", "scene_ids"])
    known = known[~known.index.duplicated()]
    return known.reindex(keys).reset_index("scene_ids")


def calibrated_members(storage: Storage, fold: int) -> pd.DataFrame:
    """Rows of ``members`` that the fold's calibration saw, with their temperature: by number and hash of the weights.

    Members that a larger ensemble of before left in the store are not among them.
    """
    calibration = storage.read_table("calibration", fold=fold)[["member", "sha256", "temperature"]]
    members = storage.read_table("members", fold=fold)
    return members.merge(calibration, on=["member", "sha256"]).sort_values("member", ignore_index=True)


def _materialization(ws: Workspace, asset: str, partition: str) -> Materialization | None:
    state = ws.storage.read_state(asset, partition)
    if state is None:
        return None
    return Materialization(
        asset=asset, partition=partition, output=str(state["output"]), run_id=state.get("run_id"),
        materialization_id=state.get("materialization_id"), code_version=state.get("code_version"),
        settings_fingerprint=state.get("settings"), software_fingerprint=state.get("software"),
        hardware=state.get("hardware"), time=state["time"],
    )  # fmt: skip


def _common_rows(
    ws: Workspace, year: int, fold: int, members: pd.DataFrame, made: Sequence[Materialization], last: Materialization,
    settings: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows that all estimates of the year and fold share."""
    region, storage = ws.region, ws.storage
    by_asset = {m.asset: m for m in made}
    rows: list[dict[str, Any]] = []

    def add(kind: str, name: str, checksum: Any, asset: str | None = None, address: str | None = None) -> None:
        row: dict[str, Any] = {"kind": kind, "name": name, "checksum": checksum, "address": address}
        if asset in by_asset:
            m = by_asset[str(asset)]
            row |= m.model_dump(exclude={"output"})
            row["checksum"] = m.output if checksum is None else checksum
        rows.append({"scope": "all", "scope_key": "", **row})

    for m in (*made, last):
        rows.append(
            {"scope": "all", "scope_key": "", "kind": "materialization", "name": f"{m.asset} [{m.partition}]",
             "checksum": m.output or None, **m.model_dump(exclude={"output"})}
        )  # fmt: skip
    for r in members.itertuples():
        label = fold_member_label(fold, int(r.member))
        folder = ws.storage.model(fold, int(r.member))
        state = _materialization(ws, "ensemble_member", label)
        rows.append(
            {"scope": "all", "scope_key": "", "kind": "weights", "name": label, "checksum": r.sha256,
             "address": _below(str(ws.storage.root), str(folder / "model.safetensors")),
             **({"asset": "ensemble_member", "partition": label} if state is None
                else state.model_dump(exclude={"output"}))}
        )  # fmt: skip
    for entry in (published.folds_import(ws.storage), published.statistics_import(ws.storage, fold)):
        if entry is not None:
            add("imported", entry["file"], f"sha256:{entry['sha256']}")
    for r in members.itertuples():
        entry = published.member_import(ws.storage, fold, int(r.member))
        if entry is not None:
            add("imported", entry["name"], f"sha256:{entry['sha256']}", address=entry["path"])
            told = storage.model(fold, int(r.member)) / "model.json"
            for what, value in published.golden_facts(storage.read_json(told) or {}).items():
                add("imported", f"{entry['name']}: {what}", value, address=_below(str(storage.root), str(told)))
    f = fold_label(fold)
    add("calibration", f, None, "calibration", f"tables/calibration/fold={fold}/part.parquet")
    add("normalization", f, None, "normalization", f"tables/normalization/fold={fold}/part.parquet")
    add("taus", f, None, "interval_taus", f"tables/taus/fold={fold}/part.parquet")
    add("folds", "cross_validation_folds", None, "cross_validation_folds", "tables/folds/part.parquet")
    add("zones", "glacier_zones", None, "glacier_zones", "tables/zones/part.parquet")
    add("inventory", Path(region.inventory.path).name, _recorded_file(ws, "inventory_outlines", "all", "file"),
        "inventory_outlines", region.inventory.path)  # fmt: skip
    for source in region.inventory.debris:
        name = Path(source.path).name
        add("debris", name, _recorded_file(ws, "debris_outlines", "all", "files"), "debris_outlines", source.path)
        rows[-1]["checksum"] = _recorded_file(ws, "debris_outlines", "all", f"files.{name}") or rows[-1]["checksum"]
    if region.imagery.selection.overrides:
        name = region.imagery.selection.overrides
        add("overrides", name, _recorded_file(ws, "selected_scenes", str(year), "overrides"), "selected_scenes", name)
    add("settings", region.name, settings, address=f"tables/settings/fingerprint={settings}/part.parquet")
    mapped = ws.storage.read_state("glacier_predictions", year_fold_label(year, fold)) or {}
    add("code", "dl4gam_assets", mapped.get("code_version") or code_version(), "glacier_predictions")
    versions = ws.storage.read_table("software", fingerprint=mapped["software"]) if mapped.get("software") else None
    found = software() if versions is None else dict(zip(versions["package"], versions["version"], strict=True))
    for package, version in found.items():
        add("package", str(package), version, "glacier_predictions")
    add("hardware", mapped.get("hardware") or hardware_class(), None)
    return rows


def _recorded_file(ws: Workspace, asset: str, partition: str, key: str) -> str | None:
    named = read_named(ws.storage, asset, partition)
    value = None if named is None else named.values.get(key)
    return value if isinstance(value, str) and key not in (named.upstream if named else {}) else None


def _scene_rows(site: Site, year: int, chosen: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the files of each distinct image."""
    from dl4gam_assets.imagery.signing import unsigned

    root = str(site.data_root)
    rows = []
    for image in chosen.itertuples():
        checksums = json.loads(image.checksums) if isinstance(image.checksums, str) else {}
        hrefs = json.loads(image.hrefs) if isinstance(image.hrefs, str) else {}
        for item in str(image.scene_ids).split("+"):
            files = checksums.get(item) or {"": None}
            for asset, checksum in files.items():
                href = hrefs.get(item, {}).get(asset)
                rows.append(
                    {
                        "scope": "image", "scope_key": image.scene_ids, "kind": "scene",
                        "name": f"{item}/{asset}" if asset else item, "checksum": checksum,
                        "address": None if href is None else _below(root, unsigned(href)),
                        "asset": "selected_scenes", "partition": str(year),
                    }
                )  # fmt: skip
    return rows


def _below(root: str, path: str) -> str:
    """A path without the folder it lies in, so that lineage does not name a machine's folders."""
    path = path.removeprefix("file://")
    return path[len(root) :].lstrip("/") if path.startswith(root.rstrip("/") + "/") else path


# --------------------------------------------------------------------------------------------- terrain
def terrain_layers(site: Site, year: int) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Kind, asset, partition and stored index of the layers of tiles that a year's cubes are made from."""
    from dl4gam_assets.stages import terrain as stage
    from dl4gam_assets.terrain import match_period

    terrain = site.region.terrain
    out: list[tuple[str, str, str, tuple[str, ...]]] = []
    if terrain.has_dem:
        out.append(("elevation", "elevation", "all", stage._DEM_TILES))
    if terrain.velocity:
        out.append(("velocity", "elevation", "all", stage._VELOCITY_TILES))
    period = match_period(terrain.elevation_change, year, terrain.elevation_change_match)
    if period is not None:
        out.append(("elevation change", "elevation_change", str(year), stage._dhdt_tiles(period)))
        if period.error_path is not None:
            out.append(("error of elevation change", "elevation_change", str(year), stage._dhdt_tiles(period, True)))
    return out


def tiles_before(ws: Workspace, asset: str, *numbers: int) -> list[TileIndex | None]:
    """The indices of tiles that ``elevation``, or ``elevation_change`` of a year, was made from; None: it had none."""
    from dl4gam_assets.terrain import TileIndex

    year = numbers[0] if numbers else ws.region.years.baseline
    layers = [parts for _, of, _, parts in terrain_layers(ws.site, year) if of == asset]
    files = [ws.storage.path(*parts) for parts in layers]
    return [TileIndex.from_json(f.read_text(encoding="utf-8")) if f.exists() else None for f in files]


def tiles_now(ws: Workspace, asset: str, *numbers: int) -> list[TileIndex | None]:
    """The same indices as the settings and files of now give them, in the same order."""
    from dl4gam_assets.stages import terrain as stage
    from dl4gam_assets.terrain import match_period, period_tiles

    terrain = ws.region.terrain
    if asset == "elevation":
        named = (
            ("terrain.dem", terrain.dem, terrain.has_dem),
            ("terrain.velocity", terrain.velocity, terrain.velocity),
        )
        return [stage._find(sources, ws, setting) for setting, sources, there in named if there]
    period = match_period(terrain.elevation_change, numbers[0], terrain.elevation_change_match)
    if period is None:
        return []
    errors = [period_tiles(period, ws.data_root, error_layer=True)] if period.error_path is not None else []
    return [period_tiles(period, ws.data_root), *errors]


def tiles_near(site: Site, glacier_id: str, indices: Sequence[TileIndex | None]) -> list[list[str]]:
    """Identities of the tiles of each index that touch a glacier's grid, in the order of mosaicking."""
    grid = _grid(site, glacier_id)
    return [[] if index is None else [t.identity or t.href for t in index.touching(grid)] for index in indices]


def terrain_of(
    site: Site, year: int, ids: Iterable[str]
) -> tuple[dict[str, str | None], dict[str, list[tuple[str, str, dict[str, Any]]]]]:
    """Key of each glacier's set of tiles, and the tiles of each key as (asset, partition, row)."""
    root = str(site.data_root)
    layers = []
    for kind, asset, label, parts in terrain_layers(site, year):
        path = site.storage.path(*parts)
        if path.exists():
            text = path.read_text(encoding="utf-8")
            layers.append((kind, asset, label, parts, fingerprint(text)))
    keys: dict[str, str | None] = {}
    sets: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for glacier_id in ids:
        found = [
            (asset, label, {"kind": kind, "name": Path(without_secrets(tile.href)).name,
                            "address": _below(root, without_secrets(tile.href)), "checksum": tile.identity or None})
            for kind, asset, label, parts, stamp in layers
            for tile in _touching(site, glacier_id, parts, stamp)
        ]  # fmt: skip
        _tell_apart(found)
        key = fingerprint(found) if found else None
        keys[glacier_id] = key
        if key is not None:
            sets.setdefault(key, found)
    return keys, sets


def _tell_apart(found: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """Tiles of different folders that have one file name are named by their address."""
    counts = Counter((row["kind"], row["name"]) for _, _, row in found)
    for _, _, row in found:
        if counts[row["kind"], row["name"]] > 1:
            row["name"] = row["address"]


@functools.lru_cache(maxsize=8)
def _index_of(site: Site, parts: tuple[str, ...], stamp: str) -> Any:
    from dl4gam_assets.terrain import TileIndex

    return TileIndex.from_json(site.storage.path(*parts).read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=65536)
def _touching(site: Site, glacier_id: str, parts: tuple[str, ...], stamp: str) -> tuple[Tile, ...]:
    """Tiles of a stored index that touch a glacier's grid; the same in all years, so kept in this process."""
    return tuple(_index_of(site, parts, stamp).touching(_grid(site, glacier_id)))


@functools.lru_cache(maxsize=65536)
def _grid(site: Site, glacier_id: str) -> Any:
    from dl4gam_assets.inventory import glacier_grid

    row = _outlines(site, _stamp(site)).loc[glacier_id]
    imagery = site.region.imagery
    return glacier_grid(row["geometry"], int(row["utm_epsg"]), imagery.sensor.pixel_m, imagery.margin_m)


def _stamp(site: Site) -> str:
    return str((site.storage.read_state("inventory_outlines") or {}).get("output"))


@functools.lru_cache(maxsize=2)
def _outlines(site: Site, stamp: str) -> pd.DataFrame:
    return site.storage.read_table("glaciers").set_index("glacier_id")


# --------------------------------------------------------------------------------------------- assertions
def expect_calibrated(ws: Workspace, fold: int, predictions: pd.DataFrame) -> None:
    """No area from checkpoints other than those that the calibration saw.

    Raises
    ------
    UpstreamError
        if maps were made with other weights than the calibration of the fold now holds.
    """
    hashes = ",".join(ws.storage.read_table("calibration", fold=fold).sort_values("member")["sha256"])
    wrong = predictions.loc[predictions["member_sha256"] != hashes, "glacier_id"]
    if len(wrong):
        raise UpstreamError(
            f"{len(wrong)} maps were made with other weights than the calibration of fold {fold} saw "
            f"({', '.join(map(str, wrong.head(5)))}): materialize glacier_predictions of this partition first"
        )


def expect_chain(ws: Workspace, year: int, fold: int) -> None:
    """Every partition behind the estimates of a year and fold must be made from what the others are now.

    So that the lineage, which names what lies in the store, names what was used.

    Raises
    ------
    UpstreamError
        naming the first partition that was made before one that it reads.
    """
    for asset, label in chain_of(year, fold):
        expect_made_from_present(ws, asset, label)


def expect_made_from_present(ws: Workspace, asset: str, partition: str = "all") -> None:
    """An upstream result must have been made from what its own upstream results are now.

    Raises
    ------
    UpstreamError
        if not; results of a version that kept no names of inputs are trusted.
    """
    named = read_named(ws.storage, asset, partition)
    if named is None:
        return
    for key, (upstream, label, *part) in named.upstream.items():
        if part:
            continue
        now = ws.upstream_or_none(upstream, label)
        if now is not None and str(now) != named.values[key]:
            raise UpstreamError(
                f"{asset} [{partition}] was made before the present {upstream} [{label}]: materialize {asset} first"
            )


def expect_cube(site: Site, year: int, glacier_id: str, attributes: Mapping[Any, Any]) -> None:
    """A cube must be the one that the table ``cubes`` speaks of.

    Raises
    ------
    UpstreamError
        if its content is another: a run with other settings was stopped while it made cubes.
    """
    from dl4gam_assets.stages.base import cached_table

    rows = cached_table(site, "cubes", year=year)
    row = rows[rows["glacier_id"] == glacier_id]
    if not len(row) or attributes.get("fingerprint") != row["fingerprint"].iloc[0]:
        raise UpstreamError(
            f"the cube {site.storage.cube(year, glacier_id).name} of {year} is not the one that the table cubes names: "
            "materialize glacier_cubes of this year again"
        )


def expect_map(site: Site, year: int, fold: int, glacier_id: str, tags: dict[str, str]) -> None:
    """A map file must be the one that the table ``predictions`` speaks of.

    Raises
    ------
    UpstreamError
        if it is of another fold, or of other inputs.
    """
    from dl4gam_assets.stages.base import cached_table

    rows = cached_table(site, "predictions", year=year, fold=fold)
    row = rows[rows["glacier_id"] == glacier_id]
    wanted = str(row["fingerprint"].iloc[0]) if len(row) else None
    if tags.get("fingerprint") != wanted:
        raise UpstreamError(
            f"the map {site.storage.prediction(year, glacier_id).name} is not the one that the table predictions "
            f"names (fold {fold}, {safe_name(glacier_id)}): materialize glacier_predictions of this partition again"
        )
