"""Group *predictions*: glacier maps by year and fold, and how good they are on held-out glaciers."""

import dagster as dg

from dl4gam_assets.assets.common import OWNERS, backfill_policy, each_partition, gpu_tags
from dl4gam_assets.partitions import Partitions, fold_of, year_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import predictions as stages

GROUP = "predictions"


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    policy = backfill_policy(p.region)

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"torch", "tiff"}, partitions_def=p.year_fold, backfill_policy=policy,
        deps=[
            dg.AssetDep("glacier_cubes", partition_mapping=p.of_year),
            dg.AssetDep("ensemble", partition_mapping=p.of_fold),
            dg.AssetDep("calibration", partition_mapping=p.of_fold),
        ],
        pool="gpu", op_tags=gpu_tags(),
    )  # fmt: skip
    def glacier_predictions(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Glacier probability and its spread for each glacier that the fold holds out (cloud-optimized GeoTIFF)."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.glacier_predictions(ws, year_of(key), fold_of(key)),
        )

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet"}, partitions_def=p.folds, backfill_policy=policy,
        deps=[
            dg.AssetDep(glacier_predictions, partition_mapping=p.baseline_year_folds),
            dg.AssetDep("band_ratio_baseline", partition_mapping=p.same),
        ],
    )  # fmt: skip
    def evaluation(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Held-out quality against the inventory: full scene, 50 m ring and debris, beside the baseline."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.evaluation(ws, fold_of(key)))

    return [glacier_predictions, evaluation]
