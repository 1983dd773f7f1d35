"""A statistical simulator of area intervals: what the published and the conformal tau cover, without any images.

Belongs here: drawing validation and test glaciers with known errors, fitting both rules as the platform does, counting.
Does not belong here: the rules (``ensemble.intervals``, ``ensemble.conformal``); regional rates (``simulator``).

The map of a glacier is idealized to a profile across its margin. Each ensemble member draws the margin at a place of
its own and lets the probability fall across it as a logistic function of distance with a length of its own; what all
members share is how far they are off the true margin. Mean and deviation over the members, bounds, features and
covering taus then come from the profile as they come from a map (METHOD section 7); areas are the perimeter times a
length.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from dl4gam_assets.compute import default_workers
from dl4gam_assets.ensemble import conformal_classes, conformal_taus, fit_tau
from dl4gam_assets.settings import CalibrationSettings

#: Width of the ground around an outline that may count, km (METHOD section 7: the 20 m zone).
ZONE_KM = 0.02
#: Cells of the profile outside and inside the true margin; what lies farther inside is ice to every member.
_OUTSIDE, _INSIDE = 25, 200
_CELL_KM = ZONE_KM / _OUTSIDE
#: Perimeter over that of a circle of the same area; tongues and ribs make it about this.
SHAPE = 1.8
METHODS = ("published", "conformal")


@dataclass(frozen=True)
class IntervalWorld:
    """Glaciers and how their maps err. Lengths in km, areas in km2."""

    #: Glaciers that tau is fitted on, and that it is judged on.
    validation: int = 150
    test: int = 150
    #: Members of the ensemble.
    members: int = 10
    #: Offset of the mapped margin, common to all members, from the true one; the scatter of the members about it; and
    #: the blur of a member's margin: their usual sizes.
    offset_km: float = 0.006
    member_km: float = 0.003
    blur_km: float = 0.008
    #: Share of debris-covered glaciers among the judged ones, and (null: the same) among the validation glaciers.
    debris: float = 0.2
    validation_debris: float | None = None
    #: The offset of debris-covered glaciers is so many times larger; that of others grows as area**-size_power.
    debris_factor: float = 1.0
    size_power: float = 0.0
    #: How much of that the maps show: 1: members scatter and blur as much as they err, 0: nothing in the maps tells.
    told: float = 1.0
    #: Degrees of freedom of Student's t for the offsets (null: normal).
    tails: float | None = None
    #: Offsets of the judged glaciers over those of the validation glaciers: a later year with worse images.
    later: float = 1.0
    #: Offset that all glaciers of a side share (standard deviation, km), drawn apart for both: images of one day.
    shared_km: float = 0.0


class Draw(NamedTuple):
    """Glaciers: tables ``glaciers`` and ``debris`` as far as classes need them, features of tau, and what is true."""

    glaciers: pd.DataFrame
    debris: pd.DataFrame
    features: pd.DataFrame
    truth: np.ndarray
    sure: np.ndarray  # km2 inside of the profile
    cell: np.ndarray  # km2 of a cell of the profile
    low: np.ndarray  # (n, cells) mean - std over the members, -inf where the glacier is too narrow for the cell
    high: np.ndarray  # mean + std
    covering: np.ndarray


def draw_glaciers(
    world: IntervalWorld, n: int, debris: float, factor: float, rng: np.random.Generator, prefix: str
) -> Draw:
    """``n`` glaciers of at least 0.1 km2, sized as in the Alps; offsets are ``factor`` times the usual ones."""
    low, high = 0.1**-0.7, 20.0**-0.7
    area = (low + rng.random(n) * (high - low)) ** (-1 / 0.7)
    perimeter = SHAPE * 2 * np.sqrt(np.pi * area)
    covered = rng.random(n) < debris
    harder = np.where(covered, world.debris_factor, 1.0) * area**-world.size_power
    noise = rng.normal(size=n) if world.tails is None else rng.standard_t(world.tails, size=n)
    shared = rng.normal(0, world.shared_km) if world.shared_km else 0.0
    # The zone of the outline holds the truth, and nothing beyond it counts.
    width = np.minimum(0.9 * area / perimeter, _INSIDE * _CELL_KM)
    offset = np.clip(factor * world.offset_km * harder * noise + shared, -width, ZONE_KM)
    shown = harder**world.told * np.exp(rng.normal(0, 0.25, n))
    inside = np.floor(width / _CELL_KM).astype(int)
    mean, std = _profiles(world, offset, shown, rng)
    there = np.arange(-_INSIDE, _OUTSIDE) >= -inside[:, None]
    below, above = np.where(there, mean - std, -np.inf), np.where(there, mean + std, -np.inf)
    cell = perimeter * _CELL_KM
    sure, zone = area - cell * inside, area + cell * _OUTSIDE

    def over_zone(values: np.ndarray) -> np.ndarray:
        total: np.ndarray = cell * np.where(there, values, 0.0).sum(axis=1)
        return total

    features = pd.DataFrame(
        {
            "log_area": np.log(np.maximum(sure + over_zone(mean >= 0.5), 1e-4)),
            "mean_probability": (sure + over_zone(mean)) / zone,
            "epistemic_std": np.sqrt(over_zone(std**2) / zone),
            "aleatoric_std": np.sqrt(over_zone(mean * (1 - mean)) / zone),
        }
    )
    ids = [f"{prefix}{i:05d}" for i in range(n)]
    return Draw(
        pd.DataFrame({"glacier_id": ids, "inventory_area_km2": area}),
        pd.DataFrame({"glacier_id": ids, "debris_km2": np.where(covered, 0.4, 0.0) * area}),
        features, area, sure, cell, below, above, _covering_tau(below, above, inside),
    )  # fmt: skip


def _profiles(
    world: IntervalWorld, offset: np.ndarray, shown: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) deviation of the members' probabilities in each cell, (n, cells), outward."""
    size = (len(offset), world.members, 1)
    place = offset[:, None, None] + world.member_km * shown[:, None, None] * rng.normal(size=size)
    blur = world.blur_km * shown[:, None, None] * np.exp(rng.normal(0, 0.15, size))
    distance = (np.arange(-_INSIDE, _OUTSIDE) + 0.5) * _CELL_KM
    z = ((distance - place) / blur).astype(np.float32)
    probability = 1 / (1 + np.exp(np.clip(z, -60, 60)))
    return probability.mean(axis=1, dtype=np.float64), probability.std(axis=1, dtype=np.float64)


def _covering_tau(below: np.ndarray, above: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The largest tau (steps of 0.001, at most 0.5) whose interval holds the truth: no more cells in the lower mask
    than lie inside the true margin, and no fewer in the upper one."""
    rows = np.arange(len(inside))
    first_too_many = -np.sort(-below, axis=1)[rows, inside]  # in no lower mask: 1 - tau is above it
    last_needed = -np.sort(-above, axis=1)[rows, np.maximum(inside - 1, 0)]
    limit = np.where(inside > 0, np.minimum(1 - first_too_many, last_needed), 1 - first_too_many)
    tau: np.ndarray = np.clip(np.floor(1000 * limit - 1e-6) / 1000, 0.0, 0.5)
    return tau


def bounds(draw: Draw, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper area (km2) of each glacier at its tau; at tau 0 nothing and the whole zone."""
    certain = (draw.low >= (1 - tau)[:, None]).sum(axis=1)
    possible = (draw.high >= tau[:, None]).sum(axis=1)
    lower = np.where(tau > 0, draw.sure + draw.cell * certain, 0.0)
    return lower, draw.sure + draw.cell * possible


def simulate_intervals(world: IntervalWorld, settings: CalibrationSettings, draws: int, seed: int = 0) -> pd.DataFrame:
    """Coverage and width of both intervals over many drawn regions.

    Returns
    -------
    DataFrame: method, group (``all``, each debris class, size class, and both), coverage (share of test glaciers whose
    interval holds the truth), coverage_std (its error over draws), spread (standard deviation of the coverage from one
    region to the next), half_width (mean of (upper - lower) / 2 / area), glaciers (judged in all).
    """
    rng = np.random.default_rng(seed)
    rows = []
    mix = world.debris if world.validation_debris is None else world.validation_debris
    for number in range(draws):
        known = draw_glaciers(world, world.validation, mix, 1.0, rng, "V")
        judged = draw_glaciers(world, world.test, world.debris, world.later, rng, "T")
        rule = fit_tau(known.features, known.covering, settings)
        classes = pd.concat([conformal_classes(d.glaciers, d.debris, settings) for d in (known, judged)])
        scores = known.glaciers[["glacier_id"]].assign(covering_tau=known.covering)
        taus = {
            "published": rule.predict(judged.features),
            "conformal": conformal_taus(
                scores, scores, classes, judged.glaciers["glacier_id"].tolist(), settings
            )["tau_conformal"].to_numpy(),
        }  # fmt: skip
        own = classes.iloc[world.validation :]
        for method, tau in taus.items():
            lower, upper = bounds(judged, tau)
            rows.append(
                pd.DataFrame(
                    {
                        "draw": number,
                        "method": method,
                        "debris_class": own["debris_class"].to_numpy(),
                        "size_class": own["size_class"].to_numpy(),
                        "inside": (lower <= judged.truth + 1e-12) & (judged.truth <= upper + 1e-12),
                        "half_width": (upper - lower) / 2 / judged.truth,
                    }
                )
            )
    everything = pd.concat(rows, ignore_index=True)
    everything["both"] = everything["size_class"] + ", " + everything["debris_class"]
    parts = [_counted(everything.assign(group="all"))]
    parts += [_counted(everything.assign(group=everything[name])) for name in ("debris_class", "size_class", "both")]
    return pd.concat(parts, ignore_index=True)


def _counted(rows: pd.DataFrame) -> pd.DataFrame:
    each = rows.groupby(["method", "group", "draw"], sort=True)["inside"].agg(["mean", "size"]).reset_index()
    out = rows.groupby(["method", "group"], sort=True).agg(
        coverage=("inside", "mean"), half_width=("half_width", "mean"), glaciers=("inside", "size")
    )
    by = each.groupby(["method", "group"], sort=True)["mean"]
    out["spread"] = by.std(ddof=0)
    out["coverage_std"] = out["spread"] / np.sqrt(by.size())
    return out.reset_index()[["method", "group", "coverage", "coverage_std", "spread", "half_width", "glaciers"]]


_BASE = IntervalWorld()
#: name -> (what it asks, world)
INTERVAL_SCENARIOS: dict[str, tuple[str, IntervalWorld]] = {
    "as_assumed": ("150 validation glaciers; the maps are blurred where they err.", _BASE),
    "at_the_limit": (
        "30 validation glaciers, the fewest that the published rule fits its five coefficients to.",
        replace(_BASE, validation=30),
    ),
    "few": ("25 validation glaciers: the published rule is one regional quantile.", replace(_BASE, validation=25)),
    "very_few": ("8 validation glaciers: the ranks are coarse.", replace(_BASE, validation=8)),
    "two": (
        "2 validation glaciers: no rank is low enough, and the interval is all of the zone.",
        replace(_BASE, validation=2),
    ),
    "debris_hidden": (
        "Debris-covered glaciers err three times as much, and nothing in their maps tells.",
        replace(_BASE, debris_factor=3.0, told=0.0),
    ),
    "debris_hidden_few": (
        "The same with 40 validation glaciers.",
        replace(_BASE, debris_factor=3.0, told=0.0, validation=40),
    ),
    "small_hidden": (
        "Errors grow towards small glaciers, and nothing in the maps tells.",
        replace(_BASE, size_power=0.5, told=0.0),
    ),
    "heavy_tails": (
        "Errors with heavy tails (Student's t, 2 degrees of freedom), 60 validation glaciers.",
        replace(_BASE, tails=2.0, validation=60),
    ),
    "other_mix": (
        "The validation strip has 5 % debris-covered glaciers, the test block 40 %; they err three times as much.",
        replace(_BASE, debris=0.4, validation_debris=0.05, debris_factor=3.0, told=0.0),
    ),
    "later_year": (
        "A later year whose images err half as much again: nothing was fitted on it.",
        replace(_BASE, later=1.5),
    ),
    "shared_error": (
        "All glaciers of the validation strip share an error of 5 m, those of the test block another one.",
        replace(_BASE, shared_km=0.005),
    ),
}


def run_interval_scenarios(
    draws: int = 300,
    seed: int = 0,
    names: Sequence[str] | None = None,
    workers: int | None = None,
    settings: CalibrationSettings | None = None,
) -> pd.DataFrame:
    """One row a scenario, method and group, with ``question`` and the columns of :func:`simulate_intervals`.

    Raises
    ------
    ValueError
        if there is no scenario of a name.
    """
    wanted = list(INTERVAL_SCENARIOS if names is None else names)
    unknown = [name for name in wanted if name not in INTERVAL_SCENARIOS]
    if unknown:
        raise ValueError(f"no interval scenario {unknown[0]!r}; there are {', '.join(INTERVAL_SCENARIOS)}")
    tasks = [(name, draws, seed, settings or CalibrationSettings()) for name in wanted]
    workers = min(workers or default_workers(), len(tasks))
    if workers <= 1:
        return pd.concat([_scenario(*task) for task in tasks], ignore_index=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pd.concat(pool.map(_scenario, *zip(*tasks, strict=True)), ignore_index=True)


def _scenario(name: str, draws: int, seed: int, settings: CalibrationSettings) -> pd.DataFrame:
    question, world = INTERVAL_SCENARIOS[name]
    return simulate_intervals(world, settings, draws, seed).assign(scenario=name, question=question)
