"""What people put into a region from outside: the inventory's files, override lines, trained members. Has it changed?

Belongs here: one short signature for each of these inputs, cheap enough to be asked every few minutes.
Does not belong here: what follows from a change (``automation``), and Dagster.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field

from dl4gam_assets.settings import fingerprint
from dl4gam_assets.stages.base import (
    UpstreamError,
    Workspace,
    file_fingerprint,
    fold_label,
    fold_member_label,
    folder_fingerprint,
)
from dl4gam_assets.stages.imagery import override_file_of
from dl4gam_assets.stages.registry import is_current

#: The kinds of inputs, in the order in which their changes are looked at.
KINDS = ("inventory", "debris", "overrides", "members")


@dataclass(frozen=True)
class Outside:
    """Signatures by kind and key: ``inventory``/``debris``: ``all``; ``overrides``: year; ``members``: fold."""

    signatures: Mapping[str, Mapping[str, str]]
    problems: list[str] = field(default_factory=list)


def look_outside(ws: Workspace) -> Outside:
    """Signatures of everything that comes from outside. What can not be read is named in ``problems`` and left out."""
    signatures: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    problems: list[str] = []
    readers = {"inventory": _inventory, "debris": _debris, "overrides": _overrides, "members": _members}
    for kind, reader in readers.items():
        try:
            signatures[kind] = reader(ws)
        except (UpstreamError, OSError, ValueError) as error:
            problems.append(f"{kind}: {error}")
    return Outside(signatures, problems)


def _inventory(ws: Workspace) -> dict[str, str]:
    settings = ws.region.inventory
    path = ws.data_root / settings.path
    files = [p for pattern in settings.model_within for p in sorted(ws.data_root.glob(pattern))]
    own = folder_fingerprint(path) if path.is_dir() else file_fingerprint(path)
    return {"all": fingerprint([own, *(file_fingerprint(p) for p in files)])}


def _debris(ws: Workspace) -> dict[str, str]:
    sources = ws.region.inventory.debris
    return {"all": fingerprint([file_fingerprint(ws.data_root / s.path) for s in sources])} if sources else {}


def _overrides(ws: Workspace) -> dict[str, str]:
    """Signature of each year's lines, so that a new line asks for its own year only."""
    path = override_file_of(ws)
    if path is None:
        return {}
    lines: dict[str, list[list[str]]] = {}
    with open(path, encoding="utf-8-sig", newline="") as handle:
        for row in csv.DictReader(handle):
            words = [str(value).strip() for value in row.values()]
            lines.setdefault(str(row.get("year") or "").strip(), []).append(words)
    return {year: fingerprint(sorted(words)) for year, words in lines.items() if year.isdigit()}


def _members(ws: Workspace) -> dict[str, str]:
    """Signature of each fold whose members are all trained (by this or another Dagster, or by the command line)."""
    found = {}
    for fold in range(1, ws.region.folds.n + 1):
        labels = [fold_member_label(fold, m) for m in range(1, ws.region.training.members + 1)]
        weights = [ws.upstream_or_none("ensemble_member", label) for label in labels]
        if all(weights):
            found[fold_label(fold)] = fingerprint(weights)
    return found


def out_of_date(ws: Workspace, kind: str, key: str) -> bool:
    """Whether what is made from an input directly was made from something else, or never. For a first look only."""
    match kind:
        case "inventory":
            return not is_current(ws, "inventory_outlines")
        case "debris":
            return not is_current(ws, "debris_outlines")
        case "overrides":
            return not is_current(ws, "selected_scenes", (int(key),))
        case "members":
            return not is_current(ws, "ensemble", (int(key.removeprefix("fold_")),))
    raise ValueError(f"unknown kind of input {kind!r}; known are {', '.join(KINDS)}")


def has_candidates(ws: Workspace, year: str) -> bool:
    """Whether a year was searched, so that its choice of images can be made again."""
    return ws.storage.read_state("scene_candidates", year) is not None
