"""The commands, as a user types them."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from trees import plant

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from jobs import cli
from jobs.quickstart import HERE, SETTINGS

TEACHER, STUDENT = (f"local-dir:{HERE / 'models' / name}" for name in ("teacher", "student"))


def promptkd(*words: object) -> int:
    return cli.main([str(word) for word in words])


def photos(data_folder: Path, folder: Path, per_class: int) -> Path:
    """A folder with some of the flower photos of every class, by links."""
    for kind in sorted(path for path in (data_folder / "flowers5").iterdir() if path.is_dir()):
        (folder / kind.name).mkdir(parents=True)
        for file in sorted(kind.glob("*.jpg"))[:per_class]:
            (folder / kind.name / file.name).symlink_to(file)
    return folder


def test_unknown_command_and_help(capsys):
    assert promptkd("distil") == 2
    assert "no command 'distil'" in capsys.readouterr().err
    assert promptkd("--help") == 0
    told = capsys.readouterr().out
    assert all(command in told for command in cli.COMMANDS)


def test_a_folder_becomes_a_corpus_and_a_strange_file_is_named(images_folder, tmp_path, capsys):
    assert promptkd("shards", images_folder, tmp_path / "shards") == 0
    assert promptkd("index", tmp_path / "shards") == 0
    assert "1 shards, 24 samples" in capsys.readouterr().out
    assert promptkd("shards", images_folder, tmp_path / "shards") == 2
    assert "already holds shards" in capsys.readouterr().err

    strange = tmp_path / "mixed" / "notes.jpg"
    strange.parent.mkdir()
    strange.write_text("not an image")
    assert promptkd("shards", strange.parent, tmp_path / "other") == 2
    assert str(strange) in capsys.readouterr().err
    assert promptkd("index", tmp_path / "mixed") == 2
    assert "no .tar shards" in capsys.readouterr().err


def test_class_vectors_are_stored(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("red circle\nblue star\n")
    assert promptkd("classes", names, tmp_path / "w.safetensors", "--model", TEACHER) == 0
    assert "2 class vectors of width" in capsys.readouterr().out
    names.write_text("red circle\n\n")
    assert promptkd("classes", names, tmp_path / "w.safetensors", "--model", TEACHER) == 2
    assert "line 2 is empty" in capsys.readouterr().err


def test_mistakes_end_in_a_line_that_names_them(images_folder, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("red circle\nblue star\n", encoding="utf-8-sig")  # as some editors save it
    stored = tmp_path / "w.safetensors"
    assert promptkd("classes", names, stored, "--model", TEACHER, "--template", "a photo") == 2
    assert "template must hold {}" in capsys.readouterr().err
    assert promptkd("classes", names, stored, "--model", TEACHER, "--weights", "w.pt") == 2
    assert "weights: local-dir:" in capsys.readouterr().err
    assert promptkd("classes", names, stored, "--model", TEACHER) == 0
    assert ClassVectors.load(stored).names == ("red circle", "blue star")
    capsys.readouterr()
    assert promptkd("shards", images_folder, names / "below") == 2
    assert f"{names}" in capsys.readouterr().err
    assert promptkd("predict", tmp_path, images_folder) == 2
    assert f"bundle: {tmp_path}" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert promptkd("predict", stored, empty) == 2
    assert "images: there are none" in capsys.readouterr().err


def test_images_that_share_a_key_are_told_of(images_folder, tmp_path, capsys):
    image = next(images_folder.rglob("*.jpeg"))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("2024.01.05 a.jpg", "2024.02.05 b.jpg", "other.jpg"):
            tar.add(image, name)
    assert promptkd("index", tmp_path) == 0
    told = capsys.readouterr().out
    assert "1 shards, 2 samples" in told and "1 more images than samples" in told


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
    assert promptkd("shards", tmp_path / "data", out, "--dataset", "eurosat") == 2
    told = capsys.readouterr().err
    assert "classes 3 instead of 10; train 6 instead of 13,500" in told and "--partial" in told
    words = ["shards", tmp_path / "data", out, "--dataset", "eurosat", "--partial", "--samples", 4]
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
    words = ["shards", tmp_path / "data", out, "--dataset", "imagenet_a", "--partial"]
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
    assert promptkd("shards", images_folder, out, "--dataset", "dtd") == 2
    assert f"images: {images_folder}/dtd is missing" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.ray
@pytest.mark.slow
def test_flower_photos_from_folder_to_prediction(data_folder, tmp_path, capsys):
    images = photos(data_folder, tmp_path / "photos", 100)
    corpus, names = tmp_path / "shards", tmp_path / "shards" / "classes.txt"
    assert promptkd("shards", images, corpus, "--samples", 200) == 0
    assert promptkd("index", corpus) == 0
    words = ["--name", "flowers", "--runs_dir", tmp_path, "--corpus.shards", corpus]
    words += ["--corpus.evaluation", corpus, "--classes.names", names, "--train.passes", 2]
    words += ["--teacher.model", TEACHER, "--student.model", STUDENT]
    assert promptkd("distill", SETTINGS, *words) == 0
    ledger = json.loads((tmp_path / "flowers" / "ledger.json").read_text())
    assert ledger == {"seen": 1000, "trained": 1000, "skipped": {}, "pending": 0}

    capsys.readouterr()
    bundle = tmp_path / "flowers" / "bundle.safetensors"
    assert promptkd("evaluate", bundle, corpus) == 0
    assert "novel" in capsys.readouterr().out
    assert promptkd("predict", bundle, images / "daisy", names, "--top", 1) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 101 and lines[-1] == {"image": str(names), "error": "format"}
    assert all(len(line["top"]) == 1 for line in lines[:-1])


@pytest.mark.ray
@pytest.mark.slow
def test_true_architectures_take_two_steps_on_photos(data_folder, tmp_path):
    import open_clip

    weights = {}
    for model in ("ViT-L-14-quickgelu", "ViT-B-16-quickgelu"):
        torch.manual_seed(0)
        weights[model] = tmp_path / f"{model}.pt"
        torch.save(open_clip.create_model(model).state_dict(), weights[model])
    images = photos(data_folder, tmp_path / "photos", 3)
    corpus = tmp_path / "shards"
    assert promptkd("shards", images, corpus) == 0
    assert promptkd("index", corpus) == 0
    words = ["--name", "true", "--runs_dir", tmp_path, "--corpus.shards", corpus]
    words += ["--classes.names", corpus / "classes.txt", "--corpus.lanes", 1]
    words += ["--train.passes", 1, "--train.batch", 8, "--train.log_steps", 1]
    for side, model in zip(("teacher", "student"), weights, strict=True):
        words += [f"--{side}.model", model, f"--{side}.weights", weights[model]]
    assert promptkd("distill", *words) == 0
    records = (tmp_path / "true" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(record)["loss"] for record in records)
    assert 0 < second and 0 < first
    # The paper's student: 9 x 4 prompts of width 768, and a projector from 512 to 768 and on.
    bundle = Bundle.load(tmp_path / "true" / "bundle.safetensors")
    assert bundle.learned["prompts"].numel() == 27_648
    names = ("first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight")
    names += ("second.bias",)
    assert sum(bundle.learned[f"projector.{name}"].numel() for name in names) == 986_112


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_toml_runs_as_a_job_on_a_running_cluster(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    toml = tmp_path / "run.toml"
    toml.write_text(
        f"""name = "job"
        runs_dir = "{tmp_path}"
        [corpus]
        shards = "{corpus_folder}"
        lanes = 1
        [classes]
        names = "{tmp_path}/names.txt"
        [teacher]
        model = "{TEACHER}"
        [student]
        model = "{STUDENT}"
        depth = 2
        [train]
        passes = 1
        batch = 8
        """
    )
    (tmp_path / "names.txt").write_text("daisy\noak tree\ntulip\n")
    roles = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    port = dict(zip(roles, free_ports(len(roles)), strict=True))
    ports = [f"--{role}={number}" for role, number in port.items()]
    ports += ["--dashboard-host=127.0.0.1"]
    ray = Path(sys.executable).with_name("ray")
    words = [ray, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *ports]
    with open(tmp_path / "head.log", "w") as log:
        # Ray's sockets want a short path.
        temporary = tempfile.mkdtemp(prefix="ray")
        head = subprocess.Popen([*words, f"--temp-dir={temporary}"], stdout=log, stderr=log)
    submit = ["submit", toml, "--address", f"http://127.0.0.1:{port['dashboard-port']}"]
    submit += ["--python", sys.executable]
    try:
        deadline = time.monotonic() + 120
        while "no Ray cluster takes jobs" in (run := submitted(submit)).stderr:
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(2)
        assert run.returncode == 0, run.stderr
        assert "24 images in 3 steps" in run.stdout
        assert json.loads((tmp_path / "job" / "ledger.json").read_text())["trained"] == 24
        run = submitted(submit)
        assert run.returncode == 2 and "pass --overwrite" in run.stdout, "the job's own code"
        run = submitted(submit, RAY_AUTH_TOKEN="b" * 64)
        assert run.returncode == 2 and "Invalid authentication token" in run.stderr
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside those that Ray gives its workers (10002 to 19999)."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    assert min(numbers) > 20_000
    return numbers


def submitted(words: list[object], **env: str) -> subprocess.CompletedProcess[str]:
    """`promptkd submit` in a process of its own, since Ray reads its token once a process."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
