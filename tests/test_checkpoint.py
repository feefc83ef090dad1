"""What checkpoints hold, which are kept, and how they are written while training goes on."""

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
from checkpoints import same, state
from distributed import run_apart, run_distributed
from safetensors.torch import load_file
from workers import assignment_of, config_of

from engine import durable
from engine.train import checkpoint
from engine.train.checkpoint import Saver
from engine.train.health import Health
from engine.train.worker import Task, work

BAD = Health(agreement=0.2, best=0.9, bad=1)
ALL = ("student.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(folder) if name != "latest.json"]


# ------------------------------------------------------------ what, and when


def test_round_trip(tmp_path, capsys):
    folder = tmp_path / "new" / "checkpoints"
    assert checkpoint.load_latest(folder) is None
    written = checkpoint.save(folder, state(7))
    assert written.name == "step-00000007" and names(written) == sorted(ALL)
    assert same(checkpoint.load_latest(folder), state(7))
    assert not same(state(7), state(8))
    assert capsys.readouterr().err == ""


def test_the_manifest_and_the_pointer_say_what_is_there(tmp_path):
    """By sha256sum's definition, not ours."""
    written = checkpoint.save(tmp_path, state(7))
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["files"].keys() == {*ALL[:3]}
    for name, about in manifest["files"].items():
        data = (written / name).read_bytes()
        assert about == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 7}
    versions = json.loads((written / "state.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__.partition("+")[0]


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 9, 10, 100):
        checkpoint.save(tmp_path, state(step))
        assert same(checkpoint.load_latest(tmp_path), state(step))
    assert names(tmp_path) == ["latest.json", "step-00000010", "step-00000100"]


def test_a_step_of_more_digits_is_newer(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, state(step), keep_last=1)
    assert checkpoint.load_latest(tmp_path).step == 100_000_000 and len(steps(tmp_path)) == 1


def test_as_many_are_kept_as_asked_for_and_the_first_of_every_so_many_steps(tmp_path):
    for step in range(100, 1300, 100):
        checkpoint.save(tmp_path, state(step), keep_last=3, keep_every=250)
    assert steps(tmp_path) == [300, 500, 800, 1000, 1100, 1200]
    checkpoint.save(tmp_path, state(1300), keep_last=1)
    assert steps(tmp_path) == [1300]


def test_the_newest_good_one_is_kept_and_gone_back_to(tmp_path):
    checkpoint.save(tmp_path, state(5))
    for step in (6, 7, 8):
        checkpoint.save(tmp_path, dataclasses.replace(state(step), health=BAD))
    assert steps(tmp_path) == [5, 7, 8]
    assert same(checkpoint.load_latest(tmp_path), dataclasses.replace(state(8), health=BAD))
    assert checkpoint.roll_back(tmp_path) == 5
    assert same(checkpoint.load_latest(tmp_path), state(5))
    assert checkpoint.roll_back(tmp_path, unless=5) == 0
    assert checkpoint.load_latest(tmp_path) is None


def test_a_step_that_comes_again_replaces_itself_alone(tmp_path):
    """What is newer than a save that comes late, another process has written; nor is the save
    disturbed that it is at."""
    for step in (4, 5, 7):
        checkpoint.save(tmp_path, state(step), keep_last=3)
    being_made = tmp_path / "step-00000009.tmp"
    being_made.mkdir()
    later = dataclasses.replace(state(5), train_s=99.0)
    checkpoint.save(tmp_path, later, keep_last=1)
    assert same(checkpoint.load(tmp_path, 5), later)
    assert same(checkpoint.load_latest(tmp_path), state(7)) and being_made.exists()
    assert names(tmp_path) == [
        "latest.json",
        *(f"step-0000000{n}" for n in (5, 7)),
        being_made.name,
    ]


def test_nothing_is_touched_by_who_may_not_write(tmp_path):
    checkpoint.save(tmp_path, state(5))
    (tmp_path / "step-00000004.tmp").mkdir()
    before = names(tmp_path)

    def require_held() -> None:
        raise OSError("taken over")

    with pytest.raises(OSError, match="taken over"):
        checkpoint.save(tmp_path, state(6), require_held=require_held)
    assert names(tmp_path) == before


def test_an_optimizer_may_have_no_state(tmp_path):
    bare = dataclasses.replace(state(1), optimizer={})
    checkpoint.save(tmp_path, bare)
    assert same(checkpoint.load_latest(tmp_path), bare)


def test_tensors_may_lie_in_memory_as_they_like(tmp_path):
    turned = dataclasses.replace(state(1), student={"w": torch.arange(6.0).view(2, 3).T})
    checkpoint.save(tmp_path, turned)
    assert same(checkpoint.load_latest(tmp_path), turned)


def test_what_dying_processes_left_does_not_count_and_is_removed(tmp_path):
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    for left in ("step-00000007.tmp", "step-00000004.old"):
        shutil.copytree(tmp_path / "step-00000006", tmp_path / left)
        (tmp_path / left / "student.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000003.tmp").mkdir()
    assert same(checkpoint.load_latest(tmp_path), state(6))
    checkpoint.save(tmp_path, state(7))
    assert same(checkpoint.load_latest(tmp_path), state(7)) and steps(tmp_path) == [6, 7]


def test_other_versions_are_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"torch": "0.0", "deepspeed": "0.0"})
    checkpoint.save(tmp_path, state(5))
    monkeypatch.undo()
    assert same(checkpoint.load_latest(tmp_path), state(5))
    assert "was written with torch 0.0, deepspeed 0.0, this is torch" in capsys.readouterr().err


# ------------------------------------------------------------ while training goes on


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    """The trainer gives copies of tensors; ledger and health go on counting."""
    saver = Saver(tmp_path, 2, 0)
    saved = state(5)
    saver.save(saved)
    saved.ledger.trained += 1
    saved.health.judgements += 1
    assert saver.failure() is None
    assert same(checkpoint.load_latest(tmp_path), state(5))
    saver.close()


def test_the_caller_goes_on_while_it_is_written_and_a_second_save_waits(tmp_path):
    """The disk is as slow as the reader of a pipe that stands where a file is to be written."""
    saver = Saver(tmp_path, 2, 0)
    os.mkfifo(tmp_path / "latest.json.tmp")  # to open it for writing waits for a reader
    saver.save(state(5))
    while not (tmp_path / "step-00000005").exists():
        assert not saver._coming.done()
    assert not (tmp_path / "latest.json").exists()
    reader = os.open(tmp_path / "latest.json.tmp", os.O_RDONLY | os.O_NONBLOCK)
    saver.save(state(6))  # waits for the first, which fails: a pipe cannot be flushed
    os.close(reader)
    assert saver.failure() is None and same(checkpoint.load_latest(tmp_path), state(6))
    saver.close()


def test_the_last_save_is_waited_for(tmp_path):
    saver = Saver(tmp_path, 2, 0)
    large = dataclasses.replace(state(5), student={"w": torch.zeros(1 << 22)})
    saver.save(large)
    saver.close()
    assert same(checkpoint.load_latest(tmp_path), large)


def test_what_is_not_the_disks_fault_comes_up_at_the_next_save(tmp_path):
    saver = Saver(tmp_path, 2, 0)
    saver.save(dataclasses.replace(state(5), train_s=object()))
    with pytest.raises(TypeError):
        saver.save(state(6))
    saver.close()
    assert checkpoint.load_latest(tmp_path) is None


def save_on_a_full_disk(folder: str) -> None:
    saver = Saver(Path(folder), 2, 0)
    large = {"w": torch.zeros(10_000)}
    saver.save(state(5))
    assert saver.failure() is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    for step in (10, 15):
        saver.save(dataclasses.replace(state(step), student=large))
        assert "File too large" in str(saver.failure())
        assert same(checkpoint.load_latest(Path(folder)), state(5))
        assert names(Path(folder)) == ["latest.json", "step-00000005"]  # nor is it kept full
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saver.save(dataclasses.replace(state(20), student=large))
    assert saver.failure() is None
    saver.close()


def test_a_full_disk_costs_a_warning_and_the_next_save_is_a_new_try(tmp_path, capfd):
    run_apart(save_on_a_full_disk, str(tmp_path))
    assert checkpoint.load_latest(tmp_path).step == 20
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("could not be written") == 1 and "the checkpoint of step 10" in said


# ------------------------------------------------------------ in a run


def work_all(rank: int, world: int, runs: str, runs_: dict[str, tuple]) -> dict[str, str]:
    """The errors of some runs, if any, one run after another: by name, its changes, the seed of
    all that draws random numbers, and the most bytes of a file."""
    errors = {}
    for name, (changes, seed, most) in runs_.items():
        config = config_of(runs, name, changes)
        config.folder.mkdir(parents=True, exist_ok=True)
        for sow in (torch.manual_seed, np.random.seed, random.seed):
            sow(seed + rank)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        told = work(Task(config, assignment_of(config), None, "inline"), torch.device("cpu"))
        errors[name] = told.get("failed", "")
    return errors


@pytest.fixture(scope="module")
def ran(tmp_path_factory, corpus_folder) -> tuple[Path, list[dict[str, str]]]:
    """Where some runs lie, and their errors on each of two workers. A student is some 40 kB."""
    folder = tmp_path_factory.mktemp("ran")
    changes = workers.models(folder / "models", corpus_folder) | {
        "corpus.evaluation": "",
        "student.projector_width": 600,
        "student.workers": 2,
        "train.lr": 0.01,
        "train.checkpoint_steps": 1,
    }
    full, unlimited = changes | {"student.trainable": "full"}, resource.RLIM_INFINITY
    runs = {
        "prompts-1": (changes, 1, unlimited),
        "prompts-2": (changes, 2, unlimited),
        "full-1": (full, 1, unlimited),
        "full-2": (full, 2, unlimited),
        "disk full": (changes, 1, 16_000),
    }
    return folder, run_distributed(work_all, 2, str(folder), runs)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["prompts", "full"])
def test_training_draws_no_random_numbers(ran, trainable):
    """So no state of a generator is to be stored: others lead to the same weights, bit by bit."""
    folder, errors = ran
    ends = []
    for name in (f"{trainable}-1", f"{trainable}-2"):
        assert [told[name] for told in errors] == ["", ""]
        ends.append(folder / name / "checkpoints" / "step-00000009")
    for file in ("student.safetensors", "optimizer.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes()
    stored = load_file(ends[0] / "student.safetensors")
    assert {"projector.norm.running_mean", "projector.norm.running_var"} < stored.keys()
    assert any(name.startswith("tower.") for name in stored) == (trainable == "full")


def test_a_run_whose_last_checkpoint_cannot_be_written_fails_on_all_workers(ran):
    folder, errors = ran
    one, other = (told["disk full"] for told in errors)
    assert one == other and "the last checkpoint could not be written to" in one
    assert "File too large" in one
    assert len(workers.records(folder / "disk full")) == 9, "it went on to its end"
    assert checkpoint.load_latest(folder / "disk full" / "checkpoints") is None


def test_files_are_flushed_before_they_are_named(tmp_path, monkeypatch):
    """A file's bytes before its name in the folder, the folder before the pointer to it."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def told_fsync(descriptor: int) -> None:
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}").rsplit("/", 1)[1]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told_fsync)
    for name, real in (("rename", rename), ("replace", replace)):

        def told(a, b, real=real, **options) -> None:
            done.append(("name", Path(b).name))
            real(a, b, **options)

        monkeypatch.setattr(os, name, told)
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, state(5))
    expected = [("flush", tmp_path.name)]
    expected += [("flush", name) for name in (ALL[2], *ALL[:2], ALL[3])]
    expected += [("flush", "step-00000005.tmp"), ("name", "step-00000005")]
    expected += [("flush", "checkpoints"), ("flush", "latest.json.tmp")]
    expected += [("name", "latest.json"), ("flush", "checkpoints")]
    assert done == expected


def test_a_small_file_is_replaced_whole(tmp_path):
    file = tmp_path / "x.json"
    for data in (b"one", b"another"):
        durable.replace(file, data)
        assert file.read_bytes() == data and names(tmp_path) == ["x.json"]
