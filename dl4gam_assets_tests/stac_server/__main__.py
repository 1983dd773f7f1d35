"""Serve a region's scenes through a STAC API on loopback, so that the platform runs entirely through it.

    python -m dl4gam_assets_tests.stac_server --store dl4gam_home/demo-loopback --write-region demo-loopback.yaml
    dl4gam materialize --region demo-loopback.yaml --home dl4gam_home        # in another terminal

The first command writes a region file whose catalog is the API, and serves the store that this region will have. Inputs
need not be there yet: the demo simulates them in its first step, and the server finds them when they are there. Nothing
but HTTP leads to the scenes then; what comes out can be compared with a run from the catalog on disk:

    python -m dl4gam_assets_tests.stac_server --store dl4gam_home/demo-loopback --compare dl4gam_home/demo

Belongs here: words of the command line. Does not belong here: the server.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from dl4gam_assets.settings import load_region, packaged_regions
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.region_files import packaged
from dl4gam_assets_tests.stac_server.regions import asking, differences
from dl4gam_assets_tests.stac_server.server import Server

_COLLECTION = "sentinel-2-l2a-simulated"  # of dl4gam_assets.synthetic


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dl4gam_assets_tests.stac_server",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", type=Path, required=True, help="folder of the region's results (HOME/REGION)")
    parser.add_argument("--port", type=int, default=8155, help="0: any free one; the same again keeps results current")
    parser.add_argument("--write-region", type=Path, metavar="FILE", help="write a region file that asks the server")
    parser.add_argument("--region", default="demo", help="the region behind it: packaged name or file")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="delay of each answer, as of a far server")
    parser.add_argument("--compare", type=Path, metavar="STORE", help="do not serve: compare the store with this one")
    given = parser.parse_args(words)
    if given.compare is not None:
        return _compare(given.store, given.compare)

    server = Server(given.store / "inputs", port=given.port)
    server.layer.latency_s = given.latency_ms / 1000
    if given.write_region is not None:
        raw = _raw(given.region)
        raw["name"] = given.store.name
        given.write_region.write_text(
            yaml.safe_dump(asking(raw, server.url, [_COLLECTION]), sort_keys=False), encoding="utf-8"
        )
        load_region(given.write_region)  # a name that is none is refused now
        home = given.store.absolute().parent
        print(f"dl4gam materialize --region {given.write_region} --home {home}", flush=True)
    server.start()
    state = f"{len(server.backend.items)} items" if server.backend.items else "no items yet"
    print(f"{server.url} serves {server.folder} ({state}); Ctrl-C ends it", flush=True)
    try:
        _report(server)
    except KeyboardInterrupt:
        print(f"{len(server.asked())} requests, {server.bytes_sent / 1e6:.1f} MB of files")
    finally:
        server.stop()
    return 0


def _report(server: Server, every_s: float = 10.0) -> None:
    """Say now and then what was asked for, until the process is interrupted."""
    before = 0
    while True:
        time.sleep(every_s)
        searches, files = len(server.asked("/search")), len(server.asked("/files/"))
        if searches + files != before:
            before = searches + files
            print(f"{searches} searches, {files} requests of files, {server.bytes_sent / 1e6:.1f} MB", flush=True)


def _raw(region: str) -> dict[str, Any]:
    if region in packaged_regions():
        return packaged(region)
    raw: dict[str, Any] = yaml.safe_load(Path(region).read_text(encoding="utf-8"))
    return raw


def _compare(one: Path, other: Path) -> int:
    from upath import UPath

    stores = [Storage(UPath(folder.absolute())) for folder in (one, other)]
    tables = stores[0].read_table("cubes")
    found = differences(stores[0], stores[1], sorted(set(tables["year"])))
    print("\n".join(found) or f"{len(tables)} cubes, their candidates and scenes are equal but for addresses")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
