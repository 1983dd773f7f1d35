"""Group *training*: normalization, ensemble members, calibration and the baseline. By fold, and fold x member."""

import dagster as dg
from pydantic import Field

from dl4gam_assets.assets.common import OWNERS, all_partitions, backfill_policy, each_partition, gpu_tags
from dl4gam_assets.partitions import Partitions, fold_of, member_of
from dl4gam_assets.resources import WorkspaceResource
from dl4gam_assets.stages import training as stages

GROUP = "training"


class MemberConfig(dg.Config):
    """Overrides of the region's training settings for one run. They become part of the member's fingerprint."""

    epochs: int | None = Field(None, ge=1, description="Epochs, at least 1; empty: training.epochs of the region.")
    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate, above 0; empty: training.learning_rate."
    )
    batch_size: int | None = Field(None, ge=1, description="Patches a batch, at least 1; empty: training.batch_size.")


def build(p: Partitions) -> list[dg.AssetsDefinition]:
    policy = backfill_policy(p.region)
    baseline_cubes = dg.AssetDep("glacier_cubes", partition_mapping=p.baseline_year)

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"parquet", "numpy"}, partitions_def=p.folds, backfill_policy=policy,
        deps=[baseline_cubes, "cross_validation_folds"],
    )  # fmt: skip
    def normalization(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Mean and standard deviation of each channel over the fold's training glaciers."""
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.normalization(ws, fold_of(key)),
        )

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"torch"}, partitions_def=p.fold_member, backfill_policy=policy,
        deps=[dg.AssetDep(normalization, partition_mapping=p.of_fold), baseline_cubes], pool="gpu", op_tags=gpu_tags(),
    )  # fmt: skip
    def ensemble_member(
        context: dg.AssetExecutionContext,
        config: MemberConfig,
        workspace: WorkspaceResource,
    ) -> None:
        """One trained network: a fold and a seed. Killed at any moment, it goes on from its last epoch."""
        overrides = {k: v for k, v in config.model_dump().items() if v is not None}
        all_partitions(
            context,
            workspace.open(context),
            lambda ws, keys: stages.ensemble_members(
                ws, {key: (fold_of(key), member_of(key)) for key in keys}, overrides
            ),
        )

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"torch"}, partitions_def=p.folds, backfill_policy=policy,
        deps=[dg.AssetDep(ensemble_member, partition_mapping=p.of_fold)],
    )  # fmt: skip
    def ensemble(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """The members of a fold with the hashes of their weights: what predictions are made from."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.ensemble(ws, fold_of(key)))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"statsmodels"}, partitions_def=p.folds, backfill_policy=policy,
        deps=[dg.AssetDep(ensemble, partition_mapping=p.same), baseline_cubes], pool="gpu", op_tags=gpu_tags(),
    )  # fmt: skip
    def calibration(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """Temperatures of the members and the rule of the area interval, from the fold's validation glaciers."""
        each_partition(context, workspace.open(context), lambda ws, key: stages.calibration(ws, fold_of(key)))

    @dg.asset(
        group_name=GROUP, owners=OWNERS, kinds={"numpy"}, partitions_def=p.folds, backfill_policy=policy,
        deps=[baseline_cubes, "cross_validation_folds"],
    )  # fmt: skip
    def band_ratio_baseline(context: dg.AssetExecutionContext, workspace: WorkspaceResource) -> None:
        """What the ensemble has to beat: a classical band-ratio threshold and, if the region wants it, a Random Forest.

        Both are fitted on the same training and validation glaciers.
        """
        each_partition(
            context,
            workspace.open(context),
            lambda ws, key: stages.band_ratio_baseline(ws, fold_of(key)),
        )

    return [normalization, ensemble_member, ensemble, calibration, band_ratio_baseline]
