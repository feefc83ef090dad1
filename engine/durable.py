"""Files that are there whole or not at all, and stay when the power goes. All raise OSError."""

import os
from pathlib import Path

__all__ = ["flush", "replace", "write"]

_PIECE_BYTES = 1 << 24  # of one write


def write(path: Path, data: bytes) -> None:
    """Writes a file and flushes it, though not its name; through `os.write`, so that a full disk is
    an error, which names the file. A symlink is not followed: it is an error, too."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest[:_PIECE_BYTES]) :]
        os.fsync(file)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(file)


def replace(path: Path, data: bytes) -> None:
    """Writes a file atomically and for good."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.unlink(missing_ok=True)  # what may lie there is not ours: it could be a link
        write(partial, data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Makes a file's bytes last, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
