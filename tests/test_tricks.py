import copy
import json

import open_clip
import pytest
import torch
from tiny import MODEL
from torch.utils.flop_counter import FlopCounterMode

from engine.clip.layers import Tricks
from engine.clip.towers import ImageTower

NONE = Tricks(*[False] * len(Tricks._fields))
LAYERS, WIDTH, TOKENS, PROMPTS, IMAGES = 3, 16, 5, 2, 4


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def tower(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tricks")
    model = copy.deepcopy(MODEL) | {"quick_gelu": request.param}
    del model["text_cfg"]["tokenizer_kwargs"]
    name = f"tiny-tricks-{request.param}"
    (folder / f"{name}.json").write_text(json.dumps(model))
    open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        visual = open_clip.create_model(name, load_weights=False).visual
        for parameter in visual.parameters():  # biases and norms that do something
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert len(visual.transformer.resblocks) == LAYERS and visual.conv1.out_channels == WIDTH
    return ImageTower(visual, (0.5, 0.4, 0.3), (0.3, 0.2, 0.25))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (IMAGES, 3, 16, 16), dtype=torch.uint8, generator=generator)


def prompts(depth: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(depth)
    told = torch.randn(depth, PROMPTS, WIDTH, generator=generator)
    return told.requires_grad_() if depth else None


def answer(tower, tricks, images, prompts_KPC):
    """Features, and the gradient of prompts of a function of them."""
    tower.tricks = tricks
    features = tower(images, prompts_KPC)
    if prompts_KPC is None:
        return features, None
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    return features.detach(), torch.autograd.grad((weights * features).sum(), prompts_KPC)[0]


@pytest.mark.parametrize("depth", range(LAYERS + 1))
@pytest.mark.parametrize("off", [*Tricks._fields, "all"])
def test_a_trick_changes_nothing(tower, images, off, depth):
    without = NONE if off == "all" else Tricks()._replace(**{off: False})
    told = prompts(depth)
    features, gradient = answer(tower, Tricks(), images, told)
    plain_features, plain_gradient = answer(tower, without, images, told)
    torch.testing.assert_close(features, plain_features, rtol=1e-5, atol=1e-5)
    if depth:
        assert plain_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-4, atol=1e-5)


def flops(tower, tricks, images, told) -> int:
    tower.tricks = tricks
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(images, told)
    return counter.get_total_flops()


def layer(queries: int, keys: int) -> int:
    """Multiplications and additions of a layer of an image: the linear maps and attention."""
    linear = 2 * WIDTH * WIDTH * (2 * keys + queries * (1 + 1 + 2 * 4))
    return linear + 2 * 2 * queries * keys * WIDTH


def test_what_nobody_reads_is_not_computed(tower, images):
    counted = {
        tricks: flops(tower, tricks, images, None)
        for tricks in (NONE, NONE._replace(class_token=True))
    }
    saved = layer(TOKENS, TOKENS) - layer(1, TOKENS)
    assert counted[NONE] - counted[NONE._replace(class_token=True)] == IMAGES * saved


def test_prompts_that_are_replaced_cost_their_keys_and_values_once(tower, images):
    told = prompts(LAYERS).detach()
    plain = flops(tower, NONE, images, told)
    once = flops(tower, NONE._replace(prompts_once=True), images, told)
    keys_values = 2 * WIDTH * WIDTH * 2 * PROMPTS
    each = layer(TOKENS + PROMPTS, TOKENS + PROMPTS)
    left = layer(TOKENS, TOKENS + PROMPTS) - keys_values
    assert plain - once == LAYERS * (IMAGES * (each - left) - keys_values)


def saved_bytes(tower, tricks, images, told) -> int:
    """What forward keeps for backward, weights apart."""
    tower.tricks = tricks
    weights = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = tower(images, told)
    assert features.requires_grad
    return sum(kept.values())


def test_frozen_linear_maps_keep_no_inputs(tower, images):
    """Their weights have no gradient. So what a layer keeps of a token, in widths: the inputs of
    two norms (2), queries, keys, values and what attention gives (4), and GELU's input (4; as
    much again for QuickGELU, the sigmoid's)."""
    kept = saved_bytes(tower, Tricks(), images, prompts(1))
    widths = 10 if isinstance(tower.blocks[0].mlp.gelu, torch.nn.GELU) else 14
    tokens = IMAGES * (TOKENS + PROMPTS) * WIDTH * 4
    statistics = 2 * 2 * IMAGES * (TOKENS + PROMPTS) * 4 + 64 * IMAGES * (TOKENS + PROMPTS)
    assert kept <= LAYERS * (widths * tokens + statistics)
