"""What `kl` computes by kernels, as operations of torch: `torch.compile` does not look into them,
CUDA graphs record them, and their gradient is made with their value. Letters as in `reference`."""

import importlib
from typing import Any

import torch
from torch import Tensor

from kernels import cosine
from kernels.reference import wide
from kernels.unit import through_loss, unit

__all__ = ["distillation", "expected"]


def _path(impl: str) -> Any:
    return importlib.import_module(f"kernels.{impl}_kl")


@torch.library.custom_op("promptkd::distillation", mutates_args=())
def distillation(
    x_BD: Tensor,
    teacher: list[Tensor],
    w_ND: Tensor,
    root_JD: Tensor | None,
    weight_B: Tensor | None,
    form: str,
    scale: float,
    teacher_scale: float,
    kl_weight: float,
    cosine_weight: float,
    centred: bool,
    wants: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, KL, cosine distance, gradient of the loss with respect to x, and both top classes.

    Empty are the distance without a root, the gradient where nobody `wants` it, and the teacher's
    top class where the form tells it already.
    """
    path, norm_B1 = _path(impl), None
    if impl == "triton" and w_ND.dtype == torch.float16:  # which has no room for lengths
        x_BD, norm_B1 = unit(x_BD)
        teacher = [unit(teacher[0])[0]] if form == "Features" else teacher
    extra_BD, cosine_B = None, wide(x_BD).new_empty(0)
    if root_JD is not None:
        unit_BD, _ = unit(x_BD)
        if form == "Features":
            cosine_B, extra_BD = cosine.against_features(unit_BD, teacher[0], root_JD)
        else:
            cosine_B, extra_BD = cosine.against_logits(unit_BD, teacher[0], w_ND, centred)
        extra_BD.mul_(cosine_weight)
        if weight_B is not None:
            cosine_B = torch.where(weight_B == 0, 0, weight_B * cosine_B)
            extra_BD = torch.where(weight_B[:, None] == 0, 0, weight_B[:, None] * extra_BD)
    ours = w_ND, weight_B, extra_BD, scale
    match form:
        case "Features":
            told = path.features(x_BD, *teacher, *ours, teacher_scale, kl_weight, wants)
        case "Logits":
            told = path.dense(x_BD, *teacher, *ours, teacher_scale, kl_weight, wants)
        case "Expected":
            told = path.given(x_BD, *teacher[:3], *ours, kl_weight, wants)
        case "Top":
            told = path.top(x_BD, *teacher, *ours, kl_weight, wants)
    kl_B, dx_BD, *tops = told
    if len(tops) == 1:
        tops.append(tops[0].new_empty(0))
    if norm_B1 is not None and wants:
        dx_BD /= norm_B1
    loss_B = kl_weight * kl_B
    if root_JD is not None:
        loss_B += cosine_weight * cosine_B
    return loss_B, kl_B, cosine_B, dx_BD, *tops


@distillation.register_fake
def _(
    x_BD: Tensor,
    teacher: list[Tensor],
    w_ND: Tensor,
    root_JD: Tensor | None,
    weight_B: Tensor | None,
    form: str,
    scale: float,
    teacher_scale: float,
    kl_weight: float,
    cosine_weight: float,
    centred: bool,
    wants: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, like = x_BD.shape[0], wide(x_BD)  # of a tensor, len() would be a constant
    told = [like.new_empty(n) for n in (images, images, 0 if root_JD is None else images)]
    dx_BD = like.new_empty(images if wants else 0, x_BD.shape[1])
    known = form in ("Expected", "Top")
    tops = [like.new_empty(n, dtype=torch.long) for n in (images, 0 if known else images)]
    return *told, dx_BD, *tops  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.tensors = inputs[0].dtype, len(inputs[1])
    ctx.save_for_backward(output[3])
    ctx.set_materialize_grads(False)  # or zeros are made for every other output, [B, D] too


def _backward(ctx: Any, grad_B: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    (dx_BD,) = ctx.saved_tensors
    return through_loss(grad_B, dx_BD, ctx.dtype), [None] * ctx.tensors, *[None] * 11


distillation.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("promptkd::expected", mutates_args=())
def expected(
    x_BD: Tensor, w_ND: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x_BD.device.type, enabled=False):
        if impl == "triton" and w_ND.dtype == torch.float16:
            x_BD, _ = unit(x_BD)
        return _path(impl).expected(x_BD, w_ND, scale)


@expected.register_fake
def _(x_BD: Tensor, w_ND: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = wide(x_BD)
    images = x_BD.shape[0]
    told = [like.new_empty(images) for _ in range(2)]
    o_BD = like.new_empty(images, w_ND.shape[1])
    return o_BD, *told, like.new_empty(images, dtype=torch.long)  # type: ignore[return-value]
