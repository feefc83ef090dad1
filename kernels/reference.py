"""The losses by their definitions, in eager torch: every kernel's truth, on any device.

Letters: B images, N classes, D embedding width. `u` are unit image features, `w` class vectors
(unit rows), `a` a logit scale already divided by the temperature; logits are z = a u w^T.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cosine_distance", "feature_distance", "kl_divergence", "logits"]


def logits(u_BD: Tensor, w_ND: Tensor, scale: float) -> Tensor:
    """z = a u w^T, [B, N] fp32."""
    return scale * (u_BD.float() @ w_ND.float().T)


def kl_divergence(teacher_logits_BN: Tensor, student_logits_BN: Tensor) -> Tensor:
    """KL(softmax(z_t) || softmax(z_s)) of every image, [B] fp32, in nats.

    Logits may be shifted by a constant per image. PromptKD's loss is tau^2 times its mean.
    """
    log_t = torch.log_softmax(teacher_logits_BN.float(), dim=-1)
    log_s = torch.log_softmax(student_logits_BN.float(), dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=-1)


def cosine_distance(teacher_logits_BN: Tensor, student_logits_BN: Tensor) -> Tensor:
    """1 - cosine of every image's two logit vectors, each less its mean over classes; [B] fp32.

    Without the mean it would see a constant added to the logits of an image, which no softmax does,
    and up to which alone soft targets are known: it is 1 - Pearson's correlation. Nor does it see a
    scale or temperature. Where all logits of an image are equal it is 1, without a gradient.
    """
    z_t, z_s = (
        z.float() - z.float().mean(dim=-1, keepdim=True)
        for z in (teacher_logits_BN, student_logits_BN)
    )
    return 1 - F.cosine_similarity(z_t, z_s, dim=-1)


def feature_distance(
    teacher_u_BD: Tensor, student_u_BD: Tensor, kind: Literal["l1", "mse"]
) -> Tensor:
    """Of every image's two unit features, summed over the D dimensions: their absolute differences
    (l1) or the squares of these (mse: 2 - 2 cosine); [B] fp32. Losses of PromptKD's ablation."""
    difference = teacher_u_BD.float() - student_u_BD.float()
    return (difference.abs() if kind == "l1" else difference.square()).sum(dim=-1)
