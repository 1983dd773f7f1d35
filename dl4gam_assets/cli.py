"""The command ``dl4gam``: demo, materialize, query, explain, reproduce, diff, export, validate, plate, status, ui, ...

Belongs here: words, options and output of the command line.
Does not belong here: work. Each command calls one function of another module; Dagster is imported only by the commands
that need it, so that ``dl4gam query`` answers at once.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.tree import Tree

from dl4gam_assets import __version__
from dl4gam_assets.settings import Region, SettingsError, load_region, packaged_regions
from dl4gam_assets.storage import Storage, StoreFormatError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Glacier area change, glacier by glacier, with an honest uncertainty.

A **region** is one YAML file (packaged, or your own). Its results live below `DL4GAM_HOME` (default: `./dl4gam_home`).

Start with `dl4gam demo`, then `dl4gam ui` for the graph, `dl4gam query "select * from regional_changes"` for numbers,
and `dl4gam explain GLACIER --year 2023` for where a number comes from.""",
)
console = Console()
errors = Console(stderr=True)


class Output(enum.StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


RegionOption = Annotated[
    str,
    typer.Option("--region", "-r", envvar="DL4GAM_REGION", help="Packaged region or path of a YAML file."),
]
HomeOption = Annotated[
    str | None,
    typer.Option("--home", envvar="DL4GAM_HOME", help="Root of all results: a folder or object-store URL."),
]


def _stop(message: str) -> typer.Exit:
    errors.print(f"[bold red]error:[/] {message}", highlight=False, markup=True, soft_wrap=True)
    return typer.Exit(1)


def _open(region: str, home: str | None) -> tuple[Region, Storage]:
    from upath import UPath

    try:
        settings = load_region(region)
    except SettingsError as error:
        raise _stop(_escape(str(error))) from error
    root = home or str(Path("dl4gam_home").absolute())
    storage = Storage(UPath(root) / settings.name)
    try:
        storage.check_format()
    except StoreFormatError as error:
        raise _stop(_escape(str(error))) from error
    return settings, storage


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="Region file to write, such as my_region.yaml.")],
    inventory: Annotated[Path, typer.Option(help="Glacier outlines: any vector file that GDAL reads, or GeoParquet.")],
    layer: Annotated[str | None, typer.Option(help="Layer of the file.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the glacier ids; guessed by default.")] = None,
    preset: Annotated[
        str, typer.Option(help="Imagery: a preset of docs/catalogs.md.")
    ] = "earth-search-sentinel-2-c1-l2a",
    first: Annotated[int, typer.Option(help="First year.")] = 2016,
    last: Annotated[int | None, typer.Option(help="Last year; the present one by default.")] = None,
    baseline: Annotated[
        int | None, typer.Option(help="Baseline year: that of the inventory; the first by default.")
    ] = None,
) -> None:
    """Write a region file for your inventory, after reading the inventory as the platform will.

    It says how many glaciers it understood and which outlines it must leave out, before any image is read.
    """
    from dl4gam_assets.inventory.vector import vector_info
    from dl4gam_assets.settings import InventoryColumns, InventorySettings
    from dl4gam_assets.starter import guess_columns, starter_region, summarize_inventory

    if file.exists():
        raise _stop(f"{file} exists already")
    if not inventory.is_file():
        raise _stop(f"there is no inventory {inventory}")
    try:
        if inventory.suffix in {".parquet", ".geoparquet"}:
            import pyarrow.parquet

            names = pyarrow.parquet.read_schema(inventory).names
        else:
            names = list(vector_info(inventory, layer=layer)["fields"])
    except Exception as error:
        raise _stop(_escape(f"{inventory} can not be read as vector data: {error}")) from error
    columns = guess_columns(names)
    columns["glacier_id"] = id_column or columns["glacier_id"]
    if columns["glacier_id"] is None:
        raise _stop(f"no column looks like a glacier id; name it with --id-column ({', '.join(names)})")
    try:
        known = InventoryColumns.model_validate(columns)
        found = summarize_inventory(inventory, InventorySettings(path=str(inventory), layer=layer, columns=known))
        text = starter_region(
            file.stem,
            inventory,
            columns,
            layer=layer,
            preset=preset,
            first=first,
            last=last,
            baseline=baseline or first,
        )
    except SettingsError as error:
        raise _stop(_escape(str(error))) from error
    with Storage(file.absolute().parent).writing(file.absolute()) as temporary:  # type: ignore[arg-type]
        Path(str(temporary)).write_text(text, encoding="utf-8")
    dates = (
        f"{found.with_date} with a date ({found.first_date} to {found.last_date})" if found.with_date else "no dates"
    )
    console.print(
        f"{found.glaciers} glaciers, {found.area_km2:.1f} km2, {dates}, {found.utm_zones} UTM zones; "
        f"{found.modelled} of at least 0.1 km2 ({found.modelled_km2:.1f} km2) will be mapped.", highlight=False,
    )  # fmt: skip
    for row in found.rejected.head(5).itertuples():
        console.print(f"  left out: {row.glacier_id}: {row.error}", highlight=False, markup=False)
    if len(found.rejected) > 5:
        console.print(f"  ... and {len(found.rejected) - 5} more (table failures)")
    console.print(f"columns: {', '.join(f'{k} = {v}' for k, v in columns.items() if v)}", highlight=False, markup=False)
    console.print(
        f"Wrote {file}. Next: dl4gam materialize --region {file} --only inventory_outlines --only debris_outlines "
        "--only glacier_zones --only cross_validation_folds", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def regions() -> None:
    """List the packaged regions."""
    table = RichTable("region", "title", "years", "folds x members", "imagery")
    for name in packaged_regions():
        region = load_region(name)
        years = f"{region.years.first} to {region.years.last or 'now'}"
        table.add_row(
            name,
            region.title,
            years,
            f"{region.folds.n} x {region.training.members}",
            region.imagery.sensor.name,
        )
    console.print(table)
    console.print("Your own region: copy one of them, edit it, and pass its path with --region.", highlight=False)


@app.command()
def materialize(
    region: RegionOption = "demo",
    home: HomeOption = None,
    year: Annotated[
        list[int] | None, typer.Option(help="Year to bring up to date; repeat for several. All by default.")
    ] = None,
    fold: Annotated[list[int] | None, typer.Option(help="Fold (1..n); repeat for several. All by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these assets; repeat for several.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Make them even where nothing changed: catalogs are asked and scenes read anew. Best with --only and "
            "--year; the baseline year is not taken along.",
        ),
    ] = False,
    despite_checks: Annotated[
        bool, typer.Option("--despite-checks", help="Make also what failed blocking checks hold back.")
    ] = False,
) -> None:
    """Bring a region's results up to date. What has not changed is left alone; what was interrupted goes on.

    What would be made from a partition that a blocking check failed is left out, and told each time, until it passes.
    """
    settings, storage = _open(region, home)
    _check_choice("year", year, settings.years.all())
    _check_choice("fold", fold, range(1, settings.folds.n + 1))
    outcome = _run(region, settings, storage, home, year, fold, only, force, despite_checks)
    _print_timings(outcome)
    if outcome.failed:
        raise _failed(outcome)


def _check_choice(what: str, given: list[int] | None, valid: Any) -> None:
    wrong = sorted(set(given or []) - set(valid))
    if wrong:
        raise _stop(f"--{what} {wrong[0]} is not one of {min(valid)} to {max(valid)}")


def _run(
    name: str,
    settings: Region,
    storage: Storage,
    home: str | None,
    years: Any = None,
    folds: Any = None,
    only: Any = None,
    force: bool = False,
    despite_checks: bool = False,
) -> Any:
    os.environ["DL4GAM_REGION"] = name
    if home:
        os.environ["DL4GAM_HOME"] = home
    from sqlalchemy.exc import SQLAlchemyError

    from dl4gam_assets.compute import close_clusters
    from dl4gam_assets.definitions import build_defs
    from dl4gam_assets.orchestrate import materialize as run

    try:
        return run(
            build_defs(settings), settings, storage, years=years, folds=folds, only=only, force=force,
            despite_checks=despite_checks, say=lambda text: console.print(text, highlight=False),
        )  # fmt: skip
    except (OSError, SQLAlchemyError) as error:
        raise _stop(
            f"{_escape(_cause(error))}: can {storage.root} and its Dagster instance be written, and is there room on "
            "the disk? What was made is kept; the same command goes on from there"
        ) from error
    finally:
        close_clusters()


def _cause(error: BaseException) -> str:
    """The first line of an error, without SQL."""
    return f"{type(error).__name__}: {' '.join(str(getattr(error, 'orig', None) or error).split())[:300]}"


def _failed(outcome: Any) -> typer.Exit:
    # What only waited for something that failed before it is counted, not listed.
    causes = [text for text in outcome.failed if "materialize it first" not in text]
    waiting = len(outcome.failed) - len(causes)
    lines = "\n".join(f"  {_escape(text)}" for text in causes or outcome.failed)
    after = f"\n  {waiting} further steps wait for these" if causes and waiting else ""
    return _stop(f"{len(causes)} steps or checks failed; everything else was made and is kept:\n{lines}{after}")


def _print_timings(outcome: Any) -> None:
    table = RichTable("assets", "partitions", "seconds", "of it Dagster")
    for t in outcome.timings:
        table.add_row(", ".join(t.assets), str(t.partitions), f"{t.seconds:.1f}", f"{t.overhead_s:.1f}")
    table.add_row(
        "total",
        str(sum(t.partitions for t in outcome.timings)),
        f"{outcome.seconds:.1f}",
        f"{outcome.overhead_s:.1f}",
    )
    console.print(table)


@app.command()
def demo(home: HomeOption = None) -> None:
    """Materialize the whole graph on the simulated demo region and judge it against the known truth."""
    settings, storage = _open("demo", home)
    start = time.perf_counter()
    outcome = _run("demo", settings, storage, home)
    _print_timings(outcome)
    if outcome.failed:
        raise _failed(outcome)
    _judge(settings, storage)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. Results: {storage.root}\n", highlight=False)
    console.print(
        "What next:\n"  # noqa: S608
        "  make ui                                            the asset graph in your browser\n"
        '  dl4gam query "select * from largest_losses"        SQL on the results\n'
        f"  dl4gam explain {_example(storage)} --year {settings.years.last}          where a number comes from\n"
        f"  {storage.root}/reports/{settings.years.last}.html  the year's report\n"
        "  (the commands need this environment: source .venv/bin/activate)",
        highlight=False,
        soft_wrap=True,
    )


def _example(storage: Storage) -> str:
    areas = storage.read_table("baseline_areas")
    return str(areas.nlargest(1, "area_km2")["glacier_id"].iloc[0]) if len(areas) else "GLACIER"


def _judge(settings: Region, storage: Storage) -> None:
    """Estimates beside the truth, which nothing but this comparison reads."""
    from dl4gam_assets.change import compare_with_truth
    from dl4gam_assets.publication.truth import known_truth

    truth = known_truth(settings, storage)
    assert truth is not None, "the demo is simulated"
    found = compare_with_truth(
        storage.read_table("areas"), storage.read_table("regional_changes"), truth, settings.years.baseline
    )
    table = RichTable("the demo against its known truth", "estimate", "truth")
    for row in found.lines():
        table.add_row(*row)
    console.print(table)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="SQL on results.duckdb, for example: select * from regional_changes")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="Form of the answer.")] = Output.table,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Write here (needed for parquet).")] = None,
) -> None:
    """Ask the results with SQL (read-only). `show tables` lists the tables, `describe areas` a table's columns."""
    import duckdb

    from dl4gam_assets.publication import query_database

    _, storage = _open(region, home)
    path = storage.path("results.duckdb")
    if not path.exists():
        raise _stop(f"there is no {path}: run `dl4gam materialize --region {region}` first")
    try:
        with storage.reading(path) as local:
            frame = query_database(local, sql)
    except Exception as error:
        hint = '\n`dl4gam query "show tables"` lists the tables' if isinstance(error, duckdb.CatalogException) else ""
        raise _stop(_escape(str(error)) + hint) from error
    if output is Output.parquet:
        if file is None:
            raise _stop("--output parquet needs --file")
        with _writing(file) as temporary:
            frame.to_parquet(temporary, index=False)
    elif output is Output.csv:
        _emit(frame.to_csv(index=False), file)
    elif output is Output.json:
        _emit(frame.to_json(orient="records", date_format="iso", indent=1) + "\n", file)
    elif file is not None:
        _emit(frame.to_string(index=False) + "\n", file)
    else:
        table = RichTable(*[str(c) for c in frame.columns])
        for row in frame.head(200).itertuples(index=False):
            table.add_row(*[_cell(v) for v in row])
        wide = Console(width=max(console.width, 40 + 16 * len(frame.columns))) if not sys.stdout.isatty() else console
        wide.print(table)
        if len(frame) > 200:
            console.print(f"200 of {len(frame)} rows; use --output csv for all", highlight=False)


def _cell(value: Any) -> str:
    import pandas as pd

    if value is None or (not isinstance(value, list | dict) and pd.isna(value)):
        return ""
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d" if value == value.normalize() else "%Y-%m-%d %H:%M")
    return _escape(f"{value:.5g}" if isinstance(value, float) else str(value))


def _emit(text: str, file: Path | None) -> None:
    if file is None:
        sys.stdout.write(text)
    else:
        with _writing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[Path]:
    """Where to write a file that a user named: beside its place, which it takes when it is whole. Pipes as they are."""
    if file.exists() and not file.is_file():
        yield file
        return
    place = file.resolve()
    with Storage(place.parent).writing(place) as temporary:
        yield temporary


@app.command()
def explain(
    glacier: Annotated[str, typer.Argument(help="Glacier id as in the inventory.")],
    year: Annotated[int, typer.Option(help="Year of the estimate.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page here that works without network.")] = None,
) -> None:
    """Tell where an estimate comes from: image, cube, models, calibration, settings, code, runs."""
    from dl4gam_assets.lineage import LineageError
    from dl4gam_assets.lineage import explain as trace

    settings, storage = _open(region, home)
    try:
        story = trace(storage, settings, glacier, year)
    except LineageError as error:
        raise _stop(_escape(str(error))) from error
    if html is not None:
        from dl4gam_assets.lineage import explanation_page

        with Storage(html.absolute().parent).writing(html.absolute()) as temporary:
            temporary.write_text(explanation_page(story, settings.title or settings.name), encoding="utf-8")
        if not as_json:
            console.print(f"{html}", highlight=False, soft_wrap=True)
            return
    if as_json:
        sys.stdout.write(story.model_dump_json(indent=1) + "\n")
        return
    lines = story.lines()
    tree = Tree(_escape(lines[0][1]), highlight=False)
    branches = {0: tree}
    for depth, text in lines[1:]:
        branches[depth] = branches[depth - 1].add(_escape(text))
    console.print(tree, soft_wrap=False)


@app.command()
def reproduce(
    glacier: Annotated[str, typer.Argument(help="Glacier id as in the inventory.")],
    year: Annotated[int, typer.Option(help="Year of the estimate.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the new store here (an empty folder).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Make one estimate again from its recorded inputs, in an empty store, and say whether it is the same.

    Scenes, elevation and dh/dt are read again; weights, calibration and tau are those that were recorded. Exit status 1
    where the result is different.
    """
    from dl4gam_assets.compute import Mapper
    from dl4gam_assets.lineage import LineageError
    from dl4gam_assets.stages.base import UpstreamError, Workspace
    from dl4gam_assets.stages.reproduce import reproduce as again

    settings, storage = _open(region, home)
    try:
        found = again(Workspace(settings, storage, Mapper(1)), glacier, year, keep)
    except (LineageError, UpstreamError, FileExistsError, OSError) as error:
        raise _stop(_escape(str(error))) from error
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=1) + "\n")
    else:
        table = RichTable("step", "recorded", "made again", "")
        for step in found.steps:
            word = "same" if step.same else "within the tolerance" if step.within else "different"
            table.add_row(step.step, _escape(step.recorded), _escape(step.again), word)
        console.print(table)
        for note in found.notes:
            console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"{glacier} {year}: {found.verdict} ({found.seconds:.0f} s)", highlight=False)
        if found.store:
            console.print(f"the new store: {found.store}", highlight=False, soft_wrap=True)
    if found.verdict == "different":
        raise typer.Exit(1)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="New folder for the files.")],
    year: Annotated[int, typer.Option(help="Year to export.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    weights: Annotated[bool, typer.Option(help="With the weights of the ensembles.")] = True,
    cubes: Annotated[bool, typer.Option(help="With the glacier cubes (large).")] = False,
) -> None:
    """Make a folder of a year's results that is ready to be handed on: open formats, citation, licence, checksums."""
    from dl4gam_assets.publication.export import ExportError, export_year

    settings, storage = _open(region, home)
    _check_choice("year", [year], settings.years.all())
    try:
        files = export_year(storage, settings, year, folder.absolute(), weights=weights, cubes=cubes)
    except (ExportError, OSError) as error:
        raise _stop(_escape(str(error))) from error
    console.print(f"{len(files)} files, {files['bytes'].sum() / 1e6:.1f} MB: {folder}", highlight=False, soft_wrap=True)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Results: a store, FILE.duckdb, or either with @YEAR.")],
    b: Annotated[str, typer.Argument(help="Other results, in the same form.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Write the estimates that differ here, as CSV.")
    ] = None,
) -> None:
    """Say why two runs disagree: image, model, calibration, settings or code, and how much goes with each.

    A store is the folder of a region below DL4GAM_HOME. `dl4gam diff home/alps@2022 home/alps@2023` compares two years.
    """
    import pandas as pd

    from dl4gam_assets.lineage import LineageError, compare, open_results

    try:
        found = compare(open_results(a), open_results(b))
    except (LineageError, OSError) as error:
        raise _stop(_escape(str(error))) from error
    if file is not None:
        frame = pd.DataFrame(found.estimates)
        if len(frame):
            frame["reasons"] = frame["reasons"].map("; ".join)
        _emit(frame.to_csv(index=False), file)
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=1) + "\n")
    else:
        _print_difference(found)


def _print_difference(found: Any) -> None:
    from dl4gam_assets.lineage.difference import REASONS

    if found.same:
        console.print("all estimates and rates are the same", highlight=False)
    totals = RichTable("year", "estimates A", "B", "that differ", "area A (km2)", "B", "B - A")
    for t in found.totals:
        totals.add_row(
            str(t.year), str(t.estimates_a), str(t.estimates_b), str(t.estimates_that_differ), f"{t.area_a_km2:.4f}",
            f"{t.area_b_km2:.4f}", f"{t.difference_km2:+.4f}",
        )  # fmt: skip
    console.print(totals)
    if found.shares:
        shares = RichTable("year", "because of", "estimates", "B - A (km2)", "of the difference")
        for s in found.shares[:30]:
            share = "" if s.share is None else f"{100 * s.share:.0f}%"
            shares.add_row(str(s.year), ", ".join(s.reasons), str(s.estimates), f"{s.difference_km2:+.5f}", share)
        console.print(shares)
    if found.rate_shares:
        moved = RichTable("year", "rates differ because of", "glaciers", "sum of rates, B - A (km2/yr)")
        for s in found.rate_shares[:30]:
            moved.add_row(str(s.year), ", ".join(s.reasons), str(s.glaciers), f"{s.difference_km2_per_year:+.6f}")
        console.print(moved)
    if found.shares or found.rate_shares:
        named = {r.removeprefix("baseline: ") for s in (*found.shares, *found.rate_shares) for r in s.reasons}
        for reason in (r for r in REASONS if r in named):
            console.print(f"  {reason}: {REASONS[reason]}", highlight=False, soft_wrap=True)
    rates = [r for r in found.rates if r.rate_a_pct_per_year != r.rate_b_pct_per_year]
    if rates:
        shown = RichTable("year", "method", "rate A (%/yr)", "rate B (%/yr)")
        for r in rates:
            cells = ["" if v is None else f"{v:+.3f}" for v in (r.rate_a_pct_per_year, r.rate_b_pct_per_year)]
            shown.add_row(str(r.year), r.method, *cells)
        console.print(shown)
    for title, rows in (("setting", found.settings), ("package", found.software), ("code", found.code)):
        if rows:
            table = RichTable(title, "A", "B", "estimates")
            for row in rows:
                table.add_row(row.key, _escape(str(row.a)), _escape(str(row.b)), str(row.estimates))
            console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


class Colours(enum.StrEnum):
    natural = "natural"
    swir = "swir"


@app.command()
def plate(
    year: Annotated[
        int, typer.Option(help="Year of the images; the baseline year shows those of the inventory's date.")
    ],
    glacier: Annotated[str | None, typer.Argument(help="Glacier id as in the inventory.")] = None,
    all_glaciers: Annotated[bool, typer.Option("--all", help="Every glacier that has candidates.")] = False,
    region: RegionOption = "demo",
    home: HomeOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JPEG to write. Default: plates/year=YEAR/GLACIER.jpg in the store."),
    ] = None,
    colours: Annotated[
        Colours, typer.Option(help="natural, or swir: snow and ice are blue there, water clouds are not.")
    ] = Colours.natural,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many candidates, the best ones.")] = 12,
) -> None:
    """Draw a glacier's candidate images of a year side by side, with scores, and the chosen one framed.

    Each picture has the outline (yellow), what counts as cloud or shadow (hatched), the figures that the choice rests
    on, and why the image was not taken. To take another one, add a line to the override file
    (`imagery.selection.overrides`). Without --output a plate is kept in the store until what it shows changes. To draw
    it the scenes are read again, so their files or server must be there.
    """
    from dl4gam_assets.imagery import CatalogError
    from dl4gam_assets.stages.base import Site, UpstreamError
    from dl4gam_assets.stages.plates import plate as draw
    from dl4gam_assets.stages.plates import stored_plate

    if (glacier is None) != all_glaciers:
        raise _stop("name one glacier, or give --all")
    if all_glaciers and output is not None:
        raise _stop("--output is one file; --all writes to plates/ in the store")
    settings, storage = _open(region, home)
    _check_choice("year", [year], settings.years.all())
    site = Site(settings, str(storage.root))
    try:
        if glacier is None:
            _all_plates(site, year, limit, colours)
            return
        if output is None:
            target: Any = stored_plate(site, year, glacier, limit=limit, colours=colours.value)
        else:  # the store may be somebody else's, and not writable
            target, picture = output, draw(site, year, glacier, limit=limit, colours=colours.value)
            with _writing(output) as temporary:
                temporary.write_bytes(picture)
    except (UpstreamError, CatalogError) as error:
        raise _stop(_escape(str(error))) from error
    console.print(f"{target}", highlight=False, soft_wrap=True)


def _all_plates(site: Any, year: int, limit: int, colours: Colours) -> None:
    """Plates of all glaciers of a year, with progress; one that can not be drawn stops no other."""
    from rich.progress import track

    from dl4gam_assets.compute import Mapper
    from dl4gam_assets.stages.plates import stored_plates

    mapper = Mapper(site.region.compute.workers)
    found = stored_plates(site, mapper, year, limit=limit, colours=colours.value)
    total = site.storage.read_table("scenes", year=year)["glacier_id"].nunique()
    failed = 0
    for done in track(found, "plates", total=total, console=errors):
        if not done.ok:
            failed += 1
            errors.print(f"{done.key}: {done.error}", highlight=False, markup=False, soft_wrap=True)
    folder = site.storage.path("plates", f"year={year}")
    console.print(f"{total - failed} plates in {folder}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def status(
    region: RegionOption = "demo",
    home: HomeOption = None,
    stale: Annotated[bool, typer.Option(help="Also ask every partition whether its inputs are the same.")] = True,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Write the estimates that are stale here, as CSV.")
    ] = None,
) -> None:
    """Say what is there: partitions of each asset, estimates by year, failures, and what no longer matches its inputs.

    What is stale is made again by `dl4gam materialize`, and nothing else is.
    """
    settings, storage = _open(region, home)
    folder = storage.path("state")
    if not folder.exists():
        raise _stop(f"nothing is materialized in {storage.root}: run `dl4gam materialize --region {region}`")
    table = RichTable("asset", "partitions", "last made (UTC)", "by code")
    for asset in sorted(folder.iterdir(), key=str):
        states = [s for s in (storage.read_json(f) for f in asset.glob("*.json")) if s]
        if states:
            last = max(states, key=lambda s: s["time"])
            table.add_row(asset.name, str(len(states)), last["time"][:16].replace("T", " "), last["code_version"])
    console.print(table)
    areas = storage.read_table("areas")
    failures = storage.read_table("failures")
    modelled = int(storage.read_table("glaciers")["modelled"].sum())
    by_year = RichTable("year", "estimates", "of glaciers", "area km2", "failures")
    for year in settings.years.all():
        mine = areas[areas["year"] == year]
        failed = int(failures["partition"].str.startswith(str(year)).sum())
        by_year.add_row(str(year), str(len(mine)), str(modelled), f"{mine['area_km2'].sum():.2f}", str(failed))
    console.print(by_year)
    if len(failures):
        worst = failures.groupby(["stage", "error"]).size().nlargest(8)
        shown = RichTable("stage", "glaciers", "what happened")
        for (stage, error), n in worst.items():  # type: ignore[misc]
            shown.add_row(str(stage), str(n), _escape(str(error)))
        console.print(shown)
    if stale:
        _print_stale(settings, storage, file)


def _print_stale(settings: Region, storage: Storage, file: Path | None) -> None:
    from dl4gam_assets.stages.base import UpstreamError, Workspace
    from dl4gam_assets.stages.staleness import find_stale

    try:
        found = find_stale(Workspace(settings, storage))
    except UpstreamError as error:
        raise _stop(_escape(str(error))) from error
    if file is not None:
        _emit(found.estimates.to_csv(index=False), file)
    for name in found.gone[:5]:
        console.print(f"file is gone: {name} (nothing is stale by that)", highlight=False, markup=False, soft_wrap=True)
    if len(found.gone) > 5:
        console.print(f"... and {len(found.gone) - 5} more files", highlight=False)
    for name in found.lost[:5]:
        console.print(name, highlight=False, markup=False, soft_wrap=True)
    if len(found.lost) > 5:
        console.print(f"... and {len(found.lost) - 5} more cubes and maps", highlight=False)
    if found.lost:
        console.print(
            "to make these again, remove their years from state/glacier_cubes (maps: state/glacier_predictions) in the "
            "store and run `dl4gam materialize`", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    for line in found.other_programs:
        console.print(f"{line} (nothing is stale by that)", highlight=False, markup=False, soft_wrap=True)
    if found.current:
        console.print(f"all {found.checked} partitions match their inputs", highlight=False)
        return
    by_year = RichTable("year", "stale", "may change", title="estimates that no longer match their inputs")
    for year, mine in found.estimates.groupby("year"):
        counts = mine["state"].value_counts()
        by_year.add_row(str(year), str(counts.get("stale", 0)), str(counts.get("may change", 0)))
    console.print(by_year if len(found.estimates) else "no estimate is stale, but later results are:", highlight=False)
    for cause in found.causes[:20]:
        console.print(f"  {cause}", highlight=False, markup=False, soft_wrap=True)
    if len(found.causes) > 20:
        console.print(f"  ... and {len(found.causes) - 20} more", highlight=False)
    console.print("`dl4gam materialize` makes these again, and nothing else", highlight=False)


@app.command()
def ui(
    region: RegionOption = "demo",
    home: HomeOption = None,
    port: Annotated[int, typer.Option(help="Port on this machine (loopback only).")] = 3000,
) -> None:
    """Open Dagster's UI on this machine with the region's store (http://127.0.0.1:3000)."""
    from dl4gam_assets.orchestrate import dagster_home

    _, storage = _open(region, home)
    environment = os.environ | {
        "DAGSTER_HOME": str(dagster_home(storage)),
        "DL4GAM_REGION": region,
        "DL4GAM_HOME": str(storage.root.parent),
    }
    command = [
        sys.executable, "-m", "dagster", "dev", "-m", "dl4gam_assets.definitions", "-h", "127.0.0.1", "-p", str(port),
    ]  # fmt: skip
    console.print(f"http://127.0.0.1:{port}  (stop with Ctrl-C)", highlight=False)
    os.execve(sys.executable, command, environment)  # noqa: S606


@app.command()
def transfer(
    inventory: Annotated[
        Path, typer.Option(help="Second inventory: a vector file, or the folder of the raw SGI2016 files.")
    ],
    year: Annotated[int, typer.Option(help="Year of the maps; the baseline year is nearest to most inventories.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the file.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the glacier ids; guessed by default.")] = None,
    separation_m: Annotated[
        float, typer.Option(min=0, help="Distance to keep from glaciers that the fold trained or validated on.")
    ] = 0.0,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Write the glaciers here: .csv, or .parquet with outlines.")
    ] = None,
    id_map: Annotated[Path | None, typer.Option(help="Write the id map here: .csv or .parquet.")] = None,
) -> None:
    """Measure a second inventory's glaciers, with its own ids and divides, on maps that never saw them.

    Each glacier is judged by the fold that holds out all glaciers of the region that it overlaps. Nothing goes into
    the store. Inventories have their own rules and dates, so a perfect map would not agree with both.
    """
    from dl4gam_assets.compute import Mapper
    from dl4gam_assets.stages.base import UpstreamError, Workspace
    from dl4gam_assets.stages.transfer import read_second_inventory
    from dl4gam_assets.stages.transfer import transfer as measure

    for path in (file, id_map):
        if path is not None and path.suffix not in {".csv", ".parquet"}:
            raise _stop(f"{path}: the name must end in .csv or .parquet")
    settings, storage = _open(region, home)
    _check_choice("year", [year], settings.years.all())
    ws = Workspace(settings, storage, Mapper(settings.compute.workers))
    try:
        with tempfile.TemporaryDirectory(prefix="dl4gam-") as work:
            second, rejected = read_second_inventory(inventory, layer, id_column, Path(work))
            found = measure(ws, second, rejected, year, separation_m=separation_m)
    except (SettingsError, UpstreamError, ValueError) as error:
        raise _stop(_escape(str(error))) from error
    for path, frame in ((file, found.glaciers), (id_map, found.id_map)):
        if path is not None:
            with Storage(path.absolute().parent).writing(path.absolute()) as temporary:
                if path.suffix == ".parquet":
                    frame.to_parquet(temporary, index=False)
                else:
                    frame.drop(columns="geometry", errors="ignore").to_csv(temporary, index=False)
    _print_transfer(found)


def _print_transfer(found: Any) -> None:
    s = found.summary
    table = RichTable("transfer to the second inventory", "")
    for name, number in s["relations"].items():
        if number:
            where = "glaciers of the first inventory only" if name == "vanished" else "glaciers"
            table.add_row(f"ids: {name}", f"{number} {where}")
    table.add_row("glaciers, area", f"{s['glaciers']}, {s['area_km2']:.2f} km2")
    table.add_row("held out by a fold", f"{s['held_out']} ({100 * s['held_out_share']:.1f}% of the area)")
    table.add_row("measured on held-out maps", f"{s['measured']} ({100 * s['measured_share']:.1f}% of the area)")
    if s["partly_mapped"]:
        table.add_row("partly mapped or seen, left out below", str(s["partly_mapped"]))
    if s["measured"]:
        table.add_row(
            "their area: estimate, outlines",
            f"{s['mapped_km2']:.2f} ({s['lower_km2']:.2f} to {s['upper_km2']:.2f}), "
            f"{s['measured_outline_km2']:.2f} km2",
        )
        table.add_row("median of area / outline - 1", f"{100 * s['median_relative_difference']:+.1f}%")
        table.add_row("outline areas inside their interval", f"{100 * s['inside_share']:.0f}%")
        table.add_row("recall, IoU (all valid pixels of the cells)", f"{s['recall']:.3f}, {s['iou']:.3f}")
        table.add_row("IoU within 50 m (ring)", f"{s['ring_iou']:.3f}")
        table.add_row("mean over glaciers: IoU, ring IoU", f"{s['mean_iou']:.3f}, {s['mean_ring_iou']:.3f}")
    console.print(table)
    for reason, rows in found.glaciers.groupby("reason"):
        if reason != "held out":
            text = f"{len(rows)} glaciers, {rows['outline_km2'].sum():.2f} km2"
            console.print(f"{reason}: {text}", highlight=False, markup=False)
    lost = found.glaciers[found.glaciers["error"].notna()]
    for row in lost.head(5).itertuples():
        errors.print(f"{row.glacier_id}: {row.error}", highlight=False, markup=False, soft_wrap=True)
    if len(lost) > 5:
        errors.print(f"... and {len(lost) - 5} more (column error)", highlight=False)
    if len(found.rejected):
        errors.print(f"{len(found.rejected)} outlines of the second inventory can not be used", highlight=False)


class Drawn(enum.StrEnum):
    rates = "rates"
    intervals = "intervals"
    both = "both"


@app.command()
def validate(
    draws: Annotated[int, typer.Option(min=10, help="Regions drawn for each scenario.")] = 300,
    what: Annotated[
        Drawn, typer.Option(help="Regional rates, intervals of single areas by both rules for tau, or both.")
    ] = Drawn.both,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these scenarios; repeat for several.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Write the tables here as CSV (one file, a column `table`).")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Write the plots into this folder as PNG.")] = None,
) -> None:
    """Check what the intervals hold, on thousands of drawn regions with known change.

    The tables and plots of docs/validation.md; no images and no training are needed. An honest interval of one
    deviation holds the truth in 68% of the draws.
    """
    import pandas as pd

    from dl4gam_assets.change.interval_simulator import INTERVAL_SCENARIOS, run_interval_scenarios
    from dl4gam_assets.change.simulator import SCENARIOS, run_scenarios
    from dl4gam_assets.publication import validation_plots

    known = {Drawn.rates: list(SCENARIOS), Drawn.intervals: list(INTERVAL_SCENARIOS)}
    kinds = [kind for kind in known if what in (kind, Drawn.both)]
    names = {kind: [n for n in known[kind] if scenario is None or n in scenario] for kind in kinds}
    unknown = [n for n in scenario or [] if all(n not in names[kind] for kind in kinds)]
    if unknown:
        offered = ", ".join(n for kind in kinds for n in known[kind])
        raise _stop(_escape(f"no scenario {unknown[0]!r}; there are {offered}"))
    tables = {}
    if names.get(Drawn.rates):
        tables["rates"] = run_scenarios(draws, names=names[Drawn.rates])
        _print_rates(tables["rates"])
        _save_plot(plots, "rates", validation_plots.rates_plot(tables["rates"]))
    if names.get(Drawn.intervals):
        tables["intervals"] = run_interval_scenarios(draws, names=names[Drawn.intervals])
        _print_intervals(tables["intervals"])
        _save_plot(plots, "intervals", validation_plots.intervals_plot(tables["intervals"]))
    if file is not None:
        _emit(pd.concat([t.assign(table=name) for name, t in tables.items()]).to_csv(index=False), file)


def _save_plot(folder: Path | None, name: str, figure: Any) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    console.print(f"plot: {folder / f'{name}.png'}", highlight=False, markup=False, soft_wrap=True)


def _print_rates(table: Any) -> None:
    for name, rows in table.groupby("scenario", sort=False):
        columns = ("method", "truth %/yr", "bias", "rmse", "stated deviation", "holds the truth")
        shown = RichTable(*columns, title=str(name))
        for row in rows.itertuples():
            shown.add_row(
                row.method, f"{row.truth:.2f}", f"{row.bias:+.2f}", f"{row.rmse:.2f}", f"{row.std:.2f}",
                f"{100 * row.coverage:.0f} +/- {100 * row.coverage_std:.0f}%",
            )  # fmt: skip
        console.print(rows["question"].iloc[0], highlight=False)
        console.print(shown)


def _print_intervals(table: Any) -> None:
    """Coverage and width of single areas' intervals; size classes and their mixtures are in the CSV."""
    for name, rows in table.groupby("scenario", sort=False):
        shown = RichTable("rule", "glaciers", "hold the truth", "region to region", "half width", title=str(name))
        for row in rows[rows["group"].isin(["all", "clean", "debris-covered"])].itertuples():
            shown.add_row(
                row.method, row.group, f"{100 * row.coverage:.0f} +/- {100 * row.coverage_std:.1f}%",
                f"+/- {100 * row.spread:.0f}%", f"{100 * row.half_width:.1f}%",
            )  # fmt: skip
        console.print(rows["question"].iloc[0], highlight=False)
        console.print(shown)


@app.command()
def coverage(
    region: RegionOption = "demo",
    home: HomeOption = None,
    year: Annotated[
        list[int] | None,
        typer.Option(help="Only these years; repeat for several. Default: all that can be judged."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Write the table here as CSV.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write a plot into this folder as PNG.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """How many intervals hold the area they should, by rule for tau, size and debris.

    Judged by the truth where the region is simulated, and by the inventory's outlines in the inventory year. Held-out
    glaciers only: the taus were fitted on others. Of simulated regions also what areas and regional rates are off by,
    year by year. These are the tables of docs/validation.md.
    """
    import pandas as pd

    from dl4gam_assets.publication import truth as known
    from dl4gam_assets.publication import validation_plots
    from dl4gam_assets.stages.base import UpstreamError
    from dl4gam_assets.stages.coverage import measured_coverage

    settings, storage = _open(region, home)
    for y in year or []:
        _check_choice("year", [y], settings.years.all())
    try:
        tables = measured_coverage(settings, storage, year)
    except (UpstreamError, ValueError) as error:
        raise _stop(_escape(str(error))) from error
    judged = {f"{name} against the truth": t for name, t in known.truth_tables(settings, storage).items() if len(t)}
    if markdown:
        for title, table in (judged | tables).items():
            typer.echo(f"{title}\n\n{known.markdown(table)}\n")
    for title, table in judged.items() if not markdown else ():
        shown = RichTable(*(str(c).replace("_", " ") for c in table), title=title)
        for line in known.markdown(table).splitlines()[2:]:
            shown.add_row(*(cell.strip(" *") for cell in line.strip("| ").split(" | ")))
        console.print(shown)
    for judge, table in tables.items():
        shown = RichTable("rule", "glaciers", "", "intervals", "hold it", "95% range", "half width", title=judge)
        for row in table.itertuples():
            shown.add_row(
                row.rule, row.group, str(row.n_glaciers), str(row.n), f"{100 * row.coverage:.0f}%",
                f"{100 * row.coverage_low:.0f} to {100 * row.coverage_high:.0f}%", f"{row.half_width_pct:.1f}%",
            )  # fmt: skip
        if not markdown:
            console.print(shown)
        name = f"coverage_{settings.name}_{judge.split()[0]}"
        _save_plot(plots, name, validation_plots.coverage_plot(table, f"{settings.name}: judged by {judge}"))
    taus = storage.read_table("taus")
    if len(taus) and taus["tau_published"].equals(taus["tau_conformal"]) and not markdown:
        console.print(
            "Both rules gave every glacier the same tau: no fold has enough validation glaciers for a regression, nor "
            "for a size or debris class of its own (conformal_group in the table taus).",
            highlight=False,
        )
    if file is not None:
        _emit(pd.concat([t.assign(judge=name) for name, t in tables.items()]).to_csv(index=False), file)


# ---------------------------------------------------------------------------------------------------------- published
_INVENTORY = ["simulated_inputs", "inventory_outlines", "debris_outlines", "glacier_zones"]


def _importing(region: str, home: str | None, register: Callable[[Any], dict[str, Any]], before: list[str]) -> Any:
    """Bring the assets in ``before`` up to date, then register files; returns settings, storage and what was found."""
    from dl4gam_assets.published import PublishedFileError
    from dl4gam_assets.stages.base import UpstreamError, Workspace

    settings, storage = _open(region, home)
    outcome = _run(region, settings, storage, home, [settings.years.baseline], None, before)
    if outcome.failed:
        raise _failed(outcome)
    try:
        return settings, storage, register(Workspace(settings, storage))
    except (PublishedFileError, UpstreamError, OSError) as error:
        raise _stop(_escape(str(error))) from error


def _then(
    region: str, settings: Region, storage: Storage, home: str | None, years: Any, only: list[str],
    tell: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    outcome = _run(region, settings, storage, home, years, None, only)
    _print_timings(outcome)
    tell()
    if outcome.failed:
        raise _failed(outcome)


@app.command("import-cubes")
def import_cubes(
    path: Annotated[Path, typer.Argument(help="Folder of <entry_id>/<date>.nc, or the tar archive of it.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    year: Annotated[
        int | None, typer.Option(help="Year that they stand for; from the images' dates by default.")
    ] = None,
) -> None:
    """Take published glacier-wide cubes as the glacier_cubes of a year (docs/reproduce.md)."""
    from dl4gam_assets.stages.published import cubes_import, register_cubes

    def register(ws: Any) -> dict[str, Any]:
        return register_cubes(ws, path, year, say=lambda text: console.print(text, highlight=False))

    settings, storage, found = _importing(region, home, register, _INVENTORY)
    console.print(
        f"{found['cubes']} cubes of {found['year']}; {found['without']} modelled glaciers have none, "
        f"{found['not_modelled']} are below min_area_km2", highlight=False,
    )  # fmt: skip
    registered = [y for y in settings.years.all() if cubes_import(storage, y) is not None]
    if settings.years.baseline not in registered:
        raise _stop(
            f"registered; now import the cubes of the baseline year {settings.years.baseline}: elevation and folds are "
            f"made from them. Those of {found['year']} are then converted with them"
        )
    assets = ["elevation", "scene_candidates", "selected_scenes", "elevation_change", "glacier_cubes"]
    _then(region, settings, storage, home, registered, assets, lambda: _tell_refused(storage, registered))


#: Refused files that are printed with their reasons; all are in the table ``failures``.
_SHOWN = 10


def _tell_refused(storage: Storage, years: list[int]) -> None:
    """Print how many published cubes of each year were converted, and why the others were not."""
    from dl4gam_assets.stages.published import refused_cubes

    for year in years:
        converted, refused = refused_cubes(storage, year)
        if len(refused):
            console.print(
                f"[yellow]{year}: {converted} cubes converted, {len(refused)} refused[/yellow]", highlight=False
            )
            for error in refused["error"].head(_SHOWN):
                console.print(f"  {error}", highlight=False, markup=False, soft_wrap=True)
            if len(refused) > _SHOWN:
                console.print(f"  and {len(refused) - _SHOWN} more: the table failures names them", highlight=False)


@app.command("import-splits")
def import_splits(
    path: Annotated[
        Path,
        typer.Argument(help="map_all_splits_all_folds.csv, or a folder with it and the stats_agg_split_<i>.csv."),
    ],
    region: RegionOption = "demo",
    home: HomeOption = None,
) -> None:
    """Take a published fold map, and the normalization tables beside it (docs/reproduce.md)."""
    from dl4gam_assets.stages.published import register_splits

    settings, storage, found = _importing(region, home, lambda ws: register_splits(ws, path), _INVENTORY)
    console.print(
        f"folds of {found['glaciers']} glaciers ({found['without']} modelled ones have none), "
        f"{found['normalization']} normalization tables", highlight=False,
    )  # fmt: skip
    if found["removed"]:
        console.print(
            f"{found['removed']} normalization tables of the former fold map were removed: they are of other training "
            "glaciers. Import those of this map, or they are computed from the cubes", highlight=False,
        )  # fmt: skip
    assets = ["cross_validation_folds", *(["normalization"] if found["normalization"] else [])]
    _then(region, settings, storage, home, [settings.years.baseline], assets)


@app.command("import-checkpoints")
def import_checkpoints(
    path: Annotated[Path, typer.Argument(help="Folder of split_<i>/seed_<s>/.../checkpoints/ckpt-*.ckpt.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    indices: Annotated[
        str | None,
        typer.Option(help="Order of the optical indices, for example NDSI,NDVI,NDWI, where no settings say it."),
    ] = None,
) -> None:
    """Take published checkpoints as ensemble members: weights only, proven by a forward pass (docs/reproduce.md)."""
    from dl4gam_assets.stages.published import register_checkpoints

    order = None if indices is None else [name.strip().upper() for name in indices.split(",")]
    if order is not None and sorted(order) != ["NDSI", "NDVI", "NDWI"]:
        raise _stop("--indices wants NDVI, NDWI and NDSI in some order, separated by commas")
    settings, storage, found = _importing(
        region, home, lambda ws: register_checkpoints(ws, path, order), [*_INVENTORY, "cross_validation_folds"]
    )
    console.print(
        f"{found['checkpoints']} checkpoints: folds {', '.join(map(str, found['folds']))}, {found['members']} members "
        "each", highlight=False,
    )  # fmt: skip
    if found["set_aside"]:
        console.print(
            f"{found['set_aside']} others have a lower score in their names and were left out", highlight=False
        )
    if found["removed"]:
        console.print(
            f"folds {', '.join(map(str, found['removed']))} are not in this set: what was imported for them before is "
            "not used any more, and their members are trained when they are materialized", highlight=False,
        )  # fmt: skip
    _then(region, settings, storage, home, [settings.years.baseline], ["normalization", "ensemble_member", "ensemble"])


@app.command("export-published")
def export_published_layout(
    folder: Annotated[Path, typer.Argument(help="Folder for the files.")],
    year: Annotated[int, typer.Option(help="Year whose cubes are written.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
) -> None:
    """Write a year's cubes, folds and normalization in the layout of the published data set."""
    from dl4gam_assets.compute import close_clusters
    from dl4gam_assets.stages.base import UpstreamError, Workspace
    from dl4gam_assets.stages.published import export_published

    settings, storage = _open(region, home)
    _check_choice("year", [year], settings.years.all())
    try:
        made = export_published(Workspace(settings, storage), year, folder.absolute())
    except (UpstreamError, OSError) as error:
        raise _stop(_escape(str(error))) from error
    finally:
        close_clusters()
    for text in made["failed"]:
        console.print(f"  {text}", highlight=False, markup=False)
    console.print(f"{made['cubes']} cubes, {made['tables']} tables: {folder}", highlight=False, soft_wrap=True)
    if made["failed"]:
        raise typer.Exit(1)


@app.command("compare-published")
def compare_published(
    year: Annotated[int, typer.Option(help="Year whose change against the baseline is compared.")],
    region: RegionOption = "demo",
    home: HomeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="Folder for maps.csv and areas.csv, both by glacier, and rates.csv; or a file for these.",
        ),
    ] = None,
) -> None:
    """The paper's tables under its definitions, and what each correction moves, one at a time (docs/reproduce.md)."""
    import pandas as pd

    from dl4gam_assets.published.comparison import (
        PAPER,
        STEPS,
        area_quality,
        map_quality,
        not_as_published,
        regional_rates,
    )

    settings, storage = _open(region, home)
    _check_choice("year", [year], settings.years.all())
    baseline = storage.read_table("baseline_areas")
    areas = storage.read_table("areas", year=year)
    if not len(baseline) or not len(areas):
        raise _stop(f"there are no areas of {year} or of the baseline year yet: run `dl4gam materialize --year {year}`")
    rates = regional_rates(
        baseline, areas, storage.read_table("glaciers"), settings.change, year, settings.years.baseline, settings.areas
    )
    evaluation = storage.read_table("evaluation")
    quality = map_quality(evaluation)
    sums = {str(settings.years.baseline): area_quality(baseline), str(year): area_quality(areas)}
    if file is not None and file.suffix == ".csv":
        _emit(rates.to_csv(index=False), file)
    elif file is not None:
        file.mkdir(parents=True, exist_ok=True)
        _emit(evaluation[evaluation["role"] == "test"].to_csv(index=False), file / "maps.csv")
        _emit(pd.concat([baseline, areas]).to_csv(index=False), file / "areas.csv")
        _emit(rates.to_csv(index=False), file / "rates.csv")
    other = not_as_published(settings.areas)
    if as_json:
        shown = {
            "paper": PAPER,
            "areas_as_published": not other,
            "maps": json.loads(quality.to_json(orient="records")),
            "areas": {key: json.loads(frame.to_json(orient="records"))[0] for key, frame in sums.items()},
            "rates": json.loads(rates.to_json(orient="records")),
        }
        _emit(json.dumps(shown, indent=1), None)
        return
    console.print("Maps of glaciers that the models did not see, means over glaciers", highlight=False)
    table = RichTable("method", "definition", "glaciers", "IoU", "precision", "recall", "F1", "IoU by area", "debris")
    for r in quality.itertuples():
        values = (r.iou, r.precision, r.recall, r.f1, r.iou_by_area, r.debris_recall)
        table.add_row(str(r.method), str(r.definition), str(r.n_glaciers), *(_share(v) for v in values))
    console.print(table)
    console.print("Areas within 20 m of the outlines, deviations added linearly (published)", highlight=False)
    table = RichTable(
        "year", "glaciers", "inventory km2", "predicted km2", "recall", "false positives", "debris recall",
        "interval holds inventory",
    )  # fmt: skip
    for key, frame in sums.items():
        r = frame.iloc[0]
        table.add_row(
            key, str(int(r["n_glaciers"])), f"{r['inventory_area_km2']:.2f}",
            f"{r['area_km2']:.2f} +/- {r['area_std_km2']:.2f}", _share(r["recall"]), _share(r["false_positive_rate"]),
            _share(r["debris_recall"]), _share(r["inside"]) if key == str(settings.years.baseline) else "",
        )  # fmt: skip
    console.print(table)
    console.print(f"Change {settings.years.baseline} to {year}, one correction at a time", highlight=False)
    table = RichTable("", "glaciers", "of the area", "km2/yr", "%/yr", "moves the rate by", "and its deviation by")
    for step, part in rates.groupby("step", sort=False):
        table.add_row(f"[bold]{step}[/bold]")
        for r in part.itertuples():
            if r.rate_pct_per_year != r.rate_pct_per_year:
                table.add_row(f"  {r.method}", str(int(r.n_glaciers)), "", "no rate", "", "", "")
                continue
            known = not str(step).startswith(STEPS[0].name) and r.moves_rate == r.moves_rate
            table.add_row(
                f"  {r.method}", str(int(r.n_glaciers)), _share(r.share_of_area), f"{r.rate_km2_per_year:.3f}",
                f"{r.rate_pct_per_year:.2f} +/- {r.rate_std_pct_per_year:.2f}",
                *((f"{v:+.2f}".replace("-0.00", "+0.00") for v in (r.moves_rate, r.moves_std)) if known else ("", "")),
            )  # fmt: skip
    console.print(table)
    left_out = rates.groupby("step", sort=False)["left_out"].first()
    for step, count in left_out[left_out > 0].items():
        console.print(f"{step}: {count} glaciers are left out, which have no such interval", highlight=False)
    if other:
        console.print(
            f"[yellow]This region measures areas with {other} (areas.pixels, areas.shared_ground): no line is as "
            "published. Set them to whole and each for that[/yellow]", highlight=False,
        )  # fmt: skip
    if settings.name == PAPER["region"] and year == PAPER["to"]:
        console.print(
            f"The paper, {PAPER['from']} to {PAPER['to']}: {PAPER['rate_pct_per_year']} +/- "
            f"{PAPER['rate_std_pct_per_year']} %/yr (its preprint: +/- {PAPER['earlier_rate_std_pct_per_year']}), "
            f"{PAPER['glaciers']} glaciers measured ({PAPER['area_km2']} km2), {PAPER['filtered_glaciers']} pass the "
            f"filters ({PAPER['filtered_share_of_area']} of the area).", highlight=False,
        )  # fmt: skip


def _share(value: Any) -> str:
    return "" if value is None or value != value else f"{100 * float(value):.1f} %"


@app.command()
def settings(region: RegionOption = "demo") -> None:
    """Print a region's settings in full, defaults included, as JSON."""
    loaded, _ = _open(region, None)
    sys.stdout.write(json.dumps(loaded.model_dump(mode="json"), indent=1) + "\n")


if __name__ == "__main__":
    app()
