"""Towers that are trained, against open_clip's own."""

import copy

import pytest
import torch
from tiny import clip_folder
from torch import Tensor, nn

from engine.clip.prompts import PromptedTower
from engine.clip.towers import Clip, load_clip
from engine.clip.trained import TrainedTower, open_clip_weights, with_weights

IMAGES = torch.randint(
    0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(model) -> Clip:
    return load_clip(model, "", "")


def normalised(clip: Clip) -> Tensor:
    cfg = clip.whole.visual.preprocess_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (IMAGES / 255 - mean) / std


def backward(features_BD: Tensor) -> None:
    (features_BD * torch.linspace(-1, 2, features_BD.numel()).view_as(features_BD)).sum().backward()


def learnt(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layers", [None, 1, 3])
def test_features_and_gradients_are_those_of_open_clip(clip, layers):
    theirs = copy.deepcopy(clip.whole.visual).requires_grad_(True)
    backward(theirs(normalised(clip)))
    tower = TrainedTower(clip, layers)
    features = tower(IMAGES)
    torch.testing.assert_close(features, clip.image(IMAGES), rtol=1e-5, atol=1e-5)
    backward(features)
    ours = open_clip_weights(learnt(tower))
    wanted = {f"visual.{name}": p for name, p in theirs.named_parameters()}
    if layers is None:
        assert ours.keys() == wanted.keys()
    else:
        parts = [f"transformer.resblocks.{i}." for i in range(3 - layers, 3)] + ["ln_post", "proj"]
        assert ours.keys() == {k for k in wanted if any(f".{part}" in k for part in parts)}
    for name, param in ours.items():
        torch.testing.assert_close(param, wanted[name])
        torch.testing.assert_close(param.grad, wanted[name].grad, rtol=1e-4, atol=1e-5)


def test_the_clip_stays_as_it_is(clip):
    before = {name: p.clone() for name, p in clip.whole.state_dict().items()}
    tower = TrainedTower(clip, None)
    for param in tower.parameters():
        param.data += 1
    weights = tower.state_dict()
    changed = with_weights(clip, weights)
    assert not learnt(clip.image) and not learnt(changed)
    assert all(torch.equal(before[name], p) for name, p in clip.whole.state_dict().items())
    torch.testing.assert_close(changed(IMAGES), tower(IMAGES), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed(IMAGES), clip.image(IMAGES), atol=0.1)
    # The same, in open_clip's own tower.
    clip.whole.load_state_dict(before | open_clip_weights(weights))
    again = clip.whole.visual(normalised(clip))
    torch.testing.assert_close(again, tower(IMAGES), rtol=1e-4, atol=1e-4)


def test_weights_come_into_the_precision_of_the_clip(clip):
    weights = TrainedTower(clip, 1).state_dict()
    clip.image.to(torch.bfloat16)
    tower = with_weights(clip, {name: weights[name] for name in ("proj", "ln_post.weight")})
    assert tower.dtype == tower.proj.dtype == torch.bfloat16
    with pytest.raises(AssertionError):
        with_weights(clip, {"strange": weights["proj"]})


def test_bf16_is_around_fp32_weights(clip):
    exact, near = (TrainedTower(clip, None, bf16) for bf16 in (False, True))
    assert near(IMAGES).dtype == torch.bfloat16
    for tower in (exact, near):
        backward(tower(IMAGES).float())
    for (name, a), b in zip(exact.named_parameters(), near.parameters(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        if not name.endswith("in_proj_bias"):  # whose keys' part is nothing but rounding
            assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm(), name


@pytest.mark.parametrize("layers", [None, 1])
def test_a_student_holds_what_is_trained(clip, layers):
    tower = TrainedTower(clip, layers)
    student = PromptedTower(tower, 2, 3, 12, 8, seed=1)
    state = student.state_dict()
    wanted = {f"tower.{name}" for name in learnt(tower)}
    assert {name for name in state if name.startswith("tower.")} == wanted
    assert student.prompts is not None and wanted
    other = PromptedTower(TrainedTower(clip, layers), 2, 3, 12, 8, seed=2)
    for param in learnt(other.tower).values():
        param.data.normal_()
    other.load_state_dict(state)
    assert torch.equal(other(IMAGES), student(IMAGES))
    for spoilt in (
        {name: value for name, value in state.items() if name != "tower.proj"},
        state | {"tower.strange": state["tower.proj"]},
    ):
        with pytest.raises(RuntimeError, match=r"tower\.(proj|strange)"):
            other.load_state_dict(spoilt)


@pytest.mark.parametrize("layers", [0, None])
def test_a_student_without_prompts(clip, layers):
    tower = clip.image if layers == 0 else TrainedTower(clip, layers)
    student = PromptedTower(tower, 0, 99, 12, 8, seed=1)
    assert "prompts" not in student.state_dict()
    u = student(IMAGES)
    wanted = student.projector(clip.image(IMAGES))
    torch.testing.assert_close(u, nn.functional.normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5)
    u[:, 0].sum().backward()
    assert all(param.grad is not None for param in learnt(student).values())
    with_prompts = PromptedTower(tower, 2, 3, 12, 8, seed=1)
    start = student.projector.state_dict()["first.weight"]
    assert torch.equal(start, with_prompts.projector.state_dict()["first.weight"])


def test_an_fp16_tower_without_prompts(clip):
    clip.image.to(torch.float16)
    student = PromptedTower(clip.image, 0, 1, 12, 8, seed=1)
    student(IMAGES)[:, 0].sum().backward()
    assert (student.projector.second.weight.grad != 0).any()
