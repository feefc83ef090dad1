"""Reading a corpus: indexed shards, cut into blocks.

A corpus is shards wherever they lie, an index of each, and one manifest. A sample's id is (shard
number, position in the shard). Nothing is ever extracted, and a key is only a name: the bytes of a
block come with one ranged read, by the offsets of the index, and are checked against its digests;
of a parquet file, with its row group.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from engine.config import CorpusConfig, UserError
from engine.data.header import BadImage, Header, read_header
from engine.data.manifest import MOST_INDEX_BYTES, Entry, ShardIndex, digest
from engine.data.opening import open_manifest
from engine.data.order import Blocks
from engine.data.parquet import Images
from engine.data.sample_list import SampleList, read_list
from engine.progress import say
from engine.storage.ranges import Access, Changed, Stat, Storage

if TYPE_CHECKING:
    from engine.data.loader import Batch

__all__ = ["Corpus", "Sample", "open_corpora"]

_ANNOUNCED = 5  # shards of a corpus whose faults are announced one by one
_GAP_BYTES = 1 << 20  # between two images, from which a second read costs less


class Sample(NamedTuple):
    """One sample as it is stored. `data` is None where `reason` says why it cannot be used."""

    shard: int
    position: int
    data: memoryview | None
    reason: str | None
    label: int | None
    key: str = ""  # what the names of its members begin with
    header: Header | None = None  # of `data`


class Corpus:
    """Indexed shards, cut into blocks. Safe for several threads."""

    def __init__(self, manifest: pa.Table, block_samples: int, storage: Storage) -> None:
        def column(name: str) -> list:
            return manifest[name].to_pylist()

        self.shards: tuple[str, ...] = tuple(column("shard"))
        self.blocks = Blocks(manifest["samples"].to_numpy(), block_samples)
        self.largest_label = max(column("largest_label"))  # -1: no sample has one
        self.excluded = self.samples - sum(column("usable"))
        identity = "\n".join(column("content"))
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.listed: SampleList | None = None  # what a run is to train on, where it is not all
        self._manifest, self._storage = manifest, storage
        self._images_of_parquet = Images(storage)
        self._told: set[int] = set()  # shards of which something was announced, or would have been
        self._lock = threading.Lock()
        self._index = lru_cache(maxsize=64)(self._read_index)

    @classmethod
    def open(
        cls,
        where: str,
        block_samples: int = CorpusConfig.block_samples,
        field: str = "corpus.shards",
        access: Access | None = None,
    ) -> "Corpus":
        """Opens the indexed shards that `where` names: folders, globs, URLs, braces, `::` between.

        Raises UserError, naming `field`, where there are none, where they are not indexed, or where
        a manifest does not fit the local shards on disk.
        """
        storage = Storage(access or Access())
        return cls(open_manifest(where, storage, field), block_samples, storage)

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
        return self.blocks.samples

    @property
    def pass_samples(self) -> int:
        """Samples of a pass: the listed ones, where there is a list."""
        return self.listed.samples if self.listed else self.samples

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Shards that may have lost their tails, each with the samples it has and should have."""
        rows = zip(self.shards, self._manifest["short"].to_pylist(), strict=True)
        return tuple(f"{shard} is short {short}" for shard, short in rows if short)

    def __iter__(self) -> Iterator[Sample]:
        """All samples, shard by shard, read a block at a time."""
        for block in range(len(self.blocks)):
            yield from self.read(block)

    def batches(
        self,
        pixels: int,
        batch: int,
        *,
        passes: int | None = None,
        seed: int = 1,
        crop_scale: float = 0.08,
        threads: int = 2,
        device: str = "cpu",
    ) -> Iterator["Batch"]:
        """Decoded batches, read and decoded ahead, on a thread; see engine.data.batches."""
        from engine.data.batches import batches  # which reads corpora

        return batches(self, pixels, batch, passes, seed, crop_scale, threads, device)

    def read(self, block: int) -> list[Sample]:
        """The samples of a block, in the order of their positions, with one ranged read.

        What cannot be read, or is not what was indexed, has the reason `unreadable` or `changed`.
        """
        shard, start, length = self.blocks.at(block)
        return self._samples(shard, range(start, start + length))

    def block_bytes(self, block: int) -> int:
        """Of a block's images, with what lies between them: its share of the shard."""
        shard, _, length = self.blocks.at(block)
        samples, size = (
            self._manifest["samples"][shard].as_py(),
            self._manifest["bytes"][shard].as_py(),
        )
        return size * length // samples

    def pick(self, shard: int, positions: Iterable[int]) -> list[Sample]:
        """Some samples of a shard, with one ranged read each; what cannot be read, see read()."""
        if self._manifest["kind"][shard].as_py() == "parquet":  # with one of each row group
            return self._samples(shard, list(positions))
        return [self._samples(shard, [position])[0] for position in positions]

    def labels(self, shard: int) -> np.ndarray:
        """The labels of a shard's samples, int64 [n]; -1 where a sample has none or is excluded."""
        if not self.blocks.shard_samples[shard]:  # it was left out
            return np.zeros(0, np.int64)
        index = self._index(shard)
        usable = index.table["reason"].is_null().to_numpy(zero_copy_only=False)
        return np.where(usable, index.column("label"), -1)

    def keys(self, shard: int, positions: Sequence[int]) -> list[str]:
        """The keys of some samples of a shard. Raises OSError, or UserError, without its index."""
        return [entry.key for entry in _entries(self._index(shard), positions)]

    def close(self) -> None:
        """Ends reads from afar, and their retries, at once; none can be begun any more."""
        self._told.update(range(len(self.shards)))  # reads that end now are no fault to announce
        self._storage.close()

    def _row(self, shard: int) -> dict:
        return {name: self._manifest[name][shard].as_py() for name in self._manifest.schema.names}

    def _read_index(self, shard: int) -> ShardIndex:
        row = self._row(shard)
        where = row["index"]
        if "://" in where:
            index = ShardIndex.read(self._storage.whole(where, MOST_INDEX_BYTES), where)
        else:
            index = ShardIndex.load(Path(where))
        if index.row("", "")["content"] != row["content"]:
            raise UserError(f"{where}: does not fit its manifest; run `promptkd index` again")
        return index

    def _samples(self, shard: int, positions: Sequence[int]) -> list[Sample]:
        try:
            entries = _entries(self._index(shard), positions)
        except OSError as error:  # of an index that lies afar
            self._announce(shard, f"has no readable index, and is skipped: {error}")
            return [Sample(shard, position, None, "unreadable", None) for position in positions]
        images: Sequence[memoryview | None]
        try:
            images, failed = self._images(shard, positions, entries), "unreadable"
        except OSError as error:
            failed = "changed" if isinstance(error, Changed) else "unreadable"
            self._announce(shard, f"{failed}, and skipped: {error}")
            images = [None] * len(entries)
        return [
            self._sample(shard, position, entry, image, failed)
            for position, entry, image in zip(positions, entries, images, strict=True)
        ]

    def _sample(
        self, shard: int, position: int, entry: Entry, image: memoryview | None, failed: str
    ) -> Sample:
        reason = entry.reason
        if reason is None and image is None:
            reason = failed
        elif reason is None and image is not None and not _as_indexed(image, entry):
            reason = "changed"
            self._announce(shard, "has changed since it was indexed; what differs is skipped")
        label = entry.label if entry.label >= 0 else None
        if reason is not None:
            return Sample(shard, position, None, reason, label, entry.key)
        return Sample(shard, position, image, None, label, entry.key, entry.header)

    def _images(
        self, shard: int, positions: Sequence[int], entries: Sequence[Entry]
    ) -> Sequence[memoryview | None]:
        """The stored images of some samples; raises OSError."""
        row = self._row(shard)
        url = row["shard"]
        # A copy on another disk has another time of change: the digests tell.
        expected = Stat(row["bytes"], row["tag"] if "://" in url else "")
        if row["kind"] == "tar":
            return _of_tar(url, entries, expected, self._storage)
        if row["kind"] == "parquet":
            pairs = zip(positions, entries, strict=True)
            rows = [position for position, entry in pairs if entry.reason is None]
            read = self._images_of_parquet.read
            found = read(url, expected, row["column"], row["samples"], rows)
            return [found.get(position) for position in positions]
        folder, _, _ = url.rpartition("#")
        return [self._of_file(shard, f"{folder}/{entry.key}", entry) for entry in entries]

    def _of_file(self, shard: int, path: str, entry: Entry) -> memoryview | None:
        if entry.reason:
            return None
        try:
            return memoryview(self._storage.read(path, 0, entry.bytes))
        except OSError as error:
            self._announce(shard, f"has files that cannot be read, which are skipped: {error}")
            return None

    def _announce(self, shard: int, what: str) -> None:
        with self._lock:
            if shard in self._told or len(self._told) > _ANNOUNCED:
                return
            self._told.add(shard)
            last = len(self._told) > _ANNOUNCED
        if last:
            say("further shards cannot be read, or have changed; they are counted in the ledger")
        else:
            say(f"{self.shards[shard]}: {what}")


def _as_indexed(image: memoryview, entry: Entry) -> bool:
    """Whoever publishes a corpus writes its index too: so a decoder trusts no header in it."""
    try:
        return digest(image) == entry.digest and read_header(image) == entry.header
    except BadImage:
        return False


def _entries(index: ShardIndex, positions: Sequence[int]) -> list[Entry]:
    if isinstance(positions, range):
        return index.entries(positions.start, len(positions))
    return [index.entries(position, 1)[0] for position in positions]


def _of_tar(
    url: str, entries: Sequence[Entry], expected: Stat, storage: Storage
) -> list[memoryview | None]:
    """With one ranged read, or several where much else lies between the images."""
    images: list[memoryview | None] = [None] * len(entries)
    usable = [number for number, entry in enumerate(entries) if entry.reason is None]
    usable.sort(key=lambda number: entries[number].offset)
    for run in _runs(entries, usable):
        low = entries[run[0]].offset
        high = max(entries[number].offset + entries[number].bytes for number in run)
        data = memoryview(storage.read(url, low, high, expected))
        for number in run:
            start = entries[number].offset - low
            images[number] = data[start : start + entries[number].bytes]
    return images


def _runs(entries: Sequence[Entry], ordered: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of entries, cut where more than _GAP_BYTES lie between one and the next."""
    run: list[int] = []
    end = 0
    for number in ordered:
        if run and entries[number].offset - end > _GAP_BYTES:
            yield run
            run = []
        run.append(number)
        end = entries[number].offset + entries[number].bytes
    if run:
        yield run


def open_corpora(config: CorpusConfig) -> dict[str, Corpus]:
    """The corpora of a run: `shards`, with the list of its samples if it is to have one, and, where
    it is named, `evaluation`. Raises UserError."""
    access = Access(
        config.hosts,
        config.timeout_s,
        config.retries,
        config.cache,
        int(config.cache_gb * 2**30),
    )
    shards = Corpus.open(config.shards, config.block_samples, access=access)
    if config.samples:
        shards.listed = read_list(config.samples, shards.blocks, shards.fingerprint)
    corpora = {"shards": shards}
    if config.evaluation:
        corpora["evaluation"] = Corpus.open(
            config.evaluation, config.block_samples, "corpus.evaluation", access
        )
    return corpora
