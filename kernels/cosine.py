"""Cosine between logit vectors without logits, through the Gram matrix of the class vectors.

The logits of a feature u are z = a W u, so that z_s . z_t is proportional to u_s^T M u_t with the
Gram matrix M = W^T W [D, D], which is made once. What is kept is a root R of it, M = R^T R, since
cos(z_s, z_t) = cos(R u_s, R u_t), and rounding in R u is as small as in the logits; in M it would
be squared. With class vectors less their mean it is Pearson's correlation: see
`reference.cosine_distance`. Letters are those of `reference`; J is the lesser of N and D.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.reference import wide
from kernels.tiles import tiles
from kernels.unit import through_loss, through_unit, unit

__all__ = [
    "Gram",
    "against_features",
    "against_logits",
    "cosine_distance",
    "gram",
]

_LEAST = 1e-8  # of a norm


class Gram(NamedTuple):
    """A root of class vectors' Gram matrix."""

    root_JD: Tensor  # fp32, or fp64 where they are; R^T R = W^T W
    centred: bool  # of class vectors less their mean


def gram(w_ND: Tensor, centred: bool = True) -> Gram:
    """Computed in fp64."""
    vectors_ND = w_ND.detach().double()
    if centred:
        vectors_ND = vectors_ND - vectors_ND.mean(dim=0)
    classes, width = vectors_ND.shape
    root = vectors_ND if classes <= width else torch.linalg.qr(vectors_ND, mode="r").R
    return Gram(root.to(wide(w_ND).dtype), centred)


def cosine_distance(x_BD: Tensor, u_BD: Tensor, gram: Gram) -> Tensor:
    """`reference.cosine_distance` of the logits of two features of any length, [B] fp32.

    The gradient is of the student's features x alone.
    """
    wants = torch.is_grad_enabled() and x_BD.requires_grad
    told_B, _ = torch.ops.promptkd.cosine_distance(x_BD, u_BD.detach(), gram.root_JD, wants)
    return told_B


def against_features(unit_BD: Tensor, u_BD: Tensor, root_JD: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [B], and its gradient [B, D] with respect to the student's unit features, from
    features of the teacher, of any length."""
    distance_B, gradient_BJ = _between(unit_BD @ root_JD.T, unit(u_BD)[0] @ root_JD.T)
    return distance_B, gradient_BJ @ root_JD


def against_logits(
    unit_BD: Tensor, z_BN: Tensor, w_ND: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """The same from logits of the teacher, which may be shifted if they are to be `centred`. What
    they hold no feature may tell, so this goes by logits, a tile of them at a time."""
    w_ND = wide(w_ND)
    distance_B, gradient_BD = unit_BD.new_empty(len(unit_BD)), torch.empty_like(unit_BD)
    for rows in tiles(len(unit_BD), len(w_ND), unit_BD.device):
        s_RN, t_RN = unit_BD[rows] @ w_ND.T, wide(z_BN[rows])
        if centred:
            s_RN, t_RN = (z - z.mean(dim=-1, keepdim=True) for z in (s_RN, t_RN))
        distance_B[rows], gradient_RN = _between(s_RN, t_RN)
        if centred:  # which it is but for rounding, and W is not
            gradient_RN = gradient_RN - gradient_RN.mean(dim=-1, keepdim=True)
        gradient_BD[rows] = gradient_RN @ w_ND
    return distance_B, gradient_BD


def _between(s_RJ: Tensor, t_RJ: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine, and its gradient with respect to s: half the squared difference of the two
    directions, which is exact where that is small."""
    (to_s_RJ, norm_R1), (to_t_RJ, _) = _direction(s_RJ), _direction(t_RJ)
    ahead_RJ = to_s_RJ - to_t_RJ
    distance_R1 = ahead_RJ.square().sum(-1, keepdim=True) / 2
    nowhere_R1 = (to_s_RJ == 0).all(-1, keepdim=True) | (to_t_RJ == 0).all(-1, keepdim=True)
    distance_R1 = torch.where(nowhere_R1, 1, distance_R1)
    return distance_R1[:, 0], (ahead_RJ - distance_R1 * to_s_RJ) / norm_R1


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit length, and the length it had. What is shorter than rounding has no direction."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm < _LEAST, 0, x / norm), norm.clamp(min=_LEAST)


@torch.library.custom_op("promptkd::cosine_distance", mutates_args=())
def _op(x_BD: Tensor, u_BD: Tensor, root_JD: Tensor, wants: bool) -> tuple[Tensor, Tensor]:
    """Distance, and its gradient with respect to x."""
    with torch.autocast(x_BD.device.type, enabled=False):
        unit_BD, norm_B1 = unit(x_BD)
        told_B, g_BD = against_features(unit_BD, u_BD, root_JD)
        if not wants:
            return told_B, g_BD.new_empty(0, g_BD.shape[1])
        return told_B, through_unit(g_BD, x_BD, norm_B1)


@_op.register_fake
def _(x_BD: Tensor, u_BD: Tensor, root_JD: Tensor, wants: bool) -> tuple[Tensor, Tensor]:
    images, like = x_BD.shape[0], wide(x_BD)  # of a tensor, len() would be a constant
    return like.new_empty(images), like.new_empty(images if wants else 0, x_BD.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # or zeros are made for every other output, [B, D] too


def _backward(
    ctx: Any, grad_B: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    (dx_BD,) = ctx.saved_tensors
    return through_loss(grad_B, dx_BD, ctx.dtype), None, None, None


_op.register_autograd(_backward, setup_context=_keep)
