import numpy as np
import pytest

from engine.train.health import Collapse, Health


def observe(health: Health, *records: tuple[float, float], bad: float = 0) -> None:
    """Records of 10 steps and 2,000 images, with these means of KL and agreement; 1,000 classes."""
    for kl, agreement in records:
        told = (2000, 2000 * kl, 2000 * agreement, 10, bad, 0)
        health.observe(*told, classes=1000, enough=2000)


def test_learning_is_healthy():
    health = Health()
    observe(health, *((3.0 / n, 1 - 0.9 / n) for n in range(1, 40)))
    assert health.good and health.bad == 0
    assert health.agreement == pytest.approx(0.97, abs=0.01) and health.first_kl == 3.0


def test_noise_is_not_collapse():
    """A record of few images may be far off; what counts is smoothed, and three in a row."""
    health = Health()
    for _ in range(10):
        observe(health, (1.0, 0.9), (0.8, 0.95), (1.5, 0.45), (0.9, 0.9))
    assert health.good


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ((1.0, 0.05), r"beyond chance, fell from \d+\.\d % to \d"),
        ((9.0, 0.9), r"the KL rose from 1 to \d"),
        ((9.0, 0.05), r"fell .* and the KL rose"),
    ],
)
def test_collapse_is_seen_within_a_few_records(record, why):
    health = Health()
    observe(health, *[(1.0, 0.9)] * 5)
    assert health.good
    with pytest.raises(Collapse, match=why):
        for count in range(1, 20):
            observe(health, record)
            assert not health.good or count < 3
    assert 3 <= count <= 6


def test_a_step_now_and_then_that_is_not_finite_is_borne():
    health = Health()
    observe(health, *[(1.0, 0.9)] * 9, bad=1)
    assert health.good


def test_steps_that_are_not_finite_again_and_again_are_a_collapse():
    health = Health()
    with pytest.raises(Collapse, match="again and again were not finite"):
        observe(health, *[(1.0, 0.9)] * 4, bad=2)


def test_a_student_that_agrees_with_nobody_yet_has_not_collapsed():
    health = Health()
    observe(health, *[(3.0, 0.04), (3.0, 0.01), (3.0, 0.0)] * 5)
    assert health.best < 0.1


@pytest.mark.parametrize(("classes", "level", "batch"), [(10, 0.1, 8), (10, 0.15, 8), (5, 0.4, 8)])
def test_noise_around_a_constant_agreement_is_no_collapse(classes, level, batch):
    """Of an untrained student in a long warm-up: binomial noise, a record a step."""
    draw = np.random.default_rng(0)
    health = Health()
    for agreeing in draw.binomial(batch, level, 20_000):
        health.observe(batch, batch * 1.0, agreeing, 1, 0, 0, classes=classes, enough=2000)
    assert health.judgements == 80


def test_records_are_added_up_to_a_judgement():
    health = Health()
    for _ in range(7):
        health.observe(300, 600.0, 150.0, 2, 0, 0, classes=1000, enough=2000)
    assert health.judgements == 1 and health.images == 0
    assert health.kl == pytest.approx(2) and health.agreement == pytest.approx(0.5, abs=1e-3)
