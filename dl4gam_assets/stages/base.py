"""What all stages share: the workspace, the result, the map over glaciers with its failures, fingerprints.

Fingerprints make a repeated run cheap. A partition's *input fingerprint* hashes the settings that shape it, the
fingerprints of what it reads and ``STAGE_VERSION``; its *output fingerprint* hashes the content that downstream reads.
Both are kept in ``state/<asset>/<partition>.json`` together with the Dagster run that wrote it.

A state is marked (``making``) before work on its partition begins. A run that is killed leaves the mark: the partition
is then made again whatever its inputs are, and where the run had other ones, nothing is made from it until that is
done.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
STAGE_VERSION = 3

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
    unfinished: bool  # its files may be those of other inputs than the fingerprint says

    def __new__(
        cls, text: str, asset: str = "", partition: str = "", whole: bool = True, unfinished: bool = False
    ) -> Upstream:
        made = super().__new__(cls, text)
        made.asset, made.label, made.whole, made.unfinished = asset, partition, whole, unfinished
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
                name, n = named[1] if named else str(i), 2
                while named and ".".join((*path, name)) in out.values:  # of another folder, under the same name
                    name, n = f"{named[1]} ({n})", n + 1
                walk(item, (*path, name))
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
    force: bool = False  # make partitions even where nothing changed, and search and read anew
    unreachable: int = 0  # glaciers that failed because a server did not answer: worth another attempt
    used_device: str = "cpu"  # what the stage at work computes on; recorded with its partition

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
        return Upstream(str(state["output"]), asset, partition, unfinished=is_unfinished(state))

    def upstream_or_none(self, asset: str, partition: str = "all") -> Upstream | None:
        return self.upstream(asset, partition) if self.storage.read_state(asset, partition) is not None else None

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
        hardware, self.used_device = hardware_class(self.used_device), "cpu"
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
                "hardware": hardware,
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
                self.storage.written += 1  # in another process perhaps
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
        else:
            path.unlink(missing_ok=True)
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
    force = force or ws.force
    wanted, named = input_fingerprint(inputs), named_inputs(inputs)
    state = ws.storage.read_state(asset, partition)
    whole = bool(state and not state.get("failed") and MAKING not in state)
    current = bool(whole and state and state["input"] == wanted and not force and not changed)
    if ws.probe:
        told = (*changed, *(["a run with other settings was stopped in it"] if state and is_unfinished(state) else []))
        return StageResult(partition, unchanged=current, inputs=named, input=wanted, changed=told)
    if state and current:
        metadata = {**state.get("metadata", {}), "unchanged": True}
        pictures = _stored_previews(ws, asset, partition)
        return StageResult(partition, metadata, pictures, True, inputs=named, input=wanted)
    expect_finished(asset, partition, inputs)
    start = time.perf_counter()
    with making(ws.storage, asset, partition, wanted):
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
            path.unlink(missing_ok=True)  # of a former result, under another title
    for title, content in previews.items():
        with ws.storage.writing(_preview_path(ws, asset, partition, title)) as temporary:
            temporary.write_bytes(content)
    metadata = {**metadata, "seconds": round(seconds, 2)}
    if ws.run_id:
        metadata["materialization_id"] = materialization_id(asset, partition, ws.run_id)
    return StageResult(partition, metadata, previews, inputs=named, input=wanted)


#: Key of a state whose partition is being made: the input fingerprint of that work, and whose it is.
MAKING = "making"


@contextlib.contextmanager
def making(storage: Storage, asset: str, partition: str, wanted: str) -> Iterator[None]:
    """Mark the state of a partition while work for the input fingerprint ``wanted`` overwrites what it held.

    :meth:`Workspace.finish` writes a state without the mark. Work that ends in an error before it wrote anything takes
    its mark back, since what the partition held is whole; a kill, or an error in the middle of writing, leaves it.
    """
    state = storage.read_state(asset, partition)
    if state is None:  # nothing to be taken for current
        yield
        return
    mark = {"input": wanted, "by": secrets.token_hex(8)}
    storage.write_state(asset, partition, {**state, MAKING: mark})
    before = storage.written
    try:
        yield
    except Exception:
        if storage.written == before and (storage.read_state(asset, partition) or {}).get(MAKING) == mark:
            storage.write_state(asset, partition, state)
        raise


def is_unfinished(state: Mapping[str, Any]) -> bool:
    """Whether work for other inputs than those of the state was begun, and never ended: its files may be of both.

    The same work, begun anew or by another run at the same time, writes what is there already.
    """
    mark = state.get(MAKING)
    return mark is not None and mark.get("input") != state.get("input")


def expect_finished(asset: str, partition: str, inputs: Any) -> None:
    """Make nothing from a partition whose files may be those of other inputs than its fingerprint says.

    Raises
    ------
    UpstreamError
        naming the partition to materialize first.
    """
    if isinstance(inputs, Upstream) and inputs.unfinished:
        raise UpstreamError(
            f"{asset} [{partition}] can not be made: a run with other settings was stopped while it wrote "
            f"{inputs.asset} [{inputs.label}]; materialize {inputs.asset} first"
        )
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, list | tuple):
        for item in inputs:
            expect_finished(asset, partition, item)


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


#: Input files up to this size are hashed whole, in a second at most; of larger ones samples and the time are.
_HASHED_WHOLE = 256 << 20
_SAMPLE, _SAMPLES = 1 << 20, 32


def file_fingerprint(path: Path) -> str:
    """Identity of an input file: its name, size and a SHA-256.

    Up to 256 MiB the hash is that of the whole content, so that every change is seen and a copy is the same file. Of a
    larger file it is that of 32 blocks spread over it, first and last among them, and of the time of its last change:
    a rewritten file is seen though no sample differs, and one that was only copied or touched is read once more, which
    ends where the content proves equal. Within a process a file is read again only if its size, time or inode changed.
    """
    if not path.is_file():
        raise UpstreamError(f"input file {path} does not exist")
    stat = path.stat()
    return f"{path.name}:{stat.st_size}:{_file_hash(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)}"


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str, size: int, mtime_ns: int, inode: int) -> str:
    with open(path, "rb") as handle:
        if size <= _HASHED_WHOLE:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
        digest = hashlib.sha256(str(mtime_ns).encode())
        for i in range(_SAMPLES):
            handle.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()[:16]


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
    """Version of the package; from a checkout with its commit, and ``.dirty`` where the code is not that of it."""
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
            changed = subprocess.run(
                ["git", "-C", str(folder), "diff", "--quiet", "HEAD", "--", "dl4gam_assets"], check=False
            )
            return f"{__version__}+{found.stdout.strip()}{'.dirty' if changed.returncode == 1 else ''}"
    return __version__


@functools.lru_cache(maxsize=64)
def _cached_table(root: str, name: str, where: tuple[tuple[str, Any], ...], stamps: tuple[Any, ...]) -> pd.DataFrame:
    return Storage(root).read_table(name, **dict(where))


def cached_table(site: Site, name: str, **where: Any) -> pd.DataFrame:
    """A table as Storage.read_table gives it, kept in this process while its files are unchanged (read-only).

    A file is the same while its path, size, time in nanoseconds and inode are (in an object store: what the store says
    of its version); a time alone would say nothing of a file beside one from the future. Where a store can not tell,
    nothing is kept.
    """
    stamps = site.storage.table_stamps(name, **where)
    if stamps is None:
        return site.storage.read_table(name, **where)
    return _cached_table(site.root, name, tuple(sorted(where.items())), stamps)


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
