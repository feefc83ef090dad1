"""Indexing a corpus: its shards one by one, here or as Ray tasks, and the manifest at the end.

What was indexed stays indexed: a shard whose index is there and fits its size and ETag, or time of
change, is not read again. So an indexing that was broken off goes on where it was.
"""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import UserError
from engine.data.index import Indexed, index_shard
from engine.data.manifest import (
    DUPLICATE,
    MANIFEST,
    Facts,
    ShardIndex,
    left_out,
    write_file,
    write_manifest,
)
from engine.data.places import Shard, find_shards
from engine.progress import track
from engine.storage.ranges import Access, Stat, Storage

__all__ = ["Report", "index"]

_LARGE_BYTES = 2 << 30  # of local shards: worth the seconds that Ray takes to start


@dataclass
class Report:
    """What indexing found."""

    manifest: Path
    shards: int = 0
    samples: int = 0
    reused: int = 0  # shards that were indexed before
    excluded: Counter[str] = field(default_factory=Counter)  # samples by reason
    notes: Counter[str] = field(default_factory=Counter)  # oddities by name
    short: list[str] = field(default_factory=list)  # shards that may have lost their tails
    left_out: list[str] = field(default_factory=list)  # shards that cannot be indexed, and why


def index(
    where: str,
    out: Path | None = None,
    access: Access | None = None,
    image: str = "",
    dedup: bool = False,
    skip_bad_shards: bool = False,
    workers: int = 0,
    address: str = "",
) -> Report:
    """Indexes the shards that `where` names, into the folder `out` or the one that they lie in.

    `image`: see index_shard(). `dedup` excludes images that are, byte for byte, an earlier one.
    `workers`: 1 is this process, more are so many Ray tasks at once, on the cluster at `address`;
    0 chooses. Raises UserError, once all others are done, for shards that cannot be indexed, unless
    `skip_bad_shards`.
    """
    access = access or Access()
    shards = find_shards(where, Storage(access), "shards")
    folder = Path(os.path.abspath(out)) if out else _common_folder(shards)
    paths = [_path(folder, number, shard) for number, shard in enumerate(shards)]
    if len(set(paths)) < len(paths):
        raise UserError("out: two shards would have one index; name a folder by --out DIR")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder / MANIFEST)
    failed: dict[int, str] = {}
    one = partial(_index_one, access=access, image=image)
    for number, result in _results(
        shards, paths, one, workers or _workers(shards, address), address
    ):
        if result is None:
            report.reused += 1
        elif isinstance(result, str):
            failed[number] = result
        else:
            _write(result, paths[number])
    report.left_out = [failed[number] for number in sorted(failed)]
    if failed and (not skip_bad_shards or len(failed) == len(shards)):
        others = f" ({len(failed)} shards have failed)" if len(failed) > 1 else ""
        raise UserError(
            f"{report.left_out[0]}{others}. Mend or remove it, or pass --skip-bad-shards"
        )
    good = [path for number, path in enumerate(paths) if number not in failed]
    duplicates = _duplicates(good) if dedup else {}
    rows = []
    listed = io.StringIO()
    table = csv.writer(listed, lineterminator="\n")
    table.writerow(["shard", "position", "key", "reason"])
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        name = _name(shard.url, folder)
        if number in failed:
            rows.append(left_out(name, shard.kind))
            continue
        stored = ShardIndex.load(path)
        found = stored.with_duplicates(duplicates.get(path, ()))
        if found is not stored:
            write_file(path, found.bytes())
        rows.append(found.row(name, path.name))
        table.writerows([name, *excluded] for excluded in found.excluded())
        _count(report, name, found)
    write_file(folder / "excluded.csv", listed.getvalue().encode())
    write_manifest(folder, rows)
    return report


def _common_folder(shards: Sequence[Shard]) -> Path:
    folders = {os.path.dirname(shard.url) for shard in shards}
    if len(folders) > 1 or "://" in shards[0].url or shards[0].kind == "files":
        raise UserError(
            f"out: {shards[0].url}{' and others' * (len(shards) > 1)} cannot have an index beside "
            "them; name a folder for it by --out DIR"
        )
    return Path(folders.pop() or ".")


def _path(folder: Path, number: int, shard: Shard) -> Path:
    """Where the index of a shard goes. Beside a tar, DALI's has the tar's name."""
    place, name = os.path.split(shard.url)
    if place != str(folder):
        name = f"{number:06d}-{name[-64:]}"
    return folder / f"{name.removesuffix('.tar')}.arrow"


def _name(url: str, folder: Path) -> str:
    """A shard's name in the manifest: for one that lies beside it, that of the file alone."""
    return url.removeprefix(f"{folder}/") if os.path.dirname(url) == str(folder) else url


@cache
def _storage(access: Access) -> Storage:
    return Storage(access)


def _index_one(
    shard: Shard, known: Facts | None, access: Access, image: str
) -> Indexed | str | None:
    """A shard's index, or why it has none; None where the one that is known still fits."""
    storage = _storage(access)
    try:
        stat = _stat(shard, storage)
        if known and (known.bytes, known.tag, known.asked) == (stat.bytes, stat.tag, image):
            return None
        found = index_shard(shard, storage, image)
    except (UserError, OSError) as error:
        return str(error)
    facts = replace(found.ours.facts, bytes=stat.bytes, tag=stat.tag)
    return found._replace(ours=replace(found.ours, facts=facts))


def _stat(shard: Shard, storage: Storage) -> Stat:
    """Of a shard; of image files, their sizes together, and a hash of their names and stats."""
    if shard.kind != "files":
        return storage.stat(shard.url)
    folder, _, _ = shard.url.rpartition("#")
    total, told = 0, hashlib.sha256()
    for name in shard.files:
        try:
            stat = storage.stat(f"{folder}/{name}")
        except OSError:  # it is to be counted as unreadable, not here
            stat = Stat(0, "")
        total += stat.bytes
        told.update(f"{name}\0{stat.bytes}\0{stat.tag}\n".encode("utf-8", "surrogateescape"))
    return Stat(total, told.hexdigest())


def _known(shard: Shard, path: Path) -> Facts | None:
    """What the index says that is there, if it is of a shard of this name."""
    if not path.exists():
        return None
    try:
        facts = ShardIndex.load(path).facts
    except UserError:  # of another version, or damaged: it is made anew
        return None
    return facts if os.path.basename(facts.shard) == os.path.basename(shard.url) else None


def _workers(shards: Sequence[Shard], address: str) -> int:
    """1, this process, where there is little to do; else as many as the cluster has CPUs (0)."""
    if len(shards) < 2:
        return 1
    far = any("://" in shard.url for shard in shards)
    if far or address or os.environ.get("RAY_ADDRESS") or shards[0].kind == "files":
        return 0
    there = (shard.url for shard in shards if os.path.exists(shard.url))
    large = sum(map(os.path.getsize, there)) >= _LARGE_BYTES
    return 0 if large and (os.cpu_count() or 1) > 1 else 1


def _results(
    shards: Sequence[Shard], paths: Sequence[Path], one: partial[Any], workers: int, address: str
) -> Iterator[tuple[int, Indexed | str | None]]:
    """_index_one() of every shard, with its number, as they are done."""
    if workers == 1:
        for number, shard in enumerate(track(shards, "indexing")):
            yield number, one(shard, _known(shard, paths[number]))
        return
    import ray  # with all that comes along, seconds that a small corpus does without

    from engine import cluster

    with cluster.session(address):
        task = ray.remote(num_cpus=1, max_retries=3)(one.func).options(name="index")
        most = workers or 2 * int(ray.cluster_resources()["CPU"])  # the second waits at the door
        coming = iter(enumerate(shards))
        asked: dict[ray.ObjectRef, int] = {}
        for _ in track(range(len(shards)), "indexing"):
            while len(asked) < most and (following := next(coming, None)):
                number, shard = following
                asked[task.remote(shard, _known(shard, paths[number]), **one.keywords)] = number
            (ready,), _ = ray.wait(list(asked))
            yield asked.pop(ready), ray.get(ready)


def _write(found: Indexed, path: Path) -> None:
    if found.wds2idx:
        text = found.wds2idx.encode("utf-8", "surrogateescape")
        write_file(path.with_suffix(".idx"), text)
    write_file(path, found.ours.bytes())


def _duplicates(paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    """Positions of the images that have come before, shard by shard. Takes 70 bytes a sample."""
    usable = []
    for path in track(paths, "comparing"):
        found = ShardIndex.load(path)
        positions = np.flatnonzero([reason in (None, DUPLICATE) for reason in found.all_reasons()])
        usable.append((path, positions, found.column("digest")[positions]))
    digests = np.concatenate([digest for _, _, digest in usable])
    again = np.ones(len(digests), bool)
    again[np.unique(digests, return_index=True)[1]] = False
    ends = np.cumsum([len(positions) for _, positions, _ in usable])
    parts = np.split(again, ends[:-1])
    return {path: positions[part] for (path, positions, _), part in zip(usable, parts, strict=True)}


def _count(report: Report, name: str, found: ShardIndex) -> None:
    report.shards += 1
    report.samples += found.samples
    report.excluded += found.reasons
    report.notes += Counter(found.facts.notes)
    if found.facts.short:
        report.short.append(f"{name} is short {found.facts.short}")
