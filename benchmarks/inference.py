"""Inference in large windows against the published stride-32 averaging, on the same checkpoints and glaciers.

    python benchmarks/inference.py --region demo --home HOME           # HOME holds the folder of the region
    python benchmarks/inference.py --region khumbu --home HOME --glaciers 0      # all held-out glaciers
    python benchmarks/inference.py --region demo --home HOME --paper 4  # speed with the paper's network and patches

The store must hold members of the region (`dl4gam materialize --region demo`). It is only read. Every held-out glacier
is mapped by the fold that tests it, with temperatures of the stored calibration. Compared are

- ``stride 32``: the published mode in fp32, patches as large as those of the training, around the published centres;
- ``ours fp32``, ``ours bf16``: the whole glacier, or windows as the region's settings say; ``context 64``: only 64
  pixels around the 50 m zone (``inference.context_px``), which the full-scene figures of an evaluation then lack;
- ``windows``: windows forced to be smaller than the glaciers, to see what their seams do.

Gate: median relative area difference from ``stride 32`` below 0.5 %, IoU against the inventory at most 0.2 points
lower, errors near seams no larger than for the same pixels without seams. The script exits with 1 where it fails.
Seconds are of the networks alone (channels are built once for all modes); compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.ensemble import aggregate
from dl4gam_assets.segmentation import build_model, load_member, member_logits, normalize, patch_centres
from dl4gam_assets.segmentation.inference import _spans, low_precision
from dl4gam_assets.segmentation.model import channels_last
from dl4gam_assets.settings import InferenceSettings, ModelSettings, Region, load_region
from dl4gam_assets.storage import Storage

AREA_LIMIT, IOU_LIMIT = 0.5, 0.2  # percent, points


class Glacier(NamedTuple):
    """What the comparison needs of a glacier."""

    name: str
    fold: int
    stack: np.ndarray
    counted: np.ndarray  # pixels that count to its area
    judged: np.ndarray  # valid pixels within 50 m (scope ring)
    truth: np.ndarray
    zone: np.ndarray  # within 50 m
    outline: np.ndarray
    centres: np.ndarray


def held_out(region: Region, storage: Storage) -> list[tuple[int, str]]:
    folds = storage.read_table("folds")
    cubes = set(storage.read_table("cubes", year=region.years.baseline)["glacier_id"])
    tests = folds[(folds["role"] == "test") & folds["glacier_id"].isin(cubes)]
    return sorted({(int(r.fold), str(r.glacier_id)) for r in tests.itertuples()})


def read(region: Region, storage: Storage, fold: int, glacier_id: str, statistics: pd.DataFrame) -> Glacier:
    with open_cube(Path(str(storage.cube(region.years.baseline, glacier_id)))) as cube:
        stack, valid = channel_stack(cube, region.model.channels)
        zone, near, glacier, truth = (cube_mask(cube, n) for n in ("zone_50", "zone_20", "glacier", "any_glacier"))
    return Glacier(
        glacier_id, fold, normalize(stack, region.model.channels, statistics),
        glacier | (near & ~truth), valid & (glacier | (zone & ~truth)), truth,
        zone, glacier, patch_centres(zone, glacier, 32, extremes=True),
    )  # fmt: skip


class Ensembles:
    """Members, temperatures and statistics of the fold that was asked for last."""

    def __init__(self, region: Region, storage: Storage):
        self.region, self.storage, self.fold = region, storage, -1

    def of(self, fold: int) -> tuple[list[torch.nn.Module], np.ndarray, pd.DataFrame]:
        if fold != self.fold:
            numbers = range(1, self.region.training.members + 1)
            self.models = [load_member(self.storage, self.storage.model(fold, m))[0] for m in numbers]
            self.statistics = self.storage.read_table("normalization", fold=fold)
            table = self.storage.read_table("calibration", fold=fold)
            found = len(table) == len(self.models)
            self.temperatures = (
                table.sort_values("member")["temperature"].to_numpy() if found else np.ones(len(self.models))
            )
            self.fold = fold
        return self.models, self.temperatures, self.statistics


def mapped(
    models: list[torch.nn.Module], temperatures: np.ndarray, glacier: Glacier, settings: InferenceSettings
) -> np.ndarray:
    centres = glacier.centres if settings.mode == "stride" else None
    stream = member_logits(models, glacier.stack, settings, "cpu", centres=centres, zone=glacier.zone | glacier.outline)
    return aggregate(stream, temperatures)[0]


def near_seams(shape: tuple[int, int], settings: InferenceSettings) -> np.ndarray:
    """Pixels within 8 pixels of where one window gives way to the next."""
    out = np.zeros(shape, dtype=bool)
    for axis, length in enumerate(shape):
        spans = _spans(length, settings.window_px, settings.overlap_px)
        for (_, stop), (start, _) in itertools.pairwise(spans):
            line = slice(max((start + stop) // 2 - 8, 0), (start + stop) // 2 + 8)
            out[(line, slice(None)) if axis == 0 else (slice(None), line)] = True
    return out


# --------------------------------------------------------------------------------------------- fidelity and speed
def compare(region: Region, storage: Storage, todo: list[tuple[int, str]], patch: int) -> bool:
    ours = region.inference.model_copy(update={"mode": "windows"})
    forced = ours.model_copy(update={"precision": "fp32", "window_px": 128, "overlap_px": 32})
    modes = {
        "stride 32": InferenceSettings(mode="stride", patch_px=patch, stride_px=32, precision="fp32"),
        "ours fp32": ours.model_copy(update={"precision": "fp32"}),
        "ours bf16": ours.model_copy(update={"precision": "bf16"}),
        "ours bf16, context 64": ours.model_copy(update={"precision": "bf16", "context_px": 64}),
        "windows": forced,
        "whole": ours.model_copy(update={"precision": "fp32", "window_px": 4096}),
    }
    ensembles, rows, seams = Ensembles(region, storage), [], []
    pixels = 0
    for fold, name in todo:
        models, temperatures, statistics = ensembles.of(fold)
        glacier = read(region, storage, fold, name, statistics)
        pixels += glacier.truth.size
        maps = {}
        for mode, settings in modes.items():
            start = time.perf_counter()
            maps[mode] = mapped(models, temperatures, glacier, settings)
            seconds = time.perf_counter() - start
            found = maps[mode] >= 0.5
            rows.append({
                "glacier": name, "mode": mode, "seconds": seconds, "area": int((found & glacier.counted).sum()),
                "hit": int((found & glacier.truth & glacier.judged).sum()),
                "union": int(((found | glacier.truth) & glacier.judged).sum()),
            })  # fmt: skip
        near = near_seams(glacier.truth.shape, forced)
        for place, where in (("near seams", near & glacier.judged), ("elsewhere", ~near & glacier.judged)):
            wrong = {m: int(((maps[m] >= 0.5) != glacier.truth)[where].sum()) for m in ("windows", "whole")}
            missed = {m: int((glacier.truth & ~(maps[m] >= 0.5))[where].sum()) for m in ("windows", "whole")}
            shift = np.abs(maps["windows"] - maps["whole"])[where].sum()
            seams.append({"place": place, "pixels": int(where.sum()), "shift": float(shift),
                          **{f"wrong {m}": n for m, n in wrong.items()},
                          **{f"missed {m}": n for m, n in missed.items()}})  # fmt: skip
    frame = pd.DataFrame(rows).assign(iou=lambda f: f["hit"] / f["union"].clip(lower=1))
    base = frame[frame["mode"] == "stride 32"].set_index("glacier")
    print(f"\n{region.name}: {len(todo)} held-out glaciers, {pixels / 1e6:.2f} million pixels, "
          f"{region.training.members} members, patches of {patch} px\n")  # fmt: skip
    print("| mode | seconds | speed | area, median | area, total | IoU | mean IoU | gate |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    good = True
    for mode in modes:
        mine = frame[frame["mode"] == mode].set_index("glacier")
        relative = (mine["area"] - base["area"]) / base["area"].clip(lower=1)
        median = 100 * float(relative.abs().median())
        total = 100 * (mine["area"].sum() / base["area"].sum() - 1)
        pooled = 100 * mine["hit"].sum() / mine["union"].sum()
        lower = 100 * base["hit"].sum() / base["union"].sum() - pooled
        held = median < AREA_LIMIT and lower <= IOU_LIMIT
        good &= held or not mode.startswith("ours")
        print(
            f"| {mode} | {mine['seconds'].sum():.2f} | {base['seconds'].sum() / mine['seconds'].sum():.1f} "
            f"| {median:.3f} % | {total:+.3f} % | {pooled:.2f} | {100 * mine['iou'].mean():.2f} "
            f"| {'holds' if held else 'FAILS'} |"
        )
    table = pd.DataFrame(seams).groupby("place").sum()
    print(
        "\n| seams of windows of 128 px | pixels | moved by | wrong, windows | wrong, whole | missed, windows | whole |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for place, row in table.iterrows():
        share = {c: 100 * row[c] / max(row["pixels"], 1) for c in table.columns if c != "pixels"}
        cells = [f"{share[c]:.3f} %" for c in ("wrong windows", "wrong whole", "missed windows", "missed whole")]
        print(f"| {place} | {int(row['pixels'])} | {share['shift']:.3f} points | {' | '.join(cells)} |")
    worse = {p: 100 * (r["wrong windows"] - r["wrong whole"]) / max(r["pixels"], 1) for p, r in table.iterrows()}
    held = worse.get("near seams", 0.0) - max(worse.get("elsewhere", 0.0), 0.0) <= IOU_LIMIT
    print(f"\nSeams cost {worse.get('near seams', 0.0):+.3f} points near them, {worse.get('elsewhere', 0.0):+.3f} "
          f"elsewhere: {'holds' if held else 'FAILS'}")  # fmt: skip
    return good and held


def published_box(glacier: Glacier) -> Glacier:
    """The glacier in a cube of the published size: 128 + 5 pixels around its box, mirrored where ours ends earlier."""
    margin, spans = 133, []
    for axis, length in enumerate(glacier.outline.shape):
        where = np.flatnonzero(glacier.outline.any(axis=1 - axis))
        spans.append((where[0] - margin, where[-1] + 1 + margin, length))
    pads = [(max(-a, 0), max(b - length, 0)) for a, b, length in spans]
    cut = tuple(slice(max(a, 0), min(b, length)) for a, b, length in spans)
    stack = np.pad(glacier.stack[:, *cut], [(0, 0), *pads], mode="symmetric")
    zone, outline = (np.pad(m[cut], pads) for m in (glacier.zone, glacier.outline))
    return glacier._replace(
        stack=stack, zone=zone, outline=outline, truth=outline, centres=patch_centres(zone, outline, 32, extremes=True)
    )


def paper_speed(region: Region, storage: Storage, todo: list[tuple[int, str]]) -> None:
    """The paper's network (random weights: its speed does not depend on them), one member, patches and cubes of the
    published size."""
    settings = ModelSettings(channels=region.model.channels, encoder_weights=None)
    model = channels_last(build_model(settings)).eval()
    ensembles = Ensembles(region, storage)
    modes = {
        "stride 32, fp32": InferenceSettings(mode="stride", precision="fp32"),
        "ours, fp32": InferenceSettings(precision="fp32"),
        "ours, bf16": InferenceSettings(precision="bf16"),
        "ours, bf16, context 64": InferenceSettings(precision="bf16", context_px=64),
    }
    seconds = dict.fromkeys(modes, 0.0)
    pixels = patches = 0
    areas: list[float] = []
    for fold, name in todo:
        glacier = published_box(read(region, storage, fold, name, ensembles.of(fold)[2]))
        areas.append(glacier.outline.sum() * 1e-4)
        pixels += glacier.truth.size
        patches += len(glacier.centres)
        for mode, options in modes.items():
            start = time.perf_counter()
            mapped([model], np.ones(1), glacier, options)
            seconds[mode] += time.perf_counter() - start
    print(f"\nThe paper's U-Net, one member, {len(todo)} glaciers of {region.name} in cubes of the published size "
          f"(outlines of {min(areas):.1f} to {max(areas):.1f} km2 at 10 m): {pixels / 1e6:.2f} million pixels, "
          f"{patches} patches of 256 px ({patches * 256 * 256 / pixels:.1f} times the pixels)\n")  # fmt: skip
    print("| mode | seconds | speed |\n|---|---:|---:|")
    for mode, value in seconds.items():
        print(f"| {mode} | {value:.2f} | {seconds['stride 32, fp32'] / value:.1f} |")


def batching(region: Region, sides: tuple[int, ...] = (160, 256, 416)) -> None:
    """Whether glaciers of like size in one batch would pay on this processor."""
    model = channels_last(build_model(region.model, pretrained=False)).eval()
    paper = channels_last(build_model(ModelSettings(channels=region.model.channels, encoder_weights=None))).eval()
    low = low_precision(InferenceSettings(), "cpu")
    print("\n| ms a glacier, one by one and four in a batch | side | one | four | ratio |\n|---|---:|---:|---:|---:|")
    for name, network in (("region's network", model), ("paper's network", paper)):
        for side in sides:
            one, four = (torch.randn(n, len(region.model.channels), side, side).contiguous(
                memory_format=torch.channels_last) for n in (1, 4))  # fmt: skip

            def run(x: torch.Tensor, network: torch.nn.Module = network) -> None:
                with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                    network(x)

            a, b = _best(partial(run, one)), _best(partial(run, four)) / 4
            print(f"| {name} | {side} | {1e3 * a:.1f} | {1e3 * b:.1f} | {a / b:.2f} |")


def _best(work: Callable[[], None]) -> float:
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# --------------------------------------------------------------------------------------------- memory
def _peak_mb(work: Callable[[], Any]) -> float:
    """Highest resident memory while ``work`` runs, in MiB (Linux: the mark is reset first)."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _passes(region: Region, storage: Storage, todo: list[tuple[int, str]]) -> list[float]:
    ensembles, peaks = Ensembles(region, storage), []
    for _ in range(3):
        highest = 0.0
        for fold, name in todo:
            models, temperatures, statistics = ensembles.of(fold)

            def one(fold: int = fold, name: str = name, of: Any = (models, temperatures, statistics)) -> None:
                mapped(of[0], of[1], read(region, storage, fold, name, of[2]), region.inference)

            highest = max(highest, _peak_mb(one))
        peaks.append(highest)
    return peaks


def _large(model: ModelSettings, members: int, settings: InferenceSettings, side: int) -> tuple[float, float]:
    """Peak above what was held before, MiB, and seconds, of a map of ``side`` pixels; the channels count as held."""
    network = channels_last(build_model(model, pretrained=False)).eval()
    empty = np.zeros((side, side), dtype=bool)
    stack = np.random.default_rng(0).normal(0, 1, (len(model.channels), side, side)).astype(np.float32)
    glacier = Glacier("large", 0, stack, empty, empty, empty, empty, empty, np.empty((0, 2)))
    mapped([network], np.ones(1), glacier._replace(stack=stack[:, :64, :64]), settings)  # libraries are loaded
    before = _peak_mb(lambda: None)
    start = time.perf_counter()
    peak = _peak_mb(partial(mapped, [network] * members, np.ones(members), glacier, settings))
    return peak - before, time.perf_counter() - start


def memory(region: Region, storage: Storage, todo: list[tuple[int, str]]) -> None:
    """Each case in a process of its own: what one leaves to the allocator would hide the next one's peak."""
    if not Path("/proc/self/clear_refs").exists():
        print("\nPeak memory: only measured on Linux")
        return
    paper = ModelSettings(channels=region.model.channels, encoder_weights=None)
    options, side = InferenceSettings(), 1500
    whole = options.model_copy(update={"window_px": 4096})
    cases = [*(("region's", region.model, n, options) for n in (1, 2, 10)), ("paper's", paper, 1, options),
             ("paper's", paper, 1, whole)]  # fmt: skip
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        peaks = fresh.submit(_passes, region, storage, todo).result()
        print(f"\nPeak memory over {len(todo)} glaciers, three times: {', '.join(f'{p:.0f}' for p in peaks)} MiB")
        print(f"\n80 km2, {side} x {side} px, {len(paper.channels)} channels ("
              f"{len(paper.channels) * side * side * 4 / 2**20:.0f} MiB of them), above what was held before:\n\n"
              "| network | members | window | peak MiB | seconds |\n|---|---:|---:|---:|---:|")  # fmt: skip
        for name, model, members, settings in cases:
            peak, seconds = fresh.submit(_large, model, members, settings, side).result()
            wide = settings.window_px if settings.window_px < side else "whole"
            print(f"| {name} | {members} | {wide} | {peak:.0f} | {seconds:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", default="demo")
    parser.add_argument("--home", type=Path, required=True, help="folder that holds the region's store")
    parser.add_argument("--glaciers", type=int, default=12, help="held-out glaciers, drawn with a fixed seed; 0: all")
    parser.add_argument("--patch", type=int, default=0, help="side of the published patches; 0: as in the training")
    parser.add_argument("--paper", type=int, default=0, help="glaciers to time the paper's network on")
    parser.add_argument("--memory", action="store_true", help="peak memory over glaciers and for 80 km2")
    parser.add_argument("--batching", action="store_true", help="glaciers of like size in one batch")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    region = load_region(options.region)
    storage = Storage(options.home / options.region)
    # What the store was made with, which an older region file may have said otherwise.
    note = storage.read_json(storage.model(1, 1) / "model.json")
    manifest = storage.read_json(storage.path("models", "fold=1", "ensemble.json"))
    if note is None or manifest is None:
        parser.error(f"{storage.root} holds no ensemble: run `dl4gam materialize --region {options.region}` first")
    stored, members = ModelSettings.model_validate(note["model"]), len(manifest["members"])
    training = region.training.model_copy(update={"members": members})
    region = region.model_copy(update={"model": stored, "training": training})
    everything = held_out(region, storage)
    rng = np.random.default_rng(0)
    picked = sorted(rng.permutation(len(everything))[: options.glaciers or None])
    todo = [everything[i] for i in picked]
    good = compare(region, storage, todo, options.patch or region.training.patch_px)
    if options.paper:
        paper_speed(region, storage, todo[: options.paper])
    if options.batching:
        batching(region)
    if options.memory:
        memory(region, storage, todo)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
