"""The search for the band ratio's thresholds: one histogram pass against one confusion matrix a threshold.

    python benchmarks/baseline.py                     # 20 synthetic glaciers
    python benchmarks/baseline.py --glaciers 5 --side 600

Both search the published grid (51 ratios x 16 blue thresholds) for the best area-weighted IoU on the same pixels, and
must find the same thresholds; the script exits with 1 where they do not. The second way is vectorized within each
threshold (NumPy masks), as one would write it. Also timed: the oracle (each glacier alone) and a Random Forest.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from scipy.ndimage import gaussian_filter

from dl4gam_assets.ensemble import apply_baseline, fit_baseline, fit_forest, fit_oracle, sample_pixels
from dl4gam_assets.ensemble.baseline import BLUES, RATIOS, Sample
from dl4gam_assets.settings import BaselineSettings

BANDS = ["blue", "red", "swir16"]


def glacier(rng: np.random.Generator, side: int) -> Sample:
    """Bright ice that is dark in SWIR, rock, and noise that mixes them."""
    ice = gaussian_filter(rng.normal(size=(side, side)), side / 12) > 0
    levels = {"blue": (0.55, 0.2), "red": (0.5, 0.22), "swir16": (0.08, 0.25)}
    bands = {
        name: np.clip(np.where(ice, a, b) * rng.lognormal(0, 0.5, ice.shape), 0, 1.5).astype(np.float32)
        for name, (a, b) in levels.items()
    }
    return bands, ice, rng.random(ice.shape) < 0.9, float(ice.sum())


def by_threshold(samples: list[Sample]) -> tuple[float, float | None, float]:
    """Every pair of thresholds applied to every glacier."""
    total = np.zeros((len(RATIOS), len(BLUES)))
    for bands, target, valid, weight in samples:
        for i, ratio in enumerate(RATIOS):
            for j, blue in enumerate(BLUES):
                row = {"numerator": "red", "denominator": "swir16", "ratio_threshold": ratio,
                       "blue_threshold": float(blue) if j else None}  # fmt: skip
                mask = apply_baseline(bands, row)
                hit, union = (mask & target & valid).sum(), ((mask | target) & valid).sum()
                total[i, j] += weight * hit / max(union, 1)
    i, j = (int(k) for k in np.unravel_index(int(total.argmax()), total.shape))
    weights = sum(s[3] for s in samples)
    return float(RATIOS[i]), float(BLUES[j]) if j else None, float(total[i, j] / weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glaciers", type=int, default=20)
    parser.add_argument("--side", type=int, default=300, help="pixels of a side")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    samples = [glacier(rng, options.side) for _ in range(options.glaciers)]
    start = time.perf_counter()
    row = fit_baseline(samples, BANDS).iloc[0]
    histogram = time.perf_counter() - start
    start = time.perf_counter()
    ratio, blue, iou = by_threshold(samples)
    matrices = time.perf_counter() - start
    start = time.perf_counter()
    for sample in samples:
        fit_oracle(sample, BANDS)
    oracle = time.perf_counter() - start
    settings = BaselineSettings()
    stacks = [np.stack([s[0][b] for b in BANDS]) for s in samples]
    count = settings.pixels // len(samples)
    drawn = [sample_pixels(x, s[2], s[1], count, rng) for x, s in zip(stacks, samples, strict=True)]
    x, y = (np.concatenate(part) for part in zip(*drawn, strict=True))
    fit_forest(x[:100], y[:100], BANDS, settings, seed=0)  # scikit-learn is imported
    start = time.perf_counter()
    forest = fit_forest(x, y, BANDS, settings, seed=0)
    fitted = time.perf_counter() - start
    start = time.perf_counter()
    for stack, sample in zip(stacks, samples, strict=True):
        forest.probability(stack, sample[2])
    walked = time.perf_counter() - start
    pixels = options.glaciers * options.side**2 / 1e6
    print(
        f"{options.glaciers} glaciers of {options.side} x {options.side} px, {len(RATIOS)} x {len(BLUES)} thresholds\n"
    )
    print("| | seconds | ratio | found |\n|---|---:|---:|---|")
    print(f"| a confusion matrix for each threshold | {matrices:.2f} | 1 | {ratio}, blue {blue}, IoU {iou:.5f} |")
    print(f"| one histogram pass | {histogram:.3f} | {matrices / histogram:.0f} | {row['ratio_threshold']}, "
          f"blue {row['blue_threshold']}, IoU {row['fit_iou']:.5f} |")  # fmt: skip
    print(f"| oracle, each glacier alone | {oracle:.3f} | | |")
    print(f"| Random Forest, fit ({len(y)} pixels, {len(forest.roots)} trees, one thread) | {fitted:.2f} | | |")
    print(f"| Random Forest, {pixels:.1f} million pixels | {walked:.2f} | | {walked / pixels:.1f} us a pixel |")
    same = np.isclose(row["ratio_threshold"], ratio) and (row["blue_threshold"] or None) == blue
    return 0 if same and np.isclose(row["fit_iou"], iou) else 1


if __name__ == "__main__":
    sys.exit(main())
