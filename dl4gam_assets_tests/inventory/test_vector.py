"""Vector files that are not what their name says: nothing that they lead to is read."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import pytest
import shapely

from dl4gam_assets.inventory import read_inventory
from dl4gam_assets.inventory._prepare import prepare_inventory
from dl4gam_assets.inventory.debris import _from_vector
from dl4gam_assets.inventory.vector import VectorFormatError, read_vector
from dl4gam_assets.settings import InventorySettings, SettingsError
from dl4gam_assets_tests.imagery.range_server import serving

FRAME = gpd.GeoDataFrame({"glacier_id": ["a"]}, geometry=[shapely.box(8, 46, 8.01, 46.01)], crs=4326)
DRIVERS = {".gpkg": "GPKG", ".shp": "ESRI Shapefile", ".geojson": "GeoJSON", ".json": "GeoJSON", ".fgb": "FlatGeobuf",
           ".gml": "GML", ".kml": "KML", ".geojsonl": "GeoJSONSeq"}  # fmt: skip


def vrt(source: Path | str) -> str:
    layer = f"<SrcDataSource>{source}</SrcDataSource><SrcLayer>secret</SrcLayer>"
    return f'<OGRVRTDataSource><OGRVRTLayer name="x">{layer}</OGRVRTLayer></OGRVRTDataSource>'


@pytest.mark.parametrize("suffix", DRIVERS)
def test_formats_are_read_by_their_suffix(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"outlines{suffix}"
    FRAME.to_file(file, driver=DRIVERS[suffix])
    assert len(read_vector(file)) == 1


@pytest.mark.parametrize("suffix", [*DRIVERS, ".zip", ".vrt", ".xml", ""])
def test_a_description_under_another_name_leads_nowhere(suffix: str, tmp_path: Path) -> None:
    FRAME.to_file(tmp_path / "secret.gpkg", driver="GPKG", layer="secret")
    disguised = tmp_path / f"inventory{suffix}"
    for padding in ("", " \n", "<!-- -->"):
        disguised.write_text(padding + vrt(tmp_path / "secret.gpkg"))
        with pytest.raises(VectorFormatError, match="inventory"):
            read_vector(disguised)
    with pytest.raises(SettingsError, match="inventory"):
        read_inventory(disguised, InventorySettings(path="unused"))
    with pytest.raises(ValueError, match="inventory"):
        _from_vector(disguised, None, FRAME)


def test_no_host_is_asked(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    FRAME.to_file(shared / "secret.geojson", driver="GeoJSON")
    with serving(shared) as server:
        (tmp_path / "inventory.gpkg").write_text(vrt(f"/vsicurl/{server.url}/secret.geojson"))
        with pytest.raises(VectorFormatError):
            read_vector(tmp_path / "inventory.gpkg")
        assert server.requests == []


def test_a_note_cut_short_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dl4gam_assets.inventory import sgi

    made: list[Path] = []

    def write(folder: Path, path: Path) -> dict[str, float]:
        made.append(path)
        path.write_text("made")
        return {"glaciers": 1.0}

    monkeypatch.setattr(sgi, "source_hash", lambda folder: "of the raw files")
    monkeypatch.setattr(sgi, "write_swiss_inventory", write)  # minutes, on files that are not ours to keep here
    settings = InventorySettings(path=".", prepare="sgi2016")
    note = prepare_inventory(settings, tmp_path, tmp_path).with_suffix(".json")
    prepare_inventory(settings, tmp_path, tmp_path)
    assert len(made) == 1
    for rest in (note.read_text()[:20], "[]", "", "[" * 100_000):
        note.write_text(rest)
        before = len(made)
        prepare_inventory(settings, tmp_path, tmp_path)
        assert len(made) == before + 1
        prepare_inventory(settings, tmp_path, tmp_path)
        assert len(made) == before + 1
