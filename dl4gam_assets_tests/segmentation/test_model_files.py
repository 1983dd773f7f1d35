"""Networks are built as the settings say, and model files are refused unless everything fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from dl4gam_assets.segmentation import ModelFileError, TrainedMember, _compat, build_model, load_member, save_member
from dl4gam_assets.settings import ModelSettings, SettingsError
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.segmentation.conftest import CHANNELS, MODEL, Small


def test_the_published_network() -> None:
    """ResNet-34 U-Net of depth 5, 16 channels, one class, no batch normalization in the decoder (METHOD section 5)."""
    model = build_model(ModelSettings(), pretrained=False).eval()
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(n.startswith("encoder.") for n in norms)
    assert model.get_parameter("encoder.conv1.weight").shape == (64, 16, 7, 7)
    # 24,436,369 of the library's default with three channels, 13 channels more, biases instead of the decoder's norms.
    assert sum(p.numel() for p in model.parameters()) == 24_436_369 + 13 * 64 * 49 - 992
    with torch.inference_mode():
        assert model(torch.zeros(1, 16, 64, 96)).shape == (1, 1, 64, 96)


@pytest.mark.parametrize(
    ("architecture", "encoder", "depth", "decoder"),
    [
        ("Unet", "timm-mobilenetv3_small_minimal_100", 4, [32, 24, 16, 8]),
        ("UnetPlusPlus", "resnet18", 2, [16, 8]),
        ("FPN", "resnet18", 5, [16] * 5),
    ],
)
def test_other_networks(architecture: str, encoder: str, depth: int, decoder: list[int]) -> None:
    settings = ModelSettings(
        architecture=architecture, encoder=encoder, encoder_depth=depth, decoder_channels=decoder,
        encoder_weights=None, channels=["red", "nir"],
    )  # fmt: skip
    assert build_model(settings).eval()(torch.zeros(1, 2, 64, 64)).shape == (1, 1, 64, 64)


def test_the_library_is_imported_as_often_as_asked() -> None:
    """The operators that torchvision misses are declared once a process; the kill test does so in a fresh one."""
    assert _compat.import_smp() is _compat.import_smp()
    assert len(_compat._DECLARED) <= 1 and hasattr(torch.ops.torchvision, "nms")


# --------------------------------------------------------------------------------------------- encoder weights
RESNET = ModelSettings(
    encoder="resnet18", encoder_depth=2, decoder_channels=[16, 8], encoder_weights=None, channels=CHANNELS
)


def test_local_weights_of_three_channels_are_adapted(tmp_path: Path) -> None:
    source = build_model(RESNET.model_copy(update={"channels": ["red", "green", "blue"]}))
    encoder = source.get_submodule("encoder").state_dict()
    path = tmp_path / "encoder.safetensors"
    save_file({k: v.contiguous() for k, v in encoder.items()}, path)
    model = build_model(RESNET.model_copy(update={"encoder_weights": str(path), "channels": CHANNELS[:7]}))
    got, rgb = model.get_submodule("encoder").state_dict(), encoder["conv1.weight"]
    assert got["conv1.weight"].shape[1] == 7
    torch.testing.assert_close(got["conv1.weight"][:, 4], rgb[:, 1] * 3 / 7)
    assert all(torch.equal(got[k], v) for k, v in encoder.items() if k != "conv1.weight")
    # A picture that is equal in all channels is seen as before where the channels repeat evenly.
    six = build_model(RESNET.model_copy(update={"encoder_weights": str(path), "channels": CHANNELS[:6]}))
    grey = torch.rand(1, 1, 32, 32)
    first = six.get_submodule("encoder.conv1")(grey.expand(1, 6, 32, 32))
    torch.testing.assert_close(first, source.get_submodule("encoder.conv1")(grey.expand(1, 3, 32, 32)))
    # A whole member may be the source too.
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    again = build_model(RESNET.model_copy(update={"encoder_weights": str(path), "channels": ["red", "green", "blue"]}))
    assert torch.equal(again.get_parameter("encoder.conv1.weight"), rgb)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def build(**changes: object) -> None:
        build_model(RESNET.model_copy(update=changes))

    with pytest.raises(SettingsError, match="does not exist"):
        build(encoder_weights=str(tmp_path / "no.safetensors"))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(SettingsError, match="no safetensors file"):
        build(encoder_weights=str(path))
    save_file({"conv1.weight": torch.zeros(64, len(CHANNELS), 3, 3)}, path)
    with pytest.raises(SettingsError, match=r"conv1.weight is \(64, 12, 3, 3\), not \(64, 12, 7, 7\)"):
        build(encoder_weights=str(path))
    save_file({"conv1.weight": torch.zeros(64, len(CHANNELS), 7, 7)}, path)
    with pytest.raises(SettingsError, match="lacks"):
        build(encoder_weights=str(path))
    with pytest.raises(SettingsError, match="can not build"):
        build(encoder="resnet19")
    with pytest.raises(SettingsError, match="can not build"):
        build(architecture="Vnet")


def test_weights_that_can_not_be_downloaded_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=r"local \.safetensors file, or to null"):
        build_model(RESNET.model_copy(update={"encoder_weights": "imagenet"}))


def test_imagenet_weights_of_the_hub_are_adapted_to_all_channels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The published network's way: weights by name from the hub's cache on disk, three channels made sixteen."""
    from huggingface_hub import constants

    from dl4gam_assets.segmentation._compat import import_smp

    smp = import_smp()
    listed = smp.encoders.encoders["resnet34"]["pretrained_settings"]["imagenet"]
    torch.manual_seed(5)
    weights = smp.encoders.get_encoder("resnet34", in_channels=3, weights=None).state_dict()
    folder = tmp_path / f"models--{listed['repo_id'].replace('/', '--')}" / "snapshots" / listed["revision"]
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    published = ModelSettings()
    assert published.encoder_weights == "imagenet" and len(published.channels) == 16
    got = build_model(published).get_submodule("encoder").state_dict()
    first = weights["conv1.weight"]
    assert got["conv1.weight"].shape == (64, 16, 7, 7)
    for channel in range(16):  # they repeat, scaled to keep the sum
        torch.testing.assert_close(got["conv1.weight"][:, channel], first[:, channel % 3] * 3 / 16)
    assert all(torch.equal(got[k], v) for k, v in weights.items() if k != "conv1.weight")


# --------------------------------------------------------------------------------------------- member files
@pytest.fixture
def member(small: Small, tmp_path: Path) -> tuple[Storage, str, torch.nn.Module]:
    torch.manual_seed(0)
    model = build_model(MODEL).eval()
    trained = TrainedMember(
        state={k: v.contiguous() for k, v in model.state_dict().items()},
        history=pd.DataFrame({"epoch": [1], "train_loss": [0.1]}),
        best_epoch=1, validation_iou=0.9, train_patches=8, parameters=1, seed=5,
    )  # fmt: skip
    storage = Storage(tmp_path)
    return storage, save_member(storage, storage.model(1, 1), trained, MODEL, small.statistics, {"tag": "x"}), model


def test_a_member_comes_back_whole(small: Small, member: tuple[Storage, str, torch.nn.Module]) -> None:
    storage, sha256, model = member
    loaded, meta = load_member(storage, storage.model(1, 1), sha256, channels=CHANNELS, statistics=small.statistics)
    x = torch.rand(1, len(CHANNELS), 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))
    assert not loaded.training
    assert (meta["seed"], meta["best_epoch"], meta["tag"], meta["sha256"]) == (5, 1, "x", sha256)
    history = pd.read_parquet(str(storage.model(1, 1) / "history.parquet"))
    assert history["train_loss"].tolist() == [0.1]


def test_a_member_is_used_only_as_it_was_trained(small: Small, member: tuple[Storage, str, torch.nn.Module]) -> None:
    storage, _, _ = member
    folder = storage.model(1, 1)
    with pytest.raises(ModelFileError, match="trained again since"):
        load_member(storage, folder, "0" * 64)
    with pytest.raises(ModelFileError, match="was trained on the channels"):
        load_member(storage, folder, channels=CHANNELS[::-1])
    other = small.statistics.assign(mean=small.statistics["mean"] + np.r_[1e-9, np.zeros(len(CHANNELS) - 1)])
    with pytest.raises(ModelFileError, match="another normalization"):
        load_member(storage, folder, statistics=other)
    with pytest.raises(ModelFileError, match="no finished model"):
        load_member(storage, storage.model(1, 2))


def test_damaged_members_are_refused(member: tuple[Storage, str, torch.nn.Module], tmp_path: Path) -> None:
    storage, _, _ = member
    folder = Path(str(storage.model(1, 1)))
    keep = shutil.copytree(folder, tmp_path / "keep")

    def restore() -> None:
        shutil.rmtree(folder)
        shutil.copytree(keep, folder)

    weights, note = folder / "model.safetensors", folder / "model.json"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelFileError, match="its hash differs"):
        load_member(storage, storage.model(1, 1))
    restore()
    weights.unlink()
    with pytest.raises(ModelFileError, match=r"model.safetensors is missing"):
        load_member(storage, storage.model(1, 1))
    restore()
    note.write_text(note.read_text()[:-20])
    with pytest.raises(ModelFileError, match=r"model.json is damaged"):
        load_member(storage, storage.model(1, 1))
    restore()
    meta = json.loads(note.read_text())
    meta["model"]["decoder_channels"] = [32, 8]
    note.write_text(json.dumps(meta))
    with pytest.raises(ModelFileError, match="does not fit the network"):
        load_member(storage, storage.model(1, 1))


def test_weights_are_plain_safetensors(member: tuple[Storage, str, torch.nn.Module]) -> None:
    storage, _, model = member
    state = load_file(str(storage.model(1, 1) / "model.safetensors"))
    assert set(state) == set(model.state_dict())
