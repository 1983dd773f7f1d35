"""Make docs/tutorial.ipynb: the cells below, executed.

    python docs/tools/notebook.py docs/tutorial.ipynb

The test runs the cells; the committed notebook holds their outputs, so that the site shows them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = [
    """# The science without Dagster

Dagster keeps years of results in order. The science under it are plain functions over arrays and tables, which this
notebook calls one after the other on a small simulated mountain range whose truth is known: from a catalog of images to
areas, intervals and a rate of change. Nothing is downloaded.""",
    """import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dl4gam_assets.settings import load_region
from dl4gam_assets.synthetic import write_demo_region

plt.rcParams["figure.dpi"] = 60
folder = Path(tempfile.mkdtemp())
summary = write_demo_region(folder / "inputs", seed=7, years=[2015, 2016, 2017, 2018, 2019], size_px=(760, 760))
region = load_region("demo")  # the settings: sensor, thresholds, published constants
summary""",
    """## Glacier outlines

`read_inventory` understands RGI, GLIMS, SGI and similar columns, mends what can be mended, and says what it left out.""",
    """from dl4gam_assets.inventory import glacier_grid, glacier_zones, outline_mask, read_inventory

inventory_file = folder / "inputs" / region.inventory.path
glaciers, rejected = read_inventory(inventory_file, region.inventory)
zones = glacier_zones(glaciers, [20, 50])
glaciers[["glacier_id", "name", "inventory_date", "inventory_area_km2", "modelled"]].head()""",
    """## The best image

Every image of the season over one glacier gets scores (coverage, clouds, seasonal snow as NDSI, albedo), each on its own
part of the surroundings. The published ranking adds up positions.""",
    """from dl4gam_assets.imagery import candidates_of_glacier, open_catalog, rank_candidates, select_scenes

catalog = open_catalog(region.imagery.catalog, folder / "inputs", region.imagery.sensor)
glacier = glaciers.sort_values("inventory_area_km2").iloc[-1]
own_zones = zones[zones["glacier_id"] == glacier["glacier_id"]]


def best(glacier, year):
    own = zones[zones["glacier_id"] == glacier["glacier_id"]]
    scored = candidates_of_glacier(glacier, glaciers, own, catalog, region, year)
    ranked = rank_candidates(scored.assign(year=year), region.imagery.selection)
    return select_scenes(ranked, year)


chosen = best(glacier, 2019)
chosen[["date", "coverage", "cloud_share", "ndsi", "albedo", "rank", "selected", "reason"]].sort_values("rank")""",
    """## Read it onto the glacier's grid

10 m pixels in the glacier's UTM zone; reflectance with the scale that the item's metadata give.""",
    """from dl4gam_assets.cubes import true_colour
from dl4gam_assets.imagery import items_from_row, read_image


def image_of(glacier, year):
    row = best(glacier, year).query("selected").iloc[0]
    grid = glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), 10.0, 300.0)
    image = read_image(items_from_row(row, catalog), region.imagery, grid)
    bands = {str(b): image["reflectance"].sel(band=b).to_numpy() for b in image["band"].to_numpy()}
    return row, grid, bands


row, grid, bands = image_of(glacier, 2019)
outline = outline_mask(inventory_file, region.inventory.layer, grid)
plt.figure(figsize=(5, 5))
plt.imshow(true_colour(bands))
plt.contour(outline, [0.5], colors="gold", linewidths=1)
plt.title(f"{glacier['name']}, {row['date']:%Y-%m-%d}; outline of 2015")
plt.axis("off");""",
    """## A map with its uncertainty

The platform trains an ensemble of U-Nets; that takes minutes, so here five small logistic regressions on band ratios, each
fitted to other pixels of 2015, stand in for it. What follows is the same: mean, spread between members, a threshold.""",
    """from sklearn.linear_model import LogisticRegression


def features(bands):
    ratio = bands["red"] / np.maximum(bands["swir16"], 1e-3)
    ndsi = (bands["green"] - bands["swir16"]) / np.maximum(bands["green"] + bands["swir16"], 1e-3)
    stack = np.stack([np.log(np.clip(ratio, 0.05, 20)), ndsi, bands["blue"], bands["nir"]], axis=-1)
    return np.nan_to_num(stack.reshape(-1, 4))


modelled = glaciers[glaciers["modelled"]].sort_values("inventory_area_km2", ascending=False)
held_out, training = modelled.iloc[::2], modelled.iloc[1::2]  # a glacier is never mapped by models that saw it
X, y = [], []
for _, other in training.iterrows():
    _, other_grid, other_bands = image_of(other, 2015)
    X.append(features(other_bands))
    y.append(outline_mask(inventory_file, region.inventory.layer, other_grid).ravel())
X, y = np.concatenate(X), np.concatenate(y)
rng = np.random.default_rng(0)
members = []
for _ in range(5):
    some = rng.integers(0, len(y), 4000)
    members.append(LogisticRegression(max_iter=300).fit(X[some], y[some]))


def map_of(bands):
    shape = bands["red"].shape
    each = np.stack([m.predict_proba(features(bands))[:, 1].reshape(shape) for m in members])
    return each.mean(axis=0), each.std(axis=0)


mean, std = map_of(bands)
fig, axes = plt.subplots(1, 2, figsize=(9, 4))
for axis, values, title in zip(axes, (mean, std), ("mean probability", "spread between members")):
    axis.imshow(values, cmap="cividis")
    axis.set_title(title)
    axis.axis("off")""",
    """## Areas with an interval

Lower and upper area come from shifting the threshold by a `tau` that calibration chooses so that the interval holds the
true area in 68 % of the cases (section 8 of the paper's method). Pixels of other glaciers never count.""",
    """from dl4gam_assets.ensemble import interval_areas, largest_covering_tau
from rasterio.features import rasterize


def allowed_of(glacier, grid):
    own = zones[(zones["glacier_id"] == glacier["glacier_id"]) & zones["buffer_m"].eq(20)].to_crs(str(grid.crs))
    return rasterize(own.geometry, grid.shape, transform=grid.affine).astype(bool)


pixel_km2 = 1e-4
taus = {}
for _, other in held_out.iterrows():  # in the inventory year the area is known
    _, other_grid, other_bands = image_of(other, 2015)
    m, s = map_of(other_bands)
    taus[other["glacier_id"]] = largest_covering_tau(m, s, allowed_of(other, other_grid), pixel_km2, other["inventory_area_km2"])
tau = float(np.quantile(list(taus.values()), 1 - 0.68))
rows = []
for year in (2015, 2017, 2019):
    for _, other in held_out.iterrows():
        chosen_row, other_grid, other_bands = image_of(other, year)
        m, s = map_of(other_bands)
        allowed = allowed_of(other, other_grid)
        lower, upper = interval_areas(m, s, allowed, pixel_km2, np.array([tau]))
        area = float(((m >= 0.5) & allowed).sum()) * pixel_km2
        low, high = min(float(lower[0]), area), max(float(upper[0]), area)
        rows.append(
            {"glacier_id": other["glacier_id"], "year": year, "area_km2": area, "lower_km2": low, "upper_km2": high,
             "std_km2": (high - low) / 2, "image_date": chosen_row["date"], "recall": 1.0, "tau": tau, "fold": 1,
             "inventory_area_km2": other["inventory_area_km2"]}
        )
areas = pd.DataFrame(rows)
areas.pivot(index="glacier_id", columns="year", values="area_km2").round(3)""",
    """## Change

Rates use the dates of the two images; errors of the two years are independent, those of different glaciers are taken as
fully dependent, so that a region's interval is the widest it can be.""",
    """from dl4gam_assets.change import area_changes, combined_std

changes, without = area_changes(areas.query("year == 2015"), areas.query("year == 2019"), region.change)
total = changes["baseline_area_km2"].sum()
rate = 100 * changes["rate_km2_per_year"].sum() / total
error = 100 * combined_std(changes["rate_std_km2_per_year"].to_numpy(), 1.0) / total
print(f"measured: {rate:+.2f} +/- {error:.2f} % per year")
changes[["glacier_id", "baseline_area_km2", "area_km2", "rate_pct_per_year", "rate_std_pct_per_year", "flags"]].round(3)""",
    """The truth of the simulation, which nothing above has seen:""",
    """import geopandas as gpd

truth = {y: gpd.read_file(folder / "inputs" / "truth" / f"outlines_{y}.gpkg").set_index("glacier_id") for y in (2015, 2019)}
ids = held_out["glacier_id"]
true = {y: t.loc[t.index.intersection(ids)].to_crs(int(glacier["utm_epsg"])).area.sum() / 1e6 for y, t in truth.items()}
print(f"true: {100 * (true[2019] - true[2015]) / true[2015] / 4:+.2f} % per year")""",
    """The stand-in finds too little of the loss, and its interval is wide enough to say that it can not be trusted: band
ratios see no ice under debris, and five glaciers are few to calibrate on. In the demo of the platform the ensemble of small
U-Nets gives a regional rate of -1.3 +/- 0.7 % per year where the truth is -1.9.""",
    """## What the platform adds

U-Net ensembles on 16 channels (terrain, elevation change), geographic cross-validation, calibration by fold, trends over
all years, totals with extrapolation, lineage of every number, and a graph that makes again only what changed:

    make demo
    dl4gam new my_range.yaml --inventory my_outlines.gpkg --first 2016""",
]


def notebook() -> nbformat.NotebookNode:
    """The notebook, not executed. Cells that begin with a heading or prose are Markdown."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    code = ("import ", "from ")
    for text in CELLS:
        cell = nbformat.v4.new_code_cell if text.startswith(code) else nbformat.v4.new_markdown_cell
        made.cells.append(cell(text))
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number:02d}"  # the same each time
    return made


def executed(timeout: int = 300) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        if a cell fails.
    """
    made = notebook()
    NotebookClient(made, timeout=timeout, kernel_name="python3").execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)
    return made


if __name__ == "__main__":
    nbformat.write(executed(), Path(sys.argv[1]))
