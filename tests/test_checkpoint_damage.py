"""Checkpoints that are damaged, or are not ours: named, refused, and done without."""

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import same, state

from engine.config import UserError
from engine.train import checkpoint
from engine.train.checkpoint import Unsound

ALL = ("student.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b"\0")


def swap(file: Path) -> None:
    """By the one of the other checkpoint, which is sound in itself."""
    shutil.copyfile(file.parent.with_name("step-00000005") / file.name, file)


@pytest.mark.parametrize("harm", [flip, truncate, empty, lengthen, swap, os.unlink])
@pytest.mark.parametrize("name", ALL)
def test_whatever_is_damaged_is_named_and_the_one_before_it_loaded(tmp_path, capsys, name, harm):
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    harm(tmp_path / "step-00000006" / name)
    assert same(checkpoint.load_latest(tmp_path), state(5))
    said = capsys.readouterr().err
    if (name, harm) == ("manifest.json", swap):  # whole, but of another step
        assert "of another step" in said
    assert f"step-00000006/{name} is damaged: " in said
    assert f"the newest sound checkpoint in {tmp_path} is that of step 5" in said
    checkpoint.save(tmp_path, state(6))
    capsys.readouterr()
    assert same(checkpoint.load_latest(tmp_path), state(6)) and capsys.readouterr().err == ""


@pytest.mark.parametrize("harm", [flip, truncate, os.unlink])
@pytest.mark.parametrize("name", ALL)
def test_no_run_begins_anew_in_silence(tmp_path, name, harm):
    harm(checkpoint.save(tmp_path, state(6)) / name)
    with pytest.raises(Unsound, match=rf"no checkpoint is sound: .*step-00000006/{name} is dam"):
        checkpoint.load_latest(tmp_path)


def test_every_bit_counts(tmp_path):
    """Of the small files, whose meaning we check ourselves."""
    folder = tmp_path / "x"
    written = checkpoint.save(folder, state(6))
    for name in ("manifest.json", "state.json"):
        whole = (written / name).read_bytes()
        for place in range(0, len(whole), 3):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            (written / name).write_bytes(changed)
            with pytest.raises(Unsound, match=rf"{name} is damaged"):
                checkpoint.load_latest(folder)
        (written / name).write_bytes(whole)
    assert same(checkpoint.load_latest(folder), state(6))


POINTERS = {
    "missing": None,
    "empty": b"",
    "garbage": b"\xff\x00garbage",
    "another step": b'{"step": 9}',
    "no step": b'{"step": "../../etc"}',
    "negative": b'{"step": -1}',
    "no object": b"[6]",
    "deep": b"[" * 100_000,
    "long": b" " * (1 << 20) + b'{"step": 6}',
}


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_pointer_that_is_wrong_is_told_of_and_done_without(tmp_path, capsys, pointer):
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    latest, data = tmp_path / "latest.json", POINTERS[pointer]
    latest.unlink() if data is None else latest.write_bytes(data)
    assert same(checkpoint.load_latest(tmp_path), state(6))
    assert "latest.json" in capsys.readouterr().err
    checkpoint.save(tmp_path, state(7))
    assert same(checkpoint.load_latest(tmp_path), state(7))
    assert capsys.readouterr().err == ""


def test_a_folder_that_got_lost_is_missed(tmp_path, capsys):
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    shutil.rmtree(tmp_path / "step-00000006")
    assert same(checkpoint.load_latest(tmp_path), state(5))
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000006, which latest.json names, is missing" in said
    shutil.rmtree(tmp_path / "step-00000005")
    with pytest.raises(Unsound, match=r"step-00000006, which latest\.json names, is missing"):
        checkpoint.load_latest(tmp_path)
    (tmp_path / "latest.json").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"latest\.json is damaged"):
        checkpoint.load_latest(tmp_path)


def test_nothing_damaged_is_gone_back_to(tmp_path, capsys):
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    flip(tmp_path / "step-00000006" / "student.safetensors")
    assert checkpoint.roll_back(tmp_path) == 5
    assert "step-00000006/student.safetensors is damaged" in capsys.readouterr().err
    assert same(checkpoint.load_latest(tmp_path), state(5))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------ malice


class Canary:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def signed(manifest: dict) -> bytes:
    """With the digest that we would give it: who can write the folder can compute it."""
    manifest.pop("self", None)
    told = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"self": told}).encode()


def vouched(path: Path, name: str, data: bytes) -> None:
    """Puts a file in a checkpoint, with a manifest that vouches for it."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][name] = about
    (path / "manifest.json").write_bytes(signed(manifest))


def pickle_beside(path: Path) -> None:
    torch.save(Canary(path.parent / "canary"), path / "optimizer.pt")


def pickle_vouched_for(path: Path) -> None:
    torch.save(Canary(path.parent / "canary"), path / "optimizer.pt")
    vouched(path, "optimizer.pt", (path / "optimizer.pt").read_bytes())


def pickle_in_place(path: Path) -> None:
    torch.save(Canary(path.parent / "canary"), path.parent / "x.pt")
    vouched(path, "student.safetensors", (path.parent / "x.pt").read_bytes())
    (path.parent / "x.pt").unlink()


def changed_manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_bytes(signed(manifest))

    return harm


def traversal(manifest: dict) -> None:
    files = manifest["files"]
    files["../../../etc/passwd"] = files.pop("student.safetensors")


def huge(manifest: dict) -> None:
    manifest["files"]["student.safetensors"]["bytes"] = 1 << 60


def huge_file(path: Path) -> None:
    os.truncate(path / "student.safetensors", 1 << 40)  # sparse


def huge_header(path: Path) -> None:
    vouched(path, "student.safetensors", (1 << 62).to_bytes(8, "little") + b"{}")


def huge_tensor(path: Path) -> None:
    about = {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}
    header = json.dumps(about).encode()
    vouched(path, "student.safetensors", len(header).to_bytes(8, "little") + header)


def huge_state(path: Path) -> None:
    state = (path / "state.json").read_bytes()
    vouched(path, "state.json", b" " * (1 << 20) + state)


def strange_state(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    state["ledger"]["__class__"] = "os.system"
    vouched(path, "state.json", json.dumps(state).encode())


def other_step(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    vouched(path, "state.json", json.dumps(state | {"step": 900}).encode())


def link(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    (path / "student.safetensors").rename(elsewhere)
    (path / "student.safetensors").symlink_to(elsewhere)


def pipe(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def linked_folder(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


HOSTILE = {
    "a pickle beside": (pickle_beside, "optimizer.pt is damaged: it is no file of a checkpoint"),
    "a pickle vouched for": (pickle_vouched_for, "names other files"),
    "a pickle in place": (pickle_in_place, "it is no checkpoint: SafetensorError"),
    "path traversal": (changed_manifest(traversal), "names other files"),
    "a huge size": (changed_manifest(huge), f"bytes, not {1 << 60}"),
    "a huge file": (huge_file, f"it has {1 << 40} bytes"),
    "a huge header": (huge_header, "it is no checkpoint: SafetensorError"),
    "a huge tensor": (huge_tensor, "it is no checkpoint: SafetensorError"),
    "a huge state": (huge_state, "state.json is damaged: it has more than"),
    "a strange state": (strange_state, "it is no checkpoint: TypeError"),
    "another step": (other_step, "it is of step 900"),
    "a link": (link, "student.safetensors is damaged"),
    "a pipe": (pipe, "state.json is damaged: it is no plain file"),
    "a linked folder": (linked_folder, "step-00000006 is damaged: it is no folder"),
    "no files": (changed_manifest(lambda told: told.update(files=None)), "names other files"),
    "no hash": (
        changed_manifest(lambda told: told["files"]["state.json"].pop("sha256")),
        "does not tell",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_ours_is_refused(tmp_path, capsys, name):
    harm, why = HOSTILE[name]
    for step in (5, 6):
        checkpoint.save(tmp_path, state(step))
    harm(tmp_path / "step-00000006")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert same(checkpoint.load_latest(tmp_path), state(5))
    assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "canary").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
