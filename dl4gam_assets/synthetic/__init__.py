"""Simulated regions with a known truth: a demo range made from a seed, and scenes draped over real terrain.

Belongs here: terrain, glaciers, their retreat, surface spectra, clouds, sensor, and writing them as the same files that
real data come in (STAC catalog of cloud-optimized GeoTIFFs, inventory, debris, DEM, dh/dt), with the truth kept apart.
Does not belong here: Dagster, and anything that reads the truth for another purpose than judging.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "write_demo_region": "region",
    "drape_region": "drape",
    "SimulationSummary": "files",
    "fractal_noise": "noise",
    "erode": "terrain",
    "fractal_terrain": "terrain",
    "grow_ice": "ice",
    "mass_balance": "ice",
    "divide_ice": "ice",
    "retreat": "retreat",
    "sun_position": "illumination",
    "cast_shadow": "illumination",
    "SPECTRA": "spectra",
    "Ground": "scenes",
    "render": "scenes",
    "cloud_field": "clouds",
    "plan_acquisitions": "acquisitions",
    "quicklook": "quicklook",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
