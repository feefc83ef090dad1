"""Adapts a CLIP teacher to a domain from a few labelled images, by learning prompts (stage I)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Section, to_dict
from engine.config_pretrain import PretrainConfig
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run


@dataclass(frozen=True)
class StageOneConfig(Section):
    """Adapts a CLIP teacher to a domain from a few labelled images, by learning prompts.

    Options come from a TOML file, if one is named first, and then from the command line.
    """

    run: Flat[PretrainConfig]
    dry_run: bool = False
    """Print the resolved config and stop."""


def main(args: Sequence[str]) -> None:
    asked = parse(
        StageOneConfig,
        args,
        prog="promptkd pretrain",
        from_files=True,
        presets=PRESETS / "pretrain",
    )
    config = asked.run
    if asked.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return
    from engine.pretrain import pretrain
    from jobs.table import scores

    summary = pretrain(config)
    print(scores(summary, ("zero_shot", "tuned")))
    print(f"learned prompts: {config.folder / 'prompts.safetensors'}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "pretrain"))
