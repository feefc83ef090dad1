"""Numbers that follow from the config alone: learning rates, loss weight, averaging weights."""

import math

from engine.config import TrainConfig

__all__ = [
    "effective_weight",
    "epoch_rate",
    "gaussian_weights",
    "learning_rate",
    "loss_terms",
    "peak_rate",
]

_WARM_EPOCH_RATE = 1e-5


def peak_rate(config: TrainConfig) -> float:
    """The learning rate at this batch: that of SGD is scaled linearly (Goyal et al. 2017)."""
    scaled = config.optimizer == "sgd" and config.lr_batch > 0
    return config.lr * (config.batch / config.lr_batch if scaled else 1)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Of 0-based `step` of `total`: linear warm-up, then half a cosine to zero; or the paper's."""
    peak = peak_rate(config)
    if config.schedule == "epochs":
        return epoch_rate(step * config.passes // total, config.passes, peak)
    warmup = min(config.warmup_steps, total // 5)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def epoch_rate(epoch: int, epochs: int, peak: float) -> float:
    """Of 0-based `epoch`: one at 1e-5, then half a cosine that begins at `peak` and does not quite
    come to zero (the reference's schedule, which starts the cosine one epoch late)."""
    if epoch == 0:
        return _WARM_EPOCH_RATE
    return 0.5 * peak * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def gaussian_weights(epochs: int, mean: float, std: float) -> list[float]:
    """Weights of the prompts at the end of epochs 1, 2, ... in their average; they sum to 1
    (PromptSRC, section 3.2.2)."""
    powers = [-0.5 * ((epoch - mean) / std) ** 2 for epoch in range(1, epochs + 1)]
    raw = [math.exp(power - max(powers)) for power in powers]  # the largest does not underflow
    return [weight / sum(raw) for weight in raw]


def effective_weight(config: TrainConfig, classes: int) -> float:
    """Weight of the KL averaged over images: the reductions differ by a factor of N."""
    return config.kd_weight / (classes if config.reduction == "paper" else 1)


def loss_terms(config: TrainConfig, classes: int) -> str:
    """The terms of the loss with their effective weights, of means over images, to be told."""
    weights = {
        "the KL": effective_weight(config, classes),
        "the cosine distance of logits": config.cosine_weight,
        f"the {config.feature.upper()} distance of features": config.feature_weight,
    }
    told = [f"of {term} {weight:g}" for term, weight in weights.items() if weight]
    return "effective weight " + ", ".join(told)
