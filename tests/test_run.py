"""Whole runs, with real teachers and students on a real local Ray."""

import json
import os
import re
import shutil
import signal
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from domains import PASSES, config_of, losses, write_domain
from events import scalars
from pages import Page, require_probed, require_report
from safetensors.torch import load_file, save_file

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.config import UserError, to_dict
from engine.data.shards import write_shards
from engine.index import index
from engine.model_card import model_card, run_of
from engine.run import distill
from jobs import cli
from jobs.quickstart import HERE
from jobs.quickstart.domain import CLASSES


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    return write_domain(tmp_path_factory.mktemp("domain"))


@pytest.mark.ray
def test_two_teachers_and_two_students_learn_what_one_with_an_inline_teacher_does(
    domain, local_ray, tmp_path
):
    two = ["--student.workers", "2", "--teacher.actors", "2", "--student.zero_stage", "2"]
    streamed = distill(config_of(domain, tmp_path, "two", *two))
    inline = distill(config_of(domain, tmp_path, "one", "--targets.source", "inline"))

    samples = 4 * len(CLASSES)
    for name, summary in (("two", streamed), ("one", inline)):
        folder = tmp_path / name
        ledger = json.loads((folder / "ledger.json").read_text())
        assert ledger == {
            "seen": PASSES * samples,
            "trained": PASSES * (samples - 1),
            "skipped": {"undecodable": PASSES},
            "pending": 0,
        }
        assert summary == json.loads((folder / "summary.json").read_text())
        assert summary["samples"] == ledger["trained"]
        assert summary["steps"] == PASSES * samples // 32
        assert summary["teacher"]["agreement"] == 100
        assert json.loads((folder / "config.json").read_text())["versions"]["ray"]
        assert [p.name for p in (folder / "checkpoints").iterdir()]
        bundle = Bundle.load(folder / "bundle.safetensors")
        assert bundle.class_names == CLASSES
        card = model_card(bundle, run_of(folder / "bundle.safetensors", bundle), "onnx", "x.onnx")
        assert f" {summary['student_after']['hm']:.2f} |" in card and "undecodable` 2" in card
        assert_workers_told(folder, 2 if name == "two" else 1, ledger)
        tracked = scalars(folder / "tensorboard")
        assert [loss for _, loss in tracked["train/loss"]] == pytest.approx(losses(folder))
        assert tracked["final/steps"] == [(summary["steps"], summary["steps"])]
        assert "student/0/waited_labels" in tracked
        assert require_report(folder).pictures != []
    require_probed(tmp_path / "one", PASSES * (samples - 1))
    assert_teachers_told(tmp_path / "two", streamed["labels"])
    assert not (tmp_path / "one" / "telemetry" / "teachers.jsonl").exists()
    # The stream rounds its labels to fp16; the rest is the same mathematics on the same samples.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    assert losses(tmp_path / "one")[-1] < 0.8 * losses(tmp_path / "one")[0]
    assert streamed["student_before"] == inline["student_before"]
    assert streamed["teacher"]["hm"] == pytest.approx(inline["teacher"]["hm"], abs=3)


def told(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_workers_told(folder: Path, workers: int, ledger: dict) -> None:
    """What became of their time, and of all samples."""
    ranks = [told(folder / "telemetry" / f"worker-{rank}.jsonl") for rank in range(workers)]
    assert sum(one["images"] for records in ranks for one in records) == ledger["trained"]
    skipped: Counter[str] = Counter()
    for rank, records in enumerate(ranks):
        skipped.update(records[-1]["skipped"])
        assert records[-1]["step"] == len(losses(folder))
        for one in records:
            assert one["kind"] == "worker" and one["rank"] == rank and one["host"]
            assert 0 <= one["labels_s"] + one["data_s"] <= one["span_s"] + 1e-3
            assert one["no_gpu"] == "the run is on the CPU"
    assert skipped == ledger["skipped"]
    (started,) = (one for one in told(folder / "metrics.jsonl") if one["kind"] == "started")
    assert started["workers"] == workers
    assert started["effective_weight"] == pytest.approx(1000 / len(CLASSES)), "as the paper's code"
    assert (started["step"], started["steps"]) == (0, len(losses(folder)))


def assert_teachers_told(folder: Path, labels: dict) -> None:
    """All that they labelled, in the time that it took."""
    records = told(folder / "telemetry" / "teachers.jsonl")
    assert {one["teacher"] for one in records} == {"0", "1"}
    assert sum(one["images"] for one in records) == labels["labelled"]
    for step in ("read_s", "decode_s", "forward_s", "write_s"):
        assert sum(one[step] for one in records) == pytest.approx(labels[step])
        assert all(0 <= one[step] <= one["span_s"] for one in records)
    assert all(one["kind"] == "teacher" and one["queue"] >= 0 for one in records)


def test_mistakes_are_found_before_a_model_is_built(domain, tmp_path):
    def complaint(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            distill(config_of(domain, tmp_path, "bad", *flags))
        assert not (tmp_path / "bad").exists()
        return str(error.value)

    few = tmp_path / "few.txt"
    few.write_text("red circle\nblue star\n")
    vectors = tmp_path / "vectors.safetensors"
    vectors.write_bytes(b"not safetensors")
    assert "corpus.shards" in complaint("--corpus.shards", str(tmp_path / "nowhere"))
    assert "corpus.evaluation" in complaint("--corpus.evaluation", str(tmp_path / "nowhere"))
    short = complaint("--classes.names", str(few))
    assert "classes.names" in short and str(few) in short and "labels up to 47" in short
    assert "classes.vectors" in complaint("--classes.vectors", str(vectors))
    assert "student.depth" in complaint("--student.depth", "5")
    assert "student.trainable: last:5" in complaint("--student.trainable", "last:5")
    assert "no run folder" in complaint(
        "--name", domain.name, "--runs_dir", str(domain.parent), "--overwrite"
    )
    assert "student.weights" in complaint("--student.model", "ViT-B-16")
    weights = str(HERE / "models" / "teacher" / "open_clip_model.safetensors")
    mixed = complaint("--student.model", "ViT-B-16", "--student.weights", weights)
    assert "student" in mixed and "not a checkpoint of ViT-B-16" in mixed
    assert "teacher.model" in complaint("--teacher.model", f"local-dir:{tmp_path}")


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_student_resumes_exactly_where_its_checkpoint_left_it(domain, local_ray, tmp_path):
    passes = ("--train.passes", "6")
    undisturbed = config_of(domain, tmp_path, "undisturbed", *passes)
    killed = config_of(domain, tmp_path, "killed", *passes)
    distill(undisturbed)
    with ThreadPoolExecutor(1) as threads:
        kill = threads.submit(kill_after_checkpoint, killed.folder)
        summary = distill(killed)
        kill.result()

    records = told(killed.folder / "metrics.jsonl")
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert sorted(set(steps)) == list(range(1, summary["steps"] + 1))
    assert all(b == a + 1 or (b > 1 and b % 5 == 1) for a, b in pairwise(steps)), steps
    ledgers = [(config.folder / "ledger.json").read_text() for config in (undisturbed, killed)]
    assert ledgers[0] == ledgers[1]
    one, other = (Bundle.load(c.folder / "bundle.safetensors") for c in (undisturbed, killed))
    for name, tensor in one.learned.items():
        torch.testing.assert_close(other.learned[name], tensor, rtol=1e-5, atol=1e-6)


def kill_after_checkpoint(folder: Path) -> None:
    """Kills a student worker, as an operator or the kernel would, once it has a checkpoint."""
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = "RayTrainWorker" in (process / "cmdline").read_text() and is_ours(process)
        except OSError:  # it has ended meanwhile
            continue
        if ours:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("no student worker found")


def is_ours(process: Path) -> bool:
    """Whether a process descends from this one; other people's runs are left alone."""
    while (pid := int(process.name)) > 1:
        if pid == os.getpid():
            return True
        parent = re.search(r"^PPid:\s+(\d+)", (process / "status").read_text(), re.M)
        assert parent
        process = process.with_name(parent[1])
    return False


@pytest.mark.ray
def test_class_vectors_of_another_teacher_are_refused(domain, local_ray, tmp_path):
    from engine.clip.class_vectors import encode_classes
    from engine.clip.towers import load_clip

    other = load_clip(f"local-dir:{HERE / 'models' / 'student'}", "", "teacher.")
    vectors = tmp_path / "w.safetensors"
    encode_classes(other, CLASSES, ("a {}",)).save(vectors)
    with pytest.raises(UserError, match=r"classes\.vectors: .*w\.safetensors was made by another"):
        distill(config_of(domain, tmp_path, "other", "--classes.vectors", str(vectors)))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_tuned_teacher_is_distilled_by_several_seeds(domain, local_ray, tmp_path, capsys):
    """Stage I, then stage II with the prompts that it learned, in the actors of the stream."""
    write_shards(domain / "test_images", tmp_path / "shots", CLASSES, 100, False)
    index(str(tmp_path / "shots"))
    words = {
        "name": "teacher",
        "runs_dir": tmp_path,
        "corpus.shards": tmp_path / "shots",
        "corpus.shots": 2,
        "classes.names": domain / "classes.txt",
        "teacher.model": f"local-dir:{HERE / 'models' / 'teacher'}",
        "prompts.depth": 2,
        "train.passes": 2,
        "train.average_mean": 2,
    }
    flags = [str(word) for field, value in words.items() for word in (f"--{field}", value)]
    assert cli.main(["pretrain", *flags]) == 0
    stage_one = json.loads((tmp_path / "teacher" / "summary.json").read_text())
    assert (stage_one["images"], stage_one["classes"]) == (48, 24)

    config = config_of(domain, tmp_path, "students", "--train.selection", "paper")
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(config)))
    prompts = str(tmp_path / "teacher" / "prompts.safetensors")
    capsys.readouterr()
    words = ["distill", str(file), "--seeds", "1,2", "--teacher.prompts", prompts]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    summaries = [
        json.loads((tmp_path / "students" / f"seed-{seed}" / "summary.json").read_text())
        for seed in (1, 2)
    ]
    hms = [summary["student_after"]["hm"] for summary in summaries]
    mean, deviation = statistics.mean(hms), statistics.stdev(hms)
    assert f"{mean:.2f} ± {deviation:.2f}" in told and "as the paper chooses" in told
    stored = json.loads((tmp_path / "students" / "seeds.json").read_text())
    assert stored["mean"]["student_after"]["hm"] == pytest.approx(mean)
    assert stored["spread"]["student_after"]["hm"] == pytest.approx(deviation)
    bundle = Bundle.load(tmp_path / "students" / "seed-2" / "bundle.safetensors")
    vectors = ClassVectors.load(tmp_path / "teacher" / "class_vectors.safetensors")
    assert bundle.teacher == vectors.teacher
    torch.testing.assert_close(bundle.w_ND, torch.from_numpy(vectors.vectors), rtol=0, atol=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_student_that_cannot_learn_is_given_up_with_a_word(domain, local_ray, tmp_path):
    flags = ("--train.optimizer", "sgd", "--train.lr", "1e30", "--train.rollbacks", "1")
    config = config_of(domain, tmp_path, "lost", *flags)
    with pytest.raises(RuntimeError, match=r"has collapsed, after 1 roll-backs: .*train\.lr"):
        distill(config)
    ledger = json.loads((config.folder / "ledger.json").read_text())
    assert ledger["pending"] > 0
    assert not (config.folder / "bundle.safetensors").exists()
    told = Page.of(config.folder / "report.html").text
    assert "lost failed" in told and "has collapsed, after 1 roll-backs" in told
    assert f"pending {ledger['pending']}" in told


@pytest.mark.ray
def test_logit_scales_that_differ_wildly_are_refused(domain, local_ray, tmp_path):
    """One model was never trained: its scale is not of the other's kind."""
    folder = tmp_path / "student"
    shutil.copytree(HERE / "models" / "student", folder)
    state = load_file(folder / "open_clip_model.safetensors")
    state["logit_scale"] = torch.tensor(1.0).log()
    save_file(state, folder / "open_clip_model.safetensors")
    flags = ("--student.model", f"local-dir:{folder}")
    with pytest.raises(
        UserError, match=r"^student\.weights: the logit scale of .* is 1, .*teacher"
    ):
        distill(config_of(domain, tmp_path, "scales", *flags))


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_user_can_mend_is_tried_once(domain, local_ray, tmp_path):
    """A worker that finds it out is restarted by Ray Train, and leaves at once."""
    flags = ("--targets.source", "inline", "--teacher.precision", "int8", "--teacher.max_kl", "0")
    config = config_of(domain, tmp_path, "refused", *flags)
    with pytest.raises(UserError, match=r"^teacher\.max_kl: "):
        distill(config)
    records = map(json.loads, (config.folder / "metrics.jsonl").read_text().splitlines())
    starts = [record for record in records if "workers start from" in record.get("text", "")]
    assert len(starts) == 1 and not (config.folder / "refused.txt").exists()


def test_a_list_of_seeds_is_checked(capsys):
    for seeds, complaint in (("1,x", "is not a list of numbers"), ("2,2", "names a seed twice")):
        assert cli.main(["distill", "--name", "a", "--seeds", seeds]) == 2
        assert complaint in capsys.readouterr().err
