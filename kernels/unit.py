"""Unit length, and the way back of a gradient through it."""

import torch
from torch import Tensor

from kernels.reference import wide

__all__ = ["through_unit", "unit"]


def unit(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and the lengths [B, 1] they had; fp32. As torch's normalize, a row that is
    shorter than 1e-12 is divided by that."""
    x_BD = wide(x_BD)
    norm_B1 = torch.linalg.vector_norm(x_BD, dim=-1, keepdim=True).clamp(min=1e-12)
    return x_BD / norm_B1, norm_B1


def through_unit(g_BD: Tensor, unit_BD: Tensor, norm_B1: Tensor) -> Tensor:
    """The gradient with respect to x, of one with respect to x / |x|: only what turns x counts."""
    along_B1 = (g_BD * unit_BD).sum(-1, keepdim=True)
    return (g_BD - along_B1 * unit_BD) / norm_B1
