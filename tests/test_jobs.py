"""The commands, as a user types them."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from clusters import RAY, cluster, submitted

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.train import checkpoint
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


def test_help(capsys):
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
    assert "name a folder for it by --out DIR" in capsys.readouterr().err


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
    assert "template: 'a photo' is neither" in capsys.readouterr().err
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
    assert "1 shards, 2 samples" in told and "1 images beside the first" in told


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
    assert promptkd("distill", SETTINGS / "distill.toml", *words) == 0
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
    import torch

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
    lines = (tmp_path / "true" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    first, second = (record["loss"] for record in records)
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
    with cluster(tmp_path, "--num-cpus=2") as address:
        submit = ["submit", toml, "--address", address, "--python", sys.executable]
        run = submitted(submit)
        assert run.returncode == 0, run.stderr
        assert "24 images in 3 steps" in run.stdout
        assert json.loads((tmp_path / "job" / "ledger.json").read_text())["trained"] == 24
        run = submitted(submit)
        assert run.returncode == 2 and "pass --overwrite" in run.stdout, "the job's own code"
        run = submitted(submit, RAY_AUTH_TOKEN="b" * 64)
        assert run.returncode == 2 and "Invalid authentication token" in run.stderr
        run = submitted(submit, RAY_AUTH_MODE="disabled")
        assert run.returncode == 2 and "Authentication required" in run.stderr
        stopped_and_resumed([*submit, "--train.passes", "200", "--name", "long"], tmp_path / "long")


def stopped_and_resumed(submit: list[object], folder: Path) -> None:
    """A job that `ray job stop` ends loses no step."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, submit)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert job.stderr
    name = next(line.split()[1] for line in job.stderr if line.startswith("job "))
    deadline = time.monotonic() + 120
    while not steps_of(folder):
        assert time.monotonic() < deadline and job.poll() is None, job.stderr.read()
        time.sleep(0.2)
    subprocess.run([RAY, "job", "stop", name, "--address", submit[3]], check=True)
    assert job.wait(60) != 0
    job.stderr.close()
    done = steps_of(folder)
    assert len(done) < 600 and not (folder / "lease.json").exists()
    saved = checkpoint.load_latest(folder / "checkpoints")
    assert saved and saved.step == done[-1], "drained"
    run = submitted([*submit, "--resume"])
    assert run.returncode == 0, run.stderr
    assert f"resumed, on 1 workers, from step {saved.step}" in run.stdout
    assert sorted(set(steps_of(folder))) == steps_of(folder), "no step twice"
    assert json.loads((folder / "ledger.json").read_text())["trained"] == 4800


def steps_of(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [one["step"] for one in map(json.loads, lines) if one["kind"] == "train"]
