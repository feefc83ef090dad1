"""What travels to a cluster with a job: our code and a config, and the pins of what they need."""

import json
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from engine.config import RunConfig, UserError, to_dict

__all__ = ["CONFIG", "Upload", "pack", "pinned", "refuse_credentials"]

CONFIG = "run.json"
_HOUSE, _OURS = Path(__file__).parent.parent, canonicalize_name("promptkd-engine")
_TRAVELS = (
    *("engine/**/*.py", "kernels/**/*.py", "jobs/**/*.py"),
    *("engine/report/*.html", "engine/report/*.css", "jobs/configs/presets/**/*.toml"),
)
_PASSWORD = re.compile(r"://[^/?#\s]*@")
_PARAMETER = re.compile(r"[?&;]([^=&;#\s]+)=")
_SECRET = re.compile(
    r"token|secret|signature|credential|passw|api.?key|access.?key|^(key|sig|auth|authorization)$",
    re.IGNORECASE,
)


class Upload(NamedTuple):
    """What has been laid out to be sent."""

    files: int
    bytes: int


def pack(config: RunConfig, folder: Path) -> Upload:
    """Lays out in `folder` what a run needs of this project: Python files and presets, links left
    out, and the config as run.json. What is not listed here stays: data, models, environment
    variables, and whatever else lies beside the code.

    Raises UserError where the config holds credentials.
    """
    refuse_credentials(config)
    sources = {path for pattern in _TRAVELS for path in _HOUSE.glob(pattern)}
    for source in sources:
        if source.is_file() and not source.is_symlink():
            target = folder / source.relative_to(_HOUSE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (folder / CONFIG).write_text(json.dumps(to_dict(config)))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Upload(len(sizes), sum(sizes))


def refuse_credentials(config: RunConfig) -> None:
    """Raises UserError where a url of a config has a password, a token or a signature in it: the
    config lies readable in the cluster's storage, in the job's list of files and its run folder."""
    for field, text in _texts(to_dict(config)):
        if "://" not in text:
            continue
        what = "a user or password before its @" if _PASSWORD.search(text) else ""
        for name in _PARAMETER.findall(text):
            if _SECRET.search(name):
                what = f"a credential in its parameter {name}"
        if what:
            raise UserError(
                f"{field}: a url has {what}, which whoever sees the job could read. Leave it out, "
                "and give the credentials to the cluster's nodes, as their storage clients find "
                "them: AWS_* variables or ~/.aws for s3://, GOOGLE_APPLICATION_CREDENTIALS for "
                "gs://, HF_TOKEN for hf://"
            )


def pinned(constraints: Path, extras: Sequence[str]) -> list[str]:
    """Lines `name==version` of all that this project needs to run, with those of its `extras`, in
    the versions of a file of constraints. What is needed is read off the installed packages.

    Raises UserError where the file is not there, or a package is in it or here not.
    """
    try:
        lines = constraints.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(
            f"environment: locked takes the versions of {constraints}, which is not there: submit "
            "from a checkout of this project, or use --environment cluster"
        ) from None
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    needed = _needed(extras)
    if missing := sorted(needed - pins.keys()):
        raise UserError(f"environment: {constraints} has no version of {', '.join(missing)}")
    return [pins[name] for name in sorted(needed)]


def _needed(extras: Sequence[str]) -> set[NormalizedName]:
    """Names of the packages that this project depends on, and that those depend on."""
    coming = [(_OURS, frozenset(extras))]
    seen = set(coming)
    while coming:
        name, asked = coming.pop()
        try:
            requirements = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            raise UserError(
                f"environment: locked reads off what is installed here, and {name} is not"
            ) from None
        for one in requirements:
            if one.marker and not any(one.marker.evaluate({"extra": e}) for e in ("", *asked)):
                continue
            found = canonicalize_name(one.name), frozenset(one.extras)
            if found not in seen:
                seen.add(found)
                coming.append(found)
    return {name for name, _ in seen} - {_OURS}


def _texts(tree: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Dotted field and text of every text in a config."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, f"{field}.{name}" if field else name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, field)
    elif isinstance(tree, str):
        yield field, tree
