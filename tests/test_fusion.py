import numpy as np
import pytest
import torch

from engine.labels.fusion import fused


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("fusion", ["mean", "confidence"])
def test_it_is_a_mixture_of_probabilities(fusion):
    rng = np.random.default_rng(0)
    logits = [scale * rng.standard_normal((7, 5)) for scale in (1.0, 4.0, 30.0)]
    weights = [1.0, 0.5, 2.0]
    told = [softmax(z) for z in logits]
    shares = np.array(
        [
            w * (p.max(-1) if fusion == "confidence" else np.ones(7))
            for w, p in zip(weights, told, strict=True)
        ]
    )
    shares /= shares.sum(axis=0)
    wanted = sum(s[:, None] * p for s, p in zip(shares, told, strict=True))
    answer = fused([torch.from_numpy(z + 5) for z in logits], weights, fusion)
    np.testing.assert_allclose(softmax(answer.numpy()), wanted, atol=1e-6)


def test_the_sure_one_counts_for_more():
    sure, torn = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    mean, confidence = (
        fused([sure, torn], [1, 1], how).softmax(-1) for how in ("mean", "confidence")
    )
    assert confidence[0, 0] > mean[0, 0] + 0.05


def test_one_teacher_is_itself_and_an_impossible_class_is_no_nan():
    z = torch.tensor([[100.0, -1000.0, 0.0]])
    torch.testing.assert_close(fused([z], [3.0], "confidence").softmax(-1), z.softmax(-1))
    assert torch.isfinite(fused([z, z], [1, 2], "mean")).all()
