"""Kernels of Triton, compiled for a GPU that is not there, and run by an interpreter."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

HERE = Path(__file__).parent
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that such a GPU gives a program
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    int: "i32",
    float: "fp32",
}


def described(parameter: inspect.Parameter, value: object) -> str:
    """The type of an argument, as Triton's compiler spells it."""
    if parameter.annotation is not inspect.Parameter.empty or value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
    return "constexpr" if type(value) is int and value == 1 else TYPES[type(value)]


class Compiling:
    """A kernel whose launch compiles it, for an H100 unless told otherwise, and no more."""

    def __init__(self, kernel, arch: int = 90):
        self.kernel, self.arch, self.made = kernel, arch, []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, enable_fp_fusion=True, **others):
        signature = inspect.signature(self.kernel.fn)
        given = signature.bind(*args, **others).arguments
        types = {name: described(signature.parameters[name], given[name]) for name in given}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, (name, value) in enumerate(given.items())
            if types[name][0] == "*" or (types[name] == "i32" and value % 16 == 0)
        }
        constants = {name: given[name] for name in given if types[name] == "constexpr"}
        options = {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": enable_fp_fusion,
        }
        source = ASTSource(self.kernel, types, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        assert made.metadata.shared <= SHARED[self.arch] and "cubin" in made.asm
        self.made.append(made)


def run_cases(file: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on a file of this folder, in a process of its own: on the GPU, or where there is
    none in Triton's interpreter, which is chosen when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | how | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
