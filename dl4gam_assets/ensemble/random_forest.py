"""A Random Forest on the channels of the networks: what they see, pixel by pixel, without any neighbourhood.

Belongs here: its training pixels, fitting, the file of its trees, prediction. Does not belong here: evaluation.

The trees are stored as arrays (safetensors) and walked by a few lines of our own. Pickle, the only format that
scikit-learn writes, runs whatever a file holds and breaks between versions; fitting anew wherever a forest is used
would read a fold's training cubes again in every process. scikit-learn is needed to fit only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dl4gam_assets.settings import BaselineSettings

METHOD = "random forest"
_ARRAYS = ("fill", "feature", "threshold", "children", "value", "roots")
_CHUNK = 4096  # pixels walked at once: they and a tree stay in the cache


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees as arrays, all nodes in one line; a leaf is its own child.

    ``fill`` float32 (C,): what stands for a missing channel; ``feature`` int32 and ``threshold`` float32 (N,): left
    where the channel is at most the threshold; ``children`` int32 (N, 2): left and right; ``value`` float32 (N,): share
    of ice in a leaf; ``roots`` int32 (T,).
    """

    channels: tuple[str, ...]
    fill: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    children: np.ndarray
    value: np.ndarray
    roots: np.ndarray

    def probability(self, stack: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Mean share of ice over the trees, float32 (H, W); NaN outside ``where``.

        Parameters
        ----------
        stack : float array (C, H, W), raw channels, NaN where missing
        where : bool (H, W)

        Raises
        ------
        ValueError
            if the stack has another number of channels.
        """
        if len(stack) != len(self.channels):
            raise ValueError(f"the forest was fitted on {len(self.channels)} channels, not on {len(stack)}")
        pixels = _filled(stack[:, where].T, self.fill)
        out = np.full(where.shape, np.nan, dtype=np.float32)
        out[where] = self._walk(pixels)
        return out

    def _walk(self, pixels: np.ndarray) -> np.ndarray:
        feature, children = self.feature.astype(np.intp), self.children.astype(np.intp).ravel()
        leaf = children[::2] == np.arange(len(feature))
        total = np.zeros(len(pixels), dtype=np.float32)
        for first in range(0, len(pixels), _CHUNK):
            values = np.ascontiguousarray(pixels[first : first + _CHUNK])
            flat, starts = values.ravel(), np.arange(len(values)) * values.shape[1]
            for root in self.roots:
                node = np.full(len(values), root, dtype=np.intp)
                walking = np.arange(len(values)) if not leaf[root] else np.empty(0, dtype=np.intp)
                while len(walking):
                    at = node.take(walking)
                    right = flat.take(starts.take(walking) + feature.take(at)) > self.threshold.take(at)
                    at = children.take(2 * at + right)
                    node[walking] = at
                    walking = walking[~leaf.take(at)]
                total[first : first + _CHUNK] += self.value.take(node)
        return total / np.float32(len(self.roots))

    def save(self, path: Path) -> str:
        """Write the arrays (safetensors); returns the SHA-256 of the file."""
        from safetensors.numpy import save

        content = save({name: getattr(self, name) for name in _ARRAYS}, {"channels": json.dumps(list(self.channels))})
        path.write_bytes(content)
        return hashlib.sha256(content).hexdigest()


def load_forest(path: Path, channels: Sequence[str] | None = None) -> Forest:
    """A stored forest.

    Raises
    ------
    ValueError
        if the file is no forest, or of other channels than ``channels``.
    """
    from safetensors import SafetensorError, safe_open

    again = "materialize band_ratio_baseline of its fold again"
    try:
        with safe_open(path, framework="numpy") as source:
            found = tuple(json.loads((source.metadata() or {})["channels"]))
            arrays = {name: source.get_tensor(name) for name in _ARRAYS}
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no stored forest ({error}): {again}") from error
    if channels is not None and found != tuple(channels):
        raise ValueError(f"{path} was fitted on the channels {list(found)}, not on {list(channels)}: {again}")
    return Forest(channels=found, **arrays)


def sample_pixels(
    stack: np.ndarray, usable: np.ndarray, target: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Training pixels of one glacier: ``count`` drawn without repetition, or all usable ones where there are fewer.

    The same count for each glacier of a fold balances them, however large they are.

    Parameters
    ----------
    stack : float array (C, H, W), raw channels, NaN where missing
    usable, target : bool (H, W)

    Returns
    -------
    channels float32 (N, C) with NaN where missing, and labels bool (N,)
    """
    places = np.flatnonzero(usable)
    chosen = np.sort(rng.choice(places, size=min(count, len(places)), replace=False))
    return stack.reshape(len(stack), -1)[:, chosen].T.astype(np.float32), target.ravel()[chosen].astype(bool)


def fit_forest(
    x: np.ndarray, y: np.ndarray, channels: Sequence[str], settings: BaselineSettings, seed: int, threads: int = 1
) -> Forest:
    """Fit a Random Forest (Breiman 2001, doi:10.1023/A:1010933404324) with scikit-learn's defaults for classification.

    The same seed gives the same forest whatever the number of threads. A missing channel is its mean.

    Parameters
    ----------
    x : float32 (N, C), NaN where missing
    y : bool (N,), ice

    Raises
    ------
    ValueError
        if there is no pixel.
    """
    if not len(y):
        raise ValueError("no usable training pixel to fit a Random Forest on")
    from sklearn.ensemble import RandomForestClassifier

    known = np.isfinite(x)
    sums = np.where(known, x, 0).sum(axis=0, dtype=np.float64)
    fill = (sums / np.maximum(known.sum(axis=0), 1)).astype(np.float32)
    model = RandomForestClassifier(
        settings.trees, min_samples_leaf=settings.min_leaf_px, random_state=seed, n_jobs=max(threads, 1)
    ).fit(_filled(x, fill), np.asarray(y, dtype=bool))
    ice = list(model.classes_).index(True) if True in model.classes_ else None
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("feature", "threshold", "children", "value")}
    roots, offset = [], 0
    for tree in (estimator.tree_ for estimator in model.estimators_):
        leaf, own = tree.children_left < 0, np.arange(tree.node_count)
        counts = tree.value[:, 0, :]
        parts["feature"].append(np.where(leaf, 0, tree.feature))
        parts["threshold"].append(_at_most(tree.threshold))
        sides = [np.where(leaf, own, side) + offset for side in (tree.children_left, tree.children_right)]
        parts["children"].append(np.stack(sides, axis=1))
        parts["value"].append(np.zeros(len(own)) if ice is None else counts[:, ice] / counts.sum(axis=1))
        roots.append(offset)
        offset += tree.node_count
    kinds = {"feature": np.int32, "threshold": np.float32, "children": np.int32, "value": np.float32}
    arrays = {name: np.concatenate(found).astype(kinds[name]) for name, found in parts.items()}
    return Forest(channels=tuple(channels), fill=fill, roots=np.array(roots, dtype=np.int32), **arrays)


def _filled(pixels: np.ndarray, fill: np.ndarray) -> np.ndarray:
    values = np.asarray(pixels, dtype=np.float32)
    out: np.ndarray = np.where(np.isfinite(values), values, fill)
    return out


def _at_most(threshold: np.ndarray) -> np.ndarray:
    """float64 thresholds as the largest float32 not above them: float32 values compare with both alike."""
    rounded = threshold.astype(np.float32)
    out: np.ndarray = np.where(rounded > threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return out
