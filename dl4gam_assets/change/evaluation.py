"""Quality of held-out maps, counted in pixels so that glaciers, folds and regions can be pooled.

Belongs here: confusion counts of one glacier in named scopes, scores from counts, pooling, classes of glaciers.
Does not belong here: areas and intervals (``areas``), calibration of probabilities (``ensemble``).

The scopes are not alike, and figures of one must never be compared with those of another:

``scene``
    every valid pixel that is nearer to this glacier than to any other, over the whole cube: snow, rock, lakes and
    shadow far from the ice count. Target: any glacier. This is the strict figure.
``ring``
    valid pixels within 50 m of the outline and no other glacier's: what Diaconu et al. 2025
    (doi:10.1029/2025EA004197) report. It reads higher, since false positives farther away do not count.
``debris``
    debris-covered pixels inside the outline: only recall exists.
``clean_ice``
    the other pixels inside the outline: only recall exists.
``reference``
    the pixels of ``scene`` judged by a second inventory's outlines, where the region names one. Inventories follow
    their own rules and dates, so two of them never agree fully.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import xarray as xr

SCOPES = ("scene", "ring", "debris", "clean_ice", "reference")
#: Scopes inside the outline: no false positive can be there, so only recall means anything.
RECALL_ONLY = ("debris", "clean_ice")
SCORES = ("iou", "precision", "recall", "f1")
DEBRIS_CLASSES = {True: "debris-covered", False: "clean"}


def evaluate_glacier(
    prediction: np.ndarray,
    cube: xr.Dataset,
    method: str,
    role: str = "test",
    glacier_id: str | None = None,
    reference: np.ndarray | None = None,
) -> pd.DataFrame:
    """Rows of the table ``evaluation`` (without fold) for one glacier and method, one a scope.

    Parameters
    ----------
    prediction : bool array (H, W)
        Predicted glacier pixels of the whole cube, not cut to any zone.
    cube : Dataset
        The glacier's cube; unusable pixels (``not_ok``) are never judged.
    method : str
        ``ensemble`` or the name of a baseline.
    role : {"test", "valid"}
    reference : bool array (H, W), optional
        Glaciers of a second inventory; adds the scope ``reference``.

    Raises
    ------
    ValueError
        if the shapes differ, the prediction is no mask, or the glacier has no id.
    """
    from dl4gam_assets.cubes import cube_mask

    name = glacier_id or str(cube.attrs.get("glacier_id", ""))
    if not name:
        raise ValueError("the cube has no attribute glacier_id and none was given")
    if prediction.dtype != np.bool_:
        raise ValueError(f"{name}: the prediction must be a bool mask, not {prediction.dtype}")
    truth = cube_mask(cube, "any_glacier")
    for kind, mask in (("prediction", prediction), ("reference", reference)):
        if mask is not None and mask.shape != truth.shape:
            raise ValueError(f"{name}: the {kind} has {mask.shape} pixels, the cube {truth.shape}")
    valid = ~cube_mask(cube, "not_ok")
    glacier = cube_mask(cube, "glacier")
    where = {
        "scene": valid & cube_mask(cube, "cell"),
        "ring": valid & (glacier | (cube_mask(cube, "zone_50") & ~truth)),
        "debris": valid & glacier & cube_mask(cube, "debris"),
        "clean_ice": valid & glacier & ~cube_mask(cube, "debris"),
    }
    if reference is not None:
        where["reference"] = where["scene"]
    rows = []
    for scope, judged in where.items():
        wanted = reference if scope == "reference" and reference is not None else truth
        counts = {
            "n_pixels": int(judged.sum()),
            "true_positive": int((prediction & wanted & judged).sum()),
            "false_positive": int((prediction & ~wanted & judged).sum()),
            "false_negative": int((~prediction & wanted & judged).sum()),
        }
        rows.append(
            {"glacier_id": name, "role": role, "method": method, "scope": scope, **counts, **scores(counts, scope)}
        )
    return pd.DataFrame(rows)


def scores(counts: Mapping[str, Any], scope: str = "scene") -> dict[str, float]:
    """IoU, precision, recall and F1 from pixel counts; NaN where undefined. Inside the outline only recall is."""
    tp = float(counts["true_positive"])
    fp = float(counts["false_positive"])
    fn = float(counts["false_negative"])
    recall = _ratio(tp, tp + fn)
    if scope in RECALL_ONLY:
        return {"iou": np.nan, "precision": np.nan, "recall": recall, "f1": np.nan}
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": recall,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def pooled_scores(
    evaluation: pd.DataFrame, role: str | None = "test", by: Sequence[str] = ("method", "scope")
) -> pd.DataFrame:
    """Scores over many glaciers: from summed pixels, and as means over glaciers.

    Parameters
    ----------
    evaluation : DataFrame
        Rows of the table ``evaluation``.
    role : str or None
        Only rows with this role; None: all rows.
    by : columns that make a group; must contain ``scope``. ``("fold", "method", "scope")`` gives figures by fold.

    Returns
    -------
    DataFrame with the columns of ``by``, n_glaciers, the summed counts, ``iou, precision, recall, f1`` (of the summed
    counts: large glaciers weigh more), ``weighted_iou`` ... ``weighted_f1`` (mean over glaciers weighted by
    ``inventory_area_km2``; NaN where the areas are unknown) and ``mean_iou`` ... ``mean_f1`` (plain mean over glaciers,
    as the paper averages).
    """
    if "scope" not in by:
        raise ValueError("`by` must contain 'scope': scopes are never pooled together")
    counts = ["n_pixels", "true_positive", "false_positive", "false_negative"]
    kinds = ("weighted", "mean")
    columns = [*by, "n_glaciers", *counts, *SCORES, *[f"{kind}_{s}" for kind in kinds for s in SCORES]]
    rows = evaluation if role is None else evaluation[evaluation["role"] == role]
    rows = rows[rows["n_pixels"].astype("int64") > 0]
    out = []
    for key, group in rows.groupby(list(by), sort=True):
        names = dict(zip(by, key, strict=True))
        sums = {c: int(group[c].sum()) for c in counts}
        areas = group.get("inventory_area_km2", pd.Series(np.nan, index=group.index)).astype("float64")
        means = {f"weighted_{s}": _weighted_mean(group[s].astype("float64"), areas) for s in SCORES}
        means |= {f"mean_{s}": float(group[s].astype("float64").mean()) for s in SCORES}
        out.append(
            {
                **names,
                "n_glaciers": int(group["glacier_id"].nunique()),
                **sums,
                **scores(sums, str(names["scope"])),
                **means,
            }
        )
    return pd.DataFrame(out, columns=columns)


def glacier_classes(
    glaciers: pd.DataFrame,
    debris: pd.DataFrame | None,
    size_class_edges_km2: Sequence[float],
    debris_covered_min: float,
) -> pd.DataFrame:
    """What the quality of a glacier's map is broken down by, one row a glacier (index glacier_id).

    Parameters
    ----------
    glaciers, debris : the tables. ``debris`` None: debris is not known, so no glacier has a share of it.
    size_class_edges_km2 : edges of the size classes, increasing
    debris_covered_min : share (0 to 1) of the outline from which a glacier counts as debris-covered

    Returns
    -------
    DataFrame: inventory_area_km2, size_class (as in regional totals), debris_share, debris_covered (boolean)
    """
    from dl4gam_assets.change.regional import size_class, size_class_labels

    areas = glaciers.set_index("glacier_id")["inventory_area_km2"].astype("float64")
    labels = np.array(size_class_labels(size_class_edges_km2), dtype=object)
    out = pd.DataFrame({"inventory_area_km2": areas, "size_class": labels[size_class(areas, size_class_edges_km2)]})
    if debris is None:
        return out.assign(debris_share=np.nan, debris_covered=pd.array([pd.NA] * len(out), dtype="boolean"))
    km2 = debris.set_index("glacier_id")["debris_km2"].astype("float64").reindex(out.index).fillna(0.0)
    out["debris_share"] = (km2 / areas.where(areas > 0)).clip(upper=1.0)
    out["debris_covered"] = (out["debris_share"] >= debris_covered_min).astype("boolean")
    return out


def class_scores(evaluation: pd.DataFrame, role: str | None = "test") -> pd.DataFrame:
    """Pooled scores of all glaciers, of each size class, and of debris-covered and clean glaciers.

    Returns
    -------
    DataFrame with the columns of :func:`pooled_scores` behind ``grouping`` (all, size_class, debris), ``group``,
    method and scope; size classes from small to large. Glaciers whose class is unknown are in ``all`` only.
    """
    rows = evaluation.assign(
        all="all",
        debris=evaluation["debris_covered"].map(DEBRIS_CLASSES).astype("string"),
    )
    frames = []
    for grouping in ("all", "size_class", "debris"):
        part = rows.dropna(subset=[grouping])
        pooled = pooled_scores(part, role, by=(grouping, "method", "scope")).rename(columns={grouping: "group"})
        smallest = part.groupby(grouping)["inventory_area_km2"].min()
        pooled = pooled.sort_values("group", key=lambda g, s=smallest: g.map(s), kind="stable")
        frames.append(pooled.assign(grouping=grouping))
    joined = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    return joined[["grouping", "group", *[c for c in joined.columns if c not in {"grouping", "group"}]]]


def _weighted_mean(values: pd.Series, weights: pd.Series) -> float:
    known = values.notna() & weights.notna()
    total = float(weights[known].sum())
    return float((values[known] * weights[known]).sum()) / total if total > 0 else float("nan")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
