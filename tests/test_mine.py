"""Class names that a teacher proposes for images that have none."""

import csv
import random

import numpy as np
import pytest
import torch
from tiny import clip_folder

from engine import mine
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.names import read_names, read_vocabulary
from engine.clip.towers import load_clip
from engine.config import UserError
from engine.data.corpus import Corpus
from engine.data.shards import write_shards
from engine.mine import Responses, encode_vocabulary, look, propose, spread
from jobs import cli
from jobs.quickstart import HERE
from jobs.quickstart.domain import CLASSES, HUES, PATTERNS, SHAPES, write_images

FAR = (" house", " river", " bread", " engine", " winter", " paper", " music", " doctor", " soup")
TEACHER = f"local-dir:{HERE / 'models' / 'teacher'}"


def vocabulary_of(vectors: np.ndarray, names: tuple[str, ...] = ()) -> ClassVectors:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    names = names or tuple(f"word {number}" for number in range(len(unit)))
    return ClassVectors(names, unit.astype(np.float32), ("{}",), "t", 20.0)


def test_responses_are_the_softmax_over_all_words(monkeypatch):
    """In tiles that do not fit, against the definition in float64."""
    rng = np.random.default_rng(0)
    w_VD = torch.from_numpy(vocabulary_of(rng.normal(size=(50, 6))).vectors)
    u_BD = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(30, 6))).float(), dim=-1)
    monkeypatch.setattr(mine, "_WORDS", 7)
    responses = Responses(w_VD, 20.0)
    for part in u_BD.split(11):
        responses.add(part)
    z_BV = 20 * u_BD.double() @ w_VD.double().T
    wanted = z_BV.softmax(-1).mean(0).numpy()
    np.testing.assert_allclose(responses.probability_V(), wanted, rtol=1e-5)
    firsts = np.bincount(z_BV.argmax(-1).numpy(), minlength=50)
    assert np.array_equal(responses.firsts_V(), firsts) and responses.images == 30


def test_chunks_of_words_do_not_show(tmp_path, monkeypatch):
    clip = load_clip(clip_folder(tmp_path), "", "")
    words = ("cat", "dog", "bird", "fish", "yak")
    monkeypatch.setattr(mine, "_WORDS", 2)
    parts = encode_vocabulary(clip, words, ("a {}.",), "vocabulary")
    whole = encode_classes(clip, words, ("a {}.",))
    np.testing.assert_allclose(parts.vectors, whole.vectors, atol=1e-6)
    assert parts.names == words and parts.teacher == clip.fingerprint


def responses_of(probability: list[float], firsts: list[int]) -> Responses:
    responses = Responses(torch.zeros(len(firsts), 1), 1.0)
    responses._mass_V, responses.images = torch.tensor(probability, dtype=torch.float64), 1
    responses._firsts_V = torch.tensor(firsts)
    return responses


def test_the_stronger_of_two_synonyms_is_taken_and_answers_for_both():
    shared = np.full(4, 3.0)  # what all words have in common, and is no similarity
    axes = np.eye(4)
    vectors = np.stack([axes[0], axes[0] + 0.1 * axes[1], axes[1], axes[2], axes[3]]) + shared
    names = ("sofa", "couch", "cup", "lamp", "rug")
    vocabulary = vocabulary_of(vectors, names)
    told = responses_of([0.2, 0.3, 0.1, 0.4, 0.0], [2, 3, 1, 4, 0])
    proposals = propose(vocabulary, told, 4, similar=0.8)
    assert [one.name for one in proposals] == ["lamp", "couch", "cup", "rug"]
    assert [one.images for one in proposals] == [4, 5, 1, 0]
    assert [name for name, _ in proposals[1].synonyms] == ["sofa"] and not proposals[0].synonyms
    assert proposals[1].probability == 0.3 and 0.9 < proposals[1].synonyms[0][1] < 1
    assert [one.name for one in propose(vocabulary, told, 2, similar=0.8)] == ["lamp", "couch"]
    apart = propose(vocabulary, told, 9, similar=1.0)
    assert [one.name for one in apart] == ["lamp", "couch", "sofa", "cup", "rug"]


def test_true_names_of_lvis_part_where_they_should(data_folder):
    """Text features of CLIP's own ViT-B/32: synonyms fall together at the default, others do not,
    though all have raw cosines of 0.5 or more."""
    file = data_folder / "class_vectors" / "lvis1203_openai_vitb32_d512_detic"
    names = tuple(file.with_suffix(".names.txt").read_text().splitlines())
    vocabulary = vocabulary_of(np.load(file.with_suffix(".npy")).astype(np.float32), names)
    even = responses_of([1 / len(names)] * len(names), [1] * len(names))
    proposals = propose(vocabulary, even, len(names), similar=0.8)
    dropped = {name for one in proposals for name, _ in one.synonyms}
    for one, other in (("cushion", "pillow"), ("armchair", "chair"), ("sofa", "sofa_bed")):
        assert len({one, other} & dropped) == 1
    kept = {one.name for one in proposals}
    assert {"gag", "grits", "cow", "horse", "parrot", "parakeet", "cup", "mug"} <= kept
    assert len(dropped) == 8, "of 1,203"


@pytest.mark.parametrize(("blocks", "samples", "wanted"), [(100, 1600, 320), (7, 100, 30)])
def test_a_sample_is_spread_evenly(blocks, samples, wanted):
    chosen = spread(blocks, samples, wanted, seed=1)
    assert len(chosen) == -(-wanted * blocks // samples)
    gaps = np.diff(chosen)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert 0 <= chosen[0] and chosen[-1] < blocks
    assert chosen == spread(blocks, samples, wanted, seed=1)
    others = {tuple(spread(blocks, samples, wanted, seed)) for seed in range(9)}
    assert len(others) > 1
    assert spread(blocks, samples, 10 * samples, seed=3) == list(range(blocks))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no words"),
        (b"\n \n", "holds no words"),
        (b"cat\n12 %\n", "line 2 is neither word nor phrase: '12 %'"),
        (b"cat\ndog\x07\n", r"line 2 is neither word nor phrase: 'dog\x07'"),
        (b"\x89PNG\r\n\x1a\n\xff", "cannot be read"),
    ],
)
def test_a_vocabulary_that_cannot_be_used(tmp_path, content, complaint):
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_vocabulary(str(file), "vocabulary")
    assert str(raised.value).startswith(f"vocabulary: {file}") and complaint in str(raised.value)


def test_empty_and_repeated_lines_are_counted(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeffcat\n\noak tree \ncat\nÄrmel\noak tree\n\n", encoding="utf-8")
    words, left_out = read_vocabulary(str(file), "vocabulary")
    assert words == ("cat", "oak tree", "Ärmel") and left_out == {"empty": 2, "repeated": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, index):
    """Two images of each of the quickstart's classes, without labels."""
    folder = tmp_path_factory.mktemp("mine")
    write_images(folder / "images", "general", 2, seed=5, labelled=False)
    write_shards(folder / "images", folder / "shards", None, 40, skip_invalid=False)
    return index(folder / "shards")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The classes' names among as many compositions that are no class, and as many other words."""
    every = [
        " ".join(filter(None, (pattern, hue, shape)))
        for pattern in PATTERNS
        for hue in HUES
        for shape in SHAPES
    ]
    shuffled = random.Random(0)
    others = shuffled.sample(sorted(set(every) - set(CLASSES)), len(CLASSES))
    far = [f"{first}{second}" for first in ("wolf", "lamp", "road", "milk") for second in FAR]
    mixed = [*CLASSES, *others, *far]
    shuffled.shuffle(mixed)
    file = tmp_path_factory.mktemp("words") / "words.txt"
    file.write_text("\n".join(mixed) + "\n")
    return file


def test_true_classes_come_before_distractors(corpus, words, tmp_path, capsys):
    out = tmp_path / "new" / "names.txt"
    args = ["classes", "--mine", words, out, "--corpus", corpus, "--model", TEACHER]
    args += ["--classes", len(CLASSES), "--sample", 96]
    assert cli.main([str(arg) for arg in args]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: 48 of 132 words") and "of 96 images (0 unusable)" in told
    names = read_names(str(out))
    assert len(names) == 48 and len(set(names) & set(CLASSES)) >= 36, "43, as seen"
    assert not any(name.endswith(FAR) for name in names), "as seen"
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(names)
    images = [int(row["images"]) for row in rows]
    assert images[0] >= images[-1] and 90 <= sum(images) <= 96
    assert 0 < sum(float(row["mean_probability"]) for row in rows) <= 1
    assert cli.main([str(arg) for arg in args]) == 2
    assert f"out: {out} exists" in capsys.readouterr().err


def test_the_same_seed_proposes_the_same(corpus, words):
    clip = load_clip(TEACHER, "", "")
    names, _ = read_vocabulary(str(words), "vocabulary")
    vocabulary = encode_vocabulary(clip, names[:20], ("a photo of a {}.",), "vocabulary")
    opened = Corpus.open(str(corpus), mine.BLOCK_SAMPLES, "corpus")
    blocks = spread(len(opened.blocks), opened.samples, 32, seed=2)
    answers = [look(clip, vocabulary, opened, blocks, "cpu", batch)[0] for batch in (64, 64, 5)]
    first, again, parts = (answer.probability_V() for answer in answers)
    assert np.array_equal(first, again) and answers[0].images == 32
    np.testing.assert_allclose(first, parts, rtol=1e-3)


def test_mistakes_are_named(corpus, words, tmp_path, capsys):
    def complaint(*flags: object, out: str = "names.txt") -> str:
        args = ["classes", "--mine", words, tmp_path / out, "--model", TEACHER, *flags]
        assert cli.main([str(arg) for arg in args]) == 2
        return capsys.readouterr().err

    few = complaint("--corpus", corpus, "--classes", 500)
    assert f"classes: 500 are asked for, {words} has 132 words" in few
    assert "corpus: no .tar shards at" in complaint("--corpus", tmp_path / "none")
    (tmp_path / "there.txt.csv").write_text("mine")
    assert "there.txt.csv exists" in complaint("--corpus", corpus, out="there.txt")
    long = tmp_path / "long.txt"
    long.write_text("cat\n" + 40 * "wolf " + "\n")
    args = ["classes", "--mine", long, tmp_path / "n.txt", "--corpus", corpus, "--model", TEACHER]
    assert cli.main([str(arg) for arg in [*args, "--classes", 1]]) == 2
    assert "is too long" in capsys.readouterr().err
    assert not (tmp_path / "names.txt").exists()
