"""Whether a path works on a device: tried against the definitions before a run trusts it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.kl import Features, Impl, Logits, distillation

__all__ = ["trial"]

_IMAGES = 64, 65  # either side of where Triton may change its algorithm
_SCALE, _ALLOWED = 20.0, 1e-2  # a scale at which many classes count


def trial(w_ND: Tensor, impl: Impl) -> str:
    """Why KL and gradient on these class vectors cannot be had so, of a teacher's features or
    logits: what a compiler or the device says, or by how much they are wrong; empty where they can.
    Waits for the device."""
    tried = (_tried(w_ND, impl, images, form) for images in _IMAGES for form in (Features, Logits))
    return next(filter(None, tried), "")


def _tried(w_ND: Tensor, impl: Impl, images: int, form: type[Features | Logits]) -> str:
    generator = torch.Generator().manual_seed(0)
    x_BD, u_BD = (
        torch.randn(images, w_ND.shape[1], generator=generator).to(w_ND) for _ in range(2)
    )
    near_BD = w_ND[torch.arange(images, device=w_ND.device) % len(w_ND)]
    x_BD, u_BD = (near_BD + F.normalize(noise_BD, dim=-1) for noise_BD in (x_BD, u_BD))
    teacher = Features(u_BD, _SCALE) if form is Features else Logits(_SCALE * u_BD @ w_ND.T)
    weight_B = torch.ones(images, device=w_ND.device)
    told = []
    for way in (impl, "reference"):
        leaf_BD = x_BD.clone().requires_grad_()
        try:
            losses = distillation(leaf_BD, teacher, w_ND, _SCALE, weight_B=weight_B, impl=way)
            losses.loss_B.sum().backward()
        except Exception as error:  # a compiler's, a driver's or the device's: any will do
            return f"{type(error).__name__}: {error}"
        told.append((losses.kl_B, leaf_BD.grad))
    for name, ours, true in zip(("KL", "gradient"), *told, strict=True):
        wrong = ((ours - true).abs().max() / true.abs().max().clamp(min=1e-6)).item()
        if not wrong <= _ALLOWED:
            return f"its {name} is off by {wrong:.1g} of the largest"
    return ""
