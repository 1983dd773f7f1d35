"""Stages of the group *inventory*: outlines, debris, zones, folds."""

from __future__ import annotations

from typing import Any

from dl4gam_assets.stages import previews, published
from dl4gam_assets.stages.base import (
    StageResult,
    UpstreamError,
    Workspace,
    file_fingerprint,
    fold_label,
    frame_fingerprint,
    run_stage,
)


def inventory_outlines(ws: Workspace, *, force: bool = False) -> StageResult:
    """Read, check and store the glacier outlines; rejected ones become failures."""
    from dl4gam_assets.inventory import prepare_inventory, read_inventory, restrict_modelled

    settings = ws.region.inventory
    source: str
    if ws.region.simulation is not None:
        source = ws.upstream("simulated_inputs")
        path = ws.data_root / settings.path
    else:
        path = prepare_inventory(settings, ws.data_root, ws.storage.inputs())
        source = file_fingerprint(path)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers, rejected = read_inventory(path, settings)
        rows = [(str(r.glacier_id), str(r.error), str(r.kind)) for r in rejected.itertuples()]
        ws.write_failures("inventory_outlines", "all", rows)
        glaciers = restrict_modelled(glaciers, settings, ws.data_root)
        if not len(glaciers):
            raise UpstreamError(f"inventory {path}: no usable outline; {len(rejected)} were rejected (see failures)")
        if not glaciers["modelled"].any():
            raise UpstreamError(
                f"inventory {path}: none of its {len(glaciers)} glaciers reaches min_area_km2 "
                f"({settings.min_area_km2}); lower inventory.min_area_km2"
            )
        ws.storage.write_table("glaciers", glaciers)
        modelled = glaciers[glaciers["modelled"].astype(bool)]
        metadata = {
            "glaciers": len(glaciers),
            "modelled_glaciers": len(modelled),
            "area_km2": float(glaciers["inventory_area_km2"].sum()),
            "modelled_area_km2": float(modelled["inventory_area_km2"].sum()),
            "rejected_outlines": len(rejected),
            "source": settings.source,
            "file": str(path),
        }
        picture = previews.outlines_map(glaciers, title=f"{len(glaciers)} glaciers")
        return frame_fingerprint(glaciers), metadata, {"outlines": picture}

    footprints = sorted({p for pattern in settings.model_within for p in ws.data_root.glob(pattern)})
    inputs = {
        "file": source,
        "footprints": [file_fingerprint(p) for p in footprints],
        "settings": ws.region.fingerprint("inventory"),
    }
    return run_stage(ws, "inventory_outlines", "all", inputs, work, force=force)


def debris_outlines(ws: Workspace, *, force: bool = False) -> StageResult:
    """Merge the debris sources and cut them at the outlines."""
    from dl4gam_assets.inventory import read_debris

    sources = ws.region.inventory.debris

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        debris = read_debris(sources, ws.data_root, glaciers)
        ws.storage.write_table("debris", debris)
        total = float(glaciers["inventory_area_km2"].sum())
        metadata = {
            "sources": len(sources),
            "debris_covered_glaciers": len(debris),
            "debris_km2": float(debris["debris_km2"].sum()),
            "debris_share": float(debris["debris_km2"].sum()) / total if total else 0.0,
        }
        return frame_fingerprint(debris), metadata, {}

    inputs = {
        "glaciers": ws.upstream("inventory_outlines"),
        "files": [file_fingerprint(ws.data_root / s.path) for s in sources],
        "settings": [s.model_dump(mode="json") for s in sources],
    }
    return run_stage(ws, "debris_outlines", "all", inputs, work, force=force)


def glacier_zones(ws: Workspace, *, force: bool = False) -> StageResult:
    """Buffers around the outlines that do not overlap."""
    from dl4gam_assets.inventory import glacier_zones as zones_of

    buffers = ws.region.inventory.buffers_m

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        zones = zones_of(glaciers, buffers)
        ws.storage.write_table("zones", zones)
        metadata = {"zones": len(zones), "buffers_m": ", ".join(map(str, buffers))}
        return frame_fingerprint(zones), metadata, {}

    inputs = {"glaciers": ws.upstream("inventory_outlines"), "buffers": buffers}
    return run_stage(ws, "glacier_zones", "all", inputs, work, force=force)


def cross_validation_folds(ws: Workspace, *, force: bool = False) -> StageResult:
    """Assign each modelled glacier its role in every iteration."""
    from dl4gam_assets.inventory import geographic_folds

    settings, imported = ws.region.folds, published.folds_import(ws.storage)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        modelled = glaciers[glaciers["modelled"].astype(bool)]
        if imported is None:
            folds = geographic_folds(modelled, settings.n, settings.validation_share)
        else:
            folds = published.imported_folds(imported)
        ws.storage.write_table("folds", folds)
        sizes = folds.merge(modelled[["glacier_id", "inventory_area_km2"]], on="glacier_id")
        table = sizes.groupby(["fold", "role"])["inventory_area_km2"].agg(["size", "sum"]).unstack("role").fillna(0)
        rows = [
            {"fold": fold_label(int(fold))}
            | {f"{role} glaciers": int(table.loc[fold, ("size", role)]) for role in ("train", "valid", "test")}
            | {f"{role} km2": round(float(table.loc[fold, ("sum", role)]), 2) for role in ("train", "valid", "test")}
            for fold in table.index
        ]
        tested = folds[folds["role"] == "test"][["glacier_id", "fold"]]
        shown = modelled.merge(tested, on="glacier_id")
        shown["fold"] = [fold_label(int(f)) for f in shown["fold"]]
        picture = previews.outlines_map(shown, "fold", "iteration that tests each glacier")
        metadata = {"folds": rows, "glaciers": folds["glacier_id"].nunique()}
        if imported is not None:
            metadata["imported_from"] = imported["file"]
        return frame_fingerprint(folds), metadata, {"test blocks": picture}

    inputs = {"glaciers": ws.upstream("inventory_outlines"), "settings": ws.region.fingerprint("folds")}
    if imported is not None:
        inputs["imported"] = imported["sha256"]
    return run_stage(ws, "cross_validation_folds", "all", inputs, work, force=force)
