import math

import pytest

from engine.config import TrainConfig
from engine.train.schedule import (
    effective_weight,
    gaussian_weights,
    learning_rate,
    loss_terms,
    peak_rate,
)

# The reference's learning rate in each of its 20 epochs (its own scheduler, run: notes of the
# paper's recipe): a warm-up epoch, then 0.0025 (1 + cos(pi (e - 1) / 20)).
PAPER_LAST_RATE = 1.224e-4
# Weights of epochs 12 to 18 in PromptSRC's average for base-to-novel (mean 15, std 1).
PAPER_GAUSSIAN = {12: 0.0044, 13: 0.054, 14: 0.242, 15: 0.399, 16: 0.242, 17: 0.054, 18: 0.0044}


def rates(total: int, **config) -> list[float]:
    train = TrainConfig(**{"lr_batch": 0, **config})
    return [learning_rate(step, total, train) for step in range(total)]


def test_warm_up_is_linear_and_reaches_the_peak():
    got = rates(30, lr=0.6, warmup_steps=5)
    assert got[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert max(got) == got[5]


def test_then_half_a_cosine_falls_to_zero():
    got = rates(105, lr=2.0, warmup_steps=5)[5:]
    assert got == sorted(got, reverse=True)
    assert got[50] == pytest.approx(1.0)
    assert got[25] == pytest.approx(1 + math.cos(math.pi / 4))
    assert 0 < got[-1] < 0.001


def test_no_warm_up_starts_at_the_peak():
    assert rates(10, lr=0.5, warmup_steps=0)[0] == 0.5


@pytest.mark.parametrize("total", [1, 2, 16, 40])
def test_a_short_run_warms_up_for_a_fifth_of_it(total):
    got = rates(total, lr=1.0, warmup_steps=20)
    assert got.index(max(got)) == total // 5 and max(got) == 1
    assert got[total // 5 :] == sorted(got[total // 5 :], reverse=True)


def test_the_rates_of_the_papers_epochs():
    """7 steps an epoch, at the paper's batch: its 20 rates, each for a whole epoch."""
    got = rates(140, schedule="epochs", passes=20, lr=0.005, batch=8, lr_batch=8)
    assert all(got[7 * epoch : 7 * epoch + 7] == [got[7 * epoch]] * 7 for epoch in range(20))
    epochs = got[::7]
    assert epochs[0] == 1e-5 and epochs[1] == 0.005
    wanted = [0.0025 * (1 + math.cos(math.pi * (epoch - 1) / 20)) for epoch in range(1, 20)]
    assert epochs[1:] == pytest.approx(wanted)
    assert epochs[-1] == pytest.approx(PAPER_LAST_RATE, rel=1e-3)


def test_the_rate_grows_with_the_batch():
    """What the paper's author gives for batches of 128 and 256."""
    assert peak_rate(TrainConfig(lr=0.005, lr_batch=8, batch=8)) == 0.005
    assert peak_rate(TrainConfig(lr=0.005, lr_batch=8, batch=128)) == pytest.approx(0.08)
    assert peak_rate(TrainConfig(lr=0.005, lr_batch=8, batch=256)) == pytest.approx(0.16)
    assert peak_rate(TrainConfig(lr=0.3, lr_batch=0, batch=256)) == 0.3
    assert peak_rate(TrainConfig(lr=0.3, optimizer="adamw", batch=256)) == 0.3


def test_gaussian_weights_are_the_papers():
    weights = gaussian_weights(20, mean=15, std=1)
    assert sum(weights) == pytest.approx(1) and len(weights) == 20
    for epoch, wanted in PAPER_GAUSSIAN.items():
        assert weights[epoch - 1] == pytest.approx(wanted, rel=0.01)


def test_a_narrow_gaussian_is_the_nearest_epochs():
    assert gaussian_weights(4, mean=2.4, std=1e-4) == [0, 1, 0, 0]
    assert gaussian_weights(4, mean=2.5, std=1e-4) == [0, 0.5, 0.5, 0]


def test_effective_weight_of_the_two_reductions():
    assert effective_weight(TrainConfig(kd_weight=3, reduction="batchmean"), 10) == 3
    # The paper's numbers: 1000 on ImageNet and on EuroSAT.
    paper = TrainConfig(kd_weight=1000, reduction="paper")
    assert effective_weight(paper, 1000) == 1
    assert effective_weight(paper, 10) == 100


def test_loss_terms_are_told_with_their_weights():
    assert loss_terms(TrainConfig(), 10) == "effective weight of the KL 100"
    mixed = TrainConfig(kd_weight=0, cosine_weight=2, feature_weight=0.5, feature="mse")
    told = loss_terms(mixed, 10)
    assert told.startswith("effective weight of the cosine distance of logits 2, ")
    assert told.endswith(", of the MSE distance of features 0.5") and "KL" not in told
