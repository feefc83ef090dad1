"""JSON that others have written."""

import json
from typing import Any

__all__ = ["MOST_BYTES", "parse_json", "parse_object"]

MOST_BYTES = 64 << 20  # a million class names


def parse_json(text: str | bytes) -> Any:
    """What a text holds. Raises ValueError for what is no JSON, too long, or nested so deep that
    Python's own parser would give up with an error that nobody expects."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"JSON of more than {MOST_BYTES:,} bytes")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The fields of the object that a text holds. Raises ValueError as parse_json() does, and for
    anything that is no object."""
    told = parse_json(text)
    if not isinstance(told, dict):
        raise ValueError("it holds no object")
    return told
