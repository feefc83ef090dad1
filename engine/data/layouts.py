"""Reading labelled data sets as CoOp's users have them on disk.

Layouts, file names and label orders: DATASETS.md and datasets/*.py of github.com/KaiyangZhou/CoOp,
which PromptKD shares. A reader is a pure function of the data set's folder. It raises UserError
with the path of what is missing or malformed, and what is expected there.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import UserError
from engine.json_text import parse_json

__all__ = [
    "Found",
    "Labelled",
    "read_aircraft",
    "read_json",
    "read_numbered",
    "read_wordnet",
    "spaced",
]

Labelled = tuple[str, int]  # path below Found.folder, label
_SPLITS = ("train", "val", "test")
_CLASS_NAMES = "classnames.txt"


class Found(NamedTuple):
    """A data set on disk: class names in label order, and the labelled images of its splits."""

    folder: Path
    names: list[str]
    splits: dict[str, list[Labelled]]  # of train, val and test, those that it has


def read_json(home: Path, split_file: str, images: str, renamed: Mapping[str, str]) -> Found:
    """A data set with one of CoOp's fixed splits: rows of path below `images`, label and name.

    `renamed` gives the names that CoOp puts for some of the folders'.
    """
    file, names = home / split_file, dict[int, str]()
    tree = _load(file)
    splits: dict[str, list[Labelled]] = {}
    for split in _SPLITS:
        rows = tree.get(split) if isinstance(tree, dict) else None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{file}: is to hold a list of images `{split}`")
        splits[split] = []
        for number, row in enumerate(rows):
            path, label, name = _row(row, f"{file}: {split}, row {number}")
            name = spaced(renamed.get(name, name))
            if names.setdefault(label, name) != name:
                raise UserError(f"{file}: label {label} is both {names[label]!r} and {name!r}")
            splits[split].append((path, label))
    if gaps := set(range(len(names))) - names.keys():
        raise UserError(f"{file}: labels are to count from 0; none is {min(gaps)}")
    folder = home / images
    _require(folder, splits)
    return Found(folder, [names[label] for label in sorted(names)], splits)


def read_aircraft(home: Path) -> Found:
    """FGVC-Aircraft: classes are the lines of variants.txt; a split's lines are image and class."""
    names = _lines(home / "variants.txt")
    labels = {name: label for label, name in enumerate(names)}
    splits: dict[str, list[Labelled]] = {}
    for split in _SPLITS:
        file = home / f"images_variant_{split}.txt"
        splits[split] = []
        for number, line in enumerate(_lines(file), 1):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise UserError(f"{file}, line {number}: {name!r} is not in variants.txt")
            splits[split].append((f"{image}.jpg", labels[name]))
    _require(home / "images", splits)
    return Found(home / "images", list(map(spaced, names)), splits)


def read_wordnet(home: Path, places: Mapping[str, str]) -> Found:
    """Folders like n01440764, in their order, are the classes; `places` has a split's folder.

    classnames.txt gives the name of every such folder.
    """
    known = _class_names(home)
    found = {split: _class_folders(home / place) for split, place in places.items()}
    folders = sorted({folder for one in found.values() for folder in one})
    for split, place in places.items():
        if strange := sorted(found[split] - known.keys()):
            raise UserError(f"{home / place / strange[0]}: {_CLASS_NAMES} has no such folder")
    labels = {folder: label for label, folder in enumerate(folders)}
    splits = {
        split: _labelled(home, place, {folder: labels[folder] for folder in sorted(found[split])})
        for split, place in places.items()
    }
    return Found(home, [known[folder] for folder in folders], splits)


def read_numbered(home: Path, place: str) -> Found:
    """ImageNet-V2: folder 0, 1, ... is the class of that line, from 0, of classnames.txt."""
    names = list(_class_names(home).values())
    labels = {str(label): label for label in range(len(names))}
    found = _class_folders(home / place)
    if strange := sorted(found - labels.keys()):
        raise UserError(f"{home / place / strange[0]}: folders are to be 0 to {len(names) - 1}")
    chosen = {folder: label for folder, label in labels.items() if folder in found}
    return Found(home, names, {"test": _labelled(home, place, chosen)})


def spaced(name: str) -> str:
    """A class name as it is said: CoOp's trainers read `_` as a blank."""
    return " ".join(name.replace("_", " ").split())


def _row(row: Any, where: str) -> tuple[str, int, str]:
    """Checks one row of a split file."""
    kinds = [type(cell) for cell in row] if isinstance(row, list) else []
    if kinds != [str, int, str] or row[1] < 0:
        raise UserError(f"{where}: is to be [path, label, class name], not {str(row)[:80]}")
    if row[0].startswith("/") or ".." in row[0].split("/"):
        raise UserError(f"{where}: {row[0]} leads out of the folder of images")
    return row[0], row[1], row[2]


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None


def _load(file: Path) -> Any:
    text = _text(file)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from None


def _lines(file: Path) -> list[str]:
    if lines := [line.strip() for line in _text(file).splitlines() if line.strip()]:
        return lines
    raise UserError(f"{file} is empty")


def _class_names(home: Path) -> dict[str, str]:
    """Folder -> class name, in the order of the lines."""
    file, names = home / _CLASS_NAMES, dict[str, str]()
    for number, line in enumerate(_lines(file), 1):
        folder, _, name = line.partition(" ")
        if not name or folder in names:
            raise UserError(f"{file}, line {number}: is to be a new folder and its class name")
        names[folder] = spaced(name)
    return names


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    """What a folder holds, by one listing of it; hidden files are left out."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is missing: a folder of images is expected there") from None


def _class_folders(folder: Path) -> set[str]:
    if found := {entry.name for entry in _entries(folder) if entry.is_dir()}:
        return found
    raise UserError(f"{folder}: its images are to lie in a folder a class; it has no folders")


def _labelled(home: Path, place: str, labels: Mapping[str, int]) -> list[Labelled]:
    return [
        (f"{place}/{folder}/{name}", label)
        for folder, label in labels.items()
        for name in sorted(e.name for e in _entries(home / place / folder) if e.is_file())
    ]


def _require(folder: Path, splits: Mapping[str, list[Labelled]]) -> None:
    """Raises UserError unless all images are there, by one listing of every folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: a folder of images is expected there")
    listed: dict[str, set[str]] = {}
    missing = []
    for images in splits.values():
        for path, _ in images:
            place, _, name = path.rpartition("/")
            if place not in listed:
                inside = folder / place
                there = _entries(inside) if inside.is_dir() else ()
                listed[place] = {entry.name for entry in there if entry.is_file()}
            if name not in listed[place]:
                missing.append(path)
    if missing:
        total = sum(map(len, splits.values()))
        raise UserError(
            f"{folder / missing[0]} is missing; of the {total:,} images of the splits, "
            f"{len(missing):,} are not there"
        )
