import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from engine.labels.targets import exact, fewer_bytes, finite, pack, shifted, unpack
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


def sent(u_nD, w_ND, wire="fp16", valid_n=None):
    form = fewer_bytes(w_ND)
    values = u_nD if form == "features" else shifted(logits(u_nD, w_ND, SCALE))
    valid_n = np.ones(len(u_nD), bool) if valid_n is None else valid_n
    return pack(form, values, valid_n, "who", wire, w_ND, SCALE)


def through(u_nD, w_ND, wire="fp16"):
    """Logits after a way over the wire, and what went over it."""
    targets = sent(u_nD, w_ND, wire)
    return unpack(targets.form, torch.from_numpy(exact(targets)), w_ND, SCALE), targets


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
    targets = sent(u_nD, w_ND, valid_n=valid)
    assert np.array_equal(targets.valid, valid) and targets.fingerprint == "who"


def test_int8_is_half_as_large_and_says_what_it_loses(case):
    u_nD, w_ND = case
    unpacked, targets = through(u_nD, w_ND, "int8")
    whole = sent(u_nD, w_ND)
    assert targets.values.dtype == np.int8 and targets.bytes == whole.bytes // 2 + 4 * 40
    lost = kl_divergence(logits(u_nD, w_ND, SCALE), unpacked).mean().item()
    assert targets.lost_kl == pytest.approx(lost, rel=0.05, abs=1e-6)
    assert (
        -1e-9 < lost < 0.02 and whole.lost_kl == 0
    )  # of one-hot answers it is 0, but for rounding
    step = np.abs(exact(whole).astype(np.float32)).max(axis=1) / 127
    error = np.abs(exact(targets).astype(np.float32) - exact(whole))
    assert (error <= 0.51 * step[:, None] + 2e-3 * np.abs(exact(whole))).all()


def test_what_int8_loses_is_told_of_the_valid_rows(case):
    u_nD, w_ND = case
    spoilt = u_nD.clone()
    spoilt[7] = torch.nan
    valid = np.arange(40) != 7
    assert sent(spoilt, w_ND, "int8", valid).lost_kl == pytest.approx(
        sent(u_nD[torch.from_numpy(valid)], w_ND, "int8").lost_kl, rel=1e-4
    )


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_numbers_that_are_none_are_found_in_valid_rows(case, wire):
    u_nD, w_ND = case
    for broken in (torch.nan, torch.inf):
        spoilt = u_nD.clone()
        spoilt[7, 3] = broken
        assert not finite(sent(spoilt, w_ND, wire))
        assert finite(sent(spoilt, w_ND, wire, np.arange(40) != 7))
