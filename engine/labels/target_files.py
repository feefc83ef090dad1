"""Soft targets as files: names, and bytes that tell whether they are whole and right.

A file is 16 bytes, the xxh3 digest of all others, and a safetensors payload. It holds a whole
block, or some samples of one, whose offsets it then has too.
"""

from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from engine.data.views import TEST_VIEW
from engine.json_text import parse_json
from engine.labels.targets import BlockView, Form, SoftTargets, finite

__all__ = [
    "HEAD_BYTES",
    "Damaged",
    "Name",
    "decode",
    "encode",
    "folder_of",
    "samples_in",
]

_DIGEST_BYTES = 16
_SUFFIX = ".targets"
HEAD_BYTES = 4096  # more than digest and header of a file take


class Damaged(Exception):
    """A file is not what was written, or not what its name says."""


class Name(NamedTuple):
    """What the name of a file says."""

    view: int
    block: int
    samples: int | None = None  # of a part; None: a whole block
    offsets: str = ""  # their hash

    @classmethod
    def of(cls, view: int, block: int, offsets: np.ndarray | None = None) -> "Name":
        if offsets is None:
            return cls(view, block)
        told = xxhash.xxh32_hexdigest(offsets.astype("<u2").tobytes())
        return cls(view, block, len(offsets), told)

    @classmethod
    def parse(cls, text: str) -> "Name | None":
        """Of a path that may begin with other folders; None for a file that is none of ours."""
        *_, view, _, file = ["", "", *text.split("/")]
        words = file.removesuffix(_SUFFIX).split(".")
        try:
            number = TEST_VIEW if view == "view-test" else int(view.removeprefix("view-"))
            if len(words) == 1:
                name = cls(number, int(words[0]))
            else:
                samples, _, offsets = words[1].partition("-")
                name = cls(number, int(words[0]), int(samples), offsets)
        except ValueError:
            return None
        return name if text.endswith(str(name)) else None

    def __str__(self) -> str:
        part = "" if self.samples is None else f".{self.samples:05d}-{self.offsets}"
        return f"{folder_of(self.view, self.block)}/{self.block:09d}{part}{_SUFFIX}"


def folder_of(view: int, block: int | None = None) -> str:
    """Of the files of a view, or of those around one of its blocks."""
    told = "view-test" if view == TEST_VIEW else f"view-{view:05d}"
    return told if block is None else f"{told}/{block // 1000:06d}"


def encode(wanted: BlockView, targets: SoftTargets, offsets: np.ndarray | None = None) -> bytes:
    """The bytes of a whole block, or of its samples at `offsets`."""
    tensors = {"values": targets.values, "valid": targets.valid}
    if targets.steps is not None:
        tensors["steps"] = targets.steps
    if offsets is not None:
        tensors["offsets"] = offsets.astype(np.uint16)  # a block has at most 2^16 samples
    about = {
        "form": targets.form,
        "fingerprint": targets.fingerprint,
        "block": str(wanted.block),
        "view": str(wanted.view),
        "lost_kl": repr(targets.lost_kl),
    }
    payload = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, about)
    return xxhash.xxh3_128_digest(payload) + payload


def decode(data: bytes, name: Name, fingerprint: str) -> tuple[SoftTargets, np.ndarray | None]:
    """Soft targets, and the offsets of a part int64 [n]. Raises Damaged."""
    payload = data[_DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(payload) != data[:_DIGEST_BYTES]:
        raise Damaged("does not have its digest: it is damaged or not whole")
    try:
        tensors, about = load(payload), _header(data)["__metadata__"]
        form: Form = about["form"]
        found = about["fingerprint"], int(about["view"]), int(about["block"])
        targets = SoftTargets(
            form,
            tensors.pop("values"),
            tensors.pop("steps", None),
            tensors.pop("valid"),
            about["fingerprint"],
            float(about["lost_kl"]),
        )
        offsets = tensors.pop("offsets", None)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Damaged(f"holds no soft targets: {type(error).__name__}: {error}") from None
    if found != (fingerprint, name.view, name.block):
        raise Damaged("holds labels of (labelling, view, block) {}, {}, {}".format(*found))
    if form not in ("features", "logits") or tensors:
        raise Damaged(f"holds {form}, {', '.join(tensors)}")
    _require_shapes(targets, offsets, name)
    if not finite(targets):
        raise Damaged("holds values that are not finite")
    return targets, None if offsets is None else offsets.astype(np.int64)


def samples_in(head: bytes) -> int:
    """Samples of a file whose first HEAD_BYTES these are; its digest is not checked. Raises
    Damaged."""
    try:
        return int(_header(head)["valid"]["shape"][0])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Damaged(f"has no header: {type(error).__name__}: {error}") from None


def _header(data: bytes) -> dict[str, Any]:
    start = _DIGEST_BYTES + 8  # safetensors: bytes of the header as uint64, the header as JSON
    size = int.from_bytes(data[_DIGEST_BYTES:start], "little")
    return parse_json(data[start : start + size])


def _require_shapes(targets: SoftTargets, offsets: np.ndarray | None, name: Name) -> None:
    values, steps, valid = targets.values, targets.steps, targets.valid
    n = valid.size
    right = valid.dtype == bool and valid.shape == (n,) and values.ndim == 2 and len(values) == n
    if steps is None:
        right &= values.dtype == np.float16
    else:
        right &= values.dtype == np.int8 and steps.dtype == np.float32 and steps.shape == (n,)
    if (offsets is None) != (name.samples is None):
        right = False
    elif offsets is not None:
        right &= offsets.dtype == np.uint16 and offsets.shape == (n,)
        right &= Name.of(name.view, name.block, offsets) == name
    if not right:
        raise Damaged("does not have the shapes and types of soft targets, or of its name")
