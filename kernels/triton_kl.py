"""KL without logits in Triton: for GPUs, and under Triton's interpreter.

Two algorithms: one pass over W (`triton_pass`), which here is made the loss and its gradient by a
second launch with a program a row, and products of matrices (`triton_rows`). What the functions
take and give is told in `kl`; rows are computed in the dtype of W. Letters are those of
`reference`, and S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_pass import Parts, join, ready, traverse
from kernels.triton_rows import dense, top
from kernels.triton_rows import features as features_by_products
from kernels.triton_unit import Told, store_loss, unit

__all__ = [
    "dense",
    "expected",
    "features",
    "features_by_pass",
    "features_by_products",
    "given",
    "one_pass",
    "top",
]

# Provisional, reckoned for an H100 and not yet measured: from how many classes one pass is used.
CLASSES = {torch.bfloat16: 4096, torch.float16: 4096, torch.float32: 16384}


def one_pass(B: int, N: int, D: int, dtype: torch.dtype) -> bool:
    """Whether `features` goes through W in one pass, or by products of matrices. Wide features have
    few rows a program, so that W is read too often; few images fill a GPU only by many splits."""
    return N >= CLASSES[dtype] * (2 if D > 768 else 1) * (2 if B <= 64 else 1)


def features(
    x_BD: Tensor,
    u_BD: Tensor,
    w_ND: Tensor,
    weight_B: Tensor | None,
    extra_BD: Tensor | None,
    scale: float,
    teacher_scale: float,
    kl_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_pass = one_pass(len(x_BD), len(w_ND), w_ND.shape[1], w_ND.dtype)
    run = features_by_pass if by_pass else features_by_products
    return run(x_BD, u_BD, w_ND, weight_B, extra_BD, scale, teacher_scale, kl_weight, gradient)


def features_by_pass(
    x_BD: Tensor,
    u_BD: Tensor,
    w_ND: Tensor,
    weight_B: Tensor | None,
    extra_BD: Tensor | None,
    scale: float,
    teacher_scale: float,
    kl_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    told = Told.of(x_BD, weight_B, extra_BD, gradient)
    if len(x_BD):
        with torch.cuda.device_of(x_BD):
            w_ND, x_BD, u_BD = ready(w_ND, x_BD, u_BD)
            student, teacher = (x_BD, scale), (u_BD, teacher_scale)
            if gradient:
                own, its = traverse([student, teacher], w_ND, expected=True)
            else:
                (own,) = traverse([student], w_ND, expected=False)
                (its,) = traverse([teacher], w_ND, expected=True)
            _finish_features[(len(x_BD),)](
                x_BD,
                u_BD,
                *own,
                *its,
                *told,
                scale,
                teacher_scale,
                kl_weight,
                *x_BD.shape,
                **_sizes(own),
                GRADIENT=gradient,
            )
    return told.kl_B, told.dx_BD, told.top_s_B, told.top_t_B


def given(
    x_BD: Tensor,
    o_BD: Tensor,
    lse_B: Tensor,
    dot_B: Tensor,
    w_ND: Tensor,
    weight_B: Tensor | None,
    extra_BD: Tensor | None,
    scale: float,
    kl_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    told = Told.of(x_BD, weight_B, extra_BD, gradient)
    if len(x_BD):
        with torch.cuda.device_of(x_BD):
            w_ND, x_BD = ready(w_ND, x_BD)
            (own,) = traverse([(x_BD, scale)], w_ND, expected=gradient)
            _finish_given[(len(x_BD),)](
                x_BD,
                *own,
                o_BD.contiguous(),
                lse_B.contiguous(),
                dot_B.contiguous(),
                *told[:-1],
                scale,
                kl_weight,
                *x_BD.shape,
                **_sizes(own),
                GRADIENT=gradient,
            )
    return told.kl_B, told.dx_BD, told.top_s_B


def expected(x_BD: Tensor, w_ND: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, lse_B, o_BD, top_B, _ = Told.of(x_BD, None, None, gradient=True)
    dot_B = torch.empty_like(lse_B)
    if len(x_BD):
        with torch.cuda.device_of(x_BD):
            w_ND, x_BD = ready(w_ND, x_BD)
            (own,) = traverse([(x_BD, scale)], w_ND, expected=True)
            _finish_expected[(len(x_BD),)](
                x_BD, *own, o_BD, lse_B, dot_B, top_B, scale, *x_BD.shape, **_sizes(own)
            )
    return o_BD, lse_B, dot_B, top_B


def _sizes(parts: Parts) -> dict[str, int | bool]:
    S = len(parts.top_SB)
    return {
        "S": S,
        "PARTS": triton.next_power_of_2(S),
        "WIDTH": triton.next_power_of_2(parts.o_SBD.shape[-1]),
        "enable_fp_fusion": False,  # a b - c d of equal products is to be 0
    }


@triton.jit
def _finish_features(
    x_ptr,
    u_ptr,
    stats_ptr,
    top_ptr,
    o_ptr,
    t_stats_ptr,
    t_top_ptr,
    t_o_ptr,
    weight_ptr,
    extra_ptr,
    kl_ptr,
    dx_ptr,
    top_s_ptr,
    top_t_ptr,
    scale,
    teacher_scale,
    kl_weight,
    B,
    D,
    S,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    u_s, inverse = unit(x_ptr + row * D, d, D)
    u_t, _ = unit(u_ptr + row * D, d, D)
    o_s, lse_s, top_s = join(stats_ptr, top_ptr, o_ptr, row, d, B, D, S, PARTS, GRADIENT)
    o_t, lse_t, top_t = join(t_stats_ptr, t_top_ptr, t_o_ptr, row, d, B, D, S, PARTS, True)
    kl = tl.sum((teacher_scale * u_t - scale * u_s) * o_t, 0) - (lse_t - lse_s)
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    g = weight * kl_weight * scale * (o_s - o_t)
    store_loss(kl, g, 0.0, u_s, inverse, weight, kl_ptr, dx_ptr, extra_ptr, row, d, D, GRADIENT)
    tl.store(top_s_ptr + row, top_s)
    tl.store(top_t_ptr + row, top_t)


@triton.jit
def _finish_given(
    x_ptr,
    stats_ptr,
    top_ptr,
    o_ptr,
    o_t_ptr,
    lse_t_ptr,
    dot_t_ptr,
    weight_ptr,
    extra_ptr,
    kl_ptr,
    dx_ptr,
    top_s_ptr,
    scale,
    kl_weight,
    B,
    D,
    S,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    u, inverse = unit(x_ptr + row * D, d, D)
    o_s, lse_s, top_s = join(stats_ptr, top_ptr, o_ptr, row, d, B, D, S, PARTS, GRADIENT)
    o_t = tl.load(o_t_ptr + row * D + d, mask=d < D, other=0.0)
    dot_s = scale * tl.sum(u * o_t, 0)  # as `_finish_expected` has the teacher's, to the bit
    kl = tl.load(dot_t_ptr + row) - dot_s - (tl.load(lse_t_ptr + row) - lse_s)
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    g = weight * kl_weight * scale * (o_s - o_t)
    store_loss(kl, g, 0.0, u, inverse, weight, kl_ptr, dx_ptr, extra_ptr, row, d, D, GRADIENT)
    tl.store(top_s_ptr + row, top_s)


@triton.jit
def _finish_expected(
    x_ptr,
    stats_ptr,
    top_ptr,
    part_ptr,
    o_ptr,
    lse_ptr,
    dot_ptr,
    tops_ptr,
    scale,
    B,
    D,
    S,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    u, _ = unit(x_ptr + row * D, d, D)
    o, lse, top = join(stats_ptr, top_ptr, part_ptr, row, d, B, D, S, PARTS, True)
    tl.store(o_ptr + row * D + d, o, mask=d < D)
    tl.store(lse_ptr + row, lse)
    tl.store(dot_ptr + row, scale * tl.sum(u * o, 0))
    tl.store(tops_ptr + row, top)
