"""Where a number comes from: typed records, the tree from a number to its pixels, and why two runs disagree.

Belongs here: the records that travel with estimates, reading them back, telling and comparing them.
Does not belong here: Dagster, gathering the records (``stages.provenance``), any computation of estimates.
"""

from __future__ import annotations

from dl4gam_assets.lineage.difference import Difference, compare, open_results
from dl4gam_assets.lineage.explanation import Explanation, explain
from dl4gam_assets.lineage.page import explanation_page
from dl4gam_assets.lineage.records import InputRecord, LineageError, PartitionRecord, Provenance
from dl4gam_assets.lineage.sources import inputs_of

__all__ = [
    "Difference", "Explanation", "InputRecord", "LineageError", "PartitionRecord", "Provenance", "compare", "explain",
    "explanation_page", "inputs_of", "open_results",
]  # fmt: skip
