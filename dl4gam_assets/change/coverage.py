"""How often intervals of areas hold what they should, by rule, size and debris.

Belongs here: counting intervals that hold a known area, with the uncertainty of the count.
Does not belong here: making the intervals (``areas``; the rules are in ``ensemble``), drawn regions
(``interval_simulator``).

An interval is judged by a truth (simulated regions) or, in the inventory year, by the area of the inventory's outline
on the same pixels: the outline is what the maps were trained to draw, not the truth itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dl4gam_assets.tables import INTERVAL_RULES

#: Confidence of the range of a coverage.
CONFIDENCE = 0.95


def interval_coverage(
    areas: pd.DataFrame, known_km2: pd.Series, classes: pd.DataFrame, rules: Sequence[str] = INTERVAL_RULES
) -> pd.DataFrame:
    """Share of the intervals of each rule that hold the known area, of all glaciers and by class.

    Parameters
    ----------
    areas : rows of the table ``areas`` with ``lower_RULE_km2`` and ``upper_RULE_km2`` of each rule; one or more years
    known_km2 : the area (km2) that each row's interval should hold, same index; rows without one (NaN) are left out
    classes : DataFrame (glacier_id, size_class, debris_class), from ``ensemble.conformal_classes``

    Returns
    -------
    DataFrame: rule, grouping (``all``, ``size``, ``debris``), group, n_glaciers, n (intervals), coverage,
    coverage_low and coverage_high (95 % Wilson interval, for the number of glaciers: images of one glacier err alike,
    so more years do not make it narrower), half_width_pct (median of (upper - lower) / 2 in percent of the known area).
    Groups are in the order of their glaciers' size.

    Raises
    ------
    ValueError
        if a column is missing or empty, or a glacier has no class.
    """
    from statsmodels.stats.proportion import proportion_confint

    wanted = [c for rule in rules for c in (f"lower_{rule}_km2", f"upper_{rule}_km2")]
    missing = [c for c in wanted if c not in areas or areas[c].isna().all()]
    if missing:
        raise ValueError(
            f"areas have no {missing[0]}, they were measured by an older version: materialize glacier_areas again"
        )
    judged = areas.assign(known_km2=known_km2)
    judged = judged[judged["known_km2"].notna() & (judged["known_km2"] > 0)]
    judged = judged.drop(columns=[c for c in ("size_class", "debris_class") if c in judged])
    judged = judged.merge(classes[["glacier_id", "size_class", "debris_class"]], on="glacier_id", how="left")
    if judged["size_class"].isna().any():
        name = judged.loc[judged["size_class"].isna(), "glacier_id"].iloc[0]
        raise ValueError(f"glacier {name!r} has no size and debris class: it is not in the inventory")
    rows = []
    for rule in rules:
        lower, upper = judged[f"lower_{rule}_km2"], judged[f"upper_{rule}_km2"]
        known = judged["known_km2"]
        part = judged.assign(
            inside=((lower <= known + 1e-9) & (known <= upper + 1e-9)).astype(float),
            half_width_pct=100 * (upper - lower) / 2 / known,
            all="all glaciers",
        )
        part = part[lower.notna() & upper.notna()]
        for grouping, column in (("all", "all"), ("size", "size_class"), ("debris", "debris_class")):
            sizes = part.groupby(column)["known_km2"].median().sort_values()
            for group in sizes.index:
                own = part[part[column] == group]
                share, n = float(own["inside"].mean()), int(own["glacier_id"].nunique())
                low, high = proportion_confint(share * n, n, alpha=1 - CONFIDENCE, method="wilson")
                rows.append(
                    (rule, grouping, group, n, len(own), share, float(low), float(high),
                     float(np.median(own["half_width_pct"])))
                )  # fmt: skip
    columns = [
        "rule",
        "grouping",
        "group",
        "n_glaciers",
        "n",
        "coverage",
        "coverage_low",
        "coverage_high",
        "half_width_pct",
    ]
    return pd.DataFrame(rows, columns=columns)
