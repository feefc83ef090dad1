"""What students that share a run must have in common."""

from collections.abc import Mapping
from typing import Any

from engine.config import RunConfig, UserError, to_dict

__all__ = ["check_together"]

# Of each student.
_OWN = {"name", "runs_dir", "overwrite", "seed", "preset", "student", "train", "track"}


def check_together(configs: Mapping[str, RunConfig]) -> None:
    """Raises UserError where students that are to share a run do not agree on all that is not a
    student's own."""
    (first, told), *others = configs.items()
    ours = _shared(told)
    for name, other in others:
        theirs = _shared(other)
        for field, here in ours.items():
            if here != theirs[field]:
                raise UserError(
                    f"students: {field} must be the same for all, since they share their labels; "
                    f"it is {here or '-'} for {first}, {theirs[field] or '-'} for {name}"
                )
    if len(configs) > 1 and told.targets.source == "inline":
        raise UserError("targets.source: several students share teachers; inline does not")


def _shared(config: RunConfig) -> dict[str, Any]:
    """What students of one run have in common, by dotted field."""
    shared: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if name not in _OWN:
            fields = value if isinstance(value, dict) else {"": value}
            shared |= {f"{name}.{field}".rstrip("."): one for field, one in fields.items()}
    shared["train.crop_scale"] = config.train.crop_scale
    shared["corpus.view_seed"] = config.view_seed  # the run's seed, where it is not given
    return shared
