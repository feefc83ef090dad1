"""Records of a run folder, as they are: files may be missing, end in the middle of a line, tell of
steps that a restart has repeated, come from an older version, or from somebody who means harm."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from engine.json_text import MOST_BYTES, parse_object

__all__ = [
    "Record",
    "lineage",
    "number",
    "opened",
    "read_object",
    "read_records",
    "read_several",
    "series",
    "too_large",
]

_READ_BYTES = 32 << 20  # of a file of records: a hundred thousand of them
_TOGETHER_BYTES = 256 << 20  # of the files of all workers
_PIECES = 1024  # of a longer one that are read
_LINE_BYTES = 1 << 20
_LARGEST = 1e300  # of numbers, with which can be reckoned
Record = Mapping[str, Any]


def opened(file: Path) -> BinaryIO:
    """A regular file, for reading: nothing else, such as a FIFO, which may keep us waiting for
    ever. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{file} is no regular file")
    return open(descriptor, "rb")


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is missing, damaged, or holds no object."""
    try:
        with opened(file) as text:
            return parse_object(text.read(MOST_BYTES + 1))
    except (OSError, ValueError):
        return {}


def read_records(file: Path, most_bytes: int = _READ_BYTES) -> Iterator[Record]:
    """The whole records of a file, in its order; none where there is no such file. Of a file of
    more than `most_bytes`, about so many are read, in pieces evenly far apart."""
    try:
        with opened(file) as lines:
            for line in _lines(lines, most_bytes):
                try:
                    yield parse_object(line)
                except ValueError:  # a worker was killed while it wrote
                    continue
    except OSError:
        return


def read_several(files: Sequence[Path]) -> Iterator[Iterator[Record]]:
    """The records of each of some files, of which 256 MiB are read together at most."""
    return (read_records(file, _share_bytes(files)) for file in files)


def too_large(files: Sequence[Path]) -> int:
    """How many of these files read_several() reads in part."""
    return sum(file.is_file() and file.stat().st_size > _share_bytes(files) for file in files)


def _share_bytes(files: Sequence[Path]) -> int:
    return min(_READ_BYTES, _TOGETHER_BYTES // max(1, len(files)))


def _lines(file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """Lines; one that is longer than any record comes in parts, which are none."""
    whole = os.fstat(file.fileno()).st_size
    if whole <= most_bytes:
        yield from iter(lambda: file.readline(_LINE_BYTES), b"")
        return
    piece, left = most_bytes // _PIECES, 2 * most_bytes
    for number in range(_PIECES):
        start = number * (whole - piece) // (_PIECES - 1)
        if start < file.tell():
            continue  # a long line has reached beyond it
        file.seek(start)
        if start:
            left -= len(file.readline(_LINE_BYTES))  # the end of a line
        while file.tell() < start + piece and (line := file.readline(_LINE_BYTES)):
            left -= len(line)
            yield line
        if left <= 0:
            return


def lineage(records: Iterable[Record]) -> list[Record]:
    """Those of the steps that the run's weights have gone through, in the order of their steps:
    where it went back to an earlier step, what it tells from there on replaces what it told before.
    """
    kept: list[Record] = []
    for record in records:
        step = number(record, "step")
        if step is None:
            continue
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        kept.append(record)
    return kept


def number(record: Record, name: str) -> float | None:
    """A number of a record, smaller than 1e300; None where it has none of that name."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _LARGEST else None  # nan is not less, either


def series(records: Sequence[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the records that have both."""
    pairs = [(number(record, x), number(record, y)) for record in records]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in whole], [b for _, b in whole]
