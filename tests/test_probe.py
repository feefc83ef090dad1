"""Probes and samples left out, against plain arithmetic and the order of the run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.loader import Batch, Work
from engine.data.order import Blocks, Order
from engine.train.bad_numbers import samples_of
from engine.train.probe import Probes, Skipped, compared

BATCH, CLASSES, WIDTH, SCALE = 96, 7, 5, 30.0
ORDER = Order(Blocks(np.array([150, 90, 48]), 20), 4, BATCH, 40, 3)


def batch_of(step: int, reasons: dict[int, str] | None = None) -> Batch:
    """Of one worker, which is all of the step."""
    share = ORDER.share(0, step, 0, 1)
    why = tuple((reasons or {}).get(row) for row in range(BATCH))
    valid = share.valid & np.array([one is None for one in why])
    images = torch.zeros(BATCH, 3, 1, 1, dtype=torch.uint8)
    return Batch(Work("shards", step, 4, share), images, valid, why, np.full(BATCH, -1))


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_both_answers_are_those_of_the_definitions():
    dice = torch.Generator().manual_seed(0)
    x_BD, w_ND = torch.randn(9, WIDTH, generator=dice), torch.randn(CLASSES, WIDTH, generator=dice)
    w_ND /= w_ND.norm(dim=-1, keepdim=True)
    z_BN = 20 * torch.randn(9, CLASSES, generator=dice)
    told = compared(x_BD.half(), z_BN, w_ND, SCALE).double()
    p_BN = torch.softmax(z_BN.double(), -1)
    x_BD = x_BD.half().double()
    q_BN = torch.softmax(SCALE * (x_BD / x_BD.norm(dim=-1, keepdim=True)) @ w_ND.double().T, -1)
    entropy = [-sum(p * np.log(p) for p in row if p > 0) for row in p_BN.tolist()]
    wanted = [p_BN.argmax(-1), p_BN.amax(-1), q_BN.argmax(-1), q_BN.amax(-1), torch.tensor(entropy)]
    for got, right in zip(told, wanted, strict=True):
        torch.testing.assert_close(got, right.double(), rtol=1e-3, atol=1e-4)
    even = compared(x_BD, torch.zeros(9, CLASSES), w_ND, SCALE)
    torch.testing.assert_close(even[4], torch.full((9,), np.log(CLASSES)).float())
    sure = torch.full((9, CLASSES), -65504.0)
    sure[:, 2] = 0.0
    assert compared(x_BD, sure, w_ND, SCALE)[4].eq(0).all()


def test_a_probe_names_the_samples_of_its_step(tmp_path):
    """Shards and positions, against all samples of the step; and each row has its own answer."""
    probes = Probes(tmp_path, ORDER, total_steps=3, log_steps=1)
    for step in range(2):
        batch = batch_of(step, {5: "undecodable"})

        def answers(rows: np.ndarray, step: int = step) -> torch.Tensor:
            told = torch.from_numpy(np.stack([rows, rows / 100, rows, rows / 100, rows])).float()
            told[4, 0] = float("nan") if step else 1.0
            return told

        probes.look(step + 1, batch, batch.valid_B, answers)
    probes.close()
    first, second = records(tmp_path / "telemetry" / "probes.jsonl")
    assert (first["kind"], first["step"], first["view"]) == ("probe", 1, 4)
    assert len(first["shard"]) == 64 and len(second["shard"]) == 63, (
        "what is not finite is left out"
    )
    everything = [(shard, position) for _, shard, position in samples_of(ORDER, range(1))]
    places = list(zip(first["shard"], first["position"], strict=True))
    assert places == [everything[row] for row in first["teacher"]]
    assert 5 not in first["teacher"] and len(set(places)) == 64
    assert first["teacher_p"] == pytest.approx([row / 100 for row in first["teacher"]])


@pytest.mark.parametrize(
    ("total", "log_steps", "period"), [(10, 3, 3), (50_000, 10, 30), (1_000_000, 1, 500)]
)
def test_a_long_run_is_not_probed_more_often(tmp_path, total, log_steps, period):
    assert total / period <= 2000
    probes = Probes(tmp_path, ORDER, total, log_steps)
    batch = batch_of(0)
    logged = [*range(log_steps, min(total, 2000), log_steps), total]
    for done in logged:
        probes.look(done, batch, batch.valid_B, lambda rows: torch.zeros(5, len(rows)))
    probes.look(total, batch, np.zeros(BATCH, bool), lambda rows: torch.zeros(5, len(rows)))
    probes.close()
    steps = [one["step"] for one in records(tmp_path / "telemetry" / "probes.jsonl")]
    assert steps == [done for done in logged if done % period == 0 or done == total]


def test_the_first_of_each_reason_are_told(tmp_path):
    skipped = Skipped(tmp_path, ORDER, rank=3)
    file = tmp_path / "telemetry" / "skipped-3.jsonl"
    whole = batch_of(0)
    skipped.add(1, whole, whole.valid_B)
    assert not file.exists()
    bad = {row: "undecodable" for row in range(20)} | {30: "changed"}
    batch = batch_of(1, bad)
    trained = batch.valid_B.copy()
    trained[40] = False  # it has no label
    skipped.add(2, batch, trained)
    skipped.add(3, batch, trained)
    skipped.close()
    told = records(file)
    reasons = [one["reason"] for one in told]
    assert {reason: reasons.count(reason) for reason in reasons} == {
        "undecodable": 12,
        "changed": 2,
        "teacher": 2,
    }
    everything = [(shard, position) for _, shard, position in samples_of(ORDER, range(1, 2))]
    places = [(one["shard"], one["position"]) for one in told if one["step"] == 2]
    assert places == [everything[row] for row in (*range(12), 30, 40)]


def test_a_full_disk_costs_the_probes_alone(tmp_path):
    (tmp_path / "telemetry").mkdir()
    os.symlink("/dev/full", tmp_path / "telemetry" / "probes.jsonl")
    os.symlink("/dev/full", tmp_path / "telemetry" / "skipped-0.jsonl")
    probes, skipped = Probes(tmp_path, ORDER, 3, 1), Skipped(tmp_path, ORDER, 0)
    batch = batch_of(0, {1: "undecodable"})
    probes.look(1, batch, batch.valid_B, lambda rows: torch.zeros(5, len(rows)))
    for done in (1, 2):
        skipped.add(done, batch, batch.valid_B)
    probes.close()
    skipped.close()
