"""Unit length, and the way back of a gradient through it, and through a loss."""

import torch
from torch import Tensor

from kernels.reference import wide

__all__ = ["length", "through_loss", "through_unit", "unit"]


def length(x_BD: Tensor) -> Tensor:
    """Of rows [B, 1], fp32; as torch's normalize has it, at least 1e-12."""
    return torch.linalg.vector_norm(wide(x_BD), dim=-1, keepdim=True).clamp(min=1e-12)


def unit(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, fp32, and the lengths they had."""
    norm_B1 = length(x_BD)
    return wide(x_BD) / norm_B1, norm_B1


def through_unit(g_BD: Tensor, x_BD: Tensor, norm_B1: Tensor) -> Tensor:
    """The gradient with respect to x, of one with respect to x / |x|: only what turns x counts.
    Works upon g."""
    x_BD = wide(x_BD)
    along_B1 = torch.linalg.vecdot(g_BD, x_BD)[:, None] / norm_B1 / norm_B1
    return g_BD.addcmul_(x_BD, along_B1, value=-1).div_(norm_B1)


def through_loss(grad_B: Tensor | None, dx_BD: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient with respect to x, whose losses have the gradients dx, made with their values.
    RuntimeError where a second derivative is prepared for."""
    if grad_B is None:
        return None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kernels have no second derivative; the definitions in reference do")
    return (grad_B[:, None] * dx_BD).to(dtype)
