"""The weights in a TorchScript archive, as OpenAI publishes CLIP, without running its program.

torch.jit.load() would run code that the archive brings. This reads its attributes alone, by an
unpickler that knows nothing but tensors and empty objects: what torch.load(weights_only=True) does
for files of its own kind.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2
from torch.storage import TypedStorage

__all__ = ["is_archive", "read_archive"]

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_CONSTANTS = ("input_resolution", "context_length", "vocab_size")


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """The weights by their names, fp32. Raises ValueError for a file that holds anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            attributes = _Attributes(archive).load()
    except (KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"is no archive of weights: {error}") from None
    state = dict(_tensors(attributes, ""))
    return {key: value.float() for key, value in state.items() if key not in _CONSTANTS}


class _Object:
    """A module of the archive's program: nothing but its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Attributes(pickle.Unpickler):
    """Makes _Objects, tensors and plain values; refuses all else."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        ends = "/data.pkl"
        names = (name for name in archive.namelist() if name.endswith(ends))
        self._root = next(names, ends).removesuffix(ends)
        self._archive = archive
        super().__init__(io.BytesIO(self._read(f"{self._root}{ends}")))

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Object
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, told: Any) -> TypedStorage:
        _, dtype, key, *_ = told
        data = bytearray(self._read(f"{self._root}/data/{key}"))
        storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _read(self, name: str) -> bytes:
        """torch packs no weights, and what is packed may unpack without end."""
        if self._archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{name} is packed")
        return self._archive.read(name)


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Object):
            yield from _tensors(value, f"{prefix}{name}.")
