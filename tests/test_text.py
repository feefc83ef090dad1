"""The text tower: open_clip's features, and prompts in its layers."""

import open_clip
import pytest
import torch
from tiny import clip_folder

from engine.clip.towers import load_clip
from engine.config import UserError

SENTENCES = ["cat", "a dog", "a photo of a bird"]
KINDS = {  # of text towers: whether in a CustomTextCLIP, and their settings
    "clip": (False, {}),
    "custom": (True, {}),
    "both ways": (True, {"no_causal_mask": True}),
    "last token": (True, {"pool_type": "last"}),
    "marked end": (True, {"pool_type": "eos", "eos_id": 513}),
    "linear": (True, {"proj_type": "linear", "proj_bias": True}),
    "no projection": (True, {"proj_type": "none"}),
    "another GELU": (False, {"act_kwargs": {"approximate": "tanh"}}),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A CLIP with a text tower of three layers, and open_clip's own of the same weights."""
    custom, text = KINDS[request.param]
    folder = tmp_path_factory.mktemp("clip")
    model = clip_folder(folder, text={"layers": 3, **text}, custom_text=custom)
    return load_clip(model, "", "teacher."), open_clip.create_model(model).eval()


def by_hand(built, tokens, prompts):
    """PromptSRC's rule for one sentence, a layer at a time, before pooling."""
    text = built.text if hasattr(built, "text") else built
    words, count = len(tokens), prompts.shape[1]
    mask = torch.full((words, words), float("-inf")).triu(1)
    x = text.token_embedding.weight[tokens]
    x = torch.cat([x[:1], prompts[0], x[1 + count :]]) + text.positional_embedding
    for layer, block in enumerate(text.transformer.resblocks):
        if 0 < layer < len(prompts):
            x = torch.cat([x[:1], prompts[layer], x[1 + count :]])
        x = block(x[None], attn_mask=None if text.attn_mask is None else mask)[0]
    return text.ln_final(x)


@torch.no_grad()
def test_features_are_those_of_open_clip(pair):
    clip, built = pair
    tokens = clip.tokenizer(SENTENCES)
    features = clip.text(tokens)
    torch.testing.assert_close(features, built.encode_text(tokens), rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.01
    assert (clip.text.layers, clip.text.width, clip.text.context_length) == (3, 8, 32)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("custom", [False, True])
def test_prompts_follow_the_rule_of_promptsrc(tmp_path, depth, custom):
    model = clip_folder(tmp_path, text={"layers": 3}, custom_text=custom)
    clip, built = load_clip(model, "", "teacher."), open_clip.create_model(model).eval()
    prompts = torch.randn(depth, 2, 8, generator=torch.Generator().manual_seed(depth))
    tokens = clip.tokenizer(SENTENCES)
    projection = built.text.text_projection if custom else built.text_projection
    ends = tokens.argmax(dim=1)
    wanted = torch.stack(
        [
            by_hand(built, row, prompts)[end] @ projection
            for row, end in zip(tokens, ends, strict=True)
        ]
    )
    features = clip.text(tokens, prompts)
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)
    assert (features - clip.text(tokens)).abs().max() > 0.01
    deeper = torch.cat([prompts, torch.randn(1, 2, 8)])[: depth + 1]
    assert depth == 3 or (clip.text(tokens, deeper) - features).abs().max() > 0.01


@torch.no_grad()
def test_prompts_may_be_the_words_they_stand_for(tmp_path):
    clip = load_clip(clip_folder(tmp_path, text={"layers": 2}), "", "teacher.")
    tokens = clip.tokenizer(["ab cat", "ab dog"])
    words = clip.text.token_embedding(tokens[0, 1:3])
    torch.testing.assert_close(clip.text(tokens, words[None]), clip.text(tokens))


def test_only_prompts_have_gradients(tmp_path):
    clip = load_clip(clip_folder(tmp_path, text={"layers": 3}), "", "teacher.")
    half = clip.text.to(torch.bfloat16)
    prompts = torch.randn(3, 2, 8, requires_grad=True)
    features = half(clip.tokenizer(SENTENCES), prompts)
    features.float().square().sum().backward()
    assert features.dtype == torch.bfloat16 and prompts.grad.dtype == torch.float32
    assert (prompts.grad.abs().sum((1, 2)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in half.parameters())


def test_a_text_tower_of_another_kind_is_refused(tmp_path):
    model = clip_folder(tmp_path, text={"embed_cls": True}, custom_text=True)
    with pytest.raises(UserError, match=r"^teacher\.model: .* no text transformer of CLIP's own"):
        load_clip(model, "", "teacher.")
