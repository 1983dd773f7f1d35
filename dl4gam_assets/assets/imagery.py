"""Group *imagery*: the candidates of each glacier and year, and the best one. Partitioned by year."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition
from dl4gam_assets.partitions import Partitions, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import imagery as stages

GROUP = "imagery"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    policy = backfill_policy(p.region)

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"stac", "tiff"}, partitions_def=p.years, backfill_policy=policy,
        deps=["inventory_outlines", "glacier_zones"], pool="network",
    )  # fmt: skip
    def scene_candidates(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Every scene of the season over each glacier, scored: coverage, cloud, seasonal snow (NDSI), albedo."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.scene_candidates(ws, year_of(key)),
        )

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet", "pandas"}, partitions_def=p.years, backfill_policy=policy,
        deps=[dg.AssetDep(scene_candidates, partition_mapping=p.same)],
    )  # fmt: skip
    def selected_scenes(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """The best scene for each glacier, with the runner-ups and the reason. Override lines win."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.selected_scenes(ws, year_of(key)),
        )

    return [scene_candidates, selected_scenes]
