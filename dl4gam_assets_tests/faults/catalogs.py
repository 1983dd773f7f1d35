"""Bad catalogs: a STAC API that fails, hangs, lies or pages for ever.

Belongs here: the same search from a server with each fault, compared with the catalog on disk.
Does not belong here: files of scenes (``scenes``); the details of retries (``imagery/test_loopback_faults.py``).

A search gives all that there is, or is an error that names the address: never a part.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

from dl4gam_assets.imagery import open_catalog
from dl4gam_assets.settings import StacApi
from dl4gam_assets_tests.faults.table import Bench, Outcome, fault
from dl4gam_assets_tests.stac_server import EMPTY, HALF, HTML, LYING, RESET, Server, hang, serving, status

SEASON = (dt.date(2016, 8, 1), dt.date(2016, 10, 15))


def _fail(made: object, times: int | None) -> Callable[[Server], None]:
    return lambda server: server.fail("/v1/search", made, times=times)  # type: ignore[arg-type,return-value]


def _lie(what: str) -> Callable[[Server], None]:
    return lambda server: setattr(server.backend, "lies", {what})


def _endless(what: str) -> Callable[[Server], None]:
    return lambda server: setattr(server.backend, "endless", what)


#: Name -> what is done to the server, and whether the search has to succeed all the same.
FAULTS: dict[str, tuple[Callable[[Server], None], bool]] = {
    "429 once, with Retry-After": (_fail(status(429, 1), 1), True),
    "500 once": (_fail(status(500), 1), True),
    "a connection that is reset once": (_fail(RESET, 1), True),
    "half an answer once": (_fail(HALF, 1), True),
    "half an answer that claims to be whole, once": (_fail(LYING, 1), True),
    "an empty answer once": (_fail(EMPTY, 1), True),
    "no answer once": (_fail(hang(5), 1), True),
    "429 for ever": (_fail(status(429), None), False),
    "500 for ever": (_fail(status(500), None), False),
    "403": (_fail(status(403), None), False),
    "a web page for ever": (_fail(HTML, None), False),
    "no answer for ever": (_fail(hang(30), None), False),
    "the same page for ever": (_endless("same"), False),
    "new pages for ever": (_endless("new"), False),
    "empty pages for ever": (_endless("empty"), False),
    "a lie about the extent": (_lie("bbox"), True),
    "a lie about the dates": (_lie("datetime"), True),
    "items given twice": (_lie("repeat"), True),
    "empty pages between others": (_lie("gaps"), True),
}


#: Those that wait: for a silent server, or between attempts that are all in vain.
SLOW = frozenset(name for name in FAULTS if name.startswith(("no answer", "429", "500")))


@fault("bad catalogs", "a STAC API that fails at once")
def failing_at_once(bench: Bench) -> dict[str, Outcome]:
    return _failing(bench, {name: made for name, made in FAULTS.items() if name not in SLOW})


@fault("bad catalogs", "a STAC API that keeps one waiting", long=True)
def failing_slowly(bench: Bench) -> dict[str, Outcome]:
    outcomes = _failing(bench, {name: FAULTS[name] for name in FAULTS if name in SLOW})
    return outcomes | {"a server that is gone": _gone(bench)}


def _failing(bench: Bench, faults: dict[str, tuple[Callable[[Server], None], bool]]) -> dict[str, Outcome]:
    region = bench.small.region
    inputs = Path(str(bench.small.storage.inputs()))
    box = list(bench.small.storage.read_table("glaciers").total_bounds)
    near = open_catalog(region.imagery.catalog, inputs, region.imagery.sensor)
    truth = [item.id for item in near.search(box, *SEASON)]
    outcomes = {}
    with serving(inputs) as server:
        for label, (damage, passes) in faults.items():
            server.restore()
            catalog = StacApi(
                kind="stac-api", url=server.url, collections=list(server.collections), page_size=3, max_items=60,
                timeout_s=0.5,
            )  # fmt: skip
            far = open_catalog(catalog, Path(), region.imagery.sensor)
            damage(server)
            outcome = Outcome("")
            try:
                found = [item.id for item in far.search(box, *SEASON)]
                outcome.said = "the same items"
                outcome.expect(found == truth, f"{len(found)} items of {len(truth)}")
                outcome.expect(passes, "no error")
            except Exception as error:
                outcome.said = " ".join(str(error).split())
                outcome.names(server.url)
                outcome.expect(not passes, "an error where another attempt would do")
            outcomes[label] = outcome
        server.restore()
    return outcomes


def _gone(bench: Bench) -> Outcome:
    with serving(Path(str(bench.small.storage.inputs()))) as server:
        catalog = StacApi(kind="stac-api", url=server.url, collections=list(server.collections), timeout_s=0.5)
    region, box = bench.small.region, list(bench.small.storage.read_table("glaciers").total_bounds)
    outcome = Outcome("")
    try:
        open_catalog(catalog, Path(), region.imagery.sensor).search(box, *SEASON)
    except Exception as error:
        outcome.said = " ".join(str(error).split())
    outcome.names(catalog.url)
    outcome.expect(bool(outcome.said), "no error")
    return outcome
