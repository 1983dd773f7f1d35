"""Packed layers are the cube's, and patches lie where they should."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.compute import Mapper, close_clusters
from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube, write_cube
from dl4gam_assets.segmentation import PackedCubes, normalize, pack_cubes, patch_centres, symmetry
from dl4gam_assets.segmentation.batches import batches, patch_source
from dl4gam_assets.segmentation.packing import MISSING, Packed, channel_step, in_use, remove_unused
from dl4gam_assets.segmentation.sampling import Normalizer, cut_batch, draw_patches, patch_corner, patch_cover
from dl4gam_assets.settings import PUBLISHED_CHANNELS
from dl4gam_assets.terrain import terrain_derivatives
from dl4gam_assets_tests.segmentation.conftest import CHANNELS, TRAINING, Small, glacier_cube

DERIVED = {"ndvi", "ndwi", "ndsi", "sin_aspect", "cos_aspect"}


def test_layers_of_the_cube_come_back_exactly_and_derived_ones_to_their_step(small: Small) -> None:
    for glacier_id, path in small.cubes.items():
        with open_cube(path) as cube:
            stack, valid = channel_stack(cube, CHANNELS)
            layers = small.packed.glacier(glacier_id)
            np.testing.assert_array_equal(layers.valid, valid)
            np.testing.assert_array_equal(layers.target, cube_mask(cube, "any_glacier"))
            np.testing.assert_array_equal(layers.zone, cube_mask(cube, "zone_50"))
            np.testing.assert_array_equal(layers.glacier, cube_mask(cube, "glacier"))
        back = small.packed.stack(glacier_id)
        np.testing.assert_array_equal(np.isnan(back), np.isnan(stack))
        for i, channel in enumerate(CHANNELS):
            tolerance = channel_step(channel) * 0.51 if channel in DERIVED else 2e-6 * np.nanmax(np.abs(stack[i]))
            np.testing.assert_allclose(back[i], stack[i], rtol=0, atol=tolerance, err_msg=channel)


def test_what_the_network_sees_in_training_is_what_it_sees_in_inference(small: Small) -> None:
    with open_cube(small.cubes["G0"]) as cube:
        stack, _ = channel_stack(cube, CHANNELS)
    expected = normalize(stack, CHANNELS, small.statistics)
    digits = torch.from_numpy(np.array(small.packed.glacier("G0").channels))
    seen = Normalizer.of(small.packed, small.statistics, "cpu")(digits).numpy()
    assert np.isfinite(seen).all()
    np.testing.assert_allclose(seen, expected, atol=2e-4)


def test_every_published_channel_has_a_step() -> None:
    assert all(0 < channel_step(c) <= 0.5 for c in PUBLISHED_CHANNELS)


def test_checksums_tell_layers_apart(small: Small, tmp_path: Path) -> None:
    again = pack_cubes(small.cubes, CHANNELS, tmp_path / "again")
    assert [again.checksum(g) for g in again.ids] == [small.packed.checksum(g) for g in small.packed.ids]
    swapped = pack_cubes({"G0": small.cubes["G1"]}, CHANNELS, tmp_path / "again")
    assert swapped.ids == ["G0"] and swapped.checksum("G0") == small.packed.checksum("G1") != again.checksum("G0")


def test_refusals(small: Small, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="nowhere is not among the 4 packed"):
        small.packed.glacier("nowhere")
    with pytest.raises(ValueError, match="no cubes"):
        pack_cubes({}, CHANNELS, tmp_path / "empty")
    copy = shutil.copytree(small.folder / "packed", tmp_path / "copy")
    index = json.loads((copy / "packed.json").read_text())
    (copy / "packed.json").write_text(json.dumps(index | {"format": 1}))
    with pytest.raises(ValueError, match="another version; delete it"):
        PackedCubes.open(copy)
    (copy / "packed.json").unlink()
    with pytest.raises(FileNotFoundError):
        PackedCubes.open(copy)


# --------------------------------------------------------------------------------------------- patches
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_centres_lie_in_the_zone_on_the_grid_or_at_the_named_points(seed: int, step: int, extremes: bool) -> None:
    rng = np.random.default_rng(seed)
    zone = np.zeros((60, 70), bool)
    r, c = rng.integers(0, 40, 2)
    zone[r : r + rng.integers(1, 20), c : c + rng.integers(1, 30)] = True
    glacier = zone.copy()
    glacier[: r + 1] = glacier[: r + 1] & (rng.random() < 0.5)
    found = patch_centres(zone, glacier, step, extremes)
    expected = {(i, j) for i, j in np.argwhere(zone) if i % step == 0 and j % step == 0}
    assert len({tuple(p) for p in found}) == len(found)
    assert expected <= {tuple(p) for p in found}
    extra = {tuple(p) for p in found} - expected
    assert all(glacier[p] for p in extra) and len(extra) <= 5
    if glacier.any():
        assert len(found)
        if extremes:
            rows, cols = np.nonzero(glacier)
            assert {rows.min(), rows.max()} <= set(found[:, 0]) and {cols.min(), cols.max()} <= set(found[:, 1])


def test_every_glacier_has_a_patch_and_seeds_differ(small: Small) -> None:
    ids = small.packed.ids
    first = draw_patches(small.packed, ids, TRAINING, seed=1)
    assert len(first) == TRAINING.train_patches == len(np.unique(first, axis=0))
    assert set(first[:, 0]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(first, draw_patches(small.packed, ids, TRAINING, seed=1))
    assert not np.array_equal(first, draw_patches(small.packed, ids, TRAINING, seed=2))
    few = draw_patches(small.packed, ids, TRAINING.model_copy(update={"train_patches": 2}), seed=1)
    assert sorted(few[:, 0]) == [0, 1, 2, 3]
    every = draw_patches(small.packed, ids, TRAINING.model_copy(update={"train_patches": 10**6}), seed=1)
    count = sum(len(patch_centres(small.packed.glacier(g).zone, small.packed.glacier(g).glacier, 8, True)) for g in ids)
    assert len(every) == count


def test_patches_are_moved_inside_and_padded_as_invalid(small: Small) -> None:
    glaciers = [small.packed.glacier(g) for g in small.packed.ids]
    chosen = np.array([[0, 0, 0], [0, 48, 56], [3, 30, 30]])
    x, bits = cut_batch(glaciers, chosen, np.zeros(3, dtype=int), 64, CHANNELS)
    y, w = ((bits & Packed.bit(name)) > 0 for name in ("any_glacier", "valid"))
    large, tiny = glaciers[0], glaciers[3]
    np.testing.assert_array_equal(x[0], large.channels[:, :64, :64])
    np.testing.assert_array_equal(y[1], large.target[16:80, 24:88])
    np.testing.assert_array_equal(w[2, :60, :58], tiny.valid)
    assert not w[2, 60:].any() and not w[2, :, 58:].any() and (x[2, :, 60:] == MISSING).all()


TERRAIN = ["sin_aspect", "cos_aspect", "slope", "planform_curvature", "profile_curvature", "terrain_ruggedness_index"]


def _surface() -> np.ndarray:
    """A rough slope with a lake in its middle."""
    rows, cols = np.mgrid[:48, :48].astype(np.float32)
    dem = (40 * np.sin(rows / 9) + 60 * np.cos(cols / 13) + rows * 3 - cols + 0.01 * rows * cols).astype(np.float32)
    dem[14:30, 10:32] = dem[14:30, 10:32].mean()
    return dem


@pytest.mark.parametrize("which", range(8))
def test_terrain_of_a_turned_surface_is_the_turned_terrain(which: int) -> None:
    """Slope, curvatures and ruggedness follow as scalars, the aspect as a vector, and that of flat ground not at all:
    as the derivatives of the turned DEM."""
    dem = _surface()

    def channels(surface: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = terrain_derivatives(surface, 10.0)
        aspect = np.deg2rad(d["aspect"])
        return np.stack([np.sin(aspect), np.cos(aspect), *(d[name] for name in TERRAIN[2:])]), d["slope"] == 0

    none = np.zeros(dem.shape, bool)
    turned_dem = np.rot90(dem[:, ::-1] if which >= 4 else dem, which % 4)
    expected, lake = channels(np.ascontiguousarray(turned_dem))
    stack, flat = channels(dem)
    assert 100 < flat.sum() < flat.size / 4
    got, _, _ = symmetry(stack, none, none, TERRAIN, which, flat)
    inner = (slice(None), slice(3, -3), slice(3, -3))
    # Ruggedness is tens of metres at the shore, and curvatures in 1/100 m reach a hundred.
    scale = np.maximum(np.abs(expected[inner]).max(axis=(1, 2)), 1)[:, None, None]
    np.testing.assert_allclose(got[inner] / scale, expected[inner] / scale, atol=2e-3)
    np.testing.assert_array_equal(got[:2, lake], np.array([[0.0], [1.0]]).repeat(lake.sum(), axis=1))


@pytest.mark.parametrize("where", ["mapped", "resident"])
def test_the_aspect_of_flat_ground_stays_in_batches(tmp_path: Path, where: str) -> None:
    """A cube with a lake, packed: both ways that make batches leave its aspect alone in all symmetries."""
    cube = glacier_cube(0, (48, 48))
    for name, layer in {"dem": _surface(), **terrain_derivatives(_surface(), 10.0)}.items():
        cube[name] = (("y", "x"), layer)
    write_cube(cube, tmp_path / "G0.nc")
    packed = pack_cubes({"G0": tmp_path / "G0.nc"}, CHANNELS, tmp_path / "packed")
    layers = packed.glacier("G0")
    assert layers.flat.sum() > 100
    chosen = np.tile([0, 24, 24], (8, 1))
    x = patch_source(packed, ["G0"], 48, "cpu", where).batch(chosen, np.arange(8))[0].numpy()
    east, north = CHANNELS.index("sin_aspect"), CHANNELS.index("cos_aspect")
    one = layers.channels[north][layers.flat][0]
    for which in range(8):
        flat, _, _ = symmetry(layers.flat, layers.flat, layers.flat, (), which)
        assert (x[which, east][flat] == 0).all() and (x[which, north][flat] == one).all()
        moved, _, _ = symmetry(layers.channels[[east, north]], flat, flat, (), which)
        assert which == 0 or (x[which][[east, north]] != moved)[:, ~flat].mean() > 0.3  # elsewhere it turns


def test_symmetries_keep_missing_integers_and_need_both_parts_of_the_aspect() -> None:
    patch = np.full((2, 4, 4), MISSING)
    mask = np.ones((4, 4), bool)
    for which in range(8):
        assert (symmetry(patch, mask, mask, ["sin_aspect", "cos_aspect"], which)[0] == MISSING).all()
    with pytest.raises(ValueError, match="both sin_aspect and cos_aspect"):
        symmetry(patch, mask, mask, ["sin_aspect", "dem"], 1)


@pytest.mark.parametrize("where", ["mapped", "resident"])
def test_a_lone_part_of_the_aspect_is_never_turned_silently(small: Small, tmp_path: Path, where: str) -> None:
    packed = pack_cubes({"G0": small.cubes["G0"]}, ["red", "cos_aspect"], tmp_path / "packed")
    source = patch_source(packed, ["G0"], 32, "cpu", where)
    chosen = np.array([[0, 40, 40]])
    assert source.batch(chosen, np.array([0])).x.shape == (1, 2, 32, 32)
    with pytest.raises(ValueError, match="both sin_aspect and cos_aspect"):
        source.batch(chosen, np.array([3]))


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 2**16),
)
def test_cover_counts_the_patches_over_each_pixel(shape: tuple[int, int], size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, shape, size=(int(rng.integers(0, 6)), 2))
    expected = np.zeros(shape, dtype=int)
    for row, col in centres:
        top, left = patch_corner(row, col, shape, size)
        assert top <= row < max(top + size, shape[0]) and left <= col < max(left + size, shape[1])
        expected[top : top + size, left : left + size] += 1
    assert np.array_equal(patch_cover(centres, shape, size), expected)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_patches_gathered_on_the_device_are_those_cut_on_the_host(small: Small, size: int) -> None:
    """All symmetries, corners, and grids smaller than a patch: bit by bit, aspect and missing values too."""
    rng = np.random.default_rng(size)
    ids = small.packed.ids
    shapes = [small.packed.glacier(g).bits.shape for g in ids]
    chosen = np.array([[k % 4, *(rng.integers(0, n) for n in shapes[k % 4])] for k in range(32)])
    turns = np.arange(32) // 4
    mapped, resident = (patch_source(small.packed, ids, size, "cpu", w) for w in ("mapped", "resident"))
    for a, b in zip(mapped.batch(chosen, turns), resident.batch(chosen, turns), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    x, target, valid = mapped.batch(chosen, turns)
    assert (x == int(MISSING)).any() and 0 < target.mean() < 1 and 0 < valid.mean() < 1


def test_batches_come_in_order_when_the_next_is_cut_ahead(small: Small) -> None:
    source = patch_source(small.packed, small.packed.ids, 32, "cpu", "mapped")
    patches = draw_patches(small.packed, small.packed.ids, TRAINING, seed=1)
    pieces = [(p, np.zeros(len(p), dtype=int)) for p in np.array_split(patches, 7)]
    at_once = list(batches(source, pieces, "cpu"))
    ahead = list(batches(source, pieces, "mps"))  # the source stays on the CPU: only the order of work changes
    assert len(at_once) == len(ahead) == 7
    assert all(torch.equal(a.x, b.x) for a, b in zip(at_once, ahead, strict=True))
    assert list(batches(source, [], "mps")) == []


def test_packing_in_processes_gives_the_same_files(small: Small, tmp_path: Path) -> None:
    lines: list[int] = []
    mapper = Mapper(2)
    try:
        packed = pack_cubes(
            small.cubes, CHANNELS, tmp_path / "p", mapper=mapper, progress=lambda done, total, s: lines.append(done)
        )
    finally:
        close_clusters()
    for name in ("channels.bin", "masks.bin", "packed.json"):
        assert (tmp_path / "p" / name).read_bytes() == (small.folder / "packed" / name).read_bytes()
    assert lines[-1] == 4 and packed.size_bytes(["G3"]) == 60 * 58 * (2 * len(CHANNELS) + 1)


def test_damaged_cubes_are_named_all_at_once_and_nothing_is_left(small: Small, tmp_path: Path) -> None:
    cubes = dict(small.cubes)
    for name in ("G1", "G2"):
        cubes[name] = tmp_path / f"{name}.nc"
        cubes[name].write_bytes(small.cubes[name].read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"(?s)2 of 4 glacier cubes can not be read.*G1.*G2"):
        pack_cubes(cubes, CHANNELS, tmp_path / "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["G1.nc", "G2.nc"]


_PACKER = """
import sys, time
from pathlib import Path
from dl4gam_assets.segmentation.packing import in_use
with in_use(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_only_packed_folders_that_nobody_uses_are_removed(small: Small, tmp_path: Path) -> None:
    """Those that a living process reads or writes stay; the lock of a killed one is gone with it."""
    cubes = {"G0": small.cubes["G0"]}
    for name in ("old", "held", "of-another"):
        pack_cubes(cubes, CHANNELS, tmp_path / name)
    young, left = tmp_path / ".tmp-1-young", tmp_path / ".tmp-2-left"
    for folder in (young, left):
        folder.mkdir()
        (folder / "channels.bin").write_bytes(b"half")
    for path in (left, left / "channels.bin"):
        os.utime(path, (0, 0))
    other = subprocess.Popen(
        [sys.executable, "-c", _PACKER, str(tmp_path / "of-another")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with in_use(tmp_path / "held"):
            assert remove_unused(tmp_path) == [".tmp-2-left", "old"]
            assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-1-young", "held", "of-another"]
            assert PackedCubes.open(tmp_path / "held").ids == ["G0"]
    finally:
        other.kill()
        other.wait()
    assert remove_unused(tmp_path) == ["held", "of-another"]
    assert remove_unused(tmp_path / "nowhere") == []


def test_two_that_pack_the_same_at_once_do_no_harm(small: Small, tmp_path: Path) -> None:
    """The second begins, and ends, while the first is at work: both end with whole files."""
    inner: list[PackedCubes] = []

    @contextlib.contextmanager
    def reading(path: Path) -> Iterator[Path]:
        if not inner:
            inner.append(pack_cubes(small.cubes, CHANNELS, tmp_path / "p"))
        yield path

    outer = pack_cubes(small.cubes, CHANNELS, tmp_path / "p", reading=reading)
    assert [outer.checksum(g) for g in outer.ids] == [small.packed.checksum(g) for g in small.packed.ids]
    np.testing.assert_array_equal(outer.stack("G3"), small.packed.stack("G3"))
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
