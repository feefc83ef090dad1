"""Writes a bundle in the formats of others: one ONNX file, or a folder that open_clip loads."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import Section
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class ExportConfig(Section):
    """Writes a bundle and its backbone in the formats of others, and checks that they answer alike.

    `onnx`: a file for ONNX Runtime, from uint8 pixels of the test view to logits and features.
    `open_clip`: a folder that open_clip loads, with a small file that makes it the student.
    """

    bundle: Positional[str]
    """bundle.safetensors of a run."""
    out: Positional[str]
    """File or folder to write."""
    format: Literal["onnx", "open_clip"]
    """What to write."""
    model: str = ""
    """Backbone: open_clip architecture or local-dir:FOLDER. Empty: where the run had it."""
    weights: str = ""
    """Its checkpoint. Empty: as in the run."""


def main(args: Sequence[str]) -> None:
    config = parse(ExportConfig, args, prog="promptkd export")
    from engine.clip.bundle import Bundle
    from engine.clip.export import export_onnx, export_open_clip

    bundle = Bundle.load(Path(config.bundle))
    export = export_onnx if config.format == "onnx" else export_open_clip
    off = export(bundle, Path(config.out), config.model, config.weights)
    print(
        f"{config.out}: {len(bundle.class_names)} classes; features differ from the bundle's by "
        f"{off.features:.1e}, logits by {off.logits:.1e} of the largest"
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "export"))
