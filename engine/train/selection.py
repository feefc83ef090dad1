"""Which weights of a run are kept: the last, or, as the paper does, the best on the test images.

The paper looks at base accuracy, or, in its cross-dataset runs, at accuracy among all classes.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.config import UserError
from engine.telemetry import Recorder
from engine.tensor_files import open_tensors, read_tensors, write_tensors

__all__ = ["Selection"]


_LOOKS_AT = {"paper": "base", "paper-xd": "all"}


class Selection:
    """Keeps the best pass so far, in `selected.safetensors`; nothing if the rule is last."""

    def __init__(self, rule: str, folder: Path) -> None:
        self.rule, self._file = rule, folder / "selected.safetensors"

    def statement(self) -> dict[str, Any]:
        """What the summary says: the rule; the pass (from 0) and its accuracy, in percent."""
        if not self._file.exists():
            return {"rule": self.rule}
        with open_tensors(self._file, "pt") as file:
            return {"rule": self.rule} | json.loads(file.metadata()["selection"])

    def offer(
        self, pass_: int, score: dict[str, float | None], weights: dict[str, Tensor], rank: int
    ) -> None:
        """Rank 0 records the scores after a pass, and keeps its weights if their accuracy beats all
        before. Raises UserError where no image tells it."""
        accuracy = score[_LOOKS_AT[self.rule]]
        if accuracy is None:
            raise UserError(
                f"train.selection: corpus.evaluation has no image whose label {self.rule} could "
                "look at; last does without"
            )
        if rank != 0:
            return
        recorder = Recorder(self._file.with_name("metrics.jsonl"))
        recorder.record("pass", pass_=pass_, student=score)
        recorder.close()
        if accuracy > self.statement().get("accuracy", -1.0):
            about = {"selection": json.dumps({"pass": pass_, "accuracy": accuracy})}
            write_tensors(self._file, weights, about)

    def forget(self, from_pass: int) -> None:
        """Drops what was kept if it is of this pass or a later one, to which the run has not come
        yet. For rank 0."""
        if self.statement().get("pass", -1) >= from_pass:
            self._file.unlink()

    def choice(self, last: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to keep, of which `last` are the last."""
        return read_tensors(self._file) if self._file.exists() else last
