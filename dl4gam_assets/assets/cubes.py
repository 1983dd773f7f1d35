"""Group *cubes*: everything a model sees of a glacier in a year, in one file. Partitioned by year."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition
from dl4gam_assets.partitions import Partitions, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import cubes as stages


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    @dg.asset(
        group_name="cubes", owners=OWNERS, kinds={"netcdf", "xarray"}, partitions_def=p.years, pool="network",
        backfill_policy=backfill_policy(p.region),
        deps=[
            dg.AssetDep("selected_scenes", partition_mapping=p.same),
            dg.AssetDep("elevation_change", partition_mapping=p.same),
            "elevation",
        ],
    )  # fmt: skip
    def glacier_cubes(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """One cube a glacier: reflectance of the selected scene, masks, terrain and dh/dt on a UTM grid (CF NetCDF).

        A cube is rebuilt only if one of its inputs changed.
        """
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.glacier_cubes(ws, year_of(key)),
        )

    return [glacier_cubes]
