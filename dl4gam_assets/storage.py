"""Where results live: one root (local folder or object-store URL), atomic writes, hive-partitioned tables.

Belongs here: paths of cubes, models, predictions, tables and reports below a region's root; writing them so that a
half-written file is never visible under its final name; turning glacier ids into file names.
Does not belong here: Dagster, and what the content means (see ``tables`` for the schemas).

Layout below the root of a region::

    inputs/                                  made only for simulated regions
    items/2023.jsonl                         what a STAC API gave for the year; its searches in items/year=2023/
    candidates/year=2023/<glacier>.parquet   scores, so that a killed run goes on
    static/<glacier>.nc, dhdt/period=.../    masks and terrain once, elevation change by period
    cubes/year=2023/<glacier>.nc
    models/fold=1/member=01/                 model.safetensors, model.json, history.parquet
    predictions/year=2023/<glacier>.tif
    tables/<table>/year=2023/fold=1/part.parquet
    state/<asset>/<partition>.json           fingerprints: what a partition was made from
    outlines/, reports/, stac/               what is handed on
    imports/                                 published files that were taken over, by name and checksum
    store.json                               the format of all this, and who wrote it
    results.duckdb
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pandas as pd
from upath import UPath

from dl4gam_assets.tables import TABLES

_TEMPORARY = ".tmp-"
#: What object stores call an object's version, hash or time.
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "generation",
    "VersionId",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)
#: What is written beside results, whatever becomes of them.
_NO_RESULTS = ("state/", "tables/failures/", "tables/settings/", "tables/software/", "store.json")

#: Layout and schemas of a store. Raised when older code could misread what newer code writes; a step from the former
#: number then goes into MIGRATIONS. Columns that are added and may be missing need no new number.
FORMAT = 1
#: Format -> what makes a store of the next one of it.
MIGRATIONS: dict[int, Callable[[Storage], None]] = {}


class DamagedFileError(ValueError):
    """A file of the store that can not be read. The message names it."""


class StoreFormatError(RuntimeError):
    """A store that this version can not work with. The message names it and the ways out."""


def safe_name(glacier_id: str) -> str:
    """File name of a glacier: the id with everything but letters, digits, ``-``, ``_`` and ``.`` percent-encoded.

    Reversible by :func:`glacier_id_of`; never empty, never ``.`` or ``..``, never longer than 200 characters.

    Raises
    ------
    ValueError
        if the id is empty or too long for a file name.
    """
    name = quote(glacier_id, safe="")
    name = name.replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if not name or len(name) > 200:
        raise ValueError(f"glacier id {glacier_id[:40]!r}... can not become a file name (empty or over 200 characters)")
    return name


def glacier_id_of(name: str) -> str:
    """The glacier id behind a file name made by :func:`safe_name`."""
    return unquote(name)


class Storage:
    """Files of one region below ``root`` (a local path or any fsspec URL)."""

    def __init__(self, root: str | os.PathLike[str] | UPath):
        self.root = UPath(root)
        self.written = 0  # results that were put in place through this object: neither states nor failures
        if not self.is_local:
            _forget_blank_variables()

    def __repr__(self) -> str:
        return f"Storage({str(self.root)!r})"

    @property
    def is_local(self) -> bool:
        return self.root.protocol in ("", "file", "local")

    # ------------------------------------------------------------------ paths
    def path(self, *parts: str) -> UPath:
        return self.root.joinpath(*parts)

    def inputs(self) -> UPath:
        return self.path("inputs")

    def cube(self, year: int, glacier_id: str) -> UPath:
        return self.path("cubes", f"year={year}", f"{safe_name(glacier_id)}.nc")

    def prediction(self, year: int, glacier_id: str) -> UPath:
        return self.path("predictions", f"year={year}", f"{safe_name(glacier_id)}.tif")

    def model(self, fold: int, member: int) -> UPath:
        return self.path("models", f"fold={fold}", f"member={member:02d}")

    def table(self, name: str, partition: Mapping[str, object] | None = None) -> UPath:
        folders = [f"{key}={value}" for key, value in (partition or {}).items()]
        return self.path("tables", name, *folders, "part.parquet")

    # ------------------------------------------------------------------ format
    def check_format(self, *, write: bool = False) -> None:
        """Make sure that this version of the package can work with the store; ``write`` marks and migrates it.

        Raises
        ------
        StoreFormatError
            if a newer version wrote it, or an older one whose stores can not be migrated.
        """
        from dl4gam_assets import __version__

        path = self.path("store.json")
        try:
            mark: dict[str, Any] = self.read_json(path) or {"format": FORMAT}
            found = int(mark["format"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreFormatError(
                f"{path} is damaged ({error}): remove that one file; nothing else is lost"
            ) from error
        if found > FORMAT:
            raise StoreFormatError(
                f"the store {self.root} has format {found}, written by dl4gam_assets {mark.get('written_by')}; this is "
                f"{__version__}, which knows formats up to {FORMAT}. Upgrade (pip install -U dl4gam_assets), or set "
                "DL4GAM_HOME to another folder"
            )
        while found < FORMAT:
            if found not in MIGRATIONS:
                raise StoreFormatError(
                    f"the store {self.root} has format {found}, and {__version__} can not migrate it to {FORMAT}: set "
                    "DL4GAM_HOME to another folder and materialize anew"
                )
            if not write:
                raise StoreFormatError(
                    f"the store {self.root} has format {found}; run `dl4gam materialize` once to bring it to {FORMAT}"
                )
            MIGRATIONS[found](self)
            found += 1
            self.write_json(path, {"format": found, "written_by": __version__})
        if write and "written_by" not in mark:
            self.write_json(path, {"format": FORMAT, "written_by": __version__})

    # ------------------------------------------------------------------ atomic files
    @contextlib.contextmanager
    def writing(self, path: UPath | os.PathLike[str]) -> Iterator[Path]:
        """A local temporary path to write to; moved to ``path`` if the block ends without an exception.

        On a local store the temporary file lies beside the final one, so the move is one atomic rename. On an object
        store the finished file is uploaded, which is atomic there.
        """
        target = UPath(path)
        suffix = "".join(target.suffixes[-1:])
        if self.is_local:
            final = Path(str(target))
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f"{temporary_mark()}{secrets.token_hex(6)}-{final.stem[:80]}{suffix}")
            try:
                yield temporary
                if suffix == ".tif":
                    _assert_whole(temporary, final)
                with open(temporary, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(temporary, final)
                self._count(target)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory(prefix="dl4gam-") as folder:
                temporary = Path(folder) / f"file{suffix}"
                yield temporary
                target.parent.mkdir(parents=True, exist_ok=True)
                target.fs.put_file(str(temporary), target.path)
                self._count(target)

    def _count(self, target: UPath) -> None:
        inside = str(target)[len(str(self.root)) :].lstrip("/\\").replace("\\", "/")
        self.written += not inside.startswith(_NO_RESULTS)

    @contextlib.contextmanager
    def reading(self, path: UPath | os.PathLike[str]) -> Iterator[Path]:
        """A local path with the content of ``path`` (itself on a local store, a temporary copy otherwise)."""
        source = UPath(path)
        if self.is_local:
            yield Path(str(source))
            return
        with tempfile.TemporaryDirectory(prefix="dl4gam-") as folder:
            local = Path(folder) / source.name
            source.fs.get_file(source.path, str(local))
            yield local

    def write_text(self, path: UPath, text: str) -> None:
        with self.writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, path: UPath, content: Any) -> None:
        self.write_text(path, json.dumps(content, indent=1, sort_keys=True, default=str))

    def read_json(self, path: UPath) -> Any | None:
        """The content of a JSON file, or None where there is none.

        Raises
        ------
        DamagedFileError
            if it is no JSON.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(f"{path} is damaged ({error}): remove it and materialize its asset again") from error

    def remove_stale(self, folder: str = "", older_than_s: float = 86_400.0) -> int:
        """Remove temporary files that killed runs left below ``folder``; returns how many.

        Those of processes of this machine go when the process is gone, whatever their age; those of other machines, or
        without a mark, when they are older than ``older_than_s``.
        """
        if not self.is_local:
            return 0
        removed = 0
        for top, folders, files in os.walk(str(self.path(folder) if folder else self.root)):
            found = [name for name in (*folders, *files) if name.startswith(_TEMPORARY)]
            folders[:] = [name for name in folders if not name.startswith(_TEMPORARY)]
            for path in (Path(top, name) for name in found):
                with contextlib.suppress(OSError):  # another run is cleaning too, or it is not ours to remove
                    old = time.time() - path.stat().st_mtime > older_than_s
                    if _is_orphan(path) or (old and not _is_alive_here(path)):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        removed += 1
        return removed

    def remove_folder(self, folder: UPath) -> None:
        """Remove a folder of the store with all that is in it, if it is there."""
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)

    # ------------------------------------------------------------------ tables
    def write_table(self, name: str, frame: pd.DataFrame, partition: Mapping[str, object] | None = None) -> UPath:
        """Check ``frame`` against the schema of ``name`` and write it as one Parquet file of that partition.

        Partition columns are taken out of the frame (they live in the path). Geometry columns make it GeoParquet.
        Replaces what the partition held before.
        """
        table = TABLES[name]
        partition = dict(partition or {})
        if set(partition) != set(table.partitioned_by):
            raise ValueError(f"table {name} is partitioned by {table.partitioned_by}, not by {tuple(partition)}")
        frame = table.conform(frame, partition).drop(columns=list(partition)).reset_index(drop=True)
        path = self.table(name, partition)
        with self.writing(path) as temporary:
            if table.geometry:
                frame.to_parquet(temporary, index=False, schema_version="1.1.0", compression="zstd")
            else:
                frame.to_parquet(temporary, index=False, compression="zstd", engine="pyarrow")
        return path

    def partitions(self, name: str) -> list[dict[str, str]]:
        """The partitions of a table that exist, as mappings of column to text, sorted by path.

        Those of folds that the table ``folds`` does not have any more are left over, and are not among them.
        """
        base = self.path("tables", name)
        found = []
        for file in sorted(base.rglob("part.parquet"), key=str) if base.exists() else []:
            relative = str(file)[len(str(base)) :]
            found.append(dict(re.findall(r"([^/=\\]+)=([^/\\]+)", relative)))
        if found and "fold" in TABLES[name].partitioned_by and (folds := self._folds()) is not None:
            return [p for p in found if int(p["fold"]) <= folds]
        return found

    def _folds(self) -> int | None:
        """The number of folds in the table ``folds``; None where there is none (yet)."""
        path = self.table("folds")
        if not self.is_local:
            if not path.exists():
                return None
            with self.reading(path) as local:
                return _largest_fold(str(local), 0)
        try:
            return _largest_fold(str(path), path.stat().st_mtime_ns)
        except FileNotFoundError:
            return None

    def read_table(self, name: str, **where: object) -> pd.DataFrame:
        """All rows of the partitions that match ``where``; a GeoDataFrame where the table has a geometry.

        A value may be a list of allowed ones. Where no partition matches, the frame is empty with the right columns.
        """
        table = TABLES[name]
        unknown = set(where) - set(table.partitioned_by)
        if unknown:
            raise ValueError(f"table {name} is not partitioned by {sorted(unknown)}")
        frames = []
        for partition in self.partitions(name):
            if all(_matches(partition.get(key, ""), value) for key, value in where.items()):
                frame = self._read_part(name, partition)
                for key, text in partition.items():
                    frame[key] = int(text) if table.column(key).dtype == "int64" else text
                frames.append(frame)
        if not frames:
            return table.empty()
        joined = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
        return table.conform(joined)

    def table_stamps(self, name: str, **where: object) -> tuple[tuple[object, ...], ...] | None:
        """What tells the present files of the partitions that match ``where`` from all earlier and later ones: path,
        size, time in nanoseconds and inode, or what an object store says of its versions. None where that says nothing.
        """
        stamps: list[tuple[object, ...]] = []
        if not self.is_local:  # the answer of an earlier listing is of no use
            self.root.fs.invalidate_cache()
        for partition in self.partitions(name):
            if not all(_matches(partition.get(key, ""), value) for key, value in where.items()):
                continue
            path = self.table(name, partition)
            if self.is_local:
                stat = Path(str(path)).stat()
                stamps.append((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino))
                continue
            told = path.fs.info(path.path)
            version = [str(told[key]) for key in _VERSIONS if told.get(key) is not None]
            if not version:
                return None
            stamps.append((str(path), told.get("size"), *version))
        return tuple(stamps)

    def _read_part(self, name: str, partition: Mapping[str, object]) -> pd.DataFrame:
        with self.reading(self.table(name, partition)) as local:
            if TABLES[name].geometry:
                import geopandas as gpd

                return gpd.read_parquet(local)
            return pd.read_parquet(local, partitioning=None)

    # ------------------------------------------------------------------ state of partitions
    def state_path(self, asset: str, partition: str = "all") -> UPath:
        return self.path("state", asset, f"{safe_name(partition)}.json")

    def read_state(self, asset: str, partition: str = "all") -> dict[str, Any] | None:
        return self.read_json(self.state_path(asset, partition))

    def write_state(self, asset: str, partition: str, state: Mapping[str, Any]) -> None:
        self.write_json(self.state_path(asset, partition), dict(state))


@functools.lru_cache(maxsize=16)
def _largest_fold(path: str, stamp: int) -> int | None:
    """The largest fold in a file of the table ``folds``; ``stamp``: its time, so that another one is read anew."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet

    try:
        folds = pyarrow.parquet.read_table(path, columns=["fold"], partitioning=None)["fold"]
    except (pa.ArrowInvalid, KeyError):  # damaged: who reads the table says so
        return None
    return pyarrow.compute.max(folds).as_py()  # type: ignore[no-any-return]


@functools.cache
def _machine() -> str:
    """Name of this machine and of its numbering of processes: containers may share a name and a disk, not that."""
    space = Path("/proc/self/ns/pid")
    number = space.stat().st_ino if space.exists() else 0
    return f"{re.sub('[^A-Za-z0-9.]', '_', platform.node())[:40]}_{number}"


def temporary_mark() -> str:
    """Beginning of the names of this process's temporary files: ``.tmp-<machine>-<process>-``."""
    return f"{_TEMPORARY}{_machine()}-{os.getpid()}-"


def _process_of(path: Path) -> int | None:
    """The process of this machine that a temporary file belongs to; None if it is another's, or says nothing."""
    machine, _, rest = path.name.removeprefix(_TEMPORARY).partition("-")
    number = rest.partition("-")[0]
    return int(number) if machine == _machine() and number.isdigit() else None


def _is_alive_here(path: Path) -> bool:
    import psutil

    number = _process_of(path)
    if number is None:
        return False
    try:  # a later process may have the number now
        return bool(psutil.Process(number).create_time() <= path.stat().st_mtime + 5)
    except psutil.Error:
        return False


def _is_orphan(path: Path) -> bool:
    """Whether a temporary file belongs to a process of this machine that is gone."""
    return _process_of(path) is not None and not _is_alive_here(path)


def _forget_blank_variables() -> None:
    """Take AWS_DEFAULT_REGION and others away where they are set to nothing, as a file of variables leaves them: the
    client of object stores would take the empty text as the name of a region."""
    for name in [n for n, value in os.environ.items() if n.startswith("AWS_") and not value.strip()]:
        del os.environ[name]


def _assert_whole(file: Path, final: Path) -> None:
    """Read a new TIFF once: GDAL says nothing when the disk fills up while it closes a file."""
    import rasterio

    try:
        with rasterio.open(file) as source:
            for band in source.indexes:
                source.checksum(band)
    except rasterio.errors.RasterioIOError as error:
        raise OSError(f"{final} could not be written whole: is there room on the disk?") from error


class Snapshot(Storage):
    """A storage that reads each table once: for asking the same tables many times, as a report does.

    The frames are shared: do not change them.
    """

    def __init__(self, storage: Storage):
        super().__init__(storage.root)
        self._read: dict[str, pd.DataFrame] = {}

    def read_table(self, name: str, **where: object) -> pd.DataFrame:
        """As :meth:`Storage.read_table`, from memory where it was asked for before."""
        key = f"{name} {sorted(where.items())}"
        if key not in self._read:
            self._read[key] = super().read_table(name, **where)
        return self._read[key]


def _matches(text: str, value: object) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(text == str(v) for v in value)
    return text == str(value)
