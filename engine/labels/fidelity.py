"""Whether a quantised teacher says what it would say in full: asked on a run's own first images."""

from torch import Tensor

from engine.config import TeacherConfig, UserError
from engine.progress import say
from kernels.reference import kl_divergence

__all__ = ["IMAGES", "Fidelity"]

IMAGES = 256  # the fewest that are compared


class Fidelity:
    """Compares the logits of a teacher's first images, those that cannot be decoded and are black
    among them, with those of the same teacher in full.

    `done` once there were enough images. After a refusal every further image is refused too.
    """

    def __init__(self, config: TeacherConfig, full: str) -> None:
        self.done = False
        self._config, self._full = config, full
        self._images, self._agreed, self._kl_sum = 0, 0, 0.0
        self._refusal = ""

    def take(self, full_BN: Tensor, quantized_BN: Tensor) -> None:
        """Waits for the device. Raises UserError, naming the field whose bound is passed, as soon
        as that is certain: when the first `IMAGES` can no longer come to less."""
        self.require()
        rows_B = full_BN.isfinite().all(dim=1)  # others are not numbers in full, either
        full_BN, quantized_BN = full_BN[rows_B], quantized_BN[rows_B]
        self._images += len(full_BN)
        self._agreed += int((full_BN.argmax(1) == quantized_BN.argmax(1)).sum())
        self._kl_sum += float(kl_divergence(full_BN, quantized_BN).sum())
        told, count = self._config, max(self._images, IMAGES)
        passed = []
        if not self._kl_sum <= told.max_kl * count:  # of nan, too
            passed.append("teacher.max_kl")
        if self._images - self._agreed > (1 - told.min_agreement) * count:
            passed.append("teacher.min_agreement")
        if passed:
            self._refusal = self._complaint(passed)
            self.require()
        if self._images >= IMAGES:
            self.done = True
            say(f"teacher {told.model} in {told.precision} beside {self._full}, {self._figures()}")

    def require(self) -> None:
        """Raises UserError where the teacher has been refused."""
        if self._refusal:
            raise UserError(self._refusal)

    def statement(self) -> dict[str, float]:
        """Images that were compared, their KL, summed, and how many had the same top class."""
        return {
            "compared": self._images,
            "compared_kl_sum": self._kl_sum,
            "compared_agreed": self._agreed,
        }

    def _figures(self) -> str:
        images = max(self._images, 1)
        return (
            f"on {self._images} images of this run: mean KL {self._kl_sum / images:.2g} nats, same "
            f"top class in {100 * self._agreed / images:.1f} %"
        )

    def _complaint(self, passed: list[str]) -> str:
        told = self._config
        return (
            f"{', '.join(passed)}: teacher {told.model} in {told.precision} is too far from "
            f"{self._full} {self._figures()}; teacher.max_kl allows {told.max_kl:g} and "
            f"teacher.min_agreement {100 * told.min_agreement:g} %. Take teacher.precision="
            f"{'fp16' if self._full == 'fp16' else 'auto'}"
            f"{' or int8' if told.precision == 'fp8' else ''}, or change {' and '.join(passed)}"
        )
