"""The report as a browser shows it: its map under its own policy, its links leading somewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dl4gam_assets.publication import write_report
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.publication.test_report import Page
from dl4gam_assets_tests.small_region import Small

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="module")
def report(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Storage]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(small.storage, small.region, small.region.years.last or 0, path)
    return path, small.storage


def test_pictures_of_the_chosen_images_lie_where_their_glaciers_are(report: tuple[Path, Storage]) -> None:
    html = report[0].read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="map-data">(.*?)</script>', html, re.DOTALL)[0])
    pictured = [(g, e) for g in data["glaciers"] for e in g["y"].values() if "p" in e]
    assert {g["i"] for g, _ in pictured} == set(data["closely"]) and len(pictured) >= len(data["closely"])
    for glacier, entry in pictured:
        assert entry["p"].startswith("data:image/webp;base64,")
        (south, west), (north, east) = entry["pb"]
        (own_south, own_west), (own_north, own_east) = glacier["b"]
        assert south < own_south < own_north < north and west < own_west < own_east < east
        assert north - south < 4 * (own_north - own_south) + 0.05


def test_every_link_leads_to_a_story_on_the_page(report: tuple[Path, Storage]) -> None:
    html, storage = report[0].read_text(encoding="utf-8"), report[1]
    wanted = {str(a["href"])[1:] for t, a in Page(html).tags if t == "a"}
    assert "from-totals" in wanted and len(wanted) > 3
    assert wanted <= set(re.findall(r'\bid="([^"]+)"', html))
    lineage = storage.read_table("lineage")
    for sha in lineage["member_sha256"].iloc[0].split(","):
        assert sha[:12] in html
    run = storage.read_state("regional_change", str(lineage["year"].max()))
    assert run is not None and str(run["output"]) in html


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_map_is_drawn_in_a_browser(report: tuple[Path, Storage], tmp_path: Path) -> None:
    command = [
        str(BROWSER),
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", "--dump-dom", report[0].as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Refused to" not in done.stderr and "Uncaught" not in done.stderr
    dom = done.stdout
    year = report[1].read_table("areas")["year"].max()
    estimates = len(report[1].read_table("areas", year=int(year)))
    data = json.loads(re.findall(r'id="map-data">(.*?)</script>', dom, re.DOTALL)[0])
    assert f"{estimates} of {len(data['glaciers'])} glaciers on the map have an estimate for {year}" in dom
    assert (
        dom.count("leaflet-interactive") >= estimates
        and len(re.findall("<img[^>]*leaflet-image-layer", dom)) == estimates
    )
    assert dom.count("<option") == 1 + len(data["closely"])


#: Widths of a phone and of a desk, in pixels.
WIDTHS = (390, 1280)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_not_wider_than_the_window(width: int, report: tuple[Path, Storage], tmp_path: Path) -> None:
    """Wide tables and pictures scroll in boxes of their own. A frame of that width measures, so that no smallest size
    of a window matters; its script is outside of the page, whose policy allows none."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" src="{report[0].as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>document.getElementById('page').onload = (e) => { const d = e.target.contentDocument.documentElement;"
        " document.title = `${d.clientWidth} ${d.scrollWidth}`; };</script>"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=8000",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found is not None, done.stdout[:500]
    assert int(found[2]) <= int(found[1]) <= width
