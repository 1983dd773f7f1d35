"""What a failed blocking check holds back, whoever asks: command line, UI, backfill, schedule or sensor.

Belongs here: reading the state of blocking checks, and which partitions must not be made from what they failed.
Does not belong here: the checks themselves (``checks``), and runs.

Dagster's own blocking ends with a run: a later one goes on as if nothing had been found. And in a run over many
partitions a single failed one would hold back all of them. So each step asks here, partition by partition. Only what is
made directly from a failed partition is held back; what comes after it keeps what it was made from before.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

#: Metadata of an asset: the blocking checks of what it is made from, by the names of those assets.
WAITS_FOR = "waits_for_checks"

#: Tag of runs that somebody wants to go on despite failed checks.
DESPITE_TAG = "dl4gam/despite_checks"


def waits_for(asset: dg.AssetSpec, blocking: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Blocking checks (asset to names) of what an asset is made from, as its metadata have them."""
    names = {dep.asset_key.to_user_string() for dep in asset.deps}
    return {name: sorted(blocking[name]) for name in sorted(names) if blocking.get(name)}


def goes_on(tags: Mapping[str, str]) -> bool:
    """Whether somebody wants this run to go on despite failed checks."""
    return tags.get(DESPITE_TAG, "").lower() == "true"


class Gate:
    """The state of blocking checks at one moment; each is read once.

    Parameters
    ----------
    instance, graph
        the Dagster instance, and the asset graph with the metadata of ``WAITS_FOR``.
    within
        assets that a run makes together: what depends on one that is held back there is held back too.
    """

    def __init__(self, instance: dg.DagsterInstance, graph: Any, within: Collection[str] = ()):
        self._instance, self._graph, self._within = instance, graph, frozenset(within)
        self._known: dict[tuple[str, str], dict[str | None, list[str]]] = {}

    def reasons(self, asset: str, partition: str | None) -> list[str]:
        """Why a partition must not be made now, a text for each failed check; empty if it may be."""
        node, found = self._graph.get(dg.AssetKey(asset)), []
        for upstream, names in _plain(node.metadata.get(WAITS_FOR)).items():
            failed = self._failed(upstream, names)
            if not failed:
                continue
            for key in self._parents(asset, partition, upstream):
                place = upstream if key is None else f"{upstream} [{key}]"
                found += [f"check {name} of {place} failed" for name in failed.get(key, ())]
        for parent in sorted(key.to_user_string() for key in node.parent_keys):
            if parent in self._within:
                for key in self._parents(asset, partition, parent):
                    found += self.reasons(parent, key)
        return list(dict.fromkeys(found))

    def failed(self, asset: str) -> dict[str | None, list[str]]:
        """Partitions of an asset whose newest result failed a blocking check, with the names of those checks."""
        keys = self._graph.get(dg.AssetKey(asset)).check_keys
        return self._failed(asset, sorted(key.name for key in keys if self._graph.get(key).blocking))

    def _failed(self, asset: str, names: Sequence[str]) -> dict[str | None, list[str]]:
        """Partitions of an asset whose newest result a check failed, with the names of those checks."""
        found: dict[str | None, list[str]] = {}
        for name in names:
            if (asset, name) not in self._known:
                key = dg.AssetCheckKey(dg.AssetKey(asset), name)
                self._known[asset, name] = {
                    info.partition_key: [name]
                    for info in self._instance.event_log_storage.get_asset_check_partition_info([key])
                    if info.latest_execution_status == AssetCheckExecutionRecordStatus.FAILED and info.is_current
                }
            for partition, failed in self._known[asset, name].items():
                found.setdefault(partition, []).extend(failed)
        if self._graph.get(dg.AssetKey(asset)).is_partitioned:
            found.pop(None, None)  # the summary of a run over several partitions
        return found

    def _parents(self, asset: str, partition: str | None, upstream: str) -> list[str | None]:
        """The partitions of an upstream asset that a partition is made from; [None] if it has none."""
        parent = self._graph.get(dg.AssetKey(upstream))
        if not parent.is_partitioned:
            return [None]
        keys = self._graph.get_parent_partition_keys_for_child(
            partition, dg.AssetKey(upstream), dg.AssetKey(asset)
        ).partitions_subset.get_partition_keys()
        if isinstance(parent.partitions_def, dg.MultiPartitionsDefinition):
            return [parent.partitions_def.get_partition_key_from_str(str(key)) for key in sorted(keys)]
        return list(sorted(keys))


def _plain(metadata: Any) -> Mapping[str, Sequence[str]]:
    """The value of a metadata entry, wrapped by Dagster or not."""
    found: Mapping[str, Sequence[str]] = getattr(metadata, "value", metadata) or {}
    return found
