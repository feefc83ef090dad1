import pytest

from engine.cluster import threads_of

NODE = {"CPU": 96.0, "GPU": 8.0}


@pytest.mark.parametrize(
    "gpus, have, threads",
    [
        (1, NODE, 12),
        (0.5, NODE, 6),
        (0, NODE, 1),
        (1, {"CPU": 4.0, "GPU": 8.0}, 1),
        (1, {"CPU": 100.0, "GPU": 8.0}, 12),
        (1, {"GPU": 1.0}, 1),
        (1, {"CPU": 2.0}, 1),
    ],
)
def test_a_gpus_share_of_the_cpus(gpus, have, threads):
    assert threads_of(gpus, have) == threads
