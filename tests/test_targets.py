import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from engine.labels.targets import pack, unpack
from kernels.reference import kl_divergence, logits

SCALE = 100.0


def near(w_ND: torch.Tensor, rows: int) -> torch.Tensor:
    """Unit features like a CLIP's: close to some class vector, and at odds with others."""
    noise = torch.randn(rows, w_ND.shape[1])
    return normalize(w_ND[torch.arange(rows) % len(w_ND)] + 0.6 * normalize(noise, dim=-1), dim=-1)


@pytest.fixture(params=[(5, 64), (64, 64), (300, 64)], ids=["N<D", "N=D", "N>D"])
def case(request):
    torch.manual_seed(0)
    w_ND = normalize(torch.randn(*request.param), dim=-1)
    return near(w_ND, 40), w_ND


def through(u_nD, w_ND):
    """Logits after a way over the wire, and what went over it."""
    targets = pack(u_nD, np.ones(len(u_nD), bool), w_ND, SCALE, "f")
    return unpack(targets.form, torch.from_numpy(targets.values), w_ND, SCALE), targets


def test_the_smaller_form_is_taken(case):
    u_nD, w_ND = case
    _, targets = through(u_nD, w_ND)
    assert targets.form == ("logits" if len(w_ND) < 64 else "features")
    assert targets.values.dtype == np.float16
    assert targets.values.shape == (40, min(w_ND.shape))


def test_softmax_survives_fp16(case):
    u_nD, w_ND = case
    exact = logits(u_nD, w_ND, SCALE)
    unpacked, targets = through(u_nD, w_ND)
    error = (torch.softmax(unpacked, -1) - torch.softmax(exact, -1)).abs().max().item()
    # A logit z <= 0 is off by |z| / 2^11 at most, and e^z |z| by 1/e of that. Features are off by
    # 2^-11 of their length in all, which the scale multiplies.
    bound = 2 * 2**-11 / np.e if targets.form == "logits" else SCALE * 2**-11 / 2
    assert error < bound
    assert kl_divergence(exact, unpacked).max() < bound**2


def test_logits_are_shifted_and_features_are_not(case):
    u_nD, w_ND = case
    unpacked, targets = through(u_nD, w_ND)
    assert unpacked.dtype == torch.float32
    if targets.form == "logits":
        assert (targets.values.max(axis=1) == 0).all()
    else:
        torch.testing.assert_close(unpacked, logits(u_nD, w_ND, SCALE), rtol=0, atol=0.05)


def test_the_rest_is_handed_on(case):
    u_nD, w_ND = case
    valid = np.arange(40) % 3 > 0
    targets = pack(u_nD, valid, w_ND, SCALE, "who")
    assert np.array_equal(targets.valid, valid) and targets.fingerprint == "who"
