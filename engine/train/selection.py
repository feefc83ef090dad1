"""Which weights of a run are kept: the last, or, as the paper does, the best on the test images."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.telemetry import Recorder
from engine.tensor_files import write_tensors

__all__ = ["Selection"]


class Selection:
    """Keeps the best pass so far, in `selected.safetensors` of a run folder, if `rule` is paper."""

    def __init__(self, rule: str, folder: Path) -> None:
        self.rule, self._file = rule, folder / "selected.safetensors"

    def statement(self) -> dict[str, Any]:
        """What the summary says: the rule; the pass (from 0) and its base accuracy, in percent."""
        if not self._file.exists():
            return {"rule": self.rule}
        with safe_open(self._file, "pt") as file:
            return {"rule": self.rule} | json.loads(file.metadata()["selection"])

    def offer(
        self, pass_: int, score: dict[str, float], weights: dict[str, Tensor], rank: int
    ) -> None:
        """Rank 0 records the scores after a pass, and keeps its weights if their base accuracy
        beats all before."""
        if rank != 0:
            return
        recorder = Recorder(self._file.parent)
        recorder.record("pass", pass_=pass_, student=score)
        recorder.close()
        if score["base"] > self.statement().get("base", -1.0):
            about = {"selection": json.dumps({"pass": pass_, "base": score["base"]})}
            write_tensors(self._file, weights, about)

    def choice(self, last: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to keep, of which `last` are the last."""
        return load_file(self._file) if self._file.exists() else last
