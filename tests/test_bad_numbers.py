"""Streaks of steps that are not finite, and the samples that were in them."""

import json

import numpy as np
import pytest
import torch

from engine.data.order import Blocks, Order
from engine.train.bad_numbers import (
    NotFinite,
    Streak,
    require_updates,
    samples_of,
    write_samples,
)


def test_a_streak_is_what_counting_by_hand_gives():
    draw = np.random.default_rng(5)
    for _ in range(20):
        bad = draw.random((3, 40)) < 0.7  # workers, steps
        streaks = [Streak(torch.device("cpu")) for _ in bad]
        for step in range(bad.shape[1]):
            for worker, streak in enumerate(streaks):
                streak.add(torch.tensor(float(bad[worker, step])))
            nobody = bad[:, : step + 1].all(axis=0)
            by_hand = len(nobody) - (np.flatnonzero(~nobody).max(initial=-1) + 1)
            assert min(int(streak.length) for streak in streaks) == by_hand


def test_a_streak_goes_on_where_a_life_of_the_run_left_it():
    streak = Streak(torch.device("cpu"), 4)
    streak.add(torch.tensor(1.0))
    assert int(streak.length) == 5


def test_so_many_in_a_row_stop_the_run_and_name_the_steps():
    require_updates(4, 30, 5)
    with pytest.raises(NotFinite, match="in 5 steps in a row, 25 to 29") as raised:
        require_updates(5, 30, 5)
    assert raised.value.steps == range(25, 30)


def test_the_samples_of_steps_are_those_that_the_workers_trained(tmp_path):
    """Two workers' shares of steps that lie in two passes, the first of which ends with padding."""
    blocks = Blocks(np.array([10, 7, 12]), 4)
    order = Order(blocks, lanes=2, batch=6, window_samples=8, seed=3)
    steps = range(order.steps - 2, order.steps + 2)
    trained = []
    for step in steps:
        for rank in range(2):
            share = order.share(*divmod(step, order.steps), rank, 2)
            for block, offset, valid in zip(*share, strict=True):
                at = blocks.at(int(block))
                if valid:
                    trained.append((step, at.shard, at.start + int(offset)))
    found = list(samples_of(order, steps))
    assert sorted(found) == sorted(trained) and len(found) < 4 * 6
    write_samples(tmp_path / "bad.jsonl", order, steps, ("a.tar", "b.tar", "c.tar"))
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(one["step"], "abc".index(one["shard"][0]), one["position"]) for one in lines] == found
