"""Where a corpus lies: what a user writes, spelled out as shards.

`a::b` is both, `{0000..0999}` every number, a glob what it matches. A folder is the shards in it:
its `.tar` files; where it has none, its parquet files; where it has neither, its images.
"""

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from braceexpand import braceexpand

from engine.config import CorpusConfig, UserError
from engine.storage.access import Access, Unreadable, literal_address, require_public, scheme, shown
from engine.storage.ranges import Storage, check_url

__all__ = ["Shard", "check_places", "find_shards", "is_image", "kind_of", "named", "shards_in"]

_MOST = 10_000_000  # names that braces may stand for
_NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
_FILES = 10_000  # images of a folder that make a shard
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Shard(NamedTuple):
    """A file of samples, or some of the image files below a folder."""

    url: str  # of `files`: FOLDER#NUMBER
    kind: str  # tar, parquet or files
    files: tuple[str, ...] = ()  # names below the folder


def is_image(suffix: str) -> bool:
    return suffix.rsplit(".", 1)[-1].lower() in _IMAGE_SUFFIXES


def kind_of(url: str) -> str | None:
    """tar or parquet, by the name; None for a folder, whatever its name."""
    if os.path.isdir(url):
        return None
    return next((kind for kind in ("tar", "parquet") if url.endswith(f".{kind}")), None)


def check_places(config: CorpusConfig) -> None:
    """What can be said of a run's shards on a machine that may not see them. Raises UserError where
    a url is of no kind that is read, or names an address that is not public and not listed."""
    access = Access(config.hosts)
    for where, field in (
        (config.shards, "corpus.shards"),
        (config.evaluation, "corpus.evaluation"),
    ):
        for url in spelled_out(where, field) if where or field == "corpus.shards" else ():
            if scheme(url) in ("http", "https"):
                _check_host(url, access, field)


def _check_host(url: str, access: Access, field: str) -> None:
    """Of names, the addresses are looked up where they are connected to."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if address := literal_address(host):
        try:
            require_public(address, host, port, access)
        except Unreadable as error:
            raise UserError(f"{field}: {shown(url)}: {error}") from None


def spelled_out(where: str, field: str) -> list[str]:
    """The folders, files and globs that `where` names. Raises UserError, naming `field`."""
    if not where:
        raise UserError(f"{field} is not set: give a folder, glob or URL of .tar shards")
    if os.path.exists(where):
        return [where]
    names = [name for part in where.split("::") for name in _unbraced(part, field)]
    for name in names:
        check_url(name, field)
    return names


def _unbraced(part: str, field: str) -> Iterator[str]:
    names = 1
    for first, last, step in _NUMBERS.findall(part):
        names *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
    if names > _MOST:
        raise UserError(f"{field}: {part} stands for more than {_MOST:,} names")
    try:
        found = list(islice(braceexpand(part), _MOST + 1))
    except ValueError as error:
        raise UserError(f"{field}: {part}: {error}") from None
    if len(found) > _MOST:
        raise UserError(f"{field}: {part} stands for more than {_MOST:,} names")
    yield from found


def named(where: str, field: str) -> list[str]:
    """The folders and shards that `where` names: local ones by their absolute paths, globs matched;
    a glob of a remote store is left to be matched. Raises UserError, naming `field`."""
    return [match for name in spelled_out(where, field) for match in _matches(name, field)]


def _matches(name: str, field: str) -> list[str]:
    if "://" in name:
        return [name.rstrip("/")]
    if os.path.exists(name) or not glob.has_magic(name):
        return [os.path.abspath(name)]
    found = [one for one in sorted(glob.glob(os.path.abspath(name))) if not _is_ours(one)]
    if not found:
        raise UserError(f"{field}: no .tar shards at {name}")
    if strange := [one for one in found if os.path.isfile(one) and not kind_of(one)]:
        raise UserError(f"{field}: {strange[0]} is not a plain .tar or .parquet shard")
    return found


def find_shards(where: str, storage: Storage, field: str) -> list[Shard]:
    """Every shard that `where` names, in order. Raises UserError where there is none."""
    shards = [shard for name in named(where, field) for shard in _at(name, storage, field)]
    if len({shard.url for shard in shards}) < len(shards):
        raise UserError(f"{field}: {where} names a shard twice")
    return shards


def _at(name: str, storage: Storage, field: str) -> list[Shard]:
    if kind := kind_of(name):
        if "://" not in name or not glob.has_magic(name):
            return [Shard(name, kind)]
        found = [Shard(url, kind) for url in storage.list(name) if not _is_ours(url)]
    elif os.path.isfile(name):
        raise UserError(f"{field}: {name} is not a plain .tar or .parquet shard")
    elif name.startswith(("http://", "https://")):
        raise UserError(
            f"{field}: {name}: a web server lists no files, and signed URLs are not read; name the "
            "shards: {000..099}.tar"
        )
    elif "://" not in name and not os.path.exists(name):
        raise UserError(f"{field}: {name}: no such file or folder")
    else:
        found = shards_in(name, storage) or _images_in(Path(name))
    if not found:
        raise UserError(
            f"{field}: no .tar shards at {name}, nor .parquet; folders below it are not searched"
        )
    return found


def shards_in(folder: str, storage: Storage) -> list[Shard]:
    """The `.tar` files of a folder; where it has none, its parquet files."""
    urls = [url for url in storage.list(folder) if not _is_ours(url)]
    for kind in ("tar", "parquet"):
        if found := [Shard(url, kind) for url in urls if kind_of(url) == kind]:
            return found
    return []


def _images_in(folder: Path) -> list[Shard]:
    files = sorted(_images_below(folder)) if folder.is_dir() else []
    return [
        Shard(f"{folder}#{number:05d}", "files", tuple(files[low : low + _FILES]))
        for number, low in enumerate(range(0, len(files), _FILES))
    ]


def _is_ours(url: str) -> bool:
    return url.endswith("/corpus.parquet")


def _images_below(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if is_image(name) and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)
