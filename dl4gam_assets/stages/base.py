"""What all stages share: the workspace, the result, the map over glaciers with its failures, fingerprints.

Fingerprints make a repeated run cheap. A partition's *input fingerprint* hashes the settings that shape it, the
fingerprints of what it reads and ``STAGE_VERSION``; its *output fingerprint* hashes the content that downstream reads.
Both are kept in ``state/<asset>/<partition>.json`` together with the Dagster run that wrote it.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from upath import UPath

from dl4gam_assets.compute import Done, Mapper, TransientError
from dl4gam_assets.lineage.environment import hardware_class, record_settings, record_software
from dl4gam_assets.settings import Region, fingerprint
from dl4gam_assets.storage import Storage

#: Raised by one whenever a change of code changes results, so that old results count as stale.
STAGE_VERSION = 2

#: Stages whose glaciers share what they are made from: the catalog, the weights.
SHARED = frozenset({"scene_candidates", "calibration", "glacier_predictions"})

log = logging.getLogger("dl4gam_assets")


class UpstreamError(RuntimeError):
    """Something that a stage reads is missing or is not what it expects. The message says what to materialize."""


class UnreachableError(UpstreamError, TransientError):
    """Something outside that a stage reads does not answer now, though it may do so later."""


class Upstream(str):
    """Output fingerprint of an upstream partition that knows whose it is; in fingerprints and JSON it is plain text."""

    asset: str
    label: str
    whole: bool  # False: of a part of that partition

    def __new__(cls, text: str, asset: str = "", partition: str = "", whole: bool = True) -> Upstream:
        made = super().__new__(cls, text)
        made.asset, made.label, made.whole = asset, partition, whole
        return made


@dataclass(frozen=True)
class NamedInputs:
    """What a partition was made from, by name: dotted key to value, and for upstream results whose they are."""

    values: dict[str, Any] = field(default_factory=dict)
    upstream: dict[str, list[str]] = field(default_factory=dict)


def named_inputs(inputs: Mapping[str, Any]) -> NamedInputs:
    """Flatten a stage's inputs to names that people know: ``selection.cloud_max``, ``dem.dem.tif``, ``cubes``.

    Files (``name:size:hash``) get their own name as the key, so that a file that is added or removed does not shift
    the others. Long texts are kept as a hash.
    """
    out = NamedInputs()

    def walk(value: Any, path: tuple[str, ...]) -> None:
        key = ".".join(path)
        if isinstance(value, Upstream):
            out.values[key] = str(value)
            out.upstream[key] = [value.asset, value.label, *([] if value.whole else ["part"])]
        elif isinstance(value, Mapping) and value:
            for name, item in value.items():
                walk(item, (*path, str(name)))
        elif isinstance(value, list | tuple) and value:
            for i, item in enumerate(value):
                named = _FILE.fullmatch(item) if isinstance(item, str) else None
                walk(item, (*path, named[1] if named else str(i)))
        elif isinstance(value, str) and len(value) > 200:
            out.values[key] = "#" + fingerprint(value)
        else:
            out.values[key] = value if isinstance(value, str | int | float | bool) or value is None else str(value)

    walk({"version": STAGE_VERSION, **inputs}, ())
    return out


#: A file's identity as file_fingerprint and the tiles give it.
_FILE = re.compile(r"([^:]+):\d+:[0-9a-f]{16}")


def materialization_id(asset: str, partition: str, run: str) -> str:
    """Id of what one run made of one partition; in the state, in the lineage, and in the metadata in Dagster."""
    return fingerprint([asset, partition, run])


def named_path(storage: Storage, asset: str, partition: str) -> UPath:
    """File of a partition's named inputs, beside its state."""
    return storage.path("state", asset, "inputs", storage.state_path(asset, partition).name)


def read_named(storage: Storage, asset: str, partition: str, inputs: str | None = None) -> NamedInputs | None:
    """The named inputs that a partition was made from; None where they were not recorded (or of another run)."""
    found = storage.read_json(named_path(storage, asset, partition))
    if found is None or (inputs is not None and found.get("input") != inputs):
        return None
    return NamedInputs(found["values"], found["upstream"])


@dataclass(frozen=True, eq=False)
class Site:
    """Region and store: all that a task in another process needs. Small, picklable, and usable as a cache key."""

    region: Region
    root: str

    @functools.cached_property
    def key(self) -> tuple[str, str]:
        return self.region.fingerprint(), self.root

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def storage(self) -> Storage:
        return Storage(self.root)

    @property
    def data_root(self) -> Path:
        """Folder of the inputs: the region's ``data_root``, or ``inputs`` in the store for a simulated region."""
        if self.region.simulation is not None:
            if not self.storage.is_local:
                raise UpstreamError(
                    f"region {self.region.name!r} is simulated: its scenes are made into a folder, so its store can "
                    f"not be {self.root}; set DL4GAM_HOME to a folder"
                )
            return Path(str(self.storage.inputs()))
        return raw_data_root(self.region)


def raw_data_root(region: Region) -> Path:
    """Folder that ``data_root`` names, with ~ and environment variables expanded."""
    text = region.data_root
    if text is None:
        return Path(".")
    expanded = os.path.expandvars(text)
    if "$" in expanded:
        raise UpstreamError(
            f"data_root of region {region.name!r} is {text!r}, but that environment variable is not set; "
            "set it to the folder of the input data"
        )
    return Path(expanded).expanduser()


@dataclass
class Workspace:
    """A site plus the means to work: processes, device, logger, and the Dagster run if there is one."""

    region: Region
    storage: Storage
    mapper: Mapper = field(default_factory=Mapper)
    device: str = "auto"
    logger: Any = log
    run_id: str | None = None
    probe: bool = False  # only say whether partitions are unchanged; do no work
    unreachable: int = 0  # glaciers that failed because a server did not answer: worth another attempt

    @property
    def site(self) -> Site:
        return Site(self.region, str(self.storage.root))

    @property
    def data_root(self) -> Path:
        return self.site.data_root

    # ------------------------------------------------------------------ fingerprints
    def upstream(self, asset: str, partition: str = "all") -> Upstream:
        """Output fingerprint of an upstream partition.

        Raises
        ------
        UpstreamError
            if it was not materialized.
        """
        state = self.storage.read_state(asset, partition)
        if state is None:
            raise UpstreamError(f"{asset} [{partition}] is not there yet: materialize it first")
        return Upstream(str(state["output"]), asset, partition)

    def upstream_or_none(self, asset: str, partition: str = "all") -> Upstream | None:
        state = self.storage.read_state(asset, partition)
        return None if state is None else Upstream(str(state["output"]), asset, partition)

    def finish(
        self,
        asset: str,
        partition: str,
        inputs: str,
        output: str,
        seconds: float,
        named: NamedInputs | None = None,
        **extra: Any,
    ) -> None:
        """Record that a partition is complete. ``named``: what it was made from, by name, for people who ask later."""
        time_now, software = utc_now(), record_software(self.storage)
        if named is not None:
            self.storage.write_json(named_path(self.storage, asset, partition), {"input": inputs, **asdict(named)})
        self.storage.write_state(
            asset,
            partition,
            {
                "input": inputs,
                "output": output,
                "run_id": self.run_id,
                "materialization_id": materialization_id(asset, partition, self.run_id or time_now.isoformat()),
                "time": time_now.isoformat(),
                "seconds": round(seconds, 3),
                "code_version": code_version(),
                "settings": record_settings(self.storage, self.region),
                "software": software,
                "hardware": hardware_class(),
                **extra,
            },
        )

    # ------------------------------------------------------------------ the map over glaciers
    def over_glaciers(
        self,
        stage: str,
        partition: str,
        function: Callable[..., Any],
        tasks: Iterable[tuple[str, Sequence[Any]]],
        mapper: Mapper | None = None,
    ) -> tuple[dict[str, Any], pd.DataFrame]:
        """Apply ``function`` to each ``(glacier_id, arguments)``; one failure never loses the others.

        ``mapper`` replaces the workspace's, for work that has to be done elsewhere (on a GPU of this machine).

        Returns values by glacier id (sorted), and the failures, which replace those of the partition's last run.

        Raises
        ------
        UpstreamError
            if all of several glaciers failed for one and the same reason, where it is not theirs (catalog, weights of a
            member: ``SHARED``): what the partition held is better left as it is. A broken tile of a companion is
            no such reason: its glaciers go on without the layer.
        """
        todo = list(tasks)

        def progress(done: int, total: int, seconds: float) -> None:
            rate = 60.0 * done / max(seconds, 1e-9)
            self.logger.info(f"{stage} [{partition}]: {done} of {total} glaciers, {rate:.0f} a minute")

        values: dict[str, Any] = {}
        failures: list[Done] = []
        for done in (mapper or self.mapper).map(function, todo, progress=progress):
            if done.ok:
                values[done.key] = done.value
            else:
                failures.append(done)
                self.unreachable += done.transient
                self.logger.warning(f"{stage} [{partition}] glacier {done.key}: {done.error}")
        frame = self.write_failures(stage, partition, [(d.key, d.error or "", d.kind or "") for d in failures])
        if (
            stage in SHARED
            and len(todo) > 1
            and not values
            and len({d.error for d in failures}) == 1
            and not self.unreachable
        ):
            raise UpstreamError(f"{stage} [{partition}]: all {len(todo)} glaciers failed: {failures[0].error}")
        return dict(sorted(values.items())), frame

    def write_failures(self, stage: str, partition: str, rows: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
        """Replace the failures of a stage's partition; an empty list removes them."""
        path = self.storage.table("failures", {"stage": stage, "partition": partition})
        frame = pd.DataFrame(sorted(rows), columns=["glacier_id", "error", "kind"])
        frame["time"] = utc_now()
        if len(frame):
            frame = frame.drop_duplicates("glacier_id", keep="last")
            self.storage.write_table("failures", frame, {"stage": stage, "partition": partition})
        elif path.exists():
            path.unlink()
        return frame


@dataclass
class StageResult:
    """What a stage says of the partition it made: metadata for people, pictures, and whether anything changed."""

    partition: str
    metadata: dict[str, Any] = field(default_factory=dict)
    previews: dict[str, bytes] = field(default_factory=dict)
    unchanged: bool = False
    inputs: NamedInputs | None = None  # what it is made from
    input: str | None = None  # its input fingerprint
    changed: tuple[str, ...] = ()  # files behind it that are not what they were


Stage = Callable[..., tuple[str, dict[str, Any], dict[str, bytes]]]


def run_stage(
    ws: Workspace,
    asset: str,
    partition: str,
    inputs: Mapping[str, Any],
    work: Callable[[], tuple[str, dict[str, Any], dict[str, bytes]]],
    *,
    force: bool = False,
    changed: Sequence[str] = (),
) -> StageResult:
    """Do ``work`` unless the partition was made from the same ``inputs`` and nothing in it failed.

    ``work`` returns the output fingerprint, metadata and previews. ``changed`` names files behind the inputs that are
    not what they were when the partition was made, where the inputs themselves do not tell.
    """
    ws.storage.check_format(write=not ws.probe)
    wanted, named = input_fingerprint(inputs), named_inputs(inputs)
    state = ws.storage.read_state(asset, partition)
    current = bool(state and state["input"] == wanted and not force and not changed and not state.get("failed"))
    if ws.probe:
        return StageResult(partition, unchanged=current, inputs=named, input=wanted, changed=tuple(changed))
    if state and current:
        metadata = {**state.get("metadata", {}), "unchanged": True}
        pictures = _stored_previews(ws, asset, partition)
        return StageResult(partition, metadata, pictures, True, inputs=named, input=wanted)
    start = time.perf_counter()
    output, metadata, previews = work()
    seconds = time.perf_counter() - start
    ws.finish(
        asset,
        partition,
        wanted,
        output,
        seconds,
        named,
        metadata=metadata,
        failed=int(metadata.get("failed_glaciers", 0)),
    )
    wanted_files = {_preview_path(ws, asset, partition, title).name for title in previews}
    for path in _preview_files(ws, asset, partition):
        if path.name not in wanted_files:
            path.unlink()  # of a former result, under another title
    for title, content in previews.items():
        with ws.storage.writing(_preview_path(ws, asset, partition, title)) as temporary:
            temporary.write_bytes(content)
    metadata = {**metadata, "seconds": round(seconds, 2)}
    if ws.run_id:
        metadata["materialization_id"] = materialization_id(asset, partition, ws.run_id)
    return StageResult(partition, metadata, previews, inputs=named, input=wanted)


def _preview_path(ws: Workspace, asset: str, partition: str, title: str) -> Any:
    return ws.storage.path("previews", asset, f"{partition}--{title}.img")


def _stored_previews(ws: Workspace, asset: str, partition: str) -> dict[str, bytes]:
    """Pictures of an unchanged partition, as they were made."""
    found = sorted(_preview_files(ws, asset, partition), key=str)
    return {path.name.removeprefix(f"{partition}--").removesuffix(".img"): path.read_bytes() for path in found}


def _preview_files(ws: Workspace, asset: str, partition: str) -> list[Any]:
    folder = ws.storage.path("previews", asset)
    return list(folder.glob(f"{partition}--*.img")) if folder.exists() else []


def input_fingerprint(inputs: Mapping[str, Any]) -> str:
    return fingerprint({"version": STAGE_VERSION, **inputs})


def frame_fingerprint(frame: pd.DataFrame, ignore: Sequence[str] = ()) -> str:
    """Hash of a table's content, independent of the order of its rows."""
    plain = frame.drop(columns=[c for c in ignore if c in frame.columns])
    columns = {}
    for name in sorted(plain.columns):
        values = plain[name]
        if str(values.dtype) == "geometry":
            values = pd.Series([g.wkb_hex if g is not None else "" for g in values])
        columns[name] = values.astype("string").fillna("").to_numpy(dtype=object)
    rows = sorted(zip(*columns.values(), strict=True)) if columns else []
    digest = hashlib.sha256("\x1f".join(columns).encode())
    for row in rows:
        digest.update("\x1f".join(map(str, row)).encode() + b"\x1e")
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Identity of an input file: its name, size and SHA-256 (of the first and last mebibyte of a large file)."""
    if not path.is_file():
        raise UpstreamError(f"input file {path} does not exist")
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as handle:
        digest.update(handle.read(1 << 20))
        if size > 1 << 21:
            handle.seek(-(1 << 20), os.SEEK_END)
        digest.update(handle.read(1 << 20))
    return f"{path.name}:{size}:{digest.hexdigest()[:16]}"


def folder_fingerprint(folder: Path, pattern: str = "*") -> str:
    """Identity of a folder of inputs: names, sizes and time stamps of its files."""
    entries = sorted(
        (str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob(pattern)
    )
    return fingerprint(entries)


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(tzinfo=None)


@functools.cache
def code_version() -> str:
    """Version of the package, with the git commit when it runs from a checkout."""
    import subprocess

    from dl4gam_assets import __version__

    folder = Path(__file__).parents[2]
    if (folder / ".git").exists():
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode == 0:
            return f"{__version__}+{found.stdout.strip()}"
    return __version__


@functools.lru_cache(maxsize=64)
def _cached_table(root: str, name: str, where: tuple[tuple[str, Any], ...], stamp: float) -> pd.DataFrame:
    return Storage(root).read_table(name, **dict(where))


def cached_table(site: Site, name: str, **where: Any) -> pd.DataFrame:
    """A table as Storage.read_table gives it, kept in this process while its files are unchanged (read-only)."""
    storage = site.storage
    stamp = 0.0
    if storage.is_local:
        files = Path(str(storage.path("tables", name))).rglob("part.parquet")
        stamp = max((f.stat().st_mtime for f in files), default=0.0)
    return _cached_table(site.root, name, tuple(sorted(where.items())), stamp)


# --------------------------------------------------------------------------------------------- partition labels
def fold_label(fold: int) -> str:
    """Text of a fold in partition keys and file names: ``fold_1``."""
    return f"fold_{fold}"


def member_label(member: int) -> str:
    """Text of an ensemble member in partition keys: ``member_01``."""
    return f"member_{member:02d}"


def year_fold_label(year: int, fold: int) -> str:
    return f"{year}.{fold_label(fold)}"


def fold_member_label(fold: int, member: int) -> str:
    return f"{fold_label(fold)}.{member_label(member)}"
