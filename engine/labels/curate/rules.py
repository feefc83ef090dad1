"""By which rules samples of a corpus are left out."""

from dataclasses import dataclass
from typing import Annotated, Literal

from engine.config import Range, Section

__all__ = ["Rules"]


@dataclass(frozen=True, kw_only=True)
class Rules(Section):
    """What is left out. Without any of them all that has a label stays, and is scored."""

    outliers: Annotated[float, Range(0, 1)] = 0.0
    """Share of the labelled images to leave out that fit the classes least."""
    least_in_domain: Annotated[float | None, Range(0, 1)] = None
    """Leave out images that score less than this; None: none. The scores are in the report."""
    duplicates: Annotated[float | None, Range(0, 1)] = None
    """Leave out images whose features have this cosine, or more, to those of one that is kept.
    None: none."""
    most_per_class: Annotated[int | None, Range(1)] = None
    """Of each of the teacher's classes keep at most so many, those that fit best. None: all."""
    unlabelled: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do where labels of blocks are missing: stop, or leave their samples out, or keep
    them unseen."""
