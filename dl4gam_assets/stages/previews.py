"""Small pictures for the UI: outlines over an image, maps, curves. PNG or JPEG bytes, a few tens of kilobytes at most.

Belongs here: drawing for people. Does not belong here: numbers that anything else reads.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

_BEST, _LOWER, _UPPER, _INVENTORY = "#ffd400", "#00c8ff", "#ff5fa2", "#ffffff"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def _png(figure: Any, colours: int = 96) -> bytes:
    """PNG with a reduced palette: pictures are kept in the event database."""
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, format="png")
    raw.seek(0)
    small = io.BytesIO()
    Image.open(raw).convert("RGB").quantize(colours).save(small, format="png", optimize=True)
    return small.getvalue()


def outlines_map(glaciers: Any, column: str | None = None, title: str = "") -> bytes:
    """Map of glacier outlines (EPSG:4326), coloured by a column of text where one is given."""
    figure = _figure(5.0, 4.2)
    axes = figure.subplots()
    if column is None:
        glaciers.plot(ax=axes, color="#9ecbe8", edgecolor="#20557a", linewidth=0.6)
    else:
        glaciers.plot(ax=axes, column=column, categorical=True, legend=True, cmap="tab10", edgecolor="k", linewidth=0.3)
    middle = np.deg2rad(float(np.mean(glaciers.total_bounds[[1, 3]])))
    axes.set_aspect(1 / max(np.cos(middle), 0.05))
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.tick_params(labelsize=7)
    return _png(figure, 48)


def contours(
    picture: np.ndarray, masks: Sequence[tuple[np.ndarray, str, str]], title: str = "", pixel_m: float = 10.0
) -> bytes:
    """Edges of masks, as ``(mask, colour, label)``, over a picture (H, W, 3), with title, labels and a scale bar.

    Drawn with Pillow: a run makes hundreds of these, and a plotting library takes half a second for each.
    """
    from PIL import Image, ImageColor, ImageDraw

    height, width = picture.shape[:2]
    zoom = max(1, round(420 / max(height, width)))
    canvas = picture.repeat(zoom, 0).repeat(zoom, 1)
    for mask, colour, _ in masks:
        large = mask.repeat(zoom, 0).repeat(zoom, 1)
        inner = large.copy()
        for axis in (0, 1):
            for step in (1, -1):
                inner &= np.roll(large, step, axis)
        canvas[large & ~inner] = ImageColor.getrgb(colour)
    image = Image.fromarray(canvas)
    if max(image.size) > 480:
        image.thumbnail((480, 480))
    draw = ImageDraw.Draw(image)
    bar_m = 10 ** np.floor(np.log10(max(width * pixel_m / 3, 1)))
    bar = bar_m / pixel_m * image.width / width
    bottom = image.height - 6
    draw.line([(6, bottom), (6 + bar, bottom)], fill="white", width=2)
    lines = [(title, "white"), *((label, colour) for _, colour, label in masks), (f"{bar_m / 1000:g} km", "white")]
    spots = [(6, 4 + 13 * k) for k in range(len(lines) - 1)] + [(6, bottom - 15)]
    for (text, colour), spot in zip(lines, spots, strict=True):
        draw.text(spot, text, fill=colour, stroke_width=2, stroke_fill="black")
    small = io.BytesIO()
    image.save(small, format="jpeg", quality=80)
    return small.getvalue()


def curves(frame: pd.DataFrame, x: str, ys: Sequence[str], title: str = "") -> bytes:
    """Columns ``ys`` against ``x``; one panel each."""
    figure = _figure(2.4 * len(ys) + 0.6, 2.3)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(ys))), ys, strict=True):
        axes.plot(frame[x], frame[name], marker="o", markersize=2.5, linewidth=1, color="#20557a")
        axes.set_title(name.replace("_", " "), fontsize=8)
        axes.set_xlabel(x.replace("_", " "), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=8, parse_math=False)
    return _png(figure, 24)


def reliability(before: pd.DataFrame, after: pd.DataFrame, title: str = "") -> bytes:
    """Reliability diagram: observed frequency against predicted probability, before and after calibration."""
    figure = _figure(3.0, 2.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#888", linewidth=0.8, linestyle="--")
    for frame, colour, label in ((before, "#d55e00", "before"), (after, "#0072b2", "after")):
        axes.plot(
            frame["confidence"],
            frame["frequency"],
            marker="o",
            markersize=2.5,
            linewidth=1,
            color=colour,
            label=label,
        )
    axes.set_xlabel("predicted probability", fontsize=7)
    axes.set_ylabel("observed share of glacier", fontsize=7)
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=7)
    axes.set_title(title, fontsize=8, parse_math=False)
    return _png(figure, 24)


def area_series(frame: pd.DataFrame, title: str = "") -> bytes:
    """Area of one and the same glaciers by year with its one-sigma bar, and how many of them were measured (in grey).

    Columns year, area_km2, std_km2, n_measured. Totals of the glaciers that happened to be measured are no series:
    their number changes with the clouds.
    """
    figure = _figure(3.6, 2.4)
    axes = figure.subplots()
    for row in frame.itertuples():
        axes.annotate(
            f"{int(row.n_measured)}", (int(row.year), row.area_km2 - row.std_km2), xytext=(0, -3),
            textcoords="offset points", ha="center", va="top", fontsize=5, color="#777",
        )  # fmt: skip
    axes.margins(y=0.15)
    axes.errorbar(
        frame["year"].astype(int), frame["area_km2"], yerr=frame["std_km2"], fmt="o-", color="#20557a", markersize=3,
        linewidth=1, capsize=2,
    )  # fmt: skip
    axes.set_ylabel("area (km2)", fontsize=7)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=8, parse_math=False)
    return _png(figure, 24)
