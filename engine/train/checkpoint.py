"""Checkpoints of a run: what the student has learned, its optimizer, and the cursor, as one.

The cursor commits with the weights, so every sample is trained exactly once in the lineage of
weights that survives, and after a crash the steps since the newest checkpoint are repeated.

What else a step depends on is not state: order, views and labels are pure functions of the step;
training draws no random numbers (CLIP's towers have no dropout, and the student's first weights
come from the seed); an fp16 student's loss scale is chosen anew in each step, and fp32 and bf16
have none; batch norm's running statistics are in the student's state; the frozen tower is not
stored, its hash is in the identity; the number of roll-backs is in `rollbacks.json`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor

from engine.config import UserError
from engine.progress import say
from engine.tensor_files import read_tensors
from engine.train import checkpoint_files as files
from engine.train.checkpoint_files import FILES, Damaged
from engine.train.health import Health
from engine.train.identity import Identity
from engine.train.ledger import Ledger

if TYPE_CHECKING:
    from engine.train.checkpoint_copy import CheckpointCopy

__all__ = [
    "Checkpoint",
    "Saver",
    "Unsound",
    "load",
    "load_latest",
    "newest_good",
    "roll_back",
    "save",
]

_STUDENT, _OPTIMIZER, _STATE = FILES
_PACKAGES = ("torch", "deepspeed")  # another version of which may compute otherwise


class Unsound(UserError):
    """There are checkpoints, or have been, and none can be loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps. Optimizer entries are named `parameter/state`."""

    step: int
    train_s: float
    ledger: Ledger  # of all workers
    health: Health
    identity: Identity
    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]


# ------------------------------------------------------------ saving


class Saver:
    """Writes the checkpoints of a run from a thread, one at a time, while training goes on.

    A save that fails for the disk's sake is told of, once until one succeeds; the checkpoints
    before it stay, and the next save is a new try. For one process, rank 0: what it has is all
    there is to write.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_every: int,
        require_held: Callable[[], None] = lambda: None,
        copy: "CheckpointCopy | None" = None,
    ) -> None:
        """`require_held` is called before a checkpoint is committed, and raises where this process
        is not to write any more. `copy` gets what has been committed."""
        self.folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._require_held, self._copy = require_held, copy
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._coming: Future[None] | None = None
        self._failed: OSError | None = None  # the last save

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write, once the save before has ended. Its tensors are not to be changed."""
        self.failure()
        # These two go on counting while the thread writes.
        ledger, health = deepcopy(checkpoint.ledger), deepcopy(checkpoint.health)
        checkpoint = dataclasses.replace(checkpoint, ledger=ledger, health=health)
        self._coming = self._writer.submit(self._save, checkpoint)

    def failure(self) -> OSError | None:
        """Waits for the last save to end: why it has failed, if the disk is to blame. Raises
        whatever else went wrong."""
        if self._coming:
            self._coming.result()
            self._coming = None
        return self._failed

    def close(self) -> None:
        """Waits for the last save to end, however it ends."""
        self._writer.shutdown()

    def _save(self, checkpoint: Checkpoint) -> None:
        try:
            save(self.folder, checkpoint, self._keep_last, self._keep_every, self._require_held)
        except OSError as error:  # it is no checkpoint then, and the run goes on
            if not self._failed:
                say(
                    f"warning: the checkpoint of step {checkpoint.step} could not be written to "
                    f"{self.folder}: {error}. Those before it are there; training goes on, and "
                    "the next one is a new try"
                )
            self._failed = error
        else:
            self._failed = None
            if self._copy:
                self._copy.put(checkpoint.step, self._require_held)


def save(
    folder: Path,
    checkpoint: Checkpoint,
    keep_last: int = 2,
    keep_every: int = 0,
    require_held: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint into `folder`, and removes older ones: all but the last `keep_last`, the
    newest good one, and the first one of every `keep_every` steps (0: no more). While it is being
    written, there is one more. Raises OSError where it is not written."""
    newest = checkpoint.step
    path = files.commit(folder, newest, _contents(checkpoint), require_held)
    try:
        files.retain(folder, newest, _kept(folder, newest, keep_last, keep_every))
    except OSError as error:
        say(f"warning: old checkpoints in {folder} cannot be removed: {error}")
    return path


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of its files; one after another, since they are large."""
    state = {
        "step": checkpoint.step,
        "train_s": checkpoint.train_s,
        "ledger": asdict(checkpoint.ledger),
        "health": asdict(checkpoint.health),
        "identity": checkpoint.identity.settings,
        "versions": _versions(),
    }
    yield _STATE, json.dumps(state, indent=2).encode()
    for name, tensors in ((_STUDENT, checkpoint.student), (_OPTIMIZER, checkpoint.optimizer)):
        yield name, to_bytes({key: tensor.contiguous() for key, tensor in tensors.items()})


def _kept(folder: Path, newest: int, keep_last: int, keep_every: int) -> set[int]:
    steps = [step for step in files.steps(folder) if step <= newest]
    kept = {*steps[-keep_last:]}
    kept |= {next((step for step in reversed(steps) if _is_good(folder, step)), newest)}
    if keep_every:
        first_of = {step // keep_every: step for step in reversed(steps)}
        kept |= {step for period, step in first_of.items() if period > 0}
    return kept


def _is_good(folder: Path, step: int) -> bool:
    """Of one that may be damaged, as far as its small files tell."""
    try:
        return _health(folder, step).good
    except Damaged:
        return False


def _health(folder: Path, step: int) -> Health:
    file = files.path_of(folder, step) / _STATE
    try:
        return Health(**files.read_json(file)["health"])
    except (KeyError, TypeError) as error:
        raise Damaged(f"{file} is damaged: {error}") from None


# ------------------------------------------------------------ loading


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None where there has never been one.

    Says which newer ones are damaged, and why. Raises Unsound where there is, or has been, a
    checkpoint and none is sound, OSError where the folder cannot be read.
    """
    steps, faults = files.steps(folder), []
    try:
        named = files.pointed(folder)
        if named is None and steps:
            faults.append(f"{folder} has no latest.json, which names the newest checkpoint")
        if named is not None and named not in steps:
            faults.append(f"{files.path_of(folder, named)}, which latest.json names, is missing")
    except Damaged as damage:
        faults.append(str(damage))
    for step in reversed(steps):
        try:
            found = _load(folder, step)
        except Damaged as damage:
            faults.append(str(damage))
            continue
        for fault in faults:
            say(f"warning: {fault}")
        if faults:
            say(f"warning: the newest sound checkpoint in {folder} is that of step {step}")
        return found
    if faults:
        raise Unsound(
            f"{folder}: no checkpoint is sound: {'; '.join(faults)}. Put one back, or remove the "
            "folder to begin anew"
        )
    return None


def load(folder: Path, step: int) -> Checkpoint:
    """A checkpoint that another process of the run has found sound. Raises UserError where it is
    not there, or not sound, as this one sees it."""
    try:
        return _load(folder, step)
    except Damaged as damage:
        raise UserError(
            f"runs_dir must be one folder for all nodes; another worker goes on from step {step}, "
            f"but here {damage}"
        ) from None


def newest_good(folder: Path, unless: int | None = None) -> int:
    """The step of the newest checkpoint that is sound, and of a student that learned well; 0 where
    there is none. One of step `unless` does not count."""
    for step in reversed(files.steps(folder)):
        try:
            if step != unless and files.verify(folder, step) and _health(folder, step).good:
                return step
        except Damaged as damage:
            say(f"warning: {damage}")
    return 0


def roll_back(folder: Path, unless: int | None = None) -> int:
    """Removes the checkpoints after the newest good one, and gives its step; see newest_good()."""
    good = newest_good(folder, unless)
    files.point(folder, good or None)
    for step in files.steps(folder):
        if step > good:
            files.remove(folder, step)
    return good


def _load(folder: Path, step: int) -> Checkpoint:
    path = files.verify(folder, step)
    state = files.read_json(path / _STATE)
    try:
        checkpoint = Checkpoint(
            state["step"],
            float(state["train_s"]),
            Ledger(**state["ledger"]),
            Health(**state["health"]),
            Identity(dict(state["identity"])),
            read_tensors(path / _STUDENT),
            read_tensors(path / _OPTIMIZER),
        )
        versions = dict(state["versions"])
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        what = f"{type(error).__name__}: {error}"
        raise Damaged(f"{path} is damaged: it is no checkpoint: {what}") from None
    if checkpoint.step != step:
        raise Damaged(f"{path / _STATE} is damaged: it is of step {checkpoint.step}")
    if versions != _versions():
        say(
            f"warning: {path} was written with {_told(versions)}, this is {_told(_versions())}: "
            "what follows may differ by rounding from a run that was not interrupted"
        )
    return checkpoint


@cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def _told(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {one}" for package, one in versions.items())
