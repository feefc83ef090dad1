"""Lives of a run's workers, without Ray, that note what they train and end as they are told."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from workers import assignment_of, config_of

from engine.train.account import Account
from engine.train.health import Collapse
from engine.train.ledger import Ledger
from engine.train.stops import hear_sigterm
from engine.train.worker import Task, work


def life(
    rank: int,
    world: int,
    runs: str,
    changes: dict[str, Any],
    ends: str = "",
    step: int = 0,
    of: int = 0,
    owner: str = "",
) -> dict[str, Any]:
    """One life of a run. After `step` steps, and before they are committed, rank `of` is killed
    ("kill"), hears SIGTERM ("term"), or finds that another driver has the run ("lost"), also just
    before its student collapses ("lost, collapse")."""
    hear_sigterm()
    config = config_of(runs, "run", {**changes, "student.workers": world})
    config.folder.mkdir(parents=True, exist_ok=True)
    add = Ledger.add

    def observed(self, batch, trained_B):
        add(self, batch, trained_B)
        share, done = batch.work.share, batch.work.step + 1
        pairs = zip(share.blocks.tolist(), share.offsets.tolist(), share.valid, strict=True)
        ids = [(block, offset) for block, offset, valid in pairs if valid]
        with open(config.folder / f"samples-{rank}.jsonl", "a") as file:
            file.write(json.dumps([done, batch.work.view, ids]) + "\n")
        if (done, rank) != (step, of):
            return
        await_saved(config.folder, step - 1 - (step - 1) % config.train.checkpoint_steps)
        if ends.startswith("lost"):
            (config.folder / "lease.json").write_text('{"owner": "another"}')
        elif ends:
            os.kill(os.getpid(), signal.SIGKILL if ends == "kill" else signal.SIGTERM)

    def collapse(self, totals):
        if totals.done == step:
            raise Collapse("it fell")

    Ledger.add = observed  # in this process, which ends with this life
    if ends == "lost, collapse":
        Account.judge = collapse
    return work(
        Task(config, assignment_of(config), None, "inline", owner=owner), torch.device("cpu")
    )


def await_saved(folder: Path, step: int) -> None:
    """Until that step is committed, which a thread of rank 0 may still be at."""
    deadline = time.monotonic() + 60
    while step and not (folder / "checkpoints" / f"step-{step:08d}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def samples(folder: Path) -> dict[int, list[list]]:
    """By step, what was trained: (view, sample ids), once for each life that came to it."""
    world = len(list(folder.glob("samples-*.jsonl")))
    found: dict[int, list[list]] = {}
    for rank in range(world):
        for line in (folder / f"samples-{rank}.jsonl").read_text().splitlines():
            step, view, ids = json.loads(line)
            found.setdefault(step, []).extend([view, *one] for one in ids)
    return found
