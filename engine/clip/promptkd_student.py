"""A distilled student on a stock open_clip model; needs torch, safetensors and open_clip alone.

This file lies in a folder that `promptkd export --format open_clip` wrote, beside open_clip's own
config and weights of the CLIP, and `promptkd.safetensors`, which holds all that was learned:

    model, preprocess, classes = load("this/folder")
    u_BD = model.encode_image(preprocess(image)[None], normalize=True)
    logits_BN = classes.logits(u_BD)

`python promptkd_student.py image.jpg` prints the top classes of images.

Why hooks: no architecture of open_clip 3.3 or timm 1.0 can hold such a student in its weights.
Extra tokens, where there are any (timm's registers), enter once and flow through all layers, while
these prompts are replaced before each of the first layers (PromptKD, section 3.3). And open_clip's
tower ends in one linear map to the width of the text tower, while the student goes on through
Linear, BatchNorm, ReLU and Linear to the width of its teacher.

Letters: B images, N classes, L tokens, C tower width, D class vector width.
"""

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F


class Classes(NamedTuple):
    """What the student was distilled to tell apart."""

    names: tuple[str, ...]
    vectors_ND: Tensor  # the teacher's, fp32 unit rows, on the CPU
    logit_scale: float

    def logits(self, u_BD: Tensor) -> Tensor:
        """Logits [B, N] fp32 of unit features; their softmax is the probabilities."""
        return self.logit_scale * u_BD.float() @ self.vectors_ND.to(u_BD.device).T


class Learned(nn.Module):
    """The prompts, a layer a row, and the projector."""

    prompts: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("prompts", tensors.pop("prompts", torch.zeros(0, 0, 0)))
        hidden, inputs = tensors["projector.first.weight"].shape
        outputs = len(tensors["projector.second.weight"])
        layers = {
            "first": nn.Linear(inputs, hidden),
            "norm": nn.BatchNorm1d(hidden),
            "relu": nn.ReLU(),
            "second": nn.Linear(hidden, outputs),
        }
        self.projector = nn.Sequential(OrderedDict(layers))
        counted = {"norm.num_batches_tracked": torch.tensor(0)}  # of no use in eval mode
        stored = {name.removeprefix("projector."): tensor for name, tensor in tensors.items()}
        self.projector.load_state_dict(stored | counted)
        self.requires_grad_(False)

    def appended(self, x_BLC: Tensor) -> Tensor:
        """With the first layer's prompts after the tokens."""
        return torch.cat([x_BLC, self._of_layer(0, x_BLC)], dim=1)

    def replaced(self, x_BLC: Tensor, layer: int) -> Tensor:
        """With the prompts of a layer instead of what the layer before made of its own."""
        kept = x_BLC[:, : -self.prompts.shape[1]]
        return torch.cat([kept, self._of_layer(layer, x_BLC)], dim=1)

    def _of_layer(self, layer: int, like_BLC: Tensor) -> Tensor:
        return self.prompts[layer].to(like_BLC.dtype).expand(len(like_BLC), -1, -1)


def attach(model: Any, folder: str | Path) -> Classes:
    """Makes a student of the open_clip model of `folder`, and puts it in eval mode.

    From then on its encode_image() gives the student's features [B, D], unit ones with
    normalize=True. Its text tower is untouched, and of no use: the class vectors are the teacher's.
    Raises ValueError for a model that this cannot be done to.
    """
    visual = model.visual
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        raise ValueError("the image tower is not open_clip's VisionTransformer")
    if not visual.transformer.batch_first:
        raise ValueError("this open_clip runs its layers tokens first; use open_clip 3.3 or later")
    if hasattr(visual, "promptkd"):
        raise ValueError("the model is a student already")
    with safe_open(Path(folder) / "promptkd.safetensors", "pt") as file:
        about = json.loads(file.metadata()["bundle"])
        # Weights of the tower, where it was trained, are the model's already.
        keys = [key for key in file.keys() if not key.startswith("learned.tower.")]
        tensors = {key.removeprefix("learned."): file.get_tensor(key) for key in keys}
    vectors_ND = F.normalize(tensors.pop("class_vectors").float(), dim=-1)

    learned = Learned(tensors).to(visual.class_embedding.device)
    visual.promptkd = learned  # a part of the model: it moves where the model moves
    if len(learned.prompts):
        visual.ln_pre.register_forward_pre_hook(lambda _, args: learned.appended(args[0]))
    for layer in range(1, len(learned.prompts)):
        visual.transformer.resblocks[layer].register_forward_pre_hook(
            lambda _, args, layer=layer: (learned.replaced(args[0], layer), *args[1:])
        )
    visual.register_forward_hook(lambda _, args, features: learned.projector(features.float()))
    model.eval()
    return Classes(tuple(about["class_names"]), vectors_ND, about["logit_scale"])


def load(folder: str | Path, device: str = "cpu") -> tuple[Any, Any, Classes]:
    """The student, in eval mode, open_clip's own test transform of its images, and its classes."""
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", device=device
    )
    classes = attach(model, folder)
    return model, preprocess, classes


@torch.inference_mode()
def main(images: list[str]) -> None:
    from PIL import Image

    model, preprocess, classes = load(Path(__file__).parent)
    for image in images:
        pixels = preprocess(Image.open(image))[None]
        logits_BN = classes.logits(model.encode_image(pixels, normalize=True))
        best = logits_BN.softmax(-1)[0].topk(min(5, len(classes.names)))
        print(image)
        for probability, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  {100 * probability:5.1f} %  {classes.names[row]}")


if __name__ == "__main__":
    main(sys.argv[1:])
