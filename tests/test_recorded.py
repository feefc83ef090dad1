"""Recorded labels in front of a source that makes them, and blocks put together from batches."""

import time

import numpy as np
import pytest
import torch
from recordings import NAMES, SCALE, W_ND, WIDTH, assert_same, labelling, values

from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import Batch, Loader, Work
from engine.data.order import Order, Share
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.labels.assembly import Assembly
from engine.labels.recorded import RecordedSource
from engine.labels.store import Recorded, Store
from engine.labels.targets import BlockView, Form, SoftTargets, Targets, pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(corpus_folder) -> Corpus:
    """24 images in blocks of 8, 2, 8, 2 and 4."""
    return Corpus.open(str(corpus_folder), 8)


@pytest.fixture(params=["features", "logits"])
def ours(request, tmp_path) -> Recorded:
    return Store(str(tmp_path)).open(labelling(form=request.param), add=False)


def batch_of(corpus, view: int, *places: tuple[int, int], padding: int = 0) -> Batch:
    """A decoded batch of samples (block, offset)."""
    blocks, offsets = np.array([*places, *[(0, 0)] * padding]).reshape(-1, 2).T
    share = Share(blocks, offsets, np.arange(len(blocks)) < len(places))
    decoder = Decoder(ViewPolicy(3, 16), "cpu", 1)
    loader = Loader(corpus, decoder, [Work("shards", 0, view, share)], 10_000, 1)
    (batch,) = loader
    loader.close()
    return batch


def label(form: Form, block: int, view: int, length: int) -> torch.Tensor:
    """What the teacher of these tests says."""
    return values(form, length, seed=100 * block + view)


class Teacher:
    """A source that labels, and can tell what it was asked."""

    def __init__(self, corpus, form: Form, dtype: torch.dtype = torch.float32) -> None:
        self.waited_s, self.closed = 1.5, False
        self.requested: list[BlockView] = []
        self.labelled: list[tuple[int, int]] = []
        self._corpus, self._form, self._dtype = corpus, form, dtype

    def request(self, wanted) -> None:
        self.requested += wanted

    def targets(self, batch: Batch) -> Targets:
        share, view = batch.work.share, batch.work.view
        assert (
            len(batch.images_BCHW) == len(batch.reasons) == len(batch.labels_B) == len(share.blocks)
        )
        rows = []
        for block, offset in zip(share.blocks.tolist(), share.offsets.tolist(), strict=True):
            rows.append(
                label(self._form, block, view, self._corpus.blocks.at(block).length)[offset]
            )
            self.labelled.append((block, offset))
        return Targets(self._form, torch.stack(rows).to(self._dtype), batch.valid_B)

    def statement(self) -> dict[str, float]:
        return {"labelled": len(self.labelled)}

    def close(self) -> None:
        self.closed = True


def record(ours: Recorded, corpus, *blocks: int, view: int = 0, invalid: int = 0) -> None:
    for block in blocks:
        length = corpus.blocks.at(block).length
        said, valid = label(ours.form, block, view, length), np.arange(length) >= invalid
        told = pack(ours.form, said, valid, ours.fingerprint, "fp16", W_ND, SCALE)
        ours.put(BlockView("shards", block, view), told)


def source_of(ours: Recorded, corpus, inner, kept: int = 1000) -> RecordedSource:
    return source_on(CPU, ours, corpus, inner, kept)


def source_on(device, ours: Recorded, corpus, inner, kept: int = 1000) -> RecordedSource:
    width = {"features": WIDTH, "logits": len(NAMES)}[ours.form]
    known, blocks = {"shards": ours}, {"shards": corpus.blocks}
    return RecordedSource(known, blocks, inner, kept, ours.form, width, device)


def assert_labelled(found: Targets, batch: Batch, corpus) -> None:
    assert found.values_BX.shape[0] == len(batch.valid_B) == len(found.valid_B)
    share, view = batch.work.share, batch.work.view
    for row in np.flatnonzero(found.valid_B):
        block, offset = int(share.blocks[row]), int(share.offsets[row])
        wanted = label(found.form, block, view, corpus.blocks.at(block).length)[offset]
        torch.testing.assert_close(found.values_BX[row].float(), wanted, rtol=1e-3, atol=1e-3)


def settle(source: RecordedSource, what) -> None:
    """Waits until the readers are done, by asking for nothing new."""
    deadline = time.monotonic() + 10
    while not what():
        source.request([])
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_recorded_is_not_asked(ours, corpus):
    record(ours, corpus, 0, 1, 2)
    inner = Teacher(corpus, ours.form)
    source = source_of(ours, corpus, inner)
    source.request([BlockView("shards", block, 0) for block in range(3)])
    batch = batch_of(corpus, 0, (2, 7), (0, 3), (1, 1), (0, 0), padding=2)
    found = source.targets(batch)
    assert_labelled(found, batch, corpus)
    assert found.valid_B.tolist() == [True] * 4 + [False] * 2
    assert found.values_BX.dtype == torch.float16 and not found.values_BX[4:].any()
    assert inner.requested == [] and inner.labelled == []
    assert source.statement() == {
        "from_store": 4,
        "asked": 0,
        "damaged": 0,
        "unrecorded": 0,
        "labelled": 0,
    }
    assert source.waited_s > inner.waited_s
    source.close()
    assert inner.closed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_rest_is_asked_and_merged(ours, corpus, dtype):
    record(ours, corpus, 0, 3)
    inner = Teacher(corpus, ours.form, dtype)
    source = source_of(ours, corpus, inner)
    source.request([BlockView("shards", block, 0) for block in (4, 0, 2, 3, 1)])
    settle(source, lambda: len(inner.requested) == 3)
    assert [wanted.block for wanted in inner.requested] == [4, 2, 1], "in order"
    batch = batch_of(corpus, 0, (2, 7), (0, 3), (4, 1), (3, 0), (0, 1), padding=1)
    found = source.targets(batch)
    assert_labelled(found, batch, corpus)
    assert found.valid_B.tolist() == [True] * 5 + [False] and found.values_BX.dtype == dtype
    assert inner.labelled == [(2, 7), (4, 1)]
    only = batch_of(corpus, 0, (2, 0), (4, 0), padding=1)
    assert_labelled(source.targets(only), only, corpus)
    told = {"from_store": 3, "asked": 4, "damaged": 0, "unrecorded": 0}
    assert source.statement() == told | {"labelled": 5}  # with the padding, of a whole batch
    source.close()


def test_labels_that_are_not_valid_and_samples_without_pixels(ours, corpus):
    record(ours, corpus, 0, invalid=2)
    source = source_of(ours, corpus, None)
    batch = batch_of(corpus, 0, (0, 1), (0, 2), (2, 0), (0, 3))
    batch.valid_B[2:] = False  # of a block that is not recorded, and of one that is
    found = source.targets(batch)
    assert found.valid_B.tolist() == [False, True, False, False]
    assert source.statement() == {"from_store": 2, "asked": 0, "damaged": 0, "unrecorded": 0}
    source.close()


def test_padding_alone_asks_nobody(ours, corpus):
    inner = Teacher(corpus, ours.form)
    for source in (source_of(ours, corpus, inner), source_of(ours, corpus, None)):
        found = source.targets(batch_of(corpus, 0, padding=3))
        width = {"features": WIDTH, "logits": len(NAMES)}[ours.form]
        assert found.values_BX.shape == (3, width) and not found.valid_B.any()
        assert found.form == ours.form and not inner.labelled
        source.close()


def test_a_store_alone_names_what_it_lacks(ours, corpus):
    record(ours, corpus, 0)
    source = source_of(ours, corpus, None)
    source.request([BlockView("shards", block, 0) for block in (0, 1)])
    with pytest.raises(RuntimeError, match=r"block 1 of shards, view 0, in .*targets\.source auto"):
        source.targets(batch_of(corpus, 0, (0, 0), (1, 1)))
    source.close()


def test_what_others_record_meanwhile_is_found(ours, corpus):
    inner = Teacher(corpus, ours.form)
    source = source_of(ours, corpus, inner)
    wanted, batch = BlockView("shards", 2, 0), batch_of(corpus, 0, (2, 1))
    source.request([wanted])
    source.targets(batch)
    assert inner.labelled == [(2, 1)] and inner.requested == [wanted]
    record(Store(ours.where).open(ours.labelling, add=False), corpus, 2)
    source.request([wanted])
    assert_labelled(source.targets(batch), batch, corpus)
    assert inner.labelled == [(2, 1)] and inner.requested == [wanted]
    source.close()


def test_damage_is_asked_anew(ours, corpus, tmp_path):
    record(ours, corpus, 0)
    (file,) = tmp_path.rglob("*.targets")
    file.write_bytes(file.read_bytes()[:-1])
    inner = Teacher(corpus, ours.form)
    source = source_of(ours, corpus, inner)
    batch = batch_of(corpus, 0, (0, 1))
    assert_labelled(source.targets(batch), batch, corpus)
    assert source.statement() == {
        "from_store": 0,
        "asked": 1,
        "damaged": 1,
        "unrecorded": 0,
        "labelled": 1,
    }
    source.close()


def test_no_more_is_held_than_may_be(ours, corpus):
    record(ours, corpus, *range(5))
    source = source_of(ours, corpus, None, kept=12)
    for _ in range(3):
        source.request([BlockView("shards", block, 0) for block in range(5)])
        assert source._held <= 12
        batch = batch_of(corpus, 0, (0, 0), (1, 1), (2, 7), (3, 1), (4, 3))  # more than is kept
        found = source.targets(batch)
        assert found.valid_B.all() and source._held <= 12
        assert_labelled(found, batch, corpus)
        kept = [wanted.block for wanted in source._reads]
        assert sum(corpus.blocks.at(block).length for block in kept) == source._held
    source.close()


def test_rows_of_a_batch(corpus):
    batch = batch_of(corpus, 5, (0, 1), (2, 2), (1, 0), padding=1)
    which = np.array([False, True, False, True])
    few = batch.rows(which)
    assert few.work.share.blocks.tolist() == [2, 0] and few.work.share.offsets.tolist() == [2, 0]
    assert few.work.share.valid.tolist() == few.valid_B.tolist() == [True, False]
    assert torch.equal(few.images_BCHW, batch.images_BCHW[[1, 3]]) and few.work.view == 5
    assert few.labels_B.tolist() == batch.labels_B[[1, 3]].tolist() and few.reasons == (None, None)


def assembly_of(ours: Recorded, corpus, kept: int = 1000) -> Assembly:
    wire = ours.labelling.wire
    return Assembly({"shards": ours}, {"shards": corpus.blocks}, kept, wire, W_ND, SCALE)


def whole(ours: Recorded, corpus, block: int, view: int) -> SoftTargets:
    said = label(ours.form, block, view, corpus.blocks.at(block).length)
    valid = np.ones(len(said), bool)
    return pack(ours.form, said, valid, ours.fingerprint, ours.labelling.wire, W_ND, SCALE)


@pytest.mark.parametrize("wire", ["fp16", "int8"])
@pytest.mark.parametrize("form", ["features", "logits"])
def test_batches_become_blocks(tmp_path, corpus, form, wire):
    """Those of two ranks, in the order of a run, for two views: every block is there at the end."""
    ours = Store(str(tmp_path)).open(labelling(form=form, wire=wire), add=False)
    order = Order(corpus.blocks, lanes=2, batch=8, window_samples=16, seed=1)
    inner = Teacher(corpus, form)
    for rank in range(2):
        assembly = assembly_of(ours, corpus)
        for view in (0, 1):
            for step in range(order.steps):
                share = order.share(view, step, rank, 2)
                work = Work("shards", step, view, share)
                rows = torch.zeros((len(share.blocks), 3, 16, 16), dtype=torch.uint8)
                nothing = np.full(len(share.blocks), -1)
                batch = Batch(work, rows, share.valid, (None,) * len(rows), nothing)
                found = inner.targets(batch)
                assembly.add(work, found.valid_B, found.form, found.values_BX)
        assembly.close()
    assert ours.missing(0, corpus.blocks) == ours.missing(1, corpus.blocks) == 0
    for view in (0, 1):
        for block in range(5):
            wanted = BlockView("shards", block, view)
            got = ours.get(wanted, corpus.blocks.at(block).length)
            sought = whole(ours, corpus, block, view)
            assert_same(got, sought)
            np.testing.assert_allclose(got.lost_kl, sought.lost_kl, rtol=0.01)


def test_samples_without_pixels_are_seen_and_padding_is_not(ours, corpus):
    assembly = assembly_of(ours, corpus)
    batch = batch_of(corpus, 0, (1, 0), (1, 1), padding=2)  # which names sample 0 of block 0
    found = Teacher(corpus, ours.form).targets(batch)
    assembly.add(batch.work, np.array([True, False, False, False]), found.form, found.values_BX)
    assembly.close()
    assert ours.get(BlockView("shards", 1, 0), 2).valid.tolist() == [True, False]
    assert ours.written == 1


def test_the_oldest_blocks_go_as_parts(ours, corpus):
    assembly = assembly_of(ours, corpus, kept=10)
    teacher = Teacher(corpus, ours.form)
    for places in (((0, 0), (0, 5)), ((2, 1),), ((0, 7), (0, 1))):
        batch = batch_of(corpus, TEST_VIEW, *places)
        found = teacher.targets(batch)
        assembly.add(batch.work, found.valid_B, found.form, found.values_BX)
    assembly.close()
    names = sorted(
        f.rpartition("/")[2] for f, _ in Store(ours.where).folder.files(ours.fingerprint)
    )
    assert [name[:15] for name in names[:3]] == [
        "000000000.00002",
        "000000000.00002",
        "000000002.00001",
    ]
    assert len(names) == 4


def test_the_writers_faults_come_to_light(ours, corpus):
    assembly = assembly_of(ours, corpus)
    batch = batch_of(corpus, 0, (1, 0), (1, 1))
    other: Form = "logits" if ours.form == "features" else "features"
    # Of another form than the labelling says.
    assembly.add(batch.work, batch.valid_B, other, values(other, 2))
    with pytest.raises(AssertionError):
        assembly.close()
    with pytest.raises(AssertionError):
        assembly.add(batch.work, batch.valid_B, other, values(other, 2))


def test_what_is_not_to_be_recorded_is_not(ours, corpus):
    batch = batch_of(corpus, 0, (1, 0), (1, 1))
    found = Teacher(corpus, ours.form).targets(batch)
    assembly = Assembly({}, {}, 100, "fp16", W_ND, SCALE)
    assembly.add(batch.work, found.valid_B, found.form, found.values_BX)
    assembly.close()
    ours.recording = False
    assembly = assembly_of(ours, corpus)
    assembly.add(batch.work, found.valid_B, found.form, found.values_BX)
    assembly.close()
    assert ours.written == 0 and not Store(ours.where).labellings()


@pytest.mark.gpu
def test_labels_on_a_gpu(ours, corpus):
    """Recorded without a wait, and given back where they are needed."""
    device = torch.device("cuda")
    record(ours, corpus, 0)
    batch = batch_of(corpus, 0, (0, 0), (1, 1), (0, 3), (1, 0)).to(device)

    class There(Teacher):
        def targets(self, batch: Batch) -> Targets:
            found = super().targets(batch)
            assembly.add(batch.work, found.valid_B, found.form, found.values_BX.to(device))
            return found._replace(values_BX=found.values_BX.to(device))

    assembly = assembly_of(ours, corpus)
    inner = There(corpus, ours.form)
    source = source_on(device, ours, corpus, inner, 99)
    found = source.targets(batch)
    assembly.close()
    source.close()
    assert found.values_BX.device.type == "cuda" and found.valid_B.all()
    assert_labelled(found._replace(values_BX=found.values_BX.cpu()), batch, corpus)
    assert_same(ours.get(BlockView("shards", 1, 0), 2), whole(ours, corpus, 1, 0))
