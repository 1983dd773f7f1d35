"""Packing the training layers once, and what it saves.

    python benchmarks/packing.py --home HOME                  # the demo's cubes of a store
    python benchmarks/packing.py --home HOME --region swiss --year 2016

Compares, in one run: packing in one process and in several (the files must be equal byte by byte, or the script exits
with 1); and reading the layers of all glaciers once, as an epoch needs them, from the cubes and from the packed file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dl4gam_assets.compute import Mapper, close_clusters, default_workers
from dl4gam_assets.cubes import channel_stack, open_cube
from dl4gam_assets.segmentation import PackedCubes, pack_cubes
from dl4gam_assets.settings import load_region


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=os.environ.get("DL4GAM_HOME"), help="folder of the store")
    parser.add_argument("--region", default="demo")
    parser.add_argument("--year", type=int, default=2015)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--repeat", type=int, default=1, help="take each cube so many times")
    options = parser.parse_args()
    if options.home is None:
        parser.error("--home: the folder of a store (DL4GAM_HOME)")
    channels = load_region(options.region).model.channels
    files = sorted((Path(options.home) / options.region / "cubes" / f"year={options.year}").glob("*.nc"))
    if not files:
        parser.error(f"there are no cubes of {options.year} in {options.home}/{options.region}")
    cubes = {f"{k:02d}-{f.stem}": f for k in range(options.repeat) for f in files}
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        one = pack_cubes(cubes, channels, Path(scratch) / "one")
        alone = time.perf_counter() - start
        mapper = Mapper(options.workers)
        list(mapper.map(_warm, [(str(k), (files[0],)) for k in range(8 * options.workers)]))  # imports are not counted
        start = time.perf_counter()
        pack_cubes(cubes, channels, Path(scratch) / "several", mapper=mapper)
        together = time.perf_counter() - start
        close_clusters()
        names = ("channels.bin", "masks.bin", "packed.json")
        same = all(
            (Path(scratch) / "one" / n).read_bytes() == (Path(scratch) / "several" / n).read_bytes() for n in names
        )
        start = time.perf_counter()
        for path in cubes.values():
            with open_cube(path) as cube:
                channel_stack(cube, channels)
        from_cubes = time.perf_counter() - start
        opened = PackedCubes.open(one.folder)
        start = time.perf_counter()
        for glacier_id in opened.ids:
            np.array(opened.glacier(glacier_id).channels)
        from_packed = time.perf_counter() - start
    on_disk = sum(p.stat().st_size for p in cubes.values())
    size = one.size_bytes(one.ids)
    print(f"{len(cubes)} cubes of {options.region}, {on_disk / 2**20:.0f} MiB, packed {size / 2**20:.0f} MiB")
    rate = 60 * len(cubes)
    print(f"{'packing, 1 process':<34} {alone:7.2f} s {rate / alone:7.0f} a minute  ratio 1.00")
    several = f"packing, {options.workers} processes"
    print(f"{several:<34} {together:7.2f} s {rate / together:7.0f} a minute  ratio {alone / together:.2f}")
    print(f"{'layers of all glaciers from cubes':<34} {from_cubes:7.2f} s  ratio 1.00")
    print(f"{'the same from the packed file':<34} {from_packed:7.2f} s  ratio {from_cubes / from_packed:.0f}")
    print(f"same files: {'yes' if same else 'NO'}")
    return 0 if same else 1


def _warm(path: Path) -> int:
    with open_cube(path) as cube:
        return int(cube["mask"].to_numpy()[0, 0])


if __name__ == "__main__":
    sys.exit(main())
