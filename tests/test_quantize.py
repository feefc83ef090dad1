"""Rows and products in 8 bits: their definitions against float64, and Triton's kernels against
these; compiled for GPUs, which takes none, and run: natively where there is a GPU, else by Triton's
interpreter, in its own process, as Triton heeds TRITON_INTERPRET when imported."""

import pytest
import torch
from compiling import Compiling, run_cases
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kernels import quantize, triton_quantize
from kernels.quantize import LARGEST, activated, normed, product, quantized

scaled_mm = torch._scaled_mm
KERNELS = ("_quantize", "_norm", "_activate", "_multiply")
KINDS = ("int8", "fp8")


def rows(M: int, K: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=generator)


def allowed(true_MK: torch.Tensor, kind: str) -> torch.Tensor:
    """How far rounding may go: half a step. Of int8 the step is the row's largest / 127; of fp8 it
    is the last of a number's 3 bits, or, below 2^-6, 2^-9. And what fp32 errs by itself."""
    peak_M1 = true_MK.abs().amax(dim=1, keepdim=True)
    scaled_MK = (true_MK * LARGEST[kind] / peak_M1).abs()
    half_MK = (
        torch.full_like(scaled_MK, 0.5)
        if kind == "int8"
        else (scaled_MK * 2.0**-4).clamp(min=2.0**-10)
    )
    return peak_M1 * (half_MK / LARGEST[kind] + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_rounded_by_half_a_step(kind):
    x_MK = rows(9, 70) * 10.0 ** torch.arange(-4, 5)[:, None]
    x_MK[3, 5] = 1e4  # beside which the others are small
    x_MK, weight_K, bias_K = x_MK, rows(1, 70, 1)[0], rows(1, 70, 2)[0]
    wide = x_MK.double()
    norm = F.layer_norm(wide, (70,), weight_K.double(), bias_K.double(), 1e-5)
    for ours, true in (
        (quantized(x_MK, kind), wide),
        (normed(x_MK, weight_K, bias_K, 1e-5, kind), norm),
        (activated(x_MK, "gelu", kind), F.gelu(wide)),
        (activated(x_MK, "quick_gelu", kind), wide * torch.sigmoid(1.702 * wide)),
    ):
        assert ours.values_MK.dtype == quantize.TYPES[kind]
        assert ((ours.wide().double() - true).abs() <= allowed(true, kind)).all()
        largest_M = ours.values_MK.double().abs().amax(dim=1)
        assert (largest_M == LARGEST[kind]).all()  # all of the range is used


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_as_near_as_its_rows_and_weights(kind):
    """|xw - x'w'| <= |x - x'| |w| + |x'| |w - w'|, channel by channel, whatever their sizes."""
    x_MK = rows(6, 96)
    weight_NK = rows(40, 96, 1) * 10.0 ** torch.linspace(-4, 2, 40)[:, None]
    bias_N = rows(1, 40, 2)[0]
    told = quantized(x_MK, kind), quantized(weight_NK, kind)
    y_MN = product(*told, bias_N)
    x, w = x_MK.double(), weight_NK.double()
    most = allowed(x, kind) @ w.abs().T + (x.abs() + allowed(x, kind)) @ allowed(w, kind).T
    error = (y_MN.double() - (x @ w.T + bias_N.double())).abs()
    assert (error <= most + 1e-6 * bias_N.abs()).all()
    without = error / (x.norm(dim=1)[:, None] * w.norm(dim=1))
    assert without.amax(0).max() < 0.02  # small channels are as good as large ones


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_row_is_0_and_small_ones_are_kept(kind):
    x_MK = torch.stack([torch.zeros(16), torch.full((16,), 1e-20), torch.full((16,), 3e-38)])
    values_MK, scale_M = told = quantized(x_MK, kind)
    assert not values_MK[[0, 2]].float().any() and scale_M.isfinite().all()
    torch.testing.assert_close(told.wide()[1], x_MK[1])
    weight = quantized(torch.eye(16), kind)
    assert torch.equal(product(told, weight, torch.ones(16))[0], torch.ones(16))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_no_finite_number_is_made_of_one_that_is_not(kind, spoilt):
    x_MK, weight_NK = rows(4, 48), rows(24, 48, 1)
    clean = quantized(x_MK, kind), quantized(weight_NK, kind)
    whole_MN = product(*clean, torch.zeros(24))
    x_MK[2, 5] = weight_NK[7, 1] = spoilt
    y_MN = product(quantized(x_MK, kind), quantized(weight_NK, kind), torch.zeros(24))
    assert y_MN[2].isnan().all() and y_MN[:, 7].isnan().all()
    kept_M, kept_N = torch.arange(4) != 2, torch.arange(24) != 7
    assert torch.equal(y_MN[kept_M][:, kept_N], whole_MN[kept_M][:, kept_N])
    for told in (normed(x_MK, torch.ones(48), torch.ones(48), 1e-5, kind), quantized(x_MK, kind)):
        assert told.scale_M.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_operations_can_be_compiled(kind):
    """What torch.compile is told of them is true, whatever the number of rows."""
    x_MK, weight = rows(6, 32), quantized(rows(16, 32, 1), kind)
    bias_N = torch.ones(16, dtype=torch.bfloat16)
    flags = ("test_faketensor", "test_schema")[: 2 if kind == "int8" else 1]  # it compares values
    check = torch.library.opcheck
    check(quantize._quantized, (x_MK, kind), test_utils=flags)
    check(quantize._normed, (x_MK, x_MK[0], x_MK[1], 1e-5, kind), test_utils=flags)
    check(quantize._activated, (x_MK, "gelu", kind), test_utils=flags)
    check(quantize._product, (*quantized(x_MK, kind), *weight, bias_N), test_utils=flags)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_takes_what_hopper_is_asked(dtype, monkeypatch):
    """Layouts, sizes and scales, as torch checks them of GPU tensors that are none: of tokens, of
    prompts, of one image, and of a part of the weights."""
    monkeypatch.setattr(quantize, "hopper", lambda device: True)
    asked = []
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *told, **how: asked.append(how) or scaled_mm(*told, **how)
    )
    with FakeTensorMode():
        for M, K, N in ((65792, 1024, 3072), (256, 4096, 1024), (4, 1024, 2048), (1, 64, 64)):
            x_MK = torch.empty(M, K, device="cuda").to(torch.float8_e4m3fn)
            weight_NK = torch.empty(2 * N, K, device="cuda").to(torch.float8_e4m3fn)[N:]
            scale_M, scale_N = (torch.empty(n, device="cuda") for n in (M, 2 * N))
            bias_N = torch.empty(2 * N, dtype=dtype, device="cuda")[N:]
            y_MN = quantize._product._init_fn(x_MK, scale_M, weight_NK, scale_N[N:], bias_N)
            assert y_MN.shape == (M, N) and y_MN.dtype == dtype
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("arch", "kind"),
    [(80, "int8"), (89, "fp8"), (90, "int8"), (90, "fp8")],
)
def test_every_kernel_compiles_for_a_gpu(arch, kind, monkeypatch):
    """The interpreter takes more than the compiler does. In tiles of every size."""
    monkeypatch.setattr(triton_quantize, "hopper", lambda device: arch == 90)
    for name in KERNELS:
        kernel = Compiling(getattr(triton_quantize, name), arch)
        monkeypatch.setattr(triton_quantize, name, kernel)
    for M, K in ((1024, 1024), (4, 100)):
        x_MK, row_K = torch.ones(M, K, dtype=torch.float16), torch.ones(K, dtype=torch.float16)
        told = triton_quantize.quantized(x_MK, kind)
        triton_quantize.normed(x_MK, row_K, row_K, 1e-5, kind)
        triton_quantize.activated(x_MK, "gelu", kind)
        triton_quantize.activated(x_MK, "quick_gelu", kind)
        weight = torch.empty(64, K, dtype=quantize.TYPES[kind]), torch.empty(64)
        triton_quantize.product(*told, *weight, row_K[:1].expand(64))
    for name in KERNELS:
        assert len(getattr(triton_quantize, name).made) >= 2
    ptx = triton_quantize._multiply.made[0].asm["ptx"]
    assert "s32.s8.s8" in ptx if kind == "int8" else "e4m3.e4m3" in ptx  # of the matrix units


def test_every_case_of_triton():
    told = run_cases("quantize_cases.py")
    assert told.returncode == 0, told.stdout + told.stderr
