"""results.duckdb: every table in one file, and safe questions to it.

Belongs here: building the database from the Parquet tables (which stay the truth), its views, and read-only queries.
Does not belong here: computing figures; what the tables mean (``tables``).

Needs no DuckDB extension: geometries are DuckDB's own type GEOMETRY, longitude and latitude (OGC:CRS84).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
from upath import UPath

from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES, Column, Table

_TYPES = {
    "string": "VARCHAR",
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "bool": "BOOLEAN",
    "timestamp": "TIMESTAMP",
    "geometry": "GEOMETRY('OGC:CRS84')",
}

#: Neither files nor the network nor extensions, and no way to allow them again.
_CLOSED: dict[str, Any] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "lock_configuration": True,
}

#: name -> (meaning, SQL)
VIEWS: dict[str, tuple[str, str]] = {
    "glacier_time_series": (
        "Area of every glacier in every year, with its interval and its change since the baseline.",
        """
        SELECT a.glacier_id, g.name, g.country, a.year, a.image_date, a.area_km2, a.lower_km2, a.upper_km2, a.std_km2,
               c.rate_km2_per_year, c.rate_std_km2_per_year, c.rate_pct_per_year, c.rate_std_pct_per_year,
               c.ok, c.flags
        FROM areas a
        LEFT JOIN glaciers g USING (glacier_id)
        LEFT JOIN changes c USING (glacier_id, year)
        ORDER BY a.glacier_id, a.year
        """,
    ),
    "largest_losses": (
        "Change of every glacier since the baseline in the latest year that has changes, largest loss first. "
        "Rows that are not ok did not pass the quality filter; flags say why.",
        """
        SELECT c.glacier_id, g.name, g.country, c.year, c.baseline_area_km2, c.area_km2,
               c.area_km2 - c.baseline_area_km2 AS change_km2, c.rate_km2_per_year, c.rate_std_km2_per_year,
               c.rate_pct_per_year, c.rate_std_pct_per_year, c.snr, c.ok, c.flags
        FROM changes c
        LEFT JOIN glaciers g USING (glacier_id)
        WHERE c.year = (SELECT max(year) FROM changes)
        ORDER BY change_km2, c.glacier_id
        """,
    ),
    "robust_trends": (
        "Trend of every glacier over all its images, beside the change since the baseline. Where both "
        "disagree, odd_year names the image to look at.",
        """
        SELECT t.glacier_id, g.name, g.country, t.n_years, t.first_date, t.last_date, t.first_area_km2,
               t.theil_sen_pct_per_year, t.theil_sen_km2_per_year, t.theil_sen_lower_km2_per_year,
               t.theil_sen_upper_km2_per_year, t.wls_km2_per_year, t.wls_std_km2_per_year,
               c.rate_km2_per_year AS two_year_km2_per_year, t.odd_year, t.odd_residual
        FROM trends t
        LEFT JOIN glaciers g USING (glacier_id)
        LEFT JOIN changes c ON c.glacier_id = t.glacier_id AND c.year = (SELECT max(year) FROM changes)
        ORDER BY t.glacier_id
        """,
    ),
    "evaluation_by_class": (
        "Held-out quality over all folds: all glaciers, by size class, and debris-covered and clean glaciers apart. "
        "iou, precision, recall and f1 come from summed pixels; weighted_ ones are means over glaciers weighted by "
        "inventory area, mean_ ones plain means over glaciers. Never compare figures of different scopes.",
        """
        WITH judged AS (SELECT *, inventory_area_km2 AS weight FROM evaluation WHERE role = 'test' AND n_pixels > 0),
        named AS (
            SELECT 0 AS place, 'all' AS grouping, 'all' AS "group", * FROM judged
            UNION ALL SELECT 1, 'size_class', size_class, * FROM judged WHERE size_class IS NOT NULL
            UNION ALL SELECT 2, 'debris', CASE WHEN debris_covered THEN 'debris-covered' ELSE 'clean' END, *
                      FROM judged WHERE debris_covered IS NOT NULL
        )
        SELECT method, scope, grouping, "group", count(DISTINCT glacier_id) AS n_glaciers,
               sum(n_pixels)::BIGINT AS n_pixels, sum(true_positive)::BIGINT AS true_positive,
               sum(false_positive)::BIGINT AS false_positive, sum(false_negative)::BIGINT AS false_negative,
               CASE WHEN count(iou) > 0 THEN sum(true_positive)
                   / nullif(sum(true_positive + false_positive + false_negative), 0) END AS iou,
               CASE WHEN count(precision) > 0 THEN sum(true_positive)
                   / nullif(sum(true_positive + false_positive), 0) END AS precision,
               sum(true_positive) / nullif(sum(true_positive + false_negative), 0) AS recall,
               CASE WHEN count(f1) > 0 THEN sum(2 * true_positive)
                   / nullif(sum(2 * true_positive + false_positive + false_negative), 0) END AS f1,
               sum(iou * weight) / sum(weight) FILTER (iou IS NOT NULL) AS weighted_iou,
               sum(precision * weight) / sum(weight) FILTER (precision IS NOT NULL) AS weighted_precision,
               sum(recall * weight) / sum(weight) FILTER (recall IS NOT NULL) AS weighted_recall,
               sum(f1 * weight) / sum(weight) FILTER (f1 IS NOT NULL) AS weighted_f1,
               avg(iou) AS mean_iou, avg(precision) AS mean_precision, avg(recall) AS mean_recall, avg(f1) AS mean_f1
        FROM named
        GROUP BY method, scope, place, grouping, "group"
        ORDER BY method, scope, place, min(weight), "group"
        """,
    ),
    "lineage_inputs": (
        "Every input of every estimate, one row each: scene files, cube, terrain tiles, weights, calibration, "
        "settings, packages, and the materializations (with Dagster run) that they come from.",
        """
        WITH joined AS (
            SELECT l.glacier_id, l.year, l.fold, s.kind, s.name, s.address, s.checksum, s.asset, s.partition, s.run_id,
                   s.materialization_id, s.code_version, s.time
            FROM lineage l JOIN lineage_sources s ON s.year = l.year AND s.fold = l.fold AND s.scope = 'all'
            UNION ALL
            SELECT l.glacier_id, l.year, l.fold, s.kind, s.name, s.address, s.checksum, s.asset, s.partition, s.run_id,
                   s.materialization_id, s.code_version, s.time
            FROM lineage l JOIN lineage_sources s
              ON s.year = l.year AND s.fold = l.fold AND s.scope = 'image' AND s.scope_key = l.scene_ids
            UNION ALL
            SELECT l.glacier_id, l.year, l.fold, s.kind, s.name, s.address, s.checksum, s.asset, s.partition, s.run_id,
                   s.materialization_id, s.code_version, s.time
            FROM lineage l JOIN lineage_sources s
              ON s.year = l.year AND s.fold = l.fold AND s.scope = 'terrain' AND s.scope_key = l.terrain_key
            UNION ALL
            SELECT glacier_id, year, fold, 'glacier cube', glacier_id, NULL, cube_fingerprint, 'glacier_cubes',
                   year::VARCHAR, NULL, NULL, NULL, NULL
            FROM lineage
            UNION ALL
            SELECT glacier_id, year, fold, 'static layers', glacier_id, NULL, static_fingerprint, 'elevation', 'all',
                   NULL, NULL, NULL, NULL
            FROM lineage WHERE static_fingerprint IS NOT NULL
            UNION ALL
            SELECT glacier_id, year, fold, 'prediction', glacier_id, NULL, prediction_fingerprint,
                   'glacier_predictions', year || '.fold_' || fold, NULL, NULL, NULL, NULL
            FROM lineage
        )
        SELECT * FROM joined
        """,
    ),
    "changes_by_country": (
        "Totals by country, year and method.",
        """
        SELECT r."group" AS country, r.year, r.method, r.n_glaciers, r.n_measured, r.baseline_area_km2, r.area_km2,
               r.std_km2, r.rate_km2_per_year, r.rate_std_km2_per_year, r.rate_pct_per_year, r.rate_std_pct_per_year,
               r.correlation
        FROM regional_changes r
        WHERE r.grouping = 'country'
        ORDER BY country, r.year, r.method
        """,
    ),
}


def build_database(storage: Storage, region: Region, path: UPath | os.PathLike[str]) -> dict[str, int]:
    """Build the database of a region and put it at ``path`` in one step; returns rows by table.

    Types, primary keys, NOT NULL and comments come from ``TABLES``; a table without files is there, empty. Beside
    them: ``region`` (name, title, settings as JSON, fingerprint, code version), ``tables_info`` (one row a column) and
    the views of :data:`VIEWS`. A reader that has the old file open keeps reading the old content.

    Raises
    ------
    ValueError
        naming the table whose files do not fit its schema (a missing column, a repeated key, an empty required value).
    """
    counts: dict[str, int] = {}
    with storage.writing(path) as temporary:
        connection = duckdb.connect(str(temporary))
        try:
            for table in TABLES.values():
                connection.execute(_create(table))
                with _local_parts(storage, table.name) as files:
                    if files:
                        _fill(connection, table, files)
                counts[table.name] = _count(connection, table.name)
                _comment(connection, "TABLE", table.name, table.meaning)
                for column in table.columns:
                    _comment(connection, "COLUMN", f"{_q(table.name)}.{_q(column.name)}", column.meaning, quoted=True)
            _add_region(connection, region)
            _add_info(connection, counts)
            for name, (meaning, sql) in VIEWS.items():
                connection.execute(f"CREATE VIEW {_q(name)} AS {sql}")
                _comment(connection, "VIEW", name, meaning)
            connection.execute("CHECKPOINT")
        finally:
            connection.close()
            # After CHECKPOINT and close the log is empty; left behind only when something failed.
            Path(f"{temporary}.wal").unlink(missing_ok=True)
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
def _q(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _create(table: Table) -> str:
    lines = [f"{_q(c.name)} {_TYPES[c.dtype]}{'' if c.nullable else ' NOT NULL'}" for c in table.columns]
    if table.keys:
        lines.append(f"PRIMARY KEY ({', '.join(_q(k) for k in table.keys)})")
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


def _fill(connection: duckdb.DuckDBPyConnection, table: Table, files: list[str]) -> None:
    types = {c.name: _TYPES[c.dtype] for c in table.columns if c.name in table.partitioned_by}
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
    except (duckdb.Error, ValueError) as error:
        raise ValueError(
            f"table {table.name} can not enter the database: {error}. Materialize the asset that writes it again"
        ) from error


def _value(column: Column, found: set[str]) -> str:
    if column.name not in found:
        return f"NULL::{_TYPES[column.dtype]}"
    if column.dtype == "geometry":
        # GeoParquet keeps longitude first whatever its CRS says; CRS84 says so too.
        return f"ST_SetCRS({_q(column.name)}, 'OGC:CRS84')"
    return f"{_q(column.name)}::{_TYPES[column.dtype]}"


def _list(files: list[str]) -> str:
    # Brackets protect characters of a path that would be read as a pattern.
    def plain(path: str) -> str:
        return "".join(f"[{c}]" if c in "*?[" else c for c in path)

    return "[" + ", ".join(_text(plain(f)) for f in files) + "]"


def _add_region(connection: duckdb.DuckDBPyConnection, region: Region) -> None:
    from dl4gam_assets import __version__

    connection.execute(
        "CREATE TABLE region (name VARCHAR PRIMARY KEY, title VARCHAR, settings JSON NOT NULL, "
        "fingerprint VARCHAR NOT NULL, code_version VARCHAR NOT NULL, simulated BOOLEAN NOT NULL)"
    )
    settings = json.dumps(region.model_dump(mode="json", exclude={"data_root", "compute"}))
    connection.execute(
        "INSERT INTO region VALUES (?, ?, ?, ?, ?, ?)",
        [region.name, region.title, settings, region.fingerprint(), __version__, region.simulation is not None],
    )
    _comment(connection, "TABLE", "region", "The region and all settings the results were made with.")
    for name, meaning in {
        "name": "Name of the region", "title": "Title", "settings": "All settings that can change a result, as JSON",
        "fingerprint": "Hash of the settings", "code_version": "Version of dl4gam_assets",
        "simulated": "True: inputs are simulated, the figures speak of no real glacier",
    }.items():  # fmt: skip
        _comment(connection, "COLUMN", f"region.{_q(name)}", meaning, quoted=True)


def _add_info(connection: duckdb.DuckDBPyConnection, counts: dict[str, int]) -> None:
    rows = [
        (t.name, t.meaning, counts[t.name], i, c.name, _TYPES[c.dtype], c.meaning, c.key, not c.nullable)
        for t in TABLES.values()
        for i, c in enumerate(t.columns, start=1)
    ]
    names = (
        "table_name", "table_meaning", "rows", "position", "column_name", "type", "meaning", "is_key", "is_required",
    )  # fmt: skip
    info = pd.DataFrame(rows, columns=list(names))
    connection.register("_info", info)
    connection.execute("CREATE TABLE tables_info AS SELECT * FROM _info")
    connection.unregister("_info")
    _comment(connection, "TABLE", "tables_info", "What every table and column means, and how many rows a table has.")
