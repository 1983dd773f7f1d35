"""Asset checks: the schema of every table, and what physics and plausibility demand.

Belongs here: checks of what an estimate may not be, each for one partition, each saying what to do. Blocking where an
estimate would be wrong, a warning where a person should look.
Does not belong here: making or repairing anything.

A check is partitioned like its asset. So a year that fails holds back what depends on that year, and nothing else.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData as _Target,
)

from dl4gam_assets.gate import goes_on
from dl4gam_assets.partitions import fold_of, member_of, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.settings import Region
from dl4gam_assets.stages.base import Workspace, fold_label, fold_member_label, year_fold_label
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES, Table

#: asset -> table that it writes
TABLE_OF = {
    "inventory_outlines": "glaciers",
    "debris_outlines": "debris",
    "glacier_zones": "zones",
    "cross_validation_folds": "folds",
    "elevation": "elevations",
    "scene_candidates": "candidates",
    "selected_scenes": "scenes",
    "elevation_change": "elevation_changes",
    "glacier_cubes": "cubes",
    "normalization": "normalization",
    "ensemble_member": "members",
    "calibration": "calibration",
    "band_ratio_baseline": "baseline",
    "glacier_predictions": "predictions",
    "interval_taus": "taus",
    "glacier_areas": "areas",
    "baseline_areas": "baseline_areas",
    "evaluation": "evaluation",
    "glacier_outlines": "outlines",
    "area_change": "changes",
    "regional_change": "regional_changes",
    "area_trends": "trends",
}

#: Assets that work glacier by glacier and write rows to `failures`.
GLACIER_STAGES = (
    "inventory_outlines", "elevation", "scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes",
    "glacier_predictions", "glacier_areas", "glacier_outlines",
)  # fmt: skip

#: A share of failed glaciers above this is a warning.
FAILED_SHARE = 0.05

#: The inventory's own area may differ by this share: its projection is another.
STATED_AREA_SHARE = 0.05

#: Glaciers nearer than this share an ice divide or a zone.
TOUCHING_M = 50.0

#: Least share of the modelled glaciers that get an image.
WITH_IMAGE_SHARE = 0.8

#: Least share of the modelled area that is measured: below it the region is mostly extrapolated.
MEASURED_SHARE = 0.6

#: A mean elevation change beyond this (m a year) is an error of the data, not of a glacier.
DHDT_M_PER_YEAR = 15.0

#: Expected calibration error above this: probabilities can not be read as such.
ECE_MAX = 0.05

#: A member below this validation IoU has not learned what ice is.
MEMBER_IOU_MIN = 0.5

#: Change between neighbouring years is a jump beyond this many deviations and this share of the area.
JUMP_STD, JUMP_SHARE = 3.0, 0.25

#: Rates of whole regions that have been published lie well inside this (percent a year).
REGION_RATE_PCT = (-10.0, 3.0)

#: The newest season should be in the results a month after the November schedule.
DUE = (12, 15)


@dataclass(frozen=True)
class Part:
    """The partition that is checked: the numbers of its key (None where the asset has no such dimension)."""

    year: int | None = None
    fold: int | None = None
    member: int | None = None

    @classmethod
    def of(cls, key: str | None, dimensions: Sequence[str]) -> "Part":
        readers: dict[str, Callable[[str], int]] = {"year": year_of, "fold": fold_of, "member": member_of}
        return cls(**{name: readers[name](key) for name in dimensions}) if key is not None else cls()

    @property
    def where(self) -> dict[str, int]:
        """As arguments of Storage.read_table."""
        found = {"year": self.year, "fold": self.fold, "member": self.member}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def label(self) -> str:
        """As the stages name the partition in state and failures."""
        if self.member is not None and self.fold is not None:
            return fold_member_label(self.fold, self.member)
        if self.year is not None and self.fold is not None:
            return year_fold_label(self.year, self.fold)
        if self.fold is not None:
            return fold_label(self.fold)
        return "all" if self.year is None else str(self.year)


@dataclass(frozen=True)
class Found:
    """Wrong rows of a partition (none: passed), and figures worth showing either way."""

    rows: pd.DataFrame
    figures: Mapping[str, Any] | None = None


Finder = Callable[[Storage, Region, Part], Found | pd.DataFrame]


@dataclass(frozen=True)
class Check:
    """One check of one asset."""

    asset: str
    name: str
    description: str
    find: Finder
    what_to_do: str
    blocking: bool = False

    def __call__(self, storage: Storage, region: Region, part: Part) -> dg.AssetCheckResult:
        """Evaluate one partition; passes when no row is wrong."""
        found = self.find(storage, region, part)
        if isinstance(found, pd.DataFrame):
            found = Found(found)
        shown = found.rows.drop(columns="geometry", errors="ignore").head(10)
        return dg.AssetCheckResult(
            passed=not len(found.rows),
            severity=dg.AssetCheckSeverity.ERROR if self.blocking else dg.AssetCheckSeverity.WARN,
            metadata={
                "wrong_rows": len(found.rows),
                "what_to_do": self.what_to_do if len(found.rows) else "nothing",
                "rows": dg.MetadataValue.md(shown.to_markdown(index=False) if len(shown) else "none"),
                **{name: _plain(value) for name, value in (found.figures or {}).items()},
            },
        )


def _plain(value: Any) -> Any:
    """A figure that Dagster can store: numpy numbers become Python's, not-a-number becomes text."""
    if isinstance(value, int | float | np.number):
        number = float(value)
        return "none" if not np.isfinite(number) else int(number) if number.is_integer() else float(f"{number:.4g}")
    return value


# --------------------------------------------------------------------------------------------- schemas
def pandera_schema(table: Table) -> Any:
    """The table's schema for pandera: types, nulls, ranges and keys, all failures at once."""
    import pandera.pandas as pa

    types = {"string": "string", "int64": "Int64", "float64": "float64", "bool": "boolean",
             "timestamp": "datetime64[us]"}  # fmt: skip
    columns = {}
    for column in table.columns:
        checks = []
        if column.minimum is not None:
            checks.append(pa.Check.ge(column.minimum - 1e-9))
        if column.maximum is not None:
            checks.append(pa.Check.le(column.maximum + 1e-9))
        if column.dtype == "float64":
            checks.append(pa.Check(lambda values: ~np.isinf(values), name="finite"))
        dtype = types.get(column.dtype)
        columns[column.name] = pa.Column(
            dtype, nullable=column.nullable, checks=checks, required=not column.nullable, coerce=dtype is not None
        )
    return pa.DataFrameSchema(columns, strict=True, unique=table.keys or None)


def stored_rows(storage: Storage, table: Table, part: Part) -> pd.DataFrame:
    """A partition's rows as they lie in the files: unlike Storage.read_table, without any check or cast."""
    frames = []
    wanted = {name: str(value) for name, value in part.where.items() if name in table.partitioned_by}
    for partition in storage.partitions(table.name):
        if all(partition.get(name) == value for name, value in wanted.items()):
            with storage.reading(storage.table(table.name, partition)) as local:
                frame = pd.read_parquet(local, partitioning=None)
            for name, text in partition.items():
                frame[name] = int(text) if table.column(name).dtype == "int64" else text
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else table.empty()


def _schema(table: Table) -> Finder:
    def find(storage: Storage, region: Region, part: Part) -> Found:
        import pandera.errors

        frame = stored_rows(storage, table, part)
        try:
            pandera_schema(table).validate(frame, lazy=True)
        except pandera.errors.SchemaErrors as error:
            cases = error.failure_cases
            columns = [c for c in ("column", "check", "failure_case", "index") if c in cases]
            return Found(cases[columns], {"rows_checked": len(frame)})
        return Found(pd.DataFrame(), {"rows_checked": len(frame)})

    return find


# --------------------------------------------------------------------------------------------- shared
def _modelled(storage: Storage, fold: int | None = None) -> pd.DataFrame:
    """The glaciers that should have an estimate (of a fold: those that it tests)."""
    glaciers = storage.read_table("glaciers")
    modelled = glaciers[glaciers["modelled"].astype(bool)]
    if fold is not None:
        folds = storage.read_table("folds")
        tested = folds.loc[(folds["role"] == "test") & (folds["fold"] == fold), "glacier_id"]
        modelled = modelled[modelled["glacier_id"].isin(tested)]
    return modelled


def _failed(asset: str) -> Finder:
    def find(storage: Storage, region: Region, part: Part) -> Found:
        failures = storage.read_table("failures", stage=asset, partition=part.label)
        if asset == "inventory_outlines":
            total = len(storage.read_table("glaciers")) + len(failures)
        else:
            total = len(_modelled(storage, part.fold))
        share = failures["glacier_id"].nunique() / max(total, 1)
        shown = failures[["glacier_id", "error"]] if share > FAILED_SHARE else failures.head(0)
        return Found(shown, {"failed": len(failures), "of_glaciers": total, "failed_share": share})

    return find


# --------------------------------------------------------------------------------------------- inventory
def stated_areas_disagree(storage: Storage, region: Region, part: Part) -> Found:
    """Outlines whose computed area is not the one that the inventory states."""
    glaciers = storage.read_table("glaciers")
    stated, own = glaciers["stated_area_km2"], glaciers["inventory_area_km2"]
    off = (own - stated).abs()
    bad = (off > STATED_AREA_SHARE * stated) & (off > 0.01)
    rows = glaciers.loc[bad, ["glacier_id", "stated_area_km2", "inventory_area_km2"]]
    return Found(rows, {"compared": int(stated.notna().sum()), "area_km2": own.sum()})


def outlines_without_area(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Outlines that have no area or lie nowhere on Earth."""
    glaciers = storage.read_table("glaciers")
    nowhere = (glaciers["lon"].abs() > 180) | (glaciers["lat"].abs() > 90)
    bad = (glaciers["inventory_area_km2"] <= 0) | nowhere
    return glaciers.loc[bad, ["glacier_id", "inventory_area_km2", "lon", "lat"]]


def folds_overlap(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Modelled glaciers that are not tested exactly once, or have two roles in an iteration."""
    folds = storage.read_table("folds")
    ids = _modelled(storage)["glacier_id"]
    tested = folds[folds["role"] == "test"].groupby("glacier_id").size()
    counts = tested.reindex(sorted(set(ids) | set(folds["glacier_id"])), fill_value=0)
    doubled = set(folds.loc[folds.duplicated(["glacier_id", "fold"], keep=False), "glacier_id"])
    table = counts.rename("times_tested").rename_axis("glacier_id").reset_index()
    table["two_roles"] = table["glacier_id"].isin(doubled)
    return table[(table["times_tested"] != 1) | table["two_roles"]]


def folds_touch(storage: Storage, region: Region, part: Part) -> Found:
    """Pairs of a test glacier and a training glacier of the same iteration that touch."""
    import geopandas as gpd

    folds = storage.read_table("folds")
    glaciers = gpd.GeoDataFrame(_modelled(storage)[["glacier_id", "geometry"]], crs="EPSG:4326")
    plane = glaciers.to_crs(glaciers.estimate_utm_crs()).set_index("glacier_id")
    found, nearest = [], np.inf
    for fold, roles in folds.groupby("fold"):
        test, train = (plane.loc[plane.index.isin(roles.loc[roles["role"] == role, "glacier_id"])].reset_index()
                       for role in ("test", "train"))  # fmt: skip
        if not len(test) or not len(train):
            continue
        pairs = gpd.sjoin_nearest(test, train, distance_col="distance_m", lsuffix="test", rsuffix="train")
        nearest = min(nearest, float(pairs["distance_m"].min()))
        pairs["fold"] = fold
        found.append(pairs.loc[pairs["distance_m"] < TOUCHING_M].drop(columns="geometry"))
    columns = ["fold", "glacier_id_test", "glacier_id_train", "distance_m"]
    rows = pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)
    return Found(rows, {"nearest_training_glacier_m": nearest})


# --------------------------------------------------------------------------------------------- terrain and imagery
def elevation_impossible(storage: Storage, region: Region, part: Part) -> Found:
    """Glaciers whose elevations are none, or not of this Earth."""
    table = storage.read_table("elevations")
    if not region.terrain.has_dem and region.simulation is None:
        return Found(table.head(0), {"glaciers": len(table)})  # a region without a DEM says so in its settings
    bad = (table["elevation_min_m"] < -500) | (table["elevation_max_m"] > 9000) | table["elevation_mean_m"].isna()
    rows = table.loc[bad, ["glacier_id", "elevation_min_m", "elevation_mean_m", "elevation_max_m", "missing_share"]]
    return Found(rows, {"mean_missing_share": table["missing_share"].mean()})


def elevation_change_impossible(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Glaciers that thin or thicken faster than any does."""
    table = storage.read_table("elevation_changes", **part.where)
    bad = table["dhdt_mean_m_per_year"].abs() > DHDT_M_PER_YEAR
    return table.loc[bad, ["glacier_id", "year", "dhdt_mean_m_per_year"]]


def never_seen(storage: Storage, region: Region, part: Part) -> Found:
    """Modelled glaciers that no image of the season shows, if they are many."""
    modelled = _modelled(storage)
    candidates = storage.read_table("candidates", **part.where)
    unseen = modelled[~modelled["glacier_id"].isin(candidates["glacier_id"])]
    share = len(unseen) / max(len(modelled), 1)
    rows = unseen[["glacier_id", "lon", "lat"]] if share > FAILED_SHARE else unseen[["glacier_id"]].head(0)
    images = candidates.groupby("glacier_id").size()
    return Found(rows, {"unseen_share": share, "median_candidates": images.median() if len(images) else 0})


def scenes_below_thresholds(storage: Storage, region: Region, part: Part) -> Found:
    """Selected scenes that miss the thresholds without an override."""
    scenes = storage.read_table("scenes", **part.where)
    limits = region.imagery.selection
    chosen = scenes[scenes["selected"].astype(bool)]
    bad = (chosen["coverage"] < limits.coverage_min) | (chosen["cloud_share"] > limits.cloud_max)
    bad &= ~chosen["reason"].str.contains("override", case=False, na=False)
    rows = chosen.loc[bad, ["glacier_id", "year", "date", "coverage", "cloud_share", "reason"]]
    figures = {"mean_coverage": chosen["coverage"].mean(), "mean_cloud_share": chosen["cloud_share"].mean()}
    return Found(rows, figures)


def two_scenes(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Glaciers with more than one selected image of a year."""
    scenes = storage.read_table("scenes", **part.where)
    chosen = scenes[scenes["selected"].astype(bool)]
    return chosen.loc[chosen.duplicated(["glacier_id", "year"], keep=False), ["glacier_id", "year", "date"]]


def without_image(storage: Storage, region: Region, part: Part) -> Found:
    """Modelled glaciers without an image, if they are many."""
    modelled = _modelled(storage)
    scenes = storage.read_table("scenes", **part.where)
    chosen = set(scenes.loc[scenes["selected"].astype(bool), "glacier_id"])
    lacking = modelled[~modelled["glacier_id"].isin(chosen)]
    share = 1 - len(lacking) / max(len(modelled), 1)
    rows = lacking[["glacier_id", "name"]]
    return Found(rows if share < WITH_IMAGE_SHARE else rows.head(0), {"share_with_image": share})


def out_of_season(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Selected images from outside the search window, in years that follow it."""
    scenes = storage.read_table("scenes", **part.where)
    chosen = scenes[scenes["selected"].astype(bool) & (scenes["year"] != region.years.baseline)]
    first, last = region.imagery.window
    day = chosen["date"].dt.strftime("%m-%d")
    # A day of slack: catalogs speak of solar days, tables of UTC.
    outside = (day < _shift(first, -1)) | (day > _shift(last, 1)) if first <= last else (day > last) & (day < first)
    asked = chosen["reason"].str.contains("override", case=False, na=False)
    return chosen.loc[outside & ~asked, ["glacier_id", "year", "date", "reason"]]


def _shift(day: str, days: int) -> str:
    month, number = map(int, day.split("-"))
    return (dt.date(2001, month, number) + dt.timedelta(days=days)).strftime("%m-%d")


def cubes_of_other_images(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Cubes that do not hold the selected image."""
    cubes = storage.read_table("cubes", **part.where)
    scenes = storage.read_table("scenes", **part.where)
    chosen = scenes.loc[scenes["selected"].astype(bool), ["glacier_id", "year", "date", "scene_ids"]]
    both = cubes.merge(chosen, on=["glacier_id", "year"], how="left", suffixes=("", "_selected"))
    other = both["scene_ids"].ne(both["scene_ids_selected"]).fillna(True).astype(bool)
    return both.loc[other, ["glacier_id", "year", "image_date", "date", "scene_ids", "scene_ids_selected"]]


def cubes_mostly_hidden(storage: Storage, region: Region, part: Part) -> Found:
    """Cubes that show less than half of their glacier."""
    cubes = storage.read_table("cubes", **part.where)
    rows = cubes.loc[cubes["not_ok_share"] > 0.5, ["glacier_id", "year", "image_date", "not_ok_share"]]
    return Found(rows, {"cubes": len(cubes), "mean_hidden_share": cubes["not_ok_share"].mean()})


# --------------------------------------------------------------------------------------------- training
def flat_channels(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Standardized channels without any spread: dividing by it would blow them up."""
    table = storage.read_table("normalization", **part.where)
    flat = table["standardized"].astype(bool) & ~(table["std"] > 0)
    return table.loc[flat, ["fold", "channel", "mean", "std"]]


def members_that_learned_nothing(storage: Storage, region: Region, part: Part) -> Found:
    members = storage.read_table("members", **part.where)
    rows = members.loc[~(members["validation_iou"] >= MEMBER_IOU_MIN), ["fold", "member", "validation_iou"]]
    return Found(rows, {"validation_iou": members["validation_iou"].mean()})


def members_missing(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Members that the region asks for and the fold's ensemble lacks."""
    members = set(storage.read_table("members", **part.where)["member"])
    lacking = sorted(set(range(1, region.training.members + 1)) - members)
    return pd.DataFrame({"fold": [part.fold] * len(lacking), "member": lacking})


def badly_calibrated(storage: Storage, region: Region, part: Part) -> Found:
    """Folds whose calibrated probabilities are still off."""
    table = storage.read_table("calibration", **part.where)
    rows = table.loc[table["ece_after"] > ECE_MAX, ["fold", "member", "ece_before", "ece_after", "n_glaciers"]]
    return Found(rows, {"calibration_error": table["ece_after"].max(), "before": table["ece_before"].max()})


# --------------------------------------------------------------------------------------------- maps and areas
def not_held_out(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Glaciers mapped by a fold that does not hold them out."""
    predictions = storage.read_table("predictions", **part.where)
    folds = storage.read_table("folds")
    roles = predictions.merge(folds, on=["glacier_id", "fold"], how="left")
    return roles.loc[roles["role"].ne("test").fillna(True).astype(bool), ["glacier_id", "year", "fold", "role"]]


def worse_than_a_threshold(storage: Storage, region: Region, part: Part) -> Found:
    """Folds in which a classical threshold maps better than the ensemble."""
    table = storage.read_table("evaluation", **part.where)
    judged = table[(table["scope"] == "scene") & (table["role"] == "test")]
    sums = judged.groupby(["fold", "method"])[["true_positive", "false_positive", "false_negative"]].sum()
    iou = (sums["true_positive"] / sums.sum(axis=1).clip(lower=1)).rename("iou").reset_index()
    iou = iou[~iou["method"].str.contains("oracle|per_glacier", na=False)]  # upper bounds, which know the truth
    own = iou[iou["method"] == "ensemble"].set_index("fold")["iou"]
    others = iou[iou["method"] != "ensemble"].copy()
    others["ensemble_iou"] = others["fold"].map(own)
    return Found(others[others["iou"] > others["ensemble_iou"]], {"ensemble_iou": own.mean()})


def areas_out_of_order(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Areas that are not inside their own interval."""
    areas = storage.read_table("areas", **part.where)
    bad = (areas["lower_km2"] > areas["area_km2"] + 1e-9) | (areas["area_km2"] > areas["upper_km2"] + 1e-9)
    return areas.loc[bad, ["glacier_id", "year", "lower_km2", "area_km2", "upper_km2"]]


def areas_beyond_their_zone(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Areas above what they are counted in (the outline and 20 m around it), or not a number."""
    import geopandas as gpd

    areas = storage.read_table("areas", **part.where)
    if not len(areas):
        return areas
    zones = storage.read_table("zones")
    zones = zones[(zones["buffer_m"] == 20) & zones["glacier_id"].isin(areas["glacier_id"])]
    # EPSG:6933 is an equal-area projection of the whole Earth, so one call serves all UTM zones.
    room = gpd.GeoDataFrame(zones, crs="EPSG:4326").to_crs("EPSG:6933").set_index("glacier_id").area / 1e6
    both = areas.assign(zone_km2=areas["glacier_id"].map(room))
    # Pixels that touch the zone's edge count as a whole: half a pixel of the perimeter, generously.
    limit = 1.05 * both["zone_km2"] + 0.002
    bad = both["area_km2"].isna() | (both["upper_km2"] > limit)
    return both.loc[bad, ["glacier_id", "year", "area_km2", "upper_km2", "zone_km2"]]


def vanished(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Glaciers without any ice left on the map."""
    areas = storage.read_table("areas", **part.where)
    return areas.loc[areas["area_km2"] <= 0, ["glacier_id", "year", "image_date", "inventory_area_km2", "usable_share"]]


def low_recall(storage: Storage, region: Region, part: Part) -> Found:
    """Glaciers whose inventory outline is not found again in the baseline year."""
    areas = storage.read_table("baseline_areas")
    total = areas["inventory_area_km2"].sum()
    found = (areas["recall"] * areas["inventory_area_km2"]).sum() / total if total else np.nan
    rows = areas.loc[areas["recall"] < region.change.recall_min, ["glacier_id", "recall", "area_km2", "image_date"]]
    return Found(rows, {"recall_by_area": found, "glaciers": len(areas)})


def intervals_miss(storage: Storage, region: Region, part: Part) -> Found:
    """Glaciers outside their intervals, if these hold far fewer than they promise (three binomial deviations).

    Of the baseline year, where the inventory says what the area is, and of glaciers that their fold neither trained nor
    set the interval on: its validation glaciers, to which tau was fitted, would lie inside by construction.
    """
    areas, target = storage.read_table("baseline_areas"), region.calibration.coverage
    truth = areas["inventory_area_km2"]
    inside = (areas["lower_km2"] - 1e-9 <= truth) & (truth <= areas["upper_km2"] + 1e-9)
    low = bool(len(areas)) and inside.mean() < target - 3 * np.sqrt(target * (1 - target) / len(areas))
    rows = areas.loc[~inside, ["glacier_id", "inventory_area_km2", "lower_km2", "area_km2", "upper_km2"]]
    figures = {"held_out_coverage": inside.mean(), "promised": target, "glaciers": len(areas)}
    return Found(rows if low else rows.head(0), figures)


def baseline_incomplete(storage: Storage, region: Region, part: Part) -> Found:
    """Modelled glaciers without a baseline area, if they hold much of the area: their change can not be measured."""
    modelled = _modelled(storage)
    have = storage.read_table("baseline_areas")["glacier_id"]
    lacking = modelled[~modelled["glacier_id"].isin(have)]
    share = 1 - lacking["inventory_area_km2"].sum() / max(modelled["inventory_area_km2"].sum(), 1e-9)
    rows = lacking[["glacier_id", "inventory_area_km2"]]
    return Found(rows if share < MEASURED_SHARE else rows.head(0), {"measured_area_share": share})


def outlines_off_their_areas(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Outlines whose area is not the estimate's (the sieve may take small patches away)."""
    outlines = storage.read_table("outlines", **part.where)
    best = outlines[outlines["bound"] == "best"]
    areas = storage.read_table("areas", **part.where)
    both = best[["glacier_id", "year", "area_km2"]].merge(
        areas[["glacier_id", "year", "area_km2"]], on=["glacier_id", "year"], suffixes=("_outline", "_estimate")
    )
    off = (both["area_km2_outline"] - both["area_km2_estimate"]).abs()
    return both[off > 0.1 * both["area_km2_estimate"] + 0.02]


# --------------------------------------------------------------------------------------------- change
def unexplained_growth(storage: Storage, region: Region, part: Part) -> Found:
    """Glaciers that grew by more than their interval without being flagged."""
    changes = storage.read_table("changes", **part.where)
    grew = changes["rate_km2_per_year"] > region.change.growth_max * changes["rate_std_km2_per_year"]
    rows = changes.loc[grew & ~changes["flag_growth"].astype(bool), ["glacier_id", "year", "rate_pct_per_year", "snr"]]
    return Found(rows, {"flagged": int(changes["flag_growth"].astype(bool).sum()), "glaciers": len(changes)})


def much_growth(storage: Storage, region: Region, part: Part) -> Found:
    """Glaciers flagged as grown, if they are many: snow of the season rather than ice."""
    changes = storage.read_table("changes", **part.where)
    flagged = changes[changes["flag_growth"].astype(bool)]
    share = len(flagged) / max(len(changes), 1)
    rows = flagged[["glacier_id", "year", "image_date", "rate_pct_per_year"]]
    return Found(rows if share > 0.1 else rows.head(0), {"growth_share": share})


def jumps(storage: Storage, region: Region, part: Part) -> Found:
    """Glaciers whose area differs from the year before by more than both intervals and a quarter allow."""
    wanted = {} if part.year is None else {"year": [part.year - 1, part.year]}
    areas = storage.read_table("areas", **wanted)[["glacier_id", "year", "area_km2", "std_km2", "image_date"]]
    before = areas.assign(year=areas["year"] + 1)
    both = areas.merge(before, on=["glacier_id", "year"], suffixes=("", "_before"))
    step = both["area_km2"] - both["area_km2_before"]
    spread = np.hypot(both["std_km2"], both["std_km2_before"])
    bad = (step.abs() > JUMP_STD * spread) & (step.abs() > JUMP_SHARE * both["area_km2_before"])
    return Found(both.loc[bad], {"compared_with_the_year_before": len(both)})


def totals_off(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Totals of all measured glaciers that are not the sum of the areas of those with a rate.

    In the baseline year, which has no rates, of all its areas. A glacier whose image is the baseline's own, or too near
    to it in time, has an area and no rate (``area_changes``), and rightly is in no total.
    """
    totals = storage.read_table("regional_changes", **part.where)
    mine = totals[(totals["grouping"] == "region") & (totals["method"] == "measured")]
    keys = ["year", "glacier_id"]
    areas = storage.read_table("areas", **part.where)[[*keys, "area_km2"]]
    rated = storage.read_table("changes", **part.where)[keys].merge(areas, on=keys, how="left")
    counted = pd.concat([areas[areas["year"] == region.years.baseline], rated], ignore_index=True)
    by_year = counted.groupby("year")["area_km2"]
    sums = pd.DataFrame({"sum_km2": by_year.sum(), "n_rated": by_year.size()})
    both = mine.merge(sums, on="year", how="left").fillna({"sum_km2": 0.0, "n_rated": 0})
    off = (both["area_km2"].fillna(0.0) - both["sum_km2"]).abs() > 1e-6 * both["sum_km2"].abs() + 1e-9
    off |= both["n_glaciers"] != both["n_rated"]
    return both.loc[off, ["year", "group", "n_measured", "n_rated", "area_km2", "sum_km2"]]


def implausible_rates(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Rates of the whole region outside of everything that was ever published."""
    totals = storage.read_table("regional_changes", **part.where)
    mine = totals[totals["grouping"] == "region"]
    rate = mine["rate_pct_per_year"]
    bad = (rate < REGION_RATE_PCT[0]) | (rate > REGION_RATE_PCT[1])
    return mine.loc[bad, ["year", "group", "method", "rate_pct_per_year", "rate_std_pct_per_year"]]


def mostly_extrapolated(storage: Storage, region: Region, part: Part) -> Found:
    """Years in which little of the modelled area was measured."""
    modelled = _modelled(storage)
    areas = storage.read_table("areas", **part.where)
    total = modelled["inventory_area_km2"].sum()
    measured = modelled.loc[modelled["glacier_id"].isin(areas["glacier_id"]), "inventory_area_km2"].sum()
    share = measured / total if total else 0.0
    row = pd.DataFrame({"year": [part.year], "measured_share_of_area": [share]})
    return Found(row if share < MEASURED_SHARE else row.head(0), {"measured_share_of_area": share})


def odd_years(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Years that lie far from the trend of more than a fifth of the glaciers: their images, not the glaciers."""
    trends = storage.read_table("trends")
    far = trends[trends["odd_residual"].abs() > 3]
    count = far.groupby("odd_year").size().rename("glaciers").reset_index()
    return count[count["glaciers"] > 0.2 * max(len(trends), 1)]


# --------------------------------------------------------------------------------------------- publication
def database_differs(storage: Storage, region: Region, part: Part) -> pd.DataFrame:
    """Tables of results.duckdb that are absent or have another number of rows than the files."""
    import duckdb

    path = storage.path("results.duckdb")
    if not path.exists():
        return pd.DataFrame([{"table": "results.duckdb", "database": "absent", "files": ""}])
    rows = []
    with storage.reading(path) as local, duckdb.connect(str(local), read_only=True) as db:
        there = {str(r[0]) for r in db.execute("select table_name from information_schema.tables").fetchall()}
        for name in ("glaciers", "areas", "changes", "regional_changes", "trends"):
            files = len(stored_rows(storage, TABLES[name], Part()))
            found = db.execute(f'select count(*) from "{name}"').fetchone() if name in there else None  # noqa: S608
            if found is None or found[0] != files:
                rows.append({"table": name, "database": found[0] if found else "absent", "files": files})
    return pd.DataFrame(rows)


def due_year(region: Region, today: dt.date) -> int:
    """The newest year that the results should hold: this one from 15 December on, or the region's last."""
    newest = today.year if (today.month, today.day) >= DUE else today.year - 1
    return min(newest, region.years.last or newest)


def newest_year_missing(storage: Storage, region: Region, part: Part, today: dt.date | None = None) -> Found:
    """The newest season that should be in the results and is not."""
    due = due_year(region, today or dt.date.today())
    totals = storage.read_table("regional_changes")
    newest = int(totals["year"].max()) if len(totals) else region.years.first - 1
    row = pd.DataFrame({"newest_year_in_results": [newest], "due": [due]})
    return Found(row if newest < due else row.head(0), {"newest_year": newest, "due": due})


def stale_estimates(storage: Storage, region: Region, part: Part) -> Found:
    """Estimates that no longer match what their inputs are now."""
    from dl4gam_assets.stages.staleness import find_stale

    found = find_stale(Workspace(region, storage))
    stale = found.estimates[found.estimates["state"] == "stale"]
    causes = "\n".join(f"- {cause}" for cause in found.causes[:20]) or "none"
    return Found(
        stale.drop(columns="state"),
        {"partitions_checked": found.checked, "may_change": len(found.estimates) - len(stale), "causes": causes},
    )


# --------------------------------------------------------------------------------------------- all of them
_AGAIN = "materialize {asset} again; if it stays, report these rows as a defect"
_LOOK = "look at these glaciers' images (`dl4gam plate GLACIER --year YEAR`): cloud, snow, shadow or a wrong date? "
_OVERRIDE = _LOOK + "Add an override line (imagery.selection.overrides) and choose the images again"

CHECKS: tuple[Check, ...] = (
    *(
        Check(asset, "schema", f"Table `{table}` has its columns, types, ranges and keys.", _schema(TABLES[table]),
              _AGAIN.format(asset=asset), blocking=True)
        for asset, table in TABLE_OF.items()
    ),
    *(
        Check(asset, "failed_glaciers", "Few glaciers failed; each is a row in `failures`.", _failed(asset),
              "read the errors; materialize the partition again to retry the failed glaciers only")
        for asset in GLACIER_STAGES
    ),
    Check("inventory_outlines", "outlines_have_area", "Each outline has an area and lies on Earth.",
          outlines_without_area, "repair these outlines in the inventory file, or leave them out", blocking=True),
    Check("inventory_outlines", "areas_as_stated", "Computed areas agree with those that the inventory states.",
          stated_areas_disagree, "is the file's CRS right, and is inventory.columns.area_km2 in km2?"),
    Check("cross_validation_folds", "tested_once", "Each modelled glacier is tested in exactly one iteration.",
          folds_overlap, "materialize cross_validation_folds again", blocking=True),
    Check("cross_validation_folds", "spatially_separate", "No test glacier touches one that trained in its iteration.",
          folds_touch, "raise folds.validation_share, which separates them, or lower folds.n"),
    Check("elevation", "elevations_plausible", "Elevations exist and are of this Earth.",
          elevation_impossible, "does terrain.dem cover these glaciers, in metres, with its no-data value set?",
          blocking=True),
    Check("elevation_change", "dhdt_plausible", "No glacier thins or thickens faster than any does.",
          elevation_change_impossible, "are terrain.elevation_change in metres a year, with their no-data values set?"),
    Check("scene_candidates", "glaciers_seen", "The season's images show nearly all glaciers.",
          never_seen, "does the catalog have the season already, and does imagery.window fit the region?"),
    Check("selected_scenes", "thresholds", "Selected scenes keep the coverage and cloud thresholds.",
          scenes_below_thresholds, "materialize selected_scenes again", blocking=True),
    Check("selected_scenes", "one_image", "No glacier has two images of a year.",
          two_scenes, "materialize selected_scenes again", blocking=True),
    Check("selected_scenes", "glaciers_with_image", "Most glaciers have an acceptable image.",
          without_image, "widen imagery.window, loosen imagery.selection, or accept that the year is extrapolated"),
    Check("selected_scenes", "in_season", "Images are of the season's window.",
          out_of_season, "materialize scene_candidates and selected_scenes of the year again"),
    Check("glacier_cubes", "selected_image", "Each cube holds the image that was selected for it.",
          cubes_of_other_images, "materialize glacier_cubes of the year again", blocking=True),
    Check("glacier_cubes", "glacier_visible", "Each cube shows at least half of its glacier.",
          cubes_mostly_hidden, _OVERRIDE),
    Check("normalization", "channels_vary", "Each standardized channel has a spread.",
          flat_channels, "is the layer missing or constant in the training cubes? Take it out of model.channels",
          blocking=True),
    Check("ensemble_member", "learned", "The member maps its validation glaciers.",
          members_that_learned_nothing, "look at its curves; train longer, or with another learning rate"),
    Check("ensemble", "complete", "The ensemble has as many members as the region asks for.",
          members_missing, "materialize the missing ensemble_member partitions", blocking=True),
    Check("calibration", "calibration_error", "Calibrated probabilities are near the observed frequencies.",
          badly_calibrated, "look at the reliability diagram; more validation glaciers or members help"),
    Check("glacier_predictions", "held_out", "Each glacier is mapped by models that never saw it.",
          not_held_out, "train the fold's members again: cross_validation_folds changed", blocking=True),
    Check("evaluation", "better_than_a_threshold", "The ensemble maps better than classical methods.",
          worse_than_a_threshold, "train longer or on more patches; or use the classical method"),
    Check("glacier_areas", "area_inside_interval", "lower <= area <= upper for every estimate.",
          areas_out_of_order, "report these rows as a defect: the interval guarantees it", blocking=True),
    Check("glacier_areas", "area_below_zone", "No area exceeds the zone that it is counted in.",
          areas_beyond_their_zone, _AGAIN.format(asset="glacier_predictions and glacier_areas"), blocking=True),
    Check("glacier_areas", "ice_left", "Each glacier has some ice left.",
          vanished, _LOOK + "If the glacier is gone, that is the result"),
    Check("baseline_areas", "recall_of_inventory", "The ensemble finds the inventory's outlines again.",
          low_recall, _OVERRIDE),
    Check("baseline_areas", "intervals_cover", "Intervals of held-out glaciers hold the inventory's area as promised.",
          intervals_miss, "raise folds.validation_share, so that more glaciers set the interval"),
    Check("baseline_areas", "complete", "Nearly all of the modelled area has a baseline.",
          baseline_incomplete, "widen imagery.baseline, so that more glaciers get a baseline image"),
    Check("glacier_outlines", "area_of_outlines", "Outlines have the area of the estimate.",
          outlines_off_their_areas, "lower change.sieve_px, or materialize glacier_outlines of the year again"),
    Check("area_change", "growth_is_flagged", "No glacier grows beyond its interval without a flag.",
          unexplained_growth, _AGAIN.format(asset="area_change"), blocking=True),
    Check("area_change", "little_growth", "Few glaciers are flagged as grown.",
          much_growth, _OVERRIDE),
    Check("area_change", "no_jumps", "Areas do not jump from one year to the next.",
          jumps, _OVERRIDE),
    Check("regional_change", "totals_add_up", "The region's measured total is the sum of the glaciers with a rate.",
          totals_off, _AGAIN.format(asset="baseline_areas, area_change and regional_change"), blocking=True),
    Check("regional_change", "rate_plausible", "The region's rate is like those of mountain ranges.",
          implausible_rates, "look at the year's images and at area_change first; snow or cloud move whole regions"),
    Check("regional_change", "mostly_measured", "Most of the area was measured, not extrapolated.",
          mostly_extrapolated, "see glaciers_with_image of selected_scenes, and the failures of the year"),
    Check("area_trends", "no_odd_year", "No year lies off the trend of many glaciers at once.",
          odd_years, "look at that year's images: early snow or cloud over the whole region?"),
    Check("results_database", "holds_the_tables", "results.duckdb holds the rows of the tables.",
          database_differs, "materialize results_database again", blocking=True),
    Check("results_database", "matches_inputs", "Every estimate matches what its inputs are now.",
          stale_estimates, "materialize what the causes name and all after it (`dl4gam materialize` does just that)"),
    Check("results_database", "newest_year", "The newest season is in the results.",
          newest_year_missing, "run the job add_a_year for it, and turn on the schedule november"),
)  # fmt: skip


def what_to_do(asset: str, name: str) -> str:
    """What a person should do when a check fails."""
    return next(check.what_to_do for check in CHECKS if (check.asset, check.name) == (asset, name))


def build_checks(region: Region, assets: Sequence[dg.AssetsDefinition]) -> Sequence[dg.AssetChecksDefinition]:
    """All checks of a region's graph, each partitioned like its asset; the checks of an asset are one step of a run."""
    definitions = {spec.key.to_user_string(): spec.partitions_def for asset in assets for spec in asset.specs}
    by_asset: dict[str, list[Check]] = {}
    for check in CHECKS:
        if check.asset in definitions:
            by_asset.setdefault(check.asset, []).append(check)
    return [_definition(asset, checks, definitions[asset]) for asset, checks in by_asset.items()]


def dimensions_of(partitions: dg.PartitionsDefinition | None) -> tuple[str, ...]:
    """Names of the dimensions of a partitions definition of ours: year, fold, member."""
    if isinstance(partitions, dg.MultiPartitionsDefinition):
        return tuple(partitions.partition_dimension_names)
    if isinstance(partitions, dg.TimeWindowPartitionsDefinition):
        return ("year",)
    return () if partitions is None else ("fold",)


def _definition(
    asset: str, checks: Sequence[Check], partitions: dg.PartitionsDefinition | None
) -> dg.AssetChecksDefinition:
    dimensions = dimensions_of(partitions)
    by_name = {check.name: check for check in checks}

    @dg.multi_asset_check(
        name=f"checks_of_{asset}",
        specs=[
            dg.AssetCheckSpec(check.name, asset=asset, description=check.description, blocking=check.blocking,
                              partitions_def=partitions)
            for check in checks
        ],
        can_subset=True,
    )  # fmt: skip
    def evaluate(context: dg.AssetCheckExecutionContext, workspace: WorkspaceResource) -> Iterator[dg.AssetCheckResult]:
        storage, region = workspace.region.storage(), workspace.region.settings()
        op = context.op_execution_context
        keys: Sequence[str] = op.partition_keys if partitions is not None and op.has_partition_key_range else []
        if partitions is not None and op.has_partition_key:
            keys = [op.partition_key]
        for name in sorted(key.name for key in context.selected_asset_check_keys):
            check = by_name[name]
            if keys and not op.has_partition_key:  # a range, of one partition too
                yield _range(op, check, {key: check(storage, region, Part.of(key, dimensions)) for key in keys})
            else:
                result = check(storage, region, Part.of(keys[0] if keys else None, dimensions))
                if goes_on(op.run.tags):
                    result = result._replace(severity=dg.AssetCheckSeverity.WARN)
                yield result._replace(check_name=name)

    return evaluate


def _range(op: dg.OpExecutionContext, check: Check, results: Mapping[str, dg.AssetCheckResult]) -> dg.AssetCheckResult:
    """A run over a range of partitions: log an evaluation of each, and return a summary for the run.

    The summary of a blocking check stops the run only where nothing could come after it: otherwise the partitions that
    passed go on, and each step leaves out those that did not (``gate``). The run still ends as failed.
    """
    for key, result in results.items():
        evaluation = dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(check.asset), check_name=check.name, passed=result.passed, metadata=result.metadata,
            severity=result.severity, blocking=check.blocking, partition=key,
            target_materialization_data=_newest(op.instance, check.asset, key),
        )  # fmt: skip
        op.log_event(evaluation)  # type: ignore[arg-type]  # it takes them
    failed = [key for key, result in results.items() if not result.passed]
    stops = (
        check.blocking and not goes_on(op.run.tags) and (len(failed) == len(results) or not _goes_further(op, check))
    )
    return dg.AssetCheckResult(
        passed=not failed,
        check_name=check.name,
        severity=dg.AssetCheckSeverity.ERROR if stops else dg.AssetCheckSeverity.WARN,
        metadata={
            "partitions": len(results),
            "failed_partitions": ", ".join(failed) or "none",
            "what_to_do": check.what_to_do if failed else "nothing",
        },
    )


def _goes_further(op: dg.OpExecutionContext, check: Check) -> bool:
    """Whether this run makes something from the asset that is checked."""
    graph = op.job_def.asset_layer.asset_graph
    return bool(graph.get(dg.AssetKey(check.asset)).child_keys & graph.executable_asset_keys)


def _newest(instance: dg.DagsterInstance, asset: str, partition: str | None) -> _Target | None:
    """The materialization that a partition's evaluation speaks of, without which Dagster would ignore it."""
    wanted = None if partition is None else [partition]
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=wanted), limit=1
    ).records
    if not records:
        return None
    return _Target(run_id=records[0].run_id, storage_id=records[0].storage_id, timestamp=records[0].timestamp)
