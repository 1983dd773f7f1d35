"""Geographic cross-validation.

Belongs here: the table ``folds`` (METHOD of Diaconu et al. 2025, section on splits).
Does not belong here: normalization or training.
"""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd

from dl4gam_assets.settings import SettingsError
from dl4gam_assets.tables import TABLES


def geographic_folds(glaciers: gpd.GeoDataFrame, n: int, validation_share: float) -> pd.DataFrame:
    """Role of each glacier (train, valid, test) in each of ``n`` iterations.

    Glaciers are sorted by the eastern edge of their box, from east to west, and iteration i tests the i-th n-th of the
    cumulative area (a glacier belongs to the block that holds the middle of its own area). Validation is a strip of
    ``validation_share`` of the area at the borders of the test block: half on each side, or all of it on the one side
    at the ends. So validation lies between test and training (Diaconu et al. 2025).

    In small regions a strip or a block may hold no glacier. Then the glacier nearest to the border is taken: each
    iteration has at least one test, one validation and one training glacier.

    Parameters
    ----------
    glaciers : rows of the table ``glaciers`` that are modelled (EPSG:4326)
    n : number of iterations
    validation_share : share of the area that validates

    Returns
    -------
    DataFrame
        The table ``folds``; every glacier has the role ``test`` exactly once.

    Raises
    ------
    SettingsError
        if there are fewer glaciers than folds, or fewer than three (four with two folds).
    """
    count = len(glaciers)
    if count < max(n, 4 if n == 2 else 3):
        raise SettingsError(
            f"{count} glaciers can not be split into {n} folds with test, validation and training glaciers each; "
            "lower folds.n or inventory.min_area_km2, or train on a larger region"
        )
    ordered = glaciers.assign(_east=glaciers.geometry.bounds["maxx"]).sort_values(
        ["_east", "glacier_id"], ascending=[False, True]
    )
    ids = ordered["glacier_id"].to_numpy()
    area = ordered["inventory_area_km2"].to_numpy(dtype=float)
    middle = (np.cumsum(area) - area / 2) / area.sum()
    block = _filled(np.minimum((middle * n).astype(int), n - 1), n)
    rows = []
    for fold in range(n):
        test = np.flatnonzero(block == fold)
        first, last = int(test[0]), int(test[-1])
        valid = _strip(area, first, last, validation_share * float(area.sum()))
        role = np.full(count, "train", dtype=object)
        role[valid] = "valid"
        role[test] = "test"
        rows.append(pd.DataFrame({"glacier_id": ids, "fold": fold + 1, "role": role}))
    return TABLES["folds"].conform(pd.concat(rows, ignore_index=True))


def _filled(block: np.ndarray, n: int) -> np.ndarray:
    """Blocks in order with none empty: an empty one takes its neighbour's nearest glacier.

    With two folds a block is what the other iteration trains and validates on, so it needs two glaciers.
    """
    count = len(block)
    least = 2 if n == 2 else 1
    starts = np.searchsorted(block, np.arange(n))
    for i in range(1, n):
        starts[i] = max(starts[i], starts[i - 1] + least)
    for i in range(n - 1, 0, -1):
        starts[i] = min(starts[i], count - least * (n - i))
    filled: np.ndarray = np.searchsorted(starts, np.arange(count), side="right") - 1
    return filled


def _strip(area: np.ndarray, first: int, last: int, wanted: float) -> list[int]:
    """Indices beside ``first..last`` whose area comes nearest to ``wanted``, leaving at least one to train."""
    count = len(area)
    sides = [range(first - 1, -1, -1), range(last + 1, count)]
    sides = [s for s in sides if len(s)]
    spare = count - (last - first + 1) - 1  # glaciers that may validate, one is kept for training
    picked: list[int] = []
    for side in sides:
        share = wanted / len(sides)
        got = 0.0
        for index in side:
            # A glacier is taken while that brings the strip nearer to its share.
            if len(picked) >= spare or (got > 0 and abs(got + area[index] - share) >= abs(got - share)):
                break
            if got == 0 and picked and area[index] / 2 > share:
                break  # the other side has validation already; this one glacier would be far too much
            picked.append(index)
            got += float(area[index])
    return picked
