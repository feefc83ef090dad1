"""Which samples of a corpus are worth training on, by what its teacher has said of them."""

from typing import NamedTuple

import numpy as np
import torch

from engine.config import UserError
from engine.labels.curate.duplicates import near_duplicates
from engine.labels.curate.rules import Rules
from engine.labels.curate.scan import Scan

__all__ = ["REASONS", "Curated", "choose", "counted"]

# What became of a sample; the first one stays.
REASONS = ("kept", "unlabelled", "undecodable", "outlier", "duplicate", "beyond")
_KEPT, _UNLABELLED, _UNDECODABLE, _OUTLIER, _DUPLICATE, _BEYOND = range(len(REASONS))


class Curated(NamedTuple):
    """Columns have a row for each sample of the corpus, in its order."""

    reasons: np.ndarray  # int8: place in REASONS
    originals: np.ndarray  # int64: the sample that stays instead of a duplicate; -1 elsewhere
    nearest: np.ndarray  # fp32: cosine to the nearest that stays; NaN: it was not compared

    @property
    def kept(self) -> np.ndarray:
        """bool"""
        return self.reasons == _KEPT


def choose(found: Scan, rules: Rules, device: torch.device) -> Curated:
    """Outliers go first, then near-duplicates among what is left, of which the one that fits the
    classes best stays, then what is beyond a class's share. Ties go by the order of the corpus.

    Raises UserError where labels are missing that are not to, and where nothing stays.
    """
    if found.missing and rules.unlabelled == "refuse":
        raise UserError(
            f"unlabelled: labels of {found.missing:,} blocks are missing, {(~found.there).sum():,} "
            "samples; `promptkd label` records them, and --unlabelled drop (or keep) does without"
        )
    reasons = np.where(found.valid, _KEPT, _UNDECODABLE).astype(np.int8)
    reasons[~found.there] = _KEPT if rules.unlabelled == "keep" else _UNLABELLED
    originals = np.full(len(reasons), -1, np.int64)
    nearest = np.full(len(reasons), np.nan, np.float32)
    _drop_outliers(reasons, found, rules)
    ordered = _ordered(reasons, found)
    least = np.inf if rules.duplicates is None else rules.duplicates
    like, nearest[ordered] = near_duplicates(found.features, ordered, least, device)
    gone = like != ordered
    reasons[ordered[gone]], originals[ordered[gone]] = _DUPLICATE, like[gone]
    if rules.most_per_class:
        ordered = _ordered(reasons, found)
        reasons[ordered[_rank(found.classes[ordered]) >= rules.most_per_class]] = _BEYOND
    if not (reasons == _KEPT).any():
        raise UserError("no sample is left: " + ", ".join(counted(reasons)))
    return Curated(reasons, originals, nearest)


def counted(reasons: np.ndarray) -> list[str]:
    """What became of how many samples."""
    counts = np.bincount(reasons, minlength=len(REASONS)).tolist()
    return [f"{count:,} {name}" for name, count in zip(REASONS, counts, strict=True) if count]


def _drop_outliers(reasons: np.ndarray, found: Scan, rules: Rules) -> None:
    ordered = _ordered(reasons, found)
    share = round(rules.outliers * len(ordered))
    reasons[ordered[len(ordered) - share :]] = _OUTLIER
    if rules.least_in_domain is not None:
        reasons[ordered[found.in_domain[ordered] < rules.least_in_domain]] = _OUTLIER


def _ordered(reasons: np.ndarray, found: Scan) -> np.ndarray:
    """Samples with a label that are in so far, int64: those that fit the classes best first."""
    rows = np.flatnonzero((reasons == _KEPT) & found.valid)
    return rows[np.argsort(-found.in_domain[rows], kind="stable")]


def _rank(classes: np.ndarray) -> np.ndarray:
    """How many of the same class come before each, int64 [n]."""
    order = np.argsort(classes, kind="stable")
    _, first, counts = np.unique(classes[order], return_index=True, return_counts=True)
    ranks = np.empty(len(classes), np.int64)
    ranks[order] = np.arange(len(classes)) - np.repeat(first, counts)
    return ranks
