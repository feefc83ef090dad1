"""Parquet files of any length, written piece by piece, there whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine import durable

__all__ = ["DAMAGED", "write_table"]

DAMAGED = (pa.ArrowException, OSError, LookupError, TypeError, ValueError)  # reading raises


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes a table, of which no more than a batch is held. Raises OSError."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
            for batch in batches:
                writer.write_batch(batch)
        durable.flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    durable.flush(path.parent)
