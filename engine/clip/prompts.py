"""What the student learns: deep visual prompts and the projector, around a tower.

Letters: B images, K prompted layers, P prompts, C tower width, D class vector width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from engine.clip.compiled import Run
from engine.clip.towers import ImageTower
from engine.clip.trained import TrainedTower

__all__ = ["GlobalBatchNorm", "Projector", "PromptedTower"]


class GlobalBatchNorm(nn.Module):
    """Batch normalisation whose statistics are those of the whole step, at any world size.

    Sums run over the valid images of all ranks, on any backend; padding and skipped images count
    for nothing. With one rank and all images valid it is torch's BatchNorm1d.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x_BC: Tensor, valid_B: Tensor | None = None) -> Tensor:
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            weight = torch.ones_like(x_BC[:, :1]) if valid_B is None else valid_B[:, None].float()
            images = _summed(weight.sum())
            count = images.clamp(min=1)
            mean = _summed((weight * x_BC).sum(0)) / count
            # Two reductions, not E[x^2] - E[x]^2, which cancels in fp32.
            var = _summed((weight * (x_BC - mean).square()).sum(0)) / count
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                # One image has no variance, a step of skipped ones no mean; one may overflow.
                learns = (images > 1) & torch.isfinite(mean + unbiased).all()
                for running, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.copy_(torch.where(learns, running.lerp(seen, self.momentum), running))
        return (x_BC - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class _Sum(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def _summed(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Sum.apply(x)
    return x


class Projector(nn.Module):
    """Linear, batch norm, ReLU, linear: from the student's embedding to the class vectors'."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.norm = GlobalBatchNorm(hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x_BC: Tensor, valid_B: Tensor | None = None) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x_BC), valid_B)))


class PromptedTower(nn.Module):
    """The student: an image tower with trained prompts in its first layers, and a projector.

    Prompts [K, P, C] start as N(0, 0.02); prompts and projector are fp32, whatever the tower is.
    A frozen tower is not among the module's parameters: nobody broadcasts, partitions or stores it.
    A TrainedTower is, as `tower`; its state dict holds the weights alone that take gradients.
    """

    tower: ImageTower
    prompts: nn.Parameter | None
    _run: Run

    def __init__(
        self,
        tower: ImageTower,
        prompts: int,
        depth: int,
        hidden: int,
        outputs: int,
        seed: int,
        run: Run | None = None,
    ) -> None:
        """Without `prompts` there is no such parameter, and `depth` says nothing. `run`: what
        computes a frozen tower's features, if not the tower itself."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = Projector(tower.embed_dim, hidden, outputs)
        start = 0.02 * torch.randn(depth, prompts, tower.width, generator=generator)
        self.register_parameter("prompts", nn.Parameter(start) if prompts else None)
        if isinstance(tower, TrainedTower):
            self.tower = tower
        else:
            self.__dict__["tower"] = tower  # which hides it from torch.nn
        self.__dict__["_run"] = run or tower
        self._frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_do_without_frozen)

    def forward(
        self, images_BCHW: Tensor, valid_B: Tensor | None = None, unit: bool = True
    ) -> Tensor:
        """Features [B, D] fp32 of uint8 images, of unit length or as the projector gives them."""
        prompts = None if self.prompts is None else self.prompts.view_as(self.prompts)
        features = self._run(images_BCHW, prompts).float()
        if self.tower.dtype == torch.float16 and prompts is not None and prompts.requires_grad:
            _scale_between(features, prompts)
        x_BD = self.projector(features, valid_B)
        return F.normalize(x_BD, dim=-1) if unit else x_BD


def _leave_out_frozen(
    student: PromptedTower, state: dict[str, Tensor], prefix: str, about: Any
) -> None:
    for name in student._frozen:
        del state[prefix + name]


def _do_without_frozen(student: PromptedTower, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in student._frozen]


def _scale_between(features: Tensor, prompts: Tensor) -> None:
    """Scales the gradient that enters an fp16 tower at `features`, so that its largest entry is
    about 1 and nothing below underflows, and undoes it where it leaves, at `prompts`. It is the
    loss scale of fp16 training, chosen anew in each step, which a frozen tower allows, since
    backward through it is linear."""
    factor: list[Tensor] = []

    def scaled_up(gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax().clamp(min=2.0**-100)
        factor.append(torch.exp2(-largest.log2().floor()))
        return gradient * factor[0]

    features.register_hook(scaled_up)
    prompts.register_hook(lambda gradient: gradient / factor[0])
