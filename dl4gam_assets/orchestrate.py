"""Materialize many partitions with few runs: what the command line does with Dagster.

Belongs here: which partitions are out of date, and running them, family by family, in this process as range runs.
Does not belong here: work of the assets, words of the command line.

A process for each of 10 years x 5 folds would spend its time on imports, so each family of partitions is one range run
in this process; Dagster still records a materialization for every partition.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import dagster as dg
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from dl4gam_assets.checks import what_to_do
from dl4gam_assets.gate import DESPITE_TAG, Gate
from dl4gam_assets.partitions import Partitions, fold_of, member_of, year_of
from dl4gam_assets.resources import FORCE_TAG
from dl4gam_assets.settings import Region
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.stages.registry import is_current
from dl4gam_assets.storage import Storage
from dl4gam_assets.upkeep import busy_pools, give_up_lost_runs, own_process

#: Families in the order of the graph: (partition family, assets that share one run).
FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("none", ("simulated_inputs",)),
    (
        "none",
        ("inventory_outlines", "debris_outlines", "glacier_zones", "cross_validation_folds", "elevation"),
    ),
    ("year", ("scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes")),
    ("fold", ("normalization", "band_ratio_baseline")),
    ("fold_member", ("ensemble_member",)),
    ("fold", ("ensemble", "calibration")),
    ("year_fold", ("glacier_predictions",)),
    ("fold", ("interval_taus", "evaluation")),
    ("year_fold", ("glacier_areas",)),
    ("none", ("baseline_areas",)),
    ("year", ("glacier_outlines", "area_change", "regional_change")),
    ("none", ("area_trends", "results_database")),
    ("year", ("report", "stac_catalog")),
)


#: Seconds between two looks at a pool that another run fills.
POOL_WAIT_S = 2.0

#: The events are kept in the instance; the terminal shows one line a family.
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass
class Timing:
    """Seconds of one family: in all, and of the stages themselves; the rest is orchestration."""

    family: str
    assets: tuple[str, ...]
    partitions: int
    seconds: float
    stage_seconds: float

    @property
    def overhead_s(self) -> float:
        return max(self.seconds - self.stage_seconds, 0.0)


@dataclass
class Outcome:
    """What a call did: seconds by family, and what failed: steps, and blocking checks with what they hold back."""

    timings: list[Timing] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.timings)

    @property
    def overhead_s(self) -> float:
        return sum(t.overhead_s for t in self.timings)


def dagster_home(storage: Storage) -> Path:
    """Folder of the Dagster instance beside the results, with the shipped dagster.yaml if it has none.

    For an object store it is a folder of this machine: set DAGSTER_HOME to choose it.
    """
    configured = os.environ.get("DAGSTER_HOME")
    if configured:
        folder = Path(configured)
    elif storage.is_local:
        folder = Path(str(storage.path("dagster")))
    else:
        folder = Path.home() / ".dl4gam" / storage.root.name / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "dagster.yaml"
    if not settings.exists():
        shipped = (resources.files("dl4gam_assets") / "dagster.yaml").read_text(encoding="utf-8")
        with Storage(folder).writing(settings) as temporary:  # type: ignore[arg-type]
            temporary.write_text(shipped, encoding="utf-8")
    return folder


@contextlib.contextmanager
def instance(storage: Storage) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance beside the results; while it is open DAGSTER_HOME names it for other processes."""
    folder, before = dagster_home(storage), os.environ.get("DAGSTER_HOME")
    os.environ["DAGSTER_HOME"] = str(folder)
    try:
        with dg.DagsterInstance.get() as opened:
            yield opened
    finally:
        os.environ.pop("DAGSTER_HOME")
        if before is not None:
            os.environ["DAGSTER_HOME"] = before


def materialize(
    definitions: dg.Definitions,
    region: Region,
    storage: Storage,
    *,
    years: Sequence[int] | None = None,
    folds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    force: bool = False,
    despite_checks: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Bring the graph up to date for the given years and folds (all by default).

    Each family of partitions is one range run per contiguous range; stages skip partitions whose inputs are unchanged.
    The baseline year is always taken along, because every change needs it. Assets after a failed partition go on with
    what is there; the failures are returned. What would be made from a partition that a blocking check failed is left
    out, in this call and in each later one until the check passes, and is returned among the failures each time;
    ``despite_checks`` makes it all the same, and returns the failed checks alone. ``force`` makes what was asked for,
    and no other year, even where nothing changed: catalogs are searched and scenes read anew.
    """
    partitions = Partitions(region)
    wanted_years = sorted(years if years is not None else region.years.all())
    if not force:
        wanted_years = sorted({*wanted_years, region.years.baseline})
    wanted_folds = list(folds) if folds is not None else list(range(1, region.folds.n + 1))
    graph = definitions.resolve_asset_graph()
    known = {key.to_user_string() for key in graph.get_all_asset_keys()}
    outcome = Outcome()
    workspace = Workspace(region, storage)
    logging.getLogger("dagster").setLevel(logging.ERROR)
    if removed := storage.remove_stale():
        say(f"{removed} temporary files of killed runs removed")
    with instance(storage) as opened:
        for run_id in give_up_lost_runs(opened):
            say(f"run {run_id[:8]} was killed: recorded as failed; what it made is kept")
        for family, assets in FAMILIES:
            names = tuple(a for a in assets if a in known and (only is None or a in only))
            if not names:
                continue
            say(f"{', '.join(names)}")
            ranges = _ranges(partitions, family, wanted_years, wanted_folds)
            keys = [key for key_range in ranges for key in _keys(partitions, family, key_range)]
            gate = Gate(opened, graph, names)

            def needs_nothing(asset: str, key: str | None, gate: Gate = gate, family: str = family) -> bool:
                if not force and is_current(workspace, asset, _numbers(family, key)):
                    return True
                return not despite_checks and bool(gate.reasons(asset, key))

            if all(needs_nothing(asset, key) for key in keys for asset in names):
                told = _told(gate, names, keys, despite_checks)
                outcome.failed += told
                say("  held back by failed checks" if told else "  up to date")
                continue
            _wait_for_pools(opened, definitions, names, say)
            start = time.perf_counter()
            before = time.time()
            count = 0
            for key_range in ranges:
                tags = {} if key_range is None else {
                    ASSET_PARTITION_RANGE_START_TAG: key_range[0], ASSET_PARTITION_RANGE_END_TAG: key_range[1],
                }  # fmt: skip
                tags |= own_process()
                tags |= {FORCE_TAG: "true"} if force else {}
                tags |= {DESPITE_TAG: "true"} if despite_checks else {}
                # The selection is recorded with the run, so that the UI shows what it makes.
                result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
                    instance=opened, asset_selection=[dg.AssetKey(name) for name in names], tags=tags,
                    raise_on_error=False, run_config=_QUIET,
                )  # fmt: skip
                count += len(_keys(partitions, family, key_range))
                if not result.success:
                    outcome.failed += _failures(result)
                    if any("DagsterExecutionInterruptedError" in text for text in outcome.failed):
                        raise KeyboardInterrupt
            outcome.failed += _told(Gate(opened, graph, names), names, keys, despite_checks)
            seconds = time.perf_counter() - start
            outcome.timings.append(
                Timing(family, names, count * len(names), seconds, _stage_seconds(storage, names, before))
            )
            say(f"  {count * len(names)} partitions in {seconds:.1f} s")
    return outcome


def _wait_for_pools(
    opened: dg.DagsterInstance, definitions: dg.Definitions, assets: Sequence[str], say: Callable[[str], None]
) -> None:
    """Wait, and say so, until no other run of this instance fills a pool of these assets.

    A step that has to wait for its pool inside an in-process run waits in a loop without a pause (Dagster 1.13).
    """
    graph = definitions.resolve_asset_graph()
    pools = {pool for name in assets for pool in graph.get(dg.AssetKey(name)).pools or ()}
    told: dict[str, list[str]] = {}
    while busy := busy_pools(opened, pools):
        if busy != told:
            for pool, runs in busy.items():
                say(f"  waiting for pool {pool!r}, held by run {', '.join(r[:8] for r in runs) or 'of nobody'}")
            told = busy
        time.sleep(POOL_WAIT_S)
        give_up_lost_runs(opened)


def _keys(partitions: Partitions, family: str, key_range: tuple[str, str] | None) -> Sequence[str | None]:
    """Partition keys of a range; [None] of an unpartitioned family."""
    if key_range is None:
        return [None]
    return list(_definition(partitions, family).get_partition_keys_in_range(dg.PartitionKeyRange(*key_range)))


def _numbers(family: str, key: str | None) -> tuple[int, ...]:
    """The numbers of a partition, as the stages take them."""
    if key is None:
        return ()
    readers: dict[str, Callable[[str], tuple[int, ...]]] = {
        "year": lambda key: (year_of(key),),
        "fold": lambda key: (fold_of(key),),
        "year_fold": lambda key: (year_of(key), fold_of(key)),
        "fold_member": lambda key: (fold_of(key), member_of(key)),
    }
    return readers[family](key)


def _told(gate: Gate, assets: Sequence[str], keys: Sequence[str | None], despite: bool) -> list[str]:
    """The blocking checks that these partitions failed, each with what to do, and what earlier ones hold back."""
    lines, held = [], dict[str, list[str]]()
    for asset in assets:
        for key, names in gate.failed(asset).items():
            if key in keys:
                place = asset if key is None else f"{asset} [{key}]"
                lines += [f"check {name} of {place} failed: {what_to_do(asset, name)}" for name in names]
        for key in keys if not despite else ():
            for reason in gate.reasons(asset, key):
                held.setdefault(reason, []).append(asset if key is None else f"{asset} [{key}]")
    return lines + [f"held back, because {reason}: {', '.join(places)}" for reason, places in held.items()]


def _failures(result: dg.ExecuteInProcessResult) -> list[str]:
    """What the steps of a run failed of. What checks found and hold back is told from their state (:func:`_told`)."""
    found = []
    by_checks = False
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            message = data.user_failure_data.description if data.user_failure_data else None
            cause = data.error
            if (cause and cause.cls_name == "DagsterAssetCheckFailedError") or "held back:" in (message or ""):
                by_checks = True
                continue
            while message is None and cause is not None and cause.cause is not None:
                cause = cause.cause
            text = message or (cause.message if cause else "failed")
            found.append(f"{event.step_key}: {text.strip()}")
    return found or ([] if by_checks else ["a run failed before its first step"])


def _definition(partitions: Partitions, family: str) -> dg.PartitionsDefinition:
    return {
        "year": partitions.years, "fold": partitions.folds, "fold_member": partitions.fold_member,
        "year_fold": partitions.year_fold,
    }[family]  # fmt: skip


def _ranges(
    partitions: Partitions, family: str, years: Sequence[int], folds: Sequence[int]
) -> list[tuple[str, str] | None]:
    """Contiguous key ranges that cover the wanted partitions of a family; [None] for an unpartitioned one."""
    if family == "none":
        return [None]
    fold_keys = [f"fold_{f}" for f in folds]
    year_keys = [str(y) for y in years]
    if family == "fold":
        return list(_contiguous(partitions.folds.get_partition_keys(), fold_keys))
    if family == "year":
        return list(_contiguous(partitions.year_keys(), year_keys))
    fold_ranges = list(_contiguous(partitions.folds.get_partition_keys(), fold_keys))
    if family == "fold_member":
        members = partitions.members.get_partition_keys()
        return [(_key(fold=a, member=members[0]), _key(fold=b, member=members[-1])) for a, b in fold_ranges]
    return [
        (_key(fold=a, year=c), _key(fold=b, year=d))
        for a, b in fold_ranges
        for c, d in _contiguous(partitions.year_keys(), year_keys)
    ]


def _key(**dimensions: str) -> str:
    return str(dg.MultiPartitionKey(dimensions))


def _contiguous(keys: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    first: str | None = None
    last = ""
    for key in keys:
        if key in set(wanted):
            first = first or key
            last = key
        elif first is not None:
            yield first, last
            first = None
    if first is not None:
        yield first, last


def _stage_seconds(storage: Storage, assets: Sequence[str], since: float) -> float:
    import datetime as dt

    total = 0.0
    for asset in assets:
        folder = storage.path("state", asset)
        for file in folder.glob("*.json") if folder.exists() else []:
            state = storage.read_json(file) or {}
            made = dt.datetime.fromisoformat(state["time"]).replace(tzinfo=dt.UTC).timestamp()
            if made >= since - 1:
                total += float(state.get("seconds", 0.0))
    return total
