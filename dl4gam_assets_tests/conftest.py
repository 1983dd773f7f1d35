"""Fixtures shared by all rooms: the real data, where they are present, and small real inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from dl4gam_assets_tests.small_region import Small


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real sample data: $DL4GAM_REAL_DATA, or ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("DL4GAM_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "MANIFEST.md").is_file():
        pytest.skip(f"real sample data are absent ({folder}): set DL4GAM_REAL_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A small simulated region, materialized once for all tests and processes (a minute). Read it, or copy it."""
    from dl4gam_assets.compute import close_clusters
    from dl4gam_assets_tests.small_region import Small

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    home = shared / "small-region"
    with FileLock(str(shared / "small.lock")):
        home.mkdir(exist_ok=True)
        made = Small(home)
        failed = home / "failed"  # once is enough: each process would try for minutes
        if failed.exists():
            pytest.fail(f"the small region could not be made: {failed.read_text()}", pytrace=False)
        if not (home / "done").exists():
            try:
                assert made.run().failed == []
            except BaseException as error:
                failed.write_text(f"{type(error).__name__}: {error}"[:2000])
                raise
            (home / "done").touch()
    yield made
    close_clusters()
