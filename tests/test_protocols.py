"""A data set of the paper from its folder to its scores, as a user types it."""

import json
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from trees import plant

from engine.clip.bundle import Bundle
from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from jobs import cli
from jobs.quickstart import HERE

STUDENT = f"local-dir:{HERE / 'models' / 'student'}"


def promptkd(*words: object) -> int:
    return cli.main([str(word) for word in words])


def random_bundle(folder: Path, names: list[str]) -> Path:
    """A bundle of the quickstart's student that answers by colour, and knows nothing else."""
    clip = load_clip(STUDENT, "", "student.")
    torch.manual_seed(0)
    student = PromptedTower(clip.image, prompts=2, depth=2, hidden=12, outputs=16, seed=0)
    pixels = clip.image.pixels
    colours = torch.randint(0, 256, (24, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, pixels, pixels)
    with torch.no_grad():
        for _ in range(30):  # the running statistics become those of colours
            student(colours)
        features = student.eval()(colours)
    vectors = (features - features.mean(0))[[names.index(name) for name in names]]
    bundle = Bundle(
        learned=student.state_dict(),
        class_vectors=torch.nn.functional.normalize(vectors, dim=-1),
        class_names=tuple(names),
        model=STUDENT,
        weights="",
        backbone=clip.fingerprint,
        teacher="t",
        logit_scale=20.0,
        pixels=pixels,
    )
    bundle.save(folder / "bundle.safetensors")
    return folder / "bundle.safetensors"


def percent(row: str) -> list[float | None]:
    """The scores of a line of the table of `promptkd evaluate`."""
    return [None if word == "-" else float(word) for word in row.split()[2:]]


def test_a_data_set_from_its_folder_to_its_scores(tmp_path, capsys):
    tree = plant("eurosat", tmp_path / "data")
    out = tmp_path / "euro sat"
    assert promptkd("shards", "--root", tmp_path / "data", out, "--dataset", "eurosat") == 2
    told = capsys.readouterr().err
    assert "classes 3 instead of 10; train 6 instead of 13,500" in told and "--partial" in told
    words = [
        "shards",
        "--root",
        tmp_path / "data",
        out,
        "--dataset",
        "eurosat",
        "--partial",
        "--samples",
        4,
    ]
    assert promptkd(*words) == 0
    told = capsys.readouterr()
    assert "warning" in told.err
    assert f"2 shards in {out}/train, 6 images" in told.out
    assert "zero-shot template: a centered satellite photo of {}." in told.out
    assert (out / "classes.txt").read_text().splitlines() == tree.names

    next_up = [line.strip() for line in told.out.splitlines() if line.startswith("  promptkd")]
    indexing = [shlex.split(line)[1:] for line in next_up if " index " in line]
    assert len(indexing) == 2 and all(promptkd(*line) == 0 for line in indexing)
    toml = told.out.partition("where it says\n")[2].partition("  promptkd")[0]
    assert tomllib.loads(toml) == {
        "corpus": {"shards": f"{out}/train", "evaluation": f"{out}/test"},
        "classes": {
            "names": f"{out}/classes.txt",
            "template": "a centered satellite photo of {}.",
        },
    }

    bundle = random_bundle(tmp_path, tree.names)
    evaluating = [str(bundle) if w == "BUNDLE" else w for w in shlex.split(next_up[-1])[1:]]
    capsys.readouterr()
    assert promptkd(*evaluating) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["base", "novel", "hm", "all"]
    assert "not as published: test base 4 instead of 4,200" in lines

    # Where `promptkd predict` is right, counted from the names of the files.
    assert promptkd("predict", bundle, *tree.splits["test"], "--top", 3) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ranked = {Path(line["image"]): list(line["top"]) for line in said}
    assert len({names[0] for names in ranked.values()}) > 1
    right = Counter()
    for file, label in tree.splits["test"].items():
        own = tree.names[:2] if label < 2 else tree.names[2:]
        right["all"] += ranked[file][0] == tree.names[label]
        half = "base" if label < 2 else "novel"
        right[half] += next(n for n in ranked[file] if n in own) == tree.names[label]
    base, novel, hm, everything = percent(lines[2])
    assert base == 100 * right["base"] / 4 and novel == 100 * right["novel"] / 2
    assert everything == pytest.approx(100 * right["all"] / 6, abs=0.005)
    assert lines[0] == f"base-to-novel: hm {hm:.2f}"

    assert promptkd(*evaluating, "--protocol", "cross-dataset") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cross-dataset: all {everything:.2f}"
    assert "PromptKD       63.74" in lines


def test_labels_may_count_in_another_list_of_classes(tmp_path, capsys):
    """As those of ImageNet-A and -R do, which have 200 of ImageNet's classes."""
    names = ["tench", "goldfish", "tabby cat", "missile", "missile"]
    bundle = random_bundle(tmp_path, names)
    tree = plant("imagenet_a", tmp_path / "data")
    out = tmp_path / "out"
    words = ["shards", "--root", tmp_path / "data", out, "--dataset", "imagenet_a", "--partial"]
    assert promptkd(*words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert promptkd("index", out / "test") == 0
    evaluating = [str(bundle) if w == "BUNDLE" else w for w in shlex.split(last)[1:]]
    capsys.readouterr()
    assert promptkd(*evaluating) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PromptKD       70.36" in lines

    assert promptkd("predict", bundle, *tree.splits["test"], "--top", 5) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({next(iter(line["top"])) for line in said}) > 1
    right = 0
    for line in said:
        top = max((n for n in line["top"] if n in tree.names), key=line["top"].__getitem__)
        right += top == tree.names[tree.splits["test"][Path(line["image"])]]
    assert percent(lines[2]) == [pytest.approx(100 * right / len(said), abs=0.005)]

    listed = tmp_path / "names.txt"
    listed.write_text("goldfish\ntabby cat\nperch\n")
    assert promptkd("evaluate", bundle, out / "test", "--classes", listed) == 2
    assert "classes: the bundle has no class 'perch'" in capsys.readouterr().err
    listed.write_text("goldfish\ntabby cat\n")
    assert promptkd("evaluate", bundle, out / "test", "--classes", listed) == 2
    assert f"labels up to 2, {listed} has 2 classes" in capsys.readouterr().err


def test_options_of_a_data_set_that_do_not_fit_are_named(images_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert promptkd("shards", images_folder, out, "--partial") == 2
    assert "partial: is only for a data set" in capsys.readouterr().err
    words = ["--dataset", "dtd", "--classes", "names.txt"]
    assert promptkd("shards", images_folder, out, *words) == 2
    assert "classes: a data set has its own" in capsys.readouterr().err
    assert promptkd("shards", "--root", images_folder, out, "--dataset", "dtd") == 2
    assert f"root: {images_folder}/dtd is missing" in capsys.readouterr().err
    assert not out.exists()
