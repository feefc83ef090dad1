"""Matrix products in 8 bits (W8A8): what their inputs and weights are rounded to, and the product.

Rows of inputs (one a token) and of weights (one an output channel) have a scale each, by which
their largest number becomes the largest of the 8-bit type: x = scale * values, nearly. The scale of
a row that holds nan or inf is nan, and so is all that is made of it. Rows are quantised by the
kernel that makes them (`normed`, `activated`), since products over few numbers take no longer than
another pass over memory would.

On a GPU these are kernels of Triton, but for fp8 products on Hopper, which are cuBLAS's by
`torch._scaled_mm`; elsewhere they follow their definitions, in fp32, which is for tests and not
fast. All are operations of torch: `torch.compile` does not look into them, CUDA graphs record them.
Letters: M rows, K numbers in each, N output channels.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "TYPES",
    "Activation",
    "Kind",
    "Quantized",
    "activated",
    "normed",
    "product",
    "quantized",
]

Kind = Literal["fp8", "int8"]
Activation = Literal["gelu", "quick_gelu"]
TYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
LEAST = 1e-30  # the largest number of a row counts as no less: 1 / scale is to be finite
_ALIGNED = 16  # torch._scaled_mm wants K and N to be multiples of it


class Quantized(NamedTuple):
    """Rows in 8 bits."""

    values_MK: Tensor  # int8 or float8_e4m3fn
    scale_M: Tensor  # fp32

    def wide(self) -> Tensor:
        """What they stand for, fp32."""
        return self.values_MK.float() * self.scale_M[:, None]


def quantized(x_MK: Tensor, kind: Kind) -> Quantized:
    """Rows, of any floating dtype, in 8 bits."""
    return Quantized(*_quantized(x_MK, kind))


def normed(x_MK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, kind: Kind) -> Quantized:
    """Layer norm of rows, in 8 bits. Statistics are fp32, and nothing between is rounded."""
    return Quantized(*_normed(x_MK, weight_K, bias_K, eps, kind))


def activated(x_MK: Tensor, activation: Activation, kind: Kind) -> Quantized:
    """GELU (by erf) or QuickGELU, x sigmoid(1.702 x), of rows, in 8 bits."""
    return Quantized(*_activated(x_MK, activation, kind))


def product(rows: Quantized, weight: Quantized, bias_N: Tensor) -> Tensor:
    """rows weight^T + bias, [M, N], in the dtype of the bias. Sums of int8 are exact; those of fp8
    are fp32, or what a GPU's fast accumulation makes of them (about 14 bits, on Hopper)."""
    return _product(*rows, *weight, bias_N)


# ------------------------------------------------------------ operations


@torch.library.custom_op("promptkd::quantized", mutates_args=())
def _quantized(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if x_MK.is_cuda:
        from kernels import triton_quantize

        return triton_quantize.quantized(x_MK, kind)
    return _rounded(x_MK.float(), kind)


@torch.library.custom_op("promptkd::normed", mutates_args=())
def _normed(
    x_MK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    if x_MK.is_cuda:
        from kernels import triton_quantize

        return triton_quantize.normed(x_MK, weight_K, bias_K, eps, kind)
    wide = x_MK.float(), (x_MK.shape[1],), weight_K.float(), bias_K.float()
    return _rounded(F.layer_norm(*wide, eps), kind)


@torch.library.custom_op("promptkd::activated", mutates_args=())
def _activated(x_MK: Tensor, activation: str, kind: str) -> tuple[Tensor, Tensor]:
    if x_MK.is_cuda:
        from kernels import triton_quantize

        return triton_quantize.activated(x_MK, activation, kind)
    x_MK = x_MK.float()
    y_MK = F.gelu(x_MK) if activation == "gelu" else x_MK * torch.sigmoid(1.702 * x_MK)
    return _rounded(y_MK, kind)


@torch.library.custom_op("promptkd::product8", mutates_args=())
def _product(
    values_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor
) -> Tensor:
    if values_MK.is_cuda:
        if _by_cublas(values_MK, weight_NK, bias_N):
            return torch._scaled_mm(
                values_MK,
                weight_NK.T,
                scale_M[:, None],
                scale_N[None],
                bias_N,
                out_dtype=bias_N.dtype,
                use_fast_accum=True,
            )
        from kernels import triton_quantize

        return triton_quantize.product(values_MK, scale_M, weight_NK, scale_N, bias_N)
    if values_MK.dtype == torch.int8:
        sums_MN = torch._int_mm(values_MK, weight_NK.T).float()
    else:
        sums_MN = values_MK.float() @ weight_NK.float().T
    return (sums_MN * scale_M[:, None] * scale_N + bias_N.float()).to(bias_N.dtype)


def _by_cublas(values_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> bool:
    """Row-wise scales are cuBLAS's (12.9) on compute capability 9.0 alone. Elsewhere torch has
    CUTLASS's kernels, which its own tests try in fp16 nowhere below 9.0. (ScaledBlas.cpp and
    test_scaled_matmul_cuda.py, torch 2.10 to 2.15.)"""
    aligned = weight_NK.shape[0] % _ALIGNED == weight_NK.shape[1] % _ALIGNED == 0
    return (
        values_MK.dtype == torch.float8_e4m3fn
        and bias_N.dtype != torch.float32  # with which it takes no bias
        and aligned
        and hopper(values_MK.device)
    )


def hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _rounded(y_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The definition: fp32 rows in 8 bits."""
    peak_M = y_MK.abs().amax(dim=1)  # nan where there is one
    finite_M = peak_M.isfinite()
    scale_M = peak_M.clamp(min=LEAST) / LARGEST[kind]
    values_MK = y_MK * (1 / scale_M)[:, None]
    if kind == "int8":
        values_MK = values_MK.round()
    values_MK = values_MK.masked_fill(~finite_M[:, None], 0).to(TYPES[kind])
    return values_MK, scale_M.masked_fill(~finite_M, torch.nan)


def empty(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Memory for rows in 8 bits, of the shape of others."""
    rows = x_MK.shape[0]  # len() would be a constant in torch.compile
    return x_MK.new_empty(x_MK.shape, dtype=TYPES[kind]), x_MK.new_empty(rows, dtype=torch.float32)


@_quantized.register_fake
def _(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return empty(x_MK, kind)


@_normed.register_fake
def _(
    x_MK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    return empty(x_MK, kind)


@_activated.register_fake
def _(x_MK: Tensor, activation: str, kind: str) -> tuple[Tensor, Tensor]:
    return empty(x_MK, kind)


@_product.register_fake
def _(
    values_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor
) -> Tensor:
    return bias_N.new_empty(values_MK.shape[0], weight_NK.shape[0])
