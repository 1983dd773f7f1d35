"""The statistical simulator: what it draws is what it says, and what the estimates claim holds where it should."""

from __future__ import annotations

import numpy as np
import pytest

from dl4gam_assets.change.simulator import Errors, World, draw_region, measure, run_scenarios, simulate, summarize
from dl4gam_assets.settings import ChangeSettings


def test_drawn_errors_have_the_stated_deviation_and_correlation() -> None:
    rng = np.random.default_rng(1)
    glaciers, _, _ = draw_region(World(glaciers=40), rng)
    errors = Errors(relative_at_1km2=0.02, correlation=0.6, shared_in_time=0.5)
    draws = []
    for _ in range(3000):
        first, second = measure(glaciers, errors, rng, 8.0)
        truth = [glaciers[c].to_numpy() for c in ("true_area_0", "true_area_1")]
        draws.append(
            [
                (f["area_km2"].to_numpy() - t) / f["std_km2"].to_numpy()
                for f, t in ((first, truth[0]), (second, truth[1]))
            ]
        )
    z = np.array(draws)  # draws, years, glaciers
    assert z.std(axis=0) == pytest.approx(np.ones((2, 40)), abs=0.06)
    between = np.corrcoef(z[:, 0].T)
    assert between[~np.eye(40, dtype=bool)].mean() == pytest.approx(0.6, abs=0.04)
    in_time = [np.corrcoef(z[:, 0, g], z[:, 1, g])[0, 1] for g in range(40)]
    assert np.mean(in_time) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_intervals_cover_where_the_errors_are_what_the_estimate_assumes(rho: float) -> None:
    """68% within what 150 draws can tell, and a bias far below the deviation: without the signal-to-noise filter."""
    world = World(glaciers=80, errors=Errors(correlation=rho))
    regions, single = simulate(world, ChangeSettings(between_glacier_correlation=rho), draws=150, seed=4)
    table = summarize(regions).loc["measured"]
    assert 0.57 < table["coverage"] < 0.79
    assert abs(table["bias"]) < 0.1 + 3 * table["rmse"] / np.sqrt(150)
    assert 0.66 < single["areas"] < 0.71 and 0.66 < single["rates"] < 0.71


def test_the_signal_to_noise_filter_leans_towards_loss() -> None:
    """Known and documented: it keeps the large changes."""
    world = World(glaciers=80, errors=Errors(relative_at_1km2=0.1, correlation=0.0))
    regions, _ = simulate(world, ChangeSettings(between_glacier_correlation=0.0), draws=40, seed=1)
    table = summarize(regions)
    assert table.loc["filtered", "bias"] < -0.2 < table.loc["measured", "bias"]
    assert table.loc["filtered", "coverage"] < table.loc["measured", "coverage"]


def test_scenarios_are_named() -> None:
    table = run_scenarios(draws=2, names=["published", "decaying"], workers=1)
    assert set(table["scenario"]) == {"published", "decaying"} and table["coverage"].between(0, 1).all()
    with pytest.raises(ValueError, match="no scenario 'nope'; there are published"):
        run_scenarios(draws=2, names=["nope"])
