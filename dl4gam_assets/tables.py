"""The schema of every table: column, type, unit, meaning. One truth for Parquet, checks, DuckDB and the docs.

Belongs here: table definitions and the coercion of a frame to one.
Does not belong here: Dagster, file access, how values are computed.
Units are in the column names; areas are km2, lengths m, times UTC.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

#: Rules that make the interval of an area; each has its columns in the tables ``taus`` and ``areas``.
INTERVAL_RULES = ("published", "conformal")

_PANDAS = {
    "string": "string",
    "int64": "Int64",
    "float64": "float64",
    "bool": "boolean",
    "timestamp": "datetime64[us]",
    "geometry": "geometry",
}


class TableError(ValueError):
    """A frame does not fit its table. The message names the table, the column and the first wrong rows."""


@dataclass(frozen=True)
class Column:
    name: str
    dtype: str
    meaning: str
    key: bool = False
    nullable: bool = True
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()  # the only texts that are allowed; empty: any


@dataclass(frozen=True)
class Table:
    name: str
    meaning: str
    columns: tuple[Column, ...]
    partitioned_by: tuple[str, ...] = ()

    @property
    def geometry(self) -> str | None:
        return next((c.name for c in self.columns if c.dtype == "geometry"), None)

    @property
    def keys(self) -> list[str]:
        return [c.name for c in self.columns if c.key]

    def column(self, name: str) -> Column:
        return next(c for c in self.columns if c.name == name)

    def empty(self) -> pd.DataFrame:
        return self.conform(pd.DataFrame({c.name: [] for c in self.columns}))

    def conform(self, frame: pd.DataFrame, partition: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Order and cast columns, and check presence, nulls, key uniqueness and ranges.

        Missing nullable columns are filled with null; unknown columns are refused.

        Raises
        ------
        TableError
            naming the table, the column and the first offending keys.
        """
        names = [c.name for c in self.columns]
        extra = [c for c in frame.columns if c not in names]
        if extra:
            raise TableError(f"table {self.name}: unknown columns {extra}")
        out: dict[str, Any] = {}
        for column in self.columns:
            if partition and column.name in partition:
                values: Any = pd.Series([partition[column.name]] * len(frame), index=frame.index)
            elif column.name in frame:
                values = frame[column.name]
            elif column.nullable:
                values = pd.Series([None] * len(frame), index=frame.index, dtype=object)
            else:
                raise TableError(f"table {self.name}: column {column.name!r} is missing")
            out[column.name] = self._cast(column, values)
        if self.geometry:
            import geopandas as gpd

            crs = getattr(frame, "crs", None) or "EPSG:4326"
            result: pd.DataFrame = gpd.GeoDataFrame(out, geometry=self.geometry, crs=crs, index=frame.index)
        else:
            result = pd.DataFrame(out, index=frame.index)
        self._check(result)
        return result

    def _cast(self, column: Column, values: pd.Series) -> Any:
        if column.dtype == "geometry":
            return values
        try:
            if column.dtype == "timestamp":
                times = pd.to_datetime(values, utc=True)
                return times.dt.tz_localize(None).astype("datetime64[us]")
            if column.dtype == "int64" and values.dtype == object:
                values = pd.to_numeric(values)
            return values.astype(_PANDAS[column.dtype])  # type: ignore[call-overload]
        except (TypeError, ValueError) as error:
            raise TableError(f"table {self.name}: column {column.name!r} is not {column.dtype}: {error}") from error

    def _check(self, frame: pd.DataFrame) -> None:
        for column in self.columns:
            values = frame[column.name]
            if not column.nullable and values.isna().any():
                raise TableError(
                    f"table {self.name}: {column.name!r} is empty in rows {self._rows(frame, values.isna())}"
                )
            for bound, wrong in (
                (column.minimum, lambda v, b: v < b - 1e-9),
                (column.maximum, lambda v, b: v > b + 1e-9),
            ):
                if bound is not None:
                    bad = wrong(values.astype("float64"), bound)
                    if bad.any():
                        raise TableError(
                            f"table {self.name}: {column.name!r} is outside [{column.minimum}, {column.maximum}] "
                            f"in rows {self._rows(frame, bad)}"
                        )
            if column.choices and (bad := values.notna() & ~values.isin(column.choices)).any():
                raise TableError(
                    f"table {self.name}: {column.name!r} is none of {', '.join(column.choices)} "
                    f"in rows {self._rows(frame, bad)}"
                )
            if column.dtype == "float64" and np.isinf(values.to_numpy(dtype=float)).any():
                raise TableError(f"table {self.name}: {column.name!r} is infinite in some rows")
        if self.keys:
            duplicated = frame.duplicated(self.keys)
            if duplicated.any():
                raise TableError(f"table {self.name}: duplicate keys {self._rows(frame, duplicated)}")

    def _rows(self, frame: pd.DataFrame, mask: pd.Series) -> list[dict[str, Any]]:
        return frame.loc[mask.to_numpy(dtype=bool), self.keys].head(3).to_dict("records")


def _c(name: str, dtype: str, meaning: str, **kw: Any) -> Column:
    return Column(name, dtype, meaning, **kw)


_ID = _c("glacier_id", "string", "Glacier id as in the inventory", key=True, nullable=False)
_YEAR = _c("year", "int64", "Year partition", key=True, nullable=False)
_FOLD = _c("fold", "int64", "Cross-validation iteration, 1..n", key=True, nullable=False, minimum=1)


_SCENE = (
    _c("date", "timestamp", "Acquisition date of the image", key=True, nullable=False),
    _c("scene_ids", "string", "Ids of the catalog items, joined by '+', in mosaicking order", nullable=False),
    _c("hrefs", "string", "JSON: item id -> asset -> address", nullable=True),
    _c("checksums", "string", "JSON: item id -> checksum or size and time stamp of its assets"),
    _c("coverage", "float64", "Valid share of the coverage geometry", minimum=0, maximum=1),
    _c("coverage_pixels", "int64", "Pixels of the coverage geometry", minimum=0),
    _c("cloud_share", "float64", "Cloudy or missing share of glacier and buffer", minimum=0, maximum=1),
    _c("cloud_share_pixels", "int64", "Pixels of glacier and buffer", minimum=0),
    _c("ndsi", "float64", "Mean NDSI of the ice-free surroundings (seasonal snow)", minimum=-1, maximum=1),
    _c("ndsi_pixels", "int64", "Clean pixels behind it", minimum=0),
    _c("albedo", "float64", "Mean broadband albedo of clean pixels"),
    _c("albedo_pixels", "int64", "Clean pixels behind it", minimum=0),
    _c("snow_score", "string", "What judged seasonal snow: ndsi, or the fallback that was used"),
    _c(
        "snow_overruled_share",
        "float64",
        "Share of glacier and buffer that a mask called cloud and that counts as clean, "
        "because it has the spectrum of snow or ice",
        minimum=0,
        maximum=1,
    ),
    _c(
        "shadow_share",
        "float64",
        "Share of glacier and buffer that counts as cloud because it is dark and blue (selection.shadow_nir_max; null: not looked for)",
        minimum=0,
        maximum=1,
    ),
    _c(
        "saturated_share",
        "float64",
        "Share of glacier and buffer that is saturated in a band (null: sensor.saturated_at is not set)",
        minimum=0,
        maximum=1,
    ),
)


def _areas(noun: str) -> tuple[Column, ...]:
    return (
        _c("area_km2", "float64", f"{noun}: best estimate", minimum=0),
        _c("lower_km2", "float64", f"{noun}: lower bound of the calibrated interval", minimum=0),
        _c("upper_km2", "float64", f"{noun}: upper bound of the calibrated interval", minimum=0),
        _c("std_km2", "float64", f"{noun}: (upper - lower) / 2", minimum=0),
    )


_AREA = (
    _ID, _YEAR, *_areas("Glacier area"),
    _c("fold", "int64", "Cross-validation iteration that made the estimate", nullable=False),
    _c("image_date", "timestamp", "Acquisition date of the image", nullable=False),
    _c("tau", "float64", "tau of the interval", minimum=0, maximum=0.5),
    *(
        _c(f"{bound}_{rule}_km2", "float64", f"{bound.capitalize()} bound of the area by the {rule} rule for tau (calibration.intervals names the rule of {bound}_km2)", minimum=0)
        for rule in INTERVAL_RULES for bound in ("lower", "upper")
    ),
    _c("inventory_area_km2", "float64", "Area of the inventory outline on the same pixels (whole or fractional: areas.pixels)", minimum=0),
    _c("recall", "float64", "Predicted share of the inventory outline", minimum=0, maximum=1),
    _c("false_positive_rate", "float64", "Predicted share of the ice-free ring 20 to 50 m outside", minimum=0, maximum=1),
    _c("debris_km2", "float64", "Debris-covered area inside the outline", minimum=0),
    _c("debris_area_km2", "float64", "Predicted ice on it: the part of area_km2 that the inventory calls debris-covered", minimum=0),
    _c("debris_recall", "float64", "Predicted share of it (null under 1% debris)", minimum=0, maximum=1),
    _c("terminus_m", "float64", "Lowest predicted elevation: median of the lowest 30 pixels, metres (null: no DEM)"),
    _c("terminus_lowest_m", "float64", "Elevation of the lowest predicted pixel alone, metres (null: no DEM)"),
    _c("terminus_lon", "float64", "Longitude of the terminus, degrees (EPSG:4326): the predicted pixel nearest to the middle of these 30 (null: no DEM)", minimum=-180, maximum=180),
    _c("terminus_lat", "float64", "Latitude of the terminus, degrees (EPSG:4326)", minimum=-90, maximum=90),
    _c("filled_share", "float64", "Share of the 50 m zone whose values were filled", minimum=0, maximum=1),
    _c("usable_share", "float64", "Share of the 20 m zone with usable pixels", minimum=0, maximum=1),
)  # fmt: skip

_TABLES = [
    Table("glaciers", "Glacier outlines of the inventory, one row a glacier (geometry EPSG:4326).", (
        _ID,
        _c("glacier_int", "int64", "Integer id used in rasters, 1..n in the order of the inventory", nullable=False, minimum=1),
        _c("name", "string", "Name"),
        _c("country", "string", "Country code"),
        _c("inventory_date", "timestamp", "Acquisition date of the outline"),
        _c("inventory_date_precision", "string", "How much of that date the inventory states: day, month (its 15th stands for it) or year (15 August)"),
        _c("inventory_area_km2", "float64", "Area of the outline, computed in its UTM zone", nullable=False, minimum=0),
        _c("stated_area_km2", "float64", "Area as the inventory's own column states it", minimum=0),
        _c("lon", "float64", "Longitude of a point inside the outline, degrees", nullable=False),
        _c("lat", "float64", "Latitude of that point, degrees", nullable=False),
        _c("utm_epsg", "int64", "EPSG code of the UTM zone of that point", nullable=False),
        _c("modelled", "bool", "At least min_area_km2, so mapped by the ensemble", nullable=False),
        _c("geometry", "geometry", "Outline", nullable=False),
    )),
    Table("zones", "Buffers around the outlines that do not overlap between neighbours (EPSG:4326).", (
        _ID,
        _c("buffer_m", "int64", "Distance from the outline in metres; negative is inside", key=True, nullable=False),
        _c("geometry", "geometry", "Zone: outline and buffer up to that distance, cut halfway to the neighbours", nullable=False),
    )),
    Table("debris", "Debris-covered ice, merged from all sources, one row a glacier that has some (EPSG:4326).", (
        _ID,
        _c("debris_km2", "float64", "Debris-covered area inside the outline", nullable=False, minimum=0),
        _c("geometry", "geometry", "Debris-covered part of the outline", nullable=False),
    )),
    Table("folds", "Geographic cross-validation: role of each modelled glacier in each iteration.", (
        _ID, _FOLD,
        _c("role", "string", "train, valid or test", nullable=False, choices=("train", "valid", "test")),
    )),
    Table("elevations", "Elevation of each modelled glacier from the DEM.", (
        _ID,
        _c("elevation_min_m", "float64", "Lowest elevation inside the outline"),
        _c("elevation_mean_m", "float64", "Mean elevation inside the outline"),
        _c("elevation_max_m", "float64", "Highest elevation inside the outline"),
        _c("slope_mean_deg", "float64", "Mean slope inside the outline"),
        _c("aspect_mean_deg", "float64", "Mean direction that the glacier faces, clockwise from north (mean of unit vectors)", minimum=0, maximum=360),
        _c("missing_share", "float64", "Share of the grid without elevation", nullable=False, minimum=0, maximum=1),
        _c("velocity_mean_m_per_year", "float64", "Mean surface speed inside the outline, where velocity is configured", minimum=0),
        _c("velocity_missing_share", "float64", "Share of the grid without velocity", minimum=0, maximum=1),
        _c("fingerprint", "string", "Hash of the content of the static layers", nullable=False),
    )),
    Table("elevation_changes", "Elevation change matched to each glacier and year.", (
        _ID, _YEAR,
        _c("period_start", "int64", "First year of the dh/dt period (null: none available)"),
        _c("period_end", "int64", "Last year of the dh/dt period"),
        _c("dhdt_mean_m_per_year", "float64", "Mean dh/dt inside the outline"),
        _c("missing_share", "float64", "Share of the grid without dh/dt", nullable=False, minimum=0, maximum=1),
        _c("fingerprint", "string", "Hash of the layer's content (none: no period)", nullable=False),
    ), ("year",)),
    Table("candidates", "Every candidate image of a glacier with its scores, before ranking.", (
        _ID, _YEAR, *_SCENE,
        _c("reason", "string", "Why it can not be used, where it could not be read"),
    ), ("year",)),
    Table("scenes", "Every candidate image of a glacier with its scores, rank and the reason of the choice.", (
        _ID, _YEAR, *_SCENE,
        _c("rank", "int64", "1 is best; null: not acceptable", minimum=1),
        _c("score", "float64", "Ranking score; lower is better"),
        _c("selected", "bool", "The image used", nullable=False),
        _c("reason", "string", "Why it was selected or not", nullable=False),
    ), ("year",)),
    Table("cubes", "One row a glacier cube that was built.", (
        _ID, _YEAR,
        _c("image_date", "timestamp", "Acquisition date of the image in the cube", nullable=False),
        _c("scene_ids", "string", "Catalog items", nullable=False),
        _c("fingerprint", "string", "Hash of the cube's content: layers, masks, image, grid", nullable=False),
        _c("height_px", "int64", "Rows", nullable=False), _c("width_px", "int64", "Columns", nullable=False),
        _c("utm_epsg", "int64", "CRS of the grid", nullable=False),
        _c("not_ok_share", "float64", "Share of the glacier's 20 m zone without usable pixels", minimum=0, maximum=1),
        _c("dem_missing_share", "float64", "Share of the cube without elevation", minimum=0, maximum=1),
        _c("dhdt_missing_share", "float64", "Share of the cube without elevation change", minimum=0, maximum=1),
        _c("velocity_missing_share", "float64", "Share of the cube without velocity (null: not configured)", minimum=0, maximum=1),
        _c("size_bytes", "int64", "Size of the file", nullable=False),
    ), ("year",)),
    Table("normalization", "Mean and standard deviation of each channel over the fold's training glaciers.", (
        _FOLD,
        _c("channel", "string", "Channel", key=True, nullable=False),
        _c("mean", "float64", "Mean of valid pixels", nullable=False),
        _c("std", "float64", "Standard deviation of valid pixels", nullable=False, minimum=0),
        _c("n_pixels", "int64", "Valid pixels (null: imported)"),
        _c("standardized", "bool", "False: the channel enters as it is (indices, slope, aspect)", nullable=False),
    ), ("fold",)),
    Table("members", "Trained ensemble members.", (
        _FOLD,
        _c("member", "int64", "Member, 1..n", key=True, nullable=False, minimum=1),
        _c("seed", "int64", "Seed", nullable=False),
        _c("sha256", "string", "Hash of the weights file", nullable=False),
        _c("best_epoch", "int64", "Epoch of the kept weights (null: an import does not say)"),
        _c("validation_iou", "float64", "IoU over validation glaciers weighted by area, kept weights", minimum=0, maximum=1),
        _c("epochs", "int64", "Epochs trained (null: imported)"),
        _c("train_patches", "int64", "Patches an epoch (null: imported)"),
        _c("seconds", "float64", "Training time", minimum=0),
        _c("parameters", "int64", "Number of weights"),
        _c("fingerprint", "string", "Hash of settings, data and code the member was trained from", nullable=False),
        _c("encoder_weights", "string", "What the encoder started from: a named set, a file, or none (random)"),
        _c("initial_sha256", "string", "Hash of the weights before the first step"),
        _c("device", "string", "Device it was trained on"),
        _c("precision", "string", "fp32 or bf16-mixed"),
        _c("patches_per_second", "float64", "Training speed, median over epochs", minimum=0),
        _c("data_wait_share", "float64", "Share of the steps' time spent waiting for data, median over epochs", minimum=0, maximum=1),
        _c("peak_memory_mb", "float64", "Largest memory while it trained, of the device, on a CPU of the process (MiB)", minimum=0),
    ), ("fold", "member")),
    Table("calibration", "Calibration of each fold: temperatures and the rule that gives tau.", (
        _FOLD,
        _c("member", "int64", "Member", key=True, nullable=False),
        _c("sha256", "string", "Hash of the member's weights that were calibrated", nullable=False),
        _c("temperature", "float64", "Temperature of the member's logits", nullable=False, minimum=0),
        _c("ece_before", "float64", "Expected calibration error of the ensemble, before", minimum=0, maximum=1),
        _c("ece_after", "float64", "Expected calibration error of the ensemble, after", minimum=0, maximum=1),
        _c("method", "string", "quantile_regression, or regional_quantile where the fold's validation glaciers are fewer than calibration.min_glaciers",
           choices=("quantile_regression", "regional_quantile")),
        _c("n_glaciers", "int64", "The fold's validation glaciers behind this rule"),
        _c("tau_scope", "string", "Whose covering taus give the tau of the areas. fold: the fold's own validation glaciers, by this rule; folds: one quantile over those of all folds that it does not test (table taus: published_n)", choices=("fold", "folds")),
        _c("coefficients", "string", "JSON: intercept and coefficients of logit(tau / 0.5), and feature scaling"),
        _c("validation_coverage", "float64", "Share of validation areas inside their interval by this rule, which was fitted on them: no proof of anything", minimum=0, maximum=1),
        _c("left_out_coverage", "float64", "The same, each glacier with the rule that was fitted on all others: what glaciers not seen can expect", minimum=0, maximum=1),
        _c("n_pixels", "int64", "Validation pixels behind the temperature and the calibration errors", minimum=0),
        _c("glacier_ids", "string", "JSON: the validation glaciers that temperature and tau were fitted on"),
        _c("temperature_at_limit", "bool", "The best temperature is a limit of calibration.temperature_bounds"),
    ), ("fold",)),
    Table("calibration_glaciers", "What calibration was fitted on: each validation glacier of a fold, in the inventory year.", (
        _ID, _FOLD,
        _c("n_pixels", "int64", "Its pixels behind temperature and calibration error", nullable=False, minimum=0),
        _c("inventory_area_km2", "float64", "Area of its outline on the pixels: what the interval is to hold", nullable=False, minimum=0),
        _c("predicted_area_km2", "float64", "Area at or above the threshold in the 20 m zone", minimum=0),
        _c("mean_probability", "float64", "Mean probability in the 20 m zone", minimum=0, maximum=1),
        _c("epistemic_std", "float64", "sqrt of the mean variance between members in the 20 m zone", minimum=0),
        _c("aleatoric_std", "float64", "sqrt of the mean p(1-p) in the 20 m zone", minimum=0),
        _c("covering_tau", "float64", "Largest tau whose interval holds the outline's area", nullable=False, minimum=0, maximum=0.5),
        _c("tau", "float64", "tau that the published rule gives it", minimum=0, maximum=0.5),
        _c("lower_km2", "float64", "Lower bound by that tau", minimum=0),
        _c("upper_km2", "float64", "Upper bound by that tau", minimum=0),
        _c("inside", "bool", "The outline's area lies between them"),
        _c("tau_left_out", "float64", "tau that the published rule, fitted on the other glaciers, gives it", minimum=0, maximum=0.5),
        _c("inside_left_out", "bool", "The outline's area lies in the interval by that tau"),
    ), ("fold",)),
    Table("reliability", "Reliability diagram of each fold's ensemble on its validation pixels, before and after the temperatures.", (
        _FOLD,
        _c("calibrated", "bool", "After the temperatures (false: before)", key=True, nullable=False),
        _c("bin", "int64", "Bin of equal width in probability, from 0", key=True, nullable=False, minimum=0),
        _c("confidence", "float64", "Mean predicted probability of its pixels", nullable=False, minimum=0, maximum=1),
        _c("frequency", "float64", "Share of them that is glacier in the inventory", nullable=False, minimum=0, maximum=1),
        _c("n_pixels", "int64", "Its pixels", nullable=False, minimum=1),
    ), ("fold",)),
    Table("baseline", "Band-ratio baseline of each fold.", (
        _FOLD,
        _c("method", "string", "Name of the baseline", key=True, nullable=False),
        _c("numerator", "string", "Numerator band"), _c("denominator", "string", "Denominator band"),
        _c("ratio_threshold", "float64", "Ice where the ratio is at least this"),
        _c("blue_threshold", "float64", "Ice only where blue (reflectance x 10000) is at least this; null: unused"),
        _c("fit_iou", "float64", "Area-weighted IoU on training and validation glaciers", minimum=0, maximum=1),
    ), ("fold",)),
    Table("taus", "The interval's tau of each glacier, found in the inventory year and used in all years.", (
        _ID,
        _c("tau", "float64", "Threshold of the interval masks: the one that calibration.intervals names", nullable=False, minimum=0, maximum=0.5),
        _FOLD,
        _c("tau_published", "float64", "tau by the published rule (quantile regression, or a regional quantile)", minimum=0, maximum=0.5),
        _c("published_method", "string", "Which of the two", choices=("quantile_regression", "regional_quantile")),
        _c("published_scope", "string", "fold: from the fold's own validation glaciers; folds: from those of all folds that it does not test", choices=("fold", "folds")),
        _c("published_n", "int64", "Validation glaciers behind it", minimum=0),
        _c("tau_conformal", "float64", "tau by split conformal prediction in the group", minimum=0, maximum=0.5),
        _c("conformal_group", "string", "Size and debris class whose validation glaciers were taken, or the coarser group"),
        _c("conformal_scope", "string", "fold: the fold's own validation glaciers; folds: those of all folds that it does not test", choices=("fold", "folds")),
        _c("conformal_n", "int64", "Validation glaciers in the group", minimum=0),
    ), ("fold",)),
    Table("predictions", "One row a glacier map that was predicted.", (
        _ID, _YEAR, _FOLD,
        _c("fingerprint", "string", "Hash of cube, members, temperatures and inference settings", nullable=False),
        _c("cube_fingerprint", "string", "Cube that was used", nullable=False),
        _c("member_sha256", "string", "Hashes of the members' weights, joined by ','", nullable=False),
        _c("filled_share", "float64", "Share of the 50 m zone whose values were filled", minimum=0, maximum=1),
        _c("predicted_area_km2", "float64", "Area at or above the threshold in the 20 m zone", minimum=0),
        _c("mean_probability", "float64", "Mean probability in the 20 m zone", minimum=0, maximum=1),
        _c("epistemic_std", "float64", "sqrt of the mean variance between members in the 20 m zone", minimum=0),
        _c("aleatoric_std", "float64", "sqrt of the mean p(1-p) in the 20 m zone", minimum=0),
        _c("seconds", "float64", "Time of the prediction", minimum=0),
    ), ("year", "fold")),
    Table("areas", "Area of each glacier in each year, with the calibrated interval.", _AREA, ("year", "fold")),
    Table("baseline_areas", "Area of each glacier in the baseline year: the areas that change is measured from.", _AREA),
    Table("evaluation", "Held-out quality by glacier, fold and method, in the inventory year.", (
        _ID, _FOLD,
        _c("role", "string", "test or valid", nullable=False, choices=("test", "valid")),
        _c("method", "string", "ensemble or the name of a baseline", key=True, nullable=False),
        _c("scope", "string", "scene: every valid pixel of the glacier's cell in the full scene; ring: within 50 m (the paper's); "
           "debris: debris-covered pixels (recall only); clean_ice: the outline's other pixels (recall only); "
           "reference: as scene, judged by a second inventory", key=True, nullable=False,
           choices=("scene", "ring", "debris", "clean_ice", "reference")),
        _c("n_pixels", "int64", "Pixels judged", nullable=False, minimum=0),
        _c("true_positive", "int64", "Pixels", nullable=False, minimum=0),
        _c("false_positive", "int64", "Pixels", nullable=False, minimum=0),
        _c("false_negative", "int64", "Pixels", nullable=False, minimum=0),
        _c("iou", "float64", "Intersection over union", minimum=0, maximum=1),
        _c("precision", "float64", "Precision", minimum=0, maximum=1),
        _c("recall", "float64", "Recall", minimum=0, maximum=1),
        _c("f1", "float64", "F1", minimum=0, maximum=1),
        _c("inventory_area_km2", "float64", "Area of the outline: the weight in area-weighted means", minimum=0),
        _c("size_class", "string", "Size class of the outline, km2 (change.size_class_edges_km2)"),
        _c("debris_share", "float64", "Debris-covered share of the outline (null: the region has no debris source)", minimum=0, maximum=1),
        _c("debris_covered", "bool", "That share is at least evaluation.debris_covered_min (null: unknown)"),
    ), ("fold",)),
    Table("outlines", "Predicted outlines of each year: best, lower and upper (EPSG:4326).", (
        _ID, _YEAR,
        _c("bound", "string", "best, lower or upper", key=True, nullable=False, choices=("best", "lower", "upper")),
        _c("area_km2", "float64", "Area of the sieved (and simplified, where asked for) outline in its UTM zone", nullable=False, minimum=0),
        _c("geometry", "geometry", "Outline", nullable=False),
    ), ("year",)),
    Table("changes", "Area change of each glacier against the baseline.", (
        _ID, _YEAR,
        _c("baseline_year", "int64", "Baseline partition", nullable=False),
        _c("baseline_date", "timestamp", "Date of the baseline image", nullable=False),
        _c("image_date", "timestamp", "Date of the image", nullable=False),
        _c("years", "float64", "Time between them in years"),
        _c("baseline_area_km2", "float64", "Area in the baseline", nullable=False, minimum=0),
        _c("baseline_std_km2", "float64", "Its standard deviation", nullable=False, minimum=0),
        _c("area_km2", "float64", "Area in the year", nullable=False, minimum=0),
        _c("std_km2", "float64", "Its standard deviation", nullable=False, minimum=0),
        _c("rate_km2_per_year", "float64", "Rate of change", nullable=False),
        _c("rate_std_km2_per_year", "float64", "Its standard deviation", nullable=False, minimum=0),
        _c("rate_pct_per_year", "float64", "Rate in percent of the baseline area"),
        _c("rate_std_pct_per_year", "float64", "Its standard deviation", minimum=0),
        _c("snr", "float64", "|rate| / standard deviation", minimum=0),
        _c("recall", "float64", "Recall in the inventory year", minimum=0, maximum=1),
        _c("usable_share", "float64", "Share of the glacier and its 20 m zone that was seen, in the worse of both images", minimum=0, maximum=1),
        _c("filled_share", "float64", "Share of the 50 m zone that was filled, in the worse of both years", minimum=0, maximum=1),
        _c("flag_snr", "bool", "The change is smaller than its own deviation (change.snr_min)", nullable=False),
        _c("flag_recall", "bool", "Too little of the outline was found in the inventory year (change.recall_min)", nullable=False),
        _c("flag_cloud", "bool", "Too little of the glacier was seen in one of the images (change.usable_min)", nullable=False),
        _c("flag_filled", "bool", "Too much of the map was filled in one of the years (change.filled_max)", nullable=False),
        _c("flag_growth", "bool", "The glacier grew by more than its uncertainty allows (change.growth_max)", nullable=False),
        _c("ok", "bool", "None of the flags of change.filter is set (published: snr and recall)", nullable=False),
        _c("flags", "string", "Names of the flags that are set, joined by ','"),
    ), ("year",)),
    Table("trends", "Trend of each glacier's area over all its images: robust, so that one bad image does not make the story.", (
        _ID,
        _c("n_years", "int64", "Images (of different dates) behind the trend", nullable=False, minimum=3),
        _c("first_date", "timestamp", "Date of the first image", nullable=False),
        _c("last_date", "timestamp", "Date of the last image", nullable=False),
        _c("first_area_km2", "float64", "Area at the first date on the Theil-Sen line", nullable=False),
        _c("theil_sen_km2_per_year", "float64", "Median of the slopes between all pairs of images", nullable=False),
        _c("theil_sen_lower_km2_per_year", "float64", "Lower end of its 68% bootstrap interval", nullable=False),
        _c("theil_sen_upper_km2_per_year", "float64", "Upper end of its 68% bootstrap interval", nullable=False),
        _c("theil_sen_pct_per_year", "float64", "The slope in percent of first_area_km2"),
        _c("wls_km2_per_year", "float64", "Slope by weighted least squares (weights 1/std^2)", nullable=False),
        _c("wls_std_km2_per_year", "float64", "Its standard deviation, widened where the scatter exceeds the areas' deviations", nullable=False, minimum=0),
        _c("odd_year", "int64", "Year of the area that lies farthest from the Theil-Sen line", nullable=False),
        _c("odd_residual", "float64", "Its distance in its own standard deviations (signed)"),
    )),
    Table("regional_changes", "Totals by region, country, size class and aspect.", (
        _YEAR,
        _c("grouping", "string", "region, country, size_class or aspect", key=True, nullable=False, choices=("region", "country", "size_class", "aspect")),
        _c("group", "string", "Name of the group", key=True, nullable=False),
        _c("method", "string", "measured (all measured glaciers), filtered (quality filter), extrapolated (all glaciers) or extrapolated_without_snr (the same without the signal-to-noise filter)", key=True, nullable=False,
           choices=("measured", "filtered", "extrapolated", "extrapolated_without_snr")),
        _c("baseline_year", "int64", "Baseline partition", nullable=False),
        _c("n_glaciers", "int64", "Glaciers in the total", nullable=False, minimum=0),
        _c("n_measured", "int64", "Of which measured", nullable=False, minimum=0),
        _c("years", "float64", "Area-weighted time since the baseline, years"),
        _c("baseline_area_km2", "float64", "Area in the baseline", minimum=0),
        _c("baseline_std_km2", "float64", "Its standard deviation", minimum=0),
        _c("area_km2", "float64", "Area in the year", minimum=0),
        _c("std_km2", "float64", "Its standard deviation", minimum=0),
        _c("rate_km2_per_year", "float64", "Rate of change (null in the baseline year)"),
        _c("rate_std_km2_per_year", "float64", "Its standard deviation", minimum=0),
        _c("rate_pct_per_year", "float64", "Rate in percent of the baseline area"),
        _c("rate_std_pct_per_year", "float64", "Its standard deviation", minimum=0),
        _c("correlation", "float64", "Correlation of errors between glaciers that the deviation assumes", minimum=0, maximum=1),
        _c("correlation_length_km", "float64", "Length over which it decays with distance; null: it does not", minimum=0),
    ), ("year",)),
    Table("failures", "Glaciers that a stage could not do, and why. Replaced when the stage runs again.", (
        _ID,
        _c("stage", "string", "Asset that failed", key=True, nullable=False),
        _c("partition", "string", "Partition of that asset", key=True, nullable=False),
        _c("error", "string", "What happened and what to do", nullable=False),
        _c("kind", "string", "Class of the error", nullable=False),
        _c("time", "timestamp", "When, UTC", nullable=False),
    ), ("stage", "partition")),
    Table("lineage", "Where each estimate comes from, one row a glacier and year. What several estimates share is in lineage_sources; the view lineage_inputs joins both.", (
        _ID, _YEAR,
        _c("fold", "int64", "Cross-validation iteration", nullable=False),
        _c("scene_ids", "string", "Catalog items of the image; key of its rows in lineage_sources", nullable=False),
        _c("image_date", "timestamp", "Date of the image", nullable=False),
        _c("checksums", "string", "JSON: item id -> checksums"),
        _c("cube_fingerprint", "string", "Hash of the content of the glacier cube", nullable=False),
        _c("static_fingerprint", "string", "Hash of the content of its masks and terrain"),
        _c("dhdt_fingerprint", "string", "Hash of the content of its elevation change; 'none' without"),
        _c("terrain_key", "string", "Key of the elevation and dh/dt tiles in lineage_sources; null: no tile"),
        _c("dem_source", "string", "Elevation, in words"),
        _c("dhdt_source", "string", "Elevation change, in words"),
        _c("member_sha256", "string", "Weights, joined by ','", nullable=False),
        _c("calibration_fingerprint", "string", "Calibration", nullable=False),
        _c("prediction_fingerprint", "string", "Prediction: its cube, members, temperatures and inference settings", nullable=False),
        _c("tau", "float64", "The interval's tau that was used", minimum=0, maximum=0.5),
        _c("settings_fingerprint", "string", "Settings of the region; key of table settings", nullable=False),
        _c("software_fingerprint", "string", "Versions of the packages; key of table software"),
        _c("code_version", "string", "Version of the package, and commit where known", nullable=False),
        _c("run_ids", "string", "JSON: asset -> Dagster run id"),
        _c("time", "timestamp", "When the estimate was made, UTC", nullable=False),
    ), ("year", "fold")),
    Table("lineage_sources", "What estimates were made from, each named once for the estimates of a year and fold that share it.", (
        _YEAR, _FOLD,
        _c("scope", "string", "all: every estimate of the year and fold; image: those with this scene_ids; terrain: those with this terrain_key", key=True, nullable=False, choices=("all", "image", "terrain")),
        _c("scope_key", "string", "scene_ids or terrain_key of the lineage rows that it belongs to; empty for all", key=True, nullable=False),
        _c("kind", "string", "scene, elevation, elevation change, velocity, weights, calibration, taus, normalization, folds, inventory, zones, debris, overrides, settings, package, code, hardware, imported (a published file that stands in for work of our own) or materialization", key=True, nullable=False),
        _c("name", "string", "Item id, file name, member, package or asset", key=True, nullable=False),
        _c("address", "string", "Where it was read: path (of the store or below data_root) or URL"),
        _c("checksum", "string", "Checksum, fingerprint or version"),
        _c("asset", "string", "Asset whose materialization it comes from"),
        _c("partition", "string", "Partition of that asset"),
        _c("run_id", "string", "Dagster run of that materialization; null: made without Dagster"),
        _c("materialization_id", "string", "Id of that materialization, also in its metadata in Dagster"),
        _c("code_version", "string", "Version of this package that made it"),
        _c("settings_fingerprint", "string", "Settings of the region when it was made; key of table settings"),
        _c("software_fingerprint", "string", "Versions of the packages that made it; key of table software"),
        _c("hardware", "string", "Class of the processor, and the accelerator, that made it"),
        _c("time", "timestamp", "When it was made, UTC"),
    ), ("year", "fold")),
    Table("settings", "All settings that results were made with, by fingerprint.", (
        _c("fingerprint", "string", "Hash of the settings", key=True, nullable=False),
        _c("settings", "string", "JSON of all settings that can change a result", nullable=False),
    ), ("fingerprint",)),
    Table("software", "Versions of Python, GDAL and packages that results were made with, by fingerprint.", (
        _c("fingerprint", "string", "Hash of all versions", key=True, nullable=False),
        _c("package", "string", "Name", key=True, nullable=False),
        _c("version", "string", "Version", nullable=False),
    ), ("fingerprint",)),
]  # fmt: skip

TABLES: dict[str, Table] = {table.name: table for table in _TABLES}


# --------------------------------------------------------------------------------------------- rows of one glacier
#: Frames up to this many rows are searched anew each time: that takes less than a tenth of a millisecond.
_SMALL = 2000
_positions: dict[int, tuple[Any, dict[str, np.ndarray]]] = {}


def rows_of(frame: pd.DataFrame, glacier_id: str) -> pd.DataFrame:
    """The rows of a glacier, as ``frame[frame["glacier_id"] == glacier_id]`` gives them; empty where there are none.

    For tables that are asked for one glacier after the other and never changed: where each glacier's rows are is found
    once a frame. With 215,000 glaciers a comparison takes tens of milliseconds each time.
    """
    if len(frame) <= _SMALL:
        return frame[(frame["glacier_id"] == glacier_id).to_numpy(dtype=bool, na_value=False)]
    known = _positions.get(id(frame))
    if known is None or known[0]() is not frame:
        codes, names = pd.factorize(frame["glacier_id"].astype(object).to_numpy())
        order = np.argsort(codes, kind="stable")
        edges = np.searchsorted(codes[order], np.arange(len(names) + 1))  # rows without an id have the code -1
        key = id(frame)
        known = (
            weakref.ref(frame, lambda _: _positions.pop(key, None)),
            {str(n): order[edges[i] : edges[i + 1]] for i, n in enumerate(names)},
        )
        _positions[key] = known
    return frame.iloc[known[1].get(glacier_id, np.empty(0, dtype=np.intp))]
