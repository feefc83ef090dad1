"""Exports, loaded by the libraries they are made for."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from bundles import NAMES, make_bundle, photo, printed_by
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import clip_folder

from engine.clip.bundle import Bundle
from engine.clip.export import export_onnx, export_open_clip
from engine.clip.towers import load_clip
from engine.config import UserError
from jobs import cli


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return make_bundle(clip_folder(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[list[Path], torch.Tensor]:
    """Pictures of the size of the view, as files and as uint8 [4, 3, 16, 16]."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    files = [folder / f"{i}.png" for i in range(4)]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file)
    return files, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def own(bundle: Bundle, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of the bundle itself."""
    predictor = bundle.predictor("cpu", "fp32")
    with torch.inference_mode():
        return predictor.student(images), predictor(images)


def test_onnx_runtime_answers_as_the_bundle(bundle, images, tmp_path, capfd):
    import onnxruntime

    bundle.save(tmp_path / "bundle.safetensors")
    out = tmp_path / "new" / "it's.onnx"
    words = ["export", tmp_path / "bundle.safetensors", out, "--format", "onnx"]
    assert cli.main([str(word) for word in words]) == 0
    told = capfd.readouterr().out
    assert told.startswith(f"{out}: 3 classes; features differ") and told.count("\n") == 2
    there = sorted(path.name for path in out.parent.iterdir())
    assert there == ["it's.onnx", "model_card.md"], "one file, whole, and its card"

    session = onnxruntime.InferenceSession(out)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", 3, 16, 16],
    )
    features, logits = own(bundle, images[1])
    for rows in (slice(0, 1), slice(0, 4)):
        answer = session.run(["features", "logits"], {"images": images[1][rows].numpy()})
        np.testing.assert_allclose(answer[0], features[rows], atol=1e-5)
        np.testing.assert_allclose(answer[1], logits[rows], atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(NAMES) and float(about["logit_scale"]) == 20
    assert json.loads(about["preprocessing"])["pixels"] == 16

    picture = photo(out.parent)
    assert cli.main(["predict", str(tmp_path / "bundle.safetensors"), str(picture)]) == 0
    (best, *_) = json.loads(capfd.readouterr().out)["top"]
    assert printed_by((out.parent / "model_card.md").read_text(), out.parent) == best


def test_a_missing_package_is_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^format: onnx .* pip install onnxscript$"):
        export_onnx(bundle, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


ALONE = """
import sys
sys.modules |= dict.fromkeys(("engine", "kernels", "jobs"))  # importing our own would fail
folder, out, *files = sys.argv[1:]
sys.path.insert(0, folder)
import open_clip, torch
from PIL import Image
from safetensors.torch import save_file

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
model.eval()
x = torch.stack([preprocess(Image.open(file)) for file in files])
with torch.inference_mode():
    frozen = model.encode_image(x, normalize=True)
    import promptkd_student
    classes = promptkd_student.attach(model, folder)
    u = model.encode_image(x, normalize=True)
    one = model.encode_image(x[:1], normalize=True)
    save_file({"frozen": frozen, "u": u, "one": one, "z": classes.logits(u)}, out)
print(*classes.names, sep="|")
"""


def alone(script: list[str], cwd: Path) -> str:
    command = [sys.executable, "-I", *script]
    run = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_open_clip(bundle: Bundle, folder: Path, files, pixels, tmp_path: Path) -> None:
    """What open_clip gives of the folder, in a process of its own."""
    script = ["-c", ALONE, str(folder), str(tmp_path / "answer"), *map(str, files)]
    assert alone(script, tmp_path).strip().split("|") == list(NAMES)
    answer = load_file(tmp_path / "answer")
    features, logits = own(bundle, pixels)
    torch.testing.assert_close(answer["u"], features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer["one"], features[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer["z"], logits, rtol=1e-4, atol=1e-4)
    frozen = load_clip(bundle.model, bundle.weights, "").image(pixels)
    frozen = torch.nn.functional.normalize(frozen, dim=-1)
    torch.testing.assert_close(answer["frozen"], frozen, rtol=1e-4, atol=1e-5)


def test_open_clip_alone_answers_as_the_bundle(bundle, images, tmp_path, capsys):
    bundle.save(tmp_path / "bundle.safetensors")
    folder = tmp_path / "student"
    words = ["export", tmp_path / "bundle.safetensors", folder, "--format", "open_clip"]
    assert cli.main([str(word) for word in words]) == 0
    assert f"{folder}: 3 classes; features differ" in capsys.readouterr().out
    check_open_clip(bundle, folder, *images, tmp_path)

    # The script by itself, the tokenizer as the README says, and the folder as a backbone of ours.
    told = alone([str(folder / "promptkd_student.py"), str(images[0][0])], tmp_path)
    best = NAMES[own(bundle, images[1][:1])[1].argmax()]
    assert told.splitlines()[0] == str(images[0][0]) and told.splitlines()[1].endswith(f"%  {best}")
    vocabulary = folder / "bpe.txt.gz"
    assert (
        f'"local-dir:THIS_FOLDER", bpe_path="THIS_FOLDER/{vocabulary.name}"'
        in (folder / "README.md").read_text()
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(vocabulary))
    tokens = load_clip(bundle.model, "", "").tokenizer(["oak"])
    assert torch.equal(tokenizer(["oak"]), tokens)
    assert load_clip(f"local-dir:{folder}", "", "").fingerprint == bundle.backbone

    with pytest.raises(UserError, match=r"^out: .*student exists"):
        export_open_clip(bundle, folder)


def test_a_student_of_shallow_prompts(tmp_path):
    bundle = make_bundle(clip_folder(tmp_path / "clip", seed=4), depth=1)
    assert max(export_open_clip(bundle, tmp_path / "student")) < 1e-5


@pytest.mark.parametrize(("prompts", "layers"), [(2, None), (0, 1), (0, 0)])
def test_a_trained_tower_goes_along(prompts, layers, images, tmp_path):
    """Into both formats, with prompts and without; open_clip has its weights before any hook."""
    model = clip_folder(tmp_path / "clip", seed=4)
    bundle = make_bundle(model, prompts=prompts, layers=layers)
    bundle.save(tmp_path / "bundle.safetensors")
    bundle = Bundle.load(tmp_path / "bundle.safetensors")
    folder = tmp_path / "student"
    assert max(export_open_clip(bundle, folder)) < 1e-5
    assert max(export_onnx(bundle, tmp_path / "student.onnx")) < 1e-5

    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    frozen = load_clip(model, "", "")
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(file)) for file in images[0]])
        theirs, ours = stock.eval().encode_image(pixels), frozen.image(images[1])
        predictor = bundle.attached(frozen, torch.device("cpu"))
        tower = predictor.student.tower(images[1])
    torch.testing.assert_close(theirs, tower, rtol=1e-4, atol=1e-5)
    assert torch.allclose(theirs, ours, atol=0.01) == (layers == 0)
    told = (folder / "README.md").read_text()
    assert ("as distillation left them" in told) == (layers != 0)


def test_an_architecture_with_a_checkpoint(tmp_path):
    """The smallest of the registered architectures, and weights in half precision."""
    model, weights = "ViT-S-32-alt", tmp_path / "weights.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(open_clip.create_model(model).half().state_dict(), weights)
    bundle = make_bundle(model, str(weights))
    assert max(export_open_clip(bundle, tmp_path / "student")) < 1e-4
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    check_open_clip(bundle, tmp_path / "student", files, images, tmp_path)


def test_an_export_that_is_wrong_is_not_left_behind(bundle, tmp_path, monkeypatch):
    """One that forgets the deep prompts, as a stock open_clip model would."""
    from engine.clip import promptkd_student

    forgetful = lambda self, x_BLC, layer: x_BLC  # noqa: E731
    monkeypatch.setattr(promptkd_student.Learned, "replaced", forgetful)
    with pytest.raises(RuntimeError, match="open_clip does not answer as the bundle does"):
        export_open_clip(bundle, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_another_backbone_is_refused(bundle, tmp_path):
    other = clip_folder(tmp_path / "other", seed=1)
    for export in (export_onnx, export_open_clip):
        with pytest.raises(UserError, match=r"^weights: .* trained on backbone"):
            export(bundle, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_the_student_file_refuses_what_it_cannot_do(bundle, tmp_path):
    export_open_clip(bundle, tmp_path / "student")
    place = tmp_path / "student" / "promptkd_student.py"
    spec = importlib.util.spec_from_file_location("promptkd_student", place)
    student = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(student)
    model, _, classes = student.load(tmp_path / "student")
    assert classes.names == NAMES and torch.equal(classes.vectors_ND, bundle.w_ND)
    with pytest.raises(ValueError, match="is a student already"):
        student.attach(model, tmp_path / "student")
    model.visual = torch.nn.Identity()
    with pytest.raises(ValueError, match="not open_clip's VisionTransformer"):
        student.attach(model, tmp_path / "student")
    restricted = bundle.kept(["ü"], "keep")
    restricted.save(tmp_path / "student" / "promptkd.safetensors")  # a bundle with other classes
    assert student.load(tmp_path / "student")[2].names == ("ü",)
