import dataclasses
import shutil

import numpy as np
import pytest
import torch
from tiny import clip_folder, spoil

from engine.clip.class_vectors import encode_classes
from engine.clip.towers import load_clip
from engine.config import UserError
from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import Loader, Work
from engine.data.order import Share
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.labels.targets import BlockView, unpack
from engine.labels.teacher import InlineSource, Labeller, Teacher, fingerprint

CPU = torch.device("cpu")
POLICY = ViewPolicy(seed=3, pixels=16)
FEW = ("ant", "bee", "cow")
MANY = tuple(f"class {number}" for number in range(12))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(clip_folder(tmp_path_factory.mktemp("clip")), "", "teacher.")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, corpus_folder, index):
    """24 images in blocks of 8; the first two of the first are damaged."""
    folder = tmp_path_factory.mktemp("spoilt") / "shards"
    shutil.copytree(corpus_folder, folder)
    spoil(min(folder.glob("*.tar")), 2)
    return Corpus.open(str(index(folder)), 8)


@pytest.fixture(params=[FEW, MANY], ids=["logits", "features"])
def teacher(request, clip):
    return Teacher(clip, encode_classes(clip, request.param, ("a {}.",)), "fp32", CPU, batch=3)


def pixels(corpus, block, view):
    images_BCHW, _ = Decoder(POLICY, "cpu", 1).decode(corpus.read(block), view)
    return images_BCHW


def test_features_are_of_unit_length_and_know_no_batch(clip, teacher, corpus):
    images = pixels(corpus, 1, 0)
    whole = clip.image(images)
    wanted = whole / whole.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(teacher.features(images), wanted, rtol=1e-5, atol=1e-5)
    scores = teacher.scale * wanted @ teacher.w_ND.T
    torch.testing.assert_close(teacher.logits(images), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", [7, TEST_VIEW])
def test_labels_are_those_of_the_decoded_pixels(teacher, corpus, view):
    labeller = Labeller(teacher, {"shards": corpus}, Decoder(POLICY, "cpu", 1), "me")
    for block in range(len(corpus.blocks)):
        label = labeller.label(BlockView("shards", block, view))
        answer = unpack(label.form, torch.from_numpy(label.values), teacher.w_ND, teacher.scale)
        wanted = teacher.logits(pixels(corpus, block, view))
        got, sought = torch.softmax(answer, -1), torch.softmax(wanted, -1)
        torch.testing.assert_close(got, sought, rtol=0, atol=2e-3)
        assert label.fingerprint == "me"
        spoilt = 2 if block == 0 else 0
        assert label.valid.tolist() == [False] * spoilt + [True] * (len(label.valid) - spoilt)


def test_a_label_is_a_pure_function(teacher, corpus):
    def labels():
        labeller = Labeller(teacher, {"shards": corpus}, Decoder(POLICY, "cpu", 2), "me")
        return [labeller.label(BlockView("shards", block, 5)).values for block in (2, 0, 2)]

    first, again = labels(), labels()
    assert np.array_equal(first[0], first[2])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_block_that_cannot_be_read_has_no_label(teacher, corpus_folder, index, tmp_path):
    """Until it can: an error, not a label that says that its images are not valid."""
    folder = tmp_path / "shards"
    shutil.copytree(corpus_folder, folder)
    spoil(min(folder.glob("*.tar")), 2)
    corpus = Corpus.open(str(index(folder)), 8)
    labeller = Labeller(teacher, {"shards": corpus}, Decoder(POLICY, "cpu", 1), "me")
    first = min(folder.glob("*.tar"))
    away = first.rename(first.with_suffix(".away"))
    with pytest.raises(OSError, match=rf"the teacher cannot read block 0, of .*{first.name}"):
        labeller.label(BlockView("shards", 0, 1))
    assert labeller.label(BlockView("shards", len(corpus.blocks) - 1, 1)).valid.all()
    away.rename(first)
    assert labeller.label(BlockView("shards", 0, 1)).valid.any()


def test_inline_source_is_the_teacher_on_the_batch(teacher, corpus):
    share = Share(np.array([0, 1, 0]), np.array([0, 1, 5]), np.array([True, True, False]))
    loader = Loader(corpus, Decoder(POLICY, "cpu", 1), [Work("shards", 0, 4, share)], 99, 1)
    (batch,) = loader
    loader.close()
    source = InlineSource(teacher)
    source.request([BlockView("shards", 0, 4)])
    answer, valid = source.logits(batch)
    source.close()
    assert torch.equal(answer, teacher.logits(batch.images_BCHW))
    assert valid.tolist() == [False, True, False]  # damaged, fine, padding


def test_class_vectors_of_another_teacher_are_refused(clip, tmp_path):
    other = load_clip(clip_folder(tmp_path, seed=1), "", "teacher.")
    classes = encode_classes(other, FEW, ("a {}.",))
    with pytest.raises(UserError, match=r"^classes\.vectors: they were made by another teacher"):
        Teacher(clip, classes, "fp32", CPU, batch=3)


def test_fingerprint_tells_labellings_apart(clip, corpus, corpus_folder):
    classes = encode_classes(clip, FEW, ("a {}.",))
    one = {"shards": corpus}
    alike = fingerprint(classes, ViewPolicy(3, 16), "fp32", one)
    assert alike == fingerprint(encode_classes(clip, FEW, ("a {}.",)), POLICY, "fp32", one)
    others = {
        fingerprint(encode_classes(clip, FEW, ("the {}.",)), POLICY, "fp32", one),
        fingerprint(dataclasses.replace(classes, teacher="another"), POLICY, "fp32", one),
        fingerprint(classes, ViewPolicy(4, 16), "fp32", one),
        fingerprint(classes, ViewPolicy(3, 17), "fp32", one),
        fingerprint(classes, ViewPolicy(3, 16, crop_scale=0.5), "fp32", one),
        fingerprint(classes, POLICY, "bf16", one),
        fingerprint(classes, POLICY, "fp32", {"shards": Corpus.open(str(corpus_folder), 8)}),
        fingerprint(classes, POLICY, "fp32", {"shards": Corpus.open(str(corpus_folder), 4)}),
        fingerprint(classes, POLICY, "fp32", one | {"evaluation": corpus}),
    }
    assert len(others | {alike}) == 10
