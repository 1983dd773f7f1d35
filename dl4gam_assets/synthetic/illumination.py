"""The sun and what it lights.

Belongs here: sun position, shading, cast shadow. Does not belong here: reflectance.
"""

from __future__ import annotations

import datetime as dt
import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dl4gam_assets.synthetic.noise import F32
from dl4gam_assets.synthetic.terrain import coarsen


def sun_position(moment: dt.datetime, longitude: float, latitude: float) -> tuple[float, float]:
    """Azimuth (degrees clockwise from north) and elevation (degrees) of the sun, to about 0.3 degrees.

    Fourier series of declination and equation of time by Spencer (1971), as in Iqbal, An Introduction to Solar
    Radiation (1983), section 1.4.
    """
    moment = moment.astimezone(dt.UTC)
    day = moment.timetuple().tm_yday - 1 + (moment.hour + moment.minute / 60) / 24
    g = 2 * math.pi * day / 365.25
    declination = (
        0.006918 - 0.399912 * math.cos(g) + 0.070257 * math.sin(g) - 0.006758 * math.cos(2 * g)
        + 0.000907 * math.sin(2 * g) - 0.002697 * math.cos(3 * g) + 0.00148 * math.sin(3 * g)
    )  # fmt: skip
    minutes = 229.18 * (
        0.000075
        + 0.001868 * math.cos(g)
        - 0.032077 * math.sin(g)
        - 0.014615 * math.cos(2 * g)
        - 0.040849 * math.sin(2 * g)
    )
    solar_time = moment.hour + moment.minute / 60 + moment.second / 3600 + longitude / 15 + minutes / 60
    hour = math.radians(15 * (solar_time - 12))
    phi = math.radians(latitude)
    up = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour)
    east = -math.cos(declination) * math.sin(hour)
    north = math.cos(phi) * math.sin(declination) - math.sin(phi) * math.cos(declination) * math.cos(hour)
    return math.degrees(math.atan2(east, north)) % 360, math.degrees(math.asin(up))


def sun_vector(azimuth: float, elevation: float) -> tuple[float, float, float]:
    """East, north and up components of the direction to the sun."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return math.cos(e) * math.sin(a), math.cos(e) * math.cos(a), math.sin(e)


def normals(surface: F32, pixel_m: float) -> tuple[F32, F32, F32]:
    """East, north and up components of the unit normals of a north-up grid."""
    down, right = np.gradient(surface, np.float32(pixel_m))
    up = 1.0 / np.sqrt(1.0 + down * down + right * right)
    return -right * up, down * up, up


def incidence(normal: tuple[F32, F32, F32], azimuth: float, elevation: float) -> F32:
    """Cosine of the angle between the ground's normal and the sun, not negative."""
    e, n, u = sun_vector(azimuth, elevation)
    out: F32 = np.maximum(normal[0] * np.float32(e) + normal[1] * np.float32(n) + normal[2] * np.float32(u), 0)
    return out


def cast_shadow(surface: F32, pixel_m: float, azimuth: float, elevation: float, *, factor: int = 2) -> F32:
    """Share of the sun's disc that other ground does not hide, float32 (H, W) in 0 to 1.

    The horizon is followed towards the sun on a grid ``factor`` times coarser; its shadow plane is compared with the
    surface at full resolution, with a penumbra of about a pixel.
    """
    coarse = coarsen(surface, factor)
    step_m = pixel_m * factor
    e, n, _ = sun_vector(azimuth, 0.0)
    fall = np.float32(step_m * math.tan(math.radians(elevation)))
    reach = int(min((coarse.max() - coarse.min()) / fall + 2, math.hypot(*coarse.shape)))
    # Height of the highest shadow plane at each cell.
    top = np.full(coarse.shape, -1e4, np.float32)
    rows, cols = coarse.shape
    for k in range(1, reach + 1):
        r, c = -n * k, e * k
        r0, c0 = round(r), round(c)
        if abs(r0) >= rows or abs(c0) >= cols:
            break
        here = (slice(max(0, -r0), rows - max(0, r0)), slice(max(0, -c0), cols - max(0, c0)))
        there = (slice(max(0, r0), rows - max(0, -r0)), slice(max(0, c0), cols - max(0, -c0)))
        np.maximum(top[here], coarse[there] - fall * k, out=top[here])
    rows_f = (np.arange(surface.shape[0], dtype=np.float32) + 0.5) / factor - 0.5
    cols_f = (np.arange(surface.shape[1], dtype=np.float32) + 0.5) / factor - 0.5
    top = ndimage.gaussian_filter(np.maximum(top, coarse - 400), 0.7)
    fine = bilinear(top, rows_f, cols_f)
    soft = np.float32(pixel_m * math.tan(math.radians(elevation)) * 1.5)
    out: F32 = np.clip(0.5 - (fine - surface) / (2 * soft), 0, 1)
    return out


def bilinear(field: F32, rows: NDArray[np.floating], cols: NDArray[np.floating]) -> F32:
    """Values at the fractional positions ``rows`` x ``cols`` of a grid, its edge repeated outside."""
    r = np.clip(rows, 0, field.shape[0] - 1)
    c = np.clip(cols, 0, field.shape[1] - 1)
    r0, c0 = np.minimum(r.astype(int), field.shape[0] - 2), np.minimum(c.astype(int), field.shape[1] - 2)
    fr, fc = (r - r0)[:, None], (c - c0)[None, :]
    along = field[r0] * (1 - fr) + field[r0 + 1] * fr
    out: F32 = along[:, c0] * (1 - fc) + along[:, c0 + 1] * fc
    return out


def summer_insolation(surface: F32, pixel_m: float, latitude: float) -> F32:
    """Clear-sky insolation of a summer day relative to level ground, from three sun positions with cast shadow."""
    normal = normals(surface, pixel_m)
    total = np.zeros(surface.shape, np.float32)
    level = 0.0
    for hours in (-3.5, 0.0, 3.5):
        moment = dt.datetime(2015, 8, 15, 12, tzinfo=dt.UTC) + dt.timedelta(hours=hours)
        azimuth, elevation = sun_position(moment, 0.0, latitude)
        total += incidence(normal, azimuth, elevation) * cast_shadow(surface, pixel_m, azimuth, elevation)
        level += sun_vector(azimuth, elevation)[2]
    return total / np.float32(level)
