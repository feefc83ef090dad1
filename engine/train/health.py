"""Whether a run still learns: per-seed collapse is what users of the reference report most."""

from dataclasses import dataclass

__all__ = ["Collapse", "Health"]

_SMOOTH = 0.7  # of the past in a smoothed number
_PATIENCE = 3  # records in a row that must look bad
_LOST = 0.5  # of the best agreement: below it, a record looks bad
_GOOD = 0.8  # of the best agreement: above it, a checkpoint is one to go back to
_RISEN = 2.0  # times the loss of the untrained student: above it, a record looks bad
_MEANT = 0.1  # agreement that is no accident


class Collapse(RuntimeError):
    """The student has unlearned, or diverged. All workers raise it at the same step."""


@dataclass
class Health:
    """What the records of a run have told so far; kept in its checkpoints."""

    agreement: float = 0.0  # with the teacher, smoothed
    best: float = 0.0  # the highest it has been
    first_kl: float = 0.0  # of the first record
    kl: float = 0.0  # smoothed
    records: int = 0
    bad: int = 0  # records in a row that looked bad

    @property
    def good(self) -> bool:
        """Whether to go back here after a collapse."""
        return self.bad == 0 and self.agreement >= _GOOD * self.best

    def observe(self, kl: float, agreement: float, steps: int, not_finite: float) -> None:
        """Takes in a record: means over the valid images of its steps, and how many of the steps
        had a loss or gradient that was not finite, on any worker. Raises Collapse."""
        past = _SMOOTH if self.records else 0.0
        self.agreement = past * self.agreement + (1 - past) * agreement
        self.kl = past * self.kl + (1 - past) * kl
        self.first_kl = self.first_kl if self.records else kl
        self.best = max(self.best, self.agreement)
        self.records += 1
        if not_finite >= steps:
            raise Collapse(f"loss or gradients were not finite in each of {steps} steps")
        whys = []
        if not_finite:
            whys.append("loss or gradients again and again were not finite")
        if self.best >= _MEANT and self.agreement < _LOST * self.best:
            whys.append(
                f"agreement with the teacher fell from {100 * self.best:.1f} % to "
                f"{100 * self.agreement:.1f} %"
            )
        if self.kl > _RISEN * self.first_kl:
            whys.append(f"the KL rose from {self.first_kl:.3g} to {self.kl:.3g}")
        self.bad = self.bad + 1 if whys else 0
        if self.bad >= _PATIENCE:
            raise Collapse(" and ".join(whys))
