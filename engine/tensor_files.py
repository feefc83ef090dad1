"""Tensors on disk: safetensors files, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes tensors and their description atomically, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    partial.touch()
    mode = partial.stat().st_mode  # as the umask has it; safetensors would let nobody else read
    partial.unlink()
    save_file(stored, partial, dict(about) or None)
    partial.chmod(mode)
    partial.replace(path)
