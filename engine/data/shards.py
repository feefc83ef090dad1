"""Making a corpus: images into WebDataset shards, shards into indexes and a manifest.

Beside each plain `.tar` shard lies its index in DALI's `wds2idx` format (v1.2), and one manifest,
`corpus.parquet`, holds a row a shard: samples, bytes, sha256, and which samples are excluded, why.
"""

import hashlib
import io
import os
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from webdataset.tariterators import base_plus_ext

from engine.config import UserError
from engine.data.corpus import INDEX_VERSION, MANIFEST, Member, is_image
from engine.data.header import BadImage, read_header
from engine.data.layouts import Found, spaced
from engine.progress import track

__all__ = ["ShardIndex", "index_shard", "write_manifest", "write_shards", "write_splits"]

_END_OF_TAR = bytes(1024)


class ShardIndex(NamedTuple):
    """What the index pass found in one shard."""

    name: str
    rows: list[list[Member]]  # the members of every sample
    bytes: int
    sha256: str
    excluded: dict[int, str]  # position in shard -> reason
    largest_label: int  # -1: no sample has one
    extra_images: int  # images that are not the first of their sample, and so not used
    complete: bool  # False: no end-of-archive mark, so the shard may have lost its tail


def write_shards(
    images: Path,
    out: Path,
    class_names: Sequence[str] | None,
    shard_samples: int,
    skip_invalid: bool,
    seed: int = 0,
) -> tuple[list[Path], list[str], Counter[str]]:
    """Packs a folder of images into shards `out/NNNNNN.tar`, in a seeded shuffled order.

    Sub-folders, if any, are classes; their labels (`.cls`) serve evaluation alone. Returns the
    shards, the class names in label order, and how many files were left out, by reason. Raises
    UserError for a file that is not an image, unless `skip_invalid`, and for a sub-folder that is
    not a class.
    """
    if not images.is_dir():
        raise UserError(f"images: {images} is not a folder")
    below = (f.relative_to(images) for f in images.rglob("*") if f.is_file())
    files = sorted(f for f in below if not any(part.startswith(".") for part in f.parts))
    if not files:
        raise UserError(f"images: {images} holds no files")
    folders = sorted({f.parts[0] for f in files if len(f.parts) > 1})
    found = [spaced(folder) for folder in folders]
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise UserError(f"images: two folders of {images} are one class, {twice!r}")
    names = sorted(found) if class_names is None else [spaced(name) for name in class_names]
    if strange := [folder for folder in folders if spaced(folder) not in names]:
        raise UserError(f"classes: {images / strange[0]} is not among the {len(names)} class names")
    labels = {folder: names.index(spaced(folder)) for folder in folders}
    labelled = [(str(f), labels[f.parts[0]] if len(f.parts) > 1 else None) for f in files]
    shards, left_out = _pack(images, labelled, out, shard_samples, skip_invalid, seed)
    return shards, names, left_out


def write_splits(
    found: Found, out: Path, shard_samples: int, skip_invalid: bool, seed: int = 0
) -> dict[str, tuple[list[Path], Counter[str]]]:
    """Packs the splits of a data set into shards `out/SPLIT/NNNNNN.tar`, as write_shards does.

    Returns the shards of every split, and how many files were left out, by reason. Raises
    UserError; then no shard of any split is left behind.
    """
    for split in found.splits:
        _require_unused(out / split)
    written: dict[str, tuple[list[Path], Counter[str]]] = {}
    try:
        for split, files in found.splits.items():
            written[split] = _pack(
                found.folder, files, out / split, shard_samples, skip_invalid, seed
            )
    except BaseException:
        for shards, _ in written.values():
            for shard in shards:
                shard.unlink()
        raise
    return written


def _pack(
    folder: Path,
    files: Sequence[tuple[str, int | None]],
    out: Path,
    shard_samples: int,
    skip_invalid: bool,
    seed: int,
) -> tuple[list[Path], Counter[str]]:
    """Writes (path below `folder`, label) in shuffled order; gives shards, and files left out."""
    _require_unused(out)
    order = list(files)
    random.Random(seed).shuffle(order)
    out.mkdir(parents=True, exist_ok=True)
    try:
        left_out = _write(folder, order, out, shard_samples, skip_invalid)
    except BaseException:
        for shard in out.glob("*.tar"):  # so that a second try may have the folder
            shard.unlink()
        raise
    return sorted(out.glob("*.tar")), left_out


def _write(
    folder: Path,
    files: Sequence[tuple[str, int | None]],
    out: Path,
    shard_samples: int,
    skip_invalid: bool,
) -> Counter[str]:
    left_out: Counter[str] = Counter()
    writer = wds.ShardWriter(
        str(out).replace("%", "%%") + "/%06d.tar",
        maxcount=shard_samples,
        verbose=0,
        opener=lambda path: open(path, "wb"),
        mtime=0,  # shards of the same images are the same bytes
    )
    with writer:
        for number, (path, label) in enumerate(track(files, f"packing {out.name}")):
            data = (folder / path).read_bytes()
            try:
                kind = read_header(data).format
            except BadImage as bad:
                if not skip_invalid:
                    raise UserError(
                        f"images: {folder / path} is not a usable JPEG, PNG or WebP image ({bad}); "
                        "remove it or pass --skip-invalid"
                    ) from None
                left_out[str(bad)] += 1
                continue
            sample = {"__key__": _key(number, PurePath(path)), kind: data}
            if label is not None:
                sample["cls"] = str(label).encode()
            writer.write(sample)
    if left_out.total() == len(files):
        raise UserError(f"images: {folder} holds no usable image: {dict(left_out)}")
    return left_out


def _require_unused(out: Path) -> None:
    if out.exists() and any(out.glob("*.tar")):
        raise UserError(f"out: {out} already holds shards; remove them or name another folder")


def _key(number: int, path: PurePath) -> str:
    return f"{number:08d}_" + re.sub(r"[^A-Za-z0-9_-]+", "_", str(path.with_suffix("")))[-64:]


def write_manifest(folder: Path, shards: Iterable[ShardIndex]) -> None:
    """Writes the index of every shard and, last, the manifest of the folder; each atomically."""
    found = list(shards)
    for shard in found:
        lines = [f"{INDEX_VERSION} {len(shard.rows)}"]
        for row in shard.rows:
            lines.append(" ".join(f"{_solid(s)} {o} {n} {_solid(name)}" for s, o, n, name in row))
        _replace(
            (folder / shard.name).with_suffix(".idx"),
            ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"),
        )
    table = pa.table(
        {
            "shard": [shard.name for shard in found],
            "samples": pa.array([len(shard.rows) for shard in found], pa.int64()),
            "bytes": pa.array([shard.bytes for shard in found], pa.int64()),
            "sha256": [shard.sha256 for shard in found],
            "complete": [shard.complete for shard in found],
            "largest_label": pa.array([shard.largest_label for shard in found], pa.int64()),
            "excluded_positions": pa.array(
                [list(shard.excluded) for shard in found], pa.list_(pa.int64())
            ),
            "excluded_reasons": pa.array(
                [list(shard.excluded.values()) for shard in found], pa.list_(pa.string())
            ),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    _replace(folder / MANIFEST, buffer.getvalue())


def _solid(name: str) -> str:
    """The index is split at blanks, and nobody reads the name."""
    return re.sub(r"\s", "_", name)


def index_shard(path: Path) -> ShardIndex:
    """One pass over a shard: where its members lie, its hash, and which samples cannot be used."""
    rows: list[list[Member]] = []
    excluded: dict[int, str] = {}
    key, largest_label, extra_images, end = None, -1, 0, 0
    with open(path, "rb") as raw:
        stream = _Hashing(raw)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // 512) * 512
                    base, suffix = base_plus_ext(member.name)
                    if not member.isreg() or base is None or base.rsplit("/", 1)[-1] == "":
                        continue
                    if base != key:
                        key = base
                        rows.append([])
                        excluded[len(rows) - 1] = "no_image"
                    has_image = any(is_image(seen.suffix) for seen in rows[-1])
                    rows[-1].append(Member(suffix, member.offset_data, member.size, member.name))
                    if is_image(suffix) and not has_image:
                        _judge(_body(tar, member), len(rows) - 1, excluded)
                    elif is_image(suffix):
                        extra_images += 1
                    elif suffix == "cls":
                        label = _label(_body(tar, member), f"{path}, {member.name}")
                        largest_label = max(largest_label, label)
        except tarfile.TarError as error:
            if not rows:
                raise UserError(f"{path}: not a tar file ({error})") from None
            # The sample that was cut keeps its row, so that what is lost is counted.
            excluded[len(rows) - 1] = "truncated"
        stream.drain()
    if not rows:
        raise UserError(f"{path}: holds no samples")
    return ShardIndex(
        path.name,
        rows,
        stream.bytes,
        stream.sha256.hexdigest(),
        excluded,
        largest_label,
        extra_images,
        # tarfile takes a broken header for the end, in silence: the mark is to follow at once.
        _read_at(path, end) == _END_OF_TAR,
    )


def _read_at(path: Path, offset: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(len(_END_OF_TAR))


def _body(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _label(data: bytes, where: str) -> int:
    if not data.strip().isdigit() or len(data) > 12:
        raise UserError(f"{where}: a label is to be a whole number, this is {data[:20]!r}")
    return int(data)


def _judge(data: bytes, position: int, excluded: dict[int, str]) -> None:
    try:
        read_header(data)
        excluded.pop(position, None)
    except BadImage as bad:
        excluded[position] = str(bad)


class _Hashing(io.RawIOBase):
    """A readable stream that hashes and counts what passes through it."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self.raw, self.sha256, self.bytes = raw, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(size)
        self.sha256.update(data)
        self.bytes += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    os.replace(partial, path)
