"""What is known of a corpus: a row a shard in its manifest, a row a sample in each shard's index.

Both are columnar (parquet, and Arrow, which is mapped and not read). The manifest of 100,000 shards
is some megabytes; the index of a shard is looked at only when a block of it is.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from engine.config import UserError
from engine.data.header import Header
from engine.data.tables import DAMAGED
from engine.json_text import parse_json

__all__ = [
    "DUPLICATE",
    "FORMATS",
    "MANIFEST",
    "MOST_INDEX_BYTES",
    "SAMPLES",
    "Entry",
    "Facts",
    "ShardIndex",
    "digest",
    "left_out",
    "read_manifest",
    "write_file",
    "write_manifest",
]

MANIFEST = "corpus.parquet"
digest: Callable[[bytes | memoryview], int] = xxhash.xxh3_64_intdigest  # of an image
FORMATS = ("jpg", "png", "webp")
KINDS = ("tar", "parquet", "files")
DUPLICATE = "duplicate"  # the reason of a sample whose image is an earlier one
MOST_INDEX_BYTES = 1 << 30  # of a manifest or index from afar
_MOST_SHARDS = 10_000_000  # of a manifest
VERSION = 2  # of both; another one is refused
SAMPLES = pa.schema(
    {
        "key": pa.string(),
        "offset": pa.int64(),  # of the image: byte of a tar, row of a parquet file
        "bytes": pa.int64(),
        "digest": pa.uint64(),  # xxh3 of the image
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "format": pa.int8(),  # place in FORMATS
        "orientation": pa.int8(),
        "plain": pa.bool_(),
        "label": pa.int64(),  # -1: none
        "reason": pa.string(),  # why it cannot be used
    }
)
_MANIFEST = pa.schema(
    {
        "shard": pa.string(),
        "kind": pa.string(),
        "index": pa.string(),
        "bytes": pa.int64(),
        "tag": pa.string(),
        "column": pa.string(),
        "samples": pa.int64(),
        "usable": pa.int64(),
        "short": pa.string(),
        "largest_label": pa.int64(),
        "content": pa.string(),
    }
)


@dataclass(frozen=True)
class Facts:
    """Of one shard as a whole."""

    shard: str
    kind: str  # tar, parquet or files
    bytes: int
    tag: str  # changes when the shard does: ETag, or time of change
    asked: str = ""  # suffix (tar) or column (parquet) to take for the images, as it was asked for
    column: str = ""  # of a parquet file: where the images are
    short: str = ""  # "n/m": whole samples of those it should have, where its tail may be lost
    notes: dict[str, int] = field(default_factory=dict)  # oddities, by name


class Entry(NamedTuple):
    """One sample, as the index has it."""

    key: str
    offset: int
    bytes: int
    digest: int
    label: int  # -1: none
    reason: str | None
    header: Header  # of nothing, where there is a reason


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard, and of every sample in it (a table of SAMPLES)."""

    facts: Facts
    table: pa.Table

    @classmethod
    def read(cls, data: pa.Buffer | pa.NativeFile | bytes, where: str) -> "ShardIndex":
        """Of a file; raises UserError, naming it `where`."""
        try:
            table = pa.ipc.open_file(data).read_all()
            told = _told(table, SAMPLES)
            facts = Facts(**{name: value for name, value in told.items() if name != "version"})
            _check_samples(facts, table)
        except DAMAGED as error:
            raise UserError(f"{where}: not a shard's index ({error}); index it again") from None
        return cls(facts, table)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """Raises UserError."""
        try:
            data = pa.memory_map(str(path))
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run `promptkd index` again") from None
        except DAMAGED as error:  # an empty file cannot be mapped
            raise UserError(f"{path}: not a shard's index ({error}); index it again") from None
        return cls.read(data, str(path))

    def bytes(self) -> bytes:
        told = json.dumps(asdict(self.facts) | {"version": VERSION})
        table = self.table.replace_schema_metadata({"promptkd": told})
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    @property
    def samples(self) -> int:
        return self.table.num_rows

    @cached_property
    def reasons(self) -> Counter[str]:
        """Why samples cannot be used, and how many."""
        return Counter(self.table["reason"].drop_null().to_pylist())

    def all_reasons(self) -> list[str | None]:
        """Why a sample cannot be used, of every sample."""
        return self.table["reason"].to_pylist()

    def excluded(self) -> Iterator[tuple[int, str, str]]:
        """Position, key and reason of the samples that cannot be used."""
        for position in np.flatnonzero(self.table["reason"].is_valid()).tolist():
            yield position, *(self.table[name][position].as_py() for name in ("key", "reason"))

    def with_duplicates(self, positions: Sequence[int] | np.ndarray) -> "ShardIndex":
        """With these samples, and no others, excluded as duplicates; itself if that is so."""
        wanted = set(map(int, positions))
        reasons = self.all_reasons()
        if {i for i, reason in enumerate(reasons) if reason == DUPLICATE} == wanted:
            return self
        for i, reason in enumerate(reasons):
            if reason == DUPLICATE or i in wanted:
                reasons[i] = DUPLICATE if i in wanted else None
        at = SAMPLES.get_field_index("reason")
        table = self.table.set_column(at, SAMPLES.field(at), pa.array(reasons, pa.string()))
        return ShardIndex(self.facts, table)

    def row(self, shard: str, index: str) -> dict[str, Any]:
        """Of the manifest, by the names of the shard and of this index there.

        `content` is a hash of all that training sees: images, labels, and what is excluded, why.
        """
        facts, labels = self.facts, self.column("label")
        content = hashlib.sha256(self.column("digest").tobytes() + labels.tobytes())
        excluded = [(position, reason) for position, _, reason in self.excluded()]
        content.update(json.dumps(excluded).encode())
        return {
            "shard": shard,
            "kind": facts.kind,
            "index": index,
            "bytes": facts.bytes,
            "tag": facts.tag,
            "column": facts.column,
            "samples": self.samples,
            "usable": self.samples - self.reasons.total(),
            "short": facts.short,
            "largest_label": int(labels.max(initial=-1)),
            "content": content.hexdigest(),
        }

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [samples]."""
        return self.table[name].to_numpy()

    def entries(self, start: int, length: int) -> list[Entry]:
        """Of `length` samples from position `start` on."""
        columns = self.table.slice(start, length).to_pydict()
        columns["format"] = [FORMATS[kind] for kind in columns["format"]]
        told = ("format", "width", "height", "orientation", "plain")
        headers = [Header(*row) for row in zip(*(columns[name] for name in told), strict=True)]
        others = ("key", "offset", "bytes", "digest", "label", "reason")
        rows = zip(*(columns[name] for name in others), strict=True)
        return [Entry._make((*row, header)) for row, header in zip(rows, headers, strict=True)]


def left_out(shard: str, kind: str) -> dict[str, Any]:
    """The manifest's row of a shard that could not be indexed: it has no samples."""
    told = {"shard": shard, "kind": kind, "short": "0/?", "largest_label": -1}
    others = {f.name: 0 if pa.types.is_integer(f.type) else "" for f in _MANIFEST}
    return others | told


def write_manifest(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the manifest of a corpus, atomically: the last thing that indexing does."""
    schema = _MANIFEST.with_metadata({"promptkd": json.dumps({"version": VERSION})})
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema)
    pq.write_table(table, buffer, write_page_checksum=True)
    write_file(folder / MANIFEST, buffer.getvalue())


def read_manifest(data: bytes, where: str, field: str) -> pa.Table:
    """Rows of shards; raises UserError, naming `field` and the file `where`."""
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        if file.metadata.num_rows > _MOST_SHARDS:
            raise ValueError(f"of {file.metadata.num_rows:,} shards")
        table = file.read()
        _told(table, _MANIFEST)
        _check_shards(table)
    except DAMAGED as error:
        raise UserError(
            f"{field}: {where} is not a corpus manifest ({error}); run `promptkd index` again"
        ) from None
    return table


def _told(table: pa.Table, schema: pa.Schema) -> dict[str, Any]:
    """What the metadata of a table tell; raises one of DAMAGED where it is not sound."""
    told = parse_json((table.schema.metadata or {})[b"promptkd"])
    if told["version"] != VERSION or not table.schema.equals(schema):
        raise ValueError("of another version")
    table.validate(full=True)
    for column in schema.names:
        if column != "reason" and table[column].null_count:
            raise ValueError(f"{column}: has gaps")
    return told


def _check_samples(facts: Facts, table: pa.Table) -> None:
    for name, kind in get_type_hints(Facts).items():
        if not isinstance(getattr(facts, name), get_origin(kind) or kind):
            raise ValueError(f"{name}: {getattr(facts, name)!r}")
    _require_kind(facts.kind)
    most = {"format": len(FORMATS) - 1}
    for name in ("offset", "bytes", "width", "height", "format"):
        _require_within(table, name, 0, most.get(name))


def _check_shards(table: pa.Table) -> None:
    for kind in pc.unique(table["kind"]).to_pylist():
        _require_kind(kind)
    for name in ("bytes", "samples", "usable"):
        _require_within(table, name, 0, None)
    _require_within(table, "largest_label", -1, None)
    if pc.any(pc.greater(table["usable"], table["samples"])).as_py():
        raise ValueError("usable: more than there are samples")


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}")


def _require_within(table: pa.Table, name: str, least: int, most: int | None) -> None:
    if not table.num_rows:
        return
    low, high = pc.min_max(table[name]).as_py().values()
    if low < least or (most is not None and high > most):
        raise ValueError(f"{name}: {low} to {high}")


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    os.replace(partial, path)
