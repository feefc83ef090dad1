import os
import re

import pytest
from distributed import run_apart

from engine import cluster
from engine.cluster import threads_of, wanted
from engine.config import RunConfig, RunFailed, StudentConfig, TeacherConfig, UserError

NODE = {"CPU": 96.0, "GPU": 8.0}


@pytest.mark.parametrize(
    "gpus, have, threads",
    [
        (1, NODE, 12),
        (0.5, NODE, 6),
        (0, NODE, 1),
        (1, {"CPU": 4.0, "GPU": 8.0}, 1),
        (1, {"CPU": 100.0, "GPU": 8.0}, 12),
        (1, {"GPU": 1.0}, 1),
        (1, {"CPU": 2.0}, 1),
    ],
)
def test_a_gpus_share_of_the_cpus(gpus, have, threads):
    assert threads_of(gpus, have) == threads


def test_what_a_run_wants_of_a_cluster_with_nodes_for_each_side():
    teacher = TeacherConfig(actors=24, gpus=1, resource="teacher")
    student = StudentConfig(workers=8, gpus=1, cpus=4, resource="student")
    config = RunConfig(name="x", teacher=teacher)
    assert wanted(config, [student, student], True) == pytest.approx(
        {"CPU": 64, "GPU": 40, "teacher": 0.024, "student": 0.016}
    )
    assert wanted(config, [student], False)["teacher"] == 0
    assert wanted(RunConfig(name="x"), [StudentConfig()], True) == {"CPU": 1, "GPU": 0}


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", "[::1]:9", "ray://127.0.0.1:9", "127.0.0.1:99999"]
)
def test_a_cluster_that_is_not_there_is_not_waited_for(monkeypatch, address):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=rf"^ray\.address: .* answers at {re.escape(address)}: "):
        cluster.start(address)


def start_without_a_folder() -> None:
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_TMPDIR"] = "/proc/nowhere"
    with pytest.raises(RunFailed, match=r"Ray did not start on this machine: .*No such file"):
        cluster.start("")


@pytest.mark.slow
def test_where_ray_does_not_start_it_is_told_in_a_line():
    """In a process of its own: one that has tried has Ray's handlers of signals."""
    run_apart(start_without_a_folder)
