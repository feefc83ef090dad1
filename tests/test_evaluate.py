import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import clip_folder, spoil

from engine.clip.class_vectors import encode_classes
from engine.clip.towers import load_clip
from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.labels.inline import InlineSource
from engine.labels.teacher import Teacher, Team
from engine.train.evaluate import Score, evaluate, tally

CPU = torch.device("cpu")
POLICY = ViewPolicy(seed=3, pixels=16)
CLASSES = 3  # of the shared corpus; base: 2


def test_tally_of_a_batch_by_hand():
    logits = torch.tensor(
        [
            [5.0, 1, 9, 9, 9],  # base 0, right among base, whatever novel says
            [1.0, 5, 0, 0, 9],  # base 0, wrong
            [9.0, 9, 1, 5, 0],  # novel 3, right among novel
            [9.0, 9, 5, 1, 0],  # novel 3, wrong
            [9.0, 9, 1, 0, 5],  # novel 4, right
            [9.0, 0, 0, 0, 0],  # without a label
        ]
    )
    labels = torch.tensor([0, 0, 3, 3, 4, -1])
    assert tally(logits, labels, 2).tolist() == [1, 2, 2, 3, 0, 0, 0]
    teacher = logits.clone()
    teacher[:2] = -teacher[:2]  # other tops; over all classes
    assert tally(logits, labels, 2, teacher).tolist() == [1, 2, 2, 3, 0, 4, 6]


def test_tally_where_all_classes_are_base():
    logits = torch.eye(3)
    assert tally(logits, torch.tensor([0, 1, 1]), 3).tolist() == [2, 3, 0, 0, 2, 0, 0]


@given(
    classes=st.integers(1, 7),
    seed=st.integers(0, 10_000),
)
def test_tally_is_what_numpy_counts_image_by_image(classes: int, seed: int):
    random = np.random.default_rng(seed)
    images, base = int(random.integers(1, 20)), -(-classes // 2)
    logits = random.permuted(np.arange(images * classes)).reshape(images, classes)
    teacher = random.permuted(np.arange(images * classes)).reshape(images, classes)
    labels = random.integers(-1, classes, images)
    counts = np.zeros(7, int)
    for row, teachers, label in zip(logits, teacher, labels, strict=True):
        own = (0, base) if label < base else (base, classes)
        half = 0 if label < base else 2
        if label >= 0:
            counts[half] += own[0] + np.argmax(row[slice(*own)]) == label
            counts[half + 1] += 1
            counts[4] += np.argmax(row) == label
        counts[5:] += np.argmax(row) == np.argmax(teachers), 1
    tensors = (torch.from_numpy(logits).float(), torch.from_numpy(teacher).float())
    found = tally(tensors[0], torch.from_numpy(labels), base, tensors[1])
    assert found.tolist() == counts.tolist()


def test_score_of_counts():
    score = Score.of(torch.tensor([3, 4, 1, 4, 2, 9, 10]))
    assert (score.base, score.novel, score.all, score.agreement) == (75, 25, 25, 90)
    assert score.hm == pytest.approx(2 / (1 / 75 + 1 / 25))
    assert Score.of(torch.tensor([0, 4, 0, 4, 0, 0, 0])) == Score(0, 0, 0, 0, None)
    assert Score.of(torch.tensor([1, 4, 0, 0, 1, 0, 0])) == Score(25, None, None, 25, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus_folder, index):
    """Shards of 10, 10 and 4 labelled images, of which the last four are damaged."""
    folder = tmp_path_factory.mktemp("spoilt") / "shards"
    shutil.copytree(corpus_folder, folder)
    spoil(max(folder.glob("*.tar")), 4)
    return index(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    clip = load_clip(clip_folder(tmp_path_factory.mktemp("clip")), "", "teacher.")
    return Teacher(clip, encode_classes(clip, ("ant", "bee", "cow"), ("{}",)), "fp32", CPU, 64)


def colour(images: torch.Tensor) -> torch.Tensor:
    """A poor classifier: by the mean of each channel."""
    return images.float().mean((2, 3))


def run(folder, models, source, block_samples, batch, blocks=None):
    corpus = Corpus.open(str(folder), block_samples)
    chosen = range(len(corpus.blocks)) if blocks is None else blocks
    told = (lambda targets: targets.values_BX) if source else None
    return evaluate(models, source, corpus, chosen, POLICY, 1, 2, batch, CPU, told=told)


def inline(teacher):
    return InlineSource(Team([teacher], "logits", [1.0], "mean"))


@pytest.mark.parametrize(("block_samples", "batch"), [(8, 3), (100, 100)])
def test_scores_are_those_of_all_usable_images(folder, teacher, block_samples, batch):
    tallies, ledger = run(folder, {"colour": colour}, inline(teacher), block_samples, batch)
    samples = [s for b in range(3) for s in Corpus.open(str(folder), 100).read(b)]
    images, reasons = Decoder(POLICY, "cpu", 1).decode(samples, TEST_VIEW)
    usable = [row for row, reason in enumerate(reasons) if reason is None]
    pixels = images[usable]
    labels = torch.tensor([samples[row].label for row in usable])
    theirs = teacher.logits(pixels)
    assert tallies["colour"].tolist() == tally(colour(pixels), labels, 2, theirs).tolist()
    assert tallies["teacher"].tolist() == tally(theirs, labels, 2, theirs).tolist()
    assert tallies["teacher"][5:].tolist() == [20, 20]
    assert (ledger.trained, ledger.skipped) == (20, {"format": 4})


def test_a_right_model_scores_all(folder):
    """Labels are found again with the images they belong to, in whatever parts they come."""

    def in_bytes(image: torch.Tensor) -> bytes:
        return image.numpy().tobytes()

    known = {}
    for block in range(3):
        samples = Corpus.open(str(folder), 100).read(block)
        images, _ = Decoder(POLICY, "cpu", 1).decode(samples, TEST_VIEW)
        known |= {in_bytes(image): s.label for image, s in zip(images, samples, strict=True)}

    def right(images: torch.Tensor) -> torch.Tensor:
        return torch.eye(CLASSES)[[known[in_bytes(image)] for image in images]]

    tallies, _ = run(folder, {"right": right}, None, 8, 3)
    score = Score.of(tallies["right"])
    assert score == Score(base=100, novel=100, hm=100, all=100, agreement=None)
    assert set(tallies) == {"right"}


def test_ranks_add_up_to_the_whole(folder, teacher):
    whole, _ = run(folder, {"colour": colour}, inline(teacher), 8, 3)
    parts = [
        run(folder, {"colour": colour}, inline(teacher), 8, 3, range(rank, 5, 2))[0]
        for rank in range(2)
    ]
    for name in whole:
        assert torch.equal(whole[name], parts[0][name] + parts[1][name])
