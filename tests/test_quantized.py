"""Image towers in 8 bits, against themselves in full."""

import copy

import numpy as np
import pytest
import torch
from tiny import clip_folder
from torch.nn import functional as F

from engine.clip.class_vectors import encode_classes
from engine.clip.layers import Tricks
from engine.clip.quantized import QuantizedLayer, full_precision, quantized, require_device
from engine.clip.towers import load_clip
from engine.config import UserError
from jobs.quickstart.domain import CLASSES, render
from kernels.reference import kl_divergence, logits

KINDS = ("int8", "fp8")
CUDA = torch.device("cuda")
QUICKSTART = "local-dir:jobs/quickstart/models"
# Half a step is 1/254 of a row's largest number in int8, and 1/16 of each number in fp8: which is,
# over a row, some 1 % and 3 % of its length, and what 6 layers of it add up to is to be no more.
COSINE = {"int8": 0.9999, "fp8": 0.999}


@pytest.fixture(scope="module", params=["gelu", "quick_gelu", "tanh"])
def clip(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    told = {"act_kwargs": {"approximate": "tanh"}} if request.param == "tanh" else {}
    clip = load_clip(clip_folder(folder, width=32, layers=3, **told), "", "teacher.")
    if request.param == "quick_gelu":
        from open_clip.transformer import QuickGELU

        for layer in clip.image.blocks:
            layer.mlp.gelu = QuickGELU()
    assert clip.image.blocks[0].activation == (None if told else request.param)
    return clip


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)


def prompts(depth: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(depth)
    return torch.randn(depth, 2, 32, generator=generator) if depth else None


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_of_random_weights_is_near(clip, images, kind):
    ours = quantized(clip.image, kind)
    for depth in (0, 1, 3):
        told = prompts(depth)
        cosine_B = F.cosine_similarity(ours(images, told), clip.image(images, told))
        assert 0.99 < cosine_B.min() and cosine_B.max() < 1 - 1e-7  # it is not the same
        assert ours(images[:0], told).shape == (0, clip.image.embed_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_tricks_are_as_exact_as_in_full(clip, images, kind):
    """Rows are rounded alike wherever they stand; what is left are sums in another order, which
    may round a number the other way: once in a while by a step."""
    ours = quantized(clip.image, kind)
    for depth in range(4):
        told = prompts(depth)
        ours.tricks = Tricks()
        wanted = ours(images, told)
        for off in Tricks._fields:
            ours.tricks = Tricks()._replace(**{off: False})
            assert F.cosine_similarity(ours(images, told), wanted).min() > 0.9999


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_tower_stays_and_its_weights_do_not_stay_with_the_other(clip, images, kind):
    before = clip.image(images)
    state = copy.deepcopy(clip.image.state_dict())
    ours = quantized(clip.image, kind)
    assert all(isinstance(layer, QuantizedLayer) for layer in ours.blocks)
    assert all(torch.equal(t, state[name]) for name, t in clip.image.state_dict().items())
    assert torch.equal(clip.image(images), before) and ours.dtype == torch.float32
    assert ours.patch.weight is clip.image.patch.weight and ours.proj is clip.image.proj
    matrices = [t for t in ours.blocks.state_dict().values() if t.ndim == 2]
    assert len(matrices) == 4 * 3 and all(t.element_size() == 1 for t in matrices)
    ours.requires_grad_(False)
    assert not ours(images).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_stay_in_their_image(clip, images, kind):
    ours = quantized(clip.image, kind)
    wanted = ours(images)
    patch = copy.deepcopy(ours.patch)

    def spoilt(images_BCHW, product=True):
        x = patch(images_BCHW, product)
        x[2, 1, 3] = torch.nan
        return x

    ours.patch.forward, kept = spoilt, ours.patch.forward
    told = ours(images)
    ours.patch.forward = kept
    assert told[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(told[others], wanted[others], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_graph(clip, images, kind):
    ours = quantized(clip.image, kind)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        told = prompts(2)
        torch.testing.assert_close(compiled(images, told), ours(images, told))


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_towers_keep_what_they_say(which, kind):
    """The quickstart's, on pictures of the domain that they were not trained on."""
    clip = load_clip(f"{QUICKSTART}/{which}", "", "teacher.")
    size = (clip.image.pixels, clip.image.pixels)
    pictures = [np.array(render(n % 48, "domain", n).resize(size)) for n in range(96)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    w_ND = torch.from_numpy(encode_classes(clip, CLASSES, ("a photo of a {}.",)).vectors)
    with torch.inference_mode():
        full, ours = (
            F.normalize(tower(images), dim=-1)
            for tower in (clip.image, quantized(clip.image, kind))
        )
    assert F.cosine_similarity(full, ours).mean() >= COSINE[kind]
    z_full, z_ours = (logits(u_BD, w_ND, clip.logit_scale) for u_BD in (full, ours))
    assert kl_divergence(z_full, z_ours).mean() < (1e-3 if kind == "int8" else 1e-2)
    assert (z_full.argmax(1) == z_ours.argmax(1)).float().mean() >= 0.93


@pytest.mark.parametrize(
    ("kind", "has", "fits", "other"),
    [
        ("fp8", (8, 9), True, ""),
        ("fp8", (9, 0), True, ""),
        ("fp8", (8, 6), False, "Take int8 or fp16"),
        ("fp8", (7, 5), False, "Take fp16"),
        ("int8", (8, 0), True, ""),
        ("int8", (7, 5), False, "Take fp16"),
    ],
)
def test_a_gpu_without_such_units_is_refused(kind, has, fits, other, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    if fits:
        return require_device(kind, CUDA)
    with pytest.raises(UserError, match=rf"^teacher\.precision: {kind} needs a GPU .* {other}$"):
        require_device(kind, CUDA)


def test_what_it_is_compared_with():
    assert full_precision("fp8", CUDA) == full_precision("int8", CUDA) == "fp16"
    assert full_precision("fp8", torch.device("cpu")) == "fp32"
    assert full_precision("bf16", CUDA) == "bf16"


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_on_a_gpu_is_that_of_the_definition(gpu, kind):
    """fp16 out of both; of a width that cuBLAS takes, with prompts, a token and a batch alone."""
    clip = load_clip(f"{QUICKSTART}/teacher", "", "teacher.")
    images = torch.randint(0, 256, (70, 3, clip.image.pixels, clip.image.pixels)).to(torch.uint8)
    told = torch.randn(3, 4, clip.image.width)
    wanted = quantized(clip.image, kind)(images, told)
    ours = quantized(clip.image.to(CUDA, torch.float16), kind)
    for part in (slice(70), slice(1)):
        answer = ours(images[part].to(CUDA), told.to(CUDA)).float().cpu()
        assert F.cosine_similarity(answer, wanted[part]).min() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_captured_in_a_cuda_graph(gpu, kind):
    clip = load_clip(f"{QUICKSTART}/teacher", "", "teacher.")
    ours = quantized(clip.image.to(CUDA, torch.float16), kind)
    shape = 32, 3, clip.image.pixels, clip.image.pixels
    images = torch.randint(0, 256, shape, device=CUDA).to(torch.uint8)
    with torch.inference_mode():
        compiled = torch.compile(ours, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            answer = compiled(images).float().clone()
        # Both are rounded to 8 bits, and not from the same last digits.
        assert F.cosine_similarity(answer, ours(images).float()).min() > COSINE[kind]
