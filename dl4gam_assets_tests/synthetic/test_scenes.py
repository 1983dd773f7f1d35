"""Light, ice, clouds and spectra of simulated scenes."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.synthetic import cast_shadow, cloud_field, divide_ice, fractal_noise, plan_acquisitions, sun_position
from dl4gam_assets.synthetic.acquisitions import Acquisition
from dl4gam_assets.synthetic.files import World
from dl4gam_assets.synthetic.region import build_range
from dl4gam_assets.synthetic.retreat import area_loss_rates, elapsed_share, elevation_change, retreat
from dl4gam_assets.synthetic.scenes import Scene, bare_ground, bare_surfaces, classify, cloud_probability, render
from dl4gam_assets.synthetic.spectra import BANDS, LABELLED_MEDIANS
from dl4gam_assets.synthetic.terrain import accumulate, drainage, fill_depressions


@pytest.fixture(scope="module")
def world() -> World:
    return build_range((560, 600), 3)


@pytest.fixture(scope="module")
def clear(world: World) -> Acquisition:
    day = dt.datetime(2015, 9, 5, 10, 15, tzinfo=dt.UTC)
    return Acquisition(day, "clean", 0.0, 0.0, snowline=40.0, patches=230.0)


@pytest.fixture(scope="module")
def scene(world: World, clear: Acquisition) -> Scene:
    return render(world.ground, world.label > 0, clear, np.random.default_rng(0))


def test_the_sun_stands_where_almanacs_say() -> None:
    # Zurich, solar noon of the June solstice: 90 - 47.37 + 23.44 degrees, due south.
    azimuth, elevation = sun_position(dt.datetime(2023, 6, 21, 11, 28, tzinfo=dt.UTC), 8.54, 47.37)
    assert elevation == pytest.approx(66.07, abs=0.3) and azimuth == pytest.approx(180, abs=2)
    # Equinox at the equator and Greenwich: near the zenith at noon, in the east in the morning.
    assert sun_position(dt.datetime(2023, 3, 20, 12, 8, tzinfo=dt.UTC), 0.0, 0.0)[1] > 89
    azimuth, elevation = sun_position(dt.datetime(2023, 3, 20, 8, 0, tzinfo=dt.UTC), 0.0, 0.0)
    assert azimuth == pytest.approx(90, abs=1) and 25 < elevation < 35


@settings(max_examples=12, deadline=None)
@given(azimuth=st.sampled_from([90.0, 135.0, 180.0, 225.0, 270.0]), elevation=st.floats(20, 60))
def test_a_tower_casts_a_shadow_of_its_length_away_from_the_sun(azimuth: float, elevation: float) -> None:
    surface = np.zeros((160, 160), np.float32)
    surface[78:82, 78:82] = 200.0
    lit = cast_shadow(surface, 10.0, azimuth, elevation)
    rows, cols = np.nonzero(lit < 0.5)
    east, north = np.sin(np.radians(azimuth)), np.cos(np.radians(azimuth))
    along = (cols - 79.5) * -east + (79.5 - rows) * -north  # away from the sun, pixels
    length = 20.0 / np.tan(np.radians(elevation))
    assert along.max() == pytest.approx(length, abs=5) and along.min() > -5
    assert lit[0, 0] > 0.5 and lit.min() >= 0 and lit.max() <= 1


def test_water_accumulates_downhill_and_hollows_fill() -> None:
    slope = np.add.outer(np.arange(40.0), np.zeros(30)).astype(np.float32)
    slope[20, 15] -= 8
    filled = fill_depressions(slope)
    assert (filled >= slope).all() and filled[20, 15] >= filled[19].min()
    total = accumulate(drainage(filled), np.ones(filled.size)).reshape(filled.shape)
    ends = drainage(filled).receiver == np.arange(filled.size)
    assert total.ravel()[ends].sum() == filled.size, "every cell drains to one end"


def test_a_ridge_divides_ice() -> None:
    row = np.abs(np.arange(120) - 60.0)
    surface = (1000 - 10 * row)[:, None] + 0.5 * np.abs(np.arange(60) - 30.0)[None, :]
    ice = np.zeros(surface.shape, bool)
    ice[30:90, 20:40] = True
    label = divide_ice(surface.astype(np.float32), ice, cell_m=40.0)
    assert set(np.unique(label)) == {0, 1, 2}
    assert len(np.unique(label[32:56, 22:38])) == 1 and label[40, 30] != label[80, 30]
    assert ((label > 0) == ice).all()


def test_ice_of_the_range_is_high_divided_and_moving_back(world: World) -> None:
    ice = world.label > 0
    z = world.ground.surface
    assert np.median(z[ice]) > np.median(z[~ice])
    touching = (world.label[:, 1:] != world.label[:, :-1]) & (world.label[:, 1:] > 0) & (world.label[:, :-1] > 0)
    assert touching.sum() > 10, "neighbours share divides"
    later = retreat(world.label, world.order, np.full(world.label.max(), 0.3))
    kept = np.bincount(later.ravel(), minlength=world.label.max() + 1)[1:] / np.bincount(world.label.ravel())[1:]
    assert kept == pytest.approx(0.7, abs=0.01)
    gone = ice & (later == 0)
    big = world.label == np.bincount(world.label.ravel())[1:].argmax() + 1
    assert np.median(z[gone & big]) < np.median(z[big]), "ice goes from the low end"


@settings(max_examples=25, deadline=None)
@given(areas=st.lists(st.floats(0.02, 8.0), min_size=8, max_size=60), seed=st.integers(0, 1000))
def test_rates_sum_to_the_regional_rate(areas: list[float], seed: int) -> None:
    area = np.array(areas)
    rates = area_loss_rates(area, np.random.default_rng(seed), regional_pct=1.9)
    assert (rates * area).sum() / area.sum() == pytest.approx(1.9, rel=1e-3)
    assert (rates > 0).all() and rates.max() <= 6.0


def test_thinning_agrees_with_the_loss_of_area(world: World) -> None:
    label, area = world.label, np.bincount(world.label.ravel())[1:] * 1e-4
    change = elevation_change(label, world.ground.surface, np.zeros(label.shape, np.float32), world.rates_pct, area)
    for k in np.argsort(-area)[:5]:
        inside = label == k + 1
        volume_rate = change[inside].mean() / (34.0 * area[k] ** 0.375) * 100
        assert volume_rate == pytest.approx(-1.375 * world.rates_pct[k], rel=0.02)
        z = world.ground.surface[inside]
        low, high = np.percentile(z, [20, 80])
        assert change[inside][z < low].mean() < change[inside][z > high].mean() < 0
    elapsed = elapsed_share(range(2015, 2025), 2015)
    assert elapsed[2015] == 0 and elapsed[2024] == pytest.approx(9) and elapsed[2022] - elapsed[2021] > 1.3


@settings(max_examples=6, deadline=None)
@given(share=st.floats(0.15, 0.85), seed=st.integers(0, 99))
def test_clouds_keep_to_their_half_and_their_shadow_lies_away_from_the_sun(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cloud, shade = cloud_field((300, 600), rng, west=share, east=0.0, azimuth=160.0, elevation=45.0)
    assert cloud[:, 520:].max() == 0 and cloud.min() >= 0 and cloud.max() <= 1
    if cloud.max() > 0.5 and shade.max() > 0.5:
        # Base 1100 m at 45 degrees: 103 pixels to the north and 38 to the west.
        crop = cloud[103:300, 0:400][:, 38:]
        moved = shade[0:197, 0:400][:, : crop.shape[1]]
        moved = shade[0:197, 0 : crop.shape[1]]
        assert np.corrcoef(crop.ravel(), moved.ravel())[0, 1] > 0.9


def test_clear_dates_are_there_for_both_halves_of_every_year() -> None:
    plan = plan_acquisitions(range(2015, 2025), np.random.default_rng(3))
    for year in range(2015, 2025):
        clean = [
            a
            for a in plan
            if a.date.year == year and a.kind == "clean" and (8, 1) <= (a.date.month, a.date.day) <= (10, 15)
        ]
        assert min(a.cloud_west for a in clean) == 0 and min(a.cloud_east for a in clean) == 0
        assert all(a.fresh is None and a.tiles == ("west", "east") for a in clean)
        for side in ("west", "east"):
            assert any(getattr(a, f"cloud_{side}") == 0 and a.cut is None for a in clean)
    assert {a.kind for a in plan} == {"summer", "clean", "cloudy", "autumn"}
    assert any(a.cut for a in plan) and any(a.older_processing for a in plan) and any(len(a.tiles) == 1 for a in plan)


def _pixels(world: World, scene: Scene) -> dict[str, np.ndarray]:
    """Pure pixels of each class of the labelled data."""
    lit, shadow = scene.sunlit > 0.95, scene.sunlit < 0.05
    rock = sum(bare_surfaces(world.ground, world.label > 0)[n] for n in ("dark_rock", "bright_rock"))
    rock = (rock > 0.97) & (scene.snow < 0.01)
    return {
        "snow": (scene.snow > 0.98) & lit,
        "shadowed_snow": (scene.snow > 0.98) & shadow,
        "ice": (scene.ice > 0.97) & lit,
        "rock": rock & lit,
        "water": (scene.water > 0.98) & lit,
    }


#: Agreement of medians: relative, or absolute where reflectance is near zero. Shadow depends on the sun and the
#: surroundings, so its tolerance is wider.
TOLERANCE = {"snow": 0.20, "ice": 0.20, "rock": 0.25, "water": 0.20, "shadowed_snow": 0.45}


def _late(world: World) -> Scene:
    """Low sun and fresh snow, for shadowed snow."""
    day = dt.datetime(2015, 10, 20, 10, 15, tzinfo=dt.UTC)
    when = Acquisition(day, "autumn", 0.0, 0.0, snowline=40.0, patches=230.0, fresh=-900.0)
    return render(world.ground, world.label > 0, when, np.random.default_rng(1))


def test_class_medians_agree_with_the_labelled_spectra(world: World, scene: Scene, real_data: Path) -> None:
    labelled = pd.read_csv(real_data / "s2_labelled_spectra" / "Sentinel-2_SR_training_data.csv.gz")
    code = {"snow": 1, "shadowed_snow": 2, "ice": 3, "rock": 4, "water": 5}
    late = _late(world)
    for name, number in code.items():
        real = labelled.loc[labelled["class"] == number, ["B2", "B3", "B4", "B8", "B11"]].median().to_numpy()
        assert real == pytest.approx(LABELLED_MEDIANS[name], abs=0.001), "the module quotes the file"
        source = late if name == "shadowed_snow" else scene
        where = _pixels(world, source)[name]
        assert where.sum() > 50, name
        made = np.median(source.reflectance[:, where], axis=1)
        allowed = np.maximum(TOLERANCE[name] * real, 0.015)
        assert (np.abs(made - real) <= allowed).all(), (
            f"{name}: {dict(zip(BANDS, made.round(3), strict=True))} not {real}"
        )


def test_indices_behave(world: World, scene: Scene) -> None:
    _blue, green, red, nir, swir = scene.reflectance
    where = _pixels(world, scene)
    ndsi = (green - swir) / (green + swir)
    assert np.median(ndsi[where["snow"]]) > 0.85 and np.median(ndsi[where["ice"]]) > 0.8
    assert np.median(ndsi[where["rock"]]) < 0
    green_ground = scene.vegetation > 0.9
    assert np.median(((nir - red) / (nir + red))[green_ground]) > 0.4
    # Debris on ice looks like rock: no band separates the two by as much as their spread.
    bare = bare_ground(world.ground, world.label > 0)
    debris, rock = bare.reflectance[:, bare.debris > 0.9], bare.reflectance[:, where["rock"]]
    assert debris.shape[1] > 50
    assert (np.abs(np.median(debris, axis=1) - np.median(rock, axis=1)) < 1.5 * rock.std(axis=1)).all()


def test_classification_is_mostly_right_and_never_perfect(world: World, clear: Acquisition) -> None:
    cloudy = dataclasses.replace(clear, cloud_west=0.5, cloud_east=0.5)
    made = render(
        world.ground, world.label > 0, cloudy, np.random.default_rng(5), bare_ground(world.ground, world.label > 0)
    )
    probability = cloud_probability(made, np.random.default_rng(6))
    code = classify(made, probability, np.random.default_rng(7))
    thick = made.cloud[::2, ::2][: code.shape[0], : code.shape[1]] > 0.8
    clearly = made.cloud[::2, ::2][: code.shape[0], : code.shape[1]] == 0
    assert np.isin(code[thick], (8, 9)).mean() > 0.95
    assert 0 < np.isin(code[clearly], (8, 9)).mean() < 0.1
    assert set(np.unique(code)) >= {3, 5, 9, 11} and 0 not in code


def test_noise_has_the_spectrum_asked_for() -> None:
    rng = np.random.default_rng(0)
    rough, smooth = (fractal_noise((256, 256), rng, beta=b) for b in (1.0, 4.0))
    assert rough.std() == pytest.approx(1, abs=1e-3) and abs(smooth.mean()) < 1e-3
    assert np.abs(np.diff(rough)).mean() > 4 * np.abs(np.diff(smooth)).mean()
