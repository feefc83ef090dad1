"""A worker without Ray: an inline run, its end, and its resumption."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import workers
from distributed import run_distributed
from tiny import clip_folder
from workers import assignment_of

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.towers import load_clip
from engine.config import (
    RunConfig,
)
from engine.train import checkpoint
from engine.train.worker import Task, work

NAMES = ("daisy", "oak tree", "tulip")


def config_of(model: str, corpus: str, runs: str) -> RunConfig:
    """Resolved: 24 samples, 3 passes, 9 steps, a checkpoint after 4 and 8."""
    return workers.config_of(
        runs,
        "run",
        {
            "corpus.shards": corpus,
            "corpus.evaluation": corpus,
            "corpus.block_samples": 4,
            "teacher.model": model,
            "student.model": model,
            "student.workers": 2,
            "train.checkpoint_steps": 4,
            "train.log_steps": 2,
        },
    )


def task_of(config: RunConfig, classes: ClassVectors, zero_shot: ClassVectors | None) -> Task:
    return Task(config, assignment_of(config, classes), zero_shot, "inline")


def run(rank: int, world: int, model: str, corpus: str, runs: str, isolate: bool = False) -> dict:
    config = config_of(model, corpus, runs)
    data = dataclasses.replace(config.corpus, isolate=isolate)
    config = dataclasses.replace(config, corpus=data)
    classes = encode_classes(load_clip(model, "", "teacher."), NAMES, ("{}",))
    return work(task_of(config, classes, classes), torch.device("cpu"))


def run_with(rank: int, world: int, model: str, corpus: str, runs: str, changes: dict) -> dict:
    """As run(), with other settings of `train`."""
    config = config_of(model, corpus, runs)
    train = dataclasses.replace(config.train, **changes)
    config = dataclasses.replace(config, train=train)
    classes = encode_classes(load_clip(model, "", "teacher."), NAMES, ("{}",))
    return work(task_of(config, classes, None), torch.device("cpu"))


def records(runs: Path | str, kind: str) -> list[dict]:
    lines = (Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def run_apart(rank: int, world: int, model: str, corpus: str, runs: str) -> str:
    """Rank 1 has a run folder of its own, without checkpoints."""
    told = run(rank, world, model, corpus, runs if rank == 0 else f"{runs}/elsewhere")
    return told.get("failed", "went on")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_folder) -> tuple[tuple[str, str, str], list[dict]]:
    """Where a run has been, and what its two workers told."""
    folder = tmp_path_factory.mktemp("worker")
    where = (clip_folder(folder / "clip"), str(corpus_folder), str(folder))
    (folder / "run").mkdir()
    return where, run_distributed(run, 2, *where)


def test_all_workers_tell_the_same_and_the_ledger_adds_up(finished):
    told = finished[1]
    assert told[0]["ledger"] == {"seen": 72, "trained": 72, "skipped": {}, "pending": 0}
    assert told[0]["evaluation"] == {"scored": 24, "skipped": {}}
    assert told[0]["steps"] == 9
    for shared in ("ledger", "evaluation", "scores", "steps"):
        assert told[0][shared] == told[1][shared]
    # Teacher and zero-shot student are one model here, so it agrees with itself.
    assert told[0]["scores"]["student_before"] == told[0]["scores"]["teacher"]
    assert told[0]["scores"]["teacher"]["agreement"] == 100


def test_a_run_cut_off_ends_as_one_that_was_not(finished, tmp_path):
    """Though it decodes in another process from there on."""
    (model, corpus, runs), _ = finished
    whole = Path(runs) / "run"
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000009")
    (tmp_path / "run" / "bundle.safetensors").unlink()
    told = run_distributed(run, 2, model, corpus, str(tmp_path), True)
    assert told[0]["ledger"] == {"seen": 72, "trained": 72, "skipped": {}, "pending": 0}
    assert told[0]["scores"] == finished[1][0]["scores"]
    ends = [Bundle.load(folder / "bundle.safetensors") for folder in (whole, tmp_path / "run")]
    for name, tensor in ends[0].learned.items():
        assert torch.equal(tensor, ends[1].learned[name]), name
    steps = [record["step"] for record in records(tmp_path, "train")]
    assert steps == [2, 4, 6, 8, 9, 9], "it went on from step 8"


def test_workers_that_see_different_folders_are_stopped(finished):
    (model, corpus, runs), _ = finished
    for told in run_distributed(run_apart, 2, model, corpus, runs):
        assert "runs_dir must be one folder for all nodes" in told


def test_a_collapsed_student_goes_back_and_on(corpus_folder, tmp_path):
    """A learning rate far too high: it diverges, and goes on from where it was good, at half of
    it; both workers agree on when."""
    model = clip_folder(tmp_path / "clip")
    (tmp_path / "run").mkdir()
    changes = {"lr": 1000.0, "passes": 12, "warmup_steps": 6, "checkpoint_steps": 6, "rollbacks": 9}
    told = run_distributed(run_with, 2, model, str(corpus_folder), str(tmp_path), changes)
    assert told[0]["rollbacks"] == told[1]["rollbacks"] != []
    assert told[0]["steps"] == 36
    assert told[0]["ledger"] == {"seen": 288, "trained": 288, "skipped": {}, "pending": 0}
    notices = [record["text"] for record in records(tmp_path, "notice")]
    assert "the student has collapsed: " in notices[0]
    rates: dict[int, list[float]] = {}
    for record in records(tmp_path, "train"):
        rates.setdefault(record["step"], []).append(record["lr"])
    first = told[0]["rollbacks"][0]["to_step"]
    assert f"going on from step {first} at 1/2 of its learning rate" in notices[1]
    assert rates[first + 2][1] == rates[first + 2][0] / 2


def test_a_student_that_collapses_too_often_is_given_up(corpus_folder, tmp_path):
    """Weights so large that nothing is finite any more; the bundle is not written."""
    model = clip_folder(tmp_path / "clip")
    (tmp_path / "run").mkdir()
    changes = {"lr": 1e30, "passes": 4, "warmup_steps": 0, "rollbacks": 1}
    (told,) = run_distributed(run_with, 1, model, str(corpus_folder), str(tmp_path), changes)
    assert told.keys() == {"collapsed"} and told["collapsed"]
    assert len(json.loads((tmp_path / "run" / "rollbacks.json").read_text())) == 1
    assert not (tmp_path / "run" / "bundle.safetensors").exists()


def test_the_best_pass_is_kept_if_the_paper_is_to_be_followed(corpus_folder, tmp_path):
    model = clip_folder(tmp_path / "clip")
    (tmp_path / "run").mkdir()
    changes = {"selection": "paper", "passes": 4, "lr": 2.0}
    told = run_distributed(run_with, 2, model, str(corpus_folder), str(tmp_path), changes)
    selection, score = told[0]["selection"], told[0]["scores"]["student_after"]
    assert selection == told[1]["selection"] and selection["rule"] == "paper"
    passes = records(tmp_path, "pass")
    assert [record["pass_"] for record in passes] == [0, 1, 2, 3]
    best = max(record["student"]["base"] for record in passes)
    first = next(r["pass_"] for r in passes if r["student"]["base"] == best)
    assert (selection["pass"], selection["accuracy"]) == (first, best)
    assert score["base"] == pytest.approx(best)


def test_a_corpus_that_has_changed_stops_the_run_with_a_checkpoint(corpus_folder, tmp_path):
    """Ten of 24 images are not those of the index: skipped and counted, until they are too many."""
    model, corpus = clip_folder(tmp_path / "clip"), tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)
    shard = corpus / "000001.tar"
    shard.write_bytes(bytes(255 - byte for byte in shard.read_bytes()))
    (tmp_path / "run").mkdir()
    passes = {"passes": 20}
    told = run_distributed(run_with, 2, model, str(corpus), str(tmp_path), passes)
    assert told[0] == told[1] and told[0].keys() == {"spoilt"}
    failed, visited = map(int, re.match(r"(\d+) of (\d+) images", told[0]["spoilt"]).groups())
    assert failed > 2.4 and visited <= 24  # a tenth of a pass, and before its end
    stopped = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert stopped.ledger.skipped == {"changed": failed} and stopped.ledger.visited == visited
