"""The two published rankings against independent statements of them, on many random candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dl4gam_assets.imagery import rank_candidates, select_scenes
from dl4gam_assets.settings import ScoreWeights, SelectionSettings
from dl4gam_assets.tables import TABLES

_cloud = st.floats(0, 0.3)
_score = st.floats(-1, 1)
_rows = st.lists(st.tuples(_cloud, _score, st.floats(0, 1)), min_size=1, max_size=8)


def _frame(rows: list[tuple[Any, Any, Any]], glacier: str = "g") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "glacier_id": glacier,
            "date": pd.date_range("2020-08-01", periods=len(rows)),
            "coverage": 1.0,
            "cloud_share": [r[0] for r in rows],
            "ndsi": pd.array([r[1] for r in rows], dtype="Float64").to_numpy(float, na_value=np.nan),
            "albedo": pd.array([r[2] for r in rows], dtype="Float64").to_numpy(float, na_value=np.nan),
            "scene_ids": [f"s{i}" for i in range(len(rows))],
            "hrefs": "{}",
            "checksums": "{}",
            "ndsi_pixels": 99,
            "albedo_pixels": 99,
            "snow_score": "ndsi",
            "reason": None,
        }
    )


@settings(max_examples=80, deadline=None)
@given(_rows)
def test_rank_positions_against_counting(rows: list[tuple[float, float, float]]) -> None:
    ranked = rank_candidates(_frame(rows), SelectionSettings())

    def position(column: int, i: int) -> int:
        return sum(np.round(other[column], 2) < np.round(rows[i][column], 2) for other in rows)

    keys = [((position(0, i) + position(1, i)) / 2, rows[i][2], rows[i][0], rows[i][1], i) for i in range(len(rows))]
    expected = [sorted(keys).index(key) + 1 for key in keys]
    assert ranked["rank"].tolist() == expected


def _weights(cloud: float, ndsi: float, albedo: float) -> ScoreWeights:
    return ScoreWeights(cloud=cloud, ndsi=ndsi, albedo=albedo)


_some_weights = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 3.0])] * 3).filter(any)


@settings(max_examples=120, deadline=None)
@given(_rows, st.one_of(st.none(), _some_weights))
@example([(0.0, 0.5, 0.5), (0.2, 0.4, 0.4), (0.1, 0.1, 0.9)], (4.0, 1.0, 1.0))
def test_min_max_against_its_definition(
    rows: list[tuple[float, float, float]], weights: tuple[float, float, float] | None
) -> None:
    ratios = weights or (1.0, 1.0, 1.0)  # equal ones are the default
    limits = SelectionSettings(ranking="min_max", **({"weights": _weights(*weights)} if weights else {}))
    ranked = rank_candidates(_frame(rows), limits)
    values = np.array(rows)
    span = np.ptp(values, axis=0)
    quality = np.ones_like(values)  # scaled, inverted: 1 is best
    quality[:, span > 0] = 1 - (values - values.min(axis=0))[:, span > 0] / span[span > 0]
    highest = np.average(quality, axis=1, weights=ratios)
    np.testing.assert_allclose(ranked["score"], 1 - highest, atol=1e-12)
    assert highest[int(np.argmin(ranked["rank"]))] == pytest.approx(highest.max(), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(_cloud, st.one_of(st.none(), _score), st.floats(0, 1)), min_size=2, max_size=8),
    st.sampled_from(["rank_positions", "min_max"]),
)
def test_a_candidate_without_its_score_comes_after_all_that_have_it(rows: Any, ranking: Any) -> None:
    ranked = rank_candidates(_frame(rows), SelectionSettings(ranking=ranking))
    have = np.array([row[1] is not None for row in rows])
    ranks = ranked["rank"].to_numpy(int)
    if have.any() and not have.all():
        assert ranks[have].max() < ranks[~have].min()


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(_cloud, st.one_of(st.none(), _score), st.one_of(st.none(), st.floats(0, 1))), min_size=2, max_size=8
    ),
    st.sampled_from(["rank_positions", "min_max"]),
)
def test_a_missing_score_never_wins(rows: Any, ranking: Any) -> None:
    ranked = rank_candidates(_frame(rows), SelectionSettings(ranking=ranking))
    winner = ranked[ranked["rank"] == 1]
    complete = [n is not None and a is not None for _, n, a in rows]
    if any(complete):
        assert complete[int(winner.index[0])]
    elif any(n is not None for _, n, _ in rows):
        assert rows[int(winner.index[0])][1] is not None  # the NDSI counts for more than the albedo
    scoreless = [n is None and a is None for _, n, a in rows]
    assert ranked["rank"].isna().tolist() == scoreless
    assert all("clean pixels" in text for text in ranked.loc[scoreless, "obstacle"])


_coarse = st.sampled_from([0.0, 0.003, 0.01, 0.014, 0.1, 0.3])  # so that ties and near ties are frequent


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(_coarse, _coarse, _coarse), min_size=2, max_size=7),
    st.booleans(),
    st.sampled_from(["rank_positions", "min_max"]),
    st.sampled_from([0.0, 0.02]),
    _some_weights,
)
def test_a_dominated_candidate_never_wins(
    rows: Any, with_ndsi: bool, ranking: Any, tolerance: float, weights: tuple[float, float, float]
) -> None:
    scores = [(c, n if with_ndsi else None, a) for c, n, a in rows]
    limits = SelectionSettings(ranking=ranking, fallback_cloud_tolerance=tolerance, weights=_weights(*weights))
    ranked = rank_candidates(_frame(scores), limits)
    values = [tuple(v for v in row if v is not None) for row in scores]
    for i, mine in enumerate(values):
        better = any(all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine for other in values)
        assert not (better and ranked["rank"].iloc[i] == 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_coarse, _coarse, _coarse), min_size=2, max_size=7), st.booleans(), st.data())
def test_the_order_of_rows_never_matters(rows: Any, with_ndsi: bool, data: Any) -> None:
    frame = _frame([(c, n if with_ndsi else None, a) for c, n, a in rows])
    order = data.draw(st.permutations(range(len(rows))))
    for ranking in ("rank_positions", "min_max"):
        limits = SelectionSettings(ranking=ranking)  # type: ignore[arg-type]
        straight = rank_candidates(frame, limits).set_index("date")[["rank", "score"]]
        shuffled = rank_candidates(frame.iloc[order], limits).set_index("date")[["rank", "score"]]
        pd.testing.assert_frame_equal(straight, shuffled.loc[straight.index])


def test_without_ndsi_close_cloud_shares_count_as_equal() -> None:
    rows = [(0.084, None, 0.55), (0.086, None, 0.42), (0.125, None, 0.38)]  # snowier; bare; shadowed
    assert rank_candidates(_frame(rows), SelectionSettings())["rank"].tolist() == [2, 1, 3]
    exact = SelectionSettings(fallback_cloud_tolerance=0.0)
    assert rank_candidates(_frame(rows), exact)["rank"].tolist() == [1, 2, 3]  # all tie at 2: the least cloud wins
    with_ndsi = [(c, 0.1, a) for c, _, a in rows]
    both = [rank_candidates(_frame(with_ndsi), s)["score"].tolist() for s in (SelectionSettings(), exact)]
    assert both[0] == both[1]  # with an NDSI the published rankings are as they were


def test_a_missing_score_does_not_win_a_tie_by_low_albedo() -> None:
    rows = [(0.0, None, 0.1), (0.1, 0.5, 0.9)]  # positions would average to 1.5 each, and the first one is darker
    assert rank_candidates(_frame(rows), SelectionSettings())["rank"].tolist() == [2, 1]


@settings(max_examples=40, deadline=None)
@given(_rows, _rows, st.sampled_from(["rank_positions", "min_max"]))
def test_glaciers_do_not_touch_each_other(one: Any, two: Any, ranking: Any) -> None:
    limits = SelectionSettings(ranking=ranking)
    both = rank_candidates(pd.concat([_frame(one, "a"), _frame(two, "b")]), limits)
    alone = rank_candidates(_frame(two, "b"), limits)
    assert both.loc[both["glacier_id"] == "b", "rank"].tolist() == alone["rank"].tolist()


def test_without_any_ndsi_a_tie_goes_to_the_lower_cloud_share() -> None:
    rows = [(0.16, None, 0.40), (0.13, None, 0.44)]  # positions 2, 1 and 1, 2
    assert rank_candidates(_frame(rows), SelectionSettings())["rank"].tolist() == [2, 1]


def test_reasons_name_each_threshold_that_was_missed() -> None:
    frame = _frame([(0.02, 0.11, 0.3), (0.62, 0.1, 0.3), (0.1, 0.2, 0.3), (0.30001, 0.2, 0.3)])
    frame.loc[2, "coverage"] = 0.531
    frame.loc[1, "coverage"] = 0.8
    chosen = select_scenes(rank_candidates(frame, SelectionSettings()), 2020)
    assert chosen["reason"].tolist() == [
        "selected: rank 1 of 1 (cloud 0.02, NDSI 0.11)",
        "coverage 0.80 below 0.90; cloud share 0.62 above 0.30",
        "coverage 0.53 below 0.90",
        "cloud share 0.30001000000000000 above 0.29999999999999999",
    ]


def test_an_override_can_not_choose_what_can_not_be_read() -> None:
    frame = _frame([(0.1, 0.1, 0.1), (None, None, None)])
    frame.loc[1, "coverage"] = np.nan
    frame["reason"] = [None, "can not be read: scene file x.tif"]
    overrides = pd.DataFrame({"glacier_id": ["g"], "year": [2020], "date": [pd.Timestamp("2020-08-02")]})
    chosen = select_scenes(rank_candidates(frame, SelectionSettings()), 2020, overrides)
    assert not chosen["selected"].any()
    assert chosen["reason"].iloc[1] == "override: asked for, but can not be read: scene file x.tif"


def test_a_glacier_whose_files_are_all_broken_has_rows_with_reasons() -> None:
    rows = {"glacier_id": "g", "date": pd.date_range("2020-08-01", periods=2), "scene_ids": ["a", "b"]}
    broken = pd.DataFrame({**rows, "reason": "can not be read: scene file x.tif"})
    stored = TABLES["candidates"].conform(broken, {"year": 2020}).drop(columns="year")
    chosen = select_scenes(rank_candidates(stored, SelectionSettings()), 2020)
    assert not chosen["selected"].any() and chosen["rank"].isna().all()
    assert set(chosen["reason"]) == {"can not be read: scene file x.tif"}
    TABLES["scenes"].conform(chosen, {"year": 2020})


def test_weights_change_who_wins() -> None:
    frame = _frame([(0.0, 0.5, 0.5), (0.2, 0.2, 0.2)])  # the clearer one, the barer and darker one

    def winner(**weights: float) -> int:
        ranked = rank_candidates(frame, SelectionSettings(ranking="min_max", weights=ScoreWeights(**weights)))
        return int(ranked.index[ranked["rank"] == 1][0])

    assert winner() == winner(cloud=1.9) == 1
    assert winner(cloud=2.1) == winner(ndsi=0, albedo=0) == 0
    with pytest.raises(ValueError, match="above 0"):
        ScoreWeights(cloud=0, ndsi=0, albedo=0)


def test_weights_without_ndsi_are_those_that_are_left() -> None:
    frame = _frame([(0.0, None, 0.5), (0.2, None, 0.2)])
    limits = SelectionSettings(ranking="min_max", weights=ScoreWeights(cloud=3, ndsi=9, albedo=1))
    assert rank_candidates(frame, limits)["score"].tolist() == [0.25, 0.75]
    nothing = SelectionSettings(ranking="min_max", weights=ScoreWeights(cloud=0, ndsi=1, albedo=0))
    assert rank_candidates(frame, nothing)["score"].tolist() == [0.5, 0.5]  # equal ones
