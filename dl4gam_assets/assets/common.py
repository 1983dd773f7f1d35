"""What all wrappers share: running a stage over a run's partitions and showing its metadata.

Belongs here: turning a StageResult into Dagster metadata; one failed partition does not stop the others of a run.
Does not belong here: assets.
"""

import base64
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_IS_USER_PROVIDED_TAG, DATA_VERSION_TAG
from dagster._core.definitions.partitions.utils import get_tags_from_multi_partition_key
from dagster._core.storage.tags import EXTERNALLY_MANAGED_ASSETS_TAG

from dl4gam_assets.compute import TransientError
from dl4gam_assets.gate import Gate, goes_on
from dl4gam_assets.settings import Region
from dl4gam_assets.stages.base import StageResult, Workspace
from dl4gam_assets.upkeep import tell_host

#: Each asset's people.
OWNERS = ["team:glacier-mapping"]


def backfill_policy(region: Region) -> dg.BackfillPolicy:
    """How many partitions one run of a backfill takes (compute.partitions_per_run)."""
    return dg.BackfillPolicy.multi_run(max_partitions_per_run=region.compute.partitions_per_run)


def gpu_tags() -> dict[str, Any]:
    """Tags of the steps of the pool ``gpu`` for Kubernetes: as many GPUs as DL4GAM_K8S_GPUS says (none by default), on
    nodes with the labels in DL4GAM_K8S_GPU_NODES (``name=value``, separated by commas).

    Clouds keep other pods off their GPU nodes by a taint; these tolerate it. The tags matter only where each step runs
    in a pod of its own (DL4GAM_EXECUTOR=k8s).

    Raises
    ------
    ValueError
        if one of the two variables can not be read.
    """
    gpus = os.environ.get("DL4GAM_K8S_GPUS", "0")
    if not gpus.isdigit():
        raise ValueError(f"DL4GAM_K8S_GPUS is {gpus!r}: it has to be the number of GPUs of a training step, or unset")
    if gpus == "0":
        return {}
    pod: dict[str, Any] = {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}
    if nodes := os.environ.get("DL4GAM_K8S_GPU_NODES", "").strip():
        words = [part.partition("=") for part in nodes.split(",")]
        labels = {name.strip(): value.strip() for name, _, value in words}
        if not all(name and value for name, value in labels.items()):
            raise ValueError(f"DL4GAM_K8S_GPU_NODES is {nodes!r}: it has to be like 'gpu=h100,zone=a', or unset")
        pod["node_selector"] = labels
    return {
        "dagster-k8s/config": {
            "container_config": {"resources": {"limits": {"nvidia.com/gpu": gpus}}}, "pod_spec_config": pod,
        }
    }  # fmt: skip


def each_partition(
    context: dg.AssetExecutionContext, ws: Workspace, stage: Callable[[Workspace, str], StageResult]
) -> None:
    """Run ``stage(workspace, key)`` for each partition of this run and attach the metadata to that partition.

    A partition that fails is logged and the next one is done; the run then fails with all their names. Where a server
    did not answer, the step is tried again after a while (``compute.retries``); what was made is found to be current.
    A partition that a failed check holds back is left out (:func:`held_back`).
    """
    tell_host(context.instance, context.run)
    if not _is_partitioned(context):
        _log_ourselves(context, False)
        if reasons := held_back(context).get(None):
            raise dg.Failure(description=f"held back: {'; '.join(reasons)}")
        try:
            result = stage(ws, "")
        except TransientError as error:
            _try_again(context, ws, str(error))
            raise
        if ws.unreachable:
            _try_again(context, ws, f"{ws.unreachable} glaciers could not be reached")
        context.add_asset_metadata(metadata_of(result))
        _set_version(context, ws, result)
        _say(context, result)
        return
    held = held_back(context)
    results: dict[str, StageResult | Exception] = {}
    for key in context.partition_keys:
        if key in held:
            continue
        try:
            results[key] = stage(ws, key)
        except Exception as error:
            context.log.error(f"{context.asset_key.to_user_string()} [{key}]: {error}")
            results[key] = error
    late = [f"[{key}] {error}" for key, error in results.items() if isinstance(error, TransientError)]
    if ws.unreachable:
        late.append(f"{ws.unreachable} glaciers could not be reached")
    if late:
        _try_again(context, ws, "; ".join(late))
    attach(context, ws, results, held)


def _is_partitioned(context: dg.AssetExecutionContext) -> bool:
    return context.has_partition_key or context.has_partition_key_range


def _made_here(context: dg.AssetExecutionContext) -> tuple[Any, set[str]]:
    """The asset graph, and the names of the assets that this run makes."""
    graph = context.job_def.asset_layer.asset_graph
    return graph, {key.to_user_string() for key in graph.executable_asset_keys}


def held_back(context: dg.AssetExecutionContext) -> dict[str | None, list[str]]:
    """The partitions of this run that failed blocking checks hold back, with the reasons. Those of one partition hold
    back nothing of another; the tag ``dl4gam/despite_checks`` of a run lets it go on all the same."""
    if goes_on(context.run.tags):
        return {}
    graph, within = _made_here(context)
    gate, asset = Gate(context.instance, graph, within), context.asset_key.to_user_string()
    keys: Sequence[str | None] = context.partition_keys if _is_partitioned(context) else [None]
    found = {key: reasons for key in keys if (reasons := gate.reasons(asset, key))}
    for key, reasons in found.items():
        context.log.warning(f"{asset}{'' if key is None else f' [{key}]'} is held back: {'; '.join(reasons)}")
    return found


def _try_again(context: dg.AssetExecutionContext, ws: Workspace, why: str) -> None:
    """Ask Dagster for another attempt of this step, unless there were enough of them."""
    compute, made = ws.region.compute, context.op_execution_context.retry_number
    if made < compute.retries:
        wait = compute.retry_delay_s * 2**made
        context.log.warning(f"{why}: attempt {made + 2} of {compute.retries + 1} in {wait:.0f} s")
        raise dg.RetryRequested(max_retries=compute.retries, seconds_to_wait=wait)


def all_partitions(
    context: dg.AssetExecutionContext,
    ws: Workspace,
    stage: Callable[[Workspace, Sequence[str]], Mapping[str, StageResult | Exception]],
) -> None:
    """Like :func:`each_partition` for a stage that works on several partitions at once."""
    tell_host(context.instance, context.run)
    held = held_back(context)
    attach(context, ws, stage(ws, [key for key in context.partition_keys if key not in held]), held)


def attach(
    context: dg.AssetExecutionContext,
    ws: Workspace,
    results: Mapping[str, StageResult | Exception],
    held: Mapping[str | None, Sequence[str]],
) -> None:
    """Show each partition's metadata and pictures on its materialization; raise if any partition failed.

    Each materialization carries the fingerprint of its result as data version, so that what is made again without a
    change starts nothing. A run over several partitions would give all of them one version and record those too that
    were left out: there each one's materialization is logged here.

    Raises
    ------
    dagster.Failure
        with the name and error of each failed partition; and with the reasons of those that were held back, if nothing
        of this run comes after them: until then the others go on.
    """
    errors = {key: result for key, result in results.items() if isinstance(result, Exception)}
    one_by_one = bool(errors or held or len(context.partition_keys) > 1)
    _log_ourselves(context, one_by_one)
    for key in context.partition_keys:
        result = results.get(key)
        if result is None or isinstance(result, Exception):
            continue
        _say(context, result)
        if one_by_one:
            event = dg.AssetMaterialization(
                context.asset_key, partition=key, metadata=metadata_of(result),
                tags=_version_tags(ws, context, result) | _dimension_tags(key),
            )  # fmt: skip
            context.log_event(event)
        else:
            context.add_asset_metadata(metadata_of(result), partition_key=key)
            _set_version(context, ws, result)
    if errors:
        lines = "\n".join(f"  {key}: {error}" for key, error in errors.items())
        message = f"{len(errors)} of {len(results)} partitions failed:\n{lines}"
        raise dg.Failure(description=message) from next(iter(errors.values()))
    if held and (not results or not _goes_further(context)):
        lines = "\n".join(f"  {key}: {'; '.join(reasons)}" for key, reasons in held.items())
        raise dg.Failure(description=f"{len(held)} of {len(context.partition_keys)} partitions are held back:\n{lines}")


def _log_ourselves(context: dg.AssetExecutionContext, ourselves: bool) -> None:
    """Whether this step logs its materializations itself, so that Dagster does not: in memory, and of this step, which
    may be one of several in a process that have the run's tags in common."""
    tags = cast(dict[str, str], context.run.tags)
    if ourselves:
        tags[EXTERNALLY_MANAGED_ASSETS_TAG] = "true"
    else:
        tags.pop(EXTERNALLY_MANAGED_ASSETS_TAG, None)


def _goes_further(context: dg.AssetExecutionContext) -> bool:
    """Whether this run makes something from this asset."""
    graph, within = _made_here(context)
    return any(child.to_user_string() in within for child in graph.get(context.asset_key).child_keys)


def _version(ws: Workspace, context: dg.AssetExecutionContext, result: StageResult) -> str | None:
    state = ws.storage.read_state(context.asset_key.to_user_string(), result.partition)
    return None if state is None else str(state["output"])


def _set_version(context: dg.AssetExecutionContext, ws: Workspace, result: StageResult) -> None:
    if version := _version(ws, context, result):
        context.op_execution_context.set_data_version(context.asset_key, dg.DataVersion(version))


def _version_tags(ws: Workspace, context: dg.AssetExecutionContext, result: StageResult) -> dict[str, str]:
    """The data version as Dagster records it."""
    version = _version(ws, context, result)
    return {DATA_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"} if version else {}


def _dimension_tags(key: str) -> dict[str, str]:
    """The keys of a partition of two dimensions as Dagster records them."""
    return dict(get_tags_from_multi_partition_key(key)) if isinstance(key, dg.MultiPartitionKey) else {}


def metadata_of(result: StageResult) -> dict[str, Any]:
    """A stage's metadata and pictures as Dagster shows them."""
    metadata = {name: _value(value) for name, value in result.metadata.items() if value is not None}
    upstream = list(result.inputs.upstream.values()) if result.inputs is not None else []
    # An estimate's partition leads to the whole chain behind it: scenes, cubes, members.
    upstream += [[m["asset"], m["partition"]] for m in result.metadata.get("lineage", {}).get("made_from", [])]
    if upstream:
        metadata["made_from"] = dg.MetadataValue.md(_links(upstream))
    return metadata | {title: picture(content, title) for title, content in result.previews.items()}


#: More links than these help nobody.
_LINKS = 40


def _links(upstream: Iterable[Sequence[str]]) -> str:
    """Markdown links to the pages of the partitions that a partition was made from."""
    known = sorted({(asset, label) for asset, label, *_ in upstream})
    lines = []
    for asset, label in known[:_LINKS]:
        parts = label.split(".")
        # Dagster names a partition of two dimensions by both keys in the order of the dimensions' names: fold before
        # member and before year.
        key = "|".join(reversed(parts)) if parts[0].isdigit() else "|".join(parts)
        place = f"/assets/{asset}" + ("" if label == "all" else f"?view=partitions&partition={quote(key)}")
        lines.append(f"- [{asset}{'' if label == 'all' else f' [{label}]'}]({place})")
    if len(known) > _LINKS:
        lines.append(f"- and {len(known) - _LINKS} more")
    return "\n".join(lines)


def _say(context: dg.AssetExecutionContext, result: StageResult) -> None:
    done = "unchanged" if result.unchanged else "made"
    context.log.info(f"{context.asset_key.to_user_string()} [{result.partition}] {done}: {_short(result.metadata)}")


def picture(content: bytes, title: str) -> dg.MarkdownMetadataValue:
    """A small PNG or JPEG as metadata. It is kept in the event database: stay below a few tens of kilobytes."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return dg.MetadataValue.md(f"![{title}](data:image/{kind};base64,{base64.b64encode(content).decode()})")


def _value(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return dg.MetadataValue.table([dg.TableRecord({k: _cell(v) for k, v in row.items()}) for row in value])
    if isinstance(value, dict | list):
        return dg.MetadataValue.json(value)
    return float(f"{value:.5g}") if isinstance(value, float) else value  # for people; tables keep every digit


def _cell(value: Any) -> str | int | float | bool | None:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def _short(metadata: dict[str, Any]) -> str:
    plain = {k: v for k, v in metadata.items() if isinstance(v, int | float | str) and k != "unchanged"}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(plain.items())[:8])
