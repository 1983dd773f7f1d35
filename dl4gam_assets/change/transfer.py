"""Transfer to a second inventory of the same region, with other ids and other ice divides.

Belongs here: which glaciers of two inventories are the same ice, which fold never saw a glacier of the second one, maps
of the first inventory's glaciers joined on the second one's, areas of two sources compared glacier by glacier.
Does not belong here: how an area is measured (``areas``) or judged (``evaluation``), files of the store (``stages``).

Diaconu et al. 2025 (doi:10.1029/2025EA004197) trained on the inventory of Paul et al. 2020 and reported on SGI2016,
each glacier with the models whose test block contains it (METHOD section 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    import xarray as xr
    from affine import Affine
    from odc.geo.geobox import GeoBox

#: Less common ground than one pixel of 10 m is no overlap: outlines that share a divide meet in slivers of rounding.
MIN_OVERLAP_M2 = 100.0
#: One of two glaciers is the counterpart of the other if at least this share of either lies in the other.
COUNTERPART_SHARE = 0.5
#: A glacier whose outline is mapped by less than this counts as partly mapped: its area is not that of the outline.
COMPLETE_SHARE = 0.95
#: Training glaciers farther away than this are not looked for.
FAR_M = 50_000.0

RELATIONS = ("one_to_one", "split", "merged", "complex", "redivided", "neighbours", "vanished", "new")


# ----------------------------------------------------------------------------------------------- matching of ids
def match_inventories(
    first: gpd.GeoDataFrame, second: gpd.GeoDataFrame, counterpart_share: float = COUNTERPART_SHARE
) -> pd.DataFrame:
    """The id map of two inventories, from the overlap of their outlines.

    Two glaciers are counterparts if at least ``counterpart_share`` of either lies in the other. Counterparts make
    groups, and the group gives the relation:

    ``one_to_one``
        one glacier in both
    ``split``
        one glacier of the first inventory is several in the second
    ``merged``
        several of the first are one in the second
    ``complex``
        several of both
    ``redivided``
        common ground of two glaciers of which one or both have no counterpart at all: it is shared out between several
    ``neighbours``
        common ground of two glaciers with counterparts of their own: the divide between them was moved
    ``vanished``, ``new``
        only in the first inventory; only in the second

    Parameters
    ----------
    first, second : GeoDataFrames with ``glacier_id`` and outlines, any CRS; invalid outlines are repaired.

    Returns
    -------
    DataFrame, sorted by both ids, whatever the order of the rows: first_id, second_id, overlap_km2, first_share,
    second_share (the share of either outline that lies in the other), iou, counterpart (bool), relation, group (number
    of the group; null without a counterpart). One row a pair that overlaps, and one with an empty id for each glacier
    that overlaps none. Areas are planar, in the UTM zone of the second glacier.

    Raises
    ------
    ValueError
        if a CRS or the ids are missing, an id occurs twice, or the share is not in (0, 1].
    """
    if not 0.0 < counterpart_share <= 1.0:
        raise ValueError(f"counterpart_share is {counterpart_share}, not in (0, 1]")
    for frame, name in ((first, "first"), (second, "second")):
        _check_inventory(frame, name)
    pairs = overlaps(first, second)
    pairs["counterpart"] = pairs[["first_share", "second_share"]].max(axis=1) >= counterpart_share
    kinds = _relations(pairs, first["glacier_id"].tolist(), second["glacier_id"].tolist())
    rows = []
    for side, frame in (("first_id", first), ("second_id", second)):
        lonely = sorted(set(frame["glacier_id"]) - set(pairs[side]))
        rows.append(pd.DataFrame({side: lonely}))
    out = pd.concat([pairs, *rows], ignore_index=True)
    out["overlap_km2"] = out["overlap_km2"].fillna(0.0).astype(float)
    for column in ("first_share", "second_share", "iou"):
        out[column] = out[column].fillna(0.0).astype(float)
    out["counterpart"] = out["counterpart"].eq(True)
    out["relation"] = [
        kinds.relation(a, b, bool(c)) for a, b, c in out[["first_id", "second_id", "counterpart"]].values
    ]
    out["group"] = pd.array(
        [
            kinds.group.get(("first", a)) if c else None
            for a, c in zip(out["first_id"], out["counterpart"], strict=True)
        ],
        dtype="Int64",
    )
    columns = ["first_id", "second_id", "overlap_km2", "first_share", "second_share", "iou", "counterpart", "relation"]
    out = out[[*columns, "group"]].astype({"first_id": "string", "second_id": "string"})
    return out.sort_values(["first_id", "second_id"], na_position="last", ignore_index=True)


def relation_counts(id_map: pd.DataFrame) -> dict[str, int]:
    """Glaciers of the second inventory by relation, and the glaciers of the first that ``vanished``.

    Each glacier counts once: by its counterparts where it has some, otherwise ``redivided`` or ``new``.
    """
    known = id_map[id_map["second_id"].notna()].sort_values(["second_id", "counterpart"], ascending=[True, False])
    counts = known.drop_duplicates("second_id")["relation"].value_counts().to_dict()
    gone = id_map.loc[id_map["relation"] == "vanished", "first_id"].nunique()
    return {name: int(counts.get(name, 0)) for name in RELATIONS if name != "neighbours"} | {"vanished": int(gone)}


def overlaps(first: gpd.GeoDataFrame, second: gpd.GeoDataFrame) -> pd.DataFrame:
    """Pairs of outlines with common ground: first_id, second_id, overlap_km2, first_share, second_share, iou.

    Shares are of each outline's own area, in the UTM zone of the second glacier. Unsorted pairs below
    :data:`MIN_OVERLAP_M2` are left out.
    """
    frames = []
    for _, left, right in _by_zone(first, second, 0.0):
        i, j = shapely.STRtree(left["shape"].to_numpy()).query(right["shape"].to_numpy(), predicate="intersects")[::-1]
        a, b = left["shape"].to_numpy()[i], right["shape"].to_numpy()[j]
        common = shapely.area(shapely.intersection(a, b))
        area_a, area_b = shapely.area(a), shapely.area(b)
        frames.append(
            pd.DataFrame(
                {
                    "first_id": left["glacier_id"].to_numpy()[i],
                    "second_id": right["glacier_id"].to_numpy()[j],
                    "overlap_km2": common / 1e6,
                    "first_share": np.minimum(common / np.maximum(area_a, 1e-9), 1.0),
                    "second_share": np.minimum(common / np.maximum(area_b, 1e-9), 1.0),
                    "iou": np.minimum(common / np.maximum(area_a + area_b - common, 1e-9), 1.0),
                }
            )
        )
    columns = ["first_id", "second_id", "overlap_km2", "first_share", "second_share", "iou"]
    if not frames:
        return pd.DataFrame(columns=columns).astype(dict.fromkeys(columns[2:], float))
    out = pd.concat(frames, ignore_index=True)
    out = out[out["overlap_km2"] * 1e6 >= MIN_OVERLAP_M2]
    return out.sort_values(["first_id", "second_id"], ignore_index=True)


def _check_inventory(frame: gpd.GeoDataFrame, name: str) -> None:
    if frame.crs is None:
        raise ValueError(f"the {name} inventory has no coordinate reference system")
    if "glacier_id" not in frame or frame["glacier_id"].isna().any():
        raise ValueError(f"the {name} inventory has glaciers without glacier_id")
    twice = frame.loc[frame["glacier_id"].duplicated(), "glacier_id"]
    if len(twice):
        raise ValueError(f"the {name} inventory has the id {twice.iloc[0]!r} twice (inventory.merge_parts joins parts)")


@dataclass(frozen=True)
class _Relations:
    group: Mapping[tuple[str, str], int]
    kind: Mapping[int, str]

    def relation(self, first: Any, second: Any, counterpart: bool) -> str:
        if counterpart:
            return self.kind[self.group["first", first]]
        if pd.isna(first):
            return "new"
        if pd.isna(second):
            return "vanished"
        own = ("first", first) in self.group and ("second", second) in self.group
        return "neighbours" if own else "redivided"


def _relations(pairs: pd.DataFrame, first_ids: list[str], second_ids: list[str]) -> _Relations:
    nodes = [("first", i) for i in sorted(first_ids)] + [("second", i) for i in sorted(second_ids)]
    number = {node: k for k, node in enumerate(nodes)}
    linked = pairs[pairs["counterpart"]]
    a = [number["first", i] for i in linked["first_id"]]
    b = [number["second", i] for i in linked["second_id"]]
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(nodes), len(nodes)))
    _, label = connected_components(graph, directed=False)
    sides: dict[int, list[int]] = {}
    for node, component in zip(nodes, label, strict=True):
        sides.setdefault(int(component), [0, 0])[0 if node[0] == "first" else 1] += 1
    kind = {}
    for component, (n, m) in sides.items():
        many = ("complex", "merged", "split", "one_to_one")
        kind[component] = many[2 * int(n == 1) + int(m == 1)]
    # Numbers of groups by their first id, so that they do not depend on the order of rows.
    order: dict[int, int] = {}
    for k in sorted(a):
        order.setdefault(int(label[k]), len(order) + 1)
    group = {node: order[int(c)] for node, c in zip(nodes, label, strict=True) if int(c) in order}
    kinds = {order[c]: kind[c] for c in order}
    return _Relations(group, kinds)


def _by_zone(
    first: gpd.GeoDataFrame, second: gpd.GeoDataFrame, distance_m: float
) -> Iterator[tuple[int, pd.DataFrame, pd.DataFrame]]:
    """EPSG code of a UTM zone; glaciers of ``first`` near those of the zone; the glaciers of ``second`` in the zone.

    Both as DataFrames (glacier_id, shape) with valid shapes in that zone's metres. Each glacier of ``second`` comes
    once.
    """
    from dl4gam_assets.inventory import utm_epsg_of

    a, b = first.to_crs("EPSG:4326"), second.to_crs("EPSG:4326")
    shapes = shapely.make_valid(b.geometry.to_numpy())
    points = shapely.point_on_surface(shapes)
    usable = ~(shapely.is_missing(points) | shapely.is_empty(points))
    epsg = np.array([utm_epsg_of(p.x, p.y) if ok else 0 for p, ok in zip(points, usable, strict=True)], dtype=int)
    around = shapely.STRtree(a.geometry.to_numpy())
    west, south, east, north = shapely.bounds(shapes).T
    dy = distance_m / 110_000.0 + 1e-5
    dx = dy / np.cos(np.deg2rad(np.clip(np.maximum(np.abs(south), np.abs(north)), 0, 89)))
    boxes = shapely.box(west - dx, south - dy, east + dx, north + dy)
    for code in np.unique(epsg[usable]):
        mine = np.flatnonzero(epsg == code)
        near = np.unique(around.query(boxes[mine])[1])
        yield int(code), _metric(a.iloc[near], int(code)), _metric(b.iloc[mine], int(code))


def _metric(frame: gpd.GeoDataFrame, epsg: int) -> pd.DataFrame:
    shapes = shapely.make_valid(frame.geometry.to_crs(epsg).to_numpy()) if len(frame) else np.empty(0, dtype=object)
    return pd.DataFrame({"glacier_id": frame["glacier_id"].to_numpy(), "shape": shapes})


# ----------------------------------------------------------------------------------------------- folds
def transfer_folds(
    first: gpd.GeoDataFrame, second: gpd.GeoDataFrame, folds: pd.DataFrame, separation_m: float = 0.0
) -> pd.DataFrame:
    """The fold whose models never saw a glacier of the second inventory.

    A fold may judge it only if the fold tests **all** modelled glaciers of the first inventory that it overlaps, or
    that lie within ``separation_m`` of it. Since a glacier is tested once, these must all be tested by the same fold.

    Parameters
    ----------
    first : the table ``glaciers`` of the region (EPSG:4326)
    second : GeoDataFrame with glacier_id and outlines
    folds : the table ``folds``
    separation_m : distance to glaciers that the fold trained or validated on. 0: only common ground counts, which is
        what holds for the first inventory's own glaciers. Half a patch and more keeps the training patches away too.

    Returns
    -------
    DataFrame in the order of ``second``: glacier_id, fold (null: none), reason (``held out``; ``seen``: no fold tests
    all of its glaciers; ``not mapped``: it overlaps no modelled glacier), first_ids (overlapped modelled glaciers,
    largest overlap first, joined by ','), overlap_share (of its area), train_distance_m (to the nearest glacier that
    the fold trained on; null beyond 50 km).

    Raises
    ------
    ValueError
        if the distance is negative, or as :func:`match_inventories`.
    """
    if separation_m < 0:
        raise ValueError(f"separation_m is {separation_m}; it can not be negative")
    for frame, name in ((first, "first"), (second, "second")):
        _check_inventory(frame, name)
    tested = folds[folds["role"] == "test"].set_index("glacier_id")["fold"].astype(int)
    modelled = first[first["glacier_id"].isin(tested.index)]
    pairs = overlaps(modelled, second)
    pairs = pairs.sort_values(["second_id", "overlap_km2", "first_id"], ascending=[True, False, True])
    near = {str(b): set(g["first_id"]) for b, g in pairs.groupby("second_id", sort=False)}
    on = {str(b): g["first_id"].tolist() for b, g in pairs.groupby("second_id", sort=False)}
    share = pairs.groupby("second_id")["second_share"].sum().clip(upper=1.0)
    if separation_m > 0:
        for _, left, right in _by_zone(modelled, second, separation_m):
            tree = shapely.STRtree(left["shape"].to_numpy())
            j, i = tree.query(right["shape"].to_numpy(), predicate="dwithin", distance=separation_m)
            for b, a in zip(right["glacier_id"].to_numpy()[j], left["glacier_id"].to_numpy()[i], strict=True):
                near.setdefault(str(b), set()).add(a)
    rows: list[tuple[str, int | None, str, str, float]] = []
    for glacier_id in second["glacier_id"]:
        own = {int(tested[a]) for a in near.get(glacier_id, ())}
        if glacier_id not in on:
            rows.append((glacier_id, None, "not mapped", "", 0.0))
        else:
            fold = own.pop() if len(own) == 1 else None
            reason = "seen" if fold is None else "held out"
            rows.append((glacier_id, fold, reason, ",".join(on[glacier_id]), float(share[glacier_id])))
    out = pd.DataFrame(rows, columns=["glacier_id", "fold", "reason", "first_ids", "overlap_share"])
    out["fold"] = out["fold"].astype("Int64")
    out["train_distance_m"] = _train_distance(modelled, second, folds, out.set_index("glacier_id")["fold"])
    return out


def _train_distance(
    modelled: gpd.GeoDataFrame, second: gpd.GeoDataFrame, folds: pd.DataFrame, fold_of: pd.Series
) -> np.ndarray:
    found: dict[str, float] = {}
    trained = {int(f): set(g["glacier_id"]) for f, g in folds[folds["role"] == "train"].groupby("fold")}
    for _, left, right in _by_zone(modelled, second[second["glacier_id"].map(fold_of).notna()], FAR_M):
        for fold, ids in trained.items():
            mine = right[right["glacier_id"].map(fold_of).eq(fold).to_numpy(dtype=bool)]
            others = left[left["glacier_id"].isin(ids)]
            if len(mine) and len(others):
                (which, _), metres = shapely.STRtree(others["shape"].to_numpy()).query_nearest(
                    mine["shape"].to_numpy(), max_distance=FAR_M, return_distance=True, all_matches=False
                )
                found |= dict(zip(mine["glacier_id"].to_numpy()[which], metres, strict=True))
    return np.array([found.get(g, np.nan) for g in second["glacier_id"]], dtype=float)


# ----------------------------------------------------------------------------------------------- maps
@dataclass(frozen=True)
class Source:
    """A map of one glacier of the first inventory, and the layers of its cube that a joined map needs.

    ``layers``: arrays (H, W) by name; ``cell`` (bool) tells where this map comes first.
    """

    glacier_id: str
    transform: Affine
    crs: str
    layers: Mapping[str, np.ndarray]


def join_maps(sources: Sequence[Source], geobox: GeoBox, fill: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Layers of several maps on one grid.

    A pixel takes the map in whose ``cell`` it lies (the glacier it is nearest to), otherwise the first source that
    reaches it. Grids of one UTM zone share their pixels, so values are copied as they are; from another zone the
    nearest pixel is taken.

    Parameters
    ----------
    sources : in the order of preference
    geobox : target grid
    fill : value of each wanted layer where no source reaches

    Returns
    -------
    dict of arrays (H, W) by the names of ``fill``, and ``source`` int16: index of the source, -1 where there is none.

    Raises
    ------
    ValueError
        if a source lacks a layer.
    """
    shape = (int(geobox.shape[0]), int(geobox.shape[1]))
    chosen = np.full(shape, -1, dtype=np.int16)
    rank = np.full(shape, 2, dtype=np.int8)  # 0: in the source's cell, 1: reached, 2: nothing
    out: dict[str, np.ndarray] = {}
    for number, source in enumerate(sources):
        lacking = [name for name in (*fill, "cell") if name not in source.layers]
        if lacking:
            raise ValueError(f"the map of {source.glacier_id} lacks the layers {lacking}")
        reached = onto_grid(
            np.ones(source.layers["cell"].shape, dtype=bool), source.transform, source.crs, geobox, False
        )
        cell = onto_grid(source.layers["cell"], source.transform, source.crs, geobox, False)
        new = np.where(cell, 0, np.where(reached, 1, 2)).astype(np.int8)
        better = new < rank
        rank[better], chosen[better] = new[better], number
        for name, empty in fill.items():
            layer = source.layers[name]
            if name not in out:
                out[name] = np.full(shape, empty, dtype=layer.dtype)
            out[name][better] = onto_grid(layer, source.transform, source.crs, geobox, empty)[better]
    for name, empty in fill.items():
        out.setdefault(name, np.full(shape, empty))
    return out | {"source": chosen}


def onto_grid(layer: np.ndarray, transform: Affine, crs: str, geobox: GeoBox, fill: Any) -> np.ndarray:
    """A layer (h, w) on another grid (H, W), without interpolation; ``fill`` where it does not reach.

    Shifted by whole pixels where both grids have one CRS and their pixels coincide, otherwise the nearest pixel.
    """
    from rasterio.crs import CRS
    from rasterio.enums import Resampling
    from rasterio.warp import reproject

    height, width = int(geobox.shape[0]), int(geobox.shape[1])
    out: np.ndarray = np.full((height, width), fill, dtype=layer.dtype)
    target = geobox.affine
    same = CRS.from_user_input(crs) == CRS.from_user_input(str(geobox.crs))
    shift = ((transform.c - target.c) / target.a, (transform.f - target.f) / target.e)
    step = np.allclose([transform.a, transform.e, transform.b, transform.d], [target.a, target.e, target.b, target.d])
    if same and step and np.allclose(shift, np.round(shift), atol=1e-3):
        column, row = (round(s) for s in shift)
        r0, r1 = max(row, 0), min(row + layer.shape[0], height)
        c0, c1 = max(column, 0), min(column + layer.shape[1], width)
        if r0 < r1 and c0 < c1:
            out[r0:r1, c0:c1] = layer[r0 - row : r1 - row, c0 - column : c1 - column]
        return out
    # Where the source reaches is warped apart, since no value of a boolean layer is free to mean "nothing".
    plain = layer.astype(np.uint8) if layer.dtype == bool else layer
    there = np.zeros((height, width), dtype=np.uint8)
    values = np.zeros((height, width), dtype=plain.dtype)
    where = {
        "src_transform": transform, "src_crs": crs, "dst_transform": target, "dst_crs": str(geobox.crs),
        "resampling": Resampling.nearest,
    }  # fmt: skip
    reproject(np.ones(layer.shape, dtype=np.uint8), there, init_dest_nodata=False, **where)
    reproject(plain, values, init_dest_nodata=False, **where)
    inside = there > 0
    out[inside] = values[inside].astype(layer.dtype)
    return out


def transferred_cube(static: xr.Dataset, joined: Mapping[str, np.ndarray]) -> xr.Dataset:
    """A cube of a glacier of the second inventory that areas and evaluation understand.

    Parameters
    ----------
    static : from ``cubes.static_layers`` with the second inventory's outlines and zones (20 and 50 m)
    joined : from :func:`join_maps` with ``mean``, ``not_ok`` and, where there is elevation, ``dem``

    Returns
    -------
    Dataset with ``mask`` (and ``dem``). Pixels that no map reaches, or that their map does not predict, are ``not_ok``:
    nothing is judged there.
    """
    from dl4gam_assets.cubes import cube_mask, pack_masks

    names = str(static["mask"].attrs["flag_meanings"]).split()
    masks = {name: cube_mask(static, name) for name in names}
    masks["not_ok"] = joined["not_ok"] | ~np.isfinite(joined["mean"])
    out = static.copy(deep=False)
    out["mask"] = pack_masks(masks)
    if "dem" in joined:
        out["dem"] = (("y", "x"), np.asarray(joined["dem"], dtype=np.float32), {"units": "m"})
    return out


def transferred_row(
    static: xr.Dataset, joined: Mapping[str, np.ndarray], taus: Sequence[float], threshold: float = 0.5
) -> dict[str, Any]:
    """Area and quality of one glacier of the second inventory from joined maps.

    ``taus`` are those of the sources; the interval takes the lowest, widest of those that give at least 5 % of the
    counted pixels. Pixels without a map are in the upper bound only.

    Returns
    -------
    dict: the figures of ``areas.area_row``; ``mapped_share`` of the outline; ``iou``, ``precision``, ``recall_scene``,
    ``f1`` and pixel counts in the scope ``scene`` and, with the prefix ``ring_``, in the scope ``ring``.

    Raises
    ------
    ValueError
        if no map reaches the outline, or as ``areas.area_row``.
    """
    from dl4gam_assets.change.areas import area_row, counted_pixels
    from dl4gam_assets.change.evaluation import evaluate_glacier
    from dl4gam_assets.cubes import cube_mask

    name = str(static.attrs.get("glacier_id", "unknown glacier"))
    cube = transferred_cube(static, joined)
    counted, outline = counted_pixels(cube), cube_mask(cube, "glacier")
    mean, std = joined["mean"], joined["std"]
    mapped = np.isfinite(mean) & np.isfinite(std)
    if not (mapped & outline).any():
        raise ValueError(f"{name}: no map reaches the outline in this year")
    from_source = np.bincount(joined["source"][counted & mapped], minlength=len(taus))
    tau = min(t for t, n in zip(taus, from_source, strict=True) if n >= 0.05 * from_source.sum())
    row = area_row(mean, std, cube, tau, threshold)
    row["mapped_share"] = float((mapped & outline).sum() / outline.sum())
    with np.errstate(invalid="ignore"):
        predicted = mean >= threshold
    scores = evaluate_glacier(predicted, cube, "ensemble").set_index("scope")
    for scope, prefix in (("scene", ""), ("ring", "ring_")):
        for score in ("iou", "precision", "f1", "true_positive", "false_positive", "false_negative"):
            row[prefix + score] = scores.at[scope, score]
    return row


def summarize_transfer(rows: pd.DataFrame, usable_min: float = 0.7) -> dict[str, Any]:
    """Figures of a transfer over all glaciers of the second inventory.

    Parameters
    ----------
    rows : one row a glacier: outline_km2, reason, and for those measured the columns of :func:`transferred_row`
    usable_min : least share of a glacier and its 20 m zone that the image shows (``change.usable_min``)

    Returns
    -------
    dict: glaciers, area_km2; held_out (number) and held_out_share of that area; partly_mapped (number: a map reaches
    less than 95 % of the outline, or the image shows less than ``usable_min``); over the others: measured (number),
    measured_share of the area, measured_outline_km2, mapped_km2 (sum of estimates), lower_km2, upper_km2, inside_share
    (outline areas inside their interval), recall (of summed pixels), iou and ring_iou (of summed pixels), mean_iou,
    mean_ring_iou (mean over glaciers), median_relative_difference (area / outline - 1).
    """
    total = float(rows["outline_km2"].sum())
    held = rows[rows["reason"] == "held out"]
    reached = (
        held[held["area_km2"].notna()]
        if "area_km2" in held
        else held.iloc[:0].assign(mapped_share=0.0, usable_share=0.0)
    )
    known = reached[(reached["mapped_share"] >= COMPLETE_SHARE) & (reached["usable_share"] >= usable_min)]
    out: dict[str, Any] = {
        "glaciers": len(rows),
        "area_km2": total,
        "held_out": len(held),
        "held_out_share": float(held["outline_km2"].sum()) / total if total else 0.0,
        "partly_mapped": len(reached) - len(known),
        "measured": len(known),
        "measured_share": float(known["outline_km2"].sum()) / total if total else 0.0,
    }
    if not len(known):
        return out
    truth = known["inventory_area_km2"]
    inside = (known["lower_km2"] - 1e-9 <= truth) & (truth <= known["upper_km2"] + 1e-9)

    def pooled(prefix: str) -> float:
        tp, fp, fn = (float(known[f"{prefix}{c}"].sum()) for c in ("true_positive", "false_positive", "false_negative"))
        return tp / (tp + fp + fn) if tp + fp + fn else float("nan")

    tp, fn = float(known["true_positive"].sum()), float(known["false_negative"].sum())
    return out | {
        "measured_outline_km2": float(truth.sum()),
        "mapped_km2": float(known["area_km2"].sum()),
        "lower_km2": float(known["lower_km2"].sum()),
        "upper_km2": float(known["upper_km2"].sum()),
        "inside_share": float(inside.mean()),
        "recall": tp / (tp + fn) if tp + fn else float("nan"),
        "iou": pooled(""),
        "ring_iou": pooled("ring_"),
        "mean_iou": float(known["iou"].mean()),
        "mean_ring_iou": float(known["ring_iou"].mean()),
        "median_relative_difference": float((known["area_km2"] / truth - 1).median()),
    }


# ----------------------------------------------------------------------------------------------- areas of two sources
def compare_areas(ours: pd.DataFrame, official: pd.DataFrame) -> pd.DataFrame:
    """Two areas of each glacier side by side, by id.

    Parameters
    ----------
    ours, official : DataFrames (glacier_id, area_km2), each id once

    Returns
    -------
    DataFrame sorted by glacier_id: glacier_id, area_km2, official_km2, difference_km2, relative_difference
    (area / official - 1); ids of only one side have nulls.

    Raises
    ------
    ValueError
        if an id occurs twice.
    """
    left = ours[["glacier_id", "area_km2"]]
    right = official[["glacier_id", "area_km2"]].rename(columns={"area_km2": "official_km2"})
    try:
        both = left.merge(right, on="glacier_id", how="outer", validate="one_to_one")
    except pd.errors.MergeError as error:
        raise ValueError(f"a glacier id occurs twice: {error}") from error
    both["difference_km2"] = both["area_km2"] - both["official_km2"]
    both["relative_difference"] = both["difference_km2"] / both["official_km2"].where(both["official_km2"] > 0)
    return both.sort_values("glacier_id", ignore_index=True)
