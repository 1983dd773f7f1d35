"""The documented schema of results.duckdb: units, constraints, foreign keys, and the page docs/results.md.

Belongs here: what a column's unit is, which rules a row must obey to be published, and the words of the page.
Does not belong here: the columns themselves (``tables``), building the file (``database``).

    python -m dl4gam_assets.publication.schema docs/results.md      # writes the generated part of the page again
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dl4gam_assets.tables import TABLES, Column, Table

#: Types of DuckDB for the types of ``tables``.
TYPES = {
    "string": "VARCHAR",
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "bool": "BOOLEAN",
    "timestamp": "TIMESTAMP",
    "geometry": "GEOMETRY('OGC:CRS84')",
}

#: Endings of column names and the unit they stand for; the longest ending wins.
_ENDINGS = {
    "_km2_per_year": "km² per year",
    "_pct_per_year": "% per year",
    "_m_per_year": "m per year",
    "_km2": "km²",
    "_km": "km",
    "_m": "m",
    "_deg": "degrees",
    "_px": "pixels",
    "_pixels": "pixels",
    "_bytes": "bytes",
    "_share": "share, 0 to 1",
    "_mb": "MB",
    "_pct": "%",
    "_s": "s",
}
_SHARES = "share, 0 to 1"
_NAMES = {
    "lon": "degrees east",
    "lat": "degrees north",
    "seconds": "s",
    "years": "years",
    "n_pixels": "pixels",
    "true_positive": "pixels",
    "false_positive": "pixels",
    "false_negative": "pixels",
    "coverage": _SHARES,
    "recall": _SHARES,
    "debris_recall": _SHARES,
    "precision": _SHARES,
    "iou": _SHARES,
    "f1": _SHARES,
    "fit_iou": _SHARES,
    "validation_iou": _SHARES,
    "validation_coverage": _SHARES,
    "left_out_coverage": _SHARES,
    "false_positive_rate": _SHARES,
    "mean_probability": "probability, 0 to 1",
    "epistemic_std": "probability, 0 to 1",
    "aleatoric_std": "probability, 0 to 1",
    "tau": "probability, 0 to 0.5",
    "tau_left_out": "probability, 0 to 0.5",
    "ece_before": "probability, 0 to 1",
    "ece_after": "probability, 0 to 1",
    "correlation": "0 to 1",
    "ndsi": "index, -1 to 1",
    "albedo": "reflectance",
    "odd_residual": "standard deviations",
    "blue_threshold": "reflectance x 10000",
    "mean": "that of the channel",
    "std": "that of the channel",
}

#: Tables whose glacier_id need not be in ``glaciers``: an outline that could not be read is a failure too.
_FREE_IDS = frozenset({"glaciers", "failures"})
_TOLERANCE = 1e-9


def unit_of(column: Column) -> str:
    """The unit of a column as text; empty for text, keys, flags, counts and bare numbers."""
    if column.dtype == "timestamp":
        return "UTC"
    if column.dtype == "geometry":
        return "degrees (longitude, latitude; OGC:CRS84)"
    if column.dtype in ("string", "bool"):
        return ""
    if column.name in _NAMES:
        return _NAMES[column.name]
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        if column.name.endswith(ending):
            return _ENDINGS[ending]
    return "1" if column.dtype == "float64" else ""


def comment_of(column: Column) -> str:
    """Meaning and unit, as the comment of the column."""
    unit = unit_of(column)
    told = unit in ("", "1") or unit in column.meaning
    return column.meaning if told else f"{column.meaning} [{unit}]"


# --------------------------------------------------------------------------------------------- constraints
@dataclass(frozen=True)
class Rule:
    """A condition on the rows of a table: ``condition`` is SQL that is true or null for every allowed row."""

    name: str
    meaning: str
    condition: str


def row_rules(table: Table) -> list[Rule]:
    """What each row of a table must obey on its own: ranges, and bounds on the two sides of an estimate."""
    rules = []
    for c in table.columns:
        if c.choices:
            allowed = ", ".join(f"'{choice}'" for choice in c.choices)
            rules.append(Rule(f"{c.name}_choices", f"{c.name} is one of {', '.join(c.choices)}",
                              f"{quoted(c.name)} IN ({allowed})"))  # fmt: skip
        if c.dtype == "float64":  # to DuckDB nan is larger than any number, so that no upper limit but this one tells
            rules.append(Rule(f"{c.name}_finite", f"{c.name} is a finite number", f"isfinite({quoted(c.name)})"))
        if c.minimum is not None or c.maximum is not None:
            parts = []
            if c.minimum is not None:
                parts.append(
                    f"{quoted(c.name)} >= {c.minimum!r}" + (f" - {_TOLERANCE}" if c.dtype == "float64" else "")
                )
            if c.maximum is not None:
                parts.append(
                    f"{quoted(c.name)} <= {c.maximum!r}" + (f" + {_TOLERANCE}" if c.dtype == "float64" else "")
                )
            rules.append(Rule(f"{c.name}_range", _range_text(c), " AND ".join(parts)))
    names = {c.name for c in table.columns}
    if {"lower_km2", "area_km2", "upper_km2"} <= names:
        rules.append(
            Rule(
                "interval_holds_estimate",
                "lower_km2 <= area_km2 <= upper_km2",
                f"lower_km2 <= area_km2 + {_TOLERANCE} AND area_km2 <= upper_km2 + {_TOLERANCE}",
            )
        )
    if {"theil_sen_lower_km2_per_year", "theil_sen_upper_km2_per_year"} <= names:
        rules.append(
            Rule(
                "trend_interval_ordered",
                "theil_sen_lower_km2_per_year <= theil_sen_upper_km2_per_year",
                f"theil_sen_lower_km2_per_year <= theil_sen_upper_km2_per_year + {_TOLERANCE}",
            )
        )
    return rules


def _range_text(c: Column) -> str:
    low = "" if c.minimum is None else f"{c.minimum:g} <= "
    high = "" if c.maximum is None else f" <= {c.maximum:g}"
    return f"{low}{c.name}{high}"


def has_foreign_key(table: Table) -> bool:
    """Whether the table's glacier_id must be one of ``glaciers``."""
    return table.name not in _FREE_IDS and any(c.name == "glacier_id" for c in table.columns)


def quoted(name: str) -> str:
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


# --------------------------------------------------------------------------------------------- the page
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def schema_page(tables: Iterable[Table] | None = None) -> str:
    """The generated part of docs/results.md: every table, column and view, in Markdown."""
    from dl4gam_assets.publication.views import REGION_COLUMNS, REGION_MEANING, VIEWS

    tables = list(TABLES.values() if tables is None else tables)
    lines = ["## Tables", ""]
    for t in tables:
        lines.append(f"- [`{t.name}`](#{_anchor(t.name)}): {t.meaning}")
    lines += [f"- [`region`](#region): {REGION_MEANING}",
              "- `tables_info`: this page as a table: one row a column, with the rows of its table.", ""]  # fmt: skip
    for t in tables:
        lines += [f"### {t.name}", "", t.meaning, ""]
        facts = [f"Key: {', '.join(f'`{k}`' for k in t.keys)}."] if t.keys else []
        if has_foreign_key(t):
            facts.append("`glacier_id` is one of `glaciers`.")
        more = [r.meaning for r in row_rules(t) if not r.name.endswith(("_range", "_finite", "_choices"))]
        if more:
            facts.append("Always: " + "; ".join(f"`{m}`" for m in more) + ".")
        if facts:
            lines += [" ".join(facts), ""]
        lines += ["| column | type | unit | range | required | meaning |", "|---|---|---|---|---|---|"]
        for c in t.columns:
            required = "yes" if c.key or not c.nullable else ""
            cells = (f"`{c.name}`", TYPES[c.dtype], unit_of(c), _range(c), required, _cell(c.meaning))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["### region", "", REGION_MEANING, "", "| column | type | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {_cell(meaning)} |" for name, kind, meaning in REGION_COLUMNS]
    lines += ["", "## Views", ""]
    lines += [f"- [`{name}`](#{_anchor(name)}): {view.meaning}" for name, view in VIEWS.items()]
    for name, view in VIEWS.items():
        lines += ["", f"### {name}", "", view.meaning + (" Kept in this order, as a table." if view.stored else ""), "",
                  "| column | type | unit | meaning |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| `{c.name}` | {TYPES[c.dtype]} | {unit_of(c)} | {_cell(c.meaning)} |" for c in view.columns]
    return "\n".join(lines) + "\n"


def with_page(text: str) -> str:
    """``text`` of docs/results.md with its generated part made again.

    Raises
    ------
    ValueError
        if the two marks are not there, each once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, each once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{schema_page()}\n{END}{rest.split(END)[1]}"


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "", name.lower())


def _range(c: Column) -> str:
    if c.choices:
        return ", ".join(f"`{choice}`" for choice in c.choices)
    if c.minimum is None and c.maximum is None:
        return ""
    low = "" if c.minimum is None else f"{c.minimum:g}"
    high = "" if c.maximum is None else f"{c.maximum:g}"
    return f"{low} to {high}" if low and high else (f"from {low}" if low else f"to {high}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_page(page.read_text(encoding="utf-8")), encoding="utf-8")
