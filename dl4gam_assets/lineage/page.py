"""The page of ``dl4gam explain --html``: one estimate from the number to its pixels, in one file.

Belongs here: HTML of an :class:`~dl4gam_assets.lineage.explanation.Explanation`. Does not belong here: finding it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from dl4gam_assets.lineage.explanation import Explanation

if TYPE_CHECKING:
    import jinja2

#: The story itself, in the page of one estimate and in reports of many. ``open``: how many tables stand open.
_STORY = """{% for note in e.notes %}<p class="note">{{ note }}</p>{% endfor %}
<h{{ level }}>From the number to the pixels</h{{ level }}>
<div class="tree"><ul>{% for node in tree recursive %}<li>{{ node.text }}
{%- if node.children %}<ul>{{ loop(node.children) }}</ul>{% endif %}</li>{% endfor %}</ul></div>
<h{{ level }}>Everything it was made from</h{{ level }}>
{% for kind, rows in groups %}
<details{% if loop.index <= open %} open{% endif %}><summary>{{ kind }} ({{ rows|length }})</summary>
<div class="wide"><table>
<tr><th>name</th><th>where</th><th>checksum, fingerprint or version</th><th>made by</th><th>when (UTC)</th></tr>
{% for r in rows %}<tr><td>{{ r.name }}</td><td class="mono">{{ r.address or "" }}</td>
<td class="mono">{{ r.checksum or "" }}</td>
<td class="mono">{% if r.asset %}{{ r.asset }} [{{ r.partition }}]{% if r.run_id %}<br>run {{ r.run_id }}{% endif %}
{%- endif %}</td><td>{{ r.time.strftime("%Y-%m-%d %H:%M") if r.time else "" }}</td></tr>
{% endfor %}</table></div></details>
{% endfor %}
<p class="quiet">Made {{ e.provenance.time.strftime("%Y-%m-%d %H:%M") }} UTC
by dl4gam_assets {{ e.provenance.code_version }}.
Make it again with
<code>dl4gam reproduce {{ e.glacier.glacier_id }} --year {{ e.estimate.year }} --region {{ e.region }}</code>.</p>"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ e.glacier.glacier_id }} {{ e.estimate.year }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; color: #1b2733; background: #fff; margin: 0 auto; max-width: 60rem;
        padding: 1rem; }
 h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
 .big { font-size: 1.7rem; font-weight: 600; } .quiet { color: #52606d; }
 .note { border-left: 4px solid #e69f00; padding: .3rem .8rem; background: #fff8e8; }
 .tree ul { list-style: none; padding-left: 1.1rem; border-left: 1px solid #c5d0db; margin: .1rem 0 .1rem .3rem; }
 .tree > ul { border: 0; padding-left: 0; margin-left: 0; } .tree li { margin: .15rem 0; }
 .wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; min-width: 100%; }
 th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #dde4ea; vertical-align: top; }
 td.mono { font-family: ui-monospace, monospace; font-size: .78rem; overflow-wrap: anywhere; max-width: 22rem; }
 summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
 @media (prefers-color-scheme: dark) { body { background: #10171e; color: #dbe4ec; } .quiet { color: #9fb0bf; }
   th, td { border-color: #2b3945; } .note { background: #2a2312; } .tree ul { border-color: #3a4a58; } }
</style></head><body>
<p class="quiet">{{ region }}</p>
<h1>{{ e.glacier.glacier_id }}{% if e.glacier.name %} ({{ e.glacier.name }}){% endif %}, {{ e.estimate.year }}</h1>
<p><span class="big">{{ "%.4f"|format(e.estimate.area_km2) }} km<sup>2</sup></span><br>
interval {{ "%.4f"|format(e.estimate.lower_km2) }} to {{ "%.4f"|format(e.estimate.upper_km2) }} km<sup>2</sup>
(calibrated to hold the true area in {{ "%.0f"|format(100 * e.calibration.coverage) }}% of all cases)</p>
{{ story | safe }}
</body></html>
"""


def explanation_page(story: Explanation, region: str = "") -> str:
    """HTML of an estimate's explanation: self-contained, without scripts. ``region``: title of the region."""
    fragment = explanation_fragment(story, level=2, open_tables=2)
    return _template(_PAGE).render(e=story, region=region, story=fragment)


def explanation_fragment(story: Explanation, *, level: int = 4, open_tables: int = 0) -> str:
    """The story of an estimate as HTML to stand inside a page: notes, tree, and a table for each kind of input.

    Parameters
    ----------
    level : of its headings
    open_tables : how many of the tables stand open; the others are folded
    """
    groups: dict[str, list[Any]] = {}
    for record in story.inputs:
        groups.setdefault(record.kind, []).append(record)
    return _template(_STORY).render(
        e=story, tree=_tree(story.lines()), groups=list(groups.items()), level=level, open=open_tables
    )


@functools.cache
def _template(text: str) -> jinja2.Template:
    """Compiled once: a report has a story for each glacier on its map."""
    import jinja2

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)


def _tree(lines: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Nodes (text, children) from lines with depths."""
    root: dict[str, Any] = {"text": "", "children": []}
    last = {-1: root}
    for depth, text in lines:
        node: dict[str, Any] = {"text": text, "children": []}
        last[depth - 1]["children"].append(node)
        last[depth] = node
    return list(root["children"])
