"""What labels depend on, besides block and view: two labellings that agree in it give the same."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

from engine.json_text import parse_object

__all__ = ["Labelling"]


@dataclass(frozen=True)
class Labelling:
    """How the images of one corpus are labelled. Columns have an entry for each teacher."""

    teachers: tuple[str, ...]  # fingerprints of CLIPs with their prompts
    precisions: tuple[str, ...]
    class_vectors: tuple[str, ...]  # fingerprints
    weights: tuple[float, ...]
    fusion: str
    form: str
    wire: str
    pixels: tuple[int, ...]
    seed: int  # of the views
    crop_scale: float
    rules: int  # of views and decoding, which a change of the code may change
    decoder: str  # of JPEGs: they differ by a level of a byte here and there
    corpus: str  # fingerprint
    block_samples: int
    class_names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """16 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Labelling":
        """Raises ValueError for anything but what to_json() gave."""
        told = parse_object(text)
        if told.keys() != {field.name for field in fields(cls)}:
            raise ValueError("describes no labelling")
        columns: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in told.items()
        }
        return cls(**columns)

    def differences(self, other: "Labelling") -> list[str]:
        """One line for each thing in which `other` differs from this one."""
        lines = []
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here == there:
                continue
            if field.name == "class_names":
                lines.append(_of_names(here, there))
            else:
                lines.append(f"{field.name}: {_shown(here)} here, {_shown(there)} there")
        return lines


def _of_names(here: tuple[str, ...], there: tuple[str, ...]) -> str:
    pairs = enumerate(zip_longest(here, there), start=1)
    line, (ours, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return (
        f"class_names: {len(here)} here, {len(there)} there; line {line} is {ours or 'missing'} "
        f"here, {theirs or 'missing'} there"
    )


def _shown(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return ", ".join(v[:16] if isinstance(v, str) else f"{v}" for v in values)
