"""The student of one's own training loop: what `distill` trains, without DeepSpeed and Ray.

Letters: B images, N classes, D class vector width.
"""

import torch
from torch import Tensor

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.prompts import PromptedTower
from engine.clip.towers import DTYPES, Clip, load_clip, trained_precision
from engine.config import Precision, StudentConfig, UserError
from kernels.kl import Features, Losses, distillation
from kernels.reference import logits

__all__ = ["Student"]


class Student(PromptedTower):
    """A CLIP image tower, frozen, with what is trained: prompts and a projector, fp32, which are
    all of its `parameters()`. It learns to agree with the teacher of `classes`.

    `scale` is exp of its own CLIP's logit scale, `w_ND` the teacher's class vectors (fp32 unit
    rows), `pixels` the side of the images it takes. `promptkd distill` trains a PromptedTower, too,
    which any number of workers can share.
    """

    w_ND: Tensor

    def __init__(
        self, clip: Clip, weights: str, classes: ClassVectors, prompts: int, depth: int, seed: int
    ) -> None:
        """`weights` is where the clip's came from, which the bundle is to tell."""
        width = classes.vectors.shape[1]
        super().__init__(clip.image, prompts, depth, width, width, seed)
        self._clip, self._weights, self._classes = clip, weights, classes
        self.scale, self.pixels = clip.logit_scale, clip.image.pixels
        self.register_buffer("w_ND", torch.from_numpy(classes.vectors), persistent=False)

    @classmethod
    def load(
        cls,
        model: str,
        weights: str,
        classes: ClassVectors,
        *,
        prompts: int = StudentConfig.prompts,
        depth: int = StudentConfig.depth,
        precision: Precision = "auto",
        device: str = "cpu",
        seed: int = 1,
    ) -> "Student":
        """With its first weights, in train mode, by the same words as `[student]` of a run's file.

        `classes`: the teacher's, `Teacher.classes`. `prompts`: visual prompts of each of the first
        `depth` layers. `precision`: of the frozen tower; auto: bf16 on a GPU, else fp32. Raises
        UserError where there is no such CLIP, or it has fewer layers than `depth`.
        """
        clip = load_clip(model, weights, "")
        if prompts and depth > clip.image.layers:
            raise UserError(
                f"depth: {depth} is more than the {clip.image.layers} layers of {model}"
            )
        clip.image.to(device, DTYPES[trained_precision(precision, torch.device(device).type)])
        return cls(clip, weights, classes, prompts, depth, seed).to(device)

    def losses(self, images_BCHW: Tensor, teacher_u_BD: Tensor, temperature: float = 1.0) -> Losses:
        """Of uint8 images [B, 3, pixels, pixels], and the teacher's unit features of the same
        views: `loss_B`, fp32 [B], is tau^2 * KL(softmax(z_t / tau) || softmax(z_s / tau)) in nats
        (PromptKD, equation 4), z = scale * u W^T; its mean is what is to be made smaller.

        The paper's code weighs that mean by 1000 / N. Beside it are `kl_B`, and `top_s_B` and
        `top_t_B`, each side's class. No logits are kept: see kernels.kl.
        """
        return distillation(
            self(images_BCHW, unit=False),
            Features(teacher_u_BD, self._classes.logit_scale),
            self.w_ND,
            self.scale,
            temperature=temperature,
        )

    @torch.inference_mode()
    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, N] fp32 of uint8 images [B, 3, pixels, pixels]: scale * u W^T. In train mode,
        batch norm goes by these images, and takes note of them: eval() first."""
        return logits(self(images_BCHW), self.w_ND, self.scale)

    def bundle(self) -> Bundle:
        """What it has learned by now, to be saved: what a run leaves."""
        learned = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        return Bundle.of(self._clip, self._weights, learned, self._classes)
