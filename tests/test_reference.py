import numpy as np
import torch

from kernels.reference import kl_divergence, logits


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
