"""The plate of a glacier and year: its candidate images side by side with their scores, the chosen one framed.

Belongs here: drawing what ``selected_scenes`` decided, so that a person can check it.
Does not belong here: scores and choice (``imagery``). The figures on a plate are those of the table ``scenes``; only
the pictures are read again, coarser than they were scored.

Plates are drawn when somebody asks for them, and then kept: ``plates/year=YYYY/GLACIER.jpg`` in the store.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from dl4gam_assets.compute import Done, Mapper
from dl4gam_assets.settings import fingerprint
from dl4gam_assets.stages.base import Site, UpstreamError, Workspace, cached_table, frame_fingerprint
from dl4gam_assets.storage import safe_name

if TYPE_CHECKING:
    import xarray as xr
    from odc.geo.geobox import GeoBox
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from upath import UPath

#: Raised by one when plates are drawn otherwise: those in the store are drawn again then.
PLATE_VERSION = 1

Colours = Literal["natural", "swir"]

#: Bands of a picture as red, green and blue; the first list whose bands are all there is taken.
_COMPOSITES: dict[str, list[tuple[str, str, str]]] = {
    "natural": [("red", "green", "blue")],
    "swir": [("swir16", "nir", "red"), ("swir16", "nir", "green")],
}
#: From long to short waves: what stands in for a composite whose bands are not there.
_LONG_TO_SHORT = ("swir22", "swir16", "nir", "nir_narrow", "red", "green", "blue")

_CHOSEN, _ACCEPTABLE, _NOT = (27, 138, 60), (150, 158, 166), (190, 80, 60)
_PAPER, _INK, _FAINT, _MISSING = (255, 255, 255), (25, 32, 40), (95, 104, 112), (70, 70, 70)
_OUTLINE, _NEIGHBOUR, _CLOUD, _SHADE, _OVERRULED = (
    (255, 214, 0),
    (235, 235, 235),
    (255, 0, 160),
    (110, 130, 255),
    (0, 225, 235),
)
#: Picture, words (date, verdict, figures, why not) and the colour of the frame.
_Panel = tuple["Image", tuple[str, str, list[str], str], tuple[int, int, int]]
_SIZE = 2  # drawn larger and reduced, for smooth lines


def plate(
    site: Site,
    year: int,
    glacier_id: str,
    *,
    limit: int = 12,
    panel_px: int = 300,
    colours: Colours = "natural",
    quality: int = 82,
) -> bytes:
    """Draw the candidates of a glacier and year.

    All pictures share one stretch, so that a brighter (snowier) date looks brighter. Hatched: what counts as cloud
    (magenta) or shadow (blue), and what a mask called cloud but snow took back (cyan). Grey: no pixels.

    Parameters
    ----------
    limit : most candidates shown, by date; the chosen and the best ranked first, then those with least cloud
    panel_px : side of a square picture; long ones have about its area
    colours : natural, or swir (1.6 um, near infrared, red: snow and ice are blue, water clouds are not)

    Returns
    -------
    JPEG

    Raises
    ------
    UpstreamError
        if the glacier is not in the inventory or its year has no candidates, with what to do.
    """
    glacier, rows = _decision(site, year, glacier_id)
    return _jpeg(_drawn(site, year, glacier, rows, limit, panel_px, colours)[0], quality)


def stored_plate(site: Site, year: int, glacier_id: str, *, limit: int = 12, colours: Colours = "natural") -> UPath:
    """The file of a plate in the store, drawn only if it is not there or what it shows has changed.

    ``plates/year=YYYY/GLACIER.jpg``, or ``GLACIER.swir.jpg``. The JPEG's comment says what it was drawn from. A plate
    on which a picture is lacking, because its scene could not be read now, is drawn again the next time.

    Parameters
    ----------
    limit, colours : as for :func:`plate`

    Raises
    ------
    UpstreamError
        as :func:`plate` does.
    """
    glacier, rows = _decision(site, year, glacier_id)
    path = site.storage.path("plates", f"year={year}", f"{safe_name(glacier_id)}{_SUFFIX[colours]}.jpg")
    key = _key(site, glacier, rows, limit, colours)
    if _comment(site, path) == key:
        return path
    sheet, whole = _drawn(site, year, glacier, rows, limit, 300, colours)
    with site.storage.writing(path) as temporary:
        temporary.write_bytes(_jpeg(sheet, 82, key if whole else ""))
    return path


def stored_plates(
    site: Site, mapper: Mapper, year: int, *, limit: int = 12, colours: Colours = "natural"
) -> Iterator[Done]:
    """The plates of all glaciers that have candidates in a year, each as soon as it is in the store.

    The value of each :class:`Done` is its path as text.

    Raises
    ------
    UpstreamError
        if the year has no candidates at all.
    """
    ids = site.storage.read_table("scenes", year=year)["glacier_id"].drop_duplicates().sort_values()
    if not len(ids):
        raise UpstreamError(
            f"selected_scenes [{year}] has no candidates: run "
            f"`dl4gam materialize --region {site.region.name} --year {year}`"
        )
    return mapper.map(_stored, [(g, (site, year, g, limit, colours)) for g in ids])


def _stored(site: Site, year: int, glacier_id: str, limit: int, colours: Colours) -> str:
    return str(stored_plate(site, year, glacier_id, limit=limit, colours=colours))


_SUFFIX: dict[str, str] = {"natural": "", "swir": ".swir"}


def _key(site: Site, glacier: pd.Series, rows: pd.DataFrame, limit: int, colours: Colours) -> str:
    """Identity of all that a plate shows."""
    inventory = site.storage.read_state("inventory_outlines") or {}
    return fingerprint(
        {
            "version": PLATE_VERSION,
            "glacier": [glacier["glacier_id"], glacier["geometry"].wkb_hex, str(glacier.get("name"))],
            "neighbours": inventory.get("output"),
            "candidates": frame_fingerprint(rows),
            "imagery": site.region.imagery.model_dump(mode="json", include={"sensor", "selection", "margin_m"}),
            "drawing": [limit, colours],
        }
    )


def _comment(site: Site, path: UPath) -> str | None:
    """The comment of a JPEG in the store; None where there is no such file, or it is damaged."""
    from PIL import Image

    if not path.exists():
        return None
    try:
        with site.storage.reading(path) as local, Image.open(local) as picture:
            found = picture.info.get("comment", b"")
    except OSError:  # Pillow's error for what is no picture is one too
        return None
    return found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)


def _drawn(
    site: Site,
    year: int,
    glacier: pd.Series,
    rows: pd.DataFrame,
    limit: int,
    panel_px: int,
    colours: Colours,
) -> tuple[Image, bool]:
    """The plate, and whether it has all pictures that there should be."""
    shown, left_out = _shown(rows, limit)
    grid = _coarse_grid(glacier, site, panel_px)
    images = _images(site, year, shown, grid, colours)
    bands = _bands(site, colours)
    top = _brightest(images, bands)
    wide, high = grid.shape[1], grid.shape[0]
    zoom = min(panel_px / (wide * high) ** 0.5, 1.4 * panel_px / max(wide, high))  # like areas for long glaciers too
    size = (max(round(wide * zoom), 1), max(round(high * zoom), 1))
    chosen = rows[rows["selected"].astype(bool)]
    best = chosen.iloc[0] if len(chosen) else None
    panels: list[_Panel] = []
    for (_, row), image in zip(shown.iterrows(), images, strict=True):
        picture = _picture(image, bands, top, size, site)
        _outlines(picture, site, glacier, grid, bar=not panels)
        panels.append((picture, _words(row, best, len(rows)), _colour(row)))
    sheet = _sheet(_title(site, year, glacier, rows, left_out, bands), panels, max(size[0], 250))
    whole = not any(
        isinstance(image, str) and pd.notna(coverage) for image, coverage in zip(images, shown["coverage"], strict=True)
    )
    return sheet, whole


def _jpeg(sheet: Image, quality: int, comment: str = "") -> bytes:
    out = io.BytesIO()
    sheet.save(out, format="jpeg", quality=quality, optimize=True, comment=comment)
    return out.getvalue()


def plates_of_year(ws: Workspace, year: int, n: int = 3) -> dict[str, bytes]:
    """A few plates of a year as previews: the largest glacier, the closest decision, a glacier without an image.

    Where all glaciers have an image, the third is the chosen image with most cloud. A plate that can not be drawn now
    (its scenes can not be read any more) is left out with a warning.

    Returns
    -------
    Title to JPEG of a few tens of kilobytes, at most ``n``.
    """
    scenes = ws.storage.read_table("scenes", year=year)
    if not len(scenes):
        return {}
    glaciers = ws.storage.read_table("glaciers").set_index("glacier_id")
    wanted: dict[str, str] = {}
    area = glaciers["inventory_area_km2"].reindex(scenes["glacier_id"].unique())
    wanted[str(area.idxmax())] = "largest glacier"
    second = scenes[scenes["rank"] == 2].set_index("glacier_id")["score"]
    first = scenes[(scenes["rank"] == 1) & scenes["selected"].astype(bool)].set_index("glacier_id")["score"]
    margin = (second - first).dropna().drop(index=list(wanted), errors="ignore").sort_values()
    if len(margin):
        wanted[str(margin.index[0])] = "closest decision"
    chosen = scenes[scenes["selected"].astype(bool)]
    without = area[~area.index.isin(chosen["glacier_id"])].drop(index=list(wanted), errors="ignore")
    if len(without):
        wanted[str(without.idxmax())] = "no acceptable image"
    else:
        cloud = chosen.set_index("glacier_id")["cloud_share"].drop(index=list(wanted), errors="ignore").dropna()
        if len(cloud):
            wanted[str(cloud.idxmax())] = "most cloud in a chosen image"
    out: dict[str, bytes] = {}
    for glacier_id, what in list(wanted.items())[:n]:
        try:
            out[f"{what}: {glacier_id}"] = plate(ws.site, year, glacier_id, limit=6, panel_px=210, quality=75)
        except (UpstreamError, OSError, RuntimeError) as error:
            ws.logger.warning(f"selected_scenes [{year}]: no plate of {glacier_id}: {error}")
    return out


# --------------------------------------------------------------------------------------------- what is shown
def _decision(site: Site, year: int, glacier_id: str) -> tuple[pd.Series, pd.DataFrame]:
    glaciers = cached_table(site, "glaciers")
    mine = glaciers[glaciers["glacier_id"] == glacier_id]
    if not len(mine):
        near = difflib.get_close_matches(glacier_id, glaciers["glacier_id"].tolist(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UpstreamError(f"glacier {glacier_id!r} is not in the inventory of region {site.region.name!r}{hint}")
    scenes = cached_table(site, "scenes", year=year)
    rows = scenes[scenes["glacier_id"] == glacier_id].sort_values("date")
    if len(rows):
        return mine.iloc[0], rows
    if site.storage.read_state("selected_scenes", str(year)) is None:
        raise UpstreamError(
            f"selected_scenes [{year}] is not there yet: run "
            f"`dl4gam materialize --region {site.region.name} --year {year}`"
        )
    if not bool(mine["modelled"].iloc[0]):
        raise UpstreamError(
            f"glacier {glacier_id!r} is not modelled (inventory.min_area_km2, inventory.model_within), "
            "so it has no candidates"
        )
    raise UpstreamError(
        f"no scene of {year} touches {glacier_id!r} in the search window; widen imagery.window or add scenes"
    )


def _shown(rows: pd.DataFrame, limit: int) -> tuple[pd.DataFrame, int]:
    order = rows.assign(
        _out=~rows["selected"].astype(bool),
        _rank=rows["rank"].astype("float64").fillna(np.inf),
        _cloud=rows["cloud_share"].astype("float64").fillna(np.inf),
    ).sort_values(["_out", "_rank", "_cloud", "date"])
    kept = order.index[: max(limit, 1)]
    return rows.loc[sorted(kept, key=lambda k: rows.loc[k, "date"])], len(rows) - len(kept)


def _coarse_grid(glacier: pd.Series, site: Site, panel_px: int) -> GeoBox:
    """The glacier with a margin, at a whole multiple of the pixel size."""
    from dl4gam_assets.inventory import glacier_grid

    imagery = site.region.imagery
    pixel = imagery.sensor.pixel_m
    tight = glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), pixel, 0.0)
    margin = min(imagery.margin_m, 0.15 * max(tight.shape) * pixel + 20 * pixel)
    whole = max(tight.shape) + 2 * margin / pixel
    factor = max(1, int(np.ceil(whole / panel_px)))
    return glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), pixel * factor, margin)


def _bands(site: Site, colours: Colours) -> tuple[str, str, str]:
    there = list(site.region.imagery.sensor.bands)
    for composite in _COMPOSITES[colours]:
        if set(composite) <= set(there):
            return composite
    ordered = sorted(there, key=lambda b: (_LONG_TO_SHORT.index(b) if b in _LONG_TO_SHORT else 99, b))
    red, green, blue = (ordered * 3)[:3] if len(ordered) < 3 else (ordered[0], ordered[len(ordered) // 2], ordered[-1])
    return red, green, blue


def _images(site: Site, year: int, rows: pd.DataFrame, grid: GeoBox, colours: Colours) -> list[xr.Dataset | str]:
    """The image of each row, or why there is none."""
    from dl4gam_assets.imagery import CatalogError, items_from_row, policy_of, read_images
    from dl4gam_assets.stages.imagery import catalog_of

    imagery = site.region.imagery
    wanted = list(dict.fromkeys(_bands(site, colours)))
    if imagery.selection.shadow_nir_max is not None:
        wanted += [b for b in ("blue", "nir") if b not in wanted]
    out: list[xr.Dataset | str] = ["" for _ in range(len(rows))]
    try:
        catalog = catalog_of(site, year)
    except (CatalogError, OSError) as error:
        return [str(error)] * len(rows)
    days, places = [], []
    for place, (_, row) in enumerate(rows.iterrows()):
        if pd.isna(row["coverage"]):  # it could not be read when it was scored; the reason is in the table
            out[place] = "not readable"
            continue
        try:
            days.append(items_from_row(row, catalog))
            places.append(place)
        except CatalogError as error:
            out[place] = f"not in the catalog any more: {error}"
    for index, image in read_images(days, imagery, grid, wanted, policy_of(site.region.compute)):
        out[places[index]] = f"not readable: {image}" if isinstance(image, Exception) else image
    return out


def _brightest(images: Sequence[xr.Dataset | str], bands: Sequence[str]) -> dict[str, float]:
    """Reflectance that becomes white, one a band: the 98th percentile of clean pixels of all candidates."""
    out = {}
    for band in dict.fromkeys(bands):
        parts = []
        for image in images:
            if not isinstance(image, str):
                clean = ~(image["missing"].to_numpy() | image["cloud"].to_numpy())
                parts.append(image["reflectance"].sel(band=band).to_numpy()[clean])
        values = np.concatenate(parts) if parts else np.zeros(0)
        out[band] = float(np.clip(np.percentile(values, 98), 0.15, 1.0)) if len(values) > 50 else 1.0
    visible = [out[b] for b in out if b in {"red", "green", "blue"}]
    return {b: (max(visible) if b in {"red", "green", "blue"} else v) for b, v in out.items()}  # true hues


# --------------------------------------------------------------------------------------------- drawing
def _font(size: int, bold: bool = False) -> Any:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _picture(
    image: xr.Dataset | str, bands: Sequence[str], top: dict[str, float], size: tuple[int, int], site: Site
) -> Image:
    """One candidate at the panel's size times _SIZE, with its masks hatched."""
    from PIL import Image, ImageDraw

    large = (size[0] * _SIZE, size[1] * _SIZE)
    if isinstance(image, str):
        panel = Image.new("RGB", large, _MISSING)
        ImageDraw.Draw(panel).text((12, 12), "no picture", fill=_PAPER, font=_font(13 * _SIZE))
        return panel
    stack = np.stack([image["reflectance"].sel(band=b).to_numpy() / top[b] for b in bands], axis=-1)
    missing = image["missing"].to_numpy()
    levels = np.clip(np.nan_to_num(stack), 0, 1) ** 0.58
    panel = Image.fromarray((levels * 255).astype(np.uint8)).resize(large, Image.Resampling.BICUBIC)
    canvas = np.asarray(panel).astype(np.float32)

    def at_size(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(large, Image.Resampling.NEAREST)).astype(bool)

    row, col = np.indices((large[1], large[0]))
    dark = _shade(image, site)
    marks = (
        (image["cloud"].to_numpy() & ~missing, _CLOUD, (row + col) % (7 * _SIZE) < _SIZE),
        (dark & ~missing, _SHADE, (row - col) % (7 * _SIZE) < _SIZE),
        (image["overruled"].to_numpy() & ~missing, _OVERRULED, (row - col) % (7 * _SIZE) < _SIZE),
    )
    for mask, colour, hatch in marks:
        where, tint = at_size(mask), np.asarray(colour, dtype=np.float32)
        canvas[where] = 0.88 * canvas[where] + 0.12 * tint
        canvas[where & hatch] = 0.25 * canvas[where & hatch] + 0.75 * tint
    canvas[at_size(missing)] = _MISSING
    return Image.fromarray(canvas.astype(np.uint8))


def _shade(image: xr.Dataset, site: Site) -> np.ndarray:
    from dl4gam_assets.imagery.scores import shadow

    selection = site.region.imagery.selection
    if selection.shadow_nir_max is None:
        return np.zeros(image["missing"].shape, dtype=bool)
    values = {b: image["reflectance"].sel(band=b).to_numpy() for b in ("blue", "nir")}
    return shadow(values["blue"], values["nir"], selection) & ~image["cloud"].to_numpy()


def _outlines(panel: Image, site: Site, glacier: pd.Series, grid: GeoBox, bar: bool) -> None:
    """This glacier in yellow, its neighbours thin and light, and a scale bar."""
    import geopandas as gpd
    import shapely
    from PIL import ImageDraw

    draw = ImageDraw.Draw(panel)
    glaciers = cached_table(site, "glaciers")
    box = grid.footprint("EPSG:4326").geom
    near = glaciers.iloc[glaciers.sindex.query(box, predicate="intersects")]
    others = near[near["glacier_id"] != glacier["glacier_id"]].geometry
    step_x, step_y = panel.width / grid.shape[1], panel.height / grid.shape[0]
    inverse = ~grid.affine
    for shapes, colour, width in (
        (others, _NEIGHBOUR, _SIZE),
        (gpd.GeoSeries([glacier["geometry"]], crs="EPSG:4326"), _OUTLINE, 2 * _SIZE),
    ):
        for shape in shapes.to_crs(str(grid.crs)):
            for part in shapely.get_parts(shape):
                for ring in (part.exterior, *part.interiors):
                    points = [inverse * (x, y) for x, y in shapely.get_coordinates(ring)]
                    draw.line([(c * step_x, r * step_y) for c, r in points], fill=colour, width=width, joint="curve")
    if bar:
        metres = grid.shape[1] * abs(grid.affine.a)
        length = float(10 ** np.floor(np.log10(metres / 2.2)))
        length *= next((m for m in (5, 2) if m * length <= metres / 2.2), 1)
        x, y = 10 * _SIZE, panel.height - 12 * _SIZE
        draw.line([(x - 2, y), (x + length / metres * panel.width + 2, y)], fill=_INK, width=3 * _SIZE + 4)
        draw.line([(x, y), (x + length / metres * panel.width, y)], fill=_PAPER, width=3 * _SIZE)
        text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
        draw.text((x, y - 17 * _SIZE), text, fill=_PAPER, font=_font(12 * _SIZE), stroke_width=_SIZE, stroke_fill=_INK)


def _colour(row: pd.Series) -> tuple[int, int, int]:
    if bool(row["selected"]):
        return _CHOSEN
    return _NOT if pd.isna(row["rank"]) else _ACCEPTABLE


def _figure(value: Any, form: str) -> str:
    return "unknown" if pd.isna(value) else form.format(float(value))


def _words(row: pd.Series, best: pd.Series | None, of: int) -> tuple[str, str, list[str], str]:
    """Date, verdict, figures, and why not, of one candidate."""
    rank = "not acceptable" if pd.isna(row["rank"]) else f"rank {int(row['rank'])}"
    verdict = f"chosen, {rank}" if bool(row["selected"]) else rank
    albedo = "brightness" if str(row["snow_score"]) == "brightness" else "albedo"
    figures = [
        f"covered {_figure(row['coverage'], '{:.0%}')}   cloud or missing {_figure(row['cloud_share'], '{:.1%}')}",
        f"NDSI {_figure(row['ndsi'], '{:.2f}')}   {albedo} {_figure(row['albedo'], '{:.2f}')}",
    ]
    extra = [
        f"{name} {row[column]:.1%}"
        for name, column in (
            ("shadow", "shadow_share"),
            ("snow, not cloud", "snow_overruled_share"),
            ("saturated", "saturated_share"),
        )
        if column in row and pd.notna(row[column]) and row[column] >= 0.001
    ]
    if extra:
        figures.append("   ".join(extra))
    return f"{row['date']:%Y-%m-%d}", verdict, figures, _why(row, best, albedo)


def _why(row: pd.Series, best: pd.Series | None, albedo: str) -> str:
    reason = str(row["reason"])
    if bool(row["selected"]):
        return "chosen by an override" if "override" in reason else ""
    if pd.isna(row["rank"]) or best is None or reason.startswith("override") or pd.isna(best["rank"]):
        return reason
    if int(row["rank"]) < int(best["rank"]):
        return f"better ranked, but an override chose {best['date']:%Y-%m-%d}"
    parts = [f"cloud {100 * (row['cloud_share'] - best['cloud_share']):+.1f} points"]
    for name, column in (("NDSI", "ndsi"), (albedo, "albedo")):
        if pd.notna(row[column]) and pd.notna(best[column]):
            parts.append(f"{name} {row[column] - best[column]:+.2f}")
    return "against the chosen: " + ", ".join(parts)


def _title(
    site: Site, year: int, glacier: pd.Series, rows: pd.DataFrame, left_out: int, bands: Sequence[str]
) -> tuple[str, list[str]]:
    imagery = site.region.imagery
    name = glacier.get("name")
    known = f"{name} ({glacier['glacier_id']})" if isinstance(name, str) and name else str(glacier["glacier_id"])
    ranking = {"rank_positions": "rank positions", "min_max": "min-max"}[imagery.selection.ranking]
    acceptable = int(rows["rank"].notna().sum())
    lines = [
        f"{glacier['inventory_area_km2']:.2f} km², {site.region.name}, {imagery.sensor.name}   |   "
        f"{len(rows)} candidates, {acceptable} acceptable"
        + (f", {left_out} not shown" if left_out else "")
        + ("" if rows["selected"].astype(bool).any() else "   |   NO IMAGE CHOSEN"),
        f"covered at least {imagery.selection.coverage_min:.0%}, cloud at most {imagery.selection.cloud_max:.0%}; "
        f"ranking: {ranking}   |   red, green, blue: {', '.join(bands)}",
    ]
    return f"{known}, {year}", lines


def _sheet(
    title: tuple[str, list[str]],
    panels: Sequence[_Panel],
    width: int,
) -> Image:
    from PIL import Image, ImageDraw

    gap, frame, line = 14, 5, 17
    picture_h = max(p.height // _SIZE for p, _, _ in panels)
    columns = _columns(len(panels), width, picture_h)
    lines_of = [[*w[2], *_wrapped(w[3], width, 12)] for _, w, _ in panels]
    text_h = 24 + line * max(len(t) for t in lines_of) + 6
    rows = -(-len(panels) // columns)
    total_w = max(columns * (width + 2 * frame + gap) + gap, 620)
    head = 34 + 18 * len(title[1]) + 24
    sheet = Image.new("RGB", (total_w, head + rows * (picture_h + text_h + 2 * frame + gap) + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 8), title[0], fill=_INK, font=_font(19, bold=True))
    for k, text in enumerate(title[1]):
        draw.text((gap, 36 + 18 * k), text, fill=_FAINT, font=_font(12))
    _legend(draw, gap, 38 + 18 * len(title[1]))
    for k, (panel, words, colour) in enumerate(panels):
        x = gap + (k % columns) * (width + 2 * frame + gap)
        y = head + (k // columns) * (picture_h + text_h + 2 * frame + gap)
        thick = frame if colour == _CHOSEN else 1
        draw.rectangle(
            (x, y, x + width + 2 * frame - 1, y + picture_h + text_h + 2 * frame - 1), outline=colour, width=thick
        )
        small = panel.resize((panel.width // _SIZE, panel.height // _SIZE), Image.Resampling.LANCZOS)
        sheet.paste(small, (x + frame + (width - small.width) // 2, y + frame))
        left, below = x + frame + 4, y + frame + picture_h + 4
        date, verdict, _, _ = words
        draw.text((left, below), date, fill=_INK, font=_font(14, bold=True))
        right = x + frame + width - 4
        draw.text((right, below + 1), verdict, fill=colour if colour != _ACCEPTABLE else _FAINT,
                  font=_font(13, bold=True), anchor="ra")  # fmt: skip
        figures = len(words[2])
        for j, text in enumerate(lines_of[k]):
            draw.text((left, below + 22 + line * j), text, fill=_INK if j < figures else _FAINT, font=_font(12))
    return sheet


def _columns(n: int, width: int, height: int) -> int:
    """Columns, at most six, that make a sheet (title included) near 8:5, as screens are."""
    return min(
        range(1, min(n, 6) + 1), key=lambda c: abs(np.log(c * (width + 24) / (-(-n // c) * (height + 130) + 94) / 1.6))
    )


def _wrapped(text: str, width: int, size: int) -> list[str]:
    font, out = _font(size), [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if font.getlength(longer) <= width - 8 or not out[-1]:
            out[-1] = longer
        else:
            out.append(word)
    return ([*out[:3], out[3] + " ..."] if len(out) > 4 else out) if out != [""] else []


def _legend(draw: ImageDraw, x: float, y: float) -> None:
    font = _font(12)
    for colour, text, hatched in (
        (_OUTLINE, "outline", False),
        (_CLOUD, "cloud", True),
        (_SHADE, "shadow", True),
        (_OVERRULED, "mask says cloud, spectrum says snow or ice", True),
        (_MISSING, "no pixels", False),
    ):
        draw.rectangle((x, y + 2, x + 20, y + 13), fill=None if hatched else colour, outline=colour)
        if hatched:
            for k in range(2, 20, 5):
                draw.line((x + k, y + 13, min(x + k + 6, x + 20), y + 3), fill=colour, width=2)
        draw.text((x + 25, y), text, fill=_FAINT, font=font)
        x += 25 + font.getlength(text) + 16
