from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import clip_folder

from engine.clip import class_vectors
from engine.clip.class_vectors import ClassVectors, encode_classes, own_templates
from engine.clip.learned import LearnedPrompts
from engine.clip.names import base_count, read_names
from engine.clip.towers import load_clip
from engine.config import UserError
from jobs import cli

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


@contextmanager
def encoded(clip):
    """Counts the sentences that the text tower is given."""
    counts: list[int] = []
    hook = clip.text.register_forward_hook(lambda tower, given, told: counts.append(len(told)))
    yield counts
    hook.remove()


def test_a_row_is_the_unit_mean_of_unit_features(clip):
    templates = ("a {}.", "the {}", "many {}s")
    sentences = [sentence.format(name) for name in ("cat", "dog") for sentence in templates]
    text = clip.text(clip.tokenizer(sentences)).double().numpy().reshape(2, 3, 8)
    mean = (text / np.linalg.norm(text, axis=2, keepdims=True)).mean(axis=1)
    wanted = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    classes = encode_classes(clip, ("cat", "dog"), templates)
    np.testing.assert_allclose(classes.vectors, wanted, atol=1e-6)
    assert classes.templates == templates


def test_only_new_names_are_encoded(clip):
    templates = ("a {}.", "the {}")
    stored = encode_classes(clip, ("cat", "dog", "yak"), templates)
    marked = replace(stored, vectors=np.roll(stored.vectors, 1, axis=1))
    with encoded(clip) as counts:
        classes = encode_classes(clip, ("yak", "bird", "cat"), templates, marked)
    assert counts == [1, 1]  # one name in two sentences
    assert np.array_equal(classes.vectors[[0, 2]], marked.vectors[[2, 0]])
    bird = encode_classes(clip, ("bird",), templates).vectors[0]
    np.testing.assert_allclose(classes.vectors[1], bird, atol=1e-6)
    with encoded(clip) as counts:
        again = encode_classes(clip, ("dog", "cat"), templates, marked)
    assert counts == [] and np.array_equal(again.vectors, marked.vectors[[1, 0]])


def test_rows_of_another_teacher_or_of_other_sentences_are_not_kept(clip):
    stored = encode_classes(clip, ("cat", "dog"), ("a {}.",))
    for known, templates in (
        (replace(stored, teacher="another"), ("a {}.",)),
        (stored, ("the {}.",)),
        (stored, ("a {}.", "the {}.")),
    ):
        with encoded(clip) as counts:
            encode_classes(clip, ("cat", "dog"), templates, known)
        assert counts == [2] * len(templates)


def test_a_name_that_comes_twice_has_the_same_row_twice(clip):
    classes = encode_classes(clip, ("missile", "dog", "missile"), ("a {}.",))
    assert np.array_equal(classes.vectors[0], classes.vectors[2]) and len(classes.vectors) == 3


def test_a_name_may_fill_the_context_but_not_exceed_it(clip):
    """Of 32 tokens the start, the end, `a`, the dot, and a letter each."""
    fits, exceeds = 28 * "x", 29 * "x"
    classes = encode_classes(clip, ("cat", fits), ("a {}.",))
    assert classes.names == ("cat", fits)
    for name in (exceeds, 500 * "x"):
        with pytest.raises(UserError, match=rf"^names: n\.txt: '{name}' is too long: 'a {{}}\.' "):
            encode_classes(clip, ("cat", name), ("a {}.",), field="names: n.txt")
    with pytest.raises(UserError, match=r"is too long: 'a large {}"):
        encode_classes(clip, ("cat", fits), ("a {}.", "a large {}."))


def test_an_underscore_reads_as_a_blank(clip):
    one, other = (encode_classes(clip, (name,), ("a {}.",)) for name in ("oak_tree", "oak tree"))
    assert np.array_equal(one.vectors, other.vectors) and one.names == ("oak_tree",)


def test_learned_prompts_bring_their_sentence_and_change_the_rows(clip):
    text_KPC = clip.text.token_embedding(clip.tokenizer(["one big"])[0, 1:3])[None].clone()
    learned = LearnedPrompts(text_KPC, torch.zeros(1, 2, 16), words="one big")
    same = replace(clip, prompts=learned)  # prompts that are the very words they stand for
    assert own_templates(same, ("the {}",)) == ("one big {}.",)
    assert own_templates(clip, ("the {}",)) == ("the {}",)
    plain = encode_classes(clip, ("cat", "dog"), ("one big {}.",))
    told = encode_classes(same, ("cat", "dog"), own_templates(same, ()))
    np.testing.assert_allclose(told.vectors, plain.vectors, atol=1e-6)
    moved = replace(clip, prompts=replace(learned, text_KPC=text_KPC.flip(-1)))
    rows = encode_classes(moved, ("cat", "dog"), ("one big {}.",))
    assert abs(rows.vectors - plain.vectors).max() > 0.01


def test_the_command_tells_what_it_kept(tmp_path, capsys):
    model = clip_folder(tmp_path / "clip")
    names, out = tmp_path / "names.txt", tmp_path / "w.safetensors"

    def told(lines: str, *words: str) -> str:
        names.write_text(lines)
        args = ["classes", str(names), str(out), "--model", model, "--template", "a {}.", *words]
        assert cli.main(args) == 0
        return capsys.readouterr().out

    assert told("cat\ndog\n") == (
        f"{out}: 2 class vectors of width 8 from 'a {{}}.' (2 computed, 0 kept, 0 dropped)\n"
    )
    before = ClassVectors.load(out)
    assert "3 class vectors of width 8 from 'a {}.' (1 computed, 2 kept, 0 dropped)" in told(
        "dog\nyak\ncat"
    )
    after = ClassVectors.load(out)
    assert after.names == ("dog", "yak", "cat")
    assert np.array_equal(after.vectors[[2, 0]], before.vectors)
    assert "(0 computed, 1 kept, 2 dropped)" in told("cat\n")
    words = ["classes", str(names), str(out), "--model", model, "--template", "the {}."]
    assert cli.main(words) == 2
    assert f"out: {out} holds vectors of another teacher, or from" in capsys.readouterr().err
    out.unlink()
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("a {}.\nthe {}.\n")
    assert "from 2 sentences (1 computed, 0 kept" in told("cat\n", "--template", str(sentences))
    twice = told("cat\ndog\ncat\n", "--template", str(sentences), "--repeats")
    assert "3 class vectors of width 8 from 2 sentences (1 computed, 2 kept, 0 dropped)" in twice
    out.unlink()
    names.write_text(f"cat\n{29 * 'x'}\n")
    assert cli.main(["classes", str(names), str(out), "--model", model, "--template", "a {}."]) == 2
    assert f"names: {names}: '{29 * 'x'}' is too long" in capsys.readouterr().err
