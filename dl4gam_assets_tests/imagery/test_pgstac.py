"""The platform through pgstac, the API of Planetary Computer: PostgreSQL with PostGIS, pypgstac, stac-fastapi-pgstac.

A database cluster of its own is made in a temporary folder and removed again. Skipped, with the reason, where there is
no PostgreSQL with PostGIS or the packages of the extra ``test-pgstac`` are absent:

    apt-get install postgresql postgresql-15-postgis-3
    pip install -e '.[test,test-pgstac]'
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pystac_client
import pytest

from dl4gam_assets.imagery import CatalogError, open_catalog
from dl4gam_assets.imagery.sources import forget_files
from dl4gam_assets_tests.postgres_server import postgres_server
from dl4gam_assets_tests.stac_server import Server, status
from dl4gam_assets_tests.stac_server.checks import check_search, plain
from dl4gam_assets_tests.stac_server.regions import BASELINE, YEAR, Store, asking, differences, small_store

pytest.importorskip("pypgstac.db", reason="pypgstac is absent: pip install -e '.[test-pgstac]'")
pytest.importorskip("stac_fastapi.pgstac.app", reason="stac-fastapi.pgstac is absent: pip install -e '.[test-pgstac]'")

SEASON = (dt.date(YEAR, 8, 1), dt.date(YEAR, 10, 15))


# ---------------------------------------------------------------------------------------------------------- a database
@pytest.fixture(scope="module")
def database() -> Iterator[dict[str, Any]]:
    """Connection parameters of a cluster that is made and started for these tests."""
    import psycopg

    with postgres_server() as asked:
        with psycopg.connect(**asked) as connection:  # type: ignore[arg-type]
            query = "select default_version from pg_available_extensions where name = 'postgis'"
            if connection.execute(query).fetchone() is None:
                pytest.skip("PostgreSQL has no PostGIS: apt-get install postgresql-15-postgis-3")
        yield asked


def _application(database: dict[str, Any]) -> Any:
    """stac-fastapi-pgstac over the database."""
    from stac_fastapi.pgstac.app import instantiate_api
    from stac_fastapi.pgstac.config import PostgresSettings, Settings
    from stac_fastapi.pgstac.db import close_db_connection, connect_to_db

    settings = PostgresSettings(
        pghost=database["host"], pgport=database["port"], pguser=database["user"], pgpassword="none",
        pgdatabase=database["dbname"],
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        await connect_to_db(app, postgres_settings=settings)
        yield
        await close_db_connection(app)

    return instantiate_api(lifespan=life, settings=Settings(prefix_path="/v1")).app


def _load(database: dict[str, Any], server: Server) -> None:
    """The schema, and the collections and items that the server's own backend read."""
    from pypgstac.db import PgstacDB
    from pypgstac.load import Loader, Methods
    from pypgstac.migrate import Migrate

    asked = database
    with PgstacDB(f"postgresql://{asked['user']}@{asked['host']}:{asked['port']}/{asked['dbname']}") as db:
        Migrate(db).run_migration()
        loader = Loader(db)
        loader.load_collections(iter(server.backend.collections.values()), Methods.upsert)
        loader.load_items(iter(server.backend.items.values()), Methods.upsert)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def running(store: Store, database: dict[str, Any]) -> Iterator[Server]:
    server = Server(store.inputs, api=_application(database))
    _load(database, server)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.restore()
    forget_files()
    yield running
    running.restore()
    forget_files()


# --------------------------------------------------------------------------------------------------------------- tests
def _far(server: Server, store: Store, **catalog: Any) -> Any:
    region = Store(store.folder, asking(store.raw, server.url, server.collections, **catalog)).region
    return open_catalog(region.imagery.catalog, Path(), region.imagery.sensor)


def _near(store: Store) -> Any:
    return open_catalog(store.region.imagery.catalog, store.inputs, store.region.imagery.sensor)


def test_it_is_pgstac(server: Server) -> None:
    client = pystac_client.Client.open(server.url)
    for what in ("CORE", "ITEM_SEARCH", "QUERY", "FILTER"):
        assert client.conforms_to(what), what
    page = next(iter(client.search(limit=2).pages_as_dicts()))
    following = next(link for link in page["links"] if link["rel"] == "next")
    assert "next:" in str(following), "tokens of pgstac name the last item"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_each_condition_of_a_search(server: Server, method: str) -> None:
    check_search(server.url, list(server.backend.items.values()), method)


@pytest.mark.parametrize("page_size", [1, 4, 100])
def test_a_search_finds_what_the_folder_holds(server: Server, store: Store, page_size: int) -> None:
    box = list(store.table("glaciers").total_bounds)
    far = _far(server, store, page_size=page_size).search(box, *SEASON)
    near = _near(store).search(box, *SEASON)
    assert [plain(i) for i in far] == [plain(i) for i in near] and len(far) == 7
    assert not _far(server, store).search([0, 0, 1, 1], *SEASON)


def test_the_query_of_the_settings(server: Server, store: Store) -> None:
    box = list(store.table("glaciers").total_bounds)
    found = _far(server, store, query={"eo:cloud_cover": {"lt": 5}}).search(box, *SEASON)
    everything = _near(store).search(box, *SEASON)
    assert {i.id for i in found} == {i.id for i in everything if i.properties["eo:cloud_cover"] < 5}
    assert 0 < len(found) < len(everything)


def test_items_by_id(server: Server, store: Store) -> None:
    names = [i.id for i in _near(store).search(list(store.table("glaciers").total_bounds), *SEASON)][::-1]
    assert [i.id for i in _far(server, store, page_size=2).get(names)] == names
    with pytest.raises(CatalogError, match="no item 'none'"):
        _far(server, store).get([names[0], "none"])


def test_stages_from_candidates_to_cubes(server: Server, store: Store, tmp_path: Path) -> None:
    """All glaciers and years, with a busy database now and then."""
    server.fail("/v1/search", status(503, 1), times=1)
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections, page_size=3))
    for year in (BASELINE, YEAR):
        said = far.run(year)
        assert said["scene_candidates"]["failed_glaciers"] == said["glacier_cubes"]["failed_glaciers"] == 0
    assert differences(store.ws.storage, far.ws.storage, [BASELINE, YEAR]) == []
    assert len(far.table("cubes")) == 12
