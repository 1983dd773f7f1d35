"""Thresholds: the histogram pass finds what trying each threshold finds, and what is applied is what was fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.ensemble import apply_baseline, fit_baseline, fit_oracle
from dl4gam_assets.ensemble.baseline import BLUES, LEVELS, RATIOS, VISIBLE_RATIOS, Sample
from dl4gam_assets.tables import TABLES


def _glaciers(seed: int, bands: list[str], count: int = 3) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out: list[Sample] = []
    for _ in range(count):
        shape = (rng.integers(2, 9), rng.integers(2, 9))
        # On a grid, so that many values tie with thresholds; some negative, as atmospheric correction makes them.
        values = {b: np.round(rng.uniform(-0.02, 1.0, shape), 2).astype(np.float32) for b in bands}
        valid = rng.random(shape) < 0.8
        for band in values.values():
            # Missing under clouds, and a few in usable pixels too, where one band is bad.
            band[(~valid & (rng.random(shape) < 0.5)) | (rng.random(shape) < 0.1)] = np.nan
        out.append((values, rng.random(shape) < 0.5, valid, float(rng.uniform(0.1, 9))))
    return out


def _score(samples: list[Sample], row: dict[str, object]) -> float:
    total = weights = 0.0
    for values, target, valid, weight in samples:
        mask = apply_baseline(values, row)
        tp, union = (mask & target & valid).sum(), ((mask | target) & valid).sum()
        total += weight * tp / max(union, 1)
        weights += weight
    return total / weights


def _every(bands: list[str]) -> list[dict[str, object]]:
    if "swir16" in bands:
        return [
            {"numerator": "red", "denominator": "swir16", "ratio_threshold": r, "blue_threshold": b if b else None}
            for r in RATIOS for b in (BLUES if "blue" in bands else [0])
        ]  # fmt: skip
    rows: list[dict[str, object]] = [
        {"numerator": b, "denominator": None, "ratio_threshold": t, "blue_threshold": None}
        for b in bands for t in LEVELS
    ]  # fmt: skip
    pairs = [(b, "nir") for b in ("red", "blue") if {b, "nir"} <= set(bands)]
    return rows + [
        {"numerator": b, "denominator": n, "ratio_threshold": t, "blue_threshold": None}
        for b, n in pairs for t in VISIBLE_RATIOS
    ]  # fmt: skip


@pytest.mark.parametrize("bands", [["blue", "red", "swir16"], ["red", "swir16"], ["blue", "nir"], ["green"]])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_best_of_all_thresholds_is_found(bands: list[str], seed: int) -> None:
    samples = _glaciers(seed, bands)
    table = fit_baseline(iter(samples), bands)
    TABLES["baseline"].conform(table.assign(fold=1))
    assert len(table) == 1
    row = table.iloc[0]
    assert _score(samples, row.to_dict()) == pytest.approx(row["fit_iou"], abs=1e-9)
    best = max(_score(samples, r) for r in _every(bands))
    assert row["fit_iou"] == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("bands", [["blue", "red", "swir16"], ["blue", "red", "nir"]])
def test_the_oracle_is_an_upper_bound_on_each_glacier(bands: list[str]) -> None:
    samples = _glaciers(11, bands, 8)
    regional = fit_baseline(samples, bands).iloc[0]
    names, better = set(), 0
    for sample in samples:
        oracle = fit_oracle(sample, bands).iloc[0]
        names.add(str(oracle["method"]))
        own, shared = _score([sample], oracle.to_dict()), _score([sample], regional.to_dict())
        assert own >= shared - 1e-12 and own == pytest.approx(oracle["fit_iou"], abs=1e-9)
        better += own > shared
    assert better and names == {"band ratio red/swir16 (oracle)" if "swir16" in bands else "best threshold (oracle)"}


def test_large_glaciers_decide() -> None:
    def place(split: float, weight: float) -> Sample:
        red = np.linspace(0.05, 0.95, 40, dtype=np.float32).reshape(5, 8)
        return {"red": red, "swir16": np.full_like(red, 0.2)}, red > split, np.ones(red.shape, bool), weight

    small_first = fit_baseline([place(0.3, 1), place(0.7, 50)], ["red", "swir16"])
    assert small_first["ratio_threshold"][0] == pytest.approx(0.7 / 0.2, abs=0.15)
    assert small_first["blue_threshold"].isna().all()


def test_missing_pixels_are_no_glacier_and_dark_swir_is_no_trouble() -> None:
    bands = {"red": np.array([[0.5, np.nan, 0.5]]), "swir16": np.array([[0.0, 0.1, np.nan]])}
    row = {"numerator": "red", "denominator": "swir16", "ratio_threshold": 2.0, "blue_threshold": None}
    np.testing.assert_array_equal(apply_baseline(bands, row), [[True, False, False]])


def test_methods_say_what_they_are() -> None:
    assert fit_baseline(_glaciers(1, ["blue", "red", "swir16"]), ["blue", "red", "swir16"])["method"][0] == (
        "band ratio red/swir16"
    )
    # Ice that is bright and rock that is dark; then ice that only its colour tells from rock.
    ice = np.arange(100).reshape(10, 10) % 3 == 0
    level = np.random.default_rng(0).uniform(0.2, 0.9, ice.shape).astype(np.float32)
    everywhere = np.ones_like(ice)
    bright = {"blue": np.where(ice, 0.6, 0.2).astype(np.float32), "nir": level}
    assert fit_baseline([(bright, ice, everywhere, 1.0)], ["blue", "nir"])["method"][0] == "threshold blue"
    coloured = {"blue": np.where(ice, 1.4, 0.9).astype(np.float32) * level, "nir": level}
    table = fit_baseline([(coloured, ice, everywhere, 1.0)], ["blue", "nir"])
    assert table["method"][0] == "ratio blue/nir" and table["fit_iou"][0] == 1.0
    with pytest.raises(ValueError, match="no glacier"):
        fit_baseline([], ["red", "swir16"])


# --------------------------------------------------------------------------------------------- real data
def test_the_ratio_tells_real_ice_from_rock(real_data: Path) -> None:
    """Hand-labelled Sentinel-2 surface reflectance: a ratio in the usual range, and most pixels right."""
    path = real_data / "s2_labelled_spectra" / "Sentinel-2_SR_training_data.csv.gz"
    frame = pd.read_csv(path)
    classes = frame["class"].astype(int)
    snow_ice_rock = classes.isin([1, 2, 3, 4])  # snow, shadowed snow, ice, rock; water is left out
    frame, classes = frame[snow_ice_rock], classes[snow_ice_rock]
    scale = 1e4 if frame["B4"].max() > 10 else 1.0
    bands = {
        n: (frame[b].to_numpy(np.float32) / scale)[None] for n, b in (("blue", "B2"), ("red", "B4"), ("swir16", "B11"))
    }
    target = (classes <= 3).to_numpy()[None]
    table = fit_baseline([(bands, target, np.ones_like(target), 1.0)], list(bands))
    assert 0.9 <= table["ratio_threshold"][0] <= 2.5
    assert table["fit_iou"][0] > 0.9


def test_three_bands_of_a_real_scene(real_data: Path) -> None:
    """A clean late summer of Rhonegletscher without SWIR: ice brighter than what melted out."""
    with rasterio.open(real_data / "rhone_s2_series" / "S2_rhone_20160909.tif") as source:
        digits = source.read().astype(np.float32)
    with rasterio.open(real_data / "rhone_s2_series" / "masks.tif") as source:
        masks = source.read()
    valid = (masks[0] > 0) & (digits > 0).all(axis=0)
    bands = dict(zip(["blue", "nir_narrow", "nir"], digits / 1e4, strict=True))
    table = fit_baseline([(bands, masks[2] > 0, valid, 1.0)], list(bands))
    assert table["method"][0].startswith(("threshold", "ratio")) and table["fit_iou"][0] > 0.85
