"""JSON that others have written."""

import json
from typing import Any

__all__ = ["MOST_BYTES", "parse_json"]

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
