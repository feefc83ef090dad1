"""Going back, as all workers see it."""

import json
import time
from pathlib import Path

import torch
from distributed import run_distributed

from engine.train import checkpoint, rollback
from engine.train.checkpoint import Checkpoint
from engine.train.health import Health
from engine.train.identity import Identity
from engine.train.ledger import Ledger
from engine.train.selection import Selection


def save(folder: Path, step: int, good: bool) -> None:
    health = Health(agreement=0.9, best=0.9, bad=0 if good else 1)
    checkpoint.save(
        folder, Checkpoint(step, 1.0, Ledger(), health, Identity({}), {"w": torch.ones(1)}, {})
    )


def take(rank: int, world: int, folder: str) -> list[int | None]:
    """One worker comes late each time: it must not see what the first has written."""
    told = []
    for _ in range(3):
        time.sleep(0.3 * rank)
        told.append(rollback.take(Path(folder), "it fell", 2, rank))
    return told


def test_all_workers_go_back_to_one_step(tmp_path):
    for step, good in ((3, True), (6, True), (8, False)):
        save(tmp_path / "checkpoints", step, good)
    # The second time, step 6 was good no more; step 3 had to go when 8 was saved.
    assert run_distributed(take, 2, str(tmp_path)) == [[6, 0, None], [6, 0, None]]
    assert [told["to_step"] for told in rollback.taken(tmp_path)] == [6, 0]
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert "1/4 of its learning rate" in [line["text"] for line in lines][3]


def test_what_was_selected_after_the_step_is_forgotten(tmp_path):
    selection = Selection("paper", tmp_path)
    first, best = ({"w": torch.full((1,), value)} for value in (1.0, 2.0))
    selection.offer(2, {"base": 70.0}, first, 0)
    selection.forget(3)
    assert selection.statement() == {"rule": "paper", "pass": 2, "accuracy": 70.0}
    selection.offer(5, {"base": 90.0}, best, 0)
    selection.offer(6, {"base": 80.0}, first, 0)
    assert selection.choice(first)["w"] == 2
    selection.forget(3)
    assert selection.statement() == {"rule": "paper"} and selection.choice(first)["w"] == 1
    across = Selection("paper-xd", tmp_path)
    across.offer(0, {"base": 90.0, "all": 40.0}, first, 0)
    assert across.statement()["accuracy"] == 40.0
