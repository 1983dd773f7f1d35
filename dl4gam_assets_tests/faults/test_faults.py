"""The short version of `make faults`: every fault that takes seconds, and the register itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl4gam_assets_tests.faults.table import Bench, Fault, Outcome, all_faults, not_tried, tried
from dl4gam_assets_tests.small_region import Small

SHORT = [one for one in all_faults() if not one.long]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", SHORT, ids=lambda one: one.label.replace(" ", "-"))
def test_it_is_contained(one: Fault, small: Small, tmp_path: Path) -> None:
    outcomes = tried(one, Bench(small, tmp_path))
    assert outcomes
    if all(outcome.untried for outcome in outcomes.values()):
        pytest.skip("; ".join(outcome.said for outcome in outcomes.values()))
    assert {name: outcome.lost for name, outcome in outcomes.items() if outcome.lost} == {}


def test_every_group_is_there_and_names_are_unique() -> None:
    labels = [one.label for one in all_faults()]
    assert len(labels) == len(set(labels))
    assert {one.group for one in all_faults()} == {
        "kill -9", "bad scenes", "bad catalogs", "bad inventories", "bad models", "environment",
    }  # fmt: skip


def test_what_is_not_tried_is_neither_lost_nor_contained() -> None:
    assert not_tried("no right to mount").verdict == "not tried" and Outcome("").verdict == "all"
    assert Outcome("", ["a row"]).verdict == "no"


def test_a_loss_is_a_loss(small: Small, tmp_path: Path) -> None:
    """The table can show one: an attempt that raises, words that are missing, more than one line."""

    def raises(bench: Bench) -> Outcome:
        raise ZeroDivisionError("unexpected")

    assert "ZeroDivisionError" in tried(Fault("g", "n", raises, False), Bench(small, tmp_path))["n"].lost[0]
    silent, long, right = Outcome(""), Outcome("file a.tif is bad\nTraceback"), Outcome("file a.tif is bad")
    for outcome in (silent, long, right):
        outcome.names("a.tif")
    assert len(silent.lost) == 2 and len(long.lost) == 2 and right.lost == []
