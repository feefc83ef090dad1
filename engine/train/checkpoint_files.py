"""Checkpoints on disk: folders that are there whole or not at all, and that can be verified.

A folder `step-NNNNNNNN` holds FILES, and a `manifest.json` with the size and sha256 of each and a
digest of itself. It is written under another name, flushed file by file, and renamed, which commits
it; then `latest.json` names it, so that a folder that gets lost is missed.

One process writes, into a folder of a file system. Nothing here is a pickle, and no name is taken
from a file. Hashes tell damage, not malice: who may write a checkpoint may write its manifest too.
All functions raise OSError; writes go through `os.write`, so that a full disk is one.
"""

import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from engine import durable
from engine.json_text import parse_object

__all__ = [
    "FILES",
    "LATEST",
    "MANIFEST",
    "Damaged",
    "commit",
    "path_of",
    "point",
    "pointed",
    "read_json",
    "remove",
    "retain",
    "step_of",
    "steps",
    "verify",
]

FILES = ("student.safetensors", "optimizer.safetensors", "state.json")
MANIFEST, LATEST = "manifest.json", "latest.json"
_FORMAT = 1
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})")
_LEFT_OVER = re.compile(rf"{_NAME.pattern}\.(tmp|old)")  # of a process that died
_MOST_JSON_BYTES = 1 << 20


class Damaged(Exception):
    """A file of a checkpoint is not what was written; the message names it."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Of a folder that is named as a checkpoint is."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def steps(folder: Path) -> list[int]:
    """Of the committed checkpoints, sound or not, the newest last."""
    return sorted(step for step in map(step_of, _entries(folder)) if step is not None)


# ------------------------------------------------------------ writing


def commit(
    folder: Path,
    step: int,
    files: Iterable[tuple[str, bytes]],
    require_held: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint of FILES, which are asked for one by one. Whatever happens meanwhile,
    those that were there stay; one of the same step is replaced. `require_held` raises where this
    process is not to write any more: it is asked first, and just before the commitment."""
    require_held()
    final = path_of(folder, step)
    partial = final.with_name(f"{final.name}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    durable.flush(folder.parent)
    _remove_left_overs(folder, step)
    os.mkdir(partial)
    try:
        told = {}
        for name, data in files:
            durable.write(partial / name, data)
            told[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert told.keys() == {*FILES}
        manifest = {"format": _FORMAT, "step": step, "files": told}
        durable.write(partial / MANIFEST, _json(manifest | {"self": _digest(manifest)}))
        durable.flush(partial)
        require_held()
        if final.exists():
            os.rename(final, final.with_name(f"{final.name}.old"))
        os.rename(partial, final)
    except BaseException:  # a full disk is not to stay full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    durable.flush(folder)
    point(folder, step)
    return final


def point(folder: Path, step: int | None) -> None:
    """Names the newest checkpoint; None: there is none any more."""
    if step is not None:
        durable.replace(folder / LATEST, _json({"step": step}))
    elif (folder / LATEST).exists():
        os.unlink(folder / LATEST)
        durable.flush(folder)


def retain(folder: Path, newest: int, kept: Container[int]) -> None:
    """Removes all other checkpoints up to the `newest`, and what processes that died have left;
    what is newer, another process may have written."""
    for step in steps(folder):
        if step <= newest and step not in kept:
            remove(folder, step)
    _remove_left_overs(folder, newest)


def remove(folder: Path, step: int) -> None:
    path = path_of(folder, step)
    doomed = path.with_name(f"{path.name}.old")  # a folder that is named a step is always whole
    if os.path.lexists(doomed):
        _discard(doomed)
    os.rename(path, doomed)
    _discard(doomed)


def _remove_left_overs(folder: Path, newest: int) -> None:
    for name in map(_LEFT_OVER.fullmatch, _entries(folder)):
        if name and int(name[1]) <= newest:
            _discard(folder / name[0])


def _discard(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
    else:
        shutil.rmtree(path)


# ------------------------------------------------------------ reading


def pointed(folder: Path) -> int | None:
    """The step that `latest.json` names; None where there is no such file. Raises Damaged."""
    file = folder / LATEST
    if not os.path.lexists(file):
        return None
    step = read_json(file).get("step")
    if not _is_count(step):
        raise Damaged(f"{file} is damaged: it names no step")
    return step


def verify(folder: Path, step: int) -> Path:
    """The path of a checkpoint whose files are what was written, and no others. Raises Damaged."""
    path = path_of(folder, step)
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path} is damaged: it is no folder")
    told = _manifest(path, step)
    if strange := sorted({*_entries(path)} - {*FILES, MANIFEST}):
        raise Damaged(f"{path / strange[0]} is damaged: it is no file of a checkpoint")
    for name in FILES:
        _verify_file(path / name, told[name]["bytes"], told[name]["sha256"])
    return path


def read_json(file: Path) -> dict[str, Any]:
    """An object, of a file of at most 1 MiB. Raises Damaged."""
    with _opened(file) as opened:
        try:
            data = opened.read(_MOST_JSON_BYTES + 1)
            if len(data) > _MOST_JSON_BYTES:
                raise ValueError(f"it has more than {_MOST_JSON_BYTES} bytes")
            return parse_object(data)
        except (ValueError, OSError) as error:
            raise Damaged(f"{file} is damaged: {error}") from None


def _verify_file(file: Path, size: int, sha256: str) -> None:
    with _opened(file) as opened:
        if (found_size := os.fstat(opened.fileno()).st_size) != size:
            raise Damaged(f"{file} is damaged: it has {found_size} bytes, not {size}")
        try:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{file} is damaged: {error.strerror}") from None
    if found != sha256:
        raise Damaged(f"{file} is damaged: its sha256 is not that of {MANIFEST}")


def _manifest(path: Path, step: int) -> dict[str, Any]:
    """What it tells of FILES: `bytes` and `sha256` of each."""
    file = path / MANIFEST
    manifest = read_json(file)
    if manifest.pop("self", None) != _digest(manifest):
        raise Damaged(f"{file} is damaged: it has not its own digest")
    if (manifest.get("format"), manifest.get("step")) != (_FORMAT, step):
        raise Damaged(f"{file} is damaged: it is of another step or format")
    told = manifest.get("files")
    if not isinstance(told, dict) or told.keys() != {*FILES}:
        raise Damaged(f"{file} is damaged: it names other files than a checkpoint has")
    for name, about in told.items():
        if not isinstance(about, dict) or about.keys() != {"bytes", "sha256"}:
            raise Damaged(f"{file} is damaged: it does not tell bytes and sha256 of {name}")
    return told


def _opened(file: Path) -> io.BufferedReader:
    """A plain file, through no link. Raises Damaged."""
    try:
        # Without O_NONBLOCK a pipe in its place would be waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Damaged(f"{file} is damaged: it is missing") from None
    except OSError as error:
        raise Damaged(f"{file} is damaged: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{file} is damaged: it is no plain file")
    return os.fdopen(descriptor, "rb")


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
