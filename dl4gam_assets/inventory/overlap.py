"""Ground that several outlines of an inventory hold.

Belongs here: how much of it a sum over glaciers counts more than once.
Does not belong here: whose it is (``change.areas``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import geopandas as gpd

#: Cylindrical equal-area projection of the Earth (EASE-Grid 2.0).
EQUAL_AREA = 6933


def double_counted_km2(outlines: gpd.GeoDataFrame) -> float:
    """Area (km2) by which the sum of the outlines exceeds the ground they lie on: 0 where none overlap.

    Each outline is cut with those before it that it overlaps; shared edges count nothing.
    """
    import shapely

    shapes = outlines.geometry.to_crs(EQUAL_AREA).array
    first, second = shapes.sindex.query(shapes, predicate="overlaps")
    inner, outer = shapes.sindex.query(shapes, predicate="covered_by")  # one outline wholly in another
    pairs = {(int(max(a, b)), int(min(a, b))) for a, b in zip(np.r_[first, inner], np.r_[second, outer]) if a != b}
    before: dict[int, list[int]] = {}
    for later, earlier in pairs:
        before.setdefault(later, []).append(earlier)
    twice = (shapes[k].intersection(shapely.union_all(shapes[sorted(others)])).area for k, others in before.items())
    return float(sum(twice)) / 1e6
