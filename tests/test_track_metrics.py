"""What records of a run come to, as numbers with names."""

import math

import pytest

from engine.track.metrics import EACH, METRICS, Reader
from engine.track.ray_metrics import _split

TRAIN = {
    "kind": "train",
    "time": 100.0,
    "step": 20,
    "steps": 80,
    "pass_": 1,
    "loss": 0.5,
    "kl": 0.25,
    "agreement": 0.75,
    "not_finite": 0,
    "images_per_second": 123.0,
    "lr": 1e-3,
    "waited_labels_s": 3.0,
    "labels": {"asked": 4},
}


def worker(rank: int, labels_s: float = 1.0, **more) -> dict:
    told = {"kind": "worker", "time": 101.0, "rank": rank, "host": "h", "step": 20, "span_s": 5.0}
    return told | {"labels_s": labels_s, "data_s": 0.5, "images": 640} | more


def teacher(name: str, queue: int = 3, **more) -> dict:
    told = {"kind": "teacher", "time": 102.0, "teacher": name, "host": "h", "span_s": 10.0}
    busy = {"read_s": 1.0, "decode_s": 2.0, "forward_s": 4.0, "write_s": 0.5}
    return told | busy | {"queue": queue, "images": 1000} | more


def values(reader: Reader, *records: dict) -> dict[str, float]:
    """All that these have said, the last of each name."""
    return {
        name: value
        for record in records
        for point in reader.read(record)
        for name, value in point.values.items()
    }


def test_a_training_record_is_told_at_its_step():
    (point,) = Reader().read(TRAIN)
    assert (point.step, point.time_s, point.again, point.text) == (20, 100.0, False, "")
    assert point.values == {
        "train/loss": 0.5,
        "train/kl": 0.25,
        "train/agreement": 0.75,
        "train/images_per_second": 123.0,
        "train/lr": 1e-3,
        "train/not_finite": 0,
        "train/pass": 2,
        "train/progress": 0.25,
    }


def test_workers_and_teachers_tell_shares_of_their_time():
    reader = Reader()
    gpu = {"gpu_utilisation": 0.9, "gpu_memory_bytes": 2e9, "gpu_power_w": 300.0}
    assert values(reader, TRAIN, worker(0, **gpu))["student/0/waited_labels"] == 0.2
    (point,) = reader.read(teacher("7", no_gpu="the run is on the CPU"))
    assert point.step == 20  # a teacher knows none, and has that of the last record
    assert point.values == {
        "teacher/7/busy": 0.4,
        "teacher/7/read": 0.1,
        "teacher/7/decode": 0.2,
        "teacher/7/forward": 0.4,
        "teacher/7/write": 0.05,
        "teacher/7/queue": 3,
        "teacher/7/images_per_second": 100.0,
    }


def test_means_are_over_all_who_have_told_since_the_last():
    reader = Reader()
    first = values(reader, *(worker(rank, labels_s=rank) for rank in range(5)))
    assert not any(name.startswith("students/") for name in first)
    second = values(reader, worker(0, labels_s=5.0))
    assert second["students/waited_labels"] == pytest.approx(2 / 5)  # of 0 to 4 s, in 5 s
    assert second["student/0/waited_labels"] == 1.0
    (last,) = reader.end({}, 200.0)
    assert last.values["students/waited_labels"] == 1.0  # of the round that has begun since


def test_no_more_than_some_are_told_one_by_one():
    reader = Reader()
    many = 4 * EACH
    records = [worker(rank) for rank in range(many)] + [teacher(f"{n}") for n in range(many)]
    told = values(reader, *records, *records, TRAIN)
    for group in ("student", "teacher"):
        assert len({name.split("/")[1] for name in told if name.startswith(f"{group}/")}) == EACH
    assert told["students/waited_labels"] == pytest.approx(0.2) and told["teachers/queue"] == 3
    reasons = {f"reason {n}": 1 for n in range(many)}
    told = values(reader, worker(0, skipped=reasons), TRAIN)
    skipped = {name: value for name, value in told.items() if name.startswith("skipped/")}
    assert len(skipped) == EACH + 1 and sum(skipped.values()) == many
    assert skipped["skipped/other"] == many - EACH


def test_what_all_workers_have_skipped_is_added_up():
    reader = Reader()
    values(reader, worker(0, skipped={"undecodable": 2}), worker(1, skipped={"undecodable": 1}))
    told = values(reader, worker(1, skipped={"undecodable": 3, "crashed/odd": 1}), TRAIN)
    assert told["skipped/undecodable"] == 5 and told["skipped/crashed-odd"] == 1
    # Rank 0 of workers that were started anew counts what all before them have skipped.
    started = {"kind": "started", "time": 1.0, "step": 10, "steps": 80}
    told = values(reader, started, worker(0, skipped={"undecodable": 4}), TRAIN)
    assert told["skipped/undecodable"] == 4


def test_workers_that_start_make_void_what_comes_after_their_checkpoint():
    reader = Reader()
    (point,) = reader.read({"kind": "started", "time": 1.0, "step": 10, "steps": 80})
    assert point.again and point.step == 11 and point.values == {}


def test_scores_notices_and_the_end():
    reader = Reader()
    reader.read(TRAIN)
    scores = {"base": 80.0, "novel": None, "hm": None, "all": 70.0, "agreement": None}
    (point,) = reader.read({"kind": "pass", "time": 3.0, "pass_": 1, "student": scores})
    assert point.step == 20 and point.values == {"evaluation/base": 80.0, "evaluation/all": 70.0}
    (point,) = reader.read({"kind": "notice", "time": 4.0, "text": "a decoder died"})
    assert point.text == "a decoder died" and point.values == {}
    for kind in ("probe", "skipped", "what there may be one day"):
        assert reader.read({"kind": kind, "time": 5.0}) == []
    summary = {
        "name": "a",
        "images_per_second": 100.0,
        "steps": 80,
        "student_after": scores,
        "wait_fraction": {"labels": 0.1, "data": 0.2},
        "skipped": {"undecodable": 2},
        "rollbacks": [],
    }
    (point,) = reader.end(summary, 9.0)
    assert point.values == {
        "final/images_per_second": 100.0,
        "final/steps": 80,
        "final/student_after/base": 80.0,
        "final/student_after/all": 70.0,
        "final/wait_fraction/labels": 0.1,
        "final/wait_fraction/data": 0.2,
        "final/skipped/undecodable": 2,
    }
    assert Reader().end({}, 9.0) == []


def test_numbers_that_are_none_stay_as_they_are():
    told = values(Reader(), TRAIN | {"loss": math.nan})
    assert math.isnan(told["train/loss"])


def test_every_name_is_described():
    reader = Reader()
    gpu = {"gpu_utilisation": 0.9, "gpu_memory_bytes": 2e9, "gpu_power_w": 300.0}
    one = worker(0, skipped={"undecodable": 1}, **gpu)
    records = [one, one, teacher("0", **gpu), teacher("0", **gpu), TRAIN]
    assert {_split(name)[0] for name in values(reader, *records)} == METRICS.keys()
