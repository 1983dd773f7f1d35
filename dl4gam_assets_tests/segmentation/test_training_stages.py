"""Members as a store holds them: killed and gone on, diverged and left out, on real files and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dl4gam_assets.compute import Mapper, close_clusters, count_accelerators, own_device
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
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_store(small, tmp_path_factory.mktemp("undisturbed"))
    # One torch thread a member, as in the processes of the test below.
    out = _in_threads_of_one(workspace(root))
    assert all(isinstance(r, StageResult) for r in out.values())
    return root


def _in_threads_of_one(ws: Workspace) -> dict[str, Any]:
    packed, _ = training.pack(ws)
    for fold, member in WANTED.values():
        now = training.input_fingerprint(training._member_inputs(ws, fold, member, ws.region))
        row = training.train_one(ws.site, fold, member, str(packed), "cpu", 1, now)
        done = training.Done(f"{member}", row)
        training._store_member(ws, fold, member, now, done)
    return training.ensemble_members(ws, WANTED)


def test_members_killed_with_their_processes_go_on_to_the_same_weights(
    small: Small, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL to the run and its two workers in the middle of training; the next run ends with the same bits."""
    root = make_store(small, tmp_path / "store")
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(root)], stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    states = [root / "work" / "fold=1" / f"member=0{m}" / "state.json" for m in (1, 2)]
    limit = time.monotonic() + 120
    # As soon as one has ended an epoch: on a busy machine it may be done before the other begins.
    while not any(s.exists() for s in states):
        assert child.poll() is None, child.stderr and child.stderr.read().decode()[-1500:]
        assert time.monotonic() < limit, "no member reached its first epoch"
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    reached = [json.loads(s.read_text())["epoch"] for s in states if s.exists()]
    assert len(reached) + len(_hashes(root)) >= 1 and all(1 <= e <= TRAINING.epochs for e in reached)
    assert not any((root / "models" / "fold=1").rglob("*.tmp*"))
    out = _in_threads_of_one(workspace(root))
    assert all(isinstance(r, StageResult) for r in out.values())
    assert _hashes(root) == _hashes(undisturbed)
    assert not any(s.exists() for s in states)  # finished members leave no state behind


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
