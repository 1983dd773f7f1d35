"""Quality of held-out maps, counted in pixels so that glaciers, folds and regions can be pooled.

Belongs here: confusion counts of one glacier in named scopes, scores from counts, pooling.
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

SCOPES = ("scene", "ring", "debris", "reference")
SCORES = ("iou", "precision", "recall", "f1")


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
    """IoU, precision, recall and F1 from pixel counts; NaN where undefined, and but for recall in scope ``debris``."""
    tp = float(counts["true_positive"])
    fp = float(counts["false_positive"])
    fn = float(counts["false_negative"])
    recall = _ratio(tp, tp + fn)
    if scope == "debris":
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
    """Scores over many glaciers: from summed pixels, and as the mean over glaciers.

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
    counts: large glaciers weigh more) and ``mean_iou`` ... ``mean_f1`` (mean over glaciers, as the paper averages).
    """
    if "scope" not in by:
        raise ValueError("`by` must contain 'scope': scopes are never pooled together")
    counts = ["n_pixels", "true_positive", "false_positive", "false_negative"]
    columns = [*by, "n_glaciers", *counts, *SCORES, *[f"mean_{s}" for s in SCORES]]
    rows = evaluation if role is None else evaluation[evaluation["role"] == role]
    rows = rows[rows["n_pixels"].astype("int64") > 0]
    out = []
    for key, group in rows.groupby(list(by), sort=True):
        names = dict(zip(by, key, strict=True))
        sums = {c: int(group[c].sum()) for c in counts}
        means = {f"mean_{s}": float(group[s].astype("float64").mean()) for s in SCORES}
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


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
