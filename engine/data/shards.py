"""Making shards: folders of images, and the splits of a data set, into WebDataset tars."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

import webdataset as wds

from engine.config import UserError
from engine.data.header import BadImage, read_header
from engine.data.layouts import Found, spaced
from engine.progress import track

__all__ = ["write_shards", "write_splits"]


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
