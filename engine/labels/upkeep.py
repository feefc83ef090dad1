"""What a store holds, whether it is sound, and what can go."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from engine.config import UserError
from engine.labels.store import LABELLING, Store
from engine.labels.target_files import HEAD_BYTES, Damaged, Name, decode, samples_in
from engine.storage.folder import Folder

__all__ = ["Holding", "checked", "holdings", "needless"]

_READERS = 16
_ABANDONED_S = 3600.0  # age of a half-written file that its writer has left


@dataclass
class Holding:
    """What a store has of one view under one labelling."""

    view: int
    blocks: int = 0  # whole
    parts: int = 0
    images: int = 0  # in whole blocks, and in parts of others
    bytes: int = 0


def holdings(store: Store, fingerprint: str) -> list[Holding]:
    """By view. Reads the head of every file; a damaged one has bytes, and no images."""
    sizes = dict(store.folder.files(fingerprint))
    files = _named(sizes)
    whole = {(name.view, name.block) for name in files if name.samples is None}
    views: dict[int, Holding] = {}
    with ThreadPoolExecutor(_READERS) as readers:
        counts = readers.map(partial(_samples, store.folder), files.values())
        for (name, file), samples in zip(files.items(), counts, strict=True):
            holding = views.setdefault(name.view, Holding(name.view))
            holding.bytes += sizes[file]
            if name.samples is None:
                holding.blocks += 1
                holding.images += samples
            else:
                holding.parts += 1
                holding.images += samples if (name.view, name.block) not in whole else 0
    return [views[view] for view in sorted(views)]


def checked(store: Store, fingerprint: str) -> Iterator[tuple[str, str | None]]:
    """Every file of a labelling, and what is wrong with it, if anything is."""
    files = _files(store.folder, fingerprint)
    with ThreadPoolExecutor(_READERS) as readers:
        faults = readers.map(partial(_fault, store.folder, fingerprint), files)
        yield from zip(files.values(), faults, strict=True)


def needless(store: Store, keep: Iterable[str]) -> list[tuple[str, str]]:
    """Files that can go, and why: those of labellings not to `keep`, if any are named; parts of
    blocks that are there whole, and sound; and what broken-off writes have left, after an hour.

    A labelling's description comes after its files. Raises UserError for one that is not there.
    """
    known, kept = store.labellings(), set(keep)
    if strange := sorted(kept - known.keys()):
        raise UserError(f"keep: {store.where} holds no labelling {', '.join(strange)}")
    found: list[tuple[str, str]] = []
    for fingerprint in known:
        if kept and fingerprint not in kept:
            inside = {name for name, _ in store.folder.files(fingerprint)}
            last = f"{fingerprint}/{LABELLING}"
            found += ((name, "not to be kept") for name in [*sorted(inside - {last}), last])
        else:
            found += ((name, "superseded") for name in _superseded(store.folder, fingerprint))
        left = store.folder.broken_off(fingerprint, _ABANDONED_S)
        found += ((name, "broken off") for name in left)
    return found


def _files(folder: Folder, fingerprint: str) -> dict[Name, str]:
    """Files of soft targets by what their names say."""
    return _named(file for file, _ in folder.files(fingerprint))


def _named(files: Iterable[str]) -> dict[Name, str]:
    told = ((Name.parse(file), file) for file in files)
    return {name: file for name, file in told if name}


def _samples(folder: Folder, file: str) -> int:
    try:
        return samples_in(folder.read(file, HEAD_BYTES))
    except (OSError, Damaged):  # to be found by checked()
        return 0


def _fault(folder: Folder, fingerprint: str, name: Name) -> str | None:
    try:
        decode(folder.read(f"{fingerprint}/{name}"), name, fingerprint)
    except FileNotFoundError:  # removed meanwhile
        return None
    except (OSError, Damaged) as error:
        return f"{error}"
    return None


def _superseded(folder: Folder, fingerprint: str) -> list[str]:
    files = _files(folder, fingerprint)
    parts: dict[Name, list[str]] = defaultdict(list)
    for name, file in files.items():
        if name.samples is not None:
            parts[Name.of(name.view, name.block)].append(file)
    sound = (w for w in parts if w in files and _fault(folder, fingerprint, w) is None)
    return [file for whole in sound for file in parts[whole]]
