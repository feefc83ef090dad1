"""KL without logits in plain torch: on CPUs, and on GPUs that have no Triton.

The logits of a tile of images are made by one product, worked upon in place, and turned into a
gradient by another: dKL/du_s = a_s (p_s - p_t) w, which is a_s (O_s - O_t) with the expected class
vectors O = p w. fp32, or fp64 where the inputs are. Letters are those of `reference`, and R the
rows of a tile. What the functions take and give is told in `kl`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import wide
from kernels.tiles import by_tiles, tiles
from kernels.unit import length, through_unit

__all__ = ["dense", "expected", "features", "given", "top"]

_LOWEST = -1e30  # of logits: a class that is ruled out has -inf, and 0 * inf is nan
_BLOCK = 32  # classes whose largest logit is looked for at once


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
    w_ND = wide(w_ND)

    def work(
        memory: Tensor, x_RD: Tensor, u_RD: Tensor, weight_R: Tensor, extra_RD: Tensor
    ) -> tuple[Tensor, ...]:
        student = _Student.of(x_RD, scale, weight_R, extra_RD, kl_weight)
        query_SRD = w_ND.new_empty(2, *x_RD.shape)
        torch.mul(student.x_RD, scale / student.norm_R1, out=query_SRD[0])
        torch.mul(wide(u_RD), teacher_scale / length(u_RD), out=query_SRD[1])
        torch.mm(query_SRD.flatten(0, 1), w_ND.T, out=memory)
        R = len(x_RD)
        return _against(memory[:R], memory[R:], student, w_ND, gradient)

    kl_B, dx_BD, top_s_B, top_t_B = by_tiles(work, w_ND, 2, x_BD, u_BD, weight_B, extra_BD)
    return kl_B, dx_BD, top_s_B, top_t_B


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
    w_ND = wide(w_ND)

    def work(
        memory: Tensor, x_RD: Tensor, told_RN: Tensor, weight_R: Tensor, extra_RD: Tensor
    ) -> tuple[Tensor, ...]:
        student = _Student.of(x_RD, scale, weight_R, extra_RD, kl_weight)
        z_RN, t_RN = memory[: len(x_RD)], memory[len(x_RD) :]
        torch.mm(student.query(), w_ND.T, out=z_RN)
        t_RN.copy_(told_RN).mul_(factor).clamp_(min=_LOWEST)
        return _against(z_RN, t_RN, student, w_ND, gradient)

    kl_B, dx_BD, top_s_B, top_t_B = by_tiles(work, w_ND, 2, x_BD, z_BN, weight_B, extra_BD)
    return kl_B, dx_BD, top_s_B, top_t_B


def _against(
    z_RN: Tensor, t_RN: Tensor, student: "_Student", w_ND: Tensor, gradient: bool
) -> tuple[Tensor, ...]:
    """Of both sides' logits, which are worked upon."""
    kl_R = z_RN.new_empty(len(z_RN))
    tops = [torch.empty_like(kl_R, dtype=torch.long) for _ in range(2)]
    for rows in tiles(len(z_RN), z_RN.shape[1], z_RN.device, cached=True):
        z, t = z_RN[rows], t_RN[rows]
        (peak_s, top_s), (peak_t, top_t) = _peak(z), _peak(t)
        ahead = t.add_(peak_s - peak_t) - z  # no larger than it need be
        p_s, p_t = torch.softmax(z, dim=-1), torch.softmax(t, dim=-1)
        # The log of a sum of exponentials less the largest logit is that of 1 / its probability.
        log_s, log_t = (p.gather(-1, top)[:, 0].log() for p, top in ((p_s, top_s), (p_t, top_t)))
        kl_R[rows] = torch.linalg.vecdot(p_t, ahead) + log_t - log_s
        if gradient:
            torch.sub(p_s, p_t, out=z)
        for top_R, top_R1 in zip(tops, (top_s, top_t), strict=True):
            top_R[rows] = top_R1[:, 0]
    return *student.told(kl_R, z_RN @ w_ND if gradient else None), *tops


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
    w_ND = wide(w_ND)

    def work(
        memory: Tensor,
        x_RD: Tensor,
        o_RD: Tensor,
        lse_R: Tensor,
        dot_R: Tensor,
        weight_R: Tensor,
        extra_RD: Tensor,
    ) -> tuple[Tensor, ...]:
        student = _Student.of(x_RD, scale, weight_R, extra_RD, kl_weight)
        query_RD = student.query()
        own_R, top_R = _softmax(torch.mm(query_RD, w_ND.T, out=memory))
        kl_R = dot_R - torch.linalg.vecdot(query_RD, o_RD) - (lse_R - own_R)
        return *student.told(kl_R, memory @ w_ND - o_RD if gradient else None), top_R

    columns = x_BD, o_BD, lse_B, dot_B, weight_B, extra_BD
    kl_B, dx_BD, top_B = by_tiles(work, w_ND, 1, *columns)
    return kl_B, dx_BD, top_B


def expected(x_BD: Tensor, w_ND: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w_ND = wide(w_ND)

    def work(memory: Tensor, x_RD: Tensor) -> tuple[Tensor, ...]:
        query_RD = wide(x_RD) * (scale / length(x_RD))
        lse_R, top_R = _softmax(torch.mm(query_RD, w_ND.T, out=memory))
        o_RD = memory @ w_ND
        return o_RD, lse_R, torch.linalg.vecdot(query_RD, o_RD), top_R

    o_BD, lse_B, dot_B, top_B = by_tiles(work, w_ND, 1, x_BD)
    return o_BD, lse_B, dot_B, top_B


def _softmax(z_RN: Tensor) -> tuple[Tensor, Tensor]:
    """In place; gives the log of the sum of exponentials, and the top class."""
    lse_R = z_RN.new_empty(len(z_RN))
    top_R = torch.empty_like(lse_R, dtype=torch.long)
    for rows in tiles(len(z_RN), z_RN.shape[1], z_RN.device, cached=True):
        z = z_RN[rows]
        peak_R1, top_R1 = _peak(z)
        p = torch.softmax(z, dim=-1)
        lse_R[rows] = (peak_R1 - p.gather(-1, top_R1).log())[:, 0]
        top_R[rows] = top_R1[:, 0]
        z.copy_(p)
    return lse_R, top_R


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
    w_ND = wide(w_ND)

    def work(
        z_RN: Tensor,
        x_RD: Tensor,
        log_p_RK: Tensor,
        classes_RK: Tensor,
        log_tail_R: Tensor,
        weight_R: Tensor,
        extra_RD: Tensor,
    ) -> tuple[Tensor, ...]:
        student = _Student.of(x_RD, scale, weight_R, extra_RD, kl_weight)
        torch.mm(student.query(), w_ND.T, out=z_RN)
        most_R1, top_R1 = _peak(z_RN)
        log_p_RK, log_tail_R1 = wide(log_p_RK), wide(log_tail_R)[:, None]
        kept_RK = z_RN.gather(-1, classes_RK) - most_R1
        z_RN.scatter_(-1, classes_RK, -torch.inf)
        limits = torch.finfo(z_RN.dtype)
        peak_R1 = z_RN.amax(-1, keepdim=True).clamp(min=limits.min)  # if all classes are kept
        sum_R1 = z_RN.sub_(peak_R1).exp_().sum(-1, keepdim=True)
        others_R1 = peak_R1 - most_R1 + sum_R1.log()
        lse_R1 = torch.logaddexp(others_R1, kept_RK.logsumexp(-1, keepdim=True))
        log_q_RK, log_rest_R1 = kept_RK - lse_R1, others_R1 - lse_R1
        kl_R = _terms(log_p_RK, log_q_RK) + _terms(log_tail_R1, log_rest_R1)
        if not gradient:
            return *student.told(kl_R, None), top_R1[:, 0]
        p_RK, tail_R1 = log_p_RK.exp(), log_tail_R1.exp()
        all_R1 = p_RK.sum(-1, keepdim=True) + tail_R1  # 1 but for rounding, which may be half's
        rest_R1 = all_R1 * log_rest_R1.exp() - tail_R1
        z_RN.mul_(rest_R1 / sum_R1.clamp(min=limits.tiny))
        z_RN.scatter_(-1, classes_RK, all_R1 * log_q_RK.exp() - p_RK)
        return *student.told(kl_R, z_RN @ w_ND), top_R1[:, 0]

    columns = x_BD, log_p_BK, classes_BK, log_tail_B, weight_B, extra_BD
    kl_B, dx_BD, top_B = by_tiles(work, w_ND, 1, *columns)
    return kl_B, dx_BD, top_B


def _terms(log_p_RK: Tensor, log_q_RK: Tensor) -> Tensor:
    """The sum of p (log p - log q), where 0 log 0 = 0."""
    terms_RK = log_p_RK.exp() * (log_p_RK - log_q_RK)
    return torch.where(log_p_RK == -torch.inf, 0, terms_RK).sum(-1)


class _Student(NamedTuple):
    """A tile's rows, and what weighs upon them."""

    x_RD: Tensor
    norm_R1: Tensor
    scale: float
    weight_R: Tensor | None
    extra_RD: Tensor | None
    kl_weight: float

    @classmethod
    def of(
        cls,
        x_RD: Tensor,
        scale: float,
        weight_R: Tensor | None,
        extra_RD: Tensor | None,
        kl_weight: float,
    ) -> "_Student":
        return cls(wide(x_RD), length(x_RD), scale, weight_R, extra_RD, kl_weight)

    def query(self) -> Tensor:
        """Unit features times the scale."""
        return self.x_RD * (self.scale / self.norm_R1)

    def told(self, kl_R: Tensor, g_RD: Tensor | None) -> tuple[Tensor, Tensor]:
        """With weights: KL, and with respect to x the gradient that is scale * g of the unit
        feature; empty without g."""
        weight_R = self.weight_R
        if weight_R is not None:
            kl_R = torch.where(weight_R == 0, 0, weight_R * kl_R)
        if g_RD is None:
            return kl_R, kl_R.new_empty(0, self.x_RD.shape[1])
        factor = self.kl_weight * self.scale
        g_RD.mul_(factor if weight_R is None else factor * weight_R[:, None])
        if self.extra_RD is not None:
            g_RD.add_(self.extra_RD)
        dx_RD = through_unit(g_RD, self.x_RD, self.norm_R1)
        if weight_R is not None:
            dx_RD = torch.where(weight_R[:, None] == 0, 0, dx_RD)
        return kl_R, dx_RD


def _peak(z_RN: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit [R, 1] and the first class [R, 1] that has it. By blocks of classes, since
    torch's argmax takes several times as long on CPUs as its amax."""
    whole = z_RN.shape[1] // _BLOCK * _BLOCK
    if whole < 8 * _BLOCK:
        peak_R1, top_R1 = z_RN.max(-1, keepdim=True)
        return peak_R1, top_R1
    parts = [z_RN[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1)]
    if whole < z_RN.shape[1]:
        parts.append(z_RN[:, whole:].amax(-1, keepdim=True))
    peak_R1, block_R1 = torch.cat(parts, dim=-1).max(-1, keepdim=True)
    first_R1 = block_R1 * _BLOCK
    classes_RK = first_R1 + torch.arange(_BLOCK, device=z_RN.device)
    its = z_RN.gather(-1, classes_RK.clamp(max=z_RN.shape[1] - 1))
    return peak_R1, first_R1 + its.argmax(-1, keepdim=True)
