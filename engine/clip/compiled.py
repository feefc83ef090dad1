"""Image towers compiled for one size of batch, and tried before they are trusted.

Letters: B images, K prompted layers, P prompts, C tower width, D embedding width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.clip.quantized import QuantizedLayer
from engine.clip.towers import ImageTower
from engine.config import Compile, UserError
from engine.progress import say

__all__ = ["Run", "compiled"]

Run = Callable[[Tensor, Tensor | None], Tensor]  # images [B, 3, S, S], prompts -> features [B, D]

# Most images whose kernels may be shorter than their launches, which a CUDA graph saves.
_GRAPHED = 64
# Largest norm of an error, of features or of the prompts' gradient, over the norm of what is right.
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
# The last digit of an input changes some of 8 bits, and these others, down to the last layer.
_ALLOWED_IN_8_BITS = 0.2


def compiled(
    tower: ImageTower, images: int, prompts_KPC: Tensor | None, asked: Compile, field: str
) -> Run:
    """What gives the features of batches of `images`; smaller ones are padded, larger ones as ever.
    Not for two threads at a time, nor for a backward after the next forward.

    With gradients with respect to the prompts, if `prompts_KPC`, an example of them, takes some.
    `auto` compiles on GPUs, and says so where the compiled tower fails or differs; "on" raises
    UserError, naming `field`, instead. Compiles now, for as many CPU threads as torch now has;
    waits for the device.
    """
    device = tower.class_embedding.device
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return tower
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, tower.pixels, tower.pixels)
    images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    say(f"compiling {field.split('.')[0]}'s tower for {images} images")
    try:
        fast = _placed(tower, _built(tower, images_BCHW, prompts_KPC), images_BCHW)
        # Of other images: those that it was compiled with might have become a part of it.
        why = _difference(tower, fast, 255 - images_BCHW, prompts_KPC)
    except Exception as error:  # a compiler's, a driver's or the device's: any will do
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if not why:
        return fast
    if asked == "on":
        raise UserError(f"{field}: compiled for {device}, the tower fails: {why}")
    say(f"warning: {field}: the tower is not compiled, since that fails on {device}: {why}")
    return tower


def _placed(tower: ImageTower, fast: Run, place_BCHW: Tensor) -> Run:
    """Has images put in the place of those that it was compiled with. Others may have other
    strides, or come from inference mode, for which it would be compiled anew."""

    def run(images_BCHW: Tensor, prompts_KPC: Tensor | None) -> Tensor:
        count = len(images_BCHW)
        if count > len(place_BCHW):
            return tower(images_BCHW, prompts_KPC)
        place_BCHW[:count].copy_(images_BCHW)  # what lies behind them is left as it is
        return fast(place_BCHW, prompts_KPC)[:count]

    return run


def _built(tower: ImageTower, images_BCHW: Tensor, prompts_KPC: Tensor | None) -> Run:
    on_gpu = images_BCHW.is_cuda
    # Without graphs of the compiler's own: they share memory, as if all ran on one stream, but a
    # teacher labels on one while a student trains on another.
    mode = "max-autotune-no-cudagraphs" if on_gpu else "default"
    fast: Any = torch.compile(tower, mode=mode, dynamic=False, fullgraph=True)
    if not on_gpu or len(images_BCHW) > _GRAPHED:
        return fast
    if prompts_KPC is None or not prompts_KPC.requires_grad:
        return _Graph(fast, images_BCHW, prompts_KPC)
    example_KPC = prompts_KPC.detach().clone().requires_grad_()
    graphed: Any = torch.cuda.make_graphed_callables(
        lambda images, prompts: fast(images, prompts), (images_BCHW, example_KPC)
    )
    return graphed


class _Graph:
    """A CUDA graph of a forward, in memory of its own. Images are to lie where those lay that it
    was recorded with; prompts are always the same."""

    @torch.inference_mode()
    def __init__(self, run: Run, images_BCHW: Tensor, prompts_KPC: Tensor | None) -> None:
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is made at the first calls belongs to no graph
                run(images_BCHW, prompts_KPC)
        now.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # On a stream of its own: cuBLAS has a workspace for each, which graphs recorded on the same
        # one share, and a student's is replayed beside a teacher's. Other threads may allocate.
        with torch.cuda.graph(
            self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"
        ):
            self._features_BD = run(images_BCHW, prompts_KPC)

    def __call__(self, images_BCHW: Tensor, prompts_KPC: Tensor | None) -> Tensor:
        self._graph.replay()
        return self._features_BD.clone()


def _difference(
    tower: ImageTower, fast: Run, images_BCHW: Tensor, prompts_KPC: Tensor | None
) -> str:
    """How far a compiled tower is from its tower, if that is too far."""
    ours, right = (_answers(run, images_BCHW, prompts_KPC) for run in (fast, tower))
    in_8_bits = any(isinstance(layer, QuantizedLayer) for layer in tower.blocks)
    allowed = _ALLOWED_IN_8_BITS if in_8_bits else _ALLOWED[tower.dtype]
    for name, answer in right.items():
        wrong = ((ours[name] - answer).norm() / answer.norm()).item()
        if not wrong <= allowed:
            return f"its {name} are off by {wrong:.1g} of its norm"
    return ""


def _answers(run: Run, images_BCHW: Tensor, prompts_KPC: Tensor | None) -> dict[str, Tensor]:
    """Features, and the prompts' gradient where they take one."""
    if prompts_KPC is None or not prompts_KPC.requires_grad:
        with torch.inference_mode():
            return {"features": run(images_BCHW, prompts_KPC).float()}
    leaf_KPC = prompts_KPC.detach().clone().requires_grad_()
    features_BD = run(images_BCHW, leaf_KPC).float()
    weight_BD = torch.linspace(-1, 1, features_BD.numel()).view_as(features_BD)
    (weight_BD.to(features_BD.device) * features_BD).sum().backward()
    assert leaf_KPC.grad is not None
    return {"features": features_BD.detach().clone(), "gradients": leaf_KPC.grad}
