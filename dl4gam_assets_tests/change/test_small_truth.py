"""The small simulated region against its truth: areas, rates and intervals are near it, and the command prints them."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from dl4gam_assets.ensemble import conformal_tau, pooled_validation
from dl4gam_assets.publication.truth import known_truth, truth_tables
from dl4gam_assets.stages.coverage import measured_coverage
from dl4gam_assets_tests.small_region import YEARS, Small


@pytest.fixture(scope="module")
def tables(small: Small) -> dict[str, pd.DataFrame]:
    return truth_tables(small.region, small.storage)


def test_areas_are_near_their_truth_every_year(tables: dict[str, pd.DataFrame]) -> None:
    """Two small networks, sixteen epochs: together within a fifth, single glaciers within a quarter in the median."""
    areas = tables["areas"].set_index("year")
    assert areas.index.tolist() == list(YEARS) and (areas["n_glaciers"] >= 5).all()
    assert areas["bias_pct"].abs().max() < 20 and areas["median_error_pct"].max() < 25


def test_few_validation_glaciers_make_the_interval_wide_rather_than_wrong(small: Small) -> None:
    """Of five validation glaciers in all no rule can promise 68 % exactly; what it must not do is promise too much."""
    for judge, table in measured_coverage(small.region, small.storage).items():
        everything = table[table["grouping"] == "all"].set_index("rule")["coverage"]
        assert (everything >= 0.55).all(), judge


def test_rates_are_beside_the_true_ones(tables: dict[str, pd.DataFrame], small: Small) -> None:
    rates = tables["rates"]
    assert set(rates["year"]) == {2016, 2017} and {"measured", "extrapolated_without_snr"} <= set(rates["method"])
    truth = known_truth(small.region, small.storage)
    assert truth is not None
    every = truth.groupby("year")["area_km2"].sum()
    for row in rates[rates["method"] == "extrapolated_without_snr"].itertuples():
        assert row.truth_pct_per_year == pytest.approx(
            100 * (every[row.year] / every[2015] - 1) / (row.year - 2015), rel=0.25
        )  # over whole years here, over the images' dates there
        assert -6 < row.truth_pct_per_year < 0
    assert (rates["inside"] == (rates["bias"].abs() <= rates["rate_std_pct_per_year"])).all()
    assert rates["inside"].mean() >= 0.5


def test_the_command_prints_markdown(small: Small) -> None:
    done = small.cli("coverage", "--markdown")
    assert done.exit_code == 0, done.output
    blocks = dict(re.findall(r"(\w+) against the truth\n\n((?:\|.*\n)+)", done.output))
    assert set(blocks) == {"areas", "rates"}
    for name, block in blocks.items():
        lines = block.splitlines()
        assert len({line.count("|") for line in lines}) == 1, name
        assert len(lines) - 2 == len(truth_tables(small.region, small.storage)[name])
    plain = small.cli("coverage")
    assert plain.exit_code == 0 and "areas against the truth" in plain.output and "|---" not in plain.output


def test_a_fold_with_few_validation_glaciers_takes_those_of_all_folds(small: Small) -> None:
    settings = small.region.calibration
    scores, folds = (small.storage.read_table(name) for name in ("calibration_glaciers", "folds"))
    for fold, taus in small.storage.read_table("taus").groupby("fold"):
        own, pooled = pooled_validation(scores, folds, int(fold))
        assert len(own) < settings.min_glaciers and not set(taus["glacier_id"]) & set(pooled["glacier_id"])
        assert (taus["published_scope"] == "folds").all() and (taus["published_n"] == len(pooled)).all()
        np.testing.assert_array_equal(taus["tau_published"], conformal_tau(pooled["covering_tau"], settings.coverage))
        told = small.storage.read_table("calibration", fold=int(fold))
        assert (told["tau_scope"] == "folds").all() and (told["method"] == "regional_quantile").all()
        assert told["left_out_coverage"].between(0, 1).all()
