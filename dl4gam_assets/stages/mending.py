"""Damaged files of glaciers: found when they are read, taken away, and made again.

Belongs here: cubes, static layers and maps that can not be read any more (a disk that lost a block, a copy that broke
off). Does not belong here: files that are whole but of other inputs (fingerprints), inputs (each reader).

A stage that finds its own earlier file damaged makes it again at once. A stage that reads another one's removes the
file and notes in the state of its partition that something failed there, so that the next run makes that one glacier
again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dl4gam_assets.stages.base import Site, UpstreamError

if TYPE_CHECKING:
    from upath import UPath

log = logging.getLogger("dl4gam_assets")


class DamagedResultError(UpstreamError):
    """A file of a glacier could not be read and was removed. The message names it."""


@contextlib.contextmanager
def absent_if_damaged(path: UPath) -> Iterator[None]:
    """Read the file that a stage made earlier; one that can not be read is as good as none."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: NetCDF's of a chunk
        log.warning(f"{path} is damaged and made again: {' '.join(str(error).split())[:300]}")


@contextlib.contextmanager
def removing_damaged(site: Site, asset: str, partition: str, path: UPath) -> Iterator[None]:
    """Read the file that ``asset`` made of a glacier; where that fails and the file is to blame, take it away.

    Raises
    ------
    DamagedResultError
        if the file was damaged: it is removed, and the partition of ``asset`` is noted as one that has failures, so
        that the next run makes the file again. Any other error passes as it is.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        why = _damage(site, path)
        if why is None:
            raise
        path.unlink(missing_ok=True)
        state = site.storage.read_state(asset, partition)
        if state is not None and not state.get("failed"):
            site.storage.write_state(asset, partition, {**state, "failed": 1})
        raise DamagedResultError(
            f"{path} was damaged ({why}) and has been removed: the next run of {asset} [{partition}] makes it again"
        ) from error


def _damage(site: Site, path: UPath) -> str | None:
    """Why a file can not be read whole; None where it can, or where it is gone."""
    try:
        with site.storage.reading(path) as local:
            _read_whole(local)
    except FileNotFoundError:
        return None
    except Exception as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def _read_whole(path: Path) -> None:
    if path.suffix == ".nc":
        import xarray as xr

        xr.load_dataset(path, engine="netcdf4").close()
    else:
        import rasterio

        with rasterio.open(path) as source:
            source.read()
