"""The stored forest predicts what scikit-learn's does, the same every time, from a file without code in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dl4gam_assets.ensemble import fit_forest, load_forest, sample_pixels
from dl4gam_assets.settings import BaselineSettings

NAMES = ["red", "swir16", "slope"]
SETTINGS = BaselineSettings(trees=7, min_leaf_px=3)


def _pixels(seed: int = 0, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (count, 3)).astype(np.float32)
    return x, (x[:, 0] - x[:, 1] + 0.3 * rng.normal(size=count)) > 0.4


def test_arrays_walk_as_scikit_learn_does(tmp_path: Path) -> None:
    from sklearn.ensemble import RandomForestClassifier

    x, y = _pixels()
    forest = fit_forest(x, y, NAMES, SETTINGS, seed=5)
    forest.save(tmp_path / "forest.safetensors")
    stored = load_forest(tmp_path / "forest.safetensors", NAMES)
    theirs = RandomForestClassifier(7, min_samples_leaf=3, random_state=5).fit(x, y)
    # Values on the thresholds themselves too, where rounding would send a pixel to the wrong side.
    edges = np.concatenate([t.tree_.threshold[t.tree_.feature == 0] for t in theirs.estimators_]).astype(np.float32)
    test = _pixels(1, 10_000)[0]
    test[: len(edges), 0] = edges[: len(test)]
    got = stored.probability(test.T.reshape(3, 100, 100), np.ones((100, 100), bool))
    np.testing.assert_allclose(got.ravel(), theirs.predict_proba(test)[:, 1], atol=1e-6)
    assert got.dtype == np.float32 and ((got.ravel() >= 0.5) == (test[:, 0] - test[:, 1] > 0.4)).mean() > 0.9


def test_the_same_seed_gives_the_same_file_on_any_number_of_threads(tmp_path: Path) -> None:
    x, y = _pixels()
    hashes = [
        fit_forest(x, y, NAMES, SETTINGS, seed=seed, threads=threads).save(tmp_path / f"{k}.safetensors")
        for k, (seed, threads) in enumerate([(1, 1), (1, 2), (2, 1)])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_missing_channels_are_the_mean_and_other_pixels_are_left_out() -> None:
    x, y = _pixels()
    x[::5, 2] = np.nan
    forest = fit_forest(x, y, NAMES, SETTINGS, seed=0)
    np.testing.assert_allclose(forest.fill, np.nanmean(x.astype(float), axis=0), atol=1e-5)
    stack = np.full((3, 2, 2), np.nan, np.float32)
    where = np.array([[True, False], [False, True]])
    got = forest.probability(stack, where)
    np.testing.assert_array_equal(np.isnan(got), ~where)
    full = forest.probability(np.broadcast_to(forest.fill[:, None, None], (3, 2, 2)), where)
    np.testing.assert_array_equal(got, full)


def test_glaciers_give_alike_however_large() -> None:
    rng = np.random.default_rng(0)
    sizes = []
    for side in (12, 40, 3):
        stack = np.arange(2 * side * side, dtype=np.float32).reshape(2, side, side)
        usable = np.ones((side, side), bool)
        usable[0] = False
        x, y = sample_pixels(stack, usable, stack[0] > side * side / 2, 50, rng)
        sizes.append(len(y))
        assert len(np.unique(x[:, 0])) == len(x) and (x[:, 0] >= side).all()  # none twice, none unusable
        np.testing.assert_array_equal(y, x[:, 0] > side * side / 2)
    assert sizes == [50, 50, 6]


def test_one_class_and_refusals(tmp_path: Path) -> None:
    x, _ = _pixels(count=50)
    where = np.ones((5, 10), bool)
    for answer in (True, False):
        forest = fit_forest(x, np.full(50, answer), NAMES, SETTINGS, seed=0)
        assert (forest.probability(x.T.reshape(3, 5, 10), where) == float(answer)).all()
    with pytest.raises(ValueError, match="3 channels, not on 2"):
        forest.probability(np.zeros((2, 5, 10)), where)
    with pytest.raises(ValueError, match="no usable training pixel"):
        fit_forest(x[:0], np.zeros(0, bool), NAMES, SETTINGS, seed=0)
    forest.save(tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"f.safetensors was fitted on the channels .*'slope'.* not on .*'dem'"):
        load_forest(tmp_path / "f.safetensors", ["red", "swir16", "dem"])
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"no stored forest.*materialize band_ratio_baseline"):
        load_forest(tmp_path / "broken.safetensors")
