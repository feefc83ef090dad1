"""What a run must have in common with a checkpoint to go on from it."""

import hashlib
import json
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

    settings: dict[str, Any]  # JSON values, by dotted field

    @classmethod
    def of(
        cls, config: RunConfig, labelling: Labelling, backbone: str, source: str, samples: str
    ) -> "Identity":
        """Of a resolved config, how the corpus is labelled, and where labels come from; `backbone`
        is the fingerprint of the student's CLIP, whose frozen weights no checkpoint holds,
        `samples` that of the list of samples to train on, or empty."""
        names = "\n".join(labelling.class_names)
        labels = asdict(labelling) | {"class_names": hashlib.sha256(names.encode()).hexdigest()}
        told = {
            "student.weights": backbone,
            "student.precision": config.student.precision,
            "targets.source": "synthetic" if source == "synthetic" else "teachers",
        } | ({"corpus.samples": samples} if samples else {})
        told |= {f"labelling.{name}": value for name, value in labels.items()}
        return cls(cls.asked(config).settings | json.loads(json.dumps(told)))

    @classmethod
    def asked(cls, config: RunConfig) -> "Identity":
        """The part that a config of absolute paths tells by itself, before anything is loaded."""
        student = config.student
        told = {
            "seed": config.seed,
            "corpus.lanes": config.corpus.lanes,
            "corpus.window_blocks": config.corpus.window_blocks,
            "classes.template": config.classes.template,  # of class vectors that are made
            "student.model": student.model,
            "student.trainable": student.trainable,
            "student.prompts": student.prompts,
            "student.depth": student.depth,
            "student.projector_width": student.projector_width,
        }
        train = {name: value for name, value in asdict(config.train).items() if name not in _FREE}
        told |= {f"train.{name}": value for name, value in train.items()}
        return cls(json.loads(json.dumps(told)))

    def part(self, other: "Identity") -> "Identity":
        """What this one says of the fields of `other`."""
        return Identity({name: self.settings.get(name) for name in other.settings})

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
    if value is None:  # not told, as by an older run
        return "nothing"
    values = value if isinstance(value, list) else [value]
    return ", ".join(v[:16] if isinstance(v, str) else f"{v}" for v in values)
