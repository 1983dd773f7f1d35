"""results.duckdb: every table in one file, and safe questions to it.

Belongs here: building the database from the Parquet tables (which stay the truth), its views, and read-only queries.
Does not belong here: computing figures; what the tables mean (``tables``).

Needs no DuckDB extension: geometries are DuckDB's own type GEOMETRY, longitude and latitude (OGC:CRS84).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
from upath import UPath

from dl4gam_assets.publication.schema import (
    TYPES,
    Rule,
    comment_of,
    has_foreign_key,
    row_rules,
    unit_of,
)
from dl4gam_assets.publication.schema import quoted as _q
from dl4gam_assets.publication.views import REGION_COLUMNS, REGION_MEANING, VIEWS
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES, Column, Table

#: Larger tables have their keys checked, but not kept as an index: it would outweigh the table, and rows lie in the
#: order of their keys anyway, so that DuckDB skips what a question does not ask for.
INDEXED_ROWS = 1_000_000
#: Memory for the build; beyond it DuckDB sorts on disk, beside the new file.
MEMORY = "1200MB"

#: Neither files nor the network nor extensions, and no way to allow them again.
_CLOSED: dict[str, Any] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "lock_configuration": True,
}

_QUIET: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}


def build_database(storage: Storage, region: Region, path: UPath | os.PathLike[str]) -> dict[str, int]:
    """Build the database of a region and put it at ``path`` in one step; returns rows by table.

    Types, primary keys, NOT NULL, ranges and comments come from ``TABLES``; a table without files is there, empty, and
    so is one that ``publication.leave_out`` names. Beside them: ``region`` (name, title, settings as JSON, fingerprint,
    code version), ``tables_info`` (one row a column) and the views of :data:`VIEWS`. A reader that has the old file
    open keeps reading the old content.

    Raises
    ------
    ValueError
        naming the table whose files do not fit its schema, the rule that is broken, and the first rows that break it
        (a missing column, a repeated key, an empty required value, a value out of range, an interval that does not
        hold its estimate, a glacier that the inventory does not have). The old file is left as it is.
    """
    counts: dict[str, int] = {}
    left_out = set(region.publication.leave_out)
    with storage.writing(path) as temporary:
        scratch = temporary.with_name(temporary.name + ".spill")
        connection = duckdb.connect(
            str(temporary), config={"memory_limit": MEMORY, "temp_directory": str(scratch), **_QUIET}
        )
        try:
            connection.execute("SET enable_progress_bar = false")
            for table in TABLES.values():
                with _local_parts(storage, table.name) as found:
                    files = [] if table.name in left_out else found
                    indexed = _rows_of(files) <= INDEXED_ROWS
                    connection.execute(_create(table, indexed))
                    if files:
                        _fill(connection, table, files, indexed)
                counts[table.name] = _count(connection, table.name)
                _comment(connection, "TABLE", table.name, table.meaning)
                for column in table.columns:
                    name = f"{_q(table.name)}.{_q(column.name)}"
                    _comment(connection, "COLUMN", name, comment_of(column), quoted=True)
            for table in TABLES.values():
                if counts[table.name] and has_foreign_key(table):
                    _check_glaciers(connection, table)
            _check_lineage(connection, left_out)
            _add_region(connection, region)
            _add_info(connection, counts)
            for name, view in VIEWS.items():
                kind = "TABLE" if view.stored else "VIEW"
                connection.execute(f"CREATE {kind} {_q(name)} AS {view.sql}")
                _comment(connection, kind, name, view.meaning)
                for column in view.columns:
                    _comment(connection, "COLUMN", f"{_q(name)}.{_q(column.name)}", comment_of(column), quoted=True)
            connection.execute("CHECKPOINT")
        finally:
            connection.close()
            # After CHECKPOINT and close the log is empty; left behind only when something failed.
            Path(f"{temporary}.wal").unlink(missing_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
    return counts


def query_database(path: str | os.PathLike[str], sql: str) -> pd.DataFrame:
    """Answer of one SQL question to a database made by :func:`build_database`, as a frame.

    The file is opened read-only, with access to other files, the network and extensions off for good: a question can
    neither change anything nor read anything but this database. Geometries come as WKT text (longitude, latitude).

    Raises
    ------
    FileNotFoundError
        if there is no such file.
    duckdb.Error
        if the question is wrong or asks for what is closed.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no database at {file}: materialize results_database first")
    with duckdb.connect(str(file), read_only=True, config=_CLOSED) as connection:
        answer = connection.execute(sql)
        kinds = {d[0]: str(d[1]) for d in answer.description or []}
        frame = answer.df()
    for name, kind in kinds.items():
        if kind.upper().startswith("GEOMETRY"):
            frame[name] = _wkt(frame[name])
    return frame


def _wkt(values: pd.Series) -> pd.Series:
    import shapely

    there = values.notna()
    texts = shapely.to_wkt(shapely.from_wkb([bytes(v) for v in values[there]]), rounding_precision=-1)
    out = pd.Series(None, index=values.index, dtype=object)
    out[there] = texts
    return out


# --------------------------------------------------------------------------------------------- building
def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _create(table: Table, indexed: bool = True) -> str:
    lines = [f"{_q(c.name)} {TYPES[c.dtype]}{'' if c.nullable and not c.key else ' NOT NULL'}" for c in table.columns]
    if table.keys and indexed:
        lines.append(f"PRIMARY KEY ({', '.join(_q(k) for k in table.keys)})")
    lines += [f"CHECK ({rule.condition})" for rule in row_rules(table)]
    return f"CREATE TABLE {_q(table.name)} ({', '.join(lines)})"


def _comment(connection: duckdb.DuckDBPyConnection, kind: str, name: str, text: str, quoted: bool = False) -> None:
    connection.execute(f"COMMENT ON {kind} {name if quoted else _q(name)} IS {_text(text)}")


def _count(connection: duckdb.DuckDBPyConnection, name: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {_q(name)}").fetchone()  # noqa: S608  (names from TABLES)
    return int(row[0]) if row else 0


@contextlib.contextmanager
def _local_parts(storage: Storage, name: str) -> Iterator[list[str]]:
    """Local files of all partitions of a table, below folders that name the partition."""
    partitions = storage.partitions(name)
    with contextlib.ExitStack() as stack:
        files = []
        for partition in partitions:
            local = stack.enter_context(storage.reading(storage.table(name, partition)))
            files.append((local, partition))
        if storage.is_local:
            yield [str(local) for local, _ in files]
            return
        import tempfile

        # A remote store hands out bare copies: the folders that name the partition are made again around them.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dl4gam-")))
        out = []
        for local, partition in files:
            target = scratch.joinpath(*[f"{k}={v}" for k, v in partition.items()], "part.parquet")
            target.parent.mkdir(parents=True, exist_ok=True)
            local.replace(target)
            out.append(str(target))
        yield out


def _rows_of(files: list[str]) -> int:
    """Rows of Parquet files by their footers; a file that can not be read is told later, with its table."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = 0
    for file in files:
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            rows += pyarrow.parquet.read_metadata(file).num_rows
    return rows


def _fill(connection: duckdb.DuckDBPyConnection, table: Table, files: list[str], indexed: bool) -> None:
    types = {c.name: TYPES[c.dtype] for c in table.columns if c.name in table.partitioned_by}
    options = "union_by_name = true, hive_partitioning = "
    if types:
        hive = ", ".join(f"{_text(k)}: {v}" for k, v in types.items())
        options += f"true, hive_types = {{{hive}}}"
    else:
        options += "false"
    # The folder names decide alone: an id in the path of the store such as a=b must not become a column.
    source = f"read_parquet({_list(files)}, {options})"
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()  # noqa: S608  (own file names)
        found = {str(r[0]) for r in described}
        missing = [c.name for c in table.columns if c.name not in found and not c.nullable]
        if missing:
            raise ValueError(f"the files lack the columns {missing}")
        columns = ", ".join(_q(c.name) for c in table.columns)
        values = ", ".join(_value(c, found) for c in table.columns)
        order = ", ".join(_q(k) for k in table.keys)
        connection.execute(
            f"INSERT INTO {_q(table.name)} ({columns}) SELECT {values} FROM {source}"  # noqa: S608  (names from TABLES)
            + (f" ORDER BY {order}" if order else "")
        )
        if table.keys and not indexed:
            repeated = _repeated(connection, table, _q(table.name))
            if repeated:
                raise ValueError(f"repeated keys: {repeated}")
    except duckdb.ConstraintException as error:
        broken = _broken(connection, table, f"(SELECT {values} FROM {source})", columns) or str(error)  # noqa: S608
        raise ValueError(
            f"table {table.name} is not published: {broken}. Materialize the asset that writes it again"
        ) from error
    except (duckdb.Error, ValueError) as error:
        raise ValueError(
            f"table {table.name} can not enter the database: {error}. Materialize the asset that writes it again"
        ) from error


#: How many offending rows a message names.
_NAMED = 5


def _broken(connection: duckdb.DuckDBPyConnection, table: Table, source: str, columns: str) -> str:
    """Which rules the rows of ``source`` break, and the keys of the first that do."""
    rows = f"{source} AS r({columns})"
    keys = ", ".join(_q(k) for k in table.keys or [c.name for c in table.columns[:2]])
    empty = [Rule(f"{c.name}_required", f"{c.name} is not empty", f"{_q(c.name)} IS NOT NULL")
             for c in table.columns if c.key or not c.nullable]  # fmt: skip
    found = []
    for rule in [*empty, *row_rules(table)]:
        wrong = f"NOT coalesce({rule.condition}, true)"
        bad = connection.execute(f"SELECT count(*) FROM {rows} WHERE {wrong}").fetchone()  # noqa: S608
        if bad and bad[0]:
            names = [c.strip('"') for c in keys.split(", ")]
            shown = connection.execute(f"SELECT {keys} FROM {rows} WHERE {wrong} LIMIT {_NAMED}").fetchall()  # noqa: S608
            found.append(f"{bad[0]} rows break '{rule.meaning}': {_named(names, shown, int(bad[0]))}")
    repeated = _repeated(connection, table, rows)
    return "; ".join([*found, *([f"repeated keys: {repeated}"] if repeated else [])])


def _repeated(connection: duckdb.DuckDBPyConnection, table: Table, rows: str) -> str:
    keys = ", ".join(_q(k) for k in table.keys)
    if not keys:
        return ""
    shown = connection.execute(
        f"SELECT {keys} FROM {rows} GROUP BY {keys} HAVING count(*) > 1 ORDER BY ALL LIMIT {_NAMED + 1}"  # noqa: S608
    ).fetchall()
    return _named(table.keys, shown[:_NAMED], len(shown)) if shown else ""


def _named(names: list[str], rows: list[tuple[Any, ...]], n: int) -> str:
    text = "; ".join(", ".join(f"{k} {v}" for k, v in zip(names, row, strict=True)) for row in rows)
    return f"{text}{'; ...' if n > len(rows) else ''}"


def _check_glaciers(connection: duckdb.DuckDBPyConnection, table: Table) -> None:
    """Foreign key of a table: each glacier_id is one of ``glaciers``."""
    lost = connection.execute(
        f"SELECT glacier_id, count(*) FROM {_q(table.name)} ANTI JOIN glaciers USING (glacier_id) "  # noqa: S608
        f"GROUP BY glacier_id ORDER BY glacier_id LIMIT {_NAMED + 1}"
    ).fetchall()
    if lost:
        raise ValueError(
            f"table {table.name} is not published: its glaciers {', '.join(str(g) for g, _ in lost[:_NAMED])}"
            f"{', ...' if len(lost) > _NAMED else ''} are not in the inventory (table glaciers). The inventory has "
            "changed since: materialize the asset that writes the table again, or delete the partitions of years that "
            "are no longer wanted"
        )


#: Pairs of tables whose rows belong together: each row of the first has its row in the second, by these columns.
_TOGETHER = (
    ("areas", "lineage", {"glacier_id": "glacier_id", "year": "year"}),
    ("lineage", "areas", {"glacier_id": "glacier_id", "year": "year"}),
    ("lineage", "settings", {"settings_fingerprint": "fingerprint"}),
    ("lineage", "software", {"software_fingerprint": "fingerprint"}),
)


def _check_lineage(connection: duckdb.DuckDBPyConnection, left_out: set[str]) -> None:
    """Each estimate has its lineage and the reverse, and settings and packages that lineage names are there."""
    for one, other, by in _TOGETHER:
        if {one, other} & left_out:
            continue
        names = ", ".join(f"l.{_q(k)}" for k in by)
        there = " AND ".join(f"l.{_q(k)} IS NOT NULL" for k in by)
        join = " AND ".join(f"l.{_q(k)} = r.{_q(v)}" for k, v in by.items())
        lost = connection.execute(
            f"SELECT DISTINCT {names} FROM {_q(one)} l ANTI JOIN {_q(other)} r ON {join} "  # noqa: S608  (own names)
            f"WHERE {there} ORDER BY ALL LIMIT {_NAMED + 1}"
        ).fetchall()
        if lost:
            raise ValueError(
                f"table {one} is not published: rows of it have none in table {other} "
                f"({_named(list(by), lost[:_NAMED], len(lost))}). Materialize glacier_areas again"
            )


def _value(column: Column, found: set[str]) -> str:
    if column.name not in found:
        return f"NULL::{TYPES[column.dtype]}"
    if column.dtype == "geometry":
        # GeoParquet keeps longitude first whatever its CRS says; CRS84 says so too.
        return f"ST_SetCRS({_q(column.name)}, 'OGC:CRS84')"
    return f"{_q(column.name)}::{TYPES[column.dtype]}"


def _list(files: list[str]) -> str:
    # Brackets protect characters of a path that would be read as a pattern.
    def plain(path: str) -> str:
        return "".join(f"[{c}]" if c in "*?[" else c for c in path)

    return "[" + ", ".join(_text(plain(f)) for f in files) + "]"


def _add_region(connection: duckdb.DuckDBPyConnection, region: Region) -> None:
    from dl4gam_assets import __version__

    columns = ", ".join(
        f"{_q(name)} {kind}{' PRIMARY KEY' if name == 'name' else ' NOT NULL'}" for name, kind, _ in REGION_COLUMNS
    )
    connection.execute(f"CREATE TABLE region ({columns})")
    settings = json.dumps(region.model_dump(mode="json", exclude={"data_root", "compute"}))
    connection.execute(
        f"INSERT INTO region VALUES ({', '.join('?' * len(REGION_COLUMNS))})",  # noqa: S608
        [region.name, region.title, settings, region.fingerprint(), __version__, region.simulation is not None,
         ",".join(sorted(region.publication.leave_out))],
    )  # fmt: skip
    _comment(connection, "TABLE", "region", REGION_MEANING)
    for name, _, meaning in REGION_COLUMNS:
        _comment(connection, "COLUMN", f"region.{_q(name)}", meaning, quoted=True)


def _add_info(connection: duckdb.DuckDBPyConnection, counts: dict[str, int]) -> None:
    rows: list[tuple[Any, ...]] = [
        (t.name, "table", t.meaning, counts[t.name], i, c.name, TYPES[c.dtype], unit_of(c), c.meaning, c.key,
         c.key or not c.nullable)
        for t in TABLES.values()
        for i, c in enumerate(t.columns, start=1)
    ]  # fmt: skip
    rows += [
        ("region", "table", REGION_MEANING, 1, i, name, kind, "", meaning, name == "name", True)
        for i, (name, kind, meaning) in enumerate(REGION_COLUMNS, start=1)
    ]
    rows += [
        (name, "view", view.meaning, None, i, c.name, TYPES[c.dtype], unit_of(c), c.meaning, False, False)
        for name, view in VIEWS.items()
        for i, c in enumerate(view.columns, start=1)
    ]
    names = (
        "table_name", "kind", "table_meaning", "rows", "position", "column_name", "type", "unit", "meaning", "is_key",
        "is_required",
    )  # fmt: skip
    info = pd.DataFrame(rows, columns=list(names)).astype({"rows": "Int64"})
    connection.register("_info", info)
    connection.execute("CREATE TABLE tables_info AS SELECT * FROM _info")
    connection.unregister("_info")
    _comment(
        connection, "TABLE", "tables_info", "What every table, view and column means, and how many rows a table has."
    )
