"""Asset checks: the schema of every table, and what physics and plausibility demand.

Belongs here: a factory that makes a check for each table, and checks of what an estimate may not be.
Does not belong here: making or repairing anything. Each check says what to do. Blocking where an estimate would be
wrong, a warning elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import dagster as dg
import pandas as pd

from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.settings import Region
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


def pandera_schema(table: Table) -> Any:
    """The table's schema for pandera: types, nulls, ranges and keys, all failures at once."""
    import pandera.pandas as pa

    columns = {}
    for column in table.columns:
        checks = []
        if column.minimum is not None:
            checks.append(pa.Check.ge(column.minimum - 1e-9))
        if column.maximum is not None:
            checks.append(pa.Check.le(column.maximum + 1e-9))
        columns[column.name] = pa.Column(nullable=column.nullable, checks=checks, required=True)
    return pa.DataFrameSchema(columns, strict=True, unique=table.keys or None)


def schema_check(asset: str, table: Table) -> dg.AssetChecksDefinition:
    """Blocking check that what is stored of ``table`` fits its schema."""

    @dg.asset_check(
        asset=asset,
        name="schema",
        blocking=True,
        description=f"Table `{table.name}` has its columns, types and ranges.",
    )
    def check(workspace: WorkspaceResource) -> dg.AssetCheckResult:
        import pandera.errors

        frame = pd.DataFrame(workspace.region.storage().read_table(table.name))
        try:
            pandera_schema(table).validate(frame, lazy=True)
        except pandera.errors.SchemaErrors as error:
            cases = error.failure_cases.head(10)
            return dg.AssetCheckResult(
                passed=False,
                metadata={
                    "what_to_do": f"materialize {asset} again; if it stays, report these rows as a defect",
                    "failures": dg.MetadataValue.md(cases.to_markdown(index=False)),
                    "n_failures": len(error.failure_cases),
                },
            )
        return dg.AssetCheckResult(passed=True, metadata={"rows": len(frame)})

    return check


def failures_check(asset: str) -> dg.AssetChecksDefinition:
    """Warning when too many glaciers of a stage failed."""

    @dg.asset_check(
        asset=asset, name="failed_glaciers", description="Few glaciers failed; each is a row in `failures`."
    )
    def check(workspace: WorkspaceResource) -> dg.AssetCheckResult:
        storage = workspace.region.storage()
        failures = storage.read_table("failures", stage=asset)
        n_glaciers = max(len(storage.read_table("glaciers")), 1)
        worst = failures.groupby("partition")["glacier_id"].nunique().max() if len(failures) else 0
        share = float(worst) / n_glaciers
        shown = failures[["glacier_id", "partition", "error"]].head(10)
        return dg.AssetCheckResult(
            passed=share <= FAILED_SHARE,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "failed": len(failures),
                "worst_share": share,
                "what_to_do": "read the errors; materialize the partition again to retry the failed glaciers only",
                "failures": dg.MetadataValue.md(shown.to_markdown(index=False) if len(shown) else "none"),
            },
        )

    return check


def physical_check(
    asset: str,
    name: str,
    description: str,
    wrong: Callable[[Storage, Region], pd.DataFrame],
    what_to_do: str,
    *,
    blocking: bool,
) -> dg.AssetChecksDefinition:
    """Check that passes when ``wrong(storage, region)`` finds no row."""

    @dg.asset_check(asset=asset, name=name, description=description, blocking=blocking)
    def check(workspace: WorkspaceResource) -> dg.AssetCheckResult:
        rows = wrong(workspace.region.storage(), workspace.region.settings())
        return dg.AssetCheckResult(
            passed=not len(rows),
            severity=dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN,
            metadata={
                "wrong_rows": len(rows),
                "what_to_do": what_to_do,
                "rows": dg.MetadataValue.md(rows.head(10).to_markdown(index=False) if len(rows) else "none"),
            },
        )

    return check


# --------------------------------------------------------------------------------------------- what may not be
def folds_overlap(storage: Storage, region: Region) -> pd.DataFrame:
    """Glaciers that are not tested exactly once."""
    folds = storage.read_table("folds")
    tested = folds[folds["role"] == "test"].groupby("glacier_id").size()
    counts = tested.reindex(folds["glacier_id"].unique(), fill_value=0).rename("times_tested").reset_index()
    return counts[counts["times_tested"] != 1]


def areas_out_of_order(storage: Storage, region: Region) -> pd.DataFrame:
    """Areas that are not inside their own interval."""
    areas = storage.read_table("areas")
    bad = (areas["lower_km2"] > areas["area_km2"] + 1e-9) | (areas["area_km2"] > areas["upper_km2"] + 1e-9)
    return areas.loc[bad, ["glacier_id", "year", "lower_km2", "area_km2", "upper_km2"]]


def low_recall(storage: Storage, region: Region) -> pd.DataFrame:
    """Glaciers whose inventory outline is not found again in the baseline year."""
    areas = storage.read_table("baseline_areas")
    return areas.loc[areas["recall"] < region.change.recall_min, ["glacier_id", "recall", "area_km2"]]


def unexplained_growth(storage: Storage, region: Region) -> pd.DataFrame:
    """Glaciers flagged for implausible growth (change.growth_max) that pass the quality filter all the same."""
    changes = storage.read_table("changes")
    grew = changes["flag_growth"].astype(bool) & changes["ok"].astype(bool)
    return changes.loc[grew, ["glacier_id", "year", "rate_pct_per_year", "snr"]]


def scenes_below_coverage(storage: Storage, region: Region) -> pd.DataFrame:
    """Selected scenes that miss the thresholds without an override."""
    scenes = storage.read_table("scenes")
    limits = region.imagery.selection
    bad = scenes["selected"].astype(bool) & (
        (scenes["coverage"] < limits.coverage_min) | (scenes["cloud_share"] > limits.cloud_max)
    )
    bad &= ~scenes["reason"].str.contains("override", case=False, na=False)
    return scenes.loc[bad, ["glacier_id", "year", "date", "coverage", "cloud_share", "reason"]]


def build_checks(region: Region) -> Sequence[dg.AssetChecksDefinition]:
    """All checks of a region's graph."""
    return [
        *(schema_check(asset, TABLES[table]) for asset, table in TABLE_OF.items()),
        *(failures_check(asset) for asset in GLACIER_STAGES),
        physical_check(
            "cross_validation_folds", "tested_once", "Each modelled glacier is tested in exactly one iteration.",
            folds_overlap, "materialize cross_validation_folds again", blocking=True,
        ),
        physical_check(
            "glacier_areas", "area_inside_interval", "lower <= area <= upper for every estimate.",
            areas_out_of_order, "report these rows as a defect: the interval guarantees it", blocking=True,
        ),
        physical_check(
            "baseline_areas", "recall_of_inventory", "The ensemble finds the inventory's outlines again.",
            low_recall, "look at these glaciers' images: cloud, snow or a wrong date? Add an override line",
            blocking=False,
        ),
        physical_check(
            "area_change", "growth_is_flagged", "No glacier with the flag `growth` passes the quality filter.",
            unexplained_growth,
            "look at the image: seasonal snow? Add an override line for the year, or `growth` to change.filter",
            blocking=False,
        ),
        physical_check(
            "selected_scenes", "thresholds", "Selected scenes keep the coverage and cloud thresholds.",
            scenes_below_coverage, "materialize selected_scenes again", blocking=True,
        ),
    ]  # fmt: skip
