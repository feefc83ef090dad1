"""What Triton's kernels of 8 bits are to give; `test_quantize` runs it."""

import pytest
import torch
import triton.language as tl
from torch import Tensor

from kernels import quantize, triton_quantize
from kernels.quantize import Quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("int8", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 16, 16), (7, 160, 40), (5, 100, 33), (2, 520, 8), (70, 136, 130))  # M, K, N


@pytest.fixture(autouse=True)
def sound_interpreter(monkeypatch):
    """Its casts to fp8 lose a carry (3.9), and it has no device to ask what it is; a GPU needs no
    interpreter."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    broken = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if target != tl.float8e4nv:
            return broken(values, source, target, rounding_mode)
        assert source == tl.float32
        told = torch.from_numpy(values.copy()).to(torch.float8_e4m3fn)
        return told.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(triton_quantize, "hopper", lambda device: True)


def rows(M: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of very different lengths; the first is 0, the second has an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(M, K, generator=generator) * 10.0 ** (torch.arange(M) % 4 - 2)[:, None]
    x_MK[0] = 0
    x_MK[1:2, K // 2] = 30
    return x_MK.to(DEVICE, dtype)


def same(ours: tuple[Tensor, Tensor], definition: tuple[Tensor, Tensor], kind: str) -> None:
    """But for numbers halfway between two, whose rounding the last bit of a division decides."""
    (values, scale), (true, true_scale) = ours, definition
    assert values.dtype == true.dtype == quantize.TYPES[kind] and scale.dtype == torch.float32
    assert values.shape == true.shape and scale.shape == true_scale.shape
    torch.testing.assert_close(scale, true_scale, rtol=1e-5, atol=0, equal_nan=True)
    steps = as_steps(values, kind) - as_steps(true, kind)
    assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 1e-2


def as_steps(values: Tensor, kind: str) -> Tensor:
    """Numbers that differ by 1 where the values are neighbours."""
    if kind == "int8":
        return values.int()
    bits = values.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def every_way(x_MK: Tensor, kind: str):
    """(by Triton, by definition) of each operation that makes rows in 8 bits."""
    K = x_MK.shape[1]
    norm = rows(2, K, x_MK.dtype, seed=1)[1] + 1, rows(2, K, x_MK.dtype, seed=2)[1], 1e-5
    cpu = x_MK.cpu()
    for name, others in (
        ("quantized", ()),
        ("normed", norm),
        ("activated", ("gelu",)),
        ("activated", ("quick_gelu",)),
    ):
        ours = getattr(triton_quantize, name)(x_MK, *others, kind)
        told = [other.cpu() if isinstance(other, Tensor) else other for other in others]
        yield [t.cpu() for t in ours], getattr(quantize, name)(cpu, *told, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_definition(kind, dtype):
    for M, K, _ in SHAPES:
        for ours, definition in every_way(rows(M, K, dtype), kind):
            same(ours, definition, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_contiguous(kind):
    x_MK = rows(6, 64)
    for strided in (x_MK.T.contiguous().T, torch.cat([x_MK, x_MK], 1)[:, :64]):
        for ours, definition in every_way(strided, kind):
            same(ours, definition, kind)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_no_finite_number_is_made_of_one_that_is_not(kind, spoilt):
    x_MK = rows(4, 48)
    x_MK[2, 5] = spoilt
    weight = quantize.quantized(rows(24, 48, seed=3), kind)
    for ours, definition in every_way(x_MK, kind):
        y_MN = triton_quantize.product(
            *(t.to(DEVICE) for t in ours), *weight, torch.ones(24, device=DEVICE)
        )
        if spoilt == -torch.inf:  # of which GELU is 0, or nan, as the definition has it
            assert torch.equal(ours[1].isnan(), definition[1].isnan())
            continue
        assert ours[1].isnan().tolist() == [False, False, True, False]
        assert y_MN[2].isnan().all() and y_MN[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_rounded_numbers(kind, dtype):
    for M, K, N in SHAPES:
        x = quantize.quantized(rows(M, K), kind)
        weight = quantize.quantized(rows(N, K, seed=4), kind)
        bias_N = rows(2, N, dtype, seed=5)[1]
        y_MN = triton_quantize.product(*x, *weight, bias_N)
        assert y_MN.dtype == dtype
        assert_product(y_MN, x, weight, bias_N)


def assert_product(y_MN: Tensor, x: Quantized, weight: Quantized, bias_N: Tensor) -> None:
    """Sums of int8 are exact; those of fp8 err by K roundings of fp32 at most; then three roundings
    (scales, bias) and that to the dtype of the bias."""
    wide_x, wide_w = (t.values_MK.double() * t.scale_M.double()[:, None] for t in (x, weight))
    true = wide_x @ wide_w.T + bias_N.double()
    most = wide_x.abs() @ wide_w.abs().T + bias_N.double().abs()
    whole = x.values_MK.dtype == torch.int8
    roundings = 8 if whole else 8 + x.values_MK.shape[1]
    allowed = roundings * 2.0**-24 * most + true.abs() * torch.finfo(y_MN.dtype).eps
    assert ((y_MN.double() - true).abs() <= allowed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(kind):
    x_MK = rows(4, 48)[:0]
    for (values, scale), _ in every_way(x_MK, kind):
        assert values.shape == (0, 48) and scale.shape == (0,)
    weight = quantize.quantized(rows(24, 48), kind)
    none = quantize.quantized(x_MK, kind)
    y_MN = triton_quantize.product(*none, *weight, torch.ones(24, device=DEVICE))
    assert y_MN.shape == (0, 24)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_product_in_all_that_a_tower_asks(kind, dtype):
    """fp8 by cuBLAS on Hopper, whose fast accumulation has about 14 bits; of one row and of many,
    and of a part of the weights."""
    for M, K, N in ((1, 1024, 3072), (5, 64, 48), (257, 1024, 3072), (2000, 4096, 1024)):
        x = quantize.quantized(rows(M, K), kind)
        weight = quantize.quantized(rows(N, K, seed=4), kind)
        bias_N = rows(2, N, dtype, seed=5)[1]
        for part in (slice(None), slice(16, None)):
            its = Quantized(*(t[part] for t in weight))
            y_MN = quantize.product(x, its, bias_N[part])
            true = x.wide().double() @ its.wide().double().T + bias_N[part].double()
            most = x.wide().abs() @ its.wide().abs().T
            allowed = 2.0**-10 * most + 2 * true.abs() * torch.finfo(dtype).eps
            assert y_MN.dtype == dtype and ((y_MN.double() - true).abs() <= allowed).all()
    x.values_MK[3] = 0
    x.scale_M[3] = torch.nan
    y_MN = quantize.product(x, weight, bias_N)
    assert y_MN[3].isnan().all() and y_MN[:3].isfinite().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_two_to_the_31_numbers(kind):
    values = torch.zeros(2**31 // 4096 + 200, 4096, device=DEVICE, dtype=torch.float16)
    values[-1] = 1
    x = quantize.quantized(values, kind)
    del values
    weight = quantize.quantized(torch.ones(32, 4096, device=DEVICE), kind)
    y_MN = triton_quantize.product(*x, *weight, torch.zeros(32, device=DEVICE))
    assert not y_MN[:-1].any()
    torch.testing.assert_close(y_MN[-1], torch.full((32,), 4096.0, device=DEVICE))
