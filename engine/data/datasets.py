"""The data sets of the paper: where they lie, their zero-shot templates, their published sizes.

The eleven sets of the base-to-novel and cross-dataset protocols, and the four variants of ImageNet
of domain generalisation. Templates are CoOp's (trainers/zsclip.py). Sizes are those of the splits
that CoOp and PromptKD use; of the variants, those that their authors give.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from engine.config import UserError
from engine.data.layouts import Found, read_aircraft, read_json, read_numbered, read_wordnet
from engine.progress import say

__all__ = ["DATASETS", "Dataset", "DatasetName", "read_dataset"]

DatasetName = Literal[
    "imagenet",
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
    "eurosat",
    "ucf101",
    "imagenetv2",
    "imagenet_sketch",
    "imagenet_a",
    "imagenet_r",
]
_PHOTO = "a photo of a {}."


@dataclass(frozen=True)
class Dataset:
    """One data set, with its published numbers of classes and, by split, of images."""

    home: str  # its folder in the folder of data sets
    read: Callable[[Path], Found]
    source: str  # where CoOp's instructions get it
    classes: int
    sizes: Mapping[str, int]
    template: str = _PHOTO

    def differences(self, counts: Mapping[str, int]) -> list[str]:
        """Which of the numbers of classes and images are not the published ones, in words."""
        published = {"classes": self.classes, **self.sizes}
        return [
            f"{what} {counts[what]:,} instead of {number:,}"
            for what, number in published.items()
            if what in counts and counts[what] != number
        ]


def read_dataset(name: DatasetName, root: Path, partial: bool = False) -> Found:
    """Reads a data set in `root`, the folder that holds eurosat/, caltech-101/ and so on.

    Raises UserError where something is missing or malformed, and where what is found is not of the
    published size; with `partial` the latter is a warning.
    """
    dataset = DATASETS[name]
    if not root.is_dir():
        raise UserError(f"root: {root} is missing: the folder that holds {dataset.home}/")
    home = root / dataset.home
    try:
        if not home.is_dir():
            raise UserError(f"{home} is missing: the folder of {name}")
        found = dataset.read(home)
    except UserError as error:
        raise UserError(f"root: {error} (CoOp's DATASETS.md: {dataset.source})") from None
    images = [path for labelled in found.splits.values() for path, _ in labelled]
    if twice := [path for path, times in Counter(images).items() if times > 1]:
        raise UserError(f"root: {home}: {twice[0]} comes twice; no split may hold another's images")
    if wrong := dataset.differences(_counts(found, -(-dataset.classes // 2))):
        told = f"{home} is not of the published size: {'; '.join(wrong)}"
        if not partial:
            raise UserError(f"root: {told}; pass --partial to use it all the same")
        say(f"warning: {told}")
    return found


def _counts(found: Found, base: int) -> dict[str, int]:
    test = [label for _, label in found.splits["test"]]
    return {
        "classes": len(found.names),
        "train": len(found.splits.get("train", ())),
        "test": len(test),
        "test base": sum(label < base for label in test),
        "test novel": sum(label >= base for label in test),
    }


def _sizes(train: int, base: int, novel: int) -> dict[str, int]:
    return {"train": train, "test base": base, "test novel": novel}


def _split(split_file: str, images: str, **renamed: str) -> partial[Found]:
    """Reader of one of CoOp's split files, with the names that it puts for those of folders."""
    return partial(
        read_json, split_file=f"split_zhou_{split_file}.json", images=images, renamed=renamed
    )


DATASETS: dict[DatasetName, Dataset] = {
    "imagenet": Dataset(
        "imagenet",
        partial(read_wordnet, places={"train": "images/train", "test": "images/val"}),
        "image-net.org, validation images in class folders; classnames.txt by its link",
        1000,
        _sizes(1_281_167, 25_000, 25_000),
    ),
    "caltech101": Dataset(
        "caltech-101",
        _split(
            "Caltech101",
            "101_ObjectCategories",
            airplanes="airplane",
            Faces="face",
            Leopards="leopard",
            Motorbikes="motorbike",
        ),
        "101_ObjectCategories.tar.gz of vision.caltech.edu; the split by its link",
        100,
        _sizes(4_128, 1_549, 916),
    ),
    "oxford_pets": Dataset(
        "oxford_pets",
        _split("OxfordPets", "images"),
        "images.tar.gz of robots.ox.ac.uk/~vgg/data/pets; the split by its link",
        37,
        _sizes(2_944, 1_881, 1_788),
        "a photo of a {}, a type of pet.",
    ),
    "stanford_cars": Dataset(
        "stanford_cars",
        _split("StanfordCars", "."),
        "cars_train.tgz and cars_test.tgz of ai.stanford.edu/~jkrause; the split by its link",
        196,
        _sizes(6_509, 4_002, 4_039),
    ),
    "oxford_flowers": Dataset(
        "oxford_flowers",
        _split("OxfordFlowers", "jpg"),
        "102flowers.tgz of robots.ox.ac.uk/~vgg/data/flowers; the split by its link",
        102,
        _sizes(4_093, 1_053, 1_410),
        "a photo of a {}, a type of flower.",
    ),
    "food101": Dataset(
        "food-101",
        _split("Food101", "images"),
        "food-101.tar.gz of data.vision.ee.ethz.ch/cvl; the split by its link",
        101,
        _sizes(50_500, 15_300, 15_000),
        "a photo of {}, a type of food.",
    ),
    "fgvc_aircraft": Dataset(
        "fgvc_aircraft",
        read_aircraft,
        "data/ of fgvc-aircraft-2013b.tar.gz of robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        100,
        _sizes(3_334, 1_666, 1_667),
        "a photo of a {}, a type of aircraft.",
    ),
    "sun397": Dataset(
        "sun397",
        _split("SUN397", "SUN397"),
        "SUN397.tar.gz of vision.princeton.edu/projects/2010/SUN; the split by its link",
        397,
        _sizes(15_880, 9_950, 9_900),
    ),
    "dtd": Dataset(
        "dtd",
        _split("DescribableTextures", "images"),
        "dtd-r1.0.1.tar.gz of robots.ox.ac.uk/~vgg/data/dtd; the split by its link",
        47,
        _sizes(2_820, 864, 828),
        "{} texture.",
    ),
    "eurosat": Dataset(
        "eurosat",
        _split(
            "EuroSAT",
            "2750",
            AnnualCrop="Annual Crop Land",
            HerbaceousVegetation="Herbaceous Vegetation Land",
            Highway="Highway or Road",
            Industrial="Industrial Buildings",
            Pasture="Pasture Land",
            PermanentCrop="Permanent Crop Land",
            Residential="Residential Buildings",
            SeaLake="Sea or Lake",
        ),
        "EuroSAT.zip of madm.dfki.de; the split by its link",
        10,
        _sizes(13_500, 4_200, 3_900),
        "a centered satellite photo of {}.",
    ),
    "ucf101": Dataset(
        "ucf101",
        _split("UCF101", "UCF-101-midframes"),
        "UCF-101-midframes.zip and the split by their links",
        101,
        _sizes(7_639, 1_934, 1_849),
        "a photo of a person doing {}.",
    ),
    "imagenetv2": Dataset(
        "imagenetv2",
        partial(read_numbered, place="imagenetv2-matched-frequency-format-val"),
        "the matched-frequency images of modestyachts/ImageNetV2; classnames.txt of imagenet/",
        1000,
        {"test": 10_000},
    ),
    "imagenet_sketch": Dataset(
        "imagenet-sketch",
        partial(read_wordnet, places={"test": "images"}),
        "HaohanWang/ImageNet-Sketch on GitHub; classnames.txt of imagenet/",
        1000,
        {"test": 50_889},
    ),
    "imagenet_a": Dataset(
        "imagenet-adversarial",
        partial(read_wordnet, places={"test": "imagenet-a"}),
        "hendrycks/natural-adv-examples on GitHub; classnames.txt of imagenet/",
        200,
        {"test": 7_500},
    ),
    "imagenet_r": Dataset(
        "imagenet-rendition",
        partial(read_wordnet, places={"test": "imagenet-r"}),
        "hendrycks/imagenet-r on GitHub; classnames.txt of imagenet/",
        200,
        {"test": 30_000},
    ),
}
