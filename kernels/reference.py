"""The losses by their definitions, in eager torch: every kernel's truth, on any device.

Letters: B images, N classes, D embedding width, K classes that are kept. `u` are unit image
features, `x` features of any length, `w` class vectors (unit rows), `a` a logit scale already
divided by the temperature; logits are z = a u w^T. Half precision is computed in fp32.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "cosine_distance",
    "feature_distance",
    "kl_divergence",
    "kl_divergence_of_top",
    "logits",
    "wide",
]


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logits(u_BD: Tensor, w_ND: Tensor, scale: float) -> Tensor:
    """z = a u w^T, [B, N] fp32."""
    return scale * (wide(u_BD) @ wide(w_ND).T)


def kl_divergence(teacher_logits_BN: Tensor, student_logits_BN: Tensor) -> Tensor:
    """KL(softmax(z_t) || softmax(z_s)) of every image, [B] fp32, in nats.

    Logits may be shifted by a constant per image. PromptKD's loss is tau^2 times its mean.
    """
    log_t = torch.log_softmax(wide(teacher_logits_BN), dim=-1)
    log_s = torch.log_softmax(wide(student_logits_BN), dim=-1)
    terms_BN = log_t.exp() * (log_t - log_s)
    return torch.where(log_t == -torch.inf, 0, terms_BN).sum(dim=-1)  # 0 log 0 = 0


def kl_divergence_of_top(
    log_p_BK: Tensor, classes_BK: Tensor, log_tail_B: Tensor, student_logits_BN: Tensor
) -> Tensor:
    """KL of every image over K + 1 outcomes, [B] fp32: K classes, each its own, and all others
    together. The teacher's log-probabilities of these are `log_p` and `log_tail`."""
    log_s_BN = torch.log_softmax(wide(student_logits_BN), dim=-1)
    others_BN = log_s_BN.scatter(-1, classes_BK, -torch.inf)
    log_q_BJ = torch.cat(
        [log_s_BN.gather(-1, classes_BK), others_BN.logsumexp(dim=-1, keepdim=True)], dim=-1
    )
    log_p_BJ = torch.cat([wide(log_p_BK), wide(log_tail_B)[:, None]], dim=-1)
    terms_BJ = log_p_BJ.exp() * (log_p_BJ - log_q_BJ)
    return torch.where(log_p_BJ == -torch.inf, 0, terms_BJ).sum(dim=-1)


def cosine_distance(
    teacher_logits_BN: Tensor, student_logits_BN: Tensor, centred: bool = True
) -> Tensor:
    """1 - cosine of every image's two logit vectors, each less its mean over classes; [B] fp32.

    Without the mean it would see a constant added to the logits of an image, which no softmax does,
    and up to which alone soft targets are known: it is 1 - Pearson's correlation. Nor does it see a
    scale or temperature. Where a teacher's logits are all equal it is 1, without a gradient.
    `centred = False` takes the logits as they are.
    """
    z_t, z_s = wide(teacher_logits_BN), wide(student_logits_BN)
    if centred:
        z_t, z_s = (z - z.mean(dim=-1, keepdim=True) for z in (z_t, z_s))
    return 1 - F.cosine_similarity(z_t, z_s, dim=-1)


def feature_distance(
    teacher_u_BD: Tensor, student_u_BD: Tensor, kind: Literal["l1", "mse"]
) -> Tensor:
    """Of every image's two unit features, summed over the D dimensions: their absolute differences
    (l1) or the squares of these (mse: 2 - 2 cosine); [B] fp32. Losses of PromptKD's ablation."""
    difference = wide(teacher_u_BD) - wide(student_u_BD)
    return (difference.abs() if kind == "l1" else difference.square()).sum(dim=-1)
