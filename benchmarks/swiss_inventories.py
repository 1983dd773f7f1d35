"""Areas from the geometry of two real inventories against the official table, and the map between their ids.

    python benchmarks/swiss_inventories.py                       # data below DL4GAM_REAL_DATA (docs/real-data.md)
    python benchmarks/swiss_inventories.py --plot FILE.png --file GLACIERS.csv

Prints the tables of docs/validation.md, section 6: SGI2016 outlines as the platform cuts them at the divides, and
SGI2010 outlines (by id, and by overlap), each against the official areas of SGI2016. The script exits with 1 where the
areas of SGI2016 do not add up to the official total within 1 per mille.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd

from dl4gam_assets.change.transfer import compare_areas, match_inventories, relation_counts
from dl4gam_assets.inventory import sgi

EDGES_KM2 = (0.0, 0.1, 0.5, 2.0, 10.0, 1000.0)


def by_size(compared: pd.DataFrame) -> pd.DataFrame:
    """One row a size class (official area) and one for all from 0.1 km2: sums and relative differences in percent."""
    both = compared.dropna(subset=["area_km2", "official_km2"])
    parts = [(f"{a:g} to {b:g}", a, b) for a, b in itertools.pairwise(EDGES_KM2)]
    rows = []
    for name, low, high in [*parts, ("all from 0.1", 0.1, np.inf), ("all", 0.0, np.inf)]:
        own = both[(both["official_km2"] >= low) & (both["official_km2"] < high)]
        off = 100 * own["relative_difference"]
        rows.append(
            {
                "size (km2)": name.replace("10 to 1000", ">= 10"), "glaciers": len(own),
                "ours (km2)": round(own["area_km2"].sum(), 2), "official (km2)": round(own["official_km2"].sum(), 2),
                "median (%)": round(off.median(), 2), "median size (%)": round(off.abs().median(), 2),
                "95 % below (%)": round(off.abs().quantile(0.95), 1),
                "within 5 % (%)": round(100 * (off.abs() < 5).mean()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def plot(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Relative difference against official area, a panel a comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    for axes, (name, table) in zip(figure.subplots(1, len(tables), sharey=True), tables.items(), strict=True):
        axes.axhline(0, color="#666666", lw=0.8)
        axes.scatter(table["official_km2"], 100 * table["relative_difference"], s=5, alpha=0.4, color="#0072B2", lw=0)
        axes.set_xscale("log")
        axes.set_ylim(-100, 100)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("official area of SGI2016 (km2)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("difference from it (%)", fontsize=8)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("DL4GAM_REAL_DATA"), help="Folder of the real data.")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--file", type=Path, help="Write the glaciers here (CSV).")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("set DL4GAM_REAL_DATA or --data (docs/real-data.md)")
    folder = Path(arguments.data) / "sgi_switzerland"
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "sgi2016.gpkg"
        sgi.write_swiss_inventory(folder, path)
        later = gpd.read_file(path, layer="glaciers")
    official = pd.read_csv(folder / sgi.ATTRIBUTES).rename(columns={"sgi-id": "glacier_id"})
    former = gpd.read_file(folder / sgi.FORMER).dissolve("SGI", as_index=False).rename(columns={"SGI": "glacier_id"})
    former["area_km2"] = former.to_crs(2056).area / 1e6
    matched = match_inventories(former, later)
    print("SGI2010 to SGI2016, relations of ids:", relation_counts(matched))
    pairs = matched[matched["relation"] == "one_to_one"]
    same = (pairs["first_id"] == pairs["second_id"]).mean()
    print(f"one to one: {len(pairs)}, of which {100 * same:.1f} % have the same id in both\n")
    of_pair = former.merge(pairs[["first_id", "second_id"]], left_on="glacier_id", right_on="first_id")
    by_overlap = of_pair.drop(columns="glacier_id").rename(columns={"second_id": "glacier_id"})
    tables = {
        "SGI2016 geometry": compare_areas(later, official),
        "SGI2010 geometry, by id": compare_areas(former, official),
        "SGI2010 geometry, one to one by overlap": compare_areas(by_overlap, official),
    }
    for name, table in tables.items():
        print(name)
        print(by_size(table).to_string(index=False), "\n")
    if arguments.plot:
        plot(tables, arguments.plot)
    if arguments.file:
        pd.concat([t.assign(comparison=n) for n, t in tables.items()]).to_csv(arguments.file, index=False)
    now = tables["SGI2016 geometry"]
    return int(abs(now["area_km2"].sum() / now["official_km2"].sum() - 1) > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
