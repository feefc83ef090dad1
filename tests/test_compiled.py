import copy

import pytest
import torch
from tiny import clip_folder
from torch._dynamo.utils import counters

from engine.clip.compiled import compiled
from engine.clip.quantized import quantized
from engine.clip.towers import ImageTower, load_clip
from engine.config import StudentConfig, UserError

IMAGES, PROMPTS = 4, torch.zeros(2, 2, 16).normal_(generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "clip"
    clip_folder(folder)
    return load_clip(f"local-dir:{folder}", "", "student.").image


def some(images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(images)
    return torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_a_compiled_tower_is_the_tower(tower):
    """Features and the prompts' gradient, of the batch it was compiled for, smaller and larger."""
    run = compiled(tower, IMAGES, PROMPTS.clone().requires_grad_(), "on", "student.compile")
    assert run is not tower
    for images in (IMAGES, IMAGES - 1, IMAGES + 1):
        told = []
        for forward in (run, tower):
            leaf = (2 * PROMPTS).requires_grad_()
            features = forward(some(images), leaf)
            features.square().sum().backward()
            told.append((features.detach(), leaf.grad))
        for ours, right in zip(*told, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_no_images_are_compiled_for_anew(tower):
    """As decoders and loaders give them: other strides, fewer, or made in inference mode."""
    run = compiled(tower, IMAGES, PROMPTS, "on", "teacher.compile")
    graphs = counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        decoded = some(IMAGES).contiguous(memory_format=torch.channels_last)
        for images in (decoded, some(IMAGES), some(IMAGES - 1), decoded[1:], some(1)):
            torch.testing.assert_close(run(images, PROMPTS), tower(images, PROMPTS))
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_tower_in_8_bits_may_differ_by_some_of_them(tower):
    """The last digits of fp16 are not the compiler's."""
    eighth = quantized(copy.deepcopy(tower).half(), "fp8")
    assert compiled(eighth, IMAGES, PROMPTS, "on", "teacher.compile") is not eighth


def test_cpus_compile_where_they_are_told_to(tower):
    assert compiled(tower, IMAGES, None, "auto", "teacher.compile") is tower
    assert compiled(tower, IMAGES, None, "off", "teacher.compile") is tower


class Uncompiled(ImageTower):
    """Has no features for a compiler."""

    def forward(self, images_BCHW, prompts_KPC=None):
        torch._dynamo.graph_break()
        return images_BCHW.float().mean((2, 3))


class Miscompiled(ImageTower):
    """Has other features for a compiler."""

    def forward(self, images_BCHW, prompts_KPC=None):
        return images_BCHW.float().mean((2, 3)) * (2 if torch.compiler.is_compiling() else 1)


@pytest.mark.parametrize(
    "kind, why", [(Uncompiled, "Unsupported"), (Miscompiled, "its features are off by 1 of")]
)
def test_what_cannot_be_compiled_is_refused(tower, monkeypatch, kind, why):
    monkeypatch.setattr(tower, "__class__", kind)
    said = rf"^teacher\.compile: compiled for cpu, the tower fails: {why}"
    with pytest.raises(UserError, match=said):
        compiled(tower, IMAGES, None, "on", "teacher.compile")


def test_a_trained_tower_is_not_compiled():
    with pytest.raises(UserError, match=r"^student\.compile: on is for frozen towers"):
        StudentConfig(trainable="last:2", compile="on")


@pytest.mark.gpu
@pytest.mark.parametrize("images", [4, 96])  # with a CUDA graph, and without
@pytest.mark.parametrize("learns", [False, True])
def test_a_tower_compiled_for_a_gpu_is_the_tower(tower, images, learns, capsys):
    """On a stream of its own, step after step with other prompts."""
    on_gpu = tower.to("cuda", torch.bfloat16)
    try:
        leaf = PROMPTS.cuda().requires_grad_(learns)
        run = compiled(on_gpu, images, leaf, "on", "student.compile")
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), torch.inference_mode(not learns):
            for step in range(3):
                batch = some(images).cuda().roll(step, 0)
                told = PROMPTS.cuda() if not learns else (step * PROMPTS.cuda()).requires_grad_()
                near = torch.cosine_similarity(
                    run(batch, told).float(), on_gpu(batch, told).float()
                )
                assert near.min() > 0.99
        torch.cuda.synchronize()
    finally:
        tower.to("cpu", torch.float32)
