"""Miniatures of the paper's data sets, laid out as CoOp's DATASETS.md says; and what is in them."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

JSON_SPLITS = {"train": 2, "val": 1, "test": 2}  # images of a class


class Tree(NamedTuple):
    """Class names as they are to be read, and the label of every image file, by split."""

    names: list[str]
    splits: dict[str, dict[Path, int]]


# Split file, pattern of an image's path below the data set, and for every class: its folder, the
# name in the split file, the name as it is to be read.
JSON_SETS = {
    "caltech101": (
        "caltech-101/split_zhou_Caltech101.json",
        "101_ObjectCategories/{folder}/image_{number:04d}.jpg",
        [
            ("Faces", "face", "face"),
            ("airplanes", "airplanes", "airplane"),
            ("wild_cat", "wild_cat", "wild cat"),
        ],
    ),
    "oxford_pets": (
        "oxford_pets/split_zhou_OxfordPets.json",
        "images/{folder}_{number}.jpg",
        [
            ("Abyssinian", "abyssinian", "abyssinian"),
            ("american_bulldog", "american_bulldog", "american bulldog"),
        ],
    ),
    "stanford_cars": (
        "stanford_cars/split_zhou_StanfordCars.json",
        "cars_{folder}/{number:05d}.jpg",
        [
            ("train", "2000 AM General Hummer SUV", "2000 AM General Hummer SUV"),
            ("test", "2012 Acura RL Sedan", "2012 Acura RL Sedan"),
        ],
    ),
    "oxford_flowers": (
        "oxford_flowers/split_zhou_OxfordFlowers.json",
        "jpg/image_{number:05d}.jpg",
        [
            ("", "pink primrose", "pink primrose"),
            ("", "hard-leaved pocket orchid", "hard-leaved pocket orchid"),
        ],
    ),
    "food101": (
        "food-101/split_zhou_Food101.json",
        "images/{folder}/{number}.jpg",
        [("apple_pie", "apple_pie", "apple pie"), ("waffles", "waffles", "waffles")],
    ),
    "sun397": (
        "sun397/split_zhou_SUN397.json",
        "SUN397/{folder}/sun_{number:08d}.jpg",
        [
            ("a/abbey", "abbey", "abbey"),
            ("a/apse/indoor", "indoor apse", "indoor apse"),
            ("b/bow_window/outdoor", "outdoor bow_window", "outdoor bow window"),
        ],
    ),
    "dtd": (
        "dtd/split_zhou_DescribableTextures.json",
        "images/{folder}/{folder}_{number:04d}.jpg",
        [("banded", "banded", "banded"), ("zigzagged", "zigzagged", "zigzagged")],
    ),
    "eurosat": (
        "eurosat/split_zhou_EuroSAT.json",
        "2750/{folder}/{folder}_{number}.jpg",
        [
            ("AnnualCrop", "AnnualCrop", "Annual Crop Land"),
            ("Forest", "Forest", "Forest"),
            ("SeaLake", "Sea or Lake", "Sea or Lake"),
        ],
    ),
    "ucf101": (
        "ucf101/split_zhou_UCF101.json",
        "UCF-101-midframes/{folder}/v_{number}_c01.jpg",
        [
            ("Apply_Eye_Makeup", "Apply_Eye_Makeup", "Apply Eye Makeup"),
            ("Yo_Yo", "Yo_Yo", "Yo Yo"),
        ],
    ),
}
IMAGES = {  # where a split file's paths begin
    **{name: pattern.split("/")[0] for name, (_, pattern, _) in JSON_SETS.items()},
    "stanford_cars": ".",
}
WORDNET = [  # folder, name; in the order of classnames.txt
    ("n01440764", "tench"),
    ("n01443537", "goldfish"),
    ("n02123045", "tabby_cat"),
    ("n03773504", "missile"),
    ("n04008634", "missile"),
]
VARIANTS = {  # folder of the data set, of its images
    "imagenetv2": ("imagenetv2", "imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": ("imagenet-sketch", "images"),
    "imagenet_a": ("imagenet-adversarial", "imagenet-a"),
    "imagenet_r": ("imagenet-rendition", "imagenet-r"),
}


def plant(name: str, root: Path) -> Tree:
    """Writes a miniature of a data set below `root`, its images all different."""
    if name in JSON_SETS:
        return _json(name, root)
    if name == "fgvc_aircraft":
        return _aircraft(root / "fgvc_aircraft")
    return _imagenet(root / "imagenet") if name == "imagenet" else _variant(name, root)


def _image(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", (24 + number, 20), colour).save(buffer, "jpeg")
    path.write_bytes(buffer.getvalue())
    return path


def _json(name: str, root: Path) -> Tree:
    split_file, pattern, classes = JSON_SETS[name]
    home, number = (root / split_file).parent, 0
    splits: dict[str, dict[Path, int]] = {split: {} for split in JSON_SPLITS}
    rows: dict[str, list[list[object]]] = {split: [] for split in JSON_SPLITS}
    for label, (folder, written, _) in enumerate(classes):
        for split, images in JSON_SPLITS.items():
            for _ in range(images):
                number += 1
                path = home / pattern.format(folder=folder, number=number)
                splits[split][_image(path, number)] = label
                below = path.relative_to(home / IMAGES[name]).as_posix()
                rows[split].append([below, label, written])
    (root / split_file).write_text(json.dumps(rows))
    return Tree([spoken for _, _, spoken in classes], splits)


def _aircraft(home: Path) -> Tree:
    names = ["707-320", "DH-82", "F/A-18"]
    splits: dict[str, dict[Path, int]] = {split: {} for split in JSON_SPLITS}
    number = 1_025_793
    for split, images in JSON_SPLITS.items():
        lines = []
        for label in list(range(3)) * images:
            number += 1
            splits[split][_image(home / f"images/{number}.jpg", number % 97)] = label
            lines.append(f"{number} {names[label]}\n")
        (home / f"images_variant_{split}.txt").write_text("".join(lines))
    (home / "variants.txt").write_text("\n".join(names) + "\n")
    return Tree(names, splits)


def _imagenet(home: Path) -> Tree:
    folders = [folder for folder, _ in WORDNET]
    _write_names(home)
    (home / "images/train").mkdir(parents=True)
    (home / "images/train/.DS_Store").write_text("not seen")
    splits = {
        "train": _folders(home / "images/train", folders, 3, "JPEG", 0),
        "test": _folders(home / "images/val", folders, 2, "JPEG", 50),
    }
    return Tree([name.replace("_", " ") for _, name in WORDNET], splits)


def _variant(name: str, root: Path) -> Tree:
    """-A and -R have some of the classes alone, and count them anew; V2's folders are numbers."""
    home, images = (root / place for place in VARIANTS[name])
    images = home / VARIANTS[name][1]
    _write_names(home)
    few = name in ("imagenet_a", "imagenet_r")
    classes = WORDNET[1:4] if few else WORDNET
    folders = [folder for folder, _ in classes]
    if name == "imagenetv2":
        folders = list(map(str, range(len(classes))))
    splits = {"test": _folders(images, folders, 2, "jpg", 0)}
    if few:
        (images / "README.txt").write_text("not a class")
    return Tree([name.replace("_", " ") for _, name in classes], splits)


def _write_names(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "classnames.txt").write_text("".join(f"{one} {name}\n" for one, name in WORDNET))


def _folders(
    images: Path, folders: Iterable[str], count: int, suffix: str, first: int
) -> dict[Path, int]:
    found = {}
    for label, folder in enumerate(folders):
        for number in range(count):
            path = images / folder / f"{number}.{suffix}"
            found[_image(path, first + label * count + number)] = label
        (images / folder / ".hidden").write_text("not seen")
    return found
