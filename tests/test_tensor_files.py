import os

import pytest
import torch
from safetensors import safe_open

from engine.tensor_files import write_tensors


def test_a_file_is_made_with_its_folder_and_readable_to_whom_the_umask_says(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    before = os.umask(0o027)
    try:
        write_tensors(path, {"w": torch.arange(6.0).view(2, 3).T}, {"about": "a test"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"about": "a test"}
        assert torch.equal(file.get_tensor("w"), torch.arange(6.0).view(2, 3).T)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_was_there_stays_if_writing_fails(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"w": torch.ones(2)}, {})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        write_tensors(path, {"w": torch.ones(2)}, {"about": 3})  # type: ignore[dict-item]
    assert path.read_bytes() == old
