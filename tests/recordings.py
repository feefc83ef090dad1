"""Labellings and soft targets to record."""

import dataclasses

import numpy as np
import torch
from torch.nn.functional import normalize

from engine.labels.labelling import Labelling
from engine.labels.targets import Form, SoftTargets, Wire, pack

WIDTH, NAMES, SCALE = 12, ("ant", "bee", "cow", "dog", "eel"), 100.0
LABELLING = Labelling(
    teachers=("t" * 64,),
    precisions=("fp32",),
    class_vectors=("w" * 64,),
    weights=(1.0,),
    fusion="mean",
    form="features",
    wire="fp16",
    pixels=(16,),
    seed=3,
    crop_scale=0.08,
    rules=1,
    decoder="turbojpeg",
    corpus="c" * 64,
    block_samples=8,
    class_names=NAMES,
)
W_ND = normalize(torch.randn(len(NAMES), WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)


def labelling(**changes) -> Labelling:
    return dataclasses.replace(LABELLING, **changes)


def values(form: Form, samples: int, seed: int = 0) -> torch.Tensor:
    """What a teacher says: unit features, or logits less the largest."""
    dice = torch.Generator().manual_seed(seed)
    u_nD = normalize(torch.randn(samples, WIDTH, generator=dice), dim=-1)
    z_nN = SCALE * u_nD @ W_ND.T
    return u_nD if form == "features" else z_nN - z_nN.amax(dim=-1, keepdim=True)


def targets(made: Labelling, samples: int, seed: int = 0, invalid: int = 0) -> SoftTargets:
    """Soft targets of some samples, the first of which are not valid."""
    form: Form = "logits" if made.form == "logits" else "features"
    wire: Wire = "int8" if made.wire == "int8" else "fp16"
    valid = np.arange(samples) >= invalid
    return pack(form, values(form, samples, seed), valid, made.fingerprint, wire, W_ND, SCALE)


def rows(whole: SoftTargets, which: np.ndarray) -> SoftTargets:
    steps = None if whole.steps is None else whole.steps[which]
    return whole._replace(values=whole.values[which], steps=steps, valid=whole.valid[which])


def assert_same(got: SoftTargets | None, wanted: SoftTargets) -> None:
    assert got is not None and got.form == wanted.form and got.fingerprint == wanted.fingerprint
    assert got.values.dtype == wanted.values.dtype and np.array_equal(got.values, wanted.values)
    assert np.array_equal(got.valid, wanted.valid)
    assert (got.steps is None) == (wanted.steps is None)
    assert got.steps is None or np.array_equal(got.steps, wanted.steps)
