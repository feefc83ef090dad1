"""The stream of labels, over real Ray actors."""

import asyncio
import dataclasses
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import ray
import torch
from tiny import clip_folder

from engine.clip.class_vectors import encode_classes
from engine.clip.towers import load_clip
from engine.cluster import resolve
from engine.config import CorpusConfig, RunConfig, TeacherConfig, UserError
from engine.data.corpus import Corpus, open_corpora
from engine.data.decode import Decoder
from engine.data.loader import Loader, Work
from engine.data.order import Share
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.labels.pool import StreamSource, start_pool
from engine.labels.targets import BlockView, SoftTargets, unpack
from engine.labels.teacher import Labeller, Teacher, fingerprint
from engine.train.evaluate import evaluate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
BLOCK = 4
W_ND = torch.eye(6, 3)


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus_folder):
    return RunConfig(
        name="x",
        device="cpu",
        seed=3,
        corpus=CorpusConfig(
            shards=str(corpus_folder), evaluation=str(corpus_folder), block_samples=BLOCK
        ),
        teacher=TeacherConfig(
            model=clip_folder(tmp_path_factory.mktemp("clip")), precision="fp32", gpus=0, actors=2
        ),
    )


@pytest.fixture(scope="module")
def classes(config):
    clip = load_clip(config.teacher.model, "", "teacher.")
    return encode_classes(clip, tuple(f"class {n}" for n in range(12)), ("{}",))


@pytest.fixture(scope="module")
def labeller(config, classes):
    """What the actors do, in this process."""
    clip = load_clip(config.teacher.model, "", "teacher.")
    policy = ViewPolicy(config.seed, clip.image.pixels, config.train.crop_scale)
    corpora = open_corpora(config.corpus)
    return Labeller(
        Teacher(clip, classes, "fp32", torch.device("cpu"), config.teacher.batch),
        corpora,
        Decoder(policy, "cpu", 1),
        fingerprint(classes, policy, "fp32", corpora),
    )


@pytest.fixture(scope="module")
def teachers(config, classes, local_ray):
    return start_pool(config, classes)


@pytest.fixture(scope="module")
def corpus(config):
    return Corpus.open(config.corpus.shards, BLOCK)


def batch_of(corpus, view: int, *places: tuple[int, int], padding: int = 0, name: str = "shards"):
    """A decoded batch of samples (block, offset)."""
    blocks, offsets = np.array([*places, *[(0, 0)] * padding]).reshape(-1, 2).T
    share = Share(blocks, offsets, np.arange(len(blocks)) < len(places))
    decoder = Decoder(ViewPolicy(3, 16), "cpu", 1)
    loader = Loader(corpus, decoder, [Work(name, 0, view, share)], 99, 1)
    (batch,) = loader
    loader.close()
    return batch


def stream(teachers, classes, labeller, **changes) -> StreamSource:
    told = {
        "teacher_fingerprint": labeller.label(BlockView("shards", 0, 0)).fingerprint,
        "w_ND": torch.from_numpy(classes.vectors),
        "scale": classes.logit_scale,
        "outstanding": 3,
        "timeout_s": 120,
        "kept_samples": 1000,
        "rank": 0,
    }
    return StreamSource(teachers, **told | changes)


def assert_labelled(answer, valid, batch, labeller, classes):
    """Every real row has its own sample's label."""
    w_ND = torch.from_numpy(classes.vectors)
    for row, real in enumerate(batch.work.share.valid):
        if real:
            block = int(batch.work.share.blocks[row])
            label = labeller.label(BlockView(batch.work.corpus, block, batch.work.view))
            offset = int(batch.work.share.offsets[row])
            values = torch.from_numpy(label.values[offset])[None]
            wanted = unpack(label.form, values, w_ND, classes.logit_scale)[0]
            torch.testing.assert_close(answer[row], wanted, rtol=0, atol=0.02)
    assert (valid == batch.valid_B).all() and valid.any()


@pytest.mark.parametrize(("view", "name"), [(2, "shards"), (TEST_VIEW, "evaluation")])
def test_labels_are_those_of_the_teacher_in_this_process(
    teachers, classes, labeller, corpus, view, name
):
    source = stream(teachers, classes, labeller, rank=1)
    source.request([BlockView(name, block, view) for block in range(4)])
    places = (5, 0), (1, 3), (0, 2), (1, 0), (5, 1)  # block 5 comes unannounced
    for _ in range(2):
        batch = batch_of(corpus, view, *places, padding=2, name=name)
        answer, valid = source.logits(batch)
        assert_labelled(answer, valid, batch, labeller, classes)
        assert answer.shape == (7, 12) and answer.dtype == torch.float32
    assert source.waited_s > 0
    source.close()


def test_a_teacher_may_decode_in_a_child_process(config, classes, labeller):
    """Which gives the same, and ends with it however it ends; on a GPU there is none."""
    data = dataclasses.replace(config.corpus, isolate=True)
    told = dataclasses.replace(config.teacher, actors=1)
    (teacher,) = start_pool(dataclasses.replace(config, corpus=data, teacher=told), classes)
    for wanted in (BlockView("shards", 1, 2), BlockView("evaluation", 0, TEST_VIEW)):
        answer, expected = ray.get(teacher.label.remote(wanted)), labeller.label(wanted)
        assert (answer.values == expected.values).all() and answer.valid.all()
        assert answer.fingerprint == expected.fingerprint
    here = psutil.Process().children(recursive=True)
    (child,) = [one for one in here if any("engine.data.isolate" in word for word in one.cmdline())]
    ray.kill(teacher)
    child.wait(30)
    with pytest.raises(UserError, match=r"^corpus\.isolate: .* device is cuda"):
        resolve(dataclasses.replace(config, corpus=data, device="cuda"))


def test_a_share_of_padding_alone_asks_nobody(classes, labeller, corpus, teachers):
    source = stream(teachers, classes, labeller)
    answer, valid = source.logits(batch_of(corpus, 0, padding=3))
    assert answer.shape == (3, 12) and not valid.any()
    source.close()


def test_a_killed_teacher_is_asked_again(teachers, classes, labeller, corpus):
    source = stream(teachers, classes, labeller, outstanding=8)
    blocks = range(len(corpus.blocks))
    source.request([BlockView("shards", block, view) for view in (0, 1) for block in blocks])
    ray.get(teachers[0].label.remote(BlockView("shards", 0, 5)))  # it works already
    ray.kill(teachers[0], no_restart=False)
    for view in (0, 1):
        for block in blocks:
            rows = [(block, offset) for offset in range(corpus.blocks.at(block).length)]
            batch = batch_of(corpus, view, *rows)
            assert_labelled(*source.logits(batch), batch, labeller, classes)
    assert ray.get(teachers[0].label.remote(BlockView("shards", 0, 5))).valid.all()  # it is back
    source.close()


# ------------------------------------------------ small actors, to see what the stream asks for


class Small:
    """Answers as it is told to, and tells what it was asked."""

    async def behave(self, value=0.5, who="f", valid=True, delay_s=0.01, errors=0) -> None:
        self.answer, self.errors = (value, who, valid, delay_s), errors
        self.running = self.most = 0
        self.asked: list[BlockView] = []

    async def label(self, wanted: BlockView) -> SoftTargets:
        value, who, valid, delay_s = self.answer
        self.asked.append(wanted)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(delay_s)
        self.running -= 1
        if self.errors:
            self.errors -= 1
            raise OSError("no way to a.tar")
        values = np.full((BLOCK, 3), value + wanted.block, np.float16)
        return SoftTargets("features", values, np.full(BLOCK, valid), who)

    async def tell(self) -> tuple[int, list[BlockView]]:
        return self.most, self.asked


@pytest.fixture(scope="module")
def three(local_ray):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no module for a worker
    small = ray.remote(Small).options(num_cpus=0, max_concurrency=100)
    return [small.remote() for _ in range(3)]


@pytest.fixture
def actors(three):
    """actors(answer, ...): as many teachers, each with its own way to answer."""

    def behaving(*answers: dict):
        ray.get([one.behave.remote(**told) for one, told in zip(three, answers, strict=False)])
        return three[: len(answers)]

    return behaving


def small_stream(teachers, **changes) -> StreamSource:
    told = {"outstanding": 3, "timeout_s": 60, "kept_samples": 1000, "rank": 0} | changes
    return StreamSource(teachers, "f", W_ND, 1.0, **told)


@pytest.mark.parametrize("outstanding", [1, 3])
def test_no_more_is_outstanding_than_allowed(actors, corpus, outstanding):
    (teacher,) = actors({"delay_s": 0.05})
    source = small_stream([teacher], outstanding=outstanding)
    for view in (0, 1):
        source.request([BlockView("shards", block, view) for block in range(6)])
        for block in range(6):
            source.logits(batch_of(corpus, view, (block, 0), ((block + 1) % 6, 1)))
    most, asked = ray.get(teacher.tell.remote())
    assert most == outstanding
    assert Counter(asked) == {BlockView("shards", b, v): 1 for b in range(6) for v in (0, 1)}
    source.close()


def test_requests_are_spread_and_ranks_start_with_different_teachers(actors, corpus):
    teachers = actors({}, {}, {})
    for rank in range(3):
        source = small_stream(teachers, outstanding=1, rank=rank)
        source.logits(batch_of(corpus, rank, (0, 0)))
        source.close()
    told = [asked for _, asked in ray.get([t.tell.remote() for t in teachers])]
    assert told == [[BlockView("shards", 0, rank)] for rank in range(3)]
    source = small_stream(teachers, outstanding=6)
    source.request([BlockView("shards", block, 9) for block in range(6)])
    for block in range(6):
        source.logits(batch_of(corpus, 9, (block, 0)))
    assert [len(asked) for _, asked in ray.get([t.tell.remote() for t in teachers])] == [3, 3, 3]
    source.close()


def test_an_evaluation_asks_for_every_label_once(actors, corpus):
    """However slow the student is, and though not all labels can be held."""
    (teacher,) = actors({})
    source = small_stream([teacher], outstanding=2, kept_samples=3 * BLOCK)

    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return torch.zeros(len(images), len(W_ND))

    blocks, policy = range(len(corpus.blocks)), ViewPolicy(3, 16)
    tallies, _ = evaluate({"slow": slow}, source, corpus, blocks, policy, 1, 2, 2, W_ND.device)
    assert tallies["teacher"].tolist()[5:] == [corpus.samples, corpus.samples]
    _, asked = ray.get(teacher.tell.remote())
    assert Counter(asked) == {BlockView("evaluation", block, TEST_VIEW): 1 for block in blocks}
    source.close()


def test_label_of_another_teacher_stops_the_run(actors, corpus):
    source = small_stream(actors({"who": "other"}))
    with pytest.raises(RuntimeError, match=r"was made by other, this run wants f: .* indexed anew"):
        source.logits(batch_of(corpus, 0, (1, 0)))
    source.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_label_that_is_not_finite_stops_the_run(actors, corpus, value):
    source = small_stream(actors({"value": value}))
    with pytest.raises(RuntimeError, match=r"label of .*block=1.* is not finite"):
        source.logits(batch_of(corpus, 0, (1, 0)))
    source.close()


def test_sample_that_the_teacher_could_not_decode_is_not_valid(actors, corpus):
    source = small_stream(actors({"valid": False}))
    _, valid = source.logits(batch_of(corpus, 0, (1, 0), (2, 0)))
    assert valid.tolist() == [False, False]
    source.close()


def test_a_teacher_s_error_may_pass(actors, corpus, capsys):
    (teacher,) = actors({"errors": 2})
    source = small_stream([teacher])
    _, valid = source.logits(batch_of(corpus, 0, (1, 0)))
    assert valid.all() and capsys.readouterr().err.count("no way to a.tar; asking again") == 1
    source.close()


def test_a_label_that_teachers_fail_to_make_stops_the_run_where_it_is_needed(actors, corpus):
    (teacher,) = actors({"errors": 3})
    source = small_stream([teacher])
    batch = batch_of(corpus, 0, (1, 0))
    source.request([BlockView("shards", 1, 0)])
    unread = dataclasses.replace(batch, valid_B=np.array([False]))  # nor could the student read it
    _, valid = source.logits(unread)
    assert not valid.any()
    with pytest.raises(RuntimeError, match=r"block=1.*failed 3 times: no way to a\.tar"):
        source.logits(batch)
    _, asked = ray.get(teacher.tell.remote())
    assert asked == [BlockView("shards", 1, 0)] * 3
    source.request([BlockView("shards", 1, 0)])  # in a later pass
    assert source.logits(batch)[1].all()
    source.close()


def test_label_that_does_not_come_is_named(actors, corpus):
    source = small_stream(actors({}, {"delay_s": 1000}), timeout_s=3)
    wanted = r"^targets\.timeout_s: no label of .*block=2.* after 3 s; 1 requests are with 2"
    with pytest.raises(RuntimeError, match=wanted):
        source.logits(batch_of(corpus, 0, (1, 0), (2, 0)))  # block 1's teacher answers
    source.close()
