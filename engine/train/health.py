"""Whether a run still learns: per-seed collapse is what users of the reference report most."""

from dataclasses import dataclass

__all__ = ["Collapse", "Health"]

_SMOOTH = 0.7  # of the past in a smoothed number
_PATIENCE = 3  # judgements in a row that must be bad
_LOST = 0.5  # of the best agreement: below it, a judgement is bad
_GOOD = 0.8  # of the best agreement: above it, a checkpoint is one to go back to
_RISEN = 2.0  # times the loss of the untrained student: above it, a judgement is bad
_MEANT = 0.1  # agreement beyond chance that is no accident
_OFTEN = 0.1  # of the steps not finite: above it, a judgement is bad


class Collapse(RuntimeError):
    """The student has unlearned, or diverged. All workers raise it at the same step."""


@dataclass
class Health:
    """What the records of a run have told so far; kept in its checkpoints.

    Records are added up until they make enough images for a judgement: a few say little.
    """

    images: int = 0  # since the last judgement, as are the next four
    kl_sum: float = 0.0
    agreeing: float = 0.0
    steps: int = 0
    not_finite: float = 0.0
    agreement: float = 0.0  # with the teacher, beyond chance, smoothed
    best: float = 0.0  # the highest it has been
    first_kl: float = 0.0  # of the first judgement
    kl: float = 0.0  # smoothed
    judgements: int = 0
    bad: int = 0  # judgements in a row that were bad
    streak: int = 0  # of steps that nobody learned from, as it was last told

    @property
    def good(self) -> bool:
        """Whether to go back here after a collapse."""
        return self.bad == 0 and self.streak == 0 and self.agreement >= _GOOD * self.best

    def observe(
        self,
        images: float,
        kl_sum: float,
        agreeing: float,
        steps: int,
        not_finite: float,
        streak: int,
        *,
        classes: int,
        enough: int,
    ) -> None:
        """Takes in a record: sums over valid images, and how many steps had a loss or gradient that
        was not finite; both over all workers, whose steps count one by one. `streak`: from how many
        of the latest steps nobody has learned. Judges once there are `enough` images. Raises
        Collapse."""
        self.streak = streak
        self.images += int(images)
        self.kl_sum += kl_sum
        self.agreeing += agreeing
        self.steps += steps
        self.not_finite += not_finite
        if self.images >= enough:
            self._judge(1 / classes)
            self.images, self.kl_sum, self.agreeing = 0, 0.0, 0.0
            self.steps, self.not_finite = 0, 0.0

    def _judge(self, chance: float) -> None:
        past = _SMOOTH if self.judgements else 0.0
        kl, agreement = self.kl_sum / self.images, self.agreeing / self.images
        beyond = max(0.0, (agreement - chance) / (1 - chance)) if chance < 1 else 1.0
        self.agreement = past * self.agreement + (1 - past) * beyond
        self.kl = past * self.kl + (1 - past) * kl
        self.first_kl = self.first_kl if self.judgements else kl
        self.best = max(self.best, self.agreement)
        self.judgements += 1
        whys = []
        if self.not_finite > _OFTEN * self.steps:
            whys.append("loss or gradients again and again were not finite")
        if self.best >= _MEANT and self.agreement < _LOST * self.best:
            whys.append(
                f"agreement with the teacher, beyond chance, fell from {100 * self.best:.1f} % to "
                f"{100 * self.agreement:.1f} %"
            )
        if self.kl > _RISEN * self.first_kl:
            whys.append(f"the KL rose from {self.first_kl:.3g} to {self.kl:.3g}")
        self.bad = self.bad + 1 if whys else 0
        if self.bad >= _PATIENCE:
            raise Collapse(" and ".join(whys))
