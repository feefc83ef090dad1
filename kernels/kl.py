"""KL(teacher || student) without logits, and with it the cosine: value and gradient in one pass.

Student and teacher are compared on the same class vectors W, by z = a u W^T with unit features u.
Let O = softmax(z) W, the expected class vector. Then

    KL = a_t u_t . O_t - a_s u_s . O_t - LSE_t + LSE_s      and      dKL/du_s = a_s (O_s - O_t),

so that one traversal of W, with nothing [B, N] kept, gives the loss and its gradient, back to
features of any length. W takes no gradient, nor does the teacher. O is fp32: O_s - O_t cancels.

`impl` is one of
- reference: the definitions in eager torch, with autograd;
- torch: tiles of logits in plain torch (`torch_kl`);
- triton: fused kernels (`triton_kl`), on GPUs, or on CPUs under TRITON_INTERPRET=1;
- auto: triton on CUDA devices where Triton is installed, else torch.

Letters are those of `reference`.
"""

import importlib.util
import os
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from kernels import operation, reference
from kernels.cosine import Gram
from kernels.reference import wide

__all__ = [
    "Expected",
    "Features",
    "Impl",
    "Logits",
    "Losses",
    "Top",
    "chosen",
    "distillation",
    "expected",
    "reduced",
    "top_of",
]

Impl = Literal["auto", "reference", "torch", "triton"]
_INSTALLED = importlib.util.find_spec("triton") is not None


class Features(NamedTuple):
    """The teacher, by image features of any length and its logit scale."""

    u_BD: Tensor
    scale: float


class Expected(NamedTuple):
    """The teacher, by what KL needs of it: see `expected`. All fp32, at the temperature of use."""

    o_BD: Tensor  # softmax(z) W
    lse_B: Tensor
    dot_B: Tensor  # a u . O
    top_B: Tensor  # class of the largest logit


class Logits(NamedTuple):
    """The teacher, by its logits, up to a shift of each row."""

    z_BN: Tensor


class Top(NamedTuple):
    """The teacher, by log-probabilities of K classes and of all others together; see `top_of`."""

    log_p_BK: Tensor
    classes_BK: Tensor  # int64, different within a row
    log_tail_B: Tensor


Teacher = Features | Expected | Logits | Top


class Losses(NamedTuple):
    """Of every image. A gradient flows through `loss_B` alone."""

    loss_B: Tensor  # weight * (kl_weight * temperature^2 * KL + cosine_weight * distance)
    kl_B: Tensor  # weight * KL, in nats, at the temperature
    cosine_B: Tensor | None  # weight * cosine distance, where it is asked for
    top_s_B: Tensor  # class of the student's largest logit
    top_t_B: Tensor


def distillation(
    x_BD: Tensor,
    teacher: Teacher,
    w_ND: Tensor,
    scale: float,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    cosine_weight: float = 0.0,
    gram: Gram | None = None,
    weight_B: Tensor | None = None,
    impl: Impl = "auto",
) -> Losses:
    """What is lost where a student says `x` and its teacher what it says.

    x_BD: the student's features, of any length (1e-12 to 1e18); fp64, fp32, bf16 or fp16.
    w_ND: class vectors, unit rows. Triton rounds features to their dtype; elsewhere half precision
        is widened.
    scale: the student's logit scale; both scales are divided by the temperature.
    gram: of W, which `cosine_weight` needs, with a teacher by Features or Logits; if it is not
        centred, these may not be shifted.
    weight_B: a factor of every image. Of an image of weight 0 all losses and the gradient are 0,
        whatever it holds, and the top classes mean nothing.

    Reverse-mode, first derivatives alone. Raises ValueError where the cosine is asked of a teacher
    that does not say enough, or shapes or dtypes do not fit, and RuntimeError where `impl =
    "triton"` cannot be: on a device, or in fp64.
    """
    impl = chosen(impl, x_BD.device, torch.promote_types(x_BD.dtype, w_ND.dtype))
    if cosine_weight and (gram is None or isinstance(teacher, Expected | Top)):
        raise ValueError("a cosine needs a gram, and a teacher by Features or Logits")
    teacher_scale = teacher.scale if isinstance(teacher, Features) else 1.0
    if isinstance(scale, Tensor) or isinstance(teacher_scale, Tensor):
        raise ValueError("a scale is a number, and takes no gradient: logit_scale.exp().item()")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, and was to be above 0")
    _require_fit(x_BD, teacher, w_ND, weight_B, gram if cosine_weight else None)
    if not torch.compiler.is_compiling() and unpack_dual(x_BD).tangent is not None:
        raise RuntimeError("kernels have no forward-mode derivative")
    run = _by_definition if impl == "reference" else _by_op
    task = _Task(
        scale / temperature,
        temperature,
        kl_weight * temperature**2,
        gram if cosine_weight else None,
        cosine_weight,
        impl,
    )
    if weight_B is not None:
        weight_B = weight_B.detach().to(wide(x_BD).dtype)
    with torch.autocast(x_BD.device.type, enabled=False):
        told = run(x_BD, _detached(teacher), w_ND.detach(), weight_B, task)
    loss_B, kl_B, cosine_B, top_s_B, top_t_B = told
    told_B = cosine_B.detach() if task.gram else None
    return Losses(loss_B, kl_B.detach(), told_B, top_s_B, top_t_B)


def reduced(
    loss_B: Tensor, reduction: Literal["batchmean", "paper"], images: int | Tensor, classes: int
) -> Tensor:
    """The mean over images; `paper`: over all logits, sum / (B N), as PromptKD's code has it."""
    if reduction not in ("batchmean", "paper"):
        raise ValueError(f"reduction is {reduction}, and was to be batchmean or paper")
    return loss_B.sum() / (images * classes if reduction == "paper" else images)


def expected(x_BD: Tensor, w_ND: Tensor, scale: float, impl: Impl = "auto") -> Expected:
    """What KL needs of a teacher, from its features of any length, in one pass over W. No
    gradient. `scale` is divided by the temperature already."""
    impl = chosen(impl, x_BD.device, torch.promote_types(x_BD.dtype, w_ND.dtype))
    if impl == "reference":
        u_BD = F.normalize(wide(x_BD), dim=-1)
        z_BN = reference.logits(u_BD, w_ND, scale)
        o_BD = torch.softmax(z_BN, dim=-1) @ wide(w_ND)
        dot_B = scale * (u_BD * o_BD).sum(-1)
        return Expected(o_BD, z_BN.logsumexp(dim=-1), dot_B, z_BN.argmax(dim=-1))
    return Expected(*operation.expected(x_BD, w_ND, scale, impl))


def top_of(z_BN: Tensor, classes: int, temperature: float = 1.0) -> Top:
    """The largest of a teacher's logits, and what is left of its probability."""
    log_p_BN = torch.log_softmax(wide(z_BN) / temperature, dim=-1)
    log_p_BK, classes_BK = log_p_BN.topk(classes, dim=-1)
    rest_BN = log_p_BN.scatter(-1, classes_BK, -torch.inf)
    return Top(log_p_BK, classes_BK, rest_BN.logsumexp(dim=-1))


def chosen(
    impl: Impl, device: torch.device, dtype: torch.dtype = torch.float32
) -> Literal["reference", "torch", "triton"]:
    """What `auto` is on a device; an explicit choice stays what it is, or RuntimeError tells why it
    cannot be."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl}, and was to be one of {', '.join(get_args(Impl))}")
    lacks = ""
    if not _INSTALLED:
        lacks = "without Triton"
    elif device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        lacks = f"on {device}, which is no GPU"
    elif dtype == torch.float64:
        lacks = "in fp64"
    if impl == "auto":
        return "torch" if lacks or device.type != "cuda" else "triton"
    if impl == "triton" and lacks:
        raise RuntimeError(f'impl = "triton" {lacks}')
    return impl


def _require_fit(
    x_BD: Tensor, teacher: Teacher, w_ND: Tensor, weight_B: Tensor | None, gram: Gram | None
) -> None:
    """ValueError names the first tensor that is not as it is told to be."""
    if x_BD.ndim != 2 or w_ND.ndim != 2 or w_ND.shape[0] < 1:
        raise ValueError("x is [B, D] and w [N, D], with at least one class")
    (images, width), classes = x_BD.shape, w_ND.shape[0]
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [("w", w_ND, (classes, width))]
    if weight_B is not None:
        wanted.append(("weight", weight_B, (images,)))
    if gram is not None:
        wanted.append(("gram.root", gram.root_JD, (min(classes, width), width)))
    sizes = {"B": images, "D": width, "N": classes}
    for name, told in teacher._asdict().items():
        if not isinstance(told, Tensor):
            continue
        # Of a Top, whose first two have it.
        sizes.setdefault("K", told.shape[-1] if told.ndim else 0)
        wanted.append((name, told, tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])))
    for name, told, shape in wanted:
        if told.shape != shape:
            raise ValueError(f"{name} is {list(told.shape)}, and was to be {list(shape)}")
        if told.is_floating_point() and name != "weight" and _double(told) != _double(x_BD):
            raise ValueError(f"{name} is {told.dtype}, x {x_BD.dtype}: all are fp64, or none")
    if not (x_BD.is_floating_point() and w_ND.is_floating_point()):
        raise ValueError("x and w are floating-point numbers")


def _double(x: Tensor) -> bool:
    return x.dtype == torch.float64


class _Task(NamedTuple):
    scale: float  # over the temperature
    temperature: float
    kl_weight: float
    gram: Gram | None
    cosine_weight: float
    impl: str


def _detached(teacher: Teacher) -> Teacher:
    return type(teacher)(*(t.detach() if isinstance(t, Tensor) else t for t in teacher))  # type: ignore[arg-type]


def _class_of(teacher: Expected | Top) -> Tensor:
    """The teacher's top class."""
    if isinstance(teacher, Expected):
        return teacher.top_B
    return teacher.classes_BK.gather(-1, teacher.log_p_BK.argmax(-1, keepdim=True))[:, 0]


# ---------------------------------------------------------------- by definition


def _by_definition(
    x_BD: Tensor, teacher: Teacher, w_ND: Tensor, weight_B: Tensor | None, task: _Task
) -> tuple[Tensor, ...]:
    def masked(rows: Tensor) -> Tensor:
        """0 * nan is nan, in gradients too."""
        return rows if weight_B is None else torch.where(weight_B[:, None] == 0, 0, wide(rows))

    u_BD = F.normalize(wide(masked(x_BD)), dim=-1)
    z_BN = reference.logits(u_BD, w_ND, task.scale)
    cosine_B = torch.zeros_like(z_BN[:, 0])
    match teacher:
        case Features(u_t_BD, scale):
            unit_BD = F.normalize(wide(masked(u_t_BD)), dim=-1)
            t_BN = reference.logits(unit_BD, w_ND, scale / task.temperature)
        case Logits(t_BN):
            t_BN = wide(masked(t_BN)) / task.temperature
        case Expected(o_BD, lse_B, dot_B):
            kl_B = dot_B - task.scale * (u_BD * o_BD).sum(-1) - lse_B + z_BN.logsumexp(dim=-1)
        case Top(log_p_BK, classes_BK, log_tail_B):
            kl_B = reference.kl_divergence_of_top(log_p_BK, classes_BK, log_tail_B, z_BN)
    if isinstance(teacher, Expected | Top):
        top_t_B = _class_of(teacher)
    else:
        kl_B, top_t_B = reference.kl_divergence(t_BN, z_BN), t_BN.argmax(dim=-1)
        if task.gram:
            cosine_B = reference.cosine_distance(t_BN, z_BN, task.gram.centred)
    if weight_B is not None:
        kl_B, cosine_B = (torch.where(weight_B == 0, 0, weight_B * t) for t in (kl_B, cosine_B))
    loss_B = task.kl_weight * kl_B + task.cosine_weight * cosine_B
    return loss_B, kl_B, cosine_B, z_BN.argmax(dim=-1), top_t_B


# ---------------------------------------------------------------- by kernels


def _by_op(
    x_BD: Tensor, teacher: Teacher, w_ND: Tensor, weight_B: Tensor | None, task: _Task
) -> tuple[Tensor, ...]:
    teacher_scale = teacher.scale if isinstance(teacher, Features) else 1.0
    loss_B, kl_B, cosine_B, _, top_s_B, top_t_B = operation.distillation(
        x_BD,
        [t for t in teacher if isinstance(t, Tensor)],
        w_ND,
        task.gram.root_JD if task.gram else None,
        weight_B,
        type(teacher).__name__,
        task.scale,
        teacher_scale / task.temperature,
        task.kl_weight,
        task.cosine_weight,
        bool(task.gram and task.gram.centred),
        torch.is_grad_enabled() and x_BD.requires_grad,
        task.impl,
    )
    if isinstance(teacher, Expected | Top):
        top_t_B = _class_of(teacher)
    return loss_B, kl_B, cosine_B, top_s_B, top_t_B
