"""Conformal intervals: the tau of a glacier from the covering taus of validation glaciers of its own kind.

Belongs here: groups of glaciers, the rank that a coverage needs, the choice of the group.
Does not belong here: masks and covering taus (``intervals``), how often the intervals hold (``change.coverage``).

The published rule regresses tau on four features and promises its coverage only for many validation glaciers, on
average over all of them. Split conformal prediction (Vovk et al. 2005, doi:10.1007/b106715; Angelopoulos and Bates
2023, doi:10.1561/2200000101) promises it for any number, without a model of the errors:

- Intervals by tau are nested: the smaller tau, the wider. The *score* of a validation glacier is its covering tau, the
  largest one whose interval holds the area of its outline.
- With n scores, tau is the k-th smallest, k = floor((1 - coverage) (n + 1)). If the next glacier is exchangeable with
  the n, its own covering tau is below that in at most k of n + 1 cases, so the interval holds in at least ``coverage``.
  (The same as the rank ceil((n + 1) coverage) from above, for a score that grows with the error.)
- Scores are compared only within a group (Mondrian conformal prediction, Vovk et al. 2005, section 4.5), so that the
  promise holds for debris-covered and for small glaciers too, and not only where they are mixed with easy ones.

What it does not promise: exchangeability itself. Validation glaciers lie beside the test block, their pixels set the
temperatures and their IoU chose the epochs, and later years have other images. docs/validation.md measures that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dl4gam_assets.settings import CalibrationSettings

#: What makes a group, from the finest to all glaciers. Debris stays longest: it is the main source of error.
LEVELS: tuple[tuple[str, ...], ...] = (("size_class", "debris_class"), ("debris_class",), ())
EVERYTHING = "all glaciers"
DEBRIS_CLASSES = ("clean", "debris-covered")


def conformal_rank(n: int, coverage: float) -> int:
    """Rank, from the lowest, of the score that an interval with this coverage takes from ``n``; 0: none is low enough.

    floor((1 - coverage) (n + 1)): three scores at least for 68 %.

    Raises
    ------
    ValueError
        if the coverage is outside (0, 1).
    """
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"coverage is {coverage}, not in (0, 1)")
    return math.floor((1.0 - coverage) * (n + 1) + 1e-9)


def conformal_tau(covering_taus: np.ndarray, coverage: float) -> float:
    """tau from the covering taus (n,) of a group; 0, the widest interval, where they are too few for the coverage."""
    scores = np.sort(np.asarray(covering_taus, dtype=np.float64))
    rank = conformal_rank(len(scores), coverage)
    return float(scores[rank - 1]) if rank else 0.0


def conformal_classes(glaciers: pd.DataFrame, debris: pd.DataFrame, settings: CalibrationSettings) -> pd.DataFrame:
    """Size class and debris class of each glacier, from what is known before any image.

    Parameters
    ----------
    glaciers : the table ``glaciers`` (glacier_id, inventory_area_km2)
    debris : the table ``debris`` (glacier_id, debris_km2); a glacier that is not in it is clean, and the debris of one
        that is in it several times adds up
    settings : edges of the size classes (km2), and the debris share that makes a glacier debris-covered

    Returns
    -------
    DataFrame (glacier_id, size_class, debris_class), in the order of ``glaciers``.
    """
    area = glaciers["inventory_area_km2"].to_numpy(dtype=np.float64)
    by_glacier = debris.groupby("glacier_id")["debris_km2"].sum()
    covered = glaciers["glacier_id"].map(by_glacier).astype("float64").fillna(0.0)
    share = covered.to_numpy() / np.maximum(area, 1e-9)
    labels = np.asarray(_size_labels(settings.conformal_size_edges_km2), dtype=object)
    return pd.DataFrame(
        {
            "glacier_id": glaciers["glacier_id"].to_numpy(),
            "size_class": labels[np.searchsorted(settings.conformal_size_edges_km2, area, side="right")],
            "debris_class": np.where(share >= settings.conformal_debris_min, DEBRIS_CLASSES[1], DEBRIS_CLASSES[0]),
        }
    )


def _size_labels(edges: Sequence[float]) -> list[str]:
    if not edges:
        return ["any size"]
    text = [f"{e:g}" for e in edges]
    between = [f"{a} to {b} km2" for a, b in itertools.pairwise(text)]
    return [f"under {text[0]} km2", *between, f"from {text[-1]} km2"]


def pooled_validation(
    scores: pd.DataFrame, folds: pd.DataFrame, fold: int, pool_folds: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The validation glaciers whose scores may judge the test glaciers of a fold.

    A score of another fold was made by that fold's models, which never trained on that glacier either; it stands for
    what models trained in the same way do on ice that they have not seen (cross-conformal prediction, Vovk 2015,
    doi:10.1007/s10472-013-9368-4). Two rules keep it honest:

    - A glacier that this fold tests is left out, so that no glacier's own outline shapes its own interval. (It may well
      validate a neighbouring fold.)
    - A glacier counts once: with this fold's score where there is one, otherwise with the lowest, widest of the others.

    Parameters
    ----------
    scores : DataFrame (glacier_id, fold, covering_tau), the table ``calibration_glaciers``
    folds : the table ``folds``
    fold : the fold whose test glaciers get intervals
    pool_folds : False: own scores only

    Returns
    -------
    own, pooled : DataFrames (glacier_id, covering_tau), each glacier once, sorted by id
    """
    tested = set(folds.loc[(folds["fold"] == fold) & (folds["role"] == "test"), "glacier_id"])
    usable = scores[~scores["glacier_id"].isin(tested)]
    own = _once(usable[usable["fold"] == fold])
    if not pool_folds:
        return own, own
    others = _once(usable[~usable["glacier_id"].isin(own["glacier_id"])])
    return own, pd.concat([own, others], ignore_index=True).sort_values("glacier_id", ignore_index=True)


def _once(scores: pd.DataFrame) -> pd.DataFrame:
    lowest = scores.sort_values(["glacier_id", "covering_tau", "fold"]).drop_duplicates("glacier_id")
    return lowest[["glacier_id", "covering_tau"]].reset_index(drop=True)


def conformal_taus(
    own: pd.DataFrame, pooled: pd.DataFrame, classes: pd.DataFrame, wanted: Sequence[str], settings: CalibrationSettings
) -> pd.DataFrame:
    """tau of each wanted glacier from the validation glaciers of its group, and which group that was.

    The finest group of :data:`LEVELS` with at least ``settings.conformal_min_glaciers`` scores is taken: each level
    first with the fold's own scores, then with those of all folds. Where even all glaciers together are fewer, all are
    taken as they are; below three no tau keeps the promise and it is 0 (the whole 20 m zone).

    Parameters
    ----------
    own, pooled : from :func:`pooled_validation`
    classes : from :func:`conformal_classes`, for validation and wanted glaciers
    wanted : glacier ids
    settings : coverage and the least number of scores

    Returns
    -------
    DataFrame in the order of ``wanted``: glacier_id, tau_conformal, conformal_group (text), conformal_scope (``fold``:
    scores of the fold's own validation glaciers; ``folds``: of all folds), conformal_n (scores in the group).

    Raises
    ------
    KeyError
        naming the first glacier without classes.
    """
    known = classes.set_index("glacier_id")
    for glacier_id in [*own["glacier_id"], *pooled["glacier_id"], *wanted]:
        if glacier_id not in known.index:
            raise KeyError(f"glacier {glacier_id!r} has no size and debris class: it is not in the inventory")
    sources = {"fold": own.join(known, on="glacier_id"), "folds": pooled.join(known, on="glacier_id")}
    cells: dict[tuple[str, ...], tuple[float, str, str, int]] = {}
    rows = []
    for glacier_id in wanted:
        cell = tuple(str(known.at[glacier_id, name]) for name in LEVELS[0])
        if cell not in cells:
            cells[cell] = _tau_of_cell(dict(zip(LEVELS[0], cell, strict=True)), sources, settings)
        rows.append((glacier_id, *cells[cell]))
    columns = ["glacier_id", "tau_conformal", "conformal_group", "conformal_scope", "conformal_n"]
    return pd.DataFrame(rows, columns=columns).astype({"tau_conformal": float, "conformal_n": "int64"})


def _tau_of_cell(
    cell: dict[str, str], sources: dict[str, pd.DataFrame], settings: CalibrationSettings
) -> tuple[float, str, str, int]:
    for level in LEVELS:
        for scope, scores in sources.items():
            same = np.ones(len(scores), dtype=bool)
            for name in level:
                same &= (scores[name] == cell[name]).to_numpy(dtype=bool)
            last = not level and scope == "folds"
            if same.sum() >= settings.conformal_min_glaciers or last:
                taus = scores.loc[same, "covering_tau"].to_numpy(dtype=np.float64)
                group = ", ".join(cell[name] for name in level) or EVERYTHING
                return conformal_tau(taus, settings.coverage), group, scope, int(same.sum())
    raise AssertionError("the last level takes every glacier")  # pragma: no cover
