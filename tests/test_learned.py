"""Learned prompts: our files, and the checkpoints of the reference's PromptSRC and MaPLe."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tiny import clip_folder

from engine.clip.class_vectors import encode_classes, own_templates
from engine.clip.learned import LearnedPrompts, read_prompts
from engine.clip.towers import load_clip
from engine.config import UserError

LAYERS, TEXT, VISION = 1, 8, 16  # of the tiny CLIP; its text tower has one layer
FIELD = "teacher.prompts"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(model):
    return load_clip(model, "", "teacher.")


def promptsrc(text_layers: int = 1, vision_layers: int = 3, seed: int = 0) -> dict:
    """A teacher's prompts by the reference's names."""
    draw = torch.Generator().manual_seed(seed)
    state = {
        "prompt_learner.ctx": torch.randn(4, TEXT, generator=draw),
        "image_encoder.VPT": torch.randn(4, VISION, generator=draw),
        "prompt_learner.token_prefix": torch.randn(5, 1, TEXT),
        "prompt_learner.token_suffix2": torch.randn(5, 11, TEXT),
    }
    for tower, layers, width in (
        ("text_encoder", text_layers, TEXT),
        ("image_encoder", vision_layers, VISION),
    ):
        for i in range(1, layers):
            key = f"{tower}.transformer.resblocks.{i}.VPT_shallow"
            state[key] = torch.randn(4, width, generator=draw)
    return state


def with_backbone(model: str, state: dict) -> dict:
    """With the copy of CLIP that the reference saves along."""
    from safetensors.torch import load_file

    own = load_file(Path(model.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    named = {}
    for key, tensor in own.items():
        if key.startswith("visual."):
            named[f"image_encoder.{key.removeprefix('visual.')}"] = tensor
            named[f"prompt_learner.ZS_image_encoder.{key.removeprefix('visual.')}"] = tensor
        elif key == "logit_scale":
            named[key] = tensor
        elif key != "token_embedding.weight":
            named[f"text_encoder.{key}"] = tensor
    return state | named


def saved(path: Path, state: dict) -> str:
    """As Dassl saves: with the optimizer, and a warm-up scheduler that holds another scheduler."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    param.sum().backward()
    optimizer.step()
    after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    scheduler = {"successor": after, "last_epoch": 20, "seen": defaultdict(dict)}
    told = {"optimizer": optimizer.state_dict(), "scheduler": scheduler, "epoch": 20}
    torch.save({"state_dict": state, "val_result": 81.5, **told}, path)
    return str(path)


def test_round_trip(tmp_path):
    prompts = LearnedPrompts(torch.randn(2, 4, 8), torch.randn(3, 4, 16), "a", "maple", "b" * 64)
    prompts.save(tmp_path / "p.safetensors")
    again, backbone = read_prompts(tmp_path / "p.safetensors", FIELD)
    assert torch.equal(again.text_KPC, prompts.text_KPC) and backbone == {}
    assert torch.equal(again.vision_KPC, prompts.vision_KPC)
    assert (again.words, again.method, again.backbone) == ("a", "maple", "b" * 64)
    assert again.digest == prompts.digest and again.template == "a {}."


def test_reference_checkpoint_of_promptsrc(model, clip, tmp_path):
    state = promptsrc()
    whole = with_backbone(model, state)
    alone = load_clip(model, "", "teacher.", saved(tmp_path / "alone.pth.tar", state))
    teacher = load_clip(model, "", "teacher.", saved(tmp_path / "model.pth.tar-20", whole))
    assert teacher.fingerprint == alone.fingerprint != clip.fingerprint == teacher.backbone
    assert torch.equal(teacher.prompts.text_KPC[0], state["prompt_learner.ctx"])
    assert teacher.prompts.vision_KPC.shape == (3, 4, VISION)
    names = ("cat", "bird_of_paradise")
    classes = encode_classes(teacher, names, own_templates(teacher, ("no {}",)))
    assert classes.templates == ("a photo of a {}.",) and classes.teacher == teacher.fingerprint
    plain = encode_classes(clip, names, classes.templates)
    assert abs(classes.vectors - plain.vectors).max() > 0.01


def test_rounding_of_the_backbone_is_taken_up(model, clip, tmp_path):
    whole = with_backbone(model, promptsrc())
    whole["image_encoder.proj"] = whole["image_encoder.proj"] * 1.001
    moved = load_clip(model, "", "teacher.", saved(tmp_path / "m.pth.tar", whole))
    assert moved.backbone != clip.backbone
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(moved.image(images), 1.001 * clip.image(images))


def test_maple_makes_its_vision_prompts_by_its_couplers(tmp_path):
    state = {
        "prompt_learner.ctx": torch.randn(2, TEXT),
        "prompt_learner.proj.weight": torch.randn(VISION, TEXT),
        "prompt_learner.proj.bias": torch.randn(VISION),
        "prompt_learner.compound_prompts_text.0": torch.randn(2, TEXT),
        "prompt_learner.compound_prompt_projections.0.weight": torch.randn(VISION, TEXT),
        "prompt_learner.compound_prompt_projections.0.bias": torch.randn(VISION),
    }
    prompts, _ = read_prompts(Path(saved(tmp_path / "maple.pth.tar-5", state)), FIELD)
    assert prompts.method == "maple" and prompts.text_KPC.shape == (2, 2, TEXT)
    for layer, coupler in enumerate(("proj", "compound_prompt_projections.0")):
        weight, bias = (state[f"prompt_learner.{coupler}.{part}"] for part in ("weight", "bias"))
        wanted = prompts.text_KPC[layer] @ weight.T + bias
        torch.testing.assert_close(prompts.vision_KPC[layer], wanted)
    del state["prompt_learner.compound_prompt_projections.0.bias"]
    with pytest.raises(UserError, match=r"lacks prompt_learner\.compound_prompt_projections\.0\.b"):
        read_prompts(Path(saved(tmp_path / "maple.pth.tar-5", state)), FIELD)


def change(state: dict, **changes) -> dict:
    told = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in (state | told).items() if value is not None}


STRANGE = {
    "a long context": (
        lambda s: change(s, prompt_learner__ctx=torch.zeros(6, TEXT)),
        "a context of 6 tokens has not started from 'a photo of a'",
    ),
    "another width": (
        lambda s: (
            change(s, image_encoder__VPT=torch.zeros(4, 24))
            | promptsrc(1, 1)
            | {"image_encoder.VPT": torch.zeros(4, 24)}
        ),
        "prompts differ in shape|another backbone: its image prompts are 24 wide",
    ),
    "too deep": (lambda s: promptsrc(2, 3), "another backbone: its text prompts .* in 2 layers"),
    "a hole": (
        lambda s: change(s, image_encoder__transformer__resblocks__1__VPT_shallow=None),
        "lacks prompts of layer 1",
    ),
    "no image prompts": (lambda s: change(s, image_encoder__VPT=None), "lacks prompts of layer 0"),
    "no context": (lambda s: change(s, prompt_learner__ctx=None), "lacks prompt_learner.ctx"),
    "a nan": (
        lambda s: change(s, image_encoder__VPT=torch.full((4, VISION), torch.nan)),
        "vision holds numbers that are not finite",
    ),
    "something else": (lambda s: s | {"meta_net.weight": torch.zeros(2)}, "holds meta_net.weight"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_checkpoints_are_refused(model, tmp_path, case):
    make, complaint = STRANGE[case]
    file = saved(tmp_path / "strange.pth.tar", make(promptsrc()))
    with pytest.raises(UserError, match=rf"^teacher\.prompts: .*strange\.pth\.tar.*({complaint})"):
        load_clip(model, "", "teacher.", file)


def test_prompts_of_another_backbone_are_refused(model, clip, tmp_path):
    """Of the same shape: told by the weights that came along, or by the fingerprint."""
    other = clip_folder(tmp_path / "other", seed=1)
    whole = with_backbone(other, promptsrc())
    with pytest.raises(UserError, match=r"another backbone: its .* is a different one"):
        load_clip(model, "", "teacher.", saved(tmp_path / "m.pth.tar", whole))
    whole.pop("image_encoder.proj")
    with pytest.raises(UserError, match=r"another backbone: it lacks visual\.proj"):
        load_clip(other, "", "teacher.", saved(tmp_path / "m.pth.tar", whole))
    text, vision = torch.zeros(1, 4, TEXT), torch.zeros(1, 4, VISION)
    LearnedPrompts(text, vision, backbone=clip.backbone).save(tmp_path / "own.safetensors")
    assert load_clip(model, "", "teacher.", str(tmp_path / "own.safetensors")).prompts
    with pytest.raises(UserError, match=r"another backbone: it was trained in "):
        load_clip(other, "", "teacher.", str(tmp_path / "own.safetensors"))


@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pth.tar-20", "absent.safetensors"])
def test_files_that_hold_no_prompts_are_refused(tmp_path, name):
    if "junk" in name:
        (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UserError, match=rf"^teacher\.prompts: .*{name}"):
        read_prompts(tmp_path / name, FIELD)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": promptsrc(), "bomb": Bomb()}, tmp_path / "bomb.pth.tar")
    with pytest.raises(UserError, match=r"cannot be read as weights"):
        read_prompts(tmp_path / "bomb.pth.tar", FIELD)
    assert not (tmp_path / "exploded").exists()
