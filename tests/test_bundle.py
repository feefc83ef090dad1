import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import clip_folder

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.prompts import Projector, PromptedTower
from engine.clip.towers import load_clip
from engine.clip.trained import TrainedTower
from engine.config import UserError
from jobs import cli
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
        wanted = logits(student(images), bundle.w_ND, 37.5)
    torch.testing.assert_close(predictor(images), wanted, rtol=1e-5, atol=1e-5)
    assert predictor.pixels == 16
    # Alone or in company, an image gets the same answer.
    torch.testing.assert_close(predictor(images[:1]), wanted[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [None, 1])
def test_a_trained_tower_is_predicted_with(made, tmp_path, layers):
    """From the file, edited by the command, over the backbone, which stays as it is."""
    clip = load_clip(made[1].model, "", "")
    student = PromptedTower(TrainedTower(clip, layers), 2, 2, hidden=12, outputs=10, seed=3)
    generator = torch.Generator().manual_seed(8)
    for param in student.parameters():
        if param.requires_grad:
            param.data += 0.1 * torch.randn(param.shape, generator=generator)
    bundle = dataclasses.replace(made[1], learned=student.state_dict())
    bundle.save(tmp_path / "whole")
    assert (
        cli.main(["bundle", *map(str, (tmp_path / "whole", tmp_path / "b")), "--rename", "a=A"])
        == 0
    )
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    before = clip.image(images)
    predictor = Bundle.load(tmp_path / "b").attached(clip, CPU)
    with torch.no_grad():
        wanted = logits(student.eval()(images), bundle.w_ND, 37.5)
    torch.testing.assert_close(predictor(images), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(clip.image(images), before) and not torch.allclose(
        predictor.student.tower(images), before, atol=0.05
    )
    assert not any(name.startswith("tower.") for name in predictor.student.state_dict())
    half = bundle.predictor("cpu", "bf16")
    assert half.student.tower.dtype == torch.bfloat16
    torch.testing.assert_close(half(images), wanted, rtol=0.1, atol=1.5)


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
    few = bundle.kept(["ü", "b"], "classes")
    assert few.class_names == ("ü", "b")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    clip = load_clip(bundle.model, "", "student.")
    whole, part = (one.attached(clip, CPU)(images) for one in (bundle, few))
    torch.testing.assert_close(part, whole[:, [4, 1]])
    with pytest.raises(UserError, match=r"^classes: the bundle has no class 'x'"):
        bundle.kept(["a", "x", "y"], "classes")


def test_of_classes_with_one_name_the_first_counts(made):
    twice = dataclasses.replace(made[1], class_names=("a", "b", "a", "d", "b"))
    vectors = made[1].class_vectors
    assert torch.equal(twice.kept(["b", "a"], "classes").class_vectors, vectors[[1, 0]])


@pytest.mark.parametrize("classes", [2, 1000])
def test_size_at_the_papers_dimensions(classes, tmp_path):
    projector = Projector(512, 768, 768).state_dict()
    names = tuple(f"class number {number}, 名前 und Umläute" for number in range(classes))
    bundle = Bundle(
        learned={"prompts": torch.randn(9, 4, 768)}
        | {f"projector.{name}": tensor for name, tensor in projector.items()},
        class_vectors=torch.nn.functional.normalize(torch.randn(classes, 768), dim=-1),
        class_names=names,
        model="ViT-B-16-quickgelu",
        weights="/some/where/on/a/disk/ViT-B-16.pt",
        backbone="b" * 64,
        teacher="t" * 64,
        logit_scale=100.0,
        pixels=224,
    )
    bundle.save(tmp_path / "bundle.safetensors")
    size = (tmp_path / "bundle.safetensors").stat().st_size
    assert 4 * 1_013_760 + 2 * 768 * classes < size <= 4.2e6 + 1.6e3 * classes
    assert size < 4.1e6 + 1.6e3 * classes, "metadata is small"
    assert Bundle.load(tmp_path / "bundle.safetensors").class_names == names


def test_class_vectors_are_those_of_the_file_before_it_is_written(made, saved):
    _, bundle = made
    again = Bundle.load(saved)
    assert bundle.class_vectors.dtype == again.class_vectors.dtype == torch.float16
    assert bundle.w_ND.dtype == torch.float32 and torch.equal(bundle.w_ND, again.w_ND)
    torch.testing.assert_close(bundle.w_ND.norm(dim=-1), torch.ones(5))
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    unsaved = bundle.attached(load_clip(bundle.model, "", ""), CPU)
    assert torch.equal(unsaved(images), again.predictor("cpu", "fp32")(images))


@pytest.fixture
def more() -> ClassVectors:
    vectors = torch.nn.functional.normalize(torch.randn(2, 10), dim=-1).numpy()
    return ClassVectors(("e", "f"), vectors, ("{}",), "t" * 64, 50.0)


def test_classes_are_renamed_added_and_kept(made, more):
    _, bundle = made
    changed = bundle.renamed({"a": "b", "b": "a", "ü": "u"}).added(more)
    changed = changed.kept(["f", "u", "a"], "keep")
    assert changed.class_names == ("f", "u", "a")
    wanted = [torch.from_numpy(more.vectors[1]), bundle.w_ND[4], bundle.w_ND[1]]
    torch.testing.assert_close(changed.w_ND, torch.stack(wanted), rtol=0, atol=1e-3)
    assert torch.equal(changed.class_vectors[1:], bundle.class_vectors[[4, 1]])
    assert changed.learned is bundle.learned and changed.backbone == bundle.backbone
    assert bundle.class_names == ("a", "b", "c", "d", "ü"), "it has not changed itself"

    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    before, after = (b.predictor("cpu", "fp32")(images) for b in (bundle, changed))
    torch.testing.assert_close(after[:, 1:], before[:, [4, 1]], rtol=1e-5, atol=1e-5)


def test_changes_that_make_no_sense_are_refused(made, more):
    _, bundle = made
    with pytest.raises(UserError, match=r"^rename: the bundle has no class 'x'"):
        bundle.renamed({"x": "y"})
    with pytest.raises(UserError, match=r"^rename: 2 classes would be called 'b'"):
        bundle.renamed({"a": "b"})
    with pytest.raises(UserError, match=r"^keep: the bundle has no class 'e'"):
        bundle.kept(["a", "e"], "keep")
    with pytest.raises(UserError, match=r"^add: .* by teacher tttttttttttttttt, these by uuuu"):
        bundle.added(dataclasses.replace(more, teacher="u" * 64))
    with pytest.raises(UserError, match=r"^add: .* have width 10, these 9"):
        bundle.added(dataclasses.replace(more, vectors=more.vectors[:, :9]))
    with pytest.raises(UserError, match=r"^add: 2 classes would be called 'a'"):
        bundle.added(dataclasses.replace(more, names=("e", "a")))


def test_the_command_needs_stored_vectors_alone(made, more, saved, tmp_path, capsys):
    """The bundle names a backbone that is not there."""
    bundle = dataclasses.replace(Bundle.load(saved), model="local-dir:/nowhere")
    bundle.save(saved)
    out, names = tmp_path / "made" / "out.safetensors", tmp_path / "names.txt"
    more.save(tmp_path / "w.safetensors")
    names.write_text("f\nblue = b\na\n")
    words = ["--rename", "b=blue = b", "c=sea", "--add", str(tmp_path / "w.safetensors")]
    assert cli.main(["bundle", str(saved), str(out), *words, "--keep", str(names)]) == 0
    assert f"{out}: 3 classes, 0.00 MB" in capsys.readouterr().out
    assert Bundle.load(out).class_names == ("f", "blue = b", "a")
    assert torch.equal(Bundle.load(out).class_vectors[1:], bundle.class_vectors[[1, 0]])

    for wrong, told in (
        (("--rename", "a"), "rename: 'a' is not OLD=NEW"),
        (("--rename", "a="), "rename: 'a=' is not OLD=NEW"),
        (("--rename", "a=x", "a=y"), "rename: 'a' is renamed twice"),
        (("--rename", "a=b"), "rename: 2 classes would be called 'b'"),
        (("--add", str(saved)), f"add: {saved} holds no class vectors"),
        (("--keep", str(names)), "keep: the bundle has no class 'f'"),
    ):
        assert cli.main(["bundle", str(saved), str(tmp_path / "none"), *wrong]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_vectors_that_do_not_fit_their_names_are_refused(saved):
    bundle = Bundle.load(saved)
    tensors = {f"learned.{name}": tensor for name, tensor in bundle.learned.items()}
    with safe_open(saved, "pt") as file:
        about = file.metadata()
    save_file(tensors | {"class_vectors": bundle.class_vectors[:4].clone()}, saved, about)
    with pytest.raises(UserError, match=r"not a bundle: it has 4 vectors for 5 names"):
        Bundle.load(saved)
