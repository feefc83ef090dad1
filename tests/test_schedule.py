import math

import pytest

from engine.config import TrainConfig
from engine.train.schedule import effective_weight, learning_rate


def rates(total: int, **config) -> list[float]:
    return [learning_rate(step, total, TrainConfig(**config)) for step in range(total)]


def test_warm_up_is_linear_and_reaches_the_peak():
    got = rates(20, lr=0.6, warmup_steps=5)
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


@pytest.mark.parametrize("total", [1, 2, 5])
def test_a_run_shorter_than_its_warm_up_still_moves(total):
    got = rates(total, lr=1.0, warmup_steps=5)
    assert got == sorted(got) and all(0 < rate < 1 for rate in got)


def test_effective_weight_of_the_two_reductions():
    assert effective_weight(TrainConfig(kd_weight=3), 10) == 3
    # The paper's numbers: 1000 on ImageNet and on EuroSAT.
    paper = TrainConfig(kd_weight=1000, reduction="paper")
    assert effective_weight(paper, 1000) == 1
    assert effective_weight(paper, 10) == 100
