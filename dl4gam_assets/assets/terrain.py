"""Group *terrain*: elevation once, elevation change by year."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition
from dl4gam_assets.partitions import Partitions, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import terrain as stages

GROUP = "terrain"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"netcdf", "xarray"}, pool="network",
        deps=["inventory_outlines", "glacier_zones", "debris_outlines"],
    )  # fmt: skip
    def elevation(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Layers of each glacier that do not change with the year: masks, elevation, slope, aspect, curvatures."""
        each_partition(context, workspace.open(context), lambda ws, _: stages.elevation(ws))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"tiff", "xarray"}, partitions_def=p.years, pool="network",
        backfill_policy=backfill_policy(p.region), deps=[elevation],
    )  # fmt: skip
    def elevation_change(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Elevation change (dh/dt) matched to the year, on each glacier's grid."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.elevation_change(ws, year_of(key)),
        )

    return [elevation, elevation_change]
