"""The reference's own numbers on two tiny CLIPs, as folders and checkpoints that the product reads.

`parity.npz` comes from the real data folder; its README says what each array is.
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1}
DEPTH = 9


class Parity:
    """The arrays, and two `local-dir:` models made of them: `teacher` and `student`."""

    def __init__(self, npz: Path, folder: Path) -> None:
        self._arrays = np.load(npz)
        self.names = tuple(str(name) for name in self["class_names", np.ndarray])
        self.teacher = _local_dir(folder / "teacher", self.all("teacher_clip/"), 96, 128, 10)
        self.student = _local_dir(folder / "student", self.all("student_clip/"), 64, 64, 2)
        self.checkpoint = folder / "model.pth.tar-20"
        torch.save({"state_dict": self.all("teacher_prompts/"), "epoch": 20}, self.checkpoint)

    def __getitem__(self, key) -> Tensor:
        if isinstance(key, tuple):
            return self._arrays[key[0]]
        value = torch.from_numpy(self._arrays[key])
        return value.float() if value.is_floating_point() else value

    def all(self, prefix: str) -> dict[str, Tensor]:
        keys = (key for key in self._arrays.files if key.startswith(prefix))
        return {key.removeprefix(prefix): self[key] for key in keys}

    def learned(self, prefix: str) -> tuple[Tensor, Tensor]:
        """Text and vision prompts [K, P, C], of the reference's names."""
        told = self.all(prefix)
        layers = [f".transformer.resblocks.{i}.VPT_shallow" for i in range(1, DEPTH)]
        text = ["prompt_learner.ctx", *(f"text_encoder{layer}" for layer in layers)]
        vision = ["image_encoder.VPT", *(f"image_encoder{layer}" for layer in layers)]
        assert set(text + vision) == set(told)
        return torch.stack([told[k] for k in text]), torch.stack([told[k] for k in vision])

    def student_state(self, prefix: str) -> dict[str, Tensor]:
        """Tensors in the reference's student names, in ours."""
        told = self.all(prefix)
        layers = [f"image_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, DEPTH)]
        ours = {"prompts": torch.stack([told[k] for k in ("image_encoder.VPT", *layers)])}
        trans = "VPT_image_trans.conv1"
        for mine, theirs in {"first": "0", "norm": "1", "second": "3"}.items():
            for part in ("weight", "bias", "running_mean", "running_var"):
                if (key := f"{trans}.{theirs}.{part}") in told:
                    ours[f"projector.{mine}.{part}"] = told[key].squeeze(-1).squeeze(-1)
        return ours

    def student_start(self) -> dict[str, Tensor]:
        """The student before the first step.

        The file's own `student_init/*` will not do: it was saved by reference, and holds what
        `out/after2/*` does. So both SGD updates are undone, in float64, by the file's gradients,
        which leads back to half-precision numbers, as the reference starts from (its batch norm
        aside). That the features of the first step come out right is then part of the test.
        """
        rate, decay, momentum = 0.005, 5e-4, 0.9
        end = self.student_state("out/after2/")
        first, second = (self.student_state(f"out/step{i}/grad/") for i in range(2))
        kept = 1 - rate * decay
        start = {
            "projector.norm.running_mean": torch.zeros(96),
            "projector.norm.running_var": torch.ones(96),
        }
        for name, gradient in first.items():
            moved = -rate * ((kept + momentum) * gradient.double() + second[name].double())
            scale = kept * kept - rate * momentum * decay
            value = (end[name].double() - moved) / scale
            start[name] = value.float() if "norm" in name else value.half().float()
            assert (start[name] - value).abs().max() < 1e-6, name
        return start


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within `tolerance`, relative to the norm of what is wanted."""
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < tolerance, f"off by {error:.2e}"


def _local_dir(
    folder: Path, state: dict[str, Tensor], embed_dim: int, width: int, text_layers: int
) -> str:
    folder.mkdir(parents=True)
    model = {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 10,
            "width": width,
            "head_width": 64,
            "patch_size": 8,
        },
        "text_cfg": TEXT | {"layers": text_layers},
    }
    # The images are normalised already: this preprocessing changes nothing.
    settings = {"mean": [0, 0, 0], "std": [1 / 255] * 3, "size": 32}
    config = {"model_cfg": model, "preprocess_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    whole = {key: value.contiguous() for key, value in (built.state_dict() | state).items()}
    assert whole.keys() == built.state_dict().keys()
    save_file(whole, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
