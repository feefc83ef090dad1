"""Tensors on disk: safetensors files, written whole or not at all, opened once they are sound."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine import durable

__all__ = ["open_tensors", "read_tensors", "write_tensors"]

_MOST_HEADER_BYTES = 32 << 20  # the library itself would parse 100 MB
_MOST_TENSORS = 1 << 16


def open_tensors(path: Path, framework: str) -> Any:
    """safetensors' open file of a `framework` (pt or np), to be used in a `with`.

    Raises SafetensorError for a file whose header is not sound: longer than the file or 32 MiB, no
    JSON, of more than 65,536 tensors, or whose tensors overlap or do not fill the file (safetensors
    checks the last two); and OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise SafetensorError(f"a header of {header_bytes:,} bytes")
    opened = safe_open(path, framework)
    if len(opened.keys()) > _MOST_TENSORS:
        raise SafetensorError(f"more than {_MOST_TENSORS:,} tensors")
    return opened


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name. Raises as open_tensors()."""
    with open_tensors(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes tensors and their description atomically, making the folder if need be. Raises
    OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    durable.replace(path, save(stored, dict(about) or None))
