"""What a result was made with: settings by fingerprint, versions of packages, class of hardware.

Belongs here: describing this process, and writing such a description once to the tables ``settings`` and ``software``.
Does not belong here: what a result was made *from* (``records``, ``sources``).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import pandas as pd

from dl4gam_assets.compute import processor_maker
from dl4gam_assets.settings import Region, fingerprint
from dl4gam_assets.storage import Storage

#: Distributions whose version can change a figure.
PACKAGES = (
    "torch", "segmentation-models-pytorch", "timm", "numpy", "scipy", "pandas", "rasterio", "geopandas", "shapely",
    "pyproj", "odc-geo", "odc-stac", "xarray", "netCDF4", "xdem", "statsmodels", "scikit-learn", "pyogrio",
    "exactextract",
)  # fmt: skip

#: Instructions by which libraries choose their kernels, the widest first.
_SIMD = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


@functools.cache
def software() -> dict[str, str]:
    """Name to version of everything that can change a figure: Python, GDAL, PROJ, GEOS and the packages."""
    found = {"python": platform.python_version(), "dl4gam_assets": packages.version("dl4gam_assets")}
    for name in PACKAGES:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    if "rasterio" in found:
        from rasterio import __gdal_version__, __geos_version__, __proj_version__

        found |= {"gdal": __gdal_version__, "proj": __proj_version__, "geos": __geos_version__}
    return dict(sorted(found.items()))


@functools.cache
def hardware_class(device: str = "cpu") -> str:
    """Machines of one class give the same bits: architecture, maker and vector instructions, by which libraries choose
    their kernels and ``auto`` the precision, and the accelerator that was used.

    ``device``: the torch device that computed (``cpu``, ``cuda``, ``mps``).
    """
    processor = " ".join(filter(None, (platform.machine() or "unknown", processor_maker(), _simd())))
    return processor if device == "cpu" else f"{processor}, {_accelerator(device)}"


def _accelerator(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return f"cuda {torch.cuda.get_device_name(device)}"
    return device


def _simd() -> str:
    if forced := os.environ.get("ATEN_CPU_CAPABILITY"):
        return f"{forced} (by ATEN_CPU_CAPABILITY)"
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return sys.platform
    words: set[str] = set()
    with open(info, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.lower().startswith(("flags", "features")):
                words = set(line.split(":", 1)[1].split())
                break
    return next((name for name in _SIMD if name in words), "plain")


def settings_content(region: Region) -> dict[str, Any]:
    """The settings that :meth:`Region.fingerprint` hashes: all that can change a result."""
    names = {n for n in type(region).model_fields if n not in {"compute", "data_root", "publication"}}
    return region.model_dump(mode="json", include=names, exclude={"imagery": {"preset"}})


def record_settings(storage: Storage, region: Region) -> str:
    """Keep the settings under their fingerprint (written once); returns the fingerprint."""
    key = region.fingerprint()
    _write_once(storage, "settings", key, lambda: [{"settings": json.dumps(settings_content(region), sort_keys=True)}])
    return key


def record_software(storage: Storage) -> str:
    """Keep the versions of the packages under their fingerprint (written once); returns the fingerprint."""
    found = software()
    key = fingerprint(found)
    _write_once(storage, "software", key, lambda: [{"package": k, "version": v} for k, v in found.items()])
    return key


def _write_once(storage: Storage, table: str, key: str, rows: Callable[[], list[dict[str, Any]]]) -> None:
    if not storage.table(table, {"fingerprint": key}).exists():
        storage.write_table(table, pd.DataFrame(rows()), {"fingerprint": key})


def recorded_settings(storage: Storage, key: str) -> dict[str, Any] | None:
    """The settings behind a fingerprint; None where they were never recorded."""
    rows = storage.read_table("settings", fingerprint=key)
    return dict(json.loads(rows["settings"].iloc[0])) if len(rows) else None


def flat_settings(content: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key; lists are values."""
    if isinstance(content, dict) and content:
        out: dict[str, Any] = {}
        for key, value in content.items():
            out |= flat_settings(value, f"{prefix}.{key}" if prefix else str(key))
        return out
    return {prefix: content}


def settings_difference(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """Dotted key to (old, new value) of all settings that differ."""
    a, b = flat_settings(old or {}), flat_settings(new or {})
    absent = "(not set)"
    return {k: (a.get(k, absent), b.get(k, absent)) for k in sorted(a | b) if a.get(k, absent) != b.get(k, absent)}
