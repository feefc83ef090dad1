"""The gate of teachers in 8 bits, alone and in each source of labels."""

import dataclasses
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from tiny import clip_folder
from torch.nn import functional as F
from workers import assignment_of, config_of, models, work_all

from engine.clip.class_vectors import encode_classes
from engine.clip.towers import load_clip
from engine.config import TeacherConfig, UserError
from engine.data.corpus import open_corpora
from engine.labels import fidelity
from engine.labels.fidelity import IMAGES, Fidelity
from engine.labels.scaling import Pool
from engine.labels.sources import stream_of
from engine.labels.targets import BlockView
from engine.labels.teacher import Teacher, TeacherSpec

CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cow")
FIGURES = r"on \d+ images of this run: mean KL \S+ nats, same top class in [\d.]+ %"


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(fidelity, "say", lines.append)
    return lines


def gate(max_kl: float = 0.02, min_agreement: float = 0.93, precision: str = "fp8") -> Fidelity:
    told = TeacherConfig(model="M", precision=precision, max_kl=max_kl, min_agreement=min_agreement)
    return Fidelity(told, "fp16")


def pair(images: int, agree: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes in full and quantised, of which a share agrees. KL where they do not:
    sum p (log p - log q), with p = (0.6, 0.4) and q turned around, 0.2 log 1.5."""
    full = torch.tensor([[0.6, 0.4]]).log().repeat(images, 1)
    ours = full.clone()
    wrong = round((1 - agree) * images)
    ours[:wrong] = full[:wrong].flip(1)
    return full, ours


def test_it_passes_once_there_are_enough_images_and_says_so_once(said):
    one = gate()
    one.take(*pair(IMAGES - 1))
    assert not one.done and said == []
    one.take(*pair(1))
    assert one.done and len(said) == 1
    assert re.fullmatch(f"teacher M in fp8 beside fp16, {FIGURES}", said[0])
    assert one.statement() == {
        "compared": IMAGES, "compared_kl_sum": 0.0, "compared_agreed": IMAGES
    }  # fmt: skip


def test_figures_are_those_of_the_definition(said):
    one = gate(max_kl=1, min_agreement=0)
    one.take(*pair(400, agree=0.5))
    told = one.statement()
    assert one.done and told["compared"] == 400 and told["compared_agreed"] == 200
    assert told["compared_kl_sum"] == pytest.approx(200 * 0.2 * torch.tensor(1.5).log().item())
    assert "same top class in 50.0 %" in said[0] and "mean KL 0.041 nats" in said[0]


@pytest.mark.parametrize(
    ("bounds", "fields"),
    [
        ({"max_kl": 0.001, "min_agreement": 0}, "teacher.max_kl"),
        ({"max_kl": 1}, "teacher.min_agreement"),
        ({"max_kl": 0.001}, "teacher.max_kl, teacher.min_agreement"),
    ],
)
def test_a_bound_that_is_passed_is_named_with_both_figures(bounds, fields, said):
    one = gate(**bounds)
    with pytest.raises(UserError) as caught:
        one.take(*pair(IMAGES, agree=0.9))
    message = str(caught.value)
    assert re.match(f"{fields}: teacher M in fp8 is too far from fp16 {FIGURES}; ", message)
    assert "Take teacher.precision=fp16 or int8, or change " in message
    with pytest.raises(UserError, match=re.escape(message)):  # and for ever
        one.take(*pair(10 * IMAGES))
    assert said == [] and not one.done


def test_it_refuses_as_soon_as_that_is_certain():
    """Of 256 images 17 may have another top class; nobody has to wait for the rest."""
    one = gate(max_kl=1)
    one.take(*pair(17, agree=0))
    with pytest.raises(UserError, match=r"^teacher\.min_agreement"):
        one.take(*pair(1, agree=0))


def test_numbers_that_are_none_are_refused_unless_the_full_ones_are_none():
    full, ours = pair(4)
    one = gate()
    full[0] = torch.nan
    one.take(full, ours)
    assert one.statement()["compared"] == 3
    ours[1, 0] = torch.nan
    with pytest.raises(UserError, match=r"^teacher\.max_kl"):
        one.take(full, ours)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_teacher_answers_in_8_bits_and_drops_what_it_was(kind, tmp_path, said):
    clip = load_clip(clip_folder(tmp_path), "", "teacher.")
    classes = encode_classes(clip, NAMES, ("a {}.",))
    images = torch.randint(0, 256, (100, 3, 16, 16)).to(torch.uint8)
    full = Teacher(clip, classes, "fp32", CPU, batch=64).features(images)
    told = TeacherConfig(
        model=clip_folder(tmp_path), precision=kind, batch=64, max_kl=0.1, min_agreement=0.5
    )
    teacher = Teacher.of(TeacherSpec(told, classes), CPU, told.batch)
    first = teacher.features(images)
    assert 0.99 < F.cosine_similarity(first, full).min() and not torch.equal(first, full)
    assert said == []
    weight = weakref.ref(teacher._full.blocks[0].attn.in_proj_weight)
    for _ in range(2):
        assert torch.equal(teacher.features(images), first)
    gc.collect()
    assert weight() is None and len(said) == 1
    again = teacher.statement()
    assert IMAGES <= again["compared"] < 300
    teacher.features(images)
    assert teacher.statement() == again


@pytest.fixture(scope="module")
def where(tmp_path_factory, corpus_folder):
    return models(tmp_path_factory.mktemp("models"), corpus_folder)


def test_it_holds_in_a_run_with_the_teacher_inside(where, tmp_path):
    """One run is refused, before it records or learns anything; another is told how it was."""
    eight = where | {"teacher.precision": "int8", "targets.store": str(tmp_path / "store")}
    runs = {
        "refused": ["inline", eight | {"teacher.max_kl": 0.0}],
        "fine": ["inline", eight | {"teacher.max_kl": 0.1, "teacher.min_agreement": 0.5}],
    }
    (told,) = run_distributed(refused_and_fine, 1, str(tmp_path), runs)
    assert re.match(r"teacher\.max_kl: .* in int8 is too far from fp32 ", told["refused"]["error"])
    assert not told["refused"]["recorded"]
    labels = told["fine"]["labels"]
    assert labels["compared"] >= labels["labelled"] > 0
    assert 0 < labels["compared_kl_sum"] / labels["compared"] < 0.1


def refused_and_fine(rank: int, world: int, runs: str, told: dict) -> dict:
    outcomes = {}
    for name, one in told.items():
        try:
            outcomes |= work_all(rank, world, runs, {name: one})
        except UserError as error:
            recorded = any((Path(runs) / "store").rglob("*.targets"))
            outcomes[name] = {"error": str(error), "recorded": recorded}
    return outcomes


@pytest.mark.ray
def test_it_holds_in_a_stream_and_ends_it_at_once(where, local_ray, tmp_path):
    eight = where | {"teacher.precision": "int8", "teacher.max_kl": 0.0}
    config = config_of(tmp_path, "x", eight)
    assignment, corpora = assignment_of(config), open_corpora(config.corpus)
    pool = Pool(assignment)
    try:
        source = stream_of(assignment, pool.roster, corpora, "me", 1, 99, CPU, shared=False)
        for block in (0, 1):  # whoever asks again hears the same
            with pytest.raises(UserError, match=r"^teacher\.max_kl: .* in int8 is too far from"):
                source.labels([BlockView("shards", block, 0)])
        source.close()
        assert len(pool._places) == 1  # and no teacher has died of it
    finally:
        pool.close()


def test_precisions_keep_labels_apart(where, tmp_path):
    told = {
        precision: assignment_of(
            config_of(tmp_path, "x", where | {"teacher.precision": precision})
        ).labellings["shards"]
        for precision in ("fp32", "int8", "fp8")
    }
    assert len({one.fingerprint for one in told.values()}) == 3
    assert told["int8"].differences(told["fp8"]) == ["precisions: int8 here, fp8 there"]


def test_bounds_have_ranges():
    for field, value in (("max_kl", -0.1), ("min_agreement", 1.1)):
        with pytest.raises(UserError, match=rf"^teacher\.{field} must be at least 0"):
            dataclasses.replace(TeacherConfig(), **{field: value})
