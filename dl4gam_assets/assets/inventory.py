"""Group *inventory*: outlines, debris, zones and the geographic cross-validation. Not partitioned."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, each_partition
from dl4gam_assets.partitions import Partitions
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import inventory as stages
from dl4gam_assets.stages import simulation

GROUP = "inventory"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    simulated = p.region.simulation is not None

    @dg.asset(group_name="simulation", owners=OWNERS, kinds={"python", "tiff"})
    def simulated_inputs(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Simulated terrain, glaciers, scenes and inventory of this region, made from a seed.

        The files enter the graph through the same doors as real data. The true outlines of every year stay apart and
        are used only to judge.
        """
        each_partition(context, workspace.open(context), lambda ws, _: simulation.simulated_inputs(ws))

    @dg.asset(
        group_name=GROUP,
        owners=OWNERS,
        kinds={"parquet", "geopandas"},
        deps=[simulated_inputs] if simulated else [],
    )
    def inventory_outlines(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Glacier outlines of the inventory: checked, repaired where possible, with areas, countries and UTM zones.

        Outlines that can not be used are rows in `failures`. Glaciers of at least `min_area_km2` are modelled; smaller
        ones stay for the regional extrapolation.
        """
        each_partition(context, workspace.open(context), lambda ws, _: stages.inventory_outlines(ws))

    @dg.asset(group_name=GROUP, owners=OWNERS, kinds={"parquet", "geopandas"}, deps=[inventory_outlines])
    def debris_outlines(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Debris-covered ice inside the outlines, merged from all sources."""
        each_partition(context, workspace.open(context), lambda ws, _: stages.debris_outlines(ws))

    @dg.asset(group_name=GROUP, owners=OWNERS, kinds={"parquet", "geopandas"}, deps=[inventory_outlines])
    def glacier_zones(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Buffers around each outline (for example 20 m and 50 m) that do not overlap between neighbours."""
        each_partition(context, workspace.open(context), lambda ws, _: stages.glacier_zones(ws))

    @dg.asset(group_name=GROUP, owners=OWNERS, kinds={"parquet", "pandas"}, deps=[inventory_outlines])
    def cross_validation_folds(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Geographic cross-validation: which glaciers train, validate and test in each iteration, from east to west.

        Every glacier is tested exactly once; its estimate always comes from models that never saw it.
        """
        each_partition(context, workspace.open(context), lambda ws, _: stages.cross_validation_folds(ws))

    assets = [inventory_outlines, debris_outlines, glacier_zones, cross_validation_folds]
    return [simulated_inputs, *assets] if simulated else assets
