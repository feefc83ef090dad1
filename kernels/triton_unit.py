"""What Triton kernels with a row a program share: unit length, and how loss and gradient leave.

`d` are the D places of a row, padded to a power of two. Letters are those of `reference`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LOWEST", "Told", "store_loss", "unit"]

LOWEST = tl.constexpr(-3.4e38)  # below all logits, and finite, since -inf - -inf is nan


class Told(NamedTuple):
    """Memory for what is told of images, after what weighs upon it."""

    weight_B: Tensor | None
    extra_BD: Tensor | None
    kl_B: Tensor
    dx_BD: Tensor
    top_s_B: Tensor
    top_t_B: Tensor

    @classmethod
    def of(
        cls, x_BD: Tensor, weight_B: Tensor | None, extra_BD: Tensor | None, gradient: bool
    ) -> "Told":
        B, D = x_BD.shape
        kl_B = torch.empty(B, dtype=torch.float32, device=x_BD.device)
        return cls(
            weight_B if weight_B is None else weight_B.contiguous(),
            extra_BD if extra_BD is None else extra_BD.contiguous(),
            kl_B,
            kl_B.new_empty(B if gradient else 0, D),
            kl_B.new_empty(B, dtype=torch.int64),
            kl_B.new_empty(B, dtype=torch.int64),
        )

    def rows(self, rows: slice) -> "Told":
        return Told(*(t if t is None else t[rows] for t in self))  # type: ignore[arg-type]


@triton.jit
def unit(x_ptr, d, D):
    """A row, fp32, over its length, and 1 / length. As torch's normalize: not below 1e-12."""
    x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)
    return x * inverse, inverse


@triton.jit
def store_loss(
    kl, g, along, u, inverse, weight, kl_ptr, dx_ptr, extra_ptr, row, d, D, GRADIENT: tl.constexpr
):
    """Store a row's weighted KL and, through its normalisation, the gradient g of u, and extra's.

    Where a part of g, over the length, is added to dx later, `along` is how far that points along
    u. A row of weight 0 gives 0, whatever it holds.
    """
    tl.store(kl_ptr + row, tl.where(weight == 0, 0.0, weight * kl))
    if GRADIENT:
        if extra_ptr is not None:
            g += tl.load(extra_ptr + row * D + d, mask=d < D, other=0.0)
        dx = (g - tl.sum(g * u, 0) * u) * inverse - along * u
        tl.store(dx_ptr + row * D + d, tl.where(weight == 0, 0.0, dx), mask=d < D)
