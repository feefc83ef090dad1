"""Several teachers' answers as one soft target. Letters: T teachers, B images, N classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fused"]


def fused(logits_TBN: Sequence[Tensor], weights: Sequence[float], fusion: str) -> Tensor:
    """Logits [B, N] fp32 of a mixture of the teachers' probabilities.

    mean: by the teachers' weights. confidence: by an image's largest probability times those.
    """
    log_p_TBN = torch.stack([torch.log_softmax(z_BN.float(), dim=-1) for z_BN in logits_TBN])
    log_w_TB = log_p_TBN.new_tensor(weights).log()[:, None].expand(log_p_TBN.shape[:2])
    if fusion == "confidence":
        log_w_TB = log_w_TB + log_p_TBN.amax(dim=-1)
    log_w_TB = torch.log_softmax(log_w_TB, dim=0)
    return torch.logsumexp(log_w_TB[..., None] + log_p_TBN, dim=0)
