"""Bad models: weights and descriptions that are not those that were trained, and training that goes wrong.

Belongs here: damaging members of a fold, and what predictions, areas and ensembles make of them.
Does not belong here: kills while training (``kills``).

What a fold held before must be there after the fault, bit for bit: a member that is refused costs no estimate.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from dl4gam_assets.segmentation.files import ModelFileError, load_member
from dl4gam_assets.stages import areas, predictions, training
from dl4gam_assets.stages.base import StageResult
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.faults.kills import differences
from dl4gam_assets_tests.faults.table import Bench, Outcome, fault, not_tried

YEAR, FOLD = 2016, 1


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.target, "w")


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def _agree(folder: Path) -> None:
    """The description states the hash of the weights as they are now: whoever swapped them was careful."""
    meta = json.loads((folder / "model.json").read_text())
    meta["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(meta))


def _first(state: dict[str, torch.Tensor]) -> str:
    return next(name for name, values in state.items() if values.ndim == 4)


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


def _careful_pickle(folder: Path) -> None:
    _pickle(folder)
    _agree(folder)


def _other_channels(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {_first(state): state[_first(state)][:, :3].clone()}

    _weights(folder, change)
    _agree(folder)


def _other_list(folder: Path) -> None:
    meta = json.loads((folder / "model.json").read_text())
    meta["model"]["channels"] = meta["model"]["channels"][::-1]
    (folder / "model.json").write_text(json.dumps(meta))


def _careful_nan(folder: Path) -> None:
    _weights(folder, lambda state: state | {_first(state): torch.full_like(state[_first(state)], torch.nan)})
    _agree(folder)


def _careful_other(folder: Path) -> None:
    """The other member's weights under this one's name."""
    other = folder.with_name("member=02")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    (folder / "model.json").write_bytes((other / "model.json").read_bytes())


def _gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_json(folder: Path) -> None:
    (folder / "model.json").write_text("[" * 100_000)


def _code(folder: Path) -> None:
    meta = json.loads((folder / "model.json").read_text())
    meta["model"]["architecture"] = "__import__('os').system('true')"
    (folder / "model.json").write_text(json.dumps(meta))


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated safetensors": (_truncated, ("model.safetensors", "train it again")),
    "one bit flipped": (_bit, ("model.safetensors", "hash differs")),
    "a pickle renamed": (_pickle, ("model.safetensors", "hash differs")),
    "a pickle renamed, hash adapted": (_careful_pickle, ("model.safetensors", "trained again since")),
    "another channel count, hash adapted": (_other_channels, ("model.safetensors", "trained again since")),
    "another order of channels": (_other_list, ("member=01", "was trained on the channels")),
    "weights that are NaN, hash adapted": (_careful_nan, ("model.safetensors", "trained again since")),
    "weights of another member": (_careful_other, ("model.safetensors", "calibration")),
    "weights are gone": (_gone, ("model.safetensors", "is missing")),
    "a description of brackets": (_no_json, ("model.json", "damaged")),
    "a description with code for a name": (_code, ("model.json", "damaged")),
}


@fault("bad models", "damaged members")
def damaged(bench: Bench) -> dict[str, Outcome]:
    """Predictions of a fold are asked for again with each damaged member; the fold keeps what it had."""
    small = bench.copy(without=("inputs", "packed", "candidates", "stac"))
    folder = Path(str(small.storage.model(FOLD, 1)))
    whole = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    outcomes = {}
    for label, (damage, words) in DAMAGES.items():
        damage(folder)
        outcome = Outcome("")
        try:
            predictions.glacier_predictions(small.workspace(), YEAR, FOLD, force=True)
            for file in Path(str(small.storage.root)).glob(f"predictions/year={YEAR}/*.tif"):
                file.unlink()  # all were found to be current: ask for them anew
            predictions.glacier_predictions(small.workspace(), YEAR, FOLD, force=True)
        except Exception as error:
            outcome.said = " ".join(str(error).split())
        outcome.names(*words)
        outcome.expect(not (folder / "exploded").exists(), "the pickle was executed")
        told = small.storage.read_table("failures", stage="glacier_predictions")
        outcome.expect(len(told) > 0, "no row in failures")
        areas.glacier_areas(small.workspace(), YEAR, FOLD)
        for table in ("predictions", "areas"):
            mine, theirs = (s.storage.read_table(table, year=YEAR, fold=FOLD) for s in (small, bench.small))
            keys = [c for c in theirs.columns if c not in ("seconds", "time")]
            outcome.expect(mine[keys].astype(str).equals(theirs[keys].astype(str)), f"another table of {table}")
        for file, content in whole.items():
            file.write_bytes(content)
        outcomes[label] = outcome
    for fold in range(1, small.region.folds.n + 1):
        predictions.glacier_predictions(small.workspace(), YEAR, fold, force=True)
    left = small.storage.read_table("failures", stage="glacier_predictions")
    wrong = differences(small.storage, bench.small.storage)
    for outcome in outcomes.values():
        outcome.expect(not len(left), "failures stay after the mending")
        outcome.expect(not wrong, "; ".join(wrong))
    return outcomes


#: Damages that get as far as the reader of weights, where nobody holds a hash against them.
UNHASHED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated safetensors": (_truncated, ("model.safetensors",)),
    "a pickle renamed": (_pickle, ("model.safetensors",)),
    "another channel count": (_other_channels, ("model.safetensors",)),
    "weights that are NaN": (_careful_nan, ("model.safetensors", "no numbers")),
    "weights are gone": (_gone, ("model.safetensors",)),
}


@fault("bad models", "damaged members, read without a hash")
def unhashed(bench: Bench) -> dict[str, Outcome]:
    """The hash of the manifest stops most of the above; here the reader itself has to."""
    outcomes = {}
    for number, (label, (damage, words)) in enumerate(UNHASHED.items()):
        storage = Storage(bench.folder / str(number))
        folder = Path(str(storage.model(FOLD, 1)))
        shutil.copytree(str(bench.small.storage.model(FOLD, 1)), folder)
        load_member(storage, storage.model(FOLD, 1))
        damage(folder)
        _forget_hash(folder)
        outcome = Outcome("")
        try:
            load_member(storage, storage.model(FOLD, 1))
            outcome.expect(False, "is taken for a member")
        except ModelFileError as error:
            outcome.said = " ".join(str(error).split())
        outcome.names(*words)
        outcome.expect(not (folder / "exploded").exists(), "the pickle was executed")
        outcomes[f"without a hash: {label}"] = outcome
    return outcomes


def _forget_hash(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        _agree(folder)


@fault("bad models", "a member that diverges")
def diverges(bench: Bench) -> Outcome:
    """It is stopped and named; the ensemble goes on with the others where the settings allow it, and else waits."""
    small = bench.copy(without=("predictions", "reports", "stac", "candidates"))
    wild = {"learning_rate": 1e30, "schedule": "constant", "epochs": 1}
    failed = training.ensemble_members(small.workspace(), {"b": (FOLD, 2)}, wild)["b"]
    outcome = Outcome(" ".join(str(failed).split()))
    outcome.names("member_02", "learning_rate")
    outcome.expect(isinstance(failed, Exception), "is taken for a member")
    small.change(training__min_members=1)
    left = training.ensemble_members(small.workspace(), {"b": (FOLD, 2)}, wild)["b"]
    outcome.expect(isinstance(left, StageResult) and "left_out" in left.metadata, "is not left out")
    training.ensemble(small.workspace(), FOLD)
    manifest = training.manifest_of(small.workspace().site, FOLD)
    before = training.manifest_of(bench.small.workspace().site, FOLD)
    outcome.expect(manifest == before[:1], f"the ensemble is {[m['member'] for m in manifest]}")
    return outcome


@fault("bad models", "a fold without a validation glacier")
def no_validation(bench: Bench) -> Outcome:
    small = bench.copy(without=("predictions", "reports", "stac", "candidates"))
    folds = small.storage.read_table("folds")
    mine = (folds["fold"] == FOLD) & (folds["role"] == "valid")
    small.storage.write_table("folds", pd.DataFrame(folds[~mine]))
    outcome = Outcome("")
    try:
        training.calibration(small.workspace(), FOLD, force=True)
    except Exception as error:
        outcome.said = " ".join(str(error).split())
    outcome.names("fold 1", "validation")
    before, after = (s.storage.read_table("calibration", fold=FOLD) for s in (bench.small, small))
    outcome.expect(before.equals(after), "another calibration is recorded")
    return outcome


@fault("bad models", "no GPU where one was asked for")
def no_gpu(bench: Bench) -> Outcome:
    if torch.cuda.is_available():
        return not_tried("this machine has one")
    small = bench.copy(without=("inputs", "packed", "candidates", "stac"))
    ws = small.workspace()
    ws.device = "cuda"
    outcome = Outcome("")
    try:
        predictions.glacier_predictions(ws, YEAR, FOLD, force=True)
    except Exception as error:
        outcome.said = " ".join(str(error).split())
    outcome.names("compute.device", "cuda", "auto")
    outcome.lost += differences(small.storage, bench.small.storage)
    return outcome
