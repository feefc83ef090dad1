"""What probes say: where a student disagrees, which classes it has learned, which shards differ."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.report.facts import Probes

__all__ = [
    "ClassAgreement",
    "Disagreement",
    "Drift",
    "agreement",
    "disagreements",
    "drift",
    "extremes",
    "late",
]

_LATE = 0.75  # of the steps that were probed: what comes after them shows what was learned
_ENOUGH = 8  # samples of a shard whose mean is judged
_SHARDS = 5  # that make a spread
_FAR = 3.0  # robust standard deviations
_LEAST_SPREAD = 0.01  # nats: shards may be as good as equal
_TO_SIGMA = 1.4826  # of a normal distribution, by its median absolute deviation


class Disagreement(NamedTuple):
    """A sample whose top classes differ."""

    shard: int
    position: int
    teacher: int
    teacher_p: float
    student: int
    student_p: float


class ClassAgreement(NamedTuple):
    """Of the samples that the teacher takes for a class."""

    number: int
    samples: int
    agreeing: float  # share
    mistaken_for: int | None  # the class that the student says instead most often


class Drift(NamedTuple):
    """The teacher's mean entropy, in nats, of each shard of which enough was probed."""

    shards: np.ndarray  # int64 [n]
    samples: np.ndarray  # int64 [n]
    entropy: np.ndarray  # [n]
    middle: float  # the median shard's
    spread: float  # robust standard deviation of shards; 0 where there are too few to tell

    @property
    def far(self) -> np.ndarray:
        """bool [n]: which shards are more than 3 robust standard deviations from the median."""
        if not self.spread:
            return np.zeros(len(self.shards), bool)
        return np.abs(self.entropy - self.middle) > _FAR * self.spread


def late(probes: Probes) -> Probes:
    """The last quarter of the steps that were probed, and of each sample the newest record."""
    steps = np.unique(probes.step)
    if not len(steps):
        return probes
    rows = np.flatnonzero(probes.step >= steps[int(_LATE * len(steps))])
    places = np.stack([probes.shard[rows], probes.position[rows]], axis=1)
    _, newest = np.unique(places[::-1], axis=0, return_index=True)
    rows = np.sort(rows[::-1][newest])
    return Probes(**{name: column[rows] for name, column in vars(probes).items()})


def disagreements(probes: Probes, most: int) -> list[Disagreement]:
    """The most confident ones first: those of which the less sure of the two is the surest."""
    rows = np.flatnonzero(probes.teacher != probes.student)
    sure = np.minimum(probes.teacher_p[rows], probes.student_p[rows])
    return [
        Disagreement(
            int(probes.shard[row]),
            int(probes.position[row]),
            int(probes.teacher[row]),
            float(probes.teacher_p[row]),
            int(probes.student[row]),
            float(probes.student_p[row]),
        )
        for row in rows[np.argsort(-sure, kind="stable")][:most].tolist()
    ]


def agreement(probes: Probes) -> list[ClassAgreement]:
    """By the teacher's top class, the lowest agreement first; of equals, that of more samples."""
    found = []
    for number in np.unique(probes.teacher).tolist():
        said = probes.student[probes.teacher == number]
        wrong = said[said != number]
        others, times = np.unique(wrong, return_counts=True)
        mistaken = int(others[times.argmax()]) if len(others) else None
        found.append(ClassAgreement(number, len(said), 1 - len(wrong) / len(said), mistaken))
    return sorted(found, key=lambda one: (one.agreeing, -one.samples))


def drift(probes: Probes) -> Drift:
    """By shard, over all that was probed: a frozen teacher changes its mind with the images."""
    shards, place, samples = np.unique(probes.shard, return_inverse=True, return_counts=True)
    means = np.bincount(place, probes.entropy, len(shards)) / np.maximum(samples, 1)
    enough = samples >= _ENOUGH
    shards, samples, means = shards[enough], samples[enough], means[enough]
    middle = float(np.median(means)) if len(means) else 0.0
    spread = 0.0
    if len(means) >= _SHARDS:
        spread = max(_TO_SIGMA * float(np.median(np.abs(means - middle))), _LEAST_SPREAD)
    return Drift(shards, samples, means, middle, spread)


def extremes(
    classes: Sequence[ClassAgreement], most: int
) -> tuple[list[ClassAgreement], list[ClassAgreement]]:
    """The worst and the best of what agreement() gives, no class in both; of equals, those of more
    samples."""
    half = min(most, len(classes) // 2)
    best = sorted(classes[half:], key=lambda one: (-one.agreeing, -one.samples))
    return list(classes[:half]), best[:half]
