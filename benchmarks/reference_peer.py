"""PromptKD's own training step, and its loader, for `bench_towers`.

Written after the description of its code (commit ec244f7): what it computes, in which order, in
which dtype, how often. So also what could be done once is done in every step: the teacher's text
tower encodes all classes, prompts are widened to the batch and concatenated in each of their
layers, all tokens go through the last layer, and the loss is read back. On a GPU weights are fp16,
prompts and norms fp32 ("prec fp16", no loss scale); on a CPU all are fp32.

Letters: B images, N classes, L tokens, P prompts, K prompted layers, C tower width, D class vector
width, H heads.
"""

import copy
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.model import convert_weights_to_lp
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from engine.clip.prompts import PromptedTower

__all__ = ["WORKERS", "ReferenceStep", "TeacherPrompts", "loader"]

BATCH, WORKERS = 8, 8
LR, MOMENTUM, WEIGHT_DECAY = 0.005, 0.9, 5e-4


class TeacherPrompts(NamedTuple):
    text_KPC: Tensor  # those of layer 0 stand for the first tokens of every sentence
    vision_KPC: Tensor


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """In fp32, there and back."""
    shape = layer.normalized_shape
    return F.layer_norm(x.float(), shape, layer.weight, layer.bias, layer.eps).to(x.dtype)


class Block(nn.Module):
    """A residual block over [L, B, C], of open_clip's weights. Its own prompts, if it has any,
    replace the outputs of the layer before from token `first` on (from the end, if negative)."""

    def __init__(self, block: Any, prompts_PC: nn.Parameter | None, first: int, sdpa: bool) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        self.attn.batch_first = False
        self.prompts, self.first, self.sdpa = prompts_PC, first, sdpa

    def forward(self, x_LBC: Tensor, mask_LL: Tensor | None) -> Tensor:
        if self.prompts is not None:
            length, count = len(x_LBC), len(self.prompts)
            wide = self.prompts.expand(x_LBC.shape[1], -1, -1).permute(1, 0, 2).to(x_LBC.dtype)
            start = self.first % length
            x_LBC = torch.cat([x_LBC[:start], wide, x_LBC[start + count :]])
        x_LBC = x_LBC + self.attention(norm(self.ln_1, x_LBC), mask_LL)
        hidden = self.mlp.c_fc(norm(self.ln_2, x_LBC))
        return x_LBC + self.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))

    def attention(self, x_LBC: Tensor, mask_LL: Tensor | None) -> Tensor:
        mask_LL = None if mask_LL is None else mask_LL.to(x_LBC.device, x_LBC.dtype)
        if self.sdpa:
            return self.attn(x_LBC, x_LBC, x_LBC, need_weights=False, attn_mask=mask_LL)[0]
        # nn.MultiheadAttention as it was in torch 1.9, the reference's.
        length, batch, width = x_LBC.shape
        heads, size = self.attn.num_heads, width // self.attn.num_heads
        q, k, v = F.linear(x_LBC, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        q = (q * size**-0.5).contiguous().view(length, batch * heads, size).transpose(0, 1)
        k = k.contiguous().view(length, batch * heads, size).transpose(0, 1)
        v = v.contiguous().view(length, batch * heads, size).transpose(0, 1)
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask_LL is not None:
            scores += mask_LL
        mixed = torch.bmm(scores.softmax(-1), v)
        return self.attn.out_proj(mixed.transpose(0, 1).contiguous().view(length, batch, width))


def blocks(
    found: Sequence[Any], prompts: Sequence[nn.Parameter], first: int, sdpa: bool
) -> nn.ModuleList:
    deep = {i: prompts[i] for i in range(1, len(prompts))}
    return nn.ModuleList(Block(one, deep.get(i), first, sdpa) for i, one in enumerate(found))


class ImageEncoder(nn.Module):
    """Features [B, D] of normalised images."""

    def __init__(self, visual: Any, prompts_KPC: Tensor, sdpa: bool) -> None:
        super().__init__()
        self.visual = visual
        self.prompts = nn.ParameterList(nn.Parameter(one.clone()) for one in prompts_KPC)
        count = prompts_KPC.shape[1]
        self.blocks = blocks(visual.transformer.resblocks, list(self.prompts), -count, sdpa)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        visual = self.visual
        x = visual.conv1(images_BCHW)
        x = x.reshape(*x.shape[:2], -1).permute(0, 2, 1)
        batch, _, width = x.shape
        blank = torch.zeros(batch, 1, width, dtype=x.dtype, device=x.device)
        x = torch.cat([visual.class_embedding.to(x.dtype) + blank, x], dim=1)
        x = x + visual.positional_embedding.to(x.dtype)
        x = torch.cat([x, self.prompts[0].expand(batch, -1, -1).to(x.dtype)], dim=1)
        x = norm(visual.ln_pre, x).permute(1, 0, 2)
        for block in self.blocks:
            x = block(x, None)
        return norm(visual.ln_post, x.permute(1, 0, 2)[:, 0]) @ visual.proj


class TextEncoder(nn.Module):
    """Features [N, D] of all classes, from their tokens, which stay on the CPU between steps."""

    def __init__(self, clip: Any, tokens_NL: Tensor, prompts_KPC: Tensor, sdpa: bool) -> None:
        super().__init__()
        self.clip, self.tokens_NL, self.dtype = clip, tokens_NL, clip.visual.conv1.weight.dtype
        self.prompts = nn.ParameterList(nn.Parameter(one.clone()) for one in prompts_KPC)
        count = prompts_KPC.shape[1]
        with torch.no_grad():
            tokens = tokens_NL.to(clip.token_embedding.weight.device)
            known = clip.token_embedding(tokens).to(self.dtype)
        self.before, self.after = known[:, :1], known[:, 1 + count :]
        self.blocks = blocks(clip.transformer.resblocks, list(self.prompts), 1, sdpa)

    def forward(self) -> Tensor:
        clip, classes = self.clip, len(self.tokens_NL)
        context = self.prompts[0].unsqueeze(0).expand(classes, -1, -1)
        x = torch.cat([self.before, context.to(self.dtype), self.after], dim=1)
        x = (x + clip.positional_embedding.to(self.dtype)).permute(1, 0, 2)
        for block in self.blocks:
            x = block(x, clip.attn_mask)
        x = norm(clip.ln_final, x.permute(1, 0, 2))
        ends = self.tokens_NL.to(x.device).argmax(dim=-1)
        return x[torch.arange(classes, device=x.device), ends] @ clip.text_projection


class ReferenceStep:
    """One step of training; it starts from the prompts and the projector of `start`.

    teacher, student: open_clip's whole CLIPs, with QuickGELU, which are copied.
    tokens_NL: a sentence of each class, with words in the places of the text prompts.
    sdpa: with nn.MultiheadAttention as it is in today's torch.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        prompts: TeacherPrompts,
        tokens_NL: Tensor,
        start: PromptedTower,
        device: torch.device,
        dtype: torch.dtype,
        kd_weight: float = 1000.0,
        sdpa: bool = False,
    ) -> None:
        teacher, student = (copy.deepcopy(one).to(device).eval() for one in (teacher, student))
        if dtype != torch.float32:
            for one in (teacher, student):
                convert_weights_to_lp(one, dtype)
        for one in (teacher, student):
            one.requires_grad_(False)
        self.device, self.dtype, self.kd_weight = device, dtype, kd_weight
        self.text = TextEncoder(teacher, tokens_NL, prompts.text_KPC, sdpa).to(device)
        self.teacher = ImageEncoder(teacher.visual, prompts.vision_KPC, sdpa).to(device)
        assert start.prompts is not None
        self.student = ImageEncoder(student.visual, start.prompts.detach(), sdpa).to(device)
        self.projector = projector_like(start).to(device)
        if dtype != torch.float32:
            convert_weights_to_lp(self.projector, dtype)
        self.teacher_scale, self.scale = teacher.logit_scale, student.logit_scale
        learned = [*self.student.prompts, *self.projector.parameters()]
        self.optimizer = torch.optim.SGD(
            learned, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def step(self, images_BCHW: Tensor) -> float:
        """Learns from normalised fp32 images; the loss."""
        images_BCHW = images_BCHW.to(self.device)
        with torch.no_grad():
            w_ND = self.text()
            w_ND = w_ND / w_ND.norm(dim=-1, keepdim=True)
            u_BD = self.teacher(images_BCHW.to(self.dtype))
            u_BD = u_BD / u_BD.norm(dim=-1, keepdim=True)
            z_t_BN = self.teacher_scale.exp() * u_BD @ w_ND.t()
        x_BD = self.student(images_BCHW.to(self.dtype))
        x_BD = self.projector(x_BD[:, :, None, None]).flatten(1)
        x_BD = x_BD / x_BD.norm(dim=-1, keepdim=True)
        z_s_BN = self.scale.exp() * x_BD @ w_ND.t()
        kl = F.kl_div(F.log_softmax(z_s_BN, dim=1), F.softmax(z_t_BN, dim=1), reduction="sum")
        loss = self.kd_weight * (kl / z_s_BN.numel())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def projector_like(start: PromptedTower) -> nn.Sequential:
    """The same projector, of convolutions over one pixel."""
    own = start.projector
    (hidden, inputs), outputs = own.first.weight.shape, own.second.weight.shape[0]
    made = nn.Sequential(
        nn.Conv2d(inputs, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 1),
    )
    with torch.no_grad():
        for mine, theirs in ((made[0], own.first), (made[1], own.norm), (made[3], own.second)):
            mine.weight.copy_(theirs.weight.view_as(mine.weight))
            mine.bias.copy_(theirs.bias)
    return made


class _Photos(Dataset):
    """JPEGs, over and over; views as CLIP's training has them."""

    def __init__(self, jpegs: Sequence[bytes], images: int, pixels: int) -> None:
        self._jpegs, self._images = jpegs, images
        self._view = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    pixels, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
            ]
        )

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, at: int) -> Tensor:
        with Image.open(io.BytesIO(self._jpegs[at % len(self._jpegs)])) as image:
            return self._view(image.convert("RGB"))


def loader(
    jpegs: Sequence[bytes],
    images: int,
    pixels: int,
    pin: bool,
    batch: int = BATCH,
    workers: int = WORKERS,
) -> Iterator[Tensor]:
    """Batches of normalised fp32 images, by worker processes with PIL."""
    photos = _Photos(jpegs, images, pixels)
    return iter(
        DataLoader(photos, batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=pin)
    )
