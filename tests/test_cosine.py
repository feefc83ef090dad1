"""Cosine without logits, against the logits' own."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cosine import against_features, against_logits, cosine_distance, gram
from kernels.reference import cosine_distance as by_logits
from kernels.reference import logits


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(images: int, classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    w_ND = F.normalize(drawn(classes, width, seed=1) + drawn(1, width, seed=2), dim=-1)
    x_BD = 5 * F.normalize(drawn(images, width, seed=3), dim=-1) + 3 * w_ND[0]
    return x_BD, x_BD + drawn(images, width, seed=4) / width**0.5, w_ND


def of_definition(x: Tensor, u: Tensor, w: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    z_s, z_t = (logits(F.normalize(f, dim=-1), w, 50.0) for f in (x, u))
    distance = by_logits(z_t, z_s, centred)
    distance.sum().backward()
    return distance.detach(), x.grad


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 64), (7, 10, 512), (5, 1203, 96), (3, 21_841, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_cosine_of_the_logits(shape, centred, dtype):
    """As exact as the logits' own in the same dtype."""
    x, u, w = (t.to(dtype) for t in case(*shape))
    truth, true_dx = of_definition(x.double(), u.double(), w.double(), centred)
    eager, eager_dx = of_definition(x, u, w, centred)
    leaf = x.clone().requires_grad_()
    ours = cosine_distance(leaf, u, gram(w, centred))
    ours.sum().backward()
    assert leaf.grad.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    slack = tolerance.get(dtype, 5e-7)
    assert (ours - truth).abs().max() <= (eager - truth).abs().max() + min(slack, 1e-7)
    wrong, allowed = (leaf.grad - true_dx).abs().max(), (eager_dx - true_dx).abs().max()
    terms = 1 / x.double().norm(dim=-1).min()  # whose difference the gradient is
    assert wrong <= allowed + slack * max(true_dx.abs().max(), terms)


def test_root_is_no_larger_than_it_must_be():
    _, _, w = case(1, 300, 32)
    for vectors, rows in ((w, 32), (w[:9], 9)):
        for centred in (True, False):
            kept = vectors - vectors.mean(0) if centred else vectors
            root = gram(vectors, centred).root_JD
            assert len(root) == rows
            torch.testing.assert_close(root.T @ root, kept.T @ kept)


def test_teacher_by_logits_may_be_shifted_if_they_are_centred():
    for classes in (9, 40):
        x, u, w = case(6, classes, 16)
        unit_x = F.normalize(x, dim=-1)
        z = logits(F.normalize(u, dim=-1), w, 50.0)
        for centred in (True, False):
            root = gram(w, centred)
            wanted = against_features(unit_x, u, root.root_JD)
            shift = drawn(6, 1, seed=9) if centred else 0
            torch.testing.assert_close(against_logits(unit_x, z + shift, w, centred), wanted)


def test_real_class_vectors(data_folder):
    """With 0.6 to 0.8 between any two, and ties."""
    for file in sorted((data_folder / "class_vectors").glob("*.npy")):
        w = F.normalize(torch.from_numpy(np.load(file)).float(), dim=-1)
        x = w[::17] + 0.8 * F.normalize(drawn(*w[::17].shape, seed=5).float(), dim=-1)
        u = x + 0.02 * drawn(*x.shape, seed=6).float()
        truth, _ = of_definition(x.double(), u.double(), w.double(), True)
        eager, _ = of_definition(x, u, w, True)
        allowed = (eager - truth).abs().max()
        assert (cosine_distance(x, u, gram(w)) - truth).abs().max() <= allowed, file.name


def test_equal_features_and_classes_without_difference():
    x, _, w = case(6, 40, 16)
    leaf = x.float().requires_grad_()
    distance = cosine_distance(leaf, x.float(), gram(w.float()))
    distance.sum().backward()
    assert distance.abs().max() < 1e-6 and leaf.grad.abs().max() < 1e-6
    same = w[:1].expand(40, 16)
    leaf = x.clone().requires_grad_()
    cosine_distance(leaf, x, gram(same)).sum().backward()
    assert leaf.grad.isfinite().all()


def test_no_image_and_one_that_is_no_number():
    x, u, w = case(6, 40, 16)
    assert cosine_distance(x[:0], u[:0], gram(w)).shape == (0,)
    x[2] = torch.nan
    leaf = x.requires_grad_()
    distance = cosine_distance(leaf, u, gram(w))
    distance.sum().backward()
    assert (
        distance.isnan().tolist() == leaf.grad.isnan().all(1).tolist() == [n == 2 for n in range(6)]
    )


def test_gradient_is_that_of_small_steps():
    x, u, w = case(3, 11, 8)
    for centred in (True, False):
        root = gram(w, centred)
        assert torch.autograd.gradcheck(
            lambda x, g=root: cosine_distance(x, u, g), x.requires_grad_()
        )


def test_is_one_operation_for_the_compiler():
    x, u, w = case(3, 11, 8)
    root = gram(w)
    told = []
    for call in (lambda x: cosine_distance(2 * x, u, root), None):
        call = call or torch.compile(
            lambda x: cosine_distance(2 * x, u, root), fullgraph=True, backend="aot_eager"
        )
        leaf = x.clone().requires_grad_()
        value = call(leaf)
        value.sum().backward()
        told.append((value.detach(), leaf.grad))
    torch.testing.assert_close(told[0], told[1])
    torch.library.opcheck(
        torch.ops.promptkd.cosine_distance.default,
        (x.clone().requires_grad_(), u, root.root_JD, True),
    )


@pytest.mark.parametrize("length", [1e-12, 1e12])
def test_features_are_of_any_length(length):
    x, u, w = (t.float() for t in case(6, 40, 16))
    root = gram(w)
    wanted = cosine_distance(x, u, root)
    torch.testing.assert_close(cosine_distance(x / length, u * length, root), wanted)


def test_there_is_no_second_derivative():
    x, u, w = case(3, 11, 8)
    told = cosine_distance(x.requires_grad_(), u, gram(w)).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(told, x, create_graph=True)
