"""Group *change*: change of each glacier and of the region against the baseline. Partitioned by year."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition
from dl4gam_assets.partitions import Partitions, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import change as stages

GROUP = "change"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    policy = backfill_policy(p.region)

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet", "pandas"}, partitions_def=p.years, backfill_policy=policy,
        deps=[dg.AssetDep("glacier_areas", partition_mapping=p.of_year), "baseline_areas"],
    )  # fmt: skip
    def area_change(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Area change of each glacier since the baseline, with its uncertainty and quality flags."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.area_change(ws, year_of(key)))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet", "statsmodels"}, partitions_def=p.years,
        backfill_policy=policy,
        deps=[dg.AssetDep(area_change, partition_mapping=p.same), "inventory_outlines", "elevation"],
    )  # fmt: skip
    def regional_change(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Totals by region, country, size class and aspect: measured, filtered, and extrapolated to all glaciers."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.regional_change(ws, year_of(key)),
        )

    allow_missing = {"allow_missing_partitions": True}

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet", "pandas"}, metadata=allow_missing,
        deps=[dg.AssetDep("glacier_areas", partition_mapping=p.every, metadata=allow_missing)],
    )  # fmt: skip
    def area_trends(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Trend of each glacier over all its images (Theil-Sen and weighted least squares), robust to a bad one."""
        each_partition(context, workspace.open(context), lambda ws, _: stages.area_trends(ws))

    return [area_change, regional_change, area_trends]
