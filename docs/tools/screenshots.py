"""Take the pictures of docs/ui-tour.md and README.md from a running UI with the demo's store, and of its year report.

make demo && make ui                                      # in another terminal
pip install selenium                                      # and Chromium with its driver
python docs/tools/screenshots.py docs/images --store dl4gam_home/demo [--ui http://127.0.0.1:3000]
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

#: Words to click on, or a hint that an empty field shows and what to type there.
Step = str | tuple[str, str]
#: Name of the picture -> address below the UI, steps one after the other, seconds to wait.
PAGES: dict[str, tuple[str, tuple[Step, ...], float]] = {
    "ui_graph": ("/asset-groups", (), 10),
    "ui_lineage": ("/assets/glacier_areas?view=lineage&lineageScope=neighbors&lineageDepth=2", (), 10),
    "ui_partitions": ("/assets/glacier_predictions?view=partitions", (), 8),
    "ui_backfill": ("/assets/glacier_predictions", ("Materialize…", "All", ("2015", "[2022...2024]")), 8),
    "ui_checks": ("/assets/glacier_areas?view=checks&checkDetail=area_inside_interval", (), 8),
    "ui_automation": ("/automation", (), 8),
    "ui_jobs": ("/jobs", (), 8),
    "ui_member": ("/assets/ensemble_member?view=partitions&partition=fold_1%7Cmember_01", (), 8),
}
#: The same for the pictures of the README, which are PNG.
README_PAGES: dict[str, tuple[str, tuple[Step, ...], float]] = {
    "asset_graph": ("/asset-groups", (), 10),
    "partitions": ("/assets/glacier_predictions?view=partitions", (), 8),
    "materialization": ("/assets/glacier_predictions?view=partitions&partition=fold_1%7C2023", ("[Show Markdown]",), 8),
}
WIDTH, HEIGHT = 1440, 900


def browser() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for word in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", f"--window-size={WIDTH},{HEIGHT + 140}",
    ):  # fmt: skip
        options.add_argument(word)
    for binary, driver in (("/usr/bin/chromium", "/usr/bin/chromedriver"),):
        if Path(binary).exists():
            options.binary_location = binary
            return webdriver.Chrome(options=options, service=Service(driver))
    return webdriver.Chrome(options=options)


def take(page: Any, step: Step) -> None:
    """Click on the innermost element that says exactly these words, or type into a field."""
    if isinstance(step, tuple):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        field = page.find_element(By.CSS_SELECTOR, f"input[placeholder*='{step[0]}']")
        field.send_keys(step[1])
        field.send_keys(Keys.TAB)
    else:
        found = page.execute_script(
            "const all = [...document.querySelectorAll('button, a, div, span')].filter("
            "e => e.textContent.trim() === arguments[0] && e.offsetParent);"
            "const at = all.findIndex(e => !all.some(o => o !== e && e.contains(o)));"
            "if (at >= 0) all[at].click(); return at >= 0",
            step,
        )
        if not found:
            raise SystemExit(f"{page.current_url}: nothing says {step!r}")
    time.sleep(3)


def save(png: bytes, path: Path) -> None:
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    if path.suffix == ".png":
        picture.quantize(128).save(path, optimize=True)
    else:
        picture.save(path, quality=80, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--ui", default="http://127.0.0.1:3000")
    choice = parser.parse_args()
    page = browser()
    try:
        pages = {f"{name}.jpg": how for name, how in PAGES.items()}
        pages |= {f"{name}.png": how for name, how in README_PAGES.items()}
        for name, (address, steps, wait) in pages.items():
            page.get(choice.ui + address)
            time.sleep(wait)
            for step in steps:
                take(page, step)
            save(page.get_screenshot_as_png(), choice.folder / name)
            print(name)
        report = sorted((choice.store / "reports").glob("*.html"))[-1]
        page.get(report.absolute().as_uri())
        time.sleep(3)
        page.execute_script("document.querySelector('.controls').scrollIntoView()")
        time.sleep(1)
        save(page.get_screenshot_as_png(), choice.folder / "report.jpg")
    finally:
        page.quit()


if __name__ == "__main__":
    main()
