"""Make the pages of the reference that follow from the code: settings, command line, science rooms, picture of the house.

    python docs/tools/reference.py docs

The test says which page is out of date.
"""

from __future__ import annotations

import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dl4gam_assets"
ROOMS = (
    "inventory", "imagery", "terrain", "cubes", "segmentation", "ensemble", "change", "lineage", "publication",
    "published", "synthetic", "stages",
)  # fmt: skip
#: What the picture says of a layer.
WORDS = {
    "cli": "the command dl4gam", "definitions": "where everything meets", "orchestrate": "ranges of partitions",
    "automation": "jobs, schedule, sensors", "checks": "what would be wrong", "assets": "thin Dagster wrappers",
    "gate": "what failed checks hold back", "partitions": "years, folds, members", "resources": "store, processes, device",
    "stages": "the work of a partition: files to files", "synthetic": "the demo with a known truth",
    "publication": "database, report, STAC, export", "lineage": "where a number comes from",
    "published": "the authors' files, in and out",
    "change": "areas, rates, totals, validation", "ensemble": "aggregation, calibration, intervals",
    "segmentation": "networks, sampling, inference", "cubes": "all that a model sees of a glacier",
    "terrain": "DEM, dh/dt, velocity", "imagery": "catalogs, scores, the best image",
    "inventory": "outlines, zones, folds",
    "compute": "maps over glaciers", "storage": "atomic files, tables", "tables": "schema of every table",
    "settings": "one YAML file a region",
}  # fmt: skip


def settings_page() -> str:
    from dl4gam_assets.settings import Region

    out = [
        "# Settings", "",
        "A region is one YAML file; a key that is not here is refused with the nearest valid one. `dl4gam new` writes a",
        "first file from your outlines. Sections whose settings change no result say so.", "",
    ]  # fmt: skip
    seen: set[type[BaseModel]] = set()

    def section(model: type[BaseModel], path: str) -> None:
        if model in seen:
            return
        seen.add(model)
        out.extend([f"## {path}" if path else "## Region", ""])
        doc = " ".join((model.__doc__ or "").split())
        if doc and not doc.startswith("!!!"):
            out.extend([doc, ""])
        out.extend(["| key | type | default | meaning |", "|---|---|---|---|"])
        inner: list[tuple[type[BaseModel], str]] = []
        for name, info in model.model_fields.items():
            models = list(_models(info.annotation))
            inner += [(m, f"{path}.{name}" if path else name) for m in models]
            meaning = (info.description or ("see below" if models else "")).replace("|", "\\|").replace("\n", " ")
            out.append(f"| `{name}` | {_type(info.annotation)} | {_default(info)} | {meaning} |")
        out.append("")
        for m, p in inner:
            section(m, p)

    section(Region, "")
    return "\n".join(out).rstrip() + "\n"


def _models(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        if not isinstance(part, str | int | float):
            yield from _models(part)


def _type(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{p}`" for p in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(p) for p in parts if p is not type(None)) + (" or null" if type(None) in parts else "")
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin in (list, tuple, set, frozenset):
        return "list of " + _type(parts[0])
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), "section" if isinstance(annotation, type) else str(annotation)
    )


def _default(info: Any) -> str:
    if info.is_required():
        return "**needed**"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel) or value is PydanticUndefined:
        return ""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text[:60]}`" if text else "(empty)"


def cli_page() -> str:
    import typer.main

    from dl4gam_assets.cli import app

    group = typer.main.get_command(app)
    out = ["# Command line", "", "`dl4gam COMMAND --help` says the same.", ""]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        out += [f"## dl4gam {name}", "", (command.help or "").strip(), "", "| | | |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            names = ", ".join(f"`{o}`" for o in parameter.opts) if parameter.param_type_name == "option" else (
                f"`{(parameter.name or '').upper()}`"
            )  # fmt: skip
            needed = "needed" if parameter.required else ""
            text = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
            out.append(f"| {names} | {needed} | {text} |")
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def room_page(room: str) -> str:
    folder = PACKAGE / room
    modules = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    heads = ["dl4gam_assets.storage", "dl4gam_assets.compute", "dl4gam_assets.tables"] if room == "stages" else []
    out = [f"# {room}", ""]
    for name in [*heads, *(f"dl4gam_assets.{room}.{m}" for m in modules)]:
        out += [f"::: {name}", ""]
    return "\n".join(out).rstrip() + "\n"


def house() -> str:
    """The rooms as layers, the ones that others stand on below: from the contract that `make lint` checks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c for c in contracts if c["type"] == "layers")["layers"]
    dagster_free = set(next(c for c in contracts if c["type"] == "forbidden")["source_modules"]) | {"dl4gam_assets.cli"}
    width, step, top = 760, 38, 46
    height = top + step * len(layers) + 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Layers of dl4gam_assets: each imports only those below it" font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<path d="M20 {top - 6} L{width / 2} 8 L{width - 20} {top - 6} Z" fill="#dfe8ef"/>',
    ]
    for number, layer in enumerate(layers):
        names = [n.strip() for n in layer.split("|")]
        each = (width - 40) / len(names)
        for k, full in enumerate(names):
            name = full.split(".")[-1]
            x, y = 20 + k * each, top + number * step
            colour = "#e4f1e6" if full in dagster_free else "#e6e9fb"
            out += [
                _box(x + 1, y, each - 2, step - 3, colour),
                _text(x + 12, y + 22, name, 14, weight=600, fill="#1d2730"),
                _text(x + each - 12, y + 22, WORDS[name], 12, anchor="end"),
            ]
    y = top + step * len(layers) + 24
    out += [
        _box(20, y - 12, 16, 14, "#e6e9fb"), _text(42, y, "knows Dagster", 12), _box(150, y - 12, 16, 14, "#e4f1e6"),
        _text(172, y, "does not: usable from a notebook", 12),
        _text(width - 20, y, "each imports only what is below it", 12, anchor="end"), "</svg>",
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}"'
    return f'<rect x="{x:.0f}" y="{y:.0f}" {size} fill="{fill}" stroke="#9fb0bf"/>'


def _text(
    x: float, y: float, text: str, size: int, *, weight: int = 400, fill: str = "#51606d", anchor: str = "start"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{text}</text>'


def pages() -> dict[str, str]:
    """Path below docs/ and content of every page that is made from the code."""
    return {
        "settings.md": settings_page(), "cli.md": cli_page(), "images/house.svg": house(),
        **{f"reference/{room}.md": room_page(room) for room in ROOMS},
    }  # fmt: skip


if __name__ == "__main__":
    for name, text in pages().items():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
