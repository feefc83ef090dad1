import dataclasses
import shutil

import pytest
import torch

from engine.train import checkpoint
from engine.train.checkpoint import Checkpoint
from engine.train.health import Health
from engine.train.ledger import Ledger


def state(step: int) -> Checkpoint:
    torch.manual_seed(step)
    return Checkpoint(
        step=step,
        train_s=1.5 * step,
        ledger=Ledger(10 * step, {"format": 1}),
        health=Health(agreement=0.5, best=0.5, judgements=step),
        student={"prompts": torch.randn(2, 3), "norm.count": torch.tensor(step)},
        optimizer={"prompts/exp_avg": torch.randn(2, 3), "prompts/step": torch.tensor(1.0 * step)},
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    for field in dataclasses.fields(Checkpoint):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict):
            if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
                return False
        elif a != b:
            return False
    return True


def test_round_trip(tmp_path):
    folder = tmp_path / "new" / "checkpoints"
    assert checkpoint.load_latest(folder) is None
    written = checkpoint.save(folder, state(7))
    assert written.name == "step-00000007"
    assert same(checkpoint.load_latest(folder), state(7))
    assert not same(state(7), state(8))


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 9, 10, 100):
        checkpoint.save(tmp_path, state(step))
        assert same(checkpoint.load_latest(tmp_path), state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_the_newest_good_one_is_kept_and_gone_back_to(tmp_path):
    bad = Health(agreement=0.2, best=0.9, bad=1)
    checkpoint.save(tmp_path, state(5))
    for step in (6, 7, 8):
        checkpoint.save(tmp_path, dataclasses.replace(state(step), health=bad))
    names = ["step-00000005", "step-00000007", "step-00000008"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert same(checkpoint.load_latest(tmp_path), dataclasses.replace(state(8), health=bad))
    assert checkpoint.roll_back(tmp_path) == 5
    assert same(checkpoint.load_latest(tmp_path), state(5))
    assert checkpoint.roll_back(tmp_path, unless=5) == 0
    assert checkpoint.load_latest(tmp_path) is None


def test_a_step_that_comes_again_replaces_itself(tmp_path):
    checkpoint.save(tmp_path, state(5))
    later = dataclasses.replace(state(5), train_s=99.0)
    checkpoint.save(tmp_path, later)
    assert same(checkpoint.load_latest(tmp_path), later)


def test_what_was_cut_off_while_it_was_removed_does_not_count(tmp_path):
    checkpoint.save(tmp_path, state(5))
    doomed = checkpoint.save(tmp_path, state(6))
    doomed = doomed.rename(f"{doomed}.old")
    (doomed / "state.json").unlink()
    assert same(checkpoint.load_latest(tmp_path), state(5))
    checkpoint.save(tmp_path, state(6))
    assert same(checkpoint.load_latest(tmp_path), state(6))


def test_an_optimizer_may_have_no_state(tmp_path):
    bare = dataclasses.replace(state(1), optimizer={})
    checkpoint.save(tmp_path, bare)
    assert same(checkpoint.load_latest(tmp_path), bare)


def test_what_a_dying_process_left_is_ignored_and_overwritten(tmp_path):
    checkpoint.save(tmp_path, state(5))
    half = tmp_path / "step-00000006.tmp"
    shutil.copytree(tmp_path / "step-00000005", half)
    (half / "student.safetensors").write_bytes(b"half")
    assert same(checkpoint.load_latest(tmp_path), state(5))
    checkpoint.save(tmp_path, state(6))
    assert same(checkpoint.load_latest(tmp_path), state(6))
    assert not half.exists()


def test_left_overs_do_not_count_among_those_kept(tmp_path):
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    (tmp_path / "step-00000009.tmp").mkdir()
    checkpoint.save(tmp_path, state(7))
    kept = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tmp")
    assert kept == ["step-00000006", "step-00000007"]


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    checkpoint.save(tmp_path, state(5))
    file = checkpoint.save(tmp_path, state(6)) / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"step-00000006/{name} is damaged"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_cursor_is_refused_by_name(tmp_path, damage):
    file = checkpoint.save(tmp_path, state(6)) / "state.json"
    text = file.read_text()
    file.write_text(text[:40] if damage == "cut" else text.replace('"step": 6', '"step": 8'))
    with pytest.raises(ValueError, match=r"step-00000006"):
        checkpoint.load_latest(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    (checkpoint.save(tmp_path, state(6)) / "optimizer.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"step-00000006/optimizer"):
        checkpoint.load_latest(tmp_path)
