"""Scenes of a ground that is known: surfaces by date, light, clouds, sensor.

Belongs here: from surfaces to digital numbers. Does not belong here: files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dl4gam_assets.synthetic.acquisitions import Acquisition
from dl4gam_assets.synthetic.clouds import cloud_field
from dl4gam_assets.synthetic.illumination import (
    bilinear,
    cast_shadow,
    incidence,
    normals,
    summer_insolation,
    sun_position,
)
from dl4gam_assets.synthetic.noise import F32, fractal_noise
from dl4gam_assets.synthetic.spectra import BANDS, RESIDUAL, SKY_LIGHT, SNOW_LIGHT, spectrum
from dl4gam_assets.synthetic.terrain import coarsen

Bool = NDArray[np.bool_]


@dataclass
class Ground:
    """All that does not change from date to date, on the 10 m grid (rows to the south). float32 (H, W)."""

    surface: F32
    ela_m: float
    longitude: float
    latitude: float
    pixel_m: float
    debris: F32  # score, positive where covered
    water: Bool
    insolation: F32 = field(init=False)
    hollow: F32 = field(init=False)
    slope: F32 = field(init=False)
    normal: tuple[F32, F32, F32] = field(init=False)
    textures: dict[str, F32] = field(init=False)

    def __post_init__(self) -> None:
        self.textures = {}

    def prepare(self, ice: Bool, rng: np.random.Generator, streaks: F32) -> Ground:
        """Compute what is derived; ``ice`` is the baseline's, ``streaks`` a texture along the flow."""
        px, shape = self.pixel_m, self.surface.shape
        t = self.textures
        t["patch"] = fractal_noise(shape, rng, beta=2.6, longest_px=60)
        t["fine"] = fractal_noise(shape, rng, beta=1.4, longest_px=14)
        t["broad"] = fractal_noise(shape, rng, beta=3.2, longest_px=260)
        t["grain"] = fractal_noise(shape, rng, beta=1.0, longest_px=6)
        t["streaks"] = streaks
        rough = np.where(ice, 0.3 + 1.2 * (self.debris > 0), 1.3).astype(np.float32)
        undulation = 1.1 * fractal_noise(shape, rng, beta=3.2, longest_px=22) + 0.5 * fractal_noise(
            shape, rng, beta=2.4, longest_px=8
        )
        self.normal = normals(
            self.surface + 0.8 * rough * t["grain"] + np.where(ice, undulation, 0).astype(np.float32), px
        )
        down, right = np.gradient(ndimage.gaussian_filter(self.surface, 1.0), px)
        self.slope = np.hypot(down, right).astype(np.float32)
        self.insolation = ndimage.gaussian_filter(summer_insolation(self.surface, px, self.latitude), 40 / px)
        self.hollow = ndimage.gaussian_filter(self.surface, 130 / px) - self.surface
        return self


@dataclass(frozen=True)
class Scene:
    """A rendered overpass over the whole grid."""

    reflectance: F32  # (5, H, W), bands of spectra.BANDS
    cloud: F32  # opacity
    cloud_shadow: F32
    sunlit: F32  # 0 in shadow of terrain
    snow: F32  # share of ground covered by snow
    ice: F32  # share of ground that is bare glacier ice
    debris: F32
    vegetation: F32
    water: F32
    azimuth: float
    elevation: float


def _step(x: NDArray[np.floating]) -> F32:
    out: F32 = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))
    return out


@dataclass(frozen=True)
class Bare:
    """The ground of a year without snow: reflectance in even light, and what it is made of."""

    reflectance: F32  # (5, H, W)
    ice: F32  # share of bare glacier ice
    debris: F32  # share of debris-covered ice
    vegetation: F32
    water: F32


def bare_surfaces(ground: Ground, ice: Bool) -> dict[str, F32]:
    """Share of each snow-free surface of ``spectra.SPECTRA`` in each pixel, summing to 1."""
    t, z = ground.textures, ground.surface - np.float32(ground.ela_m)
    on = ice.astype(np.float32)
    sun = ground.insolation - np.float32(0.92)
    covered = _step(ground.debris / np.float32(0.035))
    wet = _step((-z - 170 + 110 * t["broad"] + 60 * t["streaks"]) / 90)
    grass = _step((-520 - z + 120 * t["broad"] + 90 * t["patch"] + 200 * sun) / 70)
    grass *= np.clip((0.95 - ground.slope) / 0.3, 0, 1) * np.clip(0.75 + 0.2 * t["fine"], 0.2, 1)
    wood = _step((-1000 - z + 110 * t["broad"] + 60 * t["fine"]) / 35) * np.clip((1.0 - ground.slope) / 0.2, 0, 1)
    lithology = _step((t["broad"] + 0.5 * t["patch"] + 0.2) * 3)
    water = (ground.water & ~ice).astype(np.float32)
    dry = (1 - on) * (1 - water)
    stone = dry * (1 - wood) * (1 - grass)
    return {
        "ice": on * (1 - covered) * (1 - wet),
        "wet_ice": on * (1 - covered) * wet,
        "debris": on * covered,
        "forest": dry * wood,
        "meadow": dry * (1 - wood) * grass,
        "dark_rock": stone * lithology,
        "bright_rock": stone * (1 - lithology),
        "water": water,
    }


def bare_ground(ground: Ground, ice: Bool) -> Bare:
    """Mix the snow-free surfaces of a year, with their texture."""
    t = ground.textures
    share = bare_surfaces(ground, ice)
    rock = 0.14 * t["patch"] + 0.11 * t["fine"] + 0.10 * t["grain"] + 0.10 * t["broad"]
    texture = {
        "ice": 0.10 * t["patch"] + 0.15 * t["streaks"] + 0.05 * t["fine"],
        "wet_ice": 0.13 * t["patch"] + 0.22 * t["streaks"] + 0.07 * t["fine"],
        "debris": 0.12 * t["patch"] + 0.10 * t["streaks"] + 0.14 * t["grain"],
        "dark_rock": rock,
        "bright_rock": rock,
        "meadow": 0.16 * t["patch"] + 0.10 * t["fine"],
        "forest": 0.10 * t["patch"] + 0.22 * t["grain"],
        "water": 0.06 * t["broad"],
    }
    # Rock and dust differ in colour a little from place to place.
    tint = 0.045 * t["broad"] + 0.02 * t["patch"]
    out = np.zeros((len(BANDS), *ice.shape), np.float32)
    for name, part in share.items():
        weighted = part * np.exp(texture[name])
        for b, value in enumerate(spectrum(name)):
            out[b] += weighted * value
    for b in range(len(BANDS)):
        out[b] *= 1 + tint * np.float32((b - 1.5) / 1.5)
    return Bare(
        out, share["ice"] + share["wet_ice"], share["debris"], share["meadow"] + share["forest"], share["water"]
    )


def snow_cover(ground: Ground, ice: Bool, when: Acquisition) -> tuple[F32, F32]:
    """Share of the ground under old snow, and under fresh snow that lies on top of everything, at a date."""
    t, z = ground.textures, ground.surface - np.float32(ground.ela_m)
    sun = ground.insolation - np.float32(0.92)
    hollow = np.clip(ground.hollow, -40, 40)
    on_ice = z - when.snowline + 55 * t["patch"] + 30 * t["broad"] + 1.6 * hollow - 150 * sun + 9 * t["fine"]
    beside = z - when.patches + 170 * t["patch"] + 8 * hollow - 520 * sun - 190 + 30 * t["fine"]
    old = np.where(ice, _step(on_ice / 24), _step(beside / 28) * np.clip((1.1 - ground.slope) / 0.35, 0, 1))
    if when.fresh is None:
        return old, np.zeros_like(old)
    fresh = _step((z - when.fresh + 60 * t["broad"] + 45 * t["patch"] - 230 * sun + 40 * t["fine"]) / 45)
    fresh *= 1 - 0.9 * np.clip((ground.slope - 0.8) / 0.4, 0, 1)
    return old * (1 - fresh), fresh


def render(ground: Ground, ice: Bool, when: Acquisition, rng: np.random.Generator, bare: Bare | None = None) -> Scene:
    """Surface reflectance as a Sentinel-2 product would state it, with clouds and noise.

    Light is the sun's (by the slope, cast shadow and cloud shadow), the sky's and what bright ground around sends back;
    the product's terrain correction is taken to be partial. The point spread has a standard deviation of 0.6 pixels.

    Parameters
    ----------
    ground : prepared ground
    ice : (H, W) glaciers of the year
    when : the overpass
    rng : noise and clouds of this overpass
    bare : ``bare_ground(ground, ice)`` where it is known already
    """
    bare = bare or bare_ground(ground, ice)
    azimuth, elevation = sun_position(when.moment, ground.longitude, ground.latitude)
    t, shape = ground.textures, ground.surface.shape
    old, fresh = snow_cover(ground, ice, when)
    dry = 1 - bare.water
    old, fresh = old * dry, fresh * dry
    snow = old + fresh
    free = 1 - snow
    clean = bare.ice * free
    sunlit = cast_shadow(ground.surface, ground.pixel_m, azimuth, elevation)
    cloud, shade = cloud_field(
        shape, rng, west=when.cloud_west, east=when.cloud_east, azimuth=azimuth, elevation=elevation,
        pixel_m=ground.pixel_m,
        base_m=float(rng.uniform(700, 1500)),
    )  # fmt: skip
    cloudy = bool(cloud.any())
    direct = np.clip(
        incidence(ground.normal, azimuth, elevation) / np.float32(math.sin(math.radians(elevation))), 0, 2.0
    )
    direct = direct ** np.float32(0.85) * sunlit
    if cloudy:
        direct *= 1 - np.float32(0.93) * shade
    bright = _blurred(snow + 0.5 * clean, 24)

    old = old * np.exp(0.09 * t["patch"] + 0.04 * t["fine"] + 0.05 * t["streaks"])
    fresh = fresh * (1 + 0.03 * t["patch"] + 0.02 * t["fine"])
    out = np.empty((len(BANDS), *shape), np.float32)
    haze = 0.82 + 0.22 * ndimage.gaussian_filter(cloud, 6.0, truncate=2.0) + 0.05 * t["broad"] if cloudy else None
    lit = np.minimum(direct, 1)
    for b in range(len(BANDS)):
        sky, scattered = np.float32(SKY_LIGHT[b]), np.float32(SNOW_LIGHT[b]) * bright
        light = sky + scattered + (1 - sky - scattered) * direct
        rho = bare.reflectance[b] * free
        rho += old * spectrum("old_snow")[b]
        rho += fresh * spectrum("fresh_snow")[b]
        rho *= light
        rho += np.float32(RESIDUAL[b] + when.haze * (1.2 - 0.25 * b)) - np.float32(RESIDUAL[b]) * lit
        rho = ndimage.gaussian_filter(rho, 0.6 if b < 4 else 1.1, truncate=3.0)
        if haze is not None:
            rho += cloud * (spectrum("cloud")[b] * haze - rho)
        noise = rng.standard_normal(shape, dtype=np.float32)
        noise *= np.float32(0.0018) + np.float32(0.007) * rho
        np.add(rho, noise, out=out[b])
    return Scene(
        out,
        cloud,
        shade,
        sunlit,
        snow,
        clean,
        bare.debris * free,
        bare.vegetation * free,
        bare.water,
        azimuth,
        elevation,
    )


def _blurred(field: NDArray[np.floating], sigma_px: int) -> F32:
    """Wide Gaussian, computed on blocks of 8 pixels."""
    coarse = ndimage.gaussian_filter(coarsen(field, 8), sigma_px / 8)
    rows = (np.arange(field.shape[0], dtype=np.float32) + 0.5) / 8 - 0.5
    cols = (np.arange(field.shape[1], dtype=np.float32) + 0.5) / 8 - 0.5
    return bilinear(coarse, rows, cols)


def block_mean(band: F32) -> F32:
    """20 m from 10 m: mean of 2 x 2 pixels."""
    rows, cols = band.shape[0] // 2, band.shape[1] // 2
    out: F32 = band[: rows * 2, : cols * 2].reshape(rows, 2, cols, 2).mean(axis=(1, 3))
    return out


def cloud_probability(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Cloud probability in percent at 20 m as a detector would give it: blurred, with errors at edges and on snow."""
    cloud = ndimage.gaussian_filter(block_mean(scene.cloud), 1.5)
    noise = fractal_noise(cloud.shape, rng, beta=2.4, longest_px=40)
    snow = block_mean(scene.snow)
    value = 100 * _step((cloud - 0.22 + 0.05 * noise) / 0.06) + 4 + 3 * noise + 10 * snow * np.clip(noise - 1.0, 0, 2)
    return np.clip(np.rint(value), 0, 100).astype(np.uint8)


def classify(scene: Scene, probability: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Scene classification at 20 m with the codes of Sentinel-2 Level-2A, from the pixels, so with their errors.

    2 dark ground (shadow of terrain), 3 cloud shadow, 4 vegetation, 5 bare, 6 water, 8 and 9 cloud, 10 thin cirrus,
    11 snow or ice.
    """
    blue, green, red, nir, swir = (block_mean(b) for b in scene.reflectance)
    noise = fractal_noise(blue.shape, rng, beta=2.0, longest_px=30)
    ndsi = (green - swir) / np.maximum(green + swir, 1e-3)
    ndvi = (nir - red) / np.maximum(nir + red, 1e-3)
    code = np.full(blue.shape, 5, np.uint8)
    code[ndvi > 0.40 + 0.03 * noise] = 4
    code[(ndsi > 0.42 + 0.03 * noise) & (green > 0.10)] = 11
    dark = (nir < 0.085 + 0.01 * noise) & (ndvi < 0.4)
    code[dark] = 2
    code[(block_mean(scene.water) > 0.5) & (ndsi > 0.2)] = 6
    shade = ndimage.gaussian_filter(block_mean(scene.cloud_shadow), 2.0) > 0.35 + 0.12 * noise
    code[shade & (code != 6)] = 3
    cloud = block_mean(scene.cloud)
    code[(cloud > 0.08 + 0.03 * noise) & (probability < 40)] = 10
    code[probability >= 40] = 8
    code[probability >= 75] = 9
    return code
