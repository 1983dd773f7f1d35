"""Figures of the report as data addresses for <img>: SVG, or PNG where a map has too many vertices.

Belongs here: drawing what tables say, in colours that colour-blind readers can tell apart.
Does not belong here: computing figures, HTML.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import geopandas as gpd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: distinct with every common colour vision deficiency.
NOW, LOST, OTHER, INK = "#0072b2", "#d55e00", "#b8b8b8", "#333333"
#: Above this a vector map would weigh more than its picture.
MAX_VERTICES = 60_000


def _figure(width: float, height: float) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text (selectable, small); ids do not change from run to run.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "dl4gam"
    return Figure(figsize=(width, height), layout="constrained")


def _address(figure: Figure, as_png: bool = False) -> str:
    raw = io.BytesIO()
    if as_png:
        figure.savefig(raw, format="png", dpi=130)
        return "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
    figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(raw.getvalue()).decode()


def _vertices(*frames: gpd.GeoDataFrame) -> int:
    import shapely

    return int(sum(shapely.get_num_coordinates(f.geometry.array).sum() for f in frames if len(f)))


def _scale_bar(axes: Axes) -> None:
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    target = (x1 - x0) / 4
    step = 10 ** np.floor(np.log10(target))
    length = step * max(f for f in (1, 2, 5) if f * step <= target * 1.0001)
    left, low = x0 + 0.04 * (x1 - x0), y0 + 0.04 * (y1 - y0)
    axes.plot([left, left + length], [low, low], color=INK, linewidth=2.5, solid_capstyle="butt")
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    axes.annotate(text, (left, low), (0, 4), textcoords="offset points", fontsize=8, color=INK)


def _plot(frame: gpd.GeoDataFrame, axes: Axes, **style: Any) -> None:
    if len(frame):
        frame.plot(ax=axes, aspect=None, **style)


def _in_metres(epsg: int, *frames: gpd.GeoDataFrame) -> list[gpd.GeoDataFrame]:
    return [f.to_crs(f"EPSG:{epsg}") if len(f) else f for f in frames]


def overview_map(
    inventory: gpd.GeoDataFrame,
    baseline: gpd.GeoDataFrame,
    now: gpd.GeoDataFrame,
    mapped: set[str],
    years: tuple[int, int],
    epsg: int,
) -> str:
    """Map of the region: outlines of the baseline below those of the year, all other glaciers in grey.

    ``mapped`` are the glaciers with an estimate in the year: only they can show a loss, even a whole one. A glacier
    without a usable image that year is grey, never lost.
    """
    from matplotlib.patches import Patch

    inventory, baseline, now = _in_metres(epsg, inventory, baseline, now)
    x0, y0, x1, y1 = inventory.total_bounds
    extent = max(x1 - x0, y1 - y0, 1.0)
    aspect = float(np.clip((y1 - y0) / max(x1 - x0, 1.0), 0.35, 1.1))
    figure = _figure(9.0, 9.0 * aspect + 0.6)
    axes = figure.subplots()
    tolerance = extent / 2000
    simple = [f.assign(geometry=f.geometry.simplify(tolerance)) if len(f) else f for f in (inventory, baseline, now)]
    rest = simple[0][~simple[0]["glacier_id"].isin(mapped)]
    simple[1] = simple[1][simple[1]["glacier_id"].isin(mapped)]
    _plot(rest, axes, facecolor=OTHER, edgecolor="#8a8a8a", linewidth=0.3)
    _plot(simple[1], axes, facecolor=LOST, edgecolor=LOST, linewidth=0.3)
    _plot(simple[2], axes, facecolor=NOW, edgecolor="none")
    pad = 0.04 * extent
    axes.set_xlim(x0 - pad, x1 + pad)
    axes.set_ylim(y0 - 2 * pad, y1 + pad)
    axes.set_aspect("equal")
    axes.set_axis_off()
    _scale_bar(axes)
    first, year = years
    handles = [Patch(color=NOW, label=f"mapped in {year}")]
    if len(simple[1]) and first != year:
        handles.append(Patch(color=LOST, label=f"mapped in {first} only"))
    if len(rest):
        handles.append(Patch(color=OTHER, label=f"inventory, not mapped in {year}"))
    figure.legend(handles=handles, fontsize=9, loc="outside lower right", ncols=len(handles), frameon=False)
    return _address(figure, as_png=_vertices(*simple) > MAX_VERTICES)


def close_ups(
    ids: list[str], titles: list[str], baseline: gpd.GeoDataFrame, now: gpd.GeoDataFrame, bounds: gpd.GeoDataFrame,
    epsg: int,
) -> str:  # fmt: skip
    """Small maps of single glaciers: baseline, year, and the year's upper bound as a thin line."""
    baseline, now, bounds = _in_metres(epsg, baseline, now, bounds)
    columns = min(3, len(ids))
    rows = -(-len(ids) // columns)
    figure = _figure(9.0, 3.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, glacier, title in zip(panels, ids, titles):
        own = [f[f["glacier_id"] == glacier] if len(f) else f for f in (baseline, now, bounds)]
        _plot(own[0], axes, facecolor=LOST, edgecolor="none")
        _plot(own[1], axes, facecolor=NOW, edgecolor="none")
        _plot(own[2], axes, facecolor="none", edgecolor=INK, linewidth=0.5)
        boxes = [f.total_bounds for f in own if len(f)]
        if boxes:
            x0, y0 = np.min([b[:2] for b in boxes], axis=0)
            x1, y1 = np.max([b[2:] for b in boxes], axis=0)
            half = 0.56 * max(x1 - x0, y1 - y0)
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            axes.set_xlim(x - half, x + half)
            axes.set_ylim(y - half * 1.12, y + half)
            _scale_bar(axes)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_title(title, fontsize=9, color=INK, parse_math=False)  # a name may hold a dollar sign
    for axes in panels[len(ids) :]:
        axes.set_axis_off()
    return _address(figure, as_png=_vertices(baseline, now, bounds) > MAX_VERTICES)


def area_series(series: pd.DataFrame, baseline_year: int) -> str:
    """Regional area by year with one deviation; columns method, year, area_km2, std_km2."""
    figure = _figure(7.0, 3.2)
    axes = figure.subplots()
    styles = {"extrapolated": (NOW, "all glaciers (extrapolated)", 0.0), "measured": (LOST, "measured glaciers", 0.06)}
    for method, (colour, label, shift) in styles.items():
        rows = series[(series["method"] == method) & series["area_km2"].notna()].sort_values("year")
        if rows.empty:
            continue
        x, y, s = (rows[c].to_numpy(dtype=float) for c in ("year", "area_km2", "std_km2"))
        if method == "extrapolated":
            axes.fill_between(x, y - s, y + s, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        else:
            axes.errorbar(
                x + shift, y, yerr=s, color=colour, fmt="s", markersize=4, linewidth=1.2, capsize=3, label=label
            )
    axes.set_ylabel("area (km²)")
    years = sorted(set(series["year"].astype(int)))
    axes.set_xticks(years if len(years) <= 12 else years[:: -(-len(years) // 12)])
    axes.axvline(baseline_year, color="#999999", linewidth=0.8, linestyle=":")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return _address(figure)


def size_classes(rows: pd.DataFrame) -> str:
    """Area of each size class at the baseline and in the year, and the class's rate with one deviation.

    Columns label, baseline_area_km2, area_km2, rate_pct_per_year, rate_std_pct_per_year, in the order to draw.
    """
    with_rates = bool(rows["rate_pct_per_year"].notna().any())
    figure = _figure(8.6 if with_rates else 5.5, 3.2)
    panels = figure.subplots(1, 2 if with_rates else 1, squeeze=False).ravel()
    x = np.arange(len(rows))
    if with_rates:
        panels[0].bar(x - 0.2, rows["baseline_area_km2"].astype(float), 0.4, color=LOST, label="baseline")
        panels[0].bar(
            x + 0.2, rows["area_km2"].astype(float), 0.4, color=NOW, label="this year", hatch="//", edgecolor="white"
        )
        panels[0].legend(fontsize=8, frameon=False)
        panels[1].errorbar(
            x, rows["rate_pct_per_year"].astype(float), yerr=rows["rate_std_pct_per_year"].astype(float), fmt="o",
            color=NOW, capsize=3, linewidth=1.2, markersize=5,
        )  # fmt: skip
        panels[1].axhline(0, color=INK, linewidth=0.8)
        panels[1].set_ylabel("change (% per year)")
    else:
        panels[0].bar(x, rows["area_km2"].astype(float), 0.6, color=NOW)
    panels[0].set_ylabel("area (km²)")
    for axes in panels:
        axes.set_xticks(x, [str(v) for v in rows["label"]], rotation=40, ha="right", fontsize=8)
        axes.set_xlabel("size of the glacier (km²)", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _address(figure)
