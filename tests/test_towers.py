import copy
import json
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, clip_folder

from engine.clip.archive import is_archive
from engine.clip.towers import half_precision, load_clip
from engine.clip.weights import vision_shape
from engine.config import UserError

TEXT = {key: MODEL["text_cfg"][key] for key in MODEL["text_cfg"] if key != "tokenizer_kwargs"}


def register(folder, name: str, model: dict) -> str:
    """Makes an architecture known to open_clip."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**model, "text_cfg": TEXT}))
    open_clip.add_model_config(path)
    return name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a local-dir CLIP, and of architectures `tiny-*`."""
    folder = tmp_path_factory.mktemp("towers")
    clip_folder(folder / "clip")
    register(folder, "tiny-vit", MODEL)
    for name, vision in {
        "tiny-wide": {"width": 24},
        "tiny-shallow": {"layers": 2},
        "tiny-deep": {"layers": 4},
        "tiny-average": {"pool_type": "avg"},
        "tiny-resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    }.items():
        model = copy.deepcopy(MODEL)
        model["vision_cfg"].update(vision)
        register(folder, name, model)
    return folder


@pytest.fixture(scope="module")
def clip(models):
    return load_clip(f"local-dir:{models / 'clip'}", "", "teacher.")


@pytest.fixture(scope="module")
def state(models):
    return load_file(models / "clip" / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def visual(models):
    """open_clip's own tower of the same weights."""
    return open_clip.create_model(f"local-dir:{models / 'clip'}").eval().visual


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def normalised(images):
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def by_hand(visual, image, prompts):
    """PromptKD's rule for one normalised image, a patch and a layer at a time."""
    side = visual.conv1.weight.shape[-1]
    tokens = [visual.class_embedding]
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            patch = image[:, top : top + side, left : left + side]
            tokens.append((visual.conv1.weight * patch).sum((1, 2, 3)))
    seen = torch.stack(tokens) + visual.positional_embedding
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer == 0:
            x = visual.ln_pre(torch.cat([seen, prompts[0]]))
        elif layer < len(prompts):
            x = torch.cat([x[: len(seen)], prompts[layer]])
        x = block(x[None])[0]
    return visual.ln_post(x[0]) @ visual.proj


@torch.no_grad()
def test_pixels_give_the_features_of_open_clip(clip, visual, images):
    features = clip.image(images)
    torch.testing.assert_close(features, visual(normalised(images)), rtol=1e-5, atol=1e-5)
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    wanted = visual(normalised(extremes))
    torch.testing.assert_close(clip.image(extremes), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prompts_follow_the_rule_of_promptkd(clip, visual, images, depth):
    prompts = torch.randn(depth, 2, 16, generator=torch.Generator().manual_seed(depth))
    wanted = torch.stack([by_hand(visual, image, prompts) for image in normalised(images)])
    features = clip.image(images, prompts)
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)
    assert (features - clip.image(images)).abs().max() > 0.01


@torch.no_grad()
def test_half_precision_is_close(models, clip, images):
    half = load_clip(f"local-dir:{models / 'clip'}", "", "teacher.").image.to(torch.bfloat16)
    prompts = torch.randn(2, 2, 16)
    for told in (None, prompts):
        near = torch.cosine_similarity(half(images, told).float(), clip.image(images, told))
        assert half(images, told).dtype == half.dtype == torch.bfloat16
        assert near.min() > 0.995


def test_the_tower_is_frozen(clip):
    assert not any(parameter.requires_grad for parameter in clip.image.parameters())
    assert not clip.image.training


def test_every_file_format_loads_the_same(models, clip, state, images, tmp_path):
    save_file(state, tmp_path / "flat.safetensors")
    torch.save(state, tmp_path / "flat.pt")
    nested = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": nested}, tmp_path / "nested.pt")
    for file in ("flat.safetensors", "flat.pt", "nested.pt"):
        other = load_clip("tiny-vit", str(tmp_path / file), "teacher.")
        assert other.fingerprint == clip.fingerprint
        assert torch.equal(other.image(images), clip.image(images))
        assert other.logit_scale == pytest.approx(state["logit_scale"].exp().item())


@pytest.mark.parametrize("key", ["visual.proj", "token_embedding.weight", "logit_scale"])
def test_one_weight_changes_the_fingerprint(models, clip, state, tmp_path, key):
    changed = {name: value.clone() for name, value in state.items()}
    changed[key].view(-1)[0] += 1e-3
    save_file(changed, tmp_path / "changed.safetensors")
    other = load_clip("tiny-vit", str(tmp_path / "changed.safetensors"), "teacher.")
    assert other.fingerprint != clip.fingerprint


def test_text_comes_from_the_vocabulary_beside_the_model(clip):
    tokens = clip.tokenizer(["ab", "a b"])
    assert tokens.shape == (2, 32) and tokens.max() < 514
    assert clip.text(tokens).shape == (2, 8)


def test_vision_shape_needs_no_model(models):
    assert vision_shape(f"local-dir:{models / 'clip'}") == (16, 3)
    assert vision_shape("tiny-deep") == (16, 4)


def test_half_precision_is_chosen_by_the_device():
    assert half_precision("fp32", torch.device("cuda")) == "fp32"
    assert half_precision("auto", torch.device("cuda")) == "fp16"
    flags = Path("/proc/cpuinfo").read_text()
    fast = "amx_tile" in flags or "avx512_bf16" in flags
    assert half_precision("auto", torch.device("cpu")) == ("bf16" if fast else "fp32")


@pytest.mark.parametrize(
    ("model", "weights", "complaint"),
    [
        ("", "", "student.model is not set"),
        ("tiny-nothing", "", "student.model: open_clip knows no architecture 'tiny-nothing'"),
        ("tiny-vit", "", "student.weights is not set"),
        ("tiny-vit", "no/such.pt", "student.weights: no/such.pt is neither"),
        ("local-dir:no/such", "", "student.model: no/such holds no open_clip_config.json"),
    ],
)
def test_names_that_lead_nowhere_are_refused(models, model, weights, complaint):
    with pytest.raises(UserError, match=f"^{complaint}"):
        load_clip(model, weights, "student.")


def test_folder_without_weights_is_refused(tmp_path):
    clip_folder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^teacher\.model: .* holds no weights"):
        load_clip(f"local-dir:{tmp_path}", "", "teacher.")


@pytest.mark.parametrize("name", ["junk.pt", "junk.safetensors"])
def test_file_that_is_no_checkpoint_is_refused(models, tmp_path, name):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UserError, match=rf"^teacher\b.*{name}"):
        load_clip("tiny-vit", str(tmp_path / name), "teacher.")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"epoch": 3, "model": {}}], ids=["tensor", "list", "other"]
)
def test_torch_file_that_is_no_checkpoint_is_refused(models, tmp_path, content):
    torch.save(content, tmp_path / "strange.pt")
    with pytest.raises(UserError, match=r"^teacher\b.*strange\.pt"):
        load_clip("tiny-vit", str(tmp_path / "strange.pt"), "teacher.")


@pytest.mark.parametrize("architecture", ["tiny-wide", "tiny-deep", "tiny-shallow"])
def test_checkpoint_of_another_architecture_is_refused(models, state, tmp_path, architecture):
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=rf"^teacher\b.* not a checkpoint of {architecture}"):
        load_clip(architecture, str(tmp_path / "w.safetensors"), "teacher.")


@pytest.mark.parametrize("key", ["visual.proj", "visual.positional_embedding", "logit_scale"])
def test_checkpoint_that_lacks_a_tensor_is_refused(models, state, tmp_path, key):
    torch.save({name: value for name, value in state.items() if name != key}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"^student\b.* not a checkpoint of tiny-vit.*{key}"):
        load_clip("tiny-vit", str(tmp_path / "w.pt"), "student.")


@pytest.mark.parametrize("architecture", ["tiny-average", "tiny-resnet"])
def test_tower_without_a_class_token_is_refused(models, tmp_path, architecture):
    torch.save(open_clip.create_model(architecture).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"^student\.model: {architecture} has no plain ViT"):
        load_clip(architecture, str(tmp_path / "w.pt"), "student.")


def test_fingerprint_does_not_see_how_the_preprocessing_is_written(models, clip, tmp_path):
    clip_folder(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "size": [16, 16],
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load_clip(f"local-dir:{tmp_path}", "", "teacher.").fingerprint == clip.fingerprint
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load_clip(f"local-dir:{tmp_path}", "", "teacher.").fingerprint != clip.fingerprint


def archive(path, architecture: str) -> dict[str, torch.Tensor]:
    """Writes a CLIP as OpenAI does: a program in fp16, its three constants among the weights. Gives
    these weights in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        built = open_clip.create_model(architecture).eval().half().requires_grad_(False)
    state = {key: value.float() for key, value in built.state_dict().items()}
    mask = built.attn_mask
    del built.attn_mask, built.context_length, built.vocab_size
    built.attn_mask = mask  # no buffer, which a program would store among the weights
    for constant, value in {
        "input_resolution": 16,
        "context_length": 32,
        "vocab_size": 514,
    }.items():
        built.register_buffer(constant, torch.tensor(value))
    inputs = torch.zeros(1, 3, 16, 16).half(), torch.zeros(1, 32, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us trace no more
        torch.jit.save(torch.jit.trace(built, inputs, check_trace=False), path)
    return state


@pytest.fixture(scope="module")
def openai(models):
    """An archive of `tiny-vit-quickgelu`, and its weights."""
    for name, model in {
        "tiny-vit-quickgelu": {**MODEL, "quick_gelu": True},
        "tiny-wide-quickgelu": {
            **MODEL,
            "quick_gelu": True,
            "vision_cfg": {**MODEL["vision_cfg"], "width": 24},
        },
    }.items():
        register(models, name, model)
    return models / "openai.pt", archive(models / "openai.pt", "tiny-vit-quickgelu")


def test_an_archive_of_openai_loads_like_the_same_weights(openai, images, tmp_path):
    path, state = openai
    assert is_archive(path)
    assert {"input_resolution", "context_length", "vocab_size"} < torch.jit.load(
        path
    ).state_dict().keys()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    assert not is_archive(tmp_path / "w.pt") and not is_archive(tmp_path / "w.safetensors")
    one = load_clip("tiny-vit-quickgelu", str(path), "teacher.")
    tokens = torch.randint(0, 514, (2, 32))
    for file in ("w.safetensors", "w.pt"):
        other = load_clip("tiny-vit-quickgelu", str(tmp_path / file), "teacher.")
        assert one.fingerprint == other.fingerprint
        assert torch.equal(one.image(images), other.image(images))
        assert torch.equal(one.text(tokens), other.text(tokens))
    assert one.image.dtype == torch.float32
    plain = load_clip("tiny-vit", str(tmp_path / "w.safetensors"), "teacher.")
    assert (plain.image(images) - one.image(images)).abs().max() > 1e-4  # by the other GELU


class Evil(torch.nn.Module):
    """Its program writes a file while it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.path, self.training = state[1], state[2]
        self.weight = state[0] + torch.from_file(self.path, True, 8).fill_(7)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_the_program_of_an_archive_is_not_run(openai, tmp_path):
    torch.jit.script(Evil(str(tmp_path / "written"))).save(str(tmp_path / "evil.pt"))
    (tmp_path / "written").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"^teacher\.weights: .*evil\.pt is not a checkpoint"):
        load_clip("tiny-vit-quickgelu", str(tmp_path / "evil.pt"), "teacher.")
    assert not (tmp_path / "written").exists()
    torch.jit.load(str(tmp_path / "evil.pt"))
    assert (tmp_path / "written").exists(), "the test has no teeth"


def test_an_archive_of_openai_wants_quickgelu(openai):
    with pytest.raises(UserError, match=r"^teacher\.model: .*: name tiny-vit-quickgelu$"):
        load_clip("tiny-vit", str(openai[0]), "teacher.")


def test_an_archive_of_another_shape_is_refused(openai):
    complaint = r"^teacher\.weights: .*openai\.pt is not a checkpoint of tiny-wide-quickgelu"
    with pytest.raises(UserError, match=complaint):
        load_clip("tiny-wide-quickgelu", str(openai[0]), "teacher.")


def test_a_broken_archive_is_refused(openai, tmp_path):
    """Cut short, or with a member missing."""
    data = openai[0].read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with zipfile.ZipFile(openai[0]) as whole, zipfile.ZipFile(tmp_path / "lean.pt", "w") as lean:
        for name in whole.namelist():
            if not name.endswith("/data.pkl"):
                lean.writestr(name, whole.read(name))
    assert is_archive(tmp_path / "lean.pt")
    for name in ("cut.pt", "lean.pt"):
        with pytest.raises(UserError, match=rf"^teacher\.weights: .*{name} cannot be read"):
            load_clip("tiny-vit-quickgelu", str(tmp_path / name), "teacher.")
