"""Stage I: prompts for both towers of a CLIP teacher, learned from a few labelled images.

Letters: B images, N classes, K prompted layers, P prompts, C tower width, D embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.clip.class_vectors import CHUNK, text_features, tokenized
from engine.clip.learned import LearnedPrompts
from engine.clip.templates import ENSEMBLES
from engine.clip.text import TextTower
from engine.clip.towers import Clip
from engine.config import UserError
from engine.config_pretrain import LearnConfig, PromptsConfig
from engine.progress import say, track
from engine.train.schedule import epoch_rate, gaussian_weights
from kernels.reference import kl_divergence, logits

__all__ = ["Average", "Losses", "MaPLe", "PromptSRC", "Tuner", "new_prompts"]


class PromptSRC(nn.Module):
    """Prompts of both towers, each learned on its own (PromptSRC, section 3.1)."""

    def __init__(self, words_PC: Tensor, config: PromptsConfig, vision_width: int) -> None:
        """`words_PC` are the token embeddings that the text prompts of layer 0 start from."""
        super().__init__()
        deep = _normal(config.depth - 1, *words_PC.shape)
        self.text_KPC = nn.Parameter(torch.cat([words_PC[None], deep]))
        self.vision_KPC = nn.Parameter(_normal(config.depth, config.vision, vision_width))

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Text and vision prompts, [K, P, C] each, of their tower's width."""
        return self.text_KPC, self.vision_KPC


class MaPLe(nn.Module):
    """Text prompts, and for each layer a linear coupler to the vision tower's width (MaPLe,
    section 3.2)."""

    def __init__(self, words_PC: Tensor, config: PromptsConfig, vision_width: int) -> None:
        super().__init__()
        deep = _normal(config.depth - 1, *words_PC.shape)
        self.text_KPC = nn.Parameter(torch.cat([words_PC[None], deep]))
        width = words_PC.shape[1]
        self.couplers = nn.ModuleList(nn.Linear(width, vision_width) for _ in range(config.depth))

    def prompts(self) -> tuple[Tensor, Tensor]:
        """As of PromptSRC."""
        pairs = zip(self.couplers, self.text_KPC, strict=True)
        return self.text_KPC, torch.stack([coupler(text_PC) for coupler, text_PC in pairs])


def _normal(*shape: int) -> Tensor:
    return 0.02 * torch.randn(shape)


def new_prompts(clip: Clip, config: PromptsConfig, seed: int) -> PromptSRC | MaPLe:
    """Prompts to begin with. Raises UserError where they do not fit the towers."""
    depth = min(clip.text.layers, clip.image.layers)
    if config.depth > depth:
        raise UserError(f"prompts.depth: {config.depth} layers, {clip.name} has {depth}")
    tokens = tokenized(clip, [config.words], "{}", "prompts.words")[0]
    words = int(tokens.argmax()) - 1  # between the start token and the end, the highest id
    if words < config.text:
        raise UserError(
            f"prompts.words: {config.words!r} has {words} tokens, prompts.text is {config.text}"
        )
    words_PC = clip.text.token_embedding(tokens[1 : 1 + config.text]).clone()
    kind = PromptSRC if config.method == "promptsrc" else MaPLe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(words_PC, config, clip.image.width)


@dataclass(frozen=True)
class Losses:
    """The terms of a step, as they are summed; scalars fp32."""

    cross_entropy: Tensor
    text: Tensor
    image: Tensor
    logits: Tensor

    @property
    def total(self) -> Tensor:
        return self.cross_entropy + self.text + self.image + self.logits


class Tuner:
    """Learns prompts inside a frozen CLIP, by SGD.

    PromptSRC's loss is CE + 25 L1(text) + 10 L1(image) + KL(zero-shot || prompted), summed over
    images and classes and divided by both (PromptSRC, section 3.2, and its code, whose reductions
    these are); MaPLe's is CE alone.
    """

    def __init__(
        self,
        clip: Clip,
        learner: PromptSRC | MaPLe,
        names: tuple[str, ...],
        prompts: PromptsConfig,
        config: LearnConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._config, self._scale = config, clip.logit_scale
        self._regulated = prompts.method == "promptsrc"
        self._tokens = tokenized(clip, names, f"{prompts.words} {{}}.", "classes.names").to(device)
        clip.text.to(device)
        if self._regulated:
            self._anchor_ND = text_anchor(clip, names)  # in fp32, as in the reference
        self._text, self._image = clip.text.to(dtype), clip.image.to(device, dtype)
        self.learner = learner.to(device)
        self._optimizer = torch.optim.SGD(
            learner.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay
        )

    def losses(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Losses, Tensor]:
        """The losses of labelled uint8 images, and the logits [B, N]."""
        text_KPC, vision_KPC = self.learner.prompts()
        t_ND = F.normalize(in_chunks(self._text, self._tokens, text_KPC).float(), dim=-1)
        u_BD = F.normalize(self._image(images_BCHW, vision_KPC).float(), dim=-1)
        z_BN = logits(u_BD, t_ND, self._scale)
        cross_entropy = F.cross_entropy(z_BN, labels_B)
        zero = cross_entropy.new_zeros(())
        if not self._regulated:
            return Losses(cross_entropy, zero, zero, zero), z_BN
        with torch.no_grad():
            anchor_BD = F.normalize(self._image(images_BCHW).float(), dim=-1)
            anchor_BN = logits(anchor_BD, self._anchor_ND, self._scale)
        told = Losses(
            cross_entropy,
            self._config.text_weight * F.l1_loss(t_ND, self._anchor_ND),
            self._config.image_weight * F.l1_loss(u_BD, anchor_BD),
            kl_divergence(anchor_BN, z_BN).mean() / len(t_ND),
        )
        return told, z_BN

    def step(self, pass_: int, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """One update. Gives loss, cross-entropy and accuracy over the images, fp32 [3], on the
        device. Raises nothing: a loss that is not finite shows in what it gives."""
        rate = epoch_rate(pass_, self._config.passes, self._config.lr)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        told, z_BN = self.losses(images_BCHW, labels_B)
        self._optimizer.zero_grad(set_to_none=True)
        told.total.backward()
        self._optimizer.step()
        right = (z_BN.argmax(-1) == labels_B).float().mean()
        return torch.stack([told.total.detach(), told.cross_entropy.detach(), right])


@torch.no_grad()
def text_anchor(clip: Clip, names: tuple[str, ...]) -> Tensor:
    """Zero-shot text features [N, D] fp32, unit: the mean over 60 sentences, made a unit after it
    (and not before it too, as CLIP's ensembles are)."""
    say(f"zero-shot text features of {len(names)} classes, in 60 sentences each")
    sentences = track(ENSEMBLES["imagenet-60"], "zero-shot text features")
    features = [text_features(clip, names, sentence, "classes.names") for sentence in sentences]
    return F.normalize(torch.stack(features).mean(dim=0), dim=-1)


def in_chunks(tower: TextTower, tokens_NL: Tensor, prompts_KPC: Tensor) -> Tensor:
    """Text features [N, D] with a gradient. Beyond one chunk of classes, activations are made
    again in backward, so that memory does not grow with the number of classes."""
    chunks = tokens_NL.split(CHUNK)
    if len(chunks) == 1:
        return tower(tokens_NL, prompts_KPC)
    parts = [checkpoint(tower, part, prompts_KPC, use_reentrant=False) for part in chunks]
    return torch.cat(parts)


class Average:
    """Gaussian average of prompts over the ends of passes (PromptSRC, section 3.2.2)."""

    def __init__(self, config: LearnConfig) -> None:
        if config.average_mean:
            self._weights = gaussian_weights(config.passes, config.average_mean, config.average_std)
        else:
            self._weights = [0.0] * (config.passes - 1) + [1.0]
        self._sums: list[Tensor] | None = None

    @torch.no_grad()
    def add(self, pass_: int, prompts: tuple[Tensor, Tensor]) -> None:
        """Takes in the prompts at the end of 0-based `pass_`."""
        parts = [self._weights[pass_] * part.detach().float().cpu() for part in prompts]
        sums = self._sums or [torch.zeros_like(part) for part in parts]
        self._sums = [a + b for a, b in zip(sums, parts, strict=True)]

    def prompts(self, clip: Clip, config: PromptsConfig) -> LearnedPrompts:
        assert self._sums is not None
        text_KPC, vision_KPC = self._sums
        return LearnedPrompts(text_KPC, vision_KPC, config.words, config.method, clip.backbone)
