"""The only years, folds and members, their products, and the mappings between them (Dagster partitions).

Belongs here: every partitions definition and partition mapping of the asset graph, made once for a region.
Does not belong here: assets. Two equal-looking definitions made in two places would silently get an identity mapping,
so nothing else constructs one.

- **year**: calendar years from the region's first to its last (or to the present one).
- **fold**: iterations of the geographic cross-validation, ``fold_1`` ...
- **member**: ensemble members (seeds), ``member_01`` ...
Keys of two dimensions are never split as text: use :func:`year_of`, :func:`fold_of`, :func:`member_of`.
"""

import datetime as dt
import functools

import dagster as dg

from dl4gam_assets.settings import Region
from dl4gam_assets.stages.base import fold_label, member_label


class Partitions:
    """Partitions definitions and mappings of one region."""

    def __init__(self, region: Region):
        self.region = region
        last = region.years.last
        self.years = dg.TimeWindowPartitionsDefinition(
            cron_schedule="0 0 1 1 *",
            start=str(region.years.first),
            fmt="%Y",
            # Without an end the current, unfinished year has to be a partition too: end_offset opens it.
            **({"end": str(last + 1)} if last is not None else {"end_offset": 1}),
        )
        self.folds = dg.StaticPartitionsDefinition([fold_label(i) for i in range(1, region.folds.n + 1)])
        self.members = dg.StaticPartitionsDefinition([member_label(i) for i in range(1, region.training.members + 1)])
        self.year_fold = dg.MultiPartitionsDefinition({"year": self.years, "fold": self.folds})
        self.fold_member = dg.MultiPartitionsDefinition({"fold": self.folds, "member": self.members})

    @property
    def baseline(self) -> str:
        return str(self.region.years.baseline)

    # ------------------------------------------------------------------ mappings
    @functools.cached_property
    def same(self) -> dg.PartitionMapping:
        """Each partition from the same one."""
        return dg.IdentityPartitionMapping()

    @functools.cached_property
    def every(self) -> dg.PartitionMapping:
        """All partitions of the upstream."""
        return dg.AllPartitionMapping()

    @functools.cached_property
    def baseline_year(self) -> dg.PartitionMapping:
        """The baseline year of an upstream partitioned by year."""
        return dg.SpecificPartitionsPartitionMapping([self.baseline])

    @functools.cached_property
    def baseline_year_folds(self) -> dg.PartitionMapping:
        """The baseline year in all folds, of an upstream partitioned by year and fold."""
        keys = [dg.MultiPartitionKey({"year": self.baseline, "fold": fold}) for fold in self.folds.get_partition_keys()]
        return dg.SpecificPartitionsPartitionMapping([str(key) for key in keys])

    @functools.cached_property
    def of_fold(self) -> dg.PartitionMapping:
        """Between a fold and all products with that fold."""
        return dg.MultiToSingleDimensionPartitionMapping("fold")

    @functools.cached_property
    def of_year(self) -> dg.PartitionMapping:
        """Between a year and all products with that year."""
        return dg.MultiToSingleDimensionPartitionMapping("year")

    def year_keys(self, today: dt.date | None = None) -> list[str]:
        moment = None if today is None else dt.datetime.combine(today, dt.time(), tzinfo=dt.UTC)
        return list(self.years.get_partition_keys(current_time=moment))


def _part(key: str, dimension: str) -> str:
    if isinstance(key, dg.MultiPartitionKey):
        return key.keys_by_dimension[dimension]
    return key


def year_of(key: str) -> int:
    """Year of a key of ``years`` or ``year_fold``."""
    return int(_part(key, "year"))


def fold_of(key: str) -> int:
    """Fold number of a key of ``folds``, ``year_fold`` or ``fold_member``."""
    return int(_part(key, "fold").removeprefix("fold_"))


def member_of(key: str) -> int:
    """Member number of a key of ``fold_member``."""
    return int(_part(key, "member").removeprefix("member_"))
