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
        backfill_policy=policy, deps=[dg.AssetDep(area_change, partition_mapping=p.same), "inventory_outlines"],
    )  # fmt: skip
    def regional_change(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Totals by region, country and size class: measured, filtered, and extrapolated to all glaciers."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.regional_change(ws, year_of(key)),
        )

    return [area_change, regional_change]
