"""The paper's data sets, read from miniatures of their layouts."""

import json
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from trees import IMAGES, JSON_SETS, VARIANTS, plant

from engine.config import UserError
from engine.data.datasets import DATASETS, DatasetName, read_dataset
from engine.data.shards import write_splits

NAMES = get_args(DatasetName)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_read_whole(name, tmp_path, capsys):
    tree = plant(name, tmp_path)
    found = read_dataset(name, tmp_path, partial=True)
    assert found.names == tree.names
    read = {
        split: {(found.folder / path).resolve(): label for path, label in images}
        for split, images in found.splits.items()
    }
    assert read == {split: dict(images) for split, images in tree.splits.items()}
    assert all(len(images) == len(read[split]) for split, images in found.splits.items())
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "not of the published size" in told
    assert f"classes {len(tree.names)} instead of {DATASETS[name].classes:,}" in told


@pytest.mark.parametrize("name", ["eurosat", "imagenet", "fgvc_aircraft", "imagenet_r"])
def test_sizes_are_checked(name, tmp_path, monkeypatch, capsys):
    tree = plant(name, tmp_path)
    base = -(-len(tree.names) // 2)
    labels = Counter(tree.splits["test"].values())
    sizes = {
        "train": len(tree.splits.get("train", ())),
        "test base": sum(labels[label] for label in range(base)),
        "test novel": sum(labels[label] for label in range(base, len(tree.names))),
    }
    mini = replace(DATASETS[name], classes=len(tree.names), sizes=sizes)
    monkeypatch.setitem(DATASETS, name, mini)
    read_dataset(name, tmp_path)
    assert capsys.readouterr().err == ""
    for split in sizes:
        monkeypatch.setitem(DATASETS, name, replace(mini, sizes=sizes | {split: 12_345}))
        told = f"published size: {split} {sizes[split]} instead of 12,345; pass --partial"
        with pytest.raises(UserError, match=told):
            read_dataset(name, tmp_path)


def test_published_sizes_are_those_of_coop():
    """Classes, train and test images: CoOp (arXiv:2109.01134), table of the data sets' sizes."""
    coop = {
        "caltech101": (100, 4_128, 2_465),
        "oxford_pets": (37, 2_944, 3_669),
        "stanford_cars": (196, 6_509, 8_041),
        "oxford_flowers": (102, 4_093, 2_463),
        "food101": (101, 50_500, 30_300),
        "fgvc_aircraft": (100, 3_334, 3_333),
        "sun397": (397, 15_880, 19_850),
        "dtd": (47, 2_820, 1_692),
        "eurosat": (10, 13_500, 8_100),
        "ucf101": (101, 7_639, 3_783),
        "imagenet": (1_000, 1_281_167, 50_000),
    }
    for name, (classes, train, test) in coop.items():
        ours = DATASETS[name]
        assert (ours.classes, ours.sizes["train"]) == (classes, train)
        assert ours.sizes["test base"] + ours.sizes["test novel"] == test
    assert {*coop, *VARIANTS} == set(NAMES) == set(DATASETS)
    assert all("train" not in DATASETS[name].sizes for name in VARIANTS)


def test_templates_have_one_place_for_the_name():
    assert all(one.template.count("{}") == 1 for one in DATASETS.values())
    said = {name: one.template.format("x") for name, one in DATASETS.items()}
    assert Counter(said.values())["a photo of a x."] == 8
    assert said["oxford_pets"] == "a photo of a x, a type of pet."
    assert said["food101"] == "a photo of x, a type of food."
    assert said["dtd"] == "x texture."


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_missing_is_named(name, tmp_path):
    with pytest.raises(UserError, match=rf"^root: {tmp_path}/none is missing"):
        read_dataset(name, tmp_path / "none")
    home = tmp_path / DATASETS[name].home
    hint = re.escape(f"(CoOp's DATASETS.md: {DATASETS[name].source})")
    with pytest.raises(UserError, match=rf"^root: {home} is missing: .* {hint}"):
        read_dataset(name, tmp_path)
    tree = plant(name, tmp_path)
    lists = [file for file in home.iterdir() if file.suffix in (".json", ".txt")]
    assert lists
    for file in lists:
        file.rename(home / "away")
        with pytest.raises(UserError, match=rf"^root: {file} is missing .*{hint}"):
            read_dataset(name, tmp_path, partial=True)
        (home / "away").rename(file)
    folders = {file.relative_to(home).parts[0] for file in tree.splits["test"]}
    for folder in folders:
        shutil.rmtree(home / folder)
    with pytest.raises(UserError, match=rf"^root: {home}/.* is missing.*{hint}"):
        read_dataset(name, tmp_path, partial=True)


@pytest.mark.parametrize("name", [*JSON_SETS, "fgvc_aircraft"])
def test_missing_images_are_counted(name, tmp_path):
    tree = plant(name, tmp_path)
    gone = [*list(tree.splits["train"])[1:3], *list(tree.splits["test"])[-1:]]
    for file in gone:
        file.unlink()
    total = sum(map(len, tree.splits.values()))
    told = rf"^root: {gone[0]} is missing; of the {total} images of the splits, 3 are not there"
    with pytest.raises(UserError, match=told):
        read_dataset(name, tmp_path, partial=True)


ROW = ["Forest/Forest_1.jpg", 0, "Forest"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "is to hold a list of images `train`"),
        (json.dumps({"train": [ROW], "val": [ROW]}), "is to hold a list of images `test`"),
        (json.dumps({"train": [ROW], "val": []}), "is to hold a list of images `val`"),
        (json.dumps({"train": [ROW, ["a.jpg", "b"]]}), "train, row 1: is to be "),
        (json.dumps({"train": [["a.jpg", "0", "b"]]}), "train, row 0: is to be "),
        (json.dumps({"train": [["a.jpg", True, "b"]]}), "train, row 0: is to be "),
        (json.dumps({"train": [["a.jpg", -1, "b"]]}), "train, row 0: is to be "),
        (json.dumps({"train": ["a.jpg"]}), "train, row 0: is to be "),
        (json.dumps({"train": [["/etc/a.jpg", 0, "b"]]}), "leads out of the folder"),
        (json.dumps({"train": [["a/../../b.jpg", 0, "b"]]}), "leads out of the folder"),
        (
            json.dumps({"train": [ROW, ["x.jpg", 0, "River"]]}),
            "label 0 is both 'Forest' and 'River'",
        ),
        (
            json.dumps({split: [ROW, ["x.jpg", 2, "River"]] for split in ("train", "val", "test")}),
            "labels are to count from 0; none is 1",
        ),
    ],
)
def test_a_malformed_split_is_named(content, complaint, tmp_path):
    plant("eurosat", tmp_path)
    file = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"^root: {file}.*{re.escape(complaint)}"):
        read_dataset("eurosat", tmp_path, partial=True)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"^root: {file} cannot be read"):
        read_dataset("eurosat", tmp_path, partial=True)


def test_a_class_that_has_no_name_is_named(tmp_path):
    for name, folder, complaint in (
        ("imagenet", "imagenet/images/val/n99999999", "classnames.txt has no such folder"),
        ("imagenet_a", "imagenet-adversarial/imagenet-a/notes", "classnames.txt has no such"),
        ("imagenetv2", f"imagenetv2/{VARIANTS['imagenetv2'][1]}/5", "are to be 0 to 4"),
    ):
        plant(name, tmp_path)
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match=rf"^root: {tmp_path / folder}.*{complaint}"):
            read_dataset(name, tmp_path, partial=True)
    plant("fgvc_aircraft", tmp_path)
    with open(tmp_path / "fgvc_aircraft/images_variant_test.txt", "a") as file:
        file.write("1025794 Spruce Goose\n")
    with pytest.raises(UserError, match=r"images_variant_test\.txt, line 7: 'Spruce Goose' is not"):
        read_dataset("fgvc_aircraft", tmp_path, partial=True)


def test_class_names_that_cannot_be_read_are_named(tmp_path):
    plant("imagenet_r", tmp_path)
    file = tmp_path / "imagenet-rendition/classnames.txt"
    for content, complaint in (
        ("", " is empty"),
        ("n01440764\n", ", line 1: is to be a new folder and its class name"),
        ("n01440764 tench\nn01440764 trout\n", ", line 2: is to be a new folder"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"^root: {file}{complaint}"):
            read_dataset("imagenet_r", tmp_path, partial=True)


def test_validation_images_that_were_not_sorted_are_told_of(tmp_path):
    """As the archive of ImageNet's validation images has them."""
    tree = plant("imagenet", tmp_path)
    flat = tmp_path / "imagenet/images/val"
    for number, file in enumerate(tree.splits["test"]):
        file.rename(flat / f"ILSVRC2012_val_{number:08d}.JPEG")
    for folder in [path for path in flat.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=rf"^root: {flat}: .*in a folder a class"):
        read_dataset("imagenet", tmp_path, partial=True)


def test_a_class_without_validation_images_keeps_the_labels_of_the_others(tmp_path):
    tree = plant("imagenet", tmp_path)
    shutil.rmtree(tmp_path / "imagenet/images/val/n01443537")
    found = read_dataset("imagenet", tmp_path, partial=True)
    assert found.names == tree.names
    assert sorted({label for _, label in found.splits["test"]}) == [0, 2, 3, 4]


@pytest.mark.parametrize("name", ["eurosat", "stanford_cars", "imagenet", "imagenet_a"])
def test_splits_are_packed_with_their_labels(name, tmp_path):
    tree = plant(name, tmp_path)
    found = read_dataset(name, tmp_path, partial=True)
    written = write_splits(found, tmp_path / "out", 3, False)
    assert written.keys() == tree.splits.keys()
    for split, (shards, left_out) in written.items():
        assert not left_out and {shard.parent.name for shard in shards} == {split}
        assert len(shards) == -(-len(tree.splits[split]) // 3)
        samples = {}
        for shard in shards:
            with tarfile.open(shard) as tar:
                members = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
            for member, data in members.items():
                if not member.endswith(".cls"):
                    samples[data] = int(members[member.partition(".")[0] + ".cls"])
        assert samples == {file.read_bytes(): label for file, label in tree.splits[split].items()}


def test_a_bad_image_leaves_no_shards_of_any_split(tmp_path):
    tree = plant("dtd", tmp_path)
    bad: Path = max(tree.splits["test"])
    bad.write_text("not an image")
    found = read_dataset("dtd", tmp_path, partial=True)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"^images: {bad} is not a usable"):
        write_splits(found, out, 10, False)
    assert not list(out.rglob("*.tar"))
    written = write_splits(found, out, 10, True)
    assert {split: dict(left_out) for split, (_, left_out) in written.items()} == {
        "train": {},
        "val": {},
        "test": {"format": 1},
    }
    before = sorted(out.rglob("*.tar"))
    with pytest.raises(UserError, match=rf"^out: {out}/train already holds shards"):
        write_splits(found, out, 10, True)
    assert sorted(out.rglob("*.tar")) == before


def test_an_image_is_looked_for_by_one_listing_of_its_folder(tmp_path, monkeypatch):
    """Over a network a stat of every one of a million images takes hours."""
    import os

    plant("food101", tmp_path)
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    read_dataset("food101", tmp_path, partial=True)
    home = tmp_path / "food-101" / IMAGES["food101"]
    assert sorted(listed) == [home / "apple_pie", home / "waffles"]
