"""What Ray serves to Prometheus of a run."""

import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.track.aside import Aside
from engine.track.metrics import Point
from engine.track.ray_metrics import RayMetrics, address

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LABELS = ("run", "worker", "teacher", "reason")
VALUES = {
    "train/loss": 0.5,
    "student/3/waited_labels": 0.25,
    "students/waited_labels": 0.125,
    "teacher/0/queue": 4,
    "skipped/undecodable": 2,
    "final/steps": 80,
}


def served() -> dict[tuple[str, ...], float]:
    """Our metrics by name and the labels that are ours."""
    with urllib.request.urlopen(address(), timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
    samples = [one for family in families for one in family.samples]
    return {
        (one.name, *(one.labels[key] for key in LABELS if key in one.labels)): one.value
        for one in samples
        if one.name.startswith("ray_promptkd_")
    }


def test_ray_serves_the_numbers_of_a_run_as_long_as_it_lasts(local_ray):
    wanted = {
        ("ray_promptkd_train_loss", "flowers"): 0.5,
        ("ray_promptkd_student_waited_labels", "flowers", "3"): 0.25,
        ("ray_promptkd_students_waited_labels", "flowers"): 0.125,
        ("ray_promptkd_teacher_queue", "flowers", "0"): 4,
        ("ray_promptkd_skipped", "flowers", "undecodable"): 2,
    }
    aside = Aside("Ray's metrics", lambda: RayMetrics("flowers"))
    aside.put(Point(20, time.time(), VALUES))
    deadline = time.monotonic() + 120
    while served() != wanted:
        assert time.monotonic() < deadline, served()
        time.sleep(1)
    time.sleep(30)  # Ray forgets what has not been set for 20 seconds
    assert served() == wanted
    aside.put(Point(30, time.time(), {"train/loss": 0.25}))
    while served() != wanted | {("ray_promptkd_train_loss", "flowers"): 0.25}:
        assert time.monotonic() < deadline + 60, served()
        time.sleep(1)
    aside.end(finished=True)
    aside.join(60)
    while served():
        assert time.monotonic() < deadline + 120, served()
        time.sleep(1)
