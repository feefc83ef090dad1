"""The losses by their definitions, in eager torch: every kernel's truth, on any device.

Letters: B images, N classes, D embedding width. `u` are unit image features, `w` class vectors
(unit rows), `a` a logit scale already divided by the temperature; logits are z = a u w^T.
"""

import torch
from torch import Tensor

__all__ = ["kl_divergence", "logits"]


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
