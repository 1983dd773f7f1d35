"""Settings of the packaged regions, for tests that change them. Imports no Dagster: servers start with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import dl4gam_assets


def packaged(region: str) -> dict[str, Any]:
    """Settings of a region that comes with the package, as they stand in its file."""
    path = Path(dl4gam_assets.__file__).parent / "regions" / f"{region}.yaml"
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return raw
