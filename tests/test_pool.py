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
from engine.labels import scaling
from engine.labels.assignment import Assignment, labeller_of
from engine.labels.pool import start_teacher
from engine.labels.roster import Roster
from engine.labels.scaling import Pool
from engine.labels.stream import StreamSource
from engine.labels.targets import BlockView, SoftTargets
from engine.labels.teacher import Labels, TeacherSpec, labellings
from engine.train.evaluate import evaluate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
BLOCK = 4
LENGTHS = (4, 4, 2, 4, 4, 2, 4)  # of the blocks


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
            model=clip_folder(tmp_path_factory.mktemp("clip")),
            precision="fp32",
            gpus=0,
            threads=1,
            actors=2,
        ),
    )


@pytest.fixture(scope="module")
def assignment(config):
    """What the actors are told."""
    clip = load_clip(config.teacher.model, "", "teacher.")
    classes = encode_classes(clip, tuple(f"class {n}" for n in range(12)), ("{}",))
    labels = Labels.of(config, [TeacherSpec(config.teacher, classes)], features=False)
    corpora = open_corpora(config.corpus)
    return Assignment(config, labels, labellings(labels, corpora, "cpu"), records=False)


@pytest.fixture(scope="module")
def labeller(assignment):
    """What the actors do, in this process."""
    return labeller_of(assignment, torch.device("cpu"))


@pytest.fixture(scope="module")
def started(local_ray):
    """started(assignment): a teacher, whose roster knows no students."""
    (node,) = ray.nodes()
    kept = []  # Ray ends actors that nobody refers to

    def start(assignment):
        roster = ray.remote(Roster).options(num_cpus=0).remote()
        kept.append((roster, ray.put(assignment)))
        ray.get(roster.set.remote((), "", kept[-1][1:]))
        return start_teacher(assignment.config.teacher, roster, node["NodeID"])

    return start


@pytest.fixture(scope="module")
def teachers(assignment, started):
    return [started(assignment) for _ in range(2)]


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


@pytest.fixture(scope="module")
def roster(local_ray):
    return ray.remote(Roster).options(num_cpus=0).remote()


def source_over(roster, teachers, corpus, fingerprints, width, **changes) -> StreamSource:
    ray.get(roster.set.remote((ray.put(list(teachers)),), "", ()))
    told = {
        "outstanding": 3,
        "workers": 1,
        "timeout_s": 60,
        "kept_samples": 1000,
        "shared": False,
    } | changes
    return StreamSource(
        roster,
        "me/0",
        fingerprints,
        dict.fromkeys(fingerprints, corpus.blocks),
        "features",
        width,
        torch.device("cpu"),
        **told,
    )


@pytest.fixture
def stream(roster, teachers, assignment, corpus):
    told = {name: labelling.fingerprint for name, labelling in assignment.labellings.items()}
    width = assignment.labels.width
    return lambda **changes: source_over(
        roster, teachers, corpus, told, width, timeout_s=120, **changes
    )


def assert_labelled(answer, batch, labeller):
    """Every real row has its own sample's label."""
    for row, real in enumerate(batch.work.share.valid):
        if real:
            block = int(batch.work.share.blocks[row])
            label = labeller.label(BlockView(batch.work.corpus, block, batch.work.view))
            wanted = torch.from_numpy(label.values[int(batch.work.share.offsets[row])])
            torch.testing.assert_close(answer.values_BX[row], wanted, rtol=0, atol=2e-3)
    assert (answer.valid_B == batch.valid_B).all() and answer.valid_B.any()


@pytest.mark.parametrize(("view", "name"), [(2, "shards"), (TEST_VIEW, "evaluation")])
def test_labels_are_those_of_the_teacher_in_this_process(stream, labeller, corpus, view, name):
    source = stream()
    source.request([BlockView(name, block, view) for block in range(4)])
    places = (5, 0), (1, 3), (0, 2), (1, 0), (5, 1)  # block 5 comes unannounced
    for _ in range(2):
        batch = batch_of(corpus, view, *places, padding=2, name=name)
        answer = source.targets(batch)
        assert_labelled(answer, batch, labeller)
        assert answer.form == "features" and answer.values_BX.shape == (7, 8)
    assert source.waited_s > 0
    while source.statement()["received"] < sum(LENGTHS[:4]) + LENGTHS[5]:  # one was only announced
        source.request([])
        source._collect(1.0)
    source.close()


def test_a_teacher_may_decode_in_a_child_process(config, started, assignment, labeller):
    """Which gives the same, and ends with it however it ends; on a GPU there is none."""
    data = dataclasses.replace(config.corpus, isolate=True)
    isolated = dataclasses.replace(config, corpus=data)
    teacher = started(assignment._replace(config=isolated))
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


def test_a_share_of_padding_alone_asks_nobody(stream, corpus):
    source = stream()
    answer = source.targets(batch_of(corpus, 0, padding=3))
    assert answer.values_BX.shape == (3, 8) and not answer.valid_B.any()
    assert source.statement()["received"] == 0
    source.close()


def test_a_killed_teacher_is_asked_again(teachers, stream, labeller, corpus):
    source = stream(outstanding=8)
    blocks = range(len(corpus.blocks))
    source.request([BlockView("shards", block, view) for view in (0, 1) for block in blocks])
    ray.get(teachers[0].label.remote(BlockView("shards", 0, 5)))  # it works already
    ray.kill(teachers[0], no_restart=False)
    for view in (0, 1):
        for block in blocks:
            rows = [(block, offset) for offset in range(corpus.blocks.at(block).length)]
            batch = batch_of(corpus, view, *rows)
            assert_labelled(source.targets(batch), batch, labeller)
    assert ray.get(teachers[0].label.remote(BlockView("shards", 0, 5))).valid.all()  # it is back
    source.close()


# ------------------------------------------------ small actors, to see what the stream asks for


class Small:
    """Answers as it is told to, and tells what it was asked."""

    async def behave(self, value=0.5, who="f", valid=True, delay_s=0.01, errors=0, width=3) -> None:
        self.answer, self.errors = (value, who, valid, delay_s, width), errors
        self.running = self.most = 0
        self.asked: list[BlockView] = []

    async def label(self, wanted: BlockView) -> SoftTargets:
        value, who, valid, delay_s, width = self.answer
        self.asked.append(wanted)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(delay_s)
        self.running -= 1
        if self.errors:
            self.errors -= 1
            raise OSError("no way to a.tar")
        n = LENGTHS[wanted.block]
        values = np.full((n, width), value + wanted.block, np.float16)
        return SoftTargets("features", values, None, np.full(n, valid), who)

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


@pytest.fixture
def small_stream(roster, corpus):
    told = {"shards": "f", "evaluation": "f"}
    return lambda teachers, **changes: source_over(roster, teachers, corpus, told, 3, **changes)


@pytest.mark.parametrize("outstanding", [1, 3])
def test_no_more_is_outstanding_than_allowed(actors, small_stream, corpus, outstanding):
    (teacher,) = actors({"delay_s": 0.05})
    source = small_stream([teacher], outstanding=outstanding)
    for view in (0, 1):
        source.request([BlockView("shards", block, view) for block in range(6)])
        for block in range(6):
            source.targets(batch_of(corpus, view, (block, 0), ((block + 1) % 6, 1)))
    most, asked = ray.get(teacher.tell.remote())
    assert most == outstanding
    assert Counter(asked) == {BlockView("shards", b, v): 1 for b in range(6) for v in (0, 1)}
    source.close()


def test_requests_are_spread(actors, small_stream, corpus):
    teachers = actors({}, {}, {})
    source = small_stream(teachers, outstanding=6)
    source.request([BlockView("shards", block, 9) for block in range(6)])
    for block in range(6):
        source.targets(batch_of(corpus, 9, (block, 0)))
    assert [len(asked) for _, asked in ray.get([t.tell.remote() for t in teachers])] == [2, 2, 2]
    source.close()


def test_an_evaluation_asks_for_every_label_once(actors, small_stream, corpus):
    """However slow the student is, and though not all labels can be held."""
    (teacher,) = actors({})
    source = small_stream([teacher], outstanding=2, kept_samples=3 * BLOCK)

    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return torch.zeros(len(images), 6)

    blocks, policy = range(len(corpus.blocks)), ViewPolicy(3, 16)
    tallies, _ = evaluate(
        {"slow": slow},
        source,
        corpus,
        blocks,
        policy,
        1,
        2,
        2,
        torch.device("cpu"),
        told=lambda targets: targets.values_BX.float() @ torch.eye(6, 3).T,
    )
    assert tallies["teacher"].tolist()[5:] == [corpus.samples, corpus.samples]
    _, asked = ray.get(teacher.tell.remote())
    assert Counter(asked) == {BlockView("evaluation", block, TEST_VIEW): 1 for block in blocks}
    source.close()


def test_label_of_another_teacher_stops_the_run(actors, small_stream, corpus):
    source = small_stream(actors({"who": "other"}))
    with pytest.raises(RuntimeError, match=r"was made by other, this run wants f: .* indexed anew"):
        source.targets(batch_of(corpus, 0, (1, 0)))
    source.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_label_that_is_not_finite_stops_the_run(actors, small_stream, corpus, value):
    source = small_stream(actors({"value": value}))
    with pytest.raises(RuntimeError, match=r"label of .*block=1.* is not finite"):
        source.targets(batch_of(corpus, 0, (1, 0)))
    source.close()


def test_label_of_a_wrong_shape_stops_the_run(actors, small_stream, corpus):
    source = small_stream(actors({"width": 4}))
    wanted = (
        r"label of .*block=1.* has a wrong shape: features \(4, 4\), expected features \(4, 3\)"
    )
    with pytest.raises(RuntimeError, match=wanted):
        source.targets(batch_of(corpus, 0, (1, 0)))
    source.close()


def test_sample_that_the_teacher_could_not_decode_is_not_valid(actors, small_stream, corpus):
    source = small_stream(actors({"valid": False}))
    valid = source.targets(batch_of(corpus, 0, (1, 0), (2, 0))).valid_B
    assert valid.tolist() == [False, False]
    source.close()


def test_a_teacher_s_error_may_pass(actors, small_stream, corpus, capsys):
    (teacher,) = actors({"errors": 2})
    source = small_stream([teacher])
    valid = source.targets(batch_of(corpus, 0, (1, 0))).valid_B
    assert valid.all() and capsys.readouterr().err.count("no way to a.tar; asking again") == 1
    source.close()


def test_a_label_that_teachers_fail_to_make_stops_the_run_where_it_is_needed(
    actors, small_stream, corpus
):
    (teacher,) = actors({"errors": 3})
    source = small_stream([teacher])
    batch = batch_of(corpus, 0, (1, 0))
    source.request([BlockView("shards", 1, 0)])
    unread = dataclasses.replace(batch, valid_B=np.array([False]))  # nor could the student read it
    valid = source.targets(unread).valid_B
    assert not valid.any()
    with pytest.raises(RuntimeError, match=r"block=1.*failed 3 times: no way to a\.tar"):
        source.targets(batch)
    _, asked = ray.get(teacher.tell.remote())
    assert asked == [BlockView("shards", 1, 0)] * 3
    source.request([BlockView("shards", 1, 0)])  # in a later pass
    assert source.targets(batch).valid_B.all()
    source.close()


def test_label_that_does_not_come_is_named(actors, small_stream, corpus):
    source = small_stream(actors({}, {"delay_s": 1000}), timeout_s=3)
    wanted = r"^targets\.timeout_s: no label of .*block=[12].* after 3 s; 1 requests are with 2"
    with pytest.raises(RuntimeError, match=wanted):
        source.targets(batch_of(corpus, 0, (1, 0), (2, 0)))  # block 1's teacher answers
    source.close()


def test_a_late_label_is_asked_of_another_teacher(actors, small_stream, corpus, monkeypatch):
    """As of one that hangs; its own answer, when it comes, is no other."""
    monkeypatch.setattr("engine.labels.stream._LATE_S", 0.5)
    first, second = actors({"delay_s": 0.3}, {"delay_s": 0.3})
    source = small_stream([first, second], outstanding=2)
    source.request([BlockView("shards", 0, 1), BlockView("shards", 1, 1)])
    source.targets(batch_of(corpus, 1, (0, 0), (1, 0)))
    ray.get([first.behave.remote(delay_s=30), second.behave.remote(delay_s=0.01)])
    started = time.perf_counter()
    for block in (3, 4):  # each teacher is asked one of them first
        source.request([BlockView("shards", 3, 2), BlockView("shards", 4, 2)])
        answer = source.targets(batch_of(corpus, 2, (block, 0)))
        assert answer.values_BX[0, 0] == block + 0.5 and answer.valid_B.all()
    # Late is ten times the usual 0.3 s; the slow one takes 30 s.
    assert time.perf_counter() - started < 20
    source.close()


def test_a_teacher_that_is_gone_for_good_is_asked_no_more(small_stream, corpus, local_ray):
    small = ray.remote(Small).options(num_cpus=0, max_concurrency=100)
    gone, left = small.remote(), small.remote()
    ray.get([gone.behave.remote(delay_s=1000), left.behave.remote()])
    source = small_stream([gone, left], outstanding=4)
    source.request([BlockView("shards", block, 0) for block in range(6)])
    ray.kill(gone)
    for block in range(6):
        assert source.targets(batch_of(corpus, 0, (block, 0))).valid_B.all()
    source.close()


def test_students_that_share_prefer_the_same_teacher_for_a_label(actors, small_stream, corpus):
    teachers = actors({}, {}, {})
    sources = [small_stream(teachers, outstanding=6, shared=True) for _ in range(2)]
    for source in sources:
        source.request([BlockView("shards", block, 9) for block in range(6)])
        for block in range(6):
            source.targets(batch_of(corpus, 9, (block, 0)))
    told = [Counter(asked) for _, asked in ray.get([t.tell.remote() for t in teachers])]
    assert all(set(asked.values()) == {2} for asked in told if asked)
    assert sum(map(len, told)) == 6 and sum(1 for asked in told if asked) > 1
    for source in sources:
        source.close()


def test_a_teacher_labels_once_for_all_who_ask(started, assignment, labeller):
    teacher = started(assignment)
    blocks = [BlockView("shards", block, view) for view in (0, 1) for block in range(6)]
    answers = ray.get([teacher.label.remote(one) for one in blocks for _ in range(3)])
    for one, answer in zip([one for one in blocks for _ in range(3)], answers, strict=True):
        np.testing.assert_allclose(answer.values, labeller.label(one).values, atol=2e-3)
    told, *_ = ray.get(teacher.statement.remote())
    images = 2 * sum(LENGTHS[:6])
    assert told["labelled"] == images and told["again"] == 2 * images
    ray.kill(teacher)


def test_a_student_without_teachers_goes_on_when_there_is_one(roster, corpus, small_stream, actors):
    """As where the only one has died for good, and the driver has started another."""
    small = ray.remote(Small).options(num_cpus=0, max_concurrency=100)
    gone = small.remote()
    ray.get(gone.behave.remote(delay_s=1000))
    source = small_stream([gone], timeout_s=60)
    source.request([BlockView("shards", 1, 0)])
    ray.kill(gone)
    with pytest.raises(RuntimeError, match=r"^targets\.timeout_s: .* 0 requests are with 0 teach"):
        source._timeout_s = 2
        source.targets(batch_of(corpus, 0, (1, 0)))
    source._timeout_s = 60
    ray.get(roster.set.remote((ray.put(list(actors({}))),), "", ()))
    assert source.targets(batch_of(corpus, 0, (1, 0))).valid_B.all()
    source.close()


def test_why_there_are_no_teachers_is_told(roster, corpus, small_stream):
    source = small_stream([])
    ray.get(roster.set.remote((), "teachers fail to start: no shards", ()))
    with pytest.raises(RuntimeError, match=r"^no label of .*: teachers fail to start: no shards$"):
        source.targets(batch_of(corpus, 0, (1, 0)))
    source.close()


def test_one_sick_teacher_does_not_end_a_run(actors, small_stream, corpus):
    sick, good = actors({"errors": 1000}, {"delay_s": 0.2})
    source = small_stream([sick, good], outstanding=6)
    source.request([BlockView("shards", block, 0) for block in range(6)])
    for block in range(6):
        assert source.targets(batch_of(corpus, 0, (block, 0))).valid_B.all()
    source.close()


def stream_of(pool, assignment, corpus) -> StreamSource:
    told = {name: labelling.fingerprint for name, labelling in assignment.labellings.items()}
    blocks = dict.fromkeys(told, corpus.blocks)
    rest = "features", assignment.labels.width, torch.device("cpu"), None, 1, 120, 1000, False
    return StreamSource(pool.roster, "me/0", told, blocks, *rest)


@pytest.mark.slow
def test_a_killed_teacher_comes_back_however_much_it_is_told(assignment, labeller, corpus, capsys):
    """Ray keeps what is large in its object store, and forgets it with the last reference."""
    told = assignment.labellings["shards"]
    large = dataclasses.replace(told, class_names=tuple(f"class {n}" for n in range(50_000)))
    pool = Pool(assignment._replace(labellings={**assignment.labellings, "unused": large}))
    try:
        source = stream_of(pool, assignment, corpus)
        batch = batch_of(corpus, 0, (1, 0))
        assert_labelled(source.targets(batch), batch, labeller)
        here = psutil.Process().children(recursive=True)
        known = set(pool._places)
        teacher = next(iter(known))
        pid = ray.get(teacher.__ray_call__.remote(lambda self: __import__("os").getpid()))
        next(one for one in here if one.pid == pid).kill()
        for view in (1, 2):
            batch = batch_of(corpus, view, (3, 0), (4, 1))
            assert_labelled(source.targets(batch), batch, labeller)
        assert pool.statement()["labelled"] > 0 and set(pool._places) == known
        source.close()
    finally:
        pool.close()
    assert "2 of 2 teachers are ready" in capsys.readouterr().err


def test_teachers_that_cannot_start_are_told_of(assignment, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "_STILLBORN", 1)
    nowhere = dataclasses.replace(assignment.config.corpus, shards=str(tmp_path / "gone"))
    config = dataclasses.replace(assignment.config, corpus=nowhere)
    pool = Pool(assignment._replace(config=config))
    try:
        source = stream_of(pool, assignment, corpus)
        with pytest.raises(RuntimeError, match=r"teachers fail to start: .*gone"):
            source.targets(batch_of(corpus, 0, (1, 0)))
        source.close()
    finally:
        pool.close()
    assert "a teacher is gone: " in capsys.readouterr().err
