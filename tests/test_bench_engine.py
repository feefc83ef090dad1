"""The benchmark of the whole engine, end to end with models as small as can be."""

import json

import bench_engine
import pytest
import rows
import torch
from bench_engine import QUICK, measure
from distributed import run_apart
from engine_runs import rates
from models import Tower

from engine.report_bench import Row, read

TINY = QUICK._replace(
    name="tiny",
    teacher=Tower(1, 64, 16, 32, 64),
    student=Tower(1, 64, 16, 32, 64),
    batch=8,
    block=8,
    shards=2,
    steps=1,
    warm=1,
    windows=1,
)


def measured(place: str) -> None:
    rows.RESULTS = rows.Path(place)
    measure(TINY, torch.device("cpu"), "auto", 2, None)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[Row]:
    place = tmp_path_factory.mktemp("results")
    run_apart(measured, str(place))  # the process joins a group
    return read(place / "engine.csv")


def by(found: list[Row], case: str) -> dict[tuple[str, str], Row]:
    return {(one.provider, one.metric): one for one in found if one.case == f"{case}, tiny"}


def test_every_case_has_its_rows(found):
    rate = "images_per_second"
    inline, store = by(found, "inline"), by(found, "store")
    sides = ("teacher", "student", "serial", "resident", "shards")
    assert {(side, rate) for side in sides} <= inline.keys()
    assert {(side, rate) for side in ("student", "resident", "shards")} <= store.keys()
    assert ("ours", "inline_over_serial") in inline and ("ours", "replay_over_student") in store
    assert all(one.n == 2 and one.p50 > 0 for one in (*inline.values(), *store.values()))


def test_ratios_are_of_the_same_round(found):
    """With two rounds the median is a mean; of ratios it lies between those of the extremes."""
    inline = by(found, "inline")
    serial, resident = (inline[side, "images_per_second"] for side in ("serial", "resident"))
    teacher, student = (inline[side, "images_per_second"] for side in ("teacher", "student"))
    assert serial.p50 < min(teacher.p50, student.p50)
    ratio = inline["ours", "inline_over_serial"].p50
    low, high = (sorted((one.p20, one.p80)) for one in (resident, serial))
    assert 0.5 * low[0] / high[1] < ratio < 2 * low[1] / high[0]


def test_a_profile_on_a_cpu_tells_of_operators_and_of_no_gpu(found):
    for pixels in ("resident", "shards"):
        told = by(found, f"profile, {pixels}")
        assert told and {metric for _, metric in told} == {"operator_share"}
        assert sum(one.p50 for one in told.values()) <= 1 + 1e-6
        assert all(one.config["calls_a_step"] > 0 for one in told.values())


def test_rows_tell_what_was_run(found):
    config = found[0].config
    assert config["teacher_precision"] == "fp32" and config["B"] == 8
    assert "cores" in config["decodes"]


def test_rates_are_of_steps_alone(tmp_path):
    records = [
        {"kind": "train", "images_per_second": 5.0},
        {"kind": "notice", "text": "a word"},
        {"kind": "train", "images_per_second": 7.0},
    ]
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    assert rates(tmp_path / "m.jsonl") == [5.0, 7.0]


def test_sizes_fit_their_runs():
    """Blocks fill shards and steps, so that no step is padded."""
    for size in (bench_engine.GPU, bench_engine.CPU, QUICK, TINY):
        assert size.batch % size.lanes == 0
        assert size.all_steps > size.warm * size.steps
        assert size.teacher.pixels == size.student.pixels
