"""Image towers compiled for one size of batch, and tried before they are trusted.

Letters: B images, K prompted layers, P prompts, C tower width, D embedding width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.clip.towers import ImageTower
from engine.config import Compile, UserError
from engine.progress import say

__all__ = ["Run", "compiled"]

Run = Callable[[Tensor, Tensor | None], Tensor]  # images [B, 3, S, S], prompts -> features [B, D]

# Most images whose kernels may be shorter than their launches, which a CUDA graph saves.
_GRAPHED = 64
# Largest norm of an error, of features or of the prompts' gradient, over the norm of what is right.
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def compiled(
    tower: ImageTower, images: int, prompts_KPC: Tensor | None, asked: Compile, field: str
) -> Run:
    """What gives the features of batches of `images`; smaller ones are padded, larger ones as ever.

    With gradients with respect to the prompts, if `prompts_KPC`, an example of them, takes some.
    `auto` compiles on GPUs, and says so where the compiled tower fails or differs; "on" raises
    UserError, naming `field`, instead. Compiles now; waits for the device.
    """
    device = tower.class_embedding.device
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return tower
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, tower.pixels, tower.pixels)
    images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    say(f"compiling {field.split('.')[0]}'s tower for {images} images")
    try:
        fast = _built(tower, images_BCHW, prompts_KPC)
        why = _difference(tower, fast, images_BCHW, prompts_KPC)
    except Exception as error:  # a compiler's, a driver's or the device's: any will do
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if not why:
        return _padded(tower, fast, images)
    if asked == "on":
        raise UserError(f"{field}: compiled for {device}, the tower fails: {why}")
    say(f"warning: {field}: the tower is not compiled, since that fails on {device}: {why}")
    return tower


def _padded(tower: ImageTower, fast: Run, images: int) -> Run:
    def run(images_BCHW: Tensor, prompts_KPC: Tensor | None) -> Tensor:
        lacks = images - len(images_BCHW)
        if lacks < 0:
            return tower(images_BCHW, prompts_KPC)
        if lacks == 0:
            return fast(images_BCHW, prompts_KPC)
        padded_BCHW = F.pad(images_BCHW, (*[0] * 6, 0, lacks))
        return fast(padded_BCHW, prompts_KPC)[: len(images_BCHW)]

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
    """A CUDA graph of a forward, in memory of its own; the prompts are always the same."""

    @torch.inference_mode()
    def __init__(self, run: Run, images_BCHW: Tensor, prompts_KPC: Tensor | None) -> None:
        self._images_BCHW, now = images_BCHW.clone(), torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is made at the first calls belongs to no graph
                run(self._images_BCHW, prompts_KPC)
        now.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._features_BD = run(self._images_BCHW, prompts_KPC)

    def __call__(self, images_BCHW: Tensor, prompts_KPC: Tensor | None) -> Tensor:
        self._images_BCHW.copy_(images_BCHW)
        self._graph.replay()
        return self._features_BD.clone()


def _difference(
    tower: ImageTower, fast: Run, images_BCHW: Tensor, prompts_KPC: Tensor | None
) -> str:
    """How far a compiled tower is from its tower, if that is too far."""
    ours, right = (_answers(run, images_BCHW, prompts_KPC) for run in (fast, tower))
    for name, answer in right.items():
        wrong = ((ours[name] - answer).norm() / answer.norm()).item()
        if not wrong <= _ALLOWED[tower.dtype]:
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
