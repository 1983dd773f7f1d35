"""Group *publication*: what is handed on: results.duckdb, the year's report, a STAC catalog of the outputs."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition
from dl4gam_assets.partitions import Partitions, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import publication as stages

GROUP = "publication"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    policy = backfill_policy(p.region)
    allow_missing = {"allow_missing_partitions": True}

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"duckdb"}, metadata=allow_missing, pool="memory",
        deps=[
            dg.AssetDep("regional_change", partition_mapping=p.every, metadata=allow_missing),
            "area_trends",
            dg.AssetDep("glacier_outlines", partition_mapping=p.every, metadata=allow_missing),
            dg.AssetDep("evaluation", partition_mapping=p.every, metadata=allow_missing),
            # Their table is in it as it is: a check that fails for one of them holds the database back.
            dg.AssetDep("glacier_areas", partition_mapping=p.every, metadata=allow_missing),
        ],
    )  # fmt: skip
    def results_database(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """results.duckdb: every table in one file, replaced as a whole, so that readers never wait."""
        each_partition(context, workspace.open(context), lambda ws, _: stages.results_database(ws))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"html"}, partitions_def=p.years, backfill_policy=policy,
        deps=[
            dg.AssetDep("regional_change", partition_mapping=p.same),
            dg.AssetDep("glacier_outlines", partition_mapping=p.same),
            dg.AssetDep("evaluation", partition_mapping=p.every),
        ],
    )  # fmt: skip
    def report(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """The year in one self-contained HTML page: change with interval, map, largest changes, quality."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.report(ws, year_of(key)))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"stac"}, partitions_def=p.years, backfill_policy=policy,
        deps=[dg.AssetDep("glacier_outlines", partition_mapping=p.same)],
    )  # fmt: skip
    def stac_catalog(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """STAC catalog of the year's maps and outlines, ready to be served or put on a disk."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.stac_catalog(ws, year_of(key)))

    return [results_database, report, stac_catalog]
