"""Tables beside the published cubes: which glacier is in which fold, and the normalization of each iteration.

Belongs here: reading and writing ``map_all_splits_all_folds.csv`` and ``stats_agg_split_<i>.csv``.
Does not belong here: making folds (``inventory``) or statistics (``segmentation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dl4gam_assets.published.layout import (
    PUBLISHED_BAND,
    PUBLISHED_CHANNEL,
    STEP,
    PublishedFileError,
    channel_name,
)
from dl4gam_assets.segmentation.normalization import STANDARDIZED_FREE

_ROLES = {"fold_train": "train", "fold_valid": "valid", "fold_test": "test"}
#: Means of bands above this are of steps of 1e-4, not of reflectance.
_REFLECTANCE_MAX = 5.0


def read_splits(path: Path, n: int) -> pd.DataFrame:
    """The published fold map as our table ``folds``: glacier_id, fold (1..n), role (train, valid, test).

    Raises
    ------
    PublishedFileError
        if a column is missing, a role is none of theirs, a glacier is there twice, or one is not tested exactly once.
    """
    try:
        table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as error:
        raise PublishedFileError(f"fold map {path} can not be read: {' '.join(str(error).split())[:200]}") from error
    columns = ["entry_id", *(f"split_{i}" for i in range(1, n + 1))]
    lacking = [c for c in columns if c not in table]
    if lacking:
        raise PublishedFileError(f"fold map {path} lacks the columns {', '.join(lacking)} (folds.n is {n})")
    if f"split_{n + 1}" in table:
        raise PublishedFileError(f"fold map {path} has more than {n} splits: set folds.n of the region to match")
    twice = table.loc[table["entry_id"].duplicated() | table["entry_id"].isna(), "entry_id"]
    if len(twice):
        raise PublishedFileError(f"fold map {path}: entry_id {twice.iloc[0]!r} is there twice or empty")
    long = table[columns].melt("entry_id", var_name="fold", value_name="role")
    wrong = long.loc[~long["role"].isin(list(_ROLES))]
    if len(wrong):
        row = wrong.iloc[0]
        raise PublishedFileError(
            f"fold map {path}: {row['role']!r} of {row['entry_id']} in {row['fold']} is none of {', '.join(_ROLES)}"
        )
    out = pd.DataFrame(
        {
            "glacier_id": long["entry_id"],
            "fold": long["fold"].str.removeprefix("split_").astype(int),
            "role": long["role"].map(_ROLES),
        }
    )
    tests = out[out["role"] == "test"].groupby("glacier_id").size().reindex(out["glacier_id"].unique(), fill_value=0)
    if (tests != 1).any():
        raise PublishedFileError(
            f"fold map {path}: {tests[tests != 1].index[0]} is tested {tests[tests != 1].iloc[0]} times, not once"
        )
    return out.sort_values(["fold", "glacier_id"]).reset_index(drop=True)


def write_splits(folds: pd.DataFrame, path: Path) -> None:
    """Our table ``folds`` as the published fold map."""
    theirs = {ours: name for name, ours in _ROLES.items()}
    wide = folds.assign(role=folds["role"].map(theirs), fold="split_" + folds["fold"].astype(str))
    wide = wide.pivot(index="glacier_id", columns="fold", values="role")
    wide = wide[sorted(wide.columns, key=lambda c: int(c.removeprefix("split_")))]
    wide.rename_axis(index="entry_id", columns=None).reset_index().to_csv(path, index=False)


def read_statistics(path: Path, channels: Sequence[str]) -> pd.DataFrame:
    """A published normalization table as our table ``normalization``.

    Theirs gives ``mu`` and ``stddev`` of bands (by name or by Sentinel-2's number) and layers (in steps of 1e-4 for the
    bands; both are brought to reflectance). Indices, slope and aspect enter as they are, so theirs has no use for them.

    Returns
    -------
    DataFrame with channel, mean, std, n_pixels (empty: theirs does not say), standardized; in the order of ``channels``

    Raises
    ------
    PublishedFileError
        if a column or a channel is missing, a deviation is not positive, or the bands are in mixed units.
    """
    try:
        table = pd.read_csv(path)
        table = table.assign(mu=table["mu"].astype(float), stddev=table["stddev"].astype(float))
        table = table.assign(channel=[channel_name(str(name)) for name in table["var_name"]])
        known = table.drop_duplicates("channel", keep=False).set_index("channel")
    except (OSError, ValueError, KeyError) as error:
        raise PublishedFileError(
            f"normalization table {path} can not be read (columns var_name, mu, stddev are needed): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    wanted = [c for c in channels if c not in STANDARDIZED_FREE]
    lacking = [c for c in wanted if c not in known.index]
    if lacking:
        names = ", ".join(PUBLISHED_CHANNEL.get(c, c) for c in lacking)
        raise PublishedFileError(f"normalization table {path} has no (single) row of {names}")
    rows = known.loc[wanted, ["mu", "stddev"]]
    bad = rows[~np.isfinite(rows).all(axis=1) | (rows["stddev"] <= 0)]
    if len(bad):
        raise PublishedFileError(f"normalization table {path}: {bad.index[0]} has no usable mean and deviation")
    bands = rows.loc[[c for c in wanted if c in PUBLISHED_BAND]]
    if len(bands):
        large = bands["mu"] > _REFLECTANCE_MAX
        if large.any() and not large.all():
            raise PublishedFileError(
                f"normalization table {path}: some bands are in reflectance, some in steps of 1e-4"
            )
        if large.all():
            rows.loc[bands.index] = bands * STEP
    free = pd.DataFrame({"mu": 0.0, "stddev": 1.0}, index=[c for c in channels if c in STANDARDIZED_FREE])
    rows = pd.concat([rows, free]).loc[list(channels)]
    return pd.DataFrame(
        {
            "channel": list(channels), "mean": rows["mu"].to_numpy(), "std": rows["stddev"].to_numpy(),
            "n_pixels": pd.array([pd.NA] * len(rows), dtype="Int64"),
            "standardized": [c not in STANDARDIZED_FREE for c in channels],
        }
    )  # fmt: skip


def write_statistics(statistics: pd.DataFrame, path: Path) -> None:
    """Our normalization as a published table: bands in steps of 1e-4; ``vmin`` and ``vmax`` are empty and not used."""
    rows = []
    for row in statistics[statistics["standardized"].astype(bool)].itertuples():
        step = STEP if row.channel in PUBLISHED_BAND else 1.0
        name = PUBLISHED_CHANNEL.get(str(row.channel), str(row.channel))
        rows.append({"var_name": name, "mu": row.mean / step, "stddev": row.std / step, "vmin": None, "vmax": None})
    pd.DataFrame(rows, columns=["var_name", "mu", "stddev", "vmin", "vmax"]).to_csv(path, index=False)
