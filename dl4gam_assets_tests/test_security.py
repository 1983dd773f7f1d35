"""Nobody is let in: what is never done in the code, what outside input can not reach, and secrets that stay secret."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from urllib3 import Retry

from dl4gam_assets.imagery import SceneError, catalogs
from dl4gam_assets.imagery.catalogs import CatalogError, open_catalog, stranger
from dl4gam_assets.imagery.reading import ReadPolicy
from dl4gam_assets.imagery.signing import unsigned
from dl4gam_assets.imagery.sources import forget_files, read, reading_with
from dl4gam_assets.settings import SensorSettings, SettingsError, StacApi, StacFolder, load_region, parse_region
from dl4gam_assets_tests.faults.kills import forget
from dl4gam_assets_tests.imagery.range_server import serving
from dl4gam_assets_tests.region_files import packaged
from dl4gam_assets_tests.small_region import Small

PACKAGE = Path(__file__).parents[1] / "dl4gam_assets"
REAL_IS_INSIDE = catalogs.is_inside
QUICK = ReadPolicy(concurrent=1, attempts=2, stall_s=1, request_s=2, budget_s=4, backoff_s=0.01)

# ------------------------------------------------------------------------------------------------ what the code is not
#: Modules whose readers run what they read, or expand entities. `json`, `safetensors`, `csv` and Arrow do not.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "xml", "lxml", "zipfile",
    "code",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load",
    "torch.hub.load", "os.system", "os.popen", "pd.read_pickle", "pandas.read_pickle", "shutil.unpack_archive",
}  # fmt: skip


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"imports {n}" for n in names if n in FORBIDDEN_MODULES or n.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            restricted = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
            if isinstance(node.func, ast.Attribute) and node.func.attr in {"extract", "extractall"}:
                yield f"extracts an archive in line {node.lineno}"  # `extractfile` gives bytes, and no path
            if _dotted(node.func) in FORBIDDEN_CALLS and not restricted:
                yield f"calls {_dotted(node.func)} in line {node.lineno}"
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in {"shell", "allow_pickle"} and on:
                    yield f"{keyword.arg}=True in line {node.lineno}"
                if keyword.arg == "verify" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False:
                    yield f"verify=False in line {node.lineno}"


def test_the_package_runs_nothing_that_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {f.relative_to(PACKAGE).as_posix(): list(_findings(f.read_text())) for f in files}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from xml.etree import ElementTree", "eval(text)", "yaml.load(text)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "tar.extractall(folder)", "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)", "requests.get(u, verify=False)",
    ],
)  # fmt: skip
def test_the_scan_sees(source: str) -> None:
    assert list(_findings(source))


# ------------------------------------------------------------------------------------------------------ what is reached
@pytest.mark.parametrize(
    ("href", "server", "opened"),
    [
        ("https://data.example.org/a.tif", "https://stac.example.org/v1", True),
        ("s3://bucket/a.tif", "https://stac.example.org/v1", True),
        ("file:///etc/passwd", "https://stac.example.org/v1", False),
        ("/etc/passwd", "https://stac.example.org/v1", False),
        ("../../etc/passwd", "https://stac.example.org/v1", False),
        ("/vsizip//data/secret.zip/a.tif", "https://stac.example.org/v1", False),
        ("/vsicurl/http://169.254.169.254/latest", "https://stac.example.org/v1", False),
        ("zip:///data/secret.zip!a.tif", "https://stac.example.org/v1", False),
        ("http://169.254.169.254/latest/meta-data", "https://stac.example.org/v1", False),
        ("http://127.0.0.1:8000/a.tif", "https://stac.example.org/v1", False),
        ("http://[::1]/a.tif", "https://stac.example.org/v1", False),
        ("http://10.0.0.7/a.tif", "https://stac.example.org/v1", False),
        ("http://localhost/a.tif", "https://stac.example.org/v1", False),
        ("http://metadata.google.internal/a.tif", "https://stac.example.org/v1", False),
        ("http://database/a.tif", "https://stac.example.org/v1", False),
        ("http://127.1/a.tif", "https://stac.example.org/v1", False),
        ("http://2130706433/a.tif", "https://stac.example.org/v1", False),
        ("http://0x7f.0.0.1/a.tif", "https://stac.example.org/v1", False),
        ("http://0177.0.0.1/a.tif", "https://stac.example.org/v1", False),
        ("http://169.254.43518/a.tif", "https://stac.example.org/v1", False),
        ("http://localhost./a.tif", "https://stac.example.org/v1", False),
        ("http://a.localhost/a.tif", "https://stac.example.org/v1", False),
        ("http://LOCALHOST/a.tif", "https://stac.example.org/v1", False),
        ("http://metadata.google.internal./a.tif", "https://stac.example.org/v1", False),
        ("http://[64:ff9b::7f00:1]/a.tif", "https://stac.example.org/v1", False),
        ("http://[::ffff:127.0.0.1]/a.tif", "https://stac.example.org/v1", False),
        ("http://[2002:7f00:1::]/a.tif", "https://stac.example.org/v1", False),
        ("http://[fd00::1]/a.tif", "https://stac.example.org/v1", False),
        ("http://\uff11\uff12\uff17.0.0.1/a.tif", "https://stac.example.org/v1", False),
        ("http://0.0.0.0/a.tif", "https://stac.example.org/v1", False),
        ("http://[nonsense/a.tif", "https://stac.example.org/v1", False),
        ("http://good.example.org\\@127.0.0.1/a.tif", "https://stac.example.org/v1", False),
        ("http://8.8.8.8/a.tif", "https://stac.example.org/v1", True),
        ("http://[2001:4860:4860::8888]/a.tif", "https://stac.example.org/v1", True),
        ("http://127.0.0.1:8001/a.tif", "http://127.0.0.1:8000/v1", True),
        ("http://10.0.0.7/a.tif", "http://10.0.0.6/v1", True),
        ("/data/scenes/a.tif", "http://127.0.0.1:8000/v1", True),
        ("/data/scenes/a.tif", "http://10.0.0.6/v1", False),
    ],
)
def test_a_catalog_elsewhere_opens_nothing_of_this_machine(href: str, server: str, opened: bool) -> None:
    assert (stranger(href, StacApi(url=server, collections=["c"])) is None) is opened


@pytest.mark.parametrize(("answers", "opened"), [
    (["93.184.216.34"], True), (["127.0.0.1"], False), (["93.184.216.34", "10.0.0.7"], False), (["::1"], False),
    (["fe80::1%eth0"], False), ([], True),
])  # fmt: skip
def test_a_name_is_what_it_resolves_to(answers: list[str], opened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1.nip.io and its like: one address of this network is enough. Tests have no name server: it is played."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, 0)) for answer in answers]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: found)
    catalogs._resolved.cache_clear()
    server = StacApi(url="https://stac.example.org/v1", collections=["c"])
    monkeypatch.setattr(catalogs, "is_inside", lambda host, **kind: "stac" not in host and REAL_IS_INSIDE(host, **kind))
    try:
        assert (stranger("http://127.0.0.1.nip.io/a.tif", server) is None) is opened
    finally:
        catalogs._resolved.cache_clear()


def _asked(url: str, *others: str) -> tuple[str, list[str]]:
    """What a search at a catalog elsewhere says, whose answers come from a server on loopback; and what was asked."""
    io = catalogs._api_io(Retry(total=0), url)
    asked: list[str] = []
    with pytest.raises(CatalogError) as raised:
        for href in others:
            asked.append(href)
            io.read_text(href)
    return str(raised.value), asked


@pytest.mark.parametrize("href", ["http://127.1:1/search", "file:///etc/passwd", "http://169.254.169.254/latest"])
def test_a_server_elsewhere_leads_no_search_here(href: str) -> None:
    """The search or the next page that it names is not asked for."""
    said, _ = _asked("https://stac.example.org/v1", href)
    assert said.startswith("https://stac.example.org/v1 leads to")


def test_a_redirect_to_this_network_is_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first server counts as one elsewhere; what it redirects to as what it is."""
    (tmp_path / "secret.json").write_text("{}")
    with serving(tmp_path) as inner, _redirecting(f"{inner.url}/secret.json") as outer:
        outer_host = f"localhost:{outer.rpartition(':')[2]}"
        monkeypatch.setattr(catalogs, "is_inside", lambda host, **kind: host == "127.0.0.1")
        io = catalogs._api_io(Retry(total=0), f"http://{outer_host}/v1")
        with pytest.raises(CatalogError, match=r"leads to http://127\.0\.0\.1"):
            io.read_text(f"http://{outer_host}/v1")
        assert inner.requests == []


@contextlib.contextmanager
def _redirecting(target: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_next_page_is_on_the_same_host() -> None:
    io = catalogs._api_io(Retry(total=0), "https://stac.example.org/v1")
    io.read_json = lambda *args, **kwargs: {"links": [{"rel": "next", "href": "https://other.example.org/v1?page=2"}]}
    pages = io.get_pages("https://stac.example.org/v1/search")
    next(pages)
    with pytest.raises(CatalogError, match=r"another host, other\.example\.org"):
        next(pages)


def test_a_catalog_on_disk_links_to_nothing_of_this_network(tmp_path: Path) -> None:
    """An item on loopback is not asked for; neither by a redirect of a server elsewhere."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "item.json").write_text("{}")
    with serving(shared) as server:
        link = {"rel": "item", "href": f"{server.url}/item.json?token=hunter2", "type": "application/geo+json"}
        (tmp_path / "catalog.json").write_text(json.dumps(
            {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "description": "d", "links": [link]}
        ))  # fmt: skip
        with pytest.raises(CatalogError, match=r"127\.0\.0\.1 is a host of this network") as raised:
            open_catalog(StacFolder(path="catalog.json"), tmp_path, SensorSettings())
        assert server.requests == [] and "hunter2" not in str(raised.value)


def test_what_the_user_put_in_its_place_is_opened() -> None:
    settings = StacApi(url="https://stac.example.org", collections=["c"], href_prefixes={"s3://b/": "/data/mirror/"})
    assert stranger("/data/mirror/a.tif", settings) is None
    assert stranger("/data/other/a.tif", settings) is not None


def test_a_file_elsewhere_does_not_choose_its_driver(tmp_path: Path) -> None:
    """A VRT leads to any file of this machine: by name it is a TIFF, by content it is not."""
    secret = tmp_path / "secret.tif"
    profile = {"width": 8, "height": 8, "count": 1, "dtype": "uint8", "crs": "EPSG:32632",
               "transform": rasterio.Affine(10, 0, 6e5, 0, -10, 5e6)}  # fmt: skip
    with rasterio.open(secret, "w", driver="GTiff", **profile) as target:
        target.write(np.full((1, 8, 8), 7, "uint8"))
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "good.tif").write_bytes(secret.read_bytes())
    (shared / "scene.tif").write_text(
        f"""<VRTDataset rasterXSize="8" rasterYSize="8"><SRS>EPSG:32632</SRS>
        <GeoTransform>600000, 10, 0, 5000000, 0, -10</GeoTransform><VRTRasterBand dataType="Byte" band="1">
        <SimpleSource><SourceFilename relativeToVRT="0">{secret}</SourceFilename><SourceBand>1</SourceBand>
        </SimpleSource></VRTRasterBand></VRTDataset>"""
    )
    forget_files()
    with serving(shared) as server, reading_with(QUICK):
        assert read(f"{server.url}/good.tif", lambda source: source.read().max()) == 7
        with pytest.raises(SceneError, match=r"scene\.tif can not be read"):
            read(f"{server.url}/scene.tif", lambda source: source.read())
    assert read(str(shared / "scene.tif"), lambda source: source.read().max()) == 7  # the user's own may be one
    forget_files()


def test_settings_are_data(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = tmp_path / "region.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {proof}']\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_region(path)
    assert not proof.exists()


# -------------------------------------------------------------------------------------------------------------- secrets
SECRETS = [
    "https://me:hunter2@stac.example.org/v1", "https://hunter2@stac.example.org/v1",
    "https://stac.example.org/v1?api_key=hunter2", "https://stac.example.org/v1?v=1&sig=hunter2",
    "https://stac.example.org/v1?X-Amz-Signature=hunter2", "https://stac.example.org/v1?access_token=hunter2",
    "https://stac.example.org/v1?%61pi_key=hunter2", "https://stac.example.org/v1?subscription-key=hunter2",
]  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_nor_into_any_other_address_of_the_settings(url: str) -> None:
    raw = packaged("oetztal")
    assert parse_region(raw).name
    catalog = {"kind": "stac-api", "url": "https://stac.example.org", "collections": ["c"]}
    for place in (
        {"terrain": {**raw.get("terrain", {}), "dem": [url + "/{lat}{lon}.tif"]}},
        {"terrain": {**raw.get("terrain", {}), "dem": ["/vsicurl/" + url]}},
        {"imagery": {"catalog": {**catalog, "href_prefixes": {"s3://b/": url}}}},
        {"imagery": {"catalog": {**catalog, "href_prefixes": {url: "s3://b/"}}}},
        {"imagery": {"catalog": {**catalog, "query": {"a": [url]}}}},
        {"inventory": {**raw["inventory"], "source": f"see {url} (2016)"}},
        {"data_root": url},
    ):
        with pytest.raises(SettingsError, match=r"environment") as raised:
            parse_region({**raw, **place})
        assert "hunter2" not in str(raised.value) + str(raised.value.__cause__), place


@pytest.mark.parametrize("url", SECRETS)
def test_they_are_taken_out_of_what_a_catalog_says(url: str, tmp_path: Path) -> None:
    """Neither the index of items nor a message keeps them; the rest of an address stays."""
    assert "hunter2" not in unsigned(f"can not open '{url}': HTTP 403 ({url})")
    assert unsigned("https://a.example.org/a.tif?version=3") == "https://a.example.org/a.tif?version=3"
    feature = {
        "type": "Feature", "stac_version": "1.0.0", "id": "scene", "collection": "c", "links": [],
        "geometry": {"type": "Point", "coordinates": [8, 46]}, "bbox": [8, 46, 8, 46],
        "properties": {"datetime": "2016-08-14T10:20:30Z"}, "assets": {"red": {"href": url}},
    }  # fmt: skip
    item = catalogs._item(feature, StacApi(url="https://stac.example.org", collections=["c"]))
    assert item is not None and "hunter2" not in item.assets["red"].href
    path = tmp_path / "items.jsonl"
    catalogs.write_items([pystac.Item.from_dict(feature)], ["red"], path)
    assert "hunter2" not in path.read_text() and "stac.example.org/v1" in path.read_text()


@pytest.mark.parametrize("url", SECRETS)
def test_credentials_do_not_belong_into_settings(url: str) -> None:
    raw = {"name": "a", "imagery": {"catalog": {"kind": "stac-api", "url": url, "collections": ["c"]}}}
    with pytest.raises(SettingsError, match=r"imagery\.catalog") as raised:
        parse_region(raw)
    assert "hunter2" not in str(raised.value)


def test_an_address_is_one_of_the_web() -> None:
    with pytest.raises(ValueError, match="http"):
        StacApi(url="file:///etc/passwd", collections=["c"])


@pytest.mark.timeout(300)
def test_secrets_of_the_environment_are_nowhere_in_the_store(small: Small, tmp_path: Path) -> None:
    """Tables, state, lineage, reports, Dagster's runs, events and logs of a run, and what it prints."""
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "s3cret-of-the-store-9a41", "DL4GAM_WEBHOOK_URL": "https://chat.example/hook-7c02",
        "PGPASSWORD": "s3cret-of-postgres-5d13", "PC_SDK_SUBSCRIPTION_KEY": "s3cret-of-planetary-88e4",
    }  # fmt: skip
    copy = small.copy(tmp_path / "copy")
    forget(copy.storage, "tables")
    forget(copy.storage, "report")
    where = ["--region", str(copy.yaml), "--home", str(copy.home)]
    done = subprocess.run(
        [sys.executable, "-m", "dl4gam_assets.cli", "materialize", *where],
        env={**{k: v for k, v in os.environ.items() if k != "DAGSTER_HOME"}, **secrets},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    root = Path(str(copy.storage.root))
    with contextlib.closing(sqlite3.connect(next(root.rglob("runs.db")))) as runs:
        assert runs.execute("select count(*) from runs").fetchone()[0] > 0
    files = [f for f in root.rglob("*") if f.is_file() and not f.is_relative_to(root / "inputs")]
    assert len(files) > 100
    leaks = [f for f in files if any(value.encode() in f.read_bytes() for value in secrets.values())]
    assert leaks == []
    assert not any(value in done.stdout + done.stderr for value in secrets.values())
