import numpy as np
import pytest
import torch
from tiny import clip_folder

from engine.clip import class_vectors
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.names import base_count, read_names
from engine.clip.towers import load_clip
from engine.config import UserError

NAMES = ("cat", "dog", "a bird", "fish {}", "yak")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(clip_folder(tmp_path_factory.mktemp("clip")), "", "teacher.")


def test_rows_are_unit_text_features_of_the_sentences(clip):
    classes = encode_classes(clip, NAMES[:3], ("one {}, {}",))
    text = clip.text(clip.tokenizer(["one cat, cat", "one dog, dog", "one a bird, a bird"]))
    wanted = text / text.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.from_numpy(classes.vectors), wanted, rtol=1e-5, atol=1e-6)
    assert classes.vectors.dtype == np.float32
    assert classes.teacher == clip.fingerprint and classes.logit_scale == clip.logit_scale


def test_chunks_do_not_show(clip, monkeypatch):
    whole = encode_classes(clip, NAMES, ("a {}.",))
    monkeypatch.setattr(class_vectors, "CHUNK", 2)
    parts = encode_classes(clip, NAMES, ("a {}.",))
    np.testing.assert_allclose(whole.vectors, parts.vectors, atol=1e-6)
    assert not np.allclose(whole.vectors[0], whole.vectors[1], atol=1e-4)


def test_round_trip(clip, tmp_path):
    classes = encode_classes(clip, NAMES, ("a {}.",))
    path = tmp_path / "new" / "classes.safetensors"
    classes.save(path)
    again = ClassVectors.load(path)
    assert np.array_equal(again.vectors, classes.vectors)
    assert again.fingerprint == classes.fingerprint
    for field in ("names", "templates", "teacher", "logit_scale"):
        assert getattr(again, field) == getattr(classes, field)


def test_fingerprint_is_of_the_vectors(clip):
    one, same = (encode_classes(clip, NAMES, ("a {}.",)) for _ in range(2))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != encode_classes(clip, NAMES, ("the {}.",)).fingerprint


def test_files_that_hold_no_class_vectors_are_refused(clip, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match=r"^classes\.vectors: .*no such file"):
        ClassVectors.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"^vectors: .* holds no class vectors"):
        ClassVectors.load(path, "vectors")
    clip_folder(tmp_path / "clip")
    with pytest.raises(UserError, match=r"holds no class vectors"):
        ClassVectors.load(tmp_path / "clip" / "open_clip_model.safetensors")


def test_vectors_must_fit_their_names(tmp_path):
    vectors = np.eye(3, 4, dtype=np.float32)
    ClassVectors(("a", "b"), vectors, ("{}",), "t", 100.0).save(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"has 3 vectors for 2 names"):
        ClassVectors.load(tmp_path / "c.safetensors")


def test_names_are_read_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("great white shark\n  dog \nÄrmelkanal\n", encoding="utf-8")
    assert read_names(str(path)) == ("great white shark", "dog", "Ärmelkanal")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\ndog\ncat\n", "line 3 repeats 'cat'"),
        ("cat\ndog\ncat \n", "line 3 repeats 'cat"),
        ("", "is empty"),
    ],
)
def test_names_that_cannot_be_used_are_refused(tmp_path, content, complaint):
    path = tmp_path / "names.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^classes\.names: .*{complaint}"):
        read_names(str(path))


def test_a_name_may_come_twice_if_it_is_meant(tmp_path):
    """CoOp's names for ImageNet have two missiles."""
    (tmp_path / "names.txt").write_text("missile\ndog\nmissile \n")
    wanted = ("missile", "dog", "missile")
    assert read_names(str(tmp_path / "names.txt"), repeats=True) == wanted


def test_names_must_be_a_readable_file(tmp_path):
    with pytest.raises(UserError, match=r"^names is not set"):
        read_names("", "names")
    with pytest.raises(UserError, match=r"^classes\.names: .*cannot be read"):
        read_names(str(tmp_path / "absent.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read"):
        read_names(str(tmp_path / "binary.txt"))


def test_base_is_the_first_half_rounded_up():
    assert [base_count(classes) for classes in (1, 2, 5, 100, 101)] == [1, 1, 3, 50, 51]
