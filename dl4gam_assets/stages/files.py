"""Files behind a partition that no fingerprint of its inputs covers: scenes of a catalog on disk, weights of a member.

Belongs here: keeping their size, time and hash when a partition is made, and finding those that are not the same now.
Does not belong here: deciding what follows (each stage, ``staleness``).

A file is looked into only when its size or time changed. One that is gone is told apart: downloads are often deleted to
save space, which makes no result wrong, and must not start work that would fail.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dl4gam_assets.stages.base import Workspace


@dataclass(frozen=True)
class ChangedFile:
    """A file that is not what it was when the partition was made."""

    path: str  # below the data or the store, or absolute
    labels: tuple[str, ...]  # what it belongs to: item ids
    since: dt.datetime | None
    gone: bool = False

    def __str__(self) -> str:
        return f"{self.path} {'is gone' if self.gone else 'is another file than it was'}"


def sampled_hash(path: Path) -> str:
    """Size and hash of samples: quick for files of hundreds of megabytes."""
    from dl4gam_assets.imagery.catalogs import file_identity

    return file_identity(path)


def full_hash(path: Path) -> str:
    """SHA-256 of the whole file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def record_files(
    ws: Workspace, asset: str, partition: str, files: Mapping[Path, Sequence[str]], identity: Callable[[Path], str]
) -> None:
    """Keep what the files behind a partition are now; ``files``: path to what it belongs to."""
    entries = {}
    for path, labels in files.items():
        with contextlib.suppress(OSError):
            stat = path.stat()
            entries[_name(ws, path)] = [stat.st_size, stat.st_mtime_ns, identity(path), sorted(labels)]
    ws.storage.write_json(_record_path(ws, asset, partition), entries)


def changed_files(
    ws: Workspace, asset: str, partition: str, identity: Callable[[Path], str], *, gone: bool = False
) -> list[ChangedFile]:
    """Files behind a partition that are not the same now; with ``gone`` also those that are not there any more."""
    path = _record_path(ws, asset, partition)
    entries: dict[str, list[Any]] = ws.storage.read_json(path) or {}
    out, touched = [], False
    for name, (size, mtime_ns, known, labels) in entries.items():
        file = _path(ws, name)
        try:
            stat = file.stat()
        except OSError:
            if gone:
                out.append(ChangedFile(name, tuple(labels), None, gone=True))
            continue
        if (stat.st_size, stat.st_mtime_ns) == (size, mtime_ns):
            continue
        if stat.st_size == size and identity(file) == known:
            entries[name] = [stat.st_size, stat.st_mtime_ns, known, labels]  # touched or copied, and the same
            touched = True
            continue
        out.append(
            ChangedFile(name, tuple(labels), dt.datetime.fromtimestamp(stat.st_mtime, dt.UTC).replace(tzinfo=None))
        )
    if touched:
        with contextlib.suppress(OSError):  # somebody else's store: it is looked at again next time
            ws.storage.write_json(path, entries)
    return out


def scene_files(candidates: pd.DataFrame) -> dict[Path, list[str]]:
    """Local files behind candidate rows, with the ids of their items."""
    from dl4gam_assets.imagery.catalogs import local_path

    out: dict[Path, set[str]] = {}
    for text in candidates["hrefs"].dropna().unique():
        for item, assets in json.loads(text).items():
            for href in assets.values():
                local = local_path(href)
                if local is not None and not href.startswith("/vsi"):
                    out.setdefault(local, set()).add(item)
    return {path: sorted(items) for path, items in out.items()}


def _record_path(ws: Workspace, asset: str, partition: str) -> Any:
    return ws.storage.path("state", asset, "files", ws.storage.state_path(asset, partition).name)


def _name(ws: Workspace, path: Path) -> str:
    """A file's name that stays right when the data or the store move."""
    for mark, root in (("data:", ws.data_root), ("store:", Path(str(ws.storage.root)))):
        with contextlib.suppress(ValueError):
            return mark + str(path.relative_to(root))
    return str(path)


def _path(ws: Workspace, name: str) -> Path:
    if name.startswith("data:"):
        return ws.data_root / name.removeprefix("data:")
    if name.startswith("store:"):
        return Path(str(ws.storage.root)) / name.removeprefix("store:")
    return Path(name)
