"""The folder of a run: made once, with the settings and versions that it ran with."""

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.config import Run, UserError, to_dict

__all__ = ["check_free", "create", "git", "write"]

PACKAGES = ("torch", "open_clip_torch", "deepspeed", "ray", "nvidia-dali-cuda130", "triton")


def check_free(run: Run) -> None:
    """Raises UserError where the folder is taken, or is not a run's to replace."""
    folder = run.folder
    if folder.exists() and not run.overwrite:
        raise UserError(f"name: {folder} exists already; choose another name, or pass --overwrite")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise UserError(f"runs_dir: {above} cannot be written to")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"name: {folder} is no run folder: --overwrite will not remove it")


def create(run: Run) -> Path:
    """Makes the folder and writes its `config.json`; removes an old one if told to overwrite."""
    folder = run.folder
    if run.overwrite and folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)  # whoever makes it owns it
    except FileExistsError:
        raise UserError(f"name: {folder} has been taken by another run meanwhile") from None
    versions = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}
    about = {"versions": versions, "git_sha": git("rev-parse", "--verify", "HEAD")}
    write(folder / "config.json", to_dict(run) | about)
    return folder


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
    """Writes JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")
