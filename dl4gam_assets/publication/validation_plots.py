"""Plots of docs/validation.md: what intervals hold, beside the 68 % that they claim.

Belongs here: drawing tables of coverage. Does not belong here: the tables (``change.simulator``,
``change.interval_simulator``, ``change.coverage``).

Colours are those of Okabe and Ito (2008), safe for colour-blind readers; each rule also has its own marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {
    "published": ("#D55E00", "o"), "conformal": ("#0072B2", "s"),
    "measured": ("#000000", "D"), "filtered": ("#D55E00", "o"), "extrapolated": ("#E69F00", "^"),
    "extrapolated_without_snr": ("#0072B2", "s"),
}  # fmt: skip
_OTHER = ("#009E73", "v")
#: What an honest interval of one deviation holds, and the range that the project accepts.
TARGET, ACCEPTED = 0.68, (0.63, 0.73)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _coverage_axes(axes: Axes, labels: Sequence[str]) -> None:
    axes.axvspan(*(100 * x for x in ACCEPTED), color="#cccccc", alpha=0.5, lw=0)
    axes.axvline(100 * TARGET, color="#666666", lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("intervals that hold the truth (%)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)


def _dots(
    axes: Axes,
    table: pd.DataFrame,
    labels: Sequence[str],
    by: str,
    names: Sequence[str],
    value: str,
    low: str,
    high: str,
) -> None:
    """Dots with ranges, one row of the axes a label, the names of a label side by side."""
    for k, name in enumerate(names):
        own = table[table[by] == name].set_index("label").reindex(labels)
        colour, marker = _STYLES.get(name, _OTHER)
        y = np.arange(len(labels)) + (k - (len(names) - 1) / 2) * 0.6 / max(len(names), 2)
        x = own[value].to_numpy(dtype=float)
        reach = np.vstack([x - own[low].to_numpy(dtype=float), own[high].to_numpy(dtype=float) - x])
        axes.errorbar(
            x, y, xerr=np.maximum(reach, 0), fmt=marker, ms=4, lw=1, color=colour, label=name.replace("_", " "),
        )  # fmt: skip


def rates_plot(table: pd.DataFrame) -> Figure:
    """Coverage and bias of regional rates by scenario and method, from ``change.simulator.run_scenarios``."""
    table = table.assign(
        label=table["scenario"].str.replace("_", " "),
        share=100 * table["coverage"],
        low=100 * (table["coverage"] - 2 * table["coverage_std"]),
        high=100 * (table["coverage"] + 2 * table["coverage_std"]),
        bias_low=table["bias"] - 2 * table["rmse"] / np.sqrt(table["draws"]),
        bias_high=table["bias"] + 2 * table["rmse"] / np.sqrt(table["draws"]),
    )
    labels = list(dict.fromkeys(table["label"]))
    names = list(dict.fromkeys(table["method"]))
    figure = _figure(9.0, 1.2 + 0.55 * len(labels))
    left, right = figure.subplots(1, 2, sharey=True)
    _coverage_axes(left, labels)
    _dots(left, table, labels, "method", names, "share", "low", "high")
    _dots(right, table, labels, "method", names, "bias", "bias_low", "bias_high")
    right.axvspan(-0.1, 0.1, color="#cccccc", alpha=0.5, lw=0)
    right.axvline(0, color="#666666", lw=0.8)
    right.set_xlabel("bias of the regional rate (%/yr)", fontsize=8)
    right.tick_params(labelsize=8)
    right.grid(axis="y", alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), fontsize=8)
    return figure


def intervals_plot(table: pd.DataFrame) -> Figure:
    """Coverage of single areas by scenario, debris class and rule, from ``change.interval_simulator``."""
    from dl4gam_assets.ensemble.conformal import DEBRIS_CLASSES

    groups = ("all", *DEBRIS_CLASSES)
    table = table[table["group"].isin(groups)].assign(
        label=lambda t: t["scenario"].str.replace("_", " "),
        share=lambda t: 100 * t["coverage"],
        low=lambda t: 100 * (t["coverage"] - 2 * t["coverage_std"]),
        high=lambda t: 100 * (t["coverage"] + 2 * t["coverage_std"]),
    )
    labels = list(dict.fromkeys(table["label"]))
    names = list(dict.fromkeys(table["method"]))[::-1]
    figure = _figure(9.5, 1.2 + 0.4 * len(labels))
    for axes, group in zip(figure.subplots(1, 3, sharey=True), groups, strict=True):
        _coverage_axes(axes, labels)
        _dots(axes, table[table["group"] == group], labels, "method", names, "share", "low", "high")
        axes.set_title("all glaciers" if group == "all" else group, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), fontsize=8)
    return figure


def coverage_plot(table: pd.DataFrame, title: str = "") -> Figure:
    """Coverage by class and rule with 95 % ranges, from ``change.interval_coverage``."""
    table = table.assign(
        label=table["group"] + " (" + table["n_glaciers"].astype(str) + ")",
        share=100 * table["coverage"], low=100 * table["coverage_low"], high=100 * table["coverage_high"],
    )  # fmt: skip
    labels = list(dict.fromkeys(table["label"]))
    names = list(dict.fromkeys(table["rule"]))
    figure = _figure(6.5, 1.2 + 0.4 * len(labels))
    axes = figure.subplots()
    _coverage_axes(axes, labels)
    _dots(axes, table, labels, "rule", names, "share", "low", "high")
    axes.set_title(title, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), fontsize=8)
    return figure
