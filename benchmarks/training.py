"""Training: what a step waits for, precisions, members side by side, and the time of the paper's ensemble.

    python benchmarks/training.py                          # about three minutes on two cores
    python benchmarks/training.py --paper-steps 0          # without the paper's network
    python benchmarks/training.py --steps 0 --paper-steps 0 --members 2    # only members side by side
    python benchmarks/training.py --derived                # only: channels packed, or derived in the batch
    python benchmarks/training.py --device cuda --glaciers 1593 --paper-steps 60 --profile

Glaciers are synthetic (but for the first table, the demo's of a store): sizes like those of the Alps (lognormal, median
0.35 km2), cubes of the published margin (128 + 5 pixels). Compared in one run, on the same patches:

- **published way**: for each patch its cube is opened, the window of every layer read, indices computed and normalized
  on the host, in the training process.
- **mapped**: patches are cut from the memory-mapped packed layers; normalized on the device.
- **resident**: gathered on the device from packed layers that lie there.

All three give the same batch (the script checks it and exits with 1 where they do not). *data* is the share of the
step's time until the batch is there. From the steps of the paper's network follow the hours of its 50 members
(7,488 patches, 30 epochs), without validation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dl4gam_assets.compute import Mapper, close_clusters, default_workers
from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.segmentation import PackedCubes, normalize, train_member
from dl4gam_assets.segmentation.batches import batches, patch_source
from dl4gam_assets.segmentation.losses import masked_loss
from dl4gam_assets.segmentation.model import build_model, channels_last
from dl4gam_assets.segmentation.packing import FORMAT, Packed
from dl4gam_assets.segmentation.sampling import Normalizer, draw_patches, patch_corner
from dl4gam_assets.settings import PUBLISHED_CHANNELS, ModelSettings, TrainingSettings, load_region

CHANNELS = list(PUBLISHED_CHANNELS)
PAPER = ModelSettings(encoder_weights=None)
EPOCH_PATCHES, EPOCHS, MEMBERS = 7488, 30, 50


def synthetic(folder: Path, glaciers: int, seed: int = 0) -> PackedCubes:
    """Packed layers of glaciers like those of the Alps; ellipses of ice in noise."""
    rng = np.random.default_rng(seed)
    areas = np.clip(rng.lognormal(math.log(0.35), 1.15, glaciers), 0.1, 80.0)
    noise = rng.integers(-20000, 20000, size=(len(CHANNELS), 1 << 22), dtype=np.int16)
    entries: dict[str, dict[str, int]] = {}
    start = 0
    with open(folder / "channels.bin", "wb") as values, open(folder / "masks.bin", "wb") as masks:
        for k, area in enumerate(areas):
            stretch = rng.uniform(1.0, 2.2)
            half = np.array([math.sqrt(area * 1e4 / math.pi * stretch), math.sqrt(area * 1e4 / math.pi / stretch)])
            height, width = (int(2 * h + 266) for h in half)
            rows, cols = np.mgrid[:height, :width]
            distance = ((rows - height / 2) / half[0]) ** 2 + ((cols - width / 2) / half[1]) ** 2
            ice = distance < 1
            bits = np.full((height, width), Packed.bit("valid"), dtype=np.uint8)
            bits[ice] |= Packed.bit("any_glacier") | Packed.bit("glacier")
            bits[distance < (1 + 5 / half.min()) ** 2] |= Packed.bit("zone_50")
            at = int(rng.integers(0, max(noise.shape[1] - height * width, 1)))
            flat = np.resize(noise[:, at : at + height * width], (len(CHANNELS), height * width))
            (flat // 2 + np.where(ice.ravel(), 9000, -9000).astype(np.int16)).astype(np.int16).tofile(values)
            bits.tofile(masks)
            entries[f"G{k:05d}"] = {"height": height, "width": width, "start": start, "checksum": k}
            start += height * width
    index = {"format": FORMAT, "channels": CHANNELS, "glaciers": entries}
    (folder / "packed.json").write_text(json.dumps(index), encoding="utf-8")
    return PackedCubes.open(folder)


def statistics() -> pd.DataFrame:
    return pd.DataFrame(
        {"channel": CHANNELS, "mean": 0.1, "std": 0.7, "n_pixels": 1, "standardized": [c != "slope" for c in CHANNELS]}
    )


class Steps:
    """Training steps of a network, timed; the data's part apart."""

    def __init__(self, model: ModelSettings, device: str, low: bool):
        torch.manual_seed(0)
        self.net = channels_last(build_model(model).to(device)).train()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.device, self.low = device, low
        self.settings = TrainingSettings()

    def run(self, stream: Any, count: int, warm: int, normalizer: Normalizer | None) -> tuple[float, float, int]:
        """Seconds, seconds waiting for data, patches, after ``warm`` steps."""
        total = waited = 0.0
        patches = 0
        for step in range(count + warm):
            begun = time.perf_counter()
            x, target, valid = next(stream)
            ready = time.perf_counter()
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.low):
                seen = normalizer(x) if normalizer else x
                logits = self.net(seen.contiguous(memory_format=torch.channels_last))
            loss = masked_loss(logits.float(), target, valid, self.settings)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if self.device != "cpu" and step in {warm - 1, count + warm - 1}:
                torch.cuda.synchronize()
            if step >= warm:
                total, waited, patches = total + time.perf_counter() - begun, waited + ready - begun, patches + len(x)
        return total, waited, patches


# --------------------------------------------------------------------------------------------- what a step waits for
def published_batches(
    cubes: dict[str, Path], ids: list[str], chosen: np.ndarray, size: int, table: pd.DataFrame, batch: int, device: str
) -> Any:
    """Batches the way that the published data set makes them: from the files, patch by patch, on the host, then copied
    to the device."""
    for first in range(0, len(chosen), batch):
        layers = []
        for number, row, col in chosen[first : first + batch]:
            with open_cube(cubes[ids[number]]) as cube:
                shape = (cube.sizes["y"], cube.sizes["x"])
                top, left = patch_corner(row, col, shape, size)
                window = cube.isel(y=slice(top, top + size), x=slice(left, left + size)).load()
                stack, valid = channel_stack(window, CHANNELS)
                rest = [(0, size - n) for n in valid.shape]  # of a grid smaller than a patch
                stack = np.pad(stack, [(0, 0), *rest], constant_values=np.nan)
                ice, valid = (np.pad(a, rest) for a in (cube_mask(window, "any_glacier"), valid))
                layers.append((normalize(stack, CHANNELS, table), ice, valid))
        x, target, valid = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*layers))
        yield x, target[:, None].float(), valid[:, None].float()


def demo_cubes(home: Path) -> dict[str, Path]:
    folder = home / "demo" / "cubes" / "year=2015"
    return {p.stem: p for p in sorted(folder.glob("*.nc"))}


def sources(home: Path | None, folder: Path, options: argparse.Namespace) -> int:
    """A step of both networks with each source of batches; on the demo's cubes where there are some."""
    from dl4gam_assets.segmentation import normalization_statistics, pack_cubes

    cubes = demo_cubes(home) if home else {}
    if not cubes:
        print("no demo store (--home): the published way is left out, which needs cubes\n")
        packed, table = synthetic(folder, 24), statistics()
    else:
        packed = pack_cubes(cubes, CHANNELS, folder / "packed")
        table = normalization_statistics(
            ((packed.stack(g), packed.glacier(g).valid) for g in packed.ids[:12]), CHANNELS
        )
    ids = packed.ids
    for label, model, size, batch, steps in (
        ("demo network, 64 px, batch 8", load_region("demo").model, 64, 8, options.steps),
        ("paper's network, 256 px, batch 16", PAPER, 256, 16, options.paper_steps and max(options.paper_steps // 4, 2)),
    ):
        if not steps:
            continue
        training = TrainingSettings(patch_px=size, train_patches=batch * (steps + 1), train_step_px=16)
        chosen = draw_patches(packed, ids, training, seed=1)[: batch * (steps + 1)]
        pieces = [(c, np.zeros(len(c), dtype=int)) for c in np.array_split(chosen, math.ceil(len(chosen) / batch))]
        normalizer = Normalizer.of(packed, table, options.device)
        print(f"{label}: {len(pieces) - 1} steps, {options.device}, {options.threads or default_workers()} threads")
        print(f"  {'data':<15} {'precision':<9} {'ms a step':>9} {'data ms':>8} {'data':>6} {'ratio':>6}")
        baseline = None
        for kind in (["published"] if cubes else []) + ["mapped", "resident"]:
            for low in (False, True):
                run = Steps(model, options.device, low)
                if kind == "published":
                    stream = published_batches(cubes, ids, chosen, size, table, batch, options.device)
                else:
                    source = patch_source(packed, ids, size, options.device, kind)
                    stream = batches(source, pieces, options.device)
                n = len(pieces) - 1
                total, waited, _ = run.run(stream, n, 1, None if kind == "published" else normalizer)
                baseline = baseline or total
                print(
                    f"  {kind:<15} {'bf16' if low else 'fp32':<9} {1e3 * total / n:9.1f} {1e3 * waited / n:8.2f} "
                    f"{waited / total:6.1%} {baseline / total:6.2f}"
                )
        if cubes:
            first = next(published_batches(cubes, ids, chosen[:batch], size, table, batch, "cpu"))
            for kind in ("mapped", "resident"):
                x, target, valid = patch_source(packed, ids, size, options.device, kind).batch(
                    chosen[:batch], np.zeros(batch, dtype=int)
                )
                apart = (normalizer(x).cpu() - first[0]).abs().max().item()
                # Indices and aspects are packed in steps of 1/32000.
                if apart > 1e-3 or not torch.equal(target.cpu(), first[1]) or not torch.equal(valid.cpu(), first[2]):
                    print(f"the batch of {kind} differs from that of the published way by {apart}")
                    return 1
            print("  same batches: yes")
        print()
    return 0


# --------------------------------------------------------------------------------------------- derived on the device
#: Indices and the two bands that each is made of.
INDICES = {"ndvi": ("nir", "red"), "ndwi": ("green", "nir"), "ndsi": ("green", "swir16")}


def derived() -> None:
    """A batch of 16 packed channels (33 bytes a pixel with its masks) against one of 12 raw layers (25), of which
    indices, sine and cosine of the aspect are made in the batch: processor time to cut and normalize, in turns."""
    torch.set_num_threads(1)
    rng, side = np.random.default_rng(0), 700
    raw_names = [c for c in CHANNELS if c not in INDICES and c not in {"sin_aspect", "cos_aspect"}] + ["aspect"]
    layers = rng.integers(1, 9000, (len(CHANNELS), side, side), dtype=np.int16)
    steps = torch.full((len(CHANNELS), 1, 1), 1e-4)

    def cut(count: int, size: int, batch: int, k: int) -> torch.Tensor:
        corners = np.random.default_rng(k).integers(0, side - size, (batch, 2))
        return torch.from_numpy(np.stack([layers[:count, r : r + size, c : c + size] for r, c in corners]))

    def normal(digits: torch.Tensor) -> torch.Tensor:
        values = (digits.float() * steps[: digits.shape[1]] - 0.1) / 0.7
        return torch.where(digits == -32768, 0.0, values)

    def packed(size: int, batch: int, k: int) -> torch.Tensor:
        return normal(cut(len(CHANNELS), size, batch, k))

    def from_raw(size: int, batch: int, k: int) -> torch.Tensor:
        digits = cut(len(raw_names), size, batch, k)
        missing, values = digits == -32768, digits.float() * 1e-4
        made = []
        for pair in INDICES.values():
            a, b = (raw_names.index(name) for name in pair)
            total = values[:, a] + values[:, b]
            index = ((values[:, a] - values[:, b]) / torch.where(total == 0, 1.0, total)).clamp(-1, 1)
            made.append(torch.where(missing[:, a] | missing[:, b], 0.0, index))
        angle = digits[:, -1].float() * (0.05 * math.pi / 180)
        made += [angle.sin(), angle.cos()]
        return torch.cat([normal(digits[:, :-1]), torch.stack(made, dim=1)], dim=1)

    print("cutting and normalizing a batch, processor time of one thread, median")
    for size, batch, count in ((64, 8, 60), (256, 16, 12)):
        spent: dict[str, list[float]] = {"packed": [], "from raw": []}
        for k in range(count):
            for name, make in (("packed", packed), ("from raw", from_raw)):
                begun = time.process_time()
                make(size, batch, k)
                spent[name].append(time.process_time() - begun)
        a, b = (1e3 * float(np.median(values)) for values in spent.values())
        print(f"  {batch} of {size} px: packed {a:7.2f} ms, derived of raw layers {b:7.2f} ms, ratio {b / a:.2f}")
    print()


# --------------------------------------------------------------------------------------------- members side by side
def one_member(folder: str, seed: int, threads: int, device: str, patches: int) -> float:
    """Patches a second of one member over one epoch."""
    region = load_region("demo")
    training = region.training.model_copy(update={"epochs": 1, "train_patches": patches})
    packed = PackedCubes.open(Path(folder))
    with tempfile.TemporaryDirectory() as work:
        trained = train_member(
            packed, packed.ids[:-1], [], statistics(), region.model, training, seed=seed, device=device,
            work_dir=Path(work), threads=threads,
        )  # fmt: skip
    return float(trained.history["patches_per_second"].iloc[0])


def members(folder: Path, options: argparse.Namespace) -> None:
    """The same members one after the other with all threads, and side by side."""
    packed = synthetic(folder, 24)
    cores, n = default_workers(), options.members
    print(f"{n} members of the demo's network, one epoch of {options.member_patches} patches, {cores} cores")
    rates = [one_member(str(packed.folder), s, cores, options.device, options.member_patches) for s in range(n)]
    alone = float(np.mean(rates))
    print(f"  one at a time, {cores} threads: {alone:8.0f} patches a second")
    if n > 1:
        mapper = Mapper(min(n, cores))
        warm = [(f"w{k}", (str(packed.folder), k, 1, options.device, 16)) for k in range(n)]
        list(mapper.map(one_member, warm))
        tasks = [(str(k), (str(packed.folder), k, max(cores // n, 1), options.device, options.member_patches))
                 for k in range(n)]  # fmt: skip
        together = sum(d.value for d in mapper.map(one_member, tasks))
        close_clusters()
        each = max(cores // n, 1)
        print(f"  {n} at once, {each} threads each: {together:6.0f} patches a second, ratio {together / alone:.2f}")
    print()


# --------------------------------------------------------------------------------------------- the paper's ensemble
def paper(folder: Path, options: argparse.Namespace) -> None:
    """Time of the paper's 50 members from the steps of one, on cubes of the Alps' size."""
    start = time.perf_counter()
    packed = synthetic(folder, options.glaciers)
    size = packed.size_bytes(packed.ids) / 2**30
    print(f"paper's network on {options.glaciers} synthetic glaciers, {size:.2f} GiB packed "
          f"(made in {time.perf_counter() - start:.0f} s); {options.device}")  # fmt: skip
    chosen = draw_patches(packed, packed.ids, TrainingSettings(), seed=1)
    rng = np.random.default_rng(0)
    warm = 1 if options.device == "cpu" else 8
    count = options.paper_steps
    normalizer = Normalizer.of(packed, statistics(), options.device)
    titles = ("ms a step", "patches/s", "data", "a member", "50 members", "ratio")
    print(f"  {'precision':<10} " + " ".join(f"{t:>{w}}" for t, w in zip(titles, (9, 9, 6, 10, 11, 6))))
    first = None
    for low in (False, True):
        order = rng.permutation(len(chosen))
        pieces = [(chosen[p], np.zeros(len(p), dtype=int)) for p in np.array_split(order, len(chosen) // 16)]
        source = patch_source(packed, packed.ids, 256, options.device, options.data)
        run = Steps(PAPER, options.device, low)

        def stream(source: Any = source, pieces: Any = pieces) -> Any:
            return batches(source, (pieces[k % len(pieces)] for k in range(count + warm)), options.device)

        total, waited, patches = run.run(stream(), count, warm, normalizer)
        rate = patches / total
        hours = EPOCH_PATCHES * EPOCHS / rate / 3600
        first = first or rate
        print(
            f"  {'bf16' if low else 'fp32':<10} {1e3 * total / count:9.1f} {rate:9.1f} {waited / total:6.1%} "
            f"{hours:8.2f} h {hours * MEMBERS:9.1f} h {rate / first:6.2f}"
        )
    if options.profile:  # after the clock has stopped: profiling slows the steps down
        profiled(run, stream(), count, warm, normalizer)
    print()


def profiled(run: Steps, stream: Any, count: int, warm: int, normalizer: Normalizer) -> None:
    """Where the time of bf16 steps goes, by operator."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.device != "cpu" else [])
    with profile(activities=kinds) as found:
        run.run(stream, min(count, 10), warm, normalizer)
    by = "self_cpu_time_total" if run.device == "cpu" else "self_device_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--home", type=Path, default=os.environ.get("DL4GAM_HOME"), help="a store with the demo")
    parser.add_argument("--steps", type=int, default=30, help="of the demo's network; 0: leave out")
    parser.add_argument("--paper-steps", type=int, default=8, help="of the paper's network; 0: leave out")
    parser.add_argument("--glaciers", type=int, default=64, help="of the paper's ensemble; 1593 are the Alps")
    parser.add_argument("--members", type=int, default=2, help="side by side; 0: leave out")
    parser.add_argument("--member-patches", type=int, default=512)
    parser.add_argument(
        "--data", default="auto", choices=["auto", "mapped", "resident"], help="of the paper's ensemble"
    )
    parser.add_argument("--derived", action="store_true", help="only: indices and aspects packed, or made in the batch")
    parser.add_argument("--profile", action="store_true", help="where the time of the paper's network goes")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.derived:
        derived()
        return 0
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("a", "b", "c"):
            (Path(scratch) / name).mkdir()
        home = Path(options.home) if options.home else None
        if options.steps or options.paper_steps:
            code = sources(home, Path(scratch) / "a", options)
        if options.members:
            members(Path(scratch) / "b", options)
        if options.paper_steps:
            paper(Path(scratch) / "c", options)
    return code


if __name__ == "__main__":
    sys.exit(main())
