"""CLIP's text tower, with learned prompts in any of its layers.

Letters: N sentences, L tokens, K prompted layers, P prompts, C tower width, D embedding width.
"""

from typing import Any

import torch
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

__all__ = ["TextTower", "plain_text"]


def plain_text(built: Any) -> Any | None:
    """The part of an open_clip model that holds CLIP's own text transformer; None if it has
    another, such as one of Hugging Face's."""
    if not hasattr(built, "text"):
        return built
    text = built.text
    return text if isinstance(text, TextTransformer) and text.cls_emb is None else None


class TextTower(nn.Module):
    """A CLIP text transformer; `text` is what plain_text() found."""

    attn_mask: Tensor | None

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.width = int(text.transformer.width)
        self.layers = len(text.transformer.resblocks)
        self.context_length = int(text.context_length)
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.blocks = text.transformer.resblocks
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self._pool = getattr(text, "text_pool_type", None) or text.pool_type
        self._eos = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
        self.requires_grad_(False).eval()

    def forward(self, tokens_NL: Tensor, prompts_KPC: Tensor | None = None) -> Tensor:
        """Text features [N, D], not normalised, of token ids.

        `prompts_KPC` are the prompts of the first K layers. Those of layer 0 stand for the
        embeddings of tokens 1 to P, behind the start token; those of layer i < K replace the
        outputs of layer i - 1 at these places (PromptSRC, section 3.1; MaPLe, equation 4).
        """
        x = self.token_embedding(tokens_NL)
        for i, block in enumerate(self.blocks):
            if prompts_KPC is not None and i < len(prompts_KPC):
                prompts = prompts_KPC[i].expand(len(x), -1, -1).to(x.dtype)
                x = torch.cat([x[:, :1], prompts, x[:, 1 + prompts.shape[1] :]], dim=1)
            if i == 0:
                x = x + self.positional_embedding
            x = block(x, attn_mask=self.attn_mask)
        pooled = text_global_pool(self.ln_final(x), tokens_NL, self._pool, self._eos)
        if self.text_projection is None:
            return pooled
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled @ self.text_projection
