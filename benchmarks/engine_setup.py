"""What a run of the engine's benchmark is made of: size, models, settings and group."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from models import Tower, write_clip

from engine.clip.class_vectors import encode_classes
from engine.clip.towers import load_clip
from engine.config import (
    ClassesConfig,
    CorpusConfig,
    RunConfig,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
    TeacherPrecision,
    TrainConfig,
)
from engine.data.corpus import open_corpora
from engine.data.order import Blocks, Order
from engine.labels.assignment import Assignment
from engine.labels.teacher import Labels, TeacherSpec, labellings

__all__ = ["Size", "assignment_of", "cores", "join_group", "order_of"]

WINDOW_BLOCKS = 2


class Size(NamedTuple):
    name: str
    teacher: Tower
    student: Tower
    classes: int
    batch: int
    block: int  # samples
    lanes: int
    photo: tuple[int, int]
    shards: int  # of a block of photos each
    steps: int  # of a window
    warm: int  # windows that do not count
    windows: int  # that count

    @property
    def all_steps(self) -> int:
        return self.steps * (self.warm + self.windows)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def order_of(size: Size) -> Order:
    """Of a single pass that is as long as a run, so that its only checkpoint is at its end."""
    blocks = Blocks(np.array([size.all_steps * size.batch]), size.block)
    return Order(blocks, size.lanes, size.batch, WINDOW_BLOCKS * size.block, seed=1)


def assignment_of(
    place: Path, size: Size, device: torch.device, precision: TeacherPrecision
) -> Assignment:
    """Models with random weights, class vectors, and the settings of all runs."""
    on_gpu = device.type == "cuda"
    teacher, student = (
        write_clip(place / name, tower)
        for name, tower in (("teacher", size.teacher), ("student", size.student))
    )
    names = tuple(f"class {number}" for number in range(size.classes))
    classes = encode_classes(load_clip(teacher, "", "teacher."), names, ("{}",))
    config = RunConfig(
        name="run",
        runs_dir=str(place),
        device="cuda" if on_gpu else "cpu",
        corpus=CorpusConfig(
            shards=str(place / "shards"),
            block_samples=size.block,
            window_blocks=WINDOW_BLOCKS,
            lanes=size.lanes,
        ),
        classes=ClassesConfig(names="unused"),
        teacher=TeacherConfig(
            model=teacher,
            precision=precision,
            max_kl=1e9,  # of random models the answers tell nothing
            min_agreement=0.0,
            batch=size.batch,
        ),
        student=StudentConfig(
            model=student,
            precision="bf16" if on_gpu else "fp32",
            depth=min(9, size.student.layers),
            threads=cores(),
        ),
        targets=TargetsConfig(source="inline"),
        train=TrainConfig(
            passes=1,
            batch=size.batch,
            lr=1e-5,
            lr_batch=0,
            judge_images=10**9,  # of random models nothing is to be learned
            checkpoint_steps=10**6,
            log_steps=size.steps,
        ),
    )
    labels = Labels.of(config, [TeacherSpec(config.teacher, classes)], features=False)
    told = labellings(labels, open_corpora(config.corpus), device.type)
    return Assignment(config, labels, told, records=False)


def join_group(place: Path, device: torch.device) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # which DeepSpeed reads
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place}/group", rank=0, world_size=1)
