"""A path is tried before a run trusts it."""

import pytest
import torch
from torch.nn import functional as F

from engine.config import UserError
from engine.train.worker import _kernels
from kernels import torch_kl
from kernels.trial import trial


def class_vectors(classes: int = 200) -> torch.Tensor:
    w = torch.randn(classes, 32, generator=torch.Generator().manual_seed(1))
    return F.normalize(w, dim=-1)


@pytest.mark.parametrize("classes", [2, 200])
def test_a_path_that_works(classes):
    for impl in ("torch", "reference", "auto"):
        assert trial(class_vectors(classes), impl) == ""


def test_tries_what_a_run_may_come_to(monkeypatch):
    """Triton goes another way with few images, and a teacher may tell features or logits."""
    told = []
    for name in ("features", "dense"):
        right = getattr(torch_kl, name)

        def heard(*args, name=name, right=right):
            told.append((name, len(args[0]), args[3] is not None))
            return right(*args)

        monkeypatch.setattr(torch_kl, name, heard)
    assert trial(class_vectors(), "torch") == ""
    assert told == [(name, B, True) for B in (64, 65) for name in ("features", "dense")]


def test_a_path_that_fails_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "which is no GPU" in trial(class_vectors(), "triton")
    right = torch_kl.features

    def wrong(*args):
        kl_B, dx_BD, *tops = right(*args)
        return kl_B, 1.1 * dx_BD, *tops

    monkeypatch.setattr(torch_kl, "features", wrong)
    assert trial(class_vectors(), "torch") == "its gradient is off by 0.1 of the largest"

    def broken(*args):
        kl_B, *others = right(*args)
        return torch.nan * kl_B, *others

    monkeypatch.setattr(torch_kl, "features", broken)
    assert trial(class_vectors(), "torch").startswith("its KL is off by nan")


def test_what_was_asked_for_is_had_or_refused(monkeypatch, capsys):
    w = class_vectors()
    assert _kernels("reference", w) == "reference"
    assert _kernels("auto", w) == "torch"
    monkeypatch.setattr("engine.train.worker.chosen", lambda *_: "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _kernels("auto", w) == "torch"
    assert "losses by torch, since Triton's kernels fail on cpu" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"train\.kernels: triton fails on cpu"):
        _kernels("triton", w)
