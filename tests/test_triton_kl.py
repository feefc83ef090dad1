"""Triton's KL: compiled for an H100, which takes none, and run: natively where there is a GPU, else
by Triton's interpreter, in its own process, as Triton heeds TRITON_INTERPRET when imported."""

import pytest
import torch
from compiling import Compiling, run_cases

from kernels import triton_kl, triton_pass, triton_rows

KERNELS = {
    triton_pass: ["_pass"],
    triton_kl: ["_finish_features", "_finish_given", "_finish_expected"],
    triton_rows: ["_rows", "_rows_of_top"],
}


@pytest.mark.parametrize(
    ("B", "N", "D", "dtype"),
    [
        (1024, 21841, 768, torch.float16),
        (1024, 21841, 768, torch.float32),
        (1, 1000, 64, torch.float16),
    ],
)
def test_every_kernel_compiles_for_an_h100(B, N, D, dtype, monkeypatch):
    """The interpreter takes more than the compiler does."""
    monkeypatch.setattr(triton_pass, "_multiprocessors", lambda x: 132)
    monkeypatch.setattr(triton_rows, "_product", lambda a, b: torch.empty(len(a), b.shape[1]))
    monkeypatch.setattr(triton_rows, "_add_product", lambda *told: None)
    kernels = [(module, name) for module, names in KERNELS.items() for name in names]
    for module, name in kernels:
        monkeypatch.setattr(module, name, Compiling(getattr(module, name)))
    x_BD, w_ND = (torch.ones(rows, D, dtype=dtype) for rows in (B, N))
    weight_B, o_BD = torch.ones(B), torch.ones(B, D)
    classes_BK = torch.zeros(B, 5, dtype=torch.int64)
    z_BN = torch.empty(1, N, dtype=dtype).expand(B, N)
    weigh, bare = (w_ND, weight_B, o_BD, 100.0), (w_ND, None, None, 100.0)
    triton_kl.features_by_pass(x_BD, x_BD, *weigh, 100.0, 1.0, True)
    triton_kl.features_by_pass(x_BD, x_BD, *bare, 100.0, 1.0, False)
    triton_kl.features_by_products(x_BD, x_BD, *weigh, 100.0, 1.0, True)
    triton_kl.dense(x_BD, z_BN, *bare, 100.0, 1.0, False)
    triton_kl.top(x_BD, classes_BK.to(dtype), classes_BK, weight_B, *weigh, 1.0, True)
    triton_kl.given(x_BD, o_BD, weight_B, weight_B, *weigh, 1.0, True)
    triton_kl.expected(x_BD, w_ND, 100.0)
    for module, name in kernels:
        assert getattr(module, name).made


def test_every_case_of_triton():
    told = run_cases("triton_cases.py")
    assert told.returncode == 0, told.stdout + told.stderr
