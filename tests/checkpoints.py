"""Checkpoints to save, and to compare with what is loaded."""

import dataclasses

import torch

from engine.train.checkpoint import Checkpoint
from engine.train.health import Health
from engine.train.identity import Identity
from engine.train.ledger import Ledger


def state(step: int) -> Checkpoint:
    dice = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        train_s=1.5 * step,
        ledger=Ledger(10 * step, {"format": 1}),
        health=Health(agreement=0.5, best=0.5, judgements=step),
        identity=Identity({"seed": 3, "train.lr": 0.1, "labelling.teachers": ["abc"]}),
        student={"prompts": torch.randn(2, 3, generator=dice), "norm.count": torch.tensor(step)},
        optimizer={
            "prompts/exp_avg": torch.randn(2, 3, generator=dice),
            "prompts/step": torch.tensor(1.0 * step),
        },
    )


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    if one is None:
        return False
    for field in dataclasses.fields(Checkpoint):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict):
            if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
                return False
        elif a != b:
            return False
    return True
