"""Numbers that follow from the config alone: learning rate and loss weight."""

import math

from engine.config import TrainConfig

__all__ = ["effective_weight", "learning_rate"]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Of 0-based `step` of `total`: linear warm-up, then half a cosine to zero."""
    warmup = min(config.warmup_steps, total)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return 0.5 * config.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def effective_weight(config: TrainConfig, classes: int) -> float:
    """Weight of the KL averaged over images: the reductions differ by a factor of N."""
    return config.kd_weight / (classes if config.reduction == "paper" else 1)
