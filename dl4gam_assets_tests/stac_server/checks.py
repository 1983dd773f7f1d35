"""What any STAC API has to answer to the platform's searches: asked of the small backend and of pgstac alike.

Belongs here: assertions that hold for every server. Does not belong here: those about one server, or about failures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pystac_client
import shapely
import shapely.geometry

from dl4gam_assets_tests.stac_server.backend import Json


def check_search(url: str, items: Sequence[Json], method: str) -> None:
    """Each condition of a search, over several pages; ``items`` is what the server holds, ``method`` GET or POST."""
    client = pystac_client.Client.open(url)
    one = max(items, key=lambda i: str(i["properties"]["datetime"]))
    collection = one["collection"]
    middle = float(np.median([i["properties"]["eo:cloud_cover"] for i in items]))
    year = one["properties"]["datetime"][:4]
    right = max(i["bbox"][2] for i in items)

    def ids(**asked: Any) -> set[str]:
        found = [i.id for i in client.search(method=method, limit=3, **asked).items()]
        assert len(found) == len(set(found)), f"an item comes twice: {asked}"
        return {*found}

    def those(true: Callable[[Json], bool]) -> set[str]:
        return {str(i["id"]) for i in items if true(i)}

    east = those(lambda i: i["bbox"][2] > right - 1e-4)
    cloudy = those(lambda i: i["properties"]["eo:cloud_cover"] > middle)
    assert 0 < len(cloudy) < len(items) and 0 < len(east) < len(items)
    this_year = those(lambda i: i["properties"]["datetime"].startswith(year))
    later = those(lambda i: i["properties"]["datetime"] > year)
    moment = one["properties"]["datetime"]
    place = shapely.geometry.shape(one["geometry"]).centroid
    there = those(lambda i: shapely.geometry.shape(i["geometry"]).intersects(place))
    assert 0 < len(there) < len(items) and 0 < len(this_year) < len(items)
    over: Json = {"op": ">", "args": [{"property": "eo:cloud_cover"}, middle]}
    either = {"op": "or", "args": [over, {"op": "=", "args": [{"property": "id"}, one["id"]]}]}
    everything = those(lambda i: True)
    box, clouds = [right - 1e-4, 46, right + 1, 48], {"eo:cloud_cover": {"gt": middle}}
    cases: list[tuple[Json, set[str]]] = [
        ({}, everything),
        ({"collections": [collection]}, everything),
        ({"collections": ["another"]}, set()),
        ({"ids": [one["id"], "none"]}, {one["id"]}),
        ({"bbox": box}, east),
        ({"bbox": [0, 0, 1, 1]}, set()),
        ({"intersects": shapely.geometry.mapping(place)}, there),
        ({"datetime": moment}, those(lambda i: i["properties"]["datetime"] == moment)),
        ({"datetime": f"{year}-01-01T00:00:00Z/{year}-12-31T23:59:59Z"}, this_year),
        ({"datetime": f"{year}-01-01T00:00:00Z/.."}, later),
        ({"query": clouds}, cloudy),
        ({"query": {"eo:cloud_cover": {"lte": middle}}}, everything - cloudy),
        ({"query": {"no:such": {"lt": 5}}}, set()),
        ({"filter": either, "filter_lang": "cql2-json"}, cloudy | {one["id"]}),
        ({"collections": [collection], "bbox": box, "datetime": f"{year}-01-01T00:00:00Z/..", "query": clouds},
         east & cloudy & later),
    ]  # fmt: skip
    for asked, wanted in cases:
        found = ids(**asked)
        assert found == wanted, f"{method} {asked}: {found ^ wanted}"


def plain(item: pystac.Item) -> Json:
    """All that an item says, without links and addresses."""
    found = item.to_dict(include_self_link=False, transform_hrefs=False)
    for asset in found["assets"].values():
        asset["href"] = Path(asset["href"]).name
    return found | {"links": []}
