"""A second place for the checkpoints of a run: another folder, or an object store.

Under the run's name lie the small files that `--resume` needs of a run folder, and the checkpoints
of the run folder, file by file. An object store has no rename, so a manifest is written last, and
removed first: a checkpoint without one does not exist. With each lies, under its sha256, what else
of the run folder belongs to it.

Who may write a run folder may write its copy. That is asked of the run folder's lease: a copy has
none, so runs in different folders need different names.
"""

import os
import shutil
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from engine import durable
from engine.config import RunConfig, UserError
from engine.progress import say
from engine.storage.folder import open_folder
from engine.train import checkpoint_files as files
from engine.train import rollback
from engine.train.checkpoint import Checkpoint, Unsound, load_latest
from engine.train.checkpoint_files import FILES, LATEST, MANIFEST, Damaged

__all__ = ["CheckpointCopy", "copy_of", "prepare", "restored"]

_FIELD = "train.checkpoint_copy"
_CONFIG = "config.json"  # written after the others: where it is, they are
_RUN = ("identity.json", "class_vectors.safetensors", _CONFIG)
_BESIDE = ("rollbacks.json", "selected.safetensors")  # as they were at a checkpoint


def prepare(config: RunConfig, resume: bool) -> None:
    """Before a run begins. One that is to `resume`, and whose folder is lost, gets a new one, with
    what it was begun with. Raises UserError for a wrong place, and where a run that is to begin
    would meet another there."""
    if not (copy := copy_of(config.train.checkpoint_copy, config.folder)):
        return
    if Path(copy.where.removeprefix("file://")).resolve() == config.folder.resolve():
        raise UserError(f"{_FIELD}: {copy.where} is the run folder itself")
    if config.overwrite or (resume and config.folder.exists()) or copy.is_empty():
        return
    if not resume:
        raise UserError(
            f"{_FIELD}: {copy.where} holds a run already; choose another name, or pass "
            "--overwrite, or --resume to go on with it"
        )
    copy.fetch_run()


def restored(config: RunConfig) -> Checkpoint | None:
    """For a run whose folder has never had a checkpoint: the newest sound one of its copy, which
    the folder now has, and those before it. None where there is none. Raises Unsound, and UserError
    where the copy cannot be read."""
    taken = rollback.taken(config.folder)
    if taken and taken[-1]["to_step"] == 0:  # it is to have none
        return None
    if copy := copy_of(config.train.checkpoint_copy, config.folder):
        copy.fetch_checkpoints()
    return load_latest(config.folder / "checkpoints")


def copy_of(where: str, run: Path) -> "CheckpointCopy | None":
    """The copy of a run folder at a `train.checkpoint_copy`, which may be empty: there is none.
    Raises UserError for a wrong one."""
    return CheckpointCopy(where, run) if where else None


class CheckpointCopy:
    """For the process that writes the run folder, or goes on with it."""

    def __init__(self, where: str, run: Path) -> None:
        self.where = f"{where.removesuffix('/')}/{run.name}"
        self._run, self._checkpoints = run, run / "checkpoints"
        self._folder = open_folder(self.where, _FIELD)
        self._introduced, self._failing = False, False

    # -------------------------------------------------------- writing

    def put(self, step: int, require_held: Callable[[], None]) -> None:
        """Makes the copy hold what the run folder holds, of which `step` is new. Where that fails,
        it is told of, once until it succeeds, and the next one is a new try. `require_held` raises
        OSError where this process is not to write any more."""
        try:
            self._put(step, require_held)
        except OSError as error:
            if not self._failing:
                say(
                    f"warning: the checkpoint of step {step} could not be copied to {self.where}: "
                    f"{error}. Training goes on, and the next one is a new try"
                )
            self._failing = True
        else:
            self._failing = False

    def _put(self, step: int, require_held: Callable[[], None]) -> None:
        require_held()
        if not self._introduced:  # by this life of the run
            for name in _RUN:
                if (self._run / name).exists():
                    self._folder.write(name, (self._run / name).read_bytes(), replace=True)
            self._introduced = True
        there, kept = self._names(), files.steps(self._checkpoints)
        self._write(step, there.get(step, []), require_held)
        latest = (self._checkpoints / LATEST).read_bytes()
        self._folder.write(LATEST, latest, replace=True)
        for missed in kept:  # by a copy that failed, or before there was one
            if missed != step and not _is_whole(there.get(missed, [])):
                self._write(missed, there.get(missed, []), require_held)
        for other in there.keys() - {*kept}:
            self._remove(there[other])

    def _write(self, step: int, there: list[str], require_held: Callable[[], None]) -> None:
        self._remove(there)  # of a try that failed, or of before the run went back
        path = files.path_of(self._checkpoints, step)
        for name in _BESIDE:
            if (self._run / name).exists():
                data = (self._run / name).read_bytes()
                beside = f"{path.name}/{name}.{sha256(data).hexdigest()}"
                self._folder.write(beside, data, replace=True)
        for name in (*FILES, MANIFEST):
            data = (path / name).read_bytes()
            if name == MANIFEST:
                require_held()
            self._folder.write(f"{path.name}/{name}", data, replace=True)

    def clear(self) -> None:
        """Removes the run that is there. Raises UserError."""
        with self._faults("emptied"):
            for names in self._names().values():
                self._remove(names)
            self._remove([name for name in self._folder.entries("") if name in (LATEST, *_RUN)])

    def _remove(self, names: list[str]) -> None:
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            self._folder.remove(name)

    # -------------------------------------------------------- reading

    def is_empty(self) -> bool:
        """Raises UserError where that cannot be told."""
        with self._faults("read"):
            return not self._folder.entries("")

    def fetch_run(self) -> None:
        """Makes the run folder. Raises UserError."""
        with self._faults("read"):
            names = {*self._folder.entries("")}
        if _CONFIG not in names:
            raise UserError(f"{_FIELD}: {self.where} holds no run that can be gone on with")
        made = self._run.with_name(f"{self._run.name}.{time.time_ns()}.new")
        made.mkdir(parents=True)
        try:
            with self._faults("fetched"):
                for name in names.intersection(_RUN):
                    durable.write(made / name, self._folder.read(name))
                made.rename(self._run)
        except UserError:
            shutil.rmtree(made)
            raise
        say(f"{self._run} is not there: made again from {self.where}")

    def fetch_checkpoints(self) -> None:
        """Puts all sound checkpoints into the run folder, at once, and what belongs to the newest.
        Says what is wrong with others. Raises Unsound where there are some, or have been, and none
        is sound; UserError where that cannot be told."""
        made = self._run / "checkpoints.new"
        with self._faults("fetched"):
            shutil.rmtree(made, ignore_errors=True)  # of a process that died
            made.mkdir()
            try:
                sound, beside = self._fetch_sound(made)
                if not sound:
                    return
                files.point(made, sound[0])
                for name in _BESIDE:
                    if name in beside:
                        durable.replace(self._run / name, beside[name])
                    else:
                        (self._run / name).unlink(missing_ok=True)
                shutil.rmtree(self._checkpoints, ignore_errors=True)  # it holds none
                os.rename(made, self._checkpoints)
                durable.flush(self._run)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        told = ", ".join(map(str, reversed(sound)))
        say(f"fetched from {self.where}: the checkpoints of steps {told}")

    def _fetch_sound(self, made: Path) -> tuple[list[int], dict[str, bytes]]:
        """The sound checkpoints, which `made` then holds, the newest first, and what belongs to
        that one."""
        there, sound = self._names(), dict[int, dict[str, bytes]]()
        faults = []
        for step in sorted(there, reverse=True):
            try:
                sound[step] = self._fetch(step, made)
            except Damaged as damage:
                faults.append(f"{damage}".replace(f"{made}", self.where))
                shutil.rmtree(files.path_of(made, step))
        begun = LATEST in self._folder.entries("")
        if begun:
            faults += self._missed(made, there)
        if not sound and (begun or any(map(_is_whole, there.values()))):
            raise Unsound(f"{_FIELD}: no checkpoint is sound: {'; '.join(faults)}")
        for fault in faults:
            say(f"warning: {fault}")
        return [*sound], next(iter(sound.values()), {})

    def _fetch(self, step: int, made: Path) -> dict[str, bytes]:
        """What belongs to a checkpoint, which `made` then holds. Raises Damaged."""
        path = files.path_of(made, step)
        path.mkdir()
        for name in (MANIFEST, *FILES):
            try:
                data = self._folder.read(f"{path.name}/{name}")
            except FileNotFoundError:
                raise Damaged(f"{path} is incomplete: it has no {name}") from None
            durable.write(path / name, data)
        files.verify(made, step)
        durable.flush(path)
        beside = {}
        for entry in self._folder.entries(path.name):
            name, _, told = entry.rpartition(".")
            if name in _BESIDE:
                beside[name] = self._folder.read(f"{path.name}/{entry}")
                if sha256(beside[name]).hexdigest() != told:
                    raise Damaged(f"{path / entry} is damaged: its sha256 is not that of its name")
        return beside

    def _missed(self, made: Path, there: Container[int]) -> list[str]:
        """What is wrong with what `latest.json` names."""
        durable.write(made / LATEST, self._folder.read(LATEST))
        try:
            named = files.pointed(made)
        except Damaged as damage:
            return [f"{damage}".replace(f"{made}", self.where)]
        if named is None or named in there:
            return []
        name = files.path_of(made, named).name
        return [f"{self.where}/{name}, which {LATEST} names, is missing"]

    def _names(self) -> dict[int, list[str]]:
        """The files of each checkpoint, whole or not, by its step."""
        found: dict[int, list[str]] = {}
        for name, _ in self._folder.files(""):
            if (step := files.step_of(name.partition("/")[0])) is not None:
                found.setdefault(step, []).append(name)
        return found

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{_FIELD}: {self.where} cannot be {what}: {error}") from None


def _is_whole(names: list[str]) -> bool:
    return any(name.endswith(f"/{MANIFEST}") for name in names)
