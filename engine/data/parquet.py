"""Images in a column of a parquet file: as bytes, or as the `bytes` of a struct (Hugging Face)."""

import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, groupby
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import UserError
from engine.data.tables import DAMAGED
from engine.storage.ranges import Changed, Stat, Storage, Unreadable

__all__ = ["Cell", "Images", "cells", "image_column", "large_groups", "opened"]

KEPT_BYTES = 512 << 20  # of decoded row groups
LARGE_GROUP_BYTES = 64_000_000
MOST_GROUP_BYTES = 4 << 30  # of images that are decoded together
_BATCH = 64  # rows decoded at once
_READING = (Unreadable, Changed, UserError)  # raised through the library by our own reading
_IMAGES = ("jpg", "jpeg", "png", "webp", "image", "img", "bytes")  # img2dataset, Hugging Face
_KEYS = ("__key__", "key", "id")
_LABELS = ("cls", "label")


class Cell(NamedTuple):
    """One row."""

    key: str
    data: bytes | None
    label: int  # -1: none


def image_column(file: pq.ParquetFile, wanted: str, where: str) -> str:
    """Name of the column that holds the images; raises UserError where none does."""
    names = {field.name: field for field in file.schema_arrow if _holds_bytes(field)}
    for name in [wanted] if wanted else _IMAGES:
        if name in names:
            return name
    raise UserError(
        f"{where}: no column {wanted!r} of image bytes"
        if wanted
        else f"{where}: no column of image bytes under the usual names ({', '.join(_IMAGES)}); "
        "name it by --image"
    )


def _holds_bytes(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def opened(storage: Storage, url: str, stat: Stat) -> pq.ParquetFile:
    """Raises UserError for what is no parquet file, OSError where it cannot be read."""
    try:
        return _parquet_file(storage, url, stat)
    except _READING:
        raise
    except DAMAGED as error:
        raise UserError(f"{url}: not a parquet file ({error})") from None


def _parquet_file(storage: Storage, url: str, stat: Stat) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(_Seekable(storage, url, stat), mode="r"))


def cells(file: pq.ParquetFile, column: str, where: str) -> Iterator[Cell]:
    """Every row. Raises UserError, naming the row, for one that cannot be decoded."""
    schema = file.schema_arrow
    key = next((name for name in _KEYS if name in schema.names), None)
    label = next((name for name in _LABELS if _counts(schema, name)), None)
    columns = [name for name in (column, key, label) if name]
    row = 0
    try:
        for batch in file.iter_batches(_BATCH, columns=columns):
            for i in range(len(batch)):
                yield Cell(
                    str(batch[key][i].as_py()) if key else f"{row:09d}",
                    _image(batch[column][i]),
                    _label(batch[label][i].as_py()) if label else -1,
                )
                row += 1
    except _READING:
        raise
    except DAMAGED as error:
        raise UserError(f"{where}: row {row} cannot be read ({error})") from None


def large_groups(file: pq.ParquetFile) -> int:
    """How many row groups are so large that to read a block of them is slow."""
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    return sum(group.total_byte_size > LARGE_GROUP_BYTES for group in groups)


class _Opened(NamedTuple):
    file: pq.ParquetFile
    ends: list[int]  # row that each row group ends before
    lock: threading.Lock  # of the file, which only one thread may read


class Images:
    """The stored images of parquet shards. Safe for several threads.

    A row group is the least that can be read. So the last ones are kept, up to KEPT_BYTES in all,
    and one at least.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._opened = lru_cache(maxsize=64)(self._open)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()

    def read(
        self, url: str, stat: Stat, column: str, samples: int, rows: Sequence[int]
    ) -> dict[int, memoryview]:
        """The images in some rows of a shard of so many samples; empty where a row has none.

        Raises Unreadable, and Changed where the file is not one that could have been indexed so.
        """
        try:
            opened = self._opened(url, stat)
            if opened.file.metadata.num_rows != samples:
                raise Changed(f"{url}: has {opened.file.metadata.num_rows} rows, not {samples}")
            found: dict[int, memoryview] = {}
            for group, its in groupby(sorted(rows), partial(bisect_right, opened.ends)):
                images = self._group(url, column, group, opened)
                first = opened.ends[group] - len(images)
                found |= {row: memoryview(_image(images[row - first]) or b"") for row in its}
            return found
        except _READING:
            raise
        except DAMAGED as error:
            raise Changed(f"{url}: cannot be decoded any more ({error})") from None

    def _open(self, url: str, stat: Stat) -> _Opened:
        file = _parquet_file(self._storage, url, stat)
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        return _Opened(file, list(accumulate(g.num_rows for g in groups)), threading.Lock())

    def _group(self, url: str, column: str, group: int, opened: _Opened) -> pa.ChunkedArray:
        """The images of a row group, as they are kept or read."""
        place = (url, column, group)
        with opened.lock:
            with self._lock:
                if place in self._kept:
                    self._kept.move_to_end(place)
                    return self._kept[place]
            batches = list(_within(opened.file.iter_batches(_BATCH, [group], [column])))
            images = pa.chunked_array([batch[column] for batch in batches])
            with self._lock:
                self._kept[place] = images
                while len(self._kept) > 1 and self._bytes() > KEPT_BYTES:
                    self._kept.popitem(last=False)
            return images

    def _bytes(self) -> int:
        return sum(images.nbytes for images in self._kept.values())


def _within(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """A few compressed bytes can stand for many."""
    total = 0
    for batch in batches:
        total += batch.nbytes
        if total > MOST_GROUP_BYTES:
            raise ValueError(f"a row group of more than {MOST_GROUP_BYTES:,} bytes")
        yield batch


def _image(cell: pa.Scalar) -> bytes | None:
    image = cell.as_py()
    return image["bytes"] if isinstance(image, dict) else image


def _counts(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and pa.types.is_integer(schema.field(name).type)


def _label(value: int | None) -> int:
    if value is not None and value >= 1 << 63:
        raise ValueError(f"label {value} is too large")
    return -1 if value is None or value < 0 else value


class _Seekable(io.RawIOBase):
    """A file of a Storage, for a library that seeks."""

    def __init__(self, storage: Storage, url: str, stat: Stat) -> None:
        self._storage, self._url, self._stat, self._at = storage, url, stat, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._stat.bytes)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._stat.bytes if size < 0 else min(self._at + size, self._stat.bytes)
        data = self._storage.read(self._url, self._at, end, self._stat) if end > self._at else b""
        self._at += len(data)
        return data
