"""Stage I: prompts learned in a frozen CLIP."""

import copy

import pytest
import torch
from tiny import clip_folder
from torch.nn import functional as F

import engine.train.pretrain as module
from engine.clip.class_vectors import tokenized
from engine.clip.templates import ENSEMBLES
from engine.clip.towers import load_clip
from engine.config import UserError
from engine.config_pretrain import LearnConfig, PromptsConfig
from engine.train.pretrain import Average, MaPLe, PromptSRC, Tuner, in_chunks, new_prompts
from engine.train.schedule import gaussian_weights

NAMES = ("red", "green", "blue", "grey", "white")
COLOURS = [[230, 20, 20], [20, 230, 20], [20, 20, 230], [90, 90, 90], [250, 250, 250]]
CPU = torch.device("cpu")
TEXT = {"layers": 3, "context_length": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"), text=TEXT)


@pytest.fixture
def clip(model):
    return load_clip(model, "", "teacher.")


@pytest.fixture(scope="module")
def images():
    """Two noisy images of each colour, and their labels."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.tensor(COLOURS).view(5, 3, 1, 1).repeat(2, 1, 16, 16)
    noise = torch.randint(-20, 21, colours.shape, generator=draw)
    return (colours + noise).clamp(0, 255).to(torch.uint8), torch.arange(5).repeat(2)


def config_of(method: str, **changes) -> PromptsConfig:
    return PromptsConfig(**{"method": method, "text": 3, "vision": 3, "depth": 2, **changes})


def tuner_of(clip, method: str, dtype=torch.float32, **learn) -> Tuner:
    config = config_of(method)
    train = LearnConfig(**{"passes": 20, "lr": 0.02, **learn})
    return Tuner(clip, new_prompts(clip, config, seed=1), NAMES, config, train, CPU, dtype)


def test_prompts_start_from_the_words_and_from_noise(clip):
    config = config_of("promptsrc", text=3, vision=40, depth=3)
    learner = new_prompts(clip, config, seed=1)
    text_KPC, vision_KPC = learner.prompts()
    assert isinstance(learner, PromptSRC)
    assert (text_KPC.shape, vision_KPC.shape) == ((3, 3, 8), (3, 40, 16))
    tokens = clip.tokenizer(["a photo of a"])[0]
    assert torch.equal(text_KPC[0], clip.text.token_embedding.weight[tokens[1:4]])
    assert vision_KPC.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0.005 < text_KPC[1:].std() < 0.04


def test_maple_couples_the_towers(clip):
    learner = new_prompts(clip, config_of("maple"), seed=1)
    text_KPC, vision_KPC = learner.prompts()
    assert isinstance(learner, MaPLe)
    assert [tuple(coupler.weight.shape) for coupler in learner.couplers] == [(16, 8)] * 2
    for layer, coupler in enumerate(learner.couplers):
        wanted = text_KPC[layer] @ coupler.weight.T + coupler.bias
        torch.testing.assert_close(vision_KPC[layer], wanted)
    assert len(dict(learner.named_parameters())) == 5  # no vision prompts of their own
    vision_KPC.square().sum().backward()
    assert (learner.text_KPC.grad.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("method", ["promptsrc", "maple"])
def test_a_seed_fixes_the_start_and_nothing_else(clip, method):
    torch.manual_seed(5)
    unmoved = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (new_prompts(clip, config_of(method), seed).prompts() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), unmoved)
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one, other))


def test_prompts_that_do_not_fit_are_refused(clip):
    with pytest.raises(UserError, match=r"^prompts\.depth: 4 layers, .* has 3$"):
        new_prompts(clip, config_of("promptsrc", depth=4), seed=1)
    with pytest.raises(UserError, match=r"^prompts\.words: 'ab' has 2 tokens, prompts\.text is 3"):
        new_prompts(clip, config_of("promptsrc", words="ab"), seed=1)
    with pytest.raises(UserError, match=r"^prompts\.words: .* is too long"):
        new_prompts(clip, config_of("promptsrc", words=80 * "a "), seed=1)
    assert new_prompts(clip, config_of("promptsrc", words="abc"), seed=1)


def test_losses_are_those_of_promptsrc(clip, images):
    """By their definitions (sections 3.1 and 3.2), from the towers' features."""
    tuner = tuner_of(clip, "promptsrc")
    pixels, labels = images
    told, z_BN = tuner.losses(pixels, labels)
    text_KPC, vision_KPC = tuner.learner.prompts()
    t = F.normalize(clip.text(tokenized(clip, NAMES, "a photo of a {}.", ""), text_KPC), dim=1)
    u = F.normalize(clip.image(pixels, vision_KPC), dim=1)
    sentences = [[name.join(s.split("{}")) for name in NAMES] for s in ENSEMBLES["imagenet-60"]]
    features = torch.stack([clip.text(clip.tokenizer(part)) for part in sentences])
    anchor_t = F.normalize(features.mean(0), dim=1)
    anchor_u = F.normalize(clip.image(pixels), dim=1)
    z, anchor_z = (clip.logit_scale * a @ b.T for a, b in ((u, t), (anchor_u, anchor_t)))
    p, log_p, log_q = anchor_z.softmax(1), anchor_z.log_softmax(1), z.log_softmax(1)
    torch.testing.assert_close(z_BN, z)
    torch.testing.assert_close(told.cross_entropy, -log_q[torch.arange(10), labels].mean())
    torch.testing.assert_close(told.text, 25 * (t - anchor_t).abs().mean())
    torch.testing.assert_close(told.image, 10 * (u - anchor_u).abs().mean())
    torch.testing.assert_close(told.logits, (p * (log_p - log_q)).mean())
    wanted = told.cross_entropy + told.text + told.image + told.logits
    torch.testing.assert_close(told.total, wanted)
    assert min(told.text, told.image, told.logits) > 0


def test_the_loss_of_maple_is_cross_entropy_alone(clip, images):
    told, z_BN = tuner_of(clip, "maple").losses(*images)
    assert torch.equal(told.total, told.cross_entropy)
    assert told.text == told.image == told.logits == 0
    torch.testing.assert_close(told.total, F.cross_entropy(z_BN, images[1]))


@pytest.mark.parametrize("method", ["promptsrc", "maple"])
def test_a_few_steps_learn_and_leave_the_towers(clip, images, method):
    tuner = tuner_of(clip, method)
    before = copy.deepcopy(clip.whole.state_dict())
    starts = [part.detach().clone() for part in tuner.learner.prompts()]
    first = tuner.losses(*images)[0].cross_entropy.item()
    told = [tuner.step(pass_, *images).tolist() for pass_ in range(1, 16)]
    last, z_BN = tuner.losses(*images)
    assert told[0][1] == pytest.approx(first)
    assert last.cross_entropy < 0.8 * first and told[-1][0] < told[0][0]
    assert told[-1][2] == pytest.approx(
        (z_BN.argmax(1) == images[1]).float().mean().item(), abs=0.11
    )
    after = clip.whole.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in clip.whole.parameters())
    for start, part in zip(starts, tuner.learner.prompts(), strict=True):
        assert ((part - start).abs().amax((1, 2)) > 0).all()  # every layer's have moved


def test_the_first_pass_is_slow_and_the_rest_a_cosine(clip, images):
    """SGD's first step is the rate times the gradient."""
    for pass_, rate in ((0, 1e-5), (1, 0.02), (11, 0.01)):
        tuner = tuner_of(clip, "maple", weight_decay=0.0)
        start = tuner.learner.text_KPC.detach().clone()
        tuner.losses(*images)[0].total.backward()
        wanted = start - rate * tuner.learner.text_KPC.grad
        tuner.step(pass_, *images)
        torch.testing.assert_close(tuner.learner.text_KPC.detach(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_towers_learn_about_the_same(model, images, dtype):
    one, half = (load_clip(model, "", "teacher.") for _ in range(2))
    whole, other = tuner_of(one, "promptsrc"), tuner_of(half, "promptsrc", dtype)
    for tuner in (whole, other):
        tuner.losses(*images)[0].total.backward()
    for name, parameter in whole.learner.named_parameters():
        got = other.learner.get_parameter(name)
        assert got.dtype == got.grad.dtype == torch.float32
        # L1 has signs for gradients, and some of them turn by rounding.
        assert torch.cosine_similarity(got.grad.ravel(), parameter.grad.ravel(), dim=0) > 0.95


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_of_classes_do_not_show(clip, images, monkeypatch, chunk):
    tuner = tuner_of(clip, "promptsrc")

    def outcome() -> list[torch.Tensor]:
        tuner.learner.zero_grad()
        told, z_BN = tuner.losses(*images)
        told.total.backward()
        return [told.total.detach(), z_BN.detach(), *(p.grad for p in tuner.learner.parameters())]

    whole = [part.clone() for part in outcome()]
    sizes: list[int] = []
    hook = clip.text.register_forward_pre_hook(lambda tower, given: sizes.append(len(given[0])))
    monkeypatch.setattr(module, "CHUNK", chunk)
    parts = outcome()
    hook.remove()
    assert max(sizes) == chunk and sum(sizes) == 2 * len(NAMES)  # forward, and again in backward
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_one_chunk_is_not_computed_twice(clip):
    sizes: list[int] = []
    clip.text.register_forward_pre_hook(lambda tower, given: sizes.append(len(given[0])))
    prompts = torch.zeros(1, 2, 8, requires_grad=True)
    in_chunks(clip.text, clip.tokenizer(list(NAMES)), prompts).sum().backward()
    assert sizes == [5]


@pytest.mark.parametrize(("mean", "std"), [(3, 1), (4, 0.5), (2.5, 2)])
def test_the_average_is_the_weighted_sum(clip, mean, std):
    average = Average(LearnConfig(passes=4, average_mean=mean, average_std=std))
    draw = torch.Generator().manual_seed(0)
    ends = [torch.randn(2, 3, 8, generator=draw) for _ in range(4)]
    for pass_, end in enumerate(ends):
        average.add(pass_, (end, 2 * end))
    weights = gaussian_weights(4, mean, std)
    wanted = sum(weight * end for weight, end in zip(weights, ends, strict=True))
    got = average.prompts(clip, config_of("promptsrc", words="one big"))
    torch.testing.assert_close(got.text_KPC, wanted)
    torch.testing.assert_close(got.vision_KPC, 2 * wanted)
    assert (got.words, got.method, got.backbone) == ("one big", "promptsrc", clip.backbone)


def test_without_a_mean_the_last_prompts_are_kept(clip):
    """Whatever the deviation, even one whose weights are all 0 in floating point."""
    average = Average(LearnConfig(passes=3, average_mean=0, average_std=0.01))
    for pass_ in range(3):
        average.add(pass_, (torch.full((1, 2, 8), pass_ + 0.3), torch.full((1, 2, 16), pass_ / 3)))
    got = average.prompts(clip, config_of("maple"))
    assert torch.equal(got.text_KPC, torch.full((1, 2, 8), 2.3))
    assert torch.equal(got.vision_KPC, torch.full((1, 2, 16), 2 / 3))


def test_a_loss_that_is_not_finite_shows(clip, images):
    tuner = tuner_of(clip, "maple")
    with torch.no_grad():
        tuner.learner.text_KPC[0, 0, 0] = float("nan")
    assert tuner.step(1, *images)[:2].isnan().all()
