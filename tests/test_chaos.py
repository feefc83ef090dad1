"""What the chaos benchmark makes of a run's records."""

import pytest
from chaos import Step, stood_still_s, surviving_s

# A step a second; after step 4 nothing for 9 s, then 3 and 4 anew, and on.
STEPS = [*map(Step, [1.0, 2.0, 3.0, 4.0, *map(float, range(13, 19))], [1, 2, 3, 4, *range(3, 9)])]


def test_goodput_counts_what_survives_and_no_stall():
    told = surviving_s(STEPS)
    # Step 2 and 5 to 8 took a second each; 3, made anew, 9 s of waiting, of which 2 count; 4 one.
    assert told.goodput == pytest.approx(1 + 2 + 1 + 4)
    assert told.share == pytest.approx(8)  # all eight at a second


def test_recovery_ends_with_a_step_never_done_before():
    assert stood_still_s(STEPS, 4.5) == pytest.approx(15 - 4.5)
    assert stood_still_s(STEPS, 15.5) == pytest.approx(1)
