from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import duckdb
import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from dl4gam_assets.publication import build_database, query_database
from dl4gam_assets.publication.schema import TYPES, comment_of, unit_of, with_page
from dl4gam_assets.publication.views import REGION_COLUMNS, VIEWS
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES, TableError


@pytest.fixture(scope="module")
def database(store: Storage, region: Region, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "results.duckdb"
    counts = build_database(store, region, path)
    assert counts["glaciers"] == 12 and counts["areas"] == 29 and counts["scenes"] == 0
    return path


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_is_there_with_types_keys_and_comments_and_the_rows_of_the_store(
    name: str, database: Path, store: Storage
) -> None:
    table = TABLES[name]
    columns = query_database(
        database,
        f"select column_name, data_type, is_nullable, comment from duckdb_columns() where table_name = '{name}'",
    ).set_index("column_name")
    assert list(columns.index) == [c.name for c in table.columns]
    assert columns["comment"].to_dict() == {c.name: comment_of(c) for c in table.columns}
    # A primary key makes its columns NOT NULL too.
    assert columns["is_nullable"].to_dict() == {c.name: c.nullable and not c.key for c in table.columns}
    keys = query_database(
        database,
        f"select unnest(constraint_column_names) k from duckdb_constraints() "
        f"where table_name = '{name}' and constraint_type = 'PRIMARY KEY'",
    )
    assert keys["k"].tolist() == table.keys
    found = query_database(database, f'select * from "{name}"')
    stored = store.read_table(name)
    assert len(found) == len(stored)
    if len(found) and not table.geometry:
        order = table.keys
        left, right = (
            pd.DataFrame(f).sort_values(order, ignore_index=True).astype(object).where(lambda v: v.notna(), None)
            for f in (found, stored)
        )
        pd.testing.assert_frame_equal(left, right, check_dtype=False)


def test_geometries_are_lon_lat_and_come_back_exact(database: Path, store: Storage) -> None:
    found = query_database(
        database, "select glacier_id, geometry, ST_CRS(geometry) crs from outlines where year = 2023 and bound = 'best'"
    ).set_index("glacier_id")
    stored = store.read_table("outlines", year=2023).query("bound == 'best'").set_index("glacier_id").geometry
    assert set(found["crs"]) == {"OGC:CRS84"}
    for glacier, text in found["geometry"].items():
        assert shapely.from_wkt(text).equals_exact(stored[glacier], 1e-9)


def test_views_answer_the_first_questions(database: Path) -> None:
    losses = query_database(database, "select * from largest_losses")
    assert losses["change_km2"].is_monotonic_increasing and set(losses["year"]) == {2023}
    assert losses["glacier_id"].iloc[0] == "G11"
    series = query_database(database, "from glacier_time_series where glacier_id = 'G05/a'")
    assert series["year"].tolist() == [2015, 2019, 2023]
    assert series["rate_pct_per_year"].isna().tolist() == [True, False, False]
    countries = query_database(database, "select distinct country from changes_by_country")
    assert set(countries["country"]) == {"AT", "CH"}
    info = query_database(database, "select distinct table_name, rows from tables_info").set_index("table_name")["rows"]
    assert info["areas"] == 29 and set(info.index) == {*TABLES, *VIEWS, "region"}
    row = query_database(database, "select name, settings->>'$.years.baseline' b, simulated from region").iloc[0]
    assert row.tolist() == ["squares", "2015", True]
    comments = query_database(
        database,
        "select view_name n, comment from duckdb_views() where not internal "
        "union all select table_name, comment from duckdb_tables() where table_name = 'largest_losses'",
    )
    assert dict(zip(comments["n"], comments["comment"])) == {k: v.meaning for k, v in VIEWS.items()}


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_every_column_of_a_view_is_told_with_its_type_unit_and_meaning(name: str, database: Path) -> None:
    columns = query_database(
        database, f"select column_name, data_type, comment from duckdb_columns() where table_name = '{name}'"
    )
    declared = VIEWS[name].columns
    assert columns["column_name"].tolist() == [c.name for c in declared]
    assert columns["data_type"].tolist() == [TYPES[c.dtype] for c in declared]
    assert columns["comment"].tolist() == [comment_of(c) for c in declared]
    info = query_database(database, f"from tables_info where table_name = '{name}' order by position")
    assert info[["column_name", "unit", "meaning"]].to_numpy().tolist() == [
        [c.name, unit_of(c), c.meaning] for c in declared
    ]
    assert set(info["kind"]) == {"view"} and info["rows"].isna().all()


def test_the_region_is_told_too(database: Path) -> None:
    info = query_database(database, "select column_name, type, meaning from tables_info where table_name = 'region'")
    assert list(map(tuple, info.to_numpy())) == list(REGION_COLUMNS)


def test_inputs_of_a_glacier_itself_have_address_run_and_time(database: Path) -> None:
    rows = query_database(
        database, "from lineage_inputs where glacier_id = 'G05/a' and year = 2019 and kind <> 'materialization'"
    ).set_index("kind")
    assert rows["address"].to_dict() == {
        "glacier cube": "cubes/year=2019/G05%2Fa.nc", "static layers": "static/G05%2Fa.nc",
        "prediction": "predictions/year=2019/G05%2Fa.tif",
    }  # fmt: skip
    assert rows[["run_id", "time", "settings_fingerprint"]].notna().all(axis=None)


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('{secret}')",
        "select * from read_text('{secret}')",
        "select * from '{secret}'",
        "select * from glob('/*')",
        "copy areas to '{secret}.copy'",
        "export database '{secret}.folder'",
        "attach '{secret}.db'",
        "set enable_external_access = true",
        "install spatial",
        "load spatial",
        "delete from areas",
        "drop table areas",
        "create table t as select 1",
        "select * from read_parquet('https://example.com/x.parquet')",
    ],
)
def test_a_question_can_neither_change_nor_leave_the_database(sql: str, database: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(duckdb.Error):
        query_database(database, sql.format(secret=secret))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.csv"]
    assert query_database(database, "select count(*) n from areas")["n"].iloc[0] == 29


def test_a_missing_database_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="materialize"):
        query_database(tmp_path / "none.duckdb", "select 1")
    assert not list(tmp_path.iterdir())


def test_an_empty_store_makes_a_database_of_empty_tables(empty_store: Storage, region: Region) -> None:
    path = empty_store.path("results.duckdb")
    assert sum(build_database(empty_store, region, path).values()) == 0
    assert len(query_database(str(path), "select * from largest_losses")) == 0
    assert [p.name for p in Path(str(empty_store.root)).iterdir()] == ["results.duckdb"]


def _hold_open(path: str, ready: object, go: object, answers: object) -> None:
    with duckdb.connect(path, read_only=True) as connection:
        ready.set()  # type: ignore[attr-defined]
        go.wait(60)  # type: ignore[attr-defined]
        answers.put(connection.execute("select count(*) from glaciers").fetchone()[0])  # type: ignore[attr-defined, index]


def test_a_reader_neither_waits_nor_blocks_a_rebuild(empty_store: Storage, store: Storage, region: Region) -> None:
    path = empty_store.path("results.duckdb")
    build_database(store, region, path)
    context = multiprocessing.get_context("spawn")
    ready, go, answers = context.Event(), context.Event(), context.Queue()
    reader = context.Process(target=_hold_open, args=(str(path), ready, go, answers))
    reader.start()
    try:
        assert ready.wait(60)
        build_database(empty_store, region, path)  # replaced while the other process has it open
        assert query_database(str(path), "select count(*) n from glaciers")["n"].iloc[0] == 0
        go.set()
        assert answers.get(timeout=60) == 12
    finally:
        go.set()
        reader.join(60)
    assert reader.exitcode == 0


def test_files_that_do_not_fit_leave_the_old_database_and_no_litter(
    empty_store: Storage, store: Storage, region: Region
) -> None:
    path = empty_store.path("results.duckdb")
    build_database(store, region, path)
    before = Path(str(path)).read_bytes()
    broken = Path(str(empty_store.table("folds")))
    broken.parent.mkdir(parents=True)
    pd.DataFrame({"glacier_id": ["a", "a"], "fold": [1, 1], "role": ["test", "test"]}).to_parquet(broken)
    with pytest.raises(ValueError, match=r"table folds.*Materialize"):
        build_database(empty_store, region, path)
    pd.DataFrame({"glacier_id": ["a"], "fold": [1]}).to_parquet(broken)
    with pytest.raises(ValueError, match="role"):
        build_database(empty_store, region, path)
    assert Path(str(path)).read_bytes() == before
    assert sorted(p.name for p in Path(str(empty_store.root)).iterdir()) == ["results.duckdb", "tables"]


def test_older_files_without_a_nullable_column_and_odd_paths(tmp_path: Path, store: Storage, region: Region) -> None:
    storage = Storage(tmp_path / "year=1 [x] it's")
    file = Path(str(storage.table("taus", {"fold": 2})))
    file.parent.mkdir(parents=True)
    pd.DataFrame({"glacier_id": ["007"], "tau": [0.25]}).to_parquet(file)
    rates = Path(str(storage.table("baseline_areas")))
    rates.parent.mkdir(parents=True)
    pd.DataFrame(
        {"glacier_id": ["007"], "year": [2015], "fold": [2], "image_date": [pd.Timestamp("2015-09-01")]}
    ).to_parquet(rates)
    path = storage.path("results.duckdb")
    with pytest.raises(ValueError, match="table taus is not published: its glaciers 007 are not in the inventory"):
        build_database(storage, region, path)
    assert not path.exists()
    glaciers = store.read_table("glaciers")
    storage.write_table("glaciers", glaciers.head(1).assign(glacier_id="007"))
    build_database(storage, region, path)
    row = query_database(
        str(path), "select t.*, b.year, b.area_km2 from taus t join baseline_areas b using (glacier_id)"
    )
    assert row[["glacier_id", "tau", "fold", "year"]].iloc[0].tolist() == ["007", 0.25, 2, 2015]
    assert row["area_km2"].isna().all()


def test_a_remote_store_gives_the_same_database(store: Storage, region: Region, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    root = Path(str(store.root))
    for table in ("glaciers", "areas", "changes", "regional_changes", "failures", "lineage", "settings", "software"):
        for file in (root / "tables" / table).rglob("part.parquet"):
            memory.pipe(f"/remote/{file.relative_to(root).as_posix()}", file.read_bytes())
    try:
        remote = Storage("memory://remote")
        assert not remote.is_local
        build_database(remote, region, remote.path("results.duckdb"))
        with remote.reading(remote.path("results.duckdb")) as local:
            found = query_database(local, "select year, fold, count(*) n from areas group by all order by all")
            stages = query_database(local, 'select distinct stage, "partition" from failures order by all')
        local_path = tmp_path / "local.duckdb"
        build_database(store, region, local_path)
        pd.testing.assert_frame_equal(
            found, query_database(local_path, "select year, fold, count(*) n from areas group by all order by all")
        )
        assert stages["partition"].tolist() == ["2023", "2023"]
    finally:
        memory.rm("/remote", recursive=True)


# --------------------------------------------------------------------------------------------- constraints
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lower_km2": 99.0}, r"table areas is not published: 1 rows break 'lower_km2 <= area_km2 <= upper_km2'"),
        ({"recall": 1.2}, r"1 rows break '0 <= recall <= 1': glacier_id .*, year 2019"),
        ({"area_km2": -1.0, "lower_km2": -2.0}, r"break '0 <= area_km2': glacier_id"),
        ({"image_date": pd.NaT}, r"1 rows break 'image_date is not empty'"),
        ({"upper_km2": float("nan")}, r"1 rows break 'upper_km2 is a finite number'"),
        ({"std_km2": float("inf")}, r"1 rows break 'std_km2 is a finite number'"),
    ],
)
def test_rows_that_break_a_rule_are_named_and_the_former_database_stays(
    change: dict[str, object], words: str, store: Storage, region: Region, tmp_path: Path
) -> None:
    copy = Storage(tmp_path / "store")
    shutil.copytree(str(store.root), str(copy.root))
    path = copy.path("results.duckdb")
    build_database(copy, region, path)
    before = path.read_bytes()
    file = Path(str(copy.table("areas", {"year": 2019, "fold": 1})))
    frame = pd.read_parquet(file, partitioning=None)
    for column, value in change.items():
        frame.loc[frame.index[0], column] = value
    if frame.notna().loc[frame.index[0], list(change)].all() or change.keys() == {"image_date"}:
        frame.to_parquet(file)  # behind the platform's back
    else:  # pandas writes nan as null
        columns = {n: pa.array(v.to_numpy() if v.dtype == float else v, from_pandas=v.dtype != float)
                   for n, v in frame.items()}  # fmt: skip
        pq.write_table(pa.table(columns), file)
    with pytest.raises(ValueError, match=words):
        build_database(copy, region, path)
    assert path.read_bytes() == before
    assert not [f for f in Path(str(copy.root)).iterdir() if "spill" in f.name or f.suffix == ".wal"]


def test_a_word_that_the_schema_does_not_know_is_not_published(store: Storage, region: Region, tmp_path: Path) -> None:
    copy = Storage(tmp_path / "store")
    shutil.copytree(str(store.root), str(copy.root))
    file = Path(str(copy.table("outlines", {"year": 2019})))
    gpd.read_parquet(file).assign(bound="nonsense").drop_duplicates("glacier_id").to_parquet(file)
    with pytest.raises(ValueError, match="rows break 'bound is one of best, lower, upper'"):
        build_database(copy, region, copy.path("results.duckdb"))
    with pytest.raises(TableError, match="'bound' is none of best, lower, upper"):
        copy.read_table("outlines", year=2019)


@pytest.mark.parametrize(
    ("table", "lost", "words"),
    [
        ("lineage", {"year": 2019, "fold": 1}, r"table areas is not published: .* none in table lineage \(.*2019"),
        ("areas", {"year": 2019, "fold": 2}, r"table lineage is not published: .* none in table areas"),
        ("settings", None, r"table lineage is not published: .* none in table settings"),
        ("software", None, r"table lineage is not published: .* none in table software"),
    ],
)
def test_no_estimate_is_published_without_its_lineage(
    table: str, lost: dict[str, object] | None, words: str, store: Storage, region: Region, tmp_path: Path
) -> None:
    copy = Storage(tmp_path / "store")
    shutil.copytree(str(store.root), str(copy.root))
    for partition in [lost] if lost else copy.partitions(table):
        copy.table(table, partition).unlink()
    with pytest.raises(ValueError, match=words):
        build_database(copy, region, copy.path("results.duckdb"))


def test_tables_that_are_left_out_are_there_and_empty(store: Storage, region: Region, tmp_path: Path) -> None:
    slim = region.model_copy(update={"publication": region.publication.model_copy(update={"leave_out": ["outlines"]})})
    counts = build_database(store, slim, tmp_path / "slim.duckdb")
    assert counts["outlines"] == 0 and counts["areas"] == 29
    assert query_database(tmp_path / "slim.duckdb", "select left_out from region")["left_out"].tolist() == ["outlines"]
    with pytest.raises(ValueError, match="can not be left out"):
        type(region.publication).model_validate({"leave_out": ["areas"]})
    assert slim.fingerprint() == region.fingerprint(), "what is handed on changes no result"


def test_the_page_of_the_schema_is_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    assert with_page(page) == page, "run: python -m dl4gam_assets.publication.schema docs/results.md"
