"""Sample lists: the samples of a corpus that a run is to train on, where it is not to take all.

A list is a parquet file with a row for each of its samples, in the order of the corpus: `shard`,
its number in the corpus, and `position` there. Its metadata tell which corpus it is of, and how it
was made.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import UserError
from engine.data.order import Blocks
from engine.data.tables import DAMAGED, write_table
from engine.json_text import parse_json

__all__ = ["SampleList", "places", "read_list", "write_list"]

_ROWS = 1 << 20  # at once
_VERSION = 1
_SCHEMA = pa.schema({"shard": pa.int32(), "position": pa.int32()})


@dataclass(frozen=True, eq=False)
class SampleList:
    """Some samples of a corpus. Of a corpus of a billion samples it takes 140 MB."""

    blocks: Blocks  # of the corpus
    bits: np.ndarray  # uint8 [samples / 8]: a bit for each sample of the corpus, the highest first
    counts: np.ndarray  # int64 [blocks]: listed samples of each block

    @cached_property
    def samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def used(self) -> np.ndarray:
        """Blocks that hold listed samples, int64, ascending."""
        return np.flatnonzero(self.counts)

    @cached_property
    def fingerprint(self) -> str:
        """Of the samples, however the file tells them; together with that of the corpus."""
        return hashlib.sha256(self.bits.tobytes()).hexdigest()

    def offsets(self, block: int) -> np.ndarray:
        """Offsets of the listed samples of a block, int64 [counts[block]], ascending."""
        shard, start, length = self.blocks.at(block)
        first = int(self._starts[shard]) + start
        bits = np.unpackbits(self.bits[first >> 3 : (first + length + 7) >> 3])
        return np.flatnonzero(bits[first & 7 :][:length])

    @cached_property
    def _starts(self) -> np.ndarray:
        return _starts(self.blocks)


def places(blocks: Blocks, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shards and positions of samples by their numbers, counted through the corpus from 0."""
    starts = _starts(blocks)
    shards = np.searchsorted(starts, numbers, side="right") - 1
    return shards, numbers - starts[shards]


def write_list(
    path: Path, kept: np.ndarray, blocks: Blocks, corpus: str, made: dict[str, Any]
) -> None:
    """Writes a list atomically: of the samples for which `kept`, bool [samples], is True, in a
    corpus of this fingerprint; `made` says how it was made, in JSON values."""
    about = {"version": _VERSION, "corpus": corpus, "samples": len(kept), "made": made}

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(kept), _ROWS):
            numbers = start + np.flatnonzero(kept[start : start + _ROWS])
            columns = [pa.array(column, pa.int32()) for column in places(blocks, numbers)]
            yield pa.record_batch(columns, schema=_SCHEMA)

    write_table(path, _SCHEMA.with_metadata({"promptkd": json.dumps(about)}), batches())


def read_list(path: str, blocks: Blocks, corpus: str, field: str = "corpus.samples") -> SampleList:
    """Reads the list of a corpus of these blocks and this fingerprint.

    Raises UserError, naming `field`, where there is none, where it is of another corpus, and where
    it lists nothing, a sample that is not there, or one twice.
    """
    bits, last = np.zeros(-(-blocks.samples // 8), np.uint8), -1
    counts, starts = np.zeros(len(blocks), np.int64), _starts(blocks)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _require(file.schema_arrow, path, corpus, field)
            for batch in file.iter_batches(_ROWS, columns=_SCHEMA.names):
                if not batch.num_rows:
                    continue
                shards, positions = (batch[name].to_numpy().astype(int) for name in _SCHEMA.names)
                _require_there(shards, positions, blocks, path, field)
                numbers = starts[shards] + positions
                if numbers[0] <= last or (np.diff(numbers) <= 0).any():
                    raise UserError(f"{field}: {path} lists a sample twice, or is not in order")
                last = int(numbers[-1])
                held, first = np.unique(numbers >> 3, return_index=True)
                bits[held] |= np.bitwise_or.reduceat(128 >> (numbers & 7), first).astype(np.uint8)
                inside, many = np.unique(blocks.holding(shards, positions), return_counts=True)
                counts[inside] += many
    except FileNotFoundError:
        raise UserError(f"{field}: {path}: no such file") from None
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{field}: {path} is not a sample list, or damaged: {error}") from None
    if last < 0:
        raise UserError(f"{field}: {path} lists no sample")
    return SampleList(blocks, bits, counts)


def _starts(blocks: Blocks) -> np.ndarray:
    """Samples before each shard, int64 [shards]."""
    return np.cumsum(blocks.shard_samples) - blocks.shard_samples


def _require(schema: pa.Schema, path: str, corpus: str, field: str) -> None:
    told = parse_json((schema.metadata or {})[b"promptkd"])
    if told["version"] != _VERSION or not schema.equals(_SCHEMA):
        raise ValueError("of another version")
    if told["corpus"] != corpus:
        raise UserError(
            f"{field}: {path} is of another corpus than corpus.shards: of {told['corpus'][:16]}, "
            f"this one is {corpus[:16]}"
        )


def _require_there(
    shards: np.ndarray, positions: np.ndarray, blocks: Blocks, path: str, field: str
) -> None:
    within = (shards >= 0) & (shards < len(blocks.shard_samples))
    lengths = blocks.shard_samples[np.where(within, shards, 0)]
    if (wrong := ~within | (positions < 0) | (positions >= lengths)).any():
        row = int(wrong.argmax())
        raise UserError(
            f"{field}: {path} lists sample {positions[row]} of shard {shards[row]}, which the "
            "corpus has not"
        )
