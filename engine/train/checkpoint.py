"""Checkpoints of a run: what the student has learned, its optimizer, and the cursor, atomically.

A checkpoint is a folder `step-NNNNNNNN` of two safetensors files and a `state.json`, which holds
the cursor, the ledger and the sha256 of the other two. It is written under another name, flushed to
the disk, and renamed last; so a folder of that name is whole.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from engine.tensor_files import write_tensors
from engine.train.health import Health
from engine.train.ledger import Ledger

__all__ = ["Checkpoint", "load_latest", "roll_back", "save"]

_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps. Optimizer entries are named `parameter/state`."""

    step: int
    train_s: float
    ledger: Ledger  # of all workers
    health: Health
    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint into `folder`; of older ones it keeps one, and the newest good one."""
    final = folder / f"step-{checkpoint.step:08d}"
    partial = folder / f"{final.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / "student.safetensors", checkpoint.student, {})
    write_tensors(partial / "optimizer.safetensors", checkpoint.optimizer, {})
    state = {
        "step": checkpoint.step,
        "train_s": checkpoint.train_s,
        "ledger": asdict(checkpoint.ledger),
        "health": asdict(checkpoint.health),
        "good": checkpoint.health.good,
        "sha256": {file.name: _sha256(file) for file in sorted(partial.iterdir())},
    }
    state["self"] = _digest(state)
    (partial / "state.json").write_text(json.dumps(state, indent=2))
    for path in (*partial.iterdir(), partial):
        _flush(path)
    if final.exists():  # left by a life of this run that went further than its successor
        _remove(final)
    partial.rename(final)
    _flush(folder)
    old = _steps(folder)[:-_KEEP]
    kept = next((path for path in reversed(_steps(folder)) if _state(path)["good"]), None)
    for path in old:
        if path != kept:
            _remove(path)
    return final


def roll_back(folder: Path, unless: int | None = None) -> int:
    """Removes the checkpoints after the newest good one; gives its step, 0 where there is none.

    One of step `unless` does not count as good.
    """
    for path in reversed(_steps(folder)):
        state = _state(path)
        if state["good"] and state["step"] != unless:
            return state["step"]
        _remove(path)
    return 0


def _remove(path: Path) -> None:
    doomed = path.with_name(f"{path.name}.old")  # a folder that is named a step is always whole
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none yet.

    Raises ValueError, naming the file, if its hashes do not hold.
    """
    steps = _steps(folder)
    if not steps:
        return None
    state = _state(steps[-1])
    for name, sha256 in state["sha256"].items():
        if _sha256(steps[-1] / name) != sha256:
            raise ValueError(f"{steps[-1] / name} is damaged: its sha256 is not that of state.json")
    return Checkpoint(
        state["step"],
        state["train_s"],
        Ledger(**state["ledger"]),
        Health(**state["health"]),
        load_file(steps[-1] / "student.safetensors"),
        load_file(steps[-1] / "optimizer.safetensors"),
    )


def _state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        state = json.loads(file.read_text())
        if state.pop("self") != _digest(state):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"{file} is damaged") from None
    return state


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
