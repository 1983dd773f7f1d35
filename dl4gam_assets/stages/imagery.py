"""Stages of the group *imagery*: candidates with scores, and the choice."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import glob
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from dl4gam_assets.compute import Done, Mapper
from dl4gam_assets.settings import Region, SceneFolder, StacApi, StacFolder, StacGeoparquet, fingerprint
from dl4gam_assets.stages import published
from dl4gam_assets.stages.base import (
    Site,
    StageResult,
    UnreachableError,
    Workspace,
    cached_table,
    file_fingerprint,
    folder_fingerprint,
    frame_fingerprint,
    input_fingerprint,
    run_stage,
)
from dl4gam_assets.stages.code import code_fingerprint
from dl4gam_assets.stages.files import changed_files, record_files, sampled_hash, scene_files
from dl4gam_assets.storage import safe_name
from dl4gam_assets.tables import TABLES, rows_of

#: Plates of a year that are shown with the choice; `dl4gam plate` draws any other.
PLATES = 2
#: Searches that wait for a STAC API at the same time.
SEARCHES_AT_ONCE = 4
#: Raised by one when stored searches of before can not be used any more.
SEARCH_VERSION = 1
#: Modules whose code shapes scores. Of ``catalogs`` only the items count, which are in the keys themselves.
_CODE = (
    "dl4gam_assets.imagery.candidates",
    "dl4gam_assets.imagery.indices",
    "dl4gam_assets.imagery.masks",
    "dl4gam_assets.imagery.reading",
    "dl4gam_assets.imagery.scaling",
    "dl4gam_assets.imagery.scores",
    "dl4gam_assets.inventory.grid",
)
#: Catalogs that are searched once for many glaciers. The others are in memory whole.
_SEARCHED = (StacApi, StacGeoparquet)
#: Glaciers within this many degrees of an outline are in its images: the margin is far smaller.
_NEAR_DEG = 0.05


@functools.lru_cache(maxsize=4)
def _catalog(site: Site, stamp: str) -> Any:
    from dl4gam_assets.imagery import open_catalog

    imagery = site.region.imagery
    return open_catalog(imagery.catalog, site.data_root, imagery.sensor)


@functools.lru_cache(maxsize=4)
def _index(site: Site, year: int, stamp: float) -> Any:
    from dl4gam_assets.imagery import read_items

    with site.storage.reading(index_path(site, year)) as local:
        return read_items(local)


def index_path(site: Site, year: int) -> Any:
    return site.storage.path("items", f"{year}.jsonl")


def catalog_of(site: Site, year: int, stamp: str = "") -> Any:
    """The items that a year's glaciers may use, opened once a process (and again when ``stamp`` changes).

    Of a STAC API or GeoParquet files it is the item index in the store, which one search for many glaciers wrote; the
    API is not asked.
    """
    path = index_path(site, year)
    if isinstance(site.region.imagery.catalog, _SEARCHED) and path.exists():
        return _index(site, year, path.stat().st_mtime)
    return _catalog(site, stamp)


def catalog_fingerprint(ws: Workspace, year: int) -> str:
    """Identity of what a search in the catalog can find now.

    Of a catalog in files it is their names, and the content of those that are JSON: whether a scene is another file
    than it was is followed file by file (``stages.files``), so that only the glaciers that it concerns are made again.
    """
    catalog = ws.region.imagery.catalog
    if isinstance(catalog, StacFolder):
        if ws.region.simulation is not None:
            return ws.upstream("simulated_inputs")
        folder = (ws.data_root / catalog.path).parent
        documents = sorted(folder.rglob("*.json"))
        return fingerprint([(f.relative_to(folder).as_posix(), sampled_hash(f)) for f in documents])
    if isinstance(catalog, StacApi):
        # The past does not change; a season that is not over may still get scenes.
        season_end = dt.date.fromisoformat(f"{year}-{ws.region.imagery.window[1]}") + dt.timedelta(days=30)
        open_season = dt.date.today() <= season_end
        identity = f"{catalog.url} {catalog.collections} {catalog.query}"
        if catalog.href_prefixes:  # stored items have the addresses that these made
            identity += f" {catalog.href_prefixes}"
        return f"{identity} {dt.date.today()}" if open_season else identity
    if isinstance(catalog, StacGeoparquet):
        pattern = str(ws.data_root / catalog.path)
        files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        return fingerprint([(f, Path(f).stat().st_size, Path(f).stat().st_mtime_ns) for f in files])
    folder, of_scenes = ws.data_root / catalog.path, re.compile(catalog.pattern)
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.tif"))
    return fingerprint([name for name in names if of_scenes.search(name)])


def _opened_as(ws: Workspace, year: int) -> str:
    """What a catalog that is kept open in a process is known by: opened again where a scene's ground may be another."""
    catalog = ws.region.imagery.catalog
    if isinstance(catalog, SceneFolder):
        return folder_fingerprint(ws.data_root / catalog.path, "*.tif")
    return catalog_fingerprint(ws, year)


def search_items(ws: Workspace, year: int, glaciers: Any, stamp: str, again: bool = False) -> dict[str, Any]:
    """Search a catalog once for many glaciers and keep what is found in the store.

    One search a cell of one degree and season, four at a time. Each is a file that is written when its search is
    ready, named after the catalog's identity (``stamp``), the box, the days and the assets: a run that was killed, or
    another glacier, asks only for what is not there yet. ``again`` asks for everything. At the end they are joined to
    the year's item index. Returns figures for the metadata.

    Raises
    ------
    CatalogError
        if a search fails; the searches that were ready stay.
    """
    from dl4gam_assets.imagery import assets_of, merge_items, open_catalog, search_plan, search_window, write_items

    imagery = ws.region.imagery
    names = assets_of(imagery)
    folder = ws.storage.path("items", f"year={year}")
    plan = {
        folder / f"{fingerprint([SEARCH_VERSION, stamp, part, names])}.jsonl": part
        for part in search_plan(search_window(row, ws.region, year) for _, row in glaciers.iterrows())
    }
    todo = {path: part for path, part in plan.items() if again or not path.exists()}
    catalog: Any = open_catalog(imagery.catalog, ws.data_root, imagery.sensor) if todo else None
    start = last = time.monotonic()

    def ask(task: tuple[Any, Any]) -> int:
        path, part = task
        items = catalog.search(*part)
        with ws.storage.writing(path) as temporary:
            return write_items(items, names, temporary)

    found = 0
    with ThreadPoolExecutor(SEARCHES_AT_ONCE) as pool:
        futures = [pool.submit(ask, task) for task in todo.items()]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                found += future.result()
                now = time.monotonic()
                if now - last >= 10 or done == len(todo):
                    last = now
                    ws.logger.info(
                        f"scene_candidates [{year}]: {done} of {len(todo)} searches, {found} items"
                        f" in {now - start:.0f} s"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those under way end, the others need not begin
            raise
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(ws.storage.reading(path)) for path in plan]
        with ws.storage.writing(index_path(ws.site, year)) as temporary:
            items = merge_items(parts, temporary)
    current = {path.name for path in plan}
    for path in list(folder.glob("*.jsonl")) if folder.exists() else ():
        if path.name not in current:
            path.unlink()  # of another catalog, or of another day of an open season
    return {"searches": len(plan), "searched_now": len(todo), "items": items}


class _Reading(Mapper):
    """A mapper over :func:`candidates_of` whose progress also says how much was read."""

    def __init__(self, inner: Mapper, say: Callable[[str], None]):
        self.inner, self.say = inner, say

    def map(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[str, Sequence[Any]]],
        *,
        progress: Callable[[int, int, float], None] | None = None,
        every_s: float = 10.0,
    ) -> Iterator[Done]:
        todo = list(tasks)
        start = last = time.monotonic()
        read = stored = 0
        for count, done in enumerate(self.inner.map(function, todo), start=1):
            if done.ok:
                read += done.value[1]
                stored += done.value[2]
            now = time.monotonic()
            if now - last >= every_s or count == len(todo):
                last = now
                rate = 60.0 * count / max(now - start, 1e-9)
                self.say(
                    f"{count} of {len(todo)} glaciers ({stored} scored before), {rate:.0f} a minute,"
                    f" {read / 1e6:.1f} MB read"
                )
            yield done


#: Settings of the choice that change no score: with others the scores on disk are used again.
_NO_SCORES = {"coverage_min", "cloud_max", "ranking", "weights", "fallback_cloud_tolerance", "overrides"}


def _score_settings(region: Region) -> dict[str, Any]:
    out = region.imagery.model_dump(mode="json", exclude={"catalog", "preset", "window", "baseline"})
    out["selection"] = {k: v for k, v in out["selection"].items() if k not in _NO_SCORES}
    return out


def candidates_of(
    site: Site, year: int, glacier_id: str, stamp: str, again: bool = False
) -> tuple[pd.DataFrame, int, bool]:
    """Candidate rows of one glacier and year, from its file in the store if nothing behind them changed; runs in a
    worker process.

    Returns the rows, the bytes that were read, and whether they were there already. ``again`` scores in any case.
    """
    from dl4gam_assets.imagery import assets_of, candidates_of_glacier, item_checksums, items_of_glacier
    from dl4gam_assets.imagery.signing import unsigned

    region = site.region
    glaciers = cached_table(site, "glaciers")
    glacier = rows_of(glaciers, glacier_id).iloc[0]
    zones = cached_table(site, "zones")
    zones = rows_of(zones, glacier_id)
    catalog = catalog_of(site, year, stamp)
    items = items_of_glacier(glacier, catalog, region, year)
    names = assets_of(region.imagery)
    near = glaciers.iloc[glaciers.sindex.query(glacier["geometry"].buffer(_NEAR_DEG), predicate="intersects")]
    key = input_fingerprint(
        {
            "code": code_fingerprint(_CODE),
            "items": {i: item_checksums(item, names) for i, item in sorted(items.items())},
            "outlines": _shapes_hash(pd.concat([near.geometry, zones.geometry])),
            "settings": _score_settings(region),
        }
    )
    path = site.storage.path("candidates", f"year={year}", f"{safe_name(glacier_id)}.parquet")
    stored = None if again else _stored_rows(site, path, key)
    if stored is not None:
        return TABLES["candidates"].conform(stored.assign(year=year)).drop(columns="year"), 0, True
    frame = candidates_of_glacier(glacier, glaciers, zones, catalog, region, year, items)
    frame["reason"] = frame["reason"].map(unsigned, na_action="ignore")  # messages may hold a signed address
    # A server that was silent now may answer later: such rows are not kept, so that the next run asks again.
    if len(frame) and not frame.attrs.get("unreachable"):
        with site.storage.writing(path) as temporary:
            frame.assign(key=key).to_parquet(temporary, index=False)
    if frame.attrs.get("unreachable") == len(frame) and len(frame):
        raise UnreachableError(f"no scene could be reached: {frame['reason'].iloc[0]}")
    return frame, int(frame.attrs.get("bytes_read", 0)), False


def _stored_rows(site: Site, path: Any, key: str) -> pd.DataFrame | None:
    """Rows that were scored from the same inputs; None where there are none, or the file is damaged."""
    if not path.exists():
        return None
    try:
        with site.storage.reading(path) as local:
            stored = pd.read_parquet(local)
    except (OSError, ValueError):  # ValueError: no Parquet file any more
        return None
    return stored.drop(columns="key") if len(stored) and (stored["key"] == key).all() else None


def _shapes_hash(shapes: Any) -> str:
    import shapely

    digest = hashlib.sha256()
    for blob in sorted(shapely.to_wkb(shapes.to_numpy())):
        digest.update(blob)
    return digest.hexdigest()[:16]


def scene_candidates(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Score every scene of the season over each modelled glacier. ``force`` asks the catalog again too."""
    force = force or ws.force
    if (manifest := published.cubes_import(ws.storage, year)) is not None:
        return published.scene_candidates(ws, year, manifest, force=force)
    label = str(year)
    catalog = catalog_fingerprint(ws, year)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        glaciers = glaciers[glaciers["modelled"].astype(bool)]
        ids = glaciers["glacier_id"].tolist()
        found_items: dict[str, Any] = {}
        if isinstance(ws.region.imagery.catalog, _SEARCHED):
            found_items = search_items(ws, year, glaciers, catalog, force)
        opened = _opened_as(ws, year)
        start = time.perf_counter()
        mapper = _Reading(ws.mapper, lambda words: ws.logger.info(f"scene_candidates [{year}]: {words}"))
        values, failures = dataclasses.replace(ws, mapper=mapper).over_glaciers(
            "scene_candidates", label, candidates_of, [(g, (ws.site, year, g, opened, force)) for g in ids]
        )
        seconds = max(time.perf_counter() - start, 1e-6)
        silent = [
            (g, f"{n} of {len(rows)} scenes could not be reached: run again to score them", "Unreachable")
            for g, (rows, _, _) in values.items()
            if (n := rows.attrs.get("unreachable", 0))
        ]
        if silent:  # the partition is not complete, so the next run asks the server again
            known = [(r.glacier_id, r.error, r.kind) for r in failures.itertuples()]
            failures = ws.write_failures("scene_candidates", label, known + silent)
        found = [frame for frame, _, _ in values.values() if len(frame)]
        frame = pd.concat(found, ignore_index=True) if found else TABLES["candidates"].empty()
        frame["year"] = year
        frame = frame[[c.name for c in TABLES["candidates"].columns if c.name in frame]]
        ws.storage.write_table("candidates", frame, {"year": year})
        record_files(ws, "scene_candidates", label, scene_files(frame), sampled_hash)
        metadata = {
            "candidates": len(frame),
            "dates": int(frame["date"].nunique()),
            "glaciers_with_candidates": int(frame["glacier_id"].nunique()),
            "glaciers": len(ids),
            "scored_now": sum(not stored for _, _, stored in values.values()),
            "failed_glaciers": len(failures),
            "median_cloud_share": _median(frame["cloud_share"]),
            "megabytes_read": sum(read for _, read, _ in values.values()) / 1e6,
            "glaciers_per_minute": 60.0 * len(values) / seconds,
            **found_items,
        }
        return frame_fingerprint(frame), metadata, {}

    inputs = {
        "glaciers": ws.upstream("inventory_outlines"),
        "zones": ws.upstream("glacier_zones"),
        "catalog": catalog,
        "code": code_fingerprint(_CODE),
        "settings": _score_settings(ws.region),
        "search": ws.region.imagery.model_dump(mode="json", include={"window", "baseline"}),
        "years": ws.region.years.baseline == year,
    }
    changed = [str(file) for file in changed_files(ws, "scene_candidates", label, sampled_hash)]
    return run_stage(ws, "scene_candidates", label, inputs, work, force=force, changed=changed)


def selected_scenes(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Rank the candidates, apply the overrides and keep the best scene of each glacier."""
    if published.cubes_import(ws.storage, year) is not None:
        return published.selected_scenes(ws, year, force=force)
    from dl4gam_assets.imagery import rank_candidates, read_overrides, select_scenes

    label = str(year)
    selection = ws.region.imagery.selection
    override_file = override_file_of(ws)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        candidates = ws.storage.read_table("candidates", year=year)
        overrides = None
        if override_file is not None:
            overrides = read_overrides(override_file, glaciers, ws.region.years.all(), ws.region.years.baseline)
        scenes = select_scenes(rank_candidates(candidates, selection), year, overrides)
        ws.storage.write_table("scenes", scenes, {"year": year})
        scenes = ws.storage.read_table("scenes", year=year)
        chosen = scenes[scenes["selected"].astype(bool)]
        modelled = glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"]
        missing = sorted(set(modelled) - set(chosen["glacier_id"]))
        ws.write_failures("selected_scenes", label, [(g, _no_image(scenes, g, year), "NoImage") for g in missing])
        days = chosen["date"].dt.strftime("%Y-%m-%d").value_counts().sort_index()
        metadata = {
            "glaciers_with_image": len(chosen),
            "glaciers_without_image": len(missing),
            "candidates": len(scenes),
            "mean_cloud_share": _mean(chosen["cloud_share"]),
            "mean_ndsi_of_surroundings": _mean(chosen["ndsi"]),
            "dates": [{"date": day, "glaciers": int(n)} for day, n in days.items()],
            "overrides": 0 if overrides is None else len(overrides),
        }
        from dl4gam_assets.stages.plates import plates_of_year

        return frame_fingerprint(scenes), metadata, plates_of_year(ws, year, PLATES)

    inputs = {
        "candidates": ws.upstream("scene_candidates", label),
        "selection": selection.model_dump(mode="json"),
        "overrides": file_fingerprint(override_file) if override_file is not None else None,
    }
    return run_stage(ws, "selected_scenes", label, inputs, work, force=force)


def override_file_of(ws: Workspace) -> Path | None:
    """The override file of the region: below data_root, or shipped with the package (``package:NAME``)."""
    name = ws.region.imagery.selection.overrides
    if name is None:
        return None
    if name.startswith("package:"):
        return Path(str(resources.files("dl4gam_assets") / "regions" / name.removeprefix("package:")))
    return ws.data_root / name


def _no_image(scenes: pd.DataFrame, glacier_id: str, year: int) -> str:
    mine = scenes[scenes["glacier_id"] == glacier_id]
    if not len(mine):
        return f"no scene of {year} touches the glacier in the search window; widen imagery.window or add scenes"
    reasons = "; ".join(f"{r.date:%Y-%m-%d}: {r.reason}" for r in mine.sort_values("date").head(4).itertuples())
    if mine["reason"].str.startswith("override").any():
        return (
            f"none of {len(mine)} scenes of {year} is used, as a line of imagery.selection.overrides says ({reasons})"
        )
    return (
        f"none of {len(mine)} scenes of {year} is acceptable ({reasons}); add an override line to use one all the same"
    )


def _median(values: pd.Series) -> float | None:
    clean = values.dropna()
    return float(clean.median()) if len(clean) else None


def _mean(values: pd.Series) -> float | None:
    clean = values.dropna()
    return float(clean.mean()) if len(clean) else None
