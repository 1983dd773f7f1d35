"""The asset graph: thin Dagster wrappers, one module a group, in the order of the science.

Belongs here: what each asset is called, what it depends on through which partition mapping, and the words that the UI
shows. Each wrapper calls one stage (``dl4gam_assets.stages``) for each of its partitions.
Does not belong here: work of any kind. No module here may use ``from __future__ import annotations``: Dagster reads
the annotations of an asset's arguments at run time.

Order of the groups: simulation (only for simulated regions), inventory, imagery, terrain, cubes, training, predictions,
areas, change, publication.
"""
