from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import shapely

from dl4gam_assets.publication import web_map, write_report
from dl4gam_assets.publication.report import collect, number, render
from dl4gam_assets.publication.truth import markdown, truth_of_year, truth_tables
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.publication.conftest import NOTE, fill


class Page(HTMLParser):
    """Tags with their attributes, in order, and the text."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def html(store: Storage, region: Region, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "2023.html"
    write_report(store, region, 2023, path)
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert page.open == []
    sources = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset")]
    assert sources and all(s is not None and s.startswith(("data:image/", "#")) for s in sources)
    assert not {"link", "iframe", "object"} & {t for t, _ in page.tags}
    assert not any("url(" in style for style in re.findall(r"<style>(.*?)</style>", html, re.DOTALL))


def test_the_policy_allows_the_two_scripts_of_the_map_and_no_other(html: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 2 and "Leaflet 1.9" in scripts[0][:100]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts}
    policy = next(a["content"] for t, a in Page(html).tags if t == "meta" and "http-equiv" in a) or ""
    allowed = policy.split("script-src ")[1].split()
    assert set(allowed) == hashes and "default-src 'none'" in policy


def test_the_data_of_the_map_are_those_of_the_tables(html: str, store: Storage) -> None:
    data = json.loads(re.findall(r'id="map-data">(.*?)</script>', html, re.DOTALL)[0])
    glaciers = store.read_table("glaciers")
    assert data["years"] == [2015, 2019, 2023] and data["left_out"] == 0
    assert {g["i"] for g in data["glaciers"]} == set(glaciers["glacier_id"])
    areas = store.read_table("areas", year=2023).set_index("glacier_id")
    outlines = store.read_table("outlines", year=2023).query("bound == 'best'").set_index("glacier_id")
    measured = [g for g in data["glaciers"] if "k" in g["y"].get("2023", {})]
    assert {g["i"] for g in measured} == set(areas.index)
    for glacier in measured:
        entry, row = glacier["y"]["2023"], areas.loc[glacier["i"]]
        assert entry["k"] == pytest.approx([row["area_km2"], row["lower_km2"], row["upper_km2"]], abs=1e-4)
        (ring,) = entry["o"][0]
        shape = shapely.Polygon(np.cumsum(np.array(ring).reshape(-1, 2), axis=0) * 1e-5)
        truth = outlines.geometry[glacier["i"]]
        assert shape.symmetric_difference(truth).area < 0.02 * truth.area
    assert all("s" in g for g in data["glaciers"] if not any("o" in e for e in g["y"].values()))


def test_many_vertices_are_simplified_and_middle_years_left_out(
    store: Storage, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    glaciers = store.read_table("glaciers")
    whole = web_map.map_data(store, glaciers, (2015, 2019, 2023), 2015, 2023, ["G11"], {})
    monkeypatch.setattr(web_map, "MOST_VERTICES", 20)
    monkeypatch.setattr(web_map, "MOST_GLACIERS", 11)
    small = web_map.map_data(store, glaciers, (2015, 2019, 2023), 2015, 2023, ["G11"], {})
    assert small["left_out"] == 1 and whole["left_out"] == 0
    by_id = {g["i"]: g for g in small["glaciers"]}
    assert {"o", "lo", "up"} <= set(by_id["G11"]["y"]["2019"])  # shown closely: every year
    assert "o" not in by_id["G10"]["y"]["2019"] and "k" in by_id["G10"]["y"]["2019"]
    assert all("o" in by_id["G10"]["y"][y] for y in ("2015", "2023"))


def test_a_glacier_whose_only_outline_is_of_a_middle_year_keeps_its_inventory_outline(
    store: Storage, region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the limit of vertices middle years are left out, and a glacier may have an upper outline only."""
    copy = Storage(tmp_path / "store")
    shutil.copytree(str(store.root), str(copy.root))
    for year in (2015, 2019, 2023):
        outlines = copy.read_table("outlines", year=year)
        gone = ((outlines["glacier_id"] == "G10") & (year != 2019)) | (
            (outlines["glacier_id"] == "G11") & (outlines["bound"] != "upper")
        )
        copy.write_table("outlines", outlines[~gone].drop(columns="year"), {"year": year})
    monkeypatch.setattr(web_map, "MOST_VERTICES", 20)
    data = web_map.map_data(copy, copy.read_table("glaciers"), (2015, 2019, 2023), 2015, 2023, ["G11"], {})
    by_id = {g["i"]: g for g in data["glaciers"]}
    truth = copy.read_table("glaciers").set_index("glacier_id").geometry
    for glacier in ("G10", "G11"):
        (ring,) = by_id[glacier]["s"][0]
        shape = shapely.Polygon(np.cumsum(np.array(ring).reshape(-1, 2), axis=0) * 1e-5)
        assert shape.symmetric_difference(truth[glacier]).area < 0.02 * truth[glacier].area
    assert "up" in by_id["G11"]["y"]["2023"] and "s" not in by_id["G09"]


def test_pictures_have_alternatives_and_are_drawn(html: str) -> None:
    images = [a for t, a in Page(html).tags if t == "img"]
    assert len(images) == 4
    for image in images:
        assert len(image["alt"] or "") > 40
        head, body = (image["src"] or "").split(",", 1)
        raw = base64.b64decode(body)
        if "svg" in head:
            assert len(list(ElementTree.fromstring(raw).iter("{http://www.w3.org/2000/svg}path"))) > 10
        else:
            assert raw.startswith(b"\x89PNG")


def test_the_headline_is_the_extrapolated_rate_with_its_interval(html: str, store: Storage) -> None:
    rows = store.read_table("regional_changes", year=2023).query("grouping == 'region'").set_index("method")
    text = re.sub(r"\s+", " ", Page(html).text)
    for method in ("extrapolated", "measured"):
        row = rows.loc[method]
        rate, std = number(row["rate_pct_per_year"], 2, True), number(row["rate_std_pct_per_year"])
        assert f"{rate} ± {std} % per year" in text
    assert "fully dependent" in text and "one standard deviation" in text


def test_cautions_stand_where_quality_is_told_and_simulated_is_named(html: str) -> None:
    text = Page(html).text
    quality = text.index("Quality of the maps")
    assert NOTE in text[:quality] and NOTE in text[quality : text.index("What is not in the figures")]
    assert text.count("simulated") >= 4 and "no figure on this page speaks of a real glacier" in text
    assert "Copernicus" not in text  # simulated imagery is nobody's data
    assert text.index("ensemble", quality) < text.index("band_ratio (baseline)")


def test_quality_coverage_and_exclusions_lead_to_where_they_come_from(html: str) -> None:
    tags = Page(html).tags
    links = [a["href"] for t, a in tags if t == "a"]
    assert {"#from-totals", "#from-quality", "#from-exclusions"} <= set(links)
    assert {"from-totals", "from-quality", "from-exclusions"} <= {a.get("id") for _, a in tags}


def test_boxes_that_scroll_are_named_for_who_can_not_see_them(html: str) -> None:
    boxes = [a for _, a in Page(html).tags if a.get("tabindex") == "0"]
    assert len(boxes) >= 10
    assert all(a.get("role") == "region" and len(a.get("aria-label") or "") > 5 for a in boxes)
    labels = [a["aria-label"] for a in boxes]
    assert len(set(labels)) == len(labels)


def test_text_from_data_is_escaped(html: str) -> None:
    assert "<b>Ferner</b>" not in html and "&lt;b&gt;Ferner&lt;/b&gt;" in html
    assert "below &lt;30%&gt; cloud" in html


def test_failures_and_exclusions_are_told(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html).text)
    assert "1 failed in selected_scenes" in text
    assert "without a rate: not_measured" in text
    assert "too little of the inventory outline was found again" in text
    assert "Inventory of squares (2015)" in text and "10.1029/2025EA004197" in text


def test_the_baseline_year_and_a_year_without_totals(store: Storage, region: Region, tmp_path: Path) -> None:
    write_report(store, region, 2015, tmp_path / "2015.html")
    page = Page((tmp_path / "2015.html").read_text(encoding="utf-8"))
    assert page.open == [] and "Area in the baseline year 2015" in page.text
    assert "% per year" not in page.text and "Largest changes" not in page.text
    with pytest.raises(ValueError, match="materialize regional_change"):
        write_report(store, region, 2018, tmp_path / "2018.html")
    assert [p.name for p in tmp_path.iterdir()] == ["2015.html"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, region: Region) -> Storage:
    """The store with a truth: areas are 2 % too large, and the intervals of 4 % and more hold all but one of 2023."""
    storage = fill(Storage(tmp_path_factory.mktemp("judged")), region)
    frames = []
    for year in (2015, 2019, 2023):
        for fold in (1, 2):
            part = storage.read_table("areas", year=year, fold=fold)
            for rule in ("published", "conformal"):
                narrow = 0.25 if rule == "conformal" else 1.0
                part[f"lower_{rule}_km2"] = part["area_km2"] - narrow * part["std_km2"]
                part[f"upper_{rule}_km2"] = part["area_km2"] + narrow * part["std_km2"]
            storage.write_table("areas", part.drop(columns=["year", "fold"]), {"year": year, "fold": fold})
            frames.append(part[["glacier_id", "year", "area_km2"]])
    truth = pd.concat(frames, ignore_index=True)
    truth["area_km2"] /= 1.02
    off = (truth["glacier_id"] == "G11") & (truth["year"] == 2023)
    truth.loc[off, "area_km2"] *= 0.8
    folder = Path(str(storage.inputs())) / "truth"
    folder.mkdir(parents=True)
    truth.to_parquet(folder / "areas.parquet", index=False)
    return storage


def test_a_simulated_region_is_shown_against_its_truth(judged: Storage, region: Region, tmp_path: Path) -> None:
    write_report(judged, region, 2023, tmp_path / "2023.html")
    text = re.sub(r"\s+", " ", Page((tmp_path / "2023.html").read_text(encoding="utf-8")).text)
    part = text[text.index("Against the known truth") : text.index("Map ", text.index("Against the known truth"))]
    truth = pd.read_parquet(Path(str(judged.inputs())) / "truth" / "areas.parquet").set_index(["glacier_id", "year"])
    areas = judged.read_table("areas", year=2023)
    true = truth["area_km2"].reindex([(g, 2023) for g in areas["glacier_id"]]).to_numpy()
    bias = areas["area_km2"].to_numpy().sum() - true.sum()
    assert (
        f"{len(areas)} glaciers, together {number(bias, 3, True)} km² ({number(100 * bias / true.sum(), 1, True)}%)"
        in part
    )
    inside = 100 * (len(areas) - 1) / len(areas)
    assert f"published {inside:.0f}%, conformal 0%" in part
    # Measured glaciers have a truth in both years, the small ones have none: that is said, not guessed.
    measured = judged.read_table("regional_changes", year=2023).query("grouping == 'region' and method == 'measured'")
    row, ids = measured.iloc[0], areas["glacier_id"]
    start = truth["area_km2"].reindex([(g, 2015) for g in ids]).sum()
    rate = 100 * (true.sum() - start) / start / row["years"]
    estimate = number(row["rate_pct_per_year"], 2, True)
    assert f"{estimate} ± {number(row['rate_std_pct_per_year'])}{number(rate, 2, True)}" in part  # cells side by side
    assert "Not compared: extrapolated 2023: 12 glaciers, but 9 with a truth" in part


def test_the_baseline_year_has_a_truth_without_rates_and_others_have_none(
    judged: Storage, store: Storage, region: Region
) -> None:
    known = truth_of_year(region, judged, 2015)
    assert known is not None and known["rates"] == [] and known["areas"].bias_pct == pytest.approx(2.0)
    real = region.model_copy(update={"simulation": None})
    assert truth_of_year(real, judged, 2023) is None and truth_of_year(region, store, 2023) is None
    assert "Against the known truth" not in render(collect(store, region, 2019))
    tables = truth_tables(region, judged)
    assert tables["areas"]["year"].tolist() == [2015, 2019, 2023] and truth_tables(real, judged) == {}
    assert tables["areas"]["bias_pct"].round(6).tolist()[:2] == [2.0, 2.0] < tables["areas"]["bias_pct"].tolist()
    assert set(tables["rates"]["method"]) == {"measured"}
    lines = markdown(tables["rates"]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 2019 | measured | 10 |" in lines[2] and lines[1].startswith("|---:|---|---:|")


def test_a_year_knows_nothing_of_later_years(store: Storage, region: Region) -> None:
    assert [s["year"] for s in collect(store, region, 2019)["series"]] == [2015, 2019]


def test_a_robust_trend_stands_beside_the_rate_of_two_years(store: Storage, region: Region) -> None:
    from dl4gam_assets.change import area_trends

    content = collect(store, region, 2023)
    trends = area_trends(store.read_table("areas"), region.change).set_index("glacier_id")["theil_sen_pct_per_year"]
    assert len(content["largest"]) == 9
    for row in content["largest"]:
        assert row["theil_sen_pct_per_year"] == pytest.approx(trends[row["glacier_id"]])
    regional = store.read_table("regional_changes").query("grouping == 'region' and method == 'extrapolated'")
    area = regional.set_index("year")["area_km2"].astype(float)
    slopes = [(area[b] - area[a]) / (b - a) for a, b in ((2015, 2019), (2019, 2023), (2015, 2023))]
    assert content["series_trend"]["km2"] == pytest.approx(np.median(slopes)) and content["series_trend"]["n"] == 3
    text = re.sub(r"\s+", " ", Page(render(content)).text)
    assert f"3 years since 2015: {number(np.median(slopes), 3, True)} km²" in text
    # Two years make no trend, and a year knows nothing of later ones.
    earlier = collect(store, region, 2019)
    assert earlier["series_trend"] is None
    assert all(np.isnan(row["theil_sen_pct_per_year"]) for row in earlier["largest"])


def test_a_change_within_its_interval_is_not_called_one(region: Region) -> None:
    from dl4gam_assets.publication.report import _headline

    row = {"rate_pct_per_year": -0.4, "rate_std_pct_per_year": 0.5}
    assert "contains zero" in _headline({"extrapolated": row}, False)["verdict"]
    assert _headline({"extrapolated": row | {"rate_pct_per_year": -2.0}}, False)["verdict"] == ""
    assert "less than two" in _headline({"extrapolated": row | {"rate_pct_per_year": -0.8}}, False)["verdict"]
    null = row | {"rate_pct_per_year": float("nan")}
    assert _headline({"extrapolated": null, "measured": row}, False)["method"] == "measured"


def test_numbers_for_readers() -> None:
    assert number(-1.904, 2, True) == "−1.90" and number(0.5, 1, True) == "+0.5"
    assert number(None) == number(float("nan")) == "–"
    assert number(-0.0001, 2, True) == "0.00" and number(12345.6, 1) == "12,345.6"
