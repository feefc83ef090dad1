"""`quantize` by Triton: a program a row makes and rounds it, having read it once; and the product,
whose sums are scaled and rounded before they leave the chip.

An int32 product [M, N] in memory, as `torch._int_mm` gives, would be written and read again: of
65,792 rows (256 images of ViT-L/14) and K = 1024, N = 4096 that is 2.2 GB, which takes an A100
longer than the product itself (0.55 TOP).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize import LARGEST, LEAST, empty, hopper

__all__ = ["activated", "normed", "product", "quantized"]

_LEAST = tl.constexpr(LEAST)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: fp32 has no fractions there, and rounds to even
_GROUP = tl.constexpr(8)  # tiles of rows that share a tile of weights in the L2 cache


@triton.jit
def _store(y, row, k, K, values_ptr, scale_ptr, LARGEST: tl.constexpr):
    """Store a row, fp32 and 0 past its end, in 8 bits."""
    # A maximum may pass over nan; of a comparison it does not.
    finite = tl.min((tl.abs(y) < float("inf")).to(tl.int32), 0) > 0
    scale = tl.maximum(tl.max(tl.abs(y), 0), _LEAST) / LARGEST
    values = tl.where(finite, y * (1 / scale), 0.0)
    if values_ptr.dtype.element_ty == tl.int8:
        values = (values + _ROUND) - _ROUND
    tl.store(values_ptr + row * K + k, values.to(values_ptr.dtype.element_ty), mask=k < K)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))


@triton.jit
def _quantize(x_ptr, values_ptr, scale_ptr, stride, K, LARGEST: tl.constexpr, WIDTH: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    _store(x, row, k, K, values_ptr, scale_ptr, LARGEST)


@triton.jit
def _norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    values_ptr,
    scale_ptr,
    stride,
    K,
    eps,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    centred = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)
    y = centred * inverse * weight + bias
    _store(y, row, k, K, values_ptr, scale_ptr, LARGEST)


@triton.jit
def _activate(
    x_ptr,
    values_ptr,
    scale_ptr,
    stride,
    K,
    LARGEST: tl.constexpr,
    QUICK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    if QUICK:
        y = x / (1 + tl.exp(-1.702 * x))
    else:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    _store(y, row, k, K, values_ptr, scale_ptr, LARGEST)


@triton.jit
def _multiply(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y = (x w^T) x_scale w_scale + bias. `WHOLE`: K is a multiple of its block."""
    program, across, down = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = program // (_GROUP * across) * _GROUP
    group = tl.minimum(down - first, _GROUP)
    place = program % (_GROUP * across)
    m = (first + place % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = place // group * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the last row there is another; what is made of it is not stored.
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    whole: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if whole else tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - start, other=0.0)
        sums = tl.dot(x, w, sums, out_dtype=tl.int32 if whole else tl.float32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


def quantized(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    x_MK, told = _strided(x_MK), empty(x_MK, kind)
    with torch.cuda.device_of(x_MK):
        _quantize[(len(x_MK),)](x_MK, *told, *_sizes(x_MK), LARGEST=LARGEST[kind], **_launch(x_MK))
    return told


def normed(
    x_MK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    x_MK, told = _strided(x_MK), empty(x_MK, kind)
    with torch.cuda.device_of(x_MK):
        _norm[(len(x_MK),)](
            x_MK,
            weight_K.contiguous(),
            bias_K.contiguous(),
            *told,
            *_sizes(x_MK),
            eps,
            LARGEST=LARGEST[kind],
            **_launch(x_MK),
        )
    return told


def activated(x_MK: Tensor, activation: str, kind: str) -> tuple[Tensor, Tensor]:
    x_MK, told = _strided(x_MK), empty(x_MK, kind)
    with torch.cuda.device_of(x_MK):
        _activate[(len(x_MK),)](
            x_MK,
            *told,
            *_sizes(x_MK),
            LARGEST=LARGEST[kind],
            QUICK=activation == "quick_gelu",
            **_launch(x_MK),
        )
    return told


def product(
    values_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor
) -> Tensor:
    (M, K), N = values_MK.shape, len(weight_NK)
    y_MN = bias_N.new_empty(M, N)
    tile = _tile(M, values_MK.device)
    programs = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    with torch.cuda.device_of(values_MK):
        _multiply[(programs,)](
            values_MK.contiguous(),
            scale_M.contiguous(),
            weight_NK.contiguous(),
            scale_N.contiguous(),
            bias_N.contiguous(),
            y_MN,
            M,
            N,
            K,
            WHOLE=K % tile["BLOCK_K"] == 0,
            **tile,
        )
    return y_MN


def _strided(x_MK: Tensor) -> Tensor:
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _sizes(x_MK: Tensor) -> tuple[int, int]:
    return x_MK.stride(0), x_MK.shape[1]


def _launch(x_MK: Tensor) -> dict[str, Any]:
    width = triton.next_power_of_2(x_MK.shape[1])
    # Sixteen numbers a thread. Without fused multiplications rounding is that of the definition.
    warps = min(max(width // 512, 1), 16)
    return {"WIDTH": width, "num_warps": warps, "enable_fp_fusion": False}


def _tile(M: int, device: torch.device) -> dict[str, int]:
    """Of a product: as large as registers hold its sums, and shared memory three stages of what is
    multiplied. Before Hopper, whose units read shared memory by themselves, that is less."""
    if M <= 64:  # class tokens and prompts
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    wide = 256 if hopper(device) else 128
    return {"BLOCK_M": 128, "BLOCK_N": wide, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
