"""Reading a corpus: indexed WebDataset shards, cut into blocks.

A corpus is a folder of plain `.tar` shards, each with its `.idx` beside it, and one manifest. A
sample's id is (shard number, position in the shard). Nothing is ever extracted, and a key is only a
name: the bytes of a block come with one ranged read, by the offsets of the index.
"""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import CorpusConfig, UserError
from engine.data.order import Block, cut_blocks

__all__ = ["INDEX_VERSION", "MANIFEST", "Corpus", "Member", "Sample", "is_image", "open_corpora"]

MANIFEST = "corpus.parquet"
INDEX_VERSION = "v1.2"
MANIFEST_COLUMNS = (
    "shard",
    "samples",
    "bytes",
    "sha256",
    "complete",
    "largest_label",
    "excluded_positions",
    "excluded_reasons",
)
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Member(NamedTuple):
    """One file of a sample, as the index has it."""

    suffix: str
    offset: int
    bytes: int
    name: str


class Sample(NamedTuple):
    """One sample as it is stored. `data` is None where `reason` says why it cannot be used."""

    shard: int
    position: int
    data: memoryview | None
    reason: str | None
    label: int | None
    key: str = ""  # what the names of its members begin with


def is_image(suffix: str) -> bool:
    return suffix.rsplit(".", 1)[-1].lower() in _IMAGE_SUFFIXES


@dataclass(frozen=True)
class Corpus:
    """Indexed shards, cut into blocks."""

    shards: tuple[str, ...]
    blocks: np.ndarray  # int64 [n, 3]: rows of Block
    excluded: tuple[dict[int, str], ...]  # of each shard: position -> reason
    largest_label: int  # -1: no sample has one
    incomplete: tuple[str, ...]  # shards without an end mark, which may have lost their tails
    fingerprint: str

    @classmethod
    def open(cls, where: str, block_samples: int, field: str = "corpus.shards") -> "Corpus":
        """Opens the shards of a folder, or those that a glob matches, in the order of their names.

        Raises UserError, naming `field`, where there are none, where they are not indexed, or where
        the manifest does not fit what is on disk.
        """
        paths = _expand(where, field)
        manifest = _read_manifest(Path(paths[0]).parent / MANIFEST, field)
        rows = []
        for path in paths:
            row = manifest.get(Path(path).name)
            if row is None:
                raise UserError(f"{field}: {path} is not in {MANIFEST}; run `promptkd index`")
            if os.path.getsize(path) != row["bytes"]:
                raise UserError(
                    f"{field}: {path} has {os.path.getsize(path)} bytes, its manifest says "
                    f"{row['bytes']}; run `promptkd index` again"
                )
            if not Path(path).with_suffix(".idx").exists():
                raise UserError(f"{field}: {path} has no .idx beside it; run `promptkd index`")
            rows.append(row)
        lost = set(manifest) - {Path(p).name for p in paths}
        if lost and Path(where).is_dir():
            raise UserError(
                f"{field}: shard {Path(where) / min(lost)} is in {MANIFEST} but missing"
            )
        samples = np.array([row["samples"] for row in rows], np.int64)
        excluded = tuple(
            dict(zip(row["excluded_positions"], row["excluded_reasons"], strict=True))
            for row in rows
        )
        if samples.sum() == sum(map(len, excluded)):
            raise UserError(f"{field}: {where} holds no usable image")
        identity = "\n".join(f"{row['shard']} {row['sha256']}" for row in rows)
        return cls(
            tuple(paths),
            cut_blocks(samples, block_samples),
            excluded,
            max(row["largest_label"] for row in rows),
            tuple(row["shard"] for row in rows if not row["complete"]),
            hashlib.sha256(identity.encode()).hexdigest(),
        )

    def require_labels_below(self, classes: int, names: str, where: str, field: str) -> None:
        """Raises UserError where a label is beyond the `classes` names of the file `names`; the
        corpus lies at `where`, as `field` says."""
        if self.largest_label >= classes:
            raise UserError(
                f"classes.names: {names} has {classes} names, but {field} ({where}) has labels up "
                f"to {self.largest_label}"
            )

    @property
    def samples(self) -> int:
        return int(self.blocks[:, 2].sum())

    @property
    def counts(self) -> np.ndarray:
        """Samples of every block, int64 [n]."""
        return self.blocks[:, 2]

    def read(self, block: int) -> list[Sample]:
        """The samples of a block, in the order of their positions, with one ranged read."""
        shard, start, length = Block(*map(int, self.blocks[block]))
        return self._read(shard, start, self._rows(shard)[start : start + length])

    def pick(self, shard: int, positions: Iterable[int]) -> list[Sample]:
        """Some samples of a shard, with one ranged read each."""
        rows = self._rows(shard)
        return [self._read(shard, position, [rows[position]])[0] for position in positions]

    def labels(self, shard: int) -> np.ndarray:
        """The labels of a shard's samples, int64 [n]; -1 where a sample has none or is excluded.
        Reads no image."""
        rows = self._rows(shard)
        labels = np.full(len(rows), -1, np.int64)
        with fsspec.open(self.shards[shard], "rb") as file:
            for position, row in enumerate(rows):
                for suffix, offset, size, _ in row:
                    if suffix == "cls" and position not in self.excluded[shard]:
                        file.seek(offset)
                        labels[position] = _label(file.read(size), self.shards[shard])
        return labels

    def _rows(self, shard: int) -> list[list[Member]]:
        index = Path(self.shards[shard]).with_suffix(".idx")
        rows = _read_index(index, index.stat().st_mtime_ns)
        if len(rows) != self.blocks[self.blocks[:, 0] == shard, 2].sum():
            raise UserError(f"{index}: does not fit its shard; run `promptkd index` again")
        return rows

    def _read(self, shard: int, start: int, rows: list[list[Member]]) -> list[Sample]:
        low = min(offset for row in rows for _, offset, _, _ in row)
        high = max(offset + size for row in rows for _, offset, size, _ in row)
        fs, path = fsspec.core.url_to_fs(self.shards[shard])
        data = memoryview(fs.cat_file(path, start=low, end=high))
        return [self._sample(shard, start + i, row, data, low) for i, row in enumerate(rows)]

    def _sample(
        self,
        shard: int,
        position: int,
        row: list[Member],
        data: memoryview,
        low: int,
    ) -> Sample:
        image, label = None, None
        reason = self.excluded[shard].get(position)
        for suffix, offset, size, _ in row:
            member = data[offset - low : offset - low + size]
            if suffix == "cls" and reason != "truncated":
                label = _label(bytes(member), self.shards[shard])
            elif image is None and is_image(suffix):
                image = member
        suffix, _, _, name = row[0]
        key = name.removesuffix(f".{suffix}")
        return Sample(shard, position, image if reason is None else None, reason, label, key)


def _label(data: bytes, shard: str) -> int:
    if not data.strip().isdigit():  # the index pass has seen that it was a number
        raise UserError(f"{shard} has changed since it was indexed; run `promptkd index` again")
    return int(data)


def open_corpora(config: CorpusConfig) -> dict[str, Corpus]:
    """The corpora of a run: `shards` and, where it is named, `evaluation`. Raises UserError."""
    corpora = {"shards": Corpus.open(config.shards, config.block_samples)}
    if config.evaluation:
        corpora["evaluation"] = Corpus.open(
            config.evaluation, config.block_samples, "corpus.evaluation"
        )
    return corpora


def _expand(where: str, field: str) -> list[str]:
    if not where:
        raise UserError(f"{field} is not set: give a folder or glob of .tar shards")
    if ":" in where.split("/", 1)[0]:
        raise UserError(f"{field}: {where}: only local folders and globs of shards are read")
    paths = sorted(glob.glob(f"{glob.escape(where)}/*.tar" if Path(where).is_dir() else where))
    if not paths:
        raise UserError(f"{field}: no .tar shards at {where}")
    if strange := [p for p in paths if not p.endswith(".tar")]:
        raise UserError(f"{field}: {strange[0]} is not a plain .tar shard")
    if len({Path(p).parent for p in paths}) > 1:
        raise UserError(f"{field}: {where} matches shards in several folders; name one")
    return paths


def _read_manifest(path: Path, field: str) -> dict[str, dict]:
    if not path.exists():
        raise UserError(f"{field}: {path} is missing; run `promptkd index {path.parent}`")
    try:
        table = pq.read_table(path, columns=list(MANIFEST_COLUMNS))
    except (pa.ArrowInvalid, ValueError) as error:  # another file, or of an older version
        raise UserError(
            f"{field}: {path} is not a corpus manifest ({error}); run `promptkd index` again"
        ) from None
    return {row["shard"]: row for row in table.to_pylist()}


@lru_cache(maxsize=64)
def _read_index(path: Path, changed_ns: int) -> list[list[Member]]:
    return list(_parse_index(path))


def _parse_index(path: Path) -> Iterator[list[Member]]:
    lines = path.read_text("utf-8", "surrogateescape").splitlines()
    if not lines or lines[0].split()[0] != INDEX_VERSION:
        raise UserError(f"{path}: not a {INDEX_VERSION} index; run `promptkd index` again")
    for line in lines[1:]:
        words = line.split(" ")
        members = zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True)
        yield [
            Member(suffix, int(offset), int(size), name) for suffix, offset, size, name in members
        ]
