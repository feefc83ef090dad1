"""CLIPs with random weights, as folders that load_clip() reads.

The text tower is as small as can be: what is measured never runs it.
"""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from safetensors.torch import save_file

__all__ = ["Tower", "write_clip"]


class Tower(NamedTuple):
    """The shape of an image tower, and of the embedding it ends in."""

    layers: int
    width: int
    patch: int
    pixels: int
    embed_dim: int
    quick_gelu: bool = False  # as OpenAI's weights have it


def write_clip(folder: Path, tower: Tower) -> str:
    """Gives its local-dir: name."""
    folder.mkdir()
    model = {
        "embed_dim": tower.embed_dim,
        "quick_gelu": tower.quick_gelu,
        "vision_cfg": {
            "image_size": tower.pixels,
            "layers": tower.layers,
            "width": tower.width,
            "head_width": 64,
            "patch_size": tower.patch,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 514,
            "width": 16,
            "heads": 2,
            "layers": 1,
            "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
        },
    }
    torch.manual_seed(0)
    settings = {"model_cfg": model, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(built.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2", mtime=0))
    return f"local-dir:{folder}"
