"""A statistical simulator: regions with known rates and known errors, to check what the estimates claim.

Belongs here: drawing many regions and the errors of their areas without images or training, and the shares of them that
the intervals cover. An area's error is drawn as one number; blurred margins and the features that tau is fitted on are
drawn in ``interval_simulator``.
Does not belong here: the estimates themselves (``rates``, ``regional``, ``trends``); simulated images (``synthetic``).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from dl4gam_assets.change.correlation import EARTH_RADIUS_KM
from dl4gam_assets.change.rates import area_changes
from dl4gam_assets.change.regional import inventory_frame, total_rows
from dl4gam_assets.compute import default_workers
from dl4gam_assets.settings import ChangeSettings


@dataclass(frozen=True)
class Errors:
    """How measured areas err, and what is reported of it.

    The true standard deviation of an area A (km2) is ``relative_at_1km2 * A**(1 + exponent)``: small glaciers are
    relatively less certain. Errors are normal.
    """

    relative_at_1km2: float = 0.05
    exponent: float = -0.25
    #: Correlation of the errors of two glaciers in one year, and the length over which it decays (null: it does not).
    correlation: float = 1.0
    length_km: float | None = None
    #: Share of the variance that is the same in both years (the outline's own error, say); it cancels in a change.
    shared_in_time: float = 0.0
    #: Reported deviation over true one, and its scatter from glacier to glacier (standard deviation of the logarithm).
    reported: float = 1.0
    reported_scatter: float = 0.0


@dataclass(frozen=True)
class World:
    """A region and its true change.

    Areas follow a truncated power law with the exponent -1.7 in number, near what the inventories of the Alps show;
    relative rates (%/yr) are ``law[0] + law[1] log10 A + law[2] log10(A)^2`` with normal scatter.
    """

    glaciers: int = 200
    smallest_km2: float = 0.02
    largest_km2: float = 20.0
    modelled_km2: float = 0.1
    law: tuple[float, float, float] = (-1.9, 0.9, -0.1)
    scatter_pct: float = 0.5
    years: float = 8.0
    extent_km: tuple[float, float] = (400.0, 150.0)
    errors: Errors = field(default_factory=Errors)


def draw_region(
    world: World, rng: np.random.Generator, prefix: str = "G"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A region: its inventory, and the areas that were measured in the baseline year and ``years`` later.

    Ids start with ``prefix``.

    Returns
    -------
    glaciers : columns of the table ``glaciers`` that totals need, with ``true_area_0``, ``true_area_1`` (km2)
    baseline, areas : columns of the table ``areas`` that changes need, for the modelled glaciers
    """
    n, k = world.glaciers, -0.7  # the power of the cumulative distribution
    low, high = world.smallest_km2**k, world.largest_km2**k
    area = (low + rng.random(n) * (high - low)) ** (1 / k)
    x = np.log10(area)
    rate = world.law[0] + world.law[1] * x + world.law[2] * x**2 + rng.normal(0, world.scatter_pct, n)
    later = area * np.maximum(1 + rate / 100 * world.years, 0.0)
    width, height = (np.rad2deg(side / EARTH_RADIUS_KM) for side in world.extent_km)
    glaciers = pd.DataFrame(
        {
            "glacier_id": [f"{prefix}{i:05d}" for i in range(n)],
            "lon": 10 + width / np.cos(np.deg2rad(46.0)) * (rng.random(n) - 0.5),
            "lat": 46 + height * (rng.random(n) - 0.5),
            "country": "X",
            "inventory_date": pd.Timestamp("2015-09-01"),
            "inventory_area_km2": area,
            "true_area_0": area,
            "true_area_1": later,
        }
    )
    mine = glaciers[area >= world.modelled_km2]
    baseline, areas = measure(mine, world.errors, rng, world.years)
    return glaciers, baseline, areas


def measure(
    glaciers: pd.DataFrame, errors: Errors, rng: np.random.Generator, years: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measured areas of both years with errors drawn from the model: rows like those of the table ``areas``."""
    n = len(glaciers)
    draw = _correlated(glaciers, errors, rng)
    fixed = draw()
    out = []
    for number, column in enumerate(("true_area_0", "true_area_1")):
        true = glaciers[column].to_numpy(dtype=float)
        std = errors.relative_at_1km2 * np.maximum(true, 1e-3) ** (1 + errors.exponent)
        own = draw()
        error = std * (np.sqrt(errors.shared_in_time) * fixed + np.sqrt(1 - errors.shared_in_time) * own)
        told = std * errors.reported * np.exp(rng.normal(0, errors.reported_scatter, n))
        measured = np.maximum(true + error, 0.0)
        # Missed ice lowers the recall of the inventory outline; ice found beyond it does not.
        recall = np.clip(1.0 + np.minimum(error, 0.0) / np.maximum(true, 1e-6), 0.0, 1.0)
        date = pd.Timestamp("2015-09-01") + pd.Timedelta(days=365.25 * years * number)
        out.append(
            pd.DataFrame(
                {
                    "glacier_id": glaciers["glacier_id"].to_numpy(),
                    "year": int(2015 + round(years) * number),
                    "image_date": date,
                    "area_km2": measured,
                    "std_km2": told,
                    "recall": recall,
                    "usable_share": 1.0,
                    "filled_share": 0.0,
                }
            )
        )
    return out[0], out[1]


def _correlated(glaciers: pd.DataFrame, errors: Errors, rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """Draws normal numbers (n,) of variance 1 that correlate between glaciers as the errors do."""
    n, rho = len(glaciers), errors.correlation
    if errors.length_km is None:
        return lambda: np.sqrt(rho) * rng.normal() + np.sqrt(1 - rho) * rng.normal(size=n)
    a, b = np.deg2rad(glaciers["lon"].to_numpy()), np.deg2rad(glaciers["lat"].to_numpy())
    unit = np.stack([np.cos(b) * np.cos(a), np.cos(b) * np.sin(a), np.sin(b)], axis=1)
    matrix = rho * np.exp(-EARTH_RADIUS_KM / errors.length_km * np.arccos(np.clip(unit @ unit.T, -1, 1)))
    np.fill_diagonal(matrix, 1.0)
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = vectors * np.sqrt(np.maximum(values, 0.0))
    return lambda: root @ rng.normal(size=n)


def simulate(
    world: World, settings: ChangeSettings, draws: int, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Estimates of many drawn regions beside their truth.

    Parameters
    ----------
    world : what is true
    settings : what the estimates assume and how they filter
    draws : number of regions

    Returns
    -------
    regions : one row a draw and method: ``truth``, ``estimate``, ``std`` (%/yr) of the region's relative rate
    glaciers : shares of single areas, and of single rates, whose interval (one deviation) holds the truth
    """
    rng = np.random.default_rng(seed)
    parts = [draw_region(world, rng, f"{draw:06d}-") for draw in range(draws)]
    # Single glaciers know nothing of their region: those of all draws are done at once.
    glaciers, baseline, areas = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    year = int(areas["year"].iloc[0])
    changes, _ = area_changes(baseline, areas, settings)
    inventory = inventory_frame(glaciers, settings)
    true = glaciers.set_index("glacier_id")
    rate = (true["true_area_1"] - true["true_area_0"]) / world.years
    rows = []
    of_draw = changes["glacier_id"].str.slice(0, 6).astype(int).to_numpy()  # sorted, as the ids are
    edges = np.searchsorted(of_draw, np.arange(draws + 1))
    for draw in range(draws):
        mine = changes.iloc[edges[draw] : edges[draw + 1]]
        own = inventory.iloc[draw * world.glaciers : (draw + 1) * world.glaciers]
        known = mine["glacier_id"].to_numpy()
        truths = {
            extrapolated: 100 * rate[ids].sum() / true.loc[ids, "true_area_0"].sum()
            for extrapolated, ids in ((True, own.index), (False, known))
        }
        groups = [("region", "all", own.index)]
        for total in total_rows(own, mine, parts[draw][2], settings, year, 2015, groups):
            method = str(total["method"])
            truth = truths[method.startswith("extrapolated")]
            rows.append((draw, method, truth, total.get("rate_pct_per_year"), total.get("rate_std_pct_per_year")))
    inside_area = [
        np.abs(measured["area_km2"].to_numpy() - true.loc[measured["glacier_id"], column].to_numpy())
        <= measured["std_km2"].to_numpy()
        for measured, column in ((baseline, "true_area_0"), (areas, "true_area_1"))
    ]
    single = changes.set_index("glacier_id")
    off = (single["rate_km2_per_year"] - rate[single.index]).abs()
    regions = pd.DataFrame(rows, columns=["draw", "method", "truth", "estimate", "std"]).astype(
        {"truth": float, "estimate": float, "std": float}
    )
    inside_rate = float((off <= single["rate_std_km2_per_year"]).mean())
    return regions, {"areas": float(np.mean(inside_area)), "rates": inside_rate}


def summarize(regions: pd.DataFrame) -> pd.DataFrame:
    """By method: ``bias`` and ``rmse`` of the regional rate, mean reported ``std`` (%/yr), and ``coverage``, the share
    of draws whose interval of one deviation holds the truth (68% if it is honest; ``coverage_std`` is its own error).
    """
    known = regions.dropna(subset=["estimate", "std"])
    off = known["estimate"] - known["truth"]
    known = known.assign(off=off, square=off**2, inside=off.abs() <= known["std"])
    out = known.groupby("method", sort=True).agg(
        draws=("off", "size"), truth=("truth", "mean"), bias=("off", "mean"), square=("square", "mean"),
        std=("std", "mean"), coverage=("inside", "mean"),
    )  # fmt: skip
    out["rmse"] = np.sqrt(out.pop("square"))
    out["coverage_std"] = np.sqrt(out["coverage"] * (1 - out["coverage"]) / out["draws"])
    return out[["draws", "truth", "bias", "rmse", "std", "coverage", "coverage_std"]]


_BASE = World()
#: name -> (what it asks, world, changes of the settings)
SCENARIOS: dict[str, tuple[str, World, dict[str, Any]]] = {
    "published": (
        "Everything as the published procedure assumes: errors fully dependent between glaciers, none between years.",
        _BASE, {},
    ),
    "independent": (
        "Errors of glaciers are independent, and the estimate knows it.",
        replace(_BASE, errors=Errors(correlation=0.0)), {"between_glacier_correlation": 0.0},
    ),
    "partly_dependent": (
        "Errors correlate by 0.3, and the estimate knows it.",
        replace(_BASE, errors=Errors(correlation=0.3)), {"between_glacier_correlation": 0.3},
    ),
    "partly_dependent_carried": (
        "The same, and the error of the baseline as a divisor is not left out (change.baseline_error: carried).",
        replace(_BASE, errors=Errors(correlation=0.3)),
        {"between_glacier_correlation": 0.3, "baseline_error": "carried"},
    ),
    "decaying": (
        "Errors correlate over 50 km, and the estimate knows it.",
        replace(_BASE, errors=Errors(correlation=1.0, length_km=50.0)), {"correlation_length_km": 50.0},
    ),
    "assumed_too_much": (
        "Errors correlate by 0.3; the estimate assumes full dependence (the published choice).",
        replace(_BASE, errors=Errors(correlation=0.3)), {},
    ),
    "assumed_too_little": (
        "Errors correlate by 0.3; the estimate assumes independence.",
        replace(_BASE, errors=Errors(correlation=0.3)), {"between_glacier_correlation": 0.0},
    ),
    "shared_in_time": (
        "Three quarters of the error's variance are the same in both years, and cancel; the estimate does not know.",
        replace(_BASE, errors=Errors(correlation=0.3, shared_in_time=0.75)), {"between_glacier_correlation": 0.3},
    ),
    "shared_in_time_known": (
        "The same, and the estimate knows it (change.between_year_correlation).",
        replace(_BASE, errors=Errors(correlation=0.3, shared_in_time=0.75)),
        {"between_glacier_correlation": 0.3, "between_year_correlation": 0.75},
    ),
    "too_confident": (
        "Reported deviations are half the true ones.",
        replace(_BASE, errors=Errors(correlation=0.3, reported=0.5)), {"between_glacier_correlation": 0.3},
    ),
    "noisy": (
        "Images twice as noisy: most single changes drown, and the signal-to-noise filter keeps the large ones.",
        replace(_BASE, errors=Errors(relative_at_1km2=0.1, correlation=0.3)), {"between_glacier_correlation": 0.3},
    ),
    "noisy_without_recall": (
        "The same without the recall filter, which drops glaciers whose baseline came out too small (change.filter).",
        replace(_BASE, errors=Errors(relative_at_1km2=0.1, correlation=0.3)),
        {"between_glacier_correlation": 0.3, "filter": ["snr"]},
    ),
}  # fmt: skip


def run_scenarios(
    draws: int = 300, seed: int = 0, names: Sequence[str] | None = None, workers: int | None = None
) -> pd.DataFrame:
    """The table of docs/validation.md: one row a scenario and method, with ``question``, the columns of
    :func:`summarize`, and the coverage of single areas and rates. Scenarios run in ``workers`` processes (one a core).

    Raises
    ------
    ValueError
        if there is no scenario of a name.
    """
    wanted = list(names or SCENARIOS)
    unknown = [name for name in wanted if name not in SCENARIOS]
    if unknown:
        raise ValueError(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    tasks = [(name, draws, seed) for name in wanted]
    workers = min(workers or default_workers(), len(tasks))
    if workers == 1:
        return pd.concat([_scenario(*task) for task in tasks], ignore_index=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pd.concat(pool.map(_scenario, *zip(*tasks, strict=True)), ignore_index=True)


def _scenario(name: str, draws: int, seed: int) -> pd.DataFrame:
    question, world, update = SCENARIOS[name]
    regions, single = simulate(world, ChangeSettings.model_validate(update), draws, seed)
    table = summarize(regions).reset_index()
    return table.assign(
        scenario=name, question=question, single_area_coverage=single["areas"], single_rate_coverage=single["rates"]
    )
