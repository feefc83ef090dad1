"""What is known of runs, and how it looks, at several widths."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from engine.live import Record, Run, State, line, told, view

GPU = {"gpu_utilisation": 0.875, "gpu_memory_bytes": 61.5 * 2**30, "gpu_power_w": 412.0}


def started(time: float = 1000.0, step: int = 0) -> Record:
    known = {"steps": 4000, "passes": 20, "workers": 2, "effective_weight": 100.0}
    return {"kind": "started", "time": time, "step": step, **known}


def train(time: float, step: int, images_per_second: float = 1000.0) -> Record:
    return {
        "kind": "train",
        "time": time,
        "step": step,
        "steps": 4000,
        "pass_": 2,
        "images_per_second": images_per_second,
        "loss": 0.25,
        "agreement": 0.812,
    }


def worker(rank: int, **more: Any) -> Record:
    numbers = {"span_s": 5.0, "labels_s": 1.0, "data_s": 0.25, "images": 2000 + 100 * rank}
    told = {"kind": "worker", "time": 1010.0, "rank": rank, "host": f"node-{rank}", "step": 9}
    return {**told, **numbers, "skipped": {}, **more}


def teacher(name: str, time: float = 1010.0, **more: Any) -> Record:
    busy = {"span_s": 6.0, "read_s": 0.6, "decode_s": 1.5, "forward_s": 4.5, "write_s": 0.0}
    told = {"kind": "teacher", "time": time, "teacher": name, "host": "gpu-node-17.example.org"}
    return {**told, **busy, "queue": 3, "images": 6000, **more}


def state_of(records: Iterable[Record], names: tuple[str, ...] = ("run",)) -> State:
    state = State({name: Run() for name in names})
    for record in records:
        for name in names:
            state = told(state, name, record)
    return state


def shown(state: State, width: int, height: int = 50, now: float = 1012.0) -> list[str]:
    """Lines, as a terminal of that size would show them."""
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(view(state, now, width, height))
    lines = console.file.getvalue().splitlines()
    assert all(len(one.rstrip()) <= width for one in lines), "a line is wrapped"
    return [one.rstrip() for one in lines]


def test_a_run_before_its_first_step_says_so():
    assert any("waiting for the first step" in one for one in shown(state_of([]), 40))
    assert "effective weight 100" in " ".join(shown(state_of([started()]), 80))


def test_the_mean_and_what_is_left_follow_from_the_records():
    """100 steps in 10 s, the first of them slow, then 10 a second; and 3000 images of 2 s."""
    state = state_of([started(), train(1008.0, 1), train(1010.0, 101, 1500.0)])
    run = state.runs["run"]
    assert run.images / run.span_s == pytest.approx((8 * 1000 + 2 * 1500) / 10)
    assert run.left_s(1010.0) == pytest.approx((4000 - 101) * 0.02)
    assert run.left_s(1020.0) == pytest.approx((4000 - 101) * 0.02 - 10)
    parts = "step 101/4000 · pass 3/20 · ETA 0:01:17 · 1,500 img/s, mean 1,100 · loss 0.250"
    assert line(run, 1010.0) == f"{parts} · agreement 81.2 %"
    faster = told(state, "run", train(1070.0, 6101 - 3000)).runs["run"]
    assert faster.pace_s == pytest.approx(0.02), "as before"
    slower = told(state, "run", train(1070.0, 701)).runs["run"]
    assert 0.05 < slower.pace_s < 0.1, "it follows a change"


def test_a_new_life_of_the_workers_goes_on_from_its_checkpoint():
    before = state_of([started(), train(1010.0, 100), train(1020.0, 200)])
    after = told(before, "run", started(1050.0, 150))
    run = told(after, "run", train(1060.0, 160)).runs["run"]
    assert run.pace_s == 1.0 and run.span_s == 30.0, "the time without workers counts for nothing"


def test_a_run_without_news_says_so():
    state = state_of([started(), train(1010.0, 100)])
    assert "no word" not in " ".join(shown(state, 80, now=1100.0))
    assert "no word for 0:05:00" in " ".join(shown(state, 80, now=1310.0))
    seldom = told(state, "run", train(1210.0, 110))  # it logs every 200 s
    assert "no word" not in " ".join(shown(seldom, 80, now=1510.0))


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (40, "busy labels queue img/s"),
        (80, "busy labels data queue img/s GPU memory power"),
        (140, "host busy labels data queue img/s GPU memory power"),
    ],
)
def test_columns_that_do_not_fit_are_left_out(width, heads):
    records = [started(), train(1010.0, 100), worker(0, **GPU), worker(1, **GPU)]
    records += [teacher("0", **GPU), teacher("10", **GPU)]
    lines = shown(state_of(records), width)
    text = "\n".join(lines)
    (head,) = (one for one in lines if one.lstrip().startswith(("busy", "host")))
    assert head.split() == heads.split()
    assert "step 100/4000" in text and "loss 0.250" in text and "agreement 81.2 %" in text
    assert "effective weight 100" in text and "1,000 img/s, mean 1,000" in text
    (one,) = (one for one in lines if one.startswith("student 1"))
    (other,) = (one for one in lines if one.startswith("teacher 10"))
    assert "75 %" in one and "20 %" in one and "75 %" in other
    assert "420" in one and "1,000" in other
    if width > 40:
        assert "5 %" in one and "88 %" in one and "61.5 GiB" in one and "3" in other.split()
    if width == 140:
        assert "412 W" in other and "gpu-node-17.example…" in other and "node-1" in one


def test_columns_without_numbers_are_left_out():
    """Of a run whose teacher is in its worker, on a CPU."""
    text = "\n".join(shown(state_of([started(), train(1010.0, 9), worker(0)]), 140))
    assert "queue" not in text and "GPU" not in text and "teacher" not in text


def test_what_is_skipped_is_added_up_over_workers():
    records = [worker(0, skipped={"undecodable": 7, "teacher": 1})]
    records += [worker(1, skipped={"undecodable": 1000})]
    text = "\n".join(shown(state_of([train(1010.0, 9), *records]), 80))
    assert "skipped so far: undecodable 1,007 · teacher 1" in text
    again = "\n".join(shown(state_of([*records, worker(1, skipped={"changed": 2})]), 80))
    assert "skipped so far: undecodable 7 · changed 2 · teacher 1" in again


@pytest.mark.parametrize("width", (40, 80, 140))
def test_many_students_and_teachers_are_told_by_their_mean(width):
    records = [started(), train(1010.0, 9)]
    records += [*(worker(rank) for rank in range(64)), *(teacher(f"{n}") for n in range(20))]
    lines = shown(state_of(records), width)
    assert sum(one.startswith("student") for one in lines) == 7
    assert sum(one.startswith("teacher") for one in lines) == 7
    (students,) = (one for one in lines if one.startswith("and 57 more"))
    (teachers,) = (one for one in lines if one.startswith("and 13 more"))
    assert str(400 + 20 * (7 + 63) // 2) in students.replace(",", "") and "1,000" in teachers
    low = shown(state_of(records), width, height=14)
    assert len(low) <= 14 and any("57" not in one and "more" in one for one in low)


@pytest.mark.parametrize("width", (40, 80, 140))
def test_several_runs_share_their_teachers(width):
    names = ("vit-b-16-with-a-long-name", "small")
    records = [started(), train(1010.0, 100), worker(0), worker(1), teacher("0"), teacher("1")]
    lines = shown(state_of(records, names), width)
    assert sum("step 100/4000" in one for one in lines) == 2
    assert sum(one.startswith("teacher") for one in lines) == 2
    assert sum(one.startswith("small/") for one in lines) == 2
    assert sum(one.startswith("vit-b-16") for one in lines) == 3
    assert width == 140 or any("…/1 " in one for one in lines), "a name is cut before its rank"


def test_a_teacher_that_is_gone_is_left_out():
    state = state_of([train(1010.0, 9), teacher("0", 1010.0), teacher("1", 1100.0)])
    lines = shown(state, 80, now=1101.0)
    assert [one.split()[1] for one in lines if one.startswith("teacher")] == ["1"]


def test_a_first_stage_has_an_accuracy_and_no_workers():
    record = {key: value for key, value in train(1010.0, 9).items() if key != "agreement"}
    text = "\n".join(shown(state_of([record | {"accuracy": 0.5}]), 80))
    assert "accuracy 50.0 %" in text and "busy" not in text
