"""Ground in several outlines is what their sum has more than their union."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely

from dl4gam_assets.inventory import double_counted_km2


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_sum_less_the_union(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(10.0, 10.05, (2, 12))
    side = rng.uniform(0.002, 0.02, 12)
    boxes = gpd.GeoSeries(shapely.box(x, y, x + side, y + side), crs=4326)
    boxes[11] = boxes[3].buffer(-0.0005)  # one wholly in another
    flat = boxes.to_crs(6933)
    expected = (flat.area.sum() - shapely.union_all(flat.array).area) / 1e6
    assert expected > 0.05 and double_counted_km2(gpd.GeoDataFrame(geometry=boxes)) == pytest.approx(expected)


def test_neighbours_that_share_an_edge_count_nothing() -> None:
    boxes = gpd.GeoDataFrame(geometry=shapely.box([10, 10.01], [46, 46], [10.01, 10.02], [46.01, 46.01]), crs=4326)
    assert double_counted_km2(boxes) == 0.0
    assert double_counted_km2(boxes.head(0)) == 0.0
