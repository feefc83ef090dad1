"""The cases `teacher`, `student` and `tricks` of `bench_towers`: towers alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tower_models import (
    BACKWARD,
    FORWARD,
    PRECISIONS,
    Pair,
    default_precisions,
    draw_images,
    fast,
    gflops,
    image_tower,
    normalised,
    peer_precisions,
    student_gflops,
    student_of,
)
from tower_peers import OpenClipStudent, OpenClipTower, compiled, new_step
from tower_rig import Call, Rig, Tower, Work, compare

from engine.clip.layers import Tricks
from engine.clip.towers import DTYPES

__all__ = ["student", "teacher", "tricks"]

CPU = torch.device("cpu")


def teacher(rig: Rig) -> None:
    for tower in rig.plan.towers:
        _teacher(rig, tower)


def _teacher(rig: Rig, size: Tower) -> None:
    device, batch = rig.device, size.images
    own, theirs = default_precisions(device)[0], peer_precisions(device)[0]
    pair = Pair.drawn(size.model, size.model, 2)
    visual, prompts = pair.teacher.visual, pair.prompts.vision_KPC.to(device)
    raw, cost = draw_images(batch, pair.pixels, device), gflops(visual)

    def open_clip(precision: str, compile: bool) -> Call:
        tower = OpenClipTower(visual, DTYPES[precision], device)
        run = compiled(tower, device) if compile else tower
        return forward(run, normalised(raw, DTYPES[precision]), prompts)

    def ours(precision: str, compile: bool) -> Call:
        tower = image_tower(visual, precision, device)
        return forward(fast(tower, batch, prompts) if compile else tower, raw, prompts)

    works = {}
    for precision in size.precisions or {own, theirs}:
        for name, make, compile in (
            ("open_clip", open_clip, precision == theirs),
            ("ours", ours, precision == own or precision != "fp32"),
        ):
            if name == "ours" or precision in DTYPES:
                works[f"{name}-{precision}"] = Work(
                    partial(make, precision, False), batch, cost, precision
                )
                if size.precisions and compile:
                    works[f"{name}-compiled-{precision}"] = Work(
                        partial(make, precision, True), batch, cost, precision, compiled=True
                    )
    case = f"teacher, {size.model}, B={batch}"
    config = {"model": size.model, "flops": FORWARD, "prompts": list(prompts.shape[:2])}
    compare(rig, case, works, config, f"ours-compiled-{own}" if size.precisions else f"ours-{own}")


def forward(run: Callable[..., Tensor], images: Tensor, prompts: Tensor) -> Call:
    @torch.inference_mode()
    def call() -> Tensor:
        new_step(images.device)
        return run(images, prompts)

    return call


def student(rig: Rig) -> None:
    device, batch, model = rig.device, rig.plan.student, rig.plan.pair[1]
    own, theirs = default_precisions(device)[1], peer_precisions(device)[1]
    pair = Pair.drawn(model, model, 2)
    raw, cost = draw_images(batch, pair.pixels, device), student_gflops(pair.student.visual)

    def open_clip(precision: str, compile: bool) -> Call:
        tower = OpenClipTower(pair.student.visual, DTYPES[precision], device)
        made = OpenClipStudent(tower, student_of(pair, "fp32", CPU)).to(device)
        run = compiled(made, device) if compile else made
        return backward(run, normalised(raw, DTYPES[precision]), made)

    def ours(precision: str, compile: bool) -> Call:
        made = student_of(pair, precision, device, batch if compile else 0)
        return backward(partial(made, unit=False), raw, made)

    works = {}
    for precision in (one for one in PRECISIONS[device.type] if one in DTYPES):
        for name, make, chosen in (("open_clip", open_clip, theirs), ("ours", ours, own)):
            works[f"{name}-{precision}"] = Work(
                partial(make, precision, False), batch, cost, precision
            )
            if precision == chosen:
                works[f"{name}-compiled-{precision}"] = Work(
                    partial(make, precision, True), batch, cost, precision, compiled=True
                )
    config = {"model": model, "flops": f"{FORWARD} + {BACKWARD}"}
    compare(rig, f"student, B={batch}", works, config, f"ours-compiled-{own}")


def backward(run: Callable[..., Tensor], images: Tensor, made: nn.Module) -> Call:
    """Gradients of all that is learned, from one of the features."""
    given: list[Tensor] = []

    def call() -> None:
        made.zero_grad()
        new_step(images.device)
        x_BD = run(images)
        if not given:
            given.append(torch.randn_like(x_BD))
        x_BD.backward(given[0])

    return call


def tricks(rig: Rig) -> None:
    """What each brings, in both towers."""
    device, batch = rig.device, rig.plan.tricks
    pair = Pair.drawn(*rig.plan.pair, 2)
    raw, prompts = draw_images(batch, pair.pixels, device), pair.prompts.vision_KPC.to(device)
    precisions = default_precisions(device)

    def switched(tower: Any, off: str) -> Any:
        if off:
            tower.tricks = tower.tricks._replace(**{off: False})
        return tower

    def of_teacher(off: str) -> Call:
        tower = image_tower(pair.teacher.visual, precisions[0], device)
        return forward(switched(tower, off), raw, prompts)

    def of_student(off: str) -> Call:
        made = student_of(pair, precisions[1], device)
        switched(made.tower, off)
        return backward(partial(made, unit=False), raw, made)

    names = {"ours": "", **{f"without-{off}": off for off in Tricks._fields}}
    costs = gflops(pair.teacher.visual), student_gflops(pair.student.visual)
    for at, (case, make) in enumerate((("teacher", of_teacher), ("student", of_student))):
        works = {
            name: Work(partial(make, off), batch, costs[at], precisions[at])
            for name, off in names.items()
        }
        config = {"model": rig.plan.pair[at], "compiled": False}
        compare(rig, f"tricks, {case}, B={batch}", works, config, "ours")
