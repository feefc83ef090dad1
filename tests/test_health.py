import pytest

from engine.train.health import Collapse, Health


def observe(health: Health, *records: tuple[float, float], steps: int = 10, bad: float = 0) -> None:
    for kl, agreement in records:
        health.observe(kl, agreement, steps, bad)


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
        ((1.0, 0.05), r"agreement with the teacher fell from 90\.0 % to \d"),
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


def test_one_step_that_is_not_finite_is_borne():
    health = Health()
    observe(health, (1.0, 0.9), (1.0, 0.9), bad=1)
    assert not health.good
    observe(health, (1.0, 0.9))
    assert health.good


def test_steps_that_are_not_finite_again_and_again_are_a_collapse():
    health = Health()
    with pytest.raises(Collapse, match="again and again were not finite"):
        observe(health, *[(1.0, 0.9)] * 4, bad=1)
    with pytest.raises(Collapse, match="not finite in each of 10 steps"):
        observe(Health(), (0.0, 0.0), bad=10)


def test_a_student_that_agrees_with_nobody_yet_has_not_collapsed():
    health = Health()
    observe(health, *[(3.0, 0.04), (3.0, 0.01), (3.0, 0.0)] * 5)
    assert health.best < 0.1
