"""Group *areas*: areas with intervals by year and fold, outlines by year, and the baseline of all change."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition
from dl4gam_assets.partitions import Partitions, fold_of, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import areas as stages

GROUP = "areas"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    policy = backfill_policy(p.region)

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet"}, partitions_def=p.folds, backfill_policy=policy,
        deps=[
            dg.AssetDep("glacier_predictions", partition_mapping=p.baseline_year_folds),
            # Folds and groups with few validation glaciers take those of the other folds too.
            dg.AssetDep("calibration", partition_mapping=p.every),
            "cross_validation_folds",
            "debris_outlines",
        ],
    )  # fmt: skip
    def interval_taus(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """The interval's threshold tau of each held-out glacier, found in the inventory year and used in all years."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.interval_taus(ws, fold_of(key)))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet"}, partitions_def=p.year_fold, backfill_policy=policy,
        deps=[
            dg.AssetDep("glacier_predictions", partition_mapping=p.same),
            dg.AssetDep(interval_taus, partition_mapping=p.of_fold),
        ],
    )  # fmt: skip
    def glacier_areas(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Area of each glacier with its calibrated interval, recall, terminus altitude, and where it comes from."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.glacier_areas(ws, year_of(key), fold_of(key)),
        )

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet", "geopandas"}, partitions_def=p.years, backfill_policy=policy,
        pool="memory",
        deps=[
            dg.AssetDep("glacier_predictions", partition_mapping=p.of_year),
            dg.AssetDep(interval_taus, partition_mapping=p.every),
            # Nothing of it is read: outlines wait where a check holds the areas of the same maps back.
            dg.AssetDep(glacier_areas, partition_mapping=p.of_year),
        ],
    )  # fmt: skip
    def glacier_outlines(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Predicted outlines of the year: best, lower and upper (GeoParquet, EPSG:4326)."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.glacier_outlines(ws, year_of(key)),
        )

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet"},
        deps=[dg.AssetDep(glacier_areas, partition_mapping=p.baseline_year_folds)],
    )  # fmt: skip
    def baseline_areas(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """The areas of the baseline year, from all folds: what every change is measured against."""
        each_partition(context, workspace.open(context), lambda ws, _: stages.baseline_areas(ws))

    return [interval_taus, glacier_areas, glacier_outlines, baseline_areas]
