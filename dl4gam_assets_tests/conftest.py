"""Fixtures shared by all rooms: the real data, where they are present, and small real inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real sample data: $DL4GAM_REAL_DATA, or ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("DL4GAM_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "MANIFEST.md").is_file():
        pytest.skip(f"real sample data are absent ({folder}): set DL4GAM_REAL_DATA to their folder")
    return folder
