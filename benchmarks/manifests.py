"""Rows of a corpus manifest, of made-up shards that lie afar."""

import hashlib
from typing import Any

__all__ = ["manifest_row"]


def manifest_row(number: int, samples: int) -> dict[str, Any]:
    content = hashlib.sha256(str(number).encode()).hexdigest()
    url = f"https://shards.example.org/train-{number:06d}"
    return {
        "shard": f"{url}.tar",
        "kind": "tar",
        "index": f"{url}.arrow",
        "bytes": 60_000 * samples + number % 9973,
        "tag": f'"{content[:32]}"',
        "column": "",
        "samples": samples,
        "usable": samples - samples // 1000,
        "short": "",
        "largest_label": 999,
        "content": content,
    }
