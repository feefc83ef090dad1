"""Checkpoints that are kept a second time, elsewhere, and a run that goes on from there."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import same, state
from distributed import run_distributed
from domains import config_of as domain_config
from domains import write_domain
from lives import life
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from workers import config_of, losses, models

from engine import run_folder
from engine.clip.bundle import Bundle
from engine.config import RunConfig, UserError, to_dict
from engine.storage.folder import Folder, open_folder
from engine.train import checkpoint, rollback
from engine.train.checkpoint import Saver, Unsound
from engine.train.checkpoint_copy import CheckpointCopy, copy_of, prepare, restored
from engine.train.checkpoint_files import steps
from jobs import cli
from jobs.distill import of_seed

ALL = ("student.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def config(runs: Path, where: str, **more: Any) -> RunConfig:
    return config_of(runs, "run", {"train.checkpoint_copy": where, **more})


def begun(runs: Path, where: str) -> RunConfig:
    """A run folder as a run begins with it."""
    told = config(runs, where)
    told.folder.mkdir(parents=True)
    run_folder.write(told.folder / "config.json", to_dict(told) | {"lives": []})
    run_folder.write(told.folder / "identity.json", {"seed": 1})
    (told.folder / "class_vectors.safetensors").write_bytes(b"vectors")
    return told


def held() -> None:
    """It is ours to write."""


def save(told: RunConfig, *saved: int, keep_last: int = 2, keep_every: int = 0) -> None:
    """As a life of the run does."""
    copy = copy_of(told.train.checkpoint_copy, told.folder)
    saver = Saver(told.folder / "checkpoints", keep_last, keep_every, held, copy)
    for step in saved:
        saver.save(state(step))
        assert saver.failure() is None
    saver.close()


def lose(told: RunConfig) -> RunConfig:
    """The run folder; gives the run as it is told of then."""
    shutil.rmtree(told.folder)
    return told


def copied(where: str) -> dict[int, list[str]]:
    """By step, the names of its files."""
    found: dict[int, list[str]] = {}
    for name, _ in open_folder(f"{where}/run", "x").files(""):
        if name.startswith("step-"):
            folder, _, file = name.partition("/")
            found.setdefault(int(folder.removeprefix("step-")), []).append(file)
    return found


# ------------------------------------------------------------ a copy, and back


def test_a_lost_run_folder_comes_back_from_any_place(where, tmp_path, capsys):
    told = begun(tmp_path / "runs", where)
    save(told, 5, 10, 15)
    assert {step: sorted(names) for step, names in copied(where).items()} == {
        step: sorted(ALL) for step in (10, 15)
    }
    before = {
        file.relative_to(told.folder): file.read_bytes()
        for file in told.folder.rglob("*")
        if file.is_file()
    }
    folder = open_folder(f"{where}/run", "x")
    assert json.loads(folder.read("latest.json")) == {"step": 15}
    assert capsys.readouterr().err == ""

    lose(told)
    prepare(told, resume=True)
    assert same(restored(told), state(15))
    after = {
        file.relative_to(told.folder): file.read_bytes()
        for file in told.folder.rglob("*")
        if file.is_file()
    }
    assert after == before
    assert same(checkpoint.load(told.folder / "checkpoints", 10), state(10))
    said = " ".join(capsys.readouterr().err.split())
    assert f"made again from {where}/run" in said
    assert f"fetched from {where}/run: the checkpoints of steps 10, 15" in said

    save(told, 20)
    assert sorted(copied(where)) == [15, 20]


def test_a_folder_that_has_lost_its_checkpoints_alone_gets_them_back(tmp_path):
    told = begun(tmp_path / "runs", str(tmp_path / "copy"))
    save(told, 5, 10)
    shutil.rmtree(told.folder / "checkpoints")
    (told.folder / "checkpoints" / "step-00000015.tmp").mkdir(parents=True)  # of a dead process
    prepare(told, resume=True)
    assert same(restored(told), state(10)) and steps(told.folder / "checkpoints") == [5, 10]


def test_the_copy_keeps_what_the_run_folder_keeps(tmp_path):
    where = str(tmp_path / "copy")
    told = begun(tmp_path / "runs", where)
    save(told, *range(100, 1300, 100), keep_last=3, keep_every=250)
    assert sorted(copied(where)) == [300, 500, 800, 1000, 1100, 1200]
    assert steps(told.folder / "checkpoints") == sorted(copied(where))


def test_what_is_there_before_there_is_a_copy_is_copied_too(tmp_path):
    where = str(tmp_path / "copy")
    told = begun(tmp_path / "runs", where)
    checkpoint.save(told.folder / "checkpoints", state(5))
    save(told, 10)
    assert sorted(copied(where)) == [5, 10]


def test_a_run_without_a_copy_and_one_without_a_checkpoint(tmp_path):
    assert copy_of("", tmp_path) is None and restored(begun(tmp_path / "runs", "")) is None
    told = begun(tmp_path / "more", str(tmp_path / "copy"))
    prepare(told, resume=True)
    assert restored(told) is None


# ------------------------------------------------------------ going back


def rolled_back(told: RunConfig, to: int) -> None:
    """As engine.train.rollback does."""
    for step in steps(told.folder / "checkpoints"):
        if step > to:
            shutil.rmtree(told.folder / "checkpoints" / f"step-{step:08d}")
    (told.folder / "checkpoints" / "latest.json").unlink()
    if to:
        (told.folder / "checkpoints" / "latest.json").write_text(json.dumps({"step": to}))
    (told.folder / "rollbacks.json").write_text(json.dumps([{"why": "x", "to_step": to}]))


def test_a_run_that_went_back_is_found_before_it_or_after_it_and_not_between(tmp_path):
    """The number of roll-backs, which sets the learning rate, is that of the weights."""
    where = str(tmp_path / "copy")
    told = begun(tmp_path / "runs", where)
    save(told, 5, 10, 15, keep_last=3)
    rolled_back(told, 5)
    kept = tmp_path / "kept"
    shutil.copytree(told.folder, kept)
    shutil.rmtree(told.folder / "checkpoints")
    assert same(restored(told), state(15)) and rollback.taken(told.folder) == []
    lose(told)
    kept.rename(told.folder)

    save(told, 7, keep_last=3)
    assert sorted(copied(where)) == [5, 7]
    lose(told)
    prepare(told, resume=True)
    assert same(restored(told), state(7))
    assert [one["to_step"] for one in rollback.taken(told.folder)] == [5]


def test_a_run_that_went_back_to_its_beginning_begins_there(tmp_path):
    told = begun(tmp_path / "runs", str(tmp_path / "copy"))
    save(told, 5)
    rolled_back(told, 0)
    assert restored(told) is None and steps(told.folder / "checkpoints") == []


def test_the_best_pass_comes_back_with_its_checkpoint(tmp_path):
    told = begun(tmp_path / "runs", str(tmp_path / "copy"))
    selected = told.folder / "selected.safetensors"
    for best, step in ((1, 5), (2, 10), (10, 10)):  # the last of them again, after going back
        selected.write_bytes(b"best of %d" % best)
        save(told, step)
    assert [len(names) for names in copied(str(tmp_path / "copy")).values()] == [5, 5]
    lose(told)
    prepare(told, resume=True)
    assert restored(told) and selected.read_bytes() == b"best of 10"
    shutil.rmtree(told.folder / "checkpoints")
    harm = next(iter((tmp_path / "copy" / "run" / "step-00000010").glob("selected*")))
    harm.write_bytes(b"worst of 10")
    assert same(restored(told), state(5)) and selected.read_bytes() == b"best of 1"


# ------------------------------------------------------------ damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [flip, empty, Path.unlink])
@pytest.mark.parametrize("name", ALL)
def test_what_is_damaged_is_named_and_the_one_before_it_taken(tmp_path, capsys, name, harm):
    where = tmp_path / "copy"
    told = begun(tmp_path / "runs", str(where))
    save(told, 5, 10)
    harm(where / "run" / "step-00000010" / name)
    lose(told)
    prepare(told, resume=True)
    capsys.readouterr()
    assert same(restored(told), state(5)) and steps(told.folder / "checkpoints") == [5]
    said = " ".join(capsys.readouterr().err.split())
    assert f"{where}/run/step-00000010" in said and name in said and "checkpoints.new" not in said

    shutil.rmtree(told.folder / "checkpoints")
    flip(where / "run" / "step-00000005" / name)
    with pytest.raises(Unsound, match=r"no checkpoint is sound: .*step-00000005"):
        restored(told)
    assert not list(told.folder.glob("checkpoints*")), "nothing of it is left"
    save(told, 10)  # which mends it
    shutil.rmtree(told.folder / "checkpoints")
    assert same(restored(told), state(10))


@pytest.mark.parametrize("latest", [b"garbage", b'{"step": 15}'])
def test_a_checkpoint_that_got_lost_is_missed(tmp_path, capsys, latest):
    where = tmp_path / "copy"
    told = begun(tmp_path / "runs", str(where))
    save(told, 5, 10)
    (where / "run" / "latest.json").write_bytes(latest)
    lose(told)
    prepare(told, resume=True)
    assert same(restored(told), state(10))
    said = " ".join(capsys.readouterr().err.split())
    assert f"{where}/run/latest.json is damaged" in said or "step-00000015, which" in said
    shutil.rmtree(told.folder / "checkpoints")
    for step in (5, 10):
        shutil.rmtree(where / "run" / f"step-{step:08d}")
    with pytest.raises(Unsound):
        restored(told)


def test_a_first_copy_that_was_broken_off_is_none(tmp_path, capsys):
    where = tmp_path / "copy"
    told = begun(tmp_path / "runs", str(where))
    save(told, 5)
    for name in ("latest.json", "step-00000005/manifest.json"):
        (where / "run" / name).unlink()
    lose(told)
    prepare(told, resume=True)
    assert restored(told) is None
    said = " ".join(capsys.readouterr().err.split())
    assert f"{where}/run/step-00000005 is incomplete: it has no manifest.json" in said


# ------------------------------------------------------------ faults


class Faulty:
    """A folder whose call number `fatal` fails, and if it is `down` all after it."""

    def __init__(self, folder: Folder, fatal: int, down: bool) -> None:
        self.folder, self.fatal, self.down, self.calls = folder, fatal, down, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fatal or (self.down and self.calls > self.fatal):
                raise OSError("the network is down")
            return getattr(self.folder, name)(*args, **options)

        return call


@pytest.mark.parametrize("down", [False, True])
def test_wherever_a_copy_fails_a_checkpoint_comes_back_and_the_next_one_is_a_new_try(
    tmp_path, capsys, monkeypatch, down
):
    """Two saves over two; then the machine is lost, or the next save comes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is not what fails
    found, points = set(), 0
    for fatal in count(1):
        where = tmp_path / f"{fatal}"
        told = begun(where / "runs", str(where / "copy"))
        save(told, 5, 10)
        copy = CheckpointCopy(told.train.checkpoint_copy, told.folder)
        faulty = copy._folder = Faulty(copy._folder, fatal, down)
        saver = Saver(told.folder / "checkpoints", 1, 0, held, copy)
        capsys.readouterr()
        for step in (15, 20):
            saver.save(state(step))
            assert saver.failure() is None, "training goes on"
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("could not be copied") == (faulty.calls >= fatal)
        lost = where / "lost"
        told.folder.rename(lost)
        prepare(told, resume=True)
        start = restored(told)
        assert start and same(start, state(start.step)), fatal
        told_of = " ".join(capsys.readouterr().err.split())
        assert told_of.count("warning") == told_of.count("has no manifest.json"), told_of
        found.add(start.step)
        lose(told)
        lost.rename(told.folder)

        capsys.readouterr()
        faulty.fatal = faulty.calls + 1_000_000
        saver.save(state(25))
        saver.close()
        assert sorted(copied(told.train.checkpoint_copy)) == [25]
        lose(told)
        prepare(told, resume=True)
        capsys.readouterr()
        assert same(restored(told), state(25)) and steps(told.folder / "checkpoints") == [25]
        assert "warning" not in capsys.readouterr().err
        if not said:  # it has not come so far
            break
        points += 1
    assert points > 20 and found == ({10, 15, 20} if down else {20, 15})


def test_a_copy_that_is_down_costs_one_warning_until_it_is_up(bucket, tmp_path, capsys):
    told = begun(tmp_path / "runs", "s3://labels/copies")
    copy = copy_of(told.train.checkpoint_copy, told.folder)
    saver = Saver(told.folder / "checkpoints", 2, 0, held, copy)
    for step, down in ((5, True), (10, True), (15, False), (20, True)):
        bucket.down = down
        saver.save(state(step))
        assert saver.failure() is None
    saver.close()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("could not be copied to s3://labels/copies/run") == 2
    assert "the checkpoint of step 5 could" in said and "the checkpoint of step 20 could" in said
    with pytest.raises(UserError, match="s3://labels/copies/run cannot be read"):
        prepare(lose(told), resume=True)
    bucket.down = False
    prepare(told, resume=True)
    assert same(restored(told), state(15))


def test_nothing_is_copied_by_who_may_not_write(tmp_path, capsys):
    """Asked before it begins, and before the manifest."""
    where = str(tmp_path / "copy")
    told = begun(tmp_path / "runs", where)
    checkpoint.save(told.folder / "checkpoints", state(5))
    asked: list[int] = []

    def require_held() -> None:
        asked.append(len(copied(where).get(5, [])))
        if len(asked) in (1, 3):
            raise OSError("taken over")

    copy = CheckpointCopy(where, told.folder)
    copy.put(5, require_held)
    assert copied(where) == {} and open_folder(where, "x").entries("") == []
    copy.put(5, require_held)
    assert asked == [0, 0, 3] and sorted(copied(where)[5]) == sorted({*ALL} - {"manifest.json"})
    assert capsys.readouterr().err.count("taken over") == 1


# ------------------------------------------------------------ before a run


def test_a_wrong_place_is_found_before_the_run(tmp_path, capsys):
    with pytest.raises(UserError, match=r"train\.checkpoint_copy: .*not a folder, or an s3 or gs"):
        prepare(config(tmp_path, "ftp://there"), resume=False)
    with pytest.raises(UserError, match="is the run folder itself"):
        prepare(config(tmp_path, str(tmp_path)), resume=False)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(config(tmp_path, "ftp://there"))))
    for words in ([], ["--resume"]):
        assert cli.main(["distill", str(file), *words]) == 2
        assert "train.checkpoint_copy: 'ftp://there/run' is not" in capsys.readouterr().err


def test_a_new_run_meets_no_other_in_its_copy(where, tmp_path):
    save(begun(tmp_path / "one", where), 5)
    new = config(tmp_path / "two", where)
    with pytest.raises(UserError, match="holds a run already"):
        prepare(new, resume=False)
    prepare(dataclasses.replace(new, overwrite=True), resume=False)
    copy_of(where, new.folder).clear()
    prepare(new, resume=False)
    assert [*open_folder(f"{where}/run", "x").files("")] == []


def test_what_is_no_run_is_not_gone_on_with(tmp_path):
    (tmp_path / "copy" / "run" / "else").mkdir(parents=True)
    told = config(tmp_path / "runs", str(tmp_path / "copy"))
    with pytest.raises(UserError, match="holds no run that can be gone on with"):
        prepare(told, resume=True)
    assert not told.folder.exists()


def test_runs_of_several_seeds_are_copied_beside_each_other(tmp_path):
    one = of_seed(config(tmp_path, "s3://bucket/copies/"), 3)
    assert one.train.checkpoint_copy == "s3://bucket/copies/run" and one.name == "seed-3"
    assert of_seed(config(tmp_path, ""), 3).train.checkpoint_copy == ""


# ------------------------------------------------------------ in a run


def go_on(rank: int, world: int, runs: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Another life, which begins as its driver has it."""
    told = config_of(runs, "run", changes)
    if rank == 0:
        prepare(told, resume=True)
        restored(told)
    return life(rank, world, runs, changes)


@pytest.mark.slow
def test_a_run_whose_folder_is_lost_goes_on_from_the_copy_bit_by_bit(
    corpus_folder, bucket, tmp_path
):
    """Through an object store, and on what its workers have written there."""
    changes = models(tmp_path / "models", corpus_folder) | {
        "corpus.evaluation": "",
        "train.checkpoint_steps": 2,
    }
    run_distributed(life, 1, str(tmp_path / "calm"), changes)
    changes["train.checkpoint_copy"] = "s3://labels/copies"
    told = config_of(tmp_path / "upset", "run", changes)
    told.folder.mkdir(parents=True)
    run_folder.write(told.folder / "config.json", to_dict(told))
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run_distributed(life, 1, str(tmp_path / "upset"), changes, "kill", 7)
    held_there = sorted(copied("s3://labels/copies"))
    assert held_there and held_there[-1] in (4, 6), "that of step 6 may have been cut off"
    lose(told)
    run_distributed(go_on, 1, str(tmp_path / "upset"), changes)
    assert losses(told.folder) == losses(tmp_path / "calm" / "run")[held_there[-1] :]
    ends = [
        Bundle.load(tmp_path / name / "run" / "bundle.safetensors").learned
        for name in ("calm", "upset")
    ]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert sorted(copied("s3://labels/copies"))[-1] == 9


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_goes_on_from_the_copy(local_ray, tmp_path, capsys):
    domain, where = write_domain(tmp_path / "domain"), tmp_path / "copy"
    told = domain_config(domain, tmp_path, "run", "--train.checkpoint_copy", str(where))
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(told)))
    assert cli.main(["distill", str(file)]) == 0
    first = Bundle.load(told.folder / "bundle.safetensors").learned
    vectors = (told.folder / "class_vectors.safetensors").read_bytes()
    shutil.rmtree(where / "run" / "step-00000012")  # as if the machine had been lost before
    (where / "run" / "latest.json").write_text('{"step": 10}')
    lose(told)
    capsys.readouterr()
    assert cli.main(["distill", str(file)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main(["distill", str(file), "--resume"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{told.folder} is not there: made again from {where}/run" in said
    assert "from step 10; life 2 of the run" in said
    for name, tensor in Bundle.load(told.folder / "bundle.safetensors").learned.items():
        torch.testing.assert_close(tensor, first[name])
    assert (told.folder / "class_vectors.safetensors").read_bytes() == vectors
    assert sorted(copied(str(where))) == [10, 12]
    assert len(json.loads((where / "run" / "config.json").read_text())["lives"]) == 2
