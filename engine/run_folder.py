"""The folder of a run: made once, with the settings that it runs with, and a line for each life.

A life is a driver's: from the run's start, or its resumption, to its end, however that comes.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine import durable
from engine.config import Run, RunConfig, UserError, absolute, to_dict
from engine.json_text import parse_object
from engine.telemetry import gpu
from engine.train.identity import Identity

__all__ = [
    "check",
    "check_free",
    "create",
    "ended",
    "git",
    "go_on",
    "require_begun",
    "require_like",
    "write",
]

_IDENTITY = "identity.json"
PACKAGES = ("torch", "open_clip_torch", "deepspeed", "ray", "nvidia-dali-cuda130", "triton")


def check_free(run: Run) -> None:
    """Raises UserError where the folder is taken, or is not a run's to replace."""
    folder = run.folder
    if folder.exists() and not run.overwrite:
        raise UserError(
            f"name: {folder} exists already; choose another name, or pass --overwrite, or --resume "
            "to go on with a distillation"
        )
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise UserError(f"runs_dir: {above} cannot be written to")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"name: {folder} is no run folder: --overwrite will not remove it")


def check(run: RunConfig, resume: bool) -> None:
    """Raises UserError where a run can neither go on in its folder, if it is to `resume`, nor be
    begun there, as far as its config tells."""
    if resume and run.overwrite:
        raise UserError("overwrite: it removes the run that --resume goes on with; choose one")
    if resume and run.folder.exists():
        require_begun(run)
        asked = Identity.asked(absolute(run))
        asked.require(_identity(run).part(asked), f"name: {run.folder}")
    else:
        check_free(run)


def require_begun(run: Run) -> None:
    """Raises UserError where there is no run to go on with."""
    if not (run.folder / "config.json").exists():
        raise UserError(
            f"name: --resume goes on with a run, and {run.folder} holds none: it has no config.json"
        )


def ended(run: Run) -> dict[str, Any] | None:
    """The summary of a run that has come to its end."""
    file = run.folder / "summary.json"
    return _read(file) if file.exists() else None


def require_like(run: Run, identity: Identity) -> None:
    """Raises UserError where the folder's run was begun as one of another identity, or as none that
    can be gone on with."""
    identity.require(_identity(run), f"name: {run.folder}")


def _identity(run: Run) -> Identity:
    return Identity(_read(run.folder / _IDENTITY))


def create(run: Run, identity: Identity | None = None, **life: Any) -> Path:
    """Makes the folder and writes its `config.json`; removes an old one if told to overwrite.
    `identity`: of a run that can be gone on with; `life`: what else there is to say of its first.
    """
    folder, now = run.folder, time.time_ns()
    made, old = (folder.with_name(f"{folder.name}.{now}.{kind}") for kind in ("new", "old"))
    first = _life(**life)
    about = {"versions": first["versions"], "git_sha": first["git_sha"], "lives": [first]}
    try:
        made.mkdir(parents=True)
        if identity:
            write(made / _IDENTITY, identity.settings)
        write(made / "config.json", to_dict(run) | about)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise UserError(f"runs_dir: {folder} cannot be made: {error.strerror}") from None
    if run.overwrite and folder.exists():
        folder.rename(old)
    try:
        folder.mkdir()  # whoever makes it owns it
        made.replace(folder)
    except OSError as error:
        shutil.rmtree(made)
        raise UserError(f"name: {folder} has been taken meanwhile ({error.strerror})") from None
    if old.exists():
        shutil.rmtree(old)
    return folder


def go_on(run: Run, **life: Any) -> tuple[int, float]:
    """Adds a life to `config.json`, which is otherwise kept. Gives the life's number, and the
    seconds that the earlier ones took."""
    file, metrics = run.folder / "config.json", run.folder / "metrics.jsonl"
    told = _read(file)
    if not (lives := told.get("lives")):
        raise UserError(f"name: {file} tells of no run that can be gone on with")
    last = lives[-1]
    # It may have had no chance to say when it ended.
    last_s = metrics.stat().st_mtime - last["started"] if metrics.exists() else 0.0
    last["wall_s"] = max(last_s, 0.0)
    told["lives"] = [*lives, _life(**life)]
    write(file, told)
    return len(told["lives"]), sum(life["wall_s"] for life in lives)


def _life(**more: Any) -> dict[str, Any]:
    versions = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}
    return {
        "started": time.time(),
        "host": socket.gethostname(),
        "gpu": gpu(),
        **more,
        "versions": versions,
        "git_sha": git("rev-parse", "--verify", "HEAD"),
    }


def git(*words: str) -> str | None:
    """What git says of the source tree; None where there is no tree, or no git."""
    try:
        found = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def write(path: Path, value: Any) -> None:
    """Writes JSON, the whole of it or nothing."""
    durable.replace(path, f"{json.dumps(value, indent=2)}\n".encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"name: {path} is missing: that run cannot be gone on with") from None
    except ValueError as error:
        raise UserError(f"name: {path} is damaged: {error}") from None
