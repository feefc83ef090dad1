"""Sentences around a class name."""

import pytest

from engine.clip.templates import ENSEMBLES, read_templates
from engine.config import UserError


def test_a_sentence_is_itself():
    assert read_templates("a photo of a {}.") == ("a photo of a {}.",)
    assert read_templates("{}") == ("{}",)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("imagenet-80", 80, "a bad photo of a {}.", "a tattoo of the {}."),
        ("imagenet-60", 60, "a bad photo of a {}.", "itap of the {}."),
        ("imagenet-7", 7, "itap of a {}.", "a photo of the small {}."),
    ],
)
def test_ensembles(name, count, first, last):
    """Counts and ends of CLIP's own lists, in their order."""
    templates = read_templates(name)
    assert len(set(templates)) == len(templates) == count
    assert (templates[0], templates[-1]) == (first, last)
    assert all(sentence.count("{}") == 1 for sentence in templates)
    assert set(templates) <= set(ENSEMBLES["imagenet-80"])


def test_a_file_has_a_sentence_a_line(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("ein Foto von {}.\n{} auf Öl\n", encoding="utf-8-sig")
    assert read_templates(str(path)) == ("ein Foto von {}.", "{} auf Öl")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a {}.\na photo\n", "line 2 does not hold {}"),
        (b"a {}.\n\na {}\n", "line 2 does not hold {}"),
        (b"", "is empty"),
        (b"\xff\xfe{}", "is neither a sentence"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, content, complaint):
    path = tmp_path / "sentences.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_templates(str(path), "template")
    assert str(error.value).startswith("template: ") and str(path) in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize("template", ["", "a photo", "imagenet-81", "no/such.txt"])
def test_what_is_no_template_is_refused(template):
    with pytest.raises(UserError, match=r"^classes\.template: .* imagenet-80, imagenet-60, "):
        read_templates(template)
