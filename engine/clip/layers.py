"""The layers of a CLIP image tower, without work that nobody reads.

Letters: B images, L tokens, P prompts, C tower width, H heads.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Layer", "Tricks", "fp32_norm"]


class Tricks(NamedTuple):
    """What a tower does otherwise than open_clip's does. All are exact: features and gradients
    differ by rounding alone."""

    class_token: bool = True
    """The last layer computes what is read of it, which is the class token."""
    prompts_once: bool = True
    """Prompts that the next layer replaces have keys and values alone, once for all images."""
    patch_product: bool = True
    """Patches are embedded by one matrix product."""


class Layer(nn.Module):
    """A pre-norm transformer layer, around the parts of open_clip's, whose names it keeps."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.heads = int(block.attn.num_heads)
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2

    def forward(
        self, x_BLC: Tensor, prompts_PC: Tensor | None = None, first: bool = False
    ) -> Tensor:
        """The layer's output for the tokens of x, or for the `first` of them alone. All attend to
        `prompts_PC`, fp32, too."""
        q_BLC, k_BLC, v_BLC = self._queries_keys_values(x_BLC, first)
        if first:
            x_BLC = x_BLC[:, :1]
        if prompts_PC is not None:
            k_PC, v_PC = self._keys_values(prompts_PC).chunk(2, dim=-1)
            k_BLC, v_BLC = _with(k_BLC, k_PC), _with(v_BLC, v_PC)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_BLC, k_BLC, v_BLC))
        attended_BLC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BLC = x_BLC + self.ls_1(self._out(attended_BLC))
        return x_BLC + self.ls_2(self._mlp(x_BLC))

    def _queries_keys_values(self, x_BLC: Tensor, first: bool) -> Sequence[Tensor]:
        """Of all tokens; queries of the `first` of them alone."""
        h_BLC = self.ln_1(x_BLC)
        if not first:
            return self._projected(h_BLC, 0, 3).chunk(3, dim=-1)
        return self._projected(h_BLC[:, :1], 0, 1), *self._projected(h_BLC, 1, 3).chunk(2, dim=-1)

    def _projected(self, h: Tensor, start: int, stop: int) -> Tensor:
        """Queries (part 0), keys (1) and values (2), one beside the other."""
        rows = slice(start * h.shape[-1], stop * h.shape[-1])
        return F.linear(h, self.attn.in_proj_weight[rows], self.attn.in_proj_bias[rows])

    def _keys_values(self, prompts_PC: Tensor) -> Tensor:
        """[P, 2C] fp32, whatever the tower is: their gradient is a sum over all images."""
        width = prompts_PC.shape[-1]
        with torch.autocast(prompts_PC.device.type, enabled=False):
            weight, bias = self.attn.in_proj_weight[width:], self.attn.in_proj_bias[width:]
            return F.linear(fp32_norm(self.ln_1, prompts_PC), weight.float(), bias.float())

    def _out(self, attended_BLC: Tensor) -> Tensor:
        return self.attn.out_proj(attended_BLC)

    def _mlp(self, x_BLC: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x_BLC))

    @property
    def activation(self) -> Literal["gelu", "quick_gelu"] | None:
        """None: another."""
        gelu = self.mlp.gelu
        if isinstance(gelu, QuickGELU):
            return "quick_gelu"
        return "gelu" if isinstance(gelu, nn.GELU) and gelu.approximate == "none" else None


def fp32_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A layer norm of any precision, in fp32. Its weights are too few for ZeRO-3 to part them."""
    if not isinstance(norm, nn.LayerNorm):  # some towers have none in places
        return norm(x)
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def _with(x_BLC: Tensor, prompts_PC: Tensor) -> Tensor:
    # Widened before it is cast: so its gradient is summed over the images in fp32.
    return torch.cat([x_BLC, prompts_PC.expand(x_BLC.shape[0], -1, -1).to(x_BLC.dtype)], dim=1)
