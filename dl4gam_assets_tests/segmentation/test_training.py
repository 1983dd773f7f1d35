"""Training: it learns, is decided by its seed, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dl4gam_assets.segmentation import TrainedMember, TrainingError, pack_cubes, train_member
from dl4gam_assets.segmentation.inference import low_precision, predict_logits
from dl4gam_assets.segmentation.model import build_model
from dl4gam_assets.segmentation.sampling import Normalizer, draw_patches, patch_centres, patch_corner
from dl4gam_assets.segmentation.training import MEASURED, learning_rate
from dl4gam_assets.segmentation.validation import Validation
from dl4gam_assets.settings import InferenceSettings, TrainingSettings
from dl4gam_assets_tests.segmentation.conftest import CHANNELS, MODEL, TRAINING, Small

TRAIN, VALID = ["G0", "G2", "G3"], ["G1"]


def _train(
    small: Small, work: Path, seed: int = 3, training: TrainingSettings = TRAINING, **other: object
) -> TrainedMember:
    options = {"train_ids": TRAIN, "valid_ids": VALID, "device": "cpu", "threads": 1} | other
    return train_member(
        small.packed, statistics=small.statistics, model_settings=MODEL, training=training, seed=seed, work_dir=work,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def _same(first: TrainedMember, second: TrainedMember) -> bool:
    return first.state.keys() == second.state.keys() and all(
        torch.equal(v, second.state[k]) for k, v in first.state.items()
    )


def _curves(member: TrainedMember) -> pd.DataFrame:
    return member.history.drop(columns=list(MEASURED))


@pytest.fixture(scope="module")
def whole(small: Small, tmp_path_factory: pytest.TempPathFactory) -> TrainedMember:
    """An uninterrupted training of seed 3."""
    return _train(small, tmp_path_factory.mktemp("whole"))


def test_it_learns_and_keeps_the_best_epoch(whole: TrainedMember) -> None:
    history = whole.history
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["train_loss"].iloc[-1] < 0.7 * history["train_loss"].iloc[0]
    assert whole.validation_iou == history["validation_iou"].max() > 0.8
    assert whole.best_epoch == history.loc[history["validation_iou"].idxmax(), "epoch"]
    assert whole.train_patches == 96 and whole.parameters > 10_000


def test_the_validation_score_is_that_of_the_validation_patches(small: Small) -> None:
    """Patch by patch, surroundings included: an always-positive map must not look good."""
    torch.manual_seed(0)
    model = build_model(MODEL).eval()
    normalizer = Normalizer.of(small.packed, small.statistics, "cpu")
    training = TRAINING.model_copy(update={"validation_step_px": 16})
    scores = Validation(small.packed, VALID, training, "cpu").scores(model, normalizer, training, low=False)
    layers = small.packed.glacier("G1")
    ready = normalizer(torch.from_numpy(np.array(layers.channels))).numpy()
    predicted = predict_logits([model], ready, InferenceSettings(precision="fp32"), "cpu")[0] >= 0
    hit = union = 0
    for row, col in patch_centres(layers.zone, layers.glacier, 16, extremes=False):
        top, left = patch_corner(row, col, predicted.shape, 32)
        window = np.s_[top : top + 32, left : left + 32]
        truth, found, valid = (a[window] for a in (layers.target, predicted, layers.valid))
        hit += int((truth & found & valid).sum())
        union += int(((truth | found) & valid).sum())
    assert union > layers.zone.sum()
    assert scores["validation_iou"] == pytest.approx(hit / union, abs=1e-12)


def test_the_seed_decides_everything(small: Small, whole: TrainedMember, tmp_path: Path) -> None:
    torch.rand(7)  # what was drawn before has no say, nor is the caller's generator disturbed
    before = torch.get_rng_state()
    again = _train(small, tmp_path / "a", train_ids=TRAIN[::-1])
    assert torch.equal(before, torch.get_rng_state())
    assert _same(again, whole) and _curves(again).equals(_curves(whole))
    short = TRAINING.model_copy(update={"epochs": 1})
    assert not _same(_train(small, tmp_path / "b", 4, short), _train(small, tmp_path / "c", 5, short))


_CHILD = """
import sys
from pathlib import Path
import dl4gam_assets_tests.segmentation.conftest as c
from dl4gam_assets.segmentation import PackedCubes, train_member
import pandas as pd
folder = Path(sys.argv[1])
train_member(
    PackedCubes.open(folder / "packed"), ["G0", "G2", "G3"], ["G1"], pd.read_parquet(folder / "statistics.parquet"),
    c.MODEL, c.TRAINING, seed=3, device="cpu", work_dir=Path(sys.argv[2]), threads=1,
)
"""


def test_a_killed_training_goes_on_with_the_same_result(small: Small, whole: TrainedMember, tmp_path: Path) -> None:
    """SIGKILL to a real process in the middle of an epoch, and a half-written state: the same bits in the end."""
    small.statistics.to_parquet(small.folder / "statistics.parquet")
    work = tmp_path / "work"
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(small.folder), str(work)], stderr=subprocess.PIPE)
    state = work / "state.json"
    limit = time.monotonic() + 90
    while not (state.exists() and json.loads(state.read_text())["epoch"] >= 2):
        assert child.poll() is None, child.stderr and child.stderr.read().decode()[-1500:]
        assert time.monotonic() < limit, "the training did not reach its second epoch"
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    reached = json.loads(state.read_text())["epoch"]
    assert 2 <= reached < TRAINING.epochs
    (work / f"state-{reached + 1}.safetensors").write_bytes(b"half")
    seen: list[int] = []
    resumed = _train(small, work, progress=lambda row: seen.append(row["epoch"]))
    assert seen == list(range(reached + 1, TRAINING.epochs + 1))
    assert _same(resumed, whole)
    assert _curves(resumed).equals(_curves(whole))
    # A finished training is not trained again.
    assert _same(_train(small, work, progress=lambda row: seen.append(-1)), whole) and -1 not in seen


def test_a_training_goes_on_with_the_threads_that_it_began_with(
    small: Small, whole: TrainedMember, tmp_path: Path
) -> None:
    """Sums of another number of threads have other last bits."""

    class KilledError(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        _train(small, tmp_path, progress=kill)
    try:
        resumed = _train(small, tmp_path, threads=2)
    finally:
        torch.set_num_threads(1)
    assert whole.engine["threads"] == resumed.engine["threads"] == 1
    assert _same(resumed, whole)


def test_the_best_epoch_of_a_state_is_its_own(small: Small, whole: TrainedMember, tmp_path: Path) -> None:
    """A file that a killed training left under the name of the best epoch is written again."""

    class KilledError(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise KilledError

    with pytest.raises(KilledError):
        _train(small, tmp_path, progress=kill)
    for epoch in range(2, TRAINING.epochs + 1):
        shutil.copy(tmp_path / "best-1.safetensors", tmp_path / f"best-{epoch}.safetensors")
    _train(small, tmp_path)
    assert whole.best_epoch > 1
    assert _same(_train(small, tmp_path), whole)  # the best weights come from the file now


def test_the_state_of_another_training_is_not_used(small: Small, tmp_path: Path) -> None:
    short = TRAINING.model_copy(update={"epochs": 1})
    seen: list[int] = []

    def run(packed_of: Small = small, **other: object) -> TrainedMember:
        return _train(
            packed_of, tmp_path / "w", training=short, progress=lambda row: seen.append(row["epoch"]), **other
        )

    first = run()
    run()
    assert seen == [1]
    run(seed=9)
    run(seed=9, valid_ids=["G2"])
    # The same settings on other layers of the same glaciers.
    swapped = pack_cubes(
        dict(zip(small.cubes, [*list(small.cubes.values())[1:], small.cubes["G0"]], strict=True)), CHANNELS,
        tmp_path / "swapped",
    )  # fmt: skip
    run(small._replace(packed=swapped), seed=9, valid_ids=["G2"])
    assert seen == [1] * 4
    assert _same(run(), first)


@pytest.mark.parametrize("damage", ["state.json", "state-1.safetensors", "best-1.safetensors"])
def test_a_damaged_state_is_a_fresh_start(small: Small, tmp_path: Path, damage: str) -> None:
    short = TRAINING.model_copy(update={"epochs": 1, "train_patches": 8})
    first = _train(small, tmp_path, training=short)
    (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:50])
    assert _same(_train(small, tmp_path, training=short), first)


def test_where_nothing_can_be_validated_the_last_epoch_is_kept(small: Small, tmp_path: Path) -> None:
    short = TRAINING.model_copy(update={"epochs": 2, "train_patches": 8})
    trained = _train(small, tmp_path, training=short, valid_ids=[])
    assert trained.best_epoch == 2 and math.isnan(trained.validation_iou)


def test_a_loss_that_is_not_finite_ends_the_training(small: Small, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"lower training.learning_rate"):
        _train(small, tmp_path, training=TRAINING.model_copy(update={"learning_rate": 1e30, "schedule": "constant"}))
    with pytest.raises(TrainingError, match="no patch centres"):
        _train(small, tmp_path, train_ids=[])


def test_learning_rates() -> None:
    constant = TRAINING.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, k, 50) for k in range(50)} == {TRAINING.learning_rate}
    cycle = [learning_rate(TRAINING, k, 100) for k in range(100)]
    top = TRAINING.learning_rate
    assert cycle[0] == pytest.approx(top / 25) and max(cycle) == cycle[30] == pytest.approx(top)
    assert cycle[-1] < top / 500 and all(cycle[k] <= cycle[k + 1] for k in range(30))
    assert all(cycle[k] >= cycle[k + 1] for k in range(30, 99))
    assert all(learning_rate(TRAINING, k, 1) > 0 for k in range(1))
    cosine = TRAINING.model_copy(update={"schedule": "cosine", "warmup_share": 0.1})
    rates = [learning_rate(cosine, k, 100) for k in range(100)]
    assert all(rates[k] < rates[k + 1] for k in range(10)) and max(rates) == rates[10] == pytest.approx(top)
    assert all(rates[k] > rates[k + 1] for k in range(10, 99)) and 0 < rates[-1] < top / 1000
    warm = constant.model_copy(update={"warmup_share": 0.5})
    assert learning_rate(warm, 0, 10) == pytest.approx(top / 6) and learning_rate(warm, 5, 10) == top


def test_early_stopping_ends_where_nothing_gets_better_and_resumes_the_same(small: Small, tmp_path: Path) -> None:
    """After a first good epoch the rate is so large that nothing gets better."""
    stubborn = TRAINING.model_copy(
        update={"epochs": 9, "early_stopping": 2, "learning_rate": 0.0001, "schedule": "constant", "train_patches": 8}
    )
    free = _train(small, tmp_path / "a", training=stubborn.model_copy(update={"early_stopping": None}))
    stopped = _train(small, tmp_path / "b", training=stubborn)
    ious = free.history["validation_iou"]
    # The rule by hand on the curve of the training that went on to its end.
    best, end = 0, len(ious)
    for k in range(len(ious)):
        best = k if ious[k] > ious[best] else best
        if k - best >= 2:
            end = k + 1
            break
    assert len(stopped.history) == end < len(ious)
    assert stopped.best_epoch == int(ious[:end].argmax()) + 1
    again = _train(small, tmp_path / "b", training=stubborn, progress=lambda row: pytest.fail("it trained on"))
    assert _same(again, stopped)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_members_learn_in_both_precisions(small: Small, tmp_path: Path, precision: str) -> None:
    trained = _train(small, tmp_path, training=TRAINING.model_copy(update={"precision": precision}))
    assert trained.engine["precision"] == {"fp32": "fp32", "bf16": "bf16-mixed"}[precision]
    assert trained.validation_iou > 0.8
    assert all(v.dtype != torch.bfloat16 for v in trained.state.values())  # weights stay fp32


@pytest.mark.parametrize("loss", ["bce", "dice", "jaccard", "bce_dice"])
def test_members_learn_with_every_loss(small: Small, tmp_path: Path, loss: str) -> None:
    trained = _train(small, tmp_path, training=TRAINING.model_copy(update={"loss": loss}))
    assert trained.validation_iou > 0.8


def test_where_the_layers_lie_does_not_change_the_result(small: Small, whole: TrainedMember, tmp_path: Path) -> None:
    resident = _train(small, tmp_path, data="resident")
    assert resident.engine["training_data"] == "resident" and whole.engine["training_data"] == "mapped"
    assert _same(resident, whole)


def test_the_history_says_how_fast_and_how_large(whole: TrainedMember) -> None:
    history = whole.history
    assert (history["patches_per_second"] > 0).all() and (history["seconds"] > 0).all()
    assert history["data_wait_share"].between(0, 1).all()
    assert (history["peak_memory_mb"] > 50).all()
    assert len(whole.engine["initial_sha256"]) == 64 and whole.engine["encoder_weights"] == "none (random)"


def test_bootstrap_members_leave_glaciers_out(small: Small, tmp_path: Path) -> None:
    several = TRAINING.model_copy(update={"diversity": "bootstrap", "epochs": 1})
    ids = small.packed.ids
    drawn = [draw_patches(small.packed, ids, several, seed) for seed in range(40)]
    present = np.array([[k in d[:, 0] for k in range(len(ids))] for d in drawn])
    assert all(len(d) == several.train_patches for d in drawn)
    assert 0.5 < present.mean() < 0.85  # 1 - (3/4)^4 = 0.68 with four glaciers
    np.testing.assert_array_equal(drawn[5], draw_patches(small.packed, ids, several, 5))
    trained = _train(small, tmp_path, training=several)
    assert trained.train_patches == several.train_patches


def test_the_peak_of_memory_is_this_training_s_own(small: Small, tmp_path: Path) -> None:
    """What an earlier member of the same process needed is not counted again."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux forgets a process's peak")
    short = TRAINING.model_copy(update={"epochs": 1, "train_patches": 8})
    large = np.ones(2**28, dtype=np.uint8)  # 256 MiB
    del large
    before = float(_train(small, tmp_path / "a", training=short).history["peak_memory_mb"].iloc[0])
    large = np.ones(2**28, dtype=np.uint8)
    held = float(_train(small, tmp_path / "b", training=short).history["peak_memory_mb"].iloc[0])
    del large
    after = float(_train(small, tmp_path / "c", training=short).history["peak_memory_mb"].iloc[0])
    assert held - before > 200 and held - after > 200


# --------------------------------------------------------------------------------------------- on a GPU
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def whole_on_cuda(small: Small, tmp_path_factory: pytest.TempPathFactory) -> TrainedMember:
    return _train(small, tmp_path_factory.mktemp("cuda"), device="cuda")


@cuda
@pytest.mark.parametrize("data", ["mapped", "resident"])
def test_on_a_gpu_the_seed_decides_every_bit(
    small: Small, whole_on_cuda: TrainedMember, tmp_path: Path, data: str
) -> None:
    again = _train(small, tmp_path, device="cuda", data=data)
    assert again.engine["training_data"] == data and again.engine["device"].startswith("cuda (")
    assert _same(again, whole_on_cuda) and _curves(again).equals(_curves(whole_on_cuda))
    assert again.validation_iou > 0.8


@cuda
def test_on_a_gpu_an_interrupted_training_goes_on_to_the_same_bits(
    small: Small, whole_on_cuda: TrainedMember, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        _train(small, tmp_path, device="cuda", progress=kill)
    seen: list[int] = []
    resumed = _train(small, tmp_path, device="cuda", progress=lambda row: seen.append(row["epoch"]))
    assert seen == [3, 4] and _same(resumed, whole_on_cuda)


@cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_members_learn_in_both_precisions(small: Small, tmp_path: Path, precision: str) -> None:
    trained = _train(small, tmp_path, device="cuda", training=TRAINING.model_copy(update={"precision": precision}))
    assert trained.engine["precision"] == {"fp32": "fp32", "bf16": "bf16-mixed"}[precision]
    assert trained.validation_iou > 0.8 and all(v.dtype != torch.bfloat16 for v in trained.state.values())


@cuda
def test_on_a_gpu_the_precision_is_that_of_its_hardware(small: Small, whole_on_cuda: TrainedMember) -> None:
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert whole_on_cuda.engine["precision"] == ("bf16-mixed" if native else "fp32")


def test_bf16_that_a_gpu_only_emulates_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers for a GPU before Ampere, which this machine has not."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not low_precision(InferenceSettings(), "cuda")
    assert low_precision(InferenceSettings(precision="bf16"), "cuda")
