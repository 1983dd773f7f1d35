"""The work of one partition of each asset: from files to files, one module a group of the graph.

Belongs here: reading upstream results from the store, mapping the science over glaciers, writing results, failures and
fingerprints. Every function takes a :class:`~dl4gam_assets.stages.base.Workspace` and partition keys as plain numbers,
and returns a :class:`~dl4gam_assets.stages.base.StageResult`; so a notebook can run the chain without Dagster.
Does not belong here: Dagster (the wrappers are in ``assets``), formulas (they are in the science rooms).
"""
