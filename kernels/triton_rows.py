"""KL by products of matrices and one kernel of rows, in Triton: for few classes, and where a
teacher tells logits or probabilities of classes.

The logits of a chunk of images are products in the weights' dtype, kept in fp32. One program a row
makes of them the loss and G, its gradient with respect to the student's logits, and G W, added to
dx, is the gradient of raw features: four launches for a teacher's features. Letters are those of
`reference`; what the functions take and give is told in `kl`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_unit import LOWEST, Told, store_loss, unit

__all__ = ["dense", "features", "top"]

CHUNK = 2**24  # logits of a side at a time: 64 MB
GAIN = tl.constexpr(64.0)  # G times this is stored, lest fp16 take a small one for 0


@triton.jit
def _logits(z_ptr, n, N, a):
    """A block of a row's logits; -inf past the last."""
    z = tl.load(z_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    return tl.where(n < N, a * z, float("-inf"))


@triton.jit
def _none():
    """Of no logits yet, what `_online` tells."""
    return tl.full((), LOWEST, tl.float32), tl.full((), 0, tl.float32), tl.full((), 0, tl.int32)


@triton.jit
def _online(z, n, N, m, total, top):
    """Largest logit, sum of exponentials and top class of a row, with a block more."""
    peak = tl.max(z, 0)
    top = tl.where(peak > m, tl.min(tl.where(z == peak, n, N), 0), top)
    higher = tl.maximum(m, peak)
    return higher, total * tl.exp(m - higher) + tl.sum(tl.exp(z - higher), 0), top


@triton.jit
def _store_gradient(difference, z, n, N, factor, g_ptr):
    """Store a block of G, and give what it adds to the sum of G z, where G is rounded."""
    g = (factor * difference * GAIN).to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + n, g, mask=n < N)
    return tl.sum(tl.where(z == float("-inf"), 0.0, g.to(tl.float32) * z), 0) / GAIN


@triton.jit
def _rows(
    x_ptr,
    u_ptr,
    z_ptr,
    t_ptr,
    g_ptr,
    weight_ptr,
    extra_ptr,
    kl_ptr,
    dx_ptr,
    top_s_ptr,
    top_t_ptr,
    scale,
    teacher_scale,
    kl_weight,
    z_stride,
    t_stride,
    g_stride,
    N,
    D,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """z and t are logits but for their scales, and the lengths of x and, where there is one, u."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    z_ptr += row * z_stride
    t_ptr += row * t_stride
    u, inverse = unit(x_ptr + row * D, d, D)
    a_s, a_t = scale * inverse, teacher_scale
    if u_ptr is not None:
        _, inverse_t = unit(u_ptr + row * D, d, D)
        a_t = teacher_scale * inverse_t

    m_s, total_s, top_s = _none()
    m_t, total_t, top_t = _none()
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        m_s, total_s, top_s = _online(_logits(z_ptr, n, N, a_s), n, N, m_s, total_s, top_s)
        m_t, total_t, top_t = _online(_logits(t_ptr, n, N, a_t), n, N, m_t, total_t, top_t)

    weight = tl.full((), 1, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    # A row of weight 0 may hold nan, which is not to reach the product.
    factor = tl.where(weight == 0, 0.0, weight * inverse)
    log_s, log_t = tl.log(total_s), tl.log(total_t)
    kl, along = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        z, t = _logits(z_ptr, n, N, a_s), _logits(t_ptr, n, N, a_t)
        log_p_s, log_p_t = z - m_s - log_s, t - m_t - log_t
        p_t = tl.exp(log_p_t)
        kl += tl.sum(tl.where(t == float("-inf"), 0.0, p_t * (log_p_t - log_p_s)), 0)
        if GRADIENT:
            difference = tl.where(weight == 0, 0.0, tl.exp(log_p_s) - p_t)
            along += _store_gradient(difference, z, n, N, factor, g_ptr + row * g_stride)

    none = tl.zeros([WIDTH], tl.float32)
    along *= kl_weight  # G z, where z = scale u w
    store_loss(kl, none, along, u, inverse, weight, kl_ptr, dx_ptr, extra_ptr, row, d, D, GRADIENT)
    tl.store(top_s_ptr + row, top_s.to(tl.int64))
    tl.store(top_t_ptr + row, top_t.to(tl.int64))


@triton.jit
def _rows_of_top(
    x_ptr,
    z_ptr,
    kept_ptr,
    log_p_ptr,
    classes_ptr,
    log_tail_ptr,
    g_ptr,
    g_kept_ptr,
    weight_ptr,
    extra_ptr,
    kl_ptr,
    dx_ptr,
    top_s_ptr,
    scale,
    kl_weight,
    z_stride,
    g_stride,
    N,
    D,
    K,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """z is -inf at the kept classes, whose logits, but for the scale, are `kept`."""
    row, d, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, KEPT)
    z_ptr += row * z_stride
    u, inverse = unit(x_ptr + row * D, d, D)
    a = scale * inverse

    m, total, top = _none()
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        m, total, top = _online(_logits(z_ptr, n, N, a), n, N, m, total, top)

    kept = _logits(kept_ptr + row * K, k, K, a)
    classes = tl.load(classes_ptr + row * K + k, mask=k < K, other=N)
    peak = tl.max(kept, 0)
    its_class = tl.min(tl.where(kept == peak, classes, N), 0)
    top = tl.where(peak > m, its_class, tl.where(peak == m, tl.minimum(top, its_class), top))
    m_all = tl.maximum(m, peak)
    log_all = tl.log(total * tl.exp(m - m_all) + tl.sum(tl.exp(kept - m_all), 0))
    log_q = kept - m_all - log_all
    log_q_tail = m - m_all + tl.log(total) - log_all
    log_p = tl.load(log_p_ptr + row * K + k, mask=k < K, other=float("-inf")).to(tl.float32)
    log_p_tail = tl.load(log_tail_ptr + row).to(tl.float32)
    p, p_tail = tl.exp(log_p), tl.exp(log_p_tail)
    kl = tl.sum(tl.where(log_p == float("-inf"), 0.0, p * (log_p - log_q)), 0)
    kl += tl.where(log_p_tail == float("-inf"), 0.0, p_tail * (log_p_tail - log_q_tail))

    weight = tl.full((), 1, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    along = tl.full((), 0, tl.float32)
    if GRADIENT:
        factor = tl.where(weight == 0, 0.0, weight * inverse)
        p_all = tl.sum(p, 0) + p_tail
        # Of exp(z - m): the student's share of all outcomes less the teacher's tail, spread alike.
        rest = (p_all * tl.exp(log_q_tail) - p_tail) / tl.maximum(total, 1e-30)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            z = _logits(z_ptr, n, N, a)
            difference = tl.where(weight == 0, 0.0, rest * tl.exp(z - m))
            along += _store_gradient(difference, z, n, N, factor, g_ptr + row * g_stride)
        difference = tl.where(weight == 0, 0.0, p_all * tl.exp(log_q) - p)
        along += _store_gradient(difference, kept, k, K, factor, g_kept_ptr + row * K)

    none = tl.zeros([WIDTH], tl.float32)
    along *= kl_weight
    store_loss(kl, none, along, u, inverse, weight, kl_ptr, dx_ptr, extra_ptr, row, d, D, GRADIENT)
    tl.store(top_s_ptr + row, top.to(tl.int64))


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
    told = Told.of(x_BD, weight_B, extra_BD, gradient)
    with torch.cuda.device_of(x_BD):
        u_BD = u_BD.to(w_ND.dtype).contiguous()
        for rows, its, x_RD in _chunks(told, x_BD, w_ND):
            t_RN = _product(u_BD[rows], w_ND.T)
            _against(t_RN, u_BD[rows], its, x_RD, w_ND, scale, teacher_scale, kl_weight)
    return told.kl_B, told.dx_BD, told.top_s_B, told.top_t_B


def dense(
    x_BD: Tensor,
    z_BN: Tensor,
    w_ND: Tensor,
    weight_B: Tensor | None,
    extra_BD: Tensor | None,
    scale: float,
    factor: float,
    kl_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    told = Told.of(x_BD, weight_B, extra_BD, gradient)
    with torch.cuda.device_of(x_BD):
        for rows, its, x_RD in _chunks(told, x_BD, w_ND):
            t_RN = z_BN[rows]
            t_RN = t_RN if t_RN.stride(1) == 1 else t_RN.contiguous()
            _against(t_RN, None, its, x_RD, w_ND, scale, factor, kl_weight)
    return told.kl_B, told.dx_BD, told.top_s_B, told.top_t_B


def _against(
    t_RN: Tensor,
    u_RD: Tensor | None,
    told: Told,
    x_RD: Tensor,
    w_ND: Tensor,
    scale: float,
    teacher_scale: float,
    kl_weight: float,
) -> None:
    z_RN = _product(x_RD, w_ND.T)
    gradient = len(told.dx_BD) > 0
    g_RN = _memory_of_gradient(z_RN, w_ND) if gradient else z_RN
    _rows[(len(x_RD),)](
        x_RD,
        u_RD,
        z_RN,
        t_RN,
        g_RN,
        *told,
        scale,
        teacher_scale,
        kl_weight,
        z_RN.stride(0),
        t_RN.stride(0),
        g_RN.stride(0),
        *w_ND.shape,
        **_sizes(w_ND),
        GRADIENT=gradient,
    )
    if gradient:
        _add_product(told.dx_BD, g_RN, w_ND, kl_weight * scale / GAIN.value)


def top(
    x_BD: Tensor,
    log_p_BK: Tensor,
    classes_BK: Tensor,
    log_tail_B: Tensor,
    w_ND: Tensor,
    weight_B: Tensor | None,
    extra_BD: Tensor | None,
    scale: float,
    kl_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    told = Told.of(x_BD, weight_B, extra_BD, gradient)
    K = classes_BK.shape[1]
    with torch.cuda.device_of(x_BD):
        log_p_BK, log_tail_B = log_p_BK.contiguous(), log_tail_B.contiguous()
        classes_BK = classes_BK.contiguous()
        for rows, its, x_RD in _chunks(told, x_BD, w_ND):
            classes_RK = classes_BK[rows]
            z_RN = _product(x_RD, w_ND.T)
            kept_RK = z_RN.gather(1, classes_RK)
            z_RN.scatter_(1, classes_RK, -torch.inf)
            g_RN = _memory_of_gradient(z_RN, w_ND) if gradient else z_RN
            g_RK = torch.empty_like(kept_RK, dtype=g_RN.dtype)
            _rows_of_top[(len(x_RD),)](
                x_RD,
                z_RN,
                kept_RK,
                log_p_BK[rows],
                classes_RK,
                log_tail_B[rows],
                g_RN,
                g_RK,
                *its[:-1],
                scale,
                kl_weight,
                z_RN.stride(0),
                g_RN.stride(0),
                *w_ND.shape,
                K,
                KEPT=triton.next_power_of_2(K),
                **_sizes(w_ND),
                GRADIENT=gradient,
            )
            if gradient:
                g_RN.scatter_(1, classes_RK, g_RK)
                _add_product(its.dx_BD, g_RN, w_ND, kl_weight * scale / GAIN.value)
    return told.kl_B, told.dx_BD, told.top_s_B


def _chunks(told: Told, x_BD: Tensor, w_ND: Tensor) -> Iterator[tuple[slice, Told, Tensor]]:
    """Images in slices whose logits are at most CHUNK numbers: what is told of them, and x in the
    dtype of W."""
    x_BD = x_BD.to(w_ND.dtype).contiguous()
    size = max(1, CHUNK // len(w_ND))
    for start in range(0, len(x_BD), size):
        rows = slice(start, start + size)
        yield rows, told.rows(rows), x_BD[rows]


def _sizes(w_ND: Tensor) -> dict[str, Any]:
    N, D = w_ND.shape
    block = min(4096, triton.next_power_of_2(N))
    return {
        "WIDTH": triton.next_power_of_2(D),
        "BLOCK": block,
        "num_warps": 4 if block <= 1024 else 8,
        "enable_fp_fusion": False,  # a b - c d of equal products is to be 0
    }


def _memory_of_gradient(z_RN: Tensor, w_ND: Tensor) -> Tensor:
    """For G, in the dtype of W: that of the logits if they have it, else with rows that start at
    multiples of 16 bytes, as fast products need."""
    if z_RN.dtype == w_ND.dtype:
        return z_RN
    R, N = z_RN.shape
    return w_ND.new_empty(R, N + -N % 8)[:, :N]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32. CPUs, where the interpreter runs, have no fp32 product of half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _add_product(sum_: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """sum += factor a b, in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(sum_, a, b, out_dtype=torch.float32, alpha=factor, out=sum_)
    else:
        sum_.addmm_(a.float(), b.float(), alpha=factor)
