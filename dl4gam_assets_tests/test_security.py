"""Nobody is let in: what is never done in the code, what outside input can not reach, and secrets that stay secret."""

from __future__ import annotations

import ast
import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio

from dl4gam_assets.imagery import SceneError
from dl4gam_assets.imagery.catalogs import stranger
from dl4gam_assets.imagery.reading import ReadPolicy
from dl4gam_assets.imagery.sources import forget_files, read, reading_with
from dl4gam_assets.settings import SettingsError, StacApi, load_region, parse_region
from dl4gam_assets_tests.faults.kills import forget
from dl4gam_assets_tests.imagery.range_server import serving
from dl4gam_assets_tests.small_region import Small

PACKAGE = Path(__file__).parents[1] / "dl4gam_assets"
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
        ("http://127.0.0.1:8001/a.tif", "http://127.0.0.1:8000/v1", True),
        ("http://10.0.0.7/a.tif", "http://10.0.0.6/v1", True),
        ("/data/scenes/a.tif", "http://127.0.0.1:8000/v1", True),
        ("/data/scenes/a.tif", "http://10.0.0.6/v1", False),
    ],
)
def test_a_catalog_elsewhere_opens_nothing_of_this_machine(href: str, server: str, opened: bool) -> None:
    assert (stranger(href, StacApi(url=server, collections=["c"])) is None) is opened


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
@pytest.mark.parametrize("url", ["https://me:hunter2@stac.example.org/v1", "https://hunter2@stac.example.org/v1"])
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
