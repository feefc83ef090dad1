"""CLIPs small enough to make anew in every test, and damage to shards."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from engine.data.index import index_shard
from engine.data.places import Shard
from engine.storage.ranges import Access, Storage

torch.set_num_threads(1)  # threads of models this small do little but wait for each other

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16,
        "layers": 3,
        "width": 16,
        "head_width": 8,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 514,
        "width": 8,
        "heads": 2,
        "layers": 1,
        "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
    },
}


def clip_folder(
    folder: Path,
    seed: int = 0,
    embed_dim: int = 8,
    text: dict[str, Any] | None = None,
    custom_text: bool = False,
    **vision: Any,
) -> str:
    """Writes a CLIP with random weights and a vocabulary of bytes; gives its local-dir: name."""
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(MODEL)
    model["embed_dim"] = embed_dim
    model["vision_cfg"].update(vision)
    model["text_cfg"].update(text or {})
    model["custom_text"] = custom_text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"model_cfg": model, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        for parameter in built.parameters():
            if parameter.ndim:  # open_clip starts biases at 0 and norms at 1, which hide mistakes
                parameter.data += 0.1 * torch.randn_like(parameter)
    save_file(built.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2", mtime=0))
    return f"local-dir:{folder}"


def spoil(shard: Path, samples: int) -> None:
    """Overwrites the magic bytes of the first images in a shard, which is then to be indexed."""
    found = index_shard(Shard(str(shard), "tar"), Storage(Access())).ours
    with open(shard, "r+b") as file:
        for entry in found.entries(0, samples):
            file.seek(entry.offset)
            file.write(bytes(16))
