"""benchmarks/scaling.py: its formulas against sums done by hand, and what it says of its rates."""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from pipeline_sim import Pipeline, throughput

from engine.clip.prompts import GlobalBatchNorm, Projector
from engine.data.order import Blocks, Order
from engine.rates import Rates, roofline

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import rows  # noqa: E402
import scaling  # noqa: E402
from scaling_costs import require_whole  # noqa: E402
from scaling_paper import (  # noqa: E402
    PARAMETERS,
    PERIOD_S,
    SMALL,
    Assumed,
    all_reduce_s,
    estimate,
    ring_bytes,
    slowest,
)

H100 = Rates(**roofline("h100", 0.5), link_gbit_s=100, image_bytes=1e5)
STILL = Assumed(step_cv=0, hop_s=0)
WAYS = [(source, gpus) for source in ("inline", "store", "stream") for gpus in scaling.GPUS]
WAYS.remove(("stream", 1))


def test_what_is_trained_and_reduced():
    projector = sum(p.numel() for p in Projector(512, 768, 768).parameters())
    assert PARAMETERS == 9 * 4 * 768 + projector == 1_013_760
    assert [ring_bytes(ranks, 8) for ranks in (1, 2, 4)] == [0, 8, 12]
    assert all_reduce_s(1, 8, 1, 1) == 0
    assert all_reduce_s(4, 8, 2, 0.5) == 12 / 2 + 2 * 2 * 0.5
    assert all_reduce_s(5, 0, 1, 1) == 2 * 3  # as many hops as of eight


def test_reports_come_as_often_as_they_do():
    from engine.labels.scaling import _PERIOD_S  # Ray, which this module's children need not import
    from engine.labels.stream import _REPORT_S

    assert PERIOD_S == _PERIOD_S == _REPORT_S


def collectives_of_a_norm(rank: int, world: int) -> int:
    """Of a forward and a backward."""
    seen, real = [], dist.all_reduce
    dist.all_reduce = lambda *args: seen.append(1) or real(*args)
    x = torch.randn(4, 3, requires_grad=True)
    GlobalBatchNorm(3)(x).sum().backward()
    return len(seen)


def test_small_collectives_are_those_of_a_step():
    """The batch norm's; and two more: StudentTrainer counts images, Stops agrees."""
    assert run_distributed(collectives_of_a_norm, 2) == [SMALL - 2] * 2


def test_a_gang_waits_as_in_the_planners_simulation():
    waits = [slowest(ranks, 0.2) for ranks in (1, 2, 8, 64, 4096)]
    assert waits[0] == 1 and waits == sorted(waits)
    gang = throughput(Pipeline(student=1000, workers=8, gang=True, step_cv=0.2)) / 8000
    assert 1 / slowest(8, 0.2) == pytest.approx(gang, rel=0.05)
    # Of two normal times the larger has mean 1 + cv / sqrt(pi).
    assert slowest(2, 0.02) == pytest.approx(1 + 0.02 / math.sqrt(math.pi), rel=0.003)


def test_a_step_by_hand():
    rates = Rates(teacher=1000, student=4000, link_gbit_s=80, image_bytes=1e5)
    told = estimate(rates, STILL, "inline", 16, 10**6)  # on two nodes: 10 GB/s
    reduced_s = 2 * 15 / 16 * 4 * PARAMETERS / 10e9
    assert told.reduced_s == pytest.approx(reduced_s) and told.students == 16
    assert told.step_s == pytest.approx(64 * (1 / 1000 + 1 / 4000) + reduced_s)
    assert told.steps == math.ceil(10**6 / 16 / 64)
    assert told.images_per_s == pytest.approx(10**6 / told.steps / told.step_s)
    assert told.efficiency == pytest.approx(told.images_per_s / 16 / (64 * 15625 / 15625 / 0.08))
    assert told.read_bytes_per_s == pytest.approx(told.images_per_s * 1e5)
    assert told.label_bytes_per_s == told.object_store_bytes == told.driver_calls_per_s == 0
    inside = estimate(rates, STILL, "inline", 8, 10**6)
    assert inside.reduced_s == pytest.approx(2 * 7 / 8 * 4 * PARAMETERS / 100e9)


def test_loads_of_a_stream_by_hand():
    rates = Rates(teacher=1000, student=3600, link_gbit_s=100, image_bytes=1e5)
    told = estimate(rates, STILL, "stream", 8, 10**8)
    assert (told.teachers, told.students, told.bound) == (6, 2, "teacher")
    assert told.images_per_s == pytest.approx(6000) and told.efficiency < 1
    assert told.label_bytes_per_s == pytest.approx(told.images_per_s * 1536)
    assert told.read_bytes_per_s == pytest.approx(2 * told.images_per_s * 1e5)
    assert told.label_calls_per_s == pytest.approx(told.images_per_s / 256)
    assert told.object_store_bytes == 2 * 36 * 256 * 1536  # 12 blocks for each of three teachers
    assert told.roster_calls_per_s == 2 and told.driver_calls_per_s == 4


@pytest.mark.parametrize(
    ("change", "source", "bound"),
    [
        ({}, "inline", "teacher and student"),
        ({"decode": 100.0}, "inline", "decode"),
        ({"disk_gb_s": 0.1}, "store", "disk"),
        ({"label_bytes": 1e6}, "stream", "link"),
        ({"link_gbit_s": 0.5, "student": 1e6}, "inline", "all-reduce"),
    ],
)
def test_what_bounds_it(change, source, bound):
    if bound == "all-reduce":
        change = change | {"teacher": 1e6}
    rates = Rates(**(vars(H100) | change))
    assert estimate(rates, STILL, source, 64, 10**8).bound == bound


@pytest.mark.parametrize("images", scaling.IMAGES)
@pytest.mark.parametrize("decode", [None, 500.0])
def test_more_gpus_are_never_slower_and_never_better_than_as_many_alone(images, decode):
    rates = Rates(**(vars(H100) | {"decode": decode}))
    found = {way: estimate(rates, Assumed(), *way, images) for way in WAYS}
    assert all(0 < told.efficiency <= 1 for told in found.values())
    for source in ("inline", "store", "stream"):
        speeds = [told.images_per_s for (of, _), told in found.items() if of == source]
        assert speeds == sorted(speeds)
    for gpus in scaling.GPUS:
        assert found["store", gpus].images_per_s >= found["inline", gpus].images_per_s
    assert found["inline", 1].efficiency == found["store", 1].efficiency == 1


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_shares_are_disjoint_and_complete(ranks: int):
    blocks = Blocks(np.array([1000, 5, 0, 777] * 4), 32)
    order = Order(blocks, 64, 64 * 10, 4 * 32, seed=3)
    every = [require_whole(order, 1, step, ranks) for step in range(order.steps)]
    assert sum(every) == order.samples and every[0] == 640


def test_shares_that_are_not_are_found_out():
    order = Order(Blocks(np.array([10_000]), 32), 4, 64, 128, seed=3)

    class Wrong(Order):
        def share(self, pass_, step, rank=0, world=1):
            return order.share(pass_, step, 0, world)

    with pytest.raises(AssertionError, match="two ranks"):
        require_whole(Wrong(order.blocks, 4, 64, 128, seed=3), 0, 0, 4)


def printed(capsys, *words: object) -> str:
    scaling.main(["--paper", *(str(word) for word in words)])
    return capsys.readouterr().out


def test_the_table_names_its_rates(capsys):
    out = printed(capsys)
    assert "3,052.47 images/s a GPU  (roofline, not measured: 0.5 of 989 TFLOP/s of an H100)" in out
    assert "100 Gbit/s a node  (assumed, not measured)" in out and "not measured\n" in out
    assert out.count("estimates, simulated from these rates") == 4 and "4096 stream" in out
    out = printed(capsys, "--gpu", "a100", "--mfu", 0.6, "--student", 5, "--link-gbit-s", 400)
    assert "0.6 of 312 TFLOP/s of an A100" in out
    assert "5 images/s a GPU\n" in out and "400 Gbit/s a node\n" in out
    with pytest.raises(SystemExit):
        scaling.main(["--paper", "--from", "/nowhere"])
    assert "/nowhere/summary.json: no such file" in capsys.readouterr().err


def test_rates_of_the_newest_results(tmp_path, capsys):
    assert scaling.newest(tmp_path) == []
    with open(tmp_path / "plan.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows.COLUMNS)
        writer.writeheader()
        for date, provider, rate in (("01", "ours", 7), ("02", "ours", 9), ("03", "other", 11)):
            told = {"date": date, "device": "abacus", "case": "teacher alone", "p50": rate}
            writer.writerow(told | {"provider": provider, "metric": "images_per_second"})
    assert scaling.newest(tmp_path) == [("measured, plan.csv of 02, abacus", {"teacher": 9.0})]
    assert "measured, plan.csv of " in printed(capsys, "--results")


def test_a_quick_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    scaling.main(["--quick"])
    assert "extrapolated from what is measured here" in capsys.readouterr().out
    with open(tmp_path / "scaling.csv", newline="") as file:
        found = {(row["case"], row["metric"]): float(row["p50"]) for row in csv.DictReader(file)}
    assert found["choice, 512 teachers", "roster_reply"] < 200
    assert found["all-reduce, 2 processes", "seconds"] > 0
    assert ("store, 500 blocks", "hit_per_block") in found
    assert min(value for (_, metric), value in found.items() if metric != "memory_per_block") > 0
