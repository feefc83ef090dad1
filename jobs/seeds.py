"""Several runs that differ by their seed: mean and spread of their summaries."""

import statistics
from collections.abc import Sequence
from typing import Any

from engine.config import UserError

__all__ = ["mean", "parse_seeds", "spread"]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of "1,2,3". Raises UserError for anything else, or a seed that comes twice."""
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"seeds: {text!r} is not a list of numbers like 1,2,3") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {text!r} names a seed twice")
    return seeds


def mean(summaries: Sequence[Any]) -> Any:
    """Field by field, over summaries of one shape; what is no number is kept where it is one and
    the same."""
    return _over(summaries, statistics.fmean)


def spread(summaries: Sequence[Any]) -> Any:
    """The standard deviation over summaries, field by field; of one alone, 0."""
    return _over(summaries, lambda values: statistics.stdev(values) if len(values) > 1 else 0.0)


def _over(values: Sequence[Any], measure: Any) -> Any:
    if all(isinstance(value, dict) for value in values):
        return {key: _over([value.get(key) for value in values], measure) for key in values[0]}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return measure(values)
    return values[0] if all(value == values[0] for value in values) else None
