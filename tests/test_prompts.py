import copy

import pytest
import torch
from distributed import run_distributed
from tiny import clip_folder
from torch import nn
from torch.nn import functional as F

from engine.clip.prompts import GlobalBatchNorm, PromptedTower
from engine.clip.towers import load_clip


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return load_clip(clip_folder(tmp_path_factory.mktemp("clip")), "", "student.").image


def norms(width: int) -> tuple[GlobalBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's, with the same weights."""
    ours, torchs = GlobalBatchNorm(width), nn.BatchNorm1d(width)
    for norm in (ours, torchs):
        generator = torch.Generator().manual_seed(1)
        norm.weight.data = torch.randn(width, generator=generator)
        norm.bias.data = torch.randn(width, generator=generator)
    return ours, torchs


def batch(rows: int, width: int, seed: int) -> torch.Tensor:
    """Channels far from zero mean and unit variance."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 5, width) + torch.linspace(-20, 20, width)


def outcome(norm: nn.Module, x: torch.Tensor, *valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and gradients of a loss over it; of the valid rows, if told which."""
    x = x.clone().requires_grad_()
    y = norm(x, *valid)
    kept = y[valid[0]] if valid else y
    (kept * torch.linspace(-1, 2, kept.numel()).view_as(kept)).sum().backward()
    grads = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    norm.zero_grad()
    return {"y": y.detach(), **grads}


def test_batch_norm_is_that_of_torch():
    ours, torchs = norms(6)
    for step in range(3):
        x = batch(10, 6, seed=step)
        torch.testing.assert_close(outcome(ours, x), outcome(torchs, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    x = batch(10, 6, seed=9)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-4, atol=1e-5)


def test_masked_rows_have_no_influence():
    ours, torchs = norms(6)
    x = batch(10, 6, seed=1)
    valid = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    x[~valid] = 1e6
    got, wanted = outcome(ours, x, valid), outcome(torchs, x[valid])
    assert (got["x"][~valid] == 0).all()
    got |= {"y": got["y"][valid], "x": got["x"][valid]}
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


def test_step_without_a_valid_row_leaves_the_statistics():
    ours, _ = norms(6)
    ours(batch(10, 6, seed=1))
    mean, var = ours.running_mean.clone(), ours.running_var.clone()
    y = ours(batch(10, 6, seed=2), torch.zeros(10, dtype=torch.bool))
    assert y.isfinite().all()
    assert torch.equal(ours.running_mean, mean) and torch.equal(ours.running_var, var)


def norm_of_a_rank(rank: int, world: int, x: torch.Tensor, valid: torch.Tensor):
    ours, _ = norms(6)
    half = slice(0, 3) if rank == 0 else slice(3, None)  # unequal parts
    local, mask = x[half].clone().requires_grad_(), valid[half]
    y = ours(local, mask)
    (y * torch.linspace(-1, 2, x.numel()).view_as(x)[half])[mask].sum().backward()
    grads = torch.stack([ours.weight.grad, ours.bias.grad])
    return y.detach(), local.grad, grads, ours.running_mean, ours.running_var


def test_ranks_together_are_one():
    x = batch(10, 6, seed=1)
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    ours, _ = norms(6)
    whole = x.clone().requires_grad_()
    y = ours(whole, valid)
    (y * torch.linspace(-1, 2, x.numel()).view_as(x))[valid].sum().backward()
    first, second = run_distributed(norm_of_a_rank, 2, x, valid)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), whole.grad, **close)
    grads = torch.stack([ours.weight.grad, ours.bias.grad])
    torch.testing.assert_close(first[2] + second[2], grads, **close)
    for running in (first[3:], second[3:]):
        torch.testing.assert_close(running, (ours.running_mean, ours.running_var))


def test_a_seed_fixes_the_start_and_nothing_else(tower):
    torch.manual_seed(5)
    unmoved = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (PromptedTower(tower, 2, 3, 12, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), unmoved)
    starts = [student.state_dict() for student in (one, same, other)]
    for name in ("prompts", "projector.first.weight", "projector.second.bias"):
        assert torch.equal(starts[0][name], starts[1][name])
        assert not torch.equal(starts[0][name], starts[2][name])


def test_prompts_start_small(tower):
    prompts = PromptedTower(tower, 100, 3, 12, 8, seed=1).prompts
    assert prompts.shape == (3, 100, 16)
    assert prompts.std().item() == pytest.approx(0.02, rel=0.1)


def test_only_prompts_and_projector_belong_to_the_student(tower):
    student = PromptedTower(tower, 2, 3, 12, 8, seed=1)
    assert {name.split(".")[0] for name in student.state_dict()} == {"prompts", "projector"}
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    u = student(images)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(5))
    u[:, 0].sum().backward()
    assert all((parameter.grad != 0).any() for parameter in (student.prompts,))
    assert all(grad is None for grad in (p.grad for p in tower.parameters()))
    # Every layer's prompts are read.
    assert (student.prompts.grad.abs().sum((1, 2)) > 0).all()


def test_prompts_stay_fp32_around_a_half_tower(tmp_path):
    half = load_clip(clip_folder(tmp_path), "", "student.").image.to(torch.bfloat16)
    student = PromptedTower(half, 2, 3, 12, 8, seed=1)
    u = student(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8))
    u[:, 0].sum().backward()
    assert u.dtype == student.prompts.dtype == student.prompts.grad.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_activations_that_overflow_leave_the_statistics(bad):
    """As torch's batch norm does not: one such step would spoil every evaluation after it."""
    ours, torchs = norms(6)
    ours(batch(10, 6, seed=1))
    mean, var = ours.running_mean.clone(), ours.running_var.clone()
    x = batch(10, 6, seed=2)
    x[3, 2] = bad
    ours(x), torchs(x)
    assert torch.equal(ours.running_mean, mean) and torch.equal(ours.running_var, var)
    assert not torchs.running_var.isfinite().all()
    ours(batch(10, 6, seed=3))
    assert not torch.equal(ours.running_mean, mean) and ours.running_var.isfinite().all()


@pytest.fixture(scope="module")
def student(tower):
    return PromptedTower(tower, 2, 3, 12, 8, seed=1)


@pytest.fixture(scope="module")
def half(tower):
    """The same student around the same tower in fp16."""
    return PromptedTower(copy.deepcopy(tower).to(torch.float16), 2, 3, 12, 8, seed=1)


def gradients(student: PromptedTower, scale: float, forward=None) -> dict[str, torch.Tensor]:
    """Of a loss times `scale`, divided by it again, in float64."""
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=draw)
    u = (forward or student)(images)
    student.zero_grad()
    (scale * (u @ torch.randn(8, 5, generator=draw)).logsumexp(-1).sum()).backward()
    return {name: p.grad.double() / scale for name, p in student.named_parameters()}


def naive(student: PromptedTower):
    """The student's forward as autograd alone would have it."""
    return lambda images: F.normalize(
        student.projector(student.tower(images, student.prompts).float()), dim=-1
    )


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-20, 1e8])
def test_gradients_come_through_an_fp16_tower(student, half, scale):
    """Whatever the size of the loss; without care they would be lost where it is small."""
    wanted, got = gradients(student, 1.0), gradients(half, scale)
    for name in wanted:
        if name != "projector.first.bias":  # before a batch norm: nothing but rounding
            error = (got[name] - wanted[name]).norm() / wanted[name].norm()
            assert error < 0.03, name
    assert half.prompts.grad.dtype == torch.float32
    # A layer at a time, as the deeper prompts have the smaller gradients.
    layers = zip(got["prompts"], wanted["prompts"], strict=True)
    assert all((a - b).norm() < 0.05 * b.norm() for a, b in layers)


def test_without_care_small_gradients_underflow(student, half):
    lost = gradients(half, 1e-8, naive(half))["prompts"]
    assert (lost == 0).all()
    # At the scale of 1 it is the same mathematics.
    plain = gradients(student, 1.0, naive(student))["prompts"]
    assert torch.equal(plain, gradients(student, 1.0)["prompts"])
    near = gradients(half, 1.0, naive(half))["prompts"]
    assert (near - plain).norm() < 0.03 * plain.norm()


def test_an_fp16_tower_hides_no_gradient_that_is_not_finite(half):
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    for bad in (float("nan"), float("inf")):
        half.zero_grad()
        (bad * half(images)[:, 0].sum()).backward()
        assert not half.prompts.grad.isfinite().any()


def test_an_fp16_tower_may_have_no_gradient_at_all(half):
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    half.zero_grad()
    (0 * half(images)[:, 0].sum()).backward()
    assert (half.prompts.grad == 0).all()
