"""Each parser of outside input, given bytes that are nearly right: it reads them, or says what it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dl4gam_assets_tests.faults.fuzz import attempt, parsers
from dl4gam_assets_tests.small_region import Small

#: What parsers stumble over: numbers out of range, other types, paths, quotes, markup, halves of characters.
PIECES = [
    b"null", b"true", b"NaN", b"-1", b"0", b"1e999", b"99999999999999999999", b'""', b"[]", b"{}", b"[[", b'"', b"'",
    b",", b":", b"\n", b"\0", b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xf0\x9f\x8f\x94", b"../..",
    b"/etc/passwd",
    b"!!python/object:os.system", b"&a [*a, *a]", b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>",
    b"2016-02-31", b"9999999", b"%s%n",
]  # fmt: skip
NAMES = [
    "inventory.parquet", "inventory.geojson", "inventory.gpkg", "date", "overrides.csv", "region.yaml", "item.json",
    "catalog.json", "linked-item.json", "items.parquet", "state.json", "store.json", "scene.tif", "model.json",
    "inventory.fgb", "inventory.kml", "inventory.gml", "items.jsonl", "dem.tif", "dhdt.tif", "velocity.tif",
    "debris.gpkg", "debris.tif", "reference.gpkg", "cubes.tar", "swiss.csv", "swiss.gpkg",
    "model.safetensors", "splits.csv", "statistics.csv", "settings.yaml", "checkpoint.ckpt",
]  # fmt: skip

Edit = Callable[[bytes], bytes]
where = st.floats(0, 1, exclude_max=True)


def _replaced(at: float, length: int, by: bytes) -> Edit:
    def edit(content: bytes) -> bytes:
        begin = int(at * (len(content) + 1))
        return content[:begin] + by + content[begin + length :]

    return edit


def _shared(at: float, length: int, times: int) -> Edit:
    """A piece of the input several times."""

    def edit(content: bytes) -> bytes:
        begin = int(at * (len(content) + 1))
        return content[:begin] + content[begin : begin + length] * times + content[begin + length :]

    return edit


edits = st.lists(
    st.one_of(
        st.builds(_replaced, where, st.integers(0, 12), st.one_of(st.sampled_from(PIECES), st.binary(max_size=8))),
        st.builds(_replaced, where, st.just(1 << 30), st.just(b"")),  # truncated
        st.builds(_shared, where, st.integers(1, 60), st.integers(2, 4)),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_nonsense_is_read_or_refused(name: str, folder: Path, small: Small) -> None:
    member = next(Path(str(small.storage.root)).glob("models/**/model.json")).parent
    own = folder / name
    own.mkdir()
    parser = parsers(own, member)[name]
    for file in ("model.json", "model.safetensors"):
        (own / file).write_bytes((member / file).read_bytes())
    attempt(parser, parser.valid, own)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=edits)
    def search(changes: list[Edit]) -> None:
        content = parser.valid
        for change in changes:
            content = change(content)
        attempt(parser, content, own)

    search()


def test_every_parser_is_tried(folder: Path, small: Small) -> None:
    own = folder / "all"
    own.mkdir()
    member = next(Path(str(small.storage.root)).glob("models/**/model.json")).parent
    assert sorted(parsers(own, member)) == sorted(NAMES)


def test_what_is_not_promised_is_seen(folder: Path) -> None:
    def fails(path: Path) -> None:
        raise KeyError("surprise")

    own = folder / "surprise"
    own.mkdir()
    parser = parsers(own)["date"]
    with pytest.raises(KeyError):
        attempt(type(parser)(parser.valid, parser.name, fails, ()), b"x", own)
