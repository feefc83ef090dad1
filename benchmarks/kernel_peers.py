"""The losses of `kernels` by others, by ours, and as ours might have been; for `bench_kernels`.

A provider makes a function that gives the loss of a problem, summed over its images (`mean`: their
mean, where it has nothing else), from which a gradient flows to the student's raw features alone.
"""

import importlib
import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import cosine
from kernels.kl import Features, Impl, distillation
from kernels.unit import through_unit, unit

__all__ = ["Problem", "Provider", "liger", "providers", "why_no_liger"]


class Problem(NamedTuple):
    x_BD: Tensor  # of any length; takes the gradient
    u_BD: Tensor  # unit rows, as those of w
    w_ND: Tensor
    scale: float  # of both sides' logits


Loss = Callable[[Problem], Tensor]
Make = Callable[[Problem], Callable[[], Tensor]]


class Provider(NamedTuple):
    make: Make
    flops: str  # of its matrix products, by B, N, D and J = min(N, D)
    # The least that can be moved by who does it like this, with the bytes s of a number: all inputs
    # read, the gradient written, and each matrix of logits written and read once.
    least_bytes: str
    mean: bool = False


INPUTS = "s*(3*B*D + N*D)"
LOGITS = f"{INPUTS} + 6*s*B*N"  # both sides', and their gradient
WIDE_LOGITS = f"{INPUTS} + (16 + 2*s)*B*N"  # in fp32, but for the gradient


def providers(loss: str, cuda: bool) -> dict[str, Provider]:
    """By name; `ours` is the product as it is, what is named ours-* are parts of it."""
    known = LOSSES[loss] | (LIGER[loss] if cuda and not why_no_liger() else {})
    return {name: p for name, p in known.items() if cuda or name not in ON_GPUS}


def why_no_liger() -> str:
    """Why Liger cannot take part, "" if it can. It needs the package liger-kernel and a GPU."""
    try:
        version("liger-kernel")
    except PackageNotFoundError as error:
        return f"no package {error.name}"
    return "" if torch.cuda.is_available() else "no GPU"


def _made(loss: Loss) -> Make:
    return lambda problem: lambda: loss(problem)


def _compiled(loss: Loss) -> Make:
    """In torch.compile's default mode, for these shapes alone."""

    def make(problem: Problem) -> Callable[[], Tensor]:
        compiled = torch.compile(loss, dynamic=False, fullgraph=True)
        return lambda: compiled(problem)

    return make


# ---------------------------------------------------------------- eager, as one would write it


def _logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's, in the dtype of the inputs."""
    x_BD, u_BD, w_ND, scale = problem
    return scale * F.normalize(x_BD, dim=-1) @ w_ND.T, scale * u_BD @ w_ND.T


def kl(problem: Problem) -> Tensor:
    log_s, log_t = (F.log_softmax(z, dim=-1, dtype=torch.float32) for z in _logits(problem))
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True)


def cosine_of_logits(problem: Problem) -> Tensor:
    z_s, z_t = (z.float() for z in _logits(problem))
    return (1 - F.cosine_similarity(z_s, z_t, dim=-1)).sum()


# ---------------------------------------------------------------- ours


def _ours(impl: Impl) -> Make:
    def loss(problem: Problem) -> Tensor:
        x_BD, u_BD, w_ND, scale = problem
        return distillation(x_BD, Features(u_BD, scale), w_ND, scale, impl=impl).loss_B.sum()

    return _made(loss)


def _our_cosine(problem: Problem) -> Callable[[], Tensor]:
    """The root is made beforehand: class vectors stay the same for all of a training."""
    gram = cosine.gram(problem.w_ND, centred=False)
    return lambda: cosine.cosine_distance(problem.x_BD, problem.u_BD, gram).sum()


class _Given(torch.autograd.Function):
    """A loss whose gradient is known with it."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, loss_B: Tensor, dx_BD: Tensor) -> Tensor:
        ctx.save_for_backward(dx_BD)
        return loss_B.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (dx_BD,) = ctx.saved_tensors
        return grad * dx_BD, None, None


def _way(name: str) -> Make:
    """One of the two in which the Triton path can go."""

    def make(problem: Problem) -> Callable[[], Tensor]:
        features = getattr(importlib.import_module("kernels.triton_kl"), name)
        x_BD, u_BD, w_ND, scale = problem

        def call() -> Tensor:
            told = features(x_BD.detach(), u_BD, w_ND, None, None, scale, scale, 1.0, True)
            return _Given.apply(x_BD, told[0], told[1].to(x_BD.dtype))

        return call

    return make


# ---------------------------------------------------------------- ours, as they might have been


def _online(tile: int) -> Make:
    """Classes in tiles, with softmax's maximum and sum carried on, as the fused kernel has it: a
    matrix product more, and expected class vectors rescaled in memory."""

    def loss(problem: Problem) -> Tensor:
        x_BD, u_BD, w_ND, scale = problem
        unit_BD, norm_B1 = unit(x_BD.detach())
        query_RD = scale * torch.cat([u_BD, unit_BD])
        o_RD = torch.zeros_like(query_RD)
        sum_R1 = query_RD.new_zeros(len(query_RD), 1)
        most_R1 = query_RD.new_full((len(query_RD), 1), -math.inf)
        for w_TD in w_ND.split(tile):
            z_RT = query_RD @ w_TD.T
            new_R1 = torch.maximum(most_R1, z_RT.amax(-1, keepdim=True))
            keep_R1 = (most_R1 - new_R1).exp_()
            z_RT.sub_(new_R1).exp_()
            sum_R1.mul_(keep_R1).add_(z_RT.sum(-1, keepdim=True))
            o_RD.mul_(keep_R1).addmm_(z_RT, w_TD)
            most_R1 = new_R1
        (o_t_BD, o_s_BD), lse_R1 = o_RD.div_(sum_R1).chunk(2), most_R1 + sum_R1.log()
        lse_t_B1, lse_s_B1 = lse_R1.chunk(2)
        kl_B = (scale * (u_BD - unit_BD) * o_t_BD).sum(-1) + (lse_s_B1 - lse_t_B1)[:, 0]
        dx_BD = through_unit(scale * (o_s_BD - o_t_BD), x_BD.detach(), norm_B1)
        return _Given.apply(x_BD, kl_B, dx_BD)

    return _made(loss)


def _rows(tile: int) -> Make:
    """Images in tiles, as the product's torch path, but with torch's log_softmax."""

    def loss(problem: Problem) -> Tensor:
        x_BD, u_BD, w_ND, scale = problem
        unit_BD, norm_B1 = unit(x_BD.detach())
        size = max(1, tile // len(w_ND))
        kl_B, g_BD = torch.empty_like(norm_B1[:, 0]), torch.empty_like(unit_BD)
        for start in range(0, len(x_BD), size):
            rows = slice(start, start + size)
            log_s = torch.log_softmax(scale * unit_BD[rows] @ w_ND.T, dim=-1)
            log_t = torch.log_softmax(scale * u_BD[rows] @ w_ND.T, dim=-1)
            p_t = log_t.exp()
            kl_B[rows] = (log_t.sub_(log_s) * p_t).sum(-1)
            torch.mm(log_s.exp_().sub_(p_t), w_ND, out=g_BD[rows])
        return _Given.apply(x_BD, kl_B, through_unit(g_BD.mul_(scale), x_BD.detach(), norm_B1))

    return _made(loss)


# ---------------------------------------------------------------- Liger's


def _liger_jsd(problem: Problem) -> Callable[[], Tensor]:
    """Fused linear JSD at beta 0, the forward KL. Class vectors that take no gradient get none."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    x_BD, u_BD, w_ND, scale = problem
    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=1 / scale)
    return lambda: loss(F.normalize(x_BD, dim=-1), w_ND, u_BD, w_ND, None)


def _liger_linear_kl(problem: Problem) -> Callable[[], Tensor]:
    """Fused linear KL against probabilities, which are made here, in the inputs' dtype."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    x_BD, u_BD, w_ND, scale = problem
    loss = LigerFusedLinearKLDivLoss(reduction="sum", temperature=1 / scale)

    def call() -> Tensor:
        p_t = torch.softmax(scale * u_BD @ w_ND.T, dim=-1)
        return loss(F.normalize(x_BD, dim=-1), w_ND, p_t)

    return call


def _liger_kl_div(problem: Problem) -> Callable[[], Tensor]:
    """KL of log-probabilities, which are made here."""
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="sum", log_target=True)

    def call() -> Tensor:
        return loss(*(F.log_softmax(z, dim=-1, dtype=torch.float32) for z in _logits(problem)))

    return call


def _liger_chunked(name: str, **settings: float) -> Make:
    """Its chunked losses, with the soft loss alone: they make the class vectors' gradient too."""

    def make(problem: Problem) -> Callable[[], Tensor]:
        from liger_kernel import chunked_loss

        x_BD, u_BD, w_ND, scale = problem
        loss = getattr(chunked_loss, name)(
            weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=1 / scale, **settings
        )
        labels_B = torch.zeros(len(x_BD), dtype=torch.long, device=x_BD.device)
        return lambda: loss(F.normalize(x_BD, dim=-1), w_ND, u_BD, w_ND, labels_B)

    return make


def liger() -> str:
    """Its version."""
    return version("liger-kernel")


THREE, FOUR = "6*B*N*D", "8*B*N*D"  # matrix products with class vectors
LOSSES = {
    "kl": {
        "ours": Provider(_ours("auto"), THREE, INPUTS),
        "ours-torch": Provider(_ours("torch"), THREE, INPUTS),
        "ours-one-pass": Provider(_way("features_by_pass"), FOUR, INPUTS),
        "ours-products": Provider(_way("features_by_products"), THREE, WIDE_LOGITS),
        "ours-reference": Provider(_ours("reference"), THREE, LOGITS),
        "eager": Provider(_made(kl), THREE, LOGITS),
        "compile": Provider(_compiled(kl), THREE, LOGITS),
    },
    "cosine": {
        "ours": Provider(_our_cosine, "6*B*J*D", "s*3*B*D + 4*J*D"),
        "eager": Provider(_made(cosine_of_logits), THREE, LOGITS),
        "compile": Provider(_compiled(cosine_of_logits), THREE, LOGITS),
    },
    "variants": {
        "ours": Provider(_ours("torch"), THREE, INPUTS),
        "eager": Provider(_made(kl), THREE, LOGITS),
        "rows-2^19": Provider(_rows(2**19), THREE, INPUTS),
        "rows-2^22": Provider(_rows(2**22), THREE, INPUTS),
        "online-512": Provider(_online(512), FOUR, INPUTS),
        "online-2048": Provider(_online(2048), FOUR, INPUTS),
    },
}
ON_GPUS = {"ours-torch", "ours-one-pass", "ours-products"}  # on CPUs, ours is ours-torch
LIGER = {
    "kl": {
        "liger-jsd": Provider(_liger_jsd, THREE, LOGITS, mean=True),
        "liger-linear-kl": Provider(_liger_linear_kl, THREE, LOGITS),
        "liger-kl-div": Provider(_liger_kl_div, THREE, LOGITS),
        "liger-chunked": Provider(
            _liger_chunked("LigerFusedLinearJSDLoss", beta=0.0), FOUR, LOGITS, mean=True
        ),
    },
    "cosine": {
        "liger-chunked": Provider(
            _liger_chunked("LigerFusedLinearCosineSimilarityLoss", beta=1.0),
            FOUR,
            LOGITS,
            mean=True,
        )
    },
    "variants": {},
}
