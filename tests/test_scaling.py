"""How many teachers there are, and where."""

from collections import Counter
from pathlib import Path

import pytest
import ray
from distributed import run_apart
from domains import config_of, write_domain
from hypothesis import given
from hypothesis import strategies as st
from ray.cluster_utils import Cluster

from engine.labels import scaling
from engine.labels.pool import start_teacher
from engine.labels.scaling import Node, decided, placed
from engine.run import distill


def places(nodes: list[Node], teachers: int) -> Counter[str]:
    taken: Counter[str] = Counter()
    for _ in range(teachers):
        taken[placed(nodes, taken)] += 1
    return taken


def test_teachers_lie_on_nodes_in_proportion_to_their_size():
    nodes = [Node("a", 8), Node("b", 4), Node("c", 4)]
    assert places(nodes, 4) == {"a": 2, "b": 1, "c": 1}
    assert places(nodes, 16) == {"a": 8, "b": 4, "c": 4}
    assert places(nodes, 1) == {"a": 1}
    assert places([Node("b", 1), Node("a", 1)], 3) == {"a": 2, "b": 1}


@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(0, 60))
def test_no_node_has_a_teacher_more_than_its_share(sizes, teachers):
    nodes = [Node(str(number), size) for number, size in enumerate(sizes)]
    taken = places(nodes, teachers)
    assert taken.total() == teachers
    for node in nodes:
        assert taken[node.id] < teachers * node.size / sum(sizes) + 1


def test_teachers_are_started_where_students_wait_and_stopped_where_there_is_room():
    assert decided(1, 1, 4, waiting=0.5, busy=1.0) == 2
    assert decided(4, 1, 4, waiting=0.5, busy=1.0) == 4
    assert decided(2, 1, 4, waiting=0.0, busy=0.3) == 1
    assert decided(2, 1, 4, waiting=0.0, busy=0.5) == 2  # one would be at its limit
    assert decided(2, 2, 4, waiting=0.0, busy=0.0) == 2
    assert decided(1, 1, 4, waiting=0.0, busy=0.0) == 1
    assert decided(3, 1, 4, waiting=0.05, busy=0.1) == 3  # neither


@given(st.integers(1, 8), st.floats(0, 1), st.floats(0, 1))
def test_the_number_changes_by_one_and_keeps_its_bounds(now, waiting, busy):
    told = decided(now, 1, 8, waiting, busy)
    assert abs(told - now) <= 1 and 1 <= told <= 8


@pytest.mark.ray
@pytest.mark.slow
def test_one_more_teacher_is_started_for_a_student_that_waits(
    local_ray, tmp_path, monkeypatch, capsys
):
    """Whose teacher labels image by image."""
    monkeypatch.setattr(scaling, "_SETTLED_S", 1.0)
    monkeypatch.setattr(scaling, "_PERIOD_S", 0.2)
    domain = write_domain(tmp_path / "domain")
    flags = ["--teacher.actors", "1", "--teacher.max_actors", "2", "--teacher.batch", "1"]
    flags += ["--train.passes", "12", "--student.depth", "1", "--targets.outstanding", "1"]
    summary = distill(config_of(domain, tmp_path, "run", *flags))
    assert "one more teacher, 2" in capsys.readouterr().err
    labels = summary["labels"]
    assert labels["source"] == "stream" and labels["teachers"] == 2
    assert labels["received"] == 12 * 192 + 96
    assert summary["samples"] == 12 * 191


@pytest.mark.ray
@pytest.mark.slow
def test_teachers_are_spread_over_the_machines_of_a_cluster(tmp_path):
    """Two of them, as Ray's own tests make them: processes of this machine, 4 and 2 CPUs large.
    Apart from the other tests, whose cluster this process may be in."""
    run_apart(spread_over_two_machines, tmp_path)


def spread_over_two_machines(folder: Path) -> None:
    domain = write_domain(folder / "domain")
    asked: list[str] = []

    def started(told, roster, node):
        asked.append(node)
        return start_teacher(told, roster, node)

    scaling.start_teacher = started
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        sizes = {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes()}
        flags = ["--targets.source", "stream", "--teacher.actors", "3"]
        summary = distill(config_of(domain, folder, "run", *flags))
        assert Counter(sizes[node] for node in asked) == {4: 2, 2: 1}
        assert summary["labels"]["teachers"] == 3
    finally:
        ray.shutdown()
        cluster.shutdown()
