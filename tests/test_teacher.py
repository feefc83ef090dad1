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
from engine.labels.inline import InlineSource, OnDemandSource, SyntheticSource
from engine.labels.labeller import Labeller
from engine.labels.targets import BlockView, exact, shifted, unpack
from engine.labels.teacher import Teacher, Team

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


@pytest.fixture
def team(teacher):
    return Team([teacher], "logits" if len(teacher.w_ND) < 8 else "features", [1.0], "mean")


def labeller_of(team, corpus, threads=1, **changes):
    decoders = {16: Decoder(POLICY, "cpu", threads)}
    return Labeller(team, {"shards": corpus}, decoders, {"shards": "me"}, **changes)


def logits_of(label, teacher):
    return unpack(label.form, torch.from_numpy(exact(label)), teacher.w_ND, teacher.scale)


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


def test_a_compiled_teacher_is_the_teacher(clip, corpus):
    """In forwards of three images; what is left is padded."""
    classes = encode_classes(clip, FEW, ("a {}.",))
    plain, fast = (
        Teacher(clip, classes, "fp32", CPU, batch=3, compile=compile) for compile in ("off", "on")
    )
    images = pixels(corpus, 1, 0)
    assert len(images) % 3
    torch.testing.assert_close(fast.features(images), plain.features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("view", [7, TEST_VIEW])
def test_labels_are_those_of_the_decoded_pixels(team, teacher, corpus, view):
    labeller = labeller_of(team, corpus)
    for block in range(len(corpus.blocks)):
        label = labeller.label(BlockView("shards", block, view))
        answer = logits_of(label, teacher)
        wanted = teacher.logits(pixels(corpus, block, view))
        got, sought = torch.softmax(answer, -1), torch.softmax(wanted, -1)
        torch.testing.assert_close(got, sought, rtol=0, atol=2e-3)
        assert label.fingerprint == "me"
        spoilt = 2 if block == 0 else 0
        assert label.valid.tolist() == [False] * spoilt + [True] * (len(label.valid) - spoilt)
    told = labeller.statement()
    assert told["labelled"] == corpus.samples
    assert told["read_s"] > 0 and told["decode_s"] > 0 and told["forward_s"] > 0


def test_a_label_is_a_pure_function(team, corpus):
    def labels():
        labeller = labeller_of(team, corpus, threads=2)
        return [labeller.label(BlockView("shards", block, 5)).values for block in (2, 0, 2)]

    first, again = labels(), labels()
    assert np.array_equal(first[0], first[2])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_block_that_cannot_be_read_has_no_label(team, corpus_folder, index, tmp_path):
    """Until it can: an error, not a label that says that its images are not valid."""
    folder = tmp_path / "shards"
    shutil.copytree(corpus_folder, folder)
    spoil(min(folder.glob("*.tar")), 2)
    corpus = Corpus.open(str(index(folder)), 8)
    labeller = labeller_of(team, corpus)
    first = min(folder.glob("*.tar"))
    away = first.rename(first.with_suffix(".away"))
    with pytest.raises(OSError, match=rf"the teacher cannot read block 0, of .*{first.name}"):
        labeller.label(BlockView("shards", 0, 1))
    assert labeller.label(BlockView("shards", len(corpus.blocks) - 1, 1)).valid.all()
    away.rename(first)
    assert labeller.label(BlockView("shards", 0, 1)).valid.any()


@pytest.fixture
def batch(corpus):
    share = Share(np.array([0, 1, 0]), np.array([0, 1, 5]), np.array([True, True, False]))
    loader = Loader(corpus, Decoder(POLICY, "cpu", 1), [Work("shards", 0, 4, share)], 99, 1)
    (decoded,) = loader
    loader.close()
    return decoded


def test_inline_source_is_the_teacher_on_the_batch(team, teacher, batch):
    source = InlineSource(team)
    source.request([BlockView("shards", 0, 4)])
    answer = source.targets(batch)
    source.close()
    told = unpack(answer.form, answer.values_BX, teacher.w_ND, teacher.scale)
    wanted = teacher.logits(batch.images_BCHW)
    torch.testing.assert_close(shifted(told), shifted(wanted), rtol=1e-5, atol=1e-4)
    assert answer.valid_B.tolist() == [False, True, False]  # damaged, fine, padding
    assert source.statement()["labelled"] == 1


def test_inline_numbers_that_are_none_stop_the_run(team, teacher, batch):
    source = InlineSource(team)
    teacher._tower.proj.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"^the teacher's numbers at step 1 are not finite"):
        source.targets(batch)
    teacher._tower.proj.data.nan_to_num_()
    nothing = dataclasses.replace(batch, valid_B=np.zeros(3, bool))
    teacher._tower.proj.data[0, 0] = torch.nan
    assert not source.targets(nothing).valid_B.any()  # nobody learns from these
    teacher._tower.proj.data.nan_to_num_()


def test_on_demand_a_labeller_is_made_once_and_late(team, teacher, corpus, batch):
    made = []

    def make():
        made.append(labeller_of(team, corpus))
        return made[-1]

    width = len(teacher.w_ND) if team.form == "logits" else teacher.w_ND.shape[1]
    source = OnDemandSource(make, team.form, width, CPU)
    assert not made and source.statement() == {}
    for _ in range(2):
        answer = source.targets(batch)
    label = labeller_of(team, corpus).label(BlockView("shards", 1, 4))
    assert len(made) == 1 and answer.valid_B.tolist() == [False, True, False]
    assert np.array_equal(answer.values_BX[1], label.values[1])
    assert source.statement()["labelled"] == len(label.valid)  # block 1 alone was needed, and once


def test_synthetic_labels_are_unit_features_that_differ(batch):
    answer = SyntheticSource(8, CPU).targets(batch)
    assert answer.form == "features" and answer.valid_B is batch.valid_B
    torch.testing.assert_close(answer.values_BX.norm(dim=-1), torch.ones(3))
    assert not torch.equal(answer.values_BX[0], answer.values_BX[1])


def test_a_team_fuses_its_teachers(clip, tmp_path, corpus):
    """Of different sizes of image, and class vectors of different width."""
    other = load_clip(clip_folder(tmp_path, seed=1, embed_dim=6, image_size=24), "", "teacher.")
    teachers = [
        Teacher(one, encode_classes(one, MANY, ("a {}.",)), "fp32", CPU, batch=8)
        for one in (clip, other)
    ]
    team = Team(teachers, "logits", [1.0, 3.0], "mean")
    assert team.pixels == {16, 24}
    policies = {pixels: ViewPolicy(3, pixels) for pixels in team.pixels}
    decoders = {pixels: Decoder(policy, "cpu", 1) for pixels, policy in policies.items()}
    labeller = Labeller(team, {"shards": corpus}, decoders, {"shards": "both"})
    label = labeller.label(BlockView("shards", 1, 2))
    samples = corpus.read(1)
    probabilities = [
        teacher.logits(decoders[teacher.pixels].decode(samples, 2)[0]).softmax(-1)
        for teacher in teachers
    ]
    wanted = (probabilities[0] + 3 * probabilities[1]) / 4
    told = torch.from_numpy(label.values).float().softmax(-1)
    torch.testing.assert_close(told, wanted, rtol=0, atol=2e-3)
    assert label.form == "logits" and label.values.shape == (2, 12)


def test_class_vectors_of_another_teacher_are_refused(clip, tmp_path):
    other = load_clip(clip_folder(tmp_path, seed=1), "", "teacher.")
    classes = encode_classes(other, FEW, ("a {}.",))
    with pytest.raises(UserError, match=r"^classes\.vectors: they were made by another teacher"):
        Teacher(clip, classes, "fp32", CPU, batch=3)
