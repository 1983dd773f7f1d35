"""Published Lightning checkpoints as members of ours: weights alone, read without running anything, and proven.

Belongs here: finding ``split_<i>/seed_<s>/.../ckpt-*.ckpt``, reading weights and settings, the order of channels, the
comparison with the network as its authors built it. Does not belong here: the store, training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
import yaml

from dl4gam_assets.published.layout import PublishedFileError, channel_name
from dl4gam_assets.segmentation._compat import import_smp
from dl4gam_assets.segmentation.model import build_model
from dl4gam_assets.settings import ModelSettings, SettingsError

#: What stands before the names of the network's weights.
PREFIX = "model.seg_model."
#: Largest difference between the probabilities of the published network and of ours on the golden input.
TOLERANCE = 1e-5
_PLACE = re.compile(r"split_(\d+)/seed_(\d+)/(?:.*/)?checkpoints/[^/]+\.ckpt$")
_EPOCH = re.compile(r"epoch=(\d+)")
_SCORE = re.compile(r"JaccardIndex_val_epoch_avg_per_g=(\d+(?:\.\d+)?)")
_GOLDEN_PX, _GOLDEN_SEED = 64, 20251


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint of a folder: its iteration and seed, what its name says, and how many of lower score lie there."""

    split: int
    seed: int
    path: Path
    settings: Path | None
    epoch: int | None
    validation_iou: float | None
    set_aside: int = 0


def find_checkpoints(folder: Path) -> list[PublishedCheckpoint]:
    """The best checkpoint of each iteration and seed below a folder (``last.ckpt`` is not it).

    Where several lie in a folder, or in several versions of a seed, the one with the highest score in its name is it.

    Raises
    ------
    PublishedFileError
        if there is none, or several of one iteration and seed of which one states no score, or two the highest.
    """
    if not folder.is_dir():
        raise PublishedFileError(f"{folder} is no folder: name the one that holds split_<i>/seed_<s>/")
    found: dict[tuple[int, int], list[PublishedCheckpoint]] = {}
    for path in sorted(folder.rglob("*.ckpt")):
        match = _PLACE.search(path.as_posix())
        if match is None or path.name.startswith(("last", ".")):
            continue
        split, seed = int(match[1]), int(match[2])
        epoch, score = _EPOCH.search(path.stem), _SCORE.search(path.stem)
        beside = path.parent.parent / "settings.yaml"
        one = PublishedCheckpoint(
            split, seed, path, beside if beside.is_file() else None, int(epoch[1]) if epoch else None,
            float(score[1]) if score else None,
        )  # fmt: skip
        found.setdefault((split, seed), []).append(one)
    if not found:
        raise PublishedFileError(f"{folder} holds no split_<i>/seed_<s>/.../checkpoints/ckpt-*.ckpt")
    return [_best(found[key]) for key in sorted(found)]


def _best(ones: Sequence[PublishedCheckpoint]) -> PublishedCheckpoint:
    scores = [one.validation_iou for one in ones]
    ranked = sorted((s for s in scores if s is not None), reverse=True)
    if len(ones) > 1 and (None in scores or ranked[0] == ranked[1]):
        raise PublishedFileError(
            f"split_{ones[0].split}/seed_{ones[0].seed} has several checkpoints ({ones[0].path}, {ones[1].path}), and "
            "their names do not say which one is the best: keep one"
        )
    return replace(ones[scores.index(ranked[0])] if ranked else ones[0], set_aside=len(ones) - 1)


# Lightning keeps the arguments of a module (``hyper_parameters``) in its checkpoints, often with paths and numbers of
# numpy. Whatever a pickle calls by these names is one of ours: paths that touch no file, numbers of Python. Nothing of
# numpy or of the file system is called, so it does not matter what a file hands to them.
_PATHS = {"PosixPath": PurePosixPath, "PurePosixPath": PurePosixPath,
          "WindowsPath": PureWindowsPath, "PureWindowsPath": PureWindowsPath}  # fmt: skip
_NUMBER = re.compile(r"b1|[iu][1248]|f[248]|c(?:8|16)")


class _Dtype:
    """In place of ``numpy.dtype``: remembers which number it is."""

    def __init__(self, name: object, *_: object):
        self.name, self.order = str(name), "="

    def __setstate__(self, state: Sequence[object]) -> None:
        self.order = ">" if len(state) > 1 and state[1] == ">" else "<"


def _scalar_of(module: str) -> Callable[..., Any]:
    """In place of ``numpy.core.multiarray.scalar``: a number of Python from its bytes."""

    def scalar(dtype: object, content: object) -> Any:
        if not isinstance(dtype, _Dtype) or not _NUMBER.fullmatch(dtype.name) or not isinstance(content, bytes):
            raise ValueError("it holds a scalar of numpy that is no number")
        return np.frombuffer(content, dtype.order + dtype.name)[0].item()

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


def _stand_ins() -> list[Any]:
    """What torch's restricted loader calls instead, under the names that pickles have for it."""
    made: list[Any] = [
        type(name, (pure,), {"__module__": module, "__slots__": ()})
        for module in ("pathlib", "pathlib._local")
        for name, pure in _PATHS.items()
    ]
    made.append(type("dtype", (_Dtype,), {"__module__": "numpy"}))
    return made + [_scalar_of(module) for module in ("numpy.core.multiarray", "numpy._core.multiarray")]


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The network's weights of a Lightning checkpoint by the names of segmentation-models-pytorch, and its plain facts
    (epoch, global_step, Lightning's version).

    The file is read by torch's restricted loader (``weights_only``), which makes tensors and plain containers and runs
    nothing. Paths and numbers of numpy, which Lightning keeps with the arguments of a module, become plain paths and
    numbers. A checkpoint that holds anything else is refused.

    Raises
    ------
    PublishedFileError
        if it is damaged, holds other objects, or no weights behind ``model.seg_model.``, or any that are no numbers.
    """
    try:
        with torch.serialization.safe_globals(_stand_ins()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have errors of their own
        text = " ".join(str(error).split())
        named = re.search(r"(?:GLOBAL|global) (\S+)", text)
        what = f"it holds {named[1]}, which is no tensor: such a file could run code" if named else text[:200]
        raise PublishedFileError(f"checkpoint {path} is not read: {what}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise PublishedFileError(f"checkpoint {path} is not Lightning's: it has no state_dict")
    weights = {
        str(k).removeprefix(PREFIX): v
        for k, v in state.items()
        if str(k).startswith(PREFIX) and isinstance(v, torch.Tensor)
    }
    if not weights:
        first = ", ".join(map(str, list(state)[:3]))
        raise PublishedFileError(f"checkpoint {path} has no weights {PREFIX}*; it has {first}")
    broken = next((k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if broken is not None:
        raise PublishedFileError(f"checkpoint {path}: {broken} holds values that are no numbers")
    facts = {k: content[k] for k in ("epoch", "global_step", "pytorch-lightning_version") if k in content}
    return weights, {k: v for k, v in facts.items() if isinstance(v, int | float | str)}


def read_settings(path: Path | None, *, split: int | None = None, seed: int | None = None) -> dict[str, Any]:
    """The part ``model`` of a published settings.yaml; empty without a file.

    Parameters
    ----------
    split, seed : of its folder, which its ``data.split`` and ``task.seed`` must be where it has them

    Raises
    ------
    PublishedFileError
        if it is no plain YAML, has no ``model``, or is of another iteration or seed.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise PublishedFileError(f"settings {path} can not be read: {' '.join(str(error).split())[:200]}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise PublishedFileError(f"settings {path} have no part `model`")
    for part, key, wanted in (("data", "split", split), ("task", "seed", seed)):
        within = content.get(part)
        stated = within.get(key) if isinstance(within, dict) else None
        if wanted is not None and stated is not None and str(stated).removeprefix("split_") != str(wanted):
            raise PublishedFileError(
                f"settings {path} are of {part}.{key} {stated}, its folder is of {key} {wanted}: is it another "
                "checkpoint's?"
            )
    return model


def channels_of(
    model: dict[str, Any], where: object = "settings.yaml", indices: Sequence[str] = ("NDVI", "NDWI", "NDSI")
) -> list[str]:
    """Our names of a checkpoint's channels in its order, from the part ``model`` of its settings.

    Bands come first, then the optical indices, DEM, its features, dh/dt and velocity. Lists say their own order. Where
    the settings only say ``true`` it is ``indices``, and slope, aspect_sin, aspect_cos, planform_curvature,
    profile_curvature, terrain_ruggedness_index. Without settings: the 16 published channels.

    Versions of the published code differ in the order of the indices (NDVI, NDWI, NDSI; and NDSI, NDVI, NDWI), so an
    import tries the orders on validation glaciers.

    Raises
    ------
    PublishedFileError
        if the settings name no bands.
    """
    inputs = model.get("inputs")
    if not model:
        inputs = {"bands_input": ["R", "G", "B", "NIR", "SWIR"], "optical_indices": True, "dem": True,
                  "dem_features": True, "dhdt": True}  # fmt: skip
    if not isinstance(inputs, dict) or not isinstance(inputs.get("bands_input"), list):
        raise PublishedFileError(f"{where}: model.inputs.bands_input does not list the bands")
    features = (
        "slope", "aspect_sin", "aspect_cos", "planform_curvature", "profile_curvature", "terrain_ruggedness_index"
    )  # fmt: skip

    def of(key: str, default: Sequence[str]) -> list[str]:
        value = inputs.get(key)
        return [str(v) for v in value] if isinstance(value, list) else list(default) if value else []

    theirs = [str(b) for b in inputs["bands_input"]] + of("optical_indices", indices)
    theirs += of("dem", ["dem"]) + of("dem_features", features) + of("dhdt", ["dhdt"]) + of("velocity", ["v"])
    return [channel_name(name) for name in theirs]


def adopt(
    weights: dict[str, torch.Tensor], model: dict[str, Any], source: Sequence[str], settings: ModelSettings,
    where: object = "checkpoint",
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Weights for our network of ``settings``, proven on a golden input.

    The published network ends in a sigmoid and ours in the logits before it. Where the channels come in another order,
    the first convolution's inputs are put in ours, which changes nothing else. Then both networks see the same input,
    drawn from a fixed seed, and their probabilities must agree.

    Parameters
    ----------
    weights : from :func:`read_weights`
    model : from :func:`read_settings`
    source : our names of the checkpoint's channels in its order

    Returns
    -------
    state : weights for ``build_model(settings)``
    proof : channel order, hash of the golden input, mean, deviation and hash of the probabilities, the largest
        difference, and by channel the mean change of the probability when it is set to zero

    Raises
    ------
    PublishedFileError
        if the network is of another architecture, the channels are others, or the probabilities differ.
    """
    args = model.get("args") if isinstance(model.get("args"), dict) else {}
    assert isinstance(args, dict)
    name, encoder = str(model.get("name", settings.architecture)), str(args.get("encoder_name", settings.encoder))
    if (name.lower(), encoder) != (settings.architecture.lower(), settings.encoder):
        raise PublishedFileError(
            f"{where}: the network is {name} with {encoder}, the region's is {settings.architecture} with "
            f"{settings.encoder} (model.architecture, model.encoder)"
        )
    if args.get("activation", "sigmoid") != "sigmoid":
        raise PublishedFileError(f"{where}: the network ends in {args['activation']!r}, not in a sigmoid")
    if sorted(source) != sorted(settings.channels):
        lacking, more = sorted(set(settings.channels) - set(source)), sorted(set(source) - set(settings.channels))
        raise PublishedFileError(
            f"{where}: other channels than the region's model.channels: it lacks {lacking or 'none'}, and has "
            f"{more or 'none'} besides"
        )
    ours = build_model(settings, pretrained=False)
    first = next(k for k, v in ours.state_dict().items() if v.ndim == 4)  # in the order of the network: its first layer
    if first not in weights or weights[first].ndim != 4 or weights[first].shape[1] != len(source):
        got = weights[first].shape[1] if first in weights and weights[first].ndim == 4 else "no"
        raise PublishedFileError(f"{where}: its first convolution has {got} inputs, its settings name {len(source)}")
    order = [list(source).index(channel) for channel in settings.channels]
    state = {k: v.clone() for k, v in weights.items()}
    state[first] = weights[first][:, order].contiguous()

    try:
        theirs = _as_published(name, encoder, len(source), settings)
        theirs.load_state_dict(weights)
        ours.load_state_dict(state)
    except (RuntimeError, SettingsError) as error:
        raise PublishedFileError(
            f"{where}: its weights do not fit {name} with {encoder}: {' '.join(str(error).split())[:200]}"
        ) from error
    x = golden_input(len(source))
    with torch.inference_mode():
        wanted = theirs.eval()(x)
        network = ours.eval()
        made = torch.sigmoid(network(x[:, order]))
        gap = float((wanted - made).abs().max())
        if not gap <= TOLERANCE:
            raise PublishedFileError(f"{where}: our network gives other probabilities than theirs (by up to {gap:.2g})")
        response = {}
        for i, channel in enumerate(settings.channels):
            without = x[:, order].clone()
            without[:, i] = 0
            response[channel] = round(float((torch.sigmoid(network(without)) - made).abs().mean()), 6)
    proof = {
        "channels": list(source), "permuted": order != list(range(len(order))),
        "activation": "sigmoid, in the published network; ours gives logits",
        "input_sha256": _sha256(x), "output_sha256": _sha256(wanted.round(decimals=5)),
        "output_mean": round(float(wanted.mean()), 6), "output_std": round(float(wanted.std()), 6),
        "largest_difference": gap, "response": response,
    }  # fmt: skip
    return state, proof


def golden_input(channels: int) -> torch.Tensor:
    """The input (1, C, 64, 64) float32 that checkpoints are compared on: standard normal numbers from a fixed seed."""
    rng = np.random.default_rng(_GOLDEN_SEED)
    return torch.from_numpy(rng.standard_normal((1, channels, _GOLDEN_PX, _GOLDEN_PX)).astype(np.float32))


def _as_published(name: str, encoder: str, channels: int, settings: ModelSettings) -> torch.nn.Module:
    """The network as its authors built it, ending in a sigmoid."""
    smp = import_smp()
    options: dict[str, Any] = {}
    if name.lower() in {"unet", "unetplusplus", "linknet"}:
        options["decoder_use_norm"] = False
    if name.lower() in {"unet", "unetplusplus"}:
        options["decoder_channels"] = list(settings.decoder_channels)
    network: torch.nn.Module = smp.create_model(
        name, encoder_name=encoder, encoder_depth=settings.encoder_depth, encoder_weights=None, in_channels=channels,
        classes=1, activation="sigmoid", **options,
    )  # fmt: skip
    return network


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
