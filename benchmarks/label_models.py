"""The models of a run in plain loops, and what they cost there."""

import multiprocessing
import os
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from label_runs import BATCH, BLOCK, PIXELS, WIDTH, assignment_of

from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from engine.config import RunConfig
from engine.data.corpus import open_corpora
from engine.labels.assignment import labeller_of
from engine.labels.targets import BlockView, Targets
from engine.labels.teacher import Team

LOOP_S = 5.0


class Models(NamedTuple):
    """CPU seconds per image of the parts of a run, in plain loops."""

    forward: float
    step: float
    decode: float


def models_alone(config: RunConfig) -> Models:
    """Forwards and steps at the same time, each by a process of its own, since what two processes
    take from each other's caches is no run's overhead; then decoding."""
    context = multiprocessing.get_context("spawn")
    found, together = context.Queue(), context.Barrier(2)
    processes = [
        context.Process(target=_loop, args=(kind, config, together, found))
        for kind in ("forward", "step")
    ]
    for process in processes:
        process.start()
    told: dict[str, float] = {}
    for _ in processes:
        told |= found.get(timeout=120)
    for process in processes:
        process.join()
    return Models(**told)


def _loop(kind: str, config: RunConfig, together: Any, found: Any) -> None:
    torch.set_num_threads(1)
    body = {"forward": _forwards, "step": _steps}[kind](config)
    body()
    together.wait()
    told = {kind: _cpu_s(body) / BATCH}
    together.wait()  # both end at about the same time
    if kind == "forward":
        told["decode"] = _cpu_s(_decodes(config)) / BLOCK
    found.put(told)


def _cpu_s(body: Callable[[], object]) -> float:
    """Of one call, on average."""
    calls, until, cpu = 0, time.perf_counter() + LOOP_S, time.process_time()
    while time.perf_counter() < until:
        body()
        calls += 1
    return (time.process_time() - cpu) / calls


def _forwards(config: RunConfig) -> Callable[[], object]:
    team = Team.load(assignment_of(config).labels, torch.device("cpu"), BATCH)
    images_BCHW = torch.randint(0, 256, (BATCH, 3, PIXELS, PIXELS), dtype=torch.uint8)
    return lambda: team.values({PIXELS: images_BCHW})


def _steps(config: RunConfig) -> Callable[[], object]:
    from engine.train.student import StudentTrainer  # DeepSpeed is slow to import

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    folder = TemporaryDirectory()
    dist.init_process_group("gloo", init_method=f"file://{folder.name}/s", rank=0, world_size=1)
    assignment = assignment_of(config)
    clip = load_clip(config.student.model, "", "student.")
    classes = assignment.labels.teachers[0].classes
    w_ND, told = torch.from_numpy(classes.vectors), config.student
    student = PromptedTower(clip.image, told.prompts, told.depth, WIDTH, WIDTH, config.seed)
    scales = clip.logit_scale, classes.logit_scale
    trainer = StudentTrainer(student, w_ND, *scales, config.train, told.zero_stage, 10**6)
    images_BCHW = torch.randint(0, 256, (BATCH, 3, PIXELS, PIXELS), dtype=torch.uint8)
    values_BX = torch.nn.functional.normalize(torch.randn(BATCH, WIDTH), dim=-1).half()
    targets = Targets("features", values_BX, np.ones(BATCH, bool))
    return lambda: trainer.step(0, images_BCHW, targets)


def _decodes(config: RunConfig) -> Callable[[], object]:
    labeller = labeller_of(assignment_of(config), torch.device("cpu"))
    blocks = len(open_corpora(config.corpus)["shards"].blocks)
    wanted = (BlockView("shards", n % blocks, n // blocks) for n in range(10**9))

    def one() -> None:
        block = next(wanted)
        labeller.decode(block, labeller.read(block))

    return one
