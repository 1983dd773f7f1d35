"""Coverage of a store's intervals: by the truth of a simulated region, and by the inventory.

Belongs here: reading the tables. Does not belong here: counting (``change.coverage``). Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dl4gam_assets.publication.truth import known_truth
from dl4gam_assets.settings import Region
from dl4gam_assets.stages.base import UpstreamError
from dl4gam_assets.storage import Storage


def measured_coverage(region: Region, storage: Storage, years: Sequence[int] | None = None) -> dict[str, pd.DataFrame]:
    """Tables of ``change.interval_coverage`` by judge: ``truth ...`` (simulated regions) and ``inventory ...``.

    Raises
    ------
    UpstreamError
        if no areas of the wanted years can be judged.
    ValueError
        if the areas were measured by an older version, without intervals by both rules.
    """
    from dl4gam_assets.change import interval_coverage
    from dl4gam_assets.ensemble import conformal_classes

    areas = storage.read_table("areas")
    if years:
        areas = areas[areas["year"].isin(list(years))]
    areas = areas.reset_index(drop=True)
    classes = conformal_classes(storage.read_table("glaciers"), storage.read_table("debris"), region.calibration)
    known: dict[str, pd.Series] = {}
    truth = known_truth(region, storage)
    if truth is not None:
        true = truth.set_index(["glacier_id", "year"])["area_km2"]
        keys = pd.MultiIndex.from_arrays([areas["glacier_id"].astype(str), areas["year"].astype(int)])
        of_rows = pd.Series(true.reindex(keys).to_numpy(), areas.index)
        seen = sorted(areas.loc[of_rows.notna(), "year"].unique())
        if seen:
            span = f"{seen[0]} to {seen[-1]}" if len(seen) > 1 else f"{seen[0]}"
            known[f"truth of the simulation, {span}"] = of_rows
    baseline = region.years.baseline
    if (areas["year"] == baseline).any():
        of_outline = areas["inventory_area_km2"].where(areas["year"] == baseline)
        known[f"inventory outlines, {baseline}"] = of_outline
    if not known:
        raise UpstreamError(
            f"region {region.name} has no areas of {baseline} (the inventory year) and no known truth: "
            "materialize glacier_areas of that year"
        )
    return {judge: interval_coverage(areas, values, classes) for judge, values in known.items()}
