"""Faults, how each is tried, and the table of what came of them.

Belongs here: the register of faults, the workbench that each gets, the printed table of `make faults`.
Does not belong here: the faults (one module a group).
"""

from __future__ import annotations

import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dl4gam_assets_tests.small_region import Small


@dataclass
class Outcome:
    """What came of a fault."""

    said: str  # the one message that a user gets: an error, or the row of a glacier in `failures`
    lost: list[str] = field(default_factory=list)  # wrong numbers, missing rows, silent errors; empty: contained
    untried: bool = False  # this machine does not allow it; ``said`` says why. Neither contained nor lost

    @property
    def verdict(self) -> str:
        """The column "contained" of the table."""
        return "no" if self.lost else "not tried" if self.untried else "all"

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.lost.append(otherwise)

    def names(self, *words: str) -> None:
        """The message says these words, in one readable line."""
        for word in words:
            self.expect(word.lower() in self.said.lower(), f"the message does not say {word!r}: {self.said[:300]!r}")
        self.expect(0 < len(self.said) < 1500 and "\n" not in self.said.strip(), f"no clear line: {self.said[:80]!r}")
        self.expect("Traceback" not in self.said, "the message is a traceback")


def not_tried(why: str) -> Outcome:
    """The outcome of a fault that this machine can not have."""
    return Outcome(why, untried=True)


@dataclass(frozen=True)
class Bench:
    """What a fault works with: an undisturbed store (read it), and a folder of its own."""

    small: Small
    folder: Path

    def copy(self, *, without: tuple[str, ...] = (), linked: tuple[str, ...] = ()) -> Small:
        """The undisturbed region in a store that may be changed, without some of its folders.

        Files of the folders in ``linked`` are the undisturbed ones under a second name (they take no room): for faults
        that do not change them, not even their times or permissions.
        """
        import os
        import shutil

        made = Small(self.folder / "copy")
        source = Path(str(self.small.storage.root))
        for entry in source.iterdir():
            if entry.name in without:
                continue
            target = Path(str(made.storage.root)) / entry.name
            if entry.is_dir():
                # Another test that reads the same store may take the log of one of Dagster's databases away meanwhile.
                for trial in range(3):
                    try:
                        shutil.copytree(entry, target, copy_function=os.link if entry.name in linked else shutil.copy2)
                        break
                    except shutil.Error:
                        if trial == 2:
                            raise
                        shutil.rmtree(target)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(entry, target)
        return made


Attempt = Callable[[Bench], "Outcome | dict[str, Outcome]"]


@dataclass(frozen=True)
class Fault:
    """An attempt: one fault, or several that are tried at once (names of its outcomes)."""

    group: str
    name: str
    attempt: Attempt
    long: bool  # only in `make faults`

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name}"


FAULTS: list[Fault] = []


def fault(group: str, name: str, *, long: bool = False) -> Callable[[Attempt], Attempt]:
    """Register an attempt. ``long``: only in `make faults`."""

    def register(attempt: Attempt) -> Attempt:
        FAULTS.append(Fault(group, name, attempt, long))
        return attempt

    return register


def tried(one: Fault, bench: Bench) -> dict[str, Outcome]:
    """Outcomes by name. An exception that the attempt did not expect is a loss."""
    try:
        made = one.attempt(bench)
    except Exception as error:
        traceback.print_exc()
        made = Outcome("", [f"unexpected {type(error).__name__}: {str(error)[:300]}"])
    return made if isinstance(made, dict) else {one.name: made}


def all_faults() -> list[Fault]:
    """Every registered fault, group by group."""
    from dl4gam_assets_tests.faults import catalogs, environment, inventories, kills, models, scenes

    assert catalogs and environment and inventories and kills and models and scenes
    return FAULTS


def rows(small: Small, folder: Path, wanted: list[Fault]) -> Iterator[tuple[Fault, str, Outcome, float]]:
    for number, one in enumerate(wanted):
        begin = time.monotonic()
        own = folder / f"{number:03d}"
        own.mkdir(parents=True)
        outcomes = tried(one, Bench(small, own))
        shutil.rmtree(own, ignore_errors=True)  # a store of its own each: together they would fill a disk
        for name, outcome in outcomes.items():
            yield one, name, outcome, (time.monotonic() - begin) / len(outcomes)


#: Verdict -> what the line of progress says.
WORDS = {"all": "contained", "no": "LOST", "not tried": "not tried"}
MARK = "<!-- the table of `make faults` -->\n"


def write_page(page: Path, told: list[tuple[str, ...]]) -> None:
    """Put the table of outcomes behind MARK in a Markdown file."""
    head, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    lines, group = [head, MARK], ""
    for row in told:
        if row[0] != group:
            group = row[0]
            lines += [f"\n## {group[0].upper()}{group[1:]}\n\n"]
            lines += ["| fault | tried | contained | lost | what is said |\n", "| --- | ---: | --- | --- | --- |\n"]
        lines.append("| " + " | ".join(_cell(text) for text in row[1:]) + " |\n")
    if not mark:
        raise SystemExit(f"{page} has no line {MARK.strip()!r}")
    page.write_text("".join(lines), encoding="utf-8")


def _cell(text: str) -> str:
    """Text in a Markdown table: temporary paths shortened, markup and links defused."""
    text = re.sub(r"http://127\.0\.0\.1:\d+", "http://catalog", text)
    text = re.sub(r"/?\.\.\./\d{3}/copy", "STORE", text)
    return text.replace("|", "/").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*").replace("[", "\\[")


def main() -> None:
    """`make faults`: every fault, and the table; exit code 1 if anything was lost."""
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(description="Try every fault and print what came of it.")
    parser.add_argument("--only", default="", help="faults whose group or name holds this text")
    parser.add_argument("--page", type=Path, help="Markdown file: the table in it is replaced")
    parser.add_argument("--kills", type=int, default=100, help="kill -9 so many times in all")
    choice = parser.parse_args()
    from dl4gam_assets_tests.faults import kills

    kills.KILLS = choice.kills
    wanted = [one for one in all_faults() if choice.only.lower() in one.label.lower()]
    console = Console()
    table = Table("fault", "tried", "contained", "lost", "what the user is told", show_lines=False)
    lost = untried = 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dl4gam-faults-") as name:
        small = Small(Path(name) / "undisturbed")
        console.print("making the undisturbed store ...")
        assert small.run().failed == []
        group, told = "", []
        for one, label, outcome, seconds in rows(small, Path(name), wanted):
            if one.group != group:
                table.add_section()
                table.add_row(f"[bold]{one.group}[/bold]", "", "", "", "")
                group = one.group
            times, well = 0 if outcome.untried else getattr(outcome, "times", 1), outcome.verdict
            missing, said = "; ".join(outcome.lost)[:400] or "nothing", outcome.said.replace(name, "...")[:240]
            table.add_row(label, str(times), well, missing, said)
            told.append((one.group, label, str(times), well, missing, said))
            console.print(f"{one.group}: {label}: {WORDS[well]} ({seconds:.0f} s)")
            lost += bool(outcome.lost)
            untried += outcome.untried
    console.print(table)
    if choice.page is not None:
        write_page(choice.page, told)
    minutes = (time.monotonic() - begin) / 60
    console.print(
        f"{len(told)} faults in {minutes:.0f} minutes: {lost} with a loss, {untried} not tried on this machine"
    )
    raise SystemExit(1 if lost else 0)
