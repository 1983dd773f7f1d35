"""The statistical simulator: what it draws is what it says, and what the estimates claim holds where it should."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dl4gam_assets.change.simulator import (
    SCENARIOS,
    Errors,
    World,
    _correlated,
    draw_region,
    measure,
    run_scenarios,
    simulate,
    summarize,
)
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


def _of(name: str, draws: int, **settings: object) -> pd.DataFrame:
    _, world, update = SCENARIOS[name]
    regions, _ = simulate(world, ChangeSettings.model_validate(update | settings), draws, seed=4)
    return summarize(regions)


@pytest.mark.parametrize("name", ["published", "partly_dependent"])
def test_intervals_cover_where_the_errors_are_what_the_estimate_assumes(name: str) -> None:
    """68 %, and no bias, without the signal-to-noise filter: a thousand draws know it to 1.5 % (one deviation)."""
    table = _of(name, 1000, baseline_error="carried")
    for method in ("measured", "extrapolated_without_snr"):
        assert 0.63 < table.loc[method, "coverage"] < 0.73
        assert abs(table.loc[method, "bias"]) < 0.1


def test_single_areas_and_rates_are_as_certain_as_stated() -> None:
    world = World(glaciers=80, errors=Errors(correlation=0.0))
    _, single = simulate(world, ChangeSettings(between_glacier_correlation=0.0), draws=200, seed=4)
    assert 0.66 < single["areas"] < 0.71 and 0.66 < single["rates"] < 0.71


def test_a_baseline_error_that_is_left_out_states_too_much() -> None:
    """The published percentages: the error of the area that a rate is divided by cancels a part of the rate's own."""
    left_out, carried = (_of("partly_dependent", 200, baseline_error=how) for how in ("left_out", "carried"))
    assert left_out.loc["measured", "std"] > 1.05 * carried.loc["measured", "std"]
    assert left_out.loc["measured", "rmse"] == carried.loc["measured", "rmse"]


def test_errors_that_decay_with_distance_are_covered_by_a_length_that_knows_it() -> None:
    table = _of("decaying", 300, baseline_error="carried")
    assert 0.60 < table.loc["measured", "coverage"] < 0.76 and abs(table.loc["measured", "bias"]) < 0.1


def test_a_wrong_correlation_covers_too_much_or_too_little() -> None:
    """Full dependence (published) is cautious where the errors correlate by 0.3; independence is the worse mistake."""
    too_much, too_little = (_of(name, 150) for name in ("assumed_too_much", "assumed_too_little"))
    for method in ("measured", "extrapolated_without_snr"):
        assert too_much.loc[method, "coverage"] > 0.85
        assert too_little.loc[method, "coverage"] < 0.45


def test_errors_that_both_years_share_cancel_for_those_who_know_it() -> None:
    """Without knowing, nearly every interval holds; with change.between_year_correlation 68 % of narrower ones do."""
    unknown = _of("shared_in_time", 150).loc["measured"]
    known = _of("shared_in_time_known", 600, baseline_error="carried").loc["measured"]
    assert unknown["coverage"] > 0.88 and 0.62 < known["coverage"] < 0.74
    assert known["std"] < 0.7 * unknown["std"]


def test_the_signal_to_noise_filter_leans_towards_loss() -> None:
    """Known and documented: it keeps the large changes."""
    world = World(glaciers=80, errors=Errors(relative_at_1km2=0.1, correlation=0.0))
    regions, _ = simulate(world, ChangeSettings(between_glacier_correlation=0.0), draws=40, seed=1)
    table = summarize(regions)
    assert table.loc["filtered", "bias"] < -0.2 < table.loc["measured", "bias"]
    assert table.loc["filtered", "coverage"] < table.loc["measured", "coverage"]


def test_the_recall_filter_leans_too_where_images_are_noisy() -> None:
    """It drops glaciers whose baseline came out too small: those that are left lose from too large a start."""
    with_recall, without = (
        _of(name, 150).loc["extrapolated_without_snr", "bias"] for name in ("noisy", "noisy_without_recall")
    )
    assert with_recall < -0.15 < without - 0.05 and abs(without) < 0.15


def test_correlations_that_are_no_matrix_are_drawn_as_the_matrix_would() -> None:
    """One number for all glaciers and one for each: the correlation of any two is rho, as the matrix says."""
    rng = np.random.default_rng(3)
    glaciers, _, _ = draw_region(World(glaciers=6), rng)
    for errors in (Errors(correlation=0.4), Errors(correlation=0.4, length_km=1e9)):
        draw = _correlated(glaciers, errors, rng)
        z = np.array([draw() for _ in range(20_000)])
        assert np.cov(z.T) == pytest.approx(0.4 + 0.6 * np.eye(6), abs=0.03)


def test_scenarios_are_named() -> None:
    table = run_scenarios(draws=2, names=["published", "decaying"], workers=1)
    assert set(table["scenario"]) == {"published", "decaying"} and table["coverage"].between(0, 1).all()
    with pytest.raises(ValueError, match="no scenario 'nope'; there are published"):
        run_scenarios(draws=2, names=["nope"])
