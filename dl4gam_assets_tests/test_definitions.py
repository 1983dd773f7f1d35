"""The asset graph: it loads for every region, holds every asset of the design, and its partitions map as meant."""

from __future__ import annotations

import datetime as dt

import dagster as dg
import pytest

from dl4gam_assets.definitions import build_assets, build_defs
from dl4gam_assets.orchestrate import FAMILIES
from dl4gam_assets.partitions import Partitions, fold_of, member_of, year_of
from dl4gam_assets.settings import load_region, packaged_regions

GROUPS = {
    "inventory": {"inventory_outlines", "debris_outlines", "glacier_zones", "cross_validation_folds"},
    "imagery": {"scene_candidates", "selected_scenes"},
    "terrain": {"elevation", "elevation_change"},
    "cubes": {"glacier_cubes"},
    "training": {"normalization", "ensemble_member", "ensemble", "calibration", "band_ratio_baseline"},
    "predictions": {"glacier_predictions", "evaluation"},
    "areas": {"interval_taus", "glacier_areas", "glacier_outlines", "baseline_areas"},
    "change": {"area_change", "regional_change", "area_trends"},
    "publication": {"results_database", "report", "stac_catalog"},
}


@pytest.mark.parametrize("name", packaged_regions())
def test_definitions_of_every_region_load(name: str) -> None:
    defs = build_defs(name)
    dg.Definitions.validate_loadable(defs)
    by_group: dict[str, set[str]] = {}
    for node in defs.resolve_asset_graph().asset_nodes:
        by_group.setdefault(node.group_name, set()).add(node.key.to_user_string())
    simulated = load_region(name).simulation is not None
    assert by_group == GROUPS | ({"simulation": {"simulated_inputs"}} if simulated else {})


def test_the_command_line_reaches_every_asset_once_and_after_its_upstream() -> None:
    graph = build_defs("demo").resolve_asset_graph()
    order = [asset for _, assets in FAMILIES for asset in assets]
    assert sorted(order) == sorted(key.to_user_string() for key in graph.get_all_asset_keys())
    for node in graph.asset_nodes:
        for parent in node.parent_keys:
            assert order.index(parent.to_user_string()) < order.index(node.key.to_user_string())


@pytest.mark.parametrize(
    ("asset", "key", "upstream", "expected"),
    [
        ("selected_scenes", "2020", "scene_candidates", {"2020"}),
        ("glacier_cubes", "2020", "elevation_change", {"2020"}),
        ("normalization", "fold_2", "glacier_cubes", {"2015"}),
        ("ensemble_member", "fold_2|member_03", "normalization", {"fold_2"}),
        ("ensemble_member", "fold_2|member_03", "glacier_cubes", {"2015"}),
        ("ensemble", "fold_2", "ensemble_member", {f"fold_2|member_0{m}" for m in (1, 2, 3)}),
        ("calibration", "fold_2", "ensemble", {"fold_2"}),
        ("glacier_predictions", "fold_2|2020", "glacier_cubes", {"2020"}),
        ("glacier_predictions", "fold_2|2020", "calibration", {"fold_2"}),
        ("interval_taus", "fold_2", "glacier_predictions", {f"fold_{f}|2015" for f in range(1, 6)}),
        ("evaluation", "fold_2", "glacier_predictions", {f"fold_{f}|2015" for f in range(1, 6)}),
        ("glacier_areas", "fold_2|2020", "glacier_predictions", {"fold_2|2020"}),
        ("glacier_areas", "fold_2|2020", "interval_taus", {"fold_2"}),
        ("glacier_outlines", "2020", "glacier_predictions", {f"fold_{f}|2020" for f in range(1, 6)}),
        ("baseline_areas", None, "glacier_areas", {f"fold_{f}|2015" for f in range(1, 6)}),
        ("area_change", "2020", "glacier_areas", {f"fold_{f}|2020" for f in range(1, 6)}),
        ("regional_change", "2020", "area_change", {"2020"}),
        ("area_trends", None, "glacier_areas", {f"fold_{f}|{y}" for f in range(1, 6) for y in range(2015, 2025)}),
        ("report", "2020", "evaluation", {f"fold_{f}" for f in range(1, 6)}),
    ],
)
def test_partition_mappings(asset: str, key: str | None, upstream: str, expected: set[str]) -> None:
    graph = build_defs("demo").resolve_asset_graph()
    node, parent = graph.get(dg.AssetKey(asset)), graph.get(dg.AssetKey(upstream))
    mapping = graph.get_partition_mapping(node.key, parent.key)
    subset = None if key is None else node.partitions_def.empty_subset().with_partition_keys([key])
    result = mapping.get_upstream_mapped_partitions_result_for_partitions(
        downstream_partitions_subset=subset,
        downstream_partitions_def=node.partitions_def,
        upstream_partitions_def=parent.partitions_def,
    )
    assert {str(k) for k in result.partitions_subset.get_partition_keys()} == expected


def test_years_go_up_to_the_present_where_no_last_year_is_set() -> None:
    alps = Partitions(load_region("alps"))
    keys = alps.year_keys(dt.date(2031, 3, 1))
    assert keys[0] == "2015" and keys[-1] == "2031"
    demo = Partitions(load_region("demo"))
    assert demo.year_keys(dt.date(2031, 3, 1)) == [str(y) for y in range(2015, 2025)]


def test_keys_are_read_by_dimension() -> None:
    p = Partitions(load_region("demo"))
    for key in p.year_fold.get_partition_keys():
        assert year_of(key) in range(2015, 2025) and fold_of(key) in range(1, 6)
    assert {(fold_of(k), member_of(k)) for k in p.fold_member.get_partition_keys()} == {
        (f, m) for f in range(1, 6) for m in range(1, 4)
    }
    assert year_of("2020") == 2020 and fold_of("fold_4") == 4


def test_every_asset_tells_a_reader_what_it_is() -> None:
    for asset in build_assets(load_region("demo")):
        for spec in asset.specs:
            assert spec.description and len(spec.description) > 40, spec.key
            assert spec.kinds and spec.owners, spec.key
            assert spec.tags["needs"] == (asset.op.pool or "cpu"), spec.key
            assert spec.tags["made_per"] in {"region", "year", "fold", "year_x_fold", "fold_x_member"}, spec.key
