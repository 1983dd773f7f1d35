"""Small real tables for tests: what the demo made, for a few years, in ``demo_tables/``.

    python -m dl4gam_assets_tests.demo_tables STORE   writes them again from a materialized demo (when a schema changes)
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES

FOLDER = Path(__file__).parent / "demo_tables"
YEARS = (2015, 2023, 2024)
#: Long texts and tables that no check looks at.
_DROP = ("hrefs", "checksums")
_SKIP = ("lineage", "failures")


def copy_to(folder: Path) -> Storage:
    """A store in ``folder`` that holds the tables, free to be tampered with."""
    shutil.copytree(FOLDER, folder / "tables")
    return Storage(folder)


def write(store: Path) -> None:
    """Copy the tables of ``store``: every partition but those of other years."""
    source, target = Storage(store), Storage(FOLDER.parent / "demo_tables_new")
    for name, table in TABLES.items():
        if name in _SKIP:
            continue
        for partition in source.partitions(name):
            if "year" in partition and int(partition["year"]) not in YEARS:
                continue
            numbers = {key: int(value) for key, value in partition.items()}
            frame = source.read_table(name, **numbers)
            if name == "zones":
                frame = frame[frame["buffer_m"].isin([0, 20])]
            if name == "outlines":
                frame = frame[frame["bound"] == "best"]
            if table.geometry:  # about 3 m: small files, areas all but unchanged
                frame = frame.set_geometry(frame.geometry.simplify(3e-5).set_precision(1e-6))
            frame = frame.drop(columns=[c for c in _DROP if c in frame and table.column(c).nullable])
            target.write_table(name, frame, numbers)
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.move(str(target.path("tables")), FOLDER)
    shutil.rmtree(str(target.root))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
