"""Networks: the published U-Net and everything else that segmentation-models-pytorch builds.

Belongs here: construction and initial weights. Does not belong here: training, files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dl4gam_assets.segmentation._compat import import_smp
from dl4gam_assets.settings import ModelSettings, SettingsError


def build_model(settings: ModelSettings, *, pretrained: bool = True) -> torch.nn.Module:
    """A network that maps (B, C, H, W) float32 to logits (B, 1, H, W); H and W are multiples of 32.

    The published one is a U-Net with a ResNet-34 encoder of depth 5, a decoder without batch norm and one class. With
    ``pretrained`` the encoder starts from ``settings.encoder_weights``: a named set that segmentation-models-pytorch
    downloads, a local .safetensors file of encoder weights (or of a whole network, such as another member), or none. A
    first convolution for another number of channels is adapted: its channels repeat, scaled to keep the sum.

    Raises
    ------
    SettingsError
        if there is no such architecture, encoder or weights file.
    """
    smp = import_smp()
    weights = settings.encoder_weights if pretrained else None
    local = settings.encoder_weights_file if pretrained else None
    name = settings.architecture.lower()
    options: dict[str, Any] = {}
    if name in {"unet", "unetplusplus", "linknet"}:
        options["decoder_use_norm"] = False
    if name in {"unet", "unetplusplus"}:
        options["decoder_channels"] = list(settings.decoder_channels)
    try:
        model = smp.create_model(
            settings.architecture,
            encoder_name=settings.encoder,
            encoder_depth=settings.encoder_depth,
            encoder_weights=None if local else weights,
            in_channels=len(settings.channels),
            classes=1,
            **options,
        )
    except OSError as error:
        raise SettingsError(
            f"model.encoder_weights: the weights {weights!r} of {settings.encoder} could not be downloaded "
            f"({' '.join(str(error).split())[:200]}); set it to a local .safetensors file, or to null (random weights)"
        ) from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise SettingsError(
            f"model: segmentation-models-pytorch can not build {settings.architecture} with encoder {settings.encoder} "
            f"of depth {settings.encoder_depth}: {error}"
        ) from error
    if local:
        _load_encoder(model, local, len(settings.channels))
    return model  # type: ignore[no-any-return]


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """The same network with its weights laid out channels last, which convolutions run faster with."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _load_encoder(model: torch.nn.Module, path: Path, channels: int) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise SettingsError(f"model.encoder_weights: {path} does not exist")
    encoder = model.get_submodule("encoder")
    wanted = encoder.state_dict()
    try:
        loaded = {k.removeprefix("encoder."): v for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise SettingsError(f"model.encoder_weights: {path} is no safetensors file: {error}") from error
    state = {k: v for k, v in loaded.items() if k in wanted}
    for name, value in state.items():
        have, want = tuple(value.shape), tuple(wanted[name].shape)
        if have != want:
            first = len(have) == len(want) == 4 and want[1] == channels and (have[0], *have[2:]) == (want[0], *want[2:])
            if not first:
                raise SettingsError(f"model.encoder_weights: {path} does not fit: {name} is {have}, not {want}")
            # The first convolution: repeat the known channels, keeping the sum of the weights.
            repeats = [value[:, i % value.shape[1]] for i in range(channels)]
            state[name] = torch.stack(repeats, dim=1) * (value.shape[1] / channels)
    missing = [k for k in wanted if k not in state and "num_batches_tracked" not in k]
    if missing:
        raise SettingsError(f"model.encoder_weights: {path} lacks {missing[0]} and {len(missing) - 1} more")
    encoder.load_state_dict(state, strict=False)
