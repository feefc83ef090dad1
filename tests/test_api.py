"""`from engine import ...`: the few names that a script needs."""

import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from conftest import CLASSES
from PIL import Image
from tiny import clip_folder
from torch.nn import functional as F

import engine
from engine import Bundle, Corpus, Student, Teacher
from engine.api import _configured
from engine.config import RunConfig, UserError
from engine.labels.teacher import Teacher as InItsOwnPlace


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    model = clip_folder(tmp_path_factory.mktemp("teacher"), seed=1)
    return Teacher.load(model, "", CLASSES, precision="fp32")


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher) -> Student:
    """Trained a little, on noise."""
    model = clip_folder(tmp_path_factory.mktemp("student"), seed=2, embed_dim=12)
    made = Student.load(model, "", teacher.classes, prompts=2, depth=2)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for images in noise(40).split(8):
        optimizer.zero_grad()
        made.losses(images, teacher.features(images)).loss_B.mean().backward()
        optimizer.step()
    return made.eval()


def noise(images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, 16, 16), generator=generator).to(torch.uint8)


def test_nothing_heavy_is_loaded_before_a_name_is_used():
    program = (
        "import sys, engine\nassert 'distill' in dir(engine)\n"
        "print(sorted({'torch', 'ray', 'numpy', 'tyro'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_name_is_that_of_its_own_place():
    assert set(engine.__all__) == {"distill", "Teacher", "Student", "Corpus", "Bundle"}
    assert all(callable(getattr(engine, name)) for name in engine.__all__)
    assert Teacher is InItsOwnPlace
    with pytest.raises(AttributeError, match="no attribute 'Pupil'"):
        engine.Pupil  # noqa: B018


def test_a_teacher_says_what_open_clip_says(tmp_path, teacher):
    model = clip_folder(tmp_path, seed=1)
    theirs = open_clip.create_model(model).eval()
    tokenizer = open_clip.get_tokenizer(model, bpe_path=str(tmp_path / "bpe.txt.gz"))
    sentences = [f"a photo of a {name.replace('_', ' ')}." for name in CLASSES]
    images = noise(5)
    mean, std = (torch.tensor(theirs.visual.preprocess_cfg[key]) for key in ("mean", "std"))
    with torch.no_grad():
        normal = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        u_BD = F.normalize(theirs.encode_image(normal), dim=-1)
        w_ND = F.normalize(theirs.encode_text(tokenizer(sentences)), dim=-1)
        wanted = theirs.logit_scale.exp() * u_BD @ w_ND.T
    torch.testing.assert_close(teacher.logits(images), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(teacher.features(images), u_BD, rtol=1e-4, atol=1e-4)
    assert teacher.classes.names == CLASSES and teacher.w_ND.shape == (3, 8)


def test_class_names_may_lie_in_a_file_and_vectors_in_another(tmp_path, teacher):
    model = clip_folder(tmp_path, seed=1)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    by_file = Teacher.load(model, "", tmp_path / "names.txt", precision="fp32")
    assert torch.equal(by_file.w_ND, teacher.w_ND)
    by_vectors = Teacher.load(model, "", teacher.classes, precision="fp32")
    assert torch.equal(by_vectors.logits(noise(2)), teacher.logits(noise(2)))
    ensemble = Teacher.load(model, "", CLASSES, template="imagenet-7", precision="fp32")
    assert not torch.allclose(ensemble.w_ND, teacher.w_ND)
    with pytest.raises(UserError, match="another teacher"):
        Teacher.load(clip_folder(tmp_path / "other", seed=3), "", teacher.classes)
    with pytest.raises(UserError, match=r"classes: .*none\.txt cannot be read"):
        Teacher.load(model, "", str(tmp_path / "none.txt"))


def test_a_students_loss_is_the_papers(teacher, student):
    images, tau = noise(6, seed=5), 2.0
    losses = student.losses(images, teacher.features(images), tau)
    z_t, z_s = teacher.logits(images).double() / tau, student.logits(images).double() / tau
    p_t = z_t.softmax(-1)
    wanted = tau**2 * (p_t * (z_t.log_softmax(-1) - z_s.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(losses.loss_B.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(losses.top_s_B, z_s.argmax(-1)) and losses.loss_B.requires_grad


def test_a_student_learns_prompts_and_projector_and_leaves_a_bundle(student, tmp_path):
    names = {name.partition(".")[0] for name, _ in student.named_parameters()}
    assert names == {"prompts", "projector"}
    student.bundle().save(tmp_path / "bundle.safetensors")
    bundle = Bundle.load(str(tmp_path / "bundle.safetensors"))
    assert bundle.class_names == CLASSES
    images = noise(4, seed=7)
    answers = bundle.predictor()(images)  # class vectors are fp16 there
    torch.testing.assert_close(answers, student.logits(images), rtol=2e-3, atol=2e-2)


def test_a_student_of_too_few_layers_is_refused(tmp_path, teacher):
    with pytest.raises(UserError, match="depth: 4 is more than the 3 layers"):
        Student.load(clip_folder(tmp_path), "", teacher.classes, depth=4)


def test_a_corpus_is_all_its_samples(corpus_folder):
    corpus = Corpus.open(str(corpus_folder))
    samples = list(corpus)
    assert len(samples) == corpus.samples == 24
    assert [(s.shard, s.position) for s in samples] == sorted(
        (s.shard, s.position) for s in samples
    )


def test_batches_are_the_samples_in_clips_view(corpus_folder):
    corpus = Corpus.open(str(corpus_folder))
    batches = list(corpus.batches(pixels=16, batch=7))
    assert all(batch.valid_B.all() for batch in batches)
    labels = np.concatenate([batch.labels_B for batch in batches]).tolist()
    assert labels == [sample.label for sample in corpus]
    images = torch.cat([batch.images_BCHW for batch in batches])
    assert images.shape == (24, 3, 16, 16) and images.dtype == torch.uint8


def test_batches_of_passes_hold_every_sample_once_a_pass_each_in_another_view(corpus_folder):
    corpus = Corpus.open(str(corpus_folder))
    seen: list[dict[tuple[int, int], torch.Tensor]] = [{}, {}]
    for batch in corpus.batches(pixels=16, batch=10, passes=2, seed=3):
        share = batch.work.share
        rows = zip(share.blocks, share.offsets, batch.valid_B, batch.images_BCHW, strict=True)
        kept = {(int(b), int(o)): image for b, o, valid, image in rows if valid}
        assert not kept.keys() & seen[batch.work.view].keys()
        seen[batch.work.view] |= kept
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 24
    same = sum(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    assert same < 3


def test_files_pictures_and_pixels_are_predicted_alike(student, photo, tmp_path):
    picture = photo(40, 30, 3)
    picture.save(tmp_path / "a.png")
    predictor = student.bundle().predictor()
    answers = predictor.predict([tmp_path / "a.png", picture, np.asarray(picture)], top=2)
    for answer in answers:
        assert list(answer) == list(answers[0]) and len(answer) == 2
        assert answer == pytest.approx(answers[0], abs=1e-4)
    assert sum(predictor.predict(str(tmp_path / "a.png"))[0].values()) == pytest.approx(1)
    assert predictor.predict([]) == []


def test_a_picture_is_upright_and_without_alpha(student, photo, tmp_path):
    picture = photo(40, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    predictor = student.bundle().predictor()
    by_file, by_picture = predictor.predict(
        [tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")]
    )
    assert by_file == pytest.approx(by_picture, abs=0.02)
    assert by_file != pytest.approx(predictor.predict(picture)[0], abs=0.02)
    (clear,) = predictor.predict(picture.convert("RGBA"))
    assert clear == pytest.approx(predictor.predict(picture)[0], abs=1e-6)


@pytest.mark.parametrize(
    "bad, why",
    [
        (np.zeros((4, 4)), "an array of float64"),
        (np.zeros((3, 4, 4), np.uint8), r"\[3, 4, 4\]"),
        ("nowhere.jpg", r"nowhere\.jpg cannot be used \(unreadable\)"),
    ],
)
def test_what_is_no_picture_is_named(student, bad, why):
    with pytest.raises(UserError, match=f"images: .*{why}"):
        student.bundle().predictor().predict([bad])


def test_keywords_are_what_a_file_holds_and_win_over_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('name = "a"\npreset = "paper"\n[train]\nlr = 0.25\n[student]\ndepth = 3\n')
    config = _configured(
        str(file),
        {
            "name": "b",
            "runs_dir": tmp_path,
            "train": {"passes": 7, "lr": 1},
            "corpus": {"hosts": ("a", "b"), "isolate": True},
            "student.workers": 2,
        },
    )
    train, student = config.train, config.student
    assert (config.name, config.preset, config.runs_dir) == ("b", "paper", str(tmp_path))
    assert (train.batch, train.lr, train.passes) == (8, 1.0, 7)
    assert (student.depth, student.workers, config.corpus.hosts) == (3, 2, ("a", "b"))
    assert config.corpus.isolate
    assert _configured("", {"name": "c"}) == RunConfig(name="c")


@pytest.mark.parametrize(
    "options, why",
    [
        ({"name": "a", "train": {"passes": "many"}}, "train.passes"),
        ({"name": "a", "train": {"passes": 0}}, "train.passes must be at least 1"),
        ({"name": "a", "train": {"pases": 3}}, "train.pases"),
        ({"name": "a", "preset": "slow"}, "preset"),
        ({"train": {"passes": 3}}, "name"),
    ],
)
def test_mistakes_are_errors_that_name_the_field(options, why, capsys):
    with pytest.raises(UserError, match=why) as error:
        engine.distill(**options)
    assert "/tmp" not in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")
