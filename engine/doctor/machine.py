"""Checks of the machine itself: Python, packages, disks, memory, limits. They load no library."""

import importlib.metadata
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from socket import getaddrinfo
from urllib.parse import urlsplit

from engine import durable
from engine.config import UserError
from engine.doctor.apart import Finding
from engine.storage.access import Access, Unreadable, require_public

__all__ = ["clock", "disks", "kernels", "open_files", "packages", "python", "shared_memory", "skew"]

_OURS = Path(__file__).parents[2]  # the folder that engine, kernels and jobs lie in
_PACKAGE = "promptkd-engine"
_GB = 1e9
_LEAST_GB, _FEW_GB = 0.2, 5.0  # of free disk: cannot do with less; is soon full
_TRIED_BYTES = 1 << 20
# Ray raises a process's limit to so many where it may, and warns below the second number
# (ray/_private/worker.py of 2.60).
_RAY_FILES, _FEW_FILES = 65536, 8192
# Ray's object store takes 30 % of the memory, but no more than /dev/shm has, unless that is below
# 10 GB: then it is laid in /tmp (ray/_private/utils.py and services.py of 2.60).
_STORE_SHARE, _STORE_BYTES = 0.3, 10e9
_SKEW_S = 30.0  # S3 refuses what is signed 15 minutes off


def python() -> Iterator[Finding]:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        yield Finding("Python", "fail", found, "use Linux: the engine has been tried nowhere else")
    else:
        yield Finding("Python", "ok", found)


def packages(constraints: str) -> Iterator[Finding]:
    """Against what the project declares, and against the file of pinned versions if it is there."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "skip", f"not checked: {_PACKAGE} is run without being installed")
        return
    asked = [Requirement(line) for line in lines]
    needed = [one for one in asked if not one.marker or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in needed:
        have = _version(one.name)
        if have is None or not one.specifier.contains(have, prereleases=True):
            wrong.append(f"{one.name} {have or 'is missing'}, needs {one.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), f"pip install '{_OURS}', or run make")
        return
    pins = _pins(Path(constraints))
    other = [
        f"{name} {have}, pinned {pinned}"
        for name, pinned in pins.items()
        if (have := _version(name)) and have.partition("+")[0] != pinned.partition("+")[0]
    ]
    told = f"{len(needed)} are as they should be"
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        yield Finding(
            "packages",
            "warn",
            f"{told}, but not what has been tested: {'; '.join(other[:3])}{more}",
            f"pip install --constraint {constraints} '{_OURS}', or run make",
        )
    else:
        yield Finding("packages", "ok", f"{told}, and as pinned" if pins else told)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(constraints: Path) -> dict[str, str]:
    if not constraints.is_file():
        return {}
    pairs = (line.split(";")[0].partition("==") for line in constraints.read_text().splitlines())
    return {name.strip(): version.strip() for name, mark, version in pairs if mark}


def kernels() -> Iterator[Finding]:
    """Whether `import kernels` comes to ours: Hugging Face has a package of that name, too."""
    spec = find_spec("kernels")
    where = spec.origin if spec and spec.origin else "nowhere"
    ours = str(_OURS / "kernels" / "__init__.py")
    places = (PathFinder.find_spec("kernels", [place or os.getcwd()]) for place in sys.path)
    others = {one.origin for one in places if one and one.origin} - {ours}
    if where != ours:
        yield Finding(
            "kernels",
            "fail",
            f"import kernels comes to {where}, not to {ours}",
            "pip uninstall kernels, keep such a folder off PYTHONPATH, or give the engine an "
            "environment of its own",
        )
    elif others:
        yield Finding(
            "kernels",
            "warn",
            f"ours comes first, but there is another at {min(others)}",
            "give the engine an environment of its own: what wants the other one gets ours",
        )
    else:
        yield Finding("kernels", "ok", f"ours, at {_OURS / 'kernels'}")


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else _RAY_FILES
    get = max(soft, min(most, _RAY_FILES)) if soft != resource.RLIM_INFINITY else _RAY_FILES
    found = f"{get:,} in a process of Ray"
    if get < _FEW_FILES:
        mend = f"ulimit -n {_RAY_FILES}, as root, or LimitNOFILE= and nofile of limits.conf"
        yield Finding("open files", "warn", f"{found}, which wants {_FEW_FILES:,} or more", mend)
    else:
        yield Finding("open files", "ok", found)


def shared_memory(folder: str = "/dev/shm") -> Iterator[Finding]:
    memory = _memory_bytes()
    wanted = min(_STORE_SHARE * memory, _STORE_BYTES)
    told = f"{memory / _GB:.1f} GB of memory"
    try:
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
    except OSError as error:
        free, told = 0, str(error.strerror)
    if free < wanted:
        yield Finding(
            "shared memory",
            "warn",
            f"{free / _GB:.2g} GB free in {folder}, Ray wants {wanted / _GB:.2g} ({told}), and "
            "keeps its objects on disk, slowly",
            f"docker run --shm-size={wanted / _GB:.0f}g; in Kubernetes an emptyDir of medium "
            f"Memory at {folder}",
        )
    else:
        yield Finding("shared memory", "ok", f"{free / _GB:.1f} GB free in {folder}; {told}")


def _memory_bytes() -> float:
    """Of the machine, or of the container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def disks(folders: Mapping[str, str]) -> Iterator[Finding]:
    """Whether there is room, and whether it can be written to; `folders` by their fields."""
    for field, folder in folders.items():
        yield _disk(field, Path(folder))


def _disk(field: str, folder: Path) -> Finding:
    above = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free = _free(above)
    found = f"{field} {folder}: {free:,.1f} GB free"
    mend = f"free some, or name another folder as {field}"
    try:
        with tempfile.TemporaryDirectory(prefix=".promptkd-doctor-", dir=above) as tried:
            durable.write(Path(tried) / "tried", bytes(_TRIED_BYTES))
    except OSError as error:
        why = f"{field} {folder}: {above} cannot be written to: {error.strerror}"
        return Finding("disk", "fail", f"{why}; {free:,.1f} GB free", mend)
    if free < _LEAST_GB:
        return Finding("disk", "fail", found, mend)
    return Finding("disk", "warn", found, mend) if free < _FEW_GB else Finding("disk", "ok", found)


def _free(folder: Path) -> float:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize / _GB


def clock(url: str, hosts: Sequence[str], timeout_s: float = 10.0) -> Iterator[Finding]:
    """Against the server of the shards, by the Date of an answer, in whole seconds. A host that may
    not be reached, or does not answer, is another check's finding."""
    if not url:
        yield Finding("clock", "skip", "not checked: nothing to compare with")
        return
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = (HTTPSConnection if secure else HTTPConnection)(host, port, timeout=timeout_s)
    try:
        for *_, address in getaddrinfo(host, port):
            require_public(str(address[0]), host, port, Access(tuple(hosts)))
        connection.request("HEAD", parts.path or "/")
        told = connection.getresponse().getheader("Date", "")
        theirs = parsedate_to_datetime(told).timestamp()
    except (OSError, HTTPException, Unreadable, UserError, ValueError) as error:
        yield Finding("clock", "skip", f"not checked: no time from {host}:{port} ({error})")
    else:
        yield skew(theirs - time.time(), f"{host}'s")
    finally:
        connection.close()


def skew(by_s: float, whose: str) -> Finding:
    """What a clock of others, so many seconds ahead of ours, comes to."""
    if abs(by_s) > _SKEW_S:
        found = f"{whose} is {abs(by_s):,.0f} s {'ahead of' if by_s > 0 else 'behind'} this one"
        return Finding("clock", "warn", found, "run an NTP client, such as chrony, on both")
    return Finding("clock", "ok", f"within {max(abs(by_s), 1):.0f} s of {whose}")
