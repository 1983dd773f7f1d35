"""Members as a store holds them: killed and gone on, diverged and left out, on real files and real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dl4gam_assets.compute import Mapper, close_clusters, count_accelerators, default_workers, own_device
from dl4gam_assets.cubes import open_cube, write_cube
from dl4gam_assets.segmentation import load_member
from dl4gam_assets.settings import Region, load_region
from dl4gam_assets.stages import training
from dl4gam_assets.stages.base import StageResult, UpstreamError, Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.segmentation.conftest import MODEL, TRAINING, Small

WANTED = {"fold_1|member_01": (1, 1), "fold_1|member_02": (1, 2)}
ROLES = {"G0": "train", "G1": "valid", "G2": "train", "G3": "train"}


def make_store(small: Small, root: Path) -> Path:
    """A store as it is before the ensemble of fold 1."""
    storage = Storage(root)
    rows = []
    for glacier_id, path in small.cubes.items():
        target = Path(str(storage.cube(2015, glacier_id)))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_cube(path) as opened:
            cube = opened.load().assign_attrs(fingerprint=f"of-{glacier_id}", image_date="2015-08-20T10:00:00")
        write_cube(cube, target)
        height, width = cube["mask"].shape
        rows.append({
            "glacier_id": glacier_id, "image_date": pd.Timestamp("2015-08-20"), "scene_ids": "S",
            "fingerprint": f"of-{glacier_id}", "height_px": height, "width_px": width, "utm_epsg": 32632,
            "size_bytes": 1,
        })  # fmt: skip
    storage.write_table("cubes", pd.DataFrame(rows), {"year": 2015})
    storage.write_table("folds", pd.DataFrame([{"glacier_id": g, "fold": 1, "role": r} for g, r in ROLES.items()]))
    storage.write_table("normalization", small.statistics, {"fold": 1})
    ws = workspace(root)
    for asset, partition in (
        ("normalization", "fold_1"),
        ("glacier_cubes", "2015"),
        ("cross_validation_folds", "all"),
    ):
        ws.finish(asset, partition, "in", "out", 0.0)
    return root


def region_of(**more: Any) -> Region:
    settings = TRAINING.model_copy(update={"members": 2, **more})
    return load_region("demo").model_copy(update={"model": MODEL, "training": settings})


def workspace(root: Path, workers: int = 1, **more: Any) -> Workspace:
    return Workspace(region_of(**more), Storage(root), Mapper(workers), device="cpu")


def _hashes(root: Path) -> dict[int, str]:
    members = Storage(root).read_table("members", fold=1)
    return dict(zip(members["member"].astype(int), members["sha256"], strict=True))


_CHILD = """
import sys
from pathlib import Path
from dl4gam_assets.compute import close_clusters
from dl4gam_assets.stages import training
from dl4gam_assets_tests.segmentation import test_training_stages as t
if __name__ == "__main__":
    training.ensemble_members(t.workspace(Path(sys.argv[1]), workers=2), t.WANTED)
    close_clusters()
"""


@pytest.fixture(scope="module")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store whose two members were trained side by side."""
    root = make_store(small, tmp_path_factory.mktemp("undisturbed"))
    out = training.ensemble_members(workspace(root, workers=2), WANTED)
    assert all(isinstance(r, StageResult) for r in out.values())
    yield root
    close_clusters()


def _history(root: Path, member: int) -> pd.DataFrame:
    return pd.read_parquet(str(Storage(root).model(1, member) / "history.parquet"))


def test_members_killed_with_their_processes_go_on_to_the_same_weights(
    small: Small, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL to the run and its two workers in the middle of training; the next run trains the epochs that are left,
    and ends with the same bits."""
    root = make_store(small, tmp_path / "store")
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(root)], stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    states = [root / "work" / "fold=1" / f"member=0{m}" / "state.json" for m in (1, 2)]
    limit = time.monotonic() + 400
    # As soon as one has ended an epoch: on a busy machine it may be done before the other begins.
    while not any(s.exists() for s in states):
        assert child.poll() is None, child.stderr and child.stderr.read().decode()[-1500:]
        assert time.monotonic() < limit, "no member reached its first epoch"
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    before = {m: json.loads(s.read_text())["history"] for m, s in zip((1, 2), states, strict=True) if s.exists()}
    assert any(1 <= len(epochs) < TRAINING.epochs for epochs in before.values())
    assert not any((root / "models" / "fold=1").rglob("*.tmp*"))
    out = training.ensemble_members(workspace(root, workers=2), WANTED)
    assert all(isinstance(r, StageResult) for r in out.values())
    assert _hashes(root) == _hashes(undisturbed)
    assert not any(s.exists() for s in states)  # finished members leave no state behind
    seconds = Storage(root).read_table("members", fold=1).set_index("member")["seconds"]
    for member, epochs in before.items():
        # What was measured in the epochs before the kill is still there: they were not trained again.
        history = _history(root, member)
        assert history["seconds"].tolist()[: len(epochs)] == [row["seconds"] for row in epochs]
        assert history["epoch"].tolist() == list(range(1, TRAINING.epochs + 1))
        assert seconds[member] == pytest.approx(history["seconds"].sum())  # of both processes


def test_a_member_trained_alone_is_the_one_that_is_trained_beside_others(
    small: Small, undisturbed: Path, tmp_path: Path
) -> None:
    """One run for each member, as the UI makes them, and one of the two already there: the same bits."""
    root = make_store(small, tmp_path)
    for key, numbers in WANTED.items():
        assert isinstance(training.ensemble_members(workspace(root, workers=2), {key: numbers})[key], StageResult)
    assert _hashes(root) == _hashes(undisturbed)
    _, meta = load_member(Storage(root), Storage(root).model(1, 1))
    assert meta["engine"]["threads"] == max(default_workers() // 2, 1)


@pytest.mark.parametrize(
    ("compute", "workers", "expected"),
    [
        ({}, 8, (8, 1)),  # as many at once as there are workers
        ({"workers": 2}, 2, (2, 4)),
        ({"members_at_once": 4}, 8, (4, 2)),
        ({"partitions_per_run": 1}, 8, (1, 8)),  # one member a run: it has all cores
        ({"members_at_once": 2, "partitions_per_run": 1}, 8, (2, 4)),
        ({"workers": 16}, 16, (16, 1)),
    ],
)
def test_threads_follow_from_settings_and_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compute: dict[str, int], workers: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(training, "default_workers", lambda: 8)
    region = region_of()
    region = region.model_copy(update={"compute": region.compute.model_copy(update=compute)})
    mapper, _, threads = training._member_processes(Workspace(region, Storage(tmp_path), Mapper(workers), device="cpu"))
    assert (mapper.workers, threads) == expected


def test_more_cores_than_members_are_shared_by_those_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "default_workers", lambda: 64)
    region = region_of()  # 5 folds of 2 members
    _, _, threads = training._member_processes(Workspace(region, Storage(tmp_path), Mapper(64), device="cpu"))
    assert threads == 6


@pytest.mark.parametrize(("gpus", "at_once", "expected"), [(0, 0, (4, 2)), (2, 0, (2, 4)), (0, 2, (8, 1))])
def test_several_gpus_have_processes_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, at_once: int, expected: tuple[int, int]
) -> None:
    """A machine of four GPUs and eight cores, which this one is not."""
    import torch

    monkeypatch.setattr(training, "default_workers", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    region = region_of()
    compute = region.compute.model_copy(update={"gpus": gpus, "members_at_once": at_once})
    ws = Workspace(region.model_copy(update={"compute": compute}), Storage(tmp_path), Mapper(8), device="auto")
    mapper, _, threads = training._member_processes(ws)
    assert (mapper.workers, threads) == expected


def test_a_member_that_was_stored_but_not_recorded_is_taken_as_it_is(
    small: Small, undisturbed: Path, tmp_path: Path
) -> None:
    """A run that was killed between the end of its worker and the record trains nothing again."""
    root = make_store(small, tmp_path)
    ws = workspace(root, workers=2)
    now = training.input_fingerprint(training._member_inputs(ws, 1, 1, ws.region))
    packed, _ = training.pack(ws)
    row = training.train_one(ws.site, 1, 1, str(packed), "cpu", max(default_workers() // 2, 1), now)
    measured = row["history"]["seconds"].tolist()
    one = {"fold_1|member_01": (1, 1)}

    def again(**how: Any) -> list[float]:
        assert isinstance(training.ensemble_members(ws, one, **how)["fold_1|member_01"], StageResult)
        assert _hashes(root)[1] == _hashes(undisturbed)[1]
        return list(_history(root, 1)["seconds"])

    assert again() == measured
    recorded = ws.storage.read_table("members", fold=1).iloc[0]
    assert {k: recorded[k] for k in row if k != "history"} == {k: v for k, v in row.items() if k != "history"}
    # Not if it is damaged, of other settings, or wanted anew.
    weights = Path(str(ws.storage.model(1, 1) / "model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    fresh = again()
    assert fresh != measured
    assert again(force=True) != fresh
    state = ws.storage.read_state("ensemble_member", "fold_1.member_01")
    other = training.ensemble_members(ws, one, {"epochs": 2})["fold_1|member_01"]
    assert isinstance(other, StageResult) and len(_history(root, 1)) == 2
    assert ws.storage.read_state("ensemble_member", "fold_1.member_01") != state


def test_a_file_of_encoder_weights_is_known_by_its_content(small: Small, tmp_path: Path) -> None:
    """Another file under the same name trains again; the same file elsewhere does not."""
    from safetensors.torch import save_file

    from dl4gam_assets.segmentation import build_model

    root = make_store(small, tmp_path / "store")

    def write(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        save_file(build_model(MODEL).get_submodule("encoder").state_dict(), path)

    def train(path: Path) -> StageResult | Exception:
        region = region_of(epochs=1)
        region = region.model_copy(update={"model": MODEL.model_copy(update={"encoder_weights": str(path)})})
        ws = Workspace(region, Storage(root), Mapper(1), device="cpu")
        return training.ensemble_members(ws, {"a": (1, 1)})["a"]

    first, elsewhere = tmp_path / "a" / "encoder.safetensors", tmp_path / "b" / "encoder.safetensors"
    write(first)
    made = train(first)
    assert isinstance(made, StageResult) and not made.unchanged
    assert made.metadata["encoder_weights"].startswith("encoder.safetensors (")
    elsewhere.parent.mkdir()
    shutil.copy(first, elsewhere)
    moved = train(elsewhere)
    assert isinstance(moved, StageResult) and moved.unchanged
    write(first)
    other = train(first)
    assert isinstance(other, StageResult) and not other.unchanged
    assert other.metadata["encoder_weights"] != made.metadata["encoder_weights"]
    assert other.metadata["initial_weights_sha256"] != made.metadata["initial_weights_sha256"]
    first.unlink()
    gone = train(first)
    assert isinstance(gone, UpstreamError) and "encoder.safetensors does not exist" in str(gone)


def test_members_say_how_they_were_trained(undisturbed: Path) -> None:
    ws = workspace(undisturbed)
    out = training.ensemble_members(ws, WANTED)
    for result in out.values():
        assert isinstance(result, StageResult) and result.unchanged
        assert set(result.previews) == {"training curves"}
        assert result.metadata["patches_per_second"] > 0 and result.metadata["device"] == "cpu"
        assert result.metadata["encoder_weights"] == "none (random)"
    rows = ws.storage.read_table("members", fold=1)
    assert rows["initial_sha256"].nunique() == 2 and rows["data_wait_share"].between(0, 1).all()
    assert rows["precision"].isin(["fp32", "bf16-mixed"]).all() and (rows["peak_memory_mb"] > 0).all()
    folder = ws.storage.model(1, 1)
    _, meta = load_member(ws.storage, folder, rows.set_index("member").loc[1, "sha256"])
    assert meta["engine"]["initial_sha256"] == rows.set_index("member").loc[1, "initial_sha256"]
    assert list(pd.read_parquet(str(folder / "history.parquet"))["epoch"]) == [1, 2, 3, 4]


def test_a_diverged_member_never_stops_the_others_and_may_be_left_out(small: Small, tmp_path: Path) -> None:
    root = make_store(small, tmp_path)
    wild = {"learning_rate": 1e30, "schedule": "constant"}
    # Without leave, the error is the partition's, and the ensemble asks for its member.
    strict = workspace(root, epochs=1)
    assert isinstance(training.ensemble_members(strict, {"a": (1, 1)})["a"], StageResult)
    failed = training.ensemble_members(strict, {"b": (1, 2)}, wild)["b"]
    assert isinstance(failed, Exception) and "lower training.learning_rate" in str(failed)
    with pytest.raises(UpstreamError, match=r"ensemble_member \[fold_1.member_02\] is not there yet"):
        training.ensemble(strict, 1)
    # With leave, the partition says why it is empty, and the ensemble goes on with the rest.
    lenient = workspace(root, epochs=1, min_members=1)
    left = training.ensemble_members(lenient, {"b": (1, 2)}, wild)["b"]
    assert isinstance(left, StageResult) and "lower training.learning_rate" in left.metadata["left_out"]
    result = training.ensemble(lenient, 1)
    assert result.metadata["members"] == 1 and result.metadata["left_out_members"] == "2"
    assert [m["member"] for m in training.manifest_of(lenient.site, 1)] == [1]
    with pytest.raises(UpstreamError, match="has 1 of 2 members, and 2 are needed"):
        training.ensemble(workspace(root, epochs=1, min_members=2), 1)
    # Asked for again with sound settings it is trained, and the ensemble takes it.
    assert set(training.ensemble_members(lenient, WANTED)) == set(WANTED)
    assert training.ensemble(lenient, 1).metadata["members"] == 2


def test_a_damaged_cube_is_named_before_training(small: Small, tmp_path: Path) -> None:
    root = make_store(small, tmp_path)
    path = Path(str(Storage(root).cube(2015, "G2")))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"1 of 4 glacier cubes can not be read.*materialize glacier_cubes again: G2"):
        training.ensemble_members(workspace(root), WANTED)


def _of_this_worker(count: int) -> tuple[str, str]:
    return own_device("cuda", count), own_device("cpu", count)


def test_workers_of_a_cluster_take_a_gpu_each() -> None:
    assert own_device("cuda", 4) == "cuda"  # no worker
    assert count_accelerators("cpu", 3) == 1
    try:
        # Slow starters leave tasks to the others, so there are several for each.
        values = [d.value for d in Mapper(2).map(_of_this_worker, [(str(k), (2,)) for k in range(16)])]
    finally:
        close_clusters()
    assert {v[0] for v in values} == {"cuda:0", "cuda:1"} and {v[1] for v in values} == {"cpu"}


def test_one_run_at_a_time_works_on_a_member(tmp_path: Path) -> None:
    """Another run waits for the one that trains the member, and is let in by a kill -9 of it at the latest."""
    work = tmp_path / "work" / "member=01"
    hold = (
        "import sys, time; from pathlib import Path; from dl4gam_assets.stages import training\n"
        "with training._alone(Path(sys.argv[1]), 'fold_1.member_01'):\n    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(work)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        let_in = threading.Event()

        def second() -> None:
            with training._alone(work, "fold_1.member_01"):
                let_in.set()

        waiting = threading.Thread(target=second, daemon=True)
        waiting.start()
        assert not let_in.wait(1.0)
        first.send_signal(signal.SIGKILL)
        assert let_in.wait(60)
        waiting.join(timeout=60)
    with training._alone(work.with_name("member=02"), "fold_1.member_02"), training._alone(work, "fold_1.member_01"):
        pass
