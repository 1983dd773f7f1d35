"""Which estimates no longer match what their inputs are now, and why.

Belongs here: asking every partition whether its inputs are the same, following what is not along the graph to the
estimates, and the reasons in words. Does not belong here: making anything again (a run of the same assets does, and
touches only what is stale).

A partition is *stale* if its settings, files or upstream results are not those that it was made from. What depends on
it is stale too, as far down as the glaciers that it concerns:

- Another file of a scene concerns the glaciers whose image it is. Glaciers for which it was only a candidate **may
  change**: the choice is made anew.
- Another tile of elevation or dh/dt concerns the glaciers that touch it; other rules of the choice of images concern
  the glaciers for which they choose another one (the choice is made again to find out, in memory).
- A cube of the inventory year trains and validates the folds in which its glacier has that role, and what a fold's
  models map is stale with them. A fold that only tests the glacier keeps its models.
- Weights, calibration and settings concern all that the fold, the year, or the region made with them.

Partitions with failed glaciers are tried again by the next run, which makes nothing stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from upath import UPath

from dl4gam_assets.lineage.environment import settings_difference, software
from dl4gam_assets.settings import SettingsError
from dl4gam_assets.stages.base import (
    NamedInputs,
    StageResult,
    UpstreamError,
    Workspace,
    code_version,
    fold_label,
    fold_member_label,
    read_named,
    year_fold_label,
)
from dl4gam_assets.stages.files import changed_files, sampled_hash
from dl4gam_assets.stages.registry import PARTITIONED, STAGES, probe

Ids = frozenset[str]
NONE: Ids = frozenset()
#: Assets in an order in which everything comes after what it reads.
ORDER = (
    "simulated_inputs", "inventory_outlines", "debris_outlines", "glacier_zones", "cross_validation_folds", "elevation",
    "scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes", "normalization", "band_ratio_baseline",
    "ensemble_member", "ensemble", "calibration", "glacier_predictions", "interval_taus", "evaluation", "glacier_areas",
    "baseline_areas", "glacier_outlines", "area_change", "regional_change", "area_trends", "results_database", "report",
    "stac_catalog",
)  # fmt: skip
#: Roles whose cubes a fold's asset reads.
_ROLES = {
    "normalization": ("train",), "ensemble_member": ("train", "valid"), "calibration": ("valid",),
    "band_ratio_baseline": ("train", "valid"),
}  # fmt: skip
_LIMIT = 6


@dataclass(frozen=True)
class Cause:
    """Why a partition is stale: its own inputs, not those of its upstream."""

    asset: str
    partition: str
    reasons: tuple[str, ...]
    certain: Ids  # glaciers that it concerns
    possible: Ids  # glaciers that it may concern

    def __str__(self) -> str:
        shown = "; ".join(self.reasons[:_LIMIT])
        more = f"; and {len(self.reasons) - _LIMIT} more" if len(self.reasons) > _LIMIT else ""
        return f"{self.asset} [{self.partition}]: {shown}{more}"


@dataclass
class Staleness:
    """``causes`` where something is other than it was; ``partitions`` by asset; ``estimates`` with reasons.

    ``partitions``: DataFrame (asset, partition, own, n_glaciers): partitions that are stale, ``own`` by themselves or
    because of what they read. ``estimates``: DataFrame (glacier_id, year, fold, state, reasons) with the state
    ``stale`` or ``may change``. ``gone``: files that results were made from and that are not there any more, which
    makes nothing stale. ``lost``: cubes and maps of the store that tables name and that are not there, or have another
    size: the next run does not find out, so it has to be asked to make them again. ``other_programs``: what was made by
    another version of the code or of a package than runs now, which makes nothing stale either. ``checked``: partitions
    that were looked at.
    """

    causes: list[Cause] = field(default_factory=list)
    partitions: pd.DataFrame = field(default_factory=pd.DataFrame)
    estimates: pd.DataFrame = field(default_factory=pd.DataFrame)
    gone: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    other_programs: list[str] = field(default_factory=list)
    checked: int = 0

    @property
    def current(self) -> bool:
        return not self.causes


def partitions_of(ws: Workspace, asset: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Label and numbers of every partition that an asset has."""
    region = ws.region
    folds = range(1, region.folds.n + 1)
    kind = PARTITIONED.get(asset, "none")
    if kind == "year":
        yield from ((str(y), (y,)) for y in region.years.all())
    elif kind == "fold":
        yield from ((fold_label(f), (f,)) for f in folds)
    elif kind == "year_fold":
        yield from ((year_fold_label(y, f), (y, f)) for y in region.years.all() for f in folds)
    elif kind == "fold_member":
        members = range(1, region.training.members + 1)
        yield from ((fold_member_label(f, m), (f, m)) for f in folds for m in members)
    else:
        yield "all", ()


def find_stale(ws: Workspace) -> Staleness:
    """Compare every materialized partition with what its inputs are now. Nothing is written.

    Raises
    ------
    UpstreamError
        if nothing is materialized.
    """
    storage = ws.storage
    if storage.read_state("inventory_outlines") is None:
        raise UpstreamError(f"nothing is materialized in {storage.root}: run `dl4gam materialize`")
    estimates = storage.read_table("areas")[["glacier_id", "year", "fold"]]
    folds = storage.read_table("folds")
    graph = _Graph(ws, estimates, folds)
    out = Staleness()
    for asset in ORDER:
        if asset not in STAGES and asset != "ensemble_member":
            continue
        for label, numbers in partitions_of(ws, asset):
            state = storage.read_state(asset, label)
            if state is None:
                continue
            out.checked += 1
            cause, named = _cause(ws, graph, asset, label, numbers, state)
            if cause is not None:
                out.causes.append(cause)
            graph.add(asset, label, numbers, named, cause)
            if asset == "scene_candidates":
                lost = [f for f in changed_files(ws, asset, label, sampled_hash, gone=True) if f.gone]
                out.gone += [f.path for f in lost]
    out.gone = sorted(set(out.gone))
    out.lost = _lost(ws)
    out.other_programs = _other_programs(ws)
    out.partitions = graph.stale_partitions()
    out.estimates = graph.stale_estimates()
    return out


def _lost(ws: Workspace) -> list[str]:
    """Cubes and maps that their tables name, and that are gone, empty or (cubes) of another size."""
    out = []
    cubes, maps = ws.storage.read_table("cubes"), ws.storage.read_table("predictions")
    files: list[tuple[UPath, int | None]] = [
        (ws.storage.cube(int(r.year), str(r.glacier_id)), int(r.size_bytes)) for r in cubes.itertuples()
    ]
    files += [(ws.storage.prediction(int(r.year), str(r.glacier_id)), None) for r in maps.itertuples()]
    for path, size in files:
        try:
            now = path.stat().st_size
        except FileNotFoundError:
            out.append(f"{path} is gone")
            continue
        if now == 0 or (size is not None and now != size):
            out.append(f"{path} is damaged: {now} bytes" + ("" if size is None else f" instead of {size}"))
    return sorted(out)


def _other_programs(ws: Workspace) -> list[str]:
    """Lines that say how many partitions were made by other code or packages than run now."""
    versions, packages = Counter[str](), Counter[str]()
    for asset in ORDER:
        for label, _ in partitions_of(ws, asset):
            state = ws.storage.read_state(asset, label)
            if state is not None:
                versions[str(state.get("code_version"))] += 1
                packages[str(state.get("software"))] += 1
    here, now = code_version(), software()
    out = [f"{n} partitions were made by dl4gam_assets {v}; this is {here}" for v, n in versions.items() if v != here]
    for key, n in packages.items():
        rows = ws.storage.read_table("software", fingerprint=key)
        then = dict(zip(rows["package"], rows["version"], strict=True))
        changed = settings_difference(then, now) if then else {}
        if changed:
            shown = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in list(changed.items())[:_LIMIT])
            more = f" and {len(changed) - _LIMIT} more" if len(changed) > _LIMIT else ""
            out.append(f"{n} partitions were made with other packages: {shown}{more}")
    return sorted(out)


# --------------------------------------------------------------------------------------------- one partition
def _cause(
    ws: Workspace, graph: _Graph, asset: str, label: str, numbers: tuple[int, ...], state: dict[str, Any]
) -> tuple[Cause | None, NamedInputs | None]:
    """Why a partition is stale by itself (None where it is not), and what it was made from."""
    before = read_named(ws.storage, asset, label, state["input"])
    try:
        now = probe(ws, asset, numbers)
    except (UpstreamError, OSError, SettingsError) as error:
        concerned = graph.reach(asset, numbers, certain=False)
        return Cause(asset, label, (f"can not be made again now: {error}",), *concerned), before
    if now.input == state["input"]:
        before = before or now.inputs  # made by an older version, from the same
        if not now.changed:
            return None, before
    keys = _changed_keys(before, now.inputs)
    reasons = [*_words(keys, before, now.inputs), *now.changed]
    if not reasons:
        reasons = ["made by another version, which kept no names of its inputs" if before is None else "other inputs"]
    try:
        certain, possible = _concerned(ws, graph, asset, label, numbers, keys, now, before)
    except SettingsError as error:  # an override file that can not be used: what it chooses is not known
        reasons.append(str(error))
        certain, possible = graph.reach(asset, numbers, certain=False)
    return Cause(asset, label, tuple(reasons), certain, possible), before or now.inputs


def _changed_keys(before: NamedInputs | None, now: NamedInputs | None) -> list[str]:
    if before is None or now is None:
        return []
    absent = object()
    return [k for k in sorted(before.values | now.values) if before.values.get(k, absent) != now.values.get(k, absent)]


def _words(keys: Sequence[str], before: NamedInputs | None, now: NamedInputs | None) -> list[str]:
    out = []
    for key in keys:
        assert before is not None and now is not None
        where = now.upstream.get(key) or before.upstream.get(key)
        if where is not None:
            part = "glaciers of it that matter here" if len(where) > 2 else "it"
            out.append(f"{where[0]} [{where[1]}] was made again, and {part} came out otherwise")
        elif key not in before.values:
            out.append(f"{key} is new: {now.values[key]}")
        elif key not in now.values:
            out.append(f"{key} is gone (it was {before.values[key]})")
        elif key.split(".")[0] in _FILES:
            out.append(f"{key} is another file than it was")
        else:
            out.append(f"{key} is {now.values[key]}, and was {before.values[key]}")
    return out


#: Named inputs that are files or lists of them.
_FILES = frozenset({"file", "files", "dem", "velocity", "overrides", "source", "reference", "catalog"})
_AFTER_ESTIMATES = frozenset(ORDER[ORDER.index("baseline_areas") :]) | {"evaluation", "band_ratio_baseline"}


def _concerned(
    ws: Workspace, graph: _Graph, asset: str, label: str, numbers: tuple[int, ...], keys: Sequence[str],
    now: StageResult, before: NamedInputs | None,
) -> tuple[Ids, Ids]:  # fmt: skip
    """Glaciers that a partition's own change certainly concerns, and those that it may concern."""
    if asset in _AFTER_ESTIMATES:
        return NONE, NONE
    everything = graph.reach(asset, numbers)[0]
    if asset == "scene_candidates":
        certain, touched = _of_files(ws, label, numbers[0])
        # Another search or other scores: any glacier may get another image. Files are followed one by one even then.
        return certain, (everything if keys or before is None else touched) - certain
    if asset == "selected_scenes" and keys and not any(k.startswith("candidates") for k in keys):
        return _other_choice(ws, numbers[0]), NONE
    if asset in {"elevation", "elevation_change"} and not keys and now.changed:  # of published cubes, by glacier
        touched_files = changed_files(ws, asset, label, sampled_hash)
        return frozenset(everything & {g for file in touched_files for g in file.labels}), NONE
    if asset in {"elevation", "elevation_change"} and keys:
        found = _of_tiles(ws, graph, asset, keys, numbers)
        if found is not None:
            return found, NONE
    return everything, NONE


def _of_files(ws: Workspace, label: str, year: int) -> tuple[Ids, Ids]:
    """Glaciers whose image has a file that is another one now, and those for which it is only a candidate."""
    items = {item for file in changed_files(ws, "scene_candidates", label, sampled_hash) for item in file.labels}
    if not items:
        return NONE, NONE

    def holding(table: pd.DataFrame) -> Ids:
        return frozenset(table.loc[[not items.isdisjoint(str(s).split("+")) for s in table["scene_ids"]], "glacier_id"])

    scenes = ws.storage.read_table("scenes", year=year)
    certain = holding(scenes[scenes["selected"].astype(bool)])
    return certain, holding(ws.storage.read_table("candidates", year=year)) - certain


def _other_choice(ws: Workspace, year: int) -> Ids:
    """Glaciers for which the rules of now choose another image from the same candidates."""
    from dl4gam_assets.imagery import rank_candidates, read_overrides, select_scenes
    from dl4gam_assets.stages.imagery import override_file_of

    file = override_file_of(ws)
    overrides = None
    if file is not None:
        glaciers = ws.storage.read_table("glaciers")
        overrides = read_overrides(file, glaciers, ws.region.years.all(), ws.region.years.baseline)
    ranked = rank_candidates(ws.storage.read_table("candidates", year=year), ws.region.imagery.selection)
    now, then = select_scenes(ranked, year, overrides), ws.storage.read_table("scenes", year=year)
    chosen = [
        set(map(tuple, f.loc[f["selected"].astype(bool), ["glacier_id", "scene_ids"]].astype(str).to_numpy()))
        for f in (now, then)
    ]
    return frozenset(g for g, _ in chosen[0] ^ chosen[1])


def _of_tiles(ws: Workspace, graph: _Graph, asset: str, keys: Sequence[str], numbers: tuple[int, ...]) -> Ids | None:
    """Glaciers whose grid touches other tiles now than when they were read: replaced, added or removed ones.

    None where something else changed too, or tiles are found by a search (``terrain.dem_catalog``).
    """
    from dl4gam_assets.stages.provenance import tiles_before, tiles_near, tiles_now

    heads = {"dem", "velocity"} if asset == "elevation" else {"files"}
    if any(k.split(".")[0] not in heads for k in keys) or (asset == "elevation" and ws.region.terrain.dem_catalog):
        return None
    before, now = (find(ws, asset, *numbers) for find in (tiles_before, tiles_now))
    return frozenset(g for g in graph.universe if tiles_near(ws.site, g, before) != tiles_near(ws.site, g, now))


# --------------------------------------------------------------------------------------------- along the graph
class _Graph:
    """What is stale, cause by cause: for each partition the glaciers concerned, certainly and possibly."""

    def __init__(self, ws: Workspace, estimates: pd.DataFrame, folds: pd.DataFrame):
        self.ws, self.estimates = ws, estimates
        self.universe: Ids = frozenset(map(str, estimates["glacier_id"].unique()))
        roles = folds.groupby(["fold", "role"])["glacier_id"].agg(frozenset).to_dict()
        self.roles: dict[tuple[int, str], Ids] = {(int(f), str(r)): ids for (f, r), ids in roles.items()}
        self.causes: list[Cause] = []
        self.found: dict[tuple[str, str], dict[int, tuple[Ids, Ids]]] = {}
        self.own: set[tuple[str, str]] = set()

    def tested(self, fold: int) -> Ids:
        return self.roles.get((fold, "test"), NONE)

    def reach(self, asset: str, numbers: tuple[int, ...], certain: bool = True) -> tuple[Ids, Ids]:
        """All glaciers whose estimates a partition can concern, as the certain or the possible ones."""
        kind = PARTITIONED.get(asset, "none")
        ids = self.universe
        if kind in {"fold", "fold_member"}:
            ids = self.tested(numbers[0])
        elif kind == "year_fold":
            ids = self.tested(numbers[1])
        return (ids, NONE) if certain else (NONE, ids)

    def add(
        self, asset: str, label: str, numbers: tuple[int, ...], named: NamedInputs | None, cause: Cause | None
    ) -> None:
        """Join a partition's own cause with those of what it was made from."""
        scopes: dict[int, tuple[Ids, Ids]] = {}
        for key, (upstream, upstream_label, *_) in (named.upstream if named else {}).items():
            for number, scope in self.found.get((upstream, upstream_label), {}).items():
                passed = self._passed(asset, numbers, key, upstream, scope)
                if passed is not None:
                    old = scopes.get(number, (NONE, NONE))
                    scopes[number] = (old[0] | passed[0], old[1] | passed[1])
        if cause is not None:
            self.causes.append(cause)
            self.own.add((asset, label))
            scopes[len(self.causes) - 1] = (cause.certain, cause.possible)
        if scopes:
            self.found[asset, label] = scopes

    def _passed(
        self, asset: str, numbers: tuple[int, ...], key: str, upstream: str, scope: tuple[Ids, Ids]
    ) -> tuple[Ids, Ids] | None:
        """What of an upstream's scope a partition takes over; None: it is not concerned."""
        certain, possible = scope
        if asset in _AFTER_ESTIMATES:
            return scope
        if asset in _ROLES and upstream == "glacier_cubes":
            ids = frozenset().union(*(self.roles.get((numbers[0], role), NONE) for role in _ROLES[asset]))
            tested = self.tested(numbers[0])
            if certain & ids:
                return tested, NONE
            return (NONE, tested) if possible & ids else None
        if asset == "interval_taus" and key.startswith("other_calibrations"):
            # Scores of other folds enter conformal intervals, and published ones where the fold's own are few.
            if self.ws.region.calibration.intervals == "published":
                taus = self.ws.storage.read_table("taus", fold=numbers[0])
                if not (taus["published_scope"] == "folds").any():
                    return None
            tested = self.tested(numbers[0])
            return (tested, NONE) if certain else (NONE, tested)
        kind = PARTITIONED.get(asset, "none")
        if kind in {"fold", "fold_member"} and upstream in {"inventory_outlines", "debris_outlines"}:
            tested = self.tested(numbers[0])
            return (tested, NONE) if certain else (NONE, tested) if possible else None
        if kind in {"fold", "fold_member", "year_fold"}:
            tested = self.tested(numbers[-1] if kind == "year_fold" else numbers[0])
            if upstream in {"cross_validation_folds", "normalization"}:
                return (tested, NONE) if certain else (NONE, tested) if possible else None
            certain, possible = certain & tested, possible & tested
            return (certain, possible) if certain or possible else None
        return scope

    def stale_partitions(self) -> pd.DataFrame:
        rows = [
            (asset, label, (asset, label) in self.own, len(frozenset().union(*(c for c, _ in scopes.values()))))
            for (asset, label), scopes in self.found.items()
        ]
        return pd.DataFrame(rows, columns=["asset", "partition", "own", "n_glaciers"])

    def stale_estimates(self) -> pd.DataFrame:
        frames = []
        for (year, fold), mine in self.estimates.groupby(["year", "fold"]):
            scopes = self.found.get(("glacier_areas", year_fold_label(int(year), int(fold))), {})
            if not scopes:
                continue
            text = {number: str(self.causes[number]) for number in scopes}
            rows = []
            for glacier_id in mine["glacier_id"]:
                certain = [n for n, (c, _) in scopes.items() if glacier_id in c]
                possible = [n for n, (_, p) in scopes.items() if glacier_id in p and n not in certain]
                if certain or possible:
                    state = "stale" if certain else "may change"
                    reasons = " | ".join(text[n] for n in (certain or possible))
                    rows.append((glacier_id, int(year), int(fold), state, reasons))
            frames.append(pd.DataFrame(rows, columns=["glacier_id", "year", "fold", "state", "reasons"]))
        columns = ["glacier_id", "year", "fold", "state", "reasons"]
        found = [f for f in frames if len(f)]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
