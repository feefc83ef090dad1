import numpy as np
import pytest
import torch

from kernels.reference import cosine_distance, feature_distance, kl_divergence, logits


def closed_form(z_t: np.ndarray, z_s: np.ndarray) -> np.ndarray:
    """sum p_t (log p_t - log p_s), row by row, in float64."""
    rows = []
    for t, s in zip(z_t.astype(np.float64), z_s.astype(np.float64), strict=True):
        log_t = t - t.max() - np.log(np.exp(t - t.max()).sum())
        log_s = s - s.max() - np.log(np.exp(s - s.max()).sum())
        rows.append(sum(np.exp(a) * (a - b) for a, b in zip(log_t, log_s, strict=True)))
    return np.array(rows)


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def test_logits_are_the_scaled_products():
    u, w = unit(5, 6, seed=1), unit(7, 6, seed=2)
    wanted = [[50 * float(a.double() @ b.double()) for b in w] for a in u]
    np.testing.assert_allclose(logits(u, w, 50.0), wanted, rtol=1e-5, atol=1e-5)
    assert logits(u.half(), w, 50.0).dtype == torch.float32


def test_kl_is_the_closed_form():
    for classes in (1, 2, 1000):
        z_t, z_s = (20 * unit(6, classes, seed=seed) for seed in (3, 4))
        wanted = closed_form(z_t.numpy(), z_s.numpy())
        np.testing.assert_allclose(kl_divergence(z_t, z_s), wanted, rtol=1e-5, atol=1e-6)


def test_kl_survives_large_logits():
    z_t, z_s = torch.tensor([[100.0, -100.0]]), torch.tensor([[-100.0, 100.0]])
    assert kl_divergence(z_t, z_s).item() == 200


def test_kl_does_not_see_a_shift_of_a_row():
    z_t, z_s = 20 * unit(6, 9, seed=5), 20 * unit(6, 9, seed=6)
    shift_t, shift_s = 30 * unit(6, 1, seed=7), torch.linspace(-50, 50, 6)[:, None]
    moved = kl_divergence(z_t + shift_t, z_s + shift_s)
    torch.testing.assert_close(moved, kl_divergence(z_t, z_s), rtol=1e-4, atol=1e-5)


def test_kl_of_equal_logits_is_zero():
    z = 100 * unit(6, 50, seed=8)
    assert (kl_divergence(z, z) == 0).all()
    assert (kl_divergence(z, z.flip(0)) > 0).all()


def test_gradient_is_the_difference_of_expected_class_vectors():
    scale = 30.0
    w = unit(11, 8, seed=9)
    u_t, u_s = unit(4, 8, seed=10), unit(4, 8, seed=11).requires_grad_()
    kl_divergence(logits(u_t, w, scale), logits(u_s, w, scale)).sum().backward()
    expected_t, expected_s = (
        torch.softmax(scale * u.detach().double() @ w.double().T, -1) @ w.double()
        for u in (u_t, u_s)
    )
    wanted = scale * (expected_s - expected_t)
    torch.testing.assert_close(u_s.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 1000])
def test_cosine_distance_is_one_less_the_correlation(classes):
    z_t, z_s = (20 * unit(6, classes, seed=seed) for seed in (3, 4))
    pairs = zip(z_t.numpy(), z_s.numpy(), strict=True)
    wanted = [1 - np.corrcoef(t, s)[0, 1] for t, s in pairs]
    np.testing.assert_allclose(cosine_distance(z_t, z_s), wanted, rtol=1e-4, atol=1e-5)


def test_cosine_distance_sees_neither_shift_nor_scale_of_a_row():
    z_t, z_s = 20 * unit(6, 9, seed=5), 20 * unit(6, 9, seed=6)
    shift, scale = torch.linspace(-50, 50, 6)[:, None], torch.linspace(0.1, 3, 6)[:, None]
    moved = cosine_distance(scale * z_t + shift, z_s / scale - shift)
    torch.testing.assert_close(moved, cosine_distance(z_t, z_s), rtol=1e-4, atol=1e-5)
    same = cosine_distance(z_t.half(), z_t.half() + 1)
    assert same.dtype == torch.float32 and same.abs().max() < 1e-4
    torch.testing.assert_close(cosine_distance(z_t, -z_t), torch.full((6,), 2.0))


def test_cosine_distance_by_features_alone():
    """The Gram matrix of centred class vectors says it without logits."""
    w = unit(11, 8, seed=9).double()
    u_t, u_s = unit(4, 8, seed=10).double(), unit(4, 8, seed=11).double()
    centred = w - w.mean(0)
    gram = centred.T @ centred
    inner = [
        torch.einsum("bi,ij,bj->b", a, gram, b) for a, b in ((u_t, u_s), (u_t, u_t), (u_s, u_s))
    ]
    wanted = 1 - inner[0] / (inner[1] * inner[2]).sqrt()
    got = cosine_distance(logits(u_t, w, 30.0), logits(u_s, w, 50.0))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_logits_that_are_all_equal_have_no_direction():
    z_s = (20 * unit(3, 9, seed=6)).requires_grad_()
    distance = cosine_distance(torch.full((3, 9), 7.0), z_s)
    distance.sum().backward()
    assert (distance == 1).all() and (z_s.grad == 0).all()
    one = torch.ones(3, 1, requires_grad=True)  # of a single class
    cosine_distance(torch.ones(3, 1), one).sum().backward()
    assert (one.grad == 0).all()


def test_feature_distances_are_summed_over_dimensions():
    u_t, u_s = unit(5, 6, seed=1), unit(5, 6, seed=2)
    difference = u_t.double().numpy() - u_s.double().numpy()
    l1, mse = (feature_distance(u_t, u_s, kind) for kind in ("l1", "mse"))
    np.testing.assert_allclose(l1, np.abs(difference).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(mse, (difference**2).sum(-1), rtol=1e-5)
    torch.testing.assert_close(mse, 2 - 2 * (u_t * u_s).sum(-1), rtol=1e-4, atol=1e-5)
    assert feature_distance(u_t.half(), u_s.half(), "l1").dtype == torch.float32


@pytest.mark.parametrize("kind", ["l1", "mse", "cosine"])
def test_gradients_of_the_distances_are_those_of_small_steps(kind):
    u_t, u_s = unit(2, 5, seed=12, dtype=torch.float64), unit(2, 5, seed=13, dtype=torch.float64)

    def loss(u: torch.Tensor) -> torch.Tensor:
        far = cosine_distance(u_t, u) if kind == "cosine" else feature_distance(u_t, u, kind)
        return far.sum()

    step, moved = 1e-2, u_s.clone().requires_grad_()
    loss(moved).backward()
    for i in range(5):
        delta = step * torch.eye(5, dtype=torch.float64)[i]
        slope = (loss(u_s + delta) - loss(u_s - delta)) / (2 * step)
        assert moved.grad[:, i].sum().item() == pytest.approx(slope.item(), rel=2e-3, abs=2e-3)
