"""The docs agree with the code: pages that are made from it, commands and views that they name, the notebook."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import typer.main
import yaml

from dl4gam_assets.automation import JOBS
from dl4gam_assets.cli import app
from dl4gam_assets.publication.views import VIEWS
from dl4gam_assets.tables import TABLES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "deploy" / "compose.yaml"])


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_made_from_the_code_are_up_to_date() -> None:
    for name, text in tool("reference").pages().items():
        have = (DOCS / name).read_text(encoding="utf-8")
        assert have == text, f"docs/{name} is out of date: python docs/tools/reference.py docs"


def test_the_notebook_runs_and_is_the_committed_one() -> None:
    made = tool("notebook").executed()  # raises where a cell fails
    committed = nbformat.read(str(DOCS / "tutorial.ipynb"), as_version=4)
    assert [c.source for c in committed.cells] == [c.source for c in made.cells], (
        "docs/tutorial.ipynb is out of date: python docs/tools/notebook.py docs/tutorial.ipynb"
    )
    said = "".join(o.get("text", "") for c in made.cells for o in c.get("outputs", []) if o.output_type == "stream")
    assert re.search(r"measured: [-+]\d\.\d\d \+/- \d+\.\d\d % per year", said) and "true: -" in said


def test_every_page_is_on_the_site_and_every_picture_is_there() -> None:
    def entries(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        children = node.values() if isinstance(node, dict) else node
        return [e for child in children for e in entries(child)]  # type: ignore[attr-defined]

    nav = entries(yaml.safe_load((ROOT / ".ci" / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(
        str(p.relative_to(DOCS)) for p in DOCS.rglob("*") if p.suffix in (".md", ".ipynb") and p.parent.name != "tools"
    )
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"!?\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
    named = {m for p in PAGES for m in re.findall(r"images/([\w.]+)", p.read_text(encoding="utf-8"))}
    unused = {p.name for p in (DOCS / "images").iterdir()} - named
    assert not unused, f"no page shows {unused}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_options_and_tables_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"(?:^ {4}|`|\$ )dl4gam ([a-z][^`\n]*)", text, re.MULTILINE):
        name = re.match(r"[a-z-]+", line)
        assert name is not None and name[0] in commands, f"{page.name}: dl4gam {line}"
        known = {o for p in commands[name[0]].params for o in p.opts + p.secondary_opts}
        for option in re.findall(r"(?<!\S)(--[a-z-]+|-[a-z])(?!\S)", re.sub(r"[\"'].*?[\"']|#.*", "", line)):
            assert option in known, f"{page.name}: dl4gam {name[0]} has no {option}"
    for sql in re.findall(r"query(?: --region \S+)? \"([^\"]*)\"", text):
        for table in re.findall(r"\bfrom (\w+)", sql, re.IGNORECASE):
            assert table in VIEWS or table in TABLES or table in ("region", "tables_info"), (
                f"{page.name}: no table {table}"
            )


def test_jobs_that_the_docs_name_are_there() -> None:
    text = (DOCS / "operations.md").read_text()
    table = text[text.index("## Jobs") : text.index("## Turn it on")]
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert named == set(JOBS)


#: Messages of others (torch, PostgreSQL, the system) that people meet here.
OF_OTHERS = (
    "operator torchvision::nms", "syntax error at or near", "No space left on device", "CheckError: Expected non-None",
)  # fmt: skip


def _texts() -> str:
    """All texts in the package, and in the Makefile; what is put into a message at run time is a line's end."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for file in sorted((ROOT / "dl4gam_assets").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\n" for p in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_in_troubleshooting_is_one_that_the_package_says() -> None:
    texts, checked = _texts(), 0
    for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        first = line.split("|")[1] if line.startswith("| ") else ""
        for message in re.findall(r"`([^`]+)`", first):
            if message.startswith(OF_OTHERS):
                continue
            # Names, numbers and texts in quotes are put in at run time.
            parts = re.split(r"\.\.\.|'[^']*'|\b[A-Z]\b|\d+(?:\.\d+)?|\bworker\b", message)
            wanted = [part.strip(" :,") for part in parts if len(part.strip(" :,")) >= 6]
            assert wanted, f"nothing of {message!r} can be looked for"
            missing = [part for part in wanted if part not in texts]
            assert not missing, f"docs/troubleshooting.md: nobody says {missing} of {message!r}"
            checked += 1
    assert checked > 20


def test_pictures_of_readme_and_tour_have_a_script() -> None:
    made = tool("screenshots")
    for page, pages, ending in (("README.md", made.README_PAGES, "png"), ("docs/ui-tour.md", made.PAGES, "jpg")):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(rf"images/((?!demo)[\w]+)\.{ending}", text):
            if ending == "png" or name.startswith("ui_"):
                assert name in pages, f"{page} shows {name}, which docs/tools/screenshots.py does not take"
