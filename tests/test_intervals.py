"""What a profile comes to, from intervals made here and from torch's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intervals import Gap, Interval, Tracer, busy_s, gaps, lines, summary

# Two streams: 0..2 and 1..3 overlap, 3..4 follows at once, then nothing until 6.
KERNELS = [
    Interval("gemm", 6.0, 9.0),
    Interval("gemm", 0.0, 2.0),
    Interval("norm", 1.0, 3.0),
    Interval("copy", 3.0, 4.0),
    Interval("inside", 7.0, 7.5),
    Interval("norm", 9.5, 10.0),
]


def test_what_overlaps_counts_once():
    assert busy_s(KERNELS) == 4 + 3 + 0.5
    assert busy_s([]) == 0


def test_gaps_are_between_the_last_to_end_and_the_next_to_begin():
    assert gaps(KERNELS) == [Gap(2.0, "copy", "gemm"), Gap(0.5, "gemm", "norm")]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=30))
def test_busy_time_and_gaps_fill_the_span(spans):
    """Against a row of cells, of which each is covered or is not."""
    told = [Interval(f"{n}", start, start + length) for n, (start, length) in enumerate(spans)]
    cells = np.zeros(100, bool)
    for one in told:
        cells[int(one.start_s) : int(one.end_s)] = True
    assert busy_s(told) == cells.sum()
    first, last = min(one.start_s for one in told), max(one.end_s for one in told)
    assert busy_s(told) + sum(gap.seconds for gap in gaps(told)) == last - first


def test_a_summary_counts_what_lies_outside_the_kernels_as_idle():
    found = summary(KERNELS, wall_s=12.5, on_gpu=True)
    assert found.busy == 7.5 / 12.5
    assert found.top[0] == ("gemm", 5.0, 2) and found.top[1] == ("norm", 2.5, 2)
    assert found.total_s == sum(one.end_s - one.start_s for one in KERNELS)
    text = "\n".join(lines(found, steps=2))
    assert "busy for 60.0%" in text and "2000.000 ms  after copy, before gemm" in text


def test_on_a_cpu_there_is_no_word_of_a_gpu():
    found = summary([Interval("aten::mm", 0.0, 2.0)], wall_s=4.0, on_gpu=False)
    assert found.busy is None and found.gaps == []
    assert "GPU" not in "\n".join(lines(found, steps=1))


def test_operators_count_their_own_time_alone():
    """linear() calls addmm(): between them their time counts once."""
    a = torch.randn(400, 400)
    tracer = Tracer(torch.device("cpu"))
    tracer.start()
    for _ in range(10):
        torch.nn.functional.linear(a, a, a[0])
    tracer.stop()
    found = tracer.summary()
    calls = {name: number for name, _, number in found.top}
    assert calls["aten::linear"] == calls["aten::addmm"] == 10
    assert found.top[0][0] == "aten::addmm" and 0 < found.total_s <= found.wall_s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_are_seen_and_waiting_is_not_busy():
    import time

    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    tracer = Tracer(torch.device("cuda", 0))
    tracer.start()
    a @ a
    torch.cuda.synchronize()
    time.sleep(0.2)
    a @ a
    tracer.stop()
    found = tracer.summary()
    assert found.wall_s > 0.2 and found.busy is not None and 0 < found.busy < 0.5
    assert found.gaps[0].seconds > 0.15
