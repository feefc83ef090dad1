"""Image towers in 8 bits (W8A8): the four linear maps of every layer, which are 96 % of the work of
a ViT-L/14. The patch embedding, attention, and what follows the last layer stay as they are.

Letters: B images, L tokens, P prompts, C tower width, K numbers of a row, N output channels.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from engine.clip.layers import Layer
from engine.clip.towers import ImageTower
from engine.config import UserError
from kernels import quantize
from kernels.quantize import Kind, Quantized

__all__ = ["QuantizedLayer", "full_precision", "quantized", "require_device"]

_CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}  # the least whose matrix units take it


def full_precision(precision: str, device: torch.device) -> str:
    """What a tower is in that is quantised, and what it is compared with: fp16 on a GPU, else fp32.
    Of other precisions, themselves."""
    if precision not in _CAPABILITY:
        return precision
    return "fp16" if device.type == "cuda" else "fp32"


def require_device(kind: Kind, device: torch.device) -> None:
    """Raises UserError for a GPU that has no matrix units for it. Any CPU will do, slowly."""
    if device.type != "cuda":
        return
    has, needs = torch.cuda.get_device_capability(device), _CAPABILITY[kind]
    if has < needs:
        raise UserError(
            f"teacher.precision: {kind} needs a GPU of compute capability {needs[0]}.{needs[1]} or "
            f"more; {torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}. Take "
            f"{'int8 or ' if kind == 'fp8' and has >= _CAPABILITY['int8'] else ''}fp16"
        )


def quantized(tower: ImageTower, kind: Kind) -> ImageTower:
    """A copy of a tower, where and in the dtype it is, whose layers multiply in 8 bits. What it
    does not quantise the two have in common. It cannot be moved to another dtype."""
    shared = {id(parameter): parameter for parameter in tower.parameters()}
    own = copy.deepcopy(tower, shared)
    own.blocks = nn.ModuleList(QuantizedLayer(cast(Layer, layer), kind) for layer in own.blocks)
    return own


class QuantizedLayer(Layer):
    """A layer whose linear maps are in 8 bits, as are the rows that they take, from the kernel that
    makes them. Prompts have their keys and values from the same weights."""

    def __init__(self, layer: Layer, kind: Kind) -> None:
        super().__init__(layer)
        self._kind, self._activation = kind, layer.activation
        attn, mlp = layer.attn, layer.mlp
        self.in_proj = _Linear(attn.in_proj_weight, attn.in_proj_bias, kind)
        self.out_proj = _Linear(attn.out_proj.weight, attn.out_proj.bias, kind)
        self.c_fc = _Linear(mlp.c_fc.weight, mlp.c_fc.bias, kind)
        self.c_proj = _Linear(mlp.c_proj.weight, mlp.c_proj.bias, kind)
        self.gelu = mlp.gelu
        del self.attn, self.mlp  # with the weights as they were

    def _queries_keys_values(self, x_BLC: Tensor, first: bool) -> tuple[Tensor, ...]:
        shape, width = x_BLC.shape[:2], x_BLC.shape[2]
        rows = self._normed(self.ln_1, x_BLC)
        if not first:
            return self.in_proj(rows).unflatten(0, shape).chunk(3, dim=-1)
        firsts = Quantized(*(t.unflatten(0, shape)[:, 0].contiguous() for t in rows))
        q_BC = self.in_proj(firsts, slice(width))
        kv_BLC = self.in_proj(rows, slice(width, None)).unflatten(0, shape)
        return q_BC[:, None], *kv_BLC.chunk(2, dim=-1)

    def _keys_values(self, prompts_PC: Tensor) -> Tensor:
        width = prompts_PC.shape[-1]
        return self.in_proj(self._normed(self.ln_1, prompts_PC[None]), slice(width, None))

    def _out(self, attended_BLC: Tensor) -> Tensor:
        rows = quantize.quantized(attended_BLC.flatten(0, 1), self._kind)
        return self.out_proj(rows).unflatten(0, attended_BLC.shape[:2])

    def _mlp(self, x_BLC: Tensor) -> Tensor:
        h_MK = self.c_fc(self._normed(self.ln_2, x_BLC))
        if self._activation:
            rows = quantize.activated(h_MK, self._activation, self._kind)
        else:
            rows = quantize.quantized(self.gelu(h_MK), self._kind)
        return self.c_proj(rows).unflatten(0, x_BLC.shape[:2])

    def _normed(self, norm: nn.LayerNorm, x_BLC: Tensor) -> Quantized:
        return quantize.normed(x_BLC.flatten(0, 1), norm.weight, norm.bias, norm.eps, self._kind)


class _Linear(nn.Module):
    """A linear map of rows in 8 bits; its answer has the dtype of the bias."""

    values_NK: Tensor
    scale_N: Tensor
    bias_N: Tensor

    def __init__(self, weight_NK: Tensor, bias_N: Tensor, kind: Kind) -> None:
        super().__init__()
        values_NK, scale_N = quantize.quantized(weight_NK.detach(), kind)
        self.register_buffer("values_NK", values_NK)
        self.register_buffer("scale_N", scale_N)
        self.register_buffer("bias_N", bias_N.detach())

    def forward(self, rows: Quantized, part: slice = slice(None)) -> Tensor:
        """Of a `part` of the channels."""
        weight = Quantized(self.values_NK[part], self.scale_N[part])
        return quantize.product(rows, weight, self.bias_N[part])
