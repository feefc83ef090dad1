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
    In that folder, or beside that file, model_card.md tells what it is, with the numbers of the run
    where the bundle still lies in its folder; one that is there already is left as it is.
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
    from engine.model_card import CARD, Run, model_card, run_of, write

    out, bundle = Path(config.out), Bundle.load(Path(config.bundle))
    told = run_of(Path(config.bundle), bundle)
    export = export_onnx if config.format == "onnx" else export_open_clip
    off = export(bundle, out, config.model, config.weights)
    print(
        f"{config.out}: {len(bundle.class_names)} classes; features differ from the bundle's by "
        f"{off.features:.1e}, logits by {off.logits:.1e} of the largest"
    )
    folder = out.parent if config.format == "onnx" else out
    about = "with the results of its run" if isinstance(told, Run) else f"no results, since {told}"
    if not write(folder, model_card(bundle, told, config.format, out.name)):
        about = "exists, and is left as it is"
    print(f"{folder / CARD}: {about}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "export"))
