"""Stage of simulated regions: make their inputs from the seed."""

from __future__ import annotations

from typing import Any

from dl4gam_assets.settings import fingerprint
from dl4gam_assets.stages.base import (
    StageResult,
    UpstreamError,
    Workspace,
    file_fingerprint,
    raw_data_root,
    run_stage,
)


def simulated_inputs(ws: Workspace, *, force: bool = False) -> StageResult:
    """Write the simulated inputs of a region below ``inputs/`` of its store, unless they are there."""
    settings = ws.region.simulation
    if settings is None:
        raise UpstreamError(f"region {ws.region.name!r} is not simulated")
    folder = ws.data_root
    sources: dict[str, Any] = {}
    if settings.kind == "drape":
        raw = raw_data_root(ws.region)
        if settings.dem is None or settings.outlines is None:
            raise UpstreamError("simulation.kind 'drape' needs simulation.dem and simulation.outlines")
        sources = {
            "dem": file_fingerprint(raw / settings.dem),
            "outlines": file_fingerprint(raw / settings.outlines),
        }
    last = ws.region.years.last or ws.region.years.baseline
    years = list(range(ws.region.years.first, last + 1))

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        import dl4gam_assets.synthetic as synthetic

        if settings.kind == "demo":
            size = {"size_px": settings.size_px} if settings.size_px else {}
            summary = synthetic.write_demo_region(
                folder,
                seed=settings.seed,
                years=years,
                baseline_year=ws.region.years.baseline,
                workers=ws.mapper.workers,
                progress=ws.logger.info,
                **size,
            )
        else:
            from dl4gam_assets.inventory.vector import read_vector

            raw = raw_data_root(ws.region)
            outlines = read_vector(raw / str(settings.outlines), layer=settings.outlines_layer)
            outlines = outlines.rename(columns={settings.id_column or "glacier_id": "glacier_id"})
            summary = synthetic.drape_region(
                folder,
                dem=raw / str(settings.dem),
                outlines=outlines,
                debris=None,
                seed=settings.seed,
                years=years,
                baseline_year=ws.region.years.baseline,
            )
        metadata = {k: v for k, v in vars(summary).items() if isinstance(v, int | float | str)}
        return wanted, metadata, {}

    inputs = {"settings": settings.model_dump(mode="json"), "years": years, "sources": sources}
    wanted = fingerprint(inputs)
    exists = (folder / "simulation.json").is_file()
    return run_stage(ws, "simulated_inputs", "all", inputs, work, force=force or not exists)
