"""Opening an indexed corpus: from what a user writes to the manifest's rows of its shards."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

import pyarrow as pa

from engine.config import UserError
from engine.data.manifest import MANIFEST, MOST_INDEX_BYTES, read_manifest
from engine.data.places import kind_of, named, shards_in
from engine.storage.access import scheme
from engine.storage.ranges import Storage

__all__ = ["open_manifest"]


def open_manifest(where: str, storage: Storage, field: str) -> pa.Table:
    """The manifest's rows of the shards that `where` names, with the paths of shards and indexes
    made whole.

    Raises UserError, naming `field`, where there are none, where they are not indexed, or where a
    manifest does not fit the local shards on disk.
    """
    parts = [_part(names, storage, field) for names in _gathered(named(where, field))]
    manifest = pa.concat_tables(parts).combine_chunks()
    names = manifest["shard"].to_pylist()
    if len(set(names)) < len(names):
        raise UserError(f"{field}: {where} names a shard twice")
    _check_local(manifest, field)
    if not sum(manifest["usable"].to_pylist()):
        raise UserError(f"{field}: {where} holds no usable image")
    return manifest


def _gathered(names: Sequence[str]) -> Iterator[list[str]]:
    """Neighbouring shards of one folder together, and every folder by itself."""
    for _, group in groupby(names, lambda name: (kind_of(name) is None and name, _folder(name))):
        yield list(group)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _part(names: Sequence[str], storage: Storage, field: str) -> pa.Table:
    """The manifest's rows of a folder, or of shards in one folder."""
    is_folder = kind_of(names[0]) is None
    folder = names[0] if is_folder else _folder(names[0])
    table = _manifest(folder, storage, field)
    shards = table["shard"].to_pylist()
    rows = {shard: row for row, shard in enumerate(shards)}
    if is_folder:
        there = shards_in(folder, storage) if "://" not in folder else []
        if new := {shard.url for shard in there} - rows.keys():
            raise UserError(f"{field}: {min(new)} is not in {MANIFEST}; run `promptkd index`")
        return table
    chosen: list[int] = []
    for name in names:
        matched = [name] if name in rows else sorted(fnmatch.filter(shards, name))
        if not matched:
            raise UserError(f"{field}: {name} is not in {MANIFEST}; run `promptkd index`")
        chosen += [rows[shard] for shard in matched]
    return table.take(chosen)


def _manifest(folder: str, storage: Storage, field: str) -> pa.Table:
    """A folder's manifest, with the paths of shards and indexes made whole."""
    where = f"{folder}/{MANIFEST}"
    try:
        data = storage.whole(where, MOST_INDEX_BYTES)
    except UserError as error:  # a package that is missing
        raise UserError(f"{field}: {error}") from None
    except OSError as error:
        if os.path.isfile(folder):
            raise UserError(f"{field}: {folder} is not a plain .tar or .parquet shard") from None
        if "://" not in folder and not os.path.isdir(folder):
            raise UserError(f"{field}: no .tar shards at {folder}") from None
        if os.path.isdir(folder) and not os.path.exists(where):
            raise UserError(f"{field}: {where} is missing; run `promptkd index {folder}`") from None
        raise UserError(f"{field}: {where} cannot be read ({error})") from None
    table = read_manifest(data, where, field)
    for name in ("shard", "index"):
        if "://" in folder:
            _require_afar(table[name].to_pylist(), where, field)
        whole = [
            f"{folder}/{value}" if value and value[0] != "/" and "://" not in value else value
            for value in table[name].to_pylist()
        ]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(whole))
    return table


def _require_afar(names: Sequence[str], where: str, field: str) -> None:
    """Raises UserError where a manifest from afar names a file of this machine."""
    for name in names:
        if name.startswith("/") or ("://" in name and scheme(name) in ("", "file")):
            raise UserError(f"{field}: {where} names a file of this machine, {name}")


def _check_local(manifest: pa.Table, field: str) -> None:
    """Raises UserError where a local shard is gone or has another size, or its index is gone."""
    sizes = cache(_sizes)
    names = ("shard", "kind", "bytes", "index")
    for shard, kind, size, index in zip(*(manifest[n].to_pylist() for n in names), strict=True):
        if not index:  # it was left out, and has no samples
            continue
        if "://" not in index and os.path.basename(index) not in sizes(_folder(index)):
            raise UserError(f"{field}: {shard} has no index {index}; run `promptkd index`")
        if "://" in shard or kind == "files":
            continue
        found = sizes(_folder(shard)).get(os.path.basename(shard))
        if found is None:
            raise UserError(f"{field}: shard {shard} is in {MANIFEST} but missing")
        if found != size:
            raise UserError(
                f"{field}: {shard} has {found} bytes, its manifest says {size}; run "
                "`promptkd index` again"
            )


def _sizes(folder: str) -> dict[str, int]:
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as files:
        return {file.name: file.stat().st_size for file in files if file.is_file()}
