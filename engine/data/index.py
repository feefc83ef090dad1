"""Indexing a shard: one pass that finds every sample, checks its image and remembers its place.

An image is checked by magic bytes, header, limits and completeness (header.py), and hashed, so that
what is read later is known to be what was checked. Of a tar, DALI's index (`wds2idx` v1.2) is
written too; one that is there already tells how many samples the shard should have.
"""

import re
from collections import Counter
from typing import NamedTuple

import pyarrow as pa
from webdataset.tariterators import base_plus_ext

from engine.config import UserError
from engine.data import parquet
from engine.data.header import BadImage, read_header
from engine.data.manifest import FORMATS, SAMPLES, Facts, ShardIndex, digest
from engine.data.places import Shard, is_image
from engine.data.tar import MAX_MEMBER_BYTES, Walk
from engine.json_text import parse_json
from engine.storage.ranges import PIECE, Stat, Storage, Unreadable

__all__ = ["BESIDE", "Indexed", "index_shard"]

BESIDE = "images beside the first of their sample"  # a note
_LABEL_BYTES = 12  # at most
_WDS2IDX = "v1.2"
_MOST_SAMPLES = 10**12  # that an index or a record of others may tell of


class Indexed(NamedTuple):
    """A shard's index, and the text of the one that DALI reads ("": there is none to write)."""

    ours: ShardIndex
    wds2idx: str


def index_shard(shard: Shard, storage: Storage, image: str = "") -> Indexed:
    """One pass over a shard.

    `image` is the suffix of the members (tar), or the name of the column (parquet), that holds the
    images; by default the first image of each sample. Raises UserError for a shard that holds no
    samples or cannot be decoded, OSError where it cannot be read.
    """
    if shard.kind == "files":
        return Indexed(_index_files(shard, storage), "")
    stat = storage.stat(shard.url)
    if shard.kind == "parquet":
        return Indexed(_index_parquet(shard, stat, storage, image), "")
    return _index_tar(shard, stat, storage, image)


class _Rows:
    """The samples found so far, as columns."""

    def __init__(self) -> None:
        self.columns: dict[str, list] = {name: [] for name in SAMPLES.names}

    def __len__(self) -> int:
        return len(self.columns["key"])

    def add(self, key: str, label: int = -1) -> int:
        """A sample that has no image yet; gives its position."""
        for name, value in zip(
            SAMPLES.names, (key, 0, 0, 0, 0, 0, 0, 1, False, label, "no_image"), strict=True
        ):
            self.columns[name].append(value)
        return len(self) - 1

    def has_image(self, position: int) -> bool:
        return self.columns["reason"][position] != "no_image"

    def label(self, position: int, label: int) -> None:
        self.columns["label"][position] = label

    def refuse(self, position: int, reason: str) -> None:
        self.columns["reason"][position] = reason

    def image(self, position: int, offset: int, data: bytes | memoryview) -> str | None:
        """Judges a sample's image; gives its format, if it is one."""
        columns = self.columns
        columns["offset"][position], columns["bytes"][position] = offset, len(data)
        columns["digest"][position] = digest(data)
        try:
            header = read_header(data)
        except BadImage as bad:
            columns["reason"][position] = str(bad)
            return None
        columns["width"][position], columns["height"][position] = header.width, header.height
        columns["format"][position] = FORMATS.index(header.format)
        columns["orientation"][position] = header.orientation
        columns["plain"][position] = header.plain
        columns["reason"][position] = None
        return header.format

    def index(self, facts: Facts) -> ShardIndex:
        if not len(self):
            raise UserError(f"{facts.shard}: holds no samples")
        return ShardIndex(facts, pa.table(self.columns, SAMPLES))


def _index_tar(shard: Shard, stat: Stat, storage: Storage, image: str) -> Indexed:
    view = _Forward(shard.url, stat, storage).view
    walk = Walk(view, stat.bytes)
    rows, notes = _Rows(), Counter[str]()
    positions: dict[str, int] = {}  # of keys
    members: list[list[str]] = []  # of every sample, for DALI
    current = ""
    for member in walk:
        key, suffix = base_plus_ext(member.name)
        if key is None or key.rsplit("/", 1)[-1] == "":
            notes["members without a suffix"] += 1
            continue
        position = positions.get(key)
        pictures = is_image(suffix) if not image else suffix.lower() == image.lower()
        if position is not None and key != current:
            notes["members apart from their sample"] += 1
        if position is None or (pictures and rows.has_image(position) and key != current):
            position = positions[key] = rows.add(_utf8(key))
            members.append([])
        current = key
        members[position] += [suffix, str(member.offset), str(member.size), _solid(member.name)]
        if pictures and rows.has_image(position):
            notes[BESIDE] += 1
        elif pictures:
            found = rows.image(position, member.offset, view(member.offset, member.size))
            if found and not _named(suffix, found):
                notes["images named as another format"] += 1
        elif suffix == "cls":
            label = _label(view(member.offset, min(member.size, _LABEL_BYTES + 1)))
            rows.label(position, label)
            if label < 0:
                notes["labels that are no whole numbers"] += 1
    lost = 0
    if walk.cut:  # keeps its row, so that what is lost is counted
        key, suffix = base_plus_ext(walk.cut.name)
        if key:
            position = positions[key] if key in positions else rows.add(_utf8(key))
            if not rows.has_image(position):
                rows.refuse(position, "truncated")
                lost = 1
    notes.update({f"members refused: {kind}": count for kind, count in walk.refused.items()})
    if walk.damaged:
        notes["damaged places"] = walk.damaged
    if not len(rows):
        raise UserError(f"{shard.url}: not a tar file, or one that holds no samples")
    short, whole, expected = "", len(rows) - lost, _expected(shard.url, storage)
    if walk.cut or walk.damaged or expected > whole or not (walk.complete or expected == whole):
        short = f"{whole}/{expected if expected >= whole else '?'}"
    elif not walk.complete:
        notes["no end mark"] = 1
    if -1 < expected < whole:
        notes["another index there did not fit"] = 1
    facts = Facts(shard.url, "tar", stat.bytes, stat.tag, image, short=short, notes=dict(notes))
    lines = [f"{_WDS2IDX} {len(members)}", *(" ".join(words) for words in members)]
    # Of a short shard, an index that is there is the witness of what it should have.
    return Indexed(rows.index(facts), "" if short else "\n".join(lines) + "\n")


def _index_parquet(shard: Shard, stat: Stat, storage: Storage, image: str) -> ShardIndex:
    file = parquet.opened(storage, shard.url, stat)
    column = parquet.image_column(file, image, shard.url)
    rows = _Rows()
    for row, cell in enumerate(parquet.cells(file, column, shard.url)):
        position = rows.add(cell.key, cell.label)
        if cell.data and len(cell.data) > MAX_MEMBER_BYTES:
            rows.refuse(position, "too_large")
        elif cell.data:
            rows.image(position, row, cell.data)
    large = parquet.large_groups(file)
    notes = {"row groups of more than 64 MB": large} if large else {}
    facts = Facts(shard.url, "parquet", stat.bytes, stat.tag, image, column, notes=notes)
    return rows.index(facts)


def _index_files(shard: Shard, storage: Storage) -> ShardIndex:
    folder, _, _ = shard.url.rpartition("#")
    rows, total = _Rows(), 0
    for name in shard.files:
        position = rows.add(_utf8(name))
        if _utf8(name) != name:  # the index could not name the file
            rows.refuse(position, "unreadable")
            continue
        try:
            stat = storage.stat(f"{folder}/{name}")
            if stat.bytes > MAX_MEMBER_BYTES:
                rows.refuse(position, "too_large")
                continue
            rows.image(position, 0, storage.read(f"{folder}/{name}", 0, stat.bytes))
            total += stat.bytes
        except Unreadable:
            rows.refuse(position, "unreadable")
    return rows.index(Facts(shard.url, "files", total, ""))


class _Forward:
    """Bytes of a file in pieces, for one who goes through it from front to back."""

    def __init__(self, url: str, stat: Stat, storage: Storage) -> None:
        self._url, self._stat, self._storage = url, stat, storage
        self._low, self._piece = 0, memoryview(b"")

    def view(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` on; fewer at the end of the file."""
        end = min(offset + size, self._stat.bytes)
        if offset < self._low or end > self._low + len(self._piece):
            stop = min(max(end, offset + PIECE), self._stat.bytes)
            data = self._storage.read(self._url, offset, stop, self._stat) if stop > offset else b""
            self._low, self._piece = offset, memoryview(data)
        return self._piece[offset - self._low : max(offset, end) - self._low]


def _expected(url: str, storage: Storage) -> int:
    """Samples that this tar should have: as another index beside it says, or img2dataset; or -1."""
    stem = url.removesuffix(".tar")
    if (head := _head(f"{stem}.idx", storage)).startswith(b"v1."):
        words = head.split(b"\n", 1)[0].split()
        if len(words) == 2 and words[1].isdigit() and len(words[1]) <= 12:
            return int(words[1])
    if stats := _head(f"{stem}_stats.json", storage):
        try:
            found = parse_json(stats)["successes"]
        except (ValueError, KeyError, TypeError):
            return -1
        return found if isinstance(found, int) and found < _MOST_SAMPLES else -1
    return -1


def _head(url: str, storage: Storage) -> bytes:
    """The first kilobytes of a file; nothing where there is none."""
    try:
        return storage.read(url, 0, min(storage.stat(url).bytes, 65536))
    except OSError:
        return b""


def _named(suffix: str, kind: str) -> bool:
    told = suffix.rsplit(".", 1)[-1].lower()
    return told == kind or (told == "jpeg" and kind == "jpg")


def _label(data: bytes | memoryview) -> int:
    """-1 for what is no whole number from 0 on."""
    text = bytes(data)
    return int(text) if text.strip().isdigit() and len(text) <= _LABEL_BYTES else -1


def _utf8(name: str) -> str:
    """A name with its other bytes, which no table can hold, spelled out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _solid(name: str) -> str:
    """DALI's index is split at blanks, and nobody reads the name."""
    return re.sub(r"\s", "_", name)
