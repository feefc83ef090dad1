"""What one would write with open_clip and torch alone, and open_clip's own distillation, for
`bench_towers`.

`Baseline` is the honest one: open_clip's towers with SDPA, text encoded beforehand, teacher and
student under torch.compile, images normalised and in the towers' dtype before they are given.

Letters: B images, N classes, L tokens, P prompts, K prompted layers, C tower width, D class vector
width.
"""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.clip.prompts import PromptedTower

__all__ = [
    "Baseline",
    "DistillModel",
    "OpenClipStudent",
    "OpenClipTower",
    "compiled",
    "new_step",
    "why_no_distill_model",
]


def compiled(module: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """For these shapes alone; on a GPU tuned, and with CUDA graphs."""
    mode = "max-autotune" if device.type == "cuda" else None
    return torch.compile(module, dynamic=False, mode=mode)


def new_step(device: torch.device) -> None:
    """Tells CUDA graphs that what they gave before may be overwritten."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


class OpenClipTower(nn.Module):
    """open_clip's vision transformer, a frozen copy, with deep prompts: of layer 0 they are
    appended, of a later one they replace those of the layer before."""

    def __init__(self, visual: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual).to(device, dtype).eval().requires_grad_(False)

    def forward(self, images_BCHW: Tensor, prompts_KPC: Tensor | None = None) -> Tensor:
        """Features [B, D] of normalised images."""
        visual = self.visual
        if prompts_KPC is None:
            return visual(images_BCHW)
        x = visual._embeds(images_BCHW.to(visual.conv1.weight.dtype))
        count = prompts_KPC.shape[1]
        for i, block in enumerate(visual.transformer.resblocks):
            if i < len(prompts_KPC):
                prompts = prompts_KPC[i].to(x.dtype).expand(len(x), -1, -1)
                if i == 0:  # layer norm goes token by token: it may as well come before
                    x = torch.cat([x, visual.ln_pre(prompts)], dim=1)
                else:
                    x = torch.cat([x[:, :-count], prompts], dim=1)
            x = block(x)
        pooled, _ = visual._pool(x)
        return pooled @ visual.proj


class OpenClipStudent(nn.Module):
    """Around a tower prompts and a projector, fp32, that start as those of `start`."""

    def __init__(self, tower: OpenClipTower, start: PromptedTower) -> None:
        super().__init__()
        assert start.prompts is not None
        self.tower, own = tower, start.projector
        self.prompts = nn.Parameter(start.prompts.detach().clone())
        hidden = own.first.out_features
        self.projector = nn.Sequential(
            nn.Linear(own.first.in_features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, own.second.out_features),
        )
        for mine, theirs in ((0, own.first), (1, own.norm), (3, own.second)):
            self.projector[mine].load_state_dict(theirs.state_dict(), strict=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features [B, D] fp32, of any length."""
        return self.projector(self.tower(images_BCHW, self.prompts).float())

    def learned(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


class Baseline:
    """A step of distillation with open_clip and torch."""

    def __init__(
        self,
        teacher: OpenClipTower,
        teacher_prompts_KPC: Tensor,
        student: OpenClipStudent,
        w_ND: Tensor,
        scale: float,
        kd_weight: float,
        compile: bool,
    ) -> None:
        self.device = w_ND.device
        self.student, self.w_ND, self.scale = student.to(self.device), w_ND, scale
        self.weight = kd_weight / len(w_ND)
        self._prompts = teacher_prompts_KPC
        self._teacher: Callable[..., Tensor] = teacher
        self._student: Callable[..., Tensor] = student
        if compile:
            self._teacher, self._student = (
                compiled(tower, self.device) for tower in (teacher, student)
            )
        self.optimizer = torch.optim.SGD(
            student.learned(), lr=0.005, momentum=0.9, weight_decay=5e-4
        )

    def step(self, images_BCHW: Tensor) -> Tensor:
        """Learns from normalised images in the towers' dtype; the loss, on the device."""
        self.optimizer.zero_grad()
        new_step(self.device)
        with torch.no_grad():
            u_BD = F.normalize(self._teacher(images_BCHW, self._prompts).float(), dim=-1)
            log_t = F.log_softmax(self.scale * u_BD @ self.w_ND.T, dim=-1)
        x_BD = F.normalize(self._student(images_BCHW), dim=-1)
        log_s = F.log_softmax(self.scale * x_BD @ self.w_ND.T, dim=-1)
        loss = self.weight * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


# ---------------------------------------------------------------- open_clip --distill-model


def why_no_distill_model() -> str:
    """Why open_clip's own training cannot take part, "" if it can."""
    try:
        import open_clip_train.train  # noqa: F401
    except ImportError as error:
        return f"open_clip_train.train cannot be imported: {error}"
    return ""


class _Batches:
    """What its loop takes for a data loader, of one batch."""

    num_batches = 1

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self._batch, self.num_samples, self.dataloader = batch, len(batch[0]), self

    def set_epoch(self, epoch: int) -> None:
        """There is nothing to shuffle."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self._batch])


class DistillModel:
    """open_clip's own training loop with `--distill-model`, which trains all weights of both of the
    student's towers against both of the teacher's, on images with captions; not its loader, which
    wants webdataset before 1.0. It logs every step, as it does the last of an epoch.
    """

    def __init__(self, teacher: Any, student: Any, device: torch.device) -> None:
        self._teacher, self._student = (
            copy.deepcopy(one).to(device).requires_grad_(asks)
            for one, asks in ((teacher, False), (student, True))
        )
        for one in (self._teacher, self._student):
            one.output_dict = True
        self._args = SimpleNamespace(
            device=device.type,
            precision="amp_bf16" if device.type == "cuda" else "fp32",
            distill=True,
            accum_freq=1,
            skip_scheduler=True,
            grad_clip_norm=None,
            horovod=False,
            batch_size=0,
            world_size=1,
            rank=0,
            log_every_n_steps=1,
            wandb=False,
        )
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=1e-6)
        self._loss = open_clip.DistillClipLoss()

    def step(self, images_BCHW: Tensor, tokens_BL: Tensor) -> None:
        """One step on normalised images and tokens."""
        from open_clip_train.train import train_one_epoch

        self._args.batch_size = len(images_BCHW)
        data = {"train": _Batches((images_BCHW, tokens_BL))}
        models = (self._student, data, self._loss, 0, self._optimizer, None, None, self._teacher)
        train_one_epoch(*models, self._args)
