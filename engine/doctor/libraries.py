"""Checks of the heavy libraries: each does a little of what a run does with them."""

import glob
import io
import os
import time
from collections.abc import Iterator

from engine.doctor.apart import Finding

__all__ = ["decoding", "deepspeed_", "gpus", "has_gpu", "torch_", "triton_"]

_SIDE = 64  # pixels of the images that are decoded
_OFF = 12.0  # levels of 255, in mean, that decoders may differ by
_FEW_GB = 4.0  # of a GPU's memory that should be free
_SLOWED = 0x08 | 0x40 | 0x80  # NVML's reasons: hardware, its temperature, its power supply


def has_gpu() -> bool:
    """Whether the machine shows an NVIDIA GPU, to whichever library."""
    return bool(glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg"))


def torch_(device: str) -> Iterator[Finding]:
    """torch, and the device that a run would choose; multiplies on each GPU."""
    import torch

    built = f"{torch.__version__}, built for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
        return
    why = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and has_gpu():
        yield Finding(
            "torch",
            "fail" if device == "cuda" else "warn",
            f"{built}; CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
    elif has_gpu() or device == "cuda":
        mend = "install a driver for that CUDA or later (nvidia-smi tells the CUDA it is for)"
        yield Finding(
            "torch",
            "fail",
            f"{built}, cannot use the GPU: {why}",
            mend if has_gpu() else "device = cuda needs an NVIDIA GPU and its driver",
        )
    else:
        from engine.clip.towers import bf16_instructions

        fast = bf16_instructions()
        cores = len(os.sched_getaffinity(0))
        kind = torch.backends.cpu.get_cpu_capability()
        half = f"{fast}: teachers in bf16" if fast else "no bf16: teachers in fp32"
        yield Finding("torch", "ok", f"{torch.__version__}; no GPU: {cores} cores, {kind}, {half}")


def _gpu(index: int) -> Finding:
    import torch

    about = torch.cuda.get_device_properties(index)
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info(index))
    found = (
        f"{torch.__version__}, CUDA {torch.version.cuda}; cuda:{index} {about.name}, capability "
        f"{about.major}.{about.minor}, {free:.1f} of {total:.1f} GB free"
    )
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
        right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:
        mend = "install a torch built for this GPU, and a driver for its CUDA"
        return Finding("torch", "fail", f"{found}: {str(error).partition(chr(10))[0]}", mend)
    if not right:
        return Finding("torch", "fail", f"{found}: it multiplies wrongly", "replace that GPU")
    if free < _FEW_GB:
        mend = "end what else uses it (nvidia-smi lists that), or take another by "
        return Finding("torch", "warn", found, f"{mend}CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("torch", "warn", f"{found}; no bf16", "student.precision = fp16 or fp32")
    return Finding("torch", "ok", found)


def triton_(asked: str) -> Iterator[Finding]:
    """Compiles the loss's kernels and holds what they give against the definitions; `asked` is
    train.kernels."""
    if not has_gpu():
        yield Finding("Triton", "skip", "no GPU: not needed")
        return
    import torch
    from torch.nn import functional as F

    from kernels.trial import trial

    if not torch.cuda.is_available():
        yield Finding("Triton", "skip", "not checked: torch uses no GPU")
        return
    started = time.perf_counter()
    w_ND = F.normalize(torch.randn(200, 64, device="cuda"), dim=-1)
    if why := trial(w_ND, "triton"):
        yield Finding(
            "Triton",
            "fail" if asked == "triton" else "warn",
            why.partition("\n")[0],
            "install gcc and Python's headers (python3-dev), which it compiles with; without it "
            "losses are computed by plain torch",
        )
    else:
        took_s = time.perf_counter() - started
        yield Finding("Triton", "ok", f"compiles and runs the loss's kernels, in {took_s:.0f} s")


def decoding(device: str) -> Iterator[Finding]:
    """Decodes a JPEG, a PNG and a WebP by DALI on the CPU, or by `mixed` on a GPU, and on a CPU a
    JPEG by TurboJPEG; holds them against what Pillow decodes."""
    from importlib.metadata import version

    import numpy as np
    from PIL import Image

    from engine.data.corpus import Sample
    from engine.data.decode import Decoder, jpeg_decoder
    from engine.data.header import read_header
    from engine.data.views import TEST_VIEW, ViewPolicy

    name = "DALI (cpu)" if device == "cpu" else "DALI (mixed)"
    ramp = np.linspace(0, 255, _SIDE, dtype=np.uint8)
    true_SSC = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 255 - ramp[None]), axis=-1)
    samples = []
    for position, kind in enumerate(("jpeg", "jpeg", "png", "webp")):
        file = io.BytesIO()
        Image.fromarray(true_SSC).save(file, kind, quality=95)
        data = memoryview(file.getvalue())
        header = read_header(data)
        header = header._replace(plain=header.plain and position == 0)  # so that DALI has the other
        samples.append(Sample(0, position, data, None, None, header=header))
    decoder = Decoder(ViewPolicy(seed=0, pixels=_SIDE), device, threads=1)
    images_BCHW, reasons = decoder.decode(samples, TEST_VIEW)
    decoder.close()
    off_BSSC = images_BCHW.permute(0, 2, 3, 1).cpu().numpy().astype(float) - true_SSC
    off = float(np.abs(off_BSSC).mean(axis=(1, 2, 3)).max())
    by = "" if device != "cpu" else f"; JPEGs by {jpeg_decoder(device)}"
    found = f"{version('nvidia-dali-cuda130')} decodes JPEG, PNG and WebP{by}"
    if any(reasons) or off > _OFF:
        why = next(filter(None, reasons), f"pixels are off by {off:.0f} levels")
        yield Finding(name, "fail", f"does not decode: {why}", "run make, for the tested version")
    else:
        yield Finding(name, "ok", found)


def deepspeed_() -> Iterator[Finding]:
    """Initialises DeepSpeed for a tiny model in a process group of one, and takes a step."""
    import deepspeed
    import deepspeed.ops
    import torch
    import torch.distributed as dist

    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__ = {}  # or it compiles one for CPUs, see train/student.py
    model = torch.nn.Linear(4, 1).to(device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 1},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    losses = []
    for _ in range(2):
        loss = engine(torch.ones(8, 4, device=device)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    dist.destroy_process_group()
    if losses[1] < losses[0]:
        yield Finding("DeepSpeed", "ok", f"{deepspeed.__version__} takes a step, over {backend}")
    else:
        found = f"{deepspeed.__version__}: a step makes the loss no smaller ({losses})"
        yield Finding("DeepSpeed", "fail", found, "run make, for the tested version")


def gpus() -> Iterator[Finding]:
    """What NVML tells of the driver and its GPUs; needed for the figures of a run alone."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if has_gpu():
            mend = "install the driver's libnvidia-ml; without it runs tell no GPU figures"
            yield Finding("NVML", "warn", str(error), mend)
        else:
            yield Finding("NVML", "skip", f"no GPU: not needed ({error})")
        return
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    driver = pynvml.nvmlSystemGetDriverVersion()
    number = pynvml.nvmlDeviceGetCount()
    found = f"driver {driver}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}; {number} GPUs"
    yield Finding("NVML", "ok", found)
    for index in range(number):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for why, mend in _complaints(handle):
            yield Finding("NVML", "warn", f"GPU {index}: {why}", mend)


def _complaints(handle) -> Iterator[tuple[str, str]]:
    """What is wrong with a GPU, and how to mend it; some GPUs tell less."""
    import pynvml

    kinds = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    try:
        if errors := pynvml.nvmlDeviceGetTotalEccErrors(handle, *kinds):
            yield f"{errors} memory errors that ECC could not correct", "reset it, or replace it"
    except pynvml.NVMLError:
        pass  # no ECC
    try:
        if pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & _SLOWED:
            yield "its hardware slows it down", "look after its cooling and its power supply"
    except pynvml.NVMLError:
        pass
