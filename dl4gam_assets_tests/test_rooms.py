"""The house itself: the science imports without Dagster, and definitions load without the science's heavy packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dl4gam_assets

PACKAGE = Path(dl4gam_assets.__file__).parent
SCIENCE = (
    "inventory", "imagery", "terrain", "cubes", "segmentation", "ensemble", "change", "published", "publication",
    "synthetic", "stages",
)  # fmt: skip
DAGSTER_ROOMS = ("assets", "definitions.py", "automation.py", "checks.py", "partitions.py", "resources.py")


def _modules(room: str) -> list[str]:
    files = sorted((PACKAGE / room).rglob("*.py"))
    names = [str(f.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".") for f in files]
    return [n.removesuffix(".__init__") for n in names]


@pytest.mark.parametrize("room", SCIENCE)
def test_science_rooms_import_with_dagster_blocked(room: str) -> None:
    modules = _modules(room)
    assert len(modules) > 1, f"room {room} is empty"
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0].startswith('dagster'):\n"
        "            raise ImportError('dagster is blocked: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert not any(m.split('.')[0] == 'dagster' for m in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_definitions_load_without_heavy_packages() -> None:
    heavy = (
        "torch",
        "segmentation_models_pytorch",
        "matplotlib",
        "statsmodels",
        "xdem",
        "rasterio",
        "geopandas",
    )
    code = (
        "import sys\n"
        "from dl4gam_assets.definitions import defs\n"
        "import dagster as dg; dg.Definitions.validate_loadable(defs)\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_belongs_in_it() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8").lstrip()
        assert text.startswith('"""') or text.startswith('r"""'), f"{file} has no docstring"


def test_dagster_rooms_keep_annotations_alive() -> None:
    """`from __future__ import annotations` would break Dagster's reading of context and config arguments."""
    for room in DAGSTER_ROOMS:
        path = PACKAGE / room
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            assert "from __future__ import annotations" not in file.read_text(encoding="utf-8").split('"""', 2)[-1], (
                file
            )
