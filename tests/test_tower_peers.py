"""The peers of the towers' benchmark compute what ours computes: or they would be no peers."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from parity import Parity, assert_near
from reference_peer import ReferenceStep, TeacherPrompts, loader
from tiny import clip_folder
from torch import Tensor
from torch.nn import functional as F
from tower_models import (
    KD_WEIGHT,
    SCALE,
    Ours,
    Pair,
    draw_images,
    gflops,
    student_gflops,
    student_of,
)
from tower_peers import Baseline, DistillModel, OpenClipStudent, OpenClipTower

from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from kernels.kl import Features, distillation

CPU = torch.device("cpu")
COUNT, DEPTH, BATCH = 2, 3, 6
NAMES = ("cat", "dog", "a bird", "fish", "horse")


def quick(model: str) -> str:
    """The same with QuickGELU, as OpenAI's CLIPs have it."""
    file = f"{model.removeprefix('local-dir:')}/open_clip_config.json"
    with open(file) as opened:
        settings = json.load(opened)
    settings["model_cfg"]["quick_gelu"] = True
    with open(file, "w") as opened:
        json.dump(settings, opened)
    return model


def normalised(images: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (images / 255 - mean) / std


class Tiny:
    """Two CLIPs, their prompts and a student."""

    def __init__(self, folder) -> None:
        self.models = [
            quick(clip_folder(folder / "teacher", 1, text={"layers": 4}, width=24, layers=4)),
            quick(clip_folder(folder / "student", 2)),
        ]
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return 0.2 * torch.randn(*shape, generator=generator)

        self.prompts = TeacherPrompts(draw(DEPTH, COUNT, 8), draw(DEPTH, COUNT, 24))
        self.clips = [load_clip(model, "", "teacher.") for model in self.models]
        self.tokens = self.clips[0].tokenizer([f"ab {name}." for name in NAMES])
        self.images = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=generator).to(torch.uint8)

    def theirs(self) -> list:
        """open_clip's own models: nothing of ours has been done to them."""
        return [open_clip.create_model(model).eval() for model in self.models]

    def student(self) -> PromptedTower:
        return PromptedTower(self.clips[1].image, COUNT, DEPTH, hidden=8, outputs=8, seed=4)

    def class_vectors(self) -> Tensor:
        with torch.no_grad():
            return F.normalize(self.clips[0].text(self.tokens, self.prompts.text_KPC), dim=-1)

    def ours(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients, by the product's parts."""
        student, w_ND = self.student(), self.class_vectors()
        with torch.no_grad():
            u_BD = F.normalize(self.clips[0].image(self.images, self.prompts.vision_KPC), dim=-1)
        losses = distillation(
            student(self.images, unit=False),
            Features(u_BD, self.clips[0].logit_scale),
            w_ND,
            self.clips[1].logit_scale,
            kl_weight=KD_WEIGHT / len(w_ND),
        )
        loss = losses.loss_B.mean()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in student.named_parameters()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("peers"))


def named(prompts: Tensor, projector: torch.nn.Sequential) -> dict[str, Tensor]:
    """Gradients of a peer, by the names that they have in ours."""
    told = {"prompts": prompts}
    for ours, theirs in {"first": 0, "norm": 1, "second": 3}.items():
        for part in ("weight", "bias"):
            gradient = getattr(projector[theirs], part).grad
            told[f"projector.{ours}.{part}"] = (
                gradient.flatten(2).squeeze(-1) if (gradient.ndim == 4) else gradient
            )
    return told


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if name == "projector.first.bias":  # before a batch norm: nothing but rounding
            assert max(gradient.abs().max(), found[name].abs().max()) < 1e-3
        else:
            assert_near(found[name], gradient, 1e-4)


@pytest.mark.parametrize("sdpa", [False, True])
def test_the_references_step_is_ours(tiny, sdpa):
    loss, gradients = tiny.ours()
    peer = ReferenceStep(
        *tiny.theirs(), tiny.prompts, tiny.tokens, tiny.student(), CPU, torch.float32, sdpa=sdpa
    )
    assert_near(torch.tensor(peer.step(normalised(tiny.images))), loss, 1e-4)
    prompts = torch.stack([param.grad for param in peer.student.prompts])
    require_equal(named(prompts, peer.projector), gradients)


def test_the_references_step_in_half_precision(tiny):
    """As on a GPU: near, and prompts and norms stay fp32."""
    loss, _ = tiny.ours()
    peer = ReferenceStep(
        *tiny.theirs(), tiny.prompts, tiny.tokens, tiny.student(), CPU, torch.float16
    )
    assert_near(torch.tensor(peer.step(normalised(tiny.images))), loss, 0.05)
    dtypes = {name: param.dtype for name, param in peer.student.named_parameters()}
    block = "visual.transformer.resblocks.1"
    assert dtypes["prompts.0"] == dtypes[f"{block}.ln_1.weight"] == torch.float32
    assert dtypes[f"{block}.attn.in_proj_weight"] == dtypes["visual.proj"] == torch.float16


def test_the_references_step_is_the_references(data_folder, tmp_path):
    """By its own numbers: a step, and what the student says in the next."""
    parity = Parity(data_folder / "parity" / "parity.npz", tmp_path)
    models = [open_clip.create_model(model).eval() for model in (parity.teacher, parity.student)]
    clips = [load_clip(model, "", "teacher.") for model in (parity.teacher, parity.student)]
    start = PromptedTower(clips[1].image, 4, 9, hidden=96, outputs=96, seed=0)
    start.load_state_dict(parity.student_start())
    text, vision = parity.learned("teacher_prompts/")
    tokens = clips[0].tokenizer(
        [f"a photo of a {name.replace('_', ' ')}." for name in parity.names]
    )
    prompts = TeacherPrompts(text, vision)
    peer = ReferenceStep(*models, prompts, tokens, start, CPU, torch.float32)
    for step in range(2):
        loss = peer.step(parity["images"])
        assert_near(torch.tensor(loss), parity[f"out/step{step}/loss"], 1e-5)
        wanted = parity.student_state(f"out/step{step}/grad/")
        found = named(torch.stack([p.grad for p in peer.student.prompts]), peer.projector)
        for name, gradient in wanted.items():
            if name != "projector.first.bias":
                assert_near(found[name], gradient, 2e-5)


def test_the_baselines_step_is_ours(tiny):
    loss, gradients = tiny.ours()
    teacher, student = (OpenClipTower(one.visual, torch.float32, CPU) for one in tiny.theirs())
    peer = Baseline(
        teacher,
        tiny.prompts.vision_KPC,
        OpenClipStudent(student, tiny.student()),
        tiny.class_vectors(),
        tiny.clips[0].logit_scale,
        KD_WEIGHT,
        compile=False,
    )
    assert_near(peer.step(normalised(tiny.images)), loss, 1e-4)
    require_equal(named(peer.student.prompts.grad, peer.student.projector), gradients)


def test_a_tower_without_prompts_is_open_clips(tiny):
    (teacher, _), images = tiny.theirs(), normalised(tiny.images)
    tower = OpenClipTower(teacher.visual, torch.float32, CPU)
    with torch.no_grad():
        assert torch.equal(tower(images), teacher.visual(images))


def test_open_clips_own_distillation_takes_its_steps(tiny):
    """Its loop runs, trains both of the student's towers and none of the teacher's."""
    peer = DistillModel(*tiny.theirs(), CPU)
    before = [[p.clone() for p in one.parameters()] for one in (peer._teacher, peer._student)]
    peer.step(normalised(tiny.images[:5]), tiny.tokens)
    teacher, student = (
        [torch.equal(now, then) for now, then in zip(one.parameters(), kept, strict=True)]
        for one, kept in zip((peer._teacher, peer._student), before, strict=True)
    )
    assert all(teacher) and not any(student[:2]) and sum(student) < len(student) / 2


def test_the_references_loader_gives_normalised_crops():
    from photos import draw

    batches = list(loader(draw((40, 30), 3), 5, 16, pin=False, batch=2, workers=0))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 16, 16)] * 2
    assert all(
        batch.dtype == torch.float32 and -2.5 < batch.min() < batch.max() < 3 for batch in batches
    )


def sized(layers: int, width: int, patch: int) -> SimpleNamespace:
    tower = SimpleNamespace(resblocks=range(layers), width=width)
    return SimpleNamespace(image_size=(224, 224), patch_size=(patch, patch), transformer=tower)


def test_flops_are_the_published_ones():
    """open_clip's model_profile.csv: 162.03 and 35.13 GF an image, without prompts."""
    large, base = sized(24, 1024, 14), sized(12, 768, 16)
    assert gflops(large, prompts=0) == pytest.approx(162.03, rel=1e-3)
    assert gflops(base, prompts=0) == pytest.approx(35.13, rel=1e-2)
    assert gflops(large) == pytest.approx(164.7, rel=1e-3)
    assert student_gflops(base) == pytest.approx(73.0, rel=1e-3)


def test_a_measured_step_is_its_peers():
    """Of the benchmark's own small models: the same loss, and the same prompts after it."""
    pair = Pair.drawn("small", "small", 10)
    ours = Ours(pair, CPU, ("fp32", "fp32"))
    teacher, student = (
        OpenClipTower(one.visual, torch.float32, CPU) for one in (pair.teacher, pair.student)
    )
    peer = Baseline(
        teacher,
        pair.prompts.vision_KPC,
        OpenClipStudent(student, student_of(pair, "fp32", CPU)),
        pair.w_ND,
        SCALE,
        KD_WEIGHT,
        compile=False,
    )
    images = draw_images(4, pair.pixels, CPU)
    assert_near(ours.step(images), peer.step(normalised(images)), 1e-4)
    assert_near(ours._student.prompts, peer.student.prompts, 1e-4)
