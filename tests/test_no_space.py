"""No space for what a driver writes: the error names the file, and nothing is left half made."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine import durable, lease, run_folder
from engine.config import RunConfig, UserError
from engine.tensor_files import write_tensors


@contextmanager
def room(most_bytes: int) -> Iterator[None]:
    """No file of this process may become longer: writing on fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_is_replaced_stays_and_is_named(tmp_path):
    durable.replace(tmp_path / "a", b"old")
    with room(10), pytest.raises(OSError, match="File too large") as error:
        durable.replace(tmp_path / "a", bytes(100))
    assert error.value.filename == str(tmp_path / "a.tmp")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_tensors_that_do_not_fit_are_an_error_of_the_system(tmp_path):
    """And not one of safetensors' own, which nobody would expect."""
    with room(100), pytest.raises(OSError, match="File too large") as error:
        write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(99)}, {})
    assert error.value.filename and names(tmp_path) == []


def test_no_part_of_a_run_folder_is_left(tmp_path):
    config = RunConfig(name="a", runs_dir=str(tmp_path / "runs"))
    with room(100), pytest.raises(UserError, match=r"runs_dir: .*a cannot be made: File too large"):
        run_folder.create(config)
    assert names(tmp_path / "runs") == []
    assert run_folder.create(config).is_dir()  # once there is room


def test_no_lease_is_left_that_names_nobody(tmp_path):
    with room(10), pytest.raises(OSError, match="No space left") as error:
        lease.take(tmp_path)
    assert error.value.filename == str(tmp_path / "lease.json") and names(tmp_path) == []
    lease.take(tmp_path).close()
