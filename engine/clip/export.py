"""A bundle in the formats of others: one ONNX file, or a folder that open_clip loads.

What is written is first loaded again, by its own runtime, and must answer as the bundle does: until
then nothing lies at `out`. Weights are fp32. Letters: B images, N classes, D class vector width.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from engine.clip import promptkd_student
from engine.clip.bundle import Bundle, Predictor
from engine.clip.towers import LOCAL, Clip
from engine.clip.trained import open_clip_weights
from engine.config import UserError
from engine.tensor_files import write_tensors
from kernels.reference import logits

__all__ = ["Difference", "export_onnx", "export_open_clip"]

_TOLERANCE = 1e-3
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
_CPU = torch.device("cpu")
Answer = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 images -> features, logits


class Difference(NamedTuple):
    """The largest of a few images', as a part of the largest value."""

    features: float
    logits: float


def export_onnx(bundle: Bundle, out: Path, model: str = "", weights: str = "") -> Difference:
    """Writes the student, tower and all, as one ONNX file, and gives how far it is off.

    Input `images`: uint8 RGB [B, 3, S, S], the pixels of the test view as they are. Outputs
    `logits` fp32 [B, N] and `features` fp32 [B, D], unit rows. Metadata: `class_names` and
    `preprocessing` as JSON, `logit_scale`. A file cannot exceed 2 GB: weights that would lie beside
    it, in OUT.data. `model` and `weights` are those of Bundle.predictor(). Raises UserError if
    `out` exists or a package is missing, and RuntimeError where ONNX Runtime does not answer as the
    bundle does.
    """
    if out.exists():
        raise UserError(f"out: {out} exists; remove it or name another file")
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"format: onnx needs packages that are not installed; pip install {' '.join(missing)}"
        )
    import onnxruntime

    predictor = bundle.attached(bundle.load_backbone(model, weights), _CPU)
    example, shapes = (_images(2, bundle.pixels),), ({0: torch.export.Dim("batch")},)
    onnx = torch.onnx.export(
        torch.export.export(_Graph(predictor).eval(), example, dynamic_shapes=shapes),
        input_names=["images"],
        output_names=["logits", "features"],
        dynamic_shapes=shapes,  # for the name
        verbose=False,
    )
    assert onnx is not None  # it is, of a file
    onnx.model.metadata_props.update(_about(bundle))
    with _beside(out) as partial:
        onnx.save(partial)
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])

        def answer(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            found = session.run(["features", "logits"], {"images": images_BCHW.numpy()})
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])

        return _checked(predictor, answer, "ONNX Runtime")


def export_open_clip(bundle: Bundle, out: Path, model: str = "", weights: str = "") -> Difference:
    """Writes a folder that open_clip loads as `local-dir:OUT`, and gives how far it is off.

    It holds the whole CLIP in open_clip's format, with those weights of its image tower that were
    trained, `promptkd.safetensors` (the bundle), and `promptkd_student.py`, which makes the student
    of the two; its docstring tells why it is needed.
    Raises UserError if `out` exists, and RuntimeError where the student, loaded by open_clip from
    the folder, does not answer as the bundle does.
    """
    if out.exists():
        raise UserError(f"out: {out} exists; remove it or name another folder")
    clip = bundle.load_backbone(model, weights)
    with _beside(out) as partial:
        partial.mkdir()
        config = _config(clip, partial)
        (partial / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights_file = partial / "open_clip_model.safetensors"
        whole = clip.whole.state_dict() | open_clip_weights(bundle.tower_weights)
        write_tensors(weights_file, whole, {"format": "pt"})
        bundle.save(partial / "promptkd.safetensors")
        shutil.copy(promptkd_student.__file__, partial)
        (partial / "README.md").write_text(_readme(config, bundle))
        student, preprocess, classes = promptkd_student.load(partial)

        def answer(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images_BCHW]
            pixels = torch.stack([preprocess(picture) for picture in pictures])
            features = student.encode_image(pixels, normalize=True)
            return features, classes.logits(features)

        return _checked(bundle.attached(clip, _CPU), answer, "open_clip")


class _Graph(nn.Module):
    """What is exported. The tower is named here, since PromptedTower hides it."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor, self.tower = predictor, predictor.student.tower

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        u_BD = self.predictor.student(images_BCHW)
        return logits(u_BD, self.predictor.w_ND, self.predictor.scale), u_BD


def _about(bundle: Bundle) -> dict[str, str]:
    preprocessing = {
        "pixels": bundle.pixels,
        "resize": "shorter side to `pixels`, bicubic",
        "crop": "centre, `pixels` square",
        "values": "RGB, 0 to 255, not normalised",
    }
    return {
        "class_names": json.dumps(bundle.class_names, ensure_ascii=False),
        "logit_scale": str(bundle.logit_scale),
        "preprocessing": json.dumps(preprocessing),
    }


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Where to write a file or folder, and what belongs to it, that is to become `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        yield Path(folder) / out.name
        for path in Path(folder).iterdir():
            path.replace(out.parent / path.name)


@torch.inference_mode()
def _checked(predictor: Predictor, answer: Answer, who: str) -> Difference:
    """How far the answers to a few images are from the bundle's own, in two batches."""
    batches = [_images(count, predictor.pixels) for count in (1, 3)]
    theirs = map(torch.cat, zip(*map(answer, batches), strict=True))
    models = (predictor.student, predictor)
    own = [torch.cat([model(batch) for batch in batches]) for model in models]
    pairs = zip(theirs, own, strict=True)
    off = Difference(*(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    if not all(part <= _TOLERANCE for part in off):  # nan is not
        raise RuntimeError(f"{who} does not answer as the bundle does: off by {off}")
    return off


def _images(count: int, pixels: int) -> Tensor:
    """Smooth coloured pictures, uint8 [count, 3, pixels, pixels]."""
    generator = torch.Generator().manual_seed(count)
    coarse = 255 * torch.rand((count, 3, 5, 5), generator=generator)
    return F.interpolate(coarse, pixels, mode="bilinear").to(torch.uint8)


def _config(clip: Clip, folder: Path) -> dict[str, Any]:
    """open_clip's config of a backbone; copies the files of its tokenizer to `folder`."""
    if not clip.name.startswith(LOCAL):
        chosen = ("mean", "std", "interpolation", "resize_mode")
        preprocessing = {key: clip.whole.visual.preprocess_cfg[key] for key in chosen}
        return {
            "model_cfg": open_clip.get_model_config(clip.name),
            "preprocess_cfg": preprocessing,
        }
    source = Path(clip.name.removeprefix(LOCAL))
    config = json.loads((source / "open_clip_config.json").read_text())
    files = {file for pattern in _TOKENIZER for file in source.glob(pattern)}
    if (kwargs := _tokenizer_kwargs(config)).get("bpe_path"):
        files.add(source / kwargs["bpe_path"])
        kwargs["bpe_path"] = Path(kwargs["bpe_path"]).name
    for file in files:
        shutil.copy(file, folder)
    return config


def _tokenizer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    return config["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {})


def _readme(config: dict[str, Any], bundle: Bundle) -> str:
    bpe = _tokenizer_kwargs(config).get("bpe_path")
    where = f', bpe_path="THIS_FOLDER/{bpe}"' if bpe else ""
    loads = "the frozen CLIP, as it was before distillation"
    if bundle.tower_weights:
        loads = "the CLIP, with the weights of its image tower as distillation left them"
    return f"""# A student of {len(bundle.class_names)} classes, distilled with PromptKD

    python promptkd_student.py image.jpg

or

    from promptkd_student import load
    model, preprocess, classes = load("THIS_FOLDER")
    features = model.encode_image(preprocess(image)[None], normalize=True)
    probabilities = classes.logits(features).softmax(-1)    # of classes.names

`open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")` loads {loads}.
`promptkd_student.attach(model, "THIS_FOLDER")` makes the student of it, by forward hooks, since no
architecture of open_clip or timm can hold it in its weights: prompts, where there are any, are
replaced before each of the first layers, and a projector with batch norm follows the tower.

The text tower is the frozen CLIP's. The student does not use it: its class vectors are its
teacher's, and stored. The tokenizer of that text tower:

    open_clip.get_tokenizer("local-dir:THIS_FOLDER"{where})
"""
