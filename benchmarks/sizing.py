"""What a region costs: hours, memory and disk, projected from the measured rates of a store.

    python benchmarks/sizing.py --home HOME [--region demo]

Reads how long each partition took (state/), how many pixels its glaciers have and how large its files are, and
projects seconds and bytes a megapixel to regions of other sizes. Rates are of this machine's cores; the network is
not in them. The demo's networks are small, so the rate of the paper's is given by --member.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dl4gam_assets.settings import load_region
from dl4gam_assets.storage import Storage

#: Regions to project to: glaciers that are mapped, and median and spread of a lognormal law of their areas (km2) with
#: the published means. Alps: 1,593 glaciers above 0.1 km2, about 1.1 km2 each (Diaconu et al. 2025); world: RGI 6 has
#: 215,547 glaciers of 706,000 km2.
TARGETS = {"Alps": (1_593, 0.35, 1.51), "world": (215_547, 0.36, 2.10)}
MEMBERS = 10
PIXEL_M, MARGIN_PX = 10.0, 133
FILES = {"static": "once", "cubes": "years", "predictions": "years"}


def cube_megapixels(area_km2: np.ndarray) -> np.ndarray:
    """Megapixels of cubes: a square of 2.6 times the area (fits 671 Swiss outlines), and margins."""
    side = np.sqrt(2.6 * area_km2 * 1e6) / PIXEL_M
    return (side + 2 * MARGIN_PX) ** 2 / 1e6


def measured(storage: Storage) -> tuple[pd.DataFrame, dict[str, float]]:
    """Seconds a megapixel of each step, and bytes a megapixel of each kind of file."""
    cubes = storage.read_table("cubes")
    pixels = cubes["height_px"] * cubes["width_px"] / 1e6
    one_year = float(pixels[cubes["year"] == cubes["year"].min()].sum())
    all_years = float(pixels.sum())
    scenes = storage.read_table("scenes")
    members = len(storage.read_table("members")["member"].unique())
    candidates = len(scenes) / max(len(cubes), 1)
    counted = {
        "scene_candidates": all_years * candidates, "elevation": one_year, "glacier_cubes": all_years,
        "glacier_predictions": all_years * members, "glacier_areas": all_years, "glacier_outlines": all_years,
    }  # fmt: skip
    rows = []
    for step, megapixels in counted.items():
        states = [storage.read_json(f) or {} for f in storage.path("state", step).glob("*.json")]
        seconds = sum(float(s.get("seconds", 0)) for s in states)
        rows.append({"step": step, "seconds": seconds, "megapixels": megapixels, "s_per_mpx": seconds / megapixels})
    sizes = {}
    for folder, kind in FILES.items():
        found = sum(f.stat().st_size for f in Path(str(storage.path(folder))).rglob("*") if f.is_file())
        sizes[folder] = found / (one_year if kind == "once" else all_years)
    return pd.DataFrame(rows).set_index("step"), sizes


def project(
    rates: pd.DataFrame, sizes: dict[str, float], pixels: float, cores: int, images: float, member: float
) -> dict[str, float]:
    """Core hours and gigabytes of a region of so many megapixels: once, and for each year."""
    per = rates["s_per_mpx"] * cores / 3600  # core hours: the store was made on all cores
    return {
        "megapixels": pixels,
        "terrain, once (core h)": per["elevation"] * pixels,
        "scoring images, a year (core h)": per["scene_candidates"] * images * pixels,
        "cubes, a year (core h)": per["glacier_cubes"] * pixels,
        f"maps by {MEMBERS} members, a year (core h)": member / 3600 * MEMBERS * pixels,
        "areas and outlines, a year (core h)": (per["glacier_areas"] + per["glacier_outlines"]) * pixels,
        "terrain and masks, once (GB)": sizes["static"] * pixels / 1e9,
        "cubes and maps, a year (GB)": (sizes["cubes"] + sizes["predictions"]) * pixels / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", required=True)
    parser.add_argument("--region", default="demo")
    parser.add_argument("--cores", type=int, default=2, help="that the store was made with")
    parser.add_argument("--images", type=float, default=8, help="candidate images of a glacier and year")
    parser.add_argument(
        "--member", type=float, default=5.0, help="core seconds a megapixel of one member (benchmarks/inference.py)"
    )
    choice = parser.parse_args()
    region = load_region(choice.region)
    storage = Storage(Path(choice.home) / region.name)
    rates, sizes = measured(storage)
    print(rates.round(4).to_string(), "\n")
    print({k: f"{v / 1e6:.2f} MB a megapixel" for k, v in sizes.items()}, "\n")
    rng = np.random.default_rng(1)
    for name, (glaciers, median, spread) in TARGETS.items():
        areas = np.minimum(np.exp(rng.normal(np.log(median), spread, glaciers)), 3_000)
        pixels = float(cube_megapixels(areas).sum())
        print(f"{name}: {glaciers} glaciers, {areas.sum():,.0f} km2, {pixels / glaciers:.2f} megapixels a cube")
        made = project(rates, sizes, pixels, choice.cores, choice.images, choice.member)
        for key, value in made.items():
            print(f"  {key}: {value:,.1f}")


if __name__ == "__main__":
    main()
