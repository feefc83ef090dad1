"""The benchmark of the whole engine, end to end with models as small as can be."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import bench_engine
import pytest
import rows
import torch
from bench_engine import QUICK, Rows, measure
from distributed import run_apart
from engine_runs import rates
from models import Tower
from rows import Bench

from engine.report.bench import Row, read

TINY = QUICK._replace(
    name="tiny",
    teacher=Tower(1, 64, 16, 32, 64),
    student=Tower(1, 64, 16, 32, 64),
    batch=8,
    block=8,
    shards=2,
    steps=1,
    warm=1,
    windows=2,
)


def measured(place: str) -> None:
    rows.RESULTS = rows.Path(place)
    measure(TINY, torch.device("cpu"), "auto", 1, None)


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
    assert all(one.n == 1 and one.p50 > 0 for one in (*inline.values(), *store.values()))


def test_ratios_are_of_the_same_round(tmp_path, monkeypatch):
    """The machine is twice as fast in the second round, and ten times in the third."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    made = {"teacher": [300, 600, 3000], "student": [600, 1200, 6000], "resident": [190, 400, 1980]}
    order: list[str] = []

    def side(name: str) -> Callable[[], list[float]]:
        values = iter(made[name])

        def windows() -> list[float]:
            order.append(name)
            return [0.0, float(next(values)), 1e9]

        return windows

    rig = SimpleNamespace(size=TINY, decodes="", photos=SimpleNamespace(config={}))
    told = Rows(Bench("engine"), rig, 3, "fp32")
    ratios = {"inline_over_serial": ("resident", "serial"), "absent": ("shards", "resident")}
    told.compared("inline", {name: side(name) for name in made}, ratios)
    found = by(read(tmp_path / "engine.csv"), "inline")
    assert found["serial", "images_per_second"].p50 == 400  # of 200, 400 and 2000
    assert found["ours", "inline_over_serial"].p50 == 0.99  # of 0.95, 1 and 0.99
    assert ("ours", "absent") not in found, "what was not measured has no row"
    assert order == [*made, *reversed(made), *made]


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
        assert size.windows > 1, "the first is traced until the second begins"
        assert size.teacher.pixels == size.student.pixels
