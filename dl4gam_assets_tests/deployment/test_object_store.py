"""A store at an S3 address: the same results as in a folder. The server is moto's, on loopback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
import yaml

from dl4gam_assets.compute import Mapper
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.orchestrate import materialize
from dl4gam_assets.publication import query_database
from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import areas, change, predictions, publication, simulation
from dl4gam_assets.stages.base import UpstreamError, Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.small_region import Small

pytest.importorskip("s3fs", reason="s3fs is absent: pip install -e '.[team]'")
moto = pytest.importorskip("moto.server", reason="moto is absent: pip install -e '.[test]'")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an empty bucket; credentials and endpoint are in the environment, as in a deployment."""
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("results")
        yield "s3://results"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_images_become_the_same_cubes(small: Small, bucket: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(small.yaml.read_text())
    raw |= {"name": "remote", "simulation": None, "data_root": str(small.storage.inputs())}
    settings = tmp_path / "remote.yaml"
    settings.write_text(yaml.safe_dump(raw))
    region, storage = load_region(settings), Storage(f"{bucket}/remote")
    only = (
        "inventory_outlines", "debris_outlines", "glacier_zones", "elevation", "scene_candidates", "selected_scenes",
        "elevation_change", "glacier_cubes",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DL4GAM_HOME", bucket)
        patch.setenv("DL4GAM_REGION", str(settings))
        patch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
        (tmp_path / "dagster").mkdir()
        outcome = materialize(build_defs(region), region, storage, years=[2015], only=only)
        assert outcome.failed == []
        again = materialize(build_defs(region), region, storage, years=[2015], only=only)
        assert again.timings == []  # everything is found to be current
    mine = storage.read_table("cubes", year=2015)["glacier_id"].tolist()
    assert mine == small.storage.read_table("cubes", year=2015)["glacier_id"].tolist() and len(mine) > 5
    for glacier in mine[:3]:
        there = Path(str(small.storage.cube(2015, glacier)))
        with (
            storage.reading(storage.cube(2015, glacier)) as local,
            xr.open_dataset(local) as a,
            xr.open_dataset(there) as b,
        ):
            xr.testing.assert_equal(a.drop_attrs(), b.drop_attrs())


def test_maps_areas_and_publication_of_a_copied_store_are_the_same(small: Small, bucket: str) -> None:
    storage = Storage(f"{bucket}/small")
    source = Path(str(small.storage.root))
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        folder = file.relative_to(source).parts[0]
        if folder in ("tables", "state", "cubes", "models", "packed", "static"):
            with storage.writing(storage.path(*file.relative_to(source).parts)) as temporary:
                temporary.write_bytes(file.read_bytes())
    ready = small.region.model_copy(update={"simulation": None, "data_root": str(small.storage.inputs())})
    ws = Workspace(ready, storage, Mapper(1))
    for fold in (1, 2):
        predictions.glacier_predictions(ws, 2016, fold, force=True)
        areas.glacier_areas(ws, 2016, fold, force=True)
    areas.glacier_outlines(ws, 2016, force=True)
    change.area_change(ws, 2016, force=True)
    change.regional_change(ws, 2016, force=True)
    publication.results_database(ws, force=True)
    publication.report(ws, 2016, force=True)

    for table in ("areas", "outlines", "changes", "regional_changes"):
        pd.testing.assert_frame_equal(
            pd.DataFrame(storage.read_table(table, year=2016)), pd.DataFrame(small.storage.read_table(table, year=2016))
        )
    with storage.reading(storage.path("results.duckdb")) as local:
        rows = query_database(local, "select count(*) n from areas where year = 2016")
    assert rows["n"].iloc[0] == len(small.storage.read_table("areas", year=2016))
    page = storage.path("reports", "2016.html").read_text()
    assert "data:image/webp" in page and "Where the numbers come from" in page
    for file in storage.root.rglob("*"):
        assert ".tmp-" not in file.name


def test_a_simulated_region_wants_a_folder(small: Small, bucket: str) -> None:
    ws = Workspace(small.region, Storage(f"{bucket}/simulated"), Mapper(1))
    with pytest.raises(UpstreamError, match="set DL4GAM_HOME to a folder"):
        simulation.simulated_inputs(ws)
