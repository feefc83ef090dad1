"""What a run must have in common with a checkpoint to go on from it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.config import RunConfig, UserError
from engine.labels.labelling import Labelling

__all__ = ["Identity"]

# Settings of [train] by which the same steps come to the same weights.
_FREE = (
    "kernels",
    "judge_images",
    "max_not_finite",
    "rollbacks",
    "checkpoint_steps",
    "keep_last",
    "keep_every",
    "checkpoint_copy",
    "log_steps",
    "max_failures",
)


@dataclass(frozen=True)
class Identity:
    """All that the weights after a step depend on: the order of samples, their labels, the student
    that starts, and how it learns. World size, ZeRO stage, offloading, and who computes the labels
    are not among it: they change no more than how numbers are rounded."""

    settings: Mapping[str, Any]  # JSON values, by dotted field

    @classmethod
    def of(cls, config: RunConfig, labelling: Labelling, backbone: str, source: str) -> "Identity":
        """Of a resolved config, how the corpus is labelled, and where labels come from; `backbone`
        is the fingerprint of the student's CLIP, whose frozen weights no checkpoint holds."""
        names = "\n".join(labelling.class_names)
        labels = asdict(labelling) | {"class_names": hashlib.sha256(names.encode()).hexdigest()}
        student = config.student
        train = {name: value for name, value in asdict(config.train).items() if name not in _FREE}
        told = {
            "seed": config.seed,
            "corpus.lanes": config.corpus.lanes,
            "corpus.window_blocks": config.corpus.window_blocks,
            "classes.template": config.classes.template,  # of class vectors that are made
            "student.model": student.model,
            "student.weights": backbone,
            "student.precision": student.precision,
            "student.trainable": student.trainable,
            "student.prompts": student.prompts,
            "student.depth": student.depth,
            "student.projector_width": student.projector_width,
            "targets.source": "synthetic" if source == "synthetic" else "teachers",
        }
        told |= {f"labelling.{name}": value for name, value in labels.items()}
        told |= {f"train.{name}": value for name, value in train.items()}
        return cls(json.loads(json.dumps(told)))

    def differences(self, other: "Identity") -> list[str]:
        """One line for each field in which `other` differs from this one."""
        here, there = self.settings, other.settings
        return [
            f"{field}: {_shown(here.get(field))} here, {_shown(there.get(field))} there"
            for field in sorted(here.keys() | there.keys())
            if here.get(field) != there.get(field)
        ]

    def require(self, saved: "Identity", where: str) -> None:
        """Raises UserError where the checkpoints at `where` are those of a run that differs."""
        if lines := self.differences(saved):
            listed = "".join(f"\n  {line}" for line in lines)
            raise UserError(
                f"{where}: belongs to a run that differs, so this one cannot go on from it; 'here' "
                f"is this run:{listed}"
            )


def _shown(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(v[:16] if isinstance(v, str) else f"{v}" for v in values)
