"""Networks: the published U-Net and everything else that segmentation-models-pytorch builds.

Belongs here: construction and initial weights. Does not belong here: training, files.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dl4gam_assets.segmentation._compat import import_smp
from dl4gam_assets.settings import ModelSettings, SettingsError


def build_model(settings: ModelSettings, *, pretrained: bool = True) -> torch.nn.Module:
    """A network that maps (B, C, H, W) float32 to logits (B, 1, H, W); H and W are multiples of 32.

    The published one is a U-Net with a ResNet-34 encoder of depth 5, a decoder without batch norm and one class. With
    ``pretrained`` the encoder starts from ``settings.encoder_weights``: a named set that segmentation-models-pytorch
    downloads (its first convolution is adapted to C channels), a local .safetensors file of encoder weights, or none.

    Raises
    ------
    SettingsError
        if there is no such architecture, encoder or weights file.
    """
    smp = import_smp()
    weights = settings.encoder_weights if pretrained else None
    local = Path(weights).expanduser() if weights and weights.endswith(".safetensors") else None
    options = {"decoder_use_norm": False} if settings.architecture.lower() in {"unet", "unetplusplus", "linknet"} else {}
    if settings.architecture.lower() in {"unet", "unetplusplus"}:
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
    except (KeyError, ValueError, TypeError) as error:
        raise SettingsError(
            f"model: segmentation-models-pytorch can not build {settings.architecture} with encoder {settings.encoder} "
            f"of depth {settings.encoder_depth}: {error}"
        ) from error
    if local:
        _load_encoder(model, local, len(settings.channels))
    return model  # type: ignore[no-any-return]


def _load_encoder(model: torch.nn.Module, path: Path, channels: int) -> None:
    from safetensors.torch import load_file

    if not path.is_file():
        raise SettingsError(f"model.encoder_weights: {path} does not exist")
    wanted = model.encoder.state_dict()
    state = {k: v for k, v in load_file(path).items() if k in wanted}
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            if value.ndim != 4 or wanted[name].shape[1] != channels:
                raise SettingsError(f"model.encoder_weights: {path} does not fit: {name} is {tuple(value.shape)}")
            # The first convolution: repeat the known channels, keeping the sum of the weights.
            repeats = [value[:, i % value.shape[1]] for i in range(channels)]
            state[name] = torch.stack(repeats, dim=1) * (value.shape[1] / channels)
    missing = [k for k in wanted if k not in state and "num_batches_tracked" not in k]
    if missing:
        raise SettingsError(f"model.encoder_weights: {path} lacks {missing[0]} and {len(missing) - 1} more")
    model.encoder.load_state_dict(state, strict=False)
