"""Packs images into WebDataset shards: a folder of them, or a data set of the paper."""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engine.config import Range, Section, UserError
from engine.data.datasets import DATASETS, DatasetName, read_dataset
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class ShardsConfig(Section):
    """Packs images into WebDataset shards, in a shuffled order that never changes.

    Sub-folders are taken as classes (`_` reads as a blank): their labels are kept for evaluation
    alone, and OUT/classes.txt names them. `promptkd index OUT` is the next step. With --dataset,
    OUT gets a folder a split: train, val and test, those that the data set has.
    """

    places: Positional[tuple[str, ...]] = ()
    """IMAGES OUT: folder of JPEG, PNG or WebP images, and folder to write the shards to. With
    --dataset: OUT alone, which by default is the data set's name."""
    dataset: DatasetName | None = None
    """Data set of the paper, with CoOp's splits."""
    root: str = ""
    """With --dataset: folder that holds eurosat/ and so on, as CoOp's DATASETS.md lays them out."""
    partial: bool = False
    """Use a data set that is not of its published size."""
    classes: str = ""
    """Text file of class names in label order. Empty: the sub-folders, sorted."""
    samples: Annotated[int, Range(1)] = 4096
    """Images of a shard."""
    skip_invalid: bool = False
    """Leave out files that are not usable images, and count them, instead of stopping."""


def main(args: Sequence[str]) -> None:
    config = parse(ShardsConfig, args, prog="promptkd shards")
    if config.dataset and config.classes:
        raise UserError("classes: a data set has its own class names; leave out one of the two")
    if (config.partial or config.root) and not config.dataset:
        field = "root" if config.root else "partial"
        raise UserError(f"{field}: is only for a data set; name it with --dataset")
    if config.dataset:
        if not config.root or len(config.places) > 1:
            raise UserError("root: name the folder of data sets by --root DIR, and then one OUT")
        _pack_dataset(config, config.dataset, Path(*config.places or (config.dataset,)))
        return
    if len(config.places) != 2:
        raise UserError("images: name a folder of images, and then the folder to write to")
    images, out = map(Path, config.places)
    from engine.clip.names import read_names
    from engine.data.shards import write_shards

    class_names = read_names(config.classes, "classes") if config.classes else None
    shards, names, left_out = write_shards(
        images, out, class_names, config.samples, config.skip_invalid
    )
    if names:
        _write_names(names, out)
    print(f"{len(shards)} shards in {out}, {len(names)} classes{_told(left_out)}")


def _pack_dataset(config: ShardsConfig, dataset: DatasetName, out: Path) -> None:
    found = read_dataset(dataset, Path(config.root), config.partial)
    from engine.data.shards import write_splits

    written = write_splits(found, out, config.samples, config.skip_invalid)
    names = _write_names(found.names, out)
    for split, (shards, left_out) in written.items():
        images = len(found.splits[split]) - left_out.total()
        print(f"{len(shards)} shards in {out / split}, {images:,} images{_told(left_out)}")
    template = DATASETS[dataset].template
    print(f"{len(found.names)} classes in {names}; zero-shot template: {template}\n\nnext:")
    for split in ("train", "test"):
        if split in written:
            print(f"  promptkd index {shlex.quote(str(out / split))}")
    words = ["evaluate", "BUNDLE", str(out / "test"), "--dataset", dataset]
    if "train" in written:
        print("  promptkd distill run.toml, where it says")
        print(f"    [corpus]\n    shards = {json.dumps(str(out / 'train'))}")
        print(f"    evaluation = {json.dumps(str(out / 'test'))}")
        print(f"    [classes]\n    names = {json.dumps(str(names))}")
        print(f"    template = {json.dumps(template)}")
    else:
        words += ["--protocol", "domain-generalisation", "--classes", str(names)]
    print(f"  promptkd {shlex.join(words)}")


def _write_names(names: Sequence[str], out: Path) -> Path:
    (out / "classes.txt").write_text("\n".join(names) + "\n")
    return out / "classes.txt"


def _told(left_out: Counter[str]) -> str:
    return "".join(f"; left out {count} ({reason})" for reason, count in left_out.items())


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "shards"))
