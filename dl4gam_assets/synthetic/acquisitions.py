"""The dates of a simulated archive: which days, how cloudy, how snowy, which tiles.

Belongs here: the plan of acquisitions. Does not belong here: pixels.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Acquisition:
    """One overpass. Altitudes in metres relative to the equilibrium line."""

    moment: dt.datetime
    kind: str  # clean, summer, cloudy, autumn
    cloud_west: float
    cloud_east: float
    snowline: float  # of old snow on the glaciers
    patches: float  # of old snow beside the glaciers
    fresh: float | None = None  # of fresh snow, if there is any
    haze: float = 0.0
    cut: str | None = None  # "west": the orbit's edge cuts the western tile, "east" the eastern one
    tiles: tuple[str, ...] = ("west", "east")
    older_processing: bool = False  # the day is there twice: also with an older processing baseline

    @property
    def date(self) -> dt.date:
        return self.moment.date()


def plan_acquisitions(years: Sequence[int], rng: np.random.Generator, *, dates_per_year: int = 5) -> list[Acquisition]:
    """Acquisitions of all years.

    Each year has two clear late-summer dates between 8 August and 20 September: in every second year the first is
    cloudy in the west and the second in the east, so that no date is the best for all glaciers; otherwise one of them
    is clear everywhere. Then a date in July or early August with much old snow, in every second year a cloudy one, and
    one of late
    September or October with fresh snow and a low sun. One date of each third year reaches one tile only in part.
    """
    plan = []
    for k, year in enumerate(years):
        days = {
            "summer": dt.date(year, 7, 15) + dt.timedelta(days=int(rng.integers(0, 24))),
            "clean_a": dt.date(year, 8, 14) + dt.timedelta(days=int(rng.integers(0, 12))),
            "cloudy": dt.date(year, 8, 27) + dt.timedelta(days=int(rng.integers(0, 5))),
            "clean_b": dt.date(year, 9, 2) + dt.timedelta(days=int(rng.integers(0, 12))),
            "autumn": dt.date(year, 9, 26) + dt.timedelta(days=int(rng.integers(0, 32))),
        }
        late = float(rng.normal(0, 35))  # a snowy or a bare year
        split = k % 2 == 1
        whole = "clean_b" if rng.random() < 0.6 else "clean_a"
        for name, day in sorted(days.items(), key=lambda item: item[1]):
            if name == "cloudy" and (dates_per_year < 5 or k % 2):
                continue
            moment = dt.datetime(
                day.year, day.month, day.day, 10, int(rng.integers(8, 22)), int(rng.integers(0, 60)), tzinfo=dt.UTC
            )
            some = float(rng.uniform(0.25, 0.6))
            west = east = 0.0
            fresh, cut = None, None
            tiles: tuple[str, ...] = ("west", "east")
            if name == "summer":
                snowline, patches = -170 + late, -120 + 0.5 * late
                west, east = (some * 0.5, some * 0.15) if rng.random() < 0.5 else (0.0, some * 0.4)
                tiles = (("west", "east"), ("west",), ("east",))[int(rng.integers(0, 3))]
            elif name == "clean_a":
                snowline, patches = 0 + late, 150 + late
                if split:
                    west = some
                elif whole != name:
                    west, east = some * 0.5, some * 0.6
            elif name == "clean_b":
                snowline, patches = 55 + late, 230 + late
                if split:
                    east = some
                elif whole != name:
                    west, east = some * 0.2, some * 0.8
                    cut = "west" if k % 3 == 0 else None
            elif name == "cloudy":
                snowline, patches = 30 + late, 190 + late
                west, east = float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.45, 0.9))
                tiles = ("west",) if k % 4 else ("west", "east")
            else:
                snowline, patches = 40 + late, 230 + late
                fresh = float(rng.uniform(-750, -250))
                west, east = (some * 0.3, 0.0) if rng.random() < 0.4 else (0.0, 0.0)
                cut = "east" if k % 3 == 1 else None
                tiles = ("west", "east") if k % 3 else ("east",)
            kind = "clean" if name.startswith("clean") else name
            plan.append(Acquisition(
                moment, kind, west, east, snowline, patches, fresh, float(abs(rng.normal(0, 0.004))), cut, tiles,
                older_processing=kind == "clean" and k % 5 == 3 and name == "clean_a",
            ))  # fmt: skip
    return plan
