"""Towers whose own weights are trained, and where those weights go when they are.

Weights are named as in ImageTower, but for the patch embedding, which is as in CLIP: for normalised
pixels, and without a bias. Learning rates and weight decay are meant for numbers of that size;
ImageTower's, for pixels up to 255, are some 60 times smaller.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.clip.towers import Clip, ImageTower, PatchEmbedding, folded

__all__ = ["TrainedTower", "open_clip_weights", "with_weights"]

_PATCH = "patch.weight"


class TrainedTower(ImageTower):
    """A copy of a clip's tower, in fp32, whose last layers and what follows them take gradients."""

    def __init__(self, clip: Clip, layers: int | None, bf16: bool = False) -> None:
        """`layers` None: all of it, the embeddings too. `bf16`: its forward is in autocast."""
        visual = copy.deepcopy(clip.whole.visual).float()
        super().__init__(visual, clip.image.mean, clip.image.std)
        self.patch = _Patch(visual.conv1.weight, self.mean, self.std)
        self.patch.requires_grad_(False)
        self._bf16 = bf16
        if layers is None:
            self.requires_grad_(True)
            return
        assert 0 < layers <= self.layers
        for module in (self.blocks[-layers:], self.ln_post):
            module.requires_grad_(True)
        self.proj.requires_grad_(True)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, images_BCHW: Tensor, prompts_KPC: Tensor | None = None) -> Tensor:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=self._bf16):
            return super().forward(images_BCHW, prompts_KPC)


class _Patch(PatchEmbedding):
    """CLIP's patch embedding, which normalises raw pixels first."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(len(weight), weight.shape[-1], bias=False)
        self.weight = nn.Parameter(weight.detach().clone())
        for name, values in (("mean_C11", mean), ("std_C11", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor, product: bool = True) -> Tensor:
        return super().forward((images_BCHW / 255 - self.mean_C11) / self.std_C11, product)


def with_weights(clip: Clip, weights: Mapping[str, Tensor]) -> ImageTower:
    """A copy of a clip's tower, where and in the precision it is, with a TrainedTower's weights."""
    tower, own = copy.deepcopy(clip.image), dict(weights)
    if _PATCH in own:
        patch = folded(own.pop(_PATCH), tower.mean, tower.std)
        own |= {f"patch.{name}": tensor for name, tensor in patch.state_dict().items()}
    unknown = tower.load_state_dict(own, strict=False).unexpected_keys
    assert not unknown, unknown
    return tower


def open_clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A TrainedTower's weights under the names they have in open_clip's whole CLIP."""
    names = {"patch": "conv1", "blocks": "transformer.resblocks"}
    told = {}
    for name, tensor in weights.items():
        first, *rest = name.split(".")
        told[".".join(["visual", names.get(first, first), *rest])] = tensor
    return told
