"""Conformal taus: ranks that promise, groups that fall back, and no glacier that shapes its own interval."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.ensemble import conformal_classes, conformal_tau, conformal_taus, pooled_validation
from dl4gam_assets.ensemble.conformal import EVERYTHING, LEVELS, conformal_rank
from dl4gam_assets.settings import CalibrationSettings

SETTINGS = CalibrationSettings(conformal_min_glaciers=4)


def region_of(seed: int, n: int, folds: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Glaciers, debris, roles by fold (each is tested once and may validate any other fold) and scores."""
    rng = np.random.default_rng(seed)
    ids = [f"g{i:02d}" for i in range(n)]
    glaciers = pd.DataFrame({"glacier_id": ids, "inventory_area_km2": 10 ** rng.uniform(-1, 1, n)})
    debris = glaciers[["glacier_id"]].assign(debris_km2=rng.choice([0.0, 0.3], n) * glaciers["inventory_area_km2"])
    tested = rng.integers(1, folds + 1, n)
    roles, scores = [], []
    for fold in range(1, folds + 1):
        for glacier_id, own in zip(ids, tested, strict=True):
            role = "test" if own == fold else str(rng.choice(["train", "valid"]))
            roles.append((glacier_id, fold, role))
            if role == "valid":
                scores.append((glacier_id, fold, round(float(rng.uniform(0, 0.5)), 3)))
    return (
        glaciers, debris, pd.DataFrame(roles, columns=["glacier_id", "fold", "role"]),
        pd.DataFrame(scores, columns=["glacier_id", "fold", "covering_tau"]),
    )  # fmt: skip


WORLDS = {"seed": st.integers(0, 2**32 - 1), "n": st.integers(1, 40), "folds": st.integers(1, 5)}


@settings(max_examples=60, deadline=None)
@given(**WORLDS)
def test_a_tested_glacier_judges_no_interval_of_its_fold(seed: int, n: int, folds: int) -> None:
    _, _, roles, scores = region_of(seed, n, folds)
    # Even a score that the fold itself must not have: a validation glacier that it tests too.
    wrong = roles[roles["role"] == "test"][["glacier_id", "fold"]].assign(covering_tau=0.001)
    for fold in range(1, folds + 1):
        tested = set(roles.loc[(roles["fold"] == fold) & (roles["role"] == "test"), "glacier_id"])
        own, pooled = pooled_validation(pd.concat([scores, wrong], ignore_index=True), roles, fold)
        for frame in (own, pooled):
            assert not tested & set(frame["glacier_id"]) and frame["glacier_id"].is_unique
        assert set(own["glacier_id"]) == set(scores.loc[scores["fold"] == fold, "glacier_id"])
        assert set(own["glacier_id"]) <= set(pooled["glacier_id"])
        # An own score stays; one of other folds is the lowest that there is.
        of_pool = pooled.set_index("glacier_id")["covering_tau"]
        assert (of_pool[own["glacier_id"]].to_numpy() == own["covering_tau"].to_numpy()).all()
        every = pd.concat([scores, wrong])
        for glacier_id in of_pool.index.difference(own["glacier_id"]):
            assert of_pool[glacier_id] == every.loc[every["glacier_id"] == glacier_id, "covering_tau"].min()
        alone, same = pooled_validation(scores, roles, fold, pool_folds=False)
        pd.testing.assert_frame_equal(alone, same)


@settings(max_examples=40, deadline=None)
@given(**WORLDS)
def test_the_order_of_rows_changes_nothing_and_the_finest_sound_group_is_taken(seed: int, n: int, folds: int) -> None:
    glaciers, debris, roles, scores = region_of(seed, n, folds)
    rng = np.random.default_rng(seed)

    def taus(mix: bool) -> pd.DataFrame:
        g, d, r, s = (
            (f.iloc[rng.permutation(len(f))].set_axis(rng.permutation(len(f)) + 3) if mix else f)
            for f in (glaciers, debris, roles, scores)
        )
        own, pooled = pooled_validation(s, r, 1)
        wanted = r.loc[(r["fold"] == 1) & (r["role"] == "test"), "glacier_id"].tolist()
        return conformal_taus(own, pooled, conformal_classes(g, d, SETTINGS), wanted, SETTINGS)

    straight = taus(False)
    pd.testing.assert_frame_equal(
        straight.sort_values("glacier_id", ignore_index=True), taus(True).sort_values("glacier_id", ignore_index=True)
    )
    own, pooled = pooled_validation(scores, roles, 1)
    classes = conformal_classes(glaciers, debris, SETTINGS).set_index("glacier_id")
    sources = {"fold": own, "folds": pooled}
    for row in straight.itertuples():
        for level in LEVELS:
            same = classes.loc[(classes[list(level)] == classes.loc[row.glacier_id, list(level)]).all(axis=1)].index
            group = ", ".join(classes.at[row.glacier_id, name] for name in level) or EVERYTHING
            found = {k: f.loc[f["glacier_id"].isin(same), "covering_tau"].to_numpy() for k, f in sources.items()}
            sound = [k for k, values in found.items() if len(values) >= SETTINGS.conformal_min_glaciers]
            scope = sound[0] if sound else "folds"
            if sound or not level:
                assert (row.conformal_group, row.conformal_scope) == (group, scope)
                assert row.conformal_n == len(found[scope])
                assert row.tau_conformal == conformal_tau(found[scope], SETTINGS.coverage)
                break


@given(n=st.integers(0, 300), coverage=st.floats(0.05, 0.95))
def test_the_rank_is_the_highest_that_keeps_the_promise(n: int, coverage: float) -> None:
    """The next score is below the k-th of n in k of n + 1 cases at most."""
    rank = conformal_rank(n, coverage)
    assert 0 <= rank <= n
    assert rank / (n + 1) <= 1 - coverage + 1e-9 and (rank + 1) / (n + 1) > 1 - coverage - 1e-9
    scores = np.linspace(0.01, 0.5, n)
    assert conformal_tau(scores[::-1], coverage) == (scores[rank - 1] if rank else 0.0)


def test_debris_in_several_rows_of_one_glacier_adds_up() -> None:
    glaciers = pd.DataFrame({"glacier_id": ["a", "b", "c"], "inventory_area_km2": [1.0, 1.0, 5.0]})
    debris = pd.DataFrame({"glacier_id": ["b", "a", "a"], "debris_km2": [0.09, 0.06, 0.06]})
    classes = conformal_classes(glaciers, debris, CalibrationSettings())
    assert classes["debris_class"].tolist() == ["debris-covered", "clean", "clean"]
    assert classes["size_class"].tolist() == ["0.5 to 2 km2", "0.5 to 2 km2", "from 2 km2"]


def test_a_glacier_without_classes_is_named() -> None:
    glaciers = pd.DataFrame({"glacier_id": ["a"], "inventory_area_km2": [1.0]})
    classes = conformal_classes(glaciers, pd.DataFrame({"glacier_id": [], "debris_km2": []}), SETTINGS)
    scores = pd.DataFrame({"glacier_id": ["a"], "covering_tau": [0.2]})
    with pytest.raises(KeyError, match="'b' has no size and debris class"):
        conformal_taus(scores, scores, classes, ["b"], SETTINGS)
