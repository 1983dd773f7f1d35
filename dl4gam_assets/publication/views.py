"""The views of results.duckdb, and the table that says whose results they are: meaning, SQL and columns.

Belongs here: questions that people ask first, each with the meaning of every column of its answer.
Does not belong here: the tables (``tables``), building the file (``database``), words of the page (``schema``).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from dl4gam_assets.tables import TABLES, Column


class View(NamedTuple):
    """A question with a name. ``stored``: its answer is kept as a table, because it takes long to sort."""

    meaning: str
    sql: str
    columns: tuple[Column, ...]
    stored: bool = False


def _of(table: str, *names: str) -> tuple[Column, ...]:
    """Columns of a view that are those of a table; keys of the table are none of the view."""
    return tuple(dataclasses.replace(TABLES[table].column(name), key=False, nullable=True) for name in names)


def _new(name: str, dtype: str, meaning: str) -> Column:
    return Column(name, dtype, meaning)


_MEANING = {(t.name, c.name): c.meaning for t in TABLES.values() for c in t.columns}
_GLACIER = _of("glaciers", "name", "country")
_RATES = _of("changes", "rate_km2_per_year", "rate_std_km2_per_year", "rate_pct_per_year", "rate_std_pct_per_year")
_TOTALS = _of(
    "regional_changes", "n_glaciers", "n_measured", "baseline_area_km2", "area_km2", "std_km2", "rate_km2_per_year",
    "rate_std_km2_per_year", "rate_pct_per_year", "rate_std_pct_per_year", "correlation",
)  # fmt: skip
_SCORES = (("iou", "Intersection over union"), ("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"))

VIEWS: dict[str, View] = {
    "glacier_time_series": View(
        "Area of every glacier in every year, with its interval and its change since the baseline.",
        """
        SELECT a.glacier_id, g.name, g.country, a.year, a.image_date, a.area_km2, a.lower_km2, a.upper_km2, a.std_km2,
               c.rate_km2_per_year, c.rate_std_km2_per_year, c.rate_pct_per_year, c.rate_std_pct_per_year,
               c.ok, c.flags
        FROM areas a
        LEFT JOIN glaciers g USING (glacier_id)
        LEFT JOIN changes c USING (glacier_id, year)
        ORDER BY a.glacier_id, a.year
        """,
        (
            *_of("areas", "glacier_id"), *_GLACIER,
            *_of("areas", "year", "image_date", "area_km2", "lower_km2", "upper_km2", "std_km2"),
            *_RATES, *_of("changes", "ok", "flags"),
        ),
    ),
    "largest_losses": View(
        "Change of every glacier since the baseline in the latest year that has changes, largest loss first. "
        "Rows that are not ok did not pass the quality filter; flags say why.",
        """
        SELECT c.glacier_id, g.name, g.country, c.year, c.baseline_area_km2, c.area_km2,
               c.area_km2 - c.baseline_area_km2 AS change_km2, c.rate_km2_per_year, c.rate_std_km2_per_year,
               c.rate_pct_per_year, c.rate_std_pct_per_year, c.snr, c.ok, c.flags
        FROM changes c
        LEFT JOIN glaciers g USING (glacier_id)
        WHERE c.year = (SELECT max(year) FROM changes)
        ORDER BY change_km2, c.glacier_id
        """,
        (
            *_of("changes", "glacier_id"), *_GLACIER, *_of("changes", "year", "baseline_area_km2", "area_km2"),
            _new("change_km2", "float64", "Area in the year less area in the baseline"), *_RATES,
            *_of("changes", "snr", "ok", "flags"),
        ),
        stored=True,
    ),
    "robust_trends": View(
        "Trend of every glacier over all its images, beside the change since the baseline. Where both "
        "disagree, odd_year names the image to look at.",
        """
        SELECT t.glacier_id, g.name, g.country, t.n_years, t.first_date, t.last_date, t.first_area_km2,
               t.theil_sen_pct_per_year, t.theil_sen_km2_per_year, t.theil_sen_lower_km2_per_year,
               t.theil_sen_upper_km2_per_year, t.wls_km2_per_year, t.wls_std_km2_per_year,
               c.rate_km2_per_year AS two_year_km2_per_year, t.odd_year, t.odd_residual
        FROM trends t
        LEFT JOIN glaciers g USING (glacier_id)
        LEFT JOIN changes c ON c.glacier_id = t.glacier_id AND c.year = (SELECT max(year) FROM changes)
        ORDER BY t.glacier_id
        """,
        (
            *_of("trends", "glacier_id"), *_GLACIER,
            *_of("trends", "n_years", "first_date", "last_date", "first_area_km2", "theil_sen_pct_per_year",
                 "theil_sen_km2_per_year", "theil_sen_lower_km2_per_year", "theil_sen_upper_km2_per_year",
                 "wls_km2_per_year", "wls_std_km2_per_year"),
            _new("two_year_km2_per_year", "float64", "Rate between the baseline and the latest year alone"),
            *_of("trends", "odd_year", "odd_residual"),
        ),
    ),
    "evaluation_by_class": View(
        "Held-out quality over all folds: all glaciers, by size class, and debris-covered and clean glaciers apart. "
        "iou, precision, recall and f1 come from summed pixels; weighted_ ones are means over glaciers weighted by "
        "inventory area, mean_ ones plain means over glaciers. Never compare figures of different scopes.",
        """
        WITH judged AS (SELECT *, inventory_area_km2 AS weight FROM evaluation WHERE role = 'test' AND n_pixels > 0),
        named AS (
            SELECT 0 AS place, 'all' AS grouping, 'all' AS "group", * FROM judged
            UNION ALL SELECT 1, 'size_class', size_class, * FROM judged WHERE size_class IS NOT NULL
            UNION ALL SELECT 2, 'debris', CASE WHEN debris_covered THEN 'debris-covered' ELSE 'clean' END, *
                      FROM judged WHERE debris_covered IS NOT NULL
        )
        SELECT method, scope, grouping, "group", count(DISTINCT glacier_id) AS n_glaciers,
               sum(n_pixels)::BIGINT AS n_pixels, sum(true_positive)::BIGINT AS true_positive,
               sum(false_positive)::BIGINT AS false_positive, sum(false_negative)::BIGINT AS false_negative,
               CASE WHEN count(iou) > 0 THEN sum(true_positive)
                   / nullif(sum(true_positive + false_positive + false_negative), 0) END AS iou,
               CASE WHEN count(precision) > 0 THEN sum(true_positive)
                   / nullif(sum(true_positive + false_positive), 0) END AS precision,
               sum(true_positive) / nullif(sum(true_positive + false_negative), 0) AS recall,
               CASE WHEN count(f1) > 0 THEN sum(2 * true_positive)
                   / nullif(sum(2 * true_positive + false_positive + false_negative), 0) END AS f1,
               sum(iou * weight) / sum(weight) FILTER (iou IS NOT NULL) AS weighted_iou,
               sum(precision * weight) / sum(weight) FILTER (precision IS NOT NULL) AS weighted_precision,
               sum(recall * weight) / sum(weight) FILTER (recall IS NOT NULL) AS weighted_recall,
               sum(f1 * weight) / sum(weight) FILTER (f1 IS NOT NULL) AS weighted_f1,
               avg(iou) AS mean_iou, avg(precision) AS mean_precision, avg(recall) AS mean_recall, avg(f1) AS mean_f1
        FROM named
        GROUP BY method, scope, place, grouping, "group"
        ORDER BY method, scope, place, min(weight), "group"
        """,
        (
            *_of("evaluation", "method", "scope"),
            _new("grouping", "string", "all, size_class or debris"),
            _new("group", "string", "Name of the group: a size class in km2, debris-covered or clean"),
            _new("n_glaciers", "int64", "Glaciers judged"),
            *_of("evaluation", "n_pixels", "true_positive", "false_positive", "false_negative"),
            *(_new(score, "float64", f"{name} of all pixels together") for score, name in _SCORES),
            *(_new(f"weighted_{score}", "float64", f"{name}: mean over glaciers weighted by inventory area")
              for score, name in _SCORES),
            *(_new(f"mean_{score}", "float64", f"{name}: mean over glaciers") for score, name in _SCORES),
        ),
    ),
    "lineage_inputs": View(
        "Every input of every estimate, one row each: scene files, cube, terrain tiles, weights, calibration, "
        "settings, packages, and the materializations (with Dagster run) that they come from.",
        """
        WITH made AS (
            SELECT * FROM lineage_sources WHERE kind = 'materialization'
        ),
        named AS (
            SELECT *, CASE WHEN glacier_id LIKE '.%' THEN '%2E' || url_encode(glacier_id[2:])
                           ELSE url_encode(glacier_id) END AS file
            FROM lineage
        ),
        own AS (
            SELECT glacier_id, year, fold, 'glacier cube' AS kind, glacier_id || ' ' || year AS name,
                   'cubes/year=' || year || '/' || file || '.nc' AS address, cube_fingerprint AS checksum,
                   'glacier_cubes' AS asset, year::VARCHAR AS "partition"
            FROM named
            UNION ALL
            SELECT glacier_id, year, fold, 'static layers', glacier_id, 'static/' || file || '.nc', static_fingerprint,
                   'elevation', 'all'
            FROM named WHERE static_fingerprint IS NOT NULL
            UNION ALL
            SELECT glacier_id, year, fold, 'prediction', glacier_id || ' ' || year,
                   'predictions/year=' || year || '/' || file || '.tif', prediction_fingerprint, 'glacier_predictions',
                   year || '.fold_' || fold
            FROM named
        )
        SELECT l.glacier_id, l.year, l.fold, s.kind, s.name, s.address, s.checksum, s.asset, s.partition, s.run_id,
               s.materialization_id, s.code_version, s.settings_fingerprint, s.software_fingerprint, s.hardware, s.time
        FROM lineage l JOIN lineage_sources s ON s.year = l.year AND s.fold = l.fold AND s.scope = 'all'
        UNION ALL
        SELECT l.glacier_id, l.year, l.fold, s.kind, s.name, s.address, s.checksum, s.asset, s.partition, s.run_id,
               s.materialization_id, s.code_version, s.settings_fingerprint, s.software_fingerprint, s.hardware, s.time
        FROM lineage l JOIN lineage_sources s
          ON s.year = l.year AND s.fold = l.fold AND s.scope = 'image' AND s.scope_key = l.scene_ids
        UNION ALL
        SELECT l.glacier_id, l.year, l.fold, s.kind, s.name, s.address, s.checksum, s.asset, s.partition, s.run_id,
               s.materialization_id, s.code_version, s.settings_fingerprint, s.software_fingerprint, s.hardware, s.time
        FROM lineage l JOIN lineage_sources s
          ON s.year = l.year AND s.fold = l.fold AND s.scope = 'terrain' AND s.scope_key = l.terrain_key
        UNION ALL
        SELECT o.glacier_id, o.year, o.fold, o.kind, o.name, o.address, o.checksum, o.asset, o.partition, m.run_id,
               m.materialization_id, m.code_version, m.settings_fingerprint, m.software_fingerprint, m.hardware, m.time
        FROM own o
        LEFT JOIN made m ON m.year = o.year AND m.fold = o.fold AND m.asset = o.asset AND m.partition = o.partition
        """,
        (
            *_of("lineage", "glacier_id", "year", "fold"),
            _new("kind", "string", f"{_MEANING['lineage_sources', 'kind']}; beside them glacier cube, static layers "
                 "and prediction of the glacier itself"),
            *_of("lineage_sources", "name", "address", "checksum", "asset", "partition", "run_id", "materialization_id",
                 "code_version", "settings_fingerprint", "software_fingerprint", "hardware", "time"),
        ),
    ),
    "changes_by_country": View(
        "Totals by country, year and method.",
        """
        SELECT r."group" AS country, r.year, r.method, r.n_glaciers, r.n_measured, r.baseline_area_km2, r.area_km2,
               r.std_km2, r.rate_km2_per_year, r.rate_std_km2_per_year, r.rate_pct_per_year, r.rate_std_pct_per_year,
               r.correlation
        FROM regional_changes r
        WHERE r.grouping = 'country'
        ORDER BY country, r.year, r.method
        """,
        (
            _new("country", "string", "Country code"), *_of("regional_changes", "year", "method"), *_TOTALS,
        ),
    ),
    "changes_by_size_class": View(
        "Totals by size of the glacier in the inventory (km²), year and method.",
        """
        SELECT r."group" AS size_class_km2, r.year, r.method, r.n_glaciers, r.n_measured, r.baseline_area_km2,
               r.area_km2, r.std_km2, r.rate_km2_per_year, r.rate_std_km2_per_year, r.rate_pct_per_year,
               r.rate_std_pct_per_year, r.correlation
        FROM regional_changes r
        WHERE r.grouping = 'size_class'
        ORDER BY r.year, r.method, try_cast(regexp_extract(r."group", '[0-9.]+') AS DOUBLE), size_class_km2
        """,
        (
            _new("size_class_km2", "string", "Size class of the outline, km2 (change.size_class_edges_km2)"),
            *_of("regional_changes", "year", "method"), *_TOTALS,
        ),
    ),
    "region_time_series": View(
        "Totals of the whole region by year and method, with the change since the baseline.",
        """
        SELECT r.year, r.method, r.n_glaciers, r.n_measured, r.baseline_year, r.baseline_area_km2, r.area_km2,
               r.std_km2, r.rate_km2_per_year, r.rate_std_km2_per_year, r.rate_pct_per_year, r.rate_std_pct_per_year,
               r.correlation
        FROM regional_changes r
        WHERE r.grouping = 'region'
        ORDER BY r.method, r.year
        """,
        (
            *_of("regional_changes", "year", "method", "n_glaciers", "n_measured", "baseline_year"), *_TOTALS[2:],
        ),
    ),
    "years_overview": View(
        "What there is of each year: estimates, glaciers that pass the quality filter, mean usable share, failures.",
        """
        WITH failed AS (
            SELECT try_cast(split_part("partition", '.', 1) AS BIGINT) AS year, count(DISTINCT glacier_id) AS n
            FROM failures WHERE stage <> 'area_change' GROUP BY 1
        )
        SELECT a.year, count(*) AS estimates, (SELECT count(*) FROM glaciers WHERE modelled) AS modelled,
               count(c.glacier_id) AS with_rate, count(*) FILTER (WHERE c.ok) AS ok, sum(a.area_km2) AS area_km2,
               min(a.image_date) AS first_image, max(a.image_date) AS last_image,
               avg(a.usable_share) AS mean_usable_share, coalesce(any_value(f.n), 0) AS failed_glaciers
        FROM areas a
        LEFT JOIN changes c USING (glacier_id, year)
        LEFT JOIN failed f ON f.year = a.year
        GROUP BY a.year
        ORDER BY a.year
        """,
        (
            *_of("areas", "year"),
            _new("estimates", "int64", "Glaciers with an area in the year"),
            _new("modelled", "int64", "Glaciers that are large enough to be mapped"),
            _new("with_rate", "int64", "Glaciers with a change since the baseline"),
            _new("ok", "int64", "Of which pass the quality filter"),
            _new("area_km2", "float64", "Sum of the areas of the year's estimates"),
            _new("first_image", "timestamp", "Date of the first image"),
            _new("last_image", "timestamp", "Date of the last image"),
            _new("mean_usable_share", "float64", "Mean share of the 20 m zone with usable pixels"),
            _new("failed_glaciers", "int64", "Glaciers that failed in a stage of the year"),
        ),
    ),
    "held_out_quality": View(
        "Scores on held-out glaciers in the inventory year, pooled over pixels and averaged over glaciers. The scopes "
        "count different pixels: compare methods within one scope only.",
        """
        SELECT e.scope, e.method, count(*) AS n_glaciers, sum(e.n_pixels)::BIGINT AS n_pixels,
               sum(e.true_positive) / nullif(sum(e.true_positive + e.false_positive + e.false_negative), 0) AS iou,
               sum(e.true_positive) / nullif(sum(e.true_positive + e.false_positive), 0) AS precision,
               sum(e.true_positive) / nullif(sum(e.true_positive + e.false_negative), 0) AS recall,
               avg(e.iou) AS mean_iou, avg(e.recall) AS mean_recall
        FROM evaluation e
        WHERE e.role = 'test'
        GROUP BY e.scope, e.method
        ORDER BY e.scope, iou DESC NULLS LAST, e.method
        """,
        (
            *_of("evaluation", "scope", "method"), _new("n_glaciers", "int64", "Glaciers judged"),
            *_of("evaluation", "n_pixels"),
            *(_new(score, "float64", f"{name} of all pixels together") for score, name in _SCORES[:3]),
            _new("mean_iou", "float64", "Intersection over union: mean over glaciers"),
            _new("mean_recall", "float64", "Recall: mean over glaciers"),
        ),
    ),
    "interval_coverage": View(
        "Share of inventory areas inside their glacier's interval in the baseline year, by fold, beside the "
        "calibration error and the share reached on validation glaciers.",
        """
        WITH inside AS (
            SELECT fold, count(*) AS n_glaciers,
                   avg((inventory_area_km2 BETWEEN lower_km2 AND upper_km2)::INTEGER) AS inside_share
            FROM baseline_areas WHERE inventory_area_km2 IS NOT NULL GROUP BY fold
        ),
        rule AS (
            SELECT fold, any_value(method) AS method, any_value(n_glaciers) AS validation_glaciers,
                   any_value(validation_coverage) AS validation_share, any_value(ece_before) AS ece_before,
                   any_value(ece_after) AS ece_after
            FROM calibration GROUP BY fold
        )
        SELECT i.*, r.* EXCLUDE (fold) FROM inside i LEFT JOIN rule r USING (fold) ORDER BY i.fold
        """,
        (
            *_of("baseline_areas", "fold"),
            _new("n_glaciers", "int64", "Glaciers with an area and an outline on the pixels"),
            _new("inside_share", "float64", "Share of outlines' areas inside their glacier's interval"),
            *_of("calibration", "method"),
            _new("validation_glaciers", "int64", "Validation glaciers behind the published tau"),
            _new("validation_share", "float64", "Share of validation areas inside their interval"),
            *_of("calibration", "ece_before", "ece_after"),
        ),
    ),
}  # fmt: skip

REGION_MEANING = "The region and all settings the results were made with. One row."
#: Columns of the table ``region``: name, type, meaning.
REGION_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("name", "VARCHAR", "Name of the region"),
    ("title", "VARCHAR", "Title"),
    ("settings", "JSON", "All settings that can change a result, as JSON"),
    ("fingerprint", "VARCHAR", "Hash of the settings"),
    ("code_version", "VARCHAR", "Version of dl4gam_assets"),
    ("simulated", "BOOLEAN", "True: inputs are simulated, the figures speak of no real glacier"),
    ("left_out", "VARCHAR", "Tables that are empty here by publication.leave_out, joined by ','"),
)
