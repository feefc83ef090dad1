"""Whether a path works on a device: tried against the definitions before a run trusts it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.kl import Features, Impl, distillation

__all__ = ["trial"]

_IMAGES, _SCALE, _ALLOWED = 64, 20.0, 1e-2  # a scale at which many classes count


def trial(w_ND: Tensor, impl: Impl) -> str:
    """ "", or why KL and gradient of features on these class vectors cannot be had so: what a
    compiler or the device says, or by how much they are wrong. Waits for the device."""
    generator = torch.Generator().manual_seed(0)
    x_BD, u_BD = (
        torch.randn(_IMAGES, w_ND.shape[1], generator=generator).to(w_ND) for _ in range(2)
    )
    near_BD = w_ND[torch.arange(_IMAGES, device=w_ND.device) % len(w_ND)]
    x_BD, u_BD = (near_BD + F.normalize(noise_BD, dim=-1) for noise_BD in (x_BD, u_BD))
    told = []
    for way in (impl, "reference"):
        leaf_BD = x_BD.clone().requires_grad_()
        try:
            losses = distillation(leaf_BD, Features(u_BD, _SCALE), w_ND, _SCALE, impl=way)
            losses.loss_B.sum().backward()
        except Exception as error:  # a compiler's, a driver's or the device's: any will do
            return f"{type(error).__name__}: {error}"
        told.append((losses.kl_B, leaf_BD.grad))
    for name, ours, true in zip(("KL", "gradient"), *told, strict=True):
        wrong = ((ours - true).abs().max() / true.abs().max().clamp(min=1e-6)).item()
        if not wrong <= _ALLOWED:
            return f"its {name} is off by {wrong:.1g} of the largest"
    return ""
