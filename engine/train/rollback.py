"""Going back after a collapse: to the last good checkpoint, at half the learning rate.

Steps are pure functions, so the same rate would lead to the same collapse again. What was taken is
kept in `rollbacks.json` of the run folder, where restarted workers find it.
"""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine import durable
from engine.telemetry import Recorder
from engine.train import checkpoint

__all__ = ["take", "taken"]


def taken(folder: Path) -> list[dict[str, Any]]:
    """The roll-backs of a run so far: why, and to which step."""
    file = folder / "rollbacks.json"
    return json.loads(file.read_text()) if file.exists() else []


def take(folder: Path, why: str, most: int, rank: int) -> int | None:
    """Goes back, says so, and gives the step to go on from; None where it has been done often
    enough. All workers call it; rank 0 decides."""
    told = [_go_back(folder, why, most) if rank == 0 else None]
    dist.broadcast_object_list(told)
    return told[0]


def _go_back(folder: Path, why: str, most: int) -> int | None:
    before = taken(folder)
    recorder = Recorder(folder / "metrics.jsonl")
    recorder.record("notice", text=f"the student has collapsed: {why}")
    step = None
    if len(before) < most:
        # Where the student collapsed again at once, its last good state was good no more.
        failed = before[-1]["to_step"] if before else None
        step = checkpoint.roll_back(folder / "checkpoints", unless=failed)
        told = json.dumps([*before, {"why": why, "to_step": step}], indent=2)
        durable.replace(folder / "rollbacks.json", told.encode())
        rate = f"1/{2 ** (len(before) + 1)} of its learning rate"
        recorder.record("notice", text=f"going on from step {step} at {rate}")
    recorder.close()
    return step
