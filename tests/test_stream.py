"""What the stream of labels leaves in Ray's object store."""

import sys
import time

import numpy as np
import pytest
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import AHEAD, Loader, Work
from engine.data.order import Share
from engine.data.views import ViewPolicy
from engine.labels.roster import Roster
from engine.labels.stream import StreamSource
from engine.labels.targets import BlockView, SoftTargets

STORE_BYTES = 80 << 20  # the least that Ray allows is 75 MiB
LENGTHS = (4, 4, 2, 4, 4, 2, 4)  # of the blocks
WIDTH = 1 << 17  # 1 MiB for a block of 4
VIEWS = 40


class Wide:
    """A teacher of very many classes."""

    def label(self, wanted: BlockView) -> SoftTargets:
        n = LENGTHS[wanted.block]
        values = np.full((n, WIDTH), wanted.view + wanted.block, np.float16)
        return SoftTargets("logits", values, None, np.ones(n, bool), "f")


@pytest.fixture
def small_store():
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no module for a worker
    yield
    ray.shutdown()


@pytest.mark.ray
def test_labels_that_have_come_leave_the_object_store(small_store, corpus_folder):
    """Three times what it holds goes through it, and nothing of it is put on a disk."""
    teachers = [ray.remote(Wide).options(num_cpus=0).remote() for _ in range(2)]
    roster = ray.remote(Roster).options(num_cpus=0).remote()
    ray.get(roster.set.remote((ray.put(teachers),), "", ()))
    corpus = Corpus.open(str(corpus_folder), 4)
    told = {"shards": "f"}, {"shards": corpus.blocks}
    source = StreamSource(
        roster, "me/0", *told, "logits", WIDTH, torch.device("cpu"), 4, 1, 60, 40, False
    )
    coming = [(view, block) for view in range(VIEWS) for block in range(len(LENGTHS))]
    works = []
    for step, (view, block) in enumerate(coming):
        n = LENGTHS[block]
        share = Share(np.full(n, block), np.arange(n), np.ones(n, bool))
        works.append(Work("shards", step, view, share, tuple(coming[step : step + AHEAD])))
    loader = Loader(corpus, Decoder(ViewPolicy(3, 16), "cpu", 1), works, 1 << 20, 1)
    for batch, (view, block) in zip(loader, coming, strict=True):
        source.request([BlockView("shards", b, v) for v, b in batch.work.soon])
        targets = source.targets(batch)
        assert (targets.values_BX == view + block).all() and targets.valid_B.all()
    loader.close()
    assert source.statement()["received_bytes"] == VIEWS * 24 * WIDTH * 2
    assert VIEWS * 24 * WIDTH * 2 >= 3 * STORE_BYTES
    source.close()
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    deadline = time.monotonic() + 20
    while (stats := get_memory_info_reply(state).store_stats).object_store_bytes_used > 1 << 20:
        assert time.monotonic() < deadline, "labels stay"  # Ray frees objects now and then
        time.sleep(0.2)
    assert stats.spilled_bytes_total == 0 and stats.spilled_objects_total == 0
