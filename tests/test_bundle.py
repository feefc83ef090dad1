import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from tiny import clip_folder

from engine.clip.bundle import Bundle
from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from engine.config import UserError
from kernels.reference import logits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student that has seen some images, and its bundle."""
    model = clip_folder(tmp_path_factory.mktemp("clip"))
    clip = load_clip(model, "", "student.")
    torch.manual_seed(0)
    student = PromptedTower(clip.image, prompts=2, depth=2, hidden=12, outputs=10, seed=3)
    student.prompts.data.normal_()
    for _ in range(3):  # the running statistics leave their start
        student(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8))
    bundle = Bundle(
        learned=student.state_dict(),
        class_vectors=torch.nn.functional.normalize(torch.randn(5, 10), dim=-1),
        class_names=("a", "b", "c", "d", "ü"),
        model=model,
        weights="",
        backbone=clip.fingerprint,
        teacher="t" * 64,
        logit_scale=37.5,
        pixels=16,
    )
    return student.eval(), bundle


@pytest.fixture
def saved(made, tmp_path):
    made[1].save(tmp_path / "bundle.safetensors")
    return tmp_path / "bundle.safetensors"


def test_round_trip(made, saved):
    _, bundle = made
    again = Bundle.load(saved)
    for field in dataclasses.fields(Bundle):
        old, new = getattr(bundle, field.name), getattr(again, field.name)
        if field.name == "learned":
            assert old.keys() == new.keys()
            assert all(torch.equal(old[name], new[name]) for name in old)
        elif field.name == "class_vectors":
            assert torch.equal(old, new)
        else:
            assert old == new
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_predictor_is_the_student(made, saved):
    student, bundle = made
    predictor = Bundle.load(saved).predictor(CPU, "fp32")
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        wanted = logits(student(images), bundle.class_vectors, 37.5)
    torch.testing.assert_close(predictor(images), wanted, rtol=1e-5, atol=1e-5)
    assert predictor.pixels == 16
    # Alone or in company, an image gets the same answer.
    torch.testing.assert_close(predictor(images[:1]), wanted[:1], rtol=1e-4, atol=1e-4)


def test_backbone_may_lie_elsewhere_but_must_be_the_same(made, saved, tmp_path):
    bundle = Bundle.load(saved)
    moved = clip_folder(tmp_path / "moved")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    here, there = bundle.predictor(CPU, "fp32"), bundle.predictor(CPU, "fp32", moved)
    assert torch.equal(here(images), there(images))
    other = clip_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"^weights: .* trained on backbone"):
        bundle.predictor(CPU, "fp32", other)


def test_what_is_no_bundle_is_refused(tmp_path, made, saved):
    with pytest.raises(UserError, match=r"^bundle: .*: no such file"):
        Bundle.load(tmp_path / "absent.safetensors")
    (tmp_path / "junk").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"^mine: .* is not a bundle"):
        Bundle.load(tmp_path / "junk", "mine")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"is not a bundle"):
        Bundle.load(tmp_path / "weights.safetensors")
    saved.write_bytes(saved.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is not a bundle"):
        Bundle.load(saved)


def test_bundle_of_another_format_is_refused(made, tmp_path):
    dataclasses.replace(made[1], format=99).save(tmp_path / "b")
    with pytest.raises(UserError, match=r"has format 99, not 1"):
        Bundle.load(tmp_path / "b")


def test_a_bundle_among_some_of_its_classes(made):
    _, bundle = made
    few = bundle.among(["ü", "b"], "classes")
    assert few.class_names == ("ü", "b")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    clip = load_clip(bundle.model, "", "student.")
    whole, part = (one.attached(clip, CPU)(images) for one in (bundle, few))
    torch.testing.assert_close(part, whole[:, [4, 1]])
    with pytest.raises(UserError, match=r"^classes: the bundle has no class 'x'"):
        bundle.among(["a", "x", "y"], "classes")


def test_of_classes_with_one_name_the_first_counts(made):
    twice = dataclasses.replace(made[1], class_names=("a", "b", "a", "d", "b"))
    vectors = made[1].class_vectors
    assert torch.equal(twice.among(["b", "a"], "classes").class_vectors, vectors[[1, 0]])
