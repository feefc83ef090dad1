"""A folder of small files, on disk or in an object store, each there whole or not at all."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Protocol

from fsspec.core import url_to_fs

from engine.config import UserError
from engine.storage.access import scheme

__all__ = ["Folder", "open_folder"]

_REMOTE = {"s3": "'promptkd-engine[s3]'", "gs": "'promptkd-engine[gcs]'", "memory": "fsspec"}
_BROKEN_OFF = ".tmp"


class Folder(Protocol):
    """Files by their names, relative and with slashes. Methods raise OSError, are safe for threads,
    and other processes may use the same folder."""

    def read(self, name: str, most: int | None = None) -> bytes:
        """Its bytes, or the first `most`; FileNotFoundError where it is not there."""

    def write(self, name: str, data: bytes, replace: bool) -> bool:
        """Whether it was written: a file that is there is left alone, unless to `replace`."""

    def remove(self, name: str) -> None: ...

    def entries(self, under: str) -> list[str]:
        """Names of the files and folders in a folder, without that of the folder, sorted."""

    def files(self, under: str) -> Iterator[tuple[str, int]]:
        """Whole name and bytes of each file at any depth in a folder. Of millions it holds those
        of one folder at a time."""

    def broken_off(self, under: str, older_than_s: float) -> list[str]:
        """Names of what writes have left that were broken off."""


def open_folder(where: str, field: str) -> Folder:
    """Raises UserError, naming `field`, for anything but a path or a file, s3 or gs URL. (memory is
    fsspec's, for tests.)"""
    kind = scheme(where)
    if not where or not where.isprintable() or kind not in ("", "file", *_REMOTE):
        raise UserError(f"{field}: {where!r} is not a folder, or an s3 or gs URL")
    return _Remote(where, kind, field) if kind in _REMOTE else _Local(where)


class _Local:
    def __init__(self, where: str) -> None:
        self._root = Path(where.removeprefix("file://"))

    def read(self, name: str, most: int | None = None) -> bytes:
        with open(self._root / name, "rb") as file:
            return file.read(-1 if most is None else most)

    def write(self, name: str, data: bytes, replace: bool) -> bool:
        path = self._root / name
        if path.exists() and not replace:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_BROKEN_OFF}")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        path = self._root / name
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self._root:
                return
            try:
                folder.rmdir()
            except OSError:  # it holds more
                return

    def entries(self, under: str) -> list[str]:
        try:
            found = sorted(os.listdir(self._root / under))
        except FileNotFoundError:
            return []
        return [name for name in found if not name.endswith(_BROKEN_OFF)]

    def files(self, under: str) -> Iterator[tuple[str, int]]:
        for name, about in self._walk(under):
            if not name.endswith(_BROKEN_OFF):
                yield name, about.st_size

    def broken_off(self, under: str, older_than_s: float) -> list[str]:
        before = time.time() - older_than_s
        return sorted(
            name
            for name, about in self._walk(under)
            if name.endswith(_BROKEN_OFF) and about.st_mtime < before
        )

    def _walk(self, under: str) -> Iterator[tuple[str, os.stat_result]]:
        try:
            inside = sorted(os.scandir(self._root / under), key=attrgetter("name"))
        except FileNotFoundError:  # not there, or removed meanwhile
            return
        for entry in inside:
            name = f"{under}/{entry.name}" if under else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(name)
                continue
            try:
                yield name, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue


class _Remote:
    """An object store: what it is given at once, it has whole or not at all."""

    def __init__(self, where: str, kind: str, field: str) -> None:
        if "::" in where:  # fsspec would chain file systems
            raise UserError(f"{field}: {where!r}: :: has no meaning here")
        try:
            self._fs, root = url_to_fs(where, use_listings_cache=False)
        except ImportError as error:
            raise UserError(
                f"{field}: {where} needs a package that is missing ({error}): "
                f"pip install {_REMOTE[kind]}"
            ) from None
        self._root = root.rstrip("/")

    def read(self, name: str, most: int | None = None) -> bytes:
        with _faults(name):
            return self._fs.cat_file(self._path(name), end=most)

    def write(self, name: str, data: bytes, replace: bool) -> bool:
        with _faults(name):
            if not replace and self._fs.exists(self._path(name)):
                return False
            self._fs.pipe_file(self._path(name), data)
            return True

    def remove(self, name: str) -> None:
        with _faults(name):
            self._fs.rm_file(self._path(name))

    def entries(self, under: str) -> list[str]:
        with _faults(under):
            try:
                found = self._fs.ls(self._path(under), detail=False)
            except FileNotFoundError:
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def files(self, under: str) -> Iterator[tuple[str, int]]:
        with _faults(under):  # fsspec's own walk() takes a folder that it may not list for empty
            try:
                inside = self._fs.ls(self._path(under), detail=True)
            except FileNotFoundError:
                return
        for about in sorted(inside, key=itemgetter("name")):
            name = about["name"].rstrip("/")[len(self._root) + 1 :]
            if name == under:  # a marker of the folder itself
                continue
            if about["type"] == "directory":
                yield from self.files(name)
            else:
                yield name, about["size"]

    def broken_off(self, under: str, older_than_s: float) -> list[str]:
        return []

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Makes an OSError of every library's own kind of error."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{name}: {type(error).__name__}: {error}") from error
