"""Whole runs and their stages alone, with what they cost, for the benchmark of the label plane.

Rates are of the steady state: of the images after the first `SKIPPED` of a run, and before its
last `LEFT`, when the teacher has nothing more to do. Costs are CPU seconds, user and system, of
this process and all that descend from it, Ray's own among them, between the same two moments.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray
from models import Tower, write_clip
from photos import photos

from engine import cluster
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.towers import load_clip
from engine.config import (
    ClassesConfig,
    CorpusConfig,
    RunConfig,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
    TrainConfig,
)
from engine.data.corpus import open_corpora
from engine.labels.assignment import Assignment
from engine.labels.pool import start_teacher
from engine.labels.roster import Roster
from engine.labels.targets import BlockView
from engine.labels.teacher import Labels, TeacherSpec, labellings
from engine.run import distill, distill_students

PIXELS, WIDTH, CLASSES = 64, 512, 1000
BATCH, BLOCK, LANES, WINDOW = 32, 32, 2, 2
LEFT = LANES * WINDOW * BLOCK  # images: a shuffling window of all lanes, asked for one ahead
SKIPPED = 2 * LEFT
TOWERS = {  # layers and width; costs are against a step of the student
    "student": (6, 192),
    "equal": (5, 384),
    "heavy": (10, 384),
}
_PERIOD_S = 1.0  # of the meter


class Measured(NamedTuple):
    """A run, or a part of one, in its steady state."""

    images_per_second: float  # of all its students
    cpu_s: dict[str, float]  # per image: of `teacher`, `student`, `ray` and `driver`
    cores: float  # busy


@dataclass(frozen=True)
class Rig:
    """Models, images and settings of all runs, in a folder of their own."""

    place: Path
    images: int

    @classmethod
    def built(cls, place: Path, images: int) -> "Rig":
        photos(place / "shards", (96, 96), images, 4)
        names = place / "classes.txt"
        names.write_text("".join(f"class {n}\n" for n in range(CLASSES)))
        for tower, (layers, width) in TOWERS.items():
            model = write_clip(place / tower, Tower(layers, width, 8, PIXELS, WIDTH))
            clip = load_clip(model, "", "teacher.")
            classes = encode_classes(clip, tuple(names.read_text().splitlines()), ("{}",))
            classes.save(place / f"{tower}.safetensors")
        return cls(place, images)

    def config(
        self, name: str, source: str, teacher: str, passes: int = 1, store: str = ""
    ) -> RunConfig:
        """Every process has one thread."""
        return RunConfig(
            name=name,
            runs_dir=str(self.place / "runs"),
            overwrite=True,
            device="cpu",
            corpus=CorpusConfig(
                shards=str(self.place / "shards"),
                block_samples=BLOCK,
                window_blocks=WINDOW,
                lanes=LANES,
            ),
            classes=ClassesConfig(
                names=str(self.place / "classes.txt"),
                vectors=str(self.place / f"{teacher}.safetensors"),
            ),
            teacher=TeacherConfig(
                model=f"local-dir:{self.place / teacher}", precision="fp32", batch=BATCH, threads=1
            ),
            student=StudentConfig(model=f"local-dir:{self.place / 'student'}", depth=6, threads=1),
            targets=TargetsConfig(source=source, store=store),  # type: ignore[arg-type]
            train=TrainConfig(
                passes=passes,
                batch=BATCH,
                lr=1e-5,
                lr_batch=0,
                judge_images=10**9,  # of random models nothing is to be learned
                checkpoint_steps=10**6,
                log_steps=1,
            ),
        )


class Meter:
    """CPU seconds by kind of process, sampled on a thread, whose own are left out."""

    def __init__(self) -> None:
        self._spent: Counter[str] = Counter()
        self._seen: dict[int, float] = {}
        self._samples: list[tuple[float, Counter[str]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds between two moments of time.time(), interpolated."""
        times = [at for at, _ in self._samples]
        assert times[0] <= start < end <= times[-1]
        kinds = self._samples[-1][1]
        columns = {kind: [spent[kind] for _, spent in self._samples] for kind in kinds}
        return {
            kind: float(np.interp(end, times, column) - np.interp(start, times, column))
            for kind, column in columns.items()
        }

    def _run(self) -> None:
        while True:
            ended = self._stop.is_set()
            self._sample()
            if ended:
                return
            self._stop.wait(_PERIOD_S)

    def _sample(self) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            try:
                spent, kind = sum(process.cpu_times()[:2]), "driver"
                if process != me:
                    kind = _kind(" ".join(process.cmdline()))
                else:
                    spent -= time.thread_time()
            except psutil.NoSuchProcess:
                continue
            self._spent[kind] += spent - self._seen.get(process.pid, 0.0)
            self._seen[process.pid] = spent
        self._samples.append((time.time(), Counter(self._spent)))


def _kind(command: str) -> str:
    if "TeacherActor" in command:
        return "teacher"
    return "student" if "RayTrainWorker" in command else "ray"


# ---------------------------------------------------------------- runs


def run(config: RunConfig) -> Measured:
    """One student, by the product."""
    with Meter() as meter:
        distill(config)
    return measured([config], meter)


def run_students(configs: Sequence[RunConfig]) -> Measured:
    """Several on one stream."""
    with Meter() as meter:
        for outcome in distill_students({config.name: config for config in configs}).values():
            if isinstance(outcome, Exception):
                raise outcome
    return measured(configs, meter)


def run_side_by_side(configs: Sequence[RunConfig]) -> Measured:
    """Runs of their own, at the same time."""
    with Meter() as meter, ThreadPoolExecutor(len(configs)) as threads:
        list(threads.map(distill, configs))
    return measured(configs, meter)


def steps(config: RunConfig) -> list[dict[str, Any]]:
    """The records of a run's steps so far."""
    file = config.folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [record for record in records if record["kind"] == "train"]


def measured(configs: Sequence[RunConfig], meter: Meter) -> Measured:
    """While all of the runs are in their steady state."""
    told = [steps(config) for config in configs]
    start = max(one[SKIPPED // BATCH - 1]["time"] for one in told)
    end = min(one[-1 - LEFT // BATCH]["time"] for one in told)
    inside = [[step for step in one if start <= step["time"] <= end] for one in told]
    images = BATCH * sum(len(one) - 1 for one in inside)
    # A teacher may be further ahead at one end than at the other: its images are those it labelled.
    received = [[step["labels"].get("received", 0) for step in one] for one in inside]
    return _measured(images, sum(one[-1] - one[0] for one in received), start, end, meter)


def _measured(images: int, labelled: int, start: float, end: float, meter: Meter) -> Measured:
    spent = meter.between(start, end)
    return Measured(
        images / (end - start),
        {
            kind: cpu_s / (labelled if kind == "teacher" and labelled else images)
            for kind, cpu_s in spent.items()
        },
        sum(spent.values()) / (end - start),
    )


def teacher_alone(config: RunConfig) -> Measured:
    """A teacher actor that is asked for all labels of a run, by nobody who trains."""
    assignment = assignment_of(config)
    blocks = len(open_corpora(config.corpus)["shards"].blocks)
    passes = range(config.train.passes)
    wanted = deque(BlockView("shards", block, view) for view in passes for block in range(blocks))
    asked: set[ray.ObjectRef] = set()
    times = []
    (node,) = ray.nodes()
    roster = ray.remote(Roster).options(num_cpus=0).remote()
    ray.get(roster.set.remote((), "", (ray.put(assignment),)))
    with Meter() as meter:
        teacher = start_teacher(config.teacher, roster, node["NodeID"])
        while wanted or asked:
            while wanted and len(asked) < (config.targets.outstanding or 4):
                asked.add(teacher.label.remote(wanted.popleft()))
            (ready,), _ = ray.wait(list(asked))
            asked.remove(ready)
            ray.get(ready)
            times.append(time.time())
        ray.kill(teacher)
    skipped = SKIPPED // BLOCK
    end = len(times) - LEFT // BLOCK
    images = BLOCK * (end - skipped)
    return _measured(images, images, times[skipped - 1], times[end - 1], meter)


def assignment_of(config: RunConfig) -> Assignment:
    """What the teachers of a run are told."""
    staff = [TeacherSpec(config.teacher, ClassVectors.load(Path(config.classes.vectors)))]
    labels = Labels.of(config, staff, features=False)
    corpora = open_corpora(config.corpus)
    return Assignment(config, labels, labellings(labels, corpora, "cpu"), records=False)


def start_ray() -> None:
    """One cluster for all runs, of a CPU for each of four students, who share what there is."""
    cluster.start("", 4)
